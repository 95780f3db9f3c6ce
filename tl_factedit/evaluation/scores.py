"""Scores of a model as it is now, edited or not: efficacy, paraphrase, neighbourhood.

As CounterFact defines them (Meng et al. 2022, arXiv:2202.05262, sec. 3.3 and their code), with
NLL the mean negative log-likelihood of a token of the target::

    efficacy (ES), paraphrase (PS)   mean 1[NLL(true) > NLL(new)]
    neighbourhood (NS)               mean 1[NLL(true) < NLL(new)] on prompts about other subjects
    score (S)                        harmonic mean of the three means

A prompt whose two objects are the same (a neighbour whose own object is the new one) compares nothing and doesn't
count. These compare two probabilities; they don't say that the model would *say* the object. Prompts
are averaged within a fact first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tl_factedit.backend.protocol import Model
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core import saved
from tl_factedit.core.estimate import Estimate, jointly, over_facts
from tl_factedit.core.facts import Fact, as_facts, check_distinct, need_old_object
from tl_factedit.core.tokens import check_room, check_subject, continuation, encode, of_all
from tl_factedit.measure.likelihood import log_probs

if TYPE_CHECKING:
    import pandas as pd

Ask = Literal["rewrite", "paraphrase", "neighbour"]
KINDS: tuple[Ask, ...] = ("rewrite", "paraphrase", "neighbour")


@dataclass(frozen=True)
class Answer:
    """What the model makes of one prompt.

    Attributes:
        fact: Index of the fact.
        ask: Which kind of prompt it is.
        prompt: The prompt as run.
        true: The right object before any edit (for a neighbour, the neighbour's own).
        new: The object the fact's edit writes.
        nll_true: Mean negative log-likelihood of a token of `true`, in nats.
        nll_new: The same of `new`.
        same_first_token: Whether both begin with one token: comparing them says little then.
        tokens_true: How many tokens `true` has there.
        tokens_new: How many `new` has.
    """

    fact: int
    ask: Ask
    prompt: str
    true: str
    new: str
    nll_true: float
    nll_new: float
    same_first_token: bool
    tokens_true: int
    tokens_new: int

    @property
    def compared(self) -> bool:
        """Whether two objects were compared: not where both are the same, or the model's logits are NaN."""
        return self.true.strip() != self.new.strip() and math.isfinite(self.nll_true) and math.isfinite(self.nll_new)

    @property
    def success(self) -> bool:
        """Whether the answer is the wanted one: new on rewrite and paraphrase, true on a neighbour.

        False where nothing is `compared`.
        """
        prefers_new = self.nll_new < self.nll_true
        return self.nll_true < self.nll_new if self.ask == "neighbour" else prefers_new


@dataclass(frozen=True)
class Scores:
    """The result of `evaluate`.

    Attributes:
        efficacy: ES over facts.
        paraphrase: PS over the facts that have paraphrases.
        neighbourhood: NS over the facts that have neighbours.
        score: S, of the three means above; 0 if one of them is 0. Its n counts the facts that have all three.
        p_new: Probability of the new object on the rewrite prompt (per-token geometric mean).
        p_old: The same of the old object.
        answers: Every prompt's own numbers.
        facts: What was asked.
        provenance: Model, weights as they were, BOS policy, versions.
    """

    efficacy: Estimate
    paraphrase: Estimate
    neighbourhood: Estimate
    score: Estimate
    p_new: Estimate
    p_old: Estimate
    answers: tuple[Answer, ...]
    facts: tuple[Fact, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        """Check that answers are of the facts, and that estimates are numbers where there is something to estimate."""
        for i, answer in enumerate(self.answers):
            if not 0 <= answer.fact < len(self.facts):
                raise ValueError(f"answers[{i}].fact is {answer.fact}, needed one of {len(self.facts)} facts")
        for name in ("efficacy", "paraphrase", "neighbourhood", "score", "p_new", "p_old"):
            found: Estimate = getattr(self, name)
            for end, least in (("mean", 1), ("low", 2), ("high", 2)):
                if math.isfinite(getattr(found, end)) != (found.n >= least):
                    raise ValueError(f"{name}.{end} is {getattr(found, end)} of {found.n} facts")

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file.

        Raises:
            OSError: The file can't be written; what was there is as it was.

        Example:
            >>> fe.evaluate(model, facts).save("scores.safetensors")           # doctest: +SKIP
        """
        saved.save(self, path, "scores")

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is cut short or changed, holds another kind of thing, or what it holds doesn't fit
                together; the message names it.
        """
        return saved.load(path, "scores", cls)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON: dataclasses as dicts, NaN as NaN."""
        return saved.as_plain(self, "scores")

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a prompt."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "fact": self.facts[a.fact].name,
                    "ask": a.ask,
                    "prompt": a.prompt,
                    "true": a.true,
                    "new": a.new,
                    "p_true": float(torch.tensor(-a.nll_true).exp()),
                    "p_new": float(torch.tensor(-a.nll_new).exp()),
                    "success": a.success,
                    "same_first_token": a.same_first_token,
                }
                for a in self.answers
            ]
        )

    def __repr__(self) -> str:
        """The four scores in lines."""
        return (
            f"Scores(efficacy {self.efficacy:.3f}, paraphrase {self.paraphrase:.3f}, "
            f"neighbourhood {self.neighbourhood:.3f}, score {self.score:.3f}; "
            f"p(new) {self.p_new:.3f}, p(old) {self.p_old:.3f})"
        )

    def _repr_html_(self) -> str:
        return self.table().to_html(float_format="{:.3f}".format, index=False)


@plain_torch()
def evaluate(
    model: Model, facts: Fact | Sequence[Fact], *, prepend_bos: bool | None = None, batch_tokens: int = 4096
) -> Scores:
    """Score a model as it is now on some facts.

    Args:
        model: Either class, edited or not.
        facts: One or several, each with a ``target_new``; paraphrases and neighbours are scored where given.
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        batch_tokens: Most tokens in one forward pass.

    Raises:
        ValueError: No facts, a fact without ``target_new`` or given twice, an object that is no continuation of a
            prompt, or a text that is longer than the model's context; the message names the facts.

    Example:
        >>> fe.evaluate(model, [fact]).efficacy                   # doctest: +SKIP
    """
    facts = _checked(facts)
    provenance = Provenance.of(
        model, prepend_bos, prompts=(prompt for fact in facts for _, prompt, _ in _prompts(fact))
    )
    asked: list[tuple[int, Ask, str, str, str]] = [
        (i, ask, prompt, true, fact.after(prompt, fact.target_new or ""))
        for i, fact in enumerate(facts)
        for ask, prompt, true in _prompts(fact)
    ]
    of_facts = of_all(facts, lambda fact: _requests(model, fact, provenance.prepend_bos))
    requests = [request for of_fact in of_facts for request in of_fact]
    with frozen(model), torch.no_grad():
        found = log_probs(Runner(model), requests, batch_tokens=batch_tokens)
    answers = tuple(
        Answer(
            *row,
            nll_true=-float(found[2 * j].mean()),
            nll_new=-float(found[2 * j + 1].mean()),
            same_first_token=bool(requests[2 * j][1][0] == requests[2 * j + 1][1][0]),
            tokens_true=len(requests[2 * j][1]),
            tokens_new=len(requests[2 * j + 1][1]),
        )
        for j, row in enumerate(asked)
    )
    return scores_of(facts, answers, provenance)


def _checked(facts: Fact | Sequence[Fact]) -> tuple[Fact, ...]:
    facts = as_facts(facts)
    check_distinct(facts)
    need_old_object(facts, "evaluate")
    for fact in facts:
        if fact.target_new is None:
            raise ValueError(
                f"fact {fact.name!r} has no target_new, needed one to compare with: fact.but(target_new=...)"
            )
    return facts


def _prompts(fact: Fact) -> list[tuple[Ask, str, str]]:
    """(kind, prompt, right object before the edit) of everything a fact is asked."""
    theirs = fact.neighbour_targets or [fact.after(text, fact.old) for text in fact.neighbours]
    return [
        ("rewrite", fact.text, fact.old),
        *(("paraphrase", text, fact.after(text, fact.old)) for text in map(fact.fill, fact.paraphrases)),
        *(("neighbour", text, true) for text, true in zip(fact.neighbours, theirs, strict=True)),
    ]


def _requests(model: Model, fact: Fact, bos: bool) -> list[tuple[Int[Tensor, "pos"], Int[Tensor, "target"]]]:
    """Token ids of each prompt with each of its two objects."""
    found: list[tuple[Tensor, Tensor]] = []
    check_subject(model.tokenizer, fact)
    for _, prompt, true in _prompts(fact):
        ids, _ = encode(model.tokenizer, prompt, prepend_bos=bos)
        objects = (true, fact.after(prompt, fact.target_new or ""))
        targets = [continuation(model.tokenizer, prompt, target, prepend_bos=bos) for target in objects]
        check_room(ids, targets, getattr(model.cfg, "n_ctx", None), prompt)
        found += [(ids, target) for target in targets]
    return found


def harmonic(means: Sequence[Tensor]) -> Tensor:
    """The harmonic mean of several means, of any shape."""
    return len(means) / torch.stack([1 / mean for mean in means]).sum(0)


def _score(each: Sequence[Estimate], shares: Sequence[Sequence[float]]) -> Estimate:
    """S; where resampling shows no spread at all, its ends are those of the ends of the three (Wilson's)."""
    found = jointly(shares, harmonic)
    if found.n < 2 or found.low < found.high:
        return found
    low, high = (
        harmonic([torch.tensor(end) for end in ends]) for ends in ([e.low for e in each], [e.high for e in each])
    )
    return Estimate(found.mean, float(low), float(high), found.n)


def by_fact(facts: int, answers: Sequence[Answer], ask: Ask, of: Callable[[Answer], float]) -> list[float]:
    """The mean of a number of each fact's answers of a kind; NaN where it has none on which objects are compared."""
    found: list[list[float]] = [[] for _ in range(facts)]
    for answer in answers:
        if answer.ask == ask and answer.compared and not math.isnan(value := of(answer)):
            found[answer.fact].append(value)
    return [sum(mine) / len(mine) if mine else math.nan for mine in found]


def scores_of(facts: tuple[Fact, ...], answers: tuple[Answer, ...], provenance: Provenance) -> Scores:
    """The scores that some answers come to; an answer's `fact` is its place in `facts`."""
    shares = {ask: by_fact(len(facts), answers, ask, lambda answer: float(answer.success)) for ask in KINDS}
    rewrites = [answer for answer in answers if answer.ask == "rewrite"]
    return Scores(
        efficacy=over_facts(shares["rewrite"]),
        paraphrase=over_facts(shares["paraphrase"]),
        neighbourhood=over_facts(shares["neighbour"]),
        score=_score([over_facts(each) for each in shares.values()], list(shares.values())),
        p_new=over_facts([float(torch.tensor(-a.nll_new).exp()) for a in rewrites]),
        p_old=over_facts([float(torch.tensor(-a.nll_true).exp()) for a in rewrites]),
        answers=answers,
        facts=facts,
        provenance=provenance,
    )
