"""A planted associative memory: what each update writes, what it costs, and what it leaves alone.

Everything here is float64; 1e-9 is some thousand roundings of numbers of size 1.
"""

import pytest
import torch
from oracles import editing
from oracles.editing import whiten_key

from tl_factedit.core.solve import NotPositiveDefiniteError, cholesky, rank_one, whiten

EXACT = {"rtol": 1e-9, "atol": 1e-9}
SIZES = [(24, 10), (10, 24), (16, 16)]


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Memory:
    """Keys drawn from N(0, C) with a known, far from round C, and a W that answers them."""

    def __init__(self, d_mlp: int, d_model: int):
        spread = torch.logspace(-1, 1, d_mlp, dtype=torch.float64)
        self.root = torch.linalg.qr(noise(d_mlp, d_mlp, seed=1))[0] * spread
        self.moment = self.root @ self.root.T
        self.W = noise(d_mlp, d_model, seed=2)
        self.key = self.draw(1, seed=3)[0]
        self.value = noise(d_model, seed=4)
        self.residual = self.value - self.key @ self.W

    def draw(self, count: int, *, seed: int) -> torch.Tensor:
        return noise(count, len(self.root), seed=seed) @ self.root.T

    def rome(self, moment: torch.Tensor | None = None) -> torch.Tensor:
        direction = whiten_key(self.moment if moment is None else moment, self.key)
        return dense(rank_one(direction, self.key, self.residual))

    def plain(self) -> torch.Tensor:
        return dense(rank_one(self.key, self.key, self.residual))

    def cost(self, delta: torch.Tensor) -> torch.Tensor:
        """E‖Δᵀk‖² over keys: how much the update disturbs what is stored."""
        return torch.trace(delta.T @ self.moment @ delta)


def dense(factors) -> torch.Tensor:
    return factors.left @ factors.right


@pytest.fixture(params=SIZES, ids="{0[0]}x{0[1]}".format)
def memory(request) -> Memory:
    return Memory(*request.param)


# ---------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("update", ["rome", "plain"])
def test_the_key_answers_with_its_new_value_and_did_not_before(memory, update):
    edited = memory.W + getattr(memory, update)()
    torch.testing.assert_close(memory.key @ edited, memory.value, **EXACT)
    assert (memory.key @ memory.W - memory.value).norm() > 1


def test_rome_is_the_formula_with_an_explicit_inverse(memory):
    oracle = editing.rank_one(memory.moment, memory.key, memory.key, memory.residual)
    torch.testing.assert_close(memory.rome(), oracle, **EXACT)
    assert not torch.allclose(memory.rome(), oracle.roll(1, 0), **EXACT)


def test_the_plain_update_is_r_k_over_k_k(memory):
    expected = torch.outer(memory.key, memory.residual) / memory.key.square().sum()
    torch.testing.assert_close(memory.plain(), expected, **EXACT)


def test_rome_in_the_metric_of_the_identity_is_the_plain_update(memory):
    identity = torch.eye(len(memory.key), dtype=torch.float64)
    torch.testing.assert_close(memory.rome(identity), memory.plain(), **EXACT)
    assert not torch.allclose(memory.rome(), memory.plain(), **EXACT)


def test_a_scale_of_the_moment_changes_nothing(memory):
    torch.testing.assert_close(memory.rome(1e6 * memory.moment), memory.rome(), **EXACT)


def test_float32_is_solved_in_float64(memory):
    factors = rank_one(memory.key.float(), memory.key.float(), memory.residual.float())
    assert factors.left.dtype == factors.right.dtype == torch.float64
    assert whiten_key(memory.moment.float(), memory.key.float()).dtype == torch.float64


# ---------------------------------------------------------------------------------------- what it costs


def test_the_cost_of_rome_is_r_squared_over_s(memory):
    s = memory.key @ torch.linalg.inv(memory.moment) @ memory.key
    torch.testing.assert_close(memory.cost(memory.rome()), memory.residual.square().sum() / s, **EXACT)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_rome_costs_less_than_two_thousand_other_updates_that_write_the_same(memory, size):
    delta, k = memory.rome(), memory.key
    others = size * noise(2_000, *delta.shape, seed=5)
    others -= torch.outer(k, k) @ others / (k @ k)
    torch.testing.assert_close(k @ (delta + others[0]), memory.residual, **EXACT)
    costs = (memory.root.T @ (delta + others)).square().sum((1, 2))
    torch.testing.assert_close(costs[0], memory.cost(delta + others[0]), **EXACT)
    assert (costs > memory.cost(delta)).all()


def test_the_plain_update_is_smaller_and_does_more_damage(memory):
    assert memory.plain().norm() < memory.rome().norm()
    assert memory.cost(memory.plain()) > memory.cost(memory.rome())


# ---------------------------------------------------------------------------------------- what it leaves alone


def test_each_update_spares_the_keys_that_are_orthogonal_in_its_own_metric_and_moves_the_others(memory):
    k, u = memory.key, torch.linalg.inv(memory.moment) @ memory.key
    keys = memory.draw(5, seed=6)
    spared_by_rome = keys - torch.outer(keys @ u, u) / (u @ u)
    spared_by_plain = keys - torch.outer(keys @ k, k) / (k @ k)
    for update, spared, moved in (
        (memory.rome(), spared_by_rome, spared_by_plain),
        (memory.plain(), spared_by_plain, spared_by_rome),
    ):
        torch.testing.assert_close(spared @ update, torch.zeros(5, update.shape[1]).double(), **EXACT)
        assert ((moved @ update).norm(dim=1) > 1e-3).all()


