"""A LISAT of a few thousand weights with its tokenizer and processor, made on the spot for tests."""

from pathlib import Path

import torch

from dataset.image import ImageProcessor
from dataset.text import Tokenizer
from model.checkpoint import add_lisat_tokens, save_lisat
from model.lisat import Lisat, LisatConfig
from tests.model.tiny import SAM
from tests.sentencepiece_model import train_sentencepiece

QUICK = {
    "exp_name": "straight",
    "templates": "tiny",
    "precision": "fp32",
    "zero_stage": 0,
    "lr": 1e-2,
    "warmup_steps": 1,
    "lora_dropout": 0.2,
    "text_fcs_scale": 5.0,
    "workers": 0,
    "print_freq": 1,
    "device": "cpu",
    "tensorboard": False,
}
"""Settings of a training of a few steps on this model."""
SENTENCES = (
    "the red ship left of the white house",
    "Please segment the largest blue tank in this image.",
    "Where could a ship berth? There is no such thing here.",
    "Sure, it is here.",
)


def tiny_tokenizer() -> Tokenizer:
    """A 384-piece byte-fallback tokenizer with `[SEG]`, `<im_start>`, `<im_end>`."""
    tokenizer = Tokenizer(train_sentencepiece(SENTENCES, 384))
    add_lisat_tokens(tokenizer)
    return tokenizer


def tiny_processor() -> ImageProcessor:
    """SAM side 64, CLIP side 28."""
    return ImageProcessor(sam_size=64, clip_size=28)


def tiny_model(seed: int = 0, conv_type: str = "llava_v1") -> Lisat:
    """Random weights, eval mode."""
    tokenizer = tiny_tokenizer()
    llm = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    llm |= dict(num_attention_heads=2, max_position_embeddings=512, pad_token_id=0)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    torch.manual_seed(seed)
    config = LisatConfig(
        llm, vision, SAM, out_dim=16, seg_token_id=tokenizer.seg_token_id, conv_type=conv_type
    )
    model = Lisat(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # large enough that words decide the mask
            torch.nn.init.normal_(parameter, std=0.4 if name.startswith("sam.") else 0.25)
    return model


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """`folder` as `save_lisat` writes it."""
    return save_lisat(tiny_model(seed), folder, tokenizer=tiny_tokenizer(), processor=tiny_processor())
