"""The walkthrough notebooks run from top to bottom at tiny sizes, and what is committed is whole, small and clean.

The tiny sizes stand in the metadata of a notebook's cell tagged `parameters`, under "fast": name -> value.  Each check
takes a notebook and returns what is wrong with it; the last part proves that each of them objects when it should.
"""

import ast
import copy
import os
import platform
import re
import subprocess
import sys
import types

import matplotlib
import nbclient
import nbformat
import pytest
from conftest import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("0*.ipynb"))
PACKAGES = {"torch", "torchvision", "lpips", "matplotlib", "mpl_toolkits", "einops", "numpy", "scipy", "PIL", "tqdm",
            "IPython"}
MEGABYTE, CELL_LINES, LINE_LENGTH, FIGURES = 1 << 20, 20, 100, 5
PATHS = re.compile(r"(?<![\w.])(?:/(?:home|root|work|tmp|Users|mnt|opt|usr|var|content|private)/|[A-Z]:\\\\?)\w")
BAR = re.compile(r"\d+%\||it/s\]|s/it\]|\r")            # what tqdm draws


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def first_code_cell(path):
    """The source of the cell that finds the scripts."""
    return code_cells(read(path))[0].source


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def text_of(output):
    """Everything in an output that is text."""
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), *(data[kind] for kind in data if kind.startswith("text/"))])


def imports(tree):
    """The top-level packages that a piece of code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or ".").split(".")[0]


# ---- Checks of a committed notebook ----------------------------------------------------------------------------------


def bad_form(notebook):
    """Format 4.5, the plain kernel, an id for every cell, no time stamps: the same notebook is the same file."""
    wrong = [] if (notebook.nbformat, notebook.nbformat_minor) == (4, 5) else ["not nbformat 4.5"]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3" \
            or set(notebook.metadata) > {"kernelspec", "language_info"}:
        wrong.append("metadata beyond the kernel python3")
    for cell in notebook.cells:
        if set(cell.metadata) - {"tags", "fast"}:
            wrong.append(f"cell {cell.id}: metadata {', '.join(cell.metadata)}")
    return wrong


def bad_code(notebook):
    """Plain Python (no magics), short cells, and nothing imported beyond the five packages and what they bring."""
    wrong = []
    for cell in code_cells(notebook):
        lines = cell.source.split("\n")
        try:
            names = set(imports(ast.parse(cell.source)))
        except SyntaxError as error:
            wrong.append(f"cell {cell.id}: not plain Python ({error})")
            continue
        wrong += [f"cell {cell.id} imports {name}" for name in sorted(names - PACKAGES - sys.stdlib_module_names)]
        if cell is code_cells(notebook)[0]:                # the one that finds the scripts: nobody needs to read it
            continue
        wrong += [f"cell {cell.id}: a line of {len(line)}" for line in lines if len(line) > LINE_LENGTH]
        wrong += [f"cell {cell.id} has {len(lines)} lines"] if len(lines) > CELL_LINES else []
    return wrong


def bad_parameters(notebook):
    """One cell of sizes, literals only, whose tiny values are for names that it sets."""
    tagged = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or not tagged[0].metadata.get("fast"):
        return ["want one cell tagged parameters, with the tiny values in its metadata"]
    statements = ast.parse(tagged[0].source).body
    if not all(isinstance(s, ast.Assign) for s in statements):
        return ["the parameters cell does more than assign"]
    names = {target.id for s in statements for target in s.targets}
    return [f"fast value for {name}, which the cell does not set" for name in set(tagged[0].metadata.fast) - names]


def bad_outputs(notebook):
    """Run once, in order, from the top: figures there, no error, no warning, no progress bar."""
    wrong = [f"{o.ename}: {o.evalue}" for o in outputs(notebook) if o.output_type == "error"]
    wrong += [f"on stderr: {o.text[:80]}" for o in outputs(notebook) if o.get("name") == "stderr"]
    wrong += [f"a progress bar: {text_of(o)[:80]!r}" for o in outputs(notebook) if BAR.search(text_of(o))]
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        wrong.append(f"not executed from top to bottom: {counts}")
    figures = sum("image/png" in o.get("data", {}) for o in outputs(notebook))
    return wrong + ([f"only {figures} figures"] if figures < FIGURES else [])


def private(notebook):
    """Nothing of the machine that made it: absolute paths, its name, where the repository lies."""
    texts = [cell.source for cell in notebook.cells] + [text_of(o) for o in outputs(notebook)]
    found = [match.group() for text in texts for match in PATHS.finditer(text)]
    names = [name for name in (str(ROOT), platform.node()) if len(name) > 3]
    return found + [name for name in names for text in texts if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]


def bad_head(notebook):
    """The title, then the code cell that finds the scripts and is the same in all notebooks."""
    title, first = notebook.cells[:2]
    good = title.cell_type == "markdown" and title.source.startswith("# ") and first.cell_type == "code"
    return [] if good and first.source == first_code_cell(NOTEBOOKS[0]) else ["want a title, then the common first cell"]


CHECKS = {"form": bad_form, "code": bad_code, "parameters": bad_parameters, "outputs": bad_outputs, "private": private,
          "head": bad_head}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed(path, check):
    assert CHECKS[check](read(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_size_and_name(path):
    assert path.stat().st_size <= MEGABYTE
    nbformat.validate(read(path))
    assert (ROOT / f"{path.stem}.py").exists()             # a notebook is called as its script


def test_the_address_stands_in_the_readme_alone():
    """A fork changes it in the README's clone line and nowhere else."""
    address = re.search(r"git clone https://github.com/([\w.-]+/[\w.-]+)", (ROOT / "README.md").read_text())[1]
    paths = [*ROOT.glob("*"), *ROOT.glob("notebooks/**/*"), *ROOT.glob("tests/*"), *ROOT.glob(".ci/*")]
    texts = [path for path in paths if path.is_file() and path.suffix in {".py", ".md", ".ipynb", ".txt", ".yml", ""}]
    assert len(texts) > 30
    assert [path for path in texts if address in path.read_text(encoding="utf-8")] == [ROOT / "README.md"]


