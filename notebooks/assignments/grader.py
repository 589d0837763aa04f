"""Grade homework notebooks: a submission is untrusted code, so it runs in a process of its own, as it does in Jupyter.

    python notebooks/assignments/grader.py submitted --csv grades.csv      # a folder of notebooks; one: see README.md

A server process imports torch, IPython and the scripts once, then forks for every submission.  The child runs the cells
in their order, in IPython.  In place of a check cell it puts back what the student changed in torch, the scripts and
the checks, and runs the check cell of *our* source notebook.  Time (per cell and per check), memory and output are
bounded.  A cell or check that hangs or kills the process costs its exercise: the notebook is run again without it.

This protects the grading against accidents and simple tricks.  It is no sandbox: submissions run as your user and can
read and write your files, so grade in a container (README.md).
"""
import argparse
import builtins
import csv
import gc
import importlib.util
import inspect
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("hw[0-9].ipynb"))
OUTPUT = 2000                                               # bytes of a submission's output that are kept
FILE = 64 << 20                                             # largest file that it may write
CELL = re.compile(r"^<(.*)>$")                              # how the student's cells are called in tracebacks


class GradingError(Exception):
    """Something is wrong with what the grader was given, not with an answer; one line."""


# ----------------------------------------------------------------------------------------------------------------------
# Notebooks
# ----------------------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a child runs next: a cell of the student's, or the check of an exercise."""
    label: str                                              # grade_id of a cell, or "cell 7"
    code: str
    check: str = ""                                         # grade_id of the check; "" for a cell
    ours: bool = False                                      # a cell as it was handed out: its errors teach nothing


def read_notebook(path):
    """A notebook's JSON with sources as strings.  GradingError for anything else."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        cells = notebook["cells"]
        for cell in cells:
            cell["source"] = "".join(cell["source"])
            cell["mark"] = dict(dict(cell.get("metadata") or {}).get("nbgrader") or {})
            cell["kind"] = cell["cell_type"]
            if "grade_id" in cell["mark"]:
                cell["mark"]["grade_id"] = str(cell["mark"]["grade_id"])
    except OSError as error:
        raise GradingError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise GradingError(f"{path} is no notebook of format 4 (.ipynb)") from None
    return notebook


class Homework:
    """One of our source notebooks: what a student is given, and how it is checked."""

    def __init__(self, path):
        from release import hint, release
        notebook, self.name = read_notebook(path), Path(path).stem
        self.title = notebook["cells"][0]["source"].split("\n")[0].lstrip("# ")
        self.setup, self.exercises, self.by_hand, self.hints = [], {}, {}, {}
        for cell in notebook["cells"]:
            mark, code = cell["mark"], cell["kind"] == "code"
            if code and mark.get("grade") and not mark.get("solution"):
                self.exercises[mark["grade_id"]] = (mark["points"], cell["source"])
            elif mark.get("points"):
                self.by_hand[mark["grade_id"]] = mark["points"]
            elif code and mark.get("locked"):
                self.setup.append(cell["source"])
            elif code and mark.get("solution"):
                begin = [line for line in cell["source"].split("\n") if "BEGIN SOLUTION" in line]
                self.hints[mark["grade_id"]] = hint(begin[0]) if begin else ""
        self.ids = {cell["mark"].get("grade_id") for cell in notebook["cells"]} - {None}
        self.released = {"".join(cell["source"]).strip(): cell["mark"].get("grade_id")
                         for cell in release(notebook, self.name)["cells"] if not cell["mark"].get("solution")}

    def steps(self, submission):
        """The Steps of a submission, in its order, up to its last graded cell.

        A check stands where its cell stands, since a later cell may use a name for something else.  All checks come
        once more at the end, for what is still without points: their cells were deleted, or a helper stands below them.
        """
        steps, end, waiting = [], 0, set(self.exercises)
        for number, cell in enumerate(submission["cells"], 1):
            text, name = cell["source"].strip(), cell["mark"].get("grade_id")
            check = name if name in self.exercises else self.released.get(text)
            if cell["kind"] == "code" and check in waiting:
                waiting.remove(check)                       # a second copy is a cell like any other
                steps.append(self.check(check))
            elif cell["kind"] == "code":
                steps.append(Step(name or f"cell {number}", cell["source"], "", text in self.released))
            if check in self.exercises or name in self.hints:
                end = len(steps)
        return steps[:end or None] + [self.check(check) for check in self.exercises]

    def check(self, name):
        """The Step of an exercise's check."""
        return Step(name, self.exercises[name][1], name)

    def missing(self, submission):
        """grade_ids of solution cells that a submission lacks; none if it has lost all of them."""
        present = {cell["mark"].get("grade_id") for cell in submission["cells"]}
        return [name for name in self.hints if name not in present and present & self.ids]


