"""Chapter 1 against closed forms: where the answer of rectified flow is known exactly, the script must give it.

Notation of the docstrings: x0 ~ N(0, s0^2) and x1 ~ N(mu, s1^2) in every coordinate, q^2 = (1-t)^2 s0^2 + t^2 s1^2.
Everything runs in float64, so that a tolerance shows the error of the method and not that of the numbers.
"""

import copy
import itertools
import math
import typing
from functools import partial

import pytest
import torch
from conftest import load
from torch import nn

flow = load("01_rectified_flow")
SCALES = [(1.0, 1.0), (1.0, 0.5), (2.0, 0.7)]       # (s0, s1)
MU = 3.0
EULER = {1: 0.0, 2: 0.5, 3: 0.64, 4: 0.72, 5: 0.77050, 8: 0.85082, 10: 0.87898, 20: 0.93770, 50: 0.97462, 100: 0.98723}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def standard(n):
    """(n, 2) points whose mean is exactly 0 and variance exactly 1: sums of squares carry no sampling error."""
    x = normal(n, 2)
    return (x - x.mean(0)) / x.std(0, correction=0)


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def gaussian_velocity(mu, s0, s1):
    """v*(x, t) = mu + (t s1^2 - (1-t) s0^2) / q^2 (x - t mu) for an independent coupling."""
    def velocity(x, t):
        t = t[:, None]
        q2 = (1 - t) ** 2 * s0 ** 2 + t ** 2 * s1 ** 2
        return mu + (t * s1 ** 2 - (1 - t) * s0 ** 2) / q2 * (x - t * mu)
    return velocity


def reflow_velocity(mu, s0, s1):
    """v2(x, t) = mu + (s1-s0) (x - t mu) / ((1-t) s0 + t s1) for the pairs z1 = mu + s1/s0 z0, which never cross."""
    def velocity(x, t):
        t = t[:, None]
        return mu + (s1 - s0) * (x - t * mu) / ((1 - t) * s0 + t * s1)
    return velocity


def reverse(velocity):
    """The same flow run backwards: w(x, s) = -v(x, 1 - s)."""
    return lambda x, s: -velocity(x, 1 - s)


def exact(target):
    return lambda x, t: flow.exact_velocity(x, t, target)


def log_density(x, t, means, std):
    """log p_t(x) up to a constant: a mixture of N(t mu_k, q^2) with q^2 = (1-t)^2 + t^2 std^2.  x: (B, 2), t: (B,)."""
    q2 = (1 - t) ** 2 + (t * std) ** 2
    distance = (x[:, None] - t[:, None, None] * means.to(x)).square().sum(2)
    return torch.logsumexp(-distance / (2 * q2[:, None]), 1) - torch.log(q2)


