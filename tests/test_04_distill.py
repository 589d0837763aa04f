"""Chapter 4: the five losses on Gaussian data, where every answer is known; metrics; drawing, exporting; tiny runs.

Data N(m, s^2) in one dimension, noise N(0, 1): the velocity, the flow's map and the best any discretised student can
do are closed forms.  What is copied has tests in its home's file.
"""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark import shake
from conftest import (copy_run, driver, fixtures, kill_after_row, load, log_rows, networks_of_chapter_2, one_line,
                      same_weights, torchrun)
from PIL import Image
from torch import nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

NAME = "04_distill"
chapter = load(NAME)
SHARED = ("--data-size 64 --steps 6 --reflow-steps 4 --pairs 16 --shard 8 --eval-size 24 --pair-steps 2 --channels 4 "
          "--image-size 8 --mult 1 1 --attention 4 --batch 4 --log-every 2 --device cpu").split()     # as in chapter 2
TINY = [*SHARED, *"--distill-steps 4 --levels 20 --halvings 2 --lpips-weights random".split()]
CLASSES = 32                                                # labels of the shapes: colour, shape, background
STUDENTS = ["direct", "rf", "longer", "progressive-2", "progressive-1", "consistency", "ict", "meanflow",
            "remeanflow"]
here, run, finished = fixtures(NAME, TINY, figures=("draw_samples",))

M, S = 0.7, 0.5                                             # data N(M, S^2)


# ---- The Gaussian world ----------------------------------------------------------------------------------------------


def spread(t):
    """Standard deviation of x_t."""
    return ((t * S) ** 2 + (1 - t) ** 2) ** 0.5


def exact_velocity(x, t, labels=None):
    """v* = M + a(t) (x - t M)."""
    t = t.reshape(-1, 1)
    return M + (t * S ** 2 - (1 - t)) / spread(t) ** 2 * (x - t * M)


def exact_map(x, t):
    """Where the flow carries x from time t: M + (S / q_t) (x - t M)."""
    t = t.reshape(-1, 1)
    return M + S / spread(t) * (x - t * M)


def exact_student(x, t, labels=None):
    """The velocity whose jump is exact_map."""
    return (exact_map(x, t) - x) / (1 - t.reshape(-1, 1)).clamp(min=1e-12)


def draw_gaussian(n):
    """Noise and data drawn apart, float64, no labels."""
    return torch.randn(n, 1, dtype=torch.float64), M + S * torch.randn(n, 1, dtype=torch.float64), None


def lesson(draw, n, *teacher_and_distance, **rest):
    """A lesson in batches of n."""
    return chapter.Lesson(partial(draw, n), *teacher_and_distance, **rest)


def gain(times):
    """What is left of the noise's size when exact velocities are followed by Euler steps over increasing times."""
    a = [(t * S ** 2 - (1 - t)) / spread(t) ** 2 for t in times]
    return math.prod(1 + (r - t) * slope for t, r, slope in zip(times, times[1:], a))


class PerTime(nn.Module):
    """A student that is linear in x with weights of its own at every time of a grid: nothing holds it back."""

    def __init__(self, times, start=exact_velocity):
        super().__init__()
        self.register_buffer("times", times.double())
        zero, one = (start(torch.full((len(times), 1), x, dtype=torch.float64), self.times) for x in (0.0, 1.0))
        self.offset, self.slope = nn.Parameter(zero[:, 0]), nn.Parameter((one - zero)[:, 0])

    def forward(self, x, t, labels=None):
        i = (self.times[None] - t[:, None]).abs().argmin(1)
        return self.offset[i, None] + self.slope[i, None] * x


def follower(times, step_gain):
    """The student whose jump from times[i] is what steps over the grid make of x; times fall from 1.

    step_gain(t, r): what one step leaves of x - t M.
    """
    gains = list(itertools.accumulate((step_gain(t, r) for r, t in zip(times.tolist(), times.tolist()[1:])),
                                      float.__mul__, initial=1.0))
    gains = torch.tensor(gains, dtype=torch.float64)[:, None]

    def velocity(x, t):
        t = t[:, None]
        return (M + gains * (x - t * M) - x) / (1 - t).clamp(min=1e-12)
    return PerTime(times, velocity)


def euler_gain(t, r):
    """One Euler step with the exact velocity."""
    return gain([t, r])


def heun_gain(t, r):
    """One Heun step with the exact velocity."""
    a, b = ((s * S ** 2 - (1 - s)) / spread(s) ** 2 for s in (t, r))
    return 1 + (r - t) / 2 * (a + b * (1 + (r - t) * a))


def teach(student, loss_fn, steps=600, lr=0.02):
    """The chapter's own loop on the student, whose last weights end up in place (the rate ends at 0)."""
    config = chapter.Config(steps=steps, lr=lr, warmup=0, grad_clip=1e9, batch=1)
    for _ in chapter.train(student, loss_fn, config):
        pass
    return student


def jump_gain(velocity, start=0.0):
    """d jump / d z at the noise end, where x = (1 - start) z."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64) * (1 - start)
    zero, one = chapter.jump(velocity, x, torch.full((2,), start, dtype=torch.float64)).detach().flatten().tolist()
    return one - zero


def test_the_jump_is_the_identity_at_the_data_for_any_network():
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(chapter.jump(lambda x, t: 1e6 * x.sin(), x, torch.ones(5)), x)
    flow = chapter.Flow(chapter.Config(image_size=4, channels=4, mult=(1,), attention=(4,)), 3, 0)
    assert torch.equal(chapter.jump(flow, x, torch.ones(5)), x)


def test_the_exact_map_is_constant_along_the_flow_and_jump_finds_it():
    t, z0 = torch.linspace(0, 0.99, 50, dtype=torch.float64), 1.3
    zt = (t * M + spread(t) * z0)[:, None]
    ends = chapter.jump(exact_student, zt, t)
    assert (ends - (M + S * z0)).abs().max() < 1e-12


def test_euler_in_t_is_euler_in_the_noise_level():
    """x_t = t y: y' = y + (sigma' - sigma) (y - D) / sigma, with D = x_t + (1 - t) v, ends at the same point."""
    x, t, r = torch.randn(6, 1).double(), *(torch.full((6,), time, dtype=torch.float64) for time in (0.3, 0.55))
    sigma, after = (1 - 0.3) / 0.3, (1 - 0.55) / 0.55
    y, denoised = x / 0.3, x + 0.7 * exact_velocity(x, t)
    expected = 0.55 * (y + (after - sigma) * (y - denoised) / sigma)
    assert (chapter.move(exact_velocity, x, t, r) - expected).abs().max() < 1e-13


def test_heun_is_of_second_order_and_euler_of_first():
    def error(h, heun):
        t = torch.full((1,), 0.4, dtype=torch.float64)
        x = torch.ones(1, 1, dtype=torch.float64)
        exact = (0.4 + h) * M + spread(0.4 + h) / spread(0.4) * (x - 0.4 * M)
        return (chapter.move(exact_velocity, x, t, t + h, heun) - exact).abs().item()
    assert error(0.02, False) / error(0.01, False) == pytest.approx(4, rel=0.1)
    assert error(0.02, True) / error(0.01, True) == pytest.approx(8, rel=0.1)


# ---- rf --------------------------------------------------------------------------------------------------------------


def squared(a, b):
    return (a - b).square().flatten(1).mean(1)


def distillation(draw, n, distance=squared, jumps=1):
    """The loss_fn of rf."""
    return partial(chapter.distillation_loss, lesson=lesson(draw, n, distance=distance), jumps=jumps)


class Spy(nn.Module):
    """Remembers what the network was given."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, t, labels=None):
        self.x, self.t = x, t
        return self.scale * x


def test_one_step_distillation_sees_the_noise_alone_at_exactly_time_zero():
    """With t = 0.001, as in the original code, the input would move by 0.1 % of the target."""
    z0, spy = torch.randn(16, 3, 4, 4), Spy()
    for z1 in (torch.randn(16, 3, 4, 4), torch.full((16, 3, 4, 4), 1e6)):
        distillation(lambda n: (z0, z1, None), 16)(spy, None, 0)
        assert torch.equal(spy.x, z0) and torch.equal(spy.t, torch.zeros(16))


