"""Tables of captioning and answering scores: one run is a list of rows, written as JSON, CSV and Markdown.

    {"format": "lisat-captioning", "version": 1, "rows": [ROW, ...]}
    ROW = {"model", "dataset", "task": "caption" | "vqa", "protocol": "raw" | "ptb" for captions and
           "exact" | "normalised" for answers, "n": how many were scored, "questions": how many there are,
           "missing", "extra", "repeated", "bad_lines", "scores": {name: value}, "counts": {category:
           {"correct", "total"}} (vqa), "unavailable": {metric: what is missing}, "answers", "predictions"}

Rows of two protocols in one table are refused.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.io import StrPath, atomic_write_json, atomic_write_text, read_json

FORMAT, VERSION = "lisat-captioning", 1
Row = dict[str, Any]

_ORDER = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "spice")
_ORDER += ("rouge1", "rouge2", "rougeL", "rougeLsum")
_ORDER += ("rouge1_median", "rouge2_median", "rougeL_median", "rougeLsum_median", "overall", "average")
_TITLES = {"meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr", "spice": "SPICE"}
_TITLES |= {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}
_TITLES |= {f"rouge{n}": f"stemmed ROUGE-{n}" for n in ("1", "2", "L", "Lsum")}
_TITLES |= {f"{name}_median": f"{title} (resampled)" for name, title in _TITLES.items() if "rouge" in name}
_PROTOCOLS = {
    "raw": "raw strings, case-sensitive, split at white space (as published)",
    "ptb": "Penn Treebank tokens, lower case, no punctuation (COCO protocol)",
    "exact": "equal after lower-casing and stripping (as published)",
    "normalised": "final period dropped, number words as digits, then as `exact`",
}


def one_protocol(rows: Sequence[Row]) -> dict[str, str]:
    """{task: protocol} of the rows; ValueError where rows of one task were scored by two protocols."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        found.setdefault(row["task"], {}).setdefault(row["protocol"], f"{row['model']} / {row['dataset']}")
    for task, protocols in found.items():
        if len(protocols) > 1:
            said = ", ".join(f"{name} ({where})" for name, where in protocols.items())
            raise ValueError(
                f"{task} scores of different protocols cannot stand in one table: {said}; score them again "
                "with one protocol"
            )
    return {task: next(iter(protocols)) for task, protocols in found.items()}


def run_name(rows: Sequence[Row]) -> str:
    """File name of a run without ending, with its protocols: `results_raw`, `results_raw_exact`."""
    protocols = one_protocol(rows)
    return "_".join(["results", *(protocols[task] for task in sorted(protocols))])


def write_run(folder: StrPath, rows: Sequence[Row]) -> list[Path]:
    """Write JSON, CSV and Markdown of a run into `folder`; returns the paths. See `one_protocol`."""
    path = Path(folder) / run_name(rows)
    return [
        atomic_write_json(
            path.with_suffix(".json"), {"format": FORMAT, "version": VERSION, "rows": list(rows)}
        ),
        atomic_write_text(path.with_suffix(".csv"), to_csv(rows)),
        atomic_write_text(path.with_suffix(".md"), to_markdown(rows)),
    ]


def read_run(path: StrPath) -> list[Row]:
    """Rows of a run's JSON file; ValueError where it is none."""
    body = read_json(path, dict)
    if (
        body.get("format") != FORMAT
        or body.get("version") != VERSION
        or not isinstance(body.get("rows"), list)
    ):
        raise ValueError(
            f"{path}: no captioning results (field 'format' is not {FORMAT!r}, version {VERSION})"
        )
    for number, row in enumerate(body["rows"]):
        needed = {"model": str, "dataset": str, "task": str, "protocol": str, "n": int, "scores": dict}
        for name, kind in needed.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                raise ValueError(f"{path}: rows[{number}]: field {name}: expected {kind.__name__}")
    return body["rows"]


def to_csv(rows: Sequence[Row]) -> str:
    """One line per row; scores with six decimals in 0..1 (CIDEr 0..10), empty where there is none."""
    one_protocol(rows)
    names = _columns(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "dataset", "task", "protocol", "n", "missing", *names])
    for row in rows:
        values = [f"{row['scores'][name]:.6f}" if name in row["scores"] else "" for name in names]
        head = [row["model"], row["dataset"], row["task"], row["protocol"], row["n"], row.get("missing", 0)]
        writer.writerow([*head, *values])
    return text.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """A table of captions and one of answers, scores times 100, each under the name of its protocol."""
    lines = []
    for task, protocol in sorted(one_protocol(rows).items()):
        mine = [row for row in rows if row["task"] == task]
        names = _columns(mine)
        lines += [f"## {'Captions' if task == 'caption' else 'Answers'}, protocol `{protocol}`", ""]
        lines += [f"{_PROTOCOLS.get(protocol, protocol)}; scores x 100", ""]
        lines += ["| model | data set | n | " + " | ".join(_TITLES.get(name, name) for name in names) + " |"]
        lines += ["|---|---|" + "---:|" * (len(names) + 1)]
        for row in mine:
            values = [f"{100 * row['scores'][name]:.2f}" if name in row["scores"] else "-" for name in names]
            cells = [_cell(row["model"]), _cell(row["dataset"]), _scored(row), *values]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        reasons = {f"{name}: {why}" for row in mine for name, why in row.get("unavailable", {}).items()}
        lines += [f"- not available: {reason}" for reason in sorted(reasons)]
        lines += [""] * bool(reasons)
    return "\n".join(lines)


def _columns(rows: Sequence[Row]) -> list[str]:
    names: Mapping[str, None] = dict.fromkeys(name for row in rows for name in row["scores"])
    known = [name for name in _ORDER if name in names]
    return known + sorted(name for name in names if name not in known)


def _scored(row: Row) -> str:
    """`210`, or `200 of 210` where predictions are missing and were left out."""
    questions = row.get("questions", row["n"])
    return str(row["n"]) if row["n"] == questions else f"{row['n']} of {questions}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
