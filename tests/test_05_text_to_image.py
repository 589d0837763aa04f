"""Chapter 5: the method against closed forms and diffusers, stages that resume, whole tiny runs, `sample`, `evaluate`.

The networks themselves have tests of their own (test_05_networks.py).  diffusers and transformers are references here:
the chapter does without them.
"""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load
from PIL import Image
from torch import nn

NAME = "05_text_to_image"
chapter = load(NAME)
TINY = ("--data-size 64 --vae-steps 4 --steps 4 --reflow-steps 4 --distill-steps 4 2 --pairs 12 --shard 8 "
        "--eval-size 16 --solver-steps 3 --distill-solver-steps 2 --vae-channels 4 4 --channels 4 8 --heads 2 "
        "--text-width 8 --batch 4 --reflow-batch 4 --distill-batch 4 4 --image-size 16 --log-every 2 "
        "--checkpoint-every 2 --device cpu").split()
NETWORKS = {"teacher", "2-rf-0", "distilled-0", "direct-0"}
CPU = torch.device("cpu")
close = partial(torch.testing.assert_close, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance, clock and losses
# ----------------------------------------------------------------------------------------------------------------------


def texts(n, seed=0):
    """States of n texts and of the empty one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, 3, generator=generator), torch.randn(1, 5, 3, generator=generator)


def some_field(x, t, text):
    """Anything smooth that depends on all three."""
    return torch.sin(3 * x + t[:, None]) + text.mean((1, 2))[:, None] * torch.cos(x)


def test_guidance_is_affine_in_its_scale():
    """Scale 1 is the text's velocity, 0 that of the empty text, and all others lie on the line through the two."""
    x, t, (text, null) = torch.randn(4, 6), torch.rand(4), texts(4)
    of = {s: chapter.guided(some_field, s)(x, t, text, null) for s in (0, 0.5, 1, 1.5, 5)}
    close(of[1], some_field(x, t, text), atol=0)
    close(of[0], some_field(x, t, null.expand_as(text)), atol=0)
    for s in (0.5, 1.5, 5):
        close(of[s], of[0] + s * (of[1] - of[0]), atol=1e-6)
    assert (of[5] - of[1]).abs().max() > 0.1


def test_guidance_towards_the_same_text_does_nothing():
    x, t, (text, _) = torch.randn(4, 6), torch.rand(4), texts(1)
    for s in (0, 1.5, 7.5):
        close(chapter.guided(some_field, s)(x, t, text.expand(4, -1, -1), text), some_field(x, t, text.expand(4, -1, -1)),
              atol=1e-6)


def test_guidance_one_needs_one_evaluation_and_no_empty_text():
    seen = []

    def field(x, t, text):
        seen.append(len(x))
        return x
    chapter.guided(field, 1)(torch.zeros(4, 2), torch.zeros(4), texts(4)[0])
    chapter.guided(field, 1.5)(torch.zeros(4, 2), torch.zeros(4), *texts(4))
    assert seen == [4, 8]


@pytest.mark.parametrize("steps, clock", [(1, [1000]), (2, [1000, 500]), (4, [1000, 750, 500, 250])])
def test_the_network_reads_the_papers_clock(steps, clock):
    """timesteps 1000 (1 - i / N) with positive steps 1 / N: a constant velocity is added once, whatever N."""
    seen, constant = [], torch.randn(3, 2, 4, 4)

    def unet(x, timestep, text):
        seen.append(timestep.tolist())
        return constant
    x0, (text, null) = torch.randn(3, 2, 4, 4), texts(3)
    x1 = chapter.carry(unet, x0, text, null, "euler", steps)
    assert seen == [[time] * 3 for time in clock]
    close(x1, x0 + constant, atol=1e-6)


def test_distillation_sees_the_noise_and_nothing_of_the_target():
    """At t = 0 the network's input is x0 to the last bit; the original code's t = 0.001 would mix in x1."""
    x0, x1, x1_other, text = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), texts(4)[0]
    seen = []

    def velocity(x, t, given):
        seen.append((x.clone(), t, given))
        return torch.tanh(x)
    losses = [chapter.one_step_loss(velocity, x0, end, text, chapter.squared) for end in (x1, x1_other)]
    for x, t, given in seen:
        assert torch.equal(x, x0) and torch.equal(t, torch.zeros(4)) and given is text
    for end, loss in zip((x1, x1_other), losses):
        close(loss, (x0 + torch.tanh(x0) - end).square().mean((1, 2, 3)), atol=1e-6)


