"""Which tensor of a published file goes where: total maps from file names to the names of our `Lisat`.

A map looks at one name and says `Target(name)`, `Ignored(reason)` or `None` (unknown: the caller reports it).
Nothing is dropped by accident: what is left out is named in `IGNORED` with its reason. Our names start with
`vision_tower.` (transformers' CLIPVisionModel), `mm_projector.`, `llm.` (LlamaForCausalLM),
`text_hidden_fcs.` and `sam.` (segment-anything's names). Layouts: LISAT specification, section 2.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """The tensor of the file goes to this name of the model's state dict."""

    name: str


@dataclass(frozen=True)
class Ignored:
    """The tensor of the file is left out on purpose."""

    reason: str


KeyMap = Callable[[str], Target | Ignored | None]

PARTS = ("vision_tower.", "mm_projector.", "llm.", "text_hidden_fcs.", "sam.")
SEG_PARTS = ("text_hidden_fcs.", "sam.")
LORA_NAME = re.compile(r"^(.+)\.lora_(A|B)(?:\.[^.]+)?\.weight$")

_INV_FREQ = Ignored("rotary frequencies, computed from the configuration")
_POSITION_IDS = Ignored("position numbers 0..n, computed")
_TEXT_SIDE = Ignored("text side or projection of a full CLIP, unused by the vision tower")
_PIXEL_STATS = Ignored("SAM's pixel mean and deviation, constants")

# Rules are tried in order; the first that matches decides. A string is the new name (groups as \\1).
_TOWER_RULES: list[tuple[str, str | Ignored]] = [
    (r"(?:vision_model\.|text_model\.)?embeddings\.position_ids", _POSITION_IDS),
    (r"text_model\..+|(?:text|visual)_projection\.weight|logit_scale", _TEXT_SIDE),
    (r"(?:vision_model\.)?((?:embeddings|pre_layrnorm|encoder|post_layernorm)\..+)", r"vision_tower.\1"),
]
_SAM_RULES: list[tuple[str, str | Ignored]] = [
    (r"pixel_(?:mean|std)", _PIXEL_STATS),
    (r"((?:image_encoder|prompt_encoder|mask_decoder)\..+)", r"sam.\1"),
]
_LLM_RULES: list[tuple[str, str | Ignored]] = [
    (r"model\.(?:layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", _INV_FREQ),
    (r"(model\.(?:layers\.\d+|embed_tokens|norm)\..+|lm_head\.weight)", r"llm.\1"),
]
_LISAT_RULES: list[tuple[str, str | Ignored]] = [
    *_LLM_RULES,
    (r"model\.((?:mm_projector|text_hidden_fcs)\..+)", r"\1"),
]
_OWN_RULES: list[tuple[str, str | Ignored]] = [
    (r"((?:vision_tower|mm_projector|llm|text_hidden_fcs|sam)\..+)", r"\1"),
]


def _apply(rules: list[tuple[str, str | Ignored]], name: str) -> Target | Ignored | None:
    for pattern, result in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return result if isinstance(result, Ignored) else Target(match.expand(result))
    return None


def map_tower_key(name: str) -> Target | Ignored | None:
    """Names of a `CLIPVisionModel` folder (`vision_model.` level optional) or of a full CLIP export."""
    return _apply(_TOWER_RULES, name)


def map_sam_key(name: str) -> Target | Ignored | None:
    """Names of a segment-anything file (`image_encoder.`, `prompt_encoder.`, `mask_decoder.`)."""
    return _apply(_SAM_RULES, name)


def map_lisat_key(name: str) -> Target | Ignored | None:
    """Names of a published LISAT or LISAT_PRE (LLaVA-1.5) folder, tower keys optional."""
    for prefix, inner in (
        ("model.vision_tower.vision_tower.", map_tower_key),
        ("model.visual_model.", map_sam_key),
    ):
        if name.startswith(prefix):
            return inner(name.removeprefix(prefix))
    return _apply(_LISAT_RULES, name)


def map_own_key(name: str) -> Target | Ignored | None:
    """Names of our own folders: the names of `Lisat`'s state dict."""
    return _apply(_OWN_RULES, name)


def map_any_lisat_key(name: str) -> Target | Ignored | None:
    """Published or own names, told apart by their first part (`model.` and `lm_head.` are published)."""
    published = name.startswith(("model.", "lm_head."))
    return map_lisat_key(name) if published else map_own_key(name)


