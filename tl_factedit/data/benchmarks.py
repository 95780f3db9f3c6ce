"""Readers of published fact sets."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tl_factedit.core.facts import Fact
from tl_factedit.core.spacing import Mending, continued, in_one_word, stripped, trimmed
from tl_factedit.core.telling import tell


def counterfact(path: str | Path) -> list[Fact]:
    """CounterFact (Meng et al. 2022), the full layout with ``requested_rewrite``.

    Control objects of a fact are the other objects that the file has for its relation.

    Raises:
        ValueError: The file has another layout, or a record lacks something: it is named.
    """
    records = _records(path, "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")
    objects: dict[str, dict[str, None]] = {}

    def targets(record: Mapping[str, Any], changes: Changes) -> tuple[str, str]:
        rewrite = record["requested_rewrite"]
        if not isinstance(rewrite, dict):
            raise ValueError(
                f"requested_rewrite is a {type(rewrite).__name__}, needed one rewrite: is it of another layout "
                "(MQuAKE)?"
            )
        text = _text(rewrite, "prompt").replace("{}", _text(rewrite, "subject"))
        return (
            changes.continued(text, _text(rewrite["target_true"], "str")),
            changes.continued(text, _text(rewrite["target_new"], "str")),
        )

    def fact(_: int, record: Mapping[str, Any], changes: Changes) -> Fact:
        rewrite, (true, new) = record["requested_rewrite"], targets(record, changes)
        subject, prompt = changes.unpadded(rewrite["subject"], changes.trimmed(rewrite["prompt"]))
        return Fact(
            subject,
            prompt,
            true,
            new,
            paraphrases=changes.each_trimmed(record["paraphrase_prompts"] or ()),
            neighbours=changes.each_trimmed(record["neighborhood_prompts"] or ()),
            controls=[o for o in objects[rewrite["relation_id"]] if o not in (true, new)],
            relation=rewrite["relation_id"],
            id=record.get("case_id"),
        )

    for i, record in enumerate(records):
        with _naming(path, i, record):
            for each in targets(record, Changes()):  # said as the facts are made
                objects.setdefault(record["requested_rewrite"]["relation_id"], {})[each] = None
    return _facts(path, records, fact)


def counterfact_brief(path: str | Path) -> list[Fact]:
    """CounterFact in EasyEdit's layout: one paraphrase and one neighbour a fact."""

    def fact(_: int, record: Mapping[str, Any], changes: Changes) -> Fact:
        subject, prompt, text = _template(record, "prompt", changes)
        locality = _text(record, "locality_prompt")
        return Fact(
            subject,
            prompt,
            changes.continued(text, _text(record, "ground_truth")),
            changes.continued(text, _text(record, "target_new")),
            paraphrases=[changes.trimmed(_text(record, "rephrase_prompt"))],
            neighbours=[changes.trimmed(locality)],
            neighbour_targets=[changes.continued(locality, _text(record, "locality_ground_truth"))],
            id=record.get("case_id"),
        )

    fields = ("rephrase_prompt", "prompt", "ground_truth", "target_new", "locality_prompt", "locality_ground_truth")
    return _facts(path, _records(path, *fields), fact)


def known_facts(path: str | Path) -> list[Fact]:
    """ROME's "knowns": facts that GPT-2 XL was found to know, without new objects."""

    def fact(_: int, record: Mapping[str, Any], changes: Changes) -> Fact:
        subject, prompt, text = _template(record, "prompt", changes)
        return Fact(
            subject,
            prompt,
            changes.continued(text, _text(record, "attribute")),
            relation=record.get("relation_id"),
            id=record.get("known_id"),
        )

    return _facts(path, _records(path, "attribute", "prompt"), fact)


