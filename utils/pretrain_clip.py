"""How the tiny CLIP was made: crops of synthetic scenes against the names of what they show.

Every crop is compared with all names by a sigmoid loss (one "yes" for the name of the object, all "no" for
crops of ground, of half an object or of two), so that cosines of whole objects stand out. Two vocabularies
are learned side by side: kinds ("ship") and coloured kinds ("red ship"), in several sentences.

Shapes: B crops, c pixels, K names, E width of the common space.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dataset.synthetic import COLOURS, KINDS, Scene, draw_scene
from model.clip_tokenizer import ClipTokenizer
from model.instructsam.match import TEMPLATES, crop_boxes, prompts_of
from model.open_clip import OpenClip, OpenClipConfig, fit_square

logger = logging.getLogger(__name__)
SIDE, PATCH, WIDTH, TEXT_WIDTH, EMBED = 32, 8, 48, 8, 24
CROP_SCALE = 1.2
COLOURED = tuple(f"{colour} {kind}" for colour in COLOURS for kind in KINDS)


@dataclass
class ClipRecipe:
    """Settings of the recipe; the shipped file was made with the defaults."""

    out: str = "./checkpoints/instructsam_tiny"
    """Folder that gets clip.safetensors and clip_config.json."""
    scenes: int = 900
    """Scenes to draw; each crop is seen in eight orientations."""
    steps: int = 2500
    """Training steps."""
    batch_size: int = 96
    """Crops per step."""
    learning_rate: float = 3e-3
    """Highest learning rate."""
    threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of weights and data."""


