"""The scripts stay readable: the idea first, one short training loop, short functions, docstrings, few lines.

Each check takes a Script and returns what is wrong with it as a list of lines; the second half proves that each of
them objects when it should.
"""

import ast
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import tokenize

import pytest
from conftest import ROOT
from sync_copies import scripts

SECTIONS = ["The method", "Settings", "The experiment"]     # of every script, before anything else
# Lines of a script; of its own part, above the copied blocks; and the line on which main must have ended
SIZES = {"01": (822, 822, 200), "02": (1285, 865, 320), "03": (1639, 580, 320), "04": (1822, 719, 327),
         "05": (2592, 1848, 2592)}
PACKAGES = {"torch", "torchvision", "lpips", "matplotlib", "mpl_toolkits", "einops",
            "numpy", "scipy", "PIL", "tqdm"}        # the second row comes along with the first
IMPORTERS = {"import_module", "__import__", "run_path", "run_module", "spec_from_file_location", "exec"}
LOOP_LINES, FUNCTION_LINES, METHOD_LINES, MEDIAN_LINES, LINE_LENGTH = 30, 60, 20, 15, 120
PARAMETERS, CROWDED = 5, 10     # of a function; lines of a script that hold more than one statement
DENSITY = (0.20, 0.35)      # lines with a comment or docstring / lines that are not blank
BANNER = re.compile(r"# (?:---- )?(.+?) ?-{2,}")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Script:
    """A parsed script. `code` and `prose` are the numbers of the lines that hold code, and comments or docstrings."""

    def __init__(self, path):
        self.path, self.name, self.text = path, path.name, path.read_text(encoding="utf-8")
        self.lines, self.tree = self.text.split("\n"), ast.parse(self.text, filename=path.name)
        self.filled = {number for number, line in enumerate(self.lines, 1) if line.strip()}
        self.prose = {number for doc in self.docstrings() for number in range(doc.lineno, doc.end_lineno + 1)}
        self.code = set()
        silent = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                self.prose.add(token.start[0])
            elif token.type not in silent:
                self.code.update(range(token.start[0], token.end[0] + 1))
        self.code -= {number for doc in self.docstrings() for number in range(doc.lineno, doc.end_lineno + 1)}
        self.functions = [node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS)]

    def docstrings(self):
        """The string nodes that are docstrings."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Module, ast.ClassDef) + FUNCTIONS) and ast.get_docstring(node) is not None:
                yield node.body[0]

    def code_lines(self, node):
        """Number of lines of code in a node, its first line counted; docstrings, comments and blank lines are not."""
        return len(self.code & set(range(node.lineno, node.end_lineno + 1)))

    def banners(self):
        """The section banners: (line number, text) of `# ---- text ----` and of `# region Copied from ... ----`."""
        found = [(number, BANNER.fullmatch(line)) for number, line in enumerate(self.lines, 1)]
        return [(number, match[1]) for number, match in found if match]

    def section(self, name):
        """Line numbers of a section: from its banner to the next one."""
        starts = self.banners() + [(len(self.lines) + 1, "")]
        for (number, text), (following, _) in zip(starts, starts[1:]):
            if begins_with(text, name):
                return range(number, following)
        return range(0)

    def own_lines(self):
        """Number of lines above the first block of copies."""
        regions = [number for number, text in self.banners() if text.startswith("region ")]
        return min(regions, default=len(self.lines)) - 1


def begins_with(banner, name):
    """Whether a banner is of this section: 'Settings: every field is a flag' is of 'Settings'."""
    return re.match(re.escape(name) + r"(?!\w)", banner) is not None


def backward_calls(node):
    """All calls of a method `backward` inside a node."""
    return [n for n in ast.walk(node) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "backward"]


def one_short_training_loop(script):
    calls = backward_calls(script.tree)
    if len(calls) != 1:
        return [f"{len(calls)} calls of .backward(), expected exactly one"]
    loops = [n for n in ast.walk(script.tree) if isinstance(n, (ast.For, ast.While)) and backward_calls(n)]
    if not loops:
        return [f"line {calls[0].lineno}: .backward() stands in no loop"]
    innermost = max(loops, key=lambda loop: loop.lineno)
    length = innermost.end_lineno - innermost.lineno + 1
    holder = [n.name for n in script.tree.body if isinstance(n, FUNCTIONS) and backward_calls(n)]
    found = [] if holder == ["train"] else [f".backward() is called in {holder or 'no function'}, expected in train"]
    return found + ([f"the training loop has {length} lines, at most {LOOP_LINES}"] if length > LOOP_LINES else [])


def short_functions(script):
    lengths = {node: node.end_lineno - node.lineno + 1 for node in script.functions}
    found = [f"{n.name} has {length} lines, at most {FUNCTION_LINES}" for n, length in lengths.items()
             if length > FUNCTION_LINES]
    median = statistics.median([script.code_lines(node) for node in script.functions] or [0])
    return found + ([f"the median function has {median} lines of code, less than {MEDIAN_LINES} wanted"]
                    if median >= MEDIAN_LINES else [])


def short_method(script):
    """'The method' shows the idea: each function there is at most METHOD_LINES lines of code."""
    where = script.section("The method")
    inside = [node for node in script.functions if node.lineno in where]
    if not inside:
        return ["no function in the section 'The method'"]
    return [f"{node.name} in 'The method' has {script.code_lines(node)} lines of code, at most {METHOD_LINES}"
            for node in inside if script.code_lines(node) > METHOD_LINES]


def prose_density(script):
    share = len(script.prose & script.filled) / max(len(script.filled), 1)
    low, high = DENSITY
    return [] if low <= share <= high else [f"{share:.1%} of the lines hold comments or docstrings, "
                                            f"{low:.0%} to {high:.0%} wanted"]


def public_docstrings(script):
    nodes = [n for n in script.tree.body if isinstance(n, FUNCTIONS + (ast.ClassDef,)) and not n.name.startswith("_")]
    found = [] if ast.get_docstring(script.tree) else ["the script has no docstring"]
    return found + [f"{node.name} has no docstring" for node in nodes if not ast.get_docstring(node)]


def sections_in_order(script):
    """The method, the settings, the experiment: the first code of a script, in this order."""
    first = [text for _, text in script.banners()][:len(SECTIONS)]
    if len(first) < len(SECTIONS) or not all(map(begins_with, first, SECTIONS)):
        return [f"the sections begin {first}, expected {SECTIONS}"]
    above = range(1, script.banners()[0][0])
    early = [node.name for node in script.tree.body if isinstance(node, FUNCTIONS + (ast.ClassDef,))
             and node.lineno in above]
    main = [node.lineno in script.section("The experiment") for node in script.functions if node.name == "main"]
    return [f"{name} stands above the method" for name in early] + \
        ([] if main == [True] else ["main does not stand in the experiment"])


def sizes(script):
    """Lines of the whole script and of its own part, and where main ends."""
    total, own, main_ends = SIZES.get(script.name[:2], SIZES["01"])
    end = max([node.end_lineno for node in script.functions if node.name == "main"], default=0)
    measured = {"lines": (len(script.lines) - 1, total), "own lines": (script.own_lines(), own),
                "lines before main ends": (end, main_ends)}
    return [f"{number} {what}, at most {most}" for what, (number, most) in measured.items() if number > most]


def few_parameters(script):
    """No function has more than five parameters; a network's constructor may, each with a default to start from."""
    found = []
    for node in script.functions:
        arguments = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs if a.arg != "self"]
        if len(arguments) > PARAMETERS and node.name != "__init__":
            found.append(f"{node.name} has {len(arguments)} parameters, at most {PARAMETERS}")
    return found


