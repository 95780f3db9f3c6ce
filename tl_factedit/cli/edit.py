"""Write facts into a model's weights, and save the edit as a small file; the model itself isn't kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_factedit.backend.protocol import Model
from tl_factedit.cli.editors import add_editor_options, check_editor_options, make_edit
from tl_factedit.cli.given import add_fact_options, add_model_options, facts_of, load_model
from tl_factedit.cli.output import Output, step, writable
from tl_factedit.core import saved
from tl_factedit.core.facts import Fact
from tl_factedit.editing.edit import Edit
from tl_factedit.evaluation.scores import Scores, evaluate


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_model_options(parser)
    add_fact_options(parser)
    add_editor_options(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="where to save the edit (needed)")


def run(args: argparse.Namespace) -> Output:
    """Make the edit, save it, and score the model before and with it."""
    out = writable(args.out, "--out")
    facts = facts_of(args)
    check_editor_options(args, facts)
    model = load_model(args)
    edit = make_edit(args, model, facts)
    edit.save(out)
    step(args, "scoring the model before and after")
    before, after = before_and_after(model, edit, facts)
    lines = [repr(edit), *(f"{when}: {each!r}" for when, each in (("before", before), ("after", after)) if each)]
    return Output(
        "\n".join([*lines, f"saved: {out}"]),
        {
            "edit": description(edit),
            "before": before and before.to_dict(),
            "after": after and after.to_dict(),
            "out": str(out),
        },
    )


def before_and_after(model: Model, edit: Edit, facts: Sequence[Fact]) -> tuple[Scores | None, Scores | None]:
    """Scores of the model without and with an edit; None where a fact has no old object to compare the new one with."""
    if any(fact.target_true is None for fact in facts):
        return None, None
    before = evaluate(model, list(facts))
    with edit.applied(model):
        return before, evaluate(model, list(facts))


def description(edit: Edit) -> dict[str, Any]:
    """What an edit says of itself, without its matrices (these are in its file)."""
    return {
        "digest": edit.digest,
        "layers": list(edit.layers),
        "facts": [fact.to_dict() for fact in edit.facts],
        "editor": saved.as_plain(edit.editor, "editor"),
        "concerns": list(edit.concerns),
        "diagnostics": saved.as_plain(edit.diagnostics, "diagnostics"),
        "fits": saved.as_plain(edit.fits, "fits"),
        "provenance": saved.as_plain(edit.provenance, "provenance"),
    }
