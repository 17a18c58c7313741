"""The stages of InstructSAM over all pictures of a data set (sub-commands of `instructsam.py`)."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.instructsam_config import (
    CountConfig,
    DeviceConfig,
    MatchConfig,
    MatcherConfig,
    ProposeConfig,
    ProposerConfig,
)
from utils.instructsam_data import ImageEntry, ImageSet
from utils.instructsam_files import Counts, PartStore, Proposals, hand_counts, read_counts, read_proposals
from utils.io import StrPath

if TYPE_CHECKING:
    import numpy as np

    from model.instructsam.match import Matcher

logger = logging.getLogger(__name__)
FAILED = 3
"""Exit code of a run that went to its end, but without results for some pictures."""
Failures = dict[str, str]
"""Picture -> why it has no result."""


def count(config: CountConfig) -> tuple[str, int]:
    """Counting stage: text for the terminal and exit code."""
    from utils.instructsam_count import run_count

    outcome = run_count(config)
    return outcome.text, FAILED if outcome.failures and not config.allow_failures else 0


def propose_all(config: ProposeConfig) -> tuple[str, int]:
    """Proposal stage: text for the terminal and exit code."""
    images = _images(config)
    default = Path("region_proposals") / images.name / f"{proposer_name(config)}.json"
    path = Path(config.rp_save_path or default)
    found, failures = propose_images(images, config, config, path)
    number = sum(len(proposals) for proposals in found.values())
    return _told(f"{number} proposals for {len(found)} pictures: {path}", failures)


def match_all(config: MatchConfig) -> tuple[str, int]:
    """Matching stage: text for the terminal and exit code."""
    images = _images(config)
    if config.counts:
        counts, source = hand_counts(config.counts, [i.file_name for i in images.images]), "by_hand"
    else:
        counts = {i.file_name: read_counts(config.count_dir, i.file_name) for i in images.images}
        source = Path(config.count_dir).name
    folder = Path("results") / images.name / config.setting / "coco_preds"
    name = f"{source}_{Path(config.rp_path).stem}_{config.clip_model}_preds_coco.json"
    path = Path(config.save_path or folder / name)
    classes = _class_ids(images) if config.setting == "open_vocabulary" else None
    proposals = read_proposals(config.rp_path)
    predictions, failures = match_images(images, counts, proposals, config, config, path, classes)
    return _told(f"{len(predictions)} labelled masks for {len(images.images)} pictures: {path}", failures)


def _images(config: ProposeConfig | MatchConfig) -> ImageSet:
    from utils.instructsam_count import load_images

    return load_images(config.images, config.dataset_name, config.dataset_config)


def _class_ids(images: ImageSet) -> dict[str, int]:
    if not images.categories:
        raise ValueError("--setting open_vocabulary needs a data set with classes; use open_ended")
    return {name: number for number, name in images.categories.items()}


def _told(text: str, failures: Failures) -> tuple[str, int]:
    lines = [text, *(f"  failed: {name}: {why}" for name, why in sorted(failures.items()))]
    return "\n".join(lines), FAILED if failures else 0


# --------------------------------------------------------------------------------------------- proposing


def proposer_name(config: ProposerConfig) -> str:
    """Name of the proposal file: the published config's stem, else that of the weights."""
    given = config.sam2_cfg or config.sam2_checkpoint
    return Path(given).stem if given and config.proposer != "tiny" else config.proposer


def propose_images(
    images: ImageSet, config: ProposerConfig, device: DeviceConfig, path: StrPath
) -> tuple[dict[str, Proposals], Failures]:
    """Proposals of all pictures, written to `path` in the published format when all are done.

    Results so far lie beside `path`; a picture is only looked at again if it or the settings changed.
    """
    settings = {key: value for key, value in asdict(config).items() if key in ProposerConfig.__annotations__}
    store = PartStore(path, settings | {"precision": device.precision})
    found: dict[str, Proposals] = {}
    failures: Failures = {}
    proposer: list[Callable[["np.ndarray"], Proposals]] = []
    for image, digest in _each(images.images, failures, "proposing"):
        stored = store.get(f"{image.file_name} {digest}")
        if stored is None:
            from utils.instructsam_images import read_rgb

            try:
                pixels = read_rgb(image.path)
            except (OSError, ValueError) as error:
                failures[image.file_name] = str(error)
                continue
            if not proposer:  # loaded only if there is something to do
                from utils.instructsam_proposer import load_proposer

                proposer.append(load_proposer(config, device))
            stored = proposer[0](pixels).to_json()
            store.put(f"{image.file_name} {digest}", stored)
        found[image.file_name] = Proposals.from_json(stored, image.file_name)
    store.finish({name: value.to_json() for name, value in found.items()})
    return found, failures


