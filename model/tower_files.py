"""The vision tower as files: an OpenCLIP `.pt` turned into our names, and `CLIPVisionModel` folders.

RemoteCLIP is distributed both ways: as a folder that transformers reads, and as `RemoteCLIP-ViT-L-14.pt`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.layouts import infer_vision_config
from model.weight_files import WeightFiles, read_pickle, write_shards
from utils.io import StrPath, atomic_dir, atomic_write_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP_WRAPPERS = ("state_dict",)

_TEXT_SIDE = re.compile(
    r"token_embedding\.weight|positional_embedding|transformer\..+|ln_final\.(weight|bias)|text_projection"
    r"|text\..+|logit_scale|logit_bias|attn_mask|visual\.proj"
)
_SIMPLE = {
    "visual.class_embedding": "embeddings.class_embedding",
    "visual.positional_embedding": "embeddings.position_embedding.weight",
    "visual.conv1.weight": "embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "pre_layrnorm.weight",
    "visual.ln_pre.bias": "pre_layrnorm.bias",
    "visual.ln_post.weight": "post_layernorm.weight",
    "visual.ln_post.bias": "post_layernorm.bias",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)(weight|bias)")
_IN_BLOCK = {
    "ln_1.": "layer_norm1",
    "ln_2.": "layer_norm2",
    "attn.out_proj.": "self_attn.out_proj",
    "mlp.c_fc.": "mlp.fc1",
    "mlp.c_proj.": "mlp.fc2",
}


def convert_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tower tensors of an OpenCLIP state dict under `vision_tower.*`; text side and projections are left out.

    Raises:
        ValueError: tensors that are neither part of a ViT tower nor of the text side (all are listed).
    """
    tower: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        if _TEXT_SIDE.fullmatch(name):
            continue
        if name in _SIMPLE:
            tower[f"vision_tower.{_SIMPLE[name]}"] = tensor
            continue
        block = convert_block(name.removeprefix("visual."), tensor) if name.startswith("visual.") else {}
        tower |= {f"vision_tower.{inner}": piece for inner, piece in block.items()}
        if not block:
            unexpected.append(name)
    if unexpected:
        raise ValueError(
            f"{len(unexpected)} tensors of the OpenCLIP file are unknown (is its tower a ViT?): "
            f"{', '.join(unexpected)}"
        )
    if not tower:
        raise ValueError("the file holds no OpenCLIP vision tower (no tensor named visual.*)")
    return tower


def convert_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Tensors `encoder.layers.N.*` of one OpenCLIP tensor `transformer.resblocks.N.*` (the joint q, k, v
    projection becomes three); empty for any other name."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return {}
    layer = f"encoder.layers.{match[1]}."
    if match[2] == "attn.in_proj_":
        pieces = zip("qkv", tensor.chunk(3))
        return {f"{layer}self_attn.{part}_proj.{match[3]}": piece for part, piece in pieces}
    inner = _IN_BLOCK.get(match[2])
    return {f"{layer}{inner}.{match[3]}": tensor} if inner else {}


def is_open_clip(path: StrPath) -> bool:
    """True for a single weight file with OpenCLIP's names (`visual.conv1.weight`)."""
    path = Path(path)
    if not path.is_file():
        return False
    names = WeightFiles(path, unwrap=OPEN_CLIP_WRAPPERS).shapes()
    return any(name.removeprefix("module.") == "visual.conv1.weight" for name in names)


def read_open_clip(path: StrPath) -> dict[str, Tensor]:
    """`convert_open_clip` of a file (`.pt` or safetensors)."""
    return convert_open_clip(read_open_clip_state(path))


def read_open_clip_state(path: StrPath) -> dict[str, Tensor]:
    """All tensors of an OpenCLIP file (`.pt`, `.bin` or safetensors) under the names it has."""
    if Path(path).suffix == ".safetensors":
        return dict(WeightFiles(path).tensors())
    return read_pickle(path, unwrap=OPEN_CLIP_WRAPPERS)


def save_tower_folder(
    folder: StrPath,
    tower: Mapping[str, Tensor],
    vision_config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a `CLIPVisionModel` folder: weights with the `vision_model.` level, config, preprocessor.

    Args:
        folder: replaced in one step.
        tower: `vision_tower.*` tensors.
        vision_config: fields of CLIPVisionConfig.
        dtype: stored dtype; None keeps each tensor's.
    """
    renamed = {f"vision_model.{name.removeprefix('vision_tower.')}": t for name, t in tower.items()}
    dtypes = dict.fromkeys(renamed, dtype) if dtype is not None else None
    side = vision_config["image_size"]
    config = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", **vision_config}
    with atomic_dir(folder) as beside:
        write_shards(beside, renamed, dtypes=dtypes)
        atomic_write_json(beside / "config.json", config)
        atomic_write_json(
            beside / "preprocessor_config.json",
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_convert_rgb": True,
                "do_resize": True,
                "size": {"shortest_edge": side},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": side, "width": side},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": list(CLIP_MEAN),
                "image_std": list(CLIP_STD),
            },
        )
    return Path(folder)


def convert_remote_clip(source: StrPath, folder: StrPath, activation: str, heads: int | None = None) -> Path:
    """Turn an OpenCLIP file such as `RemoteCLIP-ViT-L-14.pt` into a `CLIPVisionModel` folder.

    Args:
        source: the file.
        folder: the folder to write.
        activation: `gelu` for RemoteCLIP; see `infer_vision_config`.
        heads: attention heads; None means width / 64.
    """
    tower = read_open_clip(source)
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.items()}
    return save_tower_folder(folder, tower, infer_vision_config(shapes, activation, heads))
