"""A mixture of data sets by rates: every draw picks a data set by its share, then one of its pictures.

With replacement, as the published training draws; a draw depends on (index, epoch, seed) alone.
"""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from dataset.base import ConversationData
from dataset.sample import Sample


class Mixture(Dataset[Sample]):
    """Data sets drawn with the given relative shares; its length is the sum of theirs."""

    def __init__(self, parts: Sequence[ConversationData], rates: Sequence[float]) -> None:
        if not parts or len(parts) != len(rates):
            raise ValueError(f"a mixture needs one rate per data set, found {len(rates)} for {len(parts)}")
        if min(rates) < 0 or not sum(rates):
            raise ValueError(f"rates must be positive, found {list(rates)}")
        self.parts = list(parts)
        self.shares = np.asarray(rates, dtype=np.float64) / sum(rates)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Sample:
        """Draw `index` of epoch 0 with seed 0."""
        return self.draw(index)

    def draw(self, index: int, epoch: int = 0, seed: int = 0) -> Sample:
        """The picture and questions of one draw."""
        rng = np.random.default_rng((seed, epoch, index))
        part = self.parts[int(rng.choice(len(self.parts), p=self.shares))]
        place = int(rng.integers(len(part)))
        return part.draw(place, epoch=epoch, seed=int(rng.integers(2**31)))
