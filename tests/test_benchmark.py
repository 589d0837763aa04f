"""The benchmark runs to its end on any machine, whatever a row does; its gradient check and its memory are right."""

import json
import sys

import benchmark
import pytest
import torch
from conftest import load
from torch import nn

ROWS = {"machine": 0, "train": 3, "pairs": 1, "lpips": 1, "sd": 1, "latency": 2}


def rows(out):
    return json.loads((out / "benchmark.json").read_text())["rows"]


@pytest.mark.parametrize("name", ROWS)
def test_stages(tmp_path, name):
    """Toy sizes, in this process."""
    for package in ("diffusers", "transformers") if name == "latency" else ():
        pytest.importorskip(package)
    args = benchmark.parse_arguments(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    precision, chunks = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    benchmark.STAGES[name][0](benchmark.Bench(args))
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = chunks
    assert len(rows(tmp_path)) == ROWS[name]
    timed = [row for row in rows(tmp_path) if not row["row"].startswith("gradients")]
    assert all(row["a second"] > 0 and row["ms"] > 0 for row in timed)
    assert [row["ratio"] for row in timed[:1]] == [1.0] * len(timed[:1])
    if name == "train":
        assert rows(tmp_path)[0]["note"].startswith("good")
    table = (tmp_path / "benchmark.md").read_text()
    assert all(row["row"] in table for row in rows(tmp_path))


def test_flops_are_those_of_the_papers_network():
    """42.4 GFLOP forward, three times that with backward."""
    script = load("02_reflow")
    config = script.Config(**benchmark.SIZES["cuda"]["ours"])
    flops = benchmark.training_flops(lambda: script.Flow(config, 3, 0), (3, 32, 32))
    assert flops == pytest.approx(127.1e9, rel=1e-3)


def test_a_wrong_gradient_is_found():
    good = {"a": torch.tensor([3.0, 4.0]), "b": torch.ones(2)}
    assert benchmark.worst_error(good, good) == (0.0, "a")
    assert benchmark.worst_error(good | {"b": torch.tensor([1.0, 1.5])}, good) == (pytest.approx(0.5 / 2 ** 0.5), "b")
    for broken in ({"a": good["a"]}, good | {"b": torch.tensor([1.0, float("nan")])}):
        assert benchmark.worst_error(broken, good) == (float("inf"), "b")


def test_a_wrong_gradient_stops_the_stage_that_trains(tmp_path, monkeypatch):
    args = benchmark.parse_arguments(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    monkeypatch.setattr(benchmark, "worst_error", lambda found, reference: (0.5, "conv0.bias"))
    with pytest.raises(ValueError, match=r"conv0.bias is off by 0.5"):
        benchmark.train(benchmark.Bench(args))
    assert rows(tmp_path)[0]["note"].startswith("WRONG")


@pytest.mark.parametrize("program, well, words", [
    ("", True, []), ("raise RuntimeError('out of memory')", False, ["failed: RuntimeError: out of memory"]),
    ("import nothing_of_this_name", True, ["not run: ModuleNotFoundError"]),
    ("import threading; threading.Event().wait()", False, ["given up after 1 s"])])
def test_a_stage_that_fails_or_hangs_becomes_a_row(tmp_path, program, well, words):
    assert benchmark.supervise([sys.executable, "-c", program], 1 if "wait" in program else 60, tmp_path, "x") == well
    notes = [row["note"] for row in rows(tmp_path)] if words else []
    assert len(notes) == len(words) and all(note.startswith(word) for note, word in zip(notes, words))


def test_only_skip_and_the_time_for_all_of_it(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(benchmark, "supervise", lambda command, limit, out, name: begun.append((name, limit)) or True)
    flags = ["--device", "cpu", "--out", str(tmp_path)]
    assert benchmark.main([*flags, "--only", "pairs", "train", "sd", "--skip", "train"]) == 0
    assert begun == [("pairs", 100), ("sd", 90)]
    assert benchmark.main([*flags, "--minutes", "0"]) == 0 and len(begun) == 2
    assert all(row["note"] == "not run: --minutes 0 are over" for row in rows(tmp_path))


@pytest.mark.parametrize("flags", [["--bogus"], ["--seconds", "-1"], ["--seconds", "nan"], ["--only", "nonsense"]])
def test_wrong_flags(flags):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_arguments(flags)
    assert stop.value.code == 2


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_kept_bytes_by_hand():
    """A linear layer keeps its input, ReLU its output, once though the next layer keeps it too; a square its input."""
    layers = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 30))
    kept = benchmark.Kept({p.untyped_storage()._cdata for p in layers.parameters()})
    x = torch.randn(7, 10)
    with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
        layers(x).square()
    assert kept.total() == 4 * 7 * (10 + 20 + 30)


def test_checkpoints_keep_inputs_and_the_largest_inside():
    small, large = nn.Sequential(nn.Linear(10, 10), nn.ReLU()), nn.Sequential(nn.Linear(10, 50), nn.ReLU())
    own = {p.untyped_storage()._cdata for layer in (small, large) for p in layer.parameters()}
    kept = benchmark.Kept(own)
    kept.checkpoint(large, kept.checkpoint(small, torch.randn(7, 10)))
    assert kept.total() == 4 * 7 * (10 + 10) + 4 * 7 * (10 + 50)    # two inputs; then large: its input again, and 50


def test_memory_of_a_preset():
    """Shapes alone, no GPU: chapter 2's networks are those of the preset, and half the slice keeps half as much."""
    row, = benchmark.memory_rows("02_reflow", "paper")
    assert row["trained"] == pytest.approx(55.7e6, rel=1e-3) and row["states"] == pytest.approx(1.114, rel=1e-3)
    assert row["fits"] == 1 and 5 < row["kept"] < 30
    tight, = benchmark.memory_rows("02_reflow", "paper", card=row["kept"])
    assert tight["fits"] == 2 and tight["kept then"] == pytest.approx(row["kept"] / 2, rel=0.1)


def test_memory_of_chapter_5_counts_no_finished_unet():
    """Teachers wait in host memory while a student learns: the card holds the student, text encoder and VAE alone."""
    script = load("05_text_to_image")
    stages = list(benchmark.latent_stages(script, script.Config()))
    assert len(stages) == 2                                 # reflow, distillation
    for _, model, frozen, *_ in stages:
        assert isinstance(model, script.UNet) and not any(isinstance(module, script.UNet) for module in frozen)
