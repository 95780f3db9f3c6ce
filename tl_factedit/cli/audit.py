"""What a saved edit changed, and what it left of the old fact."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tl_factedit.auditing.audit import audit
from tl_factedit.auditing.verdict import Verdict
from tl_factedit.backend.protocol import Model
from tl_factedit.cli.given import WORLD, add_fact_options, add_model_options, facts_of, load_model, read_facts
from tl_factedit.cli.output import Output, step, writable
from tl_factedit.cli.statistics import texts_of
from tl_factedit.core.facts import Fact
from tl_factedit.editing.edit import Edit


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_model_options(parser)
    parser.add_argument(
        "--edit",
        type=Path,
        nargs="+",
        metavar="FILE",
        required=True,
        help="saved by `tl-factedit edit` or Edit.save; several are audited each alone, one for each fact",
    )
    add_fact_options(parser, default="; default: those that the edit was made for")
    add_audit_options(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="save the verdict (fe.Verdict.load reads it)")


def add_audit_options(parser: argparse.ArgumentParser) -> None:
    """What else the audit may look at; what isn't given is listed in the verdict as missing."""
    group = parser.add_argument_group("audit")
    group.add_argument(
        "--reference",
        metavar="FILE",
        help=f"facts of the same relations about other subjects, for the knock-out; {WORLD!r} for the package's own",
    )
    group.add_argument("--same-subject", metavar="FILE", help="other facts about the same subjects, which should stay")
    group.add_argument("--texts", metavar="FILE", help="plain text (paragraphs; or JSON, JSONL, Parquet with 'text')")
    group.add_argument("--full", action="store_true", help="all attacks that a claim of absence needs (slow)")
    group.add_argument("--folder", type=Path, help="keep what is read there; an audit that was killed goes on")
    group.add_argument("--audit-seed", type=int, default=0, metavar="N", help="seed of the bootstraps (default: 0)")


def run(args: argparse.Namespace) -> Output:
    """Audit the edit, or the edits."""
    out = None if args.out is None else writable(args.out, "--out")
    edits = [Edit.load(path) for path in args.edit]
    facts = facts_of(args, [fact for edit in edits for fact in edit.facts])
    beside = read_beside(args)
    verdict = audit_of(args, load_model(args), edits, facts, beside)
    if out is not None:
        verdict.save(out)
    return Output(
        repr(verdict),
        {
            "label": verdict.label,
            "explanation": verdict.explain(),
            "verdict": verdict.to_dict(),
            "out": None if out is None else str(out),
        },
    )


def read_beside(args: argparse.Namespace) -> dict[str, Any]:
    """What else the audit looks at, read before a model is loaded.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file without facts, or without texts.
    """
    return {
        "reference": None if args.reference is None else read_facts(args.reference),
        "same_subject": () if args.same_subject is None else read_facts(args.same_subject),
        "texts": () if args.texts is None else list(texts_of(args.texts)),
    }


def audit_of(
    args: argparse.Namespace,
    model: Model,
    edits: Sequence[Edit],
    facts: Sequence[Fact],
    beside: Mapping[str, Any],
) -> Verdict:
    """The verdict on one edit for all facts, or on one for each, with what `read_beside` gave."""
    step(args, "auditing")
    return audit(
        model,
        edits[0] if len(edits) == 1 else list(edits),
        list(facts),
        **beside,
        full=args.full,
        seed=args.audit_seed,
        folder=args.folder,
        progress=not args.quiet,
    )
