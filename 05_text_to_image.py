"""Chapter 5 - InstaFlow: does it scale to text-to-image, and down to one step?

Stable Diffusion turned into a one-step generator [Liu+24], training included.  What chapters 1 to 4 did with pictures
happens here in the latent space of an autoencoder, with a text T at every velocity:
    teacher  a diffusion model predicts the noise eps in x_s = a_s x1 + b_s x0; DPM-Solver++ [Lu+22] follows its flow,
             with guidance: v_null + s (v_text - v_null) [Ho+22]
    reflow   E |x1 - x0 - v(x_t, t | T)|^2 on pairs (x0, x1 = ODE[teacher](x0 | T)), from the teacher's weights
    distil   E D(ODE[v](x0 | T), x0 + v(x0, 0 | T)): D is first |.|^2 of latents, then LPIPS of the decoded pictures
The network's clock is the teacher's: it is fed 1000 (1 - t), so that t = 0, pure noise, is 1000.

    python 05_text_to_image.py                                 # all of it from nothing on captioned shapes, on a laptop
    python 05_text_to_image.py sample --model XCLiu/instaflow_0_9B_from_sd_1_5 --prompt "a red bicycle" --seed 0
    torchrun --nproc-per-node 8 05_text_to_image.py --preset paper --model FOLDER --prompts prompts.txt

You will see, in runs/05_text_to_image/quick/: grid.png (prompts by networks, the same noise along a row), quality.png
(caption accuracy and Frechet distance), and a table.  Each network lies there as a folder in the layout of diffusers:
`sample --model runs/05_text_to_image/quick/distilled-0 --prompt "a blue cross on a white background"` draws with it.
[Liu+24] InstaFlow, arXiv 2309.06380.  [Rombach+22] Latent Diffusion (Stable Diffusion), arXiv 2112.10752.  [Ho+22]
Classifier-Free Guidance, arXiv 2207.12598.  [Lu+22] DPM-Solver++, arXiv 2211.01095.  [Zhang+18] LPIPS, 1801.03924.
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
import itertools
import json
import math
import mmap
import os
import platform
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
import unicodedata
import urllib.error
import urllib.request
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Config
# ----------------------------------------------------------------------------------------------------------------------


# Copied from 01_rectified_flow.py
def option(default, help, choices=None, low=None, high=None, free=False):
    """One setting: default, help text, and what is allowed. `free` ones may change when a run is continued."""
    limits = {"help": help, "choices": choices, "low": low, "high": high, "free": free}
    return dataclasses.field(default=default, metadata=limits)


# Differs from 03_improved_training.py: a latent model with text, a teacher that may be Stable Diffusion, two students
@dataclass
class Config:
    """Settings of the training chain; every field is a command-line flag."""
    preset: str = option("quick", "size of the run", choices=("quick", "gpu", "paper"))
    model: str = option("", "the teacher: a Stable Diffusion 1.x folder or repository (default: train a tiny one)")
    hub: str = option("https://huggingface.co", "where repositories are fetched from", free=True)
    prompts: str = option("", "text file, a prompt a line (default: the captions of the shapes)")
    image_size: int = option(16, "side of the pictures in pixels", low=8, high=2048)
    data_size: int = option(20000, "captioned shapes that the tiny teacher learns from", low=2)
    seeds: int = option(1, "students trained from the one teacher", low=1, high=100, free=True)
    unet: str = option("plain", "stacked: the distilled network is two U-Nets in a row", choices=("plain", "stacked"))
    init: str = option("negated", "students' start: the teacher's weights, or those with conv_out negated",
                       choices=("teacher", "negated"))
    direct: bool = option(True, "also distil the teacher directly: for distillation's steps, and for reflow's on top")
    vae_steps: int = option(1000, "training steps of the tiny autoencoder", low=1)
    vae_channels: tuple = option((16, 32), "its widths; each but the first halves the picture", low=4)
    vae_lr: float = option(3e-3, "its peak learning rate", low=0.0)
    vae_batch: int = option(16, "pictures in a step of it", low=1)
    kl: float = option(3e-3, "weight of its Kullback-Leibler term (Stable Diffusion: 1e-6)", low=0.0)
    steps: int = option(1500, "training steps of the tiny teacher and its text encoder", low=1)
    lr: float = option(3e-3, "its peak learning rate", low=0.0)
    channels: tuple = option((32, 64), "widths of its U-Net; each but the first halves the latents", low=4)
    attention: tuple = option((0, 1), "which of these levels read the text, 1 or 0 each", low=0, high=1)
    blocks: int = option(1, "residual blocks of a level", low=1)
    heads: int = option(4, "its attention heads, and those of the text encoder", low=1)
    text_width: int = option(32, "width of its text encoder", low=4)
    text_layers: int = option(1, "layers of its text encoder", low=1)
    batch: int = option(32, "pictures in a step of the tiny teacher, over all processes", low=1)
    guidance: float = option(3.0, "guidance of the teacher that makes pairs", low=1.0, high=30.0)
    solver_steps: int = option(25, "its DPM-Solver++ steps, each of two evaluations with guidance", low=1, high=999)
    pairs: int = option(1536, "pairs (x0, x1) that it makes for reflow; twice as many with --direct", low=1)
    shard: int = option(256, "pairs in a file, and images sampled at a time", low=1)
    caption_dropout: float = option(0.1, "share of captions that training replaces by the empty one", low=0.0, high=1.0)
    a: float = option(0.0, "times of reflow: 0 uniform, above U-shaped as in chapter 3", low=0.0, high=50.0)
    reflow_steps: tuple = option((1200,), "training steps of 2-RF, one number a phase", low=1)
    reflow_batch: tuple = option((16,), "pairs in a step of each phase", low=1)
    distill_guidance: float = option(1.5, "guidance of 2-RF when it makes the pairs to distil", low=1.0, high=30.0)
    distill_solver_steps: int = option(8, "its Euler steps", low=1, high=1000)
    distill_steps: tuple = option((100, 50), "steps of distillation: by |.|^2 of latents, by LPIPS of pictures", low=1)
    distill_batch: tuple = option((16, 16), "pairs in a step of each", low=1)
    student_lr: float = option(1e-3, "peak learning rate of the students", low=0.0)
    lpips_lr: float = option(3e-4, "peak learning rate of the LPIPS phase", low=0.0)
    lr_decay: str = option("cosine", "learning rate after the warm-up", choices=("cosine", "constant"))
    warmup: int = option(50, "steps of linear warm-up", low=0)
    grad_clip: float = option(1.0, "largest gradient norm", low=0.0)
    ema_decay: float = option(0.998, "decay of the averaged weights", low=0.0, high=1.0)
    micro_batch: int = option(0, "pairs in memory at a time, gradients accumulate; 0: a whole batch", low=0, free=True)
    checkpointing: bool = option(False, "recompute the U-Net's activations instead of keeping them", free=True)
    lpips_net: str = option("squeeze", "LPIPS backbone", choices=("vgg", "alex", "squeeze"))
    lpips_size: int = option(32, "pictures are resized to this side for LPIPS", low=32, high=1024)
    lpips_weights: str = option("random", "pretrained (torchvision's, downloaded), random (dry run), or a file")
    eval_size: int = option(512, "samples of every measurement", low=2)
    fid: bool = option(False, "true FID: Inception features in place of the small random ones")
    inception: str = option("", "path of inception-2015-12-05.pt (default: in --data-dir)", free=True)
    data_dir: str = option("data", "where the Inception network is kept", free=True)
    download: bool = option(False, "fetch the Inception network if missing", free=True)
    seed: int = option(0, "seed of every random draw", low=0, high=2 ** 32 - 1)
    log_every: int = option(100, "steps between log lines", low=1, free=True)
    checkpoint_every: int = option(200, "steps between checkpoints", low=1, free=True)
    device: str = option("auto", "cuda > mps > cpu", choices=("auto", "cuda", "mps", "cpu"), free=True)
    compile: bool = option(True, "torch.compile the network (CUDA only)", free=True)
    out: str = option("", "run folder (default runs/<script>/<preset>)", free=True)
    fresh: bool = option(False, "start over: delete what the run folder holds", free=True)
    presets: ClassVar = {
        "quick": {},
        "gpu": dict(                                       # one GPU: the tiny chain at 64 x 64 with wider networks
            image_size=64, vae_channels=(64, 128, 128, 128), vae_steps=4000, vae_batch=128, vae_lr=1e-3,
            channels=(128, 256, 256), attention=(1, 1, 0), blocks=2, heads=8, text_width=128, text_layers=2, batch=256,
            steps=10000, lr=1e-3, pairs=20000, shard=500, reflow_steps=(5000,), reflow_batch=(256,),
            distill_solver_steps=25, distill_steps=(3000, 500), distill_batch=(256, 128), student_lr=4e-4,
            lpips_lr=1e-4, warmup=500, ema_decay=0.999, lpips_net="vgg", lpips_size=64, lpips_weights="pretrained",
            eval_size=5000, checkpoint_every=1000),
        "paper": dict(                                     # [Liu+24]'s final model, 199 A100 days; the rate is reflow's
            image_size=512, init="teacher", direct=False, guidance=5.0, pairs=1600000, shard=1000, batch=64,
            reflow_steps=(70000, 25000), reflow_batch=(64, 1024), distill_solver_steps=25,
            distill_steps=(21500, 18000), distill_batch=(1024, 1024), student_lr=1e-6, lpips_lr=1e-6,
            lr_decay="constant", warmup=1000, ema_decay=0.9999, micro_batch=8, lpips_net="vgg", lpips_size=512,
            lpips_weights="pretrained", eval_size=5000, checkpoint_every=1000),
    }


@dataclass
class ModelConfig:
    """What `sample` and `evaluate` have in common; a preset is what its kind of network wants."""
    preset: str = option("instaflow", "kind of network: one-step, 2-RF, or a diffusion model",
                         choices=("instaflow", "2-rf", "teacher"))
    model: str = option("", "folder in the layout of diffusers, or a repository owner/name of Hugging Face")
    hub: str = option("https://huggingface.co", "where repositories are fetched from")
    negative: str = option("", "what not to draw: takes the empty text's place under guidance")
    solver: str = option("euler", "euler for a velocity, dpm for a diffusion model", choices=("euler", "dpm"))
    steps: int = option(1, "evaluations of the network (twice as many with guidance)", low=1, high=999)
    guidance: float = option(1.0, "guidance; 1 or less is none", low=0.0, high=30.0)
    size: tuple = option((0,), "side in pixels, or height and width; 0 is the size the model was trained at", low=0,
                         high=4096)
    batch: int = option(4, "pictures made at a time", low=1)
    lora: tuple = option(("",), "LoRA files to merge, FILE or FILE:SCALE")
    delta: tuple = option(("",), "FROM TO: two models whose difference of weights is added to the U-Net")
    seed: int = option(0, "seed of the noise", low=0, high=2 ** 32 - 1)
    device: str = option("auto", "cuda > mps > cpu", choices=("auto", "cuda", "mps", "cpu"))
    compile: bool = option(False, "torch.compile the U-Net (CUDA only)")
    presets: ClassVar = {"instaflow": {}, "2-rf": dict(steps=25, guidance=1.5),
                         "teacher": dict(solver="dpm", steps=25, guidance=7.5)}


@dataclass
class SampleConfig(ModelConfig):
    """Settings of `sample`."""
    prompt: tuple = option(("",), "what to draw: one text or several")
    count: int = option(4, "pictures of every prompt", low=1, high=10000)
    out: str = option("sample.png", "the contact sheet")
    interpolate: str = option("", "also write this GIF: a walk through the noises of the first prompt")
    frames: int = option(12, "its frames between two noises", low=1, high=1000)


@dataclass
class EvaluateConfig(ModelConfig):
    """Settings of `evaluate`."""
    captions: str = option("", "COCO's captions_*.json, or a text file with a caption a line")
    count: int = option(5000, "captions used, one of every image", low=2)
    real: str = option("", "folder of real images for --fid")
    fid: bool = option(False, "FID of the samples against --real")
    clip: str = option("", "CLIP folder for the CLIP score: config.json, model.safetensors, vocab.json, merges.txt")
    inception: str = option("", "path of inception-2015-12-05.pt (default: in --data-dir)")
    data_dir: str = option("data", "where the Inception network is kept")
    download: bool = option(False, "fetch the Inception network if missing")
    out: str = option("evaluation.json", "where the numbers go")


# ----------------------------------------------------------------------------------------------------------------------
# The method
# ----------------------------------------------------------------------------------------------------------------------


def guided(velocity, scale):
    """Classifier-free guidance [Ho+22]: v_null + s (v_text - v_null), as one call of the network on a double batch.

    velocity: (x (B, *D), t (B,), text (B, L, C)) -> (B, *D); an eps-network and its time do as well.
    Returns a function (x, t, text, null (B, L, C)); s = 1 is the text's own velocity and asks for no null.
    """
    def flow(x, t, text, null=None):
        if scale == 1:
            return velocity(x, t, text)
        both = torch.cat([null.expand_as(text), text])
        v_null, v_text = velocity(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_null + scale * (v_text - v_null)
    return flow


def as_velocity(unet):
    """InstaFlow's network: v(x, t | T) = unet(x, 1000 (1 - t), T), the teacher's weights under the teacher's clock."""
    return lambda x, t, text: unet(x, 1000 * (1 - t), text)


