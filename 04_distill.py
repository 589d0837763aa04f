"""Chapter 4 - four ways to one step: what do straight pairs buy?

All four train the same network, v, through the same map, the jump to the data along the velocity,
    f(x, t) = x + (1 - t) v(x, t),   so that f(x, 1) = x whatever v is,
and one evaluation of f at the noise draws a picture.  They differ in where f's target comes from:
    rf           the end z1 of the flow's ODE from z0, made beforehand: |f(z0, 0) - z1|, then LPIPS            [Liu+22]
    progressive  two steps of the teacher; the student becomes the teacher, and steps are halved               [SH22]
    consistency  f itself, one small step of the teacher's ODE further on                                      [Song+23]
    ict          f itself, one small step of the straight line to the picture further on: no teacher           [SD24]
rf starts from 2-RF and its pairs; beside it stands `direct`, the same distillation of 1-RF without reflow first.  The
others start from 1-RF too.  Every method spends the same number of network evaluations (forward 1, backward 2, pairs
and teachers counted) on top of these two, and what reflow had cost is told beside it.
Diffusion's noise levels, y = x1 + sigma x0, are this set's times: t = 1 / (1 + sigma), x_t = t y.

    python 04_distill.py                                       # shapes, offline: teacher, reflow, all methods
    python 04_distill.py --checkpoint runs/04_distill/quick/rf.pt --samples 64 --out pictures   # or --export rf.pt2
    python 04_distill.py --preset gpu --download --teacher runs/02_reflow/gpu/1-rf.pt           # CIFAR-10

You will see, in runs/04_distill/quick/: methods.png (the same 16 noises through every method), quality.png (Frechet
distance, precision, recall, density, coverage), and a table of these with the evaluations and seconds spent.
[Liu+22] Flow Straight and Fast, arXiv 2209.03003.  [SH22] Salimans, Ho: Progressive Distillation, arXiv 2202.00512.
[Song+23] Consistency Models, arXiv 2303.01469.  [SD24] Song, Dhariwal: Improved Techniques for Training Consistency
Models, arXiv 2310.14189.  [Kyn+19] arXiv 1904.06991 and [Nae+20] arXiv 2002.09797 (precision ... coverage).
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import hashlib
import http.client
import io
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import ClassVar

import lpips
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from scipy.integrate import solve_ivp
from torch import nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------------------


# Copied from 01_rectified_flow.py
def option(default, help, choices=None, low=None, high=None, free=False):
    """One setting: default, help text, and what is allowed. `free` ones may change when a run is continued."""
    limits = {"help": help, "choices": choices, "low": low, "high": high, "free": free}
    return dataclasses.field(default=default, metadata=limits)


# Differs from 02_reflow.py: the methods and their constants, a budget shared by all, drawing and exporting
@dataclass
class Config:
    """Settings of this chapter; every field is a command-line flag."""
    preset: str = option("quick", "size of the run", choices=("quick", "gpu", "paper"))
    method: str = option("all", "which to train; rf brings its reflow and direct distillation along",
                         choices=("all", "rf", "progressive", "consistency", "ict"), free=True)
    data: str = option("shapes", "shapes, cifar10, or a folder of images in class sub-folders")
    data_dir: str = option("data", "where torchvision keeps CIFAR-10", free=True)
    download: bool = option(False, "fetch CIFAR-10, the Inception network or LPIPS's if missing", free=True)
    data_size: int = option(20000, "pictures of the procedural set", low=1)
    image_size: int = option(16, "side in pixels; a power of two", low=4, high=1024)
    teacher: str = option("", "a finished 1-rf.pt (chapters 2 and 4) in place of training 1-RF")
    reflow: str = option("", "a finished 2-rf.pt in place of training 2-RF; its cost counts as if it were trained here")
    conditional: bool = option(True, "feed class labels to the network")
    steps: int = option(1000, "training steps of the teacher, 1-RF", low=1)
    reflow_steps: int = option(1500, "training steps of 2-RF", low=1)
    distill_steps: int = option(350, "training steps of rf and direct; the others get what costs as much", low=1)
    batch: int = option(32, "images in a step, over all processes", low=1)
    pairs: int = option(3072, "pairs that 1-RF makes for reflow and direct, and 2-RF for rf", low=1)
    pair_solver: str = option("heun", "ODE solver that makes pairs", choices=("euler", "heun"))
    pair_steps: int = option(4, "its steps (heun takes two evaluations each)", low=1)
    jumps: int = option(1, "steps k that rf and direct are distilled to: times 0, 1/k, ..., (k-1)/k", low=1)
    lpips_share: float = option(0.5, "last share of rf's and direct's steps that measures LPIPS, not squares",
                                low=0.0, high=1.0)
    lpips_net: str = option("squeeze", "LPIPS backbone", choices=("vgg", "alex", "squeeze"))
    lpips_size: int = option(32, "images are upsampled to this side for LPIPS (the papers: 224)", low=32, high=512)
    lpips_weights: str = option("random", "pretrained (torchvision's, downloaded), random (dry run), or a file")
    halvings: int = option(4, "rounds of progressive distillation: 2^halvings Euler steps become 1", low=1, high=12)
    grid: int = option(18, "noise levels of consistency distillation", low=3, high=2000)
    distance: str = option("huber", "distance in consistency distillation", choices=("squared", "huber", "lpips"))
    target: str = option("student", "weights of the consistency target: the student's own, or their average",
                         choices=("student", "ema"))
    levels: tuple = option((10, 80), "noise levels of ict: first and last, doubled in between [SD24: 10 1280]", low=2)
    middle: float = option(0.549, "t at which two-step sampling adds noise again (sigma 0.821 [SD24])", low=0.0, high=1)
    shard: int = option(256, "pairs in a file, and images sampled at a time", low=1)
    channels: int = option(32, "width of the U-Net's first level; a multiple of 32, or 4, 8, 16", low=4)
    mult: tuple = option((1, 1, 1), "width of each level, in multiples of channels", low=1)
    blocks: int = option(1, "residual blocks of a level", low=1)
    attention: tuple = option((4,), "resolutions with self-attention", low=1)
    dropout: float = option(0.0, "dropout in the residual blocks of 1-RF and 2-RF", low=0.0, high=0.9)
    student_dropout: float = option(0.0, "the same of the four methods ([SD24]: 0.3 for ict)", low=0.0, high=0.9)
    lr: float = option(6e-3, "peak learning rate of 1-RF and 2-RF", low=0.0)
    student_lr: float = option(3e-3, "peak learning rate of the four methods", low=0.0)
    lr_decay: str = option("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup: int = option(50, "steps of linear warm-up", low=0)
    grad_clip: float = option(1.0, "largest gradient norm", low=0.0)
    ema_decay: float = option(0.998, "decay of the averaged weights", low=0.0, high=1.0)
    eval_size: int = option(500, "samples of every metric (the papers: 50000 for FID, 10000 for coverage)", low=8)
    neighbours: int = option(5, "k of precision, recall, density and coverage", low=1)
    fid: bool = option(False, "true FID: Inception features in place of the small random ones")
    inception: str = option("", "path of inception-2015-12-05.pt (default: in --data-dir)", free=True)
    seed: int = option(0, "seed of every random draw", low=0, high=2 ** 32 - 1)
    checkpoint: str = option("", "draw from this finished network of chapters 2 to 4 and end: --samples, --export",
                             free=True)
    samples: int = option(0, "with --checkpoint: pictures to draw in one step, into the folder --out", low=0, free=True)
    export: str = option("", "with --checkpoint: write the one-step generator for torch.export.load", free=True)
    log_every: int = option(100, "steps between log lines", low=1, free=True)
    checkpoint_every: int = option(200, "steps between checkpoints", low=1, free=True)
    device: str = option("auto", "cuda > mps > cpu", choices=("auto", "cuda", "mps", "cpu"), free=True)
    compile: bool = option(True, "torch.compile the network (CUDA only)", free=True)
    out: str = option("", "run folder (default runs/<script>/<preset>)", free=True)
    fresh: bool = option(False, "start over: delete what the run folder holds", free=True)
    presets: ClassVar = {
        "quick": {},
        "gpu": dict(                                       # one GPU, about half an hour after chapter 2's teacher
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=2, attention=(16,),
            dropout=0.1, batch=256, steps=12000, reflow_steps=2500, distill_steps=2000, lr=4e-4, student_lr=2e-4,
            warmup=200, ema_decay=0.999, pairs=50000, pair_steps=18, halvings=6, levels=(10, 160), shard=500,
            lpips_net="vgg", lpips_size=64, lpips_weights="pretrained", eval_size=10000, checkpoint_every=1000),
        "paper": dict(                                     # [Liu+22]'s sizes for reflow; every method costs 0.6 G
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=4, attention=(16,),
            dropout=0.15, batch=512, steps=600000, reflow_steps=300000, distill_steps=300000, lr=2e-4, student_lr=1e-4,
            lr_decay="constant", warmup=5000, ema_decay=0.9999, pairs=1000000, pair_steps=64, halvings=10,
            levels=(10, 1280), distance="lpips", lpips_net="vgg", lpips_size=224, lpips_weights="pretrained",
            shard=1000, eval_size=50000, checkpoint_every=10000),
    }


# Evaluations that one image costs in one training step: forward 1, backward 2, teacher and target 1 each.
COST = {"rf": 3, "direct": 3, "progressive": 5, "consistency": 6, "ict": 4}


# ----------------------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------------------


def jump(velocity, x, t):
    """f(x, t) = x + (1 - t) v(x, t): to the data in one step along the velocity; x (B, *D), t (B,) -> (B, *D).

    f(x, 1) = x for any network: the boundary condition of a consistency function [Song+23 eq. 5] comes for free.
    In the noise level, f = c_skip y + c_out v with c_skip = 1 / (1 + sigma) and c_out = sigma / (1 + sigma).
    """
    return x + (1 - t).reshape(-1, *[1] * (x.dim() - 1)) * velocity(x, t)


def move(velocity, x, t, s, heun=False):
    """One step of dz = v dt from times t to s (B,).  Euler here is DDIM, and Euler in the noise level, exactly.

    heun: the slope is the mean of both ends'.
    """
    step, v = (s - t).reshape(-1, *[1] * (x.dim() - 1)), velocity(x, t)
    return x + step * ((v + velocity(x + step * v, s)) / 2 if heun else v)


def distillation_loss(draw, distance, batch, jumps=1):
    """rf: D(f(x_t, t), z1) / (1 - t)^2 on stored pairs (z0, z1), t in {0, 1/k, ..., (k-1)/k}, k = jumps [Liu+22].

    draw: n -> z0, z1 (n, C, H, W), labels;  distance: (a, b, step) -> (B,).  For squares this is |v - (z1 - z0)|^2.
    With k = 1, t is exactly 0 and the network sees z0 alone; the original code's t = 0.001 leaks 0.1 % of the answer.
    """
    def loss_fn(model, ema, step):
        z0, z1, labels = draw(batch)
        t = torch.randint(jumps, (batch,), device=z0.device) / jumps
        z1_hat = jump(partial(model, labels=labels), interpolate(z0, z1, t), t)
        return distance(z1_hat, z1, step) / (1 - t) ** 2
    return loss_fn


def progressive_loss(draw, teacher, batch, steps):
    """progressive: one step of the student, of 1/N, is to end where two of the teacher end [SH22 algorithm 2].

    From t in {0, 1/N, ..., (N-1)/N} two Euler (DDIM) steps of the teacher lead to x_s, s = t + 1/N.  One step of the
    student ends at x_t + (s - t) v, so v is to be (x_s - x_t) / (s - t), the mean of the teacher's two velocities.
    The paper regresses the picture x_t + (1 - t) v with weight max(SNR, 1), SNR = t^2 / (1 - t)^2; errors there are
    1 - t times those of v, which makes max(t, 1 - t)^2 on velocities.  steps: N, the student's.
    """
    def loss_fn(model, ema, step):
        x0, x1, labels = draw(batch)
        t = torch.randint(steps, (batch,), device=x0.device) / steps
        middle, s, guide = t + 0.5 / steps, t + 1 / steps, partial(teacher, labels=labels)
        xt = interpolate(x0, x1, t)
        xs = move(guide, move(guide, xt, t, middle), middle, s)
        error = (model(xt, t, labels) - (xs - xt) * steps).square().flatten(1).mean(1)
        return torch.maximum(t, 1 - t) ** 2 * error
    return loss_fn


def consistency_distillation_loss(draw, teacher, times, distance, batch, averaged=False):
    """consistency: D(f(x_t, t), f^-(x_r, r)), t < r neighbours, x_r the teacher's Heun step from x_t [Song+23 eq. 7].

    times: from 1 (data) down to the noise, as karras_times makes them.  f^- is f without gradient, by the student's own
    weights as on CIFAR-10 or, if averaged, by their EMA.  At r = 1 it is x_r itself: that end pins all the others.
    """
    def loss_fn(model, ema, step):
        x0, x1, labels = draw(batch)
        i = torch.randint(len(times) - 1, (batch,), device=x0.device)
        r, t = times[i], times[i + 1]
        xt = interpolate(x0, x1, t)
        xr = move(partial(teacher, labels=labels), xt, t, r, heun=True)
        target = partial(ema.model if averaged else model, labels=labels)
        return distance(*both_ends(partial(model, labels=labels), xt, t, target, xr, r), step)
    return loss_fn


def consistency_training_loss(draw, batch, steps, levels, device=None):
    """ict: huber(f(x_t, t), f^-(x_r, r)) / (sigma_t - sigma_r), both on one line: x_r = (1 - r) x0 + r x1 [SD24].

    No teacher: on average over x0, x1 given x_t, the line's step is Euler's with the exact velocity.  The number of
    levels doubles along training, and the pair is drawn from a lognormal of the noise level: see ict_levels, ict_grid.
    """
    def loss_fn(model, ema, step):
        x0, x1, labels = draw(batch)
        times, chances, weights = ict_grid(ict_levels(step, steps, *levels), device)
        i = torch.multinomial(chances, batch, replacement=True)
        r, t = times[i], times[i + 1]
        flow = partial(model, labels=labels)
        return weights[i] * pseudo_huber(*both_ends(flow, interpolate(x0, x1, t), t, flow, interpolate(x0, x1, r), r))
    return loss_fn


def both_ends(velocity, xt, t, target, xr, r):
    """f(x_t, t) with gradient, and f(x_r, r) by `target` without, under the same dropout mask [SD24]."""
    seed = torch.initial_seed() + 1                        # the loop seeds every step anew, so this differs by step
    torch.manual_seed(seed)
    y = jump(velocity, xt, t)                              # first: autocast would keep weights cast without gradient
    torch.manual_seed(seed)
    with torch.no_grad():
        return y, jump(target, xr, r)


def karras_times(n, low=0.002, high=80.0, rho=7):
    """n times t = 1/(1 + sigma_i) from data to noise, sigma_i^(1/rho) linear between low and high [Karras+22 eq. 5].

    The first level is 0 in place of `low`, so that t = 1 is in the grid: there f is the identity and needs no learning.
    Returns (n,) float64: 1 ... 1/81; in float32 neighbours near 1 would come too close.
    """
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    sigma = (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    return 1 / (1 + torch.cat([sigma.new_zeros(1), sigma[1:]]))


def ict_levels(step, steps, first, last):
    """N(k) = min(first 2^floor(k/K'), last) + 1 noise levels, K' = floor(K / (floor(log2(last/first)) + 1)) [SD24]."""
    period = max(1, steps // (int(math.log2(last // first)) + 1))
    return min(first * 2 ** (step // period), last) + 1


def ict_chances(times, mean=-1.1, std=2.0):
    """Chance of each interval of times (n,): mass of log sigma ~ N(mean, std^2) between its ends [SD24].  (n-1,)."""
    log_sigma = torch.log((1 - times) / times)             # -inf at t = 1, where erf is -1
    mass = torch.erf((log_sigma - mean) / (std * 2 ** 0.5)).diff()
    return mass / mass.sum()


@lru_cache(maxsize=16)
def ict_grid(n, device=None):
    """Times (n,), chances and weights (n-1,) of their intervals, on the device, made once per number of levels.

    The weight is 1 / (sigma_t - sigma_r) = t r / (r - t), computed in float64, as r - t goes down to 4e-5.
    """
    times = karras_times(n)
    r, t = times[:-1], times[1:]
    return [x.float().to(device) for x in (times, ict_chances(times), t * r / (r - t))]


# Differs from 03_improved_training.py: the constant of [SD24], sqrt(d) where [Lee+24] has d, and no 1/d
def pseudo_huber(a, b):
    """sqrt(|a - b|^2 + c^2) - c with c = 0.00054 sqrt(d), d entries a sample [SD24].  a, b: (B, *D).  Returns (B,)."""
    c = 0.00054 * a[0].numel() ** 0.5
    return ((a - b).flatten(1).square().sum(1) + c ** 2).sqrt() - c


# Copied from 01_rectified_flow.py
def interpolate(x0, x1, t):
    """The straight line x_t = (1 - t) x0 + t x1 [Liu+22 eq. 1].  x0, x1: (B, *D), t: (B,).  Returns (B, *D)."""
    t = t.reshape(-1, *[1] * (x0.dim() - 1))               # (B, 1, ..., 1)
    return (1 - t) * x0 + t * x1


# Copied from 01_rectified_flow.py
def flow_matching_loss(velocity, x0, x1, t):
    """|x1 - x0 - v(x_t, t)|^2 per sample, mean over D [Liu+22 eq. 1].

    velocity: (x (B, *D), t (B,)) -> (B, *D);  x0: (B, *D) noise;  x1: (B, *D) data, paired with x0.  Returns (B,).
    Raises ValueError if the pairs do not match in shape.
    """
    if x0.shape != x1.shape or t.shape != x0.shape[:1]:
        raise ValueError(f"want (B, *D) twice and (B,), got {tuple(x0.shape)}, {tuple(x1.shape)}, {tuple(t.shape)}")
    xt = interpolate(x0, x1, t)
    return (velocity(xt, t) - (x1 - x0)).square().flatten(1).mean(1)


# Copied from 02_reflow.py
def edm_velocity(network, xt, t, sigma_data=0.5):
    """A raw network F as a velocity, scaled as in [Karras+22] so that F sees and gives numbers of size one at every t.

        v = (s^2 t - (1 - t)) / D x_t + s / sqrt(D) F(x_t / sqrt(D), ln(sigma) / 4),   D = (1 - t)^2 + s^2 t^2

    where sigma = (1 - t) / t is the noise-to-signal ratio.  The first term is the exact answer for data ~ N(0, s^2);
    at t = 0 it is -x_t, so that one Euler step x0 + v = s F holds no leftover noise.
    network: (x, noise_label (B,)) -> (B, *D);  xt: (B, *D);  t: (B,) in [0, 1].
    """
    time = t.reshape(-1, *[1] * (xt.dim() - 1))            # (B, 1, 1, 1)
    variance = (1 - time) ** 2 + (sigma_data * time) ** 2
    output = network(xt / variance.sqrt(), torch.logit(1 - t, eps=1e-5) / 4)
    return (sigma_data ** 2 * time - (1 - time)) / variance * xt + sigma_data / variance.sqrt() * output


# Copied from 02_reflow.py
def make_pairs(velocity, folder, config, shape, device, stream):
    """Reflow's coupling (z0, z1 = ODE[v](z0)) [Liu+22] for indices 0 ... config.pairs - 1, in files.

    Only z1 is stored, as bytes: z0 is pair_noise of the index.  A killed run loses at most the shard in hand, and each
    process of a torchrun makes every world-th shard.  velocity: (x (B, *shape), t (B,), labels) -> (B, *shape).
    """
    rank, world = process()
    todo = [i for i in range(rank, math.ceil(config.pairs / config.shard), world) if not shard_file(folder, i).exists()]
    with postponed_signals() as caught:
        for i in tqdm(todo, f"pairs for {folder.name}", disable=None):
            index = torch.arange(i * config.shard, min((i + 1) * config.shard, config.pairs), device=device)
            z0 = pair_noise(seed_for(config.seed, stream), index, shape)
            z1 = sample(velocity, z0, index, config.pair_steps, config.pair_solver)
            if not z1.isfinite().all():                    # as bytes nobody would notice
                raise UserError(f"the samples of the flow before {folder.name} are not finite; lower --lr, add --fresh")
            save_array(shard_file(folder, i), to_bytes(z1))
            if caught:
                raise KeyboardInterrupt


# Copied from 02_reflow.py
def pair_noise(seed, index, shape):
    """Standard normal z0 (B, *shape) as a pure function of seed and index (B,): any pair's noise, on any device, anew.

    splitmix64 [Steele, Lea, Flood 2014] scrambles a counter into 64 random bits; Box-Muller makes them Gaussian.
    """
    size = math.prod(shape)
    bits = index[:, None] * size + torch.arange(size, device=index.device)         # (B, size): a counter
    bits = bits * -0x61C8864680B583EB + (seed << 31)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):   # int64 wraps around
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * factor                      # & makes >> unsigned
    radius = (-2 * ((bits >> 40 & 0xFFFFFF) + 0.5).div(1 << 24).log()).sqrt()
    return (radius * (2 * math.pi / (1 << 24) * (bits & 0xFFFFFF)).cos()).reshape(-1, *shape)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def pair_cost(config):
    """Network evaluations of one set of pairs."""
    return config.pairs * config.pair_steps * (2 if config.pair_solver == "heun" else 1)


def budget(config):
    """Network evaluations that every method may spend: those of rf's pairs and training."""
    return pair_cost(config) + 3 * config.batch * config.distill_steps


def steps_for(method, config):
    """Training steps of a method for the common budget.  rf and direct also make pairs from it."""
    if method in ("rf", "direct"):
        return config.distill_steps
    return max(1, round(budget(config) / (COST[method] * config.batch)))


def halving_steps(config):
    """(Euler steps of the student, its training steps) for every round of progressive distillation.

    All rounds get one share of the budget but the last two, the hard ones, which get two [SH22].
    """
    sizes = [2 ** i for i in reversed(range(config.halvings))]
    shares = [2 if n <= 2 else 1 for n in sizes]
    total = steps_for("progressive", config)
    return [(n, max(1, round(total * share / sum(shares)))) for n, share in zip(sizes, shares)]


def make_distance(name, config, device, switch=0):
    """(a, b, step) -> (B,) for pictures (B, C, H, W): squared, huber, or lpips (squared before step `switch`)."""
    perceptual = None
    if name == "lpips":
        perceptual = place(Perceptual(config.lpips_net, config.lpips_size, config.lpips_weights), device)

    def distance(a, b, step):
        if name == "huber":
            return pseudo_huber(a, b)
        return perceptual(a, b) if perceptual and step >= switch else (a - b).square().flatten(1).mean(1)
    return distance


# Copied from 03_improved_training.py
class Perceptual(nn.Module):
    """LPIPS [Zhang+18] by the lpips package: images a, b (B, 3, H, W) in [-1, 1] -> distances (B,).

    Both are upsampled first, bilinearly, because the backbone was trained on larger pictures.  In float32 throughout:
    differences of normalised features lose too much in bf16.
    """

    def __init__(self, net, size, weights, factor=1.0):
        super().__init__()
        self.size, self.factor = size, factor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                # lpips calls torchvision by an old name
            self.lpips = load_lpips(net, weights).eval().requires_grad_(False)

    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            a, b = (F.interpolate(x.float(), (self.size, self.size), mode="bilinear") for x in (a, b))
            return self.factor * self.lpips(a, b).flatten()


# Copied from 03_improved_training.py
def load_lpips(net, weights):
    """LPIPS with a backbone that is pretrained (downloaded), read from a file, or random.

    A random backbone goes without the linear heads: they weigh channels of the trained one.
    """
    if weights == "pretrained":
        try:
            return lpips.LPIPS(net=net, verbose=False)
        except Exception as error:                         # no network, no disk, half a download in torch's cache
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"no pretrained {net} for LPIPS ({reason}): pass --lpips-weights FILE (torchvision's state "
                            "dict), or --lpips-weights random for a dry run") from None
    torch.manual_seed(0)                                   # an untrained yardstick, but the same one every time
    network = lpips.LPIPS(net=net, pnet_rand=True, lpips=weights != "random", verbose=False)
    if weights != "random":
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            own = {name: state["features." + name.split(".", 1)[1]] for name in network.net.state_dict()}
            network.net.load_state_dict(own)
        except Exception as error:                         # torch.load has no common class for broken files
            raise UserError(f"--lpips-weights {weights}: no {net} of torchvision ({type(error).__name__})") from None
    return network


# Copied from 02_reflow.py
def pair_loss(draw, config, device):
    """The loss_fn of this chapter: uniform times on draw(n) -> x0, x1 (n, C, H, W), labels (n,) or None."""
    batch = config.batch // process()[1]

    def loss_fn(model, ema, step):
        x0, x1, labels = draw(batch)
        return flow_matching_loss(partial(model, labels=labels), x0, x1, torch.rand(batch, device=device))
    return loss_fn


# Copied from 02_reflow.py
def draw_independent(images, labels, classes):
    """1-RF's coupling: pictures with noise drawn apart.  images: uint8 (N, C, H, W), already on the device.

    Mirroring doubles the data here; on reflow's pairs it would tear z1 from its z0.
    """
    def draw(n):
        index = torch.randint(len(images), (n,), device=images.device)
        x1 = to_floats(images[index])
        x1 = torch.where(torch.rand(n, 1, 1, 1, device=x1.device) < 0.5, x1.flip(3), x1)
        return torch.randn_like(x1), x1, labels[index] if classes else None
    return draw


# Copied from 02_reflow.py
def draw_stored(z1, seed, classes):
    """A reflow round's coupling: one index picks both ends.  z1: uint8 (N, C, H, W) on the device."""
    def draw(n):
        index = torch.randint(len(z1), (n,), device=z1.device)
        x1 = to_floats(z1[index])
        return pair_noise(seed, index, x1.shape[1:]).to(x1), x1, index % classes if classes else None
    return draw


# Copied from 01_rectified_flow.py
def train(model, loss_fn, config, optimizer=None, ema=None, start=0, stream=0):
    """Minimise E[loss_fn] with AdamW; yields (step, loss, ema) after every update; all the rest is the caller's.

    loss_fn: (model, ema, step) -> (B,) losses; it draws its own batch: which pairs, which times, which distance.
    optimizer, ema, start: given to continue a run.  stream: which random stream; resumed steps draw what they drew.
    Yields step (counted from 1), loss: () detached, still on the device (reading it waits for the GPU), ema: EMA.
    """
    optimizer = optimizer or make_optimizer(model, config)
    ema = ema or EMA(model, config.ema_decay)
    network, autocast = accelerate(model, config)
    for step in range(start, config.steps):
        torch.manual_seed(seed_for(config.seed, stream, step, process()[0]))
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        with autocast:
            loss = loss_fn(network, ema, step).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model, step)
        yield step + 1, loss.detach(), ema


