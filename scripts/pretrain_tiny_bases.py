"""Make the small bases that the tiny preset starts from (the shipped ones under checkpoints/lisat_tiny_base).

Two runs that may go side by side, one core each:
    python scripts/pretrain_tiny_bases.py --part llava     tokenizer, then a tower and a Llama, no masks
    python scripts/pretrain_tiny_bases.py --part sam       a promptable SAM, no language
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import parse_config  # noqa: E402
from utils.pretrain_tiny import PretrainConfig, make_llava, make_sam  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    """Make one base."""
    config = parse_config(PretrainConfig, argv)
    import torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    {"llava": make_llava, "sam": make_sam}[config.part](config)


if __name__ == "__main__":
    main()
