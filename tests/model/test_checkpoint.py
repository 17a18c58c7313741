"""Checkpoints: round trips bit for bit, every layout on disk, bases for training, every fault listed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import lora
from model.checkpoint import describe_base, load_base, load_lisat, load_llava, save_lisat
from model.lisat import Lisat, LisatConfig
from model.weight_files import WeightFiles, parse_size, read_pickle, write_shards
from tests.model.checkpoint_tools import as_pickles, base_model, base_tokenizer, equal, write_bases
from tests.tiny_lisat import SAM, tiny_model, tiny_tokenizer

MATRIX = "sam.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """The base folder without masks, and SAM's file."""
    return write_bases(tmp_path)


# ---- our own folder


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_round_trip_is_bit_for_bit(tmp_path: Path, shards: str) -> None:
    model = tiny_model()
    model.llm.to(torch.bfloat16)
    folder = save_lisat(model, tmp_path / "m", tokenizer=tiny_tokenizer(), max_shard_size=shards)
    again, config = load_lisat(folder, dtype=None)
    assert equal(model, again) and config == model.config and not again.training
    assert (folder / "model.safetensors.index.json").is_file() == (shards != "5GB")
    for file in folder.glob("model-*.safetensors"):
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert len(sizes) == 1 or sum(sizes) <= 40_000
    card = (folder / "README.md").read_text()
    assert "# m\n" in card and f"token {config.seg_token_id}" in card and "bfloat16" in card


