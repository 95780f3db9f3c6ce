"""Indirect routes: what follows from the fact, asked without asking for the fact.

A model that was changed through and through answers by the new object wherever the old one led; an override answers the
prompt that it was made for, and elsewhere the old object may still show: the country of a city, the second
hop of two, the reverse question. After RippleEdits (Cohen et al. 2023, arXiv:2307.12976), and with the old answer
scored beside the new one.

A route counts only if the unedited model goes it: if, of the answers offered, it finds the old one likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_factedit.attacks.attack import Case, Recovery
from tl_factedit.backend.protocol import Model
from tl_factedit.backend.runner import Runner
from tl_factedit.backend.state import plain_torch
from tl_factedit.core.estimate import Estimate
from tl_factedit.core.facts import Fact, check_text, glued, texts_of
from tl_factedit.core.kinds import as_several, check_one
from tl_factedit.core.settings import check_settings
from tl_factedit.core.spacing import Mending, all_spaced, goes_on_inside, stripped
from tl_factedit.core.telling import tell
from tl_factedit.core.tokens import check_room, continuation, encode
from tl_factedit.measure.change import Change, check_made_for, identity
from tl_factedit.measure.excess import excess_of
from tl_factedit.measure.first_tokens import firsts
from tl_factedit.measure.likelihood import Request, log_probs
from tl_factedit.measure.population import BATCH_TOKENS, Population

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES = ("old_first", "new_first", "control_first")


@dataclass(frozen=True)
class Route:
    """A prompt whose answer follows from a fact.

    Answers are continuations of the prompt, letter for letter but for the white space that `Fact` mends too.

    Attributes:
        fact: What it follows from.
        prompt: A whole text, without ``"{}"``.
        old_answer: What follows if the old object holds.
        new_answer: What follows if the new one does; None if nothing does.
        controls: Answers that follow from neither: the null. Without them no excess is measured.
        kind: A name for the kind of route, e.g. ``"country"``, ``"two hops"`` or ``"reverse"``.

    Raises:
        ValueError: The prompt or an answer is empty, or the prompt has a ``"{}"`` left.

    Warns:
        UserWarning: White space was mended, or an answer goes on inside the prompt's last word.
    """

    fact: Fact
    prompt: str
    old_answer: str
    new_answer: str | None
    _: KW_ONLY
    controls: Sequence[str] = ()
    kind: str = "implied"

    def __post_init__(self) -> None:
        """Check the texts, and freeze the controls."""
        check_one(self.fact, Fact, "fact", "a Fact, from which the answer follows")
        for name in ("prompt", "old_answer", "new_answer", "kind"):
            given = getattr(self, name)
            check_text(given, name, optional=name == "new_answer")
            if given is not None and not stripped(given):
                raise ValueError(f"{name} is {given!r}, needed some text")
        if "{}" in self.prompt:
            raise ValueError(f'prompt {self.prompt!r} has a "{{}}", needed the whole text: write fact.fill(prompt)')
        object.__setattr__(self, "controls", texts_of(self.controls, "controls"))
        self._mend_spaces()

    def _mend_spaces(self) -> None:
        """Mend the white space of prompt and answers by the rule of facts, and say so once."""
        mending, was = Mending(), self.prompt
        answers = [self.old_answer, self.new_answer]
        prompt = mending.prompt(was, [*answers, *self.controls])
        answers = [None if each is None else mending.target(each, prompt, was) for each in answers]
        apart = all_spaced(answers)
        controls = tuple(mending.target(each, prompt, was, spaced=apart) for each in self.controls)
        for name, value in zip(("prompt", "old_answer", "new_answer"), (prompt, *answers), strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "controls", controls)
        if mending.said:
            tell(f"white space of route {prompt!r} was mended: {'; '.join(mending.said)}")
        inside = [each for each in (*answers, *controls) if each is not None and goes_on_inside(prompt, each)]
        if inside:
            more = f"; so do {len(inside) - 1} more" if inside[1:] else ""
            tell(glued("answer", prompt, inside[0]) + more)

    @property
    def tells_apart(self) -> bool:
        """Whether the old and the new object lead to different answers."""
        return self.old_answer != self.new_answer


def as_routes(routes: Sequence[Route]) -> tuple[Route, ...]:
    """Some routes as a tuple.

    Raises:
        ValueError: Something else is given, or is among them.
    """
    return as_several(routes, Route, "routes", "a fe.Route(fact, prompt, old_answer, new_answer)")


@dataclass(frozen=True, eq=False)
class Routes:
    """Where the indirect routes lead, before and after.

    A fact's routes are averaged first; intervals are 95 % over facts. Facts without an executed route are left out.

    Attributes:
        routes: What was asked.
        executed: Which count: the unedited model finds the old answer likeliest, and the two answers differ, [route].
        before: Whether old and new answer are likeliest in the unedited model, and the mean of the controls,
            [route quantity] as in `QUANTITIES`; NaN where not offered.
        after: The same in the changed model.
        old: How often the old answer is still the likeliest.
        new: How often the new one is (over the routes that have one).
        old_excess: The old answer in excess of the controls.
        new_excess: The new answer in excess of the controls.
    """

    routes: tuple[Route, ...]
    executed: Bool[Tensor, "route"]
    before: Float[Tensor, "route quantity"]
    after: Float[Tensor, "route quantity"]
    old: Estimate
    new: Estimate
    old_excess: Estimate
    new_excess: Estimate

    @property
    @plain_torch()
    def share_executed(self) -> float:
        """Share of the routes that count; NaN if there are none."""
        return float(self.executed.float().mean()) if self.routes else math.nan

    @plain_torch()
    def of_kind(self, kind: str) -> Routes:
        """The same of one kind of route."""
        keep = [i for i, route in enumerate(self.routes) if route.kind == kind]
        if not keep:
            kinds = sorted({route.kind for route in self.routes})
            raise ValueError(f"no route is of the kind {kind!r}, needed one of {kinds}")
        return _summed(tuple(self.routes[i] for i in keep), self.executed[keep], self.before[keep], self.after[keep])

    @property
    def by_kind(self) -> Mapping[str, Routes]:
        """The same of each kind."""
        return {kind: self.of_kind(kind) for kind in dict.fromkeys(route.kind for route in self.routes)}

    @property
    @plain_torch()
    def says(self) -> str:
        """What was measured, in words."""
        if not self.routes:
            return "no indirect routes were given: nothing is known of what follows from the fact"
        if not bool(self.executed.any()):
            return f"the unedited model follows none of the {len(self.routes)} indirect routes: nothing was measured"
        return (
            f"the unedited model follows {int(self.executed.sum())} of {len(self.routes)} indirect routes; the old "
            f"answer is still likeliest in {self.old:.2f}, in excess of controls {self.old_excess:.2f}; the new in "
            f"{self.new:.2f}"
        )

    @plain_torch()
    def table(self) -> pd.DataFrame:
        """One row a route."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "fact": route.fact.name,
                    "kind": route.kind,
                    "prompt": route.prompt,
                    "old_answer": route.old_answer,
                    "new_answer": route.new_answer,
                    "executed": bool(self.executed[i]),
                    **{quantity: float(self.after[i, q]) for q, quantity in enumerate(QUANTITIES)},
                }
                for i, route in enumerate(self.routes)
            ]
        )

    def __repr__(self) -> str:
        """What was measured."""
        return f"Routes({self.says})"


