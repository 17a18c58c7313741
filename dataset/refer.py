"""The REFER format: `refs(<split_by>).p` (a pickle, or its JSON twin) beside `instances.json`.

A ref is one object of one picture with sentences that mean it; its outline is an annotation of
`instances.json`. Fields: dataset/README.md. Pictures are found by the ref's `image_id`.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataset.base import DataError, Fault
from dataset.index import Inputs, Listing, indexed
from dataset.text import IMAGE_TOKEN, SEG_TOKEN
from utils.io import StrPath, is_text, read_json
from utils.rle import decode_mask
from utils.safe_pickle import load_plain_pickle

Overlap = Literal["union", "sum"]
"""Where parts of one outline overlap: 1 (`union`), or their number (`sum`, the published loaders)."""

_FARTHEST = 100.0
"""Polygons may reach this many picture sides out of it; farther is a fault (drawing costs memory)."""


# ---------------------------------------------------------------------------------------------------- masks


def outline_mask(segmentation: Any, height: int, width: int, overlap: Overlap = "union") -> np.ndarray:
    """Mask of a COCO outline, uint8 (H, W).

    Args:
        segmentation: list of polygons [x0, y0, x1, y1, ...], list of run-length codes, one such code, or an
            empty list (no outline: nothing is inside).
        height, width: size of the picture.
        overlap: see `Overlap`.

    Raises:
        ValueError: another form.
    """
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list):
        raise ValueError(f"a segmentation is a list of polygons or codes, found {repr(segmentation)[:60]}")
    total = np.zeros((height, width), np.uint8)
    for number, part in enumerate(parts):
        try:
            total += _part_mask(part, height, width)
        except ValueError as error:
            raise ValueError(f"[{number}]: {error}") from error
    return total if overlap == "sum" else (total > 0).astype(np.uint8)


def _part_mask(part: Any, height: int, width: int) -> np.ndarray:
    if isinstance(part, dict):
        return decode_mask(part, (height, width)).astype(np.uint8)
    from pycocotools import mask as coco

    check_polygon(part, height, width)
    (code,) = coco.frPyObjects([[float(value) for value in part]], height, width)
    return coco.decode(code)


def check_polygon(part: Any, height: int, width: int) -> None:
    """ValueError unless `part` is [x0, y0, x1, y1, ...], three points or more near the picture."""
    numbers = isinstance(part, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in part
    )
    if not numbers or len(part) < 6 or len(part) % 2:
        raise ValueError(
            f"a polygon is a list [x0, y0, x1, y1, ...] of 3 points or more, found {repr(part)[:60]}"
        )
    if not all(abs(value) <= _FARTHEST * max(height, width) for value in part):
        raise ValueError(f"polygon {repr(part)[:60]} leaves a picture of {width}x{height} pixels")


# ---------------------------------------------------------------------------------------------------- files


def find_refs(folder: StrPath, split_by: str | None = None) -> Path:
    """The refs file of a folder.

    Args:
        folder: holds `refs(<split_by>).p` or `.json`.
        split_by: which one; None takes the only one.

    Raises:
        ValueError: not there; names those that are.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.glob("refs(*") if path.suffix in (".p", ".json"))
    wanted = [path for path in found if split_by is None or path.stem == f"refs({split_by})"]
    if not wanted or len({path.stem for path in wanted}) > 1:
        name = f"refs({split_by or '<split_by>'}).p (or .json)"
        there = ", ".join(path.name for path in found) or "no refs file"
        raise ValueError(
            f"{folder}: expected {name}, found {there}; NAME(split_by)|SPLIT chooses another one"
        )
    return sorted(wanted, key=lambda path: path.suffix != ".p")[0]


