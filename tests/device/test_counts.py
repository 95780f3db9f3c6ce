"""How often the host waits for the device: not once for each fact."""

import laws
import pytest
import second_device
import tiny

import tl_factedit as fe
from tl_factedit.backend.fingerprint import fingerprint

second_device.install_or_skip()

PEOPLE = [laws.FACT.but(subject=who, id=who) for who in ("Anna", "Bob", "Mary", "John", "Alice", "Newton")]
STEPS = 12


@pytest.fixture(scope="module")
def model():
    return second_device.move_(tiny.bridge("gpt2"), "fakegpu:0")


def waits(call):
    """Numbers and tensors that the host waits for."""
    with second_device.watch() as seen:
        call()
    return seen.count["sync"] + seen.count["d2h"]


def fitted(model, facts, steps=STEPS):
    fit = fe.ValueFit(steps=steps, stop_below=0.0)
    return lambda: fe.editing.fit_values(model, facts, 2, ("",), fit=fit, prepend_bos=True, progress=False)


def test_a_step_of_a_value_fit_waits_once_for_all_facts(model):
    few, many = (waits(fitted(model, PEOPLE[:n])) for n in (1, 6))
    assert few == many
    assert waits(fitted(model, PEOPLE, steps=2 * STEPS)) - many == STEPS


def test_a_step_of_fine_tuning_waits_once_for_all_facts(model):
    def tuned(n, steps):
        return lambda: fe.FineTune(1, steps=steps, stop_below=0.0, progress=False)(model, PEOPLE[:n])

    # A plain pass of transformers waits once itself, as it looks at the mask.
    for n in (1, 6):
        assert waits(tuned(n, 2 * STEPS)) - waits(tuned(n, STEPS)) == 2 * STEPS


def test_a_fingerprint_fetches_small_parameters_together(model):
    assert waits(lambda: fingerprint(model)) == len(model.blocks) + 1
