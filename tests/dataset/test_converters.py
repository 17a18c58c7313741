"""COCO, LabelMe, GeoJSON + GeoTIFF and GRES <-> the own format: there and back, foreign files, faults."""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from dataset.convert_job import ConvertConfig, run
from dataset.generic import read_annotations, write_annotations
from dataset.masks import mask_from_json
from tests.conftest import REPO, golden_root
from tests.utils.test_geo import UTM, patchy
from utils.geo import mask_polygons, raster_info, read_geotiff, to_geometry, write_geojson, write_raster
from utils.visualize import write_image

SIZE = (70, 90)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two pictures with every kind of question."""
    folder = tmp_path / "own"
    rng = np.random.default_rng(0)
    for name in ("a.png", "more/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(folder / name, rng.integers(0, 255, (*SIZE, 3)).astype(np.uint8))
    square = np.zeros(SIZE, bool)
    square[10:30, 5:25] = True
    ring = square.copy()
    ring[15:20, 10:20] = False
    parts = patchy(1)
    triangle = [[3, 3], [40.5, 9], [20, 50.25]]
    first = [
        {"text": "the square", "kind": "shape", "exists": True, "masks": [square]},
        {"text": "Where is it cold?", "kind": "reason", "exists": True, "masks": [parts], "ignore": ring},
        {"text": "the two things", "masks": [ring, triangle], "answer": "One is [SEG], one is [SEG]."},
        {"text": "the dragon", "exists": False, "masks": [], "answer": "No dragon here."},
        {"text": "a word", "is_sentence": True, "exists": True, "masks": [], "answer": "Only words."},
    ]
    second = [{"text": "the square", "masks": [parts], "question": "Mark the square!"}]
    geo = {"geo": UTM.to_dict()}
    moved = {"geo": UTM.shifted(1000, 500).to_dict()}
    write_annotations(
        folder, [{"file": "a.png", "queries": first} | geo, {"file": "more/b.png", "queries": second} | moved]
    )
    return folder


def content(folder: Path) -> list[tuple[Any, ...]]:
    """Everything that counts, masks as pixels, in the order of the pictures' names."""
    pictures, faults = read_annotations(folder)
    assert not faults, faults
    found = []
    for picture in sorted(pictures, key=lambda p: p.path.stem):
        for query in picture.queries:
            masks = [mask_from_json(mask, *picture.size).tobytes() for mask in query.masks]
            ignore = None if query.ignore is None else mask_from_json(query.ignore, *picture.size).tobytes()
            fields = query.text, query.kind, query.exists, query.is_sentence, query.answer, query.question
            found.append((picture.path.stem, picture.size, fields, masks, ignore))
    return found


def convert(**values: Any) -> Any:
    config = ConvertConfig(**{name: str(v) if isinstance(v, Path) else v for name, v in values.items()})
    assert config.validate() == []
    return run(config)


def test_coco_there_and_back(own: Path, tmp_path: Path) -> None:
    done = convert(target="coco", input=own, out=tmp_path / "coco.json")
    assert done.pictures == 2 and done.queries == 6 and not done.faults
    back = convert(source="coco", input=tmp_path / "coco.json", pictures=own, out=tmp_path / "back")
    assert not back.faults and content(tmp_path / "back") == content(own)
    coco = COCO(str(tmp_path / "coco.json"))  # other people's tool reads it
    entry = coco.anns[1]
    assert coco.cats[entry["category_id"]]["name"] == "the square"
    assert coco.annToMask(entry).sum() == entry["area"] == 400 and entry["bbox"] == [5, 10, 20, 20]
    assert sum(a["iscrowd"] for a in coco.anns.values()) == 1


