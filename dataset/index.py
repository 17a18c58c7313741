"""Indexes: what a reader found in a split, stored once, so that the next start takes a second.

An index is one SQLite file: the items of a split (JSON values, fetched one by one), the faults, and the
fingerprint of the files it was made from (names, sizes, times of change). As soon as any of them changes, it
is made anew. Deleting an index does no harm; `off` reads the data themselves every time.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.base import Fault
from utils.io import StrPath, share_file

logger = logging.getLogger(__name__)

VERSION = 1
"""Goes up whenever readers store their items differently."""
FOLDER = ".lisat_index"
_WORTH_FILES, _WORTH_BYTES = 1000, 20_000_000
"""From this many input files, or bytes of annotations, on `auto` writes an index."""


@dataclass(frozen=True)
class Inputs:
    """Files that the items of a split depend on.

    files: annotation files. folders: every file in them counts with its size and time. listed: folders of
    which only the names of files count (many pictures).
    """

    files: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()
    listed: tuple[Path, ...] = ()

    def fingerprint(self) -> tuple[str, bool]:
        """Digest of names, sizes and times; and whether there is so much that an index is worth while."""
        digest, count, size = hashlib.sha256(), 0, 0

        def note(path: str, status: os.stat_result | None) -> None:
            facts = (path, status.st_size, status.st_mtime_ns) if status else (path,)
            digest.update(repr(facts).encode("utf-8", "surrogateescape"))

        for path in self.files:
            status = path.stat() if path.is_file() else None
            note(str(path), status)
            size += status.st_size if status else 0
        for folder, with_status in [*((f, True) for f in self.folders), *((f, False) for f in self.listed)]:
            for entry in sorted(_entries(folder), key=lambda entry: entry.name):
                note(entry.path, entry.stat() if with_status else None)
                count += with_status
        return digest.hexdigest(), count >= _WORTH_FILES or size >= _WORTH_BYTES


@dataclass
class Listing:
    """What a reader found: items, facts about all of them (JSON values), and faults of what is unusable."""

    items: Sequence[Any]
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


class StoredItems(Sequence[Any]):
    """Items of an index file, read one at a time; every process opens the file for itself.

    `decode` makes an item from its JSON value.
    """

    def __init__(self, path: Path, length: int, decode: Callable[[Any], Any] | None = None) -> None:
        self.path, self.length, self.decode = path, length, decode
        self._connection: sqlite3.Connection | None = None
        self._owner = -1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: Any) -> Any:
        """Item `place`; ValueError where the file was damaged meanwhile."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self.length))]
        if not 0 <= place < self.length:
            raise IndexError(f"{self.path} has {self.length} items, asked for number {place}")
        try:
            row = self._open().execute("SELECT body FROM items WHERE place = ?", (int(place),)).fetchone()
            value = json.loads(row[0])
        except (sqlite3.Error, TypeError, ValueError) as error:
            raise ValueError(f"index {self.path} is damaged ({error}); delete it and start again") from error
        return value if self.decode is None else self.decode(value)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_connection": None, "_owner": -1}

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._owner != os.getpid():  # a connection must not cross a fork
            self._connection, self._owner = _connect(self.path), os.getpid()
        return self._connection


