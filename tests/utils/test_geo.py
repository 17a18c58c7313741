"""GeoTIFF reading, scaling rules, polygons along pixel edges, reprojection there and back, files."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from dataset.masks import fill_rings
from tests.conftest import golden_root
from utils.geo import (
    Georeference,
    Scaling,
    describe,
    fixed_scaling,
    from_geometry,
    mask_polygons,
    parse_scaling,
    raster_info,
    read_geojson,
    read_geotiff,
    ring_area,
    to_geometry,
    write_geojson,
    write_raster,
)

UTM = Georeference("EPSG:32618", (300.0379, 0.0, 101985.0, 0.0, -300.0417, 2826915.0))
TURNED = Georeference("EPSG:3857", (2.0, 0.5, 1e6, 0.4, -1.5, 5e6))


def write(path: Path, values: np.ndarray, **settings: object) -> Path:
    """A GeoTIFF of values (n, H, W)."""
    count, height, width = values.shape
    colours = settings.pop("colours", None)
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": values.dtype}
    profile |= {"crs": "EPSG:32618", "transform": from_origin(500000, 4e6, 10, 10)} | settings
    with rasterio.open(path, "w", **profile) as target:
        target.write(values)
        if colours:
            target.colorinterp = colours
    return path


@pytest.fixture
def sixteen_bit(tmp_path: Path) -> tuple[Path, np.ndarray]:
    values = np.random.default_rng(0).integers(0, 4000, (5, 60, 80)).astype(np.uint16)
    values[:, :6] = 0
    values[0, 30, 30] = 60000
    return write(tmp_path / "s2.tif", values, nodata=0), values


# --------------------------------------------------------------------------------------------- reading


def test_real_landsat_scene_is_read_as_it_is() -> None:
    path = golden_root().parent / "data" / "geo" / "RGB.byte.tif"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    image = read_geotiff(path)
    with rasterio.open(path) as source:
        values = source.read()
        assert tuple(source.transform)[:6] == image.place.transform and source.crs.to_epsg() == 32618
    assert image.rgb.shape == (718, 791, 3) and image.rules == "bands 1, 2, 3 of 3, uint8, none"
    assert (image.rgb == values.transpose(1, 2, 0)).all()
    assert (image.valid == (values != 0).any(0)).all() and 0.3 < image.valid.mean() < 0.9
    part = read_geotiff(path, window=(100, 50, 300, 250))
    assert (part.rgb == image.rgb[50:250, 100:300]).all()
    assert part.place == image.place.shifted(100, 50)
    with pytest.raises(ValueError, match=r"corrupt\.tif"):
        read_geotiff(path.with_name("corrupt.tif"))


def test_scaling_rules(sixteen_bit: tuple[Path, np.ndarray]) -> None:
    path, values = sixteen_bit
    valid = (values[:3] != 0).any(0)
    for text in ("range:0,3000", "dtype", "percentile:2,98", "auto"):
        image = read_geotiff(path, (3, 2, 1), text)
        assert (image.valid == valid).all() and (image.rgb[~valid] == 0).all()
        for place, band in enumerate((2, 1, 0)):
            low, high = {"range:0,3000": (0, 3000), "dtype": (0, 65535)}.get(
                text, np.percentile(values[band][valid], (2, 98))
            )
            wanted = np.clip((values[band].astype(float) - low) / (high - low), 0, 1) * 255
            assert np.abs(image.rgb[..., place][valid] - wanted[valid]).max() <= 0.5 + 1e-6
    grey = read_geotiff(path, (4,))
    assert (
        grey.rgb[..., 0] == grey.rgb[..., 2]
    ).all() and "bands 4 of 5, uint16, percentile:2,98" == grey.rules
    # parts of a picture look like the whole
    fixed = fixed_scaling(path, (3, 2, 1), "auto")
    whole = read_geotiff(path, (3, 2, 1), fixed)
    assert (read_geotiff(path, (3, 2, 1), fixed, (10, 5, 50, 45)).rgb == whole.rgb[5:45, 10:50]).all()
    assert (whole.rgb == read_geotiff(path, (3, 2, 1), "auto").rgb).all()
    assert (cv2.imread(str(path)) is None) or cv2.imread(str(path)).shape  # whatever OpenCV makes of it


def test_bands_by_tag_palette_alpha_and_float(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(1, 255, (4, 9, 7)).astype(np.uint8)
    kinds = [ColorInterp.undefined, ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    tagged = write(tmp_path / "t.tif", values, colours=kinds)
    assert (read_geotiff(tagged).rgb == values[[3, 2, 1]].transpose(1, 2, 0)).all()
    alpha = values.copy()
    alpha[3, :4], alpha[3, 4:] = 0, 255
    kinds = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    image = read_geotiff(write(tmp_path / "a.tif", alpha, colours=kinds))
    assert not image.valid[:4].any() and image.valid[4:].all() and not image.rgb[:4].any()
    floats = rng.random((3, 9, 7)).astype(np.float32)
    floats[1, 2, 3] = np.nan
    image = read_geotiff(write(tmp_path / "f.tif", floats), scaling="range:0,1")
    assert not image.valid[2, 3] and image.valid.sum() == 62
    assert np.abs(image.rgb[5, 5] - floats[:, 5, 5] * 255).max() <= 0.5
    with rasterio.open(
        tmp_path / "p.tif", "w", driver="GTiff", count=1, height=2, width=2, dtype="uint8"
    ) as target:
        target.write(np.array([[[0, 1], [2, 1]]], np.uint8))
        target.write_colormap(1, {0: (9, 8, 7, 255), 1: (1, 2, 3, 255), 2: (4, 5, 6, 255)})
    image = read_geotiff(tmp_path / "p.tif")
    assert image.rgb.tolist() == [[[9, 8, 7], [1, 2, 3]], [[4, 5, 6], [1, 2, 3]]] and image.place is None


def test_refusals(sixteen_bit: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, _ = sixteen_bit
    for text in ("best", "range", "range:5,5", "percentile:-1,98", "percentile:2,x", "range:nan,3", "none:1"):
        with pytest.raises(ValueError, match="range:LO,HI"):
            parse_scaling(text)
    for text in ("auto", "none", "dtype", "range:0,3000", "percentile:0.5,99"):
        assert describe(parse_scaling(text)) == text
    with pytest.raises(ValueError, match="uint16.*8-bit values only"):
        read_geotiff(path, scaling="none")
    with pytest.raises(ValueError, match="no range"):
        read_geotiff(write(tmp_path / "f.tif", np.ones((1, 3, 3), np.float32)), scaling=Scaling("dtype"))
    with pytest.raises(ValueError, match=r"bands 1\.\.5"):
        read_geotiff(path, (1, 2, 6))
    with pytest.raises(ValueError, match="asked for"):
        read_geotiff(path, window=(0, 0, 81, 10))
    with pytest.raises(FileNotFoundError):
        read_geotiff(tmp_path / "none.tif")
    (tmp_path / "text.tif").write_text("no picture")
    with pytest.raises(ValueError, match="GDAL"):
        raster_info(tmp_path / "text.tif")
    for values in (
        None,
        {"crs": "EPSG:4326", "transform": [1, 2]},
        {"crs": "EPSG:4326", "transform": [0] * 6},
    ):
        with pytest.raises(ValueError, match=r"transform"):
            Georeference.from_dict(values)


# --------------------------------------------------------------------------------------------- polygons


def patchy(seed: int, shape: tuple[int, int] = (70, 90)) -> np.ndarray:
    """A mask with many parts and holes, touching corners and borders."""
    noise = np.random.default_rng(seed).random(shape).astype(np.float32)
    return cv2.GaussianBlur(noise, (0, 0), 1.2) > 0.5


def fill(polygons: list, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for polygon in polygons:
        mask |= fill_rings([np.array(ring) for ring in polygon], *shape)
    return mask


def test_polygons_are_the_mask() -> None:
    for seed in range(3):
        mask = patchy(seed)
        polygons = mask_polygons(mask)
        assert (fill(polygons, mask.shape) == mask).all()
        assert max(map(len, polygons)) > 1 and len(polygons) > 3  # holes and parts
        assert all(float(v).is_integer() for polygon in polygons for ring in polygon for p in ring for v in p)
    assert mask_polygons(np.zeros((4, 5))) == []
    assert len(mask_polygons(np.eye(3))) == 3


@pytest.mark.parametrize("place", [UTM, TURNED])
@pytest.mark.parametrize("crs", ["OGC:CRS84", "EPSG:32618", "EPSG:3035"])
def test_geometries_there_and_back(place: Georeference, crs: str) -> None:
    if (place, crs) == (TURNED, "EPSG:3035"):
        crs = "EPSG:3857"
    mask = patchy(5)
    geometry = to_geometry(mask_polygons(mask), place, crs)
    assert geometry["type"] == "MultiPolygon"
    assert all(ring[0] == ring[-1] for part in geometry["coordinates"] for ring in part)
    assert (fill(from_geometry(geometry, crs, place), mask.shape) == mask).all()
    for outline, *holes in geometry["coordinates"]:
        assert ring_area(outline) > 0 and all(ring_area(hole) < 0 for hole in holes)
    if crs == "OGC:CRS84":
        x, y = np.array(geometry["coordinates"][0][0]).T
        assert -180 <= x.min() and x.max() <= 180 and -90 <= y.min() and y.max() <= 90


def test_long_edges_bend_with_the_system() -> None:
    """The middle of a long straight edge stays on the line in the picture's own system."""
    polygons = [[[(0.0, 0.0), (640.0, 0.0), (640.0, 600.0), (0.0, 600.0)]]]
    geometry = to_geometry(polygons, UTM)
    assert len(geometry["coordinates"][0]) > 30
    back = np.array(from_geometry(geometry, "OGC:CRS84", UTM)[0][0])
    on_border = np.isclose(back, 0, atol=1e-5).any(1) | np.isclose(back, [640, 600], atol=1e-5).any(1)
    assert on_border.all()
    assert len(to_geometry(polygons, UTM, "EPSG:32618")["coordinates"][0]) == 5


