"""Scores against straightforward definitions, epsilons, tables, resampling."""

import numpy as np
import pytest

from utils import metrics


def naive_counts(prediction: np.ndarray, target: np.ndarray) -> tuple[list[int], list[int], list[int]]:
    hits, unions, targets = [0, 0], [0, 0], [0, 0]
    for p, t in zip(prediction.ravel().tolist(), target.ravel().tolist()):
        if t == 255:
            continue
        for label in (0, 1):
            hits[label] += p == label and t == label
            targets[label] += t == label
            unions[label] += (p == label) + (t == label) - (p == label and t == label)
    return hits, unions, targets


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0, 1, 255), (0, 1, 2), (0, 1, 2, 255), (255,), (1,)])
def test_counts_equal_a_loop(values: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(values))
    for _ in range(5):
        target = rng.choice(values, size=(9, 7)).astype(np.uint8)
        prediction = rng.integers(0, 2, size=(9, 7))
        got = metrics.mask_counts(prediction, target)
        assert [part.tolist() for part in got] == [list(part) for part in naive_counts(prediction, target)]
        assert [p.tolist() for p in metrics.mask_counts(prediction.astype(bool), target)] == [
            p.tolist() for p in got
        ]
        if set(values) == {0, 1}:
            other = metrics.mask_counts(prediction, target.astype(bool))
            assert [p.tolist() for p in other] == [p.tolist() for p in got]


def test_counts_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match="shape"):
        metrics.mask_counts(np.zeros((3, 4)), np.zeros((4, 3)))


def test_published_epsilons() -> None:
    assert metrics.iou_from_counts(np.array([9]), np.array([9]))[0] == np.float32(0.9999989)
    assert metrics.iou_from_counts(np.array([300]), np.array([300]))[0] == 1
    assert metrics.iou_from_counts(np.array([0]), np.array([0]))[0] == 1
    empty, full = np.zeros((4, 4)), np.ones((4, 4))
    assert metrics.mask_iou(empty, empty) == 1
    assert metrics.mask_iou(full, empty) == 0
    assert metrics.mask_iou(empty, full) == 0


def make_counts(n_images: int = 12, seed: int = 0) -> metrics.Counts:
    rng = np.random.default_rng(seed)
    rows = []
    for image in range(n_images):
        for number in range(int(rng.integers(1, 4))):
            target = (rng.random((8, 8)) < 0.4) & (number != 2)
            prediction = target ^ (rng.random((8, 8)) < 0.2)
            intersection, union, targets = metrics.mask_counts(prediction, target)
            rows.append(
                {
                    "image": f"image {image}",
                    "intersection": intersection,
                    "union": union,
                    "target": targets,
                    "gt_exists": bool(target.any()),
                    "pred_exists": bool(rng.random() < 0.8),
                    "kind": ("attribute", "size", "nothing")[number],
                }
            )
    return metrics.Counts.from_rows(rows)


def test_scores_by_hand() -> None:
    base = {"intersection": [0, 0], "gt_exists": True, "pred_exists": True, "target": [0, 5]}
    rows = [
        base | {"image": "a", "intersection": [0, 5], "union": [0, 10], "kind": "x"},
        base | {"image": "a", "union": [0, 30], "kind": "y", "pred_exists": False},
        base | {"image": "b", "union": [9, 0], "target": [9, 0], "kind": "x"},
    ]
    counts = metrics.Counts.from_rows(rows)
    found = metrics.scores(counts)
    assert found["giou"] == pytest.approx((0.5 + 0 + 1) / 3, abs=1e-5)
    assert found["ciou"] == pytest.approx(5 / 40)
    assert found["see_accuracy"] == pytest.approx(2 / 3)
    assert found["pr@0.5"] == pytest.approx(1 / 3)  # 5 / (10 + 1e-5) is just below 0.5
    assert (found["n_masks"], found["n_images"]) == (3, 2)
    by_kind = metrics.scores_by_kind(counts)
    assert list(by_kind) == ["x", "y"]
    assert by_kind["x"]["giou"] == pytest.approx(0.75, abs=1e-5)
    with pytest.raises(ValueError, match="no query"):
        metrics.scores(metrics.Counts.from_rows([]))


def test_bootstrap_equals_rescoring_every_draw() -> None:
    counts = make_counts()
    found = metrics.bootstrap(counts, rounds=7, fraction=0.8, seed=3)
    random = np.random.RandomState(3)
    for drawn, row in zip(found["drawn_indices"], found["per_round"]):
        assert drawn == random.choice(counts.n_images, int(0.8 * counts.n_images)).tolist()
        picked = np.concatenate([np.flatnonzero(counts.image == image) for image in drawn])
        assert row[0] == pytest.approx(counts.iou[picked].mean(), abs=1e-6)
        sums = counts.intersection[picked, 1].sum(), counts.union[picked, 1].sum()
        assert row[1] == pytest.approx(sums[0] / sums[1], abs=1e-9)
        assert row[2] == pytest.approx((counts.gt_exists == counts.pred_exists)[picked].mean(), abs=1e-9)
    assert found["giou_std"] == pytest.approx(np.std([row[0] for row in found["per_round"]]))
    with pytest.raises(ValueError, match="at least one"):
        metrics.bootstrap(counts, fraction=0.01)


