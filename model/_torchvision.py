"""The one place that imports torchvision, usable also beside a torch it was not built for.

A CPU-only torch next to a stock torchvision wheel makes `import torchvision` fail with
"operator torchvision::nms does not exist", and with it segment_anything, peft, open_clip, timm and
transformers. `ensure_torchvision()` defines the missing operators in plain torch and imports again;
without torchvision it does nothing. Call it before importing any of those packages.
"""

import importlib
import importlib.util
import logging
import sys

import torch

logger = logging.getLogger(__name__)

_LIBRARIES: list[torch.library.Library] = []  # operator definitions live as long as these objects
_MISSING_OPERATOR = "operator torchvision::"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def plain_nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy non-maximum suppression in plain torch.

    `boxes` (N, 4) as x1, y1, x2, y2 and `scores` (N,) give the kept indices (M,) int64, best first; a
    box goes when its IoU with a kept better one is above `iou_threshold`.
    """
    order = scores.argsort(descending=True, stable=True)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[torch.Tensor] = []
    while order.numel():
        best, rest = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        inter = (high - low).clamp(min=0).prod(dim=1)
        order = rest[inter <= iou_threshold * (area[best] + area[rest] - inter)]
    return torch.stack(kept) if kept else order


def _drop_half_imported() -> None:
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]


def ensure_torchvision() -> bool:
    """Make `import torchvision` work; returns False where torchvision is not installed.

    Raises RuntimeError when torchvision is broken for another reason than its missing operators.
    """
    if sys.modules.get("torchvision") is not None:
        return True
    if sys.modules.get("torchvision", 0) is None or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
        return True
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
    logger.warning(
        "torchvision does not fit the installed torch %s; using plain-torch NMS. "
        "`pip install -r requirements.txt` installs a fitting pair.",
        torch.__version__,
    )
    _drop_half_imported()
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    library.impl("nms", plain_nms, "CPU")
    _LIBRARIES.append(library)
    importlib.import_module("torchvision")
    for name in ("torchvision.extension", "torchvision.ops.boxes"):
        module = importlib.import_module(name)
        if hasattr(module, "_assert_has_ops"):
            module._assert_has_ops = lambda: None
    return True
