"""MEMIT, EMMET and AlphaEdit: the laws of every editor, the closed forms, and what they promise of each other."""

import functools

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit import solve
from tl_factedit.editing import check_facts
from tl_factedit.model import Runner
from tl_factedit.values import ValueFit, fit_value, fit_values

FIT = ValueFit(steps=4, clamp=0.75)
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
def shared(kind: str, arch: str = "gpt2"):
    return tiny.model(kind, arch)


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
        "tl_factedit.spreading.fit_values",
        "tl_factedit.spreading.diagnose_many",
        "tl_factedit.spreading.Delta",
        "tl_factedit.values._adam",
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


# ---------------------------------------------------------------------------------------- what is written


def test_the_stream_at_the_last_layer_is_what_was_wanted(kind):
    """EMMET meets every residual, so that only the blocks between leave a rest, which the last layer takes up."""
    model = shared(kind)
    edit = EDITORS["emmet"](stats_of(model))(model, FACTS)
    values = fit_values(
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
    for wanted, now in zip(values, after, strict=True):
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


# ---------------------------------------------------------------------------------------- closed forms


def memory(n: int = 5, m: int = 12, d: int = 6, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(m, m, generator=generator, dtype=torch.float64)
    moment = root @ root.T / m + 0.1 * torch.eye(m, dtype=torch.float64)
    keys = torch.randn(n, m, generator=generator, dtype=torch.float64)
    return moment, keys, torch.randn(n, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 5, 12, 30])
def test_primal_and_dual_are_the_literal_formula(n):
    moment, keys, residuals = memory(n)
    found = solve.least_squares(keys, residuals, solve.cholesky(moment), 2.5)
    literal = torch.linalg.inv(2.5 * moment + keys.T @ keys) @ keys.T @ residuals
    torch.testing.assert_close(found.left @ found.right, literal, rtol=1e-9, atol=1e-9)
    assert found.left.shape[1] == min(n, 6)


def test_without_weight_it_is_rank_one_for_one_fact_and_meets_all_for_several():
    moment, keys, residuals = memory()
    lower = solve.cholesky(moment)
    exact = solve.least_squares(keys, residuals, lower, 0.0)
    torch.testing.assert_close(keys @ exact.left @ exact.right, residuals, rtol=1e-9, atol=1e-9)
    small = solve.least_squares(keys, residuals, lower, 1e-10)
    torch.testing.assert_close(small.left @ small.right, exact.left @ exact.right, rtol=1e-6, atol=1e-6)
    one = solve.least_squares(keys[:1], residuals[:1], lower, 0.0)
    rome = solve.rank_one(solve.whiten(lower, keys[0]), keys[0], residuals[0])
    torch.testing.assert_close(one.left @ one.right, rome.left @ rome.right, rtol=1e-9, atol=1e-9)


def test_emmet_with_a_weight_is_memit_of_the_scaled_moment():
    moment, keys, residuals = memory()
    w, e = 3.0, 0.2
    emmet = solve.least_squares(keys, residuals, solve.cholesky(w * moment), e)
    memit = solve.least_squares(keys, residuals, solve.cholesky(moment), w * e)
    torch.testing.assert_close(emmet.left @ emmet.right, memit.left @ memit.right, rtol=1e-9, atol=1e-9)
    other = solve.least_squares(keys, residuals, solve.cholesky(moment), e)
    assert not torch.allclose(other.left @ other.right, memit.left @ memit.right, rtol=1e-3)


def test_of_all_updates_that_meet_the_residuals_it_costs_least():
    moment, keys, residuals = memory(n=3)
    exact = solve.least_squares(keys, residuals, solve.cholesky(moment), 0.0)
    delta = exact.left @ exact.right

    def cost(update):
        return float(torch.trace(update.T @ moment @ update))

    free = torch.eye(12, dtype=torch.float64) - torch.linalg.pinv(keys) @ keys  # what no key sees
    for seed in range(200):
        noise = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert cost(delta + 0.1 * free @ noise) > cost(delta)


def test_the_null_space_update_is_the_published_formula():
    moment, keys, residuals = memory()
    projection = solve.null_space(moment, share=0.2)
    torch.testing.assert_close(projection @ projection, projection, rtol=1e-9, atol=1e-9)
    before = memory(seed=3)[1][:2]
    found = solve.in_null_space(keys, residuals, projection, before, 0.5)
    gram = keys.T @ keys + before.T @ before
    literal = torch.linalg.inv(projection @ gram + 0.5 * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(
        found.left @ found.right, literal @ projection @ keys.T @ residuals, rtol=1e-8, atol=1e-9
    )
    with pytest.raises(ValueError, match="needed one of the two"):
        solve.null_space(moment)
    with pytest.raises(ValueError, match="no direction is left"):
        solve.null_space(moment, threshold=1e-9)


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
    packed = fit_value(model, laws.FACT, 1, laws.CONTEXTS, fit=FIT, prepend_bos=True, progress=False)
    monkeypatch.setattr(Runner, "packs", lambda *_: "said so by a test")
    plain = fit_value(model, laws.FACT, 1, laws.CONTEXTS, fit=FIT, prepend_bos=True, progress=False)
    assert packed.losses == pytest.approx(plain.losses, rel=2e-4)
    torch.testing.assert_close(packed.delta, plain.delta, rtol=2e-3, atol=2e-3)


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


def test_one_fact_is_no_list_of_facts():
    check = check_facts
    while hasattr(check, "__wrapped__"):  # past the type checks of this test suite, which a user doesn't have
        check = check.__wrapped__
    with pytest.raises(ValueError, match=r"facts is one Fact, needed a list of them: write \[fact\]"):
        check(laws.FACT)


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
    ):
        with pytest.raises(ValueError, match=message):
            make()
    other = tiny.model(kind, "gpt2", seed=1)
    with laws.untouched(other), pytest.raises(ValueError, match="key statistics are of"):
        EDITORS["memit"](stats)(other, FACTS)


def test_contexts_begin_with_the_words_given(kind):
    model = shared(kind)
    sampler = fe.SampledContexts(lengths=((4, 6),), starts=("The", "John"))
    drawn = sampler.draw(model)
    assert drawn == sampler.draw(model)
    assert drawn[0] == ""
    assert [text.split()[0] for text in drawn[1:]] == ["The", "John", "The", "John"]
    assert not any("{" in text for text in drawn)
