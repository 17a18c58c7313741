"""Reports on predictions: every score with how it was obtained, as JSON and as Markdown.

A report is computed from a prediction file alone (`utils.predictions`); no model is needed.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from utils import metrics
from utils.io import StrPath, atomic_write_json, atomic_write_text
from utils.predictions import Predictions, decode_mask, target_mask
from utils.visualize import gallery, score_table, side_by_side, write_image

logger = logging.getLogger(__name__)

Report = dict[str, Any]


def build_report(
    predictions: Predictions,
    *,
    shuffle: bool = False,
    recount: bool = False,
    seed: int = 0,
    level: float = 0.95,
) -> Report:
    """All scores of a prediction file.

    Args:
        shuffle: add the control in which each query gets the prediction of another query of its picture.
        recount: count pixels again instead of trusting the counts in the file.
        seed: of the control's draws and of the confidence intervals. level: of those intervals.

    Returns:
        {"header", "complete", "scores", "by_kind", "by_size", "confidence": {score: [low, high]},
        "confidence_level", and with `shuffle` "shuffled" and "shuffled_by_kind"}; see `utils.metrics.scores`.
    """
    counts = predictions.counts(recount)
    report: Report = {"header": predictions.header, "complete": predictions.complete}
    report["scores"] = metrics.scores(counts)
    report["by_kind"] = metrics.scores_by_kind(counts)
    report["by_size"] = metrics.scores_by_size(counts)
    intervals = metrics.confidence_intervals(counts, level=level, seed=seed)
    report |= {
        "confidence_level": level,
        "confidence": {name: list(edges) for name, edges in intervals.items()},
    }
    if shuffle:
        control = predictions.shuffled_counts(seed)
        if len(control):
            report["shuffled"] = metrics.scores(control)
            report["shuffled_by_kind"] = metrics.scores_by_kind(control)
        else:
            logger.warning("no picture has two queries with different targets: no control is possible")
    return report


def build_bootstrap(
    predictions: Predictions, rounds: int = 20, fraction: float = 0.8, seed: int | None = 0
) -> Report:
    """The published bootstrap of a prediction file (`utils.metrics.bootstrap`) with the file's header."""
    result = metrics.bootstrap(predictions.counts(), rounds, fraction, seed)
    return {"header": predictions.header, "complete": predictions.complete, "bootstrap": result}


def report_markdown(report: Mapping[str, Any]) -> str:
    """Markdown of a report or a bootstrap: the protocol first, then the tables."""
    header = report["header"]
    lines = [f"# {header.get('dataset', 'predictions')}", ""]
    lines += [f"- {name}: {value}" for name, value in header.items() if value not in (None, "")]
    if not report["complete"]:
        lines += ["", "**Not complete: pictures are still missing.**"]
    if "scores" in report:
        level = round(100 * report["confidence_level"])
        spans = report["confidence"].items()
        lines += ["", score_table({"all": report["scores"]} | _named("shuffled", report.get("shuffled")))]
        ranges = ", ".join(f"{_TITLES[name]} {low:.3f} to {high:.3f}" for name, (low, high) in spans)
        lines += ["", f"{level} % interval over pictures: {ranges}"]
        tables = {"kind": "by_kind", "target size": "by_size", "shuffled, by kind": "shuffled_by_kind"}
        for title, key in tables.items():
            if set(report.get(key, {})) - {""}:
                lines += ["", score_table(report[key], first=title)]
    if "bootstrap" in report:
        found = report["bootstrap"]
        lines += ["", f"Bootstrap: {found['rounds']} rounds of {found['fraction']:.0%} of the pictures, "]
        lines[-1] += f"seed {found['seed']}"
        for name, title in _TITLES.items():
            mean, deviation = found[f"{name}_mean"], found[f"{name}_std"]
            lines.append(f"- {title}: {100 * mean:.2f} ± {100 * deviation:.2f} %")
    return "\n".join(lines) + "\n"


_TITLES = {"giou": "gIoU", "ciou": "cIoU", "see_accuracy": "see accuracy"}


def _named(name: str, row: Any) -> dict[str, Any]:
    return {name: row} if row else {}


def write_report(folder: StrPath, name: str, report: Report) -> tuple[Path, Path]:
    """Write `<name>.json` and `<name>.md` into `folder`; returns both paths."""
    folder = Path(folder)
    json_path = atomic_write_json(folder / f"{name}.json", report)
    return json_path, atomic_write_text(folder / f"{name}.md", report_markdown(report))


def write_gallery(
    path: StrPath,
    predictions: Predictions,
    load_image: Callable[[str], np.ndarray],
    number: int = 12,
    seed: int = 0,
    columns: int = 2,
) -> Path | None:
    """One picture of `number` queries drawn from the predictions: scene, ground truth, prediction, words.

    `load_image` gives the RGB picture of an image path. None where there is nothing to show.
    """
    pairs = [(image, record) for image in predictions.images for record in image["queries"]]
    if not pairs or number < 1:
        return None
    drawn = np.random.default_rng(seed).permutation(len(pairs))[:number]
    tiles = []
    for image, record in (pairs[k] for k in sorted(drawn)):
        prediction, target = decode_mask(record["prediction"]), target_mask(record)
        iou = metrics.mask_iou(prediction, target)
        score = "" if record.get("score") is None else f", score {record['score']:.2f}"
        text = f"{record['query']}  [{record.get('kind') or 'query'}]\nIoU {iou:.2f}{score}"
        tiles.append(side_by_side(load_image(image["image"]), target, prediction, text, least=192))
    return write_image(path, gallery(tiles, columns))
