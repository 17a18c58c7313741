"""The InstructSAM program from end to end on tiny random networks, and its command line."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from dataset.synthetic import draw_scene
from tests.chat_server import ChatServer
from tests.conftest import REPO
from utils.config import ConfigError
from utils.geo import Georeference, write_raster
from utils.instructsam_cli import COMMANDS, main, usual_flags
from utils.instructsam_config import AskConfig, CountConfig
from utils.instructsam_eval_config import EvaluateConfig
from utils.instructsam_files import read_predictions, read_proposals
from utils.visualize import write_image

TINY = ["--config", "instructsam_tiny", "--device", "cpu"]
PRESET = yaml.safe_load((REPO / "configs" / "instructsam_tiny.yaml").read_text(encoding="utf-8"))
PLACE = Georeference("EPSG:32631", (0.5, 0.0, 500_000.0, 0.0, -0.5, 5_400_000.0))


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with three scenes in `images`: PNG, one in a sub-folder, and a GeoTIFF."""
    scenes = [draw_scene(np.random.default_rng(seed), 64).image for seed in range(3)]
    write_image(tmp_path / "images" / "one.png", scenes[0])
    write_image(tmp_path / "images" / "deep" / "two.jpg", scenes[1])
    (tmp_path / "images" / "map.tif").parent.mkdir(exist_ok=True)
    write_raster(tmp_path / "images" / "map.tif", scenes[2], PLACE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(path: Path | str) -> object:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_run_from_pictures_and_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "images" / "broken.png").write_bytes(b"no picture")
    args = [
        "run",
        *TINY,
        "--images",
        "images",
        "--words",
        "ship",
        "plane",
        "--counts",
        "ship=2,plane=1,dog=5",
    ]
    assert main([*args, "--out", "out"]) == 3
    text = capsys.readouterr().out
    assert "failed: broken.png" in text
    out = folder / "out"
    predictions = read_predictions(out / "predictions.json")
    proposals = read_proposals(out / "region_proposals.json")
    assert list(proposals) == ["deep/two.jpg", "map.tif", "one.png"]
    summary = load(out / "summary.json")
    for name, entry in summary["images"].items():
        few = min(3, len(proposals[name]))
        assert sum(entry["labelled"].values()) == few
        if len(proposals[name]) >= 3:
            assert entry["labelled"] == {"ship": 2, "plane": 1}
        assert load(out / "counts" / "by_hand" / Path(name).with_suffix(".json")) == {
            "ship": 2,
            "plane": 1,
            "dog": 5,
        }
        overlay = out / "overlays" / Path(name).with_suffix(".png")
        assert overlay.stat().st_size > 1000
    coco = load(out / "coco.json")
    assert [c["name"] for c in coco["categories"]] == ["ship", "plane"]
    assert len(coco["annotations"]) == len(predictions) > 0
    assert {i["file_name"] for i in coco["images"]} == set(proposals)
    ids = {i["file_name"]: i["id"] for i in coco["images"]}
    map_items = [p for p in predictions if p["image_id"] == ids["map.tif"]]
    features = load(out / "geojson" / "map.geojson")["features"]
    assert [f["properties"]["label"] for f in features] == [p["label"] for p in map_items]
    points = np.array([p for f in features for p in _points(f["geometry"])])
    assert (abs(points[:, 0] - 3.0) < 0.01).all() and (abs(points[:, 1] - 48.75) < 0.05).all()
    assert [p.name for p in (out / "geojson").iterdir()] == ["map.geojson"]


def _points(geometry: dict) -> list[list[float]]:
    parts = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    return [point for part in parts for ring in part for point in ring]


def test_stages_alone_give_what_run_gives(folder: Path) -> None:
    sizes = {"one.png": {"tank": 2}, "deep/two.jpg": {"house": 1, "pool": 1}, "map.tif": {"tank": 0}}
    (folder / "counts.json").write_text(json.dumps(sizes))
    assert main(["run", *TINY, "--images", "images", "--counts", "counts.json", "--out", "out"]) == 0
    masks = [f"--{key}={value}" for key, value in PRESET.items() if key != "clip_model"]
    masks += ["--device", "cpu"]
    assert main(["propose", "--images", "images", *masks]) == 0
    proposals = folder / "region_proposals" / "images" / "sam2_toy.json"
    assert load(proposals) == load("out/region_proposals.json")
    matching = ["match", "--images", "images", "--clip_model", "tiny", "--device", "cpu"]
    matching += ["--rp_path", str(proposals)]
    assert main([*matching, "--count_dir", "out/counts/by_hand"]) == 0
    name = "by_hand_sam2_toy_tiny_preds_coco.json"
    written = folder / "results" / "images" / "open_ended" / "coco_preds" / name
    assert load(written) == load("out/predictions.json")
    assert main([*matching, "--counts", "counts.json", "--save_path", "mine.json"]) == 0
    assert load("mine.json") == load("out/predictions.json")
    labels = [p["label"] for p in load("mine.json")]
    assert sorted(set(labels)) == ["house", "pool", "tank"] and all(
        "category_id" not in p for p in load("mine.json")
    )


