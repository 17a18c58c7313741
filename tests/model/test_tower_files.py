"""Towers and SAM files in every form they are distributed in."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model.checkpoint import load_base, load_lisat, save_lisat
from model.clip import build_vision_tower, tower_features
from model.key_maps import published_key
from model.lisat import Lisat
from model.tower_files import convert_open_clip, save_tower_folder
from scripts.convert_remoteclip import main as convert
from tests.model.checkpoint_tools import base_tokenizer, change, equal, write_bases
from tests.tiny_lisat import SAM, tiny_model, tiny_tokenizer


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """The base folder without masks, and SAM's file."""
    return write_bases(tmp_path)


def published(tmp_path: Path) -> tuple[Lisat, Path, Path]:
    """A model, its published folder, and its tower moved beside it."""
    model = tiny_model()
    folder = save_lisat(model, tmp_path / "m", tokenizer=tiny_tokenizer(), layout="published")
    tower = tmp_path / "my_tower"
    shutil.move(folder / "vision_tower", tower)
    raw = json.loads((folder / "config.json").read_text())
    raw["mm_vision_tower"] = "/home/somebody/towers/my_tower"  # where it was at training time
    (folder / "config.json").write_text(json.dumps(raw))
    return model, folder, tower


def test_tower_beside_the_checkpoint_in_every_naming(tmp_path: Path) -> None:
    model, folder, tower = published(tmp_path)
    weights = tower / "model.safetensors"
    assert equal(load_lisat(folder)[0], model)
    full = {
        "vision_model.embeddings.position_ids": torch.arange(5),
        "text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2),
        "text_projection.weight": torch.zeros(2),
        "visual_projection.weight": torch.zeros(2),
        "logit_scale": torch.zeros(()),
    }
    change(weights, lambda state: state | full)
    assert equal(load_lisat(folder)[0], model)
    raw = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": raw}))
    assert equal(load_lisat(folder)[0], model)
    change(weights, lambda state: {name.removeprefix("vision_model."): t for name, t in state.items()})
    assert equal(load_lisat(folder)[0], model)
    change(weights, lambda state: state | {"head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="head.weight"):
        load_lisat(folder)


def test_tower_inside_the_checkpoint(tmp_path: Path) -> None:
    model, folder, tower = published(tmp_path)
    inside = {published_key(n): t for n, t in model.state_dict().items() if n.startswith("vision_tower.")}
    change(folder / "model.safetensors", lambda state: state | inside)
    (tower / "model.safetensors").unlink()
    assert equal(load_lisat(folder)[0], model)
    shutil.rmtree(tower)
    with pytest.raises(ValueError, match="gelu"):
        load_lisat(folder)
    with pytest.raises(ValueError, match="number of attention heads"):  # the tower is too narrow to tell
        load_lisat(folder, tower_activation="quick_gelu")
    heads = model.config.vision["num_attention_heads"]
    again, config = load_lisat(folder, tower_activation="quick_gelu", tower_heads=heads)
    assert equal(again, model) and config.vision["num_attention_heads"] == heads


def test_absent_tower_is_named(tmp_path: Path) -> None:
    _, folder, tower = published(tmp_path)
    shutil.rmtree(tower)
    with pytest.raises(ValueError, match="vision tower '/home/somebody/towers/my_tower' was not found"):
        load_lisat(folder)


class QuickGELU(nn.Module):
    """OpenAI's approximation."""

    def forward(self, x: Tensor) -> Tensor:
        """x sigmoid(1.702 x)."""
        return x * torch.sigmoid(1.702 * x)


class OpenClipBlock(nn.Module):
    """A pre-norm block with OpenCLIP's names, on PyTorch's own attention module."""

    def __init__(self, width: int, heads: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, hidden), "gelu": act, "c_proj": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential()
        for name, layer in layers.items():
            self.mlp.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> the same."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClipTower(nn.Module):
    """A CLIP vision transformer with OpenCLIP's names, 28 pixels in patches of 14."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int, act: nn.Module) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.proj = nn.Parameter(torch.randn(width, 16))
        self.conv1 = nn.Conv2d(3, width, 14, 14, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        blocks = [OpenClipBlock(width, heads, hidden, act) for _ in range(layers)]
        self.transformer.resblocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 28, 28) -> patch states before the last block (B, 4, width)."""
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer.resblocks[:-1]:
            x = block(x)
        return x[:, 1:]


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_open_clip_tower_gives_open_clip_features(tmp_path: Path, activation: str) -> None:
    torch.manual_seed(0)
    theirs = OpenClipTower(128, 2, 256, 3, nn.GELU() if activation == "gelu" else QuickGELU()).eval()
    state = {f"visual.{name}": tensor for name, tensor in theirs.state_dict().items()}
    state |= {"token_embedding.weight": torch.zeros(3, 2), "logit_scale": torch.zeros(())}
    state |= {"transformer.resblocks.0.ln_1.weight": torch.zeros(2), "positional_embedding": torch.zeros(2)}
    file = tmp_path / "RemoteCLIP.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{name}": t for name, t in state.items()}}, file)
    convert([str(file), str(tmp_path / "tower"), "--activation", activation])
    folder = tmp_path / "tower"
    config = json.loads((folder / "config.json").read_text())
    tower = build_vision_tower({k: v for k, v in config.items() if k not in ("architectures", "model_type")})
    stored = load_file(folder / "model.safetensors")
    tower.load_state_dict({name.removeprefix("vision_model."): t for name, t in stored.items()})
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.allclose(tower_features(tower.eval(), images, -2, "patch"), theirs(images), atol=1e-5)
    with pytest.raises(ValueError, match="visual.trunk.weight"):
        convert_open_clip(state | {"visual.trunk.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="no tensor named visual"):
        convert_open_clip({"logit_scale": torch.zeros(())})


def test_open_clip_file_as_the_tower_of_a_checkpoint(tmp_path: Path) -> None:
    config = tiny_model().config
    vision = config.vision | {"hidden_size": 64, "num_attention_heads": 1, "hidden_act": "gelu"}
    model = Lisat(replace(config, vision=vision, mm_hidden_size=64)).eval()
    folder = save_lisat(model, tmp_path / "m", tokenizer=tiny_tokenizer(), layout="published")
    other = OpenClipTower(64, 1, 24, 2, nn.GELU())
    torch.save({f"visual.{name}": t for name, t in other.state_dict().items()}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="activation None"):
        load_lisat(folder, vision_tower=tmp_path / "clip.pt")
    again, loaded = load_lisat(folder, vision_tower=tmp_path / "clip.pt", tower_activation="gelu")
    assert loaded.vision["hidden_act"] == "gelu"
    assert torch.equal(again.vision_tower.embeddings.class_embedding, other.class_embedding)
    assert torch.equal(again.llm.lm_head.weight, model.llm.lm_head.weight)


@pytest.mark.parametrize("wrapped", [False, True])
def test_sam_pickle_with_and_without_wrapper(tmp_path: Path, bases: tuple[Path, Path], wrapped: bool) -> None:
    sam = tiny_model().sam
    state = dict(sam.state_dict()) | {"pixel_mean": torch.zeros(3), "pixel_std": torch.ones(3)}
    torch.save({"sam": state} if wrapped else state, tmp_path / "sam.pth")
    model, config = load_base(bases[0], tmp_path / "sam.pth", tokenizer=base_tokenizer(), sam=SAM)
    assert equal(model.sam, sam) and config.sam == SAM
    inferred = load_base(bases[0], tmp_path / "sam.pth", tokenizer=base_tokenizer())[1].sam
    assert inferred == replace(SAM, decoder_heads=8)
    torch.save(state | {"memory.weight": torch.zeros(1)}, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="memory.weight"):
        load_base(bases[0], tmp_path / "sam.pth", tokenizer=base_tokenizer())


def test_tower_folder_is_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    model = tiny_model()
    tower = {n: t for n, t in model.state_dict().items() if n.startswith("vision_tower.")}
    folder = save_tower_folder(tmp_path / "tower", tower, model.config.vision)
    assert equal(CLIPVisionModel.from_pretrained(folder), model.vision_tower)
