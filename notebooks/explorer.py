"""Chapters 1 and 4 as pages to play with: drag a noise, and see what your own networks make of it.

    python notebooks/explorer.py runs/01_rectified_flow/quick           # writes notebooks/explorer.html
    python notebooks/explorer.py runs/04_distill/quick                  # writes notebooks/slice.html
    python notebooks/explorer.py runs/mine --out mine.html

Reads a finished run of chapter 1, of any target, width and number of rounds.  The page is one file: it opens from disk
and asks no server for anything.  What it looks like and does stands in explorer_template.html; this file puts in
numbers: the networks' weights as float16, noises, data, the loss along t.  One network more is trained here, in a
minute or two: 2-RF on pairs that were shuffled, which shows that the pairing is the method.

Of a run of chapter 4 it makes slice_template.html into a page in the same way.  Chapter 4's networks are too big for
that, so what they draw goes in: the pictures of 17 x 17 noises, by every method, as one JPEG.
"""
from __future__ import annotations

import argparse
import base64
import dataclasses
import importlib.util
import io
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
NOISES, DATA = 160, 400             # points that the page draws; the first NOISES of the data are the noises' partners
SHUFFLED_PAIRS = 16384              # pairs that are shuffled; all of a run's would take longer and show the same
SHUFFLED_STEPS = 600                # at most so many training steps on them
SIDE, LABEL = 17, 22                # the slice: noises along its side; the pictures' class, here a blue cross on white
PLACE = '{"built": false}'          # what stands in the template where the numbers go


def load_chapter(name):
    """A chapter as a module.  Its name starts with a digit, so that no import statement can spell it."""
    path = HERE.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)     # dataclasses look here while loading
    spec.loader.exec_module(module)
    return module


rf = load_chapter("01_rectified_flow")


# ---- Reading the run -------------------------------------------------------------------------------------------------


