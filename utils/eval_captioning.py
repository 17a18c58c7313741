"""Scoring caption and answer files: configuration and work of `eval_captioning.py`."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from utils.caption_files import FilePair, Question, pair_files, read_predictions_file, read_questions, some
from utils.io import atomic_write_text, to_json

if TYPE_CHECKING:
    from utils.caption_report import Row
    from utils.captioning import CaptionScores, MeteorOnce

logger = logging.getLogger(__name__)

CAPTION_CATEGORIES = ("caption", "detail", "conv_complex")
"""Categories of the published question files whose answers are sentences."""
Metric = Literal["bleu", "meteor", "rouge_l", "rouge", "cider", "spice"]


@dataclass
class EvalCaptioningConfig:
    """Score captions (BLEU, METEOR, ROUGE, CIDEr, SPICE) and short answers (accuracy) of several files."""

    answers: tuple[str, ...] = ("./dataset/vqa_caption",)
    """Question files with their answers (JSON lines), or folders of them."""
    predictions: tuple[str, ...] = ("./captioning_dir/lisat",)
    """Prediction files, or folders. As many files as --answers: paired in order; else by their names."""
    model: str = ""
    """Name of the model in the tables; empty: the folder of the predictions."""
    out_dir: str = ""
    """Folder for results_<protocol>.json, .csv and .md; empty: the folder of the first predictions."""
    protocol: Literal["raw", "ptb"] = "raw"
    """raw: strings as they are, as published; ptb: Penn Treebank tokens as on COCO (needs Java). The two do
    not compare, and never stand in one table."""
    metrics: tuple[Metric, ...] = ("bleu", "meteor", "rouge_l", "rouge", "cider", "spice")
    """Which caption scores; METEOR needs Java, SPICE also its CoreNLP jars (LISAT_SPICE_JARS)."""
    task: Literal["auto", "caption", "vqa"] = "auto"
    """auto: a file is scored as captions if its answers are lists, or its category is caption, detail or
    conv_complex; else as short answers."""
    vqa_normalise: bool = False
    """Short answers: drop the final period and write number words as digits before comparing."""
    rouge_seed: int | None = None
    """Also give ROUGE as published: the median of 1,000 resamples, drawn with this seed."""
    partial: bool = False
    """Captions: score the ids that both files have, and say so, instead of stopping."""
    skip_bad_lines: bool = False
    """Leave faulty lines of prediction files out with a warning instead of stopping."""
    per_caption: bool = False
    """Also write <data set>_<protocol>.jsonl with the scores of every caption."""
    merge: tuple[str, ...] = ()
    """Result files (.json) of earlier runs: make one table of them instead of scoring."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = []
        if not self.metrics:
            faults.append("--metrics is empty; name at least one")
        if self.rouge_seed is not None and not 0 <= self.rouge_seed < 2**32:
            faults.append(f"--rouge_seed {self.rouge_seed} is not in 0..{2**32 - 1}")
        if self.merge and not self.out_dir:
            faults.append("--merge needs --out_dir, the folder of the new table")
        return faults


def run(config: EvalCaptioningConfig) -> tuple[str, bool]:
    """Score or merge; returns the text to show, and whether every data set could be scored.

    Raises:
        ValueError: nothing can be scored, or protocols would meet in one table.
    """
    from utils.caption_report import read_run, to_markdown, write_run

    if config.merge:
        rows = [row for path in config.merge for row in read_run(path)]
        return _told(to_markdown(rows), write_run(config.out_dir, rows)), True
    from utils.captioning import MeteorOnce

    rows, failures = [], {}
    pairs = pair_files(config.answers, config.predictions)
    folder = Path(config.out_dir or _parent(Path(config.predictions[0])))
    with MeteorOnce() as meteor:
        for pair in pairs:
            try:
                rows.append(score_pair(config, pair, folder, meteor))
                logger.info("%s: scored %d", pair.name, rows[-1]["n"])
            except ValueError as error:
                failures[pair.name] = error
                logger.error("%s is not scored: %s", pair.name, error)
    if not rows:
        raise next(iter(failures.values()))
    text = to_markdown(rows)
    if failures:
        text += "\n".join(f"- not scored: {name}: {error}" for name, error in failures.items()) + "\n"
    return _told(text, write_run(folder, rows)), not failures


