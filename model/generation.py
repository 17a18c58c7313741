"""Answering: greedy decoding with a key/value cache that is filled once per image, and the masks.

Shapes: R token rows (questions), G packs (R rows behind G shared prefixes), P longest prefix, S longest
own part, Z cache slots, A rows still decoding, H width, M `[SEG]` tokens, K of one row, C prompt width.

The prompt of an image's rows is filled once, its cache is handed to each of them, and every row then
decodes on its own. The state that predicted `[SEG]` is kept at the step that emitted it; `[SEG]` tokens
in the prompt count too (the published protocol puts one there). No pass is repeated for the masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model._torchvision import ensure_torchvision
from model.llava import Packed, Row, pack_rows, predictions_of_token, split_rows

ensure_torchvision()

from transformers import DynamicCache  # noqa: E402

Pick = Callable[[Tensor], Tensor]
"""Chooses next tokens (A,) from logits (A, V)."""


@dataclass
class RowAnswer:
    """The answer to one token row.

    `output_ids` prompt and answer, `new_ids` the answer (with its end token). One mask per `[SEG]` in
    the two together: `mask_logits` (K, H, W) fp32, `masks` (K, H, W) bool, `scores` (K,) fp32, on the
    CPU. `present` says whether any mask has a pixel ("nothing here" otherwise). `size` is (H, W).
    """

    output_ids: list[int]
    new_ids: list[int]
    mask_logits: Tensor
    masks: Tensor
    scores: Tensor
    present: bool
    size: tuple[int, int]


def mask_scores(logits: Tensor) -> Tensor:
    """Mean foreground probability (K,) of mask logits (K, H, W): over pixels above 0.5, 0 for none."""
    probability = logits.float().flatten(1).sigmoid()
    inside = probability > 0.5
    return (probability * inside).sum(1) / inside.sum(1).clamp(min=1)


def greedy(logits: Tensor) -> Tensor:
    """The most likely tokens (A,) of logits (A, V)."""
    return logits.float().argmax(-1)


def to_official(answers: Sequence[RowAnswer], pad_id: int = 0) -> tuple[Tensor, list[Tensor], list[bool]]:
    """The published tuple: ids (R, L+new) left-padded prompts and answers filled with `pad_id`, the first
    mask of every row as int (H, W), zeros where there is none, and whether that mask has a pixel."""
    prompt = max(len(a.output_ids) - len(a.new_ids) for a in answers)
    new = max(len(a.new_ids) for a in answers)
    ids = torch.full((len(answers), prompt + new), pad_id, dtype=torch.long)
    masks, present = [], []
    for r, a in enumerate(answers):
        start = prompt - (len(a.output_ids) - len(a.new_ids))
        ids[r, start : start + len(a.output_ids)] = torch.tensor(a.output_ids)
        masks.append(a.masks[0].int() if len(a.masks) else torch.zeros(a.size, dtype=torch.int32))
        present.append(bool(masks[-1].any()))
    return ids, masks, present


@dataclass
class _Decoding:
    """Rows being decoded: which ones, their cache, its valid slots (A, Z), next positions (A,), last
    states (A, H)."""

    rows: list[int]
    cache: DynamicCache
    valid: Tensor
    position: Tensor
    last: Tensor

    def keep(self, chosen: list[int]) -> None:
        """Drop all but the chosen entries."""
        at = torch.tensor(chosen, device=self.last.device)
        self.rows = [self.rows[i] for i in chosen]
        self.cache.batch_select_indices(at)
        self.valid, self.position, self.last = self.valid[at], self.position[at], self.last[at]


class Generation(nn.Module):
    """The answering half of `Lisat`; uses its parts (`llm`, `hidden_states`, `decode_prompts`, ...)."""

    @torch.no_grad()
    def evaluate(
        self,
        images_clip: Tensor | None,
        images: Tensor | None,
        input_ids: Tensor,
        sam_mask_shape_list: Sequence[Any] | None,
        max_new_tokens: int = 512,
        *,
        offset: Tensor | Sequence[int] | None = None,
        attention_masks: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        pick: Pick = greedy,
        score: str = "foreground",
        eos_token_id: int | None = None,
        cached: bool = True,
        compat_leftpad_mask: bool = False,
        compat_unk_mask: bool = False,
        max_image_batch: int | None = None,
        max_prompt_batch: int = 64,
    ) -> list[RowAnswer]:
        """Answer every token row and draw the masks its `[SEG]` tokens ask for.

        input_ids (R, L) with -200 for the image, padded on either side; attention_masks (R, L) marks
        real tokens (None: runs of the pad id at the ends are padding). offset (B+1,) cumulative rows per
        image, None = one image per row. images_clip (B, 3, c, c); images (B, 3, S, S) or
        image_embeddings (B, C, G, G), encoded only where a mask is asked for. sam_mask_shape_list
        ((h_in, w_in), (H, W)) per image or per row.

        Decoding stops at the end token or after `max_new_tokens`; with 0 one pass over the prompts gives
        the masks of the `[SEG]` in them. `score`: `foreground` (mean foreground probability) or `iou`
        (SAM's own estimate). `cached` False re-runs whole sequences (slow; for tests).
        `compat_leftpad_mask` repeats what the published evaluation does to left-padded batches: rows see
        their padding. `compat_unk_mask` hides every token with the pad id, which is also that of unknown
        words, as the published masks by id do. Returns one `RowAnswer` per row.
        """
        if compat_leftpad_mask and compat_unk_mask:
            raise ValueError("compat_leftpad_mask and compat_unk_mask exclude each other")
        if score not in ("foreground", "iou"):
            raise ValueError(f"score is {score!r}; known: foreground, iou")
        config = self.config
        pad_id = config.llm.get("pad_token_id") or 0
        if compat_unk_mask:
            attention_masks = input_ids != pad_id
        rows = split_rows(input_ids, attention_masks, None, offset, pad_id, holes=compat_unk_mask)
        num_images = len(offset) - 1 if offset is not None else len(rows)
        sizes = _row_sizes(sam_mask_shape_list, rows, num_images)
        eos = self.llm.config.eos_token_id if eos_token_id is None else eos_token_id
        ends = set(eos) if isinstance(eos, list | tuple) else {eos}
        training = self.training
        self.eval()  # recomputation in training mode would drop the cache
        try:
            if compat_leftpad_mask:
                self._check_compat(rows)
                state, seg = self._prefill_leftpad(rows, images_clip)
                new = self._decode(state, seg, len(rows), max_new_tokens, ends, pick)
            elif max_new_tokens <= 0:
                new, seg = [[] for _ in rows], self._prompt_states(rows, images_clip, True)
            elif cached:
                state, seg = self._prefill(rows, images_clip)
                new = self._decode(state, seg, len(rows), max_new_tokens, ends, pick)
            else:
                new = self._decode_uncached(rows, images_clip, max_new_tokens, ends, pick)
                longer = [_longer(row, ids) for row, ids in zip(rows, new, strict=True)]
                seg = self._prompt_states(longer, images_clip, False)
            drawn = self._draw(
                seg, rows, sizes, images, image_embeddings, score, max_image_batch, max_prompt_batch
            )
        finally:
            self.train(training)
        return [
            RowAnswer(row.ids + ids, ids, logits, masks := logits > 0, scores, bool(masks.any()), size)
            for row, ids, (logits, scores), (_, size) in zip(rows, new, drawn, sizes, strict=True)
        ]

    # ---- prompts ----------------------------------------------------------------------------------------

    def _seg_of_prompts(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        return predictions_of_token(rows, self.config.seg_token_id, self.config.num_image_features)

    def _prompt_states(
        self, rows: Sequence[Row], images_clip: Tensor | None, share: bool
    ) -> list[list[Tensor]]:
        """States (H,) that predict `[SEG]`, per row, from one pass without a cache."""
        seg: list[list[Tensor]] = [[] for _ in rows]
        found = self._seg_of_prompts(rows)
        if found:
            layout = pack_rows(rows, self.config.num_image_features, share)
            hidden = self.hidden_states(layout, images_clip)
            for r, p in found:
                seg[r].append(hidden[layout.locate(r, p)])
        return seg

    def _prefill(
        self, rows: Sequence[Row], images_clip: Tensor | None
    ) -> tuple[_Decoding, list[list[Tensor]]]:
        """Fill the cache: shared prefixes once, then every row's own part behind a copy."""
        features = self.config.num_image_features
        layout = pack_rows(rows, features)
        device, own = self.device, [row.fused_length(features) for row in rows]
        prefix_length = max(layout.row_prefix)
        prefix = _columns(layout, prefix_length)
        cache = DynamicCache(config=self.llm.config)
        valid = (prefix.segment == 0).to(device)  # G, P
        first = self.llm.model(
            inputs_embeds=self.embed_packed(prefix, images_clip),
            attention_mask=None if bool(valid.all()) else valid,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state  # G, P, H
        packs = torch.tensor(layout.row_pack, device=device)
        if layout.row_pack != list(range(len(first))):
            cache.batch_select_indices(packs)
        valid = valid[packs]  # R, P
        second, longest = None, max(n - p for n, p in zip(own, layout.row_prefix, strict=True))
        if longest > 0:
            second, valid = self._fill_own(rows, layout, longest, cache, valid)

        def state(row: int, fused: int) -> Tensor:
            at = fused - layout.row_prefix[row]
            return first[layout.row_pack[row], fused] if at < 0 else second[row, at]

        seg: list[list[Tensor]] = [[] for _ in rows]
        for r, p in self._seg_of_prompts(rows):
            seg[r].append(state(r, p))
        last = torch.stack([state(r, n - 1) for r, n in enumerate(own)])
        return _Decoding(list(range(len(rows))), cache, valid, torch.tensor(own, device=device), last), seg

    def _fill_own(
        self, rows: Sequence[Row], layout: Packed, longest: int, cache: DynamicCache, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States (R, S, H) of the rows' own parts behind cached prefixes, and valid slots (R, P+S)."""
        features, device = self.config.num_image_features, self.device
        tails = [  # own parts never hold the image: it ends the prefix
            row.ids[len(row.ids) - (row.fused_length(features) - layout.row_prefix[r]) :]
            if row.fused_length(features) > layout.row_prefix[r]
            else []
            for r, row in enumerate(rows)
        ]
        ids = torch.tensor([t + [0] * (longest - len(t)) for t in tails], device=device)
        lengths = torch.tensor([len(t) for t in tails], device=device)
        steps = torch.arange(longest, device=device)
        real = steps < lengths[:, None]  # R, S
        causal = real[:, None, :] & (steps[:, None] >= steps)  # R, S, S
        mask = torch.cat((valid[:, None].expand(-1, longest, -1), causal), dim=-1)[:, None]
        positions = torch.tensor(layout.row_prefix, device=device)[:, None] + steps
        embeddings = self.llm.model.embed_tokens(ids)
        hidden = self.llm.model(
            inputs_embeds=embeddings,
            attention_mask=self.block_mask(mask, embeddings.dtype),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden, torch.cat((valid, real), dim=1)

    # ---- decoding ---------------------------------------------------------------------------------------

    def _decode(
        self,
        state: _Decoding,
        seg: list[list[Tensor]],
        num_rows: int,
        max_new_tokens: int,
        ends: set[int],
        pick: Pick,
    ) -> list[list[int]]:
        """New ids per row; appends to `seg` the states that emitted `[SEG]`. Finished rows leave."""
        new: list[list[int]] = [[] for _ in range(num_rows)]
        for step in range(max_new_tokens):
            tokens = pick(self.llm.lm_head(state.last)).tolist()
            for i, (row, token) in enumerate(zip(state.rows, tokens, strict=True)):
                new[row].append(token)
                if token == self.config.seg_token_id:
                    seg[row].append(state.last[i])
            going = [i for i, token in enumerate(tokens) if token not in ends]
            if not going or step + 1 == max_new_tokens:
                break
            if len(going) < len(tokens):
                state.keep(going)
            self._advance(state, [tokens[i] for i in going])
        return new

    def _advance(self, state: _Decoding, tokens: list[int]) -> None:
        """One step: feed the tokens (A,), move to the states behind them."""
        embeddings = self.llm.model.embed_tokens(torch.tensor(tokens, device=self.device)[:, None])
        state.valid = torch.cat((state.valid, state.valid.new_ones(len(tokens), 1)), dim=1)
        state.last = self.llm.model(
            inputs_embeds=embeddings,
            attention_mask=self.block_mask(state.valid[:, None, None], embeddings.dtype),
            position_ids=state.position[:, None],
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state[:, 0]
        state.position = state.position + 1

    def _decode_uncached(
        self, rows: Sequence[Row], images_clip: Tensor | None, limit: int, ends: set[int], pick: Pick
    ) -> list[list[int]]:
        """The same answers by running every sequence from its start at each step."""
        features = self.config.num_image_features
        new: list[list[int]] = [[] for _ in rows]
        going = list(range(len(rows)))
        for _ in range(limit):
            now = [_longer(rows[r], new[r]) for r in going]
            layout = pack_rows(now, features, share_prefix=False)
            hidden = self.hidden_states(layout, images_clip)
            ends_at = [layout.locate(i, row.fused_length(features) - 1) for i, row in enumerate(now)]
            tokens = pick(self.llm.lm_head(torch.stack([hidden[at] for at in ends_at]))).tolist()
            for r, token in zip(going, tokens, strict=True):
                new[r].append(token)
            going = [r for r, token in zip(going, tokens, strict=True) if token not in ends]
            if not going:
                break
        return new

    # ---- the published treatment of left padding ----------------------------------------------------------

    def _check_compat(self, rows: Sequence[Row]) -> None:
        if any(row.image_at < 0 for row in rows):
            raise ValueError("compat_leftpad_mask needs an image token in every row, as the published code")

    def _prefill_leftpad(
        self, rows: Sequence[Row], images_clip: Tensor | None
    ) -> tuple[_Decoding, list[list[Tensor]]]:
        """Left-padded rows without any mask: every row sees its padding, positions count it."""
        pads = [max(len(row.ids) for row in rows) - len(row.ids) for row in rows]
        padded = [Row([0] * n + row.ids, row.image) for n, row in zip(pads, rows, strict=True)]
        layout = pack_rows(padded, self.config.num_image_features, share_prefix=False)
        embeddings = self.embed_packed(layout, images_clip)  # R, T, H
        cache = DynamicCache(config=self.llm.config)
        hidden = self.llm.model(
            inputs_embeds=embeddings, past_key_values=cache, use_cache=True
        ).last_hidden_state
        seg: list[list[Tensor]] = [[] for _ in rows]
        for r, p in self._seg_of_prompts(padded):
            seg[r].append(hidden[r, p])
        valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=self.device)
        position = torch.full((len(rows),), valid.shape[1], device=self.device)
        return _Decoding(list(range(len(rows))), cache, valid, position, hidden[:, -1]), seg

    # ---- masks --------------------------------------------------------------------------------------------

    def _draw(
        self,
        seg: Sequence[Sequence[Tensor]],
        rows: Sequence[Row],
        sizes: Sequence[tuple[Any, tuple[int, int]]],
        images: Tensor | None,
        image_embeddings: Tensor | None,
        score: str,
        max_image_batch: int | None,
        max_prompt_batch: int,
    ) -> list[tuple[Tensor, Tensor]]:
        """Mask logits (K, H, W) and scores (K,) of every row, on the CPU."""
        drawn = [(torch.zeros(0, *size), torch.zeros(0)) for _, size in sizes]
        wanted = [r for r, states in enumerate(seg) if states and min(sizes[r][1]) > 0]
        if not wanted or self.sam is None:
            return drawn
        used = sorted({rows[r].image for r in wanted})
        if image_embeddings is None:
            if images is None:
                raise ValueError("an answer holds [SEG]: give images or image_embeddings")
            image_embeddings = self.encode_images(images[used], max_image_batch)
        else:
            image_embeddings = image_embeddings[used]
        prompts = self.prompts(torch.stack([state for r in wanted for state in seg[r]]))
        of_image = [used.index(rows[r].image) for r in wanted for _ in seg[r]]
        parts = [
            self.decode_prompts(prompts[part], of_image[part], None, image_embeddings)
            for part in _slices(len(prompts), max_prompt_batch)
        ]
        low_res, iou = (torch.cat(x) for x in zip(*parts, strict=True))
        start = 0
        for r in wanted:
            mine = slice(start, start + len(seg[r]))
            start = mine.stop
            logits = self.sam.postprocess(low_res[mine], *sizes[r])[:, 0]
            scores = iou[mine, 0].float() if score == "iou" else mask_scores(logits)
            drawn[r] = (logits.cpu(), scores.cpu())
        return drawn


def _longer(row: Row, ids: list[int]) -> Row:
    return Row(row.ids + ids, row.image, unseen=row.unseen)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, count, size)]


def _columns(layout: Packed, length: int) -> Packed:
    """The first `length` positions of every pack, own parts in them turned into padding."""
    segment = layout.segment[:, :length]
    keep = segment == 0
    return Packed(
        layout.ids[:, :length] * keep,
        segment.masked_fill(~keep, -1),
        layout.positions[:, :length],
        layout.is_image[:, :length] & keep,
        layout.images,
        layout.row_pack,
        layout.row_prefix,
        layout.row_start,
    )


def _row_sizes(
    shapes: Sequence[Any] | None, rows: Sequence[Row], num_images: int
) -> list[tuple[Any, tuple[int, int]]]:
    """((h_in, w_in), (H, W)) of every row, from a list per image or per row; zeros without a list."""
    if shapes is None:
        return [((0, 0), (0, 0))] * len(rows)
    if len(shapes) == num_images:
        chosen = [shapes[row.image] for row in rows]
    elif len(shapes) == len(rows):
        chosen = list(shapes)
    else:
        raise ValueError(
            f"sam_mask_shape_list has {len(shapes)} entries for {num_images} images and {len(rows)} rows"
        )
    return [((int(a[0]), int(a[1])), (int(b[0]), int(b[1]))) for a, b in chosen]
