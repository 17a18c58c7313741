"""The recipe of the tiny CLIP: crops, loss, layout of the file; and what the shipped one can do."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.synthetic import KINDS, draw_scene
from model.clip_tokenizer import ClipTokenizer
from model.instructsam.match import prompts_of
from model.open_clip import clip_entry, load_open_clip
from tests.conftest import REPO
from utils.pretrain_clip import (
    COLOURED,
    SIDE,
    ClipRecipe,
    accuracy,
    crops_of,
    new_clip,
    object_box,
    save,
    sigmoid_loss,
    train,
    turned,
)


def test_crops_show_objects_or_none() -> None:
    rng = np.random.default_rng(0)
    scene = draw_scene(rng)
    crops, names = crops_of(scene, rng)
    assert {crop.shape for crop in crops} == {(SIDE, SIDE, 3)}
    shown = [COLOURED[name] for name in names if name >= 0]
    assert shown == [f"{t.colour} {t.kind}" for t in scene.objects for _ in range(2)]
    assert -1 in names
    mask = np.zeros((9, 9), np.uint8)
    mask[2:5, 3:9] = 1
    assert object_box(mask).tolist() == [3, 2, 5, 2]


def test_orientations_are_eight() -> None:
    pixels = torch.arange(4 * 4 * 3).reshape(1, 4, 4, 3)
    assert len({turned(pixels, k).numpy().tobytes() for k in range(8)}) == 8


def test_loss_is_lowest_for_the_right_names() -> None:
    clip = new_clip()
    clip.logit_scale.data.fill_(3.0)
    names = torch.eye(len(KINDS) + len(COLOURED))
    labels = torch.tensor([COLOURED.index("red pier"), -1])
    right = torch.zeros(2, len(names))
    right[0, labels[0] % len(KINDS)] = right[0, len(KINDS) + labels[0]] = 1
    assert KINDS[int(labels[0]) % len(KINDS)] == "pier"
    bias = torch.tensor(-8.0)
    best = sigmoid_loss(clip, right, names, labels, bias)
    assert best < sigmoid_loss(clip, right.flip(0), names, labels, bias)
    assert best < sigmoid_loss(clip, right * 0, names, labels, bias)


def test_saved_weights_are_read_back(tmp_path: Path) -> None:
    clip = train(ClipRecipe(scenes=2, steps=2, batch_size=4)).half().float()
    again = load_open_clip(save(clip, tmp_path), config=tmp_path / "clip_config.json")
    pixels = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(again.encode_image(pixels), clip.encode_image(pixels), atol=1e-5, rtol=0)
    ids = ClipTokenizer()(prompts_of(["ship", "red tank"]))
    torch.testing.assert_close(again.encode_text(ids), clip.encode_text(ids), atol=1e-5, rtol=0)


def test_the_shipped_one_knows_the_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    found = accuracy(clip_entry("drawn-scenes").load(), ClipTokenizer(), seed=77, scenes=12)
    assert found["kind"] > 0.6  # by chance 0.125
    assert found["cosine_objects"] > found["cosine_others"] + 0.2