def test_the_best_one_step_student_is_the_teachers_map():
    def draw(n):
        z0 = torch.randn(n, 1, dtype=torch.float64)
        return z0, M + S * z0, None                         # the flow's own pairs
    student = PerTime(torch.zeros(1), start=lambda x, t: 0 * x)
    teach(student, distillation(draw, 256))
    assert jump_gain(student) == pytest.approx(S, abs=1e-4)
    assert chapter.jump(student, torch.zeros(1, 1).double(), torch.zeros(1).double()).item() == pytest.approx(M, abs=1e-4)


def test_shuffled_pairs_leave_nothing_but_the_mean():
    student = PerTime(torch.zeros(1), start=lambda x, t: 0 * x)
    teach(student, distillation(draw_gaussian, 4096))
    assert jump_gain(student) == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_distillation_to_k_steps_asks_at_k_times_and_a_straight_flow_has_no_loss(k):
    z0, seen = torch.randn(400, 2).double(), set()

    def straight(x, t, labels=None):                        # z1 = 3 z0 + 1: v = 2 z0 + 1, z0 = (x - t) / (1 + 2 t)
        seen.update(t.tolist())
        return 2 * (x - t[:, None]) / (1 + 2 * t[:, None]) + 1
    loss = distillation(lambda n: (z0, 3 * z0 + 1, None), 400, jumps=k)(straight, None, 0)
    assert loss.max() < 1e-10
    assert sorted(seen) == pytest.approx([i / k for i in range(k)])


def test_squares_make_the_distillation_loss_that_of_the_velocity():
    z0, z1 = torch.randn(2, 64, 3, 2, 2)
    torch.manual_seed(3)
    loss = distillation(lambda n: (z0, z1, None), 64, jumps=4)(lambda x, t, labels: 0 * x, None, 0)
    assert torch.allclose(loss, (z1 - z0).square().flatten(1).mean(1), rtol=1e-4)


# ---- progressive -----------------------------------------------------------------------------------------------------


def progressive(draw, teacher, n, steps):
    """The loss_fn of progressive."""
    return partial(chapter.progressive_loss, lesson=lesson(draw, n, teacher), steps=steps)


@pytest.mark.parametrize("n, expected", [(1, 0), (2, .2), (4, .340541), (8, .414785), (16, .455683), (64, .488555)])
def test_the_gain_of_n_euler_steps_is_the_published_one(n, expected):
    assert gain([i / n for i in range(n + 1)]) * 1.0 == pytest.approx(expected, abs=1e-6)


def test_halving_an_exact_euler_teacher_keeps_its_end():
    """8 -> 4 -> 2 -> 1: a student without limits ends where eight Euler steps end, gain 0.414785."""
    flow = exact_velocity
    for n in (4, 2, 1):
        student = PerTime(torch.arange(n) / n, start=flow)
        flow = teach(student, progressive(draw_gaussian, flow, 64, n), steps=500).requires_grad_(False)
        x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        for i in range(n):
            x = chapter.move(flow, x, *(torch.full((2,), j / n, dtype=torch.float64) for j in (i, i + 1)))
        assert (x[1] - x[0]).item() == pytest.approx(0.414785, abs=2e-3)


def test_the_progressive_target_is_the_mean_of_two_velocities_at_the_right_times():
    asked = []

    def teacher(x, t, labels=None):
        asked.append(t.clone())
        return (t + 1)[:, None] * torch.ones_like(x)
    x0 = torch.zeros(64, 1)
    loss_fn = progressive(lambda n: (x0, x0, None), teacher, 64, 4)
    loss = loss_fn(lambda x, t, labels: (t + 1 + 0.5 / 4 / 2)[:, None] + 1, None, 0)       # mean velocity, and 1 too much
    t, half = asked
    assert set(t.tolist()) == {0, .25, .5, .75} and torch.allclose(half, t + 0.125)
    assert torch.allclose(loss, torch.maximum(t, 1 - t) ** 2, atol=1e-6)                # the weight alone is left


def test_the_rounds_of_halving_share_the_budget_and_the_last_two_get_double():
    config = chapter.Config(halvings=5, distill_steps=6000)
    steps = chapter.training_steps(config)
    rounds = [steps[f"progressive-{n}"] for n in (16, 8, 4, 2, 1)]
    one = rounds[0]
    assert rounds == pytest.approx([one, one, one, 2 * one, 2 * one], abs=1)
    assert sum(rounds) == steps["progressive"] == pytest.approx(3 / 5 * (6000 + chapter.pair_cost(config) / 96), abs=5)


# ---- consistency and ict ---------------------------------------------------------------------------------------------


def consistency(draw, n, times, teacher=exact_velocity, distance=squared, **rest):
    """The loss_fn of consistency."""
    teaching = lesson(draw, n, teacher, distance, **rest)
    return partial(chapter.consistency_distillation_loss, lesson=teaching, times=times)


def ict(draw, n, first=4, last=8):
    """The loss_fn of ict, in a training of 10 steps."""
    levels = partial(chapter.ict_levels, steps=10, first=first, last=last)
    return partial(chapter.consistency_training_loss, lesson=lesson(draw, n), levels=levels)


@pytest.mark.parametrize("h, expected, tolerance", [(0.1, 3.99e-7, 0.03), (0.05, 4.9e-9, 0.03), (0.025, 6.7e-11, 0.03)])
def test_consistency_distillation_at_the_exact_function_has_heuns_error_alone(h, expected, tolerance):
    torch.manual_seed(0)
    times = torch.tensor([0.4 + h, 0.4], dtype=torch.float64)
    loss = consistency(draw_gaussian, 100000, times)(exact_student, None, 0)
    assert loss.mean().item() == pytest.approx(expected, rel=tolerance)


def test_consistency_distillation_is_zero_at_the_exact_function_with_an_exact_ode_step(monkeypatch):
    def exact_move(velocity, x, t, s, heun=False):
        return s[:, None] * M + (spread(s) / spread(t))[:, None] * (x - t[:, None] * M)
    monkeypatch.setattr(chapter, "move", exact_move)
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    loss = consistency(draw_gaussian, 1000, times)(exact_student, None, 0)
    assert loss.max() < 1e-25


def test_consistency_distillation_asks_for_heuns_map():
    """Eight uniform Heun steps carry 0.502441 of the noise; Euler's 0.414785 would be too little spread."""
    times = torch.linspace(1, 0, 9, dtype=torch.float64)
    losses = {}
    for name, step_gain in (("heun", heun_gain), ("euler", euler_gain)):
        student = follower(times, step_gain)
        losses[name] = consistency(draw_gaussian, 2000, times)(student, None, 0).mean().item()
        assert jump_gain(student) == pytest.approx({"heun": .502441, "euler": .414785}[name], abs=1e-6)
    assert losses["heun"] < 1e-25 and losses["euler"] > 1e-5


@pytest.mark.parametrize("h, expected", [(0.1, .005025), (0.05, .001107)])
def test_consistency_training_at_the_exact_function_is_not_zero(monkeypatch, h, expected):
    """2 s^2 (1 - cos theta), theta the angle between (s t, 1 - t) at both ends; times 1 / (sigma_t - sigma_r)."""
    torch.manual_seed(0)
    times = torch.tensor([0.4 + h, 0.4], dtype=torch.float64)
    monkeypatch.setattr(chapter, "karras_times", lambda n: times)
    chapter.ict_grid.cache_clear()
    monkeypatch.setattr(chapter, "pseudo_huber", squared)
    loss = ict(draw_gaussian, 400000)(exact_student, None, 0)
    chapter.ict_grid.cache_clear()
    weight = 1 / (0.6 / 0.4 - (0.6 - h) / (0.4 + h))
    assert loss.mean().item() == pytest.approx(expected * weight, rel=0.01)


@pytest.mark.parametrize("distance", ["squared", "huber"])
@pytest.mark.parametrize("i", [0, 3, 7])
def test_consistency_training_asks_for_euler_steps_of_the_exact_velocity(monkeypatch, distance, i):
    """Any distance: on average over pairs the gradient vanishes at that student, and not beside it."""
    times = torch.linspace(1, 0.1, 9, dtype=torch.float64)
    weights = times[1:] * times[:-1] / (times[:-1] - times[1:])
    monkeypatch.setattr(chapter, "ict_grid", lambda n, device: (times, torch.eye(8)[i], weights))
    if distance == "squared":
        monkeypatch.setattr(chapter, "pseudo_huber", squared)
    torch.manual_seed(0)
    raw = torch.randn(100000, 2, dtype=torch.float64)
    white = torch.linalg.qr(raw - raw.mean(0))[0] * 100000 ** 0.5      # moments up to the second are exact
    draw = partial(lambda x0, x1, n: (x0, x1, None), white[:, :1], M + S * white[:, 1:])

    def gradient(change):
        student = follower(times, euler_gain)
        with torch.no_grad():
            student.slope[i + 1] += change
        ict(draw, 100000, first=8)(student, None, 0).mean().backward()
        return student.slope.grad[i + 1].abs().item()
    assert gradient(0.0) < (1e-12 if distance == "squared" else 0.1 * gradient(0.1))
    assert gradient(0.1) > 1e-3