def homework_of(submission, wanted=None):
    """The Homework of a submission: the one asked for by name, or the one whose grade_ids it has."""
    homeworks = {path.stem: path for path in SOURCES}
    if wanted:
        if wanted not in homeworks:
            raise GradingError(f"no homework {wanted!r}; there are {', '.join(homeworks)}")
        return Homework(homeworks[wanted])
    present = {cell["mark"].get("grade_id") for cell in submission["cells"]} - {None}
    for path in SOURCES:
        homework = Homework(path)
        if homework.ids & present:
            return homework
    raise GradingError("no cell of the submission has a grade_id of ours; say which homework it is: --homework hw1")


# ----------------------------------------------------------------------------------------------------------------------
# In the child: run a submission's cells and one check
# ----------------------------------------------------------------------------------------------------------------------


class Guard:
    """Remembers modules and classes, to put back what a submission overwrites in them: functions and their code too."""

    def __init__(self, *owners):
        self.owners = [(owner, dict(vars(owner))) for owner in owners]
        functions = [f for _, names in self.owners for f in names.values() if inspect.isfunction(f)]
        self.functions = [(f, f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions]
        self.refill, self.builtins = vars(builtins).update, dict(vars(builtins))

    def restore(self):
        """Undo.  Builtins first, since everything below needs them."""
        self.refill(self.builtins)
        for owner, names in self.owners:
            now = dict(vars(owner))
            for name in now.keys() - names.keys() if inspect.isclass(owner) else ():
                if any(name in vars(base) for base in owner.__mro__[1:]):
                    delattr(owner, name)                    # it hid the name of a base class
            for name, value in names.items():
                if now.get(name, self) is not value:
                    setattr(owner, name, value)
        for function, code, defaults, keywords in self.functions:
            if function.__code__ is not code:
                function.__code__ = code
            function.__defaults__, function.__kwdefaults__ = defaults, keywords


def bound(seconds, memory):
    """Limit this process, where the system can: memory on top of what it has, size of files, processor time."""
    import resource                                         # not on Windows, where grade_all says what to do

    def limit(kind, value):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):                       # macOS knows some of these names only
            pass
    pages = Path("/proc/self/statm")
    if pages.exists():
        limit(resource.RLIMIT_AS, int(pages.read_text().split()[0]) * resource.getpagesize() + memory)
    limit(resource.RLIMIT_FSIZE, FILE)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_CPU, seconds)


def explain(error, hint):
    """What a student reads about an exception that their code, or the check, raised."""
    if isinstance(error, AssertionError):
        return str(error)[:4000] or "a check failed"
    if isinstance(error, NotImplementedError):
        return f"NotImplementedError: not written yet. Hint: {hint}"
    if isinstance(error, (SystemExit, KeyboardInterrupt, GeneratorExit)):
        return f"your code ended the program ({type(error).__name__}); a function only returns its result"
    text = (str(error).splitlines() or [""])[0][:300]
    if isinstance(error, NameError) and getattr(error, "name", None):
        text += f": is the cell missing, or was {error.name} renamed?"
    where = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):                      # its frames are ours; the place is in the error itself
        where = [(error.filename or "", error.lineno)]
    where = [f" (in {CELL.match(name)[1]}, line {line})" for name, line in where if CELL.match(name)]
    return f"{type(error).__name__}: {text}{where[-1] if where else ''}"


def new_shell():
    """IPython, which runs the cells in Jupyter: magics, `!`, `?`, await and display work.  A process has one at most.

    It keeps no history (that would be a thread, which does not survive a fork) and prints no tracebacks.
    """
    from IPython.core.compilerop import CachingCompiler
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    class Compiler(CachingCompiler):
        label = "cell"

        def get_code_name(self, raw_code, transformed_code, number):
            return f"<{self.label}>"

    class Shell(InteractiveShell):
        compiler_class = Compiler

        def run_line_magic(self, magic_name, line, _stack_depth=1):
            try:                                            # one that only the student's machine has costs no points
                return super().run_line_magic(magic_name, line, _stack_depth + 1)
            except Exception as error:
                print(f"%{magic_name}: {error}")

        def silent(self, *args, **kwargs):
            pass
        showtraceback = showsyntaxerror = enable_gui = ask_exit = silent

    shell = Shell.instance(config=Config(HistoryManager={"enabled": False}))
    shell.system = shell.system_raw                         # without a terminal of its own, which a fork may not get
    return shell


