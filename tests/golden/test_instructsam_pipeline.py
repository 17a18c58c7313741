"""From stored counts and proposals of the real pictures to labels and scores, through the program's commands.

The CLIP weights of the stored predictions are not here; with the recorded tiny CLIP the labels must be the
recorded ones.
"""

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import require_golden
from utils.instructsam_cli import main
from utils.instructsam_files import read_predictions

FOLDER = require_golden("instructsam")
DIOR = FOLDER / "dior_mini"
MATCHES = json.loads((FOLDER / "clip" / "matching.json").read_text())
COMMON = ["--dataset_name", "dior_mini2", "--dataset_config", str(FOLDER / "datasets_config.json")]


def recorded(activation: str, setting: str) -> dict[str, dict]:
    """Picture stem -> recorded match at the default crop scale."""
    keys = {match["key"]: match for match in MATCHES}
    stems = [key.split("/")[1] for key in keys]
    return {stem: keys[f"{activation}/{stem}/{setting}/default"] for stem in stems}


@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
@pytest.mark.parametrize("setting", ["open_vocabulary", "open_ended"])
def test_match(activation: str, setting: str, tmp_path: Path) -> None:
    clip = {"file": str(FOLDER / "clip" / "tiny_clip.safetensors"), "quick_gelu": activation == "quickgelu"}
    clip["config"] = str(FOLDER / "clip" / "tiny_clip_config.json")
    (tmp_path / "clips.yaml").write_text(yaml.safe_dump({"recorded": clip}))
    args = ["match", *COMMON, "--setting", setting, "--device", "cpu"]
    args += ["--clip_model", "recorded", "--checkpoint_config", str(tmp_path / "clips.yaml")]
    args += ["--count_dir", str(next((DIOR / "object_counts").glob(f"*_{setting}")))]
    args += ["--rp_path", str(DIOR / "region_proposals" / "sam2_hiera_l.json")]
    assert main([*args, "--save_path", str(tmp_path / "preds.json")]) == 0
    found = read_predictions(tmp_path / "preds.json")
    expected = recorded(activation, setting)
    truth = json.loads((DIOR / "dior_mini2_ann.json").read_text())
    stems = {image["id"]: Path(image["file_name"]).stem for image in truth["images"]}
    classes = {c["name"]: c["id"] for c in truth["categories"]}
    order = [stems[item["image_id"]] for item in found]
    assert list(dict.fromkeys(order)) == list(stems.values())  # pictures in annotation order
    for stem, match in expected.items():
        mine = [item for item, of in zip(found, order) if of == stem]
        assert [item["label"] for item in mine] == match["labels"]
        assert [item["bbox"] for item in mine] == match["boxes"]
        assert [item["score"] for item in mine] == pytest.approx(match["scores"], abs=1e-4)
        own = [item["assigned_score"] for item in mine]
        assert own == pytest.approx(match["assigned_label_similarity"], abs=1e-4)
        for item in mine:
            wanted = classes[item["label"]] if setting == "open_vocabulary" else None
            assert item.get("category_id") == wanted


@pytest.mark.parametrize("setting", ["open_vocabulary", "open_ended"])
def test_evaluate_stored_results(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = next((DIOR / "results" / setting).glob("*_preds_coco.json"))
    counts = next((DIOR / "object_counts").glob(f"*_{setting}"))
    args = [
        "evaluate",
        *COMMON,
        "--setting",
        setting,
        "--extra_class",
        "unseen_classes",
        "--eval_mIoU",
        "True",
    ]
    args += ["--predictions", str(predictions), "--count_dir", str(counts), "--out", str(tmp_path)]
    args += ["--mask_proposal", str(DIOR / "region_proposals" / "sam2_hiera_l.json")]
    prefix = ""
    if setting == "open_ended":
        args += ["--label_map", str(DIOR / "pred2cat_open_ended_map_a.json")]
        prefix = "map_a/"
    assert main(args) == 0
    expected = json.loads((FOLDER / "expected" / f"dior_mini2_{setting}.json").read_text())
    block = expected[f"{prefix}unseen_classes"]
    report = json.loads((tmp_path / f"{predictions.stem}_recognition.json").read_text())
    for kind, scores in block["recognition_score_flattened"].items():
        assert report[kind]["mF1"] == pytest.approx(scores["mF1"], abs=1e-9)
        assert report[kind]["mAP50"] == pytest.approx(scores["mAP50"], abs=1e-9)
    assert report["mIoU"]["mean"] == pytest.approx(expected[f"{prefix}mIoU"]["mIoU"], abs=1e-9)
    counted = json.loads((tmp_path / f"{counts.name}_counting.json").read_text())
    assert counted["counting"]["macro"]["f1"] == pytest.approx(
        block["counting_from_count_dir"]["macro_avg"]["F1"], abs=1e-9
    )
    # with every picture counted and only classes that are there, folder and predictions agree
    by_prediction = block["counting_from_predictions"]["macro_avg"]["F1"]
    assert round(100 * counted["corrected"]["macro"]["f1"], 1) == by_prediction
    recall = json.loads((tmp_path / "sam2_hiera_l_recall.json").read_text())["recall"]
    published = json.loads((FOLDER / "expected" / "dior_mini2_proposal_recall.json").read_text())["0.0"]
    assert recall["mean"] == pytest.approx(published["recall1"], abs=1e-9)
    assert recall["n_proposals"] == published["n_region_proposals"]
    printed = capsys.readouterr().out
    for number in (f"{report['bbox']['mF1']:.2f}", f"{100 * recall['mean']:.1f}"):
        assert number in printed
    for path in tmp_path.glob("*.json"):
        assert path.with_suffix(".md").read_text().startswith("# dior_mini2")
