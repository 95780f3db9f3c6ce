"""Numbers of things are in the singular where there is one."""

import laws
import tiny

import tl_factedit as fe
from tl_factedit.core.words import counted


def test_one_is_singular_and_all_else_plural():
    assert [counted(n, "fact") for n in (0, 1, 2)] == ["0 facts", "1 fact", "2 facts"]


def test_a_population_of_one_says_so(kind):
    model = tiny.model(kind, "gpt2")
    population = fe.Population.of(model, model, laws.FACT, reference=[laws.OTHER])
    assert repr(population).startswith("Population(1 fact under ") and "1 reference)" in repr(population)
