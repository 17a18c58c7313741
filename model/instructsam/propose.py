"""Generated masks -> proposals: filters, scores, holes, boxes; and masks as polygons.

Order and formulas are the published ones (InstructSAM specification, 3.2).
"""

from collections.abc import Sequence
from typing import Literal

import cv2
import numpy as np

from model.instructsam.automatic_masks import MaskRecord
from utils.instructsam_files import Proposals
from utils.rle import encode_masks

Holes = Literal["enclosed", "legacy_corner", "keep"]
Boxes = Literal["published", "exact"]
_MASKS_AT_ONCE = 64


def fill_holes(mask: np.ndarray, holes: Holes = "enclosed") -> np.ndarray:
    """bool (H, W): `mask` with its holes filled.

    `enclosed`: background (4-connected) that reaches no border of the picture becomes foreground.
    `legacy_corner`: as published, background that is not connected to pixel (0, 0) does; a mask that covers
    this pixel becomes the whole picture, one that cuts the picture loses the side away from it.
    `keep`: nothing.
    """
    if holes == "keep" or not mask.any():
        return mask != 0
    if holes == "legacy_corner":
        canvas = (mask != 0).astype(np.uint8)
        if canvas[0, 0]:
            return np.ones(mask.shape, bool)
        cv2.floodFill(canvas, None, (0, 0), 2)
        return canvas != 2
    x, y, width, height = cv2.boundingRect((mask != 0).astype(np.uint8))
    canvas = np.zeros(
        (height + 2, width + 2), np.uint8
    )  # holes lie inside the box; its surrounds are outside
    canvas[1:-1, 1:-1] = mask[y : y + height, x : x + width] != 0
    cv2.floodFill(canvas, None, (0, 0), 2)
    filled = np.zeros(mask.shape, bool)
    filled[y : y + height, x : x + width] = canvas[1:-1, 1:-1] != 2
    return filled


def proposals_of(
    records: Sequence[MaskRecord],
    size: tuple[int, int],
    *,
    max_masks: int = 200,
    min_mask_region_area: int = 0,
    holes: Holes = "enclosed",
    boxes: Boxes = "published",
) -> Proposals:
    """Proposals of a picture of `size` (H, W).

    Args:
        records: what the generator gave.
        max_masks: if more remain after the filters, the best by score (mean of predicted IoU and stability)
            are kept in that order; otherwise the order stays.
        min_mask_region_area: masks with more pixels than this are kept.
        holes: see `fill_holes`.
        boxes: `published` keeps the generator's boxes (width = last column - first column, not changed by
            the filling); `exact` takes them from the final masks, with their full width and height.
    """
    height, width = size
    kept = [r for r in records if r.area > min_mask_region_area and r.bbox[0] < width and r.bbox[1] < height]
    scores = np.array([(r.predicted_iou + r.stability_score) / 2 for r in kept])
    if len(kept) > max_masks:
        order = np.argsort(-scores, kind="stable")[:max_masks]
        kept, scores = [kept[k] for k in order], scores[order]
    rles, final = [], [record.bbox for record in kept]
    for first in range(0, len(kept), _MASKS_AT_ONCE):
        group = range(first, min(first + _MASKS_AT_ONCE, len(kept)))
        masks = [fill_holes(kept[k].runs.mask(), holes) for k in group]
        rles += encode_masks(masks)
        if boxes == "exact":
            final[group.start : group.stop] = [cv2.boundingRect(mask.astype(np.uint8)) for mask in masks]
    return Proposals(np.array(final, np.float64).reshape(-1, 4), scores, rles, size)


def mask_polygons(
    mask: np.ndarray, epsilon: float = 1.0, holes: Holes = "enclosed", min_area: float = 10.0
) -> list[list[int]]:
    """Outer outlines of a mask as flat lists [x1, y1, x2, y2, ...] in pixels.

    Outlines around less than `min_area` pixels or of fewer than three points are left out; `epsilon` is the
    largest distance in pixels between an outline and its polygon.
    """
    filled = fill_holes(mask, holes).astype(np.uint8)
    outlines = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[-2]
    polygons = (cv2.approxPolyDP(o, epsilon, True) for o in outlines if cv2.contourArea(o) >= min_area)
    return [polygon.reshape(-1).tolist() for polygon in polygons if len(polygon) >= 3]
