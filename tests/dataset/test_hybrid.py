"""Hybrids: shares, determinism, malformed settings."""

from collections import Counter

import numpy as np
import pytest

from dataset.hybrid import Hybrid
from dataset.sample import Sample


class Part:
    """A stand-in data set that reports how it was drawn."""

    strict = False

    def __init__(self, name: str, length: int) -> None:
        self.name, self.length = name, length

    def __len__(self) -> int:
        return self.length

    def draw(self, index: int, epoch: int, seed: int) -> Sample:
        assert 0 <= index < self.length
        return Sample(f"{self.name}/{index}/{epoch}/{seed}", np.zeros((1, 1, 3), np.uint8))


def test_shares_and_determinism() -> None:
    mixture = Hybrid([Part("a", 3), Part("b", 5), Part("c", 2)], [6, 3, 0])
    assert len(mixture) == 10
    drawn = [mixture.draw(index, epoch, seed=4).image_path for epoch in range(60) for index in range(10)]
    again = [mixture.draw(index, epoch, seed=4).image_path for epoch in range(60) for index in range(10)]
    assert drawn == again and len(set(drawn)) == len(drawn)
    counts = Counter(path.partition("/")[0] for path in drawn)
    assert set(counts) == {"a", "b"} and abs(counts["a"] / len(drawn) - 2 / 3) < 0.06
    assert mixture[3].image_path == mixture.draw(3, 0, 0).image_path


@pytest.mark.parametrize("rates", [[1], [1, -1], [0, 0]])
def test_bad_rates(rates: list[float]) -> None:
    with pytest.raises(ValueError, match="rate"):
        Hybrid([Part("a", 1), Part("b", 1)], rates)
