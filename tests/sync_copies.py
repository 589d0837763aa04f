"""The scripts import nothing from each other: what they share is copied into blocks, and this file keeps those true.

    python tests/sync_copies.py             refresh every block, add what is missing, drop what is unused
    python tests/sync_copies.py --check     only list what is wrong; exit code 1 if anything is

The rule: a script's own text comes first, then a block for each home (an earlier script), then the `if __name__` guard.
    # region Copied from 01_rectified_flow.py: any words -----     dashes fill the line; `# endregion` ends the block
A block holds what the script needs of the home's own definitions, word for word and in their order; comment lines that
touch a definition belong to it. An own definition of a name that an earlier script owns too says why just above it:
    # Differs from 01_rectified_flow.py: <why>
"""
import argparse
import ast
import builtins
import os
import re
import shutil
import symtable
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BANNER = "# region Copied from "
BLOCK = re.compile(f"^{BANNER}" + r"(\S+\.py)(?:: *(.*?))? -{2,}\n((?:.*\n)*?)# endregion(?:\n|\Z)", re.M)
STRAY = re.compile(r"^#\s*(?:endregion|(?:region )?copied from \d).*", re.M | re.I)
DIFFERS = re.compile(r"# Differs from (\S+?\.py)(?:: *(.*))?")


class Statement(NamedTuple):
    """A top-level statement with the comment lines that touch it: lines[first:end] of its text."""
    names: list         # the function, class or constants that it defines; [] for any other statement
    text: str           # without its Differs line
    first: int
    end: int
    differs: tuple      # (script, why) of that line, or ()
    uses: set           # the names in it that are global in its script

    def is_guard(self):
        """Is this the `if __name__ == "__main__":` at the end of a script?"""
        return not self.names and re.search("^if __name__ ==", self.text, re.M)


class Script:
    """One script, read. Raises: SyntaxError; ValueError if a name is defined twice or two statements share a line."""

    def __init__(self, path, earlier=()):
        self.path, self.name, self.text = path, path.name, path.read_bytes().decode("utf-8")
        self.earlier = {script.name: script for script in earlier}
        ast.parse(self.text, filename=self.name)
        pieces = BLOCK.split(self.text)         # own text, then home, words, body and again own text for every block
        self.own_text, self.words = "".join(pieces[::4]), dict(zip(pieces[1::4], pieces[2::4]))
        self.own, self.imports = statements(self.own_text, self.name), imports(self.own_text)
        bodies = zip(pieces[1::4], pieces[3::4])
        self.copied = [(home, s) for home, body in bodies for s in statements(body, self.name)]
        self.owned = {name: s for s in self.own for name in s.names}
        self.copies = {name: (home, s) for home, s in self.copied for name in s.names}
        names = sorted(name for s in self.own + [s for _, s in self.copied] for name in s.names)
        for name, following in zip(names, names[1:]):
            if name == following:
                raise ValueError(f"{self.name}: {name} is defined twice at the top level")
        self.needed = needed(self)


def read_all(root):
    """The numbered scripts of a folder, in reading order."""
    found = []
    for path in scripts(root):
        found.append(Script(path, found))
    return found


def scripts(root):
    """The paths of the numbered scripts of a folder, in reading order."""
    return sorted(Path(root).glob("[0-9][0-9]_*.py"))


def definitions(path):
    """Returns: {name: Statement} of all that a script defines at its top level, its own and copied."""
    script = Script(path)
    return script.owned | {name: statement for name, (_, statement) in script.copies.items()}


def defined_names(node):
    """The names a top-level statement defines; none for imports, `if` blocks, expressions and __dunders__."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    stored = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return [name for name in stored if not re.fullmatch(r"__\w+__", name)]


def global_names(text):
    """The names that a piece of code takes from the top level of its script or defines there."""
    tables, names = [symtable.symtable(text, "piece", "exec")], set()
    for table in tables:
        tables += table.get_children()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names


def statements(text, name):
    """The top-level statements of a piece of the script `name`."""
    lines, found, end = text.split("\n"), [], 0
    for node in ast.parse(text, filename=name).body:
        first = start = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) - 1
        if start < end:
            raise ValueError(f"{name}: one statement per line, please: {lines[start]}")
        while first > end and lines[first - 1].startswith("#") and not lines[first - 1].startswith("# ---"):
            first -= 1
        end = node.end_lineno
        differs = [match.groups("") for match in map(DIFFERS.fullmatch, lines[first:start]) if match]
        own = "\n".join([line for line in lines[first:start] if not DIFFERS.fullmatch(line)] + lines[start:end])
        found.append(Statement(defined_names(node), own, first, end, (differs + [()])[0], global_names(own)))
    return found


def imports(text):
    """The top-level imports in a script's text: {statement that imports one name alone: that name}."""
    found = {}
    for node in ast.parse(text).body:
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
            alone = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], 0)
            found[ast.unparse(alone)] = alias.asname or alias.name.split(".")[0]
    return found


def owners(script):
    """Where a script copies a name from, {name: home}: the latest script that owns it, unless it stands in a block."""
    found = {}
    for home, other in script.earlier.items():
        for name, statement in other.owned.items():
            now = script.copies.get(name, ("", None))[0]
            if name not in found or statement.differs and found[name] != now:
                found[name] = home
    return found