def test_what_is_no_area_is_refused() -> None:
    ring = [[0, 0], [1, 0], [1, 1], [0, 0]]
    good = {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [ring]}]}
    assert len(from_geometry(good, "EPSG:32618", UTM)) == 1
    bad = [None, [], {"type": "Point", "coordinates": [0, 0]}, {"type": "Polygon", "coordinates": [[[0, 0]]]}]
    bad += [
        {"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [2, 0]]]},
        {"type": "Polygon", "coordinates": 3},
    ]
    bad += [
        {"type": "Polygon", "coordinates": [[[0, 0], [float("inf"), 1], [2, 0]]]},
        {"type": "MultiPolygon"},
    ]
    for geometry in bad:
        with pytest.raises(ValueError):
            from_geometry(geometry, "EPSG:32618", UTM)
    with pytest.raises(ValueError, match="EPSG:32618"):
        from_geometry(good, "EPSG:99999999", UTM)


def test_files(tmp_path: Path) -> None:
    mask = patchy(7)
    write_raster(tmp_path / "m.tif", mask.astype(np.uint8), UTM)
    height, width, place = raster_info(tmp_path / "m.tif")
    assert (height, width) == mask.shape and place == UTM
    with rasterio.open(tmp_path / "m.tif") as source:
        assert (source.read(1) == mask).all()
    features = [
        {"type": "Feature", "properties": {"a": 1}, "geometry": to_geometry(mask_polygons(mask), UTM)}
    ]
    write_geojson(tmp_path / "a.geojson", features)
    write_geojson(tmp_path / "b.geojson", features, "EPSG:32618")
    assert '"crs"' not in (tmp_path / "a.geojson").read_text()
    assert read_geojson(tmp_path / "a.geojson") == (features, "OGC:CRS84")
    assert read_geojson(tmp_path / "b.geojson") == (features, "EPSG:32618")
    (tmp_path / "c.geojson").write_text(
        '{"type": "FeatureCollection", "features": [], "crs": {"type": "name", "properties": {"name": '
        '"urn:ogc:def:crs:EPSG::32618"}}}'
    )
    assert read_geojson(tmp_path / "c.geojson")[1].endswith("32618")
    for text, message in (('{"type": "FeatureCollection"}', "features"), ("[]", "list")):
        (tmp_path / "d.geojson").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_geojson(tmp_path / "d.geojson")
    with pytest.raises(ValueError, match="uint8"):
        write_raster(tmp_path / "x.tif", mask, None)
