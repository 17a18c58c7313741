"""Fixtures of the data tests: a small tokenizer trained on the spot, and writers of tiny data folders."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset.text import IM_END, IM_START, SEG_TOKEN, Tokenizer
from tests.sentencepiece_model import train_sentencepiece

SENTENCES = (
    "Where is the red ship? It lies left of the white house.",
    "Please segment the largest blue tank in this image. Sure, it is here.",
    "There is no such thing in the picture, nor in the next one.",
)


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """Bytes of a 420-piece BPE model with byte fallback, as Llama's."""
    return train_sentencepiece(SENTENCES, 420)


@pytest.fixture
def tokenizer(sentencepiece_model: bytes) -> Tokenizer:
    """The small tokenizer with the three LISAT tokens."""
    tokenizer = Tokenizer(sentencepiece_model)
    tokenizer.add_tokens([SEG_TOKEN, IM_START, IM_END])
    return tokenizer


def picture(path: Path, height: int = 20, width: int = 24, seed: int = 0) -> np.ndarray:
    """Write a random PNG (any file ending); returns it as RGB."""
    rgb = np.random.default_rng((seed, height, width)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", rgb[..., ::-1])[1].tobytes())
    return rgb


def square(x: float = 4, y: float = 5, side: float = 6) -> list[list[float]]:
    """Closed ring of a square."""
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def gres_body(name: str = "a.jpg", **changes: object) -> dict:
    """Content of a GRES file with one square target."""
    shape = {"label": "target", "points": square(), "image_name": name}
    return {"text": ["Find the hut."], "is_sentence": True, "shapes": [shape]} | changes


@pytest.fixture
def gres_folder(tmp_path: Path) -> Callable[..., Path]:
    """`gres_folder({"a": body})` writes reason_seg/GeoReasonSeg/train with pictures; returns the root."""

    def write(files: dict[str, dict], split: str = "train", name: str = "GeoReasonSeg") -> Path:
        folder = tmp_path / "data" / "reason_seg" / name / split
        for number, (stem, body) in enumerate(files.items()):
            picture(folder / f"{stem}.jpg", seed=number)
            (folder / f"{stem}.json").write_text(json.dumps(body))
        return tmp_path / "data"

    return write
