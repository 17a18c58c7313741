"""SAM image embeddings computed once per image: in memory, or in a folder that later runs share.

The encoder is frozen, so its output depends on the image and the encoder's weights alone; both are in the
key.
"""

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class EmbeddingCache:
    """Embeddings (C, G, G) by image.

    Args:
        encode: images (1, 3, S, S) -> embeddings (1, C, G, G); called for one image at a time, so that a
        stored
            embedding does not depend on the batch in which its image was first seen.
        place: `memory`, or a folder.
        weights_key: names the encoder's weights and number format (see `encoder_key`).
        limit_gib: memory cache only: what does not fit is computed again.
    """

    def __init__(
        self, encode: Callable[[Tensor], Tensor], place: str, weights_key: str, limit_gib: float = 16.0
    ) -> None:
        self.encode, self.limit = encode, limit_gib * 2**30
        self.folder = None if place == "memory" else Path(place) / weights_key
        self.memory: dict[str, Tensor] = {}
        self.bytes = 0
        self.hits = self.misses = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings (B, C, G, G) of images (B, 3, S, S), on their device."""
        return torch.cat([self._one(image[None]) for image in images])

    def replace(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `image_embeddings` in place of `images`."""
        rest = {name: value for name, value in batch.items() if name != "images"}
        return rest | {"image_embeddings": self(batch["images"])}

    def _one(self, image: Tensor) -> Tensor:
        key = image_key(image)
        found = self._read(key)
        if found is not None:
            self.hits += 1
            return found.to(image.device)
        self.misses += 1
        with torch.no_grad():
            embedding = self.encode(image)
        self._write(key, embedding)
        return embedding

    def _read(self, key: str) -> Tensor | None:
        if self.folder is None:
            return self.memory.get(key)
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError):
            try:
                return load_file(path)["embedding"]
            except SafetensorError as error:
                logger.warning("%s is damaged (%s) and is made again", path, error)
        return None

    def _write(self, key: str, embedding: Tensor) -> None:
        stored = embedding.detach().to("cpu", copy=True).contiguous()
        if self.folder is None:
            size = stored.numel() * stored.element_size()
            if self.bytes + size <= self.limit:
                self.memory[key] = stored
                self.bytes += size
            return
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"embedding": stored}, beside)
        os.replace(beside, path)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def image_key(image: Tensor) -> str:
    """Hash of an image tensor's values, number format and shape (hexadecimal)."""
    plain = image.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=16)
    digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_key(encoder: nn.Module) -> str:
    """Hash of all weights of an encoder and their number format (hexadecimal)."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
