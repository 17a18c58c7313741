"""Image streams of the data side: non-square, upscaled and downscaled pictures."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dataset.image import ImageProcessor
from tests.conftest import require_golden

FOLDER = require_golden("lisat_data") / "collate"
GOLDEN = json.loads((FOLDER / "preprocess.json").read_text())
TENSORS = load_file(FOLDER / "preprocess.safetensors")


def formula(height: int, width: int, k: int = 3) -> np.ndarray:
    """The picture that the folder's README defines, uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    bands = [x // 2 + 17 * k, y // 2 + 29 * k, (x + y) // 4 + 41 * k]
    return np.stack(bands, axis=-1).__mod__(256).astype(np.uint8)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["key"])
def test_streams(case: dict) -> None:
    key, clip = case["key"], GOLDEN["clip"]
    rgb = TENSORS.get(f"rgb.{key}", formula(*case["input_hw"]))
    processor = ImageProcessor(
        sam_size=case["image_size"],
        clip_size=clip["crop"],
        clip_resize=clip["size"],
        clip_mean=tuple(clip["mean"]),
        clip_std=tuple(clip["std"]),
    )
    image, shape = processor.sam(rgb)
    assert list(shape) == case["sam_input_shape"]
    assert [list(shape), list(rgb.shape[:2])] == case["image_processor_sam_mask_shape"]
    np.testing.assert_allclose(image, TENSORS[f"sam.{key}"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(processor.clip(rgb), TENSORS[f"clip.{key}"], rtol=0, atol=1e-4)
