"""Overlays, side-by-side pictures, galleries, tables."""

import cv2
import numpy as np
import pytest

from utils import visualize


def scene() -> tuple[np.ndarray, np.ndarray]:
    image = np.full((20, 30, 3), 100, dtype=np.uint8)
    mask = np.zeros((20, 30), dtype=np.uint8)
    mask[5:12, 8:20] = 1
    return image, mask


def test_overlay_tints_the_inside_only() -> None:
    image, mask = scene()
    shown = visualize.overlay(image, mask, colour=(200, 0, 0), opacity=0.5, outline=0)
    assert (shown[mask == 0] == 100).all()
    assert (shown[mask == 1] == (150, 50, 50)).all()
    outlined = visualize.overlay(image, mask, colour=(200, 0, 0), outline=1)
    assert tuple(outlined[5, 8]) == (200, 0, 0)
    assert (image == 100).all()
    assert (visualize.overlay(image, np.zeros_like(mask)) == image).all()
    with pytest.raises(ValueError, match="does not fit"):
        visualize.overlay(image, mask[:-1])


def test_published_overlay_truncates() -> None:
    image, mask = scene()
    shown = visualize.published_overlay(image, mask)
    assert tuple(shown[6, 9]) == (208, 30, 30)  # 0.3 * 100 + 0.7 * 255 = 208.5
    assert tuple(shown[0, 0]) == (100, 100, 100)


@pytest.mark.parametrize("name", ["a.png", "sub/b.png"])
def test_write_image_keeps_rgb(tmp_path, name: str) -> None:
    image, _ = scene()
    image[0, 0] = (1, 2, 3)
    path = visualize.write_image(tmp_path / name, image)
    assert tuple(cv2.imread(str(path))[0, 0]) == (3, 2, 1)
    with pytest.raises(ValueError, match="use .png"):
        visualize.write_image(tmp_path / "a.nothing", image)


def test_side_by_side_and_gallery() -> None:
    image, mask = scene()
    tile = visualize.side_by_side(image, mask * 255, mask, "one two three " * 20, least=40)
    assert tile.shape[1] == 3 * 60 + 8 and tile.shape[0] > 40
    truth = tile[:40, 64:124]
    assert (truth == 100).all()  # 255 is not the object
    sheet = visualize.gallery([tile, tile[:30], tile], columns=2)
    assert sheet.shape == (tile.shape[0] * 2 + 16, 2 * (tile.shape[1] + 8), 3)
    with pytest.raises(ValueError):
        visualize.gallery([])


def test_fit() -> None:
    image, mask = scene()
    assert visualize.fit(image, least=40).shape == (40, 60, 3)
    assert visualize.fit(image, 10, 400) is image
    large = visualize.fit(mask.repeat(40, 0).repeat(40, 1), most=60)
    assert large.shape == (40, 60) and set(np.unique(large)) == {0, 1}
    assert visualize.fit(np.zeros((4, 4000, 3), np.uint8), 256, 400).shape == (1, 400, 3)


def test_score_table() -> None:
    rows = {"all": {"giou": 0.5, "n_masks": 3}, "": {"giou": 0.25, "ciou": 1.0, "n_masks": 1}}
    lines = visualize.score_table(rows, first="kind").splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["kind", "gIoU", "cIoU", "masks"]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["-", "0.250", "1.000", "1"]
    assert len({len(line) for line in lines}) == 1
