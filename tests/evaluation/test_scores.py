"""Scores are those of CounterFact, computed here once more in a plain loop over prompts and tokens."""

import functools
import math

import laws
import pytest
import tiny
import torch
from oracles import untouched

import tl_factedit as fe
from tl_factedit.backend.bridge import BridgeBackend
from tl_factedit.backend.hooked import HookedBackend
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.evaluation.scores import Answer, Scores, evaluate, scores_of

CLOSE = 2e-5  # mean float32 log-probabilities of size 1 to 10, from batches of another shape
MODELS = [("bridge", arch) for arch in ("gpt2", "llama", "qwen3", "bloom")]
MODELS += [("hooked", arch) for arch in ("gpt2", "llama")] if tiny.HAS_HOOKED else []
on_models = pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)

FACTS = [
    Fact(
        "The Eiffel Tower",
        "{} is located in the city of",
        " Paris",
        " Rome",
        paraphrases=["Where is {} ? In", "The Eiffel Tower is near"],  # a template, and a whole text
        neighbours=["The Louvre is in", "The Louvre Museum is located in the city of", "Big Ben is in"],
        id="eiffel",
    ),
    Fact(
        "Danielle Darrieux",
        "The mother tongue of {} is",
        " the French language",
        " English",
        paraphrases=["{} speaks"],
        neighbours=["Newton speaks", "Einstein speaks"],
        neighbour_targets=[" English", " the German language"],
    ),
    Fact("Big Ben", "{} stands in", " London", " Madrid", neighbours=["The Prado Museum is in"]),
    Fact("Anna", "{} works in", " Tokyo", " Cairo", paraphrases=["{} was born in", "{} lives in"]),
    Fact("Bob", "{} visit", " the Louvre Museum", " the Prado Museum"),
]


@functools.cache
def shared(kind: str, arch: str):
    return tiny.model(kind, arch)


@functools.cache
def scored(kind: str, arch: str) -> Scores:
    return evaluate(shared(kind, arch), FACTS)


# ---------------------------------------------------------------------------------------- the loop


