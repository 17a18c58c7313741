"""eval_lisat.py end to end on a tiny checkpoint: commands, protocols, processes, resuming, faults."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset.generic import write_annotations
from dataset.templates import load_templates
from tests.conftest import REPO
from tests.tiny_lisat import write_checkpoint
from utils.config import ConfigError, parse_config
from utils.evaluate_lisat import EvalConfig, dataset_name, dataset_spec, fingerprint, model_folder, run
from utils.metrics import scores
from utils.predictions import encode_mask, read_predictions
from utils.query_table import read_counts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("eval") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<root>/scenes/test` in the project's own format and a GRES-like `reason_seg/GeoReasonSeg/test`."""
    root = tmp_path_factory.mktemp("data")
    own, gres = root / "scenes" / "test", root / "reason_seg" / "GeoReasonSeg" / "test"
    rng = np.random.default_rng(0)
    images = []
    for folder in (own, gres):
        folder.mkdir(parents=True)
    for number in range(5):
        picture = rng.integers(0, 255, (40, 48, 3)).astype(np.uint8)
        cv2.imwrite(str(own / f"{number}.png"), picture)
        cv2.imwrite(str(gres / f"{number}.jpg"), picture)
        mask = np.zeros((40, 48), np.uint8)
        mask[5:20, 4 + number : 20] = 1
        queries = [
            {"text": "the red ship", "kind": "attribute", "exists": True, "masks": [encode_mask(mask)]},
            {"text": "the largest tank", "kind": "size", "exists": True, "masks": [encode_mask(1 - mask)]},
            {"text": "the blue pier", "kind": "nothing", "exists": False, "masks": []},
        ]
        images.append({"file": f"{number}.png", "queries": queries})
        shape = {
            "label": "target",
            "image_name": f"{number}.jpg",
            "points": [[5, 5], [20, 5], [20, 30], [5, 30]],
        }
        body = {"text": ["Where could a ship berth?"], "is_sentence": True, "shapes": [shape]}
        (gres / f"{number}.json").write_text(json.dumps(body))
    write_annotations(own, images)
    return root


@pytest.fixture
def make(checkpoint: Path, data: Path, tmp_path: Path):
    def config(**values: object) -> EvalConfig:
        base = dict(
            pretrained_model_path=str(checkpoint), dataset_dir=str(data), vis_save_path=str(tmp_path / "out")
        )
        base |= dict(val_dataset="scenes", templates="tiny", max_new_tokens=2, device="cpu", gallery=3)
        return EvalConfig(**(base | values))

    return config


def results(config: EvalConfig, name: str = "results_scenes") -> dict:
    return json.loads((Path(config.vis_save_path) / f"{name}.json").read_text())


@pytest.mark.parametrize("prompt", ["open", "forced", "answer"])
def test_inference_scores_and_names_the_protocol(make, prompt: str) -> None:
    config = make(eval_prompt=prompt, shuffle_questions=True)
    text = run(config)
    found = results(config)
    assert found["complete"] and found["scores"]["n_masks"] == 15 and found["scores"]["n_images"] == 5
    assert set(found["by_kind"]) == {"attribute", "size", "nothing"} == set(found["shuffled_by_kind"])
    assert found["header"]["eval_prompt"] == prompt and f"eval_prompt: {prompt}" in text
    assert found["header"]["conv_type"] == "llava_v1" and found["header"]["raster"] == "official"
    markdown = (Path(config.vis_save_path) / "results_scenes.md").read_text()
    assert "| attribute" in markdown and "shuffled" in markdown and markdown in text
    assert (Path(config.vis_save_path) / "gallery_scenes.png").is_file()
    page = (Path(config.vis_save_path) / "report_scenes.html").read_text()
    assert f"{found['scores']['giou']:.3f}" in page and "Do the words decide?" in page
    table = Path(config.vis_save_path) / "queries_scenes.csv"
    assert scores(read_counts(table))["giou"] == pytest.approx(found["scores"]["giou"])
    again = run(make(cmd="metrics", recount=True))
    assert results(config)["scores"] == found["scores"] and "attribute" in again
    boot = run(make(cmd="bootstrap_metrics", bootstrap_rounds=4, seed=7))
    assert "± " in boot and results(config, "bootstrap_scenes")["bootstrap"]["rounds"] == 4


