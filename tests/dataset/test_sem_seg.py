"""Semantic segmentation folders: class questions, ignored pixels, filters, faults."""

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset.base import ReadOptions
from dataset.sem_seg import SemSegData, list_pairs, random_view, read_classes
from tests.dataset.conftest import picture

CLASSES = {"0": "Water", "2": "road", "3": "tree", "255": "ignore"}


def write(folder: Path, masks: dict[str, np.ndarray], classes: dict | None = None) -> Path:
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    for number, (stem, mask) in enumerate(masks.items()):
        picture(folder / "images" / f"{stem}.jpg", *mask.shape, seed=number)
        cv2.imwrite(str(folder / "masks" / f"{stem}.png"), mask)
    (folder / "classes.json").write_text(json.dumps(CLASSES if classes is None else classes))
    return folder


def halves(left: int, right: int) -> np.ndarray:
    mask = np.full((6, 10), left, np.uint8)
    mask[:, 5:] = right
    mask[0] = 255
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path, {"t1_p1": halves(0, 2), "t1_p2": halves(2, 2), "t2_p9": halves(3, 0)})


def test_classes_without_what_is_ignored(folder: Path) -> None:
    assert read_classes(folder) == {0: "Water", 2: "road", 3: "tree"}


def test_evaluation_asks_every_class(folder: Path) -> None:
    data = SemSegData(folder, ReadOptions(train=False, prompt="open"))
    rows = data[0].conversations
    assert [(c.query, c.exists, c.kind) for c in rows] == [
        ("Water", True, "Water"),
        ("road", True, "road"),
        ("tree", False, "tree"),
    ]
    water = rows[0].masks[0]
    assert (water[0] == 255).all() and (water[1:, :5] == 1).all() and (water[1:, 5:] == 0).all()
    assert set(np.unique(rows[2].masks)) == {0, 255}
    assert all(c.turns[0][1] is None for c in rows)
    assert "water" in rows[0].turns[0][0]  # names are lower-cased
    told = SemSegData(folder, ReadOptions(train=False, prompt="answer"))[0].conversations
    assert [len(c.masks) for c in told] == [c.turns[0][1].count("[SEG]") for c in told] == [1, 1, 0]
    present = SemSegData(folder, ReadOptions(train=False), present_only=True)
    assert [c.query for c in present[1].conversations] == ["road"]
    background = SemSegData(folder, ReadOptions(train=False, respect_ignore=False))
    assert set(np.unique(background[0].conversations[0].masks)) == {0, 1}


def test_training_questions(folder: Path) -> None:
    data = SemSegData(folder, ReadOptions(absent_rate=0.5, num_per_image=2))
    kinds = set()
    for epoch in range(60):
        sample = data.draw(0, epoch)
        assert len(sample.conversations) == 2
        for c in sample.conversations:
            answer = c.turns[0][1]
            assert answer.count("[SEG]") == len(c.masks) == c.exists
            assert (c.query == "tree") is (not c.exists)
            kinds.add((c.query, "water" in answer or "road" in answer))
    assert {("tree", True), ("tree", False)} <= kinds  # corrections and denials
    confirming = SemSegData(folder, ReadOptions(absent_rate=0.5, num_per_image=2, confirm_absent=0.5))
    absent = [c for epoch in range(60) for c in confirming.draw(0, epoch).conversations if not c.exists]
    assert all(c.turns[0][1].count("[SEG]") == len(c.masks) and not c.masks.any() for c in absent)
    assert {len(c.masks) for c in absent} == {0, 1}
    only = SemSegData(folder, ReadOptions(absent_rate=0.0))
    assert all(c.exists for epoch in range(20) for c in only.draw(1, epoch).conversations)


def test_traces_below_the_minimum_are_not_asked(tmp_path: Path) -> None:
    mask = halves(0, 2)
    mask[3, 3] = 3
    data = SemSegData(write(tmp_path, {"a": mask}), ReadOptions(train=False), min_area=5)
    assert [c.query for c in data[0].conversations] == ["Water", "road"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (None, ["t1_p1", "t1_p2", "t2_p9"]),
        ("*_p[12]", ["t1_p1", "t1_p2"]),
        ("*_p[1,2],*_p9.jpg", ["t1_p1", "t1_p2", "t2_p9"]),
        (["t1_*"], ["t1_p1", "t1_p2"]),
        ("list.txt", ["t1_p2"]),
    ],
)
def test_filters(folder: Path, files: object, expected: list[str]) -> None:
    (folder / "list.txt").write_text("t1_p2.jpg\nt1_p2\n")
    assert [p.stem for p, _ in list_pairs(folder, files)[0]] == expected


def test_filters_without_a_match(folder: Path) -> None:
    with pytest.raises(ValueError, match="none of 3 pictures matches"):
        list_pairs(folder, "x*")
    with pytest.raises(ValueError, match="no folder images"):
        list_pairs(folder / "masks")


def test_unusable_pairs(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "masks" / "t1_p1.png").unlink()
    cv2.imwrite(str(folder / "masks" / "t1_p2.png"), np.zeros((3, 3), np.uint8))
    with caplog.at_level(logging.WARNING):
        data = SemSegData(folder, ReadOptions())
    assert [p.stem for p, _ in data.pairs] == ["t2_p9"] and len(data.faults) == 2
    assert "mask is (3, 3) pixels" in caplog.text
    cv2.imwrite(str(folder / "masks" / "t2_p9.png"), np.zeros((6, 10, 3), np.uint8))
    with pytest.raises(ValueError, match="one 8-bit band"):
        SemSegData(folder, ReadOptions(train=False))[0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a": "x"}, "class id is a number"),
        ({"300": "x"}, "class id is a number"),
        ({"1": ""}, "expected the class name"),
        ({"1": "x", "2": "x"}, "used twice"),
        ({"255": "ignore"}, "no class"),
    ],
)
def test_faulty_classes(tmp_path: Path, classes: dict, message: str) -> None:
    write(tmp_path, {"a": halves(0, 1)}, classes)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path)


def test_random_views_move_picture_and_labels_alike() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 200, (40, 60)).astype(np.uint8)
    image = np.repeat(labels[..., None], 3, axis=2)
    shapes = set()
    for _ in range(40):
        seen, named = random_view(image, labels, rng, 0.5)
        np.testing.assert_array_equal(seen[..., 0], named)
        assert 20 <= min(named.shape) and max(named.shape) <= 60
        assert np.isin(named, labels).all()
        shapes.add(named.shape)
    assert len(shapes) > 20
    whole = {random_view(image, labels, rng, 1.0)[1].tobytes() for _ in range(200)}
    assert len(whole) == 8
