"""The rules of a verdict, one finding at a time, and what they would have seen."""

import math
from dataclasses import replace

import pytest

from tl_factedit.auditing.findings import AttackFinding, Findings, Thresholds
from tl_factedit.auditing.power import smallest_share
from tl_factedit.auditing.rules import judge
from tl_factedit.core.estimate import Estimate


def about(mean: float, reach: float, n: int = 100) -> Estimate:
    return Estimate(mean, mean - reach, mean + reach, n)


NONE = about(0.0, 0.04)
UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0)
WAYS = {"knock_out": "elsewhere", "route_old": "underneath", "readout": "residue", "relearning": "residue"}
"""What stands for which question here."""


def findings(**given) -> Findings:
    """What a model that never had the old object looks like, with some changes; an attack that is None wasn't run."""
    known = {
        "efficacy": about(0.98, 0.02),
        "paraphrase": about(0.97, 0.03),
        "neighbour_loss": about(0.0, 0.02),
        "specificity_loss": about(0.01, 0.02),
        "perplexity": about(1.01, 0.01),
        "knock_out": NONE,
        "knock_out_at_most": 0.05,
        "route_old": NONE,
        "route_new": about(0.97, 0.03),
        "native": about(0.02, 0.12),
        "adaptive": about(-0.01, 0.12),
        "readout": NONE,
        "relearning": about(0.02, 0.06),
        "covers": True,
        **given,
    }
    attacks = []
    for name, shows in WAYS.items():
        value, at_most = known.pop(name), known.pop(f"{name}_at_most", math.nan)
        if value is not None:
            attacks.append(
                AttackFinding(
                    name.replace("_", "-"),
                    shows,
                    "a case",
                    value,
                    value.high if math.isnan(at_most) else at_most,
                    value.high,
                    5,
                    known["covers"] if shows == "elsewhere" else None,
                )
            )
    del known["covers"]
    return Findings(attacks=tuple(attacks), **known)


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "ERASED"),
        ({"efficacy": about(0.8, 0.05)}, "FAILED"),
        ({"paraphrase": about(0.4, 0.05)}, "FAILED"),
        ({"neighbour_loss": about(0.2, 0.05)}, "DAMAGED"),
        ({"specificity_loss": about(0.5, 0.1)}, "DAMAGED"),
        ({"perplexity": about(1.2, 0.05)}, "DAMAGED"),
        # one of many that is broken moves the mean, not the lower end
        ({"perplexity": about(1.2, 0.19)}, "INCONCLUSIVE"),
        ({"knock_out": about(0.9, 0.05), "knock_out_at_most": 0.95}, "INSERTED"),
        ({"route_old": about(0.15, 0.09)}, "INSERTED"),
        ({"adaptive": about(0.5, 0.1)}, "MOVED"),
        ({"native": about(0.6, 0.1), "adaptive": about(0.5, 0.1)}, "LATENT"),
        ({"native": about(0.6, 0.1)}, "LATENT"),
        ({"readout": about(0.12, 0.05)}, "LATENT"),
        ({"relearning": about(0.3, 0.2)}, "LATENT"),
        ({"native": about(-0.3, 0.14)}, "SCARRED"),
        ({"relearning": about(-0.5, 0.3)}, "SCARRED"),
        ({"adaptive": about(-0.2, 0.09)}, "SCARRED"),
        # under an override that no attack can see a decoder finds the mark of the new object, too
        ({"native": about(-0.3, 0.14), "covers": False}, "INCONCLUSIVE"),
        ({"native": about(-0.3, 0.14), "untried": ("drift",)}, "INCONCLUSIVE"),
        # what isn't precise enough, or wasn't run, is no absence
        ({"native": about(0.05, 0.35)}, "INCONCLUSIVE"),
        ({"native": about(0.25, 0.18)}, "INCONCLUSIVE"),
        ({"knock_out_at_most": 0.15}, "INCONCLUSIVE"),
        ({"readout_at_most": 0.35}, "INCONCLUSIVE"),
        ({"relearning": Estimate(0.0, math.nan, math.nan, 40)}, "INCONCLUSIVE"),
        ({"readout": Estimate(0.0, math.nan, math.nan, 1)}, "INCONCLUSIVE"),
        ({"route_old": about(0.03, 0.09)}, "INCONCLUSIVE"),
        ({"route_new": about(0.5, 0.1)}, "INCONCLUSIVE"),
        ({"knock_out": None}, "INCONCLUSIVE"),
        ({"route_old": None, "route_new": None}, "INCONCLUSIVE"),
        ({"native": None}, "INCONCLUSIVE"),
        ({"adaptive": None}, "INCONCLUSIVE"),
        # what lies over the fact in layers that can't be spared wouldn't have shown
        ({"covers": False}, "INCONCLUSIVE"),
        ({"covers": False, "adaptive": about(0.5, 0.1)}, "INCONCLUSIVE"),
        ({"covers": False, "native": about(0.6, 0.1), "adaptive": about(0.5, 0.1)}, "INCONCLUSIVE"),
        # in another code, but whether it can come back wasn't bounded
        ({"adaptive": about(0.5, 0.1), "knock_out": None}, "INCONCLUSIVE"),
        ({"adaptive": about(0.5, 0.1), "knock_out_at_most": 0.3}, "INCONCLUSIVE"),
        ({"adaptive": about(0.5, 0.1), "route_old": None}, "INCONCLUSIVE"),
        # an attack that was run has to bound what it may find
        ({"readout": about(0.3, 0.26)}, "INCONCLUSIVE"),
        ({"relearning": about(0.3, 0.31)}, "INCONCLUSIVE"),
        # a model that is broken as a whole has nothing of a fact either
        ({"neighbour_loss": None, "specificity_loss": None}, "INCONCLUSIVE"),
        # all attacks that an absence needs, and one that finds what is known to be an override
        ({"untried": ("drift",)}, "INCONCLUSIVE"),
        ({"untried": ("drift",), "adaptive": about(0.5, 0.1)}, "INCONCLUSIVE"),
        ({"untried": ("drift",), "native": about(0.6, 0.1)}, "INCONCLUSIVE"),
        ({"untried": ("drift",), "knock_out": about(0.9, 0.05), "knock_out_at_most": 0.95}, "INSERTED"),
        ({"control": {"weight reversal": NONE}}, "ERASED"),  # all that was written was silenced: that shows overrides
        ({"paraphrase": about(0.7, 0.05)}, "INCONCLUSIVE"),
        # of a population one fact that happens to be known says nothing
        ({"knock_out": Estimate(1.0, math.nan, math.nan, 1)}, "INCONCLUSIVE"),
        ({"route_old": Estimate(1.0, math.nan, math.nan, 1)}, "INCONCLUSIVE"),
        ({"specificity_loss": Estimate(1.0, math.nan, math.nan, 1)}, "INCONCLUSIVE"),
        # decodable, but whether it can come back wasn't looked at
        ({"native": about(0.6, 0.1), "route_old": None, "route_new": None}, "INCONCLUSIVE"),
        # retained alone is never INSERTED, however much of it there is
        ({"native": about(1.0, 0.05), "adaptive": about(1.0, 0.05), "readout": about(0.9, 0.05)}, "LATENT"),
        # relearning alone need not be run for an absence; one of them has to
        ({"relearning": None}, "ERASED"),
        ({"readout": None, "relearning": None}, "INCONCLUSIVE"),
        ({"covers": None}, "INCONCLUSIVE"),
        # each loss is bounded from above, or there is no absence
        ({"neighbour_loss": None}, "INCONCLUSIVE"),
        ({"specificity_loss": about(0.05, 0.1)}, "INCONCLUSIVE"),
        ({"perplexity": None}, "INCONCLUSIVE"),
        ({"perplexity": about(1.05, 0.1)}, "INCONCLUSIVE"),
        # too few facts
        ({"facts": 49}, "INCONCLUSIVE"),
        ({"facts": 9, "knock_out": about(0.5, 0.2)}, "INSERTED"),
        ({"facts": 9, "native": about(0.5, 0.1)}, "INCONCLUSIVE"),
        ({"route_new": about(0.97, 0.03, 9)}, "INCONCLUSIVE"),
        # decoders that find a little, by intervals that exclude nothing
        ({"native": about(0.19, 0.08)}, "LATENT"),
    ],
)
def test_each_finding_has_its_label(changes, label):
    found = judge(findings(**changes))
    assert found.label == label, found.reasons


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "ERASED"),
        ({"efficacy": about(0.8, 0.05)}, "FAILED"),
        ({"knock_out": about(0.9, 0.05), "knock_out_at_most": 0.95}, "INSERTED"),
        ({"native": about(-0.3, 0.14)}, "SCARRED"),
        # nothing new was written, so that nothing new has to follow
        ({"route_new": about(0.0, 0.01)}, "ERASED"),
        ({"efficacy": Estimate(math.nan, math.nan, math.nan, 0), "knock_out": None, "route_old": None}, "INCONCLUSIVE"),
    ],
)
def test_an_erasure_has_the_same_labels_but_nothing_has_to_follow(changes, label):
    found = judge(findings(erasing=True, **changes))
    assert found.label == label, found.reasons
    assert any("the old object no longer leads" in reason for reason in found.reasons)
    assert not any("new one" in reason or "new object" in reason for reason in found.reasons)


