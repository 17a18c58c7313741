"""Batches of the published collate functions: ids, labels, masks, offsets, flags."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dataset.collate import collate
from dataset.image import ImageProcessor
from dataset.sample import Conversation, Sample
from dataset.text import CONV, IGNORE_INDEX, IMAGE_TOKEN, SEG_TOKEN, Tokenizer
from tests.conftest import require_golden

FOLDER = require_golden("lisat_data") / "collate"
GOLDEN = json.loads((FOLDER / "collate.json").read_text())
TENSORS = load_file(FOLDER / "collate.safetensors")
NUM_PATCHES = 256  # the published truncation constant is 255 = patches - 1
RUNS = [case for case in GOLDEN["cases"] if "error" not in case]
REFUSED = [case for case in GOLDEN["cases"] if "error" in case and "input_conversations" in case]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(FOLDER / "tokenizer")
    tokenizer.add_tokens(list(GOLDEN["tokenizer"]["added"]))
    return tokenizer


def parse(prompt: str, conv_type: str) -> tuple[list[tuple[str, str | None]], bool]:
    """Turns of a prompt string, and whether it shows the image."""
    form = CONV[conv_type]
    body = prompt.removeprefix(form.opening)
    has_image = body.startswith(IMAGE_TOKEN + "\n")
    rounds = [r for r in body.removeprefix(IMAGE_TOKEN + "\n").split(form.close) if r]
    turns: list[tuple[str, str | None]] = []
    for text in rounds:
        user, found, answer = text.removeprefix(form.between).partition(form.ask + form.lead)
        turns.append((user, answer) if found else (user.removesuffix(form.ask), None))
    return turns, has_image


def samples(case: dict) -> list[Sample]:
    """The case's input as samples: masks of the recorded sizes, split over the conversations."""
    sizes = case.get("mask_shapes") or [[count, 10, 12] for count in case["mask_counts"]]
    made = []
    for number, prompts in enumerate(case["input_conversations"]):
        conversations = []
        for row, prompt in enumerate(prompts):
            turns, has_image = parse(prompt, case["conv_type"])
            segs = sum((answer or "").count(SEG_TOKEN) for _, answer in turns)
            masks = np.ones((1 if case["kind"] == "val" else segs, *sizes[number][1:]), np.uint8)
            exists = case["exists"][number][row] if "exists" in case else True
            conversations.append(Conversation(turns, masks, "", exists, "", has_image, 0, row))
        path = case["image_paths"][number] if "image_paths" in case else "x.jpg"
        made.append(Sample(path, np.zeros((6, 12, 3), np.uint8), conversations))
    return made


def batch_of(case: dict, tokenizer: Tokenizer) -> dict:
    train = case["kind"] == "train"
    return collate(
        samples(case),
        tokenizer,
        ImageProcessor(sam_size=16, clip_size=28),
        case["conv_type"],
        case["padding"],
        model_max_length=case["model_max_length"] if train else None,
        num_patches=NUM_PATCHES if train else None,
        inference=not train,
        im_start_end=case["use_mm_start_end"],
    )


def test_tokenizer(tokenizer: Tokenizer) -> None:
    golden = GOLDEN["tokenizer"]
    assert tokenizer.added == golden["added"]
    assert len(tokenizer) == golden["base_vocab"] + len(golden["added"])
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (golden["pad_id"], golden["bos"], golden["eos"])


@pytest.mark.parametrize("case", RUNS, ids=lambda case: case["name"])
def test_batch(case: dict, tokenizer: Tokenizer) -> None:
    batch = batch_of(case, tokenizer)
    assert set(case["keys"]) <= set(batch)
    for key, name in (("input_ids",) * 2, ("labels",) * 2, ("attention_masks",) * 2):
        golden = TENSORS.get(f"{case['name']}.{key}")
        if golden is None:
            assert batch[name] is None
        else:
            assert torch.equal(batch[name].to(golden.dtype), golden), key
    for key in ("conversation_list", "inference", "exists", "ref_ids", "sent_ids", "image_paths"):
        assert batch[key] == case[key], key
    assert batch["offset"].tolist() == case["offset"]
    assert [[list(a), list(b)] for a, b in batch["sam_mask_shape_list"]] == case["sam_mask_shape_list"]
    for key, shape in case["shapes"].items():
        assert list(batch[key].shape) == shape, key
        assert str(batch[key].dtype) == case["dtypes"][key], key
    assert [list(masks.shape) for masks in batch["masks_list"]] == case["mask_shapes"]
    assert [str(masks.dtype) for masks in batch["masks_list"]] == case["mask_dtypes"]
    seg = batch["input_ids"] == tokenizer.seg_token_id
    assert [row.nonzero().flatten().tolist() for row in seg] == case["seg_positions"]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["name"])
def test_what_the_reference_refuses(case: dict, tokenizer: Tokenizer) -> None:
    """A literal <unk>, or separator words in a text, are nothing special here."""
    batch = batch_of(case, tokenizer)
    assert batch["attention_masks"].all()
    learned = batch["labels"][batch["labels"] != IGNORE_INDEX].tolist()
    answers = [a for s in samples(case) for c in s.conversations for _, a in c.turns]
    assert learned == [i for a in answers for i in [*tokenizer.encode(a, bos=False), tokenizer.eos_token_id]]
