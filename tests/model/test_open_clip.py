"""The whole CLIP: against a plain forward pass of OpenCLIP's tensors; tokenizer, crops, named files."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model.clip_tokenizer import ClipTokenizer, clean_text, find_vocabulary
from model.instructsam.match import (
    Matcher,
    RegionEncoder,
    TextEncoder,
    crop_boxes,
    label_classes,
    match_features,
    prompts_of,
)
from model.open_clip import (
    DEFAULT_CONFIG,
    QUICK_GELU_NAMES,
    OpenClip,
    clip_entry,
    fit_square,
    load_open_clip,
    tiny_open_clip,
)
from tests.conftest import REPO

SIZES = {"vision_cfg": {"head_width": 8}, "text_cfg": {"heads": 4}}
WIDTHS = {"visual.": 16, "": 32}
HEADS = {"visual.": 2, "": 4}
JOINT, SIDE, PATCH, WORDS, CONTEXT, DEPTH = 12, 32, 8, 50, 9, 2


def open_clip_state(seed: int = 0) -> dict[str, Tensor]:
    """A small CLIP under OpenCLIP's names; both sides have other widths than the joint space."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    state = {
        "logit_scale": torch.tensor(2.0),
        "text_projection": draw(32, JOINT),
        "visual.proj": draw(16, JOINT),
    }
    state |= {"token_embedding.weight": draw(WORDS, 32), "positional_embedding": draw(CONTEXT, 32)}
    state |= {"visual.class_embedding": draw(16), "visual.conv1.weight": draw(16, 3, PATCH, PATCH)}
    state["visual.positional_embedding"] = draw((SIDE // PATCH) ** 2 + 1, 16)
    for name, width in (("visual.ln_pre", 16), ("visual.ln_post", 16), ("ln_final", 32)):
        state |= {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}
    for side, width in WIDTHS.items():
        for k in range(DEPTH):
            block = f"{side}transformer.resblocks.{k}."
            for name in ("ln_1", "ln_2"):
                state |= {f"{block}{name}.weight": 1 + draw(width), f"{block}{name}.bias": draw(width)}
            state |= {
                f"{block}attn.in_proj_weight": draw(3 * width, width),
                f"{block}attn.in_proj_bias": draw(3 * width),
            }
            for name, out, into in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 3 * width, width),
                ("mlp.c_proj", width, 3 * width),
            ):
                state |= {f"{block}{name}.weight": draw(out, into), f"{block}{name}.bias": draw(out)}
    return state


def plain_side(state: dict[str, Tensor], side: str, x: Tensor, quick: bool, causal: bool) -> Tensor:
    """The transformer of one side, one operation after the other; x (B, L, D)."""

    def norm(name: str, value: Tensor) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return nn.functional.layer_norm(value, weight.shape, weight, bias, 1e-5)

    length, heads = x.shape[1], HEADS[side]
    mask = torch.full((length, length), -torch.inf).triu(1) if causal else torch.zeros(length, length)
    for k in range(DEPTH):
        block = f"{side}transformer.resblocks.{k}."
        joint = (
            norm(f"{block}ln_1", x) @ state[f"{block}attn.in_proj_weight"].T
            + state[f"{block}attn.in_proj_bias"]
        )
        q, key, value = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in joint.chunk(3, dim=-1))
        weights = (q @ key.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).flatten(-2)
        x = x + mixed @ state[f"{block}attn.out_proj.weight"].T + state[f"{block}attn.out_proj.bias"]
        inner = norm(f"{block}ln_2", x) @ state[f"{block}mlp.c_fc.weight"].T + state[f"{block}mlp.c_fc.bias"]
        inner = inner * torch.sigmoid(1.702 * inner) if quick else nn.functional.gelu(inner)
        x = x + inner @ state[f"{block}mlp.c_proj.weight"].T + state[f"{block}mlp.c_proj.bias"]
    return x


