"""The one image preprocessing: a picture file -> RGB uint8 -> the SAM stream and the CLIP stream.

H, W are pixels of the picture; S the side of the square SAM input; c the side of the square CLIP input.
Resampling is Pillow's, which reproduces the published pixels bit for bit (torchvision's does not).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from utils.io import StrPath, atomic_write_json, read_json

FILE_NAME = "lisat_processor.json"
"""Name of the settings file in a checkpoint folder."""

_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def load_rgb(path: StrPath) -> np.ndarray:
    """Picture file as uint8 (H, W, 3) RGB, turned upright by its EXIF orientation.

    Grey pictures get three equal bands, alpha is dropped, 16 bit becomes 8 bit (OpenCV's rules).

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: empty file, or not a picture that OpenCV reads.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"picture {path} is not there; check the data folder and the name in the annotation"
        )
    data = np.fromfile(path, dtype=np.uint8)
    if data.size == 0:
        raise ValueError(f"picture {path} is an empty file; copy it again")
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise ValueError(f"picture {path} cannot be decoded: {error}") from error
    if image is None:
        raise ValueError(
            f"picture {path} ({data.size} bytes) is no readable JPEG, PNG, TIFF, BMP or WebP file"
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


@dataclass(frozen=True)
class ImageProcessor:
    """Settings and functions of both image streams.

    `sam_size` S: longer side after resizing and side of the padded square; `sam_mean`, `sam_std` on the
    0..255 scale. `clip_resize` shorter side after resizing (None: `clip_size`), `clip_size` c: side of the
    centre crop, `clip_mean`, `clip_std` on the 0..1 scale. `clip_pad` first pads the picture to a square with
    the mean colour (LLaVA's `image_aspect_ratio: pad`), so that the crop loses nothing.
    """

    sam_size: int = 1024
    clip_size: int = 224
    clip_resize: int | None = None
    clip_resample: str = "bicubic"
    clip_pad: bool = False
    sam_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    sam_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    clip_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    clip_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        for name in ("sam_mean", "sam_std", "clip_mean", "clip_std"):
            value = tuple(float(x) for x in getattr(self, name))
            if len(value) != 3:
                raise ValueError(f"{name} needs three values (red, green, blue), found {list(value)}")
            object.__setattr__(self, name, value)
        for name in ("sam_size", "clip_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.clip_resample not in _RESAMPLING:
            raise ValueError(f"clip_resample {self.clip_resample!r} is none of {', '.join(_RESAMPLING)}")

    # ---- the two streams

    def sam_shape(self, height: int, width: int) -> tuple[int, int]:
        """Size (h_in, w_in) of a picture inside the SAM square: longer side S, halves rounded up."""
        scale = self.sam_size / max(height, width)
        return int(height * scale + 0.5), int(width * scale + 0.5)

    def sam(self, rgb: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        """SAM stream of a uint8 (H, W, 3) picture.

        Returns:
            float32 (3, S, S), normalised, zeros right of and below the picture; and (h_in, w_in).
        """
        height, width = self.sam_shape(*_check_rgb(rgb).shape[:2])
        if min(height, width) < 1:
            raise ValueError(
                f"a picture of {rgb.shape[0]}x{rgb.shape[1]} pixels vanishes at {self.sam_size}: tile it"
            )
        resized = np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
        square = torch.zeros(3, self.sam_size, self.sam_size)
        square[:, :height, :width] = _normalise(resized.astype(np.float32), self.sam_mean, self.sam_std)
        return square, (height, width)

    def clip(self, rgb: np.ndarray) -> torch.Tensor:
        """CLIP stream of a uint8 (H, W, 3) picture: shorter side resized, centre crop; float32 (3, c, c)."""
        rgb = _squared(_check_rgb(rgb), self.clip_mean) if self.clip_pad else _check_rgb(rgb)
        height, width = rgb.shape[:2]
        short = self.clip_resize or self.clip_size
        long = int(short * max(height, width) / min(height, width))
        size = (short, long) if width <= height else (long, short)  # (width, height)
        image = Image.fromarray(rgb).resize(size, Image.Resampling(_RESAMPLING[self.clip_resample]))
        pixels = _centre_crop(np.asarray(image), self.clip_size)
        return _normalise((pixels * (1 / 255)).astype(np.float32), self.clip_mean, self.clip_std)

    # ---- settings

    @classmethod
    def from_clip_dir(cls, folder: StrPath, sam_size: int = 1024) -> "ImageProcessor":
        """Settings of a vision tower's `preprocessor_config.json` (old and new forms of its fields).

        Raises:
            ValueError: a step of the file is switched off or has a form this class does not do.
        """
        path = Path(folder) / "preprocessor_config.json"
        config = read_json(path, dict)
        for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
            if config.get(step, True) is not True:
                raise ValueError(f"{path}: {step} is {config[step]!r}; only true is supported")
        factor = config.get("rescale_factor", 1 / 255)
        if abs(factor - 1 / 255) > 1e-9:
            raise ValueError(f"{path}: rescale_factor is {factor}; only 1/255 is supported")
        names = {number: name for name, number in _RESAMPLING.items()}
        values: dict[str, Any] = {
            "clip_resize": _side(config.get("size", 224), "shortest_edge", path, "size"),
            "clip_size": _side(config.get("crop_size", 224), "height", path, "crop_size"),
            "clip_resample": names.get(config.get("resample", 3), str(config.get("resample"))),
        }
        for ours, theirs in (("clip_mean", "image_mean"), ("clip_std", "image_std")):
            if theirs in config:
                values[ours] = tuple(config[theirs])
        return cls(sam_size=sam_size, **values)

    def to_dict(self) -> dict[str, Any]:
        """Settings as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImageProcessor":
        """Inverse of `to_dict`; unknown names raise ValueError."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise ValueError(f"image processor settings {', '.join(unknown)} are unknown; known are {known}")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def save_pretrained(self, folder: StrPath) -> None:
        """Write `lisat_processor.json` into a checkpoint folder."""
        atomic_write_json(Path(folder) / FILE_NAME, self.to_dict())

    @classmethod
    def from_pretrained(cls, folder: StrPath) -> "ImageProcessor":
        """Read `lisat_processor.json` of a checkpoint folder."""
        return cls.from_dict(read_json(Path(folder) / FILE_NAME, dict))


def _check_rgb(rgb: np.ndarray) -> np.ndarray:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or min(rgb.shape[:2]) < 1:
        raise ValueError(f"a picture must be uint8 (H, W, 3) RGB, found {rgb.dtype} {rgb.shape}")
    return rgb


def _squared(rgb: np.ndarray, mean: tuple[float, ...]) -> np.ndarray:
    """The picture in the middle of a square of its longer side, the rest in the colour `mean` (0..1)."""
    height, width = rgb.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), [int(value * 255) for value in mean], np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = rgb
    return square


def _normalise(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(h, w, 3) float32 -> normalised (3, h, w) float32."""
    values = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def _centre_crop(pixels: np.ndarray, side: int) -> np.ndarray:
    """Centre (side, side, 3) of a picture; black borders where the picture is smaller."""
    height, width = pixels.shape[:2]
    tall, wide = max(side, height), max(side, width)
    if (tall, wide) != (height, width):
        canvas = np.zeros((tall, wide, 3), pixels.dtype)
        top, left = -((height - tall) // 2), -((width - wide) // 2)
        canvas[top : top + height, left : left + width] = pixels
        pixels, height, width = canvas, tall, wide
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def _side(value: Any, key: str, path: Path, name: str) -> int:
    """Side length from 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    if isinstance(value, int):
        return value
    if isinstance(value, dict) and (key in value or name == "crop_size"):
        if value.get("width", value.get(key)) == value.get(key) and isinstance(value.get(key), int):
            return value[key]
    raise ValueError(f"{path}: {name} is {value!r}; expected one side length, as in {{{key!r}: 224}}")
