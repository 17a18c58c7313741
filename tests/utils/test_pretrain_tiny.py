"""The recipes of the tiny bases: a few steps of each make files that training can start from."""

from pathlib import Path

import numpy as np
import torch

from dataset.synthetic import COLOURS, KINDS, draw_scene
from dataset.synthetic_qa import ScenePool, grid_position
from model.checkpoint import load_base
from utils.pretrain_sam import Words, _describe, draw_prompts, mask_loss, sam_logits, soft_iou
from utils.pretrain_tiny import PretrainConfig, make_llava, make_sam


def test_both_recipes_write_bases_that_load(tmp_path: Path) -> None:
    for part, make in (("llava", make_llava), ("sam", make_sam)):
        make(
            PretrainConfig(
                part, str(tmp_path), scenes=4, tower_steps=1, cell_steps=1, seconds=0.5, batch_size=2
            )
        )
    model, config = load_base(tmp_path / "llava", tmp_path / "sam.safetensors")
    assert config.sam.image_size == 128 and config.llm["vocab_size"] == 898
    assert sum(f.stat().st_size for f in (tmp_path / "llava").iterdir()) < 5e6
    assert (tmp_path / "sam.safetensors").stat().st_size < 5e6
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_prompts_describe_their_targets() -> None:
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng) for _ in range(3)]
    prompts = draw_prompts(scenes, rng, geometric=4, described=5, low=64)
    assert prompts.image.tolist() == [i for i in range(3) for _ in range(4)] + [
        i for i in range(3) for _ in range(5)
    ]
    for (coords, labels), image, target in zip(
        zip(prompts.coords, prompts.labels), prompts.image[:12], prompts.target[:12]
    ):
        if labels[0] == 1:  # a click lies on its target
            x, y = (int(v) for v in coords[0])
            assert target[y // 2, x // 2] > 0
            assert scenes[image].image.shape == (128, 128, 3)
        if labels[1] == 2:  # a box surrounds it, up to the jitter
            rows, columns = torch.nonzero(target > 0.5, as_tuple=True)
            assert coords[1, 0] <= columns.min() * 2 + 6 and coords[2, 0] >= columns.max() * 2 - 6
            assert coords[1, 1] <= rows.min() * 2 + 6 and coords[2, 1] >= rows.max() * 2 - 6


def test_descriptions_say_what_questions_name() -> None:
    rng = np.random.default_rng(3)
    kinds, colours = list(KINDS), list(COLOURS)
    seen = set()
    for _ in range(30):
        scene = draw_scene(rng)
        for words, targets in _describe(scene, rng, 8):
            kind, colour, extreme, relation, anchor_kind, anchor_colour, column, row = words
            things = scene.objects
            fits = [
                i
                for i, thing in enumerate(things)
                if (not kind or thing.kind == kinds[kind - 1])
                and (not colour or thing.colour == colours[colour - 1])
                and (not column or (column - 1, row - 1) == grid_position(thing, scene.size))
            ]
            if extreme or relation:  # picks one of those that fit
                assert len(targets) == 1 and targets[0] in fits
                seen.add("extreme" if extreme else "relation")
                assert not relation or anchor_kind
            elif not column:
                assert sorted(targets) == fits
                seen.add("several" if len(fits) > 1 else "one" if fits else "nothing")
            else:
                assert set(targets) <= set(fits) and targets
                seen.add("place")
    assert seen == {"extreme", "relation", "several", "one", "nothing", "place"}


def test_a_few_steps_of_sam_training_lower_the_loss() -> None:
    from dataset.image import ImageProcessor
    from model.sam import build_sam

    torch.manual_seed(0)
    rng, pool = np.random.default_rng(1), ScenePool(2, seed=1)
    scenes = [pool.draw(rng) for _ in range(2)]
    prompts = draw_prompts(scenes, rng, 2, 2, 64)
    images = torch.stack([ImageProcessor(sam_size=128, clip_size=128).sam(s.image)[0] for s in scenes])
    sam, words = build_sam("sam_tiny"), Words(64)
    optimizer = torch.optim.AdamW([*sam.parameters(), *words.parameters()], lr=1e-3)
    losses = []
    for _ in range(15):
        logits, _ = sam_logits(sam, words, sam.encode(images), prompts)
        losses.append(mask_loss(logits, prompts.target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    full = torch.where(prompts.target > 0.5, 12.0, -12.0)
    assert (soft_iou(full, prompts.target) == 1).all() and mask_loss(
        full, (prompts.target > 0.5).float()
    ) < 0.01
