"""Do annotations fit their tiles? Finds wrong numbering, which no file format reveals.

Two tests, each against chance: the boxes of xView's own labels (needs `xView_train.geojson`, no pictures),
and the pictures' edges along the polygons' outlines (needs the tiles alone).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dataset.base import DataError, Fault
from dataset.gres import Entry, read_annotation, target_extent
from dataset.image import load_rgb
from dataset.tiles import Tile, read_wanted, tile_name
from utils.io import StrPath

_SURE = 4.0
"""Standard errors above chance that count as a fit of the whole."""
_BLOCK_SURE = 1.5
"""The same for one block of numbers."""
_BAND = 6
"""Pixels on both sides of an outline that its gradient is compared with."""


# ------------------------------------------------------------------------------------------ xView's own boxes


@dataclass(frozen=True)
class BoxFit:
    """Mean best IoU of annotations' boxes with xView's boxes in their tiles, and in tiles drawn at random."""

    collation: str
    iou: float
    chance: float
    annotations: int

    @property
    def fits(self) -> bool:
        """Whether the annotations plainly belong to these tiles."""
        return self.iou > max(0.2, 2 * self.chance)

    def __str__(self) -> str:
        what = "fits" if self.fits else "does not fit"
        return f"{self.collation}: IoU with xView's boxes {self.iou:.3f}, by chance {self.chance:.3f}: {what}"


def read_extents(annotations: StrPath) -> dict[int, tuple[float, float, float, float]]:
    """Number -> (x0, y0, x1, y1) around the target, of every GRES JSON file below a folder (see
    `read_wanted`)."""
    folder = Path(annotations)
    places = [folder / "gres_annotations", folder / "gres-annotations", folder]
    extents = {}
    for number, split in read_wanted(annotations).items():
        paths = [place / split / f"{tile_name(number)}.json" for place in places]
        path = next((p for p in paths if p.is_file()), None)
        try:
            extent = target_extent(read_annotation(path)) if path else None
        except DataError:
            continue  # validate_data.py lists it
        if extent is not None:
            extents[number] = extent
    return extents


def fit_boxes(
    tiles: Sequence[Tile],
    scene_boxes: Mapping[str, np.ndarray],
    extents: Mapping[int, Sequence[float]],
    collation: str = "",
    seed: int = 0,
) -> BoxFit:
    """Compare annotations with xView's labels: in the right tile each target is one of its objects.

    Args:
        tiles: all tiles by number, from 1. scene_boxes: from `read_scene_boxes`. extents: from
            `read_extents`.
        collation: name of the numbering, for the report.
        seed: of the random tiles.
    """
    numbers = [number for number in sorted(extents) if number <= len(tiles)]
    if not numbers:
        return BoxFit(collation, 0.0, 0.0, 0)
    others = np.random.default_rng(seed).permutation(numbers)
    own = [_best_iou(tiles[n - 1], scene_boxes, extents[n]) for n in numbers]
    chance = [_best_iou(tiles[o - 1], scene_boxes, extents[n]) for n, o in zip(numbers, others, strict=True)]
    return BoxFit(collation, float(np.mean(own)), float(np.mean(chance)), len(numbers))


def _best_iou(tile: Tile, scene_boxes: Mapping[str, np.ndarray], extent: Sequence[float]) -> float:
    x0, y0, x1, y1 = tile.box
    boxes = np.clip(scene_boxes[tile.scene] - [x0, y0, x0, y0], 0, [x1 - x0, y1 - y0] * 2)
    low, high = np.maximum(boxes[:, :2], extent[:2]), np.minimum(boxes[:, 2:], extent[2:])
    common = np.clip(high - low, 0, None).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (extent[2] - extent[0]) * (extent[3] - extent[1])
    return float((common / np.maximum(area - common, 1e-9)).max(initial=0.0))


# ---------------------------------------------------------------------------------- edges in the pictures


@dataclass(frozen=True)
class EdgeFit:
    """How much more often than in random tiles an outline lies on edges of its own tile.

    wins: mean share of random tiles that the own tile beats; 0.5 is chance. sigma: standard errors above it.
    blocks: (first name, last name, wins, sigma) of consecutive runs of names.
    """

    pictures: int
    wins: float
    sigma: float
    blocks: tuple[tuple[str, str, float, float], ...]

    @property
    def fits(self) -> bool:
        """Whether outlines lie on edges, in every block of names."""
        return self.sigma >= _SURE and not self.doubtful

    @property
    def doubtful(self) -> tuple[tuple[str, str, float, float], ...]:
        """Blocks that look like chance, or far worse than the best one."""
        best = max((block[2] for block in self.blocks), default=0.5)
        return tuple(block for block in self.blocks if _is_doubtful(*block[2:], best))

    def lines(self) -> list[str]:
        """The result in words."""
        found = f"outlines beat random tiles in {self.wins:.1%} of comparisons"
        verdict = f"({self.sigma:+.1f} standard errors): {'fits' if self.fits else 'DOES NOT FIT'}"
        lines = [f"{self.pictures} pictures: {found} {verdict}"]
        for first, last, wins, sigma in self.doubtful:
            lines.append(
                f"  {first} .. {last}: {wins:.1%} ({sigma:+.1f}): like chance or worse than elsewhere"
            )
        return lines


def fit_edges(
    entries: Sequence[Entry], others: int = 8, sample: int = 2000, blocks: int = 20, seed: int = 0
) -> tuple[EdgeFit, list[Fault]]:
    """Compare the gradient along outlines with that beside them, in the own picture and in random other ones.

    Args:
        entries: pictures of one size with their annotations.
        others: random pictures per annotation.
        sample: so many annotations, evenly spread; 0: all.
        blocks: the names are also looked at in so many runs (of at least 40), since numbers may go wrong
            midway.
        seed: of the random pictures.

    Returns:
        The result, and pictures that could not be read.
    """
    entries = sorted(entries, key=lambda entry: entry.json_path.stem)
    if sample and len(entries) > sample:
        entries = [entries[k] for k in np.linspace(0, len(entries) - 1, sample).round().astype(int)]
    gradients, rng = _Gradients(entries), np.random.default_rng(seed)
    names, shares = [], []
    for index, entry in enumerate(entries):
        mask = entry.annotation.mask(*entry.size, "exact") == 1
        outline, band = _outline(mask)
        candidates = [k for k, other in enumerate(entries) if other.size == entry.size and k != index]
        own = gradients[index]
        if own is None or outline.sum() < 16 or band.sum() < 16 or not candidates:
            continue
        drawn = rng.choice(candidates, min(others, len(candidates)), replace=False)
        found = [other for k in drawn if (other := gradients[int(k)]) is not None]
        here = _contrast(own, outline, band)
        there = np.array([_contrast(other, outline, band) for other in found])
        if len(there):
            shares.append(float((here > there).mean() + 0.5 * (here == there).mean()))
            names.append(entry.json_path.stem)
    count = max(1, min(blocks, len(names) // 40))
    runs = [run for run in np.array_split(np.arange(len(names)), count) if len(run)]
    table = (
        tuple((names[r[0]], names[r[-1]], *_wins([shares[k] for k in r])) for r in runs) if count > 1 else ()
    )
    return EdgeFit(len(names), *_wins(shares), table), gradients.faults


def _is_doubtful(wins: float, sigma: float, best: float) -> bool:
    if sigma < _BLOCK_SURE:
        return True
    error = (wins - 0.5) / sigma
    return wins - 0.5 < 0.5 * (best - 0.5) and best - wins > 3 * error


def _wins(shares: Sequence[float]) -> tuple[float, float]:
    """Mean, and its distance from 0.5 in standard errors."""
    if len(shares) < 2:
        return 0.5, 0.0
    error = max(float(np.std(shares, ddof=1)) / np.sqrt(len(shares)), 1e-3)
    return float(np.mean(shares)), (float(np.mean(shares)) - 0.5) / error


def _outline(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels on both sides of the outline, and the band around it without them (both bool); no tile
    borders."""
    kernel = np.ones((3, 3), np.uint8)
    solid = mask.astype(np.uint8)
    line = cv2.dilate(solid, kernel) - cv2.erode(solid, kernel, borderValue=1)
    band = cv2.dilate(line, np.ones((2 * _BAND + 1,) * 2, np.uint8)) - line
    return line.astype(bool), band.astype(bool)


def _contrast(gradient: np.ndarray, outline: np.ndarray, band: np.ndarray) -> float:
    return float((gradient[outline].mean() + 1.0) / (gradient[band].mean() + 1.0))


class _Gradients:
    """Gradient magnitudes float32 (H, W) of entries' pictures, read when needed; the last ones are kept."""

    def __init__(self, entries: Sequence[Entry], kept: int = 256) -> None:
        self.entries, self.kept = entries, kept
        self.cache: OrderedDict[int, np.ndarray | None] = OrderedDict()
        self.faults: list[Fault] = []

    def __getitem__(self, index: int) -> np.ndarray | None:
        if index in self.cache:
            self.cache.move_to_end(index)
            return self.cache[index]
        try:
            grey = cv2.cvtColor(load_rgb(self.entries[index].image_path), cv2.COLOR_RGB2GRAY).astype(
                np.float32
            )
            found = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
        except (ValueError, OSError) as error:
            fault = Fault(str(self.entries[index].image_path), "", str(error))
            self.faults += [] if fault in self.faults else [fault]
            found = None
        self.cache[index] = found
        if len(self.cache) > self.kept:
            self.cache.popitem(last=False)
        return found