# Copied from 01_rectified_flow.py
def learning_rate(step, config):
    """Linear warm-up to config.lr, then constant or a half cosine to 0."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    decay = (1 + math.cos(math.pi * step / config.steps)) / 2 if config.lr_decay == "cosine" else 1.0
    return config.lr * warm * decay


# Copied from 01_rectified_flow.py
class EMA:
    """Average of the weights over training, a better sampler than the last ones: a <- a + (1 - d)(w - a).

    The decay d grows as (1 + step) / (10 + step) up to its final value, so that early averages forget the random start.
    ema.model is the averaged network; ema(x, t) evaluates it.
    """

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    def __call__(self, *inputs):
        return self.model(*inputs)

    @torch.no_grad()
    def update(self, model, step):
        """One fused pass over all tensors; in place, because compiled graphs remember addresses."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
# ----------------------------------------------------------------------------------------------------------------------
# Sampling and metrics
# ----------------------------------------------------------------------------------------------------------------------


def consistency_sample(velocity, x0, times, noises=()):
    """Multistep consistency sampling [Song+23 algorithm 1]: jump to the data, add noise again, jump again.

    x0: (B, *D) standard normal, taken for x_t at times[0], the noisiest level that was trained;  times: increasing;
    noises: fresh x0's, one for each time but the first.  Returns x1 (B, *D).
    """
    start, *later = (x0.new_full(x0.shape[:1], t) for t in times)
    x1 = jump(velocity, (1 - times[0]) * x0, start)
    for t, noise in zip(later, noises, strict=True):
        x1 = jump(velocity, interpolate(noise, x1, t), t)
    return x1


