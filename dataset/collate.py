"""Samples -> one batch: image tensors of B images, token rows of all their conversations.

B images, R rows (conversations of all images, grouped by image), L tokens of the longest row, K masks of an
image, S and c sides of the SAM and CLIP inputs, H and W of a picture's masks.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from dataset.image import ImageProcessor
from dataset.sample import Conversation, Sample
from dataset.text import IGNORE_INDEX, SEG_TOKEN, Tokenizer, build_prompt, encode_prompt

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
"""What `collate` returns and `Lisat.forward(**batch)` takes."""


def collate(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    conv_type: str = "llava_v1",
    padding_side: Literal["right", "left"] = "right",
    model_max_length: int | None = None,
    num_patches: int | None = None,
    inference: bool = False,
    im_start_end: bool = True,
    sam_stream: bool = True,
) -> Batch:
    """Make a batch.

    Args:
        samples: B images with their conversations.
        tokenizer, processor: the one text and the one image pipeline.
        conv_type: prompt template, a name in `dataset.text.CONV`.
        padding_side: "right" for training, "left" for generation.
        model_max_length: training only: rows are cut to `model_max_length - (num_patches - 1)` columns. A row
            that would lose a `[SEG]` or all its labels is dropped with its masks, and counted.
        num_patches: image features that replace the image token; needed with `model_max_length`.
        inference: no labels, nothing is cut, masks are the ground truth of the questions.
        im_start_end: write the image tag as `<im_start><image><im_end>`.
        sam_stream: False leaves out the SAM stream, for models that draw no masks.

    Returns:
        dict with
        image_paths: list of B str
        images: float32 (B, 3, S, S), None without `sam_stream`; images_clip: float32 (B, 3, c, c)
        input_ids: int64 (R, L), -200 for the image, padded with the pad id
        labels: int64 (R, L), -100 where no loss falls; None when `inference`
        attention_masks: bool (R, L), true on the tokens of a row (by length, so a literal <unk> counts)
        masks_list: B float32 (K, H, W) with 0, 1 and 255 (ignore); K may be 0
        sam_mask_shape_list: B ((h_in, w_in), (H, W)): size inside the SAM square, size of the masks
        offset: int64 (B + 1), cumulative number of rows
        conversation_list: R prompt strings
        exists, ref_ids, sent_ids: B lists with one entry per row
        inference: bool
        dropped: int, conversations left out because they were too long, here or before (`Sample.dropped`)

    Raises:
        ValueError: no sample, masks that do not fit the `[SEG]` of the answers, or nothing left to learn.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    if padding_side not in ("right", "left"):
        raise ValueError(f"padding_side is {padding_side!r}; choose 'right' or 'left'")
    limit = None if inference else _row_limit(model_max_length, num_patches)
    kept, rows, prompts, dropped = [], [], [], sum(sample.dropped for sample in samples)
    counts: list[int] = []
    for sample in samples:
        conversations = []
        for conversation in sample.conversations:
            row = encode_prompt(
                tokenizer, conv_type, conversation.turns, conversation.has_image, im_start_end
            )
            if not inference:
                _check_masks(sample, conversation, row[0].count(_seg_id(tokenizer)))
            if limit is not None and _too_long(row, limit, tokenizer):
                dropped += 1
                logger.warning(
                    "%s: a conversation of %d tokens does not fit model_max_length %d and is left out: %.80r",
                    sample.image_path,
                    len(row[0]) + num_patches - 1,
                    model_max_length,
                    conversation.query or conversation.turns[-1][0],
                )
                continue
            conversations.append(conversation)
            rows.append((row[0][:limit], row[1][:limit]))
            prompts.append(build_prompt(conv_type, conversation.turns, conversation.has_image, im_start_end))
        if conversations:
            kept.append(Sample(sample.image_path, sample.image, conversations))
            counts.append(len(conversations))
    if not kept:
        paths = ", ".join(sample.image_path for sample in samples)
        raise ValueError(
            f"no conversation is left in the batch of {paths} ({dropped} too long for model_max_length "
            f"{model_max_length}); raise model_max_length or shorten the texts"
        )
    input_ids, labels, attention = _pad(rows, tokenizer.pad_token_id, padding_side)
    masks = [_masks(sample) for sample in kept]
    return {
        "image_paths": [sample.image_path for sample in kept],
        "images": torch.stack([processor.sam(sample.image)[0] for sample in kept]) if sam_stream else None,
        "images_clip": torch.stack([processor.clip(sample.image) for sample in kept]),
        "input_ids": input_ids,
        "labels": None if inference else labels,
        "attention_masks": attention,
        "masks_list": masks,
        "sam_mask_shape_list": [
            (processor.sam_shape(*sample.image.shape[:2]), (mask.shape[1], mask.shape[2]))
            for sample, mask in zip(kept, masks)
        ],
        "offset": torch.from_numpy(np.cumsum([0, *counts], dtype=np.int64)),
        "conversation_list": prompts,
        "exists": [[c.exists for c in sample.conversations] for sample in kept],
        "ref_ids": [[c.ref_id for c in sample.conversations] for sample in kept],
        "sent_ids": [[c.sent_id for c in sample.conversations] for sample in kept],
        "inference": inference,
        "dropped": dropped,
    }


