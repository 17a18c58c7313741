"""LISAT training end to end on a tiny base: preflight, exact resume, cached embeddings, merging."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dataset.synthetic import write_scenes
from tests.conftest import REPO
from tests.model.checkpoint_tools import base_tokenizer, write_bases
from tests.tiny_lisat import QUICK, write_checkpoint
from tests.utils.toy_training import arm, finish, start
from utils.checkpointing import resolve_checkpoint
from utils.config import ConfigError, config_to_yaml
from utils.train_lisat_config import TrainLisatConfig


def train_armed(config: TrainLisatConfig, kill_at: int | None = None) -> None:
    """Train; die at that file operation of saving."""
    import utils.checkpointing as checkpointing
    from utils.train_lisat_job import train

    torch.set_num_threads(1)
    done = arm(checkpointing, kill_at)
    train(config)
    (Path(config.run_dir) / "operations.txt").write_text(str(len(done)))


def run(config: TrainLisatConfig, ranks: int = 1, **arguments: Any) -> list[int]:
    return finish(start(config, ranks, train_armed, **arguments))


def trained(config: TrainLisatConfig) -> dict[str, torch.Tensor]:
    return load_file(resolve_checkpoint(config.run_dir) / "trainable.safetensors")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainLisatConfig:
    folder = tmp_path_factory.mktemp("lisat")
    base, sam = write_bases(folder / "base")
    for number, split in enumerate(("train", "val")):
        write_scenes(folder / "data" / "synthetic" / split, 7, number, questions=4, size=64)
    return TrainLisatConfig(
        log_base_dir=str(folder / "runs"),
        version=str(base),
        vision_pretrained=str(sam),
        dataset_dir=str(folder / "data"),
        dataset="synthetic|train",
        val_dataset="synthetic|val",
        val_batch_size=2,
        num_classes_per_sample=2,
        epochs=2,
        steps_per_epoch=2,
        batch_size=2,
        lr_schedule="cosine",
        lr_multipliers="mask_decoder=0.05",
        save_every_steps=1,
        **QUICK,
    )


@pytest.fixture(scope="module")
def straight(config: TrainLisatConfig) -> TrainLisatConfig:
    assert run(config) == [0]
    return config


def test_killed_while_saving_and_resumed(straight: TrainLisatConfig) -> None:
    """With a worker and embeddings cached on disk, which must not change anything either."""
    operations = int((Path(straight.run_dir) / "operations.txt").read_text())
    cache = str(Path(straight.run_dir) / "embeddings")
    config = replace(straight, exp_name="killed", workers=1, cache_image_embeddings=cache)
    for limit in (operations, operations // 2):
        assert run(config, kill_at=random.Random(time.time_ns()).randint(1, limit))[0] in (-signal.SIGKILL, 0)
    assert run(config) == [0]
    for name, value in trained(straight).items():
        assert torch.allclose(trained(config)[name], value, atol=1e-6), name


def test_run_can_be_merged(straight: TrainLisatConfig) -> None:
    from model.checkpoint import load_base, load_trained

    state = trained(straight)
    assert any(".lora_B." in name and value.abs().max() > 0 for name, value in state.items())
    sources = straight.version, straight.vision_pretrained
    merged, config = load_trained(straight.run_dir, *sources, tokenizer=base_tokenizer())
    base, _ = load_base(*sources, tokenizer=base_tokenizer())
    assert config.seg_token_id == base.config.seg_token_id
    moved = [
        name
        for (name, new), old in zip(merged.state_dict().items(), base.state_dict().values())
        if not torch.equal(new, old)
    ]
    assert any("q_proj" in name for name in moved) and any("mask_decoder" in name for name in moved)
    kept = ("vision_tower", "mm_projector", "sam.image_encoder", "k_proj", "o_proj", "mlp.gate")
    assert not [name for name in moved if any(part in name for part in kept) and "decoder" not in name]


def test_validation_is_the_same_on_two_processes(straight: TrainLisatConfig) -> None:
    lines = {}
    for ranks in (1, 2):
        config = replace(straight, exp_name=f"eval{ranks}", eval_only=True)
        assert run(config, ranks) == [0] * ranks
        (line,) = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
        lines[ranks] = json.loads(line)
    assert lines[1]["n_images"] == 7 and lines[1]["n_masks"] == lines[2]["n_masks"] > 7
    assert lines[1]["giou"] == pytest.approx(lines[2]["giou"], abs=1e-5)
    assert lines[1]["ciou"] == pytest.approx(lines[2]["ciou"], abs=1e-5)


def test_low_precision_and_zero_stages_run(straight: TrainLisatConfig) -> None:
    settings = {"precision": "bf16", "no_eval": True, "epochs": 1, "new_rows_only": True}
    for stage in (2, 3):
        config = replace(straight, exp_name=f"bf16-{stage}", zero_stage=stage, **settings)
        assert run(config, ranks=2 if stage == 3 else 1) == [0] * (2 if stage == 3 else 1)
        names = set(trained(config))
        assert "llm.lm_head.new_rows" in names and "llm.lm_head.weight" not in names


def test_dry_run_says_what_would_be_trained(config: TrainLisatConfig, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(config_to_yaml(replace(config, exp_name="dry")))
    command = [
        sys.executable,
        "train_lisat.py",
        "--config",
        str(preset),
        "--dry_run",
        "--global_batch_size=8",
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["effective_batch"].startswith("8 ") and facts["first_batch"]["supervised_tokens"] > 0
    assert facts["trainable_parameters"] == sum(facts["groups"].values()) < facts["parameters"]
    assert facts["versions"]["deepspeed"] and not (Path(config.log_base_dir) / "dry").exists()


def test_all_faults_of_data_and_base_together(config: TrainLisatConfig) -> None:
    from utils.train_lisat_job import open_setup

    wrong = replace(
        config,
        conv_type="no such template",
        dataset="synthetic|train||missing|train||refer_seg",
        val_dataset="missing|val",
        image_size=1024,
    )
    with pytest.raises(ConfigError) as caught:
        open_setup(wrong)
    text = str(caught.value)
    for part in ("no such template", "missing|train", "refs(unc).p", "missing|val", "takes 64"):
        assert part in text
    assert len(caught.value.faults) == 5
    setup = open_setup(replace(config, dataset="synthetic|train||missing|train", skip_missing_data=True))
    assert len(setup.train_data) == 7


def test_a_finished_lisat_is_a_base_too(config: TrainLisatConfig, tmp_path: Path) -> None:
    """Its decoder and projection are kept unless --reinit_seg_modules asks for the published behaviour."""
    from model.checkpoint import load_lisat
    from utils.train_lisat_job import build_model, open_setup

    folder = write_checkpoint(tmp_path / "lisat", seed=4)
    finished, _ = load_lisat(folder)
    again = replace(config, version=str(folder), vision_pretrained="")
    kept = build_model(open_setup(again))
    assert torch.equal(kept.text_hidden_fcs[0][2].weight, finished.text_hidden_fcs[0][2].weight)
    assert kept.config.loss_weights.dice == 0.5 and not kept.vision_tower.training
    fresh = build_model(
        open_setup(replace(again, reinit_seg_modules=True, vision_pretrained=config.vision_pretrained))
    )
    assert not torch.equal(fresh.text_hidden_fcs[0][2].weight, finished.text_hidden_fcs[0][2].weight)
