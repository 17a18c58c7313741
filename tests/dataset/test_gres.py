"""GRES and ReasonSeg reader: layouts, list files, drawing, evaluation prompts, faults."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dataset.base import ReadOptions, draw_record
from dataset.gres import GresData, find_split, parse_annotation, read_names
from tests.dataset.conftest import gres_body, picture, square

Writer = Callable[..., Path]
PREMISES = [["Where is the ship?", True, "There is no ship."], ["Crane", False, "No crane."]]


def open_gres(root: Path, split: str = "train", name: str = "GeoReasonSeg", **options: object) -> GresData:
    return GresData(root, name, split, ReadOptions(**options))


def test_training_draws_depend_on_index_epoch_and_seed_alone(gres_folder: Writer) -> None:
    files = {f"n{k}": gres_body(f"n{k}.jpg", text=[f"Find {w}." for w in "abcde"]) for k in range(4)}
    data = open_gres(gres_folder(files))
    draws = [json.dumps(draw_record(data.draw(2, epoch=e, seed=s))) for e in range(5) for s in range(3)]
    again = [json.dumps(draw_record(data.draw(2, epoch=e, seed=s))) for e in range(5) for s in range(3)]
    assert draws == again and len(set(draws)) > 10
    assert json.dumps(draw_record(data[2])) == json.dumps(draw_record(data.draw(2)))
    assert len(list(data)) == 4
    with pytest.raises(IndexError):
        data[4]


def test_training_conversations(gres_folder: Writer) -> None:
    data = open_gres(gres_folder({"a": gres_body(text=["Find A.", "Find B.", "Find C.", "Find D."])}))
    seen = set()
    for epoch in range(40):
        conversations = data.draw(0, epoch).conversations
        assert len({c.query for c in conversations}) == 3
        for number, conversation in enumerate(conversations):
            (question, answer), seen_query = conversation.turns[0], conversation.query
            assert question.startswith(seen_query) and answer.count("[SEG]") == 1
            assert conversation.masks.shape == (1, 20, 24) and conversation.masks.sum() == 49
            assert (conversation.ref_id, conversation.sent_id, conversation.exists) == (0, number, True)
            seen.add(seen_query)
    assert len(seen) == 4
    few = open_gres(data.entries[0].json_path.parents[3], num_per_image=5)
    assert [c.query for c in few[0].conversations] == ["Find A.", "Find B.", "Find C.", "Find D."]


def test_names_are_lower_cased_sentences_are_not(gres_folder: Writer) -> None:
    body = gres_body(text=["Red Hut"], is_sentence=False)
    data = open_gres(gres_folder({"a": body}))
    assert "red hut" in data[0].conversations[0].turns[0][0]


def test_false_premises_in_training_and_test(gres_folder: Writer) -> None:
    root = gres_folder({"a": gres_body(false_premise_QA=PREMISES)}, name="ReasonSeg")
    data = open_gres(root, name="ReasonSeg", absent_rate=1.0)
    conversations = data[0].conversations
    assert {c.turns[0][1] for c in conversations} == {"There is no ship.", "No crane."}
    assert any("Crane" in c.turns[0][0] for c in conversations)  # kept as written
    assert all(not c.exists and c.masks.shape == (0, 20, 24) for c in conversations)
    assert all(c.exists for c in open_gres(root, name="ReasonSeg", absent_rate=0.0)[0].conversations)
    test = open_gres(root, name="ReasonSeg", train=False)[0].conversations
    assert [(c.exists, c.masks.shape, int(c.masks.sum())) for c in test] == [
        (True, (1, 20, 24), 49),
        (False, (1, 20, 24), 0),
    ]
    told = open_gres(root, name="ReasonSeg", train=False, prompt="answer")[0].conversations
    assert [(c.turns[0][1].count("[SEG]"), len(c.masks)) for c in told] == [(1, 1), (0, 0)]


@pytest.mark.parametrize("prompt", ["forced", "open", "answer"])
def test_evaluation_prompts(gres_folder: Writer, prompt: str) -> None:
    root = gres_folder({"a": gres_body(text=["Find A.", "Find B."])}, split="test")
    sample = open_gres(root, "test", train=False, prompt=prompt)[0]
    (conversation,) = sample.conversations
    question, answer = conversation.turns[0]
    assert question.startswith("Find A. ")
    assert {"forced": answer == "[SEG]", "open": answer is None, "answer": bool(answer)}[prompt]
    assert len(open_gres(root, "test", train=False, all_texts=True)[0].conversations) == 2
    assert question == open_gres(root, "test", train=False)[0].conversations[0].turns[0][0]


def test_evaluation_template_hangs_on_the_file_name(gres_folder: Writer) -> None:
    files = {f"n{k}": gres_body(f"n{k}.jpg") for k in range(12)}
    root = gres_folder(files, split="test")
    data = open_gres(root, "test", train=False)
    questions = {Path(s.image_path).name: s.conversations[0].turns[0][0] for s in data}
    assert len(set(questions.values())) > 3
    (root / "reason_seg/GeoReasonSeg/test/n0.json").unlink()
    fewer = open_gres(root, "test", train=False)
    assert all(s.conversations[0].turns[0][0] == questions[Path(s.image_path).name] for s in fewer)


def test_ignore_regions(gres_folder: Writer) -> None:
    body = gres_body()
    body["shapes"].append({"label": "ignore", "points": square(14, 5, 3)})
    root = gres_folder({"a": body})
    assert set(np.unique(open_gres(root)[0].conversations[0].masks)) == {0, 1}
    kept = open_gres(root, respect_ignore=True)[0].conversations[0].masks
    assert (kept == 255).sum() == 16
    exact = open_gres(root, raster="exact")[0].conversations[0].masks
    assert exact.sum() == 36


@pytest.mark.parametrize(("gap_a", "gap_i"), [("_", "_"), ("-", "-"), ("_", "-")])
def test_the_layout_of_the_gres_repository(tmp_path: Path, gap_a: str, gap_i: str) -> None:
    annotations = tmp_path / f"gres{gap_a}annotations" / "test"
    annotations.mkdir(parents=True)
    for number, stem in enumerate("abc"):
        picture(tmp_path / f"gres{gap_i}images" / "test" / f"{stem}.jpg", seed=number)
        (annotations / f"{stem}.json").write_text(json.dumps(gres_body(f"{stem}.jpg")))
    (annotations / "test.txt").write_text("c\na\nc\na")
    data = open_gres(tmp_path, "test", train=False)
    assert [entry.json_path.stem for entry in data.entries] == ["a", "c"]
    (tmp_path / "sub.txt").write_text("b.json\nmissing\n")
    part = open_gres(tmp_path, "test", train=False, list_file=str(tmp_path / "sub.txt"))
    assert [entry.json_path.stem for entry in part.entries] == ["b"]
    assert "missing.json is not there" in part.faults[0].message


def test_splits_joined_with_an_underscore(gres_folder: Writer) -> None:
    root = gres_folder({"a": gres_body()})
    gres_folder({"b": gres_body("b.jpg")}, split="val")
    assert len(open_gres(root, "train_val")) == 2
    gres_folder({"c": gres_body("c.jpg")}, split="train_val")
    assert len(open_gres(root, "train_val")) == 1  # a folder of that very name wins
    with pytest.raises(ValueError, match="looked for the folders"):
        find_split(root, "GeoReasonSeg", "test")


def test_unusable_files_are_reported_and_skipped(
    gres_folder: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    files = {
        "good": gres_body("good.jpg"),
        "gone": gres_body("elsewhere.jpg"),
        "out": gres_body("../good.jpg"),
        "empty": gres_body("empty.jpg", shapes=[]),
        "textless": {"is_sentence": True, "shapes": []},
        "broken": gres_body("broken.jpg"),
    }
    root = gres_folder(files)
    folder = root / "reason_seg/GeoReasonSeg/train"
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "json.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        data = open_gres(root)
    assert [entry.json_path.stem for entry in data.entries] == ["good"]
    found = {(Path(fault.file).name, fault.field) for fault in data.faults}
    assert found == {
        ("gone.json", "shapes[0].image_name"),
        ("out.json", "shapes[0].image_name"),
        ("empty.json", "shapes"),
        ("textless.json", "text"),
        ("broken.jpg", ""),
        ("json.json", ""),
    }
    assert "6 unusable entries" in caplog.text
    with pytest.raises(ValueError, match="6 unusable entries"):
        open_gres(root, strict=True)
    kept = open_gres(root, train=False, keep_empty=True)
    assert [entry.json_path.stem for entry in kept.entries] == ["empty", "good"]
    (conversation,) = kept[0].conversations
    assert not conversation.exists and conversation.masks.sum() == 0


def test_pictures_that_break_later(gres_folder: Writer, caplog: pytest.LogCaptureFixture) -> None:
    root = gres_folder({"a": gres_body("a.jpg"), "b": gres_body("b.jpg")})
    train, test = open_gres(root), open_gres(root, train=False)
    (root / "reason_seg/GeoReasonSeg/train/a.jpg").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert train[0].image_path.endswith("b.jpg")
    assert "empty file" in caplog.text
    with pytest.raises(ValueError, match="empty file"):
        test[0]
    shutil.rmtree(root / "reason_seg/GeoReasonSeg/train")
    with pytest.raises(ValueError, match="none of the 2 pictures"):
        train[0]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"text": []}, "text"),
        ({"text": [" "]}, "text"),
        ({"text": [3]}, "text"),
        ({"text": ["a [SEG]"]}, "text"),
        ({"text": ["<image> a"]}, "text"),
        ({"is_sentence": "yes"}, "is_sentence"),
        ({"shapes": {}}, "shapes"),
        ({"shapes": [3]}, r"shapes\[0\]"),
        ({"shapes": [{"points": square()}]}, r"shapes\[0\].label"),
        ({"shapes": [{"label": 1, "points": square()}]}, r"shapes\[0\].label"),
        ({"shapes": [{"label": "target", "points": []}]}, r"shapes\[0\].points"),
        ({"shapes": [{"label": "target", "points": [[1, None]]}]}, r"shapes\[0\].points"),
        ({"false_premise_QA": [["a", True]]}, r"false_premise_QA\[0\]"),
        ({"false_premise_QA": [["a", True, "It is [SEG]."]]}, r"false_premise_QA\[0\]"),
        ({"false_premise_QA": {}, "text": ["a"]}, ""),
    ],
)
def test_field_faults_name_file_and_field(changes: dict, field: str) -> None:
    data = json.dumps(gres_body(**changes)).encode()
    if changes.get("false_premise_QA") == {}:
        assert parse_annotation(data, "x.json").false_premises == ()
        return
    with pytest.raises(ValueError, match=rf"x\.json: {field}"):
        parse_annotation(data, "x.json")


def test_encodings() -> None:
    body = json.dumps(gres_body(text=["café – left"]), ensure_ascii=False)
    for data in (body.encode(), body.encode("utf-8-sig"), body.encode("cp1252")):
        assert parse_annotation(data, "x.json").texts == ("café – left",)
    with pytest.raises(ValueError, match="neither UTF-8 nor Windows-1252"):
        parse_annotation(b'{"a": "\x81\xff"}', "x.json")


def test_list_files_name_each_entry_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "l.txt").write_text("b\n\na.json\nb\nc.jpg\nv1.2")
    assert read_names(tmp_path / "l.txt") == ["b", "a", "c", "v1.2"]
    assert "repeats 1 of 5 entries" in caplog.text
    with pytest.raises(ValueError, match="cannot be read"):
        read_names(tmp_path / "no.txt")
