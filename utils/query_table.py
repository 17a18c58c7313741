"""One row per query: scores, pixel counts, sizes, words; as CSV, and back as counts for a new bootstrap."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.boundary import boundary_counts, boundary_iou
from utils.io import StrPath, atomic_write_text
from utils.metrics import Counts, iou_from_counts
from utils.predictions import Predictions, target_mask
from utils.rle import decode_mask

Row = dict[str, Any]

_COUNTED = ("intersection", "union", "target")
COLUMNS = (
    "picture",
    "image",
    "number",
    "query",
    "kind",
    "size_class",
    "ref_id",
    "sent_id",
    "gt_exists",
    "pred_exists",
    "score",
    "iou",
    "boundary_iou",
    "target",
    "predicted",
    "intersection",
    "union",
    "target_bg",
    "intersection_bg",
    "union_bg",
    "boundary_intersection",
    "boundary_union",
    "mismatch",
    "generated",
)


def boundary_pairs(predictions: Predictions) -> np.ndarray:
    """int64 (N, 2) boundary [intersection, union] of all queries; kept in the records once computed."""
    pairs = []
    for image in predictions.images:
        for record in image["queries"]:
            if "boundary" not in record:
                record["boundary"] = boundary_counts(decode_mask(record["prediction"]), target_mask(record))
            pairs.append(record["boundary"])
    return np.asarray(pairs, dtype=np.int64).reshape(len(pairs), 2)


def query_rows(predictions: Predictions) -> list[Row]:
    """One row of COLUMNS per query; fields that a record lacks are empty texts. Areas: counted pixels."""
    rows = []
    for image in predictions.images:
        for number, record in enumerate(image["queries"]):
            counts = {name: record["counts"][name] for name in _COUNTED}
            row: Row = {"picture": image["index"], "image": image["image"], "number": number}
            for name in (
                "query",
                "kind",
                "size_class",
                "ref_id",
                "sent_id",
                "score",
                "mismatch",
                "generated",
            ):
                value = record.get(name)
                row[name] = "" if value is None else value
            row |= {"gt_exists": int(record["gt_exists"]), "pred_exists": int(record["pred_exists"])}
            for name, (background, inside) in counts.items():
                row |= {name: inside, f"{name}_bg": background}
            row["predicted"] = row["union"] + row["intersection"] - row["target"]
            iou = iou_from_counts(np.array([row["intersection"]]), np.array([row["union"]]))
            row["iou"] = float(iou[0])
            hit, either = record.get("boundary", ("", ""))
            row |= {"boundary_intersection": hit, "boundary_union": either}
            row["boundary_iou"] = boundary_iou(hit, either) if "boundary" in record else ""
            rows.append(row)
    return rows


def write_csv(path: StrPath, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> Path:
    """Write rows as UTF-8 CSV with a line of column names, in one step. Returns the path."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        shown = {name: f"{value:.6f}" if isinstance(value, float) else value for name, value in row.items()}
        writer.writerow(shown)
    return atomic_write_text(path, text.getvalue())


def read_counts(path: StrPath) -> Counts:
    """Counts of all queries of a table written by `write_csv`: all that scores and bootstrap need.

    Raises:
        ValueError: no such file, a column or a number is missing, or counts that cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: a table of queries was expected, nothing is there; score first")
    needed = {"picture", "kind", "gt_exists", "pred_exists", *_COUNTED, *(f"{n}_bg" for n in _COUNTED)}
    rows = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = needed - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"{path}: the columns {sorted(missing)} are missing")
            for row in reader:
                rows.append(_counted(path, reader.line_num, row))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable table: {error}") from error
    return Counts.from_rows(rows)


def _counted(path: Path, line: int, row: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"image": row["picture"], "kind": row["kind"] or ""}
    for name in ("gt_exists", "pred_exists"):
        if row[name] not in ("0", "1"):
            raise ValueError(f"{path}, line {line}: {name}: expected 0 or 1, found {row[name]!r}")
        found[name] = row[name] == "1"
    for name in _COUNTED:
        pair = [row[f"{name}_bg"], row[name]]
        for text in pair:
            if not (text or "").isdecimal() or len(text) > 12:
                raise ValueError(f"{path}, line {line}: {name}: expected pixels, found {text!r}")
        found[name] = [int(text) for text in pair]
    if not all(
        h <= t <= u for h, t, u in zip(*(found[name] for name in ("intersection", "target", "union")))
    ):
        raise ValueError(f"{path}, line {line}: expected intersection <= target <= union in pixels")
    return found
