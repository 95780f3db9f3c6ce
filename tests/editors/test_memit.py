"""MEMIT, EMMET and AlphaEdit: the laws of every editor, the closed forms, and what they promise of each other.

The closed forms are tested on a planted associative memory, in float64; 1e-9 is some thousand roundings of numbers of
size 1.
"""

import functools
import inspect

import laws
import pytest
import tiny
import torch
from oracles import editing

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.backend.weights import DownProj, down_proj
from tl_factedit.core import solve
from tl_factedit.core.tokens import align
from tl_factedit.editing.adam import Adam
from tl_factedit.editing.inputs import check_contexts, check_facts
from tl_factedit.editing.layerwise import distribute
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editing.values import fit_values

FIT = ValueFit(steps=4, clamp=0.75)
EXACT = {"rtol": 1e-9, "atol": 1e-9}
FACTS = [laws.FACT, laws.OTHER]
LAYERS = (1, 2)
EDITORS = {
    "memit": lambda stats: fe.Memit(stats, weight=1.0, fit=FIT, contexts=laws.CONTEXTS, progress=False),
    "emmet": lambda stats: fe.Emmet(stats, fit=FIT, contexts=laws.CONTEXTS, progress=False),
    "alphaedit": lambda stats: fe.AlphaEdit(
        stats, share=0.1, weight=1e-3, fit=FIT, contexts=laws.CONTEXTS, progress=False
    ),
}
every = pytest.mark.parametrize("name", EDITORS)


@functools.cache
def shared(kind: str, arch: str = "gpt2", dtype: torch.dtype = torch.float32):
    return tiny.model(kind, arch, dtype=dtype)


def stats_of(model) -> dict[int, fe.KeyStats]:
    return {layer: laws.stats(model, layer) for layer in LAYERS}


# ---------------------------------------------------------------------------------------- laws


@every
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "gptj"])
def test_the_weights_stay_and_come_back_and_the_same_edit_comes_again(kind, arch, name, tmp_path):
    if kind == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("no HookedTransformer of this architecture")
    model = shared(kind, arch)
    editor = EDITORS[name](stats_of(model))
    with laws.untouched(model):
        edit, again = editor(model, FACTS), editor(model, FACTS)
    assert edit.digest == again.digest
    assert edit.layers == LAYERS
    laws.writes_its_values_at_its_keys(edit, model)
    before = laws.logits(model)
    with laws.untouched(model), edit.applied(model):
        assert not torch.allclose(laws.logits(model), before, atol=1e-4)
    edit.save(tmp_path / "edit.safetensors")
    loaded = fe.Edit.load(tmp_path / "edit.safetensors")
    laws.same_edits(edit, loaded)
    with laws.untouched(model), loaded.applied(model):
        pass


@every
@pytest.mark.parametrize(
    "stage",
    [
        "tl_factedit.stats.key_stats.KeyStats.check",
        "tl_factedit.editing.inputs.align_all",
        "tl_factedit.editing.layerwise.prefixes",
        "tl_factedit.editing.layerwise.fit_values",
        "tl_factedit.editing.values.Runner.remember",
        "tl_factedit.editing.adam.Adam.step",
        "tl_factedit.editing.layerwise.Delta",
        "tl_factedit.editing.edit.measure_off_target",
        "tl_factedit.editing.edit.diagnose",
        "tl_factedit.backend.provenance.Provenance.of",
    ],
)
def test_an_interrupt_at_any_stage_leaves_everything_as_it_was(kind, name, stage, monkeypatch):
    model = shared(kind)
    editor = EDITORS[name](stats_of(model))

    def fail(*_, **__):
        raise KeyboardInterrupt("injected")

    with laws.untouched(model):
        monkeypatch.setattr(stage, fail)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            editor(model, FACTS)
        monkeypatch.undo()


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_what_is_wanted_is_reached_whatever_stands_between_w_out_and_the_stream(kind, arch):
    """With a norm after the MLP a change of the stream can't be written into W_out as it is."""
    if kind == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("no HookedTransformer of this architecture")
    model = shared(kind, arch)
    stats = {1: laws.stats(model, 1, n_tokens=1_500)}
    edit = fe.Emmet(stats, fit=FIT, contexts=(), progress=False)(model, [laws.FACT])
    assert edit.editor["where"] == ("mlp" if arch in ("gemma2", "gemma3", "olmo2") else "resid")
    assert edit.fits[0]["missed"] < 1e-3 and edit.diagnostics[0].exactness < 1e-3
    # Seen from outside: with the edit, W_out answers the subject's key with the value.
    row = align(model.tokenizer, laws.FACT, prepend_bos=edit.provenance.prepend_bos)
    site = down_proj(model, 1)
    places = [site.value_at] if isinstance(site.value_at, str) else []
    with edit.applied(model), frozen(model), torch.no_grad():
        found = Runner(model).capture(row.ids[None], places, stop=2)
    for place in places:
        torch.testing.assert_close(found[place][0, row.last].double(), edit.values[1][0], rtol=1e-3, atol=1e-4)