def test_the_published_grid_gives_the_published_spread():
    """rho = 7, first level 0: Euler over the grid, and the 1/81 of signal that the start leaves out."""
    for n, expected in ((11, .37633), (18, .42301), (41, .46569), (81, .48253), (161, .49118), (1281, .49888)):
        times = chapter.karras_times(n).flip(0).tolist()
        assert (1 - times[0]) * gain(times) == pytest.approx(expected, abs=2e-5)


def test_the_grid_is_the_published_one():
    times = chapter.karras_times(11)
    sigma = (1 / times - 1).tolist()
    assert sigma == pytest.approx([0, .01672, .08509, .31828, .96542, 2.51522, 5.83895, 12.38158, 24.40834, 45.31373, 80],
                                  abs=6e-6, rel=1e-5)
    assert times[0] == 1 and times[-1].item() == pytest.approx(1 / 81)
    assert (chapter.karras_times(1281).diff() < -3.8e-5).all()
    chapter.ict_grid.cache_clear()
    assert chapter.ict_grid(11)[2].tolist() == pytest.approx(
        [59.81, 14.627, 4.288, 1.5453, .6452, .3009, .1528, .0832, .0478, .0288], rel=2e-3)
    fine = chapter.karras_times(1281)
    sigma = (1 - fine) / fine
    assert torch.allclose(chapter.ict_grid(1281)[2].double(), 1 / sigma.diff(), rtol=1e-6)


def test_the_chances_are_the_published_ones(monkeypatch):
    chapter.ict_grid.cache_clear()
    p = chapter.ict_grid(11)[1]
    assert p.sum().item() == pytest.approx(1) and p[:3].tolist() == pytest.approx([.0676, .1808, .2442], abs=1e-4)
    times = chapter.karras_times(11)
    times[0] = 1 / 1.002                                    # the paper's own first level
    monkeypatch.setattr(chapter, "karras_times", lambda n: times)
    chapter.ict_grid.cache_clear()
    assert chapter.ict_grid(11)[1].tolist() == pytest.approx(
        [.0626, .1817, .2455, .2135, .1425, .0806, .0411, .0196, .0089, .0040], abs=6e-5)
    chapter.ict_grid.cache_clear()


def test_the_number_of_levels_doubles_as_published():
    levels = [chapter.ict_levels(50000 * i, 400000, 10, 1280) for i in range(9)]
    assert levels == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert chapter.ict_levels(49999, 400000, 10, 1280) == 11
    assert {chapter.ict_levels(k, 3, 10, 1280) for k in range(3)} <= {11, 21, 41}          # fewer steps than doublings


def test_the_huber_constant_is_of_the_root_of_the_dimension():
    def huber(norm):
        return chapter.pseudo_huber(torch.full((1, 3, 32, 32), norm / 3072 ** 0.5).double(), torch.zeros(1, 3, 32, 32))
    assert huber(0.0).item() == pytest.approx(0, abs=1e-12)
    assert huber(1.0).item() == pytest.approx(.970518, abs=1e-6)
    assert huber(.0299298).item() == pytest.approx(.012397, abs=1e-6)


def test_both_ends_share_the_dropout_mask_and_only_the_noisy_one_learns():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.drop = nn.Parameter(torch.ones(())), nn.Dropout(0.5)

        def forward(self, x, t):
            return self.drop(self.weight * torch.ones_like(x))
    network, x, t = Noisy(), torch.zeros(2, 1000), torch.tensor([0.5, 0.5])
    masks = []
    for step in range(2):
        torch.manual_seed(step)
        y, target = chapter.both_ends(network, (x, t), (x, t))
        assert torch.equal(y, target) and y.requires_grad and not target.requires_grad
        masks.append(y)
    assert not torch.equal(*masks)


def test_the_consistency_target_comes_from_the_students_own_weights():
    """They say 5 at the cleaner time and 0 at the other: the jump to the target tells whose it was."""
    times, seen = torch.tensor([0.9, 0.5], dtype=torch.float64), []
    loss_fn = consistency(draw_gaussian, 64, times, lambda x, t, labels: 0 * x,
                          lambda a, b: seen.append((a, b)) or a - b)
    loss_fn(lambda x, t, labels: 0 * x + 5 * (t[:, None] == 0.9), None, 0)
    (y, target), = seen                                     # the teacher stands still: x_r = x_t
    assert torch.allclose(target - y, torch.full_like(y, 0.1 * 5))


def test_without_the_boundary_a_constant_would_satisfy_consistency(monkeypatch):
    """With f = x + (1 - t) v it cannot: at r = 1 the target is the picture."""
    times = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def constant(x, t, labels=None):
        return torch.ones_like(x)
    cd = consistency(draw_gaussian, 100, times)
    assert cd(constant, None, 0).mean() > 0.01
    monkeypatch.setattr(chapter, "jump", lambda velocity, x, t: velocity(x, t))
    assert cd(constant, None, 0).max() == 0


def test_two_steps_of_consistency_sampling_have_the_predicted_spread():
    """The first jump may lose spread (0.414785, or all); noise and the exact map at sigma = 0.821 restore it in part."""
    for first, expected in ((.414785, .478445), (0.0, .427039), (S, S)):
        def velocity(x, t):
            ends = exact_map(x, t) if t[0] > 0.5 else M + first * x / (1 - 1 / 81)
            return (ends - x) / (1 - t[:, None])
        z = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)
        again = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)
        x = chapter.consistency_sample(velocity, [z, again], [1 / 81, 1 / 1.821]).flatten()
        assert math.hypot(x[1] - x[0], x[2] - x[0]) == pytest.approx(expected, abs=1e-5)


def test_sampling_wants_a_noise_for_every_time():
    with pytest.raises(ValueError):
        chapter.consistency_sample(exact_student, [torch.zeros(1, 1)], [0.1, 0.5])


# ---- meanflow and remeanflow -----------------------------------------------------------------------------------------


class Mean(nn.Module):
    """u* = (end - x) / (r - t), end: where the flow leads from t to r.  Off by offset + slope x, if these are not 0."""

    def __init__(self):
        super().__init__()
        self.offset, self.slope = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

    def forward(self, x, t, labels=None, r=None):
        t, r = t[:, None], r[:, None]
        rate = ((r + t) * (1 + S ** 2) - 2) / (spread(r) + spread(t))      # (q_r - q_t) / (r - t), also at r = t
        return M + rate / spread(t) * (x - t * M) + self.offset + self.slope * x


