"""Helpers that stand in several scripts are identical or say why not; and the command that keeps them so works."""

import sys

import pytest
from sync_copies import ROOT, main, problems

HOME = '''"""Doc."""
LIMIT = 3
WIDTH: int = 4


def double(x):
    return 2 * x        # twice


def half(x):
    return x / 2


if __name__ == "__main__":
    main_only = 1
'''
COPY = '''import math
__all__ = []
# Copied from 01_a.py
LIMIT = 3
# Differs from 01_a.py: wider
WIDTH: int = 8


# Copied from 01_a.py
def double(x):
    return 2 * x        # twice


# Differs from 01_a.py: rounds down
def half(x):
    return x // 2
'''
COPY_OF_SECOND = '''# Copied from 02_b.py
def half(x):
    return x // 2'''


@pytest.fixture
def folder(tmp_path):
    """Three toy scripts in order; 03 copies the `half` that 02 changed, and ends without a newline."""
    for name, text in {"01_a.py": HOME, "02_b.py": COPY, "03_c.py": COPY_OF_SECOND, "helper.py": HOME}.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def edit(path, old, new):
    """Replace text that must occur."""
    before = path.read_bytes().decode()
    assert old in before
    path.write_bytes(before.replace(old, new).encode())


def test_every_copy_in_the_repository_is_identical_or_explains_itself():
    found = problems(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_scripts_in_order_have_no_problems(folder):
    assert problems(folder) == []


@pytest.mark.parametrize("script, old, new, blamed, words", [
    ("02_b.py", "2 * x", "x + x", "02_b.py: double", "has drifted from 01_a.py"),
    ("02_b.py", "# twice", "# two times", "02_b.py: double", "has drifted"),
    ("02_b.py", "LIMIT = 3", "LIMIT = 4", "02_b.py: LIMIT", "has drifted"),
    ("01_a.py", "LIMIT = 3", "LIMIT = 4", "02_b.py: LIMIT", "has drifted"),
    ("01_a.py", "def double", "@cached\ndef double", "02_b.py: double", "has drifted"),
    ("01_a.py", "def double", "async def double", "02_b.py: double", "has drifted"),
    ("02_b.py", "# Copied from 01_a.py\ndef", "def", "02_b.py: double", "is also defined in 01_a.py"),
    ("02_b.py", "# Copied from 01_a.py\ndef", "# Copied from 01_a.py\n\ndef", "02_b.py: double", "is also defined in"),
    ("02_b.py", "# Differs from 01_a.py: wider\n", "", "02_b.py: WIDTH", "is also defined in 01_a.py"),
    ("02_b.py", ": wider", "", "02_b.py: WIDTH", "does not say why"),
    ("02_b.py", "= 8", "= 4", "02_b.py: WIDTH", "is identical"),
    ("02_b.py", "# Copied from 01_a.py\nLIMIT", "# copied from 01_a\nLIMIT", "02_b.py: LIMIT", "marker is neither"),
    ("02_b.py", "# Copied from 01_a.py\nLIMIT", "# Copied from 01_a.py: so\nLIMIT", "02_b.py: LIMIT", "ends after"),
    ("03_c.py", "02_b.py", "01_a.py", "03_c.py: half", "has drifted from 01_a.py"),
    ("03_c.py", "02_b.py", "03_c.py", "03_c.py: half", "no earlier script"),
    ("03_c.py", "half", "third", "03_c.py: third", "no earlier script that defines third"),
    ("03_c.py", "def half(x):\n    return x // 2", "LIMIT = 3", "03_c.py: LIMIT", "itself a copy: name 01_a.py"),
])
def test_each_broken_rule_is_named_with_file_and_helper(folder, script, old, new, blamed, words):
    edit(folder / script, old, new)
    assert any(line.startswith(blamed) and words in line for line in problems(folder)), problems(folder)


@pytest.mark.parametrize("extra, words", [
    ("LIMIT = 5\n", "LIMIT is defined twice"), ("a = 1; b = 2\n", "one statement"), ("def broken(:\n", "01_a.py"),
])
def test_a_script_that_cannot_be_read_is_one_line_and_exit_code_2(folder, capsys, extra, words):
    (folder / "01_a.py").write_text(HOME + extra)
    assert main(["--root", str(folder)]) == 2
    output = capsys.readouterr()
    assert words in output.err and len(output.err.splitlines()) == 1 and not output.out


def test_sync_rewrites_copies_and_nothing_else(folder, capsys):
    edit(folder / "01_a.py", "    return 2 * x        # twice", "    y = x + x\n\n    return y")
    edit(folder / "01_a.py", "LIMIT = 3", "LIMIT = (3,\n         4)")
    edit(folder / "02_b.py", "return x // 2", "return int(x / 2)")
    (folder / "02_b.py").chmod(0o640)
    (folder / "03_c.py").write_bytes(b"import os\r\n" + COPY_OF_SECOND.encode())
    untouched = (folder / "01_a.py").read_bytes()
    expected = (folder / "02_b.py").read_text().replace("LIMIT = 3", "LIMIT = (3,\n         4)")
    expected = expected.replace("    return 2 * x        # twice", "    y = x + x\n\n    return y")

    assert main(["--check", "--root", str(folder)]) == 1
    assert "double" in capsys.readouterr().out
    assert (folder / "02_b.py").read_text() != expected, "--check must not write"

    assert main(["--root", str(folder)]) == 0
    assert (folder / "01_a.py").read_bytes() == untouched
    assert (folder / "02_b.py").read_text() == expected
    third = "import os\r\n" + COPY_OF_SECOND.replace("x // 2", "int(x / 2)")
    assert (folder / "03_c.py").read_bytes() == third.encode()
    if sys.platform != "win32":
        assert (folder / "02_b.py").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in folder.iterdir()) == ["01_a.py", "02_b.py", "03_c.py", "helper.py"]
    assert main(["--check", "--root", str(folder)]) == 0


def test_sync_rewrites_a_statement_with_two_names_once(folder):
    (folder / "01_a.py").write_text("A, B = (1,\n        2)\nC = 3\n")
    (folder / "02_b.py").write_text("# Copied from 01_a.py\nA, B = (0,\n        0)\n# Copied from 01_a.py\nC = 3\n")
    (folder / "03_c.py").unlink()
    assert main(["--root", str(folder)]) == 0
    marker = "# Copied from 01_a.py\n"
    assert (folder / "02_b.py").read_text() == f"{marker}A, B = (1,\n        2)\n{marker}C = 3\n"


def test_sync_leaves_what_only_a_person_can_decide(folder, capsys):
    edit(folder / "02_b.py", "# Copied from 01_a.py\ndef", "def")
    before = (folder / "02_b.py").read_bytes()
    assert main(["--root", str(folder)]) == 1
    assert "02_b.py: double: is also defined" in capsys.readouterr().out
    assert (folder / "02_b.py").read_bytes() == before
