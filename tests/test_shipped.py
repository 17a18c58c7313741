"""The shipped tiny checkpoint does what its card says, on scenes drawn here."""

from pathlib import Path

import pytest

from dataset.registry import load_dataset
from dataset.synthetic import write_scenes
from tests.conftest import REPO
from utils.eval_report import build_report
from utils.predict_lisat import Protocol, load_for_inference, predict
from utils.predictions import PredictionWriter, merge_ranks, read_predictions

SCENES = 20


def test_scores_on_fresh_scenes_and_words_decide(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", SCENES, seed=990_001)
    model, tokenizer, processor = load_for_inference(REPO / "checkpoints" / "lisat_tiny")
    options = {"train": False, "prompt": "open", "templates": model.config.templates}
    data = load_dataset(f"generic:{tmp_path / 'scenes'}", tmp_path, **options)
    protocol = Protocol("open", conv_type=model.config.conv_type, max_new_tokens=24)
    header = {"dataset": "fresh", "n_images": SCENES}
    with PredictionWriter(tmp_path, header) as writer:
        for index, sample, records in predict(model, tokenizer, processor, data, protocol):
            writer.write(index, sample.image_path, sample.image.shape[:2], records)
    merge_ranks(tmp_path, "fresh")
    report = build_report(read_predictions(tmp_path, "fresh"), shuffle=True)
    assert report["scores"]["giou"] > 0.80 and report["shuffled"]["giou"] < 0.20
    assert min(row["giou"] for row in report["by_kind"].values()) > 0.40
    assert sum(row["n_masks"] for row in report["by_kind"].values()) == pytest.approx(8 * SCENES, abs=10)
