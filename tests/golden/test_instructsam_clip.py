"""CLIP parts of InstructSAM against recorded outputs: ids, weights, features of texts and crops, keys."""

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset.image import load_rgb
from model.clip_tokenizer import ClipTokenizer
from model.instructsam.match import (
    TEMPLATES,
    RegionEncoder,
    TextEncoder,
    crop_boxes,
    label_classes,
    prompts_of,
)
from model.open_clip import (
    OpenClip,
    build_open_clip,
    convert_whole_clip,
    infer_open_clip_config,
    load_open_clip,
)
from tests.conftest import require_golden
from utils.instructsam_files import read_proposals

FOLDER = require_golden("instructsam")
CLIP = FOLDER / "clip"
FEATURES = np.load(CLIP / "features.npz")
MATCHES = json.loads((CLIP / "matching.json").read_text())
CROPS = json.loads((CLIP / "crop_boxes.json").read_text())
PROMPTS = json.loads((CLIP / "prompts.json").read_text())
VARIANTS = {"default": (1.2, 0), "scale1": (1.0, 0), "scale2_min40": (2.0, 40)}
"""crop scale and least crop width of the recorded variants, as their names say"""


@pytest.fixture(scope="module")
def clips() -> dict[str, OpenClip]:
    config, weights = CLIP / "tiny_clip_config.json", CLIP / "tiny_clip.safetensors"
    return {name: load_open_clip(weights, name == "quickgelu", config) for name in ("gelu", "quickgelu")}


@pytest.fixture(scope="module")
def texts(clips) -> dict[str, TextEncoder]:
    tokenizer = ClipTokenizer()
    return {name: TextEncoder(clip, tokenizer) for name, clip in clips.items()}


@pytest.fixture(scope="module")
def proposals() -> dict[str, np.ndarray]:
    found = read_proposals(FOLDER / "dior_mini" / "region_proposals" / "sam2_hiera_l.json")
    return {name: value.boxes for name, value in found.items()}


@pytest.fixture(scope="module")
def region_features(clips, proposals):
    """Region features by activation, picture and variant, each computed once."""

    @functools.cache
    def features(activation: str, stem: str, variant: str) -> torch.Tensor:
        scale, least = VARIANTS[variant]
        encoder = RegionEncoder(clips[activation], crop_scale=scale, min_crop=least, batch_size=50)
        return encoder(picture(stem), proposals[f"{stem}.jpg"])

    return features


def picture(stem: str) -> np.ndarray:
    return load_rgb(FOLDER / "dior_mini" / "JPEGImages-trainval" / f"{stem}.jpg")


def test_prompts_and_ids() -> None:
    recorded = PROMPTS["match_prompts"]
    assert set(recorded) - {"categories"} == set(TEMPLATES) - {"plain_a"}
    for template, expected in recorded.items():
        if template != "categories":
            assert prompts_of(recorded["categories"], template) == expected
    ids = ClipTokenizer()(list(PROMPTS["token_ids"]))
    assert ids.tolist() == list(PROMPTS["token_ids"].values())


def test_crop_boxes(proposals) -> None:
    for name, expected in CROPS.items():
        found = crop_boxes(proposals[name], 800, 800)
        assert found.tolist() == [entry["crop_box_int"] for entry in expected]


def test_preprocessed_crops(clips, proposals) -> None:
    encoder = RegionEncoder(clips["gelu"])
    with np.load(CLIP / "preprocessed_crops.npz") as recorded:
        for key in recorded.files:
            stem, number = key.split("/")
            boxes = proposals[f"{stem}.jpg"][int(number) :][:1]
            pixels = next(encoder.pixel_batches(picture(stem), boxes))
            difference = np.abs(clips["gelu"].normalise(pixels)[0].numpy() - recorded[key]).max()
            assert difference <= 1e-5, key


@pytest.mark.parametrize("match", MATCHES, ids=lambda match: match["key"])
def test_features(match, texts, region_features) -> None:
    activation, stem, _, variant = match["key"].split("/")
    recorded = {name: FEATURES[f"{match['key']}/{name}_features"] for name in ("text", "region")}
    text = texts[activation].labels(list(match["counts_after_filter"]))
    np.testing.assert_allclose(text.numpy(), recorded["text"], atol=1e-4)
    regions = region_features(activation, stem, variant)
    np.testing.assert_allclose(regions.numpy(), recorded["region"], atol=1e-4)
    np.testing.assert_allclose((regions @ text.T).numpy(), FEATURES[f"{match['key']}/similarity"], atol=1e-4)


def test_vocabulary_features_and_activations_differ(texts) -> None:
    names = [
        c["name"]
        for c in json.loads((FOLDER / "dior_mini" / "dior_mini2_ann.json").read_text())["categories"]
    ]
    found = {name: encoder.labels(names).numpy() for name, encoder in texts.items()}
    for activation, features in found.items():
        np.testing.assert_allclose(features, FEATURES[f"{activation}/vocab_text_features"], atol=1e-4)
    assert np.abs(found["gelu"] - found["quickgelu"]).max() > 1e-3


def test_category_maps(texts) -> None:
    records = json.loads((CLIP / "category_map.json").read_text())
    matrices = {r["activation"]: r for r in records if "similarity" in r}
    for record in records:
        classes = matrices[record["activation"]]["categories"]
        encode = texts[record["activation"]]
        if "similarity" in record:
            found = encode.labels(record["labels"], "plain_a") @ encode.labels(classes, "plain_a").T
            np.testing.assert_allclose(found.numpy(), record["similarity"], atol=1e-4)
        else:
            found = label_classes(encode, record["labels"], classes, record["threshold"])
            kept = {label: best.name for label, best in found.items() if best.accepted}
            assert kept == record["map"], record["threshold"]


def test_full_key_lists_fill_the_whole_model() -> None:
    lists = json.loads((FOLDER / "full_keys.json").read_text())
    layouts = {name: entries for name, entries in lists.items() if name.startswith("open_clip")}
    assert layouts
    for entries in layouts.values():
        state = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            for name, shape, dtype in entries
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in convert_whole_clip(state).items()}
        model = build_open_clip(infer_open_clip_config(shapes, quick_gelu=False))
        assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


def test_wrapped_and_prefixed_files(tmp_path, clips) -> None:
    state = load_file(CLIP / "tiny_clip.safetensors")
    wrapped = tmp_path / "wrapped.pt"
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, wrapped
    )
    again = load_open_clip(wrapped, config=CLIP / "tiny_clip_config.json").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in clips["gelu"].state_dict().items())
    for change, message in ((("ln_final.bias", None), "missing"), ((None, "visual.extra"), "visual.extra")):
        broken = {name: value for name, value in state.items() if name != change[0]}
        broken |= {change[1]: torch.zeros(1)} if change[1] else {}
        save_file(
            {name: value.contiguous() for name, value in broken.items()}, tmp_path / "broken.safetensors"
        )
        with pytest.raises(ValueError, match=message):
            load_open_clip(tmp_path / "broken.safetensors", config=CLIP / "tiny_clip_config.json")
