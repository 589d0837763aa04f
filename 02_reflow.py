"""Chapter 2 - reflow on images: does straightening hold beyond two dimensions?

The loss is chapter 1's.  New are the sizes: the velocity is a U-Net, and reflow's pairs no longer come for free.
    1-RF   learn v on x_t = (1 - t) x0 + t x1 with noise x0 and pictures x1 drawn apart                [Liu+22 eq. 1]
    pairs  (z0, z1 = ODE[v](z0)) by the averaged network, stored in shards; z0 is not stored but recomputed
    2-RF   the same loss on the pairs, from 1-RF's weights: nearly straight, so one Euler step draws a picture
One step of 1-RF gives the mean of the data, a grey blur; one step of 2-RF gives what 1-RF needs many steps for.

    python 02_reflow.py                                        # procedural shapes, offline, minutes on a laptop
    python 02_reflow.py --data photos/ --image-size 32         # your own images, in class sub-folders
    torchrun --nproc-per-node 8 02_reflow.py --preset paper --download --fid     # CIFAR-10 as in the paper

You will see, in runs/02_reflow/quick/: samples.png (the same noises after 1, 2, 4, 8 and many steps, 1-RF above 2-RF),
quality.png (Frechet distance against evaluations of the network), straightness.png, and a table of the numbers.
[Liu+22] Liu, Gong, Liu: Flow Straight and Fast, arXiv 2209.03003.  [Song+21] Score-Based Generative Modeling through
SDEs, arXiv 2011.13456 (the network).  [Karras+22] Elucidating the Design Space, arXiv 2206.00364 (its scaling).
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
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import ClassVar

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


# Differs from 01_rectified_flow.py: images, stored pairs, a U-Net, and the papers' sizes as presets
@dataclass
class Config:
    """Settings of this chapter; every field is a command-line flag."""
    preset: str = option("quick", "size of the run", choices=("quick", "gpu", "paper"))
    data: str = option("shapes", "shapes, cifar10, or a folder of images in class sub-folders")
    data_dir: str = option("data", "where torchvision keeps CIFAR-10", free=True)
    download: bool = option(False, "fetch CIFAR-10 or the Inception network if missing", free=True)
    data_size: int = option(20000, "pictures of the procedural set", low=1)
    image_size: int = option(16, "side in pixels; a power of two", low=4, high=1024)
    rounds: int = option(2, "rectified flows in a row: 1-RF, 2-RF, ...", low=1, high=10)
    teacher: str = option("", "a finished 1-rf.pt to start from instead of training 1-RF")
    conditional: bool = option(True, "feed class labels to the network")
    steps: int = option(1200, "training steps of 1-RF", low=1)
    reflow_steps: int = option(1600, "training steps of every later round", low=1)
    batch: int = option(32, "images in a step, over all processes", low=1)
    pairs: int = option(4096, "pairs (z0, z1) made for a reflow round", low=1)
    pair_solver: str = option("heun", "ODE solver that makes pairs", choices=("euler", "heun", "rk45"))
    pair_steps: int = option(5, "its steps (heun takes two evaluations each; rk45 ignores it)", low=1)
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
    eval_size: int = option(500, "samples of a Frechet distance (the papers use 50000)", low=2)
    tolerance: float = option(1e-2, "error tolerance of rk45 in the evaluation", low=1e-9, high=1.0)
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
        "gpu": dict(                                       # one GPU, about half an hour: DDPM++ at half its depth
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=2, attention=(16,),
            dropout=0.1, batch=256, steps=12000, reflow_steps=5000, lr=4e-4, warmup=500, ema_decay=0.999,
            pairs=50000, pair_steps=18, shard=500, eval_size=10000, tolerance=1e-4, log_every=100,
            checkpoint_every=1000),
        "paper": dict(                                     # [Liu+22] appendix: DDPM++, 4 M pairs by rk45, constant rate
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=4, attention=(16,),
            dropout=0.15, batch=128, steps=600000, reflow_steps=300000, lr=2e-4, warmup=5000, lr_decay="constant",
            ema_decay=0.9999, pairs=4000000, pair_solver="rk45", shard=1000, eval_size=50000, tolerance=1e-5,
            log_every=100, checkpoint_every=10000),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------------------


# Differs from 01_rectified_flow.py: pairs are many and large, so they are written to disk in shards
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


# Differs from 01_rectified_flow.py: a batch may carry class labels
def pair_loss(draw, config, device):
    """The loss_fn of this chapter: uniform times on draw(n) -> x0, x1 (n, C, H, W), labels (n,) or None."""
    batch = config.batch // process()[1]

    def loss_fn(model, ema, step):
        x0, x1, labels = draw(batch)
        return flow_matching_loss(partial(model, labels=labels), x0, x1, torch.rand(batch, device=device))
    return loss_fn


# Differs from 01_rectified_flow.py: pictures from memory, half of them mirrored, in place of a sampler
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


# Differs from 01_rectified_flow.py: z0 is recomputed from the index
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


def sample(velocity, z0, index, steps, method="euler", tolerance=1e-5):
    """Where the flow carries z0 (B, C, H, W).  Pair i has label i modulo the number of classes, if there are any."""
    labels = index % velocity.classes if velocity.classes else None
    flow = partial(velocity, labels=labels)
    return integrate_adaptive(flow, z0, tolerance)[-1] if method == "rk45" else integrate(flow, z0, steps, method)[-1]


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


def straightness_by_time(velocity, x0, steps):
    """The integrand of straightness, E |(z1 - z0) - v(z_t, t)|^2, in the middle of every step.  Returns (steps,)."""
    path = integrate(velocity, x0, steps, "heun")
    return (path.diff(dim=0) * steps - (path[-1] - path[0])).square().flatten(2).sum(2).mean(1)


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


def moments(features):
    """Features (N, F) -> their mean (F,) and covariance (F, F) in float64: all that a Fréchet distance looks at."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, F) with N >= 2, got {tuple(features.shape)}")
    features = features.cpu().double()  # the CPU first: MPS has no float64
    centred = features - features.mean(0)
    return features.mean(0), centred.T @ centred / (len(features) - 1)


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


