"""Under a paper's name stands what its code does: each preset against a literal copy, and each way out of it."""

import functools
import warnings

import pytest
import tiny
import torch
from oracles import tracing

import tl_factedit as fe
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import frozen
from tl_factedit.core.tokens import align
from tl_factedit.locate.filters import greedy

KINDS = [(kind, arch) for arch in ("gpt2", "llama") for kind in tiny.KINDS]
PROMPTS = {"The Eiffel Tower": "{} is located in the city of", "Big Ben": "Where is {} ? in", "Anna": "{} was born in"}
EXACT = 1e-5


@functools.cache
def shared(kind: str, arch: str = "gpt2"):
    return tiny.model(kind, arch)


def says(model, text: str) -> str:
    """The token that comes first, as text."""
    with torch.no_grad():
        top = int(model(model.to_tokens(text, prepend_bos=False))[0, -1].argmax())
    return model.tokenizer.decode([top])


def facts(model, *, known: bool = True) -> list[fe.Fact]:
    """Facts that a random model knows; or whose object it never puts first."""
    found = []
    for subject, prompt in PROMPTS.items():
        top = says(model, prompt.replace("{}", subject))
        target = top if known else next(word for word in ("Rome", "Paris") if word != top.strip())
        found.append(fe.Fact(subject, prompt, " " + target.strip()))
    return found


