"""``W_out``: where it lives in either class, and how it is written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_factedit.backend.hook_names import component_hook
from tl_factedit.backend.protocol import (
    Hook,
    Model,
    Place,
    Unit,
    UnsupportedModelError,
    blocks,
    check_layer,
    kind,
    n_layers,
)
from tl_factedit.backend.state import finish_despite_interrupt


def n_units(model: Model, unit: Unit) -> int:
    """How many heads, or neurons, a layer has."""
    return int(model.cfg.n_heads) if unit == "head" else len(down_proj(model, 0).W)


@dataclass(frozen=True)
class DownProj:
    """The output matrix of one MLP, live: ``value = key @ W + bias``.

    Attributes:
        layer: The block.
        param: The parameter itself, in the orientation it is stored in.
        transposed: Whether it is stored as [d_model, d_mlp] (an ``nn.Linear``).
        bias: [d_model], or None.
        key_hook: Hook name of its input (the key).
        value_at: Where its output (the value) can be hooked: a hook name, or the module that
            returns it where no hook sees it (a HookedTransformer with norms after the MLP).
        owner: The module that has the parameter, the same one whatever wraps it.
    """

    layer: int
    param: nn.Parameter
    transposed: bool
    bias: Tensor | None
    key_hook: str
    value_at: Place
    owner: nn.Module

    @property
    def W(self) -> Float[Tensor, "d_mlp d_model"]:
        """A live view of the weight, rows = d_mlp; writing to it writes to the model."""
        data = self.param.detach()
        return data.T if self.transposed else data

    def write_(self, weight: Float[Tensor, "d_mlp d_model"]) -> None:
        """Overwrite the weight in place."""
        with torch.no_grad():
            self.W.copy_(weight)

    def reaches_stream(self, found: Mapping[str, Tensor]) -> bool:
        """Whether what it answers is added to the stream as it is: no norm and no multiplier stands between.

        Args:
            found: What stood at `value_at`, if that is a hook, and at the block's ``hook_mlp_out``, on any tokens.
        """
        straight = component_hook("mlp", self.layer)
        return isinstance(self.value_at, str) and torch.equal(found[self.value_at], found[straight])

    def hooks(self, change: Callable[[Tensor, Tensor], Tensor | None]) -> list[Hook]:
        """Hooks that let a function decide, once a pass, what the matrix answers.

        Args:
            change: Is given the key, [row pos d_mlp], and the value that the matrix (with whatever hooks are at work
                there already) answers to it, [row pos d_model]; returns what the model goes on with, None for that
                value itself.

        Example:
            >>> hooks = site.hooks(lambda key, value: value + key @ learnt)    # doctest: +SKIP
        """
        seen: list[Tensor] = []

        def read_key(key: Tensor, hook: Any = None) -> None:
            seen[:] = [key]

        def answer(value: Tensor, hook: Any = None) -> Tensor | None:
            return change(seen.pop(), value)

        return [(self.key_hook, read_key), (self.value_at, answer)]

    def value(self, key: Float[Tensor, "*row d_mlp"]) -> Float[Tensor, "*row d_model"]:
        """What the matrix answers to a key, in float64 and on the key's device."""
        out = key.to(self.W.device).double() @ self.W.double()
        return (out if self.bias is None else out + self.bias.detach().double()).to(key.device)


def down_proj(model: Model, layer: int) -> DownProj:
    """The live ``W_out`` of a block (never ``model.W_out[layer]``, which is a copy).

    Raises:
        ValueError: No such layer.
        UnsupportedModelError: Mixture of experts, no MLP, quantised or offloaded weights, or a
            parameter made inside ``torch.inference_mode``.
    """
    check_layer(model, layer)
    block = blocks(model)[layer]
    where = f"blocks.{layer}.mlp"
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        raise UnsupportedModelError(f"{where}: this block has no MLP, needed one with a W_out")
    if kind(model) == "bridge":
        out = getattr(mlp, "out", None)
        inner = getattr(out, "original_component", None)
        while isinstance(deeper := getattr(inner, "original_component", None), nn.Module):
            inner = deeper  # of a second bridge over one transformers model
        if inner is None:
            raise UnsupportedModelError(_no_single_w_out(where, mlp))
        transposed = _is_transposed(inner, int(model.cfg.d_model), f"{where}.out")
        param, bias = getattr(inner, "weight", None), getattr(inner, "bias", None)
        value_at: Place = f"{where}.out.hook_out"
        owner = inner
    else:
        param, bias = mlp._parameters.get("W_out"), mlp._parameters.get("b_out")
        if hasattr(mlp, "parametrizations"):
            raise UnsupportedModelError(_more_than_w_out(where, mlp))
        if param is None:
            raise UnsupportedModelError(_no_single_w_out(where, mlp))
        transposed = False
        post_norm = bool(getattr(model.cfg, "use_normalization_before_and_after", False))
        value_at = mlp if post_norm else f"blocks.{layer}.hook_mlp_out"
        owner = mlp
    param = _check_weight(param, where, model.cfg.d_model, transposed)
    return DownProj(layer, param, transposed, bias, f"{where}.hook_post", value_at, owner)


@runtime_checkable
class Writable(Protocol):
    """A matrix that lives in a model: a `DownProj`, or any other (`backend.matrices`)."""

    @property
    def W(self) -> Tensor:
        """The numbers."""
        ...

    def write_(self, weight: Tensor) -> None:
        """Overwrite them in place."""
        ...


