"""Losses against their formulas written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.losses import mask_bce, mask_dice, mask_losses, token_loss


def test_bce_and_dice_by_hand() -> None:
    x, t = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[1.0, 0.0]]])
    p = [0.5, 1 / (1 + math.exp(-2.0))]
    bce = (-math.log(p[0]) - math.log(1 - p[1])) / 2
    dice = 1 - (2 * p[0] / 1000 + 1e-6) / ((p[0] + p[1]) / 1000 + 1 / 1000 + 1e-6)
    assert mask_bce(x, t, 1).item() == pytest.approx(bce, abs=1e-6)
    assert mask_dice(x, t, 1).item() == pytest.approx(dice, abs=1e-6)


def test_ignored_pixels_do_not_count() -> None:
    torch.manual_seed(0)
    x, t = torch.randn(2, 4, 6), (torch.rand(2, 4, 6) > 0.5).float()
    with_ignored = t.clone()
    with_ignored[:, :, 4:] = 255
    for loss in (mask_bce, mask_dice):
        cut = loss(x[:, :, :4], t[:, :, :4], 2)
        torch.testing.assert_close(loss(x, with_ignored, 2), cut)
    all_ignored = torch.full_like(t, 255)
    assert mask_bce(x, all_ignored, 2) == 0 and torch.isfinite(mask_dice(x, all_ignored, 2))


def test_images_count_by_their_masks() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(k, 5, 5) for k in (1, 3, 0)]
    targets = [(torch.rand_like(x) > 0.5).float() for x in logits]
    bce, dice = mask_losses(logits, targets)
    stacked, wanted = torch.cat(logits), torch.cat(targets)
    torch.testing.assert_close(bce, F.binary_cross_entropy_with_logits(stacked, wanted))
    torch.testing.assert_close(dice, mask_dice(stacked, wanted, 4))
    assert mask_losses(logits[2:], targets[2:]) is None


def test_low_precision_logits_are_summed_in_fp32() -> None:
    x, t = torch.full((1, 300, 300), 9.0, dtype=torch.float16), torch.ones(1, 300, 300)
    assert mask_dice(x, t, 1).item() == pytest.approx(0, abs=1e-3)


def test_faults() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        mask_bce(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3), 1)
    with pytest.raises(ValueError, match="no supervised token"):
        token_loss(torch.zeros(0, 5), torch.zeros(0).long())
