"""Published SAM 1 weights (`sam_vit_h_4b8939.pth`, our `save_sam` files) -> `model.sam.Sam` by itself."""

import logging

import torch

from model.assembly import Source, set_tensor
from model.checkpoint import SAM_WRAPPERS
from model.key_maps import map_sam_key, plan
from model.layouts import infer_sam_config, sam_config_of_file
from model.sam import Sam
from model.weight_files import WeightFiles
from utils.io import StrPath

logger = logging.getLogger(__name__)


def load_sam(path: StrPath, dtype: torch.dtype | None = None) -> Sam:
    """A `Sam` on the CPU, in evaluation mode; its sizes are stored in the file or read off the weights.

    Args:
        path: segment-anything's `.pth`, or a safetensors file in its names.
        dtype: of the weights (the positional matrix stays fp32); None keeps what is stored.

    Raises:
        ValueError: not readable, or tensors missing, unexpected or mis-shaped (all named).
    """
    from accelerate import init_empty_weights

    source = Source(WeightFiles(path, unwrap=SAM_WRAPPERS), map_sam_key, str(path))
    config = sam_config_of_file(source.files.metadata(), path) or infer_sam_config(source.shapes())
    with init_empty_weights(include_buffers=False):
        model = Sam(config)
    expected = {f"sam.{name}": tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    report = plan(source.files.shapes(), expected, map_sam_key)
    report.raise_if_faulty(path)
    logger.info("%s: %s", path, report.summary())
    for name, tensor in source.files.tensors(set(report.placed)):
        set_tensor(model, report.placed[name].removeprefix("sam."), tensor, dtype)
    return model.eval().requires_grad_(False)
