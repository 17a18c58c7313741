"""Georeferenced pictures: GeoTIFF -> 8-bit RGB by explicit rules, masks -> GeoTIFF and GeoJSON, polygons
both ways.

H, W are pixels. Polygons are lists of rings, the first the outline, the others holes; a ring is a list of
points (x, y) in pixel corners (0..W to the right, 0..H downwards), not closed. `transform` maps pixel
corners to coordinates of `crs`. Files are read by rasterio (GDAL), never by OpenCV, which takes GeoTIFFs for
one band.

Scaling of numbers to 0..255 (`parse_scaling`); pixels without data become 0 and do not count for percentiles:

    auto              8-bit values stay; all others as percentile:2,98
    none              values stay; other than 8-bit ones are refused
    dtype             the whole range of an integer type: 0..65535 -> 0..255
    range:LO,HI       LO -> 0, HI -> 255, the same for all bands (reflectances: range:0,3000)
    percentile:P,Q    per band, percentiles P and Q of the valid pixels -> 0 and 255
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.io import StrPath, atomic_write_bytes, atomic_write_json, read_json

logger = logging.getLogger(__name__)

ENDINGS = (".tif", ".tiff")
WGS84 = "OGC:CRS84"
"""Longitude, latitude: the coordinates of GeoJSON (RFC 7946)."""
_LONGEST = 64
"""Edges of more pixels get points between, since straight lines bend when they are reprojected."""
Ring = list[tuple[float, float]]
Polygon = list[Ring]


@dataclass(frozen=True)
class Scaling:
    """How numbers become 0..255: `kind` is auto, none, dtype, range or percentile; the latter two have
    bounds.

    With `of_bands` percentiles are settled: (low, high) per band.
    """

    kind: str = "auto"
    low: float = 2.0
    high: float = 98.0
    of_bands: tuple[tuple[float, float], ...] = ()


def parse_scaling(text: str) -> Scaling:
    """Scaling from its text form (see the module text). ValueError lists the forms."""
    kind, colon, bounds = text.strip().partition(":")
    try:
        if kind in ("auto", "none", "dtype") and not colon:
            return Scaling(kind)
        low, high = (float(value) for value in bounds.split(","))
        inside = kind == "range" or (kind == "percentile" and 0 <= low and high <= 100)
        if inside and np.isfinite([low, high]).all() and low < high:
            return Scaling(kind, low, high)
    except ValueError:
        pass
    forms = "auto, none, dtype, range:LO,HI, percentile:P,Q (LO < HI, 0 <= P < Q <= 100)"
    raise ValueError(f"scaling {text!r} is unknown; write one of {forms}")


@dataclass(frozen=True)
class Georeference:
    """Where pixels lie: `crs` as text (EPSG:32618 or WKT), `transform` (a, b, c, d, e, f):
    X = a x + b y + c, Y = d x + e y + f for pixel corners (x, y)."""

    crs: str
    transform: tuple[float, ...]

    def shifted(self, x: float, y: float) -> "Georeference":
        """The reference of a part of the picture whose upper left corner is at pixel (x, y)."""
        a, b, c, d, e, f = self.transform
        return Georeference(self.crs, (a, b, a * x + b * y + c, d, e, d * x + e * y + f))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"crs": self.crs, "transform": list(self.transform)}

    @classmethod
    def from_dict(cls, values: Any) -> "Georeference":
        """From JSON values. ValueError says what is wrong."""
        numbers = values.get("transform") if isinstance(values, dict) else None
        good = isinstance(numbers, list) and len(numbers) == 6
        good = good and all(isinstance(v, int | float) and np.isfinite(v) for v in numbers)
        if not good or not isinstance(values.get("crs"), str):
            raise ValueError(f"expected {{'crs': text, 'transform': six numbers}}, found {repr(values)[:80]}")
        if numbers[0] * numbers[4] == numbers[1] * numbers[3]:
            raise ValueError(f"the transform {numbers} maps the picture to a line")
        return cls(values["crs"], tuple(float(v) for v in numbers))


@dataclass(frozen=True)
class GeoImage:
    """A picture: uint8 `rgb` (H, W, 3), bool `valid` (H, W), where it lies (None: not georeferenced), and the
    rules that were used, as text."""

    rgb: np.ndarray
    valid: np.ndarray
    place: Georeference | None
    rules: str


# ----------------------------------------------------------------------------------------------- reading


def is_geotiff(path: StrPath) -> bool:
    """Whether `read_geotiff` is the reader for this file, by its ending."""
    return Path(path).suffix.lower() in ENDINGS


def read_geotiff(
    path: StrPath,
    bands: Sequence[int] = (),
    scaling: str | Scaling = "auto",
    window: tuple[int, int, int, int] | None = None,
) -> GeoImage:
    """Read a raster file as an 8-bit RGB picture.

    Args:
        path: GeoTIFF, or anything else GDAL reads.
        bands: red, green, blue as band numbers from 1 (or one band for grey). Empty: the bands tagged red,
            green, blue, else the first three, else the first one as grey.
        scaling: see the module text.
        window: (x0, y0, x1, y1) in pixels, inside the picture; None: all. Percentiles are then the window's
            own: to cut tiles that look alike take `fixed_scaling` first.

    Raises:
        FileNotFoundError: no such file. ValueError: damaged or unknown file, bands or scaling that it has
            not.
    """
    scaling = parse_scaling(scaling) if isinstance(scaling, str) else scaling
    with _open(path) as source:
        chosen = choose_bands(source, bands, path)
        colours = source.colormap(1) if _has_palette(source) and not bands else None
        values, valid = _read(source, chosen, path, window)
        place = _place(source, path)
        kind = np.dtype(source.dtypes[chosen[0] - 1])
    if place is not None and window is not None:
        place = place.shifted(window[0], window[1])
    if colours is not None:
        table = np.array([colours.get(index, (0, 0, 0, 255))[:3] for index in range(256)], np.uint8)
        return GeoImage(table[values[0]] * valid[..., None], valid, place, "colour table")
    used = _settle(scaling, kind, path)
    pixels = [scale_band(band, valid, used, kind, number) for number, band in enumerate(values)]
    rgb = np.stack(pixels if len(pixels) == 3 else pixels * 3, axis=-1)
    rules = f"bands {', '.join(map(str, chosen))} of {source.count}, {kind}, {describe(used)}"
    return GeoImage(rgb, valid, place, rules)


def fixed_scaling(path: StrPath, bands: Sequence[int] = (), scaling: str | Scaling = "auto") -> Scaling:
    """`scaling` with percentiles settled on the whole picture (or a thinned copy of at most 2048 pixels a
    side), so that all its parts are scaled alike."""
    scaling = parse_scaling(scaling) if isinstance(scaling, str) else scaling
    with _open(path) as source:
        chosen = choose_bands(source, bands, path)
        kind = np.dtype(source.dtypes[chosen[0] - 1])
        used = _settle(scaling, kind, path)
        if used.kind != "percentile" or used.of_bands:
            return used
        shrink = max(1.0, max(source.height, source.width) / 2048)
        shape = max(1, int(source.height / shrink)), max(1, int(source.width / shrink))
        values, valid = _read(source, chosen, path, None, shape)
    found = tuple(_percentiles(band[valid], used) for band in values)
    return Scaling(used.kind, used.low, used.high, found)


def choose_bands(source: Any, bands: Sequence[int], path: StrPath) -> tuple[int, ...]:
    """Band numbers of an open file: those asked for, or by their tags, or the first ones."""
    if bands:
        if len(bands) not in (1, 3) or not all(1 <= band <= source.count for band in bands):
            raise ValueError(
                f"{path} has bands 1..{source.count}; asked for {list(bands)} (give one or three)"
            )
        return tuple(bands)
    tags = [tag.name for tag in source.colorinterp]
    if all(tags.count(name) == 1 for name in ("red", "green", "blue")):
        return tuple(tags.index(name) + 1 for name in ("red", "green", "blue"))
    return (1, 2, 3) if source.count >= 3 else (1,)


def scale_band(
    band: np.ndarray, valid: np.ndarray, scaling: Scaling, kind: np.dtype, number: int = 0
) -> np.ndarray:
    """uint8 (H, W) of one band's numbers; 0 where `valid` is false. `auto` must have been decided; `number`
    is the band's place among `of_bands`."""
    if scaling.kind == "none":
        return np.where(valid, band, 0).astype(np.uint8)
    low, high = scaling.low, scaling.high
    if scaling.kind == "dtype":
        low, high = (float(v) for v in (np.iinfo(kind).min, np.iinfo(kind).max))
    elif scaling.kind == "percentile":
        low, high = scaling.of_bands[number] if scaling.of_bands else _percentiles(band[valid], scaling)
    share = (np.where(valid, band, low).astype(np.float64) - low) / max(high - low, 1e-12)
    return ((np.clip(share, 0, 1) * 255 + 0.5) * valid).astype(np.uint8)


