"""The assignment solvers: all solutions tried, proofs of optimality, and what they refuse."""

import itertools

import numpy as np
import pytest

from model.instructsam import assignment
from model.instructsam.assignment import assign


def brute_force(similarity: np.ndarray, counts: list[int]) -> float:
    """Largest sum over all ways to label regions (label M = none) that the constraints allow."""
    regions, labels = similarity.shape
    padded = np.column_stack([similarity, np.zeros(regions)])
    best, total = -np.inf, sum(counts)
    for choice in itertools.product(range(labels + 1), repeat=regions):
        taken = [choice.count(k) for k in range(labels)]
        if regions > total:
            good = taken == counts
        else:
            good = labels not in choice and all(t <= c for t, c in zip(taken, counts))
        if good:
            best = max(best, padded[np.arange(regions), choice].sum())
    return best


@pytest.mark.parametrize("large", [2**40, 0], ids=["linear assignment", "paths"])
def test_against_all_solutions(large: int) -> None:
    random = np.random.default_rng(0)
    regimes = set()
    for _ in range(60):
        regions, labels = int(random.integers(1, 7)), int(random.integers(1, 4))
        counts = random.integers(0, 4, labels).tolist()
        similarity = random.normal(0, 1, (regions, labels))
        if random.random() < 0.3:
            similarity = similarity.round()  # ties
        pairs = assign(similarity, counts, large=large)
        if not any(counts):
            assert len(pairs) == 0
            continue
        regimes.add(regions > sum(counts))
        assert len(pairs) == min(regions, sum(counts))
        assert similarity[pairs[:, 0], pairs[:, 1]].sum() == pytest.approx(brute_force(similarity, counts))
    assert regimes == {True, False}


@pytest.mark.parametrize("regions, most", [(300, 9), (120, 40)], ids=["regions to spare", "too few regions"])
def test_large_cases_agree_and_no_exchange_helps(regions: int, most: int) -> None:
    random = np.random.default_rng(1)
    labels = 25
    for _ in range(3):
        offsets = random.normal(0, 0.05, labels)  # some labels are liked by all regions, as with CLIP
        similarity = (random.normal(0.24, 0.02, (regions, labels)) + offsets).astype(np.float32)
        counts = random.integers(1, most, labels).tolist()
        found = [assign(similarity, counts, large=large) for large in (2**40, 0)]
        assert found[0].tolist() == found[1].tolist()
        assert_optimal(similarity.astype(np.float64), counts, found[1])


def assert_optimal(similarity: np.ndarray, counts: list[int], pairs: np.ndarray) -> None:
    """No chain of exchanges gains anything: the exchange graph over labels has no negative cycle and no
    negative way between a label (or "none") that may lose and one that may gain a region."""
    regions, labels = similarity.shape
    cost = np.column_stack([-similarity, np.zeros(regions)])
    label = np.full(regions, labels)
    label[pairs[:, 0]] = pairs[:, 1]
    taken = np.bincount(label, minlength=labels + 1)
    exact = regions > sum(counts)
    move = np.full((labels + 1, labels + 1), np.inf)
    for j in range(labels + 1 if exact else labels):
        members = label == j
        if members.any():
            move[j] = (cost[members] - cost[members, j][:, None]).min(axis=0)
    if not exact:
        move[:, labels] = np.inf  # every region must be used
        spare = taken[:labels] < counts
        move[:labels][:, :labels]  # losing costs nothing where a label need not be full:
        move[np.ix_(np.append(spare, False), np.ones(labels + 1, bool))] = np.minimum(
            move[np.ix_(np.append(spare, False), np.ones(labels + 1, bool))],
            np.append(np.zeros(labels), np.inf),
        )
    distance = np.minimum(move, np.where(np.eye(labels + 1, dtype=bool), 0.0, np.inf))
    for k in range(labels + 1):  # Floyd-Warshall
        distance = np.minimum(distance, distance[:, k : k + 1] + distance[k : k + 1])
    assert (np.diag(distance) > -1e-9).all()


def test_memory_does_not_follow_the_demand(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the repeated matrix was built")

    monkeypatch.setattr(assignment, "_by_linear_assignment", refuse)
    random = np.random.default_rng(2)
    similarity = random.normal(0.2, 0.1, (3000, 8))
    pairs = assign(similarity, [10**12, 5, 700, 700, 700, 700, 3000, 1])
    assert pairs[:, 0].tolist() == list(range(3000))
    assert np.bincount(pairs[:, 1], minlength=8)[[1, 7]].tolist() <= [5, 1]
    assert_optimal(similarity, [3000, 5, 700, 700, 700, 700, 3000, 1], pairs)


def test_tiny_and_huge_similarities() -> None:
    random = np.random.default_rng(3)
    for factor in (1e-12, 1e9):
        similarity = random.normal(0, 1, (30, 4)) * factor
        found = [assign(similarity, [3, 4, 5, 6], large=large).tolist() for large in (2**40, 0)]
        assert found[0] == found[1]


def test_empty_and_wrong_input() -> None:
    assert assign(np.zeros((0, 3)), [1, 1, 1]).shape == (0, 2)
    assert assign(np.zeros((3, 0)), []).shape == (0, 2)
    assert assign(np.zeros((2, 1)), [3.0]).tolist() == [[0, 0], [1, 0]]
    for counts in (["2", 1], [None, 1], [-1, 1], [float("nan"), 1], [1.5, 1]):
        with pytest.raises(ValueError, match="whole number"):
            assign(np.zeros((4, 2)), counts)
    with pytest.raises(ValueError, match="not finite"):
        assign(np.array([[np.nan, 1.0]]), [1, 1])
    with pytest.raises(ValueError, match="belong together"):
        assign(np.zeros((2, 2)), [1])