class Plane(nn.Module):
    """u = a x + b t + c r: along dx/dt = w, with r fixed, it changes by a w + b."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.7, -0.4, 0.9], dtype=torch.float64))

    def forward(self, x, t, labels=None, r=None):
        return self.inputs(x, t, r) @ self.weights

    @staticmethod
    def inputs(x, t, r):
        return torch.stack([x, t[:, None].expand_as(x), r[:, None].expand_as(x)], dim=-1)


def mean_flow(draw):
    """The loss_fn of meanflow and remeanflow."""
    return partial(chapter.mean_flow_loss, ema=None, step=0, lesson=chapter.Lesson(draw))


def test_the_mean_velocity_leads_to_where_the_flow_does_and_keeps_the_identity():
    """And r -> t gives the velocity."""
    t, r = torch.rand(2, 50, dtype=torch.float64).sort(0).values
    x, u = torch.randn(50, 1, dtype=torch.float64), Mean()
    end = r[:, None] * M + (spread(r) / spread(t))[:, None] * (x - t[:, None] * M)
    v = exact_velocity(x, t)
    assert (x + (r - t)[:, None] * u(x, t, r=r) - end).abs().max() < 1e-12
    assert (u(x, t, r=t) - v).abs().max() < 1e-12
    change = chapter.derivative(partial(u, r=r), x, t, v)
    assert (v + (r - t)[:, None] * change - u(x, t, r=r)).abs().max() < 1e-12


def test_the_mean_flow_loss_and_its_gradient_are_those_by_hand(monkeypatch):
    """The product is taken along x1 - x0, although theory allows the network's own velocity u(x, t, t) as well.

    On independent pairs both have the same mean given x_t, once u(x, t, t) is the velocity; on pairs whose lines do not
    cross both are then the same.  Before that, x1 - x0 alone is right.
    """
    (x0, x1), model = torch.randn(2, 64, 2, dtype=torch.float64), Plane()
    t, r = torch.rand(2, 64, dtype=torch.float64).sort(0).values
    r[::4] = t[::4]                                         # there it is the loss of a flow
    monkeypatch.setattr(chapter, "two_times", lambda n, device: (t, r))
    loss = mean_flow(lambda: (x0, x1, None))(model)
    loss.sum().backward()
    inputs = model.inputs(chapter.interpolate(x0, x1, t), t, r)
    a, b, c = weights = model.weights.detach()
    error = inputs @ weights - (x1 - x0) - (r - t)[:, None] * (a * (x1 - x0) + b)
    c = 0.00054 * 2 ** 0.5
    root = (error.square().sum(1) + c ** 2).sqrt()
    torch.testing.assert_close(loss, root - c)
    torch.testing.assert_close(model.weights.grad, (error[..., None] * inputs / root[:, None, None]).sum((0, 1)))


@pytest.mark.parametrize("t, r", [(0.0, 1.0), (0.3, 0.8), (0.6, 0.6)])
def test_over_all_lines_through_a_point_the_mean_target_is_the_mean_velocity(monkeypatch, t, r):
    """Noise and data drawn apart, in twins: what x_t does not tell of a line comes with either sign.

    The loss is not zero at u*; its gradient is, whatever the weights.
    """
    known, rest = torch.randn(2, 500, 1, dtype=torch.float64)
    known, rest = torch.cat([known, known]), torch.cat([rest, -rest])
    x0 = ((1 - t) * known + t * S * rest) / spread(t)       # a rotation: x_t = t M + q_t known
    x1 = M + S * (t * S * known - (1 - t) * rest) / spread(t)
    times = [torch.full((1000,), time, dtype=torch.float64) for time in (t, r)]
    monkeypatch.setattr(chapter, "two_times", lambda n, device: times)

    def gradient(model):
        loss = mean_flow(lambda: (x0, x1, None))(model).mean()
        assert loss > 0.1
        return torch.stack(torch.autograd.grad(loss, [model.offset, model.slope]))
    assert gradient(Mean()).abs().max() < 1e-12
    wrong = Mean()
    wrong.offset.data += 0.1
    assert gradient(wrong).abs().max() > 1e-2


def test_on_the_flows_own_pairs_the_mean_flow_loss_is_zero():
    """Their lines do not cross: x1 - x0 is the velocity of the straight flow, and the mean velocity to any r."""
    class Straight(nn.Module):
        def forward(self, x, t, labels=None, r=None):
            return M + (S - 1) * (x - t[:, None] * M) / (1 - t + t * S)[:, None]
    z0 = torch.randn(1000, 1, dtype=torch.float64)
    loss = mean_flow(lambda: (z0, exact_map(z0, torch.zeros(1000)), None))
    assert loss(Straight()).max() < 1e-9 and loss(Mean()).max() > 1e-3             # times are float32


def test_two_times_are_the_ends_of_uniform_intervals_and_half_of_these_are_points():
    torch.manual_seed(0)
    t, r = chapter.two_times(40000, "cpu")
    apart = t < r
    assert (t <= r).all() and apart.double().mean().item() == pytest.approx(0.5, abs=0.02)
    for power in (1, 2):                                    # of the smaller and the larger of two uniform numbers
        smaller, larger = 2 / (power + 1) / (power + 2), 2 / (power + 2)
        assert (t ** power).mean().item() == pytest.approx(smaller, abs=0.01)
        assert (r[apart] ** power).mean().item() == pytest.approx(larger, abs=0.01)


def small_flow(classes, more=0, **settings):
    """Config and a network for classes (and more labels) whose every weight matters, and x, t, r, labels for it."""
    config = chapter.Config(image_size=8, channels=8, mult=(1,), attention=(8,), conditional=classes > 0, **settings)
    flow = chapter.place(shake(chapter.Flow(config, 3, classes + more)), torch.device("cpu"))
    t, r = torch.rand(2, 4).sort(0).values
    return config, flow, torch.randn(4, 3, 8, 8), t, r, torch.arange(4) % classes if classes else None


@pytest.mark.parametrize("classes", [0, 3])
def test_the_derivative_is_what_differences_tell_and_r_does_not_move(classes):
    """Exact to float32 under bf16 autocast, and where attention runs by kernels that know no such product."""
    _, flow, x, t, r, labels = small_flow(classes, chapter.SPANS)
    u, v, h = partial(chapter.FlowMap(flow), labels=labels, r=r), torch.randn_like(x), 1e-3
    with torch.no_grad():
        expected = (u(x + h * v, t + h) - u(x - h * v, t - h)) / (2 * h)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = chapter.derivative(u, x, t, v)
    assert found.dtype == torch.float32 and (found - expected).norm() < 2e-3 * expected.norm()


def test_on_mps_the_derivative_is_taken_with_gradients_on(monkeypatch):
    """There attention without gradients is a kernel that knows no forward derivative.  A CPU plays MPS."""
    class OnMps(torch.Tensor):
        device = torch.device("mps")

    def attention(q, k, v):
        if torch.is_grad_enabled() and q.requires_grad:
            return by_hand(q, k, v)
        return torch.ops.aten._scaled_dot_product_attention_math_for_mps(q, k, v)[0]
    _, flow, x, t, r, labels = small_flow(3, chapter.SPANS)
    u, v = partial(chapter.FlowMap(flow), labels=labels, r=r), torch.randn_like(x)
    expected, by_hand = chapter.derivative(u, x, t, v), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(chapter.F, "scaled_dot_product_attention", attention)
    with pytest.raises(NotImplementedError, match="forward AD"):
        chapter.derivative(u, x, t, v)
    found = chapter.derivative(u, x.as_subclass(OnMps), t, v)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
    assert not found.requires_grad


def test_every_weight_of_a_flow_map_learns_under_bf16_and_dropout():
    """Weights that autocast casts without gradient, and keeps, would get none."""
    _, flow, x, *_, labels = small_flow(3, chapter.SPANS, dropout=0.5)
    student = chapter.FlowMap(flow).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mean_flow(lambda: (torch.randn_like(x), x, labels))(student)
    loss.mean().backward()
    assert not [name for name, p in student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert (student.model.map_label.weight.grad != 0).any(0).all()      # the labels' columns, and those of r - t


def test_the_product_goes_round_the_compiled_graph_and_the_replica():
    """torch.compile and DistributedDataParallel know no such products; the pass with gradient is by way of both."""
    _, flow, x, *_, labels = small_flow(3, chapter.SPANS)
    replica, student, calls = nn.Module(), chapter.FlowMap(flow), []
    replica.module = student
    replica.forward = lambda *inputs: calls.append("replica") or student(*inputs)
    student._compiled_call_impl = lambda *inputs: calls.append("graph") or student.forward(*inputs)
    mean_flow(lambda: (torch.randn_like(x), x, labels))(replica)
    assert calls == ["replica", "graph"]


@pytest.mark.parametrize("classes", [0, 3])
def test_a_widened_flow_is_the_same_wherever_to_and_its_file_is_a_wide_flows(tmp_path, classes):
    config, flow, x, t, r, labels = small_flow(classes)
    student = chapter.widen(flow, config)
    for time in (None, t, r, torch.ones(4)):
        torch.testing.assert_close(student(x, t, labels, time), flow(x, t, labels), atol=1e-5, rtol=1e-5)
    shake(student)
    assert not torch.allclose(student(x, t, labels, r), student(x, t, labels, t))
    saved = dataclasses.asdict(config) | {"stage": "meanflow"}
    chapter.save_checkpoint(tmp_path / "net.pt", config=saved, model=student.state_dict())
    run = SimpleNamespace(config=config, device=torch.device("cpu"))
    read, (opened, _) = chapter.load_flow(tmp_path / "net.pt", run, 3, classes + 8), open_network(tmp_path / "net.pt")
    assert isinstance(read, chapter.Flow) and isinstance(opened, chapter.FlowMap)
    for network in (chapter.FlowMap(read), opened):
        assert network.classes == classes
        torch.testing.assert_close(network(x, t, labels, r), student(x, t, labels, r))
    torch.testing.assert_close(opened(x, t, labels), student(x, t, labels, t + 1))      # without r: a way of length 1


@pytest.mark.parametrize("steps", [1, 2])
def test_euler_steps_of_a_flow_map_ask_for_the_way_to_the_next_time(steps):
    config, flow, x, _, _, labels = small_flow(3, chapter.SPANS)
    student, z = chapter.FlowMap(flow).eval().requires_grad_(False), x
    for i in range(steps):
        z = z + student(z, torch.full((4,), i / steps), labels, torch.full((4,), (i + 1) / steps)) / steps
    velocity = chapter.Velocity(chapter.FlowMap(student, steps), config)
    torch.testing.assert_close(chapter.sample(velocity, x, torch.arange(4), steps), z)


# ---- Budgets and metrics ---------------------------------------------------------------------------------------------


def test_every_method_costs_per_step_what_the_budget_counts():
    """Forward 1, backward 2: a student's pass with gradient is 3, one without is 1, like each of the teacher's.

    One that carries a derivative along does everything twice: 2.
    """
    calls = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x, t, labels=None, r=None):
            derivative = unpack_dual(x).tangent is not None
            calls.append(3 if torch.is_grad_enabled() else 1 + derivative)
            return self.weight * x

    def teacher(x, t, labels=None):
        calls.append(1)
        return x
    times = torch.linspace(1, 0, 5, dtype=torch.float64)
    pairs = distillation(draw_gaussian, 2)
    losses = {"direct": pairs, "rf": pairs, "longer": pairs, "progressive": progressive(draw_gaussian, teacher, 2, 4),
              "consistency": consistency(draw_gaussian, 2, times, teacher), "ict": ict(draw_gaussian, 2)}
    losses["meanflow"] = losses["remeanflow"] = partial(chapter.mean_flow_loss, lesson=lesson(draw_gaussian, 2))
    assert set(losses) == set(chapter.COST)
    for name, loss_fn in losses.items():
        calls.clear()
        loss_fn(Counting(), None, 0).sum().backward()
        assert sum(calls) == chapter.COST[name], name


@pytest.mark.parametrize("solver, per_pair", [("euler", 8), ("heun", 16)])
def test_the_budget_is_the_same_for_all_methods(solver, per_pair):
    config = chapter.Config(pairs=1000, pair_steps=8, pair_solver=solver, reflow_steps=700, distill_steps=500, batch=32)
    total, reflow = 1000 * per_pair + 3 * 32 * 500, 1000 * per_pair + 3 * 32 * 700
    assert chapter.spent("rf", config) == (total, reflow) and chapter.spent("direct", config) == (total, 0)
    for name in ("progressive", "consistency", "ict", "meanflow", "remeanflow"):
        assert chapter.spent(name, config) == (pytest.approx(total, rel=0.01), reflow * (name == "remeanflow"))
    assert chapter.spent("2-RF", config) == (0, reflow) and chapter.spent("1-RF", config) == (0, 0)


@pytest.mark.parametrize("settings", [{}, dict(pairs=1001, pair_steps=3, reflow_steps=7, distill_steps=5, batch=6),
                                      dict(pair_solver="euler", distill_steps=1)], ids=str)
def test_the_longer_control_costs_what_reflow_and_rf_do(settings):
    """To the last evaluation: two sets of pairs, and the steps of both trainings."""
    config = chapter.Config(**settings)
    own, reflow = chapter.spent("longer", config)
    assert own == sum(chapter.spent("rf", config)) and reflow == 0
    assert chapter.training_steps(config)["longer"] == config.reflow_steps + config.distill_steps


def test_batches_of_two_sets_come_whole_from_either():
    asked = []

    def draw(i, n):
        asked.append((i, n))
        return torch.full((n,), i)
    torch.manual_seed(0)
    batches = [chapter.draw_either(partial(draw, 0, 5), partial(draw, 1, 5)) for _ in range(400)]
    found = [batch.unique().tolist() for batch in batches]
    assert asked == [(i, 5) for i, in found] and {len(batch) for batch in batches} == {5}
    assert abs(sum(i for i, in found) - 200) < 50           # 5 standard deviations


def brute_force(real, fake, k):
    """The four definitions, one distance at a time."""
    def reach(points, i):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]
    radius, other = [reach(real, i) for i in range(len(real))], [reach(fake, j) for j in range(len(fake))]
    inside = [[math.dist(x, y) < radius[i] for y in fake] for i, x in enumerate(real)]
    return {"precision": sum(any(row[j] for row in inside) for j in range(len(fake))) / len(fake),
            "recall": sum(any(math.dist(x, y) < other[j] for j, y in enumerate(fake)) for x in real) / len(real),
            "density": sum(map(sum, inside)) / k / len(fake), "coverage": sum(map(any, inside)) / len(real)}


@pytest.mark.parametrize("k, fakes", [(1, 40), (3, 40), (5, 25)])
def test_manifold_metrics_follow_their_definitions(k, fakes):
    torch.manual_seed(k)
    real, fake = torch.randn(40, 3), 0.8 * torch.randn(fakes, 3) + 0.3
    found = chapter.manifold_metrics(real, fake, k)
    assert found == pytest.approx(brute_force(real.tolist(), fake.tolist(), k), abs=1e-12)


def test_manifold_metrics_of_equal_laws_have_the_expected_values():
    torch.manual_seed(0)
    found = chapter.manifold_metrics(torch.randn(2500, 8), torch.randn(2500, 8), 5)        # more than one chunk of 1000
    assert found["density"] == pytest.approx(1, abs=0.06)
    assert found["coverage"] == pytest.approx(1 - math.prod((2499 - j) / (4999 - j) for j in range(5)), abs=0.02)


def test_each_manifold_metric_sees_its_own_fault():
    torch.manual_seed(0)
    centres = 8 * torch.randn(10, 16)

    def mixture(n, modes=10, scale=1.0):
        return centres[torch.randint(modes, (n,))] + scale * torch.randn(n, 16)
    real = mixture(1000)
    halved = chapter.manifold_metrics(real, mixture(1000, modes=5))
    assert halved["recall"] < 0.6 and halved["coverage"] < 0.6 and halved["precision"] > 0.7       # modes are missing
    narrow = chapter.manifold_metrics(real, mixture(1000, scale=0.5))
    assert narrow["recall"] < 0.2 and narrow["density"] > 2 and narrow["coverage"] > 0.95          # spread is missing


def test_lpips_takes_over_from_squares_at_the_switch():
    z1, z0 = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    perceptual = chapter.Perceptual("squeeze", 32, "random")
    teaching = chapter.Lesson(lambda: (z0, z1, None), distance=perceptual, squares=3)

    def loss(step):
        return chapter.distillation_loss(lambda x, t, labels: 0 * x, None, step, teaching)
    assert torch.equal(loss(2), squared(z0, z1))
    expected = perceptual(z0, z1)
    assert torch.allclose(loss(3), expected) and not torch.allclose(expected, squared(z0, z1))


@pytest.mark.parametrize("weights, share", [("random", 0.05), ("pretrained", 0.5)])
def test_what_each_student_of_pairs_starts_from_and_learns(monkeypatch, weights, share):
    """Of an untrained distance it gets a tenth of the steps."""
    curved, straight, students = object(), object(), {}

    def student(name, start, loss, stream, run):
        lesson = loss.keywords["lesson"]
        students[name] = start, *lesson.draw(), lesson.squares
    monkeypatch.setattr(chapter, "stored_pairs", lambda name, flow, stream, run: lambda n: (flow, stream, n))
    monkeypatch.setattr(chapter, "train_student", student)
    monkeypatch.setattr(chapter, "Velocity", lambda flow, config: SimpleNamespace(flow=flow))
    monkeypatch.setattr(chapter, "widen", lambda flow, config: flow)
    monkeypatch.setattr(chapter, "FlowMap", lambda student, steps: steps)
    config = chapter.Config(distill_steps=100, reflow_steps=300, lpips_share=0.5, lpips_weights=weights)
    run = SimpleNamespace(config=config, share=3)
    lesson = chapter.Lesson(lambda: ("apart",), SimpleNamespace(flow=curved))
    reflow = chapter.straighten(lesson, straight, run)
    seen = set()
    for _ in range(20):                                     # `longer` draws from either set: 1 in 2^20 misses one
        chapter.distil_pairs(lesson, reflow, run)
        seen.add(students["longer"])
    assert students["direct"] == (curved, curved, 2, 3, 100 - 100 * share)
    assert students["rf"] == (straight, straight, 3, 3, 100 - 100 * share)
    assert seen == {(curved, curved, stream, 3, 400 - 400 * share) for stream in (2, 8)}
    for name, teaching in (("meanflow", lesson), ("remeanflow", reflow)):
        assert chapter.learn_means(teaching, name, run) == {name: {1: 1, 2: 2}}
    assert students["meanflow"] == (curved, "apart", 0) and students["remeanflow"] == (straight, curved, 2, 3, 0)


def test_students_learn_from_lpips():
    """The target is its second picture, which gets no gradient: the other way round they would learn nothing."""
    z1, z0 = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    teaching = chapter.Lesson(lambda: (z0, z1, None), lambda x, t, labels: 0 * x,
                              chapter.Perceptual("squeeze", 32, "random"))
    losses = [partial(chapter.distillation_loss, lesson=teaching),
              partial(chapter.consistency_distillation_loss, lesson=teaching, times=torch.tensor([1.0, 0.5]))]
    for loss_fn in losses:
        student = Spy()
        loss_fn(student, None, 0).sum().backward()
        assert student.scale.grad.isfinite() and student.scale.grad != 0


# ---- Whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_the_readme_says(finished):
    names = {path.name for path in finished.folder.iterdir()}
    stages = {f"{name}.{kind}" for name in ["1-rf", "2-rf", *STUDENTS] for kind in ("pt", "csv")}
    assert names == {"run.json", "pairs", "results.json", "methods.png"} | stages
    results = json.loads((finished.folder / "results.json").read_text())["methods"]
    assert list(results) == ["real data", "1-RF", "2-RF", "direct", "rf", "longer", "progressive", "consistency",
                             "ict", "meanflow", "remeanflow"]
    for name, row in results.items():
        assert f"\n{name:>16}" in finished.out
        assert all(math.isfinite(row[key]) for key in ("precision", "recall", "density", "coverage"))
        steps = ["1"] if name in ("direct", "rf", "longer") else ["1", "2"]         # --jumps 1 teaches one
        assert all(map(math.isfinite, row["FD"].values())) and (name == "real data" or list(row["FD"]) == steps)
        assert name == "real data" or f"{row['evaluations']:,}" in finished.out and math.isfinite(row["to_teacher"])
        assert (name == "real data") == ("accuracy" not in row)
        if "accuracy" in row:
            assert list(row["accuracy"]) == steps
            assert all(share * 24 in range(25) for share in row["accuracy"].values())
            line = finished.out.split("network evaluations\n")[1].split(f"\n{name:>16}")[1].split("\n")[0]
            assert line.split()[len(steps)] == f"{row['accuracy']['1']:.3f}"
    assert "dry run" in finished.out
    assert json.loads((finished.folder / "run.json").read_text())["settings"]["lpips_weights"] == "random"


def test_the_longer_control_learns_from_two_sets_of_1_rfs_pairs(finished):
    """Those that 2-RF learnt from, and as many of other noises."""
    velocity = network_of(finished.folder / "1-rf.pt")
    stored = {name: torch.cat([chapter.load_checkpoint(path)["z1"] for path in sorted(
        (finished.folder / "pairs" / name).iterdir())]) for name in ("2-rf", "rf", "longer")}
    assert {len(z1) for z1 in stored.values()} == {16} and not torch.equal(stored["2-rf"], stored["longer"])
    for name, stream in (("2-rf", 2), ("longer", 8)):
        z0 = chapter.pair_noise(chapter.seed_for(0, stream), torch.arange(16), (3, 8, 8))
        z1 = chapter.sample(velocity, z0, torch.arange(16), 2, "heun")
        assert (chapter.to_bytes(z1).int() - stored[name].int()).abs().max() <= 1       # other batches round otherwise
    assert chapter.load_checkpoint(finished.folder / "longer.pt")["step"] == 4 + 4


def network_of(path):
    """A finished network of a tiny run, ready to sample."""
    config = chapter.parse_config(chapter.Config, TINY)
    run = SimpleNamespace(config=config, device=torch.device("cpu"))
    return chapter.Velocity(chapter.load_flow(path, run, 3, CLASSES), config)


def test_the_longer_control_may_be_left_out(finished, here, run):
    """It changes no other network."""
    code, out, err = run(*TINY, "--method", "rf", "--no-longer")
    folder = here / "runs" / NAME / "quick"
    assert code == 0 and same_weights(finished.folder, folder, "1-rf", "2-rf", "direct", "rf"), err
    assert {path.name for path in (folder / "pairs").iterdir()} == {"2-rf", "rf"}
    results = json.loads((folder / "results.json").read_text())["methods"]
    assert list(results) == ["real data", "1-RF", "2-RF", "direct", "rf"]
    assert f"\n{'longer':>16}" not in out and not (folder / "longer.pt").exists()


@pytest.mark.parametrize("flags", [["--no-conditional"], ["--data", "photos"]], ids=" ".join)
def test_only_shapes_that_were_asked_for_have_an_accuracy(here, run, flags):
    (here / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8), (12 * i, 0, 0)).save(here / "photos" / f"{i}.png")
    code, out, err = run(*TINY, "--method", "ict", *flags)
    assert code == 0, err
    assert "accuracy:" not in out and "accuracy" not in (here / "runs" / NAME / "quick" / "results.json").read_text()


def test_accuracy_is_the_share_of_pictures_that_show_their_label(here, monkeypatch):
    """Every network draws one picture for each label; for every odd one it is another label's."""
    images, labels = chapter.shapes(2000, 16)
    first = torch.tensor([(labels == label).nonzero()[0].item() for label in range(CLASSES)])
    ends = chapter.to_floats(images[first])
    assert torch.equal(chapter.read_labels(ends), torch.arange(CLASSES))
    ends[1::2] = ends[1::2].roll(1, 0)

    class Fixed(nn.Module):
        model, classes = SimpleNamespace(shape=(3, 16, 16)), CLASSES

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))     # tells the device

        def forward(self, x, t, labels):
            return (ends[labels] - x) / (1 - t)[:, None, None, None]
    config = chapter.parse_config(chapter.Config, [*TINY, "--image-size", "16", "--eval-size", "31", "--out", "run"])
    run, flow = chapter.Run(config, chapter.__file__), Fixed()
    run.claim()
    chapter.report({name: {1: flow, 2: flow} for name in ("1-RF", "ict")}, images, chapter.RandomFeatures(), "", run)
    rows = json.loads(Path("run", "results.json").read_text())["methods"]
    for name in ("1-RF", "ict"):
        assert rows[name]["accuracy"] == {"1": pytest.approx(16 / 31), "2": pytest.approx(16 / 31)}