def draw_images(velocity, config, shape, device, nfe, start=0.0):
    """config.eval_size samples in [-1, 1] on the CPU, from the same noises for every network.

    start > 0 (consistency and ict): jumps from times `start` and, for a second one, --middle; else nfe Euler steps.
    """
    images = []
    for index in torch.arange(config.eval_size, device=device).split(config.shard):
        z0, again = (pair_noise(seed_for(config.seed, stream), index, shape) for stream in (999, 998))
        if start:
            flow = partial(velocity, labels=index % velocity.classes if velocity.classes else None)
            images.append(consistency_sample(flow, z0, (start, config.middle)[:nfe], [again][:nfe - 1]).cpu())
        else:
            images.append(sample(velocity, z0, index, nfe).cpu())
    return torch.cat(images).clamp(-1, 1)


def manifold_metrics(real, fake, k=5):
    """Precision and recall [Kyn+19], density and coverage [Nae+20] of features (N, F) and (M, F).

    A ball around every point reaches to its k-th neighbour in its own set.  precision: share of fakes in some real
    ball; recall: share of reals in some fake ball; density: real balls around a fake, over k; coverage: share of real
    balls that hold a fake.  Only numbers at equal N and M compare; at M = N, fakes as good as data give density 1 and
    coverage 1 - 2^-k.  Precision and recall of such fakes depend on the features: look at the row of real data.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} points, got {len(real)} and {len(fake)}")
    real, fake = real.double(), fake.double()
    reach_real, reach_fake = (torch.cat([torch.cdist(rows, x).kthvalue(k + 1).values for rows in x.split(1000)])
                              for x in (real, fake))       # k + 1: the nearest is the point itself
    in_real, in_fake, near, covered = [], [], [], []
    for rows, reach in zip(real.split(1000), reach_real.split(1000)):
        distance = torch.cdist(rows, fake)                 # (rows, M)
        inside = distance < reach[:, None]
        near.append(inside.sum(0))
        covered.append(inside.any(1))
        in_fake.append((distance < reach_fake).any(1))
    near = torch.stack(near).sum(0)
    in_real = near > 0
    return {"precision": in_real.double().mean().item(), "recall": torch.cat(in_fake).double().mean().item(),
            "density": near.double().mean().item() / k, "coverage": torch.cat(covered).double().mean().item()}


def image_features(images, features, device, size=500):
    """Features (N, F) on the CPU of uint8 or float images (N, C, H, W), in batches."""
    chunks = (batch.to(device) for batch in images.split(size))
    return torch.cat([features(to_floats(x) if x.dtype == torch.uint8 else x).cpu() for x in chunks])


# Copied from 02_reflow.py
def sample(velocity, z0, index, steps, method="euler", tolerance=1e-5):
    """Where the flow carries z0 (B, C, H, W).  Pair i has label i modulo the number of classes, if there are any."""
    labels = index % velocity.classes if velocity.classes else None
    flow = partial(velocity, labels=labels)
    return integrate_adaptive(flow, z0, tolerance)[-1] if method == "rk45" else integrate(flow, z0, steps, method)[-1]


# Copied from 02_reflow.py
class Velocity:
    """A finished network ready to sample: compiled, bf16 autocast on CUDA, float32 in and out, counting evaluations."""

    def __init__(self, flow, config):
        device = next(flow.parameters()).device
        if device.type == "cuda" and config.compile:
            flow.compile(dynamic=False)
        self.flow, self.classes, self.evaluations = flow, flow.model.classes, 0
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    @torch.no_grad()
    def __call__(self, x, t, labels=None):
        self.evaluations += 1
        with self.autocast:
            return self.flow(x, t, labels).float()


# Copied from 01_rectified_flow.py
@torch.no_grad()
def integrate(velocity, x0, steps, method="euler"):
    """Solve dz = v(z, t) dt from t = 0 (x0) to t = 1.  To go back to noise, integrate -v(x, 1 - s).

    "euler": z += v/N, N evaluations.  "heun": slope averaged over both ends of a step, 2N.  "rk45": scipy's adaptive
    solver at tolerance 1e-5, steps ignored, the whole batch one state as in [Liu+22].
    x0: (B, *D).  Returns the path (steps + 1, B, *D), or (2, B, *D) for rk45; [0] is x0, [-1] the samples.
    """
    if method not in ("euler", "heun", "rk45") or steps < 1:
        raise ValueError(f"method {method!r} must be euler, heun or rk45, and steps {steps} at least 1")
    if method == "rk45":
        return integrate_adaptive(velocity, x0)
    path = [x0]
    for i in range(steps):
        z, t = path[-1], x0.new_full(x0.shape[:1], i / steps)
        v = velocity(z, t)
        if method == "heun":
            v = (v + velocity(z + v / steps, t + 1 / steps)) / 2
        path.append(z + v / steps)
    return torch.stack(path)


# Copied from 01_rectified_flow.py
def integrate_adaptive(velocity, x0, tolerance=1e-5):
    """Dormand-Prince 5(4) by scipy, which wants one flat float64 vector.  Returns (2, B, *D): start and end."""
    def slope(t, flat):
        z = torch.as_tensor(flat, dtype=x0.dtype).to(x0.device).reshape(x0.shape)
        return velocity(z, x0.new_full(x0.shape[:1], t)).cpu().double().numpy().ravel()
    solution = solve_ivp(slope, (0.0, 1.0), x0.cpu().double().numpy().ravel(), "RK45", rtol=tolerance, atol=tolerance)
    if not solution.success:
        raise UserError(f"rk45 gave up at t = {solution.t[-1]:.3f} ({solution.message}); lower --lr, add --fresh")
    return torch.stack([x0, torch.as_tensor(solution.y[:, -1], dtype=x0.dtype).to(x0.device).reshape(x0.shape)])


# Copied from 02_reflow.py
class RandomFeatures(nn.Module):
    """Seeded random convolutional features (not FID): images (B, 3, S, S) in [-1, 1] -> features (B, 96).

    Four untrained 3x3 convolutions, each at half the resolution of the one before; the mean and standard deviation
    of every channel. They rank samples of one data set; the numbers mean nothing beside anybody else's FID.
    """

    def __init__(self, channels=12, scales=4, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)  # its own: the yardstick is the same in every run
        for i in range(scales):
            weight = torch.randn(channels, channels if i else 3, 3, 3, generator=generator)
            weight[3:] -= weight[3:].mean((2, 3), keepdim=True)  # sees edges; the first three channels see colour too
            weight *= (2 / weight.square().sum((1, 2, 3), keepdim=True)).sqrt()
            self.register_buffer(str(i), weight)

    @torch.no_grad()
    def forward(self, x):
        features = []
        for weight in self.buffers():
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")  # zeros would draw a frame around every picture
            x = F.leaky_relu(F.conv2d(x, weight), 0.2)
            features += [x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-6).sqrt()]
            x = F.avg_pool2d(x, 2) if x.shape[-1] > 1 else x
        return torch.cat(features, dim=1)


# Copied from 02_reflow.py
def moments(features):
    """Features (N, F) -> their mean (F,) and covariance (F, F) in float64: all that a Fréchet distance looks at."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, F) with N >= 2, got {tuple(features.shape)}")
    features = features.cpu().double()  # the CPU first: MPS has no float64
    centred = features - features.mean(0)
    return features.mean(0), centred.T @ centred / (len(features) - 1)


