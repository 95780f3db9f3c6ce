"""The logit lens reads what the model's own head makes of its own stream, against control objects."""

import functools

import pytest
import tiny
import torch
from oracles import untouched

from tl_factedit.backend.runner import Runner
from tl_factedit.backend.weights import down_proj
from tl_factedit.core.facts import Fact
from tl_factedit.core.tokens import align
from tl_factedit.measure.reading import Probe, compare
from tl_factedit.probes.lens import QUANTITIES, LogitLens

CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # float32 logits of size 1 to 10, from batches of another shape
MODELS = [("bridge", arch) for arch in ("gpt2", "llama", "gptj", "gemma2", "bloom")]
MODELS += [("hooked", arch) for arch in ("gpt2", "llama")] if tiny.HAS_HOOKED else []
on_models = pytest.mark.parametrize(("kind", "arch"), MODELS, ids=lambda value: value)

FACT = Fact(
    "The Eiffel Tower",
    "Where is {} located in",
    " Paris",
    " Rome",
    controls=[" London", " Berlin", " Madrid", " Vienna", " Tokyo", " Paris", " Rome", " London"],
)
CITIES = ("Paris", "Rome", "London", "Berlin", "Madrid", "Vienna", "Tokyo", "Cairo")
CONTROLS = ("London", "Berlin", "Madrid", "Vienna", "Tokyo")


@functools.cache
def shared(kind: str, arch: str):
    return tiny.model(kind, arch)


def heads(model, fact: Fact) -> torch.Tensor:
    """TransformerLens' own norm and unembedding on each layer's stream: [layer, subject|last, vocab]."""
    row = align(model.tokenizer, fact, prepend_bos=bool(model.cfg.default_prepend_bos))
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        final, cache = model.run_with_cache(row.ids[None], names_filter=names)
        stream = torch.cat([cache[name] for name in names])
        logits = model.unembed(model.ln_final(stream))
        # gemma 2 caps its logits after the unembedding
        cap = float(getattr(model.cfg, "output_logits_soft_cap", 0) or 0)
        logits = cap * torch.tanh(logits / cap) if cap > 0 else logits
    torch.testing.assert_close(logits[-1], final[0], **CLOSE)  # the last layer's reading is the prediction
    return logits[:, [row.subject[1] - 1, len(row.ids) - 1]]


def token(model, word: str) -> int:
    return model.tokenizer.get_vocab()[word]


@on_models
def test_the_lens_is_the_models_own_head_on_every_layers_stream(kind, arch):
    model = shared(kind, arch)
    reading, logits = LogitLens()(model, [FACT]), heads(model, FACT)
    log_p, old, new = logits.log_softmax(-1), token(model, "Paris"), token(model, "Rome")
    others = logits[..., [token(model, word) for word in CONTROLS]]
    want = {
        "logp_old": log_p[..., old],
        "logp_new": log_p[..., new],
        "margin": logits[..., old] - logits[..., new],
        "percentile_old": (others < logits[..., old, None]).float().mean(-1),
        "percentile_new": (others < logits[..., new, None]).float().mean(-1),
        "rank_old": 1.0 + (logits > logits[..., old, None]).sum(-1),
        "rank_new": 1.0 + (logits > logits[..., new, None]).sum(-1),
    }
    assert set(want) == set(QUANTITIES)
    for name, values in want.items():
        torch.testing.assert_close(reading.at(quantity=name)[0], values, **CLOSE)
    assert not torch.allclose(reading.at(position="subject"), reading.at(position="last"))


@on_models
def test_the_first_of_all_has_rank_one_and_the_last_has_the_vocabularys_size(kind, arch):
    model = shared(kind, arch)
    words = {i: w for w, i in model.tokenizer.get_vocab().items()}
    at_last = heads(model, FACT)[2, 1]
    allowed = [i for i, w in words.items() if w.isalpha()]
    best, worst = (sorted(allowed, key=lambda i: float(at_last[i]))[k] for k in (-1, 0))
    fact = FACT.but(target_true=f" {words[best]}", target_new=f" {words[worst]}", controls=())
    reading = LogitLens()(model, [fact])
    by_rank = at_last.argsort(descending=True).tolist()
    assert reading.at(layer=2, position="last", quantity="rank_old").item() == by_rank.index(best) + 1
    assert reading.at(layer=2, position="last", quantity="rank_new").item() == by_rank.index(worst) + 1
    assert reading.values[..., [2, 3]].min() >= 1
    assert reading.values[..., [2, 3]].max() <= len(words)
    assert reading.at(layer=2, position="last", quantity="margin").item() > 0


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_objects_a_random_model_knows_nothing_of_stand_in_the_middle_of_their_controls(kind, arch):
    # Objects drawn anew: the rank of each among exchangeable others is uniform, with mean .5 and sd .29.
    words = [
        "Paris",
        "Rome",
        "London",
        "Berlin",
        "Madrid",
        "Vienna",
        "Tokyo",
        "Cairo",
        "France",
        "Italy",
        "England",
        "Germany",
        "Spain",
    ]
    facts = []
    for i, word in enumerate(words):
        others = [f" {w}" for w in words if w != word]
        facts.append(FACT.but(target_true=f" {word}", target_new=None, controls=others, id=i))
    reading = LogitLens()(shared(kind, arch), facts).at(quantity="percentile_old")
    # Each object in turn against all others: ranks 0 to 12 once each, so that the mean is .5 and not only about.
    torch.testing.assert_close(reading.mean(0), torch.full_like(reading[0], 0.5), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        reading.sort(0).values, (torch.arange(13) / 12)[:, None, None].expand_as(reading), rtol=0, atol=1e-6
    )


