"""What a trace costs, against the literal loop over cells: counted FLOPs and CPU-seconds of one thread, in one run.

The least arithmetic of a trace is written down in docs/locate.md. For the two prompts here it is, by that count, 12.8
and 4.5 times less than that of the published code (10 and 3.4 times for windows of ten layers).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from oracles import tracing
from torch.utils.flop_counter import FlopCounterMode

import tl_factedit as fe
from tl_factedit.core.tokens import align

PROMPTS = {
    "6 tokens": fe.Fact("Roman Republic", "The capital of {} is", " Rome"),
    "8 tokens": fe.Fact("Gambia River", "{} belongs to the continent of", " Africa"),
}
LEAST = {("6 tokens", 1): 12.8, ("8 tokens", 1): 4.5, ("6 tokens", 10): 10.0, ("8 tokens", 10): 3.4}


@dataclass
class Cost:
    flops: float
    seconds: float


def cost(run: Callable[[], object]) -> Cost:
    """Counted and timed apart: counting takes time itself."""
    with FlopCounterMode(display=False) as counter:
        run()
    before = time.process_time()
    run()
    return Cost(counter.get_total_flops(), time.process_time() - before)


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def smollm2(request):
    torch.set_num_threads(1)
    try:
        return fe.models.smollm2(request.param)
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.mark.parametrize(("component", "window"), [("resid", 1), ("mlp", 10)])
@pytest.mark.parametrize("length", PROMPTS)
def test_a_trace_needs_little_more_than_the_least(smollm2, length, component, window, capsys):
    fact = PROMPTS[length]
    row = align(smollm2.tokenizer, fact, prepend_bos=False)
    asked = tracing.TracedPrompt(row.ids, row.subject, row.true_ids)
    options = {"answer": "object", "unknown": "trace", "progress": False}  # the object's tokens, as the loop has them
    trace = fe.locate.meng2022(smollm2, fact, component, **options)
    noise = trace.corruption.noise(row.subject[1] - row.subject[0], smollm2.cfg.d_model).float()
    ours = cost(lambda: fe.locate.meng2022(smollm2, fact, component, **options))
    # One run of the loop, as it takes a minute: its FLOPs are counted on one of its layers, which cost the same each.
    before = time.process_time()
    loop = tracing.trace(smollm2, asked, noise, component=component, window=window)
    literal = Cost(0, time.process_time() - before)
    cache = tracing.clean_cache(smollm2, asked, [f"blocks.0.{tracing.HOOK[component]}"])
    with FlopCounterMode(display=False) as counter:
        tracing.restored(smollm2, asked, noise, component, [0], 0, cache)
    literal.flops = counter.get_total_flops() * smollm2.cfg.n_layers * len(row.ids)
    least = LEAST[length, window]
    arithmetic, seconds = literal.flops / ours.flops, literal.seconds / ours.seconds
    with capsys.disabled():
        print(
            f"\ntrace, {type(smollm2).__name__}, {length}, {component} window {window}: "
            f"{literal.flops / 1e9:.0f} -> {ours.flops / 1e9:.0f} GFLOP, {arithmetic:.1f} times less; "
            f"{literal.seconds:.1f} -> {ours.seconds:.1f} CPU-s, {seconds:.1f} times less (least: {least:g})"
        )
    # What a trace says is the mean over samples; a sample's own float32 rounding reaches 1e-5.
    assert (trace.sample_effect[0] - loop.effect).mean(-1).abs().max() < 1e-5
    assert arithmetic > 0.8 * least


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_many_facts_cost_no_more_for_each_than_one_alone(kind, capsys):
    torch.set_num_threads(1)
    try:
        model = fe.models.organism(kind)
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])
    facts = fe.models.organism_facts("city", "calibration", 200)

    def seconds(run: Callable[[], object]) -> float:
        before = time.process_time()
        run()
        return time.process_time() - before

    alone = sum(seconds(lambda fact=fact: fe.causal_trace(model, fact, progress=False)) for fact in facts[:20]) / 20
    each = seconds(lambda: fe.causal_trace(model, facts, progress=False)) / len(facts)
    with capsys.disabled():
        print(f"\n{kind}: a fact alone {alone:.3f} CPU-s, one of 200 {each:.3f} CPU-s ({alone / each:.1f} times less)")
    assert each <= alone
