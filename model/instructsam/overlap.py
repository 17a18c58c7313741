"""Matching in which a part and the whole of one object are not both used (an addition to the published rule).

N regions, M labels, P chosen regions. The right number on the wrong masks is the usual failure: of a part
and its whole both resemble the label. Where two chosen masks overlap too much, the one that resembles its
label less is taken out of the proposals, and the rest is matched again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from model.instructsam.match import LabelledRegions, match_features


def shares_inside(rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """float64 (P, P): which share of mask i lies inside mask j (0 on the diagonal)."""
    from pycocotools import mask as coco

    codes = list(rles)
    inside = np.asarray(coco.iou(codes, codes, [1] * len(codes)), np.float64).reshape(len(codes), -1)
    np.fill_diagonal(inside, 0.0)
    return inside


def match_apart(
    regions: Tensor,
    texts: Tensor,
    counts: Mapping[str, int],
    rles: Sequence[Mapping[str, Any]],
    most: float,
) -> LabelledRegions:
    """`match_features`, with no chosen mask lying by more than the share `most` inside another one.

    Args:
        regions, texts: unit vectors (N, E), (M, E).
        rles: the N masks as compressed run-length codes.
        most: 0..1; 1 changes nothing.
    """
    left = np.arange(len(regions))
    while True:
        found = match_features(regions[left], texts, counts)
        found = replace(found, regions=left[found.regions])
        inside = (
            shares_inside([rles[k] for k in found.regions]) if len(found.regions) > 1 else np.zeros((1, 1))
        )
        one, other = np.unravel_index(int(inside.argmax()), inside.shape)
        if inside[one, other] <= most:
            return found
        weaker = one if found.similarity[one] <= found.similarity[other] else other
        left = left[left != found.regions[weaker]]
