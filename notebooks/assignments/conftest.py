"""Grade a homework: `python -m pytest notebooks/assignments --submission my_hw1.ipynb [--results results.json]`."""
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))    # this folder is a package only so that names do not clash
from grader import GradingError, grade_all, score

REPORT = pytest.StashKey()


def pytest_addoption(parser):
    """What a lecturer may ask for."""
    group = parser.getgroup("homework")
    group.addoption("--submission", help="the notebook to grade")
    group.addoption("--homework", help="which homework it is (hw1 ... hw5), if its cells have lost their grade_ids")
    group.addoption("--results", help="also write Gradescope's results.json to this path")
    group.addoption("--printed", action="store_true", help="with --results: also what the submission printed")
    group.addoption("--time-limit", type=int, default=60, help="seconds for a cell, and for a check (%(default)s)")
    group.addoption("--memory", type=int, default=4096, help="MiB that a submission may take (%(default)s; Linux)")


@pytest.hookimpl(tryfirst=True)                             # before pytest prints its head
def pytest_sessionstart(session):
    """Grade before collecting, so that every exercise becomes a test.

    pytest does not call this when it finds this folder only while it collects the whole repository: nothing to grade.
    """
    config, option = session.config, session.config.option
    if option.submission is None:
        raise pytest.UsageError("nothing to grade: python -m pytest notebooks/assignments --submission my_hw1.ipynb")
    path = Path(config.invocation_params.dir, option.submission)
    try:
        report = grade_all([path], option.homework, option.time_limit, option.memory)[0]
        write_results(report, config)
        if "error" in report:
            raise GradingError(report["error"])
    except (GradingError, OSError) as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[REPORT] = report
    if option.tbstyle == "auto":                            # the summary below says it all, once
        option.tbstyle, config.pluginmanager.get_plugin("terminalreporter").reportchars = "no", ""


def write_results(report, config):
    """Gradescope's results.json, if asked for; a notebook that cannot be graded has 0 points and the reason."""
    if not config.option.results:
        return
    tests = [{"name": e["name"], "score": e["score"], "max_score": e["points"], "visibility": "visible",
              "status": "passed" if e["score"] == e["points"] else "failed", "output": e["message"]}
             for e in report.get("exercises", [])]
    text = report.get("error") or (report["output"] if config.option.printed else "")
    path = Path(config.invocation_params.dir, config.option.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"score": score(report)[0], "output": text, "tests": tests}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def pytest_ignore_collect(collection_path, config):
    """Without a submission there is nothing to collect here."""
    return True if collection_path.name == "test_submission.py" and REPORT not in config.stash else None


def pytest_generate_tests(metafunc):
    """An exercise, a test."""
    exercises = metafunc.config.stash[REPORT]["exercises"]
    metafunc.parametrize("exercise", exercises, ids=[exercise["name"] for exercise in exercises])


def pytest_terminal_summary(terminalreporter, config):
    """Points per exercise and the score, with what each lost point teaches."""
    report = config.stash.get(REPORT, None)
    if report is None:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"{report['homework']}: {report['title']}")
    for e in report["exercises"]:
        write(f"{e['score']:>3} / {e['points']}  {e['name']}")
        for line in e["message"].splitlines():
            write(f"         {line}")
    for name, points in report["by_hand"].items():
        write(f"  ? / {points}  {name}: graded by hand")
    write("score {} / {}".format(*score(report)))
