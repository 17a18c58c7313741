"""Draw synthetic scenes with questions: train, val and test folders in the project's own format.

python scripts/draw_scenes.py --out dataset_files/synthetic --train 1500 --val 60 --test 150
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import parse_config  # noqa: E402


@dataclass
class DrawConfig:
    """Settings of the drawing program."""

    out: str = "./dataset_files/synthetic"
    """Folder that gets one sub-folder per split."""
    train: int = 1500
    """Training scenes."""
    val: int = 60
    """Validation scenes."""
    test: int = 150
    """Test scenes."""
    questions: int = 8
    """Questions per scene at the most."""
    size: int = 128
    """Side of a scene in pixels."""
    seed: int = 0
    """Seed; every split continues differently from it."""
    words: bool = False
    """Also write questions with answers in words: captions.json and instructions.json in every split."""
    list_questions: str = ""
    """Draw nothing; print the questions of the first scene in this folder, one per line."""


def main(argv: list[str] | None = None) -> None:
    """Draw every split that has scenes."""
    config = parse_config(DrawConfig, argv)
    if config.list_questions:
        from utils.io import read_json

        for query in read_json(Path(config.list_questions) / "annotations.json")["images"][0]["queries"]:
            text = query["text"]
            print(text if text.endswith("?") else f"Find {text}.")
        return
    from dataset.synthetic import write_scenes
    from dataset.synthetic_qa import write_conversations

    for number, split in enumerate(("train", "val", "test")):
        count = getattr(config, split)
        if count:
            settings = count, config.seed * 3 + number, config.questions, config.size
            write_scenes(Path(config.out) / split, *settings)
            if config.words:
                write_conversations(Path(config.out) / split, *settings)


if __name__ == "__main__":
    main()
