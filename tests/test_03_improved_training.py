"""Chapter 3: times, distances, samplers and inversion against closed forms; foreign files; whole tiny runs.

Closed forms are those of Gaussian data N(0, s^2), whose flow is linear, and of a mixture of two in one dimension.
Network, data and what is copied have tests of their own.  Most runs happen inside this process.
"""

import builtins
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import types
import typing
import urllib.request
from collections import OrderedDict
from functools import partial
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision
from conftest import (call, copy_run, driver, fixtures, kill_after_row, kill_in_shard, load, log_rows,
                      networks_of_chapter_2, one_line, same_weights, torchrun, weights)
from PIL import Image
from scipy.integrate import trapezoid
from scipy.stats import chi2, kstest, norm
from torch import nn

NAME = "03_improved_training"
chapter = load(NAME)
SHARED = ("--data-size 64 --steps 6 --reflow-steps 4 --pairs 24 --shard 8 --eval-size 24 --pair-steps 3 --channels 4 "
          "--image-size 8 --mult 1 1 --attention 4 --batch 4 --log-every 2 --device cpu").split()     # as in chapter 2
TINY = [*SHARED, *"--real-steps 2 --real-pairs 16 --invert-steps 3 --lpips-weights random".split()]
CLASSES = 32                                                # labels of the shapes: colour, shape, background
FIGURES = {"samples.png", "editing.png"}
CPU = torch.device("cpu")


# ---- Times -----------------------------------------------------------------------------------------------------------


def cdf(t, a=4.0):
    """The integral of a cosh(a (t - 1/2)) / (2 sinh(a/2)), by hand."""
    return 0.5 + np.sinh(a * (t - 0.5)) / (2 * np.sinh(a / 2))


@pytest.fixture
def times_at(monkeypatch):
    """times_at(y, a): what the sampler makes of uniform numbers y that are given rather than drawn."""
    def times_at(y, a=4.0):
        y = torch.as_tensor(y, dtype=torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda n, **_: y[:n])
            return chapter.u_shaped_times(len(y), a).numpy()
    return times_at


def test_the_density_integrates_to_one_and_has_the_published_values():
    t = np.linspace(0, 1, 100001)
    density = 4 * np.cosh(4 * (t - 0.5)) / (2 * np.sinh(2))
    assert trapezoid(density, t) == pytest.approx(1, abs=1e-8)
    assert density[[0, -1, 50000]] == pytest.approx([2.07463, 2.07463, 0.55144], abs=1e-5)
    assert np.gradient(cdf(t), t)[1:-1] == pytest.approx(density[1:-1], abs=1e-6)


@pytest.mark.parametrize("a", [1e-3, 0.5, 4.0, 12.0])
def test_times_invert_the_distribution_function(times_at, a):
    y = np.linspace(0, 1, 1001)
    assert cdf(times_at(y, a), a) == pytest.approx(y, abs=1e-9)


def test_times_have_the_published_quantiles_and_moments(times_at):
    assert times_at([0.01, 0.05, 0.1, 0.25, 0.5]) == pytest.approx([.004865, .025292, .053294, .160764, .5], abs=1e-6)
    t = times_at((np.arange(10 ** 5) + 0.5) / 10 ** 5)
    assert t.mean() == pytest.approx(0.5, abs=1e-9) and t.var() == pytest.approx(0.115671, abs=1e-6)
    assert ((t < 0.1) | (t > 0.9)).mean() == pytest.approx(0.34501, abs=2e-5)
    assert (abs(t - 0.5) < 0.1).mean() == pytest.approx(0.11325, abs=2e-5)
    loss = 0.25 / ((1 - t) ** 2 + 0.25 * t ** 2)                    # 1-RF's least loss on N(0, 1/4), at each t
    assert loss.mean() == pytest.approx(0.763549, abs=1e-5)


@pytest.mark.parametrize("a", [0.5, 4.0])
def test_drawn_times_follow_the_density_and_are_symmetric(a):
    """2 cosh(a t), which the paper prints, is not symmetric: a sample of it fails both halves of this test."""
    torch.manual_seed(0)
    t = chapter.u_shaped_times(50000, a).double()
    literal = torch.asinh(torch.rand(50000).double() * math.sinh(a)) / a         # density ~ cosh(a t)
    for sample, passes in ((t, True), (literal, False)):
        assert (kstest(sample.numpy(), partial(cdf, a=a)).pvalue > 1e-3) == passes
        assert (abs(sample.mean() - 0.5) < 0.007) == passes        # 4.6 standard deviations
    assert literal.mean() == pytest.approx({0.5: 0.5102, 4.0: 0.7590}[a], abs=0.005)
    assert t.min() > -1e-6 and t.max() < 1 + 1e-6


def test_times_without_steepness_are_uniform():
    torch.manual_seed(0)
    t = chapter.u_shaped_times(20000, 0.0)
    assert kstest(t.numpy(), "uniform").pvalue > 1e-3
    for a in (0.0, 1e-4):
        torch.manual_seed(0)
        torch.testing.assert_close(chapter.u_shaped_times(20000, a), t, rtol=0, atol=1e-5)


@pytest.mark.parametrize("a", [0.0, 1e-50, 1e-3, 4.0, 50.0])
@pytest.mark.parametrize("y", [0.0, 0.5, 1 - 2 ** -24])
def test_times_are_finite_at_the_ends(monkeypatch, a, y):
    """At the least and the greatest number that torch.rand gives, and at any steepness of sense."""
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), y))
    t = chapter.u_shaped_times(4, a)
    assert t.shape == (4,) and t.dtype == torch.float32 and t.isfinite().all() and ((-1e-6 < t) & (t < 1 + 1e-6)).all()


# ---- Distances -------------------------------------------------------------------------------------------------------


def huber(residual):
    """The definition for one sample, in numpy."""
    d = residual.size
    c = 0.00054 * d
    return (np.sqrt(np.sum(np.square(residual, dtype=np.float64)) + c * c) - c) / d


@pytest.mark.parametrize("size, table", [(32, (0.00134, 0.00490, 0.01751)), (64, (0.00051, 0.00222, 0.00850))])
def test_huber_has_the_published_values(size, table):
    """Of residuals with root mean square 0.1, 0.3 and 1; c is 1.65888 at 32 x 32."""
    target = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    residual = torch.ones_like(target) * torch.tensor([0.1, 0.3, 1.0])[:, None, None, None]
    assert chapter.pseudo_huber(target + residual, target).tolist() == pytest.approx(table, abs=5e-6)


@pytest.mark.parametrize("shape", [(2,), (3, 4, 4), (3, 32, 32)])
def test_huber_against_the_definition(shape):
    rng = np.random.default_rng(0)
    v, target = rng.normal(size=(2, 6, *shape)) * np.logspace(-3, 2, 6).reshape(-1, *[1] * len(shape))
    got = chapter.pseudo_huber(torch.tensor(v), torch.tensor(target))
    assert got.shape == (6,) and got.tolist() == pytest.approx([huber(r) for r in v - target], rel=1e-9)


def test_huber_is_quadratic_then_linear():
    d, c = 3072, 1.65888
    direction = torch.nn.functional.normalize(torch.randn(1, d, dtype=torch.float64), dim=1)
    target = torch.randn(1, d, dtype=torch.float64)

    def at(r):
        return chapter.pseudo_huber(target + r * direction, target).item()
    assert at(0) == 0
    assert [at(r) for r in (1e-3 * c, 1e-2 * c)] == pytest.approx([1e-6 * c / 2 / d, 1e-4 * c / 2 / d], rel=1e-4)
    assert [at(r) for r in (1e3 * c, 1e4 * c)] == pytest.approx([999 * c / d, 9999 * c / d], rel=1e-3)


def test_the_gradient_of_huber_is_shorter_than_one_over_d():
    torch.manual_seed(0)
    residual = (torch.randn(8, 3, 8, 8) * torch.logspace(-3, 3, 8)[:, None, None, None]).requires_grad_()
    chapter.pseudo_huber(residual, torch.zeros_like(residual)).sum().backward()
    lengths = residual.grad.flatten(1).norm(dim=1)
    assert (lengths < 1 / 192 * (1 + 1e-6)).all() and lengths[-1] > 0.999 / 192 and (lengths.diff() > -1e-9).all()


def pair_at(t, seed=0, size=4):
    """x0, x1, v, t for len(t) samples."""
    torch.manual_seed(seed)
    x0, x1, v = torch.randn(3, len(t), 3, size, size)
    return x0, x1, v, torch.tensor(t)


def distance(a, b):
    """Stands in for LPIPS: any distance that tells which picture is which."""
    return (a - b).square().mean((1, 2, 3)) * (1 + a.mean((1, 2, 3)).square())


