"""Parts and wholes: of masks that lie inside each other only one is used."""

import numpy as np
import torch

from model.instructsam.match import match_features
from model.instructsam.overlap import match_apart, shares_inside
from utils.rle import encode_mask


def mask(x0: int, x1: int) -> dict:
    pixels = np.zeros((4, 20), np.uint8)
    pixels[:, x0:x1] = 1
    return encode_mask(pixels)


def test_shares() -> None:
    found = shares_inside([mask(0, 10), mask(0, 5), mask(8, 12)])
    np.testing.assert_allclose(found, [[0, 0.5, 0.2], [1, 0, 0], [0.5, 0, 0]])


def test_the_next_best_whole_is_used_instead_of_a_part() -> None:
    # cosines with the only label: whole 0.9, its part 0.8, another object 0.5, a part of that 0.6
    values = torch.tensor([0.9, 0.8, 0.5, 0.6])
    regions = torch.stack([values, (1 - values**2).sqrt()], dim=1)
    rles = [mask(0, 10), mask(0, 5), mask(10, 20), mask(10, 13)]
    texts, counts = torch.tensor([[1.0, 0.0]]), {"ship": 2}
    assert match_features(regions, texts, counts).regions.tolist() == [0, 1]
    assert match_apart(regions, texts, counts, rles, 1.0).regions.tolist() == [0, 1]
    found = match_apart(regions, texts, counts, rles, 0.5)
    assert found.regions.tolist() == [0, 3] and found.labels == ["ship", "ship"]
    np.testing.assert_allclose(found.similarity, [0.9, 0.6], atol=1e-6)


def test_result_never_overlaps_and_ends() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        number = int(generator.integers(1, 12))
        starts = generator.integers(0, 15, number)
        rles = [mask(int(a), int(a + w)) for a, w in zip(starts, generator.integers(1, 6, number))]
        regions = torch.nn.functional.normalize(torch.from_numpy(generator.normal(size=(number, 3))).float())
        texts = torch.nn.functional.normalize(torch.from_numpy(generator.normal(size=(2, 3))).float())
        counts = {"a": 2, "b": 3}
        found = match_apart(regions, texts, counts, rles, 0.4)
        chosen = [rles[k] for k in found.regions]
        assert len(set(found.regions.tolist())) == len(chosen) >= 1
        assert shares_inside(chosen).max() <= 0.4
        assert all(found.labels.count(label) <= most for label, most in counts.items())
