"""Chapter 1 - rectified flow in 2-D: why do generative ODEs need many steps, and what does straightening buy?

A flow carries noise x0 to data x1 by the ODE dz = v(z, t) dt, t: 0 -> 1.  Rectified flow [Liu+22] learns v by this:

    draw x0 ~ noise, x1 ~ data, t ~ U[0, 1];   x_t = (1 - t) x0 + t x1;   minimise  E |x1 - x0 - v(x_t, t)|^2   [eq. 1]

The best answer is v*(x, t) = E[x1 - x0 | x_t = x].  The training lines x_t cross; solutions of an ODE cannot, so where
lines cross the flow bends, and one big Euler step along a bent path lands between the modes: on the mean of the data.
Reflow trains again on the flow's own endpoints (z0, z1 = ODE[v](z0)).  These pairs hardly cross, so the second flow
(2-RF) is nearly straight, and a single step of it is nearly exact.

    python 01_rectified_flow.py                                # 1-RF, 2-RF, 3-RF on eight Gaussians, about a minute
    python 01_rectified_flow.py --target checkerboard          # or two_moons, spiral, rings, gaussian
    python 01_rectified_flow.py --rounds 2 --seed 1 --out runs/mine

You will see, in runs/01_rectified_flow/quick/: paths.png (the same noise under each flow), quality.png (distance to the
data against the number of steps), loss.png (the loss beside its exact floor), flow.gif, and a table of every number.
[Liu+22] Liu, Gong, Liu: Flow Straight and Fast, arXiv 2209.03003.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from scipy.integrate import solve_ivp
from scipy.optimize import linear_sum_assignment
from torch import nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------------------


def option(default, help, choices=None, low=None, high=None, free=False):
    """One setting: default, help text, and what is allowed. `free` ones may change when a run is continued."""
    limits = {"help": help, "choices": choices, "low": low, "high": high, "free": free}
    return dataclasses.field(default=default, metadata=limits)


@dataclass
class Config:
    """Settings of this chapter; every field is a command-line flag."""
    preset: str = option("quick", "size of the run", choices=("quick", "gpu"))
    target: str = option("eight_gaussians", "data distribution", choices=(
        "eight_gaussians", "gaussian", "two_moons", "checkerboard", "spiral", "rings"))
    rounds: int = option(3, "rectified flows in a row: 1-RF, 2-RF, ...", low=1, high=10)
    steps: int = option(1800, "training steps of a round", low=1)
    batch: int = option(2048, "samples in a step, over all processes", low=1)
    pairs: int = option(65536, "pairs (z0, z1) made for a reflow round", low=1)
    pair_steps: int = option(32, "Heun steps that carry z0 to z1", low=1)
    width: int = option(128, "hidden units of a layer", low=1)
    depth: int = option(4, "hidden layers", low=1)
    lr: float = option(4e-3, "peak learning rate; cosine decay to 0", low=0.0)
    lr_decay: str = option("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup: int = option(100, "steps of linear warm-up", low=0)
    grad_clip: float = option(1.0, "largest gradient norm", low=0.0)
    ema_decay: float = option(0.999, "decay of the averaged weights", low=0.0, high=1.0)
    eval_size: int = option(20000, "held-out samples for S, V and transport cost", low=2)
    w2_size: int = option(1024, "points for W2 (solver time grows as its cube)", low=2, high=8192)
    seed: int = option(0, "seed of every random draw", low=0, high=2 ** 32 - 1)
    log_every: int = option(200, "steps between log lines", low=1, free=True)
    checkpoint_every: int = option(1000, "steps between checkpoints", low=1, free=True)
    device: str = option("auto", "cuda > mps > cpu", choices=("auto", "cuda", "mps", "cpu"), free=True)
    compile: bool = option(True, "torch.compile the network (CUDA only)", free=True)
    out: str = option("", "run folder (default runs/<script>/<preset>)", free=True)
    fresh: bool = option(False, "start over: delete what the run folder holds", free=True)
    presets: ClassVar = {
        "quick": {},
        "gpu": dict(steps=20000, batch=16384, width=256, pairs=1 << 20, eval_size=200000, w2_size=4096),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------------------


def interpolate(x0, x1, t):
    """The straight line x_t = (1 - t) x0 + t x1 [Liu+22 eq. 1].  x0, x1: (B, *D), t: (B,).  Returns (B, *D)."""
    t = t.reshape(-1, *[1] * (x0.dim() - 1))               # (B, 1, ..., 1)
    return (1 - t) * x0 + t * x1


def flow_matching_loss(velocity, x0, x1, t):
    """|x1 - x0 - v(x_t, t)|^2 per sample, mean over D [Liu+22 eq. 1].

    velocity: (x (B, *D), t (B,)) -> (B, *D);  x0: (B, *D) noise;  x1: (B, *D) data, paired with x0.  Returns (B,).
    Raises ValueError if the pairs do not match in shape.
    """
    if x0.shape != x1.shape or t.shape != x0.shape[:1]:
        raise ValueError(f"want (B, *D) twice and (B,), got {tuple(x0.shape)}, {tuple(x1.shape)}, {tuple(t.shape)}")
    xt = interpolate(x0, x1, t)
    return (velocity(xt, t) - (x1 - x0)).square().flatten(1).mean(1)


def make_pairs(velocity, x0, steps):
    """Reflow's coupling (z0, z1 = ODE[v](z0)) [Liu+22]: keep the pairing, train on it with the same loss.

    x0: (B, *D) noise;  steps: Heun steps, 2 evaluations each.  Returns z0 (B, *D), z1 (B, *D).
    """
    return x0, integrate(velocity, x0, steps, "heun")[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def pair_loss(draw, config, device):
    """The loss_fn of this chapter: uniform times on the pairs of draw(n) -> x0 (n, 2), x1 (n, 2)."""
    batch = config.batch // process()[1]

    def loss_fn(model, ema, step):
        x0, x1 = draw(batch)
        return flow_matching_loss(model, x0, x1, torch.rand(batch, device=device))
    return loss_fn


def draw_independent(target, device):
    """1-RF's coupling: noise and data drawn apart, anew for every step."""
    return lambda n: (torch.randn(n, 2, device=device), sample_target(target, n, device))


