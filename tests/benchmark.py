"""How fast are the scripts on this machine, and beside others in the same run?

    python tests/benchmark.py                        # a GPU: at most 8 minutes; a CPU, small sizes: at most 10
    python tests/benchmark.py --only torchcfm pairs  # some rows;  --skip latency: all but some
    python tests/benchmark.py --memory               # no timing: what every preset needs of a card, by calculation

Rows in which torchcfm or diffusers is missing are left out (`pip install --no-deps torchcfm pot`, and `pip install
diffusers transformers`).  Every stage is a process of its own with a time limit of its own, and --minutes bounds them
all: one that hangs or fails takes no other row with it.  --out gets benchmark.md and benchmark.json, rewritten after
every row; "ratio" compares with the first row of the same stage.  Exit code 1 if a stage failed.
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

ENVIRONMENT = dict(os.environ)                              # before conftest takes all threads but one away
from conftest import load  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

COLUMNS = ("row", "a second", "ratio", "± %", "ms", "peak GB", "of matmul rate", "note")

# Our network (settings of chapter 2), its batch, torchcfm's network and batch, and how large Stable Diffusion is
SIZES = {
    "cuda": dict(ours=dict(image_size=32, channels=128, mult=(2, 2, 2), blocks=4, attention=(16,)), batch=128,
                 theirs=dict(dim=(3, 32, 32), num_channels=128, channel_mult=[1, 2, 2, 2], num_res_blocks=2,
                             num_heads=4, num_head_channels=64, attention_resolutions="16", dropout=0.1),
                 their_batch=128, shard=500, lpips=("vgg", 64), latents=dict(image_size=512), sd_batch=16),
    "cpu": dict(ours={}, batch=32, their_batch=4, shard=64, lpips=("squeeze", 32), sd_batch=16,
                latents=dict(image_size=64, channels=(64, 128), vae_channels=(32, 64, 64))),
    "smoke": dict(ours=dict(image_size=8, channels=8, mult=(1, 2), attention=(4,)), batch=4,
                  theirs=dict(dim=(3, 8, 8), num_channels=32, channel_mult=[1, 1], num_res_blocks=1, num_heads=1,
                              num_head_channels=32, attention_resolutions="4", dropout=0.1),
                  their_batch=2, shard=4, lpips=("squeeze", 32), sd_batch=2,
                  latents=dict(image_size=8, channels=(8, 8), vae_channels=(8, 8))),
}  # fmt: skip
SIZES["cpu"]["theirs"] = SIZES["cuda"]["theirs"]            # torchcfm's own network for CIFAR-10, whatever the machine

PUBLIC_SD = {       # the sizes of Stable Diffusion 1.5, where they differ from the chapter's tiny model
    "unet": dict(block_out_channels=[320, 640, 1280, 1280], layers_per_block=2, attention_head_dim=8, sample_size=64,
                 cross_attention_dim=768, norm_num_groups=32,
                 down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                 up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
    "vae": dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, norm_num_groups=32, sample_size=512,
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4),
    "text_encoder": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                         vocab_size=49408),
}


# ---- Measuring -------------------------------------------------------------------------------------------------------


def synchronize(device):
    """Wait until the device has done all it was given; without it, only the launches would be timed."""
    if device != "cpu":
        getattr(torch, device).synchronize()


def measure(step, seconds, device, most=1000):
    """Time step() in chunks of at most `most` calls.  Returns (first call, median of later ones, relative spread)."""
    def timed(n):
        start = time.perf_counter()
        for _ in range(n):
            step()
        synchronize(device)
        return (time.perf_counter() - start) / n

    first = timed(1)
    warm = timed(1)
    if warm < seconds:
        warm = min(timed(1), timed(1))                      # the first calls still pick kernels and grow memory pools
    n = max(1, min(most, int(seconds / 8 / warm)))          # long enough for the device to run ahead of Python
    times = [timed(n) for _ in range(max(2, min(100, int(seconds / warm / n))))]
    return first, statistics.median(times), (max(times) - min(times)) / statistics.median(times)


def training_flops(build, shape, call=lambda net, x, t: net(x, t)):
    """FLOP of forward and backward per image, counted without computing anything (2 per multiply-add)."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build()
        call(net, torch.empty(2, *shape), torch.empty(2)).square().mean().backward()
    return counter.get_total_flops() / 2


