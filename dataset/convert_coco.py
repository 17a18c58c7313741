"""COCO instance annotations <-> the own format.

To us: polygons are filled by COCO's own rule (pycocotools), run-length codes are taken as they are;
`iscrowd` regions are ignored in questions about their category. A question's text is the category's name, or
an annotation's `text` or `caption` where it has one. From us: run-length codes, one annotation per mask; the
category is the question's text.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from dataset.base import DataError, Fault, picture_size
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
from utils.io import StrPath, atomic_write_json, read_json
from utils.rle import decode_mask, encode_mask


def import_coco(
    file: StrPath,
    pictures: StrPath,
    out: StrPath,
    per: Per = "label",
    link: bool = False,
    strict: bool = False,
) -> Converted:
    """Write the own format from a COCO JSON file.

    Args:
        file: with `images`, `annotations` and `categories`.
        pictures: folder that the `file_name`s are relative to.
        out: folder that gets annotations.json and the pictures (copies, or links with `link`).
        per: see `dataset.converters.Per`.
        strict: stop at anything unusable instead of leaving it out.

    Raises:
        ValueError: no such file, not COCO, nothing usable in it, or (strict) anything unusable.
    """
    body = read_json(file, dict)
    for name in ("images", "annotations", "categories"):
        if not isinstance(body.get(name), list):
            raise ValueError(f"{file}: {name}: expected a list, found {repr(body.get(name))[:60]}")
    faults: list[Fault] = []
    labels = dict(collect(body["categories"], _category, faults, f"{file}: categories"))
    annotations = _by_image(body["annotations"])
    stored = _by_image(body["queries"] if isinstance(body.get("queries"), list) else [])

    def convert(image: Any) -> dict[str, Any]:
        name, key = image["file_name"], image["id"]
        place_picture(Path(pictures) / name, Path(out), name, link)
        size = picture_size(Path(out) / name)
        if (image.get("height", size[0]), image.get("width", size[1])) != size:
            raise DataError(
                file,
                name,
                f"is {image.get('width')}x{image.get('height')} in the file, {size[1]}x{size[0]} on disk",
            )
        found: list[dict[str, Any]] = []
        rest: list[Thing] = []
        known = {entry["query"]: {**checked_fields(entry), "masks": {}} for _, entry in stored.get(key, ())}
        for number, entry in annotations.get(key, ()):
            try:
                mask = _mask(entry, size)
                query = known.get(entry.get("query"))
                if query is None:
                    label = entry.get("text") or entry.get("caption") or labels[entry["category_id"]]
                    rest.append(Thing(label, mask, bool(entry.get("iscrowd"))))
                elif entry.get("iscrowd"):
                    query["ignore"] = mask
                else:
                    query["masks"][entry["mask"]] = mask
            except MALFORMED as error:
                faults.append(Fault(str(file), f"annotations[{number}]", told(error)))
        for query in known.values():
            found.append(query | {"masks": [query["masks"][number] for number in sorted(query["masks"])]})
        return {"file": name, "queries": found + questions(rest, size, per)}

    for number, _ in annotations.get(None, ()):
        faults.append(Fault(str(file), f"annotations[{number}]", "names no picture (image_id)"))
    images = collect(body["images"], convert, faults, f"{file}: images")
    return finish(out, images, faults, strict)


def export_coco(folder: StrPath, file: StrPath, strict: bool = False) -> Converted:
    """Write data in the own format as a COCO JSON file; `file_name`s are relative to `folder`.

    The member `queries` holds what COCO has no place for; annotations name their question (`query`) and
    their number in its answer (`mask`). Regions to ignore are `iscrowd` annotations.
    """
    folder, pictures, faults = read_own(folder, strict)
    categories: dict[str, int] = {}
    body: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [], "queries": []}
    for image_id, picture in enumerate(pictures, start=1):
        height, width = picture.size
        name = picture.path.relative_to(folder).as_posix()
        body["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for number, query in enumerate(picture.queries):
            category = categories.setdefault(query.text, len(categories) + 1)
            body["queries"].append({"image_id": image_id, "query": number, **query_fields(query)})
            for entry in _annotations(picture, number):
                entry |= {"id": len(body["annotations"]) + 1, "image_id": image_id, "category_id": category}
                body["annotations"].append(entry)
    body["categories"] = [{"id": number, "name": name} for name, number in categories.items()]
    path = atomic_write_json(file, body, indent=None)
    return Converted([path], len(pictures), len(body["queries"]), faults)


def _annotations(picture: Picture, number: int) -> list[dict[str, Any]]:
    query = picture.queries[number]
    masks = [(k, as_mask(mask, picture.size), 0) for k, mask in enumerate(query.masks)]
    if query.ignore is not None:
        masks.append((-1, as_mask(query.ignore, picture.size), 1))
    entries = []
    for k, mask, crowd in masks:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [0, 0, 0, 0]
        if len(rows):
            x, y = int(columns[0]), int(rows[0])
            box = [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
        entry = {"segmentation": encode_mask(mask), "area": int(mask.sum()), "bbox": box, "iscrowd": crowd}
        entries.append(entry | {"query": number, "mask": k})
    return entries


def _by_image(entries: list[Any]) -> dict[Any, list[tuple[int, Any]]]:
    """Picture id -> (place in the file, entry); what names no picture is under None."""
    found = defaultdict(list)
    for number, entry in enumerate(entries):
        key = entry.get("image_id") if isinstance(entry, dict) else None
        found[key if isinstance(key, int | str) else None].append((number, entry))
    return found


def _category(entry: Any) -> tuple[int, str]:
    if not isinstance(entry["name"], str) or not entry["name"].strip():
        raise ValueError(f"name: expected a text, found {repr(entry['name'])[:60]}")
    return entry["id"], entry["name"].strip()


def _mask(entry: Any, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W) of an annotation's segmentation."""
    from pycocotools import mask as coco

    found = entry.get("segmentation")
    if isinstance(found, dict):
        return decode_mask(found, size)
    if not isinstance(found, list) or not found:
        raise ValueError("segmentation: empty; a box alone is no mask")
    for ring in found:
        good = isinstance(ring, list) and len(ring) >= 6 and len(ring) % 2 == 0
        if not good or not all(
            isinstance(v, int | float) and math.isfinite(v) and abs(v) < 1e6 for v in ring
        ):
            raise ValueError(f"segmentation: expected [x, y, x, y, x, y, ...], found {repr(ring)[:60]}")
    codes = coco.frPyObjects([[float(v) for v in ring] for ring in found], *size)
    return coco.decode(coco.merge(codes)).astype(bool)
