"""What InstructSAM's evaluators compare: COCO ground truth, and predictions placed into its classes."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.instructsam_data import read_coco_images
from utils.instructsam_files import check_box
from utils.io import StrPath, read_json
from utils.rle import run_lengths

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
"""An annotation or a prediction: image_id, category_id, bbox xywh, and where known segmentation (compressed
COCO RLE), score, area, iscrowd."""
GroupKey = tuple[int, int]
"""Image id, class id."""


@dataclass
class Truth:
    """COCO ground truth: `images` id -> file name, `sizes` id -> (H, W), `classes` id -> name, in file order;
    `annotations` with masks as one RLE each; `has_masks` if every annotation has one."""

    path: Path
    images: dict[int, str]
    sizes: dict[int, tuple[int, int]]
    classes: dict[int, str]
    annotations: list[Entry] = field(repr=False)
    has_masks: bool = True

    def class_ids(self, names: Iterable[str]) -> list[int]:
        """Ids of the classes of these names, in file order; other names are left out (told at reading)."""
        wanted = set(names)
        return [key for key, name in self.classes.items() if name in wanted]

    def class_id(self, name: str) -> int | None:
        """Id of the class of exactly this name, or None."""
        return next((key for key, known in self.classes.items() if known == name), None)


def read_truth(path: StrPath, first_polygon_only: bool = False) -> Truth:
    """Read a COCO file.

    Args:
        first_polygon_only: of an object of several polygons only the first counts (the published F1 and mIoU
            functions, each called alone, do that).

    Raises:
        ValueError: names the annotation and field at fault.
    """
    from pycocotools import mask as coco

    path = Path(path)
    content = read_json(path, dict)
    images = read_coco_images(path.stem, path, path.parent)
    sizes = {image.image_id: image.size for image in images.images}
    entries = content.get("annotations")
    if not isinstance(entries, list):
        raise ValueError(f"{path}: 'annotations' must be a list (empty for a data set without ground truth)")
    annotations = []
    for number, item in enumerate(entries):
        where = f"{path}: annotations[{number}]"
        if not isinstance(item, dict):
            raise ValueError(f"{where} is a {type(item).__name__}, expected an object")
        for key, known in (("image_id", sizes), ("category_id", images.categories)):
            if item.get(key) not in known:
                raise ValueError(f"{where}: {key} {item.get(key)!r} is not in the file")
        check_box(item.get("bbox"), f"{where}, bbox")
        entry = {"image_id": item["image_id"], "category_id": item["category_id"], "bbox": item["bbox"]}
        entry |= {"id": number + 1, "iscrowd": int(item.get("iscrowd") or 0)}
        if item.get("segmentation"):
            size = sizes[item["image_id"]]
            entry["segmentation"] = _one_rle(item["segmentation"], size, first_polygon_only, where)
        area = item.get("area")
        if area is None:
            has_mask = "segmentation" in entry
            area = coco.area(entry["segmentation"]) if has_mask else item["bbox"][2] * item["bbox"][3]
        annotations.append(entry | {"area": float(area)})
    names = {image.image_id: image.file_name for image in images.images}
    has_masks = all("segmentation" in entry for entry in annotations)
    return Truth(path, names, sizes, dict(images.categories), annotations, has_masks)


def _one_rle(segmentation: Any, size: tuple[int, int], first_only: bool, where: str) -> Entry:
    """Compressed RLE of a COCO segmentation: RLE of either kind, polygons, or one flat polygon."""
    from pycocotools import mask as coco

    height, width = size
    if isinstance(segmentation, dict):
        try:
            run_lengths(segmentation, size if height else None)
        except ValueError as error:
            raise ValueError(f"{where}: segmentation: {error}") from error
        if isinstance(segmentation["counts"], str):
            return segmentation
        return _as_text(coco.frPyObjects(segmentation, *segmentation["size"]))
    polygons = segmentation
    if isinstance(polygons, list) and polygons and isinstance(polygons[0], int | float):
        polygons = [polygons]  # one polygon written flat
    good = isinstance(polygons, list) and all(isinstance(p, list) and len(p) >= 6 for p in polygons)
    if not good or not height:
        raise ValueError(f"{where}: segmentation is neither RLE nor polygons in a picture of known size")
    codes = coco.frPyObjects(polygons[:1] if first_only else polygons, height, width)
    return _as_text(coco.merge(codes))


def _as_text(rle: Entry) -> Entry:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def groups(entries: Sequence[Entry]) -> dict[GroupKey, list[int]]:
    """(image, class) -> numbers of its entries, in their order."""
    found: dict[GroupKey, list[int]] = {}
    for number, entry in enumerate(entries):
        found.setdefault((entry["image_id"], entry["category_id"]), []).append(number)
    return found


def by_image(entries: Sequence[Entry]) -> dict[int, list[int]]:
    """Image id -> numbers of its entries, in their order."""
    found: dict[int, list[int]] = {}
    for number, entry in enumerate(entries):
        found.setdefault(entry["image_id"], []).append(number)
    return found


def place_predictions(
    predictions: Sequence[Entry], truth: Truth, label_map: Mapping[str, str] | None = None
) -> list[Entry]:
    """Predictions with `category_id` and `score` (1 where absent), in their order.

    Args:
        label_map: label -> class name; labels that are not in it, or are mapped to no class, are left out.
            None (open vocabulary): `category_id` counts, or else the label if it is a class name.

    What has no place among the images and classes of the ground truth is left out with a warning.
    """
    lost: Counter[str] = Counter()
    placed = []
    for item in predictions:
        if item["image_id"] not in truth.images:
            lost[f"image {item['image_id']}"] += 1
            continue
        number = item.get("category_id") if label_map is None else None
        if number is None and "label" in item:
            name = item["label"] if label_map is None else label_map.get(item["label"])
            number = truth.class_id(name) if name is not None else None
        if number not in truth.classes:
            lost[f"class {item.get('label', item.get('category_id'))!r}"] += 1
            continue
        fault = mask_fault(item.get("segmentation"), truth.sizes[item["image_id"]])
        if fault:
            lost[f"mask: {fault}"] += 1
            continue
        kept = {key: item[key] for key in ("image_id", "bbox", "segmentation") if item.get(key) is not None}
        placed.append(kept | {"category_id": number, "score": float(item.get("score", 1.0))})
    if lost:
        told = ", ".join(f"{what} ({number})" for what, number in lost.most_common(20))
        logger.warning("predictions left out that do not belong to %s: %s", truth.path, told)
    return placed


def mask_fault(rle: Any, size: tuple[int, int]) -> str:
    """Why a mask cannot be one of a picture of this size ((0, 0): unknown); "" if it can, or is absent."""
    if rle is None:
        return ""
    try:
        run_lengths(rle, size if size[0] else None)
    except ValueError as error:
        return str(error)
    return ""


def labels_of(predictions: Sequence[Entry]) -> list[str]:
    """Distinct labels in order of first appearance."""
    return list(dict.fromkeys(item["label"] for item in predictions if "label" in item))
