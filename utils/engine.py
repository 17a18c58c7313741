"""The one training loop, on DeepSpeed, for every system that trains (CPU and GPU, one process or many).

Model, data and validation come from outside:

* `model(**batch)` returns a dict whose `loss` is a scalar; its other scalars are logged.
* `train_data` has a length and `data[index]` or `data.draw(index, epoch=, seed=)`; `collate` makes the batch.
* `validate(engine)` runs in every process, calls `engine.infer`, and returns figures equal in all of them.

Checkpoints: utils/checkpointing.py. Data order: utils/sampling.py. Settings: utils/engine_config.py.
"""

import logging
import math
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from utils.checkpointing import (
    WEIGHTS_FILE,
    CheckpointStore,
    capture_rng,
    fingerprint,
    read_rank_state,
    read_state,
    resolve_checkpoint,
    restore_rng,
    trainable_names,
    trainable_tensors,
    trained_buffers,
)
from utils.distributed import World, import_deepspeed
from utils.engine_config import EngineConfig
from utils.io import atomic_write_json
from utils.optim import ParamGroup, deepspeed_config, lr_factor, parameter_groups
from utils.progress import Progress, clock, memory_gib
from utils.run_dir import RunDir
from utils.sampling import BatchPlan, SizedData, known_lengths, make_loader, seeded

