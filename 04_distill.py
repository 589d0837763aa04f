"""Chapter 4 - how do we get to one step?  Six methods, one teacher, one budget.

All train the network of a flow until one jump along its velocity, from the noise to the data, draws a picture:
    f(x, t) = x + (1 - t) v(x, t),   so that f(x, 1) = x whatever v is.
They differ in the target:
    rf           f(z0, 0) learns z1, the end of the flow's ODE from z0: |f(z0, 0) - z1|^2, then LPIPS          [Liu+22]
    progressive  a step learns where two steps of the teacher end; steps halve until one is left, which is f   [SH22]
    consistency  f(x_t, t) learns f(x_r, r), x_r a small step of the teacher's ODE further on                  [Song+23]
    ict          the same, but x_r is further on by the straight line to the picture: no teacher               [SD24]
    meanflow     u(x_t, t, r) learns the mean velocity from t to r, for all r >= t; v in f is then u(x, t, 1)  [Geng+25]
    remeanflow   the same on 1-RF's pairs, whose lines hardly cross                                            [Zha+25]
rf starts from 2-RF and learns 2-RF's pairs, remeanflow from 2-RF and learns 1-RF's, all others start from 1-RF.
`direct` is rf without reflow: the same distillation, of 1-RF.
Every method may spend the same number of network evaluations (forward 1, backward 2, pairs and teachers counted).
Reflow had cost some before; `longer` is direct given these as well.

    python 04_distill.py                                       # shapes, offline: on chapter 2's networks, all methods
    python 04_distill.py --checkpoint runs/04_distill/quick/rf.pt --samples 64 --out pictures   # or --export rf.pt2
    python 04_distill.py --preset gpu --download --teacher runs/02_reflow/gpu/1-rf.pt           # CIFAR-10

You will see, in runs/04_distill/quick/: methods.png (the same 16 noises through every method), and a table: Frechet
distance after one and two steps, accuracy, precision, recall, density, coverage, evaluations spent.
[Liu+22] Flow Straight and Fast, arXiv 2209.03003.  [SH22] Progressive Distillation, arXiv 2202.00512.  [Song+23]
Consistency Models, arXiv 2303.01469.  [SD24] Improved Techniques for Training Consistency Models, arXiv 2310.14189.
[Geng+25] Mean Flows, arXiv 2505.13447.  [Zha+25] Flow Straighter and Faster, arXiv 2511.23342.
[Kyn+19] arXiv 1904.06991 (precision, recall).  [Nae+20] arXiv 2002.09797 (density, coverage).
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
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Callable, ClassVar, Literal

import lpips
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageOps
from torch import nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

# ---- The method ------------------------------------------------------------------------------------------------------


def jump(velocity, x, t):
    """f(x, t) = x + (1 - t) v(x, t): to the data in one step along the velocity.  x: (B, *D), t: (B,) -> (B, *D).

    f(x, 1) = x for any network: the boundary condition of a consistency function [Song+23 eq. 5] comes for free.
    Diffusion's noise levels, y = x1 + sigma x0, in the times of these chapters: t = 1 / (1 + sigma), x_t = t y.
    """
    return x + per_sample(1 - t, x) * velocity(x, t)


def move(velocity, x, t, s, heun=False):
    """One step of dx = v dt from times t to s (B,), by Euler or Heun.  The Euler step equals DDIM's."""
    step = per_sample(s - t, x)
    v = velocity(x, t)
    if heun:
        v = (v + velocity(x + step * v, s)) / 2
    return x + step * v


@dataclass
class Lesson:
    """What a student learns from; a method leaves alone what it has no use for."""
    draw: Callable                                          # () -> x0, x1 (B, C, H, W), labels (B,) or None
    teacher: Callable = None                                # a Velocity: it runs without gradient and dropout
    distance: Callable = None                               # of two batches of pictures: (a, b) -> (B,)
    squares: int = 0                                        # rf: for this many first steps, |a - b|^2 in its place


def distillation_loss(model, ema, step, lesson, jumps=1):
    """rf: distance(f(x_t, t), z1) / (1 - t)^2 on stored pairs, t in {0, 1/k, ..., (k-1)/k}, k = jumps [Liu+22].

    With squares this is |v - (z1 - z0)|^2; LPIPS, a square of differences too, is scaled alike.  With k = 1, t is
    exactly 0 and the network sees z0 alone; the original code's t = 0.001 leaks 0.1 % of the answer.
    """
    z0, z1, labels = lesson.draw()
    t = torch.randint(jumps, z0.shape[:1], device=z0.device) / jumps
    z1_hat = jump(partial(model, labels=labels), interpolate(z0, z1, t), t)
    distance = squared if step < lesson.squares else lesson.distance
    return distance(z1_hat, z1) / (1 - t) ** 2


