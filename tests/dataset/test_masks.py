"""Rasterisation and run-length codes against brute force and pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco

from dataset.masks import IGNORE, Shape, fill_rings, mask_from_json, rasterise, split_rings
from tests.dataset.conftest import square


def inside(rings: list[np.ndarray], x: float, y: float) -> bool:
    """Even-odd rule by counting crossings to the left, one edge after the other."""
    crossings = 0
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0)):
            if (y0 > y) != (y1 > y):
                crossings += x0 + (y - y0) / (y1 - y0) * (x1 - x0) < x
    return crossings % 2 == 1


@pytest.mark.parametrize("seed", range(5))
def test_fill_rings_is_the_even_odd_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rings = [rng.uniform(-4, 20, (int(rng.integers(3, 9)), 2)) for _ in range(3)]
    expected = [[inside(rings, x + 0.5, y + 0.5) for x in range(17)] for y in range(13)]
    np.testing.assert_array_equal(fill_rings(rings, 13, 17), expected)


def test_exact_squares_cover_their_area() -> None:
    mask = rasterise([Shape("target", np.array(square(2, 3, 4)))], 10, 12, "exact")
    assert mask.sum() == 16 and mask[3:7, 2:6].all()
    official = rasterise([Shape("target", np.array(square(2, 3, 4)))], 10, 12)
    assert official.sum() == 25 and official[3:8, 2:7].all()


def test_glued_rings_are_taken_apart() -> None:
    glued = np.array(square(0, 0, 3) + square(6, 6, 3))
    assert [len(ring) for ring in split_rings(glued)] == [4, 4]
    assert rasterise([Shape("target", glued)], 12, 12, "exact").sum() == 18
    assert rasterise([Shape("target", glued)], 12, 12).sum() > 32  # with the bridges of the published rule


def test_small_shapes_lie_on_large_ones_and_flags_are_skipped() -> None:
    shapes = [
        Shape("Ignore_me", np.array(square(4, 4, 2))),
        Shape("target", np.array(square(2, 2, 8))),
        Shape("FLAG", np.array(square(0, 0, 12))),
    ]
    for raster, sizes in (("official", (81 - 9, 9)), ("exact", (64 - 4, 4))):
        mask = rasterise(shapes, 14, 14, raster)
        assert ((mask == 1).sum(), (mask == IGNORE).sum()) == sizes
    with pytest.raises(ValueError, match="without points"):
        rasterise([Shape("target", np.zeros((0, 2)))], 4, 4)
    with pytest.raises(ValueError, match="unknown"):
        rasterise(shapes, 4, 4, "best")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_run_lengths_are_those_of_pycocotools(seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    mask = (rng.random((rng.integers(1, 90), rng.integers(1, 70))) < density).astype(np.uint8)
    rle = coco.encode(np.asfortranarray(mask))
    stored = {"size": list(mask.shape), "counts": rle["counts"].decode()}
    np.testing.assert_array_equal(mask_from_json(stored, *mask.shape), mask)
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=2 if flat.size else 0))
    runs = np.diff([0, *edges.tolist()]).tolist()
    np.testing.assert_array_equal(mask_from_json(stored | {"counts": runs}, *mask.shape), mask)


def test_polygons_of_the_own_format() -> None:
    outer, hole = square(1, 1, 8), square(3, 3, 2)
    assert mask_from_json(outer, 12, 12).sum() == 64
    assert mask_from_json([outer, hole], 12, 12).sum() == 60


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "a mask is"),
        ([], "a mask is"),
        ([[1, 2], [3, 4]], "at least 3 points"),
        ([[1, 2], [3, 4], [5, "a"]], "point 2"),
        ([[1, 2], [3, 4], [5, float("nan")]], "point 2"),
        ({"size": [3, 4], "counts": "12"}, "the picture is"),
        ({"size": [4, 4]}, "run-length code is"),
        ({"size": [4, 4], "counts": [3, 4]}, "does not fill"),
        ({"size": [4, 4], "counts": [-1, 17]}, "does not fill"),
        ({"size": [4, 4], "counts": "\x00zz"}, "damaged"),
        ({"size": [4, 4], "counts": "ooooooooooooooooooo"}, "cut"),
    ],
)
def test_malformed_masks(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_from_json(value, 4, 4)
