"""Images inside token rows: the projector, the splice, and rows packed behind a shared prefix.

Shapes: B images, R token rows, L padded row length, N features per image, D tower width, H width of the
language model, G packs (sequences that the language model sees), T pack length.

A *fused* position counts a row after its one image token became N features. A *pack* is one sequence
for the language model: a prefix that several rows share (everything up to and including the image),
then what is each row's own. Own parts see the prefix and themselves, never each other, so a pack gives
every row the states it would have alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200


def build_projector(kind: str, mm_hidden_size: int, hidden_size: int) -> nn.Module:
    """Projector (.., D) -> (.., H): `linear`, `mlp{d}x_gelu` (d Linear layers) or `identity`."""
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(mm_hidden_size, hidden_size)
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if match is None or int(match[1]) < 1:
        raise ValueError(f"mm_projector_type is {kind!r}; known: linear, mlp<depth>x_gelu, identity")
    layers: list[nn.Module] = [nn.Linear(mm_hidden_size, hidden_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)


@dataclass
class Row:
    """One token row without its padding; not to be changed once made. `ids` may hold one image token;
    `image` is the index of the image it stands for (kept also where the row has no image token: masks
    belong to that image). `labels` align with `ids`. `pads` counts the pads that stood before the row.
    `unseen` are raw indices of tokens that no other position may look at."""

    ids: list[int]
    image: int
    labels: list[int] | None = None
    pads: int = 0
    unseen: tuple[int, ...] = ()

    @cached_property
    def image_at(self) -> int:
        """Raw index of the image token, -1 without."""
        return self.ids.index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in self.ids else -1

    def fused_length(self, features: int) -> int:
        """Length once the image token became `features` positions."""
        return len(self.ids) + (features - 1 if self.image_at >= 0 else 0)

    def fused_at(self, raw: int, features: int) -> int:
        """Fused position of the token at raw index `raw` (the first one of the image)."""
        return raw + (features - 1 if 0 <= self.image_at < raw else 0)

    def predecessor(self, raw: int, features: int) -> int:
        """Fused position whose state predicts the token at raw index `raw` >= 1."""
        return self.fused_at(raw, features) - 1


def split_rows(
    input_ids: Tensor,
    attention_masks: Tensor | None = None,
    labels: Tensor | None = None,
    offset: Tensor | Sequence[int] | None = None,
    pad_id: int = 0,
    holes: bool = False,
) -> list[Row]:
    """Rows (R, L) without padding, left or right, each with the image it belongs to.

    `attention_masks` (R, L) marks real tokens; without it, runs of `pad_id` at both ends are padding, so
    an unknown token inside the text survives. `offset` (B+1,) holds cumulative row counts per image
    (None: one image per row). With `holes`, tokens that a mask leaves out inside a row are kept but unseen.
    ValueError for empty rows, other holes in a mask, or two images in a row.
    """
    ids_of_rows = input_ids.tolist()
    label_rows = labels.tolist() if labels is not None else [None] * len(ids_of_rows)
    mask_rows = attention_masks.bool().tolist() if attention_masks is not None else None
    images = rows_to_images(offset, len(ids_of_rows))
    rows = []
    for r, (ids, row_labels) in enumerate(zip(ids_of_rows, label_rows, strict=True)):
        real = mask_rows[r] if mask_rows is not None else [i != pad_id for i in ids]
        if not any(real):
            raise ValueError(f"token row {r} is empty")
        start, stop = real.index(True), len(real) - real[::-1].index(True)
        if mask_rows is not None and not holes and not all(real[start:stop]):
            raise ValueError(f"attention mask of token row {r} has holes; only padding at the ends is known")
        ids = ids[start:stop]
        if ids.count(IMAGE_TOKEN_INDEX) > 1:
            raise ValueError(f"token row {r} holds {ids.count(IMAGE_TOKEN_INDEX)} image tokens; at most one")
        own_labels = None if row_labels is None else row_labels[start:stop]
        unseen = tuple(i for i, seen in enumerate(real[start:stop]) if not seen) if mask_rows else ()
        rows.append(Row(ids, images[r], own_labels, start, unseen))
    return rows


def rows_to_images(offset: Tensor | Sequence[int] | None, num_rows: int) -> list[int]:
    """Image index of every row from cumulative counts [0, n_0, n_0+n_1, ...]."""
    if offset is None:
        return list(range(num_rows))
    bounds = offset.tolist() if isinstance(offset, Tensor) else [int(x) for x in offset]
    if not bounds or bounds[0] != 0 or bounds[-1] != num_rows or sorted(bounds) != bounds:
        raise ValueError(f"offset {bounds} must rise from 0 to the number of token rows, {num_rows}")
    return [i for i in range(len(bounds) - 1) for _ in range(bounds[i + 1] - bounds[i])]


@dataclass
class Packed:
    """Rows laid out for the language model (CPU tensors).

    ids (G, T) int64, 0 at image and padding positions; segment (G, T): -1 padding, 0 prefix, k >= 1 own
    part of the pack's k-th row; positions (G, T): rotary positions; is_image (G, T); images: image index
    of every pack that holds one, in pack order. Per row: pack, length of its prefix, where its own part
    starts.
    """

    ids: Tensor
    segment: Tensor
    positions: Tensor
    is_image: Tensor
    images: list[int]
    row_pack: list[int]
    row_prefix: list[int]
    row_start: list[int]

    @property
    def shared(self) -> bool:
        """Whether any pack holds more than a prefix (then a block mask is needed)."""
        return bool((self.segment > 0).any())

    def locate(self, row: int, fused: int) -> tuple[int, int]:
        """(pack, position in it) of a row's fused position."""
        prefix = self.row_prefix[row]
        return self.row_pack[row], fused if fused < prefix else self.row_start[row] + fused - prefix

    def attention(self, device: torch.device) -> dict[str, Tensor | None]:
        """`attention_mask` and `position_ids` for the language model.

        Plain packs: a padding mask (G, T), or None without padding. Shared prefixes: a boolean block
        mask (G, 1, T, T), True where a query may look at a key.
        """
        segment = self.segment.to(device)
        if not self.shared:
            padded = bool((self.segment < 0).any())
            return {"attention_mask": (segment >= 0) if padded else None, "position_ids": None}
        query, key = segment[:, :, None], segment[:, None, :]
        length = segment.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        mask = ((query == key) | (key == 0)) & causal  # padding looks at padding and prefix, never seen
        return {"attention_mask": mask[:, None], "position_ids": self.positions.to(device)}