def progressive_loss(model, ema, step, lesson, steps):
    """progressive: one student step of length 1/N must end where two teacher steps end [SH22 algorithm 2].

    From t in {0, 1/N, ..., (N-1)/N} two Euler (DDIM) steps of the teacher lead to x_s, s = t + 1/N.  The student ends
    at x_t + (s - t) v, so the target of v is (x_s - x_t) / (s - t), the mean of the teacher's two velocities.
    The paper regresses the picture x_t + (1 - t) v with weight max(SNR, 1), SNR = t^2 / (1 - t)^2; errors there are
    1 - t times those of v, so the weight on velocities is max(t, 1 - t)^2.  steps: the student's N.
    """
    x0, x1, labels = lesson.draw()
    t = torch.randint(steps, x0.shape[:1], device=x0.device) / steps
    middle = t + 0.5 / steps
    xt = interpolate(x0, x1, t)
    teacher = partial(lesson.teacher, labels=labels)
    xs = move(teacher, move(teacher, xt, t, middle), middle, t + 1 / steps)
    error = squared(model(xt, t, labels), (xs - xt) * steps)
    return torch.maximum(t, 1 - t) ** 2 * error


def consistency_distillation_loss(model, ema, step, lesson, times):
    """consistency: distance(f(x_t, t), f^-(x_r, r)), x_r the teacher's Heun step from x_t to r [Song+23 eq. 7].

    f^-: f without gradient, with the student's own weights, as on CIFAR-10.  times: a grid that falls from 1, the data;
    r comes right before t.  At r = 1, f^- is x_r: that pins the rest.
    """
    x0, x1, labels = lesson.draw()
    i = torch.randint(len(times) - 1, x0.shape[:1], device=x0.device)
    r = times[i]
    t = times[i + 1]
    xt = interpolate(x0, x1, t)
    xr = move(partial(lesson.teacher, labels=labels), xt, t, r, heun=True)
    return lesson.distance(*both_ends(partial(model, labels=labels), (xt, t), (xr, r)))


def consistency_training_loss(model, ema, step, lesson, levels):
    """ict: huber(f(x_t, t), f^-(x_r, r)) / (sigma_t - sigma_r), x_t and x_r on the line from x0 to x1 [SD24].

    No teacher: on average over x0, x1 given x_t, the line's step is Euler's with the exact velocity.  The number of
    levels doubles along training, and neighbours are drawn by a lognormal of the noise level.  levels: step -> number.
    """
    x0, x1, labels = lesson.draw()
    times, chances, weights = ict_grid(levels(step), x0.device)
    i = torch.multinomial(chances, len(x0), replacement=True)
    r = times[i]
    t = times[i + 1]
    ends = both_ends(partial(model, labels=labels), (interpolate(x0, x1, t), t), (interpolate(x0, x1, r), r))
    return weights[i] * pseudo_huber(*ends)


def both_ends(student, noisy, clean):
    """f(x_t, t), and without gradient f^-(x_r, r), under one dropout mask [SD24].  noisy: x_t, t;  clean: x_r, r."""
    seed = torch.initial_seed() + 1                         # train() seeds every step; + 1: not the stream of the data
    torch.manual_seed(seed)
    # with gradient first: autocast caches the cast weights, and a copy cached under no_grad would block the gradient
    end = jump(student, *noisy)
    torch.manual_seed(seed)
    with torch.no_grad():
        return end, jump(student, *clean)


def mean_flow_loss(model, ema, step, lesson):
    """meanflow: huber(u(x_t, t, r), sg[v + (r - t) du/dt]), v = x1 - x0, u the mean velocity from t to r [Geng+25].

    (r - t) u(x_t, t, r) is the integral of the velocity from t to r.  Differentiated by t, at fixed r, this gives
        u = v + (r - t) du/dt,   du/dt = v grad_x u + d_t u                                        [eq. 6]
    at r = t the target is v alone, a flow's.  The target is linear in v: so x1 - x0, whose mean given x_t is the
    velocity, may stand for it.  sg: no gradient.  Huber, as in ict, because some targets are wild; it is the paper's
    weight of the square with p = 1/2 (they prefer 1).
    """
    x0, x1, labels = lesson.draw()
    t, r = two_times(len(x0), x0.device)
    xt = interpolate(x0, x1, t)
    v = x1 - x0
    bare = getattr(model, "module", model).forward          # around torch.compile and DDP, which know no dual numbers
    change = derivative(partial(bare, labels=labels, r=r), xt, t, v)
    return pseudo_huber(model(xt, t, labels, r), v + per_sample(r - t, xt) * change)


def derivative(u, x, t, v):
    """du/dt = v grad_x u + d_t u along dx/dt = v, without gradient: a Jacobian-vector product, in one pass forward.

    Dual numbers carry a value and its derivative through the network.  No autocast: bf16 would round too much away.
    MATH: the only kernel for attention with such derivatives, on MPS only if gradients are on.
    """
    no_graph = contextlib.nullcontext() if x.device.type == "mps" else torch.no_grad()
    with no_graph, torch.autocast(x.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH), dual_level():
        end = u(make_dual(x, v), make_dual(t, torch.ones_like(t)))
        return unpack_dual(end).tangent.detach()


# ---- Settings: every field is a flag, the comment beside it its help -------------------------------------------------


