"""The homework: solutions earn all points, releases none, planted mistakes their own; hostile notebooks break nothing.

Everything is graded by a few server processes that import torch once and fork for every submission (grader.py).
"""
import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from right_answers import RIGHT_ANSWERS
from wrong_answers import WRONG_ANSWERS

FOLDER = ROOT / "notebooks" / "assignments"
HOMEWORKS = ["hw1", "hw2", "hw3", "hw4", "hw5"]
sys.path.append(str(FOLDER))
import checks
from grader import GradingError, Homework, grade_all, homework_of, read_notebook
from release import ReleaseError, main as release_main, release


def source(name):
    """A source notebook, anew, with every cell's source as a string."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def mark(cell):
    return cell["metadata"].get("nbgrader", {})


def find(notebook, grade_id):
    [cell] = [cell for cell in notebook["cells"] if mark(cell).get("grade_id") == grade_id]
    return cell


def answer(homework, exercise, code):
    """The solution of a homework with this code in the cell of one exercise."""
    return answers(homework, {exercise: code})


def answers(homework, codes):
    """The solution of a homework with other code in the cells of some exercises."""
    notebook = source(homework)
    for exercise, code in codes.items():
        find(notebook, f"{homework}-{exercise}")["source"] = code
    return notebook


def planted(rows, alone):
    """Numbers of answers that share a notebook: a homework's in rows.  alone: each exercise's first for itself."""
    notebooks, seen = {}, {}
    for number, (homework, exercise, *_) in enumerate(rows):
        rank = seen[homework, exercise] = seen.get((homework, exercise), -1) + 1
        notebooks.setdefault((homework, rank, exercise * (alone and rank == 0)), []).append(number)
    return list(notebooks.values())


def lost(report):
    """Names of the exercises without points."""
    assert all(e["score"] in (0, e["points"]) for e in report["exercises"])
    return [e["name"] for e in report["exercises"] if not e["score"]]


def message(report, name):
    return next(e["message"] for e in report["exercises"] if e["name"] == name)


PLANTED, RIGHT = planted(WRONG_ANSWERS, alone=True), planted(RIGHT_ANSWERS, alone=False)


@pytest.fixture(scope="module")
def reports():
    """Graded by one server: solutions, releases, wrong answers, right answers."""
    submissions = [source(name) for name in HOMEWORKS] + [release(source(name)) for name in HOMEWORKS]
    for rows, notebooks in ((WRONG_ANSWERS, PLANTED), (RIGHT_ANSWERS, RIGHT)):
        submissions += [answers(rows[place[0]][0], {rows[i][1]: rows[i][2] for i in place}) for place in notebooks]
    return grade_all(submissions)


# ---- Solutions, releases, wrong answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOMEWORKS)
def test_the_solution_earns_all_points(reports, name):
    report = reports[HOMEWORKS.index(name)]
    assert report["homework"] == name and lost(report) == [], report
    assert len(report["exercises"]) >= 3


@pytest.mark.parametrize("name", HOMEWORKS)
def test_a_release_fails_every_exercise_with_not_implemented_and_a_hint(reports, name):
    report = reports[len(HOMEWORKS) + HOMEWORKS.index(name)]
    assert len(lost(report)) == len(report["exercises"])
    for e in report["exercises"]:
        assert re.match(r"NotImplementedError: not written yet\. Hint: \w.{20}", e["message"]), e["message"]


@pytest.mark.parametrize("number", range(len(WRONG_ANSWERS)), ids=lambda i: "-".join(WRONG_ANSWERS[i][:2]) + f"-{i}")
def test_a_wrong_answer_loses_its_points_and_is_told_its_mistake(reports, number):
    homework, exercise, _, words = WRONG_ANSWERS[number]
    [place] = [place for place, row in enumerate(PLANTED) if number in row]
    report = reports[2 * len(HOMEWORKS) + place]
    assert set(lost(report)) == {f"{homework}-{WRONG_ANSWERS[i][1]}" for i in PLANTED[place]}, report
    assert words in message(report, f"{homework}-{exercise}")
    assert "note:" not in message(report, f"{homework}-{exercise}")


@pytest.mark.parametrize("name", HOMEWORKS)
def test_a_check_ends_by_saying_ok_or_shows_its_lesson_alone(name):
    assert all(cell["source"].endswith('print("ok")') for cell in source(name)["cells"] if mark(cell).get("grade"))
    with pytest.raises(checks.Lesson) as lesson:
        checks.expect(lambda: 1.0, 2.0, "x = 2")
    assert "x = 2\n  expected" in "".join(lesson.value._render_traceback_())     # all that Jupyter shows


@pytest.mark.parametrize("place", range(len(RIGHT)), ids=lambda i: f"{RIGHT_ANSWERS[RIGHT[i][0]][0]}-{i}")
def test_right_answers_in_other_words_earn_all_points(reports, place):
    report = reports[2 * len(HOMEWORKS) + len(PLANTED) + place]
    assert lost(report) == [], [e["message"] for e in report["exercises"]]


def test_there_are_enough_of_them():
    assert len({row[:2] for row in WRONG_ANSWERS}) >= 12
    assert len([row for row in PLANTED if len(row) == 1]) >= 20 and sum(map(len, PLANTED)) == len(WRONG_ANSWERS)
    every = {f"{name}-{exercise}" for name, exercise, *_ in WRONG_ANSWERS}
    homeworks = [Homework(FOLDER / f"{name}.ipynb") for name in HOMEWORKS]
    assert every == {e.removesuffix("-check") for homework in homeworks for e in homework.exercises}


@pytest.mark.parametrize("name", HOMEWORKS)
def test_a_visible_check_tells_its_mistakes_apart(name, monkeypatch):
    """Two mistakes with one value: whoever makes the second is told the first.  Hidden tests run after the visible."""
    def differ(attempt, want, equation, mistakes=None, tolerance=1e-4):
        values = {"the right value": want} | {k: v for k, v in (mistakes or {}).items() if not callable(v)}
        values = [(text, checks.parts(value, equation)) for text, value in values.items()]
        alike.extend((equation, a, b) for i, (a, one) in enumerate(values) for b, other in values[:i]
                     if checks.agree(one, other, tolerance))
        expect(attempt, want, equation, mistakes, tolerance)

    alike, expect, names = [], checks.expect, {"__name__": "notebook"}
    monkeypatch.setattr(checks, "expect", differ)
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for cell, student in zip(source(name)["cells"], release(source(name))["cells"]):
        code = "".join((student if mark(cell).get("grade") else cell)["source"])
        if cell["cell_type"] == "code" and mark(cell) and ("expect(" in code or not mark(cell).get("grade")):
            exec(compile(code, f"<{name}>", "exec"), names)
    assert alike == []


# ---- The source notebooks and their release --------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOMEWORKS)
def test_the_metadata_is_nbgraders_third_version(name):
    cells = source(name)["cells"]
    marks = [mark(cell) for cell in cells if mark(cell)]
    assert len({m["grade_id"] for m in marks}) == len(marks)
    for cell in filter(mark, cells):
        m = mark(cell)
        assert m["schema_version"] == 3 and m["grade_id"].startswith(f"{name}-")
        assert all(type(m[flag]) is bool for flag in ("grade", "solution", "locked", "task"))
        assert (m.get("points", 0) > 0) == (m["grade"] or m["task"])
        assert ("BEGIN SOLUTION" in cell["source"]) == m["solution"]
        if m["grade"]:
            visible, hidden, _ = re.split(r"### (?:BEGIN|END) HIDDEN TESTS", cell["source"])
            assert ("expect(" in visible or "require(" in visible) and ("expect(" in hidden or "require(" in hidden)
            assert mark(cells[cells.index(cell) - 1])["grade_id"] + "-check" == m["grade_id"]
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("name", HOMEWORKS)
def test_no_line_of_a_solution_or_hidden_test_survives(name):
    """Nor of the marking scheme.  Lines that also stand outside (closing brackets, say) do not count."""
    secret, public = [], []
    for cell in source(name)["cells"]:
        inside = False
        for line in map(str.strip, cell["source"].split("\n")):
            inside = inside and "### END" not in line or "### BEGIN" in line
            (secret if inside else public).append(line)
    ready = release(source(name))
    kept = [line.strip() for cell in ready["cells"] for line in "".join(cell["source"]).split("\n")]
    assert len(secret) > 40
    solution = [line for cell in source(name)["cells"] if mark(cell).get("solution")
                for line in cell["source"].split("### BEGIN SOLUTION")[1].split("### END")[0].split("\n")[1:]]
    assert {line.strip() for line in solution if line.strip()} & set(kept) == set()
    assert (set(secret) - set(public) - {""}) & set(kept) == set()
    assert not any("###" in line for line in kept)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in ready["cells"])


def test_a_release_clears_outputs_and_locks_cells():
    notebook = source("hw1")
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        cell |= {"execution_count": 3, "outputs": [{"output_type": "stream", "name": "stdout", "text": "13"}]}
    ready = release(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in ready["cells"])
    assert find(ready, "hw1-loss-check")["metadata"]["editable"] is False
    assert "editable" not in find(ready, "hw1-loss")["metadata"]
    assert find(notebook, "hw1-loss")["source"] == find(source("hw1"), "hw1-loss")["source"]     # it works on a copy


@pytest.mark.parametrize("old, new, words", [
    ("    ### END SOLUTION", "", "BEGIN SOLUTION without END SOLUTION"),
    ("    ### END SOLUTION", "    ### BEGIN SOLUTION\n    ### END SOLUTION", "BEGIN SOLUTION within"),
    ("    ### BEGIN SOLUTION", "    #", "END SOLUTION without BEGIN"),
])
def test_a_broken_source_is_not_released(tmp_path, capsys, old, new, words):
    notebook = source("hw1")
    cell = find(notebook, "hw1-interpolate")
    assert old in cell["source"]
    cell["source"] = cell["source"].replace(old, new, 1)
    (tmp_path / "hw1.ipynb").write_text(json.dumps(notebook))
    with pytest.raises(SystemExit) as stop:
        release_main([str(tmp_path / "hw1.ipynb"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_solution_outside_a_solution_cell_is_not_released():
    for where, begin in (("hw1-setup", "SOLUTION"), ("hw1-loss", "HIDDEN TESTS"), ("hw1-loss-check", "MARK SCHEME")):
        notebook = source("hw1")
        find(notebook, where)["source"] += f"\n### BEGIN {begin}\n### END {begin}"
        with pytest.raises(ReleaseError, match="not marked"):
            release(notebook)


def test_release_writes_the_student_versions(tmp_path, capsys):
    release_main(["--out", str(tmp_path / "handout")])
    assert sorted(path.stem for path in (tmp_path / "handout").iterdir()) == HOMEWORKS
    with pytest.raises(SystemExit):
        release_main(["--out", str(FOLDER)])               # over the sources: refused
    assert "overwritten" in capsys.readouterr().err


def test_a_bundle_is_all_that_students_need_and_no_more(tmp_path, capsys):
    """In its folder the cells that are not for writing run, and the first exercise says that it is not written yet."""
    release_main(["--bundle", str(tmp_path / "new" / "class.zip")])
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'class.zip'}\n"
    with zipfile.ZipFile(tmp_path / "new" / "class.zip") as bundle:
        bundle.extractall(tmp_path)
        names = {name.removeprefix("rectified-flow/") for name in bundle.namelist()}
    ours = {f"notebooks/assignments/{name}" for name in ["checks.py", *(f"{name}.ipynb" for name in HOMEWORKS)]}
    assert names == {path.name for path in ROOT.glob("0*.py")} | ours | {"requirements.txt", "LICENSE"}
    folder = tmp_path / "rectified-flow" / "notebooks" / "assignments"
    for name in HOMEWORKS:
        assert json.loads((folder / f"{name}.ipynb").read_text(encoding="utf-8")) == release(source(name))
    cells = [cell["source"] for cell in json.loads((folder / "hw1.ipynb").read_text())["cells"]]
    code = "\n".join(["".join(cells[i]) for i in (1, 2, 4)] + ["interpolate(1, 2, 3)"])
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert "NotImplementedError: Hint: give t one trailing axis" in run.stderr, run.stderr


def test_every_notebook_finds_the_scripts_by_the_same_cell():
    first = {}
    for path in (ROOT / "notebooks").glob("**/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first[path.name] = "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])
    assert set(HOMEWORKS) <= {Path(name).stem for name in first} and len(set(first.values())) == 1


@pytest.mark.parametrize("name", HOMEWORKS)
def test_a_solution_runs_from_top_to_bottom(name, monkeypatch):
    """The cells that no check needs as well: pictures and the like.  The checks themselves ran above."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    names = {"__name__": "notebook"}
    with plt.rc_context():
        for number, cell in enumerate(source(name)["cells"]):
            if cell["cell_type"] == "code" and not mark(cell).get("grade"):
                exec(compile(cell["source"], f"<{name}, cell {number}>", "exec"), names)
    plt.close("all")