def reflow_loss(velocity, x0, x1, text, a=0.0):
    """E_t |x1 - x0 - v(x_t, t | T)|^2 on the teacher's pairs [Liu+24].  x0, x1: (B, C, h, w) -> (B,).

    Guidance is in x1 already: the student learns the guided flow with a single evaluation.  a = 0: uniform t, as there.
    """
    return flow_matching_loss(partial(velocity, text=text), x0, x1, u_shaped_times(len(x0), a, x0.device))


def one_step_loss(velocity, x0, x1, text, distance):
    """D(x1, x0 + v(x0, 0 | T)) [Liu+24]: distillation at t = 0 exactly.

    The network sees x0 and no trace of x1.  distance: (a, b) of latents (B, C, h, w) -> (B,).
    """
    return distance(x0 + velocity(x0, x0.new_zeros(len(x0)), text), x1)


def squared(a, b):
    """Mean squared difference per sample: (B, *D) twice -> (B,)."""
    return (a - b).square().flatten(1).mean(1)


class Schedule:
    """Stable Diffusion's noise: x_s = a_s x1 + b_s x0, s = 0 ... 999, a_s^2 = prod(1 - beta), b_s^2 = 1 - a_s^2.

    sqrt(beta) is linear from sqrt(0.00085) to sqrt(0.012) [Rombach+22].  Even x_999 holds 7 % of the picture.
    """

    def __init__(self, start=0.00085, end=0.012, steps=1000):
        beta = torch.linspace(start ** 0.5, end ** 0.5, steps, dtype=torch.float64) ** 2
        alpha_bar = (1 - beta).cumprod(0)
        self.a, self.b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()      # (1000,) float64


def velocity_from_eps(eps, schedule=None):
    """A diffusion model as a velocity, exactly: v = x1_hat - eps = (x_t - eps(x_s, s)) / t.

    x_s / (a + b) is x_t for the s with a / (a + b) = t: the same ray, another length; Euler's steps on it are DDIM's.
    The model knows no less signal than x_999 has, t = 0.064: below, x_t counts as x_999.
    eps: (x (B, *D), s (B,), *more) -> noise (B, *D).  Returns a velocity (x (B, *D), t (B,), *more) -> (B, *D).
    """
    schedule = schedule or Schedule()
    ratio = (schedule.a / (schedule.a + schedule.b)).flip(0)           # t of s = 999 ... 0, increasing

    def velocity(x, t, *more, **named):
        t = t.cpu().double()
        least = t.clamp(ratio[0], ratio[-1])
        s = np.interp(torch.logit(least), torch.logit(ratio), np.arange(len(ratio))[::-1])
        time, least = (u.to(x).reshape(-1, *[1] * (x.dim() - 1)) for u in (t, least))
        xs = x / (time ** 2 + (1 - time) ** 2).sqrt()
        noise = eps(xs, torch.as_tensor(s).to(x), *more, **named)
        return ((least ** 2 + (1 - least) ** 2).sqrt() * xs - noise) / least
    return velocity


@torch.no_grad()
def dpm_solver(eps, x, steps, final="zero", schedule=None):
    """DPM-Solver++(2M) [Lu+22 algorithm 2] from noise x (B, *D): the teacher's flow in `steps` evaluations.

    With lambda = ln(a / b) the flow is linear in x1_hat, which is extrapolated from two steps (the first and the last
    have one).  eps: (x, s (B,)) -> noise.  final: the last step goes to no noise ("zero") or to that of s = 0
    ("sigma_min", where it takes a second-order step from 15 steps on).  Returns x1 (B, *D).
    """
    schedule = schedule or Schedule()
    s = np.linspace(0, len(schedule.a) - 1, steps + 1).round()[:0:-1].astype(int)
    last = (1.0, 0.0) if final == "zero" else (schedule.a[0].item(), schedule.b[0].item())
    a, b = ([*values[s.copy()].tolist(), end] for values, end in zip((schedule.a, schedule.b), last))
    before = width = None                                  # x1_hat and the step in lambda of the step before
    for i in range(steps):
        x1_hat = (x - b[i] * eps(x, x.new_full(x.shape[:1], s[i]))) / a[i]
        if b[i + 1] == 0:
            return x1_hat
        h = math.log(a[i + 1] / b[i + 1] * b[i] / a[i])
        first_order = before is None or i == steps - 1 and steps < 15
        guess = x1_hat if first_order else x1_hat + h / (2 * width) * (x1_hat - before)
        x, before, width = b[i + 1] / b[i] * x - a[i + 1] * math.expm1(-h) * guess, x1_hat, h
    return x


# Copied from 03_improved_training.py
def u_shaped_times(n, a=4.0, device=None, antithetic=False):
    """n times with density a cosh(a (t - 1/2)) / (2 sinh(a/2)) on [0, 1] [Lee+24 section 4]; a = 0 is uniform.

    By the inverse CDF, t = 1/2 + asinh((2y - 1) sinh(a/2)) / a with y uniform.  Antithetic draws come as pairs t and
    1 - t: odd errors about 1/2 cancel.  (The e^{au} + e^{-au} printed in the paper is not symmetric; its code is.)
    """
    y = torch.rand((n + 1) // 2 if antithetic else n, device=device)
    y = torch.cat([y, 1 - y])[:n] if antithetic else y
    return y if a < 1e-6 else 0.5 + torch.asinh((2 * y - 1) * math.sinh(a / 2)) / a


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


class Prompts:
    """Texts by number as the U-Net reads them: prompts(index (B,)) -> states of the frozen text encoder (B, L, C).

    Few texts are encoded once and kept, many whenever they are asked for.  null: the states (1, L, C) of `empty`.
    """

    def __init__(self, pipe, texts, empty="", few=256):
        self.texts, self.tokens, self.encoder = texts, pipe.tokenizer(texts).int(), pipe.text_encoder
        if pipe.tokenizer.truncated and process()[0] == 0:
            print(f"{pipe.tokenizer.truncated} of {len(texts)} prompts are longer than {self.tokens.shape[1]} tokens; "
                  "their ends are cut off", file=sys.stderr)
        self.null = self.encode(pipe.tokenizer([empty]))
        self.kept = self.encode(self.tokens) if len(texts) <= few else None

    def __len__(self):
        return len(self.texts)

    @torch.no_grad()
    def encode(self, tokens):
        """Tokens (B, L) -> states (B, L, C), in float32."""
        weight = next(self.encoder.parameters())
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.device.type == "cuda"):
            return self.encoder(tokens.to(weight.device)).float()

    def __call__(self, index, dropout=0.0):
        """Prompt i is text i modulo their number.  dropout: the share replaced by null, at random."""
        index = index % len(self)
        text = self.encode(self.tokens[index.cpu()]) if self.kept is None else self.kept[index.to(self.null.device)]
        dropped = torch.rand(len(text), 1, 1, device=text.device) < dropout
        return torch.where(dropped, self.null, text) if dropout else text


