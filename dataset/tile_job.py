"""From xView 1 and the GRES annotations to checked tiles (the logic of `scripts/tile_xview.py`)."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)


@dataclass
class TileConfig:
    """Cut xView 1 scenes into the pictures of GRES and check that the annotations fit them."""

    scenes: str = ""
    """Folder of xView's train_images (*.tif). Empty: only check what is in --out."""
    geojson: str = ""
    """xView_train.geojson: which scenes count, and the boxes that the numbering is checked with."""
    annotations: str = ""
    """Folder of gres_annotations (or the one above it); empty: --out."""
    out: str = "./dataset"
    """Folder that gets gres_images/<split>/ and the manifest gres_tiles.json."""
    collation: Literal["C", "punctuation_first", "punctuation_ignored", "numeric", "auto"] = "C"
    """Order of tile names behind the numbers: by bytes, as en_US.UTF-8 with a newer or older glibc, by the
    numbers
    in them, or auto: the one whose tiles hold xView boxes where the annotations are."""
    processes: int = 0
    """Scenes cut at once; 0: one per processor."""
    all_tiles: bool = False
    """Write every tile of every scene (to gres_images/all) instead of those that GRES annotates."""
    dry_run: bool = False
    """Number and check against xView's boxes, write nothing."""
    force: bool = False
    """Cut even if another order of names fits better, or none does."""
    sample: int = 2000
    """Pictures looked at in the check of edges; 0: all."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = [
            f"--{name} {value}: there is no such {what}"
            for name, value, what, there in (
                ("scenes", self.scenes, "folder", Path(self.scenes).is_dir()),
                ("geojson", self.geojson, "file", Path(self.geojson).is_file()),
                ("annotations", self.annotations, "folder", Path(self.annotations).is_dir()),
            )
            if value and not there
        ]
        if self.scenes and not self.geojson:
            faults.append("--scenes needs --geojson: the published numbers count the scenes that it labels")
        return faults


def run(config: TileConfig) -> tuple[list[str], bool]:
    """Number, cut and check; returns lines of a report and whether all is well."""
    lines: list[str] = []
    ok = True
    if config.scenes:
        lines, ok = _cut(config)
        if config.dry_run:
            return lines, ok
    if config.all_tiles:
        return lines, ok
    found, fits = check(config)
    return lines + found, ok and fits


def _cut(config: TileConfig) -> tuple[list[str], bool]:
    from dataset.tile_check import fit_boxes, read_extents
    from dataset.tiles import (
        COLLATIONS,
        TILE,
        cut_tiles,
        number_tiles,
        read_scene_boxes,
        read_wanted,
        scene_sizes,
        split_scenes,
    )

    annotations = config.annotations or config.out
    wanted = None if config.all_tiles else read_wanted(annotations)
    logger.info("reading %s", config.geojson)
    boxes = read_scene_boxes(config.geojson)
    parts = split_scenes(list(boxes))
    logger.info("%d labelled scenes: %d for training, %d for validation", len(boxes), *map(len, parts))
    sizes = scene_sizes(config.scenes, boxes)
    numbered = {name: number_tiles(parts, sizes, name) for name in COLLATIONS}
    extents = {} if wanted is None else read_extents(annotations)
    fits = (
        {name: fit_boxes(tiles, boxes, extents, name) for name, tiles in numbered.items()} if extents else {}
    )
    best = max(fits, key=lambda name: fits[name].iou) if fits else "C"
    chosen = best if config.collation == "auto" else config.collation
    lines = [f"{len(numbered[chosen])} tiles of {len(boxes)} scenes, numbered in the order {chosen}"]
    lines += [str(fit) for fit in fits.values()]
    if fits and not (fits[chosen].fits and fits[chosen].iou > 0.9 * fits[best].iou):
        advice = (
            f"use --collation {best}"
            if fits[best].fits
            else "xView files and annotations do not belong together"
        )
        lines.append(
            f"WRONG NUMBERING: tiles in the order {chosen} do not hold what the annotations outline: {advice}"
        )
        if not config.force:
            return [*lines, "nothing was cut (--force cuts all the same)"], False
    if config.dry_run:
        return lines, True
    settings = {"size": TILE, "collation": chosen, "scenes": len(boxes)}
    path, faults = cut_tiles(numbered[chosen], wanted, config.scenes, config.out, config.processes, settings)
    return [*lines, f"written: {path}", *(f"FAULT: {fault}" for fault in faults)], not faults


def check(config: TileConfig) -> tuple[list[str], bool]:
    """Sizes and edges of the pictures in `out` against the annotations, split by split."""
    from dataset.gres import SplitFolders, find_split, read_split, target_extent
    from dataset.tile_check import fit_edges
    from dataset.tiles import SPLITS

    lines, ok, entries = [], True, []
    for split in SPLITS:
        folders = None
        for place in dict.fromkeys(
            (config.annotations or config.out, str(Path(config.annotations or ".").parent))
        ):
            try:
                folders = find_split(place, "GeoReasonSeg", split)
                break
            except ValueError:
                continue
        if folders is None:
            continue
        pictures = Path(config.out) / "gres_images" / split
        if pictures.is_dir():
            folders = SplitFolders(folders.annotations, pictures, folders.list_file)
        found, faults = read_split(folders)
        lines.append(f"{split}: {len(found)} pictures with annotations, {len(faults)} unusable")
        lines += [f"FAULT: {fault}" for fault in faults[:5]]
        entries += found
        ok = ok and not faults
    for entry in entries:
        extent, (height, width) = target_extent(entry.annotation), entry.size
        if extent and (extent[2] > width or extent[3] > height or min(extent) < 0):
            ok = False
            lines.append(
                f"FAULT: {entry.json_path}: polygons leave the {width}x{height} pixels of the picture"
            )
    if len(entries) < 2:
        return [*lines, "too few pictures to compare edges with chance"], False
    fit, unread = fit_edges(entries, sample=config.sample)
    lines += [f"FAULT: {fault}" for fault in unread]
    return lines + fit.lines(), ok and fit.fits and not unread
