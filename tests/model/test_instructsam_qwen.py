"""The local counter on a tiny random Qwen2.5-VL: shapes, padding, batches, the counting stage around it."""

import json
from pathlib import Path

import numpy as np
import pytest

from model.instructsam import qwen
from model.instructsam.qwen import QwenAnswer, QwenCounter, fit_picture, load_qwen
from tests.tiny_qwen import LARGEST, SMALLEST, write_tiny_qwen
from utils.instructsam_config import CountConfig
from utils.instructsam_count import run_count
from utils.visualize import write_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def counter(folder: Path) -> QwenCounter:
    return load_qwen(folder, min_pixels=SMALLEST, max_pixels=LARGEST)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_inputs_of_a_batch(counter: QwenCounter) -> None:
    inputs = counter.encode([picture(800, 800), picture(60, 90)], "How many ships?")
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8], [1, 4, 6]]
    assert tuple(inputs["pixel_values"].shape) == (64 + 24, 1176)
    image_token = counter.model.config.image_token_id
    assert (inputs["input_ids"] == image_token).sum(dim=1).tolist() == [16, 6]
    mask = inputs["attention_mask"]
    assert mask[0].all() and mask[1].sum() == mask.shape[1] - 10
    assert not mask[1, :10].any()  # padded on the left


def test_a_batch_answers_as_single_pictures_do(counter: QwenCounter) -> None:
    pictures = [picture(100, 120, 1), picture(300, 200, 2), picture(30, 200, 3)]
    together = counter.answer(pictures, "Count.", max_new_tokens=12)
    alone = [counter.answer([one], "Count.", max_new_tokens=12)[0] for one in pictures]
    assert together == alone
    assert len({answer.prompt_tokens for answer in together}) > 1
    for answer in together:
        assert answer.cut == (answer.new_tokens == 12)


def test_pictures_matter_and_sampling_runs(counter: QwenCounter) -> None:
    import torch

    inputs = [counter.encode([picture(100, 100, seed)], "Count.") for seed in (1, 2)]
    with torch.inference_mode():
        logits = [counter.model(**values).logits[0, -1] for values in inputs]
    assert not torch.allclose(logits[0], logits[1], atol=1e-6)
    answer = counter.answer([picture(100, 100)], "Count.", max_new_tokens=3, temperature=0.01)
    assert answer[0].new_tokens <= 3


def test_end_token_is_not_counted(counter: QwenCounter) -> None:
    import torch

    end = counter.processor.tokenizer.eos_token_id
    assert counter._lengths(torch.tensor([[5, end, 0], [5, 6, 7], [end, 0, 0]])) == [
        (1, True),
        (3, False),
        (0, True),
    ]


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((800, 800), (812, 812)),
        ((56, 84), (56, 84)),
        ((10, 10), (56, 56)),
        ((1000, 30), (1008, 28)),
        ((6000, 4000), (4368, 2912)),
    ],
)
def test_sides_become_multiples_of_28(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit_picture(np.zeros((*size, 3), np.uint8)).size == fitted[::-1]


def test_published_limits_of_the_area(folder: Path) -> None:
    counter = load_qwen(folder)
    grid = counter.encode([picture(800, 800)], "x")["image_grid_thw"]
    assert grid.tolist() == [[1, 58, 58]]  # 812 px, neither shrunk nor enlarged
    assert counter.encode([picture(60, 60)], "x")["image_grid_thw"].prod() * 14 * 14 >= 200704


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no Qwen2.5-VL"):
        load_qwen(tmp_path)


def test_counting_stage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k in range(3):
        write_image(tmp_path / "images" / f"{k}.png", picture(40, 50, k))
    (tmp_path / "images" / "3.png").write_bytes(b"no picture")
    texts = {"0": '{"ship": 2}', "1": "```json\n{}\n```", "2": "many ships"}
    seen: list[int] = []

    class Scripted(QwenCounter):
        """The tiny model, with the texts replaced (random weights write no JSON)."""

        def answer(self, pictures: list, *args: object, **options: object) -> list[QwenAnswer]:
            answers = super().answer(pictures, "Count.", 4)
            start = sum(seen)
            seen.append(len(pictures))
            return [
                QwenAnswer(texts[str(start + k)], a.prompt_tokens, a.new_tokens, False)
                for k, a in enumerate(answers)
            ]

    monkeypatch.setattr(qwen, "QwenCounter", Scripted)
    config = CountConfig(
        images=str(tmp_path / "images"),
        pretrained_model_name_or_path=str(folder),
        save_dir=str(tmp_path / "counts"),
        count_batch=2,
        device="cpu",
    )
    outcome = run_count(config)
    assert seen == [2, 1]
    assert json.loads((tmp_path / "counts" / "0.json").read_text()) == {"ship": 2}
    assert json.loads((tmp_path / "counts" / "1.json").read_text()) == {}
    assert [(item["image"], item["kind"]) for item in outcome.failures] == [
        ("2.png", "reply"),
        ("3.png", "picture"),
    ]
    report = json.loads((tmp_path / "counts_report.json").read_text())
    assert set(report["images"]) == {"0.png", "1.png", "2.png"} and report["failed"] == 2
