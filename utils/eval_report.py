"""Reports on predictions: every score with how it was obtained, as JSON and as Markdown.

A report is computed from a prediction file alone (`utils.predictions`); no model is needed.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils import metrics
from utils.boundary import boundary_iou
from utils.io import StrPath, atomic_write_json, atomic_write_text
from utils.predictions import Predictions, decode_mask, target_mask
from utils.query_table import boundary_pairs
from utils.size_subsets import rule_text, size_of
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
    thresholds: Sequence[float] = metrics.PRECISION_THRESHOLDS,
    boundary: bool = True,
    rounds: int = 20,
    fraction: float = 0.8,
) -> Report:
    """All scores of a prediction file.

    Args:
        shuffle: add the control in which each query gets the prediction of another query of its picture.
        recount: count pixels again instead of trusting the counts in the file.
        seed: of the control's draws, the bootstrap and the confidence intervals. level: of those intervals.
        thresholds: of the precisions.
        boundary: add boundary IoU (`utils.boundary`), a few milliseconds per query.
        rounds, fraction: of the published bootstrap.

    Returns:
        {"header", "complete", "scores", "by_kind", "by_size", "size_rule", "presence", "confidence": {score:
        [low, high]}, "confidence_level", "bootstrap", and with `shuffle` "shuffled" and "shuffled_by_kind"};
        see `utils.metrics` (`scores`, `presence_scores`, `bootstrap`).
    """
    counts = predictions.counts(recount)
    pairs = boundary_pairs(predictions) if boundary else None
    report: Report = {"header": predictions.header, "complete": predictions.complete}
    sizes, rule = _sizes(predictions, counts)
    report["scores"] = metrics.scores(counts, thresholds)
    report["by_kind"] = metrics.scores_by(counts, counts.kind, thresholds)
    report["by_size"] = metrics.scores_by(counts, sizes, thresholds)
    report |= {"size_rule": rule, "presence": metrics.presence_scores(counts)}
    ratios = metrics.score_ratios(counts, thresholds) | metrics.presence_ratios(counts)
    if pairs is not None:
        values = np.array([boundary_iou(*pair) for pair in pairs.tolist()])
        ratios["boundary_iou"] = (values, np.ones(len(values)))
        report["scores"]["boundary_iou"] = float(values.mean())
        for table, labels in (("by_kind", counts.kind), ("by_size", sizes)):
            array = np.asarray(labels, dtype=object)
            for label, row in report[table].items():
                row["boundary_iou"] = float(values[array == label].mean())
    intervals = metrics.confidence_intervals(counts, level=level, seed=seed, ratios=ratios)
    report |= {
        "confidence_level": level,
        "confidence": {name: list(edges) for name, edges in intervals.items()},
    }
    if int(fraction * counts.n_images) >= 1:
        report["bootstrap"] = metrics.bootstrap(counts, rounds, fraction, seed)
        for name in ("drawn_indices", "per_round"):
            del report["bootstrap"][name]
    if shuffle:
        control = predictions.shuffled_counts(seed)
        if len(control):
            report["shuffled"] = metrics.scores(control, thresholds)
            report["shuffled_by_kind"] = metrics.scores_by_kind(control, thresholds)
        else:
            logger.warning("no picture has two queries with different targets: no control is possible")
    return report


def _sizes(predictions: Predictions, counts: metrics.Counts) -> tuple[list[str], str]:
    """Size label of every query, and the rule behind them."""
    records = [record for image in predictions.images for record in image["queries"]]
    if all("size_class" in record for record in records):
        return [record["size_class"] for record in records], predictions.header.get("size_rule") or ""
    raster = predictions.header.get("raster")
    rule = rule_text()
    if raster not in (None, "official"):
        rule += f"; measured here in the {raster} raster"
    return [size_of(area) for area in counts.target[:, 1].tolist()], rule


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
        ranges = ", ".join(f"{title(name)} {low:.3f} to {high:.3f}" for name, (low, high) in spans)
        lines += ["", f"{level} % interval over pictures: {ranges}"]
        lines += ["", *_presence_lines(report["presence"])] if report.get("presence") else []
        tables = {"kind": "by_kind", "target size": "by_size", "shuffled, by kind": "shuffled_by_kind"}
        for first, key in tables.items():
            if set(report.get(key, {})) - {""}:
                lines += ["", score_table(report[key], first=first)]
        if report.get("size_rule"):
            lines += ["", f"Sizes: {report['size_rule']}."]
    if "bootstrap" in report:
        found = report["bootstrap"]
        lines += ["", f"Bootstrap: {found['rounds']} rounds of {found['fraction']:.0%} of the pictures, "]
        lines[-1] += f"seed {found['seed']}"
        for name in ("giou", "ciou", "see_accuracy"):
            mean, deviation = found[f"{name}_mean"], found[f"{name}_std"]
            lines.append(f"- {title(name)}: {100 * mean:.2f} ± {100 * deviation:.2f} %")
    return "\n".join(lines) + "\n"


_TITLES = {
    "giou": "gIoU",
    "ciou": "cIoU",
    "see_accuracy": "see accuracy",
    "boundary_iou": "boundary IoU",
    "denial_rate": "denial rate",
    "false_alarm_area": "false-alarm area",
    "false_denial_rate": "false denials",
}


def title(name: str) -> str:
    """How tables call a score: `giou` -> gIoU, `pr@0.5` -> Pr@0.5."""
    return _TITLES.get(name, name.replace("pr@", "Pr@"))


def _presence_lines(found: Mapping[str, float]) -> list[str]:
    """Sentences on presence; empty where the data ask about nothing absent and nothing is denied."""
    if not found["n_absent"] and not found.get("false_denial_rate"):
        return []
    shares = [f"{title(name)} {found[name]:.3f}" for name in _TITLES if name in found]
    return [f"Presence ({found['n_absent']} absent, {found['n_present']} present): {', '.join(shares)}"]


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
