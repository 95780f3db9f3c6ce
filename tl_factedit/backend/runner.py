"""Forward passes of one model: whole, from a layer on, up to a layer, packed, logits only where wanted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.bridge import BridgeBackend
from tl_factedit.backend.hook_names import resid_pre
from tl_factedit.backend.hooked import HookedBackend
from tl_factedit.backend.hooking import hooked, keepers, way_out
from tl_factedit.backend.packing import FIRST, Packing, Past, past_at
from tl_factedit.backend.protocol import (
    At,
    Hook,
    Model,
    UnsupportedModelError,
    beyond,
    check_in_memory,
    device,
    device_from,
    hook_points,
    kind,
    model_name,
    n_layers,
)
from tl_factedit.backend.state import carries_hooks


class Backend(Protocol):
    """What a `Runner` asks of either class.

    Attributes:
        refusals: What a packed pass may raise where the model can't be run packed.
        mixes_pasts: Whether what is behind a packed row may be of several sequences.
    """

    refusals: tuple[type[Exception], ...]
    mixes_pasts: bool

    def resid(self, tokens: Tensor, start: tuple[int, Tensor] | None, stop: int) -> Tensor:
        """The residual stream before a block, or after the last one, [row pos d_model]."""
        ...

    def logits(self, tokens: Tensor, at: At | None, start: tuple[int, Tensor] | None) -> Tensor:
        """Logits at some positions, or at all."""
        ...

    def packed(self, tokens: Tensor, at: At | None, start: tuple[int, Tensor], packing: Packing) -> tuple[Tensor, Past]:
        """Logits of packed rows, and the past that the rows' own tokens make (from `start` on)."""
        ...

    def why_not_packed(self) -> str:
        """Why no row can be packed, as far as can be told without a pass; ``""`` for no such reason."""
        ...

    def most_keys(self) -> int | None:
        """Most keys that a packed row may have, its past and its own; None for any number."""
        ...


