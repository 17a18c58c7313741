"""Every command of the README runs, in order, in a folder that looks like a fresh clone."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dataset.synthetic import write_scenes
from tests.conftest import REPO

SMALLER = {  # flags that keep a command short; everything else stays as the README has it
    "python scripts/draw_scenes.py": "--train 6 --val 2 --test 3",
    "python train_lisat.py": "--epochs 1 --steps_per_epoch 2 --batch_size 2 --global_batch_size 2",
    "python eval_lisat.py --cmd inference": "--max_new_tokens 8 --gallery 2",
    "python pred_lisat_vqa.py": "--max_new_tokens 8",
    "bash eval_captioning.sh": "--metrics bleu cider",
    "python demo.py": "--model_max_length 8",
}
ELSEWHERE = {  # indented commands: which test covers them
    "bash quickstart.sh": "tests/test_quickstart.py",
    "bash test.sh": "runs this test",
    "bash train_lisat.sh": "tests/test_train_cli.py",
}


def fenced(language: str) -> list[str]:
    """Code blocks of the README in one language."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def commands() -> list[str]:
    """Lines of all bash blocks."""
    return [line for block in fenced("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to everything that git tracks at the top, and some own data."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    for name in {line.split("/")[0] for line in listed.splitlines()} - {".gitignore"}:
        (folder / name).symlink_to(REPO / name)
    for name in (".venv",):
        if (REPO / name).exists():
            (folder / name).symlink_to(REPO / name)
    write_scenes(folder / "my_data" / "train", 2, seed=5)
    return folder


def test_indented_commands_are_known() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    found = [line.split("#")[0].strip() for line in re.findall(r"^    (bash .+)$", text, flags=re.M)]
    assert found
    for line in found:
        assert any(line.startswith(known) for known in ELSEWHERE), line


def test_every_command_runs(clone: Path) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    assert len(commands()) >= 8
    for line in commands():
        extra = next((flags for start, flags in SMALLER.items() if line.startswith(start)), "")
        done = subprocess.run(
            shlex.split(f"{line} {extra}"), cwd=clone, env=env, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_python_blocks_run(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    for block in fenced("python"):
        exec(compile(block, "README.md", "exec"), {})


def test_files_and_flags_that_the_readme_names_exist() -> None:
    text = (REPO / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:configs|scripts|docs|tests|dataset|benchmarks)/[\w./-]*)`", text):
        assert (REPO / name).exists(), name