def test_run_with_a_server_goes_on_where_it_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    names = {p.relative_to("images").as_posix(): p.read_bytes() for p in Path("images").rglob("*.[pj]*g")}
    (folder / "images" / "map.tif").unlink()
    args = ["run", *TINY, "--images", "images", "--retries", "0", "--out", "out"]
    with ChatServer(names, {"one.png": ["500", "ok"]}) as server:
        args += ["--base_url", server.url]
        assert main(args) == 3
        assert "one.png: no counts: HTTP 500" in capsys.readouterr().out
        first = load("out/predictions.json")
        assert main(args) == 0
        assert server.asked == {"one.png": 2, "deep/two.jpg": 1}
        assert "Authorization" not in server.requests[0]["headers"]
        assert [p for p in load("out/predictions.json") if p["image_id"] == 1] == first
        assert main([*args, "--words", "ship"]) == 0  # another prompt: everything is asked again
        assert {p["label"] for p in load("out/predictions.json")} == {"ship"}
        assert server.asked == {"one.png": 3, "deep/two.jpg": 2}
        assert main(args) == 0  # and the first one's counts are still there
        assert server.asked.total() == 5


def test_without_any_counts_no_mask_is_proposed(folder: Path) -> None:
    with ChatServer({}, {"?": ["401"]}) as server:
        with pytest.raises(ValueError, match="no picture has counts.*401"):
            main(["run", *TINY, "--images", "images", "--base_url", server.url, "--out", "out"])
    assert not (folder / "out" / "region_proposals.json").exists()


def test_published_ways_of_writing_flags() -> None:
    args = ["--mask_proposal", "p.json", "--extra_class", "unseen_classes", "--eval_mIoU", "True"]
    assert usual_flags(EvaluateConfig, args) == [
        "--mask_proposals",
        "p.json",
        "--extra_classes",
        "unseen_classes",
        "--eval_mIoU",
    ]
    args = ["--json_output", "False", "--skip_exist", "--dataset_conf=a.json", "--words", "true", "x"]
    assert usual_flags(CountConfig, args) == [
        "--no-json_output",
        "--skip_existing",
        "--dataset_config=a.json",
        "--words",
        "true",
        "x",
    ]
    assert usual_flags(CountConfig, ["--json-output=true", "--no-draw"]) == ["--json_output", "--no-draw"]


def test_published_counting_flags_are_all_there() -> None:
    fields = set(CountConfig.__dataclass_fields__)
    published = {
        "dataset_name",
        "dataset_config",
        "base_url",
        "api_key",
        "model",
        "prompt_path",
        "json_output",
    }
    published |= {"save_dir", "skip_existing", "pretrained_model_name_or_path", "device"}
    assert published <= fields
    assert AskConfig().model == "gpt-4o-2024-11-20" and AskConfig().max_tokens == 2000


def test_faults_of_the_command_line_come_together(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        main(["run", "--images", "nowhere", "--crop_scale", "0", "--clip_model", "tiny"])
    assert len(caught.value.faults) == 4, caught.value.faults
    with pytest.raises(ValueError, match="there is no command"):
        main(["cuont"])
    with pytest.raises(ValueError, match="there are no pictures"):
        (folder / "c.json").write_text('{"three.png": {"ship": 1}}')
        main(["run", *TINY, "--images", "images", "--counts", "c.json"])
    for text in ("ship", "ship=few", "ship=-1", ","):
        with pytest.raises(ValueError, match="--counts"):
            main(["run", *TINY, "--images", "images", "--counts", text])


def test_help_is_quick_and_lists_the_commands() -> None:
    begun = time.monotonic()
    program = [sys.executable, str(REPO / "instructsam.py")]
    done = subprocess.run([*program, "run", "--help"], capture_output=True, text=True)
    seconds = time.monotonic() - begun
    assert done.returncode == 0 and "--words" in done.stdout
    done = subprocess.run([*program], capture_output=True, text=True)
    assert all(name in done.stdout for name in COMMANDS)
    check = "import sys, utils.instructsam_cli as c\n"
    check += "for x in c.COMMANDS.values(): c._find(x.config)\n"
    check += "print([m for m in ('torch', 'transformers', 'cv2', 'rasterio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert seconds < 10  # about half a second on an idle machine


def test_user_faults_end_with_one_line(folder: Path) -> None:
    program = [sys.executable, str(REPO / "instructsam.py"), "run", "--images", "images"]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "--counts" in done.stderr
