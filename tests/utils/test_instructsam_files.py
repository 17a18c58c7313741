"""File formats and data sets of InstructSAM: what is read, coerced, refused; parts for resuming."""

import json
from pathlib import Path

import numpy as np
import pytest

from utils.instructsam_data import image_folder, read_dataset
from utils.instructsam_files import (
    PROPOSAL_LABEL,
    Counts,
    PartStore,
    Proposals,
    hand_counts,
    read_counts,
    read_predictions,
    read_proposals,
    write_counts,
    write_predictions,
    write_proposals,
)
from utils.rle import encode_mask


def proposals(number: int = 3) -> Proposals:
    masks = [np.eye(4, 5, k) for k in range(number)]
    boxes = np.arange(4.0 * number).reshape(number, 4)
    return Proposals(boxes, np.linspace(0.5, 1, number), [encode_mask(m) for m in masks], (4, 5))


def test_proposals_survive_their_file(tmp_path: Path) -> None:
    path = write_proposals(tmp_path / "p.json", {"a/b.jpg": proposals(), "c.jpg": Proposals([], [])})
    content = json.loads(path.read_text())
    assert list(content["a/b.jpg"]) == ["bboxes", "labels", "scores", "segmentations"]
    assert content["a/b.jpg"]["labels"] == [PROPOSAL_LABEL] * 3
    assert path.read_text().startswith('{\n    "a/b.jpg"')
    found = read_proposals(path)
    assert found["a/b.jpg"].rles == proposals().rles and found["a/b.jpg"].size == (4, 5)
    np.testing.assert_array_equal(found["a/b.jpg"].boxes, proposals().boxes)
    assert len(found["c.jpg"]) == 0


def test_selection_keeps_order_and_masks() -> None:
    chosen = proposals(4).select([2, 0])
    assert chosen.rles == [proposals(4).rles[2], proposals(4).rles[0]] and chosen.boxes[1, 0] == 0
    kept = proposals(4).select(proposals(4).scores > 0.6)
    assert len(kept) == 3 and len(Proposals(np.ones((2, 4)), [1, 1]).select([True, False])) == 1


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ([], "bboxes"),
        ({"bboxes": [[1, 2, 3]]}, r"bboxes\[0\]"),
        ({"bboxes": [[1, 2, 3, float("nan")]]}, "finite"),
        ({"bboxes": [[1, 2, -3, 4]]}, "negative"),
        ({"bboxes": [[1, 2, 3, 4]], "scores": []}, "agree"),
        ({"bboxes": [[1, 2, 3, 4]], "scores": ["high"]}, "scores"),
        ({"bboxes": [[1, 2, 3, 4]], "segmentations": [{"size": [2, 2], "counts": [4]}]}, "segmentations"),
        ({"bboxes": [[1, 2, 3, 4]], "segmentations": [{"size": [2], "counts": "4"}]}, "size"),
        ({"bboxes": [[1, 2, 3, 4]], "segmentations": "none"}, "list"),
    ],
)
def test_faulty_proposals_are_named(entry: object, word: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"pic.jpg": entry}))
    with pytest.raises(ValueError, match=word) as caught:
        read_proposals(tmp_path / "p.json")
    assert "p.json: pic.jpg" in str(caught.value)


def test_proposals_may_be_boxes_only_and_labels_anything() -> None:
    found = Proposals.from_json({"bboxes": [[1, 2, 3, 4]], "labels": ["region_proposals"]})
    assert found.scores.tolist() == [1.0] and found.rles == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bbox": None}, "bbox"),
        ({"score": "1"}, "score"),
        ({"segmentation": {"size": [1, 1]}}, "segmentation"),
        ({"label": ...}, "label"),
        ({"image_id": ...}, "image_id"),
    ],
)
def test_faulty_predictions_are_named(change: dict, word: str, tmp_path: Path) -> None:
    good = {"image_id": 1, "bbox": [0, 0, 1, 1], "label": "ship"}
    write_predictions(tmp_path / "p.json", [good])
    assert read_predictions(tmp_path / "p.json") == [good]
    bad = {key: value for key, value in (good | change).items() if value is not ...}
    write_predictions(tmp_path / "p.json", [good, bad])
    with pytest.raises(ValueError, match=f"entry 1.*{word}"):
        read_predictions(tmp_path / "p.json")