def test_an_exact_straight_flow_has_no_loss():
    """Pairs x1 = M x0 + c(text): v = x1 - x0 is found exactly, so reflow and distillation both lose nothing."""
    torch.manual_seed(0)
    x0, (text, _) = torch.randn(8, 2, 3, 3), texts(8)

    def end(x, text):
        return 0.4 * x + text.mean((1, 2))[:, None, None, None]

    def straight(x, t, text):                              # x_t = (1 - 0.6 t) x0 + t c
        t, c = t[:, None, None, None], text.mean((1, 2))[:, None, None, None]
        return c - 0.6 * (x - t * c) / (1 - 0.6 * t)
    x1 = end(x0, text)
    close(chapter.reflow_loss(straight, x0, x1, text), torch.zeros(8), atol=1e-9)
    close(chapter.one_step_loss(straight, x0, x1, text, chapter.squared), torch.zeros(8), atol=1e-9)
    shuffled = x1.roll(1, 0)                               # another's end: no velocity can tell
    assert chapter.reflow_loss(straight, x0, shuffled, text).mean() > 0.1


def test_one_step_without_reflow_is_the_mean_of_its_text():
    """The best v(x, 0 | T) on an independent coupling is E[x1 | T] - x, so that one step draws the mean, a blur."""
    torch.manual_seed(0)
    means = torch.tensor([[2.0, -1.0], [-3.0, 0.5]])
    label = torch.arange(4000) % 2
    x0, x1, text = torch.randn(4000, 2), means[label] + torch.randn(4000, 2), label[:, None, None].float()
    at_zero = partial(chapter.one_step_loss, x0=x0, x1=x1, text=text, distance=chapter.squared)
    shift = torch.zeros(2, 2, requires_grad=True)
    at_zero(lambda x, t, c: (means + shift)[c[:, 0, 0].long()] - x).mean().backward()
    assert shift.grad.abs().max() < 0.03                   # the mean is where the gradient vanishes, up to sampling
    off = at_zero(lambda x, t, c: means.mean(0) - x).mean()
    assert off > at_zero(lambda x, t, c: means[c[:, 0, 0].long()] - x).mean() + 1


def test_times_are_uniform_or_u_shaped():
    """--a 0 is InstaFlow's; a = 4 has density a (e^{-a t} + e^{-a (1 - t)}) / (2 (1 - e^{-a})), mean 1/2."""
    x = torch.zeros(200000, 1)
    for a, ends, middle in ((0.0, 1.0, 1.0), (4.0, 2.0746, 0.5514)):
        torch.manual_seed(0)
        seen = []
        chapter.reflow_loss(lambda x, t, text: seen.append(t) or x, x, x, None, a)
        density = torch.histc(seen[0], 100, 0, 1) / len(x) * 100
        width = 0.01 if a else 0.0                         # the first bin is lower than the density at its edge
        assert density[[0, -1]].mean() == pytest.approx(ends * (1 - a * width / 2), abs=0.05)
        assert density[45:55].mean() == pytest.approx(middle, abs=0.03)
        assert seen[0].mean() == pytest.approx(0.5, abs=0.005)


# ----------------------------------------------------------------------------------------------------------------------
# The teacher as a velocity, and its solver
# ----------------------------------------------------------------------------------------------------------------------


def schedule(final="zero"):
    """diffusers' own, as Stable Diffusion's teacher is run."""
    from diffusers import DPMSolverMultistepScheduler
    return DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       final_sigmas_type=final, timestep_spacing="linspace")


def eps_model(x, s):
    """A smooth noise predictor."""
    return torch.tanh(x * (1 + s[:, None] / 500)) + 0.2 * torch.sin(s[:, None] / 100 + x)


def test_the_schedule_has_the_published_values():
    s = chapter.Schedule()
    assert (s.a ** 2)[[0, 499, 999]].tolist() == pytest.approx([0.99915, 0.27766965, 0.00466010], abs=1e-8)
    close(s.a ** 2 + s.b ** 2, torch.ones(1000, dtype=torch.float64), atol=1e-15)
    assert (s.a / (s.a + s.b))[999].item() == pytest.approx(0.06404, abs=1e-5)
    close((s.a ** 2).float(), schedule().alphas_cumprod, atol=2e-6)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 14, 15, 25, 40])
def test_the_solver_is_that_of_diffusers(steps, final):
    torch.manual_seed(0)
    x, scheduler = torch.randn(5, 7, dtype=torch.float64), schedule(final)
    scheduler.set_timesteps(steps)
    theirs = x.clone()
    for s in scheduler.timesteps:
        theirs = scheduler.step(eps_model(theirs, s.double().expand(5)), s, theirs).prev_sample
    ours = chapter.dpm_solver(eps_model, x, steps, final)
    close(ours, theirs, atol=1e-4 * theirs.abs().max().item())


def test_the_solver_evaluates_once_a_step_at_the_published_times():
    seen = []
    chapter.dpm_solver(lambda x, s: seen.append(s[0].item()) or x, torch.randn(2, 3), 25)
    assert len(seen) == 25 and seen[:3] == [999, 959, 919] and seen[-2:] == [80, 40]


