"""The evaluation stage of InstructSAM: reads what is scored, places labels into classes, writes reports.

Published conventions come first; where they mislead, the corrected number stands beside or behind a flag.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.instructsam_data import read_dataset
from utils.instructsam_eval_config import EvaluateConfig
from utils.instructsam_eval_counts import (
    COUNTED_FROM,
    proposal_recall,
    read_count_folder,
    score_count_folder,
    score_predictions,
)
from utils.instructsam_eval_data import Entry, Truth, labels_of, place_predictions, read_truth
from utils.instructsam_eval_report import report_markdown
from utils.instructsam_eval_scores import (
    Kind,
    above,
    find_overlaps,
    mean_iou,
    recognition,
    sweep,
    sweep_thresholds,
)
from utils.instructsam_files import read_predictions, read_proposals
from utils.io import atomic_write_json, atomic_write_text, read_json

logger = logging.getLogger(__name__)
Report = dict[str, Any]


def evaluate(config: EvaluateConfig) -> tuple[str, int]:
    """Score everything that the configuration names; text for the terminal and exit code 0.

    Writes `<name of what was scored>_<kind>.json` and `.md` into the output folder.
    """
    job = _Job.of(config)
    texts = []
    for name, report in job.reports():
        report = job.header() | report
        path = atomic_write_json(job.folder / f"{name}.json", report)
        text = report_markdown(report)
        atomic_write_text(path.with_suffix(".md"), text)
        texts += [text, f"written: {path} and .md"]
    return "\n".join(texts), 0


@dataclass
class _Job:
    config: EvaluateConfig
    truth: Truth
    dataset: str
    extra: tuple[str, ...]
    folder: Path
    _maps: dict[tuple[str, ...], Report]

    @classmethod
    def of(cls, config: EvaluateConfig) -> "_Job":
        """Ground truth and names that the configuration gives."""
        dataset, extra, annotations = Path(config.annotations).stem, (), config.annotations
        if not annotations:
            found = read_dataset(config.dataset_name, config.dataset_config)
            dataset, annotations = found.name, found.ann_path
            if config.extra_classes and config.extra_classes not in found.class_lists:
                raise ValueError(f"{config.dataset_config}: {dataset} has no list {config.extra_classes!r}")
            extra = found.class_lists.get(config.extra_classes, ())
        truth = read_truth(annotations, config.first_polygon_only)
        folder = Path(config.out or Path("results") / dataset / config.setting)
        return cls(config, truth, dataset, extra, folder, {})

    def header(self) -> Report:
        """What decides the numbers."""
        facts = {"dataset": self.dataset, "annotations": str(self.truth.path), "setting": self.config.setting}
        return facts | {"extra_classes": self.config.extra_classes, "iou": 0.5}

    def reports(self) -> list[tuple[str, Report]]:
        """(file name without suffix, report) of everything asked for."""
        config, result = self.config, []
        if config.predictions:
            stem = Path(config.predictions).stem
            result.append((f"{stem}_recognition", self.recognition()))
        if config.count_dir:
            result.append((f"{Path(config.count_dir).name}_counting", self.counting_from_folder()))
        elif config.coco_pred_path:
            result.append((f"{Path(config.coco_pred_path).stem}_counting", self.counting_from_predictions()))
        if config.mask_proposals:
            result.append((f"{Path(config.mask_proposals).stem}_recall", self.recall()))
        return result

    # ---- the three evaluators

    def recognition(self) -> Report:
        """Boxes, masks (if all predictions have some), mIoU and sweep of the prediction file."""
        config = self.config
        placed, label_map = self._placed(config.predictions)
        report: Report = {"kind": "recognition", "scored": config.predictions, "label_map": label_map}
        report |= {"n_predictions": len(placed), "keep_scores": config.keep_scores}
        kinds: list[Kind] = ["bbox"]
        if self.truth.has_masks and placed and all("segmentation" in item for item in placed):
            kinds.append("segm")
        elif placed:
            logger.warning("not every prediction and annotation has a mask: only boxes are scored")
        if config.score_sweeping:
            if config.sweep_metric not in kinds and placed:
                raise ValueError("--sweep_metric segm: there are no masks to sweep over")
            overlaps = find_overlaps(self.truth, placed, config.sweep_metric)
            thresholds = sweep_thresholds(config.sweep_step, [item["score"] for item in placed])
            swept = sweep(self.truth, overlaps, config.sweep_metric, thresholds)
            report["sweep"] = asdict(swept)
            placed = above(placed, swept.best_threshold)
            report["n_predictions_kept"] = len(placed)
        for kind in kinds:
            report[kind] = asdict(recognition(self.truth, placed, kind, self.extra, config.keep_scores))
        if config.eval_mIoU and "segm" in kinds:
            classes, mean = mean_iou(self.truth, placed)
            report["mIoU"] = {"mean": mean, "per_class": classes}
        return report

    def counting_from_predictions(self) -> Report:
        """Counting scores of the prediction file."""
        placed, label_map = self._placed(self.config.coco_pred_path)
        least = COUNTED_FROM if self.config.score_threshold is None else self.config.score_threshold
        scores = score_predictions(self.truth, placed, least, self.extra)
        report = {"kind": "counting", "scored": self.config.coco_pred_path, "label_map": label_map}
        return report | {"score_threshold": least, "counting": asdict(scores)}

    def counting_from_folder(self) -> Report:
        """Counting scores of the folder of count files, published and corrected."""
        folder = read_count_folder(self.config.count_dir, self.truth)
        label_map = self._label_map(folder.labels)
        published, corrected = score_count_folder(self.truth, folder, _names(label_map), self.extra)
        report = {"kind": "counting", "scored": self.config.count_dir, "label_map": label_map}
        report |= {"missing": folder.missing, "left_out": folder.faults}
        return report | {"counting": asdict(published), "corrected": asdict(corrected)}

    def recall(self) -> Report:
        """Recall of the proposal file."""
        least = self.config.score_threshold or 0.0
        proposals = read_proposals(self.config.mask_proposals)
        found = proposal_recall(self.truth, proposals, least, self.config.recall_of == "segm")
        report = {"kind": "recall", "scored": self.config.mask_proposals, "score_threshold": least}
        return report | {"recall_of": self.config.recall_of, "recall": asdict(found)}

    # ---- labels

    def _placed(self, path: str) -> tuple[list[Entry], Report | None]:
        predictions = read_predictions(path)
        label_map = self._label_map(labels_of(predictions))
        return place_predictions(predictions, self.truth, _names(label_map)), label_map

    def _label_map(self, labels: Sequence[str]) -> Report | None:
        """Label -> {"class", "similarity", "accepted"}; None in the open vocabulary."""
        if self.config.setting == "open_vocabulary":
            return None
        if self.config.label_map:
            given = read_json(self.config.label_map, dict)
            return {
                label: {"class": given[label], "similarity": None, "accepted": True}
                for label in labels
                if label in given
            }
        key = tuple(labels)
        if key not in self._maps:
            self._maps[key] = map_labels(self.config, labels, list(self.truth.classes.values()))
        return self._maps[key]


def map_labels(config: EvaluateConfig, labels: Sequence[str], classes: Sequence[str]) -> Report:
    """Label -> {"class", "similarity", "accepted"} by the CLIP that the configuration names."""
    from model.instructsam.match import label_classes
    from utils.instructsam_config import MatcherConfig
    from utils.instructsam_stages import load_matcher

    clip = MatcherConfig(checkpoint_config=config.checkpoint_config, clip_model=config.map_model)
    try:
        texts = load_matcher(clip, config).texts
    except ValueError as error:
        raise ValueError(f"{error}; or give --label_map FILE (JSON: label -> class)") from error
    found = label_classes(texts, labels, classes, config.map_threshold)
    return {
        label: {"class": best.name, "similarity": best.similarity, "accepted": best.accepted}
        for label, best in found.items()
    }


def _names(label_map: Mapping[str, Any] | None) -> dict[str, str] | None:
    if label_map is None:
        return None
    return {label: entry["class"] for label, entry in label_map.items() if entry["accepted"]}
