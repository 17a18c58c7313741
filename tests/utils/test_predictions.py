"""Prediction files: round trips, resuming after a kill, merging ranks, the published form, the control."""

import json
from pathlib import Path

import numpy as np
import pytest

from utils import metrics, predictions
from utils.predictions import Predictions, PredictionWriter, query_record, read_predictions

HEADER = {
    "dataset": "Scenes",
    "n_images": 4,
    "eval_prompt": "forced",
    "conv_type": "vicuna_v1",
    "raster": "official",
}


def random_queries(index: int, count: int = 3) -> list[dict]:
    rng = np.random.default_rng(index)
    records = []
    for number in range(count):
        target = rng.choice([0, 1, 255], size=(6, 9), p=[0.6, 0.3, 0.1]).astype(np.uint8)
        prediction = rng.random((6, 9)) < 0.4
        records.append(
            query_record(
                prediction,
                target,
                query=f"the thing {number}",
                kind=("size", "all")[number % 2],
                gt_exists=True,
                pred_exists=number != 1,
                score=0.5,
                more_masks=[prediction] if number == 0 else [],
            )
        )
    return records


def write(folder: Path, indices: list[int], rank: int = 0, world: int = 1, header: dict = HEADER) -> None:
    with PredictionWriter(folder, header, rank, world) as writer:
        for index in indices:
            if index not in writer.done:
                writer.write(index, f"images/{index}.png", (6, 9), random_queries(index))


def test_masks_round_trip() -> None:
    mask = np.random.default_rng(0).random((13, 7)) < 0.5
    rle = json.loads(json.dumps(predictions.encode_mask(mask)))
    assert (predictions.decode_mask(rle) == mask).all()
    assert (predictions.decode_mask({"size": [2, 2], "counts": [1, 2, 1]}) == [[0, 1], [1, 0]]).all()
    with pytest.raises(ValueError, match="shape"):
        predictions.encode_mask(mask[None])


def test_record_keeps_target_and_counts() -> None:
    target = np.array([[0, 1, 255]], dtype=np.uint8)
    record = query_record(np.array([[1, 1, 1]]), target, query="x", gt_exists=True, pred_exists=True)
    assert (predictions.target_mask(record) == target).all()
    assert record["counts"] == {"intersection": [0, 1], "union": [1, 2], "target": [1, 1]}
    assert "more_masks" not in record


def test_write_merge_read(tmp_path: Path) -> None:
    write(tmp_path, [0, 2], 0, 2)
    assert predictions.merge_ranks(tmp_path, "Scenes") is None
    assert not read_predictions(tmp_path).complete
    write(tmp_path, [1, 3], 1, 2)
    path = predictions.merge_ranks(tmp_path, "Scenes")
    merged, from_ranks = read_predictions(path), read_predictions(tmp_path)
    assert merged == from_ranks
    assert [image["index"] for image in merged.images] == [0, 1, 2, 3]
    assert merged.complete and merged.header == HEADER
    trusted, recounted = merged.counts(), merged.counts(recount=True)
    assert (trusted.intersection == recounted.intersection).all()
    assert (trusted.union == recounted.union).all() and (trusted.target == recounted.target).all()
    assert trusted.n_images == 4 and len(trusted) == 12


def test_resume_after_a_kill_with_other_ranks(tmp_path: Path) -> None:
    write(tmp_path / "whole", [0, 1, 2, 3])
    write(tmp_path / "cut", [0, 1, 2])
    file = tmp_path / "cut" / "preds_Scenes_0_of_1.jsonl"
    file.write_bytes(file.read_bytes()[:-40])  # killed while picture 2 was being written
    with PredictionWriter(tmp_path / "cut", HEADER, 0, 2) as writer:
        assert writer.done == {0, 1}
    write(tmp_path / "cut", [2, 3], 1, 2)
    assert read_predictions(tmp_path / "cut") == read_predictions(tmp_path / "whole")
    write(tmp_path / "cut", [0, 1, 2, 3])  # the first rank again: cuts the torn line, adds nothing
    assert read_predictions(tmp_path / "cut") == read_predictions(tmp_path / "whole")


