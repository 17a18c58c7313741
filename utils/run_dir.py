"""The run directory: config.yaml, environment.json, metrics.jsonl, tb/, train.log, checkpoints/."""

import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from utils.config import config_to_dict, config_to_yaml
from utils.io import atomic_write_json, atomic_write_text

logger = logging.getLogger(__name__)
PACKAGES = ("torch", "torchvision", "transformers", "deepspeed", "peft", "safetensors", "numpy", "pillow")
PACKAGES += ("opencv-python-headless", "segment-anything", "sentencepiece")


class RunDir:
    """Files of one training run. Only the main process writes; for others every method does nothing."""

    def __init__(self, path: str | Path, is_main: bool = True, tensorboard: bool = True) -> None:
        self.path = Path(path)
        self.is_main = is_main
        self._tensorboard = tensorboard
        self._writer: Any = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per line: `step`, `split` (train or val) and the figures."""
        return self.path / "metrics.jsonl"

    def start(self, config: Any, facts: dict[str, Any], resumed_step: int | None) -> None:
        """Write config and environment, forget figures after `resumed_step`, open the log and TensorBoard.

        None as step only adds figures: what an earlier training wrote here stays as it is.
        """
        if not self.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if resumed_step is not None:
            if resumed_step:
                self._tell_changes(config)
            atomic_write_text(self.path / "config.yaml", config_to_yaml(config))
            atomic_write_json(self.path / "environment.json", {**environment(), **facts})
            self._trim_metrics(resumed_step)
        handler = logging.FileHandler(self.path / "train.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(handler)
        self._log_handler = handler
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(self.path / "tb"), purge_step=None if resumed_step is None else resumed_step + 1
            )

    def record(self, step: int, split: str, figures: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl` (a single write) and the figures to TensorBoard."""
        if not self.is_main:
            return
        line = {"step": step, "split": split, **{name: _finite(value) for name, value in figures.items()}}
        descriptor = os.open(self.metrics_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, (json.dumps(line) + "\n").encode())
        finally:
            os.close(descriptor)
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)
            self._writer.flush()

    def close(self) -> None:
        """Close the log file and TensorBoard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        handler = getattr(self, "_log_handler", None)
        if handler is not None:
            logging.getLogger().removeHandler(handler)
            handler.close()
            self._log_handler = None

    def _tell_changes(self, config: Any) -> None:
        """Warn about settings that differ from those the run was begun with."""
        import yaml

        file = self.path / "config.yaml"
        before = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        now = config_to_dict(config)
        harmless = (
            "resume",
            "auto_resume",
            "local_rank",
            "workers",
            "prefetch_factor",
            "progress",
            "dry_run",
        )
        for name in now:
            if name in before and before[name] != now[name] and name not in harmless:
                logger.warning("--%s is %s now, the run was begun with %s", name, now[name], before[name])

    def _trim_metrics(self, last_step: int) -> None:
        """Drop lines beyond `last_step` (they are computed again) and a line cut short by a kill."""
        if not self.metrics_file.is_file():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                logger.warning("%s: dropped an unreadable line", self.metrics_file)
        atomic_write_text(self.metrics_file, "".join(kept))


def environment() -> dict[str, Any]:
    """Versions of Python and the packages, the platform, the command and the state of the git checkout."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "command": sys.argv,
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit and whether the checkout has local changes; None outside a checkout or without git."""
    if shutil.which("git") is None:
        return None

    def ask(*words: str) -> str:
        folder = Path(__file__).resolve().parent.parent
        result = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    commit = ask("rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "changed_files": ask("status", "--porcelain").splitlines()}


def setup_logging(is_main: bool = True) -> None:
    """Log INFO of the main process and WARNING of the others to the standard error stream."""
    level = logging.INFO if is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(level)


def _finite(value: float) -> float | str:
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
