"""300 broken files: every one ends in a ValueError that names file and field, or in a reported skip.

GRES JSON, `annotations.json` and prediction files are valid but for one seeded change that makes no sense.
What must not happen: another exception, or nothing at all.
"""

import copy
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset.base import ReadOptions
from dataset.generic import GenericData, read_annotations
from dataset.gres import GresData
from tests.dataset.conftest import gres_body, picture, square
from utils.evaluate_predictions import ScoreConfig, scored
from utils.predictions import query_record, read_predictions
from utils.rle import encode_mask

H, W = 20, 24
REMOVE = object()
LONE = "half a character \ud800"
HUGE = 10**400
NAN, INF = math.nan, math.inf
Path_ = tuple[str | int, ...]
Case = tuple[Path_, Any]


def crossed(path: Path_, *values: Any) -> list[Case]:
    return [(path, value) for value in values]


def chosen(cases: list[Case], count: int, seed: int) -> list[Case]:
    """`count` of the cases, the same ones every time."""
    assert len(cases) >= count
    order = np.random.default_rng(seed).permutation(len(cases))[:count]
    return [cases[k] for k in sorted(order)]


def changed(body: Any, path: Path_, value: Any) -> Any:
    """Copy of `body` with the value at `path` replaced (or removed)."""
    body = copy.deepcopy(body)
    if not path:
        return value
    place = body
    for key in path[:-1]:
        place = place[key]
    if value is REMOVE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return body


def dotted(path: Path_) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


def broken_texts(text: str, seed: int) -> Iterator[tuple[str, bytes]]:
    """Files that are not even JSON of the right kind."""
    rng = np.random.default_rng(seed)
    data = text.encode()
    for cut in rng.integers(1, len(data) - 2, 4).tolist():
        yield f"cut at {cut}", data[:cut]
    for place in rng.integers(1, len(data) - 1, 3).tolist():
        yield f"zero byte at {place}", data[:place] + b"\0" + data[place:]
    yield "empty", b""
    yield "blank", b" \n"
    yield "binary", bytes(rng.integers(128, 160, 300, dtype=np.uint8))
    yield "utf-16", text.encode("utf-16")
    yield "undefined letter", data.replace(b"Find", b"\x81\xff")
    yield "two values", data + b" {}"
    yield "nested without end", b"[" * 200_000
    yield "number of 5000 digits", data.replace(b"{", b'{"n": ' + b"9" * 5000 + b", ", 1)
    yield "field twice", data.replace(b"{", b'{"%s": 1, ' % data.split(b'"')[1], 1)
    for value in (b"null", b"3", b"[]", b'"text"', b"NaN", b"true"):
        yield f"only {value.decode()}", value


def named(message: str, file: Path, path: Path_) -> bool:
    """Whether a message names the file and the changed place, or what it is directly a part of."""
    least = max(1, len(path) - 2)
    places = [dotted(path[:n]) for n in range(least, len(path) + 1)] if path else [""]
    return file.name in message and any(place in message for place in places)


# ------------------------------------------------------------------------------------------------- GRES


def gres() -> dict:
    body = gres_body("a.jpg", text=["Find the hut.", "Find the small hut."])
    body["shapes"].append({"label": "ignore", "points": square(1, 1, 3)})
    return body | {"false_premise_QA": [["Find the ship.", True, "There is none."]]}


