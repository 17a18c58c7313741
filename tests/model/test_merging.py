"""Merging training states: equal to peft's merge in memory, whatever form the state has."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import lora
from model.checkpoint import load_base, load_lisat, load_trained
from model.key_maps import map_training_key, published_key
from model.lisat import Lisat
from tests.conftest import REPO
from tests.model.checkpoint_tools import State, as_pickles, base_tokenizer, change, write_bases
from tests.tiny_lisat import SAM
from utils.merge_lisat import MergeConfig, merge


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """The base folder without masks, and SAM's file."""
    return write_bases(tmp_path)


def trained_state(bases: tuple[Path, Path], new_rows_only: bool) -> tuple[Lisat, State, State]:
    """A model as training leaves it: (merged by peft, trainable tensors, whole state dict with wrappers)."""
    model, _ = load_base(*bases, tokenizer=base_tokenizer(), seed=7)
    lora.add_lora(model, r=4, alpha=12)
    lora.mark_trainable(model, new_rows_only=new_rows_only)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    state = lora.trainable_state(model)
    whole = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return lora.merge_lora(model), state, whole


def close(a: Lisat, b: Lisat) -> bool:
    """Same names, values to rounding."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def run_folder(tmp_path: Path, state: State, bases: tuple[Path, Path]) -> Path:
    """A run directory as the engine leaves it."""
    step = tmp_path / "run" / "checkpoints" / "step-8"
    step.mkdir(parents=True)
    save_file(state, step / "trainable.safetensors")
    (step.parent / "best").write_text("step-8\n")
    (step.parent / "latest").write_text("step-9\n")
    settings = [
        f"version: {bases[0]}",
        f"vision_pretrained: {bases[1]}",
        "lora_alpha: 12.0",
        "precision: fp32",
    ]
    (tmp_path / "run" / "config.yaml").write_text(
        "\n".join([*settings, "conv_type: llava_llama_2", "templates: tiny\n"])
    )
    return tmp_path / "run"


@pytest.mark.parametrize("new_rows_only", [False, True])
def test_merging_a_run_equals_merging_in_memory(
    tmp_path: Path, bases: tuple[Path, Path], new_rows_only: bool
) -> None:
    merged, state, _ = trained_state(bases, new_rows_only)
    assert any(name.endswith(".new_rows") for name in state) == new_rows_only
    run = run_folder(tmp_path, state, bases)
    out = merge(MergeConfig(weight=str(run), save_path=str(tmp_path / "out")))
    again, config = load_lisat(out)
    assert close(merged, again)
    assert (config.conv_type, config.templates) == ("llava_llama_2", "tiny")
    assert config.seg_token_id == len(base_tokenizer())
    assert "over `llava` (LoRA alpha 12)" in (out / "README.md").read_text()
    assert (out / "tokenizer.model").is_file() and (out / "lisat_processor.json").is_file()


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_consolidated_states_need_no_base_weights(
    tmp_path: Path, bases: tuple[Path, Path], shards: int
) -> None:
    merged, _, whole = trained_state(bases, False)
    folder = tmp_path / "consolidated"
    folder.mkdir()
    save_file(whole, folder / "model.safetensors")
    if shards:
        as_pickles(folder, shards, False)
    change(bases[0] / "model.safetensors", lambda state: {n: t * 0 for n, t in state.items()})
    again, _ = load_trained(folder, bases[0], tokenizer=base_tokenizer(), lora_alpha=12, sam=SAM)
    assert close(merged, again)


def test_a_state_without_frozen_weights_takes_them_from_the_base(
    tmp_path: Path, bases: tuple[Path, Path]
) -> None:
    merged, state, _ = trained_state(bases, False)  # what zero_to_fp32 leaves at stage 1
    official = {}
    for name, tensor in state.items():
        plain = name.replace(".base_layer.", ".")
        stem, dot, side = plain.partition(".lora_")
        official[
            "base_model.model." + (published_key(stem) + dot + side if dot else published_key(plain))
        ] = tensor
    torch.save(official, tmp_path / "pytorch_model.bin")
    again, _ = load_trained(
        tmp_path / "pytorch_model.bin", *bases, tokenizer=base_tokenizer(), lora_r=4, lora_alpha=12
    )
    assert close(merged, again)


def test_faulty_training_states(tmp_path: Path, bases: tuple[Path, Path]) -> None:
    _, state, _ = trained_state(bases, False)
    half = next(name for name in state if ".lora_B." in name)
    file = tmp_path / "trainable.safetensors"

    def load(changed: State, **options: object) -> None:
        save_file(changed, file)
        load_trained(file, *bases, tokenizer=base_tokenizer(), **options)

    with pytest.raises(ValueError, match=r"rank \[4\] in the state, --lora_r says 8"):
        load(state, lora_r=8)
    with pytest.raises(ValueError, match="only lora_A"):
        load({name: tensor for name, tensor in state.items() if name != half})
    with pytest.raises(ValueError, match="v_proj: not in lora_target_modules q_proj"):
        load(state, lora_targets="q_proj")
    with pytest.raises(ValueError, match="llm.model.oops"):
        load(state | {"llm.model.oops": torch.zeros(1)})
    with pytest.raises(ValueError, match="layers.9.self_attn.q_proj: not in the model"):
        pair = {
            f"llm.model.layers.9.self_attn.q_proj.lora_{s}.default.weight": torch.zeros(4, 4) for s in "AB"
        }
        load(state | pair)
    with pytest.raises(ValueError, match="embedding rows for"):
        load(
            {
                name: tensor
                for name, tensor in state.items()
                if "embed_tokens" not in name and "lm_head" not in name
            }
        )
    with pytest.raises(ValueError, match="neither trainable.safetensors nor"):
        (tmp_path / "empty").mkdir()
        load_trained(tmp_path / "empty", *bases, tokenizer=base_tokenizer())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
            "llm.model.layers.3.self_attn.q_proj.lora_A.weight",
        ),
        (
            "llm.model.layers.3.self_attn.q_proj.base_layer.weight",
            "llm.model.layers.3.self_attn.q_proj.weight",
        ),
        ("module.llm.lm_head.weight", "llm.lm_head.weight"),
        (
            "base_model.model.model.visual_model.mask_decoder.iou_token.weight",
            "sam.mask_decoder.iou_token.weight",
        ),
    ],
)
def test_names_of_training_states(name: str, target: str) -> None:
    assert map_training_key(name).name == target


def test_shell_script_consolidates_deepspeed_folders(tmp_path: Path, bases: tuple[Path, Path]) -> None:
    merged, _, whole = trained_state(bases, False)
    deepspeed = tmp_path / "run" / "ckpt_model"
    deepspeed.mkdir(parents=True)
    torch.save(whole, deepspeed / "whole.bin")
    (deepspeed / "zero_to_fp32.py").write_text(  # stands in for DeepSpeed's: folder in, folder out
        "import shutil, sys\nshutil.copy(sys.argv[1] + '/whole.bin', sys.argv[2] + '/pytorch_model.bin')\n"
    )
    flags = ["--version", bases[0], "--vision_pretrained", bases[1], "--lora_alpha", 12]
    flags += ["--precision", "fp32"]
    command = ["bash", REPO / "merge_lora_weight.sh", tmp_path / "run", tmp_path / "out", *flags]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"merged: {tmp_path / 'out'}" in done.stdout
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ckpt_model"]  # nothing left behind
    assert close(merged, load_lisat(tmp_path / "out")[0])


def test_the_command_lists_its_faults(tmp_path: Path) -> None:
    command = [sys.executable, "merge_lora_weights.py", "--lora_r", "0"]
    command += ["--weight", str(tmp_path / "none"), "--save_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 1 and "nothing is there" in done.stderr and "at least 1" in done.stderr
