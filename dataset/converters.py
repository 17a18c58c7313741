"""Other people's annotation formats <-> the own format (`annotations.json` beside pictures;
dataset/README.md).

Here is what all converters share; `convert_coco.py`, `convert_labelme.py` and `convert_geo.py` hold one
format each. Converting there and back gives the same questions and the same masks, pixel by pixel. What our
format knows and the other does not (questions about absent things, answers, ...) travels in a member
`queries` of the other file.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataset.base import DataError, Fault, settle
from dataset.generic import Picture, Query, read_annotations, write_annotations
from dataset.masks import IGNORE, Raster, mask_from_json
from utils.io import StrPath, atomic_write_bytes
from utils.rle import encode_mask

Per = Literal["label", "object"]
"""What becomes a question: all objects of one label in a picture together, or every object by itself."""
FORMATS = ("coco", "labelme", "geo", "gres")
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, OSError)
"""What reading entries of a foreign file may raise where values are missing or of other types."""


def told(error: Exception) -> str:
    """An error in words; errors that are not ours get their kind before them."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


@dataclass
class Converted:
    """What a conversion wrote: files, numbers of pictures and questions, and what had to be left out."""

    files: list[Path]
    pictures: int
    queries: int
    faults: list[Fault] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The result in words."""
        shown = ", ".join(map(str, self.files[:3])) + (", ..." if len(self.files) > 3 else "")
        lines = [f"{self.pictures} pictures with {self.queries} questions -> {shown}"]
        return lines + [f"left out: {fault}" for fault in self.faults]


@dataclass(frozen=True)
class Thing:
    """One labelled object of a foreign file: bool mask (H, W) or a mask of the own format; `ignore` regions
    do not count in questions about `label`."""

    label: str
    mask: Any
    ignore: bool = False


def questions(things: Iterable[Thing], size: tuple[int, int], per: Per) -> list[dict[str, Any]]:
    """Questions of the own format about a picture of (H, W) with these objects, in their order.

    A question about a label has one mask, the union of its objects; regions to ignore join the questions
    about their label. Objects without any pixel are left out. Only one mask per label is held unpacked.
    """
    if per not in ("label", "object"):
        raise ValueError(f"questions per {per!r} are unknown; choose label or object")
    ignored: dict[str, np.ndarray] = {}
    unions: dict[str, np.ndarray] = {}
    objects: list[tuple[str, Any]] = []
    for thing in things:
        mask = as_mask(thing.mask, size)
        if thing.ignore or (per == "label" and mask.any()):
            kept = ignored if thing.ignore else unions
            kept[thing.label] = kept[thing.label] | mask if thing.label in kept else mask
        elif mask.any():
            objects.append((thing.label, encode_mask(mask)))
    found = []
    for label, mask in [*unions.items(), *objects]:
        query: dict[str, Any] = {"text": label, "exists": True, "masks": [mask]}
        rest = ignored[label] & ~as_mask(mask, size) if label in ignored else None
        found.append(query | ({"ignore": rest} if rest is not None and rest.any() else {}))
    return found


def as_mask(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """bool (H, W) of an array or a mask of the own format. ValueError if it is none or has another size."""
    if isinstance(mask, np.ndarray):
        if mask.shape != tuple(size):
            raise ValueError(f"a mask of {mask.shape} pixels for a picture of {tuple(size)}")
        return mask != 0
    return mask_from_json(mask, *size) == 1


def query_fields(query: Query) -> dict[str, Any]:
    """A question of the own format without its masks, as JSON values."""
    fields: dict[str, Any] = {"text": query.text, "kind": query.kind, "exists": query.exists}
    fields |= {"is_sentence": query.is_sentence, "answer": query.answer, "question": query.question}
    return {name: value for name, value in fields.items() if value not in (None, "")}


def checked_fields(entry: Any) -> dict[str, Any]:
    """The members that `query_fields` wrote, of an entry that also holds others. ValueError without a
    text."""
    names = ("text", "kind", "exists", "is_sentence", "answer", "question")
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str) or not entry["text"].strip():
        raise ValueError(f"expected a question with a text, found {repr(entry)[:60]}")
    return {name: entry[name] for name in names if entry.get(name) is not None}


def read_own(folder: StrPath, strict: bool) -> tuple[Path, list[Picture], list[Fault]]:
    """Folder, pictures and faults of data in the own format (a folder or its annotations.json)."""
    path = Path(folder)
    pictures, faults = read_annotations(path)
    settle(faults, strict, str(path))
    return (path if path.is_dir() else path.parent), pictures, faults


def finish(
    out: StrPath, images: Sequence[dict[str, Any]], faults: Sequence[Fault], strict: bool
) -> Converted:
    """Write the own format's file and check that it can be read. ValueError if nothing is left, or (strict)
    any fault."""
    settle(faults, strict, str(out))
    images = [image for image in images if image["queries"]]
    if not images:
        reasons = "".join(f"\n  {fault}" for fault in faults[:5])
        raise ValueError(f"{out}: no picture with a usable question is left{reasons}")
    path = write_annotations(out, images)
    usable, unusable = read_annotations(path)
    settle(unusable, strict, str(path))
    if not usable:
        raise ValueError(f"{path}: no question in it can be used; the first fault: {unusable[0]}")
    count = sum(len(picture.queries) for picture in usable)
    return Converted([path], len(usable), count, [*faults, *unusable])


def place_picture(source: Path, out: Path, name: str, link: bool = False) -> None:
    """Put a picture at `out`/`name` (a copy, or a link to it) unless it is there already.

    Raises:
        DataError: the name leads out of the folder, the picture is absent, or another one is there.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts or not name:
        raise DataError(source, "", f"the name {name!r} leads out of the folder")
    if not source.is_file():
        raise DataError(source, "", "picture is not there")
    target = out / name
    if target.exists() and (target.samefile(source) or target.read_bytes() == source.read_bytes()):
        return
    if target.exists() or target.is_symlink():
        raise DataError(source, "", f"another picture is at {target} already; choose an empty folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        os.symlink(source.resolve(), target)
    else:
        atomic_write_bytes(target, source.read_bytes())
        shutil.copystat(source, target)


def collect(
    items: Iterable[Any], convert: Callable[[Any], Any], faults: list[Fault], file: StrPath
) -> list[Any]:
    """`convert` of every item; what raises is added to the faults and left out. `None` is left out
    silently."""
    found = []
    for number, item in enumerate(items):
        try:
            value = convert(item)
        except DataError as error:
            faults.append(error.fault)
        except MALFORMED as error:
            faults.append(Fault(str(file), f"[{number}]", told(error)))
        else:
            if value is not None:
                found.append(value)
    return found


def import_gres(
    root: StrPath,
    name: str,
    split: str,
    out: StrPath,
    raster: Raster = "exact",
    link: bool = False,
    strict: bool = False,
) -> Converted:
    """Write the own format from a GRES or ReasonSeg split (`dataset.gres.find_split`): a question per text,
    and one per false premise. `raster` decides how polygons are filled."""
    from dataset.gres import Entry, find_split, read_split

    entries, faults = read_split(find_split(root, name, split), only_beside=name == "ReasonSeg")

    def convert(entry: Entry) -> dict[str, Any]:
        annotation, file = entry.annotation, entry.image_path.name
        place_picture(entry.image_path, Path(out), file, link)
        mask = annotation.mask(*entry.size, raster)
        masks = [mask == 1] if annotation.has_target else []
        shared = {"exists": bool(masks), "is_sentence": annotation.is_sentence, "kind": "reason"}
        ignore = {"ignore": mask == IGNORE} if (mask == IGNORE).any() else {}
        queries = [shared | {"text": text, "masks": list(masks)} | ignore for text in annotation.texts]
        for premise in annotation.false_premises:
            fields = {"text": premise.question, "exists": False, "masks": [], "answer": premise.answer}
            queries.append(fields | {"is_sentence": premise.is_sentence, "kind": "false premise"})
        return {"file": file, "queries": queries}

    return finish(out, collect(entries, convert, faults, root), faults, strict)
