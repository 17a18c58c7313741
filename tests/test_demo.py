"""demo.py: files, texts, dialogue, errors."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from dataset.masks import fill_rings
from tests.conftest import REPO
from tests.tiny_lisat import write_checkpoint
from tests.utils.test_geo import patchy
from utils import demo_lisat
from utils.config import ConfigError, parse_config
from utils.demo_lisat import Demo, DemoConfig, read_picture, run
from utils.geo import from_geometry, raster_info, read_geojson


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = np.random.default_rng(0).integers(0, 255, (48, 60, 3)).astype(np.uint8)
    path = tmp_path / "port.png"
    cv2.imwrite(str(path), image)
    return path


def config(checkpoint: Path, tmp_path: Path, **values: object) -> DemoConfig:
    values = {"vis_save_dir": str(tmp_path / "out"), "model_max_length": 4, "device": "cpu"} | values
    return DemoConfig(pretrained_model_path=str(checkpoint), **values)


def test_questions_from_the_command_line(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    questions = ("Segment the ship.", "Segment the house.")
    texts = list(run(config(checkpoint, tmp_path, image=str(picture), question=questions)))
    assert len(texts) == 2 and "Q: Segment the house." in texts[1]
    folder = tmp_path / "out" / "port"
    names = {path.name for path in folder.iterdir()}
    for number in ("", "_2"):
        assert {f"seg_mask{number}.png", f"seg_overlay{number}.png", f"seg_rgb{number}.jpg"} <= names
        mask = cv2.imread(str(folder / f"seg_mask{number}.png"), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (48, 60) and set(np.unique(mask)) <= {0, 255}
        published = cv2.imread(str(folder / f"seg_mask{number}.jpg"), cv2.IMREAD_UNCHANGED)
        assert ((published > 50) == (mask > 0)).mean() > 0.97  # JPEG


def test_dialogue_goes_on_after_an_error(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    lines = iter(["Segment it.", str(tmp_path / "missing.png"), "Segment it.", str(picture), ""])
    texts = list(run(config(checkpoint, tmp_path), ask=lambda prompt: next(lines)))
    assert len(texts) == 2
    assert "missing.png" in texts[0] and texts[1].startswith("Q: Segment it.")


def test_a_dialogue_encodes_a_picture_once(
    checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.sam import ImageEncoder

    encoded, forward = [], ImageEncoder.forward
    monkeypatch.setattr(ImageEncoder, "forward", lambda self, x: encoded.append(len(x)) or forward(self, x))
    lines = iter(["Segment the ship.", "Segment the house.", ""])
    asked = config(checkpoint, tmp_path, image=str(picture), score="iou")
    assert len(list(run(asked, ask=lambda prompt: next(lines)))) == 2
    assert encoded == [1]


def test_the_mask_of_an_answer_is_shown(
    monkeypatch: pytest.MonkeyPatch, picture: Path, tmp_path: Path
) -> None:
    """Two masks in one answer are shown together; an answer without a mask says so."""
    from utils import predict_lisat
    from utils.predictions import query_record

    upper, lower = np.zeros((48, 60), np.uint8), np.zeros((48, 60), np.uint8)
    upper[:5], lower[-6:] = 1, 1

    def answers(*_: object, **__: object):
        fields = {"gt_exists": True, "query": "both", "generated": "It is [SEG] and [SEG] .</s>"}
        both = query_record(upper, upper, pred_exists=True, score=0.75, more_masks=[lower], **fields)
        none = query_record(upper * 0, upper, pred_exists=False, score=None, **fields | {"generated": "No."})
        yield 0, None, [both, none]

    monkeypatch.setattr(predict_lisat, "predict", answers)
    found = Demo(None, None, None, None, tmp_path).answer(str(picture), ["both", "none"])
    assert "found, score 0.750, 22.92% of the picture" in found[0].text
    assert "It is [SEG] and [SEG] .\n" in found[0].text
    mask = cv2.imread(str(found[0].files["seg_mask.png"]), cv2.IMREAD_UNCHANGED)
    assert ((mask == 255) == (upper + lower > 0)).all()
    assert "nothing here" in found[1].text
    assert not cv2.imread(str(found[1].files["seg_mask_2.png"])).any()


def test_pictures_from_addresses(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def urlopen(address: str, timeout: float):
        asked.append(address)
        if "gone" in address:
            raise OSError("no route")
        return open(picture if "port" in address else __file__, "rb")

    monkeypatch.setattr(demo_lisat.urllib.request, "urlopen", urlopen)
    assert (read_picture("https://example.org/port.png?x=1")[0] == read_picture(str(picture))[0]).all()
    assert asked == ["https://example.org/port.png?x=1"]
    for address, message in (
        ("http://example.org/gone.png", "fetched"),
        ("http://example.org/x", "no picture"),
    ):
        with pytest.raises(ValueError, match=message):
            read_picture(address)


def test_georeferenced_pictures(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits, five bands: read by the rules asked for; the mask comes back in the picture's own place."""
    from utils import predict_lisat
    from utils.predictions import query_record

    values = np.random.default_rng(0).integers(100, 3000, (5, 48, 60)).astype(np.uint16)
    path = tmp_path / "port.tif"
    profile = {"driver": "GTiff", "count": 5, "height": 48, "width": 60, "dtype": "uint16", "nodata": 0}
    place = {"crs": "EPSG:32618", "transform": from_origin(5e5, 4e6, 10, 10)}
    with rasterio.open(path, "w", **profile, **place) as target:
        target.write(values)
    found = patchy(0, (48, 60))

    def answers(*parts: object, **_: object):
        (sample,) = parts[3]
        assert np.abs(sample.image - values[[2, 1, 0]].transpose(1, 2, 0) / 3000 * 255).max() <= 0.51
        asked = sample.conversations[0].query
        fields = {
            "query": asked,
            "generated": "It is [SEG].",
            "gt_exists": True,
            "pred_exists": True,
            "score": 0.5,
        }
        yield 0, sample, [query_record(found, found.astype(np.uint8), **fields)]

    monkeypatch.setattr(predict_lisat, "predict", answers)
    given = {"image": str(path), "question": ("Segment the ship.",), "bands": (3, 2, 1)}
    (text,) = run(config(checkpoint, tmp_path, scaling="range:0,3000", **given))
    assert "seg_mask.geojson" in text and "seg_mask.tif" in text
    folder = tmp_path / "out" / "port"
    with rasterio.open(folder / "seg_mask.tif") as source, rasterio.open(path) as scene:
        assert (source.read(1) == found).all()
        assert source.crs == scene.crs and source.transform == scene.transform
    (feature,), crs = read_geojson(folder / "seg_mask.geojson")
    assert feature["properties"]["question"] == "Segment the ship." and feature["properties"]["score"] == 0.5
    drawn = np.zeros_like(found)
    for polygon in from_geometry(feature["geometry"], crs, raster_info(path)[2]):
        drawn |= fill_rings([np.array(ring) for ring in polygon], *found.shape)
    assert (drawn == found).all()
    with pytest.raises(ValueError, match="range:LO,HI"):
        next(run(config(checkpoint, tmp_path, **given, scaling="best")))


def test_faults(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        parse_config(DemoConfig, ["--image", str(tmp_path / "none.png")])
    with pytest.raises(ValueError, match="conv_type"):
        next(run(config(checkpoint, tmp_path, conv_type="other")))


def test_help_and_missing_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, REPO / "demo.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--question" in done.stdout
    command = [sys.executable, REPO / "demo.py", "--pretrained_model_path", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1 and "checkpoint folder" in done.stderr and "Traceback" not in done.stderr
