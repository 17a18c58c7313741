"""The HTML report of an evaluation: one file that needs nothing else, neither scripts nor the network.

Scores with intervals, IoU histogram, IoU against target size, tables per kind and size, what did not fit, and
a gallery of the best, the worst and random queries. It follows the reader's light or dark setting, and every
chart has its numbers in a table below it.
"""

import base64
import logging
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils import html_charts
from utils.eval_report import title
from utils.io import StrPath, atomic_write_text
from utils.metrics import LARGE_AREA
from utils.predictions import Predictions, decode_mask, target_mask
from utils.query_table import Row, query_rows
from utils.visualize import fit, overlay, score_columns

logger = logging.getLogger(__name__)

TRUTH, FOUND = (0, 114, 178), (230, 159, 0)  # told apart with any kind of colour vision
_MANY_TILES = 36
_MOST_BYTES = 2_500_000  # of all pictures together
_QUALITIES = (80, 65, 50, 35, 20)
_GREY = 128
_LISTED = 200

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b2127;--soft:#525d68;--line:#d4dae0;--card:#f4f6f8;
--bar:#2f6fb7;--mark:#b04a00;--bad:#a4262c;--truth:#0072b2;--found:#e69f00}
@media(prefers-color-scheme:dark){:root{--paper:#14181c;--ink:#e9edf0;--soft:#a9b3bd;--line:#3a444e;
--card:#1d242b;--bar:#6ba7e8;--mark:#ffab66;--bad:#ff9a9a;--truth:#4db2ea;--found:#ffbf3f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1.5rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .25rem}
h2{font-size:1.25rem;margin:2.5rem 0 .75rem;padding-top:.5rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.5rem 0 .5rem}
p{margin:.25rem 0 .75rem}.soft,figcaption,summary{color:var(--soft)}
.bad{color:var(--bad);font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;margin:1.25rem 0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem 1rem}
.cards dt{color:var(--soft)}.cards dd{margin:0;font-variant-numeric:tabular-nums}
.cards .big{font-size:1.75rem;font-weight:650;line-height:1.2}.cards .small{font-size:.9rem;color:var(--soft)}
.scroll{overflow-x:auto;position:relative}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.95rem}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}thead th{border-bottom:2px solid var(--line)}
.words td,.words th{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1.5rem}
figure{margin:0}svg{width:100%;height:auto;display:block}
svg text{fill:var(--ink);font-size:13px}svg .marked{fill:var(--mark);
paint-order:stroke;stroke:var(--paper);stroke-width:5px}
.grid{stroke:var(--line)}.bar{fill:var(--bar)}.mark{stroke:var(--mark);stroke-width:1.5;stroke-dasharray:5 4}
.dots{stroke:var(--bar);stroke-width:5;stroke-linecap:round;stroke-opacity:.5;fill:none}
.line{stroke:var(--mark);stroke-width:2;fill:none}.point{fill:var(--mark)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,30rem),1fr));gap:1.25rem;
margin:0;padding:0}
.tiles li{list-style:none;background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:.6rem}
.tiles img{width:100%;height:auto;display:block;border-radius:.25rem}
.tiles figcaption{margin-top:.4rem;font-size:.93rem;overflow-wrap:anywhere}
.tiles strong{color:var(--ink)}.key span{display:inline-block;width:.8rem;height:.8rem;border-radius:.15rem;
vertical-align:-.08rem;margin:0 .25rem 0 .75rem}
summary{cursor:pointer;margin:.5rem 0}:focus-visible{outline:3px solid var(--bar);outline-offset:2px}
@media print{body{max-width:none}.tiles li{break-inside:avoid}}
"""


def write_html(
    path: StrPath,
    report: Mapping[str, Any],
    predictions: Predictions,
    load_image: Callable[[str], np.ndarray],
    number: int = 6,
    seed: int = 0,
) -> Path:
    """Write the report. Returns the path.

    Args:
        report: of `utils.eval_report.build_report`; "mismatches" (texts) are listed if it holds any.
        predictions: what it was made from.
        load_image: RGB picture (H, W, 3) of an image path; one that cannot be read is shown as grey.
        number: so many best, worst and random queries are shown. seed: of the random ones.
    """
    rows = query_rows(predictions)
    name = escape(str(report["header"].get("dataset", "predictions")))
    body = [
        _opening(name, report),
        _cards(report),
        _section("Scores", _score_table(report)),
        _section("Distribution", _charts(rows, seed, report["header"].get("large_area", LARGE_AREA))),
        _tables(report),
        _mismatches(report.get("mismatches") or []),
        _gallery(rows, predictions, load_image, number, seed),
        _section("How this was measured", _protocol(report["header"])),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<link rel="icon" href="data:,"><title>{name}: evaluation</title><style>{_STYLE}</style></head>\n'
        f"<body><main>\n{''.join(filter(None, body))}</main></body></html>\n"
    )
    return atomic_write_text(path, page)


# ---------------------------------------------------------------------------------------------- parts


def _opening(name: str, report: Mapping[str, Any]) -> str:
    scores = report["scores"]
    lines = [f"<h1>{name}</h1>"]
    lines.append(f'<p class="soft">{scores["n_masks"]} queries about {scores["n_images"]} pictures</p>')
    if not report["complete"]:
        lines.append('<p class="bad">Not complete: pictures are still missing.</p>')
    if report.get("mismatches"):
        count = len(report["mismatches"])
        lines.append(f'<p class="bad">{count} mismatches between predictions and data set (below).</p>')
    return f"<header>{''.join(lines)}</header>\n"


def _cards(report: Mapping[str, Any]) -> str:
    cards = []
    for key in ("giou", "ciou", "boundary_iou", "see_accuracy"):
        if key in report["scores"]:
            cards.append(
                f'<div><dt>{title(key)}</dt><dd class="big">{report["scores"][key]:.3f}</dd>'
                f'<dd class="small">{_interval(report, key)}</dd></div>'
            )
    return f'<dl class="cards">{"".join(cards)}</dl>\n'


def _interval(report: Mapping[str, Any], key: str) -> str:
    found = report["confidence"].get(key)
    return f"{found[0]:.3f} to {found[1]:.3f}" if found else ""


def _score_table(report: Mapping[str, Any]) -> str:
    level, boot = round(100 * report["confidence_level"]), report.get("bootstrap") or {}
    first = {
        key: report["scores"][key] for key in ("giou", "ciou", "boundary_iou") if key in report["scores"]
    }
    values = first | dict(report["scores"]) | dict(report.get("presence") or {})
    rows = []
    for key, value in values.items():
        if key.startswith("n_"):
            continue
        mean, spread = boot.get(f"{key}_mean"), boot.get(f"{key}_std")
        published = "" if mean is None else f"{mean:.3f} ± {spread:.3f}"
        rows.append((title(key), f"{value:.3f}", _interval(report, key), published))
    heads = ["score", "value", f"{level} % interval"]
    note = f"Intervals: whole pictures drawn again, {level} % of the draws lie inside."
    if boot:
        heads.append("bootstrap")
        note += (
            f" Bootstrap: mean ± deviation of {boot['rounds']} rounds of {boot['fraction']:.0%} of the "
            f"pictures, seed {boot['seed']}."
        )
    found = report.get("presence") or {}
    if found.get("n_absent"):
        note += (
            f" {found['n_absent']} queries ask for something that is not there: the denial rate is the share "
            "that is denied, the false-alarm area the mean share of the picture that is marked nevertheless."
        )
    return _table(heads, [row[: len(heads)] for row in rows], "Scores") + f'<p class="soft">{note}</p>'


def _charts(rows: Sequence[Row], seed: int, large_area: int | None) -> str:
    there = [row for row in rows if row["target"] > 0]
    ious = [row["iou"] for row in there]
    bars, bins = html_charts.histogram(ious)
    dots, sizes = html_charts.against_size([row["target"] for row in there], ious, large_area, seed)
    empty = len(rows) - len(there)
    more = f", without {empty} queries whose target is empty" if empty else ""
    return (
        '<div class="charts">'
        + _figure(bars, f"IoU of the queries{more}", _table(("IoU", "queries"), bins, "IoU histogram"))
        + _figure(
            dots,
            "IoU against target size: a dot per query, the line is the mean per doubling of the size",
            _table(("target size", "queries", "mean IoU"), sizes, "Mean IoU per target size"),
        )
        + "</div>"
    )


def _figure(svg: str, caption: str, table: str) -> str:
    details = f"<details><summary>The numbers of this chart</summary>{table}</details>"
    return f"<div><figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>{details}</div>"


def _tables(report: Mapping[str, Any]) -> str:
    parts = []
    for key, name in (("by_kind", "kind"), ("by_size", "target size")):
        found = report.get(key) or {}
        if set(found) - {""}:
            note = f'<p class="soft">{escape(report["size_rule"])}.</p>' if key == "by_size" else ""
            parts.append(_section(f"By {name}", _scores(found, name) + note))
    if report.get("shuffled"):
        note = '<p class="soft">Every query scored with the prediction for another query of its picture.</p>'
        table = _scores({"right words": report["scores"], "other words": report["shuffled"]}, "words")
        parts.append(_section("Do the words decide?", table + note))
    return "".join(parts)


def _scores(found: Mapping[str, Mapping[str, float]], first: str) -> str:
    columns = score_columns(found)
    rows = []
    for label, row in found.items():
        cells = [
            "" if key not in row else str(row[key]) if key.startswith("n_") else f"{row[key]:.3f}"
            for key, _ in columns
        ]
        rows.append((label or "-", *cells))
    return _table((first, *(name for _, name in columns)), rows, f"Scores by {first}")


def _mismatches(found: Sequence[str]) -> str:
    if not found:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in found[:_LISTED])
    more = f"<p>... and {len(found) - _LISTED} more</p>" if len(found) > _LISTED else ""
    text = "<p>Queries without a usable prediction count as empty masks.</p>"
    listed = f"<details><summary>All of them</summary><ul>{items}</ul>{more}</details>"
    return _section(f"{len(found)} mismatches between predictions and data set", text + listed)


def _protocol(header: Mapping[str, Any]) -> str:
    rows = [(str(key), str(value)) for key, value in header.items() if value not in (None, "")]
    return _table(("setting", "value"), rows, "Settings that decide the numbers", "words")


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll {kind}" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
        "</table></div>"
    )


# ---------------------------------------------------------------------------------------------- gallery


def choose_queries(rows: Sequence[Row], number: int, seed: int) -> dict[str, list[int]]:
    """Numbers of the rows to show: "Best" and "Worst" (one per picture; without empty targets and queries
    that have no usable prediction), "Random"."""
    there = [k for k, row in enumerate(rows) if row["target"] > 0 and not row["mismatch"]]
    worst = sorted(there, key=lambda k: (rows[k]["iou"], -rows[k]["target"]))
    best = sorted(there, key=lambda k: (-rows[k]["iou"], -rows[k]["target"]))
    drawn = np.random.default_rng(seed).permutation(len(rows))[:number].tolist()
    return {"Best": _one_per_picture(best, rows, number), "Worst": _one_per_picture(worst, rows, number)} | {
        "Random": sorted(drawn)
    }


def _one_per_picture(order: Sequence[int], rows: Sequence[Row], number: int) -> list[int]:
    chosen: dict[Any, int] = {}
    for k in order:
        chosen.setdefault(rows[k]["picture"], k)
    return list(chosen.values())[:number]


def _gallery(
    rows: Sequence[Row],
    predictions: Predictions,
    load_image: Callable[[str], np.ndarray],
    number: int,
    seed: int,
) -> str:
    if number < 1 or not rows:
        return ""
    pairs = [(image, record) for image in predictions.images for record in image["queries"]]
    chosen = choose_queries(rows, number, seed)
    tiles_wanted = sum(map(len, chosen.values()))
    side, most = 176 if tiles_wanted > _MANY_TILES else 288, _MOST_BYTES // tiles_wanted
    parts = [
        '<p class="soft key">Picture, ground truth, prediction.'
        '<span style="background:var(--truth)"></span>ground truth'
        '<span style="background:var(--found)"></span>prediction</p>'
    ]
    for heading, numbers in chosen.items():
        tiles = [_tile(rows[k], *pairs[k], load_image, side, most) for k in numbers]
        if tiles:
            parts.append(f'<h3>{heading}</h3><ul class="tiles">{"".join(tiles)}</ul>')
    return _section("Gallery", "".join(parts))


def _tile(
    row: Row,
    image: Mapping[str, Any],
    record: Mapping[str, Any],
    load_image: Callable[[str], np.ndarray],
    side: int,
    most: int,
) -> str:
    prediction, target = decode_mask(record["prediction"]), target_mask(record)
    note = ""
    try:
        picture = load_image(image["image"])
        if picture.shape[:2] != target.shape:
            raise ValueError(f"picture of {picture.shape[:2]} pixels, mask of {target.shape}")
    except (ValueError, OSError) as error:
        logger.warning("not shown in the report: %s", error)
        picture, note = np.full((*target.shape, 3), _GREY, np.uint8), " · picture not shown: cannot be read"
    shown = fit(picture, side // 2, side)
    panels = [shown]
    for mask, colour in ((target == 1, TRUTH), (prediction, FOUND)):
        panels.append(overlay(shown, fit(mask.astype(np.uint8), side // 2, side), colour, 0.4, 2))
    gap = np.full((shown.shape[0], 4, 3), _GREY, np.uint8)
    strip = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1)
    facts = [f"IoU {row['iou']:.3f}", f"target {row['target']} px", f"predicted {row['predicted']} px"]
    facts += [f"kind {row['kind']}"] if row["kind"] else []
    facts += [] if row["gt_exists"] else ["not there"]
    facts += [] if row["pred_exists"] else ["denied"]
    facts += [row["mismatch"]] if row["mismatch"] else []
    alt = f"Picture, ground truth and prediction for: {row['query']}; IoU {row['iou']:.2f}"
    said = f"<br>Answer: {escape(row['generated'])}" if row["generated"] else ""
    return (
        f'<li><figure><img src="{_data(strip, most)}" width="{strip.shape[1]}" height="{strip.shape[0]}" '
        f'alt="{escape(alt)}"><figcaption><strong>{escape(row["query"])}</strong><br>'
        f"{escape(' · '.join(facts))}{escape(note)}{said}<br>{escape(Path(row['image']).name)}"
        "</figcaption></figure></li>"
    )


def _data(image: np.ndarray, most: int) -> str:
    """Picture (RGB) as the text of a JPEG data address, of about `most` bytes at the most."""
    bgr = np.ascontiguousarray(image[..., ::-1])
    for quality in _QUALITIES:
        _, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
        if len(data) <= most:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
