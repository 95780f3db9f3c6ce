"""How a value is searched for: of convex losses the optimum, inside the ball and on it, alone and among others."""

import laws
import pytest
import tiny
import torch

import tl_factedit as fe
from tl_factedit.editing.value_fit import ValueFit
from tl_factedit.editing.value_methods import AdamSteps, LineSearch, ValueMethod

SIZE = 12
LINES = LineSearch()


# ---------------------------------------------------------------------------------------- a convex loss


def problems(facts=3, places=1, seed=0):
    """½ (x − c)ᵀ A (x − c), curvatures from 1 to 100, [fact place·size]: A and c."""
    draw = torch.Generator().manual_seed(seed)
    size = places * SIZE
    turn = torch.linalg.qr(torch.randn(facts, size, size, generator=draw, dtype=torch.float64))[0]
    curvature = torch.logspace(0, 2, size, dtype=torch.float64)
    return turn @ (curvature[:, None] * turn.mT), torch.randn(facts, size, generator=draw, dtype=torch.float64)


def asked(problem, at):
    """Losses and gradients at some points, [fact place size]."""
    matrix, centre = problem
    away = at.flatten(1) - centre
    gradient = (matrix @ away[..., None])[..., 0]
    return 0.5 * (away * gradient).sum(-1), gradient.view_as(at)


def searched(problem, most, steps, method=LINES, places=1, lr=0.5):
    """What is found in so many evaluations, and the least loss after each."""
    facts = len(problem[1])
    start = torch.zeros(facts, places, SIZE, dtype=torch.float64)
    search = method.begin(start, torch.full((facts, places), most, dtype=torch.float64), lr)
    least = []
    for _ in range(steps):
        loss, gradient = asked(problem, search.at)
        found = search.found(loss)
        least.append(asked(problem, found)[0])
        search.step(loss, gradient)
    return found, torch.stack(least)


def optimum_on_sphere(matrix, centre, radius):
    """x with (A + μ) x = A c and ‖x‖ = R, by halving the interval of μ."""
    low, high, one = 0.0, 1e6, torch.eye(len(centre), dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        x = torch.linalg.solve(matrix + middle * one, matrix @ centre)
        low, high = (middle, high) if x.norm() > radius else (low, middle)
    return x


def test_inside_the_ball_it_finds_the_optimum():
    problem = problems()
    found, least = searched(problem, 100.0, 60)
    assert torch.allclose(found.flatten(1), problem[1], atol=1e-5)
    assert (least.diff(dim=0) <= 0).all()


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.0])
def test_on_the_sphere_it_finds_the_optimum_that_may_be(radius):
    problem = problems()
    found, least = searched(problem, radius, 60)
    for x, matrix, centre in zip(found.flatten(1), *problem, strict=True):
        torch.testing.assert_close(x, optimum_on_sphere(matrix, centre, radius), rtol=0, atol=1e-4)
    assert (found.norm(dim=-1) <= radius * (1 + 1e-12)).all()
    assert (least.diff(dim=0) <= 0).all()


def test_of_two_places_each_has_its_ball():
    problem = problems(places=2)
    found, _ = searched(problem, 0.7, 80, places=2)
    assert (found.norm(dim=-1) <= 0.7 * (1 + 1e-12)).all()
    _, gradient = asked(problem, found)
    # At an optimum the gradient points straight inwards: nothing is left along either sphere.
    unit = torch.nn.functional.normalize(found, dim=-1)
    along = gradient - (gradient * unit).sum(-1, keepdim=True) * unit
    assert along.abs().max() < 1e-3 * gradient.abs().max()


@pytest.mark.parametrize("radius", [1.0, 100.0])
def test_it_needs_fewer_evaluations_than_adam(radius):
    problem = problems()
    _, ours = searched(problem, radius, 12)
    _, adams = searched(problem, radius, 25, AdamSteps())
    assert (ours[-1] <= adams.min(0).values * 1.01).all()