class Chosen(Sequence[Any]):
    """Some items of one or several listings, fetched when they are asked for."""

    def __init__(self) -> None:
        self._places: list[tuple[Sequence[Any], int]] = []

    def add(self, items: Sequence[Any], places: Sequence[int]) -> None:
        """Append the items at these places."""
        self._places += [(items, place) for place in places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        """Item `number` of the chosen ones."""
        if isinstance(number, slice):
            return [items[place] for items, place in self._places[number]]
        items, place = self._places[number]
        return items[place]


def indexed(
    reader: str,
    inputs: Inputs,
    build: Callable[[], Listing],
    setting: str,
    root: StrPath,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> Listing:
    """The listing that `build` makes, from its index where a fitting one is there.

    Args:
        reader: name of the reader, part of the file's name.
        inputs: what the listing depends on.
        build: reads the data.
        setting: `auto` (index large splits: in `<root>/.lisat_index`, or in the user's cache folder where
            that cannot be written), `off`, or a folder that takes indexes of any size.
        root: the data folder.
        encode, decode: turn an item into a JSON value and back; None where it is one.
        settings: what else the listing depends on (JSON values).
    """
    if setting == "off":
        return build()
    fingerprint, worth = inputs.fingerprint()
    if setting == "auto" and not worth:
        return build()
    fingerprint = f"{VERSION}:{fingerprint}"
    path = _place(reader, inputs, setting, Path(root), settings)
    if (stored := _read(path, fingerprint, decode)) is not None:
        return stored
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if (stored := _read(path, fingerprint, decode)) is not None:  # another process made it meanwhile
                return stored
            logger.info("%s: reading %s once; the index %s makes later starts fast", reader, root, path)
            listing = build()
            _write(path, fingerprint, listing, encode)
    except OSError as error:
        logger.warning("no index can be kept at %s (%s); the data are read as they are", path, error)
        return build()
    return _read(path, fingerprint, decode) or listing


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name != FOLDER and entry.is_file()]
    except OSError:
        return []


def _place(reader: str, inputs: Inputs, setting: str, root: Path, settings: dict[str, Any]) -> Path:
    if setting != "auto":
        folder = Path(setting)
    elif os.access(root, os.W_OK):
        folder = root / FOLDER
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lisat" / "index"
    paths = [str(path.resolve()) for path in (*inputs.files, *inputs.folders, *inputs.listed)]
    key = hashlib.sha256(repr((paths, sorted(settings.items()))).encode()).hexdigest()[:16]
    name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in reader)
    return folder / f"{name}-{key}.sqlite"


def _connect(path: Path) -> sqlite3.Connection:
    uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    return sqlite3.connect(uri, uri=True, check_same_thread=False)


def _read(path: Path, fingerprint: str, decode: Callable[[Any], Any] | None) -> Listing | None:
    """The listing in an index file; None if it is not there, damaged, or of other data."""
    if not path.is_file():
        return None
    try:
        with contextlib.closing(_connect(path)) as connection:
            head = dict(connection.execute("SELECT name, value FROM head"))
            if head["fingerprint"] != fingerprint:
                logger.info("index %s is of older data and will be made anew", path)
                return None
            faults = [Fault(*fault) for fault in json.loads(head["faults"])]
            items = StoredItems(path, int(head["length"]), decode)
            return Listing(items, json.loads(head["facts"]), faults)
    except (sqlite3.Error, KeyError, ValueError, TypeError) as error:
        logger.warning("index %s is damaged (%s) and will be made anew", path, error)
        return None


def _write(path: Path, fingerprint: str, listing: Listing, encode: Callable[[Any], Any] | None) -> None:
    """Write an index beside its place and rename it."""
    handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        with contextlib.closing(sqlite3.connect(beside)) as connection:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("CREATE TABLE items (place INTEGER PRIMARY KEY, body TEXT)")
            connection.execute("CREATE TABLE head (name TEXT PRIMARY KEY, value TEXT)")
            values = listing.items if encode is None else map(encode, listing.items)
            rows = ((place, _dump(value)) for place, value in enumerate(values))
            connection.executemany("INSERT INTO items VALUES (?, ?)", rows)
            faults = [(fault.file, fault.field, fault.message) for fault in listing.faults]
            head = {"fingerprint": fingerprint, "length": str(len(listing.items))}
            head |= {"facts": _dump(listing.facts), "faults": _dump(faults)}
            connection.executemany("INSERT INTO head VALUES (?, ?)", head.items())
            connection.commit()
        share_file(beside)
        os.replace(beside, path)
    except sqlite3.Error as error:
        raise OSError(f"SQLite: {error}") from error
    finally:
        Path(beside).unlink(missing_ok=True)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process builds, the others wait; without locks on this file system all of them build."""
    with open(path.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.debug("no lock at %s: %s", path, error)
        yield
