"""The quickstart script end to end, with few scenes and steps, in a folder that looks like a fresh clone."""

import os
import subprocess
from pathlib import Path

from tests.conftest import REPO


def test_quickstart_runs_and_shows_scores_and_pictures(tmp_path: Path) -> None:
    out = tmp_path / "out"
    env = os.environ | {
        "QUICKSTART_DIR": str(out),
        "QUICKSTART_SCENES": "20",
        "QUICKSTART_STEPS": "2",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        ["bash", "quickstart.sh"], cwd=REPO, env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert "gIoU" in done.stdout and "shuffled" in done.stdout.lower()
    pictures = sorted(out.rglob("demo/**/*.png"))
    assert len(pictures) >= 6
    for picture in pictures:
        assert str(picture) in done.stdout
    assert (out / "lisat" / "hg_model" / "model.safetensors").is_file()
