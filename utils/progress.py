"""Progress of a run: a bar with throughput and time left, and memory in use."""

import os
import sys
import time
from typing import Any

import torch


class Progress:
    """Progress over optimiser steps; the bar is drawn only on a terminal (elsewhere the log says it)."""

    def __init__(self, total: int, first: int, enabled: bool = True) -> None:
        self.started = time.monotonic()
        self.first = first
        self.total = total
        self.step = first
        self._images = 0.0
        self._window_start = self.started
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=first, unit="step", mininterval=0.5, dynamic_ncols=True)

    @property
    def shown(self) -> bool:
        """True if a bar is drawn (then log lines need not go to the terminal as well)."""
        return self._bar is not None

    def advance(self, step: int, images: int) -> None:
        """`step` steps are done now; the last one took `images` images over all processes."""
        if self._bar is not None:
            self._bar.update(step - self.step)
        self.step = step
        self._images += images

    def throughput(self) -> float:
        """Images per second since the last call, over all processes."""
        now = time.monotonic()
        rate = self._images / max(1e-9, now - self._window_start)
        self._images, self._window_start = 0.0, now
        return rate

    def pause(self) -> "_Pause":
        """Context in which time does not count towards throughput (validation, saving)."""
        return _Pause(self)

    def seconds_left(self) -> float:
        """Expected seconds to the end, from the mean time per step since the start."""
        done = self.step - self.first
        return (time.monotonic() - self.started) / done * (self.total - self.step) if done else float("nan")

    def describe(self, text: str) -> None:
        """Short text behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Leave the bar as it is and stop drawing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Pause:
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __enter__(self) -> None:
        self.begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.progress._window_start += time.monotonic() - self.begun


def memory_gib(device: torch.device) -> float:
    """Memory in GiB: highest allocation on a GPU since the start, resident size of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except OSError:
        return float("nan")


def clock(seconds: float) -> str:
    """`3725` -> `1:02:05`; unknown times as `?`."""
    if seconds != seconds:
        return "?"
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
