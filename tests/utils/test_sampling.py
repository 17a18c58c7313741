"""Batch k is a pure function of seed and k: no worker, rank, restart or global generator changes it."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from utils.sampling import BatchPlan, KeyedDataset, known_lengths, make_loader


class Noisy:
    """Draws from the global generators, as careless data sets do."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def batches(plan: BatchPlan, rank: int = 0, first: int = 0, last: int = 7, workers: int = 0) -> list[Any]:
    return list(
        make_loader(Noisy(), list, plan, rank=rank, first_step=first, last_step=last, workers=workers)
    )


def test_restart_and_workers_give_the_same_batches() -> None:
    plan = BatchPlan(10, seed=3, micro_batch=2, accumulation=3)
    whole = batches(plan)
    assert len(whole) == 21
    assert batches(plan, first=4) == whole[12:]
    assert batches(plan, workers=2) == whole
    random.seed(1)
    state = torch.get_rng_state()
    assert batches(plan) == whole
    assert torch.equal(torch.get_rng_state(), state)  # and the run's own generators are left alone


def test_ranks_and_accumulation_divide_the_same_step() -> None:
    one = BatchPlan(10, 0, micro_batch=12)
    for micro, accumulation, world in ((3, 4, 1), (3, 2, 2), (2, 2, 3), (12, 1, 1)):
        plan = BatchPlan(10, 0, micro, accumulation, world)
        assert plan.global_batch == 12
        for step in range(4):
            parts = [plan.keys(step, m, r) for m in range(accumulation) for r in range(world)]
            assert [key for part in parts for key in part] == one.keys(step, 0, 0)


def test_every_item_once_per_pass_in_another_order() -> None:
    plan = BatchPlan(10, 0, micro_batch=5)
    keys = [key for step in range(4) for key in plan.keys(step, 0, 0)]
    first, second = keys[:10], keys[10:]
    assert sorted(key.index for key in first) == sorted(key.index for key in second) == list(range(10))
    assert {key.epoch for key in first} == {0} and {key.epoch for key in second} == {1}
    assert [key.index for key in first] != [key.index for key in second]
    assert BatchPlan(10, 1, 5).keys(0, 0, 0) != plan.keys(0, 0, 0)


def test_draw_is_preferred_and_gets_the_key() -> None:
    class Drawn(Noisy):
        def draw(self, index: int, epoch: int, seed: int) -> tuple[int, int, int]:
            return seed, epoch, index

    plan = BatchPlan(10, 8, micro_batch=5)
    keyed = KeyedDataset(Drawn())
    assert [keyed[key] for key in plan.keys(2, 0, 0)] == [tuple(key) for key in plan.keys(2, 0, 0)]


def test_empty_data_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        BatchPlan(0, 0, 1)


def test_batches_of_like_length_hold_every_item_once_in_shuffled_order() -> None:
    lengths = np.random.default_rng(0).permutation(103).tolist()
    plan = BatchPlan(103, 5, micro_batch=2, accumulation=2, lengths=lengths)
    steps = [[k.index for m in range(2) for k in plan.keys(s, m, 0)] for s in range(25)]
    rest = [key.index for key in plan.keys(25, 0, 0) + plan.keys(25, 1, 0)][:3]
    assert sorted([index for step in steps for index in step] + rest) == list(range(103))
    spans = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in steps]
    assert max(spans) <= 6  # neighbours among 100 of 103 numbers
    firsts = [max(lengths[i] for i in step) for step in steps]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)
    again = BatchPlan(103, 5, micro_batch=2, accumulation=2, lengths=lengths)
    assert again.keys(7, 1, 0) == plan.keys(7, 1, 0)
    other = [[k.index for m in range(2) for k in plan.keys(s, m, 0)] for s in range(26, 51)]
    assert sorted(map(sorted, other)) != sorted(map(sorted, steps))
    few = BatchPlan(3, 0, micro_batch=8, lengths=[3, 1, 2])
    assert sorted(key.index for key in few.keys(0, 0, 0)[:3]) == [0, 1, 2]


def test_grouping_needs_lengths() -> None:
    assert known_lengths(Noisy(), wanted=False) is None
    with pytest.raises(ValueError, match="do not know"):
        known_lengths(Noisy(), wanted=True)
    with pytest.raises(ValueError, match="2 lengths for 3"):
        BatchPlan(3, 0, 1, lengths=[1, 2])
