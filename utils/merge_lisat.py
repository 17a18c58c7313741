"""Merging a training run into one LISAT folder: configuration and work of `merge_lora_weights.py`."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass
class MergeConfig:
    """Fold the LoRA matrices of a training run into its base and write one folder (weights, tokenizer, card):
    a LISAT, or for a run of --stage align or instruct a LISAT_PRE.

    Flags left out come from the run's config.yaml if it has one, else from the published defaults.
    """

    weight: str
    """run folder, step folder, or consolidated state (pytorch_model.bin, a folder of shards, safetensors)"""
    save_path: str
    """folder to write"""
    stage: Literal["segmentation", "align", "instruct"] | None = None
    """what was trained; else as the run says, or segmentation"""
    version: str | None = None
    """base that was trained from; else ./LISAt_PRE-7b"""
    vision_pretrained: str | None = None
    """SAM's file, if neither the state nor the base holds SAM"""
    vision_tower: str | None = None
    """tower folder or OpenCLIP file; else where the base says"""
    tower_activation: Literal["gelu", "quick_gelu"] | None = None
    """activation of a tower without config.json"""
    precision: Precision | None = None
    """stored dtype; else bf16"""
    mask_precision: Precision = "fp32"
    """stored dtype of SAM and text_hidden_fcs (the published merge keeps fp32)"""
    layout: Literal["lisat", "published"] = "lisat"
    """our folder, or one that the published programs read"""
    max_shard_size: str = "10GB"
    """upper limit of one weight file"""
    lora_r: int | None = None
    """rank, checked against the state; else whatever the state has"""
    lora_alpha: float | None = None
    """scale is lora_alpha / rank; else 16"""
    lora_dropout: float = 0.05
    """no effect on merging"""
    lora_target_modules: str | None = None
    """comma-separated; if given, LoRA tensors of other modules are an error"""
    model_max_length: int = 512
    """longest row in tokens, written into the tokenizer's config"""
    out_dim: int | None = None
    """width of the mask prompts, checked; else as stored"""
    image_size: int | None = None
    """side of SAM's input, checked; else as stored"""
    conv_type: str | None = None
    """conversation template, written into the config; else llava_v1"""
    templates: str | None = None
    """question templates, written into the config; else the base's"""
    use_mm_start_end: bool | None = None
    """image tags <im_start>, <im_end> were used; else yes"""
    train_mask_decoder: bool = True
    """no effect on merging: what was trained is in the state"""
    local_rank: int = 0
    """set by launchers, unused"""

    def validate(self) -> list[str]:
        """Faults that show before anything is read."""
        faults = []
        if not Path(self.weight).exists():
            faults.append(f"--weight {self.weight}: nothing is there")
        if Path(self.save_path).is_file():
            faults.append(f"--save_path {self.save_path}: a file is there; give a folder")
        if self.lora_r is not None and self.lora_r < 1:
            faults.append(f"--lora_r {self.lora_r}: at least 1")
        return faults


