"""Facts that a model can be asked about: what doesn't serve is set aside, and it is said why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tl_factedit.backend.protocol import Model, bos_policy
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.kinds import check_flags
from tl_factedit.core.words import counted
from tl_factedit.data.alignable import alignable
from tl_factedit.evaluation.knowledge import known as which_are_known
from tl_factedit.measure.first_tokens import FirstTokens

if TYPE_CHECKING:
    import pandas as pd


class Selected(list[Fact]):
    """Facts that serve, a list, and what was set aside.

    Attributes:
        removed: Each fact that was set aside, with the filter's name and the reason.
    """

    def __init__(self, facts: Sequence[Fact], removed: Sequence[tuple[Fact, str, str]]) -> None:
        super().__init__(facts)
        self.removed = tuple(removed)

    def table(self) -> pd.DataFrame:
        """One row a fact that was set aside: its name, the filter, the reason."""
        import pandas as pd

        rows = [(fact.name, name, why) for fact, name, why in self.removed]
        return pd.DataFrame(rows, columns=["fact", "filter", "why"])

    def __repr__(self) -> str:
        """How many are kept, and how many each filter set aside."""
        counts = Counter(name for _, name, _ in self.removed)
        told = "".join(f"; {name}: {count} set aside" for name, count in counts.items())
        return f"{counted(len(self), 'fact')} of {len(self) + len(self.removed)}{told}"


@plain_torch()
def select(
    model: Model,
    facts: Fact | Iterable[Fact],
    *,
    known: bool = True,
    apart: bool = True,
    one_a_subject: bool = False,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
) -> Selected:
    """The facts that a model can be asked about, in their order, and why the others can't.

    The filters, each on what the ones before it left:

    - ``"alignable"``: subject and objects stand on the tokenizer's boundaries (`alignable`); always.
    - ``"asked once"``: no other fact before it asks the same text; always.
    - ``"one a subject"``: no other fact before it is about the same subject: edits of one subject write at one key.
    - ``"objects apart"``: old and new object begin with different tokens; what compares first tokens can't tell others.
    - ``"known"``: the model says the old object after the prompt (`known`).

    Args:
        model: Either class, as it is now.
        facts: The facts.
        known: Whether those that the model doesn't know are set aside; a fact without ``target_true`` isn't known.
        apart: Whether those whose objects begin alike are set aside.
        one_a_subject: Whether a subject has one fact.
        prepend_bos: BOS policy; None for the model's default.
        batch_tokens: Most tokens in one forward pass.

    Returns:
        A list of `Fact` that says what it left out: ``.removed``, ``.table()``.

    Raises:
        ValueError: Something else than facts, or none.

    Example:
        >>> facts = fe.data.select(model, fe.data.counterfact("counterfact.json"))         # doctest: +SKIP
        >>> facts                                                                          # doctest: +SKIP
        16 facts of 500; alignable: 1 set aside; known: 483 set aside
    """
    given = as_facts(facts)
    check_flags(known=known, apart=apart, one_a_subject=one_a_subject)
    if not given:
        raise ValueError("facts is empty, needed at least one")
    bos = bos_policy(model, prepend_bos)
    kept, bad = alignable(model, given, prepend_bos=bos)
    removed = [(fact, "alignable", why) for fact, why in bad]

    def sort(name: str, reasons: Sequence[str | None]) -> None:
        nonlocal kept
        removed.extend((fact, name, why) for fact, why in zip(kept, reasons, strict=True) if why is not None)
        kept = [fact for fact, why in zip(kept, reasons, strict=True) if why is None]

    sort("asked once", _repeated([fact.text for fact in kept], kept, "asks what {!r} asks"))
    if one_a_subject:
        sort("one a subject", _repeated([fact.subject for fact in kept], kept, "is about the subject of {!r}"))
    if apart:
        sort("objects apart", [_alike(model, fact, bos) for fact in kept])
    if known:
        sort("known", _unknown(model, kept, bos, batch_tokens))
    return Selected(kept, removed)


def _repeated(keys: Sequence[str], facts: Sequence[Fact], why: str) -> list[str | None]:
    first: dict[str, Fact] = {}
    return [
        None if first.setdefault(key, fact) is fact else why.format(first[key].name)
        for key, fact in zip(keys, facts, strict=True)
    ]


def _alike(model: Model, fact: Fact, bos: bool) -> str | None:
    if fact.target_true is None or fact.target_new is None or FirstTokens.of(model.tokenizer, fact, bos).apart:
        return None
    return f"{fact.target_true!r} and {fact.target_new!r} begin with one token"


def _unknown(model: Model, facts: Sequence[Fact], bos: bool, batch_tokens: int) -> list[str | None]:
    """Of each fact what the model says instead."""
    askable = [fact for fact in facts if fact.target_true is not None]
    if not askable:
        return ["there is no old object"] * len(facts)
    table = which_are_known(model, askable, prepend_bos=bos, batch_tokens=batch_tokens)
    told = {
        id(fact): None if yes else f"the model says {top!r} first, and {fact.target_true!r} has rank {rank}"
        for fact, top, rank, yes in zip(askable, table.top, table["rank"], table.known, strict=True)
    }
    return [told.get(id(fact), "there is no old object") for fact in facts]
