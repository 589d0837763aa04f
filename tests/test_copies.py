"""What stands in several scripts is identical or says why not; and the command that keeps it so works."""

import sys

import pytest
from sync_copies import ROOT, banner, definitions, main, problems

GUARD = '\n\n# run it\nif __name__ == "__main__":\n    print(report())\n'
HOME = '''"""Doc."""
__all__ = ["double"]
import math
import os.path
from functools import lru_cache, partial

# how many
LIMIT = 3
WIDTH: int = 4

DEPTH = 5


@lru_cache
def double(x):
    return 2 * x        # twice


def half(x):
    return min(x, LIMIT) / 2


# the area of a circle
def area(r):
    return math.pi * double(r)


def report():
    LIMIT = "local"
    return LIMIT
'''
OWN = '''"""Doc."""
import math
from functools import lru_cache
__all__ = []
# Differs from 01_a.py: wider
WIDTH: int = 8


# Differs from 01_a.py: rounds down
def half(x):
    return x // 2


# Differs from 01_a.py: more
def report(half=half):
    double = area(WIDTH)
    return double, DEPTH
'''
OWN_OF_THIRD = '''import math
from functools import lru_cache


class Report:
    """Uses half of 02 and, in an annotation, LIMIT."""
    def text(self, x: LIMIT):
        area = half(x)
        return f"{report()} {area}"
'''
LIMIT = "# how many\nLIMIT = 3"
DEPTH = "DEPTH = 5"
DOUBLE = "@lru_cache\ndef double(x):\n    return 2 * x        # twice"
AREA = "# the area of a circle\ndef area(r):\n    return math.pi * double(r)"
HALF = "def half(x):\n    return x // 2"
REPORT = "def report(half=half):\n    double = area(WIDTH)\n    return double, DEPTH"
WIDTH = "WIDTH: int = 8"


def block(home, *parts, words=""):
    """A block as it should stand in a script."""
    text = "\n\n\n".join(parts)
    return f"\n\n{banner(home + words)}\n\n{text}\n\n\n# endregion\n"


WORDS = ": all, but not LIMIT"
SECOND = OWN + block("01_a.py", DEPTH, DOUBLE, AREA, words=WORDS) + GUARD
THIRD = OWN_OF_THIRD + block("01_a.py", f"{LIMIT}\n\n{DEPTH}", DOUBLE, AREA) + block("02_b.py", WIDTH, HALF, REPORT)
TOYS = {"01_a.py": HOME + GUARD, "02_b.py": SECOND, "03_c.py": THIRD, "helper.py": HOME}


@pytest.fixture
def folder(tmp_path):
    """Three toy scripts in order; 03 copies what 02 changed and what that needs of 01, and has no guard."""
    for name, text in TOYS.items():
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def edit(path, old, new):
    """Replace text that must occur once."""
    before = path.read_bytes().decode()
    assert before.count(old) == 1, (old, before)
    path.write_bytes(before.replace(old, new).encode())


def sync(folder):
    """Sync and return the exit code; whatever the state, a second sync must change nothing."""
    code = main(["--root", str(folder)])
    after = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["--root", str(folder)]) == code
    assert {path: path.read_bytes() for path in folder.iterdir()} == after
    return code


