"""Scores that papers define on what `Scores` holds: Meng et al.'s magnitudes, Hase et al.'s rewrite scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.kinds import check_one
from tl_factedit.evaluation.scores import KINDS, Answer, Scores, by_fact


@dataclass(frozen=True)
class ThreeScores:
    """A score of the edits' prompts, their paraphrases and their neighbours, each over facts.

    Attributes:
        rewrite: After the edits' own prompts.
        paraphrase: After their paraphrases.
        neighbourhood: After their neighbours.
    """

    rewrite: Estimate
    paraphrase: Estimate
    neighbourhood: Estimate

    def __repr__(self) -> str:
        """The three in a line."""
        return f"rewrite {self.rewrite:.3f}, paraphrase {self.paraphrase:.3f}, neighbourhood {self.neighbourhood:.3f}"


@plain_torch()
def magnitudes(scores: Scores) -> ThreeScores:
    """EM, PM and NM (Meng et al. 2022): by how much the wanted object is likelier than the other.

    ``p(new) − p(true)`` after prompts and paraphrases, ``p(true) − p(new)`` after neighbours, p the geometric mean of
    the probabilities of an object's tokens. Averaged within a fact first.

    Example:
        >>> fe.evaluation.magnitudes(fe.evaluate(model, facts)).rewrite           # doctest: +SKIP
    """
    check_one(scores, Scores, "scores", "what fe.evaluate returns")
    signs = {"rewrite": 1.0, "paraphrase": 1.0, "neighbour": -1.0}

    def of(answer: Answer) -> float:
        return signs[answer.ask] * (math.exp(-answer.nll_new) - math.exp(-answer.nll_true))

    return ThreeScores(
        *(over_facts(by_fact(len(scores.facts), scores.answers, ask, of), span=(-1.0, 1.0)) for ask in KINDS)
    )


@plain_torch()
def rewrite_scores(before: Scores, after: Scores) -> ThreeScores:
    """The scores of Hase et al. 2023 (section 4): how far the new object's probability moved, of how far it could.

    ``(p* − p) / (1 − p)`` after prompts and paraphrases, ``1 − |p* − p| / (½ + |p − ½|)`` after neighbours, p and p*
    the probability of the *whole* new object before and after. All paraphrases and neighbours count, averaged within a
    fact; their code takes the first of each, and cuts at 0.

    Args:
        before: Of the unedited model.
        after: Of the edited one, on the same facts.

    Raises:
        ValueError: They are of different prompts.
    """
    check_alike({"before": before, "after": after})

    def p(answer: Answer) -> float:
        return math.exp(-answer.nll_new * answer.tokens_new)

    def score(was: Answer, now: Answer) -> float:
        one, other = p(was), p(now)
        if was.ask == "neighbour":
            return 1 - abs(other - one) / (0.5 + abs(one - 0.5))
        return (other - one) / (1 - one) if one < 1 else math.nan

    then = iter(before.answers)
    found = {id(now): score(next(then), now) for now in after.answers}
    return ThreeScores(
        *(
            over_facts(
                by_fact(len(after.facts), after.answers, ask, lambda answer: found[id(answer)]),
                span=(0.0, 1.0) if ask == "neighbour" else None,
            )
            for ask in KINDS
        )
    )


def check_alike(scores: Mapping[str, Scores]) -> None:
    """Check that all scores are of the same prompts and objects."""
    for name, each in scores.items():
        check_one(each, Scores, repr(name), "what fe.evaluate returns")
    asked = {name: [(a.fact, a.ask, a.prompt, a.true, a.new) for a in each.answers] for name, each in scores.items()}
    first = next(iter(asked))
    for name, mine in asked.items():
        if mine != asked[first]:
            raise ValueError(f"{name!r} and {first!r} are scores of different prompts, needed the same facts for both")
