"""The LISAT benchmarks at tiny size: both paths agree, and a path that does not is caught."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from benchmarks import baseline, lisat_cache, lisat_eval, lisat_train, workload
from benchmarks.measure import BenchmarkConfig, Report, Timing, interleaved, peak_memory, ratios
from tests.conftest import REPO
from utils import embedding_cache

TINY = BenchmarkConfig(tiny=True, images=2, repeats=1)
RUNS = pytest.mark.parametrize("run", [lisat_eval.run, lisat_train.run], ids=["eval", "train"])


@RUNS
def test_both_paths_agree(run: Callable[[BenchmarkConfig], Report]) -> None:
    report = run(TINY)
    assert report.equal, "\n".join(report.lines)
    assert any("straightforward / ours: CPU" in line for line in report.lines)


@RUNS
def test_a_wrong_path_is_caught(
    run: Callable[[BenchmarkConfig], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = baseline.draw
    monkeypatch.setattr(baseline, "draw", lambda *args: draw(*args) + 1e-3)
    assert not run(TINY).equal


def test_answers_are_fixed_and_questions_have_masks_of_their_own() -> None:
    work = workload.build(workload.tiny(), images=2)
    ids, real = work.padded(work.prompts)
    answers = work.model.evaluate(
        work.images_clip, work.images, ids, work.shapes, 16, offset=work.offset, attention_masks=real
    )
    assert [a.new_ids for a in answers] == [list(workload.ANSWER)] * 6
    masks = [a.mask_logits for a in answers]
    for a in range(6):
        for b in range(a):
            assert float((masks[a] - masks[b]).abs().max()) > 10 * lisat_eval.TOLERANCE


def test_mid_size_keeps_proportions_of_the_full_model() -> None:
    with torch.device("meta"):
        model = workload.Lisat(workload.mid_size())
    config = model.config
    assert config.num_image_features == 256
    llm, head = model.llm.model.layers, model.llm.lm_head

    def size(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert 0.01 < size(head) / size(llm) < 0.04
    prompt = 2 * size(llm) * (workload.SYSTEM_TOKENS + 256 + 28)
    encoder = 2 * size(model.sam.image_encoder.blocks) * config.sam.grid_size**2
    assert 0.8 < encoder / prompt < 1.6


def test_interleaved_takes_turns_and_ratios_divide() -> None:
    order: list[str] = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "a", "b"] and all(len(t.wall) == len(t.cpu) == 2 for t in timings.values())
    found = ratios(Timing([4, 6, 8], [9, 3, 6]), Timing([1, 2, 3], [3, 3, 3]))
    assert found == {"cpu_median": 2, "cpu_min": 1, "wall_median": 3, "wall_min": 4}


def test_peak_memory_sees_what_a_path_allocates() -> None:
    _, added = peak_memory(lambda: torch.ones(2**24))
    assert 60 < added < 90
    with pytest.raises(RuntimeError, match="ended with code"):
        peak_memory(lambda: sys.exit(3))


@pytest.mark.parametrize("script", ["lisat_eval.py", "lisat_train.py"])
def test_help_names_the_flags(script: str) -> None:
    command = [sys.executable, REPO / "benchmarks" / script, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--tiny" in done.stdout and "--repeats" in done.stdout


def test_cached_embeddings_are_those_of_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    report = lisat_cache.run(TINY)
    assert report.equal and "ms of CPU" in report.lines[0]
    replace = embedding_cache.EmbeddingCache._one
    monkeypatch.setattr(
        embedding_cache.EmbeddingCache, "_one", lambda self, image: replace(self, image) + 1e-3
    )
    assert not lisat_cache.run(TINY).equal