# Copied from 02_reflow.py
def frechet_from_moments(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|² + tr(cov_a + cov_b - 2 (cov_a cov_b)^½): squared Wasserstein-2 distance of two Gaussians."""
    def root(cov):  # symmetric square root; eigenvalues that rounding made negative are zeros
        values, vectors = torch.linalg.eigh(cov)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
    if not distance.isfinite():  # a diverged network has no distance; eigh would raise
        return float("inf")
    # tr (cov_a cov_b)^½ is the sum of the singular values of cov_a^½ cov_b^½: nothing complex, nothing singular
    distance -= 2 * torch.linalg.svdvals(root(cov_a) @ root(cov_b)).sum()
    return max(distance.item(), 0.0)  # equal inputs may land at -1e-15


# Copied from 02_reflow.py
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
# Copied from 02_reflow.py
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


# Copied from 02_reflow.py
def inception_features(path=None, download=False, folder="data", device="cpu"):
    """The network of the original FID as a function: images (B, 3, S, S) in [-1, 1] -> features (B, 2048)."""
    file = Path(path or Path(folder) / Path(INCEPTION_URL).name)
    fetch = download and not path and not file.exists()
    try:
        data = urllib.request.urlopen(INCEPTION_URL, timeout=60).read() if fetch else file.read_bytes()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"no Inception network ({error}): pass --download, or get {INCEPTION_URL} as {file}") from error
    if hashlib.sha256(data).hexdigest() != INCEPTION_SHA256:  # before loading it: TorchScript is a program
        where = INCEPTION_URL if fetch else file
        raise UserError(f"{where} is broken or another file (wrong sha256): delete your copy and pass --download")
    if fetch:
        with replacing(file) as part:
            part.write_bytes(data)
    network = torch.jit.load(io.BytesIO(data), map_location=device).eval()

    @torch.no_grad()
    def features(images):  # it wants the bytes that an image file would hold, and resizes to 299 x 299 by itself
        return network((images * 127.5 + 128).clamp(0, 255).to(torch.uint8), return_features=True).float()

    return features


# Differs from 02_reflow.py: by image_features, which the other metrics want too
def data_moments(images, features, name, device):
    """Moments of the training set's features, kept in runs/cache under a hash of its bytes."""
    digest = hashlib.sha256(images.contiguous().numpy()).hexdigest()[:16]
    path = Path(f"runs/cache/{name}-{digest}.pt")
    if not path.exists():
        mean, cov = moments(image_features(images, features, device))
        save_checkpoint(path, config={"features": name}, mean=mean, cov=cov)
    content = load_checkpoint(path, keys=("mean", "cov"))
    return content["mean"], content["cov"]


# Differs from 02_reflow.py: two kinds of sampling, precision to coverage, and the distance to the teacher's own samples
def evaluate(networks, real, held_out, features, config, shape, device, start, aim=None):
    """Every number of one method.  networks: evaluations -> velocity to use with so many;  start: see draw_images.

    real: moments of the training set's features;  held_out: features of as many real pictures as samples;
    aim: pictures of the teacher's ODE from the same noises.  Returns a dict of numbers and a dict of samples.
    """
    result, pictures = {"FD": {}}, {}
    for nfe, velocity in networks.items():
        images = draw_images(velocity, config, shape, device, nfe, start)
        found = image_features(images, features, device)
        result["FD"][str(nfe)] = frechet_from_moments(*moments(found), *real)
        if len(pictures) == 0:
            result |= manifold_metrics(held_out, found[:len(held_out)], config.neighbours)
            result["to_teacher"] = None if aim is None else (images - aim).square().mean().item()
        pictures[nfe] = images[:16]
    return result, pictures


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


# Copied from 02_reflow.py
def to_floats(images):
    """Bytes 0 ... 255 to [-1, 1]."""
    return images.float() / 127.5 - 1


# Copied from 02_reflow.py
def to_bytes(images):
    """[-1, 1] to the nearest byte, values outside clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


# Copied from 02_reflow.py
def to_device(images, device):
    """The whole set as bytes on the device, in the layout of the network; indexing keeps both."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return images.to(device).contiguous(memory_format=layout)


# Copied from 02_reflow.py
def shard_file(folder, i):
    """Where shard i of the pairs lies."""
    return folder / f"{i:05d}.npy"


# Copied from 02_reflow.py
def save_array(path, tensor):
    """A tensor as .npy, written whole.  By way of memory: np.save to a file does not notice a disk that fills up."""
    file = io.BytesIO()
    np.save(file, tensor.cpu().numpy())
    with replacing(path) as part:
        part.write_bytes(file.getvalue())


# Copied from 02_reflow.py
def load_pairs(folder, config, shape, device):
    """All z1 (N, *shape) uint8, on the device.  UserError names a shard that is missing or broken."""
    images = torch.empty(config.pairs, *shape, dtype=torch.uint8, device=device)       # may be most of the memory
    for i, rows in enumerate(images.split(config.shard)):
        path = shard_file(folder, i)
        try:
            shard = torch.from_numpy(np.load(path, allow_pickle=False))
        except Exception as error:                         # np.load has another error for every way to be broken
            raise UserError(f"shard {path} is missing or broken ({error}); delete it and run again") from None
        if shard.dtype != torch.uint8 or shard.shape != rows.shape:
            raise UserError(f"shard {path} holds no {len(rows)} images of this run; delete it and run again")
        rows.copy_(shard)
    return to_device(images, device)


# Copied from 02_reflow.py
SHAPES = ["circle", "square", "triangle", "cross"]  # the index is the label
# Copied from 02_reflow.py
COLOURS = dict(red=(230, 30, 40), green=(30, 170, 60), blue=(40, 70, 230), yellow=(250, 210, 20))
# Copied from 02_reflow.py
BACKGROUNDS = dict(white=(255, 255, 255), black=(0, 0, 0))


# Copied from 02_reflow.py
def shape_distances(x, y, r):
    """Offsets (x, y) from the centre -> signed distances (4, *) in pixels, < 0 inside; each shape fills [-r, r]²."""
    wide, narrow = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    circle = (x * x + y * y).sqrt() - r
    square = wide - 0.9 * r  # a little smaller, or it looks bigger than the others
    triangle = torch.maximum((2 * x.abs() - y - r) / 5**0.5, wide - r)  # y points down: the tip is at (0, -r)
    cross = torch.maximum(wide - r, narrow - 0.35 * r)
    return torch.stack([circle, square, triangle, cross])


# Copied from 02_reflow.py
def shapes(n, size=32, seed=0):
    """n pictures of one shape each -> images uint8 (n, 3, size, size), labels int64 (n,), captions: n strings."""
    u = torch.rand(n, 6, generator=torch.Generator().manual_seed(seed))  # a row per picture: picture i is free of n
    kind, colour, ground = ((u[:, i] * len(d)).long() for i, d in enumerate((SHAPES, COLOURS, BACKGROUNDS)))
    colours, grounds = (torch.tensor(list(d.values())).float() for d in (COLOURS, BACKGROUNDS))
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    pixel = torch.arange(size) + 0.5  # pixel centres
    for rows in torch.arange(n).split(4096):  # bounds the memory
        r = (size - 2) * (0.28 + 0.17 * u[rows, 3])  # half the shape's width, in pixels
        cx, cy = (1 + r + (size - 2 - 2 * r) * u[rows, i] for i in (4, 5))  # a pixel of background on every side
        x, y = pixel[None, None, :] - cx[:, None, None], pixel[None, :, None] - cy[:, None, None]
        distance = shape_distances(x, y, r[:, None, None])[kind[rows], torch.arange(len(rows))]  # (rows, size, size)
        cover = (0.5 - distance).clamp(0, 1)[:, None]  # the share of the pixel inside the shape: anti-aliasing
        front, back = colours[colour[rows]][..., None, None], grounds[ground[rows]][..., None, None]
        images[rows] = (back + cover * (front - back)).round().byte()
    words = zip(*([list(d)[j] for j in i] for d, i in ((COLOURS, colour), (SHAPES, kind), (BACKGROUNDS, ground))))
    return images, kind, [f"a {c} {shape} on a {background} background" for c, shape, background in words]


# Copied from 02_reflow.py
def load_data(config, cache="runs/cache"):
    """The training images, on the CPU: uint8 (N, 3, S, S), labels int64 (N,), names of the classes."""
    if config.data == "shapes":
        return *shapes(config.data_size, config.image_size, config.seed)[:2], list(SHAPES)
    if config.data == "cifar10":
        return load_cifar10(config.data_dir, config.image_size, config.download)
    return load_folder(config.data, config.image_size, cache)


# Copied from 02_reflow.py
def load_cifar10(folder, size, download):
    """CIFAR-10's 50,000 training images by torchvision, which compares checksums before it unpickles."""
    try:
        data = torchvision.datasets.CIFAR10(folder, train=True, download=download)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        advice = f"the download failed ({error})" if download else "pass --download to fetch it (170 MB)"
        raise UserError(f"no CIFAR-10 in {Path(folder).resolve()}: {advice}") from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    if size != 32:
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    return images, torch.tensor(data.targets), list(data.classes)


# Copied from 02_reflow.py
def decode(path, size):
    """An image file of any format, colour mode and size -> uint8 (3, size, size), or None if it cannot be read."""
    try:
        with Image.open(path) as image:  # refuses decompression bombs
            image.draft("RGB", (2 * size, 2 * size))  # a large JPEG decodes faster at a fraction of its size
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)  # the central square
            return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    except Exception:  # broken files make decoders raise about anything: OSError, SyntaxError, struct.error, ...
        return None


