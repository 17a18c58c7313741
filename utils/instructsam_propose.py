"""Proposal stage of InstructSAM: pictures -> one proposal file, resumable picture by picture.

Beside `<name>.json` lie `<name>_settings.json` (what the masks depend on: a later run with the same settings
only works on pictures that the file lacks) and, where pictures could not be read, `<name>_failures.jsonl`.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.instructsam_data import ImageEntry, ImageSet, image_folder, read_dataset
from utils.instructsam_files import PartStore, Proposals
from utils.instructsam_images import read_rgb
from utils.io import StrPath, atomic_write_json, atomic_write_text, read_json

if TYPE_CHECKING:
    import numpy as np

    from model.instructsam.predictors import MaskPredictor
    from utils.instructsam_config import ProposeConfig

logger = logging.getLogger(__name__)

_IN_THE_SETTINGS = (
    "multimask_output",
    "max_masks",
    "min_mask_region_area",
    "hole_filling",
    "proposal_boxes",
    "points_per_side",
    "crop_n_layers",
    "crop_overlap_ratio",
    "crop_n_points_downscale_factor",
    "pred_iou_thresh",
    "stability_score_thresh",
    "box_nms_thresh",
    "crop_nms_thresh",
    "precision",
)
_SECONDS_BETWEEN_LINES = 30.0


@dataclass
class ProposeOutcome:
    """What a proposal run did: the file, pictures done and taken over, masks, pictures that failed."""

    path: Path
    done: int = 0
    kept: int = 0
    masks: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Lines for the terminal."""
        head = f"{self.masks} masks in {self.done} pictures, {self.kept} pictures were there already"
        lines = [f"{head}; {self.path}"]
        lines += [f"  no proposals: {item['image']}: {item['fault']}" for item in self.failures]
        if self.failures:
            lines.append("  the same command again works on these only")
        return "\n".join(lines)


def run_propose(
    config: "ProposeConfig", images: ImageSet | None = None, path: StrPath = ""
) -> ProposeOutcome:
    """Propose masks in all pictures; pictures that cannot be read are listed and left out.

    A run that was killed goes on behind its last picture; pictures of a finished file made with the same
    settings are taken over.

    Args:
        config: fields of `ProposerConfig` and `DeviceConfig`, and of `ProposeConfig` where the other
            arguments are not given.
        images: the pictures; None: those the configuration names.
        path: the proposal file; empty: `--rp_save_path` or its default.

    Raises:
        ValueError: faults of the settings or the weights; too little memory.
    """
    if images is None:
        images = (
            image_folder(config.images)
            if config.images
            else read_dataset(config.dataset_name, config.dataset_config)
        )
    final = Path(
        path or config.rp_save_path or f"./region_proposals/{images.name}/{proposer_name(config)}.json"
    )
    settings = proposal_settings(config)
    before = _finished(final, settings)
    store = PartStore(final, settings)
    outcome, entries = ProposeOutcome(final), {}
    wanted = []
    for image in images.images:
        entry = before.get(image.file_name) or store.get(image.file_name)
        if entry is None:
            wanted.append(image)
        else:
            entries[image.file_name] = entry
    outcome.kept = len(entries)
    if wanted:
        entries |= _propose(config, wanted, store, outcome)
    outcome.masks = sum(len(entry["bboxes"]) for entry in entries.values())
    outcome.done = len(entries)
    if not entries:
        first = outcome.failures[0]
        raise ValueError(
            f"none of the {len(wanted)} pictures can be read; {first['image']}: {first['fault']}"
        )
    _write_failures(final, outcome.failures)
    atomic_write_json(_beside(final, "settings.json"), settings)
    store.finish({i.file_name: entries[i.file_name] for i in images.images if i.file_name in entries})
    return outcome


def proposer_name(config: Any) -> str:
    """Stem of the default output file: the configuration's name, or that of the weights."""
    named = config.sam2_cfg or config.sam_checkpoint or config.sam2_checkpoint
    return Path(named).stem if Path(named).suffix else Path(named).name


def proposal_settings(config: Any) -> dict[str, Any]:
    """What the proposals of a picture depend on."""
    weights = config.sam_checkpoint or config.sam2_checkpoint
    return {name: getattr(config, name) for name in _IN_THE_SETTINGS} | {
        "network": "sam" if config.sam_checkpoint else f"sam2 {config.sam2_cfg}".strip(),
        "weights": _fingerprint(Path(weights)) if weights else "random",
    }


