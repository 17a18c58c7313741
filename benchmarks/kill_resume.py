"""Kill a real LISAT training with SIGKILL at random moments, resume it, and compare with a run left alone.

    python benchmarks/kill_resume.py --kills 5

Exit code 1 unless every trained tensor is identical, bit for bit. Takes a few minutes.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from utils.config import parse_config  # noqa: E402


@dataclass
class KillConfig:
    """How often and how long."""

    kills: int = 5
    """Times the training is killed."""
    steps: int = 40
    """Optimiser steps of the run."""
    seed: int = 0
    """Of the moments."""
    cache: str = ""
    """--cache_image_embeddings of the run; empty computes SAM's embeddings in every step."""


def command(folder: Path, name: str, config: KillConfig) -> list[str]:
    """The training command of one run."""
    return [
        *(sys.executable, str(REPO / "train_lisat.py"), "--config", "lisat_tiny", "--no-progress"),
        *("--version", str(REPO / "checkpoints/lisat_tiny_base/llava")),
        *("--vision_pretrained", str(REPO / "checkpoints/lisat_tiny_base/sam.safetensors")),
        *("--dataset_dir", str(folder / "data"), "--log_base_dir", str(folder), "--exp_name", name),
        *(
            "--epochs",
            "1",
            "--steps_per_epoch",
            str(config.steps),
            "--save_every_steps",
            "2",
            "--print_freq",
            "1",
        ),
        *("--batch_size", "2", "--global_batch_size", "2", "--lora_dropout", "0.1"),
        f"--cache_image_embeddings={config.cache}",
    ]


def killed_run(folder: Path, config: KillConfig) -> int:
    """Train to the end although killed `config.kills` times; returns how many kills hit a living process."""
    draw, hits = random.Random(config.seed), 0
    newest = folder / "killed" / "metrics.jsonl"
    while True:
        process = subprocess.Popen(
            command(folder, "killed", config), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        if hits == config.kills:
            if process.wait():
                raise RuntimeError("the resumed run failed")
            return hits
        lines = _lines(newest) + draw.randint(1, max(1, config.steps // (config.kills + 2)))
        while process.poll() is None and _lines(newest) < lines:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            hits += 1
        process.wait()
        if process.returncode == 0:
            return hits


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main(argv: list[str] | None = None) -> int:
    """Run both, compare."""
    config = parse_config(KillConfig, argv)
    from safetensors.torch import load_file

    from dataset.synthetic import write_scenes

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, count in (("train", 24), ("val", 2)):
            write_scenes(folder / "data" / "synthetic" / split, count, seed=len(split))
        subprocess.run(
            command(folder, "straight", config),
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        hits = killed_run(folder, config)
        ends = [
            load_file(folder / run / "checkpoints" / f"step-{config.steps}" / "trainable.safetensors")
            for run in ("straight", "killed")
        ]
    different = [key for key in ends[0] if not ends[0][key].equal(ends[1][key])]
    print(f"{hits} kills, {len(ends[0])} tensors, {len(different)} differ {different[:3]}")
    return int(bool(different) or ends[0].keys() != ends[1].keys() or hits < config.kills)


if __name__ == "__main__":
    sys.exit(main())