# ---- Hostile and clumsy submissions ----------------------------------------------------------------------------------

GOOD = "\n\n" + find(source("hw1"), "hw1-interpolate")["source"]
GOOD_LOSS = "\n\n" + find(source("hw1"), "hw1-loss")["source"]
HOSTILE = {                                                 # code of interpolate's cell, words of the feedback
    "raises": ("raise RuntimeError('boo')", "RuntimeError: boo"),
    "raises after the definition": (GOOD + "\n1 / 0", None),
    "has a syntax error": ("def interpolate(x0, x1, t)\n    return x0", "SyntaxError"),
    "was renamed": ("def interpolation(x0, x1, t):\n    return x0", "was interpolate renamed?"),
    "loops when called": ("def interpolate(x0, x1, t):\n    while True:\n        pass", "longer than the time limit"),
    "hangs in the cell": ("import threading\nthreading.Event().wait()", "longer than the time limit"),
    "prints megabytes": ("for i in range(3000):\n    print('x' * 10000)" + GOOD, None),
    "prints megabytes when called": ("def interpolate(*a):\n    print('x' * 30_000_000, flush=True)\n    return 1.0",
                                     "expected"),
    "exits": ("import sys\ndef interpolate(x0, x1, t):\n    sys.exit(0)", "ended the program"),
    "exits in the cell": ("import sys\nsys.exit(0)", "ended the program"),
    "exits at once": ("import os\ndef interpolate(x0, x1, t):\n    os._exit(0)", "os._exit"),
    "exits at once in the cell": ("import os\nos._exit(0)", "ended the process"),
    "kills itself": ("import os\ndef interpolate(x0, x1, t):\n    os.kill(os.getpid(), 9)", "signal 9"),
    "eats memory": ("def interpolate(x0, x1, t):\n    return bytearray(1 << 40)", "MemoryError"),
    "says that it passed": ("import os, json\nfor fd in range(3, 64):\n    try:\n"
                            "        os.write(fd, b'{\"passed\": true}\\n')\n    except OSError: pass\nos._exit(0)",
                            "ended the process"),
    "closes everything": ("import os\nos.closerange(0, 256)", "ended the process"),
    "overwrites the check": ("def expect(*a, **k): pass\nrequire = expect\nimport checks\nchecks.expect = expect\n"
                             "def interpolate(x0, x1, t):\n    return x1", "expected"),
    "overwrites the check's code": ("def nothing(*a, **k): pass\nexpect.__code__ = nothing.__code__\n"
                                    "def interpolate(x0, x1, t):\n    return x1", "expected"),
    "overwrites torch": ("torch.allclose = lambda *a, **k: True\ntorch.Tensor.__eq__ = lambda *a: True\n"
                         "ch1.interpolate = None\ntorch.set_grad_enabled(False)\n"
                         "torch.set_default_dtype(torch.float64)\n"
                         "def interpolate(x0, x1, t):\n    return x1", "expected"),
    "overwrites builtins": ("import builtins\nbuiltins.len = builtins.all = builtins.zip = 0\n"
                            "builtins.AssertionError = 0\n"
                            "def interpolate(x0, x1, t):\n    return x1", "expected"),
    "returns nonsense": ("class Yes:\n    shape = (2, 2)\n    def __eq__(self, other): return True\n"
                         "def interpolate(*a):\n    return Yes()", "which is no tensor"),
    "closes its output": ("import sys\nsys.stdout.close()" + GOOD, None),
    "says what cannot be written": ("def interpolate(*a):\n    assert False, chr(0xd800)", "?"),
    "kills the grader": ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", None),
}
LINE = "return x0 + t.reshape(len(t), *[1] * (x0.dim() - 1)) * (x1 - x0)"
HONEST = {                                                  # what people write in Jupyter: code of interpolate's cell
    "line magics": "%matplotlib inline\n%load_ext autoreload\n%no_such_magic 3" + GOOD + "\n    %time len(x0)",
    "a cell magic": "%%time" + GOOD,
    "shell commands": "!ls\nif True:\n    !ls\none = !echo $PIP_NO_INDEX\nONE = int(one[0])"    # pip installs nothing
                      + GOOD.replace("[1]", "[ONE]"),
    "a question mark": "torch.ones?\n?torch.ones" + GOOD,
    "await": "import asyncio\nONE = await asyncio.sleep(0, 1)" + GOOD.replace("[1]", "[ONE]"),
    "display": GOOD.replace("    return", "    display(time)\n    get_ipython()\n    return"),
    "a dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Line:\n"
                   "    x0: torch.Tensor\n    x1: Tensor\n    def at(self, t):\n"
                   "        x0, x1 = self.x0, self.x1\n        " + LINE + "\n"
                   "def interpolate(x0, x1, t):\n    return Line(x0, x1).at(t)",
    "pickle": "import pickle\nclass Line:\n    def at(self, x0, x1, t):\n        " + LINE + "\n"
              "line = pickle.loads(pickle.dumps(Line()))\ninterpolate = line.at",
    "a compiled function": "@torch.jit.script\ndef mix(x0, x1, time):\n    return x0 + time * (x1 - x0)\n"
                           + GOOD.replace("x0 + time * (x1 - x0)", "mix(x0, x1, time)"),
    "a main guard": "def main():\n    globals()['ONE'] = 1\nif __name__ == '__main__':\n    main()"
                    + GOOD.replace("[1]", "[ONE]"),
    "a percent sign in brackets": "ONE = (7\n% 3)" + GOOD.replace("[1]", "[ONE]"),
    "a no-break space": "\u00a0\n" + GOOD.replace("x0 + time", "x0\u00a0+ time"),
    "another device": "torch.set_default_device('meta')" + GOOD,
    "a method of tensors": "torch.Tensor.like = lambda t, x: t.reshape(len(t), *[1] * (x.dim() - 1))\n"
                           "def interpolate(x0, x1, t):\n    return x0 + t.like(x0) * (x1 - x0)",
}


