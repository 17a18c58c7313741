"""The stages of InstructSAM over all pictures of a data set (sub-commands of `instructsam.py`)."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.instructsam_config import CountConfig, DeviceConfig, MatchConfig, MatcherConfig, ProposeConfig
from utils.instructsam_data import ImageEntry, ImageSet
from utils.instructsam_files import (
    Counts,
    PartStore,
    Proposals,
    hand_counts,
    read_counts,
    read_proposals,
    write_predictions,
)
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
    from utils.instructsam_propose import run_propose

    outcome = run_propose(config)
    return outcome.text, FAILED if outcome.failures else 0


def match_all(config: MatchConfig) -> tuple[str, int]:
    """Matching stage: text for the terminal and exit code."""
    from utils.instructsam_count import load_images

    images = load_images(config.images, config.dataset_name, config.dataset_config)
    if config.counts:
        counts, source = hand_counts(config.counts, [i.file_name for i in images.images]), "by_hand"
    else:
        counts = {i.file_name: read_counts(config.count_dir, i.file_name) for i in images.images}
        source = Path(config.count_dir).name
    classes = None
    if config.setting == "open_vocabulary":
        if not images.categories:
            raise ValueError("--setting open_vocabulary needs a data set with classes; use open_ended")
        classes = {name: number for number, name in images.categories.items()}
    folder = Path("results") / images.name / config.setting / "coco_preds"
    name = f"{source}_{Path(config.rp_path).stem}_{config.clip_model}_preds_coco.json"
    path = Path(config.save_path or folder / name)
    predictions, failures = match_images(
        images, counts, read_proposals(config.rp_path), config, config, path, classes
    )
    text = f"{len(predictions)} labelled masks for {len(images.images)} pictures: {path}"
    return with_failures(text, failures), FAILED if failures else 0


def with_failures(text: str, failures: Failures) -> str:
    """`text` and one line per picture that has no result."""
    return "\n".join([text, *(f"  failed: {name}: {why}" for name, why in sorted(failures.items()))])


def match_images(
    images: ImageSet,
    counts: Mapping[str, Counts],
    proposals: Mapping[str, Proposals],
    config: MatcherConfig,
    device: DeviceConfig,
    path: StrPath,
    classes: Mapping[str, int] | None = None,
) -> tuple[list[dict[str, Any]], Failures]:
    """Predictions of all pictures in the published form and order, written to `path` when all are done.

    A run that was broken off goes on behind its last picture.

    Args:
        classes: name -> id: keep only labels with exactly these names and write `category_id`; None keeps
            every label.
    """
    from tqdm import tqdm

    settings = {key: value for key, value in asdict(config).items() if key in MatcherConfig.__annotations__}
    store = PartStore(path, settings | {"classes": dict(classes or {})})
    stage = _Matching(config, device, classes)
    for image in tqdm(images.images, desc="matching", unit="picture", disable=None):
        stage.add(image, counts[image.file_name], proposals, store)
    if stage.dropped:
        names = ", ".join(sorted(stage.dropped))
        logger.warning("counted labels that are no classes were left out: %s", names)
    write_predictions(path, stage.predictions)
    store.remove()
    return stage.predictions, stage.failures


class _Matching:
    """State of the matching stage while it goes through the pictures."""

    def __init__(
        self, config: MatcherConfig, device: DeviceConfig, classes: Mapping[str, int] | None
    ) -> None:
        self.config, self.device, self.classes = config, device, classes
        self.predictions: list[dict[str, Any]] = []
        self.failures: Failures = {}
        self.dropped: set[str] = set()
        self._matcher: Matcher | None = None

    def add(
        self, image: ImageEntry, wanted: Counts, proposals: Mapping[str, Proposals], store: PartStore
    ) -> None:
        """Match one picture, or take its stored result."""
        name = image.file_name
        for note in wanted.notes:
            logger.warning("%s", note)
        if wanted.state in ("missing", "broken"):
            self.failures[name] = f"no counts ({wanted.state}): {'; '.join(wanted.notes)}"
            return
        mine = proposals.get(name, proposals.get(Path(name).name))
        if mine is None:
            self.failures[name] = "the proposal file does not name it"
            return
        labels = {k: n for k, n in wanted.values.items() if self.classes is None or k in self.classes}
        self.dropped |= wanted.values.keys() - labels.keys()
        mine = mine.select(mine.scores >= self.config.rp_thr)
        if labels and len(mine):
            self._match(image, mine, labels, store)

    def _match(self, image: ImageEntry, mine: Proposals, labels: dict[str, int], store: PartStore) -> None:
        from utils.instructsam_images import read_rgb

        basis = json.dumps([labels, mine.to_json()], sort_keys=False)
        key = f"{image.file_name} {hashlib.sha256(basis.encode()).hexdigest()[:16]}"
        found = store.get(key)
        if found is None:
            try:
                pixels = read_rgb(image.path)
            except (OSError, ValueError) as error:
                self.failures[image.file_name] = str(error)
                return
            if self._matcher is None:
                self._matcher = load_matcher(self.config, self.device)
            found = label_image(
                image.image_id, pixels, mine, labels, self._matcher, self.config, self.classes
            )
            store.put(key, found)
        self.predictions += found


def label_image(
    image_id: int,
    pixels: "np.ndarray",
    proposals: Proposals,
    counts: Mapping[str, int],
    matcher: "Matcher",
    config: MatcherConfig,
    classes: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Predictions of one picture, by proposal index: the published fields and `assigned_score`."""
    if config.most_overlap < 1 and proposals.rles:
        from model.instructsam.overlap import match_apart

        regions = matcher.regions(pixels, proposals.boxes)
        texts = matcher.texts.labels(list(counts), matcher.template)
        found = match_apart(regions, texts, counts, proposals.rles, config.most_overlap)
    else:
        found = matcher(pixels, proposals.boxes, counts)
    result = []
    for region, label, highest, own in zip(
        found.regions.tolist(), found.labels, found.row_max.tolist(), found.similarity.tolist(), strict=True
    ):
        item: dict[str, Any] = {
            "image_id": image_id,
            "bbox": proposals.boxes[region].tolist(),
            "score": own if config.assigned_score else highest,
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
    from model.clip_tokenizer import ClipTokenizer
    from model.instructsam.match import Matcher, RegionEncoder, TextEncoder
    from model.open_clip import clip_entry
    from utils.distributed import choose_device

    entry = clip_entry(config.clip_model, config.checkpoint_config)
    clip = entry.load().to(choose_device(device.device))
    texts = TextEncoder(clip, ClipTokenizer(entry.vocabulary))
    return Matcher(texts, RegionEncoder(clip, config.crop_scale, batch_size=config.clip_batch))
