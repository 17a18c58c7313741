"""Checks a data set by its name (`refcoco|train`, `EarthReason|test`, `vqa:NAME`), whatever its format."""

from collections import Counter

import numpy as np

from dataset.base import ConversationData, Fault, ReadOptions
from dataset.masks import Raster
from dataset.registry import load_dataset
from dataset.sample import Sample
from dataset.validate import Report, common, spread, text_statistics
from dataset.vqa import VqaData
from utils.io import StrPath


def validate_dataset(
    spec: str,
    dataset_dir: StrPath,
    fast: bool = False,
    raster: Raster = "official",
    show_progress: bool = True,
) -> Report:
    """Open a data set as evaluation does and look at every picture and question in it.

    A *fault* is what readers leave out, a picture or mask that cannot be read, or a thing that is said to be
    there and has no pixel.

    Args:
        spec: a name of `dataset.registry`.
        dataset_dir: root of the named data sets.
        fast: stop after listing; no picture is decoded, no mask drawn.
        raster: how polygons of GRES-like files are filled.
        show_progress: a bar, on terminals.

    Raises:
        ValueError: unknown name, nothing there, or nothing usable at all.
    """
    from tqdm import tqdm

    options = ReadOptions(train=False, prompt="open", all_texts=True, index="off", raster=raster)
    data = load_dataset(spec, dataset_dir, options)
    report = Report(spec, type(data).__name__, faults=list(data.faults))
    table: dict[str, object] = {"pictures": len(data), "unusable entries": len(data.faults)}
    report.statistics[spec] = table
    if fast:
        return report
    seen = _Seen()
    for index in tqdm(range(len(data)), unit="picture", disable=None if show_progress else True):
        try:
            sample = data[index]
        except (ValueError, OSError) as error:
            report.faults.append(Fault(_file(data, index), "", str(error)))
            continue
        seen.add(sample, report, masks=not isinstance(data, VqaData))
    return _with_table(report, table, seen)


class _Seen:
    """What the samples hold."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.areas: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.kinds: Counter[str] = Counter()
        self.absent = 0

    def add(self, sample: Sample, report: Report, masks: bool) -> None:
        """Count a sample; notes and faults go into the report."""
        self.sizes.append(sample.image.shape[:2])
        for conversation in sample.conversations:
            self.texts.append(conversation.query)
            self.kinds[conversation.kind or "(none)"] += 1
            if not masks:
                continue
            self.absent += not conversation.exists
            area = int(np.count_nonzero(conversation.masks == 1))
            if conversation.exists:
                self.areas.append(area)
            if conversation.exists and not area:
                where = f"{conversation.query!r} (ref {conversation.ref_id})"
                report.faults.append(Fault(sample.image_path, where, "is there, but no pixel is inside"))
        doubled = Counter(conversation.query for conversation in sample.conversations)
        for text, times in doubled.items():
            if times > 1:
                report.notes.append(Fault(sample.image_path, "", f"asked {times} times: {text!r}"))


def _with_table(report: Report, table: dict[str, object], seen: _Seen) -> Report:
    table |= text_statistics(seen.texts)
    table["about absent things"] = seen.absent
    table["per kind"] = dict(seen.kinds.most_common(20))
    table["picture sizes (height, width)"] = common(seen.sizes)
    table["mask area in pixels (min, median, max)"] = spread(seen.areas)
    return report


def _file(data: ConversationData, index: int) -> str:
    return f"{data.name}, picture {index}"
