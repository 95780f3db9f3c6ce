"""Fact sets in their published layouts, as lists of `Fact`. The only parser of files.

Objects get the space in front that makes them continuations. A record whose subject can't be
found in its own prompt is an error that names it, never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tl_factedit.facts import Fact
from tl_factedit.world import world

__all__ = ["counterfact", "counterfact_brief", "known_facts", "python_manual", "world", "zsre"]


def counterfact(path: str | Path) -> list[Fact]:
    """CounterFact (Meng et al. 2022), the full layout with ``requested_rewrite``.

    Control objects of a fact are the other objects that the file has for its relation.
    """
    records = _records(path, "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts")
    objects: dict[str, dict[str, None]] = {}
    for record in records:
        rewrite = record["requested_rewrite"]
        if not isinstance(rewrite, dict):
            raise ValueError(
                f"record {record.get('case_id')} of {path}: requested_rewrite is a {type(rewrite).__name__}, "
                "needed one rewrite: is it of another layout (MQuAKE)?"
            )
        for target in ("target_true", "target_new"):
            objects.setdefault(rewrite["relation_id"], {})[_continue(rewrite[target]["str"])] = None
    facts = []
    for record in records:
        rewrite = record["requested_rewrite"]
        true, new = (_continue(rewrite[target]["str"]) for target in ("target_true", "target_new"))
        facts.append(
            Fact(
                rewrite["subject"],
                rewrite["prompt"],
                true,
                new,
                paraphrases=record["paraphrase_prompts"],
                neighbours=record["neighborhood_prompts"],
                controls=[o for o in objects[rewrite["relation_id"]] if o not in (true, new)],
                relation=rewrite["relation_id"],
                id=record["case_id"],
            )
        )
    return facts


def counterfact_brief(path: str | Path) -> list[Fact]:
    """CounterFact in EasyEdit's layout: one paraphrase and one neighbour a fact."""
    return [
        Fact(
            record["subject"],
            _template(record["prompt"], record["subject"], path, record.get("case_id")),
            _continue(record["ground_truth"]),
            _continue(record["target_new"]),
            paraphrases=[record["rephrase_prompt"]],
            neighbours=[record["locality_prompt"]],
            neighbour_targets=[_continue(record["locality_ground_truth"])],
            id=record.get("case_id"),
        )
        for record in _records(
            path, "rephrase_prompt", "prompt", "ground_truth", "target_new", "locality_prompt", "locality_ground_truth"
        )
    ]


def known_facts(path: str | Path) -> list[Fact]:
    """ROME's "knowns": facts that GPT-2 XL was found to know, without new objects."""
    return [
        Fact(
            record["subject"],
            _template(record["prompt"], record["subject"], path, record.get("known_id")),
            _continue(record["attribute"]),
            relation=record.get("relation_id"),
            id=record.get("known_id"),
        )
        for record in _records(path, "attribute", "prompt")
    ]


def zsre(path: str | Path) -> list[Fact]:
    """ZsRE in MEND's layout: questions, with one unrelated question as neighbour.

    The question is the prompt and the answer follows it after a space. Records whose ``alt`` is
    empty have no ``target_new``.
    """
    facts = []
    records = _records(path, "loc_ans", "src", "rephrase", "answers", "alt", "loc")
    for i, record in enumerate(records):
        facts.append(
            Fact(
                record["subject"],
                _template(record["src"], record["subject"], path, i),
                _continue(record["answers"][0]),
                _continue(record["alt"]) if record["alt"].strip() else None,
                paraphrases=[record["rephrase"]],
                neighbours=[record["loc"] + "?"],
                neighbour_targets=[_continue(record["loc_ans"])],
                id=i,
            )
        )
    return facts


def python_manual() -> list[str]:
    """English prose that every Python has: the topics of its own manual, some 100,000 tokens.

    Texts for `key_stats` where nothing can be downloaded. Their domain is narrow: for results that
    are to be published, give texts of the kind the model was trained on.
    """
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _records(path: str | Path, *fields: str) -> list[Mapping[str, Any]]:
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    for field in fields:
        if not isinstance(records, list) or not all(isinstance(record, dict) and field in record for record in records):
            raise ValueError(f"{path} holds no list of records with {field!r}: is it of another layout?")
    return records


def _continue(target: str) -> str:
    return target if target.startswith(" ") else f" {target}"


def _template(prompt: str, subject: str, path: str | Path, record: Any) -> str:
    """The prompt with its last mention of the subject as the slot; braces it holds itself don't count."""
    place = prompt.rfind(subject)
    if place < 0:
        raise ValueError(f"record {record} of {path}: subject {subject!r} isn't in its prompt {prompt!r}")
    return prompt[:place] + "{}" + prompt[place + len(subject) :]
