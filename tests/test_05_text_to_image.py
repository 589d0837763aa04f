"""Chapter 5: the method against closed forms and diffusers, stages that resume, whole tiny runs, `sample`, `evaluate`.

The networks themselves have tests of their own (test_05_networks.py).  diffusers and transformers are references here:
the chapter does without them.
"""

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (copy_run, driver, fixtures, kill_after_row, kill_in_shard, load, one_line, same_weights,
                      torchrun)
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "05_text_to_image"
chapter = load(NAME)
TINY = ("--data-size 64 --vae-steps 4 --steps 4 --reflow-steps 4 --distill-steps 4 2 --pairs 12 --shard 8 "
        "--eval-size 16 --solver-steps 3 --distill-solver-steps 2 --vae-channels 4 4 --channels 8 8 --heads 2 "
        "--batch 4 --vae-batch 4 --reflow-batch 4 --distill-batch 4 4 --image-size 16 --lpips-weights random "
        "--lpips-size 32 --log-every 2 --device cpu").split()
NETWORKS = {"teacher", "2-rf-0", "distilled-0", "direct-0", "longer-0"}
STAGES = ["vae", "teacher", "2-rf-0.1", "distilled-0.1", "distilled-0.2", "direct-0.1", "direct-0.2",
          "longer-0.1", "longer-0.2"]
here, run, finished = fixtures(NAME, TINY, figures=("draw_grid",))
close = partial(torch.testing.assert_close, rtol=0)


# ---- Guidance, clock and losses --------------------------------------------------------------------------------------


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
    x1 = chapter.Sampler(SimpleNamespace(null=null), unet, "euler", steps)(x0, text)
    assert seen == [[time] * 3 for time in clock]
    close(x1, x0 + constant, atol=1e-6)


@pytest.mark.parametrize("guidance, calls", [(0.0, 1), (1.0, 1), (2.5, 2)])
def test_a_diffusion_model_is_solved_or_read_as_a_velocity(guidance, calls):
    def unet(x, s, text):
        return torch.sin(x + s[:, None, None, None] / 300) + text.mean((1, 2))[:, None, None, None]
    x0, (text, null) = torch.randn(3, 2, 4, 4), texts(3)
    eps = partial(chapter.guided(unet, max(1.0, guidance)), text=text, null=null)
    ends = {"dpm": chapter.dpm_solver(eps, x0, 5), "ddim": chapter.integrate(chapter.velocity_from_eps(eps), x0, 5)[-1]}
    for solver, end in ends.items():
        prompts = SimpleNamespace(null=null, pipe=SimpleNamespace(schedule=chapter.Schedule()))
        sampler = chapter.Sampler(prompts, unet, solver, 5, guidance)
        close(sampler(x0, text), end, atol=1e-6)
        assert sampler.evaluations == 3 * 5 * calls


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("predicts", ["v_prediction", "sample"])
def test_a_diffusion_model_draws_the_same_whatever_it_predicts(predicts, guidance):
    """x0, a x0 - b x1 and x1 tell the same, under guidance too, and between two noise levels."""
    plain, other = (chapter.Schedule(0.0001, 0.02, "linear", 1000, kind) for kind in ("epsilon", predicts))
    x, (text, null) = torch.randn(3, 2, 4, 4), texts(3)

    def eps(x, s, text):
        return torch.sin(x + s[:, None, None, None] / 300) + text.mean((1, 2))[:, None, None, None]

    def translated(x, s, text):
        ratio = torch.as_tensor(np.interp(s, np.arange(1000), torch.log(plain.a / plain.b)))[:, None, None, None]
        a, b, noise = torch.sigmoid(2 * ratio).sqrt(), torch.sigmoid(-2 * ratio).sqrt(), eps(x, s, text)
        x1 = (x - b * noise) / a
        return a * noise - b * x1 if predicts == "v_prediction" else x1
    for solver in ("dpm", "ddim"):
        ends = []
        for schedule, network in ((plain, eps), (other, translated)):
            prompts = SimpleNamespace(null=null, pipe=SimpleNamespace(schedule=schedule))
            ends.append(chapter.Sampler(prompts, network, solver, 7, guidance)(x, text))
        close(ends[0], ends[1], atol=1e-4 * ends[0].abs().max().item())


def test_distillation_sees_the_noise_and_nothing_of_the_target():
    """At t = 0 the network's input is x0 to the last bit; the original code's t = 0.001 would mix in x1."""
    x0, x1, x1_other, text = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), texts(4)[0]
    seen = []

    def velocity(x, t, given):
        seen.append((x.clone(), t, given))
        return torch.tanh(x)
    losses = [chapter.one_step_loss(velocity, x0, end, text, chapter.latent_distance) for end in (x1, x1_other)]
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
    close(chapter.one_step_loss(straight, x0, x1, text, chapter.latent_distance), torch.zeros(8), atol=1e-9)
    shuffled = x1.roll(1, 0)                               # another's end: no velocity can tell
    assert chapter.reflow_loss(straight, x0, shuffled, text).mean() > 0.1


def test_a_student_goes_through_its_phases_with_its_share_of_the_batch():
    """Two processes with --accumulate 2 draw a quarter of the largest batch; a small one needs no slices.

    Each phase begins with the network of the one before.
    """
    drawn, fitted = [], []

    def fit(name, unet, loss, stream, **settings):
        loss(None, None, 0)
        fitted.append((name, unet, stream, settings))
        return unet + 1
    sizes = SimpleNamespace(accumulate=2, vae_batch=4, reflow_batch=(16, 8), distill_batch=(4, 4))
    run = SimpleNamespace(world=2, config=sizes, fit=fit)
    phases = [(lambda velocity, *pair: pair, 5, 16, 1e-3), (lambda velocity, *pair: pair, 6, 8, 1e-4)]
    assert chapter.train_student(run, "2-rf-3", torch.tensor(7), lambda n: drawn.append(n) or (0, 0, 0), phases) == 9
    assert drawn == [4, 4]
    assert fitted == [
        ("2-rf-3.1", 7, chapter.seed_for(3, 0, *b"2-rf"), dict(steps=5, batch=16, lr=1e-3, accumulate=2)),
        ("2-rf-3.2", 8, chapter.seed_for(3, 1, *b"2-rf"), dict(steps=6, batch=8, lr=1e-4, accumulate=1))]


def test_one_step_without_reflow_is_the_mean_of_its_text():
    """The best v(x, 0 | T) on an independent coupling is E[x1 | T] - x, so that one step draws the mean, a blur."""
    torch.manual_seed(0)
    means = torch.tensor([[2.0, -1.0], [-3.0, 0.5]])
    label = torch.arange(4000) % 2
    x0, x1, text = torch.randn(4000, 2), means[label] + torch.randn(4000, 2), label[:, None, None].float()
    at_zero = partial(chapter.one_step_loss, x0=x0, x1=x1, text=text, distance=chapter.latent_distance)
    shift = torch.zeros(2, 2, requires_grad=True)
    at_zero(lambda x, t, c: (means + shift)[c[:, 0, 0].long()] - x).mean().backward()
    assert shift.grad.abs().max() < 0.03                   # the mean is where the gradient vanishes, up to sampling
    off = at_zero(lambda x, t, c: means.mean(0) - x).mean()
    assert off > at_zero(lambda x, t, c: means[c[:, 0, 0].long()] - x).mean() + 1


def test_times_are_uniform():
    torch.manual_seed(0)
    x, seen = torch.zeros(200000, 1), []
    chapter.reflow_loss(lambda x, t, text: seen.append(t) or x, x, x, None)
    density = torch.histc(seen[0], 100, 0, 1) / len(x) * 100
    assert density[[0, -1]].mean() == pytest.approx(1, abs=0.05) and density.std() < 0.03
    assert density[45:55].mean() == pytest.approx(1, abs=0.03) and seen[0].mean() == pytest.approx(0.5, abs=0.005)


# ---- The teacher as a velocity, and its solver -----------------------------------------------------------------------


def schedule():
    """diffusers' own, as Stable Diffusion's teacher is run."""
    from diffusers import DPMSolverMultistepScheduler
    return DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       timestep_spacing="linspace")


