"""SAM 2 for still pictures: transformers' Hiera and decoder layers under batched calls of our own.

Shapes: B pictures, S side of the square input, G = S / 16 side of the embedding, C prompt width, M prompts
of one picture, n points per prompt, T tokens, U prompts whose masks are wanted.

What differs from transformers' forward pass (numbers agree to rounding): no positional codes for the
pyramid are computed, the first decoder layer projects the picture once and not once per prompt, masks are
made only for the prompts that somebody asks for, and positional codes stay fp32 under low precision.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.sam import PositionCode
from model.two_way import two_way

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sam2Config:
    """Sizes of a SAM 2. Per stage: `stages` blocks, `window_sizes` of the windowed attention (whole map
    in `global_blocks`); width and heads double from stage to stage, starting at `embed_dim` and
    `num_heads`. `position_size` is the stored size of the background position code."""

    image_size: int = 1024
    embed_dim: int = 144
    num_heads: int = 2
    stages: tuple[int, ...] = (2, 6, 36, 4)
    window_sizes: tuple[int, ...] = (8, 4, 16, 8)
    global_blocks: tuple[int, ...] = (23, 33, 43)
    position_size: tuple[int, int] = (7, 7)
    prompt_embed_dim: int = 256
    top_down_levels: tuple[int, ...] = (2, 3)
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_head_hidden_dim: int = 256

    @property
    def grid_size(self) -> int:
        """Side G of the image embedding."""
        return self.image_size // 16

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary that JSON can hold."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Sam2Config":
        """Inverse of `to_dict`; ValueError on unknown fields."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            known = sorted(cls.__dataclass_fields__)
            raise ValueError(f"Sam2Config: unknown fields {unknown}; known: {known}")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


_TINY = Sam2Config(
    embed_dim=96, num_heads=1, stages=(1, 2, 7, 2), window_sizes=(8, 4, 14, 7), global_blocks=(5, 7, 9)
)
SAM2_CONFIGS: dict[str, Sam2Config] = {
    "sam2_hiera_l": Sam2Config(),
    "sam2_hiera_b+": replace(
        _TINY,
        embed_dim=112,
        num_heads=2,
        stages=(2, 3, 16, 3),
        global_blocks=(12, 16, 20),
        position_size=(14, 14),
    ),
    "sam2_hiera_s": replace(_TINY, stages=(1, 2, 11, 2), global_blocks=(7, 10, 13)),
    "sam2_hiera_t": _TINY,
    "sam2_toy": Sam2Config(
        image_size=128,
        embed_dim=16,
        num_heads=1,
        stages=(1, 1, 2, 1),
        window_sizes=(8, 4, 4, 4),
        global_blocks=(3,),
        prompt_embed_dim=32,
        decoder_heads=4,
        decoder_mlp_dim=64,
        iou_head_hidden_dim=32,
    ),
}
"""Published sizes by the stem of their configuration file (2.1 has the same: `sam2.1_hiera_l` ...), and a
toy that exists with random weights only."""


def sam2_config(name: str, **changes: Any) -> Sam2Config:
    """The size of a configuration name (`sam2_hiera_l`, `.../sam2.1_hiera_t.yaml`, ...), fields replaced.

    Raises:
        ValueError: the name is unknown (the known ones are listed).
    """
    stem = str(name).replace("\\", "/").rpartition("/")[2].removesuffix(".yaml")
    stem = stem.replace("sam2.1_", "sam2_", 1)
    if stem not in SAM2_CONFIGS:
        raise ValueError(f"unknown SAM 2 configuration {name!r}; known: {', '.join(SAM2_CONFIGS)}")
    return replace(SAM2_CONFIGS[stem], **changes)