class Runner:
    """Forward passes of one model: whole, from a layer on, up to a layer, packed, logits only where wanted.

    Rows of unequal length are padded on the right, which is exact for a causal model; ask for
    logits at each row's own positions. Gradients flow if they are enabled. Of a model over several devices, a stream to
    begin with may be on any, and what comes of a pass is where the model's inputs go; only a past stays where its
    layers are, and hooks are called where they are.

    Args:
        model: Either class, with all weights in memory. It is used as it is: call inside `frozen`.

    Attributes:
        n_layers: How many blocks the model has.
        mixes_pasts: Whether what is behind a packed row may be of several sequences.
        most_keys: Most keys that a packed row may have; None for any number.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.n_layers = n_layers(model)
        check_in_memory(model)
        self._points: dict[str, Any] = hook_points(model)
        self._backend: Backend = BridgeBackend(model, self._points) if kind(model) == "bridge" else HookedBackend(model)
        self.mixes_pasts = self._backend.mixes_pasts
        self.most_keys = self._backend.most_keys()
        self._beyond = dict(beyond(model))

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
            ValueError: The rows are longer than the model's context, or than packed rows may be; packed rows without
                `start`.
        """
        tokens, start = tokens.to(device(self.model)), self._begun(start)
        with hooked(self.model, hooks, self._points):
            if packing is None:
                self._check_length(tokens)
                return self._backend.logits(tokens, at, start).to(tokens.device)
            if start is None:
                raise ValueError("packed rows need start, the residual stream that they begin with")
            self._check_keys(packing)
            return self._backend.packed(tokens, at, start, packing)[0].to(tokens.device)

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
        tokens, start = tokens.to(device(self.model)), self._begun(start)
        self._check_length(tokens)
        stop = self.n_layers if stop is None else min(stop, self.n_layers)
        with hooked(self.model, [*hooks, *keepers(places, kept)], self._points):
            resid = self._backend.resid(tokens, start, stop)
        if resid_pre(stop) in places:  # fires on a bridge that stops there, but not on a HookedTransformer
            kept.setdefault(resid_pre(stop), resid.detach())
        return self._all_kept(places, kept, tokens.device)

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
        self._check_keys(packing)
        with hooked(self.model, keepers(places, kept), self._points):
            past = self._backend.packed(tokens, FIRST, (0, resid), packing)[1]
        return self._all_kept(places, kept, tokens.device), past

    def why_not_packed(self, tokens: Int[Tensor, "pos"], longest: int) -> str:
        """Why this model can't be run packed, or ``""`` if it can: tried on the tokens given, against a plain run.

        Some attentions ask for more than positions and a mask (ALiBi) or see no further than a window.

        Args:
            tokens: Some tokens, two at least.
            longest: How many tokens the longest sequence will have.

        Raises:
            RuntimeError: The device fails, or has no memory left.
        """
        if carries_hooks(self.model):
            return "the model carries hooks of its own, which may count tokens from the beginning of a row"
        window = self._window()
        if window is not None and longest > window:
            return f"rows of {longest} tokens are longer than the attention window of {window}"
        if self.most_keys is not None and longest > self.most_keys:
            return f"rows of {longest} tokens are longer than the attention's own mask of {self.most_keys}"
        if reason := self._backend.why_not_packed():
            return reason
        tokens = tokens[None].to(device(self.model))
        try:
            both = self._try_packed(tokens)
        except self._backend.refusals as error:
            if isinstance(error, RuntimeError) and not _about_shapes(error):
                raise
            return f"{type(error).__name__}: {error}".splitlines()[0]
        plain = self.logits(tokens, at=torch.tensor([[tokens.shape[1] - 1]]))[0]
        tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(plain.dtype, 0.1)
        if not bool((both - plain).abs().max() < tolerance * plain.std()):
            return "its logits differ from those of a plain run"
        return ""

    def _try_packed(self, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "_ vocab"]:
        """The logits at the end of a sequence, several times over, out of packed rows."""
        n = tokens.shape[1]
        here = torch.arange(n, device=tokens.device)
        cut = n // 2
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
                past_at([of_layer], torch.zeros(count, dtype=torch.long), n - 1)[0]
                for of_layer, count in zip(past, joined, strict=True)
            ),
            joined,
        )
        return self.logits(
            tokens[:, places].repeat(2, 1),
            start=(0, torch.cat([stream[:, places], after[:, places]])),
            packing=packing,
            at=torch.tensor([[n - cut - 1, -1]]).repeat(2, 1),
        ).flatten(0, 1)

    def _window(self) -> int | None:
        """The shortest attention window of the model, if it has one."""
        configs = [self.model.cfg, getattr(getattr(self.model, "original_model", None), "config", None)]
        names = ("sliding_window", "window_size", "attention_chunk_size")
        found = [getattr(config, name, None) for config in configs for name in names]
        return min((size for size in found if isinstance(size, int) and size > 0), default=None)

    def _check_length(self, tokens: Int[Tensor, "row pos"]) -> None:
        room = getattr(self.model.cfg, "n_ctx", None)
        if room is not None and tokens.shape[1] > room:
            raise ValueError(
                f"a text has {tokens.shape[1]} tokens, and {model_name(self.model)} was made for {room} (cfg.n_ctx): "
                "shorten the prompt, or the context before it"
            )
        unknown = self._beyond and self._beyond.get(int(tokens.max()))
        if unknown:
            raise ValueError(
                f"a text holds {unknown!r}, a token that {model_name(self.model)} has no embedding for: leave it out, "
                "or resize the model and train it on it"
            )

    def _check_keys(self, packing: Packing) -> None:
        keys = packing.visible.shape[-1]
        if self.most_keys is not None and keys > self.most_keys:
            raise ValueError(
                f"a packed row has {keys} keys, and the attention of {model_name(self.model)} masks no more than "
                f"{self.most_keys}: pack fewer pieces into a row"
            )

    def _begun(self, start: tuple[int, Tensor] | None) -> tuple[int, Tensor] | None:
        """A residual stream on the device of the block that it goes into."""
        if start is None:
            return None
        layer, resid = start
        return layer, resid.to(device_from(self.model, layer))

    def _all_kept(self, places: Sequence[str], kept: dict[str, Tensor], where: torch.device) -> dict[str, Tensor]:
        missing = [name for name in places if name not in kept]
        if missing:
            raise UnsupportedModelError(f"hooks {missing} never fired in {model_name(self.model)}{way_out(missing)}")
        return {name: value.to(where) for name, value in kept.items()}


def _about_shapes(error: RuntimeError) -> bool:
    """Whether it says that sizes don't fit, and not that a device failed or has no memory (kinds of their own)."""
    return type(error) is RuntimeError and re.search(r"\b(sizes?|shapes?)\b", str(error)) is not None