# Copied from 02_reflow.py
def list_files(folder):
    """Every file below `folder` but hidden ones: sorted (relative name, bytes, time of change). Links are followed."""
    def fail(error):
        raise UserError(f"cannot read {error.filename}: {error.strerror}")

    rows, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(root) in seen:  # else a link to a parent would multiply the data
            raise UserError(f"{root} links to a folder that is read already: remove the link")
        seen.add(os.path.realpath(root))
        for path in (os.path.join(root, name) for name in names if not name.startswith(".")):
            info = os.stat(path) if os.path.isfile(path) else None  # None: a broken link, or a pipe that would block
            rows.append((os.path.relpath(path, folder), info and info.st_size, info and info.st_mtime_ns))
    return sorted(rows)


# Copied from 02_reflow.py
def read_folder(folder, listing, size):
    """Decode the files of `listing`, in threads because Pillow frees the interpreter lock -> arrays to be cached."""
    files = [name for name, length, _ in listing if length]
    files = [name for name in files if os.sep in name] or files  # no sub-folders at all: one class
    with ThreadPool() as pool:
        jobs = pool.imap(lambda name: decode(os.path.join(folder, name), size), files, chunksize=32)
        images = dict(zip(files, tqdm(jobs, f"reading {folder}", len(files), disable=None, leave=False)))
    images = {name: image for name, image in images.items() if image is not None}
    if not images:
        raise UserError(f"{folder}: no readable image among {len(listing)} files; give a folder of class sub-folders")
    classes = [name.split(os.sep)[0] if os.sep in name else os.path.basename(folder) for name in images]
    names, labels = np.unique(classes, return_inverse=True)
    skipped = np.array([name for name, *_ in listing if name not in images], dtype=str)
    return dict(images=np.stack(list(images.values())), labels=labels, names=names, skipped=skipped)


# Copied from 02_reflow.py
def load_folder(folder, size, cache):
    """Images in class sub-folders, as load_data returns them; decoded the first time, read from `cache` afterwards."""
    if not os.path.isdir(folder):
        raise UserError(f"--data {folder}: no such folder (give shapes, cifar10, or a folder of class sub-folders)")
    folder = os.path.realpath(folder)
    listing = list_files(folder)
    key = hashlib.sha256(repr((folder, size, listing)).encode()).hexdigest()[:16]  # any file changed: another key
    file = Path(cache) / f"images-{size}-{key}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            data = {name: arrays[name] for name in ("images", "labels", "names", "skipped")}
    except Exception:  # none yet, or a broken one: np.load has a different error for every way to be broken
        data = read_folder(folder, listing, size)
        if process()[0] == 0:
            with replacing(file) as part:
                np.savez(part, **data)
    if len(data["skipped"]):
        first = ", ".join(data["skipped"][:3]) + ", ..." * (len(data["skipped"]) > 3)
        print(f"skipped {len(data['skipped'])} files that are not readable images of a class: {first}", file=sys.stderr)
    return torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]).long(), data["names"].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """A finished network as a function from noise to pictures, all that is needed to draw: what --export writes.

    forward: z0 (B, C, H, W) standard normal, labels (B,) int64 if there are classes -> (B, C, H, W) in [-1, 1].
    """

    def __init__(self, flow, start):
        super().__init__()
        self.flow, self.start = flow, start

    def forward(self, z0, labels=None):
        return consistency_sample(partial(self.flow, labels=labels), z0, (self.start,)).clamp(-1, 1)


# Copied from 02_reflow.py
class Flow(nn.Module):
    """The velocity v(x, t) with a U-Net inside.  forward: x (B, C, H, W), t (B,), labels or None -> (B, C, H, W)."""

    def __init__(self, config, channels, classes):
        super().__init__()
        self.model = UNet(config.image_size, channels, config.channels, tuple(config.mult), config.blocks,
                          tuple(config.attention), config.dropout, classes)

    def forward(self, x, t, labels=None):
        return edm_velocity(partial(self.model, labels=labels), x, t)


# Copied from 02_reflow.py
def xavier(layer, scale=1.0):
    """Xavier-uniform weights times `scale`, zero bias. A tiny scale makes a residual branch start as almost nothing."""
    nn.init.xavier_uniform_(layer.weight, gain=scale)
    nn.init.zeros_(layer.bias)
    return layer


# Copied from 02_reflow.py
def conv(c_in, c_out, kernel=3, scale=1.0):
    """A convolution that keeps the image size."""
    return xavier(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), scale)


