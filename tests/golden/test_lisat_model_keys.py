"""Golden `lisat_model`: full-size key lists, the published folders tensor by tensor, the official merge."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dataset.text import Tokenizer
from model.check_keys import LISTS, as_shapes, check_file, main
from model.checkpoint import load_base, load_lisat, load_llava, load_trained, save_sam
from model.key_maps import Target, map_lisat_key, map_tower_key
from tests.conftest import require_golden
from utils.merge_lisat import MergeConfig, merge

GOLDEN = require_golden("lisat_model")
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())


@pytest.fixture(scope="module")
def lists() -> dict:
    """The full-size key lists."""
    return json.loads((GOLDEN / "full_keys.json").read_text())


def merged() -> dict[str, torch.Tensor]:
    """Tensors of the official merged export."""
    return load_file(GOLDEN / "hf_model" / "model.safetensors")


def test_full_size_lists_are_placed_completely(lists: dict) -> None:
    results = check_file(GOLDEN / "full_keys.json")
    for name in LISTS:
        assert results[name].endswith("0 missing, 0 unexpected, 0 misshaped"), name
        placed, ignored = (int(part.split()[0]) for part in results[name].split(", ")[:2])
        assert placed + ignored == len(lists[name])
        assert ignored == sum("inv_freq" in entry[0] for entry in lists[name])


def test_the_command_prints_the_counts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, lists: dict
) -> None:
    main(["--check", str(GOLDEN / "full_keys.json")])
    assert capsys.readouterr().out.count("0 missing, 0 unexpected") == len(LISTS)
    wrong = copy.deepcopy(lists)
    wrong["lisat_7b"][0][0] += ".oops"
    wrong["sam_vit_h_pth"][0][1][0] += 1
    (tmp_path / "keys.json").write_text(json.dumps(wrong))
    with pytest.raises(SystemExit) as exit_:
        main(["--check", str(tmp_path / "keys.json")])
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert "1 missing" in said and "1 unexpected" in said and "1 of another shape" in said


def test_parts_have_the_published_parameter_counts(lists: dict) -> None:
    counts: Counter[str] = Counter()
    for name, shape in as_shapes(lists["lisat_7b"]).items():
        fate = map_lisat_key(name)
        if not isinstance(fate, Target):
            counts["llm"] += torch.Size(shape).numel()  # the published count includes inv_freq
        else:
            part = fate.name.split(".")
            key = f"visual_model.{part[1]}" if part[0] == "sam" else part[0]
            counts[key] += torch.Size(shape).numel()
    assert dict(counts) == lists["parameter_counts"]


def test_merged_folder_is_read_exactly() -> None:
    model, config = load_lisat(GOLDEN / "hf_model")
    state, placed = model.state_dict(), set()
    for name, tensor in merged().items():
        fate = map_lisat_key(name)
        if isinstance(fate, Target):
            assert torch.equal(state[fate.name], tensor), name
            placed.add(fate.name)
        else:
            assert torch.allclose(model.llm.model.rotary_emb.inv_freq, tensor)
    for name, tensor in load_file(GOLDEN / "remote_clip" / "model.safetensors").items():
        fate = map_tower_key(name)
        assert isinstance(fate, Target) and torch.equal(state[fate.name], tensor), name
        placed.add(fate.name)
    assert placed == set(state)
    assert config.seg_token_id == CONFIGS["seg_token_idx"] and config.out_dim == CONFIGS["out_dim"]
    for ours, theirs in (("llm", "llama"), ("vision", "clip_vision")):
        for key, value in CONFIGS[theirs].items():
            assert getattr(config, ours).get(key, value) == value, key
    sam = CONFIGS["sam"]
    assert config.sam.image_size == sam["image_size"] and config.sam.window_size == sam["window_size"]
    assert list(config.sam.global_attn_indexes) == sam["encoder_global_attn_indexes"]
    assert config.sam.num_heads == sam["encoder_num_heads"] and config.sam.depth == sam["encoder_depth"]


def official_merge() -> MergeConfig:
    """Arguments of the official merge of the golden training state."""
    lora = CONFIGS["lora"]
    return MergeConfig(
        weight=str(GOLDEN / "peft_state_dict.safetensors"),
        save_path="",
        version=str(GOLDEN / "lisat_pre"),
        precision="fp32",
        lora_r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_target_modules=",".join(lora["targets"]),
        out_dim=CONFIGS["out_dim"],
        image_size=CONFIGS["sam"]["image_size"],
    )


def test_merging_the_training_state_gives_the_merged_tensors() -> None:
    tokenizer = Tokenizer.from_pretrained(GOLDEN / "lisat_pre")
    lora = CONFIGS["lora"]
    model, config = load_trained(
        GOLDEN / "peft_state_dict.safetensors",
        GOLDEN / "lisat_pre",
        tokenizer=tokenizer,
        lora_r=lora["r"],
        lora_alpha=lora["alpha"],
    )
    reference, expected = load_lisat(GOLDEN / "hf_model")
    assert config == expected and tokenizer.seg_token_id == CONFIGS["seg_token_idx"]
    for name, tensor in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[name], tensor, atol=1e-7), name


def test_export_in_the_published_layout_is_the_published_export(tmp_path: Path) -> None:
    arguments = official_merge()
    arguments.save_path, arguments.layout = str(tmp_path / "out"), "published"
    folder = merge(arguments)
    with safe_open(folder / "model.safetensors", "pt") as file:
        ours = {name: file.get_tensor(name) for name in file.keys()}
    theirs = merged()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.allclose(ours[name], tensor, atol=1e-7), name
    our_config = json.loads((folder / "config.json").read_text())
    their_config = json.loads((GOLDEN / "hf_model" / "config.json").read_text())
    own = {"_name_or_path", "transformers_version", "vision_tower", "mm_vision_tower"}
    for key in set(their_config) - own:
        assert our_config[key] == their_config[key], key
    for file in ("added_tokens.json", "tokenizer.model"):
        assert (folder / file).read_bytes().strip() == (GOLDEN / "hf_model" / file).read_bytes().strip()
    again, config = load_lisat(folder)
    assert all(
        torch.equal(again.state_dict()[map_lisat_key(name).name], ours[name]) for name in _weights(ours)
    )
    assert config.vision["hidden_act"] == CONFIGS["clip_vision"]["hidden_act"]


def test_default_precision_is_that_of_the_published_merge(tmp_path: Path, lists: dict) -> None:
    arguments = official_merge()
    arguments.save_path, arguments.layout, arguments.precision = str(tmp_path / "out"), "published", None
    folder = merge(arguments)
    published = {name.split(".layers.")[0]: dtype for name, _, dtype in lists["lisat_7b"]}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            if "inv_freq" in name:
                continue
            found = str(file.get_tensor(name).dtype).removeprefix("torch.")
            expected = "float32" if "visual_model" in name or "text_hidden_fcs" in name else "bfloat16"
            assert found == expected, name
            assert published.get(name.split(".layers.")[0], expected) == expected, name


def _weights(names: dict) -> list[str]:
    return [name for name in names if isinstance(map_lisat_key(name), Target)]


def test_base_becomes_a_lisat_for_training(tmp_path: Path) -> None:
    trained, _ = load_lisat(GOLDEN / "hf_model")
    sam_file = save_sam(trained.sam, tmp_path / "sam.safetensors")
    tokenizer = Tokenizer.from_pretrained(GOLDEN / "lisat_pre")
    model, config = load_base(GOLDEN / "lisat_pre", sam_file, tokenizer=tokenizer)
    base = load_file(GOLDEN / "lisat_pre" / "model.safetensors")
    assert config.seg_token_id == CONFIGS["seg_token_idx"] and config.llm["vocab_size"] == len(tokenizer)
    old = len(base["lm_head.weight"])
    assert torch.equal(model.llm.lm_head.weight[:old], base["lm_head.weight"])
    assert torch.equal(model.sam.state_dict()["image_encoder.pos_embed"], trained.sam.image_encoder.pos_embed)
    with pytest.raises(ValueError, match="holds no SAM"):
        load_base(GOLDEN / "lisat_pre")
    with pytest.raises(ValueError, match="without segmentation modules"):
        load_lisat(GOLDEN / "lisat_pre")
    captioner, config = load_llava(GOLDEN / "lisat_pre")
    assert captioner.sam is None and config.sam is None
    assert torch.equal(captioner.llm.lm_head.weight, base["lm_head.weight"])
