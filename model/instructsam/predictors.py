"""What the mask generator asks of a network, and SAM 2 and SAM 1 behind it.

Shapes: n points of one crop, K masks per point, m chosen masks, h/w pixels of the crop.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.sam import Sam
from model.sam2 import Sam2, Sam2Decoded, Sam2Features

Prepare = Callable[[np.ndarray], tuple[Tensor, tuple[int, int]]]
"""uint8 (h, w, 3) RGB -> SAM's input (3, S, S), and the size (h_in, w_in) of the picture inside it."""


class Candidates(Protocol):
    """Masks of n points before they are drawn. `iou` (n, K): predicted quality of each."""

    iou: Tensor

    def logits(self, index: Tensor) -> Tensor:
        """fp32 (m, h, w) logits at the crop's size of the masks at `index` (m,) long, ascending, in the
        order point, mask: entry p K + k is mask k of point p."""


class MaskPredictor(Protocol):
    """A promptable network as the generator sees it."""

    @property
    def device(self) -> torch.device:
        """Where points and indices go."""

    def encode(self, crops: Sequence[np.ndarray]) -> Sequence[Any]:
        """One opaque encoding per uint8 (h, w, 3) RGB crop, all crops in one pass."""

    def predict(self, encoded: Any, points: Tensor) -> Candidates:
        """Masks for single foreground points (n, 2), float x, y in pixels of the crop."""


def _tokens(multimask: bool) -> slice:
    """Mask tokens in use: the three alternatives, or the single mask."""
    return slice(1, None) if multimask else slice(0, 1)


class Sam2Predictor:
    """SAM 2 with three masks per point, or one (`multimask` False). Masks are drawn only for points that
    have one to be kept."""

    def __init__(self, model: Sam2, multimask: bool = True) -> None:
        self.model, self.tokens = model, _tokens(multimask)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.model.device

    def encode(self, crops: Sequence[np.ndarray]) -> list[tuple[Sam2Features, tuple[int, int]]]:
        """Features and size of each crop."""
        features = self.model.encode(self.model.preprocess(crops))
        return [(features[k], crop.shape[:2]) for k, crop in enumerate(crops)]

    def predict(self, encoded: tuple[Sam2Features, tuple[int, int]], points: Tensor) -> "Sam2Candidates":
        """Masks of points of one crop."""
        features, (height, width) = encoded
        side = self.model.config.image_size
        coords = points * side / points.new_tensor([width, height])
        labels = torch.ones(len(points), 1, dtype=torch.long, device=points.device)
        decoded = self.model.decode(features, coords[:, None], labels)
        return Sam2Candidates(self.model, features, decoded, self.tokens, (height, width))


class Sam2Candidates:
    """Masks of n points, not drawn yet."""

    def __init__(
        self,
        model: Sam2,
        features: Sam2Features,
        decoded: Sam2Decoded,
        tokens: slice,
        size: tuple[int, int],
    ) -> None:
        self.model, self.features, self.decoded = model, features, decoded
        self.tokens, self.size = tokens, size
        self.iou = decoded.iou[:, tokens].float()

    def logits(self, index: Tensor) -> Tensor:
        """See `Candidates`."""
        count = self.iou.shape[1]
        points, row = torch.unique_consecutive(index // count, return_inverse=True)
        low = self.model.mask_logits(self.features, self.decoded, points, self.tokens)[row, index % count]
        return _resize(low.float(), self.size)


class Sam1Predictor:
    """SAM 1 with three masks per point, or one (`multimask` False); `prepare` is the preprocessing that
    belongs to its weights."""

    def __init__(self, model: Sam, prepare: Prepare, multimask: bool = True) -> None:
        self.model, self.prepare, self.multimask = model, prepare, multimask

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.model.device

    def encode(self, crops: Sequence[np.ndarray]) -> list[tuple[Tensor, tuple[int, int], tuple[int, int]]]:
        """Embedding, size inside the square and size of each crop."""
        prepared = [self.prepare(crop) for crop in crops]
        embeddings = self.model.encode(torch.stack([image for image, _ in prepared]))
        return [
            (embeddings[k : k + 1], inside, crop.shape[:2])
            for k, ((_, inside), crop) in enumerate(zip(prepared, crops))
        ]

    def predict(
        self, encoded: tuple[Tensor, tuple[int, int], tuple[int, int]], points: Tensor
    ) -> "Sam1Candidates":
        """Masks of points of one crop."""
        embedding, inside, size = encoded
        coords = points * points.new_tensor([inside[1] / size[1], inside[0] / size[0]])
        labels = torch.ones(len(points), 1, dtype=torch.long, device=points.device)
        low, iou = self.model(
            image_embeddings=embedding, points=(coords[:, None], labels), multimask_output=self.multimask
        )
        return Sam1Candidates(self.model, low, iou.float(), inside, size)


class Sam1Candidates:
    """Masks of n points at low resolution."""

    def __init__(
        self, model: Sam, low: Tensor, iou: Tensor, inside: tuple[int, int], size: tuple[int, int]
    ) -> None:
        self.model, self.low, self.inside, self.size = model, low.flatten(0, 1), inside, size
        self.iou = iou

    def logits(self, index: Tensor) -> Tensor:
        """See `Candidates`."""
        return self.model.postprocess(self.low[index][:, None], self.inside, self.size)[:, 0]


def _resize(low: Tensor, size: tuple[int, int]) -> Tensor:
    """(m, h', w') -> (m, h, w), bilinear."""
    return F.interpolate(low[:, None], size, mode="bilinear", align_corners=False)[:, 0]
