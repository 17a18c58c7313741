"""Evaluate a LISAT checkpoint: `python eval_lisat.py --cmd inference|metrics|bootstrap_metrics|download`.

Several processes: `torchrun --nproc_per_node 4 eval_lisat.py ...`, or one call per process with
`--process_num i --world_size n`. The flags are the fields of `utils.evaluate_lisat.EvalConfig`.
"""

import logging
import sys

from utils.config import parse_config
from utils.evaluate_lisat import EvalConfig, run


def main() -> None:
    """Parse the command line, run the command, print its result."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    try:
        print(run(parse_config(EvalConfig, prog="eval_lisat.py")))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"eval_lisat.py: {error}")


if __name__ == "__main__":
    main()
