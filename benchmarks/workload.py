"""A mid-size LISAT with random weights, and questions about pictures of noise, for the benchmarks.

Shapes: B images, Q questions per image, R = B Q token rows, L padded row length, S padded SAM side, c
pixels of the tower's input.

The sizes keep the proportions of LISAt-7b, because every part gains differently: the language model's
pass over a prompt costs about as much as SAM's encoder, the tower a thirtieth of it, the output matrix
1 to 2 % of the language model; 256 image features stand behind 36 tokens of system text, as with the
real tokenizer. SAM's side is 512, since at 1024 the attention matrices of so narrow an encoder would weigh
ten times what they weigh in ViT-H.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.lisat import Lisat, LisatConfig
from model.llava import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from model.sam import SamConfig

VOCABULARY = 512
BOS, EOS, SEG, IM_START, IM_END, COLON, FULL_STOP = 1, 2, 509, 510, 511, 500, 505
ANSWER = (501, 502, 503, 504, SEG, FULL_STOP, EOS)
"""Seven tokens, as many as `Sure, it is [SEG].</s>` has."""
SYSTEM_TOKENS = 36
"""Tokens before the image: system text, `USER:`, `<im_start>`."""


@dataclass
class Workload:
    """A model in eval mode and what it is asked. `prompts` and `rows` (with answers) hold B x Q token
    lists; images (B, 3, S, S), images_clip (B, 3, c, c), masks B x (Q, H, W), shapes B x ((h_in, w_in),
    (H, W))."""

    model: Lisat
    images: Tensor
    images_clip: Tensor
    prompts: list[list[list[int]]]
    rows: list[list[list[int]]]
    masks: list[Tensor]
    shapes: list[tuple[tuple[int, int], tuple[int, int]]]

    @property
    def offset(self) -> list[int]:
        """Cumulative rows per image, (B+1,)."""
        counts = [0]
        for rows in self.rows:
            counts.append(counts[-1] + len(rows))
        return counts

    def padded(self, rows: Sequence[Sequence[Sequence[int]]]) -> tuple[Tensor, Tensor]:
        """Right-padded ids (R, L) and which of them are real (R, L) bool."""
        flat = [row for of_image in rows for row in of_image]
        length = max(map(len, flat))
        ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in flat])
        return ids, torch.arange(length) < torch.tensor([len(row) for row in flat])[:, None]

    def training_batch(self) -> dict[str, Any]:
        """What `Lisat.forward` takes for a training step; the answers are supervised."""
        ids, real = self.padded(self.rows)
        starts = torch.tensor([len(prompt) for prompts in self.prompts for prompt in prompts])
        supervised = real & (torch.arange(ids.shape[1]) >= starts[:, None])
        return {
            "input_ids": ids,
            "attention_masks": real,
            "labels": ids.masked_fill(~supervised, IGNORE_INDEX),
            "offset": self.offset,
            "images": self.images,
            "images_clip": self.images_clip,
            "masks_list": self.masks,
            "sam_mask_shape_list": self.shapes,
        }


def mid_size() -> LisatConfig:
    """The configuration that the reported figures are of."""
    llm = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 4}
    sam = SamConfig(
        image_size=512,
        embed_dim=256,
        depth=8,
        num_heads=4,
        global_attn_indexes=(7,),
        prompt_embed_dim=64,
        decoder_mlp_dim=512,
        iou_head_hidden_dim=64,
    )
    return _config(llm, vision | {"image_size": 224, "patch_size": 14}, sam)


def tiny() -> LisatConfig:
    """Seconds instead of minutes, for tests; its ratios mean nothing."""
    llm = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sam = SamConfig(
        image_size=64,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        global_attn_indexes=(1,),
        window_size=3,
        prompt_embed_dim=16,
        decoder_heads=2,
        decoder_mlp_dim=32,
        iou_head_hidden_dim=16,
    )
    return _config(llm, vision | {"image_size": 56, "patch_size": 14}, sam)


def _config(llm: dict[str, Any], vision: dict[str, Any], sam: SamConfig) -> LisatConfig:
    llm = llm | {"vocab_size": VOCABULARY, "max_position_embeddings": 1024, "initializer_range": 0.04}
    llm |= {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0}
    return LisatConfig(llm, vision, sam, out_dim=sam.prompt_embed_dim, seg_token_id=SEG)


def build(config: LisatConfig, images: int = 1, questions: int = 3, seed: int = 0) -> Workload:
    """A model with random weights and `questions` questions about each of `images` pictures."""
    torch.manual_seed(seed)
    model = Lisat(config).eval()
    _wake_zero_weights(model.sam)
    _sharpen(model.text_hidden_fcs)
    _sharpen(model.sam.mask_decoder)
    _teach_answer(model)
    prompts = [[_prompt(20 + 6 * q) for q in range(questions)] for _ in range(images)]
    side, c = config.sam.image_size, config.vision["image_size"]
    inner, original = (side * 3 // 4, side), (side * 45 // 64, side * 15 // 16)
    pictures = torch.randn(images, 3, side, side)
    pictures[:, :, inner[0] :] = 0  # SAM's padding
    return Workload(
        model,
        pictures,
        torch.randn(images, 3, c, c),
        prompts,
        [[[*prompt, *ANSWER] for prompt in of_image] for of_image in prompts],
        [(torch.rand(questions, *original) > 0.5).float() for _ in range(images)],
        [(inner, original)] * images,
    )


def _prompt(length: int) -> list[int]:
    """System text, image, a question of `length` tokens, the colon after ASSISTANT."""
    system = [BOS, *range(3, SYSTEM_TOKENS + 1), IM_START]
    question = torch.randint(40, 480, (length,)).tolist()
    return [*system, IMAGE_TOKEN_INDEX, IM_END, *question, COLON]


@torch.no_grad()
def _wake_zero_weights(module: nn.Module) -> None:
    """Positions and relative positions start at zero in the package; a comparison must see them."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


@torch.no_grad()
def _sharpen(module: nn.Module, gain: float = 2.0) -> None:
    """Larger weights on the way to the masks, so that they differ between questions and pictures."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)


@torch.no_grad()
def _teach_answer(model: Lisat) -> None:
    """Let greedy decoding say `ANSWER` after every prompt, by a wide margin.

    Token embeddings get unit entries, so that they survive in the last state beside what the blocks add;
    the output row of each token of the answer then is the (scaled) embedding of the token before it.
    """
    embeddings, head = model.llm.model.embed_tokens.weight, model.llm.lm_head.weight
    embeddings.mul_(1 / embeddings.std())
    head[list(ANSWER)] = 0.4 * nn.functional.normalize(embeddings[[COLON, *ANSWER[:-1]]], dim=-1)
