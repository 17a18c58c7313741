"""Asynchronous client of an OpenAI-compatible chat endpoint: one request per picture, nothing lost.

At most `concurrency` requests are under way; each is tried again after 408, 409, 425, 429, 5xx, time-outs,
broken connections and garbled answers, with exponential waits and jitter. `Retry-After` and rate-limit
headers hold back all workers at once. The key is used in the header only: it is in no repr, log or error.
"""

import asyncio
import base64
import json
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

logger = logging.getLogger(__name__)

_RETRIED = frozenset({408, 409, 425, 429})
_HOPELESS = frozenset({401, 403, 404, 405})
"""Statuses that every further request would get, too."""
HIDDEN = "[key]"
_OWN_MACHINE = ("all://localhost", "all://127.0.0.1", "all://[::1]")


@dataclass(frozen=True)
class Endpoint:
    """Where and how to ask.

    `url` of the chat completions call; `key` may be empty (no Authorization header). `response_format` as
    the API has it, or None. Times in seconds: `connect_timeout` per connection, `timeout` per try,
    `most_wait` the longest wait that a server may ask for.
    """

    url: str
    key: str = field(default="", repr=False)
    model: str = "gpt-4o-2024-11-20"
    max_tokens: int = 2000
    temperature: float = 0.01
    top_p: float = 1
    response_format: Mapping[str, Any] | None = None
    concurrency: int = 8
    retries: int = 6
    first_wait: float = 1.0
    most_backoff: float = 60.0
    most_wait: float = 600.0
    timeout: float = 180.0
    connect_timeout: float = 15.0

    def hide(self, text: str) -> str:
        """`text` without the key (a server may repeat what it was sent)."""
        return text.replace(self.key, HIDDEN) if self.key else text


@dataclass
class Reply:
    """The answer for one picture: text or, where there is none, the reason; tokens, tries, seconds used.

    `kind` is `ok`, `picture` (not readable), `request` (no answer), `refused` (every request would fail) or
    `not asked`.
    """

    name: str
    text: str = ""
    kind: str = "ok"
    fault: str = ""
    status: int = 0
    attempts: int = 0
    cut: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Question:
    """One picture to ask about: its name, and a function that gives the messages when its turn comes."""

    name: str
    messages: Callable[[], list[dict[str, Any]]]


def chat_url(base_url: str) -> str:
    """Address of the chat completions call below `base_url`, with or without a slash at its end."""
    base = base_url.strip().rstrip("/")
    if not re.match(r"https?://[^/]+", base):
        raise ValueError(
            f"--base_url {base_url!r} is no http(s) address, for example http://localhost:8000/v1/"
        )
    return base if base.endswith("/chat/completions") else f"{base}/chat/completions"


def user_message(prompt: str, data: bytes, media_type: str) -> dict[str, Any]:
    """The one message of a request: the prompt, then the picture as a data address."""
    address = f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"
    image = {"type": "image_url", "image_url": {"url": address}}
    return {"role": "user", "content": [{"type": "text", "text": prompt}, image]}


