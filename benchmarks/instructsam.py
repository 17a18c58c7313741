"""InstructSAM: matching against PuLP's branch and cut, mask F1 of a whole set against pair by pair.

python benchmarks/instructsam.py            a few minutes; --tiny for seconds
The matching needs PuLP, which the project itself does not: pip install pulp==3.3.2
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report  # noqa: E402
from utils.config import parse_config  # noqa: E402

MATCHING_TARGET, EVALUATION_TARGET = 300.0, 10.0
TOLERANCE = 1e-6


@dataclass
class InstructSamBenchmark:
    """What to measure, and how large."""

    part: Literal["all", "matching", "evaluation"] = "all"
    """Which comparison."""
    regions: int = 1000
    """Proposals of the picture."""
    labels: int = 100
    """Labels with counts."""
    images: int = 40
    """Pictures of the evaluated set, of 800 x 800 pixels."""
    objects: int = 40
    """Objects in each picture, of five classes."""
    repeats: int = 20
    """Runs of our paths (the median counts); the straightforward ones run once."""
    seed: int = 0
    """Seed of the inputs."""
    tiny: bool = False
    """Small inputs: checks equality in seconds; the ratios mean nothing."""

    def validate(self) -> list[str]:
        """Faults, as sentences."""
        names = ("regions", "labels", "images", "objects", "repeats")
        return [f"{n} is {getattr(self, n)}; at least 1" for n in names if getattr(self, n) < 1]


def _processor() -> float:
    """Seconds of processor time of this process and of those it started (CBC is a program of its own)."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def _timed(path: Callable[[], Any], repeats: int = 1) -> tuple[Any, float, float]:
    """Result, and medians of clock and processor seconds."""
    walls, cpus, result = [], [], None
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), _processor()
        result = path()
        cpus.append(_processor() - cpu)
        walls.append(time.perf_counter() - wall)
    return result, statistics.median(walls), statistics.median(cpus)


def _line(name: str, wall: float, cpu: float, ours: tuple[float, float] | None = None) -> str:
    ratio = f"   {wall / ours[0]:.0f}x on the clock, {cpu / ours[1]:.0f}x processor time" if ours else ""
    return f"  {name:34}{wall:10.4f} s clock{cpu:10.4f} s processor{ratio}"


def matching(config: InstructSamBenchmark) -> Report:
    """One picture, once with regions to spare and once (fewer regions) without."""
    from benchmarks.instructsam_baseline import integer_program, random_similarities
    from model.instructsam.assignment import assign

    regions, labels = (60, 8) if config.tiny else (config.regions, config.labels)
    lines, equal = [], True
    for title, number, most in (("enough regions", regions, 7), ("too few regions", regions // 4, 7)):
        similarity, counts = random_similarities(number, labels, most, config.seed)
        assign(similarity, counts)  # imports
        ours, wall, cpu = _timed(lambda s=similarity, c=counts: assign(s, c), config.repeats)
        theirs, plain_wall, plain_cpu = _timed(lambda s=similarity, c=counts: integer_program(s, c))
        cost = 1 - similarity.astype(float)
        sums = [float(cost[pairs[:, 0], pairs[:, 1]].sum()) for pairs in (ours, theirs)]
        same = len(ours) == len(theirs) and abs(sums[0] - sums[1]) <= TOLERANCE
        equal &= same
        lines += [
            f"matching, {title}: {number} x {labels}, {sum(counts)} wanted; objectives {sums[0]:.9f} and "
            f"{sums[1]:.9f} ({'equal' if same else 'DIFFERENT'}), pairs "
            f"{'equal' if ours.tolist() == theirs.tolist() else 'different'}",
            _line("ours", wall, cpu),
            _line("PuLP + CBC", plain_wall, plain_cpu, (wall, cpu)),
        ]
    return Report([*lines, f"aim: {MATCHING_TARGET:.0f}x with the same optimum"], equal)


def evaluation(config: InstructSamBenchmark) -> Report:
    """Mask F1 of a synthetic set: all counts must be equal."""
    from benchmarks import instructsam_baseline as plain
    from utils.instructsam_eval_data import place_predictions, read_truth
    from utils.instructsam_eval_scores import count_matches, find_overlaps

    images, objects, side = (3, 10, 100) if config.tiny else (config.images, config.objects, 800)
    content, predictions = plain.random_set(images, objects, 5, side, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(content))
        truth = read_truth(path)
    placed = place_predictions(predictions, truth)

    def ours() -> dict[str, list[int]]:
        hits, kept, there = count_matches(find_overlaps(truth, placed, "segm"), list(truth.classes))
        rows = zip(truth.classes.values(), hits[0].tolist(), kept[0].tolist(), there.tolist())
        return {name: [tp, number - tp, total - tp] for name, tp, number, total in rows}

    ours()  # imports
    found, wall, cpu = _timed(ours, config.repeats)
    lines = [
        f"mask F1: {images} pictures {side} x {side}, {len(truth.annotations)} objects, "
        f"{len(placed)} predictions"
    ]
    lines.append(_line("ours", wall, cpu))
    equal = True
    for name, pair_iou in (
        ("pair by pair, codes", plain.pair_iou_rle),
        ("pair by pair, pixels", plain.pair_iou_pixels),
    ):
        expected, plain_wall, plain_cpu = _timed(lambda f=pair_iou: plain.matches_per_pair(truth, placed, f))
        equal &= found == expected
        told = "" if found == expected else "  DIFFERENT COUNTS"
        lines.append(_line(name, plain_wall, plain_cpu, (wall, cpu)) + told)
    lines.append(f"  tp, fp, fn: {found}")
    return Report([*lines, f"aim: {EVALUATION_TARGET:.0f}x with the same counts"], equal)


def run(config: InstructSamBenchmark) -> Report:
    """The parts asked for."""
    parts = {"matching": matching, "evaluation": evaluation}
    reports = [part(config) for name, part in parts.items() if config.part in ("all", name)]
    return Report([line for report in reports for line in report.lines], all(r.equal for r in reports))


if __name__ == "__main__":
    found = run(parse_config(InstructSamBenchmark))
    print("\n".join(found.lines))
    sys.exit(0 if found.equal else 1)
