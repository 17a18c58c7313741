"""SAM image embeddings computed once per image: in memory, or in a folder that later runs and other
processes share.

The encoder is frozen, so its output depends on the image and the encoder's weights alone; both are in the
key. A folder holds one safetensors file per image, `<place>/<weights key>/<first two digits>/<image
key>.safetensors`, with a checksum. Files are written in one step, so any number of processes may use a
folder at once; a damaged file is reported and made again. At the limit (or on a full disk) nothing more is
stored, and what is absent is computed: training and evaluation go through the pictures in cycles, where
throwing out old entries would throw out the next.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from utils.io import atomic_write_bytes

logger = logging.getLogger(__name__)

Precision = Literal["same", "bf16"]
"""Number format of stored embeddings: as computed, or bf16 (half the space of fp32)."""
MEMORY_GIB = 16.0
_RECOUNT = 64
"""Writes after which a folder is measured again (others write to it too)."""


class EmbeddingCache:
    """Embeddings (C, G, G) by image.

    Args:
        encode: images (1, 3, S, S) -> embeddings (1, C, G, G); called for one image at a time, so that a
            stored embedding does not depend on the batch in which its image was first seen.
        place: `memory`, or a folder.
        weights_key: names the encoder's weights and number format (see `encoder_key`).
        limit_gib: space for all embeddings at `place`; 0: 16 GiB of memory, no limit for a folder.
        precision: of stored embeddings. With `bf16` an embedding is rounded when it is first computed, too,
            so that a run does not depend on what was cached before it.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        place: str,
        weights_key: str,
        limit_gib: float = 0.0,
        precision: Precision = "same",
    ) -> None:
        if precision not in ("same", "bf16"):
            raise ValueError(f"stored embeddings cannot be {precision!r}; choose same or bf16")
        if limit_gib < 0:
            raise ValueError(f"the limit of an embedding cache is {limit_gib} GiB; it must be 0 or more")
        self.encode, self.precision = encode, precision
        self.root = None if place == "memory" else Path(place)
        self.folder = (
            None if self.root is None else self.root / (weights_key + "-bf16" * (precision == "bf16"))
        )
        self.limit = (limit_gib or (MEMORY_GIB if self.root is None else float("inf"))) * 2**30
        self.memory: dict[str, Tensor] = {}
        self.bytes = 0
        self.hits = self.misses = self.damaged = 0
        self.full = False
        self._writes = 0
        self._dtype = torch.float32

    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings (B, C, G, G) of images (B, 3, S, S), on their device."""
        return torch.cat([self._one(image[None]) for image in images])

    def replace(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `image_embeddings` in place of `images`."""
        rest = {name: value for name, value in batch.items() if name != "images"}
        return rest | {"image_embeddings": self(batch["images"])}

    def describe(self) -> str:
        """What the cache did, in words."""
        damaged = f", {self.damaged} damaged entries made again" if self.damaged else ""
        limit = "; full: the rest is computed every time" if self.full else ""
        return f"SAM embeddings: {self.hits} from the cache, {self.misses} computed{damaged}{limit}"

    def _one(self, image: Tensor) -> Tensor:
        key = image_key(image)
        found = self._read(key)
        if found is not None:
            self.hits += 1
            return found.to(image.device)
        self.misses += 1
        with torch.no_grad():
            embedding = self.encode(image).detach()
        dtype = embedding.dtype
        stored = embedding.to(
            "cpu", torch.bfloat16 if self.precision == "bf16" else dtype, copy=True
        ).contiguous()
        self._write(key, stored, dtype)
        return stored.to(image.device, dtype)

    def _read(self, key: str) -> Tensor | None:
        if self.folder is None:
            found = self.memory.get(key)
            return None if found is None else found.to(self._dtype)
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                about, embedding = file.metadata() or {}, file.get_tensor("embedding")
            if about.get("checksum") != _checksum(embedding) or about.get("image") != key:
                raise SafetensorError("its checksum is wrong")
            return embedding.to(getattr(torch, about["dtype"]))
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, AttributeError) as error:
            self.damaged += 1
            logger.warning("%s is damaged (%s) and is made again", path, error)
        return None

    def _write(self, key: str, stored: Tensor, dtype: torch.dtype) -> None:
        if self.full:
            return
        if self.folder is None:
            size = stored.numel() * stored.element_size()
            if self._fits(size):
                self._dtype = dtype
                self.memory[key] = stored
                self.bytes += size
            return
        about = {"checksum": _checksum(stored), "image": key, "dtype": str(dtype).removeprefix("torch.")}
        data = save({"embedding": stored}, about)
        if not self._fits(len(data)):
            return
        try:
            atomic_write_bytes(self._path(key), data)
        except OSError as error:
            self.full = True
            logger.warning(
                "%s: no more embeddings are stored (%s); they are computed instead", self.root, error
            )
            return
        self._writes += 1
        self.bytes += len(data)

    def _fits(self, size: int) -> bool:
        """Whether `size` more bytes keep the limit; says so once if not."""
        if self.root is not None and self.limit < float("inf") and self._writes % _RECOUNT == 0:
            self.bytes, self._writes = folder_bytes(self.root), self._writes + 1
        if self.bytes + size <= self.limit:
            return True
        if not self.full:
            self.full = True
            where = "memory" if self.root is None else str(self.root)
            logger.warning(
                "embedding cache (%s): the limit of %.3g GiB is reached", where, self.limit / 2**30
            )
        return False

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def open_cache(
    model: Any, place: str, limit_gib: float = 0.0, precision: Precision = "same"
) -> EmbeddingCache:
    """The cache of a `Lisat`'s image encoder, which must be frozen."""
    encoder = model.sam.image_encoder
    if any(parameter.requires_grad for parameter in encoder.parameters()) and model.training:
        raise ValueError("--cache_image_embeddings: SAM's encoder is trained here; switch the cache off")
    return EmbeddingCache(model.encode_images, place, encoder_key(encoder), limit_gib, precision)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile do not count."""
    total, places = 0, [folder]
    while places:
        try:
            with os.scandir(places.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        places.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue
    return total


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


def _checksum(tensor: Tensor) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
