"""Parameter groups, learning-rate schedules and DeepSpeed's settings.

Schedules are pure functions of the optimiser step, so a resumed run needs no state for them.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from utils.engine_config import EngineConfig


@dataclass
class ParamGroup:
    """Parameters trained with `lr * lr_mult` and `weight_decay`; `name` appears in the log."""

    name: str
    params: list[nn.Parameter]
    lr_mult: float = 1.0
    weight_decay: float = 0.0


def lr_factor(step: int, *, kind: str, total_steps: int, warmup_steps: int, min_ratio: float = 0.0) -> float:
    """Factor (0 to 1) on the peak learning rate in force at optimiser step `step` (0-based).

    `warmup_decay` is DeepSpeed's WarmupDecayLR as the published training runs it: its first two steps run
    at 0, the peak is reached at step `warmup_steps + 1`, 0 at `total_steps + 1`. `cosine` rises linearly
    from 1/warmup_steps, peaks at step `warmup_steps` and falls to `min_ratio` at the last step; `constant`
    rises alike and stays.
    """
    if kind == "warmup_decay":
        warmup = max(2, warmup_steps)
        done = step - 1  # the scheduler lags the optimiser by one step
        if done <= 0:
            return 0.0
        if done < warmup:
            return done / warmup
        return max(0.0, (total_steps - done) / max(1.0, total_steps - warmup))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    if kind == "cosine":
        share = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))
    raise ValueError(f"unknown schedule {kind!r}; choose warmup_decay, cosine or constant")


def deepspeed_config(config: EngineConfig, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's JSON settings; the optimiser and the schedule are ours, so nothing is compiled."""
    own_clipping = config.zero_stage == 0 and config.precision == "fp32"
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage:
        bucket = 500_000_000
        zero |= {"contiguous_gradients": True, "overlap_comm": True, "reduce_scatter": True}
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.zero_stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    if config.offload_optimizer and config.zero_stage:
        zero |= {"offload_optimizer": {"device": "cpu"}}
    return {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if own_clipping else config.grad_clip,
        "steps_per_print": 10**9,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def parameter_groups(
    model: nn.Module, multipliers: dict[str, float], weight_decay: float
) -> list[ParamGroup]:
    """Trainable parameters grouped by the first multiplier whose regular expression is found in their name.

    Biases and norms (one dimension) get no weight decay.

    Raises:
        ValueError: a multiplier matches no trainable parameter, or nothing is trainable.
    """
    groups: dict[tuple[str, bool], ParamGroup] = {}
    used = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = next((pattern for pattern in multipliers if re.search(pattern, name)), "")
        used.add(key)
        decay = weight_decay if parameter.dim() > 1 else 0.0
        label = (key or "rest") + ("" if decay == weight_decay else ", no decay")
        group = groups.setdefault((key, decay > 0), ParamGroup(label, [], multipliers.get(key, 1.0), decay))
        group.params.append(parameter)
    if not groups:
        raise ValueError("no parameter of the model needs gradients: nothing to train")
    unused = [pattern for pattern in multipliers if pattern not in used]
    if unused:
        raise ValueError(f"--lr_multipliers: no trainable parameter has {', '.join(unused)} in its name")
    return [groups[key] for key in sorted(groups)]
