"""A picture of scores, of one model or before and after a change."""

from __future__ import annotations

from itertools import pairwise

from tl_factedit.backend.state import plain_torch
from tl_factedit.evaluation.scores import Scores
from tl_factedit.show.kinds import check_kind
from tl_factedit.show.markup import join
from tl_factedit.show.page import Picture
from tl_factedit.show.tables import prompt_table, score_table


@plain_torch()
def scores(before: Scores, after: Scores | None = None) -> Picture:
    """Scores of one model, or before and after a change, as a table, and every prompt's own numbers.

    Args:
        before: Scores from `evaluate`.
        after: Scores of the same facts on the changed model.

    Raises:
        TypeError: What is given aren't `Scores`.
        ValueError: The two are of different prompts or objects, or one was run with BOS and the other without.
    """
    both = [before] if after is None else [before, after]
    for given in both:
        check_kind(given, Scores, "fe.evaluate(model, facts) gives them")
    for a, b in pairwise(both):
        asked = [[(x.fact, x.ask, x.prompt, x.true, x.new) for x in scores.answers] for scores in (a, b)]
        if asked[0] != asked[1]:
            raise ValueError(
                f"before has {len(a.answers)} prompts and after {len(b.answers)}, needed the same prompts with the "
                "same objects: evaluate both models on the same facts"
            )
        if a.provenance.prepend_bos != b.provenance.prepend_bos:
            raise ValueError(
                f"before was run with prepend_bos={a.provenance.prepend_bos} and after with "
                f"{b.provenance.prepend_bos}, needed one policy: evaluate both with the same"
            )
    body = join(score_table(both), prompt_table(both))
    title = "Scores" if after is None else "Scores before and after"
    return Picture(title, body, tuple(score.provenance for score in both))
