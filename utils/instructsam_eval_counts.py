"""Counting scores and proposal recall of InstructSAM.

Per picture and class: tp = min(counted, there), fp and fn the excess on either side; sums over pictures give
precision, recall and F1 of a class; "macro" is the plain mean over classes.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from utils.instructsam_eval_data import Entry, Truth, mask_fault
from utils.instructsam_eval_scores import MATCH_IOU, f1_scores, greedy, in_order, iou_matrix
from utils.instructsam_files import Proposals
from utils.io import StrPath

logger = logging.getLogger(__name__)
COUNTED_FROM = 0.01
"""Least score of a prediction that counts (published)."""

ImageCounts = dict[int, Counter[str]]
"""Image id -> class name -> number."""


@dataclass
class CountScores:
    """`per_class` name -> gt (objects in all pictures), tp, fp, fn, precision, recall, f1 (fractions);
    `macro` and `extra` precision, recall, f1: means over all classes and over the listed ones of them (None:
    none listed)."""

    per_class: dict[str, dict[str, float]]
    macro: dict[str, float]
    extra: dict[str, float] | None = None


def count_scores(
    there: Mapping[int, Counter[str]],
    counted: Mapping[int, Counter[str]],
    images: Iterable[int],
    classes: Iterable[str],
    extra_classes: Sequence[str] = (),
) -> CountScores:
    """Scores over `images` and `classes` (reported in alphabetical order)."""
    names = sorted(set(classes))
    tp, fp, fn = (Counter() for _ in range(3))
    for image in images:
        truth, found = there.get(image, Counter()), counted.get(image, Counter())
        for name in names:
            tp[name] += min(found[name], truth[name])
            fp[name] += max(found[name] - truth[name], 0)
            fn[name] += max(truth[name] - found[name], 0)
    hits = np.array([tp[name] for name in names])
    kept, objects = (hits + [other[name] for name in names] for other in (fp, fn))
    shares = dict(zip(("precision", "recall", "f1"), f1_scores(hits, kept, objects)))
    total = sum(there.values(), Counter())
    per_class = {
        name: {"gt": total[name], "tp": tp[name], "fp": fp[name], "fn": fn[name]}
        | {key: float(values[k]) for key, values in shares.items()}
        for k, name in enumerate(names)
    }

    def mean(of: Sequence[str]) -> dict[str, float]:
        return {key: float(np.mean([per_class[n][key] for n in of])) if of else 0.0 for key in shares}

    extra = mean([name for name in names if name in set(extra_classes)]) if extra_classes else None
    return CountScores(per_class, mean(names), extra)


def true_counts(truth: Truth) -> ImageCounts:
    """Objects of every class in every picture that has any."""
    counts: ImageCounts = {}
    for entry in truth.annotations:
        counts.setdefault(entry["image_id"], Counter())[truth.classes[entry["category_id"]]] += 1
    return counts


def prediction_counts(
    truth: Truth, placed: Sequence[Entry], score_threshold: float = COUNTED_FROM
) -> ImageCounts:
    """Placed predictions with at least this score, per picture and class."""
    counts: ImageCounts = {}
    for item in placed:
        if item["score"] >= score_threshold:
            counts.setdefault(item["image_id"], Counter())[truth.classes[item["category_id"]]] += 1
    return counts


def score_predictions(
    truth: Truth,
    placed: Sequence[Entry],
    score_threshold: float = COUNTED_FROM,
    extra_classes: Sequence[str] = (),
) -> CountScores:
    """Counting scores of placed predictions over pictures and classes with objects or predictions."""
    there, counted = true_counts(truth), prediction_counts(truth, placed, score_threshold)
    classes = {name for counts in (*there.values(), *counted.values()) for name in counts}
    return count_scores(there, counted, {*there, *counted}, classes, extra_classes)


# ---------------------------------------------------------------------------------------- from a folder


@dataclass
class CountFolder:
    """Count files of a folder. `images` image id -> label -> number; `faults` file -> why it was left out;
    `missing` names of pictures without a readable file."""

    images: dict[int, dict[str, int]]
    faults: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """Distinct labels, in order of first appearance."""
        return list(dict.fromkeys(label for counts in self.images.values() for label in counts))


def read_count_folder(folder: StrPath, truth: Truth) -> CountFolder:
    """Read the count files that belong to pictures of the ground truth (same stem, sub-folders or flat).

    Fractions are cut off, true and false count as 1 and 0; other values are left out with a warning.

    Raises:
        ValueError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of count files")
    ids = {str(PurePosixPath(name).with_suffix("")): number for number, name in truth.images.items()}
    flat = Counter(PurePosixPath(stem).name for stem in ids)
    ids |= {PurePosixPath(s).name: n for s, n in list(ids.items()) if flat[PurePosixPath(s).name] == 1}
    result = CountFolder({})
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name not in ids:
            result.faults[path.name] = "no picture of this name in the ground truth"
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:
            result.faults[path.name] = f"not readable as JSON: {error}"
            continue
        if not isinstance(content, dict):
            result.faults[path.name] = f"holds a {type(content).__name__}, expected an object of counts"
            continue
        result.images[ids[name]] = _cut(content, path)
    result.missing = [name for number, name in truth.images.items() if number not in result.images]
    for name, why in result.faults.items():
        logger.warning("%s: %s: left out", folder / name, why)
    return result


