"""A fact: (subject, relation, object) as text. Nothing here knows a tokenizer or a model."""

from __future__ import annotations

import copy
import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

from tl_factedit.core.kinds import short
from tl_factedit.core.spacing import (
    Mending,
    all_spaced,
    ending,
    goes_on_inside,
    in_one_word,
    moved,
    starts_with_a_break,
    stripped,
    trimmed,
)
from tl_factedit.core.telling import tell


@dataclass(frozen=True)
class Fact:
    """One fact that a model may know, and what it is to be changed into.

    Targets are *continuations* of the prompt: after ``"{} is located in the city of"`` the target is ``" Paris"``, with
    its space. They are used letter for letter, but for white space that can't have been meant, by the rule that files
    are read by too: a space at the end of a prompt goes to the front of its targets, a doubled one goes, and so does
    white space around a subject, at the end of a target and inside Chinese or Japanese; one that is missing after "?"
    or ":" is put in, and so is that of a control or a neighbour's answer where the objects have one. Only what may be
    the rest of the prompt's last word is left. Accents of targets that stand apart from their letters are composed with
    them (NFC). A change of the text is said in a warning; the fact holds the text that is run.

    After a paraphrase, or a neighbour without an answer of its own, an object gets the space that belongs *there*:
    "Paris" behind an opening bracket, " 巴黎" behind an English text (`after`).

    Attributes:
        subject: The subject as it stands in the text, e.g. ``"The Eiffel Tower"``.
        prompt: A template that holds exactly one ``"{}"``, where the subject goes.
        target_true: The object the model is asked for before any edit (o_old). None where something new is injected and
            there is no old object; what needs one (a trace, an audit) says so.
        target_new: The object an edit is to write (o_new); editors need it, tracing does not.
        paraphrases: Other ways to ask for the same object: templates with one ``"{}"``, or whole texts that name the
            subject.
        neighbours: Whole prompts about *other* subjects, whose answers an edit must leave alone.
        neighbour_targets: The right answer of each neighbour; empty means `target_true` for all
            (as in CounterFact, whose neighbours share the object).
        controls: Other objects that the relation could have had: the null against which a score
            of `target_true` or `target_new` is read.
        relation: A name for the relation, e.g. ``"P276"`` or ``"located in"``.
        id: A name for the fact in tables.

    Raises:
        ValueError: The prompt has no ``"{}"`` or more than one; the subject, a target or another text is empty or isn't
            text (None, NaN, a number, a list …) or holds half a character: the message names the field.

    Warns:
        UserWarning: White space was mended, or a target goes on inside the last word of what it is asked after, or
            begins with a line break or a tab; a paraphrase doesn't name the subject, or a neighbour does.

    Example:
        >>> fact = fe.Fact("The Eiffel Tower", "{} is located in the city of", " Paris", " Rome")
        >>> fact.text
        'The Eiffel Tower is located in the city of'
    """

    subject: str
    prompt: str
    target_true: str | None
    target_new: str | None = None
    _: KW_ONLY
    paraphrases: Sequence[str] = ()
    neighbours: Sequence[str] = ()
    neighbour_targets: Sequence[str] = ()
    controls: Sequence[str] = ()
    relation: str | None = None
    id: str | int | None = None

    def __post_init__(self) -> None:
        """Check the text, mend its white space, and freeze the sequences."""
        for name in ("subject", "prompt", "target_true", "target_new", "relation"):
            check_text(getattr(self, name), name, optional=name in ("target_true", "target_new", "relation"))
        _one_slot(self.prompt, "prompt")
        if not stripped(self.subject):
            raise ValueError(f"subject is {self.subject!r}, needed some text: give the subject's name")
        for name in ("target_true", "target_new"):
            target = getattr(self, name)
            if target is not None and not stripped(target):
                raise ValueError(
                    f"{name} is {target!r}, needed some text: give the object as the continuation "
                    'of the prompt, such as " Paris"'
                )
        if self.target_true is None and self.target_new is None:
            raise ValueError("target_true and target_new are both None, needed one at least")
        for name in ("paraphrases", "neighbours", "neighbour_targets", "controls"):
            object.__setattr__(self, name, texts_of(getattr(self, name), name))
        for paraphrase in self.paraphrases:
            if paraphrase.count("{}") > 1:
                _one_slot(paraphrase, "paraphrase")
        for neighbour in self.neighbours:
            if "{}" in neighbour:
                raise ValueError(
                    f'neighbour {neighbour!r} holds "{{}}", needed a whole prompt: put another subject in its place'
                )
        if self.neighbour_targets and len(self.neighbour_targets) != len(self.neighbours):
            raise ValueError(
                f"{len(self.neighbour_targets)} neighbour_targets for {len(self.neighbours)} neighbours, "
                "needed one each (or none, when target_true answers all of them)"
            )
        object.__setattr__(self, "id", _name(self.id))
        _compose(self)
        _mend_spaces(self)
        _warn_of_glued_words(self)
        _warn_of_others(self)

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return self.fill(self.prompt)

    @property
    def group(self) -> str:
        """Which facts it can be compared with: those of its relation or, where none is named, of its prompt."""
        return self.prompt if self.relation is None else self.relation

    @property
    def old(self) -> str:
        """The old object, ``target_true``.

        Raises:
            ValueError: There is none.
        """
        return need_old_object([self], "this call")[0]

    def fill(self, template: str) -> str:
        """`template` with the subject in the place of ``"{}"``, or as it is if it has none."""
        return template.replace("{}", self.subject, 1)

    def after(self, text: str, target: str) -> str:
        """An object or a control as it continues another text than the prompt: with the gap that belongs there.

        Example:
            >>> fe.Fact("France", "The capital of {} is", " Paris").after("France's capital is called “", " Paris")
            'Paris'
        """
        return moved(target, self.text, text)

    def asked(self, template: str) -> Fact:
        """A copy that is asked by another template, its objects and controls as they stand there; no paraphrases."""
        text = self.fill(template)
        true, new = (None if each is None else self.after(text, each) for each in (self.target_true, self.target_new))
        controls = [self.after(text, each) for each in self.controls]
        return self.but(prompt=template, target_true=true, target_new=new, controls=controls, paraphrases=())

    def but(self, **changes: Any) -> Fact:
        """A copy with some fields changed, e.g. ``fact.but(target_new=" Rome")``."""
        return replace(self, **changes)

    def told_to_say(self, target_new: str) -> Fact:
        """A copy whose new object is what a model said, letter for letter: its white space is that of tokens."""
        told = copy.copy(self)
        object.__setattr__(told, "target_new", target_new)
        return told

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, by field; ``Fact(**fact.to_dict())`` is the fact again."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in held.items()}

    @property
    def name(self) -> str:
        """What tables call this fact: its id, or its subject."""
        return str(self.subject if self.id is None else self.id)


