"""Procedurally drawn satellite-like scenes and questions whose words alone decide the mask.

A scene is a square RGB picture of ground with 4 to 7 non-overlapping objects; each has a kind, a colour,
a size and a heading. `ask` draws questions about one scene: by attribute, all of a class, by position, by
size, by relation to another object, by purpose (implicit), and about things that are not there. A question is
only asked where its answer is unambiguous by a margin, and superlatives and relations only where a second
object would match if the deciding word were ignored.

Shapes: H = W = scene size in pixels; masks uint8 (H, W) with values 0 and 1; positions (x, y) in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from dataset.generic import write_annotations
from utils.io import StrPath

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 40),
    "blue": (45, 80, 205),
    "yellow": (230, 205, 50),
    "white": (240, 240, 238),
    "black": (28, 28, 32),
    "purple": (150, 60, 175),
}
KINDS = ("ship", "plane", "tank", "house", "field", "pool", "runway", "pier")
PURPOSES: dict[str, tuple[str, ...]] = {
    "ship": ("What could sail away?", "Where would you find a crew at sea?"),
    "plane": ("What could take off and fly?", "What carries passengers through the air?"),
    "tank": ("Where is fuel stored?", "Where would oil be kept?"),
    "house": ("Where do people live?", "Where could a family sleep?"),
    "field": ("Where is food grown?", "Where would a farmer work?"),
    "pool": ("Where could one swim?", "Where would children splash in water?"),
    "runway": ("Where could a plane land?", "Where would an aircraft touch down?"),
    "pier": ("Where could a ship berth?", "Where would a boat be moored?"),
}
QUERY_KINDS = ("attribute", "all", "position", "size", "relation", "implicit", "nothing")
_GROUNDS = ((96, 120, 74), (158, 139, 104), (122, 103, 86), (128, 130, 132), (84, 116, 122))
_SIDES: dict[str, tuple[int, int]] = {
    "left of": (0, -1),
    "right of": (0, 1),
    "above": (1, -1),
    "below": (1, 1),
}
_EXTREMES: dict[str, tuple[int, int]] = {
    "leftmost": (0, -1),
    "rightmost": (0, 1),
    "topmost": (1, -1),
    "bottommost": (1, 1),
}
POSITION_MARGIN = 0.07  # of the scene size: by how much an extreme must beat the runner-up
EXTREMES = (*_EXTREMES, "largest", "smallest")
RELATIONS = (*_SIDES, "nearest to", "farthest from")
SIZE_RATIO = 1.4  # by how much the largest (smallest) area must beat the runner-up
DISTANCE_RATIO = 1.35  # by how much the nearest (farthest) must beat the runner-up


@dataclass(frozen=True)
class SceneObject:
    """One drawn thing. `x`, `y`: centre in pixels; `radius`: half the longest extent in pixels."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    mask: np.ndarray

    @property
    def area(self) -> int:
        """Pixels covered."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Scene:
    """`image` uint8 (H, W, 3) RGB and the objects on it."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]

    @property
    def size(self) -> int:
        """Side length in pixels."""
        return self.image.shape[0]


@dataclass(frozen=True)
class Terms:
    """What a question names, apart from its wording; "" where it does not. `relation` is to the anchor."""

    kind: str = ""
    colour: str = ""
    extreme: str = ""
    relation: str = ""
    anchor_kind: str = ""
    anchor_colour: str = ""


@dataclass(frozen=True)
class Query:
    """One question. `phrase` is a noun phrase ("the red ship") or, for implicit ones, a whole sentence;
    `targets` are indices into the scene's objects, empty when the thing asked for is not there."""

    phrase: str
    kind: str
    targets: tuple[int, ...]
    terms: Terms = Terms()

    @property
    def is_sentence(self) -> bool:
        """Whether `phrase` stands alone as a question."""
        return self.phrase.endswith("?")

    def mask(self, scene: Scene) -> np.ndarray:
        """Union of the targets' masks, uint8 (H, W)."""
        union = np.zeros(scene.image.shape[:2], np.uint8)
        for index in self.targets:
            union |= scene.objects[index].mask
        return union


