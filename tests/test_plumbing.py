"""What every run promises: settings checked, files whole, stops and crashes without loss, mistakes told in one line.

Most tests run the chapter inside this process, where the exit code and both streams are seen just as well; signals,
kills, full disks and several processes need real ones.
"""

import dataclasses
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
import torch
from conftest import (ROOT, call, copy_run, driver, fixtures, kill_after_row, load, log_rows, one_line, run_script,
                      same_weights, torchrun, weights)
from PIL import Image
from sync_copies import scripts

NAME = "01_rectified_flow"
chapter = load(NAME)
TINY = ("--steps 20 --rounds 2 --eval-size 200 --w2-size 64 --pairs 256 --width 8 --batch 64 "
        "--log-every 5 --device cpu").split()
FILES = {"run.json", "1-rf.pt", "1-rf.csv", "2-rf.pt", "2-rf.csv", "results.json", "paths.png", "flow.gif"}

here, run, finished = fixtures(NAME, TINY, figures=["draw_paths"])


def start(*args, cwd, spy=None, **options):
    """Start the script, or the script with a spy in it and without its figures, as a process of its own."""
    no_figures = "chapter.draw_paths = lambda *arguments: None"
    command = [str(ROOT / f"{NAME}.py")] if spy is None else ["-c", driver(NAME, no_figures, spy)]
    return subprocess.Popen([sys.executable, *command, *args], cwd=cwd, stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process):
    """Wait for the end.  Returns exit code, standard output, standard error."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def log(folder):
    """Stage, step and loss of every row of the logs."""
    return log_rows(folder, 3)


def leftovers(folder):
    """Drafts that were never renamed."""
    return [path.name for path in Path(folder).rglob("*part*")]


# ---- Settings --------------------------------------------------------------------------------------------------------


def test_flags_override_the_preset_and_the_preset_overrides_defaults():
    default = chapter.parse_config(chapter.Config, [])
    assert default == chapter.Config() and default.preset == "quick"
    preset = chapter.Config.presets["gpu"]
    config = chapter.parse_config(chapter.Config, ["--preset", "gpu", "--steps", "7"])
    assert config.steps == 7 and config.preset == "gpu"
    for name in set(preset) - {"steps"}:
        assert getattr(config, name) == preset[name] != getattr(default, name)
    config = chapter.parse_config(chapter.Config, ["--no-compile", "--lr", "1e-3", "--out", "a b", "--fresh"])
    assert (config.compile, config.lr, config.out, config.fresh) == (False, 1e-3, "a b", True)


def test_every_setting_is_a_flag_with_a_help_text(run):
    code, out, err = run("--help")
    assert code == 0 and not err
    notes = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(chapter.Config), re.MULTILINE))
    text = " ".join(out.split())
    for field in chapter.dataclasses.fields(chapter.Config):
        assert "--" + field.name.replace("_", "-") in text and notes[field.name] in text


@pytest.mark.parametrize("args", [
    ("--stpes", "5"), ("--step", "5"), ("extra",), ("--steps",), ("--steps", "0"), ("--steps", "-3"),
    ("--steps", "1e3"), ("--steps", "many"), ("--steps", "2.5"), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "-0.5"),
    ("--lr", "fast"), ("--ema-decay", "1.5"), ("--target", "nine_gaussians"), ("--preset", "paper"), ("--rounds", "0"),
    ("--rounds", "11"), ("--w2-size", "100000"), ("--device", "abacus"), ("--seed", "-1"), ("--seed", "9" * 30),
    ("--lr-decay", "linear"), ("--batch", "10", "--accumulate", "3"),
], ids=" ".join)
def test_a_wrong_setting_is_one_line_and_leaves_nothing(run, here, args):
    code, out, err = run(*args)
    assert code == 2
    one_line(err, args[0].lstrip("-"))
    assert not list(here.iterdir())


@dataclasses.dataclass
class Ranges:
    """A Config with a range inside a tuple and one of its own."""
    preset: Literal["quick"] = "quick"                      # size
    sizes: Annotated[tuple, 1, 8] = (1, 2)                  # 100 % of them
    share: Annotated[float, 0, 1] = 0.5                     # between
    presets: ClassVar = {"quick": {}}


def test_ranges_hold_within_tuples_and_percent_signs_in_help(capsys):
    assert chapter.parse_config(Ranges, ["--sizes", "3", "4"]).sizes == [3, 4]
    for args in (["--sizes", "3", "9"], ["--sizes", "0"], ["--share", "1.01"], ["--share", "nan"]):
        with pytest.raises(SystemExit) as stop:
            chapter.parse_config(Ranges, args)
        assert stop.value.code == 2
        one_line(capsys.readouterr().err, args[0], "outside")
    with pytest.raises(SystemExit) as stop:
        chapter.parse_config(Ranges, ["--help"])
    assert stop.value.code == 0 and "100 % of them (default (1, 2))" in capsys.readouterr().out


def test_a_wrong_setting_of_the_real_script(tmp_path):
    result = run_script(NAME, "--steps", "0", cwd=tmp_path)
    assert result.returncode == 2 and not result.stdout
    one_line(result.stderr, "--steps 0")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_device_is_one_line_and_leaves_nothing(run, here):
    code, _, err = run("--device", "cuda")
    assert code == 2 and not list(here.iterdir())
    one_line(err, "cuda")


# ---- What a run leaves behind ----------------------------------------------------------------------------------------


def test_a_run_leaves_exactly_its_files(finished):
    assert {path.name for path in finished.folder.iterdir()} == FILES


def test_run_json_tells_what_made_the_run(finished):
    record = json.loads((finished.folder / "run.json").read_text())
    assert record["script"] == f"{NAME}.py" and record["torch"] == torch.__version__
    assert {"python", "system", "revision"} <= set(record)
    expected = chapter.parse_config(chapter.Config, TINY)
    assert record["settings"] == chapter.dataclasses.asdict(expected)


def test_each_stage_has_a_log_with_a_row_per_line_on_the_screen(finished):
    rows = log(finished.folder)
    assert [row[:2] for row in rows] == [(f"{k}-rf", str(step)) for k in (1, 2) for step in (5, 10, 15, 20)]
    assert all(math.isfinite(float(row[2])) for row in rows)
    assert all(f"step {step:>7}" in finished.out for step in (5, 10, 15, 20))


def test_a_finished_stage_holds_the_averaged_network_alone(finished):
    for k in (1, 2):
        state = chapter.load_checkpoint(finished.folder / f"{k}-rf.pt")
        assert set(state) == {"step", "log", "config", "model"} and state["step"] == 20
        assert state["config"]["stage"] == f"{k}-rf"


def test_results_json_holds_the_numbers_of_the_table(finished):
    results = json.loads((finished.folder / "results.json").read_text())
    assert results["floor_W2"] > 0 and len(results["rounds"]) == 2
    for result in results["rounds"]:
        assert set(result["W2"]) == {"1", "2", "5", "10", "100"} and len(result["loss_by_t"]) == 10
        gap = result["cost_before"] - result["cost_after"] - result["S"] - result["V"]
        assert result["identity_gap"] == pytest.approx(gap)
        assert f"{result['W2']['100']:8.3f}" in finished.out and f"{result['cost_after']:8.3f}" in finished.out
    first, second = results["rounds"]
    assert {"floor", "excess", "floor_by_t"} <= set(first) and "floor" not in second
    assert second["cost_before"] == first["cost_after"]


def test_figures_open(finished):
    """Every figure is a picture with something on it, and the film moves."""
    with Image.open(finished.folder / "paths.png") as image:
        image.load()
        assert min(image.size) >= 600 and len(image.convert("RGB").getcolors(1 << 24)) > 50
    with Image.open(finished.folder / "flow.gif") as film:
        first = film.convert("RGB").tobytes()
        assert film.n_frames > 10
        film.seek(film.n_frames - 1)
        assert film.convert("RGB").tobytes() != first


def test_a_finished_run_is_measured_again_but_not_trained_again(finished, run, here, monkeypatch):
    folder = copy_run(finished, here)
    before = {name: (folder / name).read_bytes() for name in FILES}
    monkeypatch.setattr(chapter, "learning_rate", None)     # the first thing that a step calls
    code, out, err = run(*TINY)
    assert code == 0, err
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    assert "drop-(S+V)" in out


def test_free_settings_may_change_and_others_may_not(finished, run, here):
    copy_run(finished, here)
    assert run(*TINY, "--log-every", 3)[0] == 0
    code, _, err = run(*TINY, "--lr", 0.5)
    assert code == 2
    one_line(err, "lr=0.004", "0.5", "--fresh")


# ---- Run folders -----------------------------------------------------------------------------------------------------


def test_fresh_starts_over(finished, run, here):
    folder = copy_run(finished, here)
    (folder / "1-rf.pt").write_bytes(b"broken")
    code, out, err = run(*TINY, "--seed", 5, "--fresh")
    assert code == 0, err
    assert json.loads((folder / "run.json").read_text())["settings"]["seed"] == 5
    assert len(log(folder)) == 8 and not torch.equal(weights(folder / "1-rf.pt"), weights(finished.folder / "1-rf.pt"))


@pytest.mark.parametrize("foreign", ["thesis.txt", "run.json"])
@pytest.mark.parametrize("content", ["precious", '{"model_type": "bert"}', "[1]", '{"settings": {"editor": "vim"}}',
                                     '{"script": "02_reflow.py", "settings": {"steps": 3}}'])
@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_folder_that_is_not_ours_is_never_touched(run, here, foreign, content, fresh):
    """Whatever is in it, even a run.json of another program."""
    (here / "mine").mkdir()
    (here / "mine" / foreign).write_text(content)
    code, _, err = run(*TINY, "--out", "mine", *fresh)
    assert (here / "mine" / foreign).read_text() == content and len(list((here / "mine").iterdir())) == 1
    assert code == 2
    one_line(err, "mine", "--out")


@pytest.mark.parametrize("out", ["file", "file/below", "n" * 300], ids=["file", "below", "long"])
def test_an_impossible_run_folder_is_one_line(run, here, out):
    (here / "file").write_text("text")
    code, _, err = run(*TINY, "--out", out)
    assert code == 2 and [path.name for path in here.iterdir()] == ["file"]
    one_line(err)


def test_a_kill_while_claiming_the_folder_does_not_lock_it(run, here):
    """The first file is written beside its place; what a kill leaves there is nobody's work, and goes."""
    (here / "new" / ".part-0").mkdir(parents=True)
    (here / "new" / ".part-0" / "run.json").write_text("{")
    assert run(*TINY, "--out", "new")[0] == 0 and not leftovers(here)