# Differs from 02_reflow.py: the methods and their constants, a budget for all, drawing and exporting
@dataclass
class Config:
    """From a rectified flow to one step, by six methods at equal cost."""
    preset: Literal["quick", "gpu", "paper"] = "quick"      # size of the run
    method: Literal["all", "rf", "progressive", "consistency", "ict", "meanflow", "remeanflow"] = "all"   # to train
    data: str = "shapes"                                    # shapes, cifar10, or a folder of class sub-folders
    data_dir: str = "data"                                  # where CIFAR-10 and the Inception network are kept
    download: bool = False                                  # fetch CIFAR-10 or the Inception network if missing
    data_size: Annotated[int, 16, 10 ** 8] = 20000          # pictures of the procedural set
    image_size: Annotated[int, 4, 1024] = 16                # side in pixels; a power of two
    teacher: str = ""                                       # a finished 1-rf.pt as 1-RF; empty: chapter 2's
    reflow: str = ""                                        # a finished 2-rf.pt as 2-RF; its cost counts all the same
    conditional: bool = True                                # feed class labels to the network
    steps: Count = 1500                                     # training steps of the teacher, 1-RF
    reflow_steps: Count = 1200                              # training steps of 2-RF
    distill_steps: Count = 100                              # training steps of rf and direct; others cost as much
    batch: Count = 32                                       # images in a step, over all processes
    accumulate: Count = 1                                   # slices of a batch, one after the other, if memory is short
    pairs: Count = 4096                                     # pairs made by 1-RF, and by 2-RF for rf
    pair_solver: Literal["euler", "heun"] = "heun"          # ODE solver that makes pairs
    pair_steps: Count = 8                                   # its steps (heun: two evaluations each)
    longer: bool = True                                     # the control: direct at the cost of reflow and rf together
    jumps: Count = 1                                        # rf and direct learn k steps: times 0, 1/k, ..., (k-1)/k
    lpips_share: Share = 0.5                                # last part, LPIPS for squares; a tenth of it if random
    lpips_net: Literal["vgg", "alex", "squeeze"] = "squeeze"    # LPIPS backbone
    lpips_size: Annotated[int, 32, 512] = 64                # LPIPS sees pictures of this side (the papers: 224)
    lpips_weights: str = "auto"                             # pretrained (downloaded), random, auto (either), a file
    halvings: Annotated[int, 1, 12] = 4                     # progressive: 2^halvings Euler steps become 1
    grid: Annotated[int, 3, 2000] = 8                       # noise levels of consistency distillation ([Song+23]: 18)
    distance: Literal["squared", "huber", "lpips"] = "squared"  # distance in consistency distillation
    levels: Annotated[int, 10, 10 ** 6] = 80                # ict: intervals of its grid, doubled from 10 up to this
    shard: Count = 256                                      # pairs in a file, and images sampled at a time
    channels: Count = 32                                    # width of the first level: a multiple of 32, or 4, 8, 16
    mult: Annotated[tuple, 1, 64] = (1, 1, 1)               # width of each level, in multiples of channels
    blocks: Count = 1                                       # residual blocks of a level
    attention: Annotated[tuple, 1, 1024] = (4,)             # resolutions with self-attention
    dropout: Annotated[float, 0, 0.9] = 0.0                 # dropout of 1-RF and 2-RF
    student_dropout: Annotated[float, 0, 0.9] = 0.0         # dropout of the students ([SD24]: 0.3 for ict)
    lr: Amount = 6e-3                                       # peak learning rate of 1-RF and 2-RF
    student_lr: Amount = 3e-3                               # peak learning rate of the students
    lr_decay: Literal["cosine", "constant"] = "cosine"      # learning rate after the warm-up: down to 0, or as it is
    warmup: Whole = 50                                      # steps of linear warm-up
    grad_clip: Amount = 1.0                                 # largest gradient norm; keeps short runs steady
    ema_decay: Share = 0.998                                # decay of the averaged weights
    eval_size: Annotated[int, 16, 10 ** 7] = 500            # samples of every metric (FID wants 50000)
    fid: bool = False                                       # true FID: Inception in place of small random features
    seed: Whole = 0                                         # seed of every random draw
    checkpoint: str = ""                                    # draw from this network and end: with --samples or --export
    samples: Whole = 0                                      # pictures drawn from --checkpoint into the folder --out
    export: str = ""                                        # file for --checkpoint's generator, see torch.export.load
    log_every: Count = 100                                  # steps between log lines; a checkpoint is written at each
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    compile: bool = False                                   # torch.compile the network (CUDA only; pays in long runs)
    out: str = ""                                           # run folder; empty: runs/<script>/<preset>
    fresh: bool = False                                     # start over: delete what the run folder holds
    may_change: ClassVar = {"method", "data_dir", "download", "log_every", "device", "compile", "out", "fresh"}
    presets: ClassVar = {
        "quick": {},
        "gpu": dict(                                        # one GPU, about 40 minutes after chapter 2's teacher
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=2, attention=(16,),
            dropout=0.1, batch=256, steps=12000, reflow_steps=2500, distill_steps=2000, lr=4e-4, student_lr=2e-4,
            warmup=200, ema_decay=0.999, pairs=50000, pair_steps=18, halvings=7, grid=18, levels=160, longer=False,
            lpips_net="vgg", lpips_weights="pretrained", shard=500, eval_size=10000, log_every=300, compile=True),
        "paper": dict(                                      # [Liu+22]'s sizes for reflow; every method costs 0.6 G
            # LPIPS keeps 75 MB an image: one card of 80 GB wants --accumulate 2
            data="cifar10", image_size=32, conditional=False, channels=128, mult=(2, 2, 2), blocks=4, attention=(16,),
            dropout=0.15, batch=512, steps=600000, reflow_steps=300000, distill_steps=300000, lr=2e-4, student_lr=1e-4,
            lr_decay="constant", warmup=5000, ema_decay=0.9999, pairs=1000000, pair_steps=64, halvings=10,
            grid=18, levels=1280, distance="lpips", lpips_net="vgg", lpips_size=224, lpips_weights="pretrained",
            longer=False, grad_clip=1e9, shard=1000, eval_size=50000, log_every=300, compile=True),
    }


