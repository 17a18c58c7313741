"""Question and answer templates: six families, each in the role the published training mix gives it.

| family           | placeholders                | role                                               |
|------------------|-----------------------------|----------------------------------------------------|
| `short_question` | `{class_name}`, 1..n times  | asks whether the named thing is there, and its mask |
| `long_question`  | `{sent}` first              | repeats the user's sentence and asks for the mask  |
| `long_answer`    | none; one `[SEG]`           | answers a sentence                                 |
| `short_answer`   | `{class_name}` or none; one `[SEG]` | answers a name                             |
| `denial`         | `{class_name}` or none      | says that it is absent                             |
| `correction`     | `{class_name}`, `{gt_name}` | says that the first is absent, the second is there |

Built-in sets: `default` and `tiny` (few short sentences, for small vocabularies). Users may name a file of
their own: JSON with the six names, or a Python file whose list literals are read (never executed).
"""

import ast
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from dataset.text import IMAGE_TOKEN, SEG_TOKEN
from utils.io import StrPath, read_json

logger = logging.getLogger(__name__)

Picker = Callable[[tuple[str, ...]], str]
"""Chooses a template of a family: a `Pick`, or a reader's `Draws`."""

BUILT_IN = ("default", "tiny")
_FOLDER = Path(__file__).parent / "template_files"
_NAME_SLOT, _SENTENCE_SLOT, _FOUND_SLOT = "{class_name}", "{sent}", "{gt_name}"
_OFFICIAL = {  # SHA-256 beginnings of the released lists as compact ASCII JSON
    "4d00f917": "short_question",
    "de3d89f5": "long_question",
    "016f0371": "long_answer",
    "988d5dea": "short_answer",
    "7ecf3890": "denial",
    "f6517105": "correction",
}


@dataclass(frozen=True)
class Templates:
    """The six families; a draw is uniform over a family, repetitions included."""

    short_question: tuple[str, ...]
    long_question: tuple[str, ...]
    long_answer: tuple[str, ...]
    short_answer: tuple[str, ...]
    denial: tuple[str, ...]
    correction: tuple[str, ...]

    def __post_init__(self) -> None:
        faults = [fault for name in families() for fault in _faults(name, getattr(self, name))]
        if faults:
            raise ValueError("templates: " + "; ".join(faults))

    @cached_property
    def nameless_denial(self) -> tuple[str, ...]:
        """Denials that name nothing, for queries that are sentences (all of them where there is none)."""
        return tuple(t for t in self.denial if _NAME_SLOT not in t) or self.denial

    def question(self, query: str, is_sentence: bool, pick: Picker, lower: bool = True) -> str:
        """User text for a query: a sentence as it is, a name in lower case where `lower`."""
        if is_sentence:
            return pick(self.long_question).replace(_SENTENCE_SLOT, query)
        return pick(self.short_question).replace(_NAME_SLOT, query.lower() if lower else query)

    def answer(self, query: str, is_sentence: bool, pick: Picker, masks: int = 1) -> str:
        """Confirmation with one `[SEG]` per mask, joined by "and"."""
        text = pick(self.long_answer if is_sentence else self.short_answer)
        text = text.replace(_NAME_SLOT, query.strip().lower())
        return text if masks == 1 else text.replace(SEG_TOKEN, " and ".join([SEG_TOKEN] * masks))

    def deny(self, query: str, is_sentence: bool, pick: Picker, found: str | None = None) -> str:
        """Denial, or a correction that names what is there instead (`found`)."""
        name = query.strip().lower()
        if found is not None:
            text = pick(self.correction).replace(_FOUND_SLOT, "\0").replace(_NAME_SLOT, name)
            return text.replace("\0", found.strip().lower())
        text = pick(self.nameless_denial if is_sentence else self.denial)
        return text.replace(_NAME_SLOT, name)


