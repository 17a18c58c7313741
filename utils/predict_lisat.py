"""A checkpoint ready to answer; samples -> predictions, each picture encoded once for (`max_rows`) queries.

Used by the evaluation and the demo. B pictures, R queries (token rows), H/W pixels of a picture.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset.collate import collate
from dataset.image import ImageProcessor
from dataset.sample import Conversation, Sample
from dataset.text import Tokenizer
from model.checkpoint import load_lisat
from model.generation import RowAnswer
from model.layouts import read_layout
from model.lisat import Lisat
from model.quantize import quantize_llm
from utils.io import StrPath
from utils.merge_lisat import find_processor
from utils.predictions import query_record, target_of
from utils.windows import cut, stitch, window_boxes

logger = logging.getLogger(__name__)


PUBLISHED_CONV_TYPE = "vicuna_v1"
"""Template of the published evaluation, demo and captioning programs (their training uses `llava_v1`)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_for_inference(
    folder: StrPath,
    device: str = "cpu",
    precision: str = "auto",
    image_size: int = 0,
    llm_weights: str = "",
    **options: Any,
) -> tuple[Lisat, Tokenizer, ImageProcessor]:
    """Model, tokenizer and image processor of a merged LISAT folder, ours or published.

    Args:
        device: where the model goes. precision: "fp32", "bf16", "fp16", or "auto": bf16 on an accelerator,
            fp32 on a CPU. Masks are upscaled in fp32 whatever the precision.
        image_size: side of the SAM input, checked against the checkpoint; 0 takes the checkpoint's.
        llm_weights: "int8" or "int4" rounds the language model's weights (`model.quantize`); "" keeps them.
        options: see `model.checkpoint.Options`; `vision_tower` matters for published folders only.

    Raises:
        ValueError: no such checkpoint, its parts do not belong together, or its weights cannot be rounded.
    """
    folder = Path(folder)
    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    model, config = load_lisat(folder, dtype=DTYPES[precision], **options)
    tokenizer = Tokenizer.from_pretrained(folder)
    side = config.sam.image_size
    if image_size and image_size != side:
        raise ValueError(f"--image_size {image_size}: the SAM of {folder} takes {side}; leave the flag out")
    if tokenizer.seg_token_id != config.seg_token_id:
        raise ValueError(
            f"{folder}: [SEG] has id {tokenizer.seg_token_id} in the tokenizer and {config.seg_token_id} in "
            "config.json; the tokenizer files belong to another checkpoint"
        )
    if len(tokenizer) > config.llm["vocab_size"]:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {config.llm['vocab_size']}; "
            "the tokenizer files belong to another checkpoint"
        )
    processor = find_processor(str(folder), side, options.get("vision_tower"))
    layout = read_layout(folder)
    if layout.published and "conv_type" not in layout.fields:
        config.conv_type = PUBLISHED_CONV_TYPE
        logger.info(
            "%s does not say how it was asked; the published programs ask with %s", folder, config.conv_type
        )
    if llm_weights:
        quantize_llm(model, llm_weights, device)
    model.to(device).eval()
    logger.info("%s: %s on %s", folder, precision, device)
    return model, tokenizer, processor


def llm_weights(config: Any) -> str:
    """`llm_weights` of `load_for_inference` from a command line's `load_in_8bit` and `load_in_4bit`."""
    return "int8" if config.load_in_8bit else "int4" if config.load_in_4bit else ""


@dataclass(frozen=True)
class Protocol:
    """What decides the numbers besides weights and data.

    `eval_prompt`: "forced" puts `forced_answer` into the prompt, "answer" keeps the answers that the samples
    carry; both read the masks from one pass over the prompt. "open" lets the model write its answer, at most
    `max_new_tokens` long. `score` of a mask: "foreground" (mean foreground probability) or "iou" (SAM's own
    estimate). `compat_leftpad_mask` and `compat_unk_mask` repeat faults of the published evaluation: a row of
    a batch sees its padding; unknown words, which share the padding's id, are not seen.
    """

    eval_prompt: str = "open"
    forced_answer: str = "[SEG]"
    conv_type: str = "llava_v1"
    max_new_tokens: int = 512
    score: str = "foreground"
    compat_leftpad_mask: bool = False
    compat_unk_mask: bool = False

    @property
    def generates(self) -> bool:
        """Whether the model writes the answer itself."""
        return self.eval_prompt == "open"

    def prompt(self, conversation: Conversation) -> Conversation:
        """The conversation as the model gets it: its last answer forced, kept or left open."""
        if self.eval_prompt == "answer":
            return conversation
        *before, (user, _) = conversation.turns
        answer = None if self.generates else self.forced_answer
        return replace(conversation, turns=[*before, (user, answer)])


@dataclass
class _Piece:
    """Some consecutive queries of one window of the sample at `index`, ready to be asked."""

    index: int
    window: int
    sample: Sample


@dataclass
class _Work:
    """What a loader process hands over: whole samples, and their pieces in batches ready for the model."""

    samples: dict[int, Sample]
    batches: list[tuple[list[_Piece], dict[str, Any]]]


