"""Check data: `python validate_data.py --path DATA` or `--dataset NAME`. Exit code 1: something is wrong."""

import json
import sys
from dataclasses import dataclass
from typing import Literal


@dataclass
class ValidateConfig:
    """What to check."""

    path: str = ""
    """A folder of one split or of several, or an annotations.json."""
    dataset: str = ""
    """Instead of a path: a data set by its name (refcoco|train, ade20k|train, RRSIS-D|test, vqa:NAME)."""
    dataset_dir: str = "./dataset"
    """Root of the named data sets."""
    format: Literal["auto", "gres", "generic", "sem_seg"] = "auto"
    """Format of the data; auto looks at what is there."""
    fast: bool = False
    """Read only the headers of pictures."""
    mask_raster: Literal["official", "exact"] = "official"
    """How GRES polygons are filled for the statistics."""
    json: str = ""
    """Also write the report as JSON to this file."""
    gres_stats: str = ""
    """Also write statistics of GRES annotations (all splits below --path) to this JSON file."""


def main(argv: list[str] | None = None) -> int:
    """Print the report; 0 without faults, 1 with faults, 2 where nothing could be checked."""
    from utils.config import parse_config

    try:
        config = parse_config(ValidateConfig, argv, prog="validate_data.py")
        from dataset.validate import validate
        from utils.io import atomic_write_json, atomic_write_text

        if bool(config.path) == bool(config.dataset):
            raise ValueError("give either --path (a folder) or --dataset (a name)")
        if config.gres_stats:
            from dataset.gres_stats import gres_statistics

            atomic_write_json(config.gres_stats, gres_statistics(config.path).to_dict())
        if config.dataset:
            from dataset.validate_sets import validate_dataset

            report = validate_dataset(config.dataset, config.dataset_dir, config.fast, config.mask_raster)
        else:
            report = validate(config.path, config.format, config.fast, config.mask_raster)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(report.lines()))
    if config.json:
        atomic_write_text(config.json, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
