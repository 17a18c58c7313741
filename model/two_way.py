"""The two-way transformer of SAM's and SAM 2's mask decoders, over either library's modules.

Shapes: M prompts, T tokens, N image positions, C width. A batch of 1 on the image's side serves all prompts.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Library = Literal["segment_anything", "transformers"]
_NAMES = {  # prefix of the norms, heads of an attention, its last projection
    "segment_anything": ("norm", "norm_final_attn", "num_heads", "out_proj"),
    "transformers": ("layer_norm", "layer_norm_final_attn", "num_attention_heads", "o_proj"),
}


def two_way(
    net: nn.Module, keys: Tensor, key_pe: Tensor, tokens: Tensor, of: Library
) -> tuple[Tensor, Tensor]:
    """Token states (M, T, C) and image states (M, N, C).

    keys, key_pe (M or 1, N, C) image states and their positions; tokens (M, T, C); `of` says whose
    transformer `net` is, and with it the names of its parts.
    """
    norm, final_norm, heads, projection = _NAMES[of]

    def attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        count = max(len(q), len(k))
        q, k, v = (
            f(x).unflatten(-1, (getattr(attention, heads), -1)).transpose(1, 2).expand(count, -1, -1, -1)
            for f, x in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v))
        )
        joined = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return getattr(attention, projection)(joined)

    queries = tokens
    for layer in net.layers:
        norms = [getattr(layer, f"{norm}{i}") for i in (1, 2, 3, 4)]
        if layer.skip_first_layer_pe:
            queries = attend(layer.self_attn, queries, queries, queries)
        else:
            q = queries + tokens
            queries = queries + attend(layer.self_attn, q, q, queries)
        queries = norms[0](queries)
        k = keys + key_pe
        queries = norms[1](queries + attend(layer.cross_attn_token_to_image, queries + tokens, k, keys))
        queries = norms[2](queries + layer.mlp(queries))
        keys = norms[3](keys + attend(layer.cross_attn_image_to_token, k, queries + tokens, queries))
    k = keys + key_pe
    queries = queries + attend(net.final_attn_token_to_image, queries + tokens, k, keys)
    return getattr(net, final_norm)(queries), keys
