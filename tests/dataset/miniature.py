"""A data folder with a few pictures of every family, in the layouts of the published data sets."""

import json
import pickle
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tests.dataset.conftest import gres_body, picture

HEIGHT, WIDTH = 32, 40
POLYGON = [4, 5, 20, 5, 20, 17, 4, 17]
"""A rectangle of 16 x 12 pixels, as COCO draws it."""
OVERLAP = [[2, 2, 12, 2, 12, 12, 2, 12], [8, 8, 18, 8, 18, 18, 8, 18]]
"""Two squares of 10 x 10 that share 4 x 4 pixels."""


def image(path: Path, seed: int = 0) -> None:
    """A random picture."""
    picture(path, HEIGHT, WIDTH, seed)


def ids(path: Path, values: np.ndarray) -> None:
    """A PNG of one band."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", values.astype(np.uint8))[1].tobytes())


def halves(left: int, right: int, rest: int = 0) -> np.ndarray:
    """Ids of a picture: `left`, `right`, and a top row of `rest`."""
    values = np.full((HEIGHT, WIDTH), left, np.uint8)
    values[:, WIDTH // 2 :], values[0] = right, rest
    return values


def dump(path: Path, value: Any) -> None:
    """JSON, or a pickle where the name ends in .p."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, 2) if path.suffix == ".p" else json.dumps(value).encode())


def sentence(number: int, text: str, **more: Any) -> dict[str, Any]:
    """A sentence of a ref."""
    return {"sent_id": number, "sent": text, "raw": text, "tokens": text.split(), **more}


def refer_files(folder: Path, split_by: str, pictures: Path, ending: str = ".p", absent: str = "") -> None:
    """refs(<split_by>) and instances.json about two pictures; `absent` names the key that marks absence."""
    false = {"exist": {"exist": False}, "is_false_premise": {"is_false_premise": True, "gt_sent": "A Ship"}}
    refs = [
        {"ref_id": 7, "ann_id": 1, "image_id": 11, "category_id": 1, "split": "train"},
        {"ref_id": 8, "ann_id": 2, "image_id": 11, "category_id": 2, "split": "train"},
        {"ref_id": 9, "ann_id": 3, "image_id": 12, "category_id": 1, "split": "val"},
        {"ref_id": 10, "ann_id": 3, "image_id": 12, "category_id": 1, "split": "testA"},
    ]
    refs[0]["sentences"] = [sentence(1, "Left ship "), sentence(2, "the red ship")]
    refs[1]["sentences"] = [
        sentence(3, "two roofs"),
        *([sentence(4, "A Boat", **false[absent])] if absent else []),
    ]
    refs[2]["sentences"] = [
        sentence(5, "round tank"),
        *([sentence(6, "no", **false[absent])] if absent else []),
    ]
    refs[3]["sentences"] = [sentence(7, "tank for tests")]
    code = {"size": [HEIGHT, WIDTH], "counts": [5 * HEIGHT, 3 * HEIGHT, (WIDTH - 8) * HEIGHT]}
    annotations = [
        {"id": 1, "image_id": 11, "category_id": 1, "segmentation": [POLYGON], "bbox": [4, 5, 16, 12]},
        {"id": 2, "image_id": 11, "category_id": 2, "segmentation": OVERLAP, "bbox": [2, 2, 16, 16]},
        {"id": 3, "image_id": 12, "category_id": 1, "segmentation": [code], "bbox": [5, 0, 3, HEIGHT]},
    ]
    images = [
        {"id": number, "file_name": f"p{number}.jpg", "height": HEIGHT, "width": WIDTH} for number in (11, 12)
    ]
    for entry in images:
        image(pictures / entry["file_name"], entry["id"])
    categories = [{"id": 1, "name": "ship"}, {"id": 2, "name": "roof"}]
    dump(folder / f"refs({split_by}){ending}", refs)
    dump(folder / "instances.json", {"images": images, "annotations": annotations, "categories": categories})


def write_refer_families(root: Path) -> None:
    """refclef, refcoco and relatives."""
    folder = root / "refer_seg"
    coco = folder / "images/mscoco/images/train2014"
    refer_files(folder / "refclef", "unc", folder / "images/saiapr_tc-12")
    kinds = {
        "": ("unc_exclude_unified", "umd_exclude_unified"),
        "R-": ("unc_exclude_unified", "umd_exclude_unified"),
    }
    kinds["fp"] = ("berkeley_exclude_unified",) * 2
    absent = {"": "", "R-": "exist", "fp": "is_false_premise"}
    for kind, (unc, umd) in kinds.items():
        for name, split_by in (("refcoco", unc), ("refcoco+", unc), ("refcocog", umd)):
            refer_files(folder / (kind + name), split_by, coco, absent=absent[kind])


