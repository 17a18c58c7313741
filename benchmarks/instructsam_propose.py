"""Automatic masks of a picture: the project's generator against one that does each step as it is written.

python benchmarks/instructsam_propose.py       about two minutes of processor time; --tiny for seconds

Two comparisons. `masks`: no network, given mask logits at low resolution of discs (as many small as large)
and a quality for each, of which a quarter passes. `sam2`: a SAM 2 with random weights, against
transformers' own forward pass. The straightforward path encodes crop by crop, draws all masks of a batch of
points at full size, then filters, and codes every mask that is left by a loop before suppression.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import Report, measured, peak_memory  # noqa: E402
from utils.config import parse_config  # noqa: E402

OURS, PLAIN = "ours", "straightforward"
PIXELS_APART = 1e-3


@dataclass
class ProposeBenchmarkConfig:
    """Settings of the benchmark."""

    tiny: bool = False
    """Small pictures and few points: checks equality in seconds; its ratios mean nothing."""
    side: int = 800
    """Side of the picture in pixels."""
    points_per_side: int = 8
    """Points along each side of the picture and of each of its four crops."""
    repeats: int = 3
    """Timed runs of every path, in turns."""
    seed: int = 0
    """Seed of weights, picture and discs."""

    def validate(self) -> list[str]:
        """Faults, as sentences."""
        names = ("side", "points_per_side", "repeats")
        return [f"{n} is {getattr(self, n)}; at least 1" for n in names if getattr(self, n) < 1]


class Discs:
    """Predictor without a network: around each point three discs with soft edges, of drawn sizes."""

    def __init__(self, seed: int, low: int = 256) -> None:
        import torch

        self.low, self.device = low, torch.device("cpu")
        self.at = torch.arange(low) + 0.5
        generator = torch.Generator().manual_seed(seed)
        self.radius = 4 * 16 ** torch.rand(4096, generator=generator)  # 4 to 64 cells
        self.quality = torch.rand(4096, generator=generator)

    def encode(self, crops: Sequence[Any]) -> list[tuple[int, int]]:
        """Sizes of the crops."""
        return [crop.shape[:2] for crop in crops]

    def low_res(self, size: tuple[int, int], points: Any) -> tuple[Any, Any]:
        """Logits (n, 3, low, low) and qualities (n, 3)."""
        import torch

        x, y = (points * self.low / torch.tensor([size[1], size[0]])).unbind(1)
        away = ((self.at - x[:, None])[:, None] ** 2 + (self.at - y[:, None])[:, :, None] ** 2).sqrt()
        drawn = ((points[:, :1] * 7 + points[:, 1:] * 13).long() + torch.arange(3) * 1301) % 4096
        return (self.radius[drawn][..., None, None] - away[:, None]) * 2, self.quality[drawn]

    def predict(self, encoded: tuple[int, int], points: Any) -> Any:
        """Candidates of the generator."""
        return DrawnDiscs(*self.low_res(encoded, points), encoded)


class DrawnDiscs:
    """Candidates of `Discs`."""

    def __init__(self, low: Any, iou: Any, size: tuple[int, int]) -> None:
        self.low, self.iou, self.size = low.flatten(0, 1), iou, size

    def logits(self, index: Any) -> Any:
        """Masks at full size."""
        return full_size(self.low[index], self.size)


def full_size(low: Any, size: tuple[int, int]) -> Any:
    """(m, h', w') -> (m, h, w)."""
    from torch.nn.functional import interpolate

    return interpolate(low[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def plain_masks(encode: Callable, decode: Callable, rgb: Any, config: Any) -> list[tuple[dict, list[int]]]:
    """(run-length code, box xyxy) of every mask in order, step by step.

    `encode(crop)` and `decode(encoded, crop size, points)` -> low-resolution logits (n, 3, h', w') and
    qualities (n, 3) are the network.
    """
    import torch
    from torchvision.ops import nms

    from model.instructsam.automatic_masks import BORDER, crop_boxes, point_grid

    height, width = rgb.shape[:2]
    codes: list[dict] = []
    boxes, areas = [], []
    for _, crop in crop_boxes(height, width, config.crop_n_layers, config.crop_overlap_ratio):
        x0, y0, x1, y1 = crop
        encoded = encode(rgb[y0:y1, x0:x1])
        grid = torch.from_numpy(point_grid(config.points_per_side) * (x1 - x0, y1 - y0)).float()
        found_boxes, found_iou, found_codes = [], [], []
        for points in grid.split(config.points_per_batch):
            low, iou = decode(encoded, (y1 - y0, x1 - x0), points)
            logits, iou = full_size(low.flatten(0, 1).float(), (y1 - y0, x1 - x0)), iou.flatten()
            logits, iou = logits[iou > config.pred_iou_thresh], iou[iou > config.pred_iou_thresh]
            offset = config.stability_score_offset
            stability = (logits > offset).sum((1, 2)) / (logits > -offset).sum((1, 2))
            stable = stability >= config.stability_score_thresh
            masks, iou = logits[stable] > 0, iou[stable]
            box = torch.stack([_ends(masks.any(1))[0], _ends(masks.any(2))[0]], dim=1) + torch.tensor(
                [x0, y0]
            )
            far = torch.stack([_ends(masks.any(1))[1], _ends(masks.any(2))[1]], dim=1) + torch.tensor(
                [x0, y0]
            )
            box = torch.cat((box, far), dim=1)
            near = (box - torch.tensor(crop)).abs() <= BORDER
            near &= (box - torch.tensor([0, 0, width, height])).abs() > BORDER
            inner = ~near.any(1)
            whole = torch.zeros(int(inner.sum()), height, width, dtype=torch.bool)
            whole[:, y0:y1, x0:x1] = masks[inner]
            found_codes += [_code(mask) for mask in whole]
            found_boxes.append(box[inner])
            found_iou.append(iou[inner])
        kept = nms(torch.cat(found_boxes).float(), torch.cat(found_iou), config.box_nms_thresh)
        boxes.append(torch.cat(found_boxes)[kept])
        areas.append(torch.full((len(kept),), float((x1 - x0) * (y1 - y0))))
        codes += [found_codes[k] for k in kept.tolist()]
    order = nms(torch.cat(boxes).float(), 1 / torch.cat(areas), config.crop_nms_thresh)
    return [(codes[k], torch.cat(boxes)[k].tolist()) for k in order.tolist()]


def _ends(seen: Any) -> tuple[Any, Any]:
    """First and last true position of bool (m, n)."""
    seen = seen.int()
    return seen.argmax(1), seen.shape[1] - 1 - seen.flip(1).argmax(1)


def _code(mask: Any) -> dict:
    """Run-length code of one mask, with a list of runs made on the device."""
    from pycocotools import mask as coco

    height, width = mask.shape
    flat = mask.T.flatten()
    at = [0, *((flat[1:] ^ flat[:-1]).nonzero()[:, 0] + 1).tolist(), height * width]
    counts = [b - a for a, b in zip(at[:-1], at[1:])]
    counts = [0, *counts] if flat[0] else counts
    code = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode()}


def disc_paths(config: ProposeBenchmarkConfig) -> dict[str, Callable[[], list]]:
    """Both paths on given logits."""
    import numpy as np

    from model.instructsam.automatic_masks import GridConfig

    grid = GridConfig(points_per_side=config.points_per_side)
    discs = Discs(config.seed)
    rgb = np.zeros((config.side, config.side, 3), np.uint8)
    plain_encode, plain_decode = (lambda crop: None), (lambda _, size, points: discs.low_res(size, points))
    return {
        OURS: lambda: our_masks(discs, rgb, grid),
        PLAIN: lambda: plain_masks(plain_encode, plain_decode, rgb, grid),
    }


def sam2_paths(config: ProposeBenchmarkConfig) -> dict[str, Callable[[], list]]:
    """Both paths with a SAM 2 of random weights."""
    import numpy as np
    import torch
    from transformers import Sam2Model

    from model.instructsam.automatic_masks import GridConfig, point_grid
    from model.instructsam.predictors import Sam2Predictor
    from model.sam2 import SAM2_CONFIGS, Sam2Config, random_sam2, transformers_config
    from model.sam2_files import POSITIONS

    middle = Sam2Config(image_size=512, embed_dim=48, num_heads=1, stages=(1, 2, 7, 2), prompt_embed_dim=128)
    model = random_sam2(SAM2_CONFIGS["sam2_toy"] if config.tiny else middle, seed=config.seed)
    state = dict(model.state_dict())
    matrix = state.pop(POSITIONS)
    for name in ("shared_image_embedding", "prompt_encoder.shared_embedding"):
        state[f"{name}.positional_embedding"] = matrix
    reference = Sam2Model(transformers_config(model.config)).eval()
    reference.load_state_dict(state)
    rng = np.random.default_rng(config.seed)
    rgb = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((config.side // 8, config.side // 8, 1)))
    rgb = (rgb * 0.7 + rng.integers(0, 76, rgb.shape)).astype(np.uint8)
    predictor, side = Sam2Predictor(model), model.config.image_size
    with torch.inference_mode():
        (encoded,) = predictor.encode([rgb])
        points = torch.from_numpy(point_grid(config.points_per_side) * config.side).float()
        quality = predictor.predict(encoded, points).iou.flatten().sort().values
    threshold = float(
        quality[3 * len(quality) // 4 :][:2].mean()
    )  # between two, so that rounding cannot tell
    grid = GridConfig(  # random networks draw picture-wide masks: without suppression more of them remain
        points_per_side=config.points_per_side,
        pred_iou_thresh=threshold,
        stability_score_thresh=0.3,
        box_nms_thresh=1.0,
        crop_nms_thresh=1.0,
    )

    def encode(crop: Any) -> Any:
        return reference.get_image_embeddings(model.preprocess([crop]))

    def decode(encoded: Any, size: tuple[int, int], points: Any) -> tuple[Any, Any]:
        moved = points * side / torch.tensor([size[1], size[0]])
        found = reference(image_embeddings=encoded, input_points=moved[None, :, None], multimask_output=True)
        return found.pred_masks[0], found.iou_scores[0]

    return {
        OURS: lambda: our_masks(predictor, rgb, grid),
        PLAIN: lambda: plain_masks(encode, decode, rgb, grid),
    }


def our_masks(predictor: Any, rgb: Any, grid: Any) -> list[tuple[dict, list[int]]]:
    """Codes and boxes of the project's generator."""
    from model.instructsam.automatic_masks import generate_masks
    from utils.rle import encode_masks

    records = generate_masks(predictor, rgb, grid)
    codes = [code for record in records for code in encode_masks([record.runs.mask()])]
    boxes = [[int(v) for v in (x, y, x + w, y + h)] for x, y, w, h in (r.bbox for r in records)]
    return list(zip(codes, boxes))


