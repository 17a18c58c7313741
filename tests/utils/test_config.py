"""Typed configuration: presets, flags, both spellings, all faults at once, and fast help."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

from tests.conftest import REPO
from utils.config import ConfigError, config_from_file, config_to_yaml, parse_config
from utils.engine_config import EngineConfig
from utils.train_lisat_config import TrainLisatConfig


@dataclass
class Small:
    """A small config."""

    learning_rate: float = 0.1
    no_eval: bool = False
    auto_resume: bool = True
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    limit: int | None = None

    def validate(self) -> list[str]:
        return ["--learning_rate must be positive"] if self.learning_rate <= 0 else []


def write(folder: Path, text: str) -> str:
    path = folder / "preset.yaml"
    path.write_text(text)
    return str(path)


def test_preset_then_flags_and_both_spellings(tmp_path: Path) -> None:
    preset = write(tmp_path, "learning-rate: 1e-3\nkind: b\nnames: [x, y]\nauto_resume: false\n")
    config = parse_config(Small, ["--config", preset])
    assert config == Small(1e-3, False, False, "b", ("x", "y"))
    for flag in ("--learning-rate", "--learning_rate"):
        assert parse_config(Small, [f"--config={preset}", flag, "0.5"]).learning_rate == 0.5
    assert parse_config(Small, ["--no_eval", "--no-auto_resume"]) == Small(no_eval=True, auto_resume=False)
    assert not parse_config(Small, ["--no-no-eval"]).no_eval
    assert parse_config(Small, ["--limit", "3"]).limit == 3
    assert parse_config(Small, ["--learning_rate", "1", "--learning-rate", "2"]).learning_rate == 2


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    preset = write(tmp_path, "lerning_rate: 3\nlimit: many\nlearning_rate: -1\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(Small, ["--config", preset, "--kind", "c", "--wrong", "1", "--config", "not-there"])
    text = str(caught.value)
    for part in ("unknown field lerning_rate (did you mean learning_rate?)", "field limit", "'many'", "'c'"):
        assert part in text
    for part in ("--wrong", "not-there", "must be positive"):
        assert part in text
    assert len(caught.value.faults) == 6


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = Small(3e-4, names=("a",), limit=7)
    assert config_from_file(Small, write(tmp_path, config_to_yaml(config))) == config
    lisat = TrainLisatConfig(dataset="generic:x", version=str(tmp_path), no_eval=True)
    assert parse_config(TrainLisatConfig, ["--config", write(tmp_path, config_to_yaml(lisat))]) == lisat


def test_help_is_fast_and_imports_no_torch() -> None:
    before = os.times()
    code = "import sys, runpy; sys.argv = ['train_lisat.py', '--help']\n"
    code += "try: runpy.run_path('train_lisat.py', run_name='__main__')\n"
    code += "except SystemExit as end: assert not end.code\n"
    code += "assert not {'torch', 'transformers', 'deepspeed', 'numpy'} & sys.modules.keys()\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--lora-r" in done.stdout and os.times().children_user - before.children_user < 1


PUBLISHED = """--version b --vision-tower t --precision bf16 --image_size 1024 --model_max_length 1024
--dataset x|train||y|train --sample_rates 9,3 --sem_seg_data a --refer_seg_data a --neg_refer_seg_data a
--correct_refer_seg_data a --vqa_data a --reason_seg_data a --geo_reason_seg_data a --dataset_dir d
--log_base_dir l --exp_name e --epochs 2 --steps_per_epoch 3 --batch_size 4 --val_batch_size 1
--grad_accumulation_steps 5 --workers 2
--lr 0.1 --beta1 0.9 --beta2 0.95 --ce_loss_weight 1 --dice_loss_weight 1 --bce_loss_weight 1 --lora_r 8
--lora_alpha 16 --lora_dropout 0.05 --lora_target_modules q_proj,v_proj --num_classes_per_sample 3 --no_eval
--resume r --start_epoch 1 --auto_resume --print_freq 3 --gradient_checkpointing --train_mask_decoder
--use_mm_start_end --local_rank=0 --conv_type llava_v1 --vision_pretrained s --out_dim 256
--vqa_eval_file_nwpu n --vqa_eval_file_sydney n --vqa_eval_file_ucm n""".split()


def test_published_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("b", "t", "d", "s"):
        (tmp_path / folder).mkdir()
    config = parse_config(TrainLisatConfig, PUBLISHED)
    assert (config.vision_tower, config.lora_target_modules, config.out_dim) == ("t", "q_proj,v_proj", 256)
    assert config.sources() == [("x|train", "x|train", 9.0), ("y|train", "y|train", 3.0)]
    off = [
        "--no-gradient_checkpointing",
        "--no-train-mask-decoder",
        "--no_use_mm_start_end",
        "--no-auto-resume",
    ]
    config = parse_config(TrainLisatConfig, PUBLISHED + off)
    assert not (config.gradient_checkpointing or config.train_mask_decoder or config.use_mm_start_end)
    with pytest.raises(ConfigError, match="2 value.*4 data sets"):
        parse_config(TrainLisatConfig, [*PUBLISHED, "--dataset", "a||b||c||d"])


def test_engine_settings_are_checked() -> None:
    faults = EngineConfig(
        epochs=0, lr=0, zero_stage=4, lr_multipliers="a", eval_only=True, no_eval=True
    ).validate()
    assert len(faults) == 5
    assert EngineConfig(batch_size=2, global_batch_size=12).accumulation(3) == 2
    with pytest.raises(ValueError, match="no multiple"):
        EngineConfig(batch_size=2, global_batch_size=12).accumulation(4)


@pytest.mark.parametrize(
    "preset", sorted((REPO / "configs").glob("lisat_*.yaml")), ids=lambda path: path.stem
)
def test_every_preset_is_valid(preset: Path) -> None:
    fields = yaml.safe_load(preset.read_text())
    config = TrainLisatConfig(**fields)
    absent = ("was not found", "no such")
    assert not [fault for fault in config.validate() if not any(part in fault for part in absent)]