def draw_stored(z0, z1):
    """A reflow round's coupling: one index picks both ends, because the pairing is all that reflow adds."""
    def draw(n):
        index = torch.randint(len(z0), (n,), device=z0.device)
        return z0[index], z1[index]
    return draw


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


def learning_rate(step, config):
    """Linear warm-up to config.lr, then constant or a half cosine to 0."""
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    decay = (1 + math.cos(math.pi * step / config.steps)) / 2 if config.lr_decay == "cosine" else 1.0
    return config.lr * warm * decay


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


def integrate_adaptive(velocity, x0, tolerance=1e-5):
    """Dormand-Prince 5(4) by scipy, which wants one flat float64 vector.  Returns (2, B, *D): start and end."""
    def slope(t, flat):
        z = torch.as_tensor(flat, dtype=x0.dtype).to(x0.device).reshape(x0.shape)
        return velocity(z, x0.new_full(x0.shape[:1], t)).cpu().double().numpy().ravel()
    solution = solve_ivp(slope, (0.0, 1.0), x0.cpu().double().numpy().ravel(), "RK45", rtol=tolerance, atol=tolerance)
    if not solution.success:
        raise UserError(f"rk45 gave up at t = {solution.t[-1]:.3f} ({solution.message}); lower --lr, add --fresh")
    return torch.stack([x0, torch.as_tensor(solution.y[:, -1], dtype=x0.dtype).to(x0.device).reshape(x0.shape)])


def reverse(velocity):
    """The same flow run backwards, w(x, s) = -v(x, 1 - s): integrate(reverse(v), z1, ...) ends in z0."""
    return lambda x, s: -velocity(x, 1 - s)


def straightness(velocity, x0, steps=100):
    """How far paths are from straight lines: S = E int_0^1 |(z1 - z0) - v(z_t, t)|^2 dt  [Liu+22].

    x0: (B, *D) noise;  steps: Heun steps of the path.  Returns squared data units, summed over D, mean over B;
    0 means that one Euler step is exact.
    """
    path = integrate(velocity, x0, steps, "heun")
    deviation = path.diff(dim=0) * steps - (path[-1] - path[0])        # (steps, B, *D): mean slope of a step - chord
    return deviation.square().flatten(2).sum(2).mean().item()


def transport_cost(x0, x1):
    """E |x1 - x0|^2, summed over D: how far the coupling carries mass.  x0, x1: (B, *D).  Reflow never raises it."""
    return (x1 - x0).square().flatten(1).sum(1).mean().item()