def request_body(endpoint: Endpoint, messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Body of a request, fields in the published order."""
    body: dict[str, Any] = {
        "model": endpoint.model,
        "max_tokens": endpoint.max_tokens,
        "temperature": endpoint.temperature,
        "top_p": endpoint.top_p,
        "messages": list(messages),
    }
    if endpoint.response_format is not None:
        body["response_format"] = dict(endpoint.response_format)
    return body


def counts_schema(labels: Sequence[str]) -> dict[str, Any]:
    """`response_format` that asks for counts by a JSON schema; with `labels` exactly these, each once."""
    number = {"type": "integer", "minimum": 0}
    schema: dict[str, Any] = {"type": "object", "additionalProperties": number}
    if labels:
        properties = {label: number for label in labels}
        schema = {"type": "object", "properties": properties, "required": list(labels)}
        schema["additionalProperties"] = False
    inner = {"name": "object_counts", "strict": bool(labels), "schema": schema}
    return {"type": "json_schema", "json_schema": inner}


class _Refused(Exception):
    """The server will refuse every request; the message says why."""


class _Again(Exception):
    """This try failed, another may not; `wait` is what the server asks for, in seconds."""

    def __init__(self, fault: str, status: int = 0, wait: float = 0.0) -> None:
        super().__init__(fault)
        self.status = status
        self.wait = wait


class _Failed(Exception):
    """This request will not succeed, others may."""

    def __init__(self, fault: str, status: int) -> None:
        super().__init__(fault)
        self.status = status


class ChatClient:
    """Asks many questions at once; `async with ChatClient(endpoint) as client: ...`.

    `sleep` and `clock` can be replaced in tests.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        seed: int = 0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self.retried = 0
        self._random = random.Random(seed)
        self._sleep = sleep
        self._clock = clock
        self._open_at = 0.0
        self._refused = ""
        self._http: Any = None

    async def __aenter__(self) -> "ChatClient":
        import httpx

        most = self.endpoint.concurrency
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(self.endpoint.timeout, connect=self.endpoint.connect_timeout),
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
            headers={"Content-Type": "application/json"},
            mounts=dict.fromkeys(_OWN_MACHINE),  # None: never through a proxy of the environment
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask_all(self, questions: Sequence[Question]) -> AsyncIterator[Reply]:
        """A `Reply` for every question, in the order they come in. Messages are built one by one."""
        waiting = iter(questions)
        done: asyncio.Queue[Reply | Exception] = asyncio.Queue()

        async def work() -> None:
            try:
                for question in waiting:
                    await done.put(await self.ask(question))
            except Exception as error:
                await done.put(error)
                raise

        workers = [asyncio.create_task(work()) for _ in range(min(self.endpoint.concurrency, len(questions)))]
        try:
            for _ in questions:
                reply = await done.get()
                if isinstance(reply, Exception):  # an error of the program, not of the server
                    raise reply
                yield reply
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def ask(self, question: Question) -> Reply:
        """One question with all its tries; faults are told in the reply, not raised."""
        reply = Reply(question.name)
        if self._refused:
            return self._told(reply, "not asked", self._refused, 0)
        try:
            body = await asyncio.to_thread(self._encode, question)
        except (OSError, ValueError) as error:
            return self._told(reply, "picture", str(error), 0)
        fault, status, begun = "", 0, self._clock()
        for attempt in range(self.endpoint.retries + 1):
            await self._wait_for_gate()
            if self._refused:
                return self._told(reply, "not asked", self._refused, 0)
            reply.attempts = attempt + 1
            try:
                await self._try(body, reply)
                reply.text, reply.seconds = self.endpoint.hide(reply.text), self._clock() - begun
                return reply
            except _Again as error:
                fault, status = str(error), error.status
                if attempt < self.endpoint.retries:
                    self.retried += 1
                    await self._back_off(attempt, error.wait)
            except _Refused as error:
                self._refused = self.endpoint.hide(str(error))
                return self._told(reply, "refused", str(error), 0)
            except _Failed as error:
                return self._told(reply, "request", str(error), error.status)
        return self._told(reply, "request", f"{fault} ({reply.attempts} tries)", status)

    def _encode(self, question: Question) -> bytes:
        return json.dumps(request_body(self.endpoint, question.messages()), ensure_ascii=False).encode()

    def _told(self, reply: Reply, kind: str, fault: str, status: int) -> Reply:
        reply.kind, reply.fault, reply.status = kind, self.endpoint.hide(fault), status
        return reply

    async def _try(self, body: bytes, reply: Reply) -> None:
        import httpx

        headers = {"Authorization": f"Bearer {self.endpoint.key}"} if self.endpoint.key else {}
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await self._http.post(self.endpoint.url, content=body, headers=headers)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise _Again(f"no answer within {self.endpoint.timeout:g} s") from error
        except httpx.TransportError as error:
            raise _Again(f"connection failed: {type(error).__name__}: {error}") from error
        except (httpx.InvalidURL, httpx.HTTPError) as error:
            raise _Refused(f"{self.endpoint.url}: {error}") from error
        self._note_limits(response.headers)
        if response.status_code != 200:
            self._raise_for(response)
        _read_answer(response, reply)

    def _raise_for(self, response: Any) -> None:
        status, text = response.status_code, response.text[:500].strip()
        fault = f"HTTP {status}: {text or 'no text'}"
        if status in _HOPELESS:
            raise _Refused(f"{fault} (check --base_url, --model and the key in the environment)")
        if status == 429 and "insufficient_quota" in text:
            raise _Refused(fault)
        if status in _RETRIED or status >= 500:
            wait = asked_wait(response.headers)
            if wait > self.endpoint.most_wait:
                raise _Refused(f"{fault}; the server asks to wait {wait:.0f} s, more than --most_wait")
            raise _Again(fault, status, wait)
        raise _Failed(fault, status)

    def _note_limits(self, headers: Mapping[str, str]) -> None:
        """Hold everything back where the server says that its budget is used up."""
        for kind in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0":
                wait = duration(headers.get(f"x-ratelimit-reset-{kind}", ""))
                self._close_gate(min(wait, self.endpoint.most_wait))

    def _close_gate(self, seconds: float) -> None:
        self._open_at = max(self._open_at, self._clock() + seconds)

    async def _wait_for_gate(self) -> None:
        while (left := self._open_at - self._clock()) > 0:
            await self._sleep(left)

    async def _back_off(self, attempt: int, wait: float) -> None:
        if wait > 0:
            self._close_gate(wait)
        longest = min(self.endpoint.most_backoff, self.endpoint.first_wait * 2**attempt)
        await self._sleep(longest * self._random.uniform(0.5, 1.0))


def _read_answer(response: Any, reply: Reply) -> None:
    """Text and token counts of a successful response into `reply`; _Again where it is no chat answer."""
    try:
        content = response.json()
        choice = content["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Again(f"the answer is no chat completion: {response.text[:200]!r}", 200) from error
    if isinstance(text, list):  # some servers answer in parts
        text = "".join(part.get("text", "") for part in text if isinstance(part, dict))
    if not isinstance(text, str):
        refusal = choice["message"].get("refusal")
        raise _Failed(f"the model gave no text{f' but a refusal: {refusal}' if refusal else ''}", 200)
    reply.text = text
    reply.cut = choice.get("finish_reason") == "length"
    usage = content.get("usage")
    if isinstance(usage, dict):
        reply.prompt_tokens = _tokens(usage.get("prompt_tokens"))
        reply.completion_tokens = _tokens(usage.get("completion_tokens"))


def _tokens(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0


def asked_wait(headers: Mapping[str, str], now: float | None = None) -> float:
    """Seconds that `retry-after-ms` or `Retry-After` (seconds or a date) ask for; 0 without or unreadable."""
    milliseconds = headers.get("retry-after-ms", "")
    if re.fullmatch(r"\d+(\.\d+)?", milliseconds.strip()):
        return float(milliseconds) / 1000
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - (time.time() if now is None else now))
    except (ValueError, TypeError, IndexError):
        return 0.0


def duration(text: str) -> float:
    """Seconds of a rate-limit duration such as `6m0s`, `1.5s`, `20ms` or `3`; 0 where unreadable."""
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return 0.0
    seconds = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    return sum(float(number) * seconds[unit] for number, unit in parts)
