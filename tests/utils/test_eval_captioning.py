"""eval_captioning: files to tables, several data sets at once, protocols kept apart."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from utils.caption_report import read_run
from utils.config import ConfigError, parse_config
from utils.eval_captioning import EvalCaptioningConfig, run

CAPTIONS = {0: ["A ship at a pier .", "One ship ."], 1: ["Two tanks on sand .", "There are two tanks ."]}
FAST = ("bleu", "cider", "rouge_l")


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folders `questions` (captions and answers) and `model_a`."""
    captions = [
        {"question_id": k, "image": f"{k}.tif", "text": "?", "answer": v, "category": "caption"}
        for k, v in CAPTIONS.items()
    ]
    answers = [
        {"question_id": k, "image": "0.tif", "text": "?", "answer": a, "category": c}
        for k, (a, c) in enumerate([("yes", "presence"), ("2", "count"), ("no", "presence")])
    ]
    lines(tmp_path / "questions" / "UCM-Captions.jsonl", captions)
    lines(tmp_path / "questions" / "RSVQA_LR.jsonl", answers)
    predict(tmp_path / "model_a" / "lisat_ucm.jsonl", {0: "A ship at a pier .", 1: "Two tanks ."})
    predict(tmp_path / "model_a" / "lisat_rsvqa.jsonl", {0: "Yes", 1: "two", 7: "?"})
    return tmp_path


def predict(path: Path, texts: dict[int, str]) -> Path:
    return lines(
        path,
        [
            {"question_id": k, "round_id": 0, "prompt": "?", "text": t, "metadata": {}}
            for k, t in texts.items()
        ],
    )


def config(data: Path, **values: object) -> EvalCaptioningConfig:
    base = dict(answers=(str(data / "questions"),), predictions=(str(data / "model_a"),), metrics=FAST)
    return EvalCaptioningConfig(**(base | values))


def test_folders_to_tables(data: Path) -> None:
    text, complete = run(config(data, per_caption=True, rouge_seed=1, metrics=(*FAST, "rouge")))
    assert complete and "protocol `raw`" in text and "protocol `exact`" in text
    vqa, captions = read_run(data / "model_a" / "results_raw_exact.json")
    assert (captions["model"], captions["dataset"], captions["protocol"]) == (
        "model_a",
        "UCM-Captions",
        "raw",
    )
    assert captions["scores"]["bleu_1"] > 0.5 and "rougeL_median" in captions["scores"]
    assert (
        vqa["scores"]["presence"] == 0.5
        and vqa["scores"]["count"] == 0
        and vqa["missing"] == vqa["extra"] == 1
    )
    table = list(csv.DictReader(io.StringIO((data / "model_a" / "results_raw_exact.csv").read_text())))
    assert table[1]["bleu_4"] == f"{captions['scores']['bleu_4']:.6f}" and table[1]["protocol"] == "raw"
    assert table[0]["bleu_4"] == "" and table[0]["average"] == "0.250000"
    markdown = (data / "model_a" / "results_raw_exact.md").read_text()
    assert f"| {100 * captions['scores']['cider']:.2f} |" in markdown and markdown in text
    single = [
        json.loads(line) for line in (data / "model_a" / "UCM-Captions_raw.jsonl").read_text().splitlines()
    ]
    assert [row["question_id"] for row in single] == [0, 1] and single[0]["rouge_l"] == 1


def test_missing_ids_stop_captions_and_count_as_wrong_answers(data: Path) -> None:
    predict(data / "model_a" / "lisat_ucm.jsonl", {1: "Two tanks .", 5: "x"})
    text, complete = run(config(data))
    assert not complete and "not scored: UCM-Captions" in text and "without a prediction (0)" in text
    assert [row["task"] for row in read_run(data / "model_a" / "results_exact.json")] == ["vqa"]
    text, complete = run(config(data, partial=True))
    assert complete and "| 1 of 2 |" in text
    with pytest.raises(ValueError, match="lisat_ucm.jsonl: 1 questions without"):
        run(config(data, answers=(str(data / "questions" / "UCM-Captions.jsonl"),)))
    predict(data / "model_a" / "lisat_ucm.jsonl", {9: "x"})
    with pytest.raises(ValueError, match="none of its ids"):
        run(config(data, answers=(str(data / "questions" / "UCM-Captions.jsonl"),), partial=True))


def test_protocols_never_meet(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from utils import captioning

    run(config(data))
    monkeypatch.setattr(
        captioning, "ptb_tokenise", lambda texts: [t.lower().replace(" .", "") for t in texts]
    )
    text, _ = run(config(data, protocol="ptb", vqa_normalise=True))
    assert (
        "protocol `ptb`" in text and "protocol `normalised`" in text and "raw" not in text.split("written")[0]
    )
    raw, ptb = (data / "model_a" / f"results_{name}.json" for name in ("raw_exact", "ptb_normalised"))
    assert read_run(raw)[1]["scores"]["bleu_4"] != read_run(ptb)[1]["scores"]["bleu_4"]
    merged = dict(out_dir=str(data / "both"))
    with pytest.raises(ValueError, match="different protocols cannot stand in one table: raw .*, ptb"):
        captions = [row for row in read_run(raw) + read_run(ptb) if row["task"] == "caption"]
        body = {"format": "lisat-captioning", "version": 1, "rows": captions}
        (data / "mixed.json").write_text(json.dumps(body))
        run(config(data, merge=(str(data / "mixed.json"),), **merged))
    with pytest.raises(ValueError, match="different protocols"):
        run(config(data, merge=(str(raw), str(ptb)), **merged))
    assert not (data / "both").exists()
    predict(data / "model_b" / "ucm.jsonl", {0: "A ship .", 1: "Two ships ."})
    run(config(data, predictions=(str(data / "model_b"),)))
    text, _ = run(config(data, merge=(str(raw), str(data / "model_b" / "results_raw.json")), **merged))
    assert "| model_a | UCM" in text and "| model_b | UCM" in text
    with pytest.raises(ValueError, match="no captioning results"):
        run(config(data, merge=(str(lines(data / "x.json", [{}])),), **merged))


def test_kinds_of_files(data: Path) -> None:
    path = data / "questions" / "RSVQA_LR.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines(path, [rows[0], rows[1] | {"answer": ["2", "two"]}, rows[2]])
    one = dict(answers=(str(path),), predictions=(str(data / "model_a" / "lisat_rsvqa.jsonl"),))
    with pytest.raises(ValueError, match="line 1: category 'presence'.*give --task"):
        run(config(data, **one))
    run(config(data, **one, task="vqa"))
    assert read_run(data / "model_a" / "results_exact.json")[0]["counts"]["count"]["correct"] == 1
    lines(path, [row | {"category": "overall"} for row in rows])
    with pytest.raises(ValueError, match="'overall' is the name of a score"):
        run(config(data, **one))


def test_command_line(data: Path) -> None:
    command = [sys.executable, str(REPO / "eval_captioning.py")]
    flags = [
        "--answers",
        str(data / "questions"),
        "--predictions",
        str(data / "model_a"),
        "--metrics",
        "bleu",
    ]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0 and "BLEU-4" in done.stdout, done.stderr
    (data / "model_a" / "lisat_ucm.jsonl").write_text("{\n")
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 1 and "lisat_ucm.jsonl:1: not valid JSON" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr and "overall" in done.stdout
    with pytest.raises(ConfigError) as error:
        parse_config(EvalCaptioningConfig, ["--merge", "a.json", "--rouge_seed", "-1"])
    assert len(error.value.faults) == 2
