"""Boundary IoU: how well the outlines of two masks agree, whatever their size.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR 2021): of both
masks only the pixels within a distance d of their own outline count, d = 2 % of the picture's diagonal. The
picture's border is an outline too.
"""

import cv2
import numpy as np

from utils.metrics import IGNORE_VALUE

RATIO = 0.02


def boundary_distance(height: int, width: int, ratio: float = RATIO) -> int:
    """Distance d in pixels, at least 1."""
    return max(1, round(ratio * float(np.hypot(height, width))))


def boundary_region(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels of a bool mask (H, W) at most `distance` steps (3x3) from a pixel outside: bool (H, W)."""
    inner = np.zeros(mask.shape, dtype=bool)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return inner
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    framed = np.pad(mask[part].astype(np.uint8), 1)
    eroded = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=distance)
    inner[part] = eroded[1:-1, 1:-1] > 0
    return mask & ~inner


def boundary_counts(prediction: np.ndarray, target: np.ndarray, distance: int | None = None) -> list[int]:
    """[intersection, union] in pixels of the two boundary regions.

    Args:
        prediction: (H, W), non-zero is object. target: uint8 (H, W) with 1 = object, 255 = does not count
            (outlines are those of the whole masks; pixels of 255 are then left out).
        distance: default `boundary_distance` of the picture.
    """
    distance = boundary_distance(*target.shape) if distance is None else distance
    regions = [boundary_region(np.asarray(m, dtype=bool), distance) for m in (prediction != 0, target == 1)]
    counted = target != IGNORE_VALUE
    both, either = regions[0] & regions[1] & counted, (regions[0] | regions[1]) & counted
    return [int(np.count_nonzero(both)), int(np.count_nonzero(either))]


def boundary_iou(intersection: int, union: int) -> float:
    """Intersection over union; 1 where both masks are empty."""
    return intersection / union if union else 1.0
