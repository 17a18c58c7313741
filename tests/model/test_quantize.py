"""Rounded language model weights: errors, what stays untouched, masks beside full precision, refusals."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dataset.registry import load_dataset
from dataset.synthetic import write_scenes
from model import quantize
from model.checkpoint import load_lisat
from model.lora import add_lora
from model.quantize import Int8Linear, quantize_llm, unsupported
from tests.conftest import REPO
from tests.tiny_lisat import tiny_model
from utils.config import ConfigError, parse_config
from utils.demo_lisat import DemoConfig
from utils.evaluate_lisat import EvalConfig
from utils.predict_lisat import Protocol, llm_weights, load_for_inference, predict
from utils.predictions import decode_mask

SHIPPED = REPO / "checkpoints" / "lisat_tiny"


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that may change, by name."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {n: m for n, m in model.named_modules() if n.startswith("llm.model.layers") and n.endswith(names)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_row_is_within_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(30, 17).to(dtype)
    rounded = Int8Linear(linear)
    x = torch.randn(2, 5, 30, dtype=dtype)
    weight = rounded.weight.float() * rounded.scale[:, None] / 127
    step = linear.weight.float().abs().amax(1, keepdim=True) / 127
    assert ((weight - linear.weight.float()).abs() <= step * 0.501 + 1e-7).all()
    expected = x.float() @ weight.T + linear.bias.float()
    assert rounded(x).dtype == dtype and torch.allclose(rounded(x).float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("form", "share"), [("int8", 0.3), ("int4", 0.2)])
def test_only_the_blocks_of_the_language_model_change(form: str, share: float) -> None:
    plain, _ = load_lisat(SHIPPED)
    model, _ = load_lisat(SHIPPED)
    done = quantize_llm(model, form)
    assert done.matrices == len(blocks(plain)) and done.bytes_after < share * done.bytes_before
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if "_proj" not in name or "llm" not in name
    }
    before = plain.state_dict()
    assert set(before) - set(kept) == {f"{name}.weight" for name in blocks(plain)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    x = torch.randn(3, 128)
    for name, layer in blocks(model).items():
        if layer.in_features == 128:
            exact = blocks(plain)[name](x)
            error = (layer(x) - exact).norm() / exact.norm()
            assert 0 < error < {"int8": 0.02, "int4": 0.16}[form], (name, error)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 5, seed=11)
    return folder


@pytest.fixture(scope="module")
def full(scenes: Path) -> tuple[list[dict], torch.Tensor]:
    return answers(scenes, "")


def answers(scenes: Path, form: str) -> tuple[list[dict], torch.Tensor]:
    """Query records of all scenes, and the output logits of a fixed text."""
    model, tokenizer, processor = load_for_inference(SHIPPED, precision="fp32", llm_weights=form)
    protocol = Protocol("forced", conv_type=model.config.conv_type)
    data = load_dataset(f"generic:{scenes}", train=False, prompt="forced", templates=model.config.templates)
    records = [r for *_, found in predict(model, tokenizer, processor, data, protocol) for r in found]
    with torch.inference_mode():
        logits = model.llm(input_ids=torch.arange(3, 40)[None]).logits[0]
    return records, logits


@pytest.mark.parametrize(("form", "least_iou", "most_error"), [("int8", 0.98, 0.02), ("int4", 0.93, 0.1)])
def test_masks_and_logits_beside_full_precision(
    form: str, least_iou: float, most_error: float, scenes: Path, full: tuple[list[dict], torch.Tensor]
) -> None:
    records, logits = answers(scenes, form)
    ious = []
    for rounded, exact in zip(records, full[0], strict=True):
        a, b = decode_mask(rounded["prediction"]), decode_mask(exact["prediction"])
        ious.append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
    error = ((logits - full[1]).norm() / full[1].norm()).item()
    print(
        f"{form}: {len(ious)} masks, IoU mean {np.mean(ious):.4f} least {min(ious):.4f}, logits {error:.4f}"
    )
    assert len(ious) > 20 and np.mean(ious) > least_iou
    assert 0 < error < most_error
    masks = [decode_mask(record["prediction"]) for record in full[0]]
    others = [(a & b).sum() / max(1, (a | b).sum()) for a, b in zip(masks, masks[1:])]
    assert np.mean(others) < least_iou - 0.1  # masks of other questions are further away


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()  # MLP rows of 48 weights
    with pytest.raises(ValueError, match=r"blocks of 32.*down_proj \(48\).*int8"):
        quantize_llm(model, "int4")
    assert "unknown" in unsupported(model, "int2")[0]
    assert any("mps" in fault for fault in unsupported(model, "int8", "mps"))
    assert any("float64" in fault for fault in unsupported(tiny_model().double(), "int8"))
    adapted = tiny_model()
    add_lora(adapted)
    assert any("merge" in fault for fault in unsupported(adapted, "int8"))
    quantize_llm(model, "int8")
    with pytest.raises(ValueError, match="only once"):
        quantize_llm(model, "int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {quantize.PACKAGE}=={quantize.VERSION}"):
        quantize_llm(tiny_model(), "int8")
    pinned = (REPO / "requirements.txt").read_text().splitlines()
    assert f"{quantize.PACKAGE}=={quantize.VERSION}" in pinned


@pytest.mark.parametrize("config", [EvalConfig, DemoConfig])
def test_flags(config: type) -> None:
    assert llm_weights(parse_config(config, ["--load_in_8bit"])) == "int8"
    assert llm_weights(parse_config(config, ["--load_in_4bit"])) == "int4"
    assert llm_weights(parse_config(config, [])) == ""
    with pytest.raises(ConfigError, match="exclude each other"):
        parse_config(config, ["--load_in_8bit", "--load_in_4bit"])
