"""Answer files: the plan of batches, and that no interruption changes the result."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from utils.answer_files import AnswerFile, plan_batches
from utils.caption_files import Question, read_predictions_file

QUESTIONS = [Question(10 + k, f"{k // 2}.tif", "Describe\u2028it.", (), False, "", k + 1) for k in range(9)]
BATCHES = [[8, 7, 6], [0, 2], [1, 5], [3, 4]]
HEADER = {"weights": "abc", "n": 9}


def answer(position: int) -> dict[str, str]:
    return {"skipped": "broken"} if position == 5 else {"text": f"größer\n\u2028 {position}"}


def open_file(folder: Path, rank: int = 0, world: int = 1, **header: Any) -> AnswerFile:
    return AnswerFile(folder / "lisat_[x].jsonl", HEADER | header, BATCHES, rank, world)


def work(file: AnswerFile, most: int = 99) -> int:
    for number in file.mine()[:most]:
        file.write(number, [answer(position) for position in BATCHES[number]])
    return file.finish(QUESTIONS, {})


def whole(folder: Path) -> tuple[bytes, bytes]:
    assert work(open_file(folder)) == 0
    assert {path.name for path in folder.iterdir()} == {"lisat_[x].jsonl", "lisat_[x].run.json"}
    return tuple(path.read_bytes() for path in sorted(folder.iterdir()))


def test_finished_file(tmp_path: Path) -> None:
    data, sidecar = whole(tmp_path)
    rows = [json.loads(line) for line in data.decode().splitlines()]
    assert [row["question_id"] for row in rows] == [10, 11, 12, 13, 14, 16, 17, 18]
    assert list(rows[0]) == ["question_id", "round_id", "prompt", "text", "metadata"]
    assert rows[0]["round_id"] == 0 and rows[0]["metadata"] == {} and rows[0]["prompt"] == QUESTIONS[0].text
    assert json.loads(sidecar)["skipped"] == [{"question_id": 15, "reason": "broken"}]
    assert read_predictions_file(tmp_path / "lisat_[x].jsonl").texts[18] == answer(8)["text"]
    again = open_file(tmp_path)
    assert again.finished and again.mine() == [] and again.finish(QUESTIONS, {}) == 0 and again.skipped() == 1
    with pytest.raises(ValueError, match="another run .weights: 'abc' there, 'x' here"):
        open_file(tmp_path, weights="x")
    restarted = AnswerFile(again.target, HEADER | {"weights": "x"}, BATCHES, restart=True)
    assert restarted.mine() == [0, 1, 2, 3] and not again.target.exists()


def test_every_cut_of_the_part_is_healed(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    file = open_file(tmp_path / "part")
    assert work(file, most=3) == 1
    data = file.part.read_bytes()
    for cut in range(0, len(data) + 1, 7):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / file.part.name).write_bytes(data[:cut])
        again = open_file(folder)
        assert len(again.mine()) == 4 - max(0, data[:cut].count(b"\n") - 1)
        assert whole(folder) == expected


def test_any_order_of_processes_and_interruptions(tmp_path: Path) -> None:
    expected = whole(tmp_path / "whole")
    rng = random.Random(0)
    for trial in range(20):
        folder = tmp_path / str(trial)
        while True:
            world = rng.randint(1, 4)
            left = [work(open_file(folder, rank, world), rng.randint(0, 2)) for rank in range(world)]
            if 0 in left:
                break
        assert whole(folder) == expected
        assert open_file(folder, 3, 4).mine() == []


def test_parts_of_other_runs_and_faulty_ones_are_refused(tmp_path: Path) -> None:
    file = open_file(tmp_path)
    work(file, most=1)
    with pytest.raises(ValueError, match="n: 9 there, 8 here"):
        open_file(tmp_path, n=8)
    good = file.part.read_bytes()
    for bad, message in (
        (b"{\n", ":3: not valid JSON"),
        (b"[]\n", ":3: no part"),
        (b'{"batch": 4, "answers": []}\n', ":3: no batch of this plan"),
        (b'{"batch": 1, "answers": [{"text": "a"}]}\n', ":3: no batch of this plan"),
        (b'{"batch": 1, "answers": [{"text": "a"}, {"text": 3}]}\n', ":3: no batch of this plan"),
    ):
        file.part.write_bytes(good + bad)
        with pytest.raises(ValueError, match=message):
            open_file(tmp_path)
    file.part.write_bytes(b'{"batch": 1}\n')
    with pytest.raises(ValueError, match=":1: no part of an answer file"):
        open_file(tmp_path)
    file.part.unlink()
    file.target.write_text("{}\n")
    with pytest.raises(ValueError, match="nothing says how it was made"):
        open_file(tmp_path)
    with pytest.raises(ValueError, match="works with one process"):
        AnswerFile(file.target, HEADER, BATCHES, 0, 2, restart=True)


def test_two_writers_of_one_part_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="no file locks on this system")
    one, two = open_file(tmp_path), open_file(tmp_path)
    one.write(0, [answer(position) for position in BATCHES[0]])
    with pytest.raises(ValueError, match="another process is writing"):
        two.write(1, [answer(position) for position in BATCHES[1]])
    one.close()


def test_plan() -> None:
    rng = random.Random(1)
    for _ in range(30):
        images = [str(rng.randrange(12)) for _ in range(rng.randint(1, 60))]
        lengths, size = [rng.randint(5, 30) for _ in images], rng.randint(1, 9)
        batches = plan_batches(images, lengths, size)
        assert sorted(p for batch in batches for p in batch) == list(range(len(images)))
        assert all(1 <= len(batch) <= size for batch in batches)
        for image in set(images):  # together: at most one part more than needed
            asked = images.count(image)
            holders = sum(any(images[p] == image for p in batch) for batch in batches)
            assert holders == -(-asked // size)
    single = plan_batches(["a", "b", "c", "d"], [3, 9, 4, 8], 2)
    assert single == [[1, 3], [2, 0]]  # one question per picture: sorted by length
