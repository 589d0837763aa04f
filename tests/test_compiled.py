"""The CUDA path on a CPU: every branch that asks for CUDA is taken, at tiny sizes.

Compiled, and compiled under bf16 autocast, the losses of chapters 2 to 5 give the gradients of plain float32; whole
runs compile no network again after its first batch; two processes take the steps of one.  Inductor itself compiles the
block that U-Nets are made of; elsewhere it would add minutes of C++, and its tracing and autograd stand for it.
"""

import copy
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial

import pytest
import torch
from benchmark import gradients, shake, worst_error
from conftest import ROOT, call, torchrun
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

BACKEND = "aot_eager"
COMMON = ("--compile --no-conditional --data-size 32 --steps 3 --reflow-steps 3 --shard 8 --eval-size 16 "
          "--pair-steps 2 --channels 4 --image-size 8 --mult 1 --attention 4 --batch 4 --log-every 2 --device cpu ")
TINY = {
    "02_reflow": COMMON + "--pairs 12",
    "03_improved_training": COMMON + "--pairs 12 --lpips-weights random --configs A G --real-steps 2 --real-pairs 16",
    "04_distill": COMMON + "--pairs 8 --lpips-weights random --distill-steps 4 --levels 20 --halvings 2",
}


def forced(name, autocast=True):
    """A script as a module in which a CPU counts as CUDA: for compiling and, unless told not to, for bf16."""
    places = r"(on_cuda = .*|enabled=[\w.]+) == \"cuda\"" if autocast else r"(on_cuda = .*) == \"cuda\""
    text, count = re.subn(places, r'\1 in ("cuda", "cpu")', (ROOT / f"{name}.py").read_text())
    assert count >= (3 if autocast else 1), "the script asks for CUDA in other words now"
    module = types.ModuleType(f"forced_{name}_{autocast}")
    module.__file__ = str(ROOT / f"{name}.py")
    sys.modules[module.__name__] = module                   # dataclasses look here
    exec(compile(text, module.__file__, "exec"), module.__dict__)
    return module


@pytest.fixture
def compiler(monkeypatch, request):
    """Module.compile without C++, which never gives up silently.  Returns the graphs it compiled, as they come."""
    kind = getattr(request, "param", BACKEND)
    graphs, original = [], nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend(kind)(graph, inputs)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend=backend, **options))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield graphs
    torch._dynamo.reset()


# ---- Gradients -------------------------------------------------------------------------------------------------------


def small_flow(chapter):
    """A network of chapters 2 to 4 whose every weight matters, the same every time, and pairs for it."""
    torch.manual_seed(0)
    config = replace(chapter.Config(), image_size=8, channels=8, mult=(1,), attention=(), compile=True)
    flow = shake(chapter.place(chapter.Flow(config, 3, 0), torch.device("cpu")))
    pair = lambda: (*torch.randn(2, 3, 3, 8, 8), None)  # noqa: E731
    return config, flow, pair


def image_losses(name, chapter):
    """A list of config, network, and name -> loss_fn of a chapter: what its networks learn by."""
    config, flow, pair = small_flow(chapter)
    if name == "02_reflow":
        return [(config, flow, {"every round": partial(chapter.pair_loss, draw=lambda n: pair(), n=3)})]
    perceptual = chapter.Perceptual("vgg", 32, "random")    # as in the large presets; bf16 disturbs a random squeeze
    if name == "03_improved_training":
        return [(config, flow, {row: partial(chapter.pair_loss, draw=pair, recipe=(
            times, partial(distance, perceptual=perceptual))) for row, (times, distance) in chapter.LADDER.items()
            if row in "ADEF"})]
    lesson = chapter.Lesson(pair, torch.no_grad()(copy.deepcopy(flow).forward), perceptual)
    flow_map = shake(chapter.place(chapter.widen(flow, config), torch.device("cpu")))
    return [(config, flow, {
        "rf": partial(chapter.distillation_loss, lesson=lesson, jumps=2),
        "progressive": partial(chapter.progressive_loss, lesson=lesson, steps=2),
        "consistency": partial(chapter.consistency_distillation_loss, lesson=lesson, times=torch.linspace(1, 0, 9)),
        "ict": partial(chapter.consistency_training_loss, lesson=lesson, levels=lambda step: 10),
    }), (config, flow_map, {"meanflow": partial(chapter.mean_flow_loss, lesson=lesson)})]


