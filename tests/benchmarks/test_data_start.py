"""The start-up benchmark at small size: both ways give the same data."""

from pathlib import Path

from benchmarks.data_start import StartConfig, run


def test_both_ways_agree(tmp_path: Path) -> None:
    lines = run(StartConfig(files=5, repeats=1, folder=str(tmp_path)))
    assert len(lines) == 4 and lines[-1].startswith("equal; ")
