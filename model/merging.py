"""Training states as files, and folding what is not a plain weight: LoRA (W + alpha / r * B A), new rows."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from model.assembly import Source
from model.key_maps import Ignored, Target, map_training_key
from model.weight_files import WeightFiles, has_weights
from utils.hub import resolve
from utils.io import StrPath

logger = logging.getLogger(__name__)

TRAINED_FILE = "trainable.safetensors"
NEW_ROWS = ".new_rows"


@dataclass
class TrainingState:
    """What a training run wrote."""

    plain: Source
    """tensors that replace those of the base"""
    lora: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """module name -> {"A": (r, in), "B": (out, r)}"""
    new_rows: dict[str, Tensor] = field(default_factory=dict)
    """module name -> its last vocabulary rows (K, H), where only those were trained"""

    @property
    def folds(self) -> bool:
        """Whether anything is left to fold in after the plain tensors are placed."""
        return bool(self.lora or self.new_rows)


def find_training_state(path: StrPath) -> Path:
    """The weights that a path means: a file, a step folder, a run folder (its best, else latest step).

    A folder without `trainable.safetensors` is taken as a consolidated state (`pytorch_model.bin` or shards).
    """
    path = resolve(str(path), what="training state")
    if path.is_file() and path.name in ("best", "latest"):
        path = path.parent / path.read_text(encoding="utf-8").strip()
    for folder in (path, path / "checkpoints"):
        for pointer in (folder / "best", folder / "latest"):
            if pointer.is_file():
                named = folder / pointer.read_text(encoding="utf-8").strip() / TRAINED_FILE
                if named.is_file():
                    return named
    if (path / TRAINED_FILE).is_file():
        return path / TRAINED_FILE
    return path


def open_training_state(
    path: StrPath, lora_r: int | None = None, lora_targets: str | None = None
) -> TrainingState:
    """A training state as a source of plain tensors, with LoRA matrices and new vocabulary rows beside it.

    Args:
        path: see `find_training_state`.
        lora_r: expected rank; None accepts any.
        lora_targets: comma-separated parts of module names that may carry LoRA; None accepts all.

    Raises:
        ValueError: no weights there, half a pair, another rank, or an unexpected module.
    """
    found = find_training_state(path)
    if not has_weights(found):
        hint = f"; run `python zero_to_fp32.py . consolidated` in {found} first"
        hint = hint if (found / "zero_to_fp32.py").is_file() else ""
        raise ValueError(f"{found}: neither {TRAINED_FILE} nor a consolidated state is here{hint}")
    files = WeightFiles(found, unwrap=("module", "state_dict"))
    names = {}
    for name in files.shapes():
        fate = map_training_key(name)
        if isinstance(fate, Target) and (".lora_" in fate.name or fate.name.endswith(NEW_ROWS)):
            names[name] = fate.name

    def plain(name: str) -> Target | Ignored | None:
        return Ignored("folded in afterwards") if name in names else map_training_key(name)

    state = TrainingState(Source(files, plain, str(found)))
    lora = state.lora
    for name, tensor in files.tensors(set(names)):
        if names[name].endswith(NEW_ROWS):
            state.new_rows[names[name].removesuffix(NEW_ROWS)] = tensor
            continue
        module, _, side = names[name].removesuffix(".weight").rpartition(".lora_")
        lora.setdefault(module, {})[side] = tensor
    faults = [f"{module}: only lora_{next(iter(pair))}" for module, pair in lora.items() if len(pair) < 2]
    ranks = {pair["A"].shape[0] for pair in lora.values() if "A" in pair}
    if lora_r is not None and ranks and ranks != {lora_r}:
        faults.append(f"rank {sorted(ranks)} in the state, --lora_r says {lora_r}")
    wanted = [part.strip() for part in (lora_targets or "").split(",") if part.strip()]
    if wanted:
        others = [module for module in lora if not any(part in module for part in wanted)]
        faults += [f"{module}: not in lora_target_modules {lora_targets}" for module in others]
    if faults:
        raise ValueError(f"{found}: LoRA tensors do not fit: {'; '.join(faults)}")
    logger.info("%s: %d LoRA pairs, %d matrices with new rows", found, len(lora), len(state.new_rows))
    return state


def fold_new_rows(model: nn.Module, new_rows: dict[str, Tensor]) -> None:
    """Write (K, H) rows over the last K rows of each module's weight; ValueError where they do not fit."""
    modules = dict(model.named_modules())
    for name, rows in new_rows.items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape[1] != rows.shape[1] or weight.shape[0] < rows.shape[0]:
            found = "nothing" if weight is None else list(weight.shape)
            raise ValueError(f"{name}: new rows {list(rows.shape)} do not fit the base ({found})")
        with torch.no_grad():
            weight[-rows.shape[0] :].copy_(rows)


def fold_lora(model: nn.Module, lora: dict[str, dict[str, Tensor]], alpha: float) -> None:
    """Add `alpha / r * B A` to the weight of each module, computed in fp32, in place.

    Raises:
        ValueError: a module is not in the model, or shapes do not fit (complete list).
    """
    modules = dict(model.named_modules())
    faults = []
    for name, pair in lora.items():
        weight = getattr(modules.get(name), "weight", None)
        fitting = (pair["B"].shape[0], pair["A"].shape[1])
        if weight is None:
            faults.append(f"{name}: not in the model")
        elif tuple(weight.shape) != fitting or pair["B"].shape[1] != pair["A"].shape[0]:
            faults.append(f"{name}: weight {list(weight.shape)}, B A gives {list(fitting)}")
    if faults:
        raise ValueError("LoRA matrices do not fit the base:\n  " + "\n  ".join(faults))
    with torch.no_grad():
        for name, pair in lora.items():
            weight = modules[name].weight
            delta = pair["B"].float() @ pair["A"].float()
            weight.copy_(weight.float() + delta * (alpha / pair["A"].shape[0]))
