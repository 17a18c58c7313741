"""Predictions on disk: one documented format from which every score can be recomputed without the model.

While a run goes on, every rank appends to its own file `preds_<dataset>_<rank>_of_<world>.jsonl`: a header
line, then one line per picture, flushed to the disk. A run that was killed continues behind its last whole
line, with any number of ranks. When all pictures are there, `merge_ranks` writes one file,
`predictions_<dataset>.json`:

    {"format": "lisat-predictions", "version": 1,
     "header": {"dataset", "n_images", "checkpoint", "eval_prompt": "forced" | "answer" | "open", "conv_type",
                "raster": "official" | "exact", ...},          # whatever decides the numbers
     "images": [{"index": 0, "image": "path", "size": [H, W], "queries": [QUERY, ...]}, ...]}

    QUERY = {"query": the words asked for, "text": the whole user turn, "kind": label for tables,
             "ref_id", "sent_id", "gt_exists", "pred_exists", "score": 0..1 or null, "generated": answer,
             "prediction": RLE, "target": RLE of value 1, "ignore": RLE of value 255 (only if there is any),
             "more_masks": [RLE, ...] (only where the answer held more than one mask),
             "counts": {"intersection": [bg, object], "union": [bg, object], "target": [bg, object]}}

Files of other programs, to be scored by `evaluate.py`, need less: "format", "version", a header with
"dataset", of a picture "image" and "queries", of a query "prediction" and (where a picture has several
queries) its words "query" or its numbers "ref_id" and "sent_id"; "pred_exists" (default: the mask holds a
pixel) and "score" are used where they are given. Targets and counts are then taken from the data set.

RLE is COCO's compressed run-length code {"size": [H, W], "counts": text}; pycocotools decodes it.
`read_predictions` also reads the published form (a JSON file per rank and a folder of .npz arrays).
"""

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from utils.io import StrPath, atomic_write_json, parse_json, read_json
from utils.metrics import IGNORE_VALUE, Counts, mask_counts
from utils.prediction_check import check_header, check_images
from utils.rle import decode_mask, encode_mask, pixel_counts

FORMAT, VERSION = "lisat-predictions", 1
PUBLISHED = "published form"
_RANK_FILE = re.compile(r"preds_(?P<dataset>.+)_(?P<rank>\d+)_of_(?P<world>\d+)\.(?P<form>jsonl?)")

logger = logging.getLogger(__name__)