def check_text(value: Any, what: str, *, optional: bool = False) -> None:
    """Check that a field holds text, or None where that is allowed.

    Raises:
        ValueError: It holds something else, or text with half a character; the message names the field.
    """
    if isinstance(value, str):
        _check_encodable(value, what)
    if isinstance(value, str) or (optional and value is None):
        return
    given = f"{value!r}, a {type(value).__name__}" if value is not None else "None"
    raise ValueError(f"{what} is {given}: needed text{' or None' if optional else ''}")


def _check_encodable(text: str, what: str) -> None:
    halves = [char for char in text if "\ud800" <= char <= "\udfff"]
    if halves:
        raise ValueError(
            f"{what} is {short(text)}, with {halves[0]!r}: a lone surrogate, half of a character, which no tokenizer "
            "can spell: read the file as UTF-8, or leave it out"
        )


def texts_of(given: Any, what: str) -> tuple[str, ...]:
    """Several texts as a tuple.

    Raises:
        ValueError: They are no list, or one is empty or no text; the message names the field.
    """
    if isinstance(given, str):
        raise ValueError(f"{what} is the string {given!r}, needed a list of strings: write [{given!r}]")
    if not isinstance(given, Iterable) or isinstance(given, (bytes, Mapping, set, frozenset)):
        raise ValueError(f"{what} is {given!r}, a {type(given).__name__}: needed a list of strings, () for none")
    texts = tuple(given)
    for i, text in enumerate(texts):
        check_text(text, f"{what}[{i}]")
        if not stripped(text):
            raise ValueError(f"{what}[{i}] is {text!r}, needed some text: leave it out")
    return texts


def _name(given: Any) -> str | int | None:
    """A fact's id: text or a whole number (of numpy too)."""
    if given is None or isinstance(given, str):
        return given
    if not isinstance(given, bool) and hasattr(given, "__index__"):
        return operator.index(given)
    raise ValueError(f"id is {given!r}, a {type(given).__name__}: needed text, a whole number or None")


