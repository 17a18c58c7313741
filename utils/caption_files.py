"""Question and answer files of captioning and visual question answering: one JSON object per line.

Questions: `question_id` (whole number), `image` (path below a base folder), `text` (prompt), `answer` (list
of reference captions, or one text), `category`. Predictions: `question_id`, `round_id` 0, `prompt`, `text`,
`metadata` {}. Every fault is named as `file:line: field: what was found`.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.io import StrPath, is_text

logger = logging.getLogger(__name__)

_LISTED = 20
Faults = list[tuple[int, str]]
"""(line number, what is wrong there)"""


@dataclass(frozen=True)
class Question:
    """One line of a question file. `answers` is empty where the file gives none; `several` says whether it
    was a list."""

    question_id: int
    image: str
    text: str
    answers: tuple[str, ...]
    several: bool
    category: str
    line: int


@dataclass
class Predicted:
    """Answers of a prediction file by question id (the last line of an id wins), the ids that occur more than
    once, and the number of lines left out as faulty."""

    texts: dict[int, str] = field(default_factory=dict)
    repeated: list[int] = field(default_factory=list)
    bad_lines: int = 0


@dataclass(frozen=True)
class FilePair:
    """A question file with the answers given to it, and the name of the data set in tables."""

    name: str
    questions: Path
    predictions: Path


def read_questions(path: StrPath, *, answers: bool = False, images: bool = False) -> list[Question]:
    """Questions of a file in its order.

    Args:
        path: the file.
        answers: every line must have an `answer`. images: and an `image` and a `text`.

    Raises:
        ValueError: faulty lines (all of them, up to 20 listed), an id that occurs twice, or nothing inside.
    """
    faults: Faults = []
    found: list[Question] = []
    seen: dict[int, int] = {}
    for number, line in _objects(path, faults):
        mine: list[str] = []
        key = _question_id(line, mine)
        texts = {name: _text(line, name, mine, required=images) for name in ("image", "text")}
        category = _text(line, "category", mine, required=False)
        replies, several = _answers(line, mine, required=answers)
        if images and not texts["image"].strip() and "image" in line:
            mine.append("field image: is empty")
        if key is not None and key in seen:
            mine.append(f"field question_id: {key} stands on line {seen[key]} already")
        faults += [(number, fault) for fault in mine]
        if not mine and key is not None:
            seen[key] = number
            found.append(Question(key, texts["image"], texts["text"], replies, several, category, number))
    _settle(path, faults, bool(found), skip=False)
    return found


def read_predictions_file(path: StrPath, skip_bad_lines: bool = False) -> Predicted:
    """Answers of a prediction file.

    Args:
        path: the file.
        skip_bad_lines: leave faulty lines out with a warning instead of stopping.

    Raises:
        ValueError: faulty lines (all of them, up to 20 listed), or nothing inside.
    """
    faults: Faults = []
    result = Predicted()
    repeated: dict[int, None] = {}
    for number, line in _objects(path, faults):
        mine: list[str] = []
        key = _question_id(line, mine)
        text = _text(line, "text", mine, required=True)
        faults += [(number, fault) for fault in mine]
        if not mine and key is not None:
            if key in result.texts:
                repeated[key] = None
            result.texts[key] = text
    result.repeated = list(repeated)
    result.bad_lines = len({number for number, _ in faults})
    _settle(path, faults, bool(result.texts), skip=skip_bad_lines)
    if result.repeated:
        logger.warning(
            "%s: %d question ids occur more than once (%s); the last line of each counts",
            path,
            len(result.repeated),
            some(result.repeated),
        )
    return result


def some(ids: Sequence[Any], most: int = 8) -> str:
    """`1, 2, 3 ...`: the first few of a list, for messages."""
    return ", ".join(map(str, ids[:most])) + (" ..." if len(ids) > most else "")


# ---------------------------------------------------------------- which predictions belong to which questions


def pair_files(questions: Sequence[StrPath], predictions: Sequence[StrPath]) -> list[FilePair]:
    """Pairs of question and prediction files.

    Files on both sides, equally many: paired by position. Folders (of `*.jsonl`), or other numbers: by name,
    where `UCM-Captions.jsonl`, `lisat_ucm.jsonl`, `lisat_UCM-Captions_answer.jsonl` are one data set.

    Raises:
        ValueError: a path is not there, a name is ambiguous, or nothing can be paired.
    """
    left, right = [Path(p) for p in questions], [Path(p) for p in predictions]
    for path in [*left, *right]:
        if not path.exists():
            raise ValueError(f"{path}: nothing is there; give a .jsonl file or a folder of them")
    if len(left) == len(right) and all(path.is_file() for path in [*left, *right]):
        return [FilePair(name, q, p) for name, q, p in zip(_names(left), left, right)]
    known, given = _by_name(left), _by_name(right)
    for key in sorted(known.keys() - given.keys()):
        logger.warning("%s: no predictions for it in %s", known[key], some(right))
    for key in sorted(given.keys() - known.keys()):
        logger.warning("%s: no question file for it in %s", given[key], some(left))
    pairs = [FilePair(known[key].stem, known[key], given[key]) for key in sorted(known.keys() & given.keys())]
    if not pairs:
        raise ValueError(
            f"no prediction file of {some(right)} fits a question file of {some(left)} "
            f"(found {sorted(given)} and {sorted(known)}); give the files themselves, in the same order"
        )
    return pairs


def _names(files: Sequence[Path]) -> list[str]:
    """Names of data sets: the files' stems, with their folders where stems say nothing or come twice."""
    stems = [file.stem for file in files]
    vague = {"answers", "questions", "annotations", "test"}
    folders = [file.resolve().parent.name for file in files]
    names = [
        f"{folder}_{stem}" if stem in vague or stems.count(stem) > 1 else stem
        for folder, stem in zip(folders, stems)
    ]
    return [name if names.count(name) == 1 else f"{name}_{k + 1}" for k, name in enumerate(names)]


