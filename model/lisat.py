"""LISAT: a vision tower and a Llama that answer questions about an image, and a SAM that draws the masks
the answer asks for with `[SEG]`.

Shapes: B images, R token rows (questions), L padded row length, N features per image, H width of the
language model, G packs of T positions, M `[SEG]` tokens over all rows, K_b of image b, C prompt width.

A question's mask comes from the state that *predicts* `[SEG]`: state -> `text_hidden_fcs` -> one sparse
prompt of SAM's mask decoder. Each image passes the tower and SAM once, however many rows ask about it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from model._torchvision import ensure_torchvision
from model.clip import build_vision_tower, num_image_features, tower_features
from model.generation import Generation, mask_scores
from model.llava import (
    Packed,
    Row,
    build_projector,
    pack_rows,
    predictions_of_labels,
    predictions_of_token,
    splice,
    split_rows,
)
from model.losses import LossWeights, mask_losses, row_figures, token_loss
from model.sam import Sam, SamConfig

ensure_torchvision()

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402


@dataclass
class LisatConfig:
    """Everything that fixes the network. `llm` and `vision` hold `LlamaConfig` and `CLIPVisionConfig`
    fields; `sam` None gives a captioning model without masks; `seg_token_id` -1 means no `[SEG]` yet.
    `conv_type` and `templates` (a built-in name or a file) say how it was asked in training."""

    llm: dict[str, Any]
    vision: dict[str, Any]
    sam: SamConfig | None = field(default_factory=SamConfig)
    mm_projector_type: str = "mlp2x_gelu"
    mm_hidden_size: int | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    out_dim: int = 256
    seg_token_id: int = -1
    mm_use_im_start_end: bool = True
    conv_type: str = "llava_v1"
    templates: str = "default"
    attn_implementation: str = "sdpa"
    loss_weights: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        if self.mm_hidden_size is None:
            self.mm_hidden_size = int(self.vision["hidden_size"])
        faults = []
        if self.mm_hidden_size != self.vision["hidden_size"]:
            faults.append(f"mm_hidden_size {self.mm_hidden_size} != tower width {self.vision['hidden_size']}")
        if self.sam is not None and self.out_dim != self.sam.prompt_embed_dim:
            faults.append(f"out_dim {self.out_dim} != SAM's prompt_embed_dim {self.sam.prompt_embed_dim}")
        if self.seg_token_id >= self.llm["vocab_size"]:
            faults.append(
                f"seg_token_id {self.seg_token_id} is outside the vocabulary {self.llm['vocab_size']}"
            )
        if self.mm_projector_type == "identity" and self.mm_hidden_size != self.llm["hidden_size"]:
            faults.append("an identity projector needs equal widths of tower and language model")
        if self.attn_implementation not in ("sdpa", "eager"):
            faults.append(f"attn_implementation {self.attn_implementation!r}; known: sdpa, eager")
        if faults:
            raise ValueError("LisatConfig: " + "; ".join(faults))

    @property
    def num_image_features(self) -> int:
        """N, the number of positions one image takes in a token row."""
        return num_image_features(self.vision, self.mm_vision_select_feature)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary that JSON can hold."""
        return asdict(self) | {"sam": None if self.sam is None else self.sam.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LisatConfig":
        """Inverse of `to_dict`; ValueError on unknown fields."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"LisatConfig: unknown fields {unknown}; known: {sorted(known)}")
        values = dict(values)
        if values.get("sam") is not None and not isinstance(values["sam"], SamConfig):
            values["sam"] = SamConfig.from_dict(values["sam"])
        if isinstance(values.get("loss_weights"), dict):
            values["loss_weights"] = LossWeights(**values["loss_weights"])
        return cls(**values)


def text_projection(hidden_size: int, out_dim: int) -> nn.ModuleList:
    """`text_hidden_fcs`: states (.., H) -> prompts (.., C) in its only entry."""
    first, second = nn.Linear(hidden_size, hidden_size), nn.Linear(hidden_size, out_dim)
    return nn.ModuleList([nn.Sequential(first, nn.ReLU(inplace=True), second, nn.Dropout(0.0))])


class Lisat(Generation):
    """The network. Sub-modules: `vision_tower`, `mm_projector`, `llm`, `text_hidden_fcs`, `sam`."""

    def __init__(self, config: LisatConfig) -> None:
        super().__init__()
        self.config = config
        llm_config = LlamaConfig(**config.llm)
        llm_config._attn_implementation = config.attn_implementation
        self.vision_tower = build_vision_tower(config.vision)
        self.mm_projector = build_projector(
            config.mm_projector_type, config.mm_hidden_size, llm_config.hidden_size
        )
        self.llm = LlamaForCausalLM(llm_config)
        self.llm.model.embed_tokens.padding_idx = None  # the pad id is also the unknown token
        self.text_hidden_fcs = self.sam = None
        if config.sam is not None:
            self.text_hidden_fcs = text_projection(llm_config.hidden_size, config.out_dim)
            self.sam = Sam(config.sam)

    @property
    def device(self) -> torch.device:
        """Device of the language model."""
        return self.llm.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the language model."""
        return self.llm.model.norm.weight.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> "Lisat":
        rotary = self.llm.model.rotary_emb
        before = {name: buffer for name, buffer in rotary.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in before.items():  # rotary frequencies lose whole radians in bf16
            now = getattr(rotary, name)
            if now.dtype != torch.float32:
                setattr(rotary, name, buffer.to(now.device))
        return self

    def cast(self, dtype: torch.dtype, mask_dtype: torch.dtype | None = None) -> "Lisat":
        """Cast in place: everything to `dtype`, SAM and `text_hidden_fcs` to `mask_dtype` if given."""
        self.to(dtype)
        if mask_dtype is not None and self.sam is not None:
            self.sam.to(mask_dtype)
            self.text_hidden_fcs.to(mask_dtype)
        return self

    def activation_checkpointing(self, enabled: bool = True) -> None:
        """Recompute the language model's blocks in the backward pass of training instead of storing them."""
        if enabled:
            self.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.llm.gradient_checkpointing_disable()

    def resize_vocabulary(self, size: int, init: str = "normal") -> None:
        """Resize embedding and head rows to `size`; old rows stay bit for bit.

        New rows are N(0, initializer_range) (`normal`, as published) or the mean of the old (`mean`).
        """
        if init not in ("normal", "mean"):
            raise ValueError(f"init is {init!r}; known: normal, mean")
        old = self.config.llm["vocab_size"]
        self.llm.resize_token_embeddings(size, mean_resizing=False)
        self.llm.model.embed_tokens.padding_idx = None
        self.config.llm["vocab_size"] = size
        if init == "mean" and size > old:
            with torch.no_grad():
                for layer in (self.llm.model.embed_tokens, self.llm.lm_head):
                    layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)

    # ---- parts shared by training, inference and generation -------------------------------------------

    def image_features(self, images_clip: Tensor) -> Tensor:
        """Projected tower features (B, N, H) of images (B, 3, c, c)."""
        config = self.config
        features = tower_features(
            self.vision_tower, images_clip, config.mm_vision_select_layer, config.mm_vision_select_feature
        )
        return self.mm_projector(features.to(self.dtype))

    def embed_packed(self, packed: Packed, images_clip: Tensor | None) -> Tensor:
        """Input embeddings (G, T, H); encodes each image that a pack shows once."""
        embeddings = self.llm.model.embed_tokens(packed.ids.to(self.device))
        used = sorted(set(packed.images))
        if used and images_clip is None:
            raise ValueError("token rows hold an image token but images_clip is None")
        if not used and (images_clip is None or not (self._partitioned() or self._projector_trains())):
            return embeddings
        features = self.image_features(_select(images_clip, used or [0]))
        if not used:  # every rank must run the same modules under ZeRO-3, and reduce the same gradients
            return embeddings + 0 * features.sum().to(embeddings.dtype)
        at = torch.tensor([used.index(i) for i in packed.images], device=features.device)
        return splice(embeddings, packed.is_image, features[at])

    def hidden_states(self, packed: Packed, images_clip: Tensor | None) -> Tensor:
        """States after the final norm (G, T, H)."""
        inputs = packed.attention(self.device)
        mask = inputs["attention_mask"]
        embeddings = self.embed_packed(packed, images_clip)
        if mask is not None and mask.ndim == 4:
            inputs["attention_mask"] = self.block_mask(mask, embeddings.dtype)
        return self.llm.model(inputs_embeds=embeddings, use_cache=False, **inputs).last_hidden_state

    def block_mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A boolean block mask in the form that the attention implementation wants."""
        if self.config.attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def prompts(self, states: Tensor) -> Tensor:
        """SAM's sparse prompts (M, C) of the states (M, H) that predict `[SEG]`."""
        projection = self.text_hidden_fcs[0]
        return projection(states.to(projection[0].weight.dtype))

    def encode_images(self, images: Tensor, max_batch: int | None = None) -> Tensor:
        """SAM embeddings (B, C, G, G) of images (B, 3, S, S); no graph unless the encoder is trainable."""
        trainable = any(p.requires_grad for p in self.sam.image_encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            return self.sam.encode(images, max_batch)

    def _partitioned(self) -> bool:
        return hasattr(self.llm.model.norm.weight, "ds_id")

    def _projector_trains(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.mm_projector.parameters())

    # ---- training and teacher-forced inference --------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        *,
        images: Tensor | None = None,
        images_clip: Tensor | None = None,
        labels: Tensor | None = None,
        attention_masks: Tensor | None = None,
        offset: Tensor | Sequence[int] | None = None,
        masks_list: Sequence[Tensor] | None = None,
        sam_mask_shape_list: Sequence[Any] | None = None,
        image_embeddings: Tensor | None = None,
        image_paths: Sequence[str] | None = None,
        inference: bool = False,
        packed: bool = True,
        token_figures: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """Losses, or with `inference` the masks of every `[SEG]` in the given rows.

        input_ids (R, L) with -200 for the image; labels (R, L), -100 = not supervised; attention_masks
        (R, L) bool, padding on either side; offset (B+1,) cumulative rows per image, None = one image
        per row; images_clip (B, 3, c, c); images (B, 3, S, S) or image_embeddings (B, C, G, G);
        masks_list B x (K_b, H, W) with 0, 1 (255 = ignored pixel), in the order of the rows' `[SEG]`;
        sam_mask_shape_list B x ((h_in, w_in), (H, W)). `packed` lets rows of an image share its prefix
        (same losses and gradients). Other keys are ignored.

        Training returns loss, ce_loss and, unless the model draws no masks, mask_bce_loss, mask_dice_loss,
        mask_loss (weighted scalars); with `token_figures` also `row_tokens`, `row_losses`, `row_correct`,
        fp32 (R,): supervised tokens of a row, sum of their losses, how many the model would have said.
        Inference returns pred_masks B x (K_b, H, W) fp32 logits, scores B x (K_b,), gt_masks.
        """
        features, weights = self.config.num_image_features, self.config.loss_weights
        rows = split_rows(input_ids, attention_masks, labels, offset)
        num_images = len(offset) - 1 if offset is not None else len(rows)
        layout = pack_rows(rows, features, share_prefix=packed)
        hidden = self.hidden_states(layout, images_clip)
        if inference:
            logits, _ = self._row_masks(
                rows, layout, hidden, num_images, images, image_embeddings, sam_mask_shape_list
            )
            return {
                "pred_masks": logits,
                "scores": [mask_scores(x) for x in logits],
                "gt_masks": masks_list,
            }
        if labels is None:
            raise ValueError("training needs labels; pass inference=True for masks without losses")
        wanted = predictions_of_labels(rows, features)
        targets = torch.tensor([t for _, _, t in wanted], dtype=torch.long, device=hidden.device)
        states = _gather(hidden, [layout.locate(r, p) for r, p, _ in wanted])
        token_logits = self.llm.lm_head(states)
        ce = weights.ce * token_loss(token_logits, targets)
        extra = row_figures(token_logits, targets, wanted, len(rows)) if token_figures else {}
        if self.sam is None:
            return {"loss": ce, "ce_loss": ce} | extra
        bce = dice = torch.zeros((), device=ce.device)
        logits, idle = self._row_masks(
            rows, layout, hidden, num_images, images, image_embeddings, sam_mask_shape_list
        )
        both = mask_losses(logits, _checked_targets(logits, masks_list, image_paths))
        if both is not None:
            bce, dice = weights.bce * both[0], weights.dice * both[1]
        ce = ce + idle if idle is not None else ce
        losses = {"loss": ce + bce + dice, "ce_loss": ce, "mask_bce_loss": bce, "mask_dice_loss": dice}
        return losses | {"mask_loss": bce + dice} | extra

    def _row_masks(
        self,
        rows: Sequence[Row],
        layout: Packed,
        hidden: Tensor,
        num_images: int,
        images: Tensor | None,
        image_embeddings: Tensor | None,
        shapes: Sequence[Any] | None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Mask logits B x (K_b, H, W) of every `[SEG]`, and a zero that ties idle weights into the graph
        when no `[SEG]` does (so that all ranks reduce the same gradients)."""
        found = predictions_of_token(rows, self.config.seg_token_id, self.config.num_image_features)
        sizes = _image_sizes(shapes, num_images, rows, found)
        found = [(r, p) for r, p in found if min(sizes[rows[r].image][1]) > 0]
        if not found:
            empty = [hidden.new_zeros(0, *_empty_size(s), dtype=torch.float32) for s in sizes]
            return empty, self._idle(hidden, images, image_embeddings)
        prompts = self.prompts(_gather(hidden, [layout.locate(r, p) for r, p in found]))
        of_image = [rows[r].image for r, _ in found]
        low_res, _ = self.decode_prompts(prompts, of_image, images, image_embeddings)
        logits = []
        for b, size in enumerate(sizes):
            mine = [m for m, image in enumerate(of_image) if image == b]
            if not mine:
                logits.append(low_res.new_zeros(0, *_empty_size(size), dtype=torch.float32))
                continue
            at = slice(mine[0], mine[-1] + 1)  # rows of an image stand together, so do its prompts
            logits.append(self.sam.postprocess(low_res[at], *size)[:, 0])
        return logits, None

    def decode_prompts(
        self,
        prompts: Tensor,
        of_image: Sequence[int],
        images: Tensor | None,
        image_embeddings: Tensor | None = None,
        max_batch: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution logits (M, 1, 4G, 4G) and IoU predictions (M, 1) of prompts (M, C).

        `of_image` says per prompt which of the B images it belongs to; only those are encoded.
        """
        used = sorted(set(of_image))
        if image_embeddings is not None:
            embeddings = _select(image_embeddings, used)
        elif images is not None:
            embeddings = self.encode_images(_select(images, used), max_batch)
        else:
            raise ValueError("[SEG] asks for masks: give images or image_embeddings")
        index = torch.tensor([used.index(i) for i in of_image], device=self.sam.device)
        return self.sam.decode(embeddings, prompts[:, None].to(self.sam.device), image_index=index)

    def _idle(self, hidden: Tensor, images: Tensor | None, embeddings: Tensor | None) -> Tensor | None:
        if self.sam is None or not torch.is_grad_enabled():
            return None
        if not any(p.requires_grad for p in self.sam.mask_decoder.parameters()):
            return None
        prompts, side = self.prompts(hidden[:1, 0]), self.sam.config.grid_size
        if embeddings is not None:
            source = _select(embeddings, [0])
        elif images is not None and self._partitioned():
            source = self.encode_images(_select(images, [0]))
        else:
            source = prompts.new_zeros(1, prompts.shape[1], side, side)
        low_res, _ = self.sam.decode(source, prompts[:, None])
        return 0 * low_res.sum().float()


def _select(batch: Tensor, wanted: Sequence[int]) -> Tensor:
    if wanted and max(wanted) >= len(batch):
        raise ValueError(f"image {max(wanted)} is asked for, but the batch holds {len(batch)} images")
    return batch if list(wanted) == list(range(len(batch))) else batch[list(wanted)]


def _gather(hidden: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    """States (M, H) at (pack, position) places of (G, T, H)."""
    at = torch.tensor(places, dtype=torch.long, device=hidden.device).view(-1, 2)
    return hidden[at[:, 0], at[:, 1]]


def _empty_size(size: tuple[Sequence[int], Sequence[int]]) -> tuple[int, int]:
    """Height and width of an image's empty mask stack: the original size, else the input size."""
    chosen = size[1] if min(size[1]) > 0 else size[0]
    return int(chosen[0]), int(chosen[1])


def _image_sizes(
    shapes: Sequence[Any] | None, num_images: int, rows: Sequence[Row], found: Sequence[tuple[int, int]]
) -> list[Any]:
    if shapes is None:
        if found:
            raise ValueError("[SEG] asks for masks: give sam_mask_shape_list")
        return [((0, 0), (0, 0))] * num_images
    if len(shapes) != num_images:
        raise ValueError(f"sam_mask_shape_list has {len(shapes)} entries for {num_images} images")
    return list(shapes)


def _checked_targets(
    logits: Sequence[Tensor], masks_list: Sequence[Tensor] | None, paths: Sequence[str] | None
) -> list[Tensor]:
    if masks_list is None:
        masks_list = [x.new_zeros(x.shape) for x in logits if not len(x)]
    if len(masks_list) != len(logits):
        raise ValueError(f"masks_list has {len(masks_list)} entries for {len(logits)} images")
    for b, (x, target) in enumerate(zip(logits, masks_list, strict=True)):
        if len(x) != len(target) or (len(x) and x.shape != target.shape):
            name = paths[b] if paths else f"image {b}"
            raise ValueError(
                f"{name}: its answers hold {len(x)} [SEG] for masks of size {tuple(x.shape[1:])}, but "
                f"{len(target)} masks of size {tuple(target.shape[1:])} were given"
            )
    return [t.to(x.device) for x, t in zip(logits, masks_list, strict=True)]
