"""Segment Anything on the `segment-anything` package's modules and weight names, batched and fused.

Shapes: B images, M prompts over all images, S padded input side, G grid side (S / patch), C prompt
width, n points per prompt, T tokens, K masks of one image, H/W pixels of the original image.

What differs from the package (numbers agree to rounding): relative positions are folded into scaled
dot-product attention, the decoder takes prompts of several images in one call, only the hyper-network
of mask 0 runs when one mask is wanted, positional codes stay in fp32 under low precision, and the neck
runs in fp32 under fp16.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model._torchvision import ensure_torchvision
from model.two_way import two_way

ensure_torchvision()

from segment_anything.modeling.image_encoder import ImageEncoderViT  # noqa: E402
from segment_anything.modeling.mask_decoder import MaskDecoder as PackageMaskDecoder  # noqa: E402
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom  # noqa: E402
from segment_anything.modeling.prompt_encoder import PromptEncoder as PackagePromptEncoder  # noqa: E402
from segment_anything.modeling.transformer import TwoWayTransformer  # noqa: E402


@dataclass(frozen=True)
class SamConfig:
    """Sizes of a SAM. `image_size` is the padded input side S; `window_size` 0 means global attention
    in every block. `low_precision_pe` computes positional codes in the dtype of the other weights, as
    the published bf16 runs did, instead of fp32."""

    image_size: int = 1024
    patch_size: int = 16
    embed_dim: int = 1280
    depth: int = 32
    num_heads: int = 16
    global_attn_indexes: tuple[int, ...] = (7, 15, 23, 31)
    window_size: int = 14
    mlp_ratio: float = 4.0
    prompt_embed_dim: int = 256
    mask_in_chans: int = 16
    num_multimask_outputs: int = 3
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    low_precision_pe: bool = False

    @property
    def grid_size(self) -> int:
        """Side G of the image embedding."""
        return self.image_size // self.patch_size

    @property
    def low_res_size(self) -> int:
        """Side of the decoder's mask logits, 4 G."""
        return 4 * self.grid_size

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary that JSON can hold."""
        return asdict(self) | {"global_attn_indexes": list(self.global_attn_indexes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SamConfig":
        """Inverse of `to_dict`; ValueError on unknown fields."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(
                f"SamConfig: unknown fields {unknown}; known: {sorted(cls.__dataclass_fields__)}"
            )
        values = dict(values)
        if "global_attn_indexes" in values:
            values["global_attn_indexes"] = tuple(values["global_attn_indexes"])
        return cls(**values)


SAM_CONFIGS: dict[str, SamConfig] = {
    "sam_vit_h": SamConfig(),
    "sam_vit_l": SamConfig(embed_dim=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23)),
    "sam_vit_b": SamConfig(embed_dim=768, depth=12, num_heads=12, global_attn_indexes=(2, 5, 8, 11)),
    "sam_tiny": SamConfig(
        image_size=128,
        patch_size=8,
        embed_dim=96,
        depth=4,
        num_heads=4,
        global_attn_indexes=(1, 3),
        window_size=8,
        prompt_embed_dim=64,
        decoder_heads=4,
        decoder_mlp_dim=128,
        iou_head_hidden_dim=64,
    ),
}


def sam_config(name: str, **changes: Any) -> SamConfig:
    """The named variant (`sam_vit_h`, `sam_vit_l`, `sam_vit_b`, `sam_tiny`), with fields replaced."""
    if name not in SAM_CONFIGS:
        raise ValueError(f"unknown SAM variant {name!r}; known: {sorted(SAM_CONFIGS)}")
    return replace(SAM_CONFIGS[name], **changes)


def _relative_table(table: Tensor, size: int) -> Tensor:
    """Rows of a (2 size - 1, d) table by query and key coordinate: (size, size, d)."""
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at[None, :] + size - 1]


