"""Captions and answers in words by LISAT or LISAT_PRE: configuration and work of `pred_lisat_vqa.py`.

One load of the model for all question files; pictures encoded once, questions in batches sorted by length,
greedy decoding. Interrupted runs go on where they stopped (see `utils.answer_files`).
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from utils.answer_files import AnswerFile, plan_batches
from utils.caption_files import Question, dataset_key, read_questions, some
from utils.io import is_there

if TYPE_CHECKING:
    from model.layouts import Layout
    from utils.answering import Answerer, Prepared

logger = logging.getLogger(__name__)

PRE_CONV_TYPE = "llava_v1"
"""Template of published LISAT_PRE folders, which do not say how they were asked."""


@dataclass
class PredictVqaConfig:
    """Answer question files about pictures in words: captions, or short answers."""

    pretrained_model_path: str = ""
    """LISAT or LISAT_PRE folder. Empty: runs/lisat/hg_model if it is there, else checkpoints/lisat_tiny."""
    question_files: tuple[str, ...] = ("./dataset/vqa_caption",)
    """Question files (JSON lines with question_id, image, text), or folders of them."""
    answers_files: tuple[str, ...] = ()
    """Files to write, one per question file; empty: lisat_ucm.jsonl for UCM-Captions.jsonl, and so on."""
    out_dir: str = "./captioning_dir/lisat"
    """Folder of the answers."""
    dataset_base: str = "./dataset"
    """Folder that picture paths start from; pictures that are not there are looked for beside the file."""
    vision_tower: str = ""
    """Tower folder or OpenCLIP file of a published checkpoint; empty: where the checkpoint says."""
    tower_activation: Literal["", "gelu", "quick_gelu"] = ""
    """Activation of a tower without config.json."""
    conv_type: str = "auto"
    """Prompt template. auto: the checkpoint's own; where it does not say, as the published programs:
    vicuna_v1 for LISAT, llava_v1 for LISAT_PRE."""
    image_aspect_ratio: Literal["auto", "crop", "pad"] = "auto"
    """How pictures become squares: centre crop, or padded with the mean colour; auto: pad where a published
    LISAT_PRE says so."""
    max_new_tokens: int = 512
    """Longest answer."""
    batch_size: int = 16
    """Questions per call of the model. Part of what makes a run: other sizes may round differently."""
    workers: int = -1
    """Threads that load pictures; -1: 4 with an accelerator, 1 without; 0: none."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format; auto: bf16 with an accelerator, fp32 without."""
    device: str = "auto"
    """auto: this process's accelerator where there is one, else cpu."""
    skip_unreadable: bool = False
    """Leave out questions whose picture is missing or broken (they are listed) instead of stopping."""
    limit: int = 0
    """Answer the first so many questions of each file only; 0: all."""
    restart: bool = False
    """Forget answers that are there instead of going on behind them."""
    local_rank: int = 0
    """Set by launchers."""
    process_num: int = 0
    """Number of this process when processes are started by hand."""
    world_size: int = 1
    """How many processes are started by hand."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = [
            f"--{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("world_size", 1), ("limit", 0))
            if getattr(self, name) < least
        ]
        if not 0 <= self.process_num < max(1, self.world_size):
            faults.append(
                f"--process_num {self.process_num} is not in 0..{self.world_size - 1} (--world_size)"
            )
        if not self.question_files:
            faults.append("--question_files is empty; name at least one")
        return faults


@dataclass
class Job:
    """One question file: its questions, the places of its pictures, and its answers."""

    source: Path
    questions: list[Question]
    pictures: dict[str, Path]
    answers: AnswerFile


def run(config: PredictVqaConfig) -> str:
    """Answer this process's share of all question files; returns the text to show.

    Raises:
        ValueError: faulty questions, pictures that cannot be read, a checkpoint that does not load, or
            answers of another run in the place of these.
    """
    from utils.evaluate_lisat import model_folder

    folder = model_folder(config.pretrained_model_path, prefer_merged=True)
    sources, targets = choose_files(config)
    read = [_read(config, source) for source in sources]  # all faults before the slow imports
    from utils.distributed import place_process

    rank, world_size, device = place_process(
        config.process_num, config.world_size, config.local_rank, config.device
    )
    settings = choose_settings(config, folder, device)
    jobs = [
        _open(config, source, target, *content, settings, folder, (rank, world_size, device))
        for source, target, content in zip(sources, targets, read, strict=True)
    ]
    for job in jobs:
        if job.answers.finished:
            logger.info("%s: answered already in %s", job.source, job.answers.target)
        else:
            told = (len(job.answers.mine()), len(job.answers.batches), len(job.answers.done))
            logger.info("%s: %d of %d batches here, %d done before", job.source, *told)
    if any(job.answers.mine() for job in jobs):
        answerer = load_answerer(folder, settings, device, config)
        workers = config.workers if config.workers >= 0 else 1 if device == "cpu" else 4
        for job in jobs:
            _answer(job, answerer, workers, config.skip_unreadable)
    return "\n".join(_finish(job, str(folder), rank, world_size) for job in jobs)


# ---------------------------------------------------------------- what is to be done


def choose_files(config: PredictVqaConfig) -> tuple[list[Path], list[Path]]:
    """Question files and the files for their answers; ValueError where one is missing or two are the same."""
    sources = []
    for path in map(Path, config.question_files):
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise ValueError(f"--question_files {path}: no question file (.jsonl) is there")
        sources += found
    if config.answers_files and len(config.answers_files) != len(sources):
        raise ValueError(
            f"--answers_files names {len(config.answers_files)} files for {len(sources)} question files"
        )
    targets = [Path(name) for name in config.answers_files] or [
        Path(config.out_dir) / f"lisat_{dataset_key(source.stem)}.jsonl" for source in sources
    ]
    for number, target in enumerate(targets):
        other = targets.index(target)
        if other < number:
            raise ValueError(
                f"{sources[other]} and {sources[number]} would both be answered in {target}; give "
                "--answers_files"
            )
        if target.resolve() in [source.resolve() for source in sources]:
            raise ValueError(f"{target} is a question file; give --answers_files or --out_dir")
    return sources, targets


@dataclass(frozen=True)
class Settings:
    """What decides the answers besides weights and questions."""

    conv_type: str
    precision: str
    pad: bool
    im_start_end: bool
    max_new_tokens: int
    batch_size: int


def choose_settings(config: PredictVqaConfig, folder: Path, device: str) -> Settings:
    """Settings with their `auto` decided from what the checkpoint folder says."""
    from dataset.text import CONV
    from model.layouts import read_layout
    from utils.merge_lisat import find_processor

    layout = read_layout(folder)
    processor = find_processor(str(folder), vision_tower=config.vision_tower or None)
    conv_type = own_conv_type(layout) if config.conv_type == "auto" else config.conv_type
    if conv_type not in CONV:
        raise ValueError(f"--conv_type {conv_type} is unknown; choose one of auto, {', '.join(CONV)}")
    precision = config.precision
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    pad = processor.clip_pad if config.image_aspect_ratio == "auto" else config.image_aspect_ratio == "pad"
    tags = bool(layout.fields.get("mm_use_im_start_end", True))
    logger.info("template %s, %s, pictures %s", conv_type, precision, "padded" if pad else "cropped")
    return Settings(conv_type, precision, pad, tags, config.max_new_tokens, config.batch_size)


def own_conv_type(layout: "Layout") -> str:
    """The template a checkpoint was trained with, or that of the published programs where it does not say."""
    from utils.predict_lisat import PUBLISHED_CONV_TYPE

    if "conv_type" in layout.fields:
        return layout.fields["conv_type"]
    return PUBLISHED_CONV_TYPE if layout.kind == "published" else PRE_CONV_TYPE


def _read(config: PredictVqaConfig, source: Path) -> tuple[list[Question], dict[str, Path]]:
    """Questions of a file and where their pictures are."""
    questions = read_questions(source, images=True)
    questions = questions[: config.limit] if config.limit else questions
    pictures = find_pictures(questions, [Path(config.dataset_base), source.parent])
    missing = [name for name, path in pictures.items() if not is_there(path)]
    if missing:
        said = (
            f"{source}: {len(missing)} of {len(pictures)} pictures are not there ({some(missing)}), neither "
        )
        said += f"below {config.dataset_base} nor below {source.parent}"
        if not config.skip_unreadable:
            raise ValueError(f"{said}; give --dataset_base, or leave their questions out (--skip_unreadable)")
        logger.warning("%s; their questions are left out", said)
    return questions, pictures


def find_pictures(questions: Sequence[Question], folders: Sequence[Path]) -> dict[str, Path]:
    """Path of every picture name: in the first of the folders that has it, else in the first."""
    names = dict.fromkeys(question.image for question in questions)
    return {
        name: next((folder / name for folder in folders if is_there(folder / name)), folders[0] / name)
        for name in names
    }


def _open(
    config: PredictVqaConfig,
    source: Path,
    target: Path,
    questions: list[Question],
    pictures: dict[str, Path],
    settings: Settings,
    folder: Path,
    place: tuple[int, int, str],
) -> Job:
    from dataset.text import Tokenizer, encode_prompt
    from utils.answering import question_text
    from utils.evaluate_lisat import fingerprint

    tokenizer = Tokenizer.from_pretrained(folder)
    turns = [[(question_text(question), None)] for question in questions]
    lengths = [
        len(encode_prompt(tokenizer, settings.conv_type, turn, True, settings.im_start_end)[0])
        for turn in turns
    ]
    batches = plan_batches([question.image for question in questions], lengths, settings.batch_size)
    header = {
        "questions": hashlib.sha256(source.read_bytes()).hexdigest()[:16],
        "n": len(questions),
        "weights": fingerprint(folder),
        "decoding": "greedy",
        **vars(settings),
        "device": place[2].partition(":")[0],
    }
    answers = AnswerFile(target, header, batches, *place[:2], config.restart)
    return Job(source, questions, pictures, answers)


# ---------------------------------------------------------------- the work


def load_answerer(folder: Path, settings: Settings, device: str, config: PredictVqaConfig) -> "Answerer":
    """Tower, projector and language model of a checkpoint folder, ready to answer (SAM is not read)."""
    from dataset.text import Tokenizer
    from model.checkpoint import load_llava
    from utils.answering import Answerer
    from utils.merge_lisat import find_processor
    from utils.predict_lisat import DTYPES

    model, lisat = load_llava(
        folder,
        dtype=DTYPES[settings.precision],
        vision_tower=config.vision_tower or None,
        tower_activation=config.tower_activation or None,
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    if len(tokenizer) > lisat.llm["vocab_size"]:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {lisat.llm['vocab_size']}; "
            "the tokenizer files belong to another checkpoint"
        )
    processor = find_processor(str(folder), vision_tower=config.vision_tower or None)
    processor = replace(processor, clip_pad=settings.pad)
    model.to(device).eval()
    logger.info("%s: %s on %s", folder, settings.precision, device)
    return Answerer(model, tokenizer, processor, settings.conv_type, settings.max_new_tokens)


def _answer(job: Job, answerer: "Answerer", workers: int, skip_unreadable: bool) -> None:
    """Do this process's batches of a job."""
    from utils.progress import Progress, clock

    wanted = job.answers.mine()
    if not wanted:
        return
    progress = Progress(len(wanted), 0)
    told: set[str] = set()
    try:
        for step, (number, prepared) in enumerate(_prepared(job, answerer, wanted, workers), start=1):
            questions = [job.questions[position] for position in job.answers.batches[number]]
            for name, reason in prepared.unreadable.items():
                lines = [question.line for question in questions if question.image == name]
                where = f"{job.source}:{min(lines)}: field image: {reason}"
                if not skip_unreadable:
                    raise ValueError(f"{where} (--skip_unreadable leaves such questions out)")
                if name not in told:
                    logger.warning("%s; its questions are left out", where)
                told.add(name)
            texts = answerer.answer(prepared)
            job.answers.write(
                number,
                [
                    {"text": texts[row]} if row in texts else {"skipped": prepared.unreadable[question.image]}
                    for row, question in enumerate(questions)
                ],
            )
            progress.advance(step, len(questions))
            if step % max(1, len(wanted) // 10) == 0 and not progress.shown:
                rate, left = progress.throughput(), clock(progress.seconds_left())
                logger.info(
                    "%s: %d / %d batches, %.1f questions/s, %s left",
                    job.source,
                    step,
                    len(wanted),
                    rate,
                    left,
                )
    finally:
        progress.close()
        job.answers.close()


def _prepared(
    job: Job, answerer: "Answerer", wanted: Sequence[int], workers: int
) -> Iterator[tuple[int, "Prepared"]]:
    """(number, batch) in order, prepared ahead in threads."""

    def prepare(number: int) -> "Prepared":
        questions = [job.questions[position] for position in job.answers.batches[number]]
        return answerer.prepare(questions, job.pictures)

    if workers == 0:
        yield from ((number, prepare(number)) for number in wanted)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: list[tuple[int, Future]] = []
        rest = iter(wanted)
        try:
            while True:
                for number in rest:
                    ahead.append((number, pool.submit(prepare, number)))
                    if len(ahead) > workers:
                        break
                if not ahead:
                    return
                number, future = ahead.pop(0)
                yield number, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def _finish(job: Job, checkpoint: str, rank: int, world_size: int) -> str:
    missing = job.answers.finish(job.questions, {"checkpoint": checkpoint, "question_file": str(job.source)})
    if missing:
        return (
            f"{job.source}: process {rank} of {world_size} is done, {missing} batches of others are missing"
        )
    skipped = job.answers.skipped()
    left_out = f", {skipped} questions left out (see {job.answers.sidecar})" if skipped else ""
    return f"{job.source}: {len(job.questions) - skipped} answers in {job.answers.target}{left_out}"