def new_clip() -> OpenClip:
    """The network with random weights: 32-pixel crops, three picture and two text layers."""
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    vision = shared | {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "image_size": SIDE}
    vision |= {"patch_size": PATCH, "num_hidden_layers": 3, "num_attention_heads": 3}
    text = shared | {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "vocab_size": 49408}
    text |= {"max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    return OpenClip(OpenClipConfig(vision, text, EMBED))


def crop(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """What the matcher would see of a box xywh: uint8 (c, c, 3)."""
    window = crop_boxes(box[None], *image.shape[:2], CROP_SCALE)[0].tolist()
    return np.asarray(fit_square(Image.fromarray(image).crop(window), SIDE))


def object_box(mask: np.ndarray) -> np.ndarray:
    """Box xywh of a mask, float64 (4,), width = last - first column."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], np.ptp(columns), np.ptp(rows)], np.float64)


def crops_of(scene: Scene, rng: np.random.Generator) -> tuple[list[np.ndarray], list[int]]:
    """Crops and their names (index into `COLOURED`, -1 for none): two slightly wrong boxes of every object,
    one beside it, one of a part of it, and one anywhere."""
    crops, names = [], []
    boxes = [object_box(thing.mask) for thing in scene.objects]
    for thing, box in zip(scene.objects, boxes):
        name = COLOURED.index(f"{thing.colour} {thing.kind}")
        sides = np.tile(np.maximum(box[2:], 4), 2)
        near = [box + rng.uniform(-0.12, 0.12, 4) * sides for _ in range(2)]
        shifted = box + np.array([*rng.choice([-0.5, 0.5], 2), *rng.uniform(-0.2, 0.6, 2)]) * sides
        share = rng.uniform(0.3, 0.6, 2)
        part = np.concatenate([box[:2] + rng.uniform(0, 1, 2) * (1 - share) * box[2:], share * box[2:]])
        anywhere = np.array([*rng.uniform(0, scene.size - 12, 2), *rng.uniform(6, 60, 2)])
        for number, one in enumerate((*near, shifted, part, anywhere)):
            one[:2] = one[:2].clip(0, scene.size - 3)
            one[2:] = one[2:].clip(2, None)
            if number >= 2 and max(_iou(one, other) for other in boxes) > 0.4:
                continue
            crops.append(crop(scene.image, one))
            names.append(name if number < 2 else -1)
    return crops, names


def _iou(one: np.ndarray, other: np.ndarray) -> float:
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[:2] + one[2:], other[:2] + other[2:])
    shared = float(np.prod((high - low).clip(0)))
    return shared / max(float(np.prod(one[2:]) + np.prod(other[2:])) - shared, 1e-9)


def turned(pixels: Tensor, turn: int) -> Tensor:
    """Crops (B, c, c, 3) in one of the eight orientations of a square."""
    pixels = pixels.rot90(turn % 4, (1, 2))
    return pixels.flip(2) if turn >= 4 else pixels


def train(recipe: ClipRecipe) -> OpenClip:
    """A CLIP trained on scenes that are drawn here; logs the loss and, at the end, held-out accuracy."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed + 1)
    crops, names = [], []
    for _ in range(recipe.scenes):
        some, theirs = crops_of(draw_scene(rng), rng)
        crops += some
        names += theirs
    pixels, labels = torch.from_numpy(np.stack(crops)), torch.tensor(names)
    logger.info("%d crops, %d of them of objects", len(labels), int((labels >= 0).sum()))
    clip, tokenizer = new_clip().train(), ClipTokenizer()
    bias = torch.nn.Parameter(torch.tensor(-4.0))
    optimiser = torch.optim.AdamW([*clip.parameters(), bias], recipe.learning_rate, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, recipe.steps, pct_start=0.1)
    ids = {key: tokenizer(prompts_of(KINDS + COLOURED, key)) for key in TEMPLATES}
    for step in range(recipe.steps):
        chosen = torch.randint(len(labels), (recipe.batch_size,))
        features = clip.encode_image(clip.normalise(turned(pixels[chosen], int(rng.integers(8)))))
        template = list(TEMPLATES)[int(rng.integers(len(TEMPLATES)))]
        loss = sigmoid_loss(clip, features, clip.encode_text(ids[template]), labels[chosen], bias)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            logger.info("step %d, loss %.4f", step, loss.item())
    clip.eval().requires_grad_(False)
    logger.info("held out: %s", accuracy(clip, tokenizer, seed=recipe.seed + 1000))
    return clip


def sigmoid_loss(clip: OpenClip, crops: Tensor, names: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid loss of crops (B, E) against kinds and coloured kinds (K, E); labels index `COLOURED`, -1 is
    none of them."""
    logits = crops @ names.T * clip.logit_scale.exp().clamp(max=50) + bias
    wanted = torch.zeros_like(logits)
    rows = torch.nonzero(labels >= 0)[:, 0]
    wanted[rows, labels[rows] % len(KINDS)] = 1
    wanted[rows, len(KINDS) + labels[rows]] = 1
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1).mean()


@torch.inference_mode()
def accuracy(clip: OpenClip, tokenizer: ClipTokenizer, seed: int, scenes: int = 40) -> dict[str, float]:
    """On new scenes: share of objects whose kind is the most similar name, and the mean largest cosine of
    objects and of crops that show none."""
    rng = np.random.default_rng(seed)
    crops, names = [], []
    for _ in range(scenes):
        some, theirs = crops_of(draw_scene(rng), rng)
        crops += some
        names += theirs
    labels = torch.tensor(names)
    pictures = clip.encode_image(clip.normalise(torch.from_numpy(np.stack(crops))))
    cosines = pictures @ clip.encode_text(tokenizer(prompts_of(KINDS))).T
    best, kind = cosines.max(dim=1)
    shows = labels >= 0
    return {
        "kind": round(float((kind == labels % len(KINDS))[shows].float().mean()), 3),
        "cosine_objects": round(float(best[shows].mean()), 3),
        "cosine_others": round(float(best[~shows].mean()), 3),
    }


def open_clip_state(clip: OpenClip) -> dict[str, Tensor]:
    """Weights under OpenCLIP's names (the inverse of `model.open_clip.convert_whole_clip`)."""
    from model.open_clip import convert_whole_clip

    ours = clip.state_dict()
    state: dict[str, Tensor] = {
        "visual.class_embedding": ours["vision_tower.embeddings.class_embedding"],
        "visual.conv1.weight": ours["vision_tower.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": ours["vision_tower.embeddings.position_embedding.weight"],
        "visual.proj": ours["visual_projection.weight"].T,
        "positional_embedding": ours["text_tower.embeddings.position_embedding.weight"],
        "token_embedding.weight": ours["text_tower.embeddings.token_embedding.weight"],
        "text_projection": ours["text_projection.weight"].T,
        "logit_scale": ours["logit_scale"],
    }
    norms = {"visual.ln_pre": "vision_tower.pre_layrnorm", "visual.ln_post": "vision_tower.post_layernorm"}
    norms["ln_final"] = "text_tower.final_layer_norm"
    layers = {"visual.transformer.resblocks": ("vision_tower", clip.config.vision["num_hidden_layers"])}
    layers["transformer.resblocks"] = ("text_tower", clip.config.text["num_hidden_layers"])
    for theirs, (tower, count) in layers.items():
        for k in range(count):
            mine, block = f"{tower}.encoder.layers.{k}", f"{theirs}.{k}"
            norms |= {f"{block}.ln_1": f"{mine}.layer_norm1", f"{block}.ln_2": f"{mine}.layer_norm2"}
            norms |= {f"{block}.mlp.c_fc": f"{mine}.mlp.fc1", f"{block}.mlp.c_proj": f"{mine}.mlp.fc2"}
            norms[f"{block}.attn.out_proj"] = f"{mine}.self_attn.out_proj"
            for part in ("weight", "bias"):
                pieces = [ours[f"{mine}.self_attn.{name}_proj.{part}"] for name in "qkv"]
                state[f"{block}.attn.in_proj_{part}"] = torch.cat(pieces)
    for theirs, mine in norms.items():
        state |= {f"{theirs}.{part}": ours[f"{mine}.{part}"] for part in ("weight", "bias")}
    again = convert_whole_clip(state)
    lost = {name for name in ours if name not in again or not torch.equal(again[name], ours[name])}
    if lost or len(again) != len(ours):
        raise AssertionError(f"these weights would not be read back: {sorted(lost)}")
    return state


def save(clip: OpenClip, folder: str | Path) -> Path:
    """Write `clip.safetensors` (fp16, OpenCLIP's names) and `clip_config.json` (open_clip's form)."""
    from safetensors.torch import save as to_bytes

    from utils.io import atomic_write_bytes, atomic_write_json

    halves = {name: tensor.half().contiguous() for name, tensor in open_clip_state(clip).items()}
    sizes: Mapping[str, Any] = {
        "embed_dim": clip.config.embed_dim,
        "vision_cfg": {"image_size": SIDE, "layers": 3, "width": WIDTH, "patch_size": PATCH}
        | {"head_width": WIDTH // 3},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": TEXT_WIDTH, "heads": 2, "layers": 2},
    }
    atomic_write_json(Path(folder) / "clip_config.json", sizes)
    return atomic_write_bytes(Path(folder) / "clip.safetensors", to_bytes(halves))