@pytest.mark.parametrize("works", [True, False])
def test_lpips_is_settled_before_a_run_and_recorded(here, run, finished, monkeypatch, works):
    inner = chapter.load_lpips

    def load_lpips(net, weights):
        if weights == "pretrained" and not works:
            raise chapter.UserError("no network")
        return inner(net, "random")
    monkeypatch.setattr(chapter, "load_lpips", load_lpips)
    monkeypatch.setattr(chapter, "report", lambda *arguments: None)
    monkeypatch.setattr(chapter.socket, "setdefaulttimeout", lambda seconds: None)      # of the whole process
    teacher, reflow = finished.folder / "1-rf.pt", finished.folder / "2-rf.pt"
    code, out, err = run(*TINY, "--method", "rf", "--no-longer", "--teacher", teacher, "--reflow", reflow,
                         "--lpips-weights", "auto")
    assert code == 0 and out.count("--lpips-weights random") == (not works), err
    record = json.loads((here / "runs" / NAME / "quick" / "run.json").read_text())
    assert record["settings"]["lpips_weights"] == ("pretrained" if works else "random")


def test_a_finished_run_is_only_measured_again(finished, here, run):
    folder = copy_run(finished, here)
    before = log_rows(folder)
    code, out, err = run(*TINY)
    assert code == 0 and log_rows(folder) == before and "samples/s" not in out, err


