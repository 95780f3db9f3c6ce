"""From a fact to a verdict in one HTML file that opens offline: the trace, the edit, what it changed, and its audit."""

from __future__ import annotations

import argparse
from pathlib import Path

from tl_factedit import show
from tl_factedit.cli.audit import add_audit_options, audit_of, read_beside
from tl_factedit.cli.edit import before_and_after, description
from tl_factedit.cli.editors import add_editor_options, check_editor_options, make_edit
from tl_factedit.cli.given import add_fact_options, add_model_options, facts_of, load_model
from tl_factedit.cli.output import Output, step, writable
from tl_factedit.core.facts import Fact, need_old_object
from tl_factedit.editing.edit import Edit
from tl_factedit.locate.trace import causal_trace


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_model_options(parser)
    add_fact_options(parser, default="; default with --edit: those that it was made for")
    parser.add_argument("--edit", type=Path, metavar="FILE", help="a saved edit, in place of the editor's options")
    add_editor_options(parser)
    add_audit_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("report.html"), help="the page (default: report.html)"
    )


def run(args: argparse.Namespace) -> Output:
    """Trace, edit, score and audit, and write the page."""
    out = writable(args.out, "--out")
    edit = None if args.edit is None else Edit.load(args.edit)
    if edit is not None and (args.layer or args.set or args.stats or args.stats_texts):
        raise ValueError("--edit is given, and options of an editor too: needed a saved edit, or how to make one")
    facts = facts_of(args, () if edit is None else edit.facts)
    need_old_object(facts, "a report")
    if edit is None:
        check_editor_options(args, facts)
    beside = read_beside(args)
    model = load_model(args)
    edit = make_edit(args, model, facts) if edit is None else edit
    step(args, "tracing")
    trace = causal_trace(model, facts, progress=not args.quiet)
    step(args, "scoring the model before and after")
    before, after = before_and_after(model, edit, facts)
    assert before is not None and after is not None
    verdict = audit_of(args, model, [edit], facts, beside)
    first = facts[0]
    show.report(
        out,
        ("Locate", trace),
        ("What the edit changed", show.scores(before, after)),
        ("Where the edit fires", show.edit(model, edit, example(first))),
        ("Audit", verdict),
        title=f"{first.text}:{first.target_true} →{first.target_new}, {args.model} ({args.kind})",
    )
    return Output(
        f"{edit!r}\n{verdict!r}\nwritten: {out} (opens in any browser, offline)",
        {
            "label": verdict.label,
            "explanation": verdict.explain(),
            "peak_layer": trace.peak_layer,
            "edit": description(edit),
            "before": before.to_dict(),
            "after": after.to_dict(),
            "out": str(out),
        },
    )


def example(fact: Fact) -> str:
    """A text on which to show where an edit fires: the fact as it was written, and a neighbour of it."""
    told = f"{fact.text}{fact.target_new}."
    if not fact.neighbours:
        return told
    answer = fact.neighbour_targets[0] if fact.neighbour_targets else fact.after(fact.neighbours[0], fact.old)
    return f"{told} {fact.neighbours[0]}{answer}."
