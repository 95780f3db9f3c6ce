"""Readers of benchmarks whose edits come with what follows from them: MQuAKE, RippleEdits, KnowEdit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tl_factedit.core.facts import Fact
from tl_factedit.core.telling import tell
from tl_factedit.core.words import counted
from tl_factedit.data.records import (
    Changes,
    Source,
    malformed,
    name_of,
    naming,
    records_of,
    template_of,
    text_of,
)
from tl_factedit.evaluation.cases import EditCase, Query, Question

CRITERIA: Mapping[str, str] = {
    "Logical_Generalization": "logical generalization",
    "Compositionality_I": "compositionality I",
    "Compositionality_II": "compositionality II",
    "Subject_Aliasing": "subject aliasing",
    "Forgetfulness": "preservation",
    "Relation_Specificity": "relation specificity",
    "Relation_Specifity": "relation specificity",  # as the published description spells it
}
"""The six criteria of RippleEdits, as they are named in files and here."""


def mquake(path: Source) -> list[EditCase]:
    """MQuAKE (Zhong et al. 2023): CF, CF-3k, T, Remastered, hard splits; each record a case of one edit or several.

    The kinds are ``"edit-wise"`` (each edit's own prompt, one question an edit), ``"instance-wise"`` (all single hops
    of the changed chain) and ``"multi-hop"`` (right if one of its wordings is), which counts where the unedited model
    knows all single hops of the chain as it was. Queries carry the old answers, too.

    Raises:
        ValueError: The file has another layout, or a record lacks something: it is named.

    Warns:
        UserWarning: Records edit one thing in different ways, so that they can't all be edited together.
    """
    records = records_of(path, "requested_rewrite", "questions", "new_answer")
    cases = _cases(path, records, _of_mquake)
    wanted: dict[tuple[str, str], set[str]] = {}
    for case in cases:
        for fact in case.facts:
            wanted.setdefault((fact.subject, fact.prompt), set()).add(str(fact.target_new))
    if several := [key for key, new in wanted.items() if len(new) > 1]:
        subject, prompt = several[0]
        tell(
            f"the records of {name_of(path)} edit {counted(len(several), 'prompt')} in different ways, such as "
            f"{prompt.replace('{}', subject)!r}: edit their cases apart, not together"
        )
    return cases


def ripple_edits(path: Source, subjects: Mapping[str, str] | None = None) -> list[EditCase]:
    """RippleEdits (Cohen et al. 2023): popular, random or recent, each record a case of one edit.

    The kinds are the six criteria (`CRITERIA`). A question counts where the unedited model answers all of its
    conditions, and is right if one of its queries is, or all, as the record says. Files give subjects by their number
    in Wikidata alone; the name is what the edit has in common with the other prompts about the same number.

    Args:
        path: The file, or its records.
        subjects: Names by number, such as ``{"Q38111": "Leonardo DiCaprio"}``, where a record doesn't tell.

    Raises:
        ValueError: The file has another layout, or a record lacks something: it is named.
    """

    def make(i: int, record: Mapping[str, Any], changes: Changes) -> EditCase:
        return _of_ripple_edits(i, record, changes, subjects or {})

    return _cases(path, records_of(path, "edit"), make)


def knowedit(path: Source) -> list[EditCase]:
    """KnowEdit (Zhang et al. 2024) and what else EasyEdit reads: subject, prompt, target_new, portability, locality.

    The kinds are those of the record, in lower case: ``"reasoning"``, ``"logical generalization"``,
    ``"subject aliasing"``, ``"relation specificity"``, ``"forgetfulness"``. Questions of locality count where the
    unedited model answers them.

    Raises:
        ValueError: The file has another layout, or a record lacks something: it is named.
    """
    return _cases(path, records_of(path, "subject", "prompt", "target_new"), _of_knowedit)


def _cases(path: Source, records: Sequence[Mapping[str, Any]], make: Any) -> list[EditCase]:
    cases, wrong, changes = list[EditCase](), list[tuple[int, str]](), Changes()
    for i, record in enumerate(records):
        try:
            with naming(i, record):
                cases.append(make(i, record, changes))
        except ValueError as error:
            wrong.append((i, str(error)))
    changes.say(name_of(path))
    if wrong:
        raise ValueError(malformed(path, wrong, len(records)))
    return cases


# ------------------------------------------------------------------------------------ MQuAKE


def _of_mquake(i: int, record: Mapping[str, Any], changes: Changes) -> EditCase:
    rewrites = record["requested_rewrite"]
    if not isinstance(rewrites, (list, tuple)) or not rewrites:
        raise ValueError(f"requested_rewrite is a {type(rewrites).__name__}, needed a list of rewrites")
    facts = [_rewrite(rewrite, changes) for rewrite in rewrites]
    old = _names(record, "answer")
    hops = [_hop(hop) for hop in record.get("single_hops") or ()]
    new_hops = [_hop(hop) for hop in record.get("new_single_hops") or ()]
    edits = [Question("edit-wise", [Query(fact.text, [str(fact.target_new)], old=_old(fact))]) for fact in facts]
    instance = [Question("instance-wise", new_hops, every=True)] if new_hops else []
    asked = [Query(text, _names(record, "new_answer"), old=old) for text in record["questions"]]
    return EditCase(
        facts,
        [*edits, *instance, Question("multi-hop", asked, conditions=hops)],
        id=record.get("case_id", i),
    )


def _rewrite(rewrite: Mapping[str, Any], changes: Changes) -> Fact:
    subject, prompt = changes.unpadded(text_of(rewrite, "subject"), changes.trimmed(text_of(rewrite, "prompt")))
    text = prompt.replace("{}", subject)
    true = rewrite.get("target_true")
    return Fact(
        subject,
        prompt,
        None if true is None else changes.continued(text, text_of(true, "str")),
        changes.continued(text, text_of(rewrite["target_new"], "str")),
        relation=rewrite.get("relation_id"),
        id=f"{subject}, {rewrite['relation_id']}" if "relation_id" in rewrite else None,
    )


def _hop(hop: Mapping[str, Any]) -> Query:
    return Query(text_of(hop, "cloze" if "cloze" in hop else "question"), _names(hop, "answer"))


def _names(record: Mapping[str, Any], field: str) -> list[str]:
    """An answer with its other names."""
    return [text_of(record, field), *(record.get(f"{field}_alias") or ())]


def _old(fact: Fact) -> list[str]:
    return [] if fact.target_true is None else [fact.target_true]


# ------------------------------------------------------------------------------------ RippleEdits


def _of_ripple_edits(i: int, record: Mapping[str, Any], changes: Changes, subjects: Mapping[str, str]) -> EditCase:
    edit = record["edit"]
    was, number = edit.get("original_fact"), edit.get("subject_id")
    tests = {name: record[name] for name in CRITERIA if name in record}
    prompts = [
        text_of(query, "prompt")
        for of_kind in tests.values()
        for test in of_kind
        for query in (*test["test_queries"], *test.get("condition_queries", ()))
        if query.get("subject_id") == number and query.get("relation") != edit.get("relation")
    ]
    statement = text_of(edit, "prompt")
    subject = subjects[number] if number in subjects else _subject(statement, prompts, number)
    prompt, new = _stated(statement, subject)
    template = template_of({"subject": subject, "prompt": prompt}, "prompt", changes)
    text = template[1].replace("{}", subject)
    true = None if was is None else changes.continued(text, _stated(text_of(was, "prompt"), subject)[1])
    fact = Fact(
        template[0],
        template[1],
        true,
        changes.continued(text, new),
        relation=edit.get("relation"),
        id=record.get("id", i),
    )
    questions = [
        Question(
            CRITERIA[name],
            [_query(query) for query in test["test_queries"]],
            every=_every(test.get("test_condition", "OR")),
            conditions=[_query(query) for query in test.get("condition_queries", ())],
        )
        for name, of_kind in tests.items()
        for test in of_kind
        if all(query.get("answers") for query in (*test["test_queries"], *test.get("condition_queries", ())))
    ]
    return EditCase([fact], questions, id=record.get("id", i))


def _query(query: Mapping[str, Any]) -> Query:
    groups = [[text_of(each, "value"), *each.get("aliases", ())] for each in query["answers"]]
    return Query(text_of(query, "prompt"), [[name for name in names if name.strip()] for names in groups])


def _every(said: str) -> bool:
    if said not in ("OR", "AND"):
        raise ValueError(f"test_condition is {said!r}, needed 'OR' or 'AND'")
    return said == "AND"


def _subject(statement: str, prompts: Sequence[str], number: str | None) -> str:
    """The words that a statement has in common with other prompts about the same subject, most of them."""
    words, found = statement.split(), Counter[str]()
    for prompt in dict.fromkeys(prompts):
        if common := _common(words, prompt.split()):
            found[common] += 1
    if not found:
        raise ValueError(f"the name of its subject can't be told: give it, subjects={{{number!r}: …}}")
    return found.most_common(1)[0][0]


def _common(one: Sequence[str], other: Sequence[str]) -> str:
    """The longest run of words that both have, which holds a capital letter, without what surrounds a name."""
    best: list[str] = []
    for a in range(len(one)):
        for b in range(len(other)):
            size = 0
            while a + size < len(one) and b + size < len(other) and one[a + size] == other[b + size]:
                size += 1
            run = list(one[a : a + size])
            while run and run[0] in ("The", "name", "of", "names"):
                run = run[1:]
            while run and run[-1] in ("is", "are", "was", "which"):
                run = run[:-1]
            if len(run) > len(best) and any(word[:1].isupper() or word[:1].isdigit() for word in run):
                best = run
    return " ".join(best)


def _stated(statement: str, subject: str) -> tuple[str, str]:
    """A statement's prompt and its object: what follows the verb behind the subject."""
    found = re.match(rf"(.*{re.escape(subject)}\S*(?:\s\S+)*?\s(?:is|are|was))\s(.+?)\.?$", statement)
    if found is None:
        raise ValueError(f"{statement!r} doesn't say what {subject!r} is")
    return found[1], found[2]


