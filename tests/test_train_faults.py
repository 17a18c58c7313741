"""What is wrong with a training command is said all at once, before anything is loaded."""

import subprocess
import sys

import pytest

import train_lisat
from dataset.synthetic import write_scenes
from tests.conftest import REPO
from tests.model.checkpoint_tools import write_bases


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line without faults."""
    folder = tmp_path_factory.mktemp("faults")
    base, sam = write_bases(folder / "base")
    for split in ("train", "val"):
        write_scenes(folder / "data" / "synthetic" / split, 2, 0, questions=1, size=64)
    flags = {"version": base, "vision_pretrained": sam, "dataset_dir": folder / "data", "device": "cpu"}
    flags |= {"dataset": "synthetic|train", "val_dataset": "synthetic|val", "precision": "fp32"}
    return [*(f"--{name}={value}" for name, value in flags.items()), "--dry_run"]


def faults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: list[str]) -> list[str]:
    """Lines of the list that the program prints; it must end with 2."""
    monkeypatch.setattr(sys, "argv", ["train_lisat.py", *flags])
    assert train_lisat.main() == 2
    first, *lines = capsys.readouterr().err.strip().splitlines()
    assert first == f"{len(lines)} fault(s) in the configuration:"
    return lines


def test_settings_data_base_and_model_together(
    good: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wrong = ["--dataset=synthetic|train||refr_seg||geo_reason_seg||sem_seg", "--sample_rates=9,3,3"]
    wrong += ["--val_dataset=GeoReasonSeg|val", "--batch_size=0", "--conv_type=vicuna", "--lr=fast"]
    wrong += ["--lora_target_modules=qproj", "--sem_seg_data=ade20k", "--sample_rate=1"]
    found = faults(monkeypatch, capsys, [*good, *wrong])
    wanted = {
        "lr": "fast",
        "typo": "Unrecognized",
        "count": "3 value(s) for 4 data sets",
        "batch": "--batch_size must be at least 1",
        "template": "--conv_type vicuna",
        "unknown": "'refr_seg' is unknown",
        "train": "GeoReasonSeg|train is not in",
        "val": "--val_dataset: GeoReasonSeg|val is not in",
        "sem_seg": "--dataset sem_seg: ",
        "lora": "['qproj']",
    }
    for name, text in wanted.items():
        assert sum(text in line for line in found) == 1, (name, found)
    assert len(found) == len(wanted)


def test_missing_files_are_told_once(
    good: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wrong = ["--version=nowhere", "--vision_pretrained=no_sam.pth", "--dataset_dir=no_data"]
    wrong += ["--vision_tower=no_tower", "--templates=none.json", "--sample_rates=1,1"]
    found = faults(monkeypatch, capsys, [*good, *wrong])
    names = ("version", "vision_pretrained", "dataset_dir", "vision_tower", "templates", "sample_rates")
    for name in names:
        assert sum(f". --{name}" in line for line in found) == 1, (name, found)
    assert len(found) == 6


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--lr_multipliers=mask_decodr=0.1"], "mask_decodr"),
        (["--batch_size=3", "--global_batch_size=7"], "no multiple of 3"),
    ],
)
def test_faults_that_only_the_model_shows(
    good: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    flags: list[str],
    text: str,
) -> None:
    (line,) = faults(monkeypatch, capsys, [*good, *flags])
    assert text in line


def test_no_fault_no_complaint(
    good: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_lisat.py", *good])
    assert train_lisat.main() == 0 and '"trainable_parameters"' in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, runpy; sys.argv = ['train_lisat.py', '--help']\n"
    code += "try: runpy.run_path('train_lisat.py', run_name='__main__')\n"
    code += "except SystemExit as end: print(end.code, 'torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "0 False" and "--stage" in done.stdout
