"""Prompts, ids, labels, padding and decoding against the published tokenizer and label builder."""

import json
import random
import re

import numpy as np
import pytest

from dataset.collate import collate
from dataset.image import ImageProcessor
from dataset.sample import Conversation, Sample
from dataset.text import IMAGE_TOKEN, SEG_TOKEN, Tokenizer, build_prompt, encode_prompt
from tests.conftest import require_golden

FOLDER = require_golden("lisat_model")
TEXT = json.loads((FOLDER / "text.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(FOLDER / "hf_model")


def pairs(turns: list) -> list[tuple[str, str | None]]:
    """Our turns of a golden conversation: (user, assistant) pairs without the image tag."""
    users = [text.removeprefix(IMAGE_TOKEN + "\n") for text in turns[::2]]
    return list(zip(users, turns[1::2], strict=True))


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.seg_token_id == TEXT["seg_token_idx"]
    assert (tokenizer.im_start_id, tokenizer.im_end_id) == (TEXT["im_start"], TEXT["im_end"])
    assert len(tokenizer) == TEXT["vocab"]


@pytest.mark.parametrize("case", TEXT["cases"], ids=lambda c: f"{c['conv_type']}-{c['padding']}")
def test_prompts_ids_labels(tokenizer: Tokenizer, case: dict) -> None:
    conversations = []
    for number, golden in enumerate(case["turns"]):
        turns = pairs(golden)
        assert build_prompt(case["conv_type"], turns, im_start_end=False) == case["prompts"][number]
        assert build_prompt(case["conv_type"], turns) == case["prompts_with_im_tags"][number]
        ids, _ = encode_prompt(tokenizer, case["conv_type"], turns)
        assert ids == tokenizer.encode_with_image(case["prompts_with_im_tags"][number])
        row = [0 if i == TEXT["image_token_index"] else i for i in case["input_ids"][number]]
        assert tokenizer.convert_ids_to_tokens(row) == case["pieces"][number]
        segs = sum((answer or "").count(SEG_TOKEN) for _, answer in turns)
        conversations.append(Conversation(turns, np.zeros((segs, 4, 4), np.uint8)))
    batch = collate(
        [Sample("x.png", np.zeros((4, 4, 3), np.uint8), conversations)],
        tokenizer,
        ImageProcessor(sam_size=8, clip_size=8),
        case["conv_type"],
        case["padding"],
    )
    assert batch["conversation_list"] == case["prompts_with_im_tags"]
    assert batch["input_ids"].tolist() == case["input_ids"]
    assert batch["attention_masks"].int().tolist() == case["attention_mask"]
    if case.get("labels"):
        assert batch["labels"].tolist() == case["labels"]


@pytest.mark.parametrize("case", TEXT["decode"], ids=lambda c: "-".join(map(str, c["ids"])))
def test_decode(tokenizer: Tokenizer, case: dict) -> None:
    assert tokenizer.decode(case["ids"]) == case["skip_special"] == case["reloaded_skip_special"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["keep_special"]


def test_tokens_added_to_the_base_are_those_of_the_export(tokenizer: Tokenizer) -> None:
    base = Tokenizer.from_pretrained(FOLDER / "lisat_pre")
    assert base.add_tokens([SEG_TOKEN]) == 1 and base.add_tokens(["<im_start>", "<im_end>"]) == 2
    assert base.added == tokenizer.added
    for case in TEXT["cases"]:
        for prompt in case["prompts_with_im_tags"]:
            assert base.encode_with_image(prompt) == tokenizer.encode_with_image(prompt)


def test_export_files_are_written_byte_for_byte(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / "hf_model" / path.name).read_bytes(), path.name


def test_random_texts_equal_the_converted_tokenizer(tokenizer: Tokenizer) -> None:
    """`tokenizer_json/` is an independent implementation of the same rules (tokenizers library)."""
    from tokenizers import Tokenizer as Converted

    converted = Converted.from_file(str(FOLDER / "tokenizer_json" / "tokenizer.json"))
    rng = random.Random(0)
    parts = [
        "boat",
        " the",
        "[SEG]",
        "<im_start>",
        "<im_end>",
        "\n",
        "  ",
        ".",
        "é☃",
        "</s>",
        "1024",
        " ",
        "USER:",
    ]
    for _ in range(400):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 9)))
        text = re.sub("(^|</s>) +", r"\1", text)  # the library drops a space that starts a chunk
        expected = converted.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, bos=False) == expected, repr(text)
