"""What a change breaks beside other subjects: what else is known of the same subject, and neutral text.

Neighbours (`evaluate`) are other subjects. An edit at a subject's last token harms first what else is said of that
subject, which no neighbour shows; and a change that harms everything shows in neutral text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.backend.halving import that_fit
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core.estimate import Estimate, mean_over_facts
from tl_factedit.core.facts import Fact, as_facts, need_old_object
from tl_factedit.core.tokens import check_length, continuation, encode
from tl_factedit.measure.excess import excess_of
from tl_factedit.measure.likelihood import kl_divergence, log_softmax_of
from tl_factedit.measure.population import BATCH_TOKENS, Population

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class Specificity:
    """What else is known of the changed facts' subjects, before and after.

    A fact is answered if the first token of its ``target_true`` is the model's first choice. Answers are averaged
    within a fact first; intervals are 95 % over facts.

    Attributes:
        facts: The changed facts.
        same_subject: What was asked, each about the subject of one of the facts.
        of_fact: Which fact's change each was asked under, [question].
        answered_before: Whether the unedited model answers rightly, [question].
        answered_after: Whether the changed one does, [question].
        moved: Kullback-Leibler divergence of the next token after the prompt, changed from unedited, nats, [question].
        before: Share answered by the unedited model.
        kept: The share of these that the changed model answers.
        kl: Mean of `moved`.
    """

    facts: tuple[Fact, ...]
    same_subject: tuple[Fact, ...]
    of_fact: tuple[int, ...]
    answered_before: Bool[Tensor, "question"]
    answered_after: Bool[Tensor, "question"]
    moved: Float[Tensor, "question"]
    before: Estimate
    kept: Estimate
    kl: Estimate

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a question."""
        import pandas as pd

        return pd.DataFrame(
            {
                "fact": [self.facts[i].name for i in self.of_fact],
                "prompt": [question.text for question in self.same_subject],
                "true": [question.target_true for question in self.same_subject],
                "before": self.answered_before.tolist(),
                "after": self.answered_after.tolist(),
                "kl": self.moved.tolist(),
            }
        )

    def __repr__(self) -> str:
        """The shares in a line."""
        if not self.same_subject:
            return "Specificity(none were given: nothing is known of the subjects' other relations)"
        shares = f"answered before {self.before:.2f}, kept {self.kept:.2f}; KL {self.kl:.3f}"
        return f"Specificity({len(self.same_subject)} asked: {shares})"


@plain_torch()
def specificity(
    population: Population, same_subject: Sequence[Fact], *, batch_tokens: int = BATCH_TOKENS
) -> Specificity:
    """Ask what else is known of some facts' subjects, before and after a change.

    Args:
        population: The changed facts, under their changes.
        same_subject: Facts about the same subjects, each asked under the change of every fact with its subject; none
            gives a result that says so.
        batch_tokens: Most tokens in one forward pass.

    Raises:
        ValueError: A fact about a subject that no fact of the population has, or that is one of these facts itself.
    """
    facts, model, bos = population.facts, population.model, population.prepend_bos
    same_subject = as_facts(same_subject, "same_subject")
    pairs = pair_same_subject(facts, same_subject)
    check_same_subject(model, same_subject, bos)
    rows = [encode(model.tokenizer, question.text, prepend_bos=bos)[0] for _, question in pairs]
    true = torch.tensor(
        [int(continuation(model.tokenizer, q.text, q.old, prepend_bos=bos)[0]) for _, q in pairs],
        dtype=torch.long,
    )
    ends = [torch.tensor([len(row) - 1]) for row in rows]

    def said(runner: Runner, chosen: Sequence[int]) -> Float[Tensor, "question vocab"]:
        """The log-probabilities that follow some of the questions."""
        found: dict[int, Tensor] = {}
        for attempt in that_fit([len(rows[i]) for i in chosen], batch_tokens):
            with attempt as some:
                here = [chosen[j] for j in some]
                answers = log_softmax_of(runner, [rows[i] for i in here], [ends[i] for i in here])[:, 0]
                found.update(zip(here, answers, strict=True))
        return torch.stack([found[i] for i in chosen]) if chosen else torch.zeros(0, 1)

    def asked_of(indices: Sequence[int]) -> list[int]:
        serves = set(indices)
        return [i for i, (fact, _) in enumerate(pairs) if fact in serves]

    with frozen(model), torch.no_grad():
        # A change for each fact is small: what the unedited model says is kept, and not asked for each again.
        was = said(Runner(model), range(len(pairs)))

    def read(runner: Runner, indices: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        chosen = asked_of(indices)
        now = said(runner, chosen)
        return now.argmax(-1) == true[chosen], kl_divergence(was[chosen], now)

    def settings(indices: tuple[int, ...]) -> object:
        return [asdict(pairs[i][1]) for i in asked_of(indices)], batch_tokens

    after = torch.zeros(len(pairs), dtype=torch.bool)
    before, moved = was.argmax(-1) == true, torch.full((len(pairs),), math.nan)
    for part, (answered, far) in population.each("specificity", read, settings=settings):
        chosen = asked_of(part.indices)
        after[chosen], moved[chosen] = answered, far
    of_fact = torch.tensor([fact for fact, _ in pairs], dtype=torch.long)

    def by_fact(values: Tensor) -> Tensor:
        return torch.stack([values[of_fact == i].float().nanmean() for i in range(len(facts))])

    return Specificity(
        facts=facts,
        same_subject=tuple(question for _, question in pairs),
        of_fact=tuple(of_fact.tolist()),
        answered_before=before,
        answered_after=after,
        moved=moved,
        before=excess_of(by_fact(before)),
        kept=excess_of(by_fact(torch.where(before, after.float(), math.nan))),
        kl=mean_over_facts(by_fact(moved)),
    )


def check_same_subject(model: Model, same_subject: Sequence[Fact], prepend_bos: bool) -> None:
    """Check that questions have an answer that goes on after them, and fit into the model's context.

    Raises:
        ValueError: One doesn't; the message names it.
    """
    for question, old in zip(same_subject, need_old_object(same_subject, "specificity"), strict=True):
        name, room = f"same_subject {question.name!r}", getattr(model.cfg, "n_ctx", None)
        check_length(model.tokenizer, question.text, name, prepend_bos=prepend_bos, room=room)
        continuation(model.tokenizer, question.text, old, prepend_bos=prepend_bos)


def pair_same_subject(facts: Sequence[Fact], same_subject: Sequence[Fact]) -> list[tuple[int, Fact]]:
    """Each question with each fact of its subject, once.

    Raises:
        ValueError: A fact about a subject that no fact has, or that is one of the facts itself.
    """
    about: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        about.setdefault(fact.subject, []).append(i)
    asked = {fact.text for fact in facts}
    for question in same_subject:
        if question.subject not in about:
            raise ValueError(f"{question.name!r} is about {question.subject!r}, needed the subject of a changed fact")
        if question.text in asked:
            raise ValueError(f"{question.name!r} asks what is changed, {question.text!r}: needed another relation")
    return list(dict.fromkeys((i, question) for question in same_subject for i in about[question.subject]))
