"""Reading and writing whole models: our folders, the published layouts, training states.

    load_lisat(folder)             a merged LISAT, published or ours
    load_llava(folder)             tower + projector + language model only, no masks: LISAT_PRE
    load_base(folder, sam_file)    LISAT_PRE, our base, or a LISAT, made ready for training
    load_trained(weight, base)     a training state with its LoRA folded in
    save_lisat, save_base, save_sam

Nothing is downloaded. Every tensor of every file is placed, ignored for a stated reason, or an error. Key
lists can be checked without weights: `python -m model.checkpoint --check full_keys.json`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from model.assembly import (
    Source,
    StateTensors,
    assemble,
    build_on_meta,
    cast_weights,
    model_shapes,
    plan_sources,
)
from model.export import save_base, save_lisat, save_sam
from model.key_maps import (
    SEG_PARTS,
    KeyMap,
    Shape,
    dropping,
    map_lisat_key,
    map_own_key,
    map_projector_key,
    map_sam_key,
    map_tower_key,
    plan,
)
from model.layouts import (
    Layout,
    infer_projector_type,
    infer_sam_config,
    infer_vision_config,
    read_layout,
    read_vision_config,
    sam_config_of_file,
)
from model.lisat import Lisat, LisatConfig
from model.merging import find_training_state, fold_lora, fold_new_rows, open_training_state
from model.sam import SamConfig
from model.tower_files import is_open_clip, read_open_clip
from model.weight_files import WeightFiles, has_weights
from utils.hub import resolve
from utils.io import StrPath

__all__ = ["load_base", "load_lisat", "load_llava", "load_trained", "save_base", "save_lisat", "save_sam"]

logger = logging.getLogger(__name__)

SEG_TOKEN = "[SEG]"
IMAGE_TAGS = ["<im_start>", "<im_end>"]
SAM_WRAPPERS = ("sam",)
PROJECTOR_FILE = "mm_projector.bin"
EMBEDDING = "llm.model.embed_tokens.weight"


class TokenizerLike(Protocol):
    """The part of `dataset.text.Tokenizer` that is needed here."""

    def __len__(self) -> int:
        """Number of token ids."""

    def add_tokens(self, tokens: list[str]) -> int:
        """Add what is not there yet; returns how many were added."""

    def convert_tokens_to_ids(self, tokens: str) -> int:
        """Id of a token."""


@dataclass(frozen=True)
class Options:
    """Where the parts come from, and what files cannot say. Every loader takes these as keywords."""

    vision_tower: StrPath | None = None
    """the tower's folder or OpenCLIP `.pt`; None: where the config says (beside the folder, in the cache)"""
    tower_activation: str | None = None
    """`gelu` or `quick_gelu`, needed for a tower without config.json (OpenCLIP files)"""
    tower_heads: int | None = None
    """attention heads of such a tower; None: width / 64, as in every named CLIP"""
    sam_file: StrPath | None = None
    """SAM's own file (`.pth` or safetensors)"""
    sam: SamConfig | None = None
    """SAM's sizes; None: from the file's metadata or its shapes (8 decoder heads)"""
    reinit_seg_modules: bool = False
    """SAM from `sam_file` and a fresh `text_hidden_fcs` even if the folder has trained ones"""
    out_dim: int | None = None
    """width of the mask prompts of a fresh `text_hidden_fcs`; None: SAM's prompt width"""
    low_precision_pe: bool = False
    """SAM's positional codes in the dtype of the other weights, as the published bf16 runs have them"""
    projector: StrPath | None = None
    """a trained projector instead of the folder's: a run of `--stage align`, or LLaVA's `mm_projector.bin`"""
    projector_type: str | None = None
    """type of a fresh projector; None: the folder's, or `mlp2x_gelu`"""
    reinit_projector: bool = False
    """start the projector afresh (a language model without one needs this, or `projector`)"""


def load_lisat(
    folder: StrPath, *, dtype: torch.dtype | None = torch.float32, **options: Any
) -> tuple[Lisat, LisatConfig]:
    """A whole LISAT on the CPU, in evaluation mode.

    Args:
        folder: ours (`save_lisat`) or a published merged LISAT; a path, or a published name in the cache.
        dtype: of all weights (SAM's positional matrix stays fp32); None keeps what is stored.
        options: see `Options`.

    Raises:
        ValueError: not such a folder, a part is not found, or tensors do not fit (complete list).
    """
    folder = resolve(str(folder), what="LISAT folder")
    layout = read_layout(folder)
    if not layout.whole:
        raise ValueError(
            f"{folder}: a base without segmentation modules ({layout.kind}); give a merged LISAT, or open it "
            "with load_llava (text only) or load_base (for training)"
        )
    gathered = _gather(folder, layout, Options(**options))
    config = LisatConfig.from_dict(gathered.fields)
    return assemble(config, gathered.sources, dtype), config