def shake(net):
    """Random weights everywhere: a fresh network's last layers are nearly zero and would hide all that comes before."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.5 * p.numel() ** -0.5 if p.dim() < 2 else 0.3 * p[0].numel() ** -0.5)
    return net


def gradients(net, loss_fn, autocast=contextlib.nullcontext()):
    """name -> gradient of every parameter, in float32.  loss_fn: net -> losses; it draws the same batch every time."""
    net.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with autocast:
        loss = loss_fn(net).mean()
    loss.backward()
    return {name: p.grad.float().clone() for name, p in net.named_parameters() if p.grad is not None}


def worst_error(found, reference):
    """(|g - g0| / |g0|, name) of the worst parameter of the reference; NaN or none at all is infinitely wrong."""
    missing = torch.tensor(float("nan"))
    errors = {name: ((found.get(name, missing) - g0).norm() / g0.norm()).nan_to_num(nan=float("inf")).item()
              for name, g0 in reference.items()}
    worst = max(errors, key=errors.get)
    return errors[worst], worst


class Bench:
    """One stage at work: the settings, and row() to measure and report."""

    def __init__(self, args):
        self.args, self.device, self.place = args, args.device, torch.device(args.device)
        self.cuda = args.device == "cuda"
        self.size = SIZES["smoke" if args.quick else "cuda" if self.cuda else "cpu"]
        self.base = None

    def row(self, name, step, batch, flops=None, note="", most=1000):
        """Measure step(), which handles `batch` samples, and write the row down.  Returns samples a second."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        first, seconds, spread = measure(step, self.args.seconds, self.device, most)
        rate = batch / seconds
        self.base = self.base or rate
        row = {"row": name, "a second": rate, "ratio": rate / self.base, "± %": 50 * spread, "ms": 1000 * seconds}
        if self.cuda:
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        matmul = read(self.args.out)["facts"].get("bf16 matmul TFLOP/s")
        if flops and matmul:
            row["of matmul rate"] = rate * flops / matmul / 1e12
        add_row(self.args.out, **row, note=note + (f", first call {first:.0f} s" if first > 5 else ""))
        return rate

    def config(self, script, **changes):
        """Settings of a script on this device."""
        common = dict(device=self.device, compile=self.cuda, steps=10 ** 9, batch=self.size["batch"])
        return replace(script.Config(), **common | changes)

    def train(self, script, net, loss_fn, **changes):
        """step() of the scripts' own training loop, train()."""
        script.choose_device(self.device)                   # what a run sets for the whole process
        loop = script.train(script.place(net, self.place), loss_fn, self.config(script, **changes))
        return lambda: next(loop)

    def images(self, shape, n=2048):
        """Random pictures: no kernel looks at the values."""
        return torch.randint(256, (n, *shape), dtype=torch.uint8)


# ---- Stages ----------------------------------------------------------------------------------------------------------


