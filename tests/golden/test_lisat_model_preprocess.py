"""Both image streams, pixel for pixel, against the published preprocessing."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dataset.image import ImageProcessor, load_rgb
from tests.conftest import require_golden

FOLDER = require_golden("lisat_model")
CASES = json.loads((FOLDER / "preprocess.json").read_text())
TENSORS = load_file(FOLDER / "preprocess.safetensors")
STREAMS = load_file(FOLDER / "image_tensors.safetensors")
SAM_SIZE = json.loads((FOLDER / "configs.json").read_text())["sam"]["image_size"]


@pytest.fixture(scope="module")
def tiny() -> ImageProcessor:
    return ImageProcessor.from_clip_dir(FOLDER / "remote_clip", sam_size=SAM_SIZE)


@pytest.mark.parametrize("name", CASES)
def test_tiny_streams(tiny: ImageProcessor, name: str) -> None:
    case, rgb = CASES[name], load_rgb(FOLDER / CASES[name]["file"])
    image, shape = tiny.sam(rgb)
    assert [list(shape), list(rgb.shape[:2])] == case["sam_shape"]
    np.testing.assert_allclose(image[:, ::2, ::2], TENSORS[f"{name}.sam"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(tiny.clip(rgb), TENSORS[f"{name}.clip"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(image.double().sum(), case["sam_sum"], rtol=1e-9)
    np.testing.assert_allclose(image.double().abs().sum(), case["sam_abs_sum"], rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in CASES if "sam1024_shape" in CASES[name]])
def test_full_size_streams(name: str) -> None:
    case, rgb, processor = CASES[name], load_rgb(FOLDER / CASES[name]["file"]), ImageProcessor()
    image, shape = processor.sam(rgb)
    assert [list(shape), list(rgb.shape[:2])] == case["sam1024_shape"]
    clip = processor.clip(rgb)
    np.testing.assert_allclose(image[:, ::16, ::16], TENSORS[f"{name}.sam1024_every16"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(clip[:, ::2, ::2], TENSORS[f"{name}.clip224"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(image.double().abs().sum(), case["sam1024_abs_sum"], rtol=1e-9)
    np.testing.assert_allclose(clip.double().abs().sum(), case["clip224_abs_sum"], rtol=1e-9)
    np.testing.assert_allclose(clip.double().sum(), case["clip224_sum"], rtol=1e-9)


@pytest.mark.parametrize("name", sorted(key.removesuffix(".sam") for key in STREAMS if key.endswith(".sam")))
def test_streams_of_the_model_cases(tiny: ImageProcessor, name: str) -> None:
    path = next(path for path in (FOLDER / "images" / name, FOLDER / name) if path.is_file())
    rgb = load_rgb(path)
    np.testing.assert_allclose(tiny.sam(rgb)[0], STREAMS[f"{name}.sam"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(tiny.clip(rgb), STREAMS[f"{name}.clip"], rtol=0, atol=1e-6)
