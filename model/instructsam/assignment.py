"""Which region gets which label: the exact optimum under counts, in polynomial time.

Shapes: N regions, M labels, T = sum of the counts, P = min(N, T) chosen pairs.

Choose P pairs with the largest sum of similarities, at most one per region, and of label j exactly c_j
(N > T) or at most c_j (N <= T: then every region is used). InstructSAM states this as a binary program
(arXiv 2505.15818, equation of section 3.4) and hands it to a branch-and-cut solver. The constraints form a
transportation problem, so two polynomial methods give the same optimum:

* small demand: one linear assignment in which label j stands min(c_j, N) times (scipy, C++);
* large demand: successive shortest paths over the M labels, in whole numbers. Memory is N x M, whatever
  the counts are.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

LARGE = 2**22
"""Entries of the repeated matrix (N times the copies of all labels) from which on paths are used."""


def assign(
    similarity: np.ndarray,
    counts: Sequence[Any],
    fractions: Literal["refuse", "published"] = "refuse",
    large: int = LARGE,
) -> np.ndarray:
    """Optimal pairs (region, label), int64 (P, 2), ordered by region.

    Args:
        similarity: (N, M), finite; larger is better. N or M may be 0.
        counts: M whole numbers >= 0 (3.0 is a whole number).
        fractions: `published` treats fractional counts as the published program does: no solution (no pairs)
            where they would have to hold exactly, rounded down where they are upper bounds.
        large: see `LARGE`.

    Raises:
        ValueError: values that are not finite, counts that are no numbers >= 0 or, with `refuse`, fractional.
    """
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or similarity.shape[1] != len(counts):
        raise ValueError(f"similarities {similarity.shape} and {len(counts)} counts do not belong together")
    if not np.isfinite(similarity).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(similarity))} similarities are not finite: is the CLIP "
            "checkpoint damaged, or half precision too small for it?"
        )
    capacity = _capacities(counts, len(similarity), fractions)
    if capacity is None or not len(similarity) or not capacity.any():
        return np.zeros((0, 2), np.int64)
    value = similarity.astype(np.float64)
    if len(value) * int(capacity.sum()) <= large:
        pairs = _by_linear_assignment(value, capacity)
    else:
        pairs = _by_paths(value, capacity)
    return pairs[np.argsort(pairs[:, 0])]


def _capacities(counts: Sequence[Any], regions: int, fractions: str) -> np.ndarray | None:
    """Counts cut to N, int64 (M,); None where fractional counts admit no solution."""
    for number, count in enumerate(counts):
        good = isinstance(count, int | float | np.integer | np.floating) and count >= 0  # not true of NaN
        if not good or (fractions == "refuse" and count != math.inf and count != int(count)):
            raise ValueError(f"count {number} is {count!r}; expected a whole number >= 0")
    total = sum(counts)
    whole = np.array([min(count, regions) for count in counts], np.float64)
    floors = np.floor(whole).astype(np.int64)
    exact = regions > total
    if (exact and (floors != whole).any()) or (not exact and floors.sum() < regions):
        return None
    return floors


def _by_linear_assignment(value: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    label = np.repeat(np.arange(len(capacity)), capacity)
    slots, regions = linear_sum_assignment(value.T[label], maximize=True)
    return np.stack([regions, label[slots]], axis=1)


def _by_paths(value: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Every region takes its best label; then over-full labels pass regions on along cheapest paths.

    Where regions may stay free, "no label" is one more label that takes exactly the rest; as all numbers are
    then exact, a constant per label changes no solution and is chosen so that few regions must move.
    """
    regions, labels = value.shape
    free = regions - int(capacity.sum())
    cost = -value
    if free >= 0:
        cost = cost - cost.mean(axis=0)
        best = cost.min(axis=1)
        rest = best.max() + 1 if free == 0 else np.partition(best, regions - free)[regions - free]
        cost = np.column_stack([cost, np.full(regions, rest)])
        capacity = np.append(capacity, free)
    chosen = _transport(_whole_costs(cost), capacity)
    used = np.flatnonzero(chosen < labels)
    return np.stack([used, chosen[used]], axis=1)


def _whole_costs(cost: np.ndarray) -> np.ndarray:
    """Costs as int64 on the finest grid whose path sums cannot overflow: about 2^-50 of the largest cost.
    Whole numbers keep the search for paths free of rounding, and so of endless rounds."""
    largest = max(float(np.abs(cost).max()), 1e-30)
    exponent = math.floor(math.log2(2.0**60 / (2 * (cost.shape[1] + 2) * largest)))
    return np.rint(np.ldexp(cost, exponent)).astype(np.int64)


_FAR = np.int64(2**61)


def _transport(cost: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Label of each region, int64 (N,): every region gets one, label j at most capacity_j, least total.

    Successive shortest paths: the start is optimal without capacities, and moving one region each along a
    cheapest path from an over-full to a spare label keeps it optimal for the numbers reached.
    """
    labels = cost.shape[1]
    chosen = cost.argmin(axis=1)
    size = np.bincount(chosen, minlength=labels)
    move = np.full((labels, labels), _FAR)  # least extra cost of passing a region from label j to label k
    who = np.zeros((labels, labels), np.int64)

    def refresh(label: int) -> None:
        members = np.flatnonzero(chosen == label)
        if len(members):
            extra = cost[members] - cost[members, label][:, None]
            first = extra.argmin(axis=0)
            move[label], who[label] = extra[first, np.arange(labels)], members[first]
        else:
            move[label] = _FAR
        move[label, label] = _FAR

    for label in range(labels):
        refresh(label)
    while (size > capacity).any():
        distance, before = _distances(move, np.flatnonzero(size > capacity))
        spare = np.flatnonzero(size < capacity)
        at = end = int(spare[distance[spare].argmin()])
        touched = {at}
        steps = []
        while before[at] >= 0:
            steps.append((who[before[at], at], at))
            at = int(before[at])
            touched.add(at)
        for region, label in steps:
            chosen[region] = label
        size[at] -= 1
        size[end] += 1
        for label in touched:
            refresh(label)
    return chosen


def _distances(move: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cheapest ways from any of `starts` to every label (Bellman-Ford): cost, and label before (-1: none)."""
    distance = np.full(len(move), _FAR)
    before = np.full(len(move), -1)
    distance[starts] = 0
    for _ in range(len(move)):
        through = distance[:, None] + move
        least = through.min(axis=0)
        better = least < distance
        if not better.any():
            break
        before[better] = through[:, better].argmin(axis=0)
        distance = np.where(better, least, distance)
    return distance, before
