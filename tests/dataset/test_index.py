"""Indexes: made once, made anew when files change, never in the way."""

import json
import multiprocessing
import os
import sqlite3
from pathlib import Path

import pytest

from dataset import index as module
from dataset.base import Fault, ReadOptions
from dataset.index import FOLDER, Inputs, Listing, StoredItems, indexed
from dataset.registry import load_dataset
from tests.dataset.conftest import gres_body, picture
from tests.dataset.miniature import write_all

ITEMS = [{"n": number, "text": "caf\u00e9"} for number in range(5)]


class Reader:
    """Counts how often the data are read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reads = folder, 0
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "a.json").write_text("1")

    def build(self) -> Listing:
        self.reads += 1
        return Listing(ITEMS, {"names": ["x"]}, [Fault("f", "field", "is odd")])

    def open(self, setting: str, **settings: object) -> Listing:
        inputs = Inputs((self.folder / "data" / "a.json",), (self.folder / "data",))
        return indexed("test set|1", inputs, self.build, setting, self.folder, **settings)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path / "root")


def test_read_once(reader: Reader, tmp_path: Path) -> None:
    for _ in range(3):
        listing = reader.open(str(tmp_path / "indexes"))
        assert list(listing.items) == ITEMS and listing.items[1:3] == ITEMS[1:3]
        assert listing.facts == {"names": ["x"]} and listing.faults == [Fault("f", "field", "is odd")]
    assert reader.reads == 1 and isinstance(listing.items, StoredItems)
    with pytest.raises(IndexError):
        listing.items[5]
    reader.open(str(tmp_path / "indexes"), split="other")
    assert reader.reads == 2
    reader.open("off")
    assert reader.reads == 3 and not (reader.folder / FOLDER).exists()


def test_any_change_of_the_files_counts(reader: Reader, tmp_path: Path) -> None:
    place, file = str(tmp_path / "indexes"), reader.folder / "data" / "a.json"
    status = file.stat()
    changes = [
        lambda: file.write_text("22"),
        lambda: os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1000)),
        lambda: (reader.folder / "data" / "b.json").write_text(""),
        lambda: (reader.folder / "data" / "b.json").rename(reader.folder / "data" / "c.json"),
        lambda: (reader.folder / "data" / "c.json").unlink(),
    ]
    reader.open(place)
    for number, change in enumerate(changes, start=2):
        change()
        reader.open(place)
        reader.open(place)
        assert reader.reads == number
    assert len(list(Path(place).glob("*.sqlite"))) == 1


def test_small_splits_get_none_by_default(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    reader.open("auto")
    assert not (reader.folder / FOLDER).exists()
    monkeypatch.setattr(module, "_WORTH_FILES", 1)
    reader.open("auto")
    reader.open("auto")
    assert reader.reads == 2 and (reader.folder / FOLDER).is_dir()


def test_damaged_and_unwritable(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "indexes"
    stale = reader.open(str(place)).items
    (path,) = place.glob("*.sqlite")
    path.write_bytes(b"not a database" * 100)
    assert list(reader.open(str(place)).items) == ITEMS and "is damaged" in caplog.text
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE items SET body = 'x' WHERE place = 2")
    with pytest.raises(ValueError, match="is damaged .* delete it"):
        StoredItems(path, len(stale))[2]
    (tmp_path / "file").write_text("")
    assert (
        list(reader.open(str(tmp_path / "file" / "below")).items) == ITEMS
        and "no index can be kept" in caplog.text
    )
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    monkeypatch.setattr(module, "_WORTH_FILES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    reader.open("auto")
    assert list((tmp_path / "cache" / "lisat" / "index").glob("*.sqlite"))


def _sum(items: StoredItems, queue: "multiprocessing.Queue[int]") -> None:
    queue.put(sum(item["n"] for item in items))


def test_forked_workers_open_the_file_themselves(reader: Reader, tmp_path: Path) -> None:
    items = reader.open(str(tmp_path)).items
    assert items[4]["n"] == 4  # opened here before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_sum, args=(items, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=30) for _ in workers] == [10, 10]
    for worker in workers:
        worker.join()


def test_every_family_is_the_same_from_its_index(tmp_path: Path) -> None:
    root = write_all(tmp_path / "data")
    bad = {"text": [3], "is_sentence": True, "shapes": []}
    (root / "reason_seg/GeoReasonSeg/train/bad.json").write_text(json.dumps(bad))
    specs = ["GeoReasonSeg|train", "ReasonSeg|train", "refcoco|train", "pascal_part|train", "paco_lvis|train"]
    specs += ["vqa:llava_instruct_150k", "RRSIS-D|test", "EarthReason|train", "RefSegRS|train"]
    for spec in specs:
        sources = ["off", str(tmp_path / "i"), str(tmp_path / "i")]
        plain, made, read = (load_dataset(spec, root, ReadOptions(index=source)) for source in sources)
        assert len(plain) == len(made) == len(read) and plain.faults == made.faults == read.faults
        for epoch in range(3):
            texts = [[c.turns for c in data.draw(0, epoch).conversations] for data in (plain, made, read)]
            masks = [
                [c.masks.tolist() for c in data.draw(0, epoch).conversations] for data in (plain, made, read)
            ]
            assert texts[0] == texts[1] == texts[2] and masks[0] == masks[1] == masks[2]
    assert len(list((tmp_path / "i").glob("*.sqlite"))) == len(specs)


def test_new_pictures_of_gres_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "reason_seg/GeoReasonSeg/train"
    options = ReadOptions(index=str(tmp_path / "i"))
    for count, stem in enumerate("ab", start=1):
        picture(folder / f"{stem}.jpg")
        (folder / f"{stem}.json").write_text(json.dumps(gres_body(f"{stem}.jpg")))
        assert len(load_dataset("GeoReasonSeg|train", tmp_path, options)) == count
