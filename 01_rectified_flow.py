"""Chapter 1 - rectified flow in 2-D: why do generative ODEs need many steps, and what does straightening buy?

A flow carries noise x0 to data x1 by the ODE dz = v(z, t) dt, t: 0 -> 1.  Rectified flow [Liu+22] learns v by this:

    draw x0 ~ noise, x1 ~ data, t ~ U[0, 1];   x_t = (1 - t) x0 + t x1;   minimise  E |x1 - x0 - v(x_t, t)|^2   [eq. 1]

The best answer is v*(x, t) = E[x1 - x0 | x_t = x].  Training lines x_t meet; solutions of an ODE that are at the same
place at the same time are one, so where lines meet the flow bends.  At t = 0 all data are still possible, so that
v* = E[x1] - x0: one big Euler step lands on the mean of the data.  That is the first flow, 1-RF.  Reflow trains again
on the flow's own endpoints (z0, z1 = ODE[v](z0)).  They hardly meet: 2-RF is nearly straight, one step nearly exact.

    python 01_rectified_flow.py                                # 1-RF, 2-RF, 3-RF on eight Gaussians, two minutes
    python 01_rectified_flow.py --target checkerboard          # or two_moons, gaussian
    python 01_rectified_flow.py --rounds 2 --seed 1 --out runs/mine

You will see a table, W2 to the data against steps, straightness, transport cost, loss and its exact floor, and in
runs/01_rectified_flow/quick/ paths.png and flow.gif: the same noise under each flow, and after one Euler step of each.
[Liu+22] Liu, Gong, Liu: Flow Straight and Fast, arXiv 2209.03003.
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
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import nn
from tqdm import tqdm

# ---- The method ------------------------------------------------------------------------------------------------------


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


def make_pairs(velocity, x0, steps):
    """Reflow's coupling (z0, z1 = ODE[v](z0)) [Liu+22]: keep the pairing, train on it with the same loss.

    x0: (B, *D) noise;  steps: Heun steps, 2 evaluations each.  Returns z0 (B, *D), z1 (B, *D).
    """
    ends = [integrate(velocity, part, steps, "heun")[-1] for part in x0.split(8192)]     # as much as a cache holds
    return x0, torch.cat(ends)


# ---- Settings: every field is a flag, the comment beside it its help, the type its range -----------------------------


@dataclass
class Config:
    """Rectified flows in two dimensions."""
    preset: Literal["quick", "gpu"] = "quick"               # size of the run
    target: Literal["eight_gaussians", "gaussian", "two_moons", "checkerboard"] = "eight_gaussians"  # data points
    rounds: Annotated[int, 1, 10] = 3                       # rectified flows in a row: 1-RF, 2-RF, ...
    steps: Count = 1800                                     # training steps of a round
    batch: Count = 2048                                     # samples in a step, over all processes
    accumulate: Count = 1                                   # slices of a batch, one after the other, if memory is short
    pairs: Count = 65536                                    # pairs (z0, z1) made for a reflow round
    pair_steps: Count = 32                                  # Heun steps that carry z0 to z1
    width: Count = 128                                      # hidden units of a layer
    depth: Count = 4                                        # hidden layers
    lr: Amount = 4e-3                                       # peak learning rate
    lr_decay: Literal["cosine", "constant"] = "cosine"      # learning rate after the warm-up: down to 0, or as it is
    warmup: Whole = 100                                     # steps of linear warm-up
    grad_clip: Amount = 1.0                                 # largest gradient norm
    ema_decay: Share = 0.999                                # decay of the averaged weights
    eval_size: Count = 20000                                # held-out samples for S, V and transport cost
    w2_size: Annotated[int, 2, 8192] = 1024                 # points for W2 (solver time grows as its cube)
    seed: Whole = 0                                         # seed of every random draw
    log_every: Count = 200                                  # steps between log lines; a checkpoint is written at each
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    compile: bool = False                                   # torch.compile the network (CUDA only; pays in long runs)
    out: str = ""                                           # run folder; empty: runs/<script>/<preset>
    fresh: bool = False                                     # start over: delete what the run folder holds
    may_change: ClassVar = {"log_every", "device", "compile", "out", "fresh"}       # also when a run is continued
    presets: ClassVar = {
        "quick": {},
        "gpu": dict(steps=20000, batch=16384, width=256, pairs=1 << 20, eval_size=200000, w2_size=4096, compile=True),
    }


# ---- The experiment --------------------------------------------------------------------------------------------------


def main(config):
    """Algorithm 1 of [Liu+22]: fit a flow to noise and data; then, again and again, to the flow's own endpoints."""
    run = Run(config, __file__)
    torch.manual_seed(config.seed)
    flows = []
    flow = VelocityMLP(config.width, config.depth)
    draw = partial(draw_independent, config.target, run.device)                 # 1-RF: noise and data drawn apart
    for k in range(1, config.rounds + 1):
        if k > 1:                                                               # reflow
            torch.manual_seed(seed_for(config.seed, k))
            z0, z1 = make_pairs(flow, torch.randn(config.pairs, 2, device=run.device), config.pair_steps)
            draw = partial(draw_stored, z0, z1)
        # from the weights of the flow before; what comes back is the averaged network
        flow = run.fit(f"{k}-rf", flow, partial(pair_loss, draw=draw, n=run.share), stream=k)
        flows.append(flow)
    if run.rank == 0:
        report(flows, run)


