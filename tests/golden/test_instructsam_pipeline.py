"""The matching command on the two real pictures with stored counts and proposals: the recorded labels."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import require_golden
from utils.instructsam_cli import main
from utils.instructsam_files import read_predictions

FOLDER = require_golden("instructsam")
CLIP = FOLDER / "clip"
CASES = json.loads((CLIP / "matching.json").read_text(encoding="utf-8"))
COUNTS = sorted(path for path in (FOLDER / "dior_mini" / "object_counts").iterdir() if path.is_dir())


@pytest.mark.parametrize("counts", COUNTS, ids=lambda path: path.name)
@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
def test_match_command(activation: str, counts: Path, tmp_path: Path) -> None:
    setting = next(name for name in ("open_vocabulary", "open_ended") if counts.name.endswith(name))
    expected = {}
    for case in CASES:
        mode, stem, named, variant = case["key"].split("/")
        if (mode, named, variant) == (activation, setting, "default"):
            expected[int(stem)] = case
    assert expected
    entry = {
        "file": str(CLIP / "tiny_clip.safetensors"),
        "config": str(CLIP / "tiny_clip_config.json"),
        "quick_gelu": activation == "quickgelu",
    }
    (tmp_path / "config.yaml").write_text(json.dumps({"golden": entry}))
    args = ["match", "--dataset_name", "dior_mini2", "--dataset_config", str(FOLDER / "datasets_config.json")]
    args += ["--checkpoint_config", str(tmp_path / "config.yaml"), "--clip_model", "golden"]
    args += ["--rp_path", str(next((FOLDER / "dior_mini" / "region_proposals").glob("*.json")))]
    args += ["--setting", setting, "--device", "cpu", "--save_path", str(tmp_path / "predictions.json")]
    assert main([*args, "--count_dir", str(counts)]) == 0
    predictions = read_predictions(tmp_path / "predictions.json")
    assert {item["image_id"] for item in predictions} == set(expected)
    for image_id, case in expected.items():
        mine = [item for item in predictions if item["image_id"] == image_id]
        assert [item["label"] for item in mine] == case["labels"]
        assert np.allclose([item["bbox"] for item in mine], case["boxes"], atol=1e-4)
        assert np.allclose([item["score"] for item in mine], case["scores"], atol=1e-4)
        own = case["assigned_label_similarity"]
        assert np.allclose([item["assigned_score"] for item in mine], own, atol=1e-4)
        for item in mine:
            assert ("category_id" in item) == (setting == "open_vocabulary")


def test_stored_predictions_have_the_fields_that_are_written(tmp_path: Path) -> None:
    """Field names and their order are the published ones (`assigned_score` comes last)."""
    from model.instructsam.match import LabelledRegions
    from utils.instructsam_files import read_proposals
    from utils.instructsam_stages import label_image

    stored = {p.parent.name: read_predictions(p) for p in FOLDER.glob("dior_mini/results/*/*.json")}
    assert stored
    proposals = read_proposals(next((FOLDER / "dior_mini" / "region_proposals").glob("*.json")))
    for setting, items in stored.items():
        classes = {item["label"]: item["category_id"] for item in items if "category_id" in item} or None
        for name, mine in proposals.items():
            wanted = [item for item in items if item["image_id"] == int(Path(name).stem)]
            rows = [mine.boxes.tolist().index(item["bbox"]) for item in wanted]
            labels, scores = [i["label"] for i in wanted], np.array([i["score"] for i in wanted])
            found = LabelledRegions(np.array(rows), labels, scores, scores / 2)
            written = label_image(
                wanted[0]["image_id"],
                np.zeros((2, 2, 3), np.uint8),
                mine,
                {},
                lambda *_, found=found: found,  # type: ignore[arg-type]
                classes=classes,
            )
            for one, item in zip(written, wanted, strict=True):
                assert one.pop("assigned_score") == pytest.approx(item["score"] / 2)
                assert list(one) == list(item) and one == item, setting
