"""Train LISAT: `python train_lisat.py --config lisat_tiny`, or under torchrun, deepspeed or srun."""

import json
import os
import sys

from utils.config import ConfigError, parse_config
from utils.train_lisat_config import TrainLisatConfig


def main() -> int:
    """Parse, build, run; 2 for a user's fault, 1 for a run that had to stop."""
    try:
        config = parse_config(TrainLisatConfig, prog="train_lisat.py")
    except ConfigError as error:
        from utils.train_lisat_job import all_faults

        print(all_faults(error), file=sys.stderr)
        return 2
    from utils.engine import NonFiniteLoss
    from utils.train_lisat_job import dry_run, train

    try:
        if config.dry_run:
            print(json.dumps(dry_run(config), indent=2, ensure_ascii=False))
            return 0
        result = train(config)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(error, file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        state = "stopped" if result.interrupted else "done"
        print(f"{state} at step {result.step}; checkpoints in {result.run_dir / 'checkpoints'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
