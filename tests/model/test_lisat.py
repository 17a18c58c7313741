"""Training and teacher-forced forward: packing, padding, rows without image, any number of [SEG]."""

import pytest
import torch

from model.lisat import Lisat, LisatConfig
from model.lora import mark_language_model, mark_trainable
from tests.model import tiny

PREFIX = (4, "i")
ROWS = [
    tiny.row(*PREFIX, 5, "s", 1, "e", seed=0),
    tiny.row(*PREFIX, 9, "s", 2, "s", "e", seed=0),
    tiny.row(*PREFIX, 3, "e", seed=0),
    tiny.row(6, "i", 4, "s", "e", seed=1),
]
COUNTS = [3, 1]
CLOSE = dict(atol=1e-5, rtol=1e-4)


def gradients(model: Lisat) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_losses_and_gradients_of_separate_rows(attention: str) -> None:
    b = tiny.batch(ROWS, COUNTS)
    results = []
    for packed in (True, False):
        model = tiny.model(attn_implementation=attention)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        losses = model(**b, packed=packed)
        losses["loss"].backward()
        results.append((losses, gradients(model)))
    (packed_losses, packed_grads), (losses, grads) = results
    for key in losses:
        torch.testing.assert_close(packed_losses[key], losses[key], **CLOSE)
    assert packed_grads.keys() == grads.keys()
    for name in grads:
        torch.testing.assert_close(packed_grads[name], grads[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_side_and_fill_change_nothing(side: str) -> None:
    model, b = tiny.model(), tiny.batch(ROWS, COUNTS)
    expected = model(**b)
    other = tiny.batch(ROWS, COUNTS, side)
    other["input_ids"] = other["input_ids"].masked_fill(~other["attention_masks"], 11)
    for key in expected:
        torch.testing.assert_close(model(**other)[key], expected[key], **CLOSE)


@torch.no_grad()
def test_batch_equals_row_by_row() -> None:
    """Masks of a batch are those of each row alone; so are the summed token losses."""
    model = tiny.model()
    b = tiny.batch(ROWS, COUNTS)
    together = model(**b, inference=True)
    for image, rows in ((0, ROWS[:3]), (1, ROWS[3:])):
        alone = []
        for values in rows:
            one = tiny.batch([values], [1])
            one |= {k: b[k][image : image + 1] for k in ("images", "images_clip", "sam_mask_shape_list")}
            alone.append(model(**one, inference=True)["pred_masks"][0])
        torch.testing.assert_close(together["pred_masks"][image], torch.cat(alone), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_without_image_and_before_it() -> None:
    """A text-only row's [SEG] shifts by nothing, one before the image neither; both equal a plain pass."""
    model = tiny.model()
    text_only, before = tiny.row(5, "s", 2, "e", seed=4), tiny.row(3, "s", 2, "i", 2, "e", seed=5)
    with_image = tiny.row(*PREFIX, 5, "s", "e")
    b = tiny.batch([with_image, text_only, before], [3])
    states: list[torch.Tensor] = []
    plain = model.prompts
    model.prompts = lambda x: states.append(x) or plain(x)  # type: ignore[method-assign]
    out = model(**b, inference=True)
    assert out["pred_masks"][0].shape[0] == 3
    ids = torch.tensor([text_only])
    expected = model.llm.model(input_ids=ids).last_hidden_state[0, text_only.index(tiny.SEG) - 1]
    torch.testing.assert_close(states[0][1], expected, **CLOSE)
    ids = torch.tensor([before[: before.index(tiny.SEG)]])
    expected = model.llm.model(input_ids=ids).last_hidden_state[0, -1]
    torch.testing.assert_close(states[0][2], expected, **CLOSE)


@torch.no_grad()
def test_cross_entropy_is_the_plain_shifted_one() -> None:
    model = tiny.model()
    values = tiny.row(4, 5, "e", seed=6)
    b = tiny.batch([values], [1])
    ids = b["input_ids"]
    expected = model.llm(input_ids=ids, labels=b["labels"]).loss
    torch.testing.assert_close(model(**b)["ce_loss"], expected, **CLOSE)


def test_no_seg_gives_zero_mask_terms_and_the_same_gradients_everywhere() -> None:
    """A batch without [SEG] still touches every weight that one with [SEG] does (equal collectives)."""
    names = []
    for values in (tiny.row(*PREFIX, 6, "e"), tiny.row(*PREFIX, 6, "s", "e")):
        model = tiny.model()
        mark_trainable(model)
        losses = model(**tiny.batch([values], [1]))
        losses["loss"].backward()
        names.append(set(gradients(model)))
        if tiny.SEG not in values:
            assert losses["mask_loss"] == 0 and losses["loss"] == losses["ce_loss"]
            assert not any(g.any() for n, g in gradients(model).items() if "mask_decoder" in n)
    assert names[0] == names[1]


def test_token_figures_of_every_row() -> None:
    model, b = tiny.model(sam=None, seg_token_id=-1), tiny.batch(ROWS, COUNTS)
    with torch.no_grad():
        found = model(**b, token_figures=True)
        assert set(found) == {"loss", "ce_loss", "row_tokens", "row_losses", "row_correct"}
        torch.testing.assert_close(found["row_losses"].sum() / found["row_tokens"].sum(), found["loss"])
        for r in range(len(ROWS)):
            one = {name: b[name][r : r + 1] for name in ("input_ids", "labels", "attention_masks")}
            image = sum(r >= sum(COUNTS[: n + 1]) for n in range(len(COUNTS)))
            alone = model(**one, images_clip=b["images_clip"][image : image + 1], token_figures=True)
            for name in ("row_tokens", "row_losses", "row_correct"):
                torch.testing.assert_close(alone[name][0], found[name][r])
        assert found["row_tokens"].tolist() == (b["labels"] != -100).sum(1).tolist()
    model.llm.lm_head.weight.requires_grad_(False).zero_()[7] = 0.0
    b["labels"] = b["labels"].masked_fill(b["labels"] != -100, 0)
    with torch.no_grad():  # equal logits everywhere: the first token wins
        assert torch.equal(model(**b, token_figures=True)["row_correct"], found["row_tokens"])
    assert "row_losses" not in model(**b)


def test_rows_without_image_touch_a_projector_that_trains() -> None:
    names = []
    for values in (tiny.row(4, "i", 6, "e"), tiny.row(9, "e")):
        model = tiny.model(sam=None, seg_token_id=-1)
        mark_language_model(model, projector_only=True)
        model(**tiny.batch([values], [1]))["loss"].backward()
        names.append(set(gradients(model)))
        used = any(g.any() for g in gradients(model).values())
        assert used == (tiny.IMAGE in values)
    assert names[0] == names[1] and names[0]


def test_each_image_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, b = tiny.model(), tiny.batch(ROWS, COUNTS)
    seen = {"clip": 0, "sam": 0, "last block": 0}
    model.vision_tower.pre_layrnorm.register_forward_hook(
        lambda m, x, y: seen.update(clip=seen["clip"] + len(y))
    )
    model.sam.image_encoder.register_forward_hook(lambda m, x, y: seen.update(sam=seen["sam"] + len(y)))
    model.vision_tower.encoder.layers[-1].register_forward_hook(
        lambda m, x, y: seen.update({"last block": 1})
    )
    with torch.no_grad():
        model(**b)
    assert seen == {"clip": 2, "sam": 2, "last block": 0}


def test_frozen_encoders_keep_no_graph_and_embeddings_replace_images() -> None:
    model, b = tiny.model(), tiny.batch(ROWS, COUNTS)
    mark_trainable(model)
    embeddings = model.encode_images(b["images"])
    assert not embeddings.requires_grad and not model.image_features(b["images_clip"]).requires_grad
    expected = model(**b)["mask_loss"]
    b["images"] = None
    torch.testing.assert_close(model(**b, image_embeddings=embeddings)["mask_loss"], expected)
    mark_trainable(model, also=("sam.image_encoder", "vision_tower"))
    assert model.encode_images(torch.randn(1, 3, 64, 64)).requires_grad


def test_activation_checkpointing_keeps_gradients() -> None:
    b, found = tiny.batch(ROWS, COUNTS), []
    for enabled in (False, True):
        model = tiny.model().train()
        mark_trainable(model)
        model.activation_checkpointing(enabled)
        model(**b)["loss"].backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("mask_dtype", [None, torch.float32])
@torch.no_grad()
def test_bf16_stays_close_and_keeps_frequencies(mask_dtype: torch.dtype | None) -> None:
    model, b = tiny.model(), tiny.batch(ROWS, COUNTS)
    expected = model(**b)
    frequencies = model.llm.model.rotary_emb.inv_freq.clone()
    model.cast(torch.bfloat16, mask_dtype)
    assert model.dtype == torch.bfloat16 and model.sam.dtype == (mask_dtype or torch.bfloat16)
    assert torch.equal(model.llm.model.rotary_emb.inv_freq, frequencies)
    losses = model(**b)
    assert losses["loss"].dtype == torch.float32
    assert losses["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.05)


def test_zero_sized_targets_draw_nothing() -> None:
    model, b = tiny.model(), tiny.batch([tiny.row(*PREFIX, 3, "s", "e")], [1])
    b["sam_mask_shape_list"], b["masks_list"] = [((64, 50), (0, 0))], [torch.zeros(0, 64, 50)]
    assert model(**b)["mask_loss"] == 0
    assert model(**b, inference=True)["pred_masks"][0].shape == (0, 64, 50)


def test_a_captioning_model_needs_no_sam() -> None:
    model = tiny.model(sam=None)
    b = tiny.batch([tiny.row(*PREFIX, 6, "e")], [1])
    losses = model(input_ids=b["input_ids"], labels=b["labels"], images_clip=b["images_clip"])
    assert losses["loss"] == losses["ce_loss"] > 0
    out = model(**b, inference=True)
    assert [x.shape[0] for x in out["pred_masks"]] == [0] and out["scores"][0].shape == (0,)


def test_resizing_the_vocabulary_keeps_old_rows() -> None:
    for init in ("normal", "mean"):
        model = tiny.model()
        old = model.llm.lm_head.weight.detach().clone()
        model.resize_vocabulary(tiny.VOCAB + 3, init)
        assert torch.equal(model.llm.lm_head.weight[: tiny.VOCAB], old)
        if init == "mean":
            torch.testing.assert_close(model.llm.lm_head.weight[tiny.VOCAB], old.mean(0))
    with pytest.raises(ValueError, match="median"):
        model.resize_vocabulary(99, "median")


def test_config_round_trip_and_faults() -> None:
    config = tiny.config()
    assert LisatConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="colour"):
        LisatConfig.from_dict(config.to_dict() | {"colour": 1})
    with pytest.raises(ValueError, match="(?s)out_dim.*seg_token_id"):
        tiny.config(out_dim=7, seg_token_id=1000)


def test_faults_of_a_batch_are_named() -> None:
    model = tiny.model()

    def fails(match: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=match):
            model(**(tiny.batch(ROWS, COUNTS) | changes))

    fails("two.png.*1 \\[SEG\\].*2 masks", masks_list=_wrong_masks(), image_paths=["one.png", "two.png"])
    fails("labels", labels=None)
    fails("images_clip is None", images_clip=None)
    fails("image_embeddings", images=None)
    fails("sam_mask_shape_list has 1", sam_mask_shape_list=[((64, 50), (40, 33))])
    fails("offset", offset=torch.tensor([0, 2]))
    fails("no supervised token", labels=torch.full_like(tiny.batch(ROWS, COUNTS)["labels"], -100))
    fails("batch holds 1 images", images=torch.zeros(1, 3, 64, 64))
    two = tiny.batch([tiny.row("i", 3, "i", "e")], [1])
    with pytest.raises(ValueError, match="2 image tokens"):
        model(**two)


def _wrong_masks() -> list[torch.Tensor]:
    masks = tiny.batch(ROWS, COUNTS)["masks_list"]
    return [masks[0], masks[1].expand(2, -1, -1)]