def eps_model(x, s):
    """A smooth noise predictor."""
    return torch.tanh(x * (1 + s[:, None] / 500)) + 0.2 * torch.sin(s[:, None] / 100 + x)


def test_the_schedule_has_the_published_values():
    s = chapter.Schedule()
    assert (s.a ** 2)[[0, 499, 999]].tolist() == pytest.approx([0.99915, 0.27766965, 0.00466010], abs=1e-8)
    close(s.a ** 2 + s.b ** 2, torch.ones(1000, dtype=torch.float64), atol=1e-15)
    assert (s.a / (s.a + s.b))[999].item() == pytest.approx(0.06404, abs=1e-5)
    close((s.a ** 2).float(), schedule().alphas_cumprod, atol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 14, 15, 25, 40])
def test_the_solver_is_that_of_diffusers(steps):
    torch.manual_seed(0)
    x, scheduler = torch.randn(5, 7, dtype=torch.float64), schedule()
    scheduler.set_timesteps(steps)
    theirs = x.clone()
    for s in scheduler.timesteps:
        theirs = scheduler.step(eps_model(theirs, s.double().expand(5)), s, theirs).prev_sample
    ours = chapter.dpm_solver(eps_model, x, steps)
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
    """Gaussian data's flow multiplies by the ratio of the standard deviations at both ends, steps or no steps.

    That is to the last noise level; from there the last step goes to E[x1 | x_s] = a sigma^2 x_s / (a^2 sigma^2 + b^2).
    """
    x = torch.randn(6, 4, dtype=torch.float64)
    table = chapter.Schedule()
    variance = (table.a * 0.5) ** 2 + table.b ** 2
    errors = []
    for n in (37, 111, 333, 999):
        last = 999 // n
        exact = (variance[last] / variance[999]).sqrt() * table.a[last] * 0.25 / variance[last] * x
        errors.append((chapter.dpm_solver(gaussian_eps, x, n) - exact).abs().max().item())
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


