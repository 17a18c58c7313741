"""LISAT written straight down, the yardstick of the benchmarks: no sharing, no cache, no fused attention.

Shapes: N image features, T fused length, V vocabulary, H width, K masks of a row, R rows of a batch,
C prompt width, S padded SAM side.

It runs on the weights of a `Lisat` but on none of its code: the libraries' own forward passes (CLIP and
Llama of transformers with eager attention, the `segment-anything` package's encoder and decoder), every
position's logits and prompts, one picture at a time, everything anew for every question, and while
generating for every token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import ImageEncoderViT
from segment_anything.modeling.mask_decoder import MaskDecoder
from torch import Tensor

from model.lisat import Lisat

IMAGE, IGNORED = -200, -100


@contextmanager
def eager_attention(model: Lisat) -> Iterator[None]:
    """Inside, the language model and the tower materialise their attention matrices."""
    parts = (model.llm, model.vision_tower)
    before = [part.config._attn_implementation for part in parts]
    for part in parts:
        part.set_attn_implementation("eager")
    try:
        yield
    finally:
        for part, kind in zip(parts, before, strict=True):
            part.set_attn_implementation(kind)


def image_features(model: Lisat, images_clip: Tensor) -> Tensor:
    """Projected patch features (n, N, H) of images (n, 3, c, c); the tower runs to its end."""
    with torch.no_grad():
        states = model.vision_tower(pixel_values=images_clip, output_hidden_states=True).hidden_states
    return model.mm_projector(states[model.config.mm_vision_select_layer][:, 1:])


def sam_embedding(model: Lisat, image: Tensor) -> Tensor:
    """SAM embedding (1, C, G, G) of one picture (3, S, S), with the package's own forward pass."""
    with torch.no_grad():
        return ImageEncoderViT.forward(model.sam.image_encoder, image[None])


def draw(model: Lisat, embedding: Tensor, prompts: Tensor, shape: Sequence[Sequence[int]]) -> Tensor:
    """Mask logits (K, H, W) of prompts (K, C) on one picture's embedding."""
    sam, side = model.sam, model.config.sam.image_size
    low_res, _ = MaskDecoder.forward(
        sam.mask_decoder,
        image_embeddings=embedding,
        image_pe=sam.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=prompts[:, None],
        dense_prompt_embeddings=sam.prompt_encoder.no_mask_embed.weight[:, :, None, None].expand(
            len(prompts), -1, *embedding.shape[-2:]
        ),
        multimask_output=False,
    )
    square = F.interpolate(low_res, (side, side), mode="bilinear", align_corners=False)
    (h_in, w_in), original = shape
    inner = square[..., :h_in, :w_in]
    return F.interpolate(inner, tuple(original), mode="bilinear", align_corners=False)[:, 0]


def fuse(model: Lisat, ids: Tensor, features: Tensor) -> Tensor:
    """Embeddings (T, H) of one row (L,) with its image token replaced by features (N, H)."""
    at = int((ids == IMAGE).nonzero()[0, 0])
    embed = model.llm.get_input_embeddings()
    return torch.cat((embed(ids[:at]), features, embed(ids[at + 1 :])))


def widen(row: Tensor, ids: Tensor, count: int, fill: int) -> Tensor:
    """Values (L,) of one row's tokens at fused positions (T,), `fill` at the image's `count`."""
    at = int((ids == IMAGE).nonzero()[0, 0])
    return torch.cat((row[:at], row.new_full((count,), fill), row[at + 1 :]))


def language_model(model: Lisat, embeddings: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Last states (R, T, H) and logits (R, T, V) of every position."""
    states = model.llm.model(inputs_embeds=embeddings, attention_mask=real, use_cache=False).last_hidden_state
    return states, model.llm.lm_head(states)


@torch.no_grad()
def answer(
    model: Lisat,
    prompt: Sequence[int],
    image_clip: Tensor,
    image: Tensor,
    shape: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> tuple[list[int], Tensor]:
    """New ids and mask logits (K, H, W) of one question.

    Every token re-runs tower, projector and the whole sequence. The states of the last step serve for
    the masks, so there is no further pass; it must have generated at least one token.
    """
    ids = list(prompt)
    for _ in range(max_new_tokens):
        row = torch.tensor(ids)
        features = image_features(model, image_clip[None])[0]
        embeddings = fuse(model, row, features)[None]
        states, logits = language_model(model, embeddings, torch.ones(embeddings.shape[:2]))
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == model.llm.config.eos_token_id:
            break
    prompts = model.text_hidden_fcs[0](states[0])  # T, C
    after = torch.tensor([*ids[1:], 0])  # token that each raw position of `ids` predicts
    wanted = widen(after, torch.tensor(ids), len(features), -1)[: len(prompts)]
    wanted = wanted == model.config.seg_token_id
    logits = draw(model, sam_embedding(model, image), prompts[wanted], shape)
    return ids[len(prompt) :], logits


def losses(model: Lisat, batch: dict[str, Any], sam_per_question: bool = True) -> dict[str, Tensor]:
    """The weighted losses of a training batch (see `Lisat.forward`), one sequence per question.

    `sam_per_question` encodes each picture once for each of its questions, else once.
    """
    config, weights = model.config, model.config.loss_weights
    offset, input_ids = batch["offset"], batch["input_ids"]
    of_image = [b for b in range(len(offset) - 1) for _ in range(offset[b], offset[b + 1])]
    features = image_features(model, batch["images_clip"][of_image])  # R, N, H
    count = features.shape[1]
    embeddings = torch.stack([fuse(model, i, f) for i, f in zip(input_ids, features, strict=True)])

    def fused(values: Tensor, fill: int) -> Tensor:
        rows = [widen(row, ids, count, fill) for row, ids in zip(values, input_ids, strict=True)]
        return torch.stack(rows)

    real, labels = fused(batch["attention_masks"].long(), 1), fused(batch["labels"], IGNORED)
    tokens = fused(input_ids, -1)
    states, logits = language_model(model, embeddings, real)
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
    prompts = model.text_hidden_fcs[0](states)  # R, T, C
    bce = dice = torch.zeros(())
    total = sum(len(masks) for masks in batch["masks_list"])
    for b, masks in enumerate(batch["masks_list"]):
        rows = range(offset[b], offset[b + 1])
        predicts = [tokens[r, 1:] == config.seg_token_id for r in rows]
        chosen = [prompts[r, :-1][p] for r, p in zip(rows, predicts, strict=True)]
        shape = batch["sam_mask_shape_list"][b]
        if sam_per_question:
            parts = [draw(model, sam_embedding(model, batch["images"][b]), p, shape) for p in chosen]
        else:
            parts = [draw(model, sam_embedding(model, batch["images"][b]), torch.cat(chosen), shape)]
        for x, target in zip(torch.cat(parts).flatten(1), masks.flatten(1), strict=True):
            bce = bce + F.binary_cross_entropy_with_logits(x, target) / (total + 1e-8)
            p = x.sigmoid()
            overlap, area = (p * target).sum() / 1000, (p.sum() + target.sum()) / 1000
            dice = dice + (1 - (2 * overlap + 1e-6) / (area + 1e-6)) / (total + 1e-8)
    ce, bce, dice = weights.ce * ce, weights.bce * bce, weights.dice * dice
    return {"loss": ce + bce + dice, "ce_loss": ce, "mask_bce_loss": bce, "mask_dice_loss": dice}
