"""The project's own JSON format: reading, writing, drawing, faults; data sets by name."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from dataset.base import ReadOptions
from dataset.generic import GenericData, read_annotations, write_annotations
from dataset.gres import GresData
from dataset.registry import load_dataset
from dataset.sem_seg import SemSegData
from tests.dataset.conftest import gres_body, picture, square
from tests.dataset.test_sem_seg import halves, write


def mask(row: int) -> np.ndarray:
    out = np.zeros((20, 24), np.uint8)
    out[row] = 1
    return out


def folder_with(folder: Path, queries: list[dict], pictures: int = 1) -> Path:
    images = []
    for number in range(pictures):
        picture(folder / "pics" / f"{number}.png", seed=number)
        images.append({"file": f"pics/{number}.png", "queries": queries})
    write_annotations(folder, images)
    return folder


QUERIES = [
    {"text": "the red hut", "kind": "attribute", "masks": [mask(3)]},
    {"text": "Which two lie low?", "exists": True, "masks": [mask(10), square(2, 12, 4)]},
    {"text": "the ship", "exists": False, "masks": []},
    {"text": "Where is it?", "masks": [mask(5)], "answer": "There: [SEG]!", "ignore": mask(6)},
    {"text": "the lake", "exists": False, "masks": [], "answer": "No lake.", "question": "Any lake?"},
    {"text": "What is it?", "exists": True, "masks": [], "answer": "A farm."},
]


def test_training_draws_without_repetition(tmp_path: Path) -> None:
    data = GenericData(folder_with(tmp_path, QUERIES), ReadOptions(num_per_image=4))
    seen: dict[str, list] = {}
    for epoch in range(60):
        conversations = data.draw(0, epoch).conversations
        assert len({c.query for c in conversations}) == 4
        for c in conversations:
            assert c.turns[0][1].count("[SEG]") == len(c.masks)
            seen.setdefault(c.query, []).append(c)
    assert set(seen) == {query["text"] for query in QUERIES}
    two = seen["Which two lie low?"][0]
    assert two.masks.shape == (2, 20, 24) and [m.sum() for m in two.masks] == [24, 16]
    assert "[SEG] and [SEG]" in two.turns[0][1] and two.turns[0][0].startswith("Which two lie low? ")
    assert seen["the ship"][0].masks.shape == (0, 20, 24) and not seen["the ship"][0].exists
    own = seen["Where is it?"][0]
    assert own.turns[0][1] == "There: [SEG]!" and (own.masks[0, 6] == 255).all() and own.masks[0, 5].all()
    assert seen["the lake"][0].turns == [("Any lake?", "No lake.")]
    assert seen["the red hut"][0].kind == "attribute"


def test_absent_things_may_be_confirmed_with_an_empty_mask(tmp_path: Path) -> None:
    options = ReadOptions(num_per_image=6, confirm_absent=0.5)
    data = GenericData(folder_with(tmp_path, QUERIES), options)
    confirmed = []
    for epoch in range(40):
        for c in data.draw(0, epoch).conversations:
            assert c.turns[0][1].count("[SEG]") == len(c.masks)
            if c.query == "the ship":
                confirmed.append(len(c.masks) == 1)
                assert not c.masks.any() and not c.exists
            if c.query == "the lake":  # a stored answer stays
                assert c.turns[0][1] == "No lake."
    assert 8 < sum(confirmed) < 32
    shown = GenericData(tmp_path, ReadOptions(train=False, prompt="answer", confirm_absent=1.0))[0]
    assert [len(c.masks) for c in shown.conversations] == [1, 2, 0, 1, 0]


def test_evaluation_has_one_target_per_row(tmp_path: Path) -> None:
    data = GenericData(folder_with(tmp_path, QUERIES), ReadOptions(train=False, prompt="open"))
    rows = data[0].conversations
    assert [c.query for c in rows] == [query["text"] for query in QUERIES[:5]]  # the last is text only
    assert all(c.masks.shape == (1, 20, 24) and c.turns[0][1] is None for c in rows)
    assert [int((c.masks == 1).sum()) for c in rows] == [24, 40, 0, 24, 0]
    assert [c.exists for c in rows] == [True, True, False, True, False]
    assert [c.sent_id for c in rows] == [0, 1, 2, 3, 4]
    told = GenericData(tmp_path, ReadOptions(train=False, prompt="answer"))[0].conversations
    assert [len(c.masks) for c in told] == [c.turns[0][1].count("[SEG]") for c in told] == [1, 2, 0, 1, 0]


def test_written_masks_are_read_back(tmp_path: Path) -> None:
    stored = (np.random.default_rng(0).random((20, 24)) < 0.3).astype(np.uint8)
    folder_with(tmp_path, [{"text": "the café", "masks": [stored]}])
    pictures, faults = read_annotations(tmp_path)
    assert not faults
    np.testing.assert_array_equal(pictures[0].queries[0].decode(20, 24)[0], stored)
    assert "café" in (tmp_path / "annotations.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({}, "text"),
        ({"text": "a", "masks": 3}, "masks"),
        ({"text": "a", "exists": 1, "masks": [square()]}, "exists"),
        ({"text": "a", "exists": False, "masks": [square()]}, "exists"),
        ({"text": "a", "exists": True, "masks": []}, "masks"),
        ({"text": "a", "masks": [square()], "answer": "Here."}, "answer"),
        ({"text": "a", "answer": ""}, "answer"),
        ({"text": "a [SEG]", "masks": []}, "text"),
        ({"text": "a", "question": "<image> a", "masks": []}, "question"),
        ({"text": "a", "mask": []}, "unknown fields"),
    ],
)
def test_query_faults_name_the_field(tmp_path: Path, query: dict, field: str) -> None:
    good = {"text": "b", "masks": [square()]}
    _, faults = read_annotations(folder_with(tmp_path, [good, query]))
    (fault,) = faults
    assert "images[0].queries[1]" in fault.field and field in str(fault)


def test_picture_faults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder_with(tmp_path, [{"text": "b", "masks": [square()]}])
    body = json.loads((tmp_path / "annotations.json").read_text())
    (tmp_path / "bad.png").write_bytes(b"x")
    queries = body["images"][0]["queries"]
    body["images"] += [
        3,
        {"file": "no.png", "queries": queries},
        {"file": "/etc/hosts", "queries": queries},
        {"file": "../x.png", "queries": queries},
        {"file": "bad.png", "queries": queries},
        {"file": "pics/0.png", "queries": []},
        {"file": "pics/0.png", "queries": [{"text": ""}]},
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(body))
    pictures, faults = read_annotations(tmp_path)
    assert len(pictures) == 1 and len(faults) == 7
    with caplog.at_level(logging.WARNING):
        assert len(GenericData(tmp_path, ReadOptions())) == 1
    assert "7 unusable entries" in caplog.text
    with pytest.raises(ValueError, match="7 unusable"):
        GenericData(tmp_path, ReadOptions(strict=True))
    (tmp_path / "annotations.json").write_text("{}")
    with pytest.raises(ValueError, match="images: expected a list"):
        read_annotations(tmp_path)


def test_broken_masks_stop_evaluation_with_their_place(tmp_path: Path) -> None:
    folder_with(tmp_path, [{"text": "b", "masks": [{"size": [2, 2], "counts": [4]}]}])
    with pytest.raises(ValueError, match=r"images\[0\]\.queries\[0\]\.masks\[0\]: run-length code has size"):
        GenericData(tmp_path, ReadOptions(train=False))[0]


# ------------------------------------------------------------------------------------------ data sets by name


def test_names(tmp_path: Path, gres_folder) -> None:
    root = gres_folder({"a": gres_body()})
    folder_with(root / "synthetic" / "train", QUERIES)
    write(root / "city", {"x1": halves(0, 2), "x2": halves(2, 0)})
    assert isinstance(load_dataset("GeoReasonSeg|train", root), GresData)
    assert isinstance(load_dataset("synthetic|train", root, num_per_image=1), GenericData)
    assert isinstance(load_dataset(f"generic:{root}/synthetic/train", train=False), GenericData)
    city = load_dataset("sem_seg_folder:city|x[2]", root, ReadOptions(train=False))
    assert isinstance(city, SemSegData) and len(city) == 1
    assert len(load_dataset("sem_seg_folder:city", root)) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("x", "unknown; write one of"),
        ("other:x", "unknown"),
        ("synthetic|no", "annotations.json is not there"),
        ("sem_seg_folder:no", "neither no nor"),
        ("GeoReasonSeg|no", "looked for the folders"),
    ],
)
def test_unknown_names(tmp_path: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(spec, tmp_path)


def test_faulty_options_are_reported_together() -> None:
    with pytest.raises(ValueError, match="num_per_image.*prompt.*absent_rate"):
        ReadOptions(num_per_image=0, prompt="x", absent_rate=2)
    with pytest.raises(ValueError, match="not both"):
        load_dataset("x", options=ReadOptions(), seed=1)
