"""Which weights a model has, as hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tl_factedit.backend.hashing import digest, sums
from tl_factedit.backend.protocol import Model, UnsupportedModelError, layout, n_layers
from tl_factedit.backend.weights import down_proj


@dataclass(frozen=True)
class Fingerprint:
    """Which weights a model has, as hashes.

    Attributes:
        w_out: One hash a layer, of ``W_out`` as [d_mlp, d_model] (the same on both classes).
        rest: One hash of all other parameters, in the order of this layout.
        layout: Class and processing (see `layout`); `rest` can only be compared within one layout.
    """

    w_out: tuple[str, ...]
    rest: str
    layout: str

    def matches(self, other: Fingerprint) -> bool:
        """Whether these are the same weights.

        Across the two classes only the ``W_out`` of all layers are compared, as the other
        parameters are stored differently there.
        """
        return self.w_out == other.w_out and (self.layout != other.layout or self.rest == other.rest)

    def __str__(self) -> str:
        """A short form for messages."""
        return hashlib.sha256("".join((*self.w_out, self.rest)).encode()).hexdigest()[:12]


LARGEST_BIAS = 1 << 20
"""Parameters with more numbers than this are no biases."""


def fingerprint(model: Model) -> Fingerprint:
    """Hash every parameter of a model (about 0.08 s for 135 M parameters; against mix-ups, not against malice)."""
    w_out: list[Tensor | None] = []
    written: list[tuple[nn.Parameter, Tensor]] = []
    for layer in range(n_layers(model)):
        try:
            site = down_proj(model, layer)
        except UnsupportedModelError:
            w_out.append(None)  # a block that can't be edited; its parameters count in `rest`
            continue
        w_out.append(site.W)
        written.append((site.param, site.W))
    seen = {id(param) for param, _ in written}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in seen and not p.is_meta]
    found = _sums(model, [*written, *((p, p.detach()) for _, p in named)])
    of_layers = iter([digest([weight], [left]) for (_, weight), left in zip(written, found, strict=False)])
    # A second bridge over one transformers model wraps the first one's modules, and splits a joint q, k and v again:
    # what stands under one name then, but for the wrapping, and has the same bits is one parameter.
    once = {
        (name.replace("_original_component.", ""), param.dtype, param.shape, left): (param, left)
        for (name, param), left in zip(named, found[len(written) :], strict=True)
    }
    # Zeros (biases that one release of TransformerLens adds and the next does not) say nothing.
    others = [(param, left) for param, left in once.values() if param.numel() > LARGEST_BIAS or any(left)]
    return Fingerprint(
        tuple("none" if weight is None else next(of_layers) for weight in w_out),
        digest([param for param, _ in others], [left for _, left in others]),
        layout(model),
    )


@dataclass(frozen=True)
class _Kept:
    """Sums of parameters, by parameter: with the parameter, and by what it is told whether it was written to since."""

    model: int
    sums: dict[int, tuple[nn.Parameter, tuple[int, int], bytes]] = field(default_factory=dict)


_KEPT = "_tl_factedit_sums"


@contextmanager
def hashed_once(model: Model) -> Iterator[None]:
    """For the length of a block, a fingerprint reads only those weights that were written to since the last one.

    PyTorch counts what is written to a tensor, but not what goes past it by ``param.data``: for blocks in which none of
    a user's own code is at work on the weights.
    """
    root: Any = getattr(model, "original_model", model)
    kept: _Kept | None = vars(root).get(_KEPT)
    if kept is not None and kept.model == id(root):  # a copy of a model holds those of the model
        yield
        return
    vars(root)[_KEPT] = _Kept(id(root))
    try:
        yield
    finally:
        vars(root).pop(_KEPT, None)


def _sums(model: Model, weights: Sequence[tuple[nn.Parameter, Tensor]]) -> list[bytes]:
    """Of each parameter's weight as it is read; those that are known already are taken from `hashed_once`."""
    root: Any = getattr(model, "original_model", model)
    kept: _Kept | None = vars(root).get(_KEPT)
    if kept is None or kept.model != id(root):
        return sums([weight for _, weight in weights])
    states = [None if p.is_inference() else (p._version, p.data_ptr()) for p, _ in weights]
    known = [kept.sums.get(id(p)) for p, _ in weights]
    asked = [i for i, one in enumerate(known) if one is None or states[i] is None or one[1] != states[i]]
    new = dict(zip(asked, sums([weights[i][1] for i in asked]), strict=True))
    for i, left in new.items():
        if (state := states[i]) is not None:
            kept.sums[id(weights[i][0])] = (weights[i][0], state, left)
    return [new[i] if i in new else kept.sums[id(p)][2] for i, (p, _) in enumerate(weights)]