def test_another_run_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [0])
    with pytest.raises(ValueError, match="eval_prompt: 'forced' there, 'open' here"):
        PredictionWriter(tmp_path, HEADER | {"eval_prompt": "open"})
    with PredictionWriter(tmp_path, HEADER | {"eval_prompt": "open"}, restart=True) as writer:
        assert writer.done == set()


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data sets found there: none"):
        read_predictions(tmp_path)
    write(tmp_path, [0])
    with pytest.raises(ValueError, match="Scenes"):
        read_predictions(tmp_path, "Other")
    file = tmp_path / "preds_Scenes_0_of_1.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], "{", lines[1]]) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_predictions(tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="not a prediction file"):
        read_predictions(bad)
    image = json.loads(lines[1])
    del image["queries"][0]["counts"]
    body = {"format": predictions.FORMAT, "version": 1, "header": HEADER, "images": [image]}
    bad.write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"bad.json: images\[0\].queries\[0\].counts: the field is missing"):
        read_predictions(bad)


def published(folder: Path, **changes: object) -> None:
    (folder / "segmentation_mask").mkdir(parents=True)
    for rank in range(2):
        records = random_queries(rank, 2)
        name = f"segmentation_mask/{rank}_0001.npz"
        arrays = {"pred": [predictions.decode_mask(r["prediction"]) for r in records]}
        arrays["gt"] = [predictions.target_mask(r) for r in records]
        np.savez(folder / name, **{key: np.stack(value).astype(np.int32) for key, value in arrays.items()})
        entry = {"conversation_list": ["a", "b"], "pred_sent": ["", ""], "gt_exists": [True, False]}
        entry |= {"pred_exists": [True, True], "ref_ids": [[0, 0]], "sent_ids": [[0, 1]]}
        entry |= {"segmentation_path": name} | changes
        (folder / f"preds_X_{rank}_of_2.json").write_text(json.dumps({f"{rank}.jpg": entry}))


def test_published_form(tmp_path: Path) -> None:
    published(tmp_path / "a")
    found = read_predictions(tmp_path / "a")
    counts = found.counts()
    for rank in range(2):
        want = [r["counts"]["intersection"] for r in random_queries(rank, 2)]
        assert counts.intersection[counts.image == rank].tolist() == want
    assert found.images[0]["queries"][1]["sent_id"] == 1
    path = predictions.write_predictions(tmp_path / "own.json", found)
    assert read_predictions(path) == found
    (tmp_path / "a" / "preds_X_1_of_2.json").unlink()
    with pytest.raises(ValueError, match="rank"):
        read_predictions(tmp_path / "a")
    published(tmp_path / "b", pred_exists=[True])
    with pytest.raises(ValueError, match="different lengths"):
        read_predictions(tmp_path / "b")


def test_shuffled_control_tells_words_from_pictures() -> None:
    """A predictor that reads the words falls to 0, one that ignores them keeps its score."""

    def scene(obeys: bool) -> Predictions:
        images = []
        for index in range(3):
            targets = [np.zeros((4, 4), np.uint8) for _ in range(3)]
            targets[0][0], targets[1][2] = 1, 1  # the third is "nothing here"
            masks = targets if obeys else [targets[0] | targets[1]] * 3
            queries = [
                query_record(m, t, query="q", kind="k", gt_exists=bool(t.any()), pred_exists=bool(m.any()))
                for m, t in zip(masks, targets)
            ]
            images.append({"index": index, "image": "i", "size": [4, 4], "queries": queries})
        return Predictions({"dataset": "X"}, images)

    assert metrics.scores(scene(True).counts())["giou"] == pytest.approx(1, abs=1e-5)
    assert metrics.scores(scene(True).shuffled_counts())["giou"] == 0
    blind = scene(False)
    assert blind.shuffled_counts().iou.tolist() == blind.counts().iou.tolist()
    only = Predictions({}, [dict(blind.images[0], queries=blind.images[0]["queries"][:1])])
    assert len(only.shuffled_counts()) == 0
