"""Checks a data folder and lists every fault with file and field; formats: dataset/README.md

A *fault* makes readers skip an entry or spoils a mask; a *note* is worth knowing. Pictures are decoded
(unless `fast`), masks drawn, duplicates found, statistics counted.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.base import UNREADABLE, DataError, Fault, picture_size
from dataset.generic import FILE_NAME, Picture, read_annotations
from dataset.gres import (
    PICTURE_ENDINGS,
    Entry,
    SplitFolders,
    find_split,
    read_names,
    read_split,
    target_extent,
)
from dataset.masks import IGNORE, Raster, split_rings
from dataset.sem_seg import list_pairs, read_classes, read_label_mask
from utils.io import StrPath

FORMATS = ("auto", "gres", "generic", "sem_seg")


@dataclass
class Report:
    """Result of a check: faults, notes, and per split a table of statistics (JSON values)."""

    path: str
    format: str
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "path": self.path,
            "format": self.format,
            "ok": self.ok,
            "faults": [vars(fault) for fault in self.faults],
            "notes": [vars(note) for note in self.notes],
            "statistics": self.statistics,
        }

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [f"{self.path}: format {self.format}"]
        for name, table in self.statistics.items():
            lines.append(f"[{name}]")
            lines += [f"  {key}: {value}" for key, value in table.items()]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"FAULT: {fault}" for fault in self.faults]
        return [*lines, f"{len(self.faults)} faults, {len(self.notes)} notes"]


def validate(path: StrPath, kind: str = "auto", fast: bool = False, raster: Raster = "official") -> Report:
    """Check a data folder.

    Args:
        path: a folder of one split, a folder of splits, or an `annotations.json`.
        kind: one of `FORMATS`; `auto` looks at what is there.
        fast: read only the headers of pictures.
        raster: how polygons of GRES-like files are filled for the statistics.

    Raises:
        ValueError: nothing there, or no known format.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} is not there")
    kind = detect_format(path) if kind == "auto" else kind
    checks = {"gres": _check_gres, "generic": _check_generic, "sem_seg": _check_sem_seg}
    if kind not in checks:
        raise ValueError(f"format {kind!r} is unknown; choose one of {', '.join(FORMATS)}")
    report = Report(str(path), kind)
    checks[kind](path, report, fast, raster)
    return report


def detect_format(path: StrPath) -> str:
    """Format of a folder or file by what lies there. ValueError lists what was expected."""
    path = Path(path)
    if path.is_file() or (path / FILE_NAME).is_file() or any(path.glob(f"*/{FILE_NAME}")):
        return "generic"
    if (path / "images").is_dir() and (path / "masks").is_dir():
        return "sem_seg"
    if _gres_splits(path):
        return "gres"
    raise ValueError(
        f"{path}: no known format; expected {FILE_NAME} (own format), images/ with masks/ and classes.json "
        "(semantic segmentation), or JSON files beside pictures or in gres_annotations/ (GRES, ReasonSeg)"
    )


# --------------------------------------------------------------------------------------------------- GRES


def _gres_splits(path: Path) -> dict[str, SplitFolders]:
    """Split name -> folders, for a folder of one split or of several."""
    apart = [path / "gres_annotations", path / "gres-annotations"]
    bases = [folder for folder in apart if folder.is_dir()] or [path]
    if bases == [path] and any(path.glob("*.json")):
        return {path.name: SplitFolders(path, path)}
    names = {p.name for base in bases if base.is_dir() for p in base.iterdir() if p.is_dir()}
    found = {}
    for name in sorted(names):
        try:
            folders = find_split(path, "", name)
        except ValueError:
            continue
        if any(folders.annotations.glob("*.json")):
            found[name] = folders
    return found


def _check_gres(path: Path, report: Report, fast: bool, raster: Raster) -> None:
    splits = _gres_splits(path)
    if not splits:
        raise ValueError(f"{path}: no JSON files, neither here, in split folders, nor in gres_annotations/")
    stems: dict[str, str] = {}
    polygons: dict[bytes, Path] = {}
    for name, folders in splits.items():
        entries, faults = read_split(folders)
        report.faults += faults
        report.statistics[name] = _gres_statistics(entries, faults, report, fast, raster)
        _check_lists(folders, report)
        known = {p.stem for p in folders.annotations.glob("*.json")} | {e.image_path.stem for e in entries}
        for picture in folders.pictures.iterdir() if folders.pictures.is_dir() else ():
            if picture.suffix.lower() in PICTURE_ENDINGS and picture.stem not in known:
                report.notes.append(Fault(str(picture), "", "picture without annotation"))
        for entry in entries:
            other = stems.setdefault(entry.json_path.stem, name)
            if other != name:
                report.faults.append(
                    Fault(str(entry.json_path), "", f"the same name is in the split {other}")
                )
            key = b"".join(shape.points.tobytes() for shape in entry.annotation.shapes)
            first = polygons.setdefault(key, entry.json_path)
            if first != entry.json_path and key:
                report.notes.append(Fault(str(entry.json_path), "shapes", f"equal to those of {first}"))
        _check_doubles((e.image_path for e in entries), report)