@pytest.fixture(scope="module")
def hostile():
    """Reports of the hostile, the honest and the clumsy, by one server with a short time limit."""
    notebooks = {name: answer("hw1", "interpolate", code) for name, (code, _) in HOSTILE.items()}
    notebooks |= {name: answer("hw1", "interpolate", code) for name, code in HONEST.items()} | clumsy()
    return dict(zip(notebooks, grade_all(notebooks.values(), seconds=8)))


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "kills the grader"])
def test_a_hostile_cell_costs_its_own_exercise(hostile, name):
    words = HOSTILE[name][1]
    assert lost(hostile[name]) == (["hw1-interpolate"] if words else []), hostile[name]
    assert (words or "") in message(hostile[name], "hw1-interpolate")
    assert len(hostile[name]["output"]) < 3000 and all(len(e["message"]) < 5000 for e in hostile[name]["exercises"])


def test_who_kills_the_grader_is_alone_without_points(hostile):
    assert "killed the grader (signal 9)" in hostile["kills the grader"]["error"]


@pytest.mark.parametrize("name", HONEST)
def test_what_jupyter_runs_earns_its_points(hostile, name):
    assert lost(hostile[name]) == [], hostile[name]


def without(*grade_ids):
    notebook = source("hw1")
    notebook["cells"] = [cell for cell in notebook["cells"] if mark(cell).get("grade_id") not in grade_ids]
    return notebook