def test_of_runs_that_start_in_one_folder_at_once_one_goes_on(here, monkeypatch):
    """Each has found the folder empty when the second writes its run.json."""
    original = chapter.surroundings
    first, second = (chapter.Run(chapter.Config(seed=seed, device="cpu", out="one"), NAME + ".py") for seed in (1, 2))

    def surroundings(script):
        monkeypatch.setattr(chapter, "surroundings", original)
        second.claim()
        return original(script)
    monkeypatch.setattr(chapter, "surroundings", surroundings)
    with pytest.raises(chapter.UserError, match="another run has just begun in one"):
        first.claim()
    assert json.loads((here / "one" / "run.json").read_text())["settings"]["seed"] == 2 and not leftovers(here)


@pytest.mark.parametrize("path", ["data", "data/", "./data", "link", "$PWD/data", "~/data"])
def test_a_path_is_one_however_it_is_spelled(here, monkeypatch, path):
    """Only expanded by hand are ~, which the shell leaves alone in --out=~/data, and here $PWD."""
    monkeypatch.setenv("HOME", str(here))
    (here / "data").mkdir()
    (here / "link").symlink_to("data")
    path = chapter.parse_config(chapter.Config, ["--out", path.replace("$PWD", str(here))]).out
    assert Path(path).samefile("data") and chapter.same("data", path) and chapter.same(path, "data")