def machine(bench):
    """What a reader needs to judge the numbers; the rate of matrix products is the ceiling of all rows."""
    n = 256 if bench.args.quick else 8192 if bench.cuda else 1024
    a, b = (torch.randn(n, n, device=bench.place).bfloat16() for _ in range(2))     # zeros would run faster
    seconds = measure(lambda: a @ b, min(1.0, bench.args.seconds), bench.device)[1]
    name = torch.cuda.get_device_name() if bench.cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    facts = {"device": f"{bench.device} ({name})", "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    if bench.cuda:
        facts["cuDNN"] = torch.backends.cudnn.version()
    facts |= {"command": "python tests/benchmark.py " + " ".join(sys.argv[1:]).partition("--stage")[0].strip(),
              "bf16 matmul TFLOP/s": round(2 * n ** 3 / seconds / 1e12, 3)}
    write(bench.args.out, read(bench.args.out) | {"facts": facts})
    print("\n".join(f"{key:>20}  {value}" for key, value in facts.items()), flush=True)


class Swapped(nn.Module):
    """torchcfm's networks take (t, x) and ours (x, t): one called as the other."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, first, second, labels=None):
        return self.net(second, first)


def torchcfm(bench):
    """Their CIFAR-10 network under their training step and under ours; with its dropout, as both would train it."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet.unet import UNetModelWrapper

    script, batch, shape = load("02_reflow"), bench.size["their_batch"], bench.size["theirs"]["dim"]
    build = partial(UNetModelWrapper, **bench.size["theirs"])
    flops = training_flops(build, shape, lambda net, x, t: net(t, x))
    images = bench.images(shape)
    matcher = ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow
    theirs = plain_step(build().to(bench.place), matcher, images, batch)
    bench.row("torchcfm's network, as torchcfm trains it", theirs, batch, flops, "images")
    draw = partial(script.draw_independent, script.to_device(images, bench.place), None)
    ours = bench.train(script, Swapped(build()), partial(script.pair_loss, draw=draw, n=batch), batch=batch)
    bench.row("torchcfm's network, our train()", ours, batch, flops, "images")


def plain_step(net, draw, images, batch):
    """One step as torchcfm's CIFAR-10 example takes it: fp32, Adam, a scheduler, EMA over the state dict, all defaults.

    net: (t, x) -> velocity;  draw: (x0, x1) -> t, x_t, target.  Left out is their data loader (ours is cheaper), and of
    their couplings the independent one is taken, which is rectified flow's and needs no optimal transport on the CPU:
    both choices are in their favour.
    """
    average = copy.deepcopy(net).state_dict()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 5000) / 5000)
    device = next(net.parameters()).device

    def step():
        optimizer.zero_grad()
        x1 = images[torch.randint(len(images), (batch,))].to(device).float() / 127.5 - 1
        t, xt, target = draw(torch.randn_like(x1), x1)
        loss = ((net(t, xt) - target) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        for name, value in net.state_dict().items():
            average[name].copy_(average[name] * 0.9999 + value * (1 - 0.9999))

    return step


def our_flow(bench, script):
    """A fresh network of the benchmark's size, without dropout, and the shape of its pictures."""
    flow = script.Flow(bench.config(script, **bench.size["ours"]), 3, 0)
    return flow, flow.model.shape


def train(bench):
    """train() on our network: first are its gradients right (compiled bf16 against eager fp32), then how fast is it?"""
    script, batch = load("02_reflow"), bench.size["batch"]
    net, shape = our_flow(bench, script)
    net = script.place(net, bench.place)
    draw = partial(script.draw_independent, script.to_device(bench.images(shape), bench.place), None)
    loss = partial(script.pair_loss, ema=None, step=0, draw=draw, n=batch)
    torch.set_float32_matmul_precision("highest")
    shaken = shake(copy.deepcopy(net))
    reference = gradients(shaken, loss)
    script.choose_device(bench.device)
    network, autocast, _ = script.accelerate(shaken, bench.config(script))
    error, name = worst_error(gradients(network, loss, autocast), reference)
    verdict = "good" if error < 0.2 else "WRONG: do not train here"     # bf16: 0.1 to 5 %; a compiler's bug: far more
    add_row(bench.args.out, row="gradients of train()", note=f"{verdict}; worst {error:.1e}, {name}")
    del shaken, network, reference
    flops = training_flops(lambda: our_flow(bench, script)[0], shape)

    def on_line(x0, x1):
        t = torch.rand(batch, device=bench.place)
        return t, script.interpolate(x0, x1, t), x1 - x0

    plain = plain_step(Swapped(our_flow(bench, script)[0].to(bench.place)), on_line, bench.images(shape), batch)
    bench.row("our network, as torchcfm trains its own", plain, batch, flops, "images")
    step = bench.train(script, net, partial(script.pair_loss, draw=draw, n=batch))
    bench.row("our network, train()", step, batch, flops, "images")
    if bench.cuda:
        add_row(bench.args.out, row="waits of the CPU in 5 steps", note=f"{count_waits(step)} (wanted: 0)")
    if not error < 0.2:
        raise ValueError(f"the gradient of {name} is off by {error:.2g}")


def count_waits(step):
    """How often the CPU waits for the GPU in 5 steps: each time the GPU runs dry."""
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(5):
            step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def pairs(bench):
    """Reflow's pairs by Heun's method in 18 steps, files included: chapter 2's write_pairs, a shard a call."""
    script, shard = load("02_reflow"), bench.size["shard"]
    with tempfile.TemporaryDirectory() as folder:
        sizes = dict(pairs=shard, shard=shard, pair_steps=18, out=folder + "/run")
        config = bench.config(script, **sizes, **bench.size["ours"])
        run = script.Run(config, "02_reflow.py")
        velocity = script.Velocity(script.place(our_flow(bench, script)[0], bench.place).eval(), config)
        rounds = itertools.count()
        step = lambda: script.write_pairs(run, f"{next(rounds)}-rf", velocity, stream=2)  # noqa: E731
        bench.row("pairs by Heun, 18 steps", step, shard, note="pairs")


def lpips(bench):
    """A step of chapter 3's configuration F: LPIPS-Huber, with an untrained backbone of the true size."""
    script, batch = load("03_improved_training"), bench.size["batch"]
    net, shape = our_flow(bench, script)
    net_name, side = bench.size["lpips"]
    perceptual = script.place(script.Perceptual(net_name, side, "random"), bench.place)
    times, distance = script.LADDER["F"]
    draw = partial(script.draw_independent, script.to_device(bench.images(shape), bench.place), None, batch)
    recipe = times, partial(distance, perceptual=perceptual)
    step = bench.train(script, net, partial(script.pair_loss, draw=draw, recipe=recipe))
    bench.row(f"LPIPS-Huber step, {net_name} at {side}", step, batch, note="images")


def sd_configs(script, bench, folder):
    """config.json of every part of a Stable Diffusion, and its tokenizer."""
    files = script.write_vocabulary(script.shape_captions(), folder)
    tokenizer = script.CLIPTokenizer(*files)
    latents = dict(bench.size["latents"])
    real = latents["image_size"] == 512
    configs = script.tiny_configs(replace(script.Config(), **latents), tokenizer.vocab)
    for name, sizes in PUBLIC_SD.items() if real else ():
        configs[name] |= sizes
    return configs, tokenizer, "Stable Diffusion 1.5's sizes" if real else "a small model"


def sd(bench, compiled=False):
    """A training step of chapter 5's reflow, and its peak of memory; compiling it takes minutes, so it comes last."""
    script, batch = load("05_text_to_image"), bench.size["sd_batch"]
    with tempfile.TemporaryDirectory() as folder:
        configs, _, words = sd_configs(script, bench, Path(folder))
    with bench.place:
        unet = script.from_config(script.UNet, configs["unet"])
    side, width = configs["unet"]["sample_size"], configs["unet"]["cross_attention_dim"]

    def draw():
        x0, x1 = torch.randn(2, batch, 4, side, side, device=bench.place)
        return x0, x1, torch.randn(batch, 77, width, device=bench.place)

    loss = partial(script.pair_loss, draw=draw, loss=script.reflow_loss)
    step = bench.train(script, unet, loss, compile=compiled, batch=batch)
    shape = f"{batch} x {side} x {side}"
    bench.row(f"reflow of chapter 5{', compiled' if compiled else ''}", step, batch, note=f"latents {shape}, {words}")


def latency(bench):
    """One picture in one step, from text to pixels: diffusers' pipeline on the same random weights, then `sample`."""
    from diffusers import StableDiffusionPipeline

    script = load("05_text_to_image")
    prompt, side = "a red cross on a white background", bench.size["latents"]["image_size"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        configs, tokenizer, words = sd_configs(script, bench, folder / "words")
        with bench.place:
            parts = {name: script.from_config(network, configs[name]) for name, network in script.NETWORKS.items()}
        for part in parts.values():
            part.half()                                     # a smaller file
        run = script.Run(replace(script.Config(), device=bench.device, out=str(folder)), "05_text_to_image.py")
        script.save_pipeline(run, "model", script.Pipeline(tokenizer, **parts, configs=configs))
        del parts
        kind = torch.float16 if bench.cuda else torch.float32
        pipe = StableDiffusionPipeline.from_pretrained(folder / "model", torch_dtype=kind).to(bench.device)
        pipe.set_progress_bar_config(disable=True)
        theirs = partial(pipe, prompt, num_inference_steps=1, guidance_scale=1.0, output_type="pt")
        note = f"pictures of {side} x {side}, {words}"
        bench.row("one step, diffusers' pipeline", theirs, 1, note=note, most=1)
        del pipe, theirs
        config = script.DrawConfig(model=str(folder / "model"), device=bench.device, compile=bench.cuda, batch=1)
        sampler, _ = script.open_sampler(script.Run(config, "05_text_to_image.py"), [prompt])
    number = torch.zeros(1, dtype=torch.long, device=bench.place)
    ours = lambda: next(script.pictures(sampler, 0, number, number, 1)).cpu()  # noqa: E731
    bench.row("one step, chapter 5's sample", ours, 1, note=note, most=1)


# Name -> function, and seconds after which it is given up.  In the order of what one wants to know first
STAGES = {"machine": (machine, 60), "torchcfm": (torchcfm, 200), "train": (train, 150), "pairs": (pairs, 100),
          "lpips": (lpips, 120), "sd": (sd, 90), "latency": (latency, 150),
          "sd-compiled": (partial(sd, compiled=True), 240)}


# ---- Memory of the presets, calculated -------------------------------------------------------------------------------


class Kept:
    """Counts the bytes that autograd keeps for backward(): each storage once, and no parameter's."""

    def __init__(self, own):
        self.own, self.storages, self.largest = own, {}, 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = storage         # kept alive, or its number would be given away again
        return tensor

    def checkpoint(self, function, *inputs, **options):
        """In place of torch's: the inputs are kept; the inside is needed again, one function at a time."""
        inside = Kept(self.own)
        for tensor in filter(torch.is_tensor, inputs):
            self.add(tensor)
        with torch.autograd.graph.saved_tensors_hooks(inside.add, lambda tensor: tensor):
            output = function(*inputs)
        self.largest = max(self.largest, inside.total())
        return output

    def total(self):
        return sum(storage.nbytes() for storage in self.storages.values()) + self.largest


def image_stages(script, config):
    """The training stage of chapters 2 to 4 that needs most: name, network, frozen networks, batch, n -> loss_fn."""
    flow = script.Flow(config, 3, 0)
    shape = (3, config.image_size, config.image_size)
    pair = lambda n: (*torch.randn(2, n, *shape), None)  # noqa: E731
    number = script.__name__[:2]
    if number == "02":
        yield "every round", flow, [], config.batch, lambda n: partial(script.pair_loss, draw=pair, n=n)
        return
    perceptual = script.Perceptual(config.lpips_net, config.lpips_size, "random")
    if number == "03":
        recipe = torch.rand, partial(script.lpips_huber_divided, perceptual=perceptual)
        yield ("E to G", flow, [perceptual], config.batch * config.big_batch,
               lambda n: partial(script.pair_loss, draw=partial(pair, n), recipe=recipe))
        return
    teacher = torch.no_grad()(flow.forward)
    lesson = lambda n: script.Lesson(partial(pair, n), teacher, perceptual)  # noqa: E731
    yield ("rf, direct", flow, [perceptual], config.batch,
           lambda n: partial(script.distillation_loss, lesson=lesson(n)))
    times = torch.linspace(1, 0, config.grid)
    if config.distance == "lpips":
        yield ("consistency", flow, [perceptual, flow], config.batch,
               lambda n: partial(script.consistency_distillation_loss, lesson=lesson(n), times=times))


def latent_stages(script, config):
    """The same for chapter 5."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    configs = script.tiny_configs(config, vocabulary)
    if config.preset == "paper":                            # its teacher is a public checkpoint
        for name, sizes in PUBLIC_SD.items():
            configs[name] |= sizes
    text, unet, vae = (script.from_config(script.NETWORKS[name], configs[name])
                       for name in ("text_encoder", "unet", "vae"))
    unet.checkpointing = vae.checkpointing = config.checkpointing
    side, width = configs["unet"]["sample_size"], configs["unet"]["cross_attention_dim"]
    latents = lambda n: torch.randn(n, 4, side, side)  # noqa: E731
    tokens = lambda n: torch.zeros(n, 77, dtype=torch.long)  # noqa: E731
    if config.preset == "gpu":
        picture = lambda n: [torch.zeros(n, 3, config.image_size, config.image_size, dtype=torch.uint8)]  # noqa: E731
        yield ("autoencoder", vae, [], config.vae_batch,
               lambda n: partial(script.vae_loss, draw=partial(picture, n), kl=config.kl))
        yield ("teacher", script.Captioned(unet, text), [vae], config.batch,
               lambda n: partial(script.teacher_loss, draw=lambda: (latents(n), tokens(n)), forget=lambda x: x))
    for part in (text, vae):
        part.requires_grad_(False)
    draw = lambda n: (latents(n), latents(n), torch.randn(n, 77, width))  # noqa: E731
    yield ("reflow", unet, [text, vae], max(config.reflow_batch),
           lambda n: partial(script.pair_loss, draw=partial(draw, n), loss=script.reflow_loss))
    perceptual = script.Perceptual(config.lpips_net, config.lpips_size, "random")
    distance = partial(script.picture_distance, vae, perceptual)
    loss = partial(script.one_step_loss, distance=distance)
    yield ("distillation by LPIPS", unet, [text, vae, perceptual], config.distill_batch[1],
           lambda n: partial(script.pair_loss, draw=partial(draw, n), loss=loss))


def on_card(*modules):
    """Buffers that a package made on the CPU, moved to where the parameters are."""
    for module in itertools.chain(*(module.modules() for module in modules)):
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("cuda")


def kept_bytes(script, model, loss_fn):
    """What a step keeps for backward(), in bf16 where autocast on CUDA would, without the compiler."""
    kept = Kept({p.untyped_storage()._cdata for p in model.parameters()})
    was, script.checkpoint = getattr(script, "checkpoint", None), kept.checkpoint
    torch.set_autocast_enabled("cuda", True)                # torch.autocast would look for a GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
            loss_fn(model, None, 0)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
        script.checkpoint = was
    return kept.total()


def memory_rows(name, preset, card=80):
    """A row for each stage of a preset: gigabytes of states and of activations, and what makes them fit one card."""
    script = load(name)
    config = replace(script.Config(), preset=preset, **script.Config.presets[preset])
    stages = latent_stages if name[:2] == "05" else image_stages
    rows = []
    with FakeTensorMode(), torch.device("cuda"):            # shapes and types only: no memory, no GPU
        for stage, model, frozen, batch, loss in stages(script, config):
            on_card(model, *frozen)
            trained = sum(p.numel() for p in model.parameters())
            others = sum(p.numel() for module in frozen for p in module.parameters())
            states = (20 * trained + 4 * others) / 1e9      # float32: weights, gradients, two of AdamW, average
            kept, slices = {}, config.accumulate
            while not kept or (states + kept[slices // 2] > 0.94 * card and slices <= batch):   # the rest: workspaces
                kept[slices] = kept_bytes(script, model, loss(batch // slices)) / 1e9
                slices *= 2
            rows.append({"preset": f"{name[:2]} {preset}", "stage": stage, "trained": trained, "states": states,
                         "batch": batch, "accumulate": config.accumulate, "kept": kept[config.accumulate],
                         "fits": slices // 2, "kept then": kept[slices // 2]})
    return rows


def memory(out):
    """Print the table of notebooks/RESULTS.md and write it to memory.md."""
    lines = ["| preset | stage | trained | states, GB | slice | activations, GB | together | fits 80 GB |",
             "|---|---|---:|---:|---:|---:|---:|---|"]
    for name in ("02_reflow", "03_improved_training", "04_distill", "05_text_to_image"):
        for preset in ("gpu", "paper"):
            for row in memory_rows(name, preset):
                together = row["states"] + row["kept"]
                fits = "yes"
                if row["fits"] > row["accumulate"]:
                    fits = f"with --accumulate {row['fits']}: {row['states'] + row['kept then']:.0f} GB"
                lines.append(f"| {row['preset']} | {row['stage']} | {row['trained'] / 1e6:.1f} M | {row['states']:.1f} "
                             f"| {row['batch'] // row['accumulate']} | {row['kept']:.1f} | {together:.1f} | {fits} |")
    print("\n".join(lines))
    write_text(out / "memory.md", "\n".join(lines) + "\n")


# ---- Report ----------------------------------------------------------------------------------------------------------


def write_text(path, text):
    """Whole or not at all."""
    part = path.with_name(f".part-{path.name}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read(out):
    """What benchmark.json says so far."""
    path = out / "benchmark.json"
    return json.loads(path.read_text()) if path.exists() else {"facts": {}, "rows": []}


def write(out, content):
    """benchmark.json and, for people, benchmark.md."""
    write_text(out / "benchmark.json", json.dumps(content, indent=1))
    facts = [f"- {name}: {value}" for name, value in content["facts"].items()]
    table = [line(COLUMNS), "|---" + "|---:" * 6 + "|---|", *(line(shown(row)) for row in content["rows"])]
    write_text(out / "benchmark.md", "\n".join(["# Benchmark", "", *facts, "", *table, ""]))


def add_row(out, **row):
    """Print a row and keep it; cells that were not measured stay empty."""
    content = read(out)
    content["rows"].append(row)
    if len(content["rows"]) == 1:
        print(line(COLUMNS))
    print(line(shown(row)), flush=True)
    write(out, content)


def line(cells):
    """Aligned, so that the table can be read on the screen as well."""
    first, *rest, note = cells
    return f"| {first:<42} | " + " | ".join(f"{cell:>9}" for cell in rest) + f" | {note} |"


def shown(row):
    """The cells of a row as text."""
    formats = {"a second": "{:,.4g}" if row.get("a second", 0) < 1000 else "{:,.0f}", "ratio": "{:.2f}x",
               "± %": "{:.1f}", "ms": "{:.4g}", "peak GB": "{:.2f}", "of matmul rate": "{:.1%}"}
    return [formats.get(name, "{}").format(row[name]) if row.get(name) is not None else "" for name in COLUMNS]


# ---- Main ------------------------------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    """Flags, with defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best one here")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
                        help="stages to run")
    parser.add_argument("--skip", nargs="+", choices=STAGES, default=[], metavar="STAGE",
                        help="stages to leave out, of: " + " ".join(STAGES))
    parser.add_argument("--seconds", type=float, help="measured per row (3; CPU 8)")
    parser.add_argument("--minutes", type=float, help="for all of it (8; CPU 10): the rest is not begun, or given up")
    parser.add_argument("--quick", action="store_true", help="is it alive? toy networks, 0.1 s a row")
    parser.add_argument("--memory", action="store_true", help="calculate what the presets need, and nothing else")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"), help="folder (runs/benchmark)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)      # how the program calls itself
    args = parser.parse_args(argv)
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = args.device or next(name for name in has if has[name])
    if not has[args.device]:
        parser.error(f"--device {args.device}: torch finds no such device here")
    slow = args.device == "cpu"
    args.seconds = args.seconds or (0.1 if args.quick else 8.0 if slow else 3.0)
    args.minutes = (10.0 if slow else 8.0) if args.minutes is None else args.minutes
    if not args.seconds > 0:
        parser.error(f"--seconds {args.seconds} must be positive")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    return args