def nll(model, prompt: str, target: str) -> float:
    """Mean over the target's tokens of −log softmax, one forward pass a token."""
    tok, bos = model.tokenizer, [model.tokenizer.bos_token_id] * bool(model.cfg.default_prepend_bos)
    ids = bos + tok(prompt, add_special_tokens=False)["input_ids"]
    losses = []
    for token in tok(target, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            losses.append(-float(model(torch.tensor([ids]))[0, -1].log_softmax(-1)[token]))
        ids.append(token)
    return sum(losses) / len(losses)


def prompts(fact: Fact) -> list[tuple[str, str, str]]:
    found = [("rewrite", fact.prompt.format(fact.subject), fact.target_true)]
    for text in fact.paraphrases:
        found.append(("paraphrase", text.replace("{}", fact.subject), fact.target_true))
    for i, text in enumerate(fact.neighbours):
        own = fact.neighbour_targets[i] if fact.neighbour_targets else fact.target_true
        found.append(("neighbour", text, own))
    return found


def loop(model, facts) -> dict[str, list[list[bool]]]:
    """Successes of each fact by kind."""
    found = {kind: [] for kind in ("rewrite", "paraphrase", "neighbour")}
    for fact in facts:
        mine = {kind: [] for kind in found}
        for kind, text, true in prompts(fact):
            if true == fact.target_new:
                continue  # nothing to compare
            nll_true, nll_new = nll(model, text, true), nll(model, text, fact.target_new)
            mine[kind].append(nll_true < nll_new if kind == "neighbour" else nll_true > nll_new)
        for kind, values in mine.items():
            found[kind].append(values)
    return found


def mean_of_means(facts: list[list[bool]]) -> float:
    shares = [sum(f) / len(f) for f in facts if f]
    return sum(shares) / len(shares)


@on_models
def test_the_likelihood_of_every_prompt_is_that_of_the_loop(kind, arch):
    model, scores = shared(kind, arch), scored(kind, arch)
    asked = [(i, *ask) for i, fact in enumerate(FACTS) for ask in prompts(fact)]
    assert [(a.fact, a.ask, a.prompt, a.true) for a in scores.answers] == asked
    for answer in scores.answers:
        assert answer.nll_true == pytest.approx(nll(model, answer.prompt, answer.true), abs=CLOSE)
        assert answer.nll_new == pytest.approx(nll(model, answer.prompt, FACTS[answer.fact].target_new), abs=CLOSE)
    assert len({round(a.nll_true, 3) for a in scores.answers}) > len(asked) // 2


@on_models
def test_the_scores_are_means_within_facts_then_over_facts(kind, arch):
    found, scores = loop(shared(kind, arch), FACTS), scored(kind, arch)
    means = {kind: mean_of_means(values) for kind, values in found.items()}
    assert scores.efficacy.mean == pytest.approx(means["rewrite"])
    assert scores.paraphrase.mean == pytest.approx(means["paraphrase"])
    assert scores.neighbourhood.mean == pytest.approx(means["neighbour"])
    harmonic = 0.0 if 0 in means.values() else 3 / sum(1 / mean for mean in means.values())
    assert scores.score.mean == pytest.approx(harmonic)
    assert (scores.efficacy.n, scores.paraphrase.n, scores.neighbourhood.n, scores.score.n) == (5, 3, 3, 2)


@on_models
def test_probabilities_are_the_geometric_mean_of_a_token_on_the_rewrite(kind, arch):
    model, scores = shared(kind, arch), scored(kind, arch)
    new = [math.exp(-nll(model, fact.text, fact.target_new)) for fact in FACTS]
    old = [math.exp(-nll(model, fact.text, fact.target_true)) for fact in FACTS]
    assert scores.p_new.mean == pytest.approx(sum(new) / 5, rel=1e-4)
    assert scores.p_old.mean == pytest.approx(sum(old) / 5, rel=1e-4)
    assert scores.p_new.mean != pytest.approx(scores.p_old.mean, rel=1e-2)


@pytest.mark.parametrize("batch_tokens", [1, 30])
@on_models
def test_the_size_of_a_batch_changes_no_number(kind, arch, batch_tokens):
    small, large = evaluate(shared(kind, arch), FACTS, batch_tokens=batch_tokens), scored(kind, arch)
    for a, b in zip(small.answers, large.answers, strict=True):
        assert a.nll_true == pytest.approx(b.nll_true, abs=CLOSE)
        assert a.nll_new == pytest.approx(b.nll_new, abs=CLOSE)
    assert (small.efficacy, small.neighbourhood) == (large.efficacy, large.neighbourhood)


@on_models
def test_bos_is_as_asked_and_recorded(kind, arch):
    model = shared(kind, arch)
    with_bos, without = (evaluate(model, FACTS, prepend_bos=bos) for bos in (True, False))
    assert (with_bos.provenance.prepend_bos, without.provenance.prepend_bos) == (True, False)
    assert abs(with_bos.answers[0].nll_true - without.answers[0].nll_true) > 1e-3
    default = with_bos if model.cfg.default_prepend_bos else without
    assert scored(kind, arch).answers == default.answers


def test_a_target_is_spelt_as_after_the_prompt_that_is_run(kind):
    # With BOS as text, "▁The" may be spelt otherwise at the very beginning; targets must follow the same ids.
    tok = tiny.tokenizer("spm")
    model = tiny.model(kind, "llama", tok=tok, n_layers=1)
    scores = evaluate(model, [Fact("Rome", "{} is in", " Italy", " Spain")], prepend_bos=True)
    ids = [tok.bos_token_id, *tok("Rome is in", add_special_tokens=False)["input_ids"]]
    whole = [tok.bos_token_id, *tok("Rome is in Italy", add_special_tokens=False)["input_ids"]]
    assert whole[: len(ids)] == ids
    with torch.no_grad():
        log_p = model(torch.tensor([whole]))[0].log_softmax(-1)
    want = -sum(float(log_p[i - 1, whole[i]]) for i in range(len(ids), len(whole))) / (len(whole) - len(ids))
    assert scores.answers[0].nll_true == pytest.approx(want, abs=CLOSE)


# ---------------------------------------------------------------------------------------- counting


def written(kind: str, fact: Fact, target: str, size: float = 50.0):
    """A model that says `target`'s first token after everything: the last MLP writes it whatever it is asked."""
    model = tiny.model(kind, "gpt2", tied=False)
    site, token = down_proj(model, 3), model.tokenizer(target, add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        site.bias.add_(size * model.W_U[:, token] / model.W_U[:, token].norm())
    return model


ONE = FACTS[0]


def test_a_model_that_always_says_the_new_object_has_no_neighbourhood_and_so_no_score(kind):
    scores = evaluate(written(kind, ONE, " Rome"), [ONE, ONE.but(prompt="{} stands in", id="again")])
    assert (scores.efficacy.mean, scores.paraphrase.mean, scores.neighbourhood.mean) == (1, 1, 0)
    assert scores.score.mean == 0
    assert scores.score.low == 0 < scores.score.high < 0.9  # two facts say little
    assert scores.p_new.mean > 0.5 > 0.1 > scores.p_old.mean


def test_a_model_that_always_says_the_old_object_is_the_opposite(kind):
    scores = evaluate(written(kind, ONE, " Paris"), [ONE])
    assert (scores.efficacy.mean, scores.paraphrase.mean, scores.neighbourhood.mean) == (0, 0, 1)
    assert scores.score.mean == 0
    assert scores.p_old.mean > 0.5 > 0.1 > scores.p_new.mean


def test_neighbours_are_asked_for_their_own_objects(kind):
    own = ONE.but(neighbours=["Big Ben is in"], neighbour_targets=[" London"])
    scores = evaluate(written(kind, ONE, " London"), [own])
    assert scores.neighbourhood.mean == 1
    assert scores.answers[-1].true == " London"
    assert evaluate(written(kind, ONE, " Rome"), [own]).neighbourhood.mean == 0


def test_objects_are_joined_to_every_prompt_that_is_asked(kind):
    fact = ONE.but(paraphrases=["{} is called “"], neighbours=["Big Ben is called “", "Big Ben is in"])
    asked = fact.but(prompt="{} is called “", target_true="Paris", target_new="Rome", paraphrases=())
    here, there = evaluate(shared(kind, "llama"), [fact]).answers, evaluate(shared(kind, "llama"), [asked]).answers
    joined = [("Paris", "Rome"), ("Paris", "Rome"), (" Paris", " Rome")]
    assert [(each.true, each.new) for each in here[1:]] == joined
    assert [(each.true, each.new) for each in there] == joined
    for one, other in zip(here[1:], there, strict=True):
        assert (one.nll_true, one.nll_new) == pytest.approx((other.nll_true, other.nll_new), abs=CLOSE)


@pytest.mark.parametrize(
    ("without", "scored_as"),
    [(("paraphrases",), "paraphrase"), (("neighbours",), "neighbourhood")],
    ids=["no paraphrase", "no neighbour"],
)
def test_facts_without_a_kind_of_prompt_do_not_count_for_it(kind, without, scored_as):
    model = shared(kind, "gpt2")
    bare = ONE.but(**dict.fromkeys(without, ()))
    scores = evaluate(model, [bare])
    assert getattr(scores, scored_as).n == 0
    assert math.isnan(getattr(scores, scored_as).mean)
    assert math.isnan(scores.score.mean)
    assert scores.score.n == 0
    assert scores.efficacy.n == 1
    both = evaluate(model, [bare.but(prompt="{} stands in"), ONE])
    assert getattr(both, scored_as).n == 1
    assert getattr(both, scored_as).mean == getattr(evaluate(model, [ONE]), scored_as).mean
    assert both.efficacy.n == 2


def test_one_fact_has_no_interval_and_two_have(kind):
    model = shared(kind, "gpt2")
    assert math.isnan(evaluate(model, ONE).efficacy.low)
    assert not math.isnan(evaluate(model, FACTS).efficacy.low)


@pytest.mark.parametrize(
    ("ask", "nll_true", "nll_new", "success"),
    [
        ("rewrite", 2.0, 1.0, True),
        ("rewrite", 1.0, 2.0, False),
        ("paraphrase", 2.0, 1.0, True),
        ("neighbour", 2.0, 1.0, False),
        ("neighbour", 1.0, 2.0, True),
        ("rewrite", 1.0, 1.0, False),
        ("neighbour", 1.0, 1.0, False),
    ],
)
def test_an_edit_is_to_win_on_rewrites_and_to_lose_on_neighbours_and_a_tie_wins_nothing(
    ask, nll_true, nll_new, success
):
    assert Answer(0, ask, "", " a", " b", nll_true, nll_new, False, 1, 1).success is success


def test_objects_that_begin_with_one_token_are_flagged(kind):
    scores = evaluate(shared(kind, "gpt2"), FACTS)
    assert [a.same_first_token for a in scores.answers if a.fact == 4] == [True]
    assert not any(a.same_first_token for a in scores.answers if a.fact == 0)
    # A neighbour is compared by its own object, which may begin otherwise.
    mixed = FACTS[4].but(neighbours=["Bob visit"], neighbour_targets=[" Rome"])
    assert [a.same_first_token for a in evaluate(shared(kind, "gpt2"), [mixed]).answers] == [True, False]


# ---------------------------------------------------------------------------------------- showing


def test_the_table_has_a_row_a_prompt(kind):
    pytest.importorskip("pandas")
    scores = evaluate(shared(kind, "gpt2"), FACTS)
    table = scores.table()
    assert len(table) == len(scores.answers) == sum(len(prompts(fact)) for fact in FACTS)
    assert list(table.fact[:6]) == ["eiffel"] * 6
    assert table.p_true[0] == pytest.approx(math.exp(-scores.answers[0].nll_true))
    assert table.success.tolist() == [a.success for a in scores.answers]
    assert "<table" in scores._repr_html_()


def test_scores_are_readable(kind):
    text = repr(evaluate(shared(kind, "gpt2"), [ONE.but(paraphrases=())]))
    assert "paraphrase not measured" in text
    assert "(n = 1: no interval)" in text
    assert "nan" not in text


# ---------------------------------------------------------------------------------------- the model stays


@on_models
def test_the_model_is_left_as_it_was_also_by_an_error(kind, arch, monkeypatch):
    model = untouched.used(tiny.model(kind, arch))
    model.train()
    next(iter(model.parameters())).requires_grad_(False)
    before = untouched.state(model)
    scores = evaluate(model, FACTS)
    assert untouched.state(model) == before
    # dropout, which gpt2's config has, would show
    assert scores.answers == scored(kind, arch).answers

    def refuse(*_, **__):
        raise KeyboardInterrupt

    for backend in (HookedBackend, BridgeBackend):
        monkeypatch.setattr(backend, "logits", refuse)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, FACTS)
    assert untouched.state(model) == before


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], "facts is empty, needed at least one"),
        ([ONE, FACTS[2].but(target_new=None)], r"fact 'Big Ben' has no target_new.*fact.but\(target_new="),
    ],
)
def test_what_cannot_be_scored_is_named_before_anything_is_run(kind, facts, message, monkeypatch):
    monkeypatch.setattr(Runner, "logits", None)
    with pytest.raises(ValueError, match=message):
        evaluate(shared(kind, "gpt2"), facts)


