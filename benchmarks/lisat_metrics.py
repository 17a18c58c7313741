"""Scores and bootstrap of a GRES-sized test set: the project's path against the published procedure.

python benchmarks/lisat_metrics.py         about a minute of processor time and 320 MB of scratch space
python benchmarks/lisat_metrics.py --tiny  seconds: checks equality, ratios mean nothing

The published bootstrap costs the same for every picture drawn: `timed` of them are timed and counted as
often as there are draws (one whole round is run to compare results). Ours runs all rounds, reading of the
stored table included. Pictures recur (`distinct`): saved masks stay in memory, which favours the published.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from benchmarks.measure import Report, interleaved, ratios  # noqa: E402
from utils.config import parse_config  # noqa: E402

OURS, CODES, PLAIN = "ours, arrays", "ours, codes", "published"
TARGET_IOU, TARGET_BOOTSTRAP = 40.0, 200.0
TOLERANCE = 1e-6


@dataclass
class MetricsConfig:
    """Settings of the benchmark."""

    tiny: bool = False
    """64 px, 12 pictures: checks equality in seconds."""
    images: int = 1500
    """Pictures with one query each."""
    distinct: int = 150
    """Different pictures among them."""
    timed: int = 240
    """Pictures drawn by the published bootstrap that are timed."""
    rounds: int = 20
    """Rounds of the bootstrap."""
    masks: int = 100
    """Masks whose IoU is timed."""
    side: int = 512
    """Height and width in pixels."""
    repeats: int = 3
    """Timed runs of every path, in turns."""
    seed: int = 0
    """Of masks and draws."""

    def validate(self) -> list[str]:
        """Faults, as sentences."""
        names = ("images", "distinct", "timed", "rounds", "masks", "repeats")
        faults = [f"{n} is {getattr(self, n)}; at least 1" for n in names if getattr(self, n) < 1]
        return faults + (["side is less than 16"] if self.side < 16 else [])


def draw_masks(config: MetricsConfig, number: int) -> tuple[np.ndarray, np.ndarray]:
    """bool (H, W) prediction and target: discs, areas about as in GRES (hundreds to ten thousand pixels)."""
    rng = np.random.default_rng((config.seed, number))
    y, x = np.ogrid[: config.side, : config.side]
    radius = np.exp(rng.uniform(np.log(4), np.log(config.side / 8)))
    row, column = rng.integers(0, config.side, 2)
    shift, factor = rng.normal(0, radius / 3, 2), rng.uniform(0.7, 1.3)
    target = (y - row) ** 2 + (x - column) ** 2 <= radius**2
    found = (y - row - shift[0]) ** 2 + (x - column - shift[1]) ** 2 <= (factor * radius) ** 2
    return found, target


def run(config: MetricsConfig) -> Report:
    """Compare results, then time; lines for the screen and whether all was equal."""
    import torch

    torch.set_num_threads(1)
    if config.tiny:
        config = MetricsConfig(
            True, images=12, distinct=7, rounds=5, masks=6, side=64, repeats=config.repeats, seed=config.seed
        )
    with tempfile.TemporaryDirectory() as scratch:
        lines, equal = _ious(config)
        more, same = _bootstrap(config, Path(scratch))
    return Report([*lines, *more], equal and same)


def _ious(config: MetricsConfig) -> tuple[list[str], bool]:
    import torch

    from benchmarks.lisat_metrics_baseline import histogram_counts
    from utils.metrics import mask_counts
    from utils.rle import encode_mask, pixel_counts

    pairs = [draw_masks(config, number) for number in range(config.masks)]
    wide = [tuple(torch.from_numpy(mask.astype(np.int32)) for mask in pair) for pair in pairs]
    codes = [tuple(encode_mask(mask) for mask in pair) for pair in pairs]
    ours, plain = [mask_counts(*pair) for pair in pairs], [histogram_counts(*pair) for pair in wide]
    coded = [pixel_counts(*pair) for pair in codes]
    equal = all(
        [part.tolist() for part in a] == [part.tolist() for part in b] == list(c.values())
        for a, b, c in zip(ours, plain, coded)
    )
    paths: dict[str, Callable[[], object]] = {
        OURS: lambda: [mask_counts(*pair) for pair in pairs],
        CODES: lambda: [pixel_counts(*pair) for pair in codes],
        PLAIN: lambda: [histogram_counts(*pair) for pair in wide],
    }
    timings = interleaved(paths, config.repeats)
    lines = [f"IoU of one {config.side}x{config.side} pair: counts {'equal' if equal else 'DIFFER'}"]
    for name, timing in timings.items():
        lines.append(f"  {name:14} {1e3 * min(timing.cpu) / config.masks:8.3f} ms")
    for name in (OURS, CODES):
        r = ratios(timings[PLAIN], timings[name])
        lines.append(
            f"  {PLAIN} / {name}: CPU {r['cpu_median']:.0f}x (of minima {r['cpu_min']:.0f}x), wall "
            f"{r['wall_median']:.0f}x (of minima {r['wall_min']:.0f}x); aimed at {TARGET_IOU:g}x"
        )
    return lines, equal


def _bootstrap(config: MetricsConfig, scratch: Path) -> tuple[list[str], bool]:
    from benchmarks.lisat_metrics_baseline import save_picture, score_pictures
    from utils.metrics import bootstrap
    from utils.predictions import Predictions, query_record
    from utils.query_table import query_rows, read_counts, write_csv

    records = []
    for number in range(config.distinct):
        found, target = draw_masks(config, number)
        save_picture(scratch, number, found[None], target[None])
        there = {"gt_exists": True, "pred_exists": bool(found.any())}
        records.append(query_record(found, target.astype(np.uint8), query="q", **there))
    images = [
        {"index": number, "image": f"{number}.jpg", "queries": [records[number % config.distinct]]}
        for number in range(config.images)
    ]
    table = write_csv(scratch / "queries.csv", query_rows(Predictions({"dataset": "x"}, images)))
    result = bootstrap(read_counts(table), config.rounds, seed=config.seed)
    draws, per_round = result["drawn_indices"], result["per_round"]
    files = [[number % config.distinct for number in draw] for draw in draws]
    timed = files[-1][: config.timed]
    checked = score_pictures(scratch, files[0])
    worst = max(abs(a - b) for a, b in zip(checked, per_round[0]))
    timings = interleaved(
        {
            OURS: lambda: bootstrap(read_counts(table), config.rounds, seed=config.seed),
            PLAIN: lambda: score_pictures(scratch, timed),
        },
        config.repeats,
    )
    share = len(timed) / sum(map(len, files))
    r = {name: value / share for name, value in ratios(timings[PLAIN], timings[OURS]).items()}
    return [
        f"bootstrap, {config.images} pictures, {config.rounds} rounds: a round differs by {worst:.1e}",
        f"  {OURS:14} {1e3 * min(timings[OURS].cpu):8.1f} ms, all rounds, with reading the table",
        f"  {PLAIN:14} {1e3 * min(timings[PLAIN].cpu) / len(timed):8.1f} ms per picture drawn",
        f"  {PLAIN} / {OURS}: CPU {r['cpu_median']:.0f}x (of minima {r['cpu_min']:.0f}x), wall "
        f"{r['wall_median']:.0f}x (of minima {r['wall_min']:.0f}x); aimed at {TARGET_BOOTSTRAP:g}x",
    ], worst <= TOLERANCE


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its report; exit code 1 if the paths' results differ."""
    report = run(parse_config(MetricsConfig, argv, prog="lisat_metrics.py"))
    print("\n".join(report.lines))
    sys.exit(0 if report.equal else 1)


if __name__ == "__main__":
    main()