# ---- Batches: prompts, pairs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """The two files that the chapter writes for the captions of the shapes."""
    return chapter.write_vocabulary(chapter.shape_captions(), tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture
def pipe(vocabulary):
    """A tiny pipeline with random weights."""
    torch.manual_seed(0)
    tokenizer = chapter.CLIPTokenizer(*vocabulary)
    return chapter.Pipeline(tokenizer, chapter.CLIPTextEncoder(len(tokenizer.vocab), 8, 1, 2, inner=16).eval(),
                            chapter.UNet((4, 8), 1, (False, True), 2, 8, groups=1),
                            chapter.VAE((4, 4), 1, groups=1, scale=0.7), {"scheduler": {}}, (4, 8, 8))


def test_every_word_of_the_captions_is_one_token(vocabulary):
    """And the tokenizer of transformers, given the files, agrees on them and on words that were not learnt."""
    from transformers import CLIPTokenizer
    tokenizer = chapter.CLIPTokenizer(*vocabulary)
    captions = chapter.shape_captions()
    assert len(captions) == len(set(captions)) == 32
    spelt = [chapter.spell(word) for caption in captions for word in caption.split()]
    pairs = Counter(pair for word in spelt for pair in zip(word, word[1:]))
    first = vocabulary[1].read_text(encoding="utf-8").splitlines()[1]      # the most frequent pair is merged first
    assert pairs[tuple(first.split())] == max(pairs.values())
    tokens = tokenizer(captions)
    assert (tokens != tokenizer.end).sum(1).tolist() == [8] * 32 and len(tokens.unique(dim=0)) == 32   # start + 7 words
    theirs = CLIPTokenizer(*map(str, vocabulary))
    for text in [*captions, "", "two pink circles, not red!", "crossroad backgrounds"]:
        assert theirs(text)["input_ids"] == [tokenizer.start, *tokenizer.encode(text), tokenizer.end]


def test_prompts_kept_and_prompts_encoded_on_demand_are_the_same(pipe):
    captions = chapter.shape_captions()
    few, many = chapter.Prompts(pipe, captions), chapter.Prompts(pipe, captions, few=0)
    index = torch.tensor([0, 5, 31, 32, 69])
    close(few(index), many(index), atol=1e-6)
    assert torch.equal(few(index)[3], few(index)[0]) and few.null.shape == (1, 77, 8)
    close(few.null, pipe.text_encoder(pipe.tokenizer([""])), atol=1e-6)


def test_dropout_puts_the_empty_text_in_place_of_a_share(pipe):
    prompts = chapter.Prompts(pipe, chapter.shape_captions())
    text = prompts(torch.arange(4000))
    torch.manual_seed(0)
    got = chapter.drop_some(text, prompts.null, 0.25)
    dropped = (got == prompts.null).all(2).all(1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    close(got[~dropped], text[~dropped], atol=0)
    assert (chapter.drop_some(text, prompts.null, 1.0) == prompts.null).all()
    assert torch.equal(chapter.drop_some(text, prompts.null, 0.0), text)


def test_long_prompts_are_cut_with_a_notice(pipe, capsys):
    prompts = chapter.Prompts(pipe, ["a red circle", "a red circle " * 40])
    assert "1 of 2 prompts are longer than 77 tokens" in capsys.readouterr().err
    assert prompts.tokens.shape == (2, 77)


def test_the_teacher_learns_the_noise_and_sees_no_more_of_a_text_than_it_should():
    """A model that knows the one latent c finds x0 = (x_s - a c) / b and loses nothing; a share of texts is empty."""
    torch.manual_seed(0)
    latent, tokens, empty = torch.randn(1, 4, 2, 2), torch.full((1, 5), 7), torch.full((1, 5), 9)
    table, seen = chapter.Schedule(), []

    def model(x, s, text):
        seen.append(text[:, 0])
        a, b = (values[s.long()].float().reshape(-1, 1, 1, 1) for values in (table.a, table.b))
        return (x - a * latent) / b
    draw = partial(chapter.draw_rows, 2000, latent, tokens)
    forget = partial(chapter.drop_some, empty=empty, dropout=0.25)
    losses = chapter.teacher_loss(model, None, 0, draw, forget)
    close(losses, torch.zeros(2000), atol=1e-6)
    assert set(seen[0].tolist()) == {7, 9} and (seen[0] == 9).float().mean() == pytest.approx(0.25, abs=0.03)


def test_the_teacher_learns_latents_of_unit_variance(tmp_path, monkeypatch):
    """They are multiplied by the factor that its VAE's config names."""
    class Caught(Exception):
        pass

    def look(model, ema, step, draw, forget):
        raise Caught(draw.args[1])
    monkeypatch.setattr(chapter, "teacher_loss", look)
    config = chapter.parse_config(chapter.Config, [*TINY, "--out", str(tmp_path / "run")])
    with pytest.raises(Caught) as caught:
        chapter.tiny_teacher(chapter.Run(config, chapter.__file__))
    assert caught.value.args[0].std().item() == pytest.approx(1, abs=1e-3)


class Doubling(chapter.VAE):
    """A VAE whose picture is twice the latent, with a posterior of its own."""
    scale, mean, logvar = 0.5, 1.5, -0.8

    def __init__(self):
        nn.Module.__init__(self)

    def encode(self, x):
        return torch.full_like(x, self.mean), torch.full_like(x, self.logvar)

    def decode(self, z):
        return 2 * z


def test_the_autoencoder_pays_for_its_posterior():
    """KL(N(m, s^2) || N(0, 1)), summed over the latents, and a mean absolute error of 2 E|z - x / 2|."""
    normal, black = torch.distributions.Normal, torch.full((4, 3, 64, 64), 127.5)     # the middle of -1 ... 1
    posterior = normal(Doubling.mean, torch.tensor(Doubling.logvar / 2).exp())
    losses = []
    for weight in (0, 1):                                  # of the KL divergence, which counts per number of the picture
        torch.manual_seed(0)
        losses.append(chapter.vae_loss(Doubling(), None, 0, lambda: [black], weight))
    kl = torch.distributions.kl_divergence(posterior, normal(0, 1)).item()
    close(losses[1] - losses[0], torch.full((4,), kl), atol=1e-5)
    close(losses[0], torch.full((4,), 2 * posterior.sample((100000,)).abs().mean().item()), atol=0.03)


def test_pictures_are_decoded_from_unscaled_latents():
    a, b = torch.rand(3, 1, 2, 2) / 5, torch.rand(3, 1, 2, 2) / 5
    far = partial(chapter.picture_distance, Doubling(), lambda x, y: (x - y).flatten(1).sum(1))
    close(far(a, b), 4 * (a - b).flatten(1).sum(1), atol=1e-6)
    close(chapter.decode_latents(Doubling(), a), 4 * a, atol=1e-6)


class Numbers(chapter.Prompts):
    """Prompts whose "text" is their number."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __call__(self, index):
        return index


def some_run(folder, *args):
    """A run with pairs in files of 8, of which 3 are made at a time."""
    args = "--device", "cpu", "--shard", "8", "--sample-batch", "3", "--out", str(folder), *args
    return chapter.Run(chapter.parse_config(chapter.Config, args), chapter.__file__)


def some_pairs(folder, pipe, count=20, seed=7):
    """Pairs by a sampler whose ends tell their number: x1 = number in every entry.  Returns the run and what was asked."""
    run, made = some_run(folder), []

    def sampler(x0, index):
        made.append((x0, index))
        return index.float().reshape(-1, 1, 1, 1).expand_as(x0)
    sampler.unet, sampler.prompts = pipe.unet, Numbers(pipe)
    chapter.write_pairs(run, "some", sampler, seed, count)
    return run, made


def test_pairs_stay_together(tmp_path, pipe):
    """x1 comes from the file, x0 anew from the number, and the text goes by the same number."""
    run, made = some_pairs(tmp_path, pipe)
    prompts = chapter.Prompts(pipe, chapter.shape_captions()[:9])
    number, ends = pairs = chapter.load_pairs(run, "some", 20, pipe.shape)
    assert ends.dtype == torch.float16 and number.tolist() == ends[:, 0, 0, 0].tolist() == [*range(20)]
    torch.manual_seed(0)
    x0, x1, text = chapter.draw_stored(pairs, 7, prompts, 300)
    index = x1[:, 0, 0, 0].long()
    assert x1.dtype == torch.float32 and len(index.unique()) == 20
    noises = {i: x for noise, numbers in made for i, x in zip(numbers.tolist(), noise)}
    close(x0, torch.stack([noises[i] for i in index.tolist()]), atol=0)
    close(text, prompts(index), atol=0)
    fewer = chapter.load_pairs(run, "some", 11, pipe.shape)     # than there are, for reflow
    assert fewer[0].tolist() == [*range(11)] and chapter.draw_stored(fewer, 7, prompts, 300)[1].max() == 10
    assert (chapter.draw_stored(pairs, 7, prompts, 20, dropout=1.0)[2] == prompts.null).all()


def test_pairs_are_made_a_few_at_a_time(tmp_path, pipe):
    """A shard is the size of a file; the network sees --sample-batch pictures, the last ones of a shard filled up."""
    _, made = some_pairs(tmp_path, pipe)
    assert [len(index) for _, index in made] == [3] * 9
    stored = [torch.load(path, weights_only=True)["x1"] for path in sorted((tmp_path / "pairs" / "some").iterdir())]
    assert [len(x1) for x1 in stored] == [8, 8, 4]


def test_every_process_keeps_its_share_of_the_pairs(tmp_path, pipe):
    """Together they hold all, nobody holds what another one does, and noise and text still go by the number."""
    run, _ = some_pairs(tmp_path, pipe)
    prompts = chapter.Prompts(pipe, chapter.shape_captions()[:9])
    run.world, numbers = 3, []
    for run.rank in range(3):
        pairs = chapter.load_pairs(run, "some", 20, pipe.shape)
        numbers += pairs[0].tolist()
        assert pairs[0].tolist() == pairs[1][:, 1, 2, 0].tolist()
        x0, x1, text = chapter.draw_stored(pairs, 7, prompts, 50)
        number = x1[:, 0, 0, 0].long()
        close(x0, chapter.pair_noise(7, number, pipe.shape), atol=0)
        close(text, prompts(number), atol=0)
    assert sorted(numbers) == [*range(20)]


def test_pairs_that_exist_are_not_made_again(tmp_path, pipe):
    some_pairs(tmp_path, pipe)
    (tmp_path / "pairs" / "some" / "00001.pt").unlink()
    assert [index.tolist() for _, index in some_pairs(tmp_path, pipe)[1]] == [[8, 9, 10], [11, 12, 13], [14, 15, 16]]


def other_pairs(*shape, dtype=torch.float16):
    """Puts pairs of this shape into a file."""
    return lambda path: chapter.save_checkpoint(path, config={}, x1=torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.unlink(), "is missing"), (lambda path: path.write_bytes(b"no tensor"), "delete it"),
    (lambda path: path.write_bytes(b""), "delete it"), (lambda path: torch.save([1], path), "delete it"),
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), "delete it"),
    (lambda path: chapter.save_checkpoint(path, config={}), "other pairs"), (other_pairs(3, 4, 8, 8), "other pairs"),
    (other_pairs(8, 4, 8, 16), "other pairs"), (other_pairs(9, 4, 8, 8), "other pairs"),
    (other_pairs(8, 4, 8, 8, dtype=torch.float32), "other pairs"),
], ids=["missing", "text", "empty", "another's", "cut", "none", "few", "wide", "many", "float32"])
def test_a_spoilt_shard_is_one_line(tmp_path, pipe, spoil, words):
    run, _ = some_pairs(tmp_path, pipe)
    spoil(tmp_path / "pairs" / "some" / "00001.pt")
    with pytest.raises(chapter.UserError, match=f"00001.pt.* {words}"):
        chapter.load_pairs(run, "some", 20, pipe.shape)


def test_samples_that_are_not_finite_are_not_stored(tmp_path, pipe):
    def sampler(x0, text):
        return x0 / 0
    sampler.unet, sampler.prompts = pipe.unet, Numbers(pipe)
    with pytest.raises(chapter.UserError, match="not finite"):
        chapter.write_pairs(some_run(tmp_path), "some", sampler, 0, 8)
    assert not (tmp_path / "pairs").exists()


# ---- What a GPU needs, seen on a CPU ---------------------------------------------------------------------------------


class Transfers(TorchDispatchMode):
    """Notes every copy from one device to another: whether it was one that nobody waits for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device) != args[0].device:
            self.seen.append(bool(kwargs.get("non_blocking")))
        if function is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.seen.append(len(args) > 2 and args[2])
        return function(*args, **kwargs)


def test_transfers_are_noticed():
    with Transfers() as transfers:
        torch.ones(2).to("meta"), torch.ones(2).to("meta", non_blocking=True), torch.ones(2).to(torch.int32)
        torch.ones(2, device="meta").copy_(torch.ones(2))
    assert transfers.seen == [False, True, False]


@pytest.mark.parametrize("few", [0, 256], ids=["encoded", "kept"])
@pytest.mark.parametrize("home, copies", [("meta", []), ("cpu", [True, True])])
def test_a_training_step_waits_for_no_copy(pipe, monkeypatch, few, home, copies):
    """Pairs on the device cost no copy at all, those in host memory a batch of them and its numbers, from pinned memory.

    The meta device plays the GPU.
    """
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda rows: pinned.append(rows) or rows)
    pipe.text_encoder.to("meta"), pipe.unet.to("meta")
    prompts = chapter.Prompts(pipe, chapter.shape_captions(), few=few)
    pairs = torch.arange(20, device=home), torch.zeros(20, *pipe.shape, dtype=torch.float16, device=home)
    draw = partial(chapter.draw_stored, pairs, 7, prompts, 4, dropout=0.1)
    with Transfers() as transfers:
        for loss in (chapter.reflow_loss, partial(chapter.one_step_loss, distance=chapter.latent_distance)):
            assert chapter.pair_loss(pipe.unet, None, 0, draw, loss).device.type == "meta"
    assert transfers.seen == 2 * copies and len(pinned) == len(transfers.seen)