def latent_losses(chapter):
    """The same for chapter 5's networks."""
    config = replace(chapter.Config(), channels=(8,), attention=(1,), heads=2, vae_channels=(4,), compile=True)
    configs = chapter.tiny_configs(config, {"<|startoftext|>": 0, "<|endoftext|>": 1})
    torch.manual_seed(0)
    unet, text, vae = (shake(chapter.from_config(chapter.NETWORKS[name], configs[name]))
                       for name in ("unet", "text_encoder", "vae"))
    captioned = chapter.Captioned(copy.deepcopy(unet), text)
    frozen = copy.deepcopy(vae).requires_grad_(False)
    draw = lambda: (*torch.randn(2, 3, 4, 8, 8), torch.randn(3, 5, 8))  # noqa: E731
    distance = partial(chapter.picture_distance, frozen, chapter.Perceptual("vgg", 32, "random"))
    pictures = lambda: [torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8)]  # noqa: E731
    tokens = lambda: (torch.randn(3, 4, 8, 8), torch.randint(2, (3, 77)))  # noqa: E731
    student = partial(chapter.pair_loss, draw=draw)
    return [
        (config, vae, {"autoencoder": partial(chapter.vae_loss, draw=pictures, kl=3e-3)}),
        (config, captioned, {"teacher": partial(chapter.teacher_loss, draw=tokens, forget=lambda text: text)}),
        (config, unet, {"reflow": partial(student, loss=chapter.reflow_loss),
                        "distillation": partial(student, loss=partial(chapter.one_step_loss,
                                                                      distance=chapter.latent_distance)),
                        "by pictures": partial(student, loss=partial(chapter.one_step_loss, distance=distance))}),
    ]


@pytest.mark.parametrize("name", [*TINY, "05_text_to_image"])
def test_gradients_are_those_of_plain_float32(name, compiler):
    """Every parameter's within 2 % by relative norm if compiled; all together within 10 % under bf16 as well.

    Parameter by parameter bf16 says little at these sizes: where gradients nearly cancel, rounding is all that is left.
    """
    chapter = forced(name)
    cases = latent_losses(chapter) if name[:2] == "05" else image_losses(name, chapter)
    for config, plain, losses in cases:
        model = copy.deepcopy(plain).train()
        network, autocast, _ = chapter.accelerate(model, config)
        for what, loss in losses.items():
            loss = partial(loss, ema=None, step=0)
            reference = gradients(plain.train(), loss)
            for key in [key for key in reference if re.search(r"(to_k|k_proj)\.bias$", key)]:
                del reference[key]                          # softmax does not see them: 0, but for rounding
            error, worst = worst_error(gradients(network, loss), reference)
            assert error < 0.02, (what, worst, error)
            rounded = gradients(network, loss, autocast)
            assert worst_error(rounded, reference)[0] < 10, (what, "a gradient is missing, or not finite")
            error, _ = worst_error(*({"all": torch.cat([g[key].flatten() for key in reference])}
                                     for g in (rounded, reference)))
            assert 1e-4 < error < 0.1, (what, error)        # less would mean that bf16 was not on
    assert compiler


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor wants a C++ compiler on a CPU")
def test_inductor_itself_on_a_block(tmp_path, monkeypatch):
    """The block that a U-Net is made of: C++ of the real compiler, by the scripts' own call."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    chapter = forced("02_reflow")
    torch._dynamo.reset()
    plain = shake(chapter.place(chapter.UNetBlock(4, 4, 8, 0.0), torch.device("cpu")))
    block = copy.deepcopy(plain)
    chapter.compile_network(block, chapter.Config(compile=True))
    loss = lambda net: net(torch.randn(2, 4, 4, 4), torch.randn(2, 8)).square()  # noqa: E731
    error, worst = worst_error(gradients(block, loss), gradients(plain, loss))
    torch._dynamo.reset()
    assert error < 0.02, worst
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"


# ---- Whole runs ------------------------------------------------------------------------------------------------------


def first_call_may_compile(function):
    """The first call for an object compiles whatever it meets; every later one must find it compiled."""
    seen = {}

    def strict(self, *arguments, **named):
        stance = "fail_on_recompile" if id(self) in seen else "default"
        seen[id(self)] = self                               # kept alive, or its id would be given away again
        with torch.compiler.set_stance(stance):
            return function(self, *arguments, **named)
    return strict


@pytest.mark.parametrize("compiler", ["eager"], indirect=True)  # tracing alone: what there is to compile, and when
@pytest.mark.parametrize("name", TINY)                      # 05 has such a test of its own
def test_nothing_is_compiled_twice(name, tmp_path, monkeypatch, compiler):
    """Teacher, pairs, students, measurements: a network's first step and its first sampling batch compile, no other."""
    chapter = forced(name)
    monkeypatch.chdir(tmp_path)
    inner, stages = chapter.train, []

    def train(model, *arguments):
        stages.append(model)
        steps = inner(model, *arguments)
        yield next(steps)
        with torch.compiler.set_stance("fail_on_recompile"):
            yield from steps
    monkeypatch.setattr(chapter, "train", train)
    monkeypatch.setattr(chapter.Velocity, "__call__", first_call_may_compile(chapter.Velocity.__call__))
    if hasattr(chapter, "Perceptual"):                      # some methods change over to it along the way
        monkeypatch.setattr(chapter.Perceptual, "__call__", first_call_may_compile(nn.Module.__call__), raising=False)
    monkeypatch.setattr(chapter, "draw_samples", lambda *arguments: None)
    assert call(chapter, *TINY[name].split(), patch=monkeypatch) == 0
    assert len(compiler) >= 2 and len(stages) >= 2          # one graph for training, one for sampling, or more


