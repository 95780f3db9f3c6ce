"""Facts from anything that has rows: which column is what, guessed from the usual names and said."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tl_factedit.core.facts import Fact, as_facts
from tl_factedit.core.kinds import short
from tl_factedit.core.spacing import continued, ending, stripped
from tl_factedit.core.telling import tell
from tl_factedit.core.words import counted
from tl_factedit.data.benchmarks import counterfact, known_facts, zsre
from tl_factedit.data.files import is_table, is_tabular, read_rows
from tl_factedit.data.pairs import relations
from tl_factedit.data.records import Changes, made_of, malformed, name_of, template_of

if TYPE_CHECKING:
    import pandas as pd

NAMES: Mapping[str, tuple[str, ...]] = {
    "subject": ("subject", "sub_label", "subj", "head", "entity", "s"),
    "prompt": ("prompt", "template", "question", "src", "query", "cloze", "input", "statement"),
    "target_true": (
        *("target_true", "ground_truth", "obj_label", "object", "obj", "answer", "answers", "attribute", "true"),
        *("label", "tail", "o"),
    ),
    "target_new": ("target_new", "target_false", "alt", "new_object", "edit_target", "counterfactual", "new", "target"),
    "paraphrases": (
        *("paraphrases", "paraphrase_prompts", "rephrases", "rephrase_prompts", "rephrase", "rephrase_prompt"),
        *("paraphrase",),
    ),
    "neighbours": (
        *("neighbours", "neighbors", "neighborhood_prompts", "neighbourhood_prompts", "locality_prompt", "locality"),
        *("loc",),
    ),
    "neighbour_targets": ("neighbour_targets", "neighbor_targets", "locality_ground_truth", "loc_ans"),
    "controls": ("controls", "distractors"),
    "relation": ("relation", "relation_id", "predicate_id", "predicate", "rel", "relation_name"),
    "id": ("id", "case_id", "known_id", "uuid"),
}
"""The columns that a field of a fact is taken from, the first that is there."""

SLOTS = ("{subject}", "[X]", "{}")
"""What stands for the subject in a prompt that doesn't spell it."""

GAP = re.compile(r"\[Y\]|\[MASK\]|<mask>|_{2,}|\{[A-Za-z_]+\}")
"""What stands for the object, at a prompt's end."""

NOTHING_IN_WORDS = ("None", "nan", "NaN", "null", "NULL", "<NA>")
"""What programs write into a table where there is nothing; "NA" isn't among them, as it may be a name."""


class Facts(list[Fact]):
    """Facts that were read, a list, and what was taken for what.

    Attributes:
        layout: The published layout that they were in, by its reader's name; None where columns were taken.
        columns: The column that each field was taken from.
        unused: The other columns.
        left_out: Records that make no fact, each with its place and what is wrong.
    """

    def __init__(
        self,
        facts: Sequence[Fact],
        columns: Mapping[str, str],
        unused: Sequence[str] = (),
        left_out: Sequence[tuple[int, str]] = (),
        layout: str | None = None,
    ) -> None:
        super().__init__(facts)
        self.layout, self.columns, self.unused, self.left_out = layout, dict(columns), tuple(unused), tuple(left_out)

    def __repr__(self) -> str:
        """How many, and from what; the facts themselves are its items."""
        if self.layout is not None:
            return f"{counted(len(self), 'fact')} in the layout of fe.data.{self.layout}"
        taken = ", ".join(f"{field} from {column!r}" for field, column in self.columns.items())
        rest = f"; not used: {', '.join(map(repr, self.unused))}" if self.unused else ""
        left = f"; {counted(len(self.left_out), 'record')} left out" if self.left_out else ""
        return f"{counted(len(self), 'fact')}: {taken}{rest}{left}"


