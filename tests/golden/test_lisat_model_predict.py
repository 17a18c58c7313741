"""The whole evaluation path on the published folder: question and picture in, published mask and text out."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from dataset.image import load_rgb
from dataset.sample import Conversation, Sample
from model.sam import SamConfig
from tests.conftest import require_golden
from utils.predict_lisat import Protocol, load_for_inference, predict
from utils.predictions import decode_mask

FOLDER = require_golden("lisat_model")
CASES = json.loads((FOLDER / "cases.json").read_text())
MISALIGNED = "eval_batch_leftpad"  # recorded with the published attention mask of left-padded batches
NAMES = [name for name in CASES if name.startswith("eval_")]


@pytest.fixture(scope="module")
def parts() -> tuple:
    sizes = json.loads((FOLDER / "configs.json").read_text())["sam"]
    names = {"vit_patch_size": "patch_size", "transformer_mlp_dim": "decoder_mlp_dim"}
    names |= {"transformer_heads": "decoder_heads", "transformer_depth": "decoder_depth"}
    fields = {names.get(name, name.removeprefix("encoder_")): value for name, value in sizes.items()}
    known = SamConfig.__dataclass_fields__
    sam = SamConfig.from_dict({name: value for name, value in fields.items() if name in known})
    return load_for_inference(FOLDER / "hf_model", sam=sam)  # the folder does not say the decoder's heads


@pytest.mark.parametrize("name", NAMES)
def test_published_case(name: str, parts: tuple) -> None:
    case, tensors = CASES[name], load_file(FOLDER / f"{name}.safetensors")
    forced = case["prompts"][0].endswith("[SEG]</s>")
    protocol = Protocol(
        "forced" if forced else "open",
        conv_type=case["conv_type"],
        max_new_tokens=case["max_new_tokens"],
        compat_leftpad_mask=name == MISALIGNED,
    )
    data = []
    for prompt, file in zip(case["prompts"], case["image_files"], strict=True):
        image = load_rgb(FOLDER / "images" / file)
        question = prompt.partition("<im_end>\n")[2].partition(" ASSISTANT:")[0]
        none = np.zeros((0, *image.shape[:2]), np.uint8)
        data.append(Sample(file, image, [Conversation([(question, None)], none)]))
    for index, _, (record,) in predict(*parts, data, protocol, batch_size=len(data)):
        mask = decode_mask(record["prediction"])
        assert (mask != tensors[f"out.mask_{index}"]).mean() <= 0.001
        assert record["pred_exists"] == case["object_presence"][index]
        if not forced:  # one pass over the prompt writes nothing
            assert record["generated"] == case["generated_text"][index]
