"""Counting against the recorded behaviour of the published code: request and reply parsing."""

import base64
import json
import math
from pathlib import Path

import pytest

from tests.chat_server import ChatServer
from tests.conftest import require_golden
from utils.instructsam_config import CountConfig
from utils.instructsam_count import load_prompt, run_count
from utils.instructsam_data import image_folder, read_dataset
from utils.instructsam_reply import ReplyError, published_object

FOLDER = require_golden("instructsam")
REPLIES = json.loads((FOLDER / "counting" / "reply_parsing.json").read_text(encoding="utf-8"))


def is_special(value: object) -> bool:
    """NaN and infinities, which the golden file gives as text."""
    return isinstance(value, float) and not math.isfinite(value)


@pytest.mark.parametrize("case", REPLIES, ids=range(len(REPLIES)))
def test_reply(case: dict) -> None:
    if case["failed_minus_one"]:
        with pytest.raises(ReplyError):
            published_object(case["reply"])
        return
    found = published_object(case["reply"])
    special = {label: repr(v) if is_special(v) else v for label, v in found.items()}
    assert special == case["parsed"]
    for label, value in case["parsed"].items():
        assert type(special[label]) is type(value)


@pytest.mark.parametrize("setting", [{}, {"base_url_slash": False}])
def test_request(setting: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = json.loads((FOLDER / "counting" / "api_request.json").read_text(encoding="utf-8"))
    key = wanted["headers"]["Authorization"].removeprefix("Bearer ")
    monkeypatch.setenv("OPENAI_API_KEY", key)
    images = read_dataset("dior_mini2", FOLDER / "datasets_config.json")
    data = {image.file_name: image.path.read_bytes() for image in images.images}
    prompt = next(FOLDER.glob("prompts/*/open_ended.txt"))
    with ChatServer(data) as server:
        url = server.url if setting.get("base_url_slash", True) else server.url.rstrip("/")
        config = CountConfig(
            dataset_name="dior_mini2",
            dataset_config=str(FOLDER / "datasets_config.json"),
            base_url=url,
            prompt_path=str(prompt),
            save_dir=str(tmp_path / "counts"),
            published_request=True,
        )
        outcome = run_count(config)
    assert not outcome.failures and outcome.written == len(data)
    sent = set()
    for request in server.requests:
        assert request["path"] == wanted["url_path"]
        for name, value in wanted["headers"].items():
            assert request["headers"].get(name) == value
        content = request["body"]["messages"][0]["content"]
        address = content[1]["image_url"]["url"]
        head = wanted["body"]["messages"][0]["content"][1]["image_url"]["url"].partition(",")[0]
        assert address.startswith(head + ",")
        sent.add(base64.b64decode(address.partition(",")[2]))
        assert content[0]["text"] == prompt.read_bytes().decode("utf-8")
        content[0]["text"] = wanted["body"]["messages"][0]["content"][0]["text"]
        content[1]["image_url"]["url"] = wanted["body"]["messages"][0]["content"][1]["image_url"]["url"]
        assert request["body"] == wanted["body"]
        assert list(request["body"]) == list(wanted["body"])
    assert sent == set(data.values())


def test_every_published_prompt_is_sent_unchanged(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    images = image_folder(tmp_path)
    prompts = sorted(FOLDER.glob("prompts/*/*.txt"))
    assert prompts
    for path in prompts:
        text, name = load_prompt(CountConfig(prompt_path=str(path)), images)
        assert text == path.read_bytes().decode("utf-8")
        assert name == path.name.split(".")[0]
