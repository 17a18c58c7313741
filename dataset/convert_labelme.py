"""LabelMe files (one JSON beside each picture) <-> the own format.

To us: polygons, rectangles, circles and masks; points are pixel corners (a pixel is inside if its centre
is), as everywhere here; shapes of one label with the same `group_id` are parts of one object. From us: one
polygon per part, parts of a mask share a `group_id`; what has holes becomes a shape of type `mask` (LabelMe
5.2 or newer).
"""

import base64
import binascii
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.base import UNREADABLE, DataError, Fault, picture_size
from dataset.converters import (
    MALFORMED,
    Converted,
    Per,
    Thing,
    as_mask,
    checked_fields,
    collect,
    finish,
    place_picture,
    query_fields,
    questions,
    read_own,
    told,
)
from dataset.generic import Picture
from dataset.masks import fill_rings, ring_array
from utils.geo import mask_polygons
from utils.io import StrPath, atomic_write_json, read_json

VERSION = "5.2.1"
"""Version of LabelMe's files that are written."""


def import_labelme(
    folder: StrPath, out: StrPath, per: Per = "label", link: bool = False, strict: bool = False
) -> Converted:
    """Write the own format from LabelMe's JSON files in a folder (and below it).

    Args:
        folder: JSON files; pictures where `imagePath` says, or inside the file (`imageData`).
        out: folder that gets annotations.json and the pictures (copies, or links with `link`).
        per: see `dataset.converters.Per`.
        strict: stop at anything unusable instead of leaving it out.

    Raises:
        ValueError: nothing usable, or (strict) anything unusable.
    """
    folder, out = Path(folder), Path(out)
    faults: list[Fault] = []

    def convert(path: Path) -> dict[str, Any] | None:
        body = read_json(path, dict)
        if not isinstance(body.get("shapes"), list):
            raise DataError(path, "shapes", f"expected a list, found {repr(body.get('shapes'))[:60]}")
        name = _place(path, body, folder, out, link)
        size = picture_size(out / name)
        masks = _shapes(path, body["shapes"], size, faults)
        found = []
        for entry in body["queries"] if isinstance(body.get("queries"), list) else ():
            query = checked_fields(entry) | {"masks": [masks.pop(("", key)).mask for key in entry["masks"]]}
            found.append(
                query | ({"ignore": masks.pop(("", entry["ignore"])).mask} if "ignore" in entry else {})
            )
        return {"file": name, "queries": found + questions(list(masks.values()), size, per)}

    images = collect(sorted(folder.rglob("*.json")), convert, faults, folder)
    return finish(out, images, faults, strict)


def export_labelme(folder: StrPath, out: StrPath, link: bool = False, strict: bool = False) -> Converted:
    """Write a LabelMe file beside a copy of (or link to) every picture of data in the own format."""
    folder, pictures, faults = read_own(folder, strict)
    out, files, count = Path(out), [], 0
    for picture in pictures:
        name = picture.path.relative_to(folder).as_posix()
        try:
            place_picture(picture.path, out, name, link)
        except DataError as error:
            faults.append(error.fault)
            continue
        file = (out / name).with_suffix(".json")
        if file in files:
            faults.append(Fault(str(picture.path), "", f"another picture is described by {file}"))
            continue
        files.append(atomic_write_json(file, _describe(picture)))
        count += len(picture.queries)
    return Converted(files, len(files), count, faults)


def _describe(picture: Picture) -> dict[str, Any]:
    """A LabelMe file; `queries` refer to shapes by their `group_id`."""
    shapes: list[dict[str, Any]] = []
    queries = []
    number = 0
    for query in picture.queries:
        stored: dict[str, Any] = query_fields(query) | {"masks": []}
        for mask in query.masks:
            number += 1
            shapes += _mask_shapes(as_mask(mask, picture.size), query.text, number)
            stored["masks"].append(number)
        if query.ignore is not None:
            number += 1
            shapes += _mask_shapes(as_mask(query.ignore, picture.size), "ignore", number)
            stored["ignore"] = number
        queries.append(stored)
    height, width = picture.size
    body = {"version": VERSION, "flags": {}, "shapes": shapes, "imagePath": picture.path.name}
    return body | {"imageData": None, "imageHeight": height, "imageWidth": width, "queries": queries}


