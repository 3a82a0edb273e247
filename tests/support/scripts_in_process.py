"""Run a script in the test's process."""

import importlib.util
import sys
from pathlib import Path

from jaxft.runs import terminal

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load(name):
    """A script as a module."""
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def call(monkeypatch, capsys, name, *args):
    """(exit code, stdout, stderr) of a script in this process, as its last lines run it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    module = load(name)
    capsys.readouterr()
    try:
        code = terminal.one_line_errors(module.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()
