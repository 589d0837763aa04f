"""How fast is a training step, and which switch pays? A ladder from a plain PyTorch loop up to the scripts' own.

    python tests/benchmark.py                        # CUDA: the CIFAR-10 network, within 8 minutes; else the quick one
    python tests/benchmark.py --device cpu --network quick --seconds 5
    python tests/benchmark.py --quick                # is the benchmark itself alive? half a minute on a laptop

First the gradients: compiled bf16 against eager fp32, parameter by parameter, since a fast wrong step is worth nothing.
Then the ladder; each rung keeps what the rungs before it switched on. Then torchcfm's CIFAR-10 network, trained the way
torchcfm does it and the way we do it (`pip install --no-deps torchcfm pot`; without them these rows are left out).
Leaves benchmark.md and benchmark.json in --out, rewritten after every row. Exit code 1 if the check or a row failed.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import platform
import statistics
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from conftest import load
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

COLUMNS = ("step", "images/s", "ratio", "± %", "ms/step", "peak GB", "of matmul rate", "note")
COMPILE_SECONDS = 120  # allowed for a compilation before the first one is measured

# Per size: settings of chapter 2's network, and arguments of torchcfm's. "cifar" is each repository's CIFAR-10 network,
# "quick" the network of chapter 2's default run beside a torchcfm network of about its size.
NETWORKS = {
    "cifar": (dict(image_size=32, channels=128, mult=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13),
              dict(dim=(3, 32, 32), num_channels=128, channel_mult=[1, 2, 2, 2], num_res_blocks=2, dropout=0.1,
                   num_heads=4, num_head_channels=64, attention_resolutions="16")),
    "quick": ({}, dict(dim=(3, 16, 16), num_channels=32, channel_mult=[1, 1, 2], num_res_blocks=1, dropout=0.1,
                       num_head_channels=32, attention_resolutions="4")),
    "smoke": (dict(image_size=8, channels=8, mult=(1, 2), attention=(4,)),
              dict(dim=(3, 8, 8), num_channels=32, channel_mult=[1, 1], num_res_blocks=1, dropout=0.1,
                   num_head_channels=32, attention_resolutions="4")),
}  # fmt: skip


@dataclass(frozen=True)
class Switches:
    """What a training step may use. All off: the loop of a first tutorial, on PyTorch's defaults."""

    tf32: bool = False
    cudnn_benchmark: bool = False
    bf16: bool = False
    channels_last: bool = False
    fused: bool = False
    foreach_ema: bool = False
    resident: bool = False
    compile: bool = False
    force_layout: bool = False
    autotune: bool = False


# Name, switch, devices it exists on. The order matters: what the compiler would hide is measured before it.
LADDER = [
    ("eager fp32", None, "cuda mps cpu"),
    ("+ TF32 matmul", "tf32", "cuda"),
    ("+ cudnn.benchmark", "cudnn_benchmark", "cuda"),
    ("+ bf16 autocast", "bf16", "cuda cpu"),
    ("+ channels_last", "channels_last", "cuda cpu"),
    ("+ fused AdamW", "fused", "cuda mps cpu"),
    ("+ foreach EMA", "foreach_ema", "cuda mps cpu"),
    ("+ data on the device, no syncs", "resident", "cuda mps cpu"),
    ("+ compile", "compile", "cuda"),
]
OURS = Switches(**{switch: True for _, switch, _ in LADDER if switch})


# ---- One training step -----------------------------------------------------------------------------------------------


def apply_globals(on):
    """Switches that belong to the process; set for every row, so that no row inherits another one's."""
    torch.set_float32_matmul_precision("high" if on.tf32 else "highest")  # the newer TF32 switches broke torch.compile
    torch.backends.cudnn.benchmark = on.cudnn_benchmark
    if on.compile:
        import torch._inductor.config as inductor

        inductor.force_layout_optimization = on.force_layout
        if hasattr(inductor.triton, "mix_order_reduction"):  # the scripts' own setting, see compile_network
            inductor.triton.mix_order_reduction = False


def make_batches(images, on, batch, device):
    """Returns draw() -> (x0, x1), noise and images (b, c, h, w). `images`: (n, c, h, w) uint8 on the CPU."""
    layout = torch.channels_last if on.channels_last else torch.contiguous_format  # the compiler keeps the one it gets
    source = images.to(device) if on.resident else images
    source = source.contiguous(memory_format=layout)

    def draw():
        index = torch.randint(len(source), (batch,), device=source.device)
        x1 = source[index].to(device).float() / 127.5 - 1  # indexing keeps the layout
        return torch.randn_like(x1), x1

    return draw