def _one_slot(template: str, what: str) -> None:
    slots = template.count("{}")
    if slots != 1:
        raise ValueError(
            f'{what} {template!r} holds {slots} "{{}}", needed exactly one: put "{{}}" where the subject goes'
        )


def composed(text: str) -> str:
    """A text with its accents in its letters (NFC), as models know them: "ã" is one character, and not "a" with "~"."""
    return unicodedata.normalize("NFC", text)


def _compose(fact: Fact) -> None:
    """Compose the objects' letters with their accents, and say so."""
    changed: list[tuple[str, str]] = []
    for name in ("target_true", "target_new", "controls", "neighbour_targets"):
        given = getattr(fact, name)
        now = given if given is None else composed(given) if isinstance(given, str) else tuple(map(composed, given))
        if now != given:
            changed.append((name, str(now)))
            object.__setattr__(fact, name, now)
    if changed:
        names = " and ".join(name for name, _ in changed)
        tell(
            f"{names} of fact {fact.name!r}, spelt with accents apart from their letters, became {changed[0][1]!r}: "
            "they are composed (NFC), as models know them",
            once="objects that are composed",
        )


def _mend_spaces(fact: Fact) -> None:
    """Mend the white space around what continues prompts (see `spacing`), and say where that changes what is run."""
    mending = Mending()
    objects = [target for target in (fact.target_true, fact.target_new) if target is not None]
    subject, (given, *paraphrases) = mending.subject(fact.subject, (fact.prompt, *fact.paraphrases))
    prompt = mending.prompt(given, [*objects, *fact.controls])
    text, was = (each.replace("{}", subject, 1) for each in (prompt, given))
    changes: dict[str, Any] = {"subject": subject, "prompt": prompt}
    for name in ("target_true", "target_new"):
        target = getattr(fact, name)
        changes[name] = None if target is None else mending.target(target, text, was)
    # What is asked after paraphrases, and after neighbours without answers of their own, are these objects (`after`).
    objects = [changes[name] for name in ("target_true", "target_new")]
    apart = all_spaced(objects)
    changes["controls"] = tuple(mending.target(target, text, was, spaced=apart) for target in fact.controls)
    spaced = any((target or "").startswith(" ") for target in objects)
    changes["paraphrases"] = tuple(mending.prompt(each, objects) if spaced else each for each in paraphrases)
    if fact.neighbour_targets:
        pairs = list(zip(fact.neighbours, fact.neighbour_targets, strict=True))
        changes["neighbours"] = tuple(mending.prompt(each, [target]) for each, target in pairs)
        changes["neighbour_targets"] = tuple(
            mending.target(target, trimmed(each), each, spaced=apart) for each, target in pairs
        )
    else:
        changes["neighbours"] = tuple(mending.prompt(each, objects) if spaced else each for each in fact.neighbours)
    for name, value in changes.items():
        object.__setattr__(fact, name, value)
    if mending.said:
        tell(f"white space of fact {fact.name!r} was mended: {'; '.join(mending.said)}")


def _warn_of_glued_words(fact: Fact) -> None:
    """Warn of ``"… city of" + "Paris"``, which the model would be asked as "ofParis", and of a line break before it."""
    objects = [target for target in (fact.target_true, fact.target_new) if target is not None]
    own = list(zip(fact.neighbours, fact.neighbour_targets, strict=True)) if fact.neighbour_targets else []
    answers = [*objects, *fact.controls, *fact.neighbour_targets]
    for target in objects:
        if goes_on_inside(fact.text, target):
            tell(glued("target", fact.text, target))
    others = [("control", fact.text, target) for target in fact.controls]
    others += [("neighbour target", text, target) for text, target in own]
    asked = [fact.fill(each) for each in fact.paraphrases] + ([] if own else list(fact.neighbours))
    others += [("target", text, fact.after(text, target)) for text in asked for target in objects]
    inside = [each for each in others if goes_on_inside(*each[1:])]
    if inside:
        more = f"; so do {len(inside) - 1} more" if inside[1:] else ""
        tell(glued(*inside[0]) + more)
    wide = [target for target in objects if fact.text.endswith("\t") and target.startswith(" ")]
    if wide:
        tell(
            f"target {wide[0]!r} begins with a space behind the tab that {ending(fact.text)!r} ends with: leave one of "
            "the two out",
        )
    broken = [target for target in answers if starts_with_a_break(target)]
    if broken:
        tell(
            f"target {broken[0]!r} begins with {broken[0][0]!r}, which is a token before the object's own, and what is "
            "read of first tokens is read of it: end the prompt with it instead",
        )


