"""A local server that speaks the chat completions protocol over real HTTP, with faults to order."""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer:
    """`with ChatServer(...) as server:` answers POSTs at `server.url`.

    Pictures are known by the bytes that `names` maps to a name. `plan[name]` lists what happens to the
    requests about that picture, one after the other (the last one stays): `ok`, a reply text, or a fault:
    `429`, `429 <seconds>`, `500`, `503`, `400`, `401`, `hang`, `garbage`, `half`, `close`, `null`.
    """

    def __init__(
        self,
        names: Mapping[str, bytes],
        plan: Mapping[str, Sequence[str]] | None = None,
        delay: float = 0.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.names = {hashlib.sha256(data).hexdigest(): name for name, data in names.items()}
        self.plan = {name: list(steps) for name, steps in (plan or {}).items()}
        self.delay = delay
        self.headers = dict(headers or {})
        self.requests: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.busiest = self._busy = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> "ChatServer":
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                owner._serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/"
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        address = body["messages"][0]["content"][1]["image_url"]["url"]
        picture = base64.b64decode(address.partition(",")[2])
        name = self.names.get(hashlib.sha256(picture).hexdigest(), "?")
        with self._lock:
            self.requests.append({"path": handler.path, "headers": dict(handler.headers), "body": body})
            self.asked[name] += 1
            steps = self.plan.get(name, ["ok"])
            step = steps.pop(0) if len(steps) > 1 else steps[0]
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            time.sleep(self.delay)
            self._answer(handler, step, name)
        finally:
            with self._lock:
                self._busy -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, step: str, name: str) -> None:
        word, _, more = step.partition(" ")
        if word == "hang":
            self._closing.wait(20)
        elif word == "close":
            handler.close_connection = True
        elif word == "half":
            data = _completion("{}")
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
        elif word == "garbage":
            self._send(handler, 200, b"<html>not what was asked for</html>")
        elif word.isdigit():
            extra = {"Retry-After": more} if more else {}
            echo = handler.headers.get("Authorization", "")
            self._send(handler, int(word), f'{{"error": "as ordered for {echo}"}}'.encode(), extra)
        else:
            text = '{"ship": 3, "plane": 0}' if step == "ok" else step
            with self._lock:
                self.answered[name] += 1
            self._send(handler, 200, _completion(None if step == "null" else text))

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        extra: Mapping[str, str] = {},  # noqa: B006
    ) -> None:
        handler.send_response(status)
        for key, value in {**self.headers, **extra, "Content-Length": str(len(data))}.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(data)


def _completion(text: str | None) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode()
