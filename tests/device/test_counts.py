"""How often the host waits for the device: not once for each fact."""

import warnings

import laws
import pytest
import second_device
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend import hashing
from tl_factedit.backend.fingerprint import fingerprint
from tl_factedit.backend.memory import GIB, budget

second_device.install_or_skip()

PEOPLE = [laws.FACT.but(subject=who, id=who) for who in ("Anna", "Bob", "Mary", "John", "Alice", "Newton")]
STEPS = 12
QUICK = {"fit": fe.ValueFit(steps=3), "contexts": ("",), "progress": False}


@pytest.fixture(scope="module")
def model():
    return second_device.move_(tiny.bridge("gpt2"), "fakegpu:0")


def waits(call):
    """Numbers and tensors that the host waits for."""
    with second_device.watch() as seen:
        call()
    return seen.count["sync"] + seen.count["d2h"]


def fitted(model, facts, steps=STEPS, **how):
    fit = fe.ValueFit(steps=steps, stop_below=0.0, **how)
    return lambda: fe.editing.fit_values(model, facts, 2, ("",), fit=fit, prepend_bos=True, progress=False)


@pytest.mark.parametrize("method", [fe.editing.AdamSteps(), fe.editing.LineSearch()], ids=["adam", "lines"])
def test_a_step_of_a_value_fit_waits_once_for_all_facts(model, method):
    few, many = (waits(fitted(model, PEOPLE[:n], method=method)) for n in (1, 6))
    assert few == many
    assert waits(fitted(model, PEOPLE, steps=2 * STEPS, method=method)) - many == STEPS


def test_a_step_of_fine_tuning_waits_once_for_all_facts(model):
    def tuned(n, steps):
        return lambda: fe.FineTune(1, steps=steps, stop_below=0.0, progress=False)(model, PEOPLE[:n])

    # A plain pass of transformers waits once itself, as it looks at the mask.
    for n in (1, 6):
        assert waits(tuned(n, 2 * STEPS)) - waits(tuned(n, STEPS)) == 2 * STEPS


def test_a_fingerprint_fetches_a_few_numbers_once(model):
    with second_device.watch() as seen:
        found = fingerprint(model)
    assert seen.count["sync"] + seen.count["d2h"] == 1
    assert seen.bytes["d2h"] <= 16 * len(list(model.parameters()))  # of less than 4 MB each
    assert found == fingerprint(tiny.bridge("gpt2"))


def test_an_audit_reads_the_weights_once(model, monkeypatch):
    read, tensors = [], hashing.sums

    def reading(weights):
        read.append(sum(weight.numel() for weight in weights))
        return tensors(weights)

    edits = [fe.Rome(fe.KeyStats.identity(model, 1), ridge=1e-2, **QUICK)(model, [fact]) for fact in PEOPLE[:2]]
    monkeypatch.setattr("tl_factedit.backend.fingerprint.sums", reading)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fe.audit(model, edits, PEOPLE[:2], progress=False)
    whole = sum(param.numel() for param in model.parameters())
    assert len(read) > 8 and sum(read) < 2 * whole


def test_what_is_free_is_asked_of_the_device(model):
    free, all_of_it = torch.get_device_module("fakegpu").mem_get_info()
    assert free < all_of_it
    assert 0.49 * free < budget(model, None) * GIB < 0.51 * free
