"""Scores of any program's predictions on any data set of ours (logic of `evaluate.py`).

The data set says what is asked and which pixels are right; predictions come from a prediction file or from a
folder of PNG masks. Everything that the two disagree about is named; it stops the run, or counts as an empty
mask where that is asked for.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from utils.metrics import LARGE_AREA, PRECISION_THRESHOLDS

if TYPE_CHECKING:
    from utils.match_predictions import Mismatch, Picture
    from utils.predictions import Predictions

logger = logging.getLogger(__name__)

_LISTED = 20
_CARRIED = ("system", "checkpoint", "eval_prompt", "conv_type")
_WORTH_PROCESSES = 300  # pictures


@dataclass
class ScoreConfig:
    """Score predictions of any program on a data set, without a model."""

    cmd: Literal["score", "bootstrap", "queries", "size_lists"] = "score"
    """score: match, score, report; bootstrap: the published bootstrap from the table of queries that score
    wrote; queries: write what the data set asks, with the names that PNG masks should have; size_lists: write
    lists of large and small targets by our own rule (GRES-like data, pictures not needed)."""
    predictions: str = ""
    """Prediction file (.json, .jsonl), folder with such files, or folder of PNG masks."""
    val_dataset: str = "GeoReasonSeg"
    """Data set as in training: NAME, NAME|SPLIT, generic:PATH, sem_seg_folder:PATH|FILES."""
    dataset_dir: str = "./dataset"
    """Root of the data sets."""
    split: str = "test"
    """Split of a data set that is given by its NAME alone."""
    list_file: str = ""
    """File with the names of the pictures to score (GRES-like data)."""
    all_texts: bool = False
    """Score every text of a GRES-like picture; off: the first, as published."""
    keep_empty: bool = False
    """Score GRES-like files without any target (as empty targets) instead of leaving them out."""
    strict: bool = False
    """Stop at unusable files of the data set instead of leaving them out with a warning."""
    out: str = "./inference_dir/scores"
    """Folder of the results."""
    mismatch: Literal["stop", "empty"] = "stop"
    """What to do where predictions and data set do not fit (missing, extra, ambiguous, duplicate, wrong size,
    unreadable). empty: queries without a usable prediction count as empty masks, what is extra is ignored;
    all of it is listed in the report."""
    match: Literal["auto", "order"] = "auto"
    """auto: predictions say which query they answer (its words, or ref_id and sent_id); order: those that do
    not are taken in the order of the picture's queries."""
    png_threshold: int = 0
    """PNG masks: values from here on are inside (128 for probabilities); 0: masks have two values."""
    raster: Literal["official", "exact"] = "official"
    """How polygons become pixels: as published, or pixel-exact (the correct one)."""
    respect_ignore: bool = False
    """Leave ignore pixels (255) out of the counts; off: background in GRES-like files, as published."""
    boundary: bool = True
    """Boundary IoU as well."""
    thresholds: tuple[float, ...] = PRECISION_THRESHOLDS
    """IoU thresholds of the precisions."""
    large_list: str = ""
    """File with the names of the large pictures (goes with --small_list; without lists: --sizes)."""
    small_list: str = ""
    """File with the names of the small pictures."""
    sizes: Literal["rule", "folders"] = "rule"
    """rule: our own, by area in the official raster; folders: GRES-like folders large/ and small/."""
    large_area: int = LARGE_AREA
    """Pixels from which on our rule calls a target large."""
    bootstrap_rounds: int = 20
    """Rounds of the published bootstrap."""
    bootstrap_fraction: float = 0.8
    """Share of the pictures drawn per round."""
    seed: int = 0
    """Of the bootstrap, the intervals and the gallery."""
    html: bool = True
    """Write the HTML report."""
    gallery: int = 6
    """So many best, worst and random queries are shown in the report."""
    workers: int = -1
    """Processes that read and score; -1: as many as processors for large data sets, else none."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = []
        if self.cmd == "score" and not self.predictions:
            faults.append("--predictions is empty; give a prediction file or a folder of PNG masks")
        if not 0 < self.bootstrap_fraction <= 1:
            faults.append(f"--bootstrap_fraction {self.bootstrap_fraction} is not in (0, 1]")
        if self.bootstrap_rounds < 1:
            faults.append(f"--bootstrap_rounds is {self.bootstrap_rounds}; it must be at least 1")
        if not all(0 <= threshold < 1 for threshold in self.thresholds):
            faults.append(f"--thresholds {self.thresholds} are not all in 0..1")
        if not 0 <= self.png_threshold <= 255:
            faults.append(f"--png_threshold {self.png_threshold} is not in 0..255")
        if self.sizes == "folders" and (self.large_list or self.small_list):
            faults.append("--sizes folders and size lists exclude each other")
        if self.large_area < 1:
            faults.append(f"--large_area is {self.large_area}; it must be at least 1")
        return faults


def run(config: ScoreConfig) -> str:
    """Carry out `config.cmd`; returns the text to show."""
    commands = {"score": score, "bootstrap": bootstrap, "queries": list_queries, "size_lists": size_lists}
    return commands[config.cmd](config)


# ----------------------------------------------------------------------------------------------- scoring


def score(config: ScoreConfig) -> str:
    """Match predictions with the data set, score them, write the results (json, md, csv, html)."""
    from utils.eval_report import build_report, report_markdown, write_report
    from utils.query_table import query_rows, write_csv

    predictions, mismatches = scored(config)
    report = build_report(
        predictions,
        seed=config.seed,
        thresholds=config.thresholds,
        boundary=config.boundary,
        rounds=config.bootstrap_rounds,
        fraction=config.bootstrap_fraction,
    )
    report["mismatches"] = [str(mismatch) for mismatch in mismatches]
    name, out = predictions.header["dataset"], Path(config.out)
    rows = query_rows(predictions)
    paths = [*write_report(out, f"results_{name}", report), write_csv(out / f"queries_{name}.csv", rows)]
    if mismatches:
        columns = ("kind", "image", "query", "message")
        table = out / f"mismatches_{name}.csv"
        paths.append(write_csv(table, [vars(mismatch) for mismatch in mismatches], columns))
    if config.html:
        from dataset.image import load_rgb
        from utils.html_report import write_html

        page = out / f"report_{name}.html"
        paths.append(write_html(page, report, predictions, load_rgb, config.gallery, config.seed))
    return report_markdown(report) + "\n" + "\n".join(f"written: {path}" for path in paths)


def scored(config: ScoreConfig) -> "tuple[Predictions, list[Mismatch]]":
    """Predictions with targets and counts from the data set, and what did not fit (policy `mismatch`).

    Raises:
        ValueError: with `mismatch` "stop", where anything does not fit; lists it.
    """
    from utils.match_predictions import mapped
    from utils.predictions import Predictions
    from utils.score_queries import ScoreQueries

    pictures, left_out = read_pictures(config)
    source, given = open_source(config)
    answers, mismatches = source.match(pictures)
    _settle(mismatches, config)
    labels = _size_labels(config)
    jobs = ScoreQueries(pictures, answers, labels, config.boundary, config.png_threshold, config.large_area)
    images = []
    for number, (records, bad) in enumerate(mapped(jobs, _workers(config, len(jobs)), "scoring")):
        picture = pictures[number]
        images.append(
            {"index": picture.index, "image": picture.path, "size": list(picture.size), "queries": records}
        )
        mismatches += bad
    _settle(mismatches, config)
    if mismatches:
        logger.warning("%d mismatches, counted as empty masks: %s", len(mismatches), _kinds(mismatches))
    header = {
        "dataset": dataset_name(config),
        "data": dataset_spec(config),
        "n_images": len(images),
        "predictions": config.predictions,
        **{key: given[key] for key in _CARRIED if given.get(key)},
        "raster": config.raster,
        "respect_ignore": config.respect_ignore,
        "all_texts": config.all_texts,
        "list_file": config.list_file or None,
        "mismatch": f"{config.mismatch}, {len(mismatches)} found",
        "left_out": f"{left_out} unusable entries of the data set" if left_out else None,
        "size_rule": _size_rule(config),
        "large_area": config.large_area if _by_rule(config) else None,
        "seed": config.seed,
    }
    return Predictions(header, images), mismatches


def _settle(mismatches: "Sequence[Mismatch]", config: ScoreConfig) -> None:
    if not mismatches or config.mismatch == "empty":
        return
    lines = [f"  {mismatch}" for mismatch in mismatches[:_LISTED]]
    if len(mismatches) > _LISTED:
        lines.append(f"  ... and {len(mismatches) - _LISTED} more")
    raise ValueError(
        f"{config.predictions}: predictions and data set do not fit ({_kinds(mismatches)})\n"
        + "\n".join(lines)
        + "\nmend them, or count them as empty masks with --mismatch empty"
    )


def _kinds(mismatches: "Sequence[Mismatch]") -> str:
    return ", ".join(f"{number} {kind}" for kind, number in Counter(m.kind for m in mismatches).items())


# ------------------------------------------------------------------------------------------ what is on disk


def dataset_spec(config: ScoreConfig) -> str:
    """What `load_dataset` gets (as in `utils.evaluate_lisat`)."""
    from utils import evaluate_lisat

    return evaluate_lisat.dataset_spec(config)


def dataset_name(config: ScoreConfig) -> str:
    """Name used in file names (as in `utils.evaluate_lisat`)."""
    from utils import evaluate_lisat

    return evaluate_lisat.dataset_name(config)


def read_pictures(config: ScoreConfig) -> "tuple[list[Picture], int]":
    """What the data set asks, with targets, and how many of its entries are unusable."""
    from dataclasses import replace

    from dataset.base import ReadOptions
    from dataset.registry import load_dataset
    from utils.match_predictions import ReadTargets, join_pictures, mapped

    options = ReadOptions(
        train=False,
        prompt="forced",
        raster=config.raster,
        respect_ignore=True if config.respect_ignore else None,
        all_texts=config.all_texts,
        keep_empty=config.keep_empty,
        list_file=config.list_file or None,
        strict=config.strict,
    )
    spec = dataset_spec(config)
    data = load_dataset(spec, config.dataset_dir, options)
    official = None
    if _by_rule(config) and config.raster != "official":
        official = load_dataset(spec, config.dataset_dir, replace(options, raster="official"))
    targets = ReadTargets(data, official)
    pictures = join_pictures(mapped(targets, _workers(config, len(targets)), "reading"))
    pictures = [picture for picture in pictures if picture.queries]
    if not pictures:
        raise ValueError(f"{spec}: nothing that this data set asks is answered by a mask")
    return pictures, len(data.faults)


def open_source(config: ScoreConfig) -> tuple[Any, dict[str, Any]]:
    """Where the predictions come from (`utils.match_predictions.Source`), and their header (or {})."""
    from utils.mask_folder import MaskFolder
    from utils.match_predictions import PredictionFile
    from utils.predictions import read_predictions

    path = Path(config.predictions)
    if not path.exists():
        raise ValueError(f"--predictions {path}: nothing is there")
    names = ("preds_*.json*", "predictions_*.json")
    if path.is_dir() and not any(True for name in names for _ in path.glob(name)):
        return MaskFolder(path), {}
    if path.is_file() and path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--predictions {path}: expected a .json or .jsonl file, or a folder")
    found = read_predictions(path, targets=False)
    return PredictionFile(found.images, config.match == "order"), found.header


def _size_labels(config: ScoreConfig) -> dict[str, str] | None:
    from utils.size_subsets import labels_from_folders, labels_from_lists

    if config.large_list or config.small_list:
        return labels_from_lists(config.large_list, config.small_list)
    if config.sizes == "folders":
        return labels_from_folders(config.dataset_dir, dataset_spec(config).partition("|")[0])
    return None


def _by_rule(config: ScoreConfig) -> bool:
    return config.sizes == "rule" and not config.large_list and not config.small_list


def _size_rule(config: ScoreConfig) -> str:
    from utils.size_subsets import rule_text

    if config.large_list or config.small_list:
        return f"lists {config.large_list or '-'} and {config.small_list or '-'}"
    if config.sizes == "folders":
        return "folders large and small of the data set"
    return rule_text(config.large_area)


def _workers(config: ScoreConfig, items: int) -> int:
    if config.workers >= 0:
        return config.workers
    return min(8, len(os.sched_getaffinity(0))) if items >= _WORTH_PROCESSES else 0


# ------------------------------------------------------------------------------------------ other commands


def bootstrap(config: ScoreConfig) -> str:
    """The published bootstrap from the counts in `queries_<dataset>.csv`; writes bootstrap_<dataset>.*."""
    from utils import metrics
    from utils.eval_report import report_markdown, write_report
    from utils.query_table import read_counts

    name = dataset_name(config)
    table = Path(config.out) / f"queries_{name}.csv"
    counts = read_counts(table)
    found = metrics.bootstrap(counts, config.bootstrap_rounds, config.bootstrap_fraction, config.seed)
    header = {"dataset": name, "table": str(table), "n_images": counts.n_images, "n_masks": len(counts)}
    report = {"header": header, "complete": True, "bootstrap": found}
    paths = write_report(config.out, f"bootstrap_{name}", report)
    return report_markdown(report) + "\n" + "\n".join(f"written: {path}" for path in paths)


def list_queries(config: ScoreConfig) -> str:
    """Write `asked_<dataset>.csv`: picture, words, numbers, and the name of the PNG mask of every query."""
    from utils.mask_folder import mask_names
    from utils.query_table import write_csv

    pictures, _ = read_pictures(config)
    rows = []
    for picture, names in zip(pictures, mask_names(pictures)):
        for number, (wanted, mask_file) in enumerate(zip(picture.queries, names)):
            row = {"image": picture.path, "height": picture.size[0], "width": picture.size[1]}
            row |= {"number": number, "query": wanted.query, "kind": wanted.kind}
            rows.append(row | {"ref_id": wanted.ref_id, "sent_id": wanted.sent_id, "mask_file": mask_file})
    path = write_csv(Path(config.out) / f"asked_{dataset_name(config)}.csv", rows, list(rows[0]))
    return f"{len(rows)} queries about {len(pictures)} pictures\nwritten: {path}"


def size_lists(config: ScoreConfig) -> str:
    """Write the lists of large and small targets of a GRES-like split by our rule."""
    from utils.size_subsets import rule_text, write_size_lists

    name, _, split = dataset_spec(config).partition("|")
    files = write_size_lists(config.dataset_dir, name, split, config.out, config.large_area)
    counts = {label: len(path.read_text(encoding="utf-8").splitlines()) - 1 for label, path in files.items()}
    lines = [f"{counts[label]} {label}: {path}" for label, path in files.items()]
    return "\n".join([rule_text(config.large_area), *lines])
