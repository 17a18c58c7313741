"""Java programs: how they are found and called, and what is said where they are missing."""

import json
import sys
from pathlib import Path

import pytest

from utils import caption_java
from utils.caption_java import SPICE_JARS, Meteor, Unavailable, find_java, java_version, ptb_tokenise, spice
from utils.captioning import score_captions

STAND_IN = """#!{python}
import json, sys
from pathlib import Path
args = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + "\\n")
if args == ["-version"]:
    print('openjdk version "{version}" 2025-04-15', file=sys.stderr)
elif "edu.stanford.nlp.process.PTBTokenizer" in args:
    print(Path(args[-1]).read_text().lower(), end="")
elif "-stdio" in args:
    for line in sys.stdin:
        fields = line.rstrip("\\n").split(" ||| ")
        if fields[-1] == "die":
            sys.exit("out of memory")
        if fields[0] == "SCORE":
            print(len(fields) - 2, flush=True)
        else:
            values = [float(field) / 10 for field in fields[1:]]
            print(*values, sum(values) / len(values), sep="\\n", flush=True)
elif "edu.anu.spice.SpiceScorer" in args:
    items = json.loads(Path(args[args.index("-out") - 1]).read_text())
    scores = [dict(image_id=i["image_id"], scores=dict(All=dict(f=len(i["refs"]) / 10))) for i in items]
    Path(args[args.index("-out") + 1]).write_text(json.dumps(scores[::-1]))
"""


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a stand-in for java; returns a function that gives the calls it got."""
    log = tmp_path / "calls"

    def install(version: str = "17.0.15"):
        program = tmp_path / "java"
        text = STAND_IN.replace("{python}", sys.executable).replace("{log!r}", repr(str(log)))
        program.write_text(text.replace("{version}", version))
        program.chmod(0o755)
        monkeypatch.setenv("LISAT_JAVA", str(program))
        return lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return install


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("LISAT_JAVA", "JAVA_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_without_java_the_rest_goes_on(no_java: None, caplog: pytest.LogCaptureFixture) -> None:
    references = {0: ["a ship at a pier"], 1: ["two tanks on sand"]}
    predictions = {0: "a ship at a pier", 1: "two tanks"}
    found = score_captions(references, predictions)
    assert found.scores["bleu_1"] > 0.5 and found.scores["cider"] > 1 and "rouge1" in found.scores
    assert found.unavailable.keys() == {"meteor", "spice"}
    for text in found.unavailable.values():
        assert "needs Java" in text and "JAVA_HOME" in text and "LISAT_JAVA" in text
    assert "METEOR is left out" in caplog.text
    with pytest.raises(Unavailable, match="ptb protocol .* needs Java"):
        score_captions(references, predictions, "ptb")


def test_java_is_found_where_it_is_named(
    no_java: None, java, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    java()
    assert find_java("x") == str(tmp_path / "java")
    monkeypatch.setenv("LISAT_JAVA", str(tmp_path / "nowhere"))
    with pytest.raises(Unavailable, match="LISAT_JAVA=.*nowhere is no program"):
        find_java("x")
    monkeypatch.delenv("LISAT_JAVA")
    assert find_java("x") == str(tmp_path / "java")  # on PATH
    home = tmp_path / "jre" / "bin"
    home.mkdir(parents=True)
    (home / "java").symlink_to(tmp_path / "java")
    monkeypatch.setenv("JAVA_HOME", str(home.parent))
    assert find_java("x") == str(home / "java")


def test_versions(java) -> None:
    for text, number in (("1.8.0_101", 8), ("17.0.15", 17), ("21", 21)):
        java(text)
        assert java_version(find_java("x")) == number


def test_ptb_keeps_lines_together(java) -> None:
    calls = java()
    found = ptb_tokenise(["A Ship .", "", "two\nlines \u2028 here", " -- ; "])
    assert found == ["a ship", "", "two lines here", ""]
    assert "-Duser.language=en" in calls()[0] and "-lowerCase" in calls()[0]


def test_meteor_protocol(java) -> None:
    calls = java()
    with Meteor() as meteor:
        whole, single = meteor.score([["a", "b ||| c\nd"], ["x"]], ["h  h", ""])
        assert single == [0.2, 0.1] and whole == pytest.approx(0.15)
        assert meteor.score([["a"]], ["b"]) == (0.1, [0.1])
        with pytest.raises(Unavailable, match="ended .*out of memory"):
            meteor.score([["a"]], ["die"])
    (call,) = calls()
    assert "-Duser.country=US" in call and call[-4:] == ["-stdio", "-l", "en", "-norm"]


@pytest.mark.parametrize(("version", "opened"), [("17.0.1", True), ("1.8.0_101", False)])
def test_spice(java, version: str, opened: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = java(version)
    jars = tmp_path / "jars"
    monkeypatch.setenv("LISAT_SPICE_JARS", str(jars))
    with pytest.raises(Unavailable) as error:
        spice([["a"]], ["b"])
    assert all(jar in str(error.value) for jar in SPICE_JARS) and str(jars) in str(error.value)
    jars.mkdir()
    for jar in SPICE_JARS:
        (jars / jar).touch()
    assert spice([["a", "b"], ["c"]], ["d", "e"]) == (pytest.approx(0.15), [0.2, 0.1])
    call = calls()[-1]
    assert str(jars / "*") in call[call.index("-cp") + 1]
    assert ("--add-opens=java.base/java.lang=ALL-UNNAMED" in call) == opened


def test_missing_parts_of_the_package_are_named() -> None:
    with pytest.raises(Unavailable, match="meteor/none.jar is not in the pycocoevalcap package"):
        caption_java.package_file("meteor", "none.jar")
