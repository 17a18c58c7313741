"""InstructSAM's matching and mask F1 the straightforward way, and inputs to compare on.

The matching is the integer program as the paper states it, for PuLP's branch-and-cut solver; the F1 looks at
every pair of a prediction and an object by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from utils.instructsam_eval_data import Entry, Truth


def integer_program(similarity: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Optimal pairs (region, label), int64 (P, 2), by PuLP and its CBC; arguments as `assign`.

    Raises:
        RuntimeError: the solver found no optimum.
    """
    import pulp

    regions, labels = similarity.shape
    cost = 1 - similarity.astype(np.float64)
    problem = pulp.LpProblem("matching", pulp.LpMinimize)
    x = pulp.LpVariable.dicts("x", (range(regions), range(labels)), cat="Binary")
    problem += pulp.lpSum(cost[i, j] * x[i][j] for i in range(regions) for j in range(labels))
    for i in range(regions):
        problem += pulp.lpSum(x[i][j] for j in range(labels)) <= 1
    for j in range(labels):
        taken = pulp.lpSum(x[i][j] for i in range(regions))
        problem += taken == int(counts[j]) if regions > sum(counts) else taken <= int(counts[j])
    if regions <= sum(counts):
        problem += pulp.lpSum(x[i][j] for i in range(regions) for j in range(labels)) == regions
    problem.solve(pulp.PULP_CBC_CMD(msg=0))
    if pulp.LpStatus[problem.status] != "Optimal":
        raise RuntimeError(f"CBC ended with {pulp.LpStatus[problem.status]}")
    chosen = [(i, j) for i in range(regions) for j in range(labels) if (x[i][j].value() or 0) > 0.5]
    return np.array(chosen, np.int64).reshape(-1, 2)


def pair_iou_rle(prediction: Entry, target: Entry) -> float:
    """Mask IoU of one pair on run-length codes."""
    from pycocotools import mask as coco

    codes = [prediction["segmentation"], target["segmentation"]]
    return float(coco.area(coco.merge(codes, intersect=True)) / coco.area(coco.merge(codes)))


def pair_iou_pixels(prediction: Entry, target: Entry) -> float:
    """Mask IoU of one pair on decoded masks."""
    from pycocotools import mask as coco

    mine, theirs = (coco.decode(entry["segmentation"]).astype(bool) for entry in (prediction, target))
    return float((mine & theirs).sum() / (mine | theirs).sum())


def pair_iou_boxes(prediction: Entry, target: Entry) -> float:
    """IoU of two boxes xywh."""
    (x, y, w, h), (u, v, a, b) = prediction["bbox"], target["bbox"]
    wide, tall = min(x + w, u + a) - max(x, u), min(y + h, v + b) - max(y, v)
    shared = max(wide, 0.0) * max(tall, 0.0)
    return shared / (w * h + a * b - shared)


def matches_per_pair(
    truth: Truth, predictions: Sequence[Entry], pair_iou: Callable[[Entry, Entry], float]
) -> dict[str, list[int]]:
    """tp, fp, fn of every class: each prediction takes the free object of its picture and class with the
    highest IoU, if that reaches 0.5."""
    result = {}
    for number, name in truth.classes.items():
        tp = fp = fn = 0
        for image in truth.images:
            mine = [p for p in predictions if p["image_id"] == image and p["category_id"] == number]
            theirs = [a for a in truth.annotations if a["image_id"] == image and a["category_id"] == number]
            free = list(range(len(theirs)))
            for prediction in mine:
                best, highest = -1, 0.0
                for k in free:
                    iou = pair_iou(prediction, theirs[k])
                    if iou > highest:
                        best, highest = k, iou
                if highest >= 0.5:
                    free.remove(best)
                    tp += 1
                else:
                    fp += 1
            fn += len(free)
        result[name] = [tp, fp, fn]
    return result


def random_similarities(regions: int, labels: int, most: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Similarities float32 (N, M) about as CLIP's (0.2 to 0.28) and counts from 1 to `most`."""
    random = np.random.default_rng(seed)
    similarity = random.normal(0.24, 0.015, (regions, labels)).astype(np.float32)
    return similarity, random.integers(1, most + 1, labels).tolist()


def random_set(
    images: int, objects: int, classes: int, side: int, seed: int
) -> tuple[dict[str, Any], list[Entry]]:
    """A COCO ground truth of ellipses and predictions that miss, repeat and shift them; both with masks."""
    from utils.rle import encode_mask

    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]

    def entry(image: int, number: int, centre: np.ndarray, radii: np.ndarray) -> Entry:
        inside = ((columns - centre[0]) / radii[0]) ** 2 + ((rows - centre[1]) / radii[1]) ** 2 <= 1
        xs, ys = (np.flatnonzero(inside.any(axis=axis)) for axis in (0, 1))
        box = [float(v) for v in (xs[0], ys[0], xs[-1] - xs[0] + 1, ys[-1] - ys[0] + 1)]
        return {"image_id": image, "category_id": number, "bbox": box, "segmentation": encode_mask(inside)}

    annotations, predictions = [], []
    for image in range(1, images + 1):
        for _ in range(objects):
            centre, radii = random.uniform(0.1, 0.9, 2) * side, random.uniform(0.02, 0.12, 2) * side
            number = int(random.integers(1, classes + 1))
            annotations.append(entry(image, number, centre, radii))
            for _ in range(int(random.choice([0, 1, 1, 1, 2]))):
                other = number if random.random() < 0.85 else int(random.integers(1, classes + 1))
                shift = random.normal(0, 0.25, 2) * radii
                item = entry(
                    image, other, np.clip(centre + shift, 0, side - 1), radii * random.uniform(0.7, 1.3, 2)
                )
                predictions.append(
                    item | {"score": float(random.uniform(0.2, 0.3)), "label": f"class {other}"}
                )
    pictures = [
        {"id": k, "file_name": f"{k}.png", "height": side, "width": side} for k in range(1, images + 1)
    ]
    names = [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)]
    for number, item in enumerate(annotations):
        item |= {"id": number, "iscrowd": 0}
    return {"images": pictures, "categories": names, "annotations": annotations}, predictions
