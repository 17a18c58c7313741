"""Schedules, parameter groups and DeepSpeed's settings."""

import pytest
from torch import nn

from utils.engine_config import EngineConfig
from utils.optim import deepspeed_config, lr_factor, parameter_groups


def test_cosine_and_constant() -> None:
    settings = {"total_steps": 11, "warmup_steps": 2, "min_ratio": 0.1}
    rates = [lr_factor(step, kind="cosine", **settings) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[-1] == pytest.approx(0.1)
    assert all(late < early for early, late in zip(rates[2:], rates[3:]))
    assert [lr_factor(step, kind="constant", **settings) for step in (0, 1, 9)] == [0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match="unknown schedule"):
        lr_factor(3, kind="steps", **settings)


def test_groups_by_name_with_decay() -> None:
    model = nn.ModuleDict({"decoder": nn.Linear(3, 2), "fcs": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    groups = {group.name: group for group in parameter_groups(model, {"decoder": 0.05}, 0.1)}
    assert set(groups) == {"decoder", "decoder, no decay", "rest", "rest, no decay"}
    assert groups["decoder"].lr_mult == 0.05 and groups["decoder"].weight_decay == 0.1
    assert groups["rest, no decay"].weight_decay == 0 and groups["rest"].lr_mult == 1
    assert sum(p.numel() for group in groups.values() for p in group.params) == 14
    with pytest.raises(ValueError, match="decodr"):
        parameter_groups(model, {"decodr": 1.0}, 0.0)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model.requires_grad_(False), {}, 0.0)


def test_deepspeed_settings_compile_nothing() -> None:
    for stage in range(4):
        settings = deepspeed_config(EngineConfig(zero_stage=stage), 3)
        assert "optimizer" not in settings and "scheduler" not in settings
        assert settings["zero_optimization"]["stage"] == stage
        assert settings["gradient_accumulation_steps"] == 3 and settings["bf16"]["enabled"]
    assert deepspeed_config(EngineConfig(), 1)["gradient_clipping"] == 1.0


def test_clipping_where_deepspeed_leaves_it_to_us() -> None:
    """fp32 without ZeRO: torch's clipping, so that the norm is known before the step is taken."""
    settings = deepspeed_config(EngineConfig(zero_stage=0, precision="fp32", grad_clip=0.5), 1)
    assert settings["gradient_clipping"] == 0.0
