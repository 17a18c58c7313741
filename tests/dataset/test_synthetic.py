"""Synthetic scenes: drawing, turning, and that every question has exactly the answer its words say."""

import re

import numpy as np
import pytest

from dataset.synthetic import KINDS, PURPOSES, QUERY_KINDS, Query, Scene, ask, draw_scene, turn_scene
from dataset.synthetic_qa import ScenePool, ask_and_answer, grid_position, patch_targets


def scenes(count: int = 40) -> list[Scene]:
    rng = np.random.default_rng(5)
    return [draw_scene(rng) for _ in range(count)]


def answer(scene: Scene, phrase: str) -> set[int]:
    """Who a phrase means, read from the words alone by a second, slower way."""
    objects = list(enumerate(scene.objects))

    def named(words: str) -> list[int]:
        colour, _, kind = words.rpartition(" ")
        kind = kind.removesuffix("s") if kind not in KINDS else kind
        return [i for i, o in objects if kind in ("object", o.kind) and colour in ("", o.colour)]

    for kind, questions in PURPOSES.items():
        if phrase in questions:
            return set(named(kind))
    if words := re.fullmatch(r"all (.+)", phrase):
        return set(named(words[1]))
    if words := re.fullmatch(r"the (left|right|top|bottom)most (\w+)", phrase):
        key = {
            "left": lambda i: scene.objects[i].x,
            "right": lambda i: -scene.objects[i].x,
            "top": lambda i: scene.objects[i].y,
            "bottom": lambda i: -scene.objects[i].y,
        }[words[1]]
        return {min(named(words[2]), key=key)}
    if words := re.fullmatch(r"the (largest|smallest) (\w+)", phrase):
        pick = max if words[1] == "largest" else min
        return {pick(named(words[2]), key=lambda i: scene.objects[i].area)}
    relation = r"the (\w+) (left of|right of|above|below|nearest to|farthest from) the (.+)"
    if words := re.fullmatch(relation, phrase):
        (anchor,) = named(words[3])
        here = scene.objects[anchor]
        others = [i for i in named(words[1]) if i != anchor]
        if words[2] in ("nearest to", "farthest from"):
            pick = min if words[2] == "nearest to" else max
            return {
                pick(others, key=lambda i: np.hypot(scene.objects[i].x - here.x, scene.objects[i].y - here.y))
            }
        beside = {
            "left of": lambda o: o.x < here.x,
            "right of": lambda o: o.x > here.x,
            "above": lambda o: o.y < here.y,
            "below": lambda o: o.y > here.y,
        }[words[2]]
        return {i for i in others if beside(scene.objects[i])}
    return set(named(phrase.removeprefix("the ")))


def test_scenes_repeat_with_the_seed_and_objects_never_overlap() -> None:
    first, again = scenes(3), scenes(3)
    for one, two in zip(first, again):
        np.testing.assert_array_equal(one.image, two.image)
        assert one.image.dtype == np.uint8 and one.image.shape == (128, 128, 3)
        assert 4 <= len(one.objects) <= 7
        assert np.sum([o.mask for o in one.objects], axis=0).max() == 1
        assert min(o.area for o in one.objects) > 60


def test_every_question_means_what_it_says() -> None:
    rng = np.random.default_rng(1)
    seen: dict[str, int] = dict.fromkeys(QUERY_KINDS, 0)
    for scene in scenes(80):
        for query in ask(scene, rng, 8):
            seen[query.kind] += 1
            assert set(query.targets) == answer(scene, query.phrase), query
            assert (query.kind == "nothing") == (not query.targets)
            union = query.mask(scene)
            assert union.sum() == sum(scene.objects[i].area for i in query.targets)
    assert min(seen.values()) > 30, seen


def test_a_thousand_scenes_can_all_be_asked_about() -> None:
    rng = np.random.default_rng(11)
    for _ in range(1000):
        scene = draw_scene(rng, 64)
        assert len(scene.objects) >= 4 and len(ask(scene, rng, 4)) >= 3


def test_the_same_scene_with_another_question_has_another_mask() -> None:
    rng = np.random.default_rng(2)
    different = sum(len({q.targets for q in ask(scene, rng, 8)}) >= 3 for scene in scenes(40))
    assert different >= 38


def test_unknown_kind_of_question_is_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        ask(scenes(1)[0], np.random.default_rng(0), 2, kinds=("colour",))


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirror", [False, True])
def test_turning_moves_pixels_and_positions_alike(turns: int, mirror: bool) -> None:
    for scene in scenes(5):
        turned = turn_scene(scene, turns, mirror)
        for before, after in zip(scene.objects, turned.objects):
            assert before.area == after.area
            rows, columns = np.nonzero(before.mask)
            moved_rows, moved_columns = np.nonzero(after.mask)
            shift = np.hypot(columns.mean() - before.x, rows.mean() - before.y)
            moved = np.hypot(moved_columns.mean() - after.x, moved_rows.mean() - after.y)
            assert moved == pytest.approx(shift, abs=1e-6)


def test_pool_hands_out_consistent_scenes() -> None:
    pool, rng = ScenePool(4, seed=3), np.random.default_rng(0)
    for _ in range(16):
        scene = pool.draw(rng)
        for query in ask(scene, rng, 4):
            assert set(query.targets) == answer(scene, query.phrase)


def test_answers_in_words_name_the_right_cells() -> None:
    rng = np.random.default_rng(4)
    for scene in scenes(10):
        cells = {grid_position(o, scene.size) for o in scene.objects}
        for question, reply in ask_and_answer(scene, rng, 6):
            assert "[SEG]" not in question + reply
            if reply.startswith("At "):
                places = [tuple(map(int, place.split())) for place in reply[3:-1].split(" and ")]
                assert set(places) <= cells
            if question.startswith("How many"):
                kind = question.split()[2].removesuffix("s")
                assert int(reply[:-1]) == sum(o.kind == kind for o in scene.objects)


def test_patch_targets_point_to_the_object() -> None:
    scene = scenes(1)[0]
    targets = patch_targets(scene, 16).reshape(8, 8, 7)
    assert targets.shape == (8, 8, 7) and (targets[..., 0] > 0).any()
    for row, column in zip(*np.nonzero(targets[..., 0])):
        kind, _, x, y, log_area, *cell = targets[row, column]
        centre = ((column + 0.5 + x) * 16, (row + 0.5 + y) * 16)
        owner = min(scene.objects, key=lambda o: np.hypot(o.x - centre[0], o.y - centre[1]))
        assert np.hypot(owner.x - centre[0], owner.y - centre[1]) < 1e-3
        assert KINDS[int(kind) - 1] == owner.kind
        assert tuple(cell) == grid_position(owner, scene.size)
        assert 2**log_area * 256 == pytest.approx(owner.area, rel=1e-4)


def test_absent_things_are_absent() -> None:
    rng = np.random.default_rng(8)
    for scene in scenes(30):
        for query in ask(scene, rng, 3, kinds=("nothing",)):
            assert isinstance(query, Query) and not answer(scene, query.phrase)
