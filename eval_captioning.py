"""Score captions and short answers: `python eval_captioning.py --answers FILES --predictions FILES`.

The flags are the fields of `utils.eval_captioning.EvalCaptioningConfig`. Exit code 1: a data set could not be
scored (the others are).
"""

import logging
import sys

from utils.config import parse_config
from utils.eval_captioning import EvalCaptioningConfig, run


def main() -> None:
    """Parse the command line, score, print the tables."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    try:
        text, complete = run(parse_config(EvalCaptioningConfig, prog="eval_captioning.py"))
    except (ValueError, OSError) as error:
        sys.exit(f"eval_captioning.py: {error}")
    print(text)
    sys.exit(not complete)


if __name__ == "__main__":
    main()
