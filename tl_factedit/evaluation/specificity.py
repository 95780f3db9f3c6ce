"""What a change breaks beside other subjects: what else is known of the same subject, and neutral text.

Neighbours (`evaluate`) are other subjects. An edit at a subject's last token harms first what else is said of that
subject, which no neighbour shows; and a change that harms everything shows in neutral text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_factedit.measure.change import Changed, Part, bos_of_change, each
from tl_factedit.core.estimate import Estimate, jointly
from tl_factedit.measure.excess import excess_of
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.measure.cache import read_each
from tl_factedit.backend.model import Model, Runner, quiet
from tl_factedit.core.tokens import batches, continuation, encode, pad

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Asides:
    """What else is known of the changed facts' subjects, before and after.

    An aside is answered if the first token of its ``target_true`` is the model's first choice. Asides are averaged
    within a fact first; intervals are 95 % over facts.

    Attributes:
        facts: The changed facts.
        asides: What was asked, each about the subject of one of the facts.
        of_fact: Which fact's change each was asked under, [aside].
        answered_before: In the unedited model, [aside].
        answered_after: In the changed one, [aside].
        moved: Kullback-Leibler divergence of the next token after the prompt, changed from unedited, nats, [aside].
        before: Share answered by the unedited model.
        kept: Of these, the share that the changed model answers.
        kl: Mean of `moved`.
    """

    facts: tuple[Fact, ...]
    asides: tuple[Fact, ...]
    of_fact: tuple[int, ...]
    answered_before: Bool[Tensor, "aside"]
    answered_after: Bool[Tensor, "aside"]
    moved: Float[Tensor, "aside"]
    before: Estimate
    kept: Estimate
    kl: Estimate

    def table(self) -> pd.DataFrame:
        """One row an aside."""
        import pandas as pd

        return pd.DataFrame(
            {
                "fact": [self.facts[i].name for i in self.of_fact],
                "prompt": [aside.text for aside in self.asides],
                "true": [aside.target_true for aside in self.asides],
                "before": self.answered_before.tolist(),
                "after": self.answered_after.tolist(),
                "kl": self.moved.tolist(),
            }
        )

    def __repr__(self) -> str:
        """The shares in a line."""
        if not self.asides:
            return "Asides(none were given: nothing is known of the subjects' other relations)"
        shares = f"answered before {self.before:.2f}, kept {self.kept:.2f}; KL {self.kl:.3f}"
        return f"Asides({len(self.asides)} asked: {shares})"


def ask_asides(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    asides: Sequence[Fact],
    *,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Asides:
    """Ask what else is known of some facts' subjects, before and after a change.

    Args:
        model: The unedited model.
        changed: A change of it, a list with a change for each fact, or another model.
        facts: The changed facts.
        asides: Facts about the same subjects, each asked under the change of every fact with its subject; none
            gives a result that says so.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        batch_tokens: Most tokens in one forward pass.
        folder: Where to keep what is read of each change; a call that was killed goes on from there.
        progress: Whether to show a bar on several changes that take longer than a second.

    Raises:
        ValueError: An aside about a subject that no fact has, or that is one of the facts itself.
    """
    facts = as_facts(facts)
    parts = list(each(model, changed, facts))
    bos = bos_of_change(model, changed, prepend_bos)
    pairs = pair_asides(facts, asides)
    rows = [encode(model.tokenizer, aside.text, prepend_bos=bos)[0] for _, aside in pairs]
    true = torch.tensor(
        [int(continuation(model.tokenizer, aside.text, aside.target_true, prepend_bos=bos)[0]) for _, aside in pairs],
        dtype=torch.long,
    )
    ends = [torch.tensor([len(row) - 1]) for row in rows]

    def said(runner: Runner, chosen: Sequence[int]) -> Float[Tensor, "aside vocab"]:
        """The log-probabilities that follow some asides."""
        found = {
            i: each
            for some in batches([len(rows[i]) for i in chosen], batch_tokens)
            for i, each in zip(
                [chosen[j] for j in some],
                _log_probs(runner, [rows[chosen[j]] for j in some], [ends[chosen[j]] for j in some])[:, 0],
                strict=True,
            )
        }
        return torch.stack([found[i] for i in chosen]) if chosen else torch.zeros(0, 1)

    def asked_of(part: Part) -> list[int]:
        serves = set(part.indices)
        return [i for i, (fact, _) in enumerate(pairs) if fact in serves]

    with quiet(model), torch.no_grad():
        # A change for each fact is small: what the unedited model says is kept, and not asked for each again.
        was = said(Runner(model), range(len(pairs)))

    def read(tested: Model, part: Part) -> tuple[Tensor, Tensor]:
        chosen = asked_of(part)
        now = said(Runner(tested), chosen)
        return now.argmax(-1) == true[chosen], _divergence(was[chosen], now)

    settings = {"asides": [asdict(aside) for aside in asides], "settings": (bos, batch_tokens)}
    after = torch.zeros(len(pairs), dtype=torch.bool)
    before, moved = was.argmax(-1) == true, torch.full((len(pairs),), math.nan)
    for part, (answered, far) in read_each(
        parts, read, what="asides", asked=settings, folder=folder, progress=progress
    ):
        after[asked_of(part)], moved[asked_of(part)] = answered, far
    of_fact = torch.tensor([fact for fact, _ in pairs], dtype=torch.long)

    def by_fact(values: Tensor) -> Tensor:
        return torch.stack([values[of_fact == i].float().nanmean() for i in range(len(facts))])

    return Asides(
        facts=facts,
        asides=tuple(aside for _, aside in pairs),
        of_fact=tuple(of_fact.tolist()),
        answered_before=before,
        answered_after=after,
        moved=moved,
        before=excess_of(by_fact(before)),
        kept=excess_of(by_fact(torch.where(before, after.float(), math.nan))),
        kl=_mean(by_fact(moved)),
    )


def pair_asides(facts: Sequence[Fact], asides: Sequence[Fact]) -> list[tuple[int, Fact]]:
    """Each aside with each fact of its subject, once.

    Raises:
        ValueError: An aside about a subject that no fact has, or that is one of the facts itself.
    """
    about: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        about.setdefault(fact.subject, []).append(i)
    asked = {fact.text for fact in facts}
    for aside in asides:
        if aside.subject not in about:
            raise ValueError(f"aside {aside.name!r} is about {aside.subject!r}, needed the subject of a changed fact")
        if aside.text in asked:
            raise ValueError(f"aside {aside.name!r} asks what is changed, {aside.text!r}: needed another relation")
    return list(dict.fromkeys((i, aside) for aside in asides for i in about[aside.subject]))


# ------------------------------------------------------------------------------------ neutral text


@dataclass(frozen=True, eq=False)
class Drift:
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
    def worst(self) -> float:
        """The largest perplexity ratio of a change."""
        return float(_ratio(self.nll_before, self.nll_after, self.tokens).max())

    def __repr__(self) -> str:
        """Both in a line."""
        over = f"{len(self.kl)} changes" if len(self.kl) > 1 else f"{len(self.tokens)} texts"
        return f"Drift(perplexity ratio {self.perplexity_ratio:.4f}, KL {self.mean_kl:.5f}, over {over})"


def drift(
    model: Model,
    changed: Changed,
    facts: Fact | Sequence[Fact],
    texts: Sequence[str],
    *,
    prepend_bos: bool | None = None,
    batch_tokens: int = 1024,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Drift:
    """Perplexity and divergence on neutral text.

    Args:
        model: The unedited model.
        changed: A change of it, a list with a change for each fact, or another model.
        facts: The changed facts (which of a list of changes are looked at).
        texts: Text that mentions none of the changed facts' subjects, and that no statistics of the editor are of; of
            two tokens at least. All log-probabilities of the unedited model are kept: 0.2 GB for 1,000 tokens of
            50,000 words.
        prepend_bos: BOS policy; None for the change's own, or the model's.
        batch_tokens: Most tokens in one forward pass.
        folder: Where to keep what is read of each change; a call that was killed goes on from there.
        progress: Whether to show a bar on several changes that take longer than a second.

    Raises:
        ValueError: No texts, or one without a token to predict.
    """
    parts = list(each(model, changed, as_facts(facts)))
    bos = bos_of_change(model, changed, prepend_bos)
    rows = encode_texts(model, texts, bos)
    together = list(batches([len(row) for row in rows], batch_tokens))
    read = [torch.arange(max(len(rows[i]) for i in some) - 1) for some in together]
    with quiet(model), torch.no_grad():
        runner = Runner(model)
        was = [
            _log_probs(runner, [rows[i] for i in some], [at] * len(some))
            for some, at in zip(together, read, strict=True)
        ]
    before = torch.zeros(len(rows), dtype=torch.float64)
    for some, old in zip(together, was, strict=True):
        before[some] = _mean_nll([rows[i] for i in some], old)

    def moved_by(tested: Model, _: Part) -> Tensor:
        nll, far = torch.zeros(2, len(rows), dtype=torch.float64)
        for some, at, old in zip(together, read, was, strict=True):
            here = [rows[i] for i in some]
            new = _log_probs(Runner(tested), here, [at] * len(some))
            nll[some] = _mean_nll(here, new)
            far[some] = _mean_over(here, _divergence(old, new))
        return torch.stack([nll, far])

    settings = {"texts": list(texts), "settings": (bos, batch_tokens)}
    both = [
        found for _, found in read_each(parts, moved_by, what="drift", asked=settings, folder=folder, progress=progress)
    ]
    after, kl = torch.stack(both, 1)
    counts = torch.tensor([len(row) - 1 for row in rows])
    ratio, moved = _over(before, after, kl, counts)
    return Drift(before, after, kl, counts, ratio, moved)


def encode_texts(model: Model, texts: Sequence[str], prepend_bos: bool) -> list[Int[Tensor, "_"]]:
    """Token ids of neutral texts.

    Raises:
        ValueError: No texts, or one without a token to predict.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError("texts is empty or a string, needed a list of texts")
    rows = [encode(model.tokenizer, text, prepend_bos=prepend_bos)[0] for text in texts]
    short = [text for text, row in zip(texts, rows, strict=True) if len(row) < 2]
    if short:
        raise ValueError(f"text {short[0]!r} has no token to predict, needed two tokens at least")
    return rows


