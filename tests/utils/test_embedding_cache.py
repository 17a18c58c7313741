"""The embedding cache: same numbers, one encoding per image, damaged files, keys."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import nn

from dataset.synthetic import write_scenes
from tests.tiny_lisat import tiny_model, write_checkpoint
from utils import embedding_cache
from utils.config import parse_config
from utils.embedding_cache import EmbeddingCache, encoder_key, folder_bytes, image_key, open_cache
from utils.evaluate_lisat import EvalConfig, run


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


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_bf16_is_the_same_before_and_after_it_is_stored(tmp_path: Path, kind: str) -> None:
    place = "memory" if kind == "memory" else str(tmp_path)
    encoder, images = Counting(), torch.rand(2, 3, 4, 4)
    cache = EmbeddingCache(encoder, place, "key", precision="bf16")
    first, exact = cache(images), encoder(images)
    assert first.dtype == torch.float32 and torch.equal(first, exact.bfloat16().float())
    assert torch.equal(cache(images), first) and cache.hits == 2
    if kind == "folder":
        EmbeddingCache(encoder, place, "key")(images)  # its own entries
        sizes = {f.parent.parent.name: f.stat().st_size for f in tmp_path.rglob("*.safetensors")}
        assert set(sizes) == {"key", "key-bf16"} and sizes["key"] > sizes["key-bf16"]
    with pytest.raises(ValueError, match="same or bf16"):
        EmbeddingCache(encoder, place, "key", precision="fp8")


def test_every_kind_of_damage_is_reported_and_made_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, images = Counting(), torch.rand(2, 3, 4, 4)
    stored = EmbeddingCache(encoder, str(tmp_path), "key")(images)
    one, two = sorted(tmp_path.rglob("*.safetensors"))
    whole = one.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1  # one bit of one number
    for damage in (b"", b"\x00" * 40, whole[:-5], bytes(flipped), two.read_bytes()):
        one.write_bytes(damage)
        cache = EmbeddingCache(encoder, str(tmp_path), "key")
        caplog.clear()
        assert torch.equal(cache(images), stored)
        assert (cache.hits, cache.misses, cache.damaged) == (1, 1, 1)
        assert one.name in caplog.text and "made again" in caplog.text
        assert "1 damaged" in cache.describe()
        again = EmbeddingCache(encoder, str(tmp_path), "key")
        assert torch.equal(again(images), stored) and (again.hits, again.damaged) == (2, 0)


def test_limit_of_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder, images = Counting(), torch.rand(6, 3, 4, 4)
    EmbeddingCache(encoder, str(tmp_path), "old weights")(images[:1])
    size = folder_bytes(tmp_path)
    cache = EmbeddingCache(encoder, str(tmp_path), "key", limit_gib=3.5 * size / 2**30)
    first = cache(images)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 and cache.full
    assert caplog.text.count("is reached") == 1 and "full" in cache.describe()
    assert torch.equal(cache(images), first) and (cache.hits, cache.misses) == (2, 10)
    assert folder_bytes(tmp_path) <= 3.5 * size
    with pytest.raises(ValueError, match="0 or more"):
        EmbeddingCache(encoder, str(tmp_path), "key", limit_gib=-1)


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding_cache, "atomic_write_bytes", no_space)
    encoder, images = Counting(), torch.rand(3, 3, 4, 4)
    cache = EmbeddingCache(encoder, str(tmp_path), "key")
    assert torch.allclose(cache(images), encoder(images), atol=1e-6)
    assert caplog.text.count("No space left") == 1 and cache.full


def _fill(place: str, seed: int) -> str:
    torch.manual_seed(0)
    encoder, images = Counting(), torch.rand(12, 3, 4, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    cache = EmbeddingCache(encoder, place, "key")
    return image_key(cache(images[order])[order.argsort()])


def test_processes_share_a_folder(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        found = set(pool.map(_fill, [str(tmp_path)] * 4, range(4)))
    assert len(found) == 1 and len(list(tmp_path.rglob("*.safetensors"))) == 12
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def test_trained_encoders_are_refused_and_evaluation_is_the_same(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "model")
    write_scenes(tmp_path / "scenes", 3, seed=1)
    model = tiny_model().train()
    with pytest.raises(ValueError, match="trained here"):
        open_cache(model, "memory")
    results = []
    for number, flags in enumerate(
        ([], ["--cache_image_embeddings", "c"], ["--cache_image_embeddings", "c"])
    ):
        flags = [flag.replace("c", str(tmp_path / "cache")) if flag == "c" else flag for flag in flags]
        base = ["--pretrained_model_path", checkpoint, "--val_dataset", f"generic:{tmp_path / 'scenes'}"]
        base += ["--vis_save_path", tmp_path / str(number), "--eval_prompt", "forced", "--gallery", "0"]
        run(parse_config(EvalConfig, [*map(str, base), "--device", "cpu", *flags]))
        (file,) = (tmp_path / str(number)).glob("predictions_*.json")
        body = json.loads(file.read_text())
        results.append([query for image in body["images"] for query in image["queries"]])
    assert results[0] == results[1] == results[2] and len(results[0]) > 3
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
