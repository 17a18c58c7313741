"""The three files of InstructSAM (counts, proposals, predictions): in-memory form, readers and writers.

Formats are the published ones. Boxes are xywh in pixels with the
published inclusive ends (width = last column - first column); masks are COCO run-length codes
`{"size": [H, W], "counts": text}`. N is the number of proposals of one picture.
"""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from utils.io import StrPath, atomic_write_json, atomic_write_text, read_json

logger = logging.getLogger(__name__)

Rle = dict[str, Any]
PROPOSAL_LABEL = "region_preposal"
"""Label of every entry in a published proposal file, with its spelling. Readers ignore it."""


# --------------------------------------------------------------------------------------------- proposals


@dataclass
class Proposals:
    """Mask proposals of one picture.

    `boxes` float64 (N, 4) xywh; `scores` float64 (N,); `rles` N run-length codes, or empty where the
    proposals are boxes only; `size` (H, W) of the picture, (0, 0) where nothing says it.
    """

    boxes: np.ndarray
    scores: np.ndarray
    rles: list[Rle] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.boxes = np.asarray(self.boxes, np.float64).reshape(-1, 4)
        self.scores = np.asarray(self.scores, np.float64).reshape(-1)
        if len(self.scores) != len(self.boxes) or len(self.rles) not in (0, len(self.boxes)):
            raise ValueError(
                f"proposals have {len(self.boxes)} boxes, {len(self.scores)} scores, {len(self.rles)} masks;"
                " the numbers must agree (masks may be absent altogether)"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, index: Sequence[int] | np.ndarray) -> "Proposals":
        """The proposals at `index` (integers, or bool (N,)), in that order."""
        where = np.asarray(index)
        where = np.flatnonzero(where) if where.dtype == bool else where.astype(np.int64)
        rles = [self.rles[k] for k in where] if self.rles else []
        return Proposals(self.boxes[where], self.scores[where], rles, self.size)

    def to_json(self) -> dict[str, Any]:
        """Entry of a proposal file."""
        return {
            "bboxes": self.boxes.tolist(),
            "labels": [PROPOSAL_LABEL] * len(self),
            "scores": self.scores.tolist(),
            "segmentations": list(self.rles),
        }

    @classmethod
    def from_json(cls, entry: Any, where: str = "proposals") -> "Proposals":
        """Proposals of one entry of a proposal file; `where` names file and picture in errors.

        `labels` is ignored; absent `scores` count as 1; absent `segmentations` mean boxes only.

        Raises:
            ValueError: not an object, no `bboxes`, other numbers of entries, values that are no numbers,
                or malformed masks.
        """
        if not isinstance(entry, dict) or not isinstance(entry.get("bboxes"), list):
            raise ValueError(f"{where}: expected an object with a list 'bboxes'")
        boxes = entry["bboxes"]
        for number, box in enumerate(boxes):
            check_box(box, f"{where}, bboxes[{number}]")
        scores = entry.get("scores")
        scores = [1.0] * len(boxes) if scores is None else scores
        if not isinstance(scores, list) or not all(_is_number(score) for score in scores):
            raise ValueError(f"{where}: 'scores' is no list of finite numbers")
        rles = entry.get("segmentations") or []
        if not isinstance(rles, list):
            raise ValueError(f"{where}: 'segmentations' is no list")
        for number, rle in enumerate(rles):
            check_rle(rle, f"{where}, segmentations[{number}]")
        size = (int(rles[0]["size"][0]), int(rles[0]["size"][1])) if rles else (0, 0)
        try:
            return cls(np.array(boxes, np.float64).reshape(-1, 4), np.array(scores), rles, size)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def read_proposals(path: StrPath) -> dict[str, Proposals]:
    """Proposal file -> picture file name -> `Proposals`; ValueError names file, picture and field."""
    content = read_json(path, dict)
    return {name: Proposals.from_json(entry, f"{path}: {name}") for name, entry in content.items()}