def draw_independent(target, device, n):
    """1-RF's coupling: noise x0 (n, 2) and data x1 (n, 2) drawn apart, anew for every step."""
    return torch.randn(n, 2, device=device), sample_target(target, n, device)


def draw_stored(z0, z1, n):
    """A reflow round's coupling: one index picks both ends, because the pairing is all that reflow adds."""
    index = torch.randint(len(z0), (n,), device=z0.device)
    return z0[index], z1[index]


def pair_loss(model, ema, step, draw, n):
    """What train() minimises: the loss (n,) of n pairs at uniform times.  draw: n -> x0 (n, *D), x1 (n, *D).

    train() also passes the averaged network and the step, which this loss does not need.
    """
    x0, x1 = draw(n)
    t = torch.rand(n, device=x0.device)
    return flow_matching_loss(model, x0, x1, t)


def report(flows, run):
    """Measure every round on the same held-out noise and data, print the table, draw the figures."""
    config = run.config
    torch.manual_seed(seed_for(config.seed, 999))           # draws that no training step has seen
    x0, x1 = draw_independent(config.target, run.device, max(config.eval_size, config.w2_size))
    data = sample_target(config.target, config.w2_size, run.device)
    other = sample_target(config.target, config.w2_size, run.device)
    floor = wasserstein2(data, other)
    results = []
    for flow in flows:
        torch.manual_seed(config.seed)
        result, z1 = evaluate(flow, x0, x1, data)
        if not results and config.target in MIXTURES:
            result |= compare_with_exact(flow, x0, x1, config.target)
        results.append(result)
        x1 = z1                                             # held-out pairs of the kind that the next round learned
    save_json(run.folder / "results.json", {"floor_W2": floor, "rounds": results})
    print_table(results, floor)
    draw_paths([copy.deepcopy(flow).cpu() for flow in flows], data.cpu(), run)
    print(f"\n{time.perf_counter() - run.started:.0f} s; figures and results.json are in {run.folder}/")


# ---- Sampling and metrics --------------------------------------------------------------------------------------------


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


