"""Cuts xView 1 scenes into the tiles that GRES annotates, with the published numbers.

The published procedure, which fixes the numbers (lisat-bair/GRES, its extraction script; sahi 0.11.20):
scenes with at least one label in `xView_train.geojson`, without 1395.tif, by number; shuffled with numpy's
seed 0; seed 7782551 draws a fifth of them *with* replacement for validation. Tiles of 512 pixels without
overlap, the last of a row or column shifted inward, are named `<scene>_<place in its
part>_<x0>_<y0>_<x1>_<y1>.jpg`; the shell lists the names of the validation part, then those of the training
part, and counts from 1. How the shell sorts depends on the user's locale: `COLLATIONS` has the orders it can
have, none of which asks the machine.

Nothing here uses the machine's locale or the order of a folder.
"""

import hashlib
import io
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.base import UNREADABLE, DataError, Fault, picture_size
from utils.io import StrPath, atomic_write_bytes, atomic_write_json, read_json

logger = logging.getLogger(__name__)

TILE, SHUFFLE_SEED, SPLIT_SEED, VAL_SHARE = 512, 0, 7782551, 0.2
LEFT_OUT = "1395.tif"
SPLITS = ("train", "val", "test")
_NAME = re.compile(r"lisat_gres_(\d{12})")

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, the far sides excluded."""


@dataclass(frozen=True)
class Tile:
    """One tile: its number, the part of the split its scene is in (`train` or `val`), scene file and box."""

    number: int
    part: str
    scene: str
    box: Box

    @property
    def name(self) -> str:
        """Name of its files without ending."""
        return tile_name(self.number)


def tile_name(number: int) -> str:
    """`lisat_gres_000000000001` for 1."""
    return f"lisat_gres_{number:012d}"


# ------------------------------------------------------------------------------------------- the numbering


def read_scene_boxes(path: StrPath) -> dict[str, np.ndarray]:
    """Labelled boxes int (n, 4) of every scene of `xView_train.geojson`, scenes in the order of their
    numbers.

    Features without `bounds_imcoords` and those of 1395.tif do not count, as published.

    Raises:
        ValueError: no such file, no feature list, or a scene whose name is no number.
    """
    features = read_json(path, dict).get("features")
    if not isinstance(features, list):
        raise ValueError(f"{path}: features: expected a list, found {repr(features)[:60]}")
    found: dict[str, list[list[int]]] = defaultdict(list)
    for number, feature in enumerate(features):
        try:
            fields = feature["properties"]
            scene, bounds = fields["image_id"], fields["bounds_imcoords"]
            if not bounds or scene == LEFT_OUT:
                continue
            box = [int(value) for value in bounds.split(",")]
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path}: features[{number}].properties: {error!r}; is it xView's file?"
            ) from error
        found[scene].append(box if len(box) == 4 else [0, 0, 0, 0])
    odd = [scene for scene in found if not Path(scene).stem.isdecimal()]
    if odd or not found:
        what = f"scene {odd[0]!r} is not named by a number" if odd else "no labelled scene is in it"
        raise ValueError(f"{path}: {what}; the published numbering needs xView_train.geojson")
    return {scene: np.array(found[scene]) for scene in sorted(found, key=lambda name: int(Path(name).stem))}


def split_scenes(scenes: Sequence[str]) -> tuple[list[str], list[str]]:
    """(training, validation) scenes in the published order, from all labelled scenes by number."""
    shuffled = list(scenes)
    np.random.RandomState(SHUFFLE_SEED).shuffle(shuffled)
    count = int(np.ceil(VAL_SHARE * len(shuffled)))
    drawn = set(np.random.RandomState(SPLIT_SEED).choice(len(shuffled), count).tolist())
    train = [scene for index, scene in enumerate(shuffled) if index not in drawn]
    return train, [shuffled[index] for index in sorted(drawn)]


def tile_boxes(height: int, width: int, size: int = TILE) -> list[Box]:
    """Boxes of a picture's tiles, row by row; the last of a row or column is shifted inward, not cut.

    A picture smaller than a tile in a direction gives tiles of its own extent there.
    """
    if min(height, width, size) < 1:
        raise ValueError(f"no tiles of {size} pixels in a picture of {width}x{height}")
    rows = [(max(0, min(y, height - size)), min(y + size, height)) for y in range(0, height, size)]
    columns = [(max(0, min(x, width - size)), min(x + size, width)) for x in range(0, width, size)]
    return [(x0, y0, x1, y1) for y0, y1 in rows for x0, x1 in columns]


def _punctuation_first(name: str) -> tuple[int, ...]:
    return tuple("_.".index(c) if c in "_." else ord(c) for c in name)


def _punctuation_ignored(name: str) -> tuple[str, tuple[int, ...]]:
    marks = tuple(place for place, c in enumerate(name) if c in "_.")
    return name.replace("_", "").replace(".", ""), marks


def _numeric(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", name))


COLLATIONS: dict[str, Callable[[str], Any]] = {
    "C": str.encode,
    "punctuation_first": _punctuation_first,
    "punctuation_ignored": _punctuation_ignored,
    "numeric": _numeric,
}
"""Orders of tile names: `C` by bytes (locale C or POSIX); `punctuation_first` as en_US.UTF-8 with glibc 2.28
or newer; `punctuation_ignored` as en_US.UTF-8 with older ones; `numeric` by the numbers in the names."""


def number_tiles(
    parts: tuple[Sequence[str], Sequence[str]],
    sizes: Mapping[str, tuple[int, int]],
    collation: str = "C",
    size: int = TILE,
) -> list[Tile]:
    """All tiles by number, from 1.

    Args:
        parts: (training, validation) scenes as `split_scenes` gives them.
        sizes: (H, W) of every scene.
        collation: one of `COLLATIONS`.
        size: side of a tile.
    """
    if collation not in COLLATIONS:
        raise ValueError(f"collation {collation!r} is unknown; choose one of {', '.join(COLLATIONS)}")
    key, tiles = COLLATIONS[collation], []
    for part, scenes in (("val", parts[1]), ("train", parts[0])):
        named = [
            (f"{Path(scene).stem}_{place}_{'_'.join(map(str, box))}.jpg", scene, box)
            for place, scene in enumerate(scenes)
            for box in tile_boxes(*sizes[scene], size)
        ]
        named.sort(key=lambda entry: key(entry[0]))
        tiles += [Tile(len(tiles) + k, part, scene, box) for k, (_, scene, box) in enumerate(named, start=1)]
    return tiles


def scene_sizes(folder: StrPath, scenes: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(H, W) of every scene from its header. ValueError lists what is absent: all later numbers hang on
    it."""
    sizes, faults = {}, []
    for scene in scenes:
        try:
            sizes[scene] = picture_size(Path(folder) / scene)
        except DataError as error:
            faults.append(str(error))
    if faults:
        shown = "\n  ".join(faults[:10])
        raise ValueError(
            f"{len(faults)} scenes cannot be used, and all later tiles' numbers depend on their sizes:\n"
            f"  {shown}\nput xView's train_images there, complete"
        )
    return sizes