def wasserstein2(a, b):
    """W2 between two equally large point sets, exactly: sqrt(min over matchings of the mean |a_i - b_j|^2).

    a, b: (n, D).  Returns data units.  The assignment solver takes about 0.1 s at n = 1024 and grows as n^3.
    """
    if a.shape != b.shape:
        raise ValueError(f"W2 by assignment needs equal shapes, got {tuple(a.shape)} and {tuple(b.shape)}")
    cost = torch.cdist(a.cpu().double(), b.cpu().double()).square().numpy()      # (n, n)
    return math.sqrt(cost[linear_sum_assignment(cost)].mean())


def exact_velocity(x, t, target="eight_gaussians"):
    """v*(x, t) = E[x1 - x0 | x_t = x] in closed form, for x0 ~ N(0, I) and an independent Gaussian mixture x1.

    With q^2 = (1 - t)^2 + t^2 s^2 and posterior weights r_k of the components, [by conditioning Gaussians]
        v* = sum_k r_k [mu_k + (t s^2 - (1 - t)) / q^2 (x - t mu_k)].
    x: (B, 2), t: (B,).  Returns (B, 2).  Raises KeyError for a target that is no mixture.
    """
    means, std = MIXTURES[target]
    means, t = means.to(x), t[:, None, None]                               # (K, 2), (B, 1, 1)
    q2 = (1 - t) ** 2 + (t * std) ** 2
    offset = x[:, None] - t * means                                        # (B, K, 2)
    weight = torch.softmax(-offset.square().sum(-1, keepdim=True) / (2 * q2), dim=1)
    return (weight * (means + (t * std ** 2 - (1 - t)) / q2 * offset)).sum(1)


@torch.no_grad()
def loss_by_time(velocity, x0, x1, bins=10):
    """The flow matching loss in `bins` equal slices of t.  x0, x1: (n, *D) held-out pairs.  Returns (bins,).

    Every pair sees one t per bin, at a random place in it, so that the bins' mean is the loss itself.
    """
    t = (torch.arange(bins, device=x0.device)[:, None] + torch.rand(bins, len(x0), device=x0.device)) / bins
    return torch.stack([flow_matching_loss(velocity, x0, x1, t_bin).mean() for t_bin in t])


def exact_floor(config, device, n=100000):
    """The loss of v* itself on independent pairs, by Monte Carlo; None where v* is not known."""
    if config.target not in MIXTURES:
        return None
    x0, x1 = draw_independent(config.target, device)(n)
    return loss_by_time(lambda x, t: exact_velocity(x, t, config.target), x0, x1).mean().item()


def excess_loss(velocity, x0, x1, target):
    """E |v - v*|^2 per coordinate, on x_t of held-out independent pairs: what training has left to gain."""
    t = torch.rand(len(x0), device=x0.device)
    xt = interpolate(x0, x1, t)
    return (velocity(xt, t) - exact_velocity(xt, t, target)).square().mean().item()


@torch.no_grad()
def evaluate(velocity, x0, x1, data, config, known_floor):
    """Every number of one round.  x0, x1: (n, 2) held-out pairs of the coupling it learned;  data: (m, 2).

    V, the loss no velocity can go below, is estimated by the held-out loss, which is V + excess.  For v* itself
    cost(before) - cost(after) = S + V exactly, so the gap between both sides tells how far v is from v*.
    Returns a dict of floats and lists, and z1 (n, 2), where the flow carries x0: the next round's held-out pairs.
    """
    torch.manual_seed(config.seed)
    bins, z1 = loss_by_time(velocity, x0, x1), make_pairs(velocity, x0, 50)[1]
    w2 = {str(n): wasserstein2(integrate(velocity, x0[:len(data)], n)[-1], data) for n in (1, 2, 5, 10, 100)}
    result = {"W2": w2, "S": straightness(velocity, x0, 50), "V": bins.mean().item() * x0.shape[1],
              "cost_before": transport_cost(x0, x1), "cost_after": transport_cost(x0, z1), "loss_by_t": bins.tolist()}
    result["identity_gap"] = result["cost_before"] - result["cost_after"] - result["S"] - result["V"]
    if known_floor:
        floor = loss_by_time(lambda x, t: exact_velocity(x, t, config.target), x0, x1)
        result |= {"floor_by_t": floor.tolist(), "floor": floor.mean().item(),
                   "excess": excess_loss(velocity, x0, x1, config.target)}
    return result, z1


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------