@pytest.mark.parametrize("divide", [False, True])
def test_lpips_huber_is_the_published_formula(divide):
    """t huber(velocity) + LPIPS(prediction, picture) [/ (1 - t)]; the prediction is off by (1 - t) (v - target)."""
    x0, x1, v, t = pair_at([0.01, 0.3, 0.5, 0.99])
    got = (chapter.lpips_huber_divided if divide else chapter.lpips_huber)(v, x0, x1, t, distance)
    for i in range(4):
        x1_hat = x1[i] + (1 - t[i]) * (v[i] - (x1[i] - x0[i]))
        expected = t[i] * huber((v[i] - x1[i] + x0[i]).numpy())
        expected += distance(x1_hat[None], x1[i:i + 1])[0] / (1 - t[i] if divide else 1)
        assert got[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_identities_between_velocity_and_predictions():
    """x1_hat - x1 = (1 - t) (v - (x1 - x0)); x0_hat = x_t - t v; x1_hat - x0_hat = v; both lie on a line with x_t."""
    x0, x1, v, t = (x.double() for x in pair_at([0.0, 0.2, 0.7, 1.0]))
    seen = []
    for lpips_huber in (chapter.lpips_huber, chapter.lpips_huber_divided):
        lpips_huber(v, x0, x1, t, lambda a, b: seen.append((a, b)) or a.new_zeros(4))
    (x1_hat, target), again = seen
    time, close = t[:, None, None, None], partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    xt = chapter.interpolate(x0, x1, t)
    x0_hat = xt - time * v
    assert target is x1 and again[1] is x1 and torch.equal(again[0], x1_hat)
    close(x1_hat - x1, (1 - time) * (v - (x1 - x0)))
    close(x1_hat - x0_hat, v)
    close(xt, (1 - time) * x0_hat + time * x1_hat)
    for i in range(3):                                              # a last step of sampling ends in the same x1_hat
        ended = chapter.few_step_sample(lambda *_: v[i:i + 1], xt[i:i + 1], [t[i].item()])
        close(ended, x1_hat[i:i + 1])


@pytest.mark.parametrize("divide", [False, True])
def test_the_exact_velocity_has_no_lpips_huber_loss(divide):
    x0, x1, _, t = pair_at([0.0, 0.4, 0.999, 1.0])
    got = (chapter.lpips_huber_divided if divide else chapter.lpips_huber)(x1 - x0, x0, x1, t, distance)
    assert got.abs().max() < 1e-9


def test_the_weights_stay_finite_at_both_ends():
    """At t = 0 only the picture counts, at t = 1 only the velocity; dividing by 1 - t overflows nowhere."""
    x0, x1, v, t = pair_at([0.0, 1e-7, 1 - 1e-7, 1.0, 1.0000001])
    v.requires_grad_()
    for lpips_huber in (chapter.lpips_huber, chapter.lpips_huber_divided):
        loss = lpips_huber(v, x0, x1, t, distance)
        gradient, = torch.autograd.grad(loss.sum(), v)
        assert loss.isfinite().all() and gradient.isfinite().all()
        assert loss[0].item() == pytest.approx(distance(x0 + v, x1)[0].item(), rel=1e-5)
        assert loss[3].item() == pytest.approx(huber((v - x1 + x0)[3].detach().numpy()), rel=1e-3)


# ---- What a configuration trains on ----------------------------------------------------------------------------------


DISTANCES = {"A": "l2", "B": "l2", "C": "l2", "D": "huber", "E": "lpips-huber", "F": "lpips-huber-1/t",
             "G": "lpips-huber-1/t"}
EXPECTED = {
    "l2": lambda v, x0, x1, t: (v - (x1 - x0)).square().mean((1, 2, 3)),
    "huber": lambda v, x0, x1, t: chapter.pseudo_huber(v, x1 - x0),
    "lpips-huber": lambda v, x0, x1, t: chapter.lpips_huber(v, x0, x1, t, distance),
    "lpips-huber-1/t": lambda v, x0, x1, t: chapter.lpips_huber_divided(v, x0, x1, t, distance),
}


def test_the_ladder_differs_only_as_documented():
    """Uniform times for A and B, U-shaped ones from C on, steepness 4; a new distance at D, E and F."""
    assert list(chapter.LADDER) == list("ABCDEFG")
    assert [times for times, _ in chapter.LADDER.values()] == 2 * [torch.rand] + 5 * [chapter.u_shaped_times]
    found = [distance for _, distance in chapter.LADDER.values()]
    assert [a is b for a, b in itertools.pairwise(found)] == [True, True, False, False, False, True]
    torch.manual_seed(0)
    t = chapter.u_shaped_times(1000)
    torch.manual_seed(0)
    assert torch.equal(t, chapter.u_shaped_times(1000, 4.0))


def bound(name, times=None, perceptual=distance):
    """The recipe of a configuration, with another way to draw times and another LPIPS."""
    return times or chapter.LADDER[name][0], partial(chapter.LADDER[name][1], perceptual=perceptual)


@pytest.mark.parametrize("name", "ABCDEFG")
def test_the_loss_of_a_configuration(name):
    """Which distance; the network sees x_t, the t that were drawn and the labels of the pairs."""
    x0, x1, v, t = pair_at([0.1, 0.4, 0.6, 0.95])
    labels, asked, seen = torch.arange(4), [], []

    def times(n, device):
        asked.append((n, device))
        return t
    loss = chapter.pair_loss(lambda *inputs: seen.append(inputs) or v, None, 0, lambda: (x0, x1, labels),
                             bound(name, times))
    assert asked == [(4, CPU)]
    (x, time, classes), = seen
    torch.testing.assert_close(x, chapter.interpolate(x0, x1, t))
    assert time is t and torch.equal(classes, labels)
    torch.testing.assert_close(loss, EXPECTED[DISTANCES[name]](v, x0, x1, t))


@pytest.mark.parametrize("name", "AF")
def test_the_loss_draws_pairs_first_and_then_times(name):
    """The order of random draws, on which every published number of this chapter depends."""
    def draw():
        return *torch.randn(2, 8, 3, 4, 4), None
    seen = []
    torch.manual_seed(0)
    chapter.pair_loss(lambda x, t, labels: seen.append((x, t)) or x, None, 0, draw, bound(name))
    torch.manual_seed(0)
    x0, x1 = torch.randn(2, 8, 3, 4, 4)
    t = chapter.LADDER[name][0](8)
    assert torch.equal(seen[0][1], t) and torch.equal(seen[0][0], chapter.interpolate(x0, x1, t))


class Recorder:
    """Stands in for a run: remembers what it was told to fit, and returns the name."""

    def __init__(self, config, share):
        self.config, self.share, self.device, self.told, self.inputs = config, share, CPU, [], {}

    def fit(self, name, model, loss_fn, stream=0, **changes):
        self.told.append((name, model, loss_fn, stream, changes))
        return name


@pytest.mark.parametrize("name, factor, steps", [("A", 1, 50), ("B", 3, 50), ("F", 3, 50), ("G", 3, 7)])
def test_a_process_draws_its_share_of_the_batch(name, factor, steps):
    """A third of a batch of 12 is 4; three times as much from B on; and no two students draw the same numbers."""
    asked = []

    def draw(n):
        asked.append(n)
        return *torch.randn(2, n, 3, 4, 4), None
    run = Recorder(chapter.Config(batch=12, big_batch=3, reflow_steps=50, real_steps=7), share=4)
    assert chapter.train_students(name, bound(name), ["x", "y"], draw, run) == [f"{name}-0", f"{name}-1"]
    for _, _, loss_fn, _, changes in run.told:
        assert loss_fn(lambda x, t, labels: x, None, 0).shape == (4 * factor,)
        assert changes == dict(steps=steps, batch=12 * factor)
    assert asked == 2 * [4 * factor] and [start for _, start, *_ in run.told] == ["x", "y"]
    assert [stream for *_, stream, _ in run.told] == [100 + "ABCDEFG".index(name), 200 + "ABCDEFG".index(name)]


def tiny_config(*more):
    return chapter.parse_config(chapter.Config, [*TINY, *map(str, more)])


def tiny_flow(classes=0):
    """A network whose weights are not those of the start, where its output is nearly 0."""
    torch.manual_seed(0)
    flow = chapter.Flow(tiny_config(), 3, classes)
    for p in flow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return flow.eval()


@pytest.mark.parametrize("name", "ACDEF")
def test_every_loss_reaches_all_weights(name):
    """Gradients are finite, nowhere all zero, and differ from those of the other configurations."""
    flow = tiny_flow(classes=4)
    perceptual = chapter.Perceptual("squeeze", 32, "random") if name in "EF" else None
    draw = partial(chapter.draw_stored, chapter.shapes(24, 8)[0], 0, 4, 4)
    torch.manual_seed(1)
    chapter.pair_loss(flow, None, 0, draw, bound(name, perceptual=perceptual)).mean().backward()
    for key, p in flow.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, key
    if perceptual:
        assert not any(p.grad is not None for p in perceptual.parameters())


@pytest.mark.parametrize("conditional", [False, True])
def test_inverted_pairs_stay_together(conditional):
    """Also where there are more pictures than noises: only the first are drawn."""
    images = torch.arange(60, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    classes = torch.arange(60) % 3 if conditional else None
    torch.manual_seed(0)
    x0, x1, labels = chapter.draw_inverted(images[:50].half() + 0.5, images, classes, 400)
    index = ((x1 + 1) * 127.5).round()[:, 0, 0, 0].long()
    assert x0.dtype == x1.dtype == torch.float32 and torch.equal(x0[:, 1, 1, 1], index + 0.5)
    assert len(index.unique()) == 50
    assert torch.equal(labels, index % 3) if conditional else labels is None


# ---- A diffusion model as a velocity ---------------------------------------------------------------------------------


def some_network(x, c):
    """Anything smooth that depends on both inputs."""
    return torch.sin(3 * x) + c[:, None] * torch.cos(x)


def denoise(network, y, sigma):
    """EDM's D(y; sigma) = c_skip y + c_out F(c_in y; ln(sigma) / 4) with sigma_data = 1/2."""
    total = sigma ** 2 + 0.25
    return 0.25 / total * y + 0.5 * sigma / total.sqrt() * network(y / total.sqrt(), sigma[:, 0].log() / 4)


def textbook_velocity(network, x, t):
    """(D(x_t / t; (1 - t) / t) - x_t) / (1 - t): the same thing, but it cancels near the data and has no ends."""
    time = t[:, None]
    return (denoise(network, x / time, (1 - time) / time) - x) / (1 - time)


def test_edm_velocity_is_the_denoiser_in_disguise():
    torch.manual_seed(0)
    x, t = torch.randn(50, 6, dtype=torch.float64), torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    torch.testing.assert_close(chapter.edm_velocity(some_network, x, t), textbook_velocity(some_network, x, t),
                               rtol=1e-11, atol=1e-11)


def rounding_error(velocity, noise):
    """Greatest error in float32 at 1 - t = noise, relative to the greatest velocity."""
    torch.manual_seed(0)
    x, t = torch.randn(500, 6), torch.full((500,), 1 - noise)
    exact = textbook_velocity(some_network, x.double(), t.double())
    return ((velocity(some_network, x, t) - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("noise, lost", [(1e-5, 1e-3), (1e-4, 1e-4), (1e-3, 1e-5)])
def test_edm_velocity_is_stable_near_the_data(noise, lost):
    """Right to rounding in float32, where the textbook form has lost all but two digits (at 1 - t = 1e-5)."""
    assert rounding_error(chapter.edm_velocity, noise) < 1e-6
    assert rounding_error(textbook_velocity, noise) > lost


def test_edm_velocity_at_the_ends():
    x = torch.randn(2, 3, 4, 4)
    for t, of_x, of_f in [(0.0, -1, 0.5), (1.0, 1, 1), (0.5, -1.2, 0.894427)]:
        out = chapter.edm_velocity(lambda y, c: torch.ones_like(y), x, torch.full((2,), t))
        torch.testing.assert_close(out, of_x * x + of_f, rtol=1e-5, atol=1e-5)
        out = chapter.edm_velocity(lambda y, c: torch.zeros_like(y), x, torch.full((2,), t))
        torch.testing.assert_close(out, of_x * x, rtol=1e-5, atol=1e-5)


def gaussian(x, t, s=0.5):
    """The velocity of 1-RF for data N(0, s^2): its flow carries z to z sqrt((1 - t)^2 + s^2 t^2)."""
    t = t.reshape(-1, *[1] * (x.dim() - 1))
    return (s * s * t - (1 - t)) / ((1 - t) ** 2 + s * s * t * t) * x


@pytest.mark.parametrize("s", [0.5, 0.1, 1.3])
def test_the_denoiser_of_gaussian_data_is_the_closed_form(s):
    """s^2 y / (s^2 + sigma^2), from the velocity; and back through a network F that gives this denoiser."""
    torch.manual_seed(0)
    y, sigma = torch.randn(40, 3), 0.7
    torch.testing.assert_close(chapter.denoise(partial(gaussian, s=s), y, sigma), s * s / (s * s + sigma ** 2) * y,
                               rtol=1e-5, atol=1e-6)

    def network(x, label):
        sigma = (4 * label).exp()[:, None]
        scale = (sigma ** 2 + 0.25).sqrt()
        wanted = s * s / (s * s + sigma ** 2) * scale * x
        return (wanted - 0.25 / scale * x) / (0.5 * sigma / scale)
    x, t = torch.randn(40, 3, dtype=torch.float64), torch.linspace(0.01, 0.99, 40, dtype=torch.float64)
    torch.testing.assert_close(chapter.edm_velocity(network, x, t), gaussian(x, t, s), rtol=1e-9, atol=1e-9)


class Counted:
    """A velocity that counts its evaluations."""

    def __init__(self, velocity):
        self.velocity, self.evaluations = velocity, 0

    def __call__(self, x, t):
        self.evaluations += 1
        assert x.shape[:1] == t.shape and 0 <= t.min() and t.max() <= 1
        return self.velocity(x, t)


ONE = torch.ones(1, 1, dtype=torch.float64)


@pytest.mark.parametrize("steps, expected", [(10, 0.609798), (18, 0.527625), (40, 0.504877), (80, 0.501145)])
def test_edm_sampler_on_gaussian_data(steps, expected):
    velocity = Counted(gaussian)
    assert chapter.edm_sample(velocity, ONE, steps).item() == pytest.approx(expected, abs=2e-6)
    assert velocity.evaluations == 2 * steps - 1


def test_edm_sampler_is_of_second_order_and_starts_at_sigma_80():
    exact = 0.5 / math.sqrt(1 + 0.25 / 6400)
    errors = [chapter.edm_sample(gaussian, ONE, steps).item() - exact for steps in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(4.2, abs=0.1)
    assert chapter.edm_sample(gaussian, ONE, 2000).item() == pytest.approx(0.499990, abs=5e-6)
    for s in (0.5, 0.1, 1.3):
        got = chapter.edm_sample(partial(gaussian, s=s), ONE, 2000).item()
        assert got == pytest.approx(s / math.sqrt(1 + s * s / 6400), rel=1e-3)


def mixture(x, t, s=0.2):
    """The velocity of 1-RF for data N(-1, s^2)/2 + N(1, s^2)/2."""
    means, variance = torch.tensor([-1.0, 1.0]).to(x), (1 - t) ** 2 + (s * t) ** 2
    offset = x - t[:, None] * means                                            # (B, 2)
    share = torch.softmax(-offset ** 2 / (2 * variance[:, None]), 1)
    slope = (s * s * t - (1 - t)) / variance
    return (share * (means + slope[:, None] * offset)).sum(1, keepdim=True)


def test_the_teacher_maps_one_dimension_by_quantiles():
    """So lines from z to T(z) never cross, and one step along them is exact."""
    z = norm.ppf((np.arange(2000) + 0.5) / 2000)
    grid = np.linspace(-2.5, 2.5, 200001)
    quantile = np.interp(norm.cdf(z), (norm.cdf((grid + 1) / 0.2) + norm.cdf((grid - 1) / 0.2)) / 2, grid)
    for steps, rms in [(18, 0.0234), (40, 0.0038), (80, 0.00093)]:
        made = chapter.edm_sample(mixture, torch.tensor(z)[:, None], steps)[:, 0].numpy()
        assert np.sqrt(np.mean((made - quantile) ** 2)) == pytest.approx(rms, rel=0.25)
        assert (np.diff(made) > 0).all()
    for t in (0.1, 0.5, 0.9):
        assert (np.diff((1 - t) * z + t * made) > 0).all()


# ---- Few steps, inversion --------------------------------------------------------------------------------------------


def grid(steps):
    return [i / steps for i in range(steps)]


def reference_sample(velocity, x0, times, rule):
    """The update rules, line by line as published, with the time of the paper: u = 1 - t falls from 1, velocity -v."""
    u, x = [1 - t for t in times] + [0.0], x0

    def w(x, u):
        return -velocity(x, torch.full((len(x),), 1 - u, dtype=x.dtype))

    def step(x, slope, u, after):
        return (1 - after) * (x - u * slope) + after * x0 if rule == "new" else x + slope * (after - u)
    for i in range(len(u) - 1):
        x = step(x, w(x, u[i]), u[i], u[i + 1])
    return x


TABLE = {"euler": {1: 0, 2: .2, 4: .3405, 8: .4148, 32: .4774, 128: .4942},
         "new": {1: 0, 2: .2, 4: .3805, 8: .5629, 32: 1.0297, 128: 1.7375}}


@pytest.mark.parametrize("rule, steps, expected", [(rule, *row) for rule in TABLE for row in TABLE[rule].items()])
def test_few_steps_on_gaussian_data(rule, steps, expected):
    """Exact is 0.5.  The new rule is no solver: it moves away from it on a curved flow."""
    velocity = Counted(gaussian)
    assert chapter.few_step_sample(velocity, ONE, grid(steps), rule).item() == pytest.approx(expected, abs=6e-5)
    assert velocity.evaluations == steps
    if rule == "euler":
        assert chapter.integrate(gaussian, ONE, steps)[-1].item() == pytest.approx(expected, abs=6e-5)


@pytest.mark.parametrize("steps, expected", [(1, 0.5), (2, 0.48), (4, 0.50483), (8, 0.50244)])
def test_heun_on_gaussian_data(steps, expected):
    assert chapter.integrate(gaussian, ONE, steps, "heun")[-1].item() == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize("rule", ["new", "euler"])
@pytest.mark.parametrize("times", [[0.0], [0.0, 0.5], [0.0, 0.1, 0.15, 0.6], [0.0, 0.9], grid(7)], ids=len)
def test_any_grid_against_the_published_rule(rule, times):
    torch.manual_seed(0)
    x0, velocity = torch.randn(5, 6, dtype=torch.float64), Counted(lambda x, t: torch.sin(3 * x) * (t[:, None] - 0.3))
    expected = reference_sample(velocity.velocity, x0, times, rule)
    for end in ([], [1.0]):                                         # a final 1 may be given or not
        velocity.evaluations = 0
        torch.testing.assert_close(chapter.few_step_sample(velocity, x0, times + end, rule), expected,
                                   rtol=1e-10, atol=1e-10)
        assert velocity.evaluations == len(times)


def test_the_rules_agree_up_to_two_steps_and_differ_from_three():
    """They agree wherever the state lies on the line from the first noise to the present guess."""
    torch.manual_seed(0)
    x0 = torch.randn(5, 6, dtype=torch.float64)

    def gap(times):
        new, euler = (chapter.few_step_sample(lambda x, t: torch.sin(3 * x) - t[:, None], x0, times, rule)
                      for rule in ("new", "euler"))
        return (new - euler).abs().max().item()
    assert gap([0.0]) < 1e-12 and gap([0.0, 0.5]) < 1e-12 and gap([0.0, 0.2]) < 1e-12
    assert gap(grid(3)) > 1e-3 and gap(grid(8)) > 1e-3


def straight(x, t, s=0.3):
    """2-RF for data N(0, s^2): pairs (z, s z), x_t = ((1 - t) + t s) z."""
    t = t.reshape(-1, *[1] * (x.dim() - 1))
    return (s - 1) * x / ((1 - t) + t * s)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 17])
def test_every_sampler_is_exact_on_straight_flows(steps):
    torch.manual_seed(0)
    z = torch.randn(10, 4, dtype=torch.float64)
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
    for method in ("euler", "heun"):
        close(chapter.integrate(straight, z, steps, method)[-1], 0.3 * z)
        close(chapter.invert(straight, 0.3 * z, steps, method), z)
    for rule in ("new", "euler"):
        close(chapter.few_step_sample(straight, z, grid(steps), rule), 0.3 * z)
    close(chapter.few_step_sample(straight, z, [0.0, 0.05, 0.9]), 0.3 * z)


def test_inversion_undoes_a_curved_flow():
    """Up to its own error: of first order by Euler, of second by Heun."""
    z = torch.randn(20, 4, dtype=torch.float64)
    x1 = 0.5 * z
    for method, order in (("euler", 2.0), ("heun", 4.0)):
        errors = [(chapter.invert(gaussian, x1, steps, method) - z).abs().max().item() for steps in (32, 64)]
        assert errors[0] / errors[1] == pytest.approx(order, rel=0.15) and errors[1] < 0.1
    back = chapter.integrate(gaussian, chapter.invert(gaussian, x1, 100, "heun"), 100, "heun")[-1]
    torch.testing.assert_close(back, x1, rtol=1e-3, atol=1e-4)


def test_inversion_may_start_from_a_noisier_picture():
    """From t = 1 - noise, with fresh noise mixed in; so that even a flat picture has noise of the right size."""
    x1 = torch.cat([torch.zeros(1, 3072), 0.5 * torch.randn(1, 3072)])
    for share in (0.0, 0.05, 0.5):
        torch.manual_seed(3)
        xt = (1 - share) * x1 + share * torch.randn(2, 3072)
        torch.manual_seed(3)
        z0 = chapter.invert(Counted(gaussian), x1, 100, "heun", noise=share)
        torch.testing.assert_close(z0, xt / (share ** 2 + 0.25 * (1 - share) ** 2) ** 0.5, rtol=1e-3, atol=1e-3)


def test_inverted_noise_of_an_exact_flow_has_the_chi_squared_law():
    """|z|^2 of pictures with 3072 numbers: 3072, standard deviation 78.4.  A flow that shrinks too much does not."""
    torch.manual_seed(0)
    x1 = 0.5 * torch.randn(400, 3072)
    for velocity, steps in ((partial(straight, s=0.5), 4), (gaussian, 64)):
        squares = chapter.invert(velocity, x1, steps, "heun").square().sum(1)
        assert squares.mean() == pytest.approx(3072, abs=5 * 78.4 / 20)
        assert squares.std() == pytest.approx(78.4, rel=0.15)
        assert kstest(squares.numpy(), chi2(3072).cdf).pvalue > 1e-3
    wrong = chapter.invert(partial(gaussian, s=0.45), x1, 64, "heun").square().sum(1)
    assert kstest(wrong.numpy(), chi2(3072).cdf).pvalue < 1e-9


@pytest.mark.parametrize("method, steps, evaluations", [
    ("euler", 1, 1), ("euler", 5, 5), ("new", 4, 4), ("heun", 5, 10), ("edm", 1, 1), ("edm", 5, 9), ("edm", 40, 79)])
def test_evaluations_are_counted(method, steps, evaluations):
    velocity = chapter.Velocity(tiny_flow(), tiny_config())
    index = torch.arange(2)
    assert chapter.sample(velocity, chapter.pair_noise(0, index, (3, 8, 8)), index, steps, method).shape == (2, 3, 8, 8)
    assert velocity.evaluations == evaluations


def test_all_solvers_of_a_real_network_agree():
    """With enough steps, and the labels that belong to the pairs.  The new rule is no solver: it is Euler's up to 2."""
    velocity, index = chapter.Velocity(tiny_flow(classes=4), tiny_config()), torch.arange(5, 9)
    noise = chapter.pair_noise(0, index, (3, 8, 8))
    flow = partial(velocity, labels=torch.tensor([1, 2, 3, 0]))
    exact, two = chapter.integrate(flow, noise, 100, "heun")[-1], chapter.integrate(flow, noise, 2)[-1]
    for method, steps, expected, error in [("heun", 40, exact, 1e-3), ("euler", 100, exact, 0.05),
                                           ("edm", 40, exact, 0.05), ("new", 2, two, 1e-5)]:
        got = chapter.sample(velocity, noise, index, steps, method)
        assert (got - expected).square().mean().sqrt() < error * expected.std(), method


def test_slerp_stays_on_the_sphere_and_meets_its_ends():
    torch.manual_seed(0)
    z, w = torch.randn(2, 3, 16, 16)
    w *= z.norm() / w.norm()
    torch.testing.assert_close(chapter.slerp(z, w, torch.tensor(0.0)), z)
    torch.testing.assert_close(chapter.slerp(z, w, torch.tensor(1.0)), w)
    for share in torch.linspace(0, 1, 11):
        between = chapter.slerp(z, w, share)
        assert between.norm() == pytest.approx(z.norm().item(), rel=1e-5)
        angle, whole = (torch.acos((z * x).sum() / z.norm() / x.norm()).item() for x in (between, w))
        assert angle == pytest.approx(share.item() * whole, abs=2e-3)


def test_slerp_between_equal_points_is_that_point():
    """A folder may hold the same picture twice; rounding may put the cosine above 1."""
    torch.manual_seed(0)
    for z in torch.randn(20, 3, 16, 16):
        torch.testing.assert_close(chapter.slerp(z, z.clone(), torch.tensor(0.3)), z, rtol=1e-3, atol=1e-3)


def test_velocity_error_is_resolved_along_t():
    """Pairs with x1 - x0 = 2 and v = 2 + t: the error is t^2."""
    x0 = torch.randn(500, 3, 2, 2)

    def velocity(x, t):
        return 2 + t[:, None, None, None].expand_as(x)
    torch.manual_seed(0)
    errors = chapter.loss_by_time(velocity, x0, x0 + 2, bins=5).tolist()
    edges = np.linspace(0, 1, 6)
    assert errors == pytest.approx(np.diff(edges ** 3) / 3 * 5, rel=0.03, abs=1e-3)


class Straight:
    """The straight flow, or another, as a network ready to sample; remembers the labels it was given."""

    def __init__(self, classes=0, velocity=straight):
        self.classes, self.velocity, self.shape = classes, velocity, (3, 8, 8)
        self.labels, self.evaluations = [], 0

    def __call__(self, x, t, labels=None):
        self.evaluations += 1
        self.labels.append(labels)
        return self.velocity(x, t)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_straight_flow_measures_as_straight(classes):
    """No error on its own pairs, S = 0, exact inversion in one step, and |z|^2 of the noise is that of x1 / 0.3."""
    velocity, features = Straight(classes), chapter.RandomFeatures()
    images = chapter.shapes(30, 8)[0]
    x1, own = chapter.to_floats(images), torch.arange(30) % 3 if classes else None

    def draw(n):
        x0 = torch.randn(n, 3, 8, 8)
        return x0, 0.3 * x0, torch.arange(n) % 3 if classes else None
    row = chapter.evaluate(velocity, draw, (features, chapter.feature_moments(images, features, CPU)), (x1, own),
                           chapter.Run(tiny_config("--invert-noise", 0), chapter.__file__))
    assert list(row["FD"]) == ["1", "2", "4", "4 new"] and row["FD"]["4"] == pytest.approx(row["FD"]["1"], rel=1e-3)
    assert row["S"] < 1e-6 and max(row["error_by_t"]) < 1e-9 and list(row["mse"]) == ["1", "2", "4", "8"]
    assert max(row["mse"].values()) < 1e-10
    assert row["z2"] == pytest.approx((x1 / 0.3).flatten(1).square().sum(1).mean().item(), rel=1e-4)
    assert velocity.evaluations == 3 * (1 + 2 + 4 + 4) + 2 * 10 + 5 + 2 * (1 + 2 + 4 + 8)
    expected = torch.arange(500) % 3 if classes else None
    few_steps, paths, errors = velocity.labels[:33], velocity.labels[33:53], velocity.labels[53:58]
    for labels, count in [(few_steps[0], 8), (paths[0], 8), (errors[0], 8)]:         # batches of one size: the shard
        assert labels is None if not classes else torch.equal(labels, expected[:count])
    assert all(labels is own for labels in velocity.labels[58:])


def test_accuracy_is_the_share_of_samples_that_show_their_label():
    """A flow that ends at one picture for each label; for every odd one it is another label's picture."""
    images, labels = chapter.shapes(2000, 16)
    first = torch.tensor([(labels == label).nonzero()[0].item() for label in range(CLASSES)])
    ends = chapter.to_floats(images[first])
    assert torch.equal(chapter.read_labels(ends), torch.arange(CLASSES))
    ends[1::2] = ends[1::2].roll(1, 0)

    class Fixed:
        classes, shape, evaluations = CLASSES, (3, 16, 16), 0

        def __call__(self, x, t, labels):
            return (ends[labels] - x) / (1 - t).clamp(min=1e-3)[:, None, None, None]
    few, features = (ends[:8], torch.arange(8)), chapter.RandomFeatures()
    config = tiny_config("--image-size", 16, "--eval-size", 31)
    row = chapter.evaluate(Fixed(), lambda n: (*torch.randn(2, n, 3, 16, 16), torch.arange(n)),
                           (features, chapter.feature_moments(images, features, CPU)), few,
                           chapter.Run(config, chapter.__file__))
    assert row["accuracy"] == {name: pytest.approx(16 / 31) for name in ("1", "2", "4", "4 new")}
    assert list(row["accuracy"]) == list(row["FD"])


def test_a_bent_flow_inverts_with_an_error_that_falls():
    """By Euler, there and back; the closed form of one step is that of the Gaussian flow."""
    x1, flow = 0.3 * torch.randn(6, 3, 8, 8), Straight(velocity=gaussian)
    features = chapter.RandomFeatures()
    real = features, chapter.moments(torch.randn(100, 96))
    row = chapter.evaluate(flow, lambda n: (*torch.randn(2, n, 3, 8, 8), None), real, (x1, None),
                           chapter.Run(tiny_config("--invert-noise", 0), chapter.__file__))
    z0 = x1 - gaussian(x1, torch.ones(6))
    back = z0 + gaussian(z0, torch.zeros(6))
    assert row["mse"]["1"] == pytest.approx((back - x1).square().mean().item(), rel=1e-4)
    assert row["mse"]["1"] > 1e-4 and row["mse"]["8"] < row["mse"]["2"] and row["S"] > 1


@pytest.mark.parametrize("settings, names", [
    ({}, "AF"), ({"configs": ("F", "A")}, "AF"), ({"configs": ("G",)}, "FG"), ({"configs": ("B", "B")}, "B"),
    ({"configs": ("A", "G", "C")}, "ACFG"), ({"ablate": True, "configs": ("A",)}, "ACDEFG"),
    ({"ablate": True, "big_batch": 4}, "ABCDEFG")], ids=str)
def test_names_of_the_configurations(settings, names):
    """In the order of the ladder; G brings F, from which it starts; B is A's twin without a larger batch."""
    recipes = chapter.choose_recipes(Recorder(chapter.Config(lpips_weights="random", **settings), 1))
    assert list(recipes) == list(names)
    for name, (times, distance) in recipes.items():
        assert times is chapter.LADDER[name][0] and distance.func is chapter.LADDER[name][1]
        assert isinstance(distance.keywords["perceptual"], chapter.Perceptual) or not set(names) & set("EFG")


@pytest.mark.parametrize("configs", [("A", "X"), ("a",), ("AF",), ("",)])
def test_unknown_configurations_are_named(configs, capsys):
    with pytest.raises(SystemExit) as stop:
        chapter.parse_config(chapter.Config, ["--configs", *configs])
    assert stop.value.code == 2
    one_line(capsys.readouterr().err, "--configs", repr(configs[-1]))


# ---- LPIPS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perceptual():
    return chapter.Perceptual("squeeze", 32, "random")


def pictures(n=4, size=8, seed=0):
    return torch.rand(2, n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_random_lpips_is_the_same_every_time(perceptual):
    torch.manual_seed(5)
    again = chapter.Perceptual("squeeze", 32, "random")
    a, b = pictures()
    assert torch.equal(perceptual(a, b), again(a, b)) and perceptual(a, b).shape == (4,)


def test_lpips_may_count_more(perceptual):
    a, b = pictures()
    torch.testing.assert_close(chapter.Perceptual("squeeze", 32, "random", 3.0)(a, b), 3 * perceptual(a, b))


def test_lpips_is_zero_for_equal_pictures_only(perceptual):
    a, b = pictures()
    assert (perceptual(a, a) == 0).all() and (perceptual(a, b) > 0).all()


def test_lpips_is_frozen_and_passes_gradients_to_pictures(perceptual):
    a, b = pictures()
    a.requires_grad_()
    perceptual(a, b).sum().backward()
    assert a.grad.isfinite().all() and a.grad.abs().flatten(1).max(1).values.min() > 0
    assert not any(p.requires_grad or p.grad is not None for p in perceptual.parameters())
    assert not any(m.training for m in perceptual.lpips.modules())


def test_the_target_of_lpips_gets_no_gradient_and_keeps_no_graph(perceptual, monkeypatch):
    """Half of the memory of a step would be its features."""
    made, inner = [], perceptual.features
    monkeypatch.setattr(perceptual, "features", lambda x: made.append((x, inner(x))) or made[-1][1])
    a, b = pictures()
    a.requires_grad_()
    b.requires_grad_()
    perceptual(a, b).sum().backward()
    assert a.grad is not None and b.grad is None
    assert {x is a: any(layer.requires_grad for layer in layers) for x, layers in made} == {True: True, False: False}


@pytest.mark.parametrize("loss", [chapter.lpips_huber, chapter.lpips_huber_divided])
def test_the_prediction_learns_from_lpips(loss, perceptual):
    """At t = 0 the rest of the loss is 0: swapped, so that the picture is measured against it, nothing would learn."""
    x0, x1, v, t = pair_at([0.0, 0.0], size=8)
    v.requires_grad_()
    loss(v, x0, x1, t, perceptual).sum().backward()
    assert v.grad.abs().flatten(1).max(1).values.min() > 0


def test_lpips_has_gradients_of_flat_pictures(perceptual):
    """Black, white, and beyond: features that are all zero must not make NaNs."""
    a, b = pictures(4)
    a = torch.tensor([-1.0, 0.0, 1.0, 30.0])[:, None, None, None].expand_as(b).clone().requires_grad_()
    perceptual(a, b).sum().backward()
    assert a.grad.isfinite().all()


def test_under_autocast_the_backbone_alone_runs_in_bf16(perceptual):
    """Distances stay within a few per cent, gradients point the same way; features are unit vectors in float32."""
    a, b = pictures(8)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x = a.clone().requires_grad_()
            distances, layers = perceptual(x, b), perceptual.features(b)
        assert distances.dtype == torch.float32
        for layer in layers:
            lengths = layer.double().norm(dim=1)
            assert layer.dtype == torch.float32 and (lengths - 1).abs().max() < 1e-6
        found.append((distances.detach(), torch.autograd.grad(distances.sum(), x)[0]))
    (exact, slope), (rough, rough_slope) = found
    assert not torch.equal(exact, rough) and (rough / exact - 1).abs().max() < 0.03
    assert torch.cosine_similarity(slope.flatten(), rough_slope.flatten(), dim=0) > 0.9


def test_lpips_compiles_as_one_graph_and_is_compiled_with_the_network(perceptual, monkeypatch):
    """By choose_recipes, when it is in place; a compiled distance is the same."""
    done = []
    monkeypatch.setattr(chapter, "compile_network", lambda *arguments: done.append(arguments))
    run = Recorder(chapter.Config(compile=True, lpips_weights="random"), 1)
    perceptual_of_run = chapter.choose_recipes(run)["F"][1].keywords["perceptual"]
    assert done == [(perceptual_of_run, run.config)]
    assert perceptual_of_run.lpips.net.slice2[1].squeeze.weight.is_contiguous(memory_format=torch.channels_last)
    a, b = pictures()
    compiled = torch.compile(perceptual, backend="aot_eager", fullgraph=True, dynamic=False)
    found = []
    for network in (perceptual, compiled):
        x = a.clone().requires_grad_()
        distances = network(x, b)
        found.append((distances.detach(), torch.autograd.grad(distances.sum(), x)[0]))
    torch.testing.assert_close(*found)


def torchvision_state(net):
    """A state dict with the names and shapes of torchvision's classifier; the features are random, the rest empty."""
    with torch.device("meta"):
        state = getattr(torchvision.models, net)(weights=None).state_dict()
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator) if name.startswith("features") else torch.zeros(()).expand(
        p.shape) for name, p in state.items()}


NETS = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}


@pytest.fixture
def quick_backbones(monkeypatch):
    """torchvision fills 138 million numbers of VGG's classifier, which nothing here reads: leave them out."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "normal_", "uniform_", "constant_"):
        inner = getattr(nn.init, name)
        monkeypatch.setattr(nn.init, name, lambda tensor, *rest, inner=inner, **options: (
            tensor if tensor.numel() > 3 * 10 ** 6 else inner(tensor, *rest, **options)))


@pytest.mark.parametrize("heads", [False, True], ids=["no heads", "heads"])
@pytest.mark.parametrize("net", NETS)
def test_lpips_is_that_of_the_package_on_upsampled_pictures(net, heads, quick_backbones):
    """Values, and gradients with respect to the first picture."""
    perceptual = chapter.Perceptual(net, 48, "random")
    torch.manual_seed(0)
    with pytest.warns(UserWarning):
        network = lpips.LPIPS(net=net, pnet_rand=True, lpips=heads, verbose=False)
    if heads:
        perceptual.lpips = network.requires_grad_(False)
    a, b = pictures()
    a.requires_grad_()
    large = [nn.functional.interpolate(x, (48, 48), mode="bilinear", align_corners=False) for x in (a, b)]
    found = []
    for distances in (perceptual(a, b), network(*large).flatten()):
        found.append((distances.detach(), torch.autograd.grad(distances.sum(), a)[0]))
    assert found[0][0].min() > 0 and found[0][1].abs().max() > 0
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("net", NETS)
def test_lpips_reads_a_backbone_in_torchvisions_layout(tmp_path, net, quick_backbones):
    state = torchvision_state(NETS[net])
    torch.save(state, tmp_path / "backbone.pth")
    network = chapter.Perceptual(net, 64, str(tmp_path / "backbone.pth")).lpips
    heads = torch.load(Path(lpips.__file__).parent / f"weights/v0.1/{net}.pth", "cpu", weights_only=True)
    assert torch.equal(network.lin0.model[1].weight, heads["lin0.model.1.weight"])      # the package's linear heads
    inside, ours = network.net, dict(network.net.named_parameters())
    assert len(ours) == sum(name.startswith("features") for name in state)
    for name, p in ours.items():
        assert torch.equal(p, state["features." + name.split(".", 1)[1]]), name
    if net == "squeeze":                                            # the slices in a row are torchvision's own features
        whole = torchvision.models.squeezenet1_1(weights=None)
        whole.load_state_dict(state)
        x = pictures()[0].mul(3)
        x = nn.functional.interpolate(x, (64, 64))
        torch.testing.assert_close(inside(x)[-1], whole.features(x))


@pytest.mark.parametrize("content", ["missing", "text", "other network", "ours", "no tensors", "hostile", "folder"])
def test_a_wrong_backbone_is_a_user_error(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "backbone.pth"
    if content == "folder":
        path.mkdir()
    elif content == "text":
        path.write_text("hello")
    elif content != "missing":
        torch.save({"other network": torchvision_state("alexnet"), "ours": tiny_flow().state_dict(), "no tensors": [1],
                    "hostile": Hostile()}.get(content), path)
    with pytest.raises(chapter.UserError) as error:
        chapter.load_lpips("squeeze", str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value) and "--lpips-weights" in str(error.value)
    assert not Path("hacked").exists()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No backbone in the cache and no network."""
    def urlopen(*_, **__):
        raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub" / "checkpoints"
    torch.hub._hub_dir = None


def test_pretrained_lpips_offline_offers_a_way_out(offline):
    with pytest.raises(chapter.UserError, match="--lpips-weights random") as error:
        chapter.Perceptual("squeeze", 32, "pretrained")
    assert "\n" not in str(error.value) and "URLError" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 half a download"])
def test_pretrained_lpips_from_a_broken_download_is_one_line(offline, content):
    offline.mkdir(parents=True)
    (offline / "squeezenet1_1-b8a52dc0.pth").write_bytes(content)
    with pytest.raises(chapter.UserError, match="--lpips-weights") as error:
        chapter.Perceptual("squeeze", 32, "pretrained")
    assert "\n" not in str(error.value)


@pytest.fixture
def timeout():
    """settle_lpips limits how long any connection may take; other tests shall not see that."""
    before = socket.getdefaulttimeout()
    yield
    socket.setdefaulttimeout(before)


@pytest.fixture
def asked_lpips(monkeypatch):
    """asked_lpips(works): what load_lpips is called with from now on; "pretrained" is a random one, or fails."""
    def asked_lpips(works):
        calls, inner = [], chapter.load_lpips

        def load_lpips(net, weights):
            calls.append((net, weights))
            if weights == "pretrained" and not works:
                raise chapter.UserError("no network")
            return inner(net, "random")
        monkeypatch.setattr(chapter, "load_lpips", load_lpips)
        return calls
    return asked_lpips


@pytest.mark.parametrize("works", [True, False])
def test_lpips_is_pretrained_if_it_can_be_had(asked_lpips, monkeypatch, capsys, works):
    """By default.  If it cannot, a line says so; no connection may hang for long, and that limit is only for it."""
    calls, run = asked_lpips(works), types.SimpleNamespace(config=chapter.Config(lpips_net="alex"), rank=0, world=1)
    limits = []
    monkeypatch.setattr(chapter.socket, "setdefaulttimeout", limits.append)
    chapter.settle_lpips(run)
    assert calls == [("alex", "pretrained")] and 0 < limits[0] <= 30 and limits[1:] == [None]
    assert run.config.lpips_weights == ("pretrained" if works else "random")
    out, err = capsys.readouterr()
    assert not err and len(out.splitlines()) == (not works)
    assert not out or "--lpips-weights random" in out


@pytest.mark.parametrize("found", ["pretrained", "random"])
def test_all_processes_take_the_backbone_that_the_first_one_found(asked_lpips, monkeypatch, capsys, found):
    calls, run = asked_lpips(True), types.SimpleNamespace(config=chapter.Config(), rank=1, world=2)
    monkeypatch.setattr(chapter.dist, "broadcast_object_list", lambda words: words.__setitem__(0, found))
    chapter.settle_lpips(run)
    assert run.config.lpips_weights == found and not calls and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("weights", ["pretrained", "random", "backbone.pth"])
def test_lpips_is_what_is_asked_for(asked_lpips, timeout, capsys, weights):
    calls, run = asked_lpips(False), types.SimpleNamespace(config=chapter.Config(lpips_weights=weights), rank=0)
    chapter.settle_lpips(run)
    assert run.config.lpips_weights == weights and not calls and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("net", NETS)
def test_the_least_size_that_settings_allow_works(net, quick_backbones):
    low, _ = typing.get_type_hints(chapter.Config, include_extras=True)["lpips_size"].__metadata__
    network = chapter.Perceptual(net, low, "random")
    assert network(*pictures(2)).shape == (2,)


# ---- NVIDIA's pickles ------------------------------------------------------------------------------------------------


class Persistent:
    """Pickles like an object of NVIDIA's "persistent" classes: a call with the class's source and the state."""

    def __init__(self, kind, **state):
        self.kind, self.state = kind, state

    def __reduce_ex__(self, protocol):
        meta = dict(type="class", version=6, module_src="raise SystemExit('executed')", class_name=self.kind,
                    state=self.state)
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


class EasyDict(dict):
    """dnnlib's dictionary."""


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"


@contextlib.contextmanager
def foreign_modules():
    """torch_utils and dnnlib exist while pickling, and only then."""
    def _reconstruct_persistent_obj(meta):
        raise AssertionError("executed")
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    names = "torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"
    made = {name: types.ModuleType(name) for name in names}
    made["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    made["dnnlib.util"].EasyDict = EasyDict
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def state_of(parameters=(), buffers=(), modules=()):
    """The attributes that every nn.Module pickles."""
    return dict(training=False, _parameters=OrderedDict(parameters), _buffers=OrderedDict(buffers),
                _non_persistent_buffers_set=set(), _backward_hooks=OrderedDict(), _is_full_backward_hook=None,
                _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict(), _modules=OrderedDict(modules))


def persistent(module, resampled=False):
    """One of our modules as NVIDIA's code would have pickled it: its own classes, but torch's ModuleDict."""
    if isinstance(module, nn.ModuleDict):
        result = nn.ModuleDict()
        result._modules = OrderedDict((name, persistent(child)) for name, child in module.items())
        return result
    children = {name: persistent(child, resampled=name in ("conv0", "skip") and not isinstance(
        getattr(module, "resample", nn.Identity()), nn.Identity)) for name, child in module.named_children()
        if list(child.parameters())}
    kind = {"UNet": "SongUNet"}.get(type(module).__name__, type(module).__name__)
    buffers = {"resample_filter": torch.full((1, 1, 2, 2), 0.25) if resampled else None} if kind == "Conv2d" else {}
    return Persistent(kind, **state_of(module._parameters, buffers, children), init_mode="xavier_uniform", eps=1e-6)


def edm_pickle(unet, protocol=4):
    """The bytes of a file like edm-cifar10-32x32-*-vp.pkl with these weights in it."""
    model = persistent(unet)
    model.state["_modules"]["map_noise"] = Persistent("PositionalEmbedding", **state_of(), num_channels=4)
    weight = nn.Parameter(torch.ones(unet.map_layer0.in_features, 9))
    model.state["_modules"]["map_augment"] = Persistent("Linear", **state_of({"weight": weight, "bias": None}))
    ema = Persistent("EDMPrecond", **state_of(modules={"model": model}), img_resolution=8, sigma_data=0.5)
    content = dict(ema=ema, loss_fn=Persistent("EDMLoss", P_mean=-1.2),
                   augment_pipe=Persistent("AugmentPipe", **state_of(buffers={"Hz_fbank": torch.ones(3)}), xflip=1.0),
                   dataset_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset", path="cifar10.zip"))
    with foreign_modules():
        return pickle.dumps(content, protocol)


def load_edm(path, classes=0):
    """What a tiny run makes of a file of NVIDIA's."""
    return chapter.load_edm(str(path), Recorder(tiny_config(), 4), 3, classes)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("classes", [0, 4])
def test_nvidias_pickle_holds_our_network(tmp_path, protocol, classes):
    """Its names and numbers are those of our UNet, so it loads strictly; filters and augmentation are left out."""
    flow = tiny_flow(classes)
    (tmp_path / "edm.pkl").write_bytes(edm_pickle(flow.model, protocol))
    loaded, expected = load_edm(tmp_path / "edm.pkl", classes), flow.state_dict()
    got = loaded.state_dict()
    assert set(got) == set(expected) and all(torch.equal(got[name], expected[name]) for name in expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    labels = torch.tensor([1, 3]) if classes else None
    flow = chapter.place(flow, CPU)                        # the same memory layout: the same roundings
    assert torch.equal(loaded(x, t, labels), flow(x, t, labels)) and not loaded.training


def test_half_precision_becomes_float32(tmp_path):
    flow = tiny_flow().half()
    (tmp_path / "edm.pkl").write_bytes(edm_pickle(flow.model))
    got, expected = load_edm(tmp_path / "edm.pkl").state_dict(), flow.state_dict()
    assert all(p.dtype == torch.float32 and torch.equal(p, expected[name].float()) for name, p in got.items())


class Hostile:
    """Pickles as a call that leaves a file."""

    def __init__(self, *call):
        self.call = call or (os.system, "echo > hacked")

    def __reduce__(self):
        return self.call[0], self.call[1:]


class HostileState:
    """Builds an innocent object with a state that is hostile."""

    def __reduce__(self):
        return OrderedDict, (), Hostile()


class HostileItems:
    """Likewise with items."""

    def __reduce__(self):
        return OrderedDict, (), None, None, iter([("x", Hostile())])


def storage_bytes(zipped):
    """What stands in for a tensor's numbers: a file of torch with a call in it."""
    file = io.BytesIO()
    torch.save(Hostile(), file, _use_new_zipfile_serialization=zipped)
    return Hostile(torch.storage._load_from_bytes, file.getvalue())


def in_ema(content):
    """Deep inside what else looks like a network."""
    return dict(ema=Persistent("EDMPrecond", **state_of({"weight": content})))


ATTACKS = {
    "system": lambda: pickle.dumps(Hostile()),
    "system in the network": lambda: pickle.dumps(in_ema(Hostile())),
    "eval": lambda: pickle.dumps(in_ema(Hostile(builtins.eval, "open('hacked', 'w')"))),
    "exec": lambda: pickle.dumps(in_ema(Hostile(builtins.exec, "open('hacked', 'w')"))),
    "open": lambda: pickle.dumps(in_ema(Hostile(open, "hacked", "w"))),
    "write_text": lambda: pickle.dumps(in_ema(Hostile(Path.write_text, Path("hacked"), "x"))),
    "a state": lambda: pickle.dumps(in_ema(HostileState())),
    "items": lambda: pickle.dumps(in_ema(HostileItems())),
    "a tensor's storage": lambda: pickle.dumps(in_ema(storage_bytes(False))),
    "a tensor's storage, zipped": lambda: pickle.dumps(in_ema(storage_bytes(True))),
    "torch.load": lambda: pickle.dumps(in_ema(Hostile(partial(torch.load, weights_only=False), "inner.pt"))),
    "GLOBAL": lambda: b"cos\nsystem\n(S'echo > hacked'\ntR.",
    "GLOBAL in old names": lambda: b"c__builtin__\neval\n(S'open(\"hacked\", \"w\")'\ntR.",
    "STACK_GLOBAL": lambda: b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0decho > hacked\x85R.",
    "INST": lambda: b"(S'echo > hacked'\nios\nsystem\n.",
    "OBJ": lambda: b"(cos\nsystem\nS'echo > hacked'\no.",
    "a dotted name": lambda: b"\x80\x04\x8c\x0ctorch._utils\x8c\x11warnings.sys.exit\x93)R.",
    "BUILD": lambda: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}(X\x08\x00\x00\x00__code__cos\nsystem\nu\x86b.",
    "a hook of a module": lambda: pickle.dumps(dict(ema=Persistent("EDMPrecond", **state_of() | dict(
        _state_dict_hooks={0: os.system}, _state_dict_pre_hooks={0: Hostile()}, state_dict=Hostile())))),
    "a class that is called late": lambda: pickle.dumps(dict(ema=Persistent("EDMPrecond", **state_of(
        modules={"a": Hostile(builtins.eval, "open('hacked', 'w')")})))),
    "a reference outside": lambda: b"\x80\x02X\x06\x00\x00\x00hackedQ.",
}
HARMLESS = {"a dotted name", "BUILD", "a reference outside"}        # to pickle itself, too


@pytest.fixture
def attack(tmp_path, monkeypatch):
    """attack(name): the path of a hostile file, in an empty folder where a success would leave a file `hacked`."""
    monkeypatch.chdir(tmp_path)

    def attack(name):
        torch.save(Hostile(), "inner.pt")
        with foreign_modules():
            Path("hostile.pkl").write_bytes(ATTACKS[name]())
        return "hostile.pkl"
    return attack


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_pickle_runs_nothing(attack, name):
    """One line, and no file.  (Read by pickle itself, it would have left one: that is checked too.)"""
    path = attack(name)
    with pytest.raises(chapter.UserError, match="--teacher hostile.pkl") as error:
        load_edm(path)
    assert len(str(error.value).splitlines()) == 1 and not Path("hacked").exists()
    if name not in HARMLESS:
        with contextlib.suppress(Exception), foreign_modules():
            pickle.loads(Path(path).read_bytes())
        assert Path("hacked").exists()


def test_a_broken_pickle_is_a_user_error(tmp_path):
    whole = edm_pickle(tiny_flow().model)
    for content in (b"", b"hello", whole[:100], whole[:-1], whole[:len(whole) // 2], whole[::-1], bytes(1000),
                    pickle.dumps(3), pickle.dumps({"ema": None}), pickle.dumps({"ema": {"_parameters": 1}}),
                    pickle.dumps({"g": 1})):
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(chapter.UserError, match="x.pkl") as error:
            load_edm(tmp_path / "x.pkl")
        assert "\n" not in str(error.value)
    with pytest.raises(chapter.UserError, match="y.pkl.*FileNotFoundError"):
        load_edm(tmp_path / "y.pkl")


def test_a_pickle_that_contains_itself_is_a_user_error(tmp_path):
    module = nn.ModuleDict()
    module._modules["again"] = module
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": module}))
    with pytest.raises(chapter.UserError, match="x.pkl"):
        load_edm(tmp_path / "x.pkl")


# ---- Noise of real pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3])
def test_real_pictures_are_inverted_by_their_labels(steps):
    """In as many Heun steps as are set for that, whatever number makes the pairs."""
    images, labels = chapter.shapes(20, 8)[0], torch.arange(20) % 3
    run = Recorder(chapter.Config(shard=8, pair_steps=7, invert_steps=steps, invert_noise=0.0, real_pairs=18), 1)
    for classes in (0, 3):
        velocity = Straight(classes)
        data = images, labels if classes else None, []
        noise, x1, own = chapter.invert_pictures(velocity, data, run)
        assert noise.dtype == torch.float16 and noise.shape == (18, 3, 8, 8) and x1 is images and own is data[1]
        torch.testing.assert_close(noise.float(), chapter.to_floats(images[:18]) / 0.3, rtol=2e-3, atol=2e-3)
        assert len(velocity.labels) == 3 * 2 * steps
        if classes:
            assert torch.equal(torch.cat(velocity.labels[::2 * steps]), labels[:18])
        else:
            assert velocity.labels == [None] * 6 * steps


def test_the_noise_mixed_in_before_inverting_depends_on_the_seed_alone():
    """So a run that goes on inverts to the same noise as before."""
    images, made = chapter.shapes(20, 8)[0], []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        run = Recorder(chapter.Config(shard=8, invert_steps=2, invert_noise=0.1, seed=seed), 1)
        made.append(chapter.invert_pictures(Straight(), (images, None, []), run)[0])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    mixed = made[0].float() * (0.1 + 0.9 * 0.3) - 0.9 * chapter.to_floats(images)          # the noise by itself
    assert mixed.std() == pytest.approx(0.1, rel=0.1) and not torch.allclose(mixed[:8], mixed[8:16])


# ---- Whole runs ------------------------------------------------------------------------------------------------------


here, run, finished = fixtures(NAME, [*TINY, "--configs", *"ABCDEFG"], figures=["draw_samples"])


@pytest.fixture
def unmeasured(monkeypatch):
    """Runs inside this process end with their last stage."""
    monkeypatch.setattr(chapter, "report", lambda *arguments: None)


def expected_rows(*stages):
    """Two log lines for a student, one for G, three for the teacher; by the names of the files."""
    ends = {"t": 6, "G": 2}
    return [(stage, str(step)) for stage in sorted(stages) for step in range(2, ends.get(stage[0], 4) + 1, 2)]


def pair_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "pairs" / "2-rf").iterdir()}


@pytest.fixture
def starts(monkeypatch):
    """The weights that each stage starts from, by its name."""
    starts, inner = {}, chapter.Run.fit

    def fit(self, name, model, *rest, **changes):
        starts[name] = torch.cat([p.flatten() for p in model.state_dict().values()])
        return inner(self, name, model, *rest, **changes)
    monkeypatch.setattr(chapter.Run, "fit", fit)
    return starts


LADDER = [f"{name}-0" for name in "ABCDEFG"]


def test_a_run_leaves_exactly_its_files(finished):
    folder, out = finished
    stages = {f"{name}{end}" for name in ["teacher", *LADDER] for end in (".pt", ".csv")}
    assert {path.name for path in folder.iterdir()} == stages | {"run.json", "pairs", "results.json"} | FIGURES
    assert set(pair_files(folder)) == {"00000.pt", "00001.pt", "00002.pt"}
    assert log_rows(folder) == expected_rows("teacher", *LADDER)
    assert "random, untrained backbone" in out and "Frechet distance of seeded random features" in out
    for name in FIGURES:
        with Image.open(folder / name) as image:
            image.load()
            assert min(image.size) >= 250 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_every_configuration_made_another_network(finished):
    found = [weights(finished.folder / f"{name}.pt") for name in ["teacher", *LADDER]]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(found, 2))
    content = torch.load(finished.folder / "A-0.pt", weights_only=True)
    assert content["model"]["model.map_label.weight"].shape[1] == CLASSES


def test_results_hold_every_number(finished):
    results = json.loads((finished.folder / "results.json").read_text())
    assert "24 samples" in results["distance"]
    assert list(results["configurations"]) == ["teacher", *"ABCDEFG"]
    for row, in results["configurations"].values():
        assert list(row["FD"]) == ["1", "2", "4", "4 new"] and len(row["error_by_t"]) == 5
        assert list(row["mse"]) == ["1", "2", "4", "8"] and 50 < row["z2"] < 800
        assert list(row["accuracy"]) == list(row["FD"])
        assert all(share * 24 in range(25) for share in row["accuracy"].values())
        numbers = [*row["FD"].values(), row["S"], *row["error_by_t"], *row["mse"].values()]
        assert all(math.isfinite(x) and x > 0 for x in numbers)
        assert f"{row['FD']['1']:9.3f}" in finished.out and f"{row['S']:9.2f}" in finished.out
        assert f"{row['mse']['8']:10.3f}{row['z2']:9.0f}" in finished.out
    below = finished.out.split("accuracy: share", 1)[1].splitlines()[1:9]       # a line for each network
    for (name, (row,)), line in zip(results["configurations"].items(), below, strict=True):
        assert line.split() == [name, *(f"{share:.3f}" for share in row["accuracy"].values()), "-"]


def test_a_finished_run_is_measured_again_but_not_trained_again(finished, run, here, monkeypatch):
    folder = copy_run(finished, here)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("learning_rate", "make_pairs"):            # which every step and every shard call
        monkeypatch.setattr(chapter, name, None)
    code, out, err = run(*TINY, "--configs", *"ABCDEFG")
    assert code == 0, err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_students_start_from_the_teacher_and_g_from_f(run, here, unmeasured, starts):
    assert run(*TINY, "--configs", "A", "G", "--seeds", 2, "--out", "run")[0] == 0
    sources = dict(A="teacher", F="teacher", G="F-{}")
    for name, seed in itertools.product("AFG", range(2)):
        assert torch.equal(starts[f"{name}-{seed}"], weights(here / "run" / f"{sources[name].format(seed)}.pt"))


def test_more_seeds_and_the_whole_ladder_continue_a_run(run, here, monkeypatch):
    """--seeds and --ablate may be added later; seeds share teacher and pairs and differ in all they draw."""
    args = [*TINY, "--configs", "A", "--out", "run"]
    assert run(*args)[0] == 0
    before = weights(here / "run" / "A-0.pt")
    code, out, err = run(*args, "--seeds", 2)
    assert code == 0, err
    assert log_rows(here / "run") == expected_rows("teacher", "A-0", "A-1")
    assert torch.equal(weights(here / "run" / "A-0.pt"), before)
    assert not torch.equal(weights(here / "run" / "A-1.pt"), before)
    results = json.loads((here / "run" / "results.json").read_text())["configurations"]
    first, second = (row["FD"]["1"] for row in results["A"])
    assert f"{(first + second) / 2:9.3f}" in out and f"{abs(first - second) / 2 ** 0.5:11.3f}" in out
    monkeypatch.setattr(chapter, "report", lambda *arguments: None)
    code, out, err = run(*args, "--ablate")
    assert code == 0, err
    assert log_rows(here / "run") == expected_rows("teacher", "A-0", "A-1", "C-0", "D-0", "E-0", "F-0", "G-0")
    assert not (here / "run" / "B-0.pt").exists()


def test_without_labels_by_edms_sampler_with_larger_batches(run, here, monkeypatch):
    """B's batch is twice A's, and that of everything after."""
    sizes, inner = {}, chapter.train
    monkeypatch.setattr(chapter, "train", lambda model, loss_fn, config, *rest: (
        sizes.update({rest[0]: (config.batch, len(loss_fn(lambda x, *_: x, None, 0)))})
        or inner(model, loss_fn, config, *rest)))
    code, out, err = run(*TINY, "--no-conditional", "--pair-solver", "edm", "--big-batch", 2, "--out", "run",
                         "--configs", "A", "B", "G")
    assert code == 0, err
    assert "accuracy" not in out and "accuracy" not in (here / "run" / "results.json").read_text()      # nothing asked
    assert sizes == {1: (4, 4), 100: (4, 4), 101: (8, 8), 105: (8, 8), 106: (8, 8)}
    assert log_rows(here / "run") == expected_rows("teacher", "A-0", "B-0", "F-0", "G-0")
    assert not any("map_label" in name for name in torch.load(here / "run" / "G-0.pt", weights_only=True)["model"])


def test_a_handful_of_pictures_and_samples_still_makes_figures(run, here, monkeypatch):
    """Fewer than a strip is long by default: all strips of a figure are as long as there is something to show."""
    (here / "photos" / "greys").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i,) * 3).save(here / "photos" / "greys" / f"{i}.png")
    figures = []
    monkeypatch.setattr(chapter, "draw_samples", lambda strips, *rest: figures.append(list(map(len, strips.values()))))
    code, out, err = run(*TINY, "--configs", "A", "--data", "photos", "--eval-size", 3, "--out", "run")
    assert code == 0, err
    assert sorted(set(map(tuple, map(set, figures)))) == [(2,), (4,)]           # every fifth noise; pictures there are
    assert "accuracy" not in out and "accuracy" not in (here / "run" / "results.json").read_text()      # no shapes


