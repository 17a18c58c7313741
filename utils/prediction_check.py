"""Checks of prediction files (format: `utils.predictions`) before anything is computed from them.

Every fault is a ValueError that names file, place and field: `preds.json: images[3].queries[0].score: ...`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from utils.io import is_text
from utils.rle import pixel_counts, run_lengths

_TEXTS = ("query", "text", "kind", "generated", "size_class", "mismatch")
_PAIRS = ("intersection", "union", "target")


def check_header(file: str, header: dict[str, Any]) -> None:
    """ValueError unless "dataset" is a text and "n_images", where it is given, a number."""
    if not is_text(header.get("dataset")):
        _fail(file, "header.dataset", "expected the data set's name", header.get("dataset"))
    number = header.get("n_images", 0)
    if type(number) is not int or number < 0:
        _fail(file, "header.n_images", "expected a number of pictures", number)


def check_images(
    file: str,
    images: Sequence[Any],
    place: Callable[[int], str] = "images[{}].".format,
    targets: bool = True,
    exact: bool = True,
    most: int | None = None,
) -> None:
    """Check picture records.

    Args:
        file: its name, for messages.
        place: number in `images` -> what stands before the names of its fields.
        targets: False for files of other programs, which need not hold targets, counts, presences.
        exact: the stored counts must be those of the stored masks (else only possible ones).
        most: so many pictures are announced (files with `targets`); there may be fewer, not more.
    """
    numbers: dict[int, int] = {}
    if most is not None and len(images) > most:
        _fail(file, "header.n_images", f"{len(images)} pictures are there", most)
    for n, image in enumerate(images):
        at = place(n)
        _check_image(file, at, image, targets, exact)
        if most is not None and image["index"] >= most:
            _fail(file, f"{at}index", f"expected a number below header.n_images = {most}", image["index"])
        if "index" in image and numbers.setdefault(image["index"], n) != n:
            other = place(numbers[image["index"]]).rstrip(".: ")
            _fail(file, f"{at}index", f"expected another number than that of {other}", image["index"])


def _check_image(file: str, at: str, image: Any, targets: bool, exact: bool) -> None:
    if not isinstance(image, dict):
        _fail(file, at.rstrip(".: "), "expected an object", image)
    needed = ("image", "queries", *(("index", "size") if targets else ()))
    _need(file, at, image, needed)
    if not is_text(image["image"]) or "\0" in image["image"]:
        _fail(file, f"{at}image", "expected the picture's path", image["image"])
    if "index" in image and (type(image["index"]) is not int or image["index"] < 0):
        _fail(file, f"{at}index", "expected a number from 0 on", image["index"])
    size = image.get("size")
    if size is not None:
        whole = isinstance(size, list) and len(size) == 2 and all(type(x) is int and x > 0 for x in size)
        if not whole:
            _fail(file, f"{at}size", "expected [height, width]", size)
    elif targets:
        _fail(file, f"{at}size", "expected [height, width]", size)
    if not isinstance(image["queries"], list):
        _fail(file, f"{at}queries", "expected a list", image["queries"])
    for k, record in enumerate(image["queries"]):
        _check_query(file, f"{at}queries[{k}]", record, tuple(size) if size else None, targets, exact)


def _check_query(
    file: str, at: str, record: Any, size: tuple[int, int] | None, targets: bool, exact: bool
) -> None:
    if not isinstance(record, dict):
        _fail(file, at, "expected an object", record)
    needed = ("query", "gt_exists", "pred_exists", "prediction", "target", "counts")
    _need(file, f"{at}.", record, needed if targets else ("prediction",))
    for name in _TEXTS:
        if record.get(name) is not None and not is_text(record[name], empty=True):
            _fail(file, f"{at}.{name}", "expected a text", record[name])
    for name in ("gt_exists", "pred_exists"):
        if (targets or record.get(name) is not None) and type(record.get(name)) is not bool:
            _fail(file, f"{at}.{name}", "expected true or false", record.get(name))
    for name in ("ref_id", "sent_id"):
        value = record.get(name)
        if value is not None and type(value) is not int and not is_text(value):
            _fail(file, f"{at}.{name}", "expected a number or a text", value)
    score = record.get("score")
    if score is not None and (type(score) not in (int, float) or not math.isfinite(_float(score))):
        _fail(file, f"{at}.score", "expected a number or null", score)
    if targets and record["query"] is None:
        _fail(file, f"{at}.query", "expected a text", None)
    more = record.get("more_masks")
    if more is not None and not isinstance(more, list):
        _fail(file, f"{at}.more_masks", "expected a list", more)
    masks = {"prediction": record["prediction"]}
    masks |= {f"more_masks[{k}]": mask for k, mask in enumerate(more or ())}
    if targets:
        masks |= {"target": record["target"]}
        masks |= {"ignore": record["ignore"]} if record.get("ignore") is not None else {}
    for name, mask in masks.items():
        try:
            run_lengths(mask, size)
        except ValueError as error:
            raise ValueError(f"{file}: {at}.{name}: {error}") from error
        size = size or tuple(mask["size"])
    if targets:
        _check_counts(file, at, record, exact)
    pair, pixels = record.get("boundary", [0, 0]), math.prod(record["prediction"]["size"])
    whole = isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)
    if not whole or not 0 <= pair[0] <= pair[1] <= pixels:
        _fail(file, f"{at}.boundary", "expected [intersection, union] in pixels", pair)


def _check_counts(file: str, at: str, record: dict[str, Any], exact: bool) -> None:
    counts = record["counts"]
    if not isinstance(counts, dict):
        _fail(file, f"{at}.counts", "expected an object", counts)
    _need(file, f"{at}.counts.", counts, _PAIRS)
    pixels = math.prod(record["prediction"]["size"])
    for name in _PAIRS:
        pair = counts[name]
        whole = isinstance(pair, list) and len(pair) == 2
        if not whole or not all(type(x) is int and 0 <= x <= pixels for x in pair):
            _fail(file, f"{at}.counts.{name}", f"expected [background, object] in 0..{pixels}", pair)
    if exact:
        found = pixel_counts(record["prediction"], record["target"], record.get("ignore"))
        for name in _PAIRS:
            if found[name] != counts[name]:
                message = f"the stored masks give {found[name]}, the file says"
                _fail(file, f"{at}.counts.{name}", message, counts[name])
    pairs = zip(counts["intersection"], counts["target"], counts["union"])
    if not all(hit <= wanted <= union for hit, wanted, union in pairs):
        _fail(file, f"{at}.counts", "expected intersection <= target <= union", counts)


def _need(file: str, at: str, value: dict[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in value]
    if missing:
        raise ValueError(f"{file}: {at}{missing[0]}: the field is missing (missing: {', '.join(missing)})")


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _fail(file: str, field: str, expected: str, found: Any) -> None:
    raise ValueError(f"{file}: {field}: {expected}, found {repr(found)[:60]}")