@plain_torch()
def follow_routes(population: Population, routes: Sequence[Route], *, batch_tokens: int = BATCH_TOKENS) -> Routes:
    """Ask what follows from some facts, before and after a change.

    The likeliest answer is the one of largest whole probability after the prompt among old, new and controls.

    Args:
        population: Whose change is asked about; it has to serve each route's fact.
        routes: What to ask; none gives a result that says so.
        batch_tokens: Most tokens in one forward pass.

    Raises:
        ValueError: An answer isn't a continuation of its prompt; a change for each fact, and none for a route's.
    """
    routes = as_routes(routes)
    if not routes:
        nothing = torch.zeros(0, len(QUANTITIES))
        return _summed((), torch.zeros(0, dtype=torch.bool), nothing, nothing)
    asked_already = {identity(fact) for fact in population.facts}
    further = [route.fact for route in routes if identity(route.fact) not in asked_already]
    if isinstance(population.changed, Change) and not population.force:
        check_made_for(population.changed, further, "what is measured")
    asking = population.asking([route.fact for route in routes])
    asked = check_routes(population.model, routes, population.prepend_bos)

    def read(runner: Runner, indices: tuple[int, ...]) -> Float[Tensor, "route quantity"]:
        return _read(runner, [asked[i] for i in indices], batch_tokens)

    def settings(indices: tuple[int, ...]) -> object:
        return [asdict(routes[i]) for i in indices], batch_tokens

    before, after = asking.read("routes", read, settings=settings)
    apart = torch.tensor([route.tells_apart for route in routes])
    return _summed(routes, apart & (before[:, 0] == 1), before, after)


