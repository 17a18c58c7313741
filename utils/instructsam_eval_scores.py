"""Recognition scores of InstructSAM at IoU 0.5: F1 without confidences, AP50, mIoU, and the score sweep.

Shapes: C classes, S score thresholds, P predictions and G objects of one class in one picture.

IoUs are computed once per picture and class as one matrix; all thresholds are then counted from the pairs
that reach 0.5. Boxes are xywh and continuous; mask IoU is by pixels of the run-length codes.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from utils.instructsam_eval_data import Entry, Truth, by_image, groups

Kind = Literal["bbox", "segm"]
MATCH_IOU = 0.5
MAX_DETECTIONS = (1, 10, 100)
SUMMARY = (
    [("AP", name, "all", 100) for name in ("0.50:0.50", "0.50", "0.75")]
    + [("AP", "0.50:0.50", area, 100) for area in ("small", "medium", "large")]
    + [("AR", "0.50:0.50", "all", number) for number in MAX_DETECTIONS]
    + [("AR", "0.50:0.50", area, 100) for area in ("small", "medium", "large")]
)
"""What the twelve numbers of COCO's summary are: metric, IoU, area, detections."""


@dataclass
class Overlaps:
    """Pairs of a prediction and an object of its picture and class with IoU >= 0.5.

    `scores` (P,) of all predictions; `labels` (P,) and `objects` (G,) class ids of predictions and objects;
    `sure` numbers of predictions whose only partner has no other partner; `contested` (prediction, object)
    pairs of all the others, by prediction, then falling IoU.
    """

    scores: np.ndarray
    labels: np.ndarray
    objects: np.ndarray
    sure: np.ndarray
    contested: list[tuple[int, int]]


def find_overlaps(truth: Truth, predictions: Sequence[Entry], kind: Kind) -> Overlaps:
    """`Overlaps` of all pictures: one matrix of IoUs for each picture (pairs of boxes that do not touch cost
    next to nothing in it, so the classes need no matrices of their own)."""
    labels = np.array([item["category_id"] for item in predictions], np.int64)
    objects = np.array([entry["category_id"] for entry in truth.annotations], np.int64)
    theirs, found = by_image(truth.annotations), by_image(predictions)
    pairs, values = [np.zeros((0, 2), np.int64)], [np.zeros(0)]
    for image in found.keys() & theirs.keys():
        mine, others = np.array(found[image]), np.array(theirs[image])
        iou = iou_matrix([predictions[k] for k in mine], [truth.annotations[k] for k in others], kind)
        near = np.argwhere(iou >= MATCH_IOU)
        numbers = np.column_stack([mine[near[:, 0]], others[near[:, 1]]])
        same = labels[numbers[:, 0]] == objects[numbers[:, 1]]
        pairs.append(numbers[same])
        values.append(iou[near[same, 0], near[same, 1]])
    ordered = in_order(np.concatenate(pairs), np.concatenate(values))
    uses = [np.bincount(ordered[:, side]) for side in (0, 1)]
    alone = (uses[0][ordered[:, 0]] == 1) & (uses[1][ordered[:, 1]] == 1)
    return Overlaps(
        scores=np.array([item["score"] for item in predictions], np.float64),
        labels=labels,
        objects=objects,
        sure=ordered[alone, 0],
        contested=[(p, g) for p, g in ordered[~alone].tolist()],
    )


def iou_matrix(predictions: Sequence[Entry], objects: Sequence[Entry], kind: Kind) -> np.ndarray:
    """IoU of every prediction with every object, float64 (P, G)."""
    from pycocotools import mask as coco

    if not predictions or not objects:
        return np.zeros((len(predictions), len(objects)))
    if kind == "segm":
        mine, theirs = ([item["segmentation"] for item in items] for items in (predictions, objects))
    else:
        mine, theirs = (
            np.array([item["bbox"] for item in items], np.float64) for items in (predictions, objects)
        )
    return np.asarray(coco.iou(mine, theirs, [0] * len(objects)))


def in_order(pairs: np.ndarray, iou: np.ndarray) -> np.ndarray:
    """Pairs (row, column) int64 (K, 2) with their IoUs (K,), sorted by row, then falling IoU, then column."""
    return pairs[np.lexsort((pairs[:, 1], -iou, pairs[:, 0]))]