POINTS = (
    None,
    "x",
    3,
    {},
    [],
    [[1]],
    [[1, 2, 3]],
    [["1", "2"]],
    [[NAN, 1]],
    [[INF, 1]],
    [[HUGE, 1]],
    [[1e300, 1]],
)
POINTS += ([[True, 1]], [[None, None]], [1, 2, 3, 4], square(1000, 1000), square(-900, 3), REMOVE)
GRES_CASES = [
    *crossed(("text",), REMOVE, None, 7, 3.5, True, {}, [], [""], [7], [None], ["a", " "], [LONE], ["[SEG]"]),
    *crossed(("is_sentence",), REMOVE, None, "yes", 2, -1, NAN, [], {}, HUGE),
    *crossed(("shapes",), REMOVE, None, {}, "x", 3, True, []),
    *crossed(("shapes", 0), None, 3, "x", [], True),
    *crossed(("shapes", 1), None, -1, "target", [[1, 2]], False),
    *crossed(("shapes", 1, "label"), REMOVE, None, 3, "", " ", [], {}, True, LONE),
    *(case for k in (0, 1) for case in crossed(("shapes", k, "points"), *POINTS)),
    *crossed(
        ("shapes", 0, "image_name"), 3, [], True, LONE, "../b.jpg", "/a.jpg", "none.jpg", "x" * 5000, "a\0"
    ),
    *crossed(("false_premise_QA",), "x", 3, True, 0, "", [3], [["a", True]], [["a", "yes", "b"]]),
    *crossed(
        ("false_premise_QA",), [[3, True, "b"]], [["a", True, ""]], [["a [SEG]", True, "b"]], [[LONE, 1, "b"]]
    ),
]


def check_gres(folder: Path, data: bytes, path: Path_) -> None:
    split = folder / "reason_seg" / "GeoReasonSeg" / "test"
    for stem in "ab":
        picture(split / f"{stem}.jpg", H, W)
    (split / "b.json").write_text(json.dumps(gres_body("b.jpg")))
    (split / "a.json").write_bytes(data)
    found = GresData(folder, "GeoReasonSeg", "test", ReadOptions(train=False))
    assert [Path(sample.image_path).name for sample in found] == ["b.jpg"], "silently accepted"
    assert len(found.faults) == 1 and named(str(found.faults[0]), split / "a.json", path), found.faults
    with pytest.raises(ValueError) as stopped:
        GresData(folder, "GeoReasonSeg", "test", ReadOptions(train=False, strict=True))
    assert named(str(stopped.value), split / "a.json", path)


@pytest.mark.parametrize(
    "case", chosen(GRES_CASES, 80, 1), ids=lambda case: f"{dotted(case[0])}={case[1]!r:.20}"
)
def test_gres_fields(case: Case, tmp_path: Path) -> None:
    assert GresData  # the unchanged file is fine: test_unchanged_files
    check_gres(tmp_path, json.dumps(changed(gres(), *case)).encode(), case[0])


GRES_TEXTS = dict(broken_texts(json.dumps(gres()), 1))


@pytest.mark.parametrize("name", sorted(GRES_TEXTS)[:20])
def test_gres_texts(name: str, tmp_path: Path) -> None:
    check_gres(tmp_path, GRES_TEXTS[name], ())


# ------------------------------------------------------------------------------------------- own format


def mask(side: int = 5) -> np.ndarray:
    found = np.zeros((H, W), np.uint8)
    found[3 : 3 + side, 4 : 4 + side] = 1
    return found


def own() -> dict:
    queries = [
        {
            "text": "Find the hut.",
            "kind": "k",
            "exists": True,
            "masks": [encode_mask(mask()), [square()[:4]]],
        },
        {
            "text": "the two",
            "masks": [square(), square(9, 9)],
            "answer": "[SEG] and [SEG].",
            "ignore": square(1, 1),
        },
        {"text": "nothing", "exists": False, "masks": [], "question": "Is it there?", "is_sentence": True},
    ]
    images = [{"file": "a.png", "queries": queries}, {"file": "b.png", "queries": [dict(queries[0])]}]
    return json.loads(json.dumps({"images": images}))