def supervise(command, limit, out, name):
    """Run a stage as a process; a limit in seconds, a crash or a missing package becomes a row.  True if it is well."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stderr=errors, start_new_session=True, env=ENVIRONMENT)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            add_row(out, row=name, note=f"given up after {limit:.0f} s")
            return False
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)      # the compiler's processes as well
                process.wait()
        errors.seek(0)
        lines = [text.strip() for text in errors if text.strip()] or [f"exit code {code}"]
    missing = lines[-1].startswith("ModuleNotFoundError")
    if code:
        add_row(out, row=name, note=f"{'not run' if missing else 'failed'}: {lines[-1][:150]}")
        content = read(out)
        write(out, content | {"errors": {**content.get("errors", {}), name: lines[-30:]}})
    return code == 0 or missing


def main(argv=None):
    """Every stage, one after the other.  Returns the exit code."""
    args = parse_arguments(argv)
    if args.memory:
        memory(args.out)
        return 0
    if args.stage:
        STAGES[args.stage][0](Bench(args))
        return 0
    write(args.out, {"facts": {}, "rows": []})
    end = time.monotonic() + 60 * args.minutes
    given = sys.argv[1:] if argv is None else argv
    well = True
    for name, (_, limit) in STAGES.items():
        if name not in args.only or name in args.skip or (name == "sd-compiled" and args.device != "cuda"):
            continue
        left = end - time.monotonic()
        if left < 20:
            add_row(args.out, row=name, note=f"not run: --minutes {args.minutes:g} are over")
            continue
        command = [sys.executable, __file__, *given, "--stage", name]
        well &= supervise(command, min(limit, left), args.out, name)
    print(f"\n{args.out / 'benchmark.md'} and benchmark.json written")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