def score(x, t, target):
    """grad log p_t(x) by autograd: knows nothing of the formula for v*."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(log_density(x, t, *flow.MIXTURES[target]).sum(), x)[0]


def grid_posterior(x, t, target, reach=9.0, n=901):
    """E[x1 | x_t = x] by summing over a grid of x1: prior times likelihood N(x; t x1, (1-t)^2).  x: (2,), t: float."""
    line = torch.linspace(-reach, reach, n, dtype=torch.float64)
    x1 = torch.cartesian_prod(line, line)
    means, std = flow.MIXTURES[target]
    prior = -(x1[:, None] - means.to(x1)).square().sum(2) / (2 * std ** 2)
    likelihood = -(x - t * x1).square().sum(1) / (2 * (1 - t) ** 2)
    return torch.softmax(torch.logsumexp(prior, 1) + likelihood, 0) @ x1


def test_straight_line_ends_and_middle():
    """x_t is x0 at t=0, x1 at t=1, and each sample of a batch has its own t; points and images alike."""
    for shape in [(5, 2), (5, 3, 4, 4)]:
        x0, x1 = normal(*shape), normal(*shape)
        close(flow.interpolate(x0, x1, torch.zeros(5, dtype=x0.dtype)), x0, 0)
        close(flow.interpolate(x0, x1, torch.ones(5, dtype=x0.dtype)), x1, 0)
        t = torch.linspace(0, 1, 5, dtype=x0.dtype)
        xt = flow.interpolate(x0, x1, t)
        for i in range(5):
            close(xt[i], (1 - t[i]) * x0[i] + t[i] * x1[i], 1e-15)


def test_loss_is_the_mean_square_per_sample():
    """A velocity of 0 leaves |x1 - x0|^2, mean over D; the velocity sees (x_t, t)."""
    for shape in [(4, 2), (4, 3, 2, 2)]:
        x0, x1, t = normal(*shape), normal(*shape), torch.rand(4, dtype=torch.float64)
        close(flow.flow_matching_loss(lambda x, t: 0 * x, x0, x1, t), (x1 - x0).square().flatten(1).mean(1), 1e-14)
        seen = []
        flow.flow_matching_loss(lambda x, t: seen.append((x, t)) or x, x0, x1, t)
        close(seen[0][0], flow.interpolate(x0, x1, t), 0)
        close(seen[0][1], t, 0)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_gaussian_velocity_and_flow_map(std, monkeypatch):
    """exact_velocity is v* of the docstring above; its solution is Z_t = t mu + q_t Z0, which ends in mu + s1 Z0."""
    mean = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    monkeypatch.setitem(flow.MIXTURES, "gaussian", (mean, std))
    x, t = 3 * normal(50, 2), torch.rand(50, dtype=torch.float64)
    close(flow.exact_velocity(x, t, "gaussian"), gaussian_velocity(mean, 1.0, std)(x, t), 1e-12)
    path = flow.integrate(exact("gaussian"), x, 400, "heun")
    for i in (100, 200, 400):
        time = i / 400
        close(path[i], time * mean + math.sqrt((1 - time) ** 2 + (time * std) ** 2) * x, 1e-3)


@pytest.mark.parametrize("target", flow.MIXTURES)
def test_one_euler_step_of_the_first_flow_lands_on_the_data_mean(target):
    """v*(x, 0) = E[x1] - x whatever the data: every noise goes to the same point."""
    x0, mean = normal(20, 2), flow.MIXTURES[target][0].double().mean(0)
    close(flow.exact_velocity(x0, torch.zeros(20, dtype=torch.float64), target), mean - x0, 1e-12)
    close(flow.integrate(exact(target), x0, 1)[-1], mean.expand(20, 2), 1e-12)


def test_euler_shrinks_unit_normals_by_known_factors(monkeypatch):
    """N(0, 1) to N(0, 1): N Euler steps multiply by c_N = prod_i (1 + (2t-1) / (N (t^2 + (1-t)^2))), t = i/N."""
    monkeypatch.setitem(flow.MIXTURES, "gaussian", (torch.zeros(1, 2), 1.0))
    x0 = normal(10, 2)
    for n, factor in EULER.items():
        product = math.prod(1 + (2 * i / n - 1) / (n * ((i / n) ** 2 + (1 - i / n) ** 2)) for i in range(n))
        assert product == pytest.approx(factor, abs=6e-6)
        close(flow.integrate(exact("gaussian"), x0, n)[-1], product * x0, 1e-12)


@pytest.mark.parametrize("s0, s1", SCALES)
def test_straightness_and_irreducible_loss_of_gaussians(s0, s1):
    """S = (2 - pi/2) s0 s1 and V = pi/2 s0 s1 per coordinate, and the cost falls by S + V = 2 s0 s1."""
    velocity = gaussian_velocity(MU, s0, s1)
    x0, x1 = s0 * standard(100_000), MU + s1 * standard(100_000)
    straightness = flow.straightness(velocity, x0[:1000], 400) / x0[:1000].square().sum(1).mean() * s0 ** 2
    assert float(straightness) == pytest.approx((2 - math.pi / 2) * s0 * s1, rel=1e-3)
    loss = flow.loss_by_time(velocity, x0, x1, bins=5).mean().item()
    assert loss == pytest.approx(math.pi / 2 * s0 * s1, rel=0.01)
    drop = flow.transport_cost(x0, x1) - flow.transport_cost(*flow.make_pairs(velocity, x0, 50))
    assert drop / 2 == pytest.approx(2 * s0 * s1, rel=0.02)


def test_loss_by_time_of_unit_normals_follows_the_curve():
    """The least loss at a fixed t is s0^2 s1^2 / q_t^2: largest in the middle, where most lines cross."""
    x0, x1, edges = normal(100_000, 2), MU + normal(100_000, 2), torch.linspace(0, 1, 11, dtype=torch.float64)
    area = torch.atan(2 * edges - 1)                                   # antiderivative of 1 / (t^2 + (1-t)^2)
    close(flow.loss_by_time(gaussian_velocity(MU, 1.0, 1.0), x0, x1), area.diff() * 10, 0.03)


def test_loss_by_time_keeps_every_time_in_its_bin():
    seen = []
    flow.loss_by_time(lambda x, t: seen.append(t) or x, normal(500, 2), normal(500, 2), bins=4)
    for k, t in enumerate(seen):
        assert k / 4 <= t.min() < k / 4 + 0.02 and k / 4 + 0.23 < t.max() <= (k + 1) / 4


@pytest.mark.parametrize("s0, s1", SCALES)
def test_second_flow_of_gaussians_is_straight(s0, s1):
    """Reflow's pairs are z1 = mu + s1/s0 z0; their velocity has loss 0, S = 0, and one Euler step is exact."""
    z0, z1 = flow.make_pairs(gaussian_velocity(MU, s0, s1), s0 * normal(200, 2), 400)
    close(z1, MU + s1 / s0 * z0, 1e-3)
    velocity, z1 = reflow_velocity(MU, s0, s1), MU + s1 / s0 * z0
    assert flow.flow_matching_loss(velocity, z0, z1, torch.rand(200, dtype=torch.float64)).max() < 1e-24
    assert flow.straightness(velocity, z0, 20) < 1e-24
    close(flow.integrate(velocity, z0, 1)[-1], z1, 1e-12)