def load_predictor(config: Any) -> "MaskPredictor":
    """The network that the settings name, on its device.

    Raises:
        ValueError: weights that cannot be read or do not fit.
    """
    from dataset.image import ImageProcessor
    from model.instructsam.predictors import Sam1Predictor, Sam2Predictor
    from model.sam2 import random_sam2, sam2_config
    from model.sam2_files import load_sam2
    from model.sam_files import load_sam
    from utils.distributed import choose_device
    from utils.predict_lisat import DTYPES

    device = config.device if ":" in config.device else choose_device(config.device)
    dtype = DTYPES[config.precision]
    if config.sam_checkpoint:
        sam = load_sam(config.sam_checkpoint, dtype).to(device)
        prepare = ImageProcessor(sam_size=sam.config.image_size).sam
        return Sam1Predictor(sam, prepare, config.multimask_output)
    if not config.sam2_checkpoint:
        logger.warning("%s has random weights: its masks mean nothing", config.sam2_cfg)
        return Sam2Predictor(random_sam2(config.sam2_cfg).to(device, dtype), config.multimask_output)
    size = sam2_config(config.sam2_cfg) if config.sam2_cfg else None
    sam2 = load_sam2(config.sam2_checkpoint, size, dtype).to(device)
    return Sam2Predictor(sam2, config.multimask_output)


def propose(predictor: "MaskPredictor", rgb: "np.ndarray", config: Any) -> Proposals:
    """Proposals of one picture, uint8 (H, W, 3) RGB."""
    from model.instructsam.automatic_masks import generate_masks
    from model.instructsam.propose import proposals_of

    return proposals_of(
        generate_masks(predictor, rgb, config.grid()),
        rgb.shape[:2],
        max_masks=config.max_masks,
        min_mask_region_area=config.min_mask_region_area,
        holes=config.hole_filling,
        boxes=config.proposal_boxes,
    )


def _propose(
    config: Any, wanted: Sequence[ImageEntry], store: PartStore, outcome: ProposeOutcome
) -> dict[str, Any]:
    """Entries of the pictures, each put into the store at once; failures go to the outcome."""
    import torch
    from tqdm import tqdm

    predictor = load_predictor(config)
    entries: dict[str, Any] = {}
    started = told = time.monotonic()
    bar = tqdm(total=len(wanted), unit="picture", disable=None)
    for number, (image, picture) in enumerate(_read_ahead(wanted), start=1):
        try:
            rgb = picture.result()
        except (ValueError, OSError) as error:
            outcome.failures.append({"image": image.file_name, "kind": "picture", "fault": str(error)})
            logger.warning("%s: %s", image.file_name, error)
        else:
            try:
                entry = propose(predictor, rgb, config).to_json()
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{image.path}: too little memory on {predictor.device}; lower --points_per_batch, "
                    "--masks_per_chunk and set --crops_per_batch 1, or use --precision bf16 (what is done "
                    "is kept)"
                ) from error
            store.put(image.file_name, entry)
            entries[image.file_name] = entry
        bar.update()
        now = time.monotonic()
        if bar.disable and now - told > _SECONDS_BETWEEN_LINES:
            told, rate = now, number / (now - started)
            left = (len(wanted) - number) / rate / 60
            logger.info(
                "%d of %d pictures, %.2f per second, %.0f minutes left", number, len(wanted), rate, left
            )
    bar.close()
    return entries


def _read_ahead(images: Sequence[ImageEntry]) -> Iterator[tuple[ImageEntry, "Future[np.ndarray]"]]:
    """Each picture with its pixels to come, the next one being read meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        following: Future[np.ndarray] | None = pool.submit(read_rgb, images[0].path) if images else None
        for number, image in enumerate(images):
            current = following
            if number + 1 < len(images):
                following = pool.submit(read_rgb, images[number + 1].path)
            assert current is not None
            yield image, current


def _finished(final: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Entries of a finished file made with these settings; others are not used."""
    if not final.is_file():
        return {}
    mark = _beside(final, "settings.json")
    if not mark.is_file() or read_json(mark, dict) != json.loads(json.dumps(settings)):
        logger.warning("%s was made with other or unknown settings: it will be replaced", final)
        return {}
    return read_json(final, dict)


def _write_failures(final: Path, failures: Sequence[dict[str, Any]]) -> None:
    path = _beside(final, "failures.jsonl")
    if failures:
        atomic_write_text(path, "".join(json.dumps(f, ensure_ascii=False) + "\n" for f in failures))
    else:
        path.unlink(missing_ok=True)


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{path.stem}_{name}")


def _fingerprint(path: Path) -> str:
    """Size and a hash of both ends of a weight file (of a folder: of its weight files)."""
    from model.weight_files import WeightFiles

    digest = hashlib.sha256()
    for file in WeightFiles(path).files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(0, size - 2**20))
            digest.update(opened.read(2**20))
    return digest.hexdigest()[:16]
