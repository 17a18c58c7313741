"""Key lists of full-size checkpoints placed on models without weights.

Command: `python -m model.checkpoint --check FILE` (or `python -m model.check_keys`).

FILE is a JSON object whose entries are lists of [name, shape, dtype]: `lisat_7b`, `lisat_pre_7b`,
`vision_tower_dir`, `sam_vit_h_pth`, `peft_extra_lora` (all of them, or none), and those of `OTHER_LISTS`
that are there; other entries are notes.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.key_maps import (
    PARTS,
    SEG_PARTS,
    KeyMap,
    Shape,
    map_lisat_key,
    map_sam_key,
    map_tower_key,
    map_training_key,
)
from utils.io import read_json

_BUT_TOWER = tuple(part for part in PARTS if part != "vision_tower.")
_BUT_MASKS = tuple(part for part in PARTS if part not in SEG_PARTS)
LISTS: dict[str, tuple[KeyMap, tuple[str, ...]]] = {
    "lisat_7b": (map_lisat_key, _BUT_TOWER),
    "lisat_pre_7b": (map_lisat_key, _BUT_MASKS),
    "vision_tower_dir": (map_tower_key, ("vision_tower.",)),
    "sam_vit_h_pth": (map_sam_key, ("sam.",)),
}
"""list -> its key map and the parts of the model that it covers"""


def _sam2(shapes: dict[str, Shape]) -> str:
    from model.sam2_files import check_sam2_keys

    return check_sam2_keys(shapes)


OTHER_LISTS: dict[str, Callable[[dict[str, Shape]], str]] = {'sam2_hiera_large.pt["model"]': _sam2}
"""list of another model -> what places it and returns the counts (ValueError on any fault)"""


def check_file(file: str | Path, preset_name: str = "lisat_7b") -> dict[str, str]:
    """Place every known list of a key file on the preset; returns list -> counts.

    Raises:
        ValueError: a list is missing, or a tensor of one is missing, unexpected or mis-shaped (all named).
    """
    from model.checkpoint import check_keys
    from model.presets import preset

    lists = read_json(file, dict)
    results, faults = {}, []
    for name in OTHER_LISTS.keys() & lists.keys():
        try:
            results[name] = OTHER_LISTS[name](as_shapes(lists[name]))
        except ValueError as error:
            faults.append(f"{name}: {error}")
    wanted = LISTS if LISTS.keys() & lists.keys() or not (results or faults) else {}
    for name, (key_map, parts) in wanted.items():
        if name not in lists:
            faults.append(f"{file}: list {name} is missing")
            continue
        shapes = as_shapes(lists[name])
        config = preset(preset_name)
        if name == "lisat_pre_7b":
            rows = shapes["model.embed_tokens.weight"][0]
            llm = {**config.llm, "vocab_size": rows}
            config = dataclasses.replace(config, llm=llm, sam=None, seg_token_id=-1)
        try:
            results[name] = check_keys(shapes, key_map, config, parts)
        except ValueError as error:
            faults.append(f"{name}: {error}")
    if "peft_extra_lora" in lists:
        unknown = [name for name in as_shapes(lists["peft_extra_lora"]) if not _is_lora(name)]
        faults += [f"peft_extra_lora: {name} is no LoRA tensor" for name in unknown]
        results["peft_extra_lora"] = f"{len(lists['peft_extra_lora'])} LoRA tensors, {len(unknown)} unknown"
    if faults:
        raise ValueError("\n".join(faults))
    return results


def as_shapes(entries: list[Any]) -> dict[str, Shape]:
    """Name -> shape of a list of [name, shape, dtype]."""
    return {entry[0]: tuple(entry[1]) for entry in entries}


def main(argv: list[str] | None = None) -> None:
    """Command line: check a file and print one line per list."""
    parser = argparse.ArgumentParser(prog="python -m model.checkpoint", description=__doc__)
    parser.add_argument("--check", required=True, metavar="FILE", help="JSON file with key lists")
    parser.add_argument("--preset", default="lisat_7b", help="the model to place them on")
    args = parser.parse_args(argv)
    try:
        results = check_file(args.check, args.preset)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    for name, counts in results.items():
        print(f"{name}: {counts}")


def _is_lora(name: str) -> bool:
    fate = map_training_key(name)
    return fate is not None and ".lora_" in getattr(fate, "name", "")


if __name__ == "__main__":
    main()