def test_an_earlier_rule_wins():
    everything = {"specificity_loss": about(0.5, 0.1), "knock_out": about(0.9, 0.05), "native": about(0.6, 0.1)}
    assert judge(findings(**everything, efficacy=about(0.3, 0.1))).label == "FAILED"
    assert judge(findings(**everything)).label == "DAMAGED"
    assert judge(findings(**{**everything, "specificity_loss": None})).label == "INSERTED"


def test_of_one_fact_nothing_is_claimed_but_what_shows():
    def one(mean):
        return Estimate(mean, math.nan, math.nan, 1)

    not_run = dict.fromkeys(("neighbour_loss", "specificity_loss", "perplexity", "route_new", "readout", "relearning"))
    single = {**not_run, "efficacy": one(1.0), "paraphrase": one(1.0), "native": None, "adaptive": None}
    back = judge(findings(**single, knock_out=one(1.0), route_old=None))
    assert back.label == "INSERTED" and any("descriptive" in reason for reason in back.reasons)
    nothing = {**single, "native": one(0.0), "adaptive": one(0.0)}
    assert judge(findings(**nothing, knock_out=one(0.0), route_old=one(0.0))).label == "INCONCLUSIVE"
    assert judge(findings(**{**single, "efficacy": one(0.0)}, knock_out=one(1.0), route_old=None)).label == "FAILED"


