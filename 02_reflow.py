"""Chapter 2 - reflow on images: does straightening hold beyond two dimensions?

The loss is chapter 1's.  New are the sizes: the velocity is a U-Net, and reflow's pairs no longer come for free.
    1-RF   learn v on x_t = (1 - t) x0 + t x1 with noise x0 and pictures x1 drawn apart                [Liu+22 eq. 1]
    pairs  (z0, z1 = ODE[v](z0)) by the averaged network, stored in shards; z0 is not stored but recomputed
    2-RF   the same loss on the pairs, from 1-RF's weights: nearly straight, so one Euler step draws a picture
One step of 1-RF gives the mean picture of a class, soft at its edges; one step of 2-RF gives a picture already.

    python 02_reflow.py                                        # procedural shapes, offline, minutes on a laptop
    python 02_reflow.py --data photos/ --image-size 32 --attention 8             # your own images, a folder a class
    torchrun --nproc-per-node 8 02_reflow.py --preset paper --download --fid     # CIFAR-10 as in the paper

You will see a table of Frechet distances against steps, with the straightness of the paths and the share of pictures
that can be read, and in runs/02_reflow/quick/ samples.png: the same noises after 1 to many steps, 1-RF above 2-RF.
[Liu+22] Liu, Gong, Liu: Flow Straight and Fast, arXiv 2209.03003.  [Song+21] Score-Based Generative Modeling through
SDEs, arXiv 2011.13456 (the network).  [Karras+22] Elucidating the Design Space, arXiv 2206.00364 (its scaling).
"""
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import typing
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, ClassVar, Literal

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

# ---- The method ------------------------------------------------------------------------------------------------------


# Differs from 01_rectified_flow.py: pictures from memory, half of them mirrored, in place of a sampler
def draw_independent(images, labels, n):
    """1-RF's coupling: noise x0 and pictures x1 drawn apart.  images: uint8 (N, C, H, W);  labels: (N,) or None."""
    index = torch.randint(len(images), (n,), device=images.device)
    x1 = to_floats(images[index])
    # mirroring doubles the data; on reflow's pairs it would tear z1 from its z0
    x1 = torch.where(torch.rand(n, 1, 1, 1, device=x1.device) < 0.5, x1.flip(3), x1)
    return torch.randn_like(x1), x1, None if labels is None else labels[index]


# Differs from 01_rectified_flow.py: a pair has an index, which fixes its noise and its class
def make_pairs(velocity, seed, index, config):
    """Reflow's coupling z0 ~ N(0, I), z1 = ODE[v](z0) [Liu+22], for the pairs of these indices (B,)."""
    z0 = pair_noise(seed, index, velocity.shape)
    return z0, sample(velocity, z0, index, config.pair_steps, config.pair_solver)


# Differs from 01_rectified_flow.py: z1 was stored, z0 is made again
def draw_stored(z1, seed, classes, n):
    """A reflow round's coupling: one index picks both ends.  z1: uint8 (N, C, H, W) of make_pairs with this seed."""
    index = torch.randint(len(z1), (n,), device=z1.device)
    x0 = pair_noise(seed, index, z1.shape[1:])
    return x0, to_floats(z1[index]), index % classes if classes else None      # the labels they were made with


# Differs from 01_rectified_flow.py: a batch may carry class labels
def pair_loss(model, ema, step, draw, n):
    """|x1 - x0 - v(x_t, t)|^2 at x_t = (1 - t) x0 + t x1, t ~ U[0, 1] [Liu+22 eq. 1].  Returns (n,).

    The loss of every round; only draw is another: n -> x0, x1 (n, C, H, W), labels (n,) or None.
    """
    x0, x1, labels = draw(n)
    t = torch.rand(n, device=x0.device)
    v = model(interpolate(x0, x1, t), t, labels)
    return (v - (x1 - x0)).square().flatten(1).mean(1)


# ---- Settings: every field is a flag, the comment beside it its help -------------------------------------------------