Q = ("images", 0, "queries")
CODES = (
    None,
    3,
    "x",
    True,
    [],
    {},
    {"size": [H, W]},
    {"counts": [H * W]},
    encode_mask(mask().T),
    encode_mask(mask() * 0),
)
CODES += (
    encode_mask(mask()) | {"counts": "04"},
    encode_mask(mask()) | {"counts": "\ud800"},
    [[1, 2], [3, 4]],
)
CODES += ([[1, 2], [3, NAN], [5, 6]], [[HUGE, 0], [1, 1], [2, 0]], square(500, 500), [[]], [[[1, 1]]])
OWN_CASES = [
    *crossed(("images",), REMOVE, None, {}, "x", 3, True),
    *crossed(("images", 0), None, 3, "x", [], True, {}),
    *crossed(
        ("images", 0, "file"),
        REMOVE,
        None,
        "",
        " ",
        3,
        [],
        LONE,
        "/a.png",
        "../a.png",
        "none.png",
        "x" * 5000,
    ),
    *crossed(("images", 1, "file"), "a.png", "annotations.json", "a\0.png"),
    *crossed(Q, REMOVE, None, [], {}, "x", 3),
    *crossed((*Q, 0), None, 3, "x", [], True, {}),
    *crossed((*Q, 0, "text"), REMOVE, None, "", " ", 3, [], True, LONE, "the [SEG]", "<image> the"),
    *crossed((*Q, 0, "kind"), 3, [], {}, True, LONE),
    *crossed((*Q, 0, "exists"), "yes", 1, [], NAN, False),
    *crossed((*Q, 0, "masks"), "x", 3, {}, True, [], [None, None]),
    *(case for k in (0, 1) for case in crossed((*Q, k, "masks", 0), *CODES)),
    *crossed(
        (*Q, 0, "masks", 0, "size"), REMOVE, None, 3, "x", [H], [W, H], [H, W, 1], [float(H), W], [HUGE, W]
    ),
    *crossed(
        (*Q, 0, "masks", 0, "counts"),
        REMOVE,
        None,
        3,
        {},
        "",
        "~",
        [-1, H * W + 1],
        [HUGE],
        [1.5],
        ["480"],
        "x" * 99,
    ),
    *crossed((*Q, 1, "ignore"), "x", 3, [], [[1, 2]], {"size": [1, 1], "counts": [1]}),
    *crossed((*Q, 1, "answer"), "", 3, "one [SEG]", "none", [], LONE),
    *crossed((*Q, 2, "question"), 3, [], "where [SEG]?", LONE),
    *crossed((*Q, 2, "is_sentence"), "no", 1, NAN, {}),
    *crossed((*Q, 2, "colour"), "red"),
]


def check_own(folder: Path, data: bytes, path: Path_, whole: dict | None) -> None:
    for stem in "ab":
        picture(folder / f"{stem}.png", H, W)
    file = folder / "annotations.json"
    file.write_bytes(data)
    try:
        pictures, faults = read_annotations(file)
    except ValueError as error:
        assert named(str(error), file, path)
        return
    assert whole is not None, "silently accepted"
    assert len(faults) == 1 and named(str(faults[0]), file, path), faults
    left = sum(len(p.queries) for p in pictures)
    assert left < sum(len(image["queries"]) for image in whole["images"])
    with pytest.raises(ValueError) as stopped:
        GenericData(folder, ReadOptions(train=False, strict=True))
    assert named(str(stopped.value), file, path)
    if pictures:
        assert sum(len(s.conversations) for s in GenericData(folder, ReadOptions(train=False))) == left


@pytest.mark.parametrize(
    "case", chosen(OWN_CASES, 80, 2), ids=lambda case: f"{dotted(case[0])}={case[1]!r:.20}"
)
def test_own_fields(case: Case, tmp_path: Path) -> None:
    check_own(tmp_path, json.dumps(changed(own(), *case)).encode(), case[0], own())


OWN_TEXTS = dict(broken_texts(json.dumps(own()), 2))


@pytest.mark.parametrize("name", sorted(OWN_TEXTS)[:20])
def test_own_texts(name: str, tmp_path: Path) -> None:
    check_own(tmp_path, OWN_TEXTS[name], (), None)


# ------------------------------------------------------------------------------------------- predictions


