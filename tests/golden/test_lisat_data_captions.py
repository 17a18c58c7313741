"""Captions and short answers against recorded outputs of the published scripts and their libraries."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require_golden
from utils.caption_files import read_predictions_file, read_questions
from utils.caption_java import Unavailable, find_java, ptb_tokenise
from utils.captioning import ROUGE_TYPES, CaptionScores, MeteorOnce, score_captions, vqa_accuracy

GOLDEN = require_golden("lisat_data")
EXPECTED = json.loads((GOLDEN / "captions" / "expected.json").read_text())
PROTOCOLS = {"raw": "raw_strings", "ptb": "ptb_tokenised"}


def java() -> bool:
    try:
        find_java("this test")
    except Unavailable:
        return False
    return True


needs_java = pytest.mark.skipif(
    not java(), reason="Java is not installed (METEOR and the PTB tokeniser need it)"
)


def texts() -> tuple[dict[int, tuple[str, ...]], dict[int, str]]:
    questions = read_questions(GOLDEN / "captions" / "answers.jsonl", answers=True, images=True)
    found = read_predictions_file(GOLDEN / "captions" / "predictions.jsonl").texts
    return {question.question_id: question.answers for question in questions}, found


def scored(protocol: str) -> CaptionScores:
    return score_captions(*texts(), protocol, ["bleu", "cider", "rouge_l"])


@pytest.mark.parametrize("protocol", ["raw", pytest.param("ptb", marks=needs_java)])
def test_bleu_cider_rouge_l(protocol: str) -> None:
    found, expected = scored(protocol), EXPECTED[PROTOCOLS[protocol]]
    for n in range(4):
        assert found.scores[f"bleu_{n + 1}"] == pytest.approx(expected["bleu"][n], abs=1e-6)
        single = [row[n] for row in expected["bleu_per_caption"]]
        assert found.single[f"bleu_{n + 1}"] == pytest.approx(single, abs=1e-6)
    for name, theirs in {"cider": "cider", "rouge_l": "rouge_l_coco"}.items():
        assert found.scores[name] == pytest.approx(expected[theirs], abs=1e-6)
        assert found.single[name] == pytest.approx(expected[f"{theirs}_per_caption"], abs=1e-6)


def test_what_the_published_scripts_print() -> None:
    printed, scores = EXPECTED["official_scripts_stdout"], scored("raw").scores
    for n, value in re.findall(r"Bleu-(\d): ([\d.]+)", printed["bleu"]):
        assert f"{scores[f'bleu_{n}']:.6f}" == value
    assert scores["cider"] == pytest.approx(float(printed["cider"].split()[-1]), abs=1e-6)


@needs_java
def test_ptb_tokens() -> None:
    references, predictions = texts()
    expected = EXPECTED["ptb_tokenised_texts"]
    ids = sorted(references)
    flat = [ref for key in ids for ref in references[key]]
    found = iter(ptb_tokenise([predictions[key] for key in ids] + flat))
    assert [next(found) for _ in ids] == expected["predictions"]
    assert [[next(found) for _ in references[key]] for key in ids] == expected["references"]


@pytest.fixture(scope="module")
def meteor() -> Iterator[MeteorOnce]:
    with MeteorOnce() as running:
        yield running


@needs_java
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_meteor(meteor: MeteorOnce, protocol: str) -> None:
    found = score_captions(*texts(), protocol, ["meteor"], meteor=meteor)
    expected = EXPECTED[PROTOCOLS[protocol]]
    assert found.scores["meteor"] == pytest.approx(expected["meteor"], abs=1e-6)
    assert found.single["meteor"] == pytest.approx(expected["meteor_per_caption"], abs=1e-6)
    if protocol == "raw":
        printed = float(EXPECTED["official_scripts_stdout"]["meteor"].split()[-1])
        assert found.scores["meteor"] == pytest.approx(printed, abs=1e-6)


def test_rouge_score() -> None:
    expected = EXPECTED["rouge_score_stemmed"]
    (drawn,) = [name for name in expected if name.startswith("bootstrap")]
    for place, seed in enumerate(int(text) for text in re.findall(r"_(\d+)", drawn)):
        found = score_captions(*texts(), "raw", ["rouge"], rouge_seed=seed)
        for name in ROUGE_TYPES:
            assert found.scores[name] == pytest.approx(expected["mean"][name], abs=1e-6)
            assert found.single[name] == pytest.approx(
                [row[name] for row in expected["per_caption"]], abs=1e-6
            )
            median = expected[drawn][name][place]
            assert found.scores[f"{name}_median"] == pytest.approx(median, abs=1e-6)


def test_rsvqa_accuracy() -> None:
    folder: Path = GOLDEN / "rsvqa"
    expected = json.loads((folder / "expected.json").read_text())
    questions = read_questions(folder / "answers.jsonl", answers=True, images=True)
    found = vqa_accuracy(questions, read_predictions_file(folder / "predictions.jsonl").texts)
    assert found["per_category"].keys() == expected["per_category"].keys()
    for name, row in expected["per_category"].items():
        ours = found["per_category"][name]
        assert (ours["correct"], ours["total"]) == (row["correct"], row["total"])
        assert round(100 * ours["accuracy"], 2) == row["percent_printed"]
        line = f"{name:<20}: {100 * ours['accuracy']:.2f}% ({ours['correct']}/{ours['total']})"
        assert line in expected["stdout"]
    derived = expected["derived_not_official"]
    assert 100 * found["overall"] == pytest.approx(derived["overall_accuracy"])
    assert 100 * found["average"] == pytest.approx(derived["average_accuracy"])
