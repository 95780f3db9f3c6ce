"""What is measured of a model says which edits were on it, and that they were made with another BOS policy."""

import warnings
from dataclasses import replace

import laws
import pytest
import tiny

import tl_factedit as fe

FIT = fe.ValueFit(steps=2, kl_weight=0.0)


def rome(model, bos: bool | None = None) -> fe.Edit:
    editor = fe.Rome(fe.KeyStats.identity(model, 1), fit=FIT, contexts=(), progress=False, prepend_bos=bos)
    return editor(model, [laws.FACT])


@pytest.fixture(scope="module")
def case(kind):
    model = tiny.model(kind, "gpt2")
    return model, rome(model)


RESULTS = {
    "evaluate": lambda model, bos: fe.evaluate(model, [laws.FACT], prepend_bos=bos),
    "answers": lambda model, bos: fe.answers(model, [laws.FACT], n_tokens=2, prepend_bos=bos, progress=False),
    "token_accuracy": lambda model, bos: fe.evaluation.token_accuracy(model, [laws.FACT], prepend_bos=bos),
    "causal_trace": lambda model, bos: fe.causal_trace(
        model, laws.FACT, corruption=fe.GaussianNoise(samples=1), prepend_bos=bos, progress=False
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_says_which_edits_were_on_and_tells_of_another_bos_policy(case, name):
    model, edit = case
    bos = edit.provenance.prepend_bos
    assert RESULTS[name](model, not bos).provenance.edits == ()
    with edit.applied(model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "the model doesn.t know")
            found = RESULTS[name](model, bos).provenance
        with pytest.warns(UserWarning, match=f"prepend_bos={not bos}, and 1 of 1 edits .* made with {bos}"):
            RESULTS[name](model, not bos)
    assert found.edits == (edit.digest,)
    assert fe.editing.Provenance.from_json(found.to_json()) == found
    assert found.origin() == replace(found, edits=()).origin()  # the weights say it; a reloaded copy goes on


def test_a_verdict_says_which_edits_were_on_the_model_before(case):
    model, edit = case
    other = fe.Rome(fe.KeyStats.identity(model, 1), fit=FIT, contexts=(), progress=False)(model, [laws.OTHER])
    with other.applied(model), pytest.warns(UserWarning, match="carries edits"):
        verdict = fe.audit(model, edit, [laws.FACT], progress=False)
    assert verdict.provenance.model.edits == verdict.before.provenance.edits == (other.digest,)
    assert verdict.after.provenance.edits == (other.digest, edit.digest)


def test_two_policies_are_not_compared(case):
    model, _ = case
    two = [fe.evaluate(model, [laws.FACT], prepend_bos=bos) for bos in (True, False)]
    with pytest.raises(ValueError, match="prepend_bos=True and after with False, needed one policy"):
        fe.show.scores(*two)
    said = fe.answers(model, [laws.FACT], n_tokens=2, prepend_bos=True, progress=False)
    for name, options in (("prepend_bos=True", {"prepend_bos": False}), ("n_tokens=2", {"n_tokens": 3})):
        options = {"n_tokens": 2, "prepend_bos": True, **options}
        with pytest.raises(ValueError, match=f"before was asked with {name} "):
            fe.answers(model, [laws.FACT], before=said, progress=False, **options)
