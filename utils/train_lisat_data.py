"""What LISAT training puts between the readers and the batches: joining, choosing and dividing samples."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset.collate import Batch
from dataset.sample import Conversation, Sample
from dataset.text import SEG_TOKEN
from utils.distributed import World

logger = logging.getLogger(__name__)

_TRIES = 1000
"""Samples in a row of which nothing can be used, before training gives up."""


def answers_in_words(conversation: Conversation) -> bool:
    """Whether a conversation asks for no mask and all its turns are answered."""
    answers = [answer for _, answer in conversation.turns]
    return not len(conversation.masks) and all(a and SEG_TOKEN not in a for a in answers)


def shows_image(conversation: Conversation) -> bool:
    """Whether a conversation in words is about a picture."""
    return conversation.has_image and answers_in_words(conversation)


def as_caption(conversation: Conversation) -> Conversation:
    """The picture and its first answer alone, without the question: a caption pair."""
    return replace(conversation, turns=[("", conversation.turns[0][1])])


class Prepared(Dataset[Sample]):
    """Training samples as batches take them: at least one conversation of each can be learnt from.

    A sample of which nothing is left gives way to the next one. Conversations that were too long are counted
    in `Sample.dropped`; those that stand beside others that fit are left to `collate`, which counts them too.

    Args:
        data: draws samples.
        fits: whether a conversation is short enough for a batch.
        usable: whether this training learns from it; others are left out. None = all.
        change: applied to every conversation that is kept.
    """

    def __init__(
        self,
        data: Any,
        fits: Callable[[Conversation], bool],
        usable: Callable[[Conversation], bool] | None = None,
        change: Callable[[Conversation], Conversation] | None = None,
    ) -> None:
        self.data, self.fits, self.usable, self.change = data, fits, usable, change
        if hasattr(data, "lengths"):
            self.lengths = data.lengths

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of epoch 0 with seed 0."""
        return self.draw(index)

    def draw(self, index: int, epoch: int = 0, seed: int = 0) -> Sample:
        """Sample `index`, or the next one with something to learn.

        Raises:
            ValueError: none of many samples in a row has.
        """
        dropped = 0
        for step in range(min(len(self), _TRIES)):
            sample = self.data.draw((index + step) % len(self), epoch=epoch, seed=seed)
            kept = [c for c in sample.conversations if self.usable is None or self.usable(c)]
            kept = [self.change(c) for c in kept] if self.change is not None else kept
            if any(self.fits(conversation) for conversation in kept):
                return replace(sample, conversations=kept, dropped=dropped)
            dropped += len(kept)
            if kept:
                logger.warning(
                    "%s: its %d conversation(s) do not fit --model_max_length; the next sample is taken",
                    sample.image_path,
                    len(kept),
                )
        raise ValueError(
            f"none of {min(len(self), _TRIES)} samples in a row has a conversation to learn from "
            f"({dropped} conversations were too long, the others do not suit this --stage)"
        )


class Joined(Dataset[Sample]):
    """Data sets one after the other: each sample once per epoch."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])
        if all(hasattr(part, "lengths") for part in parts):
            self.lengths = self._lengths

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of epoch 0 with seed 0."""
        return self.draw(index)

    def draw(self, index: int, epoch: int = 0, seed: int = 0) -> Sample:
        """Sample `index` as its data set draws it."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return self.parts[number].draw(index - before, epoch=epoch, seed=seed)

    def _lengths(self) -> list[int]:
        return [length for part in self.parts for length in part.lengths()]


class Scorable(Dataset[Sample]):
    """Evaluation samples reduced to what a teacher-forced pass can score: answers that hold `[SEG]`."""

    def __init__(self, data: Any, limit: int = 0) -> None:
        self.data = data
        self.length = min(len(data), limit or len(data))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` with its conversations that have a mask; if there is none, one without its mask."""
        return scorable(self.data[index])


def scorable(sample: Sample) -> Sample:
    """The sample with its conversations that have a mask; if there is none, one without its mask."""
    kept = [c for c in sample.conversations if any(SEG_TOKEN in (answer or "") for _, answer in c.turns)]
    first = sample.conversations[0]
    return replace(sample, conversations=kept or [replace(first, masks=first.masks[:0])])


class RandomDraws(Dataset[Sample]):
    """What the published validation looks at: pictures drawn at random, with replacement, by the training
    reader, with random questions and answers, other ones each time.

    Args:
        data: a data set read for training.
        limit: draws at the most; 0 = as many as pictures.
        seed: of the draws, together with `number`, which the validation sets to the optimiser step.
    """

    def __init__(self, data: Any, limit: int = 0, seed: int = 0) -> None:
        self.data, self.seed, self.number = data, seed, 0
        self.length = min(len(data), limit or len(data))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Draw `index` of validation `number`."""
        rng = np.random.default_rng((self.seed, self.number, index))
        place = int(rng.integers(len(self.data)))
        return scorable(self.data.draw(place, epoch=self.number, seed=int(rng.integers(2**31))))


class InWords(Dataset[Sample]):
    """Held-out samples of LISAT_PRE: the conversations of each that training could learn from."""

    def __init__(
        self,
        data: Any,
        limit: int = 0,
        usable: Callable[[Conversation], bool] = answers_in_words,
        change: Callable[[Conversation], Conversation] | None = None,
    ) -> None:
        self.data, self.usable, self.change = data, usable, change
        self.length = min(len(data), limit or len(data))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`; ValueError where it has nothing to score."""
        sample = self.data[index]
        kept = [c for c in sample.conversations if self.usable(c)]
        if not kept:
            raise ValueError(
                f"--val_dataset: {sample.image_path} has no conversation that this --stage can be scored on"
            )
        kept = [self.change(c) for c in kept] if self.change is not None else kept
        return replace(sample, conversations=kept)


def shared_batches(
    data: Dataset[Sample],
    world: World,
    collate: Callable[[Sequence[Sample]], Batch],
    batch_size: int,
    workers: int = 0,
    drop_last: bool = False,
) -> Iterator[tuple[Batch, int]]:
    """This process's batches of a validation, each with the number of its images that count.

    Sample i belongs to process i modulo their number. All processes get equally many batches (ZeRO-3 needs
    that): those with fewer samples repeat one, which does not count; with `drop_last` what is left over from
    a whole round is left out instead.
    """
    size = len(data)
    rounds = size // world.size if drop_last else math.ceil(size / world.size)
    own = list(range(world.rank, size, world.size))[:rounds]
    loader = DataLoader(
        data,
        batch_size=batch_size,
        sampler=own + [0] * (rounds - len(own)),
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator().manual_seed(0),
    )
    left = len(own)
    for batch in loader:
        images = len(batch["image_paths"])
        yield batch, min(left, images)
        left = max(0, left - images)