def unrelated(node):
    """Whether an assignment gives several names values of their own, as in `a, b = 1, 2`."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def one_statement_a_line(script):
    """Few lines hold two statements, or a tuple of values that have nothing to do with each other."""
    statements = [node for node in ast.walk(script.tree) if isinstance(node, ast.stmt)]
    firsts = [node.lineno for node in statements]
    crowded = {node.lineno for node in statements if unrelated(node) or firsts.count(node.lineno) > 1}
    if len(crowded) <= CROWDED:
        return []
    return [f"{len(crowded)} lines of several statements, at most {CROWDED}: {sorted(crowded)}"]


def imports_only_what_is_installed(script):
    roots = set()
    for node in ast.walk(script.tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add("." if node.level else node.module.split(".")[0])
    return [f"imports {root}, which is neither standard library nor one of {sorted(PACKAGES)}"
            for root in sorted(roots - PACKAGES - set(sys.stdlib_module_names))]


def imports_no_other_script(script):
    calls = [n for n in ast.walk(script.tree) if isinstance(n, ast.Call)]
    names = [(n.lineno, getattr(n.func, "attr", getattr(n.func, "id", ""))) for n in calls]
    return [f"line {line}: {name}() could load another script; scripts are self-contained"
            for line, name in names if name in IMPORTERS]


def line_length(script):
    return [f"line {number} has {len(line)} characters, at most {LINE_LENGTH}"
            for number, line in enumerate(script.lines, 1) if len(line) > LINE_LENGTH]


IMPORT_QUIETLY = """
import contextlib, importlib.util, io, json, sys, time
import torch, torchvision, scipy.optimize, scipy.integrate, PIL.Image, tqdm, einops, matplotlib.figure  # off the clock
def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.mkdir"):
        raise RuntimeError(event)
