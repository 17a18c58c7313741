"""A LISAT of a few thousand random weights and token rows made of random ids."""

from typing import Any

import torch
from torch import Tensor

from model.lisat import Lisat, LisatConfig
from model.sam import SamConfig

VOCAB, SEG, IMAGE, EOS = 60, 57, -200, 2
SAM = SamConfig(
    image_size=64,
    patch_size=8,
    embed_dim=16,
    depth=2,
    num_heads=2,
    global_attn_indexes=(1,),
    window_size=3,
    prompt_embed_dim=16,
    mask_in_chans=4,
    decoder_heads=2,
    decoder_mlp_dim=16,
    iou_head_hidden_dim=16,
)


def config(**changes: Any) -> LisatConfig:
    llm = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    llm |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0)
    llm |= dict(bos_token_id=1, eos_token_id=EOS, tie_word_embeddings=False) | changes.pop("llm", {})
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14) | changes.pop("vision", {})
    fields: dict[str, Any] = dict(sam=SAM, out_dim=16, seg_token_id=SEG) | changes
    return LisatConfig(llm=llm, vision=vision, **fields)


def model(seed: int = 0, **changes: Any) -> Lisat:
    torch.manual_seed(seed)
    lisat = Lisat(config(**changes)).eval()
    for name, parameter in lisat.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4 if name.startswith("sam.") else 0.25)
    return lisat


def row(*parts: Any, seed: int = 0) -> list[int]:
    """Ids: a number n stands for n random words, `s` for [SEG], `i` for the image, `e` for the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = [1]
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, 50, (part,), generator=generator).tolist()
        else:
            ids.append({"s": SEG, "i": IMAGE, "e": EOS}[part])
    return ids


def padded(rows: list[list[int]], side: str = "right", fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids (R, L) and mask (R, L)."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.bool)
    for r, values in enumerate(rows):
        at = slice(0, len(values)) if side == "right" else slice(length - len(values), length)
        ids[r, at], mask[r, at] = torch.tensor(values), True
    return ids, mask


def batch(rows: list[list[int]], counts: list[int], side: str = "right", seed: int = 3) -> dict[str, Any]:
    """A training batch: `counts` rows per image; answers start behind the image and two more words."""
    torch.manual_seed(seed)
    ids, mask = padded(rows, side)
    labels = torch.full_like(ids, -100)
    for r, values in enumerate(rows):
        start = (values.index(IMAGE) if IMAGE in values else 0) + 3
        first = int(mask[r].int().argmax())
        labels[r, first + start : first + len(values)] = torch.tensor(values[start:])
    offset = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    shapes, masks = [], []
    for b in range(len(counts)):
        k = sum(values.count(SEG) for values in rows[offset[b] : offset[b + 1]])
        size = (40 + 7 * b, 33)
        shapes.append(((64, 50), size))
        masks.append((torch.rand(k, *size) > 0.5).float())
    return {
        "images": torch.randn(len(counts), 3, 64, 64),
        "images_clip": torch.randn(len(counts), 3, 28, 28),
        "input_ids": ids,
        "labels": labels,
        "attention_masks": mask,
        "offset": offset,
        "masks_list": masks,
        "sam_mask_shape_list": shapes,
    }
