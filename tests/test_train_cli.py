"""The published training command, `bash train_lisat.sh TYPE INCLUDE PORT`, on CPU processes."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from dataset.synthetic import write_scenes
from tests.conftest import REPO


def free_port() -> str:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script's result."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        ["bash", str(REPO / "train_lisat.sh"), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("kind", ["ReferSeg", "ReasonSeg"])
def test_published_mix_needs_its_data(kind: str, tmp_path: Path) -> None:
    done = run(kind, "localhost:0", free_port(), "--dataset_dir", str(tmp_path / "nothing_here"), "--dry_run")
    assert done.returncode != 0
    assert "--dataset_dir" in done.stderr + done.stdout


def test_two_cpu_processes_train(tmp_path: Path) -> None:
    write_scenes(tmp_path / "data" / "synthetic" / "train", 4, seed=1)
    base = REPO / "checkpoints" / "lisat_tiny_base"
    done = run(
        *("ReasonSeg", "localhost:0,1", free_port()),
        *("--version", str(base / "llava"), "--vision_pretrained", str(base / "sam.safetensors")),
        *("--dataset", "synthetic|train", "--sample_rates", "1", "--dataset_dir", str(tmp_path / "data")),
        *(
            "--templates",
            "tiny",
            "--precision",
            "fp32",
            "--no_eval",
            "--epochs",
            "1",
            "--steps_per_epoch",
            "1",
        ),
        *("--batch_size", "1", "--grad_accumulation_steps", "1", "--workers", "0", "--zero_stage", "2"),
        *("--log_base_dir", str(tmp_path / "runs")),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (tmp_path / "runs" / "lisat" / "checkpoints" / "latest").exists()
    assert "2 process(es)" in done.stdout + done.stderr


def test_unknown_type_is_refused() -> None:
    done = run("Everything", "localhost:0", "1")
    assert done.returncode == 2 and "ReferSeg" in done.stderr