def transport_cost(x0, x1):
    """E |x1 - x0|^2, summed over D: how far a coupling carries mass; exact reflow never raises it.  x0, x1: (B, *D)."""
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

    With q^2 = (1 - t)^2 + t^2 s^2 and the components' weights r_k ~ exp(-|x - t mu_k|^2 / (2 q^2)), sum_k r_k = 1,
        v* = sum_k r_k [mu_k + (t s^2 - (1 - t)) / q^2 (x - t mu_k)],   from the conditional mean of a Gaussian.
    x: (B, 2), t: (B,).  Returns (B, 2).  Raises KeyError for a target that is no mixture.
    """
    means, std = MIXTURES[target]
    means = means.to(x)                                                    # (K, 2)
    t = t[:, None, None]                                                   # (B, 1, 1)
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


@torch.no_grad()
def evaluate(velocity, x0, x1, data):
    """The numbers of one round.  x0, x1: (n, 2) held-out pairs of the coupling it learned;  data: (m, 2), m <= n.

    V, the loss no velocity can go below, is estimated by the held-out loss, which is V + excess.  For v* itself
    cost(before) - cost(after) = S + V exactly; a gap between both sides shows that v is not v*.
    Returns a dict of floats and lists, and z1 (n, 2), where the flow carries x0: the next round's held-out pairs.
    """
    bins = loss_by_time(velocity, x0, x1)
    x0, z1 = make_pairs(velocity, x0, 50)
    w2 = {str(n): wasserstein2(integrate(velocity, x0[:len(data)], n)[-1], data) for n in (1, 2, 5, 10, 100)}
    result = {"W2": w2, "S": straightness(velocity, x0, 50), "V": bins.mean().item() * x0.shape[1],
              "cost_before": transport_cost(x0, x1), "cost_after": transport_cost(x0, z1), "loss_by_t": bins.tolist()}
    result["identity_gap"] = result["cost_before"] - result["cost_after"] - result["S"] - result["V"]
    return result, z1


@torch.no_grad()
def compare_with_exact(velocity, x0, x1, target):
    """1-RF beside v*: the floor is the loss of v* itself, the excess E |v - v*|^2 what training has left to gain.

    x0, x1: (n, 2) held-out independent pairs of a target in MIXTURES.  Returns a dict, per coordinate.
    """
    floor = loss_by_time(partial(exact_velocity, target=target), x0, x1)
    t = torch.rand(len(x0), device=x0.device)
    xt = interpolate(x0, x1, t)
    excess = (velocity(xt, t) - exact_velocity(xt, t, target)).square().mean().item()
    return {"floor_by_t": floor.tolist(), "floor": floor.mean().item(), "excess": excess}


def print_table(results, floor):
    """The numbers of all rounds, a line each, and how to read them."""
    print(f"\nW2 to data after N Euler steps; two independent draws of data are {floor:.3f} apart")
    print("      " + "".join(f"{'N=' + n:>8}" for n in results[0]["W2"]) + "        S     cost        V   drop-(S+V)")
    for k, r in enumerate(results, 1):
        numbers = "".join(f"{w:8.3f}" for w in r["W2"].values())
        print(f"{k}-RF  {numbers} {r['S']:8.3f} {r['cost_after']:8.3f} {r['V']:8.3f} {r['identity_gap']:+12.3f}")
    first = results[0]
    print("S straightness, cost E|z1-z0|^2, V held-out loss (summed over 2 coordinates); cost before 1-RF: "
          f"{first['cost_before']:.3f}, and cost before - cost after = S + V in theory")
    if "floor" in first:
        print(f"1-RF held-out loss per coordinate {first['V'] / 2:.4f}, exact floor {first['floor']:.4f}, "
              f"excess E|v-v*|^2 {first['excess']:.4f}")


# ---- Data ------------------------------------------------------------------------------------------------------------

CORNERS = torch.arange(8) * math.pi / 4
MIXTURES = {                                                # targets whose v* is known: component means (K, 2), std
    "eight_gaussians": (5 * torch.stack([CORNERS.cos(), CORNERS.sin()], 1), 0.5623),
    "gaussian": (torch.tensor([[3.0, 2.0]]), 0.5),
}


def mixture(n, device, name):
    """n points of a Gaussian mixture: a component each, then its mean plus noise."""
    means, std = MIXTURES[name]
    return means.to(device)[torch.randint(len(means), (n,), device=device)] + std * torch.randn(n, 2, device=device)


def two_moons(n, device):
    """Two interleaved half circles, the second upside down and shifted."""
    upper = torch.rand(n, device=device) < 0.5
    angle = math.pi * torch.rand(n, device=device)
    points = torch.stack([angle.cos(), angle.sin()], 1)
    points = torch.where(upper[:, None], points, points.new_tensor([1.0, 0.5]) - points)
    return 3 * (points - points.new_tensor([0.5, 0.25])) + 0.2 * torch.randn(n, 2, device=device)


def checkerboard(n, device):
    """The eight dark squares of a 4 x 4 board with side 8."""
    column = torch.randint(4, (n,), device=device)
    row = 2 * torch.randint(2, (n,), device=device) + column % 2
    return 2 * (torch.stack([column, row], 1) + torch.rand(n, 2, device=device)) - 4


TARGETS = {
    "eight_gaussians": partial(mixture, name="eight_gaussians"), "gaussian": partial(mixture, name="gaussian"),
    "two_moons": two_moons, "checkerboard": checkerboard,
}


def sample_target(name, n, device="cpu"):
    """n data points (n, 2) of TARGETS[name], drawn with torch's global generator.  ValueError for an unknown name."""
    if name not in TARGETS:
        raise ValueError(f"no target {name!r}; there are {', '.join(TARGETS)}")
    return TARGETS[name](n, device)


