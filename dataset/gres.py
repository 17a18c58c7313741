"""GRES and ReasonSeg: one LabelMe-like JSON file per picture (fields: dataset/README.md).

Folder layouts, both found by `find_split`:
* loader's:   `reason_seg/<name>/<split>/` with JSON files and pictures side by side;
* GRES's own: `gres_annotations/<split>/*.json` (+ `<split>.txt`) and `gres_images/<split>/` (or hyphens).
"""

import json
import logging
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.base import ConversationData, DataError, Fault, ReadOptions, picture_size
from dataset.draws import Draws, Rng
from dataset.image import load_rgb
from dataset.index import Chosen, Inputs, Listing, indexed
from dataset.masks import Raster, Shape, check_raster, rasterise, ring_array, touches
from dataset.sample import Conversation, Sample
from dataset.templates import Pick
from dataset.text import IMAGE_TOKEN, SEG_TOKEN
from utils.io import StrPath, is_text, is_there, parse_json

logger = logging.getLogger(__name__)

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


@dataclass(frozen=True)
class FalsePremise:
    """A question about something that is not there, and the stored answer."""

    question: str
    is_sentence: bool
    answer: str


@dataclass(frozen=True)
class Annotation:
    """Content of one JSON file."""

    texts: tuple[str, ...]
    is_sentence: bool
    shapes: tuple[Shape, ...]
    false_premises: tuple[FalsePremise, ...] = ()
    image_name: str | None = None

    @property
    def has_target(self) -> bool:
        """Whether any shape is a target (neither flag nor ignore)."""
        return any(not shape.is_flag and shape.value == 1 for shape in self.shapes)

    def mask(self, height: int, width: int, raster: Raster = "official") -> np.ndarray:
        """uint8 (H, W): 1 target, 255 ignore (see `dataset.masks.rasterise`)."""
        return rasterise(self.shapes, height, width, raster)


@dataclass(frozen=True)
class SplitFolders:
    """Where the JSON files and pictures of a split lie, and its list file if there is one."""

    annotations: Path
    pictures: Path
    list_file: Path | None = None


# ------------------------------------------------------------------------------------------------- a file


