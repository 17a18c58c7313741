"""Checkpoints that survive a kill at any moment, and everything a resumed run needs to be the same run.

`<run>/checkpoints/step-N/` holds DeepSpeed's folder (`global_stepN/`, `latest`, `zero_to_fp32.py`; frozen
weights left out), `trainable.safetensors` (fp32, what merging reads), `rank-*.json` and `state.json`. It
is written under another name, flushed and renamed; the text files `latest` and `best` beside it name a step
folder and move only afterwards; older folders go last.
"""

import base64
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.distributed import World
from utils.io import atomic_write_text, fsync_path, read_json

logger = logging.getLogger(__name__)
WEIGHTS_FILE = "trainable.safetensors"
STATE_FILE = "state.json"


class CheckpointStore:
    """The checkpoints of one run in `folder`; every process calls every method."""

    def __init__(self, folder: Path, world: World, keep_last: int) -> None:
        self.folder = folder
        self.world = world
        self.keep_last = keep_last

    def save(
        self, step: int, write: Callable[[Path], None], state: dict[str, Any], own: dict[str, Any], best: bool
    ) -> Path:
        """Write `step-<step>` and move the pointers.

        Args:
            step: optimiser steps done.
            write: called in every process with the folder to write into.
        own: JSON values of this process, stored beside its generators' states.
            state: JSON values, stored as `state.json`.
            best: also point `best` at it.
        """
        final = self.folder / f"step-{step}"
        partial = self.folder / f".step-{step}.partial"
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        write(partial)
        _dump(partial / f"rank-{self.world.rank:05d}.json", {**own, "rng": capture_rng()})
        if self.world.is_main:
            _dump(partial / STATE_FILE, state)
        self.world.barrier()
        if self.world.local_rank == 0:
            sync_tree(partial)
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(
                final, ignore_errors=True
            )  # never the one `latest` names: that step is not saved again
            os.rename(partial, final)
            fsync_path(self.folder)
            atomic_write_text(self.folder / "latest", final.name + "\n")
            if best:
                self.mark_best(step)
            self._prune(step)
        self.world.barrier()
        return final

    def mark_best(self, step: int) -> None:
        """Point `best` at a step that stands already."""
        if self.world.is_main:
            atomic_write_text(self.folder / "best", f"step-{step}\n")

    def pointed(self, pointer: str) -> Path | None:
        """The folder that `latest` or `best` names; None if there is no such pointer."""
        file = self.folder / pointer
        return resolve_checkpoint(file) if file.is_file() else None

    def continue_from(self, state: dict[str, Any]) -> None:
        """Put both pointers to what a resumed state says, and remove what a killed save left."""
        if self.world.is_main:
            for rest in self.folder.glob(".step-*.partial"):
                shutil.rmtree(rest, ignore_errors=True)
            atomic_write_text(self.folder / "latest", f"step-{state['step']}\n")
            best_step = state["best_step"]
            if best_step is not None and (self.folder / f"step-{best_step}").is_dir():
                self.mark_best(best_step)
        self.world.barrier()

    def begin(self) -> None:
        """Start a new run here: checkpoints of an earlier one are moved aside, never mixed or deleted."""
        if self.world.is_main and self.folder.is_dir() and any(_step_folders(self.folder)):
            number = next(n for n in range(1, 10**6) if not self._aside(n).exists())
            os.rename(self.folder, self._aside(number))
            logger.warning("%s held an earlier run; it is %s now", self.folder, self._aside(number))
        elif self.world.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.world.barrier()

    def _aside(self, number: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{number}")

    def _prune(self, step: int) -> None:
        """Remove all but the newest `keep_last` folders up to `step` and the pointed ones."""
        steps = sorted((path for path in _step_folders(self.folder) if _step_of(path) <= step), key=_step_of)
        kept = {path for path in (self.pointed("latest"), self.pointed("best")) if path is not None}
        kept.update(steps[-self.keep_last :])
        for path in steps:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def resolve_checkpoint(path: str | Path) -> Path:
    """The step folder `path` means: itself, a `latest`/`best` file's, or the latest of a run folder.

    Raises:
        ValueError: nothing of the kind is there.
    """
    path = Path(path)
    if (path / STATE_FILE).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if (folder / "latest").is_file():
            path = folder / "latest"
            break
    if path.name in ("latest", "best") and path.is_file():
        named = path.parent / path.read_text(encoding="utf-8").strip()
        if (named / STATE_FILE).is_file():
            return named
        raise ValueError(f"{path} names {named.name}, which is not there or incomplete")
    raise ValueError(
        f"{path}: no checkpoint (expected a step-N folder, or a run directory with checkpoints/latest)"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a step folder."""
    return read_json(checkpoint / STATE_FILE, dict)


def capture_rng() -> dict[str, Any]:
    """States of Python's, numpy's, torch's CPU and this process's GPU generator, as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": _to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put the generators back to what `capture_rng` saw."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_from_text(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def read_rank_state(checkpoint: Path, rank: int) -> dict[str, Any] | None:
    """What process `rank` stored (`rng` and its own values); None if that process did not exist then."""
    file = checkpoint / f"rank-{rank:05d}.json"
    return read_json(file, dict) if file.is_file() else None


def fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes and a sample of the values of all frozen parameters (hexadecimal).

    A checkpoint holds only what is trained; this tells whether it is put on the same base again.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            continue
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // 512)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the trained tensors: parameters that need gradients, and running buffers beside them."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return names + list(trained_buffers(model))


def trainable_tensors(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Trained tensors in fp32 on the CPU by name: under ZeRO the full fp32 master weights.

    All processes must call it; those with `keep` False get an empty dict and hold one tensor at a time.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            full = safe_get_full_fp32_param(parameter) if hasattr(parameter, "_hp_mapping") else None
            if full is None and hasattr(parameter, "ds_id"):
                full = safe_get_full_fp32_param(parameter)
            full = parameter.detach() if full is None else full
            if not keep:
                continue
            tensors[name] = full.detach().to("cpu", torch.float32).reshape(_full_shape(parameter)).clone()
    for name, buffer in trained_buffers(model).items():
        tensors[name] = buffer.detach().cpu().clone()
    return tensors


def trained_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Persistent buffers of modules that own trained parameters, by name (running means and the like)."""
    found = {}
    for prefix, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def sync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders, to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(root) / name)
        fsync_path(root)


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _step_folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _to_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _from_text(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
