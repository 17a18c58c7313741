"""Check a data folder: `python validate_data.py --path DATA`. Exit code 1 where something is wrong."""

import json
import sys
from dataclasses import dataclass
from typing import Literal


@dataclass
class ValidateConfig:
    """What to check."""

    path: str
    """A folder of one split or of several, or an annotations.json."""
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

        if config.gres_stats:
            from dataset.gres_stats import gres_statistics

            atomic_write_json(config.gres_stats, gres_statistics(config.path).to_dict())
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
