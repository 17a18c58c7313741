"""The embedding cache: same numbers, one encoding per image, damaged files, keys."""

from pathlib import Path

import pytest
import torch
from torch import nn

from utils.embedding_cache import EmbeddingCache, encoder_key, image_key


class Counting(nn.Module):
    """An encoder that counts the images it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, stride=2)
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return self.conv(images)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_each_image_is_encoded_once(tmp_path: Path, kind: str) -> None:
    place = "memory" if kind == "memory" else str(tmp_path)
    encoder, images = Counting(), torch.rand(3, 3, 4, 4)
    cache = EmbeddingCache(encoder, place, "key")
    first = cache(images)
    assert not first.requires_grad and torch.allclose(first, encoder(images), atol=1e-6)
    encoder.seen = 0
    assert torch.equal(cache(images.flip(0)), first.flip(0)) and encoder.seen == 0
    assert torch.equal(cache(torch.cat([images[:1], images[:1] + 1]))[0], first[0]) and encoder.seen == 1
    batch = cache.replace({"images": images, "other": 1})
    assert set(batch) == {"image_embeddings", "other"} and torch.equal(batch["image_embeddings"], first)


def test_folder_is_shared_and_damage_is_repaired(tmp_path: Path) -> None:
    encoder, images = Counting(), torch.rand(1, 3, 4, 4)
    stored = EmbeddingCache(encoder, str(tmp_path), "key")(images)
    (file,) = tmp_path.rglob("*.safetensors")
    other = EmbeddingCache(encoder, str(tmp_path), "key")
    assert torch.equal(other(images), stored) and encoder.seen == 1
    file.write_bytes(b"damaged")
    assert torch.equal(other(images), stored) and encoder.seen == 2
    EmbeddingCache(encoder, str(tmp_path), "other weights")(images)
    assert encoder.seen == 3


def test_full_memory_computes_again() -> None:
    encoder, images = Counting(), torch.rand(2, 3, 4, 4)
    cache = EmbeddingCache(encoder, "memory", "key", limit_gib=70 / 2**30)
    cache(images), cache(images)
    assert encoder.seen == 3


def test_keys_tell_images_weights_and_formats_apart() -> None:
    encoder, image = Counting(), torch.rand(3, 4, 4)
    changed = image.clone()
    changed[0, 0, 0] += 1e-3
    assert (
        len(
            {
                image_key(image),
                image_key(changed),
                image_key(image.bfloat16()),
                image_key(image.reshape(3, 2, 8)),
            }
        )
        == 4
    )
    before = encoder_key(encoder)
    assert encoder_key(encoder) == before != encoder_key(encoder.double())
    with torch.no_grad():
        encoder.float().conv.bias[0] += 1
    assert encoder_key(encoder) != before