def test_coco_of_others(own: Path, tmp_path: Path) -> None:
    from pycocotools import mask as tool

    polygon = [2.0, 2.0, 30.0, 4.0, 25.0, 33.0]
    second = [40.0, 40.0, 60.0, 40.0, 60.0, 60.0, 40.0, 60.0]
    counts = {"size": list(SIZE), "counts": [5, 10, SIZE[0] * SIZE[1] - 15]}
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [polygon, second], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 3, "segmentation": [second], "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 3, "segmentation": counts, "iscrowd": 1},
        {"id": 4, "image_id": 7, "category_id": 4, "segmentation": [second], "caption": "the pier"},
        {"id": 5, "image_id": 7, "category_id": 4, "segmentation": [], "bbox": [1, 2, 3, 4]},
        {"id": 6, "image_id": 7, "category_id": 99, "segmentation": [polygon]},
        {"id": 7, "image_id": 7, "category_id": 3, "segmentation": [[1, 2, 3]]},
        {"id": 8, "image_id": 7, "category_id": 3, "segmentation": {"size": [9, 9], "counts": "?"}},
        "nonsense",
    ]
    images = [{"id": 7, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}]
    images += [{"id": 8, "file_name": "gone.png"}, {"id": 9, "file_name": "../x.png"}, {"id": 10}, {}]
    body = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 3, "name": "ship"}, {"id": 4, "name": "x"}, 5],
    }
    (tmp_path / "c.json").write_text(json.dumps(body))
    done = convert(source="coco", input=tmp_path / "c.json", pictures=own, out=tmp_path / "out", link=True)
    assert len(done.faults) == 10 and (tmp_path / "out" / "a.png").is_symlink()
    (picture,), _ = read_annotations(tmp_path / "out")
    assert [query.text for query in picture.queries] == ["ship", "the pier"]
    codes = tool.frPyObjects([polygon, second], *SIZE)
    union = tool.decode(tool.merge(codes))
    ship = picture.queries[0]
    assert (mask_from_json(ship.masks[0], *SIZE) == union).all()
    crowd = tool.decode(tool.frPyObjects(counts, *SIZE)) & ~(union > 0)
    assert (mask_from_json(ship.ignore, *SIZE) == crowd).all()
    done = convert(
        source="coco", input=tmp_path / "c.json", pictures=own, out=tmp_path / "single", per="object"
    )
    (picture,), _ = read_annotations(tmp_path / "single")
    assert [query.text for query in picture.queries] == ["ship", "ship", "the pier"]
    with pytest.raises(ValueError, match="unusable entries"):
        convert(source="coco", input=tmp_path / "c.json", pictures=own, out=tmp_path / "strict", strict=True)
    (tmp_path / "d.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match="annotations: expected a list"):
        convert(source="coco", input=tmp_path / "d.json", pictures=own, out=tmp_path / "x")


def test_labelme_there_and_back(own: Path, tmp_path: Path) -> None:
    done = convert(target="labelme", input=own, out=tmp_path / "lm")
    assert done.pictures == 2 and not done.faults and (tmp_path / "lm" / "more" / "b.json").is_file()
    back = convert(source="labelme", input=tmp_path / "lm", out=tmp_path / "back")
    assert not back.faults and content(tmp_path / "back") == content(own)
    body = json.loads((tmp_path / "lm" / "a.json").read_text())
    kinds = {shape["shape_type"] for shape in body["shapes"]}
    assert kinds == {"polygon", "mask"} and body["imagePath"] == "a.png" and body["imageHeight"] == SIZE[0]
    # a shape moved in the editor moves the mask
    body["shapes"][0]["points"] = [[x + 7, y] for x, y in body["shapes"][0]["points"]]
    (tmp_path / "lm" / "a.json").write_text(json.dumps(body))
    convert(source="labelme", input=tmp_path / "lm", out=tmp_path / "edited")
    pictures, _ = read_annotations(tmp_path / "edited")
    mask = mask_from_json(pictures[0].queries[0].masks[0], *SIZE)
    assert mask.sum() == 400 and mask[10:30, 12:32].all()


def test_labelme_of_others(own: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    folder.mkdir()
    points = [[5, 10], [25, 10], [25, 30], [5, 30]]
    shapes = [
        {"label": "house", "points": points, "shape_type": "polygon", "group_id": 1},
        {"label": "house", "points": [[40, 40], [50, 50]], "shape_type": "rectangle", "group_id": 1},
        {"label": "house", "points": [[60, 20], [60, 24]], "shape_type": "circle"},
        {"label": "Ignore", "points": points, "shape_type": "polygon"},
        {"label": "road", "points": [[1, 1], [9, 9]], "shape_type": "line"},
        {"label": "road", "points": [[1, 1]]},
        {"label": "road", "points": [[0, 0], [3, 3]], "shape_type": "mask", "mask": "?"},
        {"label": 3, "points": points},
        7,
    ]
    data = base64.b64encode((own / "a.png").read_bytes()).decode()
    body = {"version": "4.0", "shapes": shapes, "imagePath": "..\\pictures\\a.png", "imageData": data}
    (folder / "a.json").write_text(json.dumps(body))
    (folder / "b.json").write_text(json.dumps(body | {"imageData": None}))
    (folder / "c.json").write_text("{")
    (folder / "d.json").write_text(json.dumps(body | {"imageData": "abcd", "imagePath": "d.png"}))
    done = convert(source="labelme", input=folder, out=tmp_path / "out", per="object")
    (picture,), _ = read_annotations(tmp_path / "out")
    assert len(done.faults) == 5 + 3
    first, second = (mask_from_json(query.masks[0], *SIZE) for query in picture.queries)
    assert first.sum() == 400 + 100 and first[10:30, 5:25].all() and first[40:50, 40:50].all()
    assert abs(second.sum() - np.pi * 16) < 4 and second[18:22, 58:62].all()


def test_geo_there_and_back(own: Path, tmp_path: Path) -> None:
    for crs, name in (("", "84"), ("picture", "utm")):
        out = tmp_path / name
        done = convert(target="geo", input=own, out=out, crs=crs, write_pictures=True, write_masks=True)
        assert done.pictures == 2 and not done.faults
        assert raster_info(out / "a.tif")[2] == UTM
        rasters = tmp_path / f"{name}_tif"
        rasters.mkdir()
        for path in (out / "a.tif", out / "more" / "b.tif"):
            path.rename(rasters / path.name)
        back = convert(
            source="geo", input=out / "annotations.geojson", pictures=rasters, out=tmp_path / f"{name}_back"
        )
        assert not back.faults and content(tmp_path / f"{name}_back") == content(own)
        picture = cv2.imread(str(tmp_path / f"{name}_back" / "a.png"))
        assert (picture == cv2.imread(str(own / "a.png"))).all()
        mask = read_geotiff(out / "masks" / "a_1_0.tif", scaling="none")
        assert (mask.rgb[..., 0] == patchy(1)).all() and mask.place == UTM


def test_features_of_others_on_a_real_scene_in_tiles(tmp_path: Path) -> None:
    scene = golden_root().parent / "data" / "geo" / "RGB.byte.tif"
    if not scene.is_file():
        pytest.skip(f"{scene} is not here")
    height, width, place = raster_info(scene)
    mask = np.zeros((height, width), bool)
    mask[240:360, 250:370] = patchy(3, (120, 120))  # where four tiles meet
    dense = mask_polygons(mask)
    lake = [
        [[(300.0, 300.0), (600.0, 320.0), (450.0, 700.0)], [(400.0, 350.0), (500.0, 350.0), (450.0, 500.0)]]
    ]
    named = [("wood", to_geometry(dense, place)), ("lake", to_geometry(lake, place))]
    named += [(None, to_geometry(lake, place)), ("far", to_geometry(lake, place.shifted(9999, 0)))]
    named.append(("way", {"type": "LineString", "coordinates": []}))
    features = [{"type": "Feature", "properties": {"name": name}, "geometry": g} for name, g in named] + [
        None
    ]
    write_geojson(tmp_path / "f.geojson", features)
    done = convert(
        source="geo",
        input=tmp_path / "f.geojson",
        pictures=scene,
        label="name",
        tile=300,
        out=tmp_path / "out",
    )
    assert len(done.faults) == 4 and sum("features[3]" in str(fault) for fault in done.faults) == 1
    pictures, faults = read_annotations(tmp_path / "out")
    assert not faults and len(pictures) > 6
    found = {"wood": np.zeros((height, width), bool), "lake": np.zeros((height, width), bool)}
    rgb = read_geotiff(scene).rgb
    for picture in pictures:
        x, y = map(int, picture.path.stem.split("_")[-2:])
        tile = cv2.imread(str(picture.path))[..., ::-1]
        assert (tile == rgb[y : y + 300, x : x + 300]).all() and tile.shape == (300, 300, 3)
        for query in picture.queries:
            found[query.text][y : y + 300, x : x + 300] |= mask_from_json(query.masks[0], 300, 300) == 1
    assert (found["wood"] == mask).all()
    outline, hole = (np.array(ring, np.float32) for ring in lake[0])
    inside = [cv2.pointPolygonTest(ring, (450.5, 420.5), False) for ring in (outline, hole)]
    assert inside == [1, 1] and not found["lake"][420, 450] and found["lake"][330, 450]
    area = cv2.contourArea(outline) - cv2.contourArea(hole)
    assert abs(found["lake"].sum() - area) < 0.01 * area
    # the tiles know where they lie
    back = convert(target="geo", input=tmp_path / "out", out=tmp_path / "gis", write_pictures=True)
    assert not back.faults and raster_info(back.files[1])[2].crs == "EPSG:32618"


def test_gres_to_own(tmp_path: Path) -> None:
    folder = tmp_path / "reason_seg" / "ReasonSeg" / "train"
    folder.mkdir(parents=True)
    write_image(folder / "1.jpg", np.zeros((*SIZE, 3), np.uint8))
    points = [[5, 10], [25, 10], [25, 30], [5, 30], [5, 10], [40, 40], [50, 40], [50, 50], [40, 50], [40, 40]]
    shapes = [
        {"label": "target", "points": points},
        {"label": "ignore_me", "points": [[60, 0], [70, 0], [70, 9]]},
    ]
    body = {"text": ["the roofs", "what keeps rain off"], "is_sentence": False, "shapes": shapes}
    body["false_premise_QA"] = [["Where is the moon?", True, "There is none."]]
    (folder / "1.json").write_text(json.dumps(body))
    convert(source="gres", input=tmp_path, name="ReasonSeg", out=tmp_path / "out")
    (picture,), _ = read_annotations(tmp_path / "out")
    assert [(q.text, q.exists, q.is_sentence) for q in picture.queries] == [
        ("the roofs", True, False), ("what keeps rain off", True, False), ("Where is the moon?", False, True)
    ]  # fmt: skip
    assert mask_from_json(picture.queries[1].masks[0], *SIZE).sum() == 500
    assert picture.queries[2].answer == "There is none." and picture.queries[0].ignore


def test_command_line(own: Path, tmp_path: Path) -> None:
    script = str(REPO / "scripts" / "convert_data.py")
    command = [
        sys.executable,
        script,
        "--target",
        "coco",
        "--input",
        str(own),
        "--out",
        str(tmp_path / "c.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "2 pictures with 6 questions" in done.stdout, done.stderr
    assert "one of --source" in ConvertConfig(input=str(own), out="x").validate()[0]
    faults = ConvertConfig(source="geo", input=str(tmp_path / "none"), out="").validate()
    assert len(faults) == 3 and any("GeoTIFF" in fault for fault in faults)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no raster"):
        write_geojson(tmp_path / "f.geojson", [])
        convert(source="geo", input=tmp_path / "f.geojson", pictures=tmp_path / "empty", out=tmp_path / "o")
    plain = write_raster(tmp_path / "plain.tif", np.zeros((5, 5), np.uint8), None)
    with pytest.raises(ValueError, match="not georeferenced"):
        convert(source="geo", input=tmp_path / "f.geojson", pictures=plain, out=tmp_path / "o")
    body = json.loads((own / "annotations.json").read_text())
    body["images"] = [{k: v for k, v in image.items() if k != "geo"} for image in body["images"]]
    (own / "annotations.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match="no picture says where it lies"):
        convert(target="geo", input=own, out=tmp_path / "o")


def mutated(value: Any, rng: np.random.Generator) -> Any:
    """A copy of a JSON value with one place changed, removed or replaced by something odd."""
    odd = [
        None,
        [],
        {},
        "",
        "x",
        -1,
        1e308,
        3.5,
        True,
        [[]],
        {"type": "Polygon"},
        float("nan"),
        "../../x",
        10**30,
    ]
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        copy = dict(value) if isinstance(value, dict) else list(value)
        keys = list(copy) if isinstance(copy, dict) else range(len(copy))
        key = keys[int(rng.integers(len(keys)))]
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = mutated(copy[key], rng)
        return copy
    return odd[int(rng.integers(len(odd)))]


def test_mutated_files_end_in_a_named_fault_or_error(own: Path, tmp_path: Path) -> None:
    convert(target="coco", input=own, out=tmp_path / "coco.json")
    convert(target="labelme", input=own, out=tmp_path / "lm")
    convert(target="geo", input=own, out=tmp_path / "gis", write_pictures=True)
    inputs = {
        "coco": (
            tmp_path / "coco.json",
            {"source": "coco", "input": tmp_path / "coco.json", "pictures": own},
        ),
        "labelme": (tmp_path / "lm" / "a.json", {"source": "labelme", "input": tmp_path / "lm"}),
        "geo": (
            tmp_path / "gis" / "annotations.geojson",
            {
                "source": "geo",
                "input": tmp_path / "gis" / "annotations.geojson",
                "pictures": tmp_path / "gis",
            },
        ),
    }
    rng = np.random.default_rng(7)
    outcomes = {"error": 0, "reported": 0, "fine": 0}
    for kind, (file, values) in inputs.items():
        text = file.read_text()
        body = json.loads(text)
        for number in range(50):
            file.write_text(json.dumps(mutated(body, rng)))
            try:
                done = run(
                    ConvertConfig(
                        **{k: str(v) for k, v in values.items()}, out=str(tmp_path / f"{kind}{number}")
                    )
                )
            except ValueError as error:
                outcomes["error"] += 1
                assert len(str(error)) > 15
            else:
                outcomes["reported" if done.faults else "fine"] += 1
                assert set(read_annotations(done.files[0])[1]) <= set(done.faults)
        file.write_text(text)
    assert min(outcomes.values()) > 5, outcomes