def frechet_distance(features_a, features_b):
    """Fréchet distance of Gaussians fitted to features (N, F) and (M, F). Biased upwards: compare at equal N and M."""
    if features_a.shape[1:] != features_b.shape[1:]:
        raise ValueError(f"feature sizes differ: {tuple(features_a.shape)} and {tuple(features_b.shape)}")
    return frechet_from_moments(*moments(features_a), *moments(features_b))


INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


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


def generate(velocity, config, shape, device, steps, method="euler"):
    """config.eval_size samples in [-1, 1] from the same noises for every network and solver; and the evaluations used.

    Returns (N, C, H, W) on the CPU and the mean number of network evaluations of a batch.
    """
    before, chunks = velocity.evaluations, torch.arange(config.eval_size, device=device).split(config.shard)
    noise_seed = seed_for(config.seed, 999)                # the pairs use other seeds, so these noises are new
    images = [sample(velocity, pair_noise(noise_seed, index, shape), index, steps, method, config.tolerance).cpu()
              for index in chunks]
    return torch.cat(images).clamp(-1, 1), (velocity.evaluations - before) / len(chunks)


def feature_moments(images, features, device, size=500):
    """Mean and covariance of the features of uint8 or float images (N, C, H, W), in batches."""
    chunks = (batch.to(device) for batch in images.split(size))
    return moments(torch.cat([features(to_floats(x) if x.dtype == torch.uint8 else x).cpu() for x in chunks]))


def data_moments(images, features, name, device):
    """feature_moments of the training set, kept in runs/cache under a hash of its bytes."""
    digest = hashlib.sha256(images.contiguous().numpy()).hexdigest()[:16]
    path = Path(f"runs/cache/{name}-{digest}.pt")
    if not path.exists():
        mean, cov = feature_moments(images, features, device)
        save_checkpoint(path, config={"features": name}, mean=mean, cov=cov)
    content = load_checkpoint(path, keys=("mean", "cov"))
    return content["mean"], content["cov"]


