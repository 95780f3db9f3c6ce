"""What follows from an edit, and what shouldn't, asked in words: ripple effects.

Each query is answered greedily, before and after, and what has to be named is looked for in what is said (never in the
prompt). A question counts where the unedited model answers its conditions. Beside the right answers stands how often
the *old* one is still given: what an edit that only lies over a fact leaves behind.

Cohen et al. 2023 (RippleEdits, arXiv:2307.12976) and Zhong et al. 2023 (MQuAKE, arXiv:2305.14795) are this with their
own kinds of questions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tl_factedit.backend.chat import chat_prompt
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core import saved
from tl_factedit.core.estimate import Estimate, over_facts
from tl_factedit.core.kinds import as_several, as_whole, check_flags
from tl_factedit.core.tokens import encode
from tl_factedit.core.words import counted
from tl_factedit.evaluation.cases import EditCase, Query
from tl_factedit.evaluation.in_words import names_it, say
from tl_factedit.measure.change import Changed, identity
from tl_factedit.measure.population import BATCH_TOKENS, Population

if TYPE_CHECKING:
    import pandas as pd

What = Literal["right", "right_before", "old", "old_before"]
FRAME = "{}"


@dataclass(frozen=True)
class Asked:
    """A question that was asked, before and after.

    Attributes:
        case: The place of its case.
        kind: The question's kind.
        texts: Its queries as they were run.
        said_before: What the unedited model said to each.
        said: What the changed model said.
        counts: Whether the unedited model answers its conditions.
        right_before: Whether the unedited model gives the answer that is right after the edit.
        right: Whether the changed one does.
        old_before: Whether the unedited model names what was right before, and not what is now; None where that is
            the same.
        old: Whether the changed one does.
    """

    case: int
    kind: str
    texts: tuple[str, ...]
    said_before: tuple[str, ...]
    said: tuple[str, ...]
    counts: bool
    right_before: bool
    right: bool
    old_before: bool | None
    old: bool | None


@dataclass(frozen=True, eq=False)
class Ripples:
    """The result of `ripples`.

    Attributes:
        cases: What was asked.
        asked: The questions, case by case.
        holds: Whether the changed model answers each of a case's edits with its new object, [case].
        was_known: Whether the unedited model answered each with its old object, [case] (of an edit without one: that it
            didn't say the new one).
        n_tokens: Most tokens of an answer.
        frame: What questions were put into.
        provenance: Of the unedited model.
    """

    cases: tuple[EditCase, ...]
    asked: tuple[Asked, ...]
    holds: tuple[bool, ...]
    was_known: tuple[bool, ...]
    n_tokens: int
    frame: str
    provenance: Provenance

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of questions, in the order of the cases."""
        return tuple(dict.fromkeys(each.kind for each in self.asked))

    @plain_torch()
    def share(self, kind: str, what: What = "right", *, only_held: bool = False) -> Estimate:
        """How often a kind of question is answered so, over cases (of each the mean of its questions that count).

        Args:
            kind: One of `kinds`.
            what: ``"right"`` after the edit, ``"right_before"``, or ``"old"`` and ``"old_before"``: the answer that was
                right before is given, and not the new one.
            only_held: Only of cases whose edits were known before and hold, as RippleEdits counts.

        Raises:
            ValueError: An unknown kind, or another `what`.
        """
        if kind not in self.kinds:
            raise ValueError(f"kind is {kind!r}, needed one of {', '.join(map(repr, self.kinds))}")
        if what not in get_args(What):
            raise ValueError(f"what is {what!r}, needed one of {', '.join(map(repr, get_args(What)))}")
        of_case: list[list[float]] = [[] for _ in self.cases]
        for each in self.asked:
            value = getattr(each, what)
            if each.kind == kind and each.counts and value is not None:
                of_case[each.case].append(float(value))
        held = [not only_held or (a and b) for a, b in zip(self.holds, self.was_known, strict=True)]
        return over_facts([sum(x) / len(x) if x and yes else math.nan for x, yes in zip(of_case, held, strict=True)])

    @plain_torch()
    def table(self, *, only_held: bool = False) -> pd.DataFrame:
        """One row a kind: how many questions there are and count, and the shares with their intervals over cases.

        Args:
            only_held: As in `share`.
        """
        import pandas as pd

        rows = []
        for kind in self.kinds:
            mine = [each for each in self.asked if each.kind == kind]
            right = self.share(kind, only_held=only_held)
            row: dict[str, Any] = {
                "kind": kind,
                "questions": len(mine),
                "count": sum(each.counts for each in mine),
                "cases": right.n,
            }
            for what in get_args(What):
                share = self.share(kind, what, only_held=only_held)
                row |= {what: share.mean, f"{what}_low": share.low, f"{what}_high": share.high}
            rows.append(row)
        return pd.DataFrame(rows)

    @plain_torch()
    def said(self) -> pd.DataFrame:
        """One row a query: what was said before and after."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "case": self.cases[each.case].name,
                    "kind": each.kind,
                    "asked": text,
                    "said_before": before,
                    "said": after,
                    "counts": each.counts,
                    "right": each.right,
                    "old": each.old,
                }
                for each in self.asked
                for text, before, after in zip(each.texts, each.said_before, each.said, strict=True)
            ]
        )

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file.

        Raises:
            OSError: The file can't be written; what was there is as it was.
        """
        saved.save(self, path, "ripples")

    @classmethod
    def load(cls, path: str | Path) -> Ripples:
        """Read a file of `save`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is cut short or changed, holds another kind of thing, or what it holds doesn't fit
                together; the message names it.
        """
        return saved.load(path, "ripples", cls)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        return saved.as_plain(self, "ripples")

    def __repr__(self) -> str:
        """A line a kind."""
        held = sum(a and b for a, b in zip(self.holds, self.was_known, strict=True))
        lines = [f"Ripples({counted(len(self.cases), 'case')}, {held} of them known before and edited)"]
        for kind in self.kinds:
            mine = [each for each in self.asked if each.kind == kind]
            right, before, old = (self.share(kind, what) for what in ("right", "right_before", "old"))
            old_too = f", the old answer {old:.2f}" if old.n else ""
            count = sum(each.counts for each in mine)
            told = f"right {before:.2f} → {right:.2f}{old_too}" if count else "none counts"
            lines.append(f"  {kind}: {told} ({count} of {len(mine)} count)")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The table."""
        return str(self.table().to_html(float_format="{:.2f}".format, index=False))


@plain_torch()
def ripples(
    model: Model,
    changed: Changed,
    cases: EditCase | Sequence[EditCase],
    *,
    n_tokens: int = 20,
    frame: str = FRAME,
    chat: bool = False,
    system: str | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
    folder: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> Ripples:
    r"""Ask what follows from edits, and what shouldn't, before and after.

    Args:
        model: The unedited model.
        changed: One change for all cases; a list, of which each case's facts are served by one; or the model as it was
            changed in any other way.
        cases: From `fe.data.mquake`, `fe.data.ripple_edits`, `fe.data.knowedit`, or made by hand.
        n_tokens: Most tokens of an answer; it ends before, at the end of the text or a line break.
        frame: What texts that end in a question mark are put into, ``"Q: {}\nA:"`` or a few solved examples with it:
            models that aren't chat models rarely answer a bare question.
        chat: Whether each text is what a user says, in the tokenizer's chat template.
        system: What the system says in the chat.
        prepend_bos: BOS policy of a model changed in another way; None for its default. An edit has its own.
        batch_tokens: Most tokens in one forward pass.
        folder: Where to keep what was said: a call that was killed goes on there.
        force: Whether to ask about facts that a single change wasn't made for.
        progress: Whether to show bars on what takes longer than a second.

    Returns:
        How often each kind of question is answered rightly, and by the old answer, with intervals over cases.

    Raises:
        ValueError: No cases; a frame without ``{}``; a case whose facts are served by several changes of a list; a text
            that with its answer is longer than the model's context; and as `Population.of`.

    Example:
        >>> cases = fe.data.mquake("MQuAKE-CF-3k-v2.json")                                # doctest: +SKIP
        >>> edits = [editor(model, case.facts) for case in cases]                        # doctest: +SKIP
        >>> fe.evaluation.ripples(model, edits, cases, frame="Q: {}\nA:")                 # doctest: +SKIP
    """
    cases = as_several(
        [cases] if isinstance(cases, EditCase) else cases, EditCase, "cases", "an fe.evaluation.EditCase"
    )
    if not cases:
        raise ValueError("cases is empty, needed at least one")
    as_whole(n_tokens, "n_tokens")
    check_flags(chat=chat, force=force, progress=progress)
    if not isinstance(frame, str) or frame.count("{}") != 1:
        raise ValueError(f'frame is {frame!r}, needed one "{{}}", where the question goes')
    if chat and frame != FRAME:
        raise ValueError("frame and chat are two ways to put a question, needed one")
    if system is not None and not chat:
        raise ValueError("system is given, but chat=False: only a chat has what the system says")
    for i, case in enumerate(cases):
        if (case.facts, case.questions) in [(other.facts, other.questions) for other in cases[:i]]:
            raise ValueError(f"case {case.name!r} is given twice, needed each once: it would count as two cases")
    facts = {identity(fact): fact for case in cases for fact in case.facts}
    population = Population.of(
        model, changed, tuple(facts.values()), prepend_bos=prepend_bos, folder=folder, force=force, progress=progress
    )
    place = {key: i for i, key in enumerate(facts)}

    def framed(text: str) -> str:
        if chat:
            return chat_prompt(model, text, system=system)
        return frame.replace("{}", text) if text.rstrip().endswith(("?", "？")) else text

    ids = {text: encode(model.tokenizer, framed(text), prepend_bos=population.prepend_bos)[0] for text in _texts(cases)}
    room = getattr(model.cfg, "n_ctx", None)
    for text, mine in ids.items():
        if room is not None and len(mine) + n_tokens > room:
            raise ValueError(
                f"{text!r} has {len(mine)} tokens as it is run, which with an answer of {n_tokens} are more than the "
                f"{room} that the model reads"
            )

    def answered(runner: Runner, texts: Sequence[str]) -> list[str]:
        return say(
            runner.model, [ids[text] for text in texts], [n_tokens] * len(texts), batch_tokens, progress=progress
        )

    def texts_of(indices: tuple[int, ...], *, conditions: bool) -> list[str]:
        mine = set(indices)
        served = [case for case in cases if place[identity(case.facts[0])] in mine]
        return list(dict.fromkeys(_texts(served, conditions=conditions)))

    settings = ([framed(text) for text in ids], n_tokens, batch_tokens)
    everything = texts_of(tuple(range(len(facts))), conditions=True)
    before = dict(
        zip(
            everything,
            population.unedited("ripples", lambda runner, _: answered(runner, everything), settings=settings),
            strict=True,
        )
    )
    after: list[Mapping[str, str]] = [{}] * len(cases)
    for part, said in population.each(
        "ripples", lambda runner, indices: answered(runner, texts_of(indices, conditions=False)), settings=settings
    ):
        mine, there = set(part.indices), dict(zip(texts_of(part.indices, conditions=False), said, strict=True))
        for i, case in enumerate(cases):
            served = {place[identity(fact)] in mine for fact in case.facts}
            if len(served) > 1:
                raise ValueError(f"the facts of case {case.name!r} are served by several changes, needed one for all")
            if served == {True}:
                after[i] = there
    asked = tuple(
        _asked(i, question.kind, question.queries, question.every, question.conditions, before, after[i])
        for i, case in enumerate(cases)
        for question in case.questions
    )
    return Ripples(
        cases,
        asked,
        tuple(
            all(names_it(after[i][fact.text], str(fact.target_new).strip()) for fact in case.facts)
            for i, case in enumerate(cases)
        ),
        tuple(all(_was_known(before[fact.text], fact) for fact in case.facts) for case in cases),
        n_tokens,
        frame,
        Provenance.of(model, population.prepend_bos),
    )


def _texts(cases: Iterable[EditCase], *, conditions: bool = True) -> list[str]:
    """Everything that cases ask: the edits' prompts, the queries and, of the unedited model, the conditions."""
    return [
        text
        for case in cases
        for text in (
            *(fact.text for fact in case.facts),
            *(query.text for question in case.questions for query in question.queries),
            *(query.text for question in case.questions for query in question.conditions if conditions),
        )
    ]


def _asked(
    case: int,
    kind: str,
    queries: Sequence[Query],
    every: bool,
    conditions: Sequence[Query],
    before: Mapping[str, str],
    after: Mapping[str, str],
) -> Asked:
    together = all if every else any

    def right(said: Mapping[str, str]) -> bool:
        return together(is_right(said[query.text], query) for query in queries)

    def old(said: Mapping[str, str]) -> bool | None:
        if not all(query.old for query in queries):
            return None
        return not right(said) and together(any(names_it(said[q.text], name) for name in q.old) for q in queries)

    return Asked(
        case=case,
        kind=kind,
        texts=tuple(query.text for query in queries),
        said_before=tuple(before[query.text] for query in queries),
        said=tuple(after[query.text] for query in queries),
        counts=all(is_right(before[query.text], query) for query in conditions),
        right_before=right(before),
        right=right(after),
        old_before=old(before),
        old=old(after),
    )


def is_right(said: str, query: Query) -> bool:
    """Whether all that a query asks for is named in what was said, each by one of its names, as words of their own.

    Example:
        >>> is_right(" in Bonn, of course", Query("It is", ["Bonn"])), is_right(" Bonnie", Query("It is", ["Bonn"]))
        (True, False)
    """
    return all(any(names_it(said, name) for name in names) for names in query.answers)


def _was_known(said: str, fact: Any) -> bool:
    new = names_it(said, str(fact.target_new).strip())
    return not new if fact.target_true is None else names_it(said, fact.target_true.strip())