def greedy(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs that come about when rows, one after the other, take their first free column.

    With pairs of IoU >= 0.5, sorted by `in_order`, this is the published matching: every prediction, in file
    order, takes the free object with the highest IoU, if that reaches 0.5.
    """
    done: set[int] = set()
    taken: set[int] = set()
    result = []
    for row, column in pairs:
        if row not in done and column not in taken:
            done.add(row)
            taken.add(column)
            result.append((row, column))
    return result


def count_matches(
    overlaps: Overlaps, class_ids: Sequence[int], thresholds: Sequence[float] = (-np.inf,)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives (S, C), predictions (S, C) and objects (C,) when scores >= each threshold are kept."""
    order = np.argsort(class_ids)
    column = order[np.searchsorted(class_ids, overlaps.labels, sorter=order)]
    objects = order[np.searchsorted(class_ids, overlaps.objects, sorter=order)]
    hits = np.zeros((len(thresholds), len(class_ids)), np.int64)
    kept = np.zeros_like(hits)
    for s, threshold in enumerate(thresholds):
        keep = overlaps.scores >= threshold
        contested = greedy([pair for pair in overlaps.contested if keep[pair[0]]])
        matched = np.concatenate(
            [overlaps.sure[keep[overlaps.sure]], np.array([p for p, _ in contested], np.int64)]
        )
        hits[s] = np.bincount(column[matched], minlength=len(class_ids))
        kept[s] = np.bincount(column[keep], minlength=len(class_ids))
    return hits, kept, np.bincount(objects, minlength=len(class_ids))


def f1_scores(hits: np.ndarray, kept: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, ...]:
    """Precision, recall, F1, float64 of the inputs' shape; 0 where undefined."""
    hits = np.asarray(hits, np.float64)
    precision = np.divide(hits, kept, out=np.zeros_like(hits), where=np.asarray(kept) > 0)
    recall = np.divide(hits, objects, out=np.zeros_like(hits), where=np.broadcast_to(objects, hits.shape) > 0)
    both = precision + recall
    return precision, recall, np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)


@dataclass
class Recognition:
    """Scores of boxes or masks. `per_class` name -> tp, fp, fn, precision, recall, f1, ap50 (fractions);
    means in percent over classes with ground truth; `extra_*` over the listed ones of these, if listed."""

    kind: Kind
    per_class: dict[str, dict[str, float]]
    mF1: float
    mAP50: float
    extra_mF1: float | None = None
    extra_mAP50: float | None = None
    summary: list[dict[str, Any]] = field(default_factory=list)


def recognition(
    truth: Truth,
    predictions: Sequence[Entry],
    kind: Kind,
    extra_classes: Sequence[str] = (),
    keep_scores: bool = False,
    overlaps: Overlaps | None = None,
) -> Recognition:
    """Box or mask scores as published.

    Args:
        extra_classes: names for the second mean.
        keep_scores: rank by the scores in AP; False: all scores count as 1 (published).
        overlaps: of the same predictions, if known already.
    """
    ids = list(truth.classes)
    overlaps = find_overlaps(truth, predictions, kind) if overlaps is None else overlaps
    hits, kept, objects = count_matches(overlaps, ids)
    hits, kept = hits[0], kept[0]
    precision, recall, f1 = f1_scores(hits, kept, objects)
    ap, summary = average_precision(truth, predictions, kind, keep_scores)
    present = objects > 0
    extra = present & np.isin(ids, truth.class_ids(extra_classes))
    rows = zip(hits, kept - hits, objects - hits, precision, recall, f1, ap)
    names = ("tp", "fp", "fn", "precision", "recall", "f1", "ap50")
    per_class = {
        truth.classes[number]: {
            name: int(value) if name in ("tp", "fp", "fn") else float(value)
            for name, value in zip(names, row)
        }
        for number, row in zip(ids, rows)
    }
    wanted = (present, extra) if extra_classes else (present,)
    means = [100 * _mean(values[where]) for where in wanted for values in (f1, ap)]
    result = Recognition(kind, per_class, *means)
    result.summary = summary
    return result


