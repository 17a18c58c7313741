"""The mask generator: against a plain loop over points, memory, degenerate pictures, SAM 1 and 2."""

import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.instructsam.automatic_masks import (
    GridConfig,
    MaskRecord,
    Runs,
    crop_boxes,
    edges_of_rows,
    edges_on_device,
    generate_masks,
    point_grid,
    run_boxes,
    stability_scores,
    suppress,
)
from model.instructsam.predictors import MaskPredictor, Sam1Predictor, Sam2Predictor
from model.sam import build_sam
from model.sam2 import random_sam2
from model.sam_files import load_sam
from tests.conftest import REPO
from tests.model.instructsam_scene import ScriptedPredictor


def scene(seed: int, height: int = 90, width: int = 130) -> np.ndarray:
    """Random rectangles and discs with ids in the red channel."""
    rng = np.random.default_rng(seed)
    rgb = np.zeros((height, width, 3), np.uint8)
    for number in range(1, 15):
        x, y, r = int(rng.integers(width)), int(rng.integers(height)), int(rng.integers(3, 15))
        if number % 2:
            cv2.circle(rgb, (x, y), r, (number, 0, 0), -1)
        else:
            cv2.rectangle(rgb, (x - r, y - r // 2), (x + r, y + r // 2), (number, 0, 0), -1)
    return rgb


# ------------------------------------------------------------------------------------- the plain algorithm


def plain_boxes_iou(a: tuple, b: tuple) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = w * h if w > 0 and h > 0 else 0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union else 0.0


def plain_suppress(items: list[dict], key: str, threshold: float) -> list[dict]:
    kept: list[dict] = []
    for item in sorted(items, key=lambda item: -item[key]):
        if all(plain_boxes_iou(item["box"], other["box"]) <= threshold for other in kept):
            kept.append(item)
    return kept


def plain_generator(predictor: MaskPredictor, rgb: np.ndarray, config: GridConfig) -> list[dict]:
    """One point and one mask at a time."""
    height, width = rgb.shape[:2]
    everything = []
    for layer, (x0, y0, x1, y1) in crop_boxes(height, width, config.crop_n_layers, config.crop_overlap_ratio):
        (encoded,) = predictor.encode([rgb[y0:y1, x0:x1]])
        found = []
        per_side = int(config.points_per_side / config.crop_n_points_downscale_factor**layer)
        for u, v in point_grid(per_side):
            point = torch.tensor([[u * (x1 - x0), v * (y1 - y0)]], dtype=torch.float32)
            candidates = predictor.predict(encoded, point)
            for k, iou in enumerate(candidates.iou[0].tolist()):
                if not iou > config.pred_iou_thresh:
                    continue
                logits = candidates.logits(torch.tensor([k]))[0].numpy()
                low = (logits > -config.stability_score_offset).sum()
                stability = (logits > config.stability_score_offset).sum() / low if low else 0
                if stability < config.stability_score_thresh:
                    continue
                rows, columns = np.nonzero(logits > 0)
                box = (columns.min() + x0, rows.min() + y0, columns.max() + x0, rows.max() + y0)
                sides = zip(box, (x0, y0, x1, y1), (0, 0, width, height))
                if any(abs(b - c) <= 20 and abs(b - p) > 20 for b, c, p in sides):
                    continue
                mask = np.zeros((height, width), bool)
                mask[y0:y1, x0:x1] = logits > 0
                found.append({"box": tuple(map(int, box)), "iou": iou, "mask": mask, "stability": stability})
                found[-1] |= {"point": (point + torch.tensor([x0, y0]))[0].tolist()}
        for item in plain_suppress(found, "iou", config.box_nms_thresh):
            everything.append(item | {"small": 1 / ((x1 - x0) * (y1 - y0))})
    if config.crop_n_layers:
        everything = plain_suppress(everything, "small", config.crop_nms_thresh)
    return everything


def assert_equal(records: list[MaskRecord], plain: list[dict]) -> None:
    assert len(records) == len(plain)
    for record, item in zip(records, plain):
        x0, y0, x1, y1 = item["box"]
        assert record.bbox == (x0, y0, x1 - x0, y1 - y0)
        assert np.array_equal(record.runs.mask(), item["mask"]) and record.area == item["mask"].sum()
        assert record.predicted_iou == pytest.approx(item["iou"], abs=1e-6)
        assert record.stability_score == pytest.approx(item["stability"], abs=1e-6)
        assert record.point == pytest.approx(item["point"], abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_plain_algorithm(seed: int) -> None:
    rgb = scene(seed)
    config = GridConfig(
        points_per_side=9,
        stability_score_thresh=0.6,
        crop_n_layers=seed,
        crop_n_points_downscale_factor=2,
        points_per_batch=7,
        masks_per_chunk=5,
    )
    records = generate_masks(ScriptedPredictor(), rgb, config)
    assert len(records) >= 4
    assert_equal(records, plain_generator(ScriptedPredictor(), rgb, config))


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_plain_algorithm_on_sam2(seed: int) -> None:
    predictor = Sam2Predictor(random_sam2(seed=seed))
    rgb = np.random.default_rng(seed).integers(0, 256, (70, 96, 3), np.uint8)
    with torch.inference_mode():
        (encoded,) = predictor.encode([rgb])
        points = torch.from_numpy(point_grid(5) * (96, 70)).float()
        qualities = predictor.predict(encoded, points).iou
    config = GridConfig(
        points_per_side=5,
        pred_iou_thresh=float(qualities.median()),
        stability_score_thresh=0.05,
        crop_n_layers=0,
        points_per_batch=6,
        masks_per_chunk=4,
        box_nms_thresh=1.0,
    )
    records = generate_masks(predictor, rgb, config)
    with torch.inference_mode():
        plain = plain_generator(predictor, rgb, config)
    assert len(records) == len(plain) > 1
    for record, item in zip(records, plain):  # other batch sizes: equal to rounding
        assert record.predicted_iou == pytest.approx(item["iou"], abs=1e-4)
        assert (record.runs.mask() != item["mask"]).mean() < 1e-3


def test_batch_sizes_change_nothing() -> None:
    rgb = scene(5)
    reference = generate_masks(ScriptedPredictor(), rgb, GridConfig(points_per_side=7))
    for sizes in ((1, 1, 1), (3, 64, 2), (100, 2, 0)):
        names = ("points_per_batch", "masks_per_chunk", "crops_per_batch")
        predictor = ScriptedPredictor()
        config = GridConfig(points_per_side=7, **dict(zip(names, sizes)))
        records = generate_masks(predictor, rgb, config)
        assert predictor.asked == {1: 5, 2: 3, 0: 1}[sizes[2]]
        for record, other in zip(records, reference, strict=True):
            assert np.array_equal(record.runs.edges, other.runs.edges)
            assert (record.bbox, record.point, record.crop_box) == (other.bbox, other.point, other.crop_box)


def test_nothing_found_is_an_empty_list() -> None:
    for layers in (0, 1):
        config = GridConfig(points_per_side=3, pred_iou_thresh=1.0, crop_n_layers=layers)
        assert generate_masks(ScriptedPredictor(), scene(0), config) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (37, 2), (5, 5)])
def test_pictures_of_a_few_pixels(shape: tuple[int, int]) -> None:
    rgb = np.full((*shape, 3), 1, np.uint8)
    config = GridConfig(points_per_side=3, pred_iou_thresh=0, crop_n_layers=2)
    for predictor in (ScriptedPredictor(), Sam2Predictor(random_sam2())):
        for record in generate_masks(predictor, rgb, config):
            assert record.runs.mask().shape == shape


# -------------------------------------------------------------------------------------------------- memory


class LiveMasks(TorchDispatchMode):
    """Peak number of masks of a given size (h, w) that are alive at once, float32 ones and all."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.pixels, self.size = size[0] * size[1], size
        self.alive: dict[int, tuple[weakref.ref, int, bool]] = {}
        self.peak_float = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() and not result.numel() % self.pixels:
            if result.shape[-1] == self.pixels or tuple(result.shape[-2:]) == self.size:
                at = result.untyped_storage().data_ptr()  # views of one memory count once
                self.alive[at] = (
                    weakref.ref(result),
                    result.numel() // self.pixels,
                    result.is_floating_point(),
                )
        self.alive = {at: entry for at, entry in self.alive.items() if entry[0]() is not None}
        self.peak = max(self.peak, sum(count for _, count, _ in self.alive.values()))
        self.peak_float = max(self.peak_float, sum(c for _, c, is_float in self.alive.values() if is_float))
        return result


@pytest.mark.parametrize("network", ["sam", "sam2"])
def test_memory_is_flat(network: str) -> None:
    size, chunk = (75, 61), 8  # the picture itself has 6 such planes for a moment
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    if network == "sam":
        predictor: MaskPredictor = Sam1Predictor(build_sam("sam_tiny").eval(), prepare)
    else:
        predictor = Sam2Predictor(random_sam2())
    peaks = []
    for per_side in (3, 6):
        config = GridConfig(
            points_per_side=per_side,
            pred_iou_thresh=0,
            stability_score_thresh=0,
            crop_n_layers=0,
            masks_per_chunk=chunk,
            points_per_batch=6,
        )
        with LiveMasks(size) as live:
            generate_masks(predictor, rgb, config)
        peaks.append((live.peak_float, live.peak))
    assert peaks[0] == peaks[1]
    assert peaks[0][0] == chunk and chunk < peaks[0][1] <= 3 * chunk


# ---------------------------------------------------------------------------------------------- SAM 1


def prepare(rgb: np.ndarray, side: int = 128) -> tuple[torch.Tensor, tuple[int, int]]:
    from dataset.image import ImageProcessor

    return ImageProcessor(sam_size=side).sam(rgb)


@torch.inference_mode()
def test_sam1_predictor_is_the_model() -> None:
    torch.manual_seed(0)
    model = build_sam("sam_tiny").eval()
    rgb = scene(3, 100, 70)
    for multi, count in ((True, 3), (False, 1)):
        predictor = Sam1Predictor(model, prepare, multi)
        encoded = predictor.encode([scene(1, 40, 60), rgb])[1]
        points = torch.tensor([[3.0, 9.0], [55.5, 80.0], [69.0, 0.0]])
        candidates = predictor.predict(encoded, points)
        image, inside = prepare(rgb)
        moved = points * torch.tensor([inside[1] / 70, inside[0] / 100])
        low, iou = model(
            image[None], points=(moved[:, None], torch.ones(3, 1, dtype=torch.long)), multimask_output=multi
        )
        wanted = model.postprocess(low, inside, (100, 70)).flatten(0, 1)
        assert torch.allclose(candidates.iou, iou, atol=1e-5) and candidates.iou.shape == (3, count)
        index = torch.arange(3 * count)[1:]
        assert torch.allclose(candidates.logits(index), wanted[index], atol=1e-4)


def test_trained_sam_finds_the_objects(tmp_path: Path) -> None:
    from dataset.image import load_rgb
    from dataset.synthetic import write_scenes
    from utils.io import read_json
    from utils.rle import decode_mask

    sam = load_sam(REPO / "checkpoints" / "lisat_tiny_base" / "sam.safetensors", torch.float32)
    assert not sam.training and sam.config.image_size == 128
    predictor = Sam1Predictor(sam, prepare, multimask=False)
    write_scenes(tmp_path, 2, seed=5)
    seen = found = 0
    for entry in read_json(tmp_path / "annotations.json", dict)["images"]:
        records = generate_masks(
            predictor, load_rgb(tmp_path / entry["file"]), GridConfig(points_per_side=12, crop_n_layers=0)
        )
        masks = [record.runs.mask() for record in records]
        for query in entry["queries"]:
            for rle in query["masks"] if query["kind"] in ("position", "size", "attribute") else ():
                truth = decode_mask(rle)
                ious = [(truth & mask).sum() / (truth | mask).sum() for mask in masks]
                seen, found = seen + 1, found + (max(ious) > 0.5)
    assert seen >= 4 and found / seen > 0.6


# -------------------------------------------------------------------------------------------------- parts


def test_runs_hold_masks() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((40, 11, 7)) < rng.random((40, 1, 1))
    masks[0], masks[1], masks[2, :, 3] = False, True, True
    edges = [Runs.of(mask).edges for mask in masks]
    for way in (edges_of_rows(masks.reshape(40, -1)), edges_on_device(torch.from_numpy(masks).flatten(1))):
        assert all(np.array_equal(a, b) for a, b in zip(way, edges, strict=True))
    assert edges_on_device(torch.zeros(0, 9, dtype=torch.bool)) == edges_of_rows(np.zeros((0, 9), bool)) == []
    for mask, box, edge in zip(masks, run_boxes(edges, 7), edges):
        assert np.array_equal(Runs.of(mask).mask(), mask) and Runs.of(mask).area == mask.sum()
        rows, columns = np.nonzero(mask)
        wanted = (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else (0, 0, 0, 0)
        assert tuple(box) == wanted
        placed = Runs(edge, (4, 5, 11, 16), (20, 15)).mask()
        assert np.array_equal(placed[5:16, 4:11], mask) and placed.sum() == mask.sum()


def test_suppression_is_greedy_and_stable() -> None:
    rng = np.random.default_rng(1)
    corner = rng.integers(0, 20, (1100, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 25, (1100, 2))], axis=1)
    scores = rng.integers(0, 4, 1100) / 4  # many ties
    items = [{"box": tuple(b), "score": s, "at": k} for k, (b, s) in enumerate(zip(boxes.tolist(), scores))]
    wanted = [item["at"] for item in plain_suppress(items, "score", 0.5)]
    assert suppress(boxes, scores, 0.5).tolist() == wanted and 20 < len(wanted) < 1000
    assert suppress(np.zeros((0, 4)), np.zeros(0), 0.5).tolist() == []


def test_stability_counts_pixels() -> None:
    logits = torch.randn(6, 9, 13) * 2
    logits[0] = -5
    found = stability_scores(logits, 0.5, 1.0)
    high, low = (logits > 1.5).sum((1, 2)), (logits > -0.5).sum((1, 2))
    assert torch.isnan(found[0]) and torch.allclose(found[1:], (high / low)[1:])


def test_values_out_of_range_are_named() -> None:
    assert GridConfig().faults() == []
    wrong = GridConfig(points_per_side=0, pred_iou_thresh=2, crop_overlap_ratio=1.0, crops_per_batch=-1)
    assert len(wrong.faults()) == 4