@pytest.mark.parametrize("a, b, equal", [("data", "data2", False), ("", ".", False), ("", "", True), (None, "a", False),
                                         ([1, 2], (1, 2), True), (1, 1.5, False), (True, False, False)])
def test_other_values_are_the_same_if_json_says_so(a, b, equal):
    assert chapter.same(a, b) == equal


def test_a_network_is_known_by_its_weights(here):
    """Not by its file, in which there are times as well; one changed bit shows."""
    torch.manual_seed(0)
    network, digests = chapter.VelocityMLP(8, 2), []
    for change in (0, 0, 1e-7):
        next(network.parameters()).data.view(-1)[0] += change
        run = chapter.Run(chapter.Config(device="cpu"), NAME + ".py")
        run.reads("network", network)
        digests.append(run.inputs["network"])
    assert digests[0] == digests[1] != digests[2]


def test_a_run_whose_inputs_have_changed_is_not_continued(here):
    def claim(**inputs):
        run = chapter.Run(chapter.Config(device="cpu"), NAME + ".py")
        for name, content in inputs.items():
            run.reads(name, content)
        run.claim()
    claim(texts=["a", "b"])
    claim(texts=["a", "b"], more=["c"])                     # an older run may not say all
    record = next(here.rglob("run.json")).read_bytes()
    with pytest.raises(chapter.UserError, match="was made with texts=") as error:
        claim(texts=["a", "B"])
    assert "\n" not in str(error.value) and next(here.rglob("run.json")).read_bytes() == record


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_the_letters_of_a_path(here, monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert call(chapter, *TINY, "--rounds", 1, "--out", "äpfel 🍎", patch=monkeypatch) == 0
    sys.stdout.flush()
    assert (here / "äpfel 🍎" / "results.json").exists() and b"pfel \\U0001f34e/" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("variables", [
    dict(RANK="0"), dict(RANK="first"), dict(RANK=""), dict(RANK="0", WORLD_SIZE="1"), dict(RANK="5", WORLD_SIZE="2"),
    dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="port"),
], ids=str)
def test_a_rank_that_torchrun_has_not_set_is_one_line(run, here, monkeypatch, variables):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(*TINY)
    assert code == 2 and not list(here.iterdir())
    one_line(err, "RANK", "torchrun")


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


