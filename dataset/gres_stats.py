"""Statistics of GRES annotations: tables per split and for all, and lists of unusual files.

Pictures are not needed: masks are drawn on a canvas of 512x512 pixels. `validate_data.py --gres_stats`
writes them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataset.base import DataError, Fault
from dataset.gres import find_split, parse_annotation
from dataset.masks import split_rings
from dataset.tiles import SPLITS
from utils.io import StrPath

CANVAS = 512
SMALL, MEDIUM = 32**2, 96**2
"""COCO's bounds of mask areas in pixels: small below the first, large from the second."""
LARGE_FROM = 728
"""Our size rule (the published one is not known): official area from which a target counts as large."""
TINY = 32
"""Official area in pixels below which a file is listed."""
_PERCENTS = (0, 1, 5, 10, 25, 50, 75, 90, 95, 99, 100)


@dataclass(frozen=True)
class _File:
    """What is counted of one file (areas in pixels)."""

    name: str
    size: int
    texts: tuple[str, ...]
    points: tuple[int, ...]
    area: int
    iou: float
    rings: int
    rectilinear: bool
    box: bool
    touching: bool
    key: bytes


@dataclass
class GresStatistics:
    """splits: split (and `all`) -> table. lists: kind -> names. faults: files that cannot be read.

    A table has `files`, `queries`, `distinct_queries`, `queries_per_file`, `query_words` (by blanks),
    `points_per_polygon`, `area_percentiles`, `area_mean`, `area_coco_buckets` (official raster), `multi_ring`
    (files whose point list holds several rings), `not_rectilinear` (files with a step between points that is
    neither horizontal nor vertical, bridges between glued rings included), `touching_512` (files with a
    coordinate at the far side), the mean IoU of official and exact masks (of all, of single-ring and of
    multi-ring files), and `bytes`.
    """

    splits: dict[str, dict[str, Any]]
    lists: dict[str, Any]
    query_overlap: dict[str, int]
    size_split: dict[str, Any]
    faults: list[Fault] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "splits": self.splits,
            "lists": self.lists,
            "query_overlap": self.query_overlap,
            "size_split_not_official": self.size_split,
            "faults": [vars(fault) for fault in self.faults],
        }


def gres_statistics(root: StrPath, name: str = "GeoReasonSeg") -> GresStatistics:
    """Statistics of the splits train, val and test below `root`, in either layout (see
    `dataset.gres.find_split`).

    Raises:
        ValueError: none of the splits is there.
    """
    from tqdm import tqdm

    faults: list[Fault] = []
    files: dict[str, list[_File]] = {}
    for split in SPLITS:
        try:
            folder = find_split(root, name, split).annotations
        except ValueError:
            continue
        files[split] = []
        for path in tqdm(sorted(folder.glob("*.json")), desc=split, unit="file", disable=None):
            try:
                files[split].append(_read(path))
            except DataError as error:
                faults.append(error.fault)
    if not files:
        raise ValueError(f"{root}: none of the splits {', '.join(SPLITS)} is there")
    everything = [file for split in files for file in files[split]]
    tables = {split: _table(found) for split, found in files.items()} | {"all": _table(everything)}
    return GresStatistics(tables, _lists(files), _overlap(files), _size_split(files), faults)


def _read(path: Path) -> _File:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(path, "", f"cannot be read ({error.strerror})") from error
    annotation = parse_annotation(data, path)
    try:
        official = annotation.mask(CANVAS, CANVAS) == 1
        exact = annotation.mask(CANVAS, CANVAS, "exact") == 1
    except ValueError as error:
        raise DataError(path, "shapes", str(error)) from error
    shapes = [shape.points for shape in annotation.shapes if not shape.is_flag]
    rings = [ring for points in shapes for ring in split_rings(points)]
    steps = [np.abs(np.roll(points, -1, axis=0) - points) for points in shapes]
    union = np.count_nonzero(official | exact)
    return _File(
        path.stem,
        len(data),
        annotation.texts,
        tuple(len(points) for points in shapes),
        int(np.count_nonzero(official)),
        np.count_nonzero(official & exact) / union if union else 1.0,
        len(rings),
        all((step.min(axis=1) == 0).all() for step in steps),
        bool(shapes) and all(len(points) == 4 and (points[0] != points[-1]).any() for points in shapes),
        any((points >= CANVAS).any() for points in shapes),
        b"|".join(points.tobytes() for points in shapes),
    )


