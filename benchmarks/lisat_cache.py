"""What the disk cache of SAM embeddings saves: encoding a picture against storing and reading its embedding.

python benchmarks/lisat_cache.py        two minutes of processor time (ViT-B, 1024 pixels); --tiny: seconds
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import BenchmarkConfig, Report, interleaved  # noqa: E402
from utils.config import parse_config  # noqa: E402


def run(config: BenchmarkConfig) -> Report:
    """Compare embeddings, then time the encoder, a first look (encode and store) and a second one (read)."""
    import statistics

    import torch

    from model.sam import Sam, sam_config
    from utils.embedding_cache import EmbeddingCache, encoder_key, folder_bytes

    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    sam = Sam(sam_config("sam_tiny" if config.tiny else "sam_vit_b")).eval()
    images = torch.rand(config.images, 3, sam.config.image_size, sam.config.image_size)
    lines, equal = [], True
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        plain = sam.encode(images)
        key = encoder_key(sam.image_encoder)
        for precision in ("same", "bf16"):
            place = Path(folder) / precision
            cache = EmbeddingCache(sam.encode, str(place), key, precision=precision)
            wanted = plain if precision == "same" else plain.bfloat16().float()
            first, second = cache(images), cache(images)
            equal = equal and torch.allclose(first, wanted, atol=1e-5 if precision == "same" else 0.1)
            equal = equal and torch.equal(first, second) and cache.hits == config.images

            def again(place: Path = place, precision: str = precision) -> None:
                EmbeddingCache(sam.encode, str(place), key, precision=precision)(images)

            (timing,) = interleaved({"read": again}, 10 * config.repeats).values()
            size = folder_bytes(place) / config.images / 2**20
            cpu, wall = (1000 * statistics.median(t) / config.images for t in (timing.cpu, timing.wall))
            lines.append(
                f"{precision}: {size:.2f} MiB a picture, read in {cpu:.1f} ms of CPU ({wall:.1f} ms)"
            )
        timing = interleaved({"encode": lambda: sam.encode(images)}, config.repeats)["encode"]
    cpu, wall = (statistics.median(t) / config.images for t in (timing.cpu, timing.wall))
    lines.append(f"encoder: {cpu:.2f} s of CPU ({wall:.2f} s) a picture of {sam.config.image_size} pixels")
    lines.append(f"embeddings from the cache are {'those of the encoder' if equal else 'NOT THE SAME'}")
    return Report(lines, equal)


def main() -> int:
    """Run and print; 1 if the embeddings differ."""
    report = run(parse_config(BenchmarkConfig, prog="lisat_cache.py"))
    print("\n".join(report.lines))
    return 0 if report.equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
