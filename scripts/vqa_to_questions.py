"""Instruction files (LLaVA's JSON) as a question file for pred_lisat_vqa.py and eval_captioning.py.

python scripts/vqa_to_questions.py --vqa data/captions.json --out data/captions.jsonl
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import parse_config  # noqa: E402
from utils.vqa_questions import VqaQuestionsConfig, convert  # noqa: E402


def main() -> None:
    """Convert and say where the questions are."""
    try:
        print(convert(parse_config(VqaQuestionsConfig, prog="vqa_to_questions.py")))
    except (ValueError, OSError) as error:
        sys.exit(f"vqa_to_questions.py: {error}")


if __name__ == "__main__":
    main()
