"""Pictures for InstructSAM: pictures and GeoTIFFs as RGB, as bytes for an endpoint, and where they lie."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.io import StrPath

_SENT_AS_THEY_ARE = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Place:
    """Where a picture lies: `transform` (a, b, c, d, e, f) with x = a * column + b * row + c and
    y = d * column + e * row + f, and the coordinate system as text that rasterio reads."""

    transform: tuple[float, float, float, float, float, float]
    crs: str


def read_rgb(path: StrPath) -> np.ndarray:
    """uint8 (H, W, 3) RGB of a picture file; TIFF with any number type and number of bands.

    Of a TIFF the first three bands count (one band: three times that). Other number types than uint8 are
    stretched per band from the 2nd to the 98th percentile of the valid pixels.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not readable.
    """
    if not is_tiff(path):
        from dataset.image import load_rgb

        return load_rgb(path)
    import rasterio

    try:
        with rasterio.open(path) as file:
            bands = (1, 2, 3) if file.count >= 3 else (1,)
            pixels, valid = file.read(bands), file.dataset_mask() != 0
    except rasterio.errors.RasterioError as error:
        raise ValueError(f"picture {path} is no readable TIFF: {error}") from error
    stretched = [band if band.dtype == np.uint8 else _stretch(band, valid) for band in pixels]
    return np.ascontiguousarray(np.stack(stretched * (3 // len(stretched)), axis=-1))


def _stretch(band: np.ndarray, valid: np.ndarray) -> np.ndarray:
    values = band.astype(np.float64)
    good = valid & np.isfinite(values)
    if not good.any():
        return np.zeros(band.shape, np.uint8)
    low, high = np.percentile(values[good], (2, 98))
    scaled = (np.where(good, values, low) - low) / max(high - low, 1e-12)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)


def is_tiff(path: StrPath) -> bool:
    """Whether the file begins like a TIFF; FileNotFoundError where there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(4) in _TIFF
    except FileNotFoundError as error:
        raise FileNotFoundError(f"picture {path} is not there; check the folder and the file name") from error


def place_of(path: StrPath) -> Place | None:
    """Coordinates of a GeoTIFF; None for other pictures and for TIFFs that do not say where they lie."""
    if not is_tiff(path):
        return None
    import rasterio

    with rasterio.open(path) as file:
        if file.crs is None or file.transform.is_identity:
            return None
        return Place(tuple(file.transform)[:6], file.crs.to_string())


def picture_bytes(path: Path, published: bool = False, max_side: int = 0) -> tuple[bytes, str]:
    """Bytes of a picture to send, and their media type.

    PNG, JPEG, GIF and WebP go as they are, everything else as PNG. `max_side` > 0 shrinks larger pictures
    to that longer side. `published` sends every file unchanged and calls it PNG.
    """
    data = path.read_bytes()
    if published:
        return data, "image/png"
    kind = media_type(data)
    if kind and not max_side:
        return data, kind
    rgb = read_rgb(path)
    if kind and max(rgb.shape[:2]) <= max_side:
        return data, kind
    return _encoded(rgb, max_side, ".jpg" if kind == "image/jpeg" else ".png")


def media_type(data: bytes) -> str:
    """Media type by the first bytes, "" for formats that endpoints do not take."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return next((kind for start, kind in _SENT_AS_THEY_ARE.items() if data.startswith(start)), "")


def _encoded(rgb: np.ndarray, max_side: int, suffix: str) -> tuple[bytes, str]:
    import cv2

    scale = max_side / max(rgb.shape[:2]) if max_side else 1.0
    if scale < 1:
        size = [max(1, round(side * scale)) for side in rgb.shape[1::-1]]
        rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)
    options: list[Any] = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix == ".jpg" else []
    _, data = cv2.imencode(suffix, np.ascontiguousarray(rgb[..., ::-1]), options)
    return data.tobytes(), "image/jpeg" if suffix == ".jpg" else "image/png"