# ------------------------------------------------------------------------------------ KnowEdit


def _of_knowedit(i: int, record: Mapping[str, Any], changes: Changes) -> EditCase:
    subject, template, text = template_of(record, "prompt", changes)
    true = _flat(record.get("ground_truth"))[:1]
    rephrased = record.get("rephrase") or record.get("rephrase_prompt") or ()
    fact = Fact(
        subject,
        template,
        changes.continued(text, true[0]) if true else None,
        changes.continued(text, text_of(record, "target_new")),
        paraphrases=[rephrased] if isinstance(rephrased, str) else list(rephrased),
        id=record.get("case_id", record.get("id", i)),
    )
    questions = [
        Question(
            kind.replace("_", " ").lower(),
            [query],
            conditions=[query] if field == "locality" else [],
        )
        for field in ("portability", "locality")
        for kind, asked in (record.get(field) or {}).items()
        for query in _queries(asked)
    ]
    if not questions:
        raise ValueError("it has neither portability nor locality, needed one: fe.data.facts reads edits alone")
    return EditCase([fact], questions, id=fact.id)


def _queries(asked: Any) -> list[Query]:
    """Questions of a kind: records with a prompt each, or a record of two lists."""
    if isinstance(asked, Mapping):
        prompts, truths = asked["prompt"], asked["ground_truth"]
        one = isinstance(prompts, str)
        pairs = [(prompts, truths)] if one else list(zip(prompts, truths, strict=True))
    else:
        pairs = [(each["prompt"], each["ground_truth"]) for each in asked]
    return [Query(prompt, names) for prompt, truth in pairs if (names := _flat(truth))]


def _flat(truth: Any) -> list[str]:
    """All names of an answer, whether it is given as text, as a list, or as lists in a list."""
    if truth is None or isinstance(truth, str):
        return [truth] if truth else []
    return [name for each in truth for name in _flat(each)]
