"""What the unedited model can spare: the theorem, where it holds and where its premise is broken, and the support."""

import laws
import pytest
import tiny
import torch
from attacking_facts import known_facts

import tl_factedit as fe
from tl_factedit.attacks import Cell, Silencing, redundancy
from tl_factedit.core.estimate import Estimate


@pytest.fixture(scope="module")
def setting(kind):
    """A model, facts that it knows, and references of their relation."""
    model = tiny.model(kind, "gpt2")
    facts = [fact.but(relation="r") for fact in known_facts(model)]
    one = facts[0]
    people = ("Anna", "Bob", "Mary", "John", "Alice", "Einstein", "Newton")
    bare = one.but(paraphrases=(), neighbours=(), neighbour_targets=())
    return model, [one], [bare.but(subject=who, id=who) for who in people]


CELLS = (Cell("mlp", 1, "all"), Cell("mlp", 2, "all"))


def silenced(model, changed, facts, reference, cells):
    """Readings of both models without some cells, by the unedited model's means: the theorem's two sides."""
    asking = fe.attacks.KnockOut(cells=[cells], components=("mlp",), places=("last",), resample=False)
    population = fe.Population.of(model, changed, facts, reference=reference, progress=False)
    found = asking(population)
    return found.before.at(case=Silencing(cells)), found.after.at(case=Silencing(cells))


def test_a_model_changed_in_some_cells_only_is_the_unedited_one_without_them(setting):
    model, facts, reference = setting
    edit = fe.Rome(fe.KeyStats.identity(model, 2), fit=laws.QUICK, contexts=("",), progress=False)(model, facts)
    asking = fe.attacks.KnockOut(means_of="unedited", cells=[CELLS], resample=False)
    population = fe.Population.of(model, edit, facts, reference=reference, progress=False)
    with laws.untouched(model):
        found = asking(population)

    def apart(layer):
        key = Silencing((Cell("mlp", layer, "all"),))
        return float((found.before.at(case=key) - found.after.at(case=key)).abs().max())

    # What is left is what the edit writes before the subject, at BOS: the share that isn't covered.
    cover = float(found.extra["cover"][found.keys.index(Silencing((Cell("mlp", 2, "all"),)))])
    assert 0.8 < cover < 1 and apart(2) < apart(1) / 5


def test_by_its_means_alone_the_theorem_is_exact_and_fails_where_its_premise_is_broken(setting):
    model, facts, reference = setting
    routed = fe.Router(1, radius=0.01, fit=laws.QUICK, contexts=("",), progress=False)(model, facts)
    cells = (Cell("mlp", 1, "subject"),)
    before, after = silenced(model, routed, facts, reference, cells)
    assert torch.equal(before, after)
    elsewhere = silenced(model, routed, facts, reference, (Cell("mlp", 2, "subject"),))
    assert not torch.equal(*elsewhere)  # the premise broken: it writes outside what is silenced


def test_what_is_spared_is_what_a_knock_out_of_the_model_itself_keeps(setting):
    model, facts, reference = setting
    with laws.untouched(model):
        found = redundancy(model, facts, reference, cells=[CELLS], progress=False)
    knocked = fe.attacks.KnockOut(cells=[CELLS], resample=False)(
        fe.Population.of(model, model, facts, reference=reference, progress=False)
    )
    assert len(found.silenced) == 4 * 2 * 3 + 1 and bool(found.known.all())
    for cells in found.silenced:
        kept = knocked.before.at(case=Silencing(cells), quantity="old_first")
        assert torch.equal(found.named[:, found.silenced.index(cells)], kept)
        assert found.spared(cells).mean == float(kept.mean())
        expected = found.expected(cells)
        assert expected.label == ("INSERTED (elsewhere)" if float(kept.mean()) >= 0.5 else "any")
    table = found.table()
    assert len(table) == len(found.silenced) and set(table.at_best) <= {"INSERTED (elsewhere)", "any"}
    with pytest.raises(ValueError, match="wasn't silenced, needed one of the sets"):
        found.spared([Cell("mlp", 0, "all"), Cell("attn", 3, "all")])


def test_the_support_kills_the_facts_and_none_of_its_cells_is_too_many(kind):
    model = fe.models.organism(kind)
    facts = fe.models.organism_facts("city", "oracle0", 20)
    reference = fe.models.organism_facts("city", "calibration", 40)
    found = redundancy(model, facts, reference, places=("all",), progress=False)
    assert found.support == (Cell("mlp", 0, "all"),)
    again = redundancy(model, facts, reference, places=("all",), cells=[found.support], support=False, progress=False)
    assert again.spared(found.support).mean <= 0.1 and again.support is None
    for cell in found.support:
        rest = [other for other in found.support if other != cell]
        if rest:
            fewer = redundancy(model, facts, reference, cells=[rest], support=False, progress=False)
            assert fewer.spared(rest).mean > 0.1
    # ROME's layers can be spared: that an edit of them is an override is known before it is made.
    assert isinstance(found.spared([Cell("mlp", 1, "all")]), Estimate)
    assert found.expected([Cell("mlp", 1, "all")]).label == "INSERTED (elsewhere)"
    assert "support: " in repr(found) and found.curve[-1][1] <= 0.1


def test_too_few_cells_find_no_support_and_that_is_said(kind):
    model = fe.models.organism(kind, "base")
    facts = fe.models.organism_facts("city", "oracle0", 10)
    reference = fe.models.organism_facts("city", "calibration", 20)
    found = redundancy(model, facts, reference, components=("attn",), places=("last",), most_cells=0, progress=False)
    assert found.support is None and "no support found" in repr(found)
