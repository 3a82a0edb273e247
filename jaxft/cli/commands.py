"""The command `jaxft`: `jaxft train sft lr=1e-3` runs scripts/train.py with the same arguments."""

import ast
import difflib
import os
import sys
import types
from importlib import metadata

from jaxft.cli import cli, completion
from jaxft.data.rows.shipped import COMMAND_GROUPS, COMMANDS, ROOT

USAGE = """usage: jaxft COMMAND [argument ...]

Fine-tune and align language models in JAX.

{commands}

`jaxft COMMAND --help` lists a command's arguments, `jaxft train RECIPE --help` the knobs of a recipe,
`jaxft settings` all settings, and `jaxft help` the documentation."""

COMMANDS_ELSEWHERE = {"merge": "export, which merges an adapter", "finetune": "train", "infer": "generate"}


def main() -> int:
    """Run the command that the command line names, and return its exit code."""
    if "_ARGCOMPLETE" in os.environ:
        completion.complete_command_line()
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return cli.one_line_errors(print_usage)
    if name == "--version":
        print(f"jaxft {metadata.version('jaxft')}")
        return 0
    if name not in COMMANDS:
        near = ", ".join(difflib.get_close_matches(name, COMMANDS, 3, 0.3) or COMMANDS)
        near = COMMANDS_ELSEWHERE.get(name, near)
        if (ROOT / "configs" / f"{name}.py").is_file():
            near = f"train {name}, as {name} is a recipe"
        print(cli.usage_error(f"jaxft has no command {name!r}; near: {near}", "jaxft"), file=sys.stderr)
        return cli.WRONG_USAGE
    run_script(name, argv)
    return 0


def print_usage() -> int:
    """Print all commands, and return the exit code."""
    print(usage())
    return 0


def usage() -> str:
    """Return all commands by group, each with the first sentence of its script's docstring."""
    width, lines = max(map(len, COMMANDS)), list[str]()
    for title, names in COMMAND_GROUPS.items():
        lines += [f"{title}:", *(f"  {name:{width}}  {summary(name)}" for name in names), ""]
    return USAGE.format(commands="\n".join(lines).rstrip())


def summary(command: str) -> str:
    """Return the first sentence of a script's docstring, without running the script."""
    text = (ROOT / "scripts" / f"{COMMANDS[command]}.py").read_text(encoding="utf-8")
    return " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split()).partition(". ")[0]


def run_script(command: str, argv: list[str]) -> None:
    """Run a command's script in this process as the module __main__, as `python SCRIPT` does."""
    path = ROOT / "scripts" / f"{COMMANDS[command]}.py"
    module = types.ModuleType("__main__")
    module.__file__ = str(path)  # spawned processes import it
    sys.modules["__main__"] = module
    sys.argv = [f"jaxft {command}", *argv]
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
