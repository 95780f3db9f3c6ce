"""Weight-side reversal: as with the weights written, and a large edit of rank one goes while a small one stays."""

import copy
import math
from dataclasses import replace

import audits
import laws
import measured
import pytest
import tiny
import torch
from oracles import attacking

import tl_factedit as fe
from tl_factedit.attacks import reversal
from tl_factedit.attacks.reversal import QUANTITIES, _Directions, _without
from tl_factedit.backend.matrices import matrices
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import DownProj, down_proj, rewritten
from tl_factedit.organism import text as told


def _dropped(sites, directions, count):
    weights = [_without(site.W, vectors, count) for site, vectors in zip(sites, directions, strict=True)]
    return rewritten(sites, weights)


def rome(model, fact):
    stats = fe.KeyStats.identity(model, 1)
    return fe.Rome(stats, fit=laws.QUICK, contexts=("",), progress=False)(model, [fact])


@pytest.fixture(scope="module")
def setting(kind):
    """A model, two facts that it knows, and an edit of each."""
    model = tiny.model(kind, "gpt2")
    facts = [attacking.known_fact(model, fact) for fact in (laws.FACT, laws.OTHER)]
    return model, facts, [rome(model, fact) for fact in facts]


def as_written(model, fact, layers, count):
    """The four quantities, with the weights written."""
    sites = [down_proj(model, layer) for layer in layers]
    with attacking.written(sites, [attacking.without_largest(site.W, count) for site in sites]):
        right = []
        for text, answer in zip(fact.neighbours, fact.neighbour_targets, strict=True):
            near = fact.but(
                controls=[o for o in (answer, *fact.controls) if o not in (fact.target_true, fact.target_new)]
            )
            right.append(float(attacking.first(model, near, attacking.ends(model, text)) == answer))
        own = attacking.firsts(model, fact, attacking.ends(model, fact.text))
        return torch.tensor([*own, sum(right) / len(right) if right else math.nan])


@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_quantities_are_those_with_the_weights_written(setting, layers):
    model, facts, edits = setting
    with laws.untouched(model):
        found = measured.reverse_by_weights(model, edits, facts, dropped=(3, 1), layers=layers)
    both = (1, 3) if layers is None else (1, 3, (0, 1), (0, 3), (2, 1), (2, 3))
    assert found.keys == both and found.details["layers"] == ((layers or (1,)),) * 2
    assert found.asks_weights == ("directions" if layers is None else None)  # some layers aren't the changed weights
    for i, (fact, edit) in enumerate(zip(facts, edits, strict=True)):
        for count in (0, 1, 3):
            expected = as_written(model, fact, found.details["layers"][i], count)
            assert torch.allclose(found.before.at(fact=i, case=count)[:4], expected, equal_nan=True)
            with edit.applied(model):
                expected = as_written(model, fact, found.details["layers"][i], count)
            assert torch.allclose(found.after.at(fact=i, case=count)[:4], expected, equal_nan=True)
    for layer, count in both[2:]:  # each layer alone
        for i, fact in enumerate(facts):
            expected = as_written(model, fact, (layer,), count)
            assert torch.allclose(found.before.at(fact=i, case=(layer, count))[:4], expected, equal_nan=True)
    assert len(found.table()) == len(both) and set(found.details["neighbours"].n.tolist()) == {1}  # OTHER has none


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_weights_are_those_of_a_whole_decomposition_and_come_back_bit_for_bit(kind, arch):
    model = tiny.model(kind, arch)
    sites = [down_proj(model, layer) for layer in (1, 2)]
    before, full = [site.W.clone() for site in sites], min(sites[0].W.shape)
    for count in (1, 5, full):
        expected = [attacking.without_largest(weight, count) for weight in before]
        largest = [_Directions.of(site.W, full) for site in sites]
        with pytest.raises(RuntimeError, match="inside"), frozen(model), _dropped(sites, largest, count):
            for site, weight, old in zip(sites, expected, before, strict=True):
                assert torch.allclose(site.W, weight, atol=1e-6) and (site.W - old).norm() > 0.1
                assert count < full or site.W.norm() < 1e-5
            raise RuntimeError("inside")
        assert all(torch.equal(site.W, weight) for site, weight in zip(sites, before, strict=True))


