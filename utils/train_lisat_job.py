"""LISAT training: opens data and base, checks everything that can be checked early, and runs the engine."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from dataset.base import ReadOptions
from dataset.collate import Collator
from dataset.hybrid import Hybrid
from dataset.registry import load_dataset, load_family
from dataset.sample import Sample
from dataset.text import CONV, IGNORE_INDEX, SEG_TOKEN, Tokenizer
from model.checkpoint import add_lisat_tokens, describe_base, load_base
from model.lisat import LisatConfig
from model.lora import add_lora, mark_trainable
from model.losses import LossWeights
from utils.config import ConfigError
from utils.distributed import World, init_distributed, read_environment, shutdown
from utils.embedding_cache import EmbeddingCache, open_cache
from utils.engine import DTYPES, Engine, TrainResult
from utils.hub import resolve
from utils.merge_lisat import find_processor
from utils.metrics import ValidationMeters
from utils.optim import parameter_groups
from utils.run_dir import environment, setup_logging
from utils.sampling import BatchPlan, KeyedDataset, SizedData
from utils.train_lisat_config import FAMILIES, TrainLisatConfig
from utils.train_lisat_data import (
    InWords,
    Joined,
    Prepared,
    RandomDraws,
    Scorable,
    answers_in_words,
    as_caption,
    shared_batches,
    shows_image,
)
from utils.train_lisat_language import LanguageValidation, build_language_model, describe_language, mark_stage
from utils.val_captions import CaptionValidation

logger = logging.getLogger(__name__)


@dataclass
class Setup:
    """Everything but the weights."""

    config: TrainLisatConfig
    lisat: LisatConfig
    tokenizer: Tokenizer
    collate: Collator
    train_data: SizedData
    val_data: Dataset[Sample] | None
    captions: CaptionValidation | None = None


def dry_run(config: TrainLisatConfig) -> dict[str, Any]:
    """Check data, base and settings without reading weights; the facts of the run as JSON values.

    Raises:
        ConfigError: every fault found, together.
    """
    env = read_environment()
    config = config.settled()
    setup = open_setup(config)
    world = World(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))
    return preflight(setup, world) | model_facts(config, setup.lisat, setup.tokenizer) | environment()


def train(config: TrainLisatConfig) -> TrainResult:
    """Train as configured.

    Raises:
        ConfigError: faults of data, base or settings, all together, before weights are read.
        NonFiniteLoss: see Engine.run.
    """
    setup_logging(read_environment()["RANK"] == "0")
    config = config.settled()
    setup = open_setup(config)
    world = init_distributed(config.device)
    try:
        for name, value in preflight(setup, world).items():
            if name not in ("training_images", "effective_batch", "optimiser_steps"):  # the engine says these
                logger.info("%s: %s", name, value)
        engine = Engine(
            build_model(setup),
            config,
            world,
            setup.train_data,
            setup.collate,
            validate=validation(setup),
            prepare=CachedEmbeddings(config) if config.cache_image_embeddings else None,
        )
        return engine.run()
    finally:
        shutdown()


def open_setup(config: TrainLisatConfig) -> Setup:
    """Tokenizer, image and text pipelines and data sets; ConfigError lists every fault of all of them, and of
    what would be trained."""
    faults: list[str] = []
    try:
        config.accumulation(int(read_environment()["WORLD_SIZE"]))
    except ValueError as error:
        faults.append(str(error))
    if config.conv_type not in CONV:
        faults.append(f"--conv_type {config.conv_type}: unknown; choose one of {', '.join(CONV)}")
    lisat = tokenizer = processor = None
    try:
        version = resolve(config.version, what="base folder")
        tokenizer = Tokenizer.from_pretrained(version, model_max_length=config.model_max_length)
        if config.stage == "segmentation":
            lisat = _describe_lisat(config, tokenizer)
        else:
            lisat = describe_language(config, tokenizer)
        side = None if lisat.sam is None else lisat.sam.image_size
        processor = find_processor(config.version, side, config.vision_tower or None)
        model_facts(config, lisat, tokenizer)
    except (ValueError, OSError) as error:
        faults.append(str(error))
    parts, rates = _open_parts(config, faults)
    val_data = None
    if not config.no_eval:
        try:
            val_data = _open_validation(config)
        except (ValueError, OSError) as error:
            faults.append(f"--val_dataset: {error}")
    captions = None
    if config.val_caption and tokenizer is not None and processor is not None:
        try:
            captions = CaptionValidation(config, tokenizer, processor)
        except ValueError as error:
            faults.append(f"--val_caption: {error}")
    if faults:
        raise ConfigError(faults)
    collate = Collator(
        tokenizer,
        processor,
        conv_type=config.conv_type,
        model_max_length=config.model_max_length,
        num_patches=lisat.num_image_features,
        im_start_end=lisat.mm_use_im_start_end,
        sam_stream=lisat.sam is not None,
    )
    if config.stage == "segmentation" or config.sample_rates:
        alone = len(parts) == 1 and config.sampling == "seeded"
        data = parts[0] if alone else Hybrid(parts, rates, config.sampling)
    else:
        data = Joined(parts)
    data = Prepared(data, collate.fits, *_choice(config))
    return Setup(config, lisat, tokenizer, collate, data, val_data, captions)


def all_faults(error: ConfigError) -> ConfigError:
    """A fault of the command line together with those of data, base and model, as far as they can be told.

    So that everything is mended at once; what repeats a known fault is left out.
    """
    config = error.config
    if config is None:
        return error
    try:
        config.sources()
    except ValueError:  # known; the data sets can be looked at all the same
        config = replace(config, sample_rates="")
    try:
        open_setup(config.settled())
    except ConfigError as further:
        found = further.faults
    except (ValueError, OSError) as further:
        found = [str(further)]
    else:
        return error
    known = list(error.faults)
    nowhere = any(fault.startswith("--dataset_dir") for fault in known)
    for fault in found:
        about_data = fault.startswith(("--dataset ", "--val_dataset")) and "unknown" not in fault
        said = any(fault in other or other in fault for other in known)
        if not said and not (nowhere and about_data):
            known.append(fault)
    return ConfigError(known, config)


def _describe_lisat(config: TrainLisatConfig, tokenizer: Tokenizer) -> LisatConfig:
    """The configuration of the LISAT to train; its tokens are added to the tokenizer."""
    add_lisat_tokens(tokenizer, config.use_mm_start_end)
    check_seg_token(tokenizer)
    lisat = describe_base(config.version, config.vision_pretrained, **_base_options(config))
    lisat.mm_use_im_start_end = config.use_mm_start_end
    if config.image_size not in (0, lisat.sam.image_size):
        raise ValueError(f"--image_size {config.image_size}: this SAM takes {lisat.sam.image_size}")
    return lisat


def _choice(config: TrainLisatConfig) -> tuple[Any, Any]:
    """Which conversations the stage learns from (None = all), and what it makes of them."""
    if config.stage == "segmentation":
        return None, None
    change = as_caption if config.conv_type == "plain" else None
    return shows_image if config.stage == "align" else answers_in_words, change


def _open_validation(config: TrainLisatConfig) -> Dataset[Sample]:
    """The samples that `--val_dataset` gives to the stage's validation."""
    random = config.val_sampling == "official"
    options = _read_options(config, train=random)
    if random:
        options = replace(options, num_per_image=3, absent_rate=0.0, augment=0.0)
    data = load_dataset(config.val_dataset, config.dataset_dir, options)
    if config.stage != "segmentation":
        return InWords(data, config.val_limit, *_choice(config))
    return RandomDraws(data, config.val_limit, config.seed) if random else Scorable(data, config.val_limit)


