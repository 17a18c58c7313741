"""InstructSAM: count, propose, match, evaluate, or all of it on a folder of pictures.

python instructsam.py run --images FOLDER --words ship plane --counts "ship=3,plane=2"
python instructsam.py COMMAND --help
"""

import logging
import sys

from utils.instructsam_cli import main

if __name__ == "__main__":
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"instructsam.py: {error}")
