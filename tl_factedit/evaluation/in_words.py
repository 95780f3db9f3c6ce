"""What a model says: greedy answers to what facts ask, in words, beside what teacher forcing makes of them.

A likelihood compares two objects. A model that is asked says something, and that may be neither. So each prompt,
paraphrase and neighbour is answered in words, and the wanted object looked for in the answer::

    autoregressive   the answer begins with the object (a chat answer: names it), nothing given away
    teacher-forced   the share of the object's tokens that come first, each after the right ones before it

Teacher forcing gives away the length and the beginning of what is asked for; the gap between the two is how much of a
score that is (Yang et al. 2025, arXiv:2502.11177).
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_factedit.backend.chat import chat_prompt
from tl_factedit.backend.halving import halving
from tl_factedit.backend.protocol import Model, device, told_where_it_is
from tl_factedit.backend.provenance import Provenance
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen, plain_torch
from tl_factedit.core import saved
from tl_factedit.core.estimate import Estimate, jointly, over_facts
from tl_factedit.core.facts import Fact, as_facts, check_distinct
from tl_factedit.core.kinds import as_whole, check_flags, check_one, short
from tl_factedit.core.spacing import continued, in_one_word
from tl_factedit.core.tokens import check_room, check_subject, continuation, encode, of_all
from tl_factedit.evaluation.teacher_forced import comes_first

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("prompt", "paraphrase", "neighbour")
HANGUL = re.compile("[\uac00-\ud7a3]")
MOST_ROWS = 64
"""So many answers are generated side by side."""


@dataclass(frozen=True)
class Answer:
    """What a model says to one prompt.

    Attributes:
        fact: The place of the fact it belongs to.
        kind: ``"prompt"``, ``"paraphrase"`` or ``"neighbour"``.
        asked: The prompt, without the chat's frame.
        said: What the model says, up to the end of the text or a line break.
        wanted: The object that should be said: the new one, or what answers a neighbour; without a new one, the old.
        begins: Whether what is said begins with it, or with another name of it.
        names: Whether it stands in what is said, as a word of its own.
        names_old: The same of the old object, where another is wanted; None otherwise.
        tokens_right: The share of the object's tokens that come first, teacher-forced.
    """

    fact: int
    kind: str
    asked: str
    said: str
    wanted: str
    begins: bool
    names: bool
    names_old: bool | None
    tokens_right: float


@dataclass(frozen=True, eq=False)
class Answers:
    """The result of `answers`.

    Attributes:
        facts: What was asked.
        each: The answers, fact by fact: the prompt's, the paraphrases', the neighbours'.
        chat: Whether they were asked as a chat.
        n_tokens: Most tokens of an answer.
        provenance: Model, weights as they were, BOS policy, versions.
        before: The answers to the same of another state of the model.
    """

    facts: tuple[Fact, ...]
    each: tuple[Answer, ...]
    chat: bool
    n_tokens: int
    provenance: Provenance
    before: Answers | None = None

    def __post_init__(self) -> None:
        """Check that answers are of the facts and of known kinds, and go with those before."""
        for i, answer in enumerate(self.each):
            if not 0 <= answer.fact < len(self.facts):
                raise ValueError(f"each[{i}].fact is {answer.fact}, needed one of {len(self.facts)} facts")
            if answer.kind not in KINDS:
                raise ValueError(f"each[{i}].kind is {answer.kind!r}, needed one of {KINDS}")
            if not 0 <= answer.tokens_right <= 1:
                raise ValueError(f"each[{i}].tokens_right is {answer.tokens_right}, needed a share from 0 to 1")
        then = self.before
        if then is not None and (
            [a.asked for a in then.each] != [a.asked for a in self.each] or then.chat != self.chat
        ):
            raise ValueError(
                "before holds answers to other prompts, needed those to the same facts, asked in the same way"
            )

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file, those `before` too.

        Raises:
            OSError: The file can't be written; what was there is as it was.

        Example:
            >>> fe.answers(model, facts).save("answers.safetensors")                       # doctest: +SKIP
            >>> fe.evaluation.Answers.load("answers.safetensors").table()                  # doctest: +SKIP
        """
        saved.save(self, path, "answers")

    @classmethod
    def load(cls, path: str | Path) -> Answers:
        """Read a file of `save`; no model is needed.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is cut short or changed, holds another kind of thing, or what it holds doesn't fit
                together; the message names it.
        """
        return saved.load(path, "answers", cls)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON: dataclasses as dicts."""
        return saved.as_plain(self, "answers")

    @property
    @plain_torch()
    def autoregressive(self) -> Estimate:
        """The share of facts whose prompt is answered with the wanted object; in a chat: in which it is named."""
        return self.share("prompt", self._said)

    @property
    @plain_torch()
    def teacher_forced(self) -> Estimate:
        """The share of the wanted object's tokens that come first after the prompt, each given the ones before."""
        return self.share("prompt", lambda answer: answer.tokens_right)

    @property
    @plain_torch()
    def gap(self) -> Estimate:
        """Teacher-forced minus autoregressive, the facts paired."""
        columns = [self._by_fact("prompt", of) for of in (lambda answer: answer.tokens_right, self._said)]
        return jointly(columns, lambda means: means[0] - means[1])

    @plain_torch()
    def share(self, kind: str, of: Callable[[Answer], float]) -> Estimate:
        """The mean of a number of each answer of a kind, over facts (of each the mean of its own).

        Args:
            kind: ``"prompt"``, ``"paraphrase"`` or ``"neighbour"``.
            of: Makes the number, such as ``lambda answer: answer.names_old``.

        Raises:
            ValueError: An unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, needed one of {KINDS}")
        if not callable(of):
            raise ValueError(f"of is {short(of)}, needed what makes a number of an answer: lambda answer: answer.names")
        return over_facts(self._by_fact(kind, of))

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row an answer; with `before`, what was said then beside it."""
        import pandas as pd

        rows = [
            {
                "fact": self.facts[answer.fact].name,
                "kind": answer.kind,
                "asked": answer.asked,
                **({} if self.before is None else {"said_before": self.before.each[i].said}),
                "said": answer.said,
                "wanted": answer.wanted,
                "begins": answer.begins,
                "names": answer.names,
                "names_old": answer.names_old,
                "tokens_right": answer.tokens_right,
            }
            for i, answer in enumerate(self.each)
        ]
        return pd.DataFrame(rows)

    def _said(self, answer: Answer) -> float:
        return float(answer.names if self.chat else answer.begins)

    def _by_fact(self, kind: str, of: Callable[[Answer], float]) -> list[float]:
        found = defaultdict[int, list[float]](list)
        for answer in self.each:
            if answer.kind == kind:
                found[answer.fact].append(float(of(answer)))
        return [sum(mine) / len(mine) if (mine := found[i]) else float("nan") for i in range(len(self.facts))]

    def __repr__(self) -> str:
        """The three numbers, and the first answers."""
        first = [answer for answer in self.each if answer.kind == "prompt"][:3]
        lines = [f"  {answer.asked!r} → {answer.said!r} (wanted {answer.wanted!r})" for answer in first]
        more = len(self.facts) - len(first)
        return "\n".join(
            [
                f"Answers: autoregressive {self.autoregressive:.2f}, teacher-forced {self.teacher_forced:.2f}, "
                f"gap {self.gap:.2f}{', as a chat' if self.chat else ''}",
                *lines,
                *([f"  … and {more} more (table())"] if more else []),
            ]
        )

    def _repr_html_(self) -> str:
        """The line, and the table."""
        import html

        line = html.escape(repr(self).split("\n", 1)[0])
        return f"<p>{line}</p>" + str(self.table().to_html(float_format="{:.2f}".format, index=False))


