"""The published LISAT_PRE layout: read, trained a step in each stage, and written again."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from dataset.synthetic_qa import write_conversations
from dataset.text import Tokenizer
from model.checkpoint import load_llava
from model.key_maps import Target, map_lisat_key
from tests.conftest import require_golden
from tests.model.checkpoint_tools import equal
from tests.test_train_lisat import run, trained
from utils.merge_lisat import MergeConfig, find_processor, merge
from utils.train_lisat_config import TrainLisatConfig

GOLDEN = require_golden("lisat_model")
BASE = GOLDEN / "lisat_pre"


def settings(folder: Path, stage: str, **changes: object) -> TrainLisatConfig:
    write_conversations(folder / "words", 4, 0, questions=1, size=64)
    config = TrainLisatConfig(
        stage=stage,
        log_base_dir=str(folder / "runs"),
        exp_name=stage,
        version=str(BASE),
        dataset_dir=str(folder),
        dataset="vqa",
        vqa_data="words/captions.json|words/images",
        val_dataset="vqa:words/captions.json|words/images",
        conv_type="plain" if stage == "align" else "llava_v1",
        precision="fp32",
        zero_stage=0,
        epochs=1,
        steps_per_epoch=2,
        batch_size=2,
        warmup_steps=0,
        lr=1e-2,
        lr_schedule="constant",
        lora_target_modules="q_proj,down_proj",
        workers=0,
        device="cpu",
        tensorboard=False,
    )
    return replace(config, **changes)


def test_both_stages_from_the_published_base(tmp_path: Path) -> None:
    base, config = load_llava(BASE)
    assert config.seg_token_id == -1 and not config.mm_use_im_start_end
    stored = load_file(BASE / "model.safetensors")
    align = settings(tmp_path, "align")
    assert run(align) == [0]
    assert all(name.startswith("mm_projector.") for name in trained(align))
    instruct = settings(tmp_path, "instruct", projector=align.run_dir)
    assert run(instruct) == [0]
    folder = merge(MergeConfig(instruct.run_dir, str(tmp_path / "out"), layout="published", precision="fp32"))
    written = load_file(folder / "model.safetensors")
    assert {n for n in written if isinstance(map_lisat_key(n), Target)} == {
        n for n in stored if isinstance(map_lisat_key(n), Target)
    }
    moved = {n for n, t in stored.items() if n in written and not torch.equal(written[n], t)}
    parts = ("mm_projector", "q_proj", "down_proj")
    assert moved and all(any(part in name for part in parts) for name in moved)
    assert any("mm_projector" in name for name in moved) and any("q_proj" in name for name in moved)
    model, again = load_llava(folder)
    assert equal(model.vision_tower, base.vision_tower) and again.llm == config.llm
    written_config, published = (json.loads((f / "config.json").read_text()) for f in (folder, BASE))
    for name in ("architectures", "model_type", "image_aspect_ratio", "mm_use_im_start_end", "vocab_size"):
        assert written_config[name] == published[name], name
    assert Tokenizer.from_pretrained(folder).added == Tokenizer.from_pretrained(BASE).added


def test_pictures_are_padded_as_the_base_says_and_never_for_masks(tmp_path: Path) -> None:
    published = json.loads((BASE / "config.json").read_text())["image_aspect_ratio"] == "pad"
    assert find_processor(str(BASE)).clip_pad == published
    assert not find_processor(str(BASE), 64).clip_pad
    find_processor(str(BASE)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((BASE / "config.json").read_text())
    assert find_processor(str(tmp_path)).clip_pad == published
    assert not find_processor(str(tmp_path), 64).clip_pad
