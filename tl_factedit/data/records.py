"""Records that become facts: what every reader shares, so that each says what it mended and what is wrong by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from tl_factedit.core.facts import Fact, composed
from tl_factedit.core.spacing import Mending, continued, in_one_word, stripped, trimmed
from tl_factedit.core.telling import one_call, tell
from tl_factedit.data.files import read_json

Source: TypeAlias = str | Path | Sequence[Mapping[str, Any]]
"""A file of records, or the records."""

MOST_TOLD = 5


class Changes:
    """What was changed in the texts of a file, to be said once."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def trimmed(self, template: Any) -> Any:
        """A template without the spaces at its end; what isn't text is left to `Fact`, which refuses it."""
        if not isinstance(template, str) or trimmed(template) == template:
            return template
        self.counts["a space at the end of a prompt was left out"] += 1
        return trimmed(template)

    def each_trimmed(self, templates: Any) -> Any:
        """Several templates."""
        return [self.trimmed(each) for each in templates] if isinstance(templates, list) else templates

    def continued(self, text: str, target: str) -> str:
        """An object as the continuation of a prompt, with its accents in its letters."""
        if composed(target) != target:
            self.counts["an object's accents stood apart from its letters, and are composed (NFC) now"] += 1
            target = composed(target)
        found = continued(text, target)
        if found not in (target, " " + target):
            self.counts["white space around an object was left out"] += 1
        return found

    def unpadded(self, subject: Any, template: Any) -> tuple[Any, Any]:
        """A subject without white space around it, and its template; what isn't text is left to `Fact`."""
        if not isinstance(subject, str) or not isinstance(template, str) or not stripped(subject):
            return subject, template
        bare, (template,) = Mending().subject(subject, [template])
        if bare != subject:
            self.counts["white space around a subject was left out"] += 1
        return bare, template

    def say(self, source: str) -> None:
        """Warn of all changes."""
        if self.counts:
            said = "; ".join(f"{what} ({n} times)" for what, n in self.counts.items())
            tell(f"texts of {source} were changed: {said}")


Make: TypeAlias = Callable[[int, Mapping[str, Any], Changes], Fact]
"""Makes a fact of a record, given its place."""


def facts_of(source: Source, records: Sequence[Mapping[str, Any]], make: Make) -> list[Fact]:
    """A fact of each record.

    Raises:
        ValueError: Some make none; the message names them and says why.
    """
    facts, wrong = made_of(source, records, make)
    if wrong:
        raise ValueError(malformed(source, wrong, len(records)))
    return facts


def made_of(
    source: Source, records: Sequence[Mapping[str, Any]], make: Make
) -> tuple[list[Fact], list[tuple[int, str]]]:
    """The facts, and the places of the records that make none, each with what is wrong and the record's name."""
    facts, wrong, changes = list[Fact](), list[tuple[int, str]](), Changes()
    with one_call():  # of facts of one kind of trouble the first is told
        for i, record in enumerate(records):
            try:
                with naming(i, record):
                    facts.append(make(i, record, changes))
            except ValueError as error:
                wrong.append((i, str(error)))
    changes.say(name_of(source))
    return facts, wrong


def malformed(source: Source, wrong: Sequence[tuple[int, str]], count: int) -> str:
    """What is wrong with some records, in words."""
    if len(wrong) == 1:
        return wrong[0][1].replace(":", f" of {name_of(source)}:", 1)
    told = "; ".join(why for _, why in wrong[:MOST_TOLD])
    more = f"; and {len(wrong) - MOST_TOLD} more" if len(wrong) > MOST_TOLD else ""
    return f"{name_of(source)}: {len(wrong)} of {count} records make no fact: {told}{more}"


@contextmanager
def naming(i: int, record: Mapping[str, Any]) -> Iterator[None]:
    """What is wrong with a record is said with the name it has, or else its place."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        names = ("case_id", "known_id")
        which = next((record[name] for name in names if isinstance(record, Mapping) and name in record), i)
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"record {which}: {why}") from error


def records_of(source: Source, *fields: str) -> list[Mapping[str, Any]]:
    """The records of a file, or those that are given, all of which have some fields.

    Raises:
        ValueError: They are of another layout.
    """
    records: Any = read_json(source) if isinstance(source, (str, Path)) else source
    for field in fields:
        if not isinstance(records, (list, tuple)) or not all(isinstance(r, Mapping) and field in r for r in records):
            raise ValueError(f"{name_of(source)} holds no list of records with {field!r}: is it of another layout?")
    return list(records)


def name_of(source: Source) -> str:
    """What messages call it."""
    return str(source) if isinstance(source, (str, Path)) else "the records"


def text_of(record: Any, field: str) -> str:
    """A field that has to hold text."""
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"{field} is {value!r}, a {type(value).__name__}: needed text")
    return value


def check_some_text(value: Any, what: str) -> None:
    """Check that something is text, and not white space alone."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r}, a {type(value).__name__}: needed text")
    if not stripped(value):
        raise ValueError(f"{what} is {value!r}, needed some text")


def template_of(record: Mapping[str, Any], field: str, changes: Changes) -> tuple[str, str, str]:
    """The subject, the prompt with the last mention of it as the slot, and the text as it was given.

    A mention inside a longer word doesn't count ("Ann" in "Annapolis"), nor do braces that the prompt holds itself.
    """
    subject, text = changes.unpadded(text_of(record, "subject"), "{}")[0], text_of(record, field)
    if subject not in text:
        both = [composed(each) for each in (subject, text)]
        if both[0] in both[1] and stripped(both[0]):
            changes.counts["subject and prompt were spelt with other code points, and are composed (NFC) now"] += 1
            subject, text = both
    prompt = changes.trimmed(text)
    mentions = [found.span() for found in re.finditer(re.escape(subject), prompt)] if subject else []
    if not mentions:
        raise ValueError(f"subject {subject!r} isn't in its prompt {prompt!r}")
    whole = [(a, b) for a, b in mentions if not _inside_a_word(prompt, a, b)]
    if not whole:
        a, b = mentions[-1]
        word = [*re.findall(r"\w+$", prompt[:a])[-1:], subject, *re.findall(r"^\w+", prompt[b:])[:1]]
        raise ValueError(
            f"subject {subject!r} stands only inside the longer word {''.join(word)!r} of its prompt {prompt!r}"
        )
    a, b = whole[-1]
    return subject, prompt[:a] + "{}" + prompt[b:], text


def _inside_a_word(text: str, a: int, b: int) -> bool:
    left = a > 0 and in_one_word(text[a - 1], text[a])
    return left or (b < len(text) and in_one_word(text[b - 1], text[b]))