# ---- The experiment --------------------------------------------------------------------------------------------------


# Differs from 02_reflow.py: methods in place of rounds
def main(config):
    """One teacher; from it, by every method at the same cost, a network that draws in one step; a table of them all."""
    run = Run(config, __file__)
    if config.checkpoint or config.samples or config.export:
        return draw_from_checkpoint(run)
    for path in filter(None, (config.teacher, config.reflow)):
        load_checkpoint(path)                               # a missing or broken file is told before a download
    settle_lpips(run)
    images, labels, names = load_data(run)
    if len(images) < 16:
        raise UserError(f"--data {config.data}: {len(images)} pictures are too few to measure with; give at least 16")
    features, label = choose_features(run)
    perceptual = None                                       # LPIPS, if a method asks for it
    if config.distance == "lpips" or (config.lpips_share and config.method in ("all", "rf")):
        perceptual = place(Perceptual(config.lpips_net, config.lpips_size, config.lpips_weights), run.device)
        compile_network(perceptual, config)
    classes = len(names) if config.conditional else 0
    torch.manual_seed(seed_for(config.seed, 0))             # the start weights
    flow = Flow(config, 3, classes)
    paths = [config.teacher or chapter_2(run, "1-rf"), config.reflow]
    if paths[0] and not (config.teacher or config.reflow):  # with chapter 2's 1-RF goes its 2-RF
        paths[1] = chapter_2(run, "2-rf", steps=config.reflow_steps)
    teacher, reflowed = [load_flow(path, run, 3, classes) if path else None for path in paths]
    for name, given in {"teacher_weights": teacher, "reflow_weights": reflowed}.items():
        if given:
            run.reads(name, given)
    draw = partial(draw_independent, to_device(images, run.device), labels.to(run.device) if classes else None)
    if teacher is None:                                     # pair_loss: chapter 2's, among the copies below
        teacher = run.fit("1-rf", flow, partial(pair_loss, draw=draw, n=run.share), stream=1)
    lesson = Lesson(partial(draw, run.share), Velocity(teacher, config), distance=perceptual)
    networks = {"1-RF": {1: teacher, 2: teacher}}           # a network for each number of steps
    straight = None
    if config.method in ("all", "rf", "remeanflow"):        # these two stand on reflow
        straight = straighten(lesson, reflowed, run)
        networks["2-RF"] = dict.fromkeys((1, 2), straight.teacher.flow)
    methods = {"rf": partial(distil_pairs, lesson, straight), "progressive": partial(halve_steps, lesson),
               "consistency": partial(follow_teacher, lesson), "ict": partial(follow_lines, lesson),
               "meanflow": partial(learn_means, lesson, "meanflow"),
               "remeanflow": partial(learn_means, straight, "remeanflow")}
    for name, method in methods.items():
        if config.method in ("all", name):
            networks |= method(run)
    if run.rank == 0:
        report(networks, images, features, label, run)


def straighten(lesson, reflowed, run):
    """Reflow.  Returns a Lesson: 1-RF's pairs, and as teacher 2-RF, which is trained here unless it is given."""
    flow = lesson.teacher.flow
    pairs = stored_pairs("2-rf", flow, 2, run)              # named after the stage that learns from them
    if reflowed is None:
        loss = partial(pair_loss, draw=pairs, n=run.share)
        reflowed = run.fit("2-rf", flow, loss, stream=2, steps=run.config.reflow_steps)
    return Lesson(partial(pairs, run.share), Velocity(reflowed, run.config))


def distil_pairs(lesson, straight, run):
    """rf: 2-RF distilled; beside it `direct`, 1-RF distilled in as many steps on as many pairs."""
    config = run.config
    flow = lesson.teacher.flow
    reflowed = straight.teacher.flow
    own = partial(stored_pairs("rf", reflowed, 3, run), run.share)
    lessons = [("direct", flow, straight.draw, 4), ("rf", reflowed, own, 5)]
    if config.longer:
        more = partial(stored_pairs("longer", flow, 8, run), run.share)
        lessons.append(("longer", flow, partial(draw_either, straight.draw, more), 9))
    networks = {}
    share = config.lpips_share * (0.1 if config.lpips_weights == "random" else 1)       # long, it only harms then
    for name, start, draw, stream in lessons:
        squares = round(training_steps(config)[name] * (1 - share))
        on_pairs = Lesson(draw, distance=lesson.distance, squares=squares)
        loss = partial(distillation_loss, lesson=on_pairs, jumps=config.jumps)
        student = train_student(name, start, loss, stream, run)
        networks[name] = {n: student for n in (1, 2) if config.jumps % n == 0}      # two steps if it learnt t = 1/2
    return networks


