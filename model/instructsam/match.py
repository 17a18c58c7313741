"""Giving labels to proposals: crops and label texts through CLIP, then the count-constrained optimum.

Shapes: N regions, M labels, E width of CLIP's common space, H/W picture, c side of CLIP's input.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.clip_tokenizer import ClipTokenizer
from model.instructsam.assignment import assign
from model.open_clip import OpenClip, fit_square

logger = logging.getLogger(__name__)

Template = Literal["default", "satellite_prefix", "not_single", "plain_a"]
TEMPLATES: dict[str, str] = {
    "default": "an image of {article} {name}",
    "satellite_prefix": "a satellite image of {article} {name}",
    "not_single": "an image of {name}",
    "plain_a": "an image of a {name}",
}
"""Sentences for a label. The article is `an` before a, e, i, o, u. `plain_a` is what the published evaluators
use to compare labels with classes."""


def prompts_of(names: Sequence[str], template: str = "default") -> list[str]:
    """Sentences of names; a template is one of `TEMPLATES` or a text with `{name}` (and `{article}`)."""
    sentence = TEMPLATES.get(template, template)
    if "{name}" not in sentence:
        raise ValueError(f"template {template!r} is none of {', '.join(TEMPLATES)} and has no {{name}}")
    vowels = tuple("aeiou")
    articles = ("an" if name.lower().startswith(vowels) else "a" for name in names)
    return [
        sentence.replace("{article}", article).replace("{name}", name)
        for name, article in zip(names, articles)
    ]


class TextEncoder:
    """Features of texts, each computed once for the life of the object."""

    def __init__(self, clip: OpenClip, tokenizer: ClipTokenizer, batch_size: int = 256) -> None:
        self.clip, self.tokenizer, self.batch_size = clip, tokenizer, batch_size
        self._known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors float32 (len(texts), E) on the CPU."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(new), self.batch_size):
            batch = new[start : start + self.batch_size]
            self._known |= zip(batch, self.clip.encode_text(self.tokenizer(batch)).cpu())
        return torch.stack([self._known[text] for text in texts]) if texts else torch.zeros(0, self._width)

    def labels(self, names: Sequence[str], template: str = "default") -> Tensor:
        """Unit vectors (M, E) of labels put into a template."""
        return self(prompts_of(names, template))

    @property
    def _width(self) -> int:
        return self.clip.config.embed_dim


def crop_boxes(
    boxes: np.ndarray, height: int, width: int, scale: float = 1.2, min_crop: float = 0
) -> np.ndarray:
    """Pixels to cut for boxes xywh (N, 4), int64 (N, 4): left, top, right, bottom.

    Each side grows `scale` times about its centre (at least to `min_crop`), is clipped to the picture and
    rounded half to even. Every crop has at least one pixel. Boxes that begin outside the picture are moved
    to two pixels from its end, as published.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4).copy()
    ends = np.array([width, height], np.float64)
    outside = (boxes[:, :2] > ends).any(axis=1)
    if outside.any():
        logger.warning(
            "%d boxes begin outside the %d x %d picture; moved to its end", outside.sum(), width, height
        )
        boxes[outside, :2] = ends - 2
    centre = boxes[:, :2] + boxes[:, 2:] / 2
    side = np.maximum(min_crop, boxes[:, 2:] * scale)
    low = np.rint(np.clip(centre - side / 2, 0, ends)).astype(np.int64)
    high = np.rint(np.clip(centre + side / 2, 0, ends)).astype(np.int64)
    low = np.minimum(low, ends.astype(np.int64) - 1)
    return np.concatenate([low, np.maximum(high, low + 1)], axis=1)


