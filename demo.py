"""Ask a LISAT checkpoint about a picture: `python demo.py --image scene.png --question "Where are ships?"`.

Without a question it asks for questions and pictures until an empty line. The flags are the fields of
`utils.demo_lisat.DemoConfig`.
"""

import logging
import sys

from utils.config import parse_config
from utils.demo_lisat import DemoConfig, run


def main() -> None:
    """Parse the command line, answer, print."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        for text in run(parse_config(DemoConfig, prog="demo.py")):
            print(text, flush=True)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"demo.py: {error}")


if __name__ == "__main__":
    main()