# Differs from 01_rectified_flow.py: images, stored pairs, a U-Net, and the papers' sizes as presets
@dataclass
class Config:
    """Rectified flows of images."""
    preset: Literal["quick", "gpu", "paper"] = "quick"      # size of the run
    data: str = "shapes"                                    # shapes, cifar10 or a folder of images in class sub-folders
    data_dir: str = "data"                                  # where CIFAR-10 and the Inception network are kept
    download: bool = False                                  # fetch CIFAR-10 or the Inception network if missing
    data_size: Annotated[int, 2, 10 ** 8] = 20000           # pictures of the procedural set
    image_size: Annotated[int, 4, 1024] = 16                # side in pixels; a power of two
    rounds: Annotated[int, 1, 10] = 2                       # rectified flows in a row: 1-RF, 2-RF, ...
    teacher: str = ""                                       # a finished 1-rf.pt in place of training 1-RF
    conditional: bool = True                                # feed class labels to the network
    steps: Count = 1500                                     # training steps of 1-RF
    reflow_steps: Count = 1200                              # training steps of every later round
    batch: Count = 32                                       # images in a step, over all processes
    accumulate: Count = 1                                   # slices of a batch, one after the other, if memory is short
    pairs: Count = 4096                                     # pairs (z0, z1) made for a reflow round
    pair_solver: Literal["euler", "heun", "rk45"] = "heun"  # ODE solver that makes pairs
    pair_steps: Count = 8                                   # its steps; rk45: digits of its tolerance
    shard: Count = 256                                      # pairs in a file, and images sampled at a time
    channels: Count = 32                                    # width of the first level: a multiple of 32, or 4, 8, 16
    mult: Annotated[tuple, 1, 64] = (1, 1, 1)               # width of each level, in multiples of channels
    blocks: Count = 1                                       # residual blocks of a level
    attention: Annotated[tuple, 1, 1024] = (4,)             # resolutions with self-attention
    dropout: Annotated[float, 0, 0.9] = 0.0                 # dropout in the residual blocks
    lr: Amount = 6e-3                                       # peak learning rate
    lr_decay: Literal["cosine", "constant"] = "cosine"      # learning rate after the warm-up: down to 0, or as it is
    warmup: Whole = 50                                      # steps of linear warm-up
    grad_clip: Amount = 1.0                                 # largest gradient norm
    ema_decay: Share = 0.998                                # decay of the averaged weights
    eval_size: Annotated[int, 2, 10 ** 7] = 500             # samples of a Frechet distance (the papers use 50000)
    digits: Annotated[int, 1, 9] = 2                        # rk45 in the table: its tolerance is 10^-digits
    fid: bool = False                                       # true FID: Inception in place of small random features
    seed: Whole = 0                                         # seed of every random draw
    log_every: Count = 100                                  # steps between log lines; a checkpoint is written at each
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    compile: bool = False                                   # torch.compile the network (CUDA only; pays in long runs)
    out: str = ""                                           # run folder; empty: runs/<script>/<preset>
    fresh: bool = False                                     # start over: delete what the run folder holds
    may_change: ClassVar = {"data_dir", "download", "log_every", "device", "compile", "out", "fresh"}
    presets: ClassVar = {
        "quick": {},
        "gpu": dict(                                        # one GPU, about half an hour: DDPM++ at half its depth
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=2, attention=(16,),
            dropout=0.1, batch=256, steps=12000, reflow_steps=5000, lr=4e-4, warmup=500, ema_decay=0.999,
            pairs=50000, pair_steps=18, shard=500, eval_size=10000, digits=4, log_every=500, compile=True),
        "paper": dict(                                      # [Liu+22] appendix: pairs by rk45 (its 1-RF: EMA 0.999999)
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=4, attention=(16,),
            dropout=0.15, batch=128, steps=600000, reflow_steps=300000, lr=2e-4, warmup=5000, lr_decay="constant",
            ema_decay=0.9999, pairs=4000000, pair_solver="rk45", pair_steps=5, shard=1000, eval_size=50000,
            digits=5, log_every=500, compile=True),
    }