class Hostile:
    """Unpickling this creates a file."""

    def __reduce__(self):
        return open, ("hacked", "w")


def test_checkpoints_come_back_as_they_were(tmp_path):
    content = dict(config={"a": 1, "b": "text"}, step=3, model={"w": torch.randn(3, 2, dtype=torch.float64)})
    chapter.save_checkpoint(tmp_path / "new folder" / "c.pt", **content)
    loaded = chapter.load_checkpoint(tmp_path / "new folder" / "c.pt")
    assert loaded["config"] == content["config"] and loaded["step"] == 3
    assert torch.equal(loaded["model"]["w"], content["model"]["w"])
    assert not leftovers(tmp_path)


def spoil(path, how):
    """Replace a checkpoint by something else."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "cut to a few bytes":
        path.write_bytes(path.read_bytes()[:10])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "random bytes":
        path.write_bytes(torch.randint(256, (5000,), generator=torch.Generator().manual_seed(0)).byte().numpy())
    elif how == "a hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(), protocol=2))
    elif how == "a hostile pickle in torch's format":
        torch.save({"config": {}, "model": Hostile()}, path)
    elif how == "a tensor":
        torch.save(torch.zeros(3), path)
    elif how == "weights without our keys":
        torch.save({"weight": torch.zeros(3)}, path)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "of another configuration":
        content = torch.load(path, weights_only=True)
        content["config"]["target"] = "rings"
        torch.save(content, path)
    elif how == "another stage's":
        shutil.copy(path.with_name("2-rf.pt" if path.name == "1-rf.pt" else "1-rf.pt"), path)


SPOILED = ["truncated", "cut to a few bytes", "empty", "random bytes", "a hostile pickle",
           "a hostile pickle in torch's format", "a tensor", "weights without our keys", "a folder",
           "of another configuration", "another stage's"]


@pytest.mark.parametrize("name", ["1-rf.pt", "2-rf.pt"])
@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_checkpoint_is_one_line_and_never_run(finished, run, here, how, name):
    """Whichever stage it is of; nothing is executed, nothing overwritten."""
    folder = copy_run(finished, here)
    spoil(folder / name, how)
    before = (folder / name).read_bytes() if (folder / name).is_file() else None
    code, _, err = run(*TINY)
    assert not list(here.rglob("hacked"))
    assert code == 2
    one_line(err, name)
    assert before is None or (folder / name).read_bytes() == before
    assert not leftovers(here)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """replacing() removes its draft whatever goes wrong; an error of the disk ends a run in one line."""
    path = tmp_path / "file"
    path.write_text("old")
    for error in (OSError(28, "No space left on device"), ZeroDivisionError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            with chapter.replacing(path) as part:
                part.write_text("half of the ne")
                assert path.read_text() == "old"
                raise error
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with chapter.replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new" and not leftovers(tmp_path)


def test_two_that_write_one_file_do_not_meet(tmp_path):
    """Whoever reads it meanwhile sees one file or the other, whole; of folders the first one stays."""
    with chapter.replacing(tmp_path / "file") as one, open(one, "w") as first:
        first.write("first")
        with chapter.replacing(tmp_path / "file") as part:
            part.write_text("the second, longer")
        assert (tmp_path / "file").read_text() == "the second, longer"
        first.write(" and more")
    assert (tmp_path / "file").read_text() == "first and more"
    with chapter.replacing(tmp_path / "folder") as one, chapter.replacing(tmp_path / "folder") as two:
        one.mkdir(), two.mkdir()
        (two / "inside").touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["inside"] and not leftovers(tmp_path)


def fails(error):
    """A main() that ends in this error."""
    def main(config):
        raise error
    return main


@pytest.mark.parametrize("error, words", [
    (chapter.UserError("your mistake"), "your mistake"), (OSError(28, "No space left on device", "a/file"), "a/file"),
])
def test_mistakes_and_errors_of_the_disk_are_one_line(monkeypatch, capsys, error, words):
    monkeypatch.setattr(chapter, "main", fails(error))
    assert call(chapter, patch=monkeypatch) == 2
    one_line(capsys.readouterr().err, words)
    monkeypatch.setattr(chapter, "main", fails(ZeroDivisionError("a mistake of ours")))
    with pytest.raises(ZeroDivisionError):
        call(chapter, patch=monkeypatch)


def stop_at(step, monkeypatch):
    """Make 1-RF raise SIGTERM within a step, as if somebody had sent it."""
    original = chapter.learning_rate

    def learning_rate(i, config):
        if i == step and not chapter.STOP:
            signal.raise_signal(signal.SIGTERM)
        return original(i, config)
    monkeypatch.setattr(chapter, "learning_rate", learning_rate)


def test_a_stop_saves_its_very_step_and_continues_bit_for_bit(finished, run, here, monkeypatch):
    """Step 8 is no multiple of anything: the checkpoint is of the step that was under way, and no row is doubled."""
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        code, _, err = run(*TINY)
    assert code == 130 and err.strip().splitlines()[-1].startswith("stopped")
    folder = here / "runs" / NAME / "quick"
    assert chapter.load_checkpoint(folder / "1-rf.pt")["step"] == 8
    assert run(*TINY)[0] == 0
    assert same_weights(folder, finished.folder, "1-rf", "2-rf")
    rows = log(folder)
    assert [row[1] for row in rows[:4]] == ["5", "8", "10", "15"] and len(rows) == 9


def test_a_run_that_goes_on_needs_no_more_memory_than_one_that_starts(finished, run, here, monkeypatch):
    """The weights of the checkpoint are copied into the networks: none of its own may lie on the device meanwhile."""
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        run(*TINY)
    load, rate, read, left = chapter.load_checkpoint, chapter.learning_rate, [], []

    def load_checkpoint(path, device="cpu"):
        state = load(path, device)
        read.extend(weakref.ref(p) for name in ("model", "ema") for p in state.get(name, {}).values())
        return state

    def learning_rate(step, config):
        left.append(sum(p() is not None for p in read))
        return rate(step, config)
    monkeypatch.setattr(chapter, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(chapter, "learning_rate", learning_rate)
    assert run(*TINY)[0] == 0
    assert read and left and not any(left)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_save_and_exit(tmp_path, number):
    """A run that would take hours is stopped after a few log lines: one line, exit code 130, a checkpoint to go on."""
    process = start(*TINY, "--steps", "100000000", "--out", "run", cwd=tmp_path)
    wait_for_lines(process, tmp_path / "run" / "1-rf.csv", 5)
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 130 and "Traceback" not in err
    assert [line for line in err.splitlines() if line.strip()] == [
        "stopped; the same command continues from here"]
    state = chapter.load_checkpoint(tmp_path / "run" / "1-rf.pt")
    assert state["step"] == int(log(tmp_path / "run")[-1][1]) >= 20
    assert not leftovers(tmp_path)


def wait_for_lines(process, path, lines):
    """Until the file has so many lines, or the process has ended."""
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= lines):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def kill_in_write(count):
    """Spy: kill -9 when the n-th file of torch is written halfway."""
    return f"""
