"""COCO run-length codes of masks: {"size": [H, W], "counts": text, or list of run lengths}.

Runs go down the columns and alternate between outside and inside, outside first. The text form packs them
into letters of 6 bits (5 of value, 1 for "more follows"), from the fourth run on as differences to the run
two before. Codes from files are checked here before anything decodes them: pycocotools reads broken text
without looking and may run past its end.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_PIXELS = 2**30
_MOST_LETTERS = 7  # 35 bits: more than any run

Rle = dict[str, Any]


def encode_mask(mask: np.ndarray) -> Rle:
    """COCO compressed RLE {"size": [H, W], "counts": str} of a mask (H, W); non-zero is inside."""
    if mask.ndim != 2:
        raise ValueError(f"a mask to be stored has shape (H, W), found {mask.shape}")
    return encode_masks([mask])[0]


def encode_masks(masks: Sequence[np.ndarray] | np.ndarray) -> list[Rle]:
    """`encode_mask` of masks (H, W) that have one size, as one array in one call."""
    from pycocotools import mask as coco

    if not len(masks):
        return []
    height, width = masks[0].shape
    columns = np.empty((len(masks), width, height), np.uint8)  # column by column, as the code runs
    for column, mask in zip(columns, masks):
        np.not_equal(mask.T, 0, out=column, casting="unsafe")
    codes = coco.encode(columns.transpose(2, 1, 0))
    return [{"size": [height, width], "counts": code["counts"].decode("ascii")} for code in codes]


def decode_mask(rle: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """bool (H, W) of a COCO RLE; `size` is the (H, W) it must have. ValueError as `run_lengths`."""
    runs = run_lengths(rle, size)
    height, width = rle["size"]
    inside = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(inside, runs).reshape(width, height).T)


def run_lengths(rle: Any, size: tuple[int, int] | None = None) -> np.ndarray:
    """int64 (R,) run lengths of a code, checked.

    Args:
        rle: anything, for example from a JSON file.
        size: (H, W) that it must have; None takes any.

    Raises:
        ValueError: not a code, another size, or runs that do not fill the picture.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError(
            f'a run-length code is {{"size": [H, W], "counts": ...}}, found {repr(rle)[:60]}; '
            "write it with pycocotools.mask.encode"
        )
    height, width = _checked_size(rle["size"], size)
    counts = rle["counts"]
    if isinstance(counts, str):
        runs = unpack_counts(counts)
    elif isinstance(counts, list) and all(type(run) is int and abs(run) <= _MOST_PIXELS for run in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError(
            f"counts of a run-length code: a text or a list of pixels, found {repr(counts)[:60]}"
        )
    if (runs < 0).any() or int(runs.sum()) != height * width:
        found = "a negative run" if (runs < 0).any() else f"{int(runs.sum())} pixels"
        raise ValueError(
            f"run-length code does not fill {height}x{width} pixels (found {found}); "
            "write it with pycocotools.mask.encode"
        )
    return runs


def _checked_size(found: Any, wanted: tuple[int, int] | None) -> tuple[int, int]:
    whole = isinstance(found, list | tuple) and len(found) == 2 and all(type(n) is int for n in found)
    if not whole or min(found) < 1 or found[0] * found[1] > _MOST_PIXELS:
        raise ValueError(f"size of a run-length code: expected [height, width] > 0, found {repr(found)[:60]}")
    if wanted is not None and tuple(found) != tuple(wanted):
        raise ValueError(f"run-length code has size {list(found)}, the picture is {list(wanted)}")
    return found[0], found[1]


def unpack_counts(text: str) -> np.ndarray:
    """int64 (R,) run lengths of COCO's text form. ValueError if it is malformed; runs may be negative."""
    if not text:
        return np.zeros(0, np.int64)
    groups = np.frombuffer(text.encode("ascii", "ignore"), np.uint8).astype(np.int64) - 48
    if not text.isascii() or groups.min() < 0 or groups.max() > 63:
        raise ValueError("run-length code holds letters that no such code has; it is damaged")
    ends = np.flatnonzero((groups & 32) == 0)
    if not len(ends) or ends[-1] != len(groups) - 1:
        raise ValueError("run-length code ends inside a number; it was cut")
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts + 1
    if length.max() > _MOST_LETTERS:
        raise ValueError("run-length code holds a number that is too large; it is damaged")
    place = np.arange(len(groups)) - np.repeat(starts, length)
    runs = np.add.reduceat((groups & 31) << (5 * place), starts)
    runs -= np.where(groups[ends] & 16, np.int64(1) << (5 * length), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def area(rle: Rle) -> int:
    """Pixels inside a code that has been checked."""
    from pycocotools import mask as coco

    return int(coco.area(_packed(rle)))


def pixel_counts(prediction: Rle, target: Rle, ignore: Rle | None = None) -> dict[str, list[int]]:
    """Counts of one pair without decoding: what `metrics.mask_counts` gives for the decoded masks.

    Args:
        prediction, target, ignore: codes of one size that have been checked; `ignore` are pixels that do
            not count (none of them is in `target`).

    Returns:
        {"intersection", "union", "target"}: pairs [background, object].
    """
    from pycocotools import mask as coco

    predicted, wanted = _packed(prediction), _packed(target)
    n_predicted, n_wanted = int(coco.area(predicted)), int(coco.area(wanted))
    n_hit = int(coco.area(coco.merge([predicted, wanted], intersect=True)))
    n_valid = prediction["size"][0] * prediction["size"][1]
    if ignore is not None:
        ignored = _packed(ignore)
        n_valid -= int(coco.area(ignored))
        n_predicted -= int(coco.area(coco.merge([predicted, ignored], intersect=True)))
    union = n_predicted + n_wanted - n_hit
    return {
        "intersection": [n_valid - union, n_hit],
        "union": [n_valid - n_hit, union],
        "target": [n_valid - n_wanted, n_wanted],
    }


def _packed(rle: Rle) -> dict[str, Any]:
    """The code as pycocotools takes it."""
    from pycocotools import mask as coco

    if isinstance(rle["counts"], list):
        return coco.frPyObjects(rle, *rle["size"])
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