def _each(
    images: Sequence[ImageEntry], failures: Failures, what: str
) -> Iterator[tuple[ImageEntry, str]]:
    """Pictures with a digest of their bytes, behind a progress bar; unreadable ones go to `failures`."""
    from tqdm import tqdm

    for image in tqdm(images, desc=what, unit="picture", disable=None):
        try:
            digest = hashlib.sha256(image.path.read_bytes()).hexdigest()[:16]
        except OSError as error:
            failures[image.file_name] = f"cannot be read: {error.strerror or error}"
            continue
        yield image, digest


# ---------------------------------------------------------------------------------------------- matching


def match_images(
    images: ImageSet,
    counts: Mapping[str, Counts],
    proposals: Mapping[str, Proposals],
    config: MatcherConfig,
    device: DeviceConfig,
    path: StrPath,
    classes: Mapping[str, int] | None = None,
) -> tuple[list[dict[str, Any]], Failures]:
    """Predictions of all pictures in the published form and order, written to `path`.

    Args:
        classes: name -> id: keep only labels with exactly these names and write `category_id`; None keeps
            every label.
    """
    from utils.instructsam_files import write_predictions
    from utils.instructsam_images import read_rgb

    predictions: list[dict[str, Any]] = []
    failures: Failures = {}
    dropped: set[str] = set()
    matcher: list["Matcher"] = []
    for image, _ in _each(images.images, failures, "matching"):
        name = image.file_name
        wanted = counts[name]
        for note in wanted.notes:
            logger.warning("%s", note)
        if wanted.state in ("missing", "broken"):
            failures[name] = f"no counts ({wanted.state}): {'; '.join(wanted.notes)}"
            continue
        mine = proposals.get(name, proposals.get(Path(name).name))
        if mine is None:
            failures[name] = "the proposal file does not name it"
            continue
        mine = mine.select(mine.scores >= config.rp_thr)
        labels = {k: n for k, n in wanted.values.items() if classes is None or k in classes}
        dropped |= wanted.values.keys() - labels.keys()
        if not labels or not len(mine):
            continue
        try:
            pixels = read_rgb(image.path)
        except (OSError, ValueError) as error:
            failures[name] = str(error)
            continue
        if not matcher:
            matcher.append(load_matcher(config, device))
        predictions += label_image(image, pixels, mine, labels, matcher[0], config.assigned_score, classes)
    if dropped:
        logger.warning("counted labels that are no classes were left out: %s", ", ".join(sorted(dropped)))
    write_predictions(path, predictions)
    return predictions, failures


def label_image(
    image: ImageEntry,
    pixels: "np.ndarray",
    proposals: Proposals,
    counts: Mapping[str, int],
    matcher: "Matcher",
    assigned_score: bool = False,
    classes: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Predictions of one picture, by proposal index: the published fields and `assigned_score`."""
    found = matcher(pixels, proposals.boxes, counts)
    result = []
    for region, label, highest, own in zip(
        found.regions.tolist(), found.labels, found.row_max.tolist(), found.similarity.tolist(), strict=True
    ):
        item: dict[str, Any] = {
            "image_id": image.image_id,
            "bbox": proposals.boxes[region].tolist(),
            "score": own if assigned_score else highest,
        }
        if proposals.rles:
            item["segmentation"] = proposals.rles[region]
        item["label"] = label
        if classes is not None:
            item["category_id"] = classes[label]
        result.append(item | {"assigned_score": own})
    return result


def load_matcher(config: MatcherConfig, device: DeviceConfig) -> "Matcher":
    """The CLIP that the settings name, ready to match."""
    from model.clip_tokenizer import load_clip_tokenizer
    from model.instructsam.match import Matcher, RegionEncoder, TextEncoder
    from model.open_clip import clip_entry
    from utils.instructsam_count import device_of

    entry = clip_entry(config.clip_model, config.checkpoint_config)
    clip = entry.load().to(device_of(device.device))
    texts = TextEncoder(clip, load_clip_tokenizer(entry.vocabulary))
    return Matcher(texts, RegionEncoder(clip, config.crop_scale, batch_size=config.clip_batch))
