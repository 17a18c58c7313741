"""Named sizes: the published parameter counts, and a tiny one that runs."""

import pytest
import torch
from accelerate import init_empty_weights

from model.lisat import Lisat
from model.lora import add_lora, mark_trainable
from model.presets import PRESETS, lisat_7b, lisat_tiny, preset


def test_full_size_has_the_published_counts() -> None:
    with init_empty_weights(include_buffers=False):
        model = Lisat(lisat_7b())
        add_lora(model)
    mark_trainable(model)
    count = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    assert count["mm_projector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert round(count["vision_tower"] / 1e6, 1) == 303.2
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 288_251_364
    assert model.config.num_image_features == 256


@pytest.mark.parametrize("packed", [True, False])
def test_tiny_learns_from_a_step(packed: bool) -> None:
    torch.manual_seed(0)
    config = lisat_tiny(vocab_size=64, seg_token_id=61)
    model = Lisat(config)
    mark_trainable(model)
    ids = torch.tensor([[1, 5, -200, 7, 61, 2], [1, 5, -200, 9, 61, 2]])
    b = dict(input_ids=ids, labels=ids.where(ids > 60, -100), offset=[0, 2], packed=packed)
    b |= dict(images=torch.randn(1, 3, 128, 128), images_clip=torch.randn(1, 3, 128, 128))
    b |= dict(sam_mask_shape_list=[((128, 96), (64, 48))], masks_list=[torch.ones(2, 64, 48)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**b)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert sum(p.numel() for p in model.parameters()) < 4_000_000


def test_names() -> None:
    assert all(preset(name) == PRESETS[name]() for name in PRESETS)
    with pytest.raises(ValueError, match="lisat_tiny"):
        preset("lisat_9000b")
