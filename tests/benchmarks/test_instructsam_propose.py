"""The proposal benchmark at tiny size: both paths agree, and a path that does not is caught."""

import pytest

from benchmarks import instructsam_propose as benchmark


def test_both_paths_agree() -> None:
    report = benchmark.run(benchmark.ProposeBenchmarkConfig(tiny=True))
    assert report.equal, "\n".join(report.lines)
    assert sum("straightforward / ours: CPU" in line for line in report.lines) == 2


def test_other_masks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    config = benchmark.ProposeBenchmarkConfig(side=160, points_per_side=3)
    ours, plain = (path() for path in benchmark.disc_paths(config).values())
    assert benchmark.compared(ours, plain)[0] and len(ours) > 3
    assert not benchmark.compared(ours[1:], plain)[0]
    assert not benchmark.compared([ours[1], ours[0], *ours[2:]], plain)[0]
    assert not benchmark.compared([], [])[0]
