"""How long a GRES-sized data set takes to open: reading every file, or its index. Run by hand.

python benchmarks/data_start.py            about half a minute of processor time
"""

import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.base import ReadOptions
from dataset.registry import load_dataset
from utils.config import parse_config

SPEC = "GeoReasonSeg|train"


@dataclass
class StartConfig:
    """Settings."""

    files: int = 7205
    """Pictures with a JSON file each (GRES train has 7,205)."""
    repeats: int = 3
    """Openings of every kind."""
    folder: str = ""
    """Where to write them; empty = a temporary folder that is removed."""


def write_files(root: Path, count: int) -> None:
    """`count` pictures of 512x512 with polygons of about as many points as in GRES."""
    import cv2
    import numpy as np

    folder = root / "reason_seg" / "GeoReasonSeg" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    pixels = cv2.imencode(".jpg", rng.integers(0, 255, (512, 512, 3), dtype=np.uint8))[1].tobytes()
    for number in range(count):
        stem = f"tile_{number:012d}"
        points = rng.integers(0, 512, (int(rng.lognormal(3.9, 1.0)) + 4, 2)).tolist()
        shape = {"label": "target", "image_name": f"{stem}.jpg", "points": points}
        body = {"text": ["Find the flat roof beside the road."] * 3, "is_sentence": True, "shapes": [shape]}
        (folder / f"{stem}.json").write_text(json.dumps(body))
        (folder / f"{stem}.jpg").write_bytes(pixels)


def opened(root: Path, index: str) -> tuple[float, float, int]:
    """Seconds on the clock and of the processor, and how many pictures were found."""
    wall, cpu = time.perf_counter(), time.process_time()
    data = load_dataset(SPEC, root, ReadOptions(index=index))
    return time.perf_counter() - wall, time.process_time() - cpu, len(data)


def run(config: StartConfig) -> list[str]:
    """Lines of the report; ValueError if an index gave other data."""
    root = Path(config.folder or tempfile.mkdtemp())
    index = str(root / "index")
    try:
        write_files(root, config.files)
        kinds = {"files": "off", "making the index": index, "index": index}
        lines, best = [], {}
        for name, setting in kinds.items():
            if name == "making the index":
                shutil.rmtree(index, ignore_errors=True)
            runs = [opened(root, setting) for _ in range(1 if name == "making the index" else config.repeats)]
            if {found for _, _, found in runs} != {config.files}:
                raise ValueError(f"{name}: found {runs[0][2]} of {config.files} pictures")
            best[name] = min(cpu for _, cpu, _ in runs)
            wall = min(wall for wall, _, _ in runs)
            lines.append(f"{name}: {best[name]:.2f} s of the processor, {wall:.2f} s on the clock")
        plain, stored = (load_dataset(SPEC, root, ReadOptions(index=setting)) for setting in ("off", index))
        for place in range(0, config.files, max(1, config.files // 20)):
            first, second = plain.draw(place).conversations, stored.draw(place).conversations
            if any(
                a.turns != b.turns or (a.masks != b.masks).any() for a, b in zip(first, second, strict=True)
            ):
                raise ValueError(f"picture {place} is another one from the index")
        return [*lines, f"equal; {best['files'] / best['index']:.0f}x less processor time"]
    finally:
        if not config.folder:
            shutil.rmtree(root, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    """Run and print; exit code 1 if the index gave other data."""
    try:
        print("\n".join(run(parse_config(StartConfig, argv, prog="data_start.py"))))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
