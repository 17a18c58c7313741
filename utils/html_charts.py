"""Charts of the HTML report as inline SVG texts; colours come from the page (`utils.html_report`)."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 14, 14, 44
_MOST_DOTS = 4000


def histogram(values: Sequence[float], bins: int = 20) -> tuple[str, list[tuple[str, str]]]:
    """(SVG, rows of the same numbers) of values in 0..1, with a line at their mean."""
    counts, edges = np.histogram(np.clip(values, 0, 1), bins=bins, range=(0, 1))
    ticks = _counts_ticks(int(counts.max()) if len(values) else 1)
    top = ticks[-1]
    parts = _frame("IoU", "queries", [(x, f"{x:g}") for x in (0, 0.2, 0.4, 0.6, 0.8, 1)], _ticks(ticks, top))
    for count, low, high in zip(counts.tolist(), edges, edges[1:]):
        if not count:
            continue
        x, width, y = _x(low) + 1, _x(high) - _x(low) - 2, _y(count / top)
        parts.append(
            f'<rect class="bar" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_y(0) - y:.1f}">'
            f"<title>{low:.2f} to {high:.2f}: {count}</title></rect>"
        )
    mean = float(np.mean(values)) if len(values) else 0.0
    parts += _mark(_x(mean), f"mean {mean:.3f}")
    rows = [(f"{low:.2f} to {high:.2f}", str(n)) for n, low, high in zip(counts.tolist(), edges, edges[1:])]
    return _svg(parts, f"Histogram of the IoU of {len(values)} queries; mean {mean:.3f}"), rows


def against_size(
    areas: Sequence[int], ious: Sequence[float], large_area: int | None, seed: int = 0
) -> tuple[str, list[tuple[str, str, str]]]:
    """(SVG, rows of the bins) of IoU over target area (> 0, logarithmic): a dot per query, means per bin, a
    line where targets begin to be called large (None: nowhere)."""
    area, iou = np.asarray(areas, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    low = math.floor(math.log2(max(1.0, area.min()))) if len(area) else 0
    high = max(low + 1, math.ceil(math.log2(area.max() + 1)) if len(area) else 1)
    span = high - low
    step = max(1, span // 6)
    x_ticks = [((power - low) / span, _pixels(2**power)) for power in range(low, high + 1, step)]
    parts = _frame(
        "target size (pixels, logarithmic)",
        "IoU",
        x_ticks,
        [(y, f"{y:g}") for y in (0, 0.2, 0.4, 0.6, 0.8, 1)],
    )
    place = (np.log2(np.maximum(area, 1)) - low) / span
    shown = np.arange(len(area))
    if len(shown) > _MOST_DOTS:
        shown = np.sort(np.random.default_rng(seed).permutation(len(shown))[:_MOST_DOTS])
    dots = [f"M{_x(place[k]):.1f} {_y(iou[k]):.1f}h0" for k in shown]
    parts.append(f'<path class="dots" d="{"".join(dots)}"/>')
    if large_area and low < math.log2(large_area) < high:
        parts += _mark(_x((math.log2(large_area) - low) / span), f"{large_area} px")
    rows, line = [], []
    for power in range(low, high):
        inside = (area >= 2**power) & (area < 2 ** (power + 1))
        if inside.any():
            mean = float(iou[inside].mean())
            line.append((_x((power + 0.5 - low) / span), _y(mean)))
            name = f"{2**power} to {2 ** (power + 1) - 1} px"
            rows.append((name, str(int(inside.sum())), f"{mean:.3f}"))
    if line:
        steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<polyline class="line" points="{steps}"/>')
        for (x, y), (name, count, mean) in zip(line, rows):
            parts.append(
                f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                f"<title>{name}: mean {mean} of {count}</title></circle>"
            )
    return _svg(parts, f"IoU of {len(area)} queries against the size of their targets"), rows


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _x(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _frame(
    x_title: str,
    y_title: str,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
) -> list[str]:
    parts = []
    for share, text in y_ticks:
        y = _y(share)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for share, text in x_ticks:
        x, y = _x(share), HEIGHT - _BOTTOM + 17
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{text}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{x_title}</text>')
    centre = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text transform="translate(13 {centre}) rotate(-90)" text-anchor="middle">{y_title}</text>'
    )
    return parts


def _mark(x: float, text: str) -> list[str]:
    """A dashed upright line with a text on the side that has room."""
    right = x < WIDTH * 0.75
    anchor, shift = ("start", 5) if right else ("end", -5)
    return [
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_y(0):.1f}"/>',
        f'<text class="marked" x="{x + shift:.1f}" y="{_TOP + 10}" text-anchor="{anchor}">{text}</text>',
    ]


def _counts_ticks(most: int) -> list[int]:
    """0 and up to five round numbers, the last one at or above `most`."""
    steps = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    step = next(step for step in steps if step * 5 >= most)
    return list(range(0, max(1, math.ceil(most / step)) * step + 1, step))


def _ticks(values: Sequence[int], top: int) -> list[tuple[float, str]]:
    return [(value / top, str(value)) for value in values]


def _pixels(count: int) -> str:
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if count >= size:
            return f"{count // size}{letter}"
    return str(count)
