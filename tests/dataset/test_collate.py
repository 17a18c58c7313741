"""Batches: grouping, padding, truncation, masks, faults."""

import copy
import logging

import numpy as np
import pytest
import torch

from dataset.collate import Collator, collate
from dataset.image import ImageProcessor
from dataset.sample import Conversation, Sample
from dataset.text import IGNORE_INDEX, Tokenizer

PROCESSOR = ImageProcessor(sam_size=16, clip_size=8)


def sample(answers: list[str | None], height: int = 6, width: int = 12, has_image: bool = True) -> Sample:
    conversations = []
    for number, answer in enumerate(answers):
        masks = np.full((answer.count("[SEG]") if answer else 1, height, width), number % 2, np.uint8)
        conversations.append(
            Conversation(
                [(f"Where{' is' * number}?", answer)], masks, has_image=has_image, ref_id=3, sent_id=number
            )
        )
    return Sample(f"{height}x{width}.png", np.zeros((height, width, 3), np.uint8), conversations)


def test_rows_are_grouped_by_image(tokenizer: Tokenizer) -> None:
    batch = collate([sample(["[SEG].", "No."]), sample(["[SEG] and [SEG]"], 9, 4)], tokenizer, PROCESSOR)
    assert batch["offset"].tolist() == [0, 2, 3]
    assert batch["images"].shape == (2, 3, 16, 16) and batch["images_clip"].shape == (2, 3, 8, 8)
    assert [tuple(m.shape) for m in batch["masks_list"]] == [(1, 6, 12), (2, 9, 4)]
    assert all(m.dtype == torch.float32 for m in batch["masks_list"])
    assert batch["sam_mask_shape_list"] == [((8, 16), (6, 12)), ((16, 7), (9, 4))]
    assert (batch["ref_ids"], batch["sent_ids"]) == ([[3, 3], [3]], [[0, 1], [0]])
    assert len(batch["conversation_list"]) == 3 and batch["inference"] is False


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_follows_lengths(tokenizer: Tokenizer, side: str) -> None:
    samples = [sample(["A long answer that goes on <unk> [SEG].", "No."])]
    batch = collate(samples, tokenizer, PROCESSOR, padding_side=side)
    ids, mask, labels = batch["input_ids"], batch["attention_masks"], batch["labels"]
    lengths = mask.sum(dim=1)
    assert lengths.max() == ids.shape[1] and lengths.min() < ids.shape[1]
    start = 0 if side == "right" else ids.shape[1] - int(lengths[1])
    assert mask[1, start : start + int(lengths[1])].all()
    assert (ids[~mask] == tokenizer.pad_token_id).all() and (labels[~mask] == IGNORE_INDEX).all()
    assert (ids[0] == tokenizer.unk_token_id).any() and mask[0].all()  # a literal <unk> is no padding


def test_ignore_pixels_and_pictures_without_masks(tokenizer: Tokenizer) -> None:
    one = sample(["[SEG]"])
    one.conversations[0].masks[0, 0, 0] = 255
    batch = collate([one, sample(["No."], 5, 5, has_image=False)], tokenizer, PROCESSOR)
    assert batch["masks_list"][0][0, 0, 0] == 255
    assert batch["masks_list"][1].shape == (0, 5, 5)
    assert (batch["input_ids"][1] != -200).all()


def test_inference_keeps_targets_of_open_prompts(tokenizer: Tokenizer) -> None:
    batch = collate([sample([None, None])], tokenizer, PROCESSOR, padding_side="left", inference=True)
    assert batch["labels"] is None and batch["inference"] is True
    assert batch["masks_list"][0].shape[0] == 2


