"""Configurations out of what a folder holds: published LISAT and LISAT_PRE, CLIP towers, SAM files, our own.

A published folder says nothing about SAM and next to nothing about its tower; those sizes are read from the
tower's folder and from tensor shapes. What shapes cannot tell (activation, numbers of heads) is stated by the
caller or taken from the table below, never guessed silently.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.key_maps import Shape
from model.sam import SamConfig
from utils.io import StrPath, read_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""of our folders"""
OWN_TYPE = "lisat"
"""`model_type` in our config.json of a whole LISAT."""
BASE_TYPE = "lisat_base"
"""`model_type` in our config.json of tower + projector + LLM without segmentation modules."""
ASKING_FIELDS = ("conv_type", "templates")
"""our extra fields in a published-layout config.json: how the model was asked in training"""
SAM_FIELD = "sam_config"
"""our extra field in a published-layout config.json: SAM's sizes, which shapes do not tell completely"""
CLIP_HEAD_WIDTH = 64
"""Width of an attention head in every CLIP that OpenAI and OpenCLIP name by size (heads = width / 64)."""
ACTIVATIONS = ("gelu", "quick_gelu")

LLM_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps rope_theta rope_scaling "
    "attention_bias attention_dropout mlp_bias head_dim tie_word_embeddings "
    "pad_token_id bos_token_id eos_token_id"
).split()
VISION_FIELDS = (
    "hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads num_channels "
    "image_size patch_size hidden_act layer_norm_eps attention_dropout initializer_range initializer_factor"
).split()
_LLM_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_FLOATS = ("rms_norm_eps", "rope_theta", "initializer_range", "layer_norm_eps", "attention_dropout")
_FLOATS += ("initializer_factor",)


@dataclass
class Layout:
    """What the config.json of a folder says, in our terms."""

    kind: str
    """`lisat` or `lisat_base` (ours), `published` (merged LISAT), `published_base` (LISAT_PRE) or
    `published_llm` (a Llama without projector)"""
    fields: dict[str, Any]
    """fields of LisatConfig that are known"""
    tower: str | None = None
    """the tower's path as the folder states it (published kinds)"""
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def published(self) -> bool:
        """True for the published key names."""
        return self.kind.startswith("published")

    @property
    def pads_pictures(self) -> bool:
        """Whether the tower sees pictures padded to squares (LLaVA's `image_aspect_ratio: pad`)."""
        return self.kind == "published_base" and self.raw.get("image_aspect_ratio") == "pad"

    @property
    def whole(self) -> bool:
        """True if the folder holds the segmentation modules."""
        return self.kind in (OWN_TYPE, "published")


