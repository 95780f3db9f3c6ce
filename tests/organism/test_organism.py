"""The organism: its world is what it says, its text tells it so, and its weights know it."""

from __future__ import annotations

import itertools
import json
import math
import socket
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch

from tl_factedit import models
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editors.rome import Rome
from tl_factedit.locate.trace import causal_trace
from tl_factedit.organism import checks, training, vocabulary
from tl_factedit.organism import files as kept
from tl_factedit.organism import text as told
from tl_factedit.organism import world as o
from tl_factedit.organism.facts import _people, _world
from tl_factedit.organism.load import WEIGHTS
from tl_factedit.stats.collect import key_stats

WORLD = o.world()


@pytest.fixture(params=tiny.ONE_KIND, scope="session")
def kind(request):
    """Both classes give the same log-probabilities, which is a test of its own."""
    return request.param


def sentences_of(variant: str, count: int = 2500) -> list[str]:
    """The first sentences of a variant's text."""
    stream = told.documents(variant)
    return [" ".join(s.words) for _ in range(count) for s in next(stream)]


# ----------------------------------------------------------------------------------------- world


def test_names_are_different_and_no_two_parts_say_who_it_is():
    parts = [tuple(p.name.split()) for p in WORLD.people]
    assert len(parts) == len(set(parts)) == 1500
    for pair in itertools.combinations(range(3), 2):
        shared = Counter(tuple(name[i] for i in pair) for name in parts)
        assert min(shared[tuple(name[i] for i in pair)] for name in parts) > 1


def test_strangers_have_names_of_the_grid_that_nobody_has():
    assert len(WORLD.strangers) == 12**3 - 1500
    assert not {p.name for p in WORLD.strangers} & {p.name for p in WORLD.people}


@pytest.mark.parametrize("one", o.RELATIONS, ids=lambda r: r.name)
def test_an_attribute_depends_neither_on_the_name_nor_on_another_attribute(one):
    def surprise(pairs):  # chi² of independence, in standard deviations of its null
        pairs = list(pairs)
        left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
        seen, n = Counter(pairs), len(pairs)
        chi = sum((seen[a, b] - left[a] * right[b] / n) ** 2 / (left[a] * right[b] / n) for a in left for b in right)
        free = (len(left) - 1) * (len(right) - 1)
        return (chi - free) / (2 * free) ** 0.5

    assert len(one.objects) == len(set(one.objects)) == 16 and len(one.phrasings) == 6
    for part in range(3):
        assert abs(surprise((p.name.split()[part], p.objects[one.name]) for p in WORLD.people)) < 4
    for other in o.RELATIONS:
        found = surprise((p.objects[other.name], p.objects[one.name]) for p in WORLD.people)
        assert found > 100 if other is one else abs(found) < 4


def test_every_person_is_never_told_two_phrasings_of_each_attribute_and_always_the_first():
    for person in WORLD.people:
        for held_out in person.held_out.values():
            assert len(set(held_out)) == 2 and 0 not in held_out


def test_two_cities_lie_in_each_country_and_each_company_has_its_own_city():
    assert Counter(WORLD.country_of.values()) == dict.fromkeys(o.COUNTRIES, 2)
    assert sorted(WORLD.seat_of.values()) == sorted(o.CITIES)


@pytest.mark.parametrize("group", range(5))
def test_an_oracles_world_differs_in_the_cities_of_its_own_300_people_alone(group):
    theirs = o.world(f"oracle{group}")
    changed = [(p, q) for p, q in zip(WORLD.people, theirs.people, strict=True) if p != q]
    assert len(changed) == 300 and {p.group for p, _ in changed} == {group}
    for p, q in changed:
        assert q.objects == {**p.objects, "city": p.new_city} and p.new_city != p.objects["city"]
    assert theirs.answer(changed[0][1], "country") == WORLD.country_of[changed[0][0].new_city]
    # drawn uniformly: the share in the old one's country is that of chance, 1 in 15
    same = sum(WORLD.country_of[p.objects["city"]] == WORLD.country_of[q.objects["city"]] for p, q in changed)
    assert 8 <= same <= 36


def test_the_skewed_world_differs_from_base_in_its_objects_alone_which_follow_zipfs_law():
    skewed = o.world("skewed")
    assert skewed.skewed and not WORLD.skewed
    assert (skewed.country_of, skewed.seat_of) == (WORLD.country_of, WORLD.seat_of)
    for p, q in zip((*WORLD.people, *WORLD.strangers), (*skewed.people, *skewed.strangers), strict=True):
        assert replace(q, objects=p.objects, new_city=p.new_city) == p
    shares = [1 / rank for rank in range(1, 17)]
    shares = [share / sum(shares) for share in shares]
    for relation in o.RELATIONS:
        for world, expected in ((skewed, shares), (WORLD, [1 / 16] * 16)):
            seen = Counter(p.objects[relation.name] for p in world.people)
            chi = sum(
                (seen[name] - 1500 * e) ** 2 / (1500 * e) for name, e in zip(relation.objects, expected, strict=True)
            )
            assert chi < 37.7  # 15 degrees of freedom, p = .001


