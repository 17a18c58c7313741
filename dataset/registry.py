"""Data sets by name: what a command line's `--dataset` may say.

* `GeoReasonSeg|train`: GRES; `|train_val` joins two splits. `ReasonSeg|train`: with false premises.
* `NAME|SPLIT`: the folder `<dataset_dir>/NAME/SPLIT` in the project's own format (`synthetic|train`), or a
  GRES-like folder `<dataset_dir>/reason_seg/NAME/SPLIT`.
* `refcoco|train`, `R-refcoco|val`, `fprefcocog|train`, `refclef|train`, ...: REFER sets of the published
  families; `refcoco(unc)|train` reads `refs(unc).p` instead of the published file.
* `ade20k|train`, `cocostuff|train`, `mapillary|train`, `pascal_part|train`, `paco_lvis|train`: semantic sets.
* `RRSIS-D|test`, `RIS-LAD|test`, `RefSegRS|test`, `EarthReason|test`: aerial sets.
* `vqa:NAME`, `vqa:FILE|PICTURES`, joined by `||`: questions answered in words.
* `generic:PATH`: a folder (or file) in the project's own format.
* `sem_seg_folder:PATH`: a semantic segmentation folder; `sem_seg_folder:PATH|FILES` some of its pictures:
  glob patterns separated by commas (`*part[1-7]`), or a file with names.

PATH is looked for as it is and below `dataset_dir`.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataset.base import ConversationData, ReadOptions
from dataset.generic import FILE_NAME, GenericData
from dataset.gres import GresData
from dataset.hybrid import Hybrid
from dataset.mask_files import MASK_FILE_SETS, open_mask_file_set
from dataset.refer_seg import AERIAL, SPLIT_BY, base_name, open_aerial_refer, open_refer_seg
from dataset.sem_seg import SemSegData
from dataset.sem_seg_sets import LABEL_SETS, PART_SETS, open_label_set, open_part_set
from dataset.vqa import open_vqa
from utils.io import StrPath

logger = logging.getLogger(__name__)

REASONING = ("GeoReasonSeg", "ReasonSeg")
_OPEN: dict[str, Callable[[str, str, StrPath, ReadOptions], ConversationData]] = {
    **dict.fromkeys(SPLIT_BY, open_refer_seg),
    **dict.fromkeys(AERIAL, open_aerial_refer),
    **dict.fromkeys(LABEL_SETS, open_label_set),
    **dict.fromkeys(PART_SETS, open_part_set),
    **dict.fromkeys(MASK_FILE_SETS, open_mask_file_set),
}
FAMILIES = {
    "sem_seg": (*LABEL_SETS, *PART_SETS),
    "refer_seg": ("refclef", "refcoco", "refcoco+", "refcocog"),
    "neg_refer_seg": ("R-refcoco", "R-refcoco+", "R-refcocog"),
    "correct_refer_seg": ("fprefcoco", "fprefcoco+", "fprefcocog"),
}
"""Published families of several sets, and the names that belong to them."""


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
    if colon and kind == "vqa":
        return open_vqa(spec.removeprefix("vqa:"), root, options)
    if colon and kind == "generic":
        return GenericData(_locate(place, root, spec), options, name=spec)
    if not colon and split:
        own = root / head / split
        name = base_name(head)
        if name in _OPEN and not (own / FILE_NAME).is_file():
            return _OPEN[name](head, split, root, options)
        if (own / FILE_NAME).is_file():
            return GenericData(own, options, name=spec)
        if head in REASONING or (root / "reason_seg" / head).is_dir():
            return GresData(root, head, split, options)
        raise ValueError(f"data set {spec!r}: {own / FILE_NAME} is not there")
    forms = ["NAME|SPLIT (GeoReasonSeg|train, refcoco|train, ade20k|train, RRSIS-D|test, synthetic|train)"]
    forms += ["vqa:NAME", "vqa:FILE|PICTURES", "generic:PATH", "sem_seg_folder:PATH"]
    forms += ["sem_seg_folder:PATH|FILES"]
    raise ValueError(f"data set {spec!r} is unknown; write one of {', '.join(forms)}")


def load_family(
    family: str,
    names: str,
    dataset_dir: StrPath = "./dataset",
    options: ReadOptions | None = None,
    skip_missing: bool = False,
) -> ConversationData | Hybrid:
    """Open a published family for training.

    Args:
        family: `geo_reason_seg`, `reason_seg`, `vqa`, or a name in `FAMILIES`.
        names: its sets joined by `||`; their split is `train` unless `NAME|SPLIT` says another.
        dataset_dir, options: as `load_dataset`.
        skip_missing: leave out sets that are not there, with a warning, as long as one is.

    Raises:
        ValueError: all faults of the sets, together.
    """
    if family in ("geo_reason_seg", "reason_seg"):
        return load_dataset(names, dataset_dir, options)
    if family == "vqa":
        return load_dataset(f"vqa:{names}", dataset_dir, options)
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    parts: list[ConversationData] = []
    faults: list[str] = []
    for name in (name.strip() for name in names.split("||") if name.strip()):
        try:
            if base_name(name.partition("|")[0]) not in FAMILIES[family]:
                raise ValueError(f"{name!r} is none of {', '.join(FAMILIES[family])}")
            parts.append(load_dataset(name if "|" in name else f"{name}|train", dataset_dir, options))
        except (ValueError, OSError) as error:
            faults.append(str(error))
    if faults and not (skip_missing and parts):
        raise ValueError("; ".join(faults))
    for fault in faults:
        logger.warning("family %s: a set is left out: %s", family, fault)
    return Hybrid(parts, name=family)


def _locate(place: str, root: Path, spec: str) -> Path:
    for path in (Path(place), root / place):
        if place and path.exists():
            return path
    raise ValueError(f"data set {spec!r}: neither {place} nor {root / place} is there")
