"""Tokenizer and prompts: the old slow rules one by one, labels by spans, files."""

import json
from pathlib import Path

import pytest

from dataset.text import (
    CONV,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    SEG_TOKEN,
    Tokenizer,
    build_prompt,
    encode_prompt,
)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, bos=False))


def test_added_tokens_are_single_ids_behind_the_base(tokenizer: Tokenizer) -> None:
    assert (tokenizer.seg_token_id, tokenizer.im_start_id, tokenizer.im_end_id) == (420, 421, 422)
    assert len(tokenizer) == 423
    assert tokenizer.encode(SEG_TOKEN, bos=False) == [tokenizer.seg_token_id]
    assert tokenizer.add_tokens([SEG_TOKEN, "<new>", "<new>"]) == 1
    assert tokenizer.encode("<new>", bos=False) == [423]


def test_white_space_around_added_tokens_is_dropped(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "it is \n [SEG] \n .") == pieces(tokenizer, "it is[SEG].")
    assert pieces(tokenizer, "[SEG].") == [SEG_TOKEN, "▁", "."]


def test_white_space_around_base_specials_stays(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "is </s> is") == ["▁is", "▁", "</s>", "▁", "▁is"]
    assert pieces(tokenizer, "<s>") == ["<s>"]


def test_every_chunk_has_its_own_word_start(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "is[SEG]is") == ["▁is", SEG_TOKEN, "▁is"]


def test_bytes_for_unknown_letters(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "☃") == ["▁", "<0xE2>", "<0x98>", "<0x83>"]
    assert tokenizer.decode(tokenizer.encode("café ☃")) == "café ☃"


def test_not_legacy_has_no_word_start_behind_special_tokens(sentencepiece_model: bytes) -> None:
    tokenizer = Tokenizer(sentencepiece_model, {SEG_TOKEN: 420}, legacy=False)
    assert pieces(tokenizer, "is[SEG].") == ["▁is", SEG_TOKEN, "."]
    assert pieces(tokenizer, "is</s> is") == ["▁is", "</s>", "▁", "▁is"]


def test_decode_keeps_added_tokens_between_single_spaces(tokenizer: Tokenizer) -> None:
    ids = [IMAGE_TOKEN_INDEX, *tokenizer.encode("it is [SEG]. Sure[SEG][SEG]"), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == "it is [SEG] . Sure [SEG] [SEG]"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([999])


def test_files_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    text = "A [SEG] <im_start> x </s> café"
    assert again.encode(text) == tokenizer.encode(text)
    assert (len(again), again.model_max_length, again.added) == (423, 77, tokenizer.added)
    again.save_pretrained(tmp_path / "b")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / name).read_text()
    assert Tokenizer.from_pretrained(tmp_path, model_max_length=5).model_max_length == 5


def test_added_tokens_of_newer_exports(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"0": {"content": "<unk>"}, "420": {"content": SEG_TOKEN}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_pretrained(tmp_path).added == {SEG_TOKEN: 420}


def test_folder_faults(tmp_path: Path, sentencepiece_model: bytes) -> None:
    with pytest.raises(ValueError, match="no tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    (tmp_path / "added_tokens.json").write_text(json.dumps({SEG_TOKEN: 300}))
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no token '\[SEG\]'"):
        _ = Tokenizer(sentencepiece_model).seg_token_id


def test_prompts_have_the_wire_format() -> None:
    turns = [("Where?", "[SEG]."), ("And?", None)]
    prompt = build_prompt("llava_v1", turns)
    assert prompt.startswith("A chat between a curious human and")
    assert prompt.endswith(
        "questions. USER: <im_start><image><im_end>\nWhere? ASSISTANT: [SEG].</s>USER: And? ASSISTANT:"
    )
    assert "curious user" in build_prompt("vicuna_v1", turns)
    assert build_prompt("llava_v1", turns, has_image=False, im_start_end=False).count("<image>") == 0
    assert build_prompt("llava_llama_2", turns, im_start_end=False).endswith(
        "<</SYS>>\n\n<image>\nWhere? [/INST] [SEG]. </s><s>[INST] And? [/INST]"
    )


@pytest.mark.parametrize("conv_type", sorted(CONV))
@pytest.mark.parametrize("has_image", [True, False])
def test_ids_are_those_of_the_prompt_string(tokenizer: Tokenizer, conv_type: str, has_image: bool) -> None:
    turns = [("Where is it? ☃", "Sure, [SEG]."), ("  two ", "It is [SEG]"), ("three", "")]
    ids, labels = encode_prompt(tokenizer, conv_type, turns, has_image)
    assert ids == tokenizer.encode_with_image(build_prompt(conv_type, turns, has_image))
    assert len(ids) == len(labels)
    assert ids.count(IMAGE_TOKEN_INDEX) == has_image


def learned(tokenizer: Tokenizer, turns: list, conv_type: str = "llava_v1") -> list[int]:
    _, labels = encode_prompt(tokenizer, conv_type, turns)
    return [label for label in labels if label != IGNORE_INDEX]


def test_labels_are_the_answers_and_their_ends(tokenizer: Tokenizer) -> None:
    answers = ["Sure, it is [SEG].", "No."]
    expected = [i for a in answers for i in [*tokenizer.encode(a, bos=False), tokenizer.eos_token_id]]
    assert learned(tokenizer, [("Where?", answers[0]), ("And there?", answers[1])]) == expected


def test_labels_ignore_what_looks_like_a_separator(tokenizer: Tokenizer) -> None:
    turns = [("Say ASSISTANT: or </s> or <unk>!", "now. ASSISTANT: It is [SEG].")]
    end = [*tokenizer.encode("now. ASSISTANT: It is [SEG].", bos=False), tokenizer.eos_token_id]
    assert learned(tokenizer, turns) == end


def test_open_prompts_carry_no_label(tokenizer: Tokenizer) -> None:
    assert learned(tokenizer, [("Where?", None)]) == []


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "at least one turn"),
        ([("see <image>", "x")], "contains '<image>'"),
        ([("a", None), ("b", "c")], "turn 0 has no answer"),
    ],
)
def test_faulty_conversations(turns: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_prompt("llava_v1", turns)
    with pytest.raises(ValueError, match="conv_type 'x' is unknown"):
        build_prompt("x", [("a", "b")])
