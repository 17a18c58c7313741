"""A language model's reply -> object counts.

`published_object` is the published rule: from the first `{` to the last `}`, standard JSON. `repaired_object`
also reads fences, comments, trailing commas, single quotes, bare words and several objects. `checked_counts`
is the schema: label -> whole number >= 0. Every refusal is a `ReplyError` with a reason.
"""

import json
from typing import Any

from utils.instructsam_files import whole_number

_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_WORDS = {"true": True, "false": False, "null": None, "none": None}


class ReplyError(ValueError):
    """A reply that gives no counts, with the reason."""


def read_reply(text: str, repair: bool = False, unchecked: bool = False) -> dict[str, Any]:
    """Counts of a reply.

    Args:
        text: what the model wrote.
        repair: if the published rule fails, try `repaired_object`.
        unchecked: leave out the schema check, as published (values of any type pass).

    Raises:
        ReplyError: no object could be read, or its values are no counts.
    """
    try:
        found = published_object(text)
    except ReplyError:
        if not repair:
            raise
        found = repaired_object(text)
    return found if unchecked else checked_counts(found)


def published_object(text: str) -> dict[str, Any]:
    """The object between the first `{` and the last `}` as standard JSON; ReplyError for anything else.

    NaN and infinities are accepted and a repeated key keeps its last value, as Python's parser does.
    """
    start, end = text.find("{"), text.rfind("}")
    if start < 0:
        raise ReplyError("the reply has no { ... } object" if text.strip() else "the reply is empty")
    if end < start:
        raise ReplyError("the reply ends inside its object (cut short?)")
    try:
        return json.loads(text[start : end + 1])
    except RecursionError as error:
        raise ReplyError("the reply is nested too deeply") from error
    except ValueError as error:
        raise ReplyError(f"the reply's object is no valid JSON: {error}") from error


def checked_counts(found: dict[str, Any]) -> dict[str, int]:
    """`found` as label -> whole number; "3" and 3.0 count as 3, spaces around labels go.

    Raises:
        ReplyError: an empty label, or a value that is no whole number >= 0; all faults are listed.
    """
    counts: dict[str, int] = {}
    faults = []
    for label, value in found.items():
        number = whole_number(value)
        if number is None or number < 0:
            faults.append(f"{label!r}: {str(value)[:40]!r}")
        elif not label.strip():
            faults.append("a label is empty")
        else:
            counts[label.strip()] = number
    if faults:
        raise ReplyError(f"counts must be whole numbers >= 0, found {', '.join(faults[:5])}")
    return counts


def repaired_object(text: str) -> dict[str, Any]:
    """All objects of a reply, read leniently and merged (a later value of a label wins).

    Raises:
        ReplyError: no object, or the reply ends inside one (its other counts would be lost silently).
    """
    merged: dict[str, Any] = {}
    position, found = text.find("{"), False
    while position >= 0:
        reader = _Lenient(text, position)
        try:
            value = reader.object()
        except _Ends as error:
            raise ReplyError("the reply ends inside an object (cut short?)") from error
        except _Fault as error:
            if reader.begun:  # going on inside it could take a part for the whole
                raise ReplyError("the reply's object cannot be repaired") from error
        else:
            merged, found = merged | value, True
        position = text.find("{", max(reader.position, position + 1))
    if not found:
        raise ReplyError("the reply has no object that could be repaired")
    return merged


class _Fault(Exception):
    """Not an object here."""


class _Ends(Exception):
    """The text ends inside an object."""


class _Lenient:
    """Reader of one JSON-like object from `position` on."""

    def __init__(self, text: str, position: int) -> None:
        self.text = text
        self.position = position
        self.depth = 0
        self.begun = False
        """Whether a key was read, or the nesting is too deep: then these are no braces in prose."""

    def object(self) -> dict[str, Any]:
        """The object that begins at `position`, which moves behind it; `_Fault` or `_Ends` if it is none."""
        self._open()
        result: dict[str, Any] = {}
        while self._peek() != "}":
            key = self._quoted() if self._peek() in _QUOTES else self._bare()
            if self._peek() != ":" or not isinstance(key, str) or not key:
                raise _Fault
            self.begun = True
            self.position += 1
            result[key] = self._value()
            self._separator("}")
        self._close()
        return result

    def _list(self) -> list[Any]:
        self._open()
        result = []
        while self._peek() != "]":
            result.append(self._value())
            self._separator("]")
        self._close()
        return result

    def _value(self) -> Any:
        letter = self._peek()
        if letter == "{":
            return self.object()
        if letter == "[":
            return self._list()
        if letter in _QUOTES:
            return self._quoted()
        word = self._bare()
        if word.lower() in _WORDS:
            return _WORDS[word.lower()]
        try:
            return int(word)
        except ValueError:
            pass
        try:
            return float(word)
        except ValueError as error:
            raise _Fault from error

    def _open(self) -> None:
        self.depth += 1
        if self.depth > 50:
            self.begun = True
            raise _Fault
        self.position += 1

    def _close(self) -> None:
        self.depth -= 1
        self.position += 1

    def _separator(self, end: str) -> None:
        """A comma, the end (not consumed), or a value on a new line without a comma."""
        before = self.position
        letter = self._peek()
        if letter == ",":
            self.position += 1
        elif letter != end and "\n" not in self.text[before : self.position]:
            raise _Fault

    def _peek(self) -> str:
        """Next letter after spaces and comments (not consumed)."""
        while True:
            while self.position < len(self.text) and self.text[self.position].isspace():
                self.position += 1
            rest = self.text[self.position : self.position + 2]
            if not rest:
                raise _Ends
            if rest == "/*":
                self._jump("*/", 2)
            elif rest == "//" or rest[0] == "#":
                self._jump("\n", 1)
            else:
                return rest[0]

    def _jump(self, end: str, length: int) -> None:
        found = self.text.find(end, self.position)
        if found < 0:
            raise _Ends
        self.position = found + length

    def _quoted(self) -> str:
        closing = _QUOTES[self.text[self.position]]
        letters: list[str] = []
        self.position += 1
        while self.position < len(self.text):
            letter = self.text[self.position]
            self.position += 1
            if letter == closing:
                return "".join(letters)
            letters.append(self._escape() if letter == "\\" else letter)
        raise _Ends

    def _escape(self) -> str:
        letter = self.text[self.position : self.position + 1]
        if not letter:
            raise _Ends
        self.position += 1
        if letter != "u":
            return _ESCAPES.get(letter, letter)
        digits = self.text[self.position : self.position + 4]
        try:
            value = chr(int(digits, 16))
        except ValueError as error:
            raise (_Fault if len(digits) == 4 else _Ends) from error
        self.position += 4
        return value

    def _bare(self) -> str:
        """Letters up to a separator: a number, a word, or a key without quotes."""
        start = self.position
        while self.position < len(self.text) and self.text[self.position] not in ",:{}[]\"'\n/#":
            self.position += 1
        if self.position == len(self.text):
            raise _Ends
        return self.text[start : self.position].strip()
