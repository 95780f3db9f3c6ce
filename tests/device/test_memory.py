"""What `memory` and ``batch_tokens`` are reckoned to take, against the most that the device held, within 30 %."""

import gc
import warnings

import laws
import pytest
import second_device
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend.memory import GIB, NUMBER, graph_bytes, logits_bytes, pass_bytes, past_bytes
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.editing.descent import FitRows
from tl_factedit.measure.likelihood import log_probs

second_device.install_or_skip()

WITHIN = 0.3
WHO = ("Anna", "Bob", "Mary", "John", "Alice", "Newton", "Rome", "Paris")
PROMPTS = ("{} was born in", "{} lives in the city of", "The home of {} is", "What is it ? {} is in")
FACTS = [laws.FACT.but(subject=who, prompt=prompt, id=f"{who}{prompt}") for prompt in PROMPTS for who in WHO]
SIZES = {"d_model": 128, "d_mlp": 512, "n_layers": 6, "std": 0.05}
"""Large enough that what doesn't grow with a pass is little of it."""
MANY = 4_000
"""More words, so that logits are most of what is taken."""


@pytest.fixture(
    params=[("gpt2", "float32"), ("llama", "float32"), ("gemma2", "bfloat16")], ids="-".join, scope="module"
)
def form(request):
    """An architecture and a type."""
    return request.param


@pytest.fixture(params=[0, MANY], ids=["few words", "many words"], scope="module")
def model(form, request):
    """On the device; nothing here changes it."""
    arch, dtype = form
    tok = tiny.tokenizer()
    tok.add_tokens([f"word{i}" for i in range(request.param)])
    hf = tiny.hf_model(arch, dtype=getattr(torch, dtype), tok=tok, **SIZES)
    return second_device.move_(tiny.around(hf, tok), "fakegpu:0")


def most(call):
    """Bytes on the device at once, beside what was there before."""
    module = torch.get_device_module("fakegpu")
    gc.collect()
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    return module.max_memory_allocated() - before


def test_a_trace_takes_its_memory(model):
    room = 0.016
    taken = most(lambda: fe.causal_trace(model, FACTS, memory=room, progress=False))
    assert room * GIB == pytest.approx(taken, rel=WITHIN)


def test_values_take_what_is_reckoned(model):
    fit, facts, layer = fe.ValueFit(steps=3, stop_below=0.0), FACTS[:8], 1
    rows = [FitRows.of(model, fe.editing.EditTarget(fact), laws.CONTEXTS, fit, True) for fact in facts]
    token, read, past = graph_bytes(model, layer + 1), logits_bytes(model), past_bytes(model)
    reckoned = sum(
        sum(each.queries) * token + sum(map(len, each.read)) * read + sum(map(len, each.rows)) * past for each in rows
    )
    how = {"fit": fit, "prepend_bos": True, "progress": False}
    taken = most(lambda: fe.editing.fit_values(model, facts, layer, laws.CONTEXTS, **how))
    assert reckoned == pytest.approx(taken, rel=WITHIN)


def test_statistics_take_their_sums_and_a_pass(model):
    tokens, layers, size = 1024, [1, 3], model.cfg.d_mlp
    how = {"n_tokens": 3 * tokens, "batch_tokens": tokens, "context": 64, "progress": False}
    taken = most(lambda: fe.key_stats(model, layers, laws.texts(100), **how))
    itemsize = model.W_E.element_size()
    keys = tokens * size * (itemsize * len(layers) + 8)  # as they are, and of one layer in float64
    reckoned = len(layers) * 8 * size**2 + max(tokens * pass_bytes(model) + tokens * size * itemsize, keys)
    assert reckoned == pytest.approx(taken, rel=WITHIN)


def test_passes_of_scores_take_what_a_token_and_a_logit_are_reckoned_with(model):
    draw = torch.Generator().manual_seed(0)
    rows, length, reach = 64, 24, 2
    requests = [
        (torch.randint(4, 100, (length - 1,), generator=draw), torch.randint(4, 100, (reach,), generator=draw))
        for _ in range(rows)
    ]

    def run():
        with frozen(model), torch.no_grad():
            log_probs(Runner(model), requests, batch_tokens=100_000)

    of_logits = rows * reach * (2 * NUMBER + model.W_E.element_size()) * model.cfg.d_vocab
    reckoned = max(rows * length * pass_bytes(model), of_logits)  # first the blocks, then the logits
    assert reckoned == pytest.approx(most(run), rel=WITHIN)
