"""GeoTIFF + GeoJSON <-> the own format.

To us: every raster becomes an 8-bit picture (rules: `utils/geo.py`), whole or in tiles; the features of a
GeoJSON file, reprojected to the raster's pixels, become masks with holes and parts kept. Where a picture
lies is kept in its entry's member `geo`. From us: one feature per mask, in longitude and latitude or in the
pictures' own system, and on request the pictures and masks as GeoTIFF.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset.base import DataError, Fault
from dataset.converters import (
    MALFORMED,
    Converted,
    Per,
    Thing,
    as_mask,
    checked_fields,
    collect,
    finish,
    query_fields,
    questions,
    read_own,
    told,
)
from dataset.generic import FILE_NAME
from dataset.image import load_rgb
from dataset.masks import fill_rings
from dataset.tiles import tile_boxes
from utils.geo import (
    ENDINGS,
    WGS84,
    GeoImage,
    Georeference,
    Polygon,
    fixed_scaling,
    from_geometry,
    mask_polygons,
    raster_info,
    read_geojson,
    read_geotiff,
    to_geometry,
    write_geojson,
    write_raster,
)
from utils.io import StrPath, read_json


@dataclass(frozen=True)
class GeoOptions:
    """How rasters are read: `bands`, `scaling` (see `utils.geo.read_geotiff`); `tile` pixels per side, the
    last of a row or column shifted inward, 0 for whole pictures; `label` is the feature property with the
    question's text."""

    label: str = "label"
    tile: int = 0
    bands: tuple[int, ...] = ()
    scaling: str = "auto"


@dataclass(frozen=True)
class _Feature:
    """A feature in the pixels of a raster: what was stored about its question (None: a foreign file)."""

    label: str
    polygons: list[Polygon]
    extent: tuple[float, float, float, float]
    stored: dict[str, Any] | None = None

    def meets(self, box: tuple[float, float, float, float]) -> bool:
        """Whether its extent (x0, y0, x1, y1) meets the box."""
        x0, y0, x1, y1 = self.extent
        return x0 < box[2] and y0 < box[3] and x1 > box[0] and y1 > box[1]


def import_geo(
    features: StrPath,
    rasters: StrPath,
    out: StrPath,
    options: GeoOptions | None = None,
    per: Per = "label",
    strict: bool = False,
) -> Converted:
    """Write the own format from rasters and the features that lie on them.

    Args:
        features: GeoJSON file. rasters: a raster file, or a folder of .tif files.
        out: folder that gets annotations.json and PNG pictures.
        options: see `GeoOptions`. per: see `dataset.converters.Per`.
        strict: stop at anything unusable instead of leaving it out.

    Raises:
        ValueError: unreadable GeoJSON, no raster, nothing usable, or (strict) anything unusable.
    """
    options = options or GeoOptions()
    stored, crs = read_geojson(features)
    rasters, out = Path(rasters), Path(out)
    files = (
        [rasters]
        if rasters.is_file()
        else sorted(p for p in rasters.glob("*") if p.suffix.lower() in ENDINGS)
    )
    if not files:
        raise ValueError(f"{rasters}: no raster file there; expected a .tif or a folder of them")
    faults: list[Fault] = []
    used: set[int] = set()

    def convert(path: Path) -> list[dict[str, Any]]:
        height, width, place = raster_info(path)
        if place is None:
            raise DataError(path, "", "is not georeferenced, so no feature can be put on it")
        found = _features(stored, crs, path, place, options, Path(features), faults, used)
        scaling = fixed_scaling(path, options.bands, options.scaling) if options.tile else options.scaling
        images = []
        for box in tile_boxes(height, width, options.tile) if options.tile else [(0, 0, width, height)]:
            queries = _queries(found, box, per)
            if not queries:
                continue
            picture = read_geotiff(path, options.bands, scaling, box)
            name = path.stem + (f"_{box[0]}_{box[1]}" if options.tile else "") + ".png"
            images.append(_write_picture(out, name, picture) | {"queries": queries})
        return images

    images = [image for group in collect(files, convert, faults, rasters) for image in group]
    for number in sorted(set(range(len(stored))) - used):
        faults.append(Fault(str(features), f"features[{number}]", "lies on none of the rasters"))
    return finish(out, images, faults, strict)


def _write_picture(out: Path, name: str, picture: GeoImage) -> dict[str, Any]:
    from utils.visualize import write_image

    write_image(out / name, picture.rgb)
    return {"file": name, "rules": picture.rules, "geo": picture.place.to_dict()}


def _features(
    stored: Sequence[Any],
    crs: str,
    path: Path,
    place: Georeference,
    options: GeoOptions,
    file: Path,
    faults: list[Fault],
    used: set[int],
) -> list[_Feature]:
    """The features that touch a raster, in its pixels. Marks what was read, or reported, in `used`."""
    height, width, _ = raster_info(path)
    found = []
    for number, feature in enumerate(stored):
        try:
            properties = feature.get("properties") or {}
            own = properties if "query" in properties and "picture" in properties else None
            if own is not None and Path(own["picture"]).stem != path.stem:
                continue
            label = own["text"] if own else properties.get(options.label)
            if not isinstance(label, str | int | float) or not str(label).strip():
                known = ", ".join(map(repr, properties)) or "none"
                raise ValueError(
                    f"properties.{options.label}: no text there (properties: {known}); choose --label"
                )
            if feature.get("geometry") is None:
                if own is None:
                    raise ValueError("geometry: is empty")
                polygons = []
            else:
                polygons = from_geometry(feature["geometry"], crs, place)
        except MALFORMED as error:
            if number not in used:
                faults.append(Fault(str(file), f"features[{number}]", told(error)))
            used.add(number)
            continue
        points = np.array([point for polygon in polygons for ring in polygon for point in ring]).reshape(
            -1, 2
        )
        extent = (*points.min(0).tolist(), *points.max(0).tolist()) if len(points) else (0.0, 0.0, 0.0, 0.0)
        made = _Feature(str(label).strip(), polygons, extent, own)
        if own is not None or made.meets((0, 0, width, height)):
            used.add(number)
            found.append(made)
    return found


