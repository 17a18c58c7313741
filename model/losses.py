"""LISAT's losses: next-token cross entropy, mask BCE and mask dice (specification section 8).

Shapes: M supervised tokens, V vocabulary, K masks of an image, H/W its pixels. All sums run in fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS_COUNT = 1e-8
_DICE_SCALE = 1000.0
_EPS_DICE = 1e-6


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three terms; the published values."""

    ce: float = 1.0
    bce: float = 2.0
    dice: float = 0.5


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits (M, V) against the next tokens (M,); ValueError when M is 0."""
    if not len(targets):
        raise ValueError("no supervised token in the batch: check the labels (truncated or empty answers?)")
    return F.cross_entropy(logits.float(), targets)


@torch.no_grad()
def row_figures(
    logits: Tensor, targets: Tensor, places: Sequence[tuple[int, int, int]], num_rows: int
) -> dict[str, Tensor]:
    """Per token row (R,), fp32: `row_tokens` supervised tokens, `row_losses` sum of their cross entropies,
    `row_correct` those that have the highest logit. logits (M, V), targets (M,); `places` starts with the
    row of each of the M tokens."""
    at = torch.tensor([place[0] for place in places], device=logits.device)
    values = {
        "row_tokens": torch.ones_like(targets, dtype=torch.float32),
        "row_losses": F.cross_entropy(logits.float(), targets, reduction="none"),
        "row_correct": (logits.argmax(-1) == targets).float(),
    }
    zeros = torch.zeros(num_rows, device=logits.device)
    return {name: zeros.index_add(0, at, value) for name, value in values.items()}


def _pixels(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if logits.shape != targets.shape:
        raise ValueError(
            f"mask logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape"
        )
    x, t = logits.flatten(1).float(), targets.flatten(1).float()
    return x, t, (t <= 1).float()  # 255 marks pixels that do not count


def mask_bce(logits: Tensor, targets: Tensor, num_masks: float) -> Tensor:
    """Sum over masks of the mean pixel BCE, divided by `num_masks`; both inputs (K, H, W).

    Targets are 0 or 1; pixels above 1 (255 = ignore) are left out of the mean.
    """
    x, t, counted = _pixels(logits, targets)
    pixel = F.binary_cross_entropy_with_logits(x, t.clamp(max=1), reduction="none") * counted
    return (pixel.sum(1) / counted.sum(1).clamp(min=1)).sum() / (num_masks + _EPS_COUNT)


def mask_dice(logits: Tensor, targets: Tensor, num_masks: float) -> Tensor:
    """Sum over masks of the dice loss, divided by `num_masks`; inputs as in `mask_bce`."""
    x, t, counted = _pixels(logits, targets)
    p, t = x.sigmoid() * counted, t * counted
    overlap = 2 * (p / _DICE_SCALE * t).sum(1)
    total = (p / _DICE_SCALE).sum(1) + (t / _DICE_SCALE).sum(1)
    return (1 - (overlap + _EPS_DICE) / (total + _EPS_DICE)).sum() / (num_masks + _EPS_COUNT)


def mask_losses(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Batch means (bce, dice), unweighted, over per-image logits and targets (K_i, H_i, W_i).

    None when no image has a mask.
    """
    pairs = [(x, t) for x, t in zip(logits, targets, strict=True) if len(x)]
    if not pairs:
        return None
    count = sum(len(x) for x, _ in pairs)
    bce = torch.stack([mask_bce(x, t, len(x)) * len(x) for x, t in pairs]).sum()
    dice = torch.stack([mask_dice(x, t, len(x)) * len(x) for x, t in pairs]).sum()
    return bce / (count + _EPS_COUNT), dice / (count + _EPS_COUNT)
