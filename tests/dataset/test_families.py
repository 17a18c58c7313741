"""Semantic sets, VQA, mask file sets, families: what they ask and answer, and their faults."""

import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dataset.base import ConversationData, ReadOptions
from dataset.collate import collate
from dataset.hybrid import Hybrid
from dataset.image import ImageProcessor
from dataset.registry import FAMILIES, load_dataset, load_family
from dataset.sem_seg_sets import class_names, open_label_set
from dataset.text import Tokenizer
from dataset.vqa import open_vqa
from tests.dataset.miniature import HEIGHT, WIDTH, dump, halves, ids, image, write_all


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("families"))


def opened(root: Path, spec: str, **options: Any) -> ConversationData:
    return load_dataset(spec, root, ReadOptions(templates="tiny", **options))


# ------------------------------------------------------------------------------------------- semantic sets


def test_class_lists() -> None:
    assert len(class_names("ade20k")) == 150 and len(class_names("cocostuff")) == 182
    for name in ("ade20k", "cocostuff"):
        assert all(text == text.strip() and text for text in class_names(name))


@pytest.mark.parametrize(
    ("spec", "left", "right"),
    [("ade20k", "wall", "flag"), ("cocostuff", "person", None), ("mapillary", "bird", "curb")],
)
def test_label_sets(root: Path, spec: str, left: str, right: str | None) -> None:
    """The picture's left half has one id, its right half another (cocostuff: a name with a hyphen)."""
    rows = opened(root, f"{spec}|train", absent_rate=0.0, num_per_image=5)[0].conversations
    areas = {row.query: int((row.masks == 1).sum()) for row in rows}
    half = (HEIGHT - 1) * WIDTH // 2
    top = {"mapillary": WIDTH}.get(spec, 0)  # there the top row has an id of its own: that of the left half
    assert areas == {left: half + top} | ({right: half} if right else {})
    assert all(row.exists and row.masks.shape == (1, HEIGHT, WIDTH) for row in rows)
    shown = opened(root, f"{spec}|train", train=False, prompt="open")[0].conversations
    assert {row.query: int((row.masks == 1).sum()) for row in shown} == areas


def test_pixels_without_class_may_be_ignored(root: Path) -> None:
    kept = opened(root, "ade20k|train", respect_ignore=True, absent_rate=0.0)[0].conversations[0].masks
    assert (kept[0, 0] == 255).all() and (opened(root, "ade20k|train")[0].conversations[0].masks != 255).all()


def test_modes_and_their_shares(root: Path) -> None:
    data = opened(root, "cocostuff|train", num_per_image=3, absent_rate=0.5)
    hyphens = {name for name in class_names("cocostuff") if "-" in name}
    kinds: Counter[str] = Counter()
    for epoch in range(300):
        rows = data.draw(0, epoch).conversations
        assert len(rows) == 1  # one class is there, so one absent class is asked for
        answer = rows[0].turns[0][1]
        kinds["true" if rows[0].exists else "correction" if "person" in answer else "denial"] += 1
        if not rows[0].exists:
            assert not len(rows[0].masks) and rows[0].query != "person" and rows[0].query not in hyphens
    assert abs(kinds["true"] / 300 - 0.5) < 0.1 and abs(kinds["correction"] / 300 - 0.5 * 8 / 15) < 0.1
    published = [data.official(random.Random(seed)).conversations[0] for seed in range(300)]
    assert abs(sum(row.exists for row in published) / 300 - 0.85) < 0.07
    assert any(row.query in hyphens for row in published)  # they cannot know that such a thing is there


def test_part_sets(root: Path) -> None:
    data = opened(root, "pascal_part|train", absent_rate=0.0, num_per_image=2)
    names = {row.query for epoch in range(40) for row in data.draw(0, epoch).conversations}
    assert names == {"car door", "the door of the car", "car wheel", "the wheel of the car"}
    absent = opened(root, "paco_lvis|train", absent_rate=1.0, num_per_image=2)
    rows = [row for epoch in range(20) for row in absent.draw(0, epoch).conversations]
    assert {row.query for row in rows} == {"lamp"} and not any(len(row.masks) for row in rows)
    shown = opened(root, "paco_lvis|train", train=False)[0].conversations
    assert [row.query for row in shown] == ["mug", "mug handle"]
    assert [int(row.masks.sum()) for row in shown] == [16 * 12, 184]