def _group(rows: Sequence[Row], share_prefix: bool) -> list[list[int]]:
    """Row indices per pack: rows of one image with equal tokens before it, if prefixes are shared."""
    groups: dict[tuple, list[int]] = {}
    for r, row in enumerate(rows):
        alone = not share_prefix or row.image_at < 0
        key = (r,) if alone else (row.image, *row.ids[: row.image_at + 1])
        groups.setdefault(("alone", *key) if alone else ("shared", *key), []).append(r)
    return list(groups.values())


def pack_rows(rows: Sequence[Row], features: int, share_prefix: bool = True) -> Packed:
    """Lay out rows in packs. A pack of one row, where no pack has more, is all prefix. Where a row has unseen
    tokens, every row is a pack of its own."""
    groups = _group(rows, share_prefix and not any(row.unseen for row in rows))
    split = any(len(members) > 1 for members in groups)
    row_pack, row_prefix, row_start = ([0] * len(rows) for _ in range(3))
    packs: list[list[tuple[int, int, int]]] = []  # per pack its (id or image token, segment, position)
    for g, members in enumerate(groups):
        fused = [_fuse(rows[r], features) for r in members]
        at = rows[members[0]].image_at
        prefix = at + features if split and at >= 0 else len(fused[0])
        pack = [(token, 0, p) for p, token in enumerate(fused[0][:prefix])]
        for k, r in enumerate(members):
            row_pack[r], row_prefix[r], row_start[r] = g, prefix, len(pack)
            pack += [(token, k + 1, prefix + p) for p, token in enumerate(fused[k][prefix:])]
        packs.append(pack)
        for raw in rows[members[0]].unseen:
            at = rows[members[0]].fused_at(raw, features)
            pack[at] = (pack[at][0], -1, pack[at][2])
    length = max(len(pack) for pack in packs)
    table = torch.tensor([pack + [(0, -1, 0)] * (length - len(pack)) for pack in packs])  # G, T, 3
    ids, segment, positions = table.unbind(-1)
    is_image = ids == IMAGE_TOKEN_INDEX
    images = [rows[members[0]].image for members in groups if rows[members[0]].image_at >= 0]
    ids = ids.masked_fill(is_image, 0)
    return Packed(ids, segment, positions, is_image, images, row_pack, row_prefix, row_start)


def _fuse(row: Row, features: int) -> list[int]:
    at = row.image_at
    if at < 0:
        return row.ids
    return row.ids[:at] + [IMAGE_TOKEN_INDEX] * features + row.ids[at + 1 :]


def splice(embeddings: Tensor, is_image: Tensor, features: Tensor) -> Tensor:
    """Token embeddings (G, T, H) with image features (G', N, H) at the True places of (G, T)."""
    mask = is_image.to(embeddings.device)[..., None]
    return embeddings.masked_scatter(mask, features.to(embeddings.device, embeddings.dtype))


def predictions_of_labels(rows: Sequence[Row], features: int) -> list[tuple[int, int, int]]:
    """(row, fused position, target token) of every supervised token of the rows' labels."""
    found = []
    for r, row in enumerate(rows):
        for raw, label in enumerate(row.labels or ()):
            if label != IGNORE_INDEX and raw >= 1 and row.ids[raw] != IMAGE_TOKEN_INDEX:
                found.append((r, row.predecessor(raw, features), label))
    return found


def predictions_of_token(rows: Sequence[Row], token_id: int, features: int) -> list[tuple[int, int]]:
    """(row, fused position) of the states that predict each occurrence of `token_id`, in row order."""
    return [
        (r, row.predecessor(raw, features))
        for r, row in enumerate(rows)
        for raw, token in enumerate(row.ids)
        if token == token_id and raw >= 1
    ]