def compared(ours: list, plain: list) -> tuple[bool, str]:
    """Whether both paths gave the same masks (up to a few pixels), and a line about it."""
    from utils.rle import decode_mask

    if len(ours) != len(plain):
        return False, f"{len(ours)} masks against {len(plain)}: DIFFER"
    same = sum(a == b for a, b in zip(ours, plain))
    apart = [float((decode_mask(a) != decode_mask(b)).mean()) for (a, _), (b, _) in zip(ours, plain)]
    worst = max(apart, default=0.0)
    line = f"{len(ours)} masks, {same} identical with their boxes, largest share of other pixels {worst:.1e}"
    return len(ours) > 0 and worst <= PIXELS_APART, line


def run(config: ProposeBenchmarkConfig) -> Report:
    """Both comparisons: memory, equality, times."""
    import torch

    torch.set_num_threads(1)
    if config.tiny:
        config.side, config.points_per_side, config.repeats = 160, 3, 1
    lines, equal = [], True
    with torch.inference_mode():
        for title, paths in (("masks", disc_paths(config)), ("sam2", sam2_paths(config))):
            memory = {name: peak_memory(path) for name, path in paths.items()}
            same, line = compared(*(path() for path in paths.values()))
            candidates = 15 * config.points_per_side**2
            lines += [f"--- {title}: {config.side} x {config.side} px, {candidates} candidate masks", line]
            lines += measured(paths, config.repeats, memory)
            equal = equal and same
    return Report([*lines, f"equal: {equal}"], equal)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark and print its report; exit code 1 if the two paths' results differ."""
    report = run(parse_config(ProposeBenchmarkConfig, argv, prog="instructsam_propose.py"))
    print("\n".join(report.lines))
    sys.exit(0 if report.equal else 1)


if __name__ == "__main__":
    main()
