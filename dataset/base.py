"""What all readers share: faults of data files, and the data set of samples drawn by (index, epoch, seed)."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dataset.draws import Draws, Rng
from dataset.masks import Raster
from dataset.sample import Conversation, Sample
from dataset.templates import Pick, Templates, load_templates
from dataset.text import SEG_TOKEN, Turns
from utils.io import StrPath, is_there

logger = logging.getLogger(__name__)

Prompt = Literal["forced", "open", "answer"]
"""How evaluation prompts end: `forced` with the answer `[SEG]` (the published GRES protocol), `open` for free
generation, `answer` with a whole fixed answer (teacher forcing). A question has one target mask, zero where
the thing is absent; with `answer` one per `[SEG]` of the answer, so none for a denial."""
PROMPTS: tuple[str, ...] = ("forced", "open", "answer")

_LISTED_FAULTS = 20
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for files that are no picture, or one of more pixels than it takes (then: cut tiles)."""


# ------------------------------------------------------------------------------------------------- faults


@dataclass(frozen=True)
class Fault:
    """One thing wrong with the data: file, field inside it ("" for the whole file), what was found."""

    file: str
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.field}: {self.message}" if self.field else f"{self.file}: {self.message}"


class DataError(ValueError):
    """A data file that cannot be used; carries its `fault`."""

    def __init__(self, file: StrPath, field: str, message: str) -> None:
        self.fault = Fault(str(file), field, message)
        super().__init__(str(self.fault))


class NothingToAsk(DataError):
    """A sound picture without anything to ask about; training draws another one."""


def settle(faults: Sequence[Fault], strict: bool, what: str) -> None:
    """Report faults of a reader: a warning that lists the first ones, or ValueError when `strict`."""
    if not faults:
        return
    lines = [f"  {fault}" for fault in faults[:_LISTED_FAULTS]]
    if len(faults) > _LISTED_FAULTS:
        lines.append(f"  ... and {len(faults) - _LISTED_FAULTS} more")
    text = f"{what}: {len(faults)} unusable entries\n" + "\n".join(lines)
    if strict:
        raise ValueError(
            f"{text}\nmend them (validate_data.py lists all), or read without strict to skip them"
        )
    logger.warning("%s\nthey are skipped", text)


def picture_size(path: StrPath) -> tuple[int, int]:
    """(H, W) of a picture from its header, upright by EXIF; nothing is decoded. DataError if unreadable."""
    path = Path(path)
    if not is_there(path):
        raise DataError(path, "", "picture is not there")
    try:
        with Image.open(path) as image:
            width, height = image.size
            tagged = image.format in ("JPEG", "MPO", "TIFF", "WEBP")  # elsewhere the look would decode it all
            turned = tagged and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except UNREADABLE as error:
        raise DataError(path, "", f"not a readable picture ({error})") from error
    return (width, height) if turned else (height, width)


# ----------------------------------------------------------------------------------------------- data set


@dataclass(frozen=True)
class ReadOptions:
    """Settings of a reader, the same for all formats.

    train: draw up to `num_per_image` questions per picture with random templates; otherwise every question of
        every picture, in file order, with a template fixed by the file's name.
    num_per_image: conversations per training picture.
    seed: of everything drawn.
    templates: built-in set, file, or Templates.
    prompt: how evaluation prompts end.
    raster: how polygons of GRES-like files are filled.
    overlap: what overlapping parts of one outline become in the REFER format: 1 (`union`) or their number
        (`sum`, as published).
    respect_ignore: keep 255 in masks so that those pixels do not count. False makes them background; None is
        the format's default (GRES-like: False, as published; others: True).
    strict: an unusable file stops the reader instead of being skipped.
    absent_rate: share of training questions about something that is not there, where the format draws them.
    confirm_absent: share of the training questions about something absent that are answered with `[SEG]` and
        an empty mask instead of a denial: the language model then says no only where it is sure, and the
        mask decoder learns to show nothing (own annotations, semantic folders).
    keep_empty: evaluation keeps GRES-like files without any target, as questions whose answer is "nothing".
    all_texts: evaluation asks every text of a GRES-like file instead of the first.
    list_file: names of the files of a split (one per line).
    index: where large splits keep what was read, for the next start: `auto`, `off`, or a folder
        (`dataset.index`).
    augment: training on semantic folders only: smallest share of the sides that a random crop keeps, with
        random quarter turns and mirroring (questions about land cover mean the same in every orientation).
        1 turns and mirrors without cropping, 0 leaves pictures as they are.
    """

    train: bool = True
    num_per_image: int = 3
    seed: int = 0
    templates: Templates | str | None = None
    prompt: Prompt = "forced"
    raster: Raster = "official"
    overlap: Literal["union", "sum"] = "union"
    respect_ignore: bool | None = None
    strict: bool = False
    absent_rate: float = 0.15
    confirm_absent: float = 0.0
    keep_empty: bool = False
    all_texts: bool = False
    list_file: str | None = None
    index: str = "auto"
    augment: float = 0.0

    def __post_init__(self) -> None:
        faults = []
        if self.num_per_image < 1:
            faults.append(f"num_per_image must be at least 1, found {self.num_per_image}")
        if self.prompt not in PROMPTS:
            faults.append(f"prompt {self.prompt!r} is none of {', '.join(PROMPTS)}")
        if self.overlap not in ("union", "sum"):
            faults.append(f"overlap {self.overlap!r} is none of union, sum")
        for name in ("absent_rate", "confirm_absent", "augment"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} must be in 0..1, found {getattr(self, name)}")
        if faults:
            raise ValueError("; ".join(faults))


