"""Atomic writes leave the old or the new content; readers name file and place of a fault."""

import os
from pathlib import Path

import pytest

from utils import hub
from utils.io import (
    atomic_dir,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    read_json,
    read_jsonl,
)


def names(folder: Path) -> list[str]:
    """Sorted names of all entries, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def test_files_are_replaced_and_readable_by_others(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    atomic_write_text(file, "one é")
    atomic_write_bytes(file, b"two")
    assert file.read_bytes() == b"two" and names(file.parent) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(ValueError, match="is a folder"):
        atomic_write_text(tmp_path / "deep", "x")


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    atomic_write_text(file, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        atomic_write_text(file, "new")
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_json_round_trip_and_refusals(tmp_path: Path) -> None:
    file = atomic_write_json(tmp_path / "a.json", {"größe": [1, 2.5, None]})
    assert read_json(file, dict) == {"größe": [1, 2.5, None]}
    for value in (float("nan"), {"a": Path("x")}):
        with pytest.raises(ValueError):
            atomic_write_json(file, value)
    assert read_json(file) == {"größe": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1]", "expected dict at the top level, found list"),
    ],
)
def test_read_json_names_the_fault(tmp_path: Path, content: bytes, fault: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=fault) as error:
        read_json(file, dict)
    assert str(file) in str(error.value)


def test_read_json_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is there"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="a folder is there"):
        read_json(tmp_path)


def test_byte_order_marks_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "a.json") == [1]


def test_jsonl_skips_empty_lines_and_names_bad_ones(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n[2]\n')
    assert read_jsonl(file) == [{"a": 1}, [2]]
    file.write_text('{"a": 1}\n{oops\n')
    with pytest.raises(ValueError, match="line 2"):
        read_jsonl(file)


def test_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with atomic_dir(final) as folder:
        (folder / "old").write_text("1")
        assert not final.exists()
    with pytest.raises(RuntimeError), atomic_dir(final) as folder:
        (folder / "half").write_text("2")
        raise RuntimeError("killed")
    assert names(final) == ["old"] and names(tmp_path) == ["model"]
    with atomic_dir(final) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "new").write_text("3")
    assert names(final) == ["sub"] and names(tmp_path) == ["model"]


def test_folders_refuse_files_and_unwanted_overwriting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"), atomic_dir(tmp_path / "file"):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="not empty"), atomic_dir(tmp_path / "full", overwrite=False):
        pass


def test_paths_are_found_locally_before_anything_else(tmp_path: Path) -> None:
    for place in ("run/model", "run/tower", "run/model/inside"):
        (tmp_path / place).mkdir(parents=True)
    near = [tmp_path / "run" / "model"]
    assert hub.resolve(str(tmp_path / "run"), near) == tmp_path / "run"
    assert hub.resolve("./tower", near).resolve() == tmp_path / "run" / "tower"
    assert hub.resolve("inside", near) == tmp_path / "run" / "model" / "inside"
    assert hub.resolve("/somewhere/else/tower", near) == tmp_path / "run" / "tower"


def test_absent_paths_say_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="hf download wen-han/remote_clip_vit_l_14"):
        hub.resolve("./remote_clip_vit_l_14", [tmp_path])
    with pytest.raises(ValueError, match="sam_vit_h_4b8939.pth on a machine with internet"):
        hub.resolve("PATH_TO_SAM_ViT-H")
    with pytest.raises(ValueError, match="no path given"):
        hub.resolve(" ")


def test_offline_mode_forbids_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISAT_OFFLINE", "1")
    with pytest.raises(ValueError, match="offline mode is on"):
        hub.download("jquenum/LISAt-7b")
    with pytest.raises(ValueError, match="no hub repository"):
        hub.download("./somewhere/deep/down")
