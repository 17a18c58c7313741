"""Samples between readers and batches: what is kept, counted, joined, drawn and divided."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from dataset.sample import Conversation, Sample
from utils.distributed import World
from utils.train_lisat_data import (
    InWords,
    Joined,
    Prepared,
    RandomDraws,
    Scorable,
    answers_in_words,
    as_caption,
    shared_batches,
    shows_image,
)


def conversation(answer: str | None, masks: int = 0, has_image: bool = True) -> Conversation:
    return Conversation([("Where?", answer)], np.zeros((masks, 2, 2), np.uint8), has_image=has_image)


class Data:
    """Samples by number; a draw writes its arguments into the name."""

    def __init__(self, *samples: list[Conversation]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.draw(index)

    def draw(self, index: int, epoch: int = 0, seed: int = 0) -> Sample:
        return Sample(f"{index}/{epoch}/{seed}", np.zeros((2, 2, 3), np.uint8), list(self.samples[index]))

    def lengths(self) -> list[int]:
        return [10 * index for index in range(len(self))]


SHORT, LONG = conversation("No."), conversation("No, " * 50)


def short(one: Conversation) -> bool:
    return len(one.turns[0][1]) < 20


def test_samples_without_anything_that_fits_give_way_and_are_counted() -> None:
    data = Prepared(Data([SHORT, LONG], [LONG, LONG], [LONG], [SHORT]), short)
    kept = [data.draw(index, epoch=2, seed=5) for index in range(4)]
    assert [sample.image_path for sample in kept] == ["0/2/5", "3/2/5", "3/2/5", "3/2/5"]
    assert [sample.dropped for sample in kept] == [0, 3, 1, 0]
    assert len(kept[0].conversations) == 2  # the long one beside it is the batch's to drop
    assert data.lengths() == [0, 10, 20, 30] and len(data) == 4
    with pytest.raises(ValueError, match="3 conversations were too long"):
        Prepared(Data([LONG, LONG], [LONG]), short).draw(1)


def test_what_a_stage_learns_from() -> None:
    open_one, masked, text = (
        conversation(None),
        conversation("[SEG]", 1),
        conversation("No.", has_image=False),
    )
    everything = [open_one, SHORT, masked, text]
    assert [answers_in_words(c) for c in everything] == [False, True, False, True]
    assert [shows_image(c) for c in everything] == [False, True, False, False]
    assert not answers_in_words(conversation("It is [SEG]."))
    data = Prepared(Data([masked, SHORT], [text], [SHORT, SHORT]), short, shows_image, as_caption)
    drawn = [data.draw(index) for index in range(3)]
    assert [sample.image_path[0] for sample in drawn] == ["0", "2", "2"]
    assert {sample.dropped for sample in drawn} == {0}
    assert all(c.turns == [("", "No.")] for sample in drawn for c in sample.conversations)
    held_out = InWords(Data([masked, SHORT], [masked]), usable=shows_image, change=as_caption)
    assert [c.turns for c in held_out[0].conversations] == [[("", "No.")]]
    with pytest.raises(ValueError, match="can be scored"):
        held_out[1]


def test_joined_data_have_every_sample_once() -> None:
    joined = Joined([Data([SHORT], [SHORT]), Data([LONG])])
    names = [joined.draw(index, epoch=1, seed=2).image_path for index in range(len(joined))]
    assert names == ["0/1/2", "1/1/2", "0/1/2"]
    assert joined.lengths() == [0, 10, 0] and joined[2].conversations == [LONG]


def test_official_validation_draws_at_random_and_differently_each_time() -> None:
    data = Data(*[[conversation("[SEG]", 1), SHORT]] * 40)
    draws = RandomDraws(data, seed=3)
    first = [draws[index].image_path for index in range(len(draws))]
    assert first == [draws[index].image_path for index in range(len(draws))]
    assert Counter(name.partition("/")[0] for name in first).most_common(1)[0][1] > 1  # with replacement
    draws.number = 500
    assert [draws[index].image_path for index in range(len(draws))] != first
    assert all(len(draws[index].conversations) == 1 for index in range(5))  # the one with a mask
    assert len(RandomDraws(data, limit=7)) == 7 and len(Scorable(data, limit=7)) == 7


@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_a_validation(drop_last: bool) -> None:
    data = Data(*[[SHORT]] * 7)

    def collate(samples: list[Sample]) -> dict[str, Any]:
        return {"image_paths": [sample.image_path for sample in samples]}

    counted, batches = [], []
    for rank in range(3):
        world = World(rank, 3, rank)
        found = list(shared_batches(data, world, collate, batch_size=2, drop_last=drop_last))
        counted += [name for batch, images in found for name in batch["image_paths"][:images]]
        batches.append(len(found))
    assert len(set(batches)) == 1
    assert sorted(counted) == [f"{index}/0/0" for index in range(6 if drop_last else 7)]
