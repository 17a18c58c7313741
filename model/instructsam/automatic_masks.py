"""Masks of everything in a picture: a grid of points on the picture and on overlapping crops of it.

Steps (InstructSAM specification, 3.1): crops; per crop a grid of points, three masks per point; filters by
predicted quality, by stability and by contact with the crop's border; suppression of overlapping boxes
inside a crop, then over all crops in favour of small crops. Memory is flat: never more than
`masks_per_chunk` masks have the size of the crop at the same time, what is kept of a mask are the ends of
its runs.

Boxes are x0, y0, x1, y1 with inclusive ends (the published convention), crops with exclusive ends.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model._torchvision import ensure_torchvision
from model.instructsam.predictors import Candidates, MaskPredictor

BORDER = 20
"""Pixels within which a box touches a border."""


@dataclass(frozen=True)
class GridConfig:
    """Parameters of the generator; the defaults are InstructSAM's.

    A `pred_iou_thresh` or `stability_score_thresh` of 0 switches that filter off. `points_per_batch`,
    `masks_per_chunk` and `crops_per_batch` (0: all) trade memory for speed and change no result.
    """

    points_per_side: int = 24
    pred_iou_thresh: float = 0.75
    stability_score_thresh: float = 0.75
    stability_score_offset: float = 1.0
    mask_threshold: float = 0.0
    box_nms_thresh: float = 0.5
    crop_n_layers: int = 1
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    points_per_batch: int = 64
    masks_per_chunk: int = 64
    crops_per_batch: int = 0

    def faults(self) -> list[str]:
        """One sentence per value out of range."""
        least = {
            "points_per_side": 1,
            "crop_n_layers": 0,
            "crop_n_points_downscale_factor": 1,
            "points_per_batch": 1,
            "masks_per_chunk": 1,
            "crops_per_batch": 0,
        }
        found = [f"{k} is {getattr(self, k)}; at least {v}" for k, v in least.items() if getattr(self, k) < v]
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh", "crop_nms_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} is {getattr(self, name)}; it lies between 0 and 1")
        if not 0 <= self.crop_overlap_ratio < 1:
            found.append(f"crop_overlap_ratio is {self.crop_overlap_ratio}; at least 0 and below 1")
        return found


@dataclass(frozen=True)
class Runs:
    """A mask as run ends: `edges` int32 (2 R,) start and end (exclusive) of each run of foreground, row by
    row in the window (x0, y0, x1, y1) of a picture of `size` (H, W)."""

    edges: np.ndarray
    window: tuple[int, int, int, int]
    size: tuple[int, int]

    @classmethod
    def of(cls, mask: np.ndarray) -> "Runs":
        """Runs of a mask (H, W)."""
        height, width = mask.shape
        return cls(edges_of_rows((mask != 0).reshape(1, -1))[0], (0, 0, width, height), (height, width))

    @property
    def area(self) -> int:
        """Pixels of foreground."""
        return int(self.edges[1::2].sum() - self.edges[0::2].sum())

    def mask(self) -> np.ndarray:
        """bool (H, W)."""
        x0, y0, x1, y1 = self.window
        lengths = np.diff(self.edges, prepend=0, append=(y1 - y0) * (x1 - x0))
        inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(y1 - y0, x1 - x0)
        if inside.shape == self.size:
            return inside
        whole = np.zeros(self.size, bool)
        whole[y0:y1, x0:x1] = inside
        return whole


@dataclass(frozen=True)
class MaskRecord:
    """One generated mask: `bbox` and `crop_box` xywh in pixels of the picture (`bbox` with width = last
    column - first column), `point` the x, y that asked for it."""

    runs: Runs
    bbox: tuple[float, float, float, float]
    predicted_iou: float
    stability_score: float
    point: tuple[float, float]
    crop_box: tuple[float, float, float, float]

    @property
    def area(self) -> int:
        """Pixels of foreground."""
        return self.runs.area


def crop_boxes(
    height: int, width: int, n_layers: int, overlap_ratio: float
) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(layer, (x0, y0, x1, y1)) of the picture and its crops; layer l has 2^l x 2^l, columns outermost."""
    boxes = [(0, (0, 0, width, height))]
    for layer in range(1, n_layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / count))
        w, h = (math.ceil((overlap * (count - 1) + side) / count) for side in (width, height))
        for x0 in (int((w - overlap) * k) for k in range(count)):
            for y0 in (int((h - overlap) * k) for k in range(count)):
                boxes.append((layer, (x0, y0, min(x0 + w, width), min(y0 + h, height))))
    return boxes