def test_what_is_not_met_is_said_in_the_values_and_in_what_is_missed(kind):
    model = shared(kind)
    edit = fe.Memit(stats_of(model), weight=50.0, fit=FIT, contexts=laws.CONTEXTS, progress=False)(model, FACTS)
    for delta in edit.deltas:
        site = down_proj(model, delta.layer)
        keys = edit.keys[delta.layer]
        torch.testing.assert_close(edit.values[delta.layer], site.value(keys) + keys @ delta.dense)
    torch.testing.assert_close(
        edit.scaled(0.0).values[2], down_proj(model, 2).value(edit.keys[2]), rtol=1e-6, atol=1e-6
    )
    missed = [fit["missed"] for fit in edit.fits]
    assert all(0.05 < share < 1.0 for share in missed) and not edit.fits[0]["same_first_token"]


def test_facts_with_one_key_are_told_so_and_not_to_lower_the_weight(kind):
    model = shared(kind)
    begins = [laws.FACT, laws.FACT.but(prompt="{} is in the city of", target_new=" London")]
    edit = fe.Memit(stats_of(model), weight=1e-3, fit=FIT, contexts=(), progress=False)(model, begins)
    assert any("one key" in line for line in edit.concerns)
    assert not any("lower the weight" in line for line in edit.concerns)