def read_annotation(path: StrPath) -> Annotation:
    """Read and check one JSON file (UTF-8, else Windows-1252).

    Raises:
        DataError: names the file, the field and what was found there.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(path, "", f"cannot be read ({error.strerror})") from error
    return parse_annotation(data, path)


def parse_annotation(data: bytes, source: StrPath) -> Annotation:
    """Annotation from the bytes of a JSON file; `source` names it in errors (DataError)."""
    body = _decode(data, source)
    if not isinstance(body, dict):
        raise DataError(source, "", f"expected an object at the top level, found {type(body).__name__}")
    for field in ("text", "is_sentence", "shapes"):
        if field not in body:
            raise DataError(source, field, "the field is missing")
    texts, shapes = body["text"], body["shapes"]
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(is_text(text) for text in texts):
        raise DataError(source, "text", f"expected a list of non-empty texts, found {_short(texts)}")
    if not texts:
        raise DataError(source, "text", "the list is empty; at least one query is needed")
    for token in (SEG_TOKEN, IMAGE_TOKEN):
        if any(token in text for text in texts):
            raise DataError(source, "text", f"{token} may not stand in a question")
    if not isinstance(shapes, list):
        raise DataError(source, "shapes", f"expected a list, found {_short(shapes)}")
    return Annotation(
        tuple(texts),
        _flag(body["is_sentence"], source, "is_sentence"),
        tuple(_shape(shape, source, f"shapes[{number}]") for number, shape in enumerate(shapes)),
        tuple(_false_premises(body.get("false_premise_QA"), source)),
        _image_name(shapes, source),
    )


def _decode(data: bytes, source: StrPath) -> Any:
    try:
        return parse_json(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(source, "", f"not valid JSON at {where}: {error.msg}") from error
    except UnicodeDecodeError:
        pass
    except ValueError as error:
        raise DataError(source, "", f"not usable JSON: {error}") from error
    try:
        return parse_json(data.decode("cp1252"))
    except ValueError as error:
        raise DataError(source, "", f"neither UTF-8 nor Windows-1252 JSON: {error}") from error


def _shape(shape: Any, source: StrPath, field: str) -> Shape:
    if not isinstance(shape, dict):
        raise DataError(source, field, f"expected an object, found {_short(shape)}")
    for key in ("label", "points"):
        if key not in shape:
            raise DataError(source, f"{field}.{key}", "the field is missing")
    if not is_text(shape["label"]):
        raise DataError(source, f"{field}.label", f"expected a text, found {_short(shape['label'])}")
    try:
        points = ring_array(shape["points"], least=1)
    except ValueError as error:
        raise DataError(source, f"{field}.points", str(error)) from error
    return Shape(shape["label"], points)


def _false_premises(entries: Any, source: StrPath) -> Iterator[FalsePremise]:
    entries = [] if entries is None or entries == {} else entries
    if not isinstance(entries, list):
        raise DataError(source, "false_premise_QA", f"expected a list, found {_short(entries)}")
    for number, entry in enumerate(entries):
        field = f"false_premise_QA[{number}]"
        if not isinstance(entry, list) or len(entry) != 3:
            raise DataError(source, field, f"expected [question, is_sentence, answer], found {_short(entry)}")
        question, is_sentence, answer = entry
        if not is_text(question) or not is_text(answer):
            raise DataError(source, field, f"question and answer must be texts, found {_short(entry)}")
        if SEG_TOKEN in question + answer or IMAGE_TOKEN in question + answer:
            raise DataError(source, field, f"{SEG_TOKEN} and {IMAGE_TOKEN} may not stand in a false premise")
        yield FalsePremise(question, _flag(is_sentence, source, f"{field}[1]"), answer)


def _flag(value: Any, source: StrPath, field: str) -> bool:
    if not isinstance(value, bool) and value not in (0, 1):
        raise DataError(source, field, f"expected true or false, found {_short(value)}")
    return bool(value)


def _image_name(shapes: list[Any], source: StrPath) -> str | None:
    """Picture name; the published reader takes it from the first shape."""
    name = shapes[0].get("image_name") if shapes else None
    if name is not None and not is_text(name, empty=True):
        raise DataError(source, "shapes[0].image_name", f"expected a file name, found {_short(name)}")
    return name or None


def _short(value: Any) -> str:
    return repr(value)[:60]


# ----------------------------------------------------------------------------------------------- a folder


def find_split(root: StrPath, name: str, split: str, list_file: StrPath | None = None) -> SplitFolders:
    """Folders of a split in either layout.

    Args:
        root: the data folder (or the data set's own folder).
        name: `GeoReasonSeg` or `ReasonSeg` (or any folder name of yours).
        split: `train`, `val`, `test`, `large`, ...
        list_file: replaces the list file that the layout brings.

    Raises:
        ValueError: neither layout is there; lists the places looked at.
    """
    root = Path(root)
    given = Path(list_file) if list_file else None
    beside = [root / "reason_seg" / name / split, root / name / split, root / split]
    for folder in beside:
        if folder.is_dir():
            return SplitFolders(folder, folder, given)
    looked = [str(folder) for folder in beside]
    for base in (root, root / "reason_seg" / name, root / name, root / "GRES"):
        for gap in "_-":
            folder = base / f"gres{gap}annotations" / split
            looked.append(str(folder))
            if folder.is_dir():
                own = folder / f"{split}.txt"
                pictures = [base / f"gres{other}images" / split for other in "_-"]
                there = [path for path in pictures if path.is_dir()]
                return SplitFolders(folder, (there or pictures)[0], given or (own if own.is_file() else None))
    raise ValueError(f"{name}|{split} is not in {root}; looked for the folders {', '.join(looked)}")


def read_names(path: StrPath) -> list[str]:
    """Stems named in a list file (`#` starts a comment line), once each, in order; repetitions are told."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"list file {path} cannot be read ({error})") from error
    names = [Path(line.strip()).name for line in lines if line.strip() and not line.startswith("#")]
    names = [Path(n).stem if Path(n).suffix.lower() in (".json", *PICTURE_ENDINGS) else n for n in names]
    unique = list(dict.fromkeys(names))
    if len(unique) < len(names):
        logger.warning(
            "%s repeats %d of %d entries; each is used once", path, len(names) - len(unique), len(names)
        )
    return unique


@dataclass(frozen=True)
class Entry:
    """One usable picture: its files, annotation, and size (H, W)."""

    json_path: Path
    image_path: Path
    annotation: Annotation
    size: tuple[int, int]


def read_split(folders: SplitFolders, only_beside: bool = False) -> tuple[list[Entry], list[Fault]]:
    """All usable entries of a split, sorted by name, and the faults of the others.

    Args:
        folders: from `find_split`.
        only_beside: ReasonSeg's rule: the picture has the JSON's own stem, whatever `image_name` says.
    """
    paths = sorted(folders.annotations.glob("*.json"))
    faults: list[Fault] = []
    if folders.list_file is not None:
        names = read_names(folders.list_file)
        known = {path.stem for path in paths}
        faults += [
            Fault(str(folders.list_file), name, f"{folders.annotations / name}.json is not there")
            for name in names
            if name not in known
        ]
        wanted = set(names)
        paths = [path for path in paths if path.stem in wanted]
    entries = []
    for path in paths:
        try:
            entries.append(_entry(path, folders.pictures, only_beside))
        except DataError as error:
            faults.append(error.fault)
    return entries, faults


def _entry(path: Path, pictures: Path, only_beside: bool) -> Entry:
    annotation = read_annotation(path)
    if annotation.image_name and not only_beside:
        picture = pictures / annotation.image_name
        if Path(annotation.image_name).is_absolute() or ".." in Path(annotation.image_name).parts:
            raise DataError(
                path, "shapes[0].image_name", f"{annotation.image_name!r} leads out of the folder"
            )
        if not is_there(picture):
            raise DataError(path, "shapes[0].image_name", f"picture {picture} is not there")
    else:
        found = [picture for e in PICTURE_ENDINGS if (picture := pictures / (path.stem + e)).is_file()]
        if not found:
            raise DataError(path, "", f"no picture {pictures / path.stem}.jpg beside it")
        picture = found[0]
    size = picture_size(picture)
    for number, shape in enumerate(annotation.shapes):
        if not shape.is_flag and not touches(shape.points, *size):
            (x0, y0), (x1, y1) = shape.points.min(axis=0), shape.points.max(axis=0)
            message = f"polygon reaches ({x0:g}, {y0:g}, {x1:g}, {y1:g}), all of it outside picture "
            message += f"{picture.name} of {size[1]}x{size[0]} pixels"
            raise DataError(path, f"shapes[{number}].points", message)
    return Entry(path, picture, annotation, size)


def open_split(folders: SplitFolders, only_beside: bool, index: str, root: StrPath) -> Listing:
    """`read_split` behind an index (`dataset.index.indexed`).

    Returns:
        Entries, and the fact "without_target": [place, file] of those that have none.
    """

    def build() -> Listing:
        entries, faults = read_split(folders, only_beside)
        empty = [[n, str(e.json_path)] for n, e in enumerate(entries) if not e.annotation.has_target]
        return Listing(entries, {"without_target": empty}, faults)

    files = (folders.list_file,) if folders.list_file else ()
    inputs = Inputs(files, tuple(dict.fromkeys((folders.annotations, folders.pictures))))
    name = f"gres-{folders.annotations.parent.name}-{folders.annotations.name}"
    return indexed(name, inputs, build, index, root, _stored, _restored, only_beside=only_beside)


def _stored(entry: Entry) -> dict[str, Any]:
    """An entry as JSON values."""
    annotation = entry.annotation
    return {
        "json": str(entry.json_path),
        "image": str(entry.image_path),
        "size": list(entry.size),
        "texts": list(annotation.texts),
        "is_sentence": annotation.is_sentence,
        "shapes": [[shape.label, shape.points.tolist()] for shape in annotation.shapes],
        "false_premises": [[p.question, p.is_sentence, p.answer] for p in annotation.false_premises],
        "image_name": annotation.image_name,
    }


def _restored(item: dict[str, Any]) -> Entry:
    annotation = Annotation(
        tuple(item["texts"]),
        item["is_sentence"],
        tuple(Shape(label, np.array(points, np.float64).reshape(-1, 2)) for label, points in item["shapes"]),
        tuple(FalsePremise(*premise) for premise in item["false_premises"]),
        item["image_name"],
    )
    return Entry(Path(item["json"]), Path(item["image"]), annotation, tuple(item["size"]))


# ----------------------------------------------------------------------------------------------- data set


class GresData(ConversationData):
    """GRES / ReasonSeg splits as samples.

    Training: up to `num_per_image` of a picture's texts, all with the picture's mask. With `false_premise`, a
    picture that has false premises is asked only those with probability `absent_rate`. Evaluation: the first
    text (or all), and the first false premise with an empty target. A file without any target shape is
    reported and skipped; `keep_empty` makes it an empty target in evaluation.

    Args:
        root, name, splits: see `find_split`; several splits are joined with an underscore (`train_val`).
        options: see `ReadOptions`.
        false_premise: draw false premises in training (default: only for the name ReasonSeg).
    """

    published = True

    def __init__(
        self,
        root: StrPath,
        name: str,
        splits: str,
        options: ReadOptions,
        false_premise: bool | None = None,
    ) -> None:
        super().__init__(f"{name}|{splits}", options)
        check_raster(options.raster)
        self.false_premise = name == "ReasonSeg" if false_premise is None else false_premise
        self.entries = Chosen()
        for folders in _split_folders(root, name, splits, options.list_file):
            listing = open_split(folders, name == "ReasonSeg", options.index, root)
            empty = {} if options.keep_empty and not options.train else dict(listing.facts["without_target"])
            message = "no target shape (keep_empty keeps such files in evaluation)"
            self.faults += [*listing.faults, *(Fault(file, "shapes", message) for file in empty.values())]
            self.entries.add(listing.items, [n for n in range(len(listing.items)) if n not in empty])
        self._settle()

    def __len__(self) -> int:
        return len(self.entries)

    def _sample(self, index: int, rng: Rng) -> Sample:
        entry = self.entries[index]
        image = load_rgb(entry.image_path)
        mask = self._ignore(entry.annotation.mask(*image.shape[:2], self.options.raster), default=False)[None]
        build = self._train_conversations if self.options.train else self._eval_conversations
        conversations = build(entry, mask, rng)
        published_slip = self.options.train and isinstance(rng, random.Random)
        for number, conversation in enumerate(conversations):
            conversation.ref_id = len(conversations) - 1 if published_slip else index
            conversation.sent_id = number
        return Sample(str(entry.image_path), image, conversations)

    def _train_conversations(self, entry: Entry, mask: np.ndarray, rng: Rng) -> list[Conversation]:
        annotation, draws, count = entry.annotation, Draws(rng), self.options.num_per_image
        premises = annotation.false_premises
        denies = (
            (premises or draws.official) and self.false_premise and draws.chance(self.options.absent_rate)
        )
        texts = draws.choose(annotation.texts, count)
        chosen = draws.choose(premises, count) if denies else []
        if chosen:
            nothing = np.zeros((0, *mask.shape[1:]), np.uint8)
            return [self._false(premise, nothing, draws) for premise in chosen]
        return [self._true(annotation, text, mask, draws) for text in texts]

    def _eval_conversations(self, entry: Entry, mask: np.ndarray, rng: Rng) -> list[Conversation]:
        annotation = entry.annotation
        texts = annotation.texts if self.options.all_texts else annotation.texts[:1]
        conversations = []
        for number, text in enumerate(texts):
            pick = self._pick(f"{entry.json_path.name}:{number}", rng)
            conversations.append(self._true(annotation, text, mask, pick))
        for number, premise in enumerate(annotation.false_premises[:1]):
            pick = self._pick(f"{entry.json_path.name}:absent:{number}", rng)
            nothing = np.zeros((0 if self._mask_per_seg else 1, *mask.shape[1:]), np.uint8)
            conversations.append(self._false(premise, nothing, pick))
        return conversations

    def _true(self, annotation: Annotation, text: str, mask: np.ndarray, pick: Pick | Draws) -> Conversation:
        question = self.templates.question(text, annotation.is_sentence, pick)
        answer = pick(self.templates.long_answer) if self._mask_per_seg else ""
        turns = [(question, answer)] if self.options.train else self._eval_turns(question, answer)
        return Conversation(turns, mask, query=text, exists=annotation.has_target, kind="reason")

    def _false(self, premise: FalsePremise, masks: np.ndarray, pick: Pick | Draws) -> Conversation:
        question = self.templates.question(premise.question, premise.is_sentence, pick, lower=False)
        train = self.options.train
        turns = [(question, premise.answer)] if train else self._eval_turns(question, premise.answer)
        return Conversation(turns, masks, query=premise.question, exists=False, kind="false premise")


def _split_folders(root: StrPath, name: str, splits: str, list_file: str | None) -> list[SplitFolders]:
    """Folders of `splits`: one folder of that name, or several names joined with underscores."""
    try:
        return [find_split(root, name, splits, list_file)]
    except ValueError:
        if "_" not in splits:
            raise
        return [find_split(root, name, split, list_file) for split in splits.split("_")]


def target_extent(annotation: Annotation) -> tuple[float, float, float, float] | None:
    """(x0, y0, x1, y1) around all shapes of a file; None without shapes."""
    points = [shape.points for shape in annotation.shapes if not shape.is_flag]
    if not points:
        return None
    low, high = np.concatenate(points).min(axis=0), np.concatenate(points).max(axis=0)
    return tuple(float(v) for v in (*low, *high)) if math.isfinite(high.sum()) else None