def zsre(path: str | Path, *, written: Literal["alt", "answer"] = "alt") -> list[Fact]:
    """ZsRE in MEND's layout: questions, with one unrelated question as neighbour.

    The question is the prompt and the answer follows it after a space.

    Args:
        path: The file.
        written: Which object an edit is to write. ``"alt"``, as Mitchell et al. edit: ``target_true`` is the first of
            the ``answers``, ``target_new`` is ``alt``, and records whose ``alt`` is empty have none. ``"answer"``, as
            Meng et al. do: ``target_new`` is the first answer, which the model doesn't know yet, and there is no
            ``target_true``.

    Raises:
        ValueError: The file isn't of this layout, or a record of it makes no fact; the message names both.
    """
    if written not in ("alt", "answer"):
        raise ValueError(f"written is {written!r}, needed 'alt' or 'answer'")

    def fact(i: int, record: Mapping[str, Any], changes: Changes) -> Fact:
        answers = record["answers"]
        if not isinstance(answers, list):
            raise ValueError(f"answers is {answers!r}, a {type(answers).__name__}: needed a list of texts")
        if not answers:
            raise ValueError("answers is empty, needed one at least")
        _check_some_text(answers[0], "answers[0]")
        subject, prompt, text = _template(record, "src", changes)
        alt = "" if record["alt"] is None else _text(record, "alt")
        old, new = (None, answers[0]) if written == "answer" else (answers[0], alt)
        for field in ("loc", "loc_ans"):
            _check_some_text(record[field], field)
        neighbour = record["loc"] + "?"
        return Fact(
            subject,
            prompt,
            None if old is None else changes.continued(text, old),
            changes.continued(text, new) if stripped(new) else None,
            paraphrases=[changes.trimmed(_text(record, "rephrase"))],
            neighbours=[neighbour],
            neighbour_targets=[changes.continued(neighbour, record["loc_ans"])],
            id=i,
        )

    return _facts(path, _records(path, "loc_ans", "src", "rephrase", "answers", "alt", "loc"), fact)


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
        """An object as the continuation of a prompt."""
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

    def say(self, path: str | Path) -> None:
        """Warn of all changes."""
        if self.counts:
            said = "; ".join(f"{what} ({n} times)" for what, n in self.counts.items())
            tell(f"texts of {path} were changed: {said}")


def _facts(
    path: str | Path, records: Sequence[Mapping[str, Any]], make: Callable[[int, Mapping[str, Any], Changes], Fact]
) -> list[Fact]:
    facts, changes = [], Changes()
    for i, record in enumerate(records):
        with _naming(path, i, record):
            facts.append(make(i, record, changes))
    changes.say(path)
    return facts


@contextmanager
def _naming(path: str | Path, i: int, record: Mapping[str, Any]) -> Iterator[None]:
    """What is wrong with a record is said with the name it has, or else its place."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        which = next((record[name] for name in ("case_id", "known_id") if name in record), i)
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"record {which} of {path}: {why}") from error


def _records(path: str | Path, *fields: str) -> list[Mapping[str, Any]]:
    records = read_json(path)
    for field in fields:
        if not isinstance(records, list) or not all(isinstance(record, dict) and field in record for record in records):
            raise ValueError(f"{path} holds no list of records with {field!r}: is it of another layout?")
    return records


def read_json(path: str | Path) -> Any:
    """What a file of JSON holds; of JSONL (one record a line), the list of its records.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is a folder, the pointer that git-lfs leaves, or isn't JSON.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"{path} is a folder, needed a file of JSON")
    raw = file.read_bytes()
    if raw.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is the pointer that git-lfs leaves for a file, needed the file: run git lfs pull")
    try:
        text = raw.decode("utf-8-sig")  # Windows puts a byte-order mark in front
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            lines = [line for line in text.split("\n") if line.strip()]
            if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
                raise
            return _lines(text)
    except RecursionError as error:
        raise ValueError(f"{path} isn't JSON of records: it is nested too deep") from error
    except ValueError as error:
        raise ValueError(f"{path} isn't JSON: {error}") from error


def _lines(text: str) -> list[Any]:
    """The records of JSONL.

    Raises:
        ValueError: A line isn't JSON; the message gives its number.
    """
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                why = f"line {number}, column {error.colno}: {error.msg}, so that it may be cut short"
                raise ValueError(why) from error
    return found


def _text(record: Any, field: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise ValueError(f"{field} is {value!r}, a {type(value).__name__}: needed text")
    return value


def _check_some_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r}, a {type(value).__name__}: needed text")
    if not stripped(value):
        raise ValueError(f"{what} is {value!r}, needed some text")


def _template(record: Mapping[str, Any], field: str, changes: Changes) -> tuple[str, str, str]:
    """The subject, the prompt with the last mention of it as the slot, and the text as it was given.

    A mention inside a longer word doesn't count ("Ann" in "Annapolis"), nor do braces that the prompt holds itself.
    """
    subject, text = changes.unpadded(_text(record, "subject"), "{}")[0], _text(record, field)
    if subject not in text:
        composed = [unicodedata.normalize("NFC", each) for each in (subject, text)]
        if composed[0] in composed[1] and stripped(composed[0]):
            changes.counts["subject and prompt were spelt with other code points, and are composed (NFC) now"] += 1
            subject, text = composed
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
