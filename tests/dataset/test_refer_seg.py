"""The REFER format: files, splits, outlines, questions of every kind, faults."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from dataset.base import ReadOptions
from dataset.refer import in_split, outline_mask, read_refer
from dataset.refer_seg import ReferSegData
from dataset.registry import load_dataset
from tests.dataset.miniature import (
    HEIGHT,
    OVERLAP,
    POLYGON,
    WIDTH,
    refer_files,
    write_aerial,
    write_refer_families,
)
from utils.safe_pickle import load_plain_pickle

ABSENT = {"R-refcoco": "exist", "fprefcoco": "is_false_premise"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refer")
    write_refer_families(folder)
    write_aerial(folder)
    return folder


def opened(root: Path, spec: str, **options: Any) -> ReferSegData:
    return load_dataset(spec, root, ReadOptions(templates="tiny", **options))


@pytest.mark.parametrize(
    ("split", "refs"), [("train", [7, 8]), ("val", [9]), ("test", [10]), ("testA", [10]), ("testB", [])]
)
def test_splits(root: Path, split: str, refs: list[int]) -> None:
    folder = root / "refer_seg/refcoco"
    pictures = root / "refer_seg/images/mscoco/images/train2014"
    listing = read_refer(folder / "refs(unc_exclude_unified).p", folder / "instances.json", pictures, split)
    assert [ref["id"] for item in listing.items for ref in item["refs"]] == refs


def test_letters_of_test_splits() -> None:
    assert in_split("testB")("testBC") and not in_split("testB")("testA")
    assert in_split("test")("testAB") and not in_split("train")("trainer")
    with pytest.raises(ValueError, match="'dev' is unknown"):
        in_split("dev")


def test_outlines() -> None:
    code = coco.encode(np.asfortranarray(outline_mask([POLYGON], HEIGHT, WIDTH)))
    code["counts"] = code["counts"].decode()
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[5:17, 4:20] = True
    for form in ([POLYGON], [code], code):
        np.testing.assert_array_equal(outline_mask(form, HEIGHT, WIDTH), inside)
    summed, united = (outline_mask(OVERLAP, HEIGHT, WIDTH, how) for how in ("sum", "union"))
    squares = [outline_mask([part], HEIGHT, WIDTH).astype(int) for part in OVERLAP]
    np.testing.assert_array_equal(summed, squares[0] + squares[1])
    np.testing.assert_array_equal(united, np.maximum(*squares))
    assert summed.max() == 2 and (summed == 2).sum() == 16
    assert not outline_mask([], HEIGHT, WIDTH).any()


@pytest.mark.parametrize(
    "bad", [[[1, 2]], [[1, 2, 3, 4, 5]], [["a"] * 6], [[1e9] * 6], ["x"], "x", [{}], [[True] * 6]]
)
def test_broken_outlines(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"polygon|segmentation|run-length"):
        outline_mask(bad, HEIGHT, WIDTH)


def test_training_pools_the_sentences_of_a_picture(root: Path) -> None:
    data = opened(root, "refcoco|train", num_per_image=2)
    assert len(data) == 1
    seen: set[str] = set()
    for epoch in range(30):
        sample = data.draw(0, epoch)
        assert len(sample.conversations) == 2
        for row in sample.conversations:
            assert row.exists and row.masks.shape == (1, HEIGHT, WIDTH) and row.turns[0][1] == "It is [SEG]."
            assert set(np.unique(row.masks)) == {0, 1}  # OVERLAP is united
            assert row.query.lower() in row.turns[0][0] and row.kind == (
                "roof" if "roofs" in row.query else "ship"
            )
            seen.add(row.query)
    assert seen == {"Left ship", "the red ship", "two roofs"}
    summed = opened(root, "refcoco|train", overlap="sum", num_per_image=3).draw(0)
    assert {int(row.masks.max()) for row in summed.conversations} == {1, 2}


@pytest.mark.parametrize(
    ("name", "answer"), [("R-refcoco", "Nothing like"), ("fprefcoco", "No a boat here, but there is a ship")]
)
def test_absent_things(root: Path, name: str, answer: str) -> None:
    data = opened(root, f"{name}|train", num_per_image=9)
    rows = {row.query: row for row in data.draw(0).conversations}
    absent = rows.pop("A Boat")
    assert not absent.exists and absent.masks.shape == (0, HEIGHT, WIDTH)
    assert absent.turns[0][1].startswith(answer)
    assert len(rows) == 3 and all(row.exists and row.masks.any() for row in rows.values())


@pytest.mark.parametrize("prompt", ["forced", "open", "answer"])
def test_evaluation_asks_every_sentence(root: Path, prompt: str) -> None:
    rows = opened(root, "fprefcoco|val", train=False, prompt=prompt)[0].conversations
    assert [(row.query, row.exists, row.ref_id, row.sent_id) for row in rows] == [
        ("round tank", True, 9, 0),
        ("no", False, 9, 1),
    ]
    wanted = {"forced": "[SEG]", "open": None, "answer": "It is [SEG]."}[prompt]
    assert rows[0].turns[0][1] == wanted and rows[0].masks.sum() == 3 * HEIGHT
    assert rows[1].masks.shape == (0 if prompt == "answer" else 1, HEIGHT, WIDTH) and not rows[1].masks.any()
    again = opened(root, "fprefcoco|val", train=False, prompt=prompt)[0].conversations
    assert [row.turns for row in again] == [row.turns for row in rows]


@pytest.mark.parametrize("name", ["RRSIS-D", "RIS-LAD"])
def test_aerial_sets_lie_anywhere(root: Path, name: str) -> None:
    """In the data folder, in their own, and one of them with the JSON twin of the pickle."""
    for place in (root, root / "rs_ref_seg", root / "rs_ref_seg" / name):
        rows = opened(place, f"{name}|test", train=False)[0].conversations
        assert [(row.query, row.kind, row.ref_id) for row in rows] == [("tank for tests", "ship", 10)]
    with pytest.raises(ValueError, match="looked for instances.json in"):
        opened(root / "refer_seg", f"{name}|test")


def test_pickle_and_json_twin_are_alike(tmp_path: Path) -> None:
    listings = []
    for ending in (".p", ".json"):
        folder = tmp_path / ending[1:]
        refer_files(folder, "x", tmp_path / "pictures", ending, absent="exist")
        listings.append(
            read_refer(folder / f"refs(x){ending}", folder / "instances.json", tmp_path / "pictures", "train")
        )
    assert listings[0].items == listings[1].items and not listings[0].faults


def test_another_refs_file_can_be_named(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "refer_seg"
    refer_files(folder / "refcoco", "google", folder / "images/mscoco/images/train2014")
    with pytest.raises(ValueError, match=r"expected refs\(unc_exclude_unified\).*found refs\(google\)\.p"):
        opened(tmp_path, "refcoco|train")
    assert len(opened(tmp_path, "refcoco(google)|train")) == 1


def test_several_annotations_and_none(tmp_path: Path) -> None:
    folder = tmp_path / "refer_seg/refcoco"
    refer_files(folder, "unc_exclude_unified", tmp_path / "refer_seg/images/mscoco/images/train2014")
    path = folder / "refs(unc_exclude_unified).p"
    refs = load_plain_pickle(path)
    refs[0]["ann_id"], refs[1]["ann_id"] = [1, 2], [-1]
    path.write_bytes(pickle.dumps(refs))
    for overlap in ("union", "sum"):
        rows = {
            r.query: r.masks
            for r in opened(tmp_path, "refcoco|train", num_per_image=9, overlap=overlap)[0].conversations
        }
        union = outline_mask([POLYGON], HEIGHT, WIDTH) | outline_mask(OVERLAP, HEIGHT, WIDTH)
        np.testing.assert_array_equal(rows["Left ship"][0], union)
        assert rows["two roofs"].shape[0] == 1 and not rows["two roofs"].any()


def test_faults_are_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder, pictures = tmp_path / "d", tmp_path / "pictures"
    refer_files(folder, "x", pictures, ".json")
    refs = json.loads((folder / "refs(x).json").read_text())
    good = refs[0]
    bad = {
        "refs[1].image_id": good | {"image_id": 99},
        "refs[2].ann_id": good | {"ann_id": 99},
        "refs[3].ann_id": good | {"ann_id": "1"},
        "refs[4].sentences": good | {"sentences": []},
        "refs[5].sentences[0].sent": good | {"sentences": [{"sent": "a [SEG]"}, *good["sentences"]]},
        "refs[6].split": good | {"split": None},
        "refs[7].split": 3,
    }
    (folder / "refs(x).json").write_text(json.dumps([good, *bad.values()]))
    listing = read_refer(folder / "refs(x).json", folder / "instances.json", pictures, "train")
    assert [fault.field for fault in listing.faults] == list(bad)
    assert [len(ref["sentences"]) for ref in listing.items[0]["refs"]] == [2, 2]
    tables = json.loads((folder / "instances.json").read_text())
    tables["images"][0]["file_name"] = "../secret.jpg"
    (folder / "instances.json").write_text(json.dumps(tables))
    listing = read_refer(folder / "refs(x).json", folder / "instances.json", pictures, "train")
    assert not listing.items and "leads out of the folder" in listing.faults[0].message


def test_a_picture_of_another_size_is_refused(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "refer_seg/refcoco"
    pictures = tmp_path / "refer_seg/images/mscoco/images/train2014"
    refer_files(folder, "unc_exclude_unified", pictures)
    tables = json.loads((folder / "instances.json").read_text())
    tables["images"][0]["height"] += 1
    (folder / "instances.json").write_text(json.dumps(tables))
    with pytest.raises(
        ValueError, match=r"p11.jpg: picture has \(32, 40\) pixels, instances.json says \(33, 40\)"
    ):
        opened(tmp_path, "refcoco|train", strict=True)[0]