def changed(change):
    notebook = source("hw1")
    for cell in notebook["cells"]:
        change(cell)
    return notebook


def weaker(cell):
    """A student who edits the checks and unlocks the cells."""
    if mark(cell).get("grade"):
        cell["source"] = "pass"
        cell["metadata"]["nbgrader"] |= {"points": 100, "locked": False}


def bare(cell):
    cell["metadata"] = {}


def clumsy():
    """Notebooks of students who moved, deleted or edited what they should not have; all solutions are right but one."""
    wrong = answer("hw1", "loss", "def flow_matching_loss(*a):\n    return 0.0")
    for cell in wrong["cells"]:
        weaker(cell)
    straight = find(source("hw1"), "hw1-straightness")["source"].replace("- 1", "- len(axes) // 3")   # of the figure
    euler = find(source("hw1"), "hw1-euler")["source"]
    locked = answers("hw1", {"euler": "@wraps(print)\n" + euler})
    find(locked, "hw1-setup")["source"] += "\nfrom functools import wraps"
    return {"no loss": without("hw1-loss"), "no checks": without("hw1-loss-check", "hw1-setup", "hw1-tools"),
            "edited checks": wrong, "an import in a locked cell": locked, "no metadata": changed(bare),
            "a name of the figure's cell": answers("hw1", {"straightness": straight}),
            "own cell above": with_cell("hw1-euler", 0, euler.replace("def euler", "def mine"), euler="euler = mine"),
            "own cell below": with_cell("hw1-euler-check", 1, euler.replace("def euler", "def mine"),
                                        euler="def euler(*args):\n    return mine(*args)"),
            "a name used twice": with_cell("hw1-euler-check", 1, "def mine():\n    return 0",
                                           euler=euler.replace("euler", "mine") + "\neuler = lambda *a: mine(*a)"),
            "a name of a check": answers("hw1", {"loss": "ones = torch.ones_like(x0)" + GOOD_LOSS}),
            "after the last check": with_cell("hw1-straightness-check", 1, "import os\nos.kill(os.getppid(), 9)"),
            "no cells": {"cells": [{}]}, "another notebook": {"cells": [{"cell_type": "code", "source": "x = 1"}]}}