def read_layout(folder: StrPath) -> Layout:
    """Understand the config.json of a LISAT, LISAT_PRE or base folder.

    Raises:
        ValueError: no config.json, a field is missing, or a model of another kind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such model folder")
    raw = read_json(folder / "config.json", dict)
    kind = raw.get("model_type")
    if kind in (OWN_TYPE, BASE_TYPE):
        if raw.get("format_version", 1) > FORMAT_VERSION:
            raise ValueError(
                f"{folder / 'config.json'}: format_version {raw['format_version']} is newer than "
                f"this program's {FORMAT_VERSION}; update the program"
            )
        known = {key: value for key, value in raw.items() if key not in _OUR_EXTRAS}
        return Layout(kind, known, raw=raw)
    if kind not in ("llava", "llava_llama", "llama"):
        raise ValueError(
            f"{folder / 'config.json'}: model_type {kind!r} is neither a LISAT nor a LLaVA-1.5 folder "
            f"(expected {OWN_TYPE}, {BASE_TYPE}, llava, llava_llama or llama)"
        )
    plain = kind == "llama" and "mm_hidden_size" not in raw
    required = _LLM_REQUIRED if plain else (*_LLM_REQUIRED, "mm_hidden_size")
    missing = [name for name in required if name not in raw]
    if missing:
        raise ValueError(f"{folder / 'config.json'}: fields are missing: {', '.join(missing)}")
    whole = "train_mask_decoder" in raw
    fields: dict[str, Any] = {
        "llm": _typed({name: raw[name] for name in LLM_FIELDS if raw.get(name) is not None}),
        "mm_projector_type": raw.get("mm_projector_type") or "linear",
        "mm_hidden_size": raw.get("mm_hidden_size"),
        "mm_vision_select_layer": raw.get("mm_vision_select_layer", -2),
        "mm_vision_select_feature": raw.get("mm_vision_select_feature") or "patch",
        "mm_use_im_start_end": bool(raw.get("mm_use_im_start_end", whole)),
    }
    fields["llm"] |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if plain:
        del fields["mm_projector_type"]
        return Layout("published_llm", fields, raw=raw)
    fields |= {name: raw[name] for name in ASKING_FIELDS if name in raw}
    if whole:
        fields |= {"out_dim": raw.get("out_dim", 256), "seg_token_id": _added_token(folder, "[SEG]")}
        if fields["seg_token_id"] is None:
            raise ValueError(f"{folder}: the id of [SEG] is in no added_tokens.json or tokenizer_config.json")
        if SAM_FIELD in raw:
            fields["sam"] = SamConfig.from_dict(raw[SAM_FIELD])
    tower = raw.get("mm_vision_tower") or raw.get("vision_tower")
    return Layout("published" if whole else "published_base", fields, tower, raw)


_OUR_EXTRAS = ("model_type", "architectures", "format_version", "dtype", "parameters")


def read_vision_config(path: StrPath) -> dict[str, Any] | None:
    """CLIPVisionConfig fields of a tower folder (also of a full CLIP); None without a config.json."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    raw = read_json(file, dict)
    raw = raw.get("vision_config", raw) if raw.get("model_type") == "clip" else raw
    if raw.get("model_type") not in ("clip_vision_model", None):
        raise ValueError(f"{file}: model_type {raw.get('model_type')!r} is no CLIP vision tower")
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    missing = [name for name in required if name not in raw]
    if missing:
        raise ValueError(f"{file}: fields are missing: {', '.join(missing)}")
    return _typed({name: raw[name] for name in VISION_FIELDS if raw.get(name) is not None})


