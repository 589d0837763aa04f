"""Grade homework notebooks: a submission is untrusted code, so every exercise runs in a process of its own.

A server process imports torch and the scripts once, then forks for every exercise.  The child runs the student's cells,
puts back whatever they changed in torch, the scripts and the checks, and runs the check cell of *our* source notebook.
Time (per cell and per check), memory and output are bounded; a child that exits, hangs or crashes costs its exercise.
A cell that hangs or kills its process is left out when the other exercises are graded.

This protects the grading against accidents and simple tricks.  It is no sandbox: submissions run as your user and can
read and write your files, so grade in a container (README.md).
"""
import builtins
import gc
import inspect
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

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


def read_notebook(path):
    """A notebook's JSON with sources as strings.  GradingError for anything else."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
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
        self.known = {"".join(cell["source"]).strip() for cell in release(notebook, self.name)["cells"]
                      if not cell["mark"].get("solution")}

    def student_cells(self, submission):
        """(name, code) of the cells to run: the solutions, and what the student added; ours only from our source."""
        cells = []
        for number, cell in enumerate(submission["cells"], 1):
            ours = cell["source"].strip() in self.known or cell["mark"].get("grade") or cell["mark"].get("locked")
            if cell["kind"] == "code" and not (ours and not cell["mark"].get("solution")):
                cells.append((cell["mark"].get("grade_id") or f"cell {number}", without_magics(cell["source"])))
        return cells

    def missing(self, submission):
        """grade_ids of solution cells that a submission lacks."""
        present = {cell["mark"].get("grade_id") for cell in submission["cells"]}
        return [name for name in self.hints if name not in present]


def without_magics(source):
    """%magics and !commands are no Python: leave them out."""
    return "\n".join("pass" if re.match(r"[%!]", line) else line for line in source.split("\n"))


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
                delattr(owner, name)                        # it hid the name of a base class
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
        return str(error) or "a check failed"
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


def run_cells(names, cells, skip, progress):
    """Run a submission's cells in `names`, but those to skip.  An error ends its cell only.  Returns {cell: error}."""
    errors = {}
    for number, (label, code) in enumerate(cells):
        if number in skip:
            continue
        progress(number)
        try:
            exec(compile(code, f"<{label}>", "exec", dont_inherit=True), names)
        except BaseException as error:                      # SystemExit too: a notebook would go on as well
            errors[label] = explain(error, "")
    return errors


def run_check(fresh, names, code):
    """Run our check on a submission's names; the names of our setup cells win over the student's."""
    import torch
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    exec(compile(code, "<check>", "exec", dont_inherit=True), {**names, **fresh, "__name__": "check"})


def child(job, fresh, guard, say, secret):
    """All of a child's life.  say: writes a line to the parent; secret: reads what the verdict must start with."""
    bound(job["seconds"] * (len(job["cells"]) + 2) + 1, job["memory"])
    names = dict(fresh)
    errors = run_cells(names, job["cells"], job["skip"], lambda number: say(str(number)))
    guard.restore()
    say(str(len(job["cells"])))
    key, passed, message = secret(), False, ""
    try:
        run_check(fresh, names, job["check"])
        passed = True
    except BaseException as error:
        message = explain(error, job["hint"])
    guard.restore()
    sys.__stdout__.flush(), sys.__stderr__.flush()
    verdict = {"passed": passed, "message": message, "errors": errors}
    say(key + json.dumps(verdict))


# ----------------------------------------------------------------------------------------------------------------------
# In the server: fork, watch, collect
# ----------------------------------------------------------------------------------------------------------------------


def fork(job, fresh, guard):
    """Start a child in a session of its own.  Returns its pid, where it speaks, its output, and the secret."""
    talk, output, whisper = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        for end in (talk[1], output[1], whisper[0]):
            os.close(end)
        secret = secrets.token_hex(16)
        os.write(whisper[1], secret.encode())
        os.close(whisper[1])
        return pid, talk[0], output[0], secret
    try:
        os.setsid()
        for end, standard in ((os.open(os.devnull, os.O_RDONLY), 0), (output[1], 1), (output[1], 2)):
            os.dup2(end, standard)
        low, high = sorted((talk[1], whisper[0]))           # whatever else the server has open is not for submissions
        os.closerange(3, low), os.closerange(low + 1, high), os.closerange(high + 1, 1024)
        os.chdir(tempfile.mkdtemp(prefix="homework-", dir=job["scratch"]))
        child(job, fresh, guard, lambda line: os.write(talk[1], line.encode() + b"\n"),
              lambda: os.read(whisper[0], 100).decode())
    finally:
        os._exit(0)