def test_confidence_intervals_hold_the_score() -> None:
    counts = make_counts(40)
    found, intervals = metrics.scores(counts), metrics.confidence_intervals(counts, rounds=300)
    assert set(intervals) == set(metrics.score_ratios(counts))
    for name, (low, high) in intervals.items():
        assert low <= found[name] <= high
        assert low < high or name.startswith("pr@")
    narrow = metrics.confidence_intervals(counts, level=0.5, rounds=300)
    assert narrow["giou"][1] - narrow["giou"][0] < intervals["giou"][1] - intervals["giou"][0]


def test_validation_meters() -> None:
    import torch

    rng = np.random.default_rng(0)
    meters, rows = metrics.ValidationMeters(), []
    for image in range(6):
        target = (rng.random((3, 6, 5)) < 0.5).astype(np.uint8)
        logits = rng.normal(size=(3, 6, 5)).astype(np.float32)
        logits[0, 0, 0] = 0  # exactly zero is background
        meters.update(torch.from_numpy(logits).to(torch.float64 if image else torch.bfloat16), target)
        for k in range(3):
            triple = metrics.mask_counts(logits[k] > 0, target[k])
            row = dict(zip(("intersection", "union", "target"), triple))
            rows.append(row | {"image": image, "gt_exists": True, "pred_exists": True})
    want = metrics.scores(metrics.Counts.from_rows(rows))
    found = meters.reduce().result()
    assert found["giou"] == pytest.approx(want["giou"], abs=1e-5)
    assert found["ciou"] == pytest.approx(want["ciou"], abs=1e-5)
    assert (found["n_images"], found["n_masks"]) == (6, 18)


def test_validation_meters_mismatch() -> None:
    logits, target = np.ones((1, 4, 4)), np.ones((2, 4, 4))
    with pytest.raises(ValueError, match="scene.png: 1 predicted masks for 2 targets"):
        metrics.ValidationMeters().update(logits, target, image="scene.png")
    meters = metrics.ValidationMeters(pair_mismatch="truncate")
    meters.update(logits, target)
    assert meters.result()["giou"] == pytest.approx(0.5, abs=1e-4)  # divided by two targets
    empty = metrics.ValidationMeters()
    empty.update([], np.zeros((0, 4, 4)))
    with pytest.raises(ValueError, match="no picture"):
        empty.result()


def test_intervals_of_any_ratio_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = make_counts(40)
    ratios = metrics.score_ratios(counts, (0.3,)) | metrics.presence_ratios(counts)
    ratios |= {"never": (np.zeros(len(counts)), np.zeros(len(counts)))}
    whole = metrics.confidence_intervals(counts, rounds=50, seed=3, ratios=ratios)
    assert set(whole) == set(ratios) - {"never"}
    monkeypatch.setattr(metrics, "_MOST_WEIGHTS", 7 * 40)
    parts = metrics.confidence_intervals(counts, rounds=50, seed=3, ratios=ratios)
    assert parts.keys() == whole.keys() and all(parts[k] == pytest.approx(whole[k]) for k in whole)
    draws = np.random.default_rng(3).integers(0, 40, size=(50, 40))
    values = []
    for draw in draws:  # straight from the definition
        rows = np.concatenate([np.flatnonzero(counts.image == image) for image in draw])
        values.append(np.mean(counts.iou[rows], dtype=np.float64))
    assert whole["giou"] == pytest.approx(np.quantile(values, [0.025, 0.975]))


def test_presence() -> None:
    rows = []
    for gt, said, marked in ((True, True, 5), (True, False, 0), (False, False, 0), (False, True, 10)):
        target, prediction = np.zeros((4, 10), np.uint8), np.zeros((4, 10), bool)
        target.flat[:5] = gt
        target.flat[-20:] = 255
        prediction.flat[:marked] = True
        prediction.flat[-3:] = True  # not counted
        counted = dict(zip(("intersection", "union", "target"), metrics.mask_counts(prediction, target)))
        rows.append({"image": len(rows), "gt_exists": gt, "pred_exists": said} | counted)
    counts = metrics.Counts.from_rows(rows)
    assert counts.predicted.tolist() == [5, 0, 0, 10]
    assert metrics.presence_scores(counts) == {
        "n_absent": 2,
        "n_present": 2,
        "denial_rate": 0.5,
        "false_alarm_area": 0.25,
        "false_denial_rate": 0.5,
    }
    assert metrics.presence_scores(counts.select(counts.gt_exists)).keys() == {
        "n_absent",
        "n_present",
        "false_denial_rate",
    }