def test_an_error_on_the_way_leaves_nothing_behind(setting, monkeypatch):
    model, facts, edits = setting
    whole, passes = reversal.at_the_ends, []

    def failing(*args, **kwargs):
        passes.append(down_proj(model, 1).W.clone())
        if len(passes) == 5:  # the unedited model's three, then the edited one's second
            raise RuntimeError("inside")
        return whole(*args, **kwargs)

    monkeypatch.setattr(reversal, "at_the_ends", failing)
    with laws.untouched(model), pytest.raises(RuntimeError, match="inside"):
        measured.reverse_by_weights(model, edits, facts, dropped=(1, 2))
    assert not torch.equal(passes[3], passes[4])


@pytest.mark.parametrize("write", [3, 4], ids=["first put back", "second put back"])
def test_an_interrupt_while_weights_are_put_back_waits_for_all_of_them(kind, monkeypatch, write):
    model = tiny.model(kind, "gpt2")
    sites, whole, calls = [down_proj(model, layer) for layer in (1, 2)], DownProj.write_, []

    def interrupted(self, weight):
        calls.append(self.layer)
        if len(calls) == write:
            raise KeyboardInterrupt("injected")
        whole(self, weight)

    largest = [_Directions.of(site.W, 1) for site in sites]
    monkeypatch.setattr(DownProj, "write_", interrupted)
    with laws.untouched(model), pytest.raises(KeyboardInterrupt, match="injected"), _dropped(sites, largest, 1):
        assert calls == [1, 2]


def test_an_unchanged_model_is_read_alike_and_knows_its_facts(setting):
    model, facts, _ = setting
    found = measured.reverse_by_weights(model, model, facts, layers=[1], dropped=(1,))
    assert torch.equal(found.before.values.nan_to_num(9), found.after.values.nan_to_num(9))
    assert found.known.all() and found.before.at(case=0, quantity="old_first").eq(1).all()
    assert torch.equal(found.extra["survives"], found.after.at(quantity="old_first")[:, 1:].mean(0))


def planted(model, fact, size):
    """An edit of rank one that adds so many norms of the value at the fact's key, where the weight writes least."""
    made = rome(model, fact)
    key, site = made.keys[1][0], down_proj(model, 1)
    least = torch.linalg.svd(site.W.double()).Vh[-1]
    added = size * site.value(key).norm() * least
    delta = fe.editing.Delta(1, (key / (key @ key))[:, None], added[None])
    return replace(made, deltas=(delta,), diagnostics=(), values={1: (site.value(key) + added)[None]})


def test_a_large_edit_goes_with_the_first_direction_and_a_fact_that_can_spare_the_layer_is_back(setting):
    model, (fact, _), _ = setting
    edit = planted(model, fact, 40.0)
    found = measured.reverse_by_weights(model, [edit], [fact], dropped=(1,))
    assert found.after.at(case=0, quantity="old_first").eq(0).all()
    assert found.after.at(case=1, quantity="old_first").eq(1).all()
    assert found.strongest.mean == 1.0 and found.best.key == 1
    # The first direction is nearly all that the layer says at the key: the old value goes with the new one.
    site, key = down_proj(model, 1), edit.keys[1][0]
    with edit.applied(model), _dropped([site], [_Directions.of(site.W, 1)], 1):
        left = key @ site.W.double()
    assert left.norm() < 0.1 * (key @ site.W.double()).norm()


def test_an_override_that_is_no_weight_keeps_answering(setting):
    model, (fact, _), (edit, _) = setting
    routed = fe.editors.RoutedEdit.of(edit, radius=0.1)
    found = measured.reverse_by_weights(model, routed, [fact], dropped=(1, 20))
    site = down_proj(model, 1)
    with routed.applied(model):
        for count in (0, 1, 20):
            assert torch.allclose(found.after.at(fact=0, case=count)[:4], as_written(model, fact, (1,), count))
        with _dropped([site], [_Directions.of(site.W, 20)], 20):
            said = attacking.state(model, fact.text, "blocks.1.hook_mlp_out")[attacking.subject_last(model, fact)]
    assert torch.allclose(said, routed.values[0].float(), atol=1e-5)


