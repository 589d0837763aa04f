"""Chapter 3 - improved training (2-rectified flow++): why is one reflow enough?

On realistic data reflow's pairs hardly cross ([Lee+24] argues so from experiments; it is no theorem).  At x_t there is
then one target only, the pair's own x1 - x0, and every sensible distance is least there.  That frees three choices
which chapter 2 took from 1-RF, and [Lee+24] makes all three differently:
    when       t is drawn where 2-RF errs, near both ends: p(t) ~ cosh(a (t - 1/2)), a = 4                [section 4]
    how far    not |.|^2 but LPIPS-Huber: a robust distance of velocities plus a perceptual one of pictures     [4.2]
               t huber(v, x1 - x0) + LPIPS(x1_hat, x1) / (1 - t),   x1_hat = x_t + (1 - t) v
    from whom  pairs and start weights may come from a diffusion model: denoiser D, v = (D - x_t) / (1 - t)  [4.3]
Real pictures can join, inverted to noise [4.4]; in few steps a new rule beats Euler's [5.3].  (The paper's t is 1 - t.)

    python 03_improved_training.py                             # on chapter 2's 1-RF: pairs, baseline A and 2-RF++ F
    python 03_improved_training.py --ablate --seeds 3          # the paper's ladder A to G, three seeds
    python 03_improved_training.py --preset gpu --download     # CIFAR-10; --teacher edm-cifar10-32x32-uncond-vp.pkl

You will see, in runs/03_improved_training/quick/: samples.png (one and two steps from the same noises), editing.png
(pictures through their noise: other classes, interpolation), and tables: distance, accuracy, inversion, error along t.
[Lee+24] Lee, Lin, Fanti: Improving the Training of Rectified Flows, arXiv 2405.20320v2.  [Liu+22] arXiv 2209.03003.
[Song+21] arXiv 2011.13456 (the network).  [Karras+22] arXiv 2206.00364 (EDM).  [Zhang+18] arXiv 1801.03924 (LPIPS).
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing
import warnings
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import lpips
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

# ---- The method ------------------------------------------------------------------------------------------------------


def u_shaped_times(n, a=4.0, device=None):
    """n samples of t, of density a cosh(a (t - 1/2)) / (2 sinh(a/2)) on [0, 1] [Lee+24 section 4]; a = 0: uniform.

    By the inverse CDF, with y uniform.  (The e^{au} + e^{-au} printed in the paper is not symmetric; its code is.)
    """
    y = torch.rand(n, device=device)
    return y if a < 1e-6 else 0.5 + torch.asinh((2 * y - 1) * math.sinh(a / 2)) / a


def pseudo_huber(v, target):
    """(sqrt(|v - target|^2 + c^2) - c) / d with c = 0.00054 d, d entries a sample [Lee+24 section 4.2].

    v, target: (B, *D), the norm is over all of D.  Returns (B,).  Quadratic below |.| = c, then linear: a few pairs
    that still cross cannot dominate the loss.  The 1/d, in the authors' code only, sets the balance with LPIPS.
    """
    d = v[0].numel()
    c = 0.00054 * d
    return ((v - target).flatten(1).square().sum(1) + c ** 2).sqrt().sub(c) / d


def lpips_huber(v, x0, x1, t, perceptual):
    """t huber(v, x1 - x0) + LPIPS(x1_hat, x1): configuration E [Lee+24 section 4.2].  Returns (B,).

    v: (B, C, H, W) the network's velocity at x_t;  x0, x1: the pair;  t: (B,);  perceptual: (picture, target) -> (B,).
    LPIPS compares pictures, so it sees x1_hat = x_t + (1 - t) v, whose error is (1 - t) times that of v.
    """
    x1_hat = interpolate(x0, x1, t) + per_sample(1 - t, v) * v
    return t * pseudo_huber(v, x1 - x0) + perceptual(x1_hat, x1)


def lpips_huber_divided(v, x0, x1, t, perceptual):
    """t huber(v, x1 - x0) + LPIPS(x1_hat, x1) / (1 - t): configuration F, which listens to LPIPS near the data, too."""
    x1_hat = interpolate(x0, x1, t) + per_sample(1 - t, v) * v
    return t * pseudo_huber(v, x1 - x0) + 1 / (1 - t).clamp(min=1e-5) * perceptual(x1_hat, x1)


def squared_distance(v, x0, x1, t, perceptual=None):
    """A to C: |v - (x1 - x0)|^2 as for 1-RF, mean over pixels.  Returns (n,)."""
    return (v - (x1 - x0)).square().flatten(1).mean(1)


def huber_distance(v, x0, x1, t, perceptual=None):
    """D: the robust distance of velocities alone.  Returns (n,)."""
    return pseudo_huber(v, x1 - x0)


LADDER = {      # the paper's configurations, each adding to the one before: when to look, how to measure
    "A": (torch.rand, squared_distance),                        # Liu et al.'s 2-RF, chapter 2
    "B": (torch.rand, squared_distance),                        # at a larger batch; in the paper a better teacher, too
    "C": (u_shaped_times, squared_distance),
    "D": (u_shaped_times, huber_distance),
    "E": (u_shaped_times, lpips_huber),
    "F": (u_shaped_times, lpips_huber_divided),
    "G": (u_shaped_times, lpips_huber_divided),                 # F, then some steps on real pictures
}


# Differs from 02_reflow.py: a recipe, one row of LADDER, says when to look and how to measure
def pair_loss(model, ema, step, draw, recipe):
    """The loss of every network.  draw: () -> x0, x1 (n, C, H, W), labels;  recipe: times, distance.  Returns (n,)."""
    times, distance = recipe
    x0, x1, labels = draw()
    t = times(len(x0), device=x0.device)
    v = model(interpolate(x0, x1, t), t, labels)
    return distance(v, x0, x1, t)


def few_step_sample(velocity, x0, times, rule="new"):
    """Sampling in few steps [Lee+24 section 5.3, algorithm 2]: always on the line from a noise to the guess of x1.

    x0: (B, *D);  times: any grid from 0, a final 1 may be left out;  rule: "new" keeps the first noise, "euler" guesses
    it anew.  On straight paths both agree; on curved ones the new rule is no ODE solver.  Returns x1 (B, *D).
    """
    x = x0
    grid = [float(t) for t in times if t < 1] + [1.0]
    for t, after in zip(grid, grid[1:]):
        v = velocity(x, x0.new_full(x0.shape[:1], t))
        x1_hat = x + (1 - t) * v
        noise = x0 if rule == "new" else x - t * v
        x = (1 - after) * noise + after * x1_hat
    return x


def invert(velocity, x1, steps, method="euler", noise=0.0):
    """The noise z0 that the flow carries to x1 (B, *D): its ODE solved back from t = 1 - noise [Lee+24 section 4.4].

    Near t = 1 the flow has met pictures with a trace of noise only, so a little is mixed in first (the authors: 0.001).
    """
    start = 1 - noise
    xt = interpolate(torch.randn_like(x1), x1, x1.new_full(x1.shape[:1], start))
    return integrate(lambda x, s: -start * velocity(x, start * (1 - s)), xt, steps, method)[-1]


# ---- Settings: every field is a flag, the comment beside it its help -------------------------------------------------


# Differs from 02_reflow.py: configurations A to G, LPIPS, real pairs, a teacher that may be a diffusion model
@dataclass
class Config:
    """2-rectified flow++: improved training of rectified flows."""
    preset: Literal["quick", "gpu", "paper"] = "quick"      # size of the run
    data: str = "shapes"                                    # shapes, cifar10, or a folder of class sub-folders
    data_dir: str = "data"                                  # where CIFAR-10 and the Inception network are kept
    download: bool = False                                  # fetch CIFAR-10 or the Inception network if missing
    data_size: Annotated[int, 2, 10 ** 8] = 20000           # pictures of the procedural set
    image_size: Annotated[int, 4, 1024] = 16                # side in pixels; a power of two
    configs: Literal["A", "B", "C", "D", "E", "F", "G"] = ("A", "F")        # which to train; G goes on from F
    ablate: bool = False                                    # all of them (B only if --big-batch is not 1)
    seeds: Annotated[int, 1, 100] = 1                       # students per configuration, on the same teacher and pairs
    teacher: str = ""                                       # a 1-rf.pt, or NVIDIA's edm-*-vp.pkl; empty: chapter 2's
    conditional: bool = True                                # feed class labels to the network
    lpips_net: Literal["vgg", "alex", "squeeze"] = "squeeze"                # LPIPS backbone; the paper uses vgg
    lpips_size: Annotated[int, 32, 512] = 64                # LPIPS sees pictures of this side (the paper: 224)
    lpips_weights: str = "auto"                             # pretrained (downloaded), random, auto (either), a file
    lpips_weight: Amount = 1.0                              # factor of LPIPS; a tenth of it if random
    big_batch: Count = 1                                    # batch of B to G in multiples of A's (the paper: 4)
    real_pairs: Count = 1024                                # real pictures inverted to noise for G
    real_steps: Count = 100                                 # training steps of G
    invert_steps: Count = 16                                # Heun steps of the inversion: of too few z comes out short
    invert_noise: Annotated[float, 0, 0.5] = 0.0            # noise mixed in before inverting (the paper: 0.001)
    steps: Count = 1500                                     # training steps of the teacher
    reflow_steps: Count = 600                               # training steps of A to F
    batch: Count = 32                                       # images in a step, over all processes
    accumulate: Count = 1                                   # slices of a batch, one after the other, if memory is short
    pairs: Count = 4096                                     # pairs (z0, z1) made by the teacher
    pair_solver: Literal["edm", "euler", "heun"] = "heun"   # edm: EDM's sampler; the others follow the flow's own ODE
    pair_steps: Count = 8                                   # its steps (evaluations: heun 2 a step, edm one less)
    shard: Count = 256                                      # pairs in a file, and images sampled at a time
    channels: Count = 32                                    # width of the first level: a multiple of 32, or 4, 8, 16
    mult: Annotated[tuple, 1, 64] = (1, 1, 1)               # width of each level, in multiples of channels
    blocks: Count = 1                                       # residual blocks of a level
    attention: Annotated[tuple, 1, 1024] = (4,)             # resolutions with self-attention
    dropout: Annotated[float, 0, 0.9] = 0.0                 # dropout in the residual blocks
    lr: Amount = 6e-3                                       # peak learning rate
    lr_decay: Literal["cosine", "constant"] = "cosine"      # learning rate after the warm-up: down to 0, or as it is
    warmup: Whole = 50                                      # steps of linear warm-up
    grad_clip: Amount = 1.0                                 # largest gradient norm; keeps short runs steady
    ema_decay: Share = 0.998                                # decay of the averaged weights
    eval_size: Annotated[int, 2, 10 ** 7] = 500             # samples of a Frechet distance (the paper uses 50000)
    fid: bool = False                                       # true FID: Inception in place of small random features
    seed: Whole = 0                                         # seed of every random draw
    log_every: Count = 100                                  # steps between log lines; a checkpoint is written at each
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    compile: bool = False                                   # torch.compile the network (CUDA only; pays in long runs)
    out: str = ""                                           # run folder; empty: runs/<script>/<preset>
    fresh: bool = False                                     # start over: delete what the run folder holds
    may_change: ClassVar = {"data_dir", "download", "configs", "ablate", "seeds", "log_every", "device", "compile",
                            "out", "fresh"}
    presets: ClassVar = {
        "quick": {},
        "gpu": dict(                                        # one GPU, about half an hour, its own teacher included
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=2, attention=(16,),
            dropout=0.1, batch=256, steps=12000, reflow_steps=3000, lr=4e-4, warmup=500, ema_decay=0.999, pairs=50000,
            real_pairs=10000, real_steps=300, invert_steps=32, invert_noise=0.01, pair_steps=18, shard=500,
            lpips_net="vgg", lpips_weights="pretrained", eval_size=10000, log_every=200, compile=True),
        "paper": dict(                                      # [Lee+24]; --teacher: EDM's; one 80 GB GPU: --accumulate 2
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=4, attention=(16,),
            dropout=0.13, batch=128, big_batch=4, steps=400000, reflow_steps=800000, lr=2e-4, lr_decay="constant",
            warmup=5000, ema_decay=0.9999, pairs=1000000, real_pairs=50000, real_steps=5000, invert_noise=0.001,
            pair_solver="edm", pair_steps=18, shard=1000, lpips_net="vgg", lpips_size=224, lpips_weights="pretrained",
            grad_clip=1e9, eval_size=50000, log_every=200, compile=True),
    }


# ---- The experiment --------------------------------------------------------------------------------------------------


# Differs from 02_reflow.py: one teacher, then students of several configurations on the same pairs
def main(config):
    """[Lee+24]: a teacher and its pairs; on them students of every configuration; then all are measured."""
    run = Run(config, __file__)
    if not Path(config.teacher).exists():                   # told before a download; "" is the present folder
        raise UserError(f"--teacher {config.teacher} is missing")
    settle_lpips(run)
    recipes = choose_recipes(run)
    features = choose_features(run)
    images, labels, class_names = load_data(run)
    data = to_device(images, run.device), labels.to(run.device), class_names
    if not config.conditional:
        data = data[0], None, []
    teacher = Velocity(find_teacher(data, run), config)
    write_pairs(run, "2-rf", teacher, stream=2)
    draw = partial(draw_stored, load_pairs(run, "2-rf"), seed_for(config.seed, 2), teacher.classes)
    flows = {"teacher": [teacher.flow]}
    for name, recipe in recipes.items():
        if name == "G":                                     # goes on from F, on other pairs
            draw_real = partial(draw_inverted, *invert_pictures(teacher, data, run))
            flows[name] = train_students(name, recipe, flows["F"], draw_real, run)
        else:
            flows[name] = train_students(name, recipe, flows["teacher"] * config.seeds, draw, run)
    if run.rank == 0:
        report(flows, draw, features, data, run)


def choose_recipes(run):
    """The rows of LADDER to train, in its order, with LPIPS.  G needs F; without a larger batch B is A again."""
    config = run.config
    names = set(LADDER if config.ablate else config.configs)
    if "G" in names:
        names.add("F")
    if config.ablate and config.big_batch == 1:
        names.remove("B")
    perceptual = None
    if names & {"E", "F", "G"}:                             # a missing backbone is told now, not an hour from now
        weight = config.lpips_weight * (0.1 if config.lpips_weights == "random" else 1)     # untrained, it only harms
        perceptual = Perceptual(config.lpips_net, config.lpips_size, config.lpips_weights, weight)
        perceptual = place(perceptual, run.device)
        compile_network(perceptual, config)
    return {name: (LADDER[name][0], partial(LADDER[name][1], perceptual=perceptual)) for name in sorted(names)}


def find_teacher(data, run):
    """The network in --teacher, chapter 2's, or a 1-RF trained here: row A's loss on noise and pictures drawn apart."""
    images, labels, class_names = data
    path = run.config.teacher or chapter_2(run, "1-rf")
    if path:
        load = load_edm if path.endswith(".pkl") else load_flow
        flow = load(path, run, images.shape[1], len(class_names))
        run.reads("teacher_weights", flow)
        return flow
    torch.manual_seed(seed_for(run.config.seed, 0))         # the start weights
    flow = Flow(run.config, images.shape[1], len(class_names))
    draw = partial(draw_independent, images, labels, run.share)
    return run.fit("teacher", flow, partial(pair_loss, draw=draw, recipe=LADDER["A"]), stream=1)


def chapter_2(run, name, **settings):
    """The path of chapter 2's finished network of this name, or "" if there is none of the settings of this run.

    It is the one that would be trained here, to the bit.  settings: those of the stage that are other than the run's.
    """
    path = Path("runs/02_reflow", run.config.preset, f"{name}.pt")
    if not path.exists():
        return ""
    content = load_checkpoint(path)
    ours = dataclasses.asdict(run.config) | run.inputs | settings
    equal = [same(content["config"].get(key), ours.get(key)) for key in (
        "data", "pictures", "data_size", "image_size", "conditional", "steps", "batch", "accumulate", "channels",
        "mult", "blocks", "attention", "dropout", "lr", "lr_decay", "warmup", "grad_clip", "ema_decay", "pairs",
        "pair_solver", "pair_steps", "seed")]
    return str(path) if all(equal) and "optimizer" not in content else ""


def train_students(name, recipe, starts, draw, run):
    """One configuration on the pairs of draw(n): a student from each of the networks in starts, a seed each."""
    config = run.config
    factor = 1 if name == "A" else config.big_batch
    steps = config.real_steps if name == "G" else config.reflow_steps
    loss_fn = partial(pair_loss, draw=partial(draw, run.share * factor), recipe=recipe)
    stream = 100 + "ABCDEFG".index(name)                    # no two students draw the same numbers
    return [run.fit(f"{name}-{seed}", start, loss_fn, stream + 100 * seed, steps=steps, batch=config.batch * factor)
            for seed, start in enumerate(starts)]


# Differs from 02_reflow.py: several networks of a configuration, pictures edited through their noise
def report(flows, draw, features, data, run):
    """Measure every network with the same noises and pictures, print the table, draw the figures."""
    images, labels, class_names = data
    feature_network, distance = features
    real = feature_network, feature_moments(images, feature_network, run.device)
    shard = run.config.shard                                # batches of one size: a compiled network takes one shape
    few = to_floats(images[:shard]), labels if labels is None else labels[:shard]
    index = torch.arange(shard, device=run.device)
    noise = pair_noise(seed_for(run.config.seed, 999), index, images.shape[1:])
    velocities = {name: [Velocity(flow, run.config) for flow in flows[name]] for name in flows}
    results = {}
    strips = {}
    for name in flows:
        results[name] = [evaluate(velocity, draw, real, few, run) for velocity in velocities[name]]
        for steps in (1, 2, 20):
            strips[f"{name}, N = {steps}"] = sample(velocities[name][0], noise, index, steps)[:60:5].cpu()
    save_json(run.folder / "results.json", {"distance": distance, "configurations": results})
    print_table(results, distance, run)
    draw_samples(strips, run.folder / "samples.png")
    best = min(results, key=lambda name: results[name][0]["mse"]["8"])      # who reconstructs best edits best
    eager = Velocity(copy.deepcopy(flows[best][0]), dataclasses.replace(run.config, compile=False))
    draw_samples(edit(eager, *few, class_names, run), run.folder / "editing.png")
    print(f"\n{time.perf_counter() - run.started:.0f} s; figures and results.json are in {run.folder}/")


# ---- Sampling, metrics, inversion ------------------------------------------------------------------------------------


# Differs from 02_reflow.py: EDM's sampler and the new update rule in place of rk45
def sample(velocity, z0, index, steps, method="euler"):
    """Where the flow carries z0 (B, C, H, W) of the pairs of these indices; pair i has label i % classes."""
    flow = partial(velocity, labels=index % velocity.classes if velocity.classes else None)
    if method == "edm":                                     # the same ODE in (y, sigma), most steps near the data
        return edm_sample(flow, z0, steps)
    if method == "new":
        return few_step_sample(flow, z0, [i / steps for i in range(steps)])
    return integrate(flow, z0, steps, method)[-1]


@torch.no_grad()
def edm_sample(velocity, z0, steps):
    """EDM's deterministic Heun sampler [Karras+22 algorithm 1], from 80 z0 (B, *D): 2 steps - 1 evaluations."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    y = (z0.float() if z0.device.type == "mps" else z0.double()) * 80      # MPS has no float64
    for sigma, after in zip(sigmas.tolist(), [*sigmas[1:].tolist(), 0.0]):
        slope = (y - denoise(velocity, y, sigma)) / sigma
        guess = y + (after - sigma) * slope
        if after > 0:
            slope = (slope + (guess - denoise(velocity, guess, after)) / after) / 2
        y = y + (after - sigma) * slope
    return y.to(z0)