# ---- Network ---------------------------------------------------------------------------------------------------------


class VelocityMLP(nn.Module):
    """v(x, t) as a plain multi-layer perceptron.  forward: x (B, 2), t (B,) -> (B, 2).

    t also enters as cosines and sines: one raw number beside x would leave the network too smooth in time.
    """

    def __init__(self, width=128, depth=4, frequencies=4):
        super().__init__()
        layers = [nn.Linear(3 + 2 * frequencies, width), nn.SiLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))
        self.register_buffer("frequency", math.pi * torch.arange(1.0, frequencies + 1), persistent=False)

    def forward(self, x, t):
        phase = t[:, None] * self.frequency                                # (B, frequencies)
        return self.layers(torch.cat([x, t[:, None], phase.cos(), phase.sin()], 1))


# ---- Figures ---------------------------------------------------------------------------------------------------------


def draw_paths(flows, data, run):
    """Noise flowing to data, as lines in paths.png and in motion in flow.gif.  data: (m, 2), the background.

    Upper row: lines of the training pairs, paths of every flow.  Lower row: one Euler step from the same noise.
    """
    torch.manual_seed(run.config.seed)
    x0 = torch.randn(300, 2)
    x1 = sample_target(run.config.target, 300)
    ramp = torch.linspace(0, 1, 49)[:, None, None]          # (frames, 1, 1)
    above = {"training pairs: lines cross": x0 + ramp * (x1 - x0)}
    below = {"noise, coloured by direction": x0.expand(49, -1, -1)}
    for k, flow in enumerate(flows, 1):
        above[f"{k}-RF"] = integrate(flow, x0, 48, "heun")
        below[f"{k}-RF, one Euler step"] = x0 + ramp * flow(x0, torch.zeros(300))
    draw_panels(above | below, data, run.folder)


def draw_panels(paths, data, folder):
    """A panel for each of paths: name -> (frames, n, 2), from the same n start points; half of them in the upper row.

    A colour is the direction of a start point.
    """
    from matplotlib import colormaps
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.collections import LineCollection
    figure, axes = new_figure(len(paths) // 2, rows=2)
    lines, dots = [], []
    for axis, (name, path) in zip(axes.flat, paths.items()):
        empty_panel(axis, name, data)
        angle = torch.atan2(path[0, :, 1], path[0, :, 0]) / (2 * math.pi) % 1
        colours = colormaps["hsv"](angle.numpy()) * [0.85, 0.85, 0.85, 1]
        segments = LineCollection(path.transpose(0, 1).numpy(), colors=colours, linewidths=0.9, alpha=0.6)
        lines.append(axis.add_collection(segments))
        dots.append(axis.scatter(*path[-1].T, s=14, c=colours, linewidths=0.3, edgecolors="white", zorder=4))
    save_figure(figure, folder / "paths.png")
    figure.set_layout_engine("none")                        # the layout is found, once is enough
    for segments in lines:
        segments.remove()

    def show(i):
        for dot, path in zip(dots, paths.values()):
            dot.set_offsets(path[i].numpy())
    frames = [*range(len(path)), *[-1] * 16]                # rest at the end before starting over
    FuncAnimation(figure, show, frames).save(folder / "flow.gif", PillowWriter(fps=20), dpi=50)


def empty_panel(axis, title, data):
    """A square window that shows nearly all of the data (m, 2), so that panels compare, and the data in grey."""
    limit = 1.12 * torch.quantile(data.abs(), 0.995).item()
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title, fontsize=13)
    axis.spines[:].set_visible(False)
    axis.scatter(*data.T, s=4, color="0.85", linewidths=0, zorder=0)


def new_figure(columns, rows=1, size=4.0):
    """Square panels, as a figure that no window and no notebook shows by itself: it is only saved."""
    from matplotlib.figure import Figure                    # here: training does not need it
    figure = Figure(figsize=(size * columns, size * rows), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def save_figure(figure, path):
    """A picture for screen and slides."""
    figure.savefig(path, dpi=150, bbox_inches="tight")


# ---- The training loop and its fast path, the same text in all five files --------------------------------------------


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


# ---- Plumbing: flags, device, files, stopping and going on; nothing about flows; the same in all five files ----------

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


if __name__ == "__main__":
    launch(main, Config)
