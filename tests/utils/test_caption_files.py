"""Question and prediction files: what is read, and how faults are named."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from utils.caption_files import dataset_key, pair_files, read_predictions_file, read_questions

QUESTION = {"question_id": 0, "image": "a.tif", "text": "Describe.", "answer": ["a ship", "one ship"]}
QUESTION |= {"category": "caption"}
PREDICTION = {"question_id": 0, "round_id": 0, "prompt": "Describe.", "text": "a ship", "metadata": {}}


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes("\n".join(texts).encode())
    return path


def test_questions(tmp_path: Path) -> None:
    short = QUESTION | {"question_id": 1, "answer": "yes", "category": "presence", "text": "a\u2028b"}
    path = write(tmp_path / "q.jsonl", QUESTION, "", short)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    one, two = read_questions(path, answers=True, images=True)
    assert one.answers == ("a ship", "one ship") and one.several and one.line == 1
    assert two.answers == ("yes",) and not two.several and two.line == 3 and two.text == "a\u2028b"
    assert read_questions(write(path, {"question_id": 5}))[0].answers == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": "0"}, "field question_id: expected a whole number, found '0'"),
        ({"question_id": True}, "field question_id: expected a whole number, found True"),
        ({"answer": []}, "field answer: expected a text or a list of texts, none empty, found []"),
        ({"answer": ["a", 3]}, "field answer: expected a text"),
        ({"answer": " "}, "field answer: expected a text"),
        ({"image": None}, "field image: expected a text, found None"),
        ({"image": ""}, "field image: is empty"),
        ({"text": "\ud800"}, "field text: holds half of a surrogate pair"),
        ({"category": 4}, "field category: expected a text, found 4"),
    ],
)
def test_faults_of_fields_are_named(tmp_path: Path, change: dict, message: str) -> None:
    line = json.dumps(QUESTION | {"question_id": 7} | change)
    path = write(tmp_path / "q.jsonl", QUESTION, line)
    with pytest.raises(ValueError) as error:
        read_questions(path, answers=True, images=True)
    assert f"{path}:2: {message}" in str(error.value)


def test_all_faults_are_listed_together(tmp_path: Path) -> None:
    bad = [b"{", b"[1]", b'{"question_id": 1}', b"\xff", b"[" * 100_000, json.dumps(PREDICTION).encode()]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\n".join(bad))
    with pytest.raises(ValueError) as error:
        read_predictions_file(path)
    for number, message in enumerate(
        [
            "not valid JSON at column",
            "expected an object",
            "field text: expected a text, it is missing",
            "not UTF-8",
            "not valid JSON",
        ],
        start=1,
    ):
        assert f"{path}:{number}: {message}" in str(error.value)
    found = read_predictions_file(path, skip_bad_lines=True)
    assert found.texts == {0: "a ship"} and found.bad_lines == 5
    path.write_bytes(b"\n")
    with pytest.raises(ValueError, match="no usable line"):
        read_predictions_file(path, skip_bad_lines=True)
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(ValueError, match="was expected"):
            read_predictions_file(path)


def test_repeated_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "p.jsonl", PREDICTION, PREDICTION | {"text": "last"})
    found = read_predictions_file(path)
    assert found.texts == {0: "last"} and found.repeated == [0] and "more than once" in caplog.text
    with pytest.raises(ValueError, match=r"q.jsonl:2: field question_id: 0 stands on line 1 already"):
        read_questions(write(tmp_path / "q.jsonl", QUESTION, QUESTION))


def test_pairs(tmp_path: Path) -> None:
    questions, predictions = tmp_path / "q", tmp_path / "lisat"
    for folder, names in {
        questions: ("UCM-Captions", "RSVQA_LR", "Sydney-Captions"),
        predictions: ("lisat_ucm", "lisat_RSVQA_LR_answer", "other"),
    }.items():
        folder.mkdir()
        for name in names:
            write(folder / f"{name}.jsonl", QUESTION)
    pairs = pair_files([questions], [predictions])
    assert [(p.name, p.predictions.stem) for p in pairs] == [
        ("RSVQA_LR", "lisat_RSVQA_LR_answer"),
        ("UCM-Captions", "lisat_ucm"),
    ]
    by_place = pair_files([questions / "RSVQA_LR.jsonl"], [predictions / "other.jsonl"])
    assert by_place[0].name == "RSVQA_LR" and by_place[0].predictions.stem == "other"
    one = pair_files([questions / "UCM-Captions.jsonl"], [predictions])
    assert [p.predictions.stem for p in one] == ["lisat_ucm"]
    write(predictions / "UCM_pred.jsonl", PREDICTION)
    with pytest.raises(ValueError, match="both mean the data set 'ucm'"):
        pair_files([questions], [predictions])
    with pytest.raises(ValueError, match="fits a question file"):
        pair_files(
            [questions / "UCM-Captions.jsonl"],
            [predictions / "other.jsonl", predictions / "lisat_RSVQA_LR_answer.jsonl"],
        )
    with pytest.raises(ValueError, match="nothing is there"):
        pair_files([tmp_path / "no"], [predictions])
    same = [write(tmp_path / part / "answers.jsonl", QUESTION) for part in ("q", "lisat")]
    assert [p.name for p in pair_files(same, same)] == ["q_answers", "lisat_answers"]
    assert dataset_key("lisat_pre_NWPU-Captions_answer") == dataset_key("nwpu") == "nwpu"


def test_mutated_files_end_in_a_named_error_or_are_read(tmp_path: Path) -> None:
    rng = random.Random(0)
    good = "\n".join(json.dumps(QUESTION | {"question_id": k}) for k in range(4)).encode()
    named = 0
    for number in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at, kind = rng.randrange(len(data)), rng.randrange(3)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 30)]
            else:
                data[at:at] = rng.choice([b"\n", b"null", b'"', b"\\ud800", b"1e999", b"[[", b"}"])
            if not data:
                data = bytearray(b"{")
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(data)
        for read in (lambda p: read_questions(p, answers=True, images=True), read_predictions_file):
            try:
                read(path)
            except ValueError as error:
                named += 1
                assert str(error).startswith(str(path)), error
    assert named > 300