def _over(before: Tensor, after: Tensor, kl: Tensor, counts: Tensor) -> tuple[Estimate, Estimate]:
    """Estimates over changes, or over texts where there is one change."""
    share = counts.double() / counts.sum()
    if len(after) > 1:
        return _mean(_ratio(before, after, counts)), _mean((kl * share).sum(-1))
    # A long text weighs more, whichever texts are drawn.
    weighted = share * len(share)
    log_ratio, moved = (_mean(each_text * weighted) for each_text in (after[0] - before, kl[0]))
    mean, low, high = (math.exp(end) for end in (log_ratio.mean, log_ratio.low, log_ratio.high))
    return Estimate(mean, low, high, log_ratio.n), moved


def _ratio(before: Tensor, after: Tensor, counts: Tensor) -> Float[Tensor, "change"]:
    return (((after - before) * counts).sum(-1) / counts.sum()).exp()


# ------------------------------------------------------------------------------------ one model


def _mean(values: Float[Tensor, "fact"]) -> Estimate:
    """Of numbers that are no shares."""
    return jointly([values.tolist()], lambda means: means[0])


def _log_probs(runner: Runner, rows: Sequence[Tensor], at: Sequence[Tensor]) -> Float[Tensor, "row k vocab"]:
    return runner.logits(pad(rows, 0), at=torch.stack(list(at))).float().log_softmax(-1).cpu()


def _mean_nll(rows: Sequence[Tensor], log_p: Float[Tensor, "row k vocab"]) -> Float[Tensor, "row"]:
    return _mean_over(rows, -log_p.gather(-1, pad(rows, 0)[:, 1:, None])[..., 0])


def _mean_over(rows: Sequence[Tensor], values: Float[Tensor, "row k"]) -> Float[Tensor, "row"]:
    """The mean over the tokens that a row really has."""
    counts = torch.tensor([len(row) - 1 for row in rows])
    real = torch.arange(values.shape[1]) < counts[:, None]
    return torch.where(real, values, 0.0).double().sum(-1) / counts


def _divergence(was: Float[Tensor, "*row vocab"], now: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row"]:
    """KL(was ‖ now), of log-probabilities."""
    return (was.exp() * (was - now)).sum(-1)