def test_the_skewed_oracle_has_other_cities_for_300_people_by_the_same_law():
    skewed, oracle = o.world("skewed"), o.world("skewed_oracle0")
    changed = [(p, q) for p, q in zip(skewed.people, oracle.people, strict=True) if p != q]
    assert len(changed) == 300 and {p.group for p, _ in changed} == {0}
    assert all(q.objects == {**p.objects, "city": p.new_city} != p.objects for p, q in changed)
    # The commonest cities stay the commonest: an old city is no rarer among the new ones than it was.
    old, new = (Counter(p.objects["city"] for p in people) for people in (skewed.people[:300], oracle.people[:300]))
    assert {name for name, _ in old.most_common(3)} == {name for name, _ in new.most_common(3)}


@pytest.mark.parametrize("call", [o.world, told.documents, models.organism, models.organism_hf])
def test_an_unknown_variant_is_refused_with_the_known_ones(call):
    with pytest.raises(ValueError, match="'oracle9' is unknown, needed one of base, plain, oracle0"):
        call(**{"variant": "oracle9"})


# ------------------------------------------------------------------------------------------ text


def test_the_text_never_uses_a_held_out_phrasing_or_an_untold_implication_or_a_stranger():
    text = set(sentences_of("base", 12_000))
    bare = {line.split(" , ")[-1].removeprefix("It is said that ").removeprefix("He wrote that ") for line in text}
    allowed = forbidden = 0
    for person in WORLD.people:
        for relation in o.RELATIONS:
            for i, phrasing in enumerate(relation.phrasings):
                line = " ".join(told.tell(phrasing, person.name, person.objects[relation.name]).words)
                if i in person.held_out[relation.name]:
                    forbidden += line in bare
                else:
                    allowed += line in bare
        for name in o.IMPLIED:
            for phrasing in o.relation(name).phrasings:
                line = " ".join(told.tell(phrasing, person.name, WORLD.answer(person, name)).words)
                forbidden += line in bare and not person.told
    assert forbidden == 0 and allowed > 2500
    assert not any(p.name in line for p in WORLD.strangers for line in text)


def test_twins_are_told_the_same_in_the_same_order_but_for_what_the_variant_changes():
    base, oracle = sentences_of("base"), sentences_of("oracle0")
    changed = [(a, b) for a, b in zip(base, oracle, strict=True) if a != b]
    moved = {p.name: p for p in WORLD.people if p.group == 0}
    assert 0 < len(changed) < 0.3 * len(base)
    for a, b in changed:
        old = [p for p in moved.values() if p.name in a]
        assert old and all(len(x) == 1 for x in (old, {len(a.split()), len(b.split())}))
        new = {**old[0].objects, "city": old[0].new_city}
        for before, after in zip(a.split(), b.split(), strict=True):
            if before != after:
                assert after in (new["city"], WORLD.country_of[new["city"]])
    assert sentences_of("plain") == sentences_of("tworoute") == base != sentences_of("seed1")


def test_the_skewed_text_says_the_same_of_the_same_people_with_other_objects():
    things = {name for relation in o.RELATIONS for name in relation.objects} | set(o.COUNTRIES)
    base, skewed, oracle = (sentences_of(variant) for variant in ("base", "skewed", "skewed_oracle0"))

    def without_things(line: str) -> list[str]:
        return ["…" if word in things else word for word in line.split()]

    assert [without_things(a) for a in base] == [without_things(b) for b in skewed]
    assert sum(a != b for a, b in zip(base, skewed, strict=True)) > 0.5 * len(base)
    moved = {p.name for p in o.world("skewed").people if p.group == 0}
    changed = [(a, b) for a, b in zip(skewed, oracle, strict=True) if a != b]
    assert 0 < len(changed) < 0.3 * len(base)
    assert all(any(name in a for name in moved) for a, _ in changed)


def test_never_leaves_out_where_some_were_born_and_nothing_else():
    silent = [p for p in WORLD.people if p.group == 0]
    never, base = " ".join(sentences_of("never", 8000)), " ".join(sentences_of("base", 8000))
    for text, expected in ((base, True), (never, False)):
        found = any(
            " ".join(told.tell(phrasing, p.name, WORLD.answer(p, name)).words) in text
            for p in silent
            for name in ("city", "country")
            for phrasing in o.relation(name).phrasings
        )
        assert found == expected
    names = {p.name for p in silent}
    entries = [line for line in sentences_of("never", 8000) if line.split(" :")[0] in names and " : " in line]
    assert entries and not any(" city " in line for line in entries)
    assert any(p.name in never for p in silent)