def needed(script):
    """What a script needs of earlier ones, for its own text and for what it copies: {home: [Statement]}."""
    owner, found = owners(script), {home: [] for home in script.earlier}
    known = {*script.owned, *script.imports.values(), *(set(dir(builtins)) - script.copies.keys())}
    todo = set().union(*(s.uses for s in script.own)) - known
    while todo:
        name = min(todo)
        known.add(name)
        if name in owner:
            statement = script.earlier[owner[name]].owned[name]
            found[owner[name]].append(statement)
            known |= set(statement.names)
            todo |= statement.uses
        todo -= known
    return {home: sorted(parts, key=lambda s: s.first) for home, parts in found.items() if parts}


def banner(words):
    """The first line of a block."""
    return f"{BANNER}{words} --".ljust(120, "-")


def composed(script):
    """The text that a script should have."""
    blocks = []
    for home, parts in script.needed.items():
        lines, text = script.earlier[home].own_text.split("\n"), parts[0].text
        for before, part in zip(parts, parts[1:]):
            text += "\n" * (1 + min(2, lines[before.end:part.first].count(""))) + part.text
        words = f": {script.words[home]}" if script.words.get(home) else ""
        blocks.append(f"{banner(home + words)}\n\n{text}\n\n\n# endregion")
    if not blocks and not script.words:
        return script.text
    lines = script.own_text.split("\n")
    end = script.own[-1].first if script.own and script.own[-1].is_guard() else len(lines)
    pieces = ["\n".join(lines[:end]).rstrip("\n"), *blocks, "\n".join(lines[end:]).rstrip("\n")]
    return "\n\n\n".join(piece for piece in pieces if piece) + "\n"


def changes(script):
    """What a sync does to the definitions in the blocks: (home, what, name, why)."""
    new = {name: (home, s) for home, parts in script.needed.items() for s in parts for name in s.names}
    for name in sorted(script.copies.keys() | new.keys()):
        (was, old), (home, statement) = script.copies.get(name, ("", None)), new.get(name, ("", None))
        if not was:
            yield home, "added", name, f"uses {name} of {home} without copying it"
        elif not home:
            yield was, "dropped", name, f"is copied from {was} and never used"
        elif was != home:
            yield home, "moved", name, f"is copied from {was}, and at home in {home}"
        elif old.text != statement.text:
            yield home, "rewritten", name, f"has drifted from {home}: run python tests/sync_copies.py"


def block_problems(script):
    """What keeps a sync from touching a script, for only a person can decide it: (name, what)."""
    for line in sorted(set(STRAY.findall(BLOCK.sub(r"\3", script.text)))):
        yield line, "is not a line of a block, from '# region Copied from <script>.py ---' to '# endregion'"
    if any(statement.is_guard() for statement in script.own[:-1]):
        yield "`if __name__`", "is not the last statement"
    for home in script.words.keys() - script.earlier.keys():
        yield f"block of {home}", "no earlier script has this name"
    everyone = script.own + [s for parts in script.needed.values() for s in parts]
    lost = set().union(*(s.uses for s in everyone)).difference(*(other.owned for other in script.earlier.values()))
    for home, statement in script.copied:
        if not statement.names:
            yield statement.text.split("\n")[0], f"is no definition, and stands in the block of {home}"
        for name in lost.intersection(statement.names):
            yield name, f"is copied from {home}, which does not own it"


def own_problems(script):
    """What is wrong with the script's own definitions of names that earlier scripts own: (name, what)."""
    for name, statement in script.owned.items():
        homes = [home for home, other in script.earlier.items() if name in other.owned]
        source, why = statement.differs or ("", "")
        if homes and not source:
            yield name, f"is also defined in {homes[0]}: say '# Differs from {homes[0]}: <why>', or copy it in a block"
        elif source and source not in homes:
            yield name, f"its '# Differs from' names {source}, which is no earlier script that owns it"
        elif source and not why:
            yield name, f"its '# Differs from {source}' does not say why"
        elif source and statement.text == script.earlier[source].owned[name].text:
            yield name, f"is said to differ from {source} and is identical"


def import_problems(script):
    """The imports that copied definitions use and that the script lacks: (name, what)."""
    for home, parts in script.needed.items():
        for line, name in script.earlier[home].imports.items():
            users = [s.names[0] for s in parts if name in s.uses and line.split()[-1] in s.text]
            if users and line not in script.imports:
                yield users[0], f"needs `{line}` (as in {home})"


def problems(root):
    """Returns: one line per broken rule, naming file and helper; [] if all copies are in order."""
    found = []
    for script in read_all(root):
        blocks = [*block_problems(script), *(change[2:] for change in changes(script))]
        if not blocks and composed(script) != script.text:
            line = os.path.commonprefix([composed(script), script.text]).count("\n") + 1
            blocks = [(f"line {line}", "blocks come last, in order and evenly spaced: run python tests/sync_copies.py")]
        found += [f"{script.name}: {name}: {what}" for name, what in
                  [*own_problems(script), *blocks, *import_problems(script)]]
    return found


def sync(root):
    """Rewrite all blocks below `root`. Returns: one line for each thing done to a block."""
    done = []
    for script in read_all(root):
        if composed(script) == script.text or any(block_problems(script)):
            continue
        names = {}
        for home, what, name, _ in changes(script):
            names.setdefault(f"{script.name}: block of {home}: {what} ", []).append(name)
        done += [start + ", ".join(some) for start, some in names.items()] or [f"{script.name}: blocks laid out anew"]
        temporary = script.path.with_name(f".{script.name}.new")
        temporary.write_bytes(composed(script).encode("utf-8"))
        shutil.copymode(script.path, temporary)
        os.replace(temporary, script.path)
    return done


def main(argv=None):
    """Returns: the exit code. 0: all copies in order; 1: something is left to mend by hand; 2: unreadable script."""
    parser = argparse.ArgumentParser(description="Rewrite the blocks of copies from their homes.")
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