def run_cell(step):
    """Run a cell of the student's.  Returns what its error teaches, or "".  SystemExit too: a notebook would go on."""
    from IPython import get_ipython
    shell = get_ipython()
    shell.compile.label = step.label
    code = step.code.replace("\N{NO-BREAK SPACE}", " ")     # it comes along when code is copied from a web page
    result = shell.run_cell(code, store_history=False)
    error = result.error_before_exec or result.error_in_exec
    return explain(error, "") if error else ""


def run_check(fresh, names, step):
    """Run our check on a submission's names; the names of our setup cells win over the student's.

    As in Jupyter, later cells may use what a check has made, such as its x0.
    """
    import torch
    torch.set_grad_enabled(True)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    scope = {**names, **fresh, "__name__": "check"}
    try:
        exec(compile(step.code, "<check>", "exec", dont_inherit=True), scope)
    finally:
        for name in scope:
            names.setdefault(name, scope[name])


def judge(fresh, names, guard, step, hint):
    """The verdict of one check, as a dict.  later: what it needs may stand further down in the notebook."""
    verdict = {"check": step.check, "passed": True, "message": "", "later": False}
    guard.restore()
    try:
        run_check(fresh, names, step)
    except BaseException as error:
        later = isinstance(error, (NameError, NotImplementedError))
        verdict |= {"passed": False, "message": explain(error, hint), "later": later}
    guard.restore()
    return verdict


def open_streams():
    """New standard streams, since a cell may have closed or replaced them; what the old ones still hold is written."""
    sys.stdout = sys.stderr = open(1, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)


def child(job, fresh, guard, say):
    """All of a child's life.  say: tells the parent the number of the step that begins, or a dict."""
    from IPython import get_ipython
    bound(job["seconds"] * (len(job["steps"]) + 2) + 1, job["memory"])
    names, waiting = get_ipython().user_ns, set(job["waiting"])
    names.update(fresh)
    for number, step in enumerate(job["steps"]):
        if number in job["skip"] or step.check and step.check not in waiting:
            continue
        say(number)
        open_streams()
        if step.check:
            verdict = judge(fresh, names, guard, step, job["hints"][step.check])
            if not verdict["later"]:
                waiting.remove(step.check)
            say(verdict)
        else:
            error = run_cell(step)
            say({"cell": step.label, "error": "" if step.ours else error})
    open_streams()
    say({"end": True})


# ----------------------------------------------------------------------------------------------------------------------
# In the server: fork, watch, collect
# ----------------------------------------------------------------------------------------------------------------------


def fork(job, fresh, guard):
    """Start a child in a session of its own.  Returns its pid, where it speaks, its output, and a secret.

    What it says starts with the secret, so that a submission that writes a verdict to every open file earns nothing.
    """
    talk, output, secret = os.pipe(), os.pipe(), secrets.token_hex(16)
    pid = os.fork()
    if pid:
        os.close(talk[1]), os.close(output[1])
        return pid, talk[0], output[0], secret

    def say(what):
        os.write(talk[1], (str(what) if isinstance(what, int) else secret + json.dumps(what)).encode() + b"\n")
    try:
        os.setsid()
        for end, standard in ((os.open(os.devnull, os.O_RDONLY), 0), (output[1], 1), (output[1], 2)):
            os.dup2(end, standard)
        os.closerange(3, talk[1]), os.closerange(talk[1] + 1, 1024)    # what the server has open is not for submissions
        os.chdir(tempfile.mkdtemp(prefix="homework-", dir=job["scratch"]))
        for script in HERE.parents[1].glob("0*.py"):
            shutil.copy(script, ".")                        # the first cell of a notebook looks for them
        child(job, fresh, guard, say)
    finally:
        os._exit(0)


def watch(job, fresh, guard):
    """Run a submission in a child.  Returns what it said, its output, how it ended ("": well), the last step begun."""
    pid, talk, output, secret = fork(job, fresh, guard)
    heard, said, kept, printed, begun = [], b"", b"", 0, -1
    deadline, ended, waiting = time.monotonic() + job["seconds"], "", [talk, output]
    while not ended and {"end": True} not in heard:
        for end in select.select(waiting, [], [], 0.05)[0]:
            data = os.read(end, 1 << 16)
            if not data:
                waiting.remove(end)
            elif end == output:
                kept, printed = (kept + data)[:OUTPUT], printed + len(data)
            else:
                said = (said + data)[-(1 << 18):]
        *lines, said = said.split(b"\n")
        for line in lines:
            if line.startswith(secret.encode()):
                heard.append(json.loads(line[len(secret):]))
            elif line.isdigit() and int(line) > begun:      # every cell, and every check, has the time limit for itself
                begun, deadline = int(line), time.monotonic() + job["seconds"]
        if talk not in waiting:
            ended = "ended"
        elif time.monotonic() > deadline:
            ended = "time"
    try:
        os.killpg(pid, signal.SIGKILL)                      # the child and what it started
    except ProcessLookupError:
        pass
    status = os.waitpid(pid, 0)[1]
    if ended == "ended" and not os.WIFEXITED(status):
        ended = f"signal {os.WTERMSIG(status)}"
    os.close(talk), os.close(output)
    cut = f"\n[{printed} bytes in all]" if printed > OUTPUT else ""
    return heard, kept.decode(errors="replace") + cut, "" if {"end": True} in heard else ended, begun


