"""Golden `instructsam`: SAM 2 key map and network, the mask generator, holes, polygons, post-processing."""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.check_keys import OTHER_LISTS, as_shapes, check_file, main
from model.instructsam.automatic_masks import (
    GridConfig,
    MaskRecord,
    Runs,
    crop_boxes,
    generate_masks,
    stability_scores,
)
from model.instructsam.predictors import Sam2Predictor
from model.instructsam.propose import fill_holes, mask_polygons, proposals_of
from model.sam2 import Sam2, Sam2Config, transformers_config
from model.sam2_files import VIDEO_ONLY, infer_sam2_config, load_sam2, sam2_on_meta
from tests.conftest import require_golden
from tests.model.instructsam_scene import ScriptedPredictor
from utils.rle import decode_mask, encode_mask, encode_masks

GOLDEN = require_golden("instructsam")
SAM2_LISTS = [name for name in json.loads((GOLDEN / "full_keys.json").read_text()) if name.startswith("sam2")]


def read(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


# ------------------------------------------------------------------------------------------------ weights


@pytest.fixture(scope="module")
def lists() -> dict:
    return read("full_keys.json")


def test_full_key_lists_are_placed_completely(lists: dict) -> None:
    from accelerate import init_empty_weights
    from transformers import Sam2Model

    results = check_file(GOLDEN / "full_keys.json")
    assert SAM2_LISTS and set(SAM2_LISTS) <= set(OTHER_LISTS)
    for name in SAM2_LISTS:
        shapes = as_shapes(lists[name])
        assert results[name].endswith("0 missing, 0 unexpected, 0 misshaped")
        placed, ignored = (int(part.split()[0]) for part in results[name].split(", ")[:2])
        assert placed + ignored == len(lists[name])
        assert ignored == sum(VIDEO_ONLY.fullmatch(key) is not None for key in shapes)
        config = infer_sam2_config(shapes)
        with init_empty_weights():
            theirs = set(Sam2Model(transformers_config(config)).state_dict())
        ours = set(sam2_on_meta(config).state_dict())
        copies = {key for key in theirs if key.endswith(".positional_embedding")}
        assert len(copies) == 2 and theirs - copies == ours - {
            "positions.positional_encoding_gaussian_matrix"
        }
        rows = 3  # four point embeddings fill one tensor; one matrix serves both of transformers' copies
        assert placed - rows + 1 == len(theirs)


def test_a_wrong_list_is_named_completely(
    lists: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {name: copy.deepcopy(lists[name]) for name in SAM2_LISTS}
    entries = wrong[SAM2_LISTS[0]]
    places = {key: k for k, (key, *_) in enumerate(entries)}
    entries[places["image_encoder.trunk.blocks.3.norm1.bias"]][0] += ".oops"
    entries[places["sam_mask_decoder.iou_token.weight"]][1][0] += 1
    entries[places["memory_encoder.fuser.layers.0.gamma"]][0] = "memory_of_something_new"
    (tmp_path / "keys.json").write_text(json.dumps(wrong))
    with pytest.raises(SystemExit) as exit_:
        main(["--check", str(tmp_path / "keys.json")])
    said = capsys.readouterr().err
    assert exit_.value.code == 1 and "norm1.bias.oops" in said and "memory_of_something_new" in said
    assert "1 missing" in said and "2 unexpected" in said and "1 of another shape" in said


# ------------------------------------------------------------------------------------------------ network


def tiny_config() -> Sam2Config:
    values = read("sam2/tiny_sam2_config.json")
    return Sam2Config(
        image_size=values["image_size"],
        embed_dim=values["embed_dim"],
        num_heads=values["num_heads"],
        stages=tuple(values["stages"]),
        window_sizes=tuple(values["window_spec"]),
        global_blocks=tuple(values["global_att_blocks"]),
        position_size=tuple(values["window_pos_embed_bkg_spatial_size"]),
        prompt_embed_dim=values["d_model"],
        top_down_levels=tuple(values["fpn_top_down_levels"]),
    )


@pytest.fixture(scope="module")
def tiny() -> Sam2:
    return load_sam2(GOLDEN / "sam2" / "tiny_sam2.safetensors", tiny_config())


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "sam2" / "network.npz"))


