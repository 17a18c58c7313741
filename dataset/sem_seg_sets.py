"""The published semantic sets: ade20k, cocostuff, mapillary (a class id per pixel), pascal_part, paco_lvis
(outlines of objects and their parts).

Training asks about classes of a picture in one of three modes, drawn per picture: what is there (0.85),
something else, denied (0.07), or something else, corrected by what is there (0.08). Evaluation asks about
every class, or annotation, that is in the picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.base import ConversationData, DataError, Fault, NothingToAsk, ReadOptions
from dataset.draws import Draws, Rng
from dataset.image import load_rgb
from dataset.index import Inputs, Listing, indexed
from dataset.masks import IGNORE
from dataset.refer import inside, outline_mask, picture_lookup
from dataset.sample import Conversation, Sample
from dataset.sem_seg import read_label_mask
from utils.io import StrPath, read_json

LABEL_SETS = ("ade20k", "cocostuff", "mapillary")
PART_SETS = ("pascal_part", "paco_lvis")
MODES = ("true", "denial", "correction")
MODE_SHARES = (0.85, 0.07, 0.08)
_CLASS_NAMES = Path(__file__).parent / "class_names"
_FOLDERS = {"train": ("training", "train2017"), "val": ("validation", "val2017")}


class _SemanticData(ConversationData):
    """Modes and conversations, the same for both kinds of sets."""

    published = True

    def official(self, rng: Any, index: int | None = None) -> Sample:
        """One draw as published: the mode comes before the picture."""
        draws = Draws(rng)
        mode = self._mode(draws) if self.options.train else "true"
        return self._build(draws.place(len(self)) if index is None else index, mode, draws)

    def _sample(self, index: int, rng: Rng) -> Sample:
        draws = Draws(rng)
        return self._build(index, self._mode(draws) if self.options.train else "true", draws)

    def _build(self, index: int, mode: str, draws: Draws) -> Sample:
        raise NotImplementedError

    def _mode(self, draws: Draws) -> str:
        if draws.official:
            return draws.weighted(MODES, MODE_SHARES)
        absent = sum(MODE_SHARES[1:])
        shares = [
            1 - self.options.absent_rate,
            *(self.options.absent_rate * s / absent for s in MODE_SHARES[1:]),
        ]
        return draws.weighted(MODES, shares)

    def _asked(
        self, mode: str, present: list[str], absent: list[str], masks: np.ndarray, draws: Draws
    ) -> list[Conversation]:
        """Training conversations about names in the picture (with their masks) or about absent ones."""
        texts, made = self.templates, []
        if mode == "true":
            for name, mask in zip(present, masks, strict=True):
                question = texts.question(name, False, draws)
                turns = [(question, texts.answer(name, False, draws))]
                made.append(Conversation(turns, mask[None], name, True, name))
            return made
        for name, found in zip(absent, present):
            question = texts.question(name, False, draws)
            turns = [(question, texts.deny(name, False, draws, found if mode == "correction" else None))]
            made.append(Conversation(turns, masks[:0], name, False, "absent class"))
        return made

    def _shown(self, key: str, names: Sequence[str], masks: np.ndarray) -> list[Conversation]:
        """Evaluation conversations about names in the picture."""
        made = []
        for number, (name, mask) in enumerate(zip(names, masks, strict=True)):
            pick = self._pick(f"{key}:{number}", np.random.default_rng(0))
            question, answer = (
                self.templates.question(name, False, pick),
                self.templates.answer(name, False, pick),
            )
            made.append(Conversation(self._eval_turns(question, answer), mask[None], name, True, name))
        return made


def _numbered(path: str, image: np.ndarray, conversations: list[Conversation], index: int) -> Sample:
    for number, conversation in enumerate(conversations):
        conversation.ref_id, conversation.sent_id = index, number
    if not conversations:
        raise NothingToAsk(path, "", "no class to ask about is in the picture")
    return Sample(path, image, conversations)


# ------------------------------------------------------------------------------------------- class id masks


class LabelSet(_SemanticData):
    """Pictures with one class id per pixel.

    Args:
        name: for messages.
        pairs: (picture, mask) files.
        classes: class id -> name. Every other id does not count.
        options: see `ReadOptions`. Pixels without a class keep 255 where `respect_ignore` is true; the
            default is background, as published.
        hidden: names that no mask can show; only draws as published take them for absent.
    """

    def __init__(
        self,
        name: str,
        pairs: Sequence[tuple[Path, Path]],
        classes: dict[int, str],
        options: ReadOptions,
        hidden: Sequence[str] = (),
        shift: int = 0,
        faults: Sequence[Fault] = (),
    ) -> None:
        super().__init__(name, options)
        self.pairs, self.classes, self.hidden, self.shift = list(pairs), classes, list(hidden), shift
        self.faults = list(faults)
        self._settle()

    def __len__(self) -> int:
        return len(self.pairs)

    def labels(self, index: int) -> np.ndarray:
        """Class ids of a picture, uint8 (H, W); 255 where there is none."""
        table = np.full(256, IGNORE, np.uint8)
        for number in self.classes:
            table[number + self.shift] = number
        return table[read_label_mask(self.pairs[index][1])]

    def _build(self, index: int, mode: str, draws: Draws) -> Sample:
        picture, mask_path = self.pairs[index]
        image, labels = load_rgb(picture), self.labels(index)
        if labels.shape != image.shape[:2]:
            raise DataError(mask_path, "", f"mask is {labels.shape} pixels, picture {image.shape[:2]}")
        present = [int(number) for number in np.unique(labels) if number != IGNORE]
        if not present:
            raise NothingToAsk(mask_path, "", "no class to ask about is in the picture")
        if not self.options.train:
            names = [self.classes[number] for number in present]
            shown = self._shown(picture.name, names, self._targets(labels, present))
            return _numbered(str(picture), image, shown, index)
        count = self.options.num_per_image
        chosen = draws.sample(present, count)
        names = {self.classes[number] for number in present}
        known = [*self.classes.values()] if not draws.official else self._all_names()
        absent = draws.sample([name for name in known if name not in names], count)
        found = [self.classes[number] for number in chosen]
        masks = self._targets(labels, chosen if mode == "true" else [])
        return _numbered(str(picture), image, self._asked(mode, found, absent, masks, draws), index)

    def _all_names(self) -> list[str]:
        """Names in file order, those that masks cannot show among them."""
        return self.hidden or [*self.classes.values()]

    def _targets(self, labels: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        masks = np.zeros((len(numbers), *labels.shape), np.uint8)
        for place, number in enumerate(numbers):
            masks[place] = labels == number
        if len(numbers):
            masks[:, labels == IGNORE] = IGNORE
        return self._ignore(masks, default=False)


def open_label_set(name: str, split: str, root: StrPath, options: ReadOptions) -> LabelSet:
    """ade20k, cocostuff or mapillary below `root` (layouts: dataset/README.md); split `train` or `val`."""
    root, (word, year) = Path(root), _folders(name, split)
    if name == "mapillary":
        base = root / "mapillary"
        file = base / "config_v2.0.json"
        labels = read_json(file, dict).get("labels")
        if not isinstance(labels, list) or not all(
            isinstance(x, dict) and isinstance(x.get("readable"), str) for x in labels
        ):
            raise ValueError(f"{file}: labels: expected a list of classes with their field `readable`")
        names = [label["readable"].lower() for label in labels]
        folders = base / word / "images", base / word / "v2.0" / "labels"
    elif name == "ade20k":
        names = class_names(name)
        folders = root / "ade20k" / "images" / word, root / "ade20k" / "annotations" / word
    else:
        names = class_names(name)
        folders = root / "coco" / year, root / "cocostuff" / year
    hyphens = name == "cocostuff"
    classes = {i: text for i, text in enumerate(names) if not (hyphens and "-" in text) and i < IGNORE}
    pairs, faults = _pairs(*folders)
    return LabelSet(
        f"{name}|{split}",
        pairs,
        classes,
        options,
        hidden=names if hyphens else (),
        shift=1 if name == "ade20k" else 0,
        faults=faults,
    )


def class_names(name: str) -> list[str]:
    """Class names of ade20k or cocostuff in the order of their ids."""
    return (_CLASS_NAMES / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def _pairs(pictures: Path, masks: Path) -> tuple[list[tuple[Path, Path]], list[Fault]]:
    """(picture.jpg, mask.png) of equal stems, sorted; a mask without its picture is a fault."""
    for folder in (pictures, masks):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not there")
    there = picture_lookup()
    pairs, faults = [], []
    for mask in sorted(masks.glob("*.png")):
        picture = pictures / f"{mask.stem}.jpg"
        if there(picture):
            pairs.append((picture, mask))
        else:
            faults.append(Fault(str(mask), "", f"picture {picture} is not there"))
    return pairs, faults


def _folders(name: str, split: str) -> tuple[str, str]:
    if split not in _FOLDERS:
        raise ValueError(f"{name}|{split}: split is unknown; choose {' or '.join(_FOLDERS)}")
    return _FOLDERS[split]


# ---------------------------------------------------------------------------------------- objects and parts


class PartSet(_SemanticData):
    """Pictures with outlines of objects and parts, from a listing of `read_parts`.

    A name is written `object part` or `the part of the object`, drawn for every annotation.
    """

    def __init__(self, name: str, listing: Listing, options: ReadOptions) -> None:
        super().__init__(name, options)
        self.items, self.faults = listing.items, listing.faults
        self.categories = {number: tuple(parts) for number, parts in listing.facts["categories"]}
        self._settle()

    def __len__(self) -> int:
        return len(self.items)

    def _build(self, index: int, mode: str, draws: Draws) -> Sample:
        item = self.items[index]
        image = load_rgb(item["image"])
        if list(image.shape[:2]) != list(item["size"]):
            found = f"{image.shape[:2]} pixels, the annotations say {tuple(item['size'])} (height, width)"
            raise DataError(item["image"], "", f"picture has {found}")
        outlines = item["annotations"]
        if not self.options.train:
            names = [" ".join(self.categories[category]) for category, _ in outlines]
            shown = self._shown(Path(item["image"]).name, names, self._masks(item, outlines))
            return _numbered(item["image"], image, shown, index)
        chosen = draws.sample(outlines, self.options.num_per_image)
        there = {category for category, _ in outlines}
        others = [category for category in self.categories if category not in there]
        missing = draws.sample(others, self.options.num_per_image)
        present = [self._name(category, draws) for category, _ in chosen]
        absent = [self._name(category, draws) for category in missing]
        masks = self._masks(item, chosen if mode == "true" else [])
        return _numbered(item["image"], image, self._asked(mode, present, absent, masks, draws), index)

    def _name(self, category: int, draws: Draws) -> str:
        parts = self.categories[category]
        if len(parts) == 1:
            return parts[0]
        return " ".join(parts) if draws.coin() else f"the {parts[1]} of the {parts[0]}"

    def _masks(self, item: dict[str, Any], outlines: Sequence[Any]) -> np.ndarray:
        masks = np.zeros((len(outlines), *item["size"]), np.uint8)
        for place, (_, outline) in enumerate(outlines):
            try:
                masks[place] = outline_mask(outline, *item["size"])
            except ValueError as error:
                raise DataError(item["image"], "segmentation", str(error)) from error
        return masks


def open_part_set(name: str, split: str, root: StrPath, options: ReadOptions) -> PartSet:
    """pascal_part or paco_lvis below `root`; split `train` or `val`."""
    root = Path(root)
    _folders(name, split)
    if name == "pascal_part":
        base = root / "vlpart" / "pascal_part"
        file, pictures = base / f"{split}.json", base / "VOCdevkit" / "VOC2010" / "JPEGImages"
    else:
        file = root / "vlpart" / "paco" / "annotations" / f"paco_lvis_v1_{split}.json"
        pictures = root / "coco"
    if not file.is_file():
        raise ValueError(f"{name}|{split}: {file} is not there")
    listed = (pictures,) if name == "pascal_part" else tuple(pictures / year for _, year in _FOLDERS.values())
    listing = indexed(
        f"{name}-{split}",
        Inputs((file,), listed=listed),
        lambda: read_parts(file, pictures),
        options.index,
        root,
    )
    return PartSet(f"{name}|{split}", listing, options)


def read_parts(file: StrPath, pictures: StrPath) -> Listing:
    """Pictures that have annotations, in the order of the COCO file.

    Returns:
        Items {"image": path, "size": [H, W], "annotations": [[category id, segmentation], ...]} and the fact
        "categories": [[id, [object] or [object, part]], ...].

    Raises:
        ValueError: the file as a whole is not of the format.
    """
    path = Path(file)
    tables = read_json(path, dict)
    for name in ("images", "annotations", "categories"):
        if not isinstance(tables.get(name), list):
            raise ValueError(f"{path}: {name}: expected a list, found {repr(tables.get(name))[:60]}")
    categories, faults = {}, []
    for number, row in enumerate(tables["categories"]):
        if (
            not isinstance(row, dict)
            or type(row.get("id")) is not int
            or not isinstance(row.get("name"), str)
        ):
            faults.append(Fault(str(path), f"categories[{number}]", "expected an id and a name"))
            continue
        categories[row["id"]] = [part.partition("_(")[0].strip() for part in row["name"].split(":")][:2]
    outlines: dict[int, list[Any]] = {}
    for number, row in enumerate(tables["annotations"]):
        known = isinstance(row, dict) and row.get("category_id") in categories and "segmentation" in row
        if not known or type(row.get("image_id")) is not int:
            faults.append(
                Fault(str(path), f"annotations[{number}]", "expected image_id, category_id, segmentation")
            )
            continue
        outlines.setdefault(row["image_id"], []).append([row["category_id"], row["segmentation"]])
    there = picture_lookup()
    items = []
    for number, row in enumerate(tables["images"]):
        field = f"images[{number}]"
        try:
            items += _part_item(row, path, field, Path(pictures), outlines, there)
        except DataError as error:
            faults.append(error.fault)
    return Listing(items, {"categories": [[i, parts] for i, parts in categories.items()]}, faults)


def _part_item(
    row: Any, source: Path, field: str, pictures: Path, outlines: dict[int, list[Any]], there: Any
) -> list[dict[str, Any]]:
    if not isinstance(row, dict) or type(row.get("id")) is not int:
        raise DataError(source, field, f"expected a picture with its id, found {repr(row)[:60]}")
    if row["id"] not in outlines:
        return []
    picture = pictures / inside(row.get("file_name"), source, f"{field}.file_name")
    size = [row.get("height"), row.get("width")]
    if not all(type(side) is int and 0 < side < 2**20 for side in size):
        raise DataError(source, f"{field}.height", f"expected sides in pixels, found {size}")
    if not there(picture):
        raise DataError(source, f"{field}.file_name", f"picture {picture} is not there")
    return [{"image": str(picture), "size": size, "annotations": outlines[row["id"]]}]