def predictions() -> dict:
    images = []
    for index, name in enumerate("ab"):
        target = mask()
        target[0] = 255 * (index == 0)
        queries = [
            query_record(
                mask(4 + k),
                target,
                query=text,
                kind="k",
                ref_id=index,
                sent_id=k,
                gt_exists=True,
                pred_exists=True,
                score=0.5,
                generated="",
                more_masks=[mask(2)],
            )
            for k, text in enumerate(["Find the hut.", "the two"][: 2 - index])
        ]
        images.append({"index": index, "image": f"{name}.png", "size": [H, W], "queries": queries})
    header = {"dataset": "own", "n_images": 2, "eval_prompt": "open", "raster": "official"}
    return {"format": "lisat-predictions", "version": 1, "header": header, "images": images}


R = ("images", 0, "queries", 0)
RLES = (None, 3, "x", [], {}, [[1, 2], [3, 4], [5, 6]], {"size": [H, W]}, encode_mask(mask().T))
RLES += (encode_mask(mask()) | {"counts": "04"}, encode_mask(mask()) | {"counts": LONE}, REMOVE)
SHARED_CASES = [  # wrong in files with and without targets
    *crossed(("format",), REMOVE, None, "coco", 3),
    *crossed(("version",), REMOVE, None, 2, "1", NAN, True, HUGE),
    *crossed(("header",), REMOVE, None, [], "x", {}),
    *crossed(("header", "dataset"), REMOVE, None, "", 3, [], LONE),
    *crossed(("header", "n_images"), None, "two", -1, 1.5, NAN, True, "2"),
    *crossed(("images",), REMOVE, None, {}, "x", 3),
    *crossed(("images", 0), None, 3, "x", [], {}),
    *crossed(("images", 0, "image"), REMOVE, None, "", 3, [], LONE, "a\0.png"),
    *crossed(("images", 0, "index"), None, -1, "0", 0.0, NAN, True, 1),
    *crossed(("images", 0, "size"), 3, "x", [H], [W, H], [float(H), W], [0, W], [HUGE, W]),
    *crossed(("images", 0, "queries"), REMOVE, None, {}, "x", 3),
    *crossed(R, None, 3, "x", [], {}),
    *crossed((*R, "prediction"), *RLES),
    *crossed((*R, "prediction", "size"), REMOVE, None, [W, H], [H, HUGE]),
    *crossed((*R, "prediction", "counts"), REMOVE, None, "", "~", 3, [HUGE], [-1, H * W + 1]),
    *crossed((*R, "more_masks"), 3, {}, "x", [None], [encode_mask(mask().T)]),
    *crossed((*R, "query"), 3, [], True, LONE),
    *crossed((*R, "kind"), 3, [], LONE),
    *crossed((*R, "score"), "x", NAN, INF, True, [], HUGE),
    *crossed((*R, "pred_exists"), 1, "yes", NAN, []),
    *crossed((*R, "ref_id"), 1.5, NAN, [], True),
]
TARGET_CASES = [
    *crossed(("header", "n_images"), 0, 1),
    *crossed(("images", 1, "index"), REMOVE, 0, 2),
    *crossed(("images", 1, "size"), REMOVE, None),
    *crossed((*R, "target"), *RLES, encode_mask(mask(3))),
    *crossed((*R, "ignore"), *(code for code in RLES if code is not None), None, encode_mask(mask(3))),
    *crossed((*R, "gt_exists"), REMOVE, None, 1, "yes", NAN),
    *crossed((*R, "pred_exists"), REMOVE, None),
    *crossed((*R, "query"), REMOVE, None),
    *crossed((*R, "counts"), REMOVE, None, [], "x", {}),
    *crossed(
        (*R, "counts", "union"),
        REMOVE,
        None,
        3,
        [1],
        [1, 2, 3],
        [-1, 2],
        [1.5, 2],
        [NAN, 1],
        [1, HUGE],
        [400, 9],
    ),
    *crossed((*R, "counts", "intersection"), [0, 0], [10**6, 10**6], [True, 1]),
]


