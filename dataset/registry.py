"""Data sets by name: what a command line's `--dataset` may say.

* `GeoReasonSeg|train`: GRES; `|train_val` joins two splits. `ReasonSeg|train`: with false premises.
* `NAME|SPLIT`: the folder `<dataset_dir>/NAME/SPLIT` in the project's own format (`synthetic|train`), or a
  GRES-like folder `<dataset_dir>/reason_seg/NAME/SPLIT`.
* `generic:PATH`: a folder (or file) in the project's own format.
* `sem_seg_folder:PATH`: a semantic segmentation folder; `sem_seg_folder:PATH|FILES` some of its pictures:
  glob patterns separated by commas (`*part[1-7]`), or a file with names.

PATH is looked for as it is and below `dataset_dir`.
"""

from pathlib import Path
from typing import Any

from dataset.base import ConversationData, ReadOptions
from dataset.generic import FILE_NAME, GenericData
from dataset.gres import GresData
from dataset.sem_seg import SemSegData
from utils.io import StrPath

REASONING = ("GeoReasonSeg", "ReasonSeg")


def load_dataset(
    spec: str, dataset_dir: StrPath = "./dataset", options: ReadOptions | None = None, **settings: Any
) -> ConversationData:
    """Open a data set by name.

    Args:
        spec: see the table above.
        dataset_dir: root of the named data sets.
        options: how to read; default `ReadOptions(**settings)`.
        settings: fields of `ReadOptions`, where `options` is not given.

    Raises:
        ValueError: unknown name, missing folder, no usable picture, or (strict) any unusable one.
    """
    if options is not None and settings:
        raise ValueError(f"give options or single settings, not both: {', '.join(settings)}")
    options = options or ReadOptions(**settings)
    root = Path(dataset_dir)
    head, _, split = spec.partition("|")
    kind, colon, place = head.partition(":")
    if colon and kind == "sem_seg_folder":
        return SemSegData(_locate(place, root, spec), options, split or None, name=spec)
    if colon and kind == "generic":
        return GenericData(_locate(place, root, spec), options, name=spec)
    if not colon and split:
        own = root / head / split
        if (own / FILE_NAME).is_file():
            return GenericData(own, options, name=spec)
        if head in REASONING or (root / "reason_seg" / head).is_dir():
            return GresData(root, head, split, options)
        raise ValueError(f"data set {spec!r}: {own / FILE_NAME} is not there")
    forms = ["NAME|SPLIT (GeoReasonSeg|train, ReasonSeg|train, synthetic|train)", "generic:PATH"]
    forms += ["sem_seg_folder:PATH", "sem_seg_folder:PATH|FILES"]
    raise ValueError(f"data set {spec!r} is unknown; write one of {', '.join(forms)}")


def _locate(place: str, root: Path, spec: str) -> Path:
    for path in (Path(place), root / place):
        if place and path.exists():
            return path
    raise ValueError(f"data set {spec!r}: neither {place} nor {root / place} is there")