class ConversationData(Dataset[Sample]):
    """Samples of one source. `draw(index, epoch, seed)` depends on its arguments alone.

    Subclasses fill `self.faults` while reading and implement `__len__` and `_sample`. Those that are
    `published` make their draws from either generator of `dataset.draws`.
    """

    published = False

    def __init__(self, name: str, options: ReadOptions) -> None:
        self.name, self.options = name, options
        source = options.templates
        self.templates = source if isinstance(source, Templates) else load_templates(source)
        self.faults: list[Fault] = []
        self.strict = options.strict

    def __len__(self) -> int:
        raise NotImplementedError

    def _sample(self, index: int, rng: Rng) -> Sample:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` as drawn in epoch 0 with the options' seed."""
        return self.draw(index)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def draw(self, index: int, epoch: int = 0, seed: int | None = None) -> Sample:
        """Sample `index` with the questions and templates of `epoch`.

        A training picture that cannot be read is reported and replaced by the next one; in evaluation, and
        when `strict`, it stops the run (every picture must count once).

        Raises:
            IndexError: index outside 0..len-1. ValueError: unreadable picture or mask.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} pictures, asked for number {index}")
        seed = self.options.seed if seed is None else seed
        for step in range(len(self)):
            place = (index + step) % len(self)
            try:
                return self._sample(place, np.random.default_rng((seed, epoch, place)))
            except NothingToAsk as error:
                if not self.options.train:
                    raise ValueError(f"{self.name}, picture {place}: {error}") from error
                logger.debug("%s, picture %d is left out: %s", self.name, place, error)
            except (ValueError, OSError) as error:
                if self.options.strict or not self.options.train:
                    raise ValueError(f"{self.name}, picture {place}: {error}") from error
                logger.warning("%s, picture %d is left out: %s", self.name, place, error)
        raise ValueError(
            f"{self.name}: none of the {len(self)} pictures can be read; run validate_data.py on it"
        )

    def official(self, rng: random.Random, index: int | None = None) -> Sample:
        """One draw as the published loader makes it with Python's generator in the state of `rng`.

        Args:
            rng: used up as the published calls use it up. Formats without a published loader take a picture
                and a seed from it.
            index: the picture in evaluation; training draws it.
        """
        place = Draws(rng).place(len(self)) if index is None else index
        return self._sample(place, rng) if self.published else self.draw(place, seed=rng.getrandbits(31))

    def _settle(self) -> None:
        """To be called when all files are listed."""
        settle(self.faults, self.options.strict, self.name)
        if len(self) == 0:
            first = f"; the first of {len(self.faults)} faults: {self.faults[0]}" if self.faults else ""
            raise ValueError(
                f"{self.name}: no usable picture{first}; run validate_data.py on the folder for the reasons"
            )

    def _pick(self, key: str, rng: Rng) -> Pick | Draws:
        """Random in training and for draws as published; otherwise fixed by the key."""
        if self.options.train or isinstance(rng, random.Random):
            return Draws(rng)
        return Pick(key=f"{self.options.seed}:{key}")

    def _ignore(self, masks: np.ndarray, default: bool) -> np.ndarray:
        """Masks with 255 kept or turned into background."""
        keep = self.options.respect_ignore
        return masks if (default if keep is None else keep) else (masks == 1).astype(np.uint8)

    @property
    def _mask_per_seg(self) -> bool:
        """Whether a conversation's masks are those of its answer's `[SEG]`, rather than one target."""
        return self.options.train or self.options.prompt == "answer"

    def _eval_turns(self, question: str, answer: str) -> Turns:
        """Turns of an evaluation prompt; `answer` is used by the prompt `answer`."""
        return [(question, {"forced": SEG_TOKEN, "open": None, "answer": answer}[self.options.prompt])]


def draw_record(sample: Sample) -> dict[str, object]:
    """What was drawn, as JSON values: picture, and per conversation turns, kind, presence, mask areas."""
    return {
        "image": sample.image_path,
        "conversations": [_conversation_record(conversation) for conversation in sample.conversations],
    }


def _conversation_record(conversation: Conversation) -> dict[str, object]:
    return {
        "query": conversation.query,
        "kind": conversation.kind,
        "exists": conversation.exists,
        "turns": [list(turn) for turn in conversation.turns],
        "areas": [int(np.count_nonzero(mask == 1)) for mask in conversation.masks],
    }
