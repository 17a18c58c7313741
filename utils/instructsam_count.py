"""Counting stage of InstructSAM: pictures and a prompt -> one count file per picture, by a server or by Qwen.

Beside the folder of count files lie `<folder>_failures.jsonl` (one line per picture without counts: picture,
kind, fault, tries, what was replied) and `<folder>_report.json` (numbers, tokens, cost, seconds).
"""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.instructsam_client import (
    ChatClient,
    Endpoint,
    Question,
    Reply,
    chat_url,
    counts_schema,
    user_message,
)
from utils.instructsam_config import AskConfig, CountConfig, api_key
from utils.instructsam_data import ImageEntry, ImageSet, image_folder, read_dataset
from utils.instructsam_files import counts_path, write_counts
from utils.instructsam_images import picture_bytes, read_rgb
from utils.instructsam_reply import ReplyError, read_reply
from utils.io import StrPath, atomic_write_json, read_json

if TYPE_CHECKING:
    from model.instructsam.qwen import QwenCounter

logger = logging.getLogger(__name__)
PROMPTS = Path(__file__).resolve().parent.parent / "dataset" / "prompts" / "instructsam"


@dataclass
class CountOutcome:
    """What a counting run did: output folder, numbers, failures (dicts as in the log) and the report."""

    folder: Path
    asked: int = 0
    skipped: int = 0
    written: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Lines for the terminal: the numbers, then every picture without counts and why."""
        tokens = self.report.get("completion_tokens", 0)
        head = f"{self.written} of {self.asked} pictures counted, {self.skipped} were there already"
        lines = [f"{head}; {tokens} reply tokens; {self.folder}"]
        lines += [f"  no counts: {item['image']}: {item['fault']}" for item in self.failures]
        if self.failures:
            lines.append(
                f"  written to {_beside(self.folder, 'failures.jsonl')}; "
                "the same command with --skip_existing asks for these again"
            )
        return "\n".join(lines)


def run_count(config: CountConfig, images: ImageSet | None = None, folder: StrPath = "") -> CountOutcome:
    """Count in all pictures; raises for faults of the settings only, single pictures fail into the log.

    Args:
        images: the pictures; None: those the configuration names.
        folder: output folder; empty: `--save_dir` or its default.
    """
    images = images or load_images(config.images, config.dataset_name, config.dataset_config)
    prompt, prompt_name = load_prompt(config, images)
    source = "Qwen" if config.pretrained_model_name_or_path else config.model.replace("/", "_")
    default = Path("object_counts") / images.name / f"{source}_{prompt_name}"
    images.check_stems()
    run = _Run(config, Path(folder or config.save_dir or default))
    wanted = run.wanted(images.images)
    if wanted and config.pretrained_model_name_or_path:
        _ask_local(config, run, wanted, prompt)
    elif wanted:
        asyncio.run(_ask_server(_endpoint(config, images), config, run, wanted, prompt))
    return run.finish()


def load_images(folder: str, dataset_name: str, dataset_config: str) -> ImageSet:
    """The pictures that `--images` or `--dataset_name` and `--dataset_config` name."""
    return image_folder(folder) if folder else read_dataset(dataset_name, dataset_config)


def load_prompt(config: AskConfig, images: ImageSet) -> tuple[str, str]:
    """Text of the prompt and the name it gives to the output folder (up to the first dot).

    A prompt file is sent as it is, except that [[classes]] and [[parent]] are filled in where they occur.
    """
    path = Path(config.prompt_path) if config.prompt_path else PROMPTS / f"{config.chosen_setting()}.txt"
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt_path {path}: not UTF-8 text at byte {error.start}") from error
    classes = words(config.words) or images.class_names
    if "[[classes]]" in text and not classes:
        raise ValueError("the prompt asks for given classes: name them with --words ship plane ...")
    name = path.name.split(".")[0]
    if "[[parent]]" in text:
        name += f"_{config.parent.replace(' ', '_')}"
    return text.replace("[[classes]]", ", ".join(classes)).replace("[[parent]]", config.parent), name


def words(given: Sequence[str]) -> list[str]:
    """Class names of a command line: one per argument, or several with commas between; none twice."""
    parts = [part.strip() for word in given for part in word.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


class _Run:
    """Output of one counting run."""

    def __init__(self, config: AskConfig, folder: Path) -> None:
        self.config = config
        self.outcome = CountOutcome(folder)
        self.failures = _beside(folder, "failures.jsonl")
        self.usage: Counter[str] = Counter()
        self.per_image: dict[str, dict[str, Any]] = {}
        self.started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.failures.unlink(missing_ok=True)

    def wanted(self, images: Sequence[ImageEntry]) -> list[ImageEntry]:
        """Pictures to ask about: with `skip_existing` those without a readable count file."""
        kept = [i for i in images if not (self.config.skip_existing and self._there(i.file_name))]
        self.outcome.asked, self.outcome.skipped = len(kept), len(images) - len(kept)
        return kept

    def _there(self, name: str) -> bool:
        try:
            read_json(counts_path(self.outcome.folder, name), dict)
        except ValueError:
            return False
        return True

    def take(self, name: str, text: str, cut: bool) -> str:
        """Store the counts of a reply; returns "" or the reason why it gives none."""
        if cut:
            return "the reply was cut at its longest length; raise --max_tokens or --max_new_tokens"
        try:
            counts = read_reply(text, self.config.repair_json, self.config.published_parsing)
        except ReplyError as error:
            return str(error)
        write_counts(counts_path(self.outcome.folder, name), counts)
        self.outcome.written += 1
        return ""

    def used(self, name: str, prompt_tokens: int, completion_tokens: int, seconds: float = 0.0) -> None:
        """Add what a reply has used."""
        self.usage["prompt_tokens"] += prompt_tokens
        self.usage["completion_tokens"] += completion_tokens
        self.per_image[name] = {"time": seconds, "token_cnt": completion_tokens}

    def fail(self, name: str, kind: str, fault: str, **details: Any) -> None:
        """Note a picture without counts, on disk at once. `kind`: request, reply, picture, or not asked."""
        line = {"image": name, "kind": kind, "fault": fault, **details}
        self.outcome.failures.append(line)
        with self.failures.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        logger.warning("%s: %s", name, fault)

    def finish(self) -> CountOutcome:
        """Write the report."""
        spent = self.usage["prompt_tokens"] * self.config.price_in
        spent += self.usage["completion_tokens"] * self.config.price_out
        self.outcome.failures.sort(key=lambda item: item["image"])
        self.outcome.report = {
            "asked": self.outcome.asked,
            "written": self.outcome.written,
            "skipped": self.outcome.skipped,
            "failed": len(self.outcome.failures),
            "seconds": round(time.monotonic() - self.started, 3),
            "retries": self.usage["retries"],
            "prompt_tokens": self.usage["prompt_tokens"],
            "completion_tokens": self.usage["completion_tokens"],
            "cost": round(spent / 1e6, 6),
            "images": dict(sorted(self.per_image.items())),
        }
        atomic_write_json(_beside(self.outcome.folder, "report.json"), self.outcome.report)
        return self.outcome


def _beside(folder: Path, name: str) -> Path:
    return folder.with_name(f"{folder.name}_{name}")


# ------------------------------------------------------------------------------------------------- server


def _endpoint(config: AskConfig, images: ImageSet) -> Endpoint:
    key = api_key(config.api_key_env)
    if not key:
        logger.info("no key in the environment variable %s: asking without one", config.api_key_env)
    shape: dict[str, Any] | None = {"type": "json_object"} if config.json_output else None
    if config.json_schema:
        given = config.chosen_setting() == "open_vocabulary"
        shape = counts_schema((words(config.words) or images.class_names) if given else ())
    return Endpoint(
        url=chat_url(config.base_url),
        key=key,
        model=config.model,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        response_format=shape,
        concurrency=config.concurrency,
        retries=config.retries,
        first_wait=config.first_wait,
        timeout=config.timeout,
        connect_timeout=config.connect_timeout,
        most_wait=config.most_wait,
    )


async def _ask_server(
    endpoint: Endpoint, config: AskConfig, run: _Run, images: Sequence[ImageEntry], prompt: str
) -> None:
    from tqdm import tqdm

    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line per request otherwise

    def question(image: ImageEntry, *more: dict[str, Any]) -> Question:
        def messages() -> list[dict[str, Any]]:
            data, kind = picture_bytes(image.path, config.published_request, config.max_side)
            return [user_message(prompt, data, kind), *more]

        return Question(image.file_name, messages)

    by_name = {image.file_name: image for image in images}
    questions = [question(image) for image in images]
    async with ChatClient(endpoint) as client:
        bar = tqdm(total=len(images), unit="picture", disable=None)
        for round_left in range(config.second_try, -1, -1):
            again = []
            async for reply in client.ask_all(questions):
                bar.update()
                fault = _take(run, reply, last=round_left == 0)
                if fault and round_left:
                    again.append(question(by_name[reply.name], *_complaint(reply.text, fault)))
            questions = again
            bar.total += len(again)
        bar.close()
        run.usage["retries"] = client.retried


def _take(run: _Run, reply: Reply, last: bool) -> str:
    """Store or note one reply; the fault of a reply without counts where another try may follow."""
    if reply.kind != "ok":
        run.fail(reply.name, reply.kind, reply.fault, status=reply.status, attempts=reply.attempts)
        return ""
    run.used(reply.name, reply.prompt_tokens, reply.completion_tokens, reply.seconds)
    fault = run.take(reply.name, reply.text, reply.cut)
    if fault and last:
        run.fail(reply.name, "reply", fault, attempts=reply.attempts, reply=reply.text)
    return fault


def _complaint(text: str, fault: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The earlier reply and what was wrong with it, as further messages."""
    wish = "Answer again with one JSON object only, name to whole number."
    content = f"This answer cannot be used: {fault}. {wish}"
    return {"role": "assistant", "content": text}, {"role": "user", "content": content}