@pytest.mark.filterwarnings("ignore:target 'ity' goes on inside", "ignore:target 'old' goes on inside")
def test_a_target_that_merges_with_its_prompt_is_named_before_anything_is_run(kind, monkeypatch):
    model = tiny.model(kind, "llama", tok=tiny.tokenizer("bytebpe"), n_layers=1)
    monkeypatch.setattr(Runner, "logits", None)
    with pytest.raises(ValueError, match="merges with the last token of 'Rome is near the c'"):
        evaluate(model, [Fact("Rome", "{} is near the c", "ity", "old")])


def test_a_prompt_whose_objects_are_one_compares_nothing(kind):
    model = shared(kind, "gpt2")
    fact = FACTS[0].but(neighbours=["The Louvre is in", "Big Ben is in"], neighbour_targets=[" Rome", " London"])
    found = evaluate(model, [fact])
    (same, other) = [answer for answer in found.answers if answer.ask == "neighbour"]
    assert not same.compared and not same.success and other.compared
    assert found.neighbourhood.mean == float(other.success)
    assert evaluate(model, [fact.but(target_new=fact.target_true)]).efficacy.n == 0


def test_logits_that_are_nan_are_not_measured_rather_than_failed(kind):
    model = tiny.model(kind, "gpt2")
    with torch.no_grad():
        next(iter(model.blocks[1].parameters())).fill_(torch.nan)
    found = evaluate(model, FACTS)
    for estimate in (found.efficacy, found.paraphrase, found.neighbourhood, found.score, found.p_new):
        assert estimate.n == 0 and math.isnan(estimate.mean)


