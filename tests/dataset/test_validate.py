"""`validate_data.py`: every fault with file and field, exit codes, statistics."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import validate_data
from dataset.generic import write_annotations
from dataset.validate import validate
from tests.dataset.conftest import gres_body, picture, square
from tests.dataset.test_sem_seg import halves, write


def messages(report) -> str:
    return "\n".join(str(fault).replace(report.path, "") for fault in report.faults)


def test_pictures_with_too_many_pixels_are_faults(gres_folder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = gres_folder({"large": gres_body("large.jpg")})
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    report = validate(root / "reason_seg/GeoReasonSeg")
    assert "large.jpg: not a readable picture (Image size (480 pixels) exceeds limit" in messages(report)


def test_gres_faults(gres_folder, capsys: pytest.CaptureFixture[str]) -> None:
    far, out = gres_body("far.jpg"), gres_body("out.jpg")
    far["shapes"][0]["points"] = square(20, 18)
    out["shapes"][0]["points"] = square(100, 100)
    files = {
        "good": gres_body("good.jpg", text=["Find it.", "Find it."]),
        "far": far,
        "out": out,
        "cut": gres_body("cut.jpg"),
    }
    root = gres_folder(files)
    folder = root / "reason_seg/GeoReasonSeg"
    content = (folder / "train/cut.jpg").read_bytes()
    (folder / "train/cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "train/broken.json").write_text('{"text": ["a"], }')
    picture(folder / "train/alone.jpg", seed=9)
    gres_folder({"good": gres_body("good.jpg")}, split="val")
    report = validate(folder)
    assert report.format == "gres" and not report.ok
    text = messages(report)
    for part in (
        "/train/far.json: shapes.points: polygons reach (20, 18, 26, 24) but picture far.jpg has 24x20",
        "/train/out.json: shapes[0].points: polygon reaches (100, 100, 106, 106), all of it outside",
        "/train/cut.jpg: picture cannot be decoded",
        "/train/broken.json: not valid JSON at line 1",
        "/val/good.json: the same name is in the split train",
    ):
        assert part in text
    assert len(report.faults) == 5
    notes = "\n".join(map(str, report.notes))
    assert "alone.jpg: picture without annotation" in notes and "asked more than once: 'Find it.'" in notes
    assert report.statistics["train"]["queries"] == 4 and report.statistics["train"]["usable files"] == 3
    assert "cannot be decoded" not in messages(validate(folder, fast=True))
    assert validate_data.main(["--path", str(folder)]) == 1
    assert "FAULT: " in capsys.readouterr().out


def test_repository_layout(tmp_path: Path) -> None:
    picture(tmp_path / "gres_images/test/a.jpg")
    (tmp_path / "gres_annotations/test").mkdir(parents=True)
    for stem in "ab":
        (tmp_path / f"gres_annotations/test/{stem}.json").write_text(json.dumps(gres_body("a.jpg")))
    (tmp_path / "gres_annotations/test/test.txt").write_text("a\na\n")
    report = validate(tmp_path)
    assert report.ok and report.statistics["test"]["usable files"] == 1
    assert "b.json: not named in" in str(report.notes[0])


def test_own_format(tmp_path: Path) -> None:
    rgb = picture(tmp_path / "train" / "0.png")
    (tmp_path / "train" / "1.png").write_bytes((tmp_path / "train" / "0.png").read_bytes())
    size = list(rgb.shape[:2])
    queries = [
        {"text": "the hut", "kind": "one", "masks": [square()]},
        {"text": "the hut", "kind": "one", "masks": [square()]},
        {"text": "the tree", "masks": [square(20, 2)]},
        {"text": "nothing", "masks": [{"size": size, "counts": [480]}]},
        {"text": "between two pixels", "masks": [[[3.6, 3.6], [4.2, 3.6], [4.2, 4.2]]]},
        {"text": "wrong size", "masks": [{"size": [2, 2], "counts": [4]}]},
        {"text": "not shown", "exists": False, "masks": []},
    ]
    images = [{"file": f"{n}.png", "queries": queries if n == 0 else queries[:1]} for n in (0, 1, 1)]
    write_annotations(tmp_path / "train", images)
    report = validate(tmp_path)
    text = messages(report)
    for part in (
        "polygon reaches x 20..26, y 2..8, the picture has 24x20 pixels",
        "images[0].queries[3].masks[0]: no pixel of the mask is in the picture",
        "images[0].queries[5].masks[0]: run-length code has size [2, 2]",
        "0.png: queries[3].masks[0]: no pixel is inside",
        "images[2].file: picture 1.png is listed in images[1] too",
    ):
        assert part in text
    assert len(report.faults) == 5
    notes = "\n".join(map(str, report.notes))
    assert "the same picture as" in notes and "asked more than once: 'the hut'" in notes
    assert report.statistics["train"]["per kind"] == {"(none)": 3, "one": 3}
    assert report.statistics["train"]["about absent things"] == 1


def test_sem_seg(tmp_path: Path) -> None:
    write(tmp_path, {"a": halves(0, 2), "b": halves(7, 2)})
    cv2.imwrite(str(tmp_path / "masks" / "c.png"), np.zeros((2, 2), np.uint8))
    report = validate(tmp_path)
    assert "b.png: 25 pixels have class 7" in messages(report)
    assert "c.png: mask without picture" in messages(report)
    assert report.statistics[tmp_path.name]["class 2 road"] == "41.7% of pixels, in 2 pictures"
    (tmp_path / "classes.json").write_text("{}")
    assert "no class" in messages(validate(tmp_path))


def test_exit_codes_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "data", {"a": halves(0, 2)})
    arguments = ["--path", str(tmp_path / "data"), "--json", str(tmp_path / "report.json")]
    assert validate_data.main(arguments) == 0
    assert "0 faults, 0 notes" in capsys.readouterr().out
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["ok"] and stored["format"] == "sem_seg"
    assert validate_data.main(["--path", str(tmp_path / "nothing")]) == 2
    (tmp_path / "empty").mkdir()
    assert validate_data.main(["--path", str(tmp_path / "empty")]) == 2
    assert "no known format" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown"):
        validate(tmp_path, "other")
