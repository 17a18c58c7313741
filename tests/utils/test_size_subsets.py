"""Large and small: the rule, lists, folders."""

import json
from pathlib import Path

import pytest

from tests.dataset.conftest import gres_body, square
from utils.size_subsets import label_of, labels_from_folders, labels_from_lists, size_of, write_size_lists


def test_rule() -> None:
    assert [size_of(area) for area in (0, 1, 727, 728)] == ["empty", "small", "small", "large"]
    assert size_of(10, large_area=10) == "large"


def annotations(folder: Path) -> None:
    folder.mkdir(parents=True)
    for stem, side in (("big", 30), ("edge", 26), ("tiny", 4)):  # official squares: (side + 1)^2 pixels
        body = gres_body(f"{stem}.jpg")
        body["shapes"][0]["points"] = square(100, 100, side)
        (folder / f"{stem}.json").write_text(json.dumps(body))


def test_lists_are_written_without_pictures_and_read_back(tmp_path: Path) -> None:
    annotations(tmp_path / "data" / "gres_annotations" / "test")
    files = write_size_lists(tmp_path / "data", "GeoReasonSeg", "test", tmp_path / "lists")
    lines = {label: path.read_text().splitlines() for label, path in files.items()}
    assert lines["large"][1:] == ["big", "edge"] and lines["small"][1:] == ["tiny"]
    assert all("our rule, not the published" in rows[0] for rows in lines.values())
    labels = labels_from_lists(files["large"], files["small"])
    assert labels == {"big": "large", "edge": "large", "tiny": "small"}
    assert label_of(labels, "x/big.jpg") == "large" and label_of(labels, "x/other.jpg") == "unlisted"
    files["small"].write_text("tiny\nbig.jpg\n")
    with pytest.raises(ValueError, match="1 names are in both, the first is big"):
        labels_from_lists(files["large"], files["small"])
    files["small"].write_text("# nothing\n")
    with pytest.raises(ValueError, match="no name is there"):
        labels_from_lists("", files["small"])


def test_folders(tmp_path: Path) -> None:
    for label, stem in (("large", "big"), ("small", "tiny")):
        folder = tmp_path / "reason_seg" / "GeoReasonSeg" / label
        folder.mkdir(parents=True)
        (folder / f"{stem}.json").write_text("{}")
    assert labels_from_folders(tmp_path, "GeoReasonSeg") == {"big": "large", "tiny": "small"}
