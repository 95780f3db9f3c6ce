"""Readers of published fact sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl_factedit.core.facts import Fact


def counterfact(path: str | Path) -> list[Fact]:
    """CounterFact (Meng et al. 2022), the full layout with ``requested_rewrite``.

    Control objects of a fact are the other objects that the file has for its relation.

    Raises:
        ValueError: The file has another layout, or a record lacks something: it is named.
    """
    records = _records(path, "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")
    objects: dict[str, dict[str, None]] = {}

    def targets(record: Mapping[str, Any]) -> tuple[str, str]:
        rewrite = record["requested_rewrite"]
        if not isinstance(rewrite, dict):
            raise ValueError(
                f"requested_rewrite is a {type(rewrite).__name__}, needed one rewrite: is it of another layout "
                "(MQuAKE)?"
            )
        return _continue(rewrite["target_true"]["str"]), _continue(rewrite["target_new"]["str"])

    def fact(_: int, record: Mapping[str, Any]) -> Fact:
        rewrite, (true, new) = record["requested_rewrite"], targets(record)
        return Fact(
            rewrite["subject"],
            rewrite["prompt"],
            true,
            new,
            paraphrases=record["paraphrase_prompts"] or (),
            neighbours=record["neighborhood_prompts"] or (),
            controls=[o for o in objects[rewrite["relation_id"]] if o not in (true, new)],
            relation=rewrite["relation_id"],
            id=record.get("case_id"),
        )

    for i, record in enumerate(records):
        with _naming(path, i, record):
            for each in targets(record):
                objects.setdefault(record["requested_rewrite"]["relation_id"], {})[each] = None
    return _facts(path, records, fact)


def counterfact_brief(path: str | Path) -> list[Fact]:
    """CounterFact in EasyEdit's layout: one paraphrase and one neighbour a fact."""

    def fact(_: int, record: Mapping[str, Any]) -> Fact:
        return Fact(
            record["subject"],
            _template(record["prompt"], record["subject"]),
            _continue(record["ground_truth"]),
            _continue(record["target_new"]),
            paraphrases=[record["rephrase_prompt"]],
            neighbours=[record["locality_prompt"]],
            neighbour_targets=[_continue(record["locality_ground_truth"])],
            id=record.get("case_id"),
        )

    fields = ("rephrase_prompt", "prompt", "ground_truth", "target_new", "locality_prompt", "locality_ground_truth")
    return _facts(path, _records(path, *fields), fact)


def known_facts(path: str | Path) -> list[Fact]:
    """ROME's "knowns": facts that GPT-2 XL was found to know, without new objects."""

    def fact(_: int, record: Mapping[str, Any]) -> Fact:
        return Fact(
            record["subject"],
            _template(record["prompt"], record["subject"]),
            _continue(record["attribute"]),
            relation=record.get("relation_id"),
            id=record.get("known_id"),
        )

    return _facts(path, _records(path, "attribute", "prompt"), fact)


def zsre(path: str | Path) -> list[Fact]:
    """ZsRE in MEND's layout: questions, with one unrelated question as neighbour.

    The question is the prompt and the answer follows it after a space. Records whose ``alt`` is
    empty have no ``target_new``.
    """

    def fact(i: int, record: Mapping[str, Any]) -> Fact:
        if not record["answers"]:
            raise ValueError("answers is empty, needed one at least")
        return Fact(
            record["subject"],
            _template(record["src"], record["subject"]),
            _continue(record["answers"][0]),
            _continue(record["alt"]) if (record["alt"] or "").strip() else None,
            paraphrases=[record["rephrase"]],
            neighbours=[record["loc"] + "?"],
            neighbour_targets=[_continue(record["loc_ans"])],
            id=i,
        )

    return _facts(path, _records(path, "loc_ans", "src", "rephrase", "answers", "alt", "loc"), fact)


def _facts(
    path: str | Path, records: Sequence[Mapping[str, Any]], make: Callable[[int, Mapping[str, Any]], Fact]
) -> list[Fact]:
    facts = []
    for i, record in enumerate(records):
        with _naming(path, i, record):
            facts.append(make(i, record))
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
    try:
        records = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    for field in fields:
        if not isinstance(records, list) or not all(isinstance(record, dict) and field in record for record in records):
            raise ValueError(f"{path} holds no list of records with {field!r}: is it of another layout?")
    return records


def _continue(target: str) -> str:
    return target if target.startswith(" ") else f" {target}"


def _template(prompt: str, subject: str) -> str:
    """The prompt with its last mention of the subject as the slot; braces it holds itself don't count."""
    place = prompt.rfind(subject)
    if place < 0:
        raise ValueError(f"subject {subject!r} isn't in its prompt {prompt!r}")
    return prompt[:place] + "{}" + prompt[place + len(subject) :]
