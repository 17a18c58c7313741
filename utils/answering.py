"""A model that answers questions about pictures in words: batches in, texts out.

Nothing here draws masks: SAM's side of pictures and model is neither made nor needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.collate import collate
from dataset.image import ImageProcessor, load_rgb
from dataset.sample import Conversation, Sample
from dataset.text import Tokenizer
from model.lisat import Lisat
from utils.caption_files import Question


def question_text(question: Question) -> str:
    """The prompt without image tags (they are put in front of it)."""
    return question.text.replace("<image>\n", "").replace("\n<image>", "").replace("<image>", "")


@dataclass
class Prepared:
    """A batch ready for the model: its rows in order, the tensors, and why pictures could not be read."""

    rows: list[int]
    tensors: dict[str, Any] | None
    unreadable: dict[str, str]


class Answerer:
    """A model that answers questions about pictures in words.

    Args:
        model: on its device, with or without its segmentation modules.
        processor: its picture settings; only the tower's side is used.
        conv_type: template of the prompts. max_new_tokens: longest answer.
    """

    def __init__(
        self,
        model: Lisat,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        conv_type: str,
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.conv_type, self.max_new_tokens = conv_type, max_new_tokens

    def prepare(self, questions: Sequence[Question], pictures: dict[str, Path]) -> Prepared:
        """Load and tokenise a batch (safe in threads); pictures that cannot be read are named instead."""
        grouped: dict[str, list[int]] = {}
        for row, question in enumerate(questions):
            grouped.setdefault(question.image, []).append(row)
        samples, rows, unreadable = [], [], {}
        for name, members in grouped.items():
            try:
                image = load_rgb(pictures[name])
            except (OSError, ValueError) as error:
                unreadable[name] = str(error)
                continue
            empty = np.zeros((0, *image.shape[:2]), np.uint8)
            talks = [Conversation([(question_text(questions[row]), None)], empty) for row in members]
            samples.append(Sample(str(pictures[name]), image, talks))
            rows += members
        if not samples:
            return Prepared(rows, None, unreadable)
        batch = collate(
            samples,
            self.tokenizer,
            self.processor,
            conv_type=self.conv_type,
            padding_side="left",
            inference=True,
            im_start_end=self.model.config.mm_use_im_start_end,
            sam_stream=False,
        )
        return Prepared(rows, batch, unreadable)

    def answer(self, prepared: Prepared) -> dict[int, str]:
        """Answers by row of the batch; rows without a picture are absent."""
        if prepared.tensors is None:
            return {}
        batch = prepared.tensors
        with torch.inference_mode():
            answers = self.model.evaluate(
                batch["images_clip"],
                None,
                batch["input_ids"],
                None,
                self.max_new_tokens,
                offset=batch["offset"],
                attention_masks=batch["attention_masks"],
            )
        texts = [self.tokenizer.decode(answer.new_ids).strip() for answer in answers]
        return dict(zip(prepared.rows, texts, strict=True))
