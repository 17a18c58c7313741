"""LoRA stays in the language model, freezing is as published, new rows can train alone."""

import pytest
import torch

from model.lora import (
    ALL_LINEAR,
    add_lora,
    has_lora,
    load_trainable_state,
    mark_language_model,
    mark_trainable,
    merge_lora,
    trainable_state,
)
from tests.model import tiny

ROWS = [tiny.row(4, "i", 5, "s", 1, "e", seed=0), tiny.row(4, "i", 9, "s", 2, "s", "e", seed=0)]


def shake(model: torch.nn.Module) -> None:
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "new_rows" in name:
                parameter += 0.1 * torch.randn_like(parameter)


def test_only_the_language_model_is_wrapped() -> None:
    model = tiny.model()
    plain = set(model.state_dict())
    add_lora(model, r=2)
    layers = {n.rpartition(".lora_A")[0] for n in model.state_dict() if ".lora_A" in n}
    assert layers == {f"llm.model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"}
    assert (
        has_lora(model)
        and {n.replace(".base_layer", "") for n in model.state_dict() if ".lora_" not in n} == plain
    )
    names = mark_trainable(model)
    assert all(part not in n for n in names for part in ("vision_tower", "mm_projector", "image_encoder"))
    assert {n for n in names if "lora_" in n} and "llm.lm_head.weight" in names
    assert "llm.model.norm.weight" not in names and "sam.mask_decoder.iou_token.weight" in names
    assert "mm_projector.0.weight" in mark_trainable(model, also=("mm_projector",))
    with pytest.raises(ValueError, match="already"):
        add_lora(model)


def test_what_trains_in_the_stages_of_the_language_model() -> None:
    model = tiny.model(sam=None, seg_token_id=-1)
    projector = {n for n, _ in model.named_parameters() if n.startswith("mm_projector.")}
    whole_llm = {n for n, _ in model.named_parameters() if n.startswith("llm.")}
    assert projector and set(mark_language_model(model, projector_only=True)) == projector
    assert set(mark_language_model(model, projector_only=False)) == projector | whole_llm
    add_lora(model, r=2, targets=ALL_LINEAR)
    names = set(mark_language_model(model, projector_only=False))
    lora = {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert names == projector | lora and len(lora) == 2 * 7 * 2
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(mark_language_model(model, projector_only=True)) == projector
    also = set(mark_language_model(model, True, also=["embed_tokens"]))
    assert also == projector | {"llm.model.embed_tokens.weight"}
    square = tiny.model(sam=None, seg_token_id=-1, mm_projector_type="identity", vision={"hidden_size": 32})
    with pytest.raises(ValueError, match="identity"):
        mark_language_model(square, projector_only=True)


def test_without_lora_the_language_model_trains() -> None:
    model = tiny.model()
    names = mark_trainable(model)
    assert "llm.model.norm.weight" in names and "vision_tower.pre_layrnorm.weight" not in names


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("new_rows_only", [False, True])
@torch.no_grad()
def test_merging_keeps_outputs_and_names(new_rows_only: bool, tied: bool) -> None:
    model = tiny.model(llm={"tie_word_embeddings": tied})
    names, b = list(model.state_dict()), tiny.batch(ROWS, [2])
    add_lora(model, r=2, targets=ALL_LINEAR)
    mark_trainable(model, new_rows_only)
    before = model(**b)["loss"]
    shake(model)
    wrapped = model(**b)["loss"]
    assert not torch.isclose(wrapped, before)
    merge_lora(model)
    assert sorted(model.state_dict()) == sorted(names) and not has_lora(model)
    torch.testing.assert_close(model(**b)["loss"], wrapped, atol=1e-5, rtol=1e-5)
    assert (model.llm.lm_head.weight is model.llm.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_get_the_gradients_of_the_whole_matrices(tied: bool) -> None:
    b, found = tiny.batch(ROWS, [2]), []
    for new_rows_only in (False, True):
        model = add_lora(tiny.model(llm={"tie_word_embeddings": tied}), dropout=0.0)
        names = mark_trainable(model, new_rows_only)
        losses = model(**b)
        losses["loss"].backward()
        found.append((model, losses["loss"].item(), names))
    (whole, whole_loss, _), (rows, rows_loss, names) = found
    assert rows_loss == pytest.approx(whole_loss, rel=1e-6)
    assert "llm.model.embed_tokens.weight" not in names and "llm.model.embed_tokens.new_rows" in names
    for part in ("model.embed_tokens",) if tied else ("model.embed_tokens", "lm_head"):
        expected = whole.get_parameter(f"llm.{part}.weight").grad[tiny.SEG :]
        torch.testing.assert_close(rows.get_parameter(f"llm.{part}.new_rows").grad, expected)
        assert rows.get_parameter(f"llm.{part}.weight").grad is None
    assert sum(p.numel() for p in rows.llm.parameters() if p.requires_grad) < sum(
        p.numel() for p in whole.llm.parameters() if p.requires_grad
    )


@torch.no_grad()
def test_answers_with_separate_rows_equal_merged_ones() -> None:
    model = tiny.model(seed=3)
    mark_trainable(model, new_rows_only=True)
    shake(model)
    ids, mask = tiny.padded([r[:8] for r in ROWS])
    images = torch.randn(2, 3, 28, 28), torch.randn(2, 3, 64, 64)
    sizes = [((64, 50), (9, 7))] * 2
    answers = [model.evaluate(*images, ids, sizes, 6, attention_masks=mask)]
    answers.append(merge_lora(model).evaluate(*images, ids, sizes, 6, attention_masks=mask))
    assert [a.new_ids for a in answers[0]] == [a.new_ids for a in answers[1]]


@pytest.mark.parametrize("new_rows_only", [False, True])
def test_trainable_state_round_trip(new_rows_only: bool) -> None:
    def fresh() -> torch.nn.Module:
        model = add_lora(tiny.model(), r=2)
        mark_trainable(model, new_rows_only)
        return model

    model, other = fresh(), fresh()
    shake(model)
    state = trainable_state(model)
    load_trainable_state(other, state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    name = next(iter(state))
    broken = state | {name: state[name][:1], "extra": torch.zeros(1)}
    del broken["sam.mask_decoder.iou_token.weight"]
    with pytest.raises(ValueError, match="(?s)missing sam.mask_decoder.*unexpected extra.*the model's is"):
        load_trainable_state(other, broken)


def test_faults() -> None:
    with pytest.raises(ValueError, match="qproj"):
        add_lora(tiny.model(), targets=("qproj",))
    with pytest.raises(ValueError, match="SEG"):
        mark_trainable(tiny.model(seg_token_id=-1), new_rows_only=True)