# -------------------------------------------------------------------------------------------------- local


def _ask_local(config: CountConfig, run: _Run, images: Sequence[ImageEntry], prompt: str) -> None:
    from tqdm import tqdm

    from model.instructsam.qwen import load_qwen
    from utils.distributed import choose_device
    from utils.hub import resolve

    path = resolve(config.pretrained_model_name_or_path, what="Qwen2.5-VL folder")
    counter = load_qwen(path, choose_device(config.device), config.precision)
    size = config.count_batch
    with tqdm(total=len(images), unit="picture", disable=None) as bar:
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            count_batch(counter, config, run, batch, prompt)
            bar.update(len(batch))


def count_batch(
    counter: "QwenCounter", config: AskConfig, run: _Run, images: Sequence[ImageEntry], prompt: str
) -> None:
    """Ask the local model about some pictures at once; a picture that cannot be read fails alone."""
    names, pictures = [], []
    for image in images:
        try:
            pictures.append(read_rgb(image.path))
            names.append(image.file_name)
        except (OSError, ValueError) as error:
            run.fail(image.file_name, "picture", str(error))
    if not pictures:
        return
    begun = time.monotonic()
    answers = counter.answer(
        pictures, prompt, config.max_new_tokens, config.temperature if config.sample else 0.0
    )
    seconds = (time.monotonic() - begun) / len(pictures)
    for name, answer in zip(names, answers, strict=True):
        run.used(name, answer.prompt_tokens, answer.new_tokens, seconds)
        fault = run.take(name, answer.text, answer.cut)
        if fault:
            run.fail(name, "reply", fault, attempts=1, reply=answer.text)
