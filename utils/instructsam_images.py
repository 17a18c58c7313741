"""Pictures for InstructSAM: pictures and GeoTIFFs as RGB, as bytes for an endpoint, and where they lie."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.io import StrPath

if TYPE_CHECKING:
    from utils.geo import Georeference

_SENT_AS_THEY_ARE = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_rgb(path: StrPath) -> np.ndarray:
    """uint8 (H, W, 3) RGB of a picture file; TIFF of any number type and bands (`utils.geo`).

    Raises:
        FileNotFoundError, ValueError: nothing there, or not readable.
    """
    if _is_tiff(path):
        from utils.geo import read_geotiff

        return read_geotiff(path).rgb
    from dataset.image import load_rgb

    return load_rgb(path)


def place_of(path: StrPath) -> "Georeference | None":
    """Where a GeoTIFF lies; None for other pictures and for TIFFs that do not say it."""
    if not _is_tiff(path):
        return None
    from utils.geo import raster_info

    return raster_info(path)[2]


def _is_tiff(path: StrPath) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in _TIFF
    except FileNotFoundError as error:
        raise FileNotFoundError(f"picture {path} is not there; check the folder and the name") from error


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