def _percentiles(values: np.ndarray, scaling: Scaling) -> tuple[float, float]:
    found = np.percentile(values, (scaling.low, scaling.high)) if values.size else (0.0, 1.0)
    return float(found[0]), float(found[1])


def describe(scaling: Scaling) -> str:
    """Text form that `parse_scaling` reads."""
    if scaling.kind in ("range", "percentile"):
        return f"{scaling.kind}:{scaling.low:g},{scaling.high:g}"
    return scaling.kind


def raster_info(path: StrPath) -> tuple[int, int, Georeference | None]:
    """(H, W, where it lies) of a raster file, from its header."""
    with _open(path) as source:
        return source.height, source.width, _place(source, path)


def _settle(scaling: Scaling, kind: np.dtype, path: StrPath) -> Scaling:
    """`auto` decided by the number type; ValueError where the type does not go with the rule."""
    if scaling.kind == "auto":
        used = Scaling("none") if kind == np.uint8 else Scaling("percentile")
        if used.kind != "none":
            logger.info("%s holds %s: scaled by %s (choose with --scaling)", path, kind, describe(used))
        return used
    if scaling.kind == "none" and kind != np.uint8:
        raise ValueError(
            f"{path} holds {kind}; scaling none takes 8-bit values only: choose range or percentile"
        )
    if scaling.kind == "dtype" and not np.issubdtype(kind, np.integer):
        raise ValueError(f"{path} holds {kind}, which has no range; choose scaling range or percentile")
    return scaling


