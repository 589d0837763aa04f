"""Chapter 5 - InstaFlow: does it scale to text-to-image, and down to one step?

Stable Diffusion turned into a one-step generator [Liu+24], training included.  What chapters 1 to 4 did with pictures
happens here in the latent space of an autoencoder, with a text T at every velocity:
    teacher  a diffusion model predicts the noise eps in x_s = a_s x1 + b_s x0; DPM-Solver++ [Lu+22] follows its flow,
             with guidance: v_null + w (v_text - v_null) [Ho+22]
    reflow   E |x1 - x0 - v(x_t, t | T)|^2 on pairs (x0, x1 = ODE[teacher](x0 | T)), from the teacher's weights
    distil   E D(ODE[v](x0 | T), x0 + v(x0, 0 | T)): D is first the mean |.|^2 of latents, then LPIPS of their pictures
    control  the same distillation of the teacher, without reflow: for as many steps, and for those of reflow as well
The network is fed 1000 (1 - t), the teacher's range of numbers; what t means at them is learned anew.

    python 05_text_to_image.py                                 # all of it from nothing on captioned shapes, on a laptop
    python 05_text_to_image.py sample --model XCLiu/instaflow_0_9B_from_sd_1_5 --prompt "a red bicycle" --seed 0
    torchrun --nproc-per-node 8 05_text_to_image.py --preset paper --model FOLDER --prompts prompts.txt

You will see, in runs/05_text_to_image/quick/: grid.png (prompts by networks, the same noise along a row) and a table of
caption accuracy and Frechet distance.  Each network lies there as a folder in the layout of diffusers:
`sample --model runs/05_text_to_image/quick/distilled-0 --prompt "a blue cross on a white background"` draws with it.
[Liu+24] InstaFlow, arXiv 2309.06380.  [Rombach+22] Latent Diffusion (Stable Diffusion), arXiv 2112.10752.  [Ho+22]
Classifier-Free Guidance, arXiv 2207.12598.  [Lu+22] DPM-Solver++, arXiv 2211.01095.  [Zhang+18] LPIPS, 1801.03924.
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
import mmap
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import typing
import unicodedata
import urllib.request
import warnings
from collections import Counter, OrderedDict
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain, product
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- The method ------------------------------------------------------------------------------------------------------


def as_velocity(unet, x, t, text):
    """InstaFlow's network, v(x, t | T) = unet(x, 1000 (1 - t), T): fed its range of times, not its noise levels."""
    return unet(x, 1000 * (1 - t), text)


