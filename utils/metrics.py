"""Segmentation scores from per-mask pixel counts: IoU, gIoU, cIoU, see accuracy, tables, bootstrap.

Shapes: N masks (one per query), M images, H/W pixels. Class 0 is background, class 1 the object asked for,
255 in a target means "do not count this pixel". Every score is a function of the counts alone, so whoever
keeps the counts can recompute every number without the model.

Formulas and epsilons are those of the published LISAT evaluation (its `metrics` and `bootstrap_metrics`
commands and the validation in its training loop): IoU = I / (U + 1e-5) in float32 and 1 where U = 0;
gIoU = mean of the object IoU over masks; cIoU = sum I / (sum U + 1e-10).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IGNORE_VALUE = 255
IOU_EPSILON = 1e-5
CIOU_EPSILON = 1e-10
_MOST_WEIGHTS = 4_000_000  # of a resampling matrix at a time
PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
LARGE_AREA = (
    728  # pixels; our own rule, it splits the GRES test set 488 / 1022 (the published split has no rule)
)


def mask_counts(
    prediction: np.ndarray, target: np.ndarray, ignore_value: int = IGNORE_VALUE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel counts of one mask pair, each int64 (2,) in the order [background, object].

    Args:
        prediction: (H, W) bool or integers; non-zero is object.
        target: (H, W) bool or integers; 1 is object, 0 background, `ignore_value` is left out. Other values
            belong to neither class (as in the published histogram).

    Returns:
        intersection, union, target counts. Pixels to ignore are in none of them.

    Raises:
        ValueError: the two shapes differ.
    """
    prediction, target = np.asarray(prediction), np.asarray(target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"a prediction of shape {prediction.shape} cannot be scored against a target of shape "
            f"{target.shape}; resize the prediction to the target's picture first"
        )
    predicted = prediction if prediction.dtype == bool else prediction != 0
    wanted = target if target.dtype == bool else target == 1
    total = prediction.size
    if target.dtype == bool or target.max(initial=0) <= 1:
        n_valid, n_background = total, total - int(np.count_nonzero(wanted))
        n_predicted = int(np.count_nonzero(predicted))
    else:
        valid, empty = target != ignore_value, target == 0
        predicted = predicted & valid
        n_valid, n_background = int(np.count_nonzero(valid)), int(np.count_nonzero(empty))
        n_predicted = int(np.count_nonzero(predicted))
    n_wanted, n_unpredicted = int(np.count_nonzero(wanted)), n_valid - n_predicted
    n_hit = int(np.count_nonzero(predicted & wanted))
    n_odd = n_valid - n_wanted - n_background  # values that are neither class
    if n_odd:
        n_miss = int(np.count_nonzero(~predicted & (target == 0)))
    else:
        n_miss = n_unpredicted - (n_wanted - n_hit)
    intersection = np.array([n_miss, n_hit], dtype=np.int64)
    targets = np.array([n_background, n_wanted], dtype=np.int64)
    union = np.array([n_unpredicted, n_predicted], dtype=np.int64) + targets - intersection
    return intersection, union, targets


