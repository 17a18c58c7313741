"""Referring segmentation in the REFER format: refcoco and its relatives, RRSIS-D, RIS-LAD.

Training: up to `num_per_image` of the sentences about a picture, over all its refs. A sentence about
something that is not there is answered by a denial, or in the `fp` sets by a correction that names what is.
Evaluation: every sentence of every ref.
"""

import re
from pathlib import Path

import numpy as np

from dataset.base import ConversationData, DataError, ReadOptions
from dataset.draws import Draws, Rng
from dataset.image import load_rgb
from dataset.index import Listing
from dataset.refer import find_refs, open_refer, outline_mask
from dataset.sample import Conversation, Sample
from dataset.templates import Pick
from utils.io import StrPath

SPLIT_BY = {
    "refclef": "unc",
    "refcoco": "unc_exclude_unified",
    "refcoco+": "unc_exclude_unified",
    "refcocog": "umd_exclude_unified",
    "R-refcoco": "unc_exclude_unified",
    "R-refcoco+": "unc_exclude_unified",
    "R-refcocog": "umd_exclude_unified",
    "fprefcoco": "berkeley_exclude_unified",
    "fprefcoco+": "berkeley_exclude_unified",
    "fprefcocog": "berkeley_exclude_unified",
}
"""Published sets and the split whose refs file they read ("exclude_unified": without the training pictures
that another set of the family tests on)."""
_PICTURES = {"refclef": "images/saiapr_tc-12"}
_COCO = "images/mscoco/images/train2014"
_AERIAL = {"RRSIS-D": ("rrsisd", "RRSISD"), "RIS-LAD": ("ris_lad", "RIS_LAD")}
AERIAL = tuple(_AERIAL)
"""Aerial sets in the REFER format."""


class ReferSegData(ConversationData):
    """Sentences about objects of pictures, from a listing of `dataset.refer.read_refer`.

    Args:
        name: for messages.
        listing: what was read.
        options: see `ReadOptions`; `overlap` says what parts that overlap become.
        corrects: absent things are answered by a correction where the data name what is there.
    """

    published = True

    def __init__(self, name: str, listing: Listing, options: ReadOptions, corrects: bool = False) -> None:
        super().__init__(name, options)
        self.items, self.faults, self.corrects = listing.items, listing.faults, corrects
        self._settle()

    def __len__(self) -> int:
        return len(self.items)

    def _sample(self, index: int, rng: Rng) -> Sample:
        item, draws = self.items[index], Draws(rng)
        image = load_rgb(item["image"])
        if list(image.shape[:2]) != list(item["size"]):
            found = f"{image.shape[:2]} pixels, instances.json says {tuple(item['size'])} (height, width)"
            raise DataError(item["image"], "", f"picture has {found}")
        asked = [(ref, number) for ref in item["refs"] for number in range(len(ref["sentences"]))]
        if self.options.train:
            asked = draws.choose(asked, self.options.num_per_image)
        conversations = []
        for ref, number in asked:
            text, exists, truth = ref["sentences"][number]
            pick = (
                draws
                if draws.official
                else self._pick(f"{Path(item['image']).name}:{ref['id']}:{number}", rng)
            )
            query = text if draws.official else text.strip()
            turns = self._turns(query, exists, truth if self.corrects else None, pick)
            mask = self._target(item, ref, exists)
            conversations.append(
                Conversation(turns, mask, text.strip(), exists, ref["kind"], True, ref["id"], number)
            )
        return Sample(item["image"], image, conversations)

    def _turns(
        self, query: str, exists: bool, truth: str | None, pick: Pick | Draws
    ) -> list[tuple[str, str | None]]:
        question = self.templates.question(query, False, pick)
        if exists:
            answer = self.templates.answer(query, False, pick)
        else:
            answer = self.templates.deny(query, False, pick, truth)
        return [(question, answer)] if self.options.train else self._eval_turns(question, answer)

    def _target(self, item: dict, ref: dict, exists: bool) -> np.ndarray:
        """uint8 (K, H, W): one mask, or none for an absent thing whose answer has no `[SEG]`."""
        height, width = item["size"]
        if not exists:
            return np.zeros((0 if self._mask_per_seg else 1, height, width), np.uint8)
        try:
            parts = [
                outline_mask(outline, height, width, self.options.overlap) for outline in ref["outlines"]
            ]
        except ValueError as error:
            raise DataError(item["image"], f"segmentation of ref {ref['id']}", str(error)) from error
        if len(parts) == 1:
            return parts[0][None]
        union = np.zeros((height, width), bool)
        for part in parts:
            union |= part > 0
        return union.astype(np.uint8)[None]


def open_refer_seg(name: str, split: str, root: StrPath, options: ReadOptions) -> ReferSegData:
    """A set of the published families, below `<root>/refer_seg`.

    Args:
        name: a name in `SPLIT_BY`; `refcoco(unc)` reads another refs file than the published one.
        split: see `dataset.refer.read_refer`.
        root: the data folder.
        options: how to read.
    """
    base, _, split_by = name.partition("(")
    folder = Path(root) / "refer_seg" / base
    refs = find_refs(folder, split_by.rstrip(")") or SPLIT_BY[base])
    pictures = folder.parent / _PICTURES.get(base, _COCO)
    fields = ("sent", "raw")
    listing = open_refer(refs, folder / "instances.json", pictures, split, fields, options.index, root)
    return ReferSegData(f"{name}|{split}", listing, options, corrects=base.startswith("fp"))


def open_aerial_refer(name: str, split: str, root: StrPath, options: ReadOptions) -> ReferSegData:
    """RRSIS-D or RIS-LAD, wherever below `root` its folder lies.

    The layout is `rrsisd/refs(unc).p`, `rrsisd/instances.json`, `images/rrsisd/JPEGImages/` (`ris_lad` for
    RIS-LAD), in `root` itself or in a folder named after the set, also below `refer_seg` or `rs_ref_seg`.
    """
    base, _, split_by = name.partition("(")
    short, alternative = _AERIAL[base]
    parents = [Path(root), *(Path(root) / part for part in ("refer_seg", "rs_ref_seg"))]
    places = [place for parent in parents for place in (parent, parent / base, parent / alternative)]
    for place in places:
        if (place / short / "instances.json").is_file():
            refs = find_refs(place / short, split_by.rstrip(")") or "unc")
            pictures = place / "images" / short / "JPEGImages"
            fields, instances = ("raw", "sent"), place / short / "instances.json"
            listing = open_refer(refs, instances, pictures, split, fields, options.index, root)
            return ReferSegData(f"{name}|{split}", listing, options)
    looked = ", ".join(str(place / short) for place in places)
    raise ValueError(f"{name}|{split} is not in {root}; looked for instances.json in {looked}")


def base_name(name: str) -> str:
    """Name of a set without a split_by in brackets: `refcoco(unc)` -> `refcoco`."""
    return re.sub(r"\(.*\)$", "", name)