def denoise(velocity, y, sigma):
    """EDM's denoiser D(y; sigma) = E[x1 | x1 + sigma noise = y] from a velocity: x_t = t y with t = 1 / (1 + sigma)."""
    t = y.new_full(y.shape[:1], 1 / (1 + sigma)).float()
    xt = (y / (1 + sigma)).float()
    return (xt + sigma / (1 + sigma) * velocity(xt, t)).to(y)


# Differs from 02_reflow.py: few steps, by Euler and the new rule (up to two they are the same); inversion
def evaluate(velocity, draw, real, few, run):
    """Every number of one network.  real: feature network, moments of the data;  few: pictures and labels to invert."""
    feature_network, moments_of_data = real
    readable = run.config.data == "shapes" and velocity.classes
    row = {"FD": {}, "mse": {}}
    for name, steps, method in [("1", 1, "euler"), ("2", 2, "euler"), ("4", 4, "euler"), ("4 new", 4, "new")]:
        images, _ = generate(velocity, run, steps, method)
        row["FD"][name] = frechet_from_moments(*feature_moments(images, feature_network, run.device), *moments_of_data)
        if readable:
            row.setdefault("accuracy", {})[name] = accuracy(images)
    index = torch.arange(run.config.shard, device=run.device)
    noise = pair_noise(seed_for(run.config.seed, 999), index, velocity.shape)
    noise_labels = index % velocity.classes if velocity.classes else None
    row["S"] = straightness(partial(velocity, labels=noise_labels), noise, 10)
    torch.manual_seed(run.config.seed)
    x0, x1, pair_labels = draw(run.config.shard)
    row["error_by_t"] = loss_by_time(partial(velocity, labels=pair_labels), x0, x1, bins=5).tolist()
    torch.manual_seed(seed_for(run.config.seed, 4))         # every network inverts the same slightly noisy pictures
    pictures, labels = few
    flow = partial(velocity, labels=labels)
    for steps in (1, 2, 4, 8):
        z0 = invert(flow, pictures, steps, noise=run.config.invert_noise)
        row["mse"][str(steps)] = (integrate(flow, z0, steps)[-1] - pictures).square().mean().item()
    return row | {"z2": z0.flatten(1).square().sum(1).mean().item()}


