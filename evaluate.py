"""Score anybody's masks: `python evaluate.py --predictions FILE_OR_FOLDER --val_dataset "GeoReasonSeg|test"`.

Predictions are a file of run-length codes (format: utils/predictions.py) or a folder of PNG masks
(utils/mask_folder.py); no model is needed. Flags: the fields of `utils.evaluate_predictions.ScoreConfig`.
"""

import logging
import sys

from utils.config import parse_config
from utils.evaluate_predictions import ScoreConfig, run


def main() -> None:
    """Parse the command line, run the command, print its result."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    try:
        print(run(parse_config(ScoreConfig, prog="evaluate.py")))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"evaluate.py: {error}")


if __name__ == "__main__":
    main()
