"""Checks of data sets by name: every family passes, faults are found."""

import json
from pathlib import Path

import pytest

import validate_data
from dataset.validate_sets import validate_dataset
from tests.dataset.miniature import HEIGHT, WIDTH, halves, ids, write_all

SPECS = [
    *(
        "GeoReasonSeg|train",
        "ReasonSeg|train",
        "refclef|train",
        "refcoco|val",
        "R-refcoco+|train",
        "fprefcocog|val",
    ),
    *("ade20k|train", "cocostuff|train", "mapillary|train", "pascal_part|train", "paco_lvis|train"),
    *("RRSIS-D|train", "RIS-LAD|test", "RefSegRS|train", "EarthReason|test", "vqa:llava_instruct_150k"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("sets"))


@pytest.mark.parametrize("spec", SPECS)
def test_sound_sets(root: Path, spec: str) -> None:
    report = validate_dataset(spec, root, show_progress=False)
    table = report.statistics[spec]
    assert report.ok, report.lines()
    assert table["queries"] >= table["pictures"] >= 1
    assert table["picture sizes (height, width)"][0][0] == [HEIGHT, WIDTH]
    assert validate_dataset(spec, root, fast=True).statistics[spec]["pictures"] == table["pictures"]


def test_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_all(tmp_path / "data")
    folder = root / "rs_reason_seg/RSReasonSeg/train"
    (folder / "QAs/e1.json").write_text("{")
    assert "e1.json: not a readable JSON file" in "\n".join(
        validate_dataset("EarthReason|train", root).lines()
    )
    ids(root / "ade20k/annotations/training/a1.png", halves(1, 2)[:-1])
    text = "\n".join(validate_dataset("ade20k|train", root, show_progress=False).lines())
    assert "a1.png: mask is (31, 40) pixels, picture (32, 40)" in text
    instances = root / "refer_seg/refcoco/instances.json"
    tables = json.loads(instances.read_text())
    tables["annotations"][0]["segmentation"] = []
    instances.write_text(json.dumps(tables))
    arguments = ["--dataset", "refcoco|train", "--dataset_dir", str(root)]
    assert validate_data.main(arguments) == 1
    assert "'the red ship' (ref 7): is there, but no pixel is inside" in capsys.readouterr().out
    assert validate_data.main([*arguments, "--path", "x"]) == 2
    assert "either --path (a folder) or --dataset" in capsys.readouterr().err