@pytest.mark.parametrize("method", ["rf", "progressive", "consistency", "ict", "meanflow", "remeanflow"])
def test_each_method_alone_gives_the_same_network_as_all_together(finished, here, run, method):
    code, _, err = run(*TINY, "--method", method, "--teacher", finished.folder / "1-rf.pt")
    assert code == 0, err
    made = {path.stem for path in (here / "runs" / NAME / "quick").glob("*.pt")}
    more = {"rf": {"2-rf", "direct", "rf", "longer"}, "progressive": {"progressive-1", "progressive-2"},
            "remeanflow": {"2-rf", "remeanflow"}}
    wanted = more.get(method, {method})
    assert made == wanted
    assert same_weights(finished.folder, here / "runs" / NAME / "quick", *sorted(wanted))


def test_remeanflow_alone_learns_from_reflow(finished, run, monkeypatch):
    """The loss of both is one: the lesson makes the difference."""
    straight, lessons = chapter.Lesson(None, SimpleNamespace(flow=None)), {}
    monkeypatch.setattr(chapter, "straighten", lambda lesson, reflowed, run: straight)
    monkeypatch.setattr(chapter, "learn_means", lambda lesson, name, run: lessons.update({name: lesson}) or {})
    monkeypatch.setattr(chapter, "report", lambda *arguments: None)
    for method in ("meanflow", "remeanflow"):
        code, _, err = run(*TINY, "--method", method, "--out", method, "--teacher", finished.folder / "1-rf.pt")
        assert code == 0, err
    assert [lesson is straight for lesson in lessons.values()] == [False, True]