def test_palette_masks_are_read_as_ids(tmp_path: Path) -> None:
    folder = tmp_path / "mapillary"
    image(folder / "training/images/m.jpg")
    ids(folder / "training/v2.0/labels/m.png", halves(0, 1))
    flat = Image.fromarray(halves(0, 1), mode="P")
    flat.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    flat.save(folder / "training/v2.0/labels/m.png")
    dump(folder / "config_v2.0.json", {"labels": [{"readable": "Bird"}, {"readable": "Curb"}]})
    data = open_label_set("mapillary", "train", tmp_path, ReadOptions())
    np.testing.assert_array_equal(data.labels(0), halves(0, 1))


def test_pictures_without_anything_to_ask_give_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, values in enumerate((np.zeros((HEIGHT, WIDTH)), halves(1, 2))):
        image(tmp_path / f"ade20k/images/training/a{number}.jpg", number)
        ids(tmp_path / f"ade20k/annotations/training/a{number}.png", values)
    data = opened(tmp_path, "ade20k|train")
    assert data.draw(0).image_path.endswith("a1.jpg") and not caplog.text
    hybrid = Hybrid([data], sampling="official")
    assert all(hybrid.draw(0, epoch).image_path.endswith("a1.jpg") for epoch in range(8))
    (tmp_path / "ade20k/annotations/training/lonely.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert len(opened(tmp_path, "ade20k|train")) == 2
    assert "lonely.jpg is not there" in caplog.text


# --------------------------------------------------------------------------------------------------- VQA


def test_vqa_trains_the_language_only(root: Path, tokenizer: Tokenizer) -> None:
    sample = opened(root, "vqa:llava_instruct_150k")[0]
    (row,) = sample.conversations
    assert row.turns == [("What is left?", "A ship."), ("How many?", "One.")] and not len(row.masks)
    batch = collate([sample], tokenizer, ImageProcessor(sam_size=16, clip_size=28))
    learned = batch["labels"][batch["labels"] != -100].tolist()
    end = [tokenizer.eos_token_id]
    assert learned == tokenizer.encode("A ship.", bos=False) + end + tokenizer.encode("One.", bos=False) + end
    assert batch["masks_list"][0].shape == (0, HEIGHT, WIDTH)
    assert (
        opened(root, "vqa:llava_instruct_150k", train=False, prompt="open")[0].conversations[0].turns[-1][1]
        is None
    )


def test_several_vqa_files_with_their_own_pictures(root: Path, tmp_path: Path) -> None:
    image(tmp_path / "aerial/x.jpg", 8)
    talk = [{"from": "human", "value": "Is it wet?"}, {"from": "gpt", "value": "Yes."}]
    rows = [
        {"image": "x.jpg", "conversations": talk},
        {"image": "000000000001.jpg", "conversations": talk},
        {"conversations": [{"from": "gpt", "value": "Hello."}, *talk]},
        {"image": "gone.jpg", "conversations": talk},
        {"image": "x.jpg", "conversations": talk + talk[:1]},
        {"image": "x.jpg", "conversations": talk[1:]},
        {"image": "x.jpg", "conversations": [*talk[:1], {"from": "gpt", "value": "[SEG]"}]},
        {"image": "../x.jpg", "conversations": talk},
        {"image": "x.jpg", "conversations": [talk[0], talk[0]]},
        7,
    ]
    (tmp_path / "more.json").write_text(json.dumps(rows))
    data = open_vqa(f"llava_instruct_150k||{tmp_path}/more.json|{tmp_path}/aerial", root, ReadOptions())
    assert [data[n].conversations[0].has_image for n in range(len(data))] == [True, True, True, False, True]
    assert data[3].conversations[0].turns == [("Is it wet?", "Yes.")]
    assert [fault.field for fault in data.faults] == [
        "[3].image",
        "[5].conversations",
        "[6].conversations[1].value",
        "[7].image",
        "[8].conversations",
        "[9]",
    ]
    assert len(data.lengths()) == len(data) and data.lengths()[1] == 4
    with pytest.raises(ValueError, match="nothing.json is not there"):
        open_vqa("nothing", root, ReadOptions())


# --------------------------------------------------------------------------------------- mask file sets


def test_earth_reason(root: Path) -> None:
    train = opened(root, "EarthReason|train", num_per_image=2)
    rows = train[0].conversations
    assert {row.query for row in rows} == {"Where could one land?", "Which area is flat?"}
    assert all(row.exists and row.masks.sum() == (HEIGHT - 1) * WIDTH // 2 for row in rows)
    assert not train[1].conversations[0].exists and "[SEG]" not in train[1].conversations[0].turns[0][1]
    test = opened(root, "EarthReason|test", train=False)
    assert [len(test[n].conversations) for n in (0, 1)] == [1, 1]
    assert test[1].conversations[0].masks.shape == (1, HEIGHT, WIDTH)
    assert len(opened(root, "EarthReason|test", train=False, all_texts=True)[0].conversations) == 2


def test_ref_seg_rs(root: Path) -> None:
    data = opened(root, "RefSegRS|train", num_per_image=3)
    assert [len(sample.conversations) for sample in data] == [2, 1]
    row = data[0].conversations[0]
    assert row.exists and row.masks.sum() == (HEIGHT - 1) * WIDTH // 2  # 100 is not inside
    assert not data[1].conversations[0].exists


def test_earth_reason_pairs_by_name_and_only_in_need_by_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "RSReasonSeg/train"
    for name in ("b", "a"):
        image(base / f"images/{name}.jpg")
        ids(base / f"labels/{name}.png", halves(0, 1))
        dump(base / f"QAs/{name}.txt", {"questions": [f"Which {name}?"], "answer": []})
    (base / "labels/a.png").rename(base / "labels/z.png")
    with caplog.at_level(logging.WARNING):
        data = opened(tmp_path, "EarthReason|train")
    assert [item.texts for item in data.items] == [("Which b?",)]
    assert (
        "its label is not there" in caplog.text
        and "z.png: its picture and QA file is not there" in caplog.text
    )
    (base / "labels/b.png").rename(base / "labels/y.png")
    data = opened(tmp_path, "EarthReason|train")
    assert [(item.texts[0], Path(item.mask).name) for item in data.items] == [
        ("Which a?", "y.png"),
        ("Which b?", "z.png"),
    ]
    assert "paired by position" in caplog.text


# ------------------------------------------------------------------------------------------------ families


def test_families_draw_their_sets_alike(root: Path) -> None:
    names = FAMILIES["correct_refer_seg"]
    family = load_family("correct_refer_seg", "||".join(names), root, ReadOptions(templates="tiny"))
    assert len(family) == len(names)
    ours = [draw_name(family, epoch) for epoch in range(300)]
    assert all(abs(Counter(ours)[number] / 300 - 1 / 3) < 0.1 for number in range(3))


def draw_name(family: Hybrid, epoch: int) -> int:
    """Which part a draw comes from."""
    found: list[int] = []
    parts = family.parts
    try:
        family.parts = [Spy(number, part, found) for number, part in enumerate(parts)]
        family.draw(0, epoch)
    finally:
        family.parts = parts
    return found[0]


class Spy:
    """A part that notes that it was drawn from."""

    def __init__(self, number: int, part: Any, found: list[int]) -> None:
        self.number, self.part, self.found = number, part, found

    def __len__(self) -> int:
        return len(self.part)

    def draw(self, *arguments: Any, **settings: Any) -> Any:
        self.found.append(self.number)
        return self.part.draw(*arguments, **settings)


def test_missing_sets_of_a_family(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ReadOptions(templates="tiny")
    with pytest.raises(ValueError, match="'refcoco' is none of ade20k.*val2017"):
        load_family("sem_seg", "ade20k||refcoco||cocostuff|val", root, options)
    family = load_family("sem_seg", "ade20k||refcoco||cocostuff|val", root, options, skip_missing=True)
    assert len(family.parts) == 1 and "a set is left out" in caplog.text
    with pytest.raises(ValueError, match="family 'refer' is unknown"):
        load_family("refer", "refcoco", root, options)
