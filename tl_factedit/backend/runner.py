"""Forward passes of one model: whole, from a layer on, up to a layer, packed, logits only where wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.bridge import of_first_rows, swap_input
from tl_factedit.backend.hook_names import EMBED, resid_pre
from tl_factedit.backend.hooked import PastEntry, packed_attention
from tl_factedit.backend.hooking import hooked, keepers
from tl_factedit.backend.packing import Packing, Past, gather, past_at
from tl_factedit.backend.protocol import (
    At,
    Hook,
    Model,
    UnsupportedModelError,
    device,
    kind,
    model_name,
    n_layers,
)
from tl_factedit.backend.state import carries_hooks, finish_despite_interrupt, unhooked


class Runner:
    """Forward passes of one model: whole, from a layer on, up to a layer, packed, logits only where wanted.

    Rows of unequal length are padded on the right, which is exact for a causal model; ask for
    logits at each row's own positions. Gradients flow if they are enabled.

    Args:
        model: Either class. It is used as it is: call inside `frozen`.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.kind = kind(model)
        self.n_layers = n_layers(model)
        self._points: dict[str, Any] | None = None
        self._arity = self._probe_arity() if self.kind == "bridge" else 0

    def logits(
        self,
        tokens: Int[Tensor, "row pos"],
        *,
        at: At | None = None,
        start: tuple[int, Tensor] | None = None,
        hooks: Sequence[Hook] = (),
        packing: Packing | None = None,
    ) -> Float[Tensor, "_ k vocab"]:
        """Logits of a batch.

        Args:
            tokens: Token ids, padded on the right.
            at: Positions whose logits are wanted, k for each row; or a pair of equally long lists, of rows and of
                positions, whose logits come as one row; None for all.
            start: (layer, residual [row pos d_model]): begin before that block with this residual
                stream instead of running the blocks below; ``n_layers`` runs the head alone.
            hooks: (place, function) pairs, active during this pass only.
            packing: Where the tokens stand, if rows are no plain sequences; needs `start`.

        Raises:
            ValueError: The rows are longer than the model's context.
        """
        tokens = tokens.to(device(self.model))
        if packing is None:
            self._check_length(tokens)
        with self._hooked(hooks):
            if self.kind == "bridge":
                return self._bridge_logits(tokens, at, start, packing)
            return self._hooked_logits(tokens, at, start, packing)

    def capture(
        self,
        tokens: Int[Tensor, "row pos"],
        places: Sequence[str],
        *,
        start: tuple[int, Tensor] | None = None,
        stop: int | None = None,
        hooks: Sequence[Hook] = (),
    ) -> dict[str, Tensor]:
        """Activations at hook names, [row pos …] each, detached.

        Args:
            tokens: Token ids, padded on the right.
            places: TransformerLens hook names.
            start: As in `logits`.
            stop: Run only the blocks below this one; None for all of them.
            hooks: Active during this pass; they run before the capture.

        Raises:
            UnsupportedModelError: The model has no such hook, or it never fired.
            ValueError: The rows are longer than the model's context.
        """
        kept: dict[str, Tensor] = {}
        tokens = tokens.to(device(self.model))
        self._check_length(tokens)
        last = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
        with self._hooked([*hooks, *keepers(places, kept)]):
            if self.kind == "bridge":
                if stop is None or stop >= self.n_layers:
                    self._bridge_logits(tokens, last, start)
                else:
                    with self._from(start):
                        self.model(tokens, stop_at_layer=stop)  # type: ignore[operator]
            else:
                stop = self.n_layers if stop is None else stop
                resid = self._hooked_resid(tokens, start, stop)
                if resid_pre(stop) in places:  # fires on a bridge that stops there, but not here
                    kept[resid_pre(stop)] = resid.detach()
        return self._all_kept(places, kept)

    def remember(
        self, tokens: Int[Tensor, "row query"], places: Sequence[str], *, resid: Tensor, packing: Packing
    ) -> tuple[dict[str, Tensor], Past]:
        """Run all blocks on packed rows: activations at hook names, and the past that the rows' own tokens make.

        Args:
            tokens: Token ids.
            places: TransformerLens hook names.
            resid: The residual stream before the first block, [row query d_model].
            packing: Where the tokens stand.
        """
        kept: dict[str, Tensor] = {}
        tokens = tokens.to(device(self.model))
        with self._hooked(keepers(places, kept)):
            if self.kind == "bridge":
                last = torch.zeros(len(tokens), 1, dtype=torch.long, device=tokens.device)
                cache = self._bridge_packed(tokens, last, (0, resid), packing)[1]
                before = packing.visible.shape[-1] - packing.visible.shape[-2]
                past = tuple(
                    (layer.keys[:, :, before:].transpose(1, 2), layer.values[:, :, before:].transpose(1, 2))
                    for layer in cache.layers
                )
            else:
                past = self._hooked_packed((0, resid), packing)[1]
        return self._all_kept(places, kept), past

    def _check_length(self, tokens: Int[Tensor, "row pos"]) -> None:
        room = getattr(self.model.cfg, "n_ctx", None)
        if room is not None and tokens.shape[1] > room:
            raise ValueError(
                f"a text has {tokens.shape[1]} tokens, and {model_name(self.model)} was made for {room} (cfg.n_ctx): "
                "shorten the prompt, or the context before it"
            )

    def _all_kept(self, places: Sequence[str], kept: dict[str, Tensor]) -> dict[str, Tensor]:
        missing = [name for name in places if name not in kept]
        if missing:
            raise UnsupportedModelError(f"hooks {missing} never fired in {model_name(self.model)}")
        return kept

    def why_not_packed(self, tokens: Int[Tensor, "pos"], longest: int) -> str:
        """Why this model can't be run packed, or ``""`` if it can: tried on the tokens given, against a plain run.

        Some attentions ask for more than positions and a mask (ALiBi) or see no further than a window.

        Args:
            tokens: Some tokens, two at least.
            longest: How many tokens rows will have.
        """
        if carries_hooks(self.model):
            return "the model carries hooks of its own, which may count tokens from the beginning of a row"
        window = self._window()
        if window is not None and longest > window:
            return f"rows of {longest} tokens are longer than the attention window of {window}"
        tokens = tokens[None].to(device(self.model))
        n = tokens.shape[1]
        here = torch.arange(n, device=tokens.device)
        cut = n // 2
        try:
            stream = self.capture(tokens, [resid_pre(0)], stop=0)[resid_pre(0)]
            causal = Packing(here[None], (here[:, None] >= here)[None])
            _, past = self.remember(tokens, [], resid=stream, packing=causal)
            # The whole sequence and its second half side by side, behind the first half and all of it.
            places = torch.cat([here[cut:], here[-1:]])
            whole = torch.arange(len(places), device=tokens.device) < n - cut
            own = (whole[:, None] == whole) & (places[:, None] >= places)
            behind = here[: n - 1] < torch.where(whole, cut, n - 1)[:, None]
            # Twice: the second row joins after the first block, with what that block made of the first.
            after = self.capture(tokens, [resid_pre(1)], stop=1)[resid_pre(1)] if self.n_layers > 1 else stream
            visible = torch.cat([behind, own], 1)
            joined = (1 if self.n_layers > 1 else 2, *(2,) * (self.n_layers - 1))
            packing = Packing(
                places.repeat(2, 1),
                visible.repeat(2, 1, 1),
                tuple(
                    past_at([each], torch.zeros(count, dtype=torch.long), n - 1)[0]
                    for each, count in zip(past, joined, strict=True)
                ),
                joined,
            )
            both = self.logits(
                tokens[:, places].repeat(2, 1),
                start=(0, torch.cat([stream[:, places], after[:, places]])),
                packing=packing,
                at=torch.tensor([[n - cut - 1, -1]]).repeat(2, 1),
            ).flatten(0, 1)
        except (
            AttributeError,
            IndexError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        plain = self.logits(tokens, at=torch.tensor([[n - 1]]))[0]
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(plain.dtype, 0.1)
        if not bool((both - plain).abs().max() < tolerance * plain.std()):
            return "its logits differ from those of a plain run"
        return ""

    def _window(self) -> int | None:
        """The shortest attention window of the model, if it has one."""
        configs = [self.model.cfg, getattr(getattr(self.model, "original_model", None), "config", None)]
        names = ("sliding_window", "window_size", "attention_chunk_size")
        found = [getattr(config, name, None) for config in configs for name in names]
        return min((int(each) for each in found if isinstance(each, int) and each > 0), default=None)

    # -- hooks

    def _hooked(self, hooks: Sequence[Hook]) -> AbstractContextManager[None]:
        if self._points is None:
            self._points = dict(self.model.hook_dict)  # type: ignore[attr-defined]
        return hooked(self.model, hooks, self._points)

    # -- HookedTransformer

    def _hooked_resid(self, tokens: Tensor, start: tuple[int, Tensor] | None, stop: int) -> Tensor:
        model: Any = self.model
        # The mask is all ones: rows are padded on the right, whatever side the tokenizer pads on.
        mask = torch.ones_like(tokens)
        if start is None:
            return model(tokens, stop_at_layer=stop, attention_mask=mask)
        layer, resid = start
        if layer >= self.n_layers:
            return resid
        if any(getattr(getattr(model, name, None), "fwd_hooks", None) for name in (EMBED, "hook_pos_embed")):
            model.input_to_embed(tokens, attention_mask=mask)  # for these hooks, as a bridge's see every pass
        return model(resid, start_at_layer=layer, stop_at_layer=stop, tokens=tokens, attention_mask=mask)

    def _hooked_packed(self, start: tuple[int, Tensor], packing: Packing) -> tuple[Tensor, Past]:
        """The stream after the last block, and the past that the rows' own tokens make (from `start` on)."""
        layer, resid = start
        entries = []
        for i, block in enumerate(list(self.model.blocks)[layer:], layer):  # type: ignore[attr-defined]
            before = packing.past[i] if packing.past else None
            count = packing.joined[i] if packing.joined else len(resid)
            entries.append(PastEntry(before, count, block.attn))
            with packed_attention(block.attn, packing.rows(count)):
                run = block(
                    resid[:count], past_kv_cache_entry=entries[-1], shortformer_pos_embed=None, attention_mask=None
                )
            resid = run if count == len(resid) else torch.cat([run, resid[count:]])
        return resid, tuple(entry.new for entry in entries)

    def _hooked_logits(
        self, tokens: Tensor, at: At | None, start: tuple[int, Tensor] | None, packing: Packing | None = None
    ) -> Tensor:
        model: Any = self.model
        if packing is not None and start is not None:
            resid = self._hooked_packed(start, packing)[0]
        else:
            resid = self._hooked_resid(tokens, start, self.n_layers)
        if at is not None:
            resid = gather(resid, at)
        if model.cfg.normalization_type is not None:
            resid = model.ln_final(resid)
        logits = model.unembed(resid)
        cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    # -- TransformerBridge

    def _bridge_logits(
        self, tokens: Tensor, at: At | None, start: tuple[int, Tensor] | None, packing: Packing | None = None
    ) -> Tensor:
        if packing is not None and start is not None:
            return self._bridge_packed(tokens, at, start, packing)[0]
        with self._from(start), self._picked(at):
            return self.model(tokens)  # type: ignore[operator]

    def _bridge_packed(
        self, tokens: Tensor, at: At | None, start: tuple[int, Tensor], packing: Packing
    ) -> tuple[Tensor, Any]:
        """Logits and the cache afterwards, past and new tokens."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(packing.past or ()):
            cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
        resid = start[1]
        seen = packing.visible[:, None].to(resid.device)
        mask = torch.zeros(seen.shape, dtype=resid.dtype, device=resid.device)
        mask.masked_fill_(~seen, torch.finfo(resid.dtype).min)
        with self._from(start), self._joining(packing.joined, len(resid), start[0]), self._picked(at):
            # The wrapped model itself, as the bridge's forward makes masks and positions of its own.
            out = self.model.original_model(  # type: ignore[attr-defined]
                input_ids=tokens,
                attention_mask=mask,
                position_ids=packing.positions.to(tokens.device),
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits, cache

    @contextmanager
    def _picked(self, at: At | None) -> Iterator[None]:
        """Unembed some positions only."""
        if at is None:
            yield
            return
        # At the unembedding and not at ln_final, after which GPT-2, GPT-J and NeoX reshape.
        pick = [("unembed.hook_in", lambda resid, hook: gather(resid, at))]
        with self._hooked(pick):
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
        blocks: Any = self.model.blocks  # type: ignore[attr-defined]
        skipped = list(blocks)[:layer]
        handle = None
        names = ("embed", "pos_embed") if layer >= self.n_layers else ()
        parts = [getattr(self.model, name, None) for name in names]
        with unhooked(m for part in parts if part is not None for m in part.modules()):
            try:
                if layer == 0:
                    handle = blocks[0].register_forward_pre_hook(
                        lambda _m, args, kw: swap_input(resid, args, kw), with_kwargs=True
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
        blocks = list(self.model.blocks)[first:]  # type: ignore[attr-defined]
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
        model: Any = self.model
        seen: list[int] = []
        handle = model.blocks[0].register_forward_hook(
            lambda _m, _a, out: seen.append(len(out) if isinstance(out, tuple) else 0)
        )
        try:
            with torch.no_grad(), unhooked(model.modules()):  # a user's hooks may want more tokens than one
                model(torch.zeros(1, 1, dtype=torch.long, device=device(model)), stop_at_layer=1)
        finally:
            handle.remove()
        return seen[0]
