"""Answers to a question file while they are made: a run that is killed loses nothing and repeats nothing.

The questions are cut into batches by a plan that depends on the file and the batch size alone. Every process
appends whole batches, one line each and flushed to the disk, to its own `<answers>.<rank>_of_<world>.part`;
a half-written last line is cut off at the next start, and batches that any process has done are skipped.
Whoever finds all batches done writes the answers in the order of the questions, in one step, beside a
`.run.json` that says how they were made, and removes the parts. As no batch depends on where a run was
interrupted, the file is the same, byte for byte, as that of an uninterrupted run.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.caption_files import Question
from utils.io import atomic_write_json, atomic_write_text, read_json

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

FORMAT, VERSION = "lisat-answers", 1
_PART = re.compile(r"(?P<target>.+)\.(?P<rank>\d+)_of_(?P<world>\d+)\.part")


def plan_batches(images: Sequence[str], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions of the questions in batches of at most `batch_size`, longest prompts first.

    Questions about one picture stay together (it is encoded once), shorter ones first; pictures with prompts
    of about equal length meet in a batch.

    Args:
        images: the picture of each question. lengths: tokens of each prompt.
    """
    by_image: dict[str, list[int]] = {}
    for position, image in enumerate(images):
        by_image.setdefault(image, []).append(position)
    units = []
    for members in by_image.values():
        members.sort(key=lambda position: (lengths[position], position))
        units += [members[k : k + batch_size] for k in range(0, len(members), batch_size)]
    units.sort(key=lambda unit: (-lengths[unit[-1]], unit[0]))
    batches: list[list[int]] = []
    for unit in units:
        if batches and len(batches[-1]) + len(unit) <= batch_size:
            batches[-1] += unit
        else:
            batches.append(list(unit))
    return batches


