"""Aerial sets with one mask file per picture: EarthReason and RefSegRS."""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dataset.base import ConversationData, DataError, Fault, ReadOptions, picture_size
from dataset.draws import Draws, Rng
from dataset.gres import PICTURE_ENDINGS
from dataset.image import load_rgb
from dataset.index import Inputs, Listing, indexed
from dataset.sample import Conversation, Sample
from dataset.text import IMAGE_TOKEN, SEG_TOKEN
from utils.io import StrPath, is_text

logger = logging.getLogger(__name__)

MASK_FILE_SETS = ("EarthReason", "RefSegRS")
_QA_ENDINGS = (".json", ".txt")


@dataclass(frozen=True)
class MaskFileItem:
    """One picture: its mask file, and what is asked for (phrases or sentences, all meaning the mask)."""

    image: str
    mask: str
    texts: tuple[str, ...]


class MaskFileData(ConversationData):
    """Questions whose target is a mask file.

    Training: up to `num_per_image` of a picture's texts. Evaluation: the first (`all_texts`: all). Where the
    mask is empty nothing is there, and the answer is a denial.

    Args:
        name: for messages.
        items: the pictures.
        options: see `ReadOptions`.
        sentences: texts are whole sentences (else phrases).
        inside: which mask values count: `nonzero`, or `bright` (above 127; 1 in masks of 0 and 1).
        faults: of the pictures left out.
    """

    def __init__(
        self,
        name: str,
        items: Sequence[MaskFileItem],
        options: ReadOptions,
        sentences: bool,
        inside: Literal["nonzero", "bright"] = "nonzero",
        faults: Sequence[Fault] = (),
    ) -> None:
        super().__init__(name, options)
        self.items, self.sentences, self.inside = list(items), sentences, inside
        self.faults = list(faults)
        self._settle()

    def __len__(self) -> int:
        return len(self.items)

    def mask(self, index: int) -> np.ndarray:
        """uint8 (H, W), 0 and 1."""
        values = load_rgb(self.items[index].mask).max(axis=2)
        bright = self.inside == "bright" and values.max(initial=0) > 1
        return (values > (127 if bright else 0)).astype(np.uint8)

    def _sample(self, index: int, rng: Rng) -> Sample:
        item, draws = self.items[index], Draws(rng)
        image, mask = load_rgb(item.image), self.mask(index)[None]
        if mask.shape[1:] != image.shape[:2]:
            raise DataError(item.mask, "", f"mask is {mask.shape[1:]} pixels, picture {image.shape[:2]}")
        exists = bool(mask.any())
        if not exists and self._mask_per_seg:
            mask = mask[:0]
        numbers = list(range(len(item.texts) if self.options.train or self.options.all_texts else 1))
        if self.options.train:
            numbers = draws.choose(numbers, self.options.num_per_image)
        conversations = []
        for number in numbers:
            text = item.texts[number]
            pick = self._pick(f"{Path(item.image).name}:{number}", rng)
            question = self.templates.question(text, self.sentences, pick)
            reply = self.templates.answer if exists else self.templates.deny
            answer = reply(text, self.sentences, pick)
            turns = [(question, answer)] if self.options.train else self._eval_turns(question, answer)
            conversations.append(Conversation(turns, mask, text, exists, "", True, index, number))
        return Sample(item.image, image, conversations)


def open_mask_file_set(name: str, split: str, root: StrPath, options: ReadOptions) -> MaskFileData:
    """EarthReason or RefSegRS, wherever below `root` its folder lies (layouts: dataset/README.md)."""
    if name == "EarthReason":
        names = ("", "rs_reason_seg/RSReasonSeg", "RSReasonSeg", "EarthReason", "reason_seg/EarthReason")
        folder = _find(root, names, f"{split}/QAs", name)
        parts = [folder / split / part for part in ("images", "labels", "QAs")]
        inputs = Inputs(folders=tuple(parts))
        listing = indexed(
            f"EarthReason-{split}", inputs, lambda: read_earth_reason(*parts), options.index, root
        )
        sentences, inside = True, "nonzero"
    else:
        names = ("", "rs_ref_seg/RefSegRS", "RefSegRS", "refer_seg/RefSegRS")
        file = f"output_phrase_{split}.txt"
        folder = _find(root, names, file, name)
        inputs = Inputs(files=(folder / file,), folders=(folder / "images", folder / "masks"))
        build = lambda: read_ref_seg_rs(folder, split)  # noqa: E731
        listing = indexed(f"RefSegRS-{split}", inputs, build, options.index, root)
        sentences, inside = False, "bright"
    items = [MaskFileItem(image, mask, tuple(texts)) for image, mask, texts in listing.items]
    return MaskFileData(f"{name}|{split}", items, options, sentences, inside, listing.faults)


