"""Make the student version of the homework notebooks, with the standard library alone.

    python notebooks/assignments/release.py                    # all five, to ./release
    python notebooks/assignments/release.py notebooks/assignments/hw1.ipynb --out handout
    python notebooks/assignments/release.py --bundle class.zip # what students need to work: these, scripts and checks

Solution regions become a stub with the hint that stands on their BEGIN line; hidden tests, marking schemes and outputs
go; locked cells can no longer be edited in Jupyter.  `nbgrader generate_assignment` gives the same, but for the text of
the stub and the checksums of its database.
"""
import argparse
import copy
import json
import re
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
STUB = "# YOUR CODE HERE"


class ReleaseError(Exception):
    """A source notebook with which something is wrong; one line for the lecturer."""


def cut(source, begin, end, where, stub=None):
    """The source without its regions from a line with `begin` to one with `end`; stub(line) is put in their place.

    Returns the text and the number of regions.  ReleaseError for nested or unclosed ones.
    """
    kept, inside, count = [], False, 0
    for line in source.split("\n"):
        if begin in line:
            if inside:
                raise ReleaseError(f"{where}: {begin} within {begin}")
            inside, count = True, count + 1
            kept += stub(line) if stub else []
        elif end in line:
            if not inside:
                raise ReleaseError(f"{where}: {end} without {begin}")
            inside = False
        elif not inside:
            kept.append(line)
    if inside:
        raise ReleaseError(f"{where}: {begin} without {end}")
    return "\n".join(kept), count


def hint(line):
    """What a BEGIN SOLUTION line says after its colon."""
    return line.partition("BEGIN SOLUTION")[2].lstrip(": ").strip() or "see the text above"


def stub(line):
    """The two lines that stand in a student's notebook in place of a solution."""
    indent = re.match(r"\s*", line).group()
    message = json.dumps("Hint: " + hint(line), ensure_ascii=False)
    return [indent + STUB, f"{indent}raise NotImplementedError({message})"]


def release_cell(cell, where):
    """One cell as a student gets it."""
    cell = copy.deepcopy(cell)
    mark = cell["metadata"].get("nbgrader", {})
    text = "".join(cell["source"])
    solution, regions = cut(text, "BEGIN SOLUTION", "END SOLUTION", where, stub)
    if regions and not mark.get("solution"):
        raise ReleaseError(f"{where}: a solution region in a cell that is not marked as a solution")
    if mark.get("solution") and not regions:
        solution = "\n".join(stub("")) if cell["cell_type"] == "code" else "YOUR ANSWER HERE"
    for begin, kind in (("HIDDEN TESTS", "grade"), ("MARK SCHEME", "task")):
        solution, regions = cut(solution, f"BEGIN {begin}", f"END {begin}", where)
        if regions and not mark.get(kind):
            raise ReleaseError(f"{where}: {begin} in a cell that is not marked as {kind}")
    cell["source"] = solution.splitlines(keepends=True)
    if cell["cell_type"] == "code":
        cell |= {"outputs": [], "execution_count": None}
    if mark.get("solution") or mark.get("grade") or mark.get("locked"):
        cell["metadata"]["deletable"] = False
        if not mark.get("solution"):
            cell["metadata"]["editable"] = False
    return cell


def release(notebook, name="notebook"):
    """A source notebook (the dict of its JSON) as a student gets it."""
    cells = [release_cell(cell, f"{name}, cell {i}") for i, cell in enumerate(notebook["cells"], 1)]
    return {**notebook, "cells": cells}


def text_of(notebook):
    """A notebook as the text of its file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def write_bundle(path, ready):
    """A zip of one folder: the student versions, where their first cell finds the scripts and the checks."""
    root, folder = HERE.parents[1], Path("rectified-flow")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for file in [*sorted(root.glob("0*.py")), HERE / "checks.py", root / "requirements.txt", root / "LICENSE"]:
            bundle.write(file, folder / file.relative_to(root))
        for name, notebook in ready.items():
            bundle.writestr(str(folder / HERE.relative_to(root) / name), text_of(notebook))


def main(argv=None):
    """Command line; a mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("hw[0-9].ipynb")))
    parser.add_argument("--out", type=Path, default=Path("release"), help="folder of the results (%(default)s)")
    parser.add_argument("--bundle", type=Path, help="write this .zip in place of the folder: all that students need")
    options = parser.parse_args(argv)
    try:
        ready = {}
        for path in options.notebooks:
            if not options.bundle and path.resolve().parent == options.out.resolve():
                raise ReleaseError(f"--out {options.out} is the folder of {path.name} itself: it would be overwritten")
            ready[path.name] = release(json.loads(path.read_text(encoding="utf-8-sig")), path.name)
        (options.bundle.parent if options.bundle else options.out).mkdir(parents=True, exist_ok=True)
        if options.bundle:
            write_bundle(options.bundle, ready)
            print(options.bundle)
        for name, notebook in ready.items() if not options.bundle else ():
            (options.out / name).write_text(text_of(notebook), encoding="utf-8")
            print(options.out / name)
    except (ReleaseError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