def write_semantic_sets(root: Path) -> None:
    """ade20k, cocostuff, mapillary, pascal_part, paco_lvis."""
    for number in (1, 2):
        image(root / f"ade20k/images/training/a{number}.jpg", number)
        ids(root / f"ade20k/annotations/training/a{number}.png", halves(1, 150, 0))
    image(root / "coco/train2017/000000000009.jpg", 9)
    ids(root / "cocostuff/train2017/000000000009.png", halves(0, 177, 255))  # person, water-other
    image(root / "mapillary/training/images/m.jpg", 3)
    ids(root / "mapillary/training/v2.0/labels/m.png", halves(0, 2))
    names = ["Bird", "Ground Animal", "Curb"]
    dump(root / "mapillary/config_v2.0.json", {"labels": [{"readable": name} for name in names]})
    image(root / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/v.jpg", 4)
    sets = {
        "vlpart/pascal_part/train.json": ("v.jpg", ["car:door", "car:wheel", "bus:window"]),
        "vlpart/paco/annotations/paco_lvis_v1_train.json": (
            "train2017/000000000009.jpg",
            ["mug_(cup)", "mug_(cup):handle_(part)", "lamp"],
        ),
    }
    for file, (name, categories) in sets.items():
        tables = {"images": [{"id": 1, "file_name": name, "height": HEIGHT, "width": WIDTH}]}
        tables["categories"] = [{"id": n, "name": text} for n, text in enumerate(categories, start=1)]
        outlines = [(1, [POLYGON]), (2, OVERLAP)]
        tables["annotations"] = [
            {"id": n, "image_id": 1, "category_id": n, "segmentation": outline} for n, outline in outlines
        ]
        dump(root / file, tables)


def write_vqa(root: Path) -> None:
    """llava_instruct_150k with one conversation of two turns."""
    image(root / "coco/train2017/000000000001.jpg", 1)
    turns = [("human", "What is left?\n<image>"), ("gpt", "A ship."), ("human", "How many?"), ("gpt", "One.")]
    row = {"id": "1", "image": "000000000001.jpg"}
    row["conversations"] = [{"from": who, "value": text} for who, text in turns]
    dump(root / "llava_dataset/llava_instruct_150k.json", [row])


def write_reasoning(root: Path) -> None:
    """GeoReasonSeg and ReasonSeg with a false premise."""
    premise = [["Where is the second runway?", True, "There is only one runway."]]
    for name, splits, more in (
        ("GeoReasonSeg", ("train", "val"), {}),
        ("ReasonSeg", ("train",), {"false_premise_QA": premise, "is_sentence": False, "text": ["A Hut"]}),
    ):
        for split in splits:
            for stem in ("a", "b"):
                folder = root / "reason_seg" / name / split
                image(folder / f"{stem}.jpg", 5)
                dump(folder / f"{stem}.json", gres_body(f"{stem}.jpg", **more))


def write_aerial(root: Path) -> None:
    """RRSIS-D, RIS-LAD (JSON twin), RefSegRS, EarthReason."""
    for name, short, ending in (("RRSIS-D", "rrsisd", ".p"), ("RIS-LAD", "ris_lad", ".json")):
        place = root / "rs_ref_seg" / name
        refer_files(place / short, "unc", place / "images" / short / "JPEGImages", ending)
    folder = root / "rs_ref_seg" / "RefSegRS"
    for split, first in (("train", 1), ("test", 3)):
        for number in (first, first + 1):
            image(folder / f"images/{number}.tif", number)
            ids(folder / f"masks/{number}.tif", halves(0, 255 if number != 2 else 0, 100))
        lines = [f"{first} Road with cars", f"{first} paved road", "", f"{first + 1} the field"]
        (folder / f"output_phrase_{split}.txt").write_text("\n".join(lines))
    for split in ("train", "test"):
        base = root / "rs_reason_seg" / "RSReasonSeg" / split
        for number, value in ((1, 1), (2, 0)):
            image(base / f"images/e{number}.png", number)
            ids(base / f"labels/e{number}.png", halves(0, value))
            body = {
                "questions": ["Where could one land?", "Which area is flat?"],
                "answer": ["Here."] * value,
            }
            dump(base / f"QAs/e{number}.json", body)


def write_all(root: Path) -> Path:
    """Every family below `root`."""
    write_reasoning(root)
    write_refer_families(root)
    write_semantic_sets(root)
    write_vqa(root)
    write_aerial(root)
    return root
