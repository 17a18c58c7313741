"""Which images make up batch k: a pure function of the seed and k, whatever the workers, ranks and restarts.

The training data are an endless stream: pass 0 over all items in a shuffled order, then pass 1 in another,
and so on. Optimiser step k takes the next `global batch` positions of that stream; accumulation and ranks
only divide them. So a resumed run starts at any step at no cost, and the same global batch on another
number of processes sees the same images in every step. Everything random inside an item is seeded by (seed,
pass, index). With lengths, each pass is put in an order whose batches hold items of like length.
"""

import contextlib
import functools
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class DrawKey(NamedTuple):
    """One draw: item `index` in pass `epoch` over the data of a run seeded with `seed`."""

    seed: int
    epoch: int
    index: int


MEGABATCH = 50
"""Global batches inside which items are sorted by length."""


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
    """Divides the stream of a data set with `length` items into micro-batches.

    `lengths` (one number per item, of any unit) puts items of like length into one batch.
    """

    length: int
    seed: int
    micro_batch: int
    accumulation: int = 1
    world_size: int = 1
    lengths: Sequence[int] | None = field(default=None, compare=False, repr=False)
    _grouped: dict[int, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("the training data are empty: no item to draw; check the data folder and split")
        if self.lengths is not None and len(self.lengths) != self.length:
            raise ValueError(f"{len(self.lengths)} lengths for {self.length} training items")

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
            keys.append(DrawKey(self.seed, epoch, int(self._order(epoch)[place])))
        return keys

    def _order(self, epoch: int) -> np.ndarray:
        """Item numbers of a pass in their order."""
        if self.lengths is None:
            return _shuffled(self.seed, epoch, self.length)
        if epoch not in self._grouped:
            if len(self._grouped) > 1:
                self._grouped.clear()
            shuffled = _shuffled(self.seed, epoch, self.length)
            rng = np.random.default_rng([self.seed, epoch, 1])
            self._grouped[epoch] = group_by_length(shuffled, np.asarray(self.lengths), self.global_batch, rng)
        return self._grouped[epoch]

    def stream(self, first_step: int, last_step: int, rank: int) -> Iterator[list[DrawKey]]:
        """All micro-batches of process `rank` in steps `first_step` .. `last_step - 1`, in order."""
        for step in range(first_step, last_step):
            for micro in range(self.accumulation):
                yield self.keys(step, micro, rank)


@functools.lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def group_by_length(
    order: np.ndarray, lengths: np.ndarray, batch: int, rng: np.random.Generator
) -> np.ndarray:
    """Item numbers (N,) of `order` rearranged so that every `batch` of them have like lengths.

    Sorted inside stretches of `MEGABATCH` batches, whose batches are then shuffled; what is left over from
    whole batches stays at the end.
    """
    whole = len(order) // batch * batch
    stretches = [order[i : i + MEGABATCH * batch] for i in range(0, whole, MEGABATCH * batch)]
    if not stretches:
        return order
    stretches[-1] = order[(len(stretches) - 1) * MEGABATCH * batch : whole]
    ordered = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in stretches])
    return np.concatenate([rng.permutation(ordered.reshape(-1, batch)).reshape(-1), order[whole:]])


def known_lengths(data: SizedData, wanted: bool) -> Sequence[int] | None:
    """`data.lengths()` for a plan where grouping is `wanted`; ValueError where the data have none."""
    if not wanted:
        return None
    lengths = getattr(data, "lengths", None)
    if lengths is None:
        raise ValueError("--group_by_length: these training data do not know the lengths of their rows")
    return lengths()


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