# Differs from 01_rectified_flow.py: Frechet distance in place of W2, no closed form to compare with
def evaluate(velocity, real, features, config, shape, device):
    """Frechet distance after 1, 2, 4, 8 Euler steps and by rk45, and straightness, all from the same noises.

    real: moments of the training set's features.  Returns a dict of numbers, and a dict of samples for the figure.
    """
    result, pictures = {"FD": {}, "NFE": {}}, {}
    for name, steps, method in [(str(n), n, "euler") for n in (1, 2, 4, 8)] + [("rk45", 1, "rk45")]:
        images, nfe = generate(velocity, config, shape, device, steps, method)
        result["FD"][name] = frechet_from_moments(*feature_moments(images, features, device), *real)
        result["NFE"][name], pictures[name] = nfe, images[:12]
    index = torch.arange(min(256, config.eval_size), device=device)
    flow = partial(velocity, labels=index % velocity.classes if velocity.classes else None)
    by_time = straightness_by_time(flow, pair_noise(seed_for(config.seed, 999), index, shape), 10)
    return result | {"S": by_time.mean().item(), "S_by_t": by_time.tolist()}, pictures


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def to_floats(images):
    """Bytes 0 ... 255 to [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images):
    """[-1, 1] to the nearest byte, values outside clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def to_device(images, device):
    """The whole set as bytes on the device, in the layout of the network; indexing keeps both."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return images.to(device).contiguous(memory_format=layout)


def shard_file(folder, i):
    """Where shard i of the pairs lies."""
    return folder / f"{i:05d}.npy"


def save_array(path, tensor):
    """A tensor as .npy, written whole.  By way of memory: np.save to a file does not notice a disk that fills up."""
    file = io.BytesIO()
    np.save(file, tensor.cpu().numpy())
    with replacing(path) as part:
        part.write_bytes(file.getvalue())


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


SHAPES = ["circle", "square", "triangle", "cross"]  # the index is the label
COLOURS = dict(red=(230, 30, 40), green=(30, 170, 60), blue=(40, 70, 230), yellow=(250, 210, 20))
BACKGROUNDS = dict(white=(255, 255, 255), black=(0, 0, 0))


def shape_distances(x, y, r):
    """Offsets (x, y) from the centre -> signed distances (4, *) in pixels, < 0 inside; each shape fills [-r, r]²."""
    wide, narrow = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    circle = (x * x + y * y).sqrt() - r
    square = wide - 0.9 * r  # a little smaller, or it looks bigger than the others
    triangle = torch.maximum((2 * x.abs() - y - r) / 5**0.5, wide - r)  # y points down: the tip is at (0, -r)
    cross = torch.maximum(wide - r, narrow - 0.35 * r)
    return torch.stack([circle, square, triangle, cross])


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


def load_data(config, cache="runs/cache"):
    """The training images, on the CPU: uint8 (N, 3, S, S), labels int64 (N,), names of the classes."""
    if config.data == "shapes":
        return *shapes(config.data_size, config.image_size, config.seed)[:2], list(SHAPES)
    if config.data == "cifar10":
        return load_cifar10(config.data_dir, config.image_size, config.download)
    return load_folder(config.data, config.image_size, cache)


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
# DDPM++ [Song+21] under the parameter names of the public EDM checkpoints; Flow turns it into a velocity.


class Flow(nn.Module):
    """The velocity v(x, t) with a U-Net inside.  forward: x (B, C, H, W), t (B,), labels or None -> (B, C, H, W)."""

    def __init__(self, config, channels, classes):
        super().__init__()
        self.model = UNet(config.image_size, channels, config.channels, tuple(config.mult), config.blocks,
                          tuple(config.attention), config.dropout, classes)

    def forward(self, x, t, labels=None):
        return edm_velocity(partial(self.model, labels=labels), x, t)


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


def xavier(layer, scale=1.0):
    """Xavier-uniform weights times `scale`, zero bias. A tiny scale makes a residual branch start as almost nothing."""
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
        raise ValueError(f"{channels} channels in {groups} groups: make model_channels a multiple of 4, above 32 of 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


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


def tile(images):
    """(n, C, H, W) in [-1, 1] side by side as an array (H, n W, C) for imshow, a white line between them."""
    images = torch.nn.functional.pad(to_bytes(images).float(), (1, 1, 1, 1), value=255)
    return rearrange(images, "n c h w -> h (n w) c").byte().numpy()


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


# Differs from 01_rectified_flow.py: Frechet distance against evaluations
def draw_quality(results, label, folder):
    """Frechet distance against network evaluations, one curve per round; the adaptive solver as a star."""
    figure, axes = new_figure(1, size=5.0)
    for k, result in enumerate(results, 1):
        points = [(result["NFE"][n], result["FD"][n]) for n in result["FD"]]
        line, = axes[0, 0].loglog(*zip(*points[:-1]), "o-", linewidth=2, label=f"{k}-RF, Euler")
        axes[0, 0].loglog(*points[-1], "*", markersize=13, color=line.get_color(), label=f"{k}-RF, rk45")
    axes[0, 0].set(xlabel="network evaluations", ylabel=label)
    axes[0, 0].legend(frameon=False)
    save_figure(figure, folder / "quality.png")


def draw_straightness(results, folder):
    """How far the velocity is from the chord, along t: where a big step would go wrong."""
    figure, axes = new_figure(1, size=5.0)
    for k, result in enumerate(results, 1):
        times = (np.arange(len(result["S_by_t"])) + 0.5) / len(result["S_by_t"])
        axes[0, 0].semilogy(times, result["S_by_t"], "o-", markersize=4, label=f"{k}-RF (S = {result['S']:.3g})")
    axes[0, 0].set(xlabel="t  (0 noise, 1 data)", ylabel="E |(z1 - z0) - v|$^2$, summed over pixels")
    axes[0, 0].legend(frameon=False)
    save_figure(figure, folder / "straightness.png")


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing (copied from chapter 1)
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


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the block before the others, so that it alone downloads and decodes, and they find its files."""
    if process()[0] > 0:
        wait_for_all()
    yield
    if process()[0] == 0:
        wait_for_all()


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