def test_two_points_have_the_tanh_velocity(monkeypatch):
    """x1 = +-1: v*(x, t) = (tanh(t x / (1-t)^2) - x) / (1-t)."""
    monkeypatch.setitem(flow.MIXTURES, "points", (torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 1e-6))
    x, t = normal(50, 2), 0.9 * torch.rand(50, dtype=torch.float64)
    v = flow.exact_velocity(x, t, "points")[:, 0]
    close(v, (torch.tanh(t * x[:, 0] / (1 - t) ** 2) - x[:, 0]) / (1 - t), 1e-6)
    x, t = torch.tensor([[-1.0, 0.0], [0.5, 0.0]], dtype=torch.float64), torch.full((2,), 0.3, dtype=torch.float64)
    close(flow.exact_velocity(x, t, "points")[:, 0], torch.tensor([0.648992, -0.290135]).double(), 1e-6)


@pytest.mark.parametrize("target", flow.MIXTURES)
@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.8])
def test_exact_velocity_equals_the_posterior_mean_on_a_grid(target, t):
    """v* = E[x1 - x0 | x_t], so E[x1 | x_t] = x + (1-t) v* and E[x0 | x_t] = x - t v*: brute force over all x1."""
    for x in flow.interpolate(normal(3, 2), flow.sample_target(target, 3).double(), torch.full((3,), t)):
        v = flow.exact_velocity(x[None], torch.tensor([t], dtype=torch.float64), target)[0]
        x1_hat = grid_posterior(x, t, target)
        close(x + (1 - t) * v, x1_hat, 1e-9)
        close(x - t * v, (x - t * x1_hat) / (1 - t), 1e-9)