class Pick:
    """Chooses a template: from a random generator, or fixed by a key (then the same in every run)."""

    def __init__(self, rng: np.random.Generator | None = None, key: str = "") -> None:
        self._rng, self._key = rng, key

    def __call__(self, family: tuple[str, ...]) -> str:
        if self._rng is not None:
            return family[int(self._rng.integers(len(family)))]
        digest = hashlib.sha256(self._key.encode()).digest()
        return family[int.from_bytes(digest[:8], "big") % len(family)]


def families() -> tuple[str, ...]:
    """Names of the six families."""
    return tuple(field.name for field in fields(Templates))


def load_templates(source: StrPath | None = None) -> Templates:
    """Templates of a built-in set (`default` where nothing is given) or of a user's file.

    Args:
        source: `default`, `tiny`, or the path of a `.json` or `.py` file. Families that the file lacks come
            from `default` (a warning names them).

    Raises:
        ValueError: unreadable file, unknown family, or a template without its placeholder.
    """
    if source is None or str(source) in BUILT_IN:
        return Templates(**_as_tuples(read_json(_FOLDER / f"{source or 'default'}.json", dict)))
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"templates {source!r}: no such file, and none of the built-in {', '.join(BUILT_IN)}"
        )
    found = _from_python(path) if path.suffix == ".py" else _from_json(path)
    missing = [name for name in families() if name not in found]
    if len(missing) == len(families()):
        raise ValueError(f"{path}: none of the families {', '.join(families())} found")
    if missing:
        logger.warning("%s: %s missing, taken from the default templates", path, ", ".join(missing))
        found = _as_tuples(read_json(_FOLDER / "default.json", dict)) | found
    try:
        return Templates(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _as_tuples(lists: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(_without_tag(text) for text in texts) for name, texts in lists.items()}


def _without_tag(text: str) -> str:
    return text.removeprefix(IMAGE_TOKEN).removeprefix("\n")


def _from_json(path: Path) -> dict[str, tuple[str, ...]]:
    lists = read_json(path, dict)
    unknown = sorted(set(lists) - set(families()))
    if unknown:
        raise ValueError(f"{path}: {', '.join(unknown)} unknown; families are {', '.join(families())}")
    for name, texts in lists.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: {name} must be a list of texts")
    return _as_tuples(lists)


def _from_python(path: Path) -> dict[str, tuple[str, ...]]:
    """List literals of a Python file, known by checksum (the released lists) or by variable name."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as Python: {error}") from error
    by_name: dict[str, list[str]] = {}
    by_checksum: dict[str, list[str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        texts = _texts(node.value)
        if texts is None:
            continue
        variable = node.targets[0].id.lower()
        by_name |= {name: texts for name in families() if name in variable}
        checksum = hashlib.sha256(json.dumps(texts, separators=(",", ":")).encode()).hexdigest()[:8]
        if checksum in _OFFICIAL:
            by_checksum[_OFFICIAL[checksum]] = texts
    return _as_tuples(by_name | by_checksum)


def _texts(node: ast.expr) -> list[str] | None:
    """Texts of a list literal of strings, or sums of strings and names (a name is the image tag)."""
    if not isinstance(node, ast.List | ast.Tuple):
        return None
    texts = [_text(item) for item in node.elts]
    return None if None in texts or not texts else texts


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return IMAGE_TOKEN
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    return None


def _faults(name: str, texts: tuple[str, ...]) -> list[str]:
    if not texts:
        return [f"{name} is empty"]
    needed = {
        "short_question": [_NAME_SLOT],
        "long_question": [_SENTENCE_SLOT],
        "correction": [_NAME_SLOT, _FOUND_SLOT],
    }.get(name, [])
    segs = 1 if name in ("long_answer", "short_answer") else 0
    faults = []
    for number, text in enumerate(texts):
        faults += [f"{name}[{number}] lacks {slot}: {text!r}" for slot in needed if slot not in text]
        if text.count(SEG_TOKEN) != segs:
            faults.append(f"{name}[{number}] has {text.count(SEG_TOKEN)} {SEG_TOKEN}, needs {segs}: {text!r}")
    return faults
