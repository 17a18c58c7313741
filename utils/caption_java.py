"""Captioning metrics that run in Java: the Penn Treebank tokeniser, METEOR 1.5 and SPICE.

Their programs come with the `pycocoevalcap` package, except for SPICE's two CoreNLP jars. Where Java or a jar
is missing, `Unavailable` says what to put where; callers go on with the other metrics.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from utils.io import StrPath

SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""The jars that SPICE needs and that no Python package brings."""
_OPENED = ("lang", "math", "util", "util.concurrent", "net", "text")
_LOCALE = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")


class Unavailable(ValueError):
    """Something that a metric needs is not on this machine; the text says what, and where to put it."""


def find_java(what: str) -> str:
    """The `java` program: `$LISAT_JAVA`, `$JAVA_HOME/bin/java`, or the one on PATH.

    Args:
        what: who needs it, for the message.
    """
    named = os.environ.get("LISAT_JAVA", "")
    home = os.environ.get("JAVA_HOME", "")
    choices = [named] if named else [str(Path(home) / "bin" / "java")] if home else []
    for choice in [*choices, "java"]:
        program = shutil.which(choice)
        if program:
            return program
        if choice == named:
            raise Unavailable(f"{what} needs Java: LISAT_JAVA={named} is no program; give the path of java")
    raise Unavailable(
        f"{what} needs Java (8 or newer, a JRE is enough) and there is none: install one (Debian and Ubuntu: "
        "default-jre-headless), or unpack one anywhere and set JAVA_HOME to its folder (or LISAT_JAVA to its "
        "bin/java)"
    )


def package_file(*parts: str) -> Path:
    """A file inside the installed pycocoevalcap package."""
    try:
        import pycocoevalcap
    except ImportError as error:
        raise Unavailable("pycocoevalcap is not installed: pip install -r requirements.txt") from error
    for root in pycocoevalcap.__path__:
        path = Path(root, *parts)
        if path.exists():
            return path
    raise Unavailable(f"{'/'.join(parts)} is not in the pycocoevalcap package; install pycocoevalcap again")