def point_grid(per_side: int) -> np.ndarray:
    """float64 (per_side^2, 2) x, y in (0, 1), row by row: (k + 0.5) / per_side."""
    at = (np.arange(per_side) + 0.5) / per_side
    return np.stack(np.meshgrid(at, at), axis=-1).reshape(-1, 2)


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Indices kept by greedy suppression, best first, equal scores in their order.

    boxes (N, 4), scores (N,); a box goes when its IoU with a kept better one is above `threshold`.
    """
    from model._torchvision import plain_nms

    nms = plain_nms
    if ensure_torchvision():
        from torchvision.ops import nms
    kept = nms(
        torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(scores.astype(np.float32)), threshold
    )
    return kept.numpy()


@dataclass
class _Found:
    """Masks of one crop in the order of discovery: edges in the crop, boxes int64 (N, 4) in the picture."""

    edges: list[np.ndarray]
    boxes: np.ndarray
    iou: np.ndarray
    stability: np.ndarray
    points: np.ndarray

    @classmethod
    def joined(cls, parts: "list[_Found]") -> "_Found":
        """All masks of several parts."""
        edges = [edge for part in parts for edge in part.edges]
        columns = ((part.boxes, part.iou, part.stability, part.points) for part in parts)
        return cls(edges, *(np.concatenate(column) for column in zip(*columns)))

    def select(self, index: np.ndarray) -> "_Found":
        """The masks at `index`, in that order."""
        columns = (self.boxes[index], self.iou[index], self.stability[index], self.points[index])
        return _Found([self.edges[k] for k in index], *columns)


@torch.inference_mode()
def generate_masks(
    predictor: MaskPredictor, rgb: np.ndarray, config: GridConfig = GridConfig()
) -> list[MaskRecord]:
    """Masks of a picture, uint8 (H, W, 3) RGB, in the published order (small crops first, not by quality).

    A picture in which nothing passes the filters gives an empty list.
    """
    height, width = rgb.shape[:2]
    layers_boxes = crop_boxes(height, width, config.crop_n_layers, config.crop_overlap_ratio)
    layers_boxes = [(layer, box) for layer, box in layers_boxes if box[0] < box[2] and box[1] < box[3]]
    size = config.crops_per_batch or len(layers_boxes)
    found: list[_Found] = []
    for first in range(0, len(layers_boxes), size):
        group = layers_boxes[first : first + size]
        encoded = predictor.encode([rgb[y0:y1, x0:x1] for _, (x0, y0, x1, y1) in group])
        for (layer, box), features in zip(group, encoded):
            per_side = int(config.points_per_side / config.crop_n_points_downscale_factor**layer)
            masks = _search(predictor, features, box, (height, width), point_grid(per_side), config)
            found.append(masks.select(suppress(masks.boxes, masks.iou, config.box_nms_thresh)))
    everything = _Found.joined(found)
    crops = np.repeat([box for _, box in layers_boxes], [len(masks.edges) for masks in found], axis=0)
    order = np.arange(len(everything.edges))
    if len(layers_boxes) > 1 and len(order):
        areas = ((crops[:, 2] - crops[:, 0]) * (crops[:, 3] - crops[:, 1])).astype(np.float32)
        order = suppress(everything.boxes, 1 / areas, config.crop_nms_thresh)
    kept = everything.select(order)
    return [
        MaskRecord(
            Runs(kept.edges[k], tuple(int(v) for v in crop), (height, width)),
            _xywh(kept.boxes[k]),
            float(kept.iou[k]),
            float(kept.stability[k]),
            tuple(float(v) for v in kept.points[k]),
            _xywh(crop),
        )
        for k, crop in enumerate(crops[order])
    ]


def _search(
    predictor: MaskPredictor,
    encoded: object,
    crop: tuple[int, int, int, int],
    size: tuple[int, int],
    grid: np.ndarray,
    config: GridConfig,
) -> _Found:
    """All masks of a crop that pass the filters, before suppression."""
    x0, y0, x1, y1 = crop
    points = torch.from_numpy((grid * (x1 - x0, y1 - y0)).astype(np.float32))
    nothing = np.zeros((0, 4), np.int64), *(np.zeros(0, np.float32),) * 2, np.zeros((0, 2), np.float32)
    parts = [_Found([], *nothing)]
    for batch in points.split(config.points_per_batch):
        candidates = predictor.predict(encoded, batch.to(predictor.device))
        iou = candidates.iou.float().flatten()
        good = iou > config.pred_iou_thresh if config.pred_iou_thresh > 0 else torch.ones_like(iou) > 0
        origins = (batch + torch.tensor([x0, y0])).repeat_interleave(candidates.iou.shape[1], dim=0)
        for index in good.nonzero()[:, 0].split(config.masks_per_chunk):
            if not len(index):
                continue
            edges, stable, stability = _draw(candidates, index, config)
            boxes = run_boxes(edges, x1 - x0) + np.array([x0, y0, x0, y0])
            inner = np.flatnonzero(~_cut(boxes, crop, size))
            at = index.cpu()[stable]
            part = _Found(edges, boxes, iou.cpu()[at].numpy(), stability, origins[at].numpy())
            parts.append(part.select(inner))
    return _Found.joined(parts)


def _draw(
    candidates: Candidates, index: Tensor, config: GridConfig
) -> tuple[list[np.ndarray], Tensor, np.ndarray]:
    """Edges of the stable ones among the masks at `index`, which ones these are, and their stability."""
    logits = candidates.logits(index)
    stability = stability_scores(logits, config.mask_threshold, config.stability_score_offset).cpu()
    stable = torch.ones(len(index), dtype=torch.bool)
    if config.stability_score_thresh > 0:
        stable = stability >= config.stability_score_thresh
    stable = stable.nonzero()[:, 0]
    masks = (logits > config.mask_threshold)[stable.to(logits.device)]
    return _edges(masks.flatten(1)), stable, stability[stable].numpy()


def stability_scores(logits: Tensor, threshold: float, offset: float) -> Tensor:
    """float32 (m,): pixels above threshold + offset over pixels above threshold - offset; 0 / 0 is NaN."""
    high, low = (_pixels(logits > threshold + shift) for shift in (offset, -offset))
    return high / low


def _pixels(masks: Tensor) -> Tensor:
    """Pixels of each mask (m, h, w), float32."""
    if masks.device.type == "cpu":  # torch's sum of bools is many times slower there
        return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.float32)
    return masks.flatten(1).sum(dim=1).float()


def _edges(masks: Tensor) -> list[np.ndarray]:
    """Edges of bool masks (m, h w); see `Runs`."""
    return edges_of_rows(masks.numpy()) if masks.device.type == "cpu" else edges_on_device(masks)


def edges_on_device(masks: Tensor) -> list[np.ndarray]:
    """Edges of bool masks (m, h w) on any device, found there and fetched in one transfer."""
    if not len(masks):
        return []
    padded = torch.nn.functional.pad(masks.to(torch.uint8), (1, 1))
    row, at = (padded[:, 1:] != padded[:, :-1]).nonzero(as_tuple=True)
    ends = torch.bincount(row, minlength=len(masks)).cumsum(0).tolist()
    return np.split(at.int().cpu().numpy(), ends[:-1])


def edges_of_rows(masks: np.ndarray) -> list[np.ndarray]:
    """Edges of bool masks (m, h w) in memory; many times faster there than torch's way."""
    padded = np.zeros(masks.shape[1] + 2, bool)
    edges = []
    for mask in masks:
        padded[1:-1] = mask
        edges.append(np.flatnonzero(padded[1:] != padded[:-1]).astype(np.int32))
    return edges


