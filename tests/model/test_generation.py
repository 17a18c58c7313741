"""Answers: cached equals uncached, batched equals single, shared prefix equals separate rows."""

from typing import Any

import pytest
import torch

from model.generation import mask_scores, to_official
from model.lisat import Lisat
from tests.model import tiny

PROMPTS = [
    tiny.row(4, "i", 5, seed=0),
    tiny.row(4, "i", 9, seed=0),
    tiny.row(4, "i", 2, "s", 3, seed=0),
    tiny.row(4, "i", seed=0),
    tiny.row(7, "i", 3, seed=2),
    tiny.row(6, seed=3),
]
OFFSET = [0, 4, 6]
SIZES = [((64, 50), (40, 33)), ((64, 64), (20, 20))]


def talkative(**changes: Any) -> Lisat:
    """A model that emits [SEG] and the end token now and then."""
    model = tiny.model(seed=3, **changes)
    with torch.no_grad():
        model.llm.lm_head.weight[tiny.SEG] *= 6
        model.llm.lm_head.weight[tiny.EOS] *= 3
    return model


def inputs() -> dict[str, Any]:
    torch.manual_seed(5)
    return {"images_clip": torch.randn(2, 3, 28, 28), "images": torch.randn(2, 3, 64, 64)}


def ask(model: Lisat, rows: list[int], side: str = "left", **options: Any) -> list[Any]:
    ids, mask = tiny.padded([PROMPTS[r] for r in rows], side)
    images = [next(b for b in range(2) if r < OFFSET[b + 1]) for r in rows]
    offset = [0, *(sum(i <= b for i in images) for b in range(2))]
    options = {"max_new_tokens": 12, "attention_masks": mask, "offset": offset} | options
    return model.evaluate(**inputs(), input_ids=ids, sam_mask_shape_list=SIZES, **options)


