"""Pictures of a data set (the published `datasets/config.json`, or a plain folder) for InstructSAM.

A data set names a COCO file (`ann_path`), a picture folder (`img_dir`) and lists of class names. Without a
COCO file every picture below a folder belongs to it, numbered by sorted path from 1.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.io import StrPath, read_json

logger = logging.getLogger(__name__)
CLASS_LISTS = ("unseen_classes", "means_of_transport", "sports_field")
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


@dataclass(frozen=True)
class ImageEntry:
    """One picture: COCO id, name relative to the picture folder, file; (0, 0) as size where unknown."""

    image_id: int
    file_name: str
    path: Path
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ImageSet:
    """Pictures in annotation order, class names by id, and named lists of classes."""

    name: str
    images: tuple[ImageEntry, ...]
    categories: dict[int, str] = field(default_factory=dict)
    class_lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ann_path: Path | None = None

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of the annotation file."""
        return list(self.categories.values())

    def check_stems(self) -> None:
        """ValueError if pictures differ in their ending only: their output files would be the same."""
        stems = [image.file_name.rpartition(".")[0] or image.file_name for image in self.images]
        twice = sorted(stem for stem, number in Counter(stems).items() if number > 1)
        if twice:
            raise ValueError(
                f"pictures whose names differ in the ending only would share their output files: {twice[:5]}"
            )

    def category_id(self, label: str) -> int | None:
        """Id of the class of exactly this name, or None."""
        return next((key for key, name in self.categories.items() if name == label), None)


def image_folder(folder: StrPath, name: str = "") -> ImageSet:
    """All pictures at or below `folder` (or the one picture it names), sorted by relative path.

    Raises:
        ValueError: no such folder, or no picture in it.
    """
    folder = Path(folder)
    if folder.is_file():
        return ImageSet(name or folder.stem, (ImageEntry(1, folder.name, folder),))
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder or picture")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not paths:
        raise ValueError(f"{folder}: no picture found (looked for {', '.join(SUFFIXES)})")
    images = (ImageEntry(k, p.relative_to(folder).as_posix(), p) for k, p in enumerate(paths, start=1))
    return ImageSet(name or folder.name, tuple(images))


def read_dataset(name: str, config: StrPath) -> ImageSet:
    """The data set `name` of a published `datasets/config.json`.

    Relative paths are looked for from the working directory, from the folder of the config file and from
    the folder above it; the first that exists counts. Unknown names in the class lists are told as a
    warning.

    Raises:
        ValueError: unknown name (the known ones are listed), missing field, file not there, wrong COCO file.
    """
    content = read_json(config, dict)
    if name not in content:
        raise ValueError(f"{config}: no data set {name!r}; it has {', '.join(sorted(content)) or 'none'}")
    entry = content[name]
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("ann_path", "img_dir")):
        raise ValueError(f"{config}: data set {name!r} needs the texts 'ann_path' and 'img_dir'")
    lists = {key: tuple(map(str, entry[key])) for key in CLASS_LISTS if isinstance(entry.get(key), list)}
    ann_path = _locate(entry["ann_path"], Path(config), name, "ann_path")
    image_dir = _locate(entry["img_dir"], Path(config), name, "img_dir")
    return read_coco_images(name, ann_path, image_dir, lists)


def read_coco_images(
    name: str, ann_path: StrPath, image_dir: StrPath, class_lists: dict[str, tuple[str, ...]] | None = None
) -> ImageSet:
    """Pictures and classes of a COCO file (its annotations may be empty and are not looked at)."""
    ann_path = Path(ann_path)
    coco = read_json(ann_path, dict)
    images = [
        _image(ann_path, Path(image_dir), k, item) for k, item in enumerate(_list(coco, ann_path, "images"))
    ]
    _unique(ann_path, [image.image_id for image in images], "image ids")
    _unique(ann_path, [image.file_name for image in images], "file names")
    categories: dict[int, str] = {}
    for number, item in enumerate(_list(coco, ann_path, "categories", absent_ok=True)):
        if (
            not isinstance(item, dict)
            or type(item.get("id")) is not int
            or not isinstance(item.get("name"), str)
        ):
            raise ValueError(f"{ann_path}: categories[{number}] needs a whole number 'id' and a text 'name'")
        categories[item["id"]] = item["name"]
    for key, names in (class_lists or {}).items():
        unknown = [n for n in names if n not in categories.values()]
        if unknown and categories:
            logger.warning("%s: %s names %s, which the classes of %s lack", name, key, unknown, ann_path)
    return ImageSet(name, tuple(images), categories, class_lists or {}, ann_path)


def _image(ann_path: Path, folder: Path, number: int, item: Any) -> ImageEntry:
    if (
        not isinstance(item, dict)
        or type(item.get("id")) is not int
        or not isinstance(item.get("file_name"), str)
    ):
        raise ValueError(f"{ann_path}: images[{number}] needs a whole number 'id' and a text 'file_name'")
    path = folder / item["file_name"]
    if not path.is_file() and (folder / path.name).is_file():
        path = folder / path.name
    size = (item.get("height"), item.get("width"))
    known = all(type(side) is int and side > 0 for side in size)
    return ImageEntry(item["id"], item["file_name"], path, (size[0], size[1]) if known else (0, 0))


def _list(coco: dict[str, Any], path: Path, key: str, absent_ok: bool = False) -> list[Any]:
    value = coco.get(key, [] if absent_ok else None)
    if not isinstance(value, list):
        raise ValueError(f"{path}: '{key}' must be a list")
    return value


def _unique(path: Path, values: list[Any], what: str) -> None:
    repeated = sorted(str(value) for value, number in Counter(values).items() if number > 1)
    if repeated:
        raise ValueError(f"{path}: {what} occur more than once: {', '.join(repeated[:5])}")


def _locate(text: str, config: Path, name: str, key: str) -> Path:
    config = config.resolve()
    tried = [Path(text), config.parent / text, config.parent.parent / text]
    for path in tried:
        if path.exists():
            return path
    places = ", ".join(str(path) for path in dict.fromkeys(tried))
    raise ValueError(f"{config}: {key} of data set {name!r} is not there; looked at {places}")
