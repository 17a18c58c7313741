"""Reads pickles of plain data (lists, dicts, sets, texts, numbers) without running anything in them.

A pickle is a program: the standard reader calls whatever functions the file names. Some published data sets
are pickles all the same (`refs(unc).p`). This reader knows only the instructions that build plain values, and
four names: numpy's scalars (turned into Python's numbers by arithmetic of our own), sets, and the helper with
which old protocols write bytes.
"""

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.io import StrPath

_FORBIDDEN = ("EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX")
_FORBIDDEN += ("NEXT_BUFFER", "READONLY_BUFFER", "BYTEARRAY8")
_BROKEN = (
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    RecursionError,
    AssertionError,
)
"""What the reader raises on damaged files."""


def load_plain_pickle(path: StrPath) -> Any:
    """Value of a pickle file that holds plain data only.

    Texts of Python 2 pickles are read as UTF-8, else as Latin-1. Numpy scalars become int, float or bool.

    Raises:
        ValueError: no such file, damaged, or it names anything but plain data (never called or imported).
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_plain_pickle(data, str(path))


def parse_plain_pickle(data: bytes, source: str) -> Any:
    """Value of the bytes of a pickle; `source` names it in errors (see `load_plain_pickle`)."""
    for encoding in ("utf-8", "latin-1"):
        try:
            return _PlainReader(io.BytesIO(data), encoding=encoding).load()
        except UnicodeDecodeError as error:
            fault: Exception = error
        except _Refused as error:
            raise ValueError(
                f"{source}: {error}; only plain lists, dicts, texts and numbers are read"
            ) from None
        except _BROKEN as error:
            raise ValueError(f"{source}: not a readable pickle ({type(error).__name__}: {error})") from error
    raise ValueError(f"{source}: texts of the pickle cannot be decoded ({fault})") from fault


class _Refused(Exception):
    """The pickle wants more than plain data."""


class _NumpyType:
    """Stands for `numpy.dtype` of a number: 'i8' -> 8-byte integer. Byte order comes with its state."""

    def __init__(self, code: Any) -> None:
        code = code.decode("ascii") if isinstance(code, bytes) else code
        if not isinstance(code, str) or code not in (
            "b1",
            *(k + n for k in "iu" for n in "1248"),
            "f4",
            "f8",
        ):
            raise _Refused(f"a numpy value of type {code!r} is not a number")
        self.code, self.order = code, "<"

    def number(self, data: Any) -> int | float | bool:
        """The number in its bytes."""
        raw = data.encode("latin-1") if isinstance(data, str) else data
        if not isinstance(raw, bytes) or len(raw) != int(self.code[1]):
            raise ValueError(f"a numpy number of {self.code[1]} bytes was expected")
        if self.code[0] == "f":
            return struct.unpack(self.order + {"4": "f", "8": "d"}[self.code[1]], raw)[0]
        value = int.from_bytes(raw, "big" if self.order == ">" else "little", signed=self.code[0] == "i")
        return bool(value) if self.code == "b1" else value


def _dtype(code: Any, *_: Any) -> _NumpyType:
    return _NumpyType(code)


def _scalar(kind: Any, data: Any = b"") -> int | float | bool:
    if not isinstance(kind, _NumpyType):
        raise _Refused("a numpy scalar of an unknown type")
    return kind.number(data)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused("an unknown way to write bytes")
    return text.encode("latin-1")


def _as_set(items: Any = ()) -> set[Any]:
    return set(items)


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): _as_set,
    ("builtins", "frozenset"): _as_set,
    ("__builtin__", "set"): _as_set,
    ("__builtin__", "frozenset"): _as_set,
}


class _PlainReader(pickle._Unpickler):  # the Python one: its table of instructions can be cut down
    """Instructions for plain values only; `_KNOWN` is all that can be named or called."""

    dispatch = {
        code: handler
        for code, handler in pickle._Unpickler.dispatch.items()
        if code not in {getattr(pickle, name)[0] for name in _FORBIDDEN}
    }

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """One of `_KNOWN`; nothing is imported."""
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise _Refused(f"names {module}.{name}") from None

    def load(self) -> Any:
        """The value; ValueError for an instruction that is not known or not allowed here."""
        try:
            return super().load()
        except KeyError as error:
            if isinstance(error.args[0], int):
                raise _Refused(f"instruction {error.args[0]:#x} is not one of plain data") from error
            raise

    def load_reduce(self) -> None:
        """Call one of `_KNOWN`."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(arguments, tuple) or function not in _KNOWN.values():
            raise _Refused("calls something")
        self.stack[-1] = function(*arguments)

    def load_build(self) -> None:
        """Take the byte order out of the state of a numpy type; nothing else has a state."""
        state = self.stack.pop()
        kind = self.stack[-1]
        if not isinstance(kind, _NumpyType) or not isinstance(state, tuple) or len(state) < 2:
            raise _Refused("sets the inside of an object")
        order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        kind.order = ">" if order == ">" else "<"

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
