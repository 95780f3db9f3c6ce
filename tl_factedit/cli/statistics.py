"""Second moments of keys for a command: from a file, collected now, or the identity, which has to be asked for."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tl_factedit import data
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.weights import down_proj
from tl_factedit.cli.output import say, step
from tl_factedit.stats.collect import key_stats
from tl_factedit.stats.key_stats import TOKENS_PER_DIMENSION, KeyStats

IDENTITY = "identity"
MANUAL = "python-manual"

WHAT_THE_IDENTITY_IS = (
    "--stats identity: no statistics. The identity stands in place of C = E[k kᵀ], which makes ROME's update the plain "
    "r k*ᵀ / k*ᵀk*: nothing says which keys the layer holds already, so that more of what else it answers may change"
)


def add_stats_options(parser: argparse.ArgumentParser) -> None:
    """Where statistics come from."""
    group = parser.add_argument_group(
        "statistics", "what the edited layers are to leave alone (not for finetune and knowledge-neurons)"
    )
    group.add_argument(
        "--stats", metavar="FILE", help=f"of key_stats; made by --stats-texts if it isn't there; {IDENTITY!r} for none"
    )
    group.add_argument(
        "--stats-texts",
        metavar="FILE",
        help=f"collect them over a file of texts (as of --texts of audit), or {MANUAL!r}, prose that every Python has",
    )
    group.add_argument(
        "--stats-tokens", type=int, metavar="N", help="how many tokens (default: ten for each key dimension)"
    )


def check_stats_options(args: argparse.Namespace) -> None:
    """Check what is given before a model is loaded.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No statistics are given, or in two ways at once.
    """
    if args.stats is None and args.stats_texts is None:
        raise ValueError(
            "no statistics are given, needed one of: --stats FILE (of key_stats); --stats-texts FILE, or --stats-texts "
            "python-manual, to collect them now (with --stats FILE they are kept there); --stats identity, for none"
        )
    if args.stats == IDENTITY and args.stats_texts is not None:
        raise ValueError("--stats identity takes no --stats-texts: leave one of the two out")
    if args.stats_texts is None and args.stats_tokens is not None:
        raise ValueError("--stats-tokens says how many tokens of --stats-texts to read, which isn't given")
    if args.stats_texts is not None:
        texts_of(args.stats_texts)
    elif args.stats != IDENTITY and not Path(str(args.stats)).expanduser().is_file():
        raise FileNotFoundError(f"no such file of statistics: {args.stats}: make it with --stats-texts FILE beside it")


def stats_of(args: argparse.Namespace, model: Model, layers: Sequence[int]) -> Mapping[int, KeyStats]:
    """Statistics of some layers.

    Raises:
        ValueError: A file without one of the layers, or of another model.
    """
    if args.stats == IDENTITY:
        say(f"note: {WHAT_THE_IDENTITY_IS}")
        return {layer: KeyStats.identity(model, layer) for layer in layers}
    if args.stats_texts is not None:
        wanted = TOKENS_PER_DIMENSION * max(down_proj(model, layer).W.shape[0] for layer in layers)
        n_tokens = wanted if args.stats_tokens is None else args.stats_tokens
        step(args, f"collecting key statistics of {n_tokens:,} tokens")
        texts = texts_of(args.stats_texts)
        return key_stats(model, list(layers), texts, n_tokens=n_tokens, path=args.stats, progress=not args.quiet)
    return {layer: KeyStats.load(args.stats, layer) for layer in layers}


def texts_of(source: str) -> Iterable[str]:
    """Texts by the name of a file: JSON, JSONL or Parquet with a field ``text``, or plain text in paragraphs.

    Raises:
        FileNotFoundError: No such file.
    """
    if source == MANUAL:
        return data.python_manual()
    file = Path(source).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no such file of texts: {source}")
    table = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(file.suffix.lower())
    if table is not None:
        return data.corpus(table, data_files=file)
    return [part for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]
