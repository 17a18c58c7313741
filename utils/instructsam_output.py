"""What people look at and load elsewhere: pictures of predictions, COCO files, GeoJSON."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.instructsam_data import ImageEntry
from utils.rle import area as mask_area
from utils.rle import decode_mask

if TYPE_CHECKING:
    from utils.geo import Georeference

Prediction = Mapping[str, Any]


def draw_predictions(
    image: np.ndarray, predictions: Sequence[Prediction], labels: Sequence[str] = (), caption: bool = True
) -> np.ndarray:
    """Copy of a picture with masks tinted, boxes and labels, one colour per label, and the numbers below.

    Args:
        image: uint8 (H, W, 3). Small pictures are enlarged so that labels can be read.
        labels: all labels in the order of their colours; the predictions' own, sorted, are added.
    """
    import cv2

    from utils.visualize import PALETTE, overlay
    from utils.visualize import caption as with_caption

    names = list(dict.fromkeys([*labels, *sorted({item["label"] for item in predictions})]))
    colours = {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(names)}
    scale = max(1, -(-400 // max(image.shape[:2])))
    shown = image.repeat(scale, 0).repeat(scale, 1)
    largest_first = sorted(predictions, key=lambda item: -item["bbox"][2] * item["bbox"][3])
    for item in largest_first:
        if item.get("segmentation") is not None:
            mask = decode_mask(item["segmentation"]).repeat(scale, 0).repeat(scale, 1)
            shown = overlay(shown, mask, colours[item["label"]], opacity=0.35)
    shown = np.ascontiguousarray(shown)
    for item in largest_first:
        x, y, width, height = item["bbox"]
        corner = round(x * scale), round(y * scale)
        far = round((x + width + 1) * scale) - 1, round((y + height + 1) * scale) - 1
        cv2.rectangle(shown, corner, far, colours[item["label"]], 1)
        _tag(shown, item["label"], corner, colours[item["label"]])
    if not caption:
        return shown
    numbers = Counter(item["label"] for item in predictions)
    text = ", ".join(f"{name}: {numbers[name]}" for name in names if numbers[name]) or "nothing"
    return with_caption(shown, text)


def _tag(image: np.ndarray, text: str, corner: tuple[int, int], colour: Sequence[int]) -> None:
    """Text on a plate of `colour` above `corner` (below it at the upper border), drawn into `image`."""
    import cv2

    style = (cv2.FONT_HERSHEY_SIMPLEX, 0.35)
    (width, height), below = cv2.getTextSize(text, *style, 1)
    left = max(0, min(corner[0], image.shape[1] - width - 2))
    bottom = corner[1] if corner[1] > height + below + 2 else corner[1] + height + below + 2
    cv2.rectangle(image, (left, bottom - height - below - 2), (left + width + 2, bottom), tuple(colour), -1)
    ink = (255,) * 3 if sum(colour) < 400 else (0,) * 3
    cv2.putText(image, text, (left + 1, bottom - below), *style, ink, 1, cv2.LINE_AA)


def coco_of(
    images: Sequence[ImageEntry],
    sizes: Mapping[str, tuple[int, int]],
    predictions: Sequence[Prediction],
    categories: Mapping[int, str],
) -> dict[str, Any]:
    """A COCO data set of predictions.

    Args:
        sizes: file name -> (H, W). categories: id -> name; labels without one get the next free ids.
    """
    ids = {name: number for number, name in categories.items()}
    for label in sorted({item["label"] for item in predictions} - ids.keys()):
        ids[label] = max(ids.values(), default=0) + 1
    listed = [
        {"id": image.image_id, "file_name": image.file_name, "height": height, "width": width}
        for image in images
        if (size := sizes.get(image.file_name))
        for height, width in [size]
    ]
    annotations = []
    for number, item in enumerate(predictions, start=1):
        mask = item.get("segmentation")
        area = mask_area(mask) if mask is not None else item["bbox"][2] * item["bbox"][3]
        one = {"id": number, "image_id": item["image_id"], "category_id": ids[item["label"]]}
        one |= {"bbox": item["bbox"], "area": area, "iscrowd": 0, "score": item["score"]}
        annotations.append(one | ({"segmentation": mask} if mask is not None else {}))
    return {
        "images": listed,
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": annotations,
    }


def geojson_features(
    predictions: Sequence[Prediction], place: "Georeference", image_name: str
) -> list[dict[str, Any]]:
    """Predictions as GeoJSON features (RFC 7946, longitude and latitude).

    Outlines run along pixel borders; a mask in several parts is a MultiPolygon. Without a mask: the box.
    """
    from utils.geo import mask_polygons, to_geometry

    features = []
    for item in predictions:
        if item.get("segmentation") is not None:
            polygons = mask_polygons(decode_mask(item["segmentation"]))
        else:
            x, y, width, height = item["bbox"]
            right, low = x + width + 1, y + height + 1
            polygons = [[[(x, y), (right, y), (right, low), (x, low)]]]
        geometry = to_geometry(polygons, place)
        if geometry is not None:
            about = {"label": item["label"], "score": item["score"], "image": image_name}
            features.append({"type": "Feature", "geometry": geometry, "properties": about})
    return features