def load_llava(
    folder: StrPath, *, dtype: torch.dtype | None = torch.float32, seed: int = 0, **options: Any
) -> tuple[Lisat, LisatConfig]:
    """Tower, projector and language model only, of LISAT_PRE, our base, a LISAT, or a Llama with a projector
    from elsewhere (`seed` is that of a fresh one). Else as `load_lisat`."""
    folder = resolve(str(folder), what="base folder")
    gathered = _gather(folder, read_layout(folder), Options(**options), masks=False)
    config = LisatConfig.from_dict(gathered.fields)
    return assemble(config, gathered.sources, dtype, gathered.fresh, seed), config


def load_base(
    folder: StrPath,
    sam_file: StrPath | None = None,
    *,
    tokenizer: TokenizerLike | None = None,
    dtype: torch.dtype | None = torch.float32,
    new_rows: str = "normal",
    image_tags: bool = True,
    seed: int = 0,
    **options: Any,
) -> tuple[Lisat, LisatConfig]:
    """A LISAT ready for training: LISAT_PRE + tower + SAM, our own base, or an earlier LISAT.

    Segmentation modules of the folder are kept if it has them (`reinit_seg_modules=True` discards them, as
    the published program does); otherwise SAM comes from `sam_file` and `text_hidden_fcs` starts fresh.

    Args:
        folder: the base.
        sam_file: needed unless the folder holds a SAM that is kept.
        tokenizer: the base's tokenizer; `[SEG]`, `<im_start>`, `<im_end>` are added to it in place and the
            embedding and output matrices grow to its length. None leaves both as they are.
        dtype: see `load_lisat`.
        new_rows: `normal` (N(0, 0.02), as published) or `mean` of the old rows.
        image_tags: add and use `<im_start>`, `<im_end>`, as published.
        seed: of everything that starts fresh.
        options: see `Options`.
    """
    folder = resolve(str(folder), what="base folder")
    gathered = _gather(folder, read_layout(folder), Options(sam_file=sam_file, **options))
    config = LisatConfig.from_dict(gathered.fields)
    model = assemble(config, gathered.sources, dtype, gathered.fresh, seed)
    if tokenizer is not None:
        seg_token_id = add_lisat_tokens(tokenizer, image_tags)
        _grow_vocabulary(model, len(tokenizer), new_rows, seed)
        config.seg_token_id, config.mm_use_im_start_end = seg_token_id, image_tags
    return model, config


def describe_base(
    folder: StrPath, sam_file: StrPath | None = None, masks: bool = True, **options: Any
) -> LisatConfig:
    """The configuration that `load_base` (without `masks`: `load_llava`) would build, from settings and
    shapes alone; no weights are read.

    Every tensor that is missing, unexpected or mis-shaped is listed in the ValueError, as by the loaders.
    """
    folder = resolve(str(folder), what="base folder")
    gathered = _gather(folder, read_layout(folder), Options(sam_file=sam_file, **options), masks=masks)
    config = LisatConfig.from_dict(gathered.fields)
    plan_sources(model_shapes(build_on_meta(config)), gathered.sources, gathered.fresh)
    return config


