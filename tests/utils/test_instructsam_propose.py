"""The proposal stage: files, resuming, broken pictures, settings."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import utils.instructsam_propose as stage
from model.instructsam.automatic_masks import GridConfig
from tests.conftest import REPO
from tests.model.instructsam_scene import ScriptedPredictor
from utils.config import ConfigError, parse_config
from utils.instructsam_config import ProposeConfig
from utils.instructsam_files import Proposals, read_proposals
from utils.instructsam_propose import load_predictor, propose, proposer_name, run_propose
from utils.instructsam_propose_config import ProposerConfig
from utils.instructsam_stages import propose_all
from utils.rle import decode_mask


def draw(path: Path, seed: int, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    """A picture whose red channel holds ids (see ScriptedPredictor)."""
    rng = np.random.default_rng(seed)
    rgb = np.zeros((*size, 3), np.uint8)
    for number in range(1, 8):
        x, y, r = int(rng.integers(size[1])), int(rng.integers(size[0])), int(rng.integers(4, 12))
        cv2.circle(rgb, (x, y), r, (number, 0, 0), -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), rgb[..., ::-1])
    return rgb


class Counting(ScriptedPredictor):
    """Counts pictures, and breaks off at the one that `fatal` names by its number."""

    fatal = -1

    def encode(self, crops: Any) -> Any:
        if self.asked == self.fatal:
            raise KeyboardInterrupt
        return super().encode(crops)


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Counting]]:
    """Predictors that the stage has made; `Counting.fatal` of the next is set by the test."""
    made: list[Counting] = []

    def make(_: Any) -> Counting:
        made.append(Counting())
        return made[-1]

    monkeypatch.setattr(stage, "load_predictor", make)
    monkeypatch.setattr(Counting, "fatal", -1)
    yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k, name in enumerate(("b.png", "a.png", "deep/c.png", "d.png")):
        draw(tmp_path / "pictures" / name, k)
    return tmp_path / "pictures"


def settings(folder: Path, path: Path, **changes: Any) -> ProposeConfig:
    values = dict(images=str(folder), sam2_cfg="sam2_toy", points_per_side=8, crop_n_layers=0)
    values |= dict(stability_score_thresh=0.5, rp_save_path=str(path), device="cpu")
    return ProposeConfig(**(values | changes))


def test_file_holds_what_each_picture_gives(folder: Path, tmp_path: Path, predictor: list) -> None:
    config = settings(folder, tmp_path / "out" / "p.json")
    text, code = propose_all(config)
    found = read_proposals(tmp_path / "out" / "p.json")
    assert list(found) == ["a.png", "b.png", "d.png", "deep/c.png"] and code == 0
    for name, proposals in found.items():
        rgb = cv2.imread(str(folder / name))[..., ::-1]
        wanted = propose(ScriptedPredictor(), rgb, config)
        assert isinstance(wanted, Proposals) and len(wanted) > 1
        assert proposals.to_json() == wanted.to_json()
        assert decode_mask(proposals.rles[0]).shape == rgb.shape[:2]
    assert f"{sum(map(len, found.values()))} masks in 4 pictures" in text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["p.json", "p_settings.json"]
    assert {"bboxes", "labels", "scores", "segmentations"} == set(
        json.loads((tmp_path / "out" / "p.json").read_text())["a.png"]
    )


def test_a_killed_run_goes_on(
    folder: Path, tmp_path: Path, predictor: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_propose(settings(folder, tmp_path / "whole.json"))
    monkeypatch.setattr(Counting, "fatal", 2)
    config = settings(folder, tmp_path / "killed.json")
    with pytest.raises(KeyboardInterrupt):
        run_propose(config)
    assert not (tmp_path / "killed.json").exists() and predictor[-1].asked == 2
    monkeypatch.setattr(Counting, "fatal", -1)
    outcome = run_propose(config)
    assert predictor[-1].asked == 2 and (outcome.kept, outcome.done) == (2, 4)
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not list(tmp_path.glob("*.parts"))
    made = len(predictor)
    assert run_propose(config).kept == 4 and len(predictor) == made  # no network is loaded for nothing
    draw(folder / "e.png", 9)
    assert run_propose(config).kept == 4 and predictor[-1].asked == 1


def test_other_settings_replace_the_file(folder: Path, tmp_path: Path, predictor: list) -> None:
    run_propose(settings(folder, tmp_path / "p.json"))
    first = (tmp_path / "p.json").read_text()
    outcome = run_propose(settings(folder, tmp_path / "p.json", max_masks=2))
    assert outcome.kept == 0 and predictor[-1].asked == 4
    assert all(len(p) == 2 for p in read_proposals(tmp_path / "p.json").values())
    run_propose(settings(folder, tmp_path / "p.json", points_per_batch=3, masks_per_chunk=2))
    assert (tmp_path / "p.json").read_text() == first
    (tmp_path / "p_settings.json").unlink()  # a file from elsewhere
    assert run_propose(settings(folder, tmp_path / "p.json")).kept == 0


def test_broken_pictures_are_listed_and_done_later(folder: Path, tmp_path: Path, predictor: list) -> None:
    good = (folder / "d.png").read_bytes()
    (folder / "d.png").write_bytes(good[:40])
    config = settings(folder, tmp_path / "p.json")
    text, code = propose_all(config)
    assert (
        code == 3
        and "d.png" in text
        and set(read_proposals(tmp_path / "p.json"))
        == {
            "a.png",
            "b.png",
            "deep/c.png",
        }
    )
    (line,) = (tmp_path / "p_failures.jsonl").read_text().splitlines()
    assert json.loads(line)["image"] == "d.png" and json.loads(line)["fault"]
    (folder / "d.png").write_bytes(good)
    text, code = propose_all(config)
    assert code == 0 and predictor[-1].asked == 1 and not (tmp_path / "p_failures.jsonl").exists()
    assert list(read_proposals(tmp_path / "p.json")) == ["a.png", "b.png", "d.png", "deep/c.png"]


def test_no_readable_picture_is_an_error(tmp_path: Path, predictor: list) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="a.png"):
        run_propose(settings(tmp_path / "x", tmp_path / "p.json"))
    assert not (tmp_path / "p.json").exists()


def test_data_sets_are_taken_by_name(folder: Path, tmp_path: Path, predictor: list) -> None:
    images = [{"id": 7, "file_name": "d.png", "height": 60, "width": 80}, {"id": 3, "file_name": "gone.png"}]
    (tmp_path / "ann.json").write_text(json.dumps({"images": images, "categories": [], "annotations": []}))
    entry = {"mine": {"ann_path": str(tmp_path / "ann.json"), "img_dir": str(folder)}}
    (tmp_path / "config.json").write_text(json.dumps(entry))
    names = dict(images="", dataset_name="mine", dataset_config=str(tmp_path / "config.json"))
    outcome = run_propose(settings(folder, tmp_path / "p.json", **names))
    assert list(read_proposals(tmp_path / "p.json")) == ["d.png"]
    assert [item["image"] for item in outcome.failures] == ["gone.png"]


@pytest.mark.parametrize("network", ["sam2_cfg", "sam_checkpoint"])
def test_networks_are_loaded_by_their_flags(network: str, tmp_path: Path) -> None:
    value = {"sam2_cfg": "sam2_toy"}.get(network, str(REPO / "checkpoints/lisat_tiny_base/sam.safetensors"))
    draw(tmp_path / "pictures" / "a.png", 0)
    config = settings(tmp_path / "pictures", tmp_path / "p.json", sam2_cfg="")
    setattr(config, network, value)
    config.points_per_side, config.pred_iou_thresh, config.multimask_output = 4, 0.2, network == "sam2_cfg"
    config.precision = "bf16"
    assert not config.validate()
    predictor = load_predictor(config)
    assert str(predictor.device) == "cpu"
    assert run_propose(config).done == 1
    assert list(read_proposals(tmp_path / "p.json")) == ["a.png"]


def test_faults_are_told_together(tmp_path: Path) -> None:
    flags = ["--images", str(tmp_path), "--sam2_cfg", "sam2_hiera_l.yaml", "--max_masks", "0"]
    with pytest.raises(ConfigError) as error:
        parse_config(ProposeConfig, [*flags, "--pred_iou_thresh", "1.5", "--sam2_checkpoint", ""])
    assert len(error.value.faults) == 3
    with pytest.raises(ConfigError, match="either"):
        parse_config(ProposeConfig, ["--images", str(tmp_path)])


def test_defaults_are_the_generators() -> None:
    assert ProposerConfig().grid() == GridConfig()
    shared = {f.name for f in fields(ProposerConfig)} & {f.name for f in fields(GridConfig)}
    fixed = {"mask_threshold", "stability_score_offset"}
    assert shared | fixed == {f.name for f in fields(GridConfig)}
    changed = ProposerConfig(points_per_side=5, crop_nms_thresh=0.1).grid()
    assert changed == GridConfig(points_per_side=5, crop_nms_thresh=0.1)


def test_default_file_names() -> None:
    assert proposer_name(ProposerConfig(sam2_cfg="a/sam2_hiera_l.yaml")) == "sam2_hiera_l"
    assert proposer_name(ProposerConfig(sam2_checkpoint="x/sam2.1_hiera_t.pt")) == "sam2.1_hiera_t"
    assert proposer_name(ProposerConfig(sam2_checkpoint="x/folder")) == "folder"