def check_seg_token(tokenizer: Tokenizer) -> None:
    """ValueError unless `[SEG]` is exactly one id wherever it stands."""
    for text in (SEG_TOKEN, f"it is {SEG_TOKEN}.", f"{SEG_TOKEN} {SEG_TOKEN}"):
        ids = tokenizer.encode(text, bos=False)
        if ids.count(tokenizer.seg_token_id) != text.count(SEG_TOKEN):
            raise ValueError(f"{SEG_TOKEN} is not one token: {text!r} becomes {ids}; wrong tokenizer?")


def preflight(setup: Setup, world: World) -> dict[str, Any]:
    """Facts of the run's first micro-batch in this process; ValueError if there is nothing to learn in it."""
    config = setup.config
    accumulation = config.accumulation(world.size)
    plan = BatchPlan(len(setup.train_data), config.seed, config.batch_size, accumulation, world.size)
    keyed = KeyedDataset(setup.train_data)
    batch = setup.collate([keyed[key] for key in plan.keys(0, 0, world.rank)])
    supervised = int((batch["labels"] != IGNORE_INDEX).sum())
    if not supervised:
        raise ValueError(f"no supervised token in the first batch ({', '.join(batch['image_paths'])})")
    per_epoch = config.steps_per_epoch or math.ceil(plan.length / plan.global_batch)
    return {
        "training_images": plan.length,
        "validation_images": len(setup.val_data) if setup.val_data is not None else 0,
        "effective_batch": f"{plan.global_batch} ({config.batch_size} x {accumulation} x {world.size})",
        "optimiser_steps": config.epochs * per_epoch,
        "stage": config.stage,
        "seg_token_id": None if setup.lisat.sam is None else setup.tokenizer.seg_token_id,
        "vocabulary": len(setup.tokenizer),
        "first_batch": {
            "rows": len(batch["input_ids"]),
            "longest_row": batch["input_ids"].shape[1] + setup.lisat.num_image_features - 1,
            "supervised_tokens": supervised,
            "masks": sum(len(masks) for masks in batch["masks_list"]),
            "text": batch["conversation_list"][0],
        },
    }