def test_a_given_reflow_is_used(finished, here, run):
    teacher, reflow = finished.folder / "1-rf.pt", finished.folder / "2-rf.pt"
    code, _, err = run(*TINY, "--method", "rf", "--teacher", teacher, "--reflow", reflow)
    folder = here / "runs" / NAME / "quick"
    assert code == 0 and same_weights(finished.folder, folder, "rf"), err
    assert {stage for stage, _ in log_rows(folder)} == {"direct", "rf", "longer"}


SECOND = Path("runs", "02_reflow", "quick")                 # where chapter 2 leaves its networks, in this folder


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The networks of a run of chapter 2, with what settings it shares with this chapter's tiny ones."""
    return networks_of_chapter_2(tmp_path_factory.mktemp("second"), *SHARED)


@pytest.fixture
def beside(second, here):
    """The present folder holds chapter 2's run, too."""
    SECOND.mkdir(parents=True)
    for name in ("1-rf.pt", "2-rf.pt"):
        (SECOND / name).write_bytes((second / name).read_bytes())


def found(name, **changes):
    """What chapter_2 finds for the tiny settings with these changes."""
    config = dataclasses.replace(chapter.parse_config(chapter.Config, TINY), **changes)
    return chapter.chapter_2(SimpleNamespace(config=config, inputs={}), name, **(
        {"steps": config.reflow_steps} if name == "2-rf" else {}))


def test_the_flows_trained_here_are_chapter_2s_bit_for_bit(finished, second):
    assert same_weights(finished.folder, second, "1-rf", "2-rf")


@pytest.mark.parametrize("own", [[], ["2-rf"]], ids=["both", "1-rf alone"])
def test_chapter_2s_networks_spare_the_same_here(finished, here, run, beside, monkeypatch, own):
    """And all students are as if they had been trained here."""
    monkeypatch.setattr(chapter, "report", lambda *arguments: None)
    for name in own:                                        # chapter 2 is still at it
        path = SECOND / f"{name}.pt"
        chapter.save_checkpoint(path, **chapter.load_checkpoint(path), optimizer={})
    code, _, err = run(*TINY)
    folder = here / "runs" / NAME / "quick"
    assert code == 0 and {path.stem for path in folder.glob("*.pt")} == {*STUDENTS, *own}, err
    assert {stage for stage, _ in log_rows(folder)} == {*STUDENTS, *own}
    assert same_weights(finished.folder, folder, *STUDENTS, *own)
    for name, key in (("2-rf", "reflow_weights"), ("1-rf", "teacher_weights"))[len(own):]:      # other weights
        content = chapter.load_checkpoint(SECOND / f"{name}.pt")
        content["model"]["model.map_layer0.bias"] += 1e-3
        chapter.save_checkpoint(SECOND / f"{name}.pt", **content)
        code, _, err = run(*TINY)
        assert code == 2
        one_line(err, f"{key}=")


def test_chapter_2s_networks_are_not_taken_beside_another_teacher(here, run, beside, monkeypatch):
    """A 2-RF belongs to its 1-RF; with another seed, neither is taken."""
    monkeypatch.setattr(chapter, "report", lambda *arguments: None)
    config = chapter.parse_config(chapter.Config, TINY)
    chapter.save_checkpoint(here / "mine.pt", config=dataclasses.asdict(config),
                            model=chapter.Flow(config, 3, CLASSES).state_dict())
    wanted = {"2-rf", "direct", "rf", "longer"}
    for flags, more in ((["--teacher", "mine.pt"], set()), (["--seed", "1"], {"1-rf"})):
        code, _, err = run(*TINY, "--method", "rf", "--out", flags[0].strip("-"), *flags)
        assert code == 0 and {path.stem for path in (here / flags[0].strip("-")).glob("*.pt")} == wanted | more, err


@pytest.mark.parametrize("name, value", [("seed", 1), ("steps", 7), ("pairs", 17), ("pair_steps", 3), ("batch", 8),
                                         ("conditional", False), ("mult", [1]), ("dropout", 0.1), ("lr", 1e-3)])
def test_chapter_2s_networks_of_other_settings_are_not_taken(beside, name, value):
    for stage in ("1-rf", "2-rf"):
        assert found(stage) == str(SECOND / f"{stage}.pt")
        if (stage, name) != ("2-rf", "steps"):              # those are reflow_steps
            assert found(stage, **{name: value}) == ""


def test_reflow_steps_tell_chapter_2s_second_flow_alone(beside):
    assert found("1-rf", reflow_steps=5) and not found("2-rf", reflow_steps=5)
    assert found("2-rf", distill_steps=9, student_lr=1.0, levels=10, student_dropout=0.1, jumps=2)


def test_chapter_2s_defaults_are_those_of_this_chapter(here):
    SECOND.mkdir(parents=True)
    theirs, config = load("02_reflow").Config(), chapter.Config()
    for name, steps in (("1-rf", theirs.steps), ("2-rf", theirs.reflow_steps)):
        chapter.save_checkpoint(SECOND / f"{name}.pt", config=dataclasses.asdict(theirs) | {"steps": steps}, model={})
    run = SimpleNamespace(config=config, inputs={})
    assert chapter.chapter_2(run, "1-rf") and chapter.chapter_2(run, "2-rf", steps=config.reflow_steps)


@pytest.mark.parametrize("stage, step", [("direct", 2), ("progressive-1", 2), ("consistency", 4), ("ict", 4),
                                         ("meanflow", 4)])
def test_a_run_killed_in_any_stage_goes_on_bit_for_bit(finished, here, run, stage, step):
    order = ["1-rf", "2-rf", *STUDENTS]
    later = [f"{name}.{kind}" for name in order[order.index(stage):] for kind in ("pt", "csv")]
    folder = copy_run(finished, here, *later, "results.json")
    code = driver(NAME, kill_after_row(stage, step))
    process = subprocess.run([sys.executable, "-c", code, *TINY], cwd=here, capture_output=True, text=True, timeout=300)
    assert process.returncode == -9, process.stderr
    code, _, err = run(*TINY)
    assert code == 0, err
    assert same_weights(finished.folder, folder, *order)


def test_two_processes_share_the_work(here):
    result = torchrun(chapter.__file__, *TINY, cwd=here)
    assert result.returncode == 0, result.stderr
    folder = here / "runs" / NAME / "quick"
    assert {f"{name}.pt" for name in STUDENTS} <= {path.name for path in folder.glob("*.pt")}
    rows = log_rows(folder)
    assert len(rows) == len(set(rows))                      # rank 0 alone writes