@plain_torch()
def answers(
    model: Model,
    facts: Fact | Sequence[Fact],
    *,
    n_tokens: int = 20,
    chat: bool = False,
    system: str | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    before: Answers | None = None,
    prepend_bos: bool | None = None,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Answers:
    """What a model says to facts' prompts, paraphrases and neighbours, by greedy decoding.

    Prompts of one length are answered together, with TransformerLens' own ``generate`` and its key-value cache.

    Args:
        model: Either class, edited or not.
        facts: One or several. Wanted is ``target_new`` or, without one, ``target_true``; of neighbours their
            ``neighbour_targets``, or ``target_true``.
        n_tokens: Most tokens of an answer (as many as the wanted object has, where it has more); it ends before, at the
            end of the text or a line break.
        chat: Whether each prompt is what a user says, in the tokenizer's chat template (`chat_prompt`).
        system: What the system says in the chat.
        aliases: Other names of an object, which count as it: ``{" New York": ["NYC"]}``.
        before: Answers to the same facts of another state of the model, to stand beside these.
        prepend_bos: Whether prompts begin with BOS; None for the model's default.
        batch_tokens: Most tokens in one forward pass.
        progress: Whether to show a bar on what takes longer than a second.

    Raises:
        ValueError: No facts, or one given twice; ``n_tokens`` below 1, or more than the model's context has room for;
            a chat without a template, or a system without a chat; aliases of what is no object of the facts;
            neighbours whose answer isn't known; `before` of other prompts, or with another BOS policy or ``n_tokens``.

    Example:
        >>> said = fe.answers(model, facts)                                  # doctest: +SKIP
        >>> with edit.applied(model):                                        # doctest: +SKIP
        ...     print(fe.answers(model, facts, before=said).table())
    """
    facts = as_facts(facts)
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    check_distinct(facts)
    as_whole(n_tokens, "n_tokens")
    check_flags(chat=chat, progress=progress)
    if before is not None:
        check_one(before, Answers, "before", "what fe.answers returned of another state of the model")
    if system is not None and not chat:
        raise ValueError("system is given, but chat=False: only a chat has what the system says")

    def framed(text: str) -> str:
        return chat_prompt(model, text, system=system) if chat else text

    asked = [(i, *each) for i, fact in enumerate(facts) for each in _asked(fact)]
    provenance = Provenance.of(model, prepend_bos, prompts=(framed(text) for _, _, text, _ in asked))
    if before is not None:
        if [answer.asked for answer in before.each] != [text for _, _, text, _ in asked] or before.chat != chat:
            raise ValueError(
                "before holds answers to other prompts, needed those to the same facts, asked in the same way"
            )
        for name, then, now in (
            ("prepend_bos", before.provenance.prepend_bos, provenance.prepend_bos),
            ("n_tokens", before.n_tokens, n_tokens),
        ):
            if then != now:
                raise ValueError(f"before was asked with {name}={then} and this with {now}, needed the same for both")
    requests = of_all(facts, lambda fact: _requests(model, fact, framed, provenance.prepend_bos, n_tokens))
    rows = [request for of_fact in requests for request in of_fact]
    names = _names(
        aliases or {}, {wanted.strip() for *_, wanted in asked} | {str(f.target_true).strip() for f in facts}
    )
    with frozen(model), torch.no_grad():
        runner = Runner(model)  # which refuses what can't be run here before anything is said
        most = [max(n_tokens, len(target)) for _, target in rows]
        objects = [wanted for *_, wanted in asked]
        said = say(model, [ids for ids, _ in rows], most, batch_tokens, wanted=objects, progress=progress)
        right = comes_first(runner, rows, batch_tokens)

    def stands(in_text: str, obj: str, test: Callable[[str, str], bool]) -> bool:
        return any(test(in_text, name) for name in (obj.strip(), *names.get(obj.strip(), ())))

    found = Answers(
        facts,
        tuple(
            Answer(
                fact=i,
                kind=kind,
                asked=text,
                said=answer,
                wanted=wanted,
                begins=stands(answer, wanted, begins_with),
                names=stands(answer, wanted, names_it),
                names_old=stands(answer, old, names_it)
                if (old := facts[i].target_true) not in (None, wanted)
                else None,
                tokens_right=float(tokens.float().mean()),
            )
            for (i, kind, text, wanted), answer, tokens in zip(asked, said, right, strict=True)
        ),
        chat,
        n_tokens,
        provenance,
    )
    if before is None:
        return found
    return replace(found, before=replace(before, before=None))


def _names(aliases: Mapping[str, Any], objects: set[str]) -> dict[str, list[str]]:
    """Other names by object, without white space around either."""
    if not isinstance(aliases, Mapping):
        raise ValueError(f"aliases is {short(aliases)}, needed other names by object: {{' New York': ['NYC']}}")
    found = dict[str, list[str]]()
    for name, others in aliases.items():
        if not isinstance(others, (list, tuple)) or not all(isinstance(each, str) and each.strip() for each in others):
            raise ValueError(f"the aliases of {name!r} are {others!r}, needed a list of other names")
        if name.strip() not in objects:
            raise ValueError(f"aliases names {name!r}, which is no object of these facts: see fact.target_new")
        found[name.strip()] = [other.strip() for other in others]
    return found


def begins_with(said: str, obj: str) -> bool:
    """Whether what is said begins with an object, as a word of its own, whatever its case.

    Example:
        >>> begins_with(" Rome, Italy", "rome"), begins_with("Romeo", "Rome")
        (True, False)
    """
    text = said.lstrip(" \n\t\"'“‘*")
    return bool(obj) and text.casefold().startswith(obj.casefold()) and _ends(text, len(obj))


def names_it(said: str, obj: str) -> bool:
    """Whether an object stands in what is said, as a word of its own, whatever its case."""
    found = re.finditer(re.escape(obj.casefold()), said.casefold()) if obj else ()
    return any(
        _ends(said.casefold(), each.end())
        and not (each.start() and in_one_word(said.casefold()[each.start() - 1], said.casefold()[each.start()]))
        for each in found
    )


def _ends(text: str, at: int) -> bool:
    """Whether a word ends at a place; in Korean, particles hang on to it ("파리입니다")."""
    return at >= len(text) or not in_one_word(text[at - 1], text[at]) or bool(HANGUL.match(text[at]))


def _asked(fact: Fact) -> list[tuple[str, str, str]]:
    """(kind, prompt, wanted object) of everything a fact is asked."""
    wanted = fact.old if fact.target_new is None else fact.target_new
    theirs = fact.neighbour_targets or [fact.after(text, fact.old) for text in fact.neighbours]
    return [
        ("prompt", fact.text, wanted),
        *(("paraphrase", text, fact.after(text, wanted)) for text in map(fact.fill, fact.paraphrases)),
        *(("neighbour", text, target) for text, target in zip(fact.neighbours, theirs, strict=True)),
    ]


def _requests(
    model: Model, fact: Fact, framed: Callable[[str], str], bos: bool, n_tokens: int
) -> list[tuple[Int[Tensor, "_"], Int[Tensor, "_"]]]:
    """Token ids of each prompt and of what is wanted after it."""
    check_subject(model.tokenizer, fact)
    found, room = [], getattr(model.cfg, "n_ctx", None)
    for _, text, target in _asked(fact):
        prompt = framed(text)
        ids = encode(model.tokenizer, prompt, prepend_bos=bos)[0]
        wanted = target if prompt == text else continued(prompt, target.strip())
        wanted_ids = continuation(model.tokenizer, prompt, wanted, prepend_bos=bos)
        check_room(ids, [wanted_ids], room, text)
        if room is not None and len(ids) + max(n_tokens, len(wanted_ids)) > room:
            raise ValueError(
                f"{text!r} has {len(ids)} tokens, which with an answer of {n_tokens} are more than the {room} that the "
                "model reads: take a smaller n_tokens"
            )
        found.append((ids, wanted_ids))
    return found


def say(
    model: Model,
    prompts: Sequence[Int[Tensor, "_"]],
    most: Sequence[int],
    batch_tokens: int,
    *,
    wanted: Sequence[str] | None = None,
    progress: bool,
) -> list[str]:
    """The greedy answer to each prompt; those of one length together, so that nothing has to be padded.

    Args:
        model: Either class; call inside `frozen` and ``torch.no_grad``.
        prompts: Token ids.
        most: Most tokens of each answer.
        batch_tokens: Most tokens in one forward pass.
        wanted: What should be said: a line break that it holds doesn't end the answer.
        progress: Whether to show a bar.
    """
    by_length = defaultdict[int, list[int]](list)
    for i, ids in enumerate(prompts):
        by_length[len(ids)].append(i)
    groups = [
        mine[at : at + step]
        for length, mine in sorted(by_length.items())
        for step in [max(1, min(MOST_ROWS, batch_tokens // (length + max(most[i] for i in mine))))]
        for at in range(0, len(mine), step)
    ]
    said = [""] * len(prompts)

    def tokens_of(group: list[int]) -> int:
        return len(group) * (len(prompts[group[0]]) + max(most[i] for i in group))

    with (
        told_where_it_is(model),
        warnings.catch_warnings(),
        tqdm(total=len(prompts), desc="answers", delay=1, disable=not progress, leave=False) as bar,
    ):
        warnings.simplefilter("ignore", FutureWarning)  # what TransformerLens' generate asks of transformers
        for attempt in halving(groups, tokens_of, "tokens in one pass", "a smaller batch_tokens"):
            with attempt as group:
                tokens = torch.stack([prompts[i] for i in group]).to(device(model))
                told: Any = model.generate(
                    tokens,
                    max_new_tokens=max(most[i] for i in group),
                    stop_at_eos=False,  # one row's end mustn't depend on the others'
                    do_sample=False,
                    prepend_bos=False,
                    return_type="tokens",
                    verbose=False,
                )
                for i, ids in zip(group, told[:, tokens.shape[1] :].tolist(), strict=True):
                    wants = "" if wanted is None else wanted[i].strip()
                    said[i] = up_to_the_end(model.tokenizer, ids[: most[i]], wants)
                bar.update(len(group))
    return said


def up_to_the_end(tokenizer: Any, ids: list[int], wanted: str) -> str:
    """An answer's text, up to the token that ends it, or to the first line break that the wanted object hasn't got."""
    end = getattr(tokenizer, "eos_token_id", None)
    text = str(tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True))
    begun = len(text) - len(text.lstrip())
    stop = text.find("\n", begun + (len(wanted) if "\n" in wanted else 0))
    return text if stop < 0 else text[:stop]