# Differs from 01_rectified_flow.py: Frechet distances
def print_table(results, label):
    """The numbers of all rounds, a line each, and how to read them."""
    names = list(results[0]["FD"])
    print(f"\n{label} after N Euler steps, or by rk45 with its evaluations; S straightness (0: one step is exact)")
    print("      " + "".join(f"{'N=' + n if n.isdigit() else n:>10}" for n in names) + "      NFE         S")
    for k, r in enumerate(results, 1):
        numbers = "".join(f"{fd:10.3f}" for fd in r["FD"].values())
        print(f"{k}-RF  {numbers} {r['NFE']['rk45']:8.0f} {r['S']:9.3f}")


# Differs from 01_rectified_flow.py: 1-RF may be a given teacher, pairs come from disk
def train_round(k, teacher, images, labels, classes, config, device, folder):
    """Train k-RF: round 1 on pictures, later ones on stored pairs of the flow before, from its weights."""
    flow = place(Flow(config, images.shape[1], classes), device)
    if teacher is None:
        draw = draw_independent(images, labels, classes)
        return fit(flow, pair_loss(draw, config, device), config, folder, "1-rf", 1)
    flow.load_state_dict(teacher.state_dict())
    pairs, config = folder / "pairs" / f"{k}-rf", dataclasses.replace(config, steps=config.reflow_steps)
    make_pairs(Velocity(teacher, config), pairs, config, images.shape[1:], device, stream=k)
    wait_for_all()
    draw = draw_stored(load_pairs(pairs, config, images.shape[1:], device), seed_for(config.seed, k), classes)
    return fit(flow, pair_loss(draw, config, device), config, folder, f"{k}-rf", k)


# Differs from 01_rectified_flow.py: the file may come from another run, so its network is compared with ours
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


def check_network(config, images, classes):
    """UserError, before anything is written, for sizes that no network can have and for data without a spread."""
    if len(images) < 2:
        raise UserError(f"--data {config.data}: {len(images)} picture is no distribution; give at least two")
    try:
        with torch.device("meta"):                         # no memory, no time
            Flow(config, images.shape[1], classes)
    except ValueError as error:
        raise UserError(f"--image-size, --channels or --mult: {error}") from None


# Differs from 01_rectified_flow.py: image data, a teacher file
def main(config):
    """Every stage in turn, each skipped if it is finished, then every number and figure."""
    device, started = choose_device(config), time.perf_counter()
    with rank_zero_first():
        images, labels, names = load_data(config)
        features, label = choose_features(config, device)
    classes = len(names) if config.conditional else 0
    check_network(config, images, classes)
    build = partial(load_round, config=config, channels=images.shape[1], classes=classes, device=device)
    given = build(config.teacher) if config.teacher else None
    folder = open_run(config, __file__)
    resident, labels = to_device(images, device), labels.to(device)
    flows = []
    for k in range(1, config.rounds + 1):
        finished = folder / f"{k}-rf.pt"
        done = finished.exists()
        wait_for_all()                                     # all have looked before rank 0 writes
        if not done:
            torch.manual_seed(seed_for(config.seed, 0))    # the start weights
            flow = given if given and k == 1 else train_round(
                k, flows[-1] if flows else None, resident, labels, classes, config, device, folder).model
            save_checkpoint(finished, config=dataclasses.asdict(config), model=flow.state_dict())
            wait_for_all()                                 # the others read the file that rank 0 writes
        flows.append(build(finished))
    if process()[0] == 0:
        report(flows, images, features, label, config, device, folder)
        print(f"\n{time.perf_counter() - started:.0f} s; figures and results.json are in {folder}/")


# Differs from 01_rectified_flow.py: other numbers and figures
def report(flows, images, features, label, config, device, folder):
    """Measure every round from the same noises, print the table, draw the figures."""
    real = data_moments(images, features, "inception" if config.fid else "random", device)
    outcomes = [evaluate(Velocity(flow, config), real, features, config, images.shape[1:], device) for flow in flows]
    results, pictures = zip(*outcomes)
    save_json(folder / "results.json", {"distance": label, "samples": config.eval_size, "rounds": results})
    print_table(results, label)
    strips = {f"{k}-RF, {n} step{'s' * (n != '1')}" if n.isdigit() else f"{k}-RF, {n}": images
              for k, rows in enumerate(pictures, 1) for n, images in rows.items()}
    draw_samples(strips, folder)
    draw_quality(results, label, folder)
    draw_straightness(results, folder)


def choose_features(config, device):
    """The feature network of the Frechet distance and its honest name."""
    if config.fid:
        network = inception_features(config.inception or None, config.download, config.data_dir, device)
        return network, f"FID ({config.eval_size} samples, training-set statistics)"
    return RandomFeatures().to(device), f"Frechet distance of seeded random features, {config.eval_size} samples"


if __name__ == "__main__":
    launch(main, Config)
