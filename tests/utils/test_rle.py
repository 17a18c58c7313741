"""Run-length codes: against pycocotools, against decoded masks, and damaged codes."""

import numpy as np
import pytest
from pycocotools import mask as coco

from utils import metrics
from utils.rle import area, decode_mask, encode_mask, encode_masks, pixel_counts, run_lengths, unpack_counts


def random_masks(count: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = rng.integers(1, 60, (count, 2))
    masks = [rng.random(tuple(shape)) < rng.random() for shape in shapes]
    blob = np.zeros((700, 900), bool)
    blob[40:600, 300:420] = True  # long runs, negative differences
    return [*masks, blob, np.zeros((5, 4), bool), np.ones((4, 5), bool)]


def test_decoding_equals_pycocotools() -> None:
    for mask in random_masks():
        rle = encode_mask(mask)
        np.testing.assert_array_equal(decode_mask(rle, mask.shape), mask)
        np.testing.assert_array_equal(coco.decode(rle), mask)
        runs = run_lengths(rle).tolist()
        np.testing.assert_array_equal(decode_mask({"size": list(mask.shape), "counts": runs}), mask)
        assert area(rle) == mask.sum()


def test_counts_of_codes_equal_counts_of_masks() -> None:
    rng = np.random.default_rng(1)
    for mask in random_masks():
        target = rng.choice([0, 1, 255], size=mask.shape, p=[0.5, 0.3, 0.2]).astype(np.uint8)
        for wanted in (target, target * (target == 1)):
            ignore = encode_mask(wanted == 255) if (wanted == 255).any() else None
            found = pixel_counts(encode_mask(mask), encode_mask(wanted == 1), ignore)
            intersection, union, counted = metrics.mask_counts(mask, wanted)
            expected = {"intersection": intersection, "union": union, "target": counted}
            assert found == {name: values.tolist() for name, values in expected.items()}
    plain = {"size": [2, 2], "counts": [1, 2, 1]}
    assert pixel_counts(plain, plain)["union"] == [2, 2]


@pytest.mark.parametrize(
    "rle, message",
    [
        (None, "found None"),
        ({"size": [2, 2]}, "pycocotools"),
        ({"size": 4, "counts": [4]}, "height, width"),
        ({"size": [2, 2.0], "counts": [4]}, "height, width"),
        ({"size": [True, 4], "counts": [4]}, "height, width"),
        ({"size": [0, 2], "counts": []}, "height, width"),
        ({"size": [10**12, 10**12], "counts": [10**24]}, "height, width"),
        ({"size": [2, 3], "counts": [6]}, "the picture is"),
        ({"size": [2, 2], "counts": [3]}, "does not fill"),
        ({"size": [2, 2], "counts": [5, -1]}, "negative run"),
        ({"size": [2, 2], "counts": [10**40]}, "list of pixels"),
        ({"size": [2, 2], "counts": [4.0]}, "list of pixels"),
        ({"size": [2, 2], "counts": {}}, "list of pixels"),
        ({"size": [2, 2], "counts": ""}, "found 0 pixels"),
        ({"size": [2, 2], "counts": "é"}, "letters"),
        ({"size": [2, 2], "counts": "\ud800"}, "letters"),
        ({"size": [2, 2], "counts": "4P"}, "cut"),
        ({"size": [2, 2], "counts": "o" * 9 + "0"}, "too large"),
    ],
)
def test_damaged_codes_are_refused(rle: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_mask(rle, (2, 2))


def test_cut_and_changed_texts_never_decode_to_the_same_mask() -> None:
    mask = random_masks()[3]
    rle = encode_mask(mask)
    for cut in range(len(rle["counts"])):
        with pytest.raises(ValueError):
            decode_mask(rle | {"counts": rle["counts"][:cut]}, mask.shape)
    assert unpack_counts(rle["counts"]).sum() == mask.size


def test_many_masks_are_coded_like_one() -> None:
    masks = np.random.default_rng(5).random((7, 13, 9)) < 0.4
    masks[0], masks[1] = False, True
    assert encode_masks(masks) == [encode_mask(mask) for mask in masks]
    for code, mask in zip(encode_masks(list(masks.astype(np.uint8) * 255)), masks):
        assert np.array_equal(decode_mask(code), mask)
    assert encode_masks([]) == []
