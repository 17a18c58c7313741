"""Reports of InstructSAM's evaluation as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_TITLES = {"bbox": "Boxes", "segm": "Masks"}


def report_markdown(report: Mapping[str, Any]) -> str:
    """Markdown of a report of `utils.instructsam_eval`: what was scored, means, then one line per class."""
    lines = [f"# {report['dataset']}: {report['kind']} ({report['setting']})", ""]
    facts = ("scored", "annotations", "n_predictions", "n_predictions_kept", "score_threshold", "recall_of")
    lines += [f"- {name}: {report[name]}" for name in facts if report.get(name) is not None]
    lines += {"recognition": _recognition, "counting": _counting, "recall": _recall}[report["kind"]](report)
    if report.get("label_map"):
        lines += _label_map(report["label_map"])
    return "\n".join(lines) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, the first column left, the others right."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _recognition(report: Mapping[str, Any]) -> list[str]:
    lines = []
    if "sweep" in report:
        swept = report["sweep"]
        best = max(swept["mF1"], default=0.0)
        lines += [
            f"- sweep of {len(swept['thresholds'])} thresholds: best {_TITLES[swept['kind']].lower()} mF1"
        ]
        lines[-1] += (
            f" {_percent(best)} at score {swept['best_threshold']:.4f}; only what reaches it is scored"
        )
    if not report["keep_scores"]:
        lines.append("- AP with all scores set to 1 (nc)")
    extra = report.get("extra_classes")
    rows = []
    for kind in ("bbox", "segm"):
        if kind in report:
            block = report[kind]
            row = [_TITLES[kind], f"{block['mF1']:.2f}", f"{block['mAP50']:.2f}"]
            rows.append(row + ([f"{block['extra_mF1']:.2f}", f"{block['extra_mAP50']:.2f}"] if extra else []))
    name = "mAP50" if report["keep_scores"] else "mAPnc50"
    head = ["percent", "mF1", name] + ([f"mF1 {extra}", f"{name} {extra}"] if extra else [])
    lines += ["", *table(head, rows)]
    if "mIoU" in report:
        lines += ["", f"mIoU of the classes' masks: {_percent(report['mIoU']['mean'])}"]
    for kind in ("bbox", "segm"):
        if kind in report:
            lines += ["", f"## {_TITLES[kind]}", ""]
            head = ["class", "TP", "FP", "FN", "precision", "recall", "F1", "AP50"]
            lines += table(
                head, [_class_row(n, row, ("ap50",)) for n, row in report[kind]["per_class"].items()]
            )
    return lines


def _class_row(name: str, row: Mapping[str, float], more: Sequence[str] = ()) -> list[str]:
    numbers = [str(row[key]) for key in ("tp", "fp", "fn")]
    return [name, *numbers, *(_percent(row[key]) for key in ("precision", "recall", "f1", *more))]


def _counting(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, title in (("missing", "pictures without counts"), ("left_out", "files left out")):
        if report.get(key):
            names = list(report[key])
            lines.append(
                f"- {title}: {len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            )
    rows = []
    for key, title in (("counting", "published"), ("corrected", "corrected")):
        for mean in ("macro", "extra"):
            means = report.get(key, {}).get(mean)
            if means is not None:
                what = title if mean == "macro" else f"{title}, {report['extra_classes']}"
                rows.append([what, *(_percent(means[name]) for name in ("precision", "recall", "f1"))])
    lines += ["", *table(["mean over classes", "precision", "recall", "F1"], rows)]
    if "corrected" in report:
        lines += [
            "",
            "Corrected: pictures without a file counted nothing; only classes that are there or were",
        ]
        lines[-1] += " counted enter the mean."
    lines += [
        "",
        *table(["class", "there", "TP", "FP", "FN", "precision", "recall", "F1"], _count_rows(report)),
    ]
    return lines


def _count_rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, row in report["counting"]["per_class"].items():
        cells = _class_row(name, row)
        rows.append([cells[0], str(row["gt"]), *cells[1:]])
    return rows


def _recall(report: Mapping[str, Any]) -> list[str]:
    found = report["recall"]
    rows = [["all classes of the file (published)", _percent(found["mean"])]]
    rows.append(["classes with objects", _percent(found["present_mean"])])
    lines = [f"- proposals: {found['n_proposals']}", "", *table(["mean recall over", "percent"], rows), ""]
    return lines + table(["class", "recall"], [[n, _percent(r)] for n, r in found["per_class"].items()])


def _label_map(label_map: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for label, entry in label_map.items():
        similarity = "-" if entry["similarity"] is None else f"{entry['similarity']:.3f}"
        rows.append([label, entry["class"], similarity, "yes" if entry["accepted"] else "no"])
    return ["", "## Labels and their classes", "", *table(["label", "class", "similarity", "used"], rows)]
