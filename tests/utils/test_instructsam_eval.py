"""The evaluators of InstructSAM: against pair-by-pair counting, by hand, and on awkward input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.instructsam_baseline import (
    matches_per_pair,
    pair_iou_boxes,
    pair_iou_pixels,
    pair_iou_rle,
    random_set,
)
from utils.config import ConfigError, parse_config
from utils.instructsam_cli import main
from utils.instructsam_eval_config import EvaluateConfig
from utils.instructsam_eval_counts import (
    proposal_recall,
    read_count_folder,
    score_count_folder,
    score_predictions,
)
from utils.instructsam_eval_data import Truth, place_predictions, read_truth
from utils.instructsam_eval_scores import (
    above,
    count_matches,
    find_overlaps,
    mean_iou,
    recognition,
    sweep,
    sweep_thresholds,
)
from utils.instructsam_files import Proposals, write_proposals
from utils.rle import decode_mask, encode_mask


def truth_of(folder: Path, content: dict[str, Any], **options: Any) -> Truth:
    (folder / "truth.json").write_text(json.dumps(content))
    return read_truth(folder / "truth.json", **options)


def box_entry(image: int, number: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": number, "bbox": box} | more


def small_content(annotations: list[dict[str, Any]]) -> dict[str, Any]:
    images = [{"id": k, "file_name": f"sub/im{k}.png", "height": 20, "width": 30} for k in (1, 2, 3)]
    classes = [{"id": 4, "name": "ship"}, {"id": 2, "name": "plane"}, {"id": 9, "name": "tank"}]
    return {"images": images, "categories": classes, "annotations": annotations}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Truth, list[dict[str, Any]]]:
    """A crowded random set: objects overlap, predictions repeat, so that partners are contested."""
    content, predictions = random_set(images=6, objects=40, classes=3, side=60, seed=3)
    truth = truth_of(tmp_path_factory.mktemp("set"), content)
    return truth, place_predictions(predictions, truth)


@pytest.mark.parametrize(
    "kind, pair_iou", [("bbox", pair_iou_boxes), ("segm", pair_iou_pixels), ("segm", pair_iou_rle)]
)
def test_f1_equals_pair_by_pair(kind: str, pair_iou: Any, drawn: tuple[Truth, list[dict[str, Any]]]) -> None:
    truth, placed = drawn
    found = recognition(truth, placed, kind)
    expected = matches_per_pair(truth, placed, pair_iou)
    assert {n: [r["tp"], r["fp"], r["fn"]] for n, r in found.per_class.items()} == expected
    assert find_overlaps(truth, placed, kind).contested, "the set holds no contested objects"


def test_sweep_equals_single_evaluations(drawn: tuple[Truth, list[dict[str, Any]]]) -> None:
    truth, placed = drawn
    overlaps = find_overlaps(truth, placed, "segm")
    thresholds = sweep_thresholds(0, [item["score"] for item in placed])
    assert len(thresholds) == len({item["score"] for item in placed})
    found = sweep(truth, overlaps, "segm", thresholds)
    for k in range(0, len(thresholds), 17):
        alone = recognition(truth, above(placed, thresholds[k]), "segm")
        assert found.mF1[k] == pytest.approx(alone.mF1 / 100)
    coarse = sweep(truth, overlaps, "segm", sweep_thresholds(0.02, []))
    assert max(found.mF1) >= max(coarse.mF1)
    assert found.best_threshold == thresholds[int(np.argmax(found.mF1))]
    assert len(sweep_thresholds(0.0025, [])) == 400 and len(sweep_thresholds(0, range(5000))) == 1000


def test_mean_iou_equals_decoded_masks(drawn: tuple[Truth, list[dict[str, Any]]]) -> None:
    truth, placed = drawn
    classes, mean = mean_iou(truth, placed)
    for number, name in truth.classes.items():
        shared = either = 0
        for image in truth.images:
            unions = []
            for entries in (truth.annotations, placed):
                masks = [
                    decode_mask(e["segmentation"])
                    for e in entries
                    if (e["image_id"], e["category_id"]) == (image, number)
                ]
                unions.append(np.any(masks, axis=0) if masks else np.zeros((60, 60), bool))
            shared, either = shared + (unions[0] & unions[1]).sum(), either + (unions[0] | unions[1]).sum()
        assert classes[name] == pytest.approx(shared / either)
    assert mean == pytest.approx(np.mean(list(classes.values())))


def test_perfect_and_absent_predictions(drawn: tuple[Truth, list[dict[str, Any]]]) -> None:
    truth, _ = drawn
    perfect = [entry | {"score": 0.5} for entry in truth.annotations]
    for kind in ("bbox", "segm"):
        found = recognition(truth, perfect, kind, ["class 1", "no class"])
        assert found.mF1 == found.mAP50 == found.extra_mF1 == pytest.approx(100)
        nothing = recognition(truth, [], kind, ["class 1"])
        assert nothing.mF1 == nothing.mAP50 == nothing.extra_mAP50 == 0 and nothing.summary == []
        assert sum(row["fn"] for row in nothing.per_class.values()) == len(truth.annotations)
    assert sweep(truth, find_overlaps(truth, [], "bbox"), "bbox", sweep_thresholds(0, [])).mF1 == [0.0]
    assert mean_iou(truth, []) == ({name: 0.0 for name in truth.classes.values()}, 0.0)


def test_without_ground_truth(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, small_content([]))
    placed = place_predictions([box_entry(1, 4, [0, 0, 5, 5])], truth)
    found = recognition(truth, placed, "bbox")
    assert found.mF1 == found.mAP50 == 0 and found.per_class["ship"]["fp"] == 1
    assert mean_iou(truth, []) == ({"ship": None, "plane": None, "tank": None}, 0.0)


def test_ap_scores_matter_only_when_kept(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, small_content([box_entry(1, 4, [0, 0, 9, 9])]))
    wrong_first = [box_entry(1, 4, [15, 5, 9, 9], score=0.2), box_entry(1, 4, [0, 0, 9, 9], score=0.9)]
    placed = place_predictions(wrong_first, truth)
    assert recognition(truth, placed, "bbox").mAP50 == pytest.approx(50)
    assert recognition(truth, placed, "bbox", keep_scores=True).mAP50 == pytest.approx(100)


def test_placing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truth = truth_of(tmp_path, small_content([]))
    items = [
        {"image_id": 1, "bbox": [0, 0, 1, 1], "label": "boat"},
        {"image_id": 1, "bbox": [0, 0, 1, 1], "label": "plane", "score": 0.3},
        {"image_id": 7, "bbox": [0, 0, 1, 1], "label": "plane"},
        {"image_id": 2, "bbox": [0, 0, 1, 1], "label": "x", "category_id": 9},
        {"image_id": 2, "bbox": [0, 0, 1, 1], "category_id": 5},
        {"image_id": 2, "bbox": [0, 0, 1, 1], "category_id": 9, "segmentation": encode_mask(np.ones((9, 9)))},
    ]
    assert [(p["category_id"], p["score"]) for p in place_predictions(items, truth)] == [(2, 0.3), (9, 1.0)]
    assert "image 7 (1)" in caplog.text and "class 'boat' (1)" in caplog.text
    assert "mask: " in caplog.text and "[9, 9]" in caplog.text
    mapped = place_predictions(items, truth, {"boat": "ship", "plane": "jet"})
    assert [p["category_id"] for p in mapped] == [4]


def test_segmentations_of_every_form(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:11, 3:9] = True
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=0, append=0)), prepend=0).tolist()
    plain = {"size": [20, 30], "counts": [*runs, 600 - sum(runs)]}
    square = [3, 5, 9, 5, 9, 11, 3, 11]
    forms = [encode_mask(mask), plain, [square], square, [square, [20, 5, 25, 5, 25, 10, 20, 10]]]
    content = small_content([box_entry(1, 4, [3, 5, 6, 6], segmentation=form) for form in forms])
    truth = truth_of(tmp_path, content)
    decoded = [decode_mask(entry["segmentation"]) for entry in truth.annotations]
    assert all(np.array_equal(found, mask) for found in decoded[:4])
    assert decoded[4].sum() == mask.sum() + 25
    assert [entry["area"] for entry in truth.annotations] == [36, 36, 36, 36, 61]
    first = truth_of(tmp_path, content, first_polygon_only=True)
    assert np.array_equal(decode_mask(first.annotations[4]["segmentation"]), mask)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 8}, r"annotations\[0\]: image_id 8"),
        ({"category_id": "ship"}, "category_id 'ship'"),
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"segmentation": [[1, 2]]}, "neither RLE nor polygons"),
        ({"segmentation": {"size": [20, 30], "counts": "11"}}, r"annotations\[0\]: segmentation"),
        ({"segmentation": {"size": [9, 30], "counts": "11"}}, r"annotations\[0\]: segmentation"),
    ],
)
def test_faulty_ground_truth_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        truth_of(tmp_path, small_content([box_entry(1, 4, [0, 0, 1, 1]) | change]))


def test_counting_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ships = [box_entry(1, 4, [k, 0, 1, 1]) for k in range(3)]
    truth = truth_of(
        tmp_path, small_content([*ships, box_entry(2, 2, [0, 0, 1, 1]), box_entry(3, 2, [0, 0, 1, 1])])
    )
    folder = tmp_path / "counts"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "im1.json").write_text('{"ship": 2, "tank": 0, "boat": 7, "plane": -1}')
    (folder / "im2.json").write_text('{"ship": 1.9, "plane": true}')  # flat folders work, too
    (folder / "sub" / "im3.json").write_text("[1]")
    (folder / "other.json").write_text("{}")
    counts = read_count_folder(folder, truth)
    assert counts.images == {1: {"ship": 2, "tank": 0, "boat": 7}, 2: {"ship": 1, "plane": 1}}
    assert counts.missing == ["sub/im3.png"] and sorted(counts.faults) == ["im3.json", "other.json"]
    assert "'plane' is -1" in caplog.text
    published, corrected = score_count_folder(truth, counts, extra_classes=["plane"])
    assert list(published.per_class) == ["plane", "ship", "tank"]  # tank: named, though never counted
    ship = published.per_class["ship"]
    assert [ship[k] for k in ("gt", "tp", "fp", "fn")] == [3, 2, 1, 1]
    assert published.macro["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert published.extra["f1"] == 1  # the picture without a file is not looked at
    assert list(corrected.per_class) == ["plane", "ship"]
    assert corrected.extra["recall"] == pytest.approx(0.5)
    assert corrected.macro["f1"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    mapped, _ = score_count_folder(truth, counts, {"boat": "ship", "ship": "ship"})
    assert mapped.per_class["ship"]["fp"] == 7  # labels of one class add up: 9 against 3, 1 against 0
    with pytest.raises(ValueError, match="no such folder"):
        read_count_folder(tmp_path / "absent", truth)


def test_predicted_counts_by_score(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, small_content([box_entry(1, 4, [0, 0, 1, 1])]))
    items = [box_entry(1, 4, [0, 0, 1, 1], score=s) for s in (0.005, 0.02, 0.6)] + [
        box_entry(2, 2, [0, 0, 1, 1])
    ]
    placed = place_predictions(items, truth)
    for threshold, fp in ((0.0, 2), (0.01, 1), (0.5, 0)):
        found = score_predictions(truth, placed, threshold).per_class
        assert [found["ship"]["tp"], found["ship"]["fp"], found["plane"]["fp"]] == [1, fp, 1]


def test_proposal_recall_by_hand(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), bool)
    mask[:10, :10] = True
    entries = [
        box_entry(1, 4, [0, 0, 10, 10]),
        box_entry(1, 2, [0, 0, 10, 10]),
        box_entry(2, 2, [5, 5, 4, 4]),
    ]
    for entry in entries:
        entry["segmentation"] = encode_mask(mask)
    truth = truth_of(tmp_path, small_content(entries))
    boxes, scores = [[0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 8]], [0.9, 0.8, 0.7]
    proposals = {"im1.png": Proposals(np.array(boxes), np.array(scores), [encode_mask(mask)] * 3)}
    found = proposal_recall(truth, proposals)
    assert found.per_class == {"ship": 1.0, "plane": 0.5, "tank": 0.0}
    assert (found.mean, found.present_mean, found.n_proposals) == (pytest.approx(0.5), pytest.approx(0.75), 3)
    best = proposal_recall(truth, proposals, 0.85)
    assert best.per_class["ship"] == 1.0 and best.per_class["plane"] == 0.0
    assert proposal_recall(truth, proposals, masks=True).per_class["ship"] == 1.0
    with pytest.raises(ValueError, match="boxes only"):
        proposal_recall(truth, {"im1.png": Proposals(np.array(boxes), np.array(scores))}, masks=True)
    broken = Proposals(np.array(boxes), np.array(scores), [{"size": [20, 30], "counts": "1"}] * 3)
    with pytest.raises(ValueError, match="sub/im1.png: proposal 0"):
        proposal_recall(truth, {"sub/im1.png": broken}, masks=True)


# ----------------------------------------------------------------------------------------------- the command


def test_command_with_a_clip_and_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content, predictions = random_set(images=3, objects=10, classes=2, side=60, seed=0)
    Path("truth.json").write_text(json.dumps(content))
    Path("preds.json").write_text(
        json.dumps([{k: v for k, v in p.items() if k != "category_id"} for p in predictions])
    )
    write_proposals("props.json", {"1.png": Proposals(np.array([[0, 0, 5, 5]]), np.array([0.5]))})
    args = ["evaluate", "--annotations", "truth.json", "--predictions", "preds.json", "--map_model", "tiny"]
    args += ["--coco_pred_path", "preds.json", "--mask_proposals", "props.json", "--device", "cpu"]
    args += [
        "--score_sweeping",
        "--sweep_step",
        "0",
        "--sweep_metric",
        "segm",
        "--eval_mIoU",
        "true",
        "--out",
        "out",
    ]
    assert main(args) == 0
    report = json.loads(Path("out/preds_recognition.json").read_text())
    assert report["label_map"]["class 1"] == {
        "class": "class 1",
        "similarity": pytest.approx(1),
        "accepted": True,
    }
    assert report["segm"]["mF1"] == pytest.approx(100 * max(report["sweep"]["mF1"]))
    assert 0 < report["n_predictions_kept"] <= report["n_predictions"] == len(predictions)
    assert report["mIoU"]["mean"] > 0
    printed = capsys.readouterr().out
    for name in ("preds_recognition", "preds_counting", "props_recall"):
        text = Path(f"out/{name}.md").read_text()
        assert text in printed and "| class 2 |" in text
    assert "| class 1 | class 1 | 1.000 | yes |" in printed


def test_command_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        parse_config(EvaluateConfig, ["--predictions", "absent.json", "--sweep_step", "1.5"])
    for text in ("absent.json", "--dataset_config", "--sweep_step is 1.5"):
        assert text in str(error.value)
    with pytest.raises(ConfigError, match="nothing to score"):
        parse_config(EvaluateConfig, [])
    Path("truth.json").write_text(json.dumps(small_content([])))
    Path("preds.json").write_text(json.dumps([{"image_id": 1, "bbox": [0, 0, 1, 1], "label": "ship"}]))
    Path("clips.yaml").write_text("georsclip: gone.pt\n")
    args = ["evaluate", "--annotations", "truth.json", "--predictions", "preds.json"]
    with pytest.raises(ValueError, match="gone.pt is not there.*--label_map"):
        main([*args, "--checkpoint_config", "clips.yaml"])
    assert main([*args, "--setting", "open_vocabulary"]) == 0  # labels that are class names need no CLIP


def test_classes_out_of_order_are_counted_right(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, small_content([box_entry(1, 9, [0, 0, 5, 5]), box_entry(2, 2, [0, 0, 5, 5])]))
    placed = place_predictions([box_entry(1, 9, [0, 0, 5, 5]), box_entry(3, 4, [0, 0, 5, 5])], truth)
    hits, kept, objects = count_matches(find_overlaps(truth, placed, "bbox"), list(truth.classes))
    assert hits[0].tolist() == [0, 0, 1] and kept[0].tolist() == [1, 0, 1] and objects.tolist() == [0, 1, 1]
