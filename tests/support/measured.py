"""Measurements called with a model, a change and facts, as most tests have them; the population is made here."""

from collections.abc import Callable
from typing import Any

import tl_factedit as fe
from tl_factedit.attacks.attack import Recovery

OF_POPULATION = ("reference", "prepend_bos", "folder", "progress", "force")


def population(model, changed, facts, **options) -> fe.Population:
    return fe.Population.of(model, changed, facts, **{"progress": False, **options})


def _measured(measure: Callable) -> Callable[..., Any]:
    def call(model, changed, facts, *args, **options):
        of_population = {name: options.pop(name) for name in OF_POPULATION if name in options}
        return measure(population(model, changed, facts, **of_population), *args, **options)

    return call


def attack(made: type, model, changed, facts, *, reference=(), **options) -> Recovery:
    """An attack with some settings; what belongs to the population is put there."""
    of_population = {name: options.pop(name) for name in OF_POPULATION if name in options}
    return made(**options)(population(model, changed, facts, reference=reference, **of_population))


def knock_out(model, changed, facts, reference, **options) -> Recovery:
    return attack(fe.attacks.KnockOut, model, changed, facts, reference=reference, **options)


def read_out(model, changed, facts, **options) -> Recovery:
    return attack(fe.attacks.ReadOut, model, changed, facts, **options)


def reverse_by_weights(model, changed, facts, **options) -> Recovery:
    return attack(fe.attacks.WeightReversal, model, changed, facts, **options)


def attack_by_context(model, changed, facts, **options) -> Recovery:
    return attack(fe.attacks.ContextAttack, model, changed, facts, **options)


def relearn(model, changed, facts, **options) -> Recovery:
    return attack(fe.attacks.Relearn, model, changed, facts, **options)


def follow_routes(model, changed, routes, **options) -> fe.attacks.Routes:
    facts = [route.fact for route in routes] or [fe.Fact("Nobody", "{} is", " here")]
    return _measured(lambda whole: fe.attacks.follow_routes(whole, routes, **options))(
        model, changed, facts, **{name: options.pop(name) for name in OF_POPULATION if name in options}
    )


specificity = _measured(fe.evaluation.specificity)
drift = _measured(fe.evaluation.drift)
erasure_success = _measured(fe.evaluation.erasure_success)
mediate = _measured(fe.evaluation.mediate)
gain_coverage = _measured(fe.evaluation.gain_coverage)
attribute_positions = _measured(fe.evaluation.attribute_positions)


def retention(model, changed, facts, reference, calibration=None, **options) -> fe.auditing.Retention:
    return _measured(fe.auditing.retention)(model, changed, facts, calibration, reference=reference, **options)
