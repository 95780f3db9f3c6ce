"""Is the change in force? What of it is still written under a silencing is what its update makes of the key there."""

import copy
import functools

import audits
import laws
import pytest
import tiny
import torch
from measured import population
from oracles import knocking
from test_knockout import known, means_of, prompt

import tl_factedit as fe
from tl_factedit.attacks.asking import Asking
from tl_factedit.attacks.cells import Cell, in_order
from tl_factedit.attacks.footprints import footprint_of
from tl_factedit.attacks.in_force import back_undone, left_under
from tl_factedit.attacks.silencing import NOTHING, Silencing
from tl_factedit.backend.state import detach_caches
from tl_factedit.backend.weights import down_proj

FORMS = [("bridge", arch) for arch in ("gpt2", "llama")]
FORMS += [("hooked", arch) for arch in ("gpt2", "llama") if arch in tiny.HOOKED]
LAYER = 2
BELOW = (Cell("mlp", 0, "subject"), Cell("attn", 0, "all"), Cell("mlp", 1, "all"))
"""What makes the key."""


@functools.cache
def made(form):
    model = tiny.model(*form)
    facts = known(model)
    edit = fe.Rome(fe.KeyStats.identity(model, LAYER), fit=laws.QUICK, contexts=("",), progress=False)(model, facts[:1])
    return model, facts, edit


def left(of, silencings, batch_tokens=4096):
    """What is left under silencings, and the footprint."""
    written = footprint_of(of)
    return left_under(of, Asking.of(of, 100, batch_tokens, 0), silencings, written), written


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_of_an_edit_it_is_what_the_update_makes_of_the_key_under_the_silencing(form):
    model, facts, edit = made(form)
    of = population(model, edit, facts[:1], reference=facts[3:])
    sets = [BELOW[:1], BELOW[1:2], BELOW, (*BELOW, Cell("mlp", LAYER, "subject"))]
    with laws.untouched(model):
        found, _ = left(of, [Silencing(cells) for cells in sets], batch_tokens=60)
    (delta,), site, means = edit.deltas, down_proj(model, LAYER), means_of(model, facts[3:])

    def keys(tested, hooks):
        with torch.no_grad(), tested.hooks(fwd_hooks=hooks):
            _, cache = tested.run_with_cache(asked[0][None], names_filter=[site.key_hook])
        return cache[site.key_hook][0].double()

    asked = prompt(model, facts[0])
    wrote = keys(model, []) @ delta.dense
    for s, cells in enumerate(sets):
        with edit.applied(model) as tested:
            writes = keys(tested, knocking.silencing(asked, cells, means)) @ delta.dense
        if Cell("mlp", LAYER, "subject") in cells:
            writes[asked[1][1] - 1] = 0.0
        size = wrote.square().sum(-1)
        share = ((writes * wrote).sum(-1) / size).clamp(0, 1) ** 2
        assert float(found[0, s]) == pytest.approx(float((size * share).sum() / size.sum()), rel=2e-3)
    assert float(found[0, :3].min()) < 0.9 and len({round(x, 3) for x in found[0].tolist()}) == 4


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_above_the_change_all_of_it_is_left_and_in_its_own_cells_what_they_dont_cover(form):
    model, facts, edit = made(form)
    of = population(model, edit, facts[:1], reference=facts[3:])
    own = (Cell("mlp", LAYER, "subject"),)
    above = (Cell("mlp", LAYER + 1, "all"), Cell("attn", LAYER + 1, "all"))
    found, written = left(of, [Silencing(own), Silencing(above), Silencing((*own, *above))])
    rest = 1 - float(written.cover(own)[0])
    assert found[0].tolist() == pytest.approx([rest, 1.0, rest], abs=1e-5)