class Pairs:
    """The stored ends x1 of pairs by number: pairs[index (B,)] -> (B, C, h, w) float32, on the CPU.

    The files stay on disk, mapped into memory: 1.6 million latents of 512 x 512 pictures are 52 GB.  UserError names a
    file that is missing or broken.
    """

    def __init__(self, folder, count, size, shape):
        self.count, self.size, self.shards = count, size, []
        for i in range(math.ceil(count / size)):
            path, rows = shard_file(folder, i), min(size, count - i * size)
            try:
                shard = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:                     # np.load has another error for every way to be broken
                raise UserError(f"shard {path} is missing or broken ({error}); delete it and run again") from None
            if shard.dtype != np.float16 or shard.shape[1:] != shape or len(shard) < rows:
                raise UserError(f"shard {path} holds no {rows} latents of this run; delete it and run again")
            self.shards.append(shard)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rows = np.stack([self.shards[i // self.size][i % self.size] for i in index.tolist()])
        return torch.from_numpy(rows).float()


# Differs from 02_reflow.py: latents as float16, from any map; text in place of labels
def make_pairs(flow_map, folder, count, config, shape, device, seed):
    """The coupling (x0, x1 = flow_map(x0, index)) for indices 0 ... count - 1, in files of config.shard pairs.

    Only x1 is stored: x0 is pair_noise of the index.  A killed run loses at most the shard in hand, and each process of
    a torchrun makes every world-th shard.  flow_map: (x0 (B, *shape), index (B,)) -> x1 (B, *shape).
    """
    rank, world = process()
    todo = [i for i in range(rank, math.ceil(count / config.shard), world) if not shard_file(folder, i).exists()]
    with postponed_signals() as caught:
        for i in tqdm(todo, f"pairs by {folder.name}", disable=None):
            index = torch.arange(i * config.shard, min((i + 1) * config.shard, count), device=device)
            x1 = flow_map(pair_noise(seed, index, shape), index)
            if not x1.isfinite().all():
                raise UserError(f"the samples of {folder.name} are not finite; lower the learning rates, add --fresh")
            save_array(shard_file(folder, i), x1.half())
            if caught:
                raise KeyboardInterrupt
    wait_for_all()


# Differs from 02_reflow.py: latents from disk, text in place of labels
def draw_stored(pairs, seed, prompts, dropout=0.0):
    """A stored coupling: one index picks x0, x1 (n, C, h, w) and the text (n, L, C)."""
    def draw(n):
        index = torch.randint(len(pairs), (n,))
        x1 = pairs[index].to(prompts.null.device)
        return pair_noise(seed, index.to(x1.device), x1.shape[1:]).to(x1), x1, prompts(index, dropout)
    return draw


# Differs from 03_improved_training.py: text-conditional, uniform times
def pair_loss(draw, config):
    """The loss_fn of reflow on draw(n) -> x0, x1, text."""
    batch = config.batch // process()[1]
    return lambda model, ema, step: reflow_loss(as_velocity(model), *draw(batch), config.a)


def distill_loss(draw, config, distance):
    """The loss_fn of distillation on the same pairs, always at t = 0."""
    batch = config.batch // process()[1]
    return lambda model, ema, step: one_step_loss(as_velocity(model), *draw(batch), distance)


def picture_distance(vae, perceptual, micro_batch=0):
    """The distance of two latents (B, C, h, w) that LPIPS sees between their pictures.  Returns (a, b) -> (B,)."""
    def distance(a, b):
        return perceptual(vae.decode(a / vae.scale), vae.decode(b / vae.scale))
    return partial(in_slices, distance, micro_batch)


def in_slices(function, size, *tensors):
    """function(*tensors), `size` of the batch at a time (0: all); of each slice only the output is kept in memory.

    Gradient accumulation under a single backward: that pass computes a slice anew, differentiates it and forgets it.
    The gradients are those of the whole batch; the price is one more forward pass.
    """
    if not 0 < size < len(tensors[0]) or not torch.is_grad_enabled():
        return function(*tensors)
    parts = zip(*(x.split(size) for x in tensors))
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


class Slices(nn.Module):
    """A network that takes its batch in slices; see in_slices."""

    def __init__(self, network, size):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, *inputs):
        return in_slices(self.network, self.size, *inputs)


class Autoencoder(nn.Module):
    """The VAE in training: pictures x (B, 3, H, W) -> (B, 2): |x - decode(z)|, KL(q(z | x), N(0, I))."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x):
        mean, logvar = self.vae.encode(x)
        z = mean + (logvar / 2).exp() * torch.randn_like(mean)
        kl = (mean ** 2 + logvar.exp() - 1 - logvar) / 2
        return torch.stack([(self.vae.decode(z) - x).abs().flatten(1).mean(1), kl.flatten(1).sum(1)], 1)


def autoencoder_loss(images, config):
    """The loss_fn of the tiny autoencoder.  images: uint8 (N, 3, S, S) on the device."""
    batch = config.batch // process()[1]

    def loss_fn(model, ema, step):
        x = to_floats(images[torch.randint(len(images), (batch,), device=images.device)])
        error, kl = model(x).unbind(1)
        return error + config.kl * kl / images[0].numel()
    return loss_fn


class Captioned(nn.Module):
    """U-Net and text encoder that are trained together: x (B, C, h, w), s (B,), tokens (B, L) -> noise (B, C, h, w)."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x, s, tokens):
        return self.unet(x, s, self.text_encoder(tokens))


def teacher_loss(latents, tokens, empty, config):
    """The loss_fn of the tiny diffusion model, |eps(x_s, s, T) - x0|^2; some texts T are replaced by the empty one.

    latents: (N, C, h, w);  tokens: (N, L) of their captions;  empty: (1, L).
    """
    batch, schedule = config.batch // process()[1], Schedule()
    a, b = (values.to(latents) for values in (schedule.a, schedule.b))

    def loss_fn(model, ema, step):
        index = torch.randint(len(latents), (batch,), device=latents.device)
        s = torch.randint(len(a), (batch,), device=latents.device)
        x1, x0 = latents[index], torch.randn_like(latents[index])
        dropped = torch.rand(batch, 1, device=latents.device) < config.caption_dropout
        xs = a[s].reshape(-1, 1, 1, 1) * x1 + b[s].reshape(-1, 1, 1, 1) * x0
        return squared(model(xs, s.float(), torch.where(dropped, empty, tokens[index])), x0)
    return loss_fn


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


class Frozen:
    """A finished U-Net ready to sample: compiled, bf16 autocast on CUDA, float32 in and out, counting evaluations."""

    def __init__(self, unet, config):
        device = next(unet.parameters()).device
        if device.type == "cuda" and config.compile:
            unet.compile(dynamic=False)
        self.unet, self.evaluations = unet.eval().requires_grad_(False), 0
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    @torch.no_grad()
    def __call__(self, x, timestep, text):
        self.evaluations += len(x)
        with self.autocast:
            return self.unet(x, timestep, text).float()


def carry(network, x0, text, null, solver, steps, guidance=1.0):
    """Where a network carries the noise x0 (B, C, h, w) under the text (B, L, C): x1, after `steps` steps.

    solver: "euler" for a velocity, "dpm" for a diffusion model, "ddim" for a diffusion model read as a velocity.
    guidance: 1 or less is none, as in InstaFlow's pipeline, which is told 0.
    """
    field = guided(as_velocity(network) if solver == "euler" else network, max(1.0, guidance))
    flow = partial(field, text=text, null=null)
    if solver == "dpm":
        return dpm_solver(flow, x0, steps)
    return integrate(velocity_from_eps(flow) if solver == "ddim" else flow, x0, steps)[-1]


def flow_map(network, prompts, *how):
    """`carry` with the text that goes by the index: a function (x0 (B, C, h, w), index (B,)) -> x1."""
    return lambda x0, index: carry(network, x0, prompts(index), prompts.null, *how)


@torch.no_grad()
def decode_latents(vae, x1):
    """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W) in [-1, 1].  In float32: bf16 is coarser than bytes."""
    images = vae.decode(x1 / vae.scale).float()
    if not images.isfinite().all():
        raise UserError("the pictures are not finite: the weights are broken, or do not go with --steps and --guidance")
    return images.clamp(-1, 1)


# Differs from 02_reflow.py: latents that are decoded, text by index
def generate(go, vae, config, shape, device):
    """config.eval_size pictures from the same noises for every map: (N, 3, H, W) on the CPU."""
    seed, images = seed_for(config.seed, 999), []          # the pairs use other seeds, so these noises are new
    for index in torch.arange(config.eval_size, device=device).split(config.shard):
        images.append(decode_latents(vae, go(pair_noise(seed, index, shape), index)).cpu())
    return torch.cat(images)


class CaptionReader:
    """Reads the caption off a picture of the shapes by template matching: no network, nothing learned.

    The border tells the background; the colour is the one that explains the pixels best as mixtures of it and the
    background; the shape is the one that leaves least of the picture unexplained when drawn at the best of all places
    and many sizes.  If that is more than `tolerance` of the shape's area, there is no caption: blurs do not count.
    """

    def __init__(self, size, radii=9, tolerance=0.15):
        self.size = min(size, 32)                          # larger pictures are read at this size: it shows all
        scale = (size - 2) * self.size / size
        half = math.ceil(0.45 * scale) + 1
        x = torch.arange(-half, half + 1).float().expand(2 * half + 1, -1)
        covers = [(0.5 - shape_distances(x + shift, x.T + shift, r)).clamp(0, 1)
                  for shift in (0.0, 0.5) for r in torch.linspace(0.28, 0.45, radii) * scale]
        self.templates, self.tolerance = torch.stack(covers, dim=1), tolerance     # (4 shapes, sizes, width, width)
        self.colours, self.grounds = (to_floats(torch.tensor(list(d.values()))) for d in (COLOURS, BACKGROUNDS))

    def __call__(self, images):
        """(B, 3, S, S) in [-1, 1] -> B captions, "" for what shows no shape."""
        images = F.interpolate(images, (self.size, self.size), mode="area")
        return [caption for chunk in images.split(128) for caption in self.read(chunk)]

    def read(self, images):
        """The same for a chunk."""
        edge = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
        ground = torch.cdist(edge.median(2).values, self.grounds).argmin(1)
        back = self.grounds[ground]                                                # (B, 3)
        front = self.colours - back[:, None]                                       # (B, 4, 3)
        pixels = (images - back[:, :, None, None]).flatten(2)                      # (B, 3, S S)
        covers = torch.einsum("bkc,bcp->bkp", front, pixels) / front.square().sum(2, keepdim=True)
        off = (pixels[:, None] - covers[:, :, None] * front[..., None]).square().sum((2, 3)) / front.square().sum(2)
        colour, rows = off.argmin(1), torch.arange(len(images))
        cover = covers[rows, colour].reshape(-1, 1, *images.shape[2:])
        flat = self.templates.flatten(0, 1)[:, None]
        areas = flat.square().sum((1, 2, 3))
        left = areas[:, None, None] - 2 * F.conv2d(cover, flat, padding=flat.shape[-1] // 2)
        left = left.amin((2, 3)) + (cover.square().sum((1, 2, 3)) + off[rows, colour])[:, None]
        best = left.argmin(1)                                                      # the best place of every template
        seen = left[rows, best] < self.tolerance * areas[best]
        words = zip(*([list(names)[j] for j in i] for names, i in (
            (COLOURS, colour), (SHAPES, best // self.templates.shape[1]), (BACKGROUNDS, ground))))
        return [f"a {c} {shape} on a {g} background" if ok else "" for (c, shape, g), ok in zip(words, seen)]


def timed(function, device, seconds):
    """function() with its wall-clock time appended to the list; a GPU is waited for on both sides."""
    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    start = now()
    result = function()
    seconds.append(now() - start)
    return result


# Copied from 03_improved_training.py
def slerp(z, w, share):
    """From z to w (*D) along the sphere, where Gaussian noise lives: a straight mix would be too quiet."""
    angle = torch.acos(((z * w).sum() / (z.norm() * w.norm())).clamp(max=1 - 1e-6))      # z may equal w
    return (torch.sin((1 - share) * angle) * z + torch.sin(share * angle) * w) / torch.sin(angle)


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


# Copied from 02_reflow.py
def feature_moments(images, features, device, size=500):
    """Mean and covariance of the features of uint8 or float images (N, C, H, W), in batches."""
    chunks = (batch.to(device) for batch in images.split(size))
    return moments(torch.cat([features(to_floats(x) if x.dtype == torch.uint8 else x).cpu() for x in chunks]))


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def read_lines(path, flag):
    """The lines of a text file that are not blank.  UserError names the first line that is no text."""
    try:
        raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    lines = []
    for number, line in enumerate(raw, 1):
        try:
            lines.append(line.decode("utf-8").strip())
        except UnicodeDecodeError:
            raise UserError(f"{flag} {path}, line {number}: not UTF-8 text") from None
        if any(ord(c) < 32 and c != "\t" for c in lines[-1]):
            raise UserError(f"{flag} {path}, line {number}: control characters; is it a text file?")
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{flag} {path}: no prompt in it; give a text file with a prompt a line")
    return lines


def read_captions(path, count):
    """The first `count` captions, one of every image: COCO's captions_*.json, or a text file."""
    if Path(path).suffix != ".json":
        return read_lines(path, "--captions")[:count]
    try:
        first = {}
        for entry in read_json(path)["annotations"]:
            first.setdefault(entry["image_id"], entry["caption"].strip())
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--captions {path}: no COCO captions ({type(error).__name__}: {error})") from None
    if not first:
        raise UserError(f"--captions {path}: no captions in it")
    return list(first.values())[:count]


def shape_captions():
    """Every caption that `shapes` can give."""
    return [f"a {c} {shape} on a {ground} background" for c in COLOURS for shape in SHAPES for ground in BACKGROUNDS]


def merge_pair(parts, pair):
    """The parts (strings) with every occurrence of the pair of neighbours joined, from left to right."""
    joined = []
    for part in parts:
        joined[-1:] = ["".join(pair)] if joined and (joined[-1], part) == pair else [*joined[-1:], part]
    return tuple(joined)


def write_vocabulary(texts, folder):
    """vocab.json and merges.txt in CLIP's format, learnt from the texts: every word of theirs is one token.

    Byte-pair encoding [Sennrich+16]: merge the most frequent pair of neighbours until no word has any.  The vocabulary
    is bytes, bytes that end a word, merges, start, end; what the texts do not hold is spelt in bytes.
    """
    letters = byte_letters()
    words = [word for text in texts for word in text.lower().split()]
    counts = {tuple([letters[b] for b in w.encode()[:-1]] + [letters[w.encode()[-1]] + "</w>"]): words.count(w)
              for w in sorted(set(words))}
    merges = []
    while any(len(word) > 1 for word in counts):
        pairs = Counter()
        for word, n in counts.items():
            pairs.update({pair: n * list(zip(word, word[1:])).count(pair) for pair in zip(word, word[1:])})
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        counts = {merge_pair(word, merges[-1]): n for word, n in counts.items()}
    tokens = [*letters.values(), *(c + "</w>" for c in letters.values()), *("".join(pair) for pair in merges),
              "<|startoftext|>", "<|endoftext|>"]
    save_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    with replacing(folder / "merges.txt") as part:
        part.write_text("".join(f"{line}\n" for line in ["#version: 0.2", *map(" ".join, merges)]), encoding="utf-8")
    return folder / "vocab.json", folder / "merges.txt"


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


# ----------------------------------------------------------------------------------------------------------------------
# Network
# ----------------------------------------------------------------------------------------------------------------------
# Stable Diffusion 1.x [Rombach+22] at any size, under the parameter names of the public diffusers-format checkpoints:
# the names dictate how modules nest.  prompt -> CLIPTokenizer -> CLIPTextEncoder -> UNet (in latents) -> VAE -> picture


class CLIPTokenizer:
    """Prompts -> token numbers (B, length): start, text, end, end, ...; byte-pair encoding [Sennrich+16] as CLIP's.

    vocab_json, merges_txt: the two files of a public checkpoint, of any size.  tokenizer(prompts) cuts what is too long
    and leaves in .truncated how many prompts it cut.  UserError for files that are missing or something else.
    """
    SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")  # Unicode's; \s has more
    # Python's re knows no Unicode categories, so words are found in a copy of the text, a letter for each character: L
    # for letters, N for numbers, o for all but spaces and apostrophes.  A word: letters, or one number, or other things
    WORD = re.compile("L+|N|['o]+")
    SPECIAL = re.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
    CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")

    def __init__(self, vocab_json, merges_txt, length=77):
        self.length, self.truncated, self.cache = length, 0, {}
        try:
            self.vocab = json.loads(Path(vocab_json).read_text(encoding="utf-8"))
            lines = Path(merges_txt).read_text(encoding="utf-8").split("\n")
            merges = [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version"):] if line]
            self.start, self.end = self.vocab["<|startoftext|>"], self.vocab["<|endoftext|>"]
            if any(len(pair) != 2 for pair in merges) or not all(isinstance(n, int) for n in self.vocab.values()):
                raise ValueError("not a vocabulary of numbers, or merges that are not pairs")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"no CLIP vocabulary in {vocab_json} and {merges_txt}: {one_line(error)}") from None
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.letters = byte_letters()

    def __call__(self, prompts):
        rows = [self.encode(prompt) for prompt in prompts]
        self.truncated = sum(len(row) > self.length - 2 for row in rows)
        rows = [[self.start, *row[:self.length - 2], self.end] for row in rows]
        return torch.tensor([row + [self.end] * (self.length - len(row)) for row in rows]).reshape(-1, self.length)

    def encode(self, prompt):
        """One prompt of any length -> list of token numbers, without start and end."""
        numbers = []
        for i, piece in enumerate(self.SPECIAL.split(prompt)):               # every other piece is a special token
            text = self.SPACE.sub(" ", unicodedata.normalize("NFC", piece))
            text = "".join(c.lower() for c in text)        # character by character: no final sigma
            numbers += [self.vocab[piece]] if i % 2 else [n for word in self.words(text) for n in self.bpe(word)]
        return numbers

    def words(self, text):
        """Text in lower case -> the pieces that are encoded each on its own."""
        kinds = "".join(c if c in " '" else {"L": "L", "N": "N"}.get(unicodedata.category(c)[0], "o") for c in text)
        position = 0
        while position < len(text):
            match = self.CONTRACTION.match(text, position) or self.WORD.match(kinds, position)
            position = match.end() if match else position + 1                # no match: a space
            if match:
                yield text[match.start():position]

    def bpe(self, word):
        """Merge the adjacent pair of lowest rank, everywhere, until none is known.  Returns token numbers."""
        if word not in self.cache:
            parts = [self.letters[byte] for byte in word.encode("utf-8", "replace")]
            parts[-1] += "</w>"                                              # a word's end is part of its last token
            while len(parts) > 1:
                best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
                if best not in self.ranks:
                    break
                parts = merge_pair(parts, best)
            self.cache[word] = [self.vocab.get(part, self.end) for part in parts]
        return self.cache[word]


def byte_letters():
    """Byte -> the character that stands for it in a vocabulary, which thus holds neither spaces nor controls."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def attend(q, k, v, heads, causal=False):
    """softmax(q k' / sqrt(d)) v, d = C / heads [Vaswani+17].  q: (B, N, C);  k, v: (B, M, C).  Returns (B, N, C)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))          # (B, heads, N, d)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class CLIPLayer(nn.Module):
    """x += attention(norm(x)); x += MLP(norm(x)).  (B, N, width) -> the same; causal: a token sees those before it."""

    def __init__(self, width, heads, inner, act, causal=True):
        super().__init__()
        self.heads, self.act, self.causal = heads, ACTIVATIONS[act], causal
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{name}_proj"](h) for name in "qkv")
        x = x + self.self_attn["out_proj"](attend(q, k, v, self.heads, self.causal))
        return x + self.mlp["fc2"](self.act(self.mlp["fc1"](self.layer_norm2(x))))


class CLIPTextEncoder(nn.Module):
    """CLIP's text transformer [Radford+21]: token numbers (B, N <= length) -> one state per token (B, N, width).

    Stable Diffusion reads the states of all tokens, padding included, after the final norm.
    """

    def __init__(self, vocab=49408, width=768, layers=12, heads=12, length=77, inner=3072, act="quick_gelu"):
        super().__init__()
        require(act in ACTIVATIONS and width % heads == 0, f"activation {act}, {width} channels in {heads} heads")
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(vocab, width),
                                         "position_embedding": nn.Embedding(length, width)}),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(
                CLIPLayer(width, heads, inner, act) for _ in range(layers))}),
            "final_layer_norm": nn.LayerNorm(width)})

    @classmethod
    def from_config(cls, config):
        """From the dictionary in text_encoder/config.json; it holds much else, which is ignored."""
        names = dict(vocab="vocab_size", width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads",
                     length="max_position_embeddings", inner="intermediate_size", act="hidden_act")
        fixed = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0}
        return build(cls, {k: v for k, v in config.items() if k in {*names.values(), *fixed}}, names, fixed)

    def forward(self, tokens):
        embeddings = self.text_model["embeddings"]
        x = embeddings["token_embedding"](tokens) + embeddings["position_embedding"].weight[:tokens.shape[1]]
        for layer in self.text_model["encoder"]["layers"]:
            x = layer(x)
        return self.text_model["final_layer_norm"](x)


# Differs from 02_reflow.py: torch's own initial weights, as whoever trained the public ones began
def conv(c_in, c_out, kernel=3):
    """A convolution that keeps the image size."""
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)


