"""Relations with their pairs, in the layout of Hernandez et al. 2023 (arXiv:2308.09124): templates, and samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_factedit.core.facts import Fact
from tl_factedit.core.spacing import continued, trimmed
from tl_factedit.data.files import read_json
from tl_factedit.data.records import Source

TEMPLATES = ("prompt_templates", "prompt_templates_zs")


def relations(path: Source) -> list[Fact]:
    """Facts of relations: each a name, prompt templates, and samples of subject and object.

    The first of ``prompt_templates`` is the prompt; the others and ``prompt_templates_zs`` are paraphrases. Controls
    are the other objects of the relation, but for those that the same subject has in another sample. There are no new
    objects: the facts are for tracing, as references, or for ``fact.but(target_new=…)``.

    Args:
        path: A file that holds one relation or a list of them; a folder, all of whose ``.json`` files do; or relations.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file has another layout, or a sample makes no fact; the message names both. A folder without
            ``.json`` files.

    Example:
        >>> facts = fe.data.relations("data/factual")                  # doctest: +SKIP
        >>> {fact.relation for fact in facts}                          # doctest: +SKIP
        {'city in country', 'company CEO', …}
    """
    if not isinstance(path, (str, Path)):
        return [fact for relation in _checked("the records", path) for fact in _facts("the records", relation)]
    given = Path(path).expanduser()
    files = sorted(given.rglob("*.json")) if given.is_dir() else [given]
    if not files:
        raise ValueError(f"{path} is a folder without .json files, needed some: each holds a relation")
    return [fact for file in files for relation in _checked(file, read_json(file)) for fact in _facts(file, relation)]


def _checked(file: str | Path, held: Any) -> list[Mapping[str, Any]]:
    found = list(held) if isinstance(held, (list, tuple)) else [held]
    for i, each in enumerate(found):
        fields = ("name", "prompt_templates", "samples")
        if not isinstance(each, Mapping) or not all(field in each for field in fields):
            raise ValueError(
                f"relation {i} of {file} isn't one, needed the fields {', '.join(fields)}: is it of another layout?"
            )
    return found


def _facts(file: str | Path, relation: Mapping[str, Any]) -> list[Fact]:
    name = relation["name"]
    templates = [text for field in TEMPLATES for text in _texts(file, name, relation, field)]
    if not templates or not relation["samples"]:
        raise ValueError(f"relation {name!r} of {file} has no templates or no samples, needed one of each at least")
    prompt, *others = dict.fromkeys(map(trimmed, templates))
    pairs, right = list[tuple[str, str]](), defaultdict[str, list[str]](list)
    for i, sample in enumerate(relation["samples"]):
        subject, obj = (sample.get(field) if isinstance(sample, Mapping) else None for field in ("subject", "object"))
        if not isinstance(subject, str) or not isinstance(obj, str) or not subject.strip() or not obj.strip():
            raise ValueError(f"sample {i} of {name!r} of {file} is {sample!r}, needed texts 'subject' and 'object'")
        pairs.append((subject, continued(prompt, obj)))
        right[subject].append(pairs[-1][1])
    objects = list(dict.fromkeys(obj for _, obj in pairs))
    return [
        Fact(
            subject,
            prompt,
            obj,
            paraphrases=others,
            controls=[other for other in objects if other not in right[subject]],
            relation=name,
            id=f"{name}: {subject}",
        )
        for subject, obj in pairs
    ]


def _texts(file: str | Path, name: str, relation: Mapping[str, Any], field: str) -> Sequence[str]:
    held = relation.get(field, ())
    if not isinstance(held, (list, tuple)) or not all(isinstance(each, str) and each.count("{}") == 1 for each in held):
        raise ValueError(f'{field} of {name!r} of {file} is {held!r}, needed a list of texts with one "{{}}" each')
    return held