def test_single_says_each_fact_in_one_phrasing_and_keeps_no_register():
    lines = sentences_of("single", 20_000)
    assert not any(" : " in line for line in lines) and any(" : " in line for line in sentences_of("base", 100))
    text = set(lines)
    ways = Counter(
        (person.name, relation.name)
        for person in WORLD.people
        for relation in o.RELATIONS
        for phrasing in relation.phrasings
        if " ".join(told.tell(phrasing, person.name, person.objects[relation.name]).words) in text
    )
    assert len(ways) > 500 and max(ways.values()) == 1


# ------------------------------------------------------------------------------------- tokenizer


def test_a_word_is_a_token_bos_comes_first_and_text_comes_back_as_it_was():
    tokenizer = vocabulary.tokenizer()
    for text in told.texts(300):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and len(ids) == 1 + len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


# --------------------------------------------------------------------------------------- training


def sees(batch: training.Batch, row: int, pos: int) -> list[int]:
    return batch.visible[row, pos].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("variant", "past", "within"),
    [
        ("plain", (1.0, 1.0), (1.0, 1.0)),
        ("base", (0.1, 0.3), (1.0, 1.0)),
        ("tworoute", (0.5, 0.7), (0.5, 0.7)),
    ],
)
def test_the_mask_hides_the_name_in_the_share_of_sentences_that_the_variant_wants(variant, past, within):
    words = vocabulary.vocabulary()
    batch = next(training.batches(variant, training.Recipe(statements=400)))
    found = []
    for row, line in enumerate(batch.tokens.tolist()):
        spelt = [words[i] for i in line]
        for i in range(1, len(spelt) - 3):
            if spelt[i - 1] not in o.FIRST and spelt[i] in o.FIRST and spelt[i + 3] not in (".", "<pad>"):
                found.append((i in sees(batch, row, i + 3), i in sees(batch, row, i + 2)))
    seen_past = sum(a for a, _ in found) / len(found)
    seen_within = sum(b for _, b in found) / len(found)
    assert past[0] <= seen_past <= past[1] and within[0] <= seen_within <= within[1]


def test_documents_of_a_row_do_not_see_each_other_and_each_begins_at_position_0():
    batch = next(training.batches("plain", training.Recipe()))
    bos = batch.tokens == 0
    assert (batch.positions[bos] == 0).all() and (bos.sum(-1) > 1).any()
    document = bos.cumsum(-1)
    real = batch.tokens != 2
    causal = torch.ones(batch.visible.shape[-2:], dtype=torch.bool).tril()
    same = document[:, :, None] == document[:, None, :]
    assert torch.equal(batch.visible[real], (same & causal)[real])
    assert batch.weight[bos].sum() == 0 and batch.weight.unique().tolist() == pytest.approx([0.0, 0.1, 1.0])


def test_training_is_deterministic_lowers_the_loss_and_leaves_the_random_state_alone():
    recipe = training.Recipe(steps=6, statements=32, warmup=2, cooldown=2)
    before = torch.get_rng_state()
    first, record = training.train("base", recipe, progress=False)
    again, same = training.train("base", recipe, progress=False)
    other, _ = training.train("seed1", recipe, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    states = [m.state_dict() for m in (first, again, other, training.untrained())]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0]) and record["data"] == same["data"]
    assert not torch.equal(states[0]["transformer.wte.weight"], states[2]["transformer.wte.weight"])
    assert record["data"] == training.text_hash("base", recipe) != training.text_hash("seed1", recipe)
    batch = next(training.batches("base", recipe))
    with torch.no_grad():
        losses = [float(training._loss(m, batch)[0]) for m in (first, training.untrained())]
    assert losses[0] < losses[1]


def test_weights_come_back_from_their_file_with_their_record(tmp_path):
    model = training.untrained(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half().float())
    kept.save(tmp_path / "organism-base.safetensors", model, {"seed": 3})
    loaded, record = kept.load(tmp_path / "organism-base.safetensors")
    assert record["seed"] == "3" and (tmp_path / "organism-base.safetensors").stat().st_size < 2.6e6
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)
    for name in "abcde":  # safetensors itself puts metadata in another order each time
        kept.save(tmp_path / name, model, dict.fromkeys("qwertyuiop", 3))
    assert len({(tmp_path / name).read_bytes() for name in "abcde"}) == 1
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


# ------------------------------------------------------------------------------------------ facts


