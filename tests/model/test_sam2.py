"""SAM 2: against transformers' own forward pass, sizes, files, precisions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.sam2 import SAM2_CONFIGS, Sam2, Sam2Config, random_sam2, sam2_config, transformers_config
from model.sam2_files import POSITIONS, infer_sam2_config, load_sam2, map_sam2_key, plan_sam2, sam2_on_meta

HUB_MATRICES = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)


@pytest.fixture(scope="module")
def toy() -> Sam2:
    return random_sam2()


def hub_state(model: Sam2) -> dict[str, torch.Tensor]:
    """The weights in transformers' names."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    matrix = state.pop(POSITIONS)
    return state | {name: matrix.clone() for name in HUB_MATRICES}


def official_name(name: str) -> str:
    """An original name for one of ours, by search over what the key map says of candidates."""
    stems = [
        ("vision_encoder.backbone.", "image_encoder.trunk."),
        ("vision_encoder.neck.convs.", "image_encoder.neck.convs."),
        ("prompt_encoder.", "sam_prompt_encoder."),
        ("mask_decoder.", "sam_mask_decoder."),
    ]
    swaps = [("", ""), ("projection", "proj"), ("o_proj", "out_proj"), ("layer_norm", "norm")]
    swaps += [
        ("proj_in", "layers.0"),
        ("proj_out", "layers.1"),
        ("proj_out", "layers.2"),
        ("layers.0", "layers.1"),
    ]
    swaps += [
        (f"upscale_{a}", f"output_upscaling.{b}") for a, b in (("conv1", 0), ("layer_norm", 1), ("conv2", 3))
    ]
    mask = (("conv1", 0), ("layer_norm1", 1), ("conv2", 3), ("layer_norm2", 4), ("conv3", 6))
    swaps += [(f"mask_embed.{a}", f"mask_downscaling.{b}") for a, b in mask]
    for new, old in stems:
        if name.startswith(new):
            body = name.removeprefix(new)
            if "convs" in new:
                number, leaf = body.split(".")
                body = f"{number}.conv.{leaf}"
            for a, b in swaps:
                for tail in (body.replace(a, b), b.join(body.rsplit(a, 1)) if a else body):
                    fate = map_sam2_key(old + tail)
                    if getattr(fate, "name", "") == name:
                        return old + tail
    raise AssertionError(name)


@torch.inference_mode()
def test_same_numbers_as_transformers(toy: Sam2) -> None:
    from transformers import Sam2Model

    reference = Sam2Model(transformers_config(toy.config)).eval()
    reference.load_state_dict(hub_state(toy))
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (90, 70, 3), np.uint8), rng.integers(0, 256, (128, 140, 3), np.uint8)]
    pixels = toy.preprocess(pictures)
    points = torch.rand(2, 5, 2, 2) * toy.config.image_size
    labels = torch.tensor([[1, 0], [1, 1], [0, 1], [2, 3], [1, -1]]).expand(2, 5, 2)
    features = toy.encode(pixels)
    for multi, tokens in ((True, slice(1, None)), (False, slice(0, 1))):
        wanted = reference(
            pixel_values=pixels, input_points=points, input_labels=labels, multimask_output=multi
        )
        for k in range(2):
            decoded = toy.decode(features[k], points[k], labels[k])
            assert torch.allclose(decoded.iou[:, tokens], wanted.iou_scores[k], atol=1e-5)
            masks = toy.mask_logits(features[k], decoded, torch.arange(5), tokens)
            assert torch.allclose(masks, wanted.pred_masks[k], atol=1e-4)
            assert masks.std() > 0.5
            chosen = torch.tensor([4, 1])
            some = toy.mask_logits(features[k], decoded, chosen, tokens)
            assert torch.allclose(some, masks[chosen], atol=1e-5)


@torch.inference_mode()
def test_batches_change_nothing(toy: Sam2) -> None:
    pictures = [np.random.default_rng(k).integers(0, 256, (60 + k, 50, 3), np.uint8) for k in range(3)]
    together = toy.encode(toy.preprocess(pictures))
    assert len(together) == 3
    for k, picture in enumerate(pictures):
        alone = toy.encode(toy.preprocess([picture]))
        for name in ("embedding", "fine", "middle"):
            assert torch.allclose(getattr(together[k], name), getattr(alone, name), atol=1e-5)