class _Loader:
    """Reads samples and prepares batches (runs inside loader processes)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        protocol: Protocol,
        im_start_end: bool,
        max_rows: int,
        windows: int,
    ) -> None:
        self.tokenizer, self.processor, self.protocol = tokenizer, processor, protocol
        self.im_start_end, self.max_rows, self.windows = im_start_end, max_rows, windows

    def __call__(self, items: Sequence[tuple[int, Sample]]) -> _Work:
        work = _Work(dict(items), [])
        group: list[_Piece] = []
        rows = 0
        for piece in (piece for index, sample in items for piece in self._pieces(index, sample)):
            size = len(piece.sample.conversations)
            if group and rows + size > self.max_rows:
                work.batches.append((group, self._batch(group)))
                group, rows = [], 0
            group.append(piece)
            rows += size
        if group:
            work.batches.append((group, self._batch(group)))
        return work

    def _pieces(self, index: int, sample: Sample) -> Iterator[_Piece]:
        conversations = [self.protocol.prompt(conversation) for conversation in sample.conversations]
        for window, box in enumerate(window_boxes(*sample.image.shape[:2], self.windows)):
            for first in range(0, len(conversations), self.max_rows):
                part = conversations[first : first + self.max_rows]
                yield _Piece(index, window, cut(sample, box, part))

    def _batch(self, pieces: list[_Piece]) -> dict[str, Any]:
        return collate(
            [piece.sample for piece in pieces],
            self.tokenizer,
            self.processor,
            conv_type=self.protocol.conv_type,
            padding_side="left",
            inference=True,
            im_start_end=self.im_start_end,
        )


class _Numbered(torch.utils.data.Dataset):
    """(index, sample) of a dataset that gives samples."""

    def __init__(self, dataset: Sequence[Sample]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        return index, self.dataset[index]


def predict(
    model: Lisat,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    dataset: Sequence[Sample],
    protocol: Protocol,
    indices: Sequence[int] | None = None,
    batch_size: int = 4,
    max_rows: int = 64,
    workers: int = 0,
    windows: int = 1,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Iterator[tuple[int, Sample, list[dict[str, Any]]]]:
    """Predictions of a data set, picture by picture in the order of `indices`.

    Args:
        model: on its device and in its precision, in eval mode.
        dataset: anything with len and [] that gives samples whose conversations carry their targets.
        indices: which samples; None means all.
        batch_size: pictures per call of the model. max_rows: queries per call. workers: loader processes.
        windows: so many overlapping windows a side, put together again (`utils.windows`).
        prepare: changes a batch, for example `EmbeddingCache.replace` (whole pictures only).

    Yields:
        (index, sample, QUERY records of `utils.predictions`), one per picture.
    """
    if windows > 1 and prepare is not None:
        raise ValueError("prepare works on whole pictures; leave it out, or windows at 1")
    indices = range(len(dataset)) if indices is None else indices
    groups = [list(indices[k : k + batch_size]) for k in range(0, len(indices), batch_size)]
    load = _Loader(tokenizer, processor, protocol, model.config.mm_use_im_start_end, max_rows, windows)
    loader = torch.utils.data.DataLoader(
        _Numbered(dataset), batch_sampler=groups, collate_fn=load, num_workers=workers
    )
    for work in loader:
        answers: dict[int, list[list[RowAnswer]]] = {i: [[] for _ in range(windows**2)] for i in work.samples}
        for pieces, batch in work.batches:
            found = iter(answer_batch(model, batch if prepare is None else prepare(batch), protocol))
            for piece in pieces:
                answers[piece.index][piece.window] += [next(found) for _ in piece.sample.conversations]
        for index, sample in work.samples.items():
            whole = answers[index][0]
            if windows > 1:
                size = sample.image.shape[:2]
                boxes = window_boxes(*size, windows)
                whole = [stitch(parts, boxes, size) for parts in zip(*answers[index], strict=True)]
            yield index, sample, _records(sample, whole, tokenizer, protocol)


@torch.inference_mode()
def answer_batch(model: Lisat, batch: dict[str, Any], protocol: Protocol) -> list[RowAnswer]:
    """The model's answers to the R rows of a left-padded batch of `collate` (tensors on the CPU; what the
    model needs of them goes to its device). `image_embeddings` in the batch replace `images`."""
    return model.evaluate(
        batch["images_clip"],
        batch.get("images"),
        batch["input_ids"],
        batch["sam_mask_shape_list"],
        protocol.max_new_tokens if protocol.generates else 0,
        offset=batch["offset"],
        attention_masks=batch["attention_masks"],
        image_embeddings=batch.get("image_embeddings"),
        score=protocol.score,
        compat_leftpad_mask=protocol.compat_leftpad_mask,
        compat_unk_mask=protocol.compat_unk_mask,
    )


def _records(
    sample: Sample, answers: Sequence[RowAnswer], tokenizer: Tokenizer, protocol: Protocol
) -> list[dict[str, Any]]:
    size = sample.image.shape[:2]
    records = []
    for conversation, answer in zip(sample.conversations, answers, strict=True):
        masks = answer.masks.numpy()
        prediction = masks[0] if len(masks) else np.zeros(size, dtype=bool)
        record = query_record(
            prediction,
            target_of(conversation, size),
            query=conversation.query or conversation.turns[-1][0],
            text=conversation.turns[-1][0],
            kind=conversation.kind,
            ref_id=conversation.ref_id,
            sent_id=conversation.sent_id,
            gt_exists=conversation.exists,
            pred_exists=bool(answer.present and prediction.any()),
            score=round(float(answer.scores[0]), 6) if len(masks) else None,
            generated=tokenizer.decode(answer.new_ids) if protocol.generates else "",
            more_masks=masks[1:],
        )
        records.append(record)
    return records
