"""A device that has no memory left for a pass: it is made in halves, which changes nothing but that it is said."""

import warnings
from types import SimpleNamespace

import laws
import pytest
import test_surroundings as table
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend.halving import halving, is_out_of_memory, that_fit
from tl_factedit.backend.runner import Runner

# ---------------------------------------------------------------------------------------- the mechanism


def run(attempts, room, cost=len, error=None):
    """What was run, for how much there is room."""
    done = []
    for attempt in attempts:
        with attempt as some:
            if cost(some) * attempt.share > room:
                raise error or torch.OutOfMemoryError("CUDA out of memory")
            done.append(some)
    return done


def test_what_has_room_is_run_as_it_was_asked_for(recwarn):
    assert run(that_fit([3, 1, 2], 6), 99) == [[1, 2], [0]]
    assert run(that_fit([], 6), 0) == []
    assert not recwarn


def test_a_group_without_room_is_halved_and_those_that_follow_too_and_it_is_said_once():
    groups = [list(range(8)), list(range(8, 16)), [16, 17]]
    with pytest.warns(UserWarning, match=r"out of memory with 8 rows: went on with 2; ask for fewer") as said:
        done = run(halving(iter(groups), len, "rows", "fewer"), 3)
    assert done == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15], [16, 17]]
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore:out of memory")
def test_one_alone_without_room_is_an_error_that_says_what_to_do():
    with pytest.raises(torch.OutOfMemoryError, match=r"with 9 tokens in one pass, of one alone: free memory.*CUDA out"):
        run(that_fit([2, 9], 100), 8, cost=lambda some: 9 if 1 in some else 2)


def test_one_alone_may_go_on_in_smaller_passes():
    with pytest.warns(UserWarning, match=r"went on with 1, in passes of 0\.25 of the size; ask for less"):
        assert run(halving([[0]], len, "facts", "less", least=0.25), 0.3) == [[0]]
    with pytest.raises(torch.OutOfMemoryError):
        run(halving([[0]], len, "facts", "less", least=0.25), 0.2)


@pytest.mark.parametrize("error", [ValueError("out of order"), RuntimeError("sizes differ"), KeyboardInterrupt()])
def test_other_errors_come_out(error):
    with pytest.raises(type(error)):
        run(that_fit([1, 1], 2), 1, error=error)


def test_what_other_devices_say_is_known():
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(MemoryError("out of memory")) and not is_out_of_memory(RuntimeError("CUDA error"))


# ---------------------------------------------------------------------------------------- the calls

ROOM = 0.75
"""Of the largest pass that a call makes."""

NAMES = (
    "known", "causal_trace, replaced", "key_stats", "Memit", "compare", "evaluate", "attacks.KnockOut",
    "evaluation.dose_curve", "probes.Patchscope",
    "attacks.ReadOut", "attacks.ContextAttack", "attacks.Paraphrases", "evaluation.token_accuracy", "evaluation.drift",
    "evaluation.erasure_success", "probes.read_states", "FineTune", "attacks.Relearn", "attacks.DisjointRelearning",
    "attacks.Drift", "probes.train_tuned_lens", "probes.TunedLens.divergence",
)  # fmt: skip

LEARNING = {"FineTune": 1e-4, "attacks.Relearn": 1e-3, "probes.train_tuned_lens": 1e-3}
"""Gradients are summed in another order, which Adam's division makes more of."""

# Where the table asks one fact, which nothing can halve.
CALLS = {name: table.CALLS[name] for name in NAMES} | {
    "Rome.each": lambda w: w.rome.each(w.model, w.people[:4]),
    "causal_trace": lambda w: fe.causal_trace(w.model, w.people[:4], progress=False),
    "locate.trace_units": lambda w: fe.locate.trace_units(w.model, w.people[:4], layers=[table.LAYER], progress=False),
    "attacks.footprint": lambda w: fe.attacks.footprint(w.model, w.several, w.people[:4], progress=False),
    "evaluation.attribute_positions": lambda w: fe.evaluation.attribute_positions(table.crowded(w)),
    "evaluation.mediate": lambda w: fe.evaluation.mediate(table.crowded(w)),
    "evaluation.specificity": lambda w: fe.evaluation.specificity(
        table.crowded(w), [fact.but(prompt="{} is near") for fact in w.people[:4]]
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model = tiny.model(table.KIND, "gpt2", n_layers=3)
    model.cfg.model_name = "tiny"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = table.world_of(model)
    made.folder = tmp_path_factory.mktemp("world")
    return made


@pytest.fixture
def device(monkeypatch):
    """How large passes are, and how large they may be."""
    seen = SimpleNamespace(largest=0, room=float("inf"), refused=0)

    def limited(name):
        plain = getattr(Runner, name)

        def called(self, tokens, *args, **options):
            seen.largest = max(seen.largest, tokens.numel())
            if tokens.numel() > seen.room:
                seen.refused += 1
                raise torch.OutOfMemoryError("out of memory: made up")
            return plain(self, tokens, *args, **options)

        monkeypatch.setattr(Runner, name, called)

    for name in ("logits", "capture", "remember"):
        limited(name)
    return seen


@pytest.mark.parametrize("call", CALLS)
def test_a_call_without_room_gives_what_it_gives_with_room(call, world, device):
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        want = table.flat(CALLS[call](world))
    device.room = ROOM * device.largest
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = table.flat(CALLS[call](world))
    assert device.refused
    assert any("out of memory with" in str(each.message) for each in said)
    different = table.differences(want, found, LEARNING.get(call, 1e-5))
    # Hashes are of what was rounded in another order.
    assert [at for at in different if not at.endswith(("digest", ".changes"))] == []


def test_answers_without_room_are_those_with_room(world, monkeypatch):
    plain, rows = type(world.model).generate, []
    want = fe.answers(world.model, world.people, n_tokens=3, progress=False)

    def generate(self, tokens, **options):
        rows.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("out of memory: made up")
        return plain(self, tokens, **options)

    monkeypatch.setattr(type(world.model), "generate", generate)
    with pytest.warns(UserWarning, match="out of memory with .* tokens in one pass: went on .* a smaller batch_tokens"):
        found = fe.answers(world.model, world.people, n_tokens=3, progress=False)
    assert found.each == want.each and max(rows) > 2


def test_what_fine_tuning_has_no_room_for_is_halved_for_good(world, device):
    def tuned(steps):
        return fe.FineTune(table.LAYER, steps=steps, stop_below=0.0, progress=False)(world.model, world.people[:4])

    tuned(1)
    device.room, refused = ROOM * device.largest, []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for steps in (2, 6):
            before = device.refused
            tuned(steps)
            refused.append(device.refused - before)
    assert "out of memory with 4 facts at once: went on with 2; ask for less memory" in [str(s.message) for s in said]
    assert refused[0] == refused[1]  # not once a step


def test_a_fact_without_room_is_told(world, device):
    device.room = 3
    with pytest.raises(torch.OutOfMemoryError, match="of one alone: free memory on the device"):
        fe.evaluate(world.model, laws.FACT)
