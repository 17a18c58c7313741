"""A folder of PNG masks as predictions.

A mask is one band of the picture's size with two values: 0 outside, anything else inside (`threshold`: from
that value on). Its name is the picture's: `NAME.png` where a picture has one query; else `NAME_K.png` or
`NAME/K.png` with K the query's number, from 0, in the data set's order. Folders above NAME matter only where
two pictures have the same name.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from utils.match_predictions import Answers, Mismatch, Names, Picture

_ENDING = re.compile(r"(?P<name>.+)_(?P<number>\d+)")
_MODES = ("1", "L", "P")


def read_mask(path: Path, threshold: int = 0) -> np.ndarray:
    """bool (H, W) of a PNG mask.

    Args:
        threshold: values from here on are inside; 0: everything but 0, and there may be two values only.

    Raises:
        ValueError: not a readable picture of one 8-bit band, or more than two values without a threshold.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in _MODES:
                raise ValueError(f"one 8-bit band was expected, the file has mode {image.mode}")
            values = np.asarray(image, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"mask {path} cannot be read: {error}") from error
    if threshold:
        return values >= threshold
    levels = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    if len(levels) > 2 or (len(levels) == 2 and levels[0] != 0):
        raise ValueError(
            f"mask {path} has {len(levels)} values ({', '.join(map(str, levels[:5]))} ...), expected 0 and "
            "one other; for probabilities say from which value on (--png_threshold 128)"
        )
    return values > 0


def mask_names(pictures: Sequence[Picture]) -> list[list[str]]:
    """Per picture and query the file name under which a mask is found, parents given where names recur."""
    names = Names([picture.path for picture in pictures])
    found = []
    for picture in pictures:
        path, stem = PurePosixPath(picture.path.replace("\\", "/")), ""
        for part in (path.stem, *reversed(path.parent.parts)):
            stem = f"{part}/{stem}" if stem else part
            if len(names.find(stem)) == 1:
                break
        if len(picture.queries) == 1:
            found.append([f"{stem}.png"])
            continue
        short = [f"{stem}_{number}" for number in range(len(picture.queries))]
        taken = any(PurePosixPath(name).name in names.by_stem for name in short)
        found.append([f"{stem}/{k}.png" if taken else f"{name}.png" for k, name in enumerate(short)])
    return found


@dataclass
class MaskFolder:
    """PNG files below a folder as answers (paths)."""

    folder: Path

    def match(self, pictures: Sequence[Picture]) -> tuple[Answers, list[Mismatch]]:
        """See `utils.match_predictions.Source`; answers are paths."""
        names, mismatches = Names([picture.path for picture in pictures]), []
        answers: Answers = [[None] * len(picture.queries) for picture in pictures]
        doubled = set()
        paths = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() == ".png")
        for path in paths:
            name = path.relative_to(self.folder).with_suffix("").as_posix()
            place = _place(name, names, pictures)
            if isinstance(place, str):
                mismatches.append(Mismatch("extra", str(path), "", place))
                continue
            number, k = place
            first = answers[number][k]
            if first is not None:
                message = f"a second mask for the same query, besides {first}; none of them is taken"
                mismatches.append(
                    Mismatch("duplicate", str(path), pictures[number].queries[k].query, message)
                )
                doubled.add(place)
            answers[number][k] = path
        expected = mask_names(pictures)
        for number, picture in enumerate(pictures):
            for k, query in enumerate(picture.queries):
                if (number, k) in doubled:
                    answers[number][k] = None
                elif answers[number][k] is None:
                    message = f"no mask {self.folder / expected[number][k]}"
                    mismatches.append(Mismatch("missing", picture.path, query.query, message))
        if not paths:
            raise ValueError(f"{self.folder}: no PNG file in this folder or below it")
        return answers, mismatches


def _place(name: str, names: Names, pictures: Sequence[Picture]) -> tuple[int, int] | str:
    """(picture, query) of a mask's name without ending, or why there is none."""
    path = PurePosixPath(name)
    if path.name.isdecimal() and path.parent.name:
        found = names.find(str(path.parent))
        if len(found) == 1 and int(path.name) < len(pictures[found[0]].queries):
            return found[0], int(path.name)
    found = names.find(name)
    if len(found) == 1:
        count = len(pictures[found[0]].queries)
        return (found[0], 0) if count == 1 else f"its picture has {count} queries; name masks NAME_K.png"
    if len(found) > 1:
        return f"may mean {', '.join(pictures[n].path for n in found[:3])}; put it into a folder of that name"
    match = _ENDING.fullmatch(name)
    found = names.find(match["name"]) if match else []
    if match and len(found) == 1:
        number, count = int(match["number"]), len(pictures[found[0]].queries)
        return (found[0], number) if number < count else f"its picture has {count} queries, numbered from 0"
    return "no picture of the data set has this name"
