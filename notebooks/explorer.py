"""Chapter 1 as a page to play with: drag a noise, and see where each of your own flows carries it.

    python notebooks/explorer.py runs/01_rectified_flow/quick           # writes notebooks/explorer.html
    python notebooks/explorer.py runs/mine --out mine.html

Reads a finished run of chapter 1, of any target, width and number of rounds.  The page is one file: it opens from disk
and asks no server for anything.  What it looks like and does stands in explorer_template.html; this file puts in
numbers: the networks' weights as float16, noises, data, the loss along t.  One network more is trained here, in a
minute or two: 2-RF on pairs that were shuffled, which shows that the pairing is the method.
"""
from __future__ import annotations

import argparse
import base64
import dataclasses
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
NOISES, DATA = 160, 400             # points that the page draws; the first NOISES of the data are the noises' partners
SHUFFLED_PAIRS = 16384              # pairs that are shuffled; all of a run's would take longer and show the same
SHUFFLED_STEPS = 600                # at most so many training steps on them
PLACE = '{"built": false}'          # what stands in the template where the numbers go


def load_chapter():
    """Chapter 1 as a module.  Its name starts with a digit, so that no import statement can spell it."""
    path = HERE.parent / "01_rectified_flow.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)     # dataclasses look here while loading
    spec.loader.exec_module(module)
    return module


rf = load_chapter()


# ---- Reading the run -------------------------------------------------------------------------------------------------


def read_run(folder):
    """Settings and results of a finished run.  UserError if the folder holds something else."""
    try:
        record = json.loads((folder / "run.json").read_text())
        settings = record["settings"] if record["script"] == "01_rectified_flow.py" else None
        names = {field.name for field in dataclasses.fields(rf.Config)}
        config = rf.Config(**{name: value for name, value in settings.items() if name in names})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise rf.UserError(f"{folder} holds no run of 01_rectified_flow.py") from None
    results = folder / "results.json"
    if not results.exists():        # it is written last
        raise rf.UserError(f"the run in {folder} is not finished; the command that began it continues it")
    return config, json.loads(results.read_text())["rounds"]


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


def build(folder):
    """All that the page needs of a run, as a dict for JSON."""
    config, rounds = read_run(folder)
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


def fill(template, content):
    """The template with the numbers in it.  A "<" must not stand in a script element, where it could end it."""
    if template.count(PLACE) != 1:
        raise rf.UserError(f"the template must hold {PLACE} once")
    return template.replace(PLACE, json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"))


def main(argv=None):
    """Read a run, train the shuffled network, write the page."""
    parser = argparse.ArgumentParser(description="Chapter 1 as a page to play with.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a finished run of chapter 1, such as runs/01_rectified_flow/quick")
    parser.add_argument("--out", type=Path, default=HERE / "explorer.html", help="the page (default %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        page = fill((HERE / "explorer_template.html").read_text(encoding="utf-8"), build(arguments.folder))
        with rf.replacing(arguments.out) as part:
            part.write_text(page, encoding="utf-8")
    except (rf.UserError, OSError) as error:
        print(f"error: {error}".splitlines()[0], file=sys.stderr)
        sys.exit(2)
    print(f"{arguments.out}: {len(page.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
