"""IoU, gIoU, cIoU, see accuracy, bootstrap and validation meters against the published evaluation."""

import json

import numpy as np
import pytest

from tests.conftest import require_golden
from utils import metrics, predictions

FOLDER = require_golden("lisat_data") / "iou"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
VALIDATION = json.loads((FOLDER / "validate_expected.json").read_text())
METERS = ("Intersec", "Union", "gIoU")


@pytest.mark.parametrize("case", EXPECTED["single_mask_cases"], ids=lambda case: case["name"])
def test_single_mask(case: dict) -> None:
    with np.load(FOLDER / "single_mask_cases.npz") as arrays:
        pair = arrays[f"pred_{case['index']}"], arrays[f"gt_{case['index']}"]
    intersection, union, target = metrics.mask_counts(*pair)
    assert intersection.tolist() == case["intersection"]
    assert union.tolist() == case["union"]
    assert target.tolist() == case["target"]
    np.testing.assert_allclose(metrics.iou_from_counts(intersection, union), case["iou"], atol=1e-6)


@pytest.fixture(scope="module")
def published() -> predictions.Predictions:
    return predictions.read_predictions(FOLDER / "inference_dir")


def test_prediction_folder_per_image(published: predictions.Predictions) -> None:
    counts = published.counts()
    assert [image["image"] for image in published.images] == [image["key"] for image in EXPECTED["images"]]
    for number, image in enumerate(EXPECTED["images"]):
        rows = counts.select(counts.image == number)
        np.testing.assert_allclose(rows.iou, image["per_mask"], atol=1e-6)
        assert rows.intersection.sum(axis=0).tolist() == image["intersection"]
        assert rows.union.sum(axis=0).tolist() == image["union"]


def test_prediction_folder_scores(published: predictions.Predictions) -> None:
    found = metrics.scores(published.counts())
    for name, value in EXPECTED["all"].items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    rank0 = predictions.read_published(FOLDER / "inference_dir", ranks=[0])
    found = metrics.scores(rank0.counts())
    for name, value in EXPECTED["rank0_only"].items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_bootstrap(published: predictions.Predictions) -> None:
    want = EXPECTED["bootstrap"]
    found = metrics.bootstrap(
        published.counts(), rounds=want["rounds"], fraction=want["fraction"], seed=want["numpy_legacy_seed"]
    )
    assert found["drawn_indices"] == want["drawn_indices"]
    per_round = np.asarray(want["per_round_ciou_giou_see"])[:, [1, 0, 2]]
    np.testing.assert_allclose(found["per_round"], per_round, atol=1e-6)
    for ours, theirs in (("giou", "giou"), ("ciou", "ciou"), ("see_accuracy", "see")):
        for part in ("mean", "std"):
            assert found[f"{ours}_{part}"] == pytest.approx(want[f"{theirs}_{part}"], abs=1e-6)


def _rank_meters(indices: list[int]) -> metrics.ValidationMeters:
    meters = metrics.ValidationMeters(pair_mismatch="truncate")
    with np.load(FOLDER / "validate_items.npz") as arrays:
        for index in indices:
            meters.update(arrays[f"logits_{index}"], arrays[f"gt_{index}"])
    return meters


def _check_meters(meters: metrics.ValidationMeters, want: dict, when: str) -> None:
    for row, name in enumerate(METERS):
        np.testing.assert_allclose(meters.sums[row], want["meters"][name][f"{when}_sum"], rtol=1e-5)
        assert meters.counts[row] == want["meters"][name][f"{when}_count"]
        if when == "after":
            np.testing.assert_allclose(meters.averages()[row], want["meters"][name]["after_avg"], rtol=1e-5)


def _run_rank(rank: int, world_size: int, store: str, runs: list[dict]) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        want = next(run for run in runs if run["rank"] == rank)
        meters = _rank_meters(want["indices"])
        _check_meters(meters, want, "before")
        _check_meters(meters.reduce(), want, "after")
        assert meters.result()["giou"] == pytest.approx(want["giou"], abs=1e-5)
        assert meters.result()["ciou"] == pytest.approx(want["ciou"], abs=1e-5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", sorted(VALIDATION))
def test_validation_meters(world: str, tmp_path) -> None:
    import torch.multiprocessing as mp

    runs = [run for run in VALIDATION[world] if isinstance(run, dict)]
    world_size = len(runs)
    if world_size == 1:
        _run_rank(0, 1, str(tmp_path / "store"), runs)
    else:
        arguments = (world_size, str(tmp_path / "store"), runs)
        mp.start_processes(_run_rank, arguments, nprocs=world_size, start_method="fork")