def with_cell(grade_id, below, code, **codes):
    """Homework 1 with an own cell above (0) or below (1) one of ours, and other code in the cells of some exercises."""
    notebook = answers("hw1", codes)
    place = notebook["cells"].index(find(notebook, grade_id)) + below
    notebook["cells"].insert(place, {"cell_type": "code", "metadata": {}, "outputs": [], "source": code})
    return notebook


def test_missing_moved_and_edited_cells(hostile):
    """Deleted cells cost their own exercise, edited checks change nothing, lost metadata needs --homework."""
    assert lost(hostile["no loss"]) == lost(hostile["edited checks"]) == ["hw1-loss"]
    assert "is missing in this notebook" in message(hostile["no loss"], "hw1-loss")
    for name in ("no checks", "own cell above", "own cell below", "a name used twice", "an import in a locked cell",
                 "a name of a check", "a name of the figure's cell", "after the last check"):
        assert lost(hostile[name]) == [], hostile[name]
    assert sum(e["points"] for e in hostile["edited checks"]["exercises"]) == 13
    assert "--homework" in hostile["no metadata"]["error"] and "--homework" in hostile["another notebook"]["error"]
    assert "no notebook" in hostile["no cells"]["error"]


def test_which_homework_it_is_comes_from_its_cells(tmp_path):
    for name in HOMEWORKS:
        (tmp_path / "my homework.ipynb").write_text(json.dumps(release(source(name))))
        assert homework_of(read_notebook(tmp_path / "my homework.ipynb")).name == name
    with pytest.raises(GradingError, match="no homework 'hw9'"):
        homework_of({"cells": []}, "hw9")


