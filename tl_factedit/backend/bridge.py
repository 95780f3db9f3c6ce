"""Forward passes of a TransformerBridge."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from tl_factedit.backend.causal import check_causal
from tl_factedit.backend.hook_names import resid_post
from tl_factedit.backend.hooking import hooked
from tl_factedit.backend.packing import FIRST, Packing, Past, gather
from tl_factedit.backend.protocol import At, Model, UnsupportedModelError, blocks, model_name
from tl_factedit.backend.state import finish_despite_interrupt, unhooked

PACKED_INPUTS = ("attention_mask", "position_ids")
"""What a transformers model has to take, beside the tokens and a cache, for its rows to be packed."""

CACHES = ("cache", "past_key_values")
"""What the cache is called in a model's forward: the newer name first, as the older one is going away."""

OF_BRIDGES = "past_key_values"
"""What a bridge's own attention looks for, whatever the model around it calls its cache (TransformerLens 4.3)."""


class BridgeBackend:
    """Forward passes of a TransformerBridge.

    The wrapped transformers model makes masks and positions from the token ids, so it is always given them; the blocks
    that aren't to be run let the residual stream pass through.

    Args:
        model: The bridge.
        points: Its ``hook_dict``.
    """

    # What a model's own forward may raise that can't be run with a mask and a cache from elsewhere (of RuntimeErrors
    # only those about shapes are taken for that).
    refusals: tuple[type[Exception], ...] = (TypeError, ValueError, RuntimeError)
    mixes_pasts = True

    def __init__(self, model: Model, points: Mapping[str, Any]) -> None:
        self._model: Any = model
        self._points = points
        self._blocks = blocks(model)
        self._arity = self._probe_arity()
        self._renames_cache = False

    def resid(self, tokens: Tensor, start: tuple[int, Tensor] | None, stop: int) -> Tensor:
        """The residual stream before a block, or after the last one."""
        if stop < len(self._blocks):
            with self._from(start):
                return self._model(tokens, stop_at_layer=stop)
        seen: list[Tensor] = []

        def see(resid: Tensor, hook: Any = None) -> None:
            seen[:] = [resid]

        with hooked(self._model, [(resid_post(len(self._blocks) - 1), see)], self._points):
            self.logits(tokens, FIRST, start)
        return seen.pop()

    def logits(self, tokens: Tensor, at: At | None, start: tuple[int, Tensor] | None) -> Tensor:
        """Logits at some positions, or at all."""
        with self._from(start), self._picked(at):
            return self._model(tokens)

    def packed(self, tokens: Tensor, at: At | None, start: tuple[int, Tensor], packing: Packing) -> tuple[Tensor, Past]:
        """Logits of packed rows, and the past that the rows' own tokens make.

        Raises:
            UnsupportedModelError: The model's cache doesn't hold the keys and values of each block.
        """
        found, cache = self._run_packed(tokens, at, start, packing)
        if not self._filled(cache) and not self._renames_cache and self._cache_name() != OF_BRIDGES:
            self._renames_cache = True
            found, cache = self._run_packed(tokens, at, start, packing)
        return found, self._own_past(cache, packing)

    def _run_packed(
        self, tokens: Tensor, at: At | None, start: tuple[int, Tensor], packing: Packing
    ) -> tuple[Tensor, Any]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(packing.past or ()):
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
        resid = start[1]
        seen = packing.visible[:, None].to(resid.device)
        mask = torch.zeros(seen.shape, dtype=resid.dtype, device=resid.device)
        mask.masked_fill_(~seen, torch.finfo(resid.dtype).min)
        joining = self._joining(packing.joined, len(resid), start[0])
        with self._from(start), joining, self._picked(at), self._cache_handed_on():
            # The wrapped model itself, as the bridge's forward makes masks and positions of its own.
            out = self._model.original_model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=packing.positions.to(tokens.device),
                use_cache=True,
                **{self._cache_name(): cache},
            )
        return out.logits, cache

    def why_not_packed(self) -> str:
        """Why no row can be packed, as far as can be told without a pass; ``""`` for no such reason."""
        wrapped = self._model.original_model
        takes = inspect.signature(wrapped.forward).parameters
        missing = [name for name in PACKED_INPUTS if name not in takes]
        missing += [] if self._cache_name() in takes else ["cache"]
        return f"{type(wrapped).__name__} takes no {' and no '.join(missing)}" if missing else ""

    def _cache_name(self) -> str:
        takes = inspect.signature(self._model.original_model.forward).parameters
        return next((name for name in CACHES if name in takes), CACHES[-1])

    def most_keys(self) -> int | None:
        """Most keys that a packed row may have; None for any number.

        The attention of GPT-Neo masks, beside what it is given, by a buffer of its own: causal, and in some layers
        local. As long as a row lies where that is merely causal, it takes nothing away.
        """
        buffers = [b for name, b in self._model.original_model.named_buffers() if name.endswith(".bias")]
        square = [b for b in buffers if b.ndim == 4 and b.shape[-1] == b.shape[-2] and not b.is_floating_point()]
        return min((int(b[0, 0, :, 0].sum()) for b in square), default=None)

    @contextmanager
    def _cache_handed_on(self) -> Iterator[None]:
        """Give each block's attention the cache under the name that it looks for, where the model uses another."""

        def rename(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {OF_BRIDGES if name in CACHES else name: value for name, value in given.items()}

        attentions = [block.attn for block in self._blocks if hasattr(block, "attn")] if self._renames_cache else []
        with ExitStack() as stack:
            for attention in attentions:
                stack.callback(attention.register_forward_pre_hook(rename, with_kwargs=True).remove)
            yield

    def _filled(self, cache: Any) -> bool:
        """Whether a cache holds the keys of all blocks."""
        return len(cache.layers) == len(self._blocks) and all(layer.keys is not None for layer in cache.layers)

    def _own_past(self, cache: Any, packing: Packing) -> Past:
        before = packing.visible.shape[-1] - packing.visible.shape[-2]
        if not self._filled(cache):
            raise UnsupportedModelError(f"the cache of {model_name(self._model)} doesn't hold keys of all its blocks")
        return tuple(
            (layer.keys[:, :, before:].transpose(1, 2), layer.values[:, :, before:].transpose(1, 2))
            for layer in cache.layers
        )

    @contextmanager
    def _picked(self, at: At | None) -> Iterator[None]:
        """Unembed some positions only."""
        if at is None:
            yield
            return
        # At the unembedding and not at ln_final, after which GPT-2, GPT-J and NeoX reshape.
        pick = [("unembed.hook_in", lambda resid, hook: gather(resid, at))]
        with hooked(self._model, pick, self._points):
            yield

    @contextmanager
    def _from(self, start: tuple[int, Tensor] | None) -> Iterator[None]:
        """Let the blocks below `layer` pass through, and the block before it return the residual.

        The token ids are still given, so that masks and positions are made as always. Hooks at their embeddings see
        them where a block is run, but nothing reads what they return.
        """
        if start is None:
            yield
            return
        layer, resid = start
        skipped = self._blocks[:layer]
        handle = None
        names = ("embed", "pos_embed") if layer >= len(self._blocks) else ()
        parts = [getattr(self._model, name, None) for name in names]
        with unhooked(m for part in parts if part is not None for m in part.modules()):
            try:
                if layer == 0:
                    handle = self._blocks[0].register_forward_pre_hook(
                        lambda _m, args, kw: _swap_input(resid, args, kw), with_kwargs=True
                    )
                for block in skipped:
                    given = resid if block is skipped[-1] else None
                    object.__setattr__(block, "forward", self._pass_through(given))
                yield
            finally:

                def put_back() -> None:
                    if handle is not None:
                        handle.remove()
                    for block in skipped:
                        block.__dict__.pop("forward", None)

                finish_despite_interrupt(put_back)

    @contextmanager
    def _joining(self, joined: Sequence[int] | None, rows: int, first: int) -> Iterator[None]:
        """Let each block run the first of the rows only, and hand on the others as they are."""
        if joined is None:
            yield
            return
        blocks = self._blocks[first:]
        try:
            for block, count in zip(blocks, joined[first:], strict=True):
                if count < rows:
                    object.__setattr__(block, "forward", of_first_rows(block.forward, count, rows))
            yield
        finally:

            def put_back() -> None:
                for block in blocks:
                    block.__dict__.pop("forward", None)

            finish_despite_interrupt(put_back)

    def _pass_through(self, given: Tensor | None) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            out = hidden_states if given is None else given
            return (out,) + (None,) * (self._arity - 1) if self._arity else out

        return forward

    def _probe_arity(self) -> int:
        """Whether this model's blocks return a tensor (0) or a tuple (its length)."""
        seen: list[int] = []
        handle = self._blocks[0].register_forward_hook(
            lambda _m, _a, out: seen.append(len(out) if isinstance(out, tuple) else 0)
        )
        try:
            with unhooked(self._model.modules()):  # a user's hooks may want other tokens
                check_causal(self._model)
        finally:
            handle.remove()
        return seen[0]


def of_first_rows(forward: Callable[..., Any], count: int, rows: int) -> Callable[..., Any]:
    """A block's forward for `count` of `rows` rows; masks and positions (all that has so many rows) are cut alike."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:count] if value.ndim > 1 and len(value) == rows else value
        return tuple(map(cut, value)) if isinstance(value, tuple) else value

    def of_first(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = forward(hidden_states[:count], *map(cut, args), **{name: cut(value) for name, value in kwargs.items()})
        run, *rest = out if isinstance(out, tuple) else (out,)
        whole = torch.cat([run, hidden_states[count:].to(run.device)])
        return (whole, *rest) if isinstance(out, tuple) else whole

    return of_first


def _swap_input(resid: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args and isinstance(args[0], Tensor):
        return (resid, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": resid}
