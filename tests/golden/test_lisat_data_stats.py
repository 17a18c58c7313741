"""Statistics of GRES: lists of unusual files and definitions, on the annotations of the golden folder."""

import json
from pathlib import Path
from typing import Any

import pytest

from dataset.gres_stats import GresStatistics, gres_statistics
from tests.conftest import require_golden
from validate_data import main

GOLDEN = require_golden("lisat_data")
STATS = json.loads((GOLDEN / "gres_stats.json").read_text())
BY_HAND = {"opencv_version_sensitive", "query_says_target_is_not_recognisable"}
"""Lists made with two OpenCV versions and by reading."""
BOXES = "plain_box_polygon_open_ring"


@pytest.fixture(scope="module")
def found() -> GresStatistics:
    return gres_statistics(GOLDEN)


def names() -> dict[str, set[str]]:
    """Split -> names of the files that are here."""
    folders = [folder for folder in (GOLDEN / "gres_annotations").iterdir() if folder.is_dir()]
    return {folder.name: {path.stem for path in folder.glob("*.json")} for folder in folders}


def mean(entries: list[dict[str, Any]], field: str) -> float:
    return sum(entry[field] for entry in entries) / len(entries)


def restricted(value: Any, split: str = "") -> Any:
    """A list of the golden file without the names that are not here."""
    here = names()
    if isinstance(value, dict):
        inner = {key: restricted(item, key) for key, item in value.items() if key in here}
        return inner or {key: item for key, item in value.items() if key in here[split]}
    if value and isinstance(value[0], list):
        return [pair for pair in value if all(n.split("/")[1] in here[n.split("/")[0]] for n in pair)]
    return [name for name in value if name in here[split or "train"]]


def test_lists_of_unusual_files(found: GresStatistics) -> None:
    assert not found.faults
    wanted = {kind: restricted(value) for kind, value in STATS["lists"].items() if kind not in BY_HAND}
    assert set(wanted) == set(found.lists)
    for kind, value in wanted.items():
        assert found.lists[kind] == value, kind
    assert sum(bool(value) and value != {s: [] for s in names()} for value in wanted.values()) >= 5


def test_areas_and_rings_are_those_of_the_masks(found: GresStatistics) -> None:
    entries = json.loads((GOLDEN / "gres_masks.json").read_text())["entries"]
    table = found.splits["all"]
    closed = [entry for entry in entries if entry["name"] not in sum(found.lists[BOXES].values(), [])]
    assert table["files"] == len(entries) > len(closed)
    multi = {entry["name"]: entry["n_rings"] for entry in closed if entry["n_rings"] > 1}
    assert {
        name: rings for split in found.lists["multi_ring"].values() for name, rings in split.items()
    } == multi
    newer = 2e-3  # newer OpenCV versions fill slanted edges otherwise
    assert table["area_mean"] == pytest.approx(mean(entries, "target_area"), rel=newer)
    groups = {"mean": closed, "single_ring": [e for e in closed if e["name"] not in multi]}
    groups["multi_ring"] = [e for e in closed if e["name"] in multi]
    for group, chosen in groups.items():
        wanted = mean(chosen, "iou_official_vs_pixel_exact")
        assert table[f"iou_official_vs_pixel_exact_{group}"] == pytest.approx(wanted, abs=newer), group
    for split, here in names().items():
        table, golden = found.splits[split], STATS["splits"][split]
        assert set(table) == set(golden) and table["files"] == len(here)
        assert set(table["points_per_polygon"]) == set(golden["points_per_polygon"])
        assert set(table["area_coco_buckets"]) == set(golden["area_coco_buckets"])
        assert sum(table["area_coco_buckets"].values()) == len(here)
        assert table["bytes"] == sum(
            p.stat().st_size for p in (GOLDEN / "gres_annotations" / split).glob("*.json")
        )
    assert set(found.query_overlap) == set(STATS["query_overlap"])
    assert found.size_split["rule"] == STATS["size_split_not_official"]["rule"]


def test_from_the_command_line(found: GresStatistics, tmp_path: Path) -> None:
    main(["--path", str(GOLDEN), "--fast", "--gres_stats", str(tmp_path / "stats.json")])
    assert json.loads((tmp_path / "stats.json").read_text()) == json.loads(json.dumps(found.to_dict()))
