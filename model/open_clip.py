"""A whole CLIP (picture and text side) in OpenCLIP's file layout: features for comparing crops with words.

Shapes: B pictures or texts, c pixels, L ids of a text, E width of the common space.

One config file names the checkpoints (`checkpoints/config.yaml`, the published form `name: file` or ours):

    georsclip: GeoRSCLIP/RS5M_ViT-L-14.pt
    skyclip: {file: skyclip/epoch_20.pt, quick_gelu: true}
    mine: {file: mine.safetensors, config: open_clip_config.json, vocabulary: merges.txt}
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from model.assembly import set_tensor
from model.clip import build_vision_tower
from model.key_maps import Shape, Target, plan
from model.layouts import CLIP_HEAD_WIDTH, infer_vision_config
from model.tower_files import CLIP_MEAN, CLIP_STD, convert_block, convert_open_clip, read_open_clip_state
from utils.io import StrPath, read_json

TINY = "tiny"
"""Name of a small CLIP with random weights: for trying the pipeline without a checkpoint."""
QUICK_GELU_NAMES = ("skyclip",)
"""Published CLIP names that InstructSAM runs with QuickGELU; all its others run with GELU."""
DEFAULT_CONFIG = "checkpoints/config.yaml"

_TEXT_SIMPLE = {
    "token_embedding.weight": "text_tower.embeddings.token_embedding.weight",
    "positional_embedding": "text_tower.embeddings.position_embedding.weight",
    "ln_final.weight": "text_tower.final_layer_norm.weight",
    "ln_final.bias": "text_tower.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


@dataclass(frozen=True)
class OpenClipConfig:
    """Sizes: fields of CLIPVisionConfig and CLIPTextConfig, and the width E of the common space."""

    vision: dict[str, Any]
    text: dict[str, Any]
    embed_dim: int


class OpenClip(nn.Module):
    """Both towers with their projections. Built by `load_open_clip` or `tiny_open_clip`."""

    def __init__(self, config: OpenClipConfig) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        self.config = config
        self.vision_tower = build_vision_tower(config.vision)
        self.text_tower = CLIPTextModel(CLIPTextConfig(**config.text))
        self.visual_projection = nn.Linear(config.vision["hidden_size"], config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text["hidden_size"], config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.logit_scale.device

    @property
    def side(self) -> int:
        """Pixels c of the square input."""
        return self.config.vision["image_size"]

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels (B, 3, c, c) -> unit vectors (B, E), float32."""
        pixels = pixels.to(self.device, self.logit_scale.dtype)
        pooled = self.vision_tower(pixels).pooler_output
        return _unit(self.visual_projection(pooled))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> unit vectors (B, E), float32. The text ends at its first largest id (end of text);
        nothing behind the longest text is computed, which changes nothing: attention looks back only."""
        ends = ids.argmax(dim=-1)
        ids = ids[:, : int(ends.max()) + 1].to(self.device)
        states = self.text_tower(ids).last_hidden_state
        pooled = states[torch.arange(len(ids), device=self.device), ends.to(self.device)]
        return _unit(self.text_projection(pooled))

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (B, c, c, 3) -> normalised float32 (B, 3, c, c) on the model's device."""
        values = pixels.to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 255
        mean, std = (torch.tensor(x, device=self.device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
        return (values - mean) / std


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors.float(), dim=-1)


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """OpenCLIP's picture transform up to the pixels: RGB, short side to `side` (bicubic, long side rounded
    down), central square (odd margins are rounded half to even)."""
    image = image if image.mode == "RGB" else image.convert("RGB")
    width, height = image.size
    long = int(side * max(width, height) / min(width, height))
    size = (side, long) if width <= height else (long, side)
    if height - size[1] > max(0, 2 * (width - size[0])):  # Pillow >= 13 then shrinks the columns first; older
        image = image.resize((width, size[1]), Image.Resampling.BICUBIC)  # ones round in the other order
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return image.crop((left, top, left + side, top + side))


# ------------------------------------------------------------------------------------------------- weights


def convert_whole_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an OpenCLIP state dict under the names of `OpenClip`; none is left out but `attn_mask`.

    Raises:
        ValueError: tensors without a place (all are listed), or no text side.
    """
    visual: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in state.items():
        name = name.removeprefix("module.")
        block = convert_block(name, tensor)
        if name in _PROJECTIONS:
            ours[_PROJECTIONS[name]] = tensor.T
        elif name.startswith("visual."):
            visual[name] = tensor
        elif name in _TEXT_SIMPLE:
            ours[_TEXT_SIMPLE[name]] = tensor
        elif block:
            ours |= {f"text_tower.{inner}": piece for inner, piece in block.items()}
        elif name != "attn_mask":
            unexpected.append(name)
    if unexpected:
        raise ValueError(
            f"{len(unexpected)} tensors have no place in a CLIP of two plain towers: {', '.join(unexpected)}"
        )
    if "text_tower.embeddings.token_embedding.weight" not in ours:
        raise ValueError(
            "the file holds no text side (no token_embedding.weight); give a whole OpenCLIP file"
        )
    return convert_open_clip(visual) | ours


def infer_open_clip_config(
    shapes: Mapping[str, Shape], quick_gelu: bool, sizes: Mapping[str, Any] | None = None
) -> OpenClipConfig:
    """Sizes out of shapes under our names; heads are width / 64 unless `sizes` says otherwise.

    Args:
        shapes: of `convert_whole_clip`.
        quick_gelu: activation; shapes do not tell.
        sizes: an open_clip model config (`vision_cfg`, `text_cfg`), possibly under `model_cfg`; only its
            numbers of heads are used, everything else is in the shapes.
    """
    activation = "quick_gelu" if quick_gelu else "gelu"
    sizes = (sizes or {}).get("model_cfg", sizes or {})
    vision_sizes, text_sizes = sizes.get("vision_cfg", {}), sizes.get("text_cfg", {})
    embed_dim, vision_width = shapes["visual_projection.weight"]
    vision_heads = vision_width // vision_sizes["head_width"] if "head_width" in vision_sizes else None
    vocabulary, width = shapes["text_tower.embeddings.token_embedding.weight"]
    heads = text_sizes.get("heads") or width // CLIP_HEAD_WIDTH
    if heads < 1 or width % heads:
        raise ValueError(f"text side of width {width}: state its number of heads (config: open_clip's JSON)")
    layer = re.compile(r"text_tower\.encoder\.layers\.(\d+)\.mlp\.fc1\.weight")
    layers = [match for name in shapes if (match := layer.fullmatch(name))]
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes[layers[0][0]][0] if layers else 4 * width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "max_position_embeddings": shapes["text_tower.embeddings.position_embedding.weight"][0],
        "projection_dim": embed_dim,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    return OpenClipConfig(infer_vision_config(shapes, activation, vision_heads), text, embed_dim)


def build_open_clip(config: OpenClipConfig) -> OpenClip:
    """An `OpenClip` whose parameters have shapes and no memory; buffers are real."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        return OpenClip(config)


def load_open_clip(
    path: StrPath,
    quick_gelu: bool = False,
    config: StrPath | None = None,
    dtype: torch.dtype = torch.float32,
) -> OpenClip:
    """A CLIP from an OpenCLIP file (`.pt`, `.bin`, safetensors), on the CPU, in evaluation mode.

    Args:
        path: the file; `{"state_dict": ...}` and `module.` prefixes are understood.
        quick_gelu: activation of the checkpoint.
        config: open_clip's JSON model config, for numbers of heads that are not width / 64.
        dtype: of the weights.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors (complete list), or not a weight file.
    """
    try:
        state = convert_whole_clip(read_open_clip_state(path))
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        sizes = infer_open_clip_config(shapes, quick_gelu, read_json(config, dict) if config else None)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
    model = build_open_clip(sizes)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plan(shapes, expected, Target).raise_if_faulty(path)
    for name, tensor in state.items():
        set_tensor(model, name, tensor, dtype)
    return model.eval().requires_grad_(False)


def tiny_open_clip(seed: int = 0) -> OpenClip:
    """A small CLIP with random weights (about 1 M, most of them word vectors); its features mean nothing."""
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = shared | {"hidden_size": 32, "intermediate_size": 128, "image_size": 224, "patch_size": 32}
    text = shared | {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 49408}
    text |= {"max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return OpenClip(OpenClipConfig(vision, text, 16)).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ named variants


@dataclass(frozen=True)
class ClipEntry:
    """One line of the checkpoint config."""

    name: str
    file: Path | None
    quick_gelu: bool = False
    config: Path | None = None
    vocabulary: Path | None = None

    def load(self) -> OpenClip:
        """The CLIP of this entry, on the CPU."""
        if self.file is None:
            return tiny_open_clip()
        if not self.file.is_file():
            raise ValueError(f"CLIP {self.name}: {self.file} is not there; fetch it or correct the config")
        return load_open_clip(self.file, self.quick_gelu, self.config)


def clip_entry(name: str, config: StrPath = DEFAULT_CONFIG) -> ClipEntry:
    """The entry `name` of a checkpoint config; `tiny` needs none. Relative paths: from the working
    directory, else from the folder of the config file.

    Raises:
        ValueError: no such config or entry (the known ones are listed), or an entry of another form.
    """
    if name == TINY:
        return ClipEntry(TINY, None)
    import yaml

    path = Path(config)
    if not path.is_file():
        raise ValueError(f"{path}: no checkpoint config (lines `name: file`); or use the CLIP {TINY!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or name not in content:
        known: Sequence[str] = sorted(content) if isinstance(content, dict) else []
        raise ValueError(f"{path}: no CLIP {name!r}; it names {', '.join(known) or 'none'} (and {TINY})")
    entry = content[name]
    entry = {"file": entry} if isinstance(entry, str) else entry
    fields = {"file": str, "quick_gelu": bool, "config": str, "vocabulary": str}
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise ValueError(f"{path}: {name} must be a file name, or have a field `file`")
    wrong = [key for key, value in entry.items() if not isinstance(value, fields.get(key, ()))]
    if wrong:
        raise ValueError(
            f"{path}: {name}: fields {', '.join(wrong)}; known: file, quick_gelu, config, vocabulary"
        )
    paths = {key: _near(path, entry[key]) for key in ("file", "config", "vocabulary") if key in entry}
    return ClipEntry(name, quick_gelu=entry.get("quick_gelu", name in QUICK_GELU_NAMES), **paths)


def _near(config: Path, text: str) -> Path:
    given = Path(text).expanduser()
    beside = config.parent / given
    return beside if not given.exists() and not given.is_absolute() else given