class RegionEncoder:
    """Features of parts of a picture: cut with Pillow in threads, encoded in batches.

    Args:
        clip: the model. crop_scale, min_crop: see `crop_boxes`.
        batch_size: crops per pass.
        workers: threads that cut and resize (Pillow works outside the interpreter's lock).
    """

    def __init__(
        self,
        clip: OpenClip,
        crop_scale: float = 1.2,
        min_crop: float = 0,
        batch_size: int = 200,
        workers: int = 2,
    ) -> None:
        self.clip, self.crop_scale, self.min_crop = clip, crop_scale, min_crop
        self.batch_size, self.workers = batch_size, workers

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, boxes: np.ndarray) -> Tensor:
        """Unit vectors float32 (N, E) on the CPU of a uint8 (H, W, 3) picture and boxes xywh (N, 4)."""
        batches = self.pixel_batches(image, boxes)
        found = [self.clip.encode_image(self.clip.normalise(pixels)).cpu() for pixels in batches]
        return torch.cat(found) if found else torch.zeros(0, self.clip.config.embed_dim)

    def pixel_batches(self, image: np.ndarray, boxes: np.ndarray) -> Iterator[Tensor]:
        """Crops as uint8 (B, c, c, 3); while one batch is used, threads already cut the next."""
        picture = Image.fromarray(image)
        windows = crop_boxes(boxes, *image.shape[:2], self.crop_scale, self.min_crop).tolist()

        def cut(window: list[int]) -> np.ndarray:
            return np.asarray(fit_square(picture.crop(window), self.clip.side))

        with ThreadPoolExecutor(self.workers) as pool:
            cuts = [
                [pool.submit(cut, window) for window in windows[start : start + self.batch_size]]
                for start in range(0, len(windows), self.batch_size)
            ]
            while cuts:
                yield torch.from_numpy(np.stack([future.result() for future in cuts.pop(0)]))


@dataclass(frozen=True)
class LabelledRegions:
    """The outcome for one picture; P chosen regions, ordered by index.

    `regions` int64 (P,) proposal numbers; `labels` P names; `row_max` float64 (P,) similarity of each
    region's most similar label (the published score, which may belong to another label); `similarity`
    float64 (P,) that of the label given.
    """

    regions: np.ndarray
    labels: list[str]
    row_max: np.ndarray
    similarity: np.ndarray


class Matcher:
    """Labels for the proposals of a picture so that counts hold.

    Args:
        texts, regions: the two encoders (of one CLIP).
        template: sentence for a label, see `TEMPLATES`.
    """

    def __init__(self, texts: TextEncoder, regions: RegionEncoder, template: str = "default") -> None:
        self.texts, self.regions, self.template = texts, regions, template

    def __call__(self, image: np.ndarray, boxes: np.ndarray, counts: Mapping[str, int]) -> LabelledRegions:
        """Match boxes xywh (N, 4) of a uint8 (H, W, 3) picture to `counts` (label -> number > 0)."""
        names = list(counts)
        if not names or not len(boxes):
            return LabelledRegions(np.zeros(0, np.int64), [], np.zeros(0), np.zeros(0))
        features = self.regions(image, boxes)
        return match_features(features, self.texts.labels(names, self.template), counts)


def match_features(regions: Tensor, texts: Tensor, counts: Mapping[str, int]) -> LabelledRegions:
    """Match unit vectors of regions (N, E) and of the labels of `counts` (M, E): float32 cosines, then
    `assign`."""
    similarity = (regions @ texts.T).numpy()
    pairs = assign(similarity, list(counts.values()))
    names = list(counts)
    chosen = similarity[pairs[:, 0]].astype(np.float64)
    return LabelledRegions(
        regions=pairs[:, 0],
        labels=[names[k] for k in pairs[:, 1]],
        row_max=chosen.max(axis=1) if len(chosen) else np.zeros(0),
        similarity=chosen[np.arange(len(chosen)), pairs[:, 1]],
    )


@dataclass(frozen=True)
class BestClass:
    """The class most similar to a label; `accepted` if the cosine reaches the threshold."""

    name: str
    similarity: float
    accepted: bool


def label_classes(
    encode: TextEncoder,
    labels: Sequence[str],
    classes: Sequence[str],
    threshold: float = 0.95,
    template: str = "plain_a",
) -> dict[str, BestClass]:
    """Label -> its most similar class by the cosine of their texts (published: kept from 0.95 on)."""
    if not labels or not classes:
        return {}
    similarity = (encode.labels(labels, template) @ encode.labels(classes, template).T).numpy()
    best = similarity.argmax(axis=1)
    values = similarity[np.arange(len(labels)), best]
    return {
        label: BestClass(classes[k], float(value), bool(value >= threshold))
        for label, k, value in zip(labels, best, values)
    }
