"""Are these enough tokens? How far the direction of an update still moves as key statistics grow.

An update of one fact writes along ``u = C⁻¹ k`` and changes the answers to all other keys k' by ``(uᵀk' / uᵀk) r``,
on the mean over text, per unit of r, by its *damage*

    D(u) = E[(uᵀk')²] / (uᵀk)² = uᵀ C u / (uᵀ k)²

(the objective of Meng et al. 2022, arXiv:2202.05262, eq. 2), least at ``u = C⁻¹k``. Statistics of few tokens fit the
noise of their own sample, and look better there than they are. So u is taken from one half of the text after n, 2n,
4n … tokens, and judged on the other half, which it has not seen. (For independent Gaussian keys the least damage is, on
the mean, a share ``(n + 2 − m) / (n + 1)`` of D(u), with m = d_mlp: Reed, Mallett, Brennan 1974. Keys of a text are
neither, and want more.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core.estimate import over_facts_each
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.solve import NotPositiveDefiniteError, cholesky
from tl_factedit.core.tokens import Aligned, align, pad
from tl_factedit.core.words import counted
from tl_factedit.stats.key_stats import TOKENS_PER_DIMENSION
from tl_factedit.stats.streaming import KeyBatch, Reader, check_amounts, pieces, stream_keys
from tl_factedit.stats.sums import mirror_, where

if TYPE_CHECKING:
    import pandas as pd

ENOUGH = 0.05
"""The excess damage that more tokens would still take away, at which they are no longer worth their time."""


@dataclass(frozen=True, eq=False)  # compared by identity: == of tensors has no truth value
class Convergence:
    """The result of `stats_convergence`.

    Attributes:
        points: Tokens n that directions were taken after, ascending; the last is N.
        excess: Excess damage on held-out text, D(u_n) / D(u_N) − 1, [point fact]; NaN where C_n can't be inverted. 0.1
            is a tenth more change to the answers to all other keys for the same edit.
        plain_excess: The same of k itself in place of u_n: of an update without statistics, [fact].
        damage: D(u_N) on held-out text, [fact]: the mean square of the share of r that the answer at a token of other
            text changes by. With it reports of different ridges can be compared.
        cosine: Between u_n and u_N in the metric of C_N, ``uᵀ C w / √(uᵀCu · wᵀCw)``, [point fact].
        euclidean: The usual cosine between them, [point fact].
        layer: The block.
        d_mlp: Dimensions of a key.
        ridge: Added to each C_n, as a share of its mean eigenvalue.
        held_out: How many tokens judged.
        facts: Whose keys were used.
        corpus: A hash of all texts that were read.
        provenance: Model, weights, BOS policy, versions.

    Example:
        >>> found = fe.stats.stats_convergence(model, 8, texts, facts)  # doctest: +SKIP
        >>> found.enough                                          # doctest: +SKIP
        30000
    """

    points: tuple[int, ...]
    excess: Float[Tensor, "point fact"]
    plain_excess: Float[Tensor, "fact"]
    damage: Float[Tensor, "fact"]
    cosine: Float[Tensor, "point fact"]
    euclidean: Float[Tensor, "point fact"]
    layer: int
    d_mlp: int
    ridge: float
    held_out: int
    facts: tuple[Fact, ...]
    corpus: str
    provenance: Provenance

    @property
    @plain_torch()
    def enough(self) -> int | None:
        """The fewest tokens from which on the mean excess damage stays within 5 %; None: more than N are wanted.

        The last point is what the others are measured by and says nothing of itself: it is never the answer.

        Example:
            >>> found.enough is None                              # doctest: +SKIP
            False
        """
        found = None
        for n, mean in reversed(list(zip(self.points[:-1], self.excess.mean(1).tolist(), strict=False))):
            if not mean <= ENOUGH:  # NaN is not enough
                break
            found = n
        return found

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a point, first that of k itself (0 tokens): mean excess with its interval over facts, other means.

        Example:
            >>> found.table()["excess"].iloc[-1]                  # doctest: +SKIP
            0.0
        """
        import pandas as pd

        excess = torch.cat([self.plain_excess[None], self.excess])
        means = over_facts_each(excess.T)
        unknown = torch.full((1, excess.shape[1]), float("nan"), dtype=torch.float64)
        columns = {
            "tokens": [0, *self.points],
            "tokens per dimension": [n / self.d_mlp for n in (0, *self.points)],
            "excess": means.mean,
            "low": means.low,
            "high": means.high,
            "damage": ((1 + excess) * self.damage).nanmean(1),
            "cosine": torch.cat([unknown, self.cosine]).nanmean(1),
            "euclidean": torch.cat([unknown, self.euclidean]).nanmean(1),
            "facts": means.n,
        }
        return pd.DataFrame({name: torch.as_tensor(values).tolist() for name, values in columns.items()})

    def __repr__(self) -> str:
        """What more tokens would still change, in a line."""
        steps = ", ".join(
            f"{mean:.1%} after {n:,}" for n, mean in zip(self.points[:-1], self.excess.mean(1).tolist(), strict=False)
        )
        enough = f"{self.enough:,} tokens are enough" if self.enough else "more tokens are wanted"
        return (
            f"Convergence(layer {self.layer}, {counted(len(self.facts), 'fact')}, against {self.points[-1]:,} tokens: "
            f"excess damage {steps}; {enough})"
        )

    def _repr_html_(self) -> str:
        return self.table().to_html(float_format="{:.3g}".format, index=False)