sys.argv = [sys.argv[1], "--a-flag-that-no-script-knows"]
spec = importlib.util.spec_from_file_location("script", sys.argv[0])
sys.modules["script"] = module = importlib.util.module_from_spec(spec)
sys.addaudithook(guard)
output, start = io.StringIO(), time.process_time()
with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
    spec.loader.exec_module(module)
print(json.dumps([output.getvalue(), time.process_time() - start]))
"""


def import_does_nothing(script, folder):
    """Import a copy of the script, alone in an empty folder, in a process of its own."""
    copy = folder / script.name
    shutil.copy(script.path, copy)
    run = subprocess.run([sys.executable, "-B", "-c", IMPORT_QUIETLY, str(copy)], cwd=folder, timeout=300,
                         stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if run.returncode:
        return [f"importing it fails: {(run.stderr.strip().splitlines() or ['?'])[-1]}"]
    output, seconds = json.loads(run.stdout.splitlines()[-1])
    left = sorted(path.name for path in folder.iterdir() if path != copy)
    return ([f"importing it prints {output!r}"] if output else []) + ([f"importing it leaves {left}"] if left else []) \
        + ([f"importing it takes {seconds:.1f} s"] if seconds > 3 else [])


def same_loop_everywhere(root):
    """The text of `train` is the same in every script below root."""
    texts = {}
    for path in scripts(root):
        script = Script(path)
        for node in script.functions:
            if node.name == "train":
                texts[path.name] = ast.get_source_segment(script.text, node)
    first = next(iter(texts), None)
    return [f"{name}: train differs from {first}" for name in texts if texts[name] != texts[first]]


CHECKS = [one_short_training_loop, short_functions, short_method, prose_density, public_docstrings, sections_in_order,
          sizes, few_parameters, one_statement_a_line, imports_only_what_is_installed, imports_no_other_script, line_length]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", scripts(ROOT), ids=lambda path: path.stem)
def test_script(path, check):
    script = Script(path)
    found = check(script)
    assert not found, f"{script.name} ({len(script.lines) - 1} lines)\n" + "\n".join(found)


@pytest.mark.parametrize("path", scripts(ROOT), ids=lambda path: path.stem)
def test_importing_a_script_does_nothing(path, tmp_path):
    assert not import_does_nothing(Script(path), tmp_path)


def test_the_training_loop_is_the_same_text_in_all_scripts():
    assert not same_loop_everywhere(ROOT)


# The checks themselves, tried on a toy script that passes and on edits of it that must not.

GOOD = '"""A toy script.\n\nIt obeys every rule.\n"""\nimport os\nimport torch.nn\n' + "".join(
    f"# ---- {name} ----\n" + {
        "The method": 'def method(x):\n    """The idea."""\n    return x\n',
        "The experiment": 'def main(config):\n    """All of it."""\n    x, y = config\n    return y\n',
        "Training": 'def train(model):\n    """The loop."""\n    for step in range(3):\n'
                    '        model(step).backward()     # the gradient\n        yield step\n',
        "Plumbing": 'def _hidden(x):\n    y = x\n    z = y\n    a = z\n    b = a\n    c = b\n    return c\n',
        "Numbers": "".join(f"number_{i} = {i}\n" for i in range(35)),
    }.get(name, "") for name in [*SECTIONS, "Training", "Plumbing", "Numbers"])


def toy(folder, old="", new="", name="01_toy.py"):
    """GOOD with one edit, as a Script."""
    assert old in GOOD
    (folder / name).write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    return Script(folder / name)


def statements(count, indent=4):
    """Lines of code to make something too long."""
    return "".join(" " * indent + f"x = {i}\n" for i in range(count))


LOOP = "        yield step\n"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_good_script_passes(tmp_path, check):
    assert check(toy(tmp_path)) == []


@pytest.mark.parametrize("check, old, new, words", [
    (one_short_training_loop, LOOP, LOOP + statements(28, 8), "31 lines"),
    (one_short_training_loop, LOOP, LOOP + "        model(0).backward()\n", "2 calls"),
    (one_short_training_loop, ".backward()", ".forward()", "0 calls"),
    (one_short_training_loop, "for step in range(3):", "if model:", "in no loop"),
    (one_short_training_loop, "def train", "def fit", "expected in train"),
    (short_functions, LOOP, LOOP + statements(60), "train has 65 lines"),
    (short_method, "    return x\n", statements(19) + "    return x\n", "method in 'The method' has 21 lines"),
    (short_method, "# ---- The method ----\n", "# ---- Data ----\n", "no function"),
    (sizes, "number_0", statements(1000, 0) + "number_0", "lines, at most"),
    (sizes, "number_0", f"def main():\n    pass\n{statements(200)}number_0", "lines before main ends"),
    (few_parameters, "def _hidden(x)", "def _hidden(x, a, b, c, *, d, e)", "_hidden has 6 parameters"),
    (few_parameters, "number_0", "class A:\n    def f(self, a, b, c, d, e, f): pass\nnumber_0", "f has 6 parameters"),
    (one_statement_a_line, "number_0", "a, b = 1, 2\n" * 11 + "number_0", "11 lines of several statements"),
    (one_statement_a_line, "number_0", "a = 1; b = 2\n" * 11 + "number_0", "11 lines of several statements"),
    (one_statement_a_line, "number_0", "if a: b = 2\n" * 11 + "number_0", "11 lines of several statements"),
    (prose_density, "number_0", "# prose\n" * 40 + "number_0", "wanted"),
    (prose_density, "number_0", statements(120, 0) + "number_0", "wanted"),
    (public_docstrings, '    """The idea."""\n', "", "method has no docstring"),
    (public_docstrings, "number_0 = 0", "class Thing:\n    size = 1", "Thing has no docstring"),
    (public_docstrings, '"""A toy script.\n\nIt obeys every rule.\n"""\n', "", "script has no docstring"),
    (sections_in_order, "# ---- The method ----\n", "# ---- The methods ----\n", "expected"),
    (sections_in_order, "# ---- Settings ----\n", "\n", "expected"),
    (sections_in_order, "# ---- Settings ----\n", "# ---- Data ----\n", "expected"),
    (sections_in_order, "import os", "def early():\n    pass", "early stands above the method"),
    (sections_in_order, "def main", "def mainly", "main does not stand"),
    (imports_only_what_is_installed, "import os", "import wandb", "imports wandb"),
    (imports_only_what_is_installed, "    return c", "    from diffusers.models import UNet", "imports diffusers"),
    (imports_only_what_is_installed, "import os", "from . import helper", "imports ."),
    (imports_no_other_script, "    return c", "    return importlib.import_module('02_reflow')", "import_module()"),
    (imports_no_other_script, "    return c", "    return __import__('02_reflow')", "__import__()"),
    (line_length, "import os", "import os  # " + "x" * 120, "line 5 has 133 characters"),
])
def test_each_check_objects(tmp_path, check, old, new, words):
    found = check(toy(tmp_path, old, new))
    assert found and words in found[0], found


def test_a_long_median_function_is_an_objection(tmp_path):
    script = toy(tmp_path, "number_0", "".join(f"def f{i}(x):\n{statements(14)}" for i in range(5)) + "number_0")
    assert "median function has 15" in short_functions(script)[0]


def test_a_banner_may_say_more_than_its_name(tmp_path):
    longer = "# ---- Settings: every field is a flag ----\n"
    assert sections_in_order(toy(tmp_path, "# ---- Settings ----\n", longer)) == []


def test_own_lines_end_at_the_first_block_of_copies(tmp_path):
    copies = "# region Copied from 01_toy.py ----\n"
    assert toy(tmp_path, "# ---- Plumbing ----\n", copies).own_lines() < toy(tmp_path).own_lines()


@pytest.mark.parametrize("line, words", [
    ("pass", None), ("print('hello')", "prints"), ("open('made', 'w').close()", "leaves ['made']"),
    ("import argparse; argparse.ArgumentParser().parse_args()", "fails"),
    ("import socket; socket.create_connection(('127.0.0.1', 9))", "fails"),
])
def test_an_import_that_does_something_is_an_objection(tmp_path, line, words):
    source, empty = tmp_path / "source", tmp_path / "empty"
    source.mkdir(), empty.mkdir()
    found = import_does_nothing(toy(source, "import torch.nn", line), empty)
    assert found == [] if words is None else words in found[0]


def test_a_second_script_with_another_loop_is_an_objection(tmp_path):
    toy(tmp_path), toy(tmp_path, name="02_toy.py")
    assert same_loop_everywhere(tmp_path) == []
    toy(tmp_path, "# the gradient", "# gradient", name="03_toy.py")
    assert same_loop_everywhere(tmp_path) == ["03_toy.py: train differs from 01_toy.py"]