class AnswerFile:
    """The answers to one question file: finished, or on their way.

    Args:
        target: the final file.
        header: whatever decides the answers; parts and finished files of another header are refused.
        batches: the plan. rank, world_size: of this process.
        restart: forget what is there (one process only).

    Raises:
        ValueError: answers under another header, a faulty part, or another process with this rank at work.
    """

    def __init__(
        self,
        target: Path,
        header: dict[str, Any],
        batches: Sequence[Sequence[int]],
        rank: int = 0,
        world_size: int = 1,
        restart: bool = False,
    ) -> None:
        self.target, self.header, self.batches = target, header, batches
        self.rank, self.world_size = rank, world_size
        self.part = target.with_name(f"{target.name}.{rank}_of_{world_size}.part")
        self._file: Any = None
        if restart:
            if world_size > 1:
                raise ValueError(f"--restart works with one process; remove {target}* by hand instead")
            for path in [target, self.sidecar, *self.parts()]:
                path.unlink(missing_ok=True)
        self.finished = self._is_finished()
        self.done = {} if self.finished else self._read_parts()

    @property
    def sidecar(self) -> Path:
        """`<answers>.run.json`: how the answers were made, and which questions were skipped."""
        return self.target.with_suffix(".run.json")

    def parts(self) -> list[Path]:
        """Part files of all processes, by name."""
        found = self.target.parent.glob(f"{glob_escape(self.target.name)}.*.part")
        return sorted(path for path in found if _PART.fullmatch(path.name))

    def mine(self) -> list[int]:
        """Numbers of the batches that this process has still to do: every `world_size`-th of the plan."""
        share = range(self.rank, len(self.batches), self.world_size)
        return [] if self.finished else [number for number in share if number not in self.done]

    def write(self, number: int, answers: Sequence[dict[str, str]]) -> None:
        """Append batch `number`, per question {"text": answer} or {"skipped": reason}; flush it to disk."""
        if self._file is None:
            self._open()
        line = json.dumps({"batch": number, "answers": list(answers)}) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close this process's part."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def finish(self, questions: Sequence[Question], extra: dict[str, Any]) -> int:
        """Write the final file if all batches are done; returns the number of batches still missing.

        Args:
            questions: in their order. extra: more entries for the sidecar.
        """
        self.close()
        found = self._read_parts()
        if len(found) < len(self.batches):
            self.finished = (
                self._is_finished()
            )  # another process may just have finished and removed the parts
            return 0 if self.finished else len(self.batches) - len(found)
        answers = {
            position: answer
            for number, batch in enumerate(self.batches)
            for position, answer in zip(batch, found[number], strict=True)
        }
        lines, skipped = [], []
        for position, question in enumerate(questions):
            answer = answers[position]
            if "text" in answer:
                lines.append(answer_line(question, answer["text"]))
            else:
                skipped.append({"question_id": question.question_id, "reason": answer["skipped"]})
        body = {"format": FORMAT, "version": VERSION, "header": self.header, "skipped": skipped} | extra
        atomic_write_json(self.sidecar, body)
        atomic_write_text(self.target, "".join(lines))
        self.finished = True
        self._remove_parts()
        return 0

    def skipped(self) -> int:
        """Questions without an answer in the finished file."""
        return len(read_json(self.sidecar, dict)["skipped"])

    def _is_finished(self) -> bool:
        if not self.target.exists():
            return False
        body = read_json(self.sidecar, dict) if self.sidecar.is_file() else {}
        if body.get("format") != FORMAT:
            raise ValueError(
                f"{self.target} exists and nothing says how it was made; remove it, choose another folder, "
                "or give --restart"
            )
        _check_header(self.target, body.get("header"), self.header)
        self._remove_parts()
        return True

    def _remove_parts(self) -> None:
        for path in self.parts():
            path.unlink(missing_ok=True)

    def _read_parts(self) -> dict[int, list[dict[str, str]]]:
        """Answers per finished batch, of all processes."""
        found: dict[int, list[dict[str, str]]] = {}
        for path in self.parts():
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # removed by the process that finished the file
                continue
            lines = data[: data.rfind(b"\n") + 1].splitlines()
            for number, raw in enumerate(lines, start=1):
                value = _value(path, number, raw)
                if number == 1:
                    _check_header(path, value.get("header"), self.header)
                    continue
                batch, answers = value.get("batch"), value.get("answers")
                right = (
                    isinstance(batch, int) and 0 <= batch < len(self.batches) and isinstance(answers, list)
                )
                if not right or len(answers) != len(self.batches[batch]) or not all(map(_is_answer, answers)):
                    raise ValueError(
                        f"{path}:{number}: no batch of this plan; remove the file and start again"
                    )
                found.setdefault(batch, answers)
        return found

    def _open(self) -> None:
        """Open this process's part behind its last whole line."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.part.open("ab+")
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.close()
                raise ValueError(f"{self.part}: another process is writing here; let it end first") from error
            except OSError:  # a file system without locks
                pass
        self._file.seek(0)
        whole = self._file.read().rfind(b"\n") + 1
        self._file.truncate(whole)
        if whole == 0:
            header = {"format": FORMAT, "version": VERSION, "header": self.header}
            self._file.write(json.dumps(header).encode() + b"\n")


def answer_line(question: Question, text: str) -> str:
    """One line of an answer file in the published form."""
    record = {"question_id": question.question_id, "round_id": 0, "prompt": question.text, "text": text}
    return json.dumps(record | {"metadata": {}}) + "\n"


def glob_escape(name: str) -> str:
    """`name` with the signs of patterns taken literally."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _is_answer(value: Any) -> bool:
    return isinstance(value, dict) and (
        isinstance(value.get("text"), str) or isinstance(value.get("skipped"), str)
    )


def _value(path: Path, number: int, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: not valid JSON ({error}); remove the file") from error
    if not isinstance(value, dict) or (number == 1 and value.get("format") != FORMAT):
        raise ValueError(f"{path}:{number}: no part of an answer file; remove the file")
    return value


def _check_header(path: Path, found: Any, wanted: dict[str, Any]) -> None:
    found = found if isinstance(found, dict) else {}
    different = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if different:
        told = "; ".join(
            f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} here" for name in different
        )
        raise ValueError(
            f"{path} holds answers of another run ({told}); choose another folder, or give --restart"
        )
