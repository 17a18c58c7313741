"""The evaluators of InstructSAM against the published ones: real DIOR pictures and synthetic sets."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require_golden
from utils.instructsam_data import read_dataset
from utils.instructsam_eval_counts import (
    CountScores,
    proposal_recall,
    read_count_folder,
    score_count_folder,
    score_predictions,
)
from utils.instructsam_eval_data import Entry, Truth, place_predictions, read_truth
from utils.instructsam_eval_scores import (
    above,
    find_overlaps,
    mean_iou,
    recognition,
    sweep,
    sweep_thresholds,
)
from utils.instructsam_files import Proposals, read_predictions, read_proposals

FOLDER = require_golden("instructsam")
DIOR = FOLDER / "dior_mini"
KINDS = ("bbox", "segm")
EXACT = 1e-9


def load(path: Path) -> Any:
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------------ comparing blocks


def check_recognition(
    truth: Truth, placed: list[Entry], expected: dict[str, Any], extra: list[str], keep_scores: bool = False
) -> None:
    assert set(expected) <= set(KINDS) and expected
    for kind, block in expected.items():
        found = recognition(truth, placed, kind, extra, keep_scores)
        assert found.mF1 == pytest.approx(block["mF1"], abs=EXACT)
        assert found.mAP50 == pytest.approx(block["mAP50"], abs=EXACT)
        for name, value in (("mF1", found.extra_mF1), ("mAP50", found.extra_mAP50)):
            assert value == pytest.approx(block[f"{name}_unseen"], abs=EXACT) or (value is None and not extra)
        check_classes(found.per_class, block["per_class"])
        if "cocoeval_summary" in block:
            for mine, theirs in zip(found.summary, block["cocoeval_summary"], strict=True):
                assert round(mine.pop("value"), 3) == theirs.pop("value")
                assert mine == theirs


def check_classes(found: dict[str, dict[str, float]], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, row in expected.items():
        for key, value in row.items():
            if key == "AP50_printed":
                assert f"{100 * found[name]['ap50']:.1f}" == value, name
            else:
                assert found[name][key] == pytest.approx(value, abs=EXACT), (name, key)


def check_counts(found: CountScores, expected: dict[str, Any], percent: bool) -> None:
    """`percent`: the numbers of the prediction form (percent, one decimal); otherwise means are fractions."""
    assert list(found.per_class) == list(expected["per_category"])
    for name, row in expected["per_category"].items():
        mine = found.per_class[name]
        assert [mine["gt"], mine["tp"], mine["fp"], mine["fn"]] == [
            row[k] for k in ("GT Count", "TP", "FP", "FN")
        ]
        for key in ("Precision", "Recall", "F1"):
            assert float(row[key]) == round(100 * mine[key.lower()], 1), (name, key)
    for mine, theirs in ((found.macro, expected["macro_avg"]), (found.extra, expected.get("unseen_avg"))):
        assert (mine is None) == (theirs is None)
        for key, value in (theirs or {}).items():
            share = mine[key.lower()]
            assert round(100 * share, 1) == value if percent else share == pytest.approx(value, abs=EXACT)


def check_miou(truth: Truth, placed: list[Entry], expected: dict[str, Any]) -> None:
    classes, mean = mean_iou(truth, placed)
    assert mean == pytest.approx(expected["mIoU"], abs=EXACT)
    assert {k: v is None for k, v in classes.items()} == {
        k: v is None for k, v in expected["class_iou"].items()
    }
    for name, value in expected["class_iou"].items():
        assert value is None or classes[name] == pytest.approx(value, abs=EXACT)


def check_sweep(truth: Truth, placed: list[Entry], expected: dict[str, Any]) -> None:
    thresholds = sweep_thresholds(0.02, [])
    assert thresholds == expected["thresholds"]
    found = sweep(truth, find_overlaps(truth, placed, "bbox"), "bbox", thresholds)
    assert found.mF1 == pytest.approx(expected["box_mF1"], abs=EXACT)
    assert found.best_threshold == expected["best_threshold"]


def check_recall(truth: Truth, proposals: dict[str, Proposals], expected: dict[str, Any]) -> None:
    for threshold, block in expected.items():
        if threshold == "pair_all_vs_every_second":
            half = {k: v.select(range(0, len(v), 2)) for k, v in proposals.items()}
            found = [proposal_recall(truth, p) for p in (proposals, half)]
        else:
            found = [proposal_recall(truth, proposals, float(threshold))]
            assert found[0].n_proposals == block["n_region_proposals"]
        for number, recall in enumerate(found, start=1):
            assert recall.mean == pytest.approx(block[f"recall{number}"], abs=EXACT)
            assert recall.per_class == pytest.approx(block[f"category_recalls{number}"], abs=EXACT)


# ------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def truth() -> Truth:
    return read_truth(DIOR / "dior_mini2_ann.json")


def dior_runs() -> list[tuple[str, str]]:
    """(setting, key in the expectations) of every recorded evaluation of the stored predictions."""
    runs = []
    for setting in ("open_vocabulary", "open_ended"):
        keys = load(FOLDER / "expected" / f"dior_mini2_{setting}.json")
        runs += [(setting, key) for key in keys if key.split("/")[-1] in ("unseen_classes", "no_extra")]
    return runs


def label_map(key: str) -> dict[str, str] | None:
    name = key.split("/")[0]
    return load(DIOR / f"pred2cat_open_ended_{name}.json") if name.startswith("map") else None


@pytest.mark.parametrize("setting, key", dior_runs())
def test_stored_predictions(setting: str, key: str, truth: Truth) -> None:
    recorded = load(FOLDER / "expected" / f"dior_mini2_{setting}.json")
    expected, mapping = recorded[key], label_map(key)
    predictions = read_predictions(next((DIOR / "results" / setting).glob("*_preds_coco.json")))
    placed = place_predictions(predictions, truth, mapping)
    assert len(placed) == expected["n_predictions_after_mapping"]
    lists = read_dataset("dior_mini2", FOLDER / "datasets_config.json").class_lists
    extra = list(lists["unseen_classes"]) if key.endswith("unseen_classes") else []
    check_recognition(truth, placed, expected["recognition_score_flattened"], extra)
    check_counts(
        score_predictions(truth, placed, extra_classes=extra), expected["counting_from_predictions"], True
    )
    folder = read_count_folder(next((DIOR / "object_counts").glob(f"*_{setting}")), truth)
    published, _ = score_count_folder(truth, folder, mapping, extra)
    check_counts(published, expected["counting_from_count_dir"], False)
    head = f"{key.split('/')[0]}/" if mapping else ""
    check_miou(truth, placed, recorded[f"{head}mIoU"])
    check_recognition(truth, placed, recorded[f"{head}AP_with_raw_scores"], [], keep_scores=True)
    swept = recorded[f"{head}score_sweeping"]
    check_sweep(truth, placed, swept)
    check_recognition(truth, above(placed, swept["best_threshold"]), swept["recognition_at_best"], [])
    assert set(recorded["label_totals_from_predictions"]) == {item["label"] for item in predictions}
    assert set(folder.labels) == set(recorded["label_totals_from_count_dir"])


def test_proposal_recall(truth: Truth) -> None:
    proposals = read_proposals(DIOR / "region_proposals" / "sam2_hiera_l.json")
    check_recall(truth, proposals, load(FOLDER / "expected" / "dior_mini2_proposal_recall.json"))


# ------------------------------------------------------------------------------------------------- synthetic


def synthetic() -> list[str]:
    return sorted(
        path.name.removesuffix("_preds.json") for path in (FOLDER / "synthetic").glob("*_preds.json")
    )


@pytest.mark.parametrize("name", synthetic())
def test_synthetic(name: str) -> None:
    base = FOLDER / "synthetic"
    expected = load(FOLDER / "expected" / f"synthetic_{name}.json")
    truth, extra = read_truth(base / f"{name}_ann.json"), expected.pop("extra_classes")
    predictions = read_predictions(base / f"{name}_preds.json")
    placed = place_predictions(predictions, truth)
    first_only = read_truth(base / f"{name}_ann.json", first_polygon_only=True)
    for key, block in expected.items():
        if key in ("flattened", "flattened_with_all_polygon_parts"):
            check_recognition(truth, placed, block, extra)
        elif key == "raw_scores":
            check_recognition(truth, placed, block, extra, keep_scores=True)
        elif key == "mIoU":
            check_miou(first_only, placed, block)
        elif key == "mIoU_with_all_polygon_parts":
            check_miou(truth, placed, block)
        elif key == "mask_f1_function_called_alone_first_polygon_only":
            found = recognition(first_only, placed, "segm")
            assert found.mF1 == pytest.approx(block["mF1"], abs=EXACT)
            check_classes(found.per_class, block["per_class"])
        elif key.startswith("counting_from_predictions_thr"):
            check_counts(score_predictions(truth, placed, float(key.partition("thr")[2]), extra), block, True)
        elif key == "counting_without_score_field":
            bare = [{k: v for k, v in item.items() if k != "score"} for item in predictions]
            check_counts(
                score_predictions(truth, place_predictions(bare, truth), extra_classes=extra), block, True
            )
        elif key == "score_sweeping":
            check_sweep(truth, placed, block)
        else:
            assert key == "proposal_recall"
            check_recall(truth, read_proposals(base / f"{name}_proposals.json"), block)


def test_awkward_count_folder() -> None:
    truth = read_truth(FOLDER / "synthetic" / "counting_dir_ann.json")
    folder = read_count_folder(FOLDER / "synthetic" / "counting_dir_counts", truth)
    extra = load(FOLDER / "expected" / "synthetic_rle.json")["extra_classes"]  # recorded with the same list
    for block in load(FOLDER / "expected" / "counting_dir.json").values():
        published, _ = score_count_folder(truth, folder, block["pred2cat"], extra)
        check_counts(published, block["result"], False)
