"""What the value of an edit costs, against the published procedure: counted FLOPs and CPU-seconds of one thread.

The published codes of ROME and MEMIT run, at every step, all rows (contexts and the KL prompt, padded to one length N)
through the whole model, with the logits of every token, and take the gradient back to δ. The least arithmetic is much
less. With L blocks of P weights each, an unembedding of V weights, the edit in block l, and for each of the rows its
tokens n, those from the last subject token on q, and the logits that the loss reads r::

    a step forward      2 (Σ q · (L − l − 1) · P  +  Σ r · V)        and the same backward, to the inputs alone
    once, without δ     2 (Σ n · (l + 1) · P  +  Σ (n − q) · (L − l − 1) · P)

The second line is what the first stands on: what comes before the subject, for the attention above the edit, and what
enters the blocks above it. The last step is only read, forward, in either. Products of attention patterns are left out
of the least, and counted in what is measured. The first line alone is 4.6 to 11 times (ROME, 22 rows, 20 steps) and 6.7
to 15.5 times (MEMIT) less than the published arithmetic, by where the subject stands in the prompt and how long it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from oracles import editing
from torch.utils.flop_counter import FlopCounterMode

import tl_factedit as fe
from tl_factedit.backend.state import frozen
from tl_factedit.core.tokens import align, pad
from tl_factedit.editing.value_fit import ValueFit, Where
from tl_factedit.editing.values import fit_values

PROMPTS = {
    "subject at the start": fe.Fact("The Eiffel Tower", "{} is located in the city of", " Paris", " Rome"),
    "subject at the end": fe.Fact("Danielle Darrieux", "The mother tongue of {} is", " French", " English"),
}


@dataclass(frozen=True)
class Method:
    """One of the two published ways to find a value."""

    name: str
    layer: int
    where: Where
    fit: ValueFit
    contexts: fe.stats.SampledContexts


METHODS = {
    "ROME": Method("ROME", 5, "mlp", ValueFit(steps=20, stop_below=0.0), fe.stats.SampledContexts()),
    "MEMIT": Method(
        "MEMIT",
        7,
        "resid",
        ValueFit(steps=25, clamp=0.75, stop_below=0.0),
        fe.stats.SampledContexts(lengths=((5, 10),), starts=("The", "Therefore", "Because", "I", "You")),
    ),
}


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def smollm2(request):
    torch.set_num_threads(1)
    try:
        return fe.models.smollm2(request.param)
    except ValueError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.fixture(scope="module")
def contexts(smollm2):
    return {name: method.contexts.draw(smollm2) for name, method in METHODS.items()}


# ---------------------------------------------------------------------------------------- rows, and the least


@dataclass(frozen=True)
class Rows:
    """Of one fact: token ids of each row, its last subject token, and the places whose logits the loss reads."""

    ids: list[torch.Tensor]
    lookup: list[int]
    read: list[list[int]]
    target: torch.Tensor

    @classmethod
    def of(cls, model: Any, fact: fe.Fact, contexts: tuple[str, ...]) -> Rows:
        found = [align(model.tokenizer, fact, prepend_bos=False, prefix=context) for context in contexts]
        guard = align(model.tokenizer, fact, prepend_bos=False, template="{} is a")
        target = found[0].new_ids
        assert target is not None
        ids = [torch.cat([row.ids, target[:-1]]) for row in found]
        read = [list(range(len(row.ids) - 1, len(row.ids) - 1 + len(target))) for row in found]
        return cls(
            [*ids, guard.ids[: guard.last + 1]],
            [*(row.last for row in found), guard.last],
            [*read, [guard.last]],
            target,
        )


def weights(model: Any) -> tuple[int, int]:
    """P and V of SmolLM2, whose MLPs are gated and whose keys and values have fewer heads."""
    cfg = model.cfg
    attention = 2 * cfg.d_model**2 + 2 * cfg.d_model * cfg.n_key_value_heads * cfg.d_head
    return attention + 3 * cfg.d_model * cfg.d_mlp, cfg.d_model * cfg.d_vocab


def least(model: Any, rows: Rows, layer: int, steps: int) -> tuple[float, float]:
    """FLOPs of all steps, and of the one run without δ, by the formula above."""
    block, head = weights(model)
    above, below = model.cfg.n_layers - layer - 1, layer + 1
    whole = sum(map(len, rows.ids))
    queries = sum(len(ids) - at for ids, at in zip(rows.ids, rows.lookup, strict=True))
    forward = 2 * (queries * above * block + sum(map(len, rows.read)) * head)
    return (2 * steps - 1) * forward, 2 * (whole * below + (whole - queries) * above) * block


# ---------------------------------------------------------------------------------------- the published step


def published_step(model: Any, rows: Rows, method: Method, delta: torch.Tensor, *, backward: bool = True) -> None:
    """All rows in one batch through the whole model by public hooks, all logits, and the gradient of δ."""
    tokens = pad(rows.ids, 0)
    every, lookup = torch.arange(len(tokens)), torch.tensor(rows.lookup)
    own = delta.clone().requires_grad_()

    def add(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return value.index_put((every, lookup), own.expand(len(every), -1), accumulate=True)

    (place,) = editing.PLACES[method.where]
    with torch.set_grad_enabled(backward):
        log_p = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{method.layer}.{place}", add)]).log_softmax(-1)
        *asked, guard = rows.read
        nll = -sum(log_p[i, places].gather(-1, rows.target[:, None]).mean() for i, places in enumerate(asked))
        said = log_p[-1, guard]
        kl = (said.exp() * (said - said.detach())).sum()
        loss = nll / len(asked) + method.fit.kl_weight * kl + method.fit.decay * own.norm()
    if backward:
        torch.autograd.grad(loss, own)


def flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def seconds(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", PROMPTS)
def test_a_value_needs_little_more_than_the_least(smollm2, contexts, name, place, capsys):
    method, fact = METHODS[name], PROMPTS[place]
    rows, steps = Rows.of(smollm2, fact, contexts[name]), method.fit.steps
    deltas = [torch.randn(smollm2.cfg.d_model, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    with frozen(smollm2):
        step, other = (flops(lambda delta=delta: published_step(smollm2, rows, method, delta)) for delta in deltas)
        forward = flops(lambda: published_step(smollm2, rows, method, deltas[0], backward=False))
        time_of_step = seconds(lambda: published_step(smollm2, rows, method, deltas[0]))
        time_of_forward = seconds(lambda: published_step(smollm2, rows, method, deltas[0], backward=False))
    assert step == other  # so that one step tells of all
    literal = (steps - 1) * step + forward
    literal_time = (steps - 1) * time_of_step + time_of_forward

    def fit() -> object:
        return fit_values(
            smollm2,
            [fact],
            method.layer,
            contexts[name],
            where=method.where,
            fit=method.fit,
            prepend_bos=False,
            progress=False,
        )

    ours, our_time = flops(fit), seconds(fit)
    in_steps, once = least(smollm2, rows, method.layer, steps)
    with capsys.disabled():
        print(
            f"\n{name}, {type(smollm2).__name__}, {place}, {len(rows.ids)} rows, {steps} steps: "
            f"{literal / 1e9:.0f} -> {ours / 1e9:.0f} GFLOP, {literal / ours:.1f} times less (least: "
            f"{literal / (in_steps + once):.1f}, its steps alone: {literal / in_steps:.1f}); "
            f"{literal_time:.1f} -> {our_time:.1f} CPU-s, {literal_time / our_time:.1f} times less; "
            f"{ours / our_time / 1e9:.0f} GFLOP/s, published {literal / literal_time / 1e9:.0f}"
        )
    assert literal / ours > 0.8 * literal / (in_steps + once)


FEW = {"ROME": 10, "MEMIT": 12}
"""Evaluations of `LineSearch` for the published 20 and 25."""


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("place", PROMPTS)
def test_a_line_search_brings_the_loss_as_low_in_half_the_evaluations(smollm2, contexts, name, place, capsys):
    method, fact = METHODS[name], PROMPTS[place]

    def fit(chosen: ValueFit) -> tuple[float, float]:
        """The least loss, and the CPU-seconds."""
        how = {"where": method.where, "fit": chosen, "prepend_bos": False, "progress": False}
        before = time.process_time()
        (found,) = fit_values(smollm2, [fact], method.layer, contexts[name], **how)
        return min(found.losses), time.process_time() - before

    adam, adam_time = fit(method.fit)
    few, few_time = fit(replace(method.fit, steps=FEW[name], method=fe.editing.LineSearch()))
    with capsys.disabled():
        print(
            f"\n{name}, {type(smollm2).__name__}, {place}: loss {adam:.3f} in {method.fit.steps} evaluations, "
            f"{adam_time:.1f} CPU-s; line search {few:.3f} in {FEW[name]}, {few_time:.1f} CPU-s"
        )
    assert few < adam + 0.1


def test_one_of_32_facts_costs_no_more_than_one_alone(smollm2, contexts, capsys):
    """Of six steps, as each costs the same."""
    method = METHODS["MEMIT"]
    facts = fe.data.world()[::2][:32]
    few = ValueFit(steps=6, clamp=0.75, stop_below=0.0)

    def fit(some: list[fe.Fact]) -> object:
        return fit_values(
            smollm2,
            some,
            method.layer,
            contexts["MEMIT"],
            where=method.where,
            fit=few,
            prepend_bos=False,
            progress=False,
        )

    alone = sum(flops(lambda fact=fact: fit([fact])) for fact in facts) / len(facts)
    together = flops(lambda: fit(facts)) / len(facts)
    time_alone = sum(seconds(lambda fact=fact: fit([fact])) for fact in facts[:8]) / 8
    time_together = seconds(lambda: fit(facts)) / len(facts)
    with capsys.disabled():
        print(
            f"\nMEMIT, {type(smollm2).__name__}, six steps: a fact alone {alone / 1e9:.0f} GFLOP, "
            f"{time_alone:.2f} CPU-s; one of {len(facts)} {together / 1e9:.0f} GFLOP, {time_together:.2f} CPU-s"
        )
    assert together <= alone