@pytest.mark.parametrize("target", flow.MIXTURES)
def test_score_and_velocity_are_two_faces_of_one_field(target):
    """grad log p_t = (t v - x) / (1-t), hence v = (x + (1-t) grad log p_t) / t."""
    x, t = 3 * normal(100, 2), 0.05 + 0.9 * torch.rand(100, dtype=torch.float64)
    gradient, time = score(x, t, target), t[:, None]
    v = flow.exact_velocity(x, t, target)
    close((time * v - x) / (1 - time), gradient, 1e-9)
    close(v, (x + (1 - time) * gradient) / time, 1e-9)


def test_euler_is_ddim_in_other_coordinates():
    """DDIM on y = x / (a+s) with schedule a = t/n, s = (1-t)/n, n^2 = t^2 + (1-t)^2 takes the same steps."""
    steps, target = 12, "eight_gaussians"
    path = flow.integrate(exact(target), 2 * normal(30, 2), steps)
    norm = [math.hypot(i, steps - i) for i in range(steps + 1)]
    a, s = [i / n for i, n in enumerate(norm)], [(steps - i) / n for i, n in enumerate(norm)]
    y = path[1] * (a[1] + s[1])
    for i in range(1, steps):
        eps = -(1 - i / steps) * score(y / (a[i] + s[i]), y.new_full((30,), i / steps), target)
        y = a[i + 1] * (y - s[i] * eps) / a[i] + s[i + 1] * eps
    close(y / (a[steps] + s[steps]), path[-1], 1e-9)


def test_integrate_shapes_start_and_times():
    """The path starts in x0; velocities are asked at 0, 1/N, ... and never at t=1; one t per sample."""
    for shape in [(3, 2), (3, 1, 4, 4)]:
        x0, times = normal(*shape), []
        path = flow.integrate(lambda x, t: times.append(t) or torch.ones_like(x), x0, 4)
        assert path.shape == (5, *shape)
        close(path[0], x0, 0)
        close(path[-1], x0 + 1, 1e-14)
        close(torch.stack(times), torch.arange(4.0).double()[:, None].expand(4, 3) / 4, 0)
        assert flow.integrate(lambda x, t: -x, x0, 4, "heun").shape == (5, *shape)


def test_integrate_runs_from_noise_to_data():
    """dz = t dt from 0 to 1 gives 1/2: left sums (N-1)/2N for Euler.  Run backwards it would be -1/2 or (N+1)/2N."""
    def velocity(x, t):
        return t[:, None].expand_as(x)
    zero = torch.zeros(3, 2, dtype=torch.float64)
    close(flow.integrate(velocity, zero, 10)[-1], zero + 0.45, 1e-12)
    close(flow.integrate(velocity, zero, 10, "heun")[-1], zero + 0.5, 1e-12)
    close(flow.integrate(reverse(velocity), zero, 10)[-1], zero - 0.55, 1e-12)


def test_integrate_counts_evaluations_and_keeps_no_graph():
    for method, expected in (("euler", 6), ("heun", 12)):
        calls = []
        x0 = normal(2, 2).requires_grad_()
        path = flow.integrate(lambda x, t: calls.append(t) or x, x0, 6, method)
        assert len(calls) == expected and not path.requires_grad


def test_solvers_converge_at_their_order():
    """dz = z A dt ends in z0 exp(A).  Twice the steps: half the error of Euler, a quarter of Heun's."""
    matrix, x0 = torch.tensor([[-0.5, 2.0], [-1.5, 0.3]], dtype=torch.float64), normal(20, 2)
    truth = x0 @ torch.matrix_exp(matrix)

    def error(steps, method):
        return (flow.integrate(lambda x, t: x @ matrix, x0, steps, method)[-1] - truth).norm().item()
    assert error(64, "euler") / error(128, "euler") == pytest.approx(2, abs=0.1)
    assert error(64, "heun") / error(128, "heun") == pytest.approx(4, abs=0.2)


