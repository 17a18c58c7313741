"""Writing models: one hub-style folder in our layout or the published one, and SAM files.

A folder appears whole or not at all (utils/io.py). Ours holds safetensors shards, `config.json`, the
tokenizer's and the processor's files and a model card; `load_lisat` gives the same tensors back bit for bit.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.assembly import stored_dtype
from model.key_maps import SEG_PARTS, published_key
from model.layouts import ASKING_FIELDS, BASE_TYPE, FORMAT_VERSION, OWN_TYPE, SAM_FIELD
from model.model_card import model_card, parameter_counts
from model.tower_files import save_tower_folder
from model.weight_files import write_shards
from utils.io import StrPath, atomic_dir, atomic_write_json, atomic_write_text, fsync_path, share_file

logger = logging.getLogger(__name__)

LAYOUTS = ("lisat", "published")
TOWER_FOLDER = "vision_tower"


class Saveable(Protocol):
    """A tokenizer or processor: it writes its files into a folder."""

    def save_pretrained(self, folder: StrPath) -> Any:
        """Write into an existing folder."""


def save_lisat(
    model: nn.Module,
    folder: StrPath,
    *,
    tokenizer: Saveable | None = None,
    processor: Saveable | None = None,
    dtype: torch.dtype | None = None,
    mask_dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    layout: str = "lisat",
    title: str | None = None,
    extra_card: Mapping[str, str] | None = None,
) -> Path:
    """Write a `Lisat` (with or without SAM) as one folder, replacing an older one in one step.

    Args:
        model: without LoRA wrappers (merge first). Not changed.
        folder: where to.
        tokenizer: its files go along; so do the processor's.
        processor: image settings.
        dtype: stored dtype of all floating tensors (SAM's positional matrix stays fp32); None: as they are.
        mask_dtype: of SAM and `text_hidden_fcs`, if it differs (the published merge keeps them in fp32).
        max_shard_size: for example `5GB`.
        layout: `lisat`, or `published` for tools of the published code: its key names, no tower among the
            weights, the tower as a `CLIPVisionModel` folder inside.
        title: heading of the card; the folder's name otherwise.
        extra_card: further sections of the card, heading -> Markdown.

    Returns:
        The folder.

    Raises:
        ValueError: LoRA wrappers are on, tensors without content, an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    folder = Path(folder)
    state = _checked_state(model)
    dtypes = {name: _dtype(name, tensor, dtype, mask_dtype) for name, tensor in state.items()}
    config = own_config(model, dtypes) if layout == "lisat" else published_config(model, dtypes)
    if layout == "published" and getattr(processor, "clip_pad", False):
        config["image_aspect_ratio"] = "pad"
    with atomic_dir(folder) as beside:
        if layout == "lisat":
            write_shards(beside, state, max_shard_size, dtypes)
        else:
            _write_published(model, beside, state, dtypes, max_shard_size)
        atomic_write_json(beside / "config.json", config)
        atomic_write_json(beside / "generation_config.json", _generation(model))
        for part in (tokenizer, processor):
            if part is not None:
                part.save_pretrained(beside)
        text = model_card(model, title or folder.name, layout, _part_dtypes(model, dtypes), extra_card)
        atomic_write_text(beside / "README.md", text)
    logger.info("wrote %s (%d tensors, layout %s)", folder, len(state), layout)
    return folder


def save_base(model: nn.Module, folder: StrPath, **options: Any) -> Path:
    """Write only tower, projector and language model: our LISAT_PRE. Options as `save_lisat`."""
    return save_lisat(_WithoutMasks(model) if model.sam is not None else model, folder, **options)


def save_sam(sam: nn.Module, file: StrPath, dtype: torch.dtype | None = None) -> Path:
    """Write a `model.sam.Sam` as one safetensors file with segment-anything's names.

    Its SamConfig goes into the file's metadata (`sam_config`), so that nothing has to be inferred.

    Args:
        sam: the module.
        file: ends in `.safetensors`.
        dtype: stored dtype (the positional matrix stays fp32); None: as it is.
    """
    file = Path(file)
    if file.suffix != ".safetensors":
        raise ValueError(f"{file}: the name must end in .safetensors")
    state = {
        name: tensor.detach().to("cpu", stored_dtype(name, tensor.dtype, dtype)).clone().contiguous()
        for name, tensor in sam.state_dict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.partial")
    save_file(state, beside, metadata={"format": "pt", "sam_config": json.dumps(sam.config.to_dict())})
    share_file(beside)
    fsync_path(beside)
    beside.replace(file)
    fsync_path(file.parent)
    return file


def own_config(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """config.json of our layout: LisatConfig's fields, the kind of folder, stored dtypes, counts."""
    masks = model.config.sam is not None
    return {
        "model_type": OWN_TYPE if masks else BASE_TYPE,
        "architectures": ["Lisat"],
        "format_version": FORMAT_VERSION,
        "dtype": _part_dtypes(model, dtypes),
        "parameters": parameter_counts(model),
        **model.config.to_dict(),
    }


def published_config(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """config.json with the fields that the published export writes."""
    config = model.config
    masks = config.sam is not None
    fields = {
        "architectures": ["LISATForCausalLM" if masks else "LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **config.llm,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rope_scaling": config.llm.get("rope_scaling"),
        "use_cache": True,
        "torch_dtype": str(dtypes["llm.lm_head.weight"]).removeprefix("torch."),
        "mm_hidden_size": config.mm_hidden_size,
        "mm_projector_type": config.mm_projector_type,
        "mm_vision_select_layer": config.mm_vision_select_layer,
        "mm_vision_select_feature": config.mm_vision_select_feature,
        "mm_vision_tower": f"./{TOWER_FOLDER}",
        "mm_use_im_start_end": config.mm_use_im_start_end,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": None,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": True,
        "pretrain_mm_mlp_adapter": None,
        **{name: getattr(config, name) for name in ASKING_FIELDS},
    }
    if masks:
        fields |= {
            "vision_tower": f"./{TOWER_FOLDER}",
            "train_mask_decoder": True,
            "out_dim": config.out_dim,
            SAM_FIELD: config.sam.to_dict(),
        }
    return fields


def _write_published(
    model: nn.Module,
    folder: Path,
    state: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    max_shard_size: int | str,
) -> None:
    tower = {name: tensor for name, tensor in state.items() if name.startswith("vision_tower.")}
    rest = {published_key(name): tensor for name, tensor in state.items() if name not in tower}
    stored = {published_key(name): dtype for name, dtype in dtypes.items() if name not in tower}
    frequencies = model.llm.model.rotary_emb.inv_freq.detach().float()
    for layer in range(model.llm.config.num_hidden_layers):  # old loaders expect this buffer per layer
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        rest[name], stored[name] = frequencies.clone(), torch.float32
    write_shards(folder, rest, max_shard_size, stored)
    tower = {name: tensor.to(dtypes[name]) for name, tensor in tower.items()}
    save_tower_folder(folder / TOWER_FOLDER, tower, model.config.vision)


def _checked_state(model: nn.Module) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    if model.llm.config.tie_word_embeddings:
        state.pop("llm.lm_head.weight", None)
    wrapped = [name for name in state if ".lora_" in name or ".base_layer." in name]
    if wrapped:
        raise ValueError(
            f"the model still carries LoRA ({wrapped[0]} and {len(wrapped) - 1} more): merge it first"
        )
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    if empty:
        raise ValueError(f"tensors without content: {', '.join(empty)}")
    return state


def _dtype(
    name: str, tensor: Tensor, dtype: torch.dtype | None, mask_dtype: torch.dtype | None
) -> torch.dtype:
    wanted = mask_dtype if mask_dtype is not None and name.startswith(SEG_PARTS) else dtype
    return stored_dtype(name, tensor.dtype, wanted)


def _part_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for name, dtype in dtypes.items():
        if name.endswith(".positional_encoding_gaussian_matrix"):
            continue
        kinds = found.setdefault(name.split(".")[0], [])
        text = str(dtype).removeprefix("torch.")
        if text not in kinds:
            kinds.append(text)
    return {name: "/".join(found.get(name, ["none"])) for name in parameter_counts(model)}


def _generation(model: nn.Module) -> dict[str, Any]:
    llm = model.config.llm
    ids = {
        key: llm[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if llm.get(key) is not None
    }
    return {"_from_model_config": True, **ids}


class _WithoutMasks(nn.Module):
    """The same modules without SAM and `text_hidden_fcs` (shares all tensors)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from dataclasses import replace

        self.vision_tower, self.mm_projector, self.llm = model.vision_tower, model.mm_projector, model.llm
        self.text_hidden_fcs = self.sam = None
        self.config = replace(model.config, sam=None)
