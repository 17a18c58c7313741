"""Holes against scipy, boxes, and the choice among too many masks."""

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes

from model.instructsam.automatic_masks import MaskRecord, Runs
from model.instructsam.propose import fill_holes, mask_polygons, proposals_of
from utils.rle import decode_mask


def random_mask(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 40, 2))
    mask = rng.random(shape) < rng.uniform(0.2, 0.9)
    mask[: rng.integers(0, 9)] = False  # boxes smaller than the picture
    mask[:, : rng.integers(0, 9)] = False
    return mask


@pytest.mark.parametrize("seed", range(40))
def test_enclosed_holes_are_filled(seed: int) -> None:
    mask = random_mask(seed)
    before = mask.copy()
    assert np.array_equal(fill_holes(mask), binary_fill_holes(mask))
    assert np.array_equal(fill_holes(mask.astype(np.uint8) * 7), binary_fill_holes(mask))
    assert np.array_equal(mask, before) and np.array_equal(fill_holes(mask, "keep"), mask)


def test_a_river_swallows_a_side_only_on_request() -> None:
    mask = np.zeros((20, 30), bool)
    mask[8:11] = True
    assert np.array_equal(fill_holes(mask), mask)
    assert fill_holes(mask, "legacy_corner").sum() == 12 * 30
    mask[:11, :3] = True
    assert np.array_equal(fill_holes(mask), mask) and fill_holes(mask, "legacy_corner").all()


def record(mask: np.ndarray, iou: float, stability: float = 0.8) -> MaskRecord:
    rows, columns = np.nonzero(mask)
    box = (columns.min(), rows.min(), np.ptp(columns), np.ptp(rows)) if len(rows) else (0, 0, 0, 0)
    return MaskRecord(Runs.of(mask), tuple(map(float, box)), iou, stability, (0, 0), (0, 0, 1, 1))


def ring(x: int, y: int, side: int) -> np.ndarray:
    mask = np.zeros((40, 50), bool)
    mask[y : y + side, x : x + side] = True
    mask[y + 1 : y + side - 1, x + 1 : x + side - 1] = False
    return mask


def test_too_many_masks_are_sorted_and_few_are_not() -> None:
    masks = [ring(k, k, 5 + k) for k in range(6)]
    quality = [0.6, 0.9, 0.7, 0.9, 0.5, 0.9]
    records = [record(mask, q) for mask, q in zip(masks, quality)]
    few = proposals_of(records, (40, 50))
    assert few.scores == pytest.approx([(q + 0.8) / 2 for q in quality])
    assert few.boxes.tolist() == [list(r.bbox) for r in records]
    best = proposals_of(records, (40, 50), max_masks=4)
    assert best.boxes.tolist() == [list(records[k].bbox) for k in (1, 3, 5, 2)]
    assert [decode_mask(rle).sum() for rle in best.rles] == [(5 + k) ** 2 for k in (1, 3, 5, 2)]
    kept = proposals_of(records, (40, 50), min_mask_region_area=records[2].area, holes="keep")
    assert [decode_mask(rle).sum() for rle in kept.rles] == [records[k].area for k in (3, 4, 5)]


def test_exact_boxes_are_those_of_the_final_masks() -> None:
    line = np.zeros((40, 50), bool)
    line[3:9, 7] = True
    records = [record(line, 0.9), record(ring(4, 6, 9), 0.8)]
    assert proposals_of(records, (40, 50)).boxes.tolist() == [[7, 3, 0, 5], [4, 6, 8, 8]]
    exact = proposals_of(records, (40, 50), boxes="exact")
    assert exact.boxes.tolist() == [[7, 3, 1, 6], [4, 6, 9, 9]] and exact.size == (40, 50)


def test_many_masks_and_none() -> None:
    records = [record(ring(k % 20, k % 15, 5), 0.9) for k in range(150)]
    found = proposals_of(records, (40, 50), boxes="exact")
    for k in (0, 63, 64, 149):
        assert np.array_equal(decode_mask(found.rles[k]), binary_fill_holes(records[k].runs.mask()))
        assert found.boxes[k].tolist() == [k % 20, k % 15, 5, 5]
    nothing = proposals_of([], (40, 50))
    assert len(nothing) == 0 and nothing.to_json()["segmentations"] == []


def test_polygons_are_outer_outlines() -> None:
    mask = ring(10, 5, 12) | ring(30, 20, 15)
    mask[0, 0] = True  # too small
    found = {tuple(sorted(zip(p[::2], p[1::2]))) for p in mask_polygons(mask)}
    assert found == {
        tuple(sorted(((x, y), (x + s, y), (x, y + s), (x + s, y + s))))
        for x, y, s in ((10, 5, 11), (30, 20, 14))
    }
