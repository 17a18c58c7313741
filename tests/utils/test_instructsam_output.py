"""Drawings, COCO files and GeoJSON of predictions."""

import json

import numpy as np
import pytest

from utils.geo import Georeference, from_geometry
from utils.instructsam_data import ImageEntry
from utils.instructsam_output import coco_of, draw_predictions, geojson_features
from utils.rle import encode_mask
from utils.visualize import PALETTE

MASK = np.zeros((40, 50), np.uint8)
MASK[10:20, 5:30] = 1
MASK[13:16, 10:14] = 0  # a hole
MASK[30:35, 40:45] = 1  # a second part
SHIP = {"image_id": 4, "bbox": [5.0, 10.0, 39.0, 24.0], "score": 0.3, "label": "ship"}
SHIP |= {"segmentation": encode_mask(MASK)}
BOX = {"image_id": 4, "bbox": [1.0, 2.0, 7.0, 5.0], "score": 0.2, "label": "pier"}


def test_drawings_tint_masks_in_the_colour_of_their_label() -> None:
    image = np.full((40, 50, 3), 90, np.uint8)
    drawn = draw_predictions(image, [BOX, SHIP], labels=["ship", "tank", "pier"], caption=False)
    scale = drawn.shape[0] // 40
    assert drawn.shape == (40 * scale, 50 * scale, 3) and scale >= 8
    tint = drawn[int(18.5 * scale), int(20.5 * scale)].astype(int)
    np.testing.assert_allclose(tint, 0.65 * 90 + 0.35 * np.array(PALETTE[0]), atol=1)
    assert (drawn[int(25.5 * scale), int(20.5 * scale)] == 90).all()  # outside of every mask
    assert (drawn[4 * scale, 1 * scale] == PALETTE[2]).all()  # the box of the third label
    assert (image == 90).all()


def test_captions_name_the_numbers_and_nothing_is_said() -> None:
    image = np.zeros((450, 500, 3), np.uint8)
    for found in ([], [SHIP | {"segmentation": None}]):
        drawn = draw_predictions(image, found)
        assert drawn.shape[1] == 500 and drawn.shape[0] > 450 and drawn[450:].min() < 100


def test_coco_file() -> None:
    images = [ImageEntry(4, "deep/a.png", None), ImageEntry(5, "unread.png", None)]  # type: ignore[arg-type]
    found = coco_of(images, {"deep/a.png": (40, 50)}, [SHIP, BOX], {3: "ship"})
    json.dumps(found, allow_nan=False)
    assert found["images"] == [{"id": 4, "file_name": "deep/a.png", "height": 40, "width": 50}]
    assert found["categories"] == [{"id": 3, "name": "ship"}, {"id": 4, "name": "pier"}]
    assert [a["category_id"] for a in found["annotations"]] == [3, 4]
    assert found["annotations"][0]["area"] == int(MASK.sum()) and found["annotations"][1]["area"] == 35.0

    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = found
    coco.createIndex()
    np.testing.assert_array_equal(coco.annToMask(coco.anns[1]), MASK)


def test_geojson_gives_the_pixels_again() -> None:
    place = Georeference("EPSG:32631", (0.5, 0.0, 500_000.0, 0.0, -0.5, 5_400_000.0))
    features = geojson_features([SHIP, BOX], place, "a.tif")
    assert [f["properties"] for f in features] == [
        {"label": "ship", "score": 0.3, "image": "a.tif"},
        {"label": "pier", "score": 0.2, "image": "a.tif"},
    ]
    assert features[0]["geometry"]["type"] == "MultiPolygon"
    from dataset.masks import fill_rings

    polygons = from_geometry(features[0]["geometry"], "OGC:CRS84", place)
    again = fill_rings([np.round(ring, 3) for polygon in polygons for ring in polygon], 40, 50)
    np.testing.assert_array_equal(again, MASK.astype(bool))
    (box,) = from_geometry(features[1]["geometry"], "OGC:CRS84", place)
    points = np.array(box[0])
    assert points.min(0) == pytest.approx([1, 2], abs=1e-3) and points.max(0) == pytest.approx(
        [9, 8], abs=1e-3
    )