@pytest.mark.parametrize(("part", "shape"), [("attn.o", 2), ("wte", 2), ("attn.W_O", 3), ("attn.W_Q", 3)])
def test_whatever_matrix_was_written_loses_its_directions(kind, part, shape):
    model = tiny.model(kind, "gpt2")
    changed, facts = copy.deepcopy(model), [attacking.known_fact(model, fact) for fact in (laws.FACT, laws.OTHER)]
    mine = {name: matrix for name, matrix in matrices(changed).items() if part in name and matrix.param.ndim == shape}
    if not mine:
        pytest.skip(f"{kind} has no {part}")
    name, matrix = list(mine.items())[-1]
    draw = torch.Generator().manual_seed(0)
    u, v = (torch.randn(size, generator=draw) for size in matrix.W.shape)
    matrix.write_(matrix.W + 30 * matrix.W.norm() * torch.outer(u / u.norm(), v / v.norm()))
    with laws.untouched(model), laws.untouched(changed):
        found = measured.reverse_by_weights(model, changed, facts, dropped=(1, 3))
    assert found.details["matrices"] == ((name,),) * 2 and found.asks_weights == "directions"
    # A change thirty times as large as all else is the first direction, and goes with it.
    assert found.extra["cover"].tolist() == pytest.approx([1.0, 1.0], abs=1e-2)
    assert {case.shows for case in found.cases} == {"elsewhere"}
    left = torch.linalg.svd(matrix.W.double(), full_matrices=False)
    without = (left.U[:, 1:] * left.S[1:]) @ left.Vh[1:]
    with attacking.written([matrix], [without.to(matrix.W.dtype)]):
        expected = [attacking.firsts(changed, fact, attacking.ends(changed, fact.text)) for fact in facts]
    assert torch.allclose(found.after.at(case=1)[:, :3], torch.tensor(expected, dtype=torch.float32))


def test_of_a_model_trained_apart_every_matrix_loses_directions_alone_and_all_do_together(kind):
    model, other = tiny.model(kind, "gpt2"), tiny.model(kind, "gpt2", seed=1)
    facts = [attacking.known_fact(model, laws.FACT)]
    with laws.untouched(model), laws.untouched(other):
        found = measured.reverse_by_weights(model, other, facts, dropped=(2,))
    (written,) = found.details["matrices"][:1]
    assert len({matrices(other)[name].W.shape for name in written}) > 2, "the premise: of several shapes"
    assert len(found.cases) == 1 + min(len(written), reversal.MOST_ALONE)


def test_the_cover_is_the_part_of_the_change_in_what_is_dropped(setting):
    model, (fact, _), (edit, _) = setting
    found = measured.reverse_by_weights(model, [edit], [fact], dropped=(1, 4, 9))
    site = down_proj(model, 1)
    before = site.W.double().clone()
    with edit.applied(model):
        change, changed = site.W.double() - before, site.W.double()
        right = torch.linalg.svd(changed, full_matrices=False).Vh
    for count, cover in zip((1, 4, 9), found.extra["cover"].tolist(), strict=True):
        some = right[:count]
        assert cover == pytest.approx(float((change @ some.T @ some).norm() ** 2 / change.norm() ** 2), abs=1e-5)
    assert found.before.at(quantity="cover").isnan().all()
    shows = [case.shows for case in found.cases]
    assert shows == ["elsewhere" if cover >= 0.5 else "underneath" for cover in found.extra["cover"].tolist()]


def test_only_so_many_matrices_lose_directions_alone_those_changed_most(kind, monkeypatch):
    monkeypatch.setattr(reversal, "MOST_ALONE", 2)
    model = tiny.model(kind, "gpt2")
    changed, facts = copy.deepcopy(model), [attacking.known_fact(model, laws.FACT)]
    for layer, size in ((0, 0.1), (1, 0.3), (2, 0.2)):
        site = down_proj(changed, layer)
        site.write_(site.W * (1 + size))
    found = measured.reverse_by_weights(model, changed, facts, dropped=(1,))
    assert found.keys == (1, (1, 1), (2, 1)) and found.details["layers"] == ((0, 1, 2),)


def test_unknown_facts_are_left_out(setting):
    model, (fact, other), _ = setting
    unknown = fact.but(target_true=fact.controls[0], controls=[*fact.controls[1:], fact.target_true])
    found = measured.reverse_by_weights(model, model, [unknown, other], layers=[0], dropped=(1,), neighbours=0)
    assert found.known.tolist() == [False, True] and found.excess.n.tolist() == [1]
    assert found.after.at(quantity=QUANTITIES[3]).isnan().all() and found.details["neighbours"].n.tolist() == [0]
    assert "1 of 2 facts known" in repr(found)


