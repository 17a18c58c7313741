"""Several data sets as one: every draw picks a data set by its share, then one of its pictures.

With replacement, as the published training draws. A draw depends on (index, epoch, seed) alone, so the data
are the same for any number of workers, and a run resumes at any step. Sets of one family (`refer_seg`:
refcoco, refcocog, ...) are themselves a `Hybrid` with equal shares.
"""

import functools
import logging
import random
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from torch.utils.data import Dataset

from dataset.base import NothingToAsk
from dataset.sample import Sample

logger = logging.getLogger(__name__)

Sampling = Literal["seeded", "official"]
SAMPLINGS: tuple[str, ...] = ("seeded", "official")
"""How training draws: `seeded` (ours), or `official`: the calls of the published loaders in their order
(which data set from numpy's legacy generator, everything else from Python's), with seeds of our own, since
the published training sets none."""
_TRIES = 100


class Drawable(Protocol):
    """What a hybrid is made of: a `ConversationData`, or a `Hybrid`."""

    name: str
    strict: bool

    def __len__(self) -> int: ...

    def draw(self, index: int, epoch: int = 0, seed: int | None = None) -> Sample:
        """Sample `index` as drawn in `epoch`; depends on the arguments alone."""
        ...

    def official(self, rng: random.Random, index: int | None = None) -> Sample:
        """One draw as the published loaders make it, with their calls of `rng` in their order."""
        ...


class Hybrid(Dataset[Sample]):
    """Data sets drawn with the given relative shares; its length is the sum of theirs.

    Args:
        parts: the data sets.
        rates: their shares (any positive scale); None = equal shares, a family of sets.
        sampling: see `Sampling`.
        name: for messages.
    """

    published = True

    def __init__(
        self,
        parts: Sequence[Drawable],
        rates: Sequence[float] | None = None,
        sampling: Sampling = "seeded",
        name: str = "hybrid",
    ) -> None:
        rates = [1.0] * len(parts) if rates is None else list(rates)
        if not parts or len(parts) != len(rates):
            raise ValueError(f"a mixture needs one rate per data set, found {len(rates)} for {len(parts)}")
        if min(rates) < 0 or not sum(rates):
            raise ValueError(f"rates must be positive, found {rates}")
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling {sampling!r} is unknown; choose one of {', '.join(SAMPLINGS)}")
        self.parts, self.sampling, self.name = list(parts), sampling, name
        self.shares = np.asarray(rates, dtype=np.float64) / sum(rates)
        self.strict = any(part.strict for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Sample:
        """Draw `index` of epoch 0 with seed 0."""
        return self.draw(index)

    def draw(self, index: int, epoch: int = 0, seed: int | None = None) -> Sample:
        """The picture and questions of one draw."""
        seed = 0 if seed is None else seed
        if self.sampling == "official":
            part = self.parts[self.official_parts(epoch, seed)[index]]
            return draw_official(part, random.Random(f"{seed}:{epoch}:{index}"))
        rng = np.random.default_rng((seed, epoch, index))
        part = self.parts[int(rng.choice(len(self.parts), p=self.shares))]
        place = int(rng.integers(len(part)))
        return part.draw(place, epoch=epoch, seed=int(rng.integers(2**31)))

    def official(self, rng: random.Random, index: int | None = None) -> Sample:
        """One draw of a family as published: the set, all alike, then the set's own draws."""
        return self.parts[rng.randrange(len(self.parts))].official(rng, index)

    def official_parts(self, epoch: int, seed: int) -> np.ndarray:
        """int64 (len(self),): the data set of every draw of an epoch, as the published mixture draws them:
        one after the other from numpy's legacy generator, seeded with `seed` in epoch 0."""
        return _official_parts(tuple(self.shares.tolist()), len(self), epoch, seed)


@functools.lru_cache(maxsize=4)
def _official_parts(shares: tuple[float, ...], length: int, epoch: int, seed: int) -> np.ndarray:
    start = seed % 2**32 if epoch == 0 else np.random.SeedSequence((seed, epoch)).generate_state(8)
    return np.random.RandomState(start).choice(len(shares), size=length, p=np.array(shares))


def draw_official(part: Drawable, rng: random.Random) -> Sample:
    """A draw as published; what cannot be read or asked is drawn again, as there.

    Raises:
        ValueError: nothing usable in many tries.
    """
    for _ in range(_TRIES):
        try:
            return part.official(rng)
        except NothingToAsk as error:
            logger.debug("%s: drawn again: %s", part.name, error)
        except (ValueError, OSError) as error:
            if part.strict:
                raise
            logger.warning("%s: drawn again: %s", part.name, error)
    raise ValueError(f"{part.name}: {_TRIES} draws in a row cannot be used; run validate_data.py on it")