def _cut(content: Mapping[str, Any], path: Path) -> dict[str, int]:
    counts = {}
    for label, value in content.items():
        if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
            counts[label] = int(value)
        else:
            logger.warning("%s: the count of %r is %r, no number >= 0: left out", path, label, value)
    return counts


def score_count_folder(
    truth: Truth,
    folder: CountFolder,
    label_map: Mapping[str, str] | None = None,
    extra_classes: Sequence[str] = (),
) -> tuple[CountScores, CountScores]:
    """Counting scores of count files: as published, and corrected.

    Published: pictures without a file do not count, and the mean runs over classes of the ground truth and
    all classes that any file names, zeros included. Corrected: pictures without a file have counted
    nothing, and only classes with objects or a count above 0 enter the mean.

    Args:
        label_map: label -> class, others are left out; None: labels that are class names count.
    """
    names = set(truth.classes.values())
    to_class: Callable[[str], str | None] = (
        (lambda label: label if label in names else None) if label_map is None else label_map.get
    )
    counted: ImageCounts = {}
    for image, counts in folder.images.items():
        mine = counted.setdefault(image, Counter())
        for label, number in counts.items():
            name = to_class(label)
            if name is not None:
                mine[name] += number  # a zero stays as an entry: the published mean sees it
    there = true_counts(truth)
    in_truth = {name for counts in there.values() for name in counts}
    named = {name for counts in counted.values() for name in counts}
    positive = {name for counts in counted.values() for name, number in counts.items() if number > 0}
    published = count_scores(there, counted, counted, in_truth | named, extra_classes)
    corrected = count_scores(there, counted, truth.images, in_truth | positive, extra_classes)
    return published, corrected


# ---------------------------------------------------------------------------------------------- proposals


@dataclass
class ProposalRecall:
    """Share of ground-truth objects that a proposal covers. `per_class` fraction (0 without ground truth);
    `mean` over all classes of the file (published); `present_mean` over those with ground truth;
    `n_proposals` with at least the score threshold."""

    per_class: dict[str, float]
    mean: float
    present_mean: float
    n_proposals: int


def proposal_recall(
    truth: Truth,
    proposals: Mapping[str, Proposals],
    score_threshold: float = 0.0,
    masks: bool = False,
) -> ProposalRecall:
    """Recall at IoU 0.5, whatever the class: every proposal, in file order, takes the free object with the
    highest IoU.

    Args:
        proposals: by file name (or its last part).
        masks: compare masks; False: boxes (published).
    """
    kind = "segm" if masks else "bbox"
    objects: dict[int, list[Entry]] = {}
    for entry in truth.annotations:
        objects.setdefault(entry["image_id"], []).append(entry)
    total, covered, used = Counter(), Counter(), 0
    for number, name in truth.images.items():
        theirs = objects.get(number, [])
        total.update(entry["category_id"] for entry in theirs)
        mine = proposals.get(name, proposals.get(PurePosixPath(name).name))
        if mine is None:
            continue
        mine = mine.select(mine.scores >= score_threshold)
        used += len(mine)
        if masks and len(mine) and not mine.rles:
            raise ValueError(f"{name}: the proposals are boxes only; leave out the comparison of masks")
        entries = [{"bbox": box} for box in mine.boxes.tolist()]
        if masks:
            entries = [{"segmentation": rle} for rle in mine.rles]
            for number_in_file, rle in enumerate(mine.rles):
                if fault := mask_fault(rle, truth.sizes[number]):
                    raise ValueError(f"{name}: proposal {number_in_file}: {fault}")
        iou = iou_matrix(entries, theirs, kind)
        reached = np.argwhere(iou >= MATCH_IOU)
        pairs = in_order(reached, iou[reached[:, 0], reached[:, 1]])
        covered.update(theirs[g]["category_id"] for _, g in greedy([tuple(pair) for pair in pairs.tolist()]))
    recall = {k: covered[k] / total[k] if total[k] else 0.0 for k in truth.classes}
    present = [recall[k] for k in truth.classes if total[k]]
    return ProposalRecall(
        {name: recall[k] for k, name in truth.classes.items()},
        float(np.mean(list(recall.values()))) if recall else 0.0,
        float(np.mean(present)) if present else 0.0,
        used,
    )
