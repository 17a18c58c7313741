"""What a reader draws while it builds one sample: sets, pictures, questions, templates.

Readers draw in the order of the published loaders, from one of two generators: numpy's (ours; a function of
seed, epoch and picture) or Python's, where every call uses up exactly what the published call uses up, so
that equal seeds give equal draws (`--sampling official`).
"""

import random
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np

Rng = np.random.Generator | random.Random
Item = TypeVar("Item")


class Draws:
    """Draws from one generator; called with a template family it picks a template (as `Pick` does)."""

    def __init__(self, rng: Rng) -> None:
        self.rng = rng

    @property
    def official(self) -> bool:
        """Whether these are draws as published."""
        return isinstance(self.rng, random.Random)

    def __call__(self, family: Sequence[Item]) -> Item:
        """One of the family, all alike."""
        return family[self.place(len(family))]

    def place(self, length: int) -> int:
        """A number in 0..length-1."""
        if isinstance(self.rng, random.Random):
            return self.rng.randrange(length)
        return int(self.rng.integers(length))

    def choose(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` of the items without repetition, in random order; all in file order if there are fewer."""
        return list(items) if len(items) < count else self.sample(items, count)

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` of the items (all if there are fewer) without repetition, in random order."""
        count = min(count, len(items))
        if isinstance(self.rng, random.Random):
            return self.rng.sample(list(items), count)
        return [items[int(i)] for i in self.rng.permutation(len(items))[:count]]

    def weighted(self, items: Sequence[Item], weights: Sequence[float]) -> Item:
        """One of the items with chances proportional to `weights`."""
        steps = list(accumulate(weights))
        return items[bisect(steps, self.rng.random() * steps[-1], 0, len(items) - 1)]

    def chance(self, share: float) -> bool:
        """True with probability `share` (as `random.choices` with two weights draws it)."""
        return self.weighted((False, True), (1 - share, share))

    def coin(self) -> bool:
        """True in one half of the cases."""
        return bool(self.rng.random() < 0.5)