CORNERS = torch.arange(8) * math.pi / 4
MIXTURES = {                                             # targets whose v* is known: component means (K, 2), common std
    "eight_gaussians": (5 * torch.stack([CORNERS.cos(), CORNERS.sin()], 1), 0.5623),
    "gaussian": (torch.tensor([[3.0, 2.0]]), 0.5),
}


def sample_mixture(name, n, device):
    """n points of a Gaussian mixture: a component each, then its mean plus noise."""
    means, std = MIXTURES[name]
    return means.to(device)[torch.randint(len(means), (n,), device=device)] + std * torch.randn(n, 2, device=device)


def polar(radius, angle):
    """(n,) and (n,) to points (n, 2)."""
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def two_moons(n, device):
    """Two interleaved half circles, the second upside down and shifted."""
    upper = torch.rand(n, device=device) < 0.5
    points = polar(torch.ones(n, device=device), math.pi * torch.rand(n, device=device))
    points = torch.where(upper[:, None], points, points.new_tensor([1.0, 0.5]) - points)
    return 3 * (points - points.new_tensor([0.5, 0.25])) + 0.2 * torch.randn(n, 2, device=device)


def checkerboard(n, device):
    """The eight dark squares of a 4 x 4 board with side 8."""
    column = torch.randint(4, (n,), device=device)
    row = 2 * torch.randint(2, (n,), device=device) + column % 2
    return 2 * (torch.stack([column, row], 1) + torch.rand(n, 2, device=device)) - 4


def spiral(n, device):
    """Two arms; the square root spreads points evenly along them."""
    angle = 3 * math.pi * torch.rand(n, device=device).sqrt()
    arm = math.pi * torch.randint(2, (n,), device=device)
    return polar(0.5 * angle, angle + arm) + 0.15 * torch.randn(n, 2, device=device)


def rings(n, device):
    """Three circles around the origin, each with points in proportion to its length."""
    radius = torch.tensor([1.5, 3.0, 4.5], device=device)
    ring = torch.multinomial(radius, n, replacement=True)
    return polar(radius[ring], 2 * math.pi * torch.rand(n, device=device)) + 0.12 * torch.randn(n, 2, device=device)


TARGETS = {name: (lambda n, device, name=name: sample_mixture(name, n, device)) for name in MIXTURES}
TARGETS |= {"two_moons": two_moons, "checkerboard": checkerboard, "spiral": spiral, "rings": rings}


def sample_target(name, n, device="cpu"):
    """n data points (n, 2) of TARGETS[name], drawn with torch's global generator.  ValueError for an unknown name."""
    if name not in TARGETS:
        raise ValueError(f"no target {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name](n, device)


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------


class VelocityMLP(nn.Module):
    """v(x, t) as a plain multi-layer perceptron.  forward: x (B, 2), t (B,) -> (B, 2).

    t also enters as cosines and sines: one raw number beside x would leave the network too smooth in time.
    """

    def __init__(self, width=128, depth=4, frequencies=4):
        super().__init__()
        sizes = [3 + 2 * frequencies] + [width] * depth
        hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))
        self.register_buffer("frequency", math.pi * torch.arange(1.0, frequencies + 1), persistent=False)

    def forward(self, x, t):
        phase = t[:, None] * self.frequency                                # (B, frequencies)
        return self.layers(torch.cat([x, t[:, None], phase.cos(), phase.sin()], 1))


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def new_figure(columns, rows=1, size=4.0):
    """Square panels, as a figure that no window and no notebook shows by itself: it is only saved."""
    from matplotlib.figure import Figure                   # here: training does not need it
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def save_figure(figure, path):
    """Write the file whole or not at all."""
    with replacing(path) as part:
        figure.savefig(part, dpi=150, bbox_inches="tight")


def angle_colours(x0):
    """One hue per direction of the start point: where hues cross, paths cross.  x0: (n, 2).  Returns (n, 3)."""
    from matplotlib.colors import hsv_to_rgb
    hue = (torch.atan2(x0[:, 1], x0[:, 0]) / (2 * math.pi)) % 1
    return hsv_to_rgb(np.stack([hue, np.full(len(x0), 0.75), np.full(len(x0), 0.85)], 1))


def empty_panel(axis, title, limit):
    """Fixed square window, so that panels compare."""
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=13)
    axis.spines[:].set_visible(False)


