"""`memory=None`: a share of what is free where the model is."""

from types import SimpleNamespace

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.backend import free, memory
from tl_factedit.backend.memory import GIB, budget
from tl_factedit.locate.inputs import TraceInputs

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def model():
    return tiny.bridge("gpt2")


def test_a_number_is_taken_as_it_is(model):
    assert budget(model, 3.0) == 3.0
    for bad in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="or None for a share"):
            budget(model, bad)


def test_none_is_a_share_of_what_is_free(model, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 8 * GIB)
    assert budget(model, None) == 8 * memory.SHARE_OF_RAM
    monkeypatch.setattr(memory, "free_bytes", lambda devices: None)
    assert budget(model, None) == memory.UNKNOWN


def test_what_the_machine_has_free_is_read(model):
    free_now = free.free_bytes([CPU])
    assert free_now is not None and free_now > 1 << 26
    assert 0 < budget(model, None) < free_now / GIB


def test_a_container_may_take_less_than_the_machine_has(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(free, "GROUP", tmp_path)
    assert free.free_bytes([CPU]) == 2_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free.free_bytes([CPU]) > 2_000_000


def test_what_a_gpu_has_left_and_what_pytorch_reserved_for_nothing_is_free(monkeypatch):
    cuda = SimpleNamespace(
        mem_get_info=lambda where: ((10 - 3 * where.index) * GIB, 80 * GIB),
        memory_reserved=lambda where: 5 * GIB,
        memory_allocated=lambda where: 3 * GIB,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda where: cuda)
    assert free.free_bytes([GPU]) == 12 * GIB
    assert free.free_bytes([GPU, torch.device("cuda", 1), GPU]) == 9 * GIB  # the fullest


@pytest.mark.parametrize(
    "call",
    [
        lambda model, room: fe.causal_trace(model, laws.FACT, memory=room, progress=False).effect,
        lambda model, room: fe.locate.trace_units(model, laws.FACT, layers=[1], memory=room, progress=False).effect,
        lambda model, room: fe.FineTune(1, steps=2, memory=room, progress=False)(model, [laws.FACT]).deltas[0].right,
        lambda model, room: (
            fe.KnowledgeNeurons(steps=2, layers=[1], share=0.0, memory=room, progress=False)(model, [laws.FACT])
            .deltas[0]
            .right
        ),
        lambda model, room: (
            fe.editing.fit_values(
                model, [laws.FACT], 1, ("",), fit=fe.ValueFit(steps=2), prepend_bos=True, memory=room, progress=False
            )[0].delta
        ),
    ],
    ids=["causal_trace", "trace_units", "FineTune", "KnowledgeNeurons", "fit_values"],
)
def test_calls_take_none(model, call):
    torch.testing.assert_close(call(model, None), call(model, 2.0), atol=1e-5, rtol=1e-5, equal_nan=True)


def test_what_is_free_sets_the_size_of_batches(model, monkeypatch):
    asked = []
    plain = TraceInputs.chunks

    def chunks(self, *args, **options):
        asked.append(options["memory"])
        return plain(self, *args, **options)

    monkeypatch.setattr(TraceInputs, "chunks", chunks)
    monkeypatch.setattr(memory, "free_bytes", lambda devices: GIB)
    fe.causal_trace(model, laws.FACT, memory=None, progress=False)
    assert asked == [memory.SHARE_OF_RAM]