@every
@pytest.mark.parametrize("call", [2, 4, 6])
def test_an_interrupt_between_layers_leaves_everything_as_it_was(kind, name, call, monkeypatch):
    model, calls, capture = shared(kind), [], Runner.capture
    editor = EDITORS[name](stats_of(model))

    def failing(self, *args, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt("injected")
        return capture(self, *args, **options)

    with laws.untouched(model):
        monkeypatch.setattr(Runner, "capture", failing)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            editor(model, FACTS)
        monkeypatch.undo()


@every
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_an_interrupt_at_any_write_leaves_everything_as_it_was(kind, name, write, when, monkeypatch):
    """Two layers are written and, at the end, written back."""
    model, writes, write_ = shared(kind), [], DownProj.write_
    editor = EDITORS[name](stats_of(model))

    def failing(self, weight):
        writes.append(1)
        if when == "after":
            write_(self, weight)
        if len(writes) == write:
            raise KeyboardInterrupt("injected")
        if when == "before":
            write_(self, weight)

    with laws.untouched(model):
        monkeypatch.setattr(DownProj, "write_", failing)
        with pytest.raises(KeyboardInterrupt, match="injected"):
            editor(model, FACTS)
        monkeypatch.undo()
    assert len(writes) >= write


# ---------------------------------------------------------------------------------------- what is written


def test_the_stream_at_the_last_layer_is_what_was_wanted(kind):
    """EMMET meets every residual, so that only the blocks between leave a rest, which the last layer takes up."""
    model = shared(kind)
    edit = EDITORS["emmet"](stats_of(model))(model, FACTS)
    fitted = fit_values(
        model, FACTS, 2, laws.CONTEXTS, where="resid", fit=FIT, prepend_bos=edit.provenance.prepend_bos, progress=False
    )
    with edit.applied(model):
        after = fit_values(
            model,
            FACTS,
            2,
            laws.CONTEXTS,
            where="resid",
            fit=ValueFit(steps=1),
            prepend_bos=edit.provenance.prepend_bos,
            progress=False,
        )
    for wanted, now in zip(fitted, after, strict=True):
        # Keys are means over contexts, so the bare prompt's own key is met nearly, not exactly.
        rest = (wanted.outputs[0] + wanted.delta - now.outputs[0]).norm()
        assert rest < 0.5 * wanted.delta.norm()
    assert max(max(d.unmet) for d in edit.diagnostics) < 1e-9


def test_with_the_bare_prompt_alone_it_is_met_exactly(kind):
    model = shared(kind)
    editor = fe.Emmet({2: laws.stats(model, 2)}, fit=FIT, contexts=[""], progress=False)
    edit = editor(model, FACTS)
    bos = edit.provenance.prepend_bos
    wanted = fit_values(model, FACTS, 2, [""], where="resid", fit=FIT, prepend_bos=bos, progress=False)
    with edit.applied(model):
        now = fit_values(model, FACTS, 2, [""], where="resid", fit=ValueFit(steps=1), prepend_bos=bos, progress=False)
    for before, after in zip(wanted, now, strict=True):
        torch.testing.assert_close(after.outputs[0], before.outputs[0] + before.delta, rtol=1e-4, atol=1e-4)
        assert before.delta.norm() > 0.1


def test_the_unmet_share_of_one_fact_is_lambda_over_lambda_plus_s(kind):
    model = shared(kind)
    stats = laws.stats(model, 2)
    for weight in (0.1, 1.0, 100.0):
        edit = fe.Memit({2: stats}, weight=weight, fit=FIT, contexts=[""], progress=False)(model, [laws.FACT])
        key = edit.keys[2][0]
        s = float(key @ torch.linalg.solve(stats.moment, key))
        assert edit.diagnostics[0].unmet[0] == pytest.approx(weight / (weight + s), rel=1e-6)


def test_alphaedit_stays_in_its_null_space_and_keeps_earlier_keys(kind):
    model = shared(kind)
    stats = {2: laws.stats(model, 2)}
    options = {"share": 0.3, "weight": 1e-3, "fit": FIT, "contexts": [""], "progress": False}
    first = fe.AlphaEdit(stats, **options)(model, [laws.FACT])
    projection = solve.null_space(stats[2].moment, share=0.3)
    delta = first.deltas[0].dense
    torch.testing.assert_close(projection @ delta, delta, rtol=1e-8, atol=1e-10)
    outside = torch.eye(len(projection), dtype=torch.float64) - projection
    assert (outside @ torch.randn(len(projection), 5, dtype=torch.float64)).T.matmul(delta).abs().max() < 1e-9
    with first.applied(model):
        careless = fe.AlphaEdit(stats, **options)(model, [laws.OTHER])
        careful = fe.AlphaEdit(stats, earlier=[first], **options)(model, [laws.OTHER])
    key = first.keys[2][0]
    moved = [float((key @ edit.deltas[0].dense).norm()) for edit in (careless, careful)]
    assert moved[1] < moved[0] / 2


# ---------------------------------------------------------------------------------------- the literal loop


def test_earlier_edits_may_come_from_a_generator(kind):
    model = shared(kind)
    first = EDITORS["alphaedit"](stats_of(model))(model, FACTS[:1])
    editor = fe.AlphaEdit(stats_of(model), earlier=(edit for edit in [first]), fit=FIT, contexts=(), progress=False)
    with laws.untouched(model):
        assert editor(model, FACTS[1:]).editor["earlier"] == [first.digest]


def test_cosines_of_keys_are_told_fact_by_fact(kind):
    model = shared(kind)
    edit = EDITORS["emmet"](stats_of(model))(model, [*FACTS, laws.FACT.but(subject="Big Ben")])
    for each in edit.diagnostics:
        unit = torch.nn.functional.normalize(edit.keys[each.layer], dim=-1)
        expected = [max(float(abs(unit[i] @ unit[j])) for j in range(3) if j != i) for i in range(3)]
        assert each.key_cosines == pytest.approx(expected) and each.key_cosine == max(expected)
    assert EDITORS["emmet"](stats_of(model))(model, FACTS[:1]).diagnostics[0].key_cosines == ()


def literal(name: str, stats: dict[int, fe.KeyStats]):
    """The published closed form of an editor of `EDITORS`, by explicit inverses."""
    none = torch.zeros(0, laws.D_MLP, dtype=torch.float64)

    def update(layer, keys, residuals):
        moment = stats[layer].moment
        if name == "memit":
            return editing.least_squares(moment, keys, residuals, 1.0)
        if name == "emmet":
            return editing.equality(moment, keys, residuals, 0.0)
        spectrum = torch.linalg.eigvalsh(moment)
        most = int((spectrum.cumsum(0) <= 0.1 * spectrum.sum()).sum())
        projection = editing.null_space(moment, float(spectrum[most - 1 : most + 1].mean()))
        return editing.in_null_space(projection, keys, residuals, none, 1e-3)

    return update


@every
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_given_z_the_updates_are_those_of_the_literal_loop(kind, arch, name):
    """One text at a time through public hooks, with explicit inverses, in a float64 model."""
    model = shared(kind, arch, torch.float64)
    stats = stats_of(model)
    editor = EDITORS[name](stats)
    before = [editing.before(model, fact, LAYERS[-1], bos=True, where="resid")[0] for fact in FACTS]
    wanted = torch.stack(before) + noise(len(FACTS), 32, seed=9)
    with frozen(model), torch.no_grad():
        solvers = {layer: editor.solver(stats[layer]) for layer in LAYERS}
        targets = [fe.editing.EditTarget(fact) for fact in FACTS]
        found, missed = distribute(
            model, targets, LAYERS, wanted, solvers, laws.CONTEXTS, prepend_bos=True, progress=False
        )
    assert missed.shape == (len(FACTS),)
    expected = editing.spread(
        model, FACTS, list(LAYERS), laws.CONTEXTS, wanted, literal(name, stats), bos=True, reached="hook_resid_post"
    )
    for each in found:
        keys, residuals, delta = expected[each.delta.layer]
        for mine, theirs in ((each.keys, keys), (each.residuals, residuals), (each.delta.dense, delta)):
            assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    # What is wrong is seen: keys of the bare prompt alone, and a second layer that doesn't know of the first.
    alone = editing.spread(model, FACTS, list(LAYERS), ("",), wanted, literal(name, stats), bos=True)
    assert (alone[1][2] - expected[1][2]).norm() > 1e-3 * expected[1][2].norm()
    fresh = editing.spread(model, FACTS, [LAYERS[-1]], laws.CONTEXTS, wanted, literal(name, stats), bos=True)
    assert (fresh[2][2] - expected[2][2]).norm() > 1e-2 * expected[2][2].norm()


@every
def test_with_its_own_z_it_makes_the_edit_of_the_literal_loop(kind, name):
    """To 1 %: Adam divides by the gradient's own size, and multiplies what its float32 sums differ by."""
    model = shared(kind, "gpt2", torch.float64)
    stats = stats_of(model)
    edit = EDITORS[name](stats)(model, FACTS)
    options = {"steps": 4, "lr": 0.5, "clamp": 0.75, "stop_below": 0.05, "kl_weight": 0.0625, "decay": 0.5}
    wanted = []
    for fact in FACTS:
        delta, _ = editing.fit_value(model, fact, LAYERS[-1], laws.CONTEXTS, bos=True, where="resid", **options)
        wanted.append(editing.before(model, fact, LAYERS[-1], bos=True, where="resid")[0] + delta)
    expected = editing.spread(
        model, FACTS, list(LAYERS), laws.CONTEXTS, torch.stack(wanted), literal(name, stats), bos=True
    )
    for delta in edit.deltas:
        theirs = expected[delta.layer][2]
        assert (delta.dense - theirs).norm() <= 1e-2 * theirs.norm()


# ---------------------------------------------------------------------------------------- closed forms


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Memory:
    """Keys from N(0, C) with a known, far from round C, a W that answers them, and facts to be written."""

    def __init__(self, n: int = 5, m: int = 12, d: int = 6):
        self.root = torch.linalg.qr(noise(m, m, seed=1))[0] * torch.logspace(-1, 1, m, dtype=torch.float64)
        self.moment = self.root @ self.root.T
        self.W = noise(m, d, seed=2)
        self.keys = self.draw(n, seed=3)
        self.residuals = noise(n, d, seed=4) - self.keys @ self.W
        self.earlier = self.draw(2, seed=5)
        self.projection = solve.null_space(self.moment, share=0.3)

    def draw(self, count: int, *, seed: int) -> torch.Tensor:
        return noise(count, len(self.root), seed=seed) @ self.root.T

    def memit(self, weight: float = 2.5, moment: torch.Tensor | None = None) -> torch.Tensor:
        lower = solve.cholesky(self.moment if moment is None else moment)
        return dense(solve.least_squares(self.keys, self.residuals, lower, weight))

    def emmet(self, moment: torch.Tensor | None = None) -> torch.Tensor:
        return self.memit(0.0, moment)

    def alphaedit(self, weight: float = 0.5) -> torch.Tensor:
        return dense(solve.in_null_space(self.keys, self.residuals, self.projection, self.earlier, weight))

    def cost(self, delta: torch.Tensor) -> float:
        """E‖Δᵀk‖² over keys: how much the update disturbs what is stored."""
        return float(torch.trace(delta.T @ self.moment @ delta))

    def missed(self, delta: torch.Tensor) -> float:
        return float((self.keys @ delta - self.residuals).square().sum())


def dense(factors) -> torch.Tensor:
    return factors.left @ factors.right


SIZES = [(3, 24, 10), (3, 10, 24), (5, 16, 16)]


@pytest.fixture(params=SIZES, ids="{0[0]} facts, {0[1]}x{0[2]}".format)
def memory(request) -> Memory:
    return Memory(*request.param)


@pytest.mark.parametrize("size", [*SIZES, (1, 12, 6), (12, 12, 6), (30, 12, 6), (40, 24, 10), (40, 10, 24)])
def test_primal_and_dual_are_the_literal_formula(size):
    memory = Memory(*size)
    found = solve.least_squares(memory.keys, memory.residuals, solve.cholesky(memory.moment), 2.5)
    expected = editing.least_squares(memory.moment, memory.keys, memory.residuals, 2.5)
    torch.testing.assert_close(dense(found), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    assert found.left.shape[1] == min(size[0], size[2])
    assert not torch.allclose(dense(found), expected.roll(1, 0), rtol=1e-3)


def test_without_weight_all_residuals_are_met_as_by_the_literal_formula(memory):
    delta = memory.emmet()
    expected = editing.equality(memory.moment, memory.keys, memory.residuals, 0.0)
    torch.testing.assert_close(delta, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    torch.testing.assert_close(memory.keys @ delta, memory.residuals, **EXACT)
    # A weight leaves a rest; and rank-one updates one by one, added up, write into each other.
    assert memory.missed(memory.memit()) > 1e-3
    each = [
        solve.rank_one(editing.whiten_key(memory.moment, key), key, residual)
        for key, residual in zip(memory.keys, memory.residuals, strict=True)
    ]
    assert memory.missed(sum(map(dense, each))) > 1e-3


def test_less_and_less_weight_leads_there_and_for_one_fact_it_is_romes(memory):
    delta = memory.emmet()
    off = [float((memory.memit(weight) - delta).norm() / delta.norm()) for weight in (1e-3, 1e-6, 1e-9)]
    assert off[0] > 100 * off[1] > 1e4 * off[2]
    one = solve.least_squares(memory.keys[:1], memory.residuals[:1], solve.cholesky(memory.moment), 0.0)
    rome = solve.rank_one(editing.whiten_key(memory.moment, memory.keys[0]), memory.keys[0], memory.residuals[0])
    torch.testing.assert_close(dense(one), dense(rome), **EXACT)


@pytest.mark.parametrize("weight", [0.1, 1.0, 100.0])
def test_one_fact_is_left_unmet_by_lambda_over_lambda_plus_s(memory, weight):
    key, residual = memory.keys[:1], memory.residuals[:1]
    found = dense(solve.least_squares(key, residual, solve.cholesky(memory.moment), weight))
    s = float(key @ torch.linalg.inv(memory.moment) @ key.T)
    torch.testing.assert_close(residual - key @ found, residual * weight / (weight + s), **EXACT)


def test_emmet_with_a_weight_is_memit_of_the_scaled_moment(memory):
    w, e = 3.0, 0.2
    emmet = memory.memit(e, w * memory.moment)
    torch.testing.assert_close(emmet, memory.memit(w * e), **EXACT)
    literal = editing.equality(w * memory.moment, memory.keys, memory.residuals, e)
    torch.testing.assert_close(emmet, literal, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(memory.memit(e), emmet, rtol=1e-3)


def others(memory: Memory, like: torch.Tensor, size: float) -> torch.Tensor:
    """Two thousand changes at random."""
    return size * noise(2_000, *like.shape, seed=6)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_of_all_updates_that_meet_the_residuals_emmets_costs_least(memory, size):
    delta = memory.emmet()
    gram = memory.keys @ torch.linalg.inv(memory.moment) @ memory.keys.T
    best = memory.cost(delta)
    wanted = float(torch.trace(memory.residuals.T @ torch.linalg.inv(gram) @ memory.residuals))
    assert best == pytest.approx(wanted, rel=1e-9)
    unseen = torch.eye(len(delta), dtype=torch.float64) - torch.linalg.pinv(memory.keys) @ memory.keys
    changes = unseen @ others(memory, delta, size)
    torch.testing.assert_close(memory.keys @ (delta + changes[0]), memory.residuals, **EXACT)
    costs = (memory.root.T @ (delta + changes)).square().sum((1, 2))
    assert float(costs[0]) == pytest.approx(memory.cost(delta + changes[0]), rel=1e-9)
    assert (costs > best).all()
    plain = torch.linalg.pinv(memory.keys) @ memory.residuals
    torch.testing.assert_close(memory.keys @ plain, memory.residuals, **EXACT)
    assert plain.norm() < delta.norm() and memory.cost(plain) > best


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_memits_minimises_what_is_missed_and_what_is_disturbed(memory, size):
    def worth(delta):
        return (memory.keys @ delta - memory.residuals).square().sum((-2, -1)) + 2.5 * (
            memory.root.T @ delta
        ).square().sum((-2, -1))

    delta = memory.memit()
    assert (worth(delta + others(memory, delta, size)) > worth(delta)).all()
    assert worth(memory.emmet()) > worth(delta)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_alphaedits_minimises_what_is_missed_and_its_own_size_within_the_null_space(memory, size):
    def worth(delta):
        missed = (memory.keys @ delta - memory.residuals).square().sum((-2, -1))
        kept = (memory.earlier @ delta).square().sum((-2, -1))
        return missed + kept + 0.5 * delta.square().sum((-2, -1))

    delta = memory.alphaedit()
    changes = others(memory, delta, size)
    assert (worth(delta + memory.projection @ changes) > worth(delta)).all()
    # Outside of it there are better ones, which would disturb what is stored.
    free = torch.linalg.inv(
        memory.keys.T @ memory.keys
        + memory.earlier.T @ memory.earlier
        + 0.5 * torch.eye(len(delta), dtype=torch.float64)
    )
    assert worth(free @ memory.keys.T @ memory.residuals) < worth(delta)


def test_keys_that_are_orthogonal_in_the_metric_of_c_are_spared(memory):
    u = torch.linalg.inv(memory.moment) @ memory.keys.T
    keys = memory.draw(5, seed=7)
    spared = keys - keys @ u @ torch.linalg.pinv(u)
    euclidean = keys - keys @ torch.linalg.pinv(memory.keys) @ memory.keys
    for delta in (memory.memit(), memory.emmet()):
        torch.testing.assert_close(spared @ delta, torch.zeros(5, delta.shape[1]).double(), **EXACT)
        assert ((euclidean @ delta).norm(dim=1) > 1e-3).all()


def test_alphaedit_answers_nothing_outside_of_its_null_space(memory):
    delta = memory.alphaedit()
    outside = torch.eye(len(delta), dtype=torch.float64) - memory.projection
    torch.testing.assert_close(outside @ delta, torch.zeros_like(delta), **EXACT)
    keys = memory.draw(5, seed=7)
    torch.testing.assert_close(keys @ outside @ (memory.W + delta), keys @ outside @ memory.W, **EXACT)
    assert ((keys @ delta).norm(dim=1) > 1e-6).all()
    for careless in (memory.memit(), memory.emmet()):
        assert (outside @ careless).norm() > 1e-3


def test_the_null_space_update_is_the_published_formula(memory):
    spectrum = torch.linalg.eigvalsh(memory.moment)
    threshold = float(spectrum[len(spectrum) // 2 - 1 : len(spectrum) // 2 + 1].mean())
    projection = solve.null_space(memory.moment, threshold=threshold)
    torch.testing.assert_close(projection, editing.null_space(memory.moment, threshold), **EXACT)
    torch.testing.assert_close(projection @ projection, projection, **EXACT)
    found = solve.in_null_space(memory.keys, memory.residuals, projection, memory.earlier, 0.5)
    expected = editing.in_null_space(projection, memory.keys, memory.residuals, memory.earlier, 0.5)
    torch.testing.assert_close(dense(found), expected, **EXACT)
    forgetful = editing.in_null_space(projection, memory.keys, memory.residuals, memory.earlier[:0], 0.5)
    assert not torch.allclose(dense(found), forgetful, rtol=1e-3)
    with pytest.raises(ValueError, match="needed one of the two"):
        solve.null_space(memory.moment)
    with pytest.raises(ValueError, match="no direction is left"):
        solve.null_space(memory.moment, threshold=1e-9)


@pytest.mark.parametrize("update", ["memit", "emmet"])
def test_a_moment_from_samples_does_less_damage_than_none_and_the_least_in_the_limit(update):
    memory = Memory(3, 24, 10)

    def worth(delta):
        """What the editor makes small: damage, and (MEMIT) what it misses."""
        return memory.cost(delta) if update == "emmet" else memory.missed(delta) + 2.5 * memory.cost(delta)

    best = worth(getattr(memory, update)())

    def excess(count: int) -> float:
        found = []
        for seed in range(20):
            keys = memory.draw(count, seed=100 + seed)
            found.append(worth(getattr(memory, update)(moment=keys.T @ keys / count)) / best - 1)
        return sum(found) / len(found)

    at = {count: excess(count) for count in (240, 960, 3840)}
    plain = getattr(memory, update)(moment=torch.eye(24, dtype=torch.float64))
    assert 0 < at[240] < worth(plain) / best - 1
    # Of second order in the error of C, which falls as 1/sqrt(T): four times the tokens, a quarter.
    assert at[240] / at[960] == pytest.approx(4, rel=0.5)
    assert at[960] / at[3840] == pytest.approx(4, rel=0.5)


# ---------------------------------------------------------------------------------------- values of many facts


@pytest.mark.parametrize("where", ["mlp", "resid"])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2", "bloom"])
def test_many_values_at_once_are_each_as_alone(kind, arch, where):
    if kind == "hooked" and arch not in tiny.HOOKED:
        pytest.skip("no HookedTransformer of this architecture")
    model = shared(kind, arch)
    facts = [laws.FACT, laws.OTHER, laws.FACT.but(target_new=" Rome in Italy", subject="The Eiffel Tower")]
    fit = ValueFit(steps=6, lr=0.1, stop_below=3.0, clamp=0.75)
    options = {"where": where, "fit": fit, "prepend_bos": True, "progress": False}
    together = fit_values(model, facts, 1, laws.CONTEXTS, **options)
    alone = [fit_values(model, [fact], 1, laws.CONTEXTS, **options)[0] for fact in facts]
    in_pieces = fit_values(model, facts, 1, laws.CONTEXTS, memory=1e-6, **options)
    for one, other, piece in zip(together, alone, in_pieces, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=2e-4, abs=2e-5)
        torch.testing.assert_close(one.delta, other.delta, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(one.delta, piece.delta, rtol=2e-3, atol=2e-3)
        assert (one.stopped, one.clamped) == (other.stopped, other.clamped)
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0].delta, together[1].delta, atol=1e-2)


def test_packed_values_are_those_of_whole_sequences(kind, monkeypatch):
    model = shared(kind)
    packed = laws.fit_value(model, laws.FACT, 1, laws.CONTEXTS, fit=FIT, prepend_bos=True, progress=False)
    monkeypatch.setattr(Runner, "why_not_packed", lambda *_: "said so by a test")
    plain = laws.fit_value(model, laws.FACT, 1, laws.CONTEXTS, fit=FIT, prepend_bos=True, progress=False)
    assert packed.losses == pytest.approx(plain.losses, rel=2e-4)
    torch.testing.assert_close(packed.delta, plain.delta, rtol=2e-3, atol=2e-3)


# ---------------------------------------------------------------------------------------- weights of half the digits


ALL = {
    **EDITORS,
    "pmet": lambda stats: fe.Pmet(stats, weight=1.0, fit=FIT, contexts=laws.CONTEXTS, progress=False),
    "rome": lambda stats: fe.Rome(stats[1], fit=FIT, contexts=laws.CONTEXTS, progress=False),
}


@pytest.mark.filterwarnings("ignore::tl_factedit.editing.concerns.EditWarning")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_in_bfloat16_an_edit_is_solved_in_float64_and_rounded_once(kind, arch, name, monkeypatch):
    model = tiny.model(kind, arch, dtype=torch.bfloat16)
    stats = {layer: laws.stats(model, layer, n_tokens=2_000) for layer in LAYERS}
    seen = []
    step = Adam.step

    def watched(self, gradients):
        seen.extend((value.dtype, gradient.dtype) for value, gradient in zip(self.tensors, gradients, strict=True))
        step(self, gradients)

    monkeypatch.setattr(Adam, "step", watched)
    facts = FACTS[:1] if name == "rome" else FACTS
    edit = laws.leaves_everything_as_it_was(lambda: ALL[name](stats)(model, facts), model)
    assert set(seen) == {(torch.float32, torch.float32)}
    for delta, found in zip(edit.deltas, edit.diagnostics, strict=True):
        assert delta.left.dtype == delta.right.dtype == edit.keys[delta.layer].dtype == torch.float64
        assert not torch.equal(delta.dense.bfloat16().double(), delta.dense)
        site = down_proj(model, delta.layer)
        before, key = site.W.clone(), edit.keys[delta.layer]
        with edit.applied(model):
            assert site.W.dtype == torch.bfloat16
            assert torch.equal(site.W, (before.double() + delta.dense).bfloat16())
            moved = key @ (site.W.double() - before.double())
        wanted = key @ delta.dense
        lost = float((moved - wanted).norm() / wanted.norm())
        assert found.exactness == pytest.approx(lost, rel=1e-6)
        assert 1e-4 < lost < 0.5
    laws.comes_off_bit_for_bit(edit, model)


@pytest.mark.parametrize("name", ALL)
def test_in_float32_next_to_nothing_is_lost(kind, name):
    model = shared(kind)
    edit = ALL[name](stats_of(model))(model, FACTS[:1])
    assert max(found.exactness for found in edit.diagnostics) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_it_is_measured_how_much_is_added_at_other_tokens(kind, name):
    model = shared(kind)
    edit = ALL[name](stats_of(model))(model, FACTS[:1] if name == "rome" else FACTS)
    found = fe.editing.off_target_share(model, edit)
    for diagnostics in edit.diagnostics:
        assert diagnostics.off_target == pytest.approx(found[diagnostics.layer], rel=1e-3)
        assert min(diagnostics.off_target) > 0


# ---------------------------------------------------------------------------------------- bad input


@every
@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], "facts is empty"),
        ([laws.FACT.but(target_new=None)], "has no target_new"),
        ([laws.FACT, laws.FACT.but(target_new=" London")], "is asked for by two facts"),
    ],
)
def test_facts_that_cannot_be_written_are_refused(kind, name, facts, message):
    model = shared(kind)
    with laws.untouched(model), pytest.raises(ValueError, match=message):
        EDITORS[name](stats_of(model))(model, facts)


def test_one_fact_is_taken_and_one_prefix_or_edit_is_no_list():
    assert check_facts(laws.FACT) == (laws.FACT,)
    # Past the type checks of this test suite, which a user doesn't have.
    with pytest.raises(ValueError, match="needed a list of prefixes"):
        inspect.unwrap(check_contexts)(iter(["a", "b"]))
    with pytest.raises(ValueError, match="edits is one Edit, needed a list of them"):
        inspect.unwrap(fe.compose)(object.__new__(fe.Edit))


def test_choices_that_mean_nothing_are_refused(kind):
    model = shared(kind)
    stats = stats_of(model)
    for make, message in (
        (lambda: fe.Memit(stats, weight=0.0), "weight is 0.0, needed more than 0"),
        (lambda: fe.Memit({}), "stats is empty"),
        (lambda: fe.Memit({3: stats[1]}), "statistics of layer 1 under 3"),
        (lambda: fe.Emmet(stats, weight=-1.0), "weight is -1.0, needed 0 or more"),
        (lambda: fe.AlphaEdit(stats, threshold=1.0, share=0.1), "needed one of the two"),
        (lambda: fe.AlphaEdit(stats, weight=0.0), "weight is 0.0"),
        (lambda: fe.AlphaEdit(stats, share=2.0), "share is 2.0, needed more than 0 and less than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    other = tiny.model(kind, "gpt2", seed=1)
    with laws.untouched(other), pytest.raises(ValueError, match="key statistics are of"):
        EDITORS["memit"](stats)(other, FACTS)


def test_contexts_begin_with_the_words_given(kind):
    model = shared(kind)
    sampler = fe.stats.SampledContexts(lengths=((4, 6),), starts=("The", "John"))
    drawn = sampler.draw(model)
    assert drawn == sampler.draw(model)
    assert drawn[0] == ""
    assert [text.split()[0] for text in drawn[1:]] == ["The", "John", "The", "John"]
    assert not any("{" in text for text in drawn)