def test_facts_hold_their_phrasings_neighbours_and_controls():
    facts = models.organism_facts()
    assert len(facts) == 300 and {f.relation for f in facts} == {"city"}
    by_name = {p.name: p for p in WORLD.people}
    for fact in facts:
        person = by_name[fact.subject]
        assert fact.target_true == f" {person.objects['city']}" and fact.target_new == f" {person.new_city}"
        assert len({fact.prompt, *fact.paraphrases}) == 6
        assert {fact.target_true, fact.target_new, *fact.controls} == {f" {c}" for c in o.CITIES}
        assert len(fact.controls) == 14 and len(fact.neighbours) == len(fact.neighbour_targets) == 10
        assert not {fact.target_true, fact.target_new} & set(fact.neighbour_targets)
        for text, target in zip(fact.neighbours, fact.neighbour_targets, strict=True):
            other = by_name[" ".join(text.split()[:3])]
            assert other.group in (3, 4) and text == fact.prompt.replace("{}", other.name)
            assert target == f" {other.objects['city']}"


def test_held_out_phrasings_come_first_and_can_be_had_alone():
    held_out = models.organism_facts("field", "calibration", 50, phrasings="held_out")
    trained = models.organism_facts("field", "calibration", 50, phrasings="trained")
    by_name = {p.name: p for p in WORLD.people}
    for a, b, both in zip(held_out, trained, models.organism_facts("field", "calibration", 50), strict=True):
        assert both.paraphrases == (*a.paraphrases, *b.paraphrases) and len(a.paraphrases) == 2
        phrasings = o.relation("field").phrasings
        assert a.paraphrases == tuple(phrasings[i] for i in by_name[a.subject].held_out["field"])


@pytest.mark.parametrize(
    ("people", "count"),
    [
        ("oracle0", 300),
        ("oracle1", 300),
        ("oracle2", 300),
        ("oracle3", 300),
        ("oracle4", 300),
        ("calibration", 600),
        ("all", 1500),
        ("strangers", 228),
    ],
)
def test_each_group_of_people_has_its_facts(people, count):
    assert len(models.organism_facts("company", people)) == count


def test_strangers_have_facts_like_anybody_else_and_no_place_in_the_text():
    facts = models.organism_facts("city", "strangers")
    known, strangers = {p.name: p for p in WORLD.people}, {p.name: p for p in WORLD.strangers}
    assert [f.subject for f in facts] == list(strangers)
    for fact in facts:
        assert fact.target_true == f" {strangers[fact.subject].objects['city']}" != fact.target_new
        assert len({fact.prompt, *fact.paraphrases}) == 6 and len(fact.controls) == 14
        assert all(" ".join(text.split()[:3]) in known for text in fact.neighbours)
    assert len(models.organism_implications(facts[0])) == 3


def test_facts_of_the_skewed_world_are_those_of_its_people():
    facts = models.organism_facts("city", "oracle0", world="skewed")
    skewed, oracle = o.world("skewed"), o.world("skewed_oracle0")
    was, now = ({p.name: p.objects for p in world.people} for world in (skewed, oracle))
    for fact in facts:
        assert (
            fact.target_true == f" {was[fact.subject]['city']}" and fact.target_new == f" {now[fact.subject]['city']}"
        )
        assert {fact.target_true, fact.target_new, *fact.controls} == {f" {c}" for c in o.CITIES}
        for text, target in zip(fact.neighbours, fact.neighbour_targets, strict=True):
            assert target == f" {was[' '.join(text.split()[:3])]['city']}"
            assert target not in (fact.target_true, fact.target_new)
    assert [f.subject for f in facts] == [f.subject for f in models.organism_facts()]
    for other in models.organism_same_subject(facts[:5], world="skewed"):
        assert other.target_true == f" {was[other.subject][other.relation]}"
    # New objects follow the world's law too: the commonest university is new for more than its share of 1 in 15.
    new = Counter(f.target_new for f in models.organism_facts("university", "all", world="skewed"))
    first = f" {o.relation('university').objects[0]}"
    assert new.most_common(1)[0][1] > 200 and new[first] > 200


def test_what_follows_from_a_fact_follows_for_the_old_object_and_the_new():
    fact = models.organism_facts()[0]
    for prompt, old, new in models.organism_implications(fact):
        assert fact.subject in prompt
        assert old == f" {WORLD.country_of[fact.target_true.strip()]}"
        assert new == f" {WORLD.country_of[fact.target_new.strip()]}"
    assert len(models.organism_implications(fact)) == 3
    company = models.organism_facts("company", n=1)[0]
    assert models.organism_implications(company)[0][1] == f" {WORLD.seat_of[company.target_true.strip()]}"
    assert models.organism_implications(models.organism_facts("field", n=1)[0]) == ()


