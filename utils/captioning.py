"""Scores of captions and of short answers.

Two protocols, never to be mixed in one table. `raw`: the strings as they are, split at white space, case and
all: how the published numbers were made. `ptb`: the COCO protocol, Penn Treebank tokens in lower case without
punctuation (needs Java). All scores lie in 0..1, except CIDEr in 0..10; tables show them times 100.
"""

import functools
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from utils.caption_files import Question, some
from utils.caption_java import Meteor, Unavailable, ptb_tokenise, spice

logger = logging.getLogger(__name__)

PROTOCOLS = ("raw", "ptb")
METRICS = ("bleu", "meteor", "rouge_l", "rouge", "cider", "spice")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
BOOTSTRAP_ROUNDS = 1000


@dataclass
class CaptionScores:
    """`scores`: name -> value over the whole; `single`: name -> value of each caption, in order of the ids
    (BLEU: sentence level); `unavailable`: metric -> what is missing."""

    protocol: str
    ids: list[int]
    scores: dict[str, float] = field(default_factory=dict)
    single: dict[str, list[float]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


class MeteorOnce:
    """Starts METEOR's Java program at the first use and keeps it for the next ones; a context manager."""

    def __init__(self) -> None:
        self._running: Meteor | None = None

    def score(
        self, references: Sequence[Sequence[str]], predictions: Sequence[str]
    ) -> tuple[float, list[float]]:
        """See `Meteor.score`."""
        if self._running is None:
            self._running = Meteor()
        return self._running.score(references, predictions)

    def __enter__(self) -> "MeteorOnce":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def score_captions(
    references: Mapping[int, Sequence[str]],
    predictions: Mapping[int, str],
    protocol: str = "raw",
    metrics: Sequence[str] = METRICS,
    rouge_seed: int | None = None,
    meteor: MeteorOnce | None = None,
) -> CaptionScores:
    """Score one caption per id against its references.

    Args:
        references, predictions: by id, with the same ids.
        protocol: `raw` or `ptb`. metrics: which of `METRICS`.
        rouge_seed: also give the published form of ROUGE, the median of 1,000 bootstrap means drawn from
            numpy's old generator with this seed (`rouge1_median`, ...); None: the mean alone.
        meteor: a running METEOR to be used.

    Returns:
        bleu_1..4 (corpus level, closest reference length), meteor, rouge_l (COCO), rouge1, rouge2, rougeL,
        rougeLsum (rouge-score, stemmed, best reference, mean), cider, spice.

    Raises:
        ValueError: different ids, or an unknown name. Unavailable: `ptb` without Java.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is unknown; choose one of {', '.join(PROTOCOLS)}")
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"metrics {', '.join(unknown)} are unknown; choose from {', '.join(METRICS)}")
    check_same_ids(references, predictions)
    ids = sorted(references)
    refs, texts = [list(references[i]) for i in ids], [predictions[i] for i in ids]
    if protocol == "ptb":
        refs, texts = _tokenised(refs, texts)
    if not any(ref.split() for row in refs for ref in row):
        raise ValueError("no word is left in any reference caption; is this the right question file?")
    result = CaptionScores(protocol, ids)
    for metric in METRICS:
        if metric not in metrics:
            continue
        try:
            if metric == "meteor" and meteor is not None:
                whole, single = meteor.score(refs, texts)
                found = {"meteor": (whole, single)}
            elif metric == "rouge":
                found = _rouge(refs, texts, rouge_seed)
            else:
                found = _COMPUTE[metric](refs, texts)
        except (Unavailable, RuntimeError) as error:
            result.unavailable[metric] = str(error)
            logger.warning("%s is left out: %s", metric.upper(), error)
            continue
        for name, (whole, single) in found.items():
            if not math.isfinite(whole):
                bad = [i for i, value in zip(ids, single) if not math.isfinite(value)]
                result.unavailable[name] = f"no number for question ids {some(bad)}"
                continue
            result.scores[name] = float(whole)
            if single:
                result.single[name] = [float(value) for value in single]
    return result


def check_same_ids(references: Mapping[int, Any], predictions: Mapping[int, Any]) -> None:
    """ValueError unless both have the same ids, as BLEU, METEOR and CIDEr demand."""
    missing = [i for i in references if i not in predictions]
    extra = [i for i in predictions if i not in references]
    if missing or extra:
        parts = [f"{len(missing)} questions without a prediction ({some(missing)})"] * bool(missing)
        parts += [f"{len(extra)} predictions without a question ({some(extra)})"] * bool(extra)
        raise ValueError(
            f"{' and '.join(parts)}; captions are scored on equal sets of ids: finish the predictions, or "
            "score what there is with --partial (marked so in the results)"
        )


def _tokenised(refs: list[list[str]], texts: list[str]) -> tuple[list[list[str]], list[str]]:
    flat = ptb_tokenise([*texts, *(ref for row in refs for ref in row)])
    texts, rest = flat[: len(texts)], iter(flat[len(texts) :])
    return [[next(rest) for _ in row] for row in refs], texts


Found = dict[str, tuple[float, list[float]]]


def _coco(refs: list[list[str]], texts: list[str]) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Both sides in the form of pycocoevalcap's scorers."""
    return dict(enumerate(refs)), {k: [text] for k, text in enumerate(texts)}


def _bleu(refs: list[list[str]], texts: list[str]) -> Found:
    from pycocoevalcap.bleu.bleu import Bleu

    whole, single = Bleu(4).compute_score(*_coco(refs, texts), verbose=0)
    return {f"bleu_{n + 1}": (whole[n], list(single[n])) for n in range(4)}


def _cider(refs: list[list[str]], texts: list[str]) -> Found:
    from pycocoevalcap.cider.cider import Cider

    whole, single = Cider().compute_score(*_coco(refs, texts))
    return {"cider": (float(whole), list(single))}


def _rouge_l(refs: list[list[str]], texts: list[str]) -> Found:
    from pycocoevalcap.rouge.rouge import Rouge

    whole, single = Rouge().compute_score(*_coco(refs, texts))
    return {"rouge_l": (float(whole), list(single))}


def _rouge(refs: list[list[str]], texts: list[str], seed: int | None) -> Found:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

    class Remembering(Tokenizer):
        """The stemming tokeniser; texts that come again are not stemmed again."""

        tokenize = staticmethod(functools.lru_cache(maxsize=4096)(DefaultTokenizer(True).tokenize))

    scorer = RougeScorer(list(ROUGE_TYPES), tokenizer=Remembering())
    rows = [scorer.score_multi(row, text) for row, text in zip(refs, texts)]
    single = {name: np.array([row[name].fmeasure for row in rows]) for name in ROUGE_TYPES}
    found: Found = {name: (float(values.mean()), values.tolist()) for name, values in single.items()}
    if seed is not None:
        random = np.random.RandomState(seed)
        for name, values in single.items():
            found[f"{name}_median"] = (_bootstrap_median(values, random), [])
    return found


def _bootstrap_median(values: np.ndarray, random: np.random.RandomState) -> float:
    """Median over resamples of their means, in rouge-score's order of draws."""
    count = np.arange(len(values))
    means = [values[random.choice(count, size=len(values))].mean() for _ in range(BOOTSTRAP_ROUNDS)]
    return float(np.percentile(means, 50))


def _meteor(refs: list[list[str]], texts: list[str]) -> Found:
    with Meteor() as running:
        return {"meteor": running.score(refs, texts)}


def _spice(refs: list[list[str]], texts: list[str]) -> Found:
    return {"spice": spice(refs, texts)}


_COMPUTE = {"bleu": _bleu, "cider": _cider, "rouge_l": _rouge_l, "meteor": _meteor, "spice": _spice}


# ---------------------------------------------------------------- short answers


_WORDS = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
)
_NUMBERS = {word: str(number) for number, word in enumerate(_WORDS.split())}


