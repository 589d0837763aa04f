"""Shared by all tests: load a numbered script as a module, or run it as a user would."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["MPLBACKEND"] = "Agg"        # figures without a screen, here and in the processes that tests start


def load(name):
    """Import a script from the repository root: load("01_rectified_flow"). The second call returns the same module.

    A name that starts with a digit cannot stand in an import statement, hence the detour.
    """
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)   # dataclasses look here while loading
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def run_script(name, *args, cwd, env=None, timeout=600):
    """Run `python <name>.py args...` in the folder `cwd`; `env` adds to the environment.

    Returns: subprocess.CompletedProcess with returncode and, as text, stdout and stderr.
    """
    command = [sys.executable, str(ROOT / f"{name}.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **(env or {})}, timeout=timeout,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