def facts(
    records: Any,
    columns: Mapping[str, str] | None = None,
    *,
    wrong: Literal["refuse", "leave out"] = "refuse",
) -> Facts:
    """Facts from dicts, a DataFrame, a dataset or a file, whatever its columns are called.

    Columns are found by the usual names (`subject`, `prompt` or `question`, `target_true` or `ground_truth` or
    `answer`, `target_new` or `target`, `rephrase`, `locality_prompt` …), and the result says which was taken for what.
    Published layouts with records inside records are known too: CounterFact, known facts, zsRE, and relations with
    templates and pairs.

    A prompt spells its subject, or has ``{}``, ``{subject}`` or ``[X]`` in its place, and may end with a gap for the
    object (``[Y]``, ``[MASK]``, ``____``). Objects get the space that continues their prompt. A list may be one text,
    or be spelt as JSON in a table.
    Where there is no column of controls, a fact's are the other objects that were read for its relation. Where there
    is none of ids, a fact is called by its subject.

    Args:
        records: A list of dicts; a pandas ``DataFrame``; a ``datasets.Dataset``; or a path to JSON, JSONL, CSV, TSV or
            Parquet, packed by gzip or not.
        columns: The column of each field of `Fact`, where it isn't the usual one: ``{"subject": "entity_name"}``.
        wrong: What becomes of records that make no fact: ``"refuse"`` raises and names them; ``"leave out"`` says so in
            a warning and keeps them in ``left_out``.

    Returns:
        A list of `Fact` that says where it came from: ``.columns``, ``.unused``, ``.left_out``.

    Raises:
        TypeError: `records` is nothing that has rows.
        ValueError: No column for subject, prompt or any object; a column or a field that there isn't; records that make
            no fact.

    Example:
        >>> fe.data.facts([{"subject": "France", "question": "What is the capital of France?", "answer": "Paris"}])
        1 fact: subject from 'subject', prompt from 'question', target_true from 'answer'
    """
    if wrong not in ("refuse", "leave out"):
        raise ValueError(f"wrong is {wrong!r}, needed 'refuse' or 'leave out'")
    name = name_of(records) if isinstance(records, (str, Path)) else "the records"
    rows = _rows(records)
    if columns is None and (reader := _published(rows)) is not None:
        source = records if isinstance(records, (str, Path)) and not is_tabular(records) else rows
        return Facts(reader(source), {}, layout=reader.__name__)
    there = list(dict.fromkeys(str(key) for row in rows for key in row))
    taken = _columns(there, columns or {}, _first_row(records))
    objects: dict[str, dict[str, None]] = {}
    _tell_of_nothing_in_words(name, rows, taken)

    def make(_: int, row: Mapping[str, Any], changes: Changes) -> Fact:
        return _fact({field: row.get(column) for field, column in taken.items()}, changes)

    found, left = made_of(records if isinstance(records, (str, Path)) else rows, rows, make)
    if left and wrong == "refuse":
        hint = " (wrong='leave out' leaves them out)"
        raise ValueError(malformed(name, left, len(rows)) + hint)
    if left:
        tell(malformed(name, left, len(rows)) + ": left out")
    if "controls" not in taken and "relation" in taken:
        for fact in found:
            for target in (fact.target_true, fact.target_new):
                if target is not None and fact.relation is not None:
                    objects.setdefault(fact.relation, {})[target] = None
        found = [_with_controls(fact, objects) for fact in found]
    used = set(taken.values())
    return Facts(found, taken, [column for column in there if column not in used], left)


def to_frame(facts: Fact | Iterable[Fact]) -> pd.DataFrame:
    """A table of facts, one row each and a column a field of `Fact`, which `facts` reads as they were.

    But for an object that goes on inside its prompt's last word ("super" + "man"): `facts` takes it for a word.

    Warns:
        UserWarning: There is such an object.

    Example:
        >>> list(fe.data.to_frame(fe.data.world()[:3]).columns[:3])
        ['subject', 'prompt', 'target_true']
    """
    import pandas as pd

    given = as_facts(facts)
    _tell_of_words_to_be(given)
    frame = pd.DataFrame([fact.to_dict() for fact in given])
    frame["id"] = pd.Series([fact.id for fact in given], dtype=object)  # whole numbers beside None would become floats
    return frame


def _tell_of_words_to_be(facts: Iterable[Fact]) -> None:
    """Warn of objects that `facts` reads as words of their own, and that are none where they stand."""
    found = []
    for fact in facts:
        asked = [(fact.text, target) for target in (fact.target_true, fact.target_new, *fact.controls)]
        if fact.neighbour_targets:
            asked += zip(fact.neighbours, fact.neighbour_targets, strict=True)
        for text, target in asked:
            if target is not None and continued(text, target) != target:
                found.append((fact, text, target))
    if found:
        fact, text, target = found[0]
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        tell(
            f"{target!r}{more} goes on inside the last word of {ending(text)!r} in fact {fact.name!r}: fe.data.facts "
            f"takes objects for words, and reads it as {continued(text, target)!r}; where it is to be read as it is, "
            "keep fact.to_dict(), of which fe.Fact(**row) is the fact again"
        )


