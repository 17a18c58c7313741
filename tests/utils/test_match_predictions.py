"""Which prediction answers which query: names, words, numbers, order, and everything that does not fit."""

from collections import Counter

import numpy as np
import pytest

from utils.match_predictions import Names, Picture, PredictionFile, Wanted, join_pictures
from utils.rle import encode_mask

CODE = encode_mask(np.zeros((4, 5), np.uint8))


def wanted(query: str, ref_id: int = 0, sent_id: int = 0, target: dict = CODE) -> Wanted:
    return Wanted(query, "", True, ref_id, sent_id, target, None, 0)


def picture(path: str, *queries: Wanted) -> Picture:
    return Picture(0, path, (4, 5), list(queries))


def answer(**fields: object) -> dict:
    return {"prediction": CODE, **fields}


def matched(pictures: list[Picture], images: list[tuple[str, list[dict]]], order: bool = False):
    records = [{"image": name, "queries": queries} for name, queries in images]
    answers, mismatches = PredictionFile(records, order).match(pictures)
    return answers, Counter(m.kind for m in mismatches), mismatches


def test_names() -> None:
    names = Names(["/data/a/0001.png", "/data/b/0001.png", "/data/b/x.y.jpg", "C:\\data\\last.tif"])
    assert names.find("0001.png") == [0, 1] and names.find("b/0001") == [1]
    assert names.find("/elsewhere/a/0001.png") == [0] and names.find("c/0001.png") == [0, 1]
    assert names.find("x.y") == [2] and names.find("x.y.png") == [2] and names.find("x.y.jpg") == [2]
    assert names.find("last") == [3] and names.find("last.jpg") == [3]
    assert names.find("other.png") == [] and names.find("") == []


def test_words_then_numbers_then_alone() -> None:
    first, second = answer(query="The red  SHIP"), answer(ref_id=0, sent_id=1)
    one = picture("a.png", wanted("the red ship"), wanted("the pier", 0, 1))
    alone = picture("b.png", wanted("where?"))
    answers, kinds, _ = matched([one, alone], [("a", [second, first]), ("b.jpg", [answer()])])
    assert answers[0] == [first, second] and answers[1][0] == answer() and not kinds


def test_prompts_that_hold_the_words() -> None:
    pictures = [picture("a.png", wanted("the ship"), wanted("the ship at the pier"))]
    long = answer(query="Segment the ship at the pier, please.")
    short = answer(query="Where is the ship?")
    answers, kinds, _ = matched(pictures, [("a.png", [long, short])])
    assert answers == [[short, long]] and not kinds


def test_same_words_twice_are_told_apart_by_numbers_or_order() -> None:
    other = encode_mask(np.ones((4, 5), np.uint8))
    pictures = [picture("a.png", wanted("ship", 3, 7), wanted("ship", 4, 8, other))]
    late, early = answer(query="ship", ref_id=4, sent_id=8), answer(query="ship", ref_id=3, sent_id=7)
    assert matched(pictures, [("a.png", [late, early])])[0] == [[early, late]]
    plain = [answer(query="ship", score=0.1), answer(query="ship", score=0.2)]
    assert matched(pictures, [("a.png", plain)], order=True)[0] == [plain]
    answers, kinds, _ = matched(pictures, [("a.png", plain)])
    assert answers == [[None, None]] and kinds == {"ambiguous": 2}
    pictures[0].queries[1] = wanted("ship", 4, 8)  # where the targets are the same it does not matter
    assert matched(pictures, [("a.png", plain)])[0] == [plain]


def test_order() -> None:
    pictures = [picture("a.png", wanted("one"), wanted("two"))]
    plain = [answer(score=0.1), answer(score=0.2), answer(score=0.3)]
    answers, kinds, _ = matched(pictures, [("a.png", plain)], order=True)
    assert answers == [plain[:2]] and kinds == {"extra": 1}
    answers, kinds, _ = matched(pictures, [("a.png", plain[:2])])
    assert answers == [[None, None]] and kinds == {"extra": 2, "missing": 2}


def test_everything_that_does_not_fit_is_named() -> None:
    pictures = [picture("a/1.png", wanted("one"), wanted("two")), picture("b/1.png", wanted("three"))]
    images = [
        ("a/1.png", [answer(query="one"), answer(query="one"), answer(query="five")]),
        ("1.png", [answer(query="three")]),
        ("c.png", [answer(query="x")]),
    ]
    answers, kinds, mismatches = matched(pictures, images)
    assert answers == [[None, None], [None]]
    assert kinds == {"duplicate": 1, "extra": 3, "missing": 2}
    text = "\n".join(map(str, mismatches))
    assert "1.png: may mean a/1.png, b/1.png" in text and "c.png: not in the data set" in text
    assert "duplicate: a/1.png ('one')" in text and "missing: a/1.png ('two')" in text


def test_one_entry_per_query_and_pictures_given_twice() -> None:
    joined = join_pictures(
        [picture("a.png", wanted("one")), picture("b.png"), picture("a.png", wanted("two"))]
    )
    assert [p.path for p in joined] == ["a.png", "b.png"]
    assert [q.query for q in joined[0].queries] == ["one", "two"]
    images = [("a.png", [answer(query="two")]), ("a.png", [answer(query="one")])]
    answers, kinds, _ = matched(joined, images)
    assert [a["query"] for a in answers[0]] == ["one", "two"] and not kinds


@pytest.mark.parametrize("count", [0, 1, 2])
def test_number_of_duplicates(count: int) -> None:
    images = [("a.png", [answer(query="one")] * (count + 1))]
    answers, kinds, _ = matched([picture("a.png", wanted("one"))], images)
    assert kinds["duplicate"] == count and (answers[0][0] is None) == (count > 0)
