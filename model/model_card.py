"""The README.md of an exported folder: what the model is, how it is asked, what is inside."""

from collections.abc import Mapping
from typing import Any

from torch import nn

_PARTS = {
    "vision_tower": "CLIP vision tower",
    "mm_projector": "projector from the tower to the language model",
    "llm": "Llama language model",
    "text_hidden_fcs": "projection of a `[SEG]` state to a mask prompt",
    "sam": "Segment Anything (image encoder, prompt encoder, mask decoder)",
}


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of parameters of each part that the model has."""
    counts = {}
    for name in _PARTS:
        part = getattr(model, name, None)
        if part is not None:
            counts[name] = sum(parameter.numel() for parameter in part.parameters())
    return counts


def model_card(
    model: nn.Module,
    title: str,
    layout: str,
    dtypes: Mapping[str, str],
    extra: Mapping[str, str] | None = None,
) -> str:
    """Markdown with a metadata header.

    Args:
        model: a `Lisat`.
        title: heading.
        layout: `lisat` or `published`, tells how to load it.
        dtypes: part -> stored dtype, for the table.
        extra: further sections, heading -> Markdown (scores, training command, data, licence of the base).
    """
    config = model.config
    counts = parameter_counts(model)
    rows = [f"| `{name}` | {_PARTS[name]} | {count:,} | {dtypes[name]} |" for name, count in counts.items()]
    answers = _with_masks(config) if config.sam is not None else _without_masks()
    loading = (
        "```python\nfrom model.checkpoint import load_lisat\n\nmodel, config = load_lisat(FOLDER)\n```"
        if layout == "lisat"
        else "This folder has the published LISAT layout. Its tower lies in `vision_tower/`; the published "
        "programs look for it at the path `mm_vision_tower` of `config.json`, relative to where they are "
        "started. `load_lisat` of this project reads it too."
    )
    if config.sam is None:
        loading = loading.replace("load_lisat", "load_llava")
    sections = [
        "---\nlibrary_name: lisat\npipeline_tag: image-segmentation\n"
        "tags:\n- remote-sensing\n- reasoning-segmentation\n- lisat\n---",
        f"# {title}",
        "A LISAT model: it looks at a satellite image, answers a question in words and outlines what the "
        "answer speaks of."
        if config.sam is not None
        else "A vision-language base for LISAT: it answers questions about an image; it draws no masks.",
        "## Parts\n\n| part | what | parameters | stored as |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nTogether {sum(counts.values()):,} parameters.",
        "## Input and output\n\n" + answers + _images(config),
        "## Loading\n\n" + loading,
    ]
    sections += [f"## {heading}\n\n{text.strip()}" for heading, text in (extra or {}).items()]
    return "\n\n".join(sections) + "\n"


def _with_masks(config: Any) -> str:
    return (
        f"Every `[SEG]` (token {config.seg_token_id}) in an answer stands for one mask; the hidden state "
        "that predicts it is the prompt of the mask decoder. An answer without `[SEG]` says that nothing is "
        "there. Masks are logits, `> 0` is inside; each has a score (mean foreground probability). "
    )


def _without_masks() -> str:
    return "Text only. "


def _images(config: Any) -> str:
    side = config.vision["image_size"]
    text = (
        f"The tower sees {side}x{side} pixels ({config.num_image_features} image tokens, features of layer "
        f"{config.mm_vision_select_layer}, activation `{config.vision.get('hidden_act', 'quick_gelu')}`)"
    )
    if config.sam is not None:
        text += f", Segment Anything {config.sam.image_size}x{config.sam.image_size}"
    return text + f". Conversation template: `{config.conv_type}`, question templates: `{config.templates}`."