def invert_pictures(velocity, data, run):
    """For G: the noise (float16) of the first real pictures, the same at every call.  Returns it, pictures, labels."""
    images, labels, _ = data
    config = run.config
    noises = []
    for rows in tqdm(torch.arange(min(config.real_pairs, len(images))).split(config.shard), "inverting", disable=None):
        torch.manual_seed(seed_for(config.seed, 3, rows[0].item()))
        flow = partial(velocity, labels=labels if labels is None else labels[rows])
        noises.append(invert(flow, to_floats(images[rows]), config.invert_steps, "heun", config.invert_noise).half())
    return torch.cat(noises), images, labels


def draw_inverted(z0, images, labels, n):
    """G's coupling: real pictures with the noise they were inverted to.  z0: (N, C, H, W), of the first N pictures."""
    index = torch.randint(len(z0), (n,), device=z0.device)
    return z0[index].float(), to_floats(images[index]), labels if labels is None else labels[index]


def edit(velocity, x1, labels, class_names, run):
    """Strips of pictures edited through their noise: decoded again, as every class, and on the way to another one."""
    z0 = invert(partial(velocity, labels=labels), x1, 8, noise=run.config.invert_noise)
    own = labels if labels is None else labels[:10]
    jobs = {"reconstructed": (z0[:10], own)}
    for i in range(0, len(class_names), len(class_names) // 4 + 1):         # at most four
        jobs[f"as {class_names[i]}"] = z0[:10], torch.full_like(own, i)
    mates = torch.arange(len(x1)) if labels is None else (labels == labels[0]).nonzero().flatten()
    other = mates[(x1[mates] - x1[0]).flatten(1).norm(dim=1).argmax()]      # the least alike picture of its class
    between = torch.stack([slerp(z0[0], z0[other], share) for share in torch.linspace(0, 1, len(z0[:10]))])
    jobs["interpolated"] = between, own if own is None else own[:1].expand(len(own))
    strips = {"real": x1[:10].cpu()}
    for name, (z, c) in jobs.items():
        strips[name] = few_step_sample(partial(velocity, labels=c), z, (0.0, 0.5)).cpu()
    return strips


def slerp(z, w, share):
    """From z to w (*D) along the sphere, where Gaussian noise lives: a straight mix would be too quiet."""
    angle = torch.acos(((z * w).sum() / (z.norm() * w.norm())).clamp(max=1 - 1e-6))      # z may equal w
    return (torch.sin((1 - share) * angle) * z + torch.sin(share * angle) * w) / torch.sin(angle)


# Differs from 02_reflow.py: a row per configuration, mean and spread over seeds; inversion
def print_table(results, distance, run):
    """Mean over seeds of every number, with the standard deviation of the one-step distance."""
    print(f"\n{distance}, after N Euler steps (or the new rule's); S straightness; velocity error in bins of t;\n"
          "inversion: squared error of real pictures after 8 steps to their noise z and 8 back, and |z|^2")
    print("                 N=1      N=2      N=4  N=4 new    +-(N=1)        S  error by t" + 28 * " " + "8+8    |z|^2")
    for name, rows in results.items():
        errors = "".join(f"{error:6.3f}" for error in np.mean([row["error_by_t"] for row in rows], 0))
        straight, back, z2 = np.mean([(row["S"], row["mse"]["8"], row["z2"]) for row in rows], 0)
        print(f"{name:<11}{over_seeds(rows, 'FD')}{straight:9.2f} {errors}{back:10.3f}{z2:9.0f}")
    if "accuracy" in results["teacher"][0]:
        print("accuracy: share of these samples that show their caption; it forgives soft edges, the distance does not")
        for name, rows in results.items():
            print(f"{name:<11}{over_seeds(rows, 'accuracy')}")
    if {"E", "F", "G"} & set(results) and run.config.lpips_weights == "random":
        print("LPIPS had a random, untrained backbone (--lpips-weights random): a dry run of E, F, G")


def over_seeds(rows, key):
    """The columns of one measure: means over the seeds' rows, and the standard deviation of the one-step number."""
    numbers = np.array([list(row[key].values()) for row in rows])
    spread = f"{numbers[:, 0].std(ddof=1):11.3f}" if len(rows) > 1 else f"{'-':>11}"
    return "".join(f"{mean:9.3f}" for mean in numbers.mean(0)) + spread


# ---- Networks of others: LPIPS, and NVIDIA's EDM as a teacher --------------------------------------------------------


class Perceptual(nn.Module):
    """LPIPS [Zhang+18]: images a, b (B, 3, H, W) in [-1, 1] -> distances (B,); b is the target and gets no gradient.

        sum_l mean_hw sum_c w_l (fa_l / |fa_l| - fb_l / |fb_l|)^2,   f_l: features of layer l, w_l: its linear head

    Upsampled first, as the backbone was trained on larger pictures.  Under autocast it runs in bf16, and it alone:
    differences of unit vectors want float32.
    """

    def __init__(self, net, size, weights, factor=1.0):
        super().__init__()
        self.size = size
        self.factor = factor
        self.lpips = load_lpips(net, weights).eval().requires_grad_(False)

    def forward(self, a, b):
        with torch.no_grad():
            target = self.features(b)
        heads = [head.model[-1].weight for head in self.lpips.lins] if self.lpips.lpips else [1.0] * len(target)
        layers = zip(self.features(a), target, heads)
        return self.factor * sum((head * (fa - fb).square()).sum(1).mean((1, 2)) for fa, fb, head in layers)

    def features(self, x):
        """Of every layer: unit vectors (B, C, H, W), float32."""
        x = F.interpolate(x.float(), (self.size, self.size), mode="bilinear")
        layers = self.lpips.net(self.lpips.scaling_layer(x))
        return [F.normalize(layer.float(), dim=1, eps=1e-10) for layer in layers]


def load_lpips(net, weights):
    """LPIPS with a backbone that is pretrained (downloaded), read from a file, or random: then without linear heads."""
    torch.manual_seed(0)                                    # an untrained yardstick, but the same one every time
    warnings.filterwarnings("ignore", module="torchvision") # lpips calls it by an old name
    try:
        network = lpips.LPIPS(net=net, pnet_rand=weights != "pretrained", lpips=weights != "random", verbose=False)
        if weights not in ("pretrained", "random"):
            state = torch.load(weights, map_location="cpu", weights_only=True)
            own = {name: state["features." + name.split(".", 1)[1]] for name in network.net.state_dict()}
            network.net.load_state_dict(own)
        return network
    except Exception as error:                              # offline, a partial download, no such file, ...
        raise UserError(f"--lpips-weights {weights}: no {net} for LPIPS ({type(error).__name__}); give a file of "
                        "torchvision's, or --lpips-weights random for a dry run") from None


def settle_lpips(run):
    """--lpips-weights auto becomes pretrained if the backbone is here or can be had, else random, which a line says."""
    if run.config.lpips_weights != "auto":
        return
    found = ["pretrained"]
    if run.rank == 0:
        socket.setdefaulttimeout(10)                        # behind a firewall nothing would ever answer
        try:
            load_lpips(run.config.lpips_net, "pretrained")
        except UserError:
            found = ["random"]
            print("no trained backbone for LPIPS: a dry run, as by --lpips-weights random (which takes a file, too)")
        socket.setdefaulttimeout(None)
    if run.world > 1:
        dist.broadcast_object_list(found)                   # all processes learn by one distance
    run.config.lpips_weights = found[0]


class Inert(nn.Module):
    """What a pickle gets for any class or function but those of tensors: an empty module that keeps its state."""

    def __init__(self, meta=None, *others):
        super().__init__()
        if isinstance(meta, dict):                          # NVIDIA's "persistent" classes
            self.__setstate__(meta.get("state") or {})

    def __setitem__(self, key, value):
        """Dictionaries of unknown classes are filled through this."""


class InertUnpickler(pickle.Unpickler):
    """Reads modules out of a pickle without running anything in it: names are looked up here, never imported."""

    def find_class(self, module, name):
        known = {"_rebuild_tensor_v2": torch._utils._rebuild_tensor_v2, "OrderedDict": dict, "set": set,
                 "_rebuild_parameter": torch._utils._rebuild_parameter,
                 "_load_from_bytes": lambda data: torch.load(io.BytesIO(data), "cpu", weights_only=True)}
        return known.get(name, Inert)


def load_edm(path, run, channels, classes):
    """The network `ema` in one of NVIDIA's edm-*-vp.pkl files as a Flow: the same names, the same scaling as D."""
    flow = Flow(run.config, channels, classes)
    try:
        tensors = InertUnpickler(io.BytesIO(Path(path).read_bytes())).load()["ema"].state_dict()
        own = {name: tensor for name, tensor in tensors.items()             # without constants and what nobody uses
               if not name.endswith("resample_filter") and "map_augment" not in name}
        flow.load_state_dict(own)
    except Exception as error:                              # a hostile or broken pickle can fail in any way
        raise UserError(f"--teacher {path}: no EDM network of the shape that --channels, --mult, --blocks, --attention "
                        f"and --conditional make ({type(error).__name__})") from None
    return place(flow, run.device).eval().requires_grad_(False)


# region Copied from 01_rectified_flow.py: training loop, solver, plumbing ---------------------------------------------

def interpolate(x0, x1, t):
    """The straight line x_t = (1 - t) x0 + t x1 [Liu+22 eq. 1].  x0, x1: (B, *D), t: (B,).  Returns (B, *D)."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * x1


def per_sample(t, x):
    """t (B,) as (B, 1, ..., 1): a number for each sample of x (B, *D)."""
    return t.reshape(t.shape + (1,) * (x.dim() - 1))


def flow_matching_loss(velocity, x0, x1, t):
    """|x1 - x0 - v(x_t, t)|^2 per sample, mean over D [Liu+22 eq. 1].

    velocity: (x (B, *D), t (B,)) -> (B, *D);  x0: (B, *D) noise;  x1: (B, *D) data, paired with x0.  Returns (B,).
    Raises ValueError if the pairs do not match in shape.
    """
    if x0.shape != x1.shape or t.shape != x0.shape[:1]:
        raise ValueError(f"want (B, *D) twice and (B,), got {tuple(x0.shape)}, {tuple(x1.shape)}, {tuple(t.shape)}")
    xt = interpolate(x0, x1, t)
    return (velocity(xt, t) - (x1 - x0)).square().flatten(1).mean(1)


@torch.no_grad()
def integrate(velocity, x0, steps, method="euler"):
    """Solve dz = v(z, t) dt from t = 0 (x0) to t = 1.  To go back to noise, integrate -v(x, 1 - t).

    "euler": z += v/N, N evaluations.  "heun": slope averaged over both ends of a step, 2N evaluations.
    x0: (B, *D).  Returns the path (steps + 1, B, *D); [0] is x0, [-1] the samples.
    """
    if method not in ("euler", "heun") or steps < 1:
        raise ValueError(f"method {method!r} must be euler or heun, and steps {steps} at least 1")
    path = [x0]
    for i in range(steps):
        z = path[-1]
        t = x0.new_full(x0.shape[:1], i / steps)
        v = velocity(z, t)
        if method == "heun":
            v = (v + velocity(z + v / steps, t + 1 / steps)) / 2
        path.append(z + v / steps)
    return torch.stack(path)


def straightness(velocity, x0, steps=100):
    """How far paths are from straight lines: S = E int_0^1 |(z1 - z0) - v(z_t, t)|^2 dt  [Liu+22].

    x0: (B, *D) noise;  steps: Heun steps of the path.  Returns squared data units, summed over D, mean over B:
    0 if one Euler step is exact, the larger the more it errs.
    """
    path = integrate(velocity, x0, steps, "heun")
    deviation = path.diff(dim=0) * steps - (path[-1] - path[0])        # (steps, B, *D): mean slope of a step - chord
    return deviation.square().flatten(2).sum(2).mean().item()


@torch.no_grad()
def loss_by_time(velocity, x0, x1, bins=10):
    """The flow matching loss in `bins` equal slices of t.  x0, x1: (n, *D) held-out pairs.  Returns (bins,).

    Every pair sees one t per bin, at a random place in it, so that the bins' mean is the loss itself.
    """
    t = (torch.arange(bins, device=x0.device)[:, None] + torch.rand(bins, len(x0), device=x0.device)) / bins
    return torch.stack([flow_matching_loss(velocity, x0, x1, t_bin).mean() for t_bin in t])


def new_figure(columns, rows=1, size=4.0):
    """Square panels, as a figure that no window and no notebook shows by itself: it is only saved."""
    from matplotlib.figure import Figure                    # here: training does not need it
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def save_figure(figure, path):
    """A picture for screen and slides."""
    figure.savefig(path, dpi=150, bbox_inches="tight")


def train(model, loss_fn, config, stream=0, progress=None):
    """Minimise E[loss_fn] with AdamW; yields (step, loss, ema) after every update; all the rest is the caller's.

    loss_fn: (model, ema, step) -> (B,) losses; it draws its own batch: which pairs, which times, which distance.
    stream: which random stream; a step draws the same numbers whenever it is run.  progress: (optimizer, ema, steps
    done) of a run that goes on.  Yields step (counted from 1), loss: () still on the device, ema: EMA.
    """
    optimizer, ema, done = progress or (make_optimizer(model, config), EMA(model, config.ema_decay), 0)
    network, autocast, unsynced = accelerate(model, config)
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(done, config.steps):
        torch.manual_seed(seed_for(config.seed, stream, step, rank))
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        total = 0.0
        for slices_left in reversed(range(config.accumulate)):
            waiting = unsynced() if slices_left else contextlib.nullcontext()
            with autocast, waiting:
                loss = loss_fn(network, ema, step).mean() / config.accumulate
            loss.backward()
            total = total + loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model, step)
        yield step + 1, total, ema


def learning_rate(step, config):
    """Linear warm-up to config.lr, then constant or a half cosine to 0."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    decay = (1 + math.cos(math.pi * step / config.steps)) / 2 if config.lr_decay == "cosine" else 1.0
    return config.lr * warm * decay


def seed_for(*numbers):
    """One 32-bit seed from several integers.  hash() of integers is the same in every process, unlike that of text."""
    return hash(numbers) % 2 ** 32


class EMA:
    """Averaged weights.  They sample better than the final ones.

    a <- a + (1 - d)(w - a).  The decay d grows as (1 + step) / (10 + step) up to its final value: early averages forget
    the random start.  ema.model is the averaged network; ema(x, t) evaluates it.
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


def make_optimizer(model, config):
    """AdamW in one kernel, without weight decay (then it is Adam): averaging regularises enough."""
    return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.0, fused=True)


def place(model, device):
    """To the device, in channels_last except on MPS: convolutions are faster, and a compiled graph keeps the layout."""
    old = device.type == "cpu" and torch.__version__ < (2, 14)      # group norm has no forward derivative in it there
    plain = old or device.type == "mps"
    return model.to(device, memory_format=torch.contiguous_format if plain else torch.channels_last)


def accelerate(model, config):
    """The fast path, set up once before the loop: compiled graph, bf16 on CUDA, one replica per process.

    Returns the network to call, the autocast context, and the context in which processes do not exchange gradients.
    """
    device = next(model.parameters()).device
    compile_network(model, config)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    if not dist.is_initialized():
        return model, autocast, contextlib.nullcontext
    replica = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return replica, autocast, replica.no_sync


def compile_network(model, config):
    """torch.compile on CUDA, once and in place: the names of the weights stay as they are."""
    on_cuda = next(model.parameters()).device.type == "cuda"
    if config.compile and on_cuda and model._compiled_call_impl is None:
        import torch._inductor.config as inductor
        if hasattr(inductor.triton, "mix_order_reduction"):
            inductor.triton.mix_order_reduction = False     # wrong gradients up to torch 2.14 (pytorch 193061)
        model.compile(dynamic=False)


Whole = Annotated[int, 0, 2 ** 32 - 1]                      # types of settings, with what they may be
Count = Annotated[int, 1, 2 ** 32 - 1]
Share = Annotated[float, 0, 1]
Amount = Annotated[float, 0, math.inf]
STOP = []                                                   # Ctrl-C and SIGTERM are noted here, see note_stop


class UserError(Exception):
    """A mistake the user can mend: one line on the screen and exit code 2, no traceback."""


def parse_config(Config, argv=None):
    """Defaults < --preset < flags.  Every field is a flag, the comment beside it its help, its type what it may be."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=Config.__doc__, allow_abbrev=False)
    types = typing.get_type_hints(Config, include_extras=True)
    notes = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    for field in dataclasses.fields(Config):
        many = isinstance(field.default, tuple)
        allowed = {"type": type(field.default[0] if many else field.default), "nargs": "+" if many else None}
        if isinstance(field.default, bool):
            allowed = {"action": argparse.BooleanOptionalAction}
        if typing.get_origin(types[field.name]) is Literal:
            allowed["choices"] = typing.get_args(types[field.name])
        help = f"{notes[field.name]} (default {field.default})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), help=help, default=argparse.SUPPRESS, **allowed)
    given = vars(parser.parse_args(argv))
    config = Config(**Config.presets[given.get("preset", Config.preset)] | given)
    for name, value in vars(config).items():
        if isinstance(value, str):                          # the shell leaves --data=~/photos as it is
            setattr(config, name, os.path.expanduser(value))
        low, high = getattr(types[name], "__metadata__", (-math.inf, math.inf))
        for number in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(number, (int, float)) and not (low <= number <= high and math.isfinite(number)):
                parser.error(f"--{name.replace('_', '-')} {number} is outside [{low}, {high}]")
    return config


def same(a, b):
    """Whether two values of a setting are one: a path may be spelled in several ways, and JSON has no tuples."""
    if a and b and isinstance(a, str) and isinstance(b, str):
        return os.path.realpath(a) == os.path.realpath(b)
    return json.dumps(a) == json.dumps(b)


@contextlib.contextmanager
def replacing(path):
    """Write beside, then rename: whoever looks sees the old file or the whole new one, never a part.

    A draft lies in a folder of its own, so that processes which write the same file do not meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        part = Path(folder, path.name)
        yield part
        if not (part.is_dir() and path.is_dir()):           # a folder that another process made first serves as well
            os.replace(part, path)


def save_json(path, content):
    """Readable JSON, written whole."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def save_checkpoint(path, **content):
    """Tensors, numbers, strings and containers of them; the old file stays if the disk is full."""
    with replacing(path) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:                       # torch's word for a failed write
            raise UserError(f"cannot write {path}; is the disk full?") from error


def load_checkpoint(path, device="cpu"):
    """What save_checkpoint wrote.  weights_only: a stranger's pickle is refused, never run."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        return {**content, "config": dict(content["config"])}      # TypeError, KeyError: not ours
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:                              # torch.load has no common class for broken files
        raise UserError(f"{path} is broken or not ours ({type(error).__name__}); delete it") from None


def surroundings(script):
    """Versions, hardware and git revision, so that a number can be traced to what made it."""
    command = ["git", "-C", str(script.resolve().parent), "describe", "--always", "--dirty"]
    revision = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"script": script.name, "revision": revision, "torch": torch.__version__, "system": platform.platform(),
            "python": platform.python_version(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


class Run:
    """One run of a script: settings, device, processes, folder.  All training of a chapter goes through run.fit().

    rank, world: which process this is, and of how many.  share: how many samples of a batch it draws at a time.
    """

    def __init__(self, config, script):
        self.started = time.perf_counter()
        self.config = config
        self.script = Path(script)
        self.claimed = False
        self.inputs = {}
        self.device = choose_device(config.device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.folder = Path(config.out or f"runs/{self.script.stem}/{config.preset}")
        self.share, rest = divmod(config.batch, self.world * config.accumulate)
        if rest:
            raise UserError(f"--batch {config.batch} cannot be shared evenly by {self.world} processes "
                            f"with --accumulate {config.accumulate}")

    def reads(self, name, content):
        """Note a digest of what this run reads, a network or plain data: with other contents it cannot be continued."""
        if isinstance(content, nn.Module):
            flat = ((key, tensor.cpu().contiguous().flatten()) for key, tensor in content.state_dict().items())
            content = {key: hashlib.sha256(bits.view(torch.uint8).numpy()).hexdigest() for key, bits in flat}
        self.inputs[name] = "sha256:" + hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def claim(self):
        """Make the folder this run's own before the first file is written there; UserError if other things are in it.

        fit() calls it, so mistakes found before (no such data, ...) leave nothing behind.
        """
        record = self.folder / "run.json"
        settings = dataclasses.asdict(self.config) | self.inputs
        new = self.rank == 0 and not self.claimed
        if new and any(not path.name.startswith(".part-") for path in self.folder.glob("*")):
            try:
                content = json.loads(record.read_text())
                old = dict(content["settings"]) if content["script"] == self.script.name else None
            except (OSError, ValueError, KeyError, TypeError):
                old = None
            if old is None:
                raise UserError(f"{self.folder} holds no run of {self.script.name}; choose another --out")
            if self.config.fresh:
                for name, value in settings.items():        # not if the run is to read something in there
                    if value and isinstance(value, str) and self.folder.resolve() in Path(value).resolve().parents:
                        raise UserError(f"--fresh would delete --{name} {value}; choose another --out")
                shutil.rmtree(self.folder)
            else:
                self.compare(old, settings, self.folder)
        if new and not record.exists():
            content = surroundings(self.script) | {"settings": settings}
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                record.touch(exist_ok=False)                # of several that start here at once, one goes on
            except FileExistsError:
                raise UserError(f"another run has just begun in {self.folder}; choose another --out") from None
            save_json(record, content)
        for draft in [*self.folder.rglob(".part-*")] if new else []:
            shutil.rmtree(draft, ignore_errors=True)        # what was in hand when this run was killed
        self.claimed = True
        self.wait()

    def compare(self, old, new, where):
        """UserError if `where` was made with other settings than the new ones, but for those that may change."""
        free = self.config.may_change | (self.inputs.keys() - old.keys())       # older runs do not say what they read
        for name, value in new.items():
            if name not in free and not same(old.get(name), value):
                raise UserError(f"{where} was made with {name}={old.get(name)}, now it is {value}: "
                                "add --fresh to start over, or --out elsewhere")

    def wait(self):
        """A barrier between the processes of a torchrun."""
        try:
            if self.world > 1:
                dist.barrier()
        except RuntimeError:
            raise UserError(f"process {self.rank} stops, since another one has") from None

    def fit(self, name, model, loss_fn, stream=0, **changes):
        """Train a copy of model to the end, go on where <name>.pt stopped, or just read it if it is finished.

        changes: settings of this stage alone, such as steps.  Returns the averaged network, the same in every process.
        The log travels in the checkpoint, so that <name>.csv never tells of a step twice, whenever the run was killed.
        """
        self.claim()
        config = dataclasses.replace(self.config, **changes)
        path = self.folder / f"{name}.pt"
        settings = dataclasses.asdict(config) | self.inputs | {"stage": name}
        model = place(copy.deepcopy(model), self.device).train().requires_grad_(True)
        optimizer, ema = make_optimizer(model, config), EMA(model, config.ema_decay)
        last, log = 0, []
        if path.exists():
            state = load_checkpoint(path, self.device)
            self.compare(state["config"], settings, path)
            model.load_state_dict(state["model"])
            ema.model.load_state_dict(state.get("ema", state["model"]))
            optimizer.load_state_dict(state.get("optimizer", optimizer.state_dict()))
            last, log, state = state["step"], state["log"], None            # no second copy stays on the device
        total, clock = 0.0, time.perf_counter()
        with tqdm(total=config.steps, initial=last, desc=name, disable=None) as bar:
            for step, loss, ema in train(model, loss_fn, config, stream, (optimizer, ema, last)):
                total = total + loss
                bar.update()
                if step % config.log_every and step < config.steps and not (STOP and self.world == 1):
                    continue
                news = torch.stack([total / (step - last), torch.full_like(total, len(STOP))]) / self.world
                if self.world > 1:
                    dist.all_reduce(news)
                loss, stop = news.tolist()                                         # waits for the GPU
                if not (math.isfinite(loss) and all(p.isfinite().all() for p in model.parameters())):
                    raise UserError(f"{name}: loss {loss} or weights not finite at step {step}; lower --lr, run again")
                rate = config.batch * (step - last) / (time.perf_counter() - clock)
                log.append(f"{step},{loss:.6g},{rate:.0f}")
                state = {"model": ema.model.state_dict()}                          # finished: the average alone
                if step < config.steps:
                    state = {"model": model.state_dict(), "ema": state["model"], "optimizer": optimizer.state_dict()}
                if self.rank == 0:
                    tqdm.write(f"{name:>14}  step {step:>7}  loss {loss:8.4f}  {rate:10.0f} samples/s")
                    path.with_suffix(".csv").write_text("\n".join(["step,loss,samples_per_s", *log]) + "\n")
                    save_checkpoint(path, step=step, log=log, config=settings, **state)
                if stop:
                    raise KeyboardInterrupt
                total, last, clock = 0.0, step, time.perf_counter()
        return ema.model


def choose_device(name):
    """The torch.device: cuda > mps > cpu, unless --device says otherwise.  Joins the other processes of a torchrun."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n in has if has[n])
    if not has[name]:
        raise UserError(f"--device {name}: this machine has no {name} device that torch can use")
    torch.set_float32_matmul_precision("high")              # TF32; the one switch that torch.compile accepts everywhere
    torch.backends.cudnn.benchmark = name == "cuda"
    try:
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)
        if name == "cuda":
            torch.cuda.set_device(device)
        if "RANK" in os.environ and not dist.is_initialized():
            if not 0 <= int(os.environ["RANK"]) < int(os.environ.get("WORLD_SIZE", 0)):     # PyTorch would wait forever
                raise ValueError("it is not below WORLD_SIZE")
            dist.init_process_group("nccl" if name == "cuda" else "gloo", device_id=device if name == "cuda" else None,
                                    timeout=datetime.timedelta(hours=24))   # the others wait while rank 0 downloads
    except (ValueError, RuntimeError) as error:
        raise UserError(f"unset RANK, or start by torchrun, which sets more than that: {error}") from None
    return device