# ---- Running them ----------------------------------------------------------------------------------------------------


def files():
    """What lies in the repository, byte code and version control aside."""
    return {path for path in ROOT.rglob("*") if not {"__pycache__", ".git", ".pytest_cache"} & set(path.parts)}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_at_tiny_sizes(path, monkeypatch):
    """Every cell runs, says nothing on stderr, and leaves no file behind."""
    notebook, before = read(path), files()
    sizes = next(cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", []))
    sizes.source += "".join(f"\n{name} = {value!r}" for name, value in sizes.metadata.fast.items())
    monkeypatch.delenv("MPLBACKEND", raising=False)        # else no figure is drawn
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert bad_outputs(notebook) == []
    assert files() == before


@pytest.fixture
def first_cell(tmp_path, monkeypatch):
    """run(folder, colab): the first code cell as in that folder.  Returns its names and the commands it would run."""
    source = first_code_cell(NOTEBOOKS[0])

    def run(folder, colab=False):
        commands, names = [], {}
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
        if colab:
            monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        with matplotlib.rc_context():
            exec(source, names)
        return names, commands
    return run


@pytest.mark.parametrize("colab", [False, True])
@pytest.mark.parametrize("place", ["", "notebooks", "tests"])
def test_first_cell_finds_the_scripts_from_anywhere_in_the_repository(first_cell, place, colab):
    names, commands = first_cell(ROOT / place, colab)
    assert names["root"] == ROOT and sys.path[0] == str(ROOT) and not commands
    assert names["load"]("01_rectified_flow").interpolate


def test_first_cell_elsewhere_says_what_to_do(first_cell, tmp_path):
    with pytest.raises(FileNotFoundError, match="start Jupyter in the repository"):
        first_cell(tmp_path)


def test_first_cell_clones_on_colab(first_cell, tmp_path, monkeypatch):
    address, questions = "https://example.org/somebody/flows", []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or address)
    names, (clone, install) = first_cell(tmp_path, colab=True)
    assert len(questions) == 1 and "README" in questions[0]
    assert clone[:2] == ["git", "clone"] and address in clone and clone[-1] == str(names["root"])
    assert install[0] == sys.executable and os.path.join(clone[-1], "requirements.txt") in install
    assert sys.path[0] == str(names["root"]) == str(tmp_path / "rectified-flow")