# ---- The experiment --------------------------------------------------------------------------------------------------


# Differs from 01_rectified_flow.py: image data, a teacher file, pairs on disk
def main(config):
    """Algorithm 1 of [Liu+22] on images: fit a flow to noise and data; then, again, to the flow's own endpoints."""
    run = Run(config, __file__)
    images, labels, names = load_data(run)
    features, distance = choose_features(run)
    classes = len(names) if config.conditional else 0
    torch.manual_seed(seed_for(config.seed, 0))                                 # the start weights
    flow = Flow(config, images.shape[1], classes)
    if config.teacher:
        flow = load_flow(config.teacher, run, images.shape[1], classes)
        run.reads("teacher_weights", flow)
    else:
        draw = partial(draw_independent, to_device(images, run.device), labels.to(run.device) if classes else None)
        flow = run.fit("1-rf", flow, partial(pair_loss, draw=draw, n=run.share), stream=1)
    flows = [flow]
    for k in range(2, config.rounds + 1):                                       # reflow
        write_pairs(run, f"{k}-rf", Velocity(flow, config), stream=k)
        draw = partial(draw_stored, load_pairs(run, f"{k}-rf"), seed_for(config.seed, k), classes)
        loss = partial(pair_loss, draw=draw, n=run.share)
        flow = run.fit(f"{k}-rf", flow, loss, stream=k, steps=config.reflow_steps)
        flows.append(flow)
    if run.rank == 0:
        report(flows, images, features, distance, run)


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


# Differs from 01_rectified_flow.py: Frechet distances in place of W2
def report(flows, images, features, distance, run):
    """Measure every round from the same noises, print the table, draw the figure."""
    real = feature_moments(images, features, run.device)
    results = []
    strips = {}
    for k, flow in enumerate(flows, 1):
        result, pictures = evaluate(Velocity(flow, run.config), real, features, run)
        results.append(result)
        strips |= {f"{k}-RF, {name}": row for name, row in pictures.items()}
    save_json(run.folder / "results.json", {"distance": distance, "samples": run.config.eval_size, "rounds": results})
    print_table(results, distance)
    draw_samples(strips, run.folder / "samples.png")
    print(f"\n{time.perf_counter() - run.started:.0f} s; samples.png and results.json are in {run.folder}/")


# Differs from 01_rectified_flow.py: no closed form to compare with
def evaluate(velocity, real, features, run):
    """Numbers of one flow, and pictures for the figure.  real: moments of the training set's features."""
    readable = run.config.data == "shapes" and velocity.classes
    result = {"FD": {}, "NFE": {}}
    pictures = {}
    for steps, method in [(1, "euler"), (2, "euler"), (4, "euler"), (8, "euler"), (run.config.digits, "rk45")]:
        name = f"N = {steps}" if method == "euler" else method
        images, result["NFE"][name] = generate(velocity, run, steps, method)
        result["FD"][name] = frechet_from_moments(*feature_moments(images, features, run.device), *real)
        pictures[name] = images[:60:5]                      # of every colour
        if readable:
            result.setdefault("accuracy", {})[name] = accuracy(images)
    index = torch.arange(run.config.shard, device=run.device)
    x0 = pair_noise(seed_for(run.config.seed, 999), index, velocity.shape)
    flow = partial(velocity, labels=index % velocity.classes if velocity.classes else None)
    result["S"] = straightness_by_time(flow, x0, 10).mean().item()
    return result, pictures


