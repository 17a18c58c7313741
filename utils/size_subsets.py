"""Large and small targets: list files, folders, and a rule of our own.

The published table splits the GRES test set into 488 large and 1,023 small pictures, but neither lists nor a
rule are published. Ours: a target of at least 728 px in the official raster is large. On the GRES test set
this gives 488 / 1,022. Scores by this rule are ours and say so; with the published lists, if you have them,
give those.
"""

from collections.abc import Mapping
from pathlib import Path

from utils.io import StrPath, atomic_write_text
from utils.metrics import LARGE_AREA

LARGE, SMALL, EMPTY, UNLISTED = "large", "small", "empty", "unlisted"
CANVAS = (512, 512)
"""Height and width of every GRES tile, for annotations whose pictures are not at hand."""


def rule_text(large_area: int = LARGE_AREA) -> str:
    """What scores by the rule say about it."""
    return f"{LARGE}: target of at least {large_area} px in the official raster (our rule, not the published)"


def size_of(area: int, large_area: int = LARGE_AREA) -> str:
    """`large`, `small` or `empty` of a target's pixels in the official raster."""
    return EMPTY if area == 0 else LARGE if area >= large_area else SMALL


def label_of(labels: Mapping[str, str], image: str) -> str:
    """Label of a picture by its stem; `unlisted` where no list names it."""
    return labels.get(Path(image).stem, UNLISTED)


def labels_from_lists(large: StrPath, small: StrPath) -> dict[str, str]:
    """Stem -> label from two list files (one name per line; an empty path is an empty list).

    Raises:
        ValueError: a list cannot be read, or a name is in both.
    """
    from dataset.gres import read_names

    lists = {LARGE: read_names(large) if large else [], SMALL: read_names(small) if small else []}
    return _labels(lists, f"{large} and {small}")


def labels_from_folders(root: StrPath, name: str) -> dict[str, str]:
    """Stem -> label from folders `large` and `small` with JSON files (found like splits)."""
    from dataset.gres import find_split

    found = {}
    for label in (LARGE, SMALL):
        folder = find_split(root, name, label).annotations
        found[label] = [path.stem for path in sorted(folder.glob("*.json"))]
    return _labels(found, f"the folders {LARGE} and {SMALL} of {name}")


def _labels(lists: Mapping[str, list[str]], where: str) -> dict[str, str]:
    labels = {stem: label for label, stems in lists.items() for stem in stems}
    if len(labels) < sum(map(len, lists.values())):
        both = sorted(set(lists[LARGE]) & set(lists[SMALL]))
        raise ValueError(f"{where}: {len(both)} names are in both, the first is {both[0]}")
    if not labels:
        raise ValueError(f"{where}: no name is there")
    return labels


def write_size_lists(
    root: StrPath, name: str, split: str, out: StrPath, large_area: int = LARGE_AREA
) -> dict[str, Path]:
    """Write `<split>_large.txt` and `<split>_small.txt` of a GRES-like split by our rule.

    Pictures are not needed: GRES tiles are 512x512. Where a picture is there, its own size counts.

    Args:
        root, name, split: see `dataset.gres.find_split`.
        out: folder of the lists.

    Returns:
        label -> file.

    Raises:
        ValueError: no such split, or an annotation that cannot be read.
    """
    from dataset.base import picture_size
    from dataset.gres import find_split, read_annotation
    from utils.io import is_there

    folders = find_split(root, name, split)
    lists: dict[str, list[str]] = {LARGE: [], SMALL: []}
    for path in sorted(folders.annotations.glob("*.json")):
        annotation = read_annotation(path)
        picture = folders.pictures / (annotation.image_name or f"{path.stem}.jpg")
        size = picture_size(picture) if is_there(picture) else CANVAS
        label = size_of(int((annotation.mask(*size) == 1).sum()), large_area)
        if label != EMPTY:
            lists[label].append(path.stem)
    files = {}
    for label, stems in lists.items():
        head = f"# {label} targets of {name}|{split}; {rule_text(large_area)}"
        files[label] = atomic_write_text(Path(out) / f"{split}_{label}.txt", "\n".join([head, *stems]) + "\n")
    return files
