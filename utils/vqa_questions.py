"""Instruction files (LLaVA's JSON) as question files with answers: work of `scripts/vqa_to_questions.py`."""

import os
from dataclasses import dataclass
from pathlib import Path

from utils.io import atomic_write_text, to_json


@dataclass
class VqaQuestionsConfig:
    """Write the questions and answers of instruction files as a question file, to be predicted and scored."""

    vqa: tuple[str, ...] = ()
    """Instruction files (JSON)."""
    out: str = ""
    """Question file to write (.jsonl)."""
    pictures: str = ""
    """Folder of the pictures; empty: beside each file, or in `images` there."""
    category: str = "caption"
    """Category of the questions: caption (scored with BLEU and others), or any name of short answers."""
    all_turns: bool = False
    """Every turn as a question of its own; off: the first turn of each dialogue."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = [f"--vqa {path}: no such file" for path in self.vqa if not Path(path).is_file()]
        faults += ["--vqa is empty; name at least one file"] * (not self.vqa)
        faults += [f"--out {self.out!r}: give a file that ends in .jsonl"] * (not self.out.endswith(".jsonl"))
        return faults


def convert(config: VqaQuestionsConfig) -> Path:
    """Write the question file; picture paths are relative to its folder. Equal questions about one picture
    become one with several references.

    Raises:
        ValueError: faulty rows (all of them, up to 20 listed), or rows without a picture only.
    """
    from dataset.base import settle
    from dataset.vqa import read_vqa

    out = Path(config.out)
    found: dict[tuple[str, str], dict[str, None]] = {}
    for file in map(Path, config.vqa):
        folders = [Path(config.pictures)] if config.pictures else [file.parent, file.parent / "images"]
        listing = read_vqa(file, folders)
        settle(listing.faults, True, str(file))
        for item in listing.items:
            if item["image"]:
                image = os.path.relpath(item["image"], out.parent)
                for question, answer in item["turns"][: None if config.all_turns else 1]:
                    found.setdefault((image, question), {})[answer] = None
    if not found:
        raise ValueError(f"{', '.join(config.vqa)}: no question about a picture")
    lines = []
    for number, ((image, question), answers) in enumerate(found.items()):
        several = config.category == "caption" or len(answers) > 1
        row = {"question_id": number, "image": image, "text": question}
        row |= {"answer": list(answers) if several else next(iter(answers)), "category": config.category}
        lines.append(to_json(row, None))
    return atomic_write_text(out, "\n".join(lines) + "\n")
