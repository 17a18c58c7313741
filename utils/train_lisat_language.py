"""LISAT_PRE, the captioning base, as stages of LISAT training: projector alignment and instruction tuning.

`--stage align` trains the projector alone on captions; `--stage instruct` trains the projector and the
language model (LoRA, or all of it with `--lora_r 0`) on instructions with answers in words. No masks here.
"""

import logging
import math
from typing import Any

import torch
from torch import nn

from dataset.collate import Collator
from dataset.text import IM_END, IM_START, Tokenizer
from model.checkpoint import describe_base, load_llava
from model.lisat import LisatConfig
from model.lora import add_lora, mark_language_model
from model.losses import LossWeights
from utils.engine import DTYPES, Engine
from utils.train_lisat_config import TrainLisatConfig
from utils.train_lisat_data import InWords, shared_batches

logger = logging.getLogger(__name__)


def describe_language(config: TrainLisatConfig, tokenizer: Tokenizer) -> LisatConfig:
    """The configuration of the model to train, from settings and shapes; ValueError where parts do not fit.

    The picture is tagged as in the base: `<im_start>` and `<im_end>` only where it has and uses them.
    """
    lisat = describe_base(config.version, masks=False, **language_options(config))
    known = tokenizer.has_token(IM_START) and tokenizer.has_token(IM_END)
    lisat.mm_use_im_start_end = lisat.mm_use_im_start_end and config.use_mm_start_end and known
    lisat.conv_type, lisat.templates = config.conv_type, config.templates
    if len(tokenizer) > lisat.llm["vocab_size"]:
        raise ValueError(
            f"{config.version}: the tokenizer has {len(tokenizer)} tokens, the model "
            f"{lisat.llm['vocab_size']}; the tokenizer files belong to another checkpoint"
        )
    return lisat


def build_language_model(config: TrainLisatConfig, lisat: LisatConfig) -> nn.Module:
    """The base with what trains in this stage marked, its weights read."""
    options = language_options(config)
    model, _ = load_llava(config.version, dtype=DTYPES[config.precision], seed=config.seed, **options)
    model.config.mm_use_im_start_end = lisat.mm_use_im_start_end
    model.config.conv_type, model.config.templates = lisat.conv_type, lisat.templates
    model.config.loss_weights = LossWeights(ce=config.ce_loss_weight)
    torch.manual_seed(config.seed)  # LoRA starts alike in every process and after a restart
    mark_stage(model, config)
    if config.gradient_checkpointing:
        model.activation_checkpointing()
    return model


def mark_stage(model: nn.Module, config: TrainLisatConfig) -> nn.Module:
    """Add LoRA (stage instruct) and set what trains."""
    align = config.stage == "align"
    if config.lora_r and not align:
        targets = [name.strip() for name in config.lora_target_modules.split(",") if name.strip()]
        add_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, targets)
    also = [name.strip() for name in config.also_train.split(",") if name.strip()]
    mark_language_model(model, projector_only=align, also=also)
    return model


def language_options(config: TrainLisatConfig) -> dict[str, Any]:
    """Options of the loaders (`model.checkpoint.Options`)."""
    return {
        "vision_tower": config.vision_tower or None,
        "tower_activation": config.tower_activation or None,
        "projector": config.projector or None,
        "projector_type": config.projector_type or None,
        "reinit_projector": config.reinit_projector,
    }


class LanguageValidation:
    """Held-out loss and token accuracy over all supervised tokens, divided among the processes."""

    def __init__(self, data: InWords, collate: Collator, batch_size: int, workers: int = 0) -> None:
        self.data, self.batch_size, self.workers = data, batch_size, workers
        settings = collate.settings | {"model_max_length": None}  # nothing is cut or left out
        self.collate = Collator(collate.tokenizer, collate.processor, **settings)

    def __call__(self, engine: Engine) -> dict[str, float]:
        """`loss` (mean cross entropy of a token), `perplexity`, `token_accuracy`, and the numbers of rows and
        tokens behind them; equal in all processes."""
        sums = [0.0] * 4
        found = shared_batches(self.data, engine.world, self.collate, self.batch_size, self.workers)
        for batch, images in found:
            figures = engine.infer(batch | {"token_figures": True})
            rows = int(batch["offset"][images])
            values = [figures[name][:rows] for name in ("row_losses", "row_correct", "row_tokens")]
            sums = [a + float(v.double().sum()) for a, v in zip(sums, values)] + [sums[3] + rows]
        loss, correct, tokens, rows = engine.world.sum(sums)
        if not tokens:
            raise ValueError("--val_dataset: no supervised token; look at the answers")
        return {
            "loss": loss / tokens,
            "perplexity": math.exp(min(loss / tokens, 700)),
            "token_accuracy": correct / tokens,
            "n_rows": rows,
            "n_tokens": tokens,
        }