def _rows(records: Any) -> list[Mapping[str, Any]]:
    """The rows of anything that has some."""
    given: Any = read_rows(records) if isinstance(records, (str, Path)) else records
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # a DataFrame
        given = given.to_dict("records")
    elif hasattr(given, "column_names") and not isinstance(given, Mapping):  # a dataset
        given = list(given)
    elif isinstance(given, Mapping) and "prompt_templates" in given:
        given = [given]
    if isinstance(given, Mapping):
        splits = ", ".join(map(repr, list(given)[:6]))
        raise ValueError(f"the records are a mapping of {splits}, needed a list of records: take one of its values")
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        if isinstance(records, (str, Path)):
            held = "null" if given is None else f"{short(given)}, a {type(given).__name__}"
            raise ValueError(f"{records} holds {held}: needed a list of records")
        raise TypeError(
            f"records is a {type(records).__name__}, needed a list of dicts, a DataFrame, a dataset or a path"
        )
    if not given:
        raise ValueError("there are no records, needed one at least")
    for i, row in enumerate(given):
        if not isinstance(row, Mapping):
            raise ValueError(f"record {i} is a {type(row).__name__}, needed a mapping of columns to values")
    return [{str(key): _plain(value) for key, value in row.items()} for row in given]


def _plain(value: Any) -> Any:
    """A value as Python has it: NaN is None, an array is a list."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if isinstance(value, float) and math.isnan(value) else value


def _published(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The reader of a layout that columns can't tell; None for any other."""
    first = rows[0]
    if "requested_rewrite" in first:
        if not isinstance(first["requested_rewrite"], Mapping):
            raise ValueError("requested_rewrite holds several rewrites: read MQuAKE by fe.data.mquake")
        return counterfact
    if isinstance(first.get("edit"), Mapping) and "subject_id" in first["edit"]:
        raise ValueError("the records hold edits with their tests: read RippleEdits by fe.data.ripple_edits")
    if {"src", "loc_ans", "alt", "answers"} <= first.keys():
        return zsre
    if {"known_id", "attribute"} <= first.keys():
        return known_facts
    return relations if {"prompt_templates", "samples"} <= first.keys() else None


def _tell_of_nothing_in_words(name: str, rows: Sequence[Mapping[str, Any]], taken: Mapping[str, str]) -> None:
    """Warn of objects such as "None" and "nan", which are what programs print where there is none."""
    columns = [taken[field] for field in ("target_true", "target_new") if field in taken]
    found = [
        (i, column, row[column])
        for i, row in enumerate(rows)
        for column in columns
        if isinstance(row.get(column), str) and row[column].strip() in NOTHING_IN_WORDS
    ]
    if found:
        i, column, value = found[0]
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        tell(
            f"the {column!r} of record {i} of {name} is the text {value!r}{more}, and is read as an object of that "
            "name: leave the cell empty where there is none"
        )


def _first_row(records: Any) -> str:
    """What to add to an error about columns where names are no part of each record: they may be a record."""
    table = is_table(records) if isinstance(records, (str, Path)) else hasattr(records, "columns")
    said = "the first row is taken as the names of columns: if it is a record, give the table one of names"
    return f" ({said}, such as subject, prompt, target_true, target_new)" if table else ""


def _columns(there: Sequence[str], given: Mapping[str, str], hint: str) -> dict[str, str]:
    """The column of each field, in the order of `NAMES`; `hint` is added to what is said of one that isn't there."""
    for field, column in given.items():
        if field not in NAMES:
            raise ValueError(f"columns names {field!r}, needed fields of a fact: {', '.join(NAMES)}")
        if column not in there:
            raise ValueError(
                f"columns takes {field} from {column!r}, which isn't there: there are {_told(there)}{hint}"
            )
    lower = {column.lower(): column for column in reversed(there)}
    taken, used = dict[str, str](), set(given.values())
    for field, names in NAMES.items():
        mine = given.get(field) or next((lower[n] for n in names if n in lower and lower[n] not in used), None)
        if mine is not None:
            taken[field] = mine
            used.add(mine)
    for field in ("subject", "prompt"):
        if field not in taken:
            raise ValueError(
                f"no column for the {field} among {_told(there)}: name it, columns={{{field!r}: {there[0]!r}}}{hint}"
            )
    if "target_true" not in taken and "target_new" not in taken:
        raise ValueError(f"no column for an object among {_told(there)}: name it, columns={{'target_true': …}}{hint}")
    return taken