def dataset_key(name: str) -> str:
    """Short name of a data set out of a file's stem: `UCM-Captions`, `lisat_ucm` -> `ucm`."""
    key = name.lower().replace("-", "_")
    key = re.sub(r"^(lisat_pre|lisat|llava|preds?|predictions?|answers?)_", "", key)
    key = re.sub(r"_(answers?|preds?|predictions?|results?|questions?)$", "", key)
    return re.sub(r"_(captions?|lr)$", "", key)


def _by_name(paths: Sequence[Path]) -> dict[str, Path]:
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    names: dict[str, Path] = {}
    for file in files:
        key = dataset_key(file.stem)
        if key in names:
            raise ValueError(
                f"{names[key]} and {file} both mean the data set {key!r}; give the files themselves, in order"
            )
        names[key] = file
    return names


# ---------------------------------------------------------------- lines


def _objects(path: StrPath, faults: Faults) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a file; lines that hold none go to `faults`, empty ones are skipped."""
    path = Path(path)
    if not path.is_file():
        found = "a folder is there" if path.is_dir() else "nothing is there"
        raise ValueError(f"{path}: a file of JSON lines was expected, {found}")
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            faults.append((number, f"not UTF-8 text at byte {error.start} of the line"))
        except json.JSONDecodeError as error:
            faults.append((number, f"not valid JSON at column {error.colno}: {error.msg}"))
        except (ValueError, RecursionError) as error:
            faults.append((number, f"not valid JSON: {error}"))
        else:
            if isinstance(value, dict):
                yield number, value
            else:
                faults.append((number, f"expected an object {{...}}, found {_shown(value)}"))


def _question_id(line: dict[str, Any], faults: list[str]) -> int | None:
    value = line.get("question_id")
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = f"found {_shown(value)}" if "question_id" in line else "it is missing"
    faults.append(f"field question_id: expected a whole number, {found}")
    return None


def _text(line: dict[str, Any], name: str, faults: list[str], required: bool) -> str:
    value = line.get(name, None if required else "")
    if is_text(value, empty=True):
        return value
    if isinstance(value, str):
        faults.append(f"field {name}: holds half of a surrogate pair (a broken \\u escape)")
    else:
        found = f"found {_shown(value)}" if name in line else "it is missing"
        faults.append(f"field {name}: expected a text, {found}")
    return ""


def _answers(line: dict[str, Any], faults: list[str], required: bool) -> tuple[tuple[str, ...], bool]:
    value = line.get("answer")
    if "answer" not in line and not required:
        return (), False
    texts = value if isinstance(value, list) else [value]
    good = all(is_text(text) for text in texts)
    if not texts or not good:
        found = f"found {_shown(value)}" if "answer" in line else "it is missing"
        faults.append(f"field answer: expected a text or a list of texts, none empty, {found}")
        return (), False
    return tuple(texts), isinstance(value, list)


def _shown(value: Any) -> str:
    """A value in at most 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _settle(path: StrPath, faults: Faults, usable: bool, skip: bool) -> None:
    """Warn about faulty lines (`skip`), or ValueError with them; ValueError where nothing usable is left."""
    if faults:
        listed = "\n".join(f"  {path}:{number}: {fault}" for number, fault in faults[:_LISTED])
        more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        if not skip:
            raise ValueError(f"{path}: {len(faults)} faults:\n{listed}{more}")
        logger.warning("%s: faulty lines are left out (%d faults):\n%s%s", path, len(faults), listed, more)
    if not usable:
        raise ValueError(f"{path}: no usable line in this file")
