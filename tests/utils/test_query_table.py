"""The table of queries: what is in it, and counts read back from it."""

from pathlib import Path

import numpy as np
import pytest

from tests.utils.test_predictions import random_queries
from utils import metrics
from utils.boundary import boundary_counts
from utils.predictions import Predictions, decode_mask, target_mask
from utils.query_table import boundary_pairs, query_rows, read_counts, write_csv


def predictions(images: int = 3) -> Predictions:
    rows = [
        {"index": k + 5, "image": f"p/{k}.png", "size": [6, 9], "queries": random_queries(k)}
        for k in range(images)
    ]
    return Predictions({"dataset": "X"}, rows)


def test_rows() -> None:
    found = predictions()
    assert query_rows(found)[0]["boundary_iou"] == ""
    pairs = boundary_pairs(found)
    rows, counts = query_rows(found), found.counts()
    assert [row["iou"] for row in rows] == pytest.approx(counts.iou.tolist())
    assert [row["predicted"] for row in rows] == counts.predicted.tolist()
    assert [row["number"] for row in rows] == [0, 1, 2] * 3 and rows[3]["picture"] == 6
    record = found.images[1]["queries"][0]
    expected = boundary_counts(decode_mask(record["prediction"]), target_mask(record))
    assert pairs[3].tolist() == expected
    assert rows[3]["boundary_iou"] == pytest.approx(expected[0] / expected[1])


def test_counts_survive_the_table(tmp_path: Path) -> None:
    found = predictions()
    found.images[0]["queries"][0]["query"] = 'words, "quoted"\nand cut'
    counts = read_counts(write_csv(tmp_path / "q.csv", query_rows(found)))
    for name in ("image", "intersection", "union", "target", "gt_exists", "pred_exists"):
        np.testing.assert_array_equal(getattr(counts, name), getattr(found.counts(), name))
    assert counts.kind == found.counts().kind
    assert metrics.bootstrap(counts, 5) == metrics.bootstrap(found.counts(), 5)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("union", "-1", "line 2: union: expected pixels"),
        ("union", "nan", "line 2: union: expected pixels"),
        ("target_bg", "9" * 40, "line 2: target: expected pixels"),
        ("intersection", "54", "intersection <= target <= union"),
        ("gt_exists", "yes", "line 2: gt_exists: expected 0 or 1"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, column: str, value: str, message: str) -> None:
    rows = query_rows(predictions(1))
    path = write_csv(tmp_path / "q.csv", [rows[0] | {column: value}, *rows[1:]])
    with pytest.raises(ValueError, match=message):
        read_counts(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="score first"):
        read_counts(tmp_path / "none.csv")
    (tmp_path / "o.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="the columns .* are missing"):
        read_counts(tmp_path / "o.csv")
