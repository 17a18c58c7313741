"""GRES and ReasonSeg files against the published reader: masks, texts, samples of the loaders."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from dataset.base import ReadOptions
from dataset.gres import GresData, parse_annotation, read_annotation, read_names
from dataset.image import ImageProcessor
from dataset.masks import split_rings
from dataset.sample import Sample
from dataset.templates import Templates, load_templates
from dataset.text import build_prompt
from tests.conftest import require_golden

FOLDER = require_golden("lisat_data")
RASTER = json.loads((FOLDER / "raster_cases.json").read_text())["cases"]
MASKS = json.loads((FOLDER / "gres_masks.json").read_text())
ITEMS = json.loads((FOLDER / "collate" / "dataset_items.json").read_text())
NEW_OPENCV = tuple(int(n) for n in cv2.__version__.split(".")[:2]) >= (4, 11)
TEMPLATES = Templates(
    short_question=(
        "Mark every {class_name} you can see, or say that none is visible.",
        "Is any {class_name} in view? Segment it.",
        "Outline the {class_name}.",
    ),
    long_question=("{sent} Return the mask if the target exists.", "{sent} Segment it."),
    long_answer=("Sure, [SEG].", "It is [SEG].", "Here it is: [SEG]."),
    short_answer=("Found {class_name}: [SEG].", "Sure, it is [SEG]."),
    denial=load_templates().denial,
    correction=load_templates().correction,
)
PROCESSOR = ImageProcessor(sam_size=64, clip_size=28)


def decode(rle: dict) -> np.ndarray:
    return coco.decode(rle).astype(bool)


@pytest.mark.parametrize("case", RASTER, ids=lambda case: case["name"])
def test_raster_cases(case: dict) -> None:
    data = bytes.fromhex(case["raw_bytes"]) if "raw_bytes" in case else json.dumps(case["json"]).encode()
    if "expected_error" in case:
        with pytest.raises(ValueError, match="x.json: "):
            parse_annotation(data, "x.json")
        return
    annotation, expected = parse_annotation(data, "x.json"), case["expected"]
    mask = annotation.mask(*case["canvas"])
    assert str(mask.dtype) == expected["dtype"]
    assert np.unique(mask).tolist() == expected["values"]
    np.testing.assert_array_equal(mask == 1, decode(expected["target_rle"]))
    np.testing.assert_array_equal(mask == 255, decode(expected["ignore_rle"]))
    assert (int((mask == 1).sum()), int((mask == 255).sum())) == (
        expected["target_area"],
        expected["ignore_area"],
    )
    assert list(annotation.texts) == expected["text"]
    assert annotation.is_sentence == expected["is_sentence"]
    premises = [[p.question, p.is_sentence, p.answer] for p in annotation.false_premises]
    assert premises == expected["false_premise_QA"]


def accepted(entry: dict, field: str) -> object:
    """The value for the installed OpenCV."""
    return entry.get(f"{field}_opencv_4_11_plus", entry[field]) if NEW_OPENCV else entry[field]


@pytest.mark.parametrize("entry", MASKS["entries"], ids=lambda e: f"{e['split']}-{e['name'][-5:]}")
def test_gres_files(entry: dict) -> None:
    path = FOLDER / "gres_annotations" / entry["split"] / f"{entry['name']}.json"
    annotation = read_annotation(path)
    assert len(annotation.texts) == entry["n_queries"]
    assert annotation.is_sentence == entry["is_sentence"]
    assert sum(len(shape.points) for shape in annotation.shapes) == entry["n_points"]
    assert sum(len(split_rings(shape.points)) for shape in annotation.shapes) == entry["n_rings"]
    mask = annotation.mask(*MASKS["canvas"])
    np.testing.assert_array_equal(mask == 1, decode(accepted(entry, "target_rle")))
    assert int((mask == 1).sum()) == accepted(entry, "target_area")
    assert int((mask == 255).sum()) == entry["ignore_area"]
    for height, width in ((300, 400), (600, 640)):
        area = int((annotation.mask(height, width) == 1).sum())
        assert area == accepted(entry, f"target_area_{height}x{width}")
    exact = annotation.mask(*MASKS["canvas"], "exact")
    np.testing.assert_array_equal(exact == 1, decode(entry["pixel_exact_rle"]))
    assert int((exact == 1).sum()) == entry["pixel_exact_area"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_list_files_name_their_folder(split: str) -> None:
    folder = FOLDER / "gres_annotations" / split
    names = read_names(folder / f"{split}.txt")
    assert sorted(names) == sorted(path.stem for path in folder.glob("*.json"))
    assert len((folder / f"{split}.txt").read_text().split()) == 2 * len(names)


# ---------------------------------------------------------------------------------- samples of the loaders


def opened(spec: str, **options: object) -> GresData:
    name, split = spec.split("|")
    return GresData(FOLDER / "dataset", name, split, ReadOptions(templates=TEMPLATES, **options))


def prompts(sample: Sample) -> list[str]:
    return [build_prompt("llava_v1", c.turns, im_start_end=False) for c in sample.conversations]


def check_sample(sample: Sample, item: dict) -> None:
    """Picture, streams, masks, flags of one golden item."""
    assert Path(sample.image_path) == FOLDER / "dataset" / item["image"]
    image, shape = PROCESSOR.sam(sample.image)
    assert list(image.shape) == item["image_shape"] and list(shape) == item["sam_mask_shape"][0]
    clip = PROCESSOR.clip(sample.image)
    assert list(clip.shape) == item["image_clip_shape"]
    np.testing.assert_allclose(float(image.sum()), item["image_sum"], rtol=1e-3)
    np.testing.assert_allclose(float(clip.sum()), item["image_clip_sum"], rtol=1e-3)
    masks = np.concatenate([c.masks for c in sample.conversations])
    assert list(masks.shape) == item["masks_shape"]
    assert np.unique(masks).astype(float).tolist() == item["masks_values"]
    for mask, rle in zip(masks, item["masks_nonzero_rle"], strict=True):
        np.testing.assert_array_equal(mask != 0, decode(rle))
    assert [c.exists for c in sample.conversations] == item["exists"]
    assert [c.sent_id for c in sample.conversations] == item["sent_ids"]


def index_of(data: GresData, item: dict) -> int:
    return [str(e.image_path) for e in data.entries].index(str(FOLDER / "dataset" / item["image"]))


def possible(data: GresData, index: int) -> set[str]:
    """Every conversation the published reader can make of a picture."""
    annotation = data.entries[index].annotation
    rows: set[tuple[str, str]] = set()
    for text in annotation.texts:
        for template in TEMPLATES.long_question if annotation.is_sentence else TEMPLATES.short_question:
            filled = template.replace("{sent}", text).replace("{class_name}", text.lower())
            rows |= {(filled, answer) for answer in TEMPLATES.long_answer}
    for premise in annotation.false_premises:
        for template in TEMPLATES.long_question if premise.is_sentence else TEMPLATES.short_question:
            filled = template.replace("{sent}", premise.question).replace("{class_name}", premise.question)
            rows.add((filled, premise.answer))
    return {build_prompt("llava_v1", [row], im_start_end=False) for row in rows}


@pytest.mark.parametrize(
    "item", ITEMS["reason_seg_train"], ids=lambda i: f"{i['dataset']}-{i['python_seed']}"
)
def test_training_samples(item: dict) -> None:
    """The same pictures, masks and wordings; which of them are drawn is ours (by epoch)."""
    data = opened(
        item["spec"],
        num_per_image=item["num_classes_per_sample"],
        absent_rate=0.15 if item["use_fp"] else 0.0,
    )
    listed = [str(entry.json_path.relative_to(FOLDER / "dataset")) for entry in data.entries]
    assert listed == item["sorted_jsons"]
    index = index_of(data, item)
    allowed = possible(data, index)
    assert set(item["conversations"]) <= allowed
    wanted = item["exists"][0]
    for epoch in range(200):
        sample = data.draw(index, epoch)
        drawn = prompts(sample)
        assert set(drawn) <= allowed
        if sample.conversations[0].exists == wanted:
            check_sample(sample, item)
            assert len(drawn) == len(item["conversations"])
            return
    raise AssertionError(f"no draw with exists {wanted}")


@pytest.mark.parametrize("item", ITEMS["reason_seg_test"], ids=lambda i: f"{i['dataset']}-{i['index']}")
def test_test_samples(item: dict) -> None:
    data = opened(item["dataset"], train=False, prompt="forced")
    index = item["index"]
    assert index_of(data, item) == index
    sample = data[index]
    check_sample(sample, item)
    assert [c.ref_id for c in sample.conversations] == item["ref_ids"]
    forced = {text.split(" ASSISTANT:")[0] for text in possible(data, index)}
    for ours, golden in zip(prompts(sample), item["conversations"], strict=True):
        assert ours.split(" ASSISTANT:")[0] in forced and golden.split(" ASSISTANT:")[0] in forced
        assert ours.split(" ASSISTANT:")[1] == golden.split(" ASSISTANT:")[1]
    again = opened(item["dataset"], train=False, prompt="open")[index]
    for closed, still_open in zip(sample.conversations, again.conversations, strict=True):
        assert still_open.turns == [(closed.turns[0][0], None)]