def gaussian_eps(x, s, sigma=0.5):
    """The exact noise predictor of data N(0, sigma^2): E[x0 | x_s] = b x_s / (a^2 sigma^2 + b^2); s may be a fraction."""
    table, knots = chapter.Schedule(), np.arange(1000)
    ratio = np.interp(s.double().numpy(), knots, torch.log(table.a / table.b).numpy())
    a, b = (torch.sigmoid(torch.tensor(sign * 2 * ratio)).sqrt()[:, None] for sign in (1, -1))
    return b / (a ** 2 * sigma ** 2 + b ** 2) * x


def test_the_solver_converges_to_the_exact_flow():
    """Gaussian data's flow multiplies by the ratio of the standard deviations at both ends, steps or no steps."""
    x = torch.randn(6, 4, dtype=torch.float64)
    table = chapter.Schedule()
    end, start = (((table.a[s] * 0.5) ** 2 + table.b[s] ** 2).sqrt().item() for s in (0, 999))
    errors = [(chapter.dpm_solver(gaussian_eps, x, n, "sigma_min") - end / start * x).abs().max().item()
              for n in (37, 111, 333, 999)]
    assert errors[-1] < 1e-3 and all(after < 0.7 * before for before, after in zip(errors, errors[1:]))


def test_the_exact_noise_of_gaussian_data_is_the_exact_velocity():
    """v = (t sigma^2 - (1 - t)) / (t^2 sigma^2 + (1 - t)^2) x, wherever the teacher has a noise level for t."""
    x, t = torch.randn(200, 3, dtype=torch.float64), torch.linspace(0.0641, 0.97, 200, dtype=torch.float64)
    v = chapter.velocity_from_eps(gaussian_eps)(x, t)
    exact = (t * 0.25 - (1 - t)) / (t ** 2 * 0.25 + (1 - t) ** 2)
    close(v, exact[:, None] * x, atol=1e-12)


def test_the_velocity_agrees_with_both_of_its_readings():
    """x_t = (1 - t) eps + t x1_hat, so v = x1_hat - eps = (x_t - eps) / t; here at the integers s, by the table."""
    table, s = chapter.Schedule(), torch.tensor([0, 13, 138, 477, 744, 914, 999])
    a, b = table.a[s, None], table.b[s, None]
    xt = torch.randn(7, 3, dtype=torch.float64)
    t, xs = (a / (a + b))[:, 0], (a + b) * xt
    noise = eps_model(xs, s.double())
    v = chapter.velocity_from_eps(eps_model)(xt, t)
    close(v, (xt - noise) / t[:, None], atol=1e-9)
    close(v, (xs - b * noise) / a - noise, atol=1e-9)


def test_the_matched_noise_levels_are_the_published_ones():
    seen = []
    t = torch.arange(1, 10, dtype=torch.float64) / 10
    chapter.velocity_from_eps(lambda x, s: seen.append(s) or x)(torch.zeros(9, 1, dtype=torch.float64), t)
    assert seen[0].round().tolist() == [914, 744, 606, 477, 354, 239, 138, 60, 13]


def test_euler_on_the_teachers_times_is_ddim():
    table, grid = chapter.Schedule(), [999, 900, 750, 600, 450, 300, 150, 60, 0]
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    velocity, ddim = chapter.velocity_from_eps(eps_model), x
    times = [(table.a[s] / (table.a[s] + table.b[s])).item() for s in grid]
    z = x / (table.a[999] + table.b[999])
    for s, after, t, t_after in zip(grid, grid[1:], times, times[1:]):
        noise = eps_model(ddim, torch.full((5,), float(s), dtype=torch.float64))
        ddim = table.a[after] * (ddim - table.b[s] * noise) / table.a[s] + table.b[after] * noise
        z = z + (t_after - t) * velocity(z, torch.full((5,), t, dtype=torch.float64))
    close(z * (table.a[0] + table.b[0]), ddim, atol=1e-10)


@pytest.mark.parametrize("t", [0.0, 1e-9, 0.03, 0.98, 1.0])
def test_the_velocity_is_finite_where_the_teacher_has_no_noise_level(t):
    seen = []

    def eps(x, s):
        seen.append((x, s))
        return 0.9 * x
    x = torch.randn(4, 3)
    v = chapter.velocity_from_eps(eps)(x, torch.full((4,), t))
    assert v.isfinite().all() and v.dtype == torch.float32
    assert seen[0][1].tolist() == [999 if t < 0.5 else 0] * 4
    if t == 0:
        assert torch.equal(seen[0][0], x)                  # pure noise, as the teacher's own sampler begins


def test_more_arguments_pass_through_the_velocity():
    got = chapter.velocity_from_eps(lambda x, s, text=None, null=None: x * text.mean() + 0 * null.mean())
    close(got(torch.ones(1, 2), torch.full((1,), 0.5), text=torch.full((1, 2, 2), 3.0), null=torch.zeros(1, 1, 2)),
          torch.full((1, 2), (1 - 3 * 2 ** 0.5) / 0.5), atol=1e-5)