def read_refer(
    refs_file: StrPath,
    instances_file: StrPath,
    pictures: StrPath,
    split: str,
    text_fields: Sequence[str] = ("sent", "raw"),
) -> Listing:
    """Pictures of a split with their refs, sorted by picture id.

    Args:
        refs_file, instances_file: the two files.
        pictures: folder that `file_name` is relative to.
        split: `train`, `val` (exact), `test` (every split with "test" in it), `testA`... (its letter).
        text_fields: the first of these fields that a sentence has is its text.

    Returns:
        Items {"image": path, "size": [H, W], "refs": [{"id", "kind": category, "outlines": [segmentation,
        ...], "sentences": [[text, exists, text of what is there or None], ...]}]}.

    Raises:
        ValueError: a file is not there or not of the format as a whole.
    """
    refs_path, instances_path = Path(refs_file), Path(instances_file)
    refs = read_json(refs_path) if refs_path.suffix == ".json" else load_plain_pickle(refs_path)
    if not isinstance(refs, list):
        raise ValueError(f"{refs_path}: expected a list of refs, found {type(refs).__name__}")
    tables = read_json(instances_path, dict)
    images = _by_id(tables, "images", instances_path)
    annotations = _by_id(tables, "annotations", instances_path)
    kinds = {i: c.get("name") for i, c in _by_id(tables, "categories", instances_path, needed=False).items()}
    chosen = in_split(split)
    there = picture_lookup()
    faults: list[Fault] = []
    entries: dict[int, dict[str, Any]] = {}
    for number, ref in enumerate(refs):
        field = f"refs[{number}]"
        try:
            if not isinstance(ref, dict) or not isinstance(ref.get("split"), str):
                raise DataError(
                    refs_path, f"{field}.split", f"expected a ref with a split, found {_short(ref)}"
                )
            if not chosen(ref["split"]):
                continue
            image = images.get(_id(ref.get("image_id"), refs_path, f"{field}.image_id"))
            if image is None:
                raise DataError(refs_path, f"{field}.image_id", f"{instances_path.name} has no such picture")
            entry = entries.get(ref["image_id"]) or _picture(image, instances_path, Path(pictures), there)
            entry["refs"].append(
                _ref(ref, annotations, kinds, refs_path, field, text_fields, entry["size"], faults)
            )
            entries[ref["image_id"]] = entry
        except DataError as error:
            faults.append(error.fault)
    return Listing([entries[index] for index in sorted(entries)], faults=faults)


def open_refer(
    refs_file: Path,
    instances_file: Path,
    pictures: Path,
    split: str,
    text_fields: Sequence[str],
    index: str,
    root: StrPath,
) -> Listing:
    """`read_refer` behind an index (`indexed`)."""
    return indexed(
        f"refer-{refs_file.parent.name}-{split}",
        Inputs(files=(refs_file, instances_file), listed=(pictures,)),
        lambda: read_refer(refs_file, instances_file, pictures, split, text_fields),
        index,
        root,
        split=split,
        fields=list(text_fields),
    )


def in_split(split: str) -> Callable[[str], bool]:
    """Whether a ref's split belongs to the wanted one; ValueError for an unknown name."""
    if match := re.fullmatch("test([ABC])", split):
        return lambda found: match[1] in found
    if split == "test":
        return lambda found: "test" in found
    if split in ("train", "val", "testAB", "testBC", "testAC"):
        return lambda found: found == split
    raise ValueError(f"split {split!r} is unknown; choose train, val, test, testA, testB or testC")


def picture_lookup() -> Callable[[Path], bool]:
    """A test for files that reads every folder once (many files of few folders)."""
    known: dict[Path, set[str]] = {}

    def there(path: Path) -> bool:
        if path.parent not in known:
            try:
                known[path.parent] = set(os.listdir(path.parent))
            except (OSError, ValueError):
                known[path.parent] = set()
        return path.name in known[path.parent]

    return there


