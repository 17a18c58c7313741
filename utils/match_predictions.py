"""What a data set asks, and which prediction of another program answers which of its queries.

Pictures are found by their file names (with or without ending; parent folders decide between equal names),
queries of a picture by their words, else by `ref_id` and `sent_id`, else (`order`) by their order.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

from utils.predictions import target_of
from utils.rle import Rle, encode_mask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """One query of a data set with its target.

    target, ignore: codes of the pixels of 1 and of 255 (None: there are none). official_area: pixels of the
    target in the official raster.
    """

    query: str
    kind: str
    exists: bool
    ref_id: int
    sent_id: int
    target: Rle
    ignore: Rle | None
    official_area: int


@dataclass
class Picture:
    """One picture of a data set: its first number there, path, (H, W), queries in order."""

    index: int
    path: str
    size: tuple[int, int]
    queries: list[Wanted] = field(default_factory=list)


@dataclass(frozen=True)
class Mismatch:
    """One thing that predictions and data set disagree about.

    kind: missing (nothing answers the query), extra (answers nothing), ambiguous (may answer several),
    duplicate (a second answer), size (another size than the picture), unreadable.
    """

    kind: str
    image: str
    query: str
    message: str

    def __str__(self) -> str:
        about = f" ({self.query!r})" if self.query else ""
        return f"{self.kind}: {self.image}{about}: {self.message}"


Answers = list[list[Any]]
"""Per picture and query what answers it; None where nothing does."""


class Source(Protocol):
    """Where predictions come from."""

    def match(self, pictures: Sequence[Picture]) -> tuple[Answers, list[Mismatch]]:
        """What answers each query, and what does not fit."""
        ...


# ------------------------------------------------------------------------------------------ the data set


class ReadTargets:
    """Samples of a data set as `Picture`s with targets (an object for loader processes).

    Args:
        dataset: evaluation samples whose conversations carry one target each.
        official: the same data set in the official raster, for areas; None where it is that one.
    """

    def __init__(self, dataset: Sequence[Any], official: Sequence[Any] | None = None) -> None:
        self.dataset, self.official = dataset, official

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Picture | ValueError:
        try:
            sample = self.dataset[index]
            other = sample if self.official is None else self.official[index]
        except ValueError as error:
            return error  # raised by the caller without a loader's wrapping
        size = tuple(int(n) for n in sample.image.shape[:2])
        picture = Picture(index, sample.image_path, size)
        for conversation, twin in zip(sample.conversations, other.conversations, strict=True):
            if not len(conversation.masks):
                continue  # answered in words
            target = target_of(conversation, size)
            official = target if other is sample else target_of(twin, size)
            picture.queries.append(
                Wanted(
                    conversation.query or conversation.turns[-1][0],
                    conversation.kind,
                    bool(conversation.exists),
                    conversation.ref_id,
                    conversation.sent_id,
                    encode_mask(target == 1),
                    encode_mask(target == 255) if (target == 255).any() else None,
                    int((official == 1).sum()),
                )
            )
        return picture


def mapped(items: Any, workers: int, what: str) -> list[Any]:
    """`items[i]` for all i, in order, by `workers` processes (0: this one); progress on a terminal.

    Raises:
        ValueError: the first ValueError among the items.
    """
    from torch.utils.data import DataLoader

    from utils.progress import Progress

    progress, found = Progress(len(items), 0), []
    progress.describe(what)
    for item in DataLoader(items, batch_size=None, num_workers=workers, collate_fn=_same):
        if isinstance(item, ValueError):
            raise item
        found.append(item)
        progress.advance(len(found), 1)
        if len(found) % 1000 == 0:
            logger.info("%s: %d of %d", what, len(found), len(items))
    progress.close()
    return found


def _same(item: Any) -> Any:
    return item


def join_pictures(pictures: Sequence[Picture]) -> list[Picture]:
    """Pictures that a data set gives several times (once per expression, say), joined in order."""
    joined: dict[str, Picture] = {}
    for picture in pictures:
        first = joined.setdefault(picture.path, Picture(picture.index, picture.path, picture.size))
        first.queries += picture.queries
    return list(joined.values())


# ------------------------------------------------------------------------------------------------ names


class Names:
    """Finds the picture of a data set that a file name means."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.parts = [_parts(path) for path in paths]
        self.by_name: dict[str, list[int]] = defaultdict(list)
        self.by_stem: dict[str, list[int]] = defaultdict(list)
        for number, parts in enumerate(self.parts):
            self.by_name[parts[-1]].append(number)
            self.by_stem[PurePosixPath(parts[-1]).stem].append(number)

    def find(self, name: str) -> list[int]:
        """Numbers of the pictures that `name` may mean: one, none, or several that it cannot tell apart."""
        parts = _parts(name)
        if not parts:
            return []
        last = parts[-1]
        stem = PurePosixPath(last).stem
        found = self.by_name.get(last) or self.by_stem.get(last) or self.by_stem.get(stem) or []
        shared = [_common(self.parts[number][:-1], parts[:-1]) for number in found]
        return [number for number, length in zip(found, shared) if length == max(shared)]


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path.replace("\\", "/")).parts


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    length = 0
    for a, b in zip(reversed(left), reversed(right)):
        if a != b:
            break
        length += 1
    return length