def window(data):
    """Half the side of a square that shows nearly all of the data."""
    return 1.12 * torch.quantile(data.abs(), 0.995).item()


def draw_paths(paths, jumps, data, folder):
    """Above, the crossing lines a flow is trained on, then each flow's paths; below, one Euler step.

    paths, jumps: dicts of panel name -> (steps + 1, n, 2) from the same n start points;  data: (m, 2), the background.
    """
    from matplotlib.collections import LineCollection
    figure, axes = new_figure(len(paths), rows=2)
    for row, panels in zip(axes, (paths, jumps)):
        for axis, (name, path) in zip(row, panels.items()):
            empty_panel(axis, name, window(data))
            axis.scatter(*data.T, s=4, color="0.85", linewidths=0, zorder=0)
            colours = angle_colours(path[0])
            axis.add_collection(LineCollection(path.transpose(0, 1).numpy(), colors=colours, linewidths=0.9, alpha=0.6))
            axis.scatter(*path[-1].T, s=14, c=colours, linewidths=0.3, edgecolors="white", zorder=4)
    save_figure(figure, folder / "paths.png")


def draw_quality(results, floor, folder):
    """W2 to the data against the number of Euler steps, one curve per round, above the sampling floor."""
    figure, axes = new_figure(1, size=5.0)
    for k, result in enumerate(results, 1):
        counts = [int(n) for n in result["W2"]]
        size = max(3, 14 - 4 * k)                          # curves that coincide stay visible behind each other
        axes[0, 0].semilogx(counts, list(result["W2"].values()), "o-", linewidth=2, markersize=size, label=f"{k}-RF")
    axes[0, 0].axhline(floor, color="0.5", linestyle="--", label="two draws of data")
    axes[0, 0].set(xlabel="Euler steps", ylabel="W2 to data", ylim=(0, None), xticks=counts, xticklabels=counts)
    axes[0, 0].minorticks_off()
    axes[0, 0].legend(frameon=False)
    save_figure(figure, folder / "quality.png")


def draw_loss(results, folder):
    """Left: training loss of each round, with the exact floor of the first.  Right: held-out loss in bins of t."""
    figure, axes = new_figure(2, size=4.5)
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    for k, result in enumerate(results, 1):
        mine = [row for row in rows if row["stage"] == f"{k}-rf"]
        axes[0, 0].semilogy([int(r["step"]) for r in mine], [float(r["loss"]) for r in mine], label=f"{k}-RF")
        bins = result["loss_by_t"]
        centres = (np.arange(len(bins)) + 0.5) / len(bins)
        axes[0, 1].semilogy(centres, bins, "o-", markersize=4, label=f"{k}-RF")
    if "floor" in results[0]:
        axes[0, 0].axhline(results[0]["floor"], color="k", linestyle="--", linewidth=1, label="floor of 1-RF (exact)")
        axes[0, 1].semilogy(centres, results[0]["floor_by_t"], "k--", linewidth=1)
    axes[0, 0].set(xlabel="training step", ylabel="loss per coordinate")
    axes[0, 1].set(xlabel="t", title="held-out, by time")
    axes[0, 0].legend(frameon=False)
    save_figure(figure, folder / "loss.png")


def draw_gif(paths, jumps, data, folder, frames=48):
    """Noise flowing to data: above along the flow, below by one straight Euler step, where 1-RF collapses to the mean.

    paths, jumps: dicts of panel name -> (frames + 1, n, 2).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image
    figure, axes = new_figure(len(paths), rows=2, size=2.6)
    canvas = FigureCanvasAgg(figure)
    dots, images = [], []
    for row, panels in zip(axes, (paths, jumps)):
        for axis, (name, path) in zip(row, panels.items()):
            empty_panel(axis, name, window(data))
            axis.scatter(*data.T, s=2, color="0.88", linewidths=0, zorder=0)
            dots.append((axis.scatter(*path[0].T, s=5, c=angle_colours(path[0]), linewidths=0), path))
    for i in list(range(frames + 1)) + [frames] * 16:                      # rest at the end before starting over
        for dot, path in dots:
            dot.set_offsets(path[i].numpy())
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(64))
    with replacing(folder / "flow.gif") as part:
        images[0].save(part, save_all=True, append_images=images[1:], duration=50, loop=0)


def draw_all(flows, results, data, floor, config, folder):
    """Every figure of the chapter, from the same few hundred start points."""
    torch.manual_seed(config.seed)
    x0, x1 = torch.randn(300, 2), sample_target(config.target, 300)
    ramp = torch.linspace(0, 1, 49)[:, None, None]         # (frames, 1, 1)
    paths = {f"{k}-RF": integrate(flow, x0, 48, "heun") for k, flow in enumerate(flows, 1)}
    jumps = {f"{k}-RF, one Euler step": x0 + ramp * flow(x0, torch.zeros(300)) for k, flow in enumerate(flows, 1)}
    pairs = {"training pairs: lines cross": x0 + ramp * (x1 - x0)}
    noise = {"noise, coloured by direction": x0.expand(49, -1, -1)}
    draw_paths(pairs | paths, noise | jumps, data, folder)
    draw_quality(results, floor, folder)
    draw_loss(results, folder)
    draw_gif(paths, jumps, data, folder)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing
# ----------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend: ends the script with this one line and exit code 2, without a traceback."""