# ---- Two processes ---------------------------------------------------------------------------------------------------

NETWORKS = "02_reflow", "04_distill", "05_text_to_image"    # 03 trains that of 02; of 04, flow maps
WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from torch import nn
from dataclasses import replace
import test_compiled as here
slices = int(sys.argv[2])
original = nn.Module.compile
nn.Module.compile = lambda self, **options: original(self, backend="aot_eager", **options)
result = {}
for name in here.NETWORKS:
    chapter = here.forced(name, autocast=False)
    chapter.make_optimizer = lambda model, config: torch.optim.SGD(model.parameters())  # Adam's first steps are signs
    cases = here.latent_losses(chapter)[2:] if name[:2] == "05" else here.image_losses(name, chapter)[-1:]
    for config, model, losses in cases:
        what = {"02": "every round", "04": "meanflow", "05": "reflow"}[name[:2]]
        loss, parts = losses[what], []
        config = replace(config, steps=2, warmup=0, lr=1.0, lr_decay="constant", accumulate=slices, device="cpu")
        rank, processes = (run := chapter.Run(replace(config, batch=12), name)).rank, run.world

        def loss_fn(network, ema, step):
            torch.manual_seed(100 * step + max(rank, len(parts) % slices))     # a slice and a process draw alike
            parts.append(step)
            return loss(network, ema, step)
        for _ in chapter.train(model, loss_fn, config):
            pass
        result |= {f"{name} {key}": p.detach() for key, p in model.named_parameters()}
torch.save(result, f"{processes}-{rank}.pt")
"""


def test_two_processes_take_the_steps_of_one_with_the_same_batch(tmp_path):
    """Compiled, and wrapped for several processes: after two steps the weights of all are those of one process."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "worker.py", ROOT / "tests", "2"]
    alone = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    both = torchrun("worker.py", ROOT / "tests", "1", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    joint, first, second = (torch.load(tmp_path / f"{file}.pt", weights_only=True) for file in ("1-0", "2-0", "2-1"))
    assert {key.split()[0] for key in joint} == set(NETWORKS) and joint.keys() == first.keys()
    for key in joint:
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], joint[key], rtol=0, atol=1e-5)
