"""Convert annotations: COCO, LabelMe, GeoJSON + GeoTIFF and GRES to the own format, and back.

python scripts/convert_data.py --source coco --input instances.json --pictures images --out my_data/train
python scripts/convert_data.py --source geo --input ships.geojson --pictures scene.tif --label kind --out
my_data/train python scripts/convert_data.py --target geo --input my_data/train --out for_gis
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.convert_job import ConvertConfig, run  # noqa: E402
from utils.config import parse_config  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Convert and report; 0 if nothing was left out, 1 if something was, 2 if nothing could be done."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        done = run(parse_config(ConvertConfig, argv, prog="convert_data.py"))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(done.lines()))
    return 1 if done.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