def inside(name: Any, source: StrPath, field: str) -> str:
    """A relative path that stays in its folder; DataError otherwise."""
    if not is_text(name) or "\0" in name:
        raise DataError(source, field, f"expected a file name, found {_short(name)}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(source, field, f"{name!r} leads out of the folder")
    return name


def _picture(
    image: dict[str, Any], source: Path, pictures: Path, there: Callable[[Path], bool]
) -> dict[str, Any]:
    field = f"images[id {image['id']}]"
    path = pictures / inside(image.get("file_name"), source, f"{field}.file_name")
    size = [image.get("height"), image.get("width")]
    if not all(type(side) is int and 0 < side < 2**20 for side in size):
        raise DataError(source, f"{field}.height", f"expected sides in pixels, found {_short(size)}")
    if not there(path):
        raise DataError(source, f"{field}.file_name", f"picture {path} is not there")
    return {"image": str(path), "size": size, "refs": []}


def _ref(
    ref: dict[str, Any],
    annotations: dict[int, dict[str, Any]],
    kinds: dict[int, Any],
    source: Path,
    field: str,
    text_fields: Sequence[str],
    size: list[int],
    faults: list[Fault],
) -> dict[str, Any]:
    numbers = ref.get("ann_id")
    outlines = []
    for number in numbers if isinstance(numbers, list) else [numbers]:
        if number == -1:  # nothing is there
            continue
        found = annotations.get(_id(number, source, f"{field}.ann_id"))
        if found is None:
            raise DataError(source, f"{field}.ann_id", f"instances.json has no annotation {number}")
        outlines.append(_outline(found.get("segmentation"), size, source, f"annotations[id {number}]"))
    stored = ref.get("sentences")
    if not isinstance(stored, list) or not stored:
        raise DataError(source, f"{field}.sentences", f"expected a non-empty list, found {_short(stored)}")
    sentences = []
    for number, sentence in enumerate(stored):
        try:
            sentences.append(_sentence(sentence, source, f"{field}.sentences[{number}]", text_fields))
        except DataError as error:
            faults.append(error.fault)
    if not sentences:
        raise DataError(source, f"{field}.sentences", "none is usable")
    kind = kinds.get(ref.get("category_id")) if isinstance(ref.get("category_id"), int) else None
    identity = ref.get("ref_id") if isinstance(ref.get("ref_id"), int) else -1
    return {
        "id": identity,
        "kind": kind if isinstance(kind, str) else "",
        "outlines": outlines,
        "sentences": sentences,
    }


def _outline(segmentation: Any, size: list[int], source: Path, field: str) -> Any:
    """The segmentation, if its polygons can be drawn (codes are checked when they are decoded)."""
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list):
        raise DataError(source, f"{field}.segmentation", f"expected a list, found {_short(segmentation)}")
    for part in parts:
        if not isinstance(part, dict):
            try:
                check_polygon(part, *size)
            except ValueError as error:
                raise DataError(source, f"{field}.segmentation", str(error)) from error
    return segmentation


def _sentence(sentence: Any, source: Path, field: str, text_fields: Sequence[str]) -> list[Any]:
    if not isinstance(sentence, dict):
        raise DataError(source, field, f"expected a sentence with its fields, found {_short(sentence)}")
    text = next((sentence[name] for name in text_fields if sentence.get(name)), None)
    if not is_text(text):
        raise DataError(
            source, f"{field}.{text_fields[0]}", f"expected a non-empty text, found {_short(text)}"
        )
    truth = sentence.get("gt_sent") or None
    for name, value in ((text_fields[0], text), ("gt_sent", truth or "")):
        if not isinstance(value, str) or SEG_TOKEN in value or IMAGE_TOKEN in value:
            raise DataError(source, f"{field}.{name}", f"no plain text without {SEG_TOKEN}: {_short(value)}")
    if "is_false_premise" in sentence:
        exists = not sentence["is_false_premise"]
    else:
        exists = bool(sentence.get("exist", True))
    return [text, exists, truth]


def _by_id(tables: dict[str, Any], name: str, source: Path, needed: bool = True) -> dict[int, dict[str, Any]]:
    rows = tables.get(name, None if needed else [])
    if not isinstance(rows, list):
        raise ValueError(f"{source}: {name}: expected a list, found {_short(rows)}")
    return {row["id"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), int)}


def _id(value: Any, source: Path, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(source, field, f"expected a number, found {_short(value)}")
    return value


def _short(value: Any) -> str:
    return repr(value)[:60]