def _gres_statistics(
    entries: list[Entry], faults: list[Fault], report: Report, fast: bool, raster: Raster
) -> dict[str, Any]:
    areas, points, rings, boxes = [], [], 0, 0
    for entry in entries:
        annotation, (height, width) = entry.annotation, entry.size
        file = str(entry.json_path)
        if not fast:
            _decode(entry.image_path, report)
        extent = target_extent(annotation)
        if extent and (extent[0] < 0 or extent[1] < 0 or extent[2] > width or extent[3] > height):
            shown = ", ".join(f"{value:g}" for value in extent)
            message = (
                f"polygons reach ({shown}) but picture {entry.image_path.name} has {width}x{height} pixels"
            )
            report.faults.append(Fault(file, "shapes.points", message))
        if not annotation.has_target:
            report.faults.append(Fault(file, "shapes", "no target shape"))
            continue
        area = int(np.count_nonzero(annotation.mask(height, width, raster) == 1))
        if area == 0:
            report.faults.append(Fault(file, "shapes.points", "no pixel of the target is in the picture"))
        areas.append(area)
        shapes = [shape.points for shape in annotation.shapes if not shape.is_flag]
        points += [len(p) for p in shapes]
        rings += any(len(split_rings(p)) > 1 for p in shapes)
        boxes += all(len(p) == 4 for p in shapes)
        doubled = [text for text, n in Counter(annotation.texts).items() if n > 1]
        report.notes += [Fault(file, "text", f"asked more than once: {text!r}") for text in doubled]
    texts = [text for entry in entries for text in entry.annotation.texts]
    return {
        "usable files": len(entries),
        "unusable": len(faults),
        **text_statistics(texts),
        "false premises": sum(len(entry.annotation.false_premises) for entry in entries),
        "picture sizes (height, width)": common(entry.size for entry in entries),
        "points per polygon (min, median, max)": spread(points),
        "files with several rings in one polygon": rings,
        "files with bare boxes only": boxes,
        f"mask area in pixels, {raster} (min, median, max)": spread(areas),
    }


def _check_lists(folders: SplitFolders, report: Report) -> None:
    if folders.list_file is None:
        return
    listed = set(read_names(folders.list_file))
    for path in sorted(folders.annotations.glob("*.json")):
        if path.stem not in listed:
            report.notes.append(Fault(str(path), "", f"not named in {folders.list_file}, so it is not read"))


# -------------------------------------------------------------------------------------------- own format


def _check_generic(path: Path, report: Report, fast: bool, raster: Raster) -> None:
    files = [path] if path.is_file() else [path / FILE_NAME]
    if not files[0].is_file():
        files = sorted(path.glob(f"*/{FILE_NAME}"))
    owners: dict[str, str] = {}
    for file in files:
        pictures, faults = read_annotations(file)
        report.faults += faults
        kinds: Counter[str] = Counter()
        areas: list[int] = []
        for picture in pictures:
            if not fast:
                _decode(picture.path, report)
            areas += _check_queries(file, picture, report, kinds)
        if not fast:
            _check_doubles((p.path for p in pictures), report, owners)
        queries = [query for picture in pictures for query in picture.queries]
        report.statistics[file.parent.name] = {
            "pictures": len(pictures),
            "unusable": len(faults),
            **text_statistics([query.text for query in queries]),
            "per kind": dict(sorted(kinds.items())),
            "about absent things": sum(not query.exists for query in queries),
            "picture sizes (height, width)": common(picture.size for picture in pictures),
            "mask area in pixels (min, median, max)": spread(areas),
        }


