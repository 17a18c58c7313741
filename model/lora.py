"""What trains: LoRA in the language model, the freezing rules, and training new vocabulary rows alone.

LoRA layers are peft's, injected in place, so every other name of `Lisat` stays as it is.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model._torchvision import ensure_torchvision

logger = logging.getLogger(__name__)

PUBLISHED_TRAINABLE = ("lm_head", "embed_tokens", "mask_decoder", "text_hidden_fcs")
"""Parameters with one of these in their name train in full, as published; LoRA trains besides."""
LORA_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.05,
    targets: Sequence[str] = LORA_TARGETS,
) -> nn.Module:
    """Put LoRA of rank `r` on the named projections of `model.llm`'s blocks; returns the model.

    The names are anchored in the language model: tower and mask decoder have projections of the same
    names and stay untouched. Call `mark_trainable` afterwards. ValueError for names no block has.
    """
    ensure_torchvision()
    from peft import LoraConfig, inject_adapter_in_model

    unknown = sorted(set(targets) - set(ALL_LINEAR))
    if unknown or not targets:
        raise ValueError(f"LoRA targets {list(targets)}: unknown {unknown}; known: {list(ALL_LINEAR)}")
    if has_lora(model):
        raise ValueError("the model has LoRA layers already; merge them first")
    pattern = rf"model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(targets)})"
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=pattern,
        bias="none",
    )
    inject_adapter_in_model(config, model.llm)
    return model.train(model.training)  # peft leaves its new layers in training mode


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def has_lora(model: nn.Module) -> bool:
    """Whether any LoRA layer is in the model."""
    return bool(_lora_layers(model))


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold LoRA (W + alpha / r B A, in the weights' dtype) and separate new rows into plain layers."""
    for name, layer in _lora_layers(model).items():
        layer.merge(safe_merge=True)
        _replace(model, name, layer.get_base_layer())
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NewRowsEmbedding | NewRowsLinear):
            _replace(model, name, layer.folded())
    if model.llm.config.tie_word_embeddings:
        model.llm.lm_head.weight = model.llm.model.embed_tokens.weight
    return model


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class NewRowsEmbedding(nn.Embedding):
    """An embedding whose rows before `first` are frozen and whose other rows live in `new_rows`."""

    def __init__(self, base: nn.Embedding, first: int) -> None:
        super().__init__(*base.weight.shape, device="meta")
        self.first, self.weight = first, base.weight
        self.new_rows = nn.Parameter(base.weight.detach()[first:].clone())

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., H) of ids (...)."""
        old = F.embedding(ids, self.weight)
        new = F.embedding((ids - self.first).clamp(min=0), self.new_rows)
        return torch.where((ids >= self.first)[..., None], new, old)

    def folded(self) -> nn.Embedding:
        """A plain embedding with the new rows in place."""
        plain = nn.Embedding(*self.weight.shape, device="meta")
        plain.weight = _fold(self)
        return plain


class NewRowsLinear(nn.Linear):
    """An output matrix whose rows before `first` are frozen and whose other rows live in `new_rows`."""

    def __init__(self, base: nn.Linear, first: int) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.first, self.weight = first, base.weight
        self.new_rows = nn.Parameter(base.weight.detach()[first:].clone())

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., V) of states (..., H)."""
        return torch.cat((F.linear(x, self.weight[: self.first]), F.linear(x, self.new_rows)), dim=-1)

    def folded(self) -> nn.Linear:
        """A plain layer with the new rows in place."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = _fold(self)
        return plain


def _fold(layer: NewRowsEmbedding | NewRowsLinear) -> nn.Parameter:
    with torch.no_grad():
        layer.weight[layer.first :] = layer.new_rows
    return layer.weight


def separate_new_rows(model: nn.Module, first: int | None = None) -> None:
    """Move vocabulary rows from `first` on (None: from `[SEG]` on) into parameters of their own.

    Afterwards `llm.model.embed_tokens.new_rows` and `llm.lm_head.new_rows` can train while the whole
    matrices stay frozen and cost no optimiser state. `merge_lora` folds them back.
    """
    if first is None:
        first = model.config.seg_token_id
    size = model.config.llm["vocab_size"]
    if not 0 < first < size:
        raise ValueError(f"new rows start at {first}, outside the vocabulary of {size}: is [SEG] added?")
    llm = model.llm
    if isinstance(llm.lm_head, NewRowsLinear):
        return
    llm.model.embed_tokens = NewRowsEmbedding(llm.model.embed_tokens, first)
    llm.lm_head = NewRowsLinear(llm.lm_head, first)
    if llm.config.tie_word_embeddings:
        llm.lm_head.new_rows = llm.model.embed_tokens.new_rows


def mark_trainable(
    model: nn.Module,
    new_rows_only: bool = False,
    first_new_row: int | None = None,
    also: Sequence[str] = (),
) -> list[str]:
    """Set `requires_grad` as published and return the names that train.

    LoRA, embeddings, output matrix, `text_hidden_fcs` and the mask decoder train; tower, projector,
    SAM's encoders and the language model's own weights do not (without LoRA layers the whole language
    model trains). `new_rows_only` trains the added vocabulary rows instead of both matrices.
    Parameters with a part of `also` in their name train too.
    """
    if new_rows_only:
        separate_new_rows(model, first_new_row)
    whole_llm = not has_lora(model)
    names = []
    for name, parameter in model.named_parameters():
        trains = any(part in name for part in (*PUBLISHED_TRAINABLE, *also)) or ".lora_" in name
        trains = trains or (whole_llm and name.startswith("llm."))
        if new_rows_only and name in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
            trains = False
        parameter.requires_grad_(trains)
        if trains:
            names.append(name)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%d of %d parameters train", total, sum(p.numel() for p in model.parameters()))
    return names


def mark_language_model(model: nn.Module, projector_only: bool, also: Sequence[str] = ()) -> list[str]:
    """Set `requires_grad` for training LISAT_PRE and return the names that train.

    The projector trains, and unless `projector_only` LoRA in the language model, or the whole of it where
    it has no LoRA layers. Tower, and with LoRA both vocabulary matrices, stay frozen. Parameters with a part
    of `also` in their name train too. ValueError where nothing trains (an identity projector).
    """
    whole_llm = not projector_only and not has_lora(model)
    names = []
    for name, parameter in model.named_parameters():
        trains = name.startswith("mm_projector.") or any(part in name for part in also)
        trains = trains or (".lora_" in name and not projector_only)
        trains = trains or (whole_llm and name.startswith("llm."))
        parameter.requires_grad_(trains)
        if trains:
            names.append(name)
    if not names:
        raise ValueError("nothing trains: the projector is an identity; choose another --projector_type")
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%d of %d parameters train", total, sum(p.numel() for p in model.parameters()))
    return names


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Detached CPU copies of everything that trains, by name."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a `trainable_state` back; ValueError listing every missing, unexpected or mis-shaped name."""
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    faults = [f"missing {n}" for n in sorted(own.keys() - state.keys())]
    faults += [f"unexpected {n}" for n in sorted(state.keys() - own.keys())]
    faults += [
        f"{n} is {tuple(state[n].shape)}, the model's is {tuple(own[n].shape)}"
        for n in sorted(own.keys() & state.keys())
        if state[n].shape != own[n].shape
    ]
    if faults:
        raise ValueError("trainable state does not fit the model: " + "; ".join(faults))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