def draw_either(first, second):
    """A batch from one of two sets of pairs."""
    return first() if torch.rand(()) < 0.5 else second()


def halve_steps(lesson, run):
    """progressive: each round's student is the next one's teacher; the last two draw in two steps and in one."""
    flow = lesson.teacher.flow
    by_steps = {2: flow}                                    # with one halving, 1-RF itself is the two-step network
    for i in reversed(range(run.config.halvings)):
        n = 2 ** i                                          # steps of this student: ..., 4, 2, 1
        loss = partial(progressive_loss, lesson=Lesson(lesson.draw, Velocity(flow, run.config)), steps=n)
        flow = train_student(f"progressive-{n}", flow, loss, 10 + n, run)
        by_steps[n] = flow
    return {"progressive": {1: by_steps[1], 2: by_steps[2]}}


def follow_teacher(lesson, run):
    """consistency: from 1-RF's weights, along 1-RF's ODE."""
    distance = {"squared": squared, "huber": pseudo_huber, "lpips": lesson.distance}[run.config.distance]
    on_grid = Lesson(lesson.draw, lesson.teacher, distance)
    times = karras_times(run.config.grid).float().to(run.device)
    loss = partial(consistency_distillation_loss, lesson=on_grid, times=times)
    student = train_student("consistency", lesson.teacher.flow, loss, 6, run)
    return {"consistency": {1: student, 2: student}}


def follow_lines(lesson, run):
    """ict: from 1-RF's weights like the others, so that budgets compare; its loss knows no teacher."""
    levels = partial(ict_levels, steps=training_steps(run.config)["ict"], first=10, last=run.config.levels)
    loss = partial(consistency_training_loss, lesson=Lesson(lesson.draw), levels=levels)
    student = train_student("ict", lesson.teacher.flow, loss, 7, run)
    return {"ict": {1: student, 2: student}}


def learn_means(lesson, name, run):
    """meanflow: from 1-RF, noise and data drawn apart.  remeanflow: from 2-RF, on 1-RF's pairs."""
    warnings.filterwarnings("ignore", module="torch.jit")   # dual numbers load what warns of its own age
    start = widen(lesson.teacher.flow, run.config)
    student = train_student(name, start, partial(mean_flow_loss, lesson=lesson), 20 + MAPS.index(name), run)
    return {name: {n: FlowMap(student, n) for n in (1, 2)}}


