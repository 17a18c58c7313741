"""`instructsam.py run`: from pictures and words to labelled masks, drawings of them and map files.

Below the output folder:

    counts/<source>/<picture>.json   what was counted      region_proposals.json   all masks
    predictions.json           chosen masks with labels    coco.json   the same as a COCO data set
    overlays/<picture>.png     to look at                  geojson/<picture>.geojson   of GeoTIFFs
    summary.json               numbers per picture and label, and the pictures that failed
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from utils.instructsam_config import RunConfig
from utils.instructsam_data import ImageEntry, ImageSet
from utils.instructsam_files import (
    Counts,
    counts_path,
    hand_counts,
    read_counts,
    read_proposals,
    write_counts,
)
from utils.instructsam_stages import FAILED, Failures, match_images, with_failures
from utils.io import atomic_write_json


def run(config: RunConfig) -> tuple[str, int]:
    """The whole pipeline; text for the terminal and exit code (3: some pictures have no result)."""
    from utils.instructsam_count import load_images, words
    from utils.instructsam_propose import run_propose

    images = load_images(config.images, config.dataset_name, config.dataset_config)
    images.check_stems()
    out = Path(config.out)
    names = words(config.words)
    if config.chosen_setting() == "open_vocabulary":
        categories = dict(enumerate(names, start=1)) if names else images.categories
        if not categories:
            raise ValueError(
                "--setting open_vocabulary needs --words ship plane ... or a data set with classes"
            )
    else:
        categories = {}
    counts, failures = _counts(config, images, out)
    counted = replace(images, images=tuple(i for i in images.images if i.file_name not in failures))
    if not counted.images:
        first = next(iter(failures.items()))
        raise ValueError(f"no picture has counts; {first[0]}: {first[1]}")
    proposed = run_propose(config, counted, out / "region_proposals.json")
    failures |= {item["image"]: item["fault"] for item in proposed.failures}
    proposals = read_proposals(out / "region_proposals.json")
    left = replace(images, images=tuple(i for i in counted.images if i.file_name in proposals))
    classes = {name: number for number, name in categories.items()} or None
    predictions, unmatched = match_images(
        left, counts, proposals, config, config, out / "predictions.json", classes
    )
    failures |= unmatched
    _write_outputs(config, out, left, counts, predictions, categories, failures)
    atomic_write_json(out / "summary.json", _summary(left, counts, predictions, failures))
    return _text(out, images, counts, predictions, failures), FAILED if failures else 0


def _counts(config: RunConfig, images: ImageSet, out: Path) -> tuple[dict[str, Counts], Failures]:
    """Counts of the pictures, by hand or by a language model, and why others have none.

    Each source (by hand, or a model with a prompt) has its own folder below `out/counts`.
    """
    names = [image.file_name for image in images.images]
    if config.counts:
        counts = hand_counts(config.counts, names)
        for name, one in counts.items():
            if one.state != "missing":
                write_counts(counts_path(out / "counts" / "by_hand", name), one.values)
        why: Failures = {}
    else:
        from utils.instructsam_count import load_prompt, run_count

        prompt, prompt_name = load_prompt(config, images)
        model = config.pretrained_model_name_or_path or config.model
        digest = hashlib.sha256(f"{model} {prompt}".encode()).hexdigest()[:8]
        folder = out / "counts" / f"{Path(model).name}_{prompt_name}_{digest}"
        outcome = run_count(replace(config, skip_existing=True), images, folder)
        counts = {name: read_counts(folder, name) for name in names}
        why = {item["image"]: item["fault"] for item in outcome.failures}
    failures = {
        name: f"no counts: {why.get(name) or '; '.join(one.notes)}"
        for name, one in counts.items()
        if one.state in ("missing", "broken")
    }
    return counts, failures


def _write_outputs(
    config: RunConfig,
    out: Path,
    images: ImageSet,
    counts: Mapping[str, Counts],
    predictions: Sequence[Mapping[str, Any]],
    categories: Mapping[int, str],
    failures: Failures,
) -> None:
    """Overlays, GeoJSON and the COCO file."""
    from tqdm import tqdm

    from utils.geo import write_geojson
    from utils.instructsam_images import place_of, read_rgb
    from utils.instructsam_output import coco_of, draw_predictions, geojson_features
    from utils.visualize import write_image

    labels = list(categories.values()) or sorted({label for one in counts.values() for label in one.values})
    by_image: dict[int, list[Mapping[str, Any]]] = {image.image_id: [] for image in images.images}
    for item in predictions:
        by_image[item["image_id"]].append(item)
    sizes: dict[str, tuple[int, int]] = {}
    for image in tqdm(images.images, desc="drawing", unit="picture", disable=None):
        name, mine = image.file_name, by_image[image.image_id]
        try:
            pixels, place = read_rgb(image.path), place_of(image.path)
        except (OSError, ValueError) as error:
            failures[name] = str(error)
            continue
        sizes[name] = (pixels.shape[0], pixels.shape[1])
        if config.draw:
            write_image(_beside(out / "overlays", name, ".png"), draw_predictions(pixels, mine, labels))
        if place is not None:
            write_geojson(_beside(out / "geojson", name, ".geojson"), geojson_features(mine, place, name))
    atomic_write_json(out / "coco.json", coco_of(images.images, sizes, predictions, categories), indent=None)


def _beside(folder: Path, name: str, suffix: str) -> Path:
    return folder / PurePosixPath(name).with_suffix(suffix)


def _summary(
    images: ImageSet,
    counts: Mapping[str, Counts],
    predictions: Sequence[Mapping[str, Any]],
    failures: Failures,
) -> dict[str, Any]:
    """Numbers per picture: counted, and labelled masks found."""
    found: dict[int, Counter[str]] = {image.image_id: Counter() for image in images.images}
    for item in predictions:
        found[item["image_id"]][item["label"]] += 1

    def entry(image: ImageEntry) -> dict[str, Any]:
        return {"counted": counts[image.file_name].values, "labelled": dict(found[image.image_id])}

    return {
        "images": {i.file_name: entry(i) for i in images.images},
        "failures": dict(sorted(failures.items())),
    }


def _text(
    out: Path,
    images: ImageSet,
    counts: Mapping[str, Counts],
    predictions: Sequence[Mapping[str, Any]],
    failures: Failures,
) -> str:
    """Table of labels and what failed, for the terminal."""
    counted: Counter[str] = Counter()
    for one in counts.values():
        counted.update(one.values)
    found = Counter(item["label"] for item in predictions)
    width = max([5, *map(len, counted)])
    rows = [f"{'label':{width}}  counted  labelled masks"]
    rows += [f"{label:{width}}  {counted[label]:7}  {found[label]:14}" for label in sorted(counted)]
    done = len(images.images) - len(failures)
    rows.append(f"{done} of {len(images.images)} pictures: {out}")
    return with_failures("\n".join(rows), failures)