def test_pairs_are_made_by_the_solver_that_is_asked_for(finished, run, here):
    edm = chapter.sample(*asked(finished, "edm", 3))
    heun = chapter.sample(*asked(finished, "heun", 3))
    stored = chapter.load_checkpoint(finished.folder / "pairs" / "2-rf" / "00001.pt")["z1"].int()
    assert (chapter.to_bytes(heun) - stored).abs().max() <= 1
    assert (chapter.to_bytes(edm) - stored).abs().max() > 1


def asked(finished, method, steps):
    """What sample is called with for the second shard."""
    flow = chapter.load_flow(finished.folder / "teacher.pt", Recorder(tiny_config(), 4), 3, CLASSES)
    index = torch.arange(8, 16)
    return (chapter.Velocity(flow, tiny_config()), chapter.pair_noise(chapter.seed_for(0, 2), index, (3, 8, 8)), index,
            steps, method)


def test_chapter_2s_flow_is_a_teacher(run, here, unmeasured, monkeypatch, starts):
    """Its 1-rf.pt is read, not trained; it makes the pairs, and students start from it."""
    second = load("02_reflow")
    monkeypatch.setattr(second, "report", lambda *arguments: None)
    same_network = "--data-size 64 --channels 4 --image-size 8 --mult 1 1 --attention 4 --conditional".split()
    code, _, err = run(*same_network, "--rounds", 1, "--steps", 6, "--batch", 4, "--device", "cpu", "--out", "two",
                       script=second)
    assert code == 0, err
    code, _, err = run(*TINY, "--configs", "A", "--teacher", "two/1-rf.pt", "--out", "three")
    assert code == 0, err
    assert torch.equal(weights(here / "two" / "1-rf.pt"), starts["A-0"]) and list(starts) == ["A-0"]
    assert log_rows(here / "three") == expected_rows("A-0") and not (here / "three" / "teacher.pt").exists()
    assert not torch.equal(weights(here / "three" / "A-0.pt"), starts["A-0"])
    config = tiny_config()
    flow = chapter.load_flow(here / "two" / "1-rf.pt", Recorder(config, 4), 3, CLASSES)
    _, z1 = chapter.make_pairs(chapter.Velocity(flow, config), chapter.seed_for(0, 2), torch.arange(8), config)
    stored = chapter.load_checkpoint(here / "three" / "pairs" / "2-rf" / "00000.pt")["z1"]
    assert torch.equal(chapter.to_bytes(z1), stored)