def test_published_protocol_is_chosen_for_gres(make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    config = make(val_dataset="GeoReasonSeg", raster="exact")
    run(config)
    header = results(config, "results_GeoReasonSeg")["header"]
    assert (header["eval_prompt"], header["conv_type"]) == ("forced", "vicuna_v1")
    assert header["raster"] == "exact"
    assert "prompt forced, conversation template vicuna_v1, raster exact" in caplog.text


def test_several_processes_and_resuming_give_the_same_file(make, tmp_path: Path) -> None:
    whole = make(vis_save_path=str(tmp_path / "whole"))
    run(whole)
    parts = dict(vis_save_path=str(tmp_path / "parts"), world_size=2, batch_size=1)
    said = run(make(**parts, process_num=0))
    assert "2 pictures of others are missing" in said
    cut = tmp_path / "parts" / "preds_scenes_0_of_2.jsonl"
    cut.write_bytes(cut.read_bytes()[:-30])
    run(make(**parts, process_num=1))
    assert not (tmp_path / "parts" / "predictions_scenes.json").exists()
    run(make(**parts, process_num=0))
    one = read_predictions(tmp_path / "whole" / "predictions_scenes.json")
    two = read_predictions(tmp_path / "parts" / "predictions_scenes.json")
    assert [i["image"] for i in one.images] == [i["image"] for i in two.images]
    for left, right in zip(one.images, two.images, strict=True):
        for a, b in zip(left["queries"], right["queries"], strict=True):
            assert a["query"] == b["query"] and a["generated"] == b["generated"]
            assert np.abs(np.subtract(a["counts"]["union"], b["counts"]["union"])).max() <= 3


def test_launcher_ranks(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        text = run(make())
    assert "| all" in text
    assert len(list((tmp_path / "out").glob("preds_scenes_*_of_2.jsonl"))) == 2
    with pytest.raises(ValueError, match="drop the flag"):
        run(make(world_size=3))


def test_predictions_of_other_weights_are_refused(make, tmp_path: Path) -> None:
    run(make(limit=2))
    other = write_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="weights: .* there"):
        run(make(pretrained_model_path=str(other), limit=2))
    run(make(pretrained_model_path=str(other), limit=2, restart=True))
    assert results(make())["header"]["weights"] == fingerprint(other)


def test_questions_are_put_as_in_training(make, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())

    def trained_with(templates: str) -> EvalConfig:
        (folder / "config.json").write_text(json.dumps(settings | {"templates": templates}))
        return make(pretrained_model_path=str(folder), templates="auto", limit=1, restart=True)

    for name in ("tiny", "default"):
        config = trained_with(name)
        run(config)
        assert results(config)["header"]["templates"] == name
        text = read_predictions(config.vis_save_path).images[0]["queries"][0]["text"]
        assert text in {
            t.replace("{class_name}", "the red ship") for t in load_templates(name).short_question
        }
    with pytest.raises(ValueError, match="trained with the question templates of gone.json"):
        run(trained_with("gone.json"))


def test_faults_are_listed_together() -> None:
    argv = ["--batch_size", "0", "--process_num", "3", "--forced_answer", "yes"]
    with pytest.raises(ConfigError) as error:
        parse_config(EvalConfig, argv)
    assert len(error.value.faults) == 3
    with pytest.raises(ConfigError, match="did you mean"):
        parse_config(EvalConfig, ["--vis_save_pth", "x"])


def test_names() -> None:
    def name(given: str, split: str = "test") -> tuple[str, str]:
        config = EvalConfig(val_dataset=given, split=split)
        return dataset_spec(config), dataset_name(config)

    assert name("GeoReasonSeg") == ("GeoReasonSeg|test", "GeoReasonSeg")
    assert name("synthetic", "val") == ("synthetic|val", "synthetic_val")
    assert name("generic:runs/x/val") == ("generic:runs/x/val", "val")
    spec = "sem_seg_folder:a/dubai|*part[1-7]"
    assert name(spec) == (spec, "dubai_part_1-7")


def test_missing_things_say_what_to_do(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Run the inference command first"):
        run(make(cmd="metrics"))
    with pytest.raises(ValueError, match="conv_type other is unknown"):
        run(make(conv_type="other"))
    assert "LISAt-7b" in run(make(cmd="download"))
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "runs" / "lisat" / "hg_model")
    assert model_folder("", prefer_merged=True) == Path("runs/lisat/hg_model")


def test_command_line(make, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, REPO / "eval_lisat.py"]
    run(make(limit=2))
    out = ["--cmd", "metrics", "--vis-save-path", str(tmp_path / "out"), "--val_dataset", "scenes"]
    out += ["--gallery", "0"]
    done = subprocess.run([*command, *out], capture_output=True, text=True, env=dict(os.environ, RANK="0"))
    assert done.returncode == 0 and "| all" in done.stdout, done.stderr
    done = subprocess.run([*command, "--cmd", "nothing"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
