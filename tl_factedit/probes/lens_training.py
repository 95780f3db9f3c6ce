"""Training of a tuned lens's translators: down the KL divergence, on cached states.

Belrose et al. 2023 (arXiv:2303.08112, sec. 3): with h the stream after a block and A, b that block's translator,

    min over A, b of E[ KL(model's prediction || softmax W_U · LN_f(h + A h + b)) ]

One pass over the texts caches the states; every step takes a batch of them. Layers are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.halving import halving
from tl_factedit.backend.hook_names import resid_post
from tl_factedit.backend.protocol import device
from tl_factedit.backend.runner import Runner
from tl_factedit.core.settings import check_settings
from tl_factedit.core.tokens import pad
from tl_factedit.probes.lens import unembed
from tl_factedit.stats.streaming import Piece, Reader, pieces

AT_ONCE = 50_000_000
"""Most logits held at a time."""

HELD_OUT = 10
"""One in this many pieces of text is kept from training, to measure on."""


@dataclass(frozen=True)
class LensTraining:
    """How a lens was trained, so that another can be trained in the same way.

    Attributes:
        n_tokens: Most tokens to cache states of, held-out ones included; BOS doesn't count.
        steps: Steps of Adam, whose learning rate falls linearly to zero.
        lr: Learning rate at the first step.
        batch: Tokens in one step, drawn without replacement until all were seen.
        rank: Rank of A; None for full rank.
        context: Longest piece of text, in tokens with BOS.
        seed: Seed of the held-out pieces, of the order of tokens and, with a rank, of the inner factor.
    """

    n_tokens: int = 20_000
    steps: int = 500
    lr: float = 1e-3
    batch: int = 256
    rank: int | None = None
    context: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"n_tokens": 1, "steps": 1, "batch": 1, "rank": 1, "context": 2}, above={"lr": 0})


def translate(stream: Tensor, matrix: Tensor, inner: Tensor | None, bias: Tensor) -> Tensor:
    """The vectors h + A h + b, with the layer as the last axis but one."""
    stream = stream.to(bias)
    within = stream if inner is None else torch.einsum("...ld,lrd->...lr", stream, inner)
    return stream + torch.einsum("...lr,ldr->...ld", within, matrix) + bias


def zero_translators(
    n_layers: int, width: int, rank: int | None, seed: int, where: torch.device
) -> tuple[
    Float[Tensor, "layer d_model rank"], Float[Tensor, "layer rank d_model"] | None, Float[Tensor, "layer d_model"]
]:
    """Matrix, inner factor and bias that do nothing. Only one factor of a product is zero, or neither would move."""
    inner = None
    if rank is not None:
        draw = torch.randn(n_layers, rank, width, generator=torch.Generator().manual_seed(seed))
        inner = (draw / math.sqrt(width)).to(where)
    matrix = torch.zeros(n_layers, width, width if rank is None else rank, device=where)
    return matrix, inner, torch.zeros(n_layers, width, device=where)


def token_streams(
    runner: Runner, reader: Reader, bos: bool, training: LensTraining, layers: Sequence[int], batch_tokens: int = 4096
) -> list[Float[Tensor, "token column d_model"]]:
    """The streams after some blocks and, as the last column, after the last one; piece by piece, without BOS."""
    names = [resid_post(layer) for layer in (*layers, runner.n_layers - 1)]
    streams: list[Tensor] = []

    def together() -> Iterator[list[Piece]]:
        missing = training.n_tokens
        waiting: list[Piece] = []
        for piece in pieces(runner.model, reader, bos, training.context):
            ids = piece.ids[: missing + bos]
            if waiting and max(len(ids), *(len(other.ids) for other in waiting)) * (len(waiting) + 1) > batch_tokens:
                yield waiting
                waiting = []
            waiting.append(replace(piece, ids=ids))
            missing -= len(ids) - bos
            if missing <= 0:
                break
        if waiting:
            yield waiting

    for attempt in halving(together(), len, "pieces of text in one pass", "a shorter context"):
        with attempt as rows:
            caught = runner.capture(pad([piece.ids for piece in rows], fill=0), list(dict.fromkeys(names)))
            stacked = torch.stack([caught[name] for name in names], 2).float().cpu()
            streams.extend(row[int(bos) : len(piece.ids)] for row, piece in zip(stacked, rows, strict=True))
    if not streams:
        raise ValueError("the texts hold no tokens: give some text")
    return streams


def split_held_out(
    streams: Sequence[Float[Tensor, "_ column d_model"]], seed: int
) -> tuple[Float[Tensor, "token column d_model"], Float[Tensor, "held column d_model"]]:
    """Tokens to learn from and tokens to measure on, of different pieces of text."""
    if len(streams) < 2:
        raise ValueError(
            f"the texts hold {len(streams)} piece of text within n_tokens, needed at least 2: one is held out. Give "
            "more texts, a larger n_tokens or a smaller context"
        )
    order = torch.randperm(len(streams), generator=torch.Generator().manual_seed(seed)).tolist()
    held = set(order[: max(1, len(streams) // HELD_OUT)])
    learnt = torch.cat([stream for i, stream in enumerate(streams) if i not in held])
    return learnt, torch.cat([streams[i] for i in sorted(held)])


def descend(
    runner: Runner,
    streams: Float[Tensor, "token column d_model"],
    parts: Sequence[Tensor],
    training: LensTraining,
    progress: bool,
) -> None:
    """Move the translators of the first layers, in place, down the KL divergence. Layers don't see each other."""
    where = device(runner.model)
    for part in parts:
        part.data = part.data.to(where)
    matrix, *rest = parts
    inner, bias = rest[0] if len(rest) == 2 else None, rest[-1]
    optimiser = torch.optim.Adam([part.requires_grad_(True) for part in parts], lr=training.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / training.steps)
    draws = _draws(len(streams), training)

    def work() -> Iterator[list[_Share]]:
        """Of each step the tokens, for some layers at a time."""
        for step in range(training.steps):
            rows = next(draws).tolist()
            for layers in _layers_at_once(len(matrix), len(rows) * runner.model.cfg.d_vocab):
                yield [_Share(step, layers, row, len(rows)) for row in rows]

    now, known = 0, _Known((), torch.empty(0), torch.empty(0))
    with tqdm(total=training.steps, desc="tuned lens", unit="step", delay=1, disable=not progress) as bar:
        for attempt in halving(work(), len, "tokens at once", "a smaller LensTraining.batch"):
            with attempt as shares:
                step, layers, _, count = shares[0]
                if step > now:
                    _move(optimiser, schedule, bar)
                    now = step
                rows = tuple(share.row for share in shares)
                if rows != known.rows:  # of another step, or fewer
                    some = streams[list(rows)].to(where)
                    known = _Known(rows, some, unembed(runner, some[:, -1]).log_softmax(-1))
                batch, final = known.streams, known.final
                with torch.enable_grad():
                    within = None if inner is None else inner[layers]
                    moved = translate(batch[:, layers], matrix[layers], within, bias[layers])
                    loss = _kl(final[:, None], unembed(runner, moved).log_softmax(-1)).sum(0).div(count).sum()
                    gradients = torch.autograd.grad(loss, parts)
                for part, gradient in zip(parts, gradients, strict=True):
                    part.grad = gradient if part.grad is None else part.grad.add_(gradient)
        _move(optimiser, schedule, bar)
    for part in parts:
        part.requires_grad_(False)
        part.data = part.data.cpu()