def read_earth_reason(images: Path, labels: Path, questions: Path) -> Listing:
    """Pictures, masks and question files of equal stems; items [picture, mask, questions].

    The published reader pairs the three folders by position in the sorted lists. That is done here only where
    no stem fits at all and the numbers of files agree.
    """
    pictures, masks = _files(images, PICTURE_ENDINGS), _files(labels, (".png",))
    texts = _files(questions, _QA_ENDINGS)
    stems = sorted(set(pictures) | set(masks) | set(texts))
    if not set(pictures) & set(masks) & set(texts) and len(pictures) == len(masks) == len(texts):
        logger.warning("%s: names differ between the folders; files are paired by position", images.parent)
        in_order = [[table[stem] for stem in sorted(table)] for table in (pictures, masks, texts)]
        rows = list(zip(*in_order))
        faults: list[Fault] = []
    else:
        rows, faults = [], []
        for stem in stems:
            files = [table.get(stem) for table in (pictures, masks, texts)]
            missing = [part for part, file in zip(("picture", "label", "QA file"), files) if file is None]
            if missing:
                faults.append(
                    Fault(str(next(f for f in files if f)), "", f"its {' and '.join(missing)} is not there")
                )
            else:
                rows.append(tuple(files))
    items = []
    for picture, mask, qa in rows:
        try:
            _same_size(picture, mask)
            items.append([str(picture), str(mask), _questions(qa)])
        except DataError as error:
            faults.append(error.fault)
    return Listing(items, faults=faults)


def read_ref_seg_rs(folder: StrPath, split: str) -> Listing:
    """Phrases of `output_phrase_<split>.txt` (lines `<number> <phrase>`); items [picture, mask, phrases]."""
    folder = Path(folder)
    source = folder / f"output_phrase_{split}.txt"
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: cannot be read ({error})") from error
    phrases: dict[str, list[str]] = {}
    faults = []
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r"(\d+)\s+(\S.*)", line.strip())
        if match is None or not _plain(match[2]):
            if line.strip():
                faults.append(
                    Fault(str(source), f"line {number}", f"expected a number and a phrase: {line[:60]!r}")
                )
            continue
        phrases.setdefault(match[1], []).append(match[2].strip())
    items = []
    for stem, texts in phrases.items():
        try:
            picture, mask = (_one_file(folder / part, stem) for part in ("images", "masks"))
            _same_size(picture, mask)
            items.append([str(picture), str(mask), texts])
        except DataError as error:
            faults.append(error.fault)
    return Listing(items, faults=faults)


def _find(root: StrPath, names: Sequence[str], mark: str, title: str) -> Path:
    looked = [Path(root) / name for name in names]
    for folder in looked:
        if (folder / mark).exists():
            return folder
    raise ValueError(f"{title}: {mark} is in none of {', '.join(str(folder) for folder in looked)}")


def _files(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in endings}


def _one_file(folder: Path, stem: str) -> Path:
    for ending in (".tif", ".tiff", ".png", ".jpg"):
        if (folder / f"{stem}{ending}").is_file():
            return folder / f"{stem}{ending}"
    raise DataError(folder / f"{stem}.tif", "", "is not there")


def _same_size(picture: Path, mask: Path) -> None:
    sizes = picture_size(picture), picture_size(mask)
    if sizes[0] != sizes[1]:
        raise DataError(mask, "", f"mask is {sizes[1]} pixels, picture {sizes[0]} (height, width)")


def _questions(path: Path) -> list[str]:
    """Questions of a QA file: {"questions": [...], "answer": [...]}."""
    try:
        body = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, "", f"not a readable JSON file ({error})") from error
    found: Any = body.get("questions") if isinstance(body, dict) else None
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(_plain(text) for text in found):
        raise DataError(path, "questions", f"expected a list of plain texts, found {repr(found)[:60]}")
    return [text.strip() for text in found]


def _plain(text: Any) -> bool:
    return is_text(text) and SEG_TOKEN not in text and IMAGE_TOKEN not in text
