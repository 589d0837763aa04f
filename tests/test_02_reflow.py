"""Chapter 2: pairs that can be made again from a number, stored whole, and a run that survives kills and mistakes.

The network and the data have tests of their own (test_unet.py, test_data.py); here is the rest.  Most runs happen
inside this process; kills and several processes need real ones.
"""

import itertools
import json
import math
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (ROOT, copy_run, driver, fixtures, kill_after_row, kill_in_shard, load, log_rows, one_line,
                      same_weights, torchrun, weights)
from PIL import Image
from scipy.stats import kstest

NAME = "02_reflow"
chapter = load(NAME)
TINY = ("--data-size 64 --no-conditional --steps 6 --reflow-steps 4 --pairs 20 --shard 8 --pair-steps 3 --eval-size 24 "
        "--channels 4 --image-size 8 --mult 1 1 --attention 4 --batch 4 --lr 2e-3 --log-every 2 --device cpu").split()
FILES = {"run.json", "1-rf.pt", "1-rf.csv", "2-rf.pt", "2-rf.csv", "pairs", "results.json", "samples.png"}
CPU = torch.device("cpu")
SHAPE = (3, 4, 4)


# ---- Noise that is a function of its index ---------------------------------------------------------------------------


def splitmix64(state):
    """The published generator (Steele, Lea, Flood 2014), in numpy's unsigned arithmetic: uint64 -> uint64."""
    z = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


GAMMA = np.uint64(0x9E3779B97F4A7C15)       # what the generator adds to its state per draw


def test_the_reference_is_splitmix64():
    """The first three outputs for seed 0, as found in every implementation's test."""
    outputs = splitmix64(np.arange(1, 4, dtype=np.uint64) * GAMMA)
    assert [int(x) for x in outputs] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("seed, first", [(0, 0), (1, 0), (chapter.seed_for(0, 2), 10 ** 6), (2 ** 32 - 1, 4 * 10 ** 6)])
def test_noise_is_splitmix64_and_box_muller(seed, first):
    size, index = math.prod(SHAPE), np.arange(first, first + 500, dtype=np.uint64)
    counter = index[:, None] * np.uint64(size) + np.arange(size, dtype=np.uint64)
    bits = splitmix64(counter * GAMMA + np.uint64(seed << 31))
    radius = np.sqrt(-2 * np.log(((bits >> np.uint64(40)) + 0.5) / 2 ** 24))
    expected = radius * np.cos(2 * math.pi * (bits & np.uint64(2 ** 24 - 1)) / 2 ** 24)
    noise = chapter.pair_noise(seed, torch.arange(first, first + 500), SHAPE)
    assert noise.dtype == torch.float32 and noise.shape == (500, *SHAPE)
    error = np.abs(noise.reshape(500, -1).numpy() - expected)
    assert error.max() < 1e-3 and np.quantile(error, 0.999) < 1e-5     # float32 rounds the smallest radii


def test_noise_is_standard_normal():
    noise = chapter.pair_noise(7, torch.arange(20000), SHAPE).double().flatten()     # 960,000 numbers
    assert noise.isfinite().all() and 4.5 < noise.abs().max() < 5.9
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:      # spread: variance of x^power
        assert abs((noise ** power).mean() - moment) < 4 * (spread / len(noise)) ** 0.5
    assert kstest(noise.numpy(), "norm").pvalue > 1e-3


def test_noise_has_no_correlations():
    """Between places, indices and seeds, of the values and of their squares."""
    index, limit = torch.arange(20000), 5 / 20000 ** 0.5
    noise = chapter.pair_noise(3, index, SHAPE).flatten(1).double()
    others = {"next index": noise.roll(1, 0), "index and place": noise.roll((1, 1), (0, 1)),
              "next seed": chapter.pair_noise(4, index, SHAPE).flatten(1).double(),
              "next round": chapter.pair_noise(chapter.seed_for(3, 2), index, SHAPE).flatten(1).double()}
    for a, b in [(noise, noise), *((noise, other) for other in others.values())]:
        for f in (torch.Tensor.clone, torch.square):
            both = torch.corrcoef(torch.cat([f(a), f(b)], 1).T)[:48, 48:]
            assert (both - torch.eye(48) * (a is b)).abs().max() < limit
    assert len(noise.unique()) > 0.9 * noise.numel()                    # 24 bits of angle: a few repeat


def test_noise_depends_on_seed_and_index_alone():
    """Not on the batch, the order, the generator of torch; a shape is only a way to arrange it."""
    state, index = torch.get_rng_state(), torch.arange(30)
    noise = chapter.pair_noise(5, index, SHAPE)
    assert torch.equal(noise, torch.cat([chapter.pair_noise(5, i, SHAPE) for i in index.split(7)]))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise[order], chapter.pair_noise(5, order, SHAPE))
    assert torch.equal(noise.flatten(1), chapter.pair_noise(5, index, (48,)))
    assert torch.equal(state, torch.get_rng_state())
    assert not (noise == chapter.pair_noise(6, index, SHAPE)).any()


# ---- The scaled velocity ---------------------------------------------------------------------------------------------


def some_network(x, c):
    """Anything that depends on both inputs."""
    return torch.sin(3 * x) + c[:, None] * torch.cos(x)


def denoise(network, y, sigma):
    """EDM's D(y; sigma) = c_skip y + c_out F(c_in y; ln(sigma) / 4) for data of standard deviation 1/2."""
    total = sigma ** 2 + 0.25
    return 0.25 / total * y + 0.5 * sigma / total.sqrt() * network(y / total.sqrt(), sigma[:, 0].log() / 4)