import torch
inner, calls = torch.save, []
def save(content, path):
    inner(content, path)
    calls.append(path)
    if len(calls) == {count}:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""


def test_killed_at_any_moment_and_rerun_gives_the_same_bits(finished, tmp_path):
    """kill -9 before a checkpoint, within one, between a checkpoint and its log, at a stage's end, within 2-RF."""
    folder = tmp_path / "runs" / NAME / "quick"
    moments = [(kill_after_row("1-rf", 10), "1-rf", 5), (kill_in_write(2), "1-rf", 10),
               (kill_after_row("1-rf", 20, "after"), "1-rf", 20), (kill_after_row("2-rf", 10, "after"), "2-rf", 10),
               (kill_after_row("2-rf", 20), "2-rf", 15)]
    for spy, stage, step in moments:
        code, _, err = finish(start(*TINY, cwd=tmp_path, spy=spy))
        assert code == -signal.SIGKILL, err
        assert chapter.load_checkpoint(folder / f"{stage}.pt")["step"] == step
    code, _, err = finish(start(*TINY, cwd=tmp_path, spy=""))
    assert code == 0, err
    assert same_weights(folder, finished.folder, "1-rf", "2-rf") and log(folder) == log(finished.folder)
    assert (folder / "results.json").read_text() == (finished.folder / "results.json").read_text()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(finished, run, here, monkeypatch):
    """The loss becomes NaN in step 13: one line, and the checkpoint of step 10 is still there and finite."""
    original = chapter.learning_rate
    monkeypatch.setattr(chapter, "learning_rate", lambda step, c: math.nan if step == 12 else original(step, c))
    code, _, err = run(*TINY)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: 1-rf: loss nan") and "step 15" in err
    path = here / "runs" / NAME / "quick" / "1-rf.pt"
    state = chapter.load_checkpoint(path)
    assert state["step"] == 10 and all(p.isfinite().all() for p in (state["model"] | state["ema"]).values())
    monkeypatch.setattr(chapter, "learning_rate", original)
    assert run(*TINY)[0] == 0
    assert same_weights(path.parent, finished.folder, "1-rf", "2-rf")


