"""xView tiles: the published split, orders of names, cutting, resuming, checks that find wrong numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset.gres import SplitFolders, read_split
from dataset.tile_check import fit_edges
from dataset.tile_job import TileConfig, run
from dataset.tiles import (
    COLLATIONS,
    cut_tiles,
    number_tiles,
    read_scene_boxes,
    read_wanted,
    split_scenes,
    tile_boxes,
    tile_name,
)
from tests.conftest import REPO, golden_root


def test_split_is_the_published_draw() -> None:
    """Word for word what the published program does with numpy's global generator."""
    scenes = [f"{k}.tif" for k in range(5, 846)]
    np.random.seed(0)
    order = list(scenes)
    np.random.shuffle(order)
    np.random.seed(7782551)
    drawn = set(np.random.choice(range(len(order)), int(np.ceil(0.2 * len(order)))))
    train, val = split_scenes(scenes)
    assert val == [s for k, s in enumerate(order) if k in drawn]
    assert train == [s for k, s in enumerate(order) if k not in drawn]
    assert len(val) < 0.2 * len(scenes) and sorted(train + val) == sorted(scenes)  # with replacement


def test_boxes_cover_and_have_full_size() -> None:
    assert tile_boxes(600, 1024) == [
        (0, 0, 512, 512), (512, 0, 1024, 512), (0, 88, 512, 600), (512, 88, 1024, 600)
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    for height, width, size in rng.integers(1, 90, (40, 3)).tolist():
        covered = np.zeros((height, width), int)
        boxes = tile_boxes(height, width, size)
        for x0, y0, x1, y1 in boxes:
            assert (x1 - x0, y1 - y0) == (min(size, width), min(size, height)) and min(x0, y0) >= 0
            covered[y0:y1, x0:x1] += 1
        assert covered.min() == 1 and len(boxes) == -(-height // size) * -(-width // size) == len(set(boxes))
    with pytest.raises(ValueError, match="no tiles"):
        tile_boxes(0, 5)


def test_orders_of_names(tmp_path: Path) -> None:
    names = [f"{scene}_{k}_{x}_{y}_{x + 512}_{y + 512}.jpg" for scene in (5, 10, 100, 1000, 1012)
             for k, x, y in ((1, 0, 0), (12, 512, 0), (3, 1024, 2048), (120, 88, 512))]  # fmt: skip
    orders = {name: sorted(names, key=key) for name, key in COLLATIONS.items()}
    assert len({tuple(order) for order in orders.values()}) == 4
    for name in names:
        (tmp_path / name).touch()
    listed = subprocess.run(["ls"], cwd=tmp_path, env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
                            capture_output=True, text=True, check=True)  # fmt: skip
    assert listed.stdout.split() == orders["C"]
    assert sorted(["100_0", "1000_0"], key=COLLATIONS["C"]) == ["1000_0", "100_0"]
    assert sorted(["1000_0", "100_0"], key=COLLATIONS["punctuation_first"]) == ["100_0", "1000_0"]
    assert sorted(["11_4", "1_15"], key=COLLATIONS["punctuation_ignored"]) == ["11_4", "1_15"]
    assert sorted(["11_4", "1_15"], key=COLLATIONS["numeric"]) == ["1_15", "11_4"]
    installed = (
        subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout.lower().split()
    )
    if "en_us.utf8" in installed:
        env = {"LC_ALL": "en_US.UTF-8", "PATH": os.environ["PATH"]}
        listed = subprocess.run(["ls"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        assert listed.stdout.split() in (orders["punctuation_first"], orders["punctuation_ignored"])


# --------------------------------------------------------------------------------------- a small xView

SIZES = {"7.tif": (1100, 700), "45.tif": (512, 1300), "100.tif": (900, 900), "1000.tif": (600, 1024)}
SIZES |= {"102.tif": (1024, 512), "2000.tif": (530, 530), "31.tif": (512, 512), "9.tif": (700, 1500)}


def scene(height: int, width: int, seed: int) -> tuple[np.ndarray, list[list[int]]]:
    """A picture of plain ground with about one bright block per tile, and the blocks' boxes."""
    rng = np.random.default_rng(seed)
    picture = np.repeat(rng.integers(60, 90, (height, width, 1)), 3, axis=2).astype(np.uint8)
    boxes = []
    for x0, y0, x1, y1 in tile_boxes(height, width):
        w, h = rng.integers(30, 140, 2)
        x, y = rng.integers(x0 + 5, x1 - w - 5), rng.integers(y0 + 5, y1 - h - 5)
        picture[y : y + h, x : x + w] = rng.integers(120, 255, 3)
        boxes.append([int(v) for v in (x, y, x + w, y + h)])
    return picture, boxes


@pytest.fixture(scope="module")
def xview(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes, their geojson, and GRES annotations that were numbered in the order of bytes."""
    root = tmp_path_factory.mktemp("xview")
    (root / "train_images").mkdir()
    features = []
    for seed, (name, size) in enumerate(SIZES.items()):
        picture, boxes = scene(*size, seed)
        Image.fromarray(picture).save(root / "train_images" / name)
        features += [
            {"properties": {"image_id": name, "bounds_imcoords": ",".join(map(str, b))}} for b in boxes
        ]
    features += [{"properties": {"image_id": "1395.tif", "bounds_imcoords": "1,2,3,4"}},
                 {"properties": {"image_id": "4000.tif", "bounds_imcoords": ""}}]  # fmt: skip
    (root / "xView_train.geojson").write_text(json.dumps({"features": features}))
    boxes = read_scene_boxes(root / "xView_train.geojson")
    tiles = number_tiles(split_scenes(list(boxes)), SIZES)
    names = {split: [] for split in ("train", "val", "test")}
    for tile in tiles:
        inside = boxes[tile.scene] - [tile.box[0], tile.box[1]] * 2
        inside = inside[(inside >= 0).all(1) & (inside <= 512).all(1)]
        if not len(inside):
            continue
        x0, y0, x1, y1 = inside[0].tolist()
        points = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        shape = {"label": "target", "points": points, "image_name": f"{tile.name}.jpg"}
        split = ("train", "train", "val", "test")[tile.number % 4]
        folder = root / "gres_annotations" / split
        folder.mkdir(parents=True, exist_ok=True)
        body = {"text": ["find the block"], "is_sentence": True, "shapes": [shape]}
        (folder / f"{tile.name}.json").write_text(json.dumps(body))
        names[split] += [tile.name] * 2
    for split, listed in names.items():
        (root / "gres_annotations" / split / f"{split}.txt").write_text("\n".join(listed))
    return root


def config(xview: Path, out: Path, **values: object) -> TileConfig:
    given = {"scenes": xview / "train_images", "geojson": xview / "xView_train.geojson"}
    given |= {"annotations": xview / "gres_annotations", "out": out}
    return TileConfig(**({name: str(path) for name, path in given.items()} | {"processes": 1} | values))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_tiles_numbers_manifest_and_resuming(xview: Path, tmp_path: Path) -> None:
    lines, ok = run(config(xview, tmp_path / "a"))
    assert ok, lines
    assert any("fits" in line and "standard errors" in line for line in lines)
    manifest = json.loads((tmp_path / "a" / "gres_tiles.json").read_text())
    assert manifest["collation"] == "C" and manifest["scenes"] == len(SIZES)
    wanted = read_wanted(xview)
    assert {entry["number"]: entry["split"] for entry in manifest["tiles"]} == wanted
    for entry in manifest["tiles"]:
        x0, y0, x1, y1 = entry["box"]
        whole = np.asarray(Image.open(xview / "train_images" / entry["scene"]))
        tile = cv2.imread(str(tmp_path / "a" / "gres_images" / entry["split"] / f"{entry['name']}.jpg"))[
            ..., ::-1
        ]
        assert tile.shape == (512, 512, 3)
        assert np.abs(tile.astype(int) - whole[y0:y1, x0:x1]).mean() < 6  # JPEG
    # two processes in another locale: the same bytes
    env = os.environ | {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    flags = [
        f"--{k}={v}"
        for k, v in vars(config(xview, tmp_path / "b", processes=2)).items()
        if v not in (False, True)
    ]
    command = [sys.executable, str(REPO / "scripts" / "tile_xview.py"), *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    # damaged, removed and untouched files
    files = sorted((tmp_path / "b" / "gres_images").rglob("*.jpg"))
    files[0].write_bytes(b"damaged"), files[-1].unlink()
    cut_again = {scene_of(manifest, files[0]), scene_of(manifest, files[-1])}
    kept = [file for file in files[1:-1] if scene_of(manifest, file) not in cut_again]
    before = {f: f.stat().st_mtime_ns for f in kept}
    assert kept and run(config(xview, tmp_path / "b"))[1]
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert {f: f.stat().st_mtime_ns for f in kept} == before


def scene_of(manifest: dict, file: Path) -> str:
    return next(entry["scene"] for entry in manifest["tiles"] if entry["name"] == file.stem)


def test_wrong_order_of_names_is_refused_and_found(xview: Path, tmp_path: Path) -> None:
    lines, ok = run(config(xview, tmp_path, collation="numeric"))
    assert not ok and not list(tmp_path.rglob("*.jpg"))
    assert any("WRONG NUMBERING" in line and "--collation C" in line for line in lines)
    lines, ok = run(config(xview, tmp_path, collation="auto", dry_run=True))
    assert ok and "order C" in lines[0] and not list(tmp_path.iterdir())
    _, ok = run(config(xview, tmp_path, collation="numeric", force=True))  # now the pictures tell
    assert not ok
    lines, ok = run(TileConfig(annotations=str(xview / "gres_annotations"), out=str(tmp_path)))
    assert not ok and any("DOES NOT FIT" in line for line in lines), lines


def test_numbers_that_go_wrong_midway_are_found(xview: Path, tmp_path: Path) -> None:
    """Shift the pictures of the second half by one: the whole still looks good, its blocks do not."""
    rng = np.random.default_rng(0)
    for k in range(160):
        picture = np.full((64, 64, 3), 90, np.uint8) + rng.integers(0, 12, (64, 64, 3), np.uint8)
        x, y, w, h = (*rng.integers(2, 30, 2), *rng.integers(12, 30, 2))
        picture[y : y + h, x : x + w] += 90
        Image.fromarray(picture).save(tmp_path / f"{k:04d}.png")
        points = [[int(v) for v in p] for p in ((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y))]
        body = {"text": ["it"], "is_sentence": True, "shapes": [{"label": "target", "points": points}]}
        (tmp_path / f"{k:04d}.json").write_text(json.dumps(body))
    good, faults = fit_edges(read_split(SplitFolders(tmp_path, tmp_path))[0])
    assert good.fits and not faults and good.wins > 0.9
    for k in range(80, 159):
        os.replace(tmp_path / f"{k + 1:04d}.png", tmp_path / f"{k:04d}.png")
    (tmp_path / "0159.json").unlink()
    bad, _ = fit_edges(read_split(SplitFolders(tmp_path, tmp_path))[0])
    assert bad.sigma > 4 and not bad.fits
    assert bad.doubtful[-1][1] == "0158" and "0158" in "\n".join(bad.lines())


def test_real_pictures_and_masks() -> None:
    """Outlines of real land cover lie on real edges; those of other pictures do not."""
    folder = golden_root().parent / "data" / "dubai"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    from dataset.gres import Annotation, Entry
    from dataset.masks import Shape
    from utils.geo import mask_polygons

    entries = []
    for path in sorted((folder / "images").glob("*.jpg"))[:27]:
        mask = cv2.imread(str(folder / "masks" / f"{path.stem}.png"), cv2.IMREAD_UNCHANGED) == 0  # buildings
        rings = [
            np.array([*ring, ring[0]], float) for polygon in mask_polygons(mask)[:40] for ring in polygon
        ]
        if rings:
            annotation = Annotation(("it",), True, (Shape("target", np.concatenate(rings)),))
            entries.append(Entry(path.with_suffix(".json"), path, annotation, mask.shape))
    right, _ = fit_edges(entries)
    moved = []
    for size in {entry.size for entry in entries}:
        group = [entry for entry in entries if entry.size == size]
        moved += [Entry(e.json_path, o.image_path, e.annotation, size) for e, o in zip(group, group[1:])]
    wrong, _ = fit_edges(moved)
    assert wrong.pictures > 10
    assert right.wins > 0.8 and right.sigma > 4 and not wrong.fits


def test_faults(xview: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 scenes cannot be used"):
        features = {"features": [{"properties": {"image_id": "8.tif", "bounds_imcoords": "0,0,1,1"}}]}
        (tmp_path / "x.geojson").write_text(json.dumps(features))
        run(config(xview, tmp_path / "out", geojson=str(tmp_path / "x.geojson")))
    with pytest.raises(ValueError, match="named by a number"):
        (tmp_path / "x.geojson").write_text(json.dumps(features).replace("8.tif", "port.tif"))
        read_scene_boxes(tmp_path / "x.geojson")
    with pytest.raises(ValueError, match=r"features\[0\]"):
        (tmp_path / "x.geojson").write_text('{"features": [{"properties": {}}]}')
        read_scene_boxes(tmp_path / "x.geojson")
    with pytest.raises(ValueError, match="no names"):
        read_wanted(tmp_path)
    assert "--geojson" in TileConfig(scenes=str(tmp_path)).validate()[0]
    # one damaged scene and one number beyond the last tile: reported, the rest is cut
    tiles = number_tiles((["1.tif"], ["2.tif"]), {"1.tif": (512, 512), "2.tif": (512, 600)})
    Image.new("RGB", (512, 512)).save(tmp_path / "1.tif")
    (tmp_path / "2.tif").write_bytes(b"II*\0damaged")
    _, faults = cut_tiles(tiles, {1: "train", 3: "val", 9: "test"}, tmp_path, tmp_path / "out", 1)
    assert [tile_name(9) in str(faults[0]), "2.tif" in str(faults[1])] == [True, True] and len(faults) == 2
    assert [p.stem for p in (tmp_path / "out").rglob("*.jpg")] == [tile_name(3)]