def guided(velocity, scale):
    """Classifier-free guidance [Ho+22]: v_null + w (v_text - v_null), as one call of the network on a double batch.

    velocity: (x (B, *D), t (B,), text (B, L, C)) -> (B, *D); an eps-network and its time do as well.  Returns a
    function (x, t, text, null (1, L, C)); w = 1 is the text's own velocity and asks for no null.
    """
    def flow(x, t, text, null=None):
        if scale == 1:
            return velocity(x, t, text)
        both = torch.cat([null.expand_as(text), text])
        v_null, v_text = velocity(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_null + scale * (v_text - v_null)
    return flow


def reflow_loss(velocity, x0, x1, text):
    """E |x1 - x0 - v(x_t, t | T)|^2, t ~ U[0, 1], on the teacher's pairs [Liu+24].  x0, x1: (B, C, h, w) -> (B,).

    Guidance is in x1 already: the student needs one evaluation a step in place of two.
    """
    t = torch.rand(len(x0), device=x0.device)
    return flow_matching_loss(partial(velocity, text=text), x0, x1, t)


def one_step_loss(velocity, x0, x1, text, distance):
    """D(x1, x0 + v(x0, 0 | T)) [Liu+24]: distillation at t = 0 exactly.

    The network sees x0 and no trace of x1.  distance: (a, b) of latents (B, C, h, w) -> (B,).
    """
    t = x0.new_zeros(len(x0))
    return distance(x0 + velocity(x0, t, text), x1)


def latent_distance(a, b):
    """Mean squared difference per sample: (B, *D) twice -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


def picture_distance(vae, perceptual, a, b):
    """The distance of latents a from the target b, (B, C, h, w), that LPIPS sees in their pictures.  Returns (B,)."""
    with torch.no_grad():
        target = vae.decode(b / vae.scale)
    return perceptual(vae.decode(a / vae.scale), target)


class Schedule:
    """A diffusion model's noise: x_s = a_s x1 + b_s x0, s = 0 ... 999, a_s^2 = prod(1 - beta), b_s^2 = 1 - a_s^2.

    Stable Diffusion's unless told otherwise: sqrt(beta) is linear from sqrt(0.00085) to sqrt(0.012) [Rombach+22].  Even
    x_999 holds 7 % of x1's amplitude.  predicts: what the network gives, x0 (epsilon), a x0 - b x1 or x1 (sample).
    """

    def __init__(self, first=0.00085, last=0.012, kind="scaled_linear", count=1000, predicts="epsilon"):
        require(kind in ("linear", "scaled_linear"), f"beta_schedule is {kind}")
        require(predicts in ("epsilon", "v_prediction", "sample"), f"prediction_type is {predicts}")
        require(0 < first < 1 and 0 < last < 1, f"beta goes from {first} to {last}")
        power = 2 if kind == "scaled_linear" else 1
        beta = torch.linspace(first ** (1 / power), last ** (1 / power), count, dtype=torch.float64) ** power
        alpha_bar = (1 - beta).cumprod(0)
        self.a = alpha_bar.sqrt()                           # (count,) float64
        self.b = (1 - alpha_bar).sqrt()
        self.predicts = predicts

    def noise(self, output, x, s):
        """What the network gives for x (B, *D) at levels s (B,), perhaps between two, as x0 = (x - a x1) / b."""
        if self.predicts == "epsilon":
            return output
        ratio = np.interp(s.cpu(), np.arange(len(self.a)), torch.log(self.a / self.b))
        a, b = (per_sample(torch.sigmoid(torch.tensor(sign * 2 * ratio)).sqrt().to(x), x) for sign in (1, -1))
        return a * output + b * x if self.predicts == "v_prediction" else (x - a * output) / b


def velocity_from_eps(eps, schedule=None):
    """A diffusion model as a velocity, exact from t = 0.064 on: v = x1_hat - eps = (x_t - eps(x_s, s)) / t.

    Dividing x_s by a + b gives x_t with t = a / (a + b), so Euler's steps are DDIM's.  The model knows no less signal
    than x_999 has, t = 0.064: below, x_t counts as x_999.
    eps: (x (B, *D), s (B,)) -> noise (B, *D).  Returns a velocity (x (B, *D), t (B,)) -> (B, *D).
    """
    schedule = schedule or Schedule()
    known = (schedule.a / (schedule.a + schedule.b)).flip(0)           # t of s = 999 ... 0, increasing

    def velocity(x, t):
        t = t.cpu().double()
        known_t = t.clamp(known[0], known[-1])
        s = np.interp(torch.logit(known_t), torch.logit(known), np.arange(len(known))[::-1])
        t = per_sample(t.to(x), x)
        known_t = per_sample(known_t.to(x), x)
        xs = x / (t ** 2 + (1 - t) ** 2).sqrt()
        noise = eps(xs, torch.as_tensor(s).to(x))
        return ((known_t ** 2 + (1 - known_t) ** 2).sqrt() * xs - noise) / known_t
    return velocity


@torch.no_grad()
def dpm_solver(eps, x, steps, schedule=None):
    """DPM-Solver++(2M) [Lu+22 algorithm 2] from noise x (B, *D): the teacher's flow in `steps` evaluations.

    With lambda = ln(a / b) the flow is linear in x1_hat, which is extrapolated from two steps (the first and the last
    have one; the last goes to no noise at all).  eps: (x, s (B,)) -> noise.  Returns x1 (B, *D).
    """
    schedule = schedule or Schedule()
    levels = len(schedule.a)
    require(steps < levels, f"{steps} steps are too many for a model of {levels} noise levels")
    times = np.linspace(0, levels - 1, steps + 1).round().astype(int)  # 0 ... 999; the solver goes down, not to 0
    times = times[1:].tolist()[::-1]
    a = schedule.a[times].tolist()
    b = schedule.b[times].tolist()
    for i, s in enumerate(times):
        x1_hat = (x - b[i] * eps(x, x.new_full(x.shape[:1], s))) / a[i]
        if i == steps - 1:
            return x1_hat
        h = math.log(a[i + 1] / b[i + 1] * b[i] / a[i])                # the step in lambda
        guess = x1_hat if i == 0 else x1_hat + h / (2 * width) * (x1_hat - before)
        x = b[i + 1] / b[i] * x - a[i + 1] * math.expm1(-h) * guess
        before = x1_hat
        width = h


# ---- Settings: every field is a flag, the comment beside it its help -------------------------------------------------


Counts = Annotated[tuple, 1, 2 ** 32 - 1]
Widths = Annotated[tuple, 4, 4096]
Guidance = Annotated[float, 0, 30]


# Differs from 03_improved_training.py: a latent model with text, a teacher that may be Stable Diffusion, two students
@dataclass
class Config:
    """Text-to-image: a teacher, its reflow, and one-step students."""
    preset: Literal["quick", "gpu", "paper"] = "quick"      # size of the run
    model: str = ""                                         # Stable Diffusion 1.x, a folder or owner/name; empty: train
    prompts: str = ""                                       # text file, a prompt a line; empty: captions of the shapes
    image_size: Annotated[int, 0, 2048] = 0                 # side in pixels; 0: as --model, or for latents of 8 x 8
    data_size: Annotated[int, 2, 10 ** 8] = 20000           # captioned shapes that the tiny teacher learns from
    seeds: Annotated[int, 1, 100] = 1                       # students trained from the one teacher
    unet: Literal["plain", "stacked"] = "plain"             # stacked: the distilled network is two U-Nets in a row
    init: Literal["teacher", "negated"] = "negated"         # students' start: the teacher, or with conv_out negated
    direct: bool = True                                     # the control: distil the teacher itself, too
    vae_steps: Count = 1000                                 # training steps of the tiny autoencoder
    vae_batch: Count = 16                                   # pictures in a step of it
    vae_channels: Widths = (16, 32)                         # its widths; each but the first halves the picture
    kl: Amount = 3e-3                                       # weight of its KL divergence (Stable Diffusion: 1e-6)
    steps: Count = 3000                                     # training steps of the tiny teacher and its text encoder
    batch: Count = 32                                       # pictures in a step of it, over all processes
    accumulate: Count = 1                                   # slices of a large batch, in turn, if memory is short
    lr: Amount = 3e-3                                       # peak learning rate of autoencoder and teacher
    channels: Widths = (32, 64)                             # widths of its U-Net; the first is also that of its texts
    attention: Annotated[tuple, 0, 1] = (0, 1)              # which of these levels read the text, 1 or 0 each
    blocks: Annotated[int, 1, 100] = 1                      # residual blocks of a level, and layers of the text encoder
    heads: Count = 4                                        # attention heads of both
    guidance: Guidance = 3.0                                # guidance of the teacher that makes pairs; 1 or less: none
    solver_steps: Annotated[int, 1, 999] = 25               # its DPM-Solver++ steps, of 2 evaluations with guidance
    pairs: Count = 1536                                     # pairs (x0, x1) made for reflow; with --direct twice that
    shard: Count = 256                                      # pairs in a file
    sample_batch: Count = 256                               # pictures that are made at a time
    caption_dropout: Share = 0.1                            # captions that training replaces by the empty one
    reflow_steps: Counts = (1200,)                          # training steps of 2-RF, one number a phase
    reflow_batch: Counts = (16,)                            # pairs in a step of each phase
    distill_guidance: Guidance = 1.5                        # guidance of 2-RF when it makes the pairs to distil
    distill_solver_steps: Count = 8                         # Euler steps of 2-RF for these pairs
    distill_steps: Counts = (100, 50)                       # distillation by |.|^2 of latents, by LPIPS of pictures
    distill_batch: Counts = (16, 16)                        # pairs in a step of each
    student_lr: Amount = 1e-3                               # peak learning rate of the students
    lpips_lr: Amount = 3e-4                                 # peak learning rate of the LPIPS phase
    lr_decay: Literal["cosine", "constant"] = "cosine"      # learning rate after the warm-up: down to 0, or as it is
    warmup: Whole = 50                                      # steps of linear warm-up
    grad_clip: Amount = 1.0                                 # largest gradient norm
    ema_decay: Share = 0.998                                # decay of the averaged weights
    checkpointing: bool = False                             # recompute the U-Net's activations instead of keeping them
    lpips_net: Literal["vgg", "alex", "squeeze"] = "squeeze"    # LPIPS backbone
    lpips_size: Annotated[int, 32, 1024] = 64               # pictures are resized to this side for LPIPS
    lpips_weights: str = "auto"                             # pretrained (downloaded), random, auto (either), a file
    eval_size: Annotated[int, 2, 10 ** 7] = 512             # samples of every measurement
    seed: Whole = 0                                         # seed of every random draw
    log_every: Count = 100                                  # steps between log lines; a checkpoint is written at each
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    compile: bool = False                                   # torch.compile the network (CUDA only; pays in long runs)
    out: str = ""                                           # run folder; empty: runs/<script>/<preset>
    fresh: bool = False                                     # start over: delete what the run folder holds
    may_change: ClassVar = {"seeds", "checkpointing", "log_every", "device", "compile", "out", "fresh"}
    presets: ClassVar = {
        "quick": {},
        "gpu": dict(                                        # one GPU: the tiny chain at 64 x 64 with wider networks
            vae_channels=(64, 128, 128, 128), vae_steps=4000, vae_batch=128, channels=(128, 256, 256),
            attention=(1, 1, 0), blocks=2, heads=8, batch=256, steps=10000, lr=1e-3, pairs=20000, shard=500,
            sample_batch=500, reflow_steps=(5000,), reflow_batch=(256,), distill_solver_steps=25,
            distill_steps=(3000, 500), distill_batch=(256, 128), student_lr=4e-4, lpips_lr=1e-4, warmup=500,
            ema_decay=0.999, lpips_net="vgg", lpips_size=64, lpips_weights="pretrained", eval_size=5000, log_every=500,
            compile=True),
        # log_every: what a stop under torchrun may lose; the checkpoint of every log line has 14 GB
        "paper": dict(                                      # [Liu+24]'s final model, 199 A100 days; rate of reflow
            init="teacher", direct=False, guidance=5.0, pairs=1600000, shard=1000, sample_batch=20,
            batch=1024, accumulate=16, checkpointing=True, reflow_steps=(70000, 25000), reflow_batch=(64, 1024),
            distill_solver_steps=25, distill_steps=(21500, 18000), distill_batch=(1024, 1024), student_lr=1e-6,
            lpips_lr=1e-6, lr_decay="constant", warmup=1000, ema_decay=0.9999, lpips_net="vgg", lpips_size=512,
            lpips_weights="pretrained", eval_size=5000, log_every=100, compile=True),
    }


@dataclass
class DrawConfig:
    """Settings of `sample` (prompts to pictures) and `evaluate` (captions to numbers), with a finished model."""
    preset: Literal["instaflow", "2-rf", "teacher"] = "instaflow"   # its kind: one-step, 2-RF, or a diffusion model
    model: str = ""                                         # folder in the layout of diffusers, or owner/name
    prompt: tuple = ("",)                                   # sample: what to draw, one text or several
    captions: str = ""                                      # evaluate: COCO's captions_*.json, or a caption a line
    count: Whole = 0                                        # pictures a prompt (0: 4), or captions used (0: 5000)
    negative: str = ""                                      # what not to draw: the empty text's place under guidance
    solver: Literal["euler", "dpm"] = "euler"               # euler for a velocity, dpm for a diffusion model
    steps: Annotated[int, 1, 999] = 1                       # evaluations of the network (twice as many with guidance)
    guidance: Guidance = 1.0                                # 1 or less is none
    size: Annotated[tuple, 0, 4096] = (0,)                  # side in pixels, or height and width; 0: as it was trained
    batch: Count = 4                                        # pictures made at a time
    lora: tuple = ("",)                                     # LoRAs to merge, each a file or folder, perhaps with :SCALE
    delta: tuple = ("",)                                    # FROM TO: models whose difference is added to the U-Net
    fid: bool = False                                       # evaluate: FID of the pictures against --real
    real: str = ""                                          # folder of real images for --fid
    clip: str = ""                                          # a public CLIP, folder or owner/name, for the CLIP score
    data_dir: str = "data"                                  # where the Inception network is kept
    download: bool = False                                  # fetch it if missing
    seed: Whole = 0                                         # seed of the noise
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    compile: bool = False                                   # torch.compile all networks (CUDA only; pays for many)
    out: str = ""                                           # sample: sample.png; evaluate: evaluation.json
    accumulate: ClassVar = 1
    presets: ClassVar = {"instaflow": {}, "2-rf": dict(steps=25, guidance=1.5),
                         "teacher": dict(solver="dpm", steps=25, guidance=7.5)}


# ---- The experiment --------------------------------------------------------------------------------------------------


# Differs from 03_improved_training.py: a latent model with text, given or trained from nothing
def main(config):
    """A teacher, the students of every seed, then numbers and pictures."""
    run = Run(config, __file__)
    check_settings(run)
    settle_lpips(run)
    texts = read_texts(config.prompts) if config.prompts else shape_captions()
    run.reads("texts", texts)
    perceptual = place(Perceptual(config.lpips_net, config.lpips_size, config.lpips_weights), run.device)
    compile_network(perceptual, config)
    if config.model and run.rank == 0:
        load_pipeline(config.model)                         # one process downloads, the others find the files
    run.wait()
    pipe = load_pipeline(config.model) if config.model else tiny_teacher(run)
    config.image_size, _ = prepare(pipe, run.device, [config.image_size] * 2)
    prompts = Prompts(pipe, texts)
    if config.model:
        check_teacher(config.model, prompts)
        run.reads("model_weights", nn.ModuleList([pipe.text_encoder, pipe.unet, pipe.vae]))
    pipe.unet.checkpointing = pipe.vae.checkpointing = config.checkpointing
    compile_network(pipe.vae.decoder, config)
    distance = partial(picture_distance, pipe.vae, perceptual)
    networks = [students(run, prompts, distance, seed) for seed in range(config.seeds)]
    if run.rank == 0:
        report(run, prompts, networks)


def students(run, prompts, distance, seed):
    """[Liu+24]: straighten the teacher by reflow, then distil; beside it distillation alone.  Returns name -> U-Net."""
    config = run.config
    teacher = Sampler(prompts, prompts.pipe.unet, "dpm", config.solver_steps, config.guidance)
    noise = seed_for(config.seed, 3)
    write_pairs(run, "teacher", teacher, noise, config.pairs * (2 if config.direct else 1))
    shape = prompts.pipe.shape
    draw = partial(draw_stored, load_pairs(run, "teacher", config.pairs, shape), noise, prompts)
    turn = config.init == "negated" and prompts.pipe.schedule.predicts != "sample"     # x1 - x0 is near x1 as it is
    start = negated(teacher.unet) if turn else teacher.unet
    batches = zip(config.reflow_steps, config.reflow_batch)
    phases = [(reflow_loss, steps, batch, config.student_lr) for steps, batch in batches]
    flow = train_student(run, f"2-rf-{seed}", start, partial(draw, dropout=config.caption_dropout), phases)

    straight = Sampler(prompts, flow, "euler", config.distill_solver_steps, config.distill_guidance)
    flow_noise = seed_for(config.seed, 4, seed)
    write_pairs(run, f"2-rf-{seed}", straight, flow_noise, config.pairs)
    draw = partial(draw_stored, load_pairs(run, f"2-rf-{seed}", config.pairs, shape), flow_noise, prompts)
    deepen = StackedUNet if config.unet == "stacked" else copy.deepcopy
    phases = distill_phases(config, distance, 0)
    networks = {"2-rf": flow}
    networks["distilled"] = train_student(run, f"distilled-{seed}", deepen(flow), draw, phases)
    if config.direct:                                       # without reflow: as long, and as long as both together
        draw = partial(draw_stored, load_pairs(run, "teacher", config.pairs, shape), noise, prompts)
        networks["direct"] = train_student(run, f"direct-{seed}", deepen(start), draw, phases)
        draw = partial(draw_stored, load_pairs(run, "teacher", 2 * config.pairs, shape), noise, prompts)
        phases = distill_phases(config, distance, sum(config.reflow_steps))
        networks["longer"] = train_student(run, f"longer-{seed}", deepen(start), draw, phases)
    for name, unet in networks.items():
        save_pipeline(run, f"{name}-{seed}", prompts.pipe, unet)
    return networks


def distill_phases(config, distance, more):
    """First |.|^2 of latents, for `more` steps than --distill-steps says, then LPIPS of pictures."""
    latents = partial(one_step_loss, distance=latent_distance)
    pictures = partial(one_step_loss, distance=distance)
    return [(latents, config.distill_steps[0] + more, config.distill_batch[0], config.student_lr),
            (pictures, config.distill_steps[1], config.distill_batch[1], config.lpips_lr)]


# Differs from 04_distill.py: in phases
def train_student(run, name, unet, draw, phases):
    """A student through phases (loss, steps, batch, rate), each from the averaged weights of the one before."""
    kind, seed = name.rsplit("-", 1)                        # 2-rf-0 is 2-RF of seed 0
    for k, (loss, steps, batch, lr) in enumerate(phases):
        changes = dict(steps=steps, batch=batch, lr=lr, accumulate=slices(run.config, batch))
        drawn = partial(draw, n=batch // (run.world * changes["accumulate"]))
        learned = partial(pair_loss, draw=drawn, loss=loss)
        stream = seed_for(int(seed), k, *kind.encode())
        unet = run.fit(f"{name}.{k + 1}", unet, learned, stream, **changes).cpu()      # the device is for training
    return unet


def slices(config, batch):
    """How many slices a batch is cut into: --accumulate if it is the largest, else fewer, each with enough work."""
    return math.ceil(config.accumulate * batch / max(config.vae_batch, *config.reflow_batch, *config.distill_batch))


# Differs from 02_reflow.py: text in place of labels, and the loss is one of two
def pair_loss(model, ema, step, draw, loss):
    """What a student minimises: loss(v, x0, x1, text) -> (n,) on the pairs x0, x1, text of draw()."""
    return loss(partial(as_velocity, model), *draw())


def negated(unet):
    """A copy whose output is negated: x0 or a x0 - b x1 of a teacher, for the velocity x1 - x0.  [Liu+24] does not."""
    unet = copy.deepcopy(unet)
    for p in unet.conv_out.parameters():
        p.data.neg_()
    return unet


def check_teacher(name, prompts):
    """UserError for a velocity.  InstaFlow's files say epsilon, but in pure noise x0 it sees about -x0, and not x0."""
    pipe = prompts.pipe
    x0 = pair_noise(0, torch.arange(4, device=prompts.null.device), pipe.shape)
    with torch.no_grad():
        output = pipe.unet(x0, x0.new_full((4,), 999), prompts.null.expand(4, -1, -1))
    likeness = torch.cosine_similarity(output.flatten(), x0.flatten(), dim=0)
    is_flow = not pipe.schedule or pipe.schedule.predicts == "epsilon" and likeness < -0.5
    require(not is_flow, f"--model {name} predicts velocity; a teacher has to be a diffusion model")


def check_settings(run):
    """UserError, before anything is written, for settings that contradict each other."""
    config = run.config
    halvings = len(config.vae_channels) - 1
    if not config.model:
        config.image_size = config.image_size or 8 * 2 ** halvings
    require(len(config.reflow_steps) == len(config.reflow_batch), "--reflow-steps and --reflow-batch differ in length")
    two = len(config.distill_steps) == len(config.distill_batch) == 2
    require(two, "--distill-steps and --distill-batch want 2 numbers each: latents, pictures")
    for batch in ([] if config.model else [config.vae_batch]) + [*config.reflow_batch, *config.distill_batch]:
        count = run.world * slices(config, batch)
        require(batch % count == 0, f"a batch of {batch} cannot be cut into {count} equal slices")
    require(config.pairs >= run.world, f"--pairs {config.pairs} leaves some of {run.world} processes without any")
    require(config.model or config.preset != "paper", "--preset paper needs --model, Stable Diffusion 1.x")
    require(config.prompts or not config.model, "--model needs --prompts FILE, a text file with a prompt a line")
    require(config.model or config.image_size % 2 ** halvings == 0,
            f"--image-size {config.image_size} cannot be halved {halvings} times")
    with torch.device("meta"):                              # no memory, no time: do the widths make sense?
        configs = tiny_configs(config, {"<|startoftext|>": 0, "<|endoftext|>": 1})
        [from_config(network, configs[name]) for name, network in NETWORKS.items()]


# Differs from 03_improved_training.py: caption accuracy beside the Frechet distance, of text-to-image networks
def report(run, prompts, networks):
    """Measure everything from the same noises, print the table, draw the grid.  networks: name -> U-Net, by seed."""
    config = run.config
    texts = prompts.texts
    features = RandomFeatures().to(run.device)
    results = {}
    pictures = {}
    data = None                                             # without data, the teacher's pictures are the measure
    if not config.model:
        images, _ = shapes(config.data_size, config.image_size, config.seed)
        data = feature_moments(images, features, run.device)
    for group in [{"teacher": prompts.pipe.unet}, *networks]:       # the teacher has no seeds
        for heading, sampler in samplers(run, prompts, group).items():
            made, captions, first = measure(sampler, run, features)
            data = data or made
            right = [text == texts[i % len(texts)] for i, text in enumerate(captions)]
            row = {"FD": frechet_from_moments(*made, *data), "NFE": sampler.evaluations / sampler.drawn,
                   "accuracy": sum(right) / len(right) if right else None}
            results.setdefault(heading, []).append(row)
            pictures.setdefault(heading, first)             # of the first seed
    save_json(run.folder / "results.json", {"samples": config.eval_size, "networks": results})
    print_table(results, config.eval_size)
    draw_grid(pictures, texts, run.folder / "grid.png")
    print(f"\n{time.perf_counter() - run.started:.0f} s; grid.png, results.json and the networks are in {run.folder}/")


def measure(sampler, run, features):
    """Of config.eval_size pictures: moments of features, captions read off them, and the first 96, for the grid."""
    known = shape_captions()
    readable = set(sampler.prompts.texts) <= set(known)     # other prompts cannot be read off a picture
    known.append("")                                        # label -1: no shape
    rows = []
    captions = []
    first = []
    for images in generate(sampler, run):
        rows.append(features(images).cpu())
        images = images.cpu()
        captions += [known[label] for label in read_labels(images)] if readable else []
        first += images[:96 - len(first)]
    return moments(torch.cat(rows)), captions, torch.stack(first)


def samplers(run, prompts, networks):
    """What is compared: heading -> Sampler, of the U-Nets in networks: name -> U-Net."""
    compared = {}
    for name, heading, solver, steps in (
            ("teacher", "teacher", "dpm", run.config.solver_steps), ("teacher", "teacher as velocity", "ddim", 1),
            ("teacher", "teacher as velocity", "ddim", 4), ("2-rf", "2-RF", "euler", 1), ("2-rf", "2-RF", "euler", 4),
            ("distilled", "2-RF distilled", "euler", 1), ("direct", "teacher distilled", "euler", 1),
            ("longer", "teacher distilled longer", "euler", 1)):
        if name in networks:
            guidance = run.config.guidance if name == "teacher" else 1.0        # students have it in their weights
            sampler = Sampler(prompts, networks[name], solver, steps, guidance)
            compared[f"{heading}, {steps} step{'s' if steps > 1 else ''}"] = sampler
    return compared


# Differs from 03_improved_training.py: accuracy and Frechet distance of every network
def print_table(results, size):
    """Mean over seeds of every number, and its spread.  results: heading -> a row for each seed."""
    print(f"\naccuracy: share of {size} pictures whose caption reads as asked; FD: Frechet distance of seeded random "
          "features; NFE: evaluations a picture")
    print(f"{'':<34}    NFE  accuracy       +-        FD       +-")
    for heading, rows in results.items():
        cells = ""
        for key in ("accuracy", "FD"):
            values = [row[key] for row in rows if row[key] is not None]
            cells += f"{np.mean(values):10.3f}" if values else f"{'-':>10}"
            cells += f"{np.std(values, ddof=1):9.3f}" if len(values) > 1 else f"{'-':>9}"
        print(f"{heading:<34}{rows[0]['NFE']:7.0f}{cells}")


# ---- Training: pairs, prompts, and the tiny teacher ------------------------------------------------------------------


def tiny_teacher(run):
    """A Stable Diffusion of the smallest size from nothing, on captioned shapes: VAE, then text encoder and U-Net."""
    config = run.config
    images, labels = shapes(config.data_size, config.image_size, config.seed)
    names = shape_captions()
    captions = [names[label] for label in labels]
    run.claim()
    if run.rank == 0:
        write_vocabulary(names, run.folder / "tokenizer")
    run.wait()
    tokenizer = CLIPTokenizer(run.folder / "tokenizer" / "vocab.json", run.folder / "tokenizer" / "merges.txt")
    configs = tiny_configs(config, tokenizer.vocab)
    torch.manual_seed(seed_for(config.seed, 0))             # the start weights of all three
    fresh = {name: from_config(network, configs[name]) for name, network in NETWORKS.items()}

    images = images.to(run.device)
    changes = dict(steps=config.vae_steps, batch=config.vae_batch, accumulate=slices(config, config.vae_batch))
    draw = partial(draw_rows, config.vae_batch // (run.world * changes["accumulate"]), images)
    vae = run.fit("vae", fresh["vae"], partial(vae_loss, draw=draw, kl=config.kl), 1, **changes)
    latents = torch.cat([vae.encode(to_floats(x))[0] for x in images.split(500)])
    vae.scale = configs["vae"]["scaling_factor"] = 1 / latents.std().item()
    draw = partial(draw_rows, run.share, latents * vae.scale, tokenizer(captions).to(run.device))
    forget = partial(drop_some, empty=tokenizer([""]).to(run.device), dropout=config.caption_dropout)
    captioned = Captioned(fresh["unet"], fresh["text_encoder"])
    teacher = run.fit("teacher", captioned, partial(teacher_loss, draw=draw, forget=forget), 2)
    pipe = Pipeline(tokenizer, teacher.text_encoder, teacher.unet, vae, configs)
    save_pipeline(run, "teacher", pipe)
    return pipe


class Captioned(nn.Module):
    """U-Net and text encoder that are trained together: x (B, C, h, w), s (B,), tokens (B, L) -> noise (B, C, h, w)."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x, s, tokens):
        return self.unet(x, s, self.text_encoder(tokens))


def vae_loss(model, ema, step, draw, kl):
    """The autoencoder's |x - decode(z)| + kl KL(q(z | x), N(0, I)) / (3 H W).  draw: () -> [bytes (n, 3, H, W)]."""
    x = to_floats(*draw())
    again, mean, logvar = model(x)
    divergence = (mean ** 2 + logvar.exp() - 1 - logvar) / 2
    return (again - x).abs().flatten(1).mean(1) + kl * divergence.flatten(1).sum(1) / x[0].numel()


def teacher_loss(model, ema, step, draw, forget):
    """The tiny teacher's |eps(x_s, s, T) - x0|^2 on latents and texts of draw(), some of them empty [Ho+22]: forget."""
    x1, tokens = draw()
    s = torch.randint(1000, (len(x1),), device=x1.device)
    x0 = torch.randn_like(x1)
    a, b = (per_sample(table[s], x1) for table in levels(x1.device))
    return latent_distance(model(a * x1 + b * x0, s.float(), forget(tokens)), x0)


@cache
def levels(device):
    """The a_s and b_s of the Schedule, (1000,) each, copied to the device once."""
    schedule = Schedule()
    return schedule.a.float().to(device), schedule.b.float().to(device)


def draw_rows(n, *tables):
    """n rows of tensors that go together, (N, ...) each: the same rows of all."""
    index = torch.randint(len(tables[0]), (n,), device=tables[0].device)
    return [table[index] for table in tables]


def drop_some(texts, empty, dropout):
    """A share of the texts (n, ...), chosen at random, replaced by empty (1, ...)."""
    chosen = torch.rand(len(texts), device=texts.device) < dropout
    return torch.where(per_sample(chosen, texts), empty, texts)


# Differs from 02_reflow.py: latents as float16, text in place of labels
def write_pairs(run, name, sampler, seed, count):
    """The coupling (x0, x1 = sampler(x0 | T)) of numbers 0 ... count - 1, as files of x1: the rest follows."""
    run.claim()
    shard = min(run.config.shard, count)
    compile_network(place(sampler.unet, run.device), run.config)
    for i in tqdm(range(run.rank, math.ceil(count / shard), run.world), f"pairs by {name}", disable=None):
        path = run.folder / "pairs" / name / f"{i:05d}.pt"
        if path.exists():                                   # a run that was killed loses the file in hand, no more
            continue
        x1 = []
        for number in whole_batches(i * shard, shard, run.config.sample_batch, run.device):
            x1.append(sampler(pair_noise(seed, number, sampler.prompts.pipe.shape), sampler.prompts(number)))
        x1 = torch.cat(x1)[:min(shard, count - i * shard)]
        require(x1.isfinite().all(), f"the samples of {name} are not finite; lower the learning rates, add --fresh")
        save_checkpoint(path, config={"pairs": name}, x1=x1.half().cpu())
        if STOP:
            raise KeyboardInterrupt
    sampler.unet.cpu()                                      # leaves the device to training
    run.wait()


# Differs from 02_reflow.py: latents, of which each process keeps a share
def load_pairs(run, name, count, shape):
    """Every world-th of the first `count` pairs: their numbers (N,), and x1 (N, *shape) as float16."""
    number = torch.arange(run.rank, count, run.world)
    device = home(run.device, 2 * len(number) * math.prod(shape))      # the paper's: 52 GB, on eight cards 6.6 GB each
    pairs = torch.empty(len(number), *shape, dtype=torch.float16, device=device)
    for first in range(0, count, run.config.shard):
        path = run.folder / "pairs" / name / f"{first // run.config.shard:05d}.pt"
        x1 = load_checkpoint(path).get("x1", torch.empty(0))
        wanted = min(run.config.shard, count - first)
        if x1.dtype != torch.float16 or x1.shape[1:] != shape or not wanted <= len(x1) <= run.config.shard:
            raise UserError(f"{path} holds other pairs; delete it and run again")
        mine = (number >= first) & (number < first + wanted)
        pairs[mine.to(device)] = x1[number[mine] - first].to(device)
    return number.to(device), pairs


def home(device, size):
    """Where so many bytes are kept: on the device, where drawing costs no copy, unless they fill a quarter of it."""
    large = device.type == "cuda" and size > torch.cuda.get_device_properties(device).total_memory / 4
    return torch.device("cpu") if large else device


# Differs from 02_reflow.py: latents as float16, text in place of labels
def draw_stored(pairs, seed, prompts, n, dropout=0.0):
    """A stored coupling: one number picks x0, x1 (n, C, h, w) and the text (n, L, C), a share of which is empty."""
    number, x1 = draw_rows(n, *pairs)
    device = prompts.null.device
    if x1.device != device:                                 # pinned memory: nobody waits for the copy
        number, x1 = (rows.pin_memory().to(device, non_blocking=True) for rows in (number, x1))
    x0 = pair_noise(seed, number, x1.shape[1:])
    return x0, x1.float(), drop_some(prompts(number), prompts.null, dropout)


class Prompts:
    """Texts by number as the U-Net reads them: prompts(index (B,)) -> states of the frozen text encoder (B, L, C).

    Few texts are encoded once and kept, many whenever asked for.  null: the states (1, L, C) of the text `empty`.
    """

    def __init__(self, pipe, texts, empty="", few=256):
        self.pipe = pipe
        self.texts = texts
        self.tokens = pipe.tokenizer(texts).int().to(next(pipe.text_encoder.parameters()).device)
        if pipe.tokenizer.truncated and int(os.environ.get("RANK", 0)) == 0:
            print(f"{pipe.tokenizer.truncated} of {len(texts)} prompts are longer than {self.tokens.shape[1]} tokens; "
                  "their ends are cut off", file=sys.stderr)
        with torch.no_grad():
            self.null = pipe.text_encoder(pipe.tokenizer([empty]).to(self.tokens))
            self.kept = pipe.text_encoder(self.tokens) if len(texts) <= few else None

    @torch.no_grad()
    def __call__(self, index):
        index = index % len(self.texts)
        return self.pipe.text_encoder(self.tokens[index]) if self.kept is None else self.kept[index]


def tiny_configs(config, vocabulary):
    """config.json of every part of the tiny model, under the names of diffusers and transformers."""
    width = config.channels[0]
    levels = len(config.vae_channels)
    # groups of a norm have at least four channels: with two the colour would get lost
    groups, vae_groups = (min(32, max(1, widths[0] // 4)) for widths in (config.channels, config.vae_channels))
    blocks = ["CrossAttn{}Block2D" if reads else "{}Block2D" for reads in config.attention]
    text = dict(vocab_size=len(vocabulary), hidden_size=width, intermediate_size=4 * width,
                num_hidden_layers=config.blocks, num_attention_heads=config.heads, architectures=["CLIPTextModel"],
                bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"])
    unet = dict(_class_name="UNet2DConditionModel", sample_size=config.image_size >> levels - 1,
                block_out_channels=config.channels, layers_per_block=config.blocks, attention_head_dim=config.heads,
                cross_attention_dim=width, norm_num_groups=groups,
                down_block_types=[block.format("Down") for block in blocks],
                up_block_types=[block.format("Up") for block in reversed(blocks)])
    vae = dict(_class_name="AutoencoderKL", block_out_channels=config.vae_channels, layers_per_block=1,
               latent_channels=4, norm_num_groups=vae_groups, sample_size=config.image_size,
               down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    noise = dict(_class_name="DPMSolverMultistepScheduler", beta_start=0.00085, beta_end=0.012,
                 beta_schedule="scaled_linear", prediction_type="epsilon")
    return json.loads(json.dumps({"text_encoder": text, "unet": unet, "vae": vae, "scheduler": noise}))


# ---- Sampling and metrics --------------------------------------------------------------------------------------------


@dataclass
class Sampler:
    """A U-Net and the way to draw with it: carries noise x0 (B, C, h, w) under texts (B, L, C) to latents x1."""
    prompts: Prompts
    unet: nn.Module
    solver: str                                             # euler: a velocity; dpm, or ddim as a velocity: diffusion
    steps: int
    guidance: float = 1.0                                   # 1 or less is none; InstaFlow's own pipeline is told 0
    drawn: int = 0                                          # pictures so far
    evaluations: int = 0                                    # of the network, for all of them together

    @torch.no_grad()
    def __call__(self, x0, text):
        self.drawn += len(x0)
        network = partial(as_velocity, self.network) if self.solver == "euler" else self.network
        flow = partial(guided(network, max(1.0, self.guidance)), text=text, null=self.prompts.null)
        if self.solver == "dpm":
            return dpm_solver(flow, x0, self.steps, self.prompts.pipe.schedule)
        velocity = velocity_from_eps(flow, self.prompts.pipe.schedule) if self.solver == "ddim" else flow
        return integrate(velocity, x0, self.steps)[-1]

    def network(self, x, timestep, text):
        """The U-Net, in bfloat16 on CUDA: a velocity in float32, or of a diffusion model the noise x0."""
        self.evaluations += len(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            output = self.unet(x, timestep, text).float()
        return output if self.solver == "euler" else self.prompts.pipe.schedule.noise(output, x, timestep)


def whole_batches(first, count, batch, device):
    """Numbers from `first` on, for `count` pictures or a few more, in batches of one size: networks compile for one."""
    batch = min(batch, count)
    numbers = first + torch.arange(math.ceil(count / batch) * batch, device=device)
    return numbers.split(batch)


@torch.no_grad()
def decode_latents(vae, x1):
    """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W) in [-1, 1].  Never in bf16: it is coarser than bytes."""
    images = vae.decode(x1 / vae.scale).float()
    require(images.isfinite().all(), "the pictures are not finite: broken weights, or wrong --steps or --guidance")
    return images.clamp(-1, 1)


def pictures(sampler, seed, text, noise, batch):
    """Pictures (B, 3, H, W), a batch at a time.  text, noise: (N,), the numbers of the prompts and of the noises."""
    for text, noise in zip(text.split(batch), noise.split(batch)):
        x0 = pair_noise(seed, noise, sampler.prompts.pipe.shape)
        yield decode_latents(sampler.prompts.pipe.vae, sampler(x0, sampler.prompts(text)))


# Differs from 02_reflow.py: latents that are decoded, text by number, a batch at a time
def generate(sampler, run):
    """config.eval_size pictures from the same noises for every sampler: (B, 3, H, W), a batch at a time."""
    seed = seed_for(run.config.seed, 999)                   # the pairs use other seeds, so these noises are new
    left = run.config.eval_size
    compile_network(place(sampler.unet, run.device), run.config)
    number = torch.cat(whole_batches(0, left, run.config.sample_batch, run.device))
    for images in pictures(sampler, seed, number, number, run.config.sample_batch):
        yield images[:left]
        left -= len(images)
    sampler.unet.cpu()


def draw_grid(columns, texts, path, each=3, rows=8):
    """Prompts by networks, the same noises along a row.  columns: heading -> pictures, the i-th of text i mod N."""
    from matplotlib.figure import Figure                    # here: training does not need it
    columns = {heading: images for heading, images in columns.items() if not re.search("velocity|longer", heading)}
    count = min(len(texts), len(next(iter(columns.values()))))
    chosen = np.linspace(0, count - 1, min(rows, count)).round().astype(int)
    figure = Figure((0.65 * each * len(columns) + 2.4, 0.66 * len(chosen) + 0.6), layout="constrained")
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for (heading, images), column in zip(columns.items(), axes.T):
        column[0].set_title(heading.replace(", ", "\n"), fontsize=9)
        for i, panel in zip(chosen, column):
            panel.imshow(tile(images[i::len(texts)][:each]), interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
    for i, panel in zip(chosen, axes[:, 0]):
        panel.set_ylabel(textwrap.fill(texts[i][:60], 20), rotation=0, ha="right", va="center", fontsize=8,
                         parse_math=False)                  # a $ is a $
    with replacing(path) as part:
        figure.savefig(part, dpi=150, bbox_inches="tight")


# ---- The commands `sample` and `evaluate` ----------------------------------------------------------------------------


def command_line():
    """The first word may name a command; without one the training chain runs."""
    commands = {"sample": sample_main, "evaluate": evaluate_main}
    if sys.argv[1:2] and sys.argv[1] in commands:
        launch(commands[sys.argv.pop(1)], DrawConfig)
    else:
        launch(main, Config)


def sample_main(config):
    """`sample`: prompts to pictures on a contact sheet, a row for each prompt."""
    run = Run(config, __file__)
    count = config.count or 4
    path = Path(config.out or "sample.png")
    require("".join(config.prompt).strip() or not config.model, '--prompt "..." is missing: what shall be drawn?')
    writable = Image.registered_extensions().get(path.suffix.lower()) in Image.SAVE
    require(writable, f"cannot write {path}: name a picture, such as {path.stem}.png")
    sampler, networks = open_sampler(run, [*config.prompt])
    number = torch.cat(whole_batches(0, len(config.prompt) * count, config.batch, run.device))
    drawn = pictures(sampler, seed_for(config.seed), number // count, number % count, config.batch)
    images = [images.cpu() for images in tqdm(drawn, "batches", disable=None, leave=False)]
    rows = torch.cat(images)[:len(config.prompt) * count].split(count)
    with replacing(path) as part:
        Image.fromarray(np.concatenate([tile(row) for row in rows])).save(part)
    print_seconds(networks, len(images))
    print(f"{len(rows) * count} pictures in {time.perf_counter() - run.started:.1f} s: {path}")


def evaluate_main(config):
    """`evaluate`: captions to pictures; FID, CLIP score, and the time they take."""
    run = Run(config, __file__)
    require(config.captions, "--captions FILE, please: COCO's captions_*.json, or a text file")
    require(not config.fid or Path(config.real or "?").is_dir(), "--fid needs --real FOLDER of real images")
    captions = read_texts(config.captions)[:config.count or 5000]
    features = inception_features(run) if config.fid else None
    judge = CLIP(config.clip).to(run.device) if config.clip else None
    sampler, networks = open_sampler(run, captions)
    batches = whole_batches(0, len(captions), config.batch, run.device)
    drawn = pictures(sampler, seed_for(config.seed), torch.cat(batches), torch.cat(batches), config.batch)
    scores, rows = [], []
    for number, images in zip(batches, tqdm(drawn, total=len(batches), disable=None)):
        if features:                                        # samples and real images of COCO are compared at 256 x 256
            small = F.interpolate(images, (256, 256), mode="bicubic", antialias=True).clamp(-1, 1)
            rows.append(features(small).cpu())
        if judge:
            texts = judge.embed_texts([captions[i % len(captions)] for i in number.tolist()])
            scores += (judge.embed_images(images) * texts).sum(1).tolist()
    seconds = print_seconds(networks, len(batches))
    result = {"captions": len(captions), "size": [*images.shape[2:]], "seconds per batch": sum(seconds.values())}
    if features:
        real = real_features(features, config.real, run.device)
        result["FID"] = frechet_from_moments(*moments(torch.cat(rows)[:len(captions)]), *moments(real))
    if judge:
        result["CLIP score"] = float(np.mean(scores[:len(captions)]))
    print("\n".join(f"{name:>18}: {value}" for name, value in result.items()))
    result |= surroundings(run.script) | {"seconds": seconds, "settings": dataclasses.asdict(config)}
    save_json(Path(config.out or "evaluation.json"), result)


def print_seconds(networks, batches):
    """Where the time goes, by networks: name -> Fast.  Returns name -> median seconds a batch, without the first."""
    medians = {}
    for name, network in networks.items():
        first, *others = np.reshape(network.seconds, (batches, -1)).sum(1).tolist()     # a row of calls for each batch
        medians[name] = round(float(np.median(others or [first])), 5)
        print(f"{name:>18}: {medians[name]:.5f} s a batch; the first, which warms up, {first:.5f} s")
    return medians


def real_features(features, folder, device):
    """Features of the central squares of all images below a folder, at 256 x 256.  A line says what was read."""
    rows = []
    skipped = []
    paths = list(files_below(Path(folder)))
    for path, image in zip(paths, tqdm(decode_files(paths, 256), "real images", len(paths), disable=None)):
        if image is None:
            skipped.append(str(path))
        else:
            rows.append(features(to_floats(image[None]).to(device)).cpu())
    require(len(rows) > 1, f"--real {folder}: {len(rows)} images are no distribution")
    print(f"--real {folder}: read {len(rows)} pictures; skipped {len(skipped)}" + ": " * bool(skipped) + some(skipped))
    return torch.cat(rows)


def open_sampler(run, texts):
    """The network of --model with what --delta and --lora add to it, ready to draw these texts."""
    config = run.config
    require(config.model, "--model FOLDER or --model OWNER/NAME, please: which network shall draw?")
    pipe = load_pipeline(config.model)
    predicts = pipe.configs["scheduler"].get("prediction_type")        # "epsilon" may be a velocity: InstaFlow's is
    if config.solver == "euler":
        require(predicts not in ("v_prediction", "sample"), f"{config.model} predicts {predicts}: use --solver dpm")
    else:
        require(pipe.schedule, f"{config.model} is a velocity: use --solver euler")
    if any(config.delta):
        require(len(config.delta) == 2, f"--delta wants two models, FROM TO, got {len(config.delta)}")
        merge_delta(pipe.unet, *(fetch_weights(source, WEIGHTS["unet"]) for source in config.delta))
        pipe = dataclasses.replace(load_pipeline(config.delta[1]), unet=pipe.unet, configs=pipe.configs)
    for item in filter(None, config.lora):
        path, scale = re.fullmatch(r"(.*?)(?::(-?\d+\.?\d*|-?\.\d+))?", item).groups()
        merge_lora({"unet": pipe.unet, "te": pipe.text_encoder}, path, float(scale or 1))
    if re.search("FlowMatch|flow_prediction", f"{pipe.configs['scheduler'].get('_class_name')} {predicts}"):
        pipe.unet = negated(pipe.unet)                      # diffusers' own flows run from the picture to the noise
    prepare(pipe, run.device, config.size * 2 if len(config.size) == 1 else config.size)
    prompts = Prompts(pipe, texts, config.negative, few=0)  # none is kept: reading them is timed, too
    dtype, options = fast_settings(config, run.device)
    networks = {"text": Fast(pipe.text_encoder, "forward", dtype, options),
                "U-Net": Fast(pipe.unet, "forward", dtype, options), "decode": Fast(pipe.vae, "decode", dtype, options)}
    return Sampler(prompts, pipe.unet, config.solver, config.steps, config.guidance), networks


def fast_settings(config, device):
    """Number format of the weights and arguments of torch.compile, None for no compiling.  All of it is for CUDA.

    float16 is what Stable Diffusion and InstaFlow are published in, and eight times finer than bfloat16.
    """
    if device.type != "cuda":
        return torch.float32, None
    torch.backends.cudnn.benchmark = config.compile         # trying every kernel pays when compiling does
    graphs = "reduce-overhead" if config.batch <= 8 else "default"     # small batches wait for the CPU, large do not
    options = dict(mode=graphs, fullgraph=True, dynamic=False)
    return torch.float16, options if config.compile else None


class Fast:
    """Takes the place of a module's method: with weights in `dtype` and compiled, seen from outside in float32.

    If float16 overflows, the module goes back to float32 for good.  seconds: of every call.
    """

    def __init__(self, module, method, dtype, options):
        self.module = module.to(dtype)
        self.dtype = dtype
        self.function = getattr(module, method)
        if options:
            self.function = torch.compile(self.function, **options)
        self.seconds = []
        setattr(module, method, self)

    def __call__(self, *inputs):
        clock = time.perf_counter()
        rounded = [x.to(self.dtype) if x.dim() > 2 else x for x in inputs]     # neither tokens (B, L) nor times (B,)
        with torch.autocast(inputs[0].device.type, enabled=False):
            output = self.function(*rounded).to(torch.float32, copy=True)      # a CUDA graph overwrites its output
        if not output.isfinite().all() and self.dtype != torch.float32:        # waits for the GPU
            self.dtype = torch.float32
            self.module.float()
            return self(*inputs)
        self.seconds.append(time.perf_counter() - clock)
        return output


def read_texts(path):
    """The texts in a file: a line each; or in COCO's captions_*.json, one of every image."""
    try:
        if Path(path).suffix == ".json":
            texts = {}
            for entry in read_json(path)["annotations"]:
                texts.setdefault(entry["image_id"], entry["caption"].strip())
        else:
            texts = dict(enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no texts: {one_line(error)}") from None
    texts = [text.strip() for text in texts.values() if text.strip()]
    require(texts, f"{path} holds no texts; give a file with a text a line")
    return texts


# ---- Text: captions and tokens ---------------------------------------------------------------------------------------


def write_vocabulary(texts, folder):
    """vocab.json and merges.txt, learnt from the texts: merge the most frequent pair until each word is one token."""
    words = [word for text in texts for word in text.lower().split()]
    counts = {spell(word): words.count(word) for word in sorted(set(words))}
    merges = []
    while any(len(word) > 1 for word in counts):
        pairs = Counter()
        for word, n in counts.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        counts = {merge_pair(word, merges[-1]): n for word, n in counts.items()}
    letters = BYTE_LETTERS.values()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    save_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    with replacing(folder / "merges.txt") as part:
        part.write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
# Byte -> the character that stands for it in a vocabulary, which thus holds neither spaces nor controls
BYTE_LETTERS = {byte: chr(byte) for byte in PRINTABLE}
BYTE_LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}


class CLIPTokenizer:
    """Prompts -> token numbers (B, length): start, text, end, pad, ...; byte-pair encoding [Sennrich+16] as CLIP's.

    vocab_json, merges_txt: two files of a public checkpoint, or one tokenizer.json, twice.  notes: files beside them,
    which may add learnt words and name the pad token.  .truncated: how many prompts were cut, as too long.
    """
    SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")  # Unicode's; \s has more
    ENDS = "<|startoftext|>", "<|endoftext|>"
    # Python's re knows no Unicode categories, so each character stands after a mark, L for a letter, N for a number, _
    # for a space, o for all else.  A word: the end of he's, they're, ...; or letters; or one number; or other things
    WORD = re.compile("o'(?:Ls|Lt|LrLe|LvLe|Lm|LlLl|Ld)|(?:L.)+|N.|(?:o.)+", re.DOTALL)

    def __init__(self, vocab_json, merges_txt, notes=(), length=77):
        self.files = [*dict.fromkeys([vocab_json, merges_txt, *notes])]
        self.truncated = 0
        self.merge = cache(self.merge)                      # few words are new
        try:
            self.vocab, merges, words, config = read_vocabulary(vocab_json, merges_txt, notes)
            self.length = min(length, config.get("model_max_length", length))
            pad = config.get("pad_token") or self.ENDS[1]
            pad = pad["content"] if isinstance(pad, dict) else pad
            self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
            for word in (*self.ENDS, pad):
                words[word] = {"id": self.vocab[word], "normalized": False} | words.get(word, {})
            self.start, self.end, self.pad = (self.vocab[word] for word in (*self.ENDS, pad))
            exact = {word: notes for word, notes in words.items() if not notes.get("normalized", True)}
            loose = {self.plain(word): notes for word, notes in words.items() if word not in exact}
            self.cut_exact, self.cut_loose = map(cutter, (exact, loose))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"no CLIP vocabulary in {vocab_json} and {merges_txt}: {one_line(error)}") from None

    def __call__(self, prompts):
        rows = [self.encode(prompt) for prompt in prompts]
        self.truncated = sum(len(row) > self.length - 2 for row in rows)
        rows = [[self.start, *row[:self.length - 2], self.end] for row in rows]
        return torch.tensor([row + [self.pad] * (self.length - len(row)) for row in rows]).reshape(-1, self.length)

    def encode(self, prompt):
        """One prompt of any length -> list of token numbers, without start and end."""
        numbers = []
        for piece, learnt in self.cut_exact(prompt):
            for text, also_learnt in self.cut_loose(self.plain(piece)):
                for word in self.words(text):
                    numbers += self.merge(word)
                numbers += also_learnt
            numbers += learnt
        return numbers

    def plain(self, text):
        """Lower case, with single spaces, and every letter in one way of writing."""
        text = self.SPACE.sub(" ", unicodedata.normalize("NFC", text))
        return "".join(c.lower() for c in text)             # character by character: no final sigma

    def words(self, text):
        """Text in lower case -> the pieces that are encoded each on its own."""
        marks = ("_" if c == " " else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "o") for c in text)
        return [word[1::2] for word in self.WORD.findall("".join(map("".join, zip(marks, text))))]

    def merge(self, word):
        """Merge the adjacent pair of lowest rank, everywhere, until none is known.  Returns token numbers."""
        parts = spell(word)
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            parts = merge_pair(parts, best)
        return [self.vocab.get(part, self.end) for part in parts]


def read_vocabulary(vocab_json, merges_txt, notes):
    """Token -> number with the learnt words; merges; learnt word -> {id, normalized, single_word}; other settings."""
    vocab = read_json(vocab_json)
    notes = {path.name: read_json(path) for path in notes}
    config = notes.get("tokenizer_config.json", {})
    words = {word: {"id": number} for word, number in notes.get("added_tokens.json", {}).items()}
    words |= {word["content"]: word | {"id": n} for n, word in config.get("added_tokens_decoder", {}).items()}
    if vocab_json == merges_txt:
        words |= {word["content"]: word for word in vocab["added_tokens"]}
        vocab, merges = (vocab["model"][part] for part in ("vocab", "merges"))
    else:                                                   # a first line "#version: 0.2" does no harm
        merges = filter(None, Path(merges_txt).read_text(encoding="utf-8").split("\n"))
    if "added_tokens_decoder" not in config:                # transformers has changed its mind on where to write this
        config = config | notes.get("special_tokens_map.json", {})
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    vocab = {word: int(number) for word, number in (vocab | {word: words[word]["id"] for word in words}).items()}
    return vocab, merges, words, config


def cutter(words):
    """A function that cuts a text at words: pairs of the text before one and [its number], last the rest and [].

    words: word -> {id, perhaps single_word}.  The longer one wins.
    """
    shapes = [rf"(?<!\w){re.escape(word)}(?!\w)" if words[word].get("single_word") else re.escape(word)
              for word in sorted(filter(None, words), key=len, reverse=True)]
    pattern = re.compile(f"({'|'.join([*shapes, '(?!)'])})")            # (?!) is nowhere: there may be no words

    def cut(text):
        *pieces, rest = pattern.split(text)
        return [*zip(pieces[::2], ([int(words[word]["id"])] for word in pieces[1::2])), (rest, [])]
    return cut


def spell(word):
    """The bytes of a word as letters; its end is part of its last letter."""
    letters = [BYTE_LETTERS[byte] for byte in word.encode("utf-8", "replace")]
    return (*letters[:-1], letters[-1] + "</w>")


def merge_pair(parts, pair):
    """The parts (strings) with every occurrence of the pair of neighbours joined, from left to right."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


# ---- Network: Stable Diffusion 1.x [Rombach+22] of any size, its parameters named as in the public files -------------

# What the public config.json calls the arguments of the networks below, and those of a Schedule
PUBLIC = dict(block_out_channels="channels", layers_per_block="layers", attention_head_dim="heads",    # sic
              cross_attention_dim="context", in_channels="in_channels", out_channels="out_channels",
              norm_num_groups="groups", down_block_types="attention", latent_channels="latent", scaling_factor="scale",
              vocab_size="vocab", hidden_size="width", num_hidden_layers="layers", num_attention_heads="heads",
              max_position_embeddings="length", intermediate_size="inner", hidden_act="act", image_size="size",
              patch_size="patch", beta_start="first", beta_end="last", beta_schedule="kind",
              num_train_timesteps="count", prediction_type="predicts")
# What changes the arithmetic and is here one way only, or not at all (None).  All other settings are notes to us
FIXED = dict(act_fn="silu", norm_eps=1e-5, layer_norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0, conv_in_kernel=3,
             conv_out_kernel=3, downsample_padding=1, mid_block_scale_factor=1, resnet_out_scale_factor=1,
             transformer_layers_per_block=1, mid_block_type="UNetMidBlock2DCrossAttn", attention_type="default",
             time_embedding_type="positional", timestep_type="discrete", resnet_time_scale_shift="default",
             use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True)
READS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}           # levels that read the text
FIXED |= dict.fromkeys("""addition_embed_type center_input_sample class_embed_type class_embeddings_concat
    cross_attention_norm dual_cross_attention encoder_hid_dim encoder_hid_dim_type latents_mean latents_std
    mid_block_only_cross_attention num_class_embeds only_cross_attention rescale_betas_zero_snr resnet_skip_time_act
    shift_factor sigma_data time_cond_proj_dim time_embedding_act_fn time_embedding_dim timestep_post_act trained_betas
    use_attention_mask use_flow_sigmas use_linear_projection""".split())


def from_config(network, config):
    """A network of the sizes in a public config.json.  UserError for settings that only other networks have."""
    parameters = inspect.signature(network).parameters
    sizes = {}
    try:
        for key, value in config.items():
            name = PUBLIC.get(key)
            default = parameters[name].default if name in parameters else FIXED.get(key)
            if isinstance(value, list) and value and not isinstance(default, tuple):
                value = value[0] if value.count(value[0]) == len(value) else value     # the same at every level
            good = key not in FIXED or value == default or not (value or default)
            if name in parameters and value is not None:
                good = isinstance(value, list if isinstance(default, tuple) else (int, type(default)))
                good = good and (name != "attention" or all(kind in READS for kind in value))
                sizes[name] = [READS[kind] for kind in value] if good and name == "attention" else value
            require(good, f"{key} is {json.dumps(value)}")
        return network(**sizes)
    except (UserError, ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise UserError(f"no {network.__name__} of these settings: {one_line(error)}") from None


def require(condition, message):
    """UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def attend(q, k, v, heads, causal=False):
    """softmax(q k' / sqrt(d)) v, d = C / heads [Vaswani+17].  q: (B, N, C);  k, v: (B, M, C).  Returns (B, N, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))          # (B, heads, N, d)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class CLIPLayer(nn.Module):
    """x += attention(norm(x)); x += MLP(norm(x)).  (B, N, width) -> the same; causal: a token sees those before it."""

    def __init__(self, width, heads, inner, act, causal):
        super().__init__()
        require(act in ("quick_gelu", "gelu") and width % heads == 0, f"{act}, {width} channels in {heads} heads")
        self.heads, self.act, self.causal = heads, act, causal
        self.layer_norm1 = nn.LayerNorm(width)
        self.layer_norm2 = nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{name}_proj"](h) for name in "qkv")
        x = x + self.self_attn["out_proj"](attend(q, k, v, self.heads, self.causal))
        h = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](h * torch.sigmoid(1.702 * h) if self.act == "quick_gelu" else F.gelu(h))


def clip_layers(count, *sizes):
    """The layers of a tower of CLIP, one after the other, nested as the public names want it."""
    return nn.ModuleDict({"layers": nn.Sequential(*(CLIPLayer(*sizes) for _ in range(count)))})


class CLIPTextEncoder(nn.Module):
    """CLIP's text transformer [Radford+21]: token numbers (B, N <= length) -> one state per token (B, N, width)."""

    def __init__(self, vocab=49408, width=768, layers=12, heads=12, length=77, inner=3072, act="quick_gelu"):
        super().__init__()
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(vocab, width),
                                         "position_embedding": nn.Embedding(length, width)}),
            "encoder": clip_layers(layers, width, heads, inner, act, True), "final_layer_norm": nn.LayerNorm(width)})

    def forward(self, tokens):
        words, places = self.text_model["embeddings"].values()
        x = words(tokens) + places.weight[:tokens.shape[1]]
        return self.text_model["final_layer_norm"](self.text_model["encoder"]["layers"](x))


# Differs from 02_reflow.py: torch's own initial weights, as whoever trained the public ones began
def conv(c_in, c_out, kernel=3):
    """A convolution that keeps the image size."""
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)


class ResBlock(nn.Module):
    """shortcut(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + time_emb_proj(SiLU(temb))))); no temb in the VAE."""

    def __init__(self, c_in, c_out, groups, eps, time=0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = conv(c_in, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = conv(c_out, c_out)
        self.time_emb_proj = nn.Linear(time, c_out) if time else None
        self.conv_shortcut = conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Attention of x (B, N, width) to context (B, M, context), or to itself.  Returns (B, N, width)."""

    def __init__(self, width, heads, context=None, bias=False):
        super().__init__()
        require(width % heads == 0, f"{width} channels in {heads} heads")
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias)
        self.to_k, self.to_v = (nn.Linear(context or width, width, bias) for _ in range(2))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class PixelAttention(Attention):
    """The VAE's: every pixel looks at all others, one head.  (B, C, H, W) -> x + attention(norm(x))."""

    def __init__(self, width, groups):
        super().__init__(width, 1, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, 1e-6)

    def forward(self, x, context=None):
        h = super().forward(self.group_norm(x).flatten(2).transpose(1, 2))   # (B, H W, C)
        return x + h.transpose(1, 2).reshape(x.shape)


class TransformerBlock(nn.Module):
    """Pixels look at each other (attn1), at the text (attn2), and think (ff).  (B, N, width), (B, M, context)."""

    def __init__(self, width, heads, context):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, heads)
        self.attn2 = Attention(width, heads, context)
        twice = nn.ModuleDict({"proj": nn.Linear(width, 2 * 4 * width)})
        self.ff = nn.ModuleDict({"net": nn.ModuleList([twice, nn.Identity(), nn.Linear(4 * width, width)])})

    def forward(self, x, text):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        value, gate = self.ff["net"][0]["proj"](self.norm3(x)).chunk(2, dim=-1)
        return x + self.ff["net"][2](value * F.gelu(gate))                   # GEGLU [Shazeer 2020]


class Transformer(nn.Module):
    """x + proj_out(block(proj_in(norm(x)), text)): x (B, width, H, W) read as H W tokens, text (B, M, context)."""

    def __init__(self, width, heads, context, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in = conv(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, context)])
        self.proj_out = conv(width, width, 1)

    def forward(self, x, text):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)            # (B, H W, width)
        h = self.transformer_blocks[0](h, text)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Resize(nn.Module):
    """With padding (left, right, top, bottom) half the size; else twice the size, or (H, W), by repeating pixels."""

    def __init__(self, width, padding=None):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(width, width, 3, stride=2) if padding else conv(width, width)

    def forward(self, x, size=None):
        if self.padding:
            return self.conv(F.pad(x, self.padding))
        return self.conv(F.interpolate(x, size=size or [2 * side for side in x.shape[2:]]))


class Stage(nn.Module):
    """One resolution: ResBlocks of channels `widths` to `width`, each with an attention if there is one; a resize."""

    def __init__(self, widths, width, resnet, attentions=(), resize=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnet(c_in, width) for c_in in widths)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([resize] if resize and resize.padding else [])
        self.upsamplers = nn.ModuleList([resize] if resize and not resize.padding else [])

    def layer(self, j, x, temb=None, text=None):
        """ResBlock j and its attention."""
        x = self.resnets[j](x, temb)
        return self.attentions[j](x, text) if j < len(self.attentions) else x

    def forward(self, x, temb=None, text=None):
        for j in range(len(self.resnets)):
            x = self.layer(j, x, temb, text)
        for resize in (*self.downsamplers, *self.upsamplers):
            x = resize(x)
        return x


def recompute(wanted, function, *inputs):
    """function(*inputs); if wanted, its inner activations are not kept but computed again for the gradient."""
    wanted = wanted and torch.is_grad_enabled()
    return checkpoint(function, *inputs, use_reentrant=False) if wanted else function(*inputs)


# Differs from 02_reflow.py: Stable Diffusion's, which reads text
class UNet(nn.Module):
    """Stable Diffusion's U-Net: x (B, in_channels, h, w), timestep (B,), text (B, M, context) -> (B, out, h, w).

    channels: width of each resolution;  layers: ResBlocks of each;  attention: which of them read the text.
    """

    def __init__(self, channels=(320, 640, 1280, 1280), layers=2, attention=(True, True, True, False), heads=8,
                 context=768, in_channels=4, out_channels=4, groups=32):
        super().__init__()
        require(len(channels) == len(attention) and channels[0] % 2 == 0, f"channels {channels}, attention {attention}")
        self.checkpointing = False
        width = channels[0]
        time = 4 * width
        last = len(channels) - 1
        resnet = partial(ResBlock, groups=groups, eps=1e-5, time=time)
        transformer = partial(Transformer, heads=heads, context=context, groups=groups)
        self.conv_in = conv(in_channels, width)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(width, time), "linear_2": nn.Linear(time, time)})
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [width]
        for i, (c, reads) in enumerate(zip(channels, attention)):
            widths = [width] + [c] * (layers - 1)
            resize = Resize(c, padding=(1, 1, 1, 1)) if i < last else None
            self.down_blocks.append(Stage(widths, c, resnet, [transformer(c) for _ in widths if reads], resize))
            skips += [c] * (layers + (i < last))
            width = c
        self.mid_block = Stage([width, width], width, resnet, [transformer(width)])
        for i, (c, reads) in reversed(list(enumerate(zip(channels, attention)))):
            widths = [h + skips.pop() for h in [width] + [c] * layers]
            resize = Resize(c) if i > 0 else None
            self.up_blocks.append(Stage(widths, c, resnet, [transformer(c) for _ in widths if reads], resize))
            width = c
        self.conv_norm_out = nn.GroupNorm(groups, width, 1e-5)
        self.conv_out = conv(width, out_channels)

    def embed(self, timestep):
        """cos and sin of the timestep at frequencies 1 ... 1/10000, through an MLP.  (B,) -> (B, 4 channels[0])."""
        first, second = self.time_embedding.values()
        half = first.in_features // 2                       # float32 even if the network is not, in the public order
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep.float()[:, None] * exponents.exp()
        return second(F.silu(first(torch.cat([angles.cos(), angles.sin()], dim=1).to(first.weight.dtype))))

    def body(self, h, timestep, text):
        """All between conv_in and the output head: features (B, channels[0], h, w) -> the same."""
        layer = partial(recompute, self.checkpointing)
        temb = self.embed(timestep)
        skips = [h]
        for stage in self.down_blocks:
            for j in range(len(stage.resnets)):
                skips.append(h := layer(stage.layer, j, h, temb, text))
            for resize in stage.downsamplers:
                skips.append(h := resize(h))
        h = layer(self.mid_block, h, temb, text)
        for stage in self.up_blocks:
            for j in range(len(stage.resnets)):
                h = layer(stage.layer, j, torch.cat([h, skips.pop()], dim=1), temb, text)
            for resize in stage.upsamplers:
                h = resize(h, skips[-1].shape[2:])          # twice the size, unless halving had to round up
        return h

    def head(self, h):
        """Features -> output (B, out_channels, h, w)."""
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def forward(self, x, timestep, text):
        return self.head(self.body(self.conv_in(x), timestep, text))


