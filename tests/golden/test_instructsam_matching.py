"""The count-constrained assignment against the published solver's results, special cases included."""

import json

import numpy as np
import pytest

from model.instructsam.assignment import assign
from tests.conftest import require_golden

FOLDER = require_golden("instructsam") / "matching"
CASES = json.loads((FOLDER / "cases.json").read_text())
SPECIAL = json.loads((FOLDER / "special.json").read_text())
SOLVERS = {"linear assignment": 2**40, "paths": 0}
"""our two methods, forced by the size from which on paths are used"""


def objective(similarity: np.ndarray, pairs: np.ndarray) -> float:
    return float((1 - similarity.astype(np.float64))[pairs[:, 0], pairs[:, 1]].sum())


def check_constraints(pairs: np.ndarray, regions: int, counts: list[float]) -> None:
    assert len(set(pairs[:, 0].tolist())) == len(pairs)
    taken = np.bincount(pairs[:, 1], minlength=len(counts))
    total = sum(counts)
    if regions > total:
        assert taken.tolist() == counts
    else:
        assert len(pairs) == regions and (taken <= np.array(counts)).all()


@pytest.mark.parametrize("large", SOLVERS.values(), ids=SOLVERS)
def test_cases(large: int) -> None:
    with np.load(FOLDER / "cases.npz") as matrices:
        for case in CASES:
            similarity, counts = matrices[f"S{case['case']}"], list(case["counts"].values())
            pairs = assign(similarity, counts, large=large)
            assert pairs.tolist() == case["assignments"], case["case"]
            assert objective(similarity, pairs) == pytest.approx(case["objective_sum_of_1_minus_s"], abs=1e-6)
            check_constraints(pairs, len(similarity), counts)


@pytest.mark.parametrize("large", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("case", SPECIAL, ids=lambda case: case["case"])
def test_special_cases(case, large: int) -> None:
    with np.load(FOLDER / "special.npz") as matrices:
        similarity = matrices[case["case"]]
    counts = list(case["counts"].values())
    if "raises" in case:
        with pytest.raises(ValueError, match="count|finite"):
            assign(similarity, counts, "published", large)
        return
    pairs = assign(similarity, counts, "published", large)
    assert objective(similarity, pairs) == pytest.approx(case["objective_sum_of_1_minus_s"], abs=1e-6)
    assert len(pairs) == len(case["assignments"])
    if len(np.unique(similarity)) > 1:  # without ties the pairs are determined
        assert pairs.tolist() == case["assignments"]
    if len(pairs):
        check_constraints(pairs, len(similarity), counts)
    if any(count != int(count) for count in counts):
        with pytest.raises(ValueError, match="whole number"):
            assign(similarity, counts)
