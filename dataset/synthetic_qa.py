"""Questions with answers in words about synthetic scenes: what the tiny vision-language base is trained on.

The answers name things, count them and say where they are on a 16 x 16 grid; none contains `[SEG]`. Also the
pool of scenes that pretraining draws from, and the per-patch targets that teach the tower what it sees.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from dataset.synthetic import COLOURS, KINDS, Query, Scene, SceneObject, ask, draw_scene, turn_scene
from utils.io import StrPath, atomic_write_json

GRID = 16
_WHERE = ("Where is {}?", "Locate {}.", "Find {}.", "Point to {}.")
_COLOUR_IDS = {name: i + 1 for i, name in enumerate(COLOURS)}
_KIND_IDS = {name: i + 1 for i, name in enumerate(KINDS)}


def grid_position(thing: SceneObject, size: int) -> tuple[int, int]:
    """(column, row) of the object's centre on the 16 x 16 grid, 0..15 each."""
    limit = GRID - 1
    return min(int(thing.x / size * GRID), limit), min(int(thing.y / size * GRID), limit)


def _places(scene: Scene, targets: tuple[int, ...]) -> str:
    cells = sorted((grid_position(scene.objects[i], scene.size) for i in targets), key=lambda c: (c[1], c[0]))
    return " and ".join(f"{x} {y}" for x, y in cells)


def _locate(scene: Scene, query: Query, rng: np.random.Generator) -> tuple[str, str]:
    question = query.phrase if query.is_sentence else str(rng.choice(_WHERE)).format(query.phrase)
    if query.targets:
        return question, f"At {_places(scene, query.targets)}."
    return question, "Nothing like that here."


def _caption(scene: Scene) -> tuple[str, str]:
    order = sorted(scene.objects, key=lambda o: grid_position(o, scene.size)[::-1])
    parts = [f"{o.colour} {o.kind} at {x} {y}" for o in order for x, y in [grid_position(o, scene.size)]]
    return "Describe the scene.", ", ".join(parts) + "."


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    kind = str(rng.choice([o.kind for o in scene.objects] if rng.random() < 0.8 else KINDS))
    number = sum(o.kind == kind for o in scene.objects)
    return f"How many {kind}s are there?", f"{number}."


def _name_at(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = scene.objects[rng.integers(len(scene.objects))]
    x, y = grid_position(thing, scene.size)
    return f"What is at {x} {y}?", f"A {thing.colour} {thing.kind}."


def ask_and_answer(scene: Scene, rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """A caption, one count, one naming question and `count` questions for places, as (question, answer)."""
    pairs = [_caption(scene), _count(scene, rng), _name_at(scene, rng)]
    return pairs + [_locate(scene, query, rng) for query in ask(scene, rng, count)]


def write_conversations(
    folder: StrPath, count: int, seed: int, questions: int = 8, size: int = 128
) -> tuple[Path, Path]:
    """Answers in words about the scenes that `write_scenes` draws with the same arguments, as VQA data.

    Writes `captions.json` (one description each) and `instructions.json` (a dialogue of up to `questions`
    + 2 turns each) into `folder` and returns them; pictures that are not there yet are drawn.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, dialogues = [], []
    for number in tqdm(range(count), desc=f"questions {folder}", unit="scene", mininterval=1.0):
        rng = np.random.default_rng((seed, number))
        scene, name = draw_scene(rng, size), f"{number:06d}.png"
        if not (folder / "images" / name).is_file():
            cv2.imwrite(str(folder / "images" / name), scene.image[..., ::-1])
        caption, *pairs = ask_and_answer(scene, rng, questions)
        captions.append(_dialogue(number, name, [caption]))
        dialogues.append(_dialogue(number, name, [pairs[i] for i in rng.permutation(len(pairs))]))
    files = folder / "captions.json", folder / "instructions.json"
    for file, rows in zip(files, (captions, dialogues)):
        atomic_write_json(file, rows)
    return files


def _dialogue(number: int, picture: str, pairs: list[tuple[str, str]]) -> dict[str, object]:
    turns = []
    for place, (question, answer) in enumerate(pairs):
        text = question if place else f"<image>\n{question}"
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": picture, "conversations": turns}


def patch_targets(scene: Scene, patch: int) -> np.ndarray:
    """What each of the N = (size / patch)^2 patches shows, row by row: float32 (N, 7).

    Columns: kind id, colour id (0 = ground), offset (x, y) to the object's centre in patches, log2 of the
    object's area over the patch area, grid column and row of that centre. A patch belongs to the object
    covering most of it, from an eighth of the patch on.
    """
    side = scene.size // patch
    cover = np.stack([o.mask.reshape(side, patch, side, patch).sum((1, 3)) for o in scene.objects])
    owner, most = cover.argmax(0), cover.max(0)
    targets = np.zeros((side, side, 7), np.float32)
    for row, column in zip(*np.nonzero(most * 8 >= patch * patch)):
        thing = scene.objects[owner[row, column]]
        centre = ((thing.x / patch) - column - 0.5, (thing.y / patch) - row - 0.5)
        log_area = np.log2(thing.area / patch**2)
        cell = grid_position(thing, scene.size)
        targets[row, column] = (_KIND_IDS[thing.kind], _COLOUR_IDS[thing.colour], *centre, log_area, *cell)
    return targets.reshape(-1, 7)


@dataclass(frozen=True)
class _Stored:
    image: np.ndarray
    labels: np.ndarray
    things: tuple[tuple[str, str, float, float, float], ...]


class ScenePool:
    """`count` scenes drawn once from `seed`, kept compactly and handed out turned and mirrored at random."""

    def __init__(self, count: int, seed: int, size: int = 128) -> None:
        self._stored: list[_Stored] = []
        rng = np.random.default_rng(seed)
        for _ in range(count):
            scene = draw_scene(rng, size)
            labels = np.zeros((size, size), np.uint8)
            for i, thing in enumerate(scene.objects):
                labels[thing.mask > 0] = i + 1
            things = tuple((o.kind, o.colour, o.x, o.y, o.radius) for o in scene.objects)
            self._stored.append(_Stored(scene.image, labels, things))

    def __len__(self) -> int:
        return len(self._stored)

    def draw(self, rng: np.random.Generator) -> Scene:
        """One scene of the pool in one of its eight orientations."""
        kept = self._stored[rng.integers(len(self._stored))]
        masks = [(kept.labels == i + 1).astype(np.uint8) for i in range(len(kept.things))]
        scene = Scene(kept.image, tuple(SceneObject(*t, mask) for t, mask in zip(kept.things, masks)))
        return turn_scene(scene, int(rng.integers(4)), bool(rng.integers(2)))
