"""Instruction files become question files."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.caption_files import read_questions
from utils.config import ConfigError, parse_config
from utils.vqa_questions import VqaQuestionsConfig, convert


@pytest.fixture
def vqa(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        cv2.imwrite(str(tmp_path / "images" / f"{name}.png"), np.zeros((4, 4, 3), np.uint8))

    def row(image: str, *texts: str) -> dict:
        roles = ("human", "gpt") * len(texts)
        return {"image": image, "conversations": [{"from": r, "value": t} for r, t in zip(roles, texts)]}

    rows = [
        row("a.png", "<image>\nDescribe.", "A ship.", "How many?", "One."),
        row("a.png", "Describe.", "A boat."),
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([*rows, row("b.png", "Describe.", "Two tanks.")]))
    return path


def test_captions(vqa: Path, tmp_path: Path) -> None:
    out = convert(VqaQuestionsConfig(vqa=(str(vqa),), out=str(tmp_path / "q" / "captions.jsonl")))
    one, two = read_questions(out, answers=True, images=True)
    assert one.answers == ("A ship.", "A boat.") and one.several and one.text == "Describe."
    assert two.answers == ("Two tanks.",) and two.several and two.category == "caption"
    assert (out.parent / two.image).resolve() == tmp_path / "images" / "b.png"


def test_short_answers(vqa: Path, tmp_path: Path) -> None:
    settings = dict(vqa=(str(vqa),), out=str(tmp_path / "all.jsonl"), category="count", all_turns=True)
    found = read_questions(convert(VqaQuestionsConfig(**settings)), answers=True)
    assert [(q.text, q.answers, q.several) for q in found[1:]] == [
        ("How many?", ("One.",), False),
        ("Describe.", ("Two tanks.",), False),
    ]


def test_faults(vqa: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"\[2\].image: picture b.png is in none of"):
        convert(VqaQuestionsConfig(vqa=(str(vqa),), out=str(tmp_path / "x.jsonl")))
    with pytest.raises(ConfigError) as error:
        parse_config(VqaQuestionsConfig, ["--out", "x.json"])
    assert len(error.value.faults) == 2