def one_line(text: str) -> str:
    """`text` with every run of white space that holds a line break (of any alphabet) as one space."""
    return re.sub(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*", " ", text)


def ptb_tokenise(texts: Sequence[str]) -> list[str]:
    """Texts as the COCO protocol scores them: Penn Treebank tokens, lower case, without punctuation marks.

    Raises:
        Unavailable: there is no Java. RuntimeError: the tokeniser failed.
    """
    java = find_java("the ptb protocol (Penn Treebank tokeniser)")
    jar = package_file("tokenizer", "stanford-corenlp-3.4.1.jar")
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    lines = [one_line(text).strip() or "." for text in texts]  # "." keeps the line and is dropped below
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        flags = ("-preserveLines", "-lowerCase", "-encoding", "UTF-8")
        command = [
            java,
            *_LOCALE,
            "-cp",
            str(jar),
            "edu.stanford.nlp.process.PTBTokenizer",
            *flags,
            file.name,
        ]
        done = subprocess.run(command, capture_output=True, check=False)
    out = done.stdout.decode("utf-8").split("\n")
    out = out[:-1] if out[-1] == "" else out
    if done.returncode or len(out) != len(lines):
        raise RuntimeError(
            f"the tokeniser gave {len(out)} lines for {len(lines)} texts (exit {done.returncode}): "
            f"{done.stderr.decode('utf-8', 'replace')[-500:]}"
        )
    dropped = set(PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in out]


class Meteor:
    """METEOR 1.5 (English, normalising) as a running Java program; a context manager that can score often."""

    def __init__(self) -> None:
        java = find_java("METEOR")
        jar = package_file("meteor", "meteor-1.5.jar")
        package_file("meteor", "data", "paraphrase-en.gz")
        command = [java, *_LOCALE, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command, cwd=jar.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )

    def score(
        self, references: Sequence[Sequence[str]], predictions: Sequence[str]
    ) -> tuple[float, list[float]]:
        """(score of the whole, score of each prediction); `references` has a list of texts for each."""
        statistics = []
        for refs, text in zip(references, predictions, strict=True):
            fields = [*(_field(ref) for ref in refs), _field(text)]
            statistics.append(self._ask(" ||| ".join(["SCORE", *fields])))
        self._send(" ||| ".join(["EVAL", *statistics]))
        single = [self._number() for _ in predictions]
        return self._number(), single

    def _ask(self, line: str) -> str:
        self._send(line)
        return self._receive()

    def _send(self, line: str) -> None:
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._receive()

    def _receive(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            message = self._errors.read().decode("utf-8", "replace").strip()[-500:]
            raise Unavailable(f"METEOR's Java program ended (exit {self._process.returncode}): {message}")
        return line.decode().strip()

    def _number(self) -> float:
        text = self._receive()
        try:
            return float(text)
        except ValueError as error:
            raise RuntimeError(f"METEOR answered {text!r} where a number was expected") from error

    def close(self) -> None:
        """End the program."""
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _field(text: str) -> str:
    return one_line(text).replace("|||", "").replace("  ", " ")


def spice_jars() -> Path:
    """Folder of SPICE's CoreNLP jars: `$LISAT_SPICE_JARS`, or the package's own spice/lib."""
    package = package_file("spice", "lib")
    named = os.environ.get("LISAT_SPICE_JARS", "")
    folders = [Path(named)] if named else [package]
    for folder in folders:
        if all((folder / jar).is_file() for jar in SPICE_JARS):
            return folder
    raise Unavailable(
        f"SPICE needs {' and '.join(SPICE_JARS)} (of stanford-corenlp-full-2015-12-09.zip, Stanford NLP) and "
        f"they are not in {folders[0]}: put both into a folder and set LISAT_SPICE_JARS to it"
    )


def java_version(java: StrPath) -> int:
    """Major version of a Java program: 8, 11, 17, ..."""
    done = subprocess.run([str(java), "-version"], capture_output=True, text=True, check=False)
    match = re.search(r'version "(\d+)(?:\.(\d+))?', done.stderr + done.stdout)
    if match is None:
        raise Unavailable(f"{java} does not say its version: {(done.stderr + done.stdout)[:200]!r}")
    return int(match[2] or 8) if match[1] == "1" else int(match[1])


def spice(
    references: Sequence[Sequence[str]], predictions: Sequence[str], heap: str = ""
) -> tuple[float, list[float]]:
    """(mean F, F of each prediction) of SPICE 1.0; NaN where it gives none.

    Args:
        heap: most memory of the Java program; empty: `$LISAT_SPICE_HEAP`, or 8G as SPICE asks for.

    Raises:
        Unavailable: Java or a jar is missing. RuntimeError: the program failed.
    """
    java = find_java("SPICE")
    jars, program = spice_jars(), package_file("spice", "spice-1.0.jar")
    opened = [f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in _OPENED]
    heap = heap or os.environ.get("LISAT_SPICE_HEAP", "8G")
    with tempfile.TemporaryDirectory(prefix="spice") as folder:
        given, out = Path(folder, "in.json"), Path(folder, "out.json")
        items = [
            {"image_id": k, "test": text, "refs": list(refs)}
            for k, (text, refs) in enumerate(zip(predictions, references, strict=True))
        ]
        given.write_text(json.dumps(items), encoding="utf-8")
        command = [java, *_LOCALE, f"-Xmx{heap}", *(opened if java_version(java) > 8 else [])]
        command += ["-cp", os.pathsep.join([str(program), str(jars / "*")]), "edu.anu.spice.SpiceScorer"]
        command += [str(given), "-out", str(out), "-subset", "-silent"]
        done = subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)
        if done.returncode or not out.is_file():
            raise RuntimeError(f"SPICE failed (exit {done.returncode}): {done.stderr.strip()[-800:]}")
        found = {item["image_id"]: item["scores"]["All"]["f"] for item in json.loads(out.read_text("utf-8"))}
    values = [_float(found.get(k)) for k in range(len(items))]
    return sum(values) / len(values), values


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
