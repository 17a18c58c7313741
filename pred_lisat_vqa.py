"""Captions and answers in words: `python pred_lisat_vqa.py --question_files FILES --dataset_base FOLDER`.

Several processes: `torchrun --nproc_per_node 4 pred_lisat_vqa.py ...`, or one call per process with
`--process_num i --world_size n`. The flags are the fields of `utils.predict_vqa.PredictVqaConfig`.
"""

import logging
import sys

from utils.config import parse_config
from utils.predict_vqa import PredictVqaConfig, run


def main() -> None:
    """Parse the command line, answer, say where the answers are."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    try:
        print(run(parse_config(PredictVqaConfig, prog="pred_lisat_vqa.py")))
    except (ValueError, OSError) as error:
        sys.exit(f"pred_lisat_vqa.py: {error}")


if __name__ == "__main__":
    main()
