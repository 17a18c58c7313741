"""A predictor that knows the objects: it reads ids from the red channel and scripts its masks from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

SIDE = 1024


def scripted_masks(ids: np.ndarray, wanted: int) -> list[np.ndarray]:
    """The three masks of an id: its pixels, the same grown by a 5x5 square, and its bounding rectangle."""
    own = (ids == wanted).astype(np.uint8)
    x, y, width, height = cv2.boundingRect(own)
    rectangle = np.zeros_like(own)
    rectangle[y : y + height, x : x + width] = 1
    return [own, cv2.dilate(own, np.ones((5, 5), np.uint8)), rectangle]


def scripted_logits(mask: np.ndarray) -> np.ndarray:
    """+6 inside, -0.5 on the ring that a 3x3 dilation adds, -10 elsewhere."""
    ring = cv2.dilate(mask, np.ones((3, 3), np.uint8))
    return np.where(mask > 0, 6.0, np.where(ring > 0, -0.5, -10.0)).astype(np.float32)


@dataclass
class ScriptedCandidates:
    ids: np.ndarray
    under: list[int]
    iou: Tensor

    def logits(self, index: Tensor) -> Tensor:
        drawn = [scripted_logits(scripted_masks(self.ids, self.under[k // 3])[k % 3]) for k in index.tolist()]
        return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, *self.ids.shape)


class ScriptedPredictor:
    """See the golden README; `asked` counts encoder calls, `points` the points."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked = self.points = 0

    def encode(self, crops: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.asked += 1
        return [crop[..., 0].astype(int) for crop in crops]

    def predict(self, encoded: np.ndarray, points: Tensor) -> ScriptedCandidates:
        self.points += len(points)
        height, width = encoded.shape
        under = []
        for x, y in points.tolist():
            column = min(int(x * SIDE / width / SIDE * width + 1e-3), width - 1)
            row = min(int(y * SIDE / height / SIDE * height + 1e-3), height - 1)
            under.append(int(encoded[row, column]))
        iou = [[((37 * i + 11 * k) % 29) / 29 * 0.5 + 0.5 for k in range(3)] for i in under]
        return ScriptedCandidates(encoded, under, torch.tensor(iou, dtype=torch.float32))
