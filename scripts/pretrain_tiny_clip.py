"""Make the tiny CLIP that InstructSAM's example uses: crops of drawn scenes and the names of what they show.

python scripts/pretrain_tiny_clip.py --out checkpoints/instructsam_tiny
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import parse_config  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Train and write."""
    import torch

    from utils.pretrain_clip import ClipRecipe, save, train

    recipe = parse_config(ClipRecipe, argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(recipe.threads)
    logging.info("written: %s", save(train(recipe), recipe.out))


if __name__ == "__main__":
    main()
