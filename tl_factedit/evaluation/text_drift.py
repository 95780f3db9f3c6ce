"""What a change does to plain text: perplexity and divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.estimate import Estimate, mean_over_facts
from tl_factedit.core.tokens import pad
from tl_factedit.measure.likelihood import kl_divergence, log_softmax_of
from tl_factedit.measure.population import Population
from tl_factedit.measure.texts import encode_texts


@dataclass(frozen=True, eq=False)
class TextDrift:
    """How a change moves the model on text that has nothing to do with it.

    Attributes:
        nll_before: Mean negative log-likelihood of a token in the unedited model, nats, [text].
        nll_after: The same in each changed model, [change text].
        kl: Mean over tokens of KL(unedited ‖ changed) of the next token, nats, [change text].
        tokens: How many tokens of each text were predicted, [text].
        perplexity_ratio: exp of the mean change of the negative log-likelihood of a token: 1 is none. Over
            changes if there are several, otherwise over texts.
        mean_kl: The mean of `kl`, over the same.
    """

    nll_before: Float[Tensor, "text"]
    nll_after: Float[Tensor, "change text"]
    kl: Float[Tensor, "change text"]
    tokens: Int[Tensor, "text"]
    perplexity_ratio: Estimate
    mean_kl: Estimate

    @property
    @plain_torch()
    def worst(self) -> float:
        """The largest perplexity ratio of a change."""
        return float(_ratio(self.nll_before, self.nll_after, self.tokens).max())

    def __repr__(self) -> str:
        """Both in a line."""
        over = f"{len(self.kl)} changes" if len(self.kl) > 1 else f"{len(self.tokens)} texts"
        return f"TextDrift(perplexity ratio {self.perplexity_ratio:.4f}, KL {self.mean_kl:.5f}, over {over})"


@plain_torch()
def drift(population: Population, texts: Sequence[str], *, batch_tokens: int = 1024) -> TextDrift:
    """Perplexity and divergence on neutral text.

    Args:
        population: The changed facts, under their changes.
        texts: Text that mentions none of the changed facts' subjects, and that no statistics of the editor are of; of
            two tokens at least. All log-probabilities of the unedited model are kept: 0.2 GB for 1,000 tokens of
            50,000 words.
        batch_tokens: Most tokens in one forward pass.

    Raises:
        ValueError: No texts, or one without a token to predict.
    """
    model = population.model
    rows = encode_texts(model, texts, population.prepend_bos)
    together: list[tuple[list[int], Tensor, Tensor]] = []  # texts, the places that are read, what was said there
    with frozen(model), torch.no_grad():
        runner = Runner(model)
        for attempt in that_fit([len(row) for row in rows], batch_tokens):
            with attempt as some:
                at = torch.arange(max(len(rows[i]) for i in some) - 1)
                together.append((some, at, log_softmax_of(runner, [rows[i] for i in some], [at] * len(some))))
    before = torch.zeros(len(rows), dtype=torch.float64)
    for some, _, old in together:
        before[some] = _mean_nll([rows[i] for i in some], old)

    def moved_by(runner: Runner, _: tuple[int, ...]) -> Tensor:
        nll, far = torch.zeros(2, len(rows), dtype=torch.float64)
        for some, at, old in together:
            here = [rows[i] for i in some]
            new = log_softmax_of(runner, here, [at] * len(some))
            nll[some] = _mean_nll(here, new)
            far[some] = _mean_over(here, kl_divergence(old, new))
        return torch.stack([nll, far])

    settings = (list(texts), batch_tokens)
    both = [found for _, found in population.each("drift", moved_by, settings=settings)]
    after, kl = torch.stack(both, 1)
    counts = torch.tensor([len(row) - 1 for row in rows])
    ratio, moved = _over(before, after, kl, counts)
    return TextDrift(before, after, kl, counts, ratio, moved)


def _over(before: Tensor, after: Tensor, kl: Tensor, counts: Tensor) -> tuple[Estimate, Estimate]:
    """Estimates over changes, or over texts where there is one change."""
    share = counts.double() / counts.sum()
    if len(after) > 1:
        return mean_over_facts(_ratio(before, after, counts)), mean_over_facts((kl * share).sum(-1))
    # A long text weighs more, whichever texts are drawn.
    weighted = share * len(share)
    log_ratio, moved = (mean_over_facts(each_text * weighted) for each_text in (after[0] - before, kl[0]))
    mean, low, high = (math.exp(end) for end in (log_ratio.mean, log_ratio.low, log_ratio.high))
    return Estimate(mean, low, high, log_ratio.n), moved


def _ratio(before: Tensor, after: Tensor, counts: Tensor) -> Float[Tensor, "change"]:
    return (((after - before) * counts).sum(-1) / counts.sum()).exp()


def _mean_nll(rows: Sequence[Tensor], log_p: Float[Tensor, "row k vocab"]) -> Float[Tensor, "row"]:
    return _mean_over(rows, -log_p.gather(-1, pad(rows, 0)[:, 1:, None])[..., 0])


def _mean_over(rows: Sequence[Tensor], values: Float[Tensor, "row k"]) -> Float[Tensor, "row"]:
    """The mean over the tokens that a row really has."""
    counts = torch.tensor([len(row) - 1 for row in rows])
    real = torch.arange(values.shape[1]) < counts[:, None]
    return torch.where(real, values, 0.0).double().sum(-1) / counts