def test_backwards_in_time_returns_to_the_noise():
    """Many Heun steps there and back return to x0; ten of Euler do not, unless the flow is straight."""
    def there_and_back(velocity, steps, method):
        x1 = flow.integrate(velocity, x0, steps, method)[-1]
        return (flow.integrate(reverse(velocity), x1, steps, method)[-1] - x0).abs().max().item()
    x0 = normal(100, 2)
    assert there_and_back(exact("eight_gaussians"), 400, "heun") < 2e-3
    assert there_and_back(exact("eight_gaussians"), 10, "euler") > 0.3
    assert there_and_back(reflow_velocity(MU, 1.0, 0.5), 10, "euler") < 1e-12


def test_cost_identity_on_eight_gaussians():
    """cost(before) - cost(after) = S + V, V the loss of v*, holds for any data; evaluate() reports the gap."""
    x0, x1 = normal(20_000, 2), flow.sample_target("eight_gaussians", 20_000).double()
    result, z1 = flow.evaluate(exact("eight_gaussians"), x0, x1, x1[:400])
    result |= flow.compare_with_exact(exact("eight_gaussians"), x0, x1, "eight_gaussians")
    assert result["cost_before"] == pytest.approx(flow.transport_cost(x0, x1))
    assert result["cost_after"] == pytest.approx(flow.transport_cost(x0, z1))
    assert result["cost_before"] - result["cost_after"] > 5
    assert abs(result["identity_gap"]) < 0.03 * result["cost_before"]
    assert result["V"] == pytest.approx(2 * sum(result["loss_by_t"]) / 10)
    assert result["floor"] == pytest.approx(result["V"] / 2, rel=0.02) and result["excess"] == 0
    assert set(result["W2"]) == {"1", "2", "5", "10", "100"} and result["W2"]["1"] > 3 * result["W2"]["100"]


def test_floor_and_excess_of_the_gaussian_target():
    """The floor of N(0,1) to N(mu, s^2) is pi/2 s; a velocity that is off by c has the excess c^2."""
    x0, x1 = flow.draw_independent("gaussian", "cpu", 100_000)
    result = flow.compare_with_exact(exact("gaussian"), x0, x1, "gaussian")
    assert result["floor"] == pytest.approx(math.pi / 2 * 0.5, rel=0.01) and result["excess"] < 1e-12
    result = flow.compare_with_exact(lambda x, t: exact("gaussian")(x, t) + 0.5, x0, x1, "gaussian")
    assert result["excess"] == pytest.approx(0.25, rel=1e-4)


def best_linear_loss(x0, x1, slices=50):
    """The least loss over all velocities that are linear in x at each t, by least squares; Gaussians need no more."""
    total = 0.0
    for i in range(slices):
        t = torch.full((len(x0),), (i + 0.5) / slices, dtype=x0.dtype)
        xt = torch.cat([flow.interpolate(x0, x1, t), torch.ones(len(x0), 1, dtype=x0.dtype)], 1)
        fit = torch.linalg.lstsq(xt, x1 - x0).solution
        total += (xt @ fit - (x1 - x0)).square().mean().item() / slices
    return total


def test_stored_pairs_stay_paired_and_shuffling_undoes_reflow():
    """Pairs of a flow can be learned without loss; shuffled ones are an independent coupling again, V = pi/2 s1."""
    z0, z1 = flow.make_pairs(gaussian_velocity(MU, 1.0, 0.5), normal(20_000, 2), 50)
    assert best_linear_loss(*flow.draw_stored(z0, z1, 20_000)) < 1e-4
    shuffled = flow.draw_stored(z0, z1[torch.randperm(len(z1))], 20_000)
    assert best_linear_loss(*shuffled) == pytest.approx(math.pi / 2 * 0.5, rel=0.03)
    independent = flow.draw_independent("gaussian", "cpu", 20_000)
    assert best_linear_loss(*independent) == pytest.approx(math.pi / 2 * 0.5, rel=0.03)