def test_counts_tell_missing_broken_and_empty_apart(tmp_path: Path) -> None:
    write_counts(tmp_path / "deep" / "a.json", {"dépôt": 2, "ship": 0})
    assert (tmp_path / "deep" / "a.json").read_text(
        encoding="utf-8"
    ) == '{\n    "dépôt": 2,\n    "ship": 0\n}'
    assert read_counts(tmp_path, "deep/a.jpg") == Counts({"dépôt": 2})
    write_counts(tmp_path / "b.json", {})
    assert read_counts(tmp_path, "b.png").state == "empty"
    assert read_counts(tmp_path, "other/b.png").state == "empty"  # published folders are flat
    (tmp_path / "c.json").write_text("{")
    assert read_counts(tmp_path, "c.png").state == "broken"
    assert read_counts(tmp_path, "d.png").state == "missing"
    values = {"a": "3", "b": 3.0, "c": 2.5, "d": None, "e": True, "f": "few", "g": -1, "h": [1]}
    write_counts(tmp_path / "e.json", values)
    found = read_counts(tmp_path, "e.png")
    assert found.values == {"a": 3, "b": 3} and found.state == "ok" and len(found.notes) == 6


def test_counts_by_hand(tmp_path: Path) -> None:
    found = hand_counts("storage tank=3, ship = 0", ["a.png", "b.png"])
    assert {name: counts.values for name, counts in found.items()} == {
        "a.png": {"storage tank": 3},
        "b.png": {"storage tank": 3},
    }
    (tmp_path / "c.json").write_text('{"a.png": {"ship": 1}}')
    found = hand_counts(str(tmp_path / "c.json"), ["a.png", "b.png"])
    assert found["a.png"].values == {"ship": 1} and found["b.png"].state == "missing"
    (tmp_path / "c.json").write_text('{"a.png": 3, "b.png": {"ship": 1}}')
    with pytest.raises(ValueError, match="a.png: expected"):
        hand_counts(str(tmp_path / "c.json"), ["a.png", "b.png"])


def test_parts_survive_and_fall_with_their_settings(tmp_path: Path) -> None:
    final = tmp_path / "out.json"
    store = PartStore(final, {"a": (1, 2)})
    store.put("deep/x.png", [1])
    store.put("x.png", [2])
    again = PartStore(final, {"a": [1, 2]})
    assert again.get("deep/x.png") == [1] and again.get("x.png") == [2] and again.get("y.png") is None
    assert PartStore(final, {"a": [1, 3]}).get("x.png") is None
    again.finish({"all": 1})
    assert json.loads(final.read_text()) == {"all": 1} and list(tmp_path.iterdir()) == [final]


def coco(**changes: object) -> dict:
    content = {
        "images": [
            {"id": 7, "file_name": "deep/b.png", "height": 4, "width": 5},
            {"id": 3, "file_name": "a.png"},
        ],
        "categories": [{"id": 9, "name": "ship"}, {"id": 2, "name": "storage tank"}],
        "annotations": [],
    }
    return content | changes


def write_dataset(folder: Path, content: object) -> Path:
    (folder / "ann.json").write_text(json.dumps(content))
    (folder / "pictures").mkdir(exist_ok=True)
    entry = {"ann_path": "ann.json", "img_dir": "pictures", "unseen_classes": ["ship", "storage_tank"]}
    (folder / "config.json").write_text(json.dumps({"mine": entry}))
    return folder / "config.json"


def test_data_set_of_a_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = read_dataset("mine", write_dataset(tmp_path, coco()))
    assert [(i.image_id, i.file_name, i.size) for i in found.images] == [
        (7, "deep/b.png", (4, 5)),
        (3, "a.png", (0, 0)),
    ]
    assert found.images[0].path == tmp_path / "pictures" / "deep" / "b.png"
    assert found.class_names == ["ship", "storage tank"] and found.category_id("storage tank") == 2
    assert "storage_tank" in caplog.text and found.category_id("nothing") is None


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([], "expected dict"),
        (coco(images={}), "images"),
        (coco(images=[{"id": "1", "file_name": "a"}]), r"images\[0\]"),
        (coco(images=[{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]), "more than once: 1"),
        (coco(images=[{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "a"}]), "more than once: a"),
        (coco(categories=[{"id": 1}]), r"categories\[0\]"),
    ],
)
def test_faulty_coco_files_are_named(content: object, word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        read_dataset("mine", write_dataset(tmp_path, content))
    assert "ann.json" in str(caught.value)


def test_what_a_config_lacks_is_said(tmp_path: Path) -> None:
    config = write_dataset(tmp_path, coco())
    with pytest.raises(ValueError, match="it has mine"):
        read_dataset("other", config)
    (tmp_path / "ann.json").unlink()
    with pytest.raises(ValueError, match="ann_path.*looked at"):
        read_dataset("mine", config)


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/c.tif", "notes.txt", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = image_folder(tmp_path)
    assert [(i.image_id, i.file_name) for i in found.images] == [
        (1, "a.JPG"),
        (2, "b.png"),
        (3, "deep/c.tif"),
    ]
    assert [i.file_name for i in image_folder(tmp_path / "b.png").images] == ["b.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture"):
        image_folder(tmp_path / "empty")