# Differs from 01_rectified_flow.py: Frechet distances in place of W2
def print_table(results, distance):
    """The numbers of all rounds, a line each, and how to read them."""
    print(f"\n{distance} after N Euler steps, or by rk45 with its evaluations; S straightness (0: one step is exact)")
    print("      " + "".join(f"{name:>10}" for name in results[0]["FD"]) + "      NFE         S")
    for k, r in enumerate(results, 1):
        numbers = "".join(f"{fd:10.3f}" for fd in r["FD"].values())
        print(f"{k}-RF  {numbers} {r['NFE']['rk45']:8.0f} {r['S']:9.3f}")
    if "accuracy" in results[0]:
        print("accuracy: share of these samples that show their caption; it forgives soft edges, the distance does not")
        for k, r in enumerate(results, 1):
            print(f"{k}-RF  " + "".join(f"{share:10.3f}" for share in r["accuracy"].values()))


# ---- Sampling, metrics, figures --------------------------------------------------------------------------------------


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


def sample(velocity, z0, index, steps, method="euler"):
    """Where the flow carries z0 (B, C, H, W) of these pairs: euler or heun in so many steps, or rk45 to 10^-steps."""
    labels = index % velocity.classes if velocity.classes else None         # pair i has this one in draw_stored, too
    if method == "rk45":
        return integrate_adaptive(partial(in_float32, velocity, labels=labels), z0, 10.0 ** -steps)
    return integrate(partial(velocity, labels=labels), z0, steps, method)[-1]


@torch.no_grad()
def in_float32(velocity, x, t, labels):
    """v(x, t) all in float32: rk45 would take the rounding of bf16 and TF32 for errors of its steps, and halve them."""
    velocity.evaluations += 1
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        v = velocity.flow.forward(x, t, labels)             # not the compiled graph
    torch.set_float32_matmul_precision("high")
    return v


def integrate_adaptive(velocity, x0, tolerance=1e-5):
    """Where dz = v(z, t) dt carries x0, by scipy's Dormand-Prince 5(4); the batch is one state, as in [Liu+22]."""
    def slope(t, flat):                                     # scipy wants one flat float64 vector
        z = torch.as_tensor(flat, dtype=x0.dtype).to(x0.device).reshape(x0.shape)
        return velocity(z, x0.new_full(x0.shape[:1], t)).cpu().double().numpy().ravel()
    solution = solve_ivp(slope, (0.0, 1.0), x0.cpu().double().numpy().ravel(), "RK45", rtol=tolerance, atol=tolerance)
    if not solution.success:
        raise UserError(f"rk45 gave up at t = {solution.t[-1]:.3f} ({solution.message}); lower --lr, add --fresh")
    return torch.as_tensor(solution.y[:, -1], dtype=x0.dtype).to(x0.device).reshape(x0.shape)


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


def straightness_by_time(velocity, x0, steps):
    """The integrand of S = int_0^1 E |(z1 - z0) - v(z_t, t)|^2 dt in the middle of every step.  Returns (steps,)."""
    path = integrate(velocity, x0, steps, "heun")
    return (path.diff(dim=0) * steps - (path[-1] - path[0])).square().flatten(2).sum(2).mean(1)


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


def frechet_distance(features_a, features_b):
    """Frechet distance of Gaussians fitted to features (N, F) and (M, F).  Biased upwards: mind N and M."""
    return frechet_from_moments(*moments(features_a), *moments(features_b))


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


# ---- Data ------------------------------------------------------------------------------------------------------------


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


# ---- Network: DDPM++ [Song+21] under the parameter names of the public EDM checkpoints; Flow makes it a velocity -----


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


# region Copied from 01_rectified_flow.py: training loop, solver, straightness, plumbing -------------------------------

def interpolate(x0, x1, t):
    """The straight line x_t = (1 - t) x0 + t x1 [Liu+22 eq. 1].  x0, x1: (B, *D), t: (B,).  Returns (B, *D)."""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * x1


def per_sample(t, x):
    """t (B,) as (B, 1, ..., 1): a number for each sample of x (B, *D)."""
    return t.reshape(t.shape + (1,) * (x.dim() - 1))


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


if __name__ == "__main__":
    launch(main, Config)