# ---- As a lecturer calls it: pytest, nbgrader ------------------------------------------------------------------------


def pytest_here(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


def test_the_command_line_prints_points_and_writes_results(tmp_path):
    """Of a notebook without metadata, in a folder where a student's conftest.py lies about that must not be run."""
    homework, exercise, code, words = WRONG_ANSWERS[0]
    notebook = answer(homework, exercise, code + "\nprint('a hidden test')")
    for cell in notebook["cells"]:
        bare(cell)
    (tmp_path / "my_hw.ipynb").write_text(json.dumps(notebook), encoding="utf-8-sig")
    (tmp_path / "conftest.py").write_text("raise SystemExit('a conftest of the submission was run')")
    command = [FOLDER, "--submission=my_hw.ipynb", "--homework=hw1", "--results=a/new/results.json"]
    run = pytest_here(*command, cwd=tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "  0 / 2  hw1-interpolate" in run.stdout and "  3 / 3  hw1-loss" in run.stdout and words in run.stdout
    assert "score 11 / 13" in run.stdout and "4 passed" in run.stdout
    text = (tmp_path / "a" / "new" / "results.json").read_text()
    results = json.loads(text)
    assert results["score"] == 11 and len(results["tests"]) == 5
    assert results["tests"][0] | {"output": ""} == {"name": "hw1-interpolate", "score": 0, "max_score": 2, "output": "",
                                                    "visibility": "visible", "status": "failed"}
    assert words in results["tests"][0]["output"] and results["tests"][1]["score"] == 3
    assert "a hidden test" not in text
    pytest_here(*command, "--printed", cwd=tmp_path)
    assert "a hidden test" in json.loads((tmp_path / "a" / "new" / "results.json").read_text())["output"]


@pytest.mark.parametrize("arguments, words, graded", [
    ([], "nothing to grade: python -m pytest notebooks/assignments --submission my_hw1.ipynb", False),
    (["--submission=nowhere.ipynb"], "cannot read", True),
    (["--submission="], "Is a directory", True),            # Gradescope's recipe, where no notebook was handed in
    (["--submission=text.ipynb"], "is no notebook", True),
])
def test_what_is_wrong_with_the_command_is_said_in_one_line(tmp_path, arguments, words, graded):
    """And a submission that cannot be graded has 0 points in the results, with the same words."""
    (tmp_path / "text.ipynb").write_text("def interpolate(): ...")
    run = pytest_here(FOLDER, *arguments, "--results=results.json", cwd=tmp_path)
    lines = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
    assert run.returncode == 4 and len(lines) == 1 and words in lines[0], run.stdout + run.stderr
    assert (tmp_path / "results.json").exists() == graded
    if graded:
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["score"] == 0 and words in results["output"]


DOCKER = """#!{python}
# Stands for docker: runs the command of `docker run` here, with its folders in place of the container's.
import shutil, subprocess, sys, tempfile
folders = {{"/flows": ".", "/in": tempfile.mkdtemp()}}
for mount in [sys.argv[i + 1] for i, word in enumerate(sys.argv) if word == "-v"]:
    here, there = mount.removesuffix(":ro").split(":")
    if there.startswith("/in/"):
        shutil.copy(here, folders["/in"] + there[3:])
    else:
        folders[there] = here
if sys.argv[1] == "run":
    def real(word):
        return next((path + word[len(a):] for a, path in folders.items() if (word + "/").startswith(a + "/")), word)
    command = sys.argv[sys.argv.index("flows") + 1:]
    subprocess.run([{python!r}, *map(real, command[1:])])
"""


def test_the_guides_own_commands_run_as_written(tmp_path):
    """All but nbgrader's (below), in a copy of the repository; pip does nothing, docker runs its command right here."""
    files = [*ROOT.glob("0*.py"), *FOLDER.glob("*.py"), *FOLDER.glob("*.ipynb")]
    for path in [*files, ROOT / "requirements.txt", ROOT / "LICENSE"]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    (tmp_path / "bin").mkdir()
    for name, text in {"pip": "#!/bin/sh\n", "docker": DOCKER.format(python=sys.executable)}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "submitted").mkdir()
    (tmp_path / "submitted" / "Zoë Łove.ipynb").write_text(json.dumps(source("hw1")), encoding="utf-8-sig")
    (tmp_path / "submitted" / "aaron.ipynb").write_text("no notebook")
    (tmp_path / "my_hw1.ipynb").write_text(json.dumps(source("hw1")))
    guide = (FOLDER / "README.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"```bash\n(.*?)```", guide, re.S) if "nbgrader" not in block]
    paths = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    git = "git init -q . && git add -A && git -c user.name=a -c user.email=a@b commit -qm all\n"

    def table():
        with open(tmp_path / "grades.csv", encoding="utf-8", newline="") as file:
            return {line["submission"]: line for line in csv.DictReader(file)}

    def bash(block):
        run = subprocess.run(["bash", "-c", block], cwd=tmp_path, env={**os.environ, "PATH": os.pathsep.join(paths)},
                             capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert "not found" not in run.stderr and "No such file" not in run.stderr, run.stderr
        return run.stdout
    first, container, grading, gradescope = blocks
    assert "score 0 / 13" in bash(first)
    assert {line["score"] for line in table().values()} == {"0"} and len(table()) == len(HOMEWORKS)
    assert (tmp_path / "class.zip").exists()
    for block in (container, grading):
        (tmp_path / "grades.csv").unlink()
        bash(block)
        rows = table()
        assert {name: line["score"] for name, line in rows.items()} == {"Zoë Łove.ipynb": "13", "aaron.ipynb": "0"}
        assert rows["Zoë Łove.ipynb"]["hw1-loss"] == "3" and "is no notebook" in rows["aaron.ipynb"]["feedback"]
    assert json.loads((tmp_path / "results" / "my_hw1.json").read_text())["score"] == 13
    bash(git + gradescope)
    with zipfile.ZipFile(tmp_path / "autograder.zip") as file:
        assert {"setup.sh", "run_autograder", "flows/notebooks/assignments/grader.py"} <= set(file.namelist())


def test_the_guide_counts_the_points(reports):
    """Of all exercises, and of each homework in its table and its schedule."""
    guide = (FOLDER / "README.md").read_text(encoding="utf-8")
    sums = [sum(e["points"] for e in report["exercises"]) for report in reports[:len(HOMEWORKS)]]
    by_hand = sum(sum(report["by_hand"].values()) for report in reports[:len(HOMEWORKS)])
    assert f"({sum(sums)} points)" in guide and f"{sum(sums) + by_hand} points together" in guide
    for name, points in zip(HOMEWORKS, [*map(str, sums[:-1]), f"{sums[-1]} + {by_hand}"]):
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(points)} \| \d", guide, re.M)
    weeks = [int(points) for points in re.findall(r"^\| \d \|.*\| (\d+) \|$", guide, re.M)]
    assert len(weeks) == 4 and sum(weeks) == sum(sums) + by_hand


def test_pytest_of_the_whole_repository_collects_no_homework(tmp_path):
    """And the two conftest.py do not get into each other's way."""
    shutil.copytree(FOLDER, tmp_path / "notebooks" / "assignments")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("NUMBER = 3\n")
    test = "from conftest import NUMBER\n\ndef test_it():\n    assert NUMBER == 3\n"
    (tmp_path / "tests" / "test_it.py").write_text(test)
    for arguments in ([], ["tests"]):
        run = pytest_here(*arguments, cwd=tmp_path)
        assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout + run.stderr


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course of nbgrader: all five sources as one assignment, released by nbgrader."""
    pytest.importorskip("nbgrader", reason="nbgrader is not installed (pip install nbgrader)")
    folder = tmp_path_factory.mktemp("course")
    for path in [*ROOT.glob("0*.py"), FOLDER / "checks.py"]:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / "source" / "all").mkdir(parents=True)
    for homework in HOMEWORKS:
        shutil.copy(FOLDER / f"{homework}.ipynb", folder / "source" / "all")
    (folder / "nbgrader_config.py").write_text("c = get_config()\nc.CourseDirectory.course_id = 'flows'\n")

    def nbgrader(*arguments):
        home = {"HOME": str(folder), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1",
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}   # it calls alembic
        run = subprocess.run([sys.executable, "-m", "nbgrader", *arguments], cwd=folder, env={**os.environ, **home},
                             capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
        assert run.returncode == 0, run.stderr
    nbgrader("generate_assignment", "all", "--create")
    return folder, nbgrader


@pytest.mark.parametrize("name", HOMEWORKS)
def test_release_gives_what_nbgrader_gives(course, name):
    """Cell by cell: kinds, metadata but for its checksums, and text but for the message of the stub."""
    theirs = json.loads((course[0] / "release" / "all" / f"{name}.ipynb").read_text(encoding="utf-8"))
    ours = release(source(name))
    assert len(theirs["cells"]) == len(ours["cells"])
    for a, b in zip(theirs["cells"], ours["cells"]):
        assert a["cell_type"] == b["cell_type"] and a.get("outputs") == b.get("outputs")
        seen = copy.deepcopy(a["metadata"])
        if seen.get("nbgrader"):
            seen["nbgrader"] = {k: v for k, v in seen["nbgrader"].items() if k not in ("checksum", "cell_type")}
        assert seen == b["metadata"]
        text = re.sub(r"NotImplementedError\(.*\)", "NotImplementedError()", "".join(b["source"]))
        assert "".join(a["source"]) == text


def test_nbgrader_grades_a_solution_and_a_stub(course):
    """Homework 1 of the assignment; a notebook that is not handed in has no points."""
    from nbgrader.api import Gradebook
    folder, nbgrader = course
    students = {"solution": source("hw1"), "stub": release(source("hw1"))}
    for student, notebook in students.items():
        (folder / "submitted" / student / "all").mkdir(parents=True)
        (folder / "submitted" / student / "all" / "hw1.ipynb").write_text(json.dumps(notebook))
    nbgrader("autograde", "all", "--create")
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as book:
        graded = {student: book.find_submission_notebook("hw1", "all", student) for student in students}
        scores = {student: (notebook.score, notebook.max_score) for student, notebook in graded.items()}
    assert scores == {"solution": (13, 13), "stub": (0, 13)}