def write_proposals(path: StrPath, proposals: Mapping[str, Proposals]) -> Path:
    """Write the published proposal file (one object keyed by picture file name) in one step."""
    return atomic_write_json(path, {name: value.to_json() for name, value in proposals.items()}, indent=4)


# ------------------------------------------------------------------------------------------- predictions


def read_predictions(path: StrPath) -> list[dict[str, Any]]:
    """Prediction file: a list of objects with `image_id`, `bbox`, `label` and, where present, `score`,
    `segmentation`, `category_id`. Nothing is filled in. ValueError names entry and field."""
    items = read_json(path, list)
    for number, item in enumerate(items):
        where = f"{path}: entry {number}"
        if not isinstance(item, dict):
            raise ValueError(f"{where} is a {type(item).__name__}, expected an object")
        if "image_id" not in item:
            raise ValueError(f"{where} has no 'image_id'")
        if "label" not in item and "category_id" not in item:
            raise ValueError(f"{where} has neither 'label' nor 'category_id'")
        check_box(item.get("bbox"), f"{where}, bbox")
        if "score" in item and not _is_number(item["score"]):
            raise ValueError(f"{where}: 'score' is {item['score']!r}, expected a finite number")
        if item.get("segmentation") is not None:
            check_rle(item["segmentation"], f"{where}, segmentation")
    return items


def write_predictions(path: StrPath, predictions: Sequence[Mapping[str, Any]]) -> Path:
    """Write a prediction file (JSON list) in one step."""
    return atomic_write_json(path, list(predictions), indent=None)


def check_box(box: Any, where: str) -> None:
    """ValueError unless `box` is [x, y, w, h] with finite numbers and w, h >= 0."""
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(x) for x in box):
        raise ValueError(f"{where}: found {str(box)[:60]}, expected four finite numbers [x, y, w, h]")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(f"{where}: found {box}; width and height must not be negative")


def check_rle(rle: Any, where: str) -> None:
    """ValueError unless `rle` looks like a compressed COCO run-length code."""
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), str):
        raise ValueError(f"{where}: found {str(rle)[:60]}, expected {{'size': [H, W], 'counts': text}}")
    size = rle.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(x) is int and x > 0 for x in size):
        raise ValueError(f"{where}: size is {size}, expected [height, width]")


# ------------------------------------------------------------------------------------------------ counts


@dataclass(frozen=True)
class Counts:
    """Counts of one picture: label -> positive whole number (`values`), how that came about, and notes.

    `state`: `ok`, `empty` (the file names no object), `missing` (no file) or `broken` (not readable).
    """

    values: dict[str, int]
    state: Literal["ok", "empty", "missing", "broken"] = "ok"
    notes: tuple[str, ...] = ()


def counts_path(folder: StrPath, image_name: str) -> Path:
    """Count file of a picture: `<folder>/<image name, suffix replaced by .json>`; sub-folders stay."""
    return Path(folder) / PurePosixPath(image_name).with_suffix(".json")


def read_counts(folder: StrPath, image_name: str) -> Counts:
    """Counts of a picture for matching. Zeros are dropped; "3" and 3.0 become 3; values that are no whole
    numbers >= 0 are left out with a note; a missing or broken file is a state, never an exception."""
    path = counts_path(folder, image_name)
    if not path.is_file() and (Path(folder) / path.name).is_file():
        path = Path(folder) / path.name  # published folders are flat
    if not path.is_file():
        return Counts({}, "missing", (f"{path} is not there",))
    try:
        content = read_json(path, dict)
    except ValueError as error:
        return Counts({}, "broken", (str(error),))
    return clean_counts(content, str(path))


def clean_counts(content: Mapping[str, Any], where: str) -> Counts:
    """Positive whole numbers of a parsed count object (rules of `read_counts`)."""
    values, notes = {}, []
    for label, value in content.items():
        number = whole_number(value)
        if number is None or number < 0:
            notes.append(f"{where}: the count of {label!r} is {value!r}, no whole number >= 0: left out")
        elif number > 0:
            values[label] = number
    return Counts(values, "ok" if values or notes else "empty", tuple(notes))