def target_of(conversation: Any, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W) target of a `Conversation`: union of its masks, 255 where they say so and none is 1."""
    target = np.zeros(size, dtype=np.uint8)
    for mask in conversation.masks:
        if mask.shape != tuple(size):
            raise ValueError(f"a target of {mask.shape} pixels for a picture of {tuple(size)}")
        target[(mask == IGNORE_VALUE) & (target == 0)] = IGNORE_VALUE
        target[mask == 1] = 1
    return target


def query_record(
    prediction: np.ndarray,
    target: np.ndarray,
    *,
    query: str,
    gt_exists: bool,
    pred_exists: bool,
    more_masks: Sequence[np.ndarray] = (),
    **fields: Any,
) -> dict[str, Any]:
    """QUERY record of the format with its counts.

    Args:
        prediction: (H, W), non-zero is object. target: uint8 (H, W) with 0, 1 and 255 = ignore.
        query, gt_exists, pred_exists, more_masks, fields: stored as they are (see the module text).
    """
    intersection, union, counted = mask_counts(prediction, target)
    record = {"query": query, **fields, "gt_exists": bool(gt_exists), "pred_exists": bool(pred_exists)}
    record |= {"prediction": encode_mask(prediction), "target": encode_mask(target == 1)}
    if (target == IGNORE_VALUE).any():
        record["ignore"] = encode_mask(target == IGNORE_VALUE)
    if len(more_masks):
        record["more_masks"] = [encode_mask(mask) for mask in more_masks]
    counts = {"intersection": intersection, "union": union, "target": counted}
    return record | {"counts": {name: values.tolist() for name, values in counts.items()}}


def target_mask(record: dict[str, Any]) -> np.ndarray:
    """uint8 (H, W) target of a QUERY record with 0, 1 and 255 = ignore."""
    mask = decode_mask(record["target"]).astype(np.uint8)
    if record.get("ignore"):
        mask[decode_mask(record["ignore"])] = IGNORE_VALUE
    return mask


@dataclass
class Predictions:
    """Header and picture records (module text) of one evaluated data set."""

    header: dict[str, Any]
    images: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all pictures that the header announces are here."""
        return len(self.images) >= int(self.header.get("n_images", len(self.images)))

    def counts(self, recount: bool = False) -> Counts:
        """Counts of all queries; `recount` computes them from the masks instead of trusting the file."""
        rows = []
        for image in self.images:
            for record in image["queries"]:
                counts = record["counts"]
                if recount:
                    counts = pixel_counts(record["prediction"], record["target"], record.get("ignore"))
                rows.append(_row(image, record, record["pred_exists"], counts))
        return Counts.from_rows(rows)

    def shuffled_counts(self, seed: int = 0) -> Counts:
        """Control: the prediction for *another* query of the same picture scored against each target.

        The other query is drawn among those of the picture whose target differs; a query without such a
        neighbour is left out. High scores here mean that the words do not decide the mask. The prediction of
        a query depends on its own words and picture only, so nothing has to be run again.
        """
        rows = []
        for image in self.images:
            name = hashlib.sha256(f"{seed}:{image['index']}:{image['image']}".encode()).digest()
            random = np.random.default_rng(int.from_bytes(name[:8], "little"))
            queries = image["queries"]
            targets = [(q["target"]["counts"], (q.get("ignore") or {}).get("counts")) for q in queries]
            for number, record in enumerate(queries):
                others = [k for k, target in enumerate(targets) if target != targets[number]]
                if not others:
                    continue
                other = queries[int(random.choice(others))]
                counts = pixel_counts(other["prediction"], record["target"], record.get("ignore"))
                rows.append(_row(image, record, other["pred_exists"], counts))
        return Counts.from_rows(rows)


def _row(image: dict, record: dict, pred_exists: bool, counts: dict[str, Any]) -> dict[str, Any]:
    row = {"image": (image["index"], image["image"]), "kind": record.get("kind", ""), **counts}
    return row | {"gt_exists": record["gt_exists"], "pred_exists": pred_exists}


# ---------------------------------------------------------------- writing


