"""Reading counts out of replies: repair and schema (the published rule is in tests/golden)."""

import pytest

from utils.instructsam_reply import ReplyError, checked_counts, read_reply, repaired_object


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("{'car': 3}", {"car": 3}),
        ('{"car": 3,}', {"car": 3}),
        ('{"car": 3, // parked\n # more\n "bus": /* two */ 2}', {"car": 3, "bus": 2}),
        ("```json\n{car: 1, storage tank: 2}\n```", {"car": 1, "storage tank": 2}),
        ('{"car": 1} and {"bus": 2}', {"car": 1, "bus": 2}),
        ('first {"car": 1}, then {"car": 4}', {"car": 4}),
        ('I count {about} five: {"car": 5}', {"car": 5}),
        ('{"car": 1\n "bus": 2}', {"car": 1, "bus": 2}),
        ('[{"car": 1}, {"bus": 2}]', {"car": 1, "bus": 2}),
        ("{\u201ccar\u201d: 2}", {"car": 2}),
        (r'{"a\"b": 1, "d\u00e9p\u00f4t": 2}', {'a"b': 1, "dépôt": 2}),
        ('{"a": [1, {"b": 2},], "c": None}', {"a": [1, {"b": 2}], "c": None}),
        ('{"x": 12 }\n\n{"note"}', {"x": 12}),
        ("{}", {}),
    ],
)
def test_repair_reads(reply: str, found: dict) -> None:
    assert repaired_object(reply) == found


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no braces",
        '{"car": 1',
        '{"car": 1, "sh',
        '{"a": 1} {"b": 2, "c"',
        '{"a": {"b": 2}, oops}',
        '{"a": {"b": oops!, "c": {"d": 2}}}',
        "{1 2 3}",
        "{" * 200,
        '{"a":' * 200 + "1" + "}" * 200,
        '{"a": 1 "b": 2}',
        '{"a\\u00',
    ],
)
def test_repair_refuses_what_could_lose_counts(reply: str) -> None:
    with pytest.raises(ReplyError):
        repaired_object(reply)


def test_a_nested_part_is_never_taken_for_the_whole() -> None:
    with pytest.raises(ReplyError, match="whole numbers"):
        read_reply("{'total': {'car': 2}}", repair=True)


def test_schema_coerces_whole_numbers_only() -> None:
    assert checked_counts({"car": "3", " bus ": 2.0, "ship": 0}) == {"car": 3, "bus": 2, "ship": 0}
    for value in (-1, 2.5, "few", None, True, float("nan"), float("inf"), [1], {"a": 1}):
        with pytest.raises(ReplyError, match="car"):
            checked_counts({"car": value})
    with pytest.raises(ReplyError, match="empty"):
        checked_counts({"  ": 1})


def test_repair_is_only_done_when_asked_for() -> None:
    with pytest.raises(ReplyError, match="no valid JSON"):
        read_reply("{'car': 3}")
    assert read_reply("{'car': 3}", repair=True) == {"car": 3}
    assert read_reply('{"car": null}', unchecked=True) == {"car": None}


def test_depth_and_length_end_in_a_refusal() -> None:
    with pytest.raises(ReplyError):
        read_reply('{"a":' * 100_000 + "1" + "}" * 100_000, repair=True)
    with pytest.raises(ReplyError):
        read_reply('{"a": ' + "9" * 10_000 + "}")
