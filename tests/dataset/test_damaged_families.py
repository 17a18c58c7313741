"""Damaged annotation files of every family: a named error or a reported skip, never anything else."""

import json
import logging
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from dataset.base import ReadOptions
from dataset.registry import load_dataset
from tests.dataset.miniature import write_all
from utils.safe_pickle import parse_plain_pickle

FILES = {
    "refer_seg/refcoco/instances.json": "refcoco|train",
    "refer_seg/fprefcoco/refs(berkeley_exclude_unified).p": "fprefcoco|train",
    "rs_ref_seg/RIS-LAD/ris_lad/refs(unc).json": "RIS-LAD|train",
    "vlpart/pascal_part/train.json": "pascal_part|train",
    "mapillary/config_v2.0.json": "mapillary|train",
    "llava_dataset/llava_instruct_150k.json": "vqa:llava_instruct_150k",
    "rs_reason_seg/RSReasonSeg/train/QAs/e1.json": "EarthReason|train",
    "rs_ref_seg/RefSegRS/output_phrase_train.txt": "RefSegRS|train",
}
ODD = (
    None,
    True,
    -1,
    0,
    1e308,
    -1e9,
    10**30,
    "",
    "\ud800",
    "x" * 3000,
    [],
    {},
    [[]],
    [None],
    "../../x",
    "\0",
)
ODD += ({"size": [1, 1], "counts": "x"}, [[1e5] * 6], 2**40, [[float("inf")] * 6], float("nan"))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, inner in items for place in places(inner, (*path, key))]


def damaged(path: Path, content: bytes, rng: random.Random) -> bytes:
    """One field removed or replaced by something odd, or some bytes changed, or the end cut off."""
    if path.suffix != ".txt" and rng.random() < 0.7:
        value = parse_plain_pickle(content, path.name) if path.suffix == ".p" else json.loads(content)
        *way, last = rng.choice(places(value))
        inner = value
        for key in way:
            inner = inner[key]
        if rng.random() < 0.2:
            del inner[last]
        else:
            inner[last] = rng.choice(ODD)
        return pickle.dumps(value, 2) if path.suffix == ".p" and "\ud800" not in repr(value) else _json(value)
    changed = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.choice((None, rng.randrange(len(changed))))])


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("name", FILES)
def test_damage_is_reported(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, rng = write_all(tmp_path), random.Random(name)
    path = root / name
    content = path.read_bytes()
    caplog.set_level(logging.WARNING)
    errors = skips = 0
    for _ in range(40):
        path.write_bytes(damaged(path, content, rng))
        caplog.clear()
        try:
            data = load_dataset(FILES[name], root, ReadOptions(index="off", templates="tiny"))
            for index in range(len(data)):
                assert data[index].conversations
        except ValueError as error:
            assert len(str(error)) > 10
            errors += 1
        else:
            skips += bool(caplog.records)
    assert errors + skips >= 5