def watch(job, fresh, guard):
    """Run one exercise in a child.  Returns (verdict or None, output, how it ended, the last cell it began)."""
    pid, talk, output, secret = fork(job, fresh, guard)
    said, kept, printed, begun = b"", b"", 0, -1
    deadline, verdict, ended, waiting = time.monotonic() + job["seconds"], None, "", [talk, output]
    while verdict is None and not ended:
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
                verdict = json.loads(line[len(secret):])
            elif line.isdigit() and int(line) > begun:      # every cell, and the check, has the time limit for itself
                begun, deadline = int(line), time.monotonic() + job["seconds"]
        if verdict is None and talk not in waiting:
            ended = "ended"
        elif verdict is None and time.monotonic() > deadline:
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
    return verdict, kept.decode(errors="replace") + cut, ended, begun


def grade_exercise(job, fresh, guard):
    """Grade one exercise; cells that hang or end the process join job["skip"], and it is tried again without them."""
    notes = job["notes"]
    while True:
        verdict, output, ended, begun = watch(job, fresh, guard)
        if verdict or not 0 <= begun < len(job["cells"]):
            break
        label = job["cells"][begun][0]
        notes[label] = ("ran longer than the time limit" if ended == "time" else "ended the process") + "; left out"
        job["skip"].add(begun)
    if verdict is None:
        ways = {"time": f"the check ran longer than the time limit of {job['seconds']} s: is there an endless loop?",
                "ended": "the process ended before the check was over (os._exit?)"}
        message = ways.get(ended, f"the process was killed ({ended}) before the check was over: out of memory?")
        verdict = {"passed": False, "message": message, "errors": {}}
    for label, text in {**verdict["errors"], **notes}.items():
        if not verdict["passed"] and "NotImplementedError" not in text:
            verdict["message"] += f"\n  note: {label}: {text}"
    return verdict["passed"], verdict["message"], output


def prepare(homework):
    """Run our setup cells once, before any submission: their names, and the guard of all that they brought."""
    names = {"__name__": "homework"}
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
    """Grade one submission (path, or a notebook's dict).  Returns the report that conftest.py prints."""
    if isinstance(submission, dict):
        Path(scratch, "submission.ipynb").write_text(json.dumps(submission))
        submission = Path(scratch, "submission.ipynb")
    notebook = read_notebook(submission)
    homework = homework_of(notebook, options.get("homework"))
    if homework.name not in prepared:
        prepared[homework.name] = prepare(homework)
    report = {"homework": homework.name, "title": homework.title, "by_hand": homework.by_hand, "exercises": []}
    job = {"cells": homework.student_cells(notebook), "skip": set(), "notes": {}, "scratch": scratch,
           "seconds": options["seconds"], "memory": options["memory"] << 20}
    missing = homework.missing(notebook)
    for name, (points, check) in homework.exercises.items():
        solution = name.removesuffix("-check")
        job |= {"check": check, "hint": homework.hints.get(solution, "")}
        passed, message, output = grade_exercise(job, *prepared[homework.name])
        if not passed and solution in missing:
            message += f"\n  note: the cell {solution} is missing in this notebook"
        report["exercises"].append({"name": solution, "points": points, "score": points if passed else 0,
                                    "message": message, "output": output})
    return report


def serve():
    """Read {submissions, options} as JSON from standard input, write a list of reports to standard output."""
    sys.path.insert(0, str(HERE))
    os.chdir(HERE)                                          # where the first cell of a notebook looks for the scripts
    request, reports, prepared = json.load(sys.stdin), [], {}
    answer = os.dup(1)
    os.dup2(2, 1)                                           # nothing that the scripts print may get into the answer
    with tempfile.TemporaryDirectory(prefix="grading-") as scratch:
        for submission in request["submissions"]:
            try:
                reports.append(grade(submission, request["options"], prepared, scratch))
            except GradingError as error:
                reports.append({"error": str(error)})
    with os.fdopen(answer, "w") as file:
        json.dump(reports, file)


def grade_all(submissions, homework=None, seconds=60, memory=4096):
    """Grade paths or notebooks (dicts) in one server process.  seconds: time limit;  memory: MiB.  Returns reports."""
    if not hasattr(os, "fork"):
        raise GradingError("grading forks processes: use Linux, macOS, WSL or a container")
    options = {"homework": homework, "seconds": seconds, "memory": memory}
    submissions = [s if isinstance(s, dict) else str(Path(s).resolve()) for s in submissions]
    run = subprocess.run([sys.executable, str(Path(__file__).resolve())], text=True, stdout=subprocess.PIPE,
                         input=json.dumps({"submissions": submissions, "options": options}),
                         env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"})
    if run.returncode:
        raise GradingError(f"the grader itself failed (exit code {run.returncode})")
    return json.loads(run.stdout)


if __name__ == "__main__":
    serve()