def test_first_cell_uses_an_earlier_clone(first_cell, tmp_path):
    (tmp_path / "rectified-flow").mkdir()
    (tmp_path / "rectified-flow" / "01_rectified_flow.py").write_text("")
    names, commands = first_cell(tmp_path, colab=True)
    assert names["root"] == tmp_path / "rectified-flow" and not commands


# ---- The checks object when they should ------------------------------------------------------------------------------


def stream(name, text):
    return nbformat.v4.new_output("stream", name=name, text=text)


def plant(check, change):
    """The first notebook, changed, fails this check."""
    notebook = copy.deepcopy(read(NOTEBOOKS[0]))
    assert check(notebook) == []
    change(notebook, code_cells(notebook)[-1])
    return check(notebook)


@pytest.mark.parametrize("check, change", [
    (bad_form, lambda nb, cell: cell.metadata.update(execution={"iopub.execute_input": "2026"})),
    (bad_form, lambda nb, cell: nb.metadata.kernelspec.update(name="venv")),
    (bad_code, lambda nb, cell: cell.update(source="%run ../01_rectified_flow.py")),
    (bad_code, lambda nb, cell: cell.update(source="!pip install pandas")),
    (bad_code, lambda nb, cell: cell.update(source="import pandas as pd")),
    (bad_code, lambda nb, cell: cell.update(source="from sklearn.datasets import make_moons")),
    (bad_code, lambda nb, cell: cell.update(source="x = 1\n" * 30)),
    (bad_parameters, lambda nb, cell: cell.metadata.update(tags=["parameters"], fast={"STEPS": 1})),
    (bad_parameters, lambda nb, cell: [c.metadata.clear() for c in nb.cells]),
    (bad_parameters, lambda nb, cell: [c.metadata.fast.update(OTHER=1) for c in nb.cells if "fast" in c.metadata]),
    (bad_outputs, lambda nb, cell: [c.update(outputs=[]) for c in code_cells(nb)]),
    (bad_outputs, lambda nb, cell: cell.update(execution_count=None)),
    (bad_outputs, lambda nb, cell: cell.outputs.append(nbformat.v4.new_output("error", ename="E", evalue="e"))),
    (bad_outputs, lambda nb, cell: cell.outputs.append(stream("stderr", "UserWarning: slow"))),
    (bad_outputs, lambda nb, cell: cell.outputs.append(stream("stdout", " 40%|####  | 4/10 [00:01<00:02, 3.1it/s]"))),
    (private, lambda nb, cell: cell.outputs.append(stream("stdout", f"written to {ROOT}/runs"))),
    (private, lambda nb, cell: cell.outputs.append(stream("stdout", "/home/ada/flow/runs"))),
    (private, lambda nb, cell: cell.update(source="folder = 'C:\\\\Users\\\\ada'")),
    (private, lambda nb, cell: cell.outputs.append(stream("stdout", "on grace-hopper-7."))),
    (bad_head, lambda nb, cell: nb.cells.pop(0)),
    (bad_head, lambda nb, cell: nb.cells.pop(1)),
    (bad_head, lambda nb, cell: nb.cells[1].update(source=nb.cells[1].source + "\nroot = Path.cwd()")),
])
def test_checks_object(check, change, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "grace-hopper-7")
    assert plant(check, change)


def test_a_broken_cell_fails_the_run():
    """nbclient raises for an exception in a cell, so test_runs_at_tiny_sizes cannot pass over one."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