class ResBlock(nn.Module):
    """shortcut(x) + conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + time_emb_proj(SiLU(temb))))).

    x: (B, c_in, H, W);  temb: (B, time), or None in the VAE.  Returns (B, c_out, H, W).
    """

    def __init__(self, c_in, c_out, groups, eps, time=0):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps), conv(c_in, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps), conv(c_out, c_out)
        if time:
            self.time_emb_proj = nn.Linear(time, c_out)
        if c_in != c_out:
            self.conv_shortcut = conv(c_in, c_out, 1)

    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


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
        h = self.group_norm(x).flatten(2).transpose(1, 2)                    # (B, H W, C)
        return x + super().forward(h).transpose(1, 2).reshape(x.shape)


class GEGLU(nn.Module):
    """value * gelu(gate), both linear in x [Shazeer 2020].  (B, N, width) -> (B, N, inner)."""

    def __init__(self, width, inner):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Pixels look at each other (attn1), at the text (attn2), and think (ff).  (B, N, width), (B, M, context)."""

    def __init__(self, width, heads, context):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads, context)
        net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x, text):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff["net"](self.norm3(x))


class Transformer(nn.Module):
    """x + proj_out(block(proj_in(norm(x)), text)): x (B, width, H, W) read as H W tokens, text (B, M, context)."""

    def __init__(self, width, heads, context, groups):
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(groups, width, 1e-6), conv(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, context)])
        self.proj_out = conv(width, width, 1)

    def forward(self, x, text):
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)            # (B, H W, width)
        h = self.transformer_blocks[0](h, text)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the size by a strided convolution.  padding: (left, right, top, bottom); the VAE pads on two sides only."""

    def __init__(self, width, padding):
        super().__init__()
        self.padding, self.conv = padding, nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Twice the size, or the size (H, W), by repeating pixels, then a convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x, size=None):
        return self.conv(F.interpolate(x, size=size or [2 * side for side in x.shape[2:]]))


class Stage(nn.Module):
    """One resolution: ResBlocks, each followed by an attention as long as there are any, then perhaps a resize.

    widths: channels into each ResBlock;  width: out of each;  resnet: (c_in, c_out) -> ResBlock;
    resize: Downsample, Upsample or None.
    """

    def __init__(self, widths, width, resnet, attentions=(), resize=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnet(c_in, width) for c_in in widths)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([resize] if isinstance(resize, Downsample) else [])
        self.upsamplers = nn.ModuleList([resize] if isinstance(resize, Upsample) else [])

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


def run(checkpointing, function, *inputs):
    """function(*inputs); with checkpointing its inner activations are not kept but computed again for the gradient."""
    recompute = checkpointing and torch.is_grad_enabled()
    return checkpoint(function, *inputs, use_reentrant=False) if recompute else function(*inputs)


# Differs from 02_reflow.py: Stable Diffusion's, which reads text
class UNet(nn.Module):
    """Stable Diffusion's U-Net: x (B, in_channels, h, w), timestep (B,), text (B, M, context) -> (B, out, h, w).

    channels: width of each resolution;  layers: ResBlocks of each;  attention: which of them read the text.
    checkpointing = True trades a third more time for most of the activations' memory.
    """

    def __init__(self, channels=(320, 640, 1280, 1280), layers=2, attention=(True, True, True, False), heads=8,
                 context=768, in_channels=4, out_channels=4, groups=32):
        super().__init__()
        require(len(channels) == len(attention) and channels[0] % 2 == 0, f"channels {channels}, attention {attention}")
        self.checkpointing, time, width, last = False, 4 * channels[0], channels[0], len(channels) - 1
        resnet = partial(ResBlock, groups=groups, eps=1e-5, time=time)
        transformer = partial(Transformer, heads=heads, context=context, groups=groups)
        self.conv_in = conv(in_channels, width)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(width, time), "linear_2": nn.Linear(time, time)})
        self.down_blocks, self.up_blocks, skips = nn.ModuleList(), nn.ModuleList(), [width]
        for i, (c, reads) in enumerate(zip(channels, attention)):
            widths, resize = [width] + [c] * (layers - 1), Downsample(c, (1, 1, 1, 1)) if i < last else None
            self.down_blocks.append(Stage(widths, c, resnet, [transformer(c) for _ in widths if reads], resize))
            skips, width = skips + [c] * (layers + (i < last)), c
        self.mid_block = Stage([width, width], width, resnet, [transformer(width)])
        for i, (c, reads) in reversed(list(enumerate(zip(channels, attention)))):
            widths, resize = [h + skips.pop() for h in [width] + [c] * layers], Upsample(c) if i else None
            self.up_blocks.append(Stage(widths, c, resnet, [transformer(c) for _ in widths if reads], resize))
            width = c
        self.conv_norm_out, self.conv_out = nn.GroupNorm(groups, width, 1e-5), conv(width, out_channels)

    @classmethod
    def from_config(cls, config):
        """From the dictionary in unet/config.json.  UserError for what only other U-Nets have."""
        names = dict(channels="block_out_channels", layers="layers_per_block", heads="attention_head_dim",     # sic
                     context="cross_attention_dim", in_channels="in_channels", out_channels="out_channels",
                     groups="norm_num_groups", attention="down_block_types")
        kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
        down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
        if not isinstance(down, list) or not set(map(str, down)) <= set(kinds):
            raise UserError(f"UNet has no blocks {down}")
        fixed = dict(act_fn="silu", norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1,
                     mid_block_scale_factor=1, mid_block_type="UNetMidBlock2DCrossAttn", conv_in_kernel=3,
                     conv_out_kernel=3, time_embedding_type="positional", transformer_layers_per_block=1,
                     resnet_time_scale_shift="default", resnet_out_scale_factor=1, attention_type="default",
                     up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)])
        config = {k: v for k, v in config.items() if k not in ("sample_size", "addition_embed_type_num_heads")}
        return build(cls, config | {"down_block_types": [kinds[kind] for kind in down]}, names, fixed)

    def embed(self, timestep):
        """cos and sin of the timestep at frequencies 1 ... 1/10000, through an MLP.  (B,) -> (B, 4 channels[0])."""
        first, second = self.time_embedding["linear_1"], self.time_embedding["linear_2"]
        half = first.in_features // 2                      # float32 even if the network is not, in the public order
        exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep.float()[:, None] * exponents.exp()
        return second(F.silu(first(torch.cat([angles.cos(), angles.sin()], dim=1).to(first.weight.dtype))))

    def body(self, h, timestep, text):
        """All between conv_in and the output head: features (B, channels[0], h, w) -> the same."""
        temb, skips, layer = self.embed(timestep), [h], partial(run, self.checkpointing)
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
                h = resize(h, skips[-1].shape[2:])         # twice the size, unless halving had to round up
        return h

    def head(self, h):
        """Features -> output (B, out_channels, h, w)."""
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def forward(self, x, timestep, text):
        return self.head(self.body(self.conv_in(x), timestep, text))


class StackedUNet(nn.Module):
    """InstaFlow-1.7B's network [Liu+23 app. B]: the features of U-Net a enter b in place of b's conv_in's output.

    Inputs and output as UNet's.  a's output head and b's conv_in, the "In + Out block", are gone; nothing is shared.
    It takes over the U-Nets it is given; without the second, b starts as a copy of a.  checkpointing: as UNet's.
    """

    def __init__(self, unet_a=None, unet_b=None):
        super().__init__()
        self.checkpointing, self.a = False, unet_a or UNet()
        self.b = unet_b or copy.deepcopy(self.a)
        width_a, width_b = self.a.conv_in.out_channels, self.b.conv_in.out_channels
        require(self.a is not self.b and width_a == width_b, f"one U-Net twice, or {width_a} and {width_b} channels")
        del self.a.conv_norm_out, self.a.conv_out, self.b.conv_in

    @classmethod
    def from_config(cls, config):
        """Two U-Nets of this unet/config.json."""
        return cls(UNet.from_config(config))

    def forward(self, x, timestep, text):
        self.a.checkpointing = self.b.checkpointing = self.checkpointing
        h = self.a.body(self.a.conv_in(x), timestep, text)
        return self.b.head(self.b.body(h, timestep, text))


