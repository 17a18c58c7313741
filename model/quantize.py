"""Language model weights in 8 or 4 bits: inference in less memory; what draws masks stays as it is.

Only the matrices of the Llama blocks (attention and MLP) change. Vision tower, projector, embeddings, output
matrix, `text_hidden_fcs` and SAM keep their numbers, and activations keep the model's number format
(`int8` is not LLM.int8(), which rounds activations as well). Rounding is done by the bitsandbytes package:

* `int8`: symmetric, one scale per output row;
* `int4`: NF4 (QLoRA, arXiv 2305.14314, section 3) in blocks of 64 weights, or 32 where rows demand it.
"""

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FORMS = ("int8", "int4")
PACKAGE, VERSION = "bitsandbytes", "0.50.2"
_BLOCKS = (64, 32)
_DEVICES, _DTYPES = ("cpu", "cuda"), (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Quantized:
    """What `quantize_llm` did: the form, how many matrices, and their bytes before and after."""

    form: str
    matrices: int
    bytes_before: int
    bytes_after: int


class Int8Linear(nn.Module):
    """y = x W^T + b with W stored as int8 rows and one fp32 scale per row; computes in the dtype of x.

    `weight` int8 (out, in), `scale` fp32 (out,): W = weight * scale / 127.
    """

    def __init__(self, linear: nn.Linear) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant

        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale, _ = int8_vectorwise_quant(linear.weight.detach().float())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        from bitsandbytes.functional import int8_vectorwise_dequant

        weight = int8_vectorwise_dequant(self.weight, self.scale).to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize_llm(model: nn.Module, form: str, device: str | torch.device = "cpu") -> Quantized:
    """Round the weights of the language model's blocks in place, one matrix at a time.

    Args:
        model: a `Lisat` on the CPU, without adapters, in the number format of its activations.
        form: `int8` or `int4`.
        device: where the model will run (`int4` weights are rounded there). Move the model there afterwards.

    Raises:
        ValueError: unknown form, package absent, or a device, number format or matrix that cannot be done
            (complete list).
    """
    found = list(_matrices(model))
    faults = unsupported(model, form, device)
    if faults:
        raise ValueError(f"{form} weights are not possible here: " + "; ".join(faults))
    device = torch.device(device)
    block = _block([linear for *_, linear in found])
    before = after = 0
    for owner, name, linear in found:
        before += _size(linear)
        new = Int8Linear(linear) if form == "int8" else _nf4(linear, block, device)
        setattr(owner, name, new.eval())
        after += _size(new)
    done = Quantized(form, len(found), before, after)
    logger.info(
        "language model in %s: %d matrices, %.1f -> %.1f MiB", form, len(found), before / 2**20, after / 2**20
    )
    return done


def unsupported(model: nn.Module, form: str, device: str | torch.device = "cpu") -> list[str]:
    """Why the model's blocks cannot be rounded to `form` for `device`, one sentence per reason."""
    if form not in FORMS:
        return [f"the form {form!r} is unknown, choose one of {', '.join(FORMS)}"]
    faults = []
    if importlib.util.find_spec(PACKAGE) is None:
        faults.append(f"the package {PACKAGE} is not installed (pip install {PACKAGE}=={VERSION})")
    device = torch.device(device)
    if device.type not in _DEVICES:
        faults.append(f"device {device} is none of {', '.join(_DEVICES)}")
    if model.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        faults.append(f"the model computes in {model.dtype}, which is none of {names}")
    found = list(_matrices(model))
    names = {id(module): name for name, module in model.named_modules()}
    wrong = [names[id(linear)] for *_, linear in found if type(linear) is not nn.Linear]
    if wrong:
        what = type(model.get_submodule(wrong[0])).__name__
        faults.append(
            f"{len(wrong)} matrices are no plain linear layers (the first, {wrong[0]}, is {what}): merge "
            "LoRA first, and round a model only once"
        )
    elif form == "int4" and not _block([linear for *_, linear in found]):
        odd = [f"{names[id(m)]} ({m.in_features})" for *_, m in found if m.in_features % _BLOCKS[-1]]
        faults.append(
            f"rows of {len(odd)} matrices cannot be cut into blocks of {_BLOCKS[-1]} weights: {odd[0]}, ...; "
            "use int8"
        )
    return faults


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(owner, attribute, layer) of every linear layer in the language model's blocks, adapters included."""
    for block in model.llm.model.layers:
        for owner in block.modules():
            for name, child in owner.named_children():
                if name.endswith("_proj"):
                    yield owner, name, child


def _block(layers: list[Any]) -> int:
    """The largest block that divides the rows of all layers; 0 if none does."""
    return next((b for b in _BLOCKS if all(layer.in_features % b == 0 for layer in layers)), 0)


def _nf4(linear: nn.Linear, block: int, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings = {"quant_type": "nf4", "compress_statistics": False}
    new = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        device="meta",
        **settings,
    )
    weight = linear.weight.detach().contiguous()
    new.weight = Params4bit(weight, requires_grad=False, blocksize=block, **settings)
    new.bias = linear.bias
    return new.to(device)  # rounds


def _size(module: nn.Module) -> int:
    """Bytes of a layer's tensors, the statistics of rounded ones included."""
    total = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return total + (state.absmax.numel() * state.absmax.element_size() if state is not None else 0)