SECOND = Path("runs", "02_reflow", "quick", "1-rf.pt")      # where chapter 2 leaves its network, in this folder


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """The 1-RF of a run of chapter 2, with what settings it shares with this chapter's tiny ones."""
    return networks_of_chapter_2(tmp_path_factory.mktemp("second"), *SHARED, "--rounds", 1) / SECOND.name


@pytest.fixture
def beside(second, here):
    """The present folder holds chapter 2's run, too."""
    SECOND.parent.mkdir(parents=True)
    SECOND.write_bytes(second.read_bytes())


def found(**changes):
    """What chapter_2 finds for the tiny settings with these changes."""
    return chapter.chapter_2(Recorder(dataclasses.replace(tiny_config(), **changes), 4), "1-rf")


def test_the_teacher_trained_here_is_chapter_2s_bit_for_bit(finished, second):
    assert torch.equal(weights(finished.folder / "teacher.pt"), weights(second))


def test_chapter_2s_network_spares_a_teacher(finished, run, here, unmeasured, starts, beside):
    """And everything after is as if it had been trained here."""
    code, _, err = run(*TINY, "--configs", "A")
    assert code == 0, err
    folder = here / "runs" / NAME / "quick"
    assert list(starts) == ["A-0"] and torch.equal(starts["A-0"], weights(SECOND))
    assert log_rows(folder) == expected_rows("A-0") and not (folder / "teacher.pt").exists()
    assert same_weights(folder, finished.folder, "A-0") and pair_files(folder) == pair_files(finished.folder)