def test_wrong_pictures_are_refused(toy: Sam2) -> None:
    with pytest.raises(ValueError, match="uint8"):
        toy.preprocess([np.zeros((4, 4, 3), np.float32)])
    with pytest.raises(ValueError, match="must be"):
        toy.encode(torch.zeros(1, 3, 64, 64))


@torch.inference_mode()
def test_low_precision_keeps_positions_in_full(toy: Sam2) -> None:
    low = random_sam2().to(torch.bfloat16)
    assert low.positions.positional_encoding_gaussian_matrix.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    picture = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    points, labels = torch.rand(6, 1, 2) * 128, torch.ones(6, 1, dtype=torch.long)
    found = []
    for model in (toy, low):
        features = model.encode(model.preprocess([picture]))
        decoded = model.decode(features, points, labels)
        found.append((decoded.iou.float(), model.mask_logits(features, decoded, torch.arange(6)).float()))
    assert found[1][0].dtype == torch.float32 and (found[0][0] - found[1][0]).abs().max() < 0.1
    agree = ((found[0][1] > 0) == (found[1][1] > 0)).float().mean()
    assert agree > 0.95


@pytest.mark.parametrize("name", [name for name in SAM2_CONFIGS if name != "sam2_toy"])
def test_published_sizes_are_told_by_their_weights(name: str) -> None:
    model = sam2_on_meta(sam2_config(f"configs/sam2.1/{name.replace('sam2_', 'sam2.1_')}.yaml"))
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    shapes |= {HUB_MATRICES[0]: shapes.pop(POSITIONS), "memory_encoder.x": (1,), "no_object_pointer": (1, 2)}
    assert infer_sam2_config(shapes) == SAM2_CONFIGS[name]
    report = plan_sam2(shapes, model)
    assert not report.faulty and len(report.ignored) == 2


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="sam2_hiera_l"):
        sam2_config("sam3")
    with pytest.raises(ValueError, match="unknown fields"):
        Sam2Config.from_dict({"depth": 3})
    config = replace(SAM2_CONFIGS["sam2_toy"], image_size=256)
    assert Sam2Config.from_dict(config.to_dict()) == config


def test_transformers_files_are_read(toy: Sam2, tmp_path: Path) -> None:
    save_file(hub_state(toy), tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        model = load_sam2(path, dtype=torch.bfloat16)
        assert model.config == toy.config and model.dtype == torch.bfloat16 and not model.training
        for name, tensor in model.state_dict().items():
            dtype = torch.float32 if name == POSITIONS else torch.bfloat16
            assert torch.equal(tensor, toy.state_dict()[name].to(dtype)), name


def test_original_files_are_read_safely(toy: Sam2, tmp_path: Path) -> None:
    state = {}
    for name, tensor in toy.state_dict().items():
        if name == POSITIONS:
            state["sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = tensor
        elif name == "no_memory_embedding":
            state["no_mem_embed"] = tensor
        elif name == "prompt_encoder.point_embed.weight":
            state |= {f"sam_prompt_encoder.point_embeddings.{k}.weight": tensor[k : k + 1] for k in range(4)}
        else:
            state[official_name(name)] = tensor
    memory = {
        "memory_attention.layers.0.norm1.weight": torch.ones(3),
        "obj_ptr_tpos_proj.bias": torch.ones(2),
    }
    file = tmp_path / "sam2.pt"
    torch.save({"model": state | memory}, file)
    model = load_sam2(file)
    assert all(torch.equal(tensor, toy.state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.save({"model": state | {"memory_attentions.x": torch.ones(1)}}, file)
    with pytest.raises(ValueError, match="memory_attentions.x"):
        load_sam2(file)
    del state["sam_prompt_encoder.point_embeddings.2.weight"]
    torch.save({"model": state}, file)
    with pytest.raises(ValueError, match=r"point_embed.weight\[2\]"):
        load_sam2(file)
    torch.save({"model": {"x": Path("code")}}, file)
    with pytest.raises(ValueError, match="sam2.pt"):
        load_sam2(file)
