"""Large pictures in overlapping windows: each window is asked every question, the masks are put together.

For questions about what covers the ground ("the water"), whose answer in a window is the part of the whole
answer that lies there; a question about the whole picture ("the largest ship") must see all of it at once.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dataset.sample import Conversation, Sample
from model.generation import RowAnswer, mask_scores

OVERLAP = 0.25  # of a window's side, shared with the next one

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, upper bounds outside."""


def window_boxes(height: int, width: int, count: int) -> list[Box]:
    """`count` x `count` boxes, row by row, that cover a picture; neighbours share a quarter of their side.

    Raises ValueError for count < 1 or a picture with fewer pixels than windows.
    """
    if count < 1 or count > min(height, width):
        raise ValueError(f"{count} windows a side do not fit {height} x {width} pixels")

    def spans(length: int) -> list[tuple[int, int]]:
        side = int(np.ceil(length / (1 + (count - 1) * (1 - OVERLAP))))
        starts = np.round(np.linspace(0, length - side, count)).astype(int)
        return [(int(start), int(start) + side) for start in starts]

    return [(x0, y0, x1, y1) for y0, y1 in spans(height) for x0, x1 in spans(width)]


def cut(sample: Sample, box: Box, conversations: list[Conversation]) -> Sample:
    """The part of a picture inside `box`, with the given questions and their masks there."""
    x0, y0, x1, y1 = box
    asked = [replace(c, masks=c.masks[:, y0:y1, x0:x1]) for c in conversations]
    return Sample(sample.image_path, np.ascontiguousarray(sample.image[y0:y1, x0:x1]), asked)


def _ramp(length: int) -> Tensor:
    """Weights (length,) that fall off linearly over the overlap at both ends, never to zero."""
    edge = torch.arange(1, length + 1)
    return (torch.minimum(edge, edge.flip(0)) / max(1.0, OVERLAP * length)).clamp(max=1.0)


@torch.inference_mode()
def stitch(answers: Sequence[RowAnswer], boxes: Sequence[Box], size: tuple[int, int]) -> RowAnswer:
    """One question's answer for a whole picture of `size` (H, W) from its answers in the windows.

    Probabilities are averaged where windows overlap, with weights that fall off towards a window's edge; a
    window that answers without a mask says no everywhere. Ids are those of the first window that shows
    something (else of the first).
    """
    share, weight = torch.zeros(size), torch.zeros(size)
    for answer, (x0, y0, x1, y1) in zip(answers, boxes, strict=True):
        mine = _ramp(y1 - y0)[:, None] * _ramp(x1 - x0)[None]
        weight[y0:y1, x0:x1] += mine
        if len(answer.mask_logits):
            share[y0:y1, x0:x1] += mine * answer.mask_logits.amax(0).sigmoid()
    logits = (share / weight).clamp(1e-6, 1 - 1e-6).logit()[None]
    if not any(len(answer.mask_logits) for answer in answers):
        logits = logits[:0]
    masks = logits > 0
    spoken = next((answer for answer in answers if answer.present), answers[0])
    return RowAnswer(
        spoken.output_ids, spoken.new_ids, logits, masks, mask_scores(logits), bool(masks.any()), size
    )