def test_the_teachers_step_copies_nothing(pipe):
    tables = torch.zeros(20, *pipe.shape, device="meta"), torch.zeros(20, 77, dtype=torch.int64, device="meta")
    forget = partial(chapter.drop_some, empty=tables[1][:1], dropout=0.1)
    model = chapter.Captioned(pipe.unet, pipe.text_encoder).to("meta")
    step = partial(chapter.teacher_loss, model, None, 0, partial(chapter.draw_rows, 4, *tables), forget)
    step()                                                 # the first one copies the noise levels
    with Transfers() as transfers:
        step()
    assert transfers.seen == []


@pytest.mark.parametrize("processes, home", [(1, "cpu"), (8, "cuda")])
def test_pairs_too_large_for_the_card_stay_in_host_memory(monkeypatch, processes, home):
    """The paper's are, unless eight cards of 80 GB share them."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    size = 1_600_000 // processes * 4 * 64 * 64 * 2
    assert chapter.home(torch.device("cuda"), size).type == home
    assert chapter.home(torch.device("mps"), size).type == "mps"


def test_pairs_are_put_where_they_have_room(tmp_path, pipe, monkeypatch):
    """The meta device plays the GPU."""
    run, _ = some_pairs(tmp_path, pipe)
    sizes = []
    monkeypatch.setattr(chapter, "home", lambda device, size: sizes.append(size) or torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "__setitem__", lambda *arguments: None)      # a mask on meta says nothing
    number, x1 = chapter.load_pairs(run, "some", 20, pipe.shape)
    assert number.device.type == x1.device.type == "meta" and sizes == [x1.nbytes]


def test_only_the_pictures_on_the_grid_are_kept(tmp_path, pipe):
    """200 pictures, 3 at a time, the last ones filled up; the numbers are those of all at once."""
    run = some_run(tmp_path, "--eval-size", "200")
    prompts, features, seen = chapter.Prompts(pipe, chapter.shape_captions()), chapter.RandomFeatures(), []
    pipe.unet.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    sampler = chapter.Sampler(prompts, pipe.unet, "euler", 2)
    made, captions, kept = chapter.measure(sampler, run, features)
    assert seen == [3] * 3 * 67 and sampler.evaluations / sampler.drawn == 2
    number = torch.arange(200)
    images = torch.cat([*chapter.pictures(sampler, chapter.seed_for(0, 999), number, number, 200)])
    known = [*chapter.shape_captions(), ""]
    assert captions == [known[label] for label in chapter.read_labels(images)]
    close(kept, images[:96], atol=1e-5)                    # three rows of 32 texts
    for ours, theirs in zip(made, chapter.feature_moments(images, features, run.device)):
        close(ours, theirs, atol=1e-5)


def test_finished_networks_leave_the_device(tmp_path, pipe, monkeypatch):
    """They are there while they are sampled, and no longer."""
    events = []

    def sampler(x0, text):
        events.append("drawn")
        return x0
    sampler.prompts, sampler.unet = Numbers(pipe), pipe.unet
    monkeypatch.setattr(chapter, "place", lambda network, device: events.append("there") or network)
    monkeypatch.setattr(pipe.unet, "cpu", lambda: events.append("away"))
    run = some_run(tmp_path, "--eval-size", "6")
    chapter.write_pairs(run, "some", sampler, 0, 8)
    assert events == ["there", *["drawn"] * 3, "away"]
    assert [len(images) for images in chapter.generate(sampler, run)] == [3, 3]
    assert events[5:] == ["there", *["drawn"] * 2, "away"]


def test_lpips_decodes_the_target_once_without_a_gradient(monkeypatch):
    modes = []
    monkeypatch.setattr(Doubling, "decode", lambda self, z: modes.append((torch.is_grad_enabled(), z)) or 2 * z)
    a, b = torch.rand(3, 1, 2, 2, requires_grad=True), torch.rand(3, 1, 2, 2, requires_grad=True)
    chapter.picture_distance(Doubling(), lambda x, y: (x - y).flatten(1).sum(1), a, b).sum().backward()
    assert [with_gradient for with_gradient, _ in modes] == [False, True] and torch.equal(modes[0][1], b / 0.5)
    assert a.grad is not None and b.grad is None


def test_a_network_meets_two_sizes_of_batches(tmp_path, pipe):
    """Pairs with guidance, pictures without, in odd numbers: nothing to compile after the first batch of each.

    Nor after the first step of training by LPIPS, in slices and through a decoder that computes again what it forgot.
    """
    torch._dynamo.reset()
    run = some_run(tmp_path, "--eval-size", "10", "--batch", "4", "--accumulate", "2", "--steps", "3")
    prompts, features = chapter.Prompts(pipe, chapter.shape_captions()), chapter.RandomFeatures()
    student = copy.deepcopy(pipe.unet)
    pipe.vae.requires_grad_(False).checkpointing = True
    perceptual = chapter.Perceptual("squeeze", 32, "random")
    for network in (pipe.unet, student, pipe.vae.decoder):
        chapter.place(network, run.device).compile(dynamic=False, backend="aot_eager")
    straight, plain, teacher = (chapter.Sampler(prompts, pipe.unet, *way) for way in
                                (("euler", 2, 1.5), ("euler", 1), ("dpm", 3, 1.5)))
    for sampler in (straight, plain):
        list(chapter.pictures(sampler, 0, torch.arange(3), torch.arange(3), 3))
    with torch.compiler.set_stance("fail_on_recompile"):
        chapter.write_pairs(run, "some", straight, 7, 20)
        for sampler in (plain, teacher):
            chapter.measure(sampler, run, features)
    draw = partial(chapter.draw_stored, chapter.load_pairs(run, "some", 20, pipe.shape), 7, prompts, 2)
    loss = partial(chapter.one_step_loss, distance=partial(chapter.picture_distance, pipe.vae, perceptual))
    steps = chapter.train(student, partial(chapter.pair_loss, draw=draw, loss=loss), run.config)
    next(steps)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert [step for step, _, _ in steps] == [2, 3]
    torch._dynamo.reset()


@pytest.mark.parametrize("world", [1, 8])
def test_the_papers_slices_hold_enough_for_a_gpu_and_not_too_much(world):
    """On eight processes at least 8 pairs in each, of every phase; pictures are made in tens, not in thousands."""
    config = chapter.parse_config(chapter.Config, "--preset paper --model folder --prompts file".split())
    pairs = [batch // (world * chapter.slices(config, batch)) for batch in (*config.reflow_batch, *config.distill_batch)]
    assert all(64 // world <= n <= 64 // world * world for n in pairs) and config.sample_batch <= 32


# ---- Captions of pictures --------------------------------------------------------------------------------------------


def test_the_teacher_sees_every_picture_with_its_own_caption(tmp_path, monkeypatch):
    """The caption that is read off a picture is the one whose tokens it is trained with."""
    class Caught(Exception):
        pass

    def fit(name, network, loss_fn, stream, **settings):
        if name == "teacher":
            raise Caught(loss_fn.keywords["draw"].args[2])
        return network.eval()
    run = some_run(tmp_path, "--data-size", "64", "--image-size", "16")
    monkeypatch.setattr(run, "fit", fit)
    with pytest.raises(Caught) as caught:
        chapter.tiny_teacher(run)
    tokenizer = chapter.CLIPTokenizer(*(tmp_path / "tokenizer" / name for name in ("vocab.json", "merges.txt")))
    images, _ = chapter.shapes(64, 16, run.config.seed)
    read = [chapter.shape_captions()[label] for label in chapter.read_labels(chapter.to_floats(images))]
    assert len(set(read)) > 16 and torch.equal(caught.value.args[0], tokenizer(read))


def drawn(monkeypatch, pictures):
    """A run whose networks draw these pictures, whatever they are asked for, a few at a time."""
    monkeypatch.setattr(chapter, "generate", lambda sampler, run: iter(pictures.split(3)))
    return SimpleNamespace(config=SimpleNamespace(seed=0), device=torch.device("cpu"))


def test_captions_are_read_off_what_was_drawn(monkeypatch):
    """In whatever order the prompts are; what shows no shape has no caption, and other prompts are not read off it."""
    torch.manual_seed(0)
    images, labels = chapter.shapes(10, 32, 3)
    pictures = torch.cat([chapter.to_floats(images), torch.randn(4, 3, 32, 32).clamp(-1, 1)])
    run = drawn(monkeypatch, pictures)
    true = [chapter.shape_captions()[label] for label in labels]
    for texts, expected in ((chapter.shape_captions()[::-3], [*true, *[""] * 4]), (["a red circle"], []),
                            ([*chapter.shape_captions(), "a cat"], [])):
        sampler = SimpleNamespace(prompts=SimpleNamespace(texts=texts))
        assert chapter.measure(sampler, run, chapter.RandomFeatures())[1] == expected


@pytest.mark.parametrize("texts, accuracy", [
    (["a red circle on a white background", "a blue cross on a black background"], 2 / 3), (["a cat", "a dog"], None)])
def test_accuracy_is_the_share_that_shows_its_own_prompt(tmp_path, monkeypatch, texts, accuracy):
    """Six pictures of two prompts in turn, of which the first two are exchanged."""
    images, labels = chapter.shapes(400, 16, 4)
    known = chapter.shape_captions()
    circle, cross = (chapter.to_floats(images[labels == known.index(text)][:1]) for text in
                     ("a red circle on a white background", "a blue cross on a black background"))
    run = drawn(monkeypatch, torch.cat([cross, circle, circle, cross, circle, cross]))
    run.config = SimpleNamespace(seed=0, data_size=64, image_size=16, model="", eval_size=6)
    run.folder, run.started = tmp_path, 0
    one = SimpleNamespace(prompts=SimpleNamespace(texts=texts), evaluations=6, drawn=6)
    monkeypatch.setattr(chapter, "samplers", lambda *arguments: {"one": one})
    monkeypatch.setattr(chapter, "draw_grid", lambda *arguments: None)
    chapter.report(run, SimpleNamespace(texts=texts, pipe=SimpleNamespace(unet=None)), [])
    row, = json.loads((tmp_path / "results.json").read_text())["networks"]["one"]
    assert row["accuracy"] == (accuracy and pytest.approx(accuracy))


# ---- Files that users bring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, words", [
    (b"", "holds no texts"), (b" \n\n", "holds no texts"), (b"a cat\n\xff\xfe\n", "utf-8"), (None, "No such file"),
])
def test_a_bad_prompt_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((chapter.UserError, OSError), match=words) as error:
        chapter.read_texts(path)
    assert "prompts.txt" in str(error.value) and "\n" not in str(error.value)


def test_prompt_files_of_any_system_are_read(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\n  ein B\u00e4r \n\u732b".encode())
    assert chapter.read_texts(tmp_path / "prompts.txt") == ["a cat", "ein B\u00e4r", "\u732b"]


def test_coco_captions_are_one_of_every_image(tmp_path):
    rows = [{"image_id": i // 5, "caption": f" text {i}.\n"} for i in range(20)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    assert chapter.read_texts(tmp_path / "captions.json") == ["text 0.", "text 5.", "text 10.", "text 15."]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"annotations": 3}', '{"annotations": []}',
                                     '{"annotations": [{"caption": "a"}]}', '{"annotations": [3]}'])
def test_captions_that_are_not_cocos_are_one_line(tmp_path, content):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(chapter.UserError, match="captions.json") as error:
        chapter.read_texts(tmp_path / "captions.json")
    assert "\n" not in str(error.value)


# ---- Whole runs ------------------------------------------------------------------------------------------------------


def unet(folder):
    """The U-Net of an exported network, as one vector."""
    return torch.cat([p.flatten() for p in chapter.load_pipeline(folder).unet.state_dict().values()])


def test_a_run_leaves_its_networks_numbers_and_figures(finished):
    folder, out = finished
    assert NETWORKS | {"run.json", "pairs", "grid.png", "results.json"} <= {path.name for path in folder.iterdir()}
    results = json.loads((folder / "results.json").read_text())["networks"]
    assert list(results) == ["teacher, 3 steps", "teacher as velocity, 1 step", "teacher as velocity, 4 steps",
                             "2-RF, 1 step", "2-RF, 4 steps", "2-RF distilled, 1 step", "teacher distilled, 1 step",
                             "teacher distilled longer, 1 step"]
    assert [rows[0]["NFE"] for rows in results.values()] == [6, 2, 8, 1, 4, 1, 1, 1]
    for rows in results.values():
        assert 0 <= rows[0]["accuracy"] <= 1 and rows[0]["FD"] > 0 and f"{rows[0]['FD']:.3f}" in out
    steps = {path.stem: int(list(csv.DictReader(path.open()))[-1]["step"]) for path in folder.glob("*.csv")}
    assert set(steps) == set(STAGES)                       # direct: distillation's budget; longer: and reflow's
    assert [steps[name] for name in STAGES[2:]] == [4, 4, 2, 4, 2, 8, 2]
    with Image.open(folder / "grid.png") as image:
        image.load()
        assert min(image.size) > 150 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_pairs_are_counted_and_named(finished):
    pairs = {folder.name: sum(len(torch.load(path, weights_only=True)["x1"]) for path in folder.iterdir())
             for folder in (finished.folder / "pairs").iterdir()}
    assert pairs == {"teacher": 24, "2-rf-0": 12}          # the longer direct distillation gets as many as both stages


def test_students_differ_from_the_teacher_and_say_what_they_predict(finished):
    teacher, *others = (unet(finished.folder / name) for name in
                        ("teacher", "2-rf-0", "distilled-0", "direct-0", "longer-0"))
    for i, network in enumerate(others):
        assert network.isfinite().all() and all((network - other).abs().max() > 1e-6 for other in [teacher, *others[:i]])
    said = {name: chapter.load_pipeline(finished.folder / name).configs["scheduler"]["prediction_type"]
            for name in NETWORKS}
    assert said == {name: "epsilon" if name == "teacher" else "velocity" for name in NETWORKS}


def test_diffusers_opens_the_exported_teacher(finished):
    """The folder is in the layout of diffusers: its pipeline loads it and its U-Net computes the same."""
    from diffusers import StableDiffusionPipeline
    theirs = StableDiffusionPipeline.from_pretrained(finished.folder / "teacher", safety_checker=None)
    ours = chapter.load_pipeline(finished.folder / "teacher")
    x, s, tokens = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), ours.tokenizer(["a red cross", ""])
    assert theirs.tokenizer(["a red cross", ""], padding="max_length").input_ids == tokens.tolist()
    text = ours.text_encoder(tokens)
    close(theirs.text_encoder(tokens).last_hidden_state, text, atol=1e-5)
    close(theirs.unet(x, s, text).sample, ours.unet(x, s, text), atol=1e-5)
    close(theirs.vae.decode(x).sample, ours.vae.decode(x), atol=1e-5)
    assert theirs.vae.config.scaling_factor == ours.vae.scale


def test_a_finished_run_is_measured_again_but_not_trained_again(finished, here, run, monkeypatch):
    folder = copy_run(finished, here)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".png"}

    def train(model, loss_fn, config, stream, progress):
        assert progress[2] == config.steps
        return iter(())
    monkeypatch.setattr(chapter, "train", train)
    code, _, err = run(*TINY)
    assert code == 0, err
    assert {path: path.read_bytes() for path in before} == before


def test_without_a_trained_backbone_lpips_has_a_random_one(finished, here, run, monkeypatch):
    """--lpips-weights auto, offline: the same run as with --lpips-weights random, and a line that says so."""
    copy_run(finished, here)
    whole = chapter.lpips.LPIPS

    def offline(**settings):
        if not settings["pnet_rand"]:
            raise OSError("no network")
        return whole(**settings)
    monkeypatch.setattr(chapter.lpips, "LPIPS", offline)
    monkeypatch.setattr(chapter.socket, "setdefaulttimeout", lambda seconds: None)     # it would outlive the test
    code, out, err = run(*TINY, "--lpips-weights", "auto")
    assert code == 0 and "random" in out.splitlines()[0] and "dry run" in out.splitlines()[0], err


def test_more_seeds_share_the_teacher(finished, here, run):
    folder = copy_run(finished, here)
    code, out, err = run(*TINY, "--seeds", 2)
    assert code == 0, err
    results = json.loads((folder / "results.json").read_text())["networks"]
    assert [len(rows) for rows in results.values()] == [1, 1, 1, 2, 2, 2, 2, 2]
    assert not torch.equal(unet(folder / "2-rf-0"), unet(folder / "2-rf-1"))
    assert torch.equal(unet(folder / "2-rf-0"), unet(finished.folder / "2-rf-0"))


def test_a_killed_run_goes_on_to_the_same_weights(finished, here, run):
    """kill -9 three times, each in the middle of a stage; in the end all is equal bit for bit."""
    folder = here / "runs" / NAME / "quick"
    for spy, kept, unfinished in [
            (kill_after_row("teacher", 4), ["vae"], ["teacher"]), (kill_in_shard(2), ["vae", "teacher"], []),
            (kill_after_row("distilled-0.1", 2, "after"), ["vae", "teacher", "2-rf-0.1"], ["distilled-0.1"])]:
        code = driver(NAME, spy)
        result = subprocess.run([sys.executable, "-c", code, *TINY], cwd=here, capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert {path.stem for path in folder.glob("*.pt")} == {*kept, *unfinished}
    code, _, err = run(*TINY)
    assert code == 0 and same_weights(folder, finished.folder, *STAGES), err
    assert all(torch.equal(unet(folder / name), unet(finished.folder / name)) for name in NETWORKS)
    assert (folder / "results.json").read_text() == (finished.folder / "results.json").read_text()
    assert not list(folder.rglob("*part*"))


def test_two_processes_share_the_work(here):
    """torchrun: both make pairs, one writes; the run ends with every network and no leftovers."""
    result = torchrun(chapter.__file__, *TINY, "--accumulate", 2, cwd=here)
    assert result.returncode == 0, result.stderr
    folder = here / "runs" / NAME / "quick"
    assert NETWORKS | {"results.json", "grid.png"} <= {path.name for path in folder.iterdir()}
    assert len(list((folder / "pairs" / "teacher").iterdir())) == 3 and not list(here.rglob(".part*"))
    assert all(unet(folder / name).isfinite().all() for name in NETWORKS)


def test_a_signal_in_the_middle_of_a_stage_loses_no_step(finished, here, run, monkeypatch):
    """Stopped after step 2 of 4 of reflow, by a signal that arrives while a step runs."""
    later = ["2-rf-0", "2-rf-0.1.pt", "pairs/2-rf-0", "distilled-0", "distilled-0.1.pt", "distilled-0.2.pt"]
    folder = copy_run(finished, here, *later)
    loss, steps = chapter.reflow_loss, []

    def interrupted(*arguments, **named):
        steps.append(0)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*arguments, **named)
    monkeypatch.setattr(chapter, "reflow_loss", interrupted)
    code, _, err = run(*TINY)
    assert code == 130 and "continues from here" in err and len(steps) == 2
    chapter.STOP.clear()                                   # a run of its own would begin without it
    code, _, err = run(*TINY)
    assert code == 0 and len(steps) == 4 and same_weights(folder, finished.folder, *STAGES), err


def test_a_given_teacher_with_its_own_prompts(finished, run, tmp_path):
    """--model: nothing tiny is trained; stacked students from its own weights; prompts nobody can read off a picture."""
    (tmp_path / "prompts.txt").write_text("a red circle\nsomething else\n")
    code, out, err = run(*TINY, "--model", finished.folder / "teacher", "--prompts", "prompts.txt", "--unet", "stacked",
                         "--init", "teacher", "--accumulate", 2, "--checkpointing", "--out", "mine")
    assert code == 0, err
    folder = tmp_path / "mine"
    results = json.loads((folder / "results.json").read_text())["networks"]
    assert all(row["accuracy"] is None for rows in results.values() for row in rows)
    assert not (folder / "vae.pt").exists() and not (folder / "teacher").exists()
    stacked, plain = chapter.load_pipeline(folder / "distilled-0").unet, chapter.load_pipeline(folder / "2-rf-0").unet
    assert isinstance(stacked, chapter.StackedUNet) and isinstance(plain, chapter.UNet)
    code, _, err = run("sample", "--model", folder / "distilled-0", "--prompt", "a red circle", "--device", "cpu")
    assert code == 0, err


def test_the_negated_start_is_nearer_to_the_velocity(finished):
    """The teacher's output is about +x0 where the target is x1 - x0: turning conv_out round is the better start."""
    pipe = chapter.load_pipeline(finished.folder / "teacher")
    x, s, text = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), torch.randn(2, 77, 8)
    turned = chapter.negated(pipe.unet)
    close(turned(x, s, text), -pipe.unet(x, s, text), atol=1e-6)


