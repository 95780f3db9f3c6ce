"""The model and the facts that a command is given: options, and what they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tl_factedit import data, models
from tl_factedit.backend.protocol import Model
from tl_factedit.cli.output import step
from tl_factedit.core.facts import Fact

WORLD = "world"
"""In place of a file: the facts about landmarks, countries and others that come with the package."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="smollm2, organism (both need no network), or a name of the model hub that TransformerLens knows",
    )
    group.add_argument(
        "--kind",
        choices=["bridge", "hooked"],
        default="bridge",
        help="TransformerLens' class: TransformerBridge (default), or HookedTransformer (TransformerLens 3 only)",
    )


def load_model(args: argparse.Namespace) -> Model:
    """The model that is asked for."""
    step(args, f"loading {args.model}")
    return models.load(args.model, args.kind)


def add_fact_options(parser: argparse.ArgumentParser, *, default: str = "") -> None:
    """Which facts, and where the default comes from if there is one."""
    group = parser.add_argument_group("facts", f"from a file, or one fact in words{default}")
    group.add_argument(
        "--facts",
        "--fact",
        metavar="FILE",
        help="JSON, JSONL, CSV, TSV or Parquet with columns for subject, prompt and objects, or a published layout "
        f"(CounterFact, zsRE …); {WORLD!r} for the facts that come with the package",
    )
    group.add_argument(
        "--id", action="append", default=[], help="of the file, the fact of this id or subject (may be repeated)"
    )
    group.add_argument("--first", type=int, metavar="N", help="of the file, the first N facts")
    group.add_argument("--subject", help="such as: The Eiffel Tower")
    group.add_argument("--prompt", help="such as: {} is located in the city of ({} is the subject, or it is spelt out)")
    group.add_argument("--old", metavar="OBJECT", help="what the model says now, such as: Paris")
    group.add_argument("--new", metavar="OBJECT", help="what it is to say, such as: Rome")
    group.add_argument("--relation", help="what facts have in common that can be compared, such as: city of a landmark")
    group.add_argument("--paraphrase", action="append", default=[], metavar="PROMPT", help="may be repeated")
    group.add_argument(
        "--neighbour",
        action="append",
        default=[],
        metavar="TEXT",
        help="a whole prompt about another subject that has the old object too (may be repeated)",
    )
    group.add_argument(
        "--control", action="append", default=[], metavar="OBJECT", help="neither old nor new (may be repeated)"
    )


IN_WORDS = ("subject", "prompt", "old", "new", "relation", "paraphrase", "neighbour", "control")


def facts_of(args: argparse.Namespace, default: Sequence[Fact] = ()) -> list[Fact]:
    """The facts that are asked for.

    Args:
        args: What was given.
        default: What to take where no facts are given.

    Raises:
        ValueError: None are given, in two ways at once, or not enough of one; no fact of this id.
    """
    said = [name for name in IN_WORDS if getattr(args, name)]
    if args.facts is not None and said:
        raise ValueError(f"--facts and --{said[0]} are both given, needed a file or one fact in words")
    if args.facts is None and not said:
        if not default:
            raise ValueError(
                "no facts are given, needed --facts FILE, or one fact in words: --subject 'The Eiffel Tower' "
                "--prompt '{} is located in the city of' --old Paris --new Rome"
            )
        return chosen(args, list(default))
    return [in_words(args)] if args.facts is None else chosen(args, read_facts(args.facts))


def in_words(args: argparse.Namespace) -> Fact:
    """The one fact of ``--subject``, ``--prompt`` and so on."""
    for name in ("subject", "prompt"):
        if getattr(args, name) is None:
            raise ValueError(f"a fact in words has no --{name}: needed --subject, --prompt, and --old or --new or both")
    if args.id or args.first is not None:
        raise ValueError("--id and --first choose from a file, and a fact in words is given: leave them out")
    record = {
        "subject": args.subject,
        "prompt": args.prompt,
        "target_true": args.old,
        "target_new": args.new,
        "relation": args.relation,
        "paraphrases": args.paraphrase,
        "neighbours": args.neighbour,
        "controls": args.control,
    }
    (fact,) = data.facts([{name: value for name, value in record.items() if value}])
    return fact


def read_facts(source: str) -> list[Fact]:
    """The facts of a file, or those that come with the package."""
    return data.world() if source == WORLD else list(data.facts(Path(source)))


def chosen(args: argparse.Namespace, facts: list[Fact]) -> list[Fact]:
    """Of some facts those of ``--id``, and of these the first so many.

    Raises:
        ValueError: No fact has such an id or subject, or fewer than one is asked for.
    """
    wanted = set[str](args.id)
    missing = wanted - {name for fact in facts for name in (fact.name, fact.subject)}
    if missing:
        known = ", ".join(f"{fact.name!r} ({fact.subject})" for fact in facts[:5])
        more = " …" if len(facts) > 5 else ""
        raise ValueError(f"no fact has the id or subject {min(missing)!r}; there are {known}{more}")
    if args.first is not None and args.first < 1:
        raise ValueError(f"--first is {args.first}, needed 1 or more")
    return [fact for fact in facts if not wanted or wanted & {fact.name, fact.subject}][: args.first]