def map_training_key(name: str) -> Target | Ignored | None:
    """Names of a training state: peft's wrapping (`base_model.model.`, `base_layer.`) around either layout.

    LoRA tensors come out as `<target module>.lora_A.weight` / `.lora_B.weight`, whatever the adapter's name.
    """
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    name = name.replace("llm.base_model.model.", "llm.").replace(".base_layer.", ".")
    lora = LORA_NAME.match(name)
    if lora is None:
        return map_any_lisat_key(name)
    fate = map_any_lisat_key(f"{lora[1]}.weight")
    if not isinstance(fate, Target):
        return fate
    return Target(f"{fate.name.removesuffix('.weight')}.lora_{lora[2]}.weight")


def published_key(name: str) -> str:
    """Name of a `Lisat` tensor in the published LISAT layout (the inverse of `map_lisat_key`)."""
    for own, published in (
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("sam.", "model.visual_model."),
        ("mm_projector.", "model.mm_projector."),
        ("text_hidden_fcs.", "model.text_hidden_fcs."),
        ("llm.", ""),
    ):
        if name.startswith(own):
            return published + name.removeprefix(own)
    raise ValueError(f"{name}: not a tensor of Lisat; its names start with {', '.join(PARTS)}")


@dataclass
class KeyReport:
    """What became of every tensor of the files and of the model (see `plan`)."""

    placed: dict[str, str] = field(default_factory=dict)
    """file name -> model name"""
    ignored: dict[str, str] = field(default_factory=dict)
    """file name -> reason"""
    missing: list[str] = field(default_factory=list)
    """model names that no file holds"""
    unexpected: list[str] = field(default_factory=list)
    """file names without a place in the model"""
    misshaped: dict[str, str] = field(default_factory=dict)
    """file name -> the two shapes"""

    @property
    def faulty(self) -> bool:
        """True if any tensor is missing, unexpected or of another shape."""
        return bool(self.missing or self.unexpected or self.misshaped)

    def raise_if_faulty(self, source: object) -> None:
        """ValueError with the complete list of faults, if there is any."""
        if not self.faulty:
            return
        lines = [f"{source}: the tensors do not fit the model"]
        for title, names in (
            ("missing (the model has them, the files do not)", self.missing),
            ("unexpected (the files have them, the model does not)", self.unexpected),
            ("of another shape", [f"{name}: {text}" for name, text in self.misshaped.items()]),
        ):
            if names:
                lines += [f"{len(names)} {title}:", *(f"  {name}" for name in names)]
        lines.append(
            "Check that the folder, the tower and the SAM file belong together and to this configuration."
        )
        raise ValueError("\n".join(lines))

    def summary(self) -> str:
        """One line with the five counts."""
        counts = (
            f"{len(getattr(self, key))} {key}" for key in ("placed", "ignored", "missing", "unexpected")
        )
        return ", ".join([*counts, f"{len(self.misshaped)} misshaped"])


def map_projector_key(name: str) -> Target | Ignored | None:
    """Names of a projector alone: LLaVA's `mm_projector.bin`, or what training the projector wrote."""
    fate = map_training_key(name)
    return fate if isinstance(fate, Target) and fate.name.startswith("mm_projector.") else None


def dropping(key_map: KeyMap, prefixes: tuple[str, ...], reason: str) -> KeyMap:
    """`key_map` with everything that would go to one of `prefixes` ignored for `reason`."""

    def mapped(name: str) -> Target | Ignored | None:
        fate = key_map(name)
        return Ignored(reason) if isinstance(fate, Target) and fate.name.startswith(prefixes) else fate

    return mapped


def plan(
    files: Mapping[str, Shape],
    model: Mapping[str, Shape],
    key_map: KeyMap,
    taken: Mapping[str, str] | None = None,
) -> KeyReport:
    """Decide where each tensor goes before one byte of it is read.

    Args:
        files: name -> shape of the tensors in the files.
        model: name -> shape of the model's state dict.
        key_map: file name -> Target, Ignored or None.
        taken: model name -> where it comes from already; such tensors are ignored here, whatever their shape.

    Returns:
        The report; `missing` holds the names of `model` that are neither here nor in `taken`.
    """
    report, taken = KeyReport(), taken or {}
    seen: set[str] = set()
    for name, shape in files.items():
        fate = key_map(name)
        if isinstance(fate, Ignored):
            report.ignored[name] = fate.reason
        elif fate is None or fate.name not in model:
            report.unexpected.append(name)
        elif fate.name in taken:
            report.ignored[name] = f"taken from {taken[fate.name]}"
        elif fate.name in seen:
            report.unexpected.append(f"{name} (a second tensor for {fate.name})")
        else:
            seen.add(fate.name)
            if tuple(shape) == tuple(model[fate.name]):
                report.placed[name] = fate.name
            else:
                pair = f"{list(shape)} in the file, {list(model[fate.name])} in the model"
                report.misshaped[name] = pair
    report.missing = [name for name in model if name not in seen and name not in taken]
    return report