def test_every_copy_in_the_repository_is_identical_or_explains_itself():
    found = problems(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_scripts_in_order_have_no_problems_and_are_left_alone(folder, capsys):
    assert problems(folder) == []
    assert sync(folder) == 0 and capsys.readouterr().out == ""
    assert {path.name: path.read_bytes().decode() for path in folder.iterdir()} == TOYS


def test_definitions_are_own_and_copied_and_include_the_comment_above(folder):
    found = definitions(folder / "03_c.py")
    assert list(found) == ["Report", "LIMIT", "DEPTH", "double", "area", "WIDTH", "half", "report"]
    assert found["area"].text == AREA and found["half"].text == HALF
    assert definitions(folder / "02_b.py")["half"].text == HALF, "without its marker"


BANNER = "\n\n# region Copied from"
BROKEN = {
    # own definitions of a name that earlier scripts own
    "no marker": ("02_b.py", "# Differs from 01_a.py: wider\n", "", "02_b.py: WIDTH", "also defined in 01_a.py"),
    "marker too far": ("02_b.py", "down\n", "down\n\n", "02_b.py: half", "also defined in 01_a.py"),
    "misspelled marker": ("02_b.py", "# Differs from 01_a.py: more", "# differs from 01_a", "02_b.py: report", "also"),
    "own and copied": ("03_c.py", "class Report", "WIDTH = 1\n\n\nclass Report", None, "WIDTH is defined twice"),
    "no reason": ("02_b.py", ": wider", "", "02_b.py: WIDTH", "does not say why"),
    "empty reason": ("02_b.py", ": wider", ": ", "02_b.py: WIDTH", "does not say why"),
    "no difference": ("02_b.py", "WIDTH: int = 8", "WIDTH: int = 4", "02_b.py: WIDTH", "is identical"),
    "marker of a later script": ("02_b.py", "01_a.py: wider", "03_c.py: wider", "02_b.py: WIDTH", "no earlier script"),
    "marker of itself": ("02_b.py", "01_a.py: wider", "02_b.py: wider", "02_b.py: WIDTH", "no earlier script"),
    "marker without need": ("02_b.py", "__all__", "# Differs from 01_a.py: so\nNEW = 1\n__all__", "02_b.py: NEW",
                            "no earlier script that owns it"),
    "marker of a copier": ("03_c.py", "class Report", "# Differs from 02_b.py: so\nMINE = 1\n\n\nclass Report",
                           "03_c.py: MINE", "no earlier script that owns it"),
    # what a block holds
    "drift": ("02_b.py", "return 2 * x", "return x + x", "02_b.py: double", "has drifted from 01_a.py"),
    "drift in a comment": ("02_b.py", "# twice", "# two times", "02_b.py: double", "has drifted"),
    "drift in the comment above": ("02_b.py", "# the area of", "# area of", "02_b.py: area", "has drifted"),
    "drift in a decorator": ("03_c.py", "@lru_cache\n", "", "03_c.py: double", "has drifted"),
    "drift at home": ("01_a.py", "LIMIT = 3", "LIMIT = 4", "03_c.py: LIMIT", "has drifted from 01_a.py"),
    "async at home": ("01_a.py", "def double", "async def double", "02_b.py: double", "has drifted"),
    "drift in the second home": ("03_c.py", "x // 2", "x / 2", "03_c.py: half", "has drifted from 02_b.py"),
    "never used": ("02_b.py", "double, DEPTH", "double", "02_b.py: DEPTH", "never used"),
    "used by itself only": ("02_b.py", "area(WIDTH)", "WIDTH", "02_b.py: area", "never used"),
    "used by the unused only": ("02_b.py", "area(WIDTH)", "WIDTH", "02_b.py: double", "never used"),
    "shadowed, so not used": ("03_c.py", "(self, x: LIMIT)", "(self, x)", "03_c.py: LIMIT", "never used"),
    "copied twice": ("03_c.py", f"{WIDTH}\n", f"{WIDTH}\n\n\n{DOUBLE}\n", None, "double is defined twice"),
    "wrong home": ("03_c.py", "region Copied from 01_a.py", "region Copied from 02_b.py", "03_c.py: double",
                   "is copied from 02_b.py, and at home in 01_a.py"),
    "nobody's": ("02_b.py", DEPTH + "\n", DEPTH + "\n\n\ndef new():\n    pass\n", "02_b.py: new", "never used"),
    "no definition": ("02_b.py", DEPTH + "\n", DEPTH + "\n\nprint(1)\n", "02_b.py: print(1)", "is no definition"),
    "out of order": ("02_b.py", f"{DOUBLE}\n\n\n{AREA}", f"{AREA}\n\n\n{DOUBLE}", "02_b.py: line", "in order"),
    "a marker inside": ("02_b.py", AREA, f"# Differs from 01_a.py: so\n{AREA}", "02_b.py: line", "in order"),
    "uneven spacing": ("02_b.py", f"{DOUBLE}\n\n\n", f"{DOUBLE}\n\n", "02_b.py: line", "evenly spaced"),
    "a comment of its own": ("02_b.py", f"{DOUBLE}\n", f"{DOUBLE}\n\n# so\n", "02_b.py: line", "evenly spaced"),
    # where the blocks are
    "text below a block": ("02_b.py", GUARD, "\nNEW = 1\n" + GUARD, "02_b.py: line", "blocks come last"),
    "text below the guard": ("02_b.py", GUARD, GUARD + "NEW = 1\n", "02_b.py: `if __name__`", "not the last"),
    "the guard above": ("02_b.py", "__all__", GUARD + "__all__", "02_b.py: `if __name__`", "not the last"),
    "no endregion": ("02_b.py", "# endregion\n", "", "02_b.py: # region Copied", "not a line of a block"),
    "one endregion for two": ("03_c.py", "# endregion\n" + BANNER, BANNER, "03_c.py: # region", "not a line of"),
    "two endregions": ("02_b.py", "# endregion\n", "# endregion\n# endregion\n", "02_b.py: # endregion", "not a line"),
    "no rule": ("02_b.py", f" {'-' * 5}", "", "02_b.py: # region Copied", "not a line of a block"),
    "misspelled region": ("02_b.py", "# region Copied", "# region copied", "02_b.py: # region copied", "not a line"),
    "marker of old": ("01_a.py", "def half", "# Copied from 00_b.py\ndef half", "01_a.py: # Copied", "not a line of a"),
    "unknown home": ("03_c.py", "from 02_b.py", "from 02_x.py", "03_c.py: block of 02_x.py", "no earlier script"),
    "itself as home": ("03_c.py", "from 02_b.py", "from 03_c.py", "03_c.py: block of 03_c.py", "no earlier script"),
    "two blocks of one home": ("02_b.py", f"{DOUBLE}\n", f"{DOUBLE}\n\n\n# endregion\n{BANNER} 01_a.py ---\n",
                               "02_b.py: line", "in order"),
    # what the script uses
    "not copied": ("02_b.py", f"{DEPTH}\n\n\n", "", "02_b.py: DEPTH", "uses DEPTH of 01_a.py without copying it"),
    "not copied, used by a copy": ("02_b.py", f"{DOUBLE}\n\n\n", "", "02_b.py: double", "uses double of"),
    "not copied, in an annotation": ("02_b.py", "report(half=half)", "report(half: LIMIT)", "02_b.py: LIMIT", "uses"),
    "not copied, the latest": ("03_c.py", f"{HALF}\n\n\n", "", "03_c.py: half", "uses half of 02_b.py without"),
    "no import": ("02_b.py", "import math\n", "", "02_b.py: area", "needs `import math` (as in 01_a.py)"),
    "no import of a decorator": ("03_c.py", "from functools import lru_cache\n", "", "03_c.py: double",
                                 "needs `from functools import lru_cache` (as in 01_a.py)"),
    "another import of the name": ("02_b.py", "import math\n", "import cmath as math\n", "02_b.py: area", "`import m"),
    "no import of a module's module": ("01_a.py", "return 2 * x", "return os.path.join(x)", "02_b.py: double",
                                       "needs `import os.path`"),
}


@pytest.mark.parametrize("script, old, new, blamed, words", BROKEN.values(), ids=BROKEN)
def test_each_broken_rule_is_named_with_file_and_helper(folder, capsys, script, old, new, blamed, words):
    edit(folder / script, old, new)
    code = main(["--check", "--root", str(folder)])
    output = capsys.readouterr()
    if blamed:
        assert any(line.startswith(blamed) and words in line for line in output.out.splitlines()), output
    assert code == (1 if blamed else 2) and words in output.out + output.err


def test_names_that_are_imported_or_only_changed_are_neither_copied_nor_defined(folder):
    (folder / "03_c.py").write_text("import mine as half\nfrom mine import double\nprint(half(double))\n"
                                    "double.calls = 0\nreport = 1\nhalf.of[report] = 2\n")
    assert list(definitions(folder / "03_c.py")) == ["report"]
    assert [line for line in problems(folder) if "report" not in line] == []


def test_a_definition_is_its_statement_and_the_comments_that_touch_it(tmp_path):
    (tmp_path / "01_a.py").write_text('TEXT = """\n# one\n# two"""\nNEXT = 1\n# far\n\n# near\nLAST = 2\n\n'
                                      f"# ---- Title {'-' * 80}\ndef new():\n    pass\n")
    found = definitions(tmp_path / "01_a.py")
    assert {name: part.text for name, part in found.items()} == {
        "TEXT": 'TEXT = """\n# one\n# two"""', "NEXT": "NEXT = 1", "LAST": "# near\nLAST = 2",
        "new": "def new():\n    pass"}


def test_imports_are_asked_for_under_the_name_they_have_at_home(folder):
    edit(folder / "01_a.py", "import math\n", "import cmath as math\n")
    assert "02_b.py: area: needs `import cmath as math` (as in 01_a.py)" in problems(folder)


def test_imports_that_no_copy_uses_are_not_asked_for(folder):
    edit(folder / "01_a.py", "import math\n", "import math\nimport os\n")
    edit(folder / "02_b.py", "import math\n", "import math\nimport os\n")
    for name in ("01_a.py", "02_b.py"):
        edit(folder / name, "    return 2 * x        # twice", "    return os.sep * x        # twice")
    assert [line for line in problems(folder) if line.startswith("02_b")] == []


@pytest.mark.parametrize("extra, words", [
    ("LIMIT = 5\n", "LIMIT is defined twice"), ("a = 1; b = 2\n", "one statement"), ("def broken(:\n", "01_a.py"),
])
def test_a_script_that_cannot_be_read_is_one_line_and_exit_code_2(folder, capsys, extra, words):
    (folder / "01_a.py").write_text(HOME + extra)
    for arguments in ([], ["--check"]):
        assert main(["--root", str(folder), *arguments]) == 2
        output = capsys.readouterr()
        assert words in output.err and "01_a.py" in output.err and len(output.err.splitlines()) == 1 and not output.out


def test_scripts_without_any_block_are_listed_and_not_touched(tmp_path):
    (tmp_path / "01_a.py").write_text(HOME)
    (tmp_path / "02_b.py").write_text("import os\n\n\n# Copied from 01_a.py\n" + HALF)
    assert any("02_b.py: # Copied from 01_a.py" in line for line in problems(tmp_path))
    assert sync(tmp_path) == 1
    assert (tmp_path / "02_b.py").read_text() == "import os\n\n\n# Copied from 01_a.py\n" + HALF


def test_sync_refreshes_copies_and_nothing_else(folder, capsys):
    news = [("    return 2 * x        # twice", "    y = x + x\n\n    return y"),
            ("# the area of a circle", "# area\n# of a circle"), ("LIMIT = 3", "LIMIT = (3,\n         4)")]
    expected = dict(TOYS)
    for old, new in news:
        edit(folder / "01_a.py", old, new)
        expected = {name: text.replace(old, new) if name < "h" else text for name, text in expected.items()}
    edit(folder / "02_b.py", "x // 2", "int(x / 2)")
    expected["02_b.py"], expected["03_c.py"] = (expected[name].replace("x // 2", "int(x / 2)")
                                                for name in ("02_b.py", "03_c.py"))
    (folder / "02_b.py").chmod(0o640)

    assert main(["--check", "--root", str(folder)]) == 1
    assert "double" in capsys.readouterr().out
    assert (folder / "03_c.py").read_text() == TOYS["03_c.py"], "--check must not write"

    assert sync(folder) == 0
    assert capsys.readouterr().out.splitlines() == [
        "02_b.py: block of 01_a.py: rewritten area, double",
        "03_c.py: block of 01_a.py: rewritten LIMIT, area, double", "03_c.py: block of 02_b.py: rewritten half"]
    assert {path.name: path.read_text() for path in folder.iterdir()} == expected
    if sys.platform != "win32":
        assert (folder / "02_b.py").stat().st_mode & 0o777 == 0o640


def test_sync_builds_all_blocks_from_own_text_alone(folder):
    (folder / "02_b.py").write_text(OWN + GUARD)
    (folder / "03_c.py").write_text(OWN_OF_THIRD)
    assert sync(folder) == 0
    assert (folder / "02_b.py").read_text() == OWN + block("01_a.py", DEPTH, DOUBLE, AREA) + GUARD
    assert (folder / "03_c.py").read_text() == THIRD


def test_sync_adds_what_copies_need_in_turn_and_drops_what_nothing_needs(folder, capsys):
    edit(folder / "02_b.py", "    double = area(WIDTH)\n    return double, DEPTH", "    return LIMIT")
    assert sync(folder) == 0
    assert (folder / "02_b.py").read_text().endswith(block("01_a.py", LIMIT, words=WORDS) + GUARD)
    assert (folder / "03_c.py").read_text() == OWN_OF_THIRD + block("01_a.py", LIMIT) + block(
        "02_b.py", HALF, "def report(half=half):\n    return LIMIT")
    assert "02_b.py: block of 01_a.py: dropped DEPTH, area, double" in capsys.readouterr().out.splitlines()
    edit(folder / "02_b.py", "    return LIMIT", "    return area(1)")
    assert sync(folder) == 0
    assert (folder / "02_b.py").read_text().endswith(block("01_a.py", DOUBLE, AREA, words=WORDS) + GUARD)


def test_sync_drops_a_circle_that_only_uses_itself_and_the_empty_block(folder):
    edit(folder / "01_a.py", "    return 2 * x", "    return area(x)")
    edit(folder / "02_b.py", "    double = area(WIDTH)\n    return double, DEPTH", "    return WIDTH")
    assert sync(folder) == 0
    assert (folder / "02_b.py").read_text() == OWN.replace("    double = area(WIDTH)\n    return double, DEPTH",
                                                           "    return WIDTH") + GUARD


def test_sync_copies_from_the_latest_script_or_where_the_block_says(folder):
    script, first = folder / "03_c.py", "def half(x):\n    return min(x, LIMIT) / 2"
    script.write_text("print(half(1))\n")
    assert sync(folder) == 0
    assert script.read_text() == "print(half(1))\n" + block("02_b.py", HALF)
    script.write_text("print(half(1))\n" + block("01_a.py", "def half(x):\n    return 0"))
    assert sync(folder) == 0
    assert script.read_text() == "print(half(1))\n" + block("01_a.py", LIMIT, first)


def test_sync_never_copies_from_a_script_that_does_not_say_how_it_differs(folder):
    edit(folder / "02_b.py", "# Differs from 01_a.py: rounds down\n", "")
    (folder / "03_c.py").write_text("print(half(1))\n")
    assert sync(folder) == 1
    assert (folder / "03_c.py").read_text() == "print(half(1))\n" + block(
        "01_a.py", LIMIT, "def half(x):\n    return min(x, LIMIT) / 2")


def test_sync_moves_a_definition_to_the_block_of_its_home(folder, capsys):
    edit(folder / "03_c.py", f"{WIDTH}\n\n\n", f"{WIDTH}\n\n\n{DOUBLE}\n\n\n")
    edit(folder / "03_c.py", f"{DOUBLE}\n\n\n{AREA}", AREA)
    assert any("03_c.py: double: is copied from 02_b.py, and at home in 01_a.py" in line for line in problems(folder))
    assert sync(folder) == 0
    assert (folder / "03_c.py").read_text() == THIRD


def test_sync_mends_order_spacing_and_what_stands_below_a_block(folder, capsys):
    first, second = block("01_a.py", f"{LIMIT}\n\n{DEPTH}", DOUBLE, AREA), block("02_b.py", HALF, WIDTH, REPORT)
    (folder / "03_c.py").write_text(OWN_OF_THIRD + second + "# a word\nNEW = 1\n" + first.strip("\n"))
    assert sync(folder) == 0
    assert (folder / "03_c.py").read_text() == THIRD.replace(
        OWN_OF_THIRD, OWN_OF_THIRD + "\n\n# a word\nNEW = 1\n")
    assert capsys.readouterr().out == "03_c.py: blocks laid out anew\n"


def test_sync_copies_a_statement_with_two_names_once(tmp_path):
    (tmp_path / "01_a.py").write_text("A, B = (1,\n        2)\nC = [x for x in (A, B)]\n")
    (tmp_path / "02_b.py").write_text("print(A, B, C)\n")
    assert sync(tmp_path) == 0
    assert (tmp_path / "02_b.py").read_text() == "print(A, B, C)\n" + block(
        "01_a.py", "A, B = (1,\n        2)\nC = [x for x in (A, B)]")


def test_a_builtin_is_copied_only_where_a_block_holds_it(tmp_path):
    (tmp_path / "01_a.py").write_text("def input():\n    return 1\n")
    (tmp_path / "02_b.py").write_text("print(input())\n")
    assert sync(tmp_path) == 0 and (tmp_path / "02_b.py").read_text() == "print(input())\n"
    held = "print(input())\n" + block("01_a.py", "def input():\n    return 1")
    (tmp_path / "02_b.py").write_text(held)
    assert sync(tmp_path) == 0 and (tmp_path / "02_b.py").read_text() == held


@pytest.mark.parametrize("old, new, words", [
    (DOUBLE, DOUBLE.replace("double", "twice"), None),
    ("area(WIDTH)", "new(WIDTH)", "new: is copied from 01_a.py, which does not own it"),
    ("# endregion\n", "", "# region Copied from"),
    ("# endregion\n", "# endregion\n# endregion\n", "# endregion"),
    ("from 01_a.py: all", "from 01_b.py: all", "block of 01_b.py"),
    (f"{DEPTH}\n", f"{DEPTH}\n\nprint(1)\n", "print(1): is no definition"),
    (GUARD, f"{GUARD}NEW = 1\n", "`if __name__`"),
])
def test_sync_leaves_what_only_a_person_can_decide(folder, capsys, old, new, words):
    """A new definition in a block goes if nothing uses it (words: None), and stays if something does."""
    script = folder / "02_b.py"
    edit(script, f"{DEPTH}\n", f"{DEPTH}\n\n\ndef new(x):\n    return x\n" if "new" in new else f"{DEPTH}\n")
    edit(script, old, new)
    before = script.read_bytes()
    assert sync(folder) == (1 if words else 0)
    assert (f"02_b.py: {words}" in capsys.readouterr().out) is bool(words)
    assert script.read_bytes() == (before if words else SECOND.encode())