def _warn_of_others(fact: Fact) -> None:
    """Warn of a paraphrase that doesn't name the subject and has no place for it, and of a neighbour that names it."""
    name = _folded(fact.subject)
    others = [each for each in fact.paraphrases if "{}" not in each and name not in _folded(each)]
    if others:
        more = f" (and {len(others) - 1} more)" if others[1:] else ""
        tell(
            f"paraphrase {others[0]!r}{more} of fact {fact.name!r} doesn't name its subject {fact.subject!r}: make it "
            'a neighbour if it asks about another; if it is to ask about this one, put "{}" where the subject goes',
            once="paraphrases without their subject",
        )
    named = [each for each in fact.neighbours if _names(_folded(each), name)]
    if named:
        more = f" (and {len(named) - 1} more)" if named[1:] else ""
        tell(
            f"neighbour {named[0]!r}{more} of fact {fact.name!r} names its subject {fact.subject!r}: an edit may "
            "rightly change its answer; make it a paraphrase if it asks the same, or else leave it out",
            once="neighbours that name their fact's subject",
        )


def _names(text: str, name: str) -> bool:
    """Whether a text holds a name as words of its own: "Annapolis" doesn't name Ann."""
    ends = [(found.start(), found.end()) for found in re.finditer(re.escape(name), text)] if name else []
    return any(
        not (a and in_one_word(text[a - 1], text[a])) and not (b < len(text) and in_one_word(text[b - 1], text[b]))
        for a, b in ends
    )


def _folded(text: str) -> str:
    """A text as it is compared for names: case, kinds of white space, accents apart or not, and an article don't count.

    Example:
        >>> _folded("The  Eiffel Tower") in _folded("Where is Paris' EIFFEL tower?")
        True
    """
    return " ".join(composed(text).casefold().split()).removeprefix("the ")


def glued(what: str, text: str, target: str) -> str:
    """What to say of a target that goes on inside a text's last word."""
    return (
        f"{what} {target!r} goes on inside the last word of {ending(text)!r} ({text.split()[-1] + target!r}): begin "
        "it with a space if it is a new word"
    )


def as_facts(facts: Fact | Iterable[Fact], name: str = "facts") -> tuple[Fact, ...]:
    """Some facts, or a single one, as a tuple: the door through which every public call takes its facts.

    Args:
        facts: What is given.
        name: The argument's name, for the message.

    Raises:
        ValueError: Something else is given, or is among them.
    """
    if isinstance(facts, Fact):
        return (facts,)
    if isinstance(facts, (str, bytes, Mapping)) or not isinstance(facts, Iterable):
        raise ValueError(
            f"{name} is {short(facts)}, a {type(facts).__name__}: needed Facts, such as "
            'fe.Fact("The Eiffel Tower", "{} is located in the city of", " Paris", " Rome")'
        )
    given = tuple(facts)
    for i, fact in enumerate(given):
        if not isinstance(fact, Fact):
            raise ValueError(f"{name}[{i}] is {short(fact)}, a {type(fact).__name__}: needed a Fact")
    return given


def need_old_object(facts: Iterable[Fact], what: str) -> tuple[str, ...]:
    """The old object of each fact, ``target_true``.

    Args:
        facts: Some facts.
        what: What needs it, for the message, e.g. ``"an audit"``.

    Raises:
        ValueError: A fact has none.
    """
    found = []
    for fact in facts:
        if fact.target_true is None:
            raise ValueError(
                f"fact {fact.name!r} has no target_true, and {what} needs the old object: fact.but(target_true=...)"
            )
        found.append(fact.target_true)
    return tuple(found)


def check_distinct(facts: Sequence[Fact]) -> None:
    """Check that there are facts, each once: an interval over facts takes them for different ones.

    Facts are one if the same text is asked after the same objects, whatever their ids are and wherever a subject ends.

    Raises:
        ValueError: None is given, or one twice.
    """
    if not facts:
        raise ValueError("facts is empty, needed at least one")
    seen: dict[tuple[str, str | None, str | None], Fact] = {}
    for fact in facts:
        key = (fact.text, fact.target_true, fact.target_new)
        if key in seen:
            first = seen[key]
            also = "" if first.name == fact.name else f" (as {first.name!r})"
            raise ValueError(f"fact {fact.name!r} is given twice{also}, needed each once: it would count as two facts")
        seen[key] = fact