@pytest.mark.parametrize("lr", ["1e30", "1e4"])
def test_an_absurd_learning_rate_is_one_line(run, here, lr):
    """Weights that overflow, or that are finite but carry samples to infinity."""
    code, _, err = run(*TINY, "--lr", lr, "--warmup", "0", "--lr-decay", "constant")
    if code:
        assert code == 2 and "Traceback" not in err
        one_line(err, "--lr")
    assert lr != "1e30" or code == 2 and not (here / "runs" / NAME / "quick" / "1-rf.pt").exists()


# ---- A full disk -----------------------------------------------------------------------------------------------------


def small_files(limit):
    """For preexec_fn: a write that would make a file larger than this fails, as on a full disk."""
    resource = pytest.importorskip("resource")

    def set_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return set_limit


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(finished, run, here, monkeypatch):
    """Stopped at step 8, continued on a full disk, continued with room again: as if nothing had been."""
    with monkeypatch.context() as patch:
        stop_at(7, patch)
        assert run(*TINY)[0] == 130
    folder = here / "runs" / NAME / "quick"
    before = (folder / "1-rf.pt").read_bytes()
    code, _, err = finish(start(*TINY, cwd=here, preexec_fn=small_files(4096)))
    assert code == 2
    one_line(err, "1-rf.pt")
    assert (folder / "1-rf.pt").read_bytes() == before and not leftovers(here)
    assert run(*TINY)[0] == 0
    assert same_weights(folder, finished.folder, "1-rf", "2-rf")


# ---- The compiler ----------------------------------------------------------------------------------------------------

COMPILES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import load
chapter, calls = load(sys.argv[2]), []
class Network:                                      # what compile_network looks at, on a GPU that need not be there
    def parameters(self):
        yield type("Parameter", (), {"device": torch.device("cuda", 0)})
    _compiled_call_impl = None
    def compile(self, **options):
        import torch._inductor.config
        calls.append((options, getattr(torch._inductor.config.triton, "mix_order_reduction", False)))
