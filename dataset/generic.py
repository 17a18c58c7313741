"""The project's own format: one `annotations.json` per split beside its pictures (fields: dataset/README.md).

{"images": [{"file": "pictures/0001.png", "queries": [
    {"text": "the red ship", "kind": "attribute", "exists": true, "masks": [RLE or polygon, ...]},
    {"text": "Where could one swim?", "exists": false, "masks": [], "answer": "Nowhere here."}]}]}
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset.base import ConversationData, DataError, Fault, ReadOptions, picture_size
from dataset.image import load_rgb
from dataset.masks import IGNORE, check_mask, mask_from_json
from dataset.sample import Conversation, Sample
from dataset.templates import Pick
from dataset.text import IMAGE_TOKEN, SEG_TOKEN
from utils.io import StrPath, atomic_write_text, is_text, is_there, read_json, to_json
from utils.rle import encode_mask

FILE_NAME = "annotations.json"
_QUERY_FIELDS = {"text", "kind", "exists", "masks", "ignore", "answer", "question", "is_sentence"}


@dataclass(frozen=True)
class Query:
    """One question of a picture, as stored.

    text: noun phrase, or a whole sentence (`is_sentence`; by default: ends with `.`, `?` or `!`).
    exists: whether the picture shows it. masks: undecoded, one per `[SEG]` of the answer.
    kind: label for score tables. answer, question: replace the templates; `ignore`: undecoded mask of pixels
    that do not count.
    """

    text: str
    exists: bool
    masks: tuple[Any, ...]
    kind: str = ""
    is_sentence: bool = False
    answer: str | None = None
    question: str | None = None
    ignore: Any = None

    @property
    def is_text_only(self) -> bool:
        """Whether it is answered in words alone (something exists, no mask is stored)."""
        return self.exists and not self.masks

    def decode(self, height: int, width: int) -> np.ndarray:
        """uint8 (K, H, W) with 0, 1 and 255: one mask per stored one."""
        masks = np.zeros((len(self.masks), height, width), np.uint8)
        for number, stored in enumerate(self.masks):
            masks[number] = mask_from_json(stored, height, width)
        masks[:, self._ignored(height, width)] = IGNORE
        return masks

    def target(self, height: int, width: int) -> np.ndarray:
        """Union of the masks, uint8 (1, H, W) with 0, 1 and 255; nothing but 0 and 255 without masks."""
        union = np.zeros((1, height, width), np.uint8)
        for mask in self.decode(height, width):
            union[0] |= mask == 1
        union[:, self._ignored(height, width)] = IGNORE
        return union

    def _ignored(self, height: int, width: int) -> np.ndarray:
        if self.ignore is None:
            return np.zeros((height, width), bool)
        return mask_from_json(self.ignore, height, width) == 1


@dataclass(frozen=True)
class Picture:
    """One picture with its questions; `size` (H, W)."""

    path: Path
    size: tuple[int, int]
    queries: tuple[Query, ...]


# ---------------------------------------------------------------------------------------------- the file


def read_annotations(path: StrPath) -> tuple[list[Picture], list[Fault]]:
    """Usable pictures and questions of an `annotations.json` (or its folder), and the faults of the others.

    Raises:
        ValueError: no file, no JSON, or no list `images`.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    images = read_json(path, dict).get("images")
    if not isinstance(images, list):
        raise ValueError(f"{path}: images: expected a list of pictures, found {repr(images)[:60]}")
    pictures: list[Picture] = []
    faults: list[Fault] = []
    first: dict[Path, str] = {}
    for number, entry in enumerate(images):
        field = f"images[{number}]"
        try:
            picture, bad = _picture(entry, path, field)
            if first.setdefault(picture.path, field) != field:
                message = (
                    f"picture {entry['file']} is listed in {first[picture.path]} too; join their queries"
                )
                raise DataError(path, f"{field}.file", message)
            pictures.append(picture)
            faults += bad
        except DataError as error:
            faults.append(error.fault)
    return pictures, faults