class _Share(NamedTuple):
    """A token's part of a step, for some of the layers; `of` tokens in all."""

    step: int
    layers: slice
    row: int
    of: int


class _Known(NamedTuple):
    """Some tokens' streams, and what the model says of them at its end, which no layer changes."""

    rows: tuple[int, ...]
    streams: Tensor
    final: Tensor


def _move(optimiser: torch.optim.Optimizer, schedule: Any, bar: Any) -> None:
    """A step of Adam, at its learning rate."""
    optimiser.step()
    optimiser.zero_grad()
    schedule.step()
    bar.update()


def _draws(count: int, training: LensTraining) -> Iterator[Int[Tensor, "row"]]:
    draw = torch.Generator().manual_seed(training.seed + 1)
    while True:
        yield from torch.randperm(count, generator=draw).split(min(training.batch, count))


def _layers_at_once(count: int, logits: int) -> list[slice]:
    size = max(1, AT_ONCE // max(1, logits))
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _kl(log_p: Float[Tensor, "*#row vocab"], log_q: Float[Tensor, "*#row vocab"]) -> Float[Tensor, "*row"]:
    """KL(p || q) = Σ p (log p − log q)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def divergence(
    runner: Runner, streams: Float[Tensor, "token column d_model"], matrix: Tensor, inner: Tensor | None, bias: Tensor
) -> Float[Tensor, "layer"]:
    """Mean KL divergence of translators at every layer; the streams' last column is that of the last block."""
    total = torch.zeros(len(bias), dtype=torch.float64)
    groups = (rows.tolist() for rows in torch.arange(len(streams)).split(256))
    for attempt in halving(groups, len, "tokens at once", "more room on the device"):
        with attempt as rows:
            batch = streams[rows]
            final, own = unembed(runner, batch[:, -1]).log_softmax(-1), torch.zeros_like(total)
            for layers in _layers_at_once(len(bias), final.numel()):
                within = None if inner is None else inner[layers]
                moved = translate(batch[:, layers], matrix[layers], within, bias[layers])
                own[layers] = _kl(final[:, None], unembed(runner, moved).log_softmax(-1)).double().sum(0).cpu()
            total += own
    return (total / len(streams)).float()
