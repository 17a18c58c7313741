"""Folders of PNG masks: values, names, and what does not fit."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.utils.test_match_predictions import picture, wanted
from utils.mask_folder import MaskFolder, mask_names, read_mask


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", values)[1].tobytes())
    return path


MASK = np.array([[0, 1, 1], [0, 0, 1]], np.uint8)


def test_values(tmp_path: Path) -> None:
    for factor in (1, 7, 255):
        np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", MASK * factor)), MASK == 1)
    assert read_mask(save(tmp_path / "f.png", MASK | 255)).all()
    assert not read_mask(save(tmp_path / "e.png", MASK * 0)).any()
    soft = save(tmp_path / "s.png", MASK * 200 + 20)
    np.testing.assert_array_equal(read_mask(soft, threshold=128), MASK == 1)
    with pytest.raises(ValueError, match=r"s\.png has 2 values .*--png_threshold"):
        read_mask(soft)
    for values in (np.zeros((2, 3, 3), np.uint8), MASK.astype(np.uint16)):
        with pytest.raises(ValueError, match="x.png cannot be read: one 8-bit band"):
            read_mask(save(tmp_path / "x.png", values))
    (tmp_path / "x.png").write_bytes(soft.read_bytes()[:30])
    with pytest.raises(ValueError, match="x.png cannot be read"):
        read_mask(tmp_path / "x.png")


def pictures() -> list:
    return [
        picture("set/a.png", wanted("one")),
        picture("set/b.jpg", wanted("one"), wanted("two")),
        picture("set/b_1.jpg", wanted("one")),
        picture("u/c.png", wanted("one")),
        picture("v/c.png", wanted("one"), wanted("two")),
    ]


def test_expected_names_are_found_again(tmp_path: Path) -> None:
    names = mask_names(pictures())
    assert names == [["a.png"], ["b/0.png", "b/1.png"], ["b_1.png"], ["u/c.png"], ["v/c_0.png", "v/c_1.png"]]
    for name in sum(names, []):
        save(tmp_path / name, MASK)
    answers, mismatches = MaskFolder(tmp_path).match(pictures())
    assert not mismatches
    assert answers == [[tmp_path / name for name in row] for row in names]


def test_what_does_not_fit(tmp_path: Path) -> None:
    for name in ("a.png", "a_0.png", "b.png", "b_0.png", "b_7.png", "c.png", "z.png"):
        save(tmp_path / name, MASK)
    answers, mismatches = MaskFolder(tmp_path).match(pictures())
    assert answers[0] == [None] and answers[1] == [tmp_path / "b_0.png", None]
    assert Counter(m.kind for m in mismatches) == {"duplicate": 1, "extra": 4, "missing": 5}
    text = "\n".join(map(str, mismatches))
    for part in (
        "a_0.png ('one'): a second mask",
        "b.png: its picture has 2 queries",
        "b_7.png: its picture has 2 queries, numbered from 0",
        "c.png: may mean u/c.png, v/c.png",
        "z.png: no picture of the data set has this name",
        f"no mask {tmp_path / 'b/1.png'}",
    ):
        assert part in text
    with pytest.raises(ValueError, match="no PNG file"):
        MaskFolder(tmp_path / "empty").match(pictures())
