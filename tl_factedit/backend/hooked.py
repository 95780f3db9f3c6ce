"""Forward passes of a HookedTransformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tl_factedit.backend.causal import check_causal
from tl_factedit.backend.hook_names import EMBED
from tl_factedit.backend.packing import Packing, Past, gather
from tl_factedit.backend.protocol import At, Model, blocks
from tl_factedit.backend.state import unhooked


class HookedBackend:
    """Forward passes of a HookedTransformer.

    Its blocks are called one by one where a pass begins above the first of them, and its attention is given each
    token's place and what it sees.
    """

    refusals: tuple[type[Exception], ...] = ()
    # The keys of a past are turned by where they stand in it, so that it has to be of one sequence.
    mixes_pasts = False

    def __init__(self, model: Model) -> None:
        self._model: Any = model
        self._blocks = blocks(model)
        with unhooked(self._model.modules()):  # a user's hooks may want other tokens
            check_causal(model)

    def resid(self, tokens: Tensor, start: tuple[int, Tensor] | None, stop: int) -> Tensor:
        """The residual stream before a block, or after the last one."""
        # The mask is all ones: rows are padded on the right, whatever side the tokenizer pads on.
        mask = torch.ones_like(tokens)
        if start is None:
            return self._model(tokens, stop_at_layer=stop, attention_mask=mask)
        layer, resid = start
        if layer >= len(self._blocks):
            return resid
        if any(getattr(getattr(self._model, name, None), "fwd_hooks", None) for name in (EMBED, "hook_pos_embed")):
            self._model.input_to_embed(tokens, attention_mask=mask)  # for these hooks, as a bridge's see every pass
        return self._model(resid, start_at_layer=layer, stop_at_layer=stop, tokens=tokens, attention_mask=mask)

    def logits(self, tokens: Tensor, at: At | None, start: tuple[int, Tensor] | None) -> Tensor:
        """Logits at some positions, or at all."""
        return self._head(self.resid(tokens, start, len(self._blocks)), at)

    def packed(self, tokens: Tensor, at: At | None, start: tuple[int, Tensor], packing: Packing) -> tuple[Tensor, Past]:
        """Logits of packed rows, and the past that the rows' own tokens make (from `start` on)."""
        del tokens  # the stream is all that its blocks are given
        layer, resid = start
        entries: list[_PastEntry] = []
        for i, block in enumerate(self._blocks[layer:], layer):
            resid = resid.to(block.attn.W_Q.device)
            before = packing.past[i] if packing.past else None
            count = packing.joined[i] if packing.joined else len(resid)
            entries.append(_PastEntry(before, count, block.attn))
            with _packed_attention(block.attn, packing.rows(count)):
                run = block(
                    resid[:count], past_kv_cache_entry=entries[-1], shortformer_pos_embed=None, attention_mask=None
                )
            resid = run if count == len(resid) else torch.cat([run, resid[count:]])
        return self._head(resid, at), tuple(entry.new for entry in entries)

    def why_not_packed(self) -> str:
        """Why no row can be packed, as far as can be told without a pass; ``""`` for no such reason."""
        kind = self._model.cfg.positional_embedding_type
        return "" if kind in ("standard", "rotary") else f"positions of the kind {kind!r} are counted within a row"

    def most_keys(self) -> int | None:
        """None: its attention masks by what it is given, however long a row is."""

    def _head(self, resid: Tensor, at: At | None) -> Tensor:
        if at is not None:
            resid = gather(resid, at)
        if self._model.cfg.normalization_type is not None:
            resid = self._model.ln_final(resid)
        logits = self._model.unembed(resid)
        cap = float(getattr(self._model.cfg, "output_logits_soft_cap", 0) or 0)
        return cap * torch.tanh(logits / cap) if cap > 0 else logits


class _PastEntry:
    """What a HookedTransformer's attention asks of its cache; keeps the new keys and values apart."""

    def __init__(self, past: tuple[Tensor, Tensor] | None, rows: int, attn: Any) -> None:
        self.new: tuple[Tensor, Tensor]
        if past is None:
            heads = attn.cfg.n_key_value_heads or attn.cfg.n_heads
            past = (attn.W_Q.new_zeros(rows, 0, heads, attn.cfg.d_head),) * 2
        self.past_keys, self.past_values = past

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.new = (keys, values)
        return torch.cat([self.past_keys, keys], 1), torch.cat([self.past_values, values], 1)


@contextmanager
def _packed_attention(attn: Any, packing: Packing) -> Iterator[None]:
    """Let the attention rotate and mask by the packing instead of by the order in the row."""
    query = packing.positions
    before = packing.visible.shape[-1] - packing.visible.shape[-2]
    key = torch.cat([torch.arange(before, device=query.device).expand(len(query), -1), query], 1)

    def rotate(x: Tensor, past_kv_pos_offset: int = 0, attention_mask: Any = None) -> Tensor:  # noqa: ARG001
        # Keys come with those of the past, and with an offset of 0; without a past both are the same.
        places = (query if x.shape[1] == query.shape[1] else key).to(attn.rotary_cos.device)
        if int(places.max()) >= len(attn.rotary_cos):
            raise ValueError(f"position {int(places.max())} is beyond the model's {len(attn.rotary_cos)} rotations")
        turned, rest = x[..., : attn.cfg.rotary_dim], x[..., attn.cfg.rotary_dim :]
        cos, sin = attn.rotary_cos[places, None], attn.rotary_sin[places, None]
        return torch.cat([turned * cos + attn.rotate_every_two(turned) * sin, rest], -1)

    def mask(scores: Tensor, past_kv_pos_offset: int = 0, attention_mask: Any = None) -> Tensor:  # noqa: ARG001
        return torch.where(packing.visible[:, None].to(scores.device), scores, attn.IGNORE.to(scores))

    try:
        object.__setattr__(attn, "apply_rotary", rotate)
        object.__setattr__(attn, "apply_causal_mask", mask)
        yield
    finally:
        attn.__dict__.pop("apply_rotary", None)
        attn.__dict__.pop("apply_causal_mask", None)
