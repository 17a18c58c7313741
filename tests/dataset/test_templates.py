"""Templates: built-in sets, users' files, slots."""

import json
from pathlib import Path

import numpy as np
import pytest

from dataset.templates import BUILT_IN, Pick, Templates, families, load_templates


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_sets_are_whole(name: str) -> None:
    templates = load_templates(name)
    assert all(len(set(getattr(templates, f))) == len(getattr(templates, f)) for f in families())


def test_slots_are_filled_and_users_braces_stay() -> None:
    templates, pick = load_templates(), Pick(np.random.default_rng(0))
    for _ in range(200):
        assert "the {odd} hut" in templates.question("The {odd} Hut", False, pick)
        assert templates.question("Where {x}?", True, pick).startswith("Where {x}? ")
        assert templates.answer("Hut", False, pick).count("[SEG]") == 1
        assert templates.answer("Hut", True, pick, masks=3).count("[SEG] and [SEG] and [SEG]") == 1
        text = templates.deny("Hut {gt_name}", False, pick, found="Lake")
        assert "hut {gt_name}" in text and "lake" in text and "[SEG]" not in text
        assert "{" not in templates.deny("Where?", True, pick)


def test_fixed_picks_depend_on_the_key_alone() -> None:
    family = load_templates().short_question
    chosen = [Pick(key=f"0:{n}.json")(family) for n in range(300)]
    assert chosen == [Pick(key=f"0:{n}.json")(family) for n in range(300)]
    assert set(chosen) == set(family)


def test_json_override_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"denial": ["<image>\nNone."]}))
    templates = load_templates(path)
    assert templates.denial == ("None.",)
    assert templates.short_answer == load_templates().short_answer


def test_python_lists_are_read_not_run(tmp_path: Path) -> None:
    path = tmp_path / "lists.py"
    path.write_text(
        "IMAGE = '<image>'\nraise SystemExit\n"
        "SHORT_QUESTION_LIST = [IMAGE + '\\n' + 'Any {class_name}?', 'Is {class_name} there?']\n"
        "NUMBERS = [1, 2]\n"
    )
    assert load_templates(path).short_question == ("Any {class_name}?", "Is {class_name} there?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"short_question": ["Where?"]}, r"short_question\[0\] lacks \{class_name\}"),
        ({"long_answer": ["Here."]}, r"has 0 \[SEG\], needs 1"),
        ({"denial": []}, "denial is empty"),
        ({"denial": "No."}, "must be a list"),
        ({"denials": ["No."]}, "unknown"),
        ({}, "none of the families"),
    ],
)
def test_faulty_files(tmp_path: Path, content: dict, message: str) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_templates(path)
    with pytest.raises(ValueError, match="no such file"):
        load_templates(tmp_path / "other.json")
    with pytest.raises(ValueError, match="templates"):
        Templates((), (), (), (), (), ())