@pytest.mark.parametrize("method", [LINES, AdamSteps()], ids=["lines", "adam"])
def test_facts_together_are_found_as_each_alone_and_some_go_on_without_the_others(method):
    matrix, centre = problems(4)
    together, _ = searched((matrix, centre), 1.0, 15, method)
    for i in range(4):
        alone, _ = searched((matrix[i : i + 1], centre[i : i + 1]), 1.0, 15, method)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-9, atol=1e-9)
    start, most = torch.zeros(4, 1, SIZE, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
    search, rows = method.begin(start, most, 0.5), torch.arange(4)
    for step in range(15):
        if step == 6:
            rows = torch.tensor([3, 1])
            search = search.of(rows)
        loss, gradient = asked((matrix[rows], centre[rows]), search.at)
        found = search.found(loss)
        search.step(loss, gradient)
    torch.testing.assert_close(found, together[rows], rtol=1e-9, atol=1e-9)


def test_a_step_that_brings_nothing_is_taken_back_and_halved():
    def loss(x):
        return x.norm(dim=-1).pow(4)[:, 0] + 3 * x[:, 0, 0]  # flat at first, then steep

    search = LINES.begin(torch.zeros(1, 1, 2), torch.full((1, 1), 1e9), 100.0)
    seen = []
    for _ in range(30):
        at = search.at.clone().requires_grad_()
        now = loss(at)
        (gradient,) = torch.autograd.grad(now.sum(), at)
        seen.append(float(loss(search.found(now.detach()))))
        search.step(now.detach(), gradient)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == pytest.approx(float(loss(torch.tensor([[[-((3 / 4) ** (1 / 3)), 0.0]]]))), abs=1e-4)


# ---------------------------------------------------------------------------------------- values


@pytest.fixture(params=tiny.KINDS, scope="module")
def model(request):
    """Shared, as nothing here may change it."""
    return tiny.model(request.param, "gpt2")


FACTS = [laws.FACT, laws.OTHER, laws.FACT.but(target_new=" Rome in Italy")]


def fit(model, facts=FACTS, **options):
    """Values; fields of `ValueFit` by name."""
    options = {"stop_below": 0.0, "clamp": 0.75, **options}
    how = {"fit": ValueFit(**options), "prepend_bos": True, "progress": False}
    return fe.editing.fit_values(model, facts, 1, laws.CONTEXTS, where="resid", **how)


def test_a_loss_as_small_as_adams_in_half_the_evaluations_within_the_bound(model):
    for few, many in zip(fit(model, steps=12, method=LINES), fit(model, steps=25), strict=True):
        assert len(few.losses) == 12 and len(many.losses) == 25
        assert min(few.losses) <= many.losses[-1] + 1e-3
        assert few.losses[0] == many.losses[0]
        assert few.delta.norm() <= 0.75 * few.outputs[0].norm() * (1 + 1e-5)


def test_what_is_found_has_the_least_loss_of_all_that_was_asked(model):
    for found in fit(model, steps=7, lr=30.0, method=LINES):
        assert found.losses[-1] > min(found.losses) or found.clamped
    found = fit(model, steps=7, method=LINES)
    again = fit(model, steps=7, method=LINES)
    assert all(torch.equal(one.delta, other.delta) for one, other in zip(found, again, strict=True))


def test_values_of_facts_together_are_those_of_each_alone(model):
    for i, together in enumerate(fit(model, steps=8, stop_below=0.5, method=LINES)):
        (alone,) = fit(model, FACTS[i : i + 1], steps=8, stop_below=0.5, method=LINES)
        assert together.losses == pytest.approx(alone.losses, rel=1e-3)
        torch.testing.assert_close(together.delta, alone.delta, rtol=1e-2, atol=1e-2)


def test_an_edit_says_how_its_values_were_searched_for(model, tmp_path):
    few = {"contexts": ("",), "progress": False}
    stats = {1: fe.KeyStats.identity(model, 1)}
    for method, settings in ((LineSearch(4), {"history": 4, "first": 0.35}), (AdamSteps(), {})):
        edit = fe.Memit(stats, weight=1.0, fit=ValueFit(steps=2, method=method), **few)(model, [laws.FACT])
        assert edit.editor["fit"]["method"] == {"name": type(method).__name__, **settings}
        edit.save(tmp_path / "edit")
        assert fe.Edit.load(tmp_path / "edit").editor == edit.editor


def test_bad_choices_are_refused():
    assert isinstance(LINES, ValueMethod) and isinstance(AdamSteps(), ValueMethod)
    for bad, message in ((LineSearch, "is the class LineSearch"), ("lbfgs", "method is 'lbfgs', a str: needed fe")):
        choice = ValueFit()
        object.__setattr__(choice, "method", bad)  # past the type checker of these tests
        with pytest.raises(ValueError, match=message):
            choice.__post_init__()
    with pytest.raises(ValueError, match="history is 0, needed at least 1"):
        LineSearch(history=0)
    for published in ({"ease": 0.1}, {"stop_kl": 0.01}):
        with pytest.raises(ValueError, match="from step to step"):
            ValueFit(method=LINES, **published)