class Collator:
    """`collate` with its settings bound, for a DataLoader (picklable)."""

    def __init__(self, tokenizer: Tokenizer, processor: ImageProcessor, **settings: Any) -> None:
        self.tokenizer, self.processor, self.settings = tokenizer, processor, settings

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Batch of the samples (see `collate`)."""
        return collate(samples, self.tokenizer, self.processor, **self.settings)

    def fits(self, conversation: Conversation) -> bool:
        """Whether a training batch would keep the conversation, given its length."""
        limit = _row_limit(self.settings.get("model_max_length"), self.settings.get("num_patches"))
        if limit is None:
            return True
        conv_type, tags = self.settings.get("conv_type", "llava_v1"), self.settings.get("im_start_end", True)
        row = encode_prompt(self.tokenizer, conv_type, conversation.turns, conversation.has_image, tags)
        return not _too_long(row, limit, self.tokenizer)


def _row_limit(model_max_length: int | None, num_patches: int | None) -> int | None:
    if model_max_length is None:
        return None
    if num_patches is None:
        raise ValueError("model_max_length needs num_patches, the number of image features of the tower")
    limit = model_max_length - (num_patches - 1)
    if limit < 1:
        raise ValueError(f"model_max_length {model_max_length} leaves no room beside {num_patches} patches")
    return limit


def _seg_id(tokenizer: Tokenizer) -> int:
    """Id of `[SEG]`, or one that no text contains where the tokenizer has none."""
    return tokenizer.seg_token_id if tokenizer.has_token(SEG_TOKEN) else -1


def _too_long(row: tuple[list[int], list[int]], limit: int, tokenizer: Tokenizer) -> bool:
    """Whether cutting a row at `limit` loses a `[SEG]`, or every label of a row that had some."""
    ids, labels = row
    if len(ids) <= limit:
        return False
    some = any(label != IGNORE_INDEX for label in labels)
    return _seg_id(tokenizer) in ids[limit:] or (
        some and all(label == IGNORE_INDEX for label in labels[:limit])
    )


def _check_masks(sample: Sample, conversation: Conversation, segs: int) -> None:
    masks = conversation.masks
    if masks.ndim != 3 or masks.dtype != np.uint8:
        raise ValueError(
            f"{sample.image_path}: masks must be uint8 (K, H, W), found {masks.dtype} {masks.shape}"
        )
    if segs != len(masks):
        raise ValueError(
            f"{sample.image_path}: {len(masks)} masks for {segs} {SEG_TOKEN} in the conversation "
            f"{conversation.turns!r}; every {SEG_TOKEN} needs one mask and none may stand in a question"
        )


def _masks(sample: Sample) -> torch.Tensor:
    """All masks of an image in row order, float32 (K, H, W); without any, an empty one of its size."""
    found = [conversation.masks for conversation in sample.conversations if len(conversation.masks)]
    if not found:
        size = sample.conversations[0].masks.shape[1:]
        return torch.zeros(0, *(size if min(size) > 0 else sample.image.shape[:2]))
    sizes = {masks.shape[1:] for masks in found}
    if len(sizes) > 1:
        raise ValueError(f"{sample.image_path}: masks of different sizes {sorted(sizes)} on one image")
    return torch.from_numpy(np.concatenate(found)).float()


def _pad(
    rows: list[tuple[list[int], list[int]]], pad_id: int, side: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, labels, attention), each (R, L)."""
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORE_INDEX, dtype=torch.long)
    attention = torch.zeros(len(rows), longest, dtype=torch.bool)
    for number, (ids, row_labels) in enumerate(rows):
        span = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        input_ids[number, span] = torch.tensor(ids)
        labels[number, span] = torch.tensor(row_labels)
        attention[number, span] = True
    return input_ids, labels, attention