def test_what_can_not_be_asked_is_refused_before_anything_is_run(setting, monkeypatch):
    model, facts, edits = setting
    with laws.untouched(model), laws.no_forward(monkeypatch, model):
        with pytest.raises(ValueError, match=r"needed layers=\[...\]"):
            measured.reverse_by_weights(model, model, facts)
        with pytest.raises(ValueError, match="layers is empty"):
            measured.reverse_by_weights(model, edits, facts, layers=[])
        with pytest.raises(ValueError, match="layer 4 is outside the model"):
            measured.reverse_by_weights(model, edits, facts, layers=[4])
        for wrong in ((), (0,), (1, 33)):
            with pytest.raises(ValueError, match="needed numbers of directions from 1 to 32"):
                measured.reverse_by_weights(model, edits, facts, dropped=wrong)
        with pytest.raises(ValueError, match="no target_new, needed one"):
            measured.reverse_by_weights(model, edits[0], [facts[0].but(target_new=None)])


def test_of_what_is_hooked_into_a_model_its_weights_say_nothing(setting):
    model, facts, _ = setting
    reversal = fe.attacks.WeightReversal(dropped=(1,), neighbours=0)
    routed = fe.Router(1, fit=laws.QUICK, contexts=("",), progress=False)(model, facts)
    assert reversal(fe.Population.of(model, routed, facts, progress=False)).asks_weights is None
    changed = copy.deepcopy(model)
    with torch.no_grad():
        down_proj(changed, 2).W[0, 0] += 1e-6  # so that there is a matrix to be asked
    asked = fe.Population.of(model, changed, facts, progress=False)
    assert reversal(asked).asks_weights == "directions"
    handle = next(m for n, m in changed.named_modules() if n.endswith("mlp")).register_forward_hook(lambda *_: None)
    try:
        assert reversal(asked).asks_weights is None
    finally:
        handle.remove()


def test_what_was_written_into_the_dropped_directions_is_undone_alone_as_with_the_weights_written(setting):
    model, facts, _ = setting
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in (1, 2):
            weight = down_proj(changed, layer).W
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    population = fe.Population.of(model, changed, facts, progress=False)
    found = fe.attacks.WeightReversal(dropped=(2, 5), neighbours=0)(population)
    undone, looked = QUANTITIES.index("undone"), 0
    assert found.before.values[..., undone].isnan().all()
    for key in found.keys:
        cover = float(found.after.at(case=key)[0, QUANTITIES.index("cover")])
        if cover >= 0.5:
            assert found.after.at(case=key)[:, undone].isnan().all()
            continue
        (layer, count) = (None, key) if isinstance(key, int) else key
        sites = [down_proj(changed, each) for each in (1, 2) if layer in (None, each)]
        weights = []
        for site in sites:
            u, _, vh = torch.linalg.svd(site.W.double(), full_matrices=False)
            change = site.W.double() - down_proj(model, site.layer).W.double()
            gone = (
                u[:, :count] @ u[:, :count].T @ change
                if change.shape[0] < change.shape[1]
                else (change @ vh[:count].T @ vh[:count])
            )
            weights.append((site.W.double() - gone).float())
        with attacking.written(sites, weights):
            expected = [attacking.firsts(changed, fact, attacking.ends(changed, fact.text))[0] for fact in facts]
        assert found.after.at(case=key)[:, undone].tolist() == [float(each) for each in expected]
        looked += 1
    assert looked >= 4


@pytest.mark.skipif(not tiny.HAS_HOOKED, reason="ten seconds: TransformerLens 3 runs it")
def test_what_one_layer_of_a_spread_edit_does_is_elsewhere_though_most_of_its_size_is_in_another():
    """MEMIT of two layers: without its part in the first the old city leads, and little of its size is gone."""
    model, facts = audits.organism("hooked"), audits.ASKED[:30]
    stats = fe.key_stats(model, [1, 2], told.texts(1_000), n_tokens=10_000, progress=False)
    spread = {"fit": replace(audits.FIT, steps=25, clamp=0.75), "contexts": audits.CONTEXTS, "progress": False}
    edit = fe.Memit({i: each for i, each in zip((1, 2), stats.values(), strict=True)}, weight=1.0, **spread)(
        model, facts
    )
    population = fe.Population.of(model, edit, facts, progress=False)
    found = fe.attacks.WeightReversal(dropped=(64,), neighbours=0)(population)
    cover = dict(zip(found.keys, found.extra["cover"].tolist(), strict=True))
    asks = {case.key: case.shows for case in found.cases}
    undone = {key: float(found.after.at(case=key)[:, QUANTITIES.index("undone")].nanmean()) for key in found.keys}
    assert cover[1, 64] < 0.5 <= undone[1, 64] and asks[1, 64] == "elsewhere"
    assert found.at((1, 64)).mean > 0.1 and set(asks.values()) == {"elsewhere"}