# Differs from 02_reflow.py: methods in place of rounds, more metrics, and real pictures as the reference
def report(networks, images, features, label, run):
    """Measure every network from the same noises (a second jump takes second noises), print the table, draw."""
    config = run.config
    training_set = image_features(images, features, run.device)
    statistics = moments(training_set)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    size = min(config.eval_size, len(images) // 2)          # two sets of training pictures without one in common
    real, others = training_set[order[:2 * size]].split(size)
    reference = {"FD": {"-": frechet_from_moments(*moments(others), *statistics)}}
    rows = {"real data": reference | manifold_metrics(real, others)}
    ends = generate(Velocity(networks["1-RF"][1], config), run, 10, "heun")
    strips = {"1-RF, 20 evaluations": ends[:80:5]}
    readable = config.data == "shapes" and config.conditional
    for name, by_steps in networks.items():
        row = {"FD": {}}
        for nfe, flow in by_steps.items():
            pictures = generate(Velocity(flow, config), run, nfe, "jumps" if name in JUMPERS else "euler")
            found = image_features(pictures, features, run.device)
            row["FD"][str(nfe)] = frechet_from_moments(*moments(found), *statistics)
            if readable:
                row.setdefault("accuracy", {})[str(nfe)] = accuracy(pictures)
            if nfe == 1:
                row |= manifold_metrics(real, found[:size])
                row["to_teacher"] = (pictures - ends).square().mean().item()
            strips[f"{name}, {nfe} step{'s' * (nfe > 1)}"] = pictures[:80:5]
        row["evaluations"], row["reflow"] = spent(name, config)
        rows[name] = row
    save_json(run.folder / "results.json", {"distance": label, "samples": config.eval_size, "methods": rows})
    print_table(rows, label, config)
    draw_samples(strips, run.folder / "methods.png")
    print(f"\n{time.perf_counter() - run.started:.0f} s; methods.png and results.json are in {run.folder}/")


# ---- Training: equal budgets, noise levels, distances ----------------------------------------------------------------

# Evaluations of one image in a training step: forward 1, backward 2, derivative 2, a teacher's 1 (Heun: 2), target 1.
# A new method also needs: a loss, a function like follow_lines in main, a stream of its own, its name in Config.method.
COST = {"direct": 3, "rf": 3, "longer": 3, "progressive": 5, "consistency": 6, "ict": 4, "meanflow": 5, "remeanflow": 5}


def pair_cost(config):
    """Network evaluations of one set of pairs."""
    return config.pairs * config.pair_steps * (2 if config.pair_solver == "heun" else 1)


def training_steps(config):
    """Steps of every method and round: those of direct and rf as set, of the others as many as cost the same.

    The rounds of progressive share its steps equally, but the last two, the hard ones, count double [SH22].
    """
    budget = pair_cost(config) + COST["rf"] * config.batch * config.distill_steps
    steps = {method: max(1, round(budget / (cost * config.batch))) for method, cost in COST.items()}
    steps["direct"] = steps["rf"] = config.distill_steps
    steps["longer"] = config.distill_steps + config.reflow_steps
    shares = {2 ** i: 2 if i < 2 else 1 for i in range(config.halvings)}
    rounds = {n: max(1, round(steps["progressive"] * share / sum(shares.values()))) for n, share in shares.items()}
    steps["progressive"] = sum(rounds.values())
    return steps | {f"progressive-{n}": count for n, count in rounds.items()}


def spent(name, config):
    """Network evaluations of a network after 1-RF: those of its method, and those of its reflow, pairs included."""
    own = COST.get(name, 0) * config.batch * training_steps(config).get(name, 0)
    own += pair_cost(config) * {"direct": 1, "rf": 1, "longer": 2}.get(name, 0)
    reflow = pair_cost(config) + 3 * config.batch * config.reflow_steps
    return own, reflow if name in ("2-RF", "rf", "remeanflow") else 0


def train_student(name, start, loss, stream, run):
    """A method or a round of it, from the weights of `start`, with the students' own dropout and learning rate."""
    model = copy.deepcopy(start)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = run.config.student_dropout
    return run.fit(name, model, loss, stream, steps=training_steps(run.config)[name], lr=run.config.student_lr)


MAPS = ("meanflow", "remeanflow")                           # methods whose network takes an end time r, too
SPANS = 8                                                   # features cos(k pi (r - t)), further columns of labels


class FlowMap(nn.Module):
    """The mean velocity u(x, t, r) from t to r: a Flow whose network also gets cos(k pi (r - t)), k = 0 ... SPANS - 1.

    forward: x (B, C, H, W), t (B,), labels (B,) or None, r (B,) -> (B, C, H, W).  Without r, r = t + 1/steps: so
    FlowMap(net, n) is integrated like a velocity, in n Euler steps, each exact if u is.
    """

    def __init__(self, flow, steps=1):
        super().__init__()
        self.model = flow.model                             # named as in Flow: its file loads as a wider Flow
        self.classes = self.model.classes - SPANS
        self.steps = steps

    def forward(self, x, t, labels=None, r=None):
        span = torch.full_like(t, 1 / self.steps) if r is None else r - t
        numbers = self.model.numbers
        columns = (math.pi * span[:, None] * numbers[:SPANS]).cos()
        if self.classes:
            columns = torch.cat([(labels[:, None] == numbers[:self.classes]).to(columns.dtype), columns], dim=1)
        return edm_velocity(partial(self.model, labels=columns), x, t)


def widen(flow, config):
    """A FlowMap that starts equal to a flow, for every r: the new columns of labels have zero weights."""
    wide = Flow(config, 3, flow.classes + SPANS)
    label = torch.zeros_like(wide.model.map_label.weight)
    if flow.classes:                                        # UNet scales by sqrt(classes), now larger
        label[:, :flow.classes] = flow.model.map_label.weight * (flow.classes / wide.classes) ** 0.5
    wide.load_state_dict(wide.state_dict() | flow.state_dict() | {"model.map_label.weight": label})
    return FlowMap(wide)


def stored_pairs(name, flow, stream, run):
    """draw(n) on the pairs that a flow makes for the stage of this name."""
    velocity = Velocity(flow, run.config)
    write_pairs(run, name, velocity, stream)
    return partial(draw_stored, load_pairs(run, name), seed_for(run.config.seed, stream), velocity.classes)


def karras_times(n, low=0.002, high=80.0, rho=7):
    """n times t = 1/(1 + sigma_i) from data to noise, sigma_i^(1/rho) linear between low and high [Karras+22 eq. 5].

    The first level is 0 in place of `low`: at t = 1, f is the identity.  Returns (n,) float64, 1 ... 1/81: whoever
    subtracts neighbours near 1, as little as 4e-5 apart, would lose digits in float32.
    """
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    sigma = (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    sigma[0] = 0
    return 1 / (1 + sigma)


def ict_levels(step, steps, first, last):
    """N(k) = min(first 2^floor(k/K'), last) + 1 noise levels, K' = floor(K / (floor(log2(last/first)) + 1)) [SD24]."""
    period = max(1, steps // (int(math.log2(last // first)) + 1))
    return min(first * 2 ** (step // period), last) + 1


@lru_cache(maxsize=16)
def ict_grid(n, device=None, mean=-1.1, std=2.0):
    """n times, and of the intervals between them chances and weights [SD24]; made once per number of levels.

    Chance: the mass of log sigma ~ N(mean, std^2) in the interval; the first takes all below sigma_1.
    Weight: 1 / (sigma_t - sigma_r) = t r / (r - t).
    """
    times = karras_times(n)
    log_sigma = torch.log((1 - times) / times)              # -inf at t = 1, where erf is -1
    mass = torch.erf((log_sigma - mean) / (std * 2 ** 0.5)).diff()
    r = times[:-1]
    t = times[1:]
    return [x.float().to(device) for x in (times, mass / mass.sum(), t * r / (r - t))]


def two_times(n, device, same=0.5):
    """Times t <= r (n,): two sorted uniform draws; with probability `same`, r is set to t."""
    t, r = torch.rand(2, n, device=device).sort(0).values
    return t, torch.where(torch.rand(n, device=device) < same, t, r)


def squared(a, b):
    """|a - b|^2, mean over D.  a, b: (B, *D).  Returns (B,)."""
    return (a - b).square().flatten(1).mean(1)


# Differs from 03_improved_training.py: the constant of [SD24], sqrt(d) where [Lee+24] has d, and no 1/d
def pseudo_huber(a, b):
    """sqrt(|a - b|^2 + c^2) - c with c = 0.00054 sqrt(d), d entries a sample [SD24].  a, b: (B, *D).  Returns (B,)."""
    c = 0.00054 * a[0].numel() ** 0.5
    return ((a - b).flatten(1).square().sum(1) + c ** 2).sqrt() - c


# ---- Sampling, metrics, exporting ------------------------------------------------------------------------------------

JUMPERS = ("consistency", "ict")                            # they draw by jumps, the others by Euler steps
JUMP_TIMES = [1 / 81, 0.549]                                # t of sigma = 80 and, for the second jump, of 0.821 [SD24]


def consistency_sample(velocity, noises, times):
    """Multistep consistency sampling [Song+23 algorithm 1]: jump to the data, add noise again, jump again.

    times: increasing; in the first x_t the picture is next to nothing.  noises: an x0 (B, *D) each.  Returns (B, *D).
    """
    x1 = torch.zeros_like(noises[0])
    for noise, start in zip(noises, times, strict=True):
        t = noise.new_full(noise.shape[:1], start)
        x1 = jump(velocity, interpolate(noise, x1, t), t)
    return x1


# Differs from 02_reflow.py: pictures alone; consistency and ict jump, the second time from new noise
def generate(velocity, run, steps, method="euler"):
    """config.eval_size samples (N, C, H, W) in [-1, 1] on the CPU, from the same noises for every network."""
    images = []
    for first in range(0, run.config.eval_size, run.config.shard):
        index = torch.arange(first, first + run.config.shard, device=run.device)       # whole shards: one compilation
        noises = [pair_noise(seed_for(run.config.seed, stream), index, velocity.shape) for stream in (999, 998)]
        start = noises[:steps] if method == "jumps" else noises[0]
        images.append(sample(velocity, start, index, steps, method).cpu())
    return torch.cat(images)[:run.config.eval_size].clamp(-1, 1)


# Differs from 02_reflow.py: jumps, no rk45
def sample(velocity, z0, index, steps, method="euler"):
    """Where the flow carries z0 (B, C, H, W; for jumps one of each) of these pairs: pair i has label i % classes."""
    flow = partial(velocity, labels=index % velocity.classes if velocity.classes else None)
    if method == "jumps":
        return consistency_sample(flow, z0, JUMP_TIMES[:steps])
    return integrate(flow, z0, steps, method)[-1]


def manifold_metrics(real, fake, k=5):
    """Precision and recall [Kyn+19], density and coverage [Nae+20] of features (N, F) and (M, F).

    A ball around every point reaches to its k-th neighbour in its own set.  precision: share of fakes in some real
    ball; recall: share of reals in some fake ball; density: real balls around a fake, over k; coverage: share of real
    balls that hold a fake.  Only numbers at equal N and M compare; at M = N, fakes as good as data give density 1 and
    coverage 1 - 2^-k, and of precision and recall what the row of real data shows.
    """
    real, fake = [x[:10000].double() for x in (real, fake)]                 # as many as in [Nae+20]: bounds the memory
    distance = torch.cdist(real, fake)                                      # (N, M)
    in_real = distance < torch.cdist(real, real).kthvalue(k + 1).values[:, None]    # k + 1: the nearest is itself
    in_fake = distance < torch.cdist(fake, fake).kthvalue(k + 1).values
    shares = {"precision": in_real.any(0), "recall": in_fake.any(1), "density": in_real.sum(0).double() / k,
              "coverage": in_real.any(1)}
    return {name: share.double().mean().item() for name, share in shares.items()}


def image_features(images, features, device):
    """Features (N, F) on the CPU of uint8 or float images (N, C, H, W), in batches."""
    floats = to_floats if images.dtype == torch.uint8 else nn.Identity()
    return torch.cat([features(floats(batch.to(device))).cpu() for batch in images.split(500)])


# Differs from 02_reflow.py: a row per method, and real data as the reference
def print_table(rows, label, config):
    """A line per network, and what the columns mean."""
    print(f"\n{label}, after 1 and 2 network evaluations\n"
          f"{'':>16}     FD 1     FD 2  accuracy  precision  recall  density  coverage  to teacher  evaluations"
          "    + reflow")
    for name, row in rows.items():
        distances = "".join(f"{distance:9.3f}" for distance in row["FD"].values())
        accurate = f"{row['accuracy']['1']:10.3f}" if "accuracy" in row else " " * 10
        quality = f"{row['precision']:11.3f}{row['recall']:8.3f}{row['density']:9.3f}{row['coverage']:10.3f}"
        cost = f"{row['to_teacher']:12.3f}{row['evaluations']:13,}{row['reflow']:12,}" if "reflow" in row else ""
        print(f"{name:>16}{distances:<18}{accurate}{quality}{cost}")
    print("FD 2: progressive by its network for two; direct, rf and longer if --jumps is even: they learnt t = 1/2;\n"
          "to teacher: mean squared gap to what 1-RF's ODE makes of the same noise; evaluations: of the network, by\n"
          f"the method and its pairs; + reflow: by 2-RF before; 1-RF had cost {3 * config.batch * config.steps:,}")
    if "accuracy" in rows["1-RF"]:
        print("accuracy: share of one-step pictures that show their caption; it forgives soft edges, FD does not")
    if config.lpips_weights == "random" and ("rf" in rows or config.distance == "lpips"):
        print("LPIPS had a random, untrained backbone (--lpips-weights random): a dry run of the papers' distance")


def draw_from_checkpoint(run):
    """--checkpoint: --samples pictures into --out, a PNG each and 64 on samples.png; --export writes the generator."""
    config = run.config
    if not (config.checkpoint and (config.samples and config.out or config.export and not config.samples)):
        raise UserError("give --checkpoint FILE with --samples N --out FOLDER, or with --export FILE")
    if Path(config.export or config.out).exists():
        raise UserError(f"{config.export or config.out} exists already; choose another name")
    flow, stage = open_network(config.checkpoint, run)
    if config.samples:
        run.config.eval_size = config.samples
        pictures = generate(Velocity(flow, config), run, 1, "jumps" if stage in JUMPERS else "euler")
        save = partial(torchvision.utils.save_image, normalize=True, value_range=(-1, 1))
        run.folder.mkdir(parents=True, exist_ok=True)
        save(pictures[:64], run.folder / "samples.png")
        for i, picture in enumerate(pictures):
            save(picture, run.folder / f"{i:05d}.png")
        print(f"{len(pictures)} pictures, one evaluation each, and samples.png are in {run.folder}/")
    if config.export:
        export_generator(Generator(flow, stage).to("cpu", memory_format=torch.contiguous_format), Path(config.export))


def open_network(path, run):
    """A finished network of chapters 2 to 4, of the sizes that its file tells, and the name of its stage."""
    content = load_checkpoint(path)
    names = ("image_size", "channels", "mult", "blocks", "attention", "conditional")
    if not {"model", *names} <= {*content, *content["config"]}:
        raise UserError(f"{path} is no network of chapters 2 to 4")
    run.config = dataclasses.replace(run.config, **{name: content["config"][name] for name in names})
    label_weight = content["model"].get("model.map_label.weight", torch.empty(0, 0))
    flow = load_flow(path, run, 3, label_weight.shape[1])
    stage = content["config"].get("stage")
    return FlowMap(flow) if stage in MAPS else flow, stage


class Generator(nn.Module):
    """All that drawing needs.  forward: z0 (B, C, H, W) standard normal, labels (B,) or None -> pictures in [-1, 1]."""

    def __init__(self, flow, stage):
        super().__init__()
        self.flow = flow
        self.start = JUMP_TIMES[0] if stage in JUMPERS else 0.0

    def forward(self, z0, labels=None):
        return consistency_sample(partial(self.flow, labels=labels), [z0], [self.start]).clamp(-1, 1)


def export_generator(generator, path):
    """The generator as one file that torch.export.load reads without this repository, for any batch."""
    inputs = {"z0": torch.zeros(2, *generator.flow.model.shape)}
    if generator.flow.classes:
        inputs["labels"] = torch.zeros(2, dtype=torch.long)
    batch = torch.export.Dim("batch", min=1, max=65536)
    shapes = {name: {0: batch} for name in inputs}
    file = io.BytesIO()                                     # by way of memory, so that a full disk is noticed
    torch.export.save(torch.export.export(generator, tuple(inputs.values()), dynamic_shapes=shapes), file)
    with replacing(path) as part:
        part.write_bytes(file.getvalue())
    print(f"torch.export.load('{path}').module()({', '.join(inputs)}) draws; z0: (B, *{generator.flow.model.shape})")


# region Copied from 01_rectified_flow.py ------------------------------------------------------------------------------

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


# region Copied from 02_reflow.py: data, network, pairs, metrics -------------------------------------------------------

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


def pair_loss(model, ema, step, draw, n):
    """|x1 - x0 - v(x_t, t)|^2 at x_t = (1 - t) x0 + t x1, t ~ U[0, 1] [Liu+22 eq. 1].  Returns (n,).

    The loss of every round; only draw is another: n -> x0, x1 (n, C, H, W), labels (n,) or None.
    """
    x0, x1, labels = draw(n)
    t = torch.rand(n, device=x0.device)
    v = model(interpolate(x0, x1, t), t, labels)
    return (v - (x1 - x0)).square().flatten(1).mean(1)


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


# region Copied from 03_improved_training.py ---------------------------------------------------------------------------

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


# endregion


if __name__ == "__main__":
    launch(main, Config)