@plain_torch()
def stats_convergence(
    model: Model,
    layer: int,
    texts: Iterable[str],
    facts: Fact | Sequence[Fact],
    *,
    n_tokens: int = 100_000,
    steps: int = 5,
    ridge: float = 0.0,
    prepend_bos: bool | None = None,
    context: int = 256,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Convergence:
    """Measure how much an update would still change, and spare, with more tokens of key statistics.

    Each text goes to that of two halves which has fewer tokens so far. Directions ``u = C⁻¹k`` are taken from the first
    half after N/2^steps … N/2, N tokens, k being the key at the last subject token of a fact's bare prompt, and their
    damage is measured on the other half. At any time there is one second moment in memory, and one Cholesky factor.

    Args:
        model: Either class; its weights as they are now.
        layer: The block to be edited.
        texts: As for `key_stats`; twice as much as `n_tokens` is read.
        facts: Some tens of the kind that is to be edited.
        n_tokens: N (half of what the texts hold, if that is less).
        steps: How often N is halved.
        ridge: As an editor is to use it.
        prepend_bos: Whether texts and prompts begin with BOS; None for the model's default.
        context: Longest piece of text, in tokens with BOS.
        batch_tokens: Padded tokens in one forward pass.
        progress: Whether to show a bar on what takes longer than a second.

    Raises:
        ValueError: No facts, fewer than two texts, no such layer, or a second moment of N tokens that can't be
            inverted.
        RuntimeError: The model overflows.

    Example:
        >>> fe.stats.stats_convergence(model, 8, texts, facts, n_tokens=80_000)  # doctest: +SKIP
    """
    facts = as_facts(facts)
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    check_amounts(texts, n_tokens, context, batch_tokens)
    if steps < 1:
        raise ValueError(f"steps is {steps}, needed at least 1 halving of n_tokens")
    if ridge < 0:
        raise ValueError(f"ridge is {ridge}, needed 0 or more (a share of the mean eigenvalue)")
    site = down_proj(model, layer)
    provenance = Provenance.of(model, prepend_bos, prompts=(fact.text for fact in facts))
    bos = provenance.prepend_bos
    prompts = [align(model.tokenizer, fact, prepend_bos=bos) for fact in facts]
    halves, sizes, reader = _halves(model, texts, bos, context, n_tokens)
    points = tuple(sorted({sizes[0] >> step for step in range(steps + 1)} - {0}))
    with (
        frozen(model),
        torch.no_grad(),
        tqdm(total=sum(sizes), unit="token", desc="convergence", delay=1, disable=not progress) as bar,
    ):
        runner = Runner(model)
        keys = _keys(runner, site, prompts, batch_tokens).to(where(model)).double()
        streams = [
            _shown(stream_keys(runner, {layer: site}, Reader(half), bos, context, size, batch_tokens), bar)
            for half, size in zip(halves, sizes, strict=True)
        ]
        u, total = _directions(_sums(streams[0], site, points, keys.device), keys, ridge, points[-1], layer)
        cosine, euclidean = cosines(u, u[-1], total), cosines(u, u[-1])
        del total  # before the next sum is made
        ((_, total),) = _sums(streams[1], site, sizes[1:], keys.device)
        last = damage(u[-1], keys, total)
        return Convergence(
            points=points,
            excess=(torch.stack([damage(each, keys, total) for each in u]) / last - 1).cpu(),
            plain_excess=(damage(keys, keys, total) / last - 1).cpu(),
            damage=last.cpu() / sizes[1],
            cosine=cosine.cpu(),
            euclidean=euclidean.cpu(),
            layer=layer,
            d_mlp=len(site.W),
            ridge=ridge,
            held_out=sizes[1],
            facts=facts,
            corpus=reader.digest,
            provenance=provenance.having_read(reader.brought_bos),
        )


def damage(
    directions: Float[Tensor, "fact d_mlp"], keys: Float[Tensor, "fact d_mlp"], moment: Float[Tensor, "d_mlp d_mlp"]
) -> Float[Tensor, "fact"]:
    """``uᵀ C u / (uᵀ k)²`` of each fact; the length of u is irrelevant.

    Example:
        >>> k = torch.tensor([[3.0, 4.0]])
        >>> damage(k, k, torch.eye(2))
        tensor([0.0400])
    """
    return ((directions @ moment) * directions).sum(-1) / (directions * keys).sum(-1) ** 2


def cosines(
    directions: Float[Tensor, "point fact d_mlp"],
    last: Float[Tensor, "fact d_mlp"],
    moment: Float[Tensor, "d_mlp d_mlp"] | None = None,
) -> Float[Tensor, "point fact"]:
    """``uᵀ C w / √(uᵀCu · wᵀCw)`` between each direction and the last one (None: C = 1).

    Example:
        >>> u = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> cosines(u, u[-1])
        tensor([[0.],
                [1.]])
    """
    end = last if moment is None else last @ moment
    found = []
    for u in directions:
        size = u if moment is None else u @ moment
        found.append((u * end).sum(-1) / ((u * size).sum(-1) * (last * end).sum(-1)).sqrt())
    return torch.stack(found)


def _halves(
    model: Model, texts: Iterable[str], bos: bool, context: int, n_tokens: int
) -> tuple[tuple[list[str], list[str]], tuple[int, int], Reader]:
    """The texts of both halves, how many tokens to count of each, and what has read them.

    By whole texts: two pieces of one speak of the same things, so that one would not judge the other unseen.
    """
    halves: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    reader = Reader(texts, model.tokenizer)
    for text, _ in reader:
        half = int(sizes[1] < sizes[0])
        halves[half].append(text)
        sizes[half] += sum(len(piece.ids) for piece in pieces(model, Reader([text]), bos, context))
        if min(sizes) >= n_tokens:
            break
    if not min(sizes):
        raise ValueError("the texts hold fewer than two that aren't empty, needed one half to judge the other")
    return halves, (min(sizes[0], n_tokens), min(sizes[1], n_tokens)), reader


def _keys(runner: Runner, site: DownProj, prompts: Sequence[Aligned], batch_tokens: int) -> Float[Tensor, "fact d_mlp"]:
    """The key at the last subject token of each prompt."""
    rows = [prompt.ids[: prompt.last + 1] for prompt in prompts]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for attempt in that_fit([len(row) for row in rows], batch_tokens):
        with attempt as batch:
            tokens = pad([rows[i] for i in batch], fill=0)
            caught = runner.capture(tokens, [site.key_hook], stop=site.layer + 1)[site.key_hook]
            for place, i in enumerate(batch):
                found[i] = caught[place, len(rows[i]) - 1]
    return torch.stack(found)


def _shown(stream: Iterable[KeyBatch], bar: Any) -> Iterator[KeyBatch]:
    for batch in stream:
        yield batch
        bar.update(batch.n_tokens)


def _sums(
    stream: Iterable[KeyBatch], site: DownProj, stops: Sequence[int], at: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Σ k kᵀ over the first tokens, at each of the stops: one tensor, which goes on growing."""
    total = torch.zeros(len(site.W), len(site.W), dtype=torch.float64, device=at)
    left, counted = list(stops), 0
    for batch in stream:
        keys = batch.keys(site.layer, at)
        while left and len(keys):
            part, keys = keys[: left[0] - counted], keys[left[0] - counted :]
            total.addmm_(part.T, part)
            counted += len(part)
            if counted == left[0]:
                yield left.pop(0), mirror_(total)


def _directions(
    sums: Iterator[tuple[int, Tensor]], keys: Float[Tensor, "fact d_mlp"], ridge: float, end: int, layer: int
) -> tuple[Float[Tensor, "point fact d_mlp"], Float[Tensor, "d_mlp d_mlp"]]:
    """For each sum S the directions S⁻¹k (NaN where it can't be inverted), and the last sum.

    Of sums in place of means, as the length of u is irrelevant.
    """
    found, total = [], keys.new_zeros(0, 0)
    for n, grown in sums:
        total = grown
        if not bool(total.diagonal().isfinite().all()):
            raise RuntimeError("key statistics are not finite: the model overflows on this text (try another dtype)")
        try:
            found.append(torch.cholesky_solve(keys.T, cholesky(total, ridge=ridge)).T)
        except NotPositiveDefiniteError as error:
            if n == end:
                raise ValueError(
                    f"the second moment of layer {layer} after {n:,} tokens: {error}; wanted "
                    f"{TOKENS_PER_DIMENSION} tokens for each of {len(total)} dimensions: give more text, or ridge=1e-2"
                ) from error
            found.append(torch.full_like(keys, float("nan")))
    return torch.stack(found), total
