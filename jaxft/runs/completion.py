"""Shell completion of `jaxft`: commands, options, recipes and their knobs, without importing jax."""

import argparse
import ast
import glob
import os
import sys
import types
from pathlib import Path
from typing import Any

from jaxft.data.shipped import COMMANDS, PACKAGE, ROOT

RECIPE = ("config", "overrides")  # arguments that name a recipe or set its knobs


def complete_command_line() -> None:
    """Print the completions of the command line in COMP_LINE, and exit."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for name in COMMANDS:
        chosen = name == next(iter(words[1:]), None)  # only this command's script is loaded
        own = [command_parser(name)] if chosen else []
        commands.add_parser(name, parents=own, add_help=not own, conflict_handler="resolve")
    argcomplete.autocomplete(parser, always_complete_options=False)


def command_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command's script, with completions for recipes, knobs and runs."""
    path = ROOT / "scripts" / f"{COMMANDS[command]}.py"
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    parser: argparse.ArgumentParser = module.make_parser()
    for action in parser._actions:
        if action.dest in RECIPE:
            completer: Any = recipes_and_knobs
        elif action.dest in ("run", "runs"):
            completer = run_folders
        else:
            continue
        vars(action)["completer"] = completer  # argcomplete's interface
    return parser


def run_folders(prefix: str, **_: Any) -> list[str]:
    """Return the folders in runs/ that begin with `prefix`."""
    found = [str(file.parent) for file in Path("runs").glob("*/config.json")]
    return [folder for folder in found if folder.startswith(prefix)]


def recipes_and_knobs(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the recipes and Python files that begin with `prefix`; after a recipe, its knobs."""
    knob, equals, value = prefix.partition("=")
    if equals:
        return [f"{knob}={path}" for path in files(value)]
    given = [parsed_args.config, *(parsed_args.overrides or ())]
    recipe = next((item for item in given if item and "=" not in item and item != prefix), None)
    if recipe is None:
        names = [path.stem for path in (ROOT / "configs").glob("*.py")]
        return [*names, *(path for path in files(prefix) if path.endswith((".py", "/")))]
    shipped = ROOT / "configs" / f"{recipe}.py"
    path = shipped if shipped.is_file() else Path(recipe)
    return [f"{name}=" for name in knobs(path)] if path.is_file() else []


def files(prefix: str) -> list[str]:
    """Return the files and folders whose path begins with `prefix`, folders with a slash."""
    return [path + "/" * os.path.isdir(path) for path in glob.glob(glob.escape(prefix) + "*")]


def knobs(recipe: Path) -> list[str]:
    """Return the knobs of a recipe, read from its source: the parameters of config(...), and the fields of
    those that are groups of knobs.
    """
    try:
        tree = ast.parse(recipe.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    shared = ast.parse((PACKAGE / "train" / "recipes.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in (*shared.body, *tree.body) if isinstance(node, ast.ClassDef)}
    config = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "config"), None)
    found = []
    for argument in (*config.args.args, *config.args.kwonlyargs) if config else ():
        kind = argument.annotation
        group = kind.id if isinstance(kind, ast.Name) else ""
        found += fields_of(group, classes) if group in classes else [argument.arg]
    return found


def fields_of(name: str, classes: dict[str, ast.ClassDef]) -> list[str]:
    """Return the fields of a dataclass and its bases, in order."""
    bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name) and base.id in classes]
    own = [
        n.target.id
        for n in classes[name].body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    ]
    return list(dict.fromkeys([*(field for base in bases for field in fields_of(base, classes)), *own]))