def note_stop(number, frame):
    """Ctrl-C and SIGTERM wait until the step in hand is saved; a second one does not."""
    if STOP:
        raise KeyboardInterrupt
    STOP.append(number)


def launch(main, Config):
    """Entry point: a user's mistake ends in one line and exit code 2, Ctrl-C in one line and 130."""
    STOP.clear()
    with contextlib.suppress(AttributeError):               # a letter that the terminal lacks is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, note_stop)
    signal.signal(signal.SIGTERM, note_stop)
    try:
        main(parse_config(Config))
    except (UserError, OSError, torch.OutOfMemoryError) as error:      # OSError: no file, no network, disk full
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
    except torch._dynamo.exc.BackendCompilerFailed as error:           # no C compiler, no Python.h, ...
        print(f"error: torch.compile: {error}".splitlines()[0] + "; --no-compile goes without", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        words = ", without --fresh," if "--fresh" in sys.argv else ""
        print(f"stopped; the same command{words} continues from here", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# endregion


# region Copied from 02_reflow.py: data, network, stored pairs, metrics ------------------------------------------------

def draw_independent(images, labels, n):
    """1-RF's coupling: noise x0 and pictures x1 drawn apart.  images: uint8 (N, C, H, W);  labels: (N,) or None."""
    index = torch.randint(len(images), (n,), device=images.device)
    x1 = to_floats(images[index])
    # mirroring doubles the data; on reflow's pairs it would tear z1 from its z0
    x1 = torch.where(torch.rand(n, 1, 1, 1, device=x1.device) < 0.5, x1.flip(3), x1)
    return torch.randn_like(x1), x1, None if labels is None else labels[index]


def make_pairs(velocity, seed, index, config):
    """Reflow's coupling z0 ~ N(0, I), z1 = ODE[v](z0) [Liu+22], for the pairs of these indices (B,)."""
    z0 = pair_noise(seed, index, velocity.shape)
    return z0, sample(velocity, z0, index, config.pair_steps, config.pair_solver)


def draw_stored(z1, seed, classes, n):
    """A reflow round's coupling: one index picks both ends.  z1: uint8 (N, C, H, W) of make_pairs with this seed."""
    index = torch.randint(len(z1), (n,), device=z1.device)
    x0 = pair_noise(seed, index, z1.shape[1:])
    return x0, to_floats(z1[index]), index % classes if classes else None      # the labels they were made with


def write_pairs(run, name, velocity, stream):
    """Make the pairs 0 ... config.pairs - 1 of a round and store z1 as uint8, config.shard of them in a file."""
    run.claim()
    config = run.config
    count = math.ceil(config.pairs / config.shard)
    for i in tqdm(range(run.rank, count, run.world), f"pairs for {name}", disable=None):
        path = run.folder / "pairs" / name / f"{i:05d}.pt"
        if path.exists():                                   # a run that was killed loses the file in hand, no more
            continue
        index = torch.arange(i * config.shard, (i + 1) * config.shard, device=run.device)      # whole: one compilation
        z0, z1 = make_pairs(velocity, seed_for(config.seed, stream), index, config)
        if not z1.isfinite().all():                         # NaN would be lost in uint8
            raise UserError(f"the samples of the flow before {name} are not finite; lower --lr, add --fresh")
        save_checkpoint(path, config={"pairs": name}, z1=to_bytes(z1[:config.pairs - i * config.shard]).cpu())
        if STOP:
            raise KeyboardInterrupt
    run.wait()


def load_pairs(run, name):
    """All z1 that write_pairs stored, in order: uint8 (N, C, H, W) on the device."""
    config = run.config
    size = (config.pairs, 3, config.image_size, config.image_size)
    images = to_device(torch.empty(size, dtype=torch.uint8), run.device)        # may fill the memory: only once
    for i, shard in enumerate(images.split(config.shard)):
        path = run.folder / "pairs" / name / f"{i:05d}.pt"
        z1 = load_checkpoint(path).get("z1", torch.empty(0))
        if (z1.dtype, z1.shape) != (shard.dtype, shard.shape):
            raise UserError(f"{path} holds other pairs; delete it and run again")
        shard.copy_(z1)
    return images


def load_flow(path, run, channels, classes):
    """A finished network of this or another run.  UserError if this run's settings make another network."""
    flow = Flow(run.config, channels, classes)
    content = load_checkpoint(path)
    try:
        for name in ("image_size", "channels", "mult", "blocks", "attention", "conditional"):
            theirs = content["config"][name]
            ours = getattr(run.config, name)
            if not same(theirs, ours):
                raise UserError(f"{path} was made with --{name.replace('_', '-')} {theirs}, this run has {ours}")
        flow.load_state_dict(content["model"])
        if "optimizer" in content:
            raise UserError(f"{path} is not trained to its end")
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path} holds another network: {str(error).splitlines()[-1].strip()}") from None
    return place(flow, run.device).eval().requires_grad_(False)


class Velocity:
    """A finished network ready to sample: compiled, bf16 autocast on CUDA, float32 in and out, counting evaluations."""

    def __init__(self, flow, config):
        compile_network(flow, config)
        kind = next(flow.parameters()).device.type
        self.autocast = torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")
        self.flow = flow
        self.shape = flow.model.shape
        self.classes = flow.classes
        self.evaluations = 0

    @torch.no_grad()
    def __call__(self, x, t, labels=None):
        self.evaluations += 1
        with self.autocast:
            return self.flow(x, t, labels).float()


def generate(velocity, run, steps, method="euler"):
    """config.eval_size samples (N, C, H, W) in [-1, 1] on the CPU, and the evaluations that a batch of them took."""
    seed = seed_for(run.config.seed, 999)                   # new noises, the same for every network and solver
    before = velocity.evaluations
    images = []
    for first in range(0, run.config.eval_size, run.config.shard):
        index = torch.arange(first, first + run.config.shard, device=run.device)       # whole shards: one compilation
        z0 = pair_noise(seed, index, velocity.shape)
        images.append(sample(velocity, z0, index, steps, method).cpu())
    return torch.cat(images)[:run.config.eval_size].clamp(-1, 1), (velocity.evaluations - before) / len(images)


class RandomFeatures(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> features (B, 96): means and deviations under seeded random convolutions.

    They rank samples of one data set; the numbers mean nothing beside anybody's FID.
    """

    def __init__(self, channels=12, scales=4, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)     # its own: the yardstick is the same in every run
        for i in range(scales):
            weight = torch.randn(channels, channels if i else 3, 3, 3, generator=generator)
            weight[3:] -= weight[3:].mean((2, 3), keepdim=True)     # sees edges; the first three see colour too
            weight *= (2 / weight.square().sum((1, 2, 3), keepdim=True)).sqrt()
            self.register_buffer(str(i), weight)

    @torch.no_grad()
    def forward(self, x):
        features = []
        for weight in self.buffers():
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")    # zeros would draw a frame around every picture
            x = F.leaky_relu(F.conv2d(x, weight), 0.2)
            features += [x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-6).sqrt()]
            x = F.avg_pool2d(x, 2) if x.shape[-1] > 1 else x
        return torch.cat(features, dim=1)


def moments(features):
    """Features (N, F) -> their mean (F,) and covariance (F, F) in float64: all that a Frechet distance looks at."""
    features = features.cpu().double()                      # the CPU first: MPS has no float64
    return features.mean(0), features.T.cov()


def frechet_from_moments(mean_a, cov_a, mean_b, cov_b):
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)): squared Wasserstein-2 of two Gaussians."""
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
    if not distance.isfinite():                             # a diverged network has no distance; eigh would raise
        return math.inf
    roots = []
    for cov in (cov_a, cov_b):                              # cov = root root^T; what rounding made negative is zero
        values, vectors = torch.linalg.eigh(cov)
        roots.append(vectors * values.clamp(min=0).sqrt())
    distance -= 2 * torch.linalg.svdvals(roots[0].T @ roots[1]).sum()       # = tr (cov_a cov_b)^(1/2), never complex
    return max(distance.item(), 0.0)                        # equal inputs may land at -1e-15


def feature_moments(images, features, device):
    """Mean and covariance of the features of uint8 or float images (N, C, H, W), in batches."""
    rows = []
    for batch in images.split(500):
        batch = batch.to(device)
        rows.append(features(to_floats(batch) if batch.dtype == torch.uint8 else batch).cpu())
    return moments(torch.cat(rows))


def choose_features(run):
    """The feature network of the Frechet distance and its honest name."""
    if run.config.fid:
        return inception_features(run), f"FID ({run.config.eval_size} samples, training-set statistics)"
    name = f"Frechet distance of seeded random features, {run.config.eval_size} samples"
    return RandomFeatures().to(run.device), name


INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


def inception_features(run):
    """The network of the original FID as a function: images (B, 3, S, S) in [-1, 1] -> features (B, 2048)."""
    path = Path(run.config.data_dir) / Path(INCEPTION_URL).name
    if run.config.download and run.rank == 0 and not path.exists():
        with replacing(path) as part:
            torch.hub.download_url_to_file(INCEPTION_URL, part)
    run.wait()
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != INCEPTION_SHA256:
        raise UserError(f"{path} is missing or not {INCEPTION_URL}: delete it and pass --download")
    network = torch.jit.load(path, map_location=run.device).eval()     # a program: therefore the hash

    @torch.no_grad()
    def features(images):                                   # it resizes to 299 x 299 by itself
        return network(to_bytes(images), return_features=True).float()
    return features


def tile(images):
    """(n, C, H, W) in [-1, 1] side by side as an array (H, n W, C) for imshow, a white line between them."""
    images = F.pad(to_bytes(images).float(), (1, 1, 1, 1), value=255)
    return rearrange(images, "n c h w -> h (n w) c").byte().numpy()


def draw_samples(strips, path):
    """A strip of pictures per row, the same noise down each column.  strips: row name -> (n, C, H, W) in [-1, 1]."""
    rows = [tile(images) for images in strips.values()]
    height, width, _ = rows[0].shape
    figure, axes = new_figure(1, size=6.0)
    figure.set_size_inches(0.62 * width / height + 1.6, 0.62 * len(rows))
    axes[0, 0].imshow(np.concatenate(rows), interpolation="nearest")
    axes[0, 0].set_yticks([height * (i + 0.5) for i in range(len(rows))], list(strips),
                          parse_math=False)                 # a class may be named $
    axes[0, 0].tick_params(length=0, labelbottom=False)
    axes[0, 0].spines[:].set_visible(False)
    save_figure(figure, path)


def pair_noise(seed, index, shape):
    """Standard normal z0 (B, *shape) as a pure function of seed and index (B,): any pair's noise can be computed again.

    splitmix64 [Steele, Lea, Flood 2014] scrambles a counter into 64 random bits; Box-Muller makes them Gaussian.
    """
    size = math.prod(shape)
    bits = index[:, None] * size + torch.arange(size, device=index.device)         # (B, size): a counter
    bits = bits * -0x61C8864680B583EB + (seed << 31)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):   # int64 wraps around
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * factor                      # & makes >> unsigned
    radius = (-2 * ((bits >> 40 & 0xFFFFFF) + 0.5).div(1 << 24).log()).sqrt()
    return (radius * (2 * math.pi / (1 << 24) * (bits & 0xFFFFFF)).cos()).reshape(-1, *shape)


def to_floats(images):
    """Bytes 0 ... 255 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images):
    """[-1, 1] to the nearest byte, values outside clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def to_device(images, device):
    """The whole set as uint8 on the device, on CUDA in the network's layout; indexing keeps both."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return images.to(device).contiguous(memory_format=layout)


SHAPES = ["circle", "square", "triangle", "cross"]
COLOURS = dict(red=(210, 50, 58), green=(50, 162, 74), blue=(58, 82, 210), yellow=(226, 194, 42))
BACKGROUNDS = dict(white=(230, 230, 230), black=(26, 26, 26))
SIZES = (0.32, 0.45)                                        # half widths from, to; of the side but for a pixel's rim


def shape_captions():
    """Every caption that `shapes` can give; the index is the label."""
    return [f"a {colour} {shape} on a {ground} background"
            for colour in COLOURS for shape in SHAPES for ground in BACKGROUNDS]


def shape_distances(x, y, r):
    """Offsets (x, y) from the centre -> signed distances (4, *) in pixels, < 0 inside; each shape fills [-r, r]^2."""
    wide = torch.maximum(x.abs(), y.abs())
    narrow = torch.minimum(x.abs(), y.abs())
    circle = (x * x + y * y).sqrt() - r
    square = wide - 0.9 * r                                 # a little smaller, or it looks bigger than the others
    triangle = torch.maximum((2 * x.abs() - y - r) / 5**0.5, wide - r)     # y points down: the tip is at (0, -r)
    cross = torch.maximum(wide - r, narrow - 0.35 * r)
    return torch.stack([circle, square, triangle, cross])


def shapes(n, size=32, seed=0):
    """n pictures of one shape each -> images uint8 (n, 3, size, size), labels int64 (n,) that number shape_captions().

    Uneven light (sigma 0.12 from the middle to a side) and grain (sigma 0.04) make them a little like photographs:
    of flat colours, whose pixels are exact functions of each other, no flow finds the way back to Gaussian noise.
    """
    u = torch.rand(n, 6, generator=torch.Generator().manual_seed(seed))    # a row per picture: it does not depend on n
    choices = torch.tensor([len(SHAPES), len(COLOURS), len(BACKGROUNDS)])
    kind, colour, ground = (u[:, :3] * choices).long().T
    r = (size - 2) * (SIZES[0] + (SIZES[1] - SIZES[0]) * u[:, 3, None, None])      # half the shape's width, in pixels
    cx = 1 + r + (size - 2 - 2 * r) * u[:, 4, None, None]   # at least a pixel of background on every side
    cy = 1 + r + (size - 2 - 2 * r) * u[:, 5, None, None]
    front, back = (to_floats(torch.tensor(list(table.values())))[number, :, None, None]     # (n, 3, 1, 1)
                   for table, number in ((COLOURS, colour), (BACKGROUNDS, ground)))
    pixel = torch.arange(size) + 0.5                        # pixel centres
    ramp = torch.linspace(-1, 1, size)
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for rows in torch.arange(n).split(1024):                # bounds the memory
        distances = shape_distances(pixel - cx[rows], pixel[:, None] - cy[rows], r[rows])   # (4, rows, size, size)
        distance = distances[kind[rows], torch.arange(len(rows)), None]
        cover = (0.5 - distance).clamp(0, 1)                # the share of the pixel inside the shape: anti-aliasing
        across, down = (0.12 * pair_noise(seed + 1, rows, (2, 1, 1, 1))).unbind(1)
        light = across * ramp + down * ramp[:, None]
        grain = 0.04 * pair_noise(seed, rows, (3, size, size))
        images[rows] = to_bytes(back[rows] + cover * (front[rows] - back[rows]) + light + grain)
    return images, (colour * len(SHAPES) + kind) * len(BACKGROUNDS) + ground


def read_labels(images, tolerance=0.15):
    """Which labels pictures of the shapes (B, 3, S, S) in [-1, 1] show, by template matching: (B,), -1 for no shape.

    The border tells background and light; the colour is the one that explains the pixels best as mixtures of both;
    the shape is the one that leaves least unexplained, drawn at the best of all places and many sizes.  If that is
    more than `tolerance` of its area, it is none.
    """
    size = min(images.shape[-1], 32)                        # larger pictures are read at 32: it shows all
    scale = (images.shape[-1] - 2) * size / images.shape[-1]
    images = F.interpolate(images, (size, size), mode="area")
    half = math.ceil(SIZES[1] * scale) + 1
    x = torch.arange(-half, half + 1).float().expand(2 * half + 1, -1)
    templates = torch.stack([(0.5 - shape_distances(x + shift, x.T + shift, r)).clamp(0, 1)
                             for shift in (0.0, 0.5) for r in torch.linspace(*SIZES, 9) * scale], dim=1)
    colours, grounds = (to_floats(torch.tensor(list(table.values()))) for table in (COLOURS, BACKGROUNDS))

    ramp = torch.linspace(-1, 1, size).expand(size, -1)
    edge = torch.maximum(ramp.abs(), ramp.abs().T) == 1
    ground = torch.cdist(images[:, :, edge].median(2).values, grounds).argmin(1)
    pixels = images - grounds[ground][:, :, None, None]
    for slope in (ramp, ramp.T):                            # least squares of the light, on background alone
        light = (pixels[:, :, edge] * slope[edge]).mean((1, 2)) / slope[edge].square().mean()
        pixels = pixels - light[:, None, None, None] * slope
    pixels = pixels.flatten(2)                                                     # (B, 3, S S)
    front = colours - grounds[ground][:, None]                                     # (B, 4, 3)
    covers = torch.einsum("bkc,bcp->bkp", front, pixels) / front.square().sum(2, keepdim=True)
    rest = (pixels[:, None] - covers[:, :, None] * front[..., None]).square().sum((2, 3)) / front.square().sum(2)
    colour = rest.argmin(1)
    rows = torch.arange(len(images))
    cover = covers[rows, colour].reshape(-1, 1, size, size)
    flat = templates.flatten(0, 1)[:, None]                                        # (4 shapes x sizes, 1, width, width)
    areas = flat.square().sum((1, 2, 3))
    left = areas[:, None, None] - 2 * F.conv2d(cover, flat, padding=flat.shape[-1] // 2)
    left = left.amin((2, 3)) + (cover.square().sum((1, 2, 3)) + rest[rows, colour])[:, None]
    best = left.argmin(1)                                                          # the best place of every template
    seen = left[rows, best] < tolerance * areas[best]
    label = (colour * len(SHAPES) + best // templates.shape[1]) * len(BACKGROUNDS) + ground
    return torch.where(seen, label, -1)


def accuracy(images):
    """The share of pictures of the shapes (N, 3, S, S), the i-th drawn with label i mod 32, that show their label."""
    labels = torch.arange(len(images)) % len(shape_captions())
    return (torch.cat([read_labels(batch) for batch in images.split(500)]) == labels).double().mean().item()


def load_data(run):
    """The training images, on the CPU: uint8 (N, 3, S, S), labels int64 (N,), names of the classes."""
    config = run.config
    if config.data == "shapes":
        return *shapes(config.data_size, config.image_size, config.seed), shape_captions()
    return load_cifar10(run) if config.data == "cifar10" else load_folder(run)


def load_cifar10(run):
    """CIFAR-10's 50,000 training images by torchvision, which compares checksums before it unpickles."""
    cifar10 = torchvision.datasets.CIFAR10
    unpacked = Path(run.config.data_dir, "cifar-10-batches-py")
    try:
        if run.config.download and run.rank == 0 and not unpacked.exists():
            archive = unpacked.with_name(cifar10.filename)
            with replacing(unpacked) as part:               # torchvision itself would write where others read
                if archive.exists():                        # put there by hand
                    shutil.copy(archive, part.parent)
                cifar10(part.parent, download=True)
        run.wait()
        data = cifar10(unpacked.parent)
    except (OSError, RuntimeError) as error:                # no network; missing or broken files
        raise UserError(f"no CIFAR-10 in {unpacked}; --download fetches it (170 MB) if no such folder is there: "
                        f"{error}") from None
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    images = F.interpolate(images, run.config.image_size, mode="bicubic", antialias=True).contiguous()
    return images, torch.tensor(data.targets), data.classes


SPLITS = {"train", "val", "valid", "validation", "test"}    # of train/ and test/ above the classes, only train/ is read


def load_folder(run):
    """Images in class sub-folders, or in the folder itself: then they are one class."""
    root = Path(run.config.data).resolve()
    skipped = []
    if "train" in folders(root) <= SPLITS:
        skipped = [f"{name}/" for name in sorted(folders(root) - {"train"})]
        root = root / "train"
    classes = folders(root)
    found = [(path, path.relative_to(root).as_posix()) for path in files_below(root)]
    files = [(path, name) for path, name in found if not classes or name.split("/")[0] in classes]      # none beside
    jobs = decode_files([path for path, _ in files], run.config.image_size)
    decoded = list(tqdm(jobs, "reading images", len(files), disable=None, leave=False))
    good = {name: image for image, (_, name) in zip(decoded, files) if image is not None}
    if len(good) < 2:
        raise UserError(f"--data {run.config.data}: {len(good)} readable images are no distribution")
    skipped += [name for _, name in found if name not in good]
    names, labels, counts = np.unique([name.split("/")[0] if classes else root.name for name in good],
                                      return_inverse=True, return_counts=True)      # no class without an image
    names = [os.fsencode(name).decode(errors="replace") for name in names]          # figures want Unicode
    if run.rank == 0:
        print(f"{root}: read {len(good)} pictures; {len(names)} classes: "
              + some([f"{name} {count}" for name, count in zip(names, counts)])
              + f"; skipped {len(skipped)}: {some(skipped)}" * bool(skipped))
    run.reads("pictures", [(name, path.stat().st_size) for path, name in files if name in good])
    return torch.stack([*good.values()]), torch.from_numpy(labels), names


def folders(root):
    """The names of the folders in a folder, without hidden ones."""
    return {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}


def files_below(folder, above=()):
    """All files below a folder, in order and without hidden ones; a link to a folder is a folder."""
    above = *above, folder.resolve()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in above:                   # a link back up would never end
            yield from files_below(path, above)


def some(words):
    """The first nine, for a line on the screen."""
    return ", ".join(words[:9]) + ", ..." * (len(words) > 9)


def decode_files(paths, size):
    """For each file uint8 (3, size, size), or None; not many more at a time than whoever asks can use."""
    with ThreadPool() as pool:                              # threads are enough: Pillow frees the interpreter lock
        for first in range(0, len(paths), 1024):
            yield from pool.map(partial(decode, size=size), paths[first:first + 1024])


def decode(path, size):
    """An image file of any format, colour mode and size -> uint8 (3, size, size), or None if it cannot be read."""
    try:
        if not path.is_file():                              # a pipe would be waited for
            return None
        with Image.open(path) as image:                     # refuses decompression bombs
            sixteen = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
            image.draft("RGB", (2 * size, 2 * size))        # a large JPEG decodes faster at a fraction of its size
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":                       # Pillow's own conversion would clip at 255
                image = Image.fromarray(deep_to_bytes(np.asarray(image), sixteen))
            image = image.convert("RGBA")                   # transparent becomes white
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)     # the central square
            return torchvision.transforms.functional.pil_to_tensor(image)
    except Exception:       # broken files make decoders raise about anything: OSError, SyntaxError, struct.error, ...
        return None


