"""Which images make up batch k: a pure function of the seed and k, whatever the workers, ranks and restarts.

The training data are an endless stream: pass 0 over all items in a shuffled order, then pass 1 in another,
and so on. Optimiser step k takes the next `global batch` positions of that stream; accumulation and ranks
only divide them. So a resumed run starts at any step at no cost, and the same global batch on another
number of processes sees the same images in every step. Everything random inside an item is seeded by (seed,
pass, index).
"""

import contextlib
import functools
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class DrawKey(NamedTuple):
    """One draw: item `index` in pass `epoch` over the data of a run seeded with `seed`."""

    seed: int
    epoch: int
    index: int


class SizedData(Protocol):
    """What the engine trains on: a length, and either `data[index]` or `data.draw(index, epoch, seed)`.

    A data set that draws (questions, templates, negatives) does so in `draw`, from a generator seeded by
    its three arguments. Without `draw`, Python's, numpy's and torch's global generators are seeded before
    `data[index]`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class BatchPlan:
    """Divides the stream of a data set with `length` items into micro-batches."""

    length: int
    seed: int
    micro_batch: int
    accumulation: int = 1
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("the training data are empty: no item to draw; check the data folder and split")

    @property
    def global_batch(self) -> int:
        """Items per optimiser step, over all processes and micro-batches."""
        return self.micro_batch * self.accumulation * self.world_size

    def keys(self, step: int, micro: int, rank: int) -> list[DrawKey]:
        """The draws of micro-batch `micro` of optimiser step `step` on process `rank`."""
        first = step * self.global_batch + (micro * self.world_size + rank) * self.micro_batch
        keys = []
        for position in range(first, first + self.micro_batch):
            epoch, place = divmod(position, self.length)
            keys.append(DrawKey(self.seed, epoch, int(_order(self.seed, epoch, self.length)[place])))
        return keys

    def stream(self, first_step: int, last_step: int, rank: int) -> Iterator[list[DrawKey]]:
        """All micro-batches of process `rank` in steps `first_step` .. `last_step - 1`, in order."""
        for step in range(first_step, last_step):
            for micro in range(self.accumulation):
                yield self.keys(step, micro, rank)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's CPU generators inside the block and restore them after it."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


class KeyedDataset(Dataset):
    """A data set addressed by `DrawKey`: the same key gives the same item in any process at any time."""

    def __init__(self, data: SizedData) -> None:
        self.data = data

    def __getitem__(self, key: DrawKey) -> Any:
        with seeded(*key):
            draw = getattr(self.data, "draw", None)
            return self.data[key.index] if draw is None else draw(key.index, epoch=key.epoch, seed=key.seed)


class _Batches:
    """The batch sampler: an iterable with a length, as the data loader wants it."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int, rank: int) -> None:
        self.plan, self.first_step, self.last_step, self.rank = plan, first_step, last_step, rank

    def __iter__(self) -> Iterator[list[DrawKey]]:
        return self.plan.stream(self.first_step, self.last_step, self.rank)

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.plan.accumulation


def make_loader(
    data: SizedData,
    collate: Callable[[Sequence[Any]], Any],
    plan: BatchPlan,
    *,
    rank: int,
    first_step: int,
    last_step: int,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> DataLoader:
    """Loader of this process's micro-batches of steps `first_step` .. `last_step - 1`."""
    return DataLoader(
        KeyedDataset(data),
        batch_sampler=_Batches(plan, first_step, last_step, rank),
        collate_fn=_SeededCollate(collate, plan.seed),
        num_workers=workers,
        multiprocessing_context=_context() if workers else None,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(plan.seed),  # keeps the global generator untouched
    )


def _context() -> str:
    """Workers are forked where that exists: they start at once and need no picklable data set."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"


class _SeededCollate:
    """A collate that cannot disturb the generators of the process it runs in."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any], seed: int) -> None:
        self.collate, self.seed = collate, seed

    def __call__(self, samples: Sequence[Any]) -> Any:
        with seeded(self.seed):
            return self.collate(samples)


def _start_worker(worker: int) -> None:
    """Workers leave ending to their parent (which saves first) and use one thread each."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(0)