def run_steps(job, fresh, guard):
    """Run a submission; again without the step that hung or ended the process, if one did.

    Returns the verdicts {check: dict}, the errors of cells {label: text}, and the output of the last run.
    """
    verdicts, errors = {}, {}
    while True:
        job["waiting"] = [check for check in job["hints"] if verdicts.get(check, {"later": True})["later"]]
        heard, output, ended, begun = watch(job, fresh, guard)
        verdicts |= {word["check"]: word for word in heard if "check" in word}
        errors |= {word["cell"]: word["error"] for word in heard if "cell" in word}
        if not ended or not 0 <= begun < len(job["steps"]) or begun in job["skip"]:
            return verdicts, errors, output
        step = job["steps"][begun]
        job["skip"].add(begun)
        if step.check:
            limit = f"the check ran longer than the time limit of {job['seconds']} s: is there an endless loop?"
            ways = {"time": limit,
                    "ended": "the process ended before the check was over (os._exit?)"}
            message = ways.get(ended, f"the process was killed ({ended}) before the check was over: out of memory?")
            verdicts[step.check] = {"passed": False, "message": message, "later": False}
        else:
            how = "ran longer than the time limit" if ended == "time" else "ended the process"
            errors[step.label] = f"{how}; left out"


def prepare(homework):
    """Run our setup cells once, before any submission: their names, and the guard of all that they brought."""
    names = {"__name__": "__main__"}
    for source in homework.setup:
        exec(compile(source, f"<{homework.name} setup>", "exec", dont_inherit=True), names)
    import torch
    torch.set_num_threads(1)                                # a fork must not meet the thread pool of its parent
    scripts = [module for name, module in sys.modules.items() if re.match(r"\d\d_", name)]
    guard = Guard(torch, torch.Tensor, torch.nn, torch.nn.functional, sys.modules["math"], json, os,
                  sys.modules["checks"], sys.modules[__name__], *scripts)
    gc.freeze()                                             # the collector of a child does not touch what it shares
    return names, guard


def grade(submission, options, prepared, scratch):
    """Grade one submission (path, or a notebook's dict).  Returns its report, a dict."""
    if isinstance(submission, dict):
        Path(scratch, "submission.ipynb").write_text(json.dumps(submission))
        submission = Path(scratch, "submission.ipynb")
    notebook = read_notebook(submission)
    homework = homework_of(notebook, options.get("homework"))
    if homework.name not in prepared:
        prepared[homework.name] = prepare(homework)
    hints = {name: homework.hints.get(name.removesuffix("-check"), "") for name in homework.exercises}
    job = {"steps": homework.steps(notebook), "hints": hints, "skip": set(), "scratch": scratch,
           "seconds": options["seconds"], "memory": options["memory"] << 20}
    verdicts, errors, output = run_steps(job, *prepared[homework.name])
    missing = homework.missing(notebook)
    notes = [f"\n  note: {label}: {text}" for label, text in errors.items()
             if text and "NotImplementedError" not in text]
    report = {"homework": homework.name, "title": homework.title, "by_hand": homework.by_hand, "output": output,
              "exercises": []}
    for name, (points, _) in homework.exercises.items():
        verdict = verdicts.get(name, {"passed": False, "message": "the notebook ended before this check"})
        solution, message = name.removesuffix("-check"), verdict["message"]
        if not verdict["passed"]:
            lost = [f"\n  note: the cell {solution} is missing in this notebook"] * (solution in missing)
            message += "".join(notes + lost)
        message = message.encode(errors="replace").decode()            # a lone surrogate would stop who writes it
        report["exercises"].append({"name": solution, "points": points, "score": points if verdict["passed"] else 0,
                                    "message": message})
    return report