# Copied from 02_reflow.py
def group_norm(channels):
    """GroupNorm (Wu & He 2018) with at most 32 groups of at least four channels."""
    groups = min(32, channels // 4)
    if channels % 4 or channels % groups:
        raise ValueError(f"{channels} channels in {groups} groups: make model_channels a multiple of 4, above 32 of 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


# Copied from 02_reflow.py
class UNetBlock(nn.Module):
    """h = conv1(SiLU(norm1(conv0(SiLU(norm0(x))) + affine(emb)))), then (h + skip(x)) / √2, then perhaps attention.

    The 1/√2 keeps the variance at one, however many blocks are stacked (Song et al. 2021, appendix H)."""

    def __init__(self, c_in, c_out, emb_dim, dropout, resample=None, attention=False):
        super().__init__()
        self.resample, self.attention = resample or nn.Identity(), attention
        self.norm0, self.conv0 = group_norm(c_in), conv(c_in, c_out)
        self.affine = xavier(nn.Linear(emb_dim, c_out))
        self.norm1, self.dropout, self.conv1 = group_norm(c_out), nn.Dropout(dropout), conv(c_out, c_out, scale=1e-5)
        self.skip = conv(c_in, c_out, 1) if resample or c_in != c_out else nn.Identity()
        if attention:
            self.norm2, self.qkv = group_norm(c_out), conv(c_out, 3 * c_out, 1, scale=0.2**0.5)
            self.proj = conv(c_out, c_out, 1, scale=1e-5)

    def forward(self, x, emb):
        """x (b, c_in, h, w), emb (b, emb_dim) -> (b, c_out, h, w), at half or twice the size if the block resamples."""
        h = self.conv0(self.resample(nn.functional.silu(self.norm0(x))))
        h = h + self.affine(emb)[:, :, None, None]  # how noisy is x: one shift per channel
        h = self.conv1(self.dropout(nn.functional.silu(self.norm1(h))))
        x = (h + self.skip(self.resample(x))) * 0.5**0.5
        return (x + self.attend(x)) * 0.5**0.5 if self.attention else x

    def attend(self, x):
        """Every pixel looks at every other one: softmax(q·k / √c) v with a single head (Vaswani et al. 2017)."""
        # The checkpoints store q, k, v of a channel side by side; fast attention kernels want c as the dense last axis.
        q, k, v = rearrange(self.qkv(self.norm2(x)), "b (c qkv) h w -> qkv b 1 (h w) c", qkv=3).contiguous()
        a = nn.functional.scaled_dot_product_attention(q, k, v)  # (b, 1, h·w, c)
        return self.proj(rearrange(a, "b 1 (h w) c -> b c h w", h=x.shape[2]))


# Copied from 02_reflow.py
class UNet(nn.Module):
    """F(x, noise_label). Level l has size image_size / 2^l and model_channels · mult[l] channels; as is: CIFAR-10."""

    def __init__(self, image_size=32, image_channels=3, model_channels=128, mult=(2, 2, 2), num_blocks=4,
                 attention=(16,), dropout=0.13, classes=0):
        super().__init__()
        least = 2 ** (len(mult) - 1)
        if image_size < least or image_size & (image_size - 1):
            raise ValueError(f"image_size {image_size}: {len(mult)} levels need a power of two, at least {least}")
        self.shape, self.classes, emb_dim = (image_channels, image_size, image_size), classes, 4 * model_channels
        if classes:
            self.map_label = xavier(nn.Linear(classes, model_channels))
        self.map_layer0 = xavier(nn.Linear(model_channels, emb_dim))
        self.map_layer1 = xavier(nn.Linear(emb_dim, emb_dim))
        block = partial(UNetBlock, emb_dim=emb_dim, dropout=dropout)
        levels = [(image_size >> i, m * model_channels, image_size >> i in attention) for i, m in enumerate(mult)]
        self.enc, widths = self.encoder(block, levels, num_blocks, image_channels, model_channels)
        self.dec = self.decoder(block, levels, num_blocks, image_channels, widths)

    def encoder(self, block, levels, num_blocks, image_channels, width):
        """The layers, and the widths of their outputs: the decoder reads every one of them again."""
        layers, widths = {"{0}x{0}_conv".format(levels[0][0]): conv(image_channels, width)}, [width]
        for size, channels, attention in levels:
            if size < levels[0][0]:
                layers[f"{size}x{size}_down"] = block(width, width, resample=nn.AvgPool2d(2))
                widths.append(width)
            for i in range(num_blocks):
                layers[f"{size}x{size}_block{i}"] = block(width, channels, attention=attention)
                widths.append(width := channels)
        return nn.ModuleDict(layers), widths

    def decoder(self, block, levels, num_blocks, image_channels, widths):
        """One block more per level than the encoder, because a level's input (first conv or down) is read again too."""
        (lowest, width, _), layers = levels[-1], {}
        for size, channels, attention in reversed(levels):
            if size == lowest:
                layers[f"{size}x{size}_in0"] = block(width, width, attention=True)
                layers[f"{size}x{size}_in1"] = block(width, width)
            else:
                layers[f"{size}x{size}_up"] = block(width, width, resample=nn.Upsample(scale_factor=2))
            for i in range(num_blocks + 1):
                last = i == num_blocks
                layers[f"{size}x{size}_block{i}"] = block(width + widths.pop(), channels, attention=attention and last)
                width = channels
        layers[f"{size}x{size}_aux_norm"] = group_norm(width)
        layers[f"{size}x{size}_aux_conv"] = conv(width, image_channels, scale=1e-5)
        return nn.ModuleDict(layers)

    def embed(self, noise_label, labels):
        """sin(f·s), cos(f·s) of the noise label s at frequencies f = 1 ... 1/10000, plus the class, through an MLP."""
        steps = torch.linspace(0, 1, self.map_layer0.in_features // 2, device=noise_label.device)
        angles = noise_label.float()[:, None] * 10000**-steps  # float32 even under autocast: bf16 would merge nearby s
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)  # (b, model_channels)
        if self.classes:
            labels = torch.full_like(noise_label, -1) if labels is None else labels  # no class: a row of zeros
            all_classes = torch.arange(self.classes, device=labels.device)
            one_hot = labels if labels.ndim == 2 else labels[:, None] == all_classes  # (b, classes)
            emb = emb + self.map_label(one_hot.to(emb.dtype) * self.classes**0.5)  # √classes: variance one per entry
        return nn.functional.silu(self.map_layer1(nn.functional.silu(self.map_layer0(emb))))  # (b, 4·model_channels)

    def forward(self, x, noise_label, labels=None):
        """x (b, c, h, w), noise_label (b,), labels None, (b,) int64 or (b, classes) -> (b, c, h, w)."""
        if x.shape[1:] != self.shape or (labels is not None and not self.classes):
            got = f"x {tuple(x.shape)}{'' if labels is None else ' with labels'}"
            raise ValueError(f"UNet built for x (b, *{self.shape}) and {self.classes} classes, got {got}")
        emb, skips = self.embed(noise_label, labels), []
        for layer in self.enc.values():
            skips.append(x := layer(x, emb) if isinstance(layer, UNetBlock) else layer(x))
        *blocks, (_, norm), (_, head) = self.dec.items()
        for name, block in blocks:
            x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return head(nn.functional.silu(norm(x)))


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


# Differs from 02_reflow.py: methods side by side, and five metrics in place of a curve
def draw_quality(results, label, folder):
    """Left: Frechet distance at one and two evaluations.  Right: precision to coverage, with real data as ceiling."""
    figure, axes = new_figure(2, size=5.0)
    data, names = results["real data"], [name for name in results if name != "real data"]
    for offset, nfe, colour in ((-0.18, "1", "tab:blue"), (0.18, "2", "tab:orange")):
        rows = [(i + offset, results[name]["FD"][nfe]) for i, name in enumerate(names) if nfe in results[name]["FD"]]
        axes[0, 0].bar(*zip(*rows), 0.34, color=colour, label={"1": "1 evaluation", "2": "2 evaluations"}[nfe])
    axes[0, 0].axhline(data["FD"]["-"], color="0.5", linestyle=":", label="real data")
    axes[0, 0].set(yscale="log", ylabel=label)
    axes[0, 0].set_xticks(range(len(names)), names, rotation=30, ha="right")
    for i, metric in enumerate(("precision", "recall", "density", "coverage")):
        axes[0, 1].plot([results[name][metric] for name in names], "o", label=metric, color=f"C{i}")
        axes[0, 1].axhline(data[metric], color=f"C{i}", linestyle=":")
    axes[0, 1].set_ylabel("dotted: real data against real data")
    axes[0, 1].set_xticks(range(len(names)), names, rotation=30, ha="right")
    for panel in axes[0]:
        panel.legend(frameon=False)
    save_figure(figure, folder / "quality.png")


# Copied from 01_rectified_flow.py
def new_figure(columns, rows=1, size=4.0):
    """Square panels, as a figure that no window and no notebook shows by itself: it is only saved."""
    from matplotlib.figure import Figure                   # here: training does not need it
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


# Copied from 01_rectified_flow.py
def save_figure(figure, path):
    """Write the file whole or not at all."""
    with replacing(path) as part:
        figure.savefig(part, dpi=150, bbox_inches="tight")


# Copied from 02_reflow.py
def tile(images):
    """(n, C, H, W) in [-1, 1] side by side as an array (H, n W, C) for imshow, a white line between them."""
    images = torch.nn.functional.pad(to_bytes(images).float(), (1, 1, 1, 1), value=255)
    return rearrange(images, "n c h w -> h (n w) c").byte().numpy()


# Copied from 02_reflow.py
def draw_samples(strips, folder, name="samples.png"):
    """A strip of pictures per row, the same noise down each column.  strips: row name -> (n, C, H, W) in [-1, 1]."""
    figure, axes = new_figure(1, size=6.0)
    rows = [tile(images) for images in strips.values()]
    figure.set_size_inches(0.62 * len(next(iter(strips.values()))) + 1.6, 0.62 * len(rows))
    axes[0, 0].imshow(np.concatenate(rows), interpolation="nearest")
    axes[0, 0].set_yticks([len(rows[0]) * (i + 0.5) for i in range(len(rows))], list(strips))
    axes[0, 0].set_xticks([])
    axes[0, 0].tick_params(length=0)
    axes[0, 0].spines[:].set_visible(False)
    save_figure(figure, folder / name)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing (copied from chapters 1 to 3, but for drawing and exporting)
# ----------------------------------------------------------------------------------------------------------------------


def open_network(path, device):
    """Any finished network of chapters 2 to 4 from its file alone.  Returns the Flow, and the time its one step starts.

    Sizes come from the settings in the file, classes and colours from the weights.  UserError for any other file.
    """
    content = load_checkpoint(path, keys=("model",))
    try:
        config, weights = content["config"], content.get("ema", content["model"])
        settings = Config(**{field.name: config[field.name] for field in dataclasses.fields(Config)
                             if field.name in ("image_size", "channels", "mult", "blocks", "attention", "dropout")})
        classes = weights["model.map_label.weight"].shape[1] if "model.map_label.weight" in weights else 0
        first = weights[f"model.enc.{settings.image_size}x{settings.image_size}_conv.weight"]
        flow = Flow(settings, first.shape[1], classes)
        flow.load_state_dict(weights)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no network of chapters 2 to 4 ({type(error).__name__}: {reason})") from None
    return flow.to(device).eval().requires_grad_(False), float(config.get("start", 0.0))


def draw_from_checkpoint(config):
    """--checkpoint: --samples pictures into --out, a PNG each and all on one sheet; --export writes the generator."""
    if not (config.samples or config.export):
        raise UserError("--checkpoint wants --samples N --out FOLDER, or --export FILE, or both")
    if config.samples and not config.out:
        raise UserError("--samples wants a folder for the pictures: --out FOLDER")
    device = choose_device(config)
    flow, start = open_network(config.checkpoint, device)
    generator = Generator(flow, start)
    if config.samples:
        save_pictures(generator, config, device)
    if config.export:
        export_generator(generator.cpu(), config.export)


@torch.no_grad()
def save_pictures(generator, config, device):
    """One step each: 00000.png ..., class after class, and the first 64 on samples.png."""
    unet, folder, pictures = generator.flow.model, Path(config.out), []
    for index in torch.arange(config.samples, device=device).split(config.shard):
        z0 = pair_noise(seed_for(config.seed, 999), index, unet.shape)
        pictures.append(to_bytes(generator(z0, index % unet.classes) if unet.classes else generator(z0)).cpu())
    pictures = torch.cat(pictures)
    for i, picture in enumerate(pictures):
        with replacing(folder / f"{i:05d}.png") as part:
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(part, "PNG")
    sheet = torchvision.utils.make_grid(pictures[:64], nrow=8, padding=1, pad_value=255)
    with replacing(folder / "samples.png") as part:
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(part, "PNG")
    print(f"{config.samples} pictures, one evaluation each, and samples.png are in {folder}/")


def export_generator(generator, path):
    """The generator as one file that torch.export.load reads without this repository, for any batch."""
    unet, batch = generator.flow.model, torch.export.Dim("batch", min=1, max=65536)
    inputs = (torch.zeros(2, *unet.shape),) + ((torch.zeros(2, dtype=torch.long),) if unet.classes else ())
    shapes = {"z0": {0: batch}, "labels": {0: batch} if unet.classes else None}
    program = torch.export.export(generator, inputs, dynamic_shapes=shapes if unet.classes else {"z0": {0: batch}})
    with replacing(path) as part:
        file = io.BytesIO()                                # written whole, so that a full disk is noticed
        torch.export.save(program, file)
        part.write_bytes(file.getvalue())
    print(f"{path}: torch.export.load('{path}').module()(z0{', labels' if unet.classes else ''}) draws, "
          f"z0 (B, {', '.join(map(str, unet.shape))}) standard normal")


# Copied from 01_rectified_flow.py
class UserError(Exception):
    """A mistake the user can mend: ends the script with this one line and exit code 2, without a traceback."""


# Copied from 01_rectified_flow.py
def seed_for(*numbers):
    """One 32-bit seed from several integers, the same in every process and on every machine."""
    return hash(numbers) % 2 ** 32                         # tuples of ints: xxHash, not randomised as strings are


# Copied from 01_rectified_flow.py
def process():
    """(rank, number of processes); (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# Copied from 01_rectified_flow.py
def wait_for_all():
    """A barrier between the processes of a torchrun."""
    if dist.is_initialized():
        dist.barrier()


# Copied from 01_rectified_flow.py
def choose_device(config):
    """cuda > mps > cpu, fast matmuls, and the other processes when torchrun started this one.  Returns torch.device."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n in has if has[n]) if config.device == "auto" else config.device
    if not has[name]:
        raise UserError(f"--device {name}: this machine has no {name} device that torch can use")
    torch.set_float32_matmul_precision("high")             # TF32; the one switch that torch.compile accepts everywhere
    torch.backends.cudnn.benchmark = name == "cuda"
    os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")    # wrong gradients up to torch 2.14, issue 193061
    if "RANK" in os.environ and not dist.is_initialized():
        wait = datetime.timedelta(hours=24)                # the others wait while rank 0 decodes images or downloads
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=wait)
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if config.batch % process()[1]:
        raise UserError(f"--batch {config.batch} cannot be shared evenly by {process()[1]} processes")
    return torch.device(name)


# Copied from 01_rectified_flow.py
def place(model, device):
    """To the device, in channels_last where convolutions are faster so; a compiled training graph keeps the layout."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return model.to(device, memory_format=layout)


# Copied from 01_rectified_flow.py
def make_optimizer(model, config):
    """AdamW in one kernel, without weight decay: the averaged weights regularise enough."""
    return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.0, fused=True)


# Copied from 01_rectified_flow.py
def accelerate(model, config):
    """The fast path, set up once before the loop: compiled graph, bf16 autocast, one replica per process.

    Returns the callable to train and the autocast context; off CUDA they are the plain network and a no-op.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and config.compile:
        model.compile(dynamic=False)                       # in place: state-dict keys stay clean
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# Copied from 01_rectified_flow.py
@contextlib.contextmanager
def replacing(path):
    """Write to a neighbour, then rename: whoever looks sees the old file or the whole new one, never a part."""
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


# Copied from 01_rectified_flow.py
def save_json(path, content):
    """Readable JSON, written whole."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


# Copied from 01_rectified_flow.py
def save_checkpoint(path, **content):
    """Tensors, numbers, strings and containers of them, by rank 0, whole; the old file stays if the disk is full."""
    if process()[0] > 0:
        return
    with replacing(path) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:                      # torch reports a failed write so
            raise OSError(f"{str(error).splitlines()[0]} (is the disk full?)") from None


# Copied from 01_rectified_flow.py
def load_checkpoint(path, device="cpu", keys=()):
    """What save_checkpoint wrote, with these keys.  weights_only: a hostile pickle is refused, never run; UserError."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except Exception as error:                             # torch.load has no common class for broken files
        raise UserError(f"{path} is no checkpoint of ours or truncated ({type(error).__name__}); delete it") from None
    if not isinstance(content, dict) or not {"config", *keys} <= set(content):
        raise UserError(f"{path} holds no checkpoint of these scripts")
    return content


# Copied from 01_rectified_flow.py
def changed(old, new, Config):
    """The first setting that differs between two configurations as 'name=old (now new)', or ''; free ones may."""
    for field in dataclasses.fields(Config):
        before, now = old.get(field.name), new[field.name]
        if not field.metadata["free"] and json.dumps(before) != json.dumps(now):
            return f"{field.name}={before} (now {now})"
    return ""


# Copied from 01_rectified_flow.py
def same_settings(path, state, config):
    """UserError if this checkpoint was made with other settings."""
    difference = changed(state["config"], dataclasses.asdict(config), type(config))
    if difference:
        raise UserError(f"{path} was made with {difference}: add --fresh to start over, or --out elsewhere")


# Copied from 01_rectified_flow.py
def open_run(config, script):
    """The run folder; continues a run of the same settings, refuses another one's.  config.json tells what made it."""
    folder = Path(config.out or f"runs/{Path(script).stem}/{config.preset}")
    if process()[0] == 0:
        try:
            claim(folder, config, script)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"cannot use run folder {folder} ({error}); choose another --out") from None
    wait_for_all()
    return folder