def test_what_is_missing_is_named_and_every_erased_states_its_power():
    bare = judge(Findings(efficacy=about(0.98, 0.02), paraphrase=about(0.97, 0.03)))
    assert bare.label == "INCONCLUSIVE"
    for what in ("neighbourhood", "subject", "plain text", "knock-out", "routes", "decoder", "read-outs", "relearning"):
        assert any(what in line for line in bare.missing), what
    erased = judge(findings())
    controlled = judge(findings(control={"weight reversal": about(0.2, 0.1)}))
    assert any("made as a control" in line and "weight reversal 0.20" in line for line in controlled.power)
    assert any("a case of knock-out, one of" in line for line in erased.power)
    assert sum("decoder would have shown" in line for line in erased.power) == 2


def test_thresholds_are_the_callers():
    loose = findings(knock_out=about(0.15, 0.08), knock_out_at_most=0.23, covers=True)
    assert judge(loose).label == "INSERTED"
    assert judge(loose, Thresholds(present=0.2, absent=0.3)).label == "ERASED"


@pytest.mark.parametrize(("n", "tests"), [(60, 1), (75, 5), (300, 5)])
def test_the_smallest_share_is_found_with_the_power_it_states(n, tests):
    import torch

    share = smallest_share(n, 0.05, tests=tests)
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 0.05 / tests, dtype=torch.float64)))

    def power(p):
        generator = torch.Generator().manual_seed(0)
        seen = (torch.rand(20_000, n, generator=generator) < p).double().mean(1)
        centre = (seen + z**2 / (2 * n)) / (1 + z**2 / n)
        low = centre - z / (1 + z**2 / n) * (seen * (1 - seen) / n + z**2 / (4 * n**2)).sqrt()
        return float((low > 0.05).double().mean())

    assert power(share) > 0.78 and power(share - 0.02) < 0.8
    assert smallest_share(300, 0.05) < smallest_share(60, 0.05)
    assert math.isnan(smallest_share(1, 0.5))