logger = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient norm became NaN or infinite; the message names step, figures and files."""


@dataclass
class TrainResult:
    """How a run ended: steps done, last validation figures, the best score and where the checkpoints are."""

    step: int
    run_dir: Path
    interrupted: bool = False
    best_score: float | None = None
    best_step: int | None = None
    figures: dict[str, float] = field(default_factory=dict)


class Engine:
    """Trains `model`; see the module text for what it expects.

    Args:
        model: built alike in every process; parameters that need no gradient stay frozen.
        config: the settings.
        world: from `init_distributed`.
        train_data: what to draw from.
        collate: list of samples -> batch dict; `names_key` of it lists file names for error messages.
        validate: `validate(engine) -> {figure: value}`; None = no validation.
        param_groups: overrides the groups made from `config.lr_multipliers`.
        prepare: changes a batch that is on the device already, `prepare(engine, batch) -> batch`.
        cast_keys: batch entries that take the model's number format; other tensors are only moved.
        names_key: batch entry with the file names.
        count_keys: batch entries that hold numbers to count; their sums since step 0 over all processes are
            logged as `<key>_total`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        world: World,
        train_data: SizedData,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        validate: Callable[["Engine"], dict[str, float]] | None = None,
        param_groups: Sequence[ParamGroup] | None = None,
        prepare: Callable[["Engine", dict[str, Any]], dict[str, Any]] | None = None,
        cast_keys: Sequence[str] = ("images", "images_clip", "image_embeddings"),
        names_key: str = "image_paths",
        count_keys: Sequence[str] = ("dropped",),
    ) -> None:
        self.config, self.world, self.train_data, self.collate = config, world, train_data, collate
        self.validate = None if config.no_eval else validate
        self.prepare, self.cast_keys, self.names_key = prepare, frozenset(cast_keys), names_key
        self.count_keys = tuple(count_keys)
        accumulation = config.accumulation(world.size)
        lengths = known_lengths(train_data, config.group_by_length)
        batch = config.batch_size, accumulation, world.size
        self.plan = BatchPlan(len(train_data), config.seed, *batch, lengths)
        self.steps_per_epoch = config.steps_per_epoch or math.ceil(len(train_data) / self.plan.global_batch)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.step = min(config.start_epoch * self.steps_per_epoch, self.total_steps)
        self.groups = list(param_groups or parameter_groups(model, config.multipliers(), config.weight_decay))
        self.frozen_print = fingerprint(model)
        self.run_dir = RunDir(config.run_dir, world.is_main, config.tensorboard)
        self.store = CheckpointStore(self.run_dir.checkpoints, world, config.keep_last)
        self.best_score: float | None = None
        self.best_step: int | None = None
        self.figures: dict[str, float] = {}
        self._saved_step: int | None = None
        self._owed = False
        self._stop = threading.Event()
        self._meter: dict[str, float] = {}
        self.ds = self._initialize(model)

    def facts(self) -> dict[str, Any]:
        """What this run is, for the log and the preflight: batch, steps, parameters, groups."""
        counts = [sum(math.prod(_shape(p)) for p in group.params) for group in self.groups]
        return {
            "processes": self.world.size,
            "device": str(self.world.device),
            "training_items": self.plan.length,
            "effective_batch": self.plan.global_batch,
            "batch": f"{self.plan.micro_batch} x {self.plan.accumulation} micro-batches x {self.world.size}",
            "steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "trainable_parameters": sum(counts),
            "groups": {
                g.name: {"parameters": n, "lr": self.config.lr * g.lr_mult}
                for g, n in zip(self.groups, counts)
            },
        }

    def run(self) -> TrainResult:
        """Train to the end, from a checkpoint if there is one; SIGTERM, SIGINT and SIGUSR1 save and stop.

        Raises:
            NonFiniteLoss: in every process, if the loss is not finite in any of them; nothing is saved then.
            ValueError: the checkpoint to resume from does not fit this run.
        """
        checkpoint = self._find_checkpoint()
        if checkpoint is None:
            _seed_everything(self.config.seed + 7919 * self.world.rank)
        else:
            self._load(checkpoint)
        if not self.config.eval_only:
            if checkpoint is None or checkpoint.parent.resolve() != self.store.folder.resolve():
                self.store.begin()
            else:
                self.store.continue_from(read_state(checkpoint))
        self.run_dir.start(self.config, self.facts(), None if self.config.eval_only else self.step)
        for name, value in self.facts().items():
            logger.info("%s: %s", name, value)
        try:
            if self.config.eval_only:
                self._validate()
                return self._result(False)
            with _catch_signals(self._stop):
                return self._result(self._train())
        finally:
            self.run_dir.close()

    def infer(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The model's outputs for a collated batch: moved to the device, prepared, in the mode it is in."""
        batch = self._to_device(batch)
        return self.ds(**(batch if self.prepare is None else self.prepare(self, batch)))

    def _train(self) -> bool:
        """The loop; True if it was asked to stop early."""
        config = self.config
        rng = capture_rng()
        loader = iter(
            make_loader(
                self.train_data,
                self.collate,
                self.plan,
                rank=self.world.rank,
                first_step=self.step,
                last_step=self.total_steps,
                workers=config.workers,
                prefetch=config.prefetch_factor,
                pin_memory=self.world.device.type == "cuda",
            )
        )
        restore_rng(rng)
        progress = Progress(self.total_steps, self.step, config.progress and self.world.is_main)
        self.ds.train()
        stop = False
        if self._owed and self._validate():
            self.store.mark_best(self.step)
        try:
            while self.step < self.total_steps and not stop:
                stop = self._one_step(loader)
                self.step += 1
                progress.advance(self.step, self.plan.global_batch)
                if self.step % config.print_freq == 0 or self.step == self.total_steps:
                    self._log(progress)
                with progress.pause():
                    self._checkpoint(stop)
        finally:
            progress.close()
        return stop

    def _one_step(self, loader: Any) -> bool:
        """One optimiser step; True if any process was asked to stop."""
        lr = self._set_lr()
        stop = False
        names: list[str] = []
        for _ in range(self.plan.accumulation):
            batch = next(loader)
            names += [str(name) for name in batch.get(self.names_key, [])]
            outputs = self.infer(batch)
            scalars = {key: value for key, value in outputs.items() if _is_scalar(value)}
            values = dict(zip(scalars, torch.stack([v.detach().float() for v in scalars.values()]).tolist()))
            bad, stop = self.world.any([not math.isfinite(values["loss"]), self._stop.is_set()])
            if bad:
                self._fail("loss", values, names)
            self._collect(values, self.plan.micro_batch)
            for name in self.count_keys:
                total = self._meter.get(f"all.{name}", 0.0)
                self._meter[f"all.{name}"] = total + float(batch.get(name, 0))
            self.ds.backward(outputs["loss"])
            last = self.ds.is_gradient_accumulation_boundary()
            norm = self._clip() if last else None
            self.ds.step()
        norm = self.ds.get_global_grad_norm() if norm is None else norm
        if norm is not None:
            norm = float(norm)
            if not math.isfinite(norm) and self.config.precision != "fp16":
                self._fail("gradient norm", {**values, "grad_norm": norm}, names)
            self._meter["grad_norm"] = norm
        self._meter["lr"] = lr
        return stop

    def _clip(self) -> float | None:
        """Clip gradients where DeepSpeed leaves it to us (fp32 without ZeRO); the norm before clipping."""
        if self.config.zero_stage or self.config.precision != "fp32":
            return None
        params = [p for group in self.groups for p in group.params if p.grad is not None]
        return float(nn.utils.clip_grad_norm_(params, self.config.grad_clip or math.inf))

    def _set_lr(self) -> float:
        """Set the learning rate in force at this step; optimiser steps that fp16 skipped do not count."""
        config = self.config
        factor = lr_factor(
            self.step - self.ds.skipped_steps,
            kind=config.lr_schedule,
            total_steps=self.total_steps,
            warmup_steps=config.warmup(self.total_steps),
            min_ratio=config.min_lr_ratio,
        )
        for target, group in zip(self.ds.optimizer.param_groups, self.groups, strict=True):
            target["lr"] = config.lr * group.lr_mult * factor
        return config.lr * factor

    def _collect(self, values: dict[str, float], weight: int) -> None:
        self._meter["weight"] = self._meter.get("weight", 0.0) + weight
        for name, value in values.items():
            self._meter[f"sum.{name}"] = self._meter.get(f"sum.{name}", 0.0) + value * weight

    def _log(self, progress: Progress) -> None:
        """Means since the last line over all processes, weighted by images."""
        names = sorted(name for name in self._meter if name.startswith(("sum.", "all.")))
        sums = self.world.sum([self._meter["weight"], *(self._meter[name] for name in names)])
        found = dict(zip(names, sums[1:]))
        figures = {name[4:]: value / sums[0] for name, value in found.items() if name.startswith("sum.")}
        figures |= {f"{n[4:]}_total": value for n, value in found.items() if n.startswith("all.") and value}
        figures |= {name: self._meter[name] for name in ("lr", "grad_norm") if name in self._meter}
        self._meter = {name: value for name, value in self._meter.items() if name.startswith("all.")}
        figures |= {"images_per_second": progress.throughput(), "memory_gib": memory_gib(self.world.device)}
        figures["epoch"] = self.step / self.steps_per_epoch
        self.run_dir.record(self.step, "train", figures)
        if not self.world.is_main:
            return
        text = f"loss {figures['loss']:.4f} lr {figures['lr']:.2e} {figures['images_per_second']:.1f} img/s"
        progress.describe(text)
        level = logging.DEBUG if progress.shown else logging.INFO
        left = clock(progress.seconds_left())
        logger.log(level, "step %d/%d %s, %s left", self.step, self.total_steps, text, left)

    def _checkpoint(self, stop: bool) -> None:
        """Validate and save where they are due; a better score always saves."""
        config, last = self.config, self.step == self.total_steps
        epoch_end = self.step % self.steps_per_epoch == 0
        every = config.eval_every_steps
        due = last or (self.step % every == 0 if every else epoch_end)
        self._owed = due and stop  # there may be little time left: the resumed run validates
        better = self._validate() if due and not stop else False
        every = config.save_every_steps
        if stop or better or last or (self.step % every == 0 if every else epoch_end):
            self.save(better)

    def _validate(self) -> bool:
        """Run validation without touching the training's generators; True if the score is the best so far."""
        if self.validate is None:
            return False
        self.ds.eval()
        with torch.no_grad(), seeded(self.config.seed):
            figures = {name: float(value) for name, value in self.validate(self).items()}
        self.ds.train()
        self.figures = figures
        self.run_dir.record(self.step, "val", figures)
        if self.config.best_metric not in figures:
            found = ", ".join(figures) or "nothing"
            raise ValueError(
                f"--best_metric {self.config.best_metric} is not what validation returns ({found})"
            )
        score = figures[self.config.best_metric]
        sign = -1 if "loss" in self.config.best_metric else 1
        better = self.best_score is None or sign * score > sign * self.best_score
        if better and not self.config.eval_only:
            self.best_score, self.best_step = score, self.step
        text = ", ".join(
            f"{name} {value:.{0 if value.is_integer() else 4}f}" for name, value in figures.items()
        )
        logger.info("validation at step %d: %s%s", self.step, text, " (best so far)" if better else "")
        return better

    def save(self, best: bool = False) -> None:
        """Write the checkpoint of this step (at most once); called in every process."""
        if self._saved_step == self.step and not best:
            return
        state = {
            "format": 1,
            "step": self.step,
            "total_steps": self.total_steps,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "figures": self.figures,
            "owed_validation": self._owed,
            "frozen": self.frozen_print,
            **self._identity(),
        }
        path = self.store.save(self.step, self._write, state, {"meter": self._meter}, best)
        self._saved_step = self.step
        logger.info("saved %s%s", path, " (best)" if best else "")

    def _write(self, folder: Path) -> None:
        self.ds.save_checkpoint(str(folder), tag=f"global_step{self.step}", exclude_frozen_parameters=True)
        tensors = trainable_tensors(self.ds.module, keep=self.world.is_main)
        if self.world.is_main:
            save_file(tensors, folder / WEIGHTS_FILE, metadata={"step": str(self.step)})
        buffers = {
            name: value.detach().cpu().clone() for name, value in trained_buffers(self.ds.module).items()
        }
        if buffers and self.world.size > 1:  # each process has its own running figures
            save_file(buffers, folder / f"buffers-{self.world.rank:05d}.safetensors")

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be the same run."""
        return {
            "seed": self.config.seed,
            "training_items": self.plan.length,
            "global_batch": self.plan.global_batch,
            "world_size": self.world.size,
            "zero_stage": self.config.zero_stage,
            "precision": self.config.precision,
        }

    def _find_checkpoint(self) -> Path | None:
        if self.config.resume:
            return resolve_checkpoint(self.config.resume)
        return self.store.pointed("latest") if self.config.auto_resume else None

    def _load(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self._check_fits(checkpoint, state)
        tag = f"global_step{state['step']}"
        # not strict inside DeepSpeed because frozen weights are left out; _check_fits compared the names
        self.ds.load_checkpoint(
            str(checkpoint), tag=tag, load_module_strict=False, load_lr_scheduler_states=False
        )
        self.step = self._saved_step = state["step"]
        self.best_score, self.best_step = state["best_score"], state["best_step"]
        self.figures, self._owed = state["figures"], state["owed_validation"]
        own = read_rank_state(checkpoint, self.world.rank)
        if own is None:
            _seed_everything(self.config.seed + 7919 * self.world.rank + self.step)
        else:
            restore_rng(own["rng"])
            self._meter = own["meter"]
        buffers = checkpoint / f"buffers-{self.world.rank:05d}.safetensors"
        if buffers.is_file():
            stored, own_buffers = load_file(buffers), trained_buffers(self.ds.module)
            for name, value in own_buffers.items():
                value.copy_(stored[name])
        logger.info("resumed %s at step %d of %d", checkpoint, self.step, self.total_steps)

    def _check_fits(self, checkpoint: Path, state: dict[str, Any]) -> None:
        with safe_open(checkpoint / WEIGHTS_FILE, "pt") as file:
            stored = set(file.keys())
        own = set(trainable_names(self.ds.module))
        faults = [f"trained here but not stored: {name}" for name in sorted(own - stored)]
        faults += [f"stored but not trained here: {name}" for name in sorted(stored - own)]
        if state["frozen"] != self.frozen_print:
            faults.append("the frozen weights are not those the checkpoint was trained on (another base?)")
        must = ["zero_stage", "precision"] + (["world_size"] if self.config.zero_stage else [])
        for name, value in self._identity().items():
            if state[name] != value and name in must:
                faults.append(f"{name} was {state[name]}, is {value}")
            elif state[name] != value:
                logger.warning(
                    "resuming with another %s (%s, was %s): not the same run", name, value, state[name]
                )
        if faults:
            shown = "\n  ".join(faults[:20])
            raise ValueError(
                f"cannot resume {checkpoint}:\n  {shown}\nuse the same settings, or --no_auto_resume"
            )

    def _fail(self, what: str, values: dict[str, float], names: list[str]) -> None:
        """Stop every process with the file names of the step in all of them."""
        everyone = self.world.gather({"figures": {k: str(v) for k, v in values.items()}, "files": names})
        report = {"step": self.step, "what": what, "processes": everyone}
        if self.world.is_main:
            atomic_write_json(self.run_dir.path / f"non-finite-step-{self.step}.json", report)
        culprits = [one for one in everyone if not math.isfinite(float(one["figures"]["loss"]))] or everyone
        files = [name for one in culprits for name in one["files"]]
        raise NonFiniteLoss(
            f"{what} is not finite at step {self.step}: {culprits[0]['figures']}; files: {', '.join(files)}. "
            "Nothing was saved; lower --lr or look at these files, then start again from the last checkpoint"
        )

    def _to_device(self, value: Any, key: str = "") -> Any:
        if isinstance(value, torch.Tensor):
            dtype = (
                DTYPES[self.config.precision] if key in self.cast_keys and value.is_floating_point() else None
            )
            return value.to(self.world.device, dtype, non_blocking=True)
        if isinstance(value, dict):
            return {name: self._to_device(item, key or name) for name, item in value.items()}
        if isinstance(value, list | tuple) and value and isinstance(value[0], torch.Tensor):
            return type(value)(self._to_device(item, key) for item in value)
        return value

    def _initialize(self, model: nn.Module) -> Any:
        deepspeed = import_deepspeed()
        config = self.config
        if config.precision == "fp16" and not deepspeed.get_accelerator().is_fp16_supported():
            raise ValueError("--precision fp16: this device cannot compute in fp16; use bf16 or fp32")
        groups = [{"params": g.params, "weight_decay": g.weight_decay} for g in self.groups]
        betas = (config.beta1, config.beta2)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps)
        engine, *_ = deepspeed.initialize(
            model=model.to(self.world.device),
            optimizer=optimizer,
            model_parameters=[p for group in self.groups for p in group.params],
            config=deepspeed_config(config, self.plan.accumulation),
        )
        return engine

    def _result(self, interrupted: bool) -> TrainResult:
        path = self.run_dir.path
        return TrainResult(self.step, path, interrupted, self.best_score, self.best_step, self.figures)


class _catch_signals:
    """Turns the first SIGTERM, SIGINT or SIGUSR1 into a request to save and stop; a second acts as usual."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.former: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                self.former[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _: object) -> None:
        self.stop.set()
        signal.signal(number, self.former[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _seed_everything(seed: int) -> None:
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