def iou_from_counts(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """Published IoU, float32 of the inputs' shape: I / (U + 1e-5), and 1 where U = 0."""
    intersection = np.asarray(intersection, dtype=np.float32)
    union = np.asarray(union, dtype=np.float32)
    iou = intersection / (union + np.float32(IOU_EPSILON))
    return np.where(union == 0, np.float32(1), iou)


def mask_iou(prediction: np.ndarray, target: np.ndarray, ignore_value: int = IGNORE_VALUE) -> float:
    """Published IoU of the object class of one mask pair (arguments as `mask_counts`)."""
    intersection, union, _ = mask_counts(prediction, target, ignore_value)
    return float(iou_from_counts(intersection, union)[1])


@dataclass
class Counts:
    """Everything scores need, one row per mask.

    image: int64 (N,) number of the picture a mask belongs to, 0..M-1 in order of first appearance.
    intersection, union, target: int64 (N, 2), [background, object].
    gt_exists, pred_exists: bool (N,). kind: N labels for tables ("" = none).
    """

    image: np.ndarray
    intersection: np.ndarray
    union: np.ndarray
    target: np.ndarray
    gt_exists: np.ndarray
    pred_exists: np.ndarray
    kind: list[str]

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]]) -> "Counts":
        """Collect rows with keys image (any hashable), intersection, union, target (pairs), gt_exists,
        pred_exists, and optionally kind."""
        numbers: dict[Any, int] = {}
        image = [numbers.setdefault(row["image"], len(numbers)) for row in rows]

        def pairs(key: str) -> np.ndarray:
            return np.asarray([row[key] for row in rows], dtype=np.int64).reshape(len(rows), 2)

        return cls(
            image=np.asarray(image, dtype=np.int64),
            intersection=pairs("intersection"),
            union=pairs("union"),
            target=pairs("target"),
            gt_exists=np.asarray([row["gt_exists"] for row in rows], dtype=bool),
            pred_exists=np.asarray([row["pred_exists"] for row in rows], dtype=bool),
            kind=[str(row.get("kind", "")) for row in rows],
        )

    def __len__(self) -> int:
        return len(self.image)

    @property
    def n_images(self) -> int:
        """Number of pictures that own at least one mask."""
        return len(np.unique(self.image))

    @property
    def iou(self) -> np.ndarray:
        """Object IoU per mask, float32 (N,)."""
        return iou_from_counts(self.intersection[:, 1], self.union[:, 1])

    @property
    def predicted(self) -> np.ndarray:
        """Counted pixels of the predicted mask, int64 (N,)."""
        return self.union[:, 1] + self.intersection[:, 1] - self.target[:, 1]

    def select(self, keep: np.ndarray) -> "Counts":
        """The rows where `keep` (bool (N,)) holds; picture numbers are kept."""
        keep = np.asarray(keep, dtype=bool)
        return Counts(
            self.image[keep],
            self.intersection[keep],
            self.union[keep],
            self.target[keep],
            self.gt_exists[keep],
            self.pred_exists[keep],
            [kind for kind, kept in zip(self.kind, keep) if kept],
        )


def scores(counts: Counts, thresholds: Sequence[float] = PRECISION_THRESHOLDS) -> dict[str, float]:
    """gIoU, cIoU, see accuracy, Pr@threshold (all in 0..1) and the numbers of masks and images.

    Raises:
        ValueError: no masks.
    """
    if not len(counts):
        raise ValueError("no scores without masks: the predictions hold no query")
    iou = counts.iou
    total = counts.intersection[:, 1].sum(), counts.union[:, 1].sum()
    result = {
        "giou": float(iou.mean(dtype=np.float64)),
        "ciou": float(total[0] / (total[1] + CIOU_EPSILON)),
        "see_accuracy": float((counts.gt_exists == counts.pred_exists).mean()),
    }
    for threshold in thresholds:
        result[f"pr@{threshold}"] = float((iou > threshold).mean())
    return result | {"n_masks": len(counts), "n_images": counts.n_images}


def scores_by(
    counts: Counts, labels: Sequence[str], thresholds: Sequence[float] = PRECISION_THRESHOLDS
) -> dict[str, dict[str, float]]:
    """`scores` of the masks of every label (N of them), in order of first appearance."""
    array = np.asarray(labels, dtype=object)
    return {label: scores(counts.select(array == label), thresholds) for label in dict.fromkeys(labels)}


def scores_by_kind(
    counts: Counts, thresholds: Sequence[float] = PRECISION_THRESHOLDS
) -> dict[str, dict[str, float]]:
    """`scores` of every kind of query, in order of first appearance."""
    return scores_by(counts, counts.kind, thresholds)


def presence_scores(counts: Counts) -> dict[str, float]:
    """How well presence is told.

    Returns:
        {"n_absent", "n_present": queries about things that are not / are there; "denial_rate": share of the
        absent ones that are denied; "false_alarm_area": mean share of the picture's counted pixels that is
        marked for absent ones, denied or not; "false_denial_rate": share of present ones that are denied}.
        Shares of nothing are left out.
    """
    absent, found = ~counts.gt_exists, {}
    result: dict[str, float] = {"n_absent": int(absent.sum()), "n_present": int((~absent).sum())}
    for name, (values, chosen) in presence_ratios(counts).items():
        if chosen.any():
            found[name] = float(values.sum() / chosen.sum())
    return result | found


