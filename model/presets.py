"""Named sizes of the whole network. Copy a preset's dictionary fields before changing them."""

from collections.abc import Callable
from typing import Any

from model.lisat import LisatConfig
from model.sam import sam_config


def lisat_7b() -> LisatConfig:
    """LISAt-7b: Vicuna-7B v1.5, RemoteCLIP ViT-L/14 at 224 px, SAM ViT-H (specification section 1).

    The tower's `hidden_act` is read from its own folder when weights are loaded; `gelu` here, as the
    public RemoteCLIP loading code has it.
    """
    return LisatConfig(
        llm=_llama(32003, 4096, 11008, 32, 32, 4096),
        vision=_clip(1024, 4096, 24, 16, 224, 14, "gelu") | {"projection_dim": 768},
        sam=sam_config("sam_vit_h"),
        out_dim=256,
        seg_token_id=32000,
    )


def lisat_tiny(vocab_size: int = 512, seg_token_id: int = -1) -> LisatConfig:
    """The small LISAT that trains on two cores; the tokenizer decides both arguments."""
    return LisatConfig(
        llm=_llama(vocab_size, 128, 352, 6, 4, 1024),
        vision=_clip(128, 384, 5, 4, 128, 16, "quick_gelu") | {"projection_dim": 64},
        sam=sam_config("sam_tiny"),
        out_dim=64,
        seg_token_id=seg_token_id,
    )


def _llama(vocab: int, width: int, mlp: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def _clip(width: int, mlp: int, layers: int, heads: int, image: int, patch: int, act: str) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
        "hidden_act": act,
        "layer_norm_eps": 1e-5,
    }


PRESETS: dict[str, Callable[[], LisatConfig]] = {"lisat_7b": lisat_7b, "lisat_tiny": lisat_tiny}


def preset(name: str) -> LisatConfig:
    """The named configuration; ValueError with the known names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {sorted(PRESETS)}")
    return PRESETS[name]()
