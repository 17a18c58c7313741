"""The stages of InstructSAM over all pictures of a data set (sub-commands of `instructsam.py`)."""

from utils.instructsam_config import CountConfig

FAILED = 3
"""Exit code of a run that went to its end, but without results for some pictures."""


def count(config: CountConfig) -> tuple[str, int]:
    """Counting stage: text for the terminal and exit code."""
    from utils.instructsam_count import run_count

    outcome = run_count(config)
    return outcome.text, FAILED if outcome.failures and not config.allow_failures else 0
