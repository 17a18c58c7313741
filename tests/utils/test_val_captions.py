"""Captions during training: what is logged, shared by processes, and refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.lora import add_lora
from tests.tiny_lisat import tiny_model, tiny_processor, tiny_tokenizer, write_checkpoint
from tests.utils.test_predict_vqa import answers, write_questions
from utils.caption_files import read_questions
from utils.captioning import score_captions
from utils.config import ConfigError, checked
from utils.distributed import World
from utils.predict_vqa import PredictVqaConfig, run
from utils.train_lisat_config import TrainLisatConfig
from utils.val_captions import CaptionValidation


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "q", 4)


@pytest.fixture
def config(questions: Path) -> TrainLisatConfig:
    return TrainLisatConfig(val_caption=str(questions), val_caption_tokens=5, val_caption_batch=2)


def open_captions(config: TrainLisatConfig) -> CaptionValidation:
    return CaptionValidation(config, tiny_tokenizer(), tiny_processor())


def test_figures_are_those_of_the_separate_programs(
    config: TrainLisatConfig, questions: Path, tmp_path: Path
) -> None:
    model = tiny_model()
    engine = SimpleNamespace(ds=SimpleNamespace(module=model), world=World())
    found = open_captions(config)(engine)
    assert set(found) == {f"ucm_bleu{n}" for n in range(1, 5)} | {"ucm_cider"}
    checkpoint = write_checkpoint(tmp_path / "model")
    settings = dict(pretrained_model_path=str(checkpoint), question_files=(str(questions),), device="cpu")
    run(PredictVqaConfig(**settings, out_dir=str(tmp_path), max_new_tokens=5, batch_size=2))
    texts = {row["question_id"]: row["text"] for row in answers(tmp_path)}
    references = {q.question_id: q.answers for q in read_questions(questions, answers=True)}
    expected = score_captions(references, texts, metrics=("bleu", "cider")).scores
    assert found["ucm_bleu1"] == pytest.approx(100 * expected["bleu_1"])
    assert found["ucm_cider"] == pytest.approx(100 * expected["cider"])
    add_lora(model, 2, 4.0, 0.5, ["q_proj"])
    again = open_captions(config)(engine)  # fresh LoRA changes nothing, nor does its dropout
    assert again == found and not model.training


def test_processes_share_the_questions(config: TrainLisatConfig) -> None:
    model, captions = tiny_model(), open_captions(replace(config, val_caption_limit=5))
    whole = captions.answers("ucm", model, World())
    assert sorted(whole) == [0, 1, 2, 3, 4]
    shares: list[dict[int, str]] = []
    for rank in range(2):
        world = SimpleNamespace(rank=rank, size=2, gather=lambda value: shares.append(value) or [value])
        captions.answers("ucm", model, world)
    assert not set(shares[0]) & set(shares[1]) and shares[0] | shares[1] == whole


def test_plain_captions_ask_nothing(config: TrainLisatConfig) -> None:
    captions = open_captions(replace(config, conv_type="plain"))
    assert {question.text for question in captions.files["ucm"][0]} == {""}
    assert captions.figures(tiny_model(), World())["ucm_bleu1"] >= 0


def test_faults(config: TrainLisatConfig, questions: Path) -> None:
    with pytest.raises(ValueError, match="a second file of the name 'ucm'"):
        open_captions(replace(config, val_caption=f"{questions}||{questions}"))
    published = replace(config, val_caption="published")
    assert [Path(p).stem for p in published.caption_files()] == [
        "NWPU-Captions",
        "Sydney-Captions",
        "UCM-Captions",
    ]
    with pytest.raises(ValueError, match="NWPU-Captions.jsonl: .* nothing is there"):
        open_captions(published)
    (questions.parent / "imgs" / "2.tif").write_bytes(b"x")
    assert open_captions(config).answers("ucm", tiny_model(), World())[4] == ""
    (questions.parent / "imgs" / "2.tif").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 pictures are not there \(imgs/2.tif\)"):
        open_captions(config)
    with pytest.raises(ConfigError) as error:
        checked(replace(config, zero_stage=3, no_eval=True))
    text = str(error.value)
    assert "--val_caption needs --zero_stage 0, 1 or 2" in text and "--no_eval switches off" in text