def close(found: torch.Tensor, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
    assert tuple(found.shape) == wanted.shape
    assert np.abs(found.numpy() - wanted).max() <= tolerance


def test_every_stored_weight_is_in_the_model(tiny: Sam2) -> None:
    held = load_file(GOLDEN / "sam2" / "tiny_sam2.safetensors")
    total = sum(t.double().sum() for name, t in held.items() if not VIDEO_ONLY.fullmatch(name))
    assert sum(t.double().sum() for t in tiny.state_dict().values()) == pytest.approx(float(total), abs=1e-6)


def test_unpublished_sizes_must_be_named() -> None:
    with pytest.raises(ValueError, match="--sam2_cfg"):
        load_sam2(GOLDEN / "sam2" / "tiny_sam2.safetensors")


@torch.inference_mode()
def test_network_boundaries(tiny: Sam2, arrays: dict[str, np.ndarray]) -> None:
    pixels = tiny.preprocess([arrays["image_uint8"]])
    close(pixels, arrays["pixel_values"])
    features = tiny.encode(pixels)
    close(features.embedding, arrays["image_embed"])
    close(features.fine, arrays["high_res_s0"])
    close(features.middle, arrays["high_res_s1"])
    close(tiny.dense_positions(), arrays["dense_pe"])
    coords = torch.from_numpy(arrays["points_model_frame"])[:, None]
    labels = torch.ones(len(coords), 1, dtype=torch.long)
    padded = torch.nn.functional.pad(coords, (0, 0, 0, 1)), torch.nn.functional.pad(labels, (0, 1), value=-1)
    close(tiny.sparse(*padded), arrays["sparse_prompt"])
    decoded = tiny.decode(features, coords, labels)
    everyone = torch.arange(len(coords))
    size = arrays["image_uint8"].shape[:2]
    for name, tokens in (("multi", slice(1, None)), ("single", slice(0, 1))):
        close(decoded.iou[:, tokens], arrays[f"{name}/iou"])
        low = tiny.mask_logits(features, decoded, everyone, tokens)
        close(low.clamp(-32, 32), arrays[f"{name}/low_res_logits_clamped32"], 2e-4)
        full = torch.nn.functional.interpolate(low, size, mode="bilinear", align_corners=False)
        close(full, arrays[f"{name}/logits_full_size"], 2e-4)


@torch.inference_mode()
def test_predictor_gives_the_networks_masks(tiny: Sam2, arrays: dict[str, np.ndarray]) -> None:
    predictor = Sam2Predictor(tiny)
    (encoded,) = predictor.encode([arrays["image_uint8"]])
    candidates = predictor.predict(encoded, torch.from_numpy(arrays["points_xy"]))
    close(candidates.iou, arrays["multi/iou"])
    wanted = arrays["multi/logits_full_size"].reshape(-1, *arrays["image_uint8"].shape[:2])
    everything = candidates.logits(torch.arange(len(wanted)))
    close(everything, wanted, 2e-4)
    some = torch.tensor([1, 3, 5, 11])
    close(candidates.logits(some), wanted[some.numpy()], 2e-4)
    close(stability_scores(everything, 0.0, 1.0), arrays["stability_offset1_full_size_multi"])


# ------------------------------------------------------------------------------------------------ generator


SCENES = read("sam2/amg_scene.json")


@pytest.mark.parametrize("number", range(len(SCENES)))
def test_scripted_scene(number: int) -> None:
    scene = SCENES[number]
    rgb = cv2.imread(str(GOLDEN / "sam2" / "scene.png"))[..., ::-1]
    config = GridConfig(**scene["params"])
    boxes = crop_boxes(*rgb.shape[:2], config.crop_n_layers, config.crop_overlap_ratio)
    assert [list(box) for _, box in boxes] == scene["crop_boxes_xyxy"]
    assert [layer for layer, _ in boxes] == scene["crop_layers"]
    predictor = ScriptedPredictor()
    records = generate_masks(predictor, rgb, config)
    assert predictor.points == sum(scene["n_grid_points_per_layer"][layer] for layer in scene["crop_layers"])
    assert len(records) == len(scene["records"])
    rles = encode_masks([record.runs.mask() for record in records])
    for record, rle, wanted in zip(records, rles, scene["records"]):
        assert list(record.bbox) == wanted["bbox"]
        assert record.area == wanted["area"]
        assert rle == wanted["rle"]
        assert list(record.crop_box) == wanted["crop_box"]
        assert record.predicted_iou == pytest.approx(wanted["predicted_iou"], abs=1e-4)
        assert record.stability_score == pytest.approx(wanted["stability_score"], abs=1e-4)
        assert [list(record.point)] == [pytest.approx(point, abs=1e-4) for point in wanted["point_coords"]]


def test_crops_of_the_specification() -> None:
    boxes = [list(box) for _, box in crop_boxes(800, 800, 1, 512 / 1500)]
    assert boxes[1:] == [[0, 0, 537, 537], [0, 264, 537, 800], [264, 0, 800, 537], [264, 264, 800, 800]]


# ------------------------------------------------------------------------------------------ post-processing


def test_holes_and_polygons() -> None:
    masks, expected = np.load(GOLDEN / "masks" / "masks.npz"), read("masks/expected.json")
    assert expected
    for name, wanted in expected.items():
        mask = masks[name]
        assert mask.sum() == wanted["area_in"]
        assert np.array_equal(fill_holes(mask), masks[f"{name}/filled_border_aware"]), name
        legacy = fill_holes(mask, "legacy_corner")
        assert np.array_equal(legacy, masks[f"{name}/filled"]) and legacy.sum() == wanted["area_filled"], name
        assert encode_mask(legacy) == wanted["rle_filled"]
        assert encode_mask(fill_holes(mask, "keep")) == wanted["rle_plain"]
        assert mask_polygons(mask, 1.0, "legacy_corner") == wanted["polygons_eps1"], name


def test_postprocessing() -> None:
    case = read("proposals/postprocess.json")
    records = [
        MaskRecord(
            Runs.of(decode_mask(r["segmentation_rle"])),
            tuple(r["bbox"]),
            r["predicted_iou"],
            r["stability_score"],
            tuple(r["point_coords"][0]),
            tuple(r["crop_box"]),
        )
        for r in case["generator_records"]
    ]
    assert [r.area for r in records] == [r["area"] for r in case["generator_records"]]
    size = case["image_height"], case["image_width"]
    for options, wanted in case["expected"].items():
        values = {key: int(value) for key, value in (pair.split("=") for pair in options.split(","))}
        entry = proposals_of(records, size, holes="legacy_corner", **values).to_json()
        assert entry["scores"] == pytest.approx(wanted["scores"], abs=1e-4), options
        for key in ("bboxes", "labels", "segmentations"):
            assert entry[key] == wanted[key], (options, key)