def _told(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns))


def _fact(row: Mapping[str, Any], changes: Changes) -> Fact:
    subject, prompt, text = _asked(row, changes)
    neighbours, answers = _neighbours(row)
    return Fact(
        subject,
        prompt,
        _object(row, "target_true", text, changes),
        _object(row, "target_new", text, changes),
        paraphrases=[changes.trimmed(_slotted(each)) for each in _several(row, "paraphrases")],
        neighbours=[changes.trimmed(each) for each in neighbours],
        neighbour_targets=[changes.continued(n, a) for n, a in zip(neighbours, answers, strict=bool(answers))],
        controls=[changes.continued(text, each) for each in _several(row, "controls")],
        relation=None if row.get("relation") is None else str(row["relation"]),
        id=_whole(row.get("id")),
    )


def _whole(value: Any) -> Any:
    """A whole number that a table holds as a float, as it does beside missing ones; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _asked(row: Mapping[str, Any], changes: Changes) -> tuple[str, str, str]:
    """The subject, the prompt with its slot, and the text as it was given."""
    for field in ("subject", "prompt"):
        if not isinstance(row.get(field), str) or not stripped(row[field]):
            raise ValueError(f"{field} is {row.get(field)!r}, needed some text")
    template = _slotted(row["prompt"])
    if "{}" not in template:
        found = template_of({**row, "prompt": template}, "prompt", changes)
    else:
        subject, prompt = changes.unpadded(row["subject"], template)
        found = subject, changes.trimmed(prompt), prompt.replace("{}", subject)
    obj = _first(row.get("target_true"))
    if isinstance(obj, str) and obj.strip() and re.search(rf"\s{re.escape(obj.strip())}[\s.!?。]*$", found[2]):
        raise ValueError(f"the prompt {found[2]!r} already ends with its object {obj!r}, needed the text before it")
    return found


def _slotted(text: str) -> str:
    """A prompt with ``{}`` for its subject, up to the gap for its object."""
    for slot in SLOTS:
        text = text.replace(slot, "{}")
    gap = GAP.search(text)
    if gap is None:
        return text
    if re.sub(r"[\s.!?。]", "", text[gap.end() :]):
        raise ValueError(f"{gap.group()} stands inside the prompt {text!r}, needed at its end")
    return text[: gap.start()].rstrip()


def _object(row: Mapping[str, Any], field: str, text: str, changes: Changes) -> str | None:
    value = _first(row.get(field))
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        value = str(value)  # a year
    return changes.continued(text, value)


def _first(value: Any) -> Any:
    """An object: of several answers the first, of a record its text."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return value.get("str") if isinstance(value, Mapping) else value  # {"str": "Paris", "id": "Q90"}


def _several(row: Mapping[str, Any], field: str) -> list[str]:
    value = row.get(field)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _list_in(value)
    if value is None or value == "":
        return []
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{field} is {value!r}, needed a text or a list of texts")
    return list(found)


def _list_in(text: str) -> Any:
    """A list that is spelt in a table's cell, as JSON or as Python prints it; otherwise the text itself."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _neighbours(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Prompts about others with their answers, side by side or in records of their own."""
    held = row.get("neighbours")
    if isinstance(held, (list, tuple)) and held and all(isinstance(each, Mapping) for each in held):
        pairs = [(each.get("loc", each.get("prompt")), each.get("loc_ans", each.get("ground_truth"))) for each in held]
        if not all(isinstance(part, str) for pair in pairs for part in pair):
            raise ValueError(f"neighbours is {held!r}, needed a prompt and an answer in each")
        return [str(prompt) for prompt, _ in pairs], [str(answer) for _, answer in pairs]
    return _several(row, "neighbours"), _several(row, "neighbour_targets")


def _with_controls(fact: Fact, objects: Mapping[str, Mapping[str, None]]) -> Fact:
    others = [o for o in objects.get(str(fact.relation), ()) if o not in (fact.target_true, fact.target_new)]
    return fact.but(controls=others)
