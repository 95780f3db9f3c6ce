"""Noising and restoration: the two hook factories of causal tracing.

Both return plain TransformerLens hook functions, for ``model.run_with_hooks`` or ``model.hooks``::

    model.run_with_hooks(tokens, fwd_hooks=[
        ("hook_embed", fe.noise_hook(noise, [1, 2, 3])),
        ("blocks.5.hook_resid_post", fe.restore_hook(clean_resid, [3])),
    ])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Positions = int | Sequence[int] | slice | Int[Tensor, "*position"]


def noise_hook(noise: Float[Tensor, "batch position d_model"], positions: Positions) -> Callable[..., Tensor]:
    """A hook that adds noise to the activations at some positions.

    At ``hook_embed`` this is the corruption of causal tracing (Meng et al. 2022, arXiv:2202.05262,
    sec. 2.1): the subject's token embeddings are noised before positions are added.

    Args:
        noise: What to add, [batch position d_model]; a batch of 1 serves every row.
        positions: The token positions, in the order of `noise`'s second axis.

    Returns:
        A hook function; it leaves its input as it is and returns a new tensor.

    Raises:
        ValueError: The noise has another number of positions, or (when the hook fires) the
            activations have another batch size or width, or end before a position.
    """
    where = _index(positions)
    if isinstance(where, Tensor) and noise.shape[1] != len(where):
        raise ValueError(f"noise is for {noise.shape[1]} positions, but {len(where)} were given: {where.tolist()}")

    def hook_fn(value: Float[Tensor, "batch pos d_model"], hook: Any = None) -> Tensor:
        _check_reach(value, where)
        if len(noise) not in (1, len(value)):
            raise ValueError(
                f"noise is for a batch of {len(noise)}, the activations are {len(value)}: needed 1 or equal"
            )
        if noise.shape[2] != value.shape[2]:
            raise ValueError(
                f"noise is {noise.shape[2]} wide, the activations are {value.shape[2]}: needed equal widths"
            )
        noised = value.clone()
        if noise.shape[1] != noised[:, where].shape[1]:
            held = noised[:, where].shape[1]
            raise ValueError(f"noise is for {noise.shape[1]} positions, but the slice holds {held}: needed as many")
        noised[:, where] += noise.to(value)
        return noised

    return hook_fn


def restore_hook(clean: Float[Tensor, "#batch pos *rest"], positions: Positions) -> Callable[..., Tensor]:
    """A hook that sets the activations at some positions to those of another (clean) run.

    Args:
        clean: Activations of the clean run at the same hook, all positions, [#batch pos …];
            a batch of 1 serves every row.
        positions: The token positions to restore.

    Returns:
        A hook function; it leaves its input as it is and returns a new tensor.

    Raises:
        ValueError: When the hook fires: shapes differ, or the activations end before a position.
    """
    where = _index(positions)

    def hook_fn(value: Float[Tensor, "batch pos ..."], hook: Any = None) -> Tensor:
        _check_reach(value, where)
        if clean.shape[1:] != value.shape[1:] or len(clean) not in (1, len(value)):
            raise ValueError(
                f"clean activations are {tuple(clean.shape)}, those at the hook {tuple(value.shape)}: "
                "needed the same hook and the same tokens, with a batch of 1 or an equal one"
            )
        restored = value.clone()
        restored[:, where] = clean[:, where].to(value)
        return restored

    return hook_fn


def _index(positions: Positions) -> Tensor | slice:
    if isinstance(positions, slice):
        return positions
    given = torch.as_tensor(positions)
    if given.dtype == torch.bool:
        raise ValueError("positions is a mask of booleans, needed token positions: give mask.nonzero()[:, 0]")
    if given.dtype.is_floating_point and given.numel():
        raise ValueError(f"positions is {positions!r}, needed whole numbers")
    where = given.long().reshape(-1)
    if len(where.unique()) < len(where):
        raise ValueError(f"positions {where.tolist()} names one position twice, needed each once")
    return where


def _check_reach(value: Tensor, where: Tensor | slice) -> None:
    if isinstance(where, slice) or not len(where):
        return
    low, high = int(where.min()), int(where.max())
    if high >= value.shape[1] or low < -value.shape[1]:
        raise ValueError(f"position {high if high >= value.shape[1] else low} is outside the {value.shape[1]} tokens")
    if low < 0 <= high and len((where % value.shape[1]).unique()) < len(where):
        raise ValueError(
            f"positions {where.tolist()} names one of the {value.shape[1]} tokens twice (once from the end), needed "
            "each once"
        )
