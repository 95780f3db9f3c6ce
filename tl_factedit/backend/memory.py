"""What activations may take: one budget, in GiB, and what a token costs of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real

from tl_factedit.backend.free import free_bytes
from tl_factedit.backend.protocol import Model, n_layers
from tl_factedit.backend.weights import down_proj

GIB = 1 << 30

MOST_TOKENS = 1024
"""In one forward pass without gradients: beyond it a processor gains nothing."""

NUMBER = 4
"""Bytes of a number of float32, in which norms and losses are taken whatever the weights are in."""

SHARE = 0.5
"""Of what is free on a device: the rest is for kernels' own needs, and for what is reckoned too small."""

SHARE_OF_RAM = 0.25
"""Of what is free beside a CPU, where other processes live, too."""

UNKNOWN = 2.0
"""GiB, where nothing says how much is free."""


def check_memory(memory: float | None) -> None:
    """Check that a budget is a positive number of GiB, or None.

    Raises:
        ValueError: It isn't.
    """
    if memory is None:
        return
    if isinstance(memory, bool) or not isinstance(memory, Real) or not 0 < float(memory) < math.inf:
        raise ValueError(
            f"memory is {memory!r}, needed a number above 0 (GiB), or None for a share of what the device has free"
        )


def budget(model: Model, memory: float | None) -> float:
    """A budget in GiB: as it is given; for None a share of what is free now on the fullest of the model's devices.

    Raises:
        ValueError: It is no number above 0.
    """
    check_memory(memory)
    if memory is not None:
        return memory
    devices = {param.device for param in model.parameters() if not param.is_meta}
    free = free_bytes(devices)
    if free is None:
        return UNKNOWN
    share = SHARE_OF_RAM if any(where.type == "cpu" for where in devices) else SHARE
    return max(free, 1) * share / GIB


def pass_tokens(model: Model, memory: float) -> int:
    """How many tokens a forward pass without gradients may have, if half of the budget is for what it needs on its way.

    The other half is for what is kept of other passes. At least 16, and at most `MOST_TOKENS`.
    """
    # Nearly every token of a packed row that ends a cell is unembedded, and a metric makes one more of its logits.
    each = pass_bytes(model) + (NUMBER + _size(model)) * model.cfg.d_vocab
    return int(max(16, min(MOST_TOKENS, memory * GIB / 2 / each)))


def pass_bytes(model: Model) -> int:
    """Bytes that a token takes on its way through a pass without gradients, without its logits."""
    cfg = model.cfg
    return _size(model) * (4 * (cfg.d_mlp or 4 * cfg.d_model) + 12 * cfg.d_model)


def graph_bytes(model: Model, layer: int) -> int:
    """Bytes that the graph of one token takes from a block to the last one; none from behind the last."""
    d_model, d_mlp = model.cfg.d_model, len(down_proj(model, min(layer, n_layers(model) - 1)).W)
    # Of the 12 streams, norms and heads of a block four are in float32.
    a_block = _size(model) * (4 * d_mlp + 8 * d_model) + NUMBER * 4 * d_model
    return (n_layers(model) - layer) * a_block


def past_bytes(model: Model) -> int:
    """Bytes that a token's attention keys and values take in all blocks, half of them twice, and two streams."""
    cfg = model.cfg
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    return _size(model) * (3 * n_layers(model) * heads * cfg.d_head + 2 * cfg.d_model)


def logits_bytes(model: Model) -> int:
    """Bytes that the logits of one position take with their graph: themselves, their softmax, a loss, a gradient."""
    return 4 * model.cfg.d_vocab * NUMBER


def _size(model: Model) -> int:
    """Bytes of a number of the weights' own type."""
    return next(param.element_size() for param in model.parameters())


def together(needs: Sequence[int], memory: float, alike: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Indices in their order, as many together as the budget holds; one always goes.

    Args:
        needs: Bytes that each takes.
        memory: The budget, in GiB.
        alike: Numbers that must be equal for two to go together; None for none.
    """
    group: list[int] = []
    used = 0
    for i, need in enumerate(needs):
        apart = alike is not None and bool(group) and alike[i] != alike[group[-1]]
        if group and (apart or used + need > memory * GIB):
            yield group
            group, used = [], 0
        group.append(i)
        used += need
    if group:
        yield group