def test_a_teacher_that_is_given_goes_before_chapter_2s(run, here, unmeasured, starts, beside):
    """As does one of this run's own, if chapter 2's had other settings."""
    flow = chapter.Flow(tiny_config(), 3, CLASSES)
    chapter.save_checkpoint(here / "mine.pt", config=dataclasses.asdict(tiny_config()), model=flow.state_dict())
    code, _, err = run(*TINY, "--configs", "A", "--teacher", "mine.pt", "--out", "given")
    assert code == 0, err
    assert torch.equal(starts.pop("A-0"), weights(here / "mine.pt"))
    code, _, err = run(*TINY, "--configs", "A", "--seed", 1, "--out", "own")
    assert code == 0, err
    assert torch.equal(starts["A-0"], weights(here / "own" / "teacher.pt"))
    assert not torch.equal(starts["A-0"], weights(SECOND))


OTHER = dict(data="photos", data_size=65, image_size=16, conditional=False, steps=7, batch=8, accumulate=2, channels=8,
             mult=[1], blocks=2, attention=[8], dropout=0.1, lr=1e-3, lr_decay="constant", warmup=49, grad_clip=2.0,
             ema_decay=0.9, pairs=25, pair_solver="euler", pair_steps=4, seed=1, preset="gpu")


@pytest.mark.parametrize("name", OTHER)
def test_chapter_2s_network_of_other_settings_is_not_taken(beside, name):
    assert found() == str(SECOND) and found(**{name: OTHER[name]}) == ""