def read_wanted(annotations: StrPath) -> dict[int, str]:
    """Number -> split of the tiles that GRES annotates.

    Args:
        annotations: folder with `train/`, `val/`, `test/`, each with a list file `<split>.txt` (or, without
            one, with the JSON files themselves); or the folder above a `gres_annotations`.

    Raises:
        ValueError: none of the splits is there.
    """
    from dataset.gres import read_names

    folder = Path(annotations)
    below = [folder / name for name in ("gres_annotations", "gres-annotations") if (folder / name).is_dir()]
    folder = below[0] if below else folder
    wanted: dict[int, str] = {}
    for split in SPLITS:
        place = folder / split
        names = read_names(place / f"{split}.txt") if (place / f"{split}.txt").is_file() else []
        names = names or sorted(path.stem for path in place.glob("*.json"))
        for name in names:
            match = _NAME.fullmatch(name)
            if match is None:
                logger.warning("%s: %r is no name of a GRES tile and is left out", place, name)
            elif wanted.setdefault(int(match[1]), split) != split:
                logger.warning("%s is in %s and in %s; the first counts", name, wanted[int(match[1])], split)
    if not wanted:
        raise ValueError(
            f"{folder}: no names of GRES tiles; expected {{train,val,test}}/<split>.txt or *.json"
        )
    return wanted


# ----------------------------------------------------------------------------------------------- the cutting


@dataclass(frozen=True)
class _Piece:
    """One tile to be written, and where."""

    tile: Tile
    split: str

    def path(self, out: Path) -> Path:
        """The picture's place below `out`, as in the published layout."""
        return out / "gres_images" / self.split / f"{self.tile.name}.jpg"