def load_trained(
    weight: StrPath,
    base: StrPath,
    sam_file: StrPath | None = None,
    *,
    tokenizer: TokenizerLike | None = None,
    lora_r: int | None = None,
    lora_alpha: float = 16.0,
    lora_targets: str | None = None,
    image_tags: bool = True,
    dtype: torch.dtype | None = torch.float32,
    masks: bool = True,
    **options: Any,
) -> tuple[Lisat, LisatConfig]:
    """The model that a training run made: its tensors over the base it started from, LoRA folded in.

    Args:
        weight: a run or step folder with `trainable.safetensors`, or a consolidated state
            (`pytorch_model.bin`, its shards, or safetensors) with the published names or ours.
        base: the folder the run started from; read only as far as the state does not hold everything.
        sam_file: as in training; not read if state and base hold SAM.
        tokenizer: the base's tokenizer, see `load_base`.
        lora_r: checked against the state if given.
        lora_alpha: as in training: W + lora_alpha / r * B A.
        lora_targets: comma-separated module name parts; if given, LoRA of other modules is an error.
        image_tags: as in training, see `load_base`.
        dtype: see `load_lisat`; LoRA is folded in fp32 before the cast.
        masks: False for a run of LISAT_PRE: no segmentation modules, and no tokens are added.
        options: see `Options`.

    Raises:
        ValueError: no training state there, half a LoRA pair, another rank, or tensors that do not fit.
    """
    state = open_training_state(weight, lora_r, lora_targets)
    base = resolve(str(base), what="base folder")
    chosen = Options(sam_file=sam_file, **options)
    gathered = _gather(base, read_layout(base), chosen, overlay=state.plain, masks=masks)
    fields = gathered.fields
    rows = gathered.shapes[EMBEDDING][0]
    fields["llm"] = {**fields["llm"], "vocab_size": rows}
    tags = image_tags and fields.get("mm_use_im_start_end", True)
    tokens = {} if masks else {"mm_use_im_start_end": tags}
    if tokenizer is not None and masks:
        tokens = {"seg_token_id": add_lisat_tokens(tokenizer, image_tags), "mm_use_im_start_end": image_tags}
        if rows < len(tokenizer) and not state.new_rows:
            raise ValueError(
                f"{weight}: {rows} embedding rows for {len(tokenizer)} tokens; was it trained from {base}?"
            )
    elif state.new_rows:
        raise ValueError(f"{weight}: only new vocabulary rows were trained; give the base's tokenizer")
    model = assemble(LisatConfig.from_dict(fields), gathered.sources, None if state.folds else dtype)
    if tokenizer is not None and masks:
        _grow_vocabulary(model, len(tokenizer), "normal", 0)
    for name, value in tokens.items():
        setattr(model.config, name, value)
    fold_lora(model, state.lora, lora_alpha)
    fold_new_rows(model, state.new_rows)
    if dtype is not None:
        cast_weights(model, dtype)
    return model, model.config


def add_lisat_tokens(tokenizer: TokenizerLike, image_tags: bool = True) -> int:
    """Add `[SEG]`, then `<im_start>`, `<im_end>` (the published order); returns the id of `[SEG]`."""
    tokenizer.add_tokens([SEG_TOKEN])
    if image_tags:
        tokenizer.add_tokens(IMAGE_TAGS)
    return int(tokenizer.convert_tokens_to_ids(SEG_TOKEN))


def _grow_vocabulary(model: Lisat, size: int, new_rows: str, seed: int) -> None:
    old = model.config.llm["vocab_size"]
    if size < old:
        logger.info("the embedding has %d rows for %d tokens; the surplus stays", old, size)
    elif size > old:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_vocabulary(size, new_rows)


def check_keys(
    names: Mapping[str, Shape], key_map: KeyMap, config: LisatConfig, parts: tuple[str, ...] = ()
) -> str:
    """Place a list of names on a model without weights; returns the counts, ValueError on any fault.

    Args:
        names: name -> shape.
        key_map: of the layout.
        config: of the model.
        parts: prefixes of the parts that the list must cover; empty for all.
    """
    report = plan(names, model_shapes(build_on_meta(config)), key_map)
    report.missing = [name for name in report.missing if name.startswith(parts or ("",))]
    report.raise_if_faulty("key list")
    return report.summary()


@dataclass
class _Gathered:
    """Configuration fields, sources in order of priority, our names -> shapes over all of them, and the
    prefixes of names that may be in none of them."""

    fields: dict[str, Any]
    sources: list[Source]
    shapes: dict[str, Shape]
    fresh: tuple[str, ...] = ()