@pytest.mark.parametrize("args, words", [
    (("--steps", "0"), ("--steps 0",)), (("--stepz", "3"), ("--stepz",)), (("smaple", "--model", "x"), ("smaple",)),
    (("--model", "nowhere"), ("--prompts",)), (("--preset", "paper", "--accumulate", "1"), ("--model",)),
    (("--model", "nowhere at all", "--prompts", "README"), ("README",)),
    (("--reflow-steps", "3", "4"), ("--reflow-steps",)), (("--distill-steps", "3", "--distill-batch", "4"), ("2 numbers",)),
    (("--image-size", "17"), ("17",)), (("--channels", "6", "7"), ("UNet",)), (("--attention", "1"), ("attention",)),
    (("--lpips-weights", "nowhere.pth"), ("nowhere.pth",)), (("--prompts", "nowhere.txt"), ("nowhere.txt",)),
    (("--vae-batch", "5", "--accumulate", "2"), ("batch of 5",)),
])
def test_a_wrong_setting_is_one_line_and_leaves_nothing(run, tmp_path, args, words):
    code, _, err = run(*(() if args[0] == "smaple" else TINY), *args)
    assert code == 2
    one_line(err, *words)
    assert not list(tmp_path.iterdir())


# ---- sample ----------------------------------------------------------------------------------------------------------