@pytest.mark.parametrize(
    "case",
    [*chosen(SHARED_CASES, 50, 3), *chosen(TARGET_CASES, 30, 4)],
    ids=lambda case: f"{dotted(case[0])}={case[1]!r:.20}",
)
def test_prediction_fields(case: Case, tmp_path: Path) -> None:
    body = changed(predictions(), *case)
    file = tmp_path / "predictions_own.json"
    file.write_text(json.dumps(body))
    with pytest.raises(ValueError) as stopped:
        read_predictions(file)
    assert named(str(stopped.value), file, case[0]), stopped.value
    if isinstance(body.get("header"), dict) and isinstance(body.get("images"), list):
        lines = [{key: body[key] for key in body if key != "images"}, *body["images"]]
        rank = tmp_path / "ranks" / "preds_own_0_of_1.jsonl"
        rank.parent.mkdir()
        rank.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ValueError) as stopped:
            read_predictions(rank)
        place = case[0][2:] if len(case[0]) > 2 and case[0][0] == "images" else ()
        assert named(str(stopped.value), rank, place), stopped.value


PREDICTION_TEXTS = dict(broken_texts(json.dumps(predictions()), 3))


@pytest.mark.parametrize("name", sorted(PREDICTION_TEXTS)[:20])
def test_prediction_texts(name: str, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(PREDICTION_TEXTS[name])
    with pytest.raises(ValueError, match=r"p\.json"):
        read_predictions(file)
    with pytest.raises(ValueError, match=r"p\.json"):
        read_predictions(file, targets=False)


@pytest.mark.parametrize(
    "case", chosen(SHARED_CASES, 40, 5), ids=lambda case: f"{dotted(case[0])}={case[1]!r:.20}"
)
def test_predictions_of_others(case: Case, tmp_path: Path) -> None:
    """Through the matching of `evaluate.py`, without targets."""
    body = predictions()
    for image in body["images"]:
        for record in image["queries"]:
            for name in ("target", "counts", "gt_exists", "ignore"):
                record.pop(name, None)
    for stem in "ab":
        picture(tmp_path / "own" / f"{stem}.png", H, W)
    queries = [{"text": "Find the hut.", "masks": [square()]}, {"text": "the two", "masks": [square()]}]
    images = [{"file": f"{stem}.png", "queries": queries[: 2 - k]} for k, stem in enumerate("ab")]
    (tmp_path / "own" / "annotations.json").write_text(json.dumps({"images": images}))
    file = tmp_path / "p.json"
    file.write_text(json.dumps(body))
    config = ScoreConfig(predictions=str(file), val_dataset=f"generic:{tmp_path / 'own'}", boundary=False)
    assert not scored(config)[1]
    file.write_text(json.dumps(changed(body, *case)))
    with pytest.raises(ValueError) as stopped:
        scored(config)
    assert file.name in str(stopped.value)


# ------------------------------------------------------------------------------------------- and unbroken


def test_unchanged_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    split = tmp_path / "reason_seg" / "GeoReasonSeg" / "test"
    picture(split / "a.jpg", H, W)
    (split / "a.json").write_text(json.dumps(gres()))
    assert len(GresData(tmp_path, "GeoReasonSeg", "test", ReadOptions(train=False, strict=True))) == 1
    for stem in "ab":
        picture(tmp_path / f"{stem}.png", H, W)
    (tmp_path / "annotations.json").write_text(json.dumps(own()))
    assert len(GenericData(tmp_path, ReadOptions(train=False, strict=True))) == 2
    file = tmp_path / "p.json"
    file.write_text(json.dumps(predictions()))
    assert read_predictions(file).complete and not caplog.records


def test_there_are_three_hundred() -> None:
    fields = 80 + 80 + 80
    texts = [sorted(texts)[:20] for texts in (GRES_TEXTS, OWN_TEXTS, PREDICTION_TEXTS)]
    assert fields + sum(map(len, texts)) == 300
