"""Shared by all tests: load a numbered script as a module, or run it as a user would, whole, killed or twice over."""

import contextlib
import csv
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

# For this process and those that tests start; the threads must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")       # tests run side by side, one on each core (pytest -n auto)

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    """Files in their order: pytest-xdist would begin with those of many tests, and a slow one of few comes last."""
    config.option.loadscopereorder = False


def load(name):
    """Import a script from the repository root: load("01_rectified_flow"). The second call returns the same module.

    A name that starts with a digit cannot stand in an import statement, hence the detour.
    """
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)   # dataclasses look here while loading
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def run_script(name, *args, cwd, env=None, timeout=600):
    """Run `python <name>.py args...` in the folder `cwd`; `env` adds to the environment.

    Returns: subprocess.CompletedProcess with returncode and, as text, stdout and stderr.
    """
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)


# ---- Whole runs: the fixtures of a chapter's test file, and how to look at what a run left ---------------------------


class Finished(NamedTuple):
    """A run that came to its end: its folder, and what it printed."""

    folder: Path
    out: str


def fixtures(name, tiny, figures, shorten=None):
    """The fixtures of the tests that run the script `name`:  here, run, finished = fixtures(NAME, TINY, figures=...)

    here: an empty working directory; runs inside this process draw no figures (functions of the script, by name).
    run(*args, script=...): acts like the command line, in this process.  Returns exit code, stdout, stderr.
    finished: a whole run with the flags `tiny` and its figures, once per test file.  Copy it before changing it.
    shorten(patch): changes the script by a pytest.MonkeyPatch, for runs that would take too long as they are; then
    `finished` is made inside this process too, by the real script otherwise.
    """
    chapter = load(name)

    @pytest.fixture
    def here(tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        if shorten:
            shorten(monkeypatch)
        for figure in figures:
            monkeypatch.setattr(chapter, figure, lambda *arguments: None)
        return tmp_path

    @pytest.fixture
    def run(here, monkeypatch, capsys):
        def run(*args, script=chapter):
            capsys.readouterr()
            return call(script, *args, patch=monkeypatch), *capsys.readouterr()
        return run

    @pytest.fixture(scope="module")
    def finished(tmp_path_factory):
        cwd = tmp_path_factory.mktemp("finished")
        if shorten:
            out = run_inside(chapter, *tiny, cwd=cwd, change=shorten)
        else:
            result = run_script(name, *tiny, cwd=cwd)
            assert result.returncode == 0, result.stderr
            out = result.stdout
        return Finished(cwd / "runs" / name / "quick", out)

    return here, run, finished


def run_inside(script, *args, cwd, change):
    """A whole run in the folder `cwd`, in this process, of a script after change(patch).  Returns what it printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(cwd)
        change(patch)
        assert call(script, *args, patch=patch) == 0
    return out.getvalue()


def networks_of_chapter_2(cwd, *args):
    """Let chapter 2 train in the folder `cwd`, without its report; the folder where its networks lie."""
    script = load("02_reflow")
    run_inside(script, *args, cwd=cwd, change=lambda patch: patch.setattr(script, "report", lambda *arguments: None))
    return cwd / "runs" / "02_reflow" / "quick"


def call(script, *args, patch):
    """Act like the command line with a loaded script, in this process.  Returns the exit code."""
    patch.setattr(sys, "argv", [script.__file__, *map(str, args)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if hasattr(script, "command_line"):                 # chapter 5's has commands besides the training
            script.command_line()
        else:
            script.launch(script.main, script.Config)
    except SystemExit as stop:
        return stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


def copy_run(finished, cwd, *without):
    """The finished run, where a run in cwd would look for it, without some of its files."""
    folder = cwd.joinpath(*finished.folder.parts[-3:])      # runs/<script>/quick
    shutil.copytree(finished.folder, folder)
    for path in (folder / name for name in without):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def one_line(err, *words):
    """The whole of standard error is one line of ours, which holds the words."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and re.match(r"([-\w.]+: )?error: ", lines[0]), err      # argparse puts the script's name first
    for word in words:
        assert str(word) in lines[0], err


def weights(path):
    """All numbers of a finished network in a row."""
    return torch.cat([p.flatten() for p in torch.load(path, weights_only=True)["model"].values()])


def same_weights(a, b, *names):
    """The networks of these names are equal in both folders, bit for bit."""
    assert names
    return all(torch.equal(weights(a / f"{name}.pt"), weights(b / f"{name}.pt")) for name in names)


def log_rows(folder, columns=2):
    """The rows of all logs of a run, by stage: its name and the step (and the loss; the speed no two runs share)."""
    tables = {path.stem: path.read_text().splitlines() for path in sorted(folder.glob("*.csv"))}
    assert all(lines[0] == "step,loss,samples_per_s" for lines in tables.values())
    return [(stage, *row)[:columns] for stage, lines in tables.items() for row in csv.reader(lines[1:])]


def driver(name, *changes):
    """A program that makes these changes to the script `name`, as `chapter`, and then runs it as a user would.

    For kills, full disks and several processes, which need processes of their own.
    """
    head = ["import functools, os, signal, sys, time", f"sys.path.insert(0, {str(ROOT / 'tests')!r})",
            "from conftest import load", f"chapter = load({name!r})"]
    return "\n".join([*head, *changes, "chapter.launch(chapter.main, chapter.Config)", ""])


def kill_after_row(stage, step, when="before"):
    """Change for `driver`: kill -9 right before (or after) the checkpoint of a stage's step is written."""
    return f"""
inner_save_checkpoint = chapter.save_checkpoint
def save_checkpoint(path, **content):
    last = (path.stem, content.get("step")) == ({stage!r}, {step})
    if last and {when == "before"}:
        os.kill(os.getpid(), signal.SIGKILL)
    inner_save_checkpoint(path, **content)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
chapter.save_checkpoint = save_checkpoint
"""


def kill_in_shard(number):
    """Change for `driver`: kill -9 while this shard of pairs, counted from 1, is half written."""
    return f"""
inner_replace, shards = os.replace, []
def replace(part, path):
    shards.extend([path] * ("pairs" in path.parts))
    if len(shards) == {number}:
        os.truncate(part, 100)
        os.kill(os.getpid(), signal.SIGKILL)
    inner_replace(part, path)
os.replace = replace
"""


def torchrun(*command, cwd, processes=2):
    """python -m torch.distributed.run: so many processes of a script on this machine, with one thread each."""
    command = ["--standalone", f"--nproc-per-node={processes}", *map(str, command)]
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", *command], cwd=cwd, capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