def sampled(run, *args, out="sheet.png"):
    code, _, err = run("sample", *args, "--device", "cpu", "--out", out)
    assert code == 0, err
    return np.asarray(Image.open(out).convert("RGB")).astype(int)


def test_what_is_trained_is_what_is_sampled(finished, run):
    """One step of the distilled network from the noise of the seed, decoded, on the sheet; deterministic."""
    folder = finished.folder / "distilled-0"
    sheet = sampled(run, "--model", folder, "--prompt", "a blue cross on a white background", "--count", 4)
    assert sheet.shape == (18, 4 * 18, 3)                  # pictures of 16 x 16 with a line around each
    pipe = chapter.load_pipeline(folder)
    x0 = chapter.pair_noise(chapter.seed_for(0), torch.arange(4), (4, 8, 8))
    text = pipe.text_encoder(pipe.tokenizer(["a blue cross on a white background"])).expand(4, -1, -1)
    with torch.no_grad():
        images = pipe.vae.decode((x0 + pipe.unet(x0, torch.full((4,), 1000.0), text)) / pipe.vae.scale)
    expected = chapter.to_bytes(images)[3].permute(1, 2, 0).numpy().astype(int)
    assert abs(sheet[1:17, 55:71] - expected).max() <= 1
    assert (sheet == sampled(run, "--model", folder, "--prompt", "a blue cross on a white background", "--batch", 1)).all()
    assert (sheet != sampled(run, "--model", folder, "--prompt", "a blue cross on a white background", "--seed", 1)).any()


def test_sample_options_change_the_picture(finished, run):
    base = ("--model", finished.folder / "2-rf-0", "--prompt", "a red circle", "--count", 1)
    plain = sampled(run, *base, "--steps", 2)
    for more in (("--steps", 3), ("--steps", 2, "--guidance", 3.0), ("--steps", 2, "--guidance", 3.0, "--negative",
                                                                    "white")):
        assert (sampled(run, *base, *more) != plain).any()
    assert sampled(run, *base, "--size", 16, 24).shape == (18, 26, 3)
    assert sampled(run, *base[:2], "--prompt", "a red", "blue cross", "a", "--count", 2).shape == (54, 36, 3)
    assert sampled(run, "--preset", "teacher", "--model", finished.folder / "teacher", "--prompt", "x").shape == (18, 72, 3)