def make_ema(net, on, decay=0.9999):
    """Returns update(): averaged weights, in one kernel for all tensors or by a loop over them."""
    ema, parameters = list(copy.deepcopy(net).parameters()), list(net.parameters())

    @torch.no_grad()
    def update():
        if on.foreach_ema:
            torch._foreach_lerp_(ema, parameters, 1 - decay)
        else:
            for average, p in zip(ema, parameters):
                average.mul_(decay).add_(p, alpha=1 - decay)

    return update


def make_loss(velocity, on):
    """Rectified flow's loss E|v(x_t, t) - (x1 - x0)|² (Liu et al. 2022, eq. 1), one function for the compiler."""
    interpolate = load("02_reflow").interpolate

    def loss_fn(x0, x1, t):
        return (velocity(interpolate(x0, x1, t), t).float() - (x1 - x0)).square().mean()

    if not on.compile:
        return loss_fn
    mode = "max-autotune-no-cudagraphs" if on.autotune else "default"
    return torch.compile(loss_fn, mode=mode, dynamic=False, fullgraph=True)


def our_step(net, velocity, images, on, batch, device):
    """Returns step(): one training step with these switches. velocity(x, t) is `net`, however it is called."""
    apply_globals(on)
    net.to(device, memory_format=torch.channels_last if on.channels_last else torch.contiguous_format)
    update_ema = make_ema(net, on)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-4, weight_decay=0.0, fused=on.fused or None)
    draw, loss_fn = make_batches(images, on, batch, device), make_loss(velocity, on)
    autocast = torch.autocast(device, torch.bfloat16, enabled=on.bf16)

    def step():
        x0, x1 = draw()
        with autocast:  # outside the compiled function, and not around backward()
            loss = loss_fn(x0, x1, torch.rand(batch, device=device))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema()
        return loss.detach() if on.resident else loss.item()  # .item() makes the CPU wait for the device

    return step