def test_computed_buffers_are_real_after_loading(tmp_path: Path) -> None:
    model = tiny_model()
    again, _ = load_lisat(save_lisat(model, tmp_path / "m"))
    for (name, ours), (_, theirs) in zip(again.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert all(a.requires_grad == b.requires_grad for a, b in zip(again.parameters(), model.parameters()))


def test_half_precision_storage_keeps_the_positional_matrix(tmp_path: Path) -> None:
    model = tiny_model()
    folder = save_lisat(model, tmp_path / "m", dtype=torch.float16, mask_dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        kind = torch.bfloat16 if name.startswith(("sam.", "text_hidden_fcs.")) else torch.float16
        assert tensor.dtype == (torch.float32 if name == MATRIX else kind)
    again, _ = load_lisat(folder)
    assert all(t.dtype == torch.float32 for t in again.state_dict().values())
    assert torch.equal(again.llm.lm_head.weight, model.llm.lm_head.weight.half().float())
    assert equal(model, tiny_model())  # saving changed nothing


def test_low_precision_loading_keeps_the_positional_matrix(tmp_path: Path) -> None:
    again, _ = load_lisat(save_lisat(tiny_model(), tmp_path / "m"), dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in again.state_dict().items()}
    assert kinds.pop(MATRIX) == torch.float32 and set(kinds.values()) == {torch.bfloat16}


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = save_lisat(tiny_model(), tmp_path / "m")

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise RuntimeError("no space")

    with pytest.raises(RuntimeError):
        save_lisat(tiny_model(seed=1), folder, tokenizer=Broken())
    assert equal(load_lisat(folder)[0], tiny_model()) and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_tied_output_matrix_is_stored_once(tmp_path: Path) -> None:
    config = tiny_model().config
    model = Lisat(replace(config, llm={**config.llm, "tie_word_embeddings": True}))
    model.llm.tie_weights()
    folder = save_lisat(model, tmp_path / "m")
    assert "llm.lm_head.weight" not in load_file(folder / "model.safetensors")
    again, _ = load_lisat(folder)
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight and equal(model, again)


def test_saving_refuses_lora_and_unknown_layouts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="merge it first"):
        save_lisat(lora.add_lora(tiny_model()), tmp_path / "m")
    with pytest.raises(ValueError, match="layout 'hf'"):
        save_lisat(tiny_model(), tmp_path / "m", layout="hf")
    assert not list(tmp_path.iterdir())


def test_every_fault_is_listed(tmp_path: Path) -> None:
    folder = save_lisat(tiny_model(), tmp_path / "m")
    state = load_file(folder / "model.safetensors")
    gone = ["llm.model.norm.weight", "mm_projector.0.bias"]
    state = {name: tensor for name, tensor in state.items() if name not in gone}
    state |= {"llm.model.oops": torch.zeros(1), "classifier.weight": torch.zeros(2)}
    state["llm.lm_head.weight"] = state["llm.lm_head.weight"][:-1].clone()
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_lisat(folder)
    said = str(error.value)
    for text in (*gone, "2 missing", "llm.model.oops", "classifier.weight", "2 unexpected", "1 of another"):
        assert text in said
    rows = len(state["llm.lm_head.weight"])
    assert f"[{rows}, 32] in the file, [{rows + 1}, 32] in the model" in said


# ---- files


@pytest.mark.parametrize(("parts", "old_format"), [(1, False), (1, True), (2, True), (3, False)])
def test_published_layout_round_trip_through_pickles(tmp_path: Path, parts: int, old_format: bool) -> None:
    model = tiny_model()
    folder = save_lisat(model, tmp_path / "m", tokenizer=tiny_tokenizer(), layout="published")
    stored = load_file(folder / "model.safetensors")
    assert not any("vision_tower" in name for name in stored)
    assert sum("inv_freq" in name for name in stored) == model.config.llm["num_hidden_layers"]
    as_pickles(folder, parts, old_format)
    again, config = load_lisat(folder)
    assert equal(model, again) and config.sam == SAM and config.seg_token_id == model.config.seg_token_id


def test_absent_shards_are_named(tmp_path: Path) -> None:
    folder = save_lisat(tiny_model(), tmp_path / "m", max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ValueError, match=shards[1].name):
        load_lisat(folder)
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        WeightFiles(shards[0]).shapes()


def test_pickles_run_no_code_and_hold_only_tensors(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="tensors only"):
        read_pickle(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "mixed.pth")
    with pytest.raises(ValueError, match="not tensors: epoch"):
        read_pickle(tmp_path / "mixed.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "mixed.pth").read_bytes()[:80])
    with pytest.raises(ValueError, match="is it complete"):
        read_pickle(tmp_path / "cut.pth")
    for path in ("none.bin", "evil.txt", "."):
        with pytest.raises(ValueError):
            WeightFiles(tmp_path / path)


def test_shards_keep_tensors_that_share_memory(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole, "b": whole, "row": whole[1], "transposed": whole.T, "one": torch.tensor(2.0)}
    write_shards(tmp_path, state)
    assert all(
        torch.equal(tensor, state[name]) for name, tensor in load_file(tmp_path / "model.safetensors").items()
    )
    assert parse_size("5GB") == 5 * 10**9 and parse_size("0.5kb") == 500 and parse_size(7) == 7
    for size in ("", "GB", "-1MB", "0"):
        with pytest.raises(ValueError):
            parse_size(size)


# ---- bases


def test_base_folder_and_sam_file_make_a_lisat(bases: tuple[Path, Path]) -> None:
    tokenizer = base_tokenizer()
    rows = len(tokenizer)
    model, config = load_base(*bases, tokenizer=tokenizer)
    base = base_model()
    assert equal(model.sam, tiny_model().sam) and config.sam == SAM  # sizes from the file's metadata
    assert equal(model.vision_tower, base.vision_tower) and equal(model.mm_projector, base.mm_projector)
    assert len(tokenizer) == rows + 3 == config.llm["vocab_size"] == model.llm.lm_head.weight.shape[0]
    assert config.seg_token_id == rows and config.mm_use_im_start_end
    for ours, old in (
        (model.llm.lm_head.weight, base.llm.lm_head.weight),
        (model.llm.model.embed_tokens.weight, base.llm.model.embed_tokens.weight),
    ):
        assert torch.equal(ours[:rows], old) and 0.01 < ours[rows:].std() < 0.03
    again, _ = load_base(*bases, tokenizer=base_tokenizer())
    assert equal(model, again)
    other, _ = load_base(*bases, tokenizer=base_tokenizer(), seed=1)
    first = "text_hidden_fcs.0.0.weight"
    assert not torch.equal(other.state_dict()[first], model.state_dict()[first])
    assert not torch.equal(other.llm.lm_head.weight[rows:], model.llm.lm_head.weight[rows:])


def test_new_rows_can_be_the_mean(bases: tuple[Path, Path]) -> None:
    model, _ = load_base(*bases, tokenizer=base_tokenizer(), new_rows="mean")
    rows = len(base_tokenizer())
    weight = model.llm.lm_head.weight
    assert torch.allclose(weight[rows:], weight[:rows].mean(0).expand(3, -1), atol=1e-6)


def test_base_without_sam_file_says_what_is_missing(bases: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="holds no SAM"):
        load_base(bases[0], tokenizer=base_tokenizer())
    with pytest.raises(ValueError, match="load_llava"):
        load_lisat(bases[0])
    assert equal(load_llava(bases[0])[0], base_model())


def as_language_model(base: Path, folder: Path) -> Path:
    """The Llama of a base as a folder of its own, with the names and the config of a plain Llama."""
    folder.mkdir()
    model, config = load_llava(base)
    state = {n.removeprefix("llm."): t for n, t in model.state_dict().items() if n.startswith("llm.")}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.llm | {"model_type": "llama"}))
    return folder


