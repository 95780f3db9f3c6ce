"""Causal tracing: which states, restored after the subject was corrupted, bring the object back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tl_factedit.cli.given import add_fact_options, add_model_options, facts_of, load_model
from tl_factedit.cli.output import Output, step, writable
from tl_factedit.core import saved
from tl_factedit.locate.corruption import GaussianNoise
from tl_factedit.locate.trace import causal_trace
from tl_factedit.locate.trace_result import ROLES, Trace


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this command."""
    add_model_options(parser)
    add_fact_options(parser)
    group = parser.add_argument_group("tracing")
    group.add_argument(
        "--component",
        choices=["resid", "resid_pre", "resid_mid", "mlp", "attn"],
        default="resid",
        help="what is restored: the residual stream after a block (default), or what MLP or attention write",
    )
    group.add_argument("--window", type=int, default=1, help="how many layers are restored together (default: 1)")
    group.add_argument("--metric", choices=["prob", "top_prob", "logprob", "logit_diff", "kl"], default="prob")
    group.add_argument("--noise", type=float, default=3.0, help="standard deviations of noise (default: 3)")
    group.add_argument("--samples", type=int, default=10, help="samples of the noise (default: 10)")
    group.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    group.add_argument("--folder", type=Path, help="keep what is done there; a run that was killed goes on")
    group.add_argument("--out", type=Path, metavar="FILE", help="save the trace (fe.locate's Trace.load reads it)")


def run(args: argparse.Namespace) -> Output:
    """Trace the facts."""
    out = None if args.out is None else writable(args.out, "--out")
    facts = facts_of(args)
    noise = GaussianNoise(scale=args.noise, samples=args.samples, seed=args.seed)
    model = load_model(args)
    step(args, f"tracing {len(facts)} fact{'s' * (len(facts) > 1)}")
    trace = causal_trace(
        model,
        facts,
        component=args.component,
        window=args.window,
        metric=args.metric,
        corruption=noise,
        folder=args.folder,
        progress=not args.quiet,
    )
    if out is not None:
        trace.save(out)
    return Output(
        "\n".join([repr(trace), *_rows(trace)]),
        {
            "peak_layer": trace.peak_layer,
            "carries_subject": trace.carries_subject,
            "best_cell": trace.best_cell._asdict(),
            "trace": saved.as_plain(trace, "trace"),
            "out": None if out is None else str(out),
        },
    )


def _rows(trace: Trace) -> list[str]:
    """The largest effect of each token of the subject, or of several facts of each role."""
    if len(trace.facts) > 1:
        mean = trace.by_role().nanmean(0).nan_to_num(-float("inf"))
        named = [(role, row) for role, row in zip(ROLES, mean, strict=True) if bool(row.isfinite().any())]
    else:
        start, stop = trace.subject[0]
        named = [(repr(trace.tokens[0][p]), trace.effect[0, :, p]) for p in range(start, stop)]
    found: list[tuple[str, Any]] = [(name, row.max(0)) for name, row in named]
    return [f"  {name:>16}  largest effect {float(best):+.3f}, layer {int(at)}" for name, (best, at) in found]