def torchcfm_step(net, images, batch, device):
    """One step as torchcfm's CIFAR-10 example takes it: fp32, Adam, a scheduler, EMA over the state dict, all defaults.

    Left out is its data loader (our stand-in is cheaper), and of its couplings the independent one is taken, which is
    rectified flow's and needs no optimal transport on the CPU: both choices are in its favour.
    """
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    apply_globals(Switches())
    matcher, average = ConditionalFlowMatcher(sigma=0.0), copy.deepcopy(net.to(device)).state_dict()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step, 5000) / 5000)
    draw = make_batches(images, Switches(), batch, device)

    def step():
        optimizer.zero_grad()
        x0, x1 = draw()
        t, xt, target = matcher.sample_location_and_conditional_flow(x0, x1)
        loss = ((net(t, xt) - target) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        for name, value in net.state_dict().items():
            average[name].copy_(average[name] * 0.9999 + value * (1 - 0.9999))

    return step


def scripts_step(net, images, batch, device, compiled):
    """One step of the loop that the scripts really run, train(), to see that it reaches what the ladder promises."""
    script, place = load("02_reflow"), torch.device(device)
    apply_globals(OURS)
    config = replace(script.Config(), batch=batch, steps=10**9, compile=compiled)
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    resident = images.to(place).contiguous(memory_format=layout)
    loss_fn = partial(script.pair_loss, draw=partial(script.draw_independent, resident, None), n=batch)
    loop = script.train(script.place(net, place), loss_fn, config)
    return lambda: next(loop)


# ---- Measuring -------------------------------------------------------------------------------------------------------


def synchronize(device):
    """Wait until the device has done all it was given; without it, only the launches would be timed."""
    if device != "cpu":
        getattr(torch, device).synchronize()


def clean(device):
    """Every row starts from an empty device and an empty compiler."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the process's peak


def peak_gigabytes(device):
    """Peak memory since clean(): of the GPU, or on Linux of this process; None where it cannot be known."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    with contextlib.suppress(OSError, StopIteration):
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e9
    return None


def measure(step, seconds, device):
    """Returns (duration of the first call, median duration of a later one, relative spread), in seconds."""

    def timed(n):
        start = time.perf_counter()
        for _ in range(n):
            step()
        synchronize(device)
        return (time.perf_counter() - start) / n

    first = timed(1)
    warm = timed(1)
    if warm < seconds:
        warm = min(timed(1), timed(1))  # the first calls still pick kernels and grow memory pools
    n = max(1, int(seconds / 8 / warm))  # long enough chunks for the device to run ahead of Python
    times = [timed(n) for _ in range(8 if n > 1 else max(2, int(seconds / warm)))]
    return first, statistics.median(times), (max(times) - min(times)) / statistics.median(times)


def matmul_rate(n, device, seconds):
    """FLOP/s of n x n matrix products in bf16, the ceiling of all rows. On random data, because zeros run faster."""
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / measure(lambda: a @ b, seconds, device)[1]


def training_flops(build, call):
    """FLOP of forward and backward per image, counted without computing anything (2 per multiply-add)."""
    with torch.device("meta"):
        net = build()
        x, t = torch.empty(2, *image_shape(net)), torch.empty(2)
        with FlopCounterMode(display=False) as counter:
            call(net, x, t).square().mean().backward()
    return counter.get_total_flops() / 2


def gradients(net, velocity, on, batch, device, backend):
    """The gradient of every parameter on one fixed batch, in fp32; only `on` and the compiler may change it."""
    apply_globals(on)
    net.to(memory_format=torch.channels_last if on.channels_last else torch.contiguous_format).zero_grad()
    generator = torch.Generator().manual_seed(1)
    x0, x1 = (torch.randn(batch, *image_shape(net), generator=generator).to(device) for _ in range(2))
    t = torch.rand(batch, generator=generator).to(device)
    loss_fn = make_loss(velocity, replace(on, compile=False))
    if backend:
        loss_fn = torch.compile(loss_fn, backend=backend, dynamic=False, fullgraph=True)
    with torch.autocast(device, torch.bfloat16, enabled=on.bf16):
        loss = loss_fn(x0, x1, t)
    loss.backward()
    return {name: p.grad.float().clone() for name, p in net.named_parameters()}


def gradient_errors(build, batch, device, on, backend):
    """|g - g0| / |g0| of every parameter, worst first: g with the switches and the compiler, g0 eager in fp32."""
    torch.manual_seed(0)
    net = build().to(device).eval()  # no dropout: the compiler draws other masks
    with torch.no_grad():
        for p in net.parameters():  # a fresh network's last layers are nearly zero and would hide the rest of it
            p.add_(torch.randn_like(p), alpha=0.5 * p.numel() ** -0.5 if p.dim() == 1 else 0.3 * p[0].numel() ** -0.5)
    reference = gradients(net, net, Switches(), batch, device, None)
    tested = gradients(net, net, on, batch, device, backend)
    errors = {name: ((tested[name] - g0).norm() / g0.norm()).item() for name, g0 in reference.items()}
    return dict(sorted(errors.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"), reverse=True))


# ---- Report ----------------------------------------------------------------------------------------------------------


class Report:
    """Rows as they come: printed, and written to both files at once, so that a killed run loses nothing."""

    def __init__(self, out, facts):
        self.out, self.printed = Path(out), None  # which table the screen is in the middle of
        self.content = {"facts": facts, "gradients": None, "summary": [], "tables": {}, "errors": []}
        for name, value in facts.items():
            print(f"{name:>22}  {value}")

    def row(self, table, name, **cells):
        """Add one row; cells that were not measured stay empty."""
        row = {"step": name, **cells}
        self.content["tables"].setdefault(table, []).append(row)
        if self.printed != table:
            print(f"\n{table}\n" + markdown_row(COLUMNS))
            self.printed = table
        print(markdown_row(shown(row)), flush=True)
        self.save()

    def summary(self, line):
        """A sentence for the head of the file."""
        self.content["summary"].append(line)
        print("\n" + line, flush=True)
        self.printed = None
        self.save()

    def failed(self, name, error):
        """Keep the whole traceback in the file; a line of it is enough on the screen."""
        self.content["errors"].append({"stage": name, "traceback": "".join(traceback.format_exception(error))})
        self.save()
        return f"failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:100]}"

    def save(self):
        """benchmark.json and benchmark.md, each replaced whole."""
        lines = ["# Training step", ""] + [f"- {name}: {value}" for name, value in self.content["facts"].items()]
        if self.content["gradients"]:
            lines += ["- gradient check: " + self.content["gradients"]["verdict"]]
        lines += [f"- **{line}**" for line in self.content["summary"]]
        for table, rows in self.content["tables"].items():
            lines += ["", f"## {table}", "", markdown_row(COLUMNS), "|---" + "|---:" * 6 + "|---|"]
            lines += [markdown_row(shown(row)) for row in rows]
        files = {"benchmark.md": "\n".join(lines) + "\n", "benchmark.json": json.dumps(self.content, indent=1)}
        for name, text in files.items():
            part = self.out / f".part-{name}"
            part.write_text(text, encoding="utf-8")
            part.replace(self.out / name)


def markdown_row(cells):
    """Aligned, so that the table can be read on the screen as well."""
    widths = (34, 9, 7, 5, 9, 8, 14, 0)
    first, *rest = (str(cell).rjust(w) if i else str(cell).ljust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
    return f"| {first} | " + " | ".join(rest) + " |"


def shown(row):
    """The cells of a row as text, in the order of COLUMNS."""
    digits = 1 if row.get("images/s", 0) < 10 else 0
    formats = {"images/s": f"{{:,.{digits}f}}", "ratio": "{:.2f}x", "± %": "{:.1f}", "ms/step": "{:.2f}",
               "peak GB": "{:.2f}", "of matmul rate": "{:.1%}"}  # fmt: skip
    return [formats.get(c, "{}").format(row[c]) if row.get(c) is not None else "" for c in COLUMNS]


class Bench:
    """What all stages share: settings, the device's matmul rate, the clock, and how a row is measured."""

    def __init__(self, args, report, rate):
        self.args, self.report, self.rate, self.device = args, report, rate, args.device
        self.compile_seconds, self.deadline = COMPILE_SECONDS, time.perf_counter() + 60 * args.minutes
        self.base, self.failures = {}, 0

    def has_time(self, compiled):
        """Whether another row, perhaps with a compilation, would end before the deadline."""
        needed = 2 * self.args.seconds + (self.compile_seconds if compiled else 0)
        return time.perf_counter() + needed < self.deadline

    def measure_row(self, table, name, make_step, flops, batch=None, compiled=False, floor=0.0):
        """Build, time and report one row; whatever goes wrong (no memory, say) becomes its note. Returns images/s or 0.

        Below `floor` images/s the row is marked as not kept."""
        batch = batch or self.args.batch
        if not self.has_time(compiled):
            self.report.row(table, name, note=f"not run: would take more than --minutes {self.args.minutes:g}")
            return 0.0
        clean(self.device)
        try:
            first, seconds, spread = measure(make_step(), self.args.seconds, self.device)
        except Exception as error:
            self.failures += 1
            self.report.row(table, name, note=self.report.failed(name, error))
            return 0.0
        rate, note = batch / seconds, "slower here: not kept" if batch / seconds < floor else ""
        if compiled:
            self.compile_seconds, note = 1.1 * first, note or f"compiled in {first:.0f} s"
        base = self.base.setdefault(table, rate)
        self.report.row(table, name, **{
            "images/s": rate, "ratio": rate / base, "± %": 50 * spread, "ms/step": 1000 * seconds,
            "peak GB": peak_gigabytes(self.device), "of matmul rate": rate * flops / self.rate, "note": note,
        })  # fmt: skip
        return rate


# ---- Stages ----------------------------------------------------------------------------------------------------------


def our_network(name):
    """Returns build() -> a fresh network of chapter 2, a velocity (x, t) -> v."""
    script = load("02_reflow")
    return partial(script.Flow, replace(script.Config(), **NETWORKS[name][0]), 3, 0)


def image_shape(net):
    """(c, h, w) of the images a network takes, ours or torchcfm's."""
    return net.model.shape if hasattr(net, "model") else (net.in_channels, net.image_size, net.image_size)


def random_images(net, n=2048):
    """Noise does as well as photographs: no kernel looks at the values."""
    return torch.randint(256, (n, *image_shape(net)), dtype=torch.uint8)


def check_gradients(bench, build):
    """Print the five worst parameters and the verdict. False if any parameter's gradient is far off or not finite."""
    cuda, compiled = bench.device == "cuda", bench.args.compile
    backend = "inductor" if compiled else "aot_eager"
    on = replace(OURS, compile=False) if cuda else Switches()
    limit = 0.2 if cuda else 1e-3  # bf16 is off by 0.1 to 5 %, a compiler bug by far more
    what = f"{backend} {'bf16 channels_last' if cuda else 'fp32'} against eager fp32"
    print(f"\nGradient check, {what}: |g - g0| / |g0| of each parameter, limit {limit:g}")
    clean(bench.device)
    try:
        errors = gradient_errors(build, bench.args.check_batch, bench.device, on, backend)
        bad = [name for name, error in errors.items() if not error <= limit]
        for name, error in itertools.islice(errors.items(), 5):
            print(f"{error:12.2e}  {name}")
        worst = next(iter(errors.items()))
        verdict = f"{'FAIL' if bad else 'PASS'} ({what}; worst of {len(errors)} parameters {worst[1]:.1e}, {worst[0]})"
    except Exception as error:
        errors, bad, verdict = {}, True, "FAIL (" + bench.report.failed("gradient check", error) + ")"
    print(verdict, flush=True)
    bench.report.content["gradients"] = {"verdict": verdict, "limit": limit, "errors": errors}
    bench.report.save()
    return not bad


def climb(bench, build, images, flops):
    """The ladder. Off CUDA a rung that slows down is shown but not kept. Returns the switches of the last rung."""
    on, best = Switches(), 0.0
    for name, switch, devices in LADDER:
        compiled = switch == "compile"
        if not (bench.args.compile if compiled else bench.device in devices.split()):
            hint = " unless asked for by --compile" if compiled else ""
            bench.report.row("Ladder", name, note=f"n/a on this device{hint}")
            continue
        tried = replace(on, **{switch: True}) if switch else on
        make, floor = partial(build_step, build, images, tried, bench), 0.0 if bench.device == "cuda" else 0.95 * best
        rate = bench.measure_row("Ladder", name, make, flops, compiled=compiled, floor=floor)
        if rate and rate >= floor:
            on, best = tried, rate
    return on


def build_step(build, images, on, bench, batch=None):
    """A fresh network and its step."""
    net = build()
    return our_step(net, net, images, on, batch or bench.args.batch, bench.device)


def extras(bench, build, images, flops, on):
    """What else might pay; each alone on top of the ladder, and only while there is time left to compile it."""


    def row(name, batch=bench.args.batch, **switches):
        make = partial(build_step, build, images, replace(on, **switches), bench, batch)
        bench.measure_row("Ladder", f"ladder, {name}", make, flops, batch=batch, compiled=True)

    if on.compile and bench.device == "cuda":
        for times in 4, 2:
            row(f"batch {times * bench.args.batch}", batch=times * bench.args.batch)
        row("force_layout_optimization", force_layout=True)
    if bench.args.autotune:
        row("max-autotune-no-cudagraphs", compile=True, autotune=True)


def compare_torchcfm(bench, arguments, on):
    """Their network under their step and under ours; ratio 1 is theirs."""
    table = "torchcfm's network"
    try:
        from torchcfm.models.unet.unet import UNetModelWrapper
    except ImportError as error:
        bench.report.row(table, "as torchcfm trains it", note=f"not run ({error}): pip install --no-deps torchcfm pot")
        return
    build = partial(UNetModelWrapper, **arguments)
    flops, images = training_flops(build, lambda net, x, t: net(t, x)), random_images(build())

    def ours():
        net = build()
        return our_step(net, lambda x, t: net(t, x), images, on, bench.args.batch, bench.device)

    theirs = partial(torchcfm_step, build(), images, bench.args.batch, bench.device)
    bench.measure_row(table, "as torchcfm trains it", theirs, flops)
    bench.measure_row(table, "our step on it", ours, flops, compiled=on.compile)


def inspect_step(bench, build, images, on):
    """CUDA only: does the CPU wait for the GPU, is the GPU ever idle, which kernels take the time? See profile.txt."""
    if not bench.has_time(compiled=True):
        return
    clean(bench.device)
    step = build_step(build, images, on, bench)
    measure(step, 0.1, bench.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(5):
            step()
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile() as profile:
        start = time.perf_counter()
        for _ in range(5):
            step()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    kernels = [e for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6 / elapsed
    layout = sum(e.self_device_time_total for e in kernels if "nchw" in e.key.lower()) / 1e6 / elapsed
    table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=100)
    (bench.report.out / "profile.txt").write_text(table, encoding="utf-8")
    waits = sum("called a synchronizing" in str(warning.message) for warning in caught)
    bench.report.summary(f"last rung: the CPU waited {waits} times in 5 steps; under the profiler the GPU was busy "
                         f"{busy:.0%} of the time, {layout:.0%} with changing layouts; profile.txt lists the kernels")


def summarise(bench):
    """The three numbers this is all about."""
    tables = bench.report.content["tables"]
    rows = {row["step"]: row for row in tables["Ladder"] if "ratio" in row}
    last = next((rows[name] for name, *_ in reversed(LADDER) if name in rows), None)
    if last:
        bench.report.summary(f"last rung ({last['step']}): {last['ratio']:.2f}x the first, {last['images/s']:,.0f} "
                             f"images/s, {last['of matmul rate']:.0%} of the bf16 matmul rate")
    theirs = [row for row in tables["torchcfm's network"] if "ratio" in row]
    if len(theirs) == 2:
        bench.report.summary(f"torchcfm's network: our step is {theirs[1]['ratio']:.2f}x as fast as theirs")


# ---- Main ------------------------------------------------------------------------------------------------------------


def parse_arguments(argv=None):
    """Flags, with defaults that depend on the device filled in."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: the best one here")
    parser.add_argument("--network", choices=("cifar", "quick"), help="default: cifar on CUDA, else quick")
    parser.add_argument("--batch", type=int, help="images per step (128; cifar off CUDA 4, quick off CUDA 64)")
    parser.add_argument("--seconds", type=float, help="measured per row (3)")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing that would end later than this (8)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA only")
    parser.add_argument("--autotune", action="store_true", help="also max-autotune-no-cudagraphs (minutes to compile)")
    parser.add_argument("--quick", action="store_true", help="smoke test: a toy network, 0.1 s per row")
    parser.add_argument("--out", default="runs/benchmark", help="folder for benchmark.md and .json (runs/benchmark)")
    args = parser.parse_args(argv)
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = args.device or next(name for name in has if has[name])
    if not has[args.device]:
        parser.error(f"--device {args.device}: torch finds no such device here")
    cuda = args.device == "cuda"
    args.network = "smoke" if args.quick else args.network or ("cifar" if cuda else "quick")
    if args.batch is None:
        args.batch = 8 if args.quick else 128 if cuda else 4 if args.network == "cifar" else 64
    if args.seconds is None:
        args.seconds = 0.1 if args.quick else 3.0
    if args.batch < 1 or not args.seconds > 0:
        parser.error(f"--batch {args.batch} and --seconds {args.seconds} must be positive")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    args.check_batch = min(args.batch, 32)
    args.compile = cuda if args.compile is None else args.compile
    return args


def gather_facts(args, rate, flops):
    """What a reader needs to judge the numbers."""
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu
    facts = {"device": f"{args.device} ({name})", "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    if args.device == "cuda":
        facts |= {"cuDNN": torch.backends.cudnn.version(), "triton": version("triton")}
    return facts | {"network": args.network, "batch": args.batch, "GFLOP per image": round(flops / 1e9, 3),
                    "bf16 matmul TFLOP/s": round(rate / 1e12, 3)}  # fmt: skip


def main(argv=None):
    """All stages, the cheap and the important ones first. Returns the exit code."""
    args = parse_arguments(argv)
    build = our_network(args.network)
    flops = training_flops(build, lambda net, x, t: net(x, t))
    size = 8192 if args.device == "cuda" else 256 if args.quick else 1024
    rate = matmul_rate(size, args.device, min(1, args.seconds))
    report = Report(args.out, gather_facts(args, rate, flops))
    bench, images = Bench(args, report, rate), random_images(build())
    passed = check_gradients(bench, build)
    on = climb(bench, build, images, flops)
    loop = lambda: scripts_step(build(), images, args.batch, args.device, args.compile)  # noqa: E731
    bench.measure_row("Ladder", "train() of the scripts", loop, flops, compiled=args.device == "cuda")
    compare_torchcfm(bench, NETWORKS[args.network][1], on)
    summarise(bench)
    if args.device == "cuda":
        try:
            inspect_step(bench, build, images, on)
        except Exception as error:
            print(report.failed("inspection", error))
    extras(bench, build, images, flops, on)
    print(f"\n{report.out / 'benchmark.md'} and benchmark.json written")
    return 0 if passed and not bench.failures else 1


if __name__ == "__main__":
    sys.exit(main())
