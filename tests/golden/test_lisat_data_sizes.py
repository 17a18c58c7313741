"""Our size rule on the golden GRES annotations: the lists follow the published masks' areas."""

import json
from pathlib import Path

import pytest

from tests.conftest import require_golden
from utils.metrics import LARGE_AREA
from utils.size_subsets import write_size_lists

FOLDER = require_golden("lisat_data")
ENTRIES = json.loads((FOLDER / "gres_masks.json").read_text())["entries"]


@pytest.mark.parametrize("split", sorted({entry["split"] for entry in ENTRIES}))
def test_lists_follow_the_areas(split: str, tmp_path: Path) -> None:
    files = write_size_lists(FOLDER, "GeoReasonSeg", split, tmp_path)
    lists = {label: path.read_text().splitlines()[1:] for label, path in files.items()}
    expected = {entry["name"]: entry["target_area"] for entry in ENTRIES if entry["split"] == split}
    assert set(lists["large"]) == {stem for stem, area in expected.items() if area >= LARGE_AREA}
    assert set(lists["small"]) == {stem for stem, area in expected.items() if 0 < area < LARGE_AREA}