def average_precision(
    truth: Truth, predictions: Sequence[Entry], kind: Kind, keep_scores: bool = False
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """AP50 of every class, float64 (C,), by pycocotools (0 without ground truth or predictions), and COCO's
    twelve summary numbers (none where there are no predictions). At most 100 predictions of a class and
    picture count."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not predictions or not truth.annotations:
        return np.zeros(len(truth.classes)), []
    with contextlib.redirect_stdout(io.StringIO()):
        references = COCO()
        references.dataset = {
            "info": {},
            "images": [{"id": k, "height": size[0], "width": size[1]} for k, size in truth.sizes.items()],
            "categories": [{"id": number, "name": name} for number, name in truth.classes.items()],
            "annotations": [dict(entry) for entry in truth.annotations],
        }
        references.createIndex()
        results = references.loadRes(
            [dict(item) if keep_scores else item | {"score": 1.0} for item in predictions]
        )
        evaluation = COCOeval(references, results, kind)
        evaluation.params.iouThrs = np.array([MATCH_IOU])
        evaluation.params.maxDets = list(MAX_DETECTIONS)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    columns = {number: k for k, number in enumerate(evaluation.params.catIds)}
    curves = evaluation.eval["precision"][0, :, [columns[number] for number in truth.classes], 0, -1]
    summary = [
        {"metric": metric, "iou": iou, "area": area, "max_dets": number, "value": float(value)}
        for (metric, iou, area, number), value in zip(SUMMARY, evaluation.stats)
    ]
    return np.maximum(curves.mean(axis=1), 0), summary


def mean_iou(truth: Truth, predictions: Sequence[Entry]) -> tuple[dict[str, float | None], float]:
    """IoU of every class between the unions of its masks, pixels summed over pictures (None: class in
    neither), and the mean over the others. Fractions. Computed on run-length codes, without decoding."""
    from pycocotools import mask as coco

    objects, found = groups(truth.annotations), groups(predictions)
    shared, either = dict.fromkeys(truth.classes, 0), dict.fromkeys(truth.classes, 0)
    for key in dict.fromkeys([*objects, *found]):
        sides = [[truth.annotations[k]["segmentation"] for k in objects.get(key, ())]]
        sides.append([predictions[k]["segmentation"] for k in found.get(key, ())])
        unions = [coco.merge(codes) for codes in sides if codes]
        either[key[1]] += int(coco.area(coco.merge(unions)))
        if len(unions) == 2:
            shared[key[1]] += int(coco.area(coco.merge(unions, intersect=True)))
    values = {name: shared[k] / either[k] if either[k] else None for k, name in truth.classes.items()}
    return values, _mean([value for value in values.values() if value is not None])


@dataclass
class Sweep:
    """mF1 (fractions) at every threshold, and the first threshold that reaches the largest."""

    kind: Kind
    thresholds: list[float]
    mF1: list[float]
    best_threshold: float


def sweep_thresholds(step: float, scores: Sequence[float], most: int = 1000) -> list[float]:
    """0, step, 2 step, ... below 1; with step 0 the distinct scores themselves (the exact optimum is among
    them), evenly thinned to `most`."""
    if step > 0:
        return [round(k * step, 6) for k in range(int(np.ceil(1 / step - 1e-9)))]
    distinct = np.unique(np.asarray(scores, np.float64))
    if len(distinct) > most:
        distinct = distinct[np.linspace(0, len(distinct) - 1, most).round().astype(int)]
    return [float(score) for score in distinct] or [0.0]


def sweep(truth: Truth, overlaps: Overlaps, kind: Kind, thresholds: Sequence[float]) -> Sweep:
    """Mean F1 over classes with ground truth when scores >= t are kept, for every t."""
    hits, kept, objects = count_matches(overlaps, list(truth.classes), thresholds)
    f1 = f1_scores(hits, kept, objects)[2]
    present = objects > 0
    means = f1[:, present].mean(axis=1) if present.any() else np.zeros(len(f1))
    return Sweep(kind, list(thresholds), means.tolist(), thresholds[int(means.argmax())])


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def above(predictions: Sequence[Entry], threshold: float) -> list[Entry]:
    """Predictions with score >= threshold."""
    return [item for item in predictions if item["score"] >= threshold]
