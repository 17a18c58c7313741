"""How far the words and the picture carry: scores of a land cover run beside a baseline that sees neither.

The baseline answers each class with the one mask that did best on the training pictures: nothing, all, or
the class's mean mask cut at some level, stretched to the picture. Usage:

    python benchmarks/landcover.py --folder FOLDER --train_files "*part[1-7]" --val_files "*part9" \
        --predictions inference_dir/landcover/predictions_landcover.json
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from utils.config import parse_config  # noqa: E402

GRID = 64
LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass
class LandcoverConfig:
    """Which pictures, and which predictions to set beside the baseline."""

    folder: str
    """Semantic folder (images/, masks/, classes.json)."""
    train_files: str = "*part[1-7]"
    """Pictures the baseline learns from."""
    val_files: str = "*part9"
    """Pictures that are scored."""
    predictions: str = ""
    """Prediction file of eval_lisat.py on the same pictures; empty: the baseline alone."""


def samples(folder: str, files: str) -> list[tuple[str, np.ndarray]]:
    """(class, target uint8 (H, W) with 255 = ignore) of every question on the pictures."""
    from dataset.base import ReadOptions
    from dataset.sem_seg import SemSegData

    data = SemSegData(folder, ReadOptions(train=False, prompt="open", templates="tiny"), files)
    return [(c.query, c.masks[0]) for sample in data for c in sample.conversations]


def stretch(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Nearest-neighbour resize of (h, w) to `shape`."""
    rows = np.arange(shape[0]) * mask.shape[0] // shape[0]
    columns = np.arange(shape[1]) * mask.shape[1] // shape[1]
    return mask[rows][:, columns]


def constant_masks(train: list[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Per class the best of all constant candidates on the training pictures, bool (GRID, GRID)."""
    from utils.metrics import mask_iou

    best = {}
    for name in sorted({name for name, _ in train}):
        targets = [target for other, target in train if other == name]
        mean = np.mean([stretch(target == 1, (GRID, GRID)) for target in targets], axis=0)
        candidates = [np.zeros((GRID, GRID), bool), np.ones((GRID, GRID), bool)]
        candidates += [mean > level for level in LEVELS]
        scores = [np.mean([mask_iou(stretch(c, t.shape), t) for t in targets]) for c in candidates]
        best[name] = candidates[int(np.argmax(scores))]
    return best


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print both rows; returns the figures."""
    config = parse_config(LandcoverConfig, argv)
    from utils.metrics import Counts, mask_counts, scores
    from utils.predictions import read_predictions

    best = constant_masks(samples(config.folder, config.train_files))
    rows = []
    for number, (name, target) in enumerate(samples(config.folder, config.val_files)):
        triple = mask_counts(stretch(best[name], target.shape), target)
        counts = dict(zip(("intersection", "union", "target"), triple))
        exists = bool((target == 1).any())
        rows.append(
            {"image": (number, name), "kind": name, "gt_exists": exists, "pred_exists": True, **counts}
        )
    figures = {"blind": scores(Counts.from_rows(rows))}
    if config.predictions:
        figures["model"] = scores(read_predictions(config.predictions).counts())
    for name, values in figures.items():
        print(f"{name}: gIoU {values['giou']:.3f}, cIoU {values['ciou']:.3f}, questions {len(rows)}")
    return {f"{row}_{key}": values[key] for row, values in figures.items() for key in ("giou", "ciou")}


if __name__ == "__main__":
    main()