# Copied from 01_rectified_flow.py
def claim(folder, config, script):
    """Make the folder this run's own.  Only a folder with our config.json in it is ever deleted."""
    record, settings = folder / "config.json", dataclasses.asdict(config)
    if config.fresh and ours(record):
        shutil.rmtree(folder)
    if ours(record):
        difference = changed(json.loads(record.read_text())["settings"], settings, type(config))
        if difference:
            raise UserError(f"{folder} holds a run with {difference}: add --fresh to start over, or --out elsewhere")
    elif folder.exists() and any(not path.name.startswith(".part-") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no run; choose another --out")
    else:
        save_json(record, {"script": Path(script).name, "settings": settings} | surroundings())


# Copied from 01_rectified_flow.py
def ours(record):
    """Whether one of these scripts wrote this config.json: other programs have files of that name too."""
    content = json.loads(record.read_text()) if record.exists() else {}
    return isinstance(content, dict) and {"script", "settings"} <= set(content)


# Copied from 01_rectified_flow.py
def surroundings():
    """Versions, hardware and git revision, so that a number can be traced to what made it."""
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                         capture_output=True, text=True) if shutil.which("git") else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
            "threads": torch.get_num_threads(), "gpu": gpu, "revision": git.stdout.strip() if git else ""}


# Copied from 01_rectified_flow.py
def parse_config(Config, argv=None):
    """Command line to Config: every field a flag, defaults < --preset < flags.  UserError for a wrong flag or value."""
    parser = argparse.ArgumentParser(description=(sys.modules[Config.__module__].__doc__ or "").split("\n")[0],
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.error = lambda message: usage_error(message)
    for field in dataclasses.fields(Config):
        info = {"help": f"{field.metadata['help']} (default {field.default})"}
        if isinstance(field.default, bool):
            info["action"] = argparse.BooleanOptionalAction
        else:
            many = isinstance(field.default, tuple)
            info |= {"type": type(field.default[0] if many else field.default), "choices": field.metadata["choices"]}
            info |= {"nargs": "+", "metavar": "N"} if many else {}
        parser.add_argument("--" + field.name.replace("_", "-"), **info)
    given = vars(parser.parse_args(argv))
    config = Config(**Config.presets[given.get("preset", Config.preset)] | given)
    for field in dataclasses.fields(Config):
        check_range(field, getattr(config, field.name))
    return config


# Copied from 01_rectified_flow.py
def usage_error(message):
    """argparse's complaint as one line."""
    raise UserError(f"{message} (--help lists the settings)")


# Copied from 01_rectified_flow.py
def check_range(field, value):
    """UserError unless low <= value <= high (NaN and infinities are outside any range)."""
    low, high = field.metadata["low"], field.metadata["high"]
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            inside = (low is None or number >= low) and (high is None or number <= high) and math.isfinite(number)
            if not inside:
                raise UserError(f"--{field.name.replace('_', '-')} {number} is outside [{low}, {high or 'inf'}]")


# Copied from 01_rectified_flow.py
@contextlib.contextmanager
def postponed_signals():
    """Ctrl-C and SIGTERM only set a flag within the block, so that no step is cut in half; a second one interrupts."""
    caught = []

    def note(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Copied from 01_rectified_flow.py
def resume(path, stage, config, model, optimizer, ema):
    """Load the checkpoint of this stage into the three, and return the step it was at; 0 if it is of another stage."""
    if not path.exists():
        return 0
    state = load_checkpoint(path, next(model.parameters()).device, ("stage", "step", "model", "ema", "optimizer"))
    if state["stage"] != stage:                            # another round's, which may have other settings
        return 0
    same_settings(path, state, config)
    model.load_state_dict(state["model"])
    ema.model.load_state_dict(state["ema"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# Copied from 01_rectified_flow.py
def average(total, count, stop):
    """Mean loss over `count` steps and all processes, and whether any process was told to stop.  Waits for the GPU."""
    report = torch.stack([total / count, torch.full_like(total, float(bool(stop)))])
    if dist.is_initialized():
        dist.all_reduce(report)
    mean, stops = (report / torch.tensor([process()[1], 1], device=report.device)).tolist()
    return mean, stops > 0


# Copied from 01_rectified_flow.py
def fit(model, loss_fn, config, folder, stage, stream, floor=None):
    """Drive train(): progress bar, log lines, metrics.csv, checkpoints, exact resume, a clean stop.  Returns the EMA.

    stage names the log rows and the checkpoint, stream is its number, floor the least possible loss if it is known.
    Once loss or weights are not finite the run ends, and the checkpoint before stays.
    """
    optimizer, ema = make_optimizer(model, config), EMA(model, config.ema_decay)
    start = last = resume(folder / "checkpoint.pt", stage, config, model, optimizer, ema)
    keep_metrics(folder / "metrics.csv", stage, start)
    total, clock, alone = 0.0, time.perf_counter(), process()[1] == 1
    with postponed_signals() as caught, tqdm(total=config.steps, initial=start, desc=stage, disable=None) as bar:
        for step, loss, ema in train(model, loss_fn, config, optimizer, ema, start, stream):
            total, done = total + loss, step == config.steps
            bar.update()
            if not (done or step % config.log_every == 0 or caught and alone):
                continue
            mean, stop = average(total, step - last, caught)
            samples, seconds = config.batch * (step - last), time.perf_counter() - clock
            if not (math.isfinite(mean) and torch.stack([p.isfinite().all() for p in model.parameters()]).all()):
                raise UserError(f"{stage}: loss {mean} or weights not finite at step {step}; lower --lr and run again")
            log_line(folder / "metrics.csv", stage, step, mean, floor, seconds, samples / seconds)
            if done or stop or step // config.checkpoint_every > last // config.checkpoint_every:
                save_checkpoint(folder / "checkpoint.pt", stage=stage, step=step, config=dataclasses.asdict(config),
                                model=model.state_dict(), ema=ema.model.state_dict(), optimizer=optimizer.state_dict())
            if stop:
                raise KeyboardInterrupt
            total, last, clock = 0.0, step, time.perf_counter()
    return ema


# Copied from 01_rectified_flow.py
def keep_metrics(path, stage, step):
    """Head of the table and the rows that stay: not those a resumed run writes again, nor one that a kill cut short."""
    if process()[0] == 0:
        rows = csv.reader(path.read_text().splitlines()[1:] if path.exists() else [])
        kept = [row for row in rows if len(row) == 6 and (row[0] != stage or int(row[1]) <= step)]
        with replacing(path) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([["stage", "step", "loss", "floor", "seconds", "samples_per_s"], *kept])


# Copied from 01_rectified_flow.py
def log_line(path, stage, step, loss, floor, seconds, rate):
    """One aligned line on the screen and one row in metrics.csv."""
    if process()[0] == 0:
        beside = f"  floor {floor:8.4f}" if floor else ""
        tqdm.write(f"{stage:>14}  step {step:>7}  loss {loss:8.4f}{beside}  {rate:10.0f} samples/s")
        try:
            with path.open("a", newline="") as file:
                csv.writer(file).writerow([stage, step, loss, floor, seconds, rate])
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None


# Copied from 01_rectified_flow.py
def launch(main, Config):
    """Entry point: a user's mistake ends in one line and exit code 2, Ctrl-C in one line and 130."""
    try:
        main(parse_config(Config))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# Copied from 02_reflow.py
@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the block before the others, so that it alone downloads and decodes, and they find its files."""
    if process()[0] > 0:
        wait_for_all()
    yield
    if process()[0] == 0:
        wait_for_all()


# Copied from 02_reflow.py
def load_round(path, config, channels, classes, device):
    """A finished round's network from its file.  UserError if its settings make another network."""
    content = load_checkpoint(path, keys=("model",))
    if not isinstance(content["config"], dict) or "stage" in content:
        raise UserError(f"{path} is no finished network of these scripts (those are called 1-rf.pt, 2-rf.pt, ...)")
    flow = Flow(config, channels, classes)
    for name in ("image_size", "channels", "mult", "blocks", "attention", "conditional"):
        theirs, ours = content["config"].get(name), getattr(config, name)
        if json.dumps(theirs) != json.dumps(ours):
            raise UserError(f"{path} was made with --{name.replace('_', '-')} {theirs}, this run has {ours}")
    try:
        flow.load_state_dict(content["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds another network: {str(error).splitlines()[-1].strip()}") from None
    return place(flow, device).eval().requires_grad_(False)


# Copied from 02_reflow.py
def check_network(config, images, classes):
    """UserError, before anything is written, for sizes that no network can have and for data without a spread."""
    if len(images) < 2:
        raise UserError(f"--data {config.data}: {len(images)} picture is no distribution; give at least two")
    try:
        with torch.device("meta"):                         # no memory, no time
            Flow(config, images.shape[1], classes)
    except ValueError as error:
        raise UserError(f"--image-size, --channels or --mult: {error}") from None


# Copied from 02_reflow.py
def choose_features(config, device):
    """The feature network of the Frechet distance and its honest name."""
    if config.fid:
        network = inception_features(config.inception or None, config.download, config.data_dir, device)
        return network, f"FID ({config.eval_size} samples, training-set statistics)"
    return RandomFeatures().to(device), f"Frechet distance of seeded random features, {config.eval_size} samples"


# Copied from 03_improved_training.py
def stage(path, make, build):
    """The finished network in `path`; made first if it is not there.  Interrupted, the same call goes on."""
    done = path.exists()
    wait_for_all()                                         # all have looked before rank 0 writes
    if not done:
        network, config = make()
        save_checkpoint(path, config=config, model=network.state_dict())
        wait_for_all()                                     # the others read the file that rank 0 writes
    return build(path)


# Copied from 03_improved_training.py
def train_seconds(path, name):
    """Time that a stage's steps took, by metrics.csv, so that an interruption does not count."""
    return sum(float(row["seconds"]) for row in csv.DictReader(path.open()) if row["stage"] == name)


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


# Differs from 03_improved_training.py: a row per method, with real data as the ceiling
def print_table(results, label, config):
    """A line per network, and what the columns mean."""
    print(f"\n{label}, after 1 and 2 network evaluations\n{'':>16}     FD 1     FD 2  precision  recall  density"
          "  coverage  to teacher  evaluations  + reflow  seconds")
    for name, row in results.items():
        distances = "".join(f"{row['FD'].get(n, float('nan')):9.3f}" for n in ("1", "2"))
        if name == "real data":
            distances = f"{row['FD']['-']:9.3f}        -"
        gap = "-" if row["to_teacher"] is None else f"{row['to_teacher']:.3f}"
        numbers = (row[key] for key in ("evaluations", "reflow", "seconds"))
        cost, reflow, seconds = (f"{number:,.0f}" if number else "-" for number in numbers)
        print(f"{name:>16}{distances}{row['precision']:11.3f}{row['recall']:8.3f}{row['density']:9.3f}"
              f"{row['coverage']:10.3f}{gap:>12}{cost:>13}{reflow:>10}{seconds:>9}")
    print("to teacher: mean squared gap to what 1-RF's ODE makes of the same noise; evaluations: of the network, by\n"
          "the method, its pairs included; + reflow: before that, for 2-RF; "
          f"1-RF had cost {3 * config.batch * config.steps:,}")
    if config.lpips_weights == "random" and ("rf" in results or config.distance == "lpips"):
        print("LPIPS had a random, untrained backbone (--lpips-weights random): a dry run of the papers' distance")


# Differs from 02_reflow.py: 1-RF and 2-RF only, each of which may be given
def train_round(k, teacher, draw, channels, classes, config, device, folder):
    """1-RF on pictures with noise drawn apart, or 2-RF on stored pairs from 1-RF's weights."""
    flow = place(Flow(config, channels, classes), device)
    if teacher is not None:
        flow.load_state_dict(teacher.state_dict())
        config = dataclasses.replace(config, steps=config.reflow_steps)
    return fit(flow, pair_loss(draw, config, device), config, folder, f"{k}-rf", k).model


# Differs from 03_improved_training.py: any loss_fn, any start
def train_student(name, start, loss_fn, steps, stream, config, device, folder):
    """One method, or one round of it, from the weights of `start`; all with the same optimiser and schedule."""
    flow = place(copy.deepcopy(start), device).train().requires_grad_(True)
    for layer in flow.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = config.student_dropout
    config = dataclasses.replace(config, steps=steps, lr=config.student_lr)
    return fit(flow, loss_fn, config, folder, name, stream).model


class Workshop:
    """Trains what the run folder does not hold yet: 1-RF at once, then a function per method of distillation.

    Each returns {name: {evaluations: network to use with so many}}.
    """

    def __init__(self, config, images, labels, classes, device, folder, build):
        self.config, self.images, self.classes, self.device = config, images, classes, device
        self.folder, self.build, self.shape = folder, build, images.shape[1:]
        self.real, self.batch = draw_independent(images, labels, classes), config.batch // process()[1]
        self.teacher = self.finish("1-rf", lambda: self.build(config.teacher) if config.teacher else train_round(
            1, None, self.real, self.shape[0], classes, config, device, folder))

    def finish(self, name, make, start=0.0):
        """The finished network `name`, made first if its file is not there."""
        torch.manual_seed(seed_for(self.config.seed, 0))   # the start weights, where there are none to start from
        settings = dataclasses.asdict(self.config) | {"start": start}
        return stage(self.folder / f"{name}.pt", lambda: (make(), settings), self.build)

    def student(self, name, start, loss_fn, steps, stream, begin=0.0):
        """A finished network trained with loss_fn from the weights of `start`."""
        return self.finish(name, lambda: train_student(name, start, loss_fn, steps, stream, self.config, self.device,
                                                       self.folder), begin)

    def pairs(self, flow, name, stream):
        """draw(n) on stored pairs of a flow, made unless they are there."""
        folder = self.folder / "pairs" / name
        make_pairs(Velocity(flow, self.config), folder, self.config, self.shape, self.device, stream)
        wait_for_all()
        z1 = load_pairs(folder, self.config, self.shape, self.device)
        return draw_stored(z1, seed_for(self.config.seed, stream), self.classes)

    def rf(self):
        """2-RF and its distillation; for comparison, the distillation of 1-RF in as many steps on as many pairs."""
        config, steps = self.config, self.config.distill_steps
        curved = self.pairs(self.teacher, "1-rf", 2)
        reflowed = self.finish("2-rf", lambda: self.build(config.reflow) if config.reflow else train_round(
            2, self.teacher, curved, self.shape[0], self.classes, config, self.device, self.folder))
        straight = self.pairs(reflowed, "2-rf", 3)
        found = {"2-RF": {1: reflowed, 2: reflowed}}
        for name, start, draw, stream in (("direct", self.teacher, curved, 4), ("rf", reflowed, straight, 5)):
            distance = make_distance("lpips" if config.lpips_share else "squared", config, self.device,
                                     switch=round(steps * (1 - config.lpips_share)))
            student = self.student(name, start, distillation_loss(draw, distance, self.batch, config.jumps), steps,
                                   stream)
            found[name] = {1: student, 2: student}
        return found

    def progressive(self):
        """Each round's student is the next one's teacher; the last two draw in two steps and in one."""
        flow, found = self.teacher, {1: self.teacher, 2: self.teacher}
        for n, steps in halving_steps(self.config):
            loss_fn = progressive_loss(self.real, Velocity(flow, self.config), self.batch, n)
            found[n] = flow = self.student(f"progressive-{n}", flow, loss_fn, steps, 10 + n)
        return {"progressive": {1: found[1], 2: found[2]}}

    def consistency(self):
        """From 1-RF's weights, with 1-RF's ODE as the guide."""
        times = karras_times(self.config.grid)
        loss_fn = consistency_distillation_loss(
            self.real, Velocity(self.teacher, self.config), times.float().to(self.device),
            make_distance(self.config.distance, self.config, self.device), self.batch, self.config.target == "ema")
        flow = self.student("consistency", self.teacher, loss_fn, steps_for("consistency", self.config), 6,
                            times[-1].item())
        return {"consistency": {1: flow, 2: flow}}

    def ict(self):
        """From 1-RF's weights like the others, so that budgets compare; its loss knows no teacher."""
        steps = steps_for("ict", self.config)
        loss_fn = consistency_training_loss(self.real, self.batch, steps, self.config.levels, self.device)
        flow = self.student("ict", self.teacher, loss_fn, steps, 7, karras_times(2)[-1].item())
        return {"ict": {1: flow, 2: flow}}


# Differs from 03_improved_training.py: methods in place of configurations; drawing and exporting end early
def main(config):
    """Teacher, the chosen methods, then numbers and figures; finished networks are taken from the run folder."""
    if config.checkpoint:
        return draw_from_checkpoint(config)
    check_options(config)
    device, started = choose_device(config), time.perf_counter()
    with rank_zero_first():
        images, labels, names = load_data(config)
        features, label = choose_features(config, device)
        if config.lpips_share and config.method in ("all", "rf") or config.distance == "lpips":
            Perceptual(config.lpips_net, config.lpips_size, config.lpips_weights)       # missing? then fail here
    classes, channels = len(names) if config.conditional else 0, images.shape[1]
    check_network(config, images, classes)
    build = partial(load_round, config=config, channels=channels, classes=classes, device=device)
    for path in filter(None, (config.teacher, config.reflow)):
        build(path)                                        # a wrong file fails before anything is written
    folder = open_run(config, __file__)
    shop = Workshop(config, to_device(images, device), labels.to(device), classes, device, folder, build)
    networks = {"1-RF": {1: shop.teacher, 2: shop.teacher}}
    for method in ("rf", "progressive", "consistency", "ict"):
        if config.method in ("all", method):
            networks |= getattr(shop, method)()
    if process()[0] == 0:
        report(networks, images, features, label, config, device, folder)
        print(f"\n{time.perf_counter() - started:.0f} s; figures and results.json are in {folder}/")


def check_options(config):
    """UserError for settings that do not go together, before anything is read or written."""
    if config.samples or config.export:
        raise UserError("--samples and --export want the network to draw with: --checkpoint FILE")
    if len(config.levels) != 2 or config.levels[1] < config.levels[0]:
        raise UserError(f"--levels {' '.join(map(str, config.levels))}: give the first and the last number of levels")
    if not 0 < config.middle < 1:
        raise UserError(f"--middle {config.middle} must lie between 0 and 1")
    if config.neighbours >= config.eval_size // 2:
        raise UserError(f"--neighbours {config.neighbours} needs a larger --eval-size than {config.eval_size}")


# Differs from 02_reflow.py: methods in place of rounds, and real data against real data as their ceiling
def report(networks, images, features, label, config, device, folder):
    """Measure every network from the same noises, print the table, draw the figures."""
    real = data_moments(images, features, "inception" if config.fid else "random", device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    size = min(config.eval_size, len(images) // 2)         # two sets of real pictures without one in common
    held_out, others = (image_features(images[rows], features, device) for rows in order[:2 * size].split(size))
    ceiling = {"FD": {"-": frechet_from_moments(*moments(others), *real)}, "to_teacher": None}
    results = {"real data": ceiling | manifold_metrics(held_out, others, config.neighbours)}
    results["real data"] |= {"evaluations": 0, "reflow": 0, "seconds": 0}
    aim, strips = ode_pictures(networks["1-RF"][1], config, images.shape[1:], device), {}
    strips["1-RF, 20 evaluations"] = aim[:16]
    starts = {"consistency": karras_times(2)[-1].item(), "ict": karras_times(2)[-1].item()}
    for name, by_steps in networks.items():
        ready = {n: Velocity(flow, config) for n, flow in by_steps.items()}
        row, pictures = evaluate(ready, real, held_out, features, config, images.shape[1:], device,
                                 starts.get(name, 0.0), aim)
        row["evaluations"], row["reflow"] = spent(name, config)
        results[name] = row | {"seconds": seconds_of(name, folder)}
        strips |= {f"{name}, {n} step{'s' * (n > 1)}": pictures[n] for n in pictures if n == 1 or name != "2-RF"}
    save_json(folder / "results.json", {"distance": label, "samples": config.eval_size, "neighbours": config.neighbours,
                                        "lpips": config.lpips_weights, "methods": results})
    print_table(results, label, config)
    draw_samples(strips, folder, "methods.png")
    draw_quality(results, label, folder)


def ode_pictures(flow, config, shape, device):
    """Where 1-RF's ODE carries the noises of every evaluation, by ten Heun steps.  (eval_size, C, H, W) on the CPU."""
    velocity, images = Velocity(flow, config), []
    for index in torch.arange(config.eval_size, device=device).split(config.shard):
        z0 = pair_noise(seed_for(config.seed, 999), index, shape)
        images.append(sample(velocity, z0, index, 10, "heun").cpu())
    return torch.cat(images).clamp(-1, 1)


def spent(name, config):
    """Network evaluations of a network after 1-RF: those of its method, and those of its reflow, pairs included."""
    reflow = pair_cost(config) + 3 * config.batch * config.reflow_steps if name in ("2-RF", "rf") else 0
    if name in ("rf", "direct"):
        return budget(config), reflow
    if name == "progressive":
        return COST[name] * config.batch * sum(steps for _, steps in halving_steps(config)), reflow
    return COST[name] * config.batch * steps_for(name, config) if name in COST else 0, reflow


def seconds_of(name, folder):
    """Training seconds of a network by metrics.csv, all rounds of progressive together; pairs are not counted."""
    stages = {row["stage"] for row in csv.DictReader((folder / "metrics.csv").open())}
    own = {"1-RF": ["1-rf"], "2-RF": ["2-rf"]}.get(name)
    own = own or [s for s in stages if s == name or s.startswith(f"{name}-")]
    return sum(train_seconds(folder / "metrics.csv", s) for s in own)


if __name__ == "__main__":
    launch(main, Config)
