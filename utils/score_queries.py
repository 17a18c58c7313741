"""Query records (`utils.predictions`) from what a data set asks and what answers it, picture by picture."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from utils.boundary import boundary_counts
from utils.mask_folder import read_mask
from utils.match_predictions import Mismatch, Picture, Wanted
from utils.metrics import LARGE_AREA
from utils.predictions import target_mask
from utils.rle import area, decode_mask, encode_mask, pixel_counts
from utils.size_subsets import label_of, size_of


class ScoreQueries:
    """Query records of picture i with targets, counts and sizes (an object for loader processes)."""

    def __init__(
        self,
        pictures: Sequence[Picture],
        answers: Sequence[Sequence[Any]],
        labels: Mapping[str, str] | None,
        boundary: bool = True,
        threshold: int = 0,
        large_area: int = LARGE_AREA,
    ) -> None:
        """`labels`: size label per stem (None: our rule with `large_area`). `threshold`: of PNG masks."""
        self.pictures, self.answers, self.labels = pictures, answers, labels
        self.boundary, self.threshold, self.large_area = boundary, threshold, large_area

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[list[dict[str, Any]], list[Mismatch]]:
        records, mismatches = [], []
        picture = self.pictures[index]
        for wanted, answer in zip(picture.queries, self.answers[index], strict=True):
            record, mismatch = self._record(picture, wanted, answer)
            records.append(record)
            mismatches += [mismatch] if mismatch else []
        return records, mismatches

    def _record(
        self, picture: Picture, wanted: Wanted, answer: Any
    ) -> tuple[dict[str, Any], Mismatch | None]:
        prediction, fields, mismatch = self._prediction(picture, wanted, answer)
        present = fields.get("pred_exists")
        record = {
            "query": wanted.query,
            "kind": wanted.kind,
            "ref_id": wanted.ref_id,
            "sent_id": wanted.sent_id,
            "gt_exists": wanted.exists,
            "pred_exists": bool(area(prediction)) if present is None else present,
            "score": fields.get("score"),
            "generated": fields.get("generated") or "",
            "prediction": prediction,
            "target": wanted.target,
            "counts": pixel_counts(prediction, wanted.target, wanted.ignore),
            "size_class": size_of(wanted.official_area, self.large_area)
            if self.labels is None
            else label_of(self.labels, picture.path),
        }
        if wanted.ignore is not None:
            record["ignore"] = wanted.ignore
        if self.boundary:
            record["boundary"] = boundary_counts(decode_mask(prediction), target_mask(record))
        if answer is None or mismatch:
            record["mismatch"] = mismatch.kind if mismatch else "missing"
        return record, mismatch

    def _prediction(
        self, picture: Picture, wanted: Wanted, answer: Any
    ) -> tuple[dict[str, Any], dict[str, Any], Mismatch | None]:
        """(code, further fields, what is wrong with it); an empty mask where there is no usable one."""
        mismatch = None
        if isinstance(answer, dict):
            found = tuple(answer["prediction"]["size"])
            if found == picture.size:
                return answer["prediction"], answer, None
            message = f"the mask has {list(found)} pixels, the picture {list(picture.size)} (height, width)"
            mismatch = Mismatch("size", picture.path, wanted.query, message)
        elif answer is not None:
            try:
                mask = read_mask(answer, self.threshold)
            except ValueError as error:
                mismatch = Mismatch("unreadable", picture.path, wanted.query, str(error))
            else:
                if mask.shape == picture.size:
                    return encode_mask(mask), {}, None
                message = f"mask {answer} has {list(mask.shape)} pixels, the picture {list(picture.size)}"
                mismatch = Mismatch("size", picture.path, wanted.query, f"{message} (height, width)")
        return encode_mask(np.zeros(picture.size, np.uint8)), {"pred_exists": False}, mismatch