def test_a_llama_gets_tower_and_projector(tmp_path: Path, bases: tuple[Path, Path]) -> None:
    """Where LISAT_PRE starts: nothing but a language model and a tower."""
    whole = base_model()
    llama = as_language_model(bases[0], tmp_path / "llama")
    tower = save_lisat(whole, tmp_path / "published", layout="published") / "vision_tower"
    with pytest.raises(ValueError, match="without projector.*--projector"):
        load_llava(llama, vision_tower=tower)
    with pytest.raises(ValueError, match="without projector"):
        load_base(llama, bases[1], vision_tower=tower)
    model, config = load_llava(llama, vision_tower=tower, reinit_projector=True)
    assert equal(model.llm, whole.llm) and equal(model.vision_tower, whole.vision_tower)
    assert config.mm_projector_type == "mlp2x_gelu" and not equal(model.mm_projector, whole.mm_projector)
    again = load_llava(llama, vision_tower=tower, reinit_projector=True)[0]
    assert equal(model, again)
    other = load_llava(llama, vision_tower=tower, reinit_projector=True, seed=1, projector_type="linear")[0]
    assert isinstance(other.mm_projector, torch.nn.Linear)
    described = describe_base(llama, masks=False, vision_tower=tower, reinit_projector=True)
    assert described == config


@pytest.mark.parametrize("form", ["state", "bin"])
def test_projector_from_elsewhere(tmp_path: Path, bases: tuple[Path, Path], form: str) -> None:
    torch.manual_seed(1)
    linear = torch.nn.Linear(16, 32)
    state = {f"mm_projector.{name}": value.detach() for name, value in linear.named_parameters()}
    if form == "bin":
        torch.save({f"model.{n}": t for n, t in state.items()}, tmp_path / "mm_projector.bin")
    else:
        save_file(state, tmp_path / "trainable.safetensors")
    model, config = load_llava(bases[0], projector=tmp_path)
    assert config.mm_projector_type == "linear" and equal(model.llm, base_model().llm)
    assert equal(dict(model.mm_projector.state_dict()), {n[13:]: t for n, t in state.items()})
    save_file(state | {"llm.model.norm.weight": torch.ones(32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"unexpected(?s:.*)llm.model.norm"):
        load_llava(bases[0], projector=tmp_path / "other.safetensors")
    fresh = load_llava(bases[0], reinit_projector=True)[0]
    assert not equal(fresh.mm_projector, base_model().mm_projector)


def test_positional_codes_in_low_precision(tmp_path: Path) -> None:
    """The matrix is rounded only where it is asked for, and only in memory."""
    folder = save_lisat(tiny_model(), tmp_path / "m", tokenizer=tiny_tokenizer())
    for options, kind in (({}, torch.float32), ({"low_precision_pe": True}, torch.bfloat16)):
        model, config = load_lisat(folder, dtype=torch.bfloat16, **options)
        assert model.state_dict()[MATRIX].dtype == kind == model.to(torch.bfloat16).state_dict()[MATRIX].dtype
        assert config.sam.low_precision_pe == bool(options)
        assert model.sam.prompt_encoder.pe_layer((4, 4)).dtype == kind
    assert load_file(folder / "model.safetensors")[MATRIX].dtype == torch.float32


def test_trained_seg_modules_are_kept_unless_asked(tmp_path: Path, bases: tuple[Path, Path]) -> None:
    trained = tiny_model(seed=5)
    folder = save_lisat(trained, tmp_path / "m", tokenizer=tiny_tokenizer())
    kept, _ = load_base(folder, bases[1], tokenizer=tiny_tokenizer())
    assert equal(kept, trained)
    fresh, _ = load_base(folder, bases[1], tokenizer=tiny_tokenizer(), reinit_seg_modules=True)
    assert equal(fresh.sam, tiny_model().sam) and equal(fresh.llm, trained.llm)
    first = "0.0.weight"
    assert not torch.equal(
        fresh.text_hidden_fcs.state_dict()[first], trained.text_hidden_fcs.state_dict()[first]
    )
    text, config = load_llava(folder)
    assert text.sam is None and config.seg_token_id == -1 and equal(text.llm, trained.llm)


def test_config_survives_json(tmp_path: Path) -> None:
    config = replace(tiny_model().config, conv_type="vicuna_v1", mm_vision_select_layer=-1)
    folder = save_lisat(Lisat(config), tmp_path / "m")
    assert load_lisat(folder)[1] == config == LisatConfig.from_dict(config.to_dict())
    raw = json.loads((folder / "config.json").read_text()) | {"surprise": 1}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="surprise"):
        load_lisat(folder)
