"""Scores of captions and answers against plain formulas, and what they refuse."""

import math
from collections import Counter

import pytest

from utils.caption_files import Question
from utils.captioning import normalise_answer, score_captions, vqa_accuracy

REFERENCES = {
    3: ["a white ship lies at the long pier", "one white ship is moored here"],
    1: ["two round tanks stand on bare ground", "there are two tanks"],
    7: ["many cars are parked beside a road near a mall", "cars on a parking lot ."],
}
PREDICTIONS = {
    7: "many cars on a parking lot .",
    1: "two round tanks",
    3: "a white ship is moored at the pier",
}


def plain_bleu(references: dict[int, list[str]], predictions: dict[int, str], order: int) -> float:
    """Corpus BLEU of Papineni et al. (2002) with the closest reference length, ties to the shorter."""
    right, tried, length, reference_length = [0] * order, [0] * order, 0, 0
    for key, refs in references.items():
        words, rows = predictions[key].split(), [ref.split() for ref in refs]
        length += len(words)
        reference_length += min((abs(len(row) - len(words)), len(row)) for row in rows)[1]
        for n in range(1, order + 1):
            grams = Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))
            most: Counter = Counter()
            for row in rows:
                most |= Counter(tuple(row[k : k + n]) for k in range(len(row) - n + 1))
            right[n - 1] += sum((grams & most).values())
            tried[n - 1] += sum(grams.values())
    mean = math.exp(sum(math.log(r / t) for r, t in zip(right, tried)) / order)
    return mean * min(1.0, math.exp(1 - reference_length / length))


def test_bleu_and_rouge_l_against_formulas() -> None:
    found = score_captions(REFERENCES, PREDICTIONS, metrics=["bleu", "rouge_l"])
    assert found.ids == [1, 3, 7] and found.protocol == "raw"
    for n in range(1, 5):
        expected = plain_bleu(REFERENCES, PREDICTIONS, n)
        assert found.scores[f"bleu_{n}"] == pytest.approx(expected, abs=1e-6)
    precision, recall = max(3 / 3, 2 / 3), max(3 / 7, 2 / 4)  # of id 1: each the best over the references
    f = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert found.single["rouge_l"][0] == pytest.approx(f)


def test_captions_equal_to_their_only_reference_are_perfect() -> None:
    single = {key: refs[:1] for key, refs in REFERENCES.items()}
    found = score_captions(
        single, {k: v[0] for k, v in single.items()}, metrics=["bleu", "cider", "rouge_l", "rouge"]
    )
    assert found.scores["cider"] == pytest.approx(10) and found.scores["bleu_4"] == pytest.approx(1)
    assert found.scores["rouge_l"] == found.scores["rougeLsum"] == pytest.approx(1)
    one = score_captions({3: REFERENCES[3]}, {3: PREDICTIONS[3]}, metrics=["cider"])
    assert one.scores["cider"] == 0  # no document frequency from one picture


def test_raw_means_raw() -> None:
    upper = {key: text.upper() for key, text in PREDICTIONS.items()}
    found = score_captions(REFERENCES, upper, metrics=["bleu", "rouge"])
    same = score_captions(REFERENCES, PREDICTIONS, metrics=["bleu", "rouge"])
    assert found.scores["bleu_1"] < 0.1 < same.scores["bleu_1"]
    assert found.scores["rouge1"] == same.scores["rouge1"]  # rouge-score has its own lower case and stems


def test_rouge_resampling_needs_a_seed_and_repeats() -> None:
    words = "a white ship lies at one long pier near many tanks".split()
    references = {k: [" ".join(words)] for k in range(10)}
    texts = {k: " ".join(words[: k + 1]) for k in range(10)}
    plain = score_captions(references, texts, metrics=["rouge"])
    assert not any("median" in name for name in plain.scores)
    one, two, other = (
        score_captions(references, texts, metrics=["rouge"], rouge_seed=seed).scores["rouge1_median"]
        for seed in (4, 4, 5)
    )
    assert one == two != other
    assert one == pytest.approx(plain.scores["rouge1"], abs=0.02)


def test_empty_predictions_score_nothing() -> None:
    found = score_captions(
        REFERENCES, dict.fromkeys(REFERENCES, ""), metrics=["bleu", "cider", "rouge_l", "rouge"]
    )
    assert all(value == pytest.approx(0, abs=1e-9) for value in found.scores.values())


def test_ids_must_be_equal_sets() -> None:
    with pytest.raises(ValueError, match=r"1 questions without a prediction \(7\) and 1 .* \(8\)"):
        score_captions(REFERENCES, {1: "a", 3: "b", 8: "c"})
    with pytest.raises(ValueError, match="no word is left"):
        score_captions({1: ["  "]}, {1: "a"}, metrics=["bleu"])
    with pytest.raises(ValueError, match="protocol 'coco' is unknown"):
        score_captions(REFERENCES, PREDICTIONS, "coco")
    with pytest.raises(ValueError, match="metrics bleu5 are unknown"):
        score_captions(REFERENCES, PREDICTIONS, metrics=["bleu5"])


def question(key: int, answer: str, category: str = "count") -> Question:
    return Question(key, "", "", (answer,), False, category, key)


def test_accuracy() -> None:
    questions = [question(0, "Two"), question(1, "3"), question(2, "yes", "presence"), question(3, "no", "")]
    given = {0: " tWo ", 1: "three.", 3: "no", 99: "yes"}
    found = vqa_accuracy(questions, given)
    assert {k: (v["correct"], v["total"]) for k, v in found["per_category"].items()} == {
        "all": (1, 1),
        "count": (1, 2),
        "presence": (0, 1),
    }
    assert found["overall"] == 0.5 and found["average"] == 0.5
    assert vqa_accuracy(questions, given, normalise=True)["per_category"]["count"]["correct"] == 2
    assert normalise_answer(" Twenty ships. ") == "20 ships" and normalise_answer("often") == "often"
    with pytest.raises(ValueError, match="no question"):
        vqa_accuracy([], {})