def whole_number(value: Any) -> int | None:
    """3, 3.0, "3" and "3.0" as 3; None for everything else (booleans, null, fractions, NaN, text)."""
    if isinstance(value, str):
        try:
            value = float(value.strip())
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if math.isfinite(value) and value == int(value) else None


def hand_counts(text: str, names: Sequence[str]) -> dict[str, Counts]:
    """Counts given by hand, for every picture of `names`.

    Args:
        text: `ship=3,plane=2` (the same for every picture), or the path of a JSON file that holds
            {"ship": 3, ...} for every picture or {"picture.png": {"ship": 3, ...}, ...}.

    Raises:
        ValueError: neither form, a value that is no whole number >= 0, or pictures that are not there.
    """
    if text.lower().endswith(".json") or Path(text).is_file():
        content = read_json(text, dict)
    else:
        content = dict(_pair(part) for part in text.split(",") if part.strip())
        if not content:
            raise ValueError(f"--counts {text!r} names no object; write for example ship=3,plane=2")
    if not any(isinstance(value, dict) for value in content.values()):
        return dict.fromkeys(names, _by_hand(content, "--counts"))
    unknown = [name for name in content if name not in names]
    if unknown:
        raise ValueError(f"--counts {text}: there are no pictures {unknown[:5]}; there are {list(names)[:5]}")
    missing = Counts({}, "missing", (f"--counts {text} does not name it",))
    given = {name: _by_hand(value, f"--counts {text}: {name}") for name, value in content.items()}
    return {name: given.get(name, missing) for name in names}


def _by_hand(content: Any, where: str) -> Counts:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected label: number, found {str(content)[:60]}")
    counts = clean_counts(content, where)
    if counts.notes:
        raise ValueError("; ".join(counts.notes))
    return counts


def _pair(part: str) -> tuple[str, str]:
    label, equals, number = part.rpartition("=")
    if not equals or not label.strip():
        raise ValueError(f"--counts: {part.strip()!r} is not label=number, for example ship=3")
    return label.strip(), number


def write_counts(path: StrPath, counts: Mapping[str, Any]) -> Path:
    """Write a count file as published: one flat object, indent 4, letters unescaped. One step."""
    return atomic_write_text(path, json.dumps(dict(counts), indent=4, ensure_ascii=False))


# -------------------------------------------------------------------------------------- parts for resuming


class PartStore:
    """Results of single pictures beside a final file, so that a killed run goes on where it stopped.

    Parts lie in `<final>.parts/`, one JSON file per key. `settings` are what the results depend on; parts
    made with other settings are removed. `finish` writes the final file and removes the parts.
    """

    def __init__(self, final: StrPath, settings: Mapping[str, Any]) -> None:
        self.final = Path(final)
        self.folder = self.final.with_name(self.final.name + ".parts")
        mark = self.folder / "settings.json"
        wanted = json.loads(json.dumps(dict(settings)))
        if mark.is_file() and read_json(mark, dict) != wanted:
            logger.warning("%s: results made with other settings are dropped", self.folder)
            self._clear()
        if not mark.is_file():
            self._clear()
            atomic_write_json(mark, wanted)

    def get(self, key: str) -> Any | None:
        """The stored value of a picture, or None."""
        path = self._path(key)
        return read_json(path) if path.is_file() else None

    def put(self, key: str, value: Any) -> None:
        """Store the value of a picture (not None) in one step."""
        atomic_write_json(self._path(key), value, indent=None)

    def finish(self, value: Any, indent: int | None = 4) -> Path:
        """Write `value` to the final path in one step, then remove the parts."""
        path = atomic_write_json(self.final, value, indent=indent)
        self.remove()
        return path

    def remove(self) -> None:
        """Remove the parts: what they were kept for is written."""
        self._clear()
        self.folder.rmdir()

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        return self.folder / f"{PurePosixPath(key).stem[:60]}_{digest}.json"

    def _clear(self) -> None:
        for path in _files(self.folder):
            path.unlink()


def _files(folder: Path) -> Iterable[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