def seed_for(*numbers):
    """One 32-bit seed from several integers, the same in every process and on every machine."""
    return hash(numbers) % 2 ** 32                         # tuples of ints: xxHash, not randomised as strings are


def process():
    """(rank, number of processes); (0, 1) unless started by torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all():
    """A barrier between the processes of a torchrun."""
    if dist.is_initialized():
        dist.barrier()


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


def place(model, device):
    """To the device, in channels_last where convolutions are faster so; a compiled training graph keeps the layout."""
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return model.to(device, memory_format=layout)


def make_optimizer(model, config):
    """AdamW in one kernel, without weight decay: the averaged weights regularise enough."""
    return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.0, fused=True)


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


def save_json(path, content):
    """Readable JSON, written whole."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


def save_checkpoint(path, **content):
    """Tensors, numbers, strings and containers of them, by rank 0, whole; the old file stays if the disk is full."""
    if process()[0] > 0:
        return
    with replacing(path) as part:
        try:
            torch.save(content, part)
        except RuntimeError as error:                      # torch reports a failed write so
            raise OSError(f"{str(error).splitlines()[0]} (is the disk full?)") from None


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


def changed(old, new, Config):
    """The first setting that differs between two configurations as 'name=old (now new)', or ''; free ones may."""
    for field in dataclasses.fields(Config):
        before, now = old.get(field.name), new[field.name]
        if not field.metadata["free"] and json.dumps(before) != json.dumps(now):
            return f"{field.name}={before} (now {now})"
    return ""


def same_settings(path, state, config):
    """UserError if this checkpoint was made with other settings."""
    difference = changed(state["config"], dataclasses.asdict(config), type(config))
    if difference:
        raise UserError(f"{path} was made with {difference}: add --fresh to start over, or --out elsewhere")


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


def ours(record):
    """Whether one of these scripts wrote this config.json: other programs have files of that name too."""
    content = json.loads(record.read_text()) if record.exists() else {}
    return isinstance(content, dict) and {"script", "settings"} <= set(content)


def surroundings():
    """Versions, hardware and git revision, so that a number can be traced to what made it."""
    git = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                         capture_output=True, text=True) if shutil.which("git") else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
            "threads": torch.get_num_threads(), "gpu": gpu, "revision": git.stdout.strip() if git else ""}


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


def usage_error(message):
    """argparse's complaint as one line."""
    raise UserError(f"{message} (--help lists the settings)")


def check_range(field, value):
    """UserError unless low <= value <= high (NaN and infinities are outside any range)."""
    low, high = field.metadata["low"], field.metadata["high"]
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            inside = (low is None or number >= low) and (high is None or number <= high) and math.isfinite(number)
            if not inside:
                raise UserError(f"--{field.name.replace('_', '-')} {number} is outside [{low}, {high or 'inf'}]")


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


def average(total, count, stop):
    """Mean loss over `count` steps and all processes, and whether any process was told to stop.  Waits for the GPU."""
    report = torch.stack([total / count, torch.full_like(total, float(bool(stop)))])
    if dist.is_initialized():
        dist.all_reduce(report)
    mean, stops = (report / torch.tensor([process()[1], 1], device=report.device)).tolist()
    return mean, stops > 0


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


