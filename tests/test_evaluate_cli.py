"""evaluate.py end to end without a model: formats, rasters, sizes, mismatches, processes, other commands."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from dataset.generic import write_annotations
from dataset.masks import Shape, rasterise
from tests.conftest import REPO
from tests.dataset.miniature import write_all
from tests.dataset.test_sem_seg import halves
from tests.dataset.test_sem_seg import write as write_sem_seg
from utils import metrics
from utils.config import ConfigError, parse_config
from utils.evaluate_predictions import ScoreConfig, read_pictures, run, scored
from utils.mask_folder import mask_names
from utils.rle import decode_mask, encode_mask

H, W = 40, 48


def polygon(number: int) -> list[list[float]]:
    return [[5, 5], [20 + number, 5], [20 + number, 30], [5, 30], [5, 5]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Own format `scenes/test` (two queries and an absent thing per picture), GRES, and a semantic folder."""
    root = tmp_path_factory.mktemp("data")
    own, gres = root / "scenes" / "test", root / "reason_seg" / "GeoReasonSeg" / "test"
    images = []
    for folder in (own, gres):
        folder.mkdir(parents=True)
    for number in range(5):
        picture = np.random.default_rng(number).integers(0, 255, (H, W, 3)).astype(np.uint8)
        cv2.imwrite(str(own / f"{number}.png"), picture)
        cv2.imwrite(str(gres / f"{number}.jpg"), picture)
        ignore = np.zeros((H, W), np.uint8)
        ignore[:, 40:] = number == 2
        queries = [
            {"text": "the red ship", "kind": "attribute", "masks": [truth(number)]},
            {"text": "the largest tank", "kind": "size", "masks": [1 - truth(number)], "ignore": ignore},
            {"text": "the blue pier", "kind": "nothing", "exists": False, "masks": []},
        ]
        if number != 2:
            del queries[1]["ignore"]
        images.append({"file": f"{number}.png", "queries": queries})
        shape = {"label": "target", "image_name": f"{number}.jpg", "points": polygon(number)}
        body = {"text": ["Where could a ship berth?"], "is_sentence": True, "shapes": [shape]}
        (gres / f"{number}.json").write_text(json.dumps(body))
    write_annotations(own, images)
    write_sem_seg(root / "city", {"a": halves(0, 2), "b": halves(2, 2)})
    return root


def truth(number: int) -> np.ndarray:
    mask = np.zeros((H, W), np.uint8)
    mask[5:20, 4 + number : 20] = 1
    return mask


def guesses(number: int) -> list[np.ndarray]:
    """What a predictor says to the three queries of picture `number`."""
    moved = np.roll(truth(number), number, axis=1)
    nothing = np.zeros((H, W), np.uint8)
    nothing[:2] = number == 1
    return [moved, 1 - moved, nothing]


TEXTS = ("the red ship", "the largest tank", "the blue pier")


def prediction_file(path: Path, skip: tuple = (), extra: tuple = ()) -> Path:
    """Predictions of `guesses` in another order than the data set's."""
    images = []
    for number in (3, 0, 1, 4, 2):
        queries = [
            {"query": text, "prediction": encode_mask(mask)}
            for k, (text, mask) in enumerate(zip(TEXTS, guesses(number)))
            if (number, k) not in skip
        ]
        images.append({"image": f"elsewhere/{number}.png", "queries": queries[::-1]})
    body = {"format": "lisat-predictions", "version": 1, "header": {"dataset": "x", "system": "mine"}}
    path.write_text(json.dumps(body | {"images": images + list(extra)}))
    return path


@pytest.fixture
def make(data: Path, tmp_path: Path):
    def config(**values: object) -> ScoreConfig:
        base = dict(dataset_dir=str(data), val_dataset="scenes", out=str(tmp_path / "out"), gallery=2)
        return ScoreConfig(**(base | values))

    return config


def results(config: ScoreConfig, name: str = "scenes") -> dict:
    return json.loads((Path(config.out) / f"results_{name}.json").read_text())


