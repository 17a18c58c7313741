"""The InstructSAM benchmarks at tiny size: the paths agree, and one that does not is caught."""

import pytest

from benchmarks import instructsam, instructsam_baseline
from benchmarks.instructsam import InstructSamBenchmark


def test_mask_f1_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    config = InstructSamBenchmark(part="evaluation", tiny=True, repeats=1)
    assert instructsam.run(config).equal
    exact = instructsam_baseline.pair_iou_rle
    monkeypatch.setattr(instructsam_baseline, "pair_iou_rle", lambda a, b: exact(a, b) / 2)
    report = instructsam.run(config)
    assert not report.equal and any("DIFFERENT" in line for line in report.lines)


def test_matching_paths_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pulp", reason="PuLP is only needed for this benchmark: pip install pulp==3.3.2")
    config = InstructSamBenchmark(part="matching", tiny=True, repeats=1)
    assert instructsam.run(config).equal
    exact = instructsam_baseline.integer_program
    monkeypatch.setattr(instructsam_baseline, "integer_program", lambda s, c: exact(-s, c))
    assert not instructsam.run(config).equal
