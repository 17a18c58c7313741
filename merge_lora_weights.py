"""Merge a training run into one LISAT folder: `python merge_lora_weights.py --weight RUN --save_path FOLDER`.

The flags are the fields of `utils.merge_lisat.MergeConfig`.
"""

import logging
import sys

from utils.config import parse_config
from utils.merge_lisat import MergeConfig, merge


def main() -> None:
    """Parse the command line, merge, print where the folder is."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        folder = merge(parse_config(MergeConfig, prog="merge_lora_weights.py"))
    except ValueError as error:
        sys.exit(f"merge_lora_weights.py: {error}")
    print(f"merged: {folder}")


if __name__ == "__main__":
    main()
