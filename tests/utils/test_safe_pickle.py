"""Pickles of plain data: what is read, what is refused, damaged files."""

import collections
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils.safe_pickle import load_plain_pickle, parse_plain_pickle

PLAIN = [
    {"ref_id": 1, "sentences": [{"sent": "caf\u00e9", "tokens": ["a", "b"]}], "box": (1.5, -2, 10**30)},
    [None, True, False, b"\x00\xff", {1, 2}, frozenset("a"), "", {}],
]
NUMBERS = [
    np.int64(-5),
    np.float64(0.25),
    np.float32(0.5),
    np.bool_(True),
    np.uint8(200),
    np.dtype(">i4").type(7),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data(protocol: int) -> None:
    assert parse_plain_pickle(pickle.dumps(PLAIN, protocol), "x") == PLAIN
    read = parse_plain_pickle(pickle.dumps(NUMBERS, protocol), "x")
    assert read == [number.item() for number in NUMBERS]
    assert [type(value) for value in read] == [type(number.item()) for number in NUMBERS]


def test_texts_of_python_2() -> None:
    assert parse_plain_pickle(b"(lp0\nS'left'\np1\naS'caf\\xc3\\xa9'\np2\naI3\naL4L\na.", "x") == [
        "left",
        "caf\u00e9",
        3,
        4,
    ]
    assert parse_plain_pickle(b"(lp0\nS'caf\\xe9'\np1\na.", "x") == ["caf\u00e9"]


class Evil:
    """Calls a function when it is read by the standard reader."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "value",
    [
        Evil(os.system, "false"),
        Evil(eval, "1"),
        Evil(np.dtype, "O"),
        collections.OrderedDict(a=1),
        Path("x"),
        np.arange(3),
        len,
        Path,
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_refused(value: Any, protocol: int) -> None:
    with pytest.raises(ValueError, match="only plain lists, dicts, texts and numbers"):
        parse_plain_pickle(pickle.dumps([value], protocol), "refs.p")


@pytest.mark.parametrize(
    "data",
    [
        b"cnumpy\ndtype\n(S'i8'\ntR(dS'code'\nS'O'\nsb.",  # a state that is no state
        b"\x80\x02]q\x00\x82\x01.",  # extension registry
        b"Pname\n.",  # persistent id
        b"(ios\nsystem\n.",  # old instance
        b"cbuiltins\nset\n(cbuiltins\nset\nt\x81.",  # new object
    ],
)
def test_instructions_that_make_objects(data: bytes) -> None:
    with pytest.raises(ValueError, match="only plain"):
        parse_plain_pickle(data, "x")


def test_damaged_files_end_in_a_named_error(tmp_path: Path) -> None:
    data = pickle.dumps([PLAIN, NUMBERS] * 3, 2)
    rng = random.Random(4)
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        broken = broken[: rng.choice((None, rng.randrange(len(broken))))]
        try:
            parse_plain_pickle(bytes(broken), "broken.p")
        except ValueError as error:
            assert "broken.p" in str(error)
            refused += 1
    assert refused > 150
    for path in (tmp_path, tmp_path / "nothing.p"):
        with pytest.raises(ValueError, match="cannot be read"):
            load_plain_pickle(path)