def _table(files: list[_File]) -> dict[str, Any]:
    texts = [text for file in files for text in file.texts]
    words = [len(text.split()) for text in texts]
    areas = np.array([file.area for file in files])
    points = [count for file in files for count in file.points]
    closed = [file for file in files if not file.box]
    single = [file.iou for file in closed if file.rings == 1]
    multi = [file.iou for file in closed if file.rings > 1]
    queries = Counter(len(file.texts) for file in files)
    return {
        "files": len(files),
        "queries": len(texts),
        "distinct_queries": len(set(texts)),
        "queries_per_file": {str(count): queries[count] for count in sorted(queries, reverse=True)},
        "query_words": {"min": min(words), "median": float(np.median(words)), "max": max(words)}
        if words
        else {},
        "points_per_polygon": _percentiles(points),
        "area_percentiles": _percentiles(areas),
        "area_mean": float(areas.mean()) if len(areas) else None,
        "area_coco_buckets": {
            f"small_lt_{SMALL}": int((areas < SMALL).sum()),
            "medium": int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
            f"large_ge_{MEDIUM}": int((areas >= MEDIUM).sum()),
        },
        "multi_ring": len(multi),
        "not_rectilinear": sum(not file.rectilinear for file in files),
        "touching_512": sum(file.touching for file in files),
        "iou_official_vs_pixel_exact_mean": _mean(file.iou for file in closed),
        "iou_official_vs_pixel_exact_single_ring": _mean(single),
        "iou_official_vs_pixel_exact_multi_ring": _mean(multi),
        "bytes": sum(file.size for file in files),
    }


def _lists(files: dict[str, list[_File]]) -> dict[str, Any]:
    places = defaultdict(list)
    for split, found in files.items():
        for file in found:
            if file.key:
                places[file.key].append(f"{split}/{file.name}")

    def names(chosen: Any) -> dict[str, list[str]]:
        return {split: [file.name for file in found if chosen(file)] for split, found in files.items()}

    return {
        "single_query_in_train": [file.name for file in files.get("train", ()) if len(file.texts) == 1],
        "identical_polygon_pairs": [pair for pair in places.values() if len(pair) > 1],
        "non_ascii_query": names(lambda file: not all(text.isascii() for text in file.texts)),
        "multi_ring": {
            split: {file.name: file.rings for file in found if file.rings > 1}
            for split, found in files.items()
        },
        "plain_box_polygon_open_ring": names(lambda file: file.box),
        "query_mentions_bounding_box": names(
            lambda file: any("bounding box" in text.lower() for text in file.texts)
        ),
        f"area_below_{TINY}px": names(lambda file: file.area < TINY),
    }


def _overlap(files: dict[str, list[_File]]) -> dict[str, int]:
    """Queries (each counted as often as it is asked) that occur verbatim in another split."""
    texts = {split: [text for file in found for text in file.texts] for split, found in files.items()}
    distinct = {split: set(found) for split, found in texts.items()}
    pairs = [("test", "val"), ("test", "train"), ("val", "train")]
    return {
        f"{one}_queries_also_in_{two}": len([text for text in texts[one] if text in distinct[two]])
        for one, two in pairs
        if one in texts and two in texts
    }


def _size_split(files: dict[str, list[_File]]) -> dict[str, Any]:
    large = sum(file.area >= LARGE_FROM for file in files.get("test", ()))
    rule = f"official-raster area >= {LARGE_FROM} px is large"
    return {"rule": rule, "large": large, "small": len(files.get("test", ())) - large}


def _percentiles(values: Any) -> dict[str, float]:
    return {str(p): float(np.percentile(values, p)) for p in _PERCENTS} if len(values) else {}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None