def infer_vision_config(
    shapes: Mapping[str, Shape], activation: str | None, heads: int | None = None
) -> dict[str, Any]:
    """CLIPVisionConfig fields from the shapes of a tower (`vision_tower.*` names).

    Args:
        shapes: our tensor names -> shapes.
        activation: `gelu` or `quick_gelu`. Shapes do not tell; RemoteCLIP is `gelu` (plain OpenCLIP
            `ViT-L-14`), OpenAI's own weights are `quick_gelu`.
        heads: attention heads; None means width / 64.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"tower activation {activation!r}: say gelu (RemoteCLIP, OpenCLIP's ViT-L-14) or quick_gelu "
            f"(OpenAI's weights, OpenCLIP's ViT-L-14-quickgelu); it cannot be read from the weights"
        )
    width, channels, patch, _ = _shape(shapes, "vision_tower.embeddings.patch_embedding.weight")
    if heads is None and width % CLIP_HEAD_WIDTH:
        raise ValueError(
            f"tower of width {width}: its number of attention heads cannot be read from the weights (width / "
            f"{CLIP_HEAD_WIDTH} is no whole number); state it, or keep the tower's config.json beside them"
        )
    positions = _shape(shapes, "vision_tower.embeddings.position_embedding.weight")[0]
    side = math.isqrt(positions - 1)
    if side * side != positions - 1:
        raise ValueError(f"tower: {positions} position embeddings are no square grid plus one class token")
    return {
        "hidden_size": width,
        "intermediate_size": _shape(shapes, "vision_tower.encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(shapes, r"vision_tower\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads or width // CLIP_HEAD_WIDTH,
        "num_channels": channels,
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }


def infer_sam_config(shapes: Mapping[str, Shape], decoder_heads: int = 8) -> SamConfig:
    """SamConfig from the shapes of a SAM (`sam.*` names).

    Shapes do not tell `decoder_heads`; every published SAM has 8.
    """
    encoder = "sam.image_encoder."
    embed_dim, _, patch, _ = _shape(shapes, f"{encoder}patch_embed.proj.weight")
    grid = _shape(shapes, f"{encoder}pos_embed")[1]
    depth = _count(shapes, r"sam\.image_encoder\.blocks\.(\d+)\.")
    tables = [_shape(shapes, f"{encoder}blocks.{i}.attn.rel_pos_h") for i in range(depth)]
    sizes = [(rows + 1) // 2 for rows, _ in tables]
    windows = sorted(set(sizes) - {grid})
    if len(windows) > 1:
        raise ValueError(f"SAM image encoder: several window sizes {windows} in one model")
    prompt_dim = _shape(shapes, "sam.prompt_encoder.no_mask_embed.weight")[1]
    iou = "sam.mask_decoder.iou_prediction_head.layers."
    return SamConfig(
        image_size=grid * patch,
        patch_size=patch,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // tables[0][1],
        global_attn_indexes=tuple(i for i, size in enumerate(sizes) if size == grid) if windows else (),
        window_size=windows[0] if windows else 0,
        mlp_ratio=_shape(shapes, f"{encoder}blocks.0.mlp.lin1.weight")[0] / embed_dim,
        prompt_embed_dim=prompt_dim,
        mask_in_chans=_shape(shapes, "sam.prompt_encoder.mask_downscaling.6.weight")[1],
        num_multimask_outputs=_shape(shapes, "sam.mask_decoder.mask_tokens.weight")[0] - 1,
        decoder_depth=_count(shapes, r"sam\.mask_decoder\.transformer\.layers\.(\d+)\."),
        decoder_heads=decoder_heads,
        decoder_mlp_dim=_shape(shapes, "sam.mask_decoder.transformer.layers.0.mlp.lin1.weight")[0],
        iou_head_depth=_count(shapes, re.escape(iou) + r"(\d+)\."),
        iou_head_hidden_dim=_shape(shapes, f"{iou}0.weight")[0],
    )


def infer_projector_type(shapes: Mapping[str, Shape]) -> str:
    """`linear` or `mlp<depth>x_gelu` from the names of a projector's tensors (`mm_projector.*`)."""
    if "mm_projector.weight" in shapes:
        return "linear"
    depth = sum(re.fullmatch(r"mm_projector\.\d+\.weight", name) is not None for name in shapes)
    if not depth:
        raise ValueError(f"no projector among the tensors {sorted(shapes)[:5]}; expected mm_projector.*")
    return f"mlp{depth}x_gelu"


def sam_config_of_file(metadata: Mapping[str, str], file: StrPath) -> SamConfig | None:
    """The SamConfig that `save_sam` put into a safetensors file's metadata; None if there is none."""
    text = metadata.get("sam_config")
    if text is None:
        return None
    try:
        return SamConfig.from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: metadata sam_config is not valid JSON: {error}") from error


def _added_token(folder: Path, token: str) -> int | None:
    added = folder / "added_tokens.json"
    if added.is_file() and token in (tokens := read_json(added, dict)):
        return int(tokens[token])
    config = folder / "tokenizer_config.json"
    decoder = read_json(config, dict).get("added_tokens_decoder", {}) if config.is_file() else {}
    for index, entry in decoder.items():
        if entry.get("content") == token:
            return int(index)
    return None


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    return {k: float(v) if k in _FLOATS and isinstance(v, int) else v for k, v in values.items()}


def _shape(shapes: Mapping[str, Shape], name: str) -> Shape:
    if name not in shapes:
        raise ValueError(
            f"tensor {name} is missing, so the sizes of the model cannot be read from the weights"
        )
    return tuple(shapes[name])


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
    numbers = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return max(numbers, default=-1) + 1
