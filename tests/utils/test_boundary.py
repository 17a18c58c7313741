"""Boundary regions and their IoU against a slow definition."""

import numpy as np
import pytest

from utils.boundary import boundary_counts, boundary_distance, boundary_iou, boundary_region


def slow_region(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels of the mask with a pixel outside (or outside the picture) in the square of that distance."""
    padded = np.pad(mask, distance)
    side = 2 * distance + 1
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    return mask & ~windows.all(axis=(2, 3))


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_regions(distance: int) -> None:
    rng = np.random.default_rng(distance)
    for _ in range(5):
        mask = np.zeros((23, 31), bool)
        for _ in range(4):
            y, x = rng.integers(0, 20), rng.integers(0, 28)
            mask[y : y + rng.integers(1, 20), x : x + rng.integers(1, 20)] = True
        np.testing.assert_array_equal(boundary_region(mask, distance), slow_region(mask, distance))
    assert not boundary_region(np.zeros((5, 5), bool), distance).any()
    full = np.ones((9, 9), bool)
    np.testing.assert_array_equal(boundary_region(full, distance), slow_region(full, distance))


def test_counts() -> None:
    assert boundary_distance(512, 512) == 14 and boundary_distance(3, 4) == 1
    target = np.zeros((20, 20), np.uint8)
    target[5:15, 5:15] = 1
    assert boundary_counts(target, target, 1) == [36, 36]
    grown = np.zeros((20, 20), bool)
    grown[4:16, 4:16] = True
    assert boundary_counts(grown, target, 1) == [0, 36 + 44]
    assert boundary_counts(grown, target, 2) == [36, 44 + 36 + 28]
    target[:, :10] = np.where(target[:, :10] == 1, 1, 255)
    assert boundary_counts(target == 1, target, 1) == [36, 36]
    assert boundary_counts(grown, target, 1) == [0, 36 + 22]
    assert boundary_iou(0, 0) == 1 and boundary_iou(1, 4) == 0.25
