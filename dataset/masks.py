"""Polygons and run-length codes -> masks. Points are (x, y); a mask is uint8 (H, W).

Two ways to fill a polygon:
* `official` is the published rule (OpenCV outline + even-odd fill on truncated points, boundary included);
* `exact` reads x, y as pixel corners, cuts a glued point list into its rings and takes the pixels whose
  centre lies inside (even-odd).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

from utils.rle import decode_mask, run_lengths

Raster = Literal["official", "exact"]
RASTERS: tuple[str, ...] = ("official", "exact")
IGNORE = 255
"""Mask value of pixels that no loss and no metric counts."""
FARTHEST = 1e6
"""Largest coordinate in pixels that an annotation may hold."""


@dataclass(frozen=True)
class Shape:
    """One labelled polygon: float64 `points` (P, 2)."""

    label: str
    points: np.ndarray

    @property
    def is_flag(self) -> bool:
        """Whether the published reader leaves the shape out."""
        return self.label.lower() == "flag"

    @property
    def value(self) -> int:
        """Mask value: 255 where the label contains `ignore`, else 1."""
        return IGNORE if "ignore" in self.label.lower() else 1


def check_raster(raster: str) -> None:
    """ValueError unless `raster` is one of `RASTERS`."""
    if raster not in RASTERS:
        raise ValueError(f"mask raster {raster!r} is unknown; choose one of {', '.join(RASTERS)}")


def rasterise(shapes: Sequence[Shape], height: int, width: int, raster: Raster = "official") -> np.ndarray:
    """Mask of a picture's shapes, larger ones first, so that smaller ones lie on top.

    Args:
        shapes: flags are skipped; of two with equal area the first in the list lies on top.
        height, width: canvas in pixels; polygons are never rescaled.
        raster: how a polygon becomes pixels (see the module text).

    Returns:
        uint8 (H, W): 1 target, 255 ignore, 0 elsewhere.
    """
    check_raster(raster)
    fill = _fill_official if raster == "official" else _fill_exact
    drawn = [(shape.value, fill(shape.points, height, width)) for shape in shapes if not shape.is_flag]
    order = np.argsort([np.count_nonzero(pixels) for _, pixels in drawn], kind="stable")[::-1]
    mask = np.zeros((height, width), np.uint8)
    for index in order:
        value, pixels = drawn[index]
        mask[pixels] = value
    return mask


def _fill_official(points: np.ndarray, height: int, width: int) -> np.ndarray:
    if len(points) == 0:
        raise ValueError("a polygon without points cannot be drawn; remove the shape from the annotation")
    corners = np.trunc(points).astype(np.int32).reshape(-1, 1, 2)
    canvas = np.zeros((height, width), np.uint8)
    cv2.polylines(canvas, [corners], True, 1, thickness=1)
    cv2.fillPoly(canvas, [corners], 1)
    return canvas.astype(bool)


def _fill_exact(points: np.ndarray, height: int, width: int) -> np.ndarray:
    if len(points) == 0:
        raise ValueError("a polygon without points cannot be drawn; remove the shape from the annotation")
    return fill_rings(split_rings(points), height, width)


def split_rings(points: np.ndarray) -> list[np.ndarray]:
    """Rings of a glued point list: each ends where its first point recurs (that repetition is dropped)."""
    rings, start = [], 0
    while start < len(points):
        same = np.flatnonzero((points[start + 1 :] == points[start]).all(axis=1))
        end = start + 1 + int(same[0]) if len(same) else len(points)
        rings.append(points[start:end])
        start = end + 1
    return rings


def fill_rings(rings: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Pixels whose centre is inside the rings by the even-odd rule: bool (H, W).

    Args:
        rings: float (P, 2) each, closed implicitly, (x, y) in pixel corners: 0..W and 0..H.
    """
    flips = np.zeros((height, width + 1), np.uint8)
    for ring in rings:
        x0, y0 = np.asarray(ring, np.float64).T
        x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
        # rows whose centre line y = row + 0.5 an edge crosses: top <= row < bottom
        top = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(np.int64)
        bottom = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(np.int64)
        count = bottom - top
        edge = np.repeat(np.arange(len(x0)), count)
        row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + top[edge]
        share = (row + 0.5 - y0[edge]) / (y1 - y0)[edge]
        crossing = x0[edge] + share * (x1 - x0)[edge]
        column = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
        np.add.at(flips, (row, column), 1)
    return np.bitwise_xor.accumulate(flips[:, :-1] & 1, axis=1) == 1


# ---------------------------------------------------------------------------------- masks of the own format


def mask_from_json(value: Any, height: int, width: int) -> np.ndarray:
    """Mask stored as a COCO run-length code or as polygon rings, uint8 (H, W) with 0 and 1.

    Args:
        value: {"size": [H, W], "counts": text or list}; or one ring [[x, y], ...]; or several rings
            [[[x, y], ...], ...], filled even-odd in pixel-corner coordinates (an inner ring is a hole).
        height, width: size of the picture.

    Raises:
        ValueError: another form, another size, or a code that does not fill the picture.
    """
    if isinstance(value, dict):
        return decode_mask(value, (height, width)).astype(np.uint8)
    return fill_rings(_rings(value), height, width).astype(np.uint8)


def check_mask(value: Any, height: int, width: int) -> None:
    """ValueError unless `mask_from_json` can read the mask and something of it can be in the picture."""
    if isinstance(value, dict):
        inside = bool(run_lengths(value, (height, width))[1::2].any())
    else:
        inside = any(touches(ring, height, width) for ring in _rings(value))
    if not inside:
        raise ValueError(
            f"no pixel of the mask is in the picture of {height}x{width} pixels (height x width)"
        )


def touches(points: np.ndarray, height: int, width: int) -> bool:
    """Whether the box around points (P, 2) reaches into a picture."""
    return bool((points.max(axis=0) >= 0).all() and (points.min(axis=0) <= (width, height)).all())


def _rings(value: Any) -> list[np.ndarray]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"a mask is a run-length code or a list of points, found {str(value)[:60]}")
    rings = [value] if _is_point(value[0]) else value
    return [ring_array(ring) for ring in rings]


def ring_array(ring: Any, least: int = 3) -> np.ndarray:
    """[[x, y], ...] as float64 (P, 2); ValueError for fewer than `least` points or for other values."""
    if not isinstance(ring, list) or len(ring) < least:
        found = f"{len(ring)} points" if isinstance(ring, list) else str(ring)[:60]
        raise ValueError(f"a polygon is a list of at least {least} points [x, y], found {found}")
    for number, point in enumerate(ring):
        if not _is_point(point):
            raise ValueError(f"point {number} is {str(point)[:60]}, expected two numbers [x, y] in pixels")
    return np.array(ring, np.float64).reshape(-1, 2)


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= FARTHEST for x in value)
    )