def test_a_fact_given_twice_is_refused(kind):
    with pytest.raises(ValueError, match="'eiffel' is given twice, needed each once"):
        evaluate(shared(kind, "gpt2"), [*FACTS, FACTS[0]])


def test_a_score_without_spread_has_the_ends_of_what_it_is_made_of():
    facts = tuple(FACTS[0].but(id=str(i)) for i in range(8))
    scored_once = scored("bridge", "gpt2")

    def of(success: bool):
        answers = tuple(
            Answer(i, ask, "", " a", " b", 2.0, 1.0, False, 1, 1)
            if success == (ask != "neighbour")
            else Answer(i, ask, "", " a", " b", 1.0, 2.0, False, 1, 1)
            for i in range(8)
            for ask in ("rewrite", "paraphrase", "neighbour")
        )
        return scores_of(facts, answers, scored_once.provenance)

    all_right = of(True)
    assert all_right.score.mean == 1.0 and all_right.score.high == 1.0
    assert all_right.score.low == pytest.approx(all_right.efficacy.low) and 0.6 < all_right.score.low < 0.7
    none = of(False)
    assert none.score.mean == none.score.low == 0.0 and none.score.high == pytest.approx(none.efficacy.high)


def test_a_fact_under_two_ids_or_cut_in_two_ways_is_one(kind):
    model = tiny.model(kind, "gpt2")
    for again in (
        laws.FACT.but(id="another"),
        laws.FACT.but(subject="Eiffel Tower", prompt="The {} is located in the city of", id="another"),
    ):
        for call in (fe.evaluate, fe.evaluation.token_accuracy, fe.answers):
            with pytest.raises(ValueError, match=r"fact 'another' is given twice \(as"):
                call(model, [laws.FACT, again])
        with pytest.raises(ValueError, match="given twice"):
            fe.causal_trace(model, [laws.FACT, again], progress=False)
