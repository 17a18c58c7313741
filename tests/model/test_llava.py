"""The tower, the projector, and where tokens go when an image is spliced in."""

import pytest
import torch
from torch import nn

from model.clip import build_vision_tower, num_image_features, tower_features
from model.llava import Row, build_projector, pack_rows, predictions_of_token, split_rows
from tests.model import tiny

N = 4


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 2])
@torch.no_grad()
def test_tower_features_are_the_hidden_states(layer: int, act: str) -> None:
    torch.manual_seed(0)
    vision = tiny.config().vision | {"hidden_act": act}
    tower, x = build_vision_tower(vision).eval(), torch.randn(2, 3, 28, 28)
    expected = tower(x, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(tower_features(tower, x, layer, "cls_patch"), expected)
    torch.testing.assert_close(tower_features(tower, x, layer), expected[:, 1:])
    assert num_image_features(vision, "patch") == 4 and num_image_features(vision, "cls_patch") == 5


def test_tower_faults() -> None:
    vision = tiny.config().vision
    with pytest.raises(ValueError, match="3 blocks"):
        tower_features(build_vision_tower(vision), torch.zeros(1, 3, 28, 28), -7)
    with pytest.raises(ValueError, match="cls_patch"):
        num_image_features(vision, "cls")


def test_projectors() -> None:
    assert isinstance(build_projector("identity", 8, 8), nn.Identity)
    assert build_projector("linear", 8, 6)(torch.zeros(2, 8)).shape == (2, 6)
    deep = build_projector("mlp3x_gelu", 8, 6)
    assert [n for n, _ in deep.named_parameters()] == [
        f"{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")
    ]
    assert deep[0].in_features == 8 and deep[4].in_features == 6
    for kind in ("mlp0x_gelu", "mlp2x_relu", "qformer"):
        with pytest.raises(ValueError, match=kind):
            build_projector(kind, 8, 6)


def test_class_token_counts_as_a_feature_everywhere() -> None:
    model = tiny.model(mm_vision_select_feature="cls_patch")
    b = tiny.batch([tiny.row(4, "i", 5, "s", "e")], [1])
    with torch.no_grad():
        torch.testing.assert_close(model(**b)["loss"], model(**b, packed=False)["loss"])


@torch.no_grad()
def test_unseen_tokens_are_left_out_as_by_a_mask() -> None:
    model = tiny.model()
    rows = [tiny.row(4, "i", 6, "s", 2, "e"), tiny.row(4, "i", 3, "e")]
    ids, mask = tiny.padded(rows)
    mask[0, 8] = False
    with pytest.raises(ValueError, match="holes"):
        split_rows(ids, mask, offset=[0, 2])
    split = split_rows(ids, mask, offset=[0, 2], holes=True)
    assert split[0].unseen == (8,) and split[1].unseen == () and split[0].ids == rows[0]
    packed, images = pack_rows(split, N), torch.randn(1, 3, 28, 28)
    hidden = model.hidden_states(packed, images)
    for r, (values, length) in enumerate(zip(rows, (len(rows[0]), len(rows[1])))):
        at = values.index(tiny.IMAGE)
        words = model.llm.model.embed_tokens(torch.tensor(values).clamp(min=0))
        fused = torch.cat((words[:at], model.image_features(images)[0], words[at + 1 :]))[None]
        seen = torch.cat((mask[r, :at], torch.ones(N, dtype=torch.bool), mask[r, at + 1 : length]))
        expected = model.llm.model(inputs_embeds=fused, attention_mask=seen[None]).last_hidden_state[0]
        for fused_place in range(len(seen)):
            torch.testing.assert_close(hidden[packed.locate(r, fused_place)], expected[fused_place])


def test_predecessors() -> None:
    ids = [1, 7, tiny.SEG, tiny.IMAGE, tiny.SEG, 8, tiny.SEG]
    assert predictions_of_token([Row(ids, 0)], tiny.SEG, N) == [(0, 1), (0, 6), (0, 8)]
    assert predictions_of_token([Row([tiny.SEG, 5], 0)], tiny.SEG, N) == []  # nothing predicts the first


def test_packs_share_what_stands_before_and_in_the_image() -> None:
    i = tiny.IMAGE
    rows = [
        Row([1, 5, i, 6, 7], 0),
        Row([1, 5, i, 8], 0),
        Row([1, 9, i, 6], 0),
        Row([1, 5, i, 3], 1),
        Row([1, 2], 1),
    ]
    packed = pack_rows(rows, N)
    assert packed.row_pack == [0, 0, 1, 2, 3] and packed.images == [0, 0, 1]
    assert packed.ids[0].tolist() == [1, 5, 0, 0, 0, 0, 6, 7, 8]
    assert packed.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 6]
    assert packed.segment[0].tolist() == [0] * 6 + [1, 1, 2]
    assert packed.segment[3].tolist() == [0, 0] + [-1] * 7
    assert packed.locate(1, 6) == (0, 8) and packed.locate(0, 3) == (0, 3)
    mask = packed.attention(torch.device("cpu"))["attention_mask"][0, 0]
    assert mask[8].tolist() == [True] * 6 + [False, False, True]
    separate = pack_rows(rows, N, share_prefix=False)
    assert separate.row_pack == [0, 1, 2, 3, 4] and not separate.shared
    assert separate.attention(torch.device("cpu"))["position_ids"] is None


def test_splitting_rows() -> None:
    ids = torch.tensor([[0, 0, 1, 0, 5], [1, 4, 0, 0, 0]])
    assert [r.ids for r in split_rows(ids)] == [[1, 0, 5], [1, 4]]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    rows = split_rows(ids, mask, ids, [0, 2])
    assert [r.ids for r in rows] == [[1, 0, 5], [1, 4, 0]] == [r.labels for r in rows]
    assert [r.image for r in rows] == [0, 0] and rows[0].pads == 2
    with pytest.raises(ValueError, match="holes"):
        split_rows(ids, torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 0]]).bool())
    with pytest.raises(ValueError, match="row 1 is empty"):
        split_rows(torch.tensor([[1, 2], [0, 0]]))