@dataclass(frozen=True)
class FollowRoutes:
    """Indirect routes as an attack: is the old answer still the likeliest where the fact isn't asked for?

    The one case takes a fact's routes together (their mean); a fact counts if one of its routes does. ``details`` has
    ``routes`` (`Routes`: every route, the kinds, and what follows from the new object).

    Attributes:
        routes: What to ask; those of facts that the population doesn't have are left out.
        batch_tokens: Most tokens in one forward pass.
        seed: Seed of the bootstrap.
    """

    routes: Sequence[Route]
    batch_tokens: int = BATCH_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        check_settings(self, least={"batch_tokens": 1})

    @plain_torch()
    def __call__(self, population: Population, /) -> Recovery:
        """Follow the routes.

        Raises:
            ValueError: No routes of the population's facts; an answer that isn't a continuation of its prompt.
        """
        places = {identity(fact): i for i, fact in enumerate(population.facts)}
        routes = [route for route in as_routes(self.routes) if identity(route.fact) in places]
        if not routes:
            raise ValueError("no route follows from a fact of the population, needed one at least")
        found = follow_routes(population, routes, batch_tokens=self.batch_tokens)
        of_fact = torch.tensor([places[identity(route.fact)] for route in routes])
        with_control = found.executed & ~found.after[:, 2].isnan()

        def by_fact(values: Float[Tensor, "route quantity"]) -> Float[Tensor, "fact 1 quantity"]:
            counted = torch.where(with_control[:, None], values, math.nan)
            return torch.stack([counted[of_fact == i].nanmean(0) for i in range(len(population.facts))])[:, None]

        before, after = by_fact(found.before), by_fact(found.after)
        return Recovery.of(
            "indirect routes",
            population,
            [Case("routes", "indirect routes", "underneath")],
            before,
            after,
            known=~after[:, 0, 0].isnan(),
            details={"routes": found},
            seed=self.seed,
        )


def check_routes(model: Model, routes: Sequence[Route], prepend_bos: bool) -> list[RouteTokens]:
    """The requests of some routes.

    Raises:
        ValueError: An answer is no continuation of its prompt, or both are longer than the model's context.
    """
    found = [RouteTokens.of(model.tokenizer, route, prepend_bos) for route in routes]
    for route, tokens in zip(routes, found, strict=True):
        answers = [answer for _, answer in tokens.requests]
        check_room(tokens.requests[0][0], answers, getattr(model.cfg, "n_ctx", None), route.prompt)
    return found


@dataclass(frozen=True, eq=False)
class RouteTokens:
    """A route's requests: old answer, new answer if there is one, controls."""

    requests: tuple[Request, ...]
    has_new: bool

    @classmethod
    def of(cls, tokenizer: Any, route: Route, bos: bool) -> RouteTokens:
        """Tokenise a route."""
        offered = [route.old_answer, *([] if route.new_answer is None else [route.new_answer])]
        offered += [text for text in dict.fromkeys(route.controls) if text not in offered]
        ids, _ = encode(tokenizer, route.prompt, prepend_bos=bos)
        return cls(
            tuple((ids, continuation(tokenizer, route.prompt, text, prepend_bos=bos)) for text in offered),
            route.new_answer is not None,
        )


def _read(runner: Runner, asked: Sequence[RouteTokens], batch_tokens: int) -> Float[Tensor, "route quantity"]:
    found = iter(log_probs(runner, [r for each in asked for r in each.requests], batch_tokens=batch_tokens))
    out = torch.full((len(asked), len(QUANTITIES)), math.nan)
    for i, one in enumerate(asked):
        log_p = torch.stack([next(found).double().sum() for _ in one.requests])
        first = firsts(log_p)
        out[i, 0] = first[0]
        if one.has_new:
            out[i, 1] = first[1]
        out[i, 2] = first[1 + one.has_new :].mean()
    return out


# ------------------------------------------------------------------------------------ over facts


def _summed(routes: tuple[Route, ...], executed: Tensor, before: Tensor, after: Tensor) -> Routes:
    facts = list(dict.fromkeys(identity(route.fact) for route in routes))
    of_fact = torch.tensor([facts.index(identity(route.fact)) for route in routes], dtype=torch.long)
    counted = torch.where(executed[:, None], after, math.nan)

    def by_fact(values: Tensor) -> Tensor:
        """The mean over each fact's routes that count."""
        if not facts:
            return torch.zeros(0)
        return torch.stack([values[of_fact == i].nanmean() for i in range(len(facts))])

    old, new, control = counted.T
    with_control = torch.where(control.isnan(), math.nan, old), torch.where(control.isnan(), math.nan, new)
    with_new = torch.where(new.isnan(), math.nan, control)
    return Routes(
        routes=routes,
        executed=executed,
        before=before,
        after=after,
        old=excess_of(by_fact(old)),
        new=excess_of(by_fact(new)),
        old_excess=excess_of(by_fact(with_control[0]), by_fact(control)),
        new_excess=excess_of(by_fact(with_control[1]), by_fact(with_new)),
    )