def serve():
    """Read {submissions, options} as JSON from standard input, write a report a line to standard output."""
    os.chdir(HERE)                                          # where the first cell of a notebook looks for the scripts
    request, prepared = json.load(sys.stdin), {}
    answer = os.dup(1)
    os.dup2(2, 1)                                           # nothing that the scripts print may get into the answer
    folder = tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True)
    with folder as scratch, os.fdopen(answer, "w") as file:
        os.environ |= {"IPYTHONDIR": scratch, "PIP_NO_INDEX": "1"}     # `!pip install` changes nothing here
        new_shell()
        for submission in request["submissions"]:
            try:
                report = grade(submission, request["options"], prepared, scratch)
            except GradingError as error:
                report = {"error": str(error)}
            print(json.dumps(report), file=file, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# What a lecturer calls
# ----------------------------------------------------------------------------------------------------------------------


def grade_all(submissions, homework=None, seconds=60, memory=4096):
    """Grade paths or notebooks (dicts) in one server process.  seconds: time limit;  memory: MiB.  Returns reports."""
    if not hasattr(os, "fork"):
        raise GradingError("grading forks processes: use Linux, macOS, WSL or a container")
    if not importlib.util.find_spec("IPython"):
        raise GradingError("grading runs cells in IPython: pip install ipython")
    options = {"homework": homework, "seconds": seconds, "memory": memory}
    submissions = [s if isinstance(s, dict) else str(Path(s).resolve()) for s in submissions]
    start = "import sys; sys.path[0] = sys.argv[1]; import grader; grader.serve()"       # __main__ is for the notebooks
    reports = []
    while len(reports) < len(submissions):
        request = json.dumps({"submissions": submissions[len(reports):], "options": options})
        run = subprocess.run([sys.executable, "-c", start, str(HERE)], text=True, stdout=subprocess.PIPE, input=request,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"})
        reports += map(json.loads, run.stdout.splitlines())
        if run.returncode > 0:
            raise GradingError(f"the grader itself failed (exit code {run.returncode})")
        if run.returncode < 0:                              # the next submission did it; the others are still to come
            reports.append({"error": f"it killed the grader (signal {-run.returncode})"})
    return reports


def score(report):
    """Points of a report and their greatest sum."""
    exercises = report.get("exercises", [])
    return sum(e["score"] for e in exercises), sum(e["points"] for e in exercises)


def row(path, report):
    """A line of the table of grades: the score, everything that the student should read, and points per exercise."""
    exercises = report.get("exercises", [])
    feedback = "\n".join(f"{e['name']}: {e['message']}" for e in exercises if e["message"])
    return {"submission": str(path), "homework": report.get("homework", ""), "score": score(report)[0],
            "feedback": report.get("error", feedback), **{e["name"]: e["score"] for e in exercises}}


def write_table(path, rows, exercises):
    """The rows as .csv: a column for each of these exercises, and for those of the rows."""
    columns = dict.fromkeys(name for line in [row("", {}), dict.fromkeys(exercises), *rows] for name in line)
    with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)


def main(argv=None):
    """Command line; a mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Grade every notebook in a folder and those below it.")
    parser.add_argument("folder", type=Path, help="where the submissions are; their paths become their names")
    parser.add_argument("--csv", type=Path, default=Path("grades.csv"), help="the table to write (%(default)s)")
    parser.add_argument("--homework", help="which homework it is (hw1 ... hw5), if cells have lost their grade_ids")
    parser.add_argument("--time-limit", type=int, default=60, help="seconds for a cell, and for a check (%(default)s)")
    parser.add_argument("--memory", type=int, default=4096, help="MiB that a submission may take (%(default)s; Linux)")
    options = parser.parse_args(argv)
    paths = [path.relative_to(options.folder) for path in sorted(options.folder.rglob("*.ipynb"))]
    paths = [path for path in paths if not any(part.startswith(".") for part in path.parts)]   # .ipynb_checkpoints
    try:
        if not paths:
            raise GradingError(f"no notebook (.ipynb) in {options.folder}")
        homework = homework_of({"cells": []}, options.homework) if options.homework else None
        exercises = [name.removesuffix("-check") for name in homework.exercises] if homework else []
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        write_table(options.csv, [], exercises)             # what hinders it is told before the minutes of grading
        reports = grade_all([options.folder / path for path in paths], options.homework, options.time_limit,
                            options.memory)
        rows = [row(path, report) for path, report in zip(paths, reports)]
        write_table(options.csv, rows, exercises)
    except (GradingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for line, report in zip(rows, reports):
        print(f"{line['score']:>3} / {score(report)[1]}  {line['submission']}  {report.get('error', '')}".rstrip())


if __name__ == "__main__":
    main()