def deep_to_bytes(grey, sixteen):
    """Grey of 16 bits, or of 32 or floats: then white is the least of 1, 255 and 65535 that no pixel exceeds.

    ValueError if the brightest is not even half of that (of 1: any is): such numbers may mean anything.
    """
    top = grey.max()
    white = 65535 if sixteen else next((white for white in (1, 255, 65535) if top <= white), math.nan)
    if not (sixteen or top <= 1 or top > white / 2) or not grey.min() >= 0:
        raise ValueError(f"grey from {grey.min()} to {top}: which number is white?")
    return (grey / white * 255).round().astype(np.uint8)


class Flow(nn.Module):
    """The velocity v(x, t) with a U-Net inside.  forward: x (B, C, H, W), t (B,), labels or None -> (B, C, H, W)."""

    def __init__(self, config, channels, classes):
        super().__init__()
        self.classes = classes
        self.model = UNet(config.image_size, channels, config.channels, config.mult, config.blocks,
                          config.attention, config.dropout, classes)

    def forward(self, x, t, labels=None):
        return edm_velocity(partial(self.model, labels=labels), x, t)


def edm_velocity(network, xt, t, sigma_data=0.5):
    """A raw network F as a velocity, scaled as in [Karras+22] so that F sees and gives numbers of size one at every t.

        v = (s^2 t - (1 - t)) / D x_t + s / sqrt(D) F(x_t / sqrt(D), ln(sigma) / 4),   D = (1 - t)^2 + s^2 t^2

    where s = sigma_data and sigma = (1 - t) / t is the noise-to-signal ratio.  The first term is the exact answer for
    data ~ N(0, s^2); at t = 0 it is -x_t, so that one Euler step x0 + v = s F holds no leftover noise.
    network: (x, noise_label (B,)) -> (B, *D);  xt: (B, *D);  t: (B,) in [0, 1].
    """
    time = per_sample(t, xt)                                # (B, 1, 1, 1)
    variance = (1 - time) ** 2 + (sigma_data * time) ** 2
    output = network(xt / variance.sqrt(), -torch.logit(t, eps=1e-5) / 4)
    return (sigma_data ** 2 * time - (1 - time)) / variance * xt + sigma_data / variance.sqrt() * output


