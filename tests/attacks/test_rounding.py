"""Rounding: on the grid that is stated, in both models, and taken back; a small change goes, a large one stays."""

import laws
import pytest
import tiny
import torch
from attacking_facts import known_facts
from measured import attack

import tl_factedit as fe
from tl_factedit.attacks.rounding import rounded
from tl_factedit.backend.weights import down_proj, rewritten


def literally(weight, bits, group):
    """Number by number."""
    out = weight.clone()
    for column in range(weight.shape[1]):
        for start in range(0, weight.shape[0], group):
            part = weight[start : start + group, column]
            scale = part.abs().max() / (2 ** (bits - 1) - 1)
            out[start : start + group, column] = (part / scale).round() * scale
    return out


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 16), (3, 7)])
def test_numbers_lie_on_the_grid(bits, group):
    weight = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    found = rounded(weight, bits, group)
    assert torch.allclose(found, literally(weight, bits, group), atol=1e-6)
    assert torch.allclose(rounded(found, bits, group), found, atol=1e-6)  # what is on it stays
    assert not bool(rounded(torch.zeros(40, 6), bits, group).any())


def test_readings_are_those_with_the_weights_written(kind):
    model = tiny.model(kind, "gpt2")
    facts = known_facts(model)
    edits = [laws.rome(model, 1, fit=laws.QUICK, contexts=("",))(model, [fact]) for fact in facts]
    with laws.untouched(model):
        found = attack(fe.attacks.Rounding, model, edits, facts, bits=(8, 3))
    assert found.keys == (8, 3) and found.details["layers"] == ((1,),) * len(facts)
    site = down_proj(model, 1)
    for i, (fact, edit) in enumerate(zip(facts, edits, strict=True)):
        with edit.applied(model):
            for bits in (8, 3):
                with rewritten([site], [literally(site.W, bits, 64)]):
                    logits = laws.logits(model, fact.text)[0, -1]
                objects = [fact.target_true, fact.target_new, *fact.controls]
                ids = [int(model.tokenizer(text, add_special_tokens=False)["input_ids"][0]) for text in objects]
                best = max(ids, key=lambda token, logits=logits: float(logits[token]))
                assert float(found.after.at(fact=i, case=bits, quantity="old_first")) == float(best == ids[0])


def test_a_change_smaller_than_the_grid_goes_and_a_large_one_stays():
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    weight[0] = weight.abs().amax(0) * 1.5  # what sets the scales isn't touched
    change = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    change[0] = 0.0
    plain = rounded(weight, 4, 64)
    small, large = (rounded(weight + size * change, 4, 64) - plain for size in (1e-3, 1.0))
    assert float((small != 0).float().mean()) < 0.02 and float((large != 0).float().mean()) > 0.5


def test_bad_settings_are_refused(kind, monkeypatch):
    model = tiny.model(kind, "gpt2")
    facts = known_facts(model)
    with laws.no_forward(monkeypatch, model):
        for options in ({"bits": ()}, {"bits": (1,)}, {"group": 0}):
            with pytest.raises(ValueError, match="needed 2 bits and a group of 1"):
                attack(fe.attacks.Rounding, model, model, facts, layers=(1,), **options)
        with pytest.raises(ValueError, match="no matrix differs"):
            attack(fe.attacks.Rounding, model, model, facts)


def test_the_cover_tells_whether_the_change_is_still_there(kind):
    model = tiny.model(kind, "gpt2")
    facts = known_facts(model)
    edit = laws.rome(model, 1, fit=laws.QUICK, contexts=("",))(model, facts[:1])
    weak, strong = edit.scaled(1e-6), edit.scaled(30.0)
    covers = [
        float(attack(fe.attacks.Rounding, model, [e], facts[:1], bits=(4,)).extra["cover"]) for e in (weak, strong)
    ]
    assert covers[0] > 0.5 > covers[1]
    site = down_proj(model, 1)
    plain, before = literally(site.W, 4, 64), site.W.clone()
    with strong.applied(model):
        change, left = site.W - before, literally(site.W, 4, 64) - plain
    along = float((left * change).sum() / change.square().sum())
    assert covers[1] == pytest.approx(1 - min(1.0, along**2), abs=1e-4)