def _queries(features: Sequence[_Feature], box: tuple[int, int, int, int], per: Per) -> list[dict[str, Any]]:
    """Questions about the pixels of a box: those that were stored with the features, then one per label or
    object."""
    size = box[3] - box[1], box[2] - box[0]
    known: dict[int, dict[str, Any]] = {}
    for feature in (feature for feature in features if feature.stored is not None):
        query = known.setdefault(feature.stored["query"], {**checked_fields(feature.stored), "masks": {}})
        if feature.stored.get("role") == "ignore":
            query["ignore"] = _filled(feature.polygons, box)
        elif feature.stored.get("role") == "mask":
            query["masks"][feature.stored["mask"]] = _filled(feature.polygons, box)
    found = []
    for number in sorted(known):
        masks = [known[number]["masks"][k] for k in sorted(known[number]["masks"])]
        found.append(known[number] | {"masks": masks})
    foreign = (feature for feature in features if feature.stored is None and feature.meets(box))
    return found + questions((Thing(f.label, _filled(f.polygons, box)) for f in foreign), size, per)


def _filled(polygons: Sequence[Polygon], box: tuple[int, int, int, int]) -> np.ndarray:
    """bool mask of the box: union of the polygons, the rings of each filled even-odd."""
    width, height = box[2] - box[0], box[3] - box[1]
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        rings = [np.asarray(ring) - box[:2] for ring in polygon]
        low = np.clip(np.floor(np.min([ring.min(0) for ring in rings], axis=0)), 0, [width, height]).astype(
            int
        )
        high = np.clip(np.ceil(np.max([ring.max(0) for ring in rings], axis=0)), 0, [width, height]).astype(
            int
        )
        if (low < high).all():
            part = fill_rings([ring - low for ring in rings], high[1] - low[1], high[0] - low[0])
            mask[low[1] : high[1], low[0] : high[0]] |= part
    return mask


# ------------------------------------------------------------------------------------------- from us


def export_geo(
    folder: StrPath,
    out: StrPath,
    crs: str = WGS84,
    write_pictures: bool = False,
    write_masks: bool = False,
    strict: bool = False,
) -> Converted:
    """Write data in the own format whose pictures are georeferenced (`geo`) as `annotations.geojson`.

    Args:
        folder: data in the own format. out: folder of the files written.
        crs: system of the coordinates, default longitude and latitude as RFC 7946 wants; `picture`: that of
            the first picture.
        write_pictures: also `<stem>.tif`, the 8-bit pictures. write_masks: also
            `masks/<stem>_<question>_<mask>.tif` with 0 and 1.

    Raises:
        ValueError: no picture is georeferenced, or (strict) anything unusable.
    """
    folder, pictures, faults = read_own(folder, strict)
    places = _places(folder)
    features: list[dict[str, Any]] = []
    files: list[Path] = []
    count = 0
    for picture in pictures:
        name = picture.path.relative_to(folder).as_posix()
        try:
            place = Georeference.from_dict(places.get(name))
        except ValueError as error:
            faults.append(Fault(str(folder / FILE_NAME), f"{name}: geo", str(error)))
            continue
        crs = place.crs if crs == "picture" else crs
        count += 1
        for number, query in enumerate(picture.queries):
            shared = {"picture": name, "query": number, **query_fields(query)}
            masks = [(k, "mask", mask) for k, mask in enumerate(query.masks)]
            masks += [(0, "ignore", query.ignore)] if query.ignore is not None else []
            for k, role, stored in masks or [(0, "none", None)]:
                geometry = None
                if stored is not None:
                    mask = as_mask(stored, picture.size)
                    geometry = to_geometry(mask_polygons(mask), place, crs)
                    if write_masks and role == "mask":
                        file = Path(out) / "masks" / f"{Path(name).stem}_{number}_{k}.tif"
                        files.append(write_raster(file, mask.astype(np.uint8), place))
                properties = shared | {"role": role, "mask": k}
                features.append({"type": "Feature", "geometry": geometry, "properties": properties})
        if write_pictures:
            files.append(write_raster((Path(out) / name).with_suffix(".tif"), load_rgb(picture.path), place))
    if not count:
        raise ValueError(
            f"{folder}: no picture says where it lies (member geo, written by the import of GeoTIFFs)"
        )
    files.insert(0, write_geojson(Path(out) / "annotations.geojson", features, crs))
    return Converted(files, count, sum(len(p.queries) for p in pictures), faults)


def _places(folder: Path) -> dict[str, Any]:
    images = read_json(folder / FILE_NAME, dict)["images"]
    return {
        image["file"]: image.get("geo") for image in images if isinstance(image, dict) and "file" in image
    }