def _check_queries(file: Path, picture: Picture, report: Report, kinds: Counter[str]) -> list[int]:
    areas = []
    for number, query in enumerate(picture.queries):
        where = f"{picture.path.name}: queries[{number}]"
        kinds[query.kind or "(none)"] += 1
        try:
            masks = query.decode(*picture.size)
        except ValueError as error:
            report.faults.append(Fault(str(file), f"{where}.masks", str(error)))
            continue
        found = [int(np.count_nonzero(mask == 1)) for mask in masks]
        report.faults += [
            Fault(str(file), f"{where}.masks[{k}]", "no pixel is inside")
            for k, n in enumerate(found)
            if n == 0
        ]
        areas += found
        for k, stored in enumerate(query.masks):
            report.faults += _outside(stored, picture, Fault(str(file), f"{where}.masks[{k}]", ""))
    doubled = [text for text, n in Counter(query.text for query in picture.queries).items() if n > 1]
    report.notes += [
        Fault(str(file), picture.path.name, f"asked more than once: {text!r}") for text in doubled
    ]
    return areas


def _outside(stored: Any, picture: Picture, where: Fault) -> list[Fault]:
    """Fault if a polygon leaves the picture."""
    if not isinstance(stored, list):
        return []
    flat = np.array([p for ring in stored for p in (ring if isinstance(ring[0], list) else [ring])], float)
    height, width = picture.size
    if flat.min() >= 0 and flat[:, 0].max() <= width and flat[:, 1].max() <= height:
        return []
    reach = f"x {flat[:, 0].min():g}..{flat[:, 0].max():g}, y {flat[:, 1].min():g}..{flat[:, 1].max():g}"
    return [
        Fault(where.file, where.field, f"polygon reaches {reach}, the picture has {width}x{height} pixels")
    ]


# ---------------------------------------------------------------------------------- semantic segmentation


def _check_sem_seg(path: Path, report: Report, fast: bool, raster: Raster) -> None:
    try:
        classes = read_classes(path)
    except ValueError as error:
        report.faults.append(Fault(str(path / "classes.json"), "", str(error)))
        classes = {}
    pairs, faults = list_pairs(path)
    report.faults += faults
    pixels: Counter[int] = Counter()
    pictures: Counter[int] = Counter()
    for picture, mask_path in pairs:
        if not fast:
            _decode(picture, report)
        try:
            areas = np.bincount(read_label_mask(mask_path).ravel(), minlength=256)
        except DataError as error:
            report.faults.append(error.fault)
            continue
        for index in np.flatnonzero(areas):
            pixels[int(index)] += int(areas[index])
            pictures[int(index)] += 1
            if int(index) not in classes and index != IGNORE and classes:
                message = f"{areas[index]} pixels have class {index}, which classes.json does not name"
                report.faults.append(Fault(str(mask_path), "", message))
    used = {picture.stem for picture, _ in pairs} | {Path(fault.file).stem for fault in faults}
    for mask_path in sorted((path / "masks").glob("*.png")):
        if mask_path.stem not in used:
            report.faults.append(Fault(str(mask_path), "", "mask without picture"))
    if not fast:
        _check_doubles((picture for picture, _ in pairs), report)
    total = max(1, sum(pixels.values()))
    report.statistics[path.name] = {
        "pictures": len(pairs),
        "unusable": len(faults),
        "picture sizes (height, width)": common(picture_size(picture) for picture, _ in pairs),
        **{
            f"class {index} {name}": f"{pixels[index] / total:.1%} of pixels, in {pictures[index]} pictures"
            for index, name in classes.items()
        },
        "without label": f"{pixels[IGNORE] / total:.1%} of pixels",
    }


# ------------------------------------------------------------------------------------------------- shared


def _decode(path: Path, report: Report) -> None:
    try:
        with Image.open(path) as image:
            image.load()
    except UNREADABLE as error:
        report.faults.append(Fault(str(path), "", f"picture cannot be decoded: {error}"))


def _check_doubles(paths: Iterable[Path], report: Report, owners: dict[str, str] | None = None) -> None:
    """Notes for files with equal content."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        by_size[path.stat().st_size].append(path)
    owners = {} if owners is None else owners
    for path in (path for group in by_size.values() for path in group):
        first = owners.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), str(path))
        if first != str(path):
            report.notes.append(Fault(str(path), "", f"the same picture as {first}"))


def text_statistics(texts: list[str]) -> dict[str, Any]:
    """Table of the numbers of queries and of their words."""
    return {
        "queries": len(texts),
        "distinct queries": len(set(texts)),
        "words per query (min, median, max)": spread([len(text.split()) for text in texts]),
    }


def spread(values: list[int]) -> list[float]:
    """[smallest, median, largest]; empty for no values."""
    return [float(min(values)), float(np.median(values)), float(max(values))] if values else []


def common(sizes: Iterable[tuple[int, int]]) -> list[list[Any]]:
    """The five most frequent sizes with their counts."""
    return [[list(size), count] for size, count in Counter(sizes).most_common(5)]
