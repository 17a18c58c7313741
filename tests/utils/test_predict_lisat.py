"""Predictions do not depend on batching, splitting or loader processes, and say what the model said."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from dataset.sample import Conversation, Sample
from model.checkpoint import save_lisat
from tests.tiny_lisat import tiny_model, tiny_processor, tiny_tokenizer, write_checkpoint
from utils.predict_lisat import Protocol, load_for_inference, predict, target_of
from utils.predictions import decode_mask, target_mask

QUERIES = ("the red ship", "the largest blue tank", "the white house", "Where could a ship berth?")


def samples(count: int = 3) -> list[Sample]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        size = (40 + 8 * number, 56)
        image = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
        conversations = []
        for k, query in enumerate(QUERIES[: 1 + (number + 2) % len(QUERIES)]):
            mask = (rng.random((1, *size)) < 0.3).astype(np.uint8)
            turns = [(f"Please segment {query}.", "It is [SEG].")]
            conversations.append(Conversation(turns, mask, query, kind=f"kind {k}", sent_id=k))
        found.append(Sample(f"{number}.png", image, conversations))
    return found


@pytest.fixture(scope="module")
def parts() -> tuple:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        model.llm.lm_head.weight[tokenizer.seg_token_id] *= 3  # it writes [SEG] now and then
    return model, tokenizer, tiny_processor()


@pytest.mark.parametrize("prompt", ["forced", "answer", "open"])
def test_batching_changes_nothing(parts: tuple, prompt: str) -> None:
    protocol = Protocol(prompt, max_new_tokens=3)
    data = samples()
    single = list(predict(*parts, data, protocol, batch_size=1, max_rows=1))
    assert [index for index, _, _ in single] == [0, 1, 2]
    scores = [record["score"] for _, _, records in single for record in records]
    assert len({round(score, 2) for score in scores if score}) > 3 and (None in scores) == (prompt == "open")
    for options in (dict(batch_size=3), dict(batch_size=2, max_rows=3), dict(batch_size=2, workers=1)):
        together = list(predict(*parts, data, protocol, **options))
        for (index, sample, records), (other, _, expected) in zip(together, single, strict=True):
            assert index == other
            assert [r["query"] for r in records] == [c.query for c in sample.conversations]
            for record, want in zip(records, expected, strict=True):
                assert record["generated"] == want["generated"]
                assert record["score"] == pytest.approx(want["score"], abs=1e-4)
                masks = decode_mask(record["prediction"]), decode_mask(want["prediction"])
                assert (masks[0] != masks[1]).mean() < 0.002
                assert masks[0].shape == sample.image.shape[:2]


def test_forced_always_has_a_mask_and_open_may_not(parts: tuple) -> None:
    data = samples(1)
    _, _, forced = next(predict(*parts, data, Protocol("forced")))
    assert all(record["score"] is not None and record["generated"] == "" for record in forced)
    _, _, opened = next(predict(*parts, data, Protocol("open", max_new_tokens=1)))
    for record in opened:
        if "[SEG]" not in record["generated"]:
            assert record["score"] is None and not record["pred_exists"]
            assert not decode_mask(record["prediction"]).any()


def test_scores_of_the_iou_head_and_published_padding(parts: tuple) -> None:
    def forced(**settings: object) -> list[dict]:
        return next(predict(*parts, samples(1), Protocol("forced", **settings)))[2]

    plain, by_head, compat = forced(), forced(score="iou"), forced(compat_leftpad_mask=True)
    assert [r["prediction"] for r in plain] == [r["prediction"] for r in by_head]
    assert [r["score"] for r in plain] != [r["score"] for r in by_head]
    assert [r["score"] for r in plain] != [r["score"] for r in compat]


def test_records_carry_the_targets(parts: tuple) -> None:
    data = samples(2)
    data[0].conversations[0].masks[0, :3] = 255
    for index, sample, records in predict(*parts, data, Protocol("forced"), indices=[1, 0]):
        assert sample is data[index]
        for conversation, record in zip(sample.conversations, records, strict=True):
            assert (target_mask(record) == conversation.masks[0]).all()
            assert (record["kind"], record["sent_id"]) == (conversation.kind, conversation.sent_id)


def test_target_is_the_union(parts: tuple) -> None:
    masks = np.array([[[0, 1, 255, 255]], [[0, 0, 1, 255]]], dtype=np.uint8)
    conversation = Conversation([("q", None)], masks)
    assert target_of(conversation, (1, 4)).tolist() == [[0, 1, 1, 255]]
    nothing = dataclasses.replace(conversation, masks=masks[:0])
    assert not target_of(nothing, (1, 4)).any()
    with pytest.raises(ValueError, match="pixels"):
        target_of(conversation, (2, 4))


def test_load_for_inference(tmp_path, parts: tuple) -> None:
    folder = write_checkpoint(tmp_path / "model")
    loaded = load_for_inference(folder)
    data = samples(1)
    _, _, want = next(predict(*parts, data, Protocol("forced")))
    _, _, found = next(predict(*loaded, data, Protocol("forced")))
    assert found == want
    with pytest.raises(ValueError, match="--image_size 1024"):
        load_for_inference(folder, image_size=1024)
    processor = (folder / "lisat_processor.json").rename(folder / "elsewhere.json")
    with pytest.raises(ValueError, match="has no lisat_processor.json"):
        load_for_inference(folder)
    processor.rename(folder / "lisat_processor.json")
    added = (folder / "added_tokens.json").read_text()
    (folder / "added_tokens.json").write_text(added.replace("{", '{"<more>": 387,'))
    with pytest.raises(ValueError, match="388 tokens, the model 387"):
        load_for_inference(folder)
    (folder / "added_tokens.json").write_text('{"<im_start>": 384, "[SEG]": 385, "<im_end>": 386}')
    with pytest.raises(ValueError, match=r"\[SEG\] has id"):
        load_for_inference(folder)


def test_published_checkpoints_are_asked_as_the_published_programs_ask(tmp_path) -> None:
    model = tiny_model(conv_type="llava_llama_2")
    model.config.templates = "tiny"
    folder = save_lisat(model, tmp_path / "model", tokenizer=tiny_tokenizer(), layout="published")
    sizes = {"sam": model.config.sam}
    config = load_for_inference(folder, **sizes)[0].config
    assert (config.conv_type, config.templates) == ("llava_llama_2", "tiny")
    settings = json.loads((folder / "config.json").read_text())
    del settings["conv_type"], settings["templates"]  # as in the release
    (folder / "config.json").write_text(json.dumps(settings))
    config = load_for_inference(folder, **sizes)[0].config
    assert (config.conv_type, config.templates) == ("vicuna_v1", "default")