def cut_tiles(
    tiles: Sequence[Tile],
    wanted: Mapping[int, str] | None,
    scenes: StrPath,
    out: StrPath,
    processes: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Path, list[Fault]]:
    """Write the wanted tiles to `<out>/gres_images/<split>/` and the manifest `<out>/gres_tiles.json`.

    A run that was stopped goes on where it was: a scene is left alone if its record fits the numbering and
    its files still have their checksums. JPEG with Pillow's standard quality (75), as published.

    Args:
        tiles: from `number_tiles`.
        wanted: number -> split, from `read_wanted`; None writes all tiles, to the split `all`.
        scenes: folder of the scenes.
        processes: how many work at once; 0: one per processor.
        settings: written into the manifest.

    Returns:
        The manifest's path, and the scenes that could not be cut. The manifest holds per tile: number, name,
        split, scene, part, box, `pixels` (SHA-256 of the RGB bytes before compression) and `file` (of the
        JPEG).
    """
    from tqdm import tqdm

    out = Path(out)
    jobs: dict[str, list[_Piece]] = defaultdict(list)
    for tile in tiles:
        split = "all" if wanted is None else wanted.get(tile.number)
        if split is not None:
            jobs[tile.scene].append(_Piece(tile, split))
    absent = sorted(set(wanted or ()) - {tile.number for tile in tiles})
    faults = [
        Fault(tile_name(n), "", f"there are only {len(tiles)} tiles; scenes are missing") for n in absent
    ]
    records: list[dict[str, Any]] = []
    work = partial(_cut_scene, folder=Path(scenes), out=out)
    processes = min(processes or os.cpu_count() or 1, max(1, len(jobs)))
    logger.info("%d tiles of %d scenes, %d processes", sum(map(len, jobs.values())), len(jobs), processes)
    with ProcessPoolExecutor(processes) if processes > 1 else _Here() as pool:
        done = pool.map(work, jobs.items())
        for found in tqdm(done, total=len(jobs), desc="cutting", unit="scene", disable=None):
            if isinstance(found, Fault):
                faults.append(found)
            else:
                records += found
    records.sort(key=lambda record: record["number"])
    manifest = {"format": "gres-tiles", "version": 1, "total": len(tiles), **(settings or {})}
    return atomic_write_json(out / "gres_tiles.json", manifest | {"tiles": records}, indent=None), faults


class _Here:
    """An executor that works in this process."""

    map = staticmethod(map)

    def __enter__(self) -> "_Here":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _cut_scene(job: tuple[str, list[_Piece]], folder: Path, out: Path) -> list[dict[str, Any]] | Fault:
    """Records of a scene's tiles; a fault if the scene cannot be read."""
    scene, pieces = job
    record = out / ".gres_tiles" / f"{scene}.json"
    finished = _finished(record, pieces, out)
    if finished is not None:
        return finished
    try:
        with Image.open(folder / scene) as picture:
            if picture.mode not in ("RGB", "RGBA", "L", "P"):
                return Fault(
                    str(folder / scene), "", f"pixels are {picture.mode}; xView's scenes are 8-bit RGB"
                )
            pixels = np.asarray(picture.convert("RGB"))
    except UNREADABLE as error:
        return Fault(str(folder / scene), "", f"cannot be decoded ({error}); fetch the scene again")
    records = []
    for piece in pieces:
        x0, y0, x1, y1 = piece.tile.box
        tile = np.ascontiguousarray(pixels[y0:y1, x0:x1])
        packed = io.BytesIO()
        Image.fromarray(tile).save(packed, "JPEG")
        atomic_write_bytes(piece.path(out), packed.getvalue())
        sums = {"pixels": _digest(tile.tobytes()), "file": _digest(packed.getvalue())}
        records.append(_describe(piece) | sums)
    atomic_write_json(record, records, indent=None)
    return records


def _describe(piece: _Piece) -> dict[str, Any]:
    fields = asdict(piece.tile) | {"box": list(piece.tile.box)}
    return {"number": piece.tile.number, "name": piece.tile.name, "split": piece.split, **fields}


def _finished(record: Path, pieces: list[_Piece], out: Path) -> list[dict[str, Any]] | None:
    """The stored records of a scene if they are what is wanted and the files are intact."""
    try:
        stored = json.loads(record.read_bytes())
        same = [{k: v for k, v in r.items() if k not in ("pixels", "file")} for r in stored]
        if same != [_describe(piece) for piece in pieces]:
            return None
        intact = all(
            _digest(p.path(out).read_bytes()) == r["file"] for p, r in zip(pieces, stored, strict=True)
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return stored if intact else None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
