"""Local Qwen2.5-VL as a counter: several pictures, one prompt, one text each.

B pictures in a batch, T tokens of the longest prompt (shorter ones are padded on the left), G new tokens.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FACTOR = 28
"""Sides of a picture are multiples of this: patches of 14 pixels, merged 2 x 2."""
_AREAS = (4 * FACTOR * FACTOR, 16384 * FACTOR * FACTOR)


@dataclass(frozen=True)
class QwenAnswer:
    """Text without special tokens; tokens of the prompt and of the answer; `cut`: longest length reached."""

    text: str
    prompt_tokens: int
    new_tokens: int
    cut: bool


class QwenCounter:
    """A Qwen2.5-VL model with its processor; `answer` asks about a batch of pictures."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.eval()
        self.processor = processor
        self.processor.tokenizer.padding_side = "left"

    @torch.inference_mode()
    def answer(
        self,
        pictures: Sequence[np.ndarray],
        prompt: str,
        max_new_tokens: int = 5000,
        temperature: float = 0.0,
    ) -> list[QwenAnswer]:
        """Answers to `prompt` about B pictures, uint8 (H, W, 3) RGB each of its own size.

        `temperature` 0 takes the most likely token; above it samples (the published program: 0.01).
        """
        inputs = self.encode(pictures, prompt)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature}
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)
        length = inputs["input_ids"].shape[1]
        new = output[:, length:]  # (B, G)
        texts = self.processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        lengths = self._lengths(new)
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            QwenAnswer(text, int(asked), count, count >= max_new_tokens and not ended)
            for text, asked, (count, ended) in zip(texts, prompts, lengths, strict=True)
        ]

    def encode(self, pictures: Sequence[np.ndarray], prompt: str) -> Any:
        """Model inputs of B pictures: `input_ids`, `attention_mask` (B, T) padded on the left,
        `pixel_values` (patches of all pictures, 1176), `image_grid_thw` (B, 3)."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        images = [fit_picture(picture) for picture in pictures]
        inputs = self.processor(text=[text] * len(images), images=images, padding=True, return_tensors="pt")
        return inputs.to(self.model.device)

    def _lengths(self, new: torch.Tensor) -> list[tuple[int, bool]]:
        """Tokens of each answer up to its end token (not counted), and whether there was one."""
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [self.processor.tokenizer.eos_token_id])
        stops = torch.isin(new, torch.tensor(ends, device=new.device))
        result = []
        for row in stops.tolist():
            ended = True in row
            result.append((row.index(True) if ended else len(row), ended))
        return result


def fit_picture(rgb: np.ndarray) -> Image.Image:
    """Picture with both sides rounded to multiples of 28 (Pillow, bicubic), as `qwen_vl_utils` prepares it.

    The processor then shrinks or enlarges it to its own limits of area where needed.
    """
    height, width = rgb.shape[:2]
    sides = _rounded(width, height)
    image = Image.fromarray(rgb)
    return image if sides == (width, height) else image.resize(sides, Image.Resampling.BICUBIC)


def _rounded(width: int, height: int) -> tuple[int, int]:
    """Sides as multiples of 28 with an area within `_AREAS`; the shape changes as little as possible."""
    sides = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in (width, height)]
    least, most = _AREAS
    if sides[0] * sides[1] > most:
        scale = math.sqrt(width * height / most)
        sides = [max(FACTOR, math.floor(side / scale / FACTOR) * FACTOR) for side in (width, height)]
    elif sides[0] * sides[1] < least:
        scale = math.sqrt(least / (width * height))
        sides = [math.ceil(side * scale / FACTOR) * FACTOR for side in (width, height)]
    return sides[0], sides[1]


def load_qwen(
    folder: str | os.PathLike[str],
    device: str = "cpu",
    precision: str = "fp32",
    min_pixels: int = 256 * FACTOR * FACTOR,
    max_pixels: int = 1280 * FACTOR * FACTOR,
) -> QwenCounter:
    """Model and processor of a local folder; never downloads.

    Args:
        min_pixels, max_pixels: limits of a picture's area after resizing (published: 200704 and 1003520).

    Raises:
        ValueError: the folder holds no Qwen2.5-VL model or processor.
    """
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, local_files_only=True, dtype=_DTYPES[precision]
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no Qwen2.5-VL model could be read: {error}") from error
    processor.image_processor.size = size
    return QwenCounter(model.to(device), processor)
