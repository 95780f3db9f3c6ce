"""Readers of published fact sets."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from tl_factedit.core.facts import Fact
from tl_factedit.core.spacing import stripped
from tl_factedit.data.records import (
    Changes,
    Source,
    check_some_text,
    facts_of,
    naming,
    records_of,
    template_of,
    text_of,
)


def counterfact(path: Source) -> list[Fact]:
    """CounterFact (Meng et al. 2022), the full layout with ``requested_rewrite``.

    Control objects of a fact are the other objects that the file has for its relation.

    Raises:
        ValueError: The file has another layout, or a record lacks something: it is named.
    """
    records = records_of(path, "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")
    objects: dict[str, dict[str, None]] = {}

    def targets(record: Mapping[str, Any], changes: Changes) -> tuple[str, str]:
        rewrite = record["requested_rewrite"]
        if not isinstance(rewrite, dict):
            raise ValueError(
                f"requested_rewrite is a {type(rewrite).__name__}, needed one rewrite: read MQuAKE by fe.data.mquake"
            )
        text = text_of(rewrite, "prompt").replace("{}", text_of(rewrite, "subject"))
        return (
            changes.continued(text, text_of(rewrite["target_true"], "str")),
            changes.continued(text, text_of(rewrite["target_new"], "str")),
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
        with suppress(ValueError), naming(i, record):  # said as the facts are made, and so are changes
            for each in targets(record, Changes()):
                objects.setdefault(record["requested_rewrite"]["relation_id"], {})[each] = None
    return facts_of(path, records, fact)


def counterfact_brief(path: Source) -> list[Fact]:
    """CounterFact in EasyEdit's layout: one paraphrase and one neighbour a fact."""

    def fact(_: int, record: Mapping[str, Any], changes: Changes) -> Fact:
        subject, prompt, text = template_of(record, "prompt", changes)
        locality = text_of(record, "locality_prompt")
        return Fact(
            subject,
            prompt,
            changes.continued(text, text_of(record, "ground_truth")),
            changes.continued(text, text_of(record, "target_new")),
            paraphrases=[changes.trimmed(text_of(record, "rephrase_prompt"))],
            neighbours=[changes.trimmed(locality)],
            neighbour_targets=[changes.continued(locality, text_of(record, "locality_ground_truth"))],
            id=record.get("case_id"),
        )

    fields = ("rephrase_prompt", "prompt", "ground_truth", "target_new", "locality_prompt", "locality_ground_truth")
    return facts_of(path, records_of(path, *fields), fact)


def known_facts(path: Source) -> list[Fact]:
    """ROME's "knowns": facts that GPT-2 XL was found to know, without new objects."""

    def fact(_: int, record: Mapping[str, Any], changes: Changes) -> Fact:
        subject, prompt, text = template_of(record, "prompt", changes)
        return Fact(
            subject,
            prompt,
            changes.continued(text, text_of(record, "attribute")),
            relation=record.get("relation_id"),
            id=record.get("known_id"),
        )

    return facts_of(path, records_of(path, "attribute", "prompt"), fact)


def zsre(path: Source, *, written: Literal["alt", "answer"] = "alt") -> list[Fact]:
    """ZsRE in MEND's layout: questions, with one unrelated question as neighbour.

    The question is the prompt and the answer follows it after a space.

    Args:
        path: The file, or its records.
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
        check_some_text(answers[0], "answers[0]")
        subject, prompt, text = template_of(record, "src", changes)
        alt = "" if record["alt"] is None else text_of(record, "alt")
        old, new = (None, answers[0]) if written == "answer" else (answers[0], alt)
        for field in ("loc", "loc_ans"):
            check_some_text(record[field], field)
        neighbour = record["loc"] + "?"
        return Fact(
            subject,
            prompt,
            None if old is None else changes.continued(text, old),
            changes.continued(text, new) if stripped(new) else None,
            paraphrases=[changes.trimmed(text_of(record, "rephrase"))],
            neighbours=[neighbour],
            neighbour_targets=[changes.continued(neighbour, record["loc_ans"])],
            id=i,
        )

    return facts_of(path, records_of(path, "loc_ans", "src", "rephrase", "answers", "alt", "loc"), fact)
