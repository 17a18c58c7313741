"""Published SAM 2 weights -> `Sam2`: a total key map, sizes read off the weights, safe loading.

Two layouts are read: the original file (`sam2_hiera_large.pt`, tensors under "model") and a folder or
safetensors file in transformers' names. What only serves video is left out by name (`VIDEO_ONLY`).
"""

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from model.assembly import set_tensor
from model.key_maps import Ignored, KeyReport, Shape, Target, plan
from model.sam2 import SAM2_CONFIGS, Sam2, Sam2Config
from model.weight_files import WeightFiles
from utils.io import StrPath

logger = logging.getLogger(__name__)

WRAPPERS = ("model",)
_VIDEO = Ignored("memory of earlier frames, used for video only")
VIDEO_ONLY = re.compile(
    r"memory_(?:attention|encoder)\..+|(?:mask_downsample|obj_ptr_proj|obj_ptr_tpos_proj)\..+"
    r"|maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial"
    # the same in transformers' names
    r"|(?:object_pointer_proj|temporal_positional_encoding_projection_layer)\..+"
    r"|memory_temporal_positional_encoding|no_memory_positional_encoding|no_object_pointer"
    r"|occlusion_spatial_embedding_parameter"
)
POSITIONS = "positions.positional_encoding_gaussian_matrix"
POINTS = "prompt_encoder.point_embed.weight"

_PREFIXES = (
    (r"image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"sam_prompt_encoder\.", "prompt_encoder."),
    (r"sam_mask_decoder\.", "mask_decoder."),
)
_THREE_LAYERS = r"((?:output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head)\.)"
_RENAMES = (
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.norm([1-4])\.", r".layer_norm\1."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (_THREE_LAYERS + r"layers\.0\.", r"\1proj_in."),
    (_THREE_LAYERS + r"layers\.1\.", r"\1layers.0."),
    (_THREE_LAYERS + r"layers\.2\.", r"\1proj_out."),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
)
_MATRIX = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_HUB_MATRIX = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
_POINT = re.compile(r"sam_prompt_encoder\.point_embeddings\.([0-3])\.weight")


def map_sam2_key(name: str) -> Target | Ignored | None:
    """Names of the original file. A point embedding goes to a row, `prompt_encoder.point_embed.weight[k]`."""
    if VIDEO_ONLY.fullmatch(name):
        return _VIDEO
    if name == "no_mem_embed":
        return Target("no_memory_embedding")
    if name == _MATRIX:
        return Target(POSITIONS)
    point = _POINT.fullmatch(name)
    if point:
        return Target(f"{POINTS}[{point[1]}]")
    for prefix, new in _PREFIXES:
        match = re.match(prefix, name)
        if match:
            target = match.expand(new) + name[match.end() :]
            for pattern, replacement in _RENAMES:
                target = re.sub(pattern, replacement, target)
            return Target(target)
    return None


def map_hub_sam2_key(name: str) -> Target | Ignored | None:
    """Names of transformers' `Sam2Model` and `Sam2VideoModel`."""
    if VIDEO_ONLY.fullmatch(name):
        return _VIDEO
    if name == _HUB_MATRIX[0]:
        return Target(POSITIONS)
    if name == _HUB_MATRIX[1]:
        return Ignored(f"the same matrix as {_HUB_MATRIX[0]}")
    return Target(name)


def expected_shapes(model: Sam2, rows: bool) -> dict[str, Shape]:
    """Name -> shape of what a file must hold; `rows` cuts the point embeddings into their rows, as the
    original file has them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if rows:
        count, width = shapes.pop(POINTS)
        shapes |= {f"{POINTS}[{k}]": (1, width) for k in range(count)}
    return shapes


def plan_sam2(files: Mapping[str, Shape], model: Sam2) -> KeyReport:
    """Where each tensor of a file (name -> shape, either layout) goes in `model`; nothing is read."""
    original = not _in_hub_names(files)
    return plan(files, expected_shapes(model, original), map_sam2_key if original else map_hub_sam2_key)


def infer_sam2_config(shapes: Mapping[str, Shape]) -> Sam2Config:
    """The published size whose weights have these shapes (either layout).

    Raises:
        ValueError: no SAM 2 weights, or of no published size.
    """
    stem = "vision_encoder.backbone." if _in_hub_names(shapes) else "image_encoder.trunk."
    position, blocks = shapes.get(f"{stem}pos_embed"), set()
    for name in shapes:
        match = re.match(re.escape(stem) + r"blocks\.(\d+)\.", name)
        blocks |= {int(match[1])} if match else set()
    if position is None or not blocks:
        raise ValueError(
            "no SAM 2 image encoder among the weights (image_encoder.trunk.pos_embed is missing)"
        )
    found = (position[1], len(blocks), tuple(position[2:]))
    for config in SAM2_CONFIGS.values():
        if found == (config.embed_dim, sum(config.stages), config.position_size):
            return config
    raise ValueError(
        f"width {found[0]}, {found[1]} blocks and positions {found[2]} are those of no published SAM 2; "
        f"name the configuration (--sam2_cfg, one of {', '.join(SAM2_CONFIGS)})"
    )


def sam2_on_meta(config: Sam2Config) -> Sam2:
    """A `Sam2` whose parameters have shapes and no memory."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        return Sam2(config)


def load_sam2(path: StrPath, config: Sam2Config | None = None, dtype: torch.dtype | None = None) -> Sam2:
    """A `Sam2` on the CPU, in evaluation mode, from a published file.

    Args:
        path: `sam2_hiera_large.pt` or its like, or transformers' folder or safetensors file.
        config: the sizes; None reads them off the weights.
        dtype: of the weights (the positional matrix stays fp32); None keeps what is stored.

    Raises:
        ValueError: not readable, of no known size, or tensors missing, unexpected or mis-shaped (all named).
    """
    files = WeightFiles(path, unwrap=WRAPPERS)
    shapes = files.shapes()
    try:
        config = config or infer_sam2_config(shapes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model = sam2_on_meta(config)
    report = plan_sam2(shapes, model)
    report.raise_if_faulty(path)
    logger.info("%s: %s", path, report.summary())
    rows: dict[str, Tensor] = {}
    for name, tensor in files.tensors(set(report.placed)):
        target = report.placed[name]
        if target.startswith(f"{POINTS}["):
            rows[target] = tensor
        else:
            set_tensor(model, target, tensor, dtype)
    if rows:
        set_tensor(model, POINTS, torch.cat([rows[name] for name in sorted(rows)]), dtype)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, f"tensors without content: {left}"
    return model.eval().requires_grad_(False)


def check_sam2_keys(shapes: Mapping[str, Shape]) -> str:
    """Place a list of names on a model without weights; returns the counts, ValueError on any fault."""
    report = plan_sam2(shapes, sam2_on_meta(infer_sam2_config(shapes)))
    report.raise_if_faulty("key list")
    return report.summary()


def _in_hub_names(names: Mapping[str, Shape]) -> bool:
    return any(name.startswith("vision_encoder.") for name in names)