def read_run(folder):
    """Script, settings and results of a finished run.  UserError if the folder holds something else."""
    try:
        record = json.loads((folder / "run.json").read_text())
        script, settings = record["script"], dict(record["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        script = None
    if script not in ("01_rectified_flow.py", "04_distill.py"):
        raise rf.UserError(f"{folder} holds no run of 01_rectified_flow.py or 04_distill.py")
    results = folder / "results.json"
    if not results.exists():        # it is written last
        raise rf.UserError(f"the run in {folder} is not finished; the command that began it continues it")
    return script, settings, json.loads(results.read_text())


def read_flow(folder, k, config):
    """The averaged network of round k."""
    flow = rf.VelocityMLP(config.width, config.depth)
    try:
        flow.load_state_dict(rf.load_checkpoint(folder / f"{k}-rf.pt")["model"])
    except (RuntimeError, KeyError):
        raise rf.UserError(f"{folder}/{k}-rf.pt does not fit the settings in run.json") from None
    return flow.requires_grad_(False)


# ---- The network that the run lacks ----------------------------------------------------------------------------------


def train_shuffled(first, config):
    """2-RF as it would be if the pairs were torn: the run's own z0 and z1, but who belongs to whom is lost.

    Like 2-RF it starts from the weights of 1-RF.  Returns the averaged network, its training steps, its loss along t.
    """
    config = dataclasses.replace(config, steps=min(config.steps, SHUFFLED_STEPS), batch=min(config.batch, 2048),
                                 accumulate=1)
    torch.manual_seed(rf.seed_for(config.seed, 2))          # as in round 2: on a CPU, the same noises
    z0, z1 = rf.make_pairs(first, torch.randn(config.pairs, 2)[:SHUFFLED_PAIRS], config.pair_steps)
    draw = partial(rf.draw_stored, z0, z1[torch.randperm(len(z1))])
    loss = partial(rf.pair_loss, draw=draw, n=config.batch)
    model = rf.VelocityMLP(config.width, config.depth)
    model.load_state_dict(first.state_dict())
    for step, _, ema in rf.train(model, loss, config, stream=2):
        if step % 100 == 0 or step == config.steps:
            print(f"\rshuffled pairs: step {step} of {config.steps}", end="", flush=True)
    print()
    by_time = rf.loss_by_time(ema.model, z0, z1[torch.randperm(len(z1))])       # shuffled anew: pairs it has not seen
    return ema.model, config.steps, by_time.tolist()


# ---- Writing the page ------------------------------------------------------------------------------------------------


def half(tensor):
    """The numbers of a tensor in a row, as little-endian float16 in base64."""
    return base64.b64encode(tensor.detach().numpy().astype("<f2").tobytes()).decode()


def rounded(numbers, digits=6):
    """Plain lists of short decimals, for JSON."""
    return np.asarray(numbers, dtype=float).round(digits).tolist()


def packed(name, flow, loss_by_t, noise):
    """A flow as the page reads it, and where it carries the noises (n, 2).

    shapes: (outputs, inputs) of every layer.  weights: layer after layer, the matrix row by row and then the bias.
    """
    linear = [layer for layer in flow.layers if isinstance(layer, torch.nn.Linear)]
    weights = torch.cat([part.flatten() for layer in linear for part in (layer.weight, layer.bias)])
    return {"name": name, "loss": rounded(loss_by_t), "shapes": [list(layer.weight.shape) for layer in linear],
            "weights": half(weights), "ends": half(rf.integrate(flow, noise, 100, "heun")[-1])}


def draw_points(config):
    """Noises (NOISES, 2), the same as in chapter 1's figures up to rounding, and data (DATA, 2)."""
    torch.manual_seed(config.seed)
    return torch.randn(NOISES, 2).half().float(), rf.sample_target(config.target, DATA)


def scenery(config, noise, data):
    """What the page draws besides flows: the points, half the side of the window, and the mixture if v* is known."""
    limit = 1.12 * torch.quantile(data.abs(), 0.995).item()                     # as in chapter 1's figures
    mean = rf.sample_target(config.target, 1 << 18).mean(0)
    content = {"noise": half(noise), "data": half(data), "mean": rounded(mean, 2), "limit": round(max(limit, 3.2), 2)}
    if config.target in rf.MIXTURES:
        means, std = rf.MIXTURES[config.target]
        content["mixture"] = {"means": rounded(means), "std": std}
    return content


def build(folder, settings, rounds):
    """All that the page needs of a run of chapter 1, as a dict for JSON."""
    names = {field.name for field in dataclasses.fields(rf.Config)}
    config = rf.Config(**{name: value for name, value in settings.items() if name in names})
    flows = [read_flow(folder, k, config) for k in range(1, config.rounds + 1)]
    noise, data = draw_points(config)
    content = {"built": True, "target": config.target.replace("_", " "), "width": config.width, "depth": config.depth,
               "steps": config.steps} | scenery(config, noise, data)
    content["flows"] = [packed(f"{k}-RF", flow, result["loss_by_t"], noise)
                        for k, (flow, result) in enumerate(zip(flows, rounds), 1)]
    content["floor"] = rounded(rounds[0].get("floor_by_t", []))                 # the loss of v* itself
    if config.rounds > 1:                                                       # else there is no 2-RF to spoil
        shuffled, steps, by_time = train_shuffled(flows[0], config)
        content["shuffled"] = packed("2-RF, pairs shuffled", shuffled, by_time, noise) | {"steps": steps}
    return content


# ---- The slice: chapter 4 --------------------------------------------------------------------------------------------


def path_of(name, folder, settings, given):
    """Where a network of the run lies.  1-RF and 2-RF may be others': as given, or chapter 2's beside the run."""
    file = {"1-RF": "1-rf", "2-RF": "2-rf", "progressive": "progressive-1"}.get(name, name) + ".pt"
    flag = {"1-RF": "teacher", "2-RF": "reflow"}.get(name)
    folder = folder.resolve()
    chapter_2 = folder.parent.parent / "02_reflow" / folder.name / file
    told = given.get(flag) or settings.get(flag)
    return Path(told) if told else chapter_2 if flag and not (folder / file).exists() else folder / file


def noises_between(corners):
    """Noises (SIDE * SIDE, ...), row by row, on the sphere through three: upper left, upper right, lower left.

    In weights that sum to 1 the three span a plane.  Divided by their length the weights keep a noise standard normal.
    """
    down, right = torch.meshgrid(torch.linspace(0, 1, SIDE), torch.linspace(0, 1, SIDE), indexing="ij")
    weights = torch.stack([1 - right - down, right, down], -1).reshape(-1, 3)
    return torch.einsum("nk,k...->n...", weights / weights.norm(dim=1, keepdim=True), corners)


def as_jpeg(sheets):
    """Sheets, each of SIDE x SIDE pictures (SIDE * SIDE, 3, S, S) in bytes, one below the other: a data URI."""
    rows = torch.cat(sheets).unflatten(0, (-1, SIDE))                           # (rows, SIDE, 3, S, S)
    pixels = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)            # (height, width, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=90, subsampling=0)       # every pixel with its colour
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def build_slice(folder, settings, methods, given):
    """All that the page needs of a run of chapter 4.  Its corners are three of the noises that the run measures by."""
    chapter = load_chapter("04_distill")
    chapter.UserError = rf.UserError                        # a copy of the same: main catches one
    run = SimpleNamespace(config=chapter.Config(), device=torch.device("cpu"))
    networks = {name: chapter.open_network(path_of(name, folder, settings, given), run)[0]
                for name in methods if name != "real data"}
    flow = chapter.Velocity(networks["1-RF"], run.config)
    classes = max(flow.classes, 1)
    index = LABEL % classes + classes * torch.arange(3)     # the run's pictures have the class: index % classes
    z0 = noises_between(chapter.pair_noise(chapter.seed_for(settings["seed"], 999), index, flow.shape))
    labels = index[:1].expand(len(z0))
    pictures = {"the noise": z0 / 3, "1-RF, 20 evaluations": chapter.sample(flow, z0, labels, 10, "heun")}
    for name, network in networks.items():
        print(f"\r{name:12}", end="", flush=True)
        pictures[name] = chapter.Generator(network, name)(z0, labels if flow.classes else None)
    print()
    caption = chapter.shape_captions()[index[0]] if settings["data"] == "shapes" and classes > 1 else ""
    return {"built": True, "side": SIDE, "size": flow.shape[-1], "names": list(pictures), "caption": caption,
            "corners": index.tolist(), "sprite": as_jpeg([chapter.to_bytes(x) for x in pictures.values()])}


# ---- The command -----------------------------------------------------------------------------------------------------


def fill(template, content):
    """The template with the numbers in it.  A "<" must not stand in a script element, where it could end it."""
    if template.count(PLACE) != 1:
        raise rf.UserError(f"the template must hold {PLACE} once")
    return template.replace(PLACE, json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))


def main(argv=None):
    """Read a run, compute what it lacks, write the page."""
    parser = argparse.ArgumentParser(description="Chapters 1 and 4 as pages to play with.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a finished run of chapter 1 or 4, such as runs/04_distill/quick")
    parser.add_argument("--teacher", help="chapter 4's 1-rf.pt, if it is not in the run or in chapter 2's beside it")
    parser.add_argument("--reflow", help="likewise 2-rf.pt")
    parser.add_argument("--out", type=Path, help="the page (default: notebooks/explorer.html or slice.html)")
    arguments = parser.parse_args(argv)
    try:
        script, settings, results = read_run(arguments.folder)
        name = "slice" if script == "04_distill.py" else "explorer"
        content = (build_slice(arguments.folder, settings, results["methods"], vars(arguments)) if name == "slice"
                   else build(arguments.folder, settings, results["rounds"]))
        page = fill((HERE / f"{name}_template.html").read_text(encoding="utf-8"), content)
        out = arguments.out or HERE / f"{name}.html"
        with rf.replacing(out) as part:
            part.write_text(page, encoding="utf-8")
    except (rf.UserError, OSError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
    print(f"{out}: {len(page.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
