"""Forward passes of a HookedTransformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tl_factedit.backend.packing import Packing


class PastEntry:
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
def packed_attention(attn: Any, packing: Packing) -> Iterator[None]:
    """Let a HookedTransformer's attention rotate and mask by the packing instead of by the order in the row."""
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