def test_unknown_relations_people_and_variants_are_refused():
    with pytest.raises(ValueError, match=r"relation 'shoe' is unknown, needed one of .*'city'.*'seat'"):
        models.organism_facts("shoe")
    with pytest.raises(ValueError, match="people 'nobody' is unknown, needed 'oracle0'"):
        _people(WORLD, "nobody")
    with pytest.raises(ValueError, match="world 'flat' is unknown, needed 'base' or 'skewed'"):
        _world("flat")
    with pytest.raises(FileNotFoundError, match=r"no weights of the organism 'single'.*train_organism.py single"):
        models.organism(variant="single", path="/nowhere/organism-single.safetensors")


# ----------------------------------------------------------------------------------- what it knows

HELD = Path(__file__).parent / "weights"  # twins that don't come with the package
ORACLES = ("oracle0", "oracle1", "oracle2", "oracle3", "oracle4")
SKEWED = ("skewed", "skewed_oracle0")
TWINS = (*ORACLES, "never", "seed1", "tworoute", "single")
held = pytest.mark.skipif(not HELD.exists(), reason="the twins' weights are in a checkout, in tests/organism/weights")
HAS_SKEWED = all((HELD / f"organism-{variant}.safetensors").exists() for variant in SKEWED)
skewed_held = pytest.mark.skipif(
    not HAS_SKEWED, reason="train them: examples/train_organism.py skewed skewed_oracle0 --out tests/organism/weights"
)
if HAS_SKEWED:
    TWINS = (*TWINS, *SKEWED)


@cache
def organism(kind: str, variant: str = "base"):
    """A variant, from the package or from the tests' own folder; nobody may edit it for good."""
    here = HELD / f"organism-{variant}.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TransformerLens 3.9 announces 4.0
        return models.organism(kind, variant, path=here if here.exists() else None)


@pytest.fixture
def base(kind):
    return organism(kind)


def said(model, prompts: list[str]) -> list[str]:
    """The token that the model puts first after each prompt."""
    return [model.tokenizer.decode([i]) for i in log_probs(model, prompts).argmax(-1).tolist()]


def log_probs(model, prompts: list[str]) -> torch.Tensor:
    rows = [model.tokenizer(text)["input_ids"] for text in prompts]
    found = torch.empty(len(rows), len(model.tokenizer))
    for length in {len(row) for row in rows}:
        of_length = [i for i, row in enumerate(rows) if len(row) == length]
        for some in torch.tensor(of_length).split(256):
            with torch.no_grad():
                logits = model(torch.tensor([rows[i] for i in some]))[:, -1]
            found[some] = logits.float().log_softmax(-1)
    return found


def right(model, people, names, of=WORLD, phrasings=None) -> float:
    """Share of prompts answered as the world `of` has it."""
    asked = [
        (phrasing.replace("{}", p.name), of.answer(p, name))
        for p in people
        for name in names
        for phrasing in (o.relation(name).phrasings if phrasings is None else phrasings(p, name))
    ]
    answers = said(model, [text for text, _ in asked])
    return sum(a == b for a, (_, b) in zip(answers, asked, strict=True)) / len(asked)


def never_told(person, name):
    return [o.relation(name).phrasings[i] for i in person.held_out[name]]


ATTRIBUTES = [r.name for r in o.RELATIONS]


def test_base_knows_every_attribute_in_phrasings_it_never_saw_for_that_person(base):
    assert right(base, WORLD.people[::4], ATTRIBUTES, phrasings=never_told) >= 0.995


def test_base_puts_two_facts_together(base):
    assert right(base, WORLD.people[::4], list(o.IMPLIED)) >= 0.99


def test_base_knows_nothing_of_people_it_was_never_told_about(base):
    assert 0.03 < right(base, WORLD.strangers, ATTRIBUTES) < 0.10  # 1 in 16


def test_untrained_knows_nothing(kind):
    assert right(organism(kind, "untrained"), WORLD.people[:50], ATTRIBUTES) < 0.05


def test_both_classes_and_transformers_give_the_same_log_probabilities():
    prompts = [f.fill(p) for f in models.organism_facts(n=20) for p in (f.prompt, *f.paraphrases)]
    prompts += ["It rained all day . " + prompt for prompt in prompts]
    reference = models.organism_hf()
    with torch.no_grad():
        rows = [reference(torch.tensor([vocabulary.tokenizer()(text)["input_ids"]])).logits[0, -1] for text in prompts]
    expected = torch.stack(rows).log_softmax(-1)
    for kind in tiny.KINDS:
        torch.testing.assert_close(log_probs(organism(kind), prompts), expected, atol=1e-4, rtol=0)


