"""The image streams: geometry, padding, crop, settings, files."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dataset.image import ImageProcessor, load_rgb
from tests.dataset.conftest import picture


def test_sam_stream_pads_after_normalising() -> None:
    processor = ImageProcessor(sam_size=32)
    rgb = np.full((10, 20, 3), 128, np.uint8)
    image, shape = processor.sam(rgb)
    assert shape == (16, 32) and image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert torch.all(image[:, 16:] == 0)
    expected = (128 - torch.tensor(processor.sam_mean)) / torch.tensor(processor.sam_std)
    torch.testing.assert_close(image[:, :16], expected[:, None, None].expand(3, 16, 32))


@pytest.mark.parametrize(
    ("size", "expected"), [((3, 2), (64, 43)), ((1000, 333), (64, 21)), ((5, 5), (64, 64))]
)
def test_sam_shape_rounds_halves_up(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert ImageProcessor(sam_size=64).sam_shape(*size) == expected


def test_clip_stream_is_the_centre_crop() -> None:
    rgb = np.zeros((8, 24, 3), np.uint8)
    rgb[:, 8:16] = 255  # the centre square
    image = ImageProcessor(clip_size=8).clip(rgb)
    white = (1 - torch.tensor(ImageProcessor().clip_mean)) / torch.tensor(ImageProcessor().clip_std)
    torch.testing.assert_close(image, white[:, None, None].expand(3, 8, 8), atol=1e-6, rtol=0)
    padded = ImageProcessor(clip_size=10, clip_resize=8).clip(rgb)
    assert torch.all(padded[:, 0] == padded[:, 9]) and padded.shape == (3, 10, 10)


def test_pictures_that_cannot_be_used() -> None:
    processor = ImageProcessor(sam_size=16)
    with pytest.raises(ValueError, match="uint8"):
        processor.sam(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="vanishes"):
        processor.sam(np.zeros((1, 100, 3), np.uint8))


def test_load_rgb(tmp_path: Path) -> None:
    rgb = picture(tmp_path / "ünï.jpg", 6, 9)
    np.testing.assert_array_equal(load_rgb(tmp_path / "ünï.jpg"), rgb)
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_rgb(tmp_path / "no.png")
    for content, message in ((b"", "empty file"), (b"GIF", "no readable")):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_rgb(tmp_path / "bad.png")


def test_load_rgb_turns_by_exif_as_imread_does(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)).save(tmp_path / "t.jpg", exif=exif)
    found = load_rgb(tmp_path / "t.jpg")
    assert found.shape == (5, 4, 3)
    np.testing.assert_array_equal(found, cv2.imread(str(tmp_path / "t.jpg"))[..., ::-1])


def test_settings_round_trip(tmp_path: Path) -> None:
    processor = ImageProcessor(sam_size=128, clip_size=64, clip_resize=70, clip_mean=(0.1, 0.2, 0.3))
    processor.save_pretrained(tmp_path)
    assert ImageProcessor.from_pretrained(tmp_path) == processor
    with pytest.raises(ValueError, match="unknown"):
        ImageProcessor.from_dict({"sam": 3})
    with pytest.raises(ValueError, match="three values"):
        ImageProcessor(sam_mean=(1.0,))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"size": 30, "crop_size": 28}, (30, 28)),
        ({"size": {"shortest_edge": 30}, "crop_size": {"height": 28, "width": 28}}, (30, 28)),
        ({}, (224, 224)),
    ],
)
def test_clip_folders_old_and_new(tmp_path: Path, config: dict, sizes: tuple[int, int]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 3}))
    processor = ImageProcessor.from_clip_dir(tmp_path, sam_size=256)
    assert (processor.clip_resize, processor.clip_size, processor.sam_size) == (*sizes, 256)


@pytest.mark.parametrize(
    "config",
    [
        {"do_center_crop": False},
        {"rescale_factor": 1.0},
        {"size": {"height": 3, "width": 4}},
        {"resample": 9},
    ],
)
def test_clip_folders_with_other_steps_are_refused(tmp_path: Path, config: dict) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        ImageProcessor.from_clip_dir(tmp_path)


def test_pictures_padded_to_squares_lose_nothing() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 44, 3), dtype=np.uint8)
    processor = ImageProcessor(sam_size=64, clip_size=28, clip_pad=True)
    square = np.empty((44, 44, 3), np.uint8)
    square[:] = [122, 116, 104]  # the mean colour in whole grey levels
    square[12:32] = rgb
    assert torch.equal(processor.clip(rgb), ImageProcessor(clip_size=28).clip(square))
    assert torch.equal(
        processor.clip(rgb.swapaxes(0, 1)), ImageProcessor(clip_size=28).clip(square.swapaxes(0, 1))
    )
    assert torch.equal(processor.clip(square), ImageProcessor(clip_size=28).clip(square))
    assert torch.equal(processor.sam(rgb)[0], ImageProcessor(sam_size=64).sam(rgb)[0])
    assert ImageProcessor.from_dict(processor.to_dict()) == processor
