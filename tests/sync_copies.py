"""The scripts import nothing from each other: helpers are copied, and this file keeps the copies identical.

    python tests/sync_copies.py             rewrite every copy from the script its marker names
    python tests/sync_copies.py --check     only list what is wrong; exit code 1 if anything is

The rule: a top-level name defined in two or more scripts is unmarked in the first of them, its home. Everywhere else
the line right above the definition (above its decorators, if any) is one of
    # Copied from 01_rectified_flow.py              the text is byte-identical to that script's
    # Differs from 01_rectified_flow.py: <why>      the text is this chapter's own; later scripts may copy it
Both name an earlier script that defines the name itself rather than copying it.
"""

import argparse
import ast
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"# (Copied|Differs) from (\S+?\.py)(?:: *(.*))?")
LOOKS_LIKE_MARKER = re.compile(r"#\s*(copied|differs)\s+from:?\s+\d\d", re.IGNORECASE)


class Definition(NamedTuple):
    """One top-level function, class or assigned constant: lines[first:end] of its script, and its marker's parts."""
    text: str
    first: int
    end: int
    kind: str           # "Copied", "Differs", "Broken" (a marker that cannot be read) or "" (no marker)
    source: str         # the script that the marker names
    why: str

    @property
    def original(self):
        """Is this text at home here, so that later scripts may copy it?"""
        return self.kind in ("", "Differs")


def read_lines(path):
    """The lines of a file with their own line ends, so that writing them back changes no byte."""
    return io.StringIO(path.read_bytes().decode("utf-8"), newline="").readlines()


def scripts(root):
    """The numbered scripts of a folder, in reading order."""
    return sorted(Path(root).glob("[0-9][0-9]_*.py"))


def defined_names(node):
    """The names a top-level statement defines; none for imports, `if` blocks, expressions and __dunders__."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        names = [node.name]
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    else:
        names = []
    return [name for name in names if not re.fullmatch(r"__\w+__", name)]


def definitions(path):
    """Read one script. Returns: {name: Definition}. Raises: ValueError if a name is defined twice or shares a line."""
    lines, found, last_end = read_lines(path), {}, 0
    for node in ast.parse("".join(lines), filename=path.name).body:
        first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) - 1
        if first < last_end:
            raise ValueError(f"{path.name}, line {first + 1}: one statement per line, please")
        last_end = node.end_lineno
        above = lines[first - 1].rstrip() if first else ""
        match = MARKER.fullmatch(above)
        kind, source, why = match.groups() if match else ("Broken" if LOOKS_LIKE_MARKER.match(above) else "", "", "")
        text = "".join(lines[first:last_end]).rstrip("\r\n")
        for name in defined_names(node):
            if name in found:
                raise ValueError(f"{path.name}: {name} is defined twice at the top level")
            found[name] = Definition(text, first, last_end, kind, source, why or "")
    return found


def read_all(root):
    """Returns: {script name: {name: Definition}} in reading order."""
    return {path.name: definitions(path) for path in scripts(root)}


def problem(script, name, everything):
    """What is wrong with one definition, in words; "" if nothing is."""
    here = everything[script][name]
    earlier = {s: everything[s][name] for s in everything if s < script and name in everything[s]}
    home = next(iter(earlier), None)
    if here.kind == "Broken":
        return "its marker is neither '# Copied from <script>.py' nor '# Differs from <script>.py: <why>'"
    if not here.kind:
        advice = f"is also defined in {home}: mark it '# Copied from {home}' or '# Differs from {home}: <why>'"
        return advice if home else ""
    if here.source not in earlier:
        return f"its marker names {here.source}, which is no earlier script that defines {name}"
    if not earlier[here.source].original:
        return f"its marker names {here.source}, which is itself a copy: name {earlier[here.source].source}"
    same = here.text == earlier[here.source].text
    if here.kind == "Copied" and here.why:
        return "a '# Copied from' marker ends after the script's name"
    if here.kind == "Copied" and not same:
        return f"has drifted from {here.source}: run python tests/sync_copies.py"
    if here.kind == "Differs" and not here.why:
        return "its '# Differs from' marker does not say why"
    return f"is marked as different from {here.source} and is identical" if here.kind == "Differs" and same else ""


def problems(root):
    """Returns: one line per broken rule, naming file and helper; [] if all copies are in order."""
    everything = read_all(root)
    found = [(s, name, problem(s, name, everything)) for s in everything for name in everything[s]]
    return [f"{script}: {name}: {what}" for script, name, what in found if what]


def write_atomically(path, text):
    """Replace a file's content in one step: written beside, then renamed, with the permissions it had."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode("utf-8"))
        os.chmod(temporary, path.stat().st_mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def sync(root):
    """Rewrite all drifted copies below `root`. Returns: one line per copy rewritten."""
    everything, done = read_all(root), []
    for path in scripts(root):
        lines = read_lines(path)
        statements = {here.first: (name, here) for name, here in everything[path.name].items()}     # `a, b = ...` once
        for _, (name, here) in sorted(statements.items(), reverse=True):        # last first: line numbers stay valid
            source = everything.get(here.source, {}).get(name) if here.source < path.name else None
            if here.kind == "Copied" and source and source.original and source.text != here.text:
                last = lines[here.end - 1]
                line_end = last[len(last.rstrip("\r\n")):]
                lines[here.first:here.end] = [source.text + line_end]
                done.append(f"{path.name}: {name} rewritten from {here.source}")
        if "".join(lines) != "".join(read_lines(path)):
            write_atomically(path, "".join(lines))
    return done


def main(argv=None):
    """Returns: the exit code. 0: all copies in order; 1: something is left to mend by hand; 2: unreadable script."""
    parser = argparse.ArgumentParser(description="Rewrite copied helpers from the script that their marker names.")
    parser.add_argument("--check", action="store_true", help="change nothing, list what is wrong")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with the numbered scripts")
    args = parser.parse_args(argv)
    try:
        for line in [] if args.check else sync(args.root):
            print(line)
        left = problems(args.root)
    except (OSError, SyntaxError, ValueError) as error:
        print(f"sync_copies.py: {error}", file=sys.stderr)
        return 2
    for line in left:
        print(line)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