def transformers_config(config: Sam2Config) -> Any:
    """transformers' `Sam2Config` of these sizes."""
    from transformers import Sam2Config as HubConfig
    from transformers import Sam2HieraDetConfig, Sam2MaskDecoderConfig, Sam2PromptEncoderConfig
    from transformers import Sam2VisionConfig as HubVisionConfig

    levels = range(len(config.stages))
    widths = [config.embed_dim * 2**k for k in levels]
    backbone = Sam2HieraDetConfig(
        hidden_size=config.embed_dim,
        num_attention_heads=config.num_heads,
        image_size=[config.image_size] * 2,
        window_positional_embedding_background_size=list(config.position_size),
        blocks_per_stage=list(config.stages),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[config.num_heads * 2**k for k in levels],
        window_size_per_stage=list(config.window_sizes),
        global_attention_blocks=list(config.global_blocks),
    )
    vision = HubVisionConfig(
        backbone_config=backbone,
        backbone_channel_list=widths[::-1],
        backbone_feature_sizes=[[config.image_size // k] * 2 for k in (4, 8, 16)],
        fpn_hidden_size=config.prompt_embed_dim,
        fpn_top_down_levels=list(config.top_down_levels),
    )
    prompt = Sam2PromptEncoderConfig(hidden_size=config.prompt_embed_dim, image_size=config.image_size)
    decoder = Sam2MaskDecoderConfig(
        hidden_size=config.prompt_embed_dim,
        mlp_dim=config.decoder_mlp_dim,
        num_attention_heads=config.decoder_heads,
        iou_head_hidden_dim=config.iou_head_hidden_dim,
        dynamic_multimask_via_stability=False,
    )
    return HubConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


@dataclass
class Sam2Features:
    """Encoded pictures: `embedding` (B, C, G, G) with the no-memory embedding added, and the decoder's
    finer maps `fine` (B, C/8, 4G, 4G) and `middle` (B, C/4, 2G, 2G)."""

    embedding: Tensor
    fine: Tensor
    middle: Tensor

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, number: int) -> "Sam2Features":
        """One picture (B = 1)."""
        at = slice(number, number + 1)
        return Sam2Features(self.embedding[at], self.fine[at], self.middle[at])


@dataclass
class Sam2Decoded:
    """State of M prompts before masks are made: `iou` (M, 4) predicted quality of the four mask tokens
    (0: the single mask, 1 to 3: the alternatives), `kernels` (M, 4, C/8), `states` (M, G G, C)."""

    iou: Tensor
    kernels: Tensor
    states: Tensor


class Sam2(nn.Module):
    """SAM 2 without its memory; parameter names are those of transformers' `Sam2Model`, except that its
    two copies of the positional matrix are one, `positions.positional_encoding_gaussian_matrix`."""

    def __init__(self, config: Sam2Config) -> None:
        from transformers import Sam2Model

        super().__init__()
        self.config = config
        net = Sam2Model(transformers_config(config))
        self.vision_encoder = net.vision_encoder
        self.prompt_encoder = net.prompt_encoder
        self.mask_decoder = net.mask_decoder
        self.no_memory_embedding = net.no_memory_embedding
        del self.prompt_encoder.shared_embedding
        self.positions = PositionCode(config.prompt_embed_dim // 2)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.no_memory_embedding.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.no_memory_embedding.device

    def preprocess(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """uint8 (h, w, 3) RGB pictures of any sizes -> (B, 3, S, S) in the weights' dtype, on their device.

        Scaled to [0, 1], resized to the square as floats (bilinear, anti-aliased, aspect not kept), then
        normalised.
        """
        side = (self.config.image_size,) * 2
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (MEAN, STD))
        images = []
        for picture in pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    f"a picture must be uint8 (H, W, 3) RGB, found {picture.dtype} {picture.shape}"
                )
            pixels = torch.from_numpy(np.ascontiguousarray(picture)).to(self.device)
            pixels = pixels.permute(2, 0, 1)[None].float() / 255
            pixels = F.interpolate(pixels, side, mode="bilinear", align_corners=False, antialias=True)
            images.append((pixels[0] - mean) / std)
        return torch.stack(images).to(self.dtype)

    def encode(self, images: Tensor) -> Sam2Features:
        """Features of preprocessed images (B, 3, S, S), all in one pass."""
        if tuple(images.shape[1:]) != (3, self.config.image_size, self.config.image_size):
            side = self.config.image_size
            raise ValueError(f"SAM 2 images must be (B, 3, {side}, {side}), got {tuple(images.shape)}")
        images = images.to(self.device, self.dtype)
        maps = self.vision_encoder.backbone(images).intermediate_hidden_states  # (B, h, w, c), fine to coarse
        neck, top = self.vision_encoder.neck, len(maps) - 1
        levels: list[Tensor] = []
        for level in range(top, -1, -1):
            lateral = neck.convs[top - level](maps[level].permute(0, 3, 1, 2))
            if level in neck.fpn_top_down_levels and level != top:
                lateral = lateral + F.interpolate(levels[-1], scale_factor=2.0, mode="nearest")
            levels.append(lateral)
        embedding, middle, fine = levels[-3:]
        return Sam2Features(
            embedding + self.no_memory_embedding.view(1, -1, 1, 1),
            self.mask_decoder.conv_s0(fine),
            self.mask_decoder.conv_s1(middle),
        )

    def sparse(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Tokens (M, n, C) of points (M, n, 2) in x, y pixels of the square input.

        `labels` (M, n): 1 inside, 0 outside, 2 and 3 top-left and bottom-right box corner, -1 padding.
        """
        prompt = self.prompt_encoder
        kinds = torch.cat((prompt.not_a_point_embed.weight, prompt.point_embed.weight))
        code = self.positions.encode((coords.float() + 0.5) / self.config.image_size)
        labels = labels.long()
        return code.to(kinds.dtype) * (labels >= 0)[..., None] + kinds[labels + 1]

    def dense_positions(self) -> Tensor:
        """Positional codes (1, C, G, G) of the embedding's cells, in the weights' dtype."""
        return self.positions((self.config.grid_size,) * 2)[None].to(self.dtype)

    def decode(self, picture: Sam2Features, coords: Tensor, labels: Tensor) -> Sam2Decoded:
        """Quality and state of M prompts on one picture (B = 1); masks come from `mask_logits`.

        coords (M, n, 2), labels (M, n) as in `sparse`; the padding point is added here.
        """
        coords, labels = F.pad(coords, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
        decoder, sparse = self.mask_decoder, self.sparse(coords, labels)
        own = torch.cat(
            (decoder.obj_score_token.weight, decoder.iou_token.weight, decoder.mask_tokens.weight)
        )
        tokens = torch.cat((own.expand(len(sparse), -1, -1), sparse), dim=1)  # M, T, C
        source = picture.embedding + self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        hidden, states = two_way(
            decoder.transformer,
            source.flatten(2).mT,
            self.dense_positions().flatten(2).mT,
            tokens.to(self.dtype),
            "transformers",
        )
        kernels = [mlp(hidden[:, 2 + k]) for k, mlp in enumerate(decoder.output_hypernetworks_mlps)]
        return Sam2Decoded(decoder.iou_prediction_head(hidden[:, 1]), torch.stack(kernels, dim=1), states)

    def mask_logits(
        self, picture: Sam2Features, decoded: Sam2Decoded, prompts: Tensor, tokens: slice = slice(1, None)
    ) -> Tensor:
        """Mask logits (U, k, 4G, 4G) of the `prompts` (U,) long; `tokens` chooses the k mask tokens."""
        decoder, grid = self.mask_decoder, (self.config.grid_size,) * 2
        y = decoder.upscale_conv1(decoded.states[prompts].mT.unflatten(2, grid)) + picture.middle
        y = decoder.activation(decoder.upscale_layer_norm(y))
        y = decoder.activation(decoder.upscale_conv2(y) + picture.fine)  # U, C/8, 4G, 4G
        return (decoded.kernels[prompts, tokens] @ y.flatten(2)).unflatten(2, y.shape[2:])


def random_sam2(config: str | Sam2Config = "sam2_toy", seed: int = 0) -> Sam2:
    """A SAM 2 with random weights large enough that its masks differ from place to place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sam2(sam2_config(config) if isinstance(config, str) else config)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter.shape[1] if name.endswith("embed") else parameter[0].numel()
                nn.init.normal_(parameter, std=1.5 / fan_in**0.5)
    return model.eval()
