"""A file tells a metric from others by its code and by all that its code refers to."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import tl_factedit as fe
from tl_factedit.locate.metrics import identity

HEAD = """
import math
import torch
import tl_factedit as fe
import helpers
from math import tau

K = 2.0
TABLE = {"a": [1, 2], "b": torch.ones(2)}

def helper(x):
    return x * K

def again(n):
    return again(n - 1) if n else 0

def uses_number(logits, asked):
    return logits[:, :, 0, 0].float() * K

def uses_helper(logits, asked):
    return helper(logits[:, :, 0, 0])

def uses_inner(logits, asked):
    return sum([K for _ in range(2)]) * logits[:, :, 0, 0]

def uses_tensor(logits, asked):
    return TABLE["b"].sum() * logits[:, :, 0, 0]

def uses_module(logits, asked):
    return helpers.scale(logits[:, :, 0, 0])

def uses_import(logits, asked):
    from helpers import scale
    return scale(logits[:, :, 0, 0])

def uses_default(logits, asked, table=TABLE):
    return table["b"][0] * logits[:, :, 0, 0]

def uses_packages(logits, asked):
    return fe.locate.metrics.prob(logits, asked) * math.sqrt(tau) * torch.softmax(torch.ones(1), -1) * again(2)

def uses_all_of_a_module(logits, asked):
    return vars(helpers)["N"] * logits[:, :, 0, 0]

def uses_an_object(logits, asked):
    return THING.k * logits[:, :, 0, 0]
"""
CHANGES = {
    "uses_number": ("K = 2.0", "K = 5.0"),
    "uses_helper": ("K = 2.0", "K = 5.0"),
    "uses_inner": ("K = 2.0", "K = 5.0"),
    "uses_tensor": ("torch.ones", "torch.zeros"),
    "uses_default": ("torch.ones", "torch.zeros"),
}


@pytest.fixture
def helpers(monkeypatch):
    module = ModuleType("helpers")
    exec("N = 3\ndef scale(x):\n    return x * N", vars(module))
    monkeypatch.setitem(sys.modules, "helpers", module)
    return module


def metric(name: str, source: str = HEAD, **given):
    space = {"__name__": "of_a_user", **given}
    exec(source, space)
    return space[name]


@pytest.mark.parametrize("name", CHANGES)
def test_another_value_of_what_it_refers_to_makes_it_another(helpers, name):
    here = identity(metric(name))
    assert here == identity(metric(name)) and " at 0x" not in here
    assert here != identity(metric(name, HEAD.replace(*CHANGES[name])))


@pytest.mark.parametrize("name", ["uses_module", "uses_import"])
def test_what_it_takes_of_a_module_of_ones_own_counts(helpers, name):
    here = identity(metric(name))
    assert here == identity(metric(name))
    helpers.N = 4
    assert here != identity(metric(name))


def test_what_it_doesnt_refer_to_doesnt_count(helpers):
    others = HEAD.replace("K = 2.0", "K = 5.0")
    assert identity(metric("uses_tensor")) == identity(metric("uses_tensor", others))


def test_packages_stand_for_themselves(helpers):
    assert identity(metric("uses_packages")) == identity(metric("uses_packages"))
    assert math.isfinite(math.tau) and fe.locate.metrics.prob.__name__ in identity(metric("uses_packages"))


@pytest.mark.parametrize(
    ("name", "what"),
    [("uses_all_of_a_module", "helpers is a module"), ("uses_an_object", "THING is a SimpleNamespace")],
)
def test_what_cannot_be_told_apart_is_refused(helpers, name, what):
    with pytest.raises(ValueError, match=f"{what}, of which a file can't tell one from another"):
        identity(metric(name, THING=SimpleNamespace(k=torch.ones(1))))
