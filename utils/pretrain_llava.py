"""How the tiny vision-language base was made: a CLIP tower, a projector and a Llama that learn from words.

Stage 1 teaches the tower alone what each patch shows (kind, colour, where its object's centre is); stage 2
trains tower, projector and Llama on captions and questions of synthetic scenes. No `[SEG]` and no mask is
involved: the result plays the role that a pretrained LLaVA plays for the full-size model.

Shapes: B images, N patches, D tower width.
"""

import logging
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset.collate import Batch, collate
from dataset.image import ImageProcessor
from dataset.sample import Conversation, Sample
from dataset.synthetic import COLOURS, KINDS, Scene
from dataset.synthetic_qa import GRID, ScenePool, ask_and_answer, patch_targets
from dataset.text import Tokenizer
from model.clip import tower_features
from model.lisat import Lisat
from utils.muon import muon_and_adamw, update

log = logging.getLogger(__name__)


class PatchTeacher(nn.Module):
    """Linear heads on patch features that name kind and colour and point to the object's centre."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, len(KINDS) + 1)
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.shape = nn.Linear(width, 3)
        self.column = nn.Linear(width, GRID)
        self.row = nn.Linear(width, GRID)

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """features (B, N, D), targets (B, N, 7) of `patch_targets` -> scalar loss."""
        kind, colour = targets[..., 0].long().flatten(), targets[..., 1].long().flatten()
        loss = F.cross_entropy(self.kind(features).flatten(0, 1), kind)
        loss = loss + F.cross_entropy(self.colour(features).flatten(0, 1), colour)
        shown = targets[..., 0] > 0
        features, targets = features[shown], targets[shown]
        loss = loss + F.smooth_l1_loss(self.shape(features), targets[:, 2:5])
        loss = loss + F.cross_entropy(self.column(features), targets[:, 5].long())
        return loss + F.cross_entropy(self.row(features), targets[:, 6].long())


class SceneBatches:
    """Endless batches of scenes: pictures with patch targets, or whole batches of questions and answers."""

    def __init__(
        self, pool: ScenePool, tokenizer: Tokenizer, processor: ImageProcessor, patch: int, seed: int
    ) -> None:
        self.pool, self.tokenizer, self.processor, self.patch = pool, tokenizer, processor, patch
        self.rng = np.random.default_rng(seed)

    def scenes(self, count: int) -> tuple[list[Scene], Tensor]:
        """`count` scenes and their patch targets (B, N, 7)."""
        scenes = [self.pool.draw(self.rng) for _ in range(count)]
        return scenes, torch.from_numpy(np.stack([patch_targets(scene, self.patch) for scene in scenes]))

    def pictures(self, count: int) -> tuple[Tensor, Tensor]:
        """Tower inputs (B, 3, c, c) and patch targets (B, N, 7)."""
        scenes, targets = self.scenes(count)
        return torch.stack([self.processor.clip(scene.image) for scene in scenes]), targets

    def questions(self, count: int, questions: int) -> tuple[Batch, Tensor]:
        """A training batch of `count` scenes with about `questions` + 3 rows each, and patch targets."""
        scenes, targets = self.scenes(count)
        samples = []
        for scene in scenes:
            empty = np.zeros((0, *scene.image.shape[:2]), np.uint8)
            pairs = ask_and_answer(scene, self.rng, questions)
            samples.append(Sample("scene", scene.image, [Conversation([pair], empty) for pair in pairs]))
        return collate(samples, self.tokenizer, self.processor), targets


def cosine_rate(progress: float, floor: float = 0.05) -> float:
    """Factor on the learning rate at `progress` 0..1: half a cosine from 1 down to `floor`."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train_tower(
    tower: nn.Module,
    teacher: PatchTeacher,
    batches: SceneBatches,
    steps: int,
    batch: int = 32,
    rate: float = 1e-3,
) -> None:
    """Stage 1: the patch targets alone, 100 steps of warm-up, cosine decay over `steps`."""
    optimizers = muon_and_adamw([(tower, 1.0), (teacher, 1.0)], rate)
    started = time.monotonic()
    for step in range(steps):
        pictures, targets = batches.pictures(batch)
        loss = teacher(tower_features(tower, pictures), targets)
        update(optimizers, loss, rate * min((step + 1) / 100, cosine_rate(step / steps)))
        if step % 100 == 0:
            log.info("tower %d/%d loss %.3f, %.0f s", step, steps, loss.item(), time.monotonic() - started)


def train_llava(
    model: Lisat,
    teacher: PatchTeacher,
    batches: SceneBatches,
    *,
    seconds: float,
    batch: int = 8,
    questions: int = 8,
    rate: float = 1e-3,
    on_save: Callable[[int], None] | None = None,
) -> None:
    """Stage 2: language loss + 0.3 x patch loss, the tower at 0.3 of the rate.

    The rate warms up over 100 steps and decays by a cosine over `seconds` of wall time, which also ends the
    training. `on_save(step)` is called every 500 steps and at the end.
    """
    modules = [(model.llm, 1.0), (model.mm_projector, 1.0), (teacher, 1.0), (model.vision_tower, 0.3)]
    optimizers = muon_and_adamw(modules, rate)
    seen: list[Tensor] = []
    hook = model.mm_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    started, step, means = time.monotonic(), 0, {}
    while (progress := (time.monotonic() - started) / seconds) < 1:
        rows, targets = batches.questions(batch, questions)
        language = model(**rows)["ce_loss"]
        patches = teacher(seen.pop(), targets)
        update(optimizers, language + 0.3 * patches, rate * min((step + 1) / 100, cosine_rate(progress)))
        for name, value in (("language", language.item()), ("patches", patches.item())):
            means[name] = 0.98 * means.get(name, value) + 0.02 * value
        if step % 100 == 0:
            figures = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            log.info("llava %d (%.0f %% of the time): %s", step, 100 * progress, figures)
        if on_save and step % 500 == 499:
            on_save(step)
        step += 1
    hook.remove()
    if on_save:
        on_save(step)