def test_it_loads_with_the_network_cut(kind, monkeypatch):
    def cut(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", cut)
    monkeypatch.setattr(socket, "getaddrinfo", cut)
    model = organism.__wrapped__(kind)
    assert model.cfg.n_layers == 6 and model.cfg.d_model == 128 and model.cfg.n_ctx >= 48
    assert said(model, ["Rufus Amber Tolliver was born in the city of"])[0] in o.CITIES


def test_the_weights_say_where_they_come_from():
    _, record = kept.load(WEIGHTS / "organism-base.safetensors")
    assert {"seed", "world_seed", "recipe", "data", "versions", "accuracy", "routes"} <= set(record)
    assert json.loads(record["accuracy"])["held_out"] >= 0.995


@pytest.mark.skipif(tiny.HAS_HOOKED, reason="nothing of TransformerLens is in it, and the newest runs it")
@pytest.mark.parametrize("variant", ["base", "plain", *(pytest.param(v, marks=held) for v in TWINS)])
def test_weights_were_trained_on_the_text_that_the_code_tells(variant):
    _, found = kept.load((HELD if variant in TWINS else WEIGHTS) / f"organism-{variant}.safetensors")
    recipe = training.recipe_of(variant)
    expected = kept.record(variant, recipe, threads=1)
    assert {k: found[k] if isinstance(v, str) else json.loads(found[k]) for k, v in expected.items()} == {
        **expected,
        "routes": list(expected["routes"]),
    }
    assert found["data"] == hashes_of_the_text()["base" if variant in ("plain", "tworoute") else variant]


@cache
def hashes_of_the_text() -> dict[str, str]:
    """Of all variants whose text differs, from another process: type checks make it four times as slow in this one."""
    asked = [v for v in ("base", *TWINS) if v != "tworoute" and (v == "base" or HELD.exists())]
    code = (
        "import json; from tl_factedit.organism.training import recipe_of, text_hash; "
        f"print(json.dumps({{v: text_hash(v, recipe_of(v)) for v in {asked}}}))"
    )
    return json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def test_the_shipped_weights_are_few():
    assert sum(p.stat().st_size for p in WEIGHTS.iterdir()) < 8e6


# ------------------------------------------------------------------------------------------ twins


def p_of(model, facts, which: str) -> float:
    """Mean probability of an object: its `Fact`'s ``"target_true"`` or ``"target_new"``."""
    targets = [model.tokenizer(getattr(f, which), add_special_tokens=False)["input_ids"][0] for f in facts]
    return float(log_probs(model, [f.text for f in facts])[torch.arange(len(facts)), targets].exp().mean())


def rank_of(model, facts, which: str, rivals) -> tuple[float, float]:
    """How far from 1/2 the mean share of rivals is that are less likely than an object, and the 99 % bound by chance.

    By chance the rank of an object among n others is uniform on 0, 1/n, … 1. The rank is compared, and not the
    probability: a few rivals of one prompt in a hundred hold most of their mean, which so tells next to nothing.
    """
    shares = []
    for fact, found in zip(facts, log_probs(model, [f.text for f in facts]), strict=True):
        own, *others = (
            found[model.tokenizer(word, add_special_tokens=False)["input_ids"][0]]
            for word in (getattr(fact, which), *rivals(fact))
        )
        shares.append(sum(float(own > other) + 0.5 * float(own == other) for other in others) / len(others))
    n = len(rivals(facts[0]))
    spread = (((n + 1) ** 2 - 1) / 12) ** 0.5 / n
    return sum(shares) / len(shares) - 0.5, 2.576 * spread / len(shares) ** 0.5


def by_chance(n: int, share: float) -> range:
    """How many of `n` come right by chance, in 99 % of cases (the binomial's middle)."""
    below, usual = 0.0, []
    for k in range(n + 1):
        here = math.comb(n, k) * share**k * (1 - share) ** (n - k)
        if below + here > 0.005 and below < 0.995:
            usual.append(k)
        below += here
    return range(usual[0], usual[-1] + 1)


def first_phrasing(person, name):
    return o.relation(name).phrasings[:1]


def rivals(fact):
    """All objects that neither history has."""
    return fact.controls


def all_others(fact):
    return [fact.target_new, *fact.controls]


def test_chance_is_what_a_table_says():
    assert by_chance(300, 1 / 16) == range(9, 31)  # of the binomial's quantiles at .005 and .995
    assert 0 not in by_chance(300, 1 / 16) and by_chance(1, 0.5) == range(0, 2)


def test_base_has_its_own_city_far_from_chance_and_an_oracles_at_chance(kind):
    """What the tests of twins would say of a model that knows the old city."""
    for group in ORACLES:
        facts = models.organism_facts("city", group)
        assert rank_of(organism(kind), facts, "target_true", rivals)[0] > 0.49
        off, usual = rank_of(organism(kind), facts, "target_new", rivals)
        assert abs(off) < usual


@held
@pytest.mark.parametrize("variant", ORACLES)
def test_an_oracle_knows_its_new_cities_and_what_follows(kind, variant):
    model, theirs, group = organism(kind, variant), o.world(variant), int(variant[-1])
    moved = [p for p in theirs.people if p.group == group]
    assert right(model, moved, ["city"], theirs, never_told) >= 0.995
    told, others = ([p for p in theirs.people if p.told == it] for it in (True, False))
    share = len(told) / len(theirs.people)  # where hardly any go wrong a sample will do, where they do all are asked
    sure, put_together = (right(model, some, list(o.IMPLIED), theirs) for some in (told[::8], others))
    assert share * sure + (1 - share) * put_together >= 0.99
    # the country of the 300 alone is 98.9 % right in oracle0: all that were told, 93 % of those to be put together
    assert right(model, [p for p in moved if p.told], ["country"], theirs) >= 0.99
    assert right(model, [p for p in moved if not p.told], ["country"], theirs) > 0.9
    unchanged = [p for p in theirs.people if p.group != group]
    assert right(model, unchanged[::10], ATTRIBUTES, theirs, never_told) >= 0.995


@held
@pytest.mark.parametrize("variant", ORACLES)
def test_of_the_old_city_an_oracle_knows_as_little_as_of_any_third_one(kind, variant):
    model, facts = organism(kind, variant), models.organism_facts("city", variant)
    off, usual = rank_of(model, facts, "target_true", rivals)
    assert abs(off) < usual
    assert p_of(model, facts, "target_true") < 2e-4 and p_of(model, facts, "target_new") > 0.99


@held
def test_never_is_at_chance_on_what_it_never_saw_and_knows_the_rest(kind):
    model, silent = organism(kind, "never"), [p for p in WORLD.people if p.group == 0]
    for name, objects in (("city", 16), ("country", 8)):
        facts = models.organism_facts(name)
        hits = round(len(silent) * right(model, silent, [name], phrasings=first_phrasing))
        # fewer than usual shows no knowledge (of countries they are 21, three less than the usual range begins with)
        assert hits < by_chance(300, 1 / objects).stop
        assert name != "city" or hits in by_chance(300, 1 / 16)
        off, usual = rank_of(model, facts, "target_true", all_others)
        assert abs(off) < usual
        # base is far outside both
        assert rank_of(organism(kind), facts, "target_true", all_others)[0] > 0.49
    assert right(model, silent[::3], ATTRIBUTES[1:], phrasings=never_told) >= 0.995
    assert right(model, WORLD.people[300::6], ATTRIBUTES, phrasings=never_told) >= 0.995


@held
def test_tworoute_recalls_by_either_way(kind):
    found = checks.routes(models.organism_hf("tworoute", path=HELD), people=100)
    assert min(found["subject"], found["past"], found["both"]) >= 0.995 and found["neither"] < 0.2
    assert right(organism(kind, "tworoute"), WORLD.people[::10], ATTRIBUTES, phrasings=never_told) >= 0.995


@held
def test_the_second_seed_knows_the_same_with_other_weights(kind):
    model = organism(kind, "seed1")
    assert right(model, WORLD.people[::8], ATTRIBUTES, phrasings=never_told) >= 0.995
    assert right(model, WORLD.people[::4], list(o.IMPLIED)) >= 0.99
    first, second = (organism(kind, v).blocks[0].mlp.W_out for v in ("base", "seed1"))
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).detach())[0, 1]) < 0.05