# --- drawing ------------------------------------------------------------------------------------------


def _mirrored(side: np.ndarray) -> np.ndarray:
    """Close a half outline by its mirror image across the x axis: (P, 2) -> (<= 2P, 2)."""
    back = side[::-1] * (1, -1)
    return np.concatenate([side, back[back[:, 1] != 0]])


def _outline(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Polygon of a kind in its own frame, heading along +x, longest half-extent 1: float (P, 2)."""
    turn = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    if kind == "ship":
        half = rng.uniform(0.30, 0.38)
        side = np.array([(1, 0), (0.55, half), (-0.9, half), (-1, 0.5 * half)])
        return _mirrored(side)
    if kind == "plane":
        body = 0.16
        side = [(1, 0), (0.75, body), (0.3, body), (-0.25, 0.95), (-0.55, 0.95), (-0.25, body), (-0.7, body)]
        return _mirrored(np.array(side + [(-0.85, 0.42), (-1, 0.42), (-0.95, 0.0)]))
    if kind == "tank":
        return 0.86 * np.stack([np.cos(turn), np.sin(turn)], 1)
    if kind == "house":
        half = rng.uniform(0.62, 0.75)
        return np.array([(0.75, half), (-0.75, half), (-0.75, -half), (0.75, -half)])
    if kind == "field":
        return np.array([(0.85, 0.8), (-0.85, 0.8), (-0.85, -0.8), (0.85, -0.8)])
    if kind == "pool":
        wave = 1 + 0.14 * np.cos(2 * turn + rng.uniform(0, 6.3))
        return np.stack([0.95 * wave * np.cos(turn), 0.66 * wave * np.sin(turn)], 1) / 1.1
    if kind == "runway":
        return np.array([(1, 0.28), (-1, 0.28), (-1, -0.28), (1, -0.28)])
    if kind == "pier":
        bar = 0.22
        return _mirrored(np.array([(-1, bar), (0.5, bar), (0.5, 0.9), (0.95, 0.9)]))
    raise ValueError(f"unknown kind of object {kind!r}; known: {', '.join(KINDS)}")


def _decorate(image: np.ndarray, kind: str, mask: np.ndarray, along: np.ndarray, across: np.ndarray) -> None:
    """Darken or lighten parts of an object so that kinds differ in texture as well as in outline."""
    inside = mask.astype(bool)
    if kind == "house":
        part, factor = across > 0, 0.68
    elif kind == "field":
        part, factor = (np.floor(across * 5) % 2) == 0, 0.7
    elif kind == "tank":
        ring = np.hypot(along, across)
        part, factor = (ring > 0.42) & (ring < 0.6), 0.62
    elif kind == "runway":
        part, factor = (np.abs(across) < 0.07) & ((np.floor(along * 5) % 2) == 0), 0.45
    elif kind == "ship":
        part, factor = (np.abs(across) < 0.16) & (along < 0.1) & (along > -0.75), 0.6
    elif kind == "pool":
        edge = cv2.erode(mask, np.ones((3, 3), np.uint8)) == 0
        part, factor = edge, 0.6
    else:
        return
    image[inside & part] *= factor


def _place(rng: np.random.Generator, size: int, count: int) -> list[tuple[float, float, float]]:
    """Up to `count` circles (x, y, radius) in pixels that keep clear of each other and of the border."""
    circles: list[tuple[float, float, float]] = []
    for _ in range(200):
        radius = size * rng.uniform(0.08, 0.16)
        x, y = rng.uniform(radius + 1, size - radius - 1, 2)
        if all(np.hypot(x - cx, y - cy) > radius + cr + 1.5 for cx, cy, cr in circles):
            circles.append((float(x), float(y), float(radius)))
            if len(circles) == count:
                break
    return circles


def draw_scene(rng: np.random.Generator, size: int = 128) -> Scene:
    """Draw one scene of `size` x `size` pixels with 4 to 7 objects of up to 4 kinds."""
    while len((scene := _try_scene(rng, size)).objects) < 4:
        pass
    return scene


def _try_scene(rng: np.random.Generator, size: int) -> Scene:
    ground = np.array(_GROUNDS[rng.integers(len(_GROUNDS))], np.float32) + rng.uniform(-12, 12, 3)
    patches = cv2.resize(
        rng.normal(0, 9, (7, 7, 3)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC
    )
    image = ground.astype(np.float32) + patches
    kinds = rng.choice(KINDS, rng.integers(2, 5), replace=False)
    palette = rng.choice(list(COLOURS), rng.integers(2, 5), replace=False)
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
    objects = []
    taken = np.zeros((size, size), np.uint8)
    for x, y, radius in _place(rng, size, int(rng.integers(4, 8))):
        kind, colour = str(rng.choice(kinds)), str(rng.choice(palette))
        heading = rng.uniform(0, 2 * np.pi)
        cos, sin = np.cos(heading), np.sin(heading)
        corners = radius * _outline(kind, rng) @ np.array([[cos, sin], [-sin, cos]]) + (x, y)
        mask = np.zeros((size, size), np.uint8)
        cv2.fillPoly(mask, [np.round(corners * 16).astype(np.int32)], 1, shift=4)
        if (mask & taken).any():  # corners may reach out of the circle
            continue
        taken |= mask
        shade = np.array(COLOURS[colour], np.float32) * rng.uniform(0.88, 1.08) + rng.uniform(-10, 10, 3)
        image[mask.astype(bool)] = shade
        along = ((columns - x) * cos + (rows - y) * sin) / radius
        across = (-(columns - x) * sin + (rows - y) * cos) / radius
        _decorate(image, kind, mask, along, across)
        objects.append(SceneObject(kind, colour, x, y, radius, mask))
    image = cv2.GaussianBlur(image, (0, 0), 0.5) + rng.normal(0, 5, image.shape).astype(np.float32)
    return Scene(np.clip(image, 0, 255).astype(np.uint8), tuple(objects))


def turn_scene(scene: Scene, quarter_turns: int, mirror: bool) -> Scene:
    """The scene turned counter-clockwise by quarter turns and then, if asked, mirrored left to right."""

    def move(array: np.ndarray) -> np.ndarray:
        turned = np.rot90(array, quarter_turns)
        return np.ascontiguousarray(turned[:, ::-1] if mirror else turned)

    last = scene.size - 1.0
    objects = []
    for thing in scene.objects:
        x, y = thing.x, thing.y
        for _ in range(quarter_turns % 4):
            x, y = y, last - x
        x = last - x if mirror else x
        objects.append(SceneObject(thing.kind, thing.colour, x, y, thing.radius, move(thing.mask)))
    return Scene(move(scene.image), tuple(objects))


# --- questions ----------------------------------------------------------------------------------------


def _describe(scene: Scene, index: int, rng: np.random.Generator) -> str | None:
    """A phrase without article that fits this object alone ("red ship", or "ship" if it is the only one)."""
    thing = scene.objects[index]
    same_kind = [other for other in scene.objects if other.kind == thing.kind]
    if len(same_kind) == 1 and rng.random() < 0.3:
        return thing.kind
    if sum(other.colour == thing.colour for other in same_kind) == 1:
        return f"{thing.colour} {thing.kind}"
    return None


def _named(phrase: str) -> Terms:
    """Terms of "ship" or "red ship"."""
    *colour, kind = phrase.split()
    return Terms(kind, *colour)


def _kind_of(noun: str) -> str:
    return "" if noun == "object" else noun


def _groups(scene: Scene, least: int) -> list[tuple[str, list[int]]]:
    """(noun, member indices) of every kind with at least `least` members, and ("object", all)."""
    groups = [(k, [i for i, o in enumerate(scene.objects) if o.kind == k]) for k in KINDS]
    return [(k, m) for k, m in groups if len(m) >= least] + [("object", list(range(len(scene.objects))))]


def _ask_attribute(scene: Scene, rng: np.random.Generator) -> Query | None:
    index = int(rng.integers(len(scene.objects)))
    phrase = _describe(scene, index, rng)
    return Query(f"the {phrase}", "attribute", (index,), _named(phrase)) if phrase else None


def _ask_all(scene: Scene, rng: np.random.Generator) -> Query | None:
    if rng.random() < 0.5:
        kind = str(rng.choice([o.kind for o in scene.objects]))
        phrase, terms = f"all {kind}s", Terms(kind)
        members = [i for i, o in enumerate(scene.objects) if o.kind == kind]
    else:
        colour = str(rng.choice([o.colour for o in scene.objects]))
        phrase, terms = f"all {colour} objects", Terms(colour=colour)
        members = [i for i, o in enumerate(scene.objects) if o.colour == colour]
    if not 2 <= len(members) < len(scene.objects):
        return None
    return Query(phrase, "all", tuple(members), terms)


def _best(values: list[float], ratio: float | None, margin: float | None) -> int | None:
    """Index of the smallest value if it beats the second smallest by the ratio or margin, else None."""
    order = np.argsort(values)
    first, second = values[order[0]], values[order[1]]
    clear = second >= first * ratio if ratio else second - first >= margin
    return int(order[0]) if clear else None


def _ask_position(scene: Scene, rng: np.random.Generator) -> Query | None:
    groups = _groups(scene, 2)
    noun, members = groups[rng.integers(len(groups))]
    word = str(rng.choice(list(_EXTREMES)))
    axis, sign = _EXTREMES[word]
    values = [-sign * (scene.objects[i].y if axis else scene.objects[i].x) for i in members]
    best = _best(values, None, POSITION_MARGIN * scene.size)
    if best is None:
        return None
    return Query(f"the {word} {noun}", "position", (members[best],), Terms(_kind_of(noun), extreme=word))


def _ask_size(scene: Scene, rng: np.random.Generator) -> Query | None:
    groups = _groups(scene, 2)
    noun, members = groups[rng.integers(len(groups))]
    word = str(rng.choice(["largest", "smallest"]))
    areas = [float(scene.objects[i].area) for i in members]
    best = _best([1 / a for a in areas] if word == "largest" else areas, SIZE_RATIO, None)
    if best is None:
        return None
    return Query(f"the {word} {noun}", "size", (members[best],), Terms(_kind_of(noun), extreme=word))


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Query | None:
    anchor = int(rng.integers(len(scene.objects)))
    name = _describe(scene, anchor, rng)
    if name is None:
        return None
    groups = [(n, [i for i in m if i != anchor]) for n, m in _groups(scene, 2)]
    groups = [(n, m) for n, m in groups if len(m) >= 2]
    noun, members = groups[rng.integers(len(groups))]
    here = scene.objects[anchor]
    if rng.random() < 0.5:
        word = str(rng.choice(["nearest to", "farthest from"]))
        reach = [float(np.hypot(scene.objects[i].x - here.x, scene.objects[i].y - here.y)) for i in members]
        best = _best(reach if word == "nearest to" else [1 / r for r in reach], DISTANCE_RATIO, None)
        if best is None:
            return None
    else:
        word = str(rng.choice(list(_SIDES)))
        axis, sign = _SIDES[word]
        offset = [
            sign * ((o.y - here.y) if axis else (o.x - here.x)) for o in (scene.objects[i] for i in members)
        ]
        on_side = [k for k, value in enumerate(offset) if value >= POSITION_MARGIN * scene.size]
        unclear = [k for k, value in enumerate(offset) if abs(value) < POSITION_MARGIN * scene.size]
        if len(on_side) != 1 or unclear:
            return None
        best = on_side[0]
    anchored = _named(name)
    terms = Terms(_kind_of(noun), "", "", word, anchored.kind, anchored.colour)
    return Query(f"the {noun} {word} the {name}", "relation", (members[best],), terms)


def _ask_implicit(scene: Scene, rng: np.random.Generator) -> Query | None:
    kind = str(rng.choice([o.kind for o in scene.objects]))
    members = tuple(i for i, o in enumerate(scene.objects) if o.kind == kind)
    return Query(str(rng.choice(PURPOSES[kind])), "implicit", members, Terms(kind))


def _ask_nothing(scene: Scene, rng: np.random.Generator) -> Query | None:
    """Half of these name a kind and a colour that are both there, but not on one object."""
    pairs = {(o.kind, o.colour) for o in scene.objects}
    kinds, colours = {k for k, _ in pairs}, {c for _, c in pairs}
    draw = rng.random()
    if draw < 0.5:
        mixed = sorted((k, c) for k in kinds for c in colours if (k, c) not in pairs)
        if not mixed:
            return None
        kind, colour = mixed[rng.integers(len(mixed))]
        return Query(f"the {colour} {kind}", "nothing", (), Terms(kind, colour))
    absent = [k for k in KINDS if k not in kinds]
    kind = str(rng.choice(absent))
    if draw < 0.7:
        return Query(str(rng.choice(PURPOSES[kind])), "nothing", (), Terms(kind))
    if draw < 0.85:
        return Query(f"the {kind}", "nothing", (), Terms(kind))
    colour = str(rng.choice(list(COLOURS)))
    return Query(f"the {colour} {kind}", "nothing", (), Terms(kind, colour))


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Query | None]] = {
    "attribute": _ask_attribute,
    "all": _ask_all,
    "position": _ask_position,
    "size": _ask_size,
    "relation": _ask_relation,
    "implicit": _ask_implicit,
    "nothing": _ask_nothing,
}


def ask(
    scene: Scene, rng: np.random.Generator, count: int, kinds: tuple[str, ...] = QUERY_KINDS, tries: int = 12
) -> list[Query]:
    """Draw up to `count` different questions about `scene`, kinds equally often as far as the scene allows.

    Raises ValueError for a kind that is not in `QUERY_KINDS`.
    """
    unknown = set(kinds) - set(_ASKERS)
    if unknown:
        raise ValueError(f"unknown question kinds {sorted(unknown)}; known: {', '.join(QUERY_KINDS)}")
    queries: dict[str, Query] = {}
    for _ in range(count * 3):
        asker = _ASKERS[str(rng.choice(kinds))]
        for _ in range(tries):
            query = asker(scene, rng)
            if query is not None and query.phrase not in queries:
                queries[query.phrase] = query
                break
        if len(queries) == count:
            break
    return list(queries.values())


# --- files --------------------------------------------------------------------------------------------


def write_scenes(folder: StrPath, count: int, seed: int, questions: int = 8, size: int = 128) -> Path:
    """Draw `count` scenes with up to `questions` questions each into `folder`, in the project's own format.

    Pictures are PNG under `images/`, annotations in `annotations.json` (returned); the same arguments give
    the same files.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = []
    for number in tqdm(range(count), desc=f"drawing {folder}", unit="scene", mininterval=1.0):
        rng = np.random.default_rng((seed, number))
        scene = draw_scene(rng, size)
        name = f"images/{number:06d}.png"
        cv2.imwrite(str(folder / name), scene.image[..., ::-1])
        queries = []
        for query in ask(scene, rng, questions):
            entry = {"text": query.phrase, "kind": query.kind, "exists": bool(query.targets)}
            queries.append({**entry, "masks": [query.mask(scene)] if query.targets else []})
        images.append({"file": name, "queries": queries})
    return write_annotations(folder, images)
