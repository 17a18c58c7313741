"""The HTML report: complete in itself, everything in it, odd inputs, and the charts' numbers."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from utils import html_charts
from utils.eval_report import build_report
from utils.html_report import choose_queries, write_html
from utils.predictions import Predictions, query_record
from utils.query_table import query_rows

VOID = {"meta", "link", "br", "img", "!doctype"}


def predictions(images: int = 9, absent: bool = True) -> Predictions:
    """Squares that are found better in later pictures; the second query is about something absent."""
    rows = []
    for k in range(images):
        target, nothing = np.zeros((40, 60), np.uint8), np.zeros((40, 60), np.uint8)
        target[5:25, 5 : 15 + k] = 1
        found = target.copy()
        found[: 25 - 2 * k] = 0
        queries = [
            query_record(
                found, target, query=f"<b>ship</b> & {k}", kind="a<b", gt_exists=True, pred_exists=found.any()
            )
        ]
        if absent:
            said = nothing.copy()
            said[0, : k % 3] = 1
            queries.append(
                query_record(
                    said, nothing, query="ghost", kind="nothing", gt_exists=False, pred_exists=said.any()
                )
            )
        rows.append({"index": k, "image": f"p/{k}.png", "size": [40, 60], "queries": queries})
    return Predictions({"dataset": "Ships <1>", "n_images": images, "raster": "official"}, rows)


def picture(path: str) -> np.ndarray:
    if path.endswith("8.png"):
        raise ValueError("broken")
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def page(tmp_path: Path, found: Predictions, number: int = 3, **changes: object) -> str:
    report = build_report(found) | changes
    return write_html(tmp_path / "r.html", report, found, picture, number).read_text(encoding="utf-8")


class Tags(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text = page(tmp_path, predictions(), mismatches=["extra: http://example.org/x.png: not there"])
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    for tag, attributes in tags.found:
        assert tag != "script" and not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "data", "action", "xlink:href"):
            assert name not in attributes or attributes[name].startswith("data:"), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", text, flags=re.S)[1]
    assert "@import" not in text and "url(" not in style and "http" not in style
    assert "default-src 'none'" in text


def test_what_is_in_it(tmp_path: Path) -> None:
    found = predictions()
    report = build_report(found)
    text = page(tmp_path, found, mismatches=["missing: a"])
    tags = Tags()
    tags.feed(text)
    assert "<h1>Ships &lt;1&gt;</h1>" in text and "<b>ship" not in text and "&lt;b&gt;ship" in text
    for key in ("giou", "ciou", "boundary_iou", "see_accuracy"):
        low, high = report["confidence"][key]
        assert f"{report['scores'][key]:.3f}" in text and f"{low:.3f} to {high:.3f}" in text
    assert f"{report['bootstrap']['giou_mean']:.3f} ± {report['bootstrap']['giou_std']:.3f}" in text
    for words in (
        "denial rate",
        "false-alarm area",
        "By kind",
        "By target size",
        "our rule",
        "Best",
        "Worst",
    ):
        assert words in text
    assert "1 mismatches" in text and "picture not shown" in text and "not there" in text
    images = [attributes for tag, attributes in tags.found if tag == "img"]
    assert len(images) == 9 and all(image["alt"] for image in images)
    assert [tag for tag, _ in tags.found].count("h1") == 1
    assert ("html", {"lang": "en"}) in tags.found and "prefers-color-scheme:dark" in text
    assert all("aria-label" in attributes for tag, attributes in tags.found if tag == "svg")
    assert "Gallery" not in page(tmp_path, found, number=0)


@pytest.mark.parametrize("images, absent", [(1, False), (1, True), (2, False)])
def test_few_queries(tmp_path: Path, images: int, absent: bool) -> None:
    assert "gIoU" in page(tmp_path, predictions(images, absent))
    nothing = predictions(images, True)
    for image in nothing.images:
        del image["queries"][0]
    assert "without 1 queries" in page(tmp_path, nothing) or images > 1


def test_large_galleries_stay_small(tmp_path: Path) -> None:
    few, many = (len(page(tmp_path, predictions(60), number=n)) for n in (12, 50))
    assert many < 4e6 and few < 4e6


def test_chosen_queries() -> None:
    found = predictions()
    rows = query_rows(found)
    rows[16]["mismatch"] = "missing"  # the best one
    chosen = choose_queries(rows, 4, seed=1)
    assert [rows[k]["image"] for k in chosen["Best"]] == ["p/7.png", "p/6.png", "p/5.png", "p/4.png"]
    assert [rows[k]["iou"] for k in chosen["Worst"]] == sorted(rows[k]["iou"] for k in chosen["Worst"])
    assert len(chosen["Random"]) == 4 and chosen == choose_queries(rows, 4, seed=1)


def test_histogram() -> None:
    svg, rows = html_charts.histogram([0, 0.01, 0.5, 1, 1.0])
    ElementTree.fromstring(svg)
    assert [int(count) for _, count in rows] == [2, *[0] * 9, 1, *[0] * 8, 2]
    assert svg.count("<rect") == 3 and "mean 0.502" in svg
    ElementTree.fromstring(html_charts.histogram([])[0])


@pytest.mark.parametrize(
    "most, ticks", [(0, [0, 1]), (4, [0, 1, 2, 3, 4]), (7, [0, 2, 4, 6, 8]), (676, [0, 200, 400, 600, 800])]
)
def test_ticks(most: int, ticks: list[int]) -> None:
    assert html_charts._counts_ticks(most) == ticks


def test_against_size() -> None:
    areas, ious = [1, 100, 120, 5000], [0.0, 0.2, 0.4, 1.0]
    svg, rows = html_charts.against_size(areas, ious, 728)
    ElementTree.fromstring(svg)
    assert rows == [
        ("1 to 1 px", "1", "0.000"),
        ("64 to 127 px", "2", "0.300"),
        ("4096 to 8191 px", "1", "1.000"),
    ]
    assert "728 px" in svg and "728 px" not in html_charts.against_size(areas, ious, None)[0]
    for few in ([], [5], [0.5]):
        ElementTree.fromstring(html_charts.against_size(few, few, 728)[0])
    many = np.random.default_rng(0).integers(1, 9999, 6000)
    svg, rows = html_charts.against_size(many, many / 9999, 728)
    assert svg.count("h0") == 4000 and sum(int(count) for _, count, _ in rows) == 6000
