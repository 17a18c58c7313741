"""Counting by a server that misbehaves: nothing is lost, the key goes nowhere, a killed run goes on."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.chat_server import ChatServer
from tests.conftest import REPO
from utils.instructsam_client import ChatClient, Endpoint, Question, asked_wait, chat_url, duration
from utils.instructsam_config import AskConfig, CountConfig, api_key
from utils.instructsam_count import run_count
from utils.visualize import write_image

KEY = "sk-test-0123456789abcdef"


@pytest.fixture()
def pictures(tmp_path: Path) -> dict[str, bytes]:
    """Twelve different pictures in `tmp_path/images`, one of them in a sub-folder: name -> bytes."""
    rng = np.random.default_rng(3)
    names = [f"{k:02d}.{'jpg' if k % 2 else 'png'}" for k in range(11)] + ["deep/11.png"]
    for name in names:
        write_image(tmp_path / "images" / name, rng.integers(0, 255, (12, 9, 3), dtype=np.uint8))
    return {name: (tmp_path / "images" / name).read_bytes() for name in names}


def config(tmp_path: Path, server: ChatServer, **changes: object) -> CountConfig:
    """Quick settings for the server."""
    values = {"base_url": server.url, "timeout": 4.0, "retries": 2, "first_wait": 0.02}
    folders = {"images": str(tmp_path / "images"), "save_dir": str(tmp_path / "counts")}
    return CountConfig(**{**folders, **values, **changes})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def counted(tmp_path: Path) -> set[str]:
    """Stems of the count files, sub-folders included; every file must be whole."""
    folder = tmp_path / "counts"
    for path in folder.rglob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8")) == {"ship": 3, "plane": 0}
    return {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.json")}


def test_faults_are_overcome_or_listed(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    plan = {
        "00.png": ["429 0.05", "ok"],
        "01.jpg": ["500", "503", "ok"],
        "02.png": ["hang", "ok"],
        "03.jpg": ["garbage", "ok"],
        "04.png": ["half", "ok"],
        "05.jpg": ["close", "ok"],
        "06.png": ["500"],
        "07.jpg": ["I see several ships."],
        "08.png": ['{"ship": "many"}'],
        "09.jpg": ["400"],
        "10.png": ["null"],
    }
    with ChatServer(pictures, plan) as server:
        outcome = run_count(config(tmp_path, server))
        assert counted(tmp_path) == {"00", "01", "02", "03", "04", "05", "deep/11"}
        failed = {item["image"]: item for item in outcome.failures}
        assert set(failed) == {"06.png", "07.jpg", "08.png", "09.jpg", "10.png"}
        assert server.asked["06.png"] == 3 and failed["06.png"]["attempts"] == 3
        assert server.asked["09.jpg"] == 1 and failed["09.jpg"]["status"] == 400
        assert failed["07.jpg"]["kind"] == "reply" and failed["07.jpg"]["reply"] == plan["07.jpg"][0]
        assert "'many'" in failed["08.png"]["fault"]
        for name in failed:
            assert name in outcome.text
        log = (tmp_path / "counts_failures.jsonl").read_text(encoding="utf-8").splitlines()
        assert sorted(json.loads(line)["image"] for line in log) == sorted(failed)
        assert outcome.report["retries"] == 1 + 2 + 1 + 1 + 1 + 1 + 2
        server.plan.clear()
        server.asked.clear()
        again = run_count(config(tmp_path, server, skip_existing=True))
    assert set(server.asked) == set(failed) and not again.failures
    assert again.skipped == 7 and len(counted(tmp_path)) == 12
    assert not (tmp_path / "counts_failures.jsonl").exists()


def test_the_key_is_in_no_file_log_or_error(
    tmp_path: Path, pictures: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    plan = {"00.png": ["500"], "01.jpg": ["400"], "02.png": [f"I know {KEY}"], "03.jpg": ["401"]}
    with ChatServer(pictures, plan) as server:
        outcome = run_count(config(tmp_path, server, concurrency=1, retries=1))
        assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert len(outcome.failures) == 12  # the first is asked twice, the 401 ends the run
    assert sum(item["kind"] == "not asked" for item in outcome.failures) == 8
    assert server.asked.total() == 2 + 1 + 1 + 1
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in outcome.text and KEY not in caplog.text
    assert KEY not in repr(Endpoint("http://localhost", key=KEY))
    assert "[key]" in (tmp_path / "counts_failures.jsonl").read_text(encoding="utf-8")


def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-\u00e9-secret")
    with pytest.raises(ValueError) as caught:
        api_key("SOME_KEY")
    assert "secret" not in str(caught.value)
    faults = CountConfig(images=".", base_url="http://h", api_key=KEY).validate()
    assert len(faults) == 1 and KEY not in faults[0]
    faults = AskConfig(api_key_env=KEY).validate()
    assert len(faults) == 1 and KEY not in faults[0]


def test_concurrency_is_bounded_and_used(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    with ChatServer(pictures, delay=0.05) as server:
        run_count(config(tmp_path, server, concurrency=3))
    assert server.busiest == 3 and server.asked.total() == 12


def test_a_server_here_is_not_asked_through_a_proxy(
    tmp_path: Path, pictures: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with ChatServer(pictures) as server:
        assert not run_count(config(tmp_path, server, retries=0)).failures


def test_requests_claim_the_true_type_by_default(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    settings = {"json_schema": True, "setting": "open_vocabulary", "words": ("ship,plane", "ship")}
    with ChatServer(pictures) as server:
        run_count(config(tmp_path, server, **settings))
    contents = [request["body"]["messages"][0]["content"] for request in server.requests]
    claims = [content[1]["image_url"]["url"].split(";")[0] for content in contents]
    assert sorted(claims) == ["data:image/jpeg"] * 5 + ["data:image/png"] * 7
    shape = server.requests[0]["body"]["response_format"]["json_schema"]
    assert shape["strict"] and list(shape["schema"]["properties"]) == ["ship", "plane"]
    assert "ship, plane" in contents[0][0]["text"] and "[[" not in contents[0][0]["text"]


def test_pictures_can_be_shrunk_and_tiff_goes_as_png(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8)
    write_image(tmp_path / "images" / "a.tif", image)
    with ChatServer({}) as server:
        run_count(config(tmp_path, server, max_side=20))
    import base64

    import cv2

    address = server.requests[0]["body"]["messages"][0]["content"][1]["image_url"]["url"]
    assert address.startswith("data:image/png;base64,")
    data = np.frombuffer(base64.b64decode(address.partition(",")[2]), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (10, 20, 3)


def test_second_try_names_the_fault(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    with ChatServer(pictures, {"00.png": ["nothing useful", "ok"]}) as server:
        outcome = run_count(config(tmp_path, server, second_try=1))
    assert not outcome.failures and server.asked["00.png"] == 2 and server.asked.total() == 13
    messages = server.requests[-1]["body"]["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == "nothing useful" and "no { ... } object" in messages[2]["content"]
    assert outcome.report["completion_tokens"] == 7 * 13


def test_rate_limit_headers_hold_every_request_back() -> None:
    now = [0.0]
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds
        await asyncio.sleep(0)

    async def talk(server: ChatServer, **settings: float) -> list:
        endpoint = Endpoint(chat_url(server.url), concurrency=1, **settings)
        async with ChatClient(endpoint, sleep=sleep, clock=lambda: now[0]) as client:
            message = {"role": "user", "content": [{}, {"image_url": {"url": "data:,"}}]}
            asked = [Question(str(k), lambda: [message]) for k in range(3)]
            return [reply async for reply in client.ask_all(asked)]

    limits = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}
    with ChatServer({}, headers=limits) as server:
        replies = asyncio.run(talk(server))
    assert [reply.kind for reply in replies] == ["ok"] * 3 and waits == [90.0, 90.0]
    waits.clear()
    with ChatServer({}, {"?": ["429 30", "429 40", "ok"]}) as server:
        replies = asyncio.run(talk(server))
    assert replies[0].attempts == 3 and sum(waits) == pytest.approx(70, abs=0.1)
    with ChatServer({}, {"?": ["429 3000"]}) as server:
        replies = asyncio.run(talk(server, most_wait=600))
    assert [reply.kind for reply in replies] == ["refused", "not asked", "not asked"]
    assert "3000" in replies[1].fault and server.asked.total() == 1


def test_waits_are_read_in_every_form() -> None:
    assert asked_wait({"retry-after": "7"}) == 7 and asked_wait({"retry-after-ms": "250"}) == 0.25
    assert asked_wait({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=40) == 60
    assert asked_wait({"retry-after": "soon"}) == asked_wait({}) == 0
    texts = ("6m0s", "1.5s", "20ms", "3", "1h2m", "later", "")
    assert [duration(text) for text in texts] == [360, 1.5, 0.02, 3, 3720, 0, 0]


def test_addresses_join_with_and_without_slash() -> None:
    for base in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        assert chat_url(base) == "http://h/v1/chat/completions"
    with pytest.raises(ValueError, match="no http"):
        chat_url("h/v1")


def test_names_that_would_share_a_file_are_refused(tmp_path: Path, pictures: dict[str, bytes]) -> None:
    (tmp_path / "images" / "00.jpg").write_bytes(pictures["01.jpg"])
    with ChatServer(pictures) as server, pytest.raises(ValueError, match="share their output"):
        run_count(config(tmp_path, server))


def test_killed_and_started_again_asks_only_for_what_is_missing(
    tmp_path: Path, pictures: dict[str, bytes]
) -> None:
    command = [sys.executable, str(REPO / "instructsam.py"), "count", "--images", "images", "--skip_existing"]
    with ChatServer(pictures, {"05.jpg": ["not countable"]}, delay=0.1) as server:
        command += ["--base_url", server.url, "--save_dir", "counts", "--concurrency", "2"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "counts").rglob("[!.]*.json"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = counted(tmp_path)
        assert 4 <= len(before) < 12
        server.asked.clear()
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    missing = {name for name in pictures if name.rsplit(".", 1)[0] not in before}
    assert set(server.asked) == missing and set(server.asked.values()) == {1}
    assert len(counted(tmp_path)) == 11
    assert done.returncode == 3 and "no counts: 05.jpg" in done.stdout
    assert KEY not in done.stdout + done.stderr
