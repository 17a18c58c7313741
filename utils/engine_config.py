"""Settings of the training engine, shared by every system that trains (torch-free: `--help` stays fast)."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class EngineConfig:
    """What the engine needs to know; a system's own config inherits from this and adds its fields."""

    log_base_dir: str = "./runs"
    """Folder that holds the run directories."""
    exp_name: str = "run"
    """Name of this run; its directory is log_base_dir/exp_name."""
    epochs: int = 60
    """Epochs; the schedule spans epochs x steps_per_epoch optimiser steps."""
    steps_per_epoch: int = 500
    """Optimiser steps per epoch; 0 = one pass over the training data."""
    batch_size: int = 12
    """Images per process and micro-batch."""
    grad_accumulation_steps: int = 1
    """Micro-batches per optimiser step."""
    global_batch_size: int = 0
    """Images per optimiser step over all processes; grad_accumulation_steps is derived from it."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number format of weights and activations (the optimiser keeps fp32 copies)."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 0 none, 1 optimiser states, 2 + gradients, 3 + weights are sharded."""
    offload_optimizer: bool = False
    """Keep optimiser states in CPU memory (GPU runs, stages 1 to 3)."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to train; auto = GPU where there is one."""
    lr: float = 3e-4
    """Peak learning rate."""
    lr_multipliers: str = ""
    """Per-group factors on lr, by part of the parameter name: 'mask_decoder=0.05,text_hidden_fcs=2'."""
    lr_schedule: Literal["warmup_decay", "cosine", "constant"] = "warmup_decay"
    """warmup_decay = DeepSpeed's WarmupDecayLR (linear up, linear to 0), exactly as published."""
    warmup_steps: int = 100
    """Optimiser steps of warm-up."""
    warmup_ratio: float = 0.0
    """Warm-up as a share of all optimiser steps; 0 = warmup_steps."""
    min_lr_ratio: float = 0.0
    """Lowest learning rate of the cosine schedule, as a share of lr."""
    beta1: float = 0.9
    """AdamW beta 1."""
    beta2: float = 0.95
    """AdamW beta 2."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.0
    """AdamW weight decay (not applied to biases and norms)."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    seed: int = 0
    """Seeds data order, drawing, dropout and new weights."""
    workers: int = 4
    """Data loading processes per rank; 0 = load in the training process. Never changes what is loaded."""
    group_by_length: bool = False
    """Put rows of like length into the same batch, where the data know their lengths (less padding)."""
    prefetch_factor: int = 2
    """Micro-batches each worker prepares ahead."""
    print_freq: int = 3
    """Optimiser steps between two log lines."""
    no_eval: bool = False
    """Skip validation; checkpoints are still written every epoch."""
    eval_only: bool = False
    """Validate once and stop."""
    eval_every_steps: int = 0
    """Optimiser steps between validations; 0 = at the end of every epoch."""
    save_every_steps: int = 0
    """Optimiser steps between checkpoints; 0 = at the end of every epoch."""
    keep_last: int = 2
    """Newest checkpoints to keep besides the best one."""
    best_metric: str = "giou"
    """Validation figure that decides which checkpoint is the best: the largest, or the smallest of a loss."""
    resume: str = ""
    """Checkpoint (step folder, checkpoints folder or run directory) to continue from."""
    auto_resume: bool = True
    """Continue from the run directory's latest checkpoint if there is one."""
    start_epoch: int = 0
    """Epoch to start at when nothing is resumed (schedule and data order move with it)."""
    tensorboard: bool = True
    """Write TensorBoard events to <run directory>/tb."""
    progress: bool = True
    """Show a progress bar."""
    dry_run: bool = False
    """Check everything, print the facts of the run and stop before training."""
    local_rank: int = 0
    """Set by the DeepSpeed launcher."""

    @property
    def run_dir(self) -> str:
        """Path of the run directory."""
        import os

        return os.path.join(self.log_base_dir, self.exp_name)

    def multipliers(self) -> dict[str, float]:
        """`lr_multipliers` as a mapping from name part to factor. ValueError if it cannot be read."""
        return parse_pairs(self.lr_multipliers, "--lr_multipliers")

    def warmup(self, total_steps: int) -> int:
        """Optimiser steps of warm-up in a run of `total_steps`."""
        return round(self.warmup_ratio * total_steps) if self.warmup_ratio else self.warmup_steps

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per optimiser step on `world_size` processes. ValueError if it cannot be met."""
        if not self.global_batch_size:
            return self.grad_accumulation_steps
        per_micro = self.batch_size * world_size
        if self.global_batch_size % per_micro:
            raise ValueError(
                f"--global_batch_size {self.global_batch_size} is no multiple of {per_micro} "
                f"(batch_size {self.batch_size} x {world_size} process(es)); change one of them"
            )
        return self.global_batch_size // per_micro

    def validate(self) -> list[str]:
        """Faults of these settings, one sentence each."""
        faults = []
        for name in ("epochs", "batch_size", "grad_accumulation_steps", "print_freq", "keep_last"):
            if getattr(self, name) < 1:
                faults.append(f"--{name} must be at least 1, found {getattr(self, name)}")
        for name in ("steps_per_epoch", "global_batch_size", "warmup_steps", "workers", "eval_every_steps"):
            if getattr(self, name) < 0:
                faults.append(f"--{name} must not be negative, found {getattr(self, name)}")
        for name in ("save_every_steps", "weight_decay", "grad_clip", "start_epoch", "seed"):
            if getattr(self, name) < 0:
                faults.append(f"--{name} must not be negative, found {getattr(self, name)}")
        if not self.lr > 0:
            faults.append(f"--lr must be positive, found {self.lr}")
        if self.zero_stage not in (0, 1, 2, 3):
            faults.append(f"--zero_stage must be 0, 1, 2 or 3, found {self.zero_stage}")
        for name in ("beta1", "beta2", "min_lr_ratio", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"--{name} must lie between 0 and 1, found {getattr(self, name)}")
        if self.eval_only and self.no_eval:
            faults.append("--eval_only and --no_eval exclude each other")
        try:
            self.multipliers()
        except ValueError as error:
            faults.append(str(error))
        return faults


def parse_pairs(text: str, flag: str) -> dict[str, float]:
    """`a=1,b=0.5` as {"a": 1.0, "b": 0.5}; ValueError names the flag and the entry that cannot be read."""
    pairs: dict[str, float] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = entry.partition("=")
        try:
            pairs[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"{flag}: expected name=factor, found {entry!r}") from None
        if not name.strip() or pairs[name.strip()] < 0:
            raise ValueError(f"{flag}: expected name=factor with a factor of at least 0, found {entry!r}")
    return pairs