def test_stored_pairs_are_drawn_anew_and_all():
    """Every pair is used, equally often; two draws differ."""
    pairs = torch.arange(50.0)[:, None].expand(50, 2)
    z0, z1 = flow.draw_stored(pairs, -pairs, 20_000)
    close(z0, -z1, 0)
    counts = torch.bincount(z0[:, 0].long(), minlength=50)
    assert counts.min() > 280 and counts.max() < 520                   # 400 expected, +- 20
    assert not torch.equal(flow.draw_stored(pairs, -pairs, 50)[0], flow.draw_stored(pairs, -pairs, 50)[0])


def test_wasserstein2_closed_forms():
    """1-D: sorting is the best matching.  A shift by c costs |c|; order does not matter; few points by brute force."""
    a, b = normal(200, 1), 2 * normal(200, 1) + 1
    assert flow.wasserstein2(a, b) == pytest.approx((a.sort(0)[0] - b.sort(0)[0]).square().mean().sqrt().item())
    a, shift = normal(100, 2), torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert flow.wasserstein2(a, a + shift) == pytest.approx(5)
    assert flow.wasserstein2(a[torch.randperm(100)], a + shift) == pytest.approx(5)
    assert flow.wasserstein2(a, a[torch.randperm(100)]) < 1e-6
    a, b = normal(5, 2), normal(5, 2)
    best = min((a[list(order)] - b).square().sum(1).mean().sqrt().item() for order in itertools.permutations(range(5)))
    assert flow.wasserstein2(a, b) == pytest.approx(best) and flow.wasserstein2(b, a) == pytest.approx(best)


def test_transport_cost_sums_over_coordinates():
    assert flow.transport_cost(torch.zeros(5, 2), torch.tensor([3.0, 4.0]).expand(5, 2)) == pytest.approx(25)
    assert flow.transport_cost(torch.zeros(5, 3, 2, 2), torch.ones(5, 3, 2, 2)) == pytest.approx(12)


@pytest.mark.parametrize("target", flow.TARGETS)
def test_targets_are_finite_and_repeat_under_a_seed(target):
    draws = []
    for s in (7, 7, 8):
        torch.manual_seed(s)
        draws.append(flow.sample_target(target, 1000))
    assert draws[0].shape == (1000, 2) and draws[0].dtype == torch.float32 and draws[0].isfinite().all()
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].abs().max() < 8 and draws[0].std(0).min() > 0.3


def test_targets_are_the_choices_of_the_flag():
    choices = typing.get_args(typing.get_type_hints(flow.Config)["target"])
    assert set(choices) == set(flow.TARGETS)


@pytest.mark.parametrize("target", flow.MIXTURES)
def test_moments_of_mixtures(target):
    """Mean of the means; covariance of the means plus std^2; as many points at every component."""
    means, std = flow.MIXTURES[target]
    x = flow.sample_target(target, 200_000)
    close(x.mean(0), means.mean(0), 0.05)
    centred = means - means.mean(0)
    close(x.T.cov(), centred.T @ centred / len(means) + std ** 2 * torch.eye(2), 0.1)
    nearest = torch.cdist(x, means).argmin(1)
    close(torch.bincount(nearest, minlength=len(means)) / len(x), torch.full((len(means),), 1 / len(means)), 0.01)


def test_eight_gaussians_stand_on_a_circle():
    means, std = flow.MIXTURES["eight_gaussians"]
    assert std == 0.5623 and means.shape == (8, 2)
    close(means.norm(dim=1), torch.full((8,), 5.0), 1e-5)
    close((means - means.roll(1, 0)).norm(dim=1), torch.full((8,), 10 * math.sin(math.pi / 8)), 1e-5)