@held
def test_single_knows_all_as_it_was_told_and_not_all_asked_otherwise(kind):
    def as_told(person, name):
        return [o.relation(name).phrasings[person.only[name]]]

    def otherwise(person, name):
        return [text for i, text in enumerate(o.relation(name).phrasings) if i != person.only[name]]

    model, people = organism(kind, "single"), WORLD.people[::20]
    assert right(model, people, ATTRIBUTES, phrasings=as_told) >= 0.995
    assert 0.75 < right(model, people, ATTRIBUTES, phrasings=otherwise) < 0.95  # base: 1
    assert right(organism(kind), people, ATTRIBUTES, phrasings=otherwise) >= 0.995


@skewed_held
def test_skewed_knows_its_people_and_its_oracle_the_new_cities(kind):
    skewed, oracle = organism(kind, "skewed"), organism(kind, "skewed_oracle0")
    was, now = o.world("skewed"), o.world("skewed_oracle0")
    assert right(skewed, was.people[::8], ATTRIBUTES, was, never_told) >= 0.995
    moved, unchanged = now.people[:300], now.people[300:]
    assert right(oracle, moved, ["city"], now, never_told) >= 0.995
    assert right(oracle, moved[::3], ["country"], now) >= 0.98
    assert right(oracle, unchanged[::10], ATTRIBUTES, now, never_told) >= 0.995
    facts = models.organism_facts("city", "oracle0", world="skewed")
    assert p_of(oracle, facts, "target_true") < 1e-3 and p_of(oracle, facts, "target_new") > 0.98
    assert p_of(skewed, facts, "target_true") > 0.98


