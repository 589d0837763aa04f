"""The benchmark runs to its end on any machine, and its gradient check notices a compiler that is wrong."""

import json

import benchmark
import pytest
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd


def test_smoke(tmp_path):
    assert benchmark.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "benchmark.json").read_text())
    rows = {row["step"]: row for row in content["tables"]["Ladder"]}
    assert list(rows) == [name for name, *_ in benchmark.LADDER] + ["train() of the scripts"]
    for name, _, devices in benchmark.LADDER:
        assert ("images/s" in rows[name]) == ("cpu" in devices), name
        assert "images/s" in rows[name] or rows[name]["note"].startswith("n/a")
    assert content["gradients"]["verdict"].startswith("PASS") and not content["errors"]
    table = (tmp_path / "benchmark.md").read_text()
    assert all(name in table for name in rows) and "torchcfm" in table


def test_flops_are_those_of_the_papers_network():
    """42.4 GFLOP forward, three times that with backward."""
    flops = benchmark.training_flops(benchmark.our_network("cifar"), lambda net, x, t: net(x, t))
    assert flops == pytest.approx(127.1e9, rel=1e-3)


def test_wrong_gradient_is_found():
    def forward(graph, inputs):
        return make_boxed_func(graph)

    def backward(graph, inputs):
        def run(*arguments):
            gradients = list(graph(*arguments))
            gradients[5] = 1.5 * gradients[5]  # one tensor of many, off by half
            return gradients

        return make_boxed_func(run)

    build = benchmark.our_network("smoke")
    wrong = aot_autograd(fw_compiler=forward, bw_compiler=backward)
    errors = list(benchmark.gradient_errors(build, 4, "cpu", benchmark.Switches(), wrong).values())
    assert errors[0] == pytest.approx(0.5) and errors[1] < 1e-5


def test_failed_row_keeps_the_table(tmp_path):
    args = benchmark.parse_arguments(["--quick", "--device", "cpu", "--out", str(tmp_path)])
    bench = benchmark.Bench(args, benchmark.Report(tmp_path, {}), rate=1e12)

    def explode():
        raise RuntimeError("out of memory\nwith details")

    assert bench.measure_row("Ladder", "good", lambda: sum, 1.0) == 0
    assert bench.measure_row("Ladder", "bad", explode, 1.0) == 0
    assert bench.measure_row("Ladder", "better", lambda: lambda: None, 1.0) > 0
    rows = json.loads((tmp_path / "benchmark.json").read_text())["tables"]["Ladder"]
    assert "failed: TypeError" in rows[0]["note"] and rows[1]["note"] == "failed: RuntimeError: out of memory"
    assert bench.failures == 2 and rows[2]["images/s"] > 0


def test_deadline_is_kept(tmp_path):
    args = benchmark.parse_arguments(["--quick", "--device", "cpu", "--minutes", "0", "--out", str(tmp_path)])
    bench = benchmark.Bench(args, benchmark.Report(tmp_path, {}), rate=1e12)
    assert bench.measure_row("Ladder", "late", lambda: pytest.fail("started"), 1.0) == 0
    assert "not run" in bench.report.content["tables"]["Ladder"][0]["note"]


@pytest.mark.parametrize("flags", [["--bogus"], ["--batch", "0"], ["--seconds", "nan"], ["--network", "huge"]])
def test_wrong_flags(flags):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_arguments(flags)
    assert stop.value.code == 2
