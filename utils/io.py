"""Files on disk: atomic writes of texts, bytes, JSON and whole folders, and JSON reading with clear errors.

Everything is written beside its final place, flushed to the disk and renamed, so that a reader (or a run
that was killed) sees the old content or the new one and never a part of it.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

StrPath = str | os.PathLike[str]


def fsync_path(path: StrPath) -> None:
    """Flush a file, or a folder's entries, to the disk (nothing where folders cannot be synced)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not Path(path).is_dir():
            raise
    finally:
        os.close(descriptor)


def atomic_write_bytes(path: StrPath, data: bytes) -> Path:
    """Replace `path` by `data` in one step; parent folders are made. Returns the path."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.is_dir():
        raise ValueError(f"{final} is a folder; a file is to be written there: choose another name")
    descriptor, beside = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        share_file(beside)
        os.replace(beside, final)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    fsync_path(final.parent)
    return final


def atomic_write_text(path: StrPath, text: str) -> Path:
    """Replace `path` by `text` (UTF-8) in one step; parent folders are made. Returns the path."""
    return atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: StrPath, value: Any, indent: int | None = 2) -> Path:
    """Replace `path` by `value` as JSON in one step. NaN and infinities are refused (ValueError)."""
    return atomic_write_text(path, to_json(value, indent) + "\n")


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON text of `value` with non-ASCII letters kept; ValueError for NaN, infinities and unknown types."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(f"this value cannot be written as JSON: {error}") from error


@contextlib.contextmanager
def atomic_dir(final: StrPath, overwrite: bool = True) -> Iterator[Path]:
    """Write a whole folder beside `final` and put it in its place when the block ends without an error.

    Yields the folder to write into. At the end all its files are flushed to the disk, an older `final` is
    moved aside, the new one renamed to `final`, and only then the older one removed. If the block raises,
    nothing at `final` has changed.

    Args:
        final: path of the folder to make; parents are made.
        overwrite: False refuses (ValueError) a `final` that exists and is not an empty folder.
    """
    final = Path(final)
    if final.is_file():
        raise ValueError(f"{final} is a file; a folder is to be written there: choose another name")
    if not overwrite and final.is_dir() and any(final.iterdir()):
        raise ValueError(f"{final} exists and is not empty; remove it or choose another name")
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".partial", dir=final.parent))
    try:
        beside.chmod(0o777 & ~_umask())
        yield beside
        _fsync_tree(beside)
        _swap_in(beside, final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def parse_json(text: str | bytes) -> Any:
    """Value of a JSON text whose objects name every field once.

    Raises:
        ValueError: not JSON (json.JSONDecodeError with the place), a field that is there twice, a number of
            thousands of digits, endless nesting.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"nested too deeply ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the field {next(name for name in names if names.count(name) > 1)!r} is there twice"
        )
    return value


def read_json(path: StrPath, kind: type | tuple[type, ...] | None = None) -> Any:
    """Value of a JSON file (UTF-8, a byte-order mark is accepted).

    Args:
        path: the file.
        kind: expected type(s) of the top level, for example `dict`.

    Raises:
        ValueError: no such file, not UTF-8, not JSON (with line and column), a field that is there twice, or
            another type at the top.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder is there" if path.is_dir() else "nothing is there"
        raise ValueError(f"{path}: a JSON file was expected, {found}")
    try:
        value = parse_json(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: not valid JSON at {where}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; store it as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{path}: not usable JSON: {error}") from error
    if kind is not None and not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"{path}: expected {expected} at the top level, found {type(value).__name__}")
    return value


def read_jsonl(path: StrPath) -> list[Any]:
    """Values of a file with one JSON value per line; empty lines are skipped. ValueError names the line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: a JSON-lines file was expected, nothing is there")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}; store it as UTF-8") from error
    values = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
    return values


def is_text(value: Any, empty: bool = False) -> bool:
    """Whether a JSON value is a text that files can hold: not blank (unless `empty`), no half characters."""
    if not isinstance(value, str) or not (empty or value.strip()):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_there(path: StrPath) -> bool:
    """Whether a file is there; False as well for names that no file can have (too long, a zero byte)."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _swap_in(beside: Path, final: Path) -> None:
    """Rename `beside` to `final`; an older `final` is kept until the new one stands."""
    older = None
    if final.exists():
        older = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
        os.rename(final, older / "content")
    try:
        os.rename(beside, final)
    except OSError:
        if older is not None:
            os.rename(older / "content", final)
        raise
    fsync_path(final.parent)
    if older is not None:
        shutil.rmtree(older, ignore_errors=True)


def _fsync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(root) / name)
        fsync_path(root)


def share_file(path: StrPath) -> None:
    """Give a file the permissions that a plainly opened one gets (some writers make private files)."""
    os.chmod(path, 0o666 & ~_umask())


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