def _open(path: StrPath) -> Any:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    if not Path(path).is_file():
        raise FileNotFoundError(f"picture {path} is not there; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            return rasterio.open(path)
    except RasterioError as error:
        raise ValueError(f"picture {path} is no raster file that GDAL reads ({error})") from error


def _read(
    source: Any,
    bands: tuple[int, ...],
    path: StrPath,
    window: tuple[int, int, int, int] | None,
    shape: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Values (n, H, W) and where all of the bands have data (H, W)."""
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    part = None
    if window is not None:
        x0, y0, x1, y1 = window
        if not (0 <= x0 < x1 <= source.width and 0 <= y0 < y1 <= source.height):
            raise ValueError(f"{path} has {source.width}x{source.height} pixels; asked for {window}")
        part = Window(x0, y0, x1 - x0, y1 - y0)
    if any(np.issubdtype(np.dtype(source.dtypes[band - 1]), np.complexfloating) for band in bands):
        raise ValueError(f"{path} holds complex numbers; compute their magnitude first")
    try:
        size = None if shape is None else (len(bands), *shape)
        values = source.read(list(bands), window=part, out_shape=size)
        masks = source.read_masks(list(bands), window=part, out_shape=size) > 0
    except RasterioError as error:
        raise ValueError(f"picture {path} is damaged: {error}; fetch it again") from error
    # zero as "no data" is the edge of the scene only where all bands are zero
    valid = masks.any(0) if source.nodata is not None else masks.all(0)
    return values, valid & np.isfinite(values).all(0)


def _has_palette(source: Any) -> bool:
    return source.count == 1 and source.colorinterp[0].name == "palette" and source.dtypes[0] == "uint8"


def _place(source: Any, path: StrPath) -> Georeference | None:
    if source.crs is None or source.transform.is_identity:
        return None
    return Georeference(source.crs.to_string(), tuple(source.transform)[:6])


# ------------------------------------------------------------------------------------------ polygons


def mask_polygons(mask: np.ndarray) -> list[Polygon]:
    """Polygons of a mask (H, W), exactly along pixel edges; pixels that touch only at a corner are apart.

    Rings are not closed and have no points inside straight runs; filling them even-odd gives the mask again.
    """
    from rasterio.features import shapes

    solid = np.ascontiguousarray(mask != 0, dtype=np.uint8)
    found = shapes(solid, mask=solid.astype(bool), connectivity=4)
    return [
        [[(float(x), float(y)) for x, y in ring[:-1]] for ring in shape["coordinates"]] for shape, _ in found
    ]


def ring_area(ring: Sequence[Sequence[float]]) -> float:
    """Signed area: positive where the ring turns anticlockwise with y upwards."""
    x, y = np.asarray(ring, np.float64).T[:2]
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def to_geometry(polygons: Sequence[Polygon], place: Georeference, crs: str = WGS84) -> dict[str, Any] | None:
    """GeoJSON geometry in `crs` of polygons in pixels; None without any.

    Outlines run anticlockwise and holes clockwise, rings are closed (RFC 7946); long edges get points
    between.
    """
    transformer = _transformer(place.crs, crs)
    parts = []
    for polygon in polygons:
        rings = []
        for number, ring in enumerate(polygon):
            points = _densify(np.asarray(ring, np.float64)) if transformer else np.asarray(ring, np.float64)
            x, y = _apply(place.transform, points)
            if transformer:
                x, y = transformer(x, y)
            closed = [[float(a), float(b)] for a, b in zip(x, y)]
            if (ring_area(closed) > 0) == (number > 0):
                closed.reverse()
            rings.append([*closed, closed[0]])
        parts.append(rings)
    if not parts:
        return None
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


def from_geometry(geometry: Any, crs: str, place: Georeference) -> list[Polygon]:
    """Polygons in pixels of `place` from a GeoJSON geometry (Polygon, MultiPolygon or a collection of them).

    Points within a millionth of a pixel of a pixel corner are put there.

    Raises:
        ValueError: another type, or points that are no pairs of numbers.
    """
    transformer = _transformer(crs, place.crs)
    a, b, c, d, e, f = place.transform
    scale = a * e - b * d
    polygons = []
    for part in _parts(geometry):
        rings = []
        for ring in part:
            points = _points(ring)
            x, y = points.T
            if transformer:
                x, y = transformer(x, y)
            x, y = np.asarray(x) - c, np.asarray(y) - f
            pixels = np.stack([(e * x - b * y) / scale, (a * y - d * x) / scale], axis=1)
            if not np.isfinite(pixels).all():
                raise ValueError(
                    f"points cannot be expressed in {place.crs}: is the coordinate system right?"
                )
            near = np.round(pixels)
            pixels = np.where(
                np.abs(pixels - near) < 1e-6 * max(1.0, np.abs(pixels).max() / 1e4), near, pixels
            )
            pixels = pixels[:-1] if len(pixels) > 1 and (pixels[0] == pixels[-1]).all() else pixels
            if len(pixels) < 3:
                raise ValueError(f"a ring has {len(pixels)} different points; three are needed")
            rings.append([(float(px), float(py)) for px, py in pixels])
        polygons.append(rings)
    return polygons


def _parts(geometry: Any) -> Iterator[list[Any]]:
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    coordinates = geometry.get("coordinates") if isinstance(geometry, dict) else None
    if kind == "Polygon" and isinstance(coordinates, list) and coordinates:
        yield coordinates
    elif (
        kind == "MultiPolygon"
        and isinstance(coordinates, list)
        and all(isinstance(c, list) for c in coordinates)
    ):
        yield from (part for part in coordinates if part)
    elif kind == "GeometryCollection" and isinstance(geometry.get("geometries"), list):
        for part in geometry["geometries"]:
            yield from _parts(part)
    else:
        raise ValueError(
            f"geometry {kind!r} is no area; Polygon, MultiPolygon and collections of them are read"
        )


def _points(ring: Any) -> np.ndarray:
    try:
        points = np.array([point[:2] for point in ring], np.float64).reshape(-1, 2)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"a ring must be a list of [x, y], found {repr(ring)[:60]}") from error
    if not len(points) or not np.isfinite(points).all():
        raise ValueError(f"a ring must be a list of finite [x, y], found {repr(ring)[:60]}")
    return points


def _densify(points: np.ndarray) -> np.ndarray:
    """Points (P, 2) of a ring with others between those more than `_LONGEST` pixels apart."""
    after = np.roll(points, -1, axis=0)
    pieces = np.maximum(1, np.ceil(np.abs(after - points).max(1) / _LONGEST)).astype(int)
    rows = [p + (q - p) * np.arange(n)[:, None] / n for p, q, n in zip(points, after, pieces)]
    return np.concatenate(rows)


def _apply(transform: Sequence[float], points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c, d, e, f = transform
    x, y = points.T
    return a * x + b * y + c, d * x + e * y + f


def _transformer(source: str, target: str) -> Any:
    """Function of coordinate arrays, or None where both systems are the same."""
    from rasterio.warp import transform

    one, two = parse_crs(source), parse_crs(target)
    if one == two:
        return None
    return lambda x, y: tuple(np.asarray(v) for v in transform(one, two, list(x), list(y)))


def parse_crs(text: str) -> Any:
    """rasterio CRS of `EPSG:32618`, an OGC URN or WKT. ValueError names the text."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        return CRS.from_user_input(text)
    except CRSError as error:
        raise ValueError(
            f"coordinate system {text[:80]!r} is unknown ({error}); write it as EPSG:32618"
        ) from error


# ---------------------------------------------------------------------------------------------- files


def read_geojson(path: StrPath) -> tuple[list[dict[str, Any]], str]:
    """Features of a GeoJSON file, and its coordinate system (WGS84 unless an old `crs` member says
    otherwise)."""
    body = read_json(path, dict)
    features = body.get("features") if body.get("type") == "FeatureCollection" else [body]
    if not isinstance(features, list):
        raise ValueError(f"{path}: features: expected a list, found {repr(features)[:60]}")
    crs = body.get("crs")
    if crs is None:
        return features, WGS84
    try:
        name = crs["properties"]["name"]
        parse_crs(name)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: crs: expected a named system, found {repr(crs)[:80]}") from error
    except ValueError as error:
        raise ValueError(f"{path}: crs: {error}") from error
    return features, name


def write_geojson(path: StrPath, features: Sequence[dict[str, Any]], crs: str = WGS84) -> Path:
    """Write features as a collection; a system other than WGS84 is named in the old `crs` member."""
    body: dict[str, Any] = {"type": "FeatureCollection"}
    if parse_crs(crs) != parse_crs(WGS84):
        body["crs"] = {"type": "name", "properties": {"name": crs}}
    return atomic_write_json(path, body | {"features": list(features)}, indent=None)


def write_raster(path: StrPath, pixels: np.ndarray, place: Georeference | None) -> Path:
    """Write uint8 (H, W) or (H, W, 3) as a deflated GeoTIFF. Returns the path."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.io import MemoryFile

    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"a raster must be uint8 (H, W) or (H, W, 3), found {pixels.dtype} {pixels.shape}")
    bands = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    settings = {"driver": "GTiff", "dtype": "uint8", "compress": "deflate", "count": len(bands)}
    settings |= {"height": pixels.shape[0], "width": pixels.shape[1]}
    if pixels.ndim == 3:
        settings["photometric"] = "RGB"
    if place is not None:
        settings |= {"crs": parse_crs(place.crs), "transform": rasterio.Affine(*place.transform)}
    with MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(**settings) as target:
            target.write(bands)
        return atomic_write_bytes(path, bytes(memory.getbuffer()))