class Coder(nn.Module):
    """Half of the VAE: convolution, stages down, the middle, stages up (one of the two lists is empty), convolution."""

    def __init__(self, c_in, c_out, first, last, groups, down=(), middle=None, up=()):
        super().__init__()
        self.conv_in, self.down_blocks, self.mid_block = conv(c_in, first), nn.ModuleList(down), middle
        self.up_blocks, self.conv_norm_out = nn.ModuleList(up), nn.GroupNorm(groups, last, 1e-6)
        self.conv_out = conv(last, c_out)

    def forward(self, x, checkpointing=False):
        x = self.conv_in(x)
        for stage in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = run(checkpointing, stage, x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1] <-> latents (B, latent, H/8, W/8) with the four default channels.

    encode gives mean and log-variance of q(z | x), decode takes z.  Diffusion runs in scale * z, which has unit
    variance.  checkpointing: as UNet's; it matters where a loss looks at decoded pictures.
    """

    def __init__(self, channels=(128, 256, 512, 512), layers=2, latent=4, groups=32, scale=0.18215):
        super().__init__()
        require(0 < scale < math.inf, f"scale {scale}")
        self.scale, self.checkpointing, top, first = scale, False, channels[-1], channels[0]
        resnet, last = partial(ResBlock, groups=groups, eps=1e-6), len(channels) - 1
        down = [Stage([channels[max(i - 1, 0)]] + [c] * (layers - 1), c, resnet,
                      resize=Downsample(c, (0, 1, 0, 1)) if i < last else None) for i, c in enumerate(channels)]
        up = [Stage([channels[min(i + 1, last)]] + [c] * layers, c, resnet, resize=Upsample(c) if i else None)
              for i, c in reversed(list(enumerate(channels)))]
        middles = [Stage([top, top], top, resnet, [PixelAttention(top, groups)]) for _ in range(2)]
        self.encoder = Coder(3, 2 * latent, first, top, groups, down=down, middle=middles[0])
        self.decoder = Coder(latent, 3, top, first, groups, middle=middles[1], up=up)
        self.quant_conv, self.post_quant_conv = conv(2 * latent, 2 * latent, 1), conv(latent, latent, 1)

    @classmethod
    def from_config(cls, config):
        """From the dictionary in vae/config.json.  UserError for what only other VAEs have."""
        names = dict(channels="block_out_channels", layers="layers_per_block", latent="latent_channels",
                     groups="norm_num_groups", scale="scaling_factor")
        channels = config.get("block_out_channels")
        levels = len(channels) if isinstance(channels, list) else 4
        fixed = dict(act_fn="silu", in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * levels,
                     up_block_types=["UpDecoderBlock2D"] * levels, use_quant_conv=True, use_post_quant_conv=True,
                     mid_block_add_attention=True)
        return build(cls, {k: v for k, v in config.items() if k not in ("sample_size", "force_upcast")}, names, fixed)

    def encode(self, x):
        """Mean and log-variance of the latents, each (B, latent, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(x, self.checkpointing)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        """The picture (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z), self.checkpointing)


def require(condition, message):
    """ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def build(cls, config, names, fixed):
    """cls from a public config.  names: argument -> key;  fixed: key -> its one possible value.  Others must be off."""
    for key, value in config.items():
        off = key in names.values() or key.startswith("_") or not value
        if not (value == fixed[key] if key in fixed else off):
            raise UserError(f"{cls.__name__} has no {key} = {value!r}")
    try:
        require(all(plausible(key, config.get(key)) for key in names.values()), "a number is out of any range")
        return cls(**{name: config[key] for name, key in names.items() if key in config})
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise UserError(f"no {cls.__name__} of these settings: {one_line(error)}") from None


def plausible(key, value):
    """Whether a number from somebody's file can be a setting: with 10^12 layers, building would not come to an end."""
    if not isinstance(value, (int, float)):
        return True
    return not isinstance(value, bool) and 0 < value <= (100 if "layers" in key else 2 ** 20)


class CLIP(CLIPTextEncoder):
    """CLIP [Radford+21] with its image tower: pictures and texts -> vectors of length one in a common space."""

    def __init__(self, text, image, size, patch, dim):
        super().__init__(**text)
        width, layers, heads, inner, act = (image[name] for name in ("width", "layers", "heads", "inner", "act"))
        require(width % heads == 0, f"{width} channels in {heads} heads")
        self.vision_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"patch_embedding": nn.Conv2d(3, width, patch, patch, bias=False),
                                         "position_embedding": nn.Embedding((size // patch) ** 2 + 1, width)}),
            "pre_layrnorm": nn.LayerNorm(width), "post_layernorm": nn.LayerNorm(width),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(
                CLIPLayer(width, heads, inner, act, causal=False) for _ in range(layers))})})
        self.vision_model["embeddings"].register_parameter("class_embedding", nn.Parameter(torch.zeros(width)))
        self.visual_projection = nn.Linear(width, dim, bias=False)
        self.text_projection = nn.Linear(text["width"], dim, bias=False)
        self.logit_scale, self.size = nn.Parameter(torch.zeros(())), size

    @classmethod
    def from_folder(cls, folder):
        """From config.json and model.safetensors (or pytorch_model.bin) of a public checkpoint, with its tokenizer."""
        folder = Path(folder)
        config = read_json(folder / "config.json")
        try:                                               # files leave out what equals the format's defaults
            base = dict(num_hidden_layers=12, hidden_act="quick_gelu")
            written = base | dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, vocab_size=49408,
                                  max_position_embeddings=77) | config["text_config"]
            seen = base | dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, image_size=224,
                               patch_size=32) | config["vision_config"]
            text, image = (dict(width=c["hidden_size"], layers=c["num_hidden_layers"], heads=c["num_attention_heads"],
                                inner=c["intermediate_size"], act=c["hidden_act"]) for c in (written, seen))
            text |= dict(vocab=written["vocab_size"], length=written["max_position_embeddings"])
            numbers = [*text.items(), *image.items(), *((key, seen[key]) for key in ("image_size", "patch_size"))]
            require(all(plausible(*pair) for pair in numbers), "a number is out of any range")
            model = cls(text, image, seen["image_size"], seen["patch_size"], config.get("projection_dim", 512))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise UserError(f"{folder}/config.json describes no CLIP with two towers: {one_line(error)}") from None
        weights = folder / "model.safetensors"
        load_weights(model, weights if weights.exists() else folder / "pytorch_model.bin")
        tokenizer = CLIPTokenizer(folder / "vocab.json", folder / "merges.txt", text["length"])
        return model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def embed_images(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, dim): the central square, resized, normalised as in training, class token."""
        side, device = min(images.shape[2:]), images.device
        images = torchvision.transforms.functional.center_crop(images, side)
        images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1) / 2 + 0.5
        mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=device)[:, None, None]
        std = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=device)[:, None, None]
        vision, embeddings = self.vision_model, self.vision_model["embeddings"]
        x = embeddings["patch_embedding"]((images - mean) / std).flatten(2).transpose(1, 2)
        x = torch.cat([embeddings.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = vision["pre_layrnorm"](x + embeddings["position_embedding"].weight)
        for layer in vision["encoder"]["layers"]:
            x = layer(x)
        return F.normalize(self.visual_projection(vision["post_layernorm"](x[:, 0])), dim=1)

    @torch.no_grad()
    def embed_texts(self, tokens, end):
        """(B, L) -> (B, dim): the state of the first end token has seen the whole text."""
        states = self(tokens)[torch.arange(len(tokens)), (tokens == end).int().argmax(1)]
        return F.normalize(self.text_projection(states), dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def draw_grid(columns, texts, folder, each=3, rows=8):
    """Prompts by networks: `each` pictures a cell, from the same noises along a row.

    columns: heading -> pictures (N, 3, H, W) in [-1, 1];  picture i has text i modulo their number.
    """
    last = min(len(texts), len(next(iter(columns.values())))) - 1
    chosen = [round(i * last / max(1, min(rows, last + 1) - 1)) for i in range(min(rows, last + 1))]
    figure, axes = new_figure(len(columns), len(chosen), size=1.0)
    figure.set_size_inches(1.3 * each * 0.5 * len(columns) + 2.4, 0.66 * len(chosen) + 0.6)
    for (heading, images), column in zip(columns.items(), axes.T):
        for i, panel in zip(chosen, column):
            panel.imshow(tile(images[i::len(texts)][:each]), interpolation="nearest")
            panel.set_xticks([]), panel.set_yticks([]), panel.spines[:].set_visible(False)
        column[0].set_title(heading, fontsize=9)
    for i, panel in zip(chosen, axes[:, 0]):
        label = texts[i] if len(texts[i]) <= 60 else texts[i][:57] + "..."
        panel.set_ylabel("\n".join(textwrap.wrap(label, 20)), rotation=0, ha="right", va="center", fontsize=8)
    save_figure(figure, folder / "grid.png")


# Differs from 02_reflow.py: accuracy and Frechet distance of every network
def draw_quality(results, label, folder):
    """Caption accuracy (if the prompts have one) and Frechet distance: a bar per network, a dot per seed."""
    kinds = [(key, name) for key, name in (("accuracy", "caption accuracy"), ("FD", label))
             if all(row[key] is not None for rows in results.values() for row in rows)]
    figure, axes = new_figure(len(kinds), size=4.5)
    for panel, (key, name) in zip(axes[0], kinds):
        for i, rows in enumerate(results.values()):
            values = [row[key] for row in rows]
            panel.barh(i, np.mean(values), 0.6, color=f"C{i}", alpha=0.5)
            panel.plot(values, [i] * len(values), "o", color=f"C{i}", markersize=5)
            panel.annotate(f"{np.mean(values):.3f}", (max(values), i), (6, 0), textcoords="offset points", va="center")
        panel.set_yticks(range(len(results)), list(results) if panel is axes[0, 0] else [""] * len(results))
        panel.set(xlabel="\n".join(textwrap.wrap(name, 50)), xscale="log" if key == "FD" else "linear")
        panel.invert_yaxis()
        panel.tick_params(axis="x", which="minor", labelbottom=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.set_size_inches(4.5 * len(kinds) + 1.5, 0.5 * len(results) + 1)
    save_figure(figure, folder / "quality.png")


def contact_sheet(images, columns):
    """Pictures (N, 3, H, W) in [-1, 1] in rows of `columns` -> a Pillow image, a white line between them."""
    rows = [tile(images[i:i + columns]) for i in range(0, len(images), columns)]
    rows = [np.pad(row, ((0, 0), (0, rows[0].shape[1] - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return Image.fromarray(np.concatenate(rows))


def picture_format(path):
    """Pillow's name of the format that the suffix of a file asks for; UserError if there is none."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"cannot write {path}: name a picture, such as {Path(path).stem or 'sample'}.png")
    return kind


def save_picture(image, path, **options):
    """A Pillow image, written whole; the suffix of the name is the format."""
    with replacing(path) as part:
        image.save(part, format=picture_format(path), **options)


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


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing (foreign weights first, then what is copied from chapters 1 to 3)
# ----------------------------------------------------------------------------------------------------------------------