def score_pair(
    config: EvalCaptioningConfig, pair: FilePair, folder: Path, meteor: "MeteorOnce | None" = None
) -> "Row":
    """The row (see `utils.caption_report`) of one question file and its predictions; ValueError on faults."""
    from utils.captioning import score_captions, vqa_accuracy

    questions = read_questions(pair.questions, answers=True)
    predicted = read_predictions_file(pair.predictions, config.skip_bad_lines)
    wanted = {question.question_id for question in questions}
    missing = [key for key in wanted if key not in predicted.texts]
    extra = [key for key in predicted.texts if key not in wanted]
    task = choose_task(config.task, questions, pair.questions)
    row: Row = {
        "model": config.model or _parent(pair.predictions).resolve().name,
        "dataset": pair.name,
        "task": task,
        "questions": len(questions),
        "missing": len(missing),
        "extra": len(extra),
        "repeated": len(predicted.repeated),
        "bad_lines": predicted.bad_lines,
        "answers": str(pair.questions),
        "predictions": str(pair.predictions),
    }
    if task == "vqa":
        found = vqa_accuracy(questions, predicted.texts, config.vqa_normalise)
        if missing:
            logger.warning("%s: %d answers are missing and count as wrong", pair.name, len(missing))
        if extra:
            logger.warning("%s: %d answers to other ids are ignored", pair.name, len(extra))
        categories = found["per_category"]
        scores = {name: values["accuracy"] for name, values in categories.items()}
        clash = sorted(scores.keys() & {"overall", "average"})
        if clash:
            raise ValueError(f"{pair.questions}: field category: {clash[0]!r} is the name of a score")
        scores |= {name: found[name] for name in ("overall", "average")}
        counts = {name: {k: v[k] for k in ("correct", "total")} for name, v in categories.items()}
        protocol = "normalised" if config.vqa_normalise else "exact"
        return row | {"protocol": protocol, "n": len(questions), "scores": scores, "counts": counts}
    texts = predicted.texts
    references = {question.question_id: question.answers for question in questions}
    if config.partial:
        references = {key: value for key, value in references.items() if key in texts}
        texts = {key: text for key, text in texts.items() if key in references}
        if missing or extra:
            logger.warning(
                "%s: PARTIAL, %d of %d questions (missing: %s; ids of no question: %s)",
                pair.name,
                len(references),
                len(questions),
                some(missing) or "none",
                some(extra) or "none",
            )
        if not references:
            raise ValueError(f"{pair.predictions}: none of its ids is in {pair.questions}")
    try:
        found = score_captions(references, texts, config.protocol, config.metrics, config.rouge_seed, meteor)
    except ValueError as error:
        raise ValueError(f"{pair.predictions}: {error}") from error
    if config.per_caption:
        _write_single(folder / f"{pair.name}_{config.protocol}.jsonl", found)
    row |= {"protocol": config.protocol, "n": len(found.ids), "scores": found.scores}
    if config.rouge_seed is not None:
        row["rouge_seed"] = config.rouge_seed
    return row | {"unavailable": found.unavailable}


def choose_task(wanted: str, questions: list[Question], path: Path) -> str:
    """`caption` or `vqa`, by `--task` or by what the answers are; ValueError for a file that holds both."""
    if wanted != "auto":
        return wanted
    kinds = {q.several or q.category in CAPTION_CATEGORIES for q in questions}
    if len(kinds) > 1:
        odd = next(q for q in questions if not (q.several or q.category in CAPTION_CATEGORIES))
        raise ValueError(
            f"{path}: holds captions and short answers (line {odd.line}: category {odd.category!r}, one "
            "text); split the file, or give --task"
        )
    return "caption" if kinds.pop() else "vqa"


def _write_single(path: Path, found: "CaptionScores") -> None:
    lines = [
        to_json({"question_id": key} | {name: found.single[name][k] for name in sorted(found.single)}, None)
        for k, key in enumerate(found.ids)
    ]
    atomic_write_text(path, "\n".join(lines) + "\n")


def _parent(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _told(text: str, paths: list[Path]) -> str:
    return text + "\n" + "\n".join(f"written: {path}" for path in paths)
