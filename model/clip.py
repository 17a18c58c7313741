"""The CLIP vision tower: patch features of an inner layer, nothing computed past it.

Shapes: B images, c pixels, N inserted features, D tower width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model._torchvision import ensure_torchvision

ensure_torchvision()

from transformers import CLIPVisionConfig, CLIPVisionModel  # noqa: E402

SELECT_FEATURES = ("patch", "cls_patch")


def build_vision_tower(vision: dict[str, Any]) -> CLIPVisionModel:
    """A tower with random weights from `CLIPVisionConfig` fields."""
    return CLIPVisionModel(CLIPVisionConfig(**vision))


def num_image_features(vision: dict[str, Any], select_feature: str) -> int:
    """Number N of features that stand for one image: patches, plus the class token for `cls_patch`."""
    if select_feature not in SELECT_FEATURES:
        raise ValueError(f"mm_vision_select_feature is {select_feature!r}; known: {SELECT_FEATURES}")
    config = CLIPVisionConfig(**vision)
    return (config.image_size // config.patch_size) ** 2 + (select_feature == "cls_patch")


def tower_features(
    tower: CLIPVisionModel, images: Tensor, select_layer: int = -2, select_feature: str = "patch"
) -> Tensor:
    """`hidden_states[select_layer]` of images (B, 3, c, c) -> (B, N, D), in the tower's dtype.

    Blocks behind the selected layer do not run. Gradients flow only where a tower weight is trainable.
    """
    depth = len(tower.encoder.layers)
    blocks = select_layer if select_layer >= 0 else depth + 1 + select_layer
    if not 0 <= blocks <= depth:
        raise ValueError(
            f"mm_vision_select_layer {select_layer} does not exist: the tower has {depth} blocks"
        )
    images = images.to(tower.device, tower.dtype)
    with torch.set_grad_enabled(torch.is_grad_enabled() and _trainable(tower)):
        hidden = tower.pre_layrnorm(tower.embeddings(images))
        for block in tower.encoder.layers[:blocks]:
            hidden = block(hidden, attention_mask=None)
    return hidden[:, 1:] if select_feature == "patch" else hidden


def _trainable(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