@pytest.mark.parametrize("flags, words", [
    ("--method best", ["--method", "invalid choice"]),
    ("--levels 9", ["--levels 9 is outside"]),
    ("--eval-size 15", ["--eval-size 15 is outside"]),
    ("--samples 4", ["--checkpoint"]),
    ("--export a.pt2", ["--checkpoint"]),
    ("--checkpoint none.pt --samples 2 --out a", ["none.pt is missing"]),
    ("--checkpoint none.pt", ["--samples N", "--export FILE"]),
    ("--checkpoint none.pt --samples 2", ["--out FOLDER"]),
    ("--checkpoint none.pt --samples 2 --export a.pt2", ["--out FOLDER"]),
    ("--teacher none.pt", ["none.pt is missing"]),
    ("--reflow none.pt", ["none.pt is missing"]),
    ("--reflow none.pt --data cifar10 --data-dir nowhere", ["none.pt is missing"]),         # told before a download
    ("--halvings 0", ["--halvings 0 is outside"]),
    ("--distance l7", ["--distance"]),
    ("--lpips-weights none.pth", ["--lpips-weights none.pth"]),
    ("--jumps 0", ["--jumps 0 is outside"]),
])
def test_a_wrong_setting_is_one_line_and_leaves_nothing(here, run, flags, words):
    code, _, err = run(*TINY, *flags.split())
    assert code == 2
    one_line(err, *words)
    assert not (here / "runs" / NAME).exists()


def test_too_few_pictures_are_one_line(here, run):
    for i in range(15):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(here / f"{i}.png")
    code, _, err = run(*TINY, "--data", ".")
    assert code == 2 and not (here / "runs").exists()
    one_line(err, "15 pictures", "at least 16")


def test_a_teacher_of_another_size_is_one_line(finished, here, run):
    code, _, err = run(*TINY, "--channels", "8", "--teacher", finished.folder / "1-rf.pt")
    assert code == 2
    one_line(err, "--channels 4", "this run has 8")


def test_other_settings_do_not_continue_a_run(finished, here, run):
    copy_run(finished, here)
    code, _, err = run(*TINY, "--student-lr", "0.1")
    assert code == 2
    one_line(err, "student_lr=0.003", "now it is 0.1", "--fresh")


# ---- Drawing and exporting -------------------------------------------------------------------------------------------


def open_network(path):
    """As a run of other settings reads it."""
    return chapter.open_network(path, SimpleNamespace(config=chapter.Config(), device=torch.device("cpu")))


def pictures(folder):
    return [Image.open(path).tobytes() for path in sorted(folder.glob("0*.png"))]


@pytest.mark.parametrize("name", ["1-rf", "rf", "progressive-1", "consistency", "ict", "meanflow", "remeanflow"])
def test_pictures_are_those_of_the_network_in_the_file(finished, here, run, name):
    code, out, err = run("--checkpoint", finished.folder / f"{name}.pt", "--samples", 5, "--out", "drawn", "--shard", 2,
                         "--device", "cpu")
    assert code == 0 and "5 pictures" in out, err
    assert {path.name for path in (here / "drawn").iterdir()} == {"samples.png", *(f"{i:05d}.png" for i in range(5))}
    flow, stage = open_network(finished.folder / f"{name}.pt")
    assert stage == name
    start = chapter.karras_times(2)[-1].item() if name in ("consistency", "ict") else 0.0
    assert chapter.Generator(flow, stage).start == start
    index = torch.arange(5)
    z0 = chapter.pair_noise(chapter.seed_for(0, 999), index, (3, 8, 8))
    t = torch.full((5,), start)
    where_to = {"r": torch.ones(5)} if name in chapter.MAPS else {}
    expected = chapter.jump(partial(flow, labels=index % CLASSES, **where_to), (1 - start) * z0, t)
    expected = chapter.to_bytes(expected).permute(0, 2, 3, 1).numpy()
    assert pictures(here / "drawn") == [row.tobytes() for row in expected]


@pytest.mark.parametrize("script", ["02_reflow", "03_improved_training"])
@pytest.mark.parametrize("classes", [0, 3])
def test_networks_of_chapters_2_and_3_can_be_drawn_from(here, run, script, classes):
    other = load(script)
    config = other.Config(image_size=8, channels=4, mult=(1, 1), attention=(4,), conditional=classes > 0)
    flow = other.Flow(config, 3, classes)
    other.save_checkpoint(here / "net.pt", config=vars(config), model=flow.state_dict())
    code, _, err = run("--checkpoint", "net.pt", "--samples", 3, "--out", "drawn", "--export", "net.pt2", "--device", "cpu")
    assert code == 0 and len(pictures(here / "drawn")) == 3, err
    z0 = torch.randn(3, 3, 8, 8)
    program = torch.export.load("net.pt2").module()
    labels = (torch.arange(3),) if classes else ()
    expected = (z0 + flow.eval()(z0, torch.zeros(3), *labels)).clamp(-1, 1)
    assert torch.allclose(program(z0, *labels), expected, atol=1e-6)


@pytest.mark.parametrize("stage", ["rf", "ict", "meanflow"])
@pytest.mark.parametrize("classes", [0, 3])
def test_the_exported_generator_moves_to_any_device(tmp_path, stage, classes):
    """No device is written into the program: every tensor follows the weights and the noise."""
    config = chapter.Config(image_size=8, channels=4, mult=(1, 1), attention=(4,))
    flow = chapter.Flow(config, 3, classes)
    generator = chapter.Generator(chapter.widen(flow, config) if stage == "meanflow" else flow, stage).eval()
    chapter.export_generator(generator, tmp_path / "net.pt2")
    for device in ["meta"] + ["cuda"] * torch.cuda.is_available():
        program = torch.export.load(tmp_path / "net.pt2").module().to(device)
        labels = (torch.arange(5, device=device) % 3,) if classes else ()
        assert program(torch.zeros(5, 3, 8, 8, device=device), *labels).device.type == device


LOAD_ALONE = """
import sys, torch
program, z0 = torch.export.load("rf.pt2").module(), torch.load("z0.pt")
torch.save({n: program(z0[:n], torch.arange(n) % 4) for n in (1, 2, 7)}, "images.pt")
assert not any("distill" in name for name in sys.modules)
"""


@pytest.mark.parametrize("name", ["rf", "ict", "meanflow"])
def test_the_exported_generator_draws_the_same_without_the_repository(finished, here, run, name):
    code, out, err = run("--checkpoint", finished.folder / f"{name}.pt", "--export", "rf.pt2", "--device", "cpu")
    assert code == 0 and "torch.export.load" in out, err
    z0 = torch.randn(7, 3, 8, 8)
    torch.save(z0, here / "z0.pt")
    process = subprocess.run([sys.executable, "-c", LOAD_ALONE], cwd=here, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    expected = chapter.Generator(*open_network(finished.folder / f"{name}.pt"))(z0, torch.arange(7) % 4)
    for n, images in torch.load(here / "images.pt").items():
        assert torch.allclose(images, expected[:n], atol=1e-6)
    assert len(set(expected.flatten().tolist())) > 9 and expected.abs().max() <= 1


def test_a_file_that_is_no_network_is_one_line(finished, here, run):
    torch.save({"config": {"image_size": 8}, "model": {"a": torch.zeros(2)}}, "odd.pt")
    for file, words in (("odd.pt", ["odd.pt is no network"]), (finished.folder / "run.json", ["broken or not ours"])):
        code, _, err = run("--checkpoint", file, "--samples", 2, "--out", "drawn", "--device", "cpu")
        assert code == 2 and not (here / "drawn").exists()
        one_line(err, *words)


def test_the_commands_of_the_docstring_have_flags_that_exist():
    fields = {f"--{name.replace('_', '-')}" for name in vars(chapter.Config())}
    words = [word for line in chapter.__doc__.splitlines() if "python 04" in line for word in line.split()]
    assert {word for word in words if word.startswith("--")} <= fields


def test_drawing_overwrites_nothing_and_wants_a_finished_network(finished, here, run):
    (here / "precious").write_text("mine")
    for how in (["--samples", 2, "--out", "precious"], ["--export", "precious"]):
        code, _, err = run("--checkpoint", finished.folder / "rf.pt", *how, "--device", "cpu")
        assert code == 2 and (here / "precious").read_text() == "mine"
        one_line(err, "precious exists already")
    state = torch.load(finished.folder / "rf.pt", weights_only=True)
    torch.save(state | {"optimizer": {}}, here / "half.pt")
    code, _, err = run("--checkpoint", "half.pt", "--export", "x.pt2", "--device", "cpu")
    assert code == 2 and not (here / "x.pt2").exists()
    one_line(err, "half.pt is not trained to its end")