def relative_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, hw: tuple[int, int], folded: bool
) -> Tensor:
    """softmax(q k^T / sqrt(d) + rel_h + rel_w) v with decomposed relative positions.

    q, k, v (N, heads, h*w, d); rel_h (2h-1, d), rel_w (2w-1, d) tables that meet the *unscaled* q. The
    bias of a (query, key) pair is a term of the key's row plus one of its column, so `folded` appends
    both to q and one-hot codes to k: no mask, any fused kernel applies, no (hw, hw) bias in memory.
    Otherwise the bias is explicit, which is cheaper for small windows.
    """
    (h, w), d = hw, q.shape[-1]
    grid = q.unflatten(2, (h, w))  # N, heads, h, w, d
    row = torch.einsum("nahwd,hkd->nahwk", grid, _relative_table(rel_h, h))  # N, heads, h, w, h
    col = torch.einsum("nahwd,wkd->nahwk", grid, _relative_table(rel_w, w))  # N, heads, h, w, w
    if not folded:
        bias = (row[..., :, None] + col[..., None, :]).flatten(4).flatten(2, 3)  # N, heads, hw, hw
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    at = torch.arange(h * w, device=q.device)
    codes = torch.cat((F.one_hot(at // w, h), F.one_hot(at % w, w)), dim=1).to(k)  # hw, h+w
    q = torch.cat((q * d**-0.5, row.flatten(2, 3), col.flatten(2, 3)), dim=-1)
    k = torch.cat((k, codes.expand(*k.shape[:2], -1, -1)), dim=-1)
    return F.scaled_dot_product_attention(q, k, F.pad(v, (0, h + w)), scale=1.0)[..., :d]


def _to_windows(x: Tensor, size: int) -> Tensor:
    """(B, h, w, C) -> (B*nh*nw, size, size, C), zero-padded below and to the right."""
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % size, 0, -h % size))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # B, nh, size, nw, size, C
    return x.transpose(2, 3).reshape(-1, size, size, c)


def _from_windows(x: Tensor, size: int, shape: torch.Size) -> Tensor:
    """Inverse of `_to_windows` for the (B, h, w, C) of `shape`."""
    b, h, w, c = shape
    rows, columns = -(-h // size), -(-w // size)
    x = x.view(b, rows, columns, size, size, c).transpose(2, 3).reshape(b, rows * size, columns * size, c)
    return x[:, :h, :w]


def _channel_norm(x: Tensor, norm: nn.Module, dtype: torch.dtype) -> Tensor:
    """The package's LayerNorm2d over the channels of (B, C, h, w) as one fused layer norm."""
    weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
    return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, norm.eps).permute(0, 3, 1, 2)


class ImageEncoder(ImageEncoderViT):
    """ViT of SAM: (B, 3, S, S) normalised and zero-padded images -> (B, C, G, G) embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        """Encode a batch in one pass; dtype in = dtype out. ValueError for another image size."""
        if tuple(x.shape[1:]) != (3, self.img_size, self.img_size):
            raise ValueError(
                f"SAM images must be (B, 3, {self.img_size}, {self.img_size}), got {tuple(x.shape)}: "
                "use the processor settings of this model"
            )
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        for block in self.blocks:
            x = self._block(block, x)
        return self._neck(x.permute(0, 3, 1, 2))

    @staticmethod
    def _block(block: nn.Module, x: Tensor) -> Tensor:
        y = block.norm1(x)
        if block.window_size > 0:
            y = _to_windows(y, block.window_size)
        attention, (n, h, w, width) = block.attn, y.shape
        qkv = attention.qkv(y).view(n, h * w, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # N, heads, h*w, d
        y = relative_attention(
            q, k, v, attention.rel_pos_h, attention.rel_pos_w, (h, w), folded=block.window_size == 0
        )
        y = attention.proj(y.transpose(1, 2).reshape(n, h, w, width))
        if block.window_size > 0:
            y = _from_windows(y, block.window_size, x.shape)
        x = x + y
        return x + block.mlp(block.norm2(x))

    def _neck(self, x: Tensor) -> Tensor:
        first, norm, second, last_norm = self.neck
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype  # fp16 overflows in the norms
        y = F.conv2d(x.to(dtype), first.weight.to(dtype))
        y = _channel_norm(y, norm, dtype)
        y = F.conv2d(y, second.weight.to(dtype), padding=1)
        return _channel_norm(y, last_norm, dtype).to(x.dtype)


class PositionCode(PositionEmbeddingRandom):
    """Random Fourier positions; the matrix stays fp32 whatever the module is cast to, unless
    `low_precision` is set (parity with published bf16 runs)."""

    def __init__(self, num_pos_feats: int, low_precision: bool = False) -> None:
        super().__init__(num_pos_feats)
        self.low_precision = low_precision

    def _apply(self, fn: Any, recurse: bool = True) -> "PositionCode":
        before = self.positional_encoding_gaussian_matrix
        super()._apply(fn, recurse)
        after = self.positional_encoding_gaussian_matrix
        if not self.low_precision and after.dtype != torch.float32:
            self.positional_encoding_gaussian_matrix = before.to(after.device, torch.float32)
        return self

    def encode(self, xy: Tensor) -> Tensor:
        """Codes (..., C) of coordinates (..., 2) in [0, 1], x first, in the matrix's dtype."""
        matrix = self.positional_encoding_gaussian_matrix
        angle = 2 * torch.pi * ((2 * xy.to(matrix.dtype) - 1) @ matrix)
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Codes (C, h, w) of the pixel centres of a grid."""
        matrix = self.positional_encoding_gaussian_matrix
        y, x = (
            (torch.arange(n, device=matrix.device, dtype=torch.float32) + 0.5) / n for n in (size[0], size[1])
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        return self.encode(torch.stack((x, y), dim=-1)).permute(2, 0, 1)


class PromptEncoder(PackagePromptEncoder):
    """Points, boxes and masks -> sparse tokens and dense maps, any mixture in one batch."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__(
            embed_dim=config.prompt_embed_dim,
            image_embedding_size=(config.grid_size, config.grid_size),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.mask_in_chans,
        )
        self.pe_layer = PositionCode(config.prompt_embed_dim // 2, config.low_precision_pe)

    def sparse(self, coords: Tensor, labels: Tensor) -> Tensor:
        """Tokens (M, n, C) of points (M, n, 2) in x, y pixels of the padded input.

        `labels` (M, n): 1 inside, 0 outside, 2 and 3 top-left and bottom-right box corner, -1 padding.
        """
        kinds = torch.cat([self.not_a_point_embed.weight, *(e.weight for e in self.point_embeddings)])
        size = coords.new_tensor([self.input_image_size[1], self.input_image_size[0]], dtype=torch.float32)
        code = self.pe_layer.encode((coords.float() + 0.5) / size)
        labels = labels.long()
        return code.to(kinds.dtype) * (labels >= 0)[..., None] + kinds[labels + 1]

    def dense(self, masks: Tensor | None, count: int) -> Tensor:
        """Maps (M or 1, C, G, G): of mask logits (M, 1, 4G, 4G), or the learned "no mask"."""
        if masks is not None:
            return self.mask_downscaling(masks)
        return self.no_mask_embed.weight.reshape(1, -1, 1, 1)

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Sparse (M, n, C) and dense (M, C, G, G) prompts, as the package's module returns them.

        `points` = ((M, n, 2), (M, n)), `boxes` (M, 4) x1, y1, x2, y2, `masks` (M, 1, 4G, 4G) logits.
        """
        weight = self.no_mask_embed.weight
        count = next((len(x) for x in (points and points[0], boxes, masks) if x is not None), 1)
        coords, labels = [], []
        if points is not None:
            coords.append(points[0])
            labels.append(points[1].long())
            if boxes is None:  # the package pads with one "not a point"
                coords.append(points[0].new_zeros(count, 1, 2))
                labels.append(points[1].new_full((count, 1), -1).long())
        if boxes is not None:
            coords.append(boxes.reshape(-1, 2, 2))
            labels.append(torch.tensor([[2, 3]], device=boxes.device).expand(count, 2))
        if coords:
            sparse = self.sparse(torch.cat(coords, dim=1), torch.cat(labels, dim=1))
        else:
            sparse = weight.new_zeros(count, 0, self.embed_dim)
        dense = self.dense(None if masks is None else masks.to(weight.dtype), count)
        return sparse, dense.expand(count, -1, *self.image_embedding_size)


class MaskDecoder(PackageMaskDecoder):
    """Two-way transformer and hyper-networks over prompts that may belong to different images."""

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        image_index: Tensor | None = None,
        multimask_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Mask logits and quality of M prompts.

        image_embeddings (B, C, G, G); image_pe (1, C, G, G); sparse (M, n, C); dense (M or 1, C, G, G)
        or (1, C, 1, 1); image_index (M,) says which image a prompt belongs to (None: one image, or
        B = M). Returns logits (M, k, 4G, 4G) and IoU predictions (M, k), k = 1 (mask 0) or 3 (masks 1
        to 3 when `multimask_output`).
        """
        if image_index is not None:
            image_embeddings = image_embeddings[image_index]
        kept = slice(1, None) if multimask_output else slice(0, 1)
        own = torch.cat((self.iou_token.weight, self.mask_tokens.weight))
        tokens = torch.cat((own.expand(len(sparse), -1, -1), sparse), dim=1)  # M, T, C
        source = (image_embeddings + dense).expand(len(sparse), -1, -1, -1)  # M, C, G, G
        height, width = source.shape[-2:]
        hidden, source = two_way(
            self.transformer, source.flatten(2).mT, image_pe.flatten(2).mT, tokens, "segment_anything"
        )
        upscale, norm, act, upscale_again, last_act = self.output_upscaling
        y = upscale(source.mT.unflatten(2, (height, width)))
        y = last_act(upscale_again(act(_channel_norm(y, norm, y.dtype))))  # M, C/8, 4G, 4G
        wanted = range(self.num_mask_tokens)[kept]
        weights = torch.stack([self.output_hypernetworks_mlps[i](hidden[:, 1 + i]) for i in wanted], dim=1)
        masks = torch.einsum("mkc,mchw->mkhw", weights, y)
        return masks, self.iou_prediction_head(hidden[:, 0])[:, kept]


class Sam(nn.Module):
    """SAM with the package's parameter names (`image_encoder.`, `prompt_encoder.`, `mask_decoder.`)."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            out_chans=config.prompt_embed_dim,
            norm_layer=_norm6,
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
        )
        self.prompt_encoder = PromptEncoder(config)
        self.mask_decoder = MaskDecoder(
            transformer_dim=config.prompt_embed_dim,
            transformer=TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.prompt_embed_dim,
                num_heads=config.decoder_heads,
                mlp_dim=config.decoder_mlp_dim,
            ),
            num_multimask_outputs=config.num_multimask_outputs,
            iou_head_depth=config.iou_head_depth,
            iou_head_hidden_dim=config.iou_head_hidden_dim,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.mask_decoder.iou_token.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.mask_decoder.iou_token.weight.device

    def encode(self, images: Tensor, max_batch: int | None = None) -> Tensor:
        """Embeddings (B, C, G, G) of images (B, 3, S, S), in chunks of `max_batch` to bound memory."""
        images = images.to(self.device, self.dtype)
        if max_batch is None or len(images) <= max_batch:
            return self.image_encoder(images)
        return torch.cat([self.image_encoder(part) for part in images.split(max_batch)])

    def decode(
        self,
        image_embeddings: Tensor,
        sparse: Tensor,
        dense: Tensor | None = None,
        image_index: Tensor | None = None,
        multimask_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Mask logits (M, k, 4G, 4G) and IoU predictions (M, k) for sparse prompts (M, n, C).

        `image_embeddings` (B, C, G, G); `image_index` (M,) long into it, None for one image; `dense`
        (M, C, G, G), None = the learned "no mask". Everything is cast to the weights' dtype.
        """
        if dense is None:
            dense = self.prompt_encoder.dense(None, len(sparse))
        pe = self.prompt_encoder.get_dense_pe().to(self.dtype)
        embeddings = image_embeddings.to(self.device, self.dtype)
        return self.mask_decoder(
            embeddings, pe, sparse.to(self.dtype), dense.to(self.dtype), image_index, multimask_output
        )

    def forward(
        self,
        images: Tensor | None = None,
        *,
        image_embeddings: Tensor | None = None,
        image_index: Tensor | None = None,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        multimask_output: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Promptable segmentation: M prompts over B images in one call.

        images (B, 3, S, S) or image_embeddings (B, C, G, G); image_index (M,) long, None when B is 1 or
        M; points ((M, n, 2) x, y pixels of the padded input, (M, n) labels, see `PromptEncoder.sparse`);
        boxes (M, 4); masks (M, 1, 4G, 4G) logits. Returns `decode`'s logits and IoU predictions.
        """
        if image_embeddings is None:
            if images is None:
                raise ValueError("Sam: give images or image_embeddings")
            image_embeddings = self.encode(images)
        sparse, dense = self.prompt_encoder(points, boxes, masks)
        return self.decode(image_embeddings, sparse, dense, image_index, multimask_output)

    def postprocess(self, low_res: Tensor, input_size: Sequence[int], original_size: Sequence[int]) -> Tensor:
        """Logits (K, k, 4G, 4G) -> fp32 (K, k, H, W): up to the padded square, crop, then to the image.

        `input_size` (h_in, w_in) is the resized, un-padded size; `original_size` (H, W) the target. Both
        resizes are bilinear with align_corners False, as published.
        """
        (h_in, w_in), size = input_size, self.config.image_size
        out_size = (int(original_size[0]), int(original_size[1]))
        if not len(low_res):
            return low_res.new_zeros(0, low_res.shape[1], *out_size, dtype=torch.float32)
        x = F.interpolate(low_res.float(), (size, size), mode="bilinear", align_corners=False)
        x = x[..., : int(h_in), : int(w_in)]
        return F.interpolate(x, out_size, mode="bilinear", align_corners=False)


def _norm6(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


def build_sam(name_or_config: str | SamConfig, **changes: Any) -> Sam:
    """A SAM with random weights from a variant's name or a config, e.g. `build_sam("sam_tiny")`."""
    if isinstance(name_or_config, str):
        return Sam(sam_config(name_or_config, **changes))
    return Sam(replace(name_or_config, **changes))
