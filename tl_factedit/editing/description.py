"""Editors as plain data: what an `Edit` keeps of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from tl_factedit.editing.edit import Edit
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editing.value_methods import ValueMethod
from tl_factedit.stats.key_stats import KeyStats
from tl_factedit.stats.sampling import SampledContexts

ELSEWHERE = ("prepend_bos", "memory", "progress")
"""Fields that say nothing of an edit that its provenance doesn't, or nothing at all."""


def describe(editor: Any) -> dict[str, Any]:
    """Name and hyperparameters of an editor that is a dataclass, as plain data.

    Statistics are told by where they came from and a hash of each, edits by their digests; contexts that were given,
    not sampled, are in the edit itself.
    """
    if not is_dataclass(editor):
        raise TypeError(
            f"the editor is a {type(editor).__name__}, needed a dataclass with its hyperparameters as fields"
        )
    told: dict[str, Any] = {"name": type(editor).__name__}
    for field in fields(editor):
        value = getattr(editor, field.name)
        if field.name == "stats":
            told |= _stats(value)
        elif field.name == "contexts":
            told["contexts"] = plain(value) if isinstance(value, SampledContexts) else "given"
        elif field.name not in ELSEWHERE:
            told[field.name] = plain(value)
    return told


def plain(value: Any) -> Any:
    """The same data as a JSON header gives it back: lists for tuples, and the text of what isn't data."""
    if isinstance(value, Edit):
        return value.digest
    if isinstance(value, (ValueFit, SampledContexts)):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, ValueMethod) and is_dataclass(value):
        return {"name": type(value).__name__, **plain(asdict(value))}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _stats(stats: KeyStats | Mapping[int, KeyStats]) -> dict[str, Any]:
    if isinstance(stats, KeyStats):
        return {"layer": stats.layer, "n_tokens": stats.n_tokens, "corpus": stats.corpus, "moment": stats.digest}
    return {
        "layers": list(stats),
        "n_tokens": [each.n_tokens for each in stats.values()],
        "corpus": [each.corpus for each in stats.values()],
        "moment": [each.digest for each in stats.values()],
    }