def write_all(sites: Sequence[Writable], weights: Sequence[Float[Tensor, "_ _"]]) -> None:
    """Write several weights; what interrupts it is raised once all are written."""

    def write() -> None:
        for site, weight in zip(sites, weights, strict=True):
            site.write_(weight)

    finish_despite_interrupt(write)


@contextmanager
def rewritten(sites: Sequence[Writable], weights: Sequence[Float[Tensor, "_ _"]]) -> Iterator[None]:
    """Other weights for the length of a ``with`` block; the old ones are back afterwards, bit for bit."""
    before = [site.W.clone() for site in sites]
    try:
        for site, weight in zip(sites, weights, strict=True):
            site.write_(weight)
        yield
    finally:
        write_all(sites, before)


def _is_transposed(inner: nn.Module, d_model: int, where: str) -> bool:
    """Whether a layer stores its weight as [d_model, d_mlp]; that it answers ``key @ W + b`` and no more is tried out.

    Raises:
        UnsupportedModelError: It answers something else: an adapter lies over it, or its weight is made from others.
    """
    param, bias = getattr(inner, "weight", None), getattr(inner, "bias", None)
    wraps = param is None and any(True for _ in inner.children())
    if wraps or (type(param) is Tensor and param.is_floating_point()):
        raise UnsupportedModelError(_more_than_w_out(where, inner))
    name = type(inner).__name__
    if type(inner) is nn.Linear or name == "Conv1D":  # these answer so by their definition
        return name != "Conv1D"  # GPT-2 stores Conv1D weights as [d_mlp, d_model]
    if not isinstance(param, nn.Parameter) or not param.is_floating_point() or param.ndim != 2 or param.is_meta:
        return True  # refused by what it is
    possible = [transposed for transposed in (True, False) if param.shape[0 if transposed else 1] == d_model]
    for transposed in possible:
        weight = param.detach().T if transposed else param.detach()
        key = torch.randn(1, 2, len(weight), generator=torch.Generator().manual_seed(0)).to(param)
        wanted = key @ weight + (0 if bias is None else bias.detach())
        tolerance = 16 * torch.finfo(param.dtype).eps * len(weight) ** 0.5
        if bool((_answer(inner, key) - wanted).norm() <= tolerance * wanted.norm()):
            return transposed
    if possible:
        raise UnsupportedModelError(_more_than_w_out(where, inner))
    return True


def _answer(layer: nn.Module, key: Tensor) -> Tensor:
    """What a layer says to a key, without the dropout that an adapter may have."""
    modes = [(module, module.training) for module in layer.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            return layer(key)
    finally:
        for module, mode in modes:
            module.training = mode


def _more_than_w_out(where: str, layer: nn.Module) -> str:
    return (
        f"{where} ({type(layer).__module__}.{type(layer).__name__}) answers something else than key @ W + b, so that "
        "its weight isn't what the model computes with: merge the adapter first (merge_and_unload), or take the "
        "parametrization off (torch.nn.utils.parametrize.remove_parametrizations)"
    )


def _no_single_w_out(where: str, mlp: nn.Module) -> str:
    return (
        f"{where} ({type(mlp).__name__}) has no single W_out: mixture-of-experts layers have one for each "
        "expert, and a token has no single key; choose a dense layer or model"
    )


def _check_weight(param: Tensor | None, where: str, d_model: int, transposed: bool) -> nn.Parameter:
    """The weight itself, if it can be written in place."""
    if not isinstance(param, nn.Parameter) or not param.is_floating_point() or param.ndim != 2:
        given = type(param).__name__ if not isinstance(param, Tensor) else f"{param.dtype} {tuple(param.shape)}"
        raise UnsupportedModelError(
            f"{where}: W_out is {given}, needed a two-dimensional floating-point parameter "
            "(quantised weights can't be edited in place: load the model unquantised)"
        )
    if param.is_meta:
        raise UnsupportedModelError(
            f"{where}: W_out is on the meta device (offloaded), needed weights in memory: load without offloading"
        )
    if param.is_inference():
        raise UnsupportedModelError(
            f"{where}: W_out was made inside torch.inference_mode(), needed an ordinary parameter: "
            "load the model outside of it"
        )
    # Not cfg.d_mlp: TransformerLens takes 4 * d_model for OPT and Falcon, whatever the weights are.
    if param.shape[0 if transposed else 1] != d_model:
        needed = f"[{d_model}, d_mlp]" if transposed else f"[d_mlp, {d_model}]"
        raise UnsupportedModelError(f"{where}: W_out is {tuple(param.shape)}, needed {needed}")
    return param


LEDGER = "_tl_factedit_ledger"
"""Under this name a ledger of edits stands on the modules whose weights it tells of (`editing.ledger`)."""


class Carries(Protocol):
    """What a ledger says of itself here, where nobody knows what an edit is."""

    def carried_by(self, model: Model) -> Mapping[str, bool]:
        """The digests of the edits that are on a model now, in order, each with the BOS policy it was made with."""
        ...


def carried(model: Model) -> Mapping[str, bool]:
    """The digests of the edits that are on a model now, in order, each with the BOS policy it was made with."""
    ledger: Carries | None = ledger_on(model)
    return {} if ledger is None else ledger.carried_by(model)


def ledger_on(model: Model) -> Any:
    """The ledger that stands on a model's modules; None without one."""
    for layer in range(n_layers(model)):
        with suppress(UnsupportedModelError):
            if (ledger := vars(down_proj(model, layer).owner).get(LEDGER)) is not None:
                return ledger
    return None
