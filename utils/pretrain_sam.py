"""How the tiny promptable SAM was made: points, boxes, masks and descriptions of objects of synthetic scenes.

Geometric prompts go through SAM's own prompt encoder. Descriptions (kind, colour, "leftmost", "nearest to"
and its anchor, "at 5 11" or any mixture) are sums of word vectors that live only here: they stand in for the
semantics that the real SAM's features owe to scale, and are thrown away afterwards. So is a linear reading
of kind, colour and place from every cell of the embedding; without it kinds were told apart by colour alone.

Shapes: B images, M prompts over all images, C prompt width, G low-resolution side of the mask logits.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset.image import ImageProcessor
from dataset.synthetic import COLOURS, EXTREMES, KINDS, QUERY_KINDS, RELATIONS, Scene, Terms, ask
from dataset.synthetic_qa import GRID, ScenePool, grid_position, patch_targets
from model.sam import Sam
from utils.muon import muon_and_adamw, update
from utils.pretrain_llava import cosine_rate

log = logging.getLogger(__name__)
VOCABULARY: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "extreme": EXTREMES,
    "relation": RELATIONS,
    "anchor_kind": KINDS,
    "anchor_colour": tuple(COLOURS),
}
ASKED = (*QUERY_KINDS, "position", "size", "size", "relation", "relation")  # the slow ones more often


class Words(nn.Module):
    """Learned vectors for every field of `Terms`, grid column and grid row; a description is their sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (*(len(names) for names in VOCABULARY.values()), GRID, GRID)
        self.tables = nn.ModuleList(nn.Embedding(size + 1, width, padding_idx=0) for size in sizes)

    def forward(self, words: Tensor) -> Tensor:
        """words (M, 8) long, 0 where a word is missing -> one sparse prompt each, (M, 1, C)."""
        return sum(table(words[:, i]) for i, table in enumerate(self.tables))[:, None]


class CellTeacher(nn.Module):
    """Linear reading of kind and colour from every cell of the image embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.kind = nn.Linear(width, len(KINDS) + 1)
        self.colour = nn.Linear(width, len(COLOURS) + 1)

    def forward(self, embeddings: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """embeddings (B, C, G, G), cells (B, G * G, 7) of `patch_targets` -> loss, and the share of the
        object cells whose kind is named rightly (scalars). Cells with an object count twice for the kind."""
        features = embeddings.flatten(2).transpose(1, 2)
        kind, colour = cells[..., 0].long(), cells[..., 1].long()
        shown, guess = kind > 0, self.kind(features)
        loss = F.cross_entropy(guess.flatten(0, 1), kind.flatten())
        loss = loss + F.cross_entropy(guess[shown], kind[shown])
        loss = loss + F.cross_entropy(self.colour(features).flatten(0, 1), colour.flatten())
        return loss, (guess.argmax(-1) == kind)[shown].float().mean()


@dataclass
class Prompts:
    """Geometric and described prompts of one batch. `image` and `target` list the geometric ones first."""

    coords: Tensor  # (Mg, 3, 2) x, y pixels
    labels: Tensor  # (Mg, 3): 1 inside, 0 outside, 2 and 3 box corners, -1 nothing
    dense: Tensor  # (Mg,) bool: give the rough mask as well
    words: Tensor  # (Mw, 8)
    image: Tensor  # (Mg + Mw,) index of the image
    target: Tensor  # (Mg + Mw, G, G) share of each low-resolution cell that is inside


def _points(scene: Scene, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Three (x, y) with labels: a click inside, at times one outside, or a jittered box, or click and box."""
    thing = scene.objects[index]
    rows, columns = np.nonzero(thing.mask)
    at = rng.integers(len(rows))
    click = (columns[at], rows[at])
    coords, labels = np.zeros((3, 2), np.float32), np.full(3, -1)
    draw = rng.random()
    if draw < 0.7:
        coords[0], labels[0] = click, 1
        if draw < 0.15 and len(scene.objects) > 1:
            other = scene.objects[(index + int(rng.integers(1, len(scene.objects)))) % len(scene.objects)]
            coords[1], labels[1] = (other.x, other.y), 0
    if draw >= 0.6:
        jitter = rng.normal(0, 1.0, 4)
        coords[1] = (columns.min() + jitter[0], rows.min() + jitter[1])
        coords[2] = (columns.max() + jitter[2], rows.max() + jitter[3])
        labels[1:] = 2, 3
    return coords, labels