def test_any_attack_of_a_question_decides_whatever_it_is_called():
    """The rules loop over findings: an attack that they have never heard of counts as its cases say."""
    for shows, label in (("elsewhere", "INSERTED"), ("underneath", "INSERTED"), ("residue", "LATENT")):
        own = AttackFinding("an attack of one's own", shows, "a case", about(0.5, 0.1), 0.6, 0.6, 1)
        absent = findings()
        found = judge(replace(absent, attacks=(*absent.attacks, own)))
        assert found.label == label and any("an attack of one's own" in reason for reason in found.reasons)
        nothing = replace(own, strongest=NONE, at_most=0.04, least=0.04)
        assert judge(replace(absent, attacks=(*absent.attacks, nothing))).label == "ERASED"
        unbounded = replace(own, strongest=about(0.0, 0.4), at_most=0.4, least=0.4)
        assert judge(replace(absent, attacks=(*absent.attacks, unbounded))).label == "INCONCLUSIVE"


def test_where_not_all_can_be_silenced_the_weights_are_asked_in_both_ways_whatever_it_is_called():
    bare = findings(covers=False)
    directions = AttackFinding("mine", "underneath", "a case", NONE, 0.04, 0.04, 1, asks_weights="directions")
    teaching = replace(directions, attack="another", asks_weights="teaching")
    for added, label in (
        ((directions, teaching), "ERASED"),
        ((directions,), "INCONCLUSIVE"),
        ((teaching,), "INCONCLUSIVE"),
        ((directions, replace(teaching, strongest=UNKNOWN)), "INCONCLUSIVE"),
        # A name alone grants nothing.
        (
            tuple(
                replace(directions, attack=name, asks_weights=None)
                for name in ("weight reversal", "disjoint relearning")
            ),
            "INCONCLUSIVE",
        ),
    ):
        assert judge(replace(bare, attacks=(*bare.attacks, *added))).label == label


def test_what_asks_the_weights_must_find_an_override_that_is_known_to_be_one():
    bare = findings(covers=False)
    directions = AttackFinding("mine", "underneath", "a case", NONE, 0.04, 0.04, 1, asks_weights="directions")
    teaching = replace(directions, attack="another", asks_weights="teaching")
    bare = replace(bare, attacks=(*bare.attacks, directions, teaching))
    found, blind = about(0.2, 0.1), about(0.1, 0.11)
    for control, label in (
        ({"mine": found, "another": found}, "ERASED"),
        ({"mine": found, "another": blind, "another (layer 1)": found}, "ERASED"),
        ({"mine": found, "another": blind}, "INCONCLUSIVE"),
        ({"mine": found, "another": blind, "another one (layer 1)": found}, "INCONCLUSIVE"),
        ({"mine": blind, "another": found}, "INCONCLUSIVE"),
        ({"route-old": found, "readout": found}, "INCONCLUSIVE"),  # what others find is no matter
        ({}, "INCONCLUSIVE"),
    ):
        judged = judge(replace(bare, control=control))
        assert judged.label == label, control
        assert any("made as a control" in line for line in judged.missing) == (label == "INCONCLUSIVE")


def test_an_absence_is_of_enough_facts_in_every_attack():
    assert judge(findings(route_old=Estimate(0.0, 0.0, 0.05, 49))).label == "INCONCLUSIVE"
    assert judge(findings(route_old=Estimate(0.0, 0.0, 0.05, 50))).label == "ERASED"


def test_what_the_model_cannot_spare_is_only_named_where_it_was_tried():
    for covers, said in ((False, True), (None, False), (True, False)):
        missing = judge(findings(covers=covers)).missing
        assert any("can't spare it" in line for line in missing) is said
