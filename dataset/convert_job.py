"""One command for all conversions (the logic of `scripts/convert_data.py`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dataset.converters import Converted

_INPUTS = {
    "coco": "a JSON file",
    "labelme": "a folder of JSON files",
    "geo": "a GeoJSON file",
    "gres": "a folder as dataset/README.md describes",
}


@dataclass
class ConvertConfig:
    """Convert annotations to the own format (annotations.json beside pictures), or back."""

    source: Literal["own", "coco", "labelme", "geo", "gres"] = "own"
    """Format of --input."""
    target: Literal["own", "coco", "labelme", "geo"] = "own"
    """Format to write; one of the two is own. geo: GeoJSON, with GeoTIFF pictures."""
    input: str = ""
    """own: a folder; coco: the JSON file; labelme: the folder; geo: the GeoJSON file; gres: the data
    folder."""
    out: str = ""
    """Folder to write to; for the target coco the JSON file."""
    pictures: str = ""
    """coco: folder of the pictures (default: that of the file); geo: a GeoTIFF or a folder of them."""
    per: Literal["label", "object"] = "label"
    """A question asks for all objects of a label in a picture, or for one object."""
    label: str = "label"
    """geo: the feature property that becomes the question's text."""
    tile: int = 0
    """geo: cut pictures into tiles of so many pixels; 0: leave them whole."""
    bands: tuple[int, ...] = ()
    """geo: red, green and blue as band numbers from 1; empty: as tagged, else the first three."""
    scaling: str = "auto"
    """geo: auto, none, dtype, range:LO,HI or percentile:P,Q (numbers to 0..255)."""
    crs: str = ""
    """target geo: coordinates of the features, for example EPSG:32618, or picture; empty: longitude,
    latitude."""
    write_pictures: bool = False
    """target geo: write the pictures as GeoTIFF as well."""
    write_masks: bool = False
    """target geo: write every mask as GeoTIFF as well."""
    name: str = "GeoReasonSeg"
    """gres: name of the data set."""
    split: str = "train"
    """gres: its split."""
    mask_raster: Literal["official", "exact"] = "exact"
    """gres: how polygons are filled."""
    link: bool = False
    """Link to the pictures instead of copying them."""
    strict: bool = False
    """Stop at anything unusable instead of leaving it out."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = []
        if (self.source == "own") == (self.target == "own"):
            faults.append("one of --source and --target is own, the other one is not")
        faults += [f"--{name} is empty" for name in ("input", "out") if not getattr(self, name)]
        if self.input and not Path(self.input).exists():
            faults.append(
                f"--input {self.input}: there is nothing; expected {_INPUTS.get(self.source, 'a folder')}"
            )
        if self.source == "geo" and not Path(self.pictures or "nowhere").exists():
            faults.append("--pictures: give the GeoTIFF that the features lie on, or a folder of them")
        if self.tile < 0:
            faults.append(f"--tile is {self.tile}; it must be 0 or more")
        return faults


def run(config: ConvertConfig) -> "Converted":
    """Convert as the configuration says."""
    shared = {"strict": config.strict}
    if config.source == "coco":
        from dataset.convert_coco import import_coco

        pictures = config.pictures or Path(config.input).parent
        return import_coco(config.input, pictures, config.out, config.per, config.link, **shared)
    if config.source == "labelme":
        from dataset.convert_labelme import import_labelme

        return import_labelme(config.input, config.out, config.per, config.link, **shared)
    if config.source == "geo":
        from dataset.convert_geo import GeoOptions, import_geo

        options = GeoOptions(config.label, config.tile, tuple(config.bands), config.scaling)
        return import_geo(config.input, config.pictures, config.out, options, config.per, **shared)
    if config.source == "gres":
        from dataset.converters import import_gres

        return import_gres(
            config.input, config.name, config.split, config.out, config.mask_raster, config.link, **shared
        )
    if config.target == "coco":
        from dataset.convert_coco import export_coco

        return export_coco(config.input, config.out, **shared)
    if config.target == "labelme":
        from dataset.convert_labelme import export_labelme

        return export_labelme(config.input, config.out, config.link, **shared)
    from dataset.convert_geo import export_geo
    from utils.geo import WGS84

    crs = config.crs or WGS84
    return export_geo(config.input, config.out, crs, config.write_pictures, config.write_masks, **shared)