@pytest.mark.parametrize(("component", "window"), [("resid", 1), ("mlp", 10), ("attn", 10)])
@pytest.mark.parametrize(("kind", "arch"), KINDS)
def test_meng_is_the_script_cell_by_cell(kind, arch, component, window):
    model = shared(kind, arch)
    asked = facts(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = fe.locate.meng2022(model, asked, component, progress=False)
    assert (trace.window, trace.metric, trace.provenance.prepend_bos) == (window, "top_prob", False)
    assert trace.facts == tuple(asked) and all(trace.known)
    noise = trace.corruption
    assert (noise.scale, noise.samples, noise.seed) == (3.0, 10, 1)
    assert noise.sigma == pytest.approx(tracing.embedding_std(model, list(PROMPTS)), rel=1e-6)
    for i, fact in enumerate(asked):
        row = align(model.tokenizer, fact, prepend_bos=False)
        drawn = noise.noise(row.subject[1] - row.subject[0], 32).float()
        high, low, scores = tracing.hidden_flow(model, row.ids, row.subject, drawn, component, window)
        assert float(trace.clean[i]) == pytest.approx(float(high), abs=EXACT)
        assert float(trace.corrupted[i]) == pytest.approx(float(low), abs=EXACT)
        assert (trace.effect[i, :, : len(row.ids)] + low - scores).abs().max() < EXACT


def test_sigma_is_over_subjects_alone_and_not_as_they_stand_in_their_prompts(kind):
    tok = tiny.tokenizer("bytebpe")
    model = tiny.model(kind, "llama", tok=tok)
    fact = fe.Fact("Paris", "The city of {} is in", " France")
    alone, inside = (tok(text, add_special_tokens=False)["input_ids"] for text in ("Paris", " Paris"))
    assert alone != inside, "nothing is tested here"
    trace = fe.locate.meng2022(model, fact, unknown="trace", progress=False)
    assert trace.corruption.sigma == pytest.approx(tracing.embedding_std(model, ["Paris"]), rel=1e-6)
    assert trace.corruption.sigma != pytest.approx(tracing.embedding_std(model, [" Paris"]), rel=1e-3)
    ours = fe.locate.meng2022(
        model, fact, corruption=fe.GaussianNoise(3.0, seed=1), unknown="trace", progress=False
    ).corruption.sigma
    assert ours == pytest.approx(tracing.embedding_std(model, [" Paris"]), rel=1e-6)


def test_the_sigma_of_all_known_facts_can_be_given_to_few(kind):
    model = shared(kind)
    sigma = fe.locate.embedding_std(model, list(PROMPTS))
    noise = fe.GaussianNoise(3.0, samples=10, seed=1, sigma=sigma)
    one = facts(model)[0]
    few = fe.locate.meng2022(model, one, corruption=noise, progress=False)
    assert few.corruption == noise
    of_all = fe.locate.meng2022(model, facts(model), progress=False)
    i = of_all.facts.index(one)
    assert torch.allclose(few.effect[0], of_all.effect[i, :, : few.effect.shape[2]], atol=EXACT)


@pytest.mark.parametrize("preset", ["meng2022", "hase2023"])
def test_what_the_model_does_not_answer_is_left_out_and_that_is_said(kind, preset):
    model, run = shared(kind), getattr(fe.locate, preset)
    good, bad = facts(model), [fact.but(id="bad") for fact in facts(model, known=False)[:1]]
    bad = [fact.but(target_true=" Danielle Darrieux") for fact in bad]
    with pytest.warns(UserWarning, match="1 of 3 facts are left out, as in the published experiment"):
        trace = run(model, [*bad, *good[1:]], progress=False)
    assert trace.facts == tuple(good[1:])
    with pytest.raises(ValueError, match=r"answers none of 1 facts: after .* it says .* unknown='trace'"):
        run(model, bad, progress=False)
    with pytest.warns(UserWarning, match="doesn't know 1 of 1"):
        kept = run(model, bad, unknown="trace", progress=False)
    assert kept.known == (False,)


def test_an_object_of_several_tokens_is_no_answer_of_one_token(kind):
    """As in the script, which compares the whole attribute with the one token that comes first."""
    model = shared(kind)
    one = facts(model)[0]
    two = one.but(target_true=f"{one.target_true} Paris")
    with pytest.raises(ValueError, match="answers none of 1 facts"):
        fe.locate.meng2022(model, two, progress=False)
    top = fe.locate.meng2022(model, two, unknown="trace", progress=False)
    whole = fe.locate.meng2022(model, two, unknown="trace", answer="object", progress=False)
    plain = fe.locate.meng2022(model, one, progress=False)
    assert torch.allclose(top.effect, plain.effect, atol=EXACT)
    assert (whole.metric, top.metric) == ("prob", "top_prob")
    assert float(whole.clean[0]) < float(top.clean[0])


def test_hase_asks_for_the_whole_object_in_windows_of_five(kind):
    model = shared(kind)
    row = align(model.tokenizer, facts(model)[0], prepend_bos=False)
    with frozen(model), torch.no_grad():
        (said,) = greedy(Runner(model), [row.ids], 3)
    # Not what comes first, but among what is said: kept by Hase et al. and left out by Meng et al.
    target = " ".join(model.tokenizer.decode([token]) for token in said[1:3])
    fact = facts(model)[0].but(target_true=" " + target)
    trace = fe.locate.hase2023(model, fact, progress=False)
    assert (trace.component, trace.window, trace.metric) == ("mlp", 5, "prob")
    assert trace.corruption == fe.GaussianNoise(3.0, 10, seed=1, sigma=fe.locate.embedding_std(model, [fact.subject]))
    asked = align(model.tokenizer, fact, prepend_bos=False)
    prompt = tracing.TracedPrompt(asked.ids, asked.subject, asked.true_ids)
    drawn = trace.corruption.noise(asked.subject[1] - asked.subject[0], 32).float()
    want = tracing.trace(model, prompt, drawn, component="mlp", window=5)
    assert (trace.sample_effect[0] - want.effect).abs().max() < EXACT
    fixed = fe.locate.hase2023(model, fact, corruption=fe.GaussianNoise(0.094, seed=1, sigma=1.0), progress=False)
    assert fixed.corruption.sigma == 1.0


def test_zhang_replaces_tokens_and_compares_logits(kind):
    model = shared(kind)
    asked = [fact.but(prompt="{} is located in the city of") for fact in facts(model)[:1]]
    asked += [asked[0].but(subject="Paris", target_true=" Rome")]
    with pytest.raises(ValueError, match="none of 2 facts has a donor"):
        fe.locate.zhang2023(model, asked, progress=False)
    subjects = ("Rome", "London", "Paris", "Berlin", "Madrid", "Anna", "Newton", "Bob")
    known = [fe.Fact(subject, "{} is in", " " + says(model, f"{subject} is in").strip()) for subject in subjects]
    first = known[0]
    other = next(fact for fact in known if fact.target_true != first.target_true)
    trace = fe.locate.zhang2023(model, [first, other], prepend_bos=False, window=3, progress=False)
    assert (trace.metric, trace.window) == ("logit_diff", 3)
    assert trace.donors == ((other.subject,), (first.subject,))


def test_greedy_decoding_is_one_token_at_a_time(kind):
    model = shared(kind)
    rows = [model.to_tokens(text, prepend_bos=False)[0] for text in ("Rome is", "The Eiffel Tower is in", "Big")]
    with frozen(model), torch.no_grad():
        found = greedy(Runner(model), rows, 4)
        for row, said in zip(rows, found, strict=True):
            ids = row
            for token in said:
                assert int(model(ids[None])[0, -1].argmax()) == token
                ids = torch.cat([ids, torch.tensor([token])])
        near_the_end = torch.randint(4, 60, (tiny.N_CTX - 1,), generator=torch.Generator().manual_seed(0))
        assert len(greedy(Runner(model), [near_the_end], 36)[0]) == 2, "no more than the context has room for"


@pytest.mark.parametrize("option", [{"answer": "first"}, {"unknown": "drop"}])
def test_other_options_are_refused(kind, option):
    inner = fe.locate.meng2022
    while hasattr(inner, "__wrapped__"):  # past the type checks of this test suite, which a user doesn't have
        inner = inner.__wrapped__
    with pytest.raises(ValueError, match=r"(answer|unknown) is '(first|drop)', needed"):
        inner(shared(kind), facts(shared(kind)), **option)


@pytest.mark.parametrize("subjects", ["Rome", [], [None]])
def test_a_spread_is_of_a_list_of_texts(kind, subjects):
    inner = fe.locate.embedding_std
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    with pytest.raises(ValueError, match="needed a list of texts"):
        inner(shared(kind), subjects)