def keep_metrics(path, stage, step):
    """Head of the table and the rows that stay: not those a resumed run writes again, nor one that a kill cut short."""
    if process()[0] == 0:
        rows = csv.reader(path.read_text().splitlines()[1:] if path.exists() else [])
        kept = [row for row in rows if len(row) == 6 and (row[0] != stage or int(row[1]) <= step)]
        with replacing(path) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([["stage", "step", "loss", "floor", "seconds", "samples_per_s"], *kept])


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


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def print_table(results, floor):
    """The numbers of all rounds, a line each, and how to read them."""
    counts = list(results[0]["W2"])
    print(f"\nW2 to data after N Euler steps; two independent draws of data are {floor:.3f} apart")
    print("      " + "".join(f"{'N=' + n:>8}" for n in counts) + "        S     cost        V   drop-(S+V)")
    for k, r in enumerate(results, 1):
        numbers = "".join(f"{w:8.3f}" for w in r["W2"].values())
        print(f"{k}-RF  {numbers} {r['S']:8.3f} {r['cost_after']:8.3f} {r['V']:8.3f} {r['identity_gap']:+12.3f}")
    print("S straightness, cost E|z1-z0|^2, V irreducible loss (summed over 2 coordinates); cost before 1-RF: "
          f"{results[0]['cost_before']:.3f}, and cost before - cost after = S + V in theory")
    if "floor" in results[0]:
        loss = sum(results[0]["loss_by_t"]) / len(results[0]["loss_by_t"])
        print(f"1-RF held-out loss per coordinate {loss:.4f}, exact floor {results[0]['floor']:.4f}, "
              f"excess E|v-v*|^2 {results[0]['excess']:.4f}")


def train_round(k, teacher, config, device, folder):
    """Train k-RF: round 1 on independent pairs, later ones on the pairs of the flow before, from its weights."""
    model = VelocityMLP(config.width, config.depth)
    if teacher is None:
        draw = draw_independent(config.target, device)
    else:
        model.load_state_dict(teacher.state_dict())
        torch.manual_seed(seed_for(config.seed, k))
        draw = draw_stored(*make_pairs(teacher, torch.randn(config.pairs, 2, device=device), config.pair_steps))
    floor = exact_floor(config, device) if k == 1 else None
    return fit(place(model, device), pair_loss(draw, config, device), config, folder, f"{k}-rf", k, floor).model


def load_round(path, config, device):
    """A finished round's network from its file."""
    model = VelocityMLP(config.width, config.depth)
    state = load_checkpoint(path, keys=("model",))
    same_settings(path, state, config)
    model.load_state_dict(state["model"])
    return place(model, device).eval().requires_grad_(False)


def main(config):
    """All rounds, then every number and figure."""
    if config.w2_size > config.eval_size:
        raise UserError(f"--eval-size {config.eval_size} is less than --w2-size {config.w2_size}")
    device, started = choose_device(config), time.perf_counter()
    folder = open_run(config, __file__)
    torch.manual_seed(config.seed)
    flows = []
    for k in range(1, config.rounds + 1):
        finished = folder / f"{k}-rf.pt"
        if not finished.exists():
            flow = train_round(k, flows[-1] if flows else None, config, device, folder)
            save_checkpoint(finished, config=dataclasses.asdict(config), model=flow.state_dict())
            wait_for_all()                                 # the others read the file that rank 0 writes
        flows.append(load_round(finished, config, device))
    if process()[0] == 0:
        report(flows, config, device, folder)
        print(f"\n{time.perf_counter() - started:.0f} s; figures and results.json are in {folder}/")


def report(flows, config, device, folder):
    """Measure every round on the same held-out noise and data, print the table, draw the figures."""
    torch.manual_seed(seed_for(config.seed, 999))          # draws that no training step has seen
    x0, x1 = torch.randn(config.eval_size, 2, device=device), sample_target(config.target, config.eval_size, device)
    data, other = (sample_target(config.target, config.w2_size, device) for _ in range(2))
    floor, results, coupling = wasserstein2(data, other), [], x1
    for k, flow in enumerate(flows, 1):
        result, coupling = evaluate(flow, x0, coupling, data, config, k == 1 and config.target in MIXTURES)
        results.append(result)
    save_json(folder / "results.json", {"floor_W2": floor, "rounds": results})
    print_table(results, floor)
    draw_all([copy.deepcopy(flow).cpu() for flow in flows], results, data.cpu(), floor, config, folder)


if __name__ == "__main__":
    launch(main, Config)
