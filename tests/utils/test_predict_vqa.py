"""Captions and answers in words: batches, kills, processes, checkpoints, pictures that cannot be read."""

import json
import multiprocessing
import random
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from model.checkpoint import save_base
from model.layouts import Layout
from tests.tiny_lisat import tiny_model, tiny_processor, tiny_tokenizer, write_checkpoint
from utils.config import ConfigError, parse_config
from utils.predict_vqa import PredictVqaConfig, own_conv_type, run

PROMPTS = ("Describe the red ship.", "Is there a tank?\nAnswer the question using a single word or phrase.")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("vqa") / "model")


def write_questions(folder: Path, pictures: int, per_picture: int = 2, name: str = "UCM-Captions") -> Path:
    """Pictures in `folder`/imgs and `folder`/<name>.jsonl."""
    rng = np.random.default_rng(0)
    (folder / "imgs").mkdir(parents=True, exist_ok=True)
    lines = []
    for k in range(pictures):
        picture = rng.integers(0, 255, (30 + k % 3, 40, 3)).astype(np.uint8)
        cv2.imwrite(str(folder / "imgs" / f"{k}.tif"), picture)
        for n in range(per_picture):
            row = {
                "question_id": len(lines),
                "image": f"imgs/{k}.tif",
                "text": PROMPTS[(k + n) % 2] + "?" * n,
            }
            lines.append(json.dumps(row | {"answer": ["a ship"], "category": "caption"}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"), 12).parent


@pytest.fixture
def make(checkpoint: Path, data: Path, tmp_path: Path):
    def config(**values: object) -> PredictVqaConfig:
        base = dict(pretrained_model_path=str(checkpoint), question_files=(str(data),), device="cpu")
        base |= dict(dataset_base=str(data), out_dir=str(tmp_path / "out"), max_new_tokens=6, batch_size=4)
        return PredictVqaConfig(**(base | values))

    return config


def answers(folder: Path, name: str = "lisat_ucm") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_answers_in_the_published_form(make, tmp_path: Path, data: Path) -> None:
    said = run(make())
    rows = answers(tmp_path / "out")
    asked = [json.loads(line) for line in (data / "UCM-Captions.jsonl").read_text().splitlines()]
    assert "24 answers in" in said and [row["question_id"] for row in rows] == list(range(24))
    assert [row["prompt"] for row in rows] == [row["text"] for row in asked]
    assert {tuple(row) for row in rows} == {("question_id", "round_id", "prompt", "text", "metadata")}
    assert len({row["text"] for row in rows}) > 3
    single = make(batch_size=1, out_dir=str(tmp_path / "single"), workers=0)
    run(single)
    assert answers(tmp_path / "single") == rows  # batching changes no answer
    before = (tmp_path / "out" / "lisat_ucm.jsonl").stat().st_mtime_ns
    run(make())  # nothing is left to be done
    assert (tmp_path / "out" / "lisat_ucm.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="max_new_tokens: 6 there, 5 here"):
        run(make(max_new_tokens=5))
    run(make(max_new_tokens=5, restart=True, limit=3))
    assert len(answers(tmp_path / "out")) == 3


def test_killed_runs_end_in_the_same_file(make, tmp_path: Path) -> None:
    whole = make(out_dir=str(tmp_path / "whole"), batch_size=2)
    run(whole)
    expected = (tmp_path / "whole" / "lisat_ucm.jsonl").read_bytes()
    rng = random.Random(2)
    process = multiprocessing.get_context("fork").Process
    killed = 0
    for trial in range(2):
        config = make(out_dir=str(tmp_path / f"killed{trial}"), batch_size=2)
        part = Path(config.out_dir) / "lisat_ucm.jsonl.0_of_1.part"
        seen = 0
        for _ in range(2):
            target = seen + rng.randint(2, 4)
            child = process(target=run, args=(config,))
            child.start()
            while child.is_alive():
                seen = part.read_bytes().count(b"\n") if part.exists() else 0
                if seen >= target:
                    time.sleep(rng.random() * 0.03)
                    child.kill()
                    break
                time.sleep(0.001)
            child.join()
            killed += child.exitcode == -9
        if not (Path(config.out_dir) / "lisat_ucm.jsonl").exists():
            left = part.read_bytes()
            part.write_bytes(left[: len(left) - rng.randint(0, 30)])  # and a torn last line
        run(config)
        assert (Path(config.out_dir) / "lisat_ucm.jsonl").read_bytes() == expected
        assert not list(Path(config.out_dir).glob("*.part"))
    assert killed == 4


def test_processes_share_the_work(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make(out_dir=str(tmp_path / "whole")))
    parts = make(out_dir=str(tmp_path / "parts"), world_size=3)
    assert "batches of others are missing" in run(make(**vars(parts) | {"process_num": 2}))
    for rank in ("1", "0"):  # then two, by a launcher
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        said = run(make(out_dir=str(tmp_path / "parts")))
    assert "24 answers in" in said
    one, two = (tmp_path / name / "lisat_ucm.jsonl" for name in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ValueError, match="drop the flag"):
        run(make(world_size=3))


def test_base_without_masks_and_several_files(make, tmp_path: Path, data: Path) -> None:
    pair = tmp_path / "q"
    write_questions(pair, 2, 1)
    write_questions(pair, 3, 1, "RSVQA_LR")
    base = save_base(tiny_model(), tmp_path / "base", tokenizer=tiny_tokenizer(), processor=tiny_processor())
    config = make(
        pretrained_model_path=str(base), question_files=(str(pair),), dataset_base=str(tmp_path / "no")
    )
    said = run(config)  # pictures beside the question file
    assert len(answers(tmp_path / "out")) == 2 and len(answers(tmp_path / "out", "lisat_rsvqa")) == 3
    assert "2 answers" in said and "3 answers" in said
    whole = make(question_files=(str(pair),), dataset_base=str(pair), out_dir=str(tmp_path / "lisat"))
    run(whole)
    assert answers(tmp_path / "lisat") == answers(tmp_path / "out")
    named = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    run(make(question_files=(str(pair),), dataset_base=str(pair), answers_files=named))
    assert answers(tmp_path, "b") == answers(tmp_path / "lisat")
    with pytest.raises(ValueError, match="names 1 files for 2"):
        run(make(question_files=(str(pair),), answers_files=named[:1]))
    with pytest.raises(ValueError, match="would both be answered"):
        run(make(question_files=(str(pair), str(pair))))
    with pytest.raises(ValueError, match="is a question file"):
        run(make(question_files=named[:1], answers_files=named[:1]))
    with pytest.raises(ValueError, match="no question file"):
        run(make(question_files=(str(tmp_path / "none"),)))


def test_unreadable_pictures(make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_questions(tmp_path / "q", 5)
    here = dict(question_files=(str(path),), dataset_base=str(path.parent))
    (path.parent / "imgs" / "3.tif").write_bytes(b"II*\0 no picture")
    with pytest.raises(ValueError, match=r"UCM-Captions.jsonl:7: field image: .*3.tif .*--skip_unreadable"):
        run(make(**here))
    (path.parent / "imgs" / "1.tif").unlink()
    with pytest.raises(ValueError, match=r"1 of 5 pictures are not there \(imgs/1.tif\)"):
        run(make(**here))
    said = run(make(**here, skip_unreadable=True))
    assert "8 answers in" in said  # those about 1.tif were given while it was there, and are kept
    here["out_dir"] = str(tmp_path / "new")
    said = run(make(**here, skip_unreadable=True))
    assert "6 answers in" in said and "4 questions left out" in said and "3.tif" in caplog.text
    assert [row["question_id"] for row in answers(tmp_path / "new")] == [0, 1, 4, 5, 8, 9]
    skipped = json.loads((tmp_path / "new" / "lisat_ucm.run.json").read_text())["skipped"]
    assert [row["question_id"] for row in skipped] == [2, 3, 6, 7] and "1.tif" in skipped[0]["reason"]


def test_padding_and_template_are_part_of_a_run(make, tmp_path: Path) -> None:
    run(make())
    padded = make(image_aspect_ratio="pad", out_dir=str(tmp_path / "padded"))
    run(padded)
    assert answers(tmp_path / "padded") != answers(tmp_path / "out")
    with pytest.raises(ValueError, match="pad: True there, False here"):
        run(make(out_dir=str(tmp_path / "padded")))
    with pytest.raises(ValueError, match="conv_type other is unknown"):
        run(make(conv_type="other"))
    assert own_conv_type(Layout("published", {})) == "vicuna_v1"
    assert own_conv_type(Layout("published_base", {})) == "llava_v1"
    assert own_conv_type(Layout("lisat", {"conv_type": "llava_llama_2"})) == "llava_llama_2"


def test_faults_are_listed_together() -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(PredictVqaConfig, ["--batch_size", "0", "--process_num", "2", "--max_new_tokens", "-1"])
    assert len(error.value.faults) == 3