def test_velocity_points_from_x_to_the_denoised_picture():
    """x_t = (1 - t) x0 + t x1 is t times a noisy picture y with sigma = (1 - t) / t, so v = (D(y) - x_t) / (1 - t)."""
    torch.manual_seed(0)
    x, t = torch.randn(50, 6, dtype=torch.float64), torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    time = t[:, None]
    expected = (denoise(some_network, x / time, (1 - time) / time) - x) / (1 - time)
    torch.testing.assert_close(chapter.edm_velocity(some_network, x, t), expected, rtol=1e-10, atol=1e-10)


def test_velocity_at_the_ends_and_in_the_middle():
    x = torch.randn(2, 3, 4, 4)
    for t, of_x, of_f in [(0.0, -1, 0.5), (1.0, 1, 1), (0.5, -1.2, 0.894427)]:
        seen = []
        out = chapter.edm_velocity(lambda y, c: seen.append((y, c)) or torch.ones_like(y), x, torch.full((2,), t))
        torch.testing.assert_close(out, of_x * x + of_f, rtol=1e-5, atol=1e-5)
        (y, c), = seen
        assert c.shape == (2,) and c.isfinite().all()
        assert y.std() == pytest.approx(x.std().item() / ((1 - t) ** 2 + (t / 2) ** 2) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("s", [0.5, 0.1, 1.3])
def test_velocity_of_gaussian_data_is_the_closed_form(s):
    """For data ~ N(0, s^2), D(y) = s^2 y / (s^2 + sigma^2); solved for F, and F = 0 at s = 1/2."""
    def exact(x, c):
        variance = (4 * c[:, None]).exp() ** 2
        wanted = s ** 2 / (s ** 2 + variance) - 0.25 / (0.25 + variance)
        return wanted * (0.25 + variance) / (0.5 * variance.sqrt()) * x
    x, t = torch.randn(20, 4, dtype=torch.float64), torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    time = t[:, None]
    expected = (time * s ** 2 - (1 - time)) / (time ** 2 * s ** 2 + (1 - time) ** 2) * x
    torch.testing.assert_close(chapter.edm_velocity(exact, x, t), expected, rtol=1e-9, atol=1e-9)
    assert s != 0.5 or exact(x, t).abs().max() < 1e-12


def gaussian(x, t, labels=None):
    """The velocity of data ~ N(0, 1/4): a network that answers 0."""
    return chapter.edm_velocity(lambda y, c: torch.zeros_like(y), x, t)


def test_straightness_of_gaussian_data():
    """S = (2 - pi/2) s per number, and its integrand averages to it."""
    x = chapter.pair_noise(0, torch.arange(500), SHAPE)
    by_time = chapter.straightness_by_time(gaussian, x, 40)
    assert by_time.shape == (40,)
    assert by_time.mean().item() == pytest.approx(load("01_rectified_flow").straightness(gaussian, x, 40), rel=1e-5)
    assert by_time.mean().item() == pytest.approx((2 - math.pi / 2) / 2 * x.square().sum().item() / 500, rel=0.005)
    assert by_time[0] > 2 * by_time[20]


# ---- Pairs -----------------------------------------------------------------------------------------------------------


class Bent:
    """A velocity that depends on everything; `fail` makes that many-th evaluation raise."""

    shape, classes, evaluations, fail = SHAPE, 3, 0, None

    def __call__(self, x, t, labels):
        self.evaluations += 1
        if self.evaluations == self.fail:
            raise KeyboardInterrupt
        return torch.tanh(x.flip(3)) * (1 - t)[:, None, None, None] + 0.2 * labels[:, None, None, None] - 0.7 * x

    forward = __call__
    flow = property(lambda self: self)


def some_run(folder="never written", **other):
    """A run of 20 pairs in shards of 8, 8 and 4, in this folder."""
    small = dict(pairs=20, shard=8, pair_steps=3, image_size=4, device="cpu", eval_size=10, out=str(folder))
    return chapter.Run(chapter.Config(**small | other), chapter.__file__)


def make(folder, velocity=None, run=None, **other):
    """Make the pairs of round 2.  Returns the velocity, which counts its evaluations."""
    velocity = velocity or Bent()
    chapter.write_pairs(run or some_run(folder, **other), "2-rf", velocity, stream=2)
    return velocity


def content(folder):
    """Name and bytes of every shard of a run."""
    return {path.name: path.read_bytes() for path in (folder / "pairs" / "2-rf").glob("*")}


def test_pairs_lie_in_shards_and_each_is_where_its_noise_flows_to(tmp_path):
    make(tmp_path)
    assert sorted(content(tmp_path)) == ["00000.pt", "00001.pt", "00002.pt"]
    sizes = [len(torch.load(path, weights_only=True)["z1"]) for path in sorted(tmp_path.glob("pairs/2-rf/*"))]
    assert sizes == [8, 8, 4]
    z1, index = chapter.load_pairs(some_run(tmp_path), "2-rf"), torch.arange(20)
    assert z1.shape == (20, *SHAPE) and z1.dtype == torch.uint8
    noise = chapter.pair_noise(chapter.seed_for(0, 2), index, SHAPE)
    flow = partial(Bent(), labels=index % 3)
    exact = chapter.integrate(flow, noise, 3, "heun")[-1].clamp(-1, 1)
    assert (chapter.to_floats(z1) - exact).abs().max() < 1 / 255 + 1e-5
    assert z1.unique(dim=0).shape[0] == 20


def test_a_pair_is_a_function_of_seed_and_number():
    config, index = some_run().config, torch.arange(5, 9)
    z0, z1 = chapter.make_pairs(Bent(), 7, index, config)
    assert torch.equal(z0, chapter.pair_noise(7, index, SHAPE))
    assert torch.equal(z1, chapter.integrate(partial(Bent(), labels=index % 3), z0, 3, "heun")[-1])
    for i in range(4):                                                  # whoever is in the batch
        assert torch.allclose(chapter.make_pairs(Bent(), 7, index[i:i + 1], config)[1][0], z1[i], atol=1e-6)


@pytest.mark.parametrize("solver, evaluations", [("euler", 9), ("heun", 18), ("rk45", None)])
def test_solver_and_steps_of_the_settings_are_used(tmp_path, solver, evaluations):
    used = make(tmp_path, pair_solver=solver).evaluations              # three shards of three steps
    assert used == evaluations or evaluations is None and used > 30


@pytest.mark.parametrize("fail", [1, 7, 12, 18])
def test_a_stop_loses_the_shard_in_hand_and_a_rerun_makes_what_is_missing(tmp_path, fail):
    make(tmp_path / "whole")
    velocity = Bent()
    velocity.fail = fail
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", velocity)
    before = content(tmp_path / "cut")
    assert len(before) == (fail - 1) // 6
    assert make(tmp_path / "cut").evaluations == 6 * (3 - len(before))
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_deleted_shard_alone_is_made_again(tmp_path):
    make(tmp_path)
    before = content(tmp_path)
    (tmp_path / "pairs" / "2-rf" / "00001.pt").unlink()
    assert make(tmp_path).evaluations == 6 and content(tmp_path) == before
    assert make(tmp_path).evaluations == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_not_stored(tmp_path, value):
    """One bad number among many; as a byte it would look like any other."""
    class Diverged(Bent):
        def __call__(self, x, t, labels):
            return super().__call__(x, t, labels).index_fill(0, torch.tensor(3), value)
    with pytest.raises(chapter.UserError, match="not finite.*--lr"):
        make(tmp_path, Diverged())
    assert not content(tmp_path)


def test_processes_share_the_shards(tmp_path, monkeypatch):
    make(tmp_path / "alone")
    shares = []
    for rank in (0, 1):
        for folder in (tmp_path / str(rank), tmp_path / "both"):
            run = some_run(folder)
            run.rank, run.world, waits = rank, 2, []
            run.wait = lambda: waits.append(None)
            make(folder, run=run)
            assert len(waits) == 2                                      # the folder is claimed; all shards are there
        shares.append(content(tmp_path / str(rank)))
    assert [sorted(share) for share in shares] == [["00000.pt", "00002.pt"], ["00001.pt"]]
    assert shares[0] | shares[1] == content(tmp_path / "alone") == content(tmp_path / "both")


def spoil(path, how):
    """Make something else of a shard."""
    images = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(images[:-100])
    elif how == "cut in the heading":
        path.write_bytes(images[:50])
    elif how == "empty":
        path.touch()
    elif how == "text":
        path.write_text("no torch file")
    elif how == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    elif how == "a hostile pickle in torch's format":
        torch.save({"config": {}, "z1": Hostile()}, path)
    elif how == "no shard":
        torch.save([1, 2], path)
    elif how == "a folder":
        path.mkdir()


class Hostile:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return open, ("hacked", "w")


@pytest.mark.parametrize("how", ["missing", "truncated", "cut in the heading", "empty", "text", "hostile pickle",
                                 "a hostile pickle in torch's format", "no shard", "a folder"])
def test_a_spoiled_shard_is_named(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    spoil(tmp_path / "pairs" / "2-rf" / "00001.pt", how)
    with pytest.raises(chapter.UserError, match="00001.pt (is missing|.*delete it)"):
        chapter.load_pairs(some_run(tmp_path), "2-rf")
    assert not (tmp_path / "hacked").exists()


# ---- Batches ---------------------------------------------------------------------------------------------------------


def numbered(n):
    """n pictures in which the first pixel is the number of the picture, and the right half is darker."""
    images = torch.full((n, *SHAPE), 200, dtype=torch.uint8)
    images[..., 2:] = 20
    images[:, 0, 0, 0] = images[:, 0, 0, 3] = torch.arange(n)
    return images


@pytest.mark.parametrize("classes", [0, 3])
def test_stored_pairs_stay_together_and_are_never_mirrored(classes):
    torch.manual_seed(0)
    images = numbered(100)
    x0, x1, labels = chapter.draw_stored(images, 11, classes, 300)
    index = ((x1[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert len(index.unique()) > 90
    assert torch.equal(x1, chapter.to_floats(images[index]))
    assert torch.equal(x0, chapter.pair_noise(11, index, SHAPE))
    assert torch.equal(labels, index % 3) if classes else labels is None


@pytest.mark.parametrize("classes", [0, 3])
def test_pictures_are_mirrored_half_of_the_time(classes):
    torch.manual_seed(0)
    images, kinds = numbered(100), torch.arange(100) % 3
    x0, x1, labels = chapter.draw_independent(images, kinds if classes else None, 2000)
    index = ((x1[:, 0, 0, 0] + 1) * 127.5).round().long()
    mirrored = x1[:, 1, 1, 0] < x1[:, 1, 1, 3]
    assert 900 < mirrored.sum() < 1100 and len(index.unique()) == 100
    whole = chapter.to_floats(images[index])
    assert torch.equal(x1, torch.where(mirrored[:, None, None, None], whole.flip(3), whole))
    assert torch.equal(labels, kinds[index]) if classes else labels is None
    assert abs(x0.mean()) < 0.02 and abs(x0.std() - 1) < 0.02
    assert abs(torch.corrcoef(torch.stack([x0[:, 0, 0, 0], index.float()]))[0, 1]) < 0.1


def test_the_loss_asks_for_its_share_and_passes_the_labels():
    sizes, seen = [], []

    def draw(n):
        sizes.append(n)
        return torch.zeros(n, *SHAPE), torch.ones(n, *SHAPE), torch.arange(n)

    def model(x, t, labels):
        seen.append(labels)
        torch.testing.assert_close(x, t[:, None, None, None].expand_as(x))      # at x_t = t
        return torch.zeros_like(x)
    loss = chapter.pair_loss(model, None, 0, draw=draw, n=6)
    assert sizes == [6] and torch.equal(loss, torch.ones(6)) and torch.equal(seen[0], torch.arange(6))


def test_a_process_draws_its_share_of_the_batch(monkeypatch):
    for name, answer in [("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)]:
        monkeypatch.setattr(chapter.dist, name, lambda answer=answer: answer)
    assert some_run(batch=12).share == 6 and some_run(batch=12, accumulate=3).share == 2
    with pytest.raises(chapter.UserError, match="--batch 13"):
        some_run(batch=13)


def test_bytes_and_floats():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(chapter.to_bytes(chapter.to_floats(every)), every)
    assert chapter.to_floats(every).aminmax() == (-1, 1)
    assert chapter.to_bytes(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


# ---- Sampling and metrics --------------------------------------------------------------------------------------------


def tiny_config(*more):
    return chapter.parse_config(chapter.Config, [*TINY, *map(str, more)])


def tiny_run(*more):
    return chapter.Run(tiny_config(*more), chapter.__file__)


def tiny_velocity(classes=0):
    """A network whose weights are not those of the start, where its output is nearly 0."""
    torch.manual_seed(0)
    config = tiny_config()
    flow = chapter.Flow(config, 3, classes)
    for p in flow.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return chapter.Velocity(flow.eval(), config)


def test_pair_i_has_label_i_modulo_the_classes():
    velocity, index = tiny_velocity(classes=4), torch.arange(6, 11)
    noise = chapter.pair_noise(0, index, (3, 8, 8))
    labels = torch.tensor([2, 3, 0, 1, 2])
    expected = chapter.integrate(lambda x, t: velocity.flow(x, t, labels), noise, 2)[-1]
    torch.testing.assert_close(chapter.sample(velocity, noise, index, 2), expected)
    for i in range(5):                                                  # whoever is in the batch
        alone = chapter.sample(velocity, noise[i:i + 1], index[i:i + 1], 2)
        torch.testing.assert_close(alone[0], expected[i], rtol=1e-4, atol=1e-5)
    assert (chapter.sample(velocity, noise, index + 1, 2) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("method, steps, evaluations", [("euler", 1, 1), ("euler", 5, 5), ("heun", 5, 10)])
def test_evaluations_are_counted(method, steps, evaluations):
    velocity = tiny_velocity()
    for run in (tiny_run(), tiny_run("--shard", 24)):                   # three batches, one batch
        images, used = chapter.generate(velocity, run, steps, method)
        assert used == evaluations and images.shape == (24, 3, 8, 8) and images.abs().max() <= 1
    assert velocity.evaluations == 4 * evaluations and not images.requires_grad


def test_rk45_takes_more_evaluations_for_more_digits():
    used = [chapter.generate(tiny_velocity(), tiny_run(), digits, "rk45")[1] for digits in (2, 6)]
    assert 10 < used[0] < used[1]


def test_rk45_ends_where_many_small_steps_end():
    noise = chapter.pair_noise(0, torch.arange(3), SHAPE)
    many = chapter.integrate(gaussian, noise, 500, "heun")[-1]
    assert (chapter.integrate_adaptive(gaussian, noise) - many).abs().max() < 1e-3
    velocity, index = Bent(), torch.arange(3)
    exact = chapter.integrate_adaptive(partial(Bent(), labels=index % 3), noise, 1e-4)
    assert torch.equal(chapter.sample(velocity, noise, index, 4, "rk45"), exact) and velocity.evaluations > 10


def test_every_network_and_solver_starts_from_the_same_new_noise():
    class Still:
        """A velocity of 0 which remembers what it saw first."""
        shape, classes, evaluations = SHAPE, 0, 0

        def __call__(self, x, t, labels):
            self.seen = getattr(self, "seen", []) + [x] * (t[0] == 0).item()
            return torch.zeros_like(x)
    noise = chapter.pair_noise(chapter.seed_for(0, 999), torch.arange(16), SHAPE)       # two whole shards, cut to 10
    for method, steps in [("euler", 1), ("euler", 4), ("heun", 2)]:
        still = Still()
        images, _ = chapter.generate(still, some_run(), steps, method)
        assert torch.equal(torch.cat(still.seen), noise) and torch.equal(images, noise[:10].clamp(-1, 1))
    for stream in range(1, 11):                                         # not those of the pairs of any round
        assert not (noise == chapter.pair_noise(chapter.seed_for(0, stream), torch.arange(16), SHAPE)).any()


def test_the_distance_of_a_set_to_itself_is_zero():
    images, features = chapter.shapes(300, 8)[0], chapter.RandomFeatures()
    real = chapter.feature_moments(images, features, CPU)
    same = chapter.feature_moments(chapter.to_floats(images), features, CPU)
    assert chapter.frechet_from_moments(*same, *real) < 1e-6
    assert chapter.frechet_from_moments(*chapter.feature_moments(255 - images, features, CPU), *real) > 0.1


def test_moments_of_many_batches_are_those_of_one():
    images = chapter.shapes(1100, 4)[0]                                 # batches of 500, 500 and 100

    def features(x):
        assert len(x) <= 500
        return x.flatten(1)[:, :5]
    mean, cov = chapter.feature_moments(images, features, CPU)
    expected = chapter.moments(chapter.to_floats(images).flatten(1)[:, :5])
    torch.testing.assert_close(mean, expected[0])
    torch.testing.assert_close(cov, expected[1])


def test_evaluation_holds_every_number():
    features, run = chapter.RandomFeatures(), tiny_run()
    real = chapter.feature_moments(chapter.shapes(64, 8)[0], features, CPU)
    result, pictures = chapter.evaluate(tiny_velocity(classes=4), real, features, run)
    names = ["N = 1", "N = 2", "N = 4", "N = 8", "rk45"]
    assert set(result) == {"FD", "NFE", "S", "accuracy"}
    assert list(result["FD"]) == list(result["NFE"]) == list(result["accuracy"]) == list(pictures) == names
    assert [result["NFE"][name] for name in names[:4]] == [1, 2, 4, 8] and result["NFE"]["rk45"] > 10
    index = torch.arange(8)                                             # the first shard of the noises
    flow = partial(tiny_velocity(classes=4), labels=index % 4)
    noise = chapter.pair_noise(chapter.seed_for(0, 999), index, (3, 8, 8))
    assert result["S"] == pytest.approx(load("01_rectified_flow").straightness(flow, noise, 10))
    assert all(x.shape == (5, 3, 8, 8) for x in pictures.values())   # every fifth of 24
    json.dumps(result)
    images, _ = chapter.generate(tiny_velocity(classes=4), run, 2)
    distance = chapter.frechet_distance(features(images), features(chapter.to_floats(chapter.shapes(64, 8)[0])))
    assert result["FD"]["N = 2"] == pytest.approx(distance, rel=1e-3)


def test_accuracy_is_measured_on_the_same_samples_and_of_shapes_by_label_alone(monkeypatch):
    measured, features, run = [], chapter.RandomFeatures(), tiny_run()
    monkeypatch.setattr(chapter, "accuracy", lambda images: measured.append(images) or len(measured) / 10)
    real = chapter.feature_moments(chapter.shapes(64, 8)[0], features, CPU)
    result, _ = chapter.evaluate(tiny_velocity(classes=32), real, features, run)
    assert list(result["accuracy"].values()) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert torch.equal(measured[1], chapter.generate(tiny_velocity(classes=32), run, 2)[0])
    for classes, data in [(0, "shapes"), (3, "photos")]:
        run = tiny_run("--data", data)
        assert "accuracy" not in chapter.evaluate(tiny_velocity(classes=classes), real, features, run)[0]
    assert len(measured) == 5


# ---- Whole runs ------------------------------------------------------------------------------------------------------


here, run, finished = fixtures(NAME, TINY, figures=["draw_samples"])


def same_run(a, b, rounds=(1, 2)):
    """The weights of both rounds and all shards are equal, bit for bit."""
    same = same_weights(a, b, *(f"{k}-rf" for k in rounds))
    return same and content(a) == content(b)


ROWS = [("1-rf", "2"), ("1-rf", "4"), ("1-rf", "6"), ("2-rf", "2"), ("2-rf", "4")]


def test_a_run_leaves_exactly_its_files(finished):
    assert {path.name for path in finished.folder.iterdir()} == FILES and log_rows(finished.folder) == ROWS
    assert sorted(content(finished.folder)) == ["00000.pt", "00001.pt", "00002.pt"]
    assert not torch.equal(weights(finished.folder / "1-rf.pt"), weights(finished.folder / "2-rf.pt"))
    results = json.loads((finished.folder / "results.json").read_text())
    assert len(results["rounds"]) == 2 and results["samples"] == 24 and "random features" in results["distance"]
    assert not any("accuracy" in numbers for numbers in results["rounds"]) and "accuracy" not in finished.out
    with Image.open(finished.folder / "samples.png") as image:
        image.load()
        assert min(image.size) >= 400 and len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_the_second_round_starts_from_the_first_and_uses_the_averaged_network(run, here):
    """At learning rate 0 nothing moves; and the pairs of a trained run are those of its 1-rf.pt."""
    assert run(*TINY, "--lr", 0, "--out", "still")[0] == 0
    assert torch.equal(weights(here / "still" / "1-rf.pt"), weights(here / "still" / "2-rf.pt"))
    assert run(*TINY, "--lr", 0.05, "--warmup", 0, "--ema-decay", 0.5, "--out", "moving")[0] == 0
    remade(here / "moving", tiny_run("--ema-decay", 0.5, "--out", "again"))
    assert content(here / "again") == content(here / "moving")
    assert content(here / "again") != content(here / "still")


def remade(folder, run):
    """Make the pairs of a run again, in another, from the file of its first round."""
    flow = chapter.load_flow(folder / "1-rf.pt", run, 3, 0)
    chapter.write_pairs(run, "2-rf", chapter.Velocity(flow, run.config), stream=2)


def test_a_finished_run_is_measured_again_but_not_trained_again(finished, run, here, monkeypatch):
    folder = copy_run(finished, here)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in ("learning_rate", "make_pairs"):
        monkeypatch.setattr(chapter, name, None)
    code, out, err = run(*TINY)
    assert code == 0, err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "1-RF" in out and "2-RF" in out


def test_conditional_and_three_rounds(run, here):
    code, out, err = run(*TINY, "--conditional", "--rounds", 3, "--pair-solver", "euler")
    assert code == 0, err
    folder = here / "runs" / NAME / "quick"
    assert log_rows(folder) == ROWS + [("3-rf", "2"), ("3-rf", "4")] and "3-RF" in out
    assert {path.name for path in (folder / "pairs").iterdir()} == {"2-rf", "3-rf"}
    model = torch.load(folder / "3-rf.pt", weights_only=True)["model"]
    assert model["model.map_label.weight"].shape[1] == len(chapter.shape_captions())
    rounds = json.loads((folder / "results.json").read_text())["rounds"]
    assert len(rounds) == 3 and out.count("accuracy") == 1
    for numbers in rounds:
        assert list(numbers["accuracy"]) == list(numbers["FD"])
        assert all(0 <= share <= 1 for share in numbers["accuracy"].values())
        assert "".join(f"{share:10.3f}" for share in numbers["accuracy"].values()) in out


def draw_pictures(folder, kinds=("cats", "dogs"), each=4):
    """A folder of pictures in class sub-folders."""
    for kind, i in itertools.product(kinds, range(each)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 16), (60 * i, 100, 30)).save(folder / kind / f"{i}.png")


def test_ones_own_pictures(run, here):
    draw_pictures(here / "photos")
    code, out, err = run(*TINY, "--data", "photos", "--conditional")
    assert code == 0, err
    model = torch.load(here / "runs" / NAME / "quick" / "2-rf.pt", weights_only=True)["model"]
    assert model["model.map_label.weight"].shape[1] == 2
    results = json.loads((here / "runs" / NAME / "quick" / "results.json").read_text())["rounds"]
    assert not any("accuracy" in numbers for numbers in results) and "accuracy" not in out


BAD = {
    "empty folder": (["--data", "empty"], ["--data empty", "0 readable"]),
    "no such folder": (["--data", "nowhere"], ["nowhere", "No such file or directory"]),
    "one picture": (["--data", "single"], ["--data single", "1 readable"]),
    "one shape": (["--data-size", 1], ["--data-size 1"]),
    "no CIFAR-10": (["--data", "cifar10", "--data-dir", "somewhere"], ["somewhere", "--download"]),
    "no Inception network": (["--fid", "--data-dir", "somewhere"], ["somewhere", "--download"]),
    "no pairs": (["--pairs", 0], ["--pairs 0"]),
    "size 12": (["--image-size", 12], ["image-size", "12"]),
    "too many levels": (["--mult", 1, 1, 1, 1, 1], ["mult"]),
    "6 channels": (["--channels", 6], ["channels"]),
    "48 channels, then 96": (["--channels", 48, "--mult", 1, 2], ["channels"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_and_leaves_no_run(run, here, name):
    (here / "empty").mkdir()
    draw_pictures(here / "single", ["cat"], 1)
    args, words = BAD[name]
    code, _, err = run(*TINY, *args, "--out", "new/run")
    assert code == 2
    one_line(err, *words)
    assert not (here / "new").exists()


def test_other_settings_do_not_continue_a_run(finished, run, here):
    folder = copy_run(finished, here)
    for flag, value, words in [("--lr", 0.5, "lr=0.002"), ("--blocks", 2, "blocks=1"), ("--pair-steps", 4, "steps=3")]:
        code, _, err = run(*TINY, flag, value)
        assert code == 2
        one_line(err, words, "--fresh")
    assert same_run(folder, finished.folder)


@pytest.mark.parametrize("change", [lambda: Path("photos/cat").rename("photos/tiger"),
                                    lambda: Path("photos/cat/0.png").unlink()], ids=["a class", "a picture"])
def test_a_run_goes_on_with_the_same_pictures_alone(run, here, monkeypatch, change):
    """Their folder may be spelled in any way."""
    monkeypatch.setattr(chapter, "report", lambda *arguments: None)
    draw_pictures(here / "photos", ["cat", "dog"], 8)
    assert run(*TINY, "--data", "photos")[0] == 0
    for path in ("photos/", "./photos", here / "photos"):
        code, _, err = run(*TINY, "--data", path)
        assert code == 0, err
    change()
    code, _, err = run(*TINY, "--data", "photos")
    assert code == 2
    one_line(err, "pictures=sha256:")


def test_a_class_may_have_any_name_in_a_figure(tmp_path):
    names = ["as $a", "as $\\frac{a$", "as äpfel 🍎"]
    chapter.draw_samples({name: torch.zeros(2, 3, 8, 8) for name in names}, tmp_path / "figure.png")
    assert Image.open(tmp_path / "figure.png").size[0] > 100


# ---- Kills, stops, full disks ----------------------------------------------------------------------------------------

UNMEASURED = "chapter.report = lambda *arguments: None"


def test_killed_in_every_stage_and_rerun_gives_the_same_bits(finished, run, here):
    """kill -9 between log row and checkpoint of 1-RF, within the second shard, between row and checkpoint of 2-RF."""
    folder = here / "runs" / NAME / "quick"
    moments = [(kill_after_row("1-rf", 4), "1-rf", 2, 0), (kill_in_shard(2), "1-rf", 6, 1),
               (kill_after_row("2-rf", 4), "2-rf", 2, 3)]
    for spy, stage, step, shards in moments:
        code = driver(NAME, UNMEASURED, spy)
        result = subprocess.run([sys.executable, "-c", code, *TINY], cwd=here, capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert chapter.load_checkpoint(folder / f"{stage}.pt")["step"] == step
        assert len(list((folder / "pairs").glob("2-rf/0*.pt"))) == shards
    assert run(*TINY)[0] == 0
    assert same_run(folder, finished.folder) and log_rows(folder) == ROWS
    assert (folder / "results.json").read_text() == (finished.folder / "results.json").read_text()
    assert not list(folder.rglob("*part*"))


def test_sigterm_while_making_pairs_finishes_the_shard(finished, run, here, monkeypatch):
    folder = copy_run(finished, here, "pairs", "2-rf.pt")
    inner = chapter.sample

    def sample(velocity, z0, index, *rest):
        if index[0] == 8:
            signal.raise_signal(signal.SIGTERM)
        return inner(velocity, z0, index, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(chapter, "sample", sample)
        before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("not postponed"))
        try:
            code, _, err = run(*TINY)
        finally:
            signal.signal(signal.SIGTERM, before)
    assert code == 130 and err.strip().splitlines()[-1].startswith("stopped")
    assert sorted(content(folder)) == ["00000.pt", "00001.pt"]
    assert run(*TINY)[0] == 0
    assert same_run(folder, finished.folder)


def test_a_full_disk_while_making_pairs_is_one_line(finished, run, here):
    """No file may grow past 1000 bytes; with room again the run goes on as if nothing had been."""
    resource = pytest.importorskip("resource")
    folder = copy_run(finished, here, "pairs", "2-rf.pt")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        code, _, err = run(*TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    one_line(err, "cannot write", "00000.pt")
    assert not content(folder)
    assert run(*TINY)[0] == 0
    assert same_run(folder, finished.folder)


def test_a_spoiled_shard_stops_the_run(finished, run, here):
    folder = copy_run(finished, here, "2-rf.pt")
    spoil(folder / "pairs" / "2-rf" / "00001.pt", "truncated")
    code, _, err = run(*TINY)
    assert code == 2
    one_line(err, "00001.pt", "delete it")
    (folder / "pairs" / "2-rf" / "00001.pt").unlink()
    assert run(*TINY)[0] == 0
    assert same_run(folder, finished.folder)


@pytest.mark.parametrize("lr", ["1e30", "1e3"])
def test_an_absurd_learning_rate_makes_no_absurd_pairs(run, here, lr):
    """A network whose samples are not finite: one line, and no shard that a byte would make look like a picture."""
    code, _, err = run(*TINY, "--lr", lr, "--warmup", 0, "--lr-decay", "constant", "--out", "run")
    assert lr != "1e30" or code == 2
    if code:
        assert code == 2 and "--lr" in err and "Traceback" not in err
        assert not content(here / "run")


# ---- A given teacher -------------------------------------------------------------------------------------------------


def test_a_teacher_takes_the_place_of_the_first_round(finished, run, here):
    """1-RF is read, not trained; all that follows is as in the run that trained it."""
    code, _, err = run(*TINY, "--teacher", finished.folder / "1-rf.pt")
    assert code == 0, err
    folder = here / "runs" / NAME / "quick"
    assert log_rows(folder) == ROWS[3:] and same_run(folder, finished.folder, rounds=[2])
    assert (folder / "results.json").read_text() == (finished.folder / "results.json").read_text()


def bad_teacher(how, finished):
    """Write something that is no teacher for this run to "teacher.pt"."""
    path, good = Path("teacher.pt"), torch.load(finished.folder / "1-rf.pt", weights_only=True)
    if how == "of chapter 1":
        first = load("01_rectified_flow")
        config, model = asdict(first.Config()), first.VelocityMLP()
        first.save_checkpoint(path, config=config, model=model.state_dict(), step=1, log=[])
    elif how == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "truncated":
        path.write_bytes((finished.folder / "1-rf.pt").read_bytes()[:-500])
    elif how == "a folder":
        path.mkdir()
    elif how == "a hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    elif how == "a hostile pickle in torch's format":
        torch.save(good | {"model": Hostile()}, path)
    elif how == "without weights":
        torch.save({"config": good["config"]}, path)
    elif how == "with other weights":
        torch.save(good | {"model": {name: p.repeat(2) for name, p in good["model"].items() if p.ndim == 1}}, path)
    elif how == "with strange weights":
        torch.save(good | {"model": [1, 2]}, path)
    elif how == "with strange settings":
        torch.save(good | {"config": 3}, path)
    elif how == "half trained":
        torch.save(good | {"ema": good["model"], "optimizer": {}}, path)


@pytest.mark.parametrize("how", ["missing", "of chapter 1", "random bytes", "truncated", "a folder", "a hostile pickle",
                                 "a hostile pickle in torch's format", "without weights", "with other weights",
                                 "with strange weights", "with strange settings", "half trained"])
def test_a_bad_teacher_is_one_line_and_leaves_no_run(finished, run, here, how):
    bad_teacher(how, finished)
    code, _, err = run(*TINY, "--teacher", "teacher.pt")
    assert code == 2
    one_line(err, "teacher.pt")
    assert not (here / "hacked").exists() and not (here / "runs").exists()


@pytest.mark.parametrize("args, flag", [
    (["--channels", 8], "--channels 4"), (["--image-size", 16], "--image-size 8"), (["--mult", 1, 2], "--mult"),
    (["--blocks", 2], "--blocks 1"), (["--attention", 8], "--attention"), (["--conditional"], "--conditional False"),
    (["--data", "grey"], None)], ids=lambda value: " ".join(map(str, value or [])))
def test_a_teacher_of_another_network_names_the_flag(finished, run, here, args, flag):
    draw_pictures(here / "grey")
    code, _, err = run(*TINY, "--teacher", finished.folder / "1-rf.pt", "--out", "new", *args)
    if flag is None:                            # other pictures of the same size may well learn from it
        assert code == 0, err
    else:
        assert code == 2 and not (here / "new").exists()
        one_line(err, "1-rf.pt", flag)


def test_a_teacher_of_other_classes_is_one_line(run, here):
    draw_pictures(here / "three", ["a", "b", "c"], 2)
    config = tiny_config("--conditional")
    torch.save({"config": asdict(config), "model": chapter.Flow(config, 3, 4).state_dict()}, "4.pt")
    code, _, err = run(*TINY, "--conditional", "--data", "three", "--teacher", "4.pt", "--out", "new")
    assert code == 2 and not (here / "new").exists()
    one_line(err, "4.pt", "map_label")


# ---- Several processes -----------------------------------------------------------------------------------------------


def test_two_processes_run_the_whole_script(here):
    """To the end, with one table; their pairs are those that one process makes of the same 1-rf.pt."""
    result = torchrun(ROOT / f"{NAME}.py", *TINY, "--out", "run", cwd=here)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (here / "run").iterdir()} == FILES and log_rows(here / "run") == ROWS
    assert result.stdout.count("evaluations; S") == 1
    for numbers in json.loads((here / "run" / "results.json").read_text())["rounds"]:
        assert all(math.isfinite(x) for x in [*numbers["FD"].values(), numbers["S"]])
    remade(here / "run", tiny_run("--out", "again"))
    theirs, ours = (chapter.load_pairs(tiny_run("--out", folder), "2-rf").int() for folder in ("run", "again"))
    assert (theirs - ours).abs().max() <= 1             # other numbers of threads may round otherwise


# ---- What a GPU needs, seen on a CPU ---------------------------------------------------------------------------------


def small_velocity(**other):
    """A Velocity of four channels for the pictures of some_run, with weights that are not nearly zero."""
    config = chapter.Config(channels=4, mult=(1, 1), attention=(2,), image_size=4, device="cpu", **other)
    flow = chapter.Flow(config, 3, 3).eval().requires_grad_(False)
    for p in flow.parameters():
        p += 0.1 * torch.randn_like(p)
    return chapter.Velocity(flow, config)


def test_the_noise_label_is_right_to_the_last_digits():
    """c_noise = ln((1 - t) / t) / 4, compared with float64, where 1 - t would round away t."""
    t = torch.logspace(-5, math.log10(0.5), 200)[:-1]
    seen = []
    chapter.edm_velocity(lambda y, c: seen.append(c) or y, torch.zeros(len(t), 1), t)
    exact = torch.log((1 - t.double()) / t.double()) / 4
    assert ((seen[0].double() - exact).abs() / exact.abs().clamp(min=0.1)).max() < 1e-6


def test_rk45_sees_no_low_precision(monkeypatch):
    """Neither autocast nor TF32 nor a compiled graph; afterwards all is as before."""
    velocity = small_velocity()
    velocity.autocast = torch.autocast("cpu", torch.bfloat16)
    modes = []

    def forward(x, t, labels):
        modes.append((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision(),
                      torch.backends.cudnn.allow_tf32))
        return -x
    monkeypatch.setattr(velocity.flow, "forward", forward)
    velocity.flow.compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    torch.set_float32_matmul_precision("high")
    chapter.sample(velocity, torch.ones(2, *SHAPE), torch.arange(2), 3, "rk45")
    assert set(modes) == {(False, "highest", False)}
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32


def test_a_finished_network_sees_batches_of_one_size(tmp_path):
    """20 pairs and 10 samples in shards of 8, and straightness: nothing to compile after the first batch."""
    run, velocity = some_run(tmp_path), small_velocity()
    torch._dynamo.reset()
    velocity.flow.compile(dynamic=False, backend="aot_eager")
    velocity(torch.zeros(8, *SHAPE), torch.zeros(8), torch.zeros(8, dtype=torch.long))
    images = torch.randint(256, (50, *SHAPE), dtype=torch.uint8)
    features = chapter.RandomFeatures()
    with torch.compiler.set_stance("fail_on_recompile"):
        chapter.write_pairs(run, "2-rf", velocity, stream=2)
        chapter.evaluate(velocity, chapter.feature_moments(images, features, run.device), features, run)
    torch._dynamo.reset()


def test_fresh_never_deletes_what_the_run_is_to_read(finished, run, here):
    folder = copy_run(finished, here)
    before = (folder / "1-rf.pt").read_bytes()
    code, _, err = run(*TINY, "--teacher", folder / "1-rf.pt", "--fresh")
    assert code == 2 and (folder / "1-rf.pt").read_bytes() == before and (folder / "2-rf.pt").exists()
    one_line(err, "--fresh would delete --teacher")


@pytest.mark.parametrize("z1", [torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.rand(8, 3, 8, 8),
                                torch.zeros(8, 3, 16, 16, dtype=torch.uint8), None], ids=["few", "float", "large", "none"])
def test_a_shard_of_other_pairs_is_one_line(finished, run, here, z1):
    folder = copy_run(finished, here, "2-rf.pt")
    chapter.save_checkpoint(folder / "pairs/2-rf/00000.pt", config={}, **({} if z1 is None else {"z1": z1}))
    code, _, err = run(*TINY)
    assert code == 2
    one_line(err, "00000.pt holds other pairs")
