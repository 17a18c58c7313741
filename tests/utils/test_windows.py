"""Windows cover a picture and stitch back to what they were cut from."""

import numpy as np
import pytest
import torch

from dataset.sample import Conversation, Sample
from model.generation import RowAnswer
from tests.tiny_lisat import tiny_model, tiny_processor, tiny_tokenizer
from utils.predict_lisat import Protocol, predict
from utils.predictions import decode_mask
from utils.windows import cut, stitch, window_boxes


@pytest.mark.parametrize(("height", "width", "count"), [(100, 60, 1), (101, 67, 2), (37, 300, 3), (4, 4, 4)])
def test_windows_cover_every_pixel_and_overlap(height: int, width: int, count: int) -> None:
    boxes = window_boxes(height, width, count)
    seen = np.zeros((height, width), int)
    for x0, y0, x1, y1 in boxes:
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        seen[y0:y1, x0:x1] += 1
    assert len(boxes) == count**2 and seen.min() == 1
    if count > 1 and min(height, width) > 30:
        assert (seen > 1).mean() > 0.2
    with pytest.raises(ValueError, match="windows a side do not fit"):
        window_boxes(height, width, min(height, width) + 1)


def answer(logits: torch.Tensor, text: int) -> RowAnswer:
    masks = logits > 0
    return RowAnswer(
        [text], [text], logits, masks, torch.zeros(len(logits)), bool(masks.any()), logits.shape[1:]
    )


def test_stitching_gives_back_the_whole() -> None:
    whole = torch.randn(1, 50, 70, generator=torch.manual_seed(0)).clamp(-5, 5)
    boxes = window_boxes(50, 70, 3)
    parts = [answer(whole[:, y0:y1, x0:x1], k) for k, (x0, y0, x1, y1) in enumerate(boxes)]
    together = stitch(parts, boxes, (50, 70))
    assert torch.allclose(together.mask_logits, whole, atol=1e-3)
    assert (together.masks == (whole > 0)).all() and together.present and together.new_ids == [0]


def test_windows_without_a_mask_say_no() -> None:
    boxes = window_boxes(40, 40, 2)
    yes, no = torch.full((1, 23, 23), 4.0), torch.zeros(0, 23, 23)
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes} == {(23, 23)}
    together = stitch([answer(no, 7), answer(yes, 8), answer(no, 9), answer(no, 9)], boxes, (40, 40))
    assert together.new_ids == [8] and together.present
    assert together.masks[0, :17, 23:].all() and not together.masks[0, 23:].any()
    assert not together.masks[0, :, :17].any()
    nothing = stitch([answer(no, k) for k in range(4)], boxes, (40, 40))
    assert not nothing.present and nothing.masks.shape == (0, 40, 40) and nothing.new_ids == [0]


def test_prediction_in_windows_asks_every_window() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (60, 80, 3)).astype(np.uint8)
    talk = [
        Conversation([(f"Find the {w}.", "It is [SEG].")], np.zeros((1, 60, 80), np.uint8), w) for w in "ab"
    ]
    sample, parts = Sample("p.png", image, talk), (tiny_model(), tiny_tokenizer(), tiny_processor())
    boxes = window_boxes(60, 80, 2)
    crops = [cut(sample, box, talk) for box in boxes]
    alone = [records for _, _, records in predict(*parts, crops, Protocol("answer"))]
    ((_, _, together),) = predict(*parts, [sample], Protocol("answer"), windows=2, max_rows=3)
    for row in range(2):
        mask = decode_mask(together[row]["prediction"])
        assert mask.shape == (60, 80)
        for box, records in zip(boxes, alone, strict=True):
            x0, y0, x1, y1 = box
            inner = np.zeros((60, 80), int)
            for a0, b0, a1, b1 in boxes:
                inner[b0:b1, a0:a1] += 1
            only = inner[y0:y1, x0:x1] == 1  # where no other window has a say
            part = decode_mask(records[row]["prediction"])
            assert (part[only] == mask[y0:y1, x0:x1][only]).mean() > 0.995
    with pytest.raises(ValueError, match="whole pictures"):
        next(predict(*parts, [sample], Protocol("answer"), windows=2, prepare=lambda batch: batch))
