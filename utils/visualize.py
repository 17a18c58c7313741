"""Pictures of predictions (overlays, ground truth beside prediction, galleries) and score tables.

Pictures are uint8 (H, W, 3) RGB, masks (H, W) with non-zero inside, colours RGB 0..255. Files are written in
one step, so a reader never sees half a picture.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.io import StrPath, atomic_write_bytes

RED, GREEN, YELLOW = (230, 40, 40), (40, 200, 80), (250, 220, 60)
PALETTE = (
    RED,
    (50, 120, 240),
    GREEN,
    YELLOW,
    (200, 80, 220),
    (250, 140, 30),
    (40, 210, 210),
    (240, 110, 160),
)
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def write_image(path: StrPath, image: np.ndarray, quality: int = 95) -> Path:
    """Write a picture (RGB) or a mask (H, W) uint8 in the format of the file's ending. Returns the path."""
    path = Path(path)
    pixels = image[..., ::-1] if image.ndim == 3 else image
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix.lower() in (".jpg", ".jpeg") else []
    try:
        done, data = cv2.imencode(path.suffix, np.ascontiguousarray(pixels), options)
    except cv2.error:
        done = False
    if not done:
        raise ValueError(
            f"{path}: no picture of shape {image.shape} can be written as {path.suffix!r}; use .png"
        )
    return atomic_write_bytes(path, data.tobytes())


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    colour: Sequence[int] = RED,
    opacity: float = 0.45,
    outline: int = 1,
) -> np.ndarray:
    """Copy of `image` with the inside of `mask` tinted and its border drawn `outline` px wide (0 = none)."""
    if image.shape[:2] != mask.shape:
        raise ValueError(f"a mask of shape {mask.shape} does not fit a picture of shape {image.shape}")
    inside = mask.astype(bool)
    result = image.copy()
    tint = (1 - opacity) * image[inside].astype(np.float32) + opacity * np.asarray(colour, np.float32)
    result[inside] = tint.round().astype(np.uint8)
    if outline > 0 and inside.any():
        found = cv2.findContours(inside.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(result, found[-2], -1, tuple(int(c) for c in colour), outline)
    return result


def published_overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The published demo's `seg_rgb.jpg`: 0.3 picture + 0.7 red inside the mask, truncated to uint8."""
    result = image.copy()
    inside = mask.astype(bool)
    result[inside] = (image[inside] * 0.3 + np.array([255, 0, 0]) * 0.7).astype(np.uint8)
    return result


def caption(image: np.ndarray, text: str, height: int | None = None) -> np.ndarray:
    """`image` with lines of `text` on white below it; long lines are wrapped at the picture's width.

    `height` fixes the height of the text strip in pixels (what does not fit is cut); None makes it fit.
    """
    font = ImageFont.load_default(12)
    lines = [piece for line in text.splitlines() for piece in _wrap(line, font, image.shape[1] - 6)]
    strip = Image.new("RGB", (image.shape[1], height or 15 * len(lines) + 5), _PAPER)
    draw = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        draw.text((3, 2 + 15 * number), line, fill=_INK, font=font)
    return np.concatenate([image, np.asarray(strip)])


def _wrap(line: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines, current = [], ""
    for word in line.split():
        longer = f"{current} {word}".strip()
        if current and font.getlength(longer) > width:
            lines.append(current)
            current = word
        else:
            current = longer
    return [*lines, current]


def fit(image: np.ndarray, least: int = 256, most: int = 400) -> np.ndarray:
    """Picture or mask for showing: repeated pixel-wise by a whole factor until its shorter side has `least`
    px, or shrunk until its longer side has `most` px (masks keep their values)."""
    height, width = image.shape[:2]
    factor = -(-least // min(height, width))
    if factor > 1 and max(height, width) * factor <= 2 * most:
        return image.repeat(factor, 0).repeat(factor, 1)
    scale = most / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if image.ndim == 3 else cv2.INTER_NEAREST)


def side_by_side(
    image: np.ndarray,
    target: np.ndarray,
    prediction: np.ndarray,
    text: str = "",
    least: int = 256,
    most: int = 400,
) -> np.ndarray:
    """Picture | ground truth (green) | prediction (red), sized by `fit`, with a caption below.

    Pixels that the target ignores (255) are left untinted.
    """
    shown = fit(image, least, most)
    panels = [shown]
    for mask, colour in ((np.asarray(target) == 1, GREEN), (np.asarray(prediction) != 0, RED)):
        panels.append(overlay(shown, fit(mask.astype(np.uint8), least, most), colour, outline=2))
    gap = np.full((shown.shape[0], 4, 3), 255, dtype=np.uint8)
    row = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
    return caption(row, text) if text else row


def gallery(tiles: Sequence[np.ndarray], columns: int = 2, gap: int = 8) -> np.ndarray:
    """One picture of all tiles in rows of `columns`; smaller tiles are set on white at the upper left."""
    if not tiles:
        raise ValueError("a gallery needs at least one picture")
    width = max(tile.shape[1] for tile in tiles)
    rows = []
    for start in range(0, len(tiles), columns):
        part = tiles[start : start + columns]
        height = max(tile.shape[0] for tile in part)
        row = np.full((height + gap, columns * (width + gap), 3), 255, dtype=np.uint8)
        for number, tile in enumerate(part):
            left = number * (width + gap)
            row[: tile.shape[0], left : left + tile.shape[1]] = tile
        rows.append(row)
    return np.concatenate(rows)


def score_columns(rows: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """(key, title) of the scores that any row has, in the order of tables."""
    precisions = sorted({key for row in rows.values() for key in row if key.startswith("pr@")})
    columns = [("giou", "gIoU"), ("ciou", "cIoU"), ("boundary_iou", "bIoU")]
    columns += [(key, key.replace("pr@", "Pr@")) for key in precisions]
    columns += [("see_accuracy", "see acc"), ("n_masks", "masks"), ("n_images", "images")]
    return [(key, title) for key, title in columns if any(key in row for row in rows.values())]


def score_table(rows: Mapping[str, Mapping[str, float]], first: str = "queries") -> str:
    """Aligned Markdown table: one line per entry of `rows` ({name: `utils.metrics.scores` result}), readable
    as plain text too. Columns that no row has are left out."""
    columns = score_columns(rows)

    def cell(row: Mapping[str, float], key: str) -> str:
        if key not in row:
            return ""
        return str(row[key]) if key.startswith("n_") else f"{row[key]:.3f}"

    lines = [[first, *(title for _, title in columns)]]
    lines += [[name or "-", *(cell(row, key) for key, _ in columns)] for name, row in rows.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def join(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:]))]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if n else "-") for n, w in enumerate(widths)) + "|"
    return "\n".join([join(lines[0]), rule, *(join(line) for line in lines[1:])])