def table(config: ScoreConfig, name: str = "queries_scenes") -> list[dict]:
    with (Path(config.out) / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def expected() -> metrics.Counts:
    """Counts of `guesses` straight from the arrays."""
    rows = []
    for number in range(5):
        targets = [truth(number), 1 - truth(number), np.zeros((H, W), np.uint8)]
        if number == 2:
            targets[1] = targets[1].copy()
            targets[1][:, 40:] = 255
        for target, found in zip(targets, guesses(number)):
            counts = dict(zip(("intersection", "union", "target"), metrics.mask_counts(found, target)))
            there = {"gt_exists": bool((target == 1).any()), "pred_exists": bool(found.any())}
            rows.append({"image": number} | there | counts)
    return metrics.Counts.from_rows(rows)


def test_prediction_file(make, tmp_path: Path) -> None:
    config = make(predictions=str(prediction_file(tmp_path / "p.json")), thresholds=(0.5, 0.75))
    text = run(config)
    found, want = results(config), metrics.scores(expected(), (0.5, 0.75))
    assert {key: found["scores"][key] for key in want} == pytest.approx(want)
    assert "pr@0.75" in found["scores"] and "pr@0.6" not in found["scores"]
    assert found["presence"] == pytest.approx(metrics.presence_scores(expected()))
    assert found["presence"]["denial_rate"] == 0.8
    assert 0 < found["scores"]["boundary_iou"] < found["scores"]["giou"]
    assert set(found["by_kind"]) == {"attribute", "size", "nothing"}
    assert found["header"]["system"] == "mine" and found["header"]["raster"] == "official"
    rows = table(config)
    assert [row["query"] for row in rows] == list(TEXTS) * 5
    assert [float(row["iou"]) for row in rows] == pytest.approx(expected().iou.tolist(), abs=1e-6)
    assert "Pr@0.75" in text and (tmp_path / "out/report_scenes.html").is_file()
    boot = run(make(cmd="bootstrap", bootstrap_rounds=7, seed=3))
    stored = json.loads((tmp_path / "out/bootstrap_scenes.json").read_text())["bootstrap"]
    assert stored == metrics.bootstrap(expected(), 7, seed=3) and "± " in boot


def test_mask_folder_and_processes_give_the_same(make, tmp_path: Path) -> None:
    names = table_of_asked(make)
    for (number, k), name in names.items():
        (tmp_path / "masks").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "masks" / name), guesses(number)[k] * 255)
    one = make(predictions=str(prediction_file(tmp_path / "p.json")), html=False)
    two = make(predictions=str(tmp_path / "masks"), out=str(tmp_path / "two"), workers=2)
    run(one)
    run(two)
    different = ("header",)
    assert {k: v for k, v in results(one).items() if k not in different} == {
        k: v for k, v in results(two).items() if k not in different
    }
    assert table(one) == table(two)


def table_of_asked(make) -> dict[tuple[int, int], str]:
    config = make(cmd="queries")
    assert run(config).startswith("15 queries about 5 pictures")
    rows = table(config, "asked_scenes")
    assert {row["height"] for row in rows} == {str(H)}
    return {(int(Path(row["image"]).stem), int(row["number"])): row["mask_file"] for row in rows}


