"""Interleaved timing, peak memory in a forked process, and the table that the benchmarks print."""

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any


@dataclass
class Timing:
    """Seconds of every repeat: on the clock, and of this process on a processor (free of what other
    programs on the machine take)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(paths: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time every path `repeats` times, in turns, so that a slow minute of the machine meets them all."""
    timings = {name: Timing() for name in paths}
    for _ in range(repeats):
        for name, path in paths.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            path()
            timings[name].wall.append(time.perf_counter() - wall)
            timings[name].cpu.append(time.process_time() - cpu)
    return timings


@dataclass
class BenchmarkConfig:
    """Settings of a benchmark."""

    tiny: bool = False
    """A model of a few thousand weights: checks equality in seconds; its ratios mean nothing."""
    images: int = 1
    """Pictures."""
    questions: int = 3
    """Questions about each picture."""
    repeats: int = 3
    """Timed runs of every path, in turns."""
    seed: int = 0
    """Seed of the weights, pictures and questions."""

    def validate(self) -> list[str]:
        """Faults, as sentences."""
        names = ("images", "questions", "repeats")
        return [f"{n} is {getattr(self, n)}; at least 1" for n in names if getattr(self, n) < 1]


@dataclass
class Report:
    """What a benchmark found: its lines, and whether the paths' results were equal."""

    lines: list[str]
    equal: bool


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _measured(path: Callable[[], object], sender: Connection) -> None:
    before = _peak_kib()
    path()
    sender.send((before, _peak_kib()))
    sender.close()


def peak_memory(path: Callable[[], object]) -> tuple[float, float]:
    """Peak resident MiB of a process that only runs `path`, and how much of that `path` added.

    The process is forked, so it holds the model already and its peak starts at what is resident now.
    Call this before the paths ran here: what they leave with the allocator would hide a part.
    RuntimeError if the process dies (of too little memory, say).
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(path, sender))
    process.start()
    sender.close()
    try:
        before, after = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the measured process ended with code {process.exitcode}") from None
    process.join()
    return after / 1024, (after - before) / 1024


def measured(paths: Mapping[str, Callable[[], object]], repeats: int, memory: Mapping[str, Any]) -> list[str]:
    """Lines of the result: seconds and memory per path, then the ratios of all others to the first."""
    timings = interleaved(paths, repeats)
    ours, *others = paths
    lines = [f"{'':26}{'CPU s: median (min)':>22}{'wall s: median (min)':>22}{'peak MiB (added)':>20}"]
    for name, t in timings.items():
        cpu, wall = (f"{statistics.median(x):.2f} ({min(x):.2f})" for x in (t.cpu, t.wall))
        peak, added = memory[name]
        lines.append(f"{name:26}{cpu:>22}{wall:>22}{f'{peak:.0f} ({added:.0f})':>20}")
    for name in others:
        r = ratios(timings[name], timings[ours])
        more = memory[name][1] / max(memory[ours][1], 1)
        lines.append(
            f"{name} / {ours}: CPU {r['cpu_median']:.2f}x (of minima {r['cpu_min']:.2f}x), "
            f"wall {r['wall_median']:.2f}x (of minima {r['wall_min']:.2f}x), memory added {more:.1f}x"
        )
    return lines


def ratios(other: Timing, ours: Timing) -> dict[str, float]:
    """Time of `other` over `ours`: medians and minima, CPU and wall."""
    return {
        "cpu_median": statistics.median(other.cpu) / statistics.median(ours.cpu),
        "cpu_min": min(other.cpu) / min(ours.cpu),
        "wall_median": statistics.median(other.wall) / statistics.median(ours.wall),
        "wall_min": min(other.wall) / min(ours.wall),
    }
