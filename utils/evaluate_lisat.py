"""Evaluation of a LISAT checkpoint on a data set: inference, scores, bootstrap (logic of `eval_lisat.py`).

Protocols. *forced*: the answer `[SEG]` is part of the prompt, as in the published GRES numbers; one pass over
the prompt gives the mask. *answer*: the same with a whole answer sentence around `[SEG]`, as in training.
*open*: the model writes its answer, which may hold no `[SEG]` at all.
Several processes (torchrun, or `--process_num i --world_size n`) each take every n-th picture and write their
own file; whoever finishes last merges them.
"""

import hashlib
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from utils.io import StrPath

if TYPE_CHECKING:
    import numpy as np

    from dataset.sample import Sample
    from utils.predict_lisat import Protocol
    from utils.predictions import Predictions

logger = logging.getLogger(__name__)

MERGED_MODEL, SHIPPED_MODEL = Path("runs/lisat/hg_model"), Path("checkpoints/lisat_tiny")
REPO = Path(__file__).resolve().parent.parent


@dataclass
class EvalConfig:
    """Evaluate a LISAT checkpoint: predict masks for a data set, score them, bootstrap the scores."""

    cmd: Literal["inference", "metrics", "bootstrap_metrics", "download"] = "inference"
    """inference: predict and score; metrics, bootstrap_metrics: score the predictions on disk again;
    download: say what to fetch and where to put it."""
    pretrained_model_path: str = ""
    """Checkpoint folder. Empty: runs/lisat/hg_model if it is there, else checkpoints/lisat_tiny."""
    vision_tower: str = ""
    """Tower folder or OpenCLIP file of a published checkpoint; empty: where the checkpoint says."""
    tower_activation: Literal["", "gelu", "quick_gelu"] = ""
    """Activation of a tower without config.json."""
    val_dataset: str = "GeoReasonSeg"
    """Data set as in training: NAME, NAME|SPLIT, generic:PATH or
    sem_seg_folder:PATH|FILES."""
    dataset_dir: str = "./dataset"
    """Root of the data sets."""
    split: str = "test"
    """Split of a data set that is given by its NAME alone."""
    list_file: str = ""
    """File with the names of the pictures to score (GRES-like data)."""
    all_texts: bool = False
    """Ask every text of a GRES-like picture; off: the first, as published."""
    keep_empty: bool = False
    """Score GRES-like files without any target (as empty targets) instead of leaving them out."""
    strict: bool = False
    """Stop at unusable files of the data set instead of leaving them out with a warning."""
    templates: str = "auto"
    """Question templates: default, tiny, or a file. auto: those the checkpoint was trained with."""
    vis_save_path: str = "./inference_dir/lisat"
    """Folder for predictions and results."""
    eval_prompt: Literal["auto", "forced", "answer", "open"] = "auto"
    """forced: the prompt ends with the answer --forced_answer; answer: with a whole fixed answer that holds
    [SEG]; open: the model answers.
    auto: forced for GeoReasonSeg as published, open for everything else."""
    forced_answer: str = "[SEG]"
    """The answer put into forced prompts."""
    conv_type: str = "auto"
    """Prompt template. auto: vicuna_v1 for the published protocol (GeoReasonSeg, forced), else the
    checkpoint's own (vicuna_v1 for one that does not say, as in the published programs)."""
    score: Literal["foreground", "iou"] = "foreground"
    """Score of a mask: its mean foreground probability, or SAM's own estimate of its IoU."""
    compat_leftpad_mask: bool = False
    """Repeat a fault of the published evaluation: in a batch, shorter prompts see their padding. Published
    batches hold five queries of one picture: --batch_size 1 --max_rows 5."""
    compat_unk_mask: bool = False
    """Repeat another: attention masks come from ids, so words that the tokenizer does not know (their id is
    also the padding's) are not seen."""
    low_precision_pe: bool = False
    """SAM's positional codes in the model's bf16 or fp16, as in the published runs, instead of fp32."""
    raster: Literal["official", "exact"] = "official"
    """How polygons become pixels: as published, or pixel-exact."""
    respect_ignore: bool = False
    """Leave ignore pixels (255) out of the counts; off: background in GRES-like files, as published."""
    shuffle_questions: bool = False
    """Add the control: every query scored with the prediction for another query of its picture."""
    image_size: int = 0
    """Side of the SAM input; 0: what the checkpoint says."""
    model_max_length: int = 512
    """Accepted for old command lines; evaluation cuts nothing."""
    max_new_tokens: int = 512
    """Longest answer in open prompts."""
    batch_size: int = 4
    """Pictures per batch; all queries of a picture share one encoding."""
    max_rows: int = 64
    """Most queries in one call of the model; more of them are done in several calls."""
    windows: int = 1
    """Cut every picture into so many overlapping windows a side and put the masks together again (land cover
    in large pictures; questions about the whole picture need 1)."""
    workers: int = -1
    """Processes that load pictures; -1: 4 with an accelerator, none without."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format; auto: bf16 with an accelerator, fp32 without."""
    load_in_8bit: bool = False
    """Language model weights in 8 bits (bitsandbytes); whatever draws masks stays in --precision."""
    load_in_4bit: bool = False
    """Language model weights in 4 bits (NF4)."""
    cache_image_embeddings: str = ""
    """Keep SAM's image embeddings for later runs: a folder (or 'memory'); empty: compute them."""
    cache_precision: Literal["same", "bf16"] = "same"
    """Cached embeddings: as computed, or rounded to bf16 (half the space of fp32)."""
    cache_limit_gib: float = 0.0
    """Space for cached embeddings in GiB; the rest is computed. 0: 16 of memory, a folder without limit."""
    device: str = "auto"
    """auto: this process's accelerator where there is one, else cpu."""
    local_rank: int = 0
    """Set by launchers."""
    process_num: int = 0
    """Number of this process when processes are started by hand."""
    world_size: int = 1
    """How many processes are started by hand."""
    limit: int = 0
    """Evaluate the first so many pictures only; 0: all."""
    restart: bool = False
    """Forget predictions already in --vis_save_path instead of continuing behind them."""
    gallery: int = 12
    """So many predictions are drawn into gallery_<dataset>.png; 0: none."""
    html: bool = True
    """Write the report report_<dataset>.html: one file with intervals, charts and a gallery."""
    boundary: bool = True
    """Boundary IoU as well."""
    recount: bool = False
    """metrics: count the pixels of the stored masks again."""
    bootstrap_rounds: int = 20
    """Rounds of bootstrap_metrics."""
    bootstrap_fraction: float = 0.8
    """Share of the pictures drawn per round."""
    seed: int = 0
    """Of the question templates, the bootstrap, the control and the gallery."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = [
            f"--{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (
                ("batch_size", 1),
                ("max_rows", 1),
                ("windows", 1),
                ("world_size", 1),
                ("max_new_tokens", 1),
            )
            if getattr(self, name) < least
        ]
        if not 0 <= self.process_num < max(1, self.world_size):
            faults.append(
                f"--process_num {self.process_num} is not in 0..{self.world_size - 1} (--world_size)"
            )
        if self.compat_leftpad_mask and self.compat_unk_mask:
            faults.append("--compat_leftpad_mask and --compat_unk_mask exclude each other")
        if self.low_precision_pe and self.precision == "fp32":
            faults.append("--low_precision_pe has no effect with --precision fp32; use bf16 or fp16")
        if "[SEG]" not in self.forced_answer:
            faults.append(f"--forced_answer {self.forced_answer!r} holds no [SEG]")
        if not 0 < self.bootstrap_fraction <= 1:
            faults.append(f"--bootstrap_fraction {self.bootstrap_fraction} is not in (0, 1]")
        if self.load_in_8bit and self.load_in_4bit:
            faults.append("--load_in_8bit and --load_in_4bit exclude each other")
        if self.cache_limit_gib < 0:
            faults.append(f"--cache_limit_gib is {self.cache_limit_gib}; it must be 0 or more")
        return faults


def run(config: EvalConfig) -> str:
    """Carry out `config.cmd`; returns the text to show."""
    commands = {
        "inference": inference,
        "metrics": score,
        "bootstrap_metrics": bootstrap,
        "download": download_advice,
    }
    return commands[config.cmd](config)


# ---------------------------------------------------------------- inference


def inference(config: EvalConfig) -> str:
    """Predict this process's share of the pictures, merge when all are there, and score."""
    folder = model_folder(config.pretrained_model_path, prefer_merged=True)  # before the slow imports
    from utils.distributed import place_process
    from utils.embedding_cache import open_cache
    from utils.predict_lisat import llm_weights, load_for_inference, predict
    from utils.predictions import PredictionWriter, merge_ranks, read_predictions

    rank, world_size, device = place_process(
        config.process_num, config.world_size, config.local_rank, config.device
    )
    model, tokenizer, processor = load_for_inference(
        folder,
        device,
        config.precision,
        config.image_size,
        llm_weights(config),
        vision_tower=config.vision_tower or None,
        tower_activation=config.tower_activation or None,
        low_precision_pe=config.low_precision_pe,
    )
    if config.low_precision_pe and str(model.dtype) == "torch.float32":
        raise ValueError("--low_precision_pe has no effect in fp32; add --precision bf16 or fp16")
    protocol = choose_protocol(config, model.config.conv_type)
    templates = choose_templates(config, model.config.templates)
    dataset = open_dataset(config, protocol.eval_prompt, templates)
    number = min(config.limit, len(dataset)) if config.limit else len(dataset)
    header = {
        "dataset": dataset_name(config),
        "data": dataset_spec(config),
        "templates": templates,
        "n_images": number,
        "checkpoint": str(config.pretrained_model_path or folder),
        "weights": fingerprint(folder),
        "eval_prompt": protocol.eval_prompt,
        "forced_answer": protocol.forced_answer if protocol.eval_prompt == "forced" else None,
        "conv_type": protocol.conv_type,
        "max_new_tokens": protocol.max_new_tokens if protocol.generates else None,
        "score": protocol.score,
        "compat_leftpad_mask": protocol.compat_leftpad_mask or None,
        "compat_unk_mask": protocol.compat_unk_mask or None,
        "low_precision_pe": config.low_precision_pe or None,
        "windows": config.windows if config.windows > 1 else None,
        "raster": config.raster,
        "respect_ignore": config.respect_ignore,
        "precision": str(model.dtype).removeprefix("torch."),
        "llm_weights": llm_weights(config) or None,
        "rounded_embeddings": (config.cache_image_embeddings and config.cache_precision == "bf16") or None,
        "all_texts": config.all_texts,
        "list_file": config.list_file or None,
        "image_size": processor.sam_size,
        "seed": config.seed,
    }
    cache = None
    if config.cache_image_embeddings:
        cache = open_cache(
            model, config.cache_image_embeddings, config.cache_limit_gib, config.cache_precision
        )
    start, queries = time.perf_counter(), 0
    with PredictionWriter(config.vis_save_path, header, rank, world_size, config.restart) as writer:
        wanted = [index for index in range(rank, number, world_size) if index not in writer.done]
        logger.info(
            "%s: %d of %d pictures here, %d done before",
            header["dataset"],
            len(wanted),
            number,
            len(writer.done),
        )
        workers = config.workers if config.workers >= 0 else 4 * (device != "cpu")
        found = predict(
            model,
            tokenizer,
            processor,
            dataset,
            protocol,
            wanted,
            config.batch_size,
            config.max_rows,
            workers,
            config.windows,
            prepare=cache.replace if cache is not None else None,
        )
        for done, (index, sample, records) in enumerate(found, start=1):
            writer.write(index, sample.image_path, sample.image.shape[:2], records)
            queries += len(records)
            if done % max(1, len(wanted) // 10) == 0:
                seconds = time.perf_counter() - start
                logger.info("%d / %d pictures, %.1f queries/s", done, len(wanted), queries / seconds)
    if cache is not None:
        logger.info("%s", cache.describe())
    merged = merge_ranks(config.vis_save_path, header["dataset"])
    if merged is None:
        found = read_predictions(config.vis_save_path, header["dataset"])
        missing = number - len(found.images)
        return f"process {rank} of {world_size} is done; {missing} pictures of others are missing"
    logger.info("predictions: %s", merged)
    if rank != 0 and not wanted:  # somebody else finished the job, and scores it
        return f"process {rank} of {world_size} is done; all predictions are in {merged}"
    return score(config)


def choose_protocol(config: EvalConfig, checkpoint_conv_type: str) -> "Protocol":
    """The protocol of a run with its `auto` settings decided; says what was chosen."""
    from dataset.text import CONV
    from utils.predict_lisat import Protocol

    published = config.val_dataset.partition("|")[0] == "GeoReasonSeg"
    eval_prompt, conv_type = config.eval_prompt, config.conv_type
    if eval_prompt == "auto":
        eval_prompt = "forced" if published else "open"
    if conv_type == "auto":
        conv_type = "vicuna_v1" if published and eval_prompt == "forced" else checkpoint_conv_type
    if conv_type not in CONV:
        raise ValueError(f"--conv_type {conv_type} is unknown; choose one of auto, {', '.join(CONV)}")
    logger.info(
        "protocol: prompt %s, conversation template %s, raster %s", eval_prompt, conv_type, config.raster
    )
    if conv_type != checkpoint_conv_type:
        logger.info("the checkpoint's own template is %s", checkpoint_conv_type)
    return Protocol(
        eval_prompt,
        config.forced_answer,
        conv_type,
        config.max_new_tokens,
        config.score,
        config.compat_leftpad_mask,
        config.compat_unk_mask,
    )


def choose_templates(config: EvalConfig, checkpoint_templates: str) -> str:
    """The question templates of a run with `auto` decided; ValueError if they were a file that is gone."""
    from dataset.templates import BUILT_IN

    templates = checkpoint_templates if config.templates == "auto" else config.templates
    if config.templates == "auto" and templates not in BUILT_IN and not Path(templates).is_file():
        raise ValueError(
            f"the checkpoint was trained with the question templates of {templates}, which is not here; "
            f"give --templates: that file's new place, or one of {', '.join(BUILT_IN)}"
        )
    logger.info("question templates: %s (the checkpoint's: %s)", templates, checkpoint_templates)
    return templates


def fingerprint(folder: StrPath) -> str:
    """16 hex digits that change with the weights of a checkpoint folder.

    Hashes config.json, and of every weight file its size and 256 blocks of 64 KiB spread over it.
    """
    folder, block = Path(folder), 1 << 16
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".bin") and path.name != "config.json":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with path.open("rb") as file:
            for start in sorted({k * max(0, size - block) // 255 for k in range(256)}):
                file.seek(start)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- scoring


def score(config: EvalConfig) -> str:
    """Score the predictions in `vis_save_path`; writes results_<dataset>.json/.md, queries_<dataset>.csv,
    report_<dataset>.html and the gallery."""
    from utils.eval_report import build_report, report_markdown, write_gallery, write_report
    from utils.html_report import write_html
    from utils.query_table import query_rows, write_csv

    predictions = _stored(config)
    report = build_report(
        predictions,
        shuffle=config.shuffle_questions,
        recount=config.recount,
        seed=config.seed,
        boundary=config.boundary,
        rounds=config.bootstrap_rounds,
        fraction=config.bootstrap_fraction,
    )
    name = predictions.header["dataset"]
    folder = Path(config.vis_save_path)
    paths = list(write_report(folder, f"results_{name}", report))
    paths.append(write_csv(folder / f"queries_{name}.csv", query_rows(predictions)))
    if config.html:
        page = folder / f"report_{name}.html"
        paths.append(write_html(page, report, predictions, _picture, seed=config.seed))
    if config.gallery:
        file = folder / f"gallery_{name}.png"
        try:
            paths.append(write_gallery(file, predictions, _picture, config.gallery, config.seed))
        except (ValueError, OSError) as error:
            logger.warning("no gallery was drawn: %s", error)
    return report_markdown(report) + "\n" + "\n".join(f"written: {path}" for path in paths if path)


def bootstrap(config: EvalConfig) -> str:
    """The published bootstrap of the predictions in `vis_save_path`; writes bootstrap_<dataset>.json/.md."""
    from utils.eval_report import build_bootstrap, report_markdown, write_report

    predictions = _stored(config)
    report = build_bootstrap(predictions, config.bootstrap_rounds, config.bootstrap_fraction, config.seed)
    paths = write_report(config.vis_save_path, f"bootstrap_{predictions.header['dataset']}", report)
    return report_markdown(report) + "\n" + "\n".join(f"written: {path}" for path in paths)


def _stored(config: EvalConfig) -> "Predictions":
    from utils.predictions import read_predictions

    return read_predictions(config.vis_save_path, dataset_name(config))


def _picture(path: str) -> "np.ndarray":
    from dataset.image import load_rgb

    return load_rgb(path)


# ---------------------------------------------------------------- what is on disk


def dataset_spec(config: EvalConfig) -> str:
    """What `load_dataset` gets: `val_dataset`, with the split if it is a name alone."""
    given = config.val_dataset
    return given if "|" in given or ":" in given else f"{given}|{config.split}"


def dataset_name(config: EvalConfig) -> str:
    """Name used in file names: the set's or folder's name, and the split or pattern if it is not `test`."""
    head, _, part = dataset_spec(config).partition("|")
    name = Path(head.partition(":")[2] or head).name
    name = name if part in ("", "test") else f"{name}_{part}"
    return re.sub(r"_*[^\w.+-]+", "_", name).strip("_")


def open_dataset(config: EvalConfig, eval_prompt: str, templates: str) -> "Sequence[Sample]":
    """The data set of an evaluation: every question of every picture once, templates fixed by file names."""
    from dataset.registry import load_dataset

    return load_dataset(
        dataset_spec(config),
        config.dataset_dir,
        train=False,
        prompt=eval_prompt,
        raster=config.raster,
        respect_ignore=True if config.respect_ignore else None,
        templates=templates,
        seed=config.seed,
        all_texts=config.all_texts,
        keep_empty=config.keep_empty,
        list_file=config.list_file or None,
        strict=config.strict,
    )


def download_advice(config: EvalConfig) -> str:
    """What to fetch for the published evaluation and where to put it. Nothing is downloaded."""
    from utils.hub import KNOWN_REPOSITORIES

    root = Path(config.dataset_dir) / "reason_seg" / "GeoReasonSeg"
    return f"""Nothing is downloaded here. On a machine with internet access:

1. the checkpoint and its vision tower (16.2 GB and 1.2 GB)
   hf download {KNOWN_REPOSITORIES["LISAt-7b"]} --local-dir LISAt-7b
   hf download {KNOWN_REPOSITORIES["remote_clip_vit_l_14"]} --local-dir LISAt-7b/remote_clip_vit_l_14
2. the GRES annotations (repository lisat-bair/GRES) and the xView pictures that its README cuts into tiles;
   JSON files and pictures side by side in {root}/{{train,val,test}}
   (or the published folders gres_images/ and gres_annotations/ below {config.dataset_dir})

Then: python eval_lisat.py --cmd inference --pretrained_model_path LISAt-7b --dataset_dir {config.dataset_dir}
The checkpoint shipped in {SHIPPED_MODEL} needs none of this.
"""


def model_folder(given: str, prefer_merged: bool = False) -> Path:
    """The checkpoint folder a user means; empty: a merged model of an own run, or the shipped one."""
    from utils.hub import resolve

    if given:
        return resolve(given, what="checkpoint folder")
    choices = [MERGED_MODEL] if prefer_merged else []
    choices += [SHIPPED_MODEL, REPO / SHIPPED_MODEL]
    for folder in choices:
        if (folder / "config.json").is_file():
            logger.info("no checkpoint was given: using %s", folder)
            return folder
    raise ValueError(f"no checkpoint in {' or '.join(map(str, choices))}; give --pretrained_model_path")