def normalise_answer(text: str) -> str:
    """Beyond the published comparison: without the final period, number words up to twenty as digits."""
    text = text.strip().rstrip(".").strip()
    return re.sub(r"[a-z]+", lambda match: _NUMBERS.get(match[0], match[0]), text.lower())


def vqa_accuracy(
    questions: Sequence[Question], predictions: Mapping[int, str], normalise: bool = False
) -> dict[str, Any]:
    """Accuracy of short answers: equal after lower-casing and stripping; missing ones are wrong.

    Args:
        questions: with their answers (of several, any counts). predictions: by question id; others' ids are
            ignored.
        normalise: compare `normalise_answer` of both instead.

    Returns:
        {"per_category": {name: {"correct", "total", "accuracy"}} in order of the names,
        "overall": over all questions, "average": mean over categories, "correct", "total"}, in 0..1.
    """
    if not questions:
        raise ValueError("no question to be scored")

    def same(text: str) -> str:
        return normalise_answer(text) if normalise else text.strip().lower()

    tally: dict[str, list[int]] = {}
    for question in questions:
        given = predictions.get(question.question_id)
        right = given is not None and same(given) in {same(answer) for answer in question.answers}
        row = tally.setdefault(question.category or "all", [0, 0])
        row[0] += right
        row[1] += 1
    per_category = {
        name: {"correct": right, "total": total, "accuracy": right / total}
        for name, (right, total) in sorted(tally.items())
    }
    correct, total = (sum(row[k] for row in tally.values()) for k in (0, 1))
    average = sum(row["accuracy"] for row in per_category.values()) / len(per_category)
    return {
        "per_category": per_category,
        "overall": correct / total,
        "average": average,
        "correct": correct,
        "total": total,
    }