def test_another_key_moves_by_its_gain(memory):
    factors = rank_one(whiten_key(memory.moment, memory.key), memory.key, memory.residual)
    keys = memory.draw(4, seed=7)
    gain = keys @ torch.linalg.inv(memory.moment) @ memory.key
    gain = gain / (memory.key @ torch.linalg.inv(memory.moment) @ memory.key)
    torch.testing.assert_close(keys @ dense(factors), torch.outer(gain, memory.residual), **EXACT)


# ---------------------------------------------------------------------------------------- Meng et al.'s two keys


def test_the_original_variant_is_exact_at_the_bare_key_and_off_by_a_known_factor_at_the_mean_key(memory):
    bare, mean = memory.key, memory.key + 0.3 * memory.draw(1, seed=8)[0]
    u = whiten_key(memory.moment, mean)
    delta = dense(rank_one(u, bare, memory.residual))
    torch.testing.assert_close(delta, editing.rank_one(memory.moment, mean, bare, memory.residual), **EXACT)
    torch.testing.assert_close(bare @ delta, memory.residual, **EXACT)
    factor = (u @ mean) / (u @ bare)
    assert abs(factor - 1) > 0.01
    torch.testing.assert_close(mean @ delta, factor * memory.residual, **EXACT)


# ---------------------------------------------------------------------------------------- a moment from samples


def test_a_moment_from_samples_does_less_damage_than_none_and_the_least_in_the_limit():
    memory = Memory(24, 10)
    best = memory.cost(memory.rome())

    def excess(count: int) -> float:
        """Damage over the optimum, averaged over 20 samples of keys."""
        found = []
        for seed in range(20):
            keys = memory.draw(count, seed=100 + seed)
            found.append(float(memory.cost(memory.rome(keys.T @ keys / count)) / best - 1))
        return sum(found) / len(found)

    at = {count: excess(count) for count in (240, 960, 3840)}
    assert all(value > 0 for value in at.values())
    assert at[240] < float(memory.cost(memory.plain()) / best - 1)
    # The excess is of second order in the error of C, which falls as 1/sqrt(T): four times the tokens, a quarter.
    assert at[240] / at[960] == pytest.approx(4, rel=0.5)
    assert at[960] / at[3840] == pytest.approx(4, rel=0.5)


# ---------------------------------------------------------------------------------------- whitening


def test_whitening_is_the_inverse_times_the_key(memory):
    expected = torch.linalg.inv(memory.moment) @ memory.key
    torch.testing.assert_close(whiten_key(memory.moment, memory.key), expected, **EXACT)
    torch.testing.assert_close(whiten(cholesky(memory.moment), memory.key), expected, **EXACT)


def test_the_ridge_is_a_share_of_the_mean_eigenvalue(memory):
    m = len(memory.key)
    ridged = memory.moment + 0.1 * torch.linalg.eigvalsh(memory.moment).mean() * torch.eye(m, dtype=torch.float64)
    found = whiten_key(memory.moment, memory.key, ridge=0.1)
    torch.testing.assert_close(found, torch.linalg.inv(ridged) @ memory.key, **EXACT)
    assert not torch.allclose(found, whiten_key(memory.moment, memory.key), rtol=1e-2)


def test_whitening_leaves_the_moment_as_it_is(memory):
    before = memory.moment.clone()
    whiten_key(memory.moment, memory.key, ridge=0.1)
    assert torch.equal(memory.moment, before)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("size", [8, 16, 64])
def test_a_moment_of_fewer_directions_than_dimensions_is_refused_however_rounding_hides_it(size, seed):
    rank = 1 + seed * (size - 2) // 19
    keys = noise(4 * size, rank, seed=seed) @ noise(rank, size, seed=seed + 1)
    singular = keys.T @ keys / len(keys)
    with pytest.raises(NotPositiveDefiniteError, match=r"not positive definite|condition number at least"):
        whiten_key(singular, keys[0])
    assert whiten_key(singular, keys[0], ridge=1e-4).isfinite().all()


@pytest.mark.parametrize(("smallest", "fine"), [(1e-10, True), (1e-14, False), (0.0, False), (-1.0, False)])
def test_ill_conditioned_moments_are_refused_beyond_what_float64_can_solve(smallest, fine):
    moment = torch.diag(torch.tensor([1.0, 1.0, smallest], dtype=torch.float64))
    if fine:
        assert whiten_key(moment, torch.ones(3))[2] == pytest.approx(1 / smallest)
    else:
        with pytest.raises(NotPositiveDefiniteError):
            whiten_key(moment, torch.ones(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(bad):
    moment = torch.eye(4, dtype=torch.float64)
    moment[2, 2] = bad
    with pytest.raises(NotPositiveDefiniteError):
        whiten_key(moment, torch.ones(4))


def test_a_direction_that_does_not_see_the_key_writes_nothing_and_says_so():
    direction, key = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    with pytest.raises(ZeroDivisionError, match="does not see the key"):
        rank_one(direction, key, torch.ones(3))
    assert rank_one(direction, key + 0.1 * direction, torch.ones(3)).left.isfinite().all()