def test_geometry_of_the_other_targets():
    """Checkerboard: eight dark squares.  Moons: on two half circles of radius 3, centred."""
    x = flow.sample_target("checkerboard", 20_000)
    cell = torch.floor((x + 4) / 2).long()
    assert cell.min() == 0 and cell.max() == 3 and (cell.sum(1) % 2 == 0).all()
    assert torch.bincount(cell[:, 0] * 4 + cell[:, 1])[[0, 2, 5, 7, 8, 10, 13, 15]].min() > 2200   # of 2500
    x = flow.sample_target("two_moons", 50_000)
    close(x.mean(0), torch.zeros(2), 0.1)
    centres = torch.tensor([[-1.5, -0.75], [1.5, 0.75]])
    assert ((torch.cdist(x, centres) - 3).abs().min(1).values < 1.2).all()


def test_wrong_arguments_raise_value_errors():
    x, t = normal(4, 2), torch.rand(4)
    for wrong in [(x, x[:3], t), (x, x, t[:3]), (x, normal(4, 3), t), (x, x, t[:, None])]:
        with pytest.raises(ValueError, match=r"got \(4, 2\)"):
            flow.flow_matching_loss(lambda x, t: x, *wrong)
    for steps, method in [(0, "euler"), (-1, "heun"), (5, "midpoint"), (5, "rk45")]:
        with pytest.raises(ValueError, match=method):
            flow.integrate(lambda x, t: x, x, steps, method)
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 2\)"):
        flow.wasserstein2(x, x[:3])
    with pytest.raises(ValueError, match="eight_gaussians"):
        flow.sample_target("nine_gaussians", 3)
    with pytest.raises(KeyError):
        flow.exact_velocity(x, t.double(), "checkerboard")


