"""The benchmark of scores at tiny size: all paths agree, and one that does not is caught."""

import numpy as np
import pytest
import torch

from benchmarks import lisat_metrics, lisat_metrics_baseline
from utils.metrics import mask_counts

TINY = lisat_metrics.MetricsConfig(tiny=True, repeats=1)


def test_paths_agree_and_a_wrong_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    report = lisat_metrics.run(TINY)
    assert report.equal and sum("aimed at" in line for line in report.lines) == 3
    score = lisat_metrics_baseline.score_pictures
    monkeypatch.setattr(
        lisat_metrics_baseline, "score_pictures", lambda *a: (score(*a)[0] + 1e-4, score(*a)[1])
    )
    assert not lisat_metrics.run(TINY).equal


def test_histograms_equal_counts_with_ignored_pixels() -> None:
    rng = np.random.default_rng(0)
    target = rng.choice([0, 1, 255], (30, 40)).astype(np.int32)
    prediction = rng.integers(0, 2, (30, 40)).astype(np.int32)
    plain = lisat_metrics_baseline.histogram_counts(torch.from_numpy(prediction), torch.from_numpy(target))
    ours = mask_counts(prediction, target)
    assert [part.tolist() for part in plain] == [part.tolist() for part in ours]
