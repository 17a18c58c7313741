"""Muon: orthogonal updates, agreement with PyTorch's own, and which parameters it gets."""

import pytest
import torch
from torch import nn

from utils.muon import Muon, muon_and_adamw, orthogonalize, update


@pytest.mark.parametrize("shape", [(3, 20, 30), (2, 30, 20), (1, 16, 16)])
def test_singular_values_end_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = torch.cosine_similarity(orthogonalize(matrices).flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.97


def test_it_is_pytorchs_muon_in_full_precision() -> None:
    generator = torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(a, b, generator=generator)) for a, b in ((20, 30), (30, 20), (20, 30))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    one = Muon(ours, lr=0.1, weight_decay=0.02)
    two = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        before = ours[0].detach().clone()
        one.step()
        two.step()
        assert (ours[0] - before).abs().max() > 0.01
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, atol=5e-3)  # theirs runs in bfloat16
    with pytest.raises(ValueError, match=r"takes matrices; found parameters of shapes \[\(5,\)\]"):
        Muon([nn.Parameter(torch.zeros(5))])


def test_matrices_of_blocks_go_to_muon_and_training_learns() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(10, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 10))
    optimizers = muon_and_adamw([(model, 0.5)], 0.02)
    muon, adamw = optimizers
    assert sorted(tuple(p.shape) for p in muon.param_groups[0]["params"]) == sorted(
        [(24, 8), (8, 8), (16, 8), (8, 16)] * 2
    )
    every = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(every) == len({id(p) for p in every}) == len(list(model.parameters()))
    tokens = torch.randint(10, (16, 6))
    losses = []
    for _ in range(60):
        losses.append(nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
        update(optimizers, losses[-1], 0.02)
    assert losses[-1] < 0.2 * losses[0]
    assert {group["lr"] for o in optimizers for group in o.param_groups} == {0.01}