class StackedUNet(nn.Module):
    """InstaFlow-1.7B's network [Liu+24 app. B]: two copies of a U-Net without a's output head and b's conv_in."""

    def __init__(self, unet=None):
        super().__init__()
        self.a = copy.deepcopy(unet or UNet())
        self.b = copy.deepcopy(self.a)
        self.checkpointing = self.a.checkpointing
        del self.a.conv_norm_out, self.a.conv_out, self.b.conv_in

    def forward(self, x, timestep, text):
        self.a.checkpointing = self.b.checkpointing = self.checkpointing
        h = self.a.body(self.a.conv_in(x), timestep, text)
        return self.b.head(self.b.body(h, timestep, text))


class Coder(nn.Sequential):
    """The VAE's encoder or decoder, stage by stage, perhaps with inner activations that are computed again."""

    def forward(self, x, checkpointing=False):
        for part in self:
            for stage in part if isinstance(part, nn.Sequential) else [part]:
                x = recompute(checkpointing, stage, x)
        return x


class VAE(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, latent, H/8, W/8) with the four default channels.

    encode gives mean and log-variance of q(z | x), decode takes z.  Diffusion runs in scale * z, of unit variance.
    """

    def __init__(self, channels=(128, 256, 512, 512), layers=2, latent=4, groups=32, scale=0.18215):
        super().__init__()
        require(0 < scale < math.inf, f"scale {scale}")
        self.scale = scale
        self.checkpointing = False
        top = channels[-1]
        last = len(channels) - 1
        resnet = partial(ResBlock, groups=groups, eps=1e-6)
        down = []
        up = []
        for i, c in enumerate(channels):
            resize = Resize(c, padding=(0, 1, 0, 1)) if i < last else None
            down.append(Stage([channels[max(i - 1, 0)]] + [c] * (layers - 1), c, resnet, resize=resize))
        for i, c in reversed(list(enumerate(channels))):
            resize = Resize(c) if i > 0 else None
            up.append(Stage([channels[min(i + 1, last)]] + [c] * layers, c, resnet, resize=resize))
        middles = [Stage([top, top], top, resnet, [PixelAttention(top, groups)]) for _ in range(2)]
        self.encoder = Coder(OrderedDict(
            conv_in=conv(3, channels[0]), down_blocks=nn.Sequential(*down), mid_block=middles[0],
            conv_norm_out=nn.GroupNorm(groups, top, 1e-6), act=nn.SiLU(), conv_out=conv(top, 2 * latent)))
        self.decoder = Coder(OrderedDict(
            conv_in=conv(latent, top), mid_block=middles[1], up_blocks=nn.Sequential(*up),
            conv_norm_out=nn.GroupNorm(groups, channels[0], 1e-6), act=nn.SiLU(), conv_out=conv(channels[0], 3)))
        self.quant_conv = conv(2 * latent, 2 * latent, 1)
        self.post_quant_conv = conv(latent, latent, 1)

    def forward(self, x):
        mean, logvar = self.encode(x)
        return self.decode(mean + (logvar / 2).exp() * torch.randn_like(mean)), mean, logvar

    def encode(self, x):
        """Mean and log-variance of the latents, each (B, latent, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(x, self.checkpointing)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """The picture (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z), self.checkpointing)


class CLIPVision(nn.Module):
    """CLIP's image tower: pictures (B, 3, H, W) in [-1, 1] -> (B, width), the state of a class token."""

    def __init__(self, width=768, layers=12, heads=12, inner=3072, act="quick_gelu", size=224, patch=32):
        super().__init__()
        self.size = size
        self.embeddings = nn.ModuleDict({"patch_embedding": nn.Conv2d(3, width, patch, patch, bias=False),
                                         "position_embedding": nn.Embedding((size // patch) ** 2 + 1, width)})
        self.embeddings.register_parameter("class_embedding", nn.Parameter(torch.zeros(width)))
        self.pre_layrnorm = nn.LayerNorm(width)             # sic
        self.post_layernorm = nn.LayerNorm(width)
        self.encoder = clip_layers(layers, width, heads, inner, act, False)

    def forward(self, images):
        images = torchvision.transforms.functional.center_crop(images, min(images.shape[2:]))
        images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        patches, places = self.embeddings.values()
        x = patches(torchvision.transforms.functional.normalize(images, mean, std)).flatten(2).transpose(1, 2)
        x = torch.cat([self.embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)
        return self.post_layernorm(self.encoder["layers"](self.pre_layrnorm(x + places.weight))[:, 0])


class CLIP(CLIPTextEncoder):
    """CLIP [Radford+21] with both towers, a folder or owner/name: pictures and texts -> vectors of length one."""

    def __init__(self, folder):
        nn.Module.__init__(self)
        config = read_json(fetch(folder, "config.json"))    # files leave out what equals the format's defaults
        text = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8) | config.get("text_config", {})
        image = dict(hidden_size=768) | config.get("vision_config", {})
        self.text_model = from_config(CLIPTextEncoder, text).text_model
        self.vision_model = from_config(CLIPVision, image)
        self.text_projection = nn.Linear(text["hidden_size"], config.get("projection_dim", 512), bias=False)
        self.visual_projection = nn.Linear(image["hidden_size"], config.get("projection_dim", 512), bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))    # of the training; the score does without
        self.load_state_dict(read_state(self, *fetch_weights(folder, "model")))
        self.eval().requires_grad_(False)
        self.tokenizer = load_tokenizer(folder, self)

    def embed_images(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, dim)."""
        return F.normalize(self.visual_projection(self.vision_model(images)), dim=1)

    def embed_texts(self, texts):
        """B texts -> (B, dim): the state of the first end token has seen the whole text."""
        tokens = self.tokenizer(texts).to(self.logit_scale.device)
        states = self(tokens)[range(len(tokens)), (tokens == self.tokenizer.end).int().argmax(1)]
        return F.normalize(self.text_projection(states), dim=1)


# ---- Files: safetensors, pipelines in the layout of diffusers, LoRA --------------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NETWORKS = {"vae": VAE, "unet": UNet, "text_encoder": CLIPTextEncoder}
WEIGHTS = {"vae": "vae/diffusion_pytorch_model", "unet": "unet/diffusion_pytorch_model",
           "text_encoder": "text_encoder/model"}


def one_line(error):
    """An exception as part of a one-line message."""
    return " ".join(f"{error or type(error).__name__}".split())[:200]


def load_safetensors(path, notes=None):
    """Name -> tensor, mapped into memory: pages are read when they are touched.  UserError for a broken file.

    The file: n as 8 bytes (little-endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, which
    the tensors must fill without overlap or gap.  Offsets count from the end of the JSON.  notes: takes its metadata.
    """
    try:
        with open(path, "rb") as file:                      # a private copy: who writes into a tensor leaves the file
            data = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        start = 8 + int.from_bytes(data[:8].tolist(), "little")
        header = json.loads(data[8:start].numpy().tobytes())
        metadata = header.pop("__metadata__", {})
        if notes is not None:
            notes.update(metadata)
        end = start
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = (start + offset for offset in entry["data_offsets"])
            require(begin == end <= stop, f"{name} does not begin where the tensor before it ends")
            dtype = DTYPES[entry["dtype"]]
            view = data[begin:stop]
            view = view.clone() if view.storage_offset() % dtype.itemsize else view          # at an odd byte
            header[name] = view.view(dtype).reshape([*entry["shape"]])
            end = stop
        require(end == len(data), f"its tensors end at byte {end} of {len(data)}")
        return header
    except Exception as error:                              # hostile files fail in any way
        raise UserError(f"{path} is no readable safetensors file: {one_line(error)}") from None


def save_safetensors(path, tensors):
    """Name -> tensor to a file that load_safetensors and everybody else's loaders read.  Written whole."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header = {}
    end = 0
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):   # wide ones first: everything is aligned
        offsets = [end, end + tensors[name].nbytes]
        header[name] = dict(dtype=names[tensors[name].dtype], shape=[*tensors[name].shape], data_offsets=offsets)
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def load_tensors(path, notes=None):
    """Name -> tensor from .safetensors, or else from a file of torch.save, whose pickle is read but never run."""
    if path.suffix == ".safetensors":
        return load_safetensors(path, notes)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = tensors.get("state_dict", tensors)        # some trainers wrap them
        require(all(map(torch.is_tensor, tensors.values())), "it holds something else than tensors")
        return tensors
    except Exception as error:                              # torch.load has no common class for broken files
        raise UserError(f"{path} holds no readable weights: {one_line(error)}") from None


def read_state(module, *paths):
    """The tensors in these files under the module's own names and in its number format, all of them and no others.

    Known dialects: text encoders without the prefix text_model, or with position_ids; VAEs of before 2023.
    """
    want = module.state_dict()
    state = {}
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for name, tensor in chain(*(load_tensors(path).items() for path in paths)):
        name = re.sub(r"(?<=mid_block\.attentions\.0\.)(query|key|value|proj_attn)\b", lambda m: old[m[0]], name)
        if not name.endswith("position_ids"):
            state[name if name in want or "text_model." + name not in want else "text_model." + name] = tensor
    wrong = [name for name in sorted(want.keys() | state.keys()) if name not in want or name not in state
             or want[name].shape != state[name].shape or not state[name].is_floating_point()]
    require(not wrong, f"{paths[0]} does not fit {type(module).__name__}: {len(wrong)} weights are missing, unknown, "
            f"of another shape or whole numbers: {one_line(', '.join(wrong[:3]))}")
    return {name: tensor.to(want[name].dtype) for name, tensor in state.items()}


# A tensor's name in a LoRA: a prefix, the layer's path in dots or underscores, and which part this is.  Kohya writes
# _to_q.lora_up, PEFT .to_q.lora_B, diffusers has written .to_q.lora.up, .processor.to_q_lora.up, .lora_linear_layer.up
LORA_KEY = re.compile(r"(?:base_model\.model\.|unet\.|text_encoder\.|lora_unet_|lora_te1?_)*(?:text_model[._])?(.+?)"
                      r"(?:[._]lora(?:_linear_layer)?[._](up|down|A|B)(?:\.\w+)?\.weight|(?:[._]lora)?\.(alpha))")


def merge_lora(modules, path, scale=1.0):
    """Add a LoRA [Hu+21] to the weights: W += scale * alpha / rank * up down, or without an alpha scale * up down.

    modules: {"unet": UNet, "te": text encoder}.  path: a file or folder of Kohya's trainer, CivitAI, diffusers or PEFT.
    """
    layers = {name.removeprefix("text_model.").replace(".", "_"): (kind, name, layer.weight)
              for kind, module in modules.items() for name, layer in module.named_modules()
              if isinstance(layer, (nn.Linear, nn.Conv2d))}
    tensors, notes = read_lora(Path(path))
    parts = {}                                              # layer -> its up, down and alpha
    for key, tensor in tensors.items():
        found = LORA_KEY.fullmatch(key)
        require(found, f"{path} is no plain LoRA (but a LoHa, a DoRA, ...?): {one_line(key)}")
        name = found[1].replace(".processor.", ".").replace(".", "_")
        name = re.sub("self_attn_to_(q|k|v|out)$", r"self_attn_\1_proj", name)
        name = name if name in layers else f"{name}_0"      # to_out_lora means to_out.0
        side = {"A": "down", "B": "up"}.get(found[2], found[2] or "alpha")
        fits = name in layers and side not in parts.setdefault(name, {})
        require(fits, f"{path} does not fit these networks: {one_line(key)}: no such layer, or a second LoRA of it")
        parts[name][side] = tensor.float()
    for name, part in sorted(parts.items()):
        kind, dotted, weight = layers[name]
        try:
            require(part.keys() >= {"up", "down"}, "up or down is missing")
            up, down = (part[side].flatten(1) for side in ("up", "down"))    # (out, rank), (rank, in [kh kw])
            alpha = part.get("alpha", lora_alpha(notes, kind, dotted, len(down)))
            delta = scale * float(alpha) / len(down) * up @ down
            require(delta.shape == weight.flatten(1).shape, "of another shape")
            weight.data += delta.reshape(weight.shape)
        except Exception as error:                          # hostile files fail in any way
            raise UserError(f"{path} does not fit these networks: {name}: {one_line(error)}") from None


def read_lora(path):
    """The tensors of a LoRA, name -> tensor, and what PEFT or diffusers have noted about them."""
    config = (path if path.is_dir() else path.parent) / "adapter_config.json"          # PEFT's
    notes = read_json(config) if config.exists() else {}
    if path.is_dir():
        path, *_ = fetch_weights(path, "adapter_model" if notes else "pytorch_lora_weights")
    residual = re.match("pissa|olora|corda|loftq", str(notes.get("init_lora_weights")), re.IGNORECASE)
    require(not residual, f"{path} is no plain LoRA: its init_lora_weights changed the weights as well")
    metadata = {}
    tensors = load_tensors(path, metadata)
    require(tensors, f"{path} holds no LoRA")
    return tensors, notes | {"diffusers": metadata.get("lora_adapter_metadata", "{}")}


def lora_alpha(notes, kind, name, rank):
    """alpha of a layer, of which not all LoRAs keep one beside the factors; else the rank, for a scale of 1."""
    start = {"unet": "unet.", "te": "text_encoder."}[kind]
    notes = notes | json.loads(notes["diffusers"])
    notes = notes | {key.removeprefix(start): value for key, value in notes.items() if key.startswith(start)}
    alphas = [alpha for pattern, alpha in notes.get("alpha_pattern", {}).items()
              if re.fullmatch(rf"(.*\.)?({pattern})", name)]
    alpha = [*alphas, notes.get("lora_alpha", rank)][0]
    return alpha * rank ** 0.5 if notes.get("use_rslora") else alpha         # alpha / sqrt(rank) is wanted


def merge_delta(unet, base, target, scale=1.0):
    """Carry a fine-tune over: W += scale * (W_target - W_base), the files of the fine-tune and of what it began as."""
    base = read_state(unet, *base)
    target = read_state(unet, *target)
    for name, weight in unet.state_dict().items():          # its tensors are the weights themselves
        weight += scale * (target[name] - base[name])


def fetch(source, name, optional=False):
    """This file of the folder `source`, or of the repository owner/name, which is kept in runs/cache.

    Or, where no file can be written, in PyTorch's own cache.  What is optional may be None, and that is kept, too.
    """
    path = Path(source) / name
    require(not Path(source).is_file(), f"{source} is a single file; diffusers makes it a folder that is read here: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)")
    if not Path(source).is_dir():
        require(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)),
                f"{source} is neither a folder nor the owner/name of a Hugging Face repository")
        cache = "runs/cache" if os.access(".", os.W_OK) else torch.hub.get_dir()
        path = Path(cache, str(source).replace("/", "--"), name)
        none = path.with_name(f".no-{path.name}")
        if not path.exists() and not (optional and none.exists()):
            hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            if not download(f"{hub}/{source}/resolve/main/{name}", path, optional):
                save_json(none, {})
    require(optional or path.is_file(), f"{source} has no {name}")
    return path if path.is_file() else None


def fetch_weights(source, name):
    """The files that hold a network's weights, one or several shards, as diffusers or transformers wrote them.

    name: of a new model's file.  Full precision comes before half, and safetensors before .bin of torch.save.
    """
    find = partial(fetch, source, optional=True)
    older = re.sub(r"\bmodel$", "pytorch_model", name)
    for variant, (stem, kind) in product(("", ".fp16", ".bf16", ".non_ema"), ((name, ".safetensors"), (older, ".bin"))):
        if file := find(f"{stem}{variant}{kind}"):
            return [file]
        if index := find(f"{stem}{kind}.index{variant}.json"):
            shards = read_json(index).get("weight_map")
            require(isinstance(shards, dict) and shards, f"{index} names no files")
            shards = sorted({Path(str(shard)).name for shard in shards.values()})
            return [fetch(source, f"{Path(name).parent / shard}") for shard in shards]
    return [fetch(source, f"{name}.safetensors")]           # there is none: UserError


def download(url, path, optional=False):
    """A file, whole or not at all: torch.hub.download_url_to_file would keep a part.  False: there is no such file."""
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, replacing(path) as part, open(part, "wb") as file:
            size = int(reply.headers["Content-Length"] or 0)
            with tqdm.wrapattr(file, "write", total=size, desc=path.name, disable=None) as watched:
                shutil.copyfileobj(reply, watched)
            require(size in (0, file.tell()), f"broke off at {file.tell()} of {size} bytes")
    except Exception as error:                              # a network fails in any way
        if optional and getattr(error, "code", None) == 404:
            return False
        raise UserError(f"{url}: {one_line(error)}; is the name right, and the model public?") from None
    return True


def read_json(path):
    """A JSON file that holds an object; UserError if it does not."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        require(isinstance(content, dict), "it holds no object")
        return content
    except (UserError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON: {one_line(error)}") from None


@dataclass
class Pipeline:
    """The parts of a text-to-image model, and their public configs.  shape: (C, h, w) of a latent, see prepare."""
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextEncoder
    unet: UNet
    vae: VAE
    configs: dict
    shape: tuple = ()

    @cached_property
    def schedule(self):
        """The noise of a diffusion model, None for a velocity.  What its file leaves out is as in diffusers."""
        config = dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear") | self.configs["scheduler"]
        names = f"{config.get('_class_name')} {config.get('prediction_type')}"
        return None if re.search("flow|velocity", names, re.IGNORECASE) else from_config(Schedule, config)


def load_pipeline(source):
    """A Pipeline from a folder in the layout of diffusers, or from a Hugging Face repository owner/name."""
    configs = {"scheduler": read_json(fetch(source, "scheduler/scheduler_config.json"))}
    parts = {}
    for name, network in NETWORKS.items():
        configs[name] = read_json(fetch(source, f"{name}/config.json"))
        with torch.device("meta"):                          # no memory, no time: the weights are those in the file
            parts[name] = from_config(network, configs[name])
        if configs[name].get("_class_name") == "StackedUNet":
            parts[name] = StackedUNet(parts[name])
        parts[name].load_state_dict(read_state(parts[name], *fetch_weights(source, WEIGHTS[name])), assign=True)
    channels = [configs["unet"].get("in_channels", 4), configs["unet"].get("out_channels", 4)]
    require(channels == [configs["vae"].get("latent_channels", 4)] * 2, f"{source} does not draw from text alone: its "
            f"U-Net takes and gives {channels} channels, its latents have {parts['vae'].post_quant_conv.in_channels}")
    wanted = {module.to_k.in_features for name, module in parts["unet"].named_modules() if name.endswith("attn2")}
    given = parts["text_encoder"].text_model["final_layer_norm"].weight.shape[0]
    require(wanted <= {given}, f"{source}: the U-Net wants texts of width {wanted}, the text encoder gives {given}")
    return Pipeline(load_tokenizer(source, parts["text_encoder"], "tokenizer/"), **parts, configs=configs)


def load_tokenizer(source, encoder, folder=""):
    """The tokenizer in this folder of a model, from the files of any version of transformers, for its text encoder."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    whole, *notes = (fetch(source, folder + name, optional=True) for name in names)
    files = [whole, whole] if whole else [fetch(source, folder + name) for name in ("vocab.json", "merges.txt")]
    words, places = (table.num_embeddings for table in encoder.text_model["embeddings"].values())
    tokenizer = CLIPTokenizer(*files, [*filter(None, notes)], places)
    require(max(tokenizer.vocab.values()) < words, f"{source}: the tokenizer knows more words than the text encoder")
    return tokenizer


def prepare(pipe, device, sides):
    """Move the parts to the device, frozen.  sides: height and width, 0 for what it was trained at.  Returns both."""
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        place(module, device).eval().requires_grad_(False)
    factor = 2 ** (len(pipe.vae.decoder.up_blocks) - 1)
    trained = pipe.configs["unet"].get("sample_size") or 64
    sides = [side or trained * factor for side in sides]
    good = len(sides) == 2 and all(side in range(factor, 8193, factor) for side in sides)
    require(good, one_line(f"--size {' '.join(map(str, sides))} (0: the model's sample_size) wants one or two numbers "
                           f"up to 8192 that are divisible by {factor}"))
    pipe.shape = pipe.vae.post_quant_conv.in_channels, *(side // factor for side in sides)
    return sides


def save_pipeline(run, name, pipe, student=None):
    """A folder of the run in the layout of diffusers; a student takes the U-Net's place and predicts a velocity."""
    folder = run.folder / name
    if run.rank > 0 or folder.exists():
        return
    if student:
        kind = "StackedUNet" if isinstance(student, StackedUNet) else "UNet2DConditionModel"
        configs = pipe.configs | {"unet": pipe.configs["unet"] | {"_class_name": kind},
                                  "scheduler": pipe.configs["scheduler"] | {"prediction_type": "velocity"}}
        pipe = dataclasses.replace(pipe, unet=student, configs=configs)
    with replacing(folder) as part:
        for name, path in WEIGHTS.items():
            save_safetensors(part / f"{path}.safetensors", getattr(pipe, name).state_dict())
        for name, config in pipe.configs.items():
            save_json(part / name / ("scheduler_config.json" if name == "scheduler" else "config.json"), config)
        save_json(part / "tokenizer" / "tokenizer_config.json", {"model_max_length": pipe.tokenizer.length})
        for path in pipe.tokenizer.files:                   # perhaps one of its own is among them
            shutil.copy(path, part / "tokenizer")
        index = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
                 "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
                 "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
                 "safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        save_json(part / "model_index.json", {"_class_name": "StableDiffusionPipeline"} | index)


# region Copied from 01_rectified_flow.py: training loop, plumbing -----------------------------------------------------

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


# region Copied from 02_reflow.py: noise by number, shapes, Frechet distance -------------------------------------------

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


# endregion


# region Copied from 03_improved_training.py: LPIPS --------------------------------------------------------------------

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
    command_line()
