"""The learning-rate schedule equals the recorded one, and DeepSpeed's own."""

from typing import Any

import pytest
import torch

from tests.conftest import require_golden
from utils.engine_config import EngineConfig
from utils.io import read_json
from utils.optim import lr_factor

RECORDED = {
    name: entry
    for name, entry in read_json(require_golden("lisat_model") / "lr_schedule.json", dict).items()
    if isinstance(entry, dict)
}


def ours(entry: dict[str, Any], step: int) -> float:
    settings = {"total_steps": entry["total_num_steps"], "warmup_steps": entry["warmup_num_steps"]}
    return entry["warmup_max_lr"] * lr_factor(step, kind="warmup_decay", **settings)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_rates(name: str) -> None:
    entry = RECORDED[name]
    rates = entry.get("lr_at") or dict(enumerate(entry["lr"]))
    assert rates
    for step, rate in rates.items():
        assert ours(entry, int(step)) == pytest.approx(rate, rel=1e-12, abs=1e-18), step


def test_published_settings_are_the_defaults() -> None:
    config, entry = EngineConfig(), RECORDED["official"]
    assert config.epochs * config.steps_per_epoch == entry["total_num_steps"]
    assert (config.warmup_steps, config.lr) == (entry["warmup_num_steps"], entry["warmup_max_lr"])
    assert config.lr_schedule == "warmup_decay"


def test_deepspeed_agrees() -> None:
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    entry = {"total_num_steps": 23, "warmup_num_steps": 4, "warmup_max_lr": 0.02}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=entry["warmup_max_lr"])
    schedule = WarmupDecayLR(optimizer, warmup_type="linear", **entry)
    for step in range(27):
        expected = 0.0 if step == 0 else optimizer.param_groups[0]["lr"]
        assert ours(entry, step) == pytest.approx(expected, rel=1e-12, abs=1e-18), step
        schedule.step()
