"""Putting a `Lisat` together: built without memory, filled tensor by tensor, nothing by accident.

The model is constructed with its parameters on the meta device (buffers that are computed, such as rotary
frequencies and SAM's pixel statistics, are real from the start), every tensor of every source is planned
before anything is read, and each one is then copied once, in its final dtype: memory is the model plus one
tensor.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.key_maps import KeyMap, KeyReport, Shape, Target, plan

logger = logging.getLogger(__name__)

KEEP_FLOAT32 = ("positional_encoding_gaussian_matrix",)
"""Ends of tensor names that stay fp32 in a low-precision model: their products reach tens of radians."""


class TensorFiles(Protocol):
    """What a source of tensors can do; `WeightFiles` and `StateTensors` do."""

    def shapes(self) -> Mapping[str, Shape]:
        """Name -> shape."""

    def tensors(self, names: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one at a time."""

    def metadata(self) -> Mapping[str, str]:
        """Free texts stored with the tensors."""


class StateTensors:
    """A dictionary of tensors in memory as a source."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = state

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}

    def tensors(self, names: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one at a time."""
        return ((name, tensor) for name, tensor in self.state.items() if names is None or name in names)

    def metadata(self) -> dict[str, str]:
        """Nothing."""
        return {}


@dataclass
class Source:
    """Tensors, where their names go, and what to call the source in messages."""

    files: TensorFiles
    key_map: KeyMap
    label: str

    def shapes(self) -> dict[str, Shape]:
        """Our names -> shapes of what this source would place (to read sizes; `plan` finds the faults)."""
        found = ((self.key_map(name), shape) for name, shape in self.files.shapes().items())
        return {fate.name: shape for fate, shape in found if isinstance(fate, Target)}


def build_on_meta(config: Any) -> nn.Module:
    """A `Lisat` of this configuration whose parameters have shapes and no memory; buffers are real (CPU)."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    from model.lisat import Lisat

    with no_init_weights(), init_empty_weights(include_buffers=False):
        return Lisat(config)


def model_shapes(model: nn.Module) -> dict[str, Shape]:
    """Name -> shape of what a checkpoint must hold: the state dict without a tied output matrix."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.llm.config.tie_word_embeddings:
        shapes.pop("llm.lm_head.weight", None)
    return shapes


def plan_sources(
    expected: Mapping[str, Shape], sources: Sequence[Source], fresh: tuple[str, ...] = ()
) -> tuple[list[KeyReport], list[str]]:
    """Plan all sources, the first that has a tensor wins.

    Args:
        expected: model name -> shape.
        sources: in order of priority.
        fresh: prefixes of names that may be in no source (they are initialised).

    Returns:
        One report per source, and the names to initialise.

    Raises:
        ValueError: the complete list of missing, unexpected and mis-shaped tensors of all sources.
    """
    taken: dict[str, str] = {}
    reports = []
    for source in sources:
        report = plan(source.files.shapes(), expected, source.key_map, taken)
        taken |= dict.fromkeys(report.placed.values(), source.label)
        reports.append(report)
        logger.info("%s: %s", source.label, report.summary())
    misshaped = {target for s, r in zip(sources, reports) for target in _targets(s, set(r.misshaped))}
    absent = [name for name in expected if name not in taken]
    total = KeyReport(
        missing=[name for name in absent if not name.startswith(fresh) and name not in misshaped],
        unexpected=[f"{s.label}: {name}" for s, r in zip(sources, reports) for name in r.unexpected],
        misshaped={
            f"{s.label}: {name}": text for s, r in zip(sources, reports) for name, text in r.misshaped.items()
        },
    )
    total.raise_if_faulty(" + ".join(source.label for source in sources))
    return reports, [name for name in absent if name.startswith(fresh)]


def assemble(
    config: Any,
    sources: Sequence[Source],
    dtype: torch.dtype | None = None,
    fresh: tuple[str, ...] = (),
    seed: int = 0,
) -> nn.Module:
    """Build and fill a `Lisat` on the CPU, in evaluation mode.

    Args:
        config: LisatConfig.
        sources: in order of priority.
        dtype: of all floating tensors (`KEEP_FLOAT32` excepted); None keeps what is stored.
        fresh: prefixes of linear layers that may be absent; they get PyTorch's default initialisation.
        seed: of that initialisation.

    Raises:
        ValueError: the sources do not fit the configuration (complete list).
    """
    model = build_on_meta(config)
    reports, absent = plan_sources(model_shapes(model), sources, fresh)
    for source, report in zip(sources, reports):
        for name, tensor in source.files.tensors(set(report.placed)):
            set_tensor(model, report.placed[name], tensor, dtype)
    _initialise(model, absent, dtype or torch.float32, seed)
    if dtype is not None and config.sam is not None and config.sam.low_precision_pe:
        model.sam.prompt_encoder.pe_layer.to(dtype)
    if model.llm.config.tie_word_embeddings:
        model.llm.tie_weights()
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, f"tensors without content: {left}"
    return model.eval()


def set_tensor(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Give parameter or buffer `name` its own copy of `tensor` in `dtype` (None: as it is)."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    value = torch.empty(tensor.shape, dtype=stored_dtype(name, tensor.dtype, dtype)).copy_(tensor)
    if leaf in module._parameters:
        trained = module._parameters[leaf].requires_grad
        module._parameters[leaf] = nn.Parameter(value, requires_grad=trained and value.is_floating_point())
    else:
        module._buffers[leaf] = value


def stored_dtype(name: str, current: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of tensor `name` when the model is wanted in `wanted` (None: unchanged)."""
    if wanted is None or not current.is_floating_point:
        return current
    return torch.float32 if name.endswith(KEEP_FLOAT32) else wanted


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all floating weights in place, one at a time; `KEEP_FLOAT32` goes to fp32."""
    for name, tensor in model.state_dict().items():
        if tensor.dtype != stored_dtype(name, tensor.dtype, dtype):
            set_tensor(model, name, tensor, dtype)


def _targets(source: Source, file_names: set[str]) -> set[str]:
    fates = (source.key_map(name) for name in file_names)
    return {fate.name for fate in fates if isinstance(fate, Target)}


def _initialise(model: nn.Module, names: list[str], dtype: torch.dtype, seed: int) -> None:
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for owner in owners:
            module = model.get_submodule(owner)
            if not isinstance(module, nn.Linear):
                raise ValueError(
                    f"{owner}: only linear layers can start fresh, this is {type(module).__name__}"
                )
            fresh = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            for leaf, tensor in fresh.named_parameters():
                set_tensor(model, f"{owner}.{leaf}", tensor.detach(), dtype)
