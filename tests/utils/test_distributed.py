"""Who am I: launchers' variables, SLURM's, or none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from utils.distributed import World, choose_device, first_slurm_host, read_environment


def test_no_launcher_is_one_process() -> None:
    found = read_environment({})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert (
        read_environment({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})["WORLD_SIZE"] == "1"
    )


def test_launcher_and_slurm_variables() -> None:
    found = read_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_PORT": "5"})
    assert (found["RANK"], found["LOCAL_RANK"], found["MASTER_PORT"]) == ("3", "1", "5")
    slurm = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123"}
    found = read_environment(slurm | {"SLURM_STEP_NODELIST": "gpu[07-08]"})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("9", "16", "1")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("gpu07", "20123")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("a,b", "a"),
        ("gpu[003-006,9],x", "gpu003"),
        ("r[1,4]-ib", "r1-ib"),
        ("c-1-[5-6]", "c-1-5"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_slurm_host(nodes) == host


def test_single_process_world() -> None:
    world = World()
    assert (
        world.sum([1.5]) == [1.5] and world.any([True, False]) == [True, False] and world.gather("x") == ["x"]
    )
    assert choose_device("cpu") == "cpu"


def test_trains_without_compiler_ninja_or_anything_on_path(tmp_path: Path) -> None:
    """DeepSpeed's shared-memory operator would be compiled here if it were not switched off."""
    code = "from tests.utils.toy_training import ToyConfig, train_toy\n"
    code += f"train_toy(ToyConfig(log_base_dir={str(tmp_path)!r}, exp_name='bare', zero_stage=2, epochs=1))\n"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "CC", "CXX"))}
    env |= {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "none"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "bare" / "final.safetensors").is_file()
    assert not (tmp_path / "none").exists()