def _word_ids(terms: Terms, cell: tuple[int, int] | None) -> list[int]:
    """Eight word ids, 0 for what is not said."""
    ids = [(*names, "").index(getattr(terms, field)) for field, names in VOCABULARY.items()]
    ids = [(i + 1) % (len(names) + 1) for i, names in zip(ids, VOCABULARY.values())]
    return [*ids, *((0, 0) if cell is None else (cell[0] + 1, cell[1] + 1))]


def _describe(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[list[int], tuple[int, ...]]]:
    """`count` descriptions as word ids, and the objects each is true of (none for things not there).

    Two thirds are what a question names; the rest are places, with or without what is there.
    """
    queries = ask(scene, rng, count, ASKED)
    described = []
    for number in range(count):
        if number < len(queries) and rng.random() < 0.67:
            query = queries[number]
            cell = None
            if len(query.targets) == 1 and rng.random() < 0.3:
                cell = grid_position(scene.objects[query.targets[0]], scene.size)
            described.append((_word_ids(query.terms, cell), query.targets))
            continue
        index = int(rng.integers(len(scene.objects)))
        thing = scene.objects[index]
        named = rng.random(2) < 0.4
        terms = Terms(thing.kind if named[0] else "", thing.colour if named[1] else "")
        described.append((_word_ids(terms, grid_position(thing, scene.size)), (index,)))
    return described


def draw_prompts(
    scenes: list[Scene], rng: np.random.Generator, geometric: int, described: int, low: int
) -> Prompts:
    """`geometric` and `described` prompts for every scene; targets pooled to (low, low)."""
    coords, labels, words, image, masks = [], [], [], [], []
    for number, scene in enumerate(scenes):
        for _ in range(geometric):
            index = int(rng.integers(len(scene.objects)))
            point, label = _points(scene, index, rng)
            coords.append(point)
            labels.append(label)
            image.append(number)
            masks.append(scene.objects[index].mask)
    for number, scene in enumerate(scenes):
        for word, members in _describe(scene, rng, described):
            words.append(word)
            image.append(number)
            masks.append(sum((scene.objects[i].mask for i in members), np.zeros_like(scene.objects[0].mask)))
    stacked = torch.from_numpy(np.stack(masks)).float()
    return Prompts(
        torch.from_numpy(np.stack(coords)),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(rng.random(len(coords)) < 0.15),
        torch.tensor(words),
        torch.tensor(image),
        F.adaptive_avg_pool2d(stacked[:, None], low)[:, 0],
    )


def mask_loss(logits: Tensor, target: Tensor) -> Tensor:
    """2 x binary cross entropy + 3 x dice over (M, G, G), mean over prompts."""
    bce = F.binary_cross_entropy_with_logits(logits, target)
    share = logits.sigmoid().flatten(1)
    wanted = target.flatten(1)
    dice = 1 - (2 * (share * wanted).sum(1) + 1) / (share.sum(1) + wanted.sum(1) + 1)
    return 2 * bce + 3 * dice.mean()


