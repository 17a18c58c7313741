"""Cut xView 1 scenes into the pictures of GRES, with the published numbers, and check that annotations fit.

python scripts/tile_xview.py --scenes xview/train_images --geojson xview/xView_train.geojson \\
    --annotations GRES/gres_annotations --out dataset

Exit code 0 if all is well, 1 if tiles are missing or do not fit, 2 if nothing could be done.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.tile_job import TileConfig, run  # noqa: E402
from utils.config import parse_config  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Number, cut, check, report."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        lines, ok = run(parse_config(TileConfig, argv, prog="tile_xview.py"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