def presence_ratios(counts: Counts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(numerators, denominators), each (N,), of the shares of `presence_scores`."""
    absent, denied = ~counts.gt_exists, ~counts.pred_exists
    marked = counts.predicted / np.maximum(1, counts.target.sum(axis=1))
    return {
        "denial_rate": (absent & denied, absent),
        "false_alarm_area": (marked * absent, absent),
        "false_denial_rate": (~absent & denied, ~absent),
    }


_SCORED = ("giou", "ciou", "see_accuracy")


def _per_image(counts: Counts) -> np.ndarray:
    """float64 (M, 5) sums per picture: IoU, masks, object intersection, object union, right presences."""
    numbers, image = np.unique(counts.image, return_inverse=True)
    columns = (
        counts.iou,
        np.ones(len(counts)),
        counts.intersection[:, 1],
        counts.union[:, 1],
        counts.gt_exists == counts.pred_exists,
    )
    return np.stack([np.bincount(image, column, len(numbers)) for column in columns], axis=1)


def _resampled(counts: Counts, draws: np.ndarray) -> np.ndarray:
    """Scores (R, 3) as giou, ciou, see accuracy of R resamples; `draws` (R, k) are picture numbers."""
    sums = _per_image(counts)
    weights = np.stack([np.bincount(draw, minlength=len(sums)) for draw in draws])  # (R, M)
    total = weights @ sums  # (R, 5)
    giou, see = total[:, 0] / total[:, 1], total[:, 4] / total[:, 1]
    return np.stack([giou, total[:, 2] / (total[:, 3] + CIOU_EPSILON), see], axis=1)


def bootstrap(
    counts: Counts, rounds: int = 20, fraction: float = 0.8, seed: int | None = 0
) -> dict[str, Any]:
    """Published bootstrap: `rounds` draws of int(fraction * M) pictures with replacement.

    The draws are those of `numpy.random.seed(seed)` followed by `numpy.random.choice` per round; `seed=None`
    is unseeded, as published. Costs one matrix product, not a second look at the masks.

    Returns:
        {"rounds", "fraction", "seed", "drawn_indices" (R, k), "per_round" (R, 3) giou/ciou/see_accuracy,
        "<score>_mean", "<score>_std" (population standard deviation)}.
    """
    size = int(fraction * counts.n_images)
    if size < 1 or rounds < 1:
        raise ValueError(
            f"a bootstrap needs at least one round and one picture per round; rounds={rounds}, "
            f"fraction={fraction} of {counts.n_images} pictures gives {size}"
        )
    random = np.random.RandomState(seed)
    draws = np.stack([random.choice(counts.n_images, size) for _ in range(rounds)])
    rows = _resampled(counts, draws)
    result: dict[str, Any] = {"rounds": rounds, "fraction": fraction, "seed": seed}
    for name, column in zip(_SCORED, rows.T):
        result |= {f"{name}_mean": float(column.mean()), f"{name}_std": float(column.std())}
    return result | {"drawn_indices": draws.tolist(), "per_round": rows.tolist()}


def score_ratios(
    counts: Counts, thresholds: Sequence[float] = PRECISION_THRESHOLDS
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(numerators, denominators), each (N,), whose sums divide to the scores of the same names."""
    iou, one = counts.iou, np.ones(len(counts))
    ratios = {
        "giou": (iou, one),
        "ciou": (counts.intersection[:, 1], counts.union[:, 1]),
        "see_accuracy": (counts.gt_exists == counts.pred_exists, one),
    }
    return ratios | {f"pr@{threshold}": (iou > threshold, one) for threshold in thresholds}


def confidence_intervals(
    counts: Counts,
    level: float = 0.95,
    rounds: int = 1000,
    seed: int = 0,
    ratios: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals from resampling whole pictures (all M of them, with replacement).

    Args:
        ratios: scores as in `score_ratios` (the default). A resample without any denominator is left out;
            a score whose denominators are all zero has no interval.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of a confidence interval lies between 0 and 1, found {level}")
    ratios = score_ratios(counts) if ratios is None else ratios
    numbers, image = np.unique(counts.image, return_inverse=True)
    columns = [part.astype(np.float64) for pair in ratios.values() for part in pair]
    sums = np.stack([np.bincount(image, column, len(numbers)) for column in columns], axis=1)  # (M, 2K)
    random, step, parts = np.random.default_rng(seed), max(1, _MOST_WEIGHTS // len(numbers)), []
    for start in range(0, rounds, step):
        draws = random.integers(0, len(numbers), size=(min(step, rounds - start), len(numbers)))
        weights = np.stack([np.bincount(draw, minlength=len(numbers)) for draw in draws])
        parts.append(weights @ sums)
    total = np.concatenate(parts)  # (R, 2K)
    above, below = total[:, ::2], total[:, 1::2]
    values = np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)
    edges = [(1 - level) / 2, (1 + level) / 2]
    intervals = {}
    for name, column in zip(ratios, values.T):
        if not np.isnan(column).all():
            low, high = np.nanquantile(column, edges)
            intervals[name] = (float(low), float(high))
    return intervals


class ValidationMeters:
    """Running sums of the validation inside training, one per rank, in float32 as published.

    `update` per picture, then `reduce` once on every rank, then `result`.
    """

    NAMES = ("intersection", "union", "giou")

    def __init__(self, pair_mismatch: str = "error") -> None:
        """`pair_mismatch`: what to do where a picture has more or fewer predictions than targets: "error",
        or "truncate" as published (pairs by position, the mean still divides by the number of targets)."""
        if pair_mismatch not in ("error", "truncate"):
            raise ValueError(f"pair_mismatch is 'error' or 'truncate', found {pair_mismatch!r}")
        self.pair_mismatch = pair_mismatch
        self.sums = np.zeros((3, 2), dtype=np.float32)  # intersection, union, IoU x [background, object]
        self.counts = np.zeros(3, dtype=np.float32)  # pictures, pictures, masks

    def update(self, mask_logits: Any, targets: Any, image: str = "") -> None:
        """Add one picture.

        Args:
            mask_logits: (K, H, W) logits, array or tensor; object where > 0. Boolean masks also work.
            targets: (K, H, W) with 0, 1 and 255 = ignore, array or tensor. K = 0 adds nothing.
            image: name for error messages.
        """
        if hasattr(mask_logits, "detach"):
            mask_logits = mask_logits > 0  # compared where they are: a quarter of the bytes to fetch
        predictions, masks = _to_numpy(mask_logits) > 0, _to_numpy(targets)
        if len(predictions) != len(masks) and self.pair_mismatch == "error":
            raise ValueError(
                f"{image or 'a picture'}: {len(predictions)} predicted masks for {len(masks)} targets; "
                "answers and masks of this sample do not belong together"
            )
        if not len(masks):
            return
        sums = np.zeros((3, 2), dtype=np.float32)
        for prediction, mask in zip(predictions, masks):
            intersection, union, _ = mask_counts(prediction, mask)
            sums[0] += intersection
            sums[1] += union
            sums[2] += iou_from_counts(intersection, union)
        n = np.float32(len(masks))
        sums[2] = (sums[2] / n) * n  # the published mean per picture, weighted by its masks
        self.sums += sums
        self.counts += np.array([1, 1, n], dtype=np.float32)

    def reduce(self, group: Any = None) -> "ValidationMeters":
        """Sum over all ranks of the process group in float32 (nothing to do without one). Returns self."""
        import torch
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            cuda = dist.get_backend(group) == "nccl"
            device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
            packed = np.concatenate([self.sums, self.counts[:, None]], axis=1)
            total = torch.from_numpy(packed).to(device)
            dist.all_reduce(total, group=group)
            packed = total.cpu().numpy()
            self.sums, self.counts = packed[:, :2].copy(), packed[:, 2].copy()
        return self

    def averages(self) -> np.ndarray:
        """float32 (3, 2): sums / (count + 1e-5) of intersection, union and IoU x [background, object]."""
        return self.sums / (self.counts + np.float32(IOU_EPSILON))[:, None]

    def result(self) -> dict[str, float]:
        """{"giou", "ciou", "n_images", "n_masks"} of what has been added (and reduced)."""
        if not self.counts[2]:
            raise ValueError("no validation scores: no picture with a mask was seen")
        ciou = self.sums[0, 1] / (self.sums[1, 1] + np.float32(CIOU_EPSILON))
        return {
            "giou": float(self.averages()[2, 1]),
            "ciou": float(ciou) if self.sums[1, 1] else 0.0,
            "n_images": int(self.counts[0]),
            "n_masks": int(self.counts[2]),
        }


def _to_numpy(masks: Any) -> np.ndarray:
    """Array of a tensor (any device, bf16 included), of an array, or of a list of either."""
    if isinstance(masks, (list, tuple)):
        return np.stack([_to_numpy(mask) for mask in masks]) if masks else np.zeros((0, 0, 0))
    if hasattr(masks, "detach"):
        masks = masks.detach().cpu()
        masks = masks.float().numpy() if masks.is_floating_point() else masks.numpy()
    return np.asarray(masks)
