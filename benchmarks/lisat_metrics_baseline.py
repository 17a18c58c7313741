"""The published way to score masks, written straight down: the yardstick of `lisat_metrics.py`.

IoU: three histograms with two bins (intersection, prediction, target) over int32 masks. Bootstrap: every
round draws pictures, reads their saved masks again and scores them again.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

IGNORED = 255


def histogram_counts(
    prediction: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Intersection, union and target counts, float32 (2,) each, of int32 masks (H, W); 255 is left out."""
    kept = (target != IGNORED).reshape(-1)
    prediction, target = prediction.reshape(-1)[kept], target.reshape(-1)[kept]
    agreed = prediction[prediction == target]
    parts = [torch.histc(part.float(), bins=2, min=0, max=1) for part in (agreed, prediction, target)]
    return parts[0], parts[1] + parts[2] - parts[0], parts[2]


def save_picture(folder: Path, number: int, prediction: np.ndarray, target: np.ndarray) -> None:
    """One picture's masks (1, H, W) as the published inference leaves them."""
    np.savez(folder / f"0_{number:04d}.npz", pred=prediction.astype(np.int32), gt=target.astype(np.int32))


def score_pictures(folder: Path, numbers: Sequence[int]) -> tuple[float, float]:
    """(gIoU, cIoU) of pictures, read and scored anew."""
    ious, hits, unions = [], 0.0, 0.0
    for number in numbers:
        with np.load(folder / f"0_{number:04d}.npz") as arrays:
            predictions, targets = torch.from_numpy(arrays["pred"]), torch.from_numpy(arrays["gt"])
        for prediction, target in zip(predictions, targets):
            intersection, union, _ = histogram_counts(prediction, target)
            iou = intersection / (union + 1e-5)
            iou[union == 0] = 1.0
            ious.append(float(iou[1]))
            hits, unions = hits + float(intersection[1]), unions + float(union[1])
    return float(np.mean(ious)), hits / (unions + 1e-10)