def model_facts(config: TrainLisatConfig, lisat: LisatConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Sizes of the model, counted on one without memory: parameters, and those that train by lr group.

    Raises:
        ValueError: LoRA targets or learning rate multipliers that name nothing, or nothing to train.
    """
    from model.assembly import build_on_meta

    if lisat.sam is not None:
        rows = max(lisat.llm["vocab_size"], len(tokenizer))
        llm = {**lisat.llm, "vocab_size": rows}
        lisat = replace(lisat, llm=llm, seg_token_id=tokenizer.seg_token_id)
    with torch.device("meta"):
        model = _mark(build_on_meta(lisat), config)
    groups = parameter_groups(model, config.multipliers(), config.weight_decay)
    counts = {group.name: sum(p.numel() for p in group.params) for group in groups}
    total = sum(p.numel() for p in model.parameters())
    return {"parameters": total, "trainable_parameters": sum(counts.values()), "groups": counts}


def build_model(setup: Setup) -> nn.Module:
    """The base with LoRA and the published trainable set, its weights read."""
    config = setup.config
    if config.stage != "segmentation":
        return build_language_model(config, setup.lisat)
    model, lisat = load_base(
        config.version,
        config.vision_pretrained,
        tokenizer=setup.tokenizer,
        dtype=DTYPES[config.precision],
        new_rows=config.new_rows_init,
        image_tags=config.use_mm_start_end,
        seed=config.seed,
        **_base_options(config),
    )
    lisat.conv_type, lisat.templates = config.conv_type, config.templates
    lisat.loss_weights = LossWeights(config.ce_loss_weight, config.bce_loss_weight, config.dice_loss_weight)
    if config.text_fcs_scale != 1.0:
        _scale_prompts(model, config)
    torch.manual_seed(config.seed)  # LoRA starts alike in every process and after a restart
    _mark(model, config)
    if config.gradient_checkpointing:
        model.activation_checkpointing()
    return model


def validation(setup: Setup) -> Callable[[Engine], dict[str, float]] | None:
    """The validation of the stage; None without validation data."""
    if setup.val_data is None:
        return None
    config, captions = setup.config, setup.captions
    main: Callable[[Engine], dict[str, float]]
    if config.stage == "segmentation":
        main = Validation(setup)
    else:
        main = LanguageValidation(setup.val_data, setup.collate, config.val_batch_size, config.workers)
    return main if captions is None else lambda engine: main(engine) | captions(engine)


class Validation:
    """Teacher-forced gIoU and cIoU over all validation images, divided among the processes."""

    def __init__(self, setup: Setup) -> None:
        self.data, self.config = setup.val_data, setup.config
        settings = setup.collate.settings | {"inference": True, "model_max_length": None}
        self.collate = Collator(setup.tokenizer, setup.collate.processor, **settings)

    def __call__(self, engine: Engine) -> dict[str, float]:
        """gIoU, cIoU and the numbers of images and masks behind them; equal in all processes."""
        official = isinstance(self.data, RandomDraws)
        if official:
            self.data.number = engine.step
        size, workers = self.config.val_batch_size, self.config.workers
        meters = ValidationMeters()
        for batch, images in shared_batches(self.data, engine.world, self.collate, size, workers, official):
            logits = engine.infer(batch)["pred_masks"]
            found = list(zip(batch["image_paths"], logits, batch["masks_list"]))
            for path, prediction, masks in found[:images]:
                meters.update(prediction, masks, path)
        return {name: float(value) for name, value in meters.reduce().result().items()}


class CachedEmbeddings:
    """Replaces a batch's images by their SAM embeddings, each computed once."""

    def __init__(self, config: TrainLisatConfig) -> None:
        self.place, self.limit = config.cache_image_embeddings, config.cache_limit_gib
        self.precision = config.cache_precision
        self.cache: EmbeddingCache | None = None

    def __call__(self, engine: Engine, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `image_embeddings`."""
        if self.cache is None:
            self.cache = open_cache(engine.ds.module, self.place, self.limit, self.precision)
        return self.cache.replace(batch)


def _open_parts(config: TrainLisatConfig, faults: list[str]) -> tuple[list[Any], list[float]]:
    parts, rates = [], []
    for entry, spec, rate in config.sources():
        try:
            options = _read_options(config, train=True)
            if entry in FAMILIES:
                part = load_family(entry, spec, config.dataset_dir, options, config.skip_missing_data)
            else:
                part = load_dataset(spec, config.dataset_dir, options)
            parts.append(part)
            rates.append(rate)
        except (ValueError, OSError) as error:
            if config.skip_missing_data:
                logger.warning("--dataset %s is left out, the other shares grow: %s", entry, error)
            else:
                faults.append(f"--dataset {entry}: {error}")
    if not parts and not faults:
        faults.append(f"--dataset {config.dataset}: none of these data sets is there")
    return parts, rates


def _read_options(config: TrainLisatConfig, train: bool) -> ReadOptions:
    return ReadOptions(
        train=train,
        num_per_image=config.num_classes_per_sample,
        seed=config.seed if train else 0,
        templates=config.templates,
        prompt="answer",
        raster=config.raster,
        respect_ignore=True if config.respect_ignore else None,
        overlap=config.overlap,
        index=config.data_index,
        strict=config.strict_data,
        confirm_absent=config.confirm_absent if train else 0.0,
        augment=config.augment if train else 0.0,
    )


def _base_options(config: TrainLisatConfig) -> dict[str, Any]:
    return {
        "vision_tower": config.vision_tower or None,
        "tower_activation": config.tower_activation or None,
        "reinit_seg_modules": config.reinit_seg_modules,
        "low_precision_pe": config.low_precision_pe,
        "projector": config.projector or None,
        "out_dim": config.out_dim or None,
    }


def _mark(model: nn.Module, config: TrainLisatConfig) -> nn.Module:
    """Add LoRA and set what trains."""
    if config.stage != "segmentation":
        return mark_stage(model, config)
    if config.lora_r:
        targets = [name.strip() for name in config.lora_target_modules.split(",") if name.strip()]
        add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, targets)
    also = [name.strip() for name in config.also_train.split(",") if name.strip()]
    mark_trainable(model, new_rows_only=config.new_rows_only, also=also)
    if not config.train_mask_decoder:
        model.sam.mask_decoder.requires_grad_(False)
    return model


def _scale_prompts(model: nn.Module, config: TrainLisatConfig) -> None:
    from model.layouts import read_layout

    if read_layout(resolve(config.version)).whole and not config.reinit_seg_modules:
        logger.warning("--text_fcs_scale is not applied: text_hidden_fcs comes trained with the base")
        return
    last = model.text_hidden_fcs[0][2]
    with torch.no_grad():
        last.weight.mul_(config.text_fcs_scale)
        last.bias.mul_(config.text_fcs_scale)