def lora(path, pipe, up=0.0, name="lora_unet_mid_block_attentions_0_proj_in"):
    """A LoRA of rank 1 for one layer of the U-Net."""
    shape = pipe.unet.mid_block.attentions[0].proj_in.weight.shape
    chapter.save_safetensors(Path(path), {f"{name}.lora_up.weight": torch.full((shape[0], 1, 1, 1), up),
                                    f"{name}.lora_down.weight": torch.ones(1, shape[1], 1, 1),
                                    f"{name}.alpha": torch.tensor(1.0)})
    return path


def test_merging_nothing_changes_nothing(finished, run):
    """A LoRA whose up is 0, a scale of 0, and the difference between a network and itself."""
    pipe, base = chapter.load_pipeline(finished.folder / "2-rf-0"), ("--model", finished.folder / "2-rf-0", "--prompt", "a red")
    plain = sampled(run, *base)
    lora("zero.safetensors", pipe), lora("one.safetensors", pipe, 1.0)
    for more in (("--lora", "zero.safetensors"), ("--lora", "one.safetensors:0"),
                 ("--lora", "one.safetensors:0.7", "one.safetensors:-0.7"),
                 ("--delta", finished.folder / "teacher", finished.folder / "teacher")):
        assert abs(sampled(run, *base, *more) - plain).max() <= 1
    assert (sampled(run, *base, "--lora", "one.safetensors") != plain).any()


def test_adding_the_difference_to_the_base_gives_the_other(finished, run):
    other = sampled(run, "--model", finished.folder / "2-rf-0", "--prompt", "a red")
    moved = sampled(run, "--model", finished.folder / "teacher", "--prompt", "a red", "--delta", finished.folder / "teacher",
                    finished.folder / "2-rf-0")
    assert abs(other - moved).max() <= 1


@pytest.mark.parametrize("args, words", [
    ((), ("--model",)), (("--model", "nowhere", "--prompt", "a"), ("nowhere", "folder")), (("--model", "FOLDER"), ("--prompt",)),
    (("--model", "FOLDER", "--prompt", ""), ("--prompt",)), (("--model", "FOLDER", "--prompt"), ("--prompt",)),
    (("--model", "FOLDER", "--prompt", "a", "--size", "15"), ("--size 15", "divisible by 2")),
    (("--model", "FOLDER", "--prompt", "a", "--size", "16", "16", "16"), ("--size",)),
    (("--model", "FOLDER", "--prompt", "a", "--steps", "0"), ("--steps",)),
    (("--model", "FOLDER", "--prompt", "a", "--solver", "dpm"), ("velocity", "--solver euler")),
    (("--model", "FOLDER", "--prompt", "a", "--lora", "nowhere.safetensors"), ("nowhere.safetensors",)),
    (("--model", "FOLDER", "--prompt", "a", "--lora", "wrong.safetensors:0.5"), ("wrong.safetensors", "lora_unet_no")),
    (("--model", "FOLDER", "--prompt", "a", "--delta", "FOLDER"), ("--delta", "two models")),
    (("--model", "FOLDER", "--prompt", "a", "--delta", "FOLDER", "nowhere"), ("nowhere",)),
    (("--model", "FOLDER", "--prompt", "a", "--out", "sheet.txt"), ("sheet.txt",)),
    (("--model", "FOLDER", "--prompt", "a", "--preset", "paper"), ("--preset",)),
])
def test_a_wrong_wish_is_one_line(finished, run, tmp_path, args, words):
    lora("wrong.safetensors", chapter.load_pipeline(finished.folder / "2-rf-0"), name="lora_unet_no_such_layer")
    folder = str(finished.folder / "2-rf-0")
    code, out, err = run("sample", *(folder if word == "FOLDER" else word for word in args))
    assert code == 2 and [path.name for path in tmp_path.iterdir()] == ["wrong.safetensors"], err
    one_line(err, *words)


@pytest.mark.parametrize("size", ["x", -1, 10 ** 12, [8, 8]])
def test_a_model_without_a_size_of_its_own_wants_one(finished, run, tmp_path, size):
    """What is no side is one line, unless --size says it."""
    shutil.copytree(finished.folder / "2-rf-0", tmp_path / "odd")
    path = tmp_path / "odd" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": size}))
    code, out, err = run("sample", "--model", "odd", "--prompt", "a", "--count", "1")
    assert code == 2 and not (tmp_path / "sample.png").exists()
    one_line(err, "sample_size", "--size")
    assert run("sample", "--model", "odd", "--prompt", "a", "--count", "1", "--size", "16")[0] == 0


def test_a_negative_prompt_matters_under_guidance(finished, run, tmp_path):
    """Guidance away from the prompt itself is none; the empty text's place is what it takes."""
    pictures = []
    for more in (("--guidance", "1"), ("--guidance", "9", "--negative", "a red cross"), ("--guidance", "9")):
        code, _, err = run("sample", "--model", finished.folder / "2-rf-0", "--prompt", "a red cross", *more)
        assert code == 0, err
        pictures.append(np.array(Image.open(tmp_path / "sample.png")).astype(int))
    assert abs(pictures[0] - pictures[1]).max() <= 1 < abs(pictures[0] - pictures[2]).max()


def test_weights_that_are_not_finite_draw_nothing(finished, run, tmp_path):
    shutil.copytree(finished.folder / "2-rf-0", tmp_path / "broken")
    path = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: torch.full_like(t, float("nan")) for name, t in chapter.load_safetensors(path).items()}
    chapter.save_safetensors(path, weights)
    code, out, err = run("sample", "--model", "broken", "--prompt", "a")
    assert code == 2 and not (tmp_path / "sample.png").exists()
    one_line(err, "not finite")


# ---- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory, vocabulary):
    """A tiny CLIP with random weights, as transformers saves it, with the tokenizer's files."""
    from transformers import CLIPConfig, CLIPModel
    size = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    vocab = json.loads(vocabulary[0].read_text())
    text = size | dict(vocab_size=len(vocab), eos_token_id=vocab["<|endoftext|>"], max_position_embeddings=77)
    vision = size | dict(image_size=24, patch_size=8, hidden_act="gelu")
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval()
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    for path in vocabulary:
        shutil.copy(path, folder)
    return folder, model


def test_the_clip_score_is_that_of_transformers(judge):
    folder, theirs = judge
    ours = chapter.CLIP(folder)
    images, captions = torch.rand(3, 3, 24, 24), ["a red cross", "a blue", ""]
    tokens = ours.tokenizer(captions)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.48145466, 0.4578275, 0.40821073),
                                                          (0.26862954, 0.26130258, 0.27577711)))
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=(images - mean) / std)
    close(ours.embed_images(2 * images - 1), expected.image_embeds, atol=1e-5)
    close(ours.embed_texts(captions), expected.text_embeds, atol=1e-5)


def test_the_clip_score_is_computed_where_its_networks_are(judge):
    """The meta device stands for any that is not the CPU; mixing the two would raise."""
    texts = chapter.CLIP(judge[0]).to("meta").embed_texts(["a red cross", "a blue"])
    assert texts.device.type == "meta" and texts.shape == (2, 6)


