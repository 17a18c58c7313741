"""The engine: exact resume after kills, SIGTERM, non-finite losses, ZeRO stages, processes, checkpoints."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.utils.toy_training import ToyConfig, finish, start
from utils.checkpointing import read_state, resolve_checkpoint
from utils.sampling import BatchPlan


def run(config: ToyConfig, ranks: int = 1, **arguments: Any) -> list[int]:
    return finish(start(config, ranks, **arguments))


def final(config: ToyConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run_dir) / "final.safetensors")


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def figures(config: ToyConfig) -> list[dict[str, Any]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    drop = ("images_per_second", "memory_gib")
    return [{key: value for key, value in json.loads(line).items() if key not in drop} for line in lines]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> ToyConfig:
    """A run that nobody interrupts."""
    config = ToyConfig(log_base_dir=str(tmp_path_factory.mktemp("runs")), exp_name="straight")
    assert run(config) == [0]
    return config


def test_run_directory(straight: ToyConfig) -> None:
    folder = Path(straight.run_dir)
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "train.log", "checkpoints"} <= names
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["effective_batch"] == 6 and environment["trainable_parameters"] == 89
    steps = [line["step"] for line in figures(straight) if line["split"] == "train"]
    assert steps == [3, 6, 9, 12]
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    state = read_state(resolve_checkpoint(folder))
    assert state["step"] == 12 and {"step-10", "step-12", f"step-{state['best_step']}"} == set(kept)
    assert read_state(resolve_checkpoint(folder / "checkpoints" / "best"))["step"] == state["best_step"]
    assert_identical(load_file(resolve_checkpoint(folder) / "trainable.safetensors"), final(straight))


def test_kill_anywhere_and_resume_is_the_same_run(straight: ToyConfig) -> None:
    """Killed -9 in mid-step and between any two file operations of saving, then continued."""
    rng = random.Random(time.time_ns())
    operations = int((Path(straight.run_dir) / "operations.txt").read_text())
    deaths = [{"deadly": rng.randint(1, 72)}, {"deadly": rng.randint(1, 72)}]
    deaths += [{"kill_at": rng.randint(1, operations)} for _ in range(4)]
    for number, death in enumerate(deaths):
        config = replace(straight, exp_name=f"killed-{number}", workers=0)
        assert run(config, **death) == [-signal.SIGKILL], death
        assert run(config) == [0], death
        assert_identical(final(config), final(straight))
        assert figures(config) == figures(straight), death
        assert not list((Path(config.run_dir) / "checkpoints").glob(".*")), death
        first, second = (read_state(resolve_checkpoint(c.run_dir)) for c in (config, straight))
        assert first == second, death


def test_kill_two_processes_with_workers(straight: ToyConfig) -> None:
    base = replace(straight, zero_stage=2, batch_size=2, grad_accumulation_steps=1, workers=1)
    whole = replace(base, exp_name="two-whole")
    assert run(whole, ranks=2) == [0, 0]
    config = replace(base, exp_name="two-killed")
    processes = start(config, ranks=2)
    latest, deadline = Path(config.run_dir) / "checkpoints" / "latest", time.time() + 60
    while not latest.is_file() and time.time() < deadline:
        time.sleep(0.005)
    time.sleep(random.Random(time.time_ns()).random() * 0.2)
    for process in processes:
        process.kill()
    finish(processes)
    assert run(config, ranks=2) == [0, 0]
    assert_identical(final(config), final(whole))


def test_workers_ranks_and_accumulation_do_not_change_the_data(straight: ToyConfig) -> None:
    config = replace(straight, exp_name="workers", workers=2)
    assert run(config) == [0]
    assert_identical(final(config), final(straight))


@pytest.mark.parametrize(("number", "draw", "step"), [(signal.SIGTERM, 25, 5), (signal.SIGUSR1, 20, 4)])
def test_signal_saves_ends_cleanly_and_goes_on(
    straight: ToyConfig, number: int, draw: int, step: int
) -> None:
    """Also where a validation is due: the resumed run makes it up."""
    config = replace(straight, exp_name=f"signal{step}", save_every_steps=10**6)
    assert run(config, deadly=draw, number=number) == [0]
    assert read_state(resolve_checkpoint(config.run_dir))["step"] == step
    assert run(config) == [0]
    assert_identical(final(config), final(straight))
    assert figures(config) == figures(straight)


def test_sigterm_with_workers(straight: ToyConfig) -> None:
    config = replace(straight, exp_name="terminated", epochs=2000, save_every_steps=10**6, workers=2)
    processes = start(replace(config, no_eval=True))
    metrics, deadline = Path(config.run_dir) / "metrics.jsonl", time.time() + 60
    while not metrics.is_file() and time.time() < deadline:
        time.sleep(0.02)
    os.kill(processes[0].pid, signal.SIGTERM)
    assert finish(processes) == [0]
    assert 0 < read_state(resolve_checkpoint(config.run_dir))["step"] < 8000


@pytest.mark.parametrize("ranks", [1, 2])
def test_non_finite_loss_stops_every_process_with_file_names(straight: ToyConfig, ranks: int) -> None:
    config = replace(straight, exp_name=f"poison{ranks}", zero_stage=0)
    assert run(config, ranks, poison=7) == [3] * ranks
    for rank in range(ranks):
        said = (Path(config.log_base_dir) / f"{config.exp_name}-error-{rank}.txt").read_text()
        assert said.startswith("NonFiniteLoss") and "image-7.png" in said
    (report,) = Path(config.run_dir).glob("non-finite-step-*.json")
    step = json.loads(report.read_text())["step"]
    latest = Path(config.run_dir) / "checkpoints" / "latest"
    assert not latest.is_file() or read_state(resolve_checkpoint(config.run_dir))["step"] <= step


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "fp32"), (2, "fp32"), (3, "fp32"), (2, "bf16"), (0, "bf16")]
)
def test_stages_agree_and_resume(straight: ToyConfig, stage: int, precision: str) -> None:
    config = replace(straight, exp_name=f"stage{stage}{precision}", zero_stage=stage, precision=precision)
    if precision == "fp32":
        assert run(config, kill_at=40) == [-signal.SIGKILL]
    assert run(config) == [0]
    tolerance = 1e-5 if precision == "fp32" else 0.02
    for name, value in final(straight).items():
        assert torch.allclose(final(config)[name], value, atol=tolerance), name
    if precision == "bf16" and stage:
        masters = final(config)["body.weight"]
        assert not torch.equal(masters, masters.bfloat16().float())  # the fp32 copies, not the rounded ones


def test_two_processes_equal_one_with_the_same_global_batch(straight: ToyConfig) -> None:
    """Without dropout and running figures, which are each process's own."""
    one = replace(straight, exp_name="one", noise=0.0)
    two = replace(one, exp_name="two", grad_accumulation_steps=1, global_batch_size=6, zero_stage=1)
    assert run(one) == [0] and run(two, ranks=2) == [0, 0]
    for name, value in final(one).items():
        assert torch.allclose(final(two)[name], value, atol=1e-6), name
    losses = [[line["loss"] for line in figures(c) if line["split"] == "train"] for c in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_no_eval_saves_each_epoch_and_best_survives_resume(straight: ToyConfig) -> None:
    config = replace(straight, exp_name="noeval", no_eval=True, save_every_steps=0, keep_last=9)
    assert run(config) == [0]
    folder = Path(config.run_dir) / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-12", "step-4", "step-8"]
    assert not (folder / "best").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_counts_are_summed_and_the_smallest_loss_is_best(straight: ToyConfig, ranks: int) -> None:
    settings = {"best_metric": "loss", "global_batch_size": 6, "batch_size": 3, "lr": 0.3, "epochs": 5}
    config = replace(straight, exp_name=f"counts{ranks}", eval_every_steps=1, **settings)
    assert run(config, ranks) == [0] * ranks
    lines = figures(config)
    keys = [key.index for step in range(20) for key in BatchPlan(20, config.seed, 6).keys(step, 0, 0)]
    for line in lines:
        if line["split"] == "train":
            seen = keys[: line["step"] * 6].count(3)
            assert line.get("dropped_total", 0) == seen, line
    losses = {line["step"]: line["loss"] for line in lines if line["split"] == "val"}
    state = read_state(resolve_checkpoint(config.run_dir))
    assert state["best_score"] == min(losses.values()) == losses[state["best_step"]]
    assert state["best_score"] < max(losses.values()) and keys.count(3) > 3


def test_warm_up_as_a_share_of_the_run() -> None:
    assert ToyConfig(warmup_ratio=0.03).warmup(1000) == 30
    assert ToyConfig(warmup_steps=7).warmup(1000) == 7


def test_starting_over_and_going_back(straight: ToyConfig) -> None:
    """Earlier checkpoints are moved aside; an older one can be continued as the run it was."""
    config = replace(straight, exp_name="again", keep_last=9)
    assert run(config) == [0]
    folder = Path(config.run_dir) / "checkpoints"
    assert run(replace(config, resume=str(folder / "step-6"), lr=config.lr)) == [0]
    assert_identical(final(config), final(straight))
    assert figures(config) == figures(straight)
    assert run(replace(config, auto_resume=False, epochs=1)) == [0]
    assert read_state(resolve_checkpoint(folder))["step"] == 4
    assert read_state(resolve_checkpoint(folder.with_name("checkpoints.1") / "latest"))["step"] == 12
    before = figures(config)
    assert run(replace(config, eval_only=True, epochs=1)) == [0]
    after = figures(config)
    assert after[:-1] == before and after[-1]["giou"] == before[-1]["giou"]


def test_resume_refuses_what_does_not_fit(straight: ToyConfig) -> None:
    config = replace(straight, exp_name="refused", resume=straight.run_dir, zero_stage=1)
    assert run(config) == [3]
    said = (Path(config.log_base_dir) / "refused-error-0.txt").read_text()
    assert "zero_stage was 0, is 1" in said
