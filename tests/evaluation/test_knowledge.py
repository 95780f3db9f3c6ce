"""What a model knows is what it says: asked here once more in a plain loop, one forward pass a token."""

import functools

import pytest
import tiny
import torch
from oracles import untouched

import tl_factedit as fe
from tl_factedit.core.facts import Fact

CLOSE = 2e-5  # float32 log-probabilities of size 1 to 10, from batches of another shape
MODELS = [("bridge", arch) for arch in ("gpt2", "llama", "gemma2")]
MODELS += [("hooked", arch) for arch in ("gpt2", "llama")] if tiny.HAS_HOOKED else []
on_models = pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)

FACTS = [
    Fact("The Eiffel Tower", "{} is located in the city of", " Paris"),
    Fact("Danielle Darrieux", "The mother tongue of {} is", " the French language", id="mother tongue"),
    Fact("Big Ben", "{} stands in", " London", " Madrid"),
    Fact("Anna", "{} works in", " Tokyo"),
]


@functools.cache
def shared(kind: str, arch: str):
    return tiny.model(kind, arch)


def asked(model, fact: Fact) -> tuple[str, int, float, bool]:
    """Top token, rank, probability and whether it is known, one forward pass a token."""
    tok, bos = model.tokenizer, [model.tokenizer.bos_token_id] * bool(model.cfg.default_prepend_bos)
    ids = bos + tok(fact.text, add_special_tokens=False)["input_ids"]
    target = tok(fact.target_true, add_special_tokens=False)["input_ids"]
    p, top, rank = 1.0, None, None
    for token in target:
        with torch.no_grad():
            found = model(torch.tensor([ids]))[0, -1].softmax(-1).tolist()
        if top is None:
            top = max(range(len(found)), key=found.__getitem__)
            rank = 1 + sum(other > found[token] for other in found)
        p *= found[token]
        ids.append(token)
    return tok.decode([top]), rank, p, top == target[0]


@on_models
def test_each_fact_is_asked_as_the_loop_asks_it(kind, arch):
    model = untouched.used(shared(kind, arch))
    before = untouched.state(model)
    # A fact whose object is what this model says, and one that goes on from there.
    all_said = [(fact, asked(model, fact)[0]) for fact in FACTS]
    fact, said = next(each for each in all_said if each[1].strip() not in model.tokenizer.all_special_tokens)
    facts = [*FACTS, *(fact.but(target_true=f" {said.strip()}{then}") for then in ("", " London"))]
    table = fe.known(model, facts)
    assert untouched.state(model) == before
    assert list(table.columns) == ["fact", "top", "rank", "p", "known"]
    assert list(table.fact) == [fact.name for fact in facts]
    for fact, row in zip(facts, table.itertuples(), strict=True):
        top, rank, p, known = asked(model, fact)
        assert (row.top, row.rank, row.known) == (top, rank, known)
        assert row.p == pytest.approx(p, rel=CLOSE * len(fact.target_true.split()))
    assert list(table.known) == [False] * 4 + [True, True]
    assert list(table["rank"][-2:]) == [1, 1]
    one = fe.known(model, facts[1])
    assert one.p[0] == pytest.approx(table.p[1], rel=CLOSE) and len(one) == 1


def test_the_batches_do_not_matter():
    model = shared("bridge", "gpt2")
    whole, single = fe.known(model, FACTS), fe.known(model, FACTS, batch_tokens=1)
    assert whole.drop(columns="p").equals(single.drop(columns="p"))
    torch.testing.assert_close(torch.tensor(whole.p), torch.tensor(single.p), rtol=CLOSE, atol=0)


def test_bos_is_the_models_own_or_as_told():
    model = shared("bridge", "gpt2")
    default = bool(model.cfg.default_prepend_bos)
    assert fe.known(model, FACTS).equals(fe.known(model, FACTS, prepend_bos=default))
    assert not fe.known(model, FACTS).p.equals(fe.known(model, FACTS, prepend_bos=not default).p)


def test_the_organism_knows_its_people_and_no_strangers():
    model = fe.models.organism()
    people = fe.known(model, fe.models.organism_facts("city", "oracle0", 100))
    strangers = fe.known(model, fe.models.organism_facts("city", "strangers"))
    assert people.known.all() and people.p.min() > 0.9
    assert strangers.known.mean() < 0.15  # by chance 1 in 16
    cities = {fact.target_true.strip() for fact in fe.models.organism_facts("city", "calibration")}
    assert strangers.top.isin(cities).mean() > 0.9  # it does say a city


def test_nothing_is_known_to_a_model_whose_numbers_overflow():
    model = tiny.model("bridge", "gpt2")
    with torch.no_grad():
        model.blocks[-1].mlp.out.weight.fill_(float("nan"))
    table = fe.known(model, FACTS)
    assert not table.known.any()
    assert table["rank"].isna().all() and table.p.isna().all() and set(table.top) == {""}


def says_a_space(*then: int):
    """A model that says a token of white space alone after `TOWER`, and these tokens after that."""
    tok = tiny.tokenizer("bytebpe")
    hf = tiny.hf_model("llama", tok=tok, tied=False)
    ids = [tok.bos_token_id, *tok(TOWER.text, add_special_tokens=False)["input_ids"]]
    length = 10 * hf.lm_head.weight.detach().norm(dim=-1).max()
    (space,) = tok(" ", add_special_tokens=False)["input_ids"]
    for token in (space, *then):
        with torch.no_grad():
            ends = hf.model(torch.tensor([ids])).last_hidden_state[0, -1]
            hf.lm_head.weight[token] = length * ends / ends.norm()
        ids.append(token)
    return tiny.around(hf, tok)


TOWER = Fact("Tokyo Tower", "{} is located in", " 東京")


@pytest.mark.parametrize("ask", ["known", "trace"])
def test_who_says_only_a_space_or_half_a_character_of_an_object_does_not_know_it(ask):
    tok = tiny.tokenizer("bytebpe")
    space, byte, rest = tok(" 東京", add_special_tokens=False)["input_ids"]
    assert tok.decode([space]) == " "

    def asked(model) -> tuple[str, bool]:
        if ask == "known":
            (row,) = fe.known(model, TOWER, prepend_bos=True).itertuples()
            assert (row.rank == 1) == row.known
            return row.top, bool(row.known)
        noise = fe.GaussianNoise(sigma=1.0, samples=1)
        found = fe.causal_trace(model, TOWER, corruption=noise, prepend_bos=True, progress=False)
        return found.top[0], found.known[0]

    top, known = asked(says_a_space(tok("Z", add_special_tokens=False)["input_ids"][0]))
    assert (top, known) == (" Z", False)
    top, known = asked(says_a_space(byte))
    assert not known, "the first byte of a character is that of many"
    top, known = asked(says_a_space(byte, rest))
    assert (top, known) == (tok.decode([space, byte, rest]), True)


def test_what_cannot_be_asked_is_refused():
    model = shared("bridge", "gpt2")
    with pytest.raises(ValueError, match="facts is empty"):
        fe.known(model, [])