# ---------------------------------------------------------------------------------------- prediction files


@dataclass
class PredictionFile:
    """Picture records of a prediction file (`utils.predictions`) as answers.

    order: answers without words and numbers, and those whose words the data set does not know, are taken in
    the order of the queries.
    """

    images: Sequence[dict[str, Any]]
    order: bool = False

    def match(self, pictures: Sequence[Picture]) -> tuple[Answers, list[Mismatch]]:
        """See `Source`; answers are query records."""
        names, mismatches = Names([picture.path for picture in pictures]), []
        given: list[list[dict[str, Any]]] = [[] for _ in pictures]
        for image in self.images:
            found = names.find(image["image"])
            if len(found) == 1:
                given[found[0]] += image["queries"]
                continue
            known = [pictures[number].path for number in found[:3]]
            message = f"may mean {', '.join(known)}; write its folder too" if known else "not in the data set"
            mismatches.append(Mismatch("extra", image["image"], "", message))
        answers = []
        for picture, records in zip(pictures, given):
            paired, bad = _pair(picture, records, self.order)
            answers.append(paired)
            mismatches += bad
        return answers, mismatches


def _pair(
    picture: Picture, records: Sequence[dict[str, Any]], order: bool
) -> tuple[list[Any], list[Mismatch]]:
    """Per query of the picture its record or None, and what is left over, doubled or missing."""
    wanted, mismatches = picture.queries, []
    paired: list[Any] = [None] * len(wanted)
    doubled: set[int] = set()
    words = [_words(query.query) for query in wanted]

    def report(kind: str, record: dict[str, Any], message: str) -> None:
        mismatches.append(Mismatch(kind, picture.path, str(record.get("query") or ""), message))

    for number, record in enumerate(records):
        choices = _choices(wanted, words, record)
        if not choices and order:
            choices = [number] if number < len(wanted) else []
        if not choices and not _named(record) and len(wanted) == 1:
            choices = [0]
        free = [k for k in choices if paired[k] is None and k not in doubled]
        targets = {(wanted[k].target["counts"], str(wanted[k].ignore)) for k in choices}
        if len(targets) > 1 and not order:
            report("ambiguous", record, f"{len(choices)} queries have these words; give ref_id and sent_id")
            doubled |= set(choices)
        elif free:
            paired[free[0]] = record
        elif choices:
            report("duplicate", record, "a second prediction for the same query; none of them is taken")
            doubled |= set(choices[:1])
        elif _named(record):
            report("extra", record, "the data set does not ask this about the picture")
        else:
            report("extra", record, f"no field query or ref_id and sent_id for {len(wanted)} queries")
    for number in doubled:
        paired[number] = None
    for number, query in enumerate(wanted):
        if paired[number] is None and number not in doubled:
            mismatches.append(Mismatch("missing", picture.path, query.query, "no prediction"))
    return paired, mismatches


def _choices(wanted: Sequence[Wanted], words: Sequence[str], record: dict[str, Any]) -> list[int]:
    """Queries that a record may answer: by words, then by numbers; a whole prompt by the words it holds."""
    numbers = (record.get("ref_id"), record.get("sent_id"))
    by_numbers = [k for k, query in enumerate(wanted) if (query.ref_id, query.sent_id) == numbers]
    if record.get("query") is None:
        return by_numbers
    said = _words(record["query"])
    same = [k for k, text in enumerate(words) if text == said]
    if not same:
        held = [k for k, text in enumerate(words) if text and text in said]
        longest = max((len(words[k]) for k in held), default=0)
        same = [k for k in held if len(words[k]) == longest]
    return [k for k in same if k in by_numbers] or same


def _named(record: dict[str, Any]) -> bool:
    return record.get("query") is not None or None not in (record.get("ref_id"), record.get("sent_id"))


def _words(text: str) -> str:
    return " ".join(text.casefold().split())