def _gather(
    folder: Path, layout: Layout, options: Options, overlay: Source | None = None, masks: bool = True
) -> _Gathered:
    """Sources (training state, projector, tower, SAM file, the folder: the first that has a tensor wins) and
    config."""
    key_map = map_lisat_key if layout.published else map_own_key
    own_sam = layout.whole and not options.reinit_seg_modules
    fresh = () if own_sam or not masks else ("text_hidden_fcs.",)
    if not masks:
        key_map = dropping(key_map, SEG_PARTS, "segmentation modules are not wanted")
    elif options.reinit_seg_modules:
        key_map = dropping(key_map, SEG_PARTS, "segmentation modules start fresh")
    fields = dict(layout.fields)
    sources = [overlay] if overlay is not None else []
    if options.projector is not None:
        path = find_training_state(options.projector)
        path = path / PROJECTOR_FILE if (path / PROJECTOR_FILE).is_file() else path
        sources.append(Source(WeightFiles(path), map_projector_key, str(path)))
    if options.reinit_projector or options.projector is not None or layout.kind == "published_llm":
        key_map, fresh = _new_projector(folder, layout, options, sources, fields, key_map, fresh)
    main = Source(WeightFiles(folder), key_map, str(folder))
    if layout.published or options.vision_tower is not None:
        fields["vision"], tower = _tower(folder, layout, options, [*sources, main])
        sources += [tower] if tower is not None else []
    held = {name for source in sources for name in source.shapes()}
    if options.sam_file is not None and masks and not own_sam and not _whole_sam(held):
        path = resolve(str(options.sam_file), near=[folder], what="SAM file")
        sources.append(Source(WeightFiles(path, unwrap=SAM_WRAPPERS), map_sam_key, str(path)))
    elif options.sam_file is not None:
        logger.info("%s is not read: the SAM comes from elsewhere or is not wanted", options.sam_file)
    sources.append(main)
    shapes = {name: shape for source in reversed(sources) for name, shape in source.shapes().items()}
    if not masks:
        return _Gathered(fields | {"sam": None, "seg_token_id": -1}, sources, shapes, fresh)
    if options.sam is not None:
        fields["sam"] = options.sam
    elif not own_sam or "sam" not in fields:
        fields["sam"] = _sam_config(sources, shapes, folder)
    projection, prompt = "text_hidden_fcs.0.2.bias", "sam.prompt_encoder.no_mask_embed.weight"
    fields["out_dim"] = (
        shapes[projection][0] if projection in shapes else options.out_dim or shapes[prompt][1]
    )
    if options.low_precision_pe:
        sam = fields["sam"]
        sam = sam if isinstance(sam, SamConfig) else SamConfig.from_dict(sam)
        fields["sam"] = replace(sam, low_precision_pe=True)
    return _Gathered(fields, sources, shapes, fresh)


def _new_projector(
    folder: Path,
    layout: Layout,
    options: Options,
    sources: list[Source],
    fields: dict[str, Any],
    key_map: KeyMap,
    fresh: tuple[str, ...],
) -> tuple[KeyMap, tuple[str, ...]]:
    """Key map of the folder and what may start fresh where the projector is not the folder's; its type goes
    into `fields`."""
    found = {name: s for source in sources for name, s in source.shapes().items()}
    found = {name: shape for name, shape in found.items() if name.startswith("mm_projector.")}
    if not found and not options.reinit_projector:
        raise ValueError(
            f"{folder} is a language model without projector: train one first (train_lisat.py --stage align "
            "--reinit_projector), or name a trained one (--projector)"
        )
    kind = options.projector_type or fields.get("mm_projector_type") or "mlp2x_gelu"
    fields["mm_projector_type"] = infer_projector_type(found) if found else kind
    fields["mm_hidden_size"] = None  # the tower's
    reason = "the projector comes from elsewhere" if found else "the projector starts fresh"
    return dropping(key_map, ("mm_projector.",), reason), fresh if found else (*fresh, "mm_projector.")


def _whole_sam(names: set[str]) -> bool:
    return {"sam.image_encoder.pos_embed", "sam.mask_decoder.iou_token.weight"} <= names


def _tower(
    folder: Path, layout: Layout, options: Options, holders: list[Source]
) -> tuple[dict[str, Any], Source | None]:
    """Vision configuration and, if the tower has a place of its own, its tensors."""
    wanted, unknown = options.vision_tower or layout.tower, (options.tower_activation, options.tower_heads)
    inside = {k: v for s in holders for k, v in s.shapes().items() if k.startswith("vision_tower.")}
    try:
        path = resolve(str(wanted or ""), near=[folder], what="vision tower")
    except ValueError as error:
        if options.vision_tower is not None or not inside:
            raise ValueError(f"{error} Or name the tower's folder with --vision_tower.") from error
        logger.info("the tower %s is not here; the one inside %s is taken", wanted, folder)
        return infer_vision_config(inside, *unknown), None
    if is_open_clip(path):
        source = Source(StateTensors(read_open_clip(path)), map_own_key, str(path))
        return infer_vision_config(source.shapes(), *unknown), source
    source = Source(WeightFiles(path), map_tower_key, str(path)) if has_weights(path) else None
    config = read_vision_config(path)
    if config is None:
        config = infer_vision_config(source.shapes() if source else inside, *unknown)
    return config, source


def _sam_config(sources: list[Source], shapes: dict[str, Shape], folder: Path) -> SamConfig:
    if "sam.image_encoder.pos_embed" not in shapes:
        raise ValueError(f"{folder} holds no SAM: give its file (--vision_pretrained sam_vit_h_4b8939.pth)")
    for source in sources:
        if source.key_map is map_sam_key:
            stated = sam_config_of_file(source.files.metadata(), source.label)
            if stated is not None:
                return stated
    return infer_sam_config(shapes)


if __name__ == "__main__":
    from model.check_keys import main

    main()