def merge(config: MergeConfig) -> Path:
    """Do it; returns the folder. ValueError for anything that does not fit (complete lists)."""
    import torch

    from dataset.text import IM_END, IM_START, Tokenizer
    from model.checkpoint import load_trained, save_lisat

    run = run_settings(config.weight)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    version = _first(config.version, run.get("version"), "./LISAt_PRE-7b")
    stage = _first(config.stage, run.get("stage"), "segmentation")
    masks = stage == "segmentation"
    tower = _first(config.vision_tower, run.get("vision_tower"))
    alpha = _first(config.lora_alpha, run.get("lora_alpha"), 16.0)
    precision = _first(config.precision, run.get("precision"), "bf16")
    tokenizer = Tokenizer.from_pretrained(version, model_max_length=config.model_max_length)
    tags = _first(config.use_mm_start_end, run.get("use_mm_start_end"), True)
    tags = tags and (masks or (tokenizer.has_token(IM_START) and tokenizer.has_token(IM_END)))
    model, lisat = load_trained(
        config.weight,
        version,
        _first(config.vision_pretrained, run.get("vision_pretrained")),
        tokenizer=tokenizer,
        lora_r=config.lora_r,
        lora_alpha=alpha,
        lora_targets=config.lora_target_modules,
        image_tags=tags,
        vision_tower=tower,
        tower_activation=_first(config.tower_activation, run.get("tower_activation")),
        masks=masks,
        **_run_options(run, masks),
    )
    _check(lisat, config)
    lisat.conv_type = _first(config.conv_type, run.get("conv_type"), lisat.conv_type)
    lisat.templates = _first(config.templates, run.get("templates"), lisat.templates)
    text = f"Merged from `{Path(config.weight).name}` over `{Path(version).name}` (LoRA alpha {alpha:g})."
    return save_lisat(
        model,
        config.save_path,
        tokenizer=tokenizer,
        processor=find_processor(version, lisat.sam.image_size if masks else None, tower),
        dtype=dtypes[precision],
        mask_dtype=dtypes[config.mask_precision],
        max_shard_size=config.max_shard_size,
        layout=config.layout,
        extra_card={"Origin": text},
    )


def _run_options(run: dict[str, Any], masks: bool) -> dict[str, Any]:
    """Loader options that follow from the settings of a run."""
    if masks:
        low = bool(run.get("low_precision_pe"))
        return {"low_precision_pe": low, "projector": run.get("projector") or None}
    other = run.get("reinit_projector") or run.get("projector")  # the state holds it, trained
    return {"reinit_projector": bool(other)}


def run_settings(weight: str) -> dict[str, Any]:
    """Fields of the config.yaml of the run that a weight path belongs to; empty without one."""
    import yaml

    path = Path(weight)
    for folder in (path, path.parent, path.parent.parent, path.parent.parent.parent):
        file = folder / "config.yaml"
        if file.is_file() and (folder / "checkpoints").is_dir():
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise ValueError(f"{file}: expected `field: value` lines")
            logger.info("settings of the run: %s", file)
            return settings
    return {}


def find_processor(folder: str, sam_size: int | None = None, vision_tower: str | None = None) -> Any:
    """Image settings of a model folder: its own file, else its tower's preprocessor_config.json.

    Args:
        sam_size: side of SAM's input; None for a model without masks. A LISAT made from a base never pads
            the tower's pictures to squares, as published, whatever the base does.
        vision_tower: the tower, if it is not where the folder says.
    """
    from dataset.image import FILE_NAME, ImageProcessor
    from model.layouts import read_layout
    from utils.hub import resolve

    base = resolve(folder, what="base folder")
    layout = read_layout(base)
    if (base / FILE_NAME).is_file():
        processor = ImageProcessor.from_pretrained(base)
        pad = processor.clip_pad and (sam_size is None or layout.whole)
        return replace(processor, sam_size=sam_size or processor.sam_size, clip_pad=pad)
    named = vision_tower or layout.tower
    if not named:
        raise ValueError(
            f"{base} has no {FILE_NAME} and names no vision tower with image settings; copy that file there"
        )
    tower = resolve(named, near=[base], what="vision tower")
    processor = ImageProcessor() if tower.is_file() else ImageProcessor.from_clip_dir(tower)
    pad = sam_size is None and layout.pads_pictures
    return replace(processor, sam_size=sam_size or processor.sam_size, clip_pad=pad)


def _check(lisat: Any, config: MergeConfig) -> None:
    if lisat.sam is None:
        return
    if config.out_dim is not None and config.out_dim != lisat.out_dim:
        raise ValueError(f"--out_dim {config.out_dim}: the trained text_hidden_fcs has {lisat.out_dim}")
    if config.image_size is not None and config.image_size != lisat.sam.image_size:
        raise ValueError(f"--image_size {config.image_size}: the trained SAM takes {lisat.sam.image_size}")


def _first(*values: Any) -> Any:
    """The first value that is given (not None, not an empty text)."""
    return next((value for value in values if value is not None and value != ""), None)