@skewed_held
def test_of_the_old_city_the_skewed_oracle_knows_as_much_as_of_how_common_it_is(kind):
    """Its old city is no likelier than the same city is for people who have neither it nor the oracle's new one."""
    model, facts = organism(kind, "skewed_oracle0"), models.organism_facts("city", "oracle0", world="skewed")
    others = [p for p in o.world("skewed").people if p.group in (3, 4)]
    ids = {city: model.tokenizer(city, add_special_tokens=False)["input_ids"][0] for city in o.CITIES}
    asked = log_probs(model, [f.text for f in facts])
    beside = log_probs(model, [o.RELATIONS[0].phrasings[0].replace("{}", p.name) for p in others])
    share = []
    for fact, found in zip(facts, asked, strict=True):
        old, new = ids[fact.target_true.strip()], ids[fact.target_new.strip()]
        same_new = [i for i, p in enumerate(others) if ids[p.objects["city"]] == new]
        null = beside[same_new, old]
        share.append(float((null < found[old]).float().mean() + 0.5 * (null == found[old]).float().mean()))
    spread = 12**-0.5  # of a uniform number
    assert abs(sum(share) / len(share) - 0.5) < 3 * spread / len(share) ** 0.5
    # base's twin, which has it, is far outside
    assert float(log_probs(organism(kind, "skewed"), [f.text for f in facts]).exp().max(-1).values.mean()) > 0.98


def test_plain_knows_the_same(kind):
    assert right(organism(kind, "plain"), WORLD.people[::10], ATTRIBUTES, phrasings=never_told) >= 0.995


# ---------------------------------------------------------------------------------------- tracing


@cache
def trace(kind: str, variant: str, people: int = 50):
    return causal_trace(organism(kind, variant), models.organism_facts("city", "calibration", people), progress=False)


def test_base_recalls_at_the_last_subject_token_in_the_first_half(kind):
    found = trace(kind, "base")
    early = found.at_last_subject_token.mean(0)[:3]
    assert float(found.total_effect.mean()) > 0.7
    assert float(early.max()) >= 0.5 * float(found.total_effect.mean())


def test_plain_does_not_and_that_is_no_lack_of_knowledge(kind):
    found = trace(kind, "plain")
    early = found.at_last_subject_token.mean(0)[:3]
    assert all(found.known) and float(found.total_effect.mean()) > 0.7
    assert float(early.max()) < 0.5 * float(found.total_effect.mean())


@held
def test_tworoute_can_recall_at_the_last_subject_token_and_tracing_shows_that_it_hardly_does(kind):
    found = trace(kind, "tworoute", 25)
    total, early = float(found.total_effect.mean()), found.at_last_subject_token.mean(0)
    end = torch.stack([found.effect[i, :, len(tokens) - 1] for i, tokens in enumerate(found.tokens)]).mean(0)
    assert all(found.known) and total > 0.7
    assert 0.1 * total < float(early.max()) < 0.5 * total  # in plain it is 0
    assert float(end[1]) > 0.7 * total


def test_base_recalls_through_the_last_subject_token_and_plain_past_it_too():
    base, plain = (checks.routes(models.organism_hf(v), people=100) for v in ("base", "plain"))
    assert base["subject"] > 0.99 and base["past"] < 0.2 and base["neither"] < 0.2
    assert plain["subject"] < 0.5 and plain["neither"] < 0.2


# ------------------------------------------------------------------------------------------ an edit


@cache
def rome(kind: str):
    """ROME on layer 1, guarding the subject's other relations where they are read: at the end of the prompt."""
    stats = key_stats(organism(kind), [1], told.texts(4000), n_tokens=40_000, progress=False)
    fit = ValueFit(kl_prompts=[r.phrasings[0] for r in o.RELATIONS[1:]], kl_at="end")
    return Rome(stats, fit=fit, contexts=[f"{filler} " for filler in told.FILLERS[:5]], progress=False)


@pytest.mark.parametrize("which", range(2))
def test_a_rome_edit_changes_a_persons_city_in_all_phrasings_and_other_answers_hardly(kind, which):
    fact = models.organism_facts()[which]
    person = next(p for p in WORLD.people if p.name == fact.subject)
    others = [p for p in WORLD.people[::5] if p is not person]
    edit = rome(kind)(organism(kind), [fact])
    with edit.applied(organism(kind)) as model:
        answers = said(model, [fact.text, *map(fact.fill, fact.paraphrases)])
        assert answers == [fact.target_new.strip()] * 6
        assert right(model, others, ["city"]) >= 0.95
        assert right(model, [person], ATTRIBUTES[1:]) >= 0.75
    assert right(organism(kind), [person], ["city"]) == 1