def test_mismatches_stop_or_count_as_empty(make, tmp_path: Path) -> None:
    small = {"query": "the red ship", "prediction": encode_mask(np.ones((3, 3), np.uint8))}
    extra = (
        {"image": "9.png", "queries": [small]},
        {"image": "0.png", "queries": [small | {"query": "a cow"}]},
        {"image": "1.png", "queries": [small]},
        {"image": "4.png", "queries": [{"query": TEXTS[1], "prediction": encode_mask(guesses(4)[1])}]},
    )
    file = prediction_file(tmp_path / "p.json", skip=((1, 0), (3, 2)), extra=extra)
    with pytest.raises(ValueError) as stopped:
        run(make(predictions=str(file)))
    for part in ("1 missing", "2 extra", "9.png: not in the data set", "'a cow'", "--mismatch empty"):
        assert part in str(stopped.value)
    config = make(predictions=str(file), mismatch="empty")
    run(config)
    rows = {(Path(row["image"]).stem, row["query"]): row for row in table(config)}
    assert rows["3", TEXTS[2]]["mismatch"] == "missing" and rows["3", TEXTS[2]]["pred_exists"] == "0"
    assert rows["1", TEXTS[0]]["mismatch"] == "size" and float(rows["1", TEXTS[0]]["iou"]) == 0
    assert rows["4", TEXTS[1]]["mismatch"] == "missing"  # two answers: none counts
    listed = table(config, "mismatches_scenes")
    assert sorted(row["kind"] for row in listed) == ["duplicate", "extra", "extra", "missing", "size"]
    assert (
        len(results(config)["mismatches"]) == 5 and "empty, 5 found" in results(config)["header"]["mismatch"]
    )


def test_wrong_sizes_and_broken_masks_stop(make, tmp_path: Path) -> None:
    names = table_of_asked(make)
    folder = tmp_path / "masks"
    folder.mkdir()
    for (number, k), name in names.items():
        cv2.imwrite(str(folder / name), guesses(number)[k])
    cv2.imwrite(str(folder / names[0, 0]), np.ones((3, 3), np.uint8))
    (folder / names[1, 1]).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 size, 1 unreadable") as stopped:
        run(make(predictions=str(folder)))
    assert names[0, 0] in str(stopped.value) and names[1, 1] in str(stopped.value)


def gres_file(path: Path, raster: str) -> Path:
    images = []
    for number in range(5):
        mask = rasterise([Shape("target", np.array(polygon(number), float))], H, W, raster)
        query = {"query": "Where could a ship berth? Segment it.", "prediction": encode_mask(mask)}
        images.append({"image": f"{number}.jpg", "queries": [query]})
    body = {"format": "lisat-predictions", "version": 1, "header": {"dataset": "x"}, "images": images}
    path.write_text(json.dumps(body))
    return path


def test_rasters_and_sizes(make, data: Path, tmp_path: Path) -> None:
    config = make(val_dataset="GeoReasonSeg", predictions=str(gres_file(tmp_path / "p.json", "exact")))
    config.large_area = 460  # official areas: 416, 442, 468, 494, 520
    run(config)
    official = results(config, "GeoReasonSeg")
    assert 0.8 < official["scores"]["giou"] < 1
    assert {name: row["n_masks"] for name, row in official["by_size"].items()} == {"small": 2, "large": 3}
    config.raster = "exact"
    run(config)
    exact = results(config, "GeoReasonSeg")
    assert exact["scores"]["giou"] == pytest.approx(1, abs=1e-5) and exact["header"]["raster"] == "exact"
    assert {name: row["n_masks"] for name, row in exact["by_size"].items()} == {"small": 2, "large": 3}
    assert "460 px in the official raster (our rule" in exact["size_rule"]
    said = run(make(cmd="size_lists", val_dataset="GeoReasonSeg", large_area=460))
    assert "3 large: " in said and "2 small: " in said
    lists = tmp_path / "out"
    listed = make(
        val_dataset="GeoReasonSeg",
        predictions=config.predictions,
        large_list=str(lists / "test_small.txt"),
        html=False,
    )
    run(listed)
    by_size = results(listed, "GeoReasonSeg")["by_size"]
    assert {name: row["n_masks"] for name, row in by_size.items()} == {"large": 2, "unlisted": 3}
    some = make(val_dataset="GeoReasonSeg", predictions=config.predictions, list_file=listed.large_list)
    with pytest.raises(ValueError, match="3 extra"):
        run(some)


