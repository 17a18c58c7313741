"""Semantic segmentation folders: `images/`, `masks/` (class id per pixel, PNG), `classes.json` (id -> name).

A mask has its picture's stem and size. Id 255, and every class named `ignore`, does not count.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.base import UNREADABLE, ConversationData, DataError, Fault, ReadOptions, picture_size
from dataset.gres import PICTURE_ENDINGS, read_names
from dataset.image import load_rgb
from dataset.masks import IGNORE
from dataset.sample import Conversation, Sample
from dataset.templates import Pick
from utils.io import StrPath, read_json

_CORRECTIONS = 8 / 15
"""Share of corrections ("no tree, but a road") among the answers to absent classes, as published."""


def read_classes(folder: StrPath) -> dict[int, str]:
    """Class id -> name of `classes.json`, without what is ignored. ValueError names the faulty entry."""
    path = Path(folder) / "classes.json"
    classes: dict[int, str] = {}
    for key, name in read_json(path, dict).items():
        if not key.isdecimal() or int(key) > 255:
            raise ValueError(f"{path}: {key!r}: a class id is a number 0..255")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{path}: {key}: expected the class name, found {name!r}")
        if int(key) != IGNORE and name.strip().lower() != "ignore":
            classes[int(key)] = name.strip()
    doubled = sorted({name for name in classes.values() if list(classes.values()).count(name) > 1})
    if not classes or doubled:
        raise ValueError(f"{path}: " + (f"names used twice: {doubled}" if doubled else "no class"))
    return dict(sorted(classes.items()))


def read_label_mask(path: StrPath) -> np.ndarray:
    """Class ids of a mask file, uint8 (H, W); a palette's colours play no part. DataError unless it is one
    8-bit band."""
    path = Path(path)
    if not path.is_file():
        raise DataError(path, "", "mask is not there")
    try:
        with Image.open(path) as mask:
            if mask.mode in ("L", "P"):
                return np.array(mask)
            found = f"Pillow's mode {mask.mode}"
    except UNREADABLE as error:
        raise DataError(path, "", f"mask is not a readable picture ({error})") from error
    raise DataError(path, "", f"mask must be one 8-bit band of class ids, found {found}")


def random_view(
    image: np.ndarray, labels: np.ndarray, rng: np.random.Generator, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop that keeps at least the share `least` of both sides, turned and mirrored at random.

    image (H, W, 3) and labels (H, W) move alike; returns contiguous copies.
    """
    height, width = labels.shape
    share = rng.uniform(least, 1.0)
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    top, left = rng.integers(height - rows + 1), rng.integers(width - columns + 1)
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))

    def move(array: np.ndarray) -> np.ndarray:
        turned = np.rot90(array[top : top + rows, left : left + columns], turns)
        return np.ascontiguousarray(turned[:, ::-1] if mirror else turned)

    return move(image), move(labels)


def list_pairs(
    folder: StrPath, files: str | Iterable[str] | None = None
) -> tuple[list[tuple[Path, Path]], list[Fault]]:
    """(picture, mask) pairs sorted by name, and the faults of the others.

    Args:
        folder: holds `images/` and `masks/`.
        files: glob patterns on the picture's stem or name (a list, or separated by commas), or the path of a
            file that lists names; None takes all.
    """
    folder = Path(folder)
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise ValueError(f"{folder} has no folder {part}/; expected images/, masks/ and classes.json")
    pictures = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in PICTURE_ENDINGS)
    pictures = _filtered(pictures, files, folder)
    pairs, faults = [], []
    for picture in pictures:
        mask = folder / "masks" / f"{picture.stem}.png"
        try:
            size = picture_size(picture)
            found = picture_size(mask) if mask.is_file() else None
            if found is None:
                raise DataError(picture, "", f"mask {mask} is not there")
            if found != size:
                raise DataError(mask, "", f"mask is {found} pixels, picture {size} (height, width)")
            pairs.append((picture, mask))
        except DataError as error:
            faults.append(error.fault)
    return pairs, faults


def _filtered(pictures: list[Path], files: str | Iterable[str] | None, folder: Path) -> list[Path]:
    if files is None:
        return pictures
    if isinstance(files, str):
        for path in (Path(files), folder / files):
            if path.is_file():
                names = set(read_names(path))
                return [picture for picture in pictures if picture.stem in names]
        files = re.split(r",(?![^\[]*\])", files)  # commas outside brackets
    patterns = [pattern.strip() for pattern in files if pattern.strip()]
    chosen = [p for p in pictures if any(fnmatch(p.stem, x) or fnmatch(p.name, x) for x in patterns)]
    if not chosen:
        raise ValueError(
            f"{folder}/images: none of {len(pictures)} pictures matches {patterns}, and no such file"
        )
    return chosen