def run_boxes(edges: list[np.ndarray], width: int) -> np.ndarray:
    """int64 (m, 4) boxes, inclusive ends, of masks given by edges in a window `width` wide; 0 if empty."""
    boxes = np.zeros((len(edges), 4), np.int64)
    full = np.flatnonzero([len(edge) for edge in edges])
    if not len(full):
        return boxes
    flat = np.concatenate([edges[k] for k in full])
    first = np.concatenate(([0], np.cumsum([len(edges[k]) // 2 for k in full])))[:-1]
    start, last = flat[0::2], flat[1::2] - 1
    wraps = start // width != last // width  # such a run reaches both sides
    left, right = np.where(wraps, 0, start % width), np.where(wraps, width - 1, last % width)
    boxes[full, 0] = np.minimum.reduceat(left, first)
    boxes[full, 1] = np.minimum.reduceat(start // width, first)
    boxes[full, 2] = np.maximum.reduceat(right, first)
    boxes[full, 3] = np.maximum.reduceat(last // width, first)
    return boxes


def _cut(boxes: np.ndarray, crop: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """bool (N,): the box touches a side of the crop that is not a side of the picture of `size` (H, W)."""
    near_crop = np.abs(boxes - np.array(crop)) <= BORDER
    near_picture = np.abs(boxes - np.array([0, 0, size[1], size[0]])) <= BORDER
    return (near_crop & ~near_picture).any(axis=1)


def _xywh(box: np.ndarray) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (float(v) for v in box)
    return x0, y0, x1 - x0, y1 - y0