def same(a: list[Any], b: list[Any]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.output_ids == y.output_ids and x.new_ids == y.new_ids and x.present == y.present
        torch.testing.assert_close(x.mask_logits, y.mask_logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(x.scores, y.scores, atol=1e-4, rtol=1e-4)


ALL = list(range(len(PROMPTS)))


def test_the_toy_answers_are_worth_comparing() -> None:
    answers = ask(talkative(), ALL)
    assert len({tuple(a.new_ids) for a in answers}) > 2
    assert any(tiny.SEG in a.new_ids for a in answers) and any(len(a.masks) == 0 for a in answers)
    lengths = {len(a.new_ids) for a in answers}
    assert len(lengths) > 1 and max(lengths) == 12
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.output_ids == prompt + answer.new_ids
        assert len(answer.masks) == answer.output_ids.count(tiny.SEG) == len(answer.scores)
        assert answer.masks.dtype == torch.bool and tuple(answer.masks.shape[1:]) == answer.size


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_equals_uncached_and_batched_equals_single(side: str, attention: str) -> None:
    model = talkative(attn_implementation=attention)
    together = ask(model, ALL, side)
    same(together, ask(model, ALL, cached=False))
    same(together, [ask(model, [r])[0] for r in ALL])


def test_forced_answers_need_no_decoding() -> None:
    model = talkative()
    decoded = ask(model, ALL)
    forced = [a.output_ids for a in decoded]
    ids, mask = tiny.padded(forced, "right")
    again = model.evaluate(
        **inputs(),
        input_ids=ids,
        sam_mask_shape_list=SIZES,
        max_new_tokens=0,
        attention_masks=mask,
        offset=OFFSET,
    )
    for a, b in zip(decoded, again, strict=True):
        assert b.new_ids == [] and b.output_ids == a.output_ids
        torch.testing.assert_close(a.mask_logits, b.mask_logits, atol=1e-4, rtol=1e-4)


def test_images_are_encoded_once_and_only_where_masks_are_asked_for() -> None:
    model, seen = talkative(), {"clip": 0, "sam": 0}
    model.vision_tower.pre_layrnorm.register_forward_hook(
        lambda m, x, y: seen.update(clip=seen["clip"] + len(y))
    )
    model.sam.image_encoder.register_forward_hook(lambda m, x, y: seen.update(sam=seen["sam"] + len(y)))
    ask(model, [0, 1, 2, 3])
    assert seen == {"clip": 1, "sam": 1}
    answers = ask(model, [5], max_new_tokens=0)  # no image token, no [SEG]
    assert seen == {"clip": 1, "sam": 1} and not answers[0].present


def test_image_embeddings_scores_and_small_batches() -> None:
    model = talkative()
    expected = ask(model, ALL)
    embeddings = model.encode_images(inputs()["images"])
    same(expected, ask(model, ALL, image_embeddings=embeddings, max_prompt_batch=1, max_image_batch=1))
    by_head = ask(model, ALL, score="iou")
    assert any(not torch.equal(a.scores, b.scores) for a, b in zip(expected, by_head, strict=True))
    with pytest.raises(ValueError, match="foreground"):
        ask(model, ALL, score="luck")


def test_an_image_per_row_as_published() -> None:
    model, both = talkative(), inputs()
    ids, _ = tiny.padded([PROMPTS[0], PROMPTS[1]], "left")
    per_row = model.evaluate(both["images_clip"][[0, 0]], both["images"][[0, 0]], ids, [SIZES[0]] * 2, 12)
    same(per_row, ask(model, [0, 1]))
    official = to_official(per_row)
    assert official[0].shape[1] == ids.shape[1] + max(len(a.new_ids) for a in per_row)
    assert torch.equal(official[0][:, : ids.shape[1]], ids)
    assert [m.shape for m in official[1]] == [(40, 33)] * 2


def test_unknown_token_in_the_text_is_not_padding() -> None:
    model, prompt = talkative(), list(PROMPTS[0])
    prompt[3] = 0
    ids, mask = tiny.padded([prompt, PROMPTS[1]], "left")
    kwargs = dict(sam_mask_shape_list=SIZES[:1], max_new_tokens=5, offset=[0, 2])
    images = {k: v[:1] for k, v in inputs().items()}
    same(
        model.evaluate(**images, input_ids=ids, attention_masks=mask, **kwargs),
        model.evaluate(**images, input_ids=ids, **kwargs),
    )


def test_evaluating_leaves_the_training_mode_alone() -> None:
    model = talkative()
    expected = ask(model, ALL)
    model.train()
    model.activation_checkpointing()
    same(expected, ask(model, ALL))
    assert model.training


def test_sampling_hook_and_end_token() -> None:
    model = talkative()
    answers = ask(model, [0], pick=lambda logits: torch.full((len(logits),), tiny.EOS))
    assert answers[0].new_ids == [tiny.EOS]
    answers = ask(model, [0], pick=lambda logits: torch.full((len(logits),), 7), eos_token_id=7)
    assert answers[0].new_ids == [7]


def test_published_left_padding_differs() -> None:
    model = talkative()
    rows = [0, 1]
    compat = ask(model, rows, compat_leftpad_mask=True)
    plain = ask(model, rows)
    assert compat[1].new_ids == plain[1].new_ids  # the longest row has no padding
    forced = [tiny.row(4, "i", n, "s", "e", seed=0) for n in (1, 9)]
    ids, mask = tiny.padded(forced, "left")
    logits = []
    for wrong in (True, False):
        options = dict(attention_masks=mask, offset=[0, 2, 2], compat_leftpad_mask=wrong, max_new_tokens=0)
        found = model.evaluate(**inputs(), input_ids=ids, sam_mask_shape_list=SIZES, **options)
        logits.append([answer.mask_logits for answer in found])
    torch.testing.assert_close(logits[0][1], logits[1][1], atol=1e-4, rtol=1e-4)
    assert (logits[0][0] - logits[1][0]).abs().max() > 1e-3  # the shorter row saw its padding
    with pytest.raises(ValueError, match="compat_leftpad_mask"):
        ask(model, [5], compat_leftpad_mask=True)


def test_masks_by_id_hide_unknown_words() -> None:
    """Cached as by running whole sequences; rows without unknown words answer as ever."""
    model = talkative()
    rows = [tiny.row(4, "i", 5, seed=0), tiny.row(4, "i", 3, seed=1)]
    rows[0][8] = 0
    ids, mask = tiny.padded(rows, "left")
    answers = {}
    for name, options in {
        "by length": {},
        "by id": {"compat_unk_mask": True},
        "uncached": {"compat_unk_mask": True, "cached": False},
    }.items():
        answers[name] = model.evaluate(
            **inputs(),
            input_ids=ids,
            sam_mask_shape_list=SIZES,
            max_new_tokens=12,
            attention_masks=mask,
            offset=[0, 1, 2],
            **options,
        )
    same(answers["by id"], answers["uncached"])
    same(answers["by id"][1:], answers["by length"][1:])
    ids[0][8] = 9  # a word in its place is seen
    one = dict(input_ids=ids, sam_mask_shape_list=SIZES, offset=[0, 1, 2], max_new_tokens=1, score="iou")
    plain, compat = (model.evaluate(**inputs(), **one, compat_unk_mask=x) for x in (False, True))
    same(plain, compat)
    forced = [1, *rows[0][1:9], tiny.SEG]
    ids = torch.tensor([forced])
    one |= dict(input_ids=ids, offset=[0, 1, 1], attention_masks=torch.ones_like(ids), max_new_tokens=0)
    plain, compat = (model.evaluate(**inputs(), **one, compat_unk_mask=x) for x in (False, True))
    assert (plain[0].mask_logits - compat[0].mask_logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match="exclude each other"):
        ask(model, [0], compat_leftpad_mask=True, compat_unk_mask=True)


def test_scores() -> None:
    logits = torch.tensor([[[2.0, -3.0], [0.5, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    expected = (torch.tensor(2.0).sigmoid() + torch.tensor(0.5).sigmoid()) / 2
    torch.testing.assert_close(mask_scores(logits), torch.stack((expected, torch.tensor(0.0))))
    assert mask_scores(logits[:0]).shape == (0,)


@pytest.mark.parametrize("mask_dtype", [None, torch.float32])
@torch.no_grad()
def test_bf16_masks_are_those_of_fp32(mask_dtype: torch.dtype | None) -> None:
    model = talkative()
    rows = [a.output_ids for a in ask(model, ALL)]
    ids, mask = tiny.padded(rows, "right")
    options = dict(input_ids=ids, sam_mask_shape_list=SIZES, max_new_tokens=0, attention_masks=mask)
    expected = model.evaluate(**inputs(), **options, offset=OFFSET)
    found = model.cast(torch.bfloat16, mask_dtype).evaluate(**inputs(), **options, offset=OFFSET)
    for a, b in zip(expected, found, strict=True):
        assert b.mask_logits.dtype == b.scores.dtype == torch.float32
        assert b.mask_logits.shape == (b.output_ids.count(tiny.SEG), *b.size)
        for one, other in zip(a.mask_logits, b.mask_logits, strict=True):
            assert ((one > 0) == (other > 0)).float().mean() > 0.9
            assert torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1] > 0.97