def one_line(error):
    """An exception, or a name from somebody's file, as part of a one-line message."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def first_three(names):
    """'7 (a, b, c, ...)'"""
    names = sorted(names)
    return f"{len(names)} ({', '.join(map(one_line, names[:3]))}{', ...' * (len(names) > 3)})"


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def load_safetensors(path):
    """Name -> tensor, mapped into memory: pages are read when they are touched.  UserError for a broken file.

    The file: n as 8 bytes (little-endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
    Offsets count from the end of the JSON; the tensors must fill the data without overlap or gap.
    """
    try:
        with open(path, "rb") as file:
            # a private copy: whoever writes into a tensor changes his memory, not the file
            data = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        n = struct.unpack("<Q", bytes(data[:8].tolist()))[0]
        require(n <= len(data) - 8, f"its header of {n} bytes is longer than the file")
        header, data = json.loads(data[8:8 + n].numpy().tobytes()), data[8 + n:]
        header.pop("__metadata__", None)
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            require(entry["data_offsets"][0] == end, f"{name} does not begin where the tensor before it ends")
            header[name], end = tensor_at(data, entry), entry["data_offsets"][1]
        require(end == len(data), f"its tensors have {end} bytes, the file has {len(data)} for them")
        return header
    except (OSError, ValueError, TypeError, LookupError, AttributeError, struct.error, RuntimeError) as error:
        raise UserError(f"{path} is no readable safetensors file: {one_line(error)}") from None


def tensor_at(data, entry):
    """The view of uint8 data (N,) that a header entry describes.  ValueError and the like if it describes nonsense."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    require(dtype in DTYPES, f"unknown dtype {dtype}")
    require(0 <= begin <= end <= len(data), f"offsets {begin}, {end} lie outside the {len(data)} bytes of data")
    require(len(shape) <= 64 and all(isinstance(side, int) and 0 <= side < 2 ** 63 for side in shape), "bad shape")
    size = DTYPES[dtype].itemsize
    require(math.prod(shape) * size == end - begin, f"shape {shape} of {dtype} does not fill {end - begin} bytes")
    view = data[begin:end]
    return (view.clone() if view.storage_offset() % size else view).view(DTYPES[dtype]).reshape(shape)


def save_safetensors(path, tensors):
    """Name -> tensor to a file that load_safetensors and everybody else's loaders read.  Written whole."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):   # wide ones first: everything is aligned
        begin, end = end, end + tensors[name].numel() * tensors[name].itemsize
        header[name] = {"dtype": names[tensors[name].dtype], "shape": [*tensors[name].shape],
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as part, open(part, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in header:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_tensors(path):
    """Name -> tensor from .safetensors, or else from a file of torch.save, which is never unpickled freely."""
    if Path(path).suffix == ".safetensors":
        return load_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                             # torch.load has no common class for broken files
        raise UserError(f"{path} holds no readable weights: {one_line(error)}") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor)
                                                for name, tensor in tensors.items()):
        raise UserError(f"{path} holds something else than a dictionary of tensors")
    return tensors


def read_state(module, path):
    """The file's tensors under the module's own names, all of them and none else; UserError names what is wrong.

    Known dialects: text encoders without the prefix text_model, or with position_ids; VAEs of before 2023.
    """
    want, state = module.state_dict(), {}
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for name, tensor in read_tensors(path).items():
        name = re.sub(r"(?<=mid_block\.attentions\.0\.)(query|key|value|proj_attn)\b", lambda m: old[m[0]], name)
        if not name.endswith("position_ids"):
            state[name if name in want or "text_model." + name not in want else "text_model." + name] = tensor
    wrong = {"missing": want.keys() - state.keys(), "unknown": state.keys() - want.keys(),
             "of another shape": [name for name in want.keys() & state.keys() if want[name].shape != state[name].shape],
             "of whole numbers": [name for name, tensor in state.items() if not tensor.is_floating_point()]}
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {first_three(names)}" for kind, names in wrong.items() if names)
        raise UserError(f"{path} does not fit {type(module).__name__}: {found}")
    return state


def load_weights(module, path):
    """Load a .safetensors or .bin file into the module, in the module's number format; returns the module.

    A module on the meta device takes the file's own memory, so that its weights are read once and copied never.
    """
    own = next(module.parameters())
    state = {name: tensor.to(own.dtype) for name, tensor in read_state(module, path).items()}
    module.load_state_dict(state, assign=own.is_meta)
    return module


def merge_lora(modules, path, scale=1.0):
    """Add a LoRA [Hu+21] to the weights: W += scale * alpha / rank * up down.  Returns how many weights changed.

    modules: {"unet": UNet, "te": text encoder}, whichever the file may change.  path: the format of Kohya's trainer
    and CivitAI, lora_unet_down_blocks_0_..._to_q.lora_up.weight with .lora_down.weight and perhaps .alpha.
    """
    layers = {f"lora_{prefix}_{name.replace('.', '_')}": layer.weight for prefix, module in modules.items()
              for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    tensors, parts = read_tensors(path), ("lora_up.weight", "lora_down.weight", "alpha")
    found = {name.split(".")[0] for name in tensors}
    known = {f"{layer}.{part}" for layer in found & layers.keys() for part in parts}
    wrong = tensors.keys() - known or known - tensors.keys() - {f"{layer}.alpha" for layer in found}
    if wrong or not found:
        raise UserError(f"{path} is no LoRA in Kohya's naming (lora_unet_...); keys without a layer or without their "
                        f"other half: {first_three(wrong)}")
    pairs = {name: [tensors[f"{name}.{part}"].float() for part in parts[:2]] for name in found}
    wrong = [name for name, (up, down) in pairs.items() if not fits(layers[name], up, down)
             or tensors.get(f"{name}.alpha", up[:1, :1]).numel() != 1]
    if wrong:
        raise UserError(f"{path}: shapes that do not fit the layer: {first_three(wrong)}")
    with torch.no_grad():
        for name, (up, down) in pairs.items():
            factor = scale * float(tensors.get(f"{name}.alpha", len(down))) / len(down)
            delta = factor * up.flatten(1) @ down.flatten(1)                 # (out, rank) (rank, in [kh kw])
            layers[name] += delta.reshape(layers[name].shape).to(layers[name])
    return len(pairs)


def fits(weight, up, down):
    """Is up (out, rank) times down (rank, in, kernel) of the weight's shape?  Either may carry a 1x1 kernel."""
    shapes = [t.shape[:2] if t.shape[2:] == (1, 1) else t.shape for t in (weight, up, down)]
    return len(shapes[1]) == 2 and len(shapes[2]) >= 2 and 0 < len(down) == shapes[1][1] and (
        shapes[0] == shapes[1][:1] + shapes[2][1:])


def merge_delta(unet, base, target, scale=1.0):
    """Carry a fine-tune over: W += scale * (W_target - W_base), the files of the fine-tune and of what it began as."""
    base, target = read_state(unet, base), read_state(unet, target)
    with torch.no_grad():
        for name, weight in unet.state_dict().items():     # its tensors are the weights themselves
            weight += (scale * (target[name].float() - base[name].float())).to(weight)


def download(url, path):
    """Fetch url to path, whole or not at all; returns False if the server has no such file.  UserError otherwise.

    What has arrived is kept in *.part.  The next call asks for the rest; a server may send the whole again instead.
    """
    path, part = Path(path), Path(f"{path}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        start = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=60) as reply:
            start = start if reply.status == 206 else 0
            size = start + int(reply.headers["Content-Length"]) if reply.headers["Content-Length"] else None
            bar = tqdm(desc=path.name, total=size, initial=start, unit="B", unit_scale=True, disable=None)
            with bar, open(part, "ab" if start else "wb") as file:
                while chunk := reply.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        if size not in (None, part.stat().st_size):
            raise OSError(f"broke off at {part.stat().st_size} of {size} bytes")
        os.replace(part, path)
        return True
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:                    # the part is no beginning of this file
            part.unlink()
            return download(url, path)
        if error.code == 404:
            return False
        raise UserError(f"{url}: {error}; is the name right, and the model public?") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"{url}: {one_line(error)}; the same command continues from here") from None


def find_file(folder, repo, base, *names):
    """The first of these files that is in the folder, or else in the repository, from where it is fetched."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for name in names if repo else ():
        if download(f"{base}/{repo}/resolve/main/{name}", folder / name):
            return folder / name
    raise UserError(f"{repo or folder} has no {' or '.join(names)}")


def read_json(path):
    """A JSON file that holds an object; UserError if it does not."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        require(isinstance(content, dict), "it holds no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON: {one_line(error)}") from None


@dataclass
class Pipeline:
    """The parts of a text-to-image model, as load_pipeline reads them."""
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextEncoder
    unet: UNet
    vae: VAE
    scheduler: dict
    folder: Path


def locate(source, cache):
    """Folder, and repository or None, of a folder or an owner/name."""
    if Path(source).is_dir():
        return Path(source), None
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise UserError(f"{source} is neither a folder nor the owner/name of a Hugging Face repository")
    return Path(cache) / str(source).replace("/", "--"), str(source)


def load_pipeline(source, cache="runs/cache", base="https://huggingface.co", dtype=torch.float32):
    """A Pipeline from a folder in the diffusers layout, or from a Hugging Face repository owner/name.

    A name is fetched once, file by file, to cache/owner--name.  Weights are safetensors or, if there are none, .bin.
    UserError in one line for anything missing or broken.
    """
    folder, repo = locate(source, cache)
    find = partial(find_file, folder, repo, base.rstrip("/"))

    def part(name, cls, stem, bin_stem=None):
        config = read_json(find(f"{name}/config.json"))
        cls = StackedUNet if cls is UNet and config.get("_class_name") == "StackedUNet" else cls
        with torch.device("meta"):                         # no memory, no time: the weights come from the file
            module = cls.from_config(config).to(dtype)
        return load_weights(module, find(f"{name}/{stem}.safetensors", f"{name}/{bin_stem or stem}.bin"))
    pipe = Pipeline(CLIPTokenizer(find("tokenizer/vocab.json"), find("tokenizer/merges.txt")),
                    part("text_encoder", CLIPTextEncoder, "model", "pytorch_model"),
                    part("unet", UNet, "diffusion_pytorch_model"), part("vae", VAE, "diffusion_pytorch_model"),
                    read_json(find("scheduler/scheduler_config.json")), folder)
    check_fit(pipe, source)
    return pipe


def check_fit(pipe, source):
    """UserError if the parts of a pipeline are of different models."""
    words, places = (pipe.text_encoder.text_model["embeddings"][f"{kind}_embedding"].weight
                     for kind in ("token", "position"))
    first, last = getattr(pipe.unet, "a", pipe.unet).conv_in, getattr(pipe.unet, "b", pipe.unet).conv_out
    read = {module.to_k.in_features for name, module in pipe.unet.named_modules() if name.endswith("attn2")}
    numbers = pipe.tokenizer.vocab.values()
    for fits, what in (
            (0 <= min(numbers) and max(numbers) < len(words), "the tokenizer has numbers that the text encoder lacks"),
            (len(places) >= pipe.tokenizer.length, f"the text encoder reads only {len(places)} tokens"),
            (read <= {words.shape[1]}, f"the U-Net wants texts of width {read}, not {words.shape[1]}"),
            ({first.in_channels, last.out_channels} == {pipe.vae.post_quant_conv.in_channels},
             "the latents of U-Net and VAE differ")):
        if not fits:
            raise UserError(f"{source}: its parts do not fit each other: {what}")


def unet_file(source, cache="runs/cache", base="https://huggingface.co"):
    """The file with the U-Net's weights of a folder or repository, fetched if need be."""
    folder, repo = locate(source, cache)
    name = "unet/diffusion_pytorch_model"
    return find_file(folder, repo, base.rstrip("/"), f"{name}.safetensors", f"{name}.bin")


def save_pipeline(folder, modules, configs, tokenizer):
    """Networks in the layout of diffusers: name -> module, name -> config.json, folder with the tokenizer's two files.

    Written beside and renamed, by rank 0, so that the folder is there whole or not at all.
    """
    if process()[0] > 0:
        return
    with replacing(folder) as part:
        for name, module in modules.items():
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            save_safetensors(part / name / f"{stem}.safetensors", module.state_dict())
        for name, config in configs.items():
            save_json(part / name / ("scheduler_config.json" if name == "scheduler" else "config.json"), config)
        end = "<|endoftext|>"
        save_json(part / "tokenizer" / "tokenizer_config.json", dict(
            tokenizer_class="CLIPTokenizer", model_max_length=77, bos_token="<|startoftext|>", eos_token=end,
            unk_token=end, pad_token=end))
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(tokenizer / name, part / "tokenizer" / name)
        classes = dict(unet="UNet2DConditionModel", vae="AutoencoderKL", scheduler="DPMSolverMultistepScheduler")
        index = {name: ["diffusers", kind] for name, kind in classes.items()}
        index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        off = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        save_json(part / "model_index.json", {"_class_name": "StableDiffusionPipeline"} | index | off)


def tiny_configs(config, vocabulary):
    """config.json of every part of the tiny model, under the names of diffusers and transformers."""
    cross, plain, levels = "CrossAttn{}Block2D", "{}Block2D", len(config.vae_channels)
    groups = lambda widths: min(32, max(1, widths[0] // 4))     # of at least four channels: two would lose the colour
    kinds = [cross if reads else plain for reads in config.attention]
    text = dict(vocab_size=len(vocabulary), hidden_size=config.text_width, intermediate_size=4 * config.text_width,
                num_hidden_layers=config.text_layers, num_attention_heads=config.heads, max_position_embeddings=77,
                hidden_act="quick_gelu", bos_token_id=vocabulary["<|startoftext|>"],
                eos_token_id=vocabulary["<|endoftext|>"], architectures=["CLIPTextModel"])
    unet = dict(_class_name="UNet2DConditionModel", sample_size=config.image_size >> levels - 1,
                block_out_channels=config.channels, layers_per_block=config.blocks, attention_head_dim=config.heads,
                cross_attention_dim=config.text_width, norm_num_groups=groups(config.channels),
                down_block_types=[kind.format("Down") for kind in kinds],
                up_block_types=[kind.format("Up") for kind in reversed(kinds)])
    vae = dict(_class_name="AutoencoderKL", block_out_channels=config.vae_channels, layers_per_block=1,
               latent_channels=4, norm_num_groups=groups(config.vae_channels), sample_size=config.image_size,
               down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    return json.loads(json.dumps({"text_encoder": text, "unet": unet, "vae": vae, "scheduler": SCHEDULER}))


# What the tiny teacher says of itself; students say "velocity", which InstaFlow's own repositories forgot to
SCHEDULER = dict(_class_name="DPMSolverMultistepScheduler", beta_start=0.00085, beta_end=0.012,
                 beta_schedule="scaled_linear", num_train_timesteps=1000, prediction_type="epsilon")


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


# Differs from 01_rectified_flow.py: the batch in slices
def accelerate(model, config):
    """The fast path, set up once before the loop: compiled graph, bf16 autocast, slices, one replica per process.

    Returns the callable to train and the autocast context; off CUDA they are the plain network and a no-op.
    """
    device = next(model.parameters()).device
    if device.type == "cuda" and config.compile:
        model.compile(dynamic=False)                       # in place: state-dict keys stay clean
    network = Slices(model, config.micro_batch) if config.micro_batch else model
    if dist.is_initialized():
        network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    return network, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


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


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """What every stage of a run needs."""
    config: Config
    device: torch.device
    folder: Path
    pipe: Pipeline
    prompts: Prompts
    shape: tuple                                           # of a latent, (C, h, w)


def check_settings(config):
    """UserError, before anything is written, for settings that contradict each other."""
    for name, want in (("reflow", len(config.reflow_steps)), ("distill", 2)):
        steps, batch = getattr(config, f"{name}_steps"), getattr(config, f"{name}_batch")
        if not len(steps) == len(batch) == want:
            raise UserError(f"--{name}-steps and --{name}-batch want {want} numbers, got {len(steps)}, {len(batch)}")
        if any(n % process()[1] for n in (*batch, config.vae_batch)):
            raise UserError(f"--{name}-batch or --vae-batch cannot be shared evenly by {process()[1]} processes")
    if config.preset == "paper" and not config.model:
        raise UserError("--preset paper needs --model: a Stable Diffusion 1.x folder or repository")
    if config.model and not config.prompts:
        raise UserError("--model needs --prompts FILE, a text file with a prompt a line")
    if len(config.attention) != len(config.channels):
        raise UserError(f"--attention wants a number for each of --channels: {len(config.channels)}")
    if config.image_size % 2 ** (len(config.vae_channels) - 1) and not config.model:
        raise UserError(f"--image-size {config.image_size} cannot be halved {len(config.vae_channels) - 1} times")
    with torch.device("meta"):                             # no memory, no time: do the widths make sense?
        parts = tiny_configs(config, {"<|startoftext|>": 0, "<|endoftext|>": 1})
        VAE.from_config(parts["vae"]), UNet.from_config(parts["unet"])
        CLIPTextEncoder.from_config(parts["text_encoder"])


def tiny_teacher(images, captions, config, device, folder):
    """Autoencoder, then text encoder and diffusion model, from nothing; exported to folder/teacher."""
    if process()[0] == 0:
        write_vocabulary(shape_captions(), folder / "tokenizer")
    wait_for_all()
    tokenizer = CLIPTokenizer(folder / "tokenizer" / "vocab.json", folder / "tokenizer" / "merges.txt")
    parts, settings = tiny_configs(config, tokenizer.vocab), dataclasses.asdict(config)
    images = to_device(images, device)
    torch.manual_seed(seed_for(config.seed, 0))            # the start weights of all three
    fresh = Autoencoder(VAE.from_config(parts["vae"])), Captioned(
        UNet.from_config(parts["unet"]), CLIPTextEncoder.from_config(parts["text_encoder"]))
    autoencoder, captioned = (place(module, device) for module in fresh)
    first = dataclasses.replace(config, steps=config.vae_steps, batch=config.vae_batch, lr=config.vae_lr)
    vae = stage(folder / "vae.pt", lambda: (fit(
        autoencoder, autoencoder_loss(images, first), first, folder, "vae", 1).model, settings),
        partial(load_like, autoencoder)).vae
    latents = torch.cat([encode_images(vae, x) for x in images.split(500)])
    vae.scale = parts["vae"]["scaling_factor"] = 1 / latents.std().item()
    latents *= vae.scale
    tokens, empty = tokenizer(captions).to(device), tokenizer([""]).to(device)
    teacher = stage(folder / "teacher.pt", lambda: (fit(
        captioned, teacher_loss(latents, tokens, empty, config), config, folder, "teacher", 2).model, settings),
        partial(load_like, captioned))
    if not (folder / "teacher").exists():
        save_pipeline(folder / "teacher", {"vae": vae, "unet": teacher.unet, "text_encoder": teacher.text_encoder},
                      parts, folder / "tokenizer")
    wait_for_all()


def load_like(module, path):
    """A finished network of the same kind as `module` from the .pt file of a stage, frozen."""
    network = copy.deepcopy(module)
    try:
        network.load_state_dict(load_checkpoint(path, next(module.parameters()).device, keys=("model",))["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds another network: {str(error).splitlines()[-1].strip()}") from None
    return network.eval().requires_grad_(False)


@torch.no_grad()
def encode_images(vae, images):
    """Bytes (B, 3, H, W) -> the means of their latents, unscaled."""
    return vae.encode(to_floats(images))[0]


# Differs from 03_improved_training.py: phases, and the result is exported
def train_student(chain, name, seed, start, phases):
    """A student through its phases, each from the averaged weights of the one before, then exported.

    start: the network to begin with;  phases: (loss_fn of a config, steps, batch, peak learning rate).
    """
    config, settings = chain.config, dataclasses.asdict(chain.config)
    for k, (loss_of, steps, batch, lr) in enumerate(phases):
        own = dataclasses.replace(config, steps=steps, batch=batch, lr=lr)
        label, stream = f"{name}-{seed}.{k + 1}", seed_for(seed, k, *name.encode())

        def make():
            student = place(copy.deepcopy(start), chain.device).train().requires_grad_(True)
            student.checkpointing = config.checkpointing
            network = fit(student, loss_of(own), own, chain.folder, label, stream).model
            print_memory(label, chain.device)
            return network, settings
        start = stage(chain.folder / f"{label}.pt", make, partial(load_like, start))
    if not (chain.folder / f"{name}-{seed}").exists():
        source = chain.pipe.folder
        configs = {part: read_json(source / part / "config.json") for part in ("unet", "vae", "text_encoder")}
        configs["unet"]["_class_name"] = "StackedUNet" if isinstance(start, StackedUNet) else "UNet2DConditionModel"
        configs["scheduler"] = chain.pipe.scheduler | {"prediction_type": "velocity"}
        modules = {"unet": start, "vae": chain.pipe.vae, "text_encoder": chain.pipe.text_encoder}
        save_pipeline(chain.folder / f"{name}-{seed}", modules, configs, source / "tokenizer")
    wait_for_all()
    return start


def print_memory(label, device):
    """Peak memory so far, of the GPU if there is one."""
    if process()[0] == 0:
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else \
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)
        tqdm.write(f"{label:>8}  peak memory {peak:.1f} GB")


def stored(chain, name, go, count, seed):
    """Pairs by the map `go`, in chain.folder/pairs/name, made if missing.  Returns number -> draw function."""
    folder, config = chain.folder / "pairs" / name, chain.config
    make_pairs(go, folder, count, config, chain.shape, chain.device, seed)

    def drawn_from(number, dropout=0.0):
        return draw_stored(Pairs(folder, number, config.shard, chain.shape), seed, chain.prompts, dropout)
    return drawn_from


def students(chain, seed):
    """2-RF, its distillation, and the teacher's direct distillation, short and longer: name -> U-Net."""
    config, teacher, prompts = chain.config, chain.pipe.unet, chain.prompts
    go = flow_map(Frozen(teacher, config), prompts, "dpm", config.solver_steps, config.guidance)
    pairs = stored(chain, "teacher", go, config.pairs * (1 + config.direct), seed_for(config.seed, 3))
    start = negated(teacher) if config.init == "negated" else teacher
    draw = pairs(config.pairs, config.caption_dropout)
    phases = [(partial(pair_loss, draw), steps, batch, config.student_lr)
              for steps, batch in zip(config.reflow_steps, config.reflow_batch)]
    flow = train_student(chain, "2-rf", seed, start, phases)
    found = {"2-rf": flow}
    go = flow_map(Frozen(flow, config), prompts, "euler", config.distill_solver_steps, config.distill_guidance)
    own = stored(chain, f"2-rf-{seed}", go, config.pairs, seed_for(config.seed, 4, seed))(config.pairs)
    stacked = StackedUNet if config.unet == "stacked" else lambda a: a
    found["distilled"] = train_student(chain, "distilled", seed, stacked(copy.deepcopy(flow)),
                                       distill_phases(chain, own, config.distill_steps[0]))
    for name, more in (("direct", 0), ("longer", 1)) if config.direct else ():
        steps = config.distill_steps[0] + more * sum(config.reflow_steps)      # without and with reflow's own budget
        found[name] = train_student(chain, name, seed, stacked(copy.deepcopy(start)),
                                    distill_phases(chain, pairs((1 + more) * config.pairs), steps))
    return found


def negated(unet):
    """A copy whose output has the other sign: the teacher's is about x0, a velocity begins with -x0.

    With the teacher's own sign, training first unlearns to look at x0, and the tiny network stays blind to it for long.
    """
    unet = copy.deepcopy(unet)
    for p in unet.conv_out.parameters():
        p.data.neg_()
    return unet


def distill_phases(chain, draw, steps):
    """First |.|^2 of latents, then LPIPS of pictures."""
    config = chain.config
    perceptual = place(Perceptual(config.lpips_net, config.lpips_size, config.lpips_weights), chain.device)
    seen = picture_distance(chain.pipe.vae, perceptual, config.micro_batch)
    return [(partial(distill_loss, draw, distance=squared), steps, config.distill_batch[0], config.student_lr),
            (partial(distill_loss, draw, distance=seen), config.distill_steps[1], config.distill_batch[1],
             config.lpips_lr)]


def maps(chain, found):
    """What is compared: heading -> (network, map), of the U-Nets in found: name -> U-Net.  "ddim" needs no training."""
    config, rows = chain.config, {}
    for name, heading, solver, steps in (
            ("teacher", "teacher", "dpm", config.solver_steps), ("teacher", "teacher as velocity", "ddim", 1),
            ("teacher", "teacher as velocity", "ddim", 4), ("2-rf", "2-RF", "euler", 1), ("2-rf", "2-RF", "euler", 4),
            ("distilled", "2-RF distilled", "euler", 1), ("direct", "teacher distilled", "euler", 1),
            ("longer", "teacher distilled longer", "euler", 1)):
        if name in found:
            network, guidance = Frozen(found[name], config), config.guidance if name == "teacher" else 1.0
            rows[f"{heading}\n{steps} step{'s' * (steps > 1)}"] = network, flow_map(
                network, chain.prompts, solver, steps, guidance)
    return rows


def measure(chain, found, features, real):
    """A row of numbers for every map, {heading: {accuracy, FD, NFE}}, and its pictures."""
    reader, texts, rows, pictures = CaptionReader(chain.config.image_size), chain.prompts.texts, {}, {}
    known = set(shape_captions()) >= set(texts)            # other prompts cannot be read off a picture
    for heading, (network, go) in maps(chain, found).items():
        before = network.evaluations
        images = generate(go, chain.pipe.vae, chain.config, chain.shape, chain.device)
        right = [text == texts[i % len(texts)] for i, text in enumerate(reader(images))] if known else None
        rows[heading] = {"accuracy": float(np.mean(right)) if known else None,
                         "FD": frechet_from_moments(*feature_moments(images, features, chain.device), *real),
                         "NFE": (network.evaluations - before) / len(images)}
        pictures[heading] = images
    return rows, pictures


# Differs from 03_improved_training.py: accuracy and Frechet distance of every network
def print_table(results, label):
    """Mean over seeds of every number, and the spread of the accuracy."""
    print(f"\n{label}; accuracy: share of pictures whose caption reads as it was asked; NFE evaluations a picture")
    print(f"{'':<34}    NFE  accuracy       +-        FD       +-")
    for heading, rows in results.items():
        cells = ""
        for key in ("accuracy", "FD"):
            values = [row[key] for row in rows if row[key] is not None]
            cells += f"{np.mean(values):10.3f}" if values else f"{'-':>10}"
            cells += f"{np.std(values, ddof=1):9.3f}" if len(values) > 1 else f"{'-':>9}"
        print(f"{heading.replace(chr(10), ', '):<34}{rows[0]['NFE']:7.0f}{cells}")


# Differs from 03_improved_training.py: text to image
def report(chain, networks, features, label, real):
    """Measure everything from the same noises, print the table, draw the figures.  networks: name -> U-Net, by seed."""
    results, shown = {}, {}
    for found in [{"teacher": chain.pipe.unet}, *networks]:     # the teacher has no seeds
        rows, pictures = measure(chain, found, features, real)
        for heading, row in rows.items():
            results.setdefault(heading, []).append(row)
            shown.setdefault(heading, pictures[heading])        # of the first seed
    save_json(chain.folder / "results.json", {"distance": label, "samples": chain.config.eval_size, "networks": {
        heading.replace("\n", ", "): rows for heading, rows in results.items()}})
    print_table(results, label)
    draw_grid({heading: images for heading, images in shown.items() if not re.search("velocity|longer", heading)},
              chain.prompts.texts, chain.folder)
    draw_quality(results, label, chain.folder)


# Differs from 03_improved_training.py: a latent model with text, given or trained from nothing
def main(config):
    """Teacher, then every student of every seed, then numbers and figures; finished stages are skipped."""
    device, started = choose_device(config), time.perf_counter()
    check_settings(config)
    with rank_zero_first():
        images, _, captions = (None,) * 3 if config.model else shapes(config.data_size, config.image_size, config.seed)
        texts = read_lines(config.prompts, "--prompts") if config.prompts else shape_captions()
        pipe = load_pipeline(config.model, base=config.hub) if config.model else None
        features, label = choose_features(config, device)
        Perceptual(config.lpips_net, config.lpips_size, config.lpips_weights)      # a missing backbone fails here
    folder = open_run(config, __file__)
    if not pipe:
        tiny_teacher(images, captions, config, device, folder)
        pipe = load_pipeline(folder / "teacher")
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        place(module, device).eval().requires_grad_(False)
    pipe.vae.checkpointing = config.checkpointing
    factor = 2 ** (len(pipe.vae.decoder.up_blocks) - 1)
    shape = pipe.vae.post_quant_conv.in_channels, *[config.image_size // factor] * 2
    chain = Chain(config, device, folder, pipe, Prompts(pipe, texts), shape)
    networks = [students(chain, seed) for seed in range(config.seeds)]
    if process()[0] == 0:
        real = images if images is not None else teacher_pictures(chain)
        report(chain, networks, features, label, feature_moments(real, features, device))
        print(f"\n{time.perf_counter() - started:.0f} s; figures, results.json and the networks are in {folder}/")


def teacher_pictures(chain):
    """What samples are compared with if there are no data: the pictures of the teacher's pairs."""
    count = min(chain.config.eval_size, chain.config.pairs)
    pairs = Pairs(chain.folder / "pairs" / "teacher", count, chain.config.shard, chain.shape)
    return torch.cat([decode_latents(chain.pipe.vae, pairs[i].to(chain.device)).cpu()
                      for i in torch.arange(count).split(chain.config.shard)])


def open_model(config, device):
    """The pipeline of --model with what --delta and --lora add to it, on the device in its working precision."""
    if not config.model:
        raise UserError("--model FOLDER or --model OWNER/NAME, please: which network shall draw?")
    pipe = load_pipeline(config.model, base=config.hub)
    said = pipe.scheduler.get("prediction_type")
    if said == "velocity" and config.solver == "dpm":
        raise UserError(f"{config.model} is a velocity: use --solver euler, as --preset instaflow and 2-rf do")
    if [*config.delta] != [""]:
        if len(config.delta) != 2:
            raise UserError(f"--delta wants two models, FROM TO, got {len(config.delta)}")
        base, target = (unet_file(source, base=config.hub) for source in config.delta)
        merge_delta(pipe.unet, base, target)
        other = load_pipeline(config.delta[1], base=config.hub)
        pipe.vae, pipe.text_encoder = other.vae, other.text_encoder        # a fine-tune brings its own
    for item in config.lora if [*config.lora] != [""] else ():
        path, colon, scale = item.rpartition(":")
        if not (colon and re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", scale)):
            path, scale = item, 1.0
        merge_lora({"unet": pipe.unet, "te": pipe.text_encoder}, path, float(scale))
    for module in (pipe.text_encoder, pipe.unet, pipe.vae):
        place(module, device).eval().requires_grad_(False)
    return pipe


def latent_shape(pipe, config):
    """(C, h, w) for --size.  UserError for sides that the VAE cannot make."""
    factor = 2 ** (len(pipe.vae.decoder.up_blocks) - 1)
    if len(config.size) > 2:
        raise UserError(f"--size wants one number, or height and width, got {len(config.size)}")
    own = read_json(pipe.folder / "unet" / "config.json").get("sample_size") or 64
    if 0 in config.size and not (isinstance(own, int) and 0 < own <= 1024):
        raise UserError(f"{pipe.folder} says sample_size = {own!r}, which is no side: give --size")
    sides = [side or own * factor for side in (config.size * 2)[:2]]
    if any(side % factor for side in sides):
        raise UserError(f"--size {' '.join(map(str, config.size))}: sides must be divisible by {factor}")
    return pipe.vae.post_quant_conv.in_channels, *(side // factor for side in sides)


def draw_prompts(pipe, go, shape, config, device, numbers):
    """Pictures (N, 3, H, W) on the CPU.  numbers: (text, noise) for each; the noise is the same on every machine."""
    images = []
    for part in tqdm(torch.tensor(numbers).split(config.batch), "sampling", disable=None, leave=False):
        text, noise = part.to(device).T
        x0 = pair_noise(seed_for(config.seed), noise, shape)
        images.append(decode_latents(pipe.vae, go(x0, text)).cpu())
    return torch.cat(images)


def sample_main(config):
    """`sample`: prompts to pictures on a contact sheet, and perhaps a film."""
    device = choose_device(config)
    if config.model and not any(text.strip() for text in config.prompt):
        raise UserError('--prompt "..." is missing or empty: what shall be drawn?')
    picture_format(config.out)                             # a wrong name fails here, not after the work
    if config.interpolate and picture_format(config.interpolate) not in Image.SAVE_ALL:
        raise UserError(f"--interpolate {config.interpolate}: no film format; name a GIF, such as walk.gif")
    pipe = open_model(config, device)
    shape, prompts = latent_shape(pipe, config), Prompts(pipe, [*config.prompt], config.negative)
    if config.negative and config.guidance <= 1:
        print("--negative does nothing without --guidance above 1", file=sys.stderr)
    network, started = Frozen(pipe.unet, config), time.perf_counter()
    go = flow_map(network, prompts, config.solver, config.steps, config.guidance)
    numbers = [(text, noise) for text in range(len(prompts)) for noise in range(config.count)]
    images = draw_prompts(pipe, go, shape, config, device, numbers)
    columns = config.count if len(prompts) > 1 else math.ceil(config.count ** 0.5)
    save_picture(contact_sheet(images, columns), config.out)
    print(f"{len(images)} pictures in {time.perf_counter() - started:.1f} s: {config.out}")
    if config.interpolate:
        save_film(walk(pipe, go, shape, config, device), config.interpolate)
        print(f"a walk through {config.count} noises: {config.interpolate}")


def walk(pipe, go, shape, config, device):
    """The first prompt along great circles from noise to noise and back to the first: pictures (N, 3, H, W)."""
    noises = pair_noise(seed_for(config.seed), torch.arange(config.count, device=device), shape)
    shares = [i / config.frames for i in range(config.frames)]
    line = torch.stack([slerp(a, b, share) for a, b in zip(noises, noises.roll(-1, 0)) for share in
                        torch.tensor(shares, device=device)])
    return torch.cat([decode_latents(pipe.vae, go(x0, x0.new_zeros(len(x0)).long())).cpu()
                      for x0 in line.split(config.batch)])


def save_film(images, path):
    """Pictures as an endless GIF."""
    first, *rest = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in to_bytes(images)]
    save_picture(first, path, save_all=True, append_images=rest, duration=80, loop=0)


def evaluate_main(config):
    """`evaluate`: captions to pictures; FID, CLIP score, and where the time goes."""
    device = choose_device(config)
    if not config.captions:
        raise UserError("--captions FILE, please: COCO's captions_*.json, or a text file")
    captions = read_captions(config.captions, config.count)
    if config.fid and not Path(config.real or "?").is_dir():
        raise UserError(f"--fid needs --real FOLDER of real images; got {config.real or 'none'}")
    features = inception_features(config.inception or None, config.download, config.data_dir, device) \
        if config.fid else None
    judge = CLIP.from_folder(config.clip) if config.clip else None
    pipe = open_model(config, device)
    seconds, scores, seen = {"text": [], "U-Net": [], "decode": []}, [], []
    for index, images in illustrate(pipe, captions, config, device, seconds):
        if features:
            seen.append(features(resized(images)).cpu())
        if judge:
            scores += clip_scores(*judge, images.cpu(), [captions[i] for i in index])
    half = len(seconds["text"]) > 1                        # the first batch also warms up
    result = {"model": config.model, "captions": len(captions), "size": [*images.shape[2:]],
              "steps": config.steps, "guidance": config.guidance, "seed": config.seed, "batch": config.batch,
              "seconds per batch": {name: float(np.median(times[half:])) for name, times in seconds.items()}}
    if features:
        real = torch.cat([features(to_floats(x).to(device)).cpu() for x in real_images(config.real, config.batch)])
        result["FID"] = frechet_from_moments(*moments(torch.cat(seen)), *moments(real))
    if judge:
        result["CLIP score"] = float(np.mean(scores))
    save_json(config.out, result | surroundings())
    print("\n".join(f"{name:>18}: {value}" for name, value in result.items()))


def illustrate(pipe, captions, config, device, seconds):
    """A picture for each caption, in batches: yields numbers (B,), pictures (B, 3, H, W); appends times to seconds."""
    shape, prompts = latent_shape(pipe, config), Prompts(pipe, captions, config.negative, few=0)
    network, how = Frozen(pipe.unet, config), (config.solver, config.steps, config.guidance)
    for index in tqdm(torch.arange(len(captions)).split(config.batch), "evaluating", disable=None):
        x0 = pair_noise(seed_for(config.seed), index.to(device), shape)
        text = timed(lambda: prompts(index), device, seconds["text"])
        x1 = timed(lambda: carry(network, x0, text, prompts.null, *how), device, seconds["U-Net"])
        yield index, timed(lambda: decode_latents(pipe.vae, x1), device, seconds["decode"])


def clip_scores(model, tokenizer, images, captions):
    """Cosines of pictures (B, 3, H, W) and their captions."""
    words = model.embed_texts(tokenizer(captions), tokenizer.end)
    return (model.embed_images(images) * words).sum(1).tolist()


def resized(images, size=256):
    """(B, 3, H, W) to the size at which samples and real images of COCO are compared."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def real_images(folder, batch, size=256):
    """Batches (B, 3, size, size) of bytes: the central squares of all images below a folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in Image.registered_extensions())
    images = (image for path in paths if (image := decode(path, size)) is not None)
    count = 0
    while chunk := list(itertools.islice(images, batch)):
        count += len(chunk)
        yield torch.from_numpy(np.stack(chunk))
    if count < 2:
        raise UserError(f"--real {folder}: {count} readable images are no distribution")


COMMANDS = {"sample": (sample_main, SampleConfig), "evaluate": (evaluate_main, EvaluateConfig)}


def command_line():
    """The first word may name a command; without one the training chain runs."""
    launch(*(COMMANDS[sys.argv.pop(1)] if sys.argv[1:2] and sys.argv[1] in COMMANDS else (main, Config)))


if __name__ == "__main__":
    command_line()