def test_chapter_2s_network_is_taken_whatever_else_is_set(beside):
    """What comes after it, and what may change between two runs; a tuple is as good as a list."""
    assert found(reflow_steps=5, real_pairs=7, lpips_weight=2.0, invert_steps=9, eval_size=30, log_every=1,
                 configs=("G",), seeds=3, mult=(1, 1)) == str(SECOND)


def test_chapter_2s_network_is_taken_only_if_it_is_finished(beside):
    assert found() == str(SECOND)
    content = chapter.load_checkpoint(SECOND)
    chapter.save_checkpoint(SECOND, **content, optimizer={})
    assert found() == ""
    del content["config"]["seed"]                           # made before there was such a setting
    chapter.save_checkpoint(SECOND, **content)
    assert found() == ""
    SECOND.unlink()
    assert found() == ""


def test_chapter_2s_network_is_taken_for_the_same_pictures_alone(beside):
    """Of the same names and sizes, that is, wherever the folder is said to be."""
    content = chapter.load_checkpoint(SECOND)
    content["config"] |= {"data": "photos", "pictures": "sha256:1"}
    chapter.save_checkpoint(SECOND, **content)
    recorder = Recorder(dataclasses.replace(tiny_config(), data=f"{Path.cwd()}/photos/"), 4)
    for pictures, path in (("sha256:1", str(SECOND)), ("sha256:2", "")):
        recorder.inputs = {"pictures": pictures}
        assert chapter.chapter_2(recorder, "1-rf") == path