def test_long_rows_are_cut_or_dropped(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    samples = [sample(["[SEG]", "and on " * 40, "so " * 60 + "[SEG]"]), sample(["so " * 60 + "[SEG]"])]
    whole = collate(samples, tokenizer, PROCESSOR)
    limit = int(whole["attention_masks"][0].sum()) + 8
    with caplog.at_level(logging.WARNING):
        batch = collate(samples, tokenizer, PROCESSOR, model_max_length=limit + 15, num_patches=16)
    assert batch["input_ids"].shape == (2, limit)  # the second row is cut, the third and fourth are dropped
    assert torch.equal(batch["input_ids"], whole["input_ids"][:2, :limit])
    assert batch["dropped"] == 2 and batch["offset"].tolist() == [0, 2]
    assert batch["masks_list"][0].shape[0] == 1 and len(batch["image_paths"]) == 1
    assert "does not fit model_max_length" in caplog.text
    with pytest.raises(ValueError, match="no conversation is left"):
        collate(samples[1:], tokenizer, PROCESSOR, model_max_length=limit + 15, num_patches=16)
    with pytest.raises(ValueError, match="needs num_patches"):
        collate(samples, tokenizer, PROCESSOR, model_max_length=99)
    with pytest.raises(ValueError, match="no room"):
        collate(samples, tokenizer, PROCESSOR, model_max_length=15, num_patches=16)


def test_what_was_left_out_before_counts_and_sam_may_be_spared(tokenizer: Tokenizer) -> None:
    samples = [sample(["[SEG]"]), sample(["No."], 5, 9)]
    samples[1].dropped = 2
    whole, spared = (collate(samples, tokenizer, PROCESSOR, sam_stream=sam) for sam in (True, False))
    assert whole["dropped"] == spared["dropped"] == 2
    assert spared["images"] is None and whole["images"].shape == (2, 3, 16, 16)
    assert whole["sam_mask_shape_list"] == spared["sam_mask_shape_list"]
    assert torch.equal(whole["images_clip"], spared["images_clip"])


def test_fits_says_what_a_batch_keeps(tokenizer: Tokenizer) -> None:
    samples = [sample(["[SEG]", "and on " * 40, "so " * 60 + "[SEG]", "so " * 60 + "[SEG]" + "so" * 200])]
    length = int(collate(samples, tokenizer, PROCESSOR)["attention_masks"][0].sum()) + 8
    collator = Collator(tokenizer, PROCESSOR, model_max_length=length + 15, num_patches=16)
    fitting = [collator.fits(conversation) for conversation in samples[0].conversations]
    assert fitting == [True, True, False, False] and collator(samples)["dropped"] == fitting.count(False)
    assert all(map(Collator(tokenizer, PROCESSOR).fits, samples[0].conversations))


def test_masks_must_fit_the_answers(tokenizer: Tokenizer) -> None:
    wrong = sample(["[SEG]"])
    wrong.conversations[0].masks = np.zeros((2, 6, 12), np.uint8)
    with pytest.raises(ValueError, match=r"6x12.png: 2 masks for 1 \[SEG\]"):
        collate([wrong], tokenizer, PROCESSOR)
    wrong.conversations[0].masks = np.zeros((1, 6, 12), np.float32)
    with pytest.raises(ValueError, match="must be uint8"):
        collate([wrong], tokenizer, PROCESSOR)
    mixed = sample(["[SEG]", "[SEG]"])
    mixed.conversations[1].masks = np.zeros((1, 7, 12), np.uint8)
    with pytest.raises(ValueError, match="different sizes"):
        collate([mixed], tokenizer, PROCESSOR)
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], tokenizer, PROCESSOR)
    with pytest.raises(ValueError, match="padding_side"):
        collate([mixed], tokenizer, PROCESSOR, padding_side="both")


def test_collator_can_be_copied_to_workers(tokenizer: Tokenizer) -> None:
    collator = Collator(tokenizer, PROCESSOR, conv_type="vicuna_v1")
    again = copy.deepcopy(collator)
    batches = [make([sample(["[SEG]"])]) for make in (collator, again)]
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert "curious user" in batches[0]["conversation_list"][0]
