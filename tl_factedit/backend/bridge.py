"""Forward passes of a TransformerBridge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def of_first_rows(forward: Callable[..., Any], count: int, rows: int) -> Callable[..., Any]:
    """A block's forward for `count` of `rows` rows; masks and positions (all that has so many rows) are cut alike."""

    def cut(value: Any) -> Any:
        if torch.is_tensor(value):
            return value[:count] if value.ndim > 1 and len(value) == rows else value
        return tuple(map(cut, value)) if isinstance(value, tuple) else value

    def of_first(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = forward(hidden_states[:count], *map(cut, args), **{name: cut(value) for name, value in kwargs.items()})
        run, *rest = out if isinstance(out, tuple) else (out,)
        whole = torch.cat([run, hidden_states[count:]])
        return (whole, *rest) if isinstance(out, tuple) else whole

    return of_first


def swap_input(resid: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args and torch.is_tensor(args[0]):
        return (resid, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": resid}