@pytest.mark.parametrize("given", [[], ["--teacher", "./" + str(SECOND)]], ids=["chapter 2's", "given"])
def test_a_teacher_that_has_been_replaced_is_not_gone_on_with(run, here, unmeasured, beside, given):
    args = [*TINY, "--configs", "A", *given]
    for _ in range(2):
        code, _, err = run(*args)
        assert code == 0, err
    content = chapter.load_checkpoint(SECOND)
    chapter.save_checkpoint(SECOND, **content | {"log": ["trained again, to the same end"]})
    assert run(*args)[0] == 0
    content["model"]["model.map_layer0.bias"] += 1e-3
    chapter.save_checkpoint(SECOND, **content)
    code, _, err = run(*args)
    assert code == 2
    one_line(err, "teacher_weights=")


def test_chapter_2s_defaults_are_those_of_this_chapter(here):
    SECOND.parent.mkdir(parents=True)
    chapter.save_checkpoint(SECOND, config=dataclasses.asdict(load("02_reflow").Config()), model={})
    assert chapter.chapter_2(Recorder(chapter.Config(), 32), "1-rf") == str(SECOND)


def test_nvidias_file_is_a_teacher(run, here, unmeasured, starts):
    (here / "edm.pkl").write_bytes(edm_pickle(tiny_flow(CLASSES).model))
    code, _, err = run(*TINY, "--configs", "A", "--teacher", "edm.pkl", "--pair-solver", "edm", "--out", "run")
    assert code == 0, err
    assert torch.equal(starts["A-0"], torch.cat([p.flatten() for p in tiny_flow(CLASSES).state_dict().values()]))


