"""Whether a ``W_out`` is one of its own, or some other weight too: then writing the one writes the other unseen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tl_factedit.backend.protocol import Model, UnsupportedModelError, n_layers
from tl_factedit.backend.weights import down_proj


def check_own(model: Model, layers: Iterable[int]) -> None:
    """Check that each of some blocks has a ``W_out`` to itself.

    Raises:
        UnsupportedModelError: Another block uses the same one (shared layers), or it is another weight too (tied), so
            that writing one writes both.
    """
    users: dict[int, list[int]] = {}
    for layer in range(n_layers(model)):
        with suppress(UnsupportedModelError):
            users.setdefault(down_proj(model, layer).param.data_ptr(), []).append(layer)
    places = places_of(model, getattr(model, "original_model", None))
    for layer in layers:
        site = down_proj(model, layer)
        shared = users.get(site.param.data_ptr(), [layer])
        if len(shared) > 1:
            raise UnsupportedModelError(
                f"layers {shared} share one W_out, needed one for layer {layer} alone: what is written in one would be "
                "written in all of them"
            )
        check_untied(site.param, site.owner, layer, places)


@dataclass(frozen=True)
class Where:
    """A place of a parameter: one that several modules have, or one module twice, has several."""

    module: str
    name: str
    owner: nn.Module
    param: nn.Parameter


def places_of(*roots: Any) -> list[Where]:
    """All places of the parameters of some modules (and of None, which has none)."""
    found, seen = list[Where](), set[int]()
    for root in roots:
        for name, module in root.named_modules() if isinstance(root, nn.Module) else ():
            if id(module) not in seen:
                seen.add(id(module))
                held = module.named_parameters(recurse=False, remove_duplicate=False)
                found += [Where(name, its, module, param) for its, param in held]
    return found


def check_untied(param: nn.Parameter, owner: nn.Module, layer: int, places: Sequence[Where]) -> None:
    """Check that a ``W_out`` is no other weight too.

    Args:
        param: It.
        owner: The module that has it.
        layer: Its block, for the message.
        places: All places of the model's parameters.

    Raises:
        UnsupportedModelError: Another parameter lies in its memory, or it stands in another place too.
    """
    mine = set(map(id, owner.modules()))
    others = [
        f"{place.module}.{place.name}".replace("_original_component.", "")
        for place in places
        if _overlap(place.param, param)
        and not (place.param is param and id(place.owner) in mine and place.name in ("weight", "W_out"))
    ]
    if others:
        raise UnsupportedModelError(
            f"W_out of layer {layer} is one piece of memory with {', '.join(others[:3])} (tied weights), needed one of "
            "its own: what is written in it would be written there too; give it a copy "
            "(torch.nn.Parameter(weight.detach().clone()))"
        )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in the same memory, in part at least (side by side in one file of it is no overlap)."""
    (a, b), (c, d) = _span(one), _span(other)
    return one.device == other.device and a < d and c < b


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins in memory, and where it ends; (0, 0) where it isn't there."""
    if tensor.is_meta or not tensor.numel():
        return 0, 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