def xavier(layer, scale=1.0):
    """Xavier-uniform weights times scale, zero bias.  A tiny scale makes a residual branch start as almost nothing."""
    nn.init.xavier_uniform_(layer.weight, gain=scale)
    nn.init.zeros_(layer.bias)
    return layer


def conv(c_in, c_out, kernel=3, scale=1.0):
    """A convolution that keeps the image size."""
    return xavier(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2), scale)


def group_norm(channels):
    """GroupNorm (Wu & He 2018) with at most 32 groups of at least four channels."""
    groups = min(32, channels // 4)
    if channels % 4 or channels % groups:
        raise UserError(f"{channels} channels in {groups} groups: make --channels a multiple of 4, above 32 of 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class UNetBlock(nn.Module):
    """h = conv1(drop(SiLU(norm1(conv0(SiLU(norm0(x))) + affine(emb))))); (h + skip(x)) / sqrt(2); perhaps attention."""

    def __init__(self, c_in, c_out, emb_dim, dropout, resample=None, attention=False):
        super().__init__()
        self.resample = resample or nn.Identity()
        self.attention = attention
        self.norm0 = group_norm(c_in)
        self.conv0 = conv(c_in, c_out)
        self.affine = xavier(nn.Linear(emb_dim, c_out))
        self.norm1 = group_norm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = conv(c_out, c_out, scale=1e-5)
        self.skip = conv(c_in, c_out, 1) if resample or c_in != c_out else nn.Identity()
        if attention:
            self.norm2 = group_norm(c_out)
            self.qkv = conv(c_out, 3 * c_out, 1, scale=0.2**0.5)
            self.proj = conv(c_out, c_out, 1, scale=1e-5)

    def forward(self, x, emb):
        """x (b, c_in, h, w), emb (b, emb_dim) -> (b, c_out, h, w), at half or twice the size if the block resamples."""
        h = self.conv0(self.resample(F.silu(self.norm0(x))))
        h = h + self.affine(emb)[:, :, None, None]          # how noisy is x: one shift per channel
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = (h + self.skip(self.resample(x))) * 0.5**0.5    # keeps the variance at one
        return (x + self.attend(x)) * 0.5**0.5 if self.attention else x

    def attend(self, x):
        """Every pixel looks at every other one: softmax(q·k / sqrt(c)) v with a single head (Vaswani et al. 2017)."""
        # The checkpoints store q, k, v of a channel side by side; fast attention kernels want c as the dense last axis.
        q, k, v = rearrange(self.qkv(self.norm2(x)), "b (c qkv) h w -> qkv b 1 (h w) c", qkv=3).contiguous()
        a = F.scaled_dot_product_attention(q, k, v)         # (b, 1, h·w, c)
        return self.proj(rearrange(a, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class UNet(nn.Module):
    """F(x, noise_label): level l has size image_size / 2^l and model_channels · mult[l] channels; default: CIFAR-10."""

    def __init__(self, image_size=32, image_channels=3, model_channels=128, mult=(2, 2, 2), num_blocks=4,
                 attention=(16,), dropout=0.13, classes=0):
        super().__init__()
        lowest = image_size >> len(mult) - 1                # side of the last level
        if not lowest or image_size & (image_size - 1):
            raise UserError(f"--image-size {image_size}: no power of two, or too small for {len(mult)} levels (--mult)")
        self.shape = (image_channels, image_size, image_size)
        self.classes = classes
        emb_dim = 4 * model_channels
        if classes:
            self.map_label = xavier(nn.Linear(classes, model_channels))
        self.map_layer0 = xavier(nn.Linear(model_channels, emb_dim))
        self.map_layer1 = xavier(nn.Linear(emb_dim, emb_dim))
        # buffers move with the network, wherever it is exported to; they are not saved
        self.register_buffer("frequencies", 10000 ** -torch.linspace(0, 1, model_channels // 2), persistent=False)
        self.register_buffer("numbers", torch.arange(classes), persistent=False)
        block = partial(UNetBlock, emb_dim=emb_dim, dropout=dropout)
        levels = [(image_size >> level, m * model_channels) for level, m in enumerate(mult)]
        skips = [model_channels]                            # widths of the outputs that the decoder reads again
        self.enc = nn.ModuleDict({f"{image_size}x{image_size}_conv": conv(image_channels, model_channels)})
        for size, channels in levels:
            if size < image_size:
                self.enc[f"{size}x{size}_down"] = block(skips[-1], skips[-1], resample=nn.AvgPool2d(2))
                skips.append(skips[-1])
            for i in range(num_blocks):
                self.enc[f"{size}x{size}_block{i}"] = block(skips[-1], channels, attention=size in attention)
                skips.append(channels)
        width = skips[-1]                                   # of the latest output
        self.dec = nn.ModuleDict({f"{lowest}x{lowest}_in0": block(width, width, attention=True),
                                  f"{lowest}x{lowest}_in1": block(width, width)})
        for size, channels in reversed(levels):
            if size > lowest:
                self.dec[f"{size}x{size}_up"] = block(width, width, resample=nn.Upsample(scale_factor=2))
            for i in range(num_blocks + 1):                 # one more: the level's first conv or down is read too
                attend = size in attention and i == num_blocks
                self.dec[f"{size}x{size}_block{i}"] = block(width + skips.pop(), channels, attention=attend)
                width = channels
        self.dec[f"{image_size}x{image_size}_aux_norm"] = group_norm(width)
        self.dec[f"{image_size}x{image_size}_aux_conv"] = conv(width, image_channels, scale=1e-5)

    def embed(self, noise_label, labels):
        """sin(f·s), cos(f·s) of the noise label s at frequencies f = 1 ... 1/10000, plus the class, through an MLP."""
        angles = noise_label.float()[:, None] * self.frequencies    # float32 even under autocast: bf16 merges nearby s
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)        # (b, model_channels)
        if self.classes:
            rows = labels if labels.is_floating_point() else labels[:, None] == self.numbers        # (b, classes)
            emb = emb + self.map_label(rows.to(emb.dtype) * self.classes**0.5)          # one-hot: mean square one
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))                    # (b, 4·model_channels)

    def forward(self, x, noise_label, labels=None):
        """x (b, c, h, w), noise_label (b,), labels: int64 (b,), float (b, classes); or None -> (b, c, h, w)."""
        if x.shape[1:] != self.shape or (labels is None) == bool(self.classes):
            raise ValueError(f"UNet built for x (b, *{self.shape}) and {self.classes} classes, got {tuple(x.shape)}")
        emb = self.embed(noise_label, labels)
        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        *blocks, (_, norm), (_, head) = self.dec.items()        # the last two are aux_norm and aux_conv
        for name, block in blocks:
            x = block(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, emb)
        return head(F.silu(norm(x)))


# endregion


if __name__ == "__main__":
    launch(main, Config)
