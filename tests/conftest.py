"""Shared fixtures: one thread per process, no network, the root of the golden folders."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


def golden_root() -> Path:
    """Root of the golden folders: `$LISAT_GOLDEN`, or `../shared/golden` beside the repository."""
    return Path(os.environ.get("LISAT_GOLDEN", REPO.parent / "shared" / "golden"))


def require_golden(name: str) -> Path:
    """Folder `<golden root>/<name>`; skips the calling test (or module, at import) where it is absent."""
    folder = golden_root() / name
    if not folder.is_dir():
        pytest.skip(f"golden folder {folder} is not here (set LISAT_GOLDEN)", allow_module_level=True)
    return folder


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """`golden("lisat_model")` -> that golden folder, or the test is skipped with a reason."""
    return require_golden


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