def _mask_shapes(mask: np.ndarray, label: str, group: int) -> list[dict[str, Any]]:
    shared = {"label": label, "group_id": group, "description": "", "flags": {}}
    polygons = mask_polygons(mask)
    if polygons and all(len(polygon) == 1 for polygon in polygons):
        rings = [[list(point) for point in polygon[0]] for polygon in polygons]
        return [shared | {"shape_type": "polygon", "points": ring, "mask": None} for ring in rings]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, y0, x1, y1 = (columns[0], rows[0], columns[-1], rows[-1]) if len(rows) else (0, 0, 0, 0)
    packed = io.BytesIO()
    Image.fromarray(mask[y0 : y1 + 1, x0 : x1 + 1]).save(packed, "PNG")
    points = [[float(x0), float(y0)], [float(x1), float(y1)]]
    code = base64.b64encode(packed.getvalue()).decode("ascii")
    return [shared | {"shape_type": "mask", "points": points, "mask": code}]


# --------------------------------------------------------------------------------------------- reading


def _place(path: Path, body: dict[str, Any], folder: Path, out: Path, link: bool) -> str:
    """Put a file's picture into `out`; returns its name there."""
    given = body.get("imagePath")
    if not isinstance(given, str) or not given:
        raise DataError(path, "imagePath", f"expected the picture's path, found {repr(given)[:60]}")
    source = path.parent / given.replace("\\", "/")
    name = (path.parent.relative_to(folder) / source.name).as_posix()
    if source.is_file() or not body.get("imageData"):
        place_picture(source, out, name, link)
        return name
    try:
        data = base64.b64decode(body["imageData"], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except (binascii.Error, TypeError, *UNREADABLE) as error:
        raise DataError(
            path, "imageData", f"holds no picture ({error}), and {source} is not there"
        ) from error
    target = out / name
    if target.exists() and target.read_bytes() != data:
        raise DataError(path, "imagePath", f"another picture is at {target} already; choose an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    return name


def _shapes(
    path: Path, shapes: list[Any], size: tuple[int, int], faults: list[Fault]
) -> dict[tuple[str, Any], Thing]:
    """Objects by (label, group). Shapes of the groups that `queries` name are put under the label ""."""
    body = read_json(path, dict)
    named = set()
    for entry in body["queries"] if isinstance(body.get("queries"), list) else ():
        named |= {*entry["masks"], *([entry["ignore"]] if "ignore" in entry else [])}
    parts: dict[tuple[str, Any], list[np.ndarray]] = defaultdict(list)
    for number, shape in enumerate(shapes):
        field = f"shapes[{number}]"
        try:
            label, group = shape["label"], shape.get("group_id")
            if not isinstance(label, str) or not label.strip():
                raise ValueError(f"label: expected a text, found {repr(label)[:60]}")
            mask = _shape_mask(shape, size)
        except MALFORMED as error:
            faults.append(Fault(str(path), field, told(error)))
            continue
        key = ("", group) if group in named else (label.strip(), field if group is None else group)
        parts[key].append(mask)
    empty = {("", group): [np.zeros(size, bool)] for group in named}
    found = {}
    for key, masks in (empty | parts).items():
        found[key] = Thing(key[0], np.logical_or.reduce(masks), key[0].lower() == "ignore")
    return found


def _shape_mask(shape: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    kind = shape.get("shape_type") or "polygon"
    if kind == "mask":
        (x0, y0), (x1, y1) = (map(int, point) for point in shape["points"])
        try:
            with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as image:
                part = np.asarray(image.convert("L")) != 0
        except (binascii.Error, *UNREADABLE) as error:
            raise ValueError(f"mask: holds no picture ({error})") from error
        if part.shape != (y1 + 1 - y0, x1 + 1 - x0) or min(x0, y0) < 0 or x1 >= size[1] or y1 >= size[0]:
            raise ValueError(
                f"mask: {part.shape[1]}x{part.shape[0]} pixels do not fit points {shape['points']}"
            )
        mask = np.zeros(size, bool)
        mask[y0 : y1 + 1, x0 : x1 + 1] = part
        return mask
    points = ring_array(shape["points"], least=2 if kind in ("rectangle", "circle") else 3)
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    elif kind == "circle":
        (x, y), (a, b) = points[:2]
        rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
        return (columns - x) ** 2 + (rows - y) ** 2 <= (a - x) ** 2 + (b - y) ** 2
    elif kind != "polygon":
        raise ValueError(f"shape_type: {kind!r} has no area; polygon, rectangle, circle and mask are read")
    return fill_rings([points], *size)