class SemSegData(ConversationData):
    """Class questions on a semantic segmentation folder.

    Training: up to `num_per_image` of the classes in the picture; each is with probability `absent_rate`
    replaced by a class that is not there (answered by a denial, or a correction that names the one replaced).
    Evaluation: a question for every class (or, `present_only`, for those in the picture); absent ones have an
    empty target.

    Args:
        folder: see the module text.
        options: see `ReadOptions`; pixels without a label keep 255 unless `respect_ignore` is False.
        files: see `list_pairs`.
        present_only: see above.
        min_area: pixels from which on a class counts as present; smaller traces are neither asked nor denied.
        name: for messages.
    """

    def __init__(
        self,
        folder: StrPath,
        options: ReadOptions,
        files: str | Iterable[str] | None = None,
        present_only: bool = False,
        min_area: int = 1,
        name: str | None = None,
    ) -> None:
        super().__init__(name or f"sem_seg_folder:{folder}", options)
        self.folder, self.present_only, self.min_area = Path(folder), present_only, max(1, min_area)
        self.classes = read_classes(folder)
        self.pairs, self.faults = list_pairs(folder, files)
        self._settle()

    def __len__(self) -> int:
        return len(self.pairs)

    def labels(self, index: int) -> np.ndarray:
        """Class ids of a picture, uint8 (H, W); everything that is not asked for is 255."""
        ids = read_label_mask(self.pairs[index][1])
        table = np.full(256, IGNORE, np.uint8)
        table[list(self.classes)] = list(self.classes)
        return table[ids]

    def _sample(self, index: int, rng: np.random.Generator) -> Sample:
        picture, mask_path = self.pairs[index]
        image, labels = load_rgb(picture), self.labels(index)
        if labels.shape != image.shape[:2]:
            raise DataError(mask_path, "", f"mask is {labels.shape} pixels, picture {image.shape[:2]}")
        if self.options.train and self.options.augment:
            image, labels = random_view(image, labels, rng, self.options.augment)
        areas = np.bincount(labels.ravel(), minlength=256)
        present = [c for c in self.classes if areas[c] >= self.min_area]
        absent = [c for c in self.classes if areas[c] == 0]
        if self.options.train:
            conversations = self._train(labels, present, absent, rng)
        else:
            asked = present if self.present_only else [c for c in self.classes if c in present + absent]
            conversations = [self._eval(labels, c, c in present, picture.name, rng) for c in asked]
        for number, conversation in enumerate(conversations):
            conversation.ref_id = index
            conversation.sent_id = number
        if not conversations:
            raise DataError(mask_path, "", "no class of classes.json is in the mask")
        return Sample(str(picture), image, conversations)

    def _target(self, labels: np.ndarray, index: int) -> np.ndarray:
        mask = np.where(labels == IGNORE, IGNORE, labels == index).astype(np.uint8)[None]
        return self._ignore(mask, default=True)

    def _train(
        self, labels: np.ndarray, present: list[int], absent: list[int], rng: np.random.Generator
    ) -> list[Conversation]:
        chosen = [int(c) for c in rng.permutation(present)[: self.options.num_per_image]]
        missing = [int(c) for c in rng.permutation(absent)]
        pick, texts = Pick(rng), self.templates
        nothing = np.zeros((0, *labels.shape), np.uint8)
        conversations = []
        for index in chosen:
            name = self.classes[index]
            if missing and rng.random() < self.options.absent_rate:
                wanted = self.classes[missing.pop()]
                if self.options.confirm_absent and rng.random() < self.options.confirm_absent:
                    turns = [(texts.question(wanted, False, pick), texts.answer(wanted, False, pick))]
                    empty = np.zeros((1, *labels.shape), np.uint8)
                    conversations.append(Conversation(turns, empty, wanted, False, "absent class"))
                    continue
                found = name if rng.random() < _CORRECTIONS else None
                turns = [(texts.question(wanted, False, pick), texts.deny(wanted, False, pick, found))]
                conversations.append(Conversation(turns, nothing, wanted, False, "absent class"))
            else:
                turns = [(texts.question(name, False, pick), texts.answer(name, False, pick))]
                conversations.append(Conversation(turns, self._target(labels, index), name, True, name))
        return conversations

    def _eval(
        self, labels: np.ndarray, index: int, exists: bool, file_name: str, rng: np.random.Generator
    ) -> Conversation:
        name = self.classes[index]
        pick = self._pick(f"{file_name}:{index}", rng)
        question, answer = (
            self.templates.question(name, False, pick),
            self.templates.answer(name, False, pick),
        )
        if not exists:
            answer = self.templates.deny(name, False, pick)
        target = self._target(labels, index)
        if not exists and self._mask_per_seg:
            target = target[:0]
        return Conversation(self._eval_turns(question, answer), target, name, exists, name)