chapter.compile_network(Network(), chapter.Config(compile=False))
assert calls == [], calls
chapter.compile_network(Network(), chapter.Config(compile=True))
assert calls == [({"dynamic": False}, False)], calls
"""


@pytest.mark.parametrize("name", [path.stem for path in scripts(ROOT)])
def test_the_compilers_wrong_gradients_are_switched_off(tmp_path, name):
    """Where inductor has the setting, whoever imported it before: the value it uses when it compiles is False."""
    result = subprocess.run([sys.executable, "-c", COMPILES, ROOT / "tests", name], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr


# ---- Several processes -----------------------------------------------------------------------------------------------

WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from conftest import load
chapter = load("01_rectified_flow")
config = chapter.Config(steps=3, batch=12, width=8, warmup=0, lr_decay="constant", device="cpu", ema_decay=0.5,
                        accumulate=int(sys.argv[2]))
run = chapter.Run(config, "01_rectified_flow.py")
rank, processes, slices = run.rank, run.world, config.accumulate
torch.manual_seed(rank)                              # other start weights everywhere: rank 0's must win
model = chapter.VelocityMLP(8, 2)
torch.manual_seed(7)
x0, x1, t = torch.randn(12, 2), 5 * torch.randn(12, 2), torch.rand(12)
calls, history, losses = [], [], []
def loss_fn(network, ema, step):
    first = (rank * slices + len(calls) % slices) * run.share
    mine = slice(first, first + run.share)
    calls.append(mine)
    return chapter.flow_matching_loss(network, x0[mine], x1[mine], t[mine])
for step, loss, ema in chapter.train(model, loss_fn, config):
    history.append([p.detach().clone() for p in model.parameters()])
    losses.append(loss.item())
torch.save({"history": history, "losses": losses}, f"{processes}-{slices}-{rank}.pt")
"""


def worker(folder, processes, slices):
    """Run WORKER; returns what each process saved."""
    (folder / "worker.py").write_text(WORKER)
    command = ["worker.py", ROOT / "tests", str(slices)]
    if processes == 1:
        result = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    else:
        result = torchrun(*command, cwd=folder, processes=processes)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{processes}-{slices}-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.parametrize("processes, slices", [(2, 1), (1, 3), (2, 3)])
def test_processes_and_slices_take_the_steps_of_one_with_the_joint_batch(tmp_path, processes, slices):
    """Each has a part of the batch; the weights after each of 3 steps are those of one process that has all of it."""
    parts = worker(tmp_path, processes, slices)
    joint, = worker(tmp_path, 1, 1)
    for step in range(3):
        for p, q, both in zip(parts[0]["history"][step], parts[-1]["history"][step], joint["history"][step]):
            assert torch.equal(p, q)
            torch.testing.assert_close(p, both, rtol=0, atol=1e-6)
        assert sum(part["losses"][step] for part in parts) / processes == pytest.approx(joint["losses"][step], rel=1e-5)


STOPPED = """
original = chapter.learning_rate
def learning_rate(step, config):
    if step == 7 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return original(step, config)
chapter.learning_rate = learning_rate
chapter.draw_paths = lambda *arguments: None
"""


def test_one_of_two_processes_is_told_to_stop_and_both_do(finished, tmp_path):
    """They agree at the next line of the log, step 10; the same command goes on to the end."""
    (tmp_path / "stopped.py").write_text(driver(NAME, STOPPED))
    result = torchrun("stopped.py", *TINY, "--out", "run", cwd=tmp_path)
    assert result.returncode and "stopped; the same command continues" in result.stderr
    assert chapter.load_checkpoint(tmp_path / "run" / "1-rf.pt")["step"] == 10
    assert torchrun(ROOT / f"{NAME}.py", *TINY, "--out", "run", cwd=tmp_path).returncode == 0
    assert len(log(tmp_path / "run")) == 8


def test_two_processes_run_the_whole_script(tmp_path):
    result = torchrun(ROOT / f"{NAME}.py", *TINY, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert len(log(tmp_path / "run")) == 8 and result.stdout.count("drop-(S+V)") == 1


def test_a_machine_without_a_compiler_is_told_in_one_line(here):
    compiled = "chapter.compile_network = lambda model, config: config.compile and model.compile()     # on CPUs as well"
    command = [sys.executable, "-c", driver(NAME, "chapter.draw_paths = lambda *arguments: None", compiled), *TINY]
    nowhere = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(here / "cache")}
    result = subprocess.run([*command, "--compile"], cwd=here, env=nowhere, capture_output=True, text=True)
    assert result.returncode == 2
    one_line(result.stderr, "torch.compile", "--no-compile")
