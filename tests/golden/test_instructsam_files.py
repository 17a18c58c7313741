"""Stored counts, proposals and predictions of the published program: read, and written again alike."""

import json
from pathlib import Path

import numpy as np
import pytest

from model.instructsam.match import LabelledRegions
from tests.conftest import require_golden
from utils.instructsam_config import MatcherConfig
from utils.instructsam_files import (
    counts_path,
    read_predictions,
    read_proposals,
    write_counts,
    write_proposals,
)
from utils.instructsam_stages import label_image

FOLDER = require_golden("instructsam")
PROPOSALS = next((FOLDER / "dior_mini" / "region_proposals").glob("*.json"))


def test_predictions_are_written_with_the_stored_fields_in_their_order() -> None:
    stored = {path.parent.name: read_predictions(path) for path in FOLDER.glob("dior_mini/results/*/*.json")}
    assert stored
    proposals = read_proposals(PROPOSALS)
    for items in stored.values():
        classes = {item["label"]: item["category_id"] for item in items if "category_id" in item} or None
        for name, mine in proposals.items():
            wanted = [item for item in items if item["image_id"] == int(Path(name).stem)]
            rows = [mine.boxes.tolist().index(item["bbox"]) for item in wanted]
            assert rows == sorted(rows) and rows
            labels, scores = [i["label"] for i in wanted], np.array([i["score"] for i in wanted])
            found = LabelledRegions(np.array(rows), labels, scores, scores / 2)
            picture = np.zeros((2, 2, 3), np.uint8)
            image_id = wanted[0]["image_id"]
            written = label_image(image_id, picture, mine, {}, lambda *_: found, MatcherConfig(), classes)  # noqa: B023
            for one, item in zip(written, wanted, strict=True):
                assert one.pop("assigned_score") == pytest.approx(item["score"] / 2)
                assert list(one) == list(item) and one == item


def test_proposals_and_counts_are_written_as_stored(tmp_path: Path) -> None:
    path = write_proposals(tmp_path / "p.json", read_proposals(PROPOSALS))
    stored, written = (json.loads(file.read_text(encoding="utf-8")) for file in (PROPOSALS, path))
    assert written == stored and [list(entry) for entry in written.values()] == [
        list(entry) for entry in stored.values()
    ]
    files = sorted(FOLDER.glob("dior_mini/object_counts/*/*.json"))
    assert files
    for file in files:
        content = file.read_text(encoding="utf-8")
        again = write_counts(counts_path(tmp_path, f"{file.stem}.jpg"), json.loads(content))
        assert again.read_text(encoding="utf-8") == content