def _picture(entry: Any, source: Path, field: str) -> tuple[Picture, list[Fault]]:
    if not isinstance(entry, dict):
        raise DataError(source, field, f"expected an object, found {repr(entry)[:60]}")
    name = entry.get("file")
    if not is_text(name):
        raise DataError(source, f"{field}.file", f"expected the picture's path, found {repr(name)[:60]}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(source, f"{field}.file", f"{name!r} must be a path inside the annotation's folder")
    if not is_there(source.parent / name):
        raise DataError(source, f"{field}.file", f"picture {source.parent / name} is not there")
    try:
        size = picture_size(source.parent / name)
    except DataError as error:
        raise DataError(source, f"{field}.file", f"{source.parent / name}: {error.fault.message}") from error
    stored = entry.get("queries")
    if not isinstance(stored, list) or not stored:
        raise DataError(source, f"{field}.queries", f"expected a non-empty list, found {repr(stored)[:60]}")
    queries, faults = [], []
    for number, query in enumerate(stored):
        try:
            queries.append(_query(query, source, f"{field}.queries[{number}]", size))
        except DataError as error:
            faults.append(error.fault)
    if not queries:
        first = f"{faults[0].field}: {faults[0].message}"
        raise DataError(source, f"{field}.queries", f"none is usable; the first: {first}")
    return Picture(source.parent / name, size, tuple(queries)), faults


def _query(entry: Any, source: Path, field: str, size: tuple[int, int]) -> Query:
    if not isinstance(entry, dict):
        raise DataError(source, field, f"expected an object, found {repr(entry)[:60]}")
    unknown = sorted(set(entry) - _QUERY_FIELDS)
    if unknown:
        raise DataError(source, field, f"unknown fields {unknown}; known are {sorted(_QUERY_FIELDS)}")
    entry = {name: value for name, value in entry.items() if value is not None}
    text = entry.get("text")
    if not is_text(text):
        raise DataError(source, f"{field}.text", f"expected a non-empty text, found {repr(text)[:60]}")
    kinds = {"kind": str, "answer": str, "question": str, "exists": bool, "is_sentence": bool, "masks": list}
    for name, kind in kinds.items():
        good = isinstance(entry.get(name, kind()), kind)
        if not good or (kind is str and not is_text(entry.get(name, ""), empty=True)):
            raise DataError(
                source, f"{field}.{name}", f"expected {kind.__name__}, found {repr(entry[name])[:60]}"
            )
    masks = tuple(entry.get("masks", ()))
    for number, mask in enumerate(masks):
        _check_mask(mask, size, source, f"{field}.masks[{number}]")
    if "ignore" in entry:
        _check_mask(entry["ignore"], size, source, f"{field}.ignore")
    answer = entry.get("answer")
    exists = entry.get("exists", bool(masks))
    if masks and not exists:
        raise DataError(source, f"{field}.exists", f"is false with {len(masks)} masks")
    if exists and not masks and answer is None:
        raise DataError(
            source, f"{field}.masks", "nothing is stored although it exists; add masks or an answer"
        )
    if answer is not None and answer.count(SEG_TOKEN) != len(masks):
        found = answer.count(SEG_TOKEN)
        raise DataError(
            source, f"{field}.answer", f"{found} {SEG_TOKEN} for {len(masks)} masks in {answer!r}"
        )
    if answer == "":
        raise DataError(source, f"{field}.answer", "is empty; leave the field out to use the templates")
    for name in ("text", "question"):
        for token in (SEG_TOKEN, IMAGE_TOKEN):
            if token in (entry.get(name) or ""):
                raise DataError(source, f"{field}.{name}", f"{token} may not stand in a question")
    return Query(
        text=text.strip(),
        exists=exists,
        masks=masks,
        kind=entry.get("kind") or "",
        is_sentence=entry.get("is_sentence", text.strip()[-1] in ".?!"),
        answer=answer,
        question=entry.get("question"),
        ignore=entry.get("ignore"),
    )


def _check_mask(mask: Any, size: tuple[int, int], source: Path, field: str) -> None:
    try:
        check_mask(mask, *size)
    except ValueError as error:
        raise DataError(source, field, str(error)) from error


def write_annotations(folder: StrPath, images: Sequence[dict[str, Any]]) -> Path:
    """Write `annotations.json` (pictures are the caller's to write). Masks given as arrays become RLE.

    Args:
        folder: where the file goes; `file` of every image is relative to it.
        images: entries of the format; items of `masks` may be arrays (H, W), non-zero is inside.
    """
    stored = [{**image, "queries": list(_stored(image["queries"]))} for image in images]
    path = Path(folder) / FILE_NAME
    lines = ",\n".join(to_json(image, indent=None) for image in stored)
    return atomic_write_text(path, '{"images": [\n' + lines + "\n]}\n")


def _stored(queries: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for query in queries:
        stored = dict(query)
        if isinstance(query.get("masks"), list | tuple):
            stored["masks"] = [_encoded(mask) for mask in query["masks"]]
        if "ignore" in query:
            stored["ignore"] = _encoded(query["ignore"])
        yield stored


def _encoded(mask: Any) -> Any:
    return encode_mask(mask) if isinstance(mask, np.ndarray) else mask


# ---------------------------------------------------------------------------------------------- data set


class GenericData(ConversationData):
    """Samples of an `annotations.json`.

    Training: up to `num_per_image` questions of a picture, drawn without repetition. Evaluation: all
    that have a target, in file order; it is the union of a question's masks (with the prompt `answer`, the
    masks of the answer).

    Args:
        path: the file or its folder.
        options: see `ReadOptions`.
        name: for messages; default the path.
    """

    def __init__(self, path: StrPath, options: ReadOptions, name: str | None = None) -> None:
        super().__init__(name or str(path), options)
        pictures, self.faults = read_annotations(path)
        if not options.train:
            pictures = [
                replace(p, queries=tuple(q for q in p.queries if not q.is_text_only)) for p in pictures
            ]
        self.pictures = [picture for picture in pictures if picture.queries]
        self._settle()

    def __len__(self) -> int:
        return len(self.pictures)

    def _sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture = self.pictures[index]
        image = load_rgb(picture.path)
        numbers = range(len(picture.queries))
        if self.options.train:
            numbers = rng.permutation(len(picture.queries))[: self.options.num_per_image]
        conversations = []
        for number in numbers:
            query = picture.queries[number]
            pick = self._pick(f"{picture.path.name}:{number}", rng)
            try:
                absent = self.options.train and not query.exists and query.answer is None
                confirm = absent and rng.random() < self.options.confirm_absent
                conversation = self._conversation(query, image.shape[:2], pick, confirm)
            except ValueError as error:
                raise DataError(picture.path, f"queries[{number}].masks", str(error)) from error
            conversation.ref_id, conversation.sent_id = index, int(number)
            conversations.append(conversation)
        return Sample(str(picture.path), image, conversations)

    def _conversation(
        self, query: Query, size: tuple[int, int], pick: Pick, confirm: bool = False
    ) -> Conversation:
        """`confirm`: answer with `[SEG]` and an empty mask although nothing is there."""
        masks = query.decode(*size) if self._mask_per_seg and not confirm else query.target(*size)
        question, answer = self._texts(query, pick, confirm)
        turns = [(question, answer)] if self.options.train else self._eval_turns(question, answer)
        return Conversation(turns, self._ignore(masks, default=True), query.text, query.exists, query.kind)

    def _texts(self, query: Query, pick: Pick, confirm: bool) -> tuple[str, str]:
        """Question and whole answer."""
        question = query.question or self.templates.question(query.text, query.is_sentence, pick)
        if query.answer is not None:
            return question, query.answer
        if query.exists or confirm:
            count = max(1, len(query.masks))
            return question, self.templates.answer(query.text, query.is_sentence, pick, count)
        return question, self.templates.deny(query.text, query.is_sentence, pick)
