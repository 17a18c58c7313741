"""Flags of training that choose between the right behaviour and the published one, and what is counted."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from dataset.synthetic import write_scenes
from model.checkpoint import load_lisat
from model.lora import trainable_state
from tests.dataset.conftest import gres_body, picture, square
from tests.model.checkpoint_tools import write_bases
from tests.test_train_lisat import run
from utils.config import config_to_dict
from utils.distributed import World
from utils.merge_lisat import MergeConfig, merge
from utils.train_lisat_config import TrainLisatConfig
from utils.train_lisat_job import build_model, open_setup, validation

MATRIX = "sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainLisatConfig:
    folder = tmp_path_factory.mktemp("flags")
    base, sam = write_bases(folder / "base")
    for number, split in enumerate(("train", "val")):
        write_scenes(folder / "data" / "synthetic" / split, 5, number, questions=3, size=64)
    return TrainLisatConfig(
        log_base_dir=str(folder / "runs"),
        version=str(base),
        vision_pretrained=str(sam),
        dataset_dir=str(folder / "data"),
        dataset="synthetic|train",
        val_dataset="synthetic|val",
        templates="tiny",
        precision="fp32",
        zero_stage=0,
        gradient_checkpointing=False,
        device="cpu",
        workers=0,
        tensorboard=False,
    ).settled()


@pytest.mark.parametrize("respect", [False, True])
def test_ignore_regions(config: TrainLisatConfig, tmp_path: Path, respect: bool) -> None:
    shapes = gres_body()["shapes"] + [{"label": "ignore", "points": square(12, 12, 4)}]
    for split in ("train", "val"):
        folder = tmp_path / "reason_seg" / "GeoReasonSeg" / split
        picture(folder / "a.jpg")
        (folder / "a.json").write_text(json.dumps(gres_body(shapes=shapes)))
    now = replace(config, dataset_dir=str(tmp_path), dataset="geo_reason_seg", val_dataset="GeoReasonSeg|val")
    setup = open_setup(replace(now, respect_ignore=respect))
    for sample in (setup.train_data.draw(0), setup.val_data[0]):
        values = set(sample.conversations[0].masks.ravel().tolist())
        assert values == ({0, 1, 255} if respect else {0, 1})


def looked_at(config: TrainLisatConfig, step: int, rank: int = 0, world: int = 1) -> list[tuple[str, str]]:
    """(picture, first prompt) of what one process's validation shows the model."""
    setup, seen = open_setup(config), []

    def infer(batch: dict[str, Any]) -> dict[str, Any]:
        seen.extend(zip(batch["image_paths"], (batch["conversation_list"][i] for i in batch["offset"][:-1])))
        return {"pred_masks": [masks * 2 - 1 for masks in batch["masks_list"]]}

    figures = validation(setup)(SimpleNamespace(infer=infer, step=step, world=World(rank, world, rank)))
    assert figures["giou"] == pytest.approx(1, abs=1e-4)
    return seen


def test_validation_samples_every_picture_or_as_published(config: TrainLisatConfig) -> None:
    every = looked_at(config, step=10)
    assert every == looked_at(config, step=20) and len({path for path, _ in every}) == len(every) == 5
    official = replace(config, val_sampling="official")
    draws = [looked_at(official, step=step) for step in (10, 10, 20)]
    assert draws[0] == draws[1] != draws[2] and all(len(draw) == 5 for draw in draws)
    paths = Counter(path for draw in draws[1:] for path, _ in draw)
    assert max(paths.values()) > 1  # with replacement
    assert (
        len(looked_at(official, step=10, rank=1, world=2)) == 2
    )  # what is left over from a round is dropped


def test_positional_codes_in_low_precision_reach_the_merged_model(
    config: TrainLisatConfig, tmp_path: Path
) -> None:
    for low in (False, True):
        now = replace(config, precision="bf16", low_precision_pe=low)
        model = build_model(open_setup(now))
        assert model.state_dict()[MATRIX].dtype == (torch.bfloat16 if low else torch.float32)
        run_dir = tmp_path / f"run{low}"
        (run_dir / "checkpoints" / "step-1").mkdir(parents=True)
        (run_dir / "checkpoints" / "latest").write_text("step-1\n")
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config_to_dict(now)))
        state = {name: tensor.float() for name, tensor in trainable_state(model).items()}
        save_file(state, run_dir / "checkpoints" / "step-1" / "trainable.safetensors")
        folder = merge(MergeConfig(str(run_dir), str(run_dir / "out")))
        assert json.loads((folder / "config.json").read_text())["sam"]["low_precision_pe"] == low
        again, _ = load_lisat(folder, dtype=torch.bfloat16)
        assert again.state_dict()[MATRIX].dtype == (torch.bfloat16 if low else torch.float32)


def test_conversations_that_are_too_long_are_counted_over_the_run(config: TrainLisatConfig) -> None:
    folder = Path(config.dataset_dir) / "long" / "train"
    write_scenes(folder, 3, 0, questions=2, size=64)
    file = folder / "annotations.json"
    body = json.loads(file.read_text())
    too_long = {"text": "the thing " * 200, "exists": False, "masks": []}
    body["images"][0]["queries"] = [too_long]  # nothing is left of this picture
    body["images"][1]["queries"].append(too_long)
    file.write_text(json.dumps(body))
    now = replace(
        config,
        exp_name="long",
        dataset="long|train",
        no_eval=True,
        model_max_length=400,
        num_classes_per_sample=9,
        epochs=1,
        steps_per_epoch=2,
        batch_size=3,
        print_freq=1,
    )
    assert run(now) == [0]
    lines = [json.loads(line) for line in (Path(now.run_dir) / "metrics.jsonl").read_text().splitlines()]
    # per pass: the lost picture (1), the second in its place (1), and the second itself (1)
    assert [line["dropped_total"] for line in lines] == [3, 6]