def test_evaluate_writes_its_numbers(finished, judge, run, tmp_path, monkeypatch):
    rows = [{"image_id": i, "caption": f"a {c} circle"} for i, c in enumerate(["red", "green", "blue"] * 2)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    for i, picture in enumerate(chapter.shapes(6, 32, 0)[0]):
        path = tmp_path / "real" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    monkeypatch.setattr(chapter, "inception_features", lambda *arguments: chapter.RandomFeatures())
    code, out, err = run("evaluate", "--model", finished.folder / "distilled-0", "--captions", "captions.json", "--count", 5,
                         "--clip", judge[0], "--fid", "--real", "real", "--device", "cpu", "--batch", 2)
    assert code == 0, err
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["captions"] == 5 and result["size"] == [16, 16] and result["FID"] > 0
    assert -1 <= result["CLIP score"] <= 1 and result["seconds per batch"] > 0


@pytest.mark.parametrize("part, change", [
    ("vision_config", {"num_attention_heads": None}), ("vision_config", {"patch_size": 0}),
    ("text_config", {"hidden_size": -8})])
def test_a_wrong_clip_is_one_line(judge, tmp_path, part, change):
    shutil.copytree(judge[0], tmp_path / "clip")
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config[part] |= change
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    with pytest.raises(chapter.UserError, match="no CLIP.* of these settings"):
        chapter.CLIP(tmp_path / "clip")


@pytest.mark.parametrize("args, words", [
    ((), ("--captions",)), (("--captions", "nowhere.json"), ("nowhere.json",)), (("--fid",), ("--captions",)),
    (("--captions", "c.txt", "--fid"), ("--real",)), (("--captions", "c.txt", "--fid", "--real", "no"), ("--real",)),
    (("--captions", "c.txt", "--clip", "nowhere"), ("nowhere",)),
    (("--captions", "c.txt", "--fid", "--real", ".", "--data-dir", "nowhere"), ("inception",)),
    (("--captions", "c.txt", "--model", "nowhere"), ("nowhere",)),
])
def test_a_wrong_evaluation_is_one_line(run, tmp_path, args, words):
    (tmp_path / "c.txt").write_text("a cat\na dog\n")
    code, _, err = run("evaluate", *args)
    assert code == 2 and [path.name for path in tmp_path.iterdir()] == ["c.txt"]
    one_line(err, *words)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_papers_batches_can_be_shared_by_so_many_processes(world):
    """The README's command on eight GPUs; the tiny autoencoder's batch does not matter where none is trained."""
    config = chapter.parse_config(chapter.Config, "--preset paper --model folder --prompts file".split())
    assert config.batch % (world * config.accumulate) == 0
    chapter.check_settings(SimpleNamespace(config=config, world=world))


def test_fewer_pairs_than_processes_are_refused():
    """Each draws from its own share of the pairs."""
    config = chapter.parse_config(chapter.Config, "--pairs 3".split())
    chapter.check_settings(SimpleNamespace(config=config, world=2))
    with pytest.raises(chapter.UserError, match="--pairs 3 .*4 processes"):
        chapter.check_settings(SimpleNamespace(config=config, world=4))


SCHEDULERS = {  # what a scheduler_config.json may say -> the words that name it
    "ours": ({"prediction_type": "velocity"}, "model predicts velocity"),
    "diffusers": ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction",
                   "use_flow_sigmas": True}, "model predicts velocity"),
    "matching": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": None}, "predicts velocity"),
    "instaflow": ({"_class_name": "InstaFlowScheduler"}, "model predicts velocity"),
    "zero": ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is true"),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is squaredcos_cap_v2")}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_is_no_teacher_can_be_sampled(finished, run, here, name):
    """A chain on it would train to its end and draw nonsense: a line before anything is written."""
    change, words = SCHEDULERS[name]
    (here / "prompts.txt").write_text("a red circle on a white background\n")
    shutil.copytree(finished.folder / "teacher", here / "model")
    path = here / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    code, _, err = run(*TINY, "--model", "model", "--prompts", "prompts.txt", "--out", "mine")
    assert code == 2 and not (here / "mine").exists()
    one_line(err, words)
    assert run("sample", "--model", "model", "--prompt", "a", "--solver", "dpm", "--steps", 2)[0] == 2
    assert run("sample", "--model", "model", "--prompt", "a")[0] == 0


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_diffusion_model_is_not_drawn_as_a_velocity(finished, run, here, kind):
    """By default a velocity is drawn; what calls itself epsilon may be one."""
    shutil.copytree(finished.folder / "teacher", here / "model")
    path = here / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": kind}))
    code, _, err = run("sample", "--model", "model", "--prompt", "a")
    assert code == 2 and sorted(os.listdir(here)) == ["model"]
    one_line(err, f"model predicts {kind}", "--solver dpm")
    assert run("sample", "--model", "model", "--prompt", "a", "--solver", "dpm", "--steps", 2)[0] == 0


@torch.no_grad()
@pytest.mark.parametrize("change", [{"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": None},
                                    {"prediction_type": "flow_prediction", "use_flow_sigmas": True}])
def test_flows_of_diffusers_are_drawn_as_diffusers_draws_them(finished, here, change):
    """Its networks predict x0 - x1, ours and InstaFlow's x1 - x0."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    shutil.copytree(finished.folder / "2-rf-0", here / "model")
    path = here / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    config = chapter.parse_config(chapter.DrawConfig, ["--model", "model", "--steps", "4", "--device", "cpu"])
    sampler, _ = chapter.open_sampler(SimpleNamespace(config=config, device=torch.device("cpu")), ["a red circle"])
    pipe, text = chapter.load_pipeline("model"), sampler.prompts(torch.zeros(2, dtype=torch.long))
    x0 = x = torch.randn(2, *sampler.prompts.pipe.shape)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25])
    for timestep in scheduler.timesteps:
        x = scheduler.step(pipe.unet(x, timestep.expand(2), text), timestep, x).prev_sample
    close(sampler(x0, text), x, atol=1e-4)


def test_a_fine_tune_brings_its_own_words(finished, run, here):
    """The text encoder of --delta was trained with its own tokenizer."""
    pictures = []
    for name in ("plain", "learnt"):
        shutil.copytree(finished.folder / "teacher", here / name)
        if name == "learnt":
            vocabulary = json.loads((here / "learnt/tokenizer/vocab.json").read_text())
            added = {"zorgle": vocabulary["red</w>"]}
            (here / "learnt/tokenizer/added_tokens.json").write_text(json.dumps(added))
    for prompt in ("a red circle", "a zorgle circle"):
        assert run("sample", "--model", "plain", "--delta", "plain", "learnt", "--prompt", prompt)[0] == 0
        pictures.append((here / "sample.png").read_bytes())
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize("kind, sign, words", [
    ("epsilon", 1, None), ("epsilon", -1, "predicts velocity"), ("v_prediction", -1, None), ("sample", -1, None)])
def test_a_velocity_that_calls_itself_noise_is_found_out(pipe, kind, sign, words):
    """InstaFlow's public files do; what it sees in pure noise x0 is about -x0."""
    pipe.configs["scheduler"] = {"prediction_type": kind}
    prompts = chapter.Prompts(pipe, ["a red circle"])
    pipe.unet = lambda x, s, text: sign * x + 0.5 * torch.randn_like(x)
    with pytest.raises(chapter.UserError, match=words) if words else nullcontext():
        chapter.check_teacher("model", prompts)


@pytest.mark.parametrize("kind, turned", [("epsilon", True), ("v_prediction", True), ("sample", False)])
def test_students_begin_near_a_velocity(tmp_path, pipe, monkeypatch, kind, turned):
    """The teacher's output with its sign changed, unless it holds the picture already."""
    starts = []
    for name in ("write_pairs", "load_pairs", "save_pipeline"):
        monkeypatch.setattr(chapter, name, lambda *arguments: None)
    monkeypatch.setattr(chapter, "train_student", lambda run, name, unet, *rest: starts.append(unet) or unet)
    pipe.configs["scheduler"] = {"prediction_type": kind}
    chapter.students(some_run(tmp_path), chapter.Prompts(pipe, ["a red circle"]), None, 0)
    assert len(starts) == 4
    for start in (starts[0], *starts[2:]):
        assert torch.equal(start.conv_out.weight, pipe.unet.conv_out.weight * (-1 if turned else 1))


def test_a_dollar_in_a_prompt_is_a_dollar(tmp_path):
    texts = ["a $5 cat", r"$\nosuchcommand{$", "100 % of a_b^2 \\ $", "$$"]
    pictures = torch.zeros(4, 3, 8, 8)
    chapter.draw_grid({"one": pictures, "two": pictures}, texts, tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size[0] > 100