def test_an_object_drawn_at_random_averages_one_half_and_a_planted_one_does_not(kind):
    model = tiny.model(kind, "gpt2", tied=False)
    words = [
        "John",
        "Mary",
        "Alice",
        "Bob",
        "Anna",
        "Einstein",
        "Newton",
        "Curie",
        "Paris",
        "Rome",
        "London",
        "Berlin",
        "Madrid",
        "Vienna",
        "Tokyo",
    ]
    facts = [FACT.but(subject=name, controls=[f" {w}" for w in words]) for name in words[:8]]
    before = LogitLens()(model, facts).at(quantity="percentile_new", position="last")
    # 8 subjects and 4 layers of one model share their vocabulary: far fewer than 32 independent ranks.
    assert 0.05 < before.mean() < 0.95
    site, rome = down_proj(model, 1), model.W_U[:, token(model, "Rome")].detach()
    with torch.no_grad():
        site.bias.add_(50 * rome / rome.norm())
    after = LogitLens()(model, facts).at(quantity="percentile_new", position="last")
    assert torch.equal(after[:, 1:], torch.ones_like(after[:, 1:]))
    assert torch.equal(after[:, 0], before[:, 0])


@pytest.mark.parametrize("controls", [(), (" Paris",), (" Paris", " Rome")])
def test_without_controls_there_is_no_percentile(kind, controls):
    reading = LogitLens()(shared(kind, "gpt2"), [FACT.but(controls=controls)])
    assert reading.at(quantity="percentile_old").isnan().all()
    assert reading.at(quantity="percentile_new").isnan().all()
    assert not reading.values[..., :5].isnan().any()
    assert not LogitLens()(shared(kind, "gpt2"), [FACT]).values.isnan().any()


@pytest.mark.parametrize(
    "fact", [FACT.but(target_true=" Paris France", target_new=" Paris Italy"), FACT.but(target_new=None)]
)
def test_objects_that_cannot_be_compared_by_their_first_token_are_not(kind, fact):
    reading = LogitLens()(shared(kind, "gpt2"), [fact])
    for name in ("logp_new", "rank_new", "margin", "percentile_new"):
        assert reading.at(quantity=name).isnan().all()
    for name in ("logp_old", "rank_old", "percentile_old"):
        assert not reading.at(quantity=name).isnan().any()


def test_facts_are_read_together_as_alone(kind):
    model, other = shared(kind, "gpt2"), Fact("Big Ben", "{} is in", " London", " Madrid", controls=[" Rome"])
    together = LogitLens()(model, [FACT, other])
    assert together.values.shape == (2, 4, 2, len(QUANTITIES))
    for i, fact in enumerate([FACT, other]):
        alone = LogitLens()(model, [fact]).values[0]
        # Filled up to the longest, which another order of sums rounds otherwise; ranks are whole numbers.
        assert torch.allclose(together.values[i], alone, atol=1e-5)


def test_the_policy_of_bos_is_as_asked(kind):
    model = shared(kind, "gpt2")
    default, given = LogitLens()(model, [FACT]), LogitLens(prepend_bos=bool(model.cfg.default_prepend_bos))
    other = LogitLens(prepend_bos=not model.cfg.default_prepend_bos)(model, [FACT])
    assert torch.equal(given(model, [FACT]).values, default.values)
    assert not torch.allclose(other.values, default.values)


@on_models
def test_the_model_is_left_as_it_was_also_by_an_error(kind, arch, monkeypatch):
    model = untouched.used(tiny.model(kind, arch))
    model.train()
    before = untouched.state(model)
    assert torch.equal(LogitLens()(model, [FACT]).values, LogitLens()(shared(kind, arch), [FACT]).values)
    assert untouched.state(model) == before

    def refuse(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "logits", refuse)
    with pytest.raises(KeyboardInterrupt):
        LogitLens()(model, [FACT])
    assert untouched.state(model) == before


# ---------------------------------------------------------------------------------------- readings


def test_a_reading_is_asked_by_its_labels(kind):
    reading = LogitLens()(shared(kind, "gpt2"), [FACT])
    assert reading.at(layer=1, position="last").shape == (1, len(QUANTITIES))
    assert torch.equal(reading.at(position="last", quantity="margin"), reading.values[:, :, 1, 4])
    with pytest.raises(ValueError, match=r"logit lens has no axis \['token'\]"):
        reading.at(token=3)


def test_a_comparison_has_both_readings(kind):
    pytest.importorskip("pandas")
    model, other = shared(kind, "gpt2"), tiny.model(kind, "gpt2", seed=1)
    assert isinstance(LogitLens(), Probe)
    found = compare(LogitLens(), model, other, [FACT])
    assert torch.equal(found.before.values, LogitLens()(model, [FACT]).values)
    assert torch.equal(found.after.values, LogitLens()(other, [FACT]).values)
    table = found.table()
    assert len(table) == 4 * 2 * len(QUANTITIES)
    row = table[(table.layer == 3) & (table.position == "last") & (table.quantity == "logp_old")].iloc[0]
    assert row.before == pytest.approx(found.before.at(layer=3, position="last", quantity="logp_old").item())
    assert row.after != pytest.approx(row.before)
