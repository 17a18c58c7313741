"""Questions answered in words: JSON in the style of LLaVA-Instruct. They train the language model only.

[{"id": "1", "image": "000000000009.jpg", "conversations": [
    {"from": "human", "value": "<image>\\nWhat stands near the runway?"},
    {"from": "gpt", "value": "A hangar."}]}]
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.base import ConversationData, DataError, ReadOptions
from dataset.draws import Rng
from dataset.image import load_rgb
from dataset.index import Inputs, Listing, indexed
from dataset.refer import inside, picture_lookup
from dataset.sample import Conversation, Sample
from dataset.text import IMAGE_TOKEN, SEG_TOKEN, Turns
from utils.io import StrPath, is_text, read_json, read_jsonl

_NO_PICTURE = (32, 32)
"""Size of the black picture that rows without one carry (no token shows it)."""
_ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


class VqaData(ConversationData):
    """Conversations of one or several files, each with its picture folder; one per sample.

    Args:
        sources: (file, picture folders) pairs; a picture is looked for in its folders in turn. Files are
            JSON lists, or JSON lines.
        options: see `ReadOptions`. In evaluation the prompt `open` leaves the last answer open; `answer`
            (and `forced`, which has no meaning here) keep it.
        name: for messages.
        root: the data folder (where `auto` keeps an index).
    """

    published = True

    def __init__(
        self,
        sources: Sequence[tuple[StrPath, Sequence[StrPath]]],
        options: ReadOptions,
        name: str = "vqa",
        root: StrPath | None = None,
    ) -> None:
        super().__init__(name, options)
        self._lists: list[Sequence[Any]] = []
        for file, folders in sources:
            listing = _open(
                Path(file), [Path(folder) for folder in folders], options.index, root or Path(file).parent
            )
            self._lists.append(listing.items)
            self.faults += listing.faults
        self._settle()

    def __len__(self) -> int:
        return sum(len(items) for items in self._lists)

    def item(self, index: int) -> dict[str, Any]:
        """Row `index`: {"image": path or None, "turns": [[question, answer], ...]}."""
        for items in self._lists:
            if index < len(items):
                return items[index]
            index -= len(items)
        raise IndexError(f"{self.name} has {len(self)} rows")

    def lengths(self) -> list[int]:
        """Words of every row, a measure of its length for grouping."""
        rows = (self.item(index)["turns"] for index in range(len(self)))
        return [sum(len(text.split()) for turn in turns for text in turn) for turns in rows]

    def _sample(self, index: int, rng: Rng) -> Sample:
        item = self.item(index)
        image = load_rgb(item["image"]) if item["image"] else np.zeros((*_NO_PICTURE, 3), np.uint8)
        turns: Turns = [(question, answer) for question, answer in item["turns"]]
        if not self.options.train and self.options.prompt == "open":
            turns[-1] = (turns[-1][0], None)
        nothing = np.zeros((0, *image.shape[:2]), np.uint8)
        shown = item["image"] is not None
        row = Conversation(turns, nothing, turns[0][0], False, "vqa", shown, index, 0)
        return Sample(item["image"] or f"{self.name}, row {index}", image, [row])


def open_vqa(spec: str, root: StrPath, options: ReadOptions) -> VqaData:
    """VQA data by the text of `--vqa_data`: sources joined by `||`.

    A source is `NAME`, which stands for `<root>/llava_dataset/NAME.json` with pictures of
    `<root>/coco/train2017`, or `FILE|FOLDER`; both parts may be relative to `root`. Pictures that are not in
    FOLDER are looked for in the folder of the others.
    """
    base = Path(root)
    common = base / "coco" / "train2017"
    sources: list[tuple[Path, list[Path]]] = []
    for part in (part.strip() for part in spec.split("||")):
        file, bar, folder = part.partition("|")
        if not bar and not file.endswith((".json", ".jsonl")):
            path = base / "llava_dataset" / f"{file}.json"
        else:
            path = _nearest(file, base)
        if not path.is_file():
            raise ValueError(
                f"vqa data {part!r}: {path} is not there; write NAME, FILE or FILE|PICTURE_FOLDER"
            )
        sources.append((path, [*([_nearest(folder, base)] if folder else []), common, path.parent]))
    everywhere = list(dict.fromkeys(folder for _, folders in sources for folder in folders[:1]))
    return VqaData(
        [(file, list(dict.fromkeys([*folders, *everywhere]))) for file, folders in sources],
        options,
        spec,
        root,
    )


def read_vqa(file: StrPath, folders: Sequence[Path]) -> Listing:
    """Rows of a file whose pictures are there; items as `VqaData.item`."""
    path = Path(file)
    rows = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path, list)
    there = picture_lookup()
    items, faults = [], []
    for number, row in enumerate(rows):
        try:
            items.append(_row(row, path, f"[{number}]", folders, there))
        except DataError as error:
            faults.append(error.fault)
    return Listing(items, faults=faults)


def _open(file: Path, folders: list[Path], index: str, root: StrPath) -> Listing:
    inputs = Inputs(files=(file,), listed=tuple(folders))
    return indexed(f"vqa-{file.stem}", inputs, lambda: read_vqa(file, folders), index, root)


def _row(
    row: Any, source: Path, field: str, folders: Sequence[Path], there: Callable[[Path], bool]
) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(source, field, f"expected an object, found {repr(row)[:60]}")
    picture = None
    if row.get("image") is not None:
        name = inside(row["image"], source, f"{field}.image")
        picture = next((folder / name for folder in folders if there(folder / name)), None)
        if picture is None:
            looked = ", ".join(str(folder) for folder in folders)
            raise DataError(source, f"{field}.image", f"picture {name} is in none of {looked}")
    return {
        "image": str(picture) if picture else None,
        "turns": _turns(row.get("conversations"), source, field),
    }


def _turns(stored: Any, source: Path, field: str) -> list[list[str]]:
    """(question, answer) pairs: image tags dropped, an opening that is not the human's dropped."""
    field = f"{field}.conversations"
    if not isinstance(stored, list) or not stored:
        raise DataError(source, field, f"expected a non-empty list, found {repr(stored)[:60]}")
    texts: list[tuple[int, str]] = []
    for number, turn in enumerate(stored):
        role = _ROLES.get(str(turn.get("from")).lower()) if isinstance(turn, dict) else None
        if role is None:
            raise DataError(source, f"{field}[{number}].from", "expected human or gpt")
        value = turn.get("value")
        if not is_text(value) or SEG_TOKEN in value:
            message = f"expected a text without {SEG_TOKEN}, found {repr(value)[:60]}"
            raise DataError(source, f"{field}[{number}].value", message)
        text = value.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in value else value
        texts.append((role, text))
    if texts[0][0] == 1:
        texts = texts[1:]
    if any(role != number % 2 for number, (role, _) in enumerate(texts)):
        raise DataError(source, field, "human and gpt must take turns")
    pairs = [[texts[i][1], texts[i + 1][1]] for i in range(0, len(texts) - 1, 2)]
    if not pairs or not all(answer for _, answer in pairs):
        raise DataError(source, field, "no answer to learn from")
    return pairs


def _nearest(name: str, base: Path) -> Path:
    return Path(name) if Path(name).exists() or Path(name).is_absolute() else base / name