@pytest.mark.parametrize("args", [["--channels", 8], ["--blocks", 2], ["--mult", 1], ["--attention", 8],
                                  ["--no-conditional"]], ids=str)
def test_nvidias_file_of_another_shape_names_the_flags(run, here, args):
    (here / "edm.pkl").write_bytes(edm_pickle(tiny_flow(CLASSES).model))
    code, _, err = run(*TINY, "--teacher", "edm.pkl", "--out", "new/run", *args)
    assert code == 2 and not (here / "new").exists()
    one_line(err, "edm.pkl", "--channels", "--mult", "--blocks", "--attention", "--conditional")


BAD = {
    "unknown configuration": (["--configs", "A", "X"], ["--configs", "'X'"]),
    "no factor": (["--lpips-weight", -1], ["--lpips-weight -1"]),
    "much noise": (["--invert-noise", 0.6], ["--invert-noise 0.6"]),
    "no seeds": (["--seeds", 0], ["--seeds 0"]),
    "no real pairs": (["--real-pairs", 0], ["--real-pairs 0"]),
    "unknown solver": (["--pair-solver", "new"], ["--pair-solver"]),
    "unknown backbone": (["--lpips-net", "resnet"], ["--lpips-net"]),
    "small backbone": (["--lpips-size", 4], ["--lpips-size 4"]),
    "no backbone": (["--lpips-weights", "missing.pth"], ["--lpips-weights missing.pth"]),
    "broken backbone": (["--lpips-weights", "hostile.pkl"], ["--lpips-weights hostile.pkl"]),
    "no teacher": (["--teacher", "missing.pt"], ["missing.pt"]),
    "no teacher of NVIDIA's": (["--teacher", "missing.pkl"], ["--teacher missing.pkl"]),
    "neither teacher nor data": (["--teacher", "missing.pt", "--data", "cifar10", "--data-dir", "here"], ["missing.pt"]),
    "a hostile teacher": (["--teacher", "hostile.pkl"], ["--teacher hostile.pkl"]),
    "a hostile checkpoint": (["--teacher", "inner.pt"], ["inner.pt"]),
    "no such folder": (["--data", "nowhere"], ["nowhere"]),
    "no CIFAR-10": (["--data", "cifar10", "--data-dir", "somewhere"], ["somewhere", "--download"]),
    "no Inception network": (["--fid", "--data-dir", "somewhere"], ["somewhere", "--download"]),
    "one shape": (["--data-size", 1], []),
    "size 12": (["--image-size", 12], ["image-size", "12"]),
    "too many levels": (["--mult", 1, 1, 1, 1, 1], ["mult"]),
    "6 channels": (["--channels", 6], ["channels"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_and_leaves_no_run(run, here, attack, name):
    attack("system in the network")
    args, words = BAD[name]
    code, _, err = run(*TINY, *args, "--out", "new/run")
    assert code == 2
    one_line(err, *words)
    assert not (here / "new").exists() and not (here / "hacked").exists() and not (here / "runs").exists()


def test_pretrained_lpips_without_a_network_is_one_line(run, here, offline):
    code, _, err = run(*TINY, "--lpips-weights", "pretrained", "--out", "new/run")
    assert code == 2 and not (here / "new").exists()
    one_line(err, "--lpips-weights random")


def test_a_run_offline_has_a_random_lpips_and_says_so(run, here, unmeasured, timeout, offline):
    """Its record tells which; so the same command goes on, and an explicit random is the same run."""
    args = [*TINY, "--configs", "F", "--out", "run"]
    code, out, err = run(*args, "--lpips-weights", "auto")
    assert code == 0 and out.count("--lpips-weights random") == 1, err
    assert json.loads((here / "run" / "run.json").read_text())["settings"]["lpips_weights"] == "random"
    for weights in ("auto", "random"):
        code, _, err = run(*args, "--lpips-weights", weights)
        assert code == 0, err


def test_a_run_that_finds_a_backbone_records_it(run, here, unmeasured, timeout, asked_lpips):
    calls = asked_lpips(True)
    code, out, err = run(*TINY, "--configs", "F", "--out", "run", "--lpips-weights", "auto")
    assert code == 0 and "--lpips-weights" not in out, err
    assert json.loads((here / "run" / "run.json").read_text())["settings"]["lpips_weights"] == "pretrained"
    assert set(calls) == {("squeeze", "pretrained")}


def test_lpips_is_not_needed_without_its_configurations(run, here, unmeasured, offline):
    code, _, err = run(*TINY, "--lpips-weights", "pretrained", "--configs", "C", "--out", "run")
    assert code == 0, err


def test_other_settings_do_not_continue_a_run(finished, run, here):
    folder = copy_run(finished, here)
    for flag, value, word in [("--lpips-weight", 2, "lpips_weight=1.0"), ("--real-pairs", 8, "real_pairs=16"),
                              ("--lr", 1, "lr=0.006")]:
        code, _, err = run(*TINY, "--configs", *"ABCDEFG", flag, value)
        assert code == 2
        one_line(err, word, "--fresh")
    assert same_weights(folder, finished.folder, "teacher", *LADDER)


@pytest.mark.parametrize("lr", ["1e30", "1e3"])
def test_an_absurd_learning_rate_is_no_traceback(here, monkeypatch, capsys, lr):
    """A teacher or student that is not finite, or finite but absurd; the figures are drawn, if it comes to that."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    code = call(chapter, *TINY, "--configs", "A", "--lr", lr, "--warmup", 0, "--lr-decay", "constant",
                patch=monkeypatch)
    err = capsys.readouterr().err
    assert "Traceback" not in err and code in ((2,) if lr == "1e30" else (0, 2))
    assert not code or "--lr" in err


# ---- Kills, stops, several processes ---------------------------------------------------------------------------------

def test_killed_in_a_middle_stage_and_rerun_gives_the_same_bits(finished, run, here, unmeasured):
    """kill -9 within a shard of pairs, before a checkpoint of F, and right after its last one."""
    folder, args = here / "runs" / NAME / "quick", [*TINY, "--configs", "C", "G"]
    for spy, step in [(kill_in_shard(2), None), (kill_after_row("F-0", 4), 2), (kill_after_row("F-0", 4, "after"), 4)]:
        code = driver(NAME, spy)
        result = subprocess.run([sys.executable, "-c", code, *args], cwd=here, capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, result.stderr
        if step:
            assert chapter.load_checkpoint(folder / "F-0.pt")["step"] == step
    assert not (folder / "G-0.pt").exists()
    code, _, err = run(*args)
    assert code == 0, err
    assert same_weights(folder, finished.folder, "teacher", "C-0", "F-0", "G-0")
    assert pair_files(folder) == pair_files(finished.folder)
    assert log_rows(folder) == expected_rows("teacher", "C-0", "F-0", "G-0") and not list(folder.rglob("*part*"))


def test_sigterm_in_a_middle_stage_saves_its_step(finished, run, here, unmeasured, monkeypatch):
    """A stop in step 3 of F, then the same command again: as if nothing had been."""
    folder, calls = copy_run(finished, here, "F-0.pt", "G-0.pt"), []

    def stopping(*arguments, **options):
        calls.append(signal.raise_signal(signal.SIGTERM) if len(calls) == 2 else None)
        return chapter.lpips_huber_divided(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setitem(chapter.LADDER, "F", (chapter.u_shaped_times, stopping))
        patch.setattr(chapter, "STOP", [])
        code, _, err = run(*TINY, "--configs", *"ABCDEFG")
    assert code == 130 and err.strip().splitlines()[-1].startswith("stopped")
    assert chapter.load_checkpoint(folder / "F-0.pt")["step"] == 3
    assert run(*TINY, "--configs", *"ABCDEFG")[0] == 0
    assert same_weights(folder, finished.folder, "F-0", "G-0")


def test_two_processes_make_a_whole_run(here):
    """To the end, with one table and the files of one process."""
    (here / "script.py").write_text(driver(NAME))
    result = torchrun("script.py", *TINY, "--configs", "A", "G", "--out", "run", cwd=here)
    assert result.returncode == 0, result.stderr
    assert FIGURES | {"A-0.pt", "F-0.pt", "G-0.pt", "teacher.pt"} <= {path.name for path in (here / "run").iterdir()}
    assert log_rows(here / "run") == expected_rows("teacher", "A-0", "F-0", "G-0")
    assert result.stdout.count("error by t") == 1 and len(pair_files(here / "run")) == 3


def test_two_processes_share_a_given_teacher(finished, here):
    (here / "script.py").write_text(driver(NAME, "chapter.report = lambda *arguments: None"))
    teacher = finished.folder / "teacher.pt"
    result = torchrun("script.py", *TINY, "--configs", "A", "--teacher", teacher, "--out", "run", cwd=here)
    assert result.returncode == 0, result.stderr
    assert log_rows(here / "run") == expected_rows("A-0") and pair_files(here / "run") == pair_files(finished.folder)