class PredictionWriter:
    """Appends picture records to one rank's file; a context manager.

    `done` holds the indices of pictures that some rank has already written under the same header.
    """

    def __init__(
        self,
        folder: StrPath,
        header: dict[str, Any],
        rank: int = 0,
        world_size: int = 1,
        restart: bool = False,
    ) -> None:
        """Open (or continue) `preds_<header["dataset"]>_<rank>_of_<world_size>.jsonl` in `folder`.

        Args:
            header: what decides the numbers; must hold "dataset" and "n_images".
            restart: forget what this rank wrote before.

        Raises:
            ValueError: the folder holds predictions under another header.
        """
        self.folder, self.header = Path(folder), header
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"preds_{header['dataset']}_{rank}_of_{world_size}.jsonl"
        if restart:
            self.path.unlink(missing_ok=True)
        self.done: set[int] = set()
        for path in rank_files(self.folder, header["dataset"]):
            if restart and _RANK_FILE.fullmatch(path.name)["world"] != str(world_size):
                raise ValueError(f"{path} is left from another number of processes; remove it to start anew")
            if restart:
                continue
            found, images, whole = _read_lines(path)
            if found is not None:
                _check_same_header(path, found, header)
            if path == self.path and whole < path.stat().st_size:
                os.truncate(path, whole)
            self.done |= {image["index"] for image in images}
        self._file = self.path.open("a", encoding="utf-8")
        if self.path.stat().st_size == 0:
            self._append({"format": FORMAT, "version": VERSION, "header": header})

    def write(self, index: int, image: str, size: Sequence[int], queries: Iterable[dict[str, Any]]) -> None:
        """Append one picture: its number in the data set, its path, [H, W] and its QUERY records."""
        self._append({"index": index, "image": image, "size": list(size), "queries": list(queries)})
        self.done.add(index)

    def _append(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "PredictionWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def merge_ranks(folder: StrPath, dataset: str) -> Path | None:
    """Write `predictions_<dataset>.json` from the rank files; None while pictures are still missing."""
    merged = _read_rank_files(rank_files(folder, dataset))
    if not merged.complete:
        return None
    return write_predictions(Path(folder) / f"predictions_{dataset}.json", merged)


def write_predictions(path: StrPath, predictions: Predictions) -> Path:
    """Write one merged file in one step. Returns the path."""
    body = {"format": FORMAT, "version": VERSION, "header": predictions.header, "images": predictions.images}
    return atomic_write_json(path, body, indent=None)


# ---------------------------------------------------------------- reading


def read_predictions(path: StrPath, dataset: str | None = None, targets: bool = True) -> Predictions:
    """Read predictions from whatever is there.

    Args:
        path: a merged file, one rank's file, or a folder with such files or with the published form.
        dataset: which data set of a folder that holds several; not needed where there is only one.
        targets: False also takes files that hold predictions alone (module text).

    Raises:
        ValueError: nothing readable; several data sets and none named; rank files of different runs; any
            field that is missing or cannot be true (named with its place in the file).
    """
    path = Path(path)
    if path.is_file():
        return _read_rank_files([path], targets) if path.suffix == ".jsonl" else _read_merged(path, targets)
    rank_names = [_RANK_FILE.fullmatch(p.name) for p in sorted(path.glob("preds_*"))]
    names = {match["dataset"] for match in rank_names if match}
    names |= {p.stem.removeprefix("predictions_") for p in path.glob("predictions_*.json")}
    if dataset is None and len(names) == 1:
        dataset = names.pop()
    elif dataset is None or dataset not in names:
        found = ", ".join(sorted(names)) or "none"
        wanted = f"of {dataset} " if dataset else ""
        raise ValueError(
            f"{path}: no predictions {wanted}to read; data sets found there: {found}. "
            "Run the inference command first, or name the folder it wrote (and the data set)"
        )
    # Rank files come first: a merged file beside unfinished or newer ones is older than they are.
    files = rank_files(path, dataset)
    if files:
        merged = _read_rank_files(files, targets)
        if not merged.complete:
            missing = f"{len(merged.images)} of {merged.header['n_images']}"
            logger.warning("%s: only %s pictures of %s are there yet", path, missing, dataset)
        return merged
    file = path / f"predictions_{dataset}.json"
    return _read_merged(file, targets) if file.is_file() else read_published(path, dataset)


def rank_files(folder: StrPath, dataset: str) -> list[Path]:
    """Rank files (our form) of a data set, by world size and rank."""
    found = []
    for path in Path(folder).glob("preds_*.jsonl"):
        match = _RANK_FILE.fullmatch(path.name)
        if match and match["dataset"] == dataset:
            found.append((int(match["world"]), int(match["rank"]), path))
    return [path for *_, path in sorted(found)]


def read_published(
    folder: StrPath, dataset: str | None = None, ranks: Sequence[int] | None = None
) -> Predictions:
    """Read the published form: `preds_<dataset>_<rank>_of_<world>.json` and .npz files with `pred`, `gt`.

    Args:
        ranks: read these only; None reads all and wants all of them to be there.
    """
    folder = Path(folder)
    files: dict[int, Path] = {}
    worlds = set()
    for path in folder.glob("preds_*.json"):
        match = _RANK_FILE.fullmatch(path.name)
        if match and dataset in (None, match["dataset"]):
            files[int(match["rank"])] = path
            worlds.add((match["dataset"], int(match["world"])))
    if len(worlds) != 1:
        found = ", ".join(f"{name} in {world} parts" for name, world in sorted(worlds)) or "nothing"
        raise ValueError(f"{folder}: expected the files of one data set and one run, found {found}")
    (dataset, world) = worlds.pop()
    wanted = list(range(world)) if ranks is None else list(ranks)
    missing = [rank for rank in wanted if rank not in files]
    if missing:
        raise ValueError(f"{folder}: the file(s) of rank {missing} of {world} are missing for {dataset}")
    entries: dict[str, dict[str, Any]] = {}
    for rank in wanted:
        entries |= read_json(files[rank], dict)
    images = [_published_image(folder, index, *item) for index, item in enumerate(entries.items())]
    header = {"dataset": dataset, "n_images": len(images), "source": PUBLISHED}
    return Predictions(
        header | {"eval_prompt": "unknown", "conv_type": "unknown", "raster": "unknown"}, images
    )


def _published_image(folder: Path, index: int, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    try:
        with np.load(folder / entry["segmentation_path"], allow_pickle=False) as arrays:
            predicted, targets = arrays["pred"], arrays["gt"]
        if predicted.ndim != 3 or targets.shape[1:] != predicted.shape[1:]:
            raise ValueError(f"pred is {predicted.shape}, gt is {targets.shape}; expected (N, H, W) both")
        number = len(entry["conversation_list"])
        columns = {key: entry[key] for key in ("conversation_list", "pred_sent", "gt_exists", "pred_exists")}
        columns |= {key: np.ravel(entry[key]).tolist() for key in ("ref_ids", "sent_ids")}
    except (KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{folder}: the entry of {name} cannot be read: {error!r}") from error
    lengths = {key: len(values) for key, values in columns.items()}
    lengths |= {"pred": len(predicted), "gt": len(targets)}
    if set(lengths.values()) != {number}:
        raise ValueError(f"{folder}: the entry of {name} has fields of different lengths: {lengths}")
    queries = [
        query_record(
            predicted[k],
            targets[k],
            query=columns["conversation_list"][k],
            text=columns["conversation_list"][k],
            kind="",
            generated=columns["pred_sent"][k],
            score=None,
            ref_id=columns["ref_ids"][k],
            sent_id=columns["sent_ids"][k],
            gt_exists=columns["gt_exists"][k],
            pred_exists=columns["pred_exists"][k],
        )
        for k in range(number)
    ]
    return {"index": index, "image": name, "size": list(predicted.shape[1:]), "queries": queries}


def _read_merged(path: Path, targets: bool = True) -> Predictions:
    body = read_json(path, dict)
    _check_format(path, body)
    if not isinstance(body.get("images"), list):
        raise ValueError(f"{path}: field 'images' is not a list")
    exact = body["header"].get("source") != PUBLISHED  # published targets may hold values besides 0, 1, 255
    most = body["header"].get("n_images") if targets else None
    check_images(str(path), body["images"], targets=targets, exact=exact, most=most)
    return Predictions(body["header"], body["images"])


def _read_rank_files(files: Sequence[Path], targets: bool = True) -> Predictions:
    header: dict[str, Any] | None = None
    by_index: dict[int, dict[str, Any]] = {}
    for path in files:
        found, images, _ = _read_lines(path)
        if found is None:
            continue
        if header is not None:
            _check_same_header(path, found, header)
        header = found
        most = found.get("n_images") if targets else None
        check_images(str(path), images, lambda n: f"line {n + 2}: ", targets, most=most)
        by_index |= {image["index"]: image for image in images}
    if header is None:
        raise ValueError(
            f"no predictions in {[str(path) for path in files]}; run the inference command first"
        )
    return Predictions(header, [by_index[index] for index in sorted(by_index)])


def _read_lines(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]], int]:
    """Header, picture records and the length in bytes of the whole lines of a rank file."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1  # a last line without its end was being written when the run was killed
    values = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            values.append(parse_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}); remove the file") from error
    if not values:
        return None, [], 0
    _check_format(path, values[0])
    return values[0]["header"], values[1:], whole


def _check_format(path: Path, body: Any) -> None:
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"{path}: not a prediction file (field 'format' is not {FORMAT!r})")
    if not isinstance(body.get("header"), dict):
        raise ValueError(f"{path}: header: expected an object, found {repr(body.get('header'))[:60]}")
    if type(body.get("version")) is not int or body["version"] != VERSION:
        raise ValueError(
            f"{path}: version {body.get('version')!r} of the format; this program reads {VERSION}"
        )
    check_header(str(path), body["header"])


def _check_same_header(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if different:
        lines = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} here" for key in different)
        raise ValueError(
            f"{path} holds predictions of another run ({lines}); use another folder or remove it"
        )