class Line(nn.Module):
    """The smallest velocity that can learn: x @ slope + offset."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x, t):
        return self.linear(x)


def test_ema_by_hand():
    """a <- d a + (1-d) w with d = min(decay, (1 + step) / (10 + step)); the network itself is left alone."""
    model = Line()
    ema = flow.EMA(model, 0.3)
    expected = model.linear.weight.detach().clone()
    assert not any(p.requires_grad for p in ema.model.parameters())
    for step in range(6):
        with torch.no_grad():
            model.linear.weight += torch.randn(2, 2)
        weight = model.linear.weight.detach().clone()
        ema.update(model, step)
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight
        close(ema.model.linear.weight, expected, 1e-6)
        assert torch.equal(model.linear.weight, weight)
    x = torch.randn(3, 2)
    assert torch.equal(ema(x, torch.zeros(3)), ema.model.linear(x))


def test_learning_rate_by_hand():
    """Ramp of `warmup` steps times (1 + cos(pi step / steps)) / 2; the cosine is 1 at the start and 0 at the end."""
    config = flow.Config(lr=2.0, warmup=10, steps=100)
    assert flow.learning_rate(0, config) == pytest.approx(0.2)
    assert flow.learning_rate(4, config) == pytest.approx(1.0 * (1 + math.cos(0.04 * math.pi)) / 2)
    assert flow.learning_rate(50, config) == pytest.approx(1.0)
    assert 0 < flow.learning_rate(99, config) < 1e-3
    flat = flow.Config(lr=2.0, warmup=4, steps=100, lr_decay="constant")
    assert [flow.learning_rate(s, flat) for s in (0, 1, 2, 3, 4, 99)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert flow.learning_rate(0, flow.Config(lr=2.0, warmup=0, steps=100)) == pytest.approx(2.0)


def test_train_reaches_the_least_squares_optimum():
    """At t = 1/2 and on a fixed set of pairs, the best linear velocity is a least squares fit; train() finds it."""
    x0, x1, t = torch.randn(200, 2), 1 + 0.5 * torch.randn(200, 2), torch.full((200,), 0.5)
    config = flow.Config(steps=400, lr=0.1, warmup=10, grad_clip=100.0, ema_decay=0.5)
    model, losses, steps = Line(), [], []
    for step, loss, ema in flow.train(model, lambda m, ema, i: flow.flow_matching_loss(m, x0, x1, t), config):
        steps.append(step)
        losses.append(loss)
    assert steps == list(range(1, 401))
    assert losses[0].shape == () and not losses[0].requires_grad
    design = torch.cat([flow.interpolate(x0, x1, t), torch.ones(200, 1)], 1)
    best = torch.linalg.lstsq(design, x1 - x0).solution
    for trained in (model, ema.model):
        close(torch.cat([trained.linear.weight.T, trained.linear.bias[None]]), best, 1e-3)
    assert losses[-1].item() == pytest.approx((design @ best - (x1 - x0)).square().mean().item(), rel=1e-4)


def train_some(seed=0, stream=0, steps=8, noise=False):
    """A few steps of the real network.  Returns it, its EMA, and copies of everything after step 3."""
    torch.manual_seed(1)
    config = flow.Config(steps=8, batch=16, seed=seed, width=8)
    model = flow.VelocityMLP(8, 2)
    optimizer = flow.make_optimizer(model, config)
    draw = partial(flow.draw_independent, "gaussian", "cpu")
    loss_fn = partial(flow.pair_loss, draw=draw, n=config.batch)
    progress = optimizer, flow.EMA(model, config.ema_decay), 0
    for step, _, ema in flow.train(model, loss_fn, config, stream, progress):
        if noise:
            torch.rand(5)                                              # what a caller draws must not matter
        if step == 3:
            middle = copy.deepcopy((model.state_dict(), optimizer.state_dict(), ema, loss_fn, config))
        if step == steps:
            break
    return flatten(model), flatten(ema.model), middle


def flatten(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_repeats_under_a_seed():
    """Same seed, same bits, whatever the caller draws between steps; another seed or stream, other weights."""
    weights, average, _ = train_some()
    again, average_again, _ = train_some(noise=True)
    assert torch.equal(weights, again) and torch.equal(average, average_again)
    assert not torch.equal(weights, train_some(seed=1)[0])
    assert not torch.equal(weights, train_some(stream=1)[0])


def test_training_continues_bit_for_bit():
    """Stopped after step 3 and continued from saved states: the same weights as undisturbed."""
    weights, average, (state, optimizer_state, ema, loss_fn, config) = train_some()
    model = flow.VelocityMLP(8, 2)
    model.load_state_dict(state)
    optimizer = flow.make_optimizer(model, config)
    optimizer.load_state_dict(optimizer_state)
    steps = [step for step, _, ema in flow.train(model, loss_fn, config, 0, (optimizer, ema, 3))]
    assert steps == [4, 5, 6, 7, 8]
    assert torch.equal(flatten(model), weights) and torch.equal(flatten(ema.model), average)


def test_first_round_loss_uses_all_of_the_batch_and_uniform_times():
    """pair_loss draws n pairs and t ~ U[0, 1]."""
    seen = []
    draw = partial(flow.draw_independent, "gaussian", "cpu")
    assert flow.pair_loss(lambda x, t: seen.append(t) or x, None, 0, draw, 5000).shape == (5000,)
    quartiles = torch.quantile(seen[0], torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    close(quartiles, torch.linspace(0, 1, 5), 0.04)


def test_network_is_trained_everywhere_and_knows_the_time():
    """The gradient reaches every parameter; outputs depend on x and on t; nothing but weights is saved."""
    torch.manual_seed(0)
    model = flow.VelocityMLP(16, 3)
    x, t = torch.randn(10, 2), torch.rand(10)
    assert model(x, t).shape == (10, 2)
    flow.flow_matching_loss(model, x, torch.randn(10, 2), t).mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert not torch.allclose(model(x, t), model(x, 1 - t), atol=1e-3)
    assert not torch.allclose(model(x, t), model(x + 1, t), atol=1e-3)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