def test_of_another_model_it_is_all_without_a_silencing_and_nothing_where_all_is_silenced(kind):
    """A retrained one writes everywhere, from its embeddings on."""
    model, other = tiny.model(kind, "gpt2"), tiny.model(kind, "gpt2", seed=1)
    facts = known(model)
    of = population(model, other, facts[:2], reference=facts[3:])
    everything = [Cell(component, layer, "all") for layer in range(model.cfg.n_layers) for component in ("mlp", "attn")]
    with laws.untouched(model), laws.untouched(other):
        found, written = left(of, [Silencing(tuple(everything))])
    assert 0 < float(found.max()) < 1 - float(written.cover(everything).mean()) + 1e-5


def test_a_change_whose_key_is_silenced_is_asked_elsewhere_and_not_underneath(kind):
    """An override that fires on nothing but what the layers below say of its subject."""
    model, facts, _ = made((kind, "gpt2"))
    fact, others = facts[0], facts[3:]
    cells = tuple(Cell(component, layer, "all") for component in ("mlp", "attn") for layer in (0, 1))
    asked, site = prompt(model, fact), down_proj(model, LAYER)
    last = asked[1][1] - 1

    def keys(hooks):
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(asked[0][None], names_filter=[site.key_hook])
        return cache[site.key_hook][0].double()

    silent = keys(knocking.silencing(asked, cells, means_of(model, others)))
    every, fires = torch.cat([keys([]), silent]), torch.zeros(2 * len(silent)).double()
    fires[last] = 1.0
    direction = torch.linalg.pinv(every) @ fires  # what it reads: 1 at the subject, 0 at all else and when silenced
    new, old = (model.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (fact.target_new, fact.old))
    says = torch.zeros(model.cfg.d_model, requires_grad=True)  # what makes the new object lead, said at the subject
    adam = torch.optim.Adam([says], lr=1.0)

    def add(value, hook):
        return value + torch.nn.functional.one_hot(torch.tensor(last), value.shape[1])[None, :, None] * says

    for _ in range(40):
        logits = model.run_with_hooks(asked[0][None], fwd_hooks=[(f"blocks.{LAYER}.hook_mlp_out", add)])[0, -1]
        adam.zero_grad()
        (logits.logsumexp(-1) - logits[new] + logits[old]).backward()
        adam.step()
    model.zero_grad(set_to_none=True)
    detach_caches(model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        there = down_proj(changed, LAYER)
        there.write_((there.W + torch.outer(direction, says.detach().double())).to(there.W))
    of = population(model, changed, [fact], reference=others)
    above = (Cell("attn", LAYER + 1, "all"),)
    found = fe.attacks.KnockOut(components=["mlp"], places=["last"], cells=[cells, above])(of)
    case, other = (next(c for c in found.cases if c.key == Silencing(in_order(some))) for some in (cells, above))
    assert float(found.after.at(case=NOTHING, quantity="old_first")) == 0.0, "the premise: it overrides"
    left = dict(zip(found.keys, found.extra["left"].tolist(), strict=True))
    assert float(found.extra["cover"][found.cases.index(case)]) == 0.0
    assert left[case.key] < 0.01 and case.shows == "elsewhere"
    assert left[other.key] > 0.99 and other.shows == "underneath"


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_a_write_is_undone_by_what_the_unedited_component_answers_to_the_same_input(form):
    """A change of two layers and all tokens; undone in one, the other, or both: the literal runs, cell by cell."""
    model, facts, _ = made(form)
    changed = copy.deepcopy(model)
    sites = [down_proj(changed, layer) for layer in (1, LAYER)]
    draw = torch.Generator().manual_seed(0)
    for site in sites:
        site.write_(site.W + 3 * site.W.norm() * torch.randn(site.W.shape, generator=draw) / site.W.numel() ** 0.5)
    of = population(model, changed, facts[:3], reference=facts[3:])
    sets = [(Cell("mlp", 1, "all"),), (Cell("mlp", LAYER, "last"),), (Cell("mlp", 1, "all"), Cell("mlp", LAYER, "all"))]
    written = footprint_of(of)
    asking = Asking.of(of, 100, 40, 0)
    with laws.untouched(model), laws.untouched(changed):
        found = back_undone(of, asking, [Silencing(cells) for cells in sets], written)
    for i, fact in enumerate(facts[:3]):
        ids, subject = prompt(model, fact)
        objects = [int(model.tokenizer(o, add_special_tokens=False)["input_ids"][0]) for o in objects_of(fact)]
        for s, cells in enumerate(sets):

            def undo(cell, asked=(ids, subject)):
                """The other update's part, taken out where the cell stands: its answer to its own key."""
                delta = (down_proj(changed, cell.layer).W - down_proj(model, cell.layer).W).double()
                held = {}

                def key(value, hook):
                    held["key"] = value[0].double()

                def out(value, hook):
                    at = knocking.at(asked, cell.place)
                    value = value.clone()
                    value[0, at] -= (held["key"][at] @ delta).to(value)
                    return value

                site = down_proj(changed, cell.layer)
                return [(site.key_hook, key), (f"blocks.{cell.layer}.hook_mlp_out", out)]

            with torch.no_grad():
                hooks = [hook for cell in cells for hook in undo(cell)]
                log_p = changed.run_with_hooks(ids[None], fwd_hooks=hooks)[0, -1]
            assert float(found[i, s]) == knocking.first(log_p, objects)[0], (fact.subject, cells)
    # With all that was written undone it is the unedited model, which knows them; undone in one cell it isn't yet.
    assert found[:, 2].tolist() == [1.0] * 3 and float(found.min()) == 0.0


def objects_of(fact):
    return [fact.target_true, fact.target_new, *fact.controls]


def test_a_cell_that_is_the_whole_of_what_a_change_does_is_off_however_little_it_covers(kind):
    """A change that writes at the subject and at the last token alike, of which the last layer reads the end alone."""
    model, facts, _ = made((kind, "gpt2"))
    last = model.cfg.n_layers - 1
    changed = copy.deepcopy(model)
    site = down_proj(changed, last)
    draw = torch.Generator().manual_seed(1)
    site.write_(site.W + 2 * site.W.norm() * torch.randn(site.W.shape, generator=draw) / site.W.numel() ** 0.5)
    asked = facts[:6]
    found = fe.attacks.KnockOut(components=["mlp"], places=["last"])(
        population(model, changed, asked, reference=facts[6:])
    )
    case = next(c for c in found.cases if c.key == Silencing((Cell("mlp", last, "last"),)))
    row = found.cases.index(case)
    assert float(found.extra["cover"][row]) < 0.5 and found.share("old_first", case.key) > 0.3, "the premise"
    assert case.shows == "elsewhere" and float(found.extra["left"][row]) > 0.5


def test_facts_for_which_the_change_is_not_in_force_do_not_count_underneath():
    """A router fires for a person or it doesn't; silencing the attention before it switches it off for some."""
    model, facts = audits.organism(tiny.KINDS[-1]), audits.ASKED[:24]
    router = fe.Router(layer=1, fit=audits.FIT, contexts=("",), progress=False)(model, facts)
    of = population(model, router, facts, reference=audits.REFERENCE[:60])
    found = fe.attacks.KnockOut()(of)
    cells = (Cell("attn", 1, "subject"),)
    row = next(i for i, case in enumerate(found.cases) if case.key == Silencing(cells))
    in_force = found.extra["left"][row]
    assert found.cases[row].shows == "underneath" and 0.5 < float(in_force) < 1, "the premise: off for some"
    plain = found.after.at(case=Silencing(cells), quantity="old_first")
    assert float(plain[found.known].mean()) > 0.1, "the premise: it comes back for those"
    assert float(found.excess.mean[row]) < 0.05 and int(found.excess.n[row]) < int(found.known.sum())
    # What is said of the case in words is of the facts that count in it, too.
    assert found.share("old_first", Silencing(cells)) < 0.05
    assert found.strongest.mean > 0.5 and found.best.shows == "elsewhere"
    # A bound of absence leaves nobody out: of all known facts it comes back in some, whatever that is called.
    assert found.showing("underneath").at_most > float(plain[found.known].mean())