def plain_image(state: dict[str, Tensor], pixels: Tensor, quick: bool) -> Tensor:
    patches = (
        nn.functional.conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    )
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], dim=1) + state["visual.positional_embedding"]
    x = nn.functional.layer_norm(x, (16,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = plain_side(state, "visual.", x, quick, causal=False)[:, 0]
    x = nn.functional.layer_norm(x, (16,), state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return nn.functional.normalize(x @ state["visual.proj"], dim=-1)


def plain_text(state: dict[str, Tensor], ids: Tensor, quick: bool) -> Tensor:
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = plain_side(state, "", x, quick, causal=True)
    x = nn.functional.layer_norm(x, (32,), state["ln_final.weight"], state["ln_final.bias"])
    return nn.functional.normalize(
        x[torch.arange(len(ids)), ids.argmax(-1)] @ state["text_projection"], dim=-1
    )


@pytest.fixture(scope="module")
def tiny() -> OpenClip:
    return tiny_open_clip()


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer()


@pytest.mark.parametrize("quick", [False, True])
def test_features_equal_a_plain_forward_pass(quick: bool, tmp_path: Path) -> None:
    state = open_clip_state()
    torch.save(state, tmp_path / "clip.pt")
    (tmp_path / "sizes.json").write_text(json.dumps({"model_cfg": SIZES}))
    clip = load_open_clip(tmp_path / "clip.pt", quick, tmp_path / "sizes.json")
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor(
        [[48, 3, 4, 49, 0, 0, 0, 0, 0], [48, 5, 6, 7, 8, 9, 1, 2, 49], [48, 49, 0, 0, 0, 0, 0, 0, 0]]
    )
    with torch.inference_mode():
        assert (clip.encode_image(pixels) - plain_image(state, pixels, quick)).abs().max() < 1e-5
        assert (clip.encode_text(ids) - plain_text(state, ids, quick)).abs().max() < 1e-5
        assert (clip.encode_image(pixels) - plain_image(state, pixels, not quick)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="heads"):
        load_open_clip(tmp_path / "clip.pt", quick)


def test_tokenizer_equals_open_clips(tokenizer: ClipTokenizer) -> None:
    file = find_vocabulary().parent / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("reference_tokenizer", file)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    texts = [
        "an image of a tennis_court",
        "  Ships &amp; boats,\tat 12:30 o'clock!! ",
        "it's the harbour we'll see; they've left",
        "Gebäude, 飞机場, кораблі, 🛰️ and ﬁelds",
        "schÃ¶n",
        "",
        "word " * 100,
        "don’t “quote”",
        "Ⅷ ½ x² 1234567890",
    ]
    assert tokenizer(texts).tolist() == reference.tokenize(texts).tolist()
    assert tokenizer.vocab_size == 49408


def test_vocabulary_files(tmp_path: Path, tokenizer: ClipTokenizer) -> None:
    lines = gzip.decompress(find_vocabulary().read_bytes()).decode("utf-8").split("\n")
    plain = tmp_path / "merges.txt"  # the form that model folders have
    plain.write_text("#version: 0.2\n" + "\n".join(lines[1:48895]) + "\n", encoding="utf-8")
    assert ClipTokenizer(plain)(["a storage tank"]).tolist() == tokenizer(["a storage tank"]).tolist()
    plain.write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="48894"):
        ClipTokenizer(plain)
    with pytest.raises(ValueError, match="no such vocabulary"):
        find_vocabulary(tmp_path / "absent.txt")
    assert clean_text("  A&amp;B \n C ") == "a&b c"


def test_crop_boxes_against_pillow() -> None:
    random = np.random.default_rng(0)
    height, width = 90, 130
    boxes = np.column_stack(
        [random.integers(0, 130, 300), random.integers(0, 90, 300), random.integers(1, 60, (300, 2))]
    )
    boxes = boxes.astype(float)
    picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for scale, least in ((1.2, 0), (1.0, 0), (2.0, 40)):
        windows = crop_boxes(boxes, height, width, scale, least)
        for (x, y, w, h), window in zip(boxes, windows.tolist()):
            wide, tall = max(least, w * scale), max(least, h * scale)
            x0, y0 = max(x + w / 2 - wide / 2, 0), max(y + h / 2 - tall / 2, 0)
            x1, y1 = min(x + w / 2 + wide / 2, width), min(y + h / 2 + tall / 2, height)
            expected = picture.crop((x0, y0, x1, y1))
            if min(expected.size) > 0:
                assert np.array_equal(np.asarray(picture.crop(window)), np.asarray(expected))


def test_crops_are_never_empty(caplog: pytest.LogCaptureFixture) -> None:
    boxes = np.array(
        [[10, 10, 0, 5], [10, 10, 0, 0], [99, 49, 3, 3], [100, 50, 0, 0], [300, 20, 4, 4]], float
    )
    windows = crop_boxes(boxes, 50, 100)
    assert (windows[:, 2:] > windows[:, :2]).all()
    assert (windows >= 0).all() and (windows[:, 2:] <= [100, 50]).all()
    assert "1 boxes begin outside" in caplog.text


@pytest.mark.parametrize("size", [(300, 20), (20, 300), (224, 224), (500, 400), (231, 231), (1, 9)])
def test_square_has_the_short_side_and_the_centre(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    square = np.asarray(fit_square(image, 64))
    assert square.shape == (64, 64, 3)
    width, height = size
    long = int(64 * max(size) / min(size))
    whole = np.asarray(
        image.resize((64, long) if width <= height else (long, 64), Image.Resampling.BICUBIC), int
    )
    offset = round((long - 64) / 2)
    part = whole[offset : offset + 64] if width <= height else whole[:, offset : offset + 64]
    assert np.abs(part - square).max() <= 3  # Pillow's versions differ in the order of the two passes
    assert fit_square(image.convert("L"), 64).mode == "RGB"


def test_regions_in_batches_and_threads(tiny: OpenClip) -> None:
    random = np.random.default_rng(1)
    image = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    boxes = np.column_stack([random.integers(0, 50, (9, 2)), random.integers(3, 30, (9, 2))])
    whole = RegionEncoder(tiny, batch_size=100, workers=1)(image, boxes)
    parts = RegionEncoder(tiny, batch_size=4, workers=3)(image, boxes)
    assert torch.allclose(whole, parts, atol=1e-5) and whole.shape == (9, 16)
    assert torch.allclose(whole.norm(dim=-1), torch.ones(9))
    alone = RegionEncoder(tiny)(image, boxes[5:6])
    assert torch.allclose(alone, whole[5:6], atol=1e-5)
    assert RegionEncoder(tiny)(image, np.zeros((0, 4))).shape == (0, 16)


def test_texts_are_encoded_once(
    tiny: OpenClip, tokenizer: ClipTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = tiny.encode_text
    monkeypatch.setattr(tiny, "encode_text", lambda ids: seen.append(len(ids)) or encode(ids))
    texts = TextEncoder(tiny, tokenizer, batch_size=2)
    first = texts.labels(["ship", "plane", "ship", "harbor"])
    again = texts.labels(["harbor", "tank", "ship"])
    assert seen == [2, 1, 1]
    assert (
        torch.equal(first[0], first[2])
        and torch.equal(first[3], again[0])
        and torch.equal(first[0], again[2])
    )
    assert texts([]).shape == (0, 16)


def test_prompts() -> None:
    names = ["Airport", "ship", "umbrella", "tennis_court"]
    assert prompts_of(names, "plain_a")[0] == "an image of a Airport"
    assert prompts_of(names)[::2] == ["an image of an Airport", "an image of an umbrella"]
    assert prompts_of(["{article} dock"], "one {name} from {article} plane") == [
        "one {article} dock from a plane"
    ]
    with pytest.raises(ValueError, match="default"):
        prompts_of(names, "published")


def test_scores_and_counts_of_a_match(tiny: OpenClip, tokenizer: ClipTokenizer) -> None:
    texts = torch.eye(3)
    regions = nn.functional.normalize(torch.tensor([[3.0, 1, 0], [2, 1, 0], [1, 0, 0], [0, 0, 1]]), dim=-1)
    found = match_features(regions, texts, {"a": 1, "b": 1, "c": 1})
    similarity = regions.numpy()
    assert sorted(found.labels) == ["a", "b", "c"] and found.regions.tolist() == sorted(
        found.regions.tolist()
    )
    assert found.labels == ["b", "a", "c"] and found.regions.tolist() == [1, 2, 3]
    assert found.row_max == pytest.approx(similarity[found.regions].max(axis=1))
    assert found.similarity == pytest.approx([similarity[1, 1], similarity[2, 0], similarity[3, 2]])
    matcher = Matcher(TextEncoder(tiny, tokenizer), RegionEncoder(tiny))
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    boxes = np.array([[0, 0, 9, 9], [10, 10, 20, 20], [5, 30, 10, 5]], float)
    assert sorted(matcher(image, boxes, {"ship": 1, "tank": 9}).labels).count("tank") >= 2
    assert matcher(image, boxes, {}).labels == [] and matcher(image, boxes[:0], {"ship": 1}).labels == []


def test_label_classes(tiny: OpenClip, tokenizer: ClipTokenizer) -> None:
    texts = TextEncoder(tiny, tokenizer)
    found = label_classes(texts, ["ship", "Ship "], ["harbor", "ship"], 0.99)
    assert found["ship"].name == "ship" and found["ship"].accepted
    assert found["ship"].similarity == pytest.approx(1.0, abs=1e-5)
    assert not label_classes(texts, ["ship"], ["harbor", "ship"], 1.01)["ship"].accepted
    assert label_classes(texts, [], ["ship"]) == {} == label_classes(texts, ["ship"], [])


def test_named_checkpoints(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "georsclip: files/a.pt\nskyclip: files/b.pt\n"
        "mine: {file: c.pt, quick_gelu: true, vocabulary: merges.txt}\n"
        "odd: {file: c.pt, heads: 3}\nnone: 3\n"
    )
    assert clip_entry("georsclip", config).file == tmp_path / "files" / "a.pt"
    assert [clip_entry(n, config).quick_gelu for n in ("georsclip", "skyclip", "mine")] == [False, True, True]
    assert clip_entry("mine", config).vocabulary == tmp_path / "merges.txt"
    for name, message in (("dfn2b", "it names georsclip"), ("odd", "heads"), ("none", "field `file`")):
        with pytest.raises(ValueError, match=message):
            clip_entry(name, config)
    with pytest.raises(ValueError, match="a.pt is not there"):
        clip_entry("georsclip", config).load()
    with pytest.raises(ValueError, match="no checkpoint config"):
        clip_entry("georsclip", tmp_path / "absent.yaml")
    assert clip_entry("tiny", tmp_path / "absent.yaml").load().side == 224


def test_shipped_config_names_every_variant() -> None:
    names = ("dfn2b", "remoteclip", "remoteclip-b32", "georsclip", "georsclip-b32", "skyclip", "skyclip-b32")
    assert {n: clip_entry(n, REPO / DEFAULT_CONFIG).quick_gelu for n in names} == {
        n: n in QUICK_GELU_NAMES for n in names
    }
