"""Chapter 3 - improved training (2-rectified flow++): why is one reflow enough?

Reflow's pairs hardly cross, so the best velocity at x_t is the pair's own x1 - x0, whatever sensible distance it is
measured by.  That frees three choices which chapter 2 took from 1-RF, and [Lee+24] makes all three differently:
    when      t is drawn where 2-RF errs, near both ends: p(t) ~ cosh(a (t - 1/2)), a = 4                [section 4]
    how far   not |.|^2 but LPIPS-Huber: a robust distance of velocities plus a perceptual one of pictures     [4.2]
              t huber(v, x1 - x0) + LPIPS(x1, x1_hat) / (1 - t),   x1_hat = x_t + (1 - t) v
    whence    pairs and start weights come from a diffusion teacher, which is a velocity in disguise           [4.3]
Real pictures can join, inverted to noise [4.4], and with few steps a new update rule beats Euler's [5.3].
(The paper's time runs the other way: t there is 1 - t here.)

    python 03_improved_training.py                             # teacher, pairs, baseline A and 2-RF++ F, on shapes
    python 03_improved_training.py --ablate --seeds 3          # the paper's ladder A to G, three seeds
    python 03_improved_training.py --preset gpu --download     # CIFAR-10; --teacher edm-cifar10-32x32-uncond-vp.pkl

You will see, in runs/03_improved_training/quick/: training.png (the times, and the loss along t under A and F),
samples.png (one and two steps, the same noises), ladder.png (Frechet distance of each configuration), inversion.png
(reconstruction and the law of the inverted noise), editing.png (interpolation, translation), and a table.
[Lee+24] Lee, Lin, Fanti: Improving the Training of Rectified Flows, arXiv 2405.20320v2.  [Liu+22] arXiv 2209.03003.
[Song+21] arXiv 2011.13456 (the network).  [Karras+22] arXiv 2206.00364 (EDM).  [Zhang+18] arXiv 1801.03924 (LPIPS).
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
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import warnings
from dataclasses import dataclass
from functools import partial
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


# Differs from 02_reflow.py: configurations A to G, the distance's constants, a teacher that may be a diffusion model
@dataclass
class Config:
    """Settings of this chapter; every field is a command-line flag."""
    preset: str = option("quick", "size of the run", choices=("quick", "gpu", "paper"))
    data: str = option("shapes", "shapes, cifar10, or a folder of images in class sub-folders")
    data_dir: str = option("data", "where torchvision keeps CIFAR-10", free=True)
    download: bool = option(False, "fetch CIFAR-10 or the Inception network if missing", free=True)
    data_size: int = option(20000, "pictures of the procedural set", low=1)
    image_size: int = option(16, "side in pixels; a power of two", low=4, high=1024)
    configs: tuple = option(("A", "F"), "which of A B C D E F G to train; G goes on from F", free=True)
    ablate: bool = option(False, "the whole ladder: --configs A C D E F G, and B if --big-batch is not 1", free=True)
    seeds: int = option(1, "students per configuration, on the same teacher and pairs", low=1, high=100, free=True)
    teacher: str = option("", "chapter 2's 1-rf.pt, or NVIDIA's edm-*-vp.pkl, in place of training 1-RF")
    conditional: bool = option(True, "feed class labels to the network")
    a: float = option(4.0, "steepness of the U-shaped times; 0 is uniform", low=0.0, high=50.0)
    antithetic: bool = option(False, "draw times as pairs t, 1 - t")
    lpips_net: str = option("squeeze", "LPIPS backbone; the paper uses vgg", choices=("vgg", "alex", "squeeze"))
    lpips_size: int = option(32, "images are upsampled to this side for LPIPS (the paper: 224)", low=32, high=512)
    lpips_weights: str = option("random", "pretrained (torchvision's, downloaded), random (dry run), or a file")
    lpips_weight: float = option(4.0, "factor of LPIPS in E to G (the paper: 1, with a trained backbone)", low=0.0)
    big_batch: int = option(1, "batch of B to G in multiples of A's (the paper: 4)", low=1)
    real_pairs: int = option(1024, "real images inverted to noise for G", low=1)
    real_share: float = option(1.0, "share of G's batch that is real", low=0.0, high=1.0)
    invert_noise: float = option(0.05, "noise mixed in before inverting (the paper: 0.001)", low=0.0, high=0.5)
    real_steps: int = option(100, "training steps of G", low=1)
    steps: int = option(1000, "training steps of the teacher", low=1)
    reflow_steps: int = option(600, "training steps of A to F", low=1)
    batch: int = option(32, "images in a step, over all processes", low=1)
    pairs: int = option(3072, "pairs (z0, z1) made by the teacher", low=1)
    pair_solver: str = option("heun", "edm: EDM's Heun sampler; the others follow the flow's own ODE",
                              choices=("edm", "euler", "heun", "rk45"))
    pair_steps: int = option(5, "its steps (heun: two evaluations each; edm: one less in all)", low=1)
    shard: int = option(256, "pairs in a file, and images sampled at a time", low=1)
    channels: int = option(32, "width of the U-Net's first level; a multiple of 32, or 4, 8, 16", low=4)
    mult: tuple = option((1, 1, 1), "width of each level, in multiples of channels", low=1)
    blocks: int = option(1, "residual blocks of a level", low=1)
    attention: tuple = option((4,), "resolutions with self-attention", low=1)
    dropout: float = option(0.0, "dropout in the residual blocks", low=0.0, high=0.9)
    lr: float = option(6e-3, "peak learning rate", low=0.0)
    lr_decay: str = option("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup: int = option(50, "steps of linear warm-up", low=0)
    grad_clip: float = option(1.0, "largest gradient norm", low=0.0)
    ema_decay: float = option(0.998, "decay of the averaged weights", low=0.0, high=1.0)
    eval_size: int = option(500, "samples of a Frechet distance (the paper uses 50000)", low=2)
    fid: bool = option(False, "true FID: Inception features in place of the small random ones")
    inception: str = option("", "path of inception-2015-12-05.pt (default: in --data-dir)", free=True)
    seed: int = option(0, "seed of every random draw", low=0, high=2 ** 32 - 1)
    log_every: int = option(100, "steps between log lines", low=1, free=True)
    checkpoint_every: int = option(200, "steps between checkpoints", low=1, free=True)
    device: str = option("auto", "cuda > mps > cpu", choices=("auto", "cuda", "mps", "cpu"), free=True)
    compile: bool = option(True, "torch.compile the network (CUDA only)", free=True)
    out: str = option("", "run folder (default runs/<script>/<preset>)", free=True)
    fresh: bool = option(False, "start over: delete what the run folder holds", free=True)
    presets: ClassVar = {
        "quick": {},
        "gpu": dict(                                       # one GPU, about half an hour, its own teacher included
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=2, attention=(16,),
            dropout=0.1, batch=256, steps=10000, reflow_steps=3000, real_steps=300, lr=4e-4, warmup=500,
            ema_decay=0.999, pairs=50000, real_pairs=10000, invert_noise=0.01,
            pair_steps=18, shard=500, lpips_net="vgg", lpips_size=64,
            lpips_weights="pretrained", lpips_weight=1.0, eval_size=10000, log_every=100, checkpoint_every=1000),
        "paper": dict(                                     # [Lee+24] CIFAR-10; bring the EDM teacher with --teacher
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=4, attention=(16,),
            dropout=0.13, batch=128, big_batch=4, steps=400000, reflow_steps=800000, real_steps=5000, lr=2e-4,
            lr_decay="constant", warmup=5000, ema_decay=0.9999, pairs=1000000, real_pairs=50000, invert_noise=0.001,
            pair_solver="edm", pair_steps=18, shard=1000, lpips_net="vgg", lpips_size=224,
            lpips_weights="pretrained", lpips_weight=1.0, eval_size=50000, log_every=100, checkpoint_every=10000),
    }


# The paper's ladder, each adding to the one before.  B is A at the larger batch; in the paper also a better teacher.
LADDER = {
    "A": dict(times="uniform", distance="l2", big=False),              # Liu et al.'s 2-RF, chapter 2
    "B": dict(times="uniform", distance="l2", big=True),
    "C": dict(times="u", distance="l2", big=True),
    "D": dict(times="u", distance="huber", big=True),
    "E": dict(times="u", distance="lpips-huber", big=True),
    "F": dict(times="u", distance="lpips-huber-1/t", big=True),
    "G": dict(times="u", distance="lpips-huber-1/t", big=True),        # F, then real pictures
}


# ----------------------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------------------


def u_shaped_times(n, a=4.0, device=None, antithetic=False):
    """n times with density a cosh(a (t - 1/2)) / (2 sinh(a/2)) on [0, 1] [Lee+24 section 4]; a = 0 is uniform.

    By the inverse CDF, t = 1/2 + asinh((2y - 1) sinh(a/2)) / a with y uniform.  Antithetic draws come as pairs t and
    1 - t: odd errors about 1/2 cancel.  (The e^{au} + e^{-au} printed in the paper is not symmetric; its code is.)
    """
    y = torch.rand((n + 1) // 2 if antithetic else n, device=device)
    y = torch.cat([y, 1 - y])[:n] if antithetic else y
    return y if a < 1e-6 else 0.5 + torch.asinh((2 * y - 1) * math.sinh(a / 2)) / a


def pseudo_huber(v, target):
    """(sqrt(|v - target|^2 + c^2) - c) / d with c = 0.00054 d, d entries a sample [Lee+24 section 4.2].

    v, target: (B, *D), the norm is over all of D.  Returns (B,).  Quadratic below |.| = c, then linear: a few pairs
    that still cross cannot shout down the rest.  The 1/d, in the authors' code only, sets the balance with LPIPS.
    """
    d = v[0].numel()
    c = 0.00054 * d
    return ((v - target).flatten(1).square().sum(1) + c ** 2).sqrt().sub(c) / d


def lpips_huber(v, x0, x1, t, perceptual, divide=False):
    """t huber(v, x1 - x0) + LPIPS(x1, x1_hat) [/ (1 - t) if divide]: configurations E and F [Lee+24 section 4.2].

    v: (B, C, H, W) the network's velocity at x_t;  x0, x1: the pair;  t: (B,);  perceptual: (a, b) -> (B,).
    LPIPS compares pictures, so it sees x1_hat = x_t + (1 - t) v, whose error is (1 - t) times that of v.
    """
    x1_hat = interpolate(x0, x1, t) + (1 - t).reshape(-1, 1, 1, 1) * v
    weight = 1 / (1 - t).clamp(min=1e-5) if divide else 1.0
    return t * pseudo_huber(v, x1 - x0) + weight * perceptual(x1, x1_hat)


def few_step_sample(velocity, x0, times, rule="new", heun=False):
    """Sampling for few steps on any grid [Lee+24 section 5.3, algorithm 2]: x <- (1 - t') x0 + t' x1_hat(x, t).

    The new state is put on the line from the first noise to the present guess; rule "euler" steps from where it is.
    Both agree on straight paths; on curved ones the new rule is no ODE solver and fails for many steps.
    heun: average the velocities at both ends of a step.
    x0: (B, *D);  times: increasing from 0, a final 1 may be left out.  Returns x1 (B, *D).
    """
    x, grid = x0, [float(t) for t in times if t < 1] + [1.0]
    for t, after in zip(grid, grid[1:]):
        def move(v):
            return (1 - after) * x0 + after * (x + (1 - t) * v) if rule == "new" else x + (after - t) * v
        v = velocity(x, x0.new_full(x0.shape[:1], t))
        if heun and after < 1:
            v = (v + velocity(move(v), x0.new_full(x0.shape[:1], after))) / 2
        x = move(v)
    return x


def invert(velocity, x1, steps, method="euler", noise=0.0):
    """The noise z0 that the flow carries to x1 (B, *D): its ODE solved back from t = 1 - noise [Lee+24 section 4.4].

    A picture holds no trace of its noise, and flat ones none at all; so a little is mixed in first, as
    the authors do with 0.001.
    """
    start = 1 - noise
    xt = interpolate(torch.randn_like(x1), x1, x1.new_full(x1.shape[:1], start))
    return integrate(lambda x, s: -start * velocity(x, start * (1 - s)), xt, steps, method)[-1]


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


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


# Differs from 02_reflow.py: the times and the distance depend on the configuration
def pair_loss(draw, recipe, config, device, perceptual=None):
    """The loss_fn of this chapter for one row of LADDER, on the pairs of draw(n) -> x0, x1 (n, C, H, W), labels."""
    batch = config.batch // process()[1]

    def loss_fn(model, ema, step):
        x0, x1, labels = draw(batch)
        t = u_shaped_times(batch, config.a if recipe["times"] == "u" else 0.0, device, config.antithetic)
        v = model(interpolate(x0, x1, t), t, labels)
        if recipe["distance"] == "l2":
            return (v - (x1 - x0)).square().flatten(1).mean(1)
        if recipe["distance"] == "huber":
            return pseudo_huber(v, x1 - x0)
        return lpips_huber(v, x0, x1, t, perceptual, divide=recipe["distance"].endswith("1/t"))
    return loss_fn


def draw_mixed(synthetic, real, share):
    """G's batches: a share of real pairs, the rest the teacher's."""
    def draw(n):
        count = round(share * n)
        parts = [part(m) for part, m in ((real, count), (synthetic, n - count)) if m]
        return [None if column[0] is None else torch.cat(column) for column in zip(*parts)]
    return draw


def draw_inverted(z0, x1, labels, classes):
    """Real pairs: pictures x1 uint8 (N, C, H, W) with the noise z0 (N, C, H, W) float16 they were inverted to."""
    def draw(n):
        index = torch.randint(len(x1), (n,), device=x1.device)
        return z0[index].float(), to_floats(x1[index]), labels[index] if classes else None
    return draw


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


def denoise(velocity, y, sigma):
    """EDM's denoiser D(y; sigma) = E[x1 | x1 + sigma noise = y] from a velocity: x_t = t y with t = 1 / (1 + sigma)."""
    t = y.new_full(y.shape[:1], 1 / (1 + sigma)).float()
    xt = (y / (1 + sigma)).float()
    return (xt + sigma / (1 + sigma) * velocity(xt, t)).to(y)


@torch.no_grad()
def edm_sample(velocity, z0, steps, sigma_min=0.002, sigma_max=80.0, rho=7):
    """EDM's deterministic Heun sampler [Karras+22 algorithm 1] from y = sigma_max z0 (B, *D): 2 steps - 1 evaluations.

    It solves the flow's ODE in other coordinates, with most steps near the data.  State in float64 where there is one.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    y = (z0.float() if z0.device.type == "mps" else z0.double()) * sigma_max
    for sigma, after in zip(sigmas.tolist(), [*sigmas[1:].tolist(), 0.0]):
        slope = (y - denoise(velocity, y, sigma)) / sigma
        guess = y + (after - sigma) * slope
        if after > 0:
            slope = (slope + (guess - denoise(velocity, guess, after)) / after) / 2
        y = y + (after - sigma) * slope
    return y.to(z0)


# Differs from 02_reflow.py: EDM's sampler and the new update rule join
def sample(velocity, z0, index, steps, method="euler"):
    """Where the flow carries z0 (B, C, H, W).  Pair i has label i modulo the number of classes, if there are any."""
    flow = partial(velocity, labels=index % velocity.classes if velocity.classes else None)
    if method == "rk45":
        return integrate_adaptive(flow, z0)[-1]
    if method == "edm":
        return edm_sample(flow, z0, steps)
    if method == "new":
        return few_step_sample(flow, z0, [i / steps for i in range(steps)])
    return integrate(flow, z0, steps, method)[-1]


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


# Copied from 01_rectified_flow.py
def straightness(velocity, x0, steps=100):
    """How far paths are from straight lines: S = E int_0^1 |(z1 - z0) - v(z_t, t)|^2 dt  [Liu+22].

    x0: (B, *D) noise;  steps: Heun steps of the path.  Returns squared data units, summed over D, mean over B;
    0 means that one Euler step is exact.
    """
    path = integrate(velocity, x0, steps, "heun")
    deviation = path.diff(dim=0) * steps - (path[-1] - path[0])        # (steps, B, *D): mean slope of a step - chord
    return deviation.square().flatten(2).sum(2).mean().item()


# Copied from 02_reflow.py
def straightness_by_time(velocity, x0, steps):
    """The integrand of straightness, E |(z1 - z0) - v(z_t, t)|^2, in the middle of every step.  Returns (steps,)."""
    path = integrate(velocity, x0, steps, "heun")
    return (path.diff(dim=0) * steps - (path[-1] - path[0])).square().flatten(2).sum(2).mean(1)


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
def frechet_distance(features_a, features_b):
    """Fréchet distance of Gaussians fitted to features (N, F) and (M, F). Biased upwards: compare at equal N and M."""
    if features_a.shape[1:] != features_b.shape[1:]:
        raise ValueError(f"feature sizes differ: {tuple(features_a.shape)} and {tuple(features_b.shape)}")
    return frechet_from_moments(*moments(features_a), *moments(features_b))


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


# Differs from 02_reflow.py: no adaptive solver among the few steps, so no tolerance
def generate(velocity, config, shape, device, steps, method="euler"):
    """config.eval_size samples in [-1, 1] from the same noises for every network and solver; and the evaluations used.

    Returns (N, C, H, W) on the CPU and the mean number of network evaluations of a batch.
    """
    before, chunks = velocity.evaluations, torch.arange(config.eval_size, device=device).split(config.shard)
    noise_seed = seed_for(config.seed, 999)                # the pairs use other seeds, so these noises are new
    images = [sample(velocity, pair_noise(noise_seed, index, shape), index, steps, method).cpu()
              for index in chunks]
    return torch.cat(images).clamp(-1, 1), (velocity.evaluations - before) / len(chunks)


# Copied from 02_reflow.py
def feature_moments(images, features, device, size=500):
    """Mean and covariance of the features of uint8 or float images (N, C, H, W), in batches."""
    chunks = (batch.to(device) for batch in images.split(size))
    return moments(torch.cat([features(to_floats(x) if x.dtype == torch.uint8 else x).cpu() for x in chunks]))


# Copied from 02_reflow.py
def data_moments(images, features, name, device):
    """feature_moments of the training set, kept in runs/cache under a hash of its bytes."""
    digest = hashlib.sha256(images.contiguous().numpy()).hexdigest()[:16]
    path = Path(f"runs/cache/{name}-{digest}.pt")
    if not path.exists():
        mean, cov = feature_moments(images, features, device)
        save_checkpoint(path, config={"features": name}, mean=mean, cov=cov)
    content = load_checkpoint(path, keys=("mean", "cov"))
    return content["mean"], content["cov"]


@torch.no_grad()
def velocity_error(velocity, pairs, config, bins=5, size=500):
    """|x1 - x0 - v|^2 on `size` pairs in equal slices of t, mean over pixels [Lee+24 figure 3].  Returns (bins,)."""
    torch.manual_seed(config.seed)
    x0, x1, labels = pairs(size)
    losses = []
    for i in range(bins):
        t = (i + torch.rand(size, device=x0.device)) / bins
        chunks = torch.arange(size, device=x0.device).split(config.shard)
        losses.append(torch.cat([flow_matching_loss(partial(velocity, labels=None if labels is None else labels[c]),
                                                    x0[c], x1[c], t[c]) for c in chunks]).mean())
    return torch.stack(losses).tolist()


# Differs from 02_reflow.py: few steps only, by Euler and the new rule (up to two steps they are the same)
def evaluate(velocity, real, features, config, shape, device, pairs):
    """Frechet distance at one and two steps, straightness, and the error along t, from the same noises every time.

    real: moments of the training set's features;  pairs: the teacher's, to measure the error on.
    """
    result, pictures = {"FD": {}}, {}
    for name, steps, method in (("1", 1, "euler"), ("2", 2, "euler"), ("4", 4, "euler"), ("4 new", 4, "new")):
        images, _ = generate(velocity, config, shape, device, steps, method)
        result["FD"][name] = frechet_from_moments(*feature_moments(images, features, device), *real)
        pictures[name] = images[:12]
    index = torch.arange(min(256, config.eval_size), device=device)
    flow = partial(velocity, labels=index % velocity.classes if velocity.classes else None)
    by_time = straightness_by_time(flow, pair_noise(seed_for(config.seed, 999), index, shape), 10)
    return result | {"S": by_time.mean().item(), "error_by_t": velocity_error(velocity, pairs, config)}, pictures


def round_trip(velocity, x1, labels, steps, noise):
    """Invert pictures in `steps` evaluations and reconstruct in as many: the noise, and the mean squared error."""
    flow = partial(velocity, labels=labels)
    z0 = invert(flow, x1, steps, noise=noise)
    return z0, (integrate(flow, z0, steps)[-1] - x1).square().mean().item()


def slerp(z, w, share):
    """From z to w (*D) along the sphere, where Gaussian noise lives: a straight mix would be too quiet."""
    angle = torch.acos(((z * w).sum() / (z.norm() * w.norm())).clamp(max=1 - 1e-6))      # z may equal w
    return (torch.sin((1 - share) * angle) * z + torch.sin(share * angle) * w) / torch.sin(angle)


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


class Record(dict):
    """What the reader below makes of any class or function it does not know: inert, remembers what it was given."""

    def __new__(cls, *args, **kwargs):
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __init__(self, *args, **kwargs):
        """dict's would copy the arguments.  (Pickle calls __new__ alone for most objects, so that one remembers.)"""

    def __setstate__(self, state):
        self.state = state

    def append(self, item):
        """Lists of unknown classes pickle through this."""

    def extend(self, items):
        """Likewise."""


class InertUnpickler(pickle.Unpickler):
    """Reads tensors out of a pickle without running anything in it: unknown globals become Records, never code."""

    def find_class(self, module, name):
        safe = {("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
                ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
                ("collections", "OrderedDict"): dict,
                ("torch.storage", "_load_from_bytes"): load_storage}
        return safe.get((module, name), type(name, (Record,), {"__module__": module}))

    def persistent_load(self, identity):
        raise pickle.UnpicklingError("external data")


def load_storage(data):
    """The bytes of one tensor, by torch's own restricted reader."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def module_tensors(record, prefix=""):
    """Parameters and buffers of a pickled nn.Module, by their state-dict names."""
    meta = record.args[0] if record.args and isinstance(record.args[0], dict) else record
    state = record.state or meta.get("state") or meta
    found = {prefix + name: value for part in ("_parameters", "_buffers") for name, value in state[part].items()}
    for name, child in state["_modules"].items():
        found |= module_tensors(child, f"{prefix}{name}.") if child is not None else {}
    return {name: value.detach() for name, value in found.items() if value is not None}


def load_edm_pickle(path):
    """State dict of `ema` in one of NVIDIA's edm-*-vp.pkl files, with the names of our Flow; nothing is executed.

    The constant resampling filters and the unused augmentation embedding are left out.
    """
    try:
        with open(path, "rb") as file:
            tensors = module_tensors(InertUnpickler(file).load()["ema"])
    except Exception as error:                             # a hostile or broken pickle can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]       # torch's run over many lines
        raise UserError(f"--teacher {path}: no EDM network in it ({reason})") from None
    return {name: value.float() for name, value in tensors.items()
            if not name.endswith("resample_filter") and "map_augment" not in name}


def make_inverted(velocity, images, labels, config, folder, device):
    """Noise float16 (N, C, H, W) for the first real pictures, kept in a file, as no seed can recompute it."""
    path = folder / "pairs" / "inverted.npy"
    done = path.exists()
    wait_for_all()                                         # all have looked before rank 0 writes
    if not done:
        noises = []
        for chunk in tqdm(torch.arange(len(images)).split(config.shard), "inverting", disable=None):
            flow = partial(velocity, labels=labels[chunk] if velocity.classes else None)
            torch.manual_seed(seed_for(config.seed, 3, chunk[0].item()))
            z0 = invert(flow, to_floats(images[chunk]), config.pair_steps, "heun", config.invert_noise)
            noises.append(z0.half().cpu())
        if process()[0] == 0:
            save_array(path, torch.cat(noises))
        wait_for_all()
    try:
        noise = torch.from_numpy(np.load(path, allow_pickle=False))
    except Exception as error:                             # np.load has another error for every way to be broken
        raise UserError(f"{path} is broken ({error}); delete it and run again") from None
    if noise.dtype != torch.float16 or noise.shape != images.shape:
        raise UserError(f"{path} holds no noise for these {len(images)} pictures; delete it and run again")
    return noise.to(device)


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
# The U-Net and its scaling are chapter 2's; edm_velocity stands in "The method" here, since it makes any EDM a teacher.


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


def draw_training(results, config, folder):
    """Left: the U-shaped density with a histogram of draws.  Right: where along t each configuration still errs."""
    figure, axes = new_figure(2, size=4.5)
    t, a = np.linspace(0, 1, 200), max(config.a, 1e-6)
    torch.manual_seed(0)
    axes[0, 0].hist(u_shaped_times(100000, config.a).numpy(), 50, density=True, color="0.8", label="100,000 draws")
    density = a * np.cosh(a * (t - 0.5)) / (2 * np.sinh(a / 2))
    axes[0, 0].plot(t, density, linewidth=2, label=f"a cosh(a (t - 1/2)) / (2 sinh(a/2)), a = {config.a:g}")
    axes[0, 0].set(xlabel="t  (0 noise, 1 data)", ylabel="density", ylim=(0, 1.35 * density.max()))
    axes[0, 0].legend(frameon=False, loc="upper center")
    for name, rows in results.items():
        errors = np.mean([row["error_by_t"] for row in rows], 0)
        axes[0, 1].semilogy((np.arange(len(errors)) + 0.5) / len(errors), errors, "o-", label=name)
    axes[0, 1].set(xlabel="t", ylabel="velocity error per pixel")
    axes[0, 1].legend(frameon=False)
    save_figure(figure, folder / "training.png")


def draw_ladder(results, label, folder):
    """Frechet distance at one and two steps for every configuration; a dot per seed, a bar at their mean."""
    figure, axes = new_figure(1, size=5.0)
    for offset, steps, colour in ((-0.18, "1", "tab:blue"), (0.18, "2", "tab:orange")):
        for i, rows in enumerate(results.values()):
            values = [row["FD"][steps] for row in rows]
            axes[0, 0].bar(i + offset, np.mean(values), 0.34, color=colour, alpha=0.5,
                           label={"1": "1 step", "2": "2 steps"}[steps] if i == 0 else None)
            axes[0, 0].plot([i + offset] * len(values), values, "o", color=colour, markersize=4)
    axes[0, 0].set_xticks(range(len(results)), list(results))
    axes[0, 0].set(yscale="log", ylabel=label)
    axes[0, 0].legend(frameon=False)
    save_figure(figure, folder / "ladder.png")


def draw_inversion(errors, noises, folder):
    """Left: reconstruction error against evaluations.  Right: |z|^2 of inverted noise beside the chi-squared law."""
    from scipy.stats import chi2
    figure, axes = new_figure(2, size=4.5)
    for name, curve in errors.items():
        axes[0, 0].loglog([2 * int(n) for n in curve], list(curve.values()), "o-", label=name)
    axes[0, 0].set_xticks([2, 4, 8, 16], [2, 4, 8, 16])
    axes[0, 0].minorticks_off()
    axes[0, 0].set(xlabel="evaluations, inversion + reconstruction", ylabel="mean squared error")
    axes[0, 0].legend(frameon=False)
    d = next(iter(noises.values()))[0].numel()
    squares = {name: z.flatten(1).square().sum(1).cpu().numpy() for name, z in noises.items()}
    low = min(chi2.ppf(0.001, d), *(np.quantile(s, 0.02) for s in squares.values()))
    high = max(chi2.ppf(0.999, d), *(np.quantile(s, 0.98) for s in squares.values()))
    grid = np.linspace(low, high, 200)
    for name, values in squares.items():
        axes[0, 1].hist(values, grid[::5], density=True, alpha=0.5, label=name)
    axes[0, 1].plot(grid, chi2.pdf(grid, d), "k--", label=f"$\\chi^2$, {d} degrees of freedom")
    axes[0, 1].set(xlabel="|z|$^2$ of inverted real images", yticks=[])
    axes[0, 1].legend(frameon=False)
    save_figure(figure, folder / "inversion.png")


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
# Plumbing (copied from chapters 1 and 2)
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


# Differs from 02_reflow.py: a row per configuration, mean and spread over seeds
def print_table(results, label, config):
    """Mean over seeds of every number, with the standard deviation of the one-step distance."""
    steps = list(next(iter(results.values()))[0]["FD"])
    print(f"\n{label}, after N Euler steps (or the new rule's); S straightness; velocity error in bins of t")
    print("           " + "".join(f"{'N=' + n:>9}" for n in steps) + "    +-(N=1)        S   seconds  error by t")
    for name, rows in results.items():
        one = [row["FD"]["1"] for row in rows]
        means = "".join(f"{np.mean([row['FD'][n] for row in rows]):9.3f}" for n in steps)
        spread = f"{np.std(one, ddof=1):11.3f}" if len(one) > 1 else f"{'-':>11}"
        errors = " ".join(f"{e:.3f}" for e in np.mean([row["error_by_t"] for row in rows], 0))
        print(f"{name:<11}{means}{spread}{np.mean([row['S'] for row in rows]):9.2f}"
              f"{np.mean([row['seconds'] for row in rows]):10.0f}  {errors}")
    if {"E", "F", "G"} & set(results) and config.lpips_weights == "random":
        print("LPIPS had a random, untrained backbone (--lpips-weights random): a dry run of E, F, G")


def train_teacher(images, labels, classes, config, device, folder):
    """Chapter 2's 1-RF on the spot: uniform times, squared distance, noise and pictures drawn apart."""
    flow = place(Flow(config, images.shape[1], classes), device)
    draw = draw_independent(images, labels, classes)
    return fit(flow, pair_loss(draw, LADDER["A"], config, device), config, folder, "teacher", 1).model


def train_student(name, seed, start, pairs, real, config, device, folder):
    """One configuration with one seed, from the weights of `start`.  G trains on real pairs, from F's weights."""
    recipe, number = LADDER[name], "ABCDEFG".index(name)
    flow = place(copy.deepcopy(start), device).train().requires_grad_(True)
    config = dataclasses.replace(config, steps=config.real_steps if name == "G" else config.reflow_steps,
                                 batch=config.batch * (config.big_batch if recipe["big"] else 1))
    perceptual = None
    if recipe["distance"].startswith("lpips"):
        perceptual = Perceptual(config.lpips_net, config.lpips_size, config.lpips_weights, config.lpips_weight)
        perceptual = place(perceptual, device)
    draw = draw_mixed(pairs, real, config.real_share) if name == "G" else pairs
    loss_fn = pair_loss(draw, recipe, config, device, perceptual)
    return fit(flow, loss_fn, config, folder, f"{name}-{seed}", 100 * (seed + 1) + number).model


def load_teacher(path, build, config, channels, classes, device):
    """Chapter 2's finished flow, or NVIDIA's pickle; None if none is given and it must be trained."""
    if not path.endswith(".pkl"):
        return build(path) if path else None
    flow = Flow(config, channels, classes)
    try:
        flow.load_state_dict(load_edm_pickle(path))
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"--teacher {path} has another shape than --channels, --mult, --blocks, --attention or "
                        f"--conditional make: {str(error).splitlines()[-1].strip()}") from None
    return place(flow, device).eval().requires_grad_(False)


def stage(path, make, build):
    """The finished network in `path`; made first if it is not there.  Interrupted, the same call goes on."""
    done = path.exists()
    wait_for_all()                                         # all have looked before rank 0 writes
    if not done:
        network, config = make()
        save_checkpoint(path, config=config, model=network.state_dict())
        wait_for_all()                                     # the others read the file that rank 0 writes
    return build(path)


def train_seconds(path, name):
    """Time that a stage's steps took, by metrics.csv, so that an interruption does not count."""
    return sum(float(row["seconds"]) for row in csv.DictReader(path.open()) if row["stage"] == name)


def checked_names(config):
    """The configurations to train, in the order of the ladder, F before G."""
    names = set(LADDER if config.ablate else config.configs) | ({"F"} if "G" in config.configs else set())
    if names - set(LADDER):
        raise UserError(f"--configs {' '.join(config.configs)}: choose among {' '.join(LADDER)}")
    return [n for n in LADDER if n in names and (n != "B" or config.big_batch > 1 or not config.ablate)]


# Differs from 02_reflow.py: one teacher, then configurations by seeds
def main(config):
    """Teacher, pairs, every configuration with every seed, then numbers and figures; finished stages are skipped."""
    device, started, names = choose_device(config), time.perf_counter(), checked_names(config)
    with rank_zero_first():
        images, labels, class_names = load_data(config)
        features, label = choose_features(config, device)
        if set(names) & {"E", "F", "G"}:                   # a missing backbone fails here, not an hour from now
            Perceptual(config.lpips_net, config.lpips_size, config.lpips_weights)
    classes, channels = len(class_names) if config.conditional else 0, images.shape[1]
    check_network(config, images, classes)
    build = partial(load_round, config=config, channels=channels, classes=classes, device=device)
    given = load_teacher(config.teacher, build, config, channels, classes, device)
    folder = open_run(config, __file__)
    resident, labels, settings = to_device(images, device), labels.to(device), dataclasses.asdict(config)
    torch.manual_seed(seed_for(config.seed, 0))            # the teacher's start weights
    teacher = stage(folder / "teacher.pt", lambda: (
        given or train_teacher(resident, labels, classes, config, device, folder), settings), build)
    make_pairs(Velocity(teacher, config), folder / "pairs", config, images.shape[1:], device, stream=2)
    wait_for_all()
    z1 = load_pairs(folder / "pairs", config, images.shape[1:], device)
    pairs = draw_stored(z1, seed_for(config.seed, 2), classes)
    flows, real = {"teacher": [teacher]}, None
    for name, seed in [(name, seed) for name in names for seed in range(config.seeds)]:
        if name == "G" and real is None:
            few = resident[:config.real_pairs], labels[:config.real_pairs]
            noise = make_inverted(Velocity(teacher, config), *few, config, folder, device)
            real = draw_inverted(noise, *few, classes)
        start = flows["F"][seed] if name == "G" else teacher
        flow = stage(folder / f"{name}-{seed}.pt", lambda: (
            train_student(name, seed, start, pairs, real, config, device, folder), settings), build)
        flows[name] = flows.get(name, []) + [flow]
    if process()[0] == 0:
        report(flows, images, labels, class_names, pairs, features, label, config, device, folder)
        print(f"\n{time.perf_counter() - started:.0f} s; figures and results.json are in {folder}/")


# Differs from 02_reflow.py: other numbers and figures
def report(flows, images, labels, class_names, pairs, features, label, config, device, folder):
    """Measure every network from the same noises, print the table, draw the figures."""
    real = data_moments(images, features, "inception" if config.fid else "random", device)
    results, strips = {}, {}
    for name, networks in flows.items():
        results[name] = []
        for seed, flow in enumerate(networks):
            velocity = Velocity(flow, config)
            row, pictures = evaluate(velocity, real, features, config, images.shape[1:], device, pairs)
            row["seconds"] = train_seconds(folder / "metrics.csv", "teacher" if name == "teacher" else f"{name}-{seed}")
            results[name].append(row)
            if seed == 0:
                strips |= {f"{name}, {n} step{'s' * (n != '1')}": pictures[n] for n in ("1", "2")}
    index = torch.arange(min(12, config.eval_size), device=device)
    noise = pair_noise(seed_for(config.seed, 999), index, images.shape[1:])
    many = sample(Velocity(flows["teacher"][0], config), noise, index, 20, "heun").clamp(-1, 1).cpu()
    inversion = report_inversion(flows, images, labels, class_names, config, device, folder)
    save_json(folder / "results.json", {"distance": label, "samples": config.eval_size, "lpips": config.lpips_weights,
                                        "configurations": results, "inversion": inversion})
    print_table(results, label, config)
    draw_samples({"teacher, 40 evaluations": many} | strips, folder)
    draw_training({n: rows for n, rows in results.items() if n != "teacher"}, config, folder)
    draw_ladder({n: rows for n, rows in results.items() if n != "teacher"}, label, folder)


def report_inversion(flows, images, labels, class_names, config, device, folder, count=200):
    """Reconstruction error against evaluations, |z|^2 against chi-squared, and pictures edited through their noise."""
    x1, labels = to_floats(images[:count].to(device)), labels[:count]
    errors, noises, summary = {}, {}, {}
    for name, networks in flows.items():
        torch.manual_seed(seed_for(config.seed, 4))        # every network inverts the same slightly noisy pictures
        velocity = Velocity(networks[0], config)
        own = labels if velocity.classes else None
        trips = {n: round_trip(velocity, x1, own, n, config.invert_noise) for n in (1, 2, 4, 8)}
        errors[name], noises[name] = {str(n): trip[1] for n, trip in trips.items()}, trips[8][0]
        squares = noises[name].flatten(1).square().sum(1)
        summary[name] = {"mse": errors[name], "z2_mean": squares.mean().item(), "z2_std": squares.std().item()}
    best = min(errors, key=lambda n: errors[n]["8"])       # a network that cannot reconstruct cannot edit either
    draw_inversion(errors, {n: noises[n] for n in dict.fromkeys(["teacher", best, name])}, folder)
    strips = edit(Velocity(flows[best][0], config), noises[best], x1, labels, class_names)
    draw_samples({f"{n} by {best}" if n == "reconstructed" else n: strip for n, strip in strips.items()}, folder,
                 "editing.png")
    return summary


def edit(velocity, z0, x1, labels, class_names, shown=10):
    """Strips of pictures edited through their noise z0: decoded again, as another class, and in between."""
    def decode(z, c):
        return few_step_sample(partial(velocity, labels=c), z, (0.0, 0.5)).clamp(-1, 1).cpu()
    shown = min(shown, len(x1))                            # a small folder may hold fewer
    own = labels[:shown] if velocity.classes else None
    strips = {"real": x1[:shown].cpu(), "reconstructed": decode(z0[:shown], own)}
    for c in range(min(velocity.classes, 4)):
        strips[f"as {class_names[c]}"] = decode(z0[:shown], torch.full_like(labels[:shown], c))
    mates = (labels == labels[0]).nonzero().flatten() if velocity.classes else torch.arange(len(x1), device=x1.device)
    other = mates[(x1[mates] - x1[0]).flatten(1).norm(dim=1).argmax()]      # the least alike picture of its class
    line = torch.stack([slerp(z0[0], z0[other], share) for share in torch.linspace(0, 1, shown, device=z0.device)])
    return strips | {"interpolated": decode(line, None if own is None else labels[:1].expand(shown))}


if __name__ == "__main__":
    launch(main, Config)