def test_semantic_folder(make, data: Path, tmp_path: Path) -> None:
    images = []
    for stem, labels in (("a", halves(0, 2)), ("b", halves(2, 2))):
        queries = [
            {"query": name, "prediction": encode_mask(labels == index)}
            for index, name in ((0, "Water"), (2, "road"), (3, "tree"))
        ]
        images.append({"image": stem, "queries": queries})
    file = tmp_path / "p.json"
    body = {"format": "lisat-predictions", "version": 1, "header": {"dataset": "x"}, "images": images}
    file.write_text(json.dumps(body))
    config = make(val_dataset="sem_seg_folder:city", predictions=str(file))
    run(config)
    found = results(config, "city")["scores"]
    assert (
        found["giou"] == pytest.approx(1, abs=1e-5) and found["see_accuracy"] == 1 and found["n_masks"] == 6
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--predictions is empty"),
        (["--predictions", "x", "--thresholds", "1.5"], "--thresholds"),
        (["--predictions", "x", "--png_threshold", "300"], "--png_threshold"),
        (["--predictions", "x", "--sizes", "folders", "--large_list", "a"], "exclude"),
        (["--predictions", "x", "--bootstrap_rounds", "0"], "--bootstrap_rounds"),
    ],
)
def test_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(ScoreConfig, flags)


def test_what_is_not_there(make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is there"):
        run(make(predictions=str(tmp_path / "none.json")))
    (tmp_path / "p.txt").write_text("")
    with pytest.raises(ValueError, match=r"expected a \.json or \.jsonl"):
        run(make(predictions=str(tmp_path / "p.txt")))
    with pytest.raises(ValueError, match="score first"):
        run(make(cmd="bootstrap"))


def test_command_line(make, data: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "evaluate.py",
        "--predictions",
        str(tmp_path / "none"),
        "--dataset_dir",
        str(data),
    ]
    done = subprocess.run([*command, "--val_dataset", "scenes"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 1 and "evaluate.py: --predictions" in done.stderr
    assert "Traceback" not in done.stderr


LAYOUTS = ("GeoReasonSeg|val", "ReasonSeg|train", "EarthReason|test", "RRSIS-D|test", "RIS-LAD|test")
LAYOUTS += ("RefSegRS|test", "refcoco|val", "R-refcoco|val", "ade20k|train", "paco_lvis|train")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("spec", LAYOUTS)
def test_every_layout(families: Path, tmp_path: Path, spec: str) -> None:
    """The targets themselves score 1, as codes and as PNG masks; empty masks score what is absent."""
    config = ScoreConfig(dataset_dir=str(families), val_dataset=spec, out=str(tmp_path), html=False)
    pictures, _ = read_pictures(config)
    images, there = [], []
    for picture, names in zip(pictures, mask_names(pictures)):
        queries = []
        for wanted, name in zip(picture.queries, names):
            fields = {"query": wanted.query, "ref_id": wanted.ref_id, "sent_id": wanted.sent_id}
            queries.append(fields | {"prediction": wanted.target})
            there.append(wanted.exists)
            file = tmp_path / "masks" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), decode_mask(wanted.target) * np.uint8(255))
        images.append({"image": picture.path, "queries": queries})
    assert there
    body = {"format": "lisat-predictions", "version": 1, "header": {"dataset": "x"}}
    (tmp_path / "p.json").write_text(json.dumps(body | {"images": images}))
    for source in ("p.json", "masks"):
        config.predictions = str(tmp_path / source)
        counts = scored(config)[0].counts()
        assert len(counts) == len(there) and counts.iou == pytest.approx(1, abs=1e-4)
        assert (counts.pred_exists == counts.gt_exists).all()
    for image in images:
        for query in image["queries"]:
            query["prediction"] = encode_mask(np.zeros(query["prediction"]["size"], np.uint8))
    (tmp_path / "p.json").write_text(json.dumps(body | {"images": images}))
    config.predictions = str(tmp_path / "p.json")
    empty = metrics.scores(scored(config)[0].counts())
    assert empty["giou"] == empty["see_accuracy"] == 1 - np.mean(there)


def test_questions_answered_in_words_have_no_scores(families: Path, tmp_path: Path) -> None:
    config = ScoreConfig(dataset_dir=str(families), val_dataset="vqa:llava_instruct_150k", predictions="x")
    with pytest.raises(ValueError, match="answered by a mask"):
        scored(config)