def sam_logits(sam: Sam, words: Words, embeddings: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Logits (M, G, G) and IoU guesses (M,) of all prompts over image embeddings (B, C, G / 4, G / 4)."""
    split = len(prompts.coords)
    sparse = sam.prompt_encoder.sparse(prompts.coords, prompts.labels)
    rough = F.max_pool2d(prompts.target[:split, None], 5, 1, 2) * 12 - 6
    dense = sam.prompt_encoder.dense(None, split)
    dense = torch.where(prompts.dense[:, None, None, None], sam.prompt_encoder.dense(rough, split), dense)
    first, first_iou = sam.decode(embeddings, sparse, dense, prompts.image[:split])
    second, second_iou = sam.decode(embeddings, words(prompts.words), None, prompts.image[split:])
    return torch.cat((first, second))[:, 0], torch.cat((first_iou, second_iou))[:, 0]


def soft_iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of thresholded logits and targets per prompt, (M,); 1 where both are empty."""
    shown, wanted = (logits > 0).flatten(1), (target > 0.5).flatten(1)
    union = (shown | wanted).sum(1)
    return torch.where(union > 0, (shown & wanted).sum(1) / union.clamp_min(1), 1.0)


def _cells(scenes: list[Scene], patch: int) -> Tensor:
    return torch.from_numpy(np.stack([patch_targets(scene, patch) for scene in scenes]))


def train_cells(
    sam: Sam,
    teacher: CellTeacher,
    pool: ScenePool,
    processor: ImageProcessor,
    *,
    steps: int,
    batch: int = 16,
    rate: float = 1.5e-3,
    seed: int = 2,
) -> None:
    """First stage, the encoder alone: what is in every cell. 50 steps of warm-up, cosine decay."""
    rng = np.random.default_rng(seed)
    optimizers = muon_and_adamw([(sam.image_encoder, 1.0), (teacher, 1.0)], rate)
    for step in range(steps):
        scenes = [pool.draw(rng) for _ in range(batch)]
        images = torch.stack([processor.sam(scene.image)[0] for scene in scenes])
        loss, right = teacher(sam.encode(images), _cells(scenes, sam.config.patch_size))
        update(optimizers, loss, rate * min((step + 1) / 50, cosine_rate(step / steps)))
        if step % 50 == 0:
            log.info("sam cells %d/%d: loss %.3f, kinds right %.3f", step, steps, loss.item(), right.item())


def train_sam(
    sam: Sam,
    words: Words,
    teacher: CellTeacher,
    pool: ScenePool,
    processor: ImageProcessor,
    *,
    seconds: float,
    batch: int = 8,
    geometric: int = 1,
    described: int = 7,
    rate: float = 1e-3,
    seed: int = 3,
    on_save: Callable[[int], None] | None = None,
) -> None:
    """Second stage: `mask_loss`, the error of the IoU head and half the teacher's loss.

    The rate warms up over 100 steps and decays by a cosine over `seconds` of wall time.
    """
    rng = np.random.default_rng(seed)
    optimizers = muon_and_adamw([(sam, 1.0), (words, 1.0), (teacher, 1.0)], rate)
    started, step, means = time.monotonic(), 0, {}
    while (progress := (time.monotonic() - started) / seconds) < 1:
        scenes = [pool.draw(rng) for _ in range(batch)]
        images = torch.stack([processor.sam(scene.image)[0] for scene in scenes])
        prompts = draw_prompts(scenes, rng, geometric, described, sam.config.low_res_size)
        embeddings = sam.encode(images)
        seen, right = teacher(embeddings, _cells(scenes, sam.config.patch_size))
        logits, guesses = sam_logits(sam, words, embeddings, prompts)
        overlap = soft_iou(logits.detach(), prompts.target)
        loss = mask_loss(logits, prompts.target)
        total = loss + F.mse_loss(guesses, overlap) + 0.5 * seen
        update(optimizers, total, rate * min((step + 1) / 100, cosine_rate(progress)))
        split = len(prompts.coords)
        figures = {
            "loss": loss.item(),
            "clicks": overlap[:split].mean().item(),
            "words": overlap[split:].mean().item(),
            "kinds": right.item(),
        }
        for name, value in figures.items():
            means[name] = 0.98 * means.get(name, value) + 0.02 * value
        if step % 100 == 0:
            text = ", ".join(f"{name} {value:.3f}" for name, value in means.items())
            log.info("sam %d (%.0f %% of the time): %s", step, 100 * progress, text)
        if on_save and step % 500 == 499:
            on_save(step)
        step += 1
    if on_save:
        on_save(step)
