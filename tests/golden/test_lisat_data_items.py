"""Every draw of the published data set classes, from the same seeds: texts, masks, flags, pictures."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from dataset.base import ConversationData, ReadOptions
from dataset.draws import Draws
from dataset.hybrid import Hybrid
from dataset.image import ImageProcessor
from dataset.registry import load_dataset, load_family
from dataset.sample import Sample
from dataset.sem_seg_sets import MODE_SHARES, MODES
from dataset.templates import Templates
from dataset.text import build_prompt
from tests.conftest import require_golden

FOLDER = require_golden("lisat_data")
ROOT = FOLDER / "dataset"
ITEMS = json.loads((FOLDER / "collate" / "dataset_items.json").read_text())
TEMPLATES = Templates(
    short_question=(
        "Mark every {class_name} you can see, or say that none is visible.",
        "Is any {class_name} in view? Segment it.",
        "Outline the {class_name}.",
    ),
    long_question=("{sent} Return the mask if the target exists.", "{sent} Segment it."),
    long_answer=("Sure, [SEG].", "It is [SEG].", "Here it is: [SEG]."),
    short_answer=("Found {class_name}: [SEG].", "Sure, it is [SEG]."),
    denial=("There is no {class_name} here.", "Nothing of that kind is visible."),
    correction=("No {class_name} here, but {gt_name} is visible.", "I only see {gt_name}, not {class_name}."),
)
PROCESSOR = ImageProcessor(sam_size=64, clip_size=28)
FAMILY = {"refcoco": "refer_seg", "R-refcoco": "neg_refer_seg", "fprefcoco": "correct_refer_seg"}
COUNT = next(item["num_classes_per_sample"] for item in ITEMS["reason_seg_train"])
READERS = {"reason_seg_train", "reason_seg_test", "refer_seg", "vqa", "sem_seg", "mixture"}
ROWS = [(kind, item) for kind in sorted(READERS - {"mixture"}) for item in ITEMS[kind]]


def options(**settings: Any) -> ReadOptions:
    """As the recorded runs: their templates, overlapping parts summed, no index."""
    values = {"templates": TEMPLATES, "overlap": "sum", "index": "off", "num_per_image": COUNT}
    return ReadOptions(**(values | settings))


def opened(kind: str, item: dict) -> tuple[ConversationData | Hybrid, int | None]:
    """The data set that an item was drawn from, and its place where it was asked for by number."""
    if kind == "reason_seg_train":
        settings = options(num_per_image=item["num_classes_per_sample"])
        data = load_dataset(item["spec"], ROOT, settings)
        assert data.false_premise == item["use_fp"]
        listed = [str(entry.json_path.relative_to(ROOT)) for entry in data.entries]
        assert listed == item["sorted_jsons"]
        return data, None
    if kind == "reason_seg_test":
        return load_dataset(item["dataset"], ROOT, options(train=False, prompt="forced")), item["index"]
    if kind == "vqa":
        return load_dataset("vqa:llava_instruct_150k", ROOT, options()), None
    if "index" in item:
        split = item["split"].split()[0]
        data = load_dataset(f"{item['dataset']}|{split}", ROOT, options(train=False, prompt="open"))
        return data, item["index"]
    return load_family(FAMILY.get(item["dataset"], "sem_seg"), item["dataset"], ROOT, options()), None


def drawn(kind: str, item: dict) -> Sample:
    data, index = opened(kind, item)
    return data.official(random.Random(item["python_seed"]), index)


def test_all_kinds_are_known() -> None:
    assert set(ITEMS) == READERS


@pytest.mark.parametrize(
    ("kind", "item"),
    ROWS,
    ids=lambda v: v if isinstance(v, str) else f"{v.get('dataset')}-{v['python_seed']}",
)
def test_draws(kind: str, item: dict) -> None:
    sample = drawn(kind, item)
    rows = sample.conversations
    assert Path(sample.image_path) == ROOT / item["image"]
    prompts = [build_prompt("llava_v1", row.turns, im_start_end=False) for row in rows]
    assert prompts == item["conversations"]
    assert [row.exists for row in rows] == item["exists"]
    for name, values in (("ref_ids", [r.ref_id for r in rows]), ("sent_ids", [r.sent_id for r in rows])):
        if isinstance(item[name], list):  # null or absent: the class returns no such field
            assert values == item[name], name
    image, shape = PROCESSOR.sam(sample.image)
    clip = PROCESSOR.clip(sample.image)
    assert list(image.shape) == item["image_shape"] and list(clip.shape) == item["image_clip_shape"]
    np.testing.assert_allclose(float(image.sum()), item["image_sum"], rtol=1e-3)
    np.testing.assert_allclose(float(clip.sum()), item["image_clip_sum"], rtol=1e-3)
    assert list(shape) == item["sam_mask_shape"][0]
    masks = np.concatenate([row.masks for row in rows])
    assert len(masks) == item["masks_shape"][0]
    if not len(
        masks
    ):  # a stack of no masks: the class gives it the resized size, or (0, 0); we the picture's
        return
    assert list(masks.shape) == item["masks_shape"] and list(masks.shape[1:]) == item["sam_mask_shape"][1]
    assert np.unique(masks).astype(float).tolist() == item["masks_values"]
    for mask, counts in zip(masks, item["mask_value_counts"], strict=True):
        found = {str(float(value)): int(count) for value, count in zip(*np.unique(mask, return_counts=True))}
        assert found == counts
    for mask, rle in zip(masks, item["masks_nonzero_rle"], strict=True):
        np.testing.assert_array_equal(mask != 0, coco.decode(rle).astype(bool))


@pytest.mark.parametrize("item", ITEMS["sem_seg"], ids=lambda i: f"{i['dataset']}-{i['python_seed']}")
def test_modes_of_the_semantic_sets(item: dict) -> None:
    rng = random.Random(item["python_seed"])
    rng.randrange(1)  # the set
    drawn_mode = Draws(rng).weighted(MODES, MODE_SHARES)
    names = {
        "true": "True_Premise",
        "denial": "False_Premise_Denial",
        "correction": "False_Premise_Correction",
    }
    assert names[drawn_mode] == item["mode"]


class Stand(ConversationData):
    """A part of the mixture that says which it is."""

    def __init__(self, number: int) -> None:
        super().__init__(str(number), ReadOptions(templates=TEMPLATES))
        self.number = number

    def __len__(self) -> int:
        return 20

    def _sample(self, index: int, rng: np.random.Generator) -> Sample:
        return Sample(str(self.number), np.zeros((1, 1, 3), np.uint8))


def test_mixture() -> None:
    item = ITEMS["mixture"]
    mixture = Hybrid([Stand(n) for n in range(len(item["rates"]))], item["rates"], sampling="official")
    np.testing.assert_allclose(mixture.shares, item["normalised"], rtol=1e-12)
    (recorded,) = (value for name, value in item.items() if name.endswith("dataset_indices"))
    seed = item["numpy_legacy_seed"]
    assert mixture.official_parts(0, seed)[: len(recorded)].tolist() == recorded
    samples: Iterator[Sample] = (mixture.draw(n, 0, seed) for n in range(len(recorded)))
    assert [int(sample.image_path) for sample in samples] == recorded
