"""The command `jaxft`, which runs the scripts, its shell completion, and the topics of `jaxft help`.

`jaxft train sft lr=1e-3` runs scripts/train.py with the same arguments. The shell completes commands,
options, recipes, settings and values without importing jax. Topics are the sections of the README files, in a
clone or an installed wheel; `jaxft list` reads the docstrings of the recipes.
"""

import argparse
import ast
import difflib
import glob
import os
import re
import sys
import types
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.cli import cli
from jaxft.data.rows.shipped import COMMAND_GROUPS, COMMANDS, IS_CLONE, PACKAGE, ROOT
from jaxft.runs import terminal
from jaxft.runs.settings.setting_names import choices, dotted_fields, knobs, setting_names, takes_text

# File, from the root of the clone -> its subject. The wheel has README.md as its description.
DOCUMENTS = {
    "README.md": "Overview",
    "configs/README.md": "Recipes and settings",
    "scripts/README.md": "Commands",
    "scripts/bench/README.md": "Measurements",
    "jaxft/README.md": "The code",
}
HARDWARE_LINE = re.compile(r"^Hardware: ([^;]+); ([^;]+)\.$")


class Topic(NamedTuple):
    """A section of a README file: heading, name in links, file, and text with the heading."""

    title: str
    name: str
    file: str
    text: str


def read_document(file: str) -> str:
    """Return the text of a README file. file: a key of DOCUMENTS, such as configs/README.md."""
    if file == "README.md" and not IS_CLONE:
        return (metadata.distribution("jaxft").read_text("METADATA") or "").partition("\n\n")[2]
    path = PACKAGE / "README.md" if file == "jaxft/README.md" else ROOT / file
    return path.read_text(encoding="utf-8")


def topics() -> list[Topic]:
    """Return the sections of all README files, in the order of DOCUMENTS."""
    return [topic for file in DOCUMENTS for topic in topics_of(file, read_document(file))]


def topics_of(file: str, text: str) -> Iterator[Topic]:
    """Yield the sections of a Markdown file; a section contains its subsections."""
    code = [match.span() for match in re.finditer(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)]
    headings = [
        match
        for match in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE)
        if not any(start <= match.start() < end for start, end in code)
    ]
    for place, heading in enumerate(headings):
        following = (h.start() for h in headings[place + 1 :] if len(h[1]) <= len(heading[1]))
        end = len(text) if len(heading[1]) == 1 else next(following, len(text))
        yield Topic(heading[2], link_name(heading[2]), file, text[heading.start() : end].strip())


def link_name(title: str) -> str:
    """Return the name of a heading in links, as GitHub makes it.

    >>> link_name("Deploy to llama.cpp, Ollama and vLLM")
    'deploy-to-llamacpp-ollama-and-vllm'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def with_topics(text: str) -> str:
    """Return Markdown with `jaxft help` commands as links to sections, without pictures and other file links.

    >>> with_topics("see [rows](configs/README.md#rows-for-sft) in [the code](jaxft/loop.py)")
    'see rows (`jaxft help rows-for-sft`) in the code'
    """
    text = re.sub(r"<!--.*?-->\n?|<img [^>]*>[ \n]?", "", text)
    text = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)#]*#([\w-]+)\)", r"\1 (`jaxft help \2`)", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


def find_topics(words: Sequence[str], known: Sequence[Topic]) -> list[Topic]:
    """Return [the topic that the words name]; else the topics with all words in the title, shortest title
    first; else the sections with all words in the text, those with the most mentions for their length first.

    `words` may be abbreviated: "quant" matches quantisation.
    """
    named = [topic for topic in known if topic.name == link_name(" ".join(words))]
    if named:
        return named[:1]

    patterns = [re.compile(rf"\b{re.escape(word)}", re.IGNORECASE) for word in words]
    titled = [topic for topic in known if all(p.search(topic.title) for p in patterns)]
    if titled:
        return sorted(titled, key=lambda topic: len(topic.title))

    def weight(topic: Topic) -> float:
        """Return how often the text has the least frequent of the words, over the root of its length."""
        return min(len(p.findall(topic.text)) for p in patterns) / len(topic.text) ** 0.5

    matching = [topic for topic in known if topic.text[:2] == "##" and weight(topic)]
    return sorted(matching, key=weight, reverse=True)


class ShippedRecipe(NamedTuple):
    """A row of `jaxft list`: a recipe's name, and from its docstring the first sentence and WHAT and TIME of
    the line `Hardware: WHAT; TIME.`
    """

    recipe: str
    trains: str
    hardware: str
    time: str


def read_recipe(file: Path) -> ShippedRecipe:
    """Read a recipe's docstring. Raises ValueError without a first sentence or a Hardware line."""
    paragraphs = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")
    hardware = next(
        (match for text in paragraphs if (match := HARDWARE_LINE.match(" ".join(text.split())))), None
    )
    first = " ".join(paragraphs[0].split())
    if not hardware or not first.endswith("."):
        raise ValueError(f"{file}: its docstring needs a first sentence and a line `Hardware: WHAT; TIME.`")
    return ShippedRecipe(file.stem, first.removesuffix("."), hardware[1], hardware[2])


def shipped_recipes() -> list[ShippedRecipe]:
    """Return the recipes that ship with jaxft, recipes for CPUs first."""
    recipes = [read_recipe(file) for file in sorted((ROOT / "configs").glob("*.py"))]
    return sorted(recipes, key=lambda recipe: "CPU" not in recipe.hardware)


def complete_command_line() -> None:
    """Print the completions of the command line in COMP_LINE, and exit."""
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for name in COMMANDS:
        chosen = name == next(iter(words[1:]), None)  # only this command's script is loaded
        parents = [command_parser(name)] if chosen else []
        commands.add_parser(name, parents=parents, add_help=not parents, conflict_handler="resolve")
    argcomplete.autocomplete(parser, always_complete_options=False)


def command_parser(command: str) -> argparse.ArgumentParser:
    """Return the argument parser of a command's script. Its arguments for recipes, settings, runs and topics
    have the completers that argcomplete calls.
    """
    path = ROOT / "scripts" / f"{COMMANDS[command]}.py"
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    source = ast.parse(path.read_bytes())
    light = ast.Module([node for node in source.body if _is_of_parser(node)], [])
    vars(module).update(cli=cli, __doc__=ast.get_docstring(source, clean=False))
    exec(compile(light, str(path), "exec"), module.__dict__)
    try:
        parser: argparse.ArgumentParser = module.make_parser()
    except NameError:  # it uses more of its file
        exec(compile(source, str(path), "exec"), module.__dict__)
        parser = module.make_parser()
    completers = {
        "config": recipes_and_settings, "overrides": recipes_and_settings, "run": run_folders,
        "runs": run_folders, "topic": topics_settings_and_commands, "words": names_of_settings,
        "over": knobs_to_sweep, "source": recipe_files,
    }  # fmt: skip
    for action in parser._actions:
        if action.dest in completers:
            vars(action)["completer"] = completers[action.dest]  # argcomplete's interface
    return parser


def _is_of_parser(node: ast.stmt) -> bool:
    """Whether a script's parser may need a statement: an import of a standard module, a constant, or the
    parser itself. Other statements import jax, which takes seconds.
    """
    if isinstance(node, ast.Import | ast.ImportFrom):
        named = [each.name for each in node.names]
        if isinstance(node, ast.ImportFrom):
            named = [node.module or ""]
        return all(name.partition(".")[0] in sys.stdlib_module_names for name in named)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return all(isinstance(x, ast.Constant | ast.Tuple | ast.Load) for x in ast.walk(node.value))
    return isinstance(node, ast.FunctionDef) and node.name == "make_parser"


def _recipe_names() -> list[str]:
    return [file.stem for file in (ROOT / "configs").glob("*.py")]


def run_folders(prefix: str, **_: Any) -> list[str]:
    """Return the folders in runs/ that begin with `prefix`."""
    folders = [str(file.parent) for file in Path("runs").glob("*/config.json")]
    return [folder for folder in folders if folder.startswith(prefix)]


def topics_settings_and_commands(**_: Any) -> list[str]:
    """Return the words that `jaxft help` accepts: commands, topics, recipes, and settings of sft with their
    last parts.
    """
    settings, named = setting_names("sft"), [topic.name for topic in topics()]
    last = [name.rpartition(".")[2] for name in settings]
    return list(dict.fromkeys([*COMMANDS, *named, *_recipe_names(), *settings, *last]))


def knobs_to_sweep(prefix: str, parsed_args: argparse.Namespace, **more: Any) -> list[str]:
    """Return the completions of `--over KNOB=A,B`: as those of a setting, of the recipe named so far."""
    return recipes_and_settings(prefix, parsed_args, **more) if _recipe_of(parsed_args, prefix) else []


def recipe_files(prefix: str, **_: Any) -> list[str]:
    """Return the recipes, and the Python files and folders that begin with `prefix`."""
    return [*_recipe_names(), *(path for path in files(prefix) if path.endswith((".py", "/")))]


def names_of_settings(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the words that `jaxft settings` accepts: a recipe as the first word, and the settings of the
    recipe named so far, else of sft. parsed_args: the arguments before this word.
    """
    recipe = next(iter(parsed_args.words or ()), parsed_args.config)
    recipes = [] if parsed_args.words else _recipe_names()
    return [*recipes, *setting_names(recipe or "sft")]


def recipes_and_settings(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the completions of an argument that begins with `prefix`, for argcomplete.

    The first argument is completed to recipes and Python files; later ones to the recipe's settings, such as
    `lr=` and `optim.clip=` (for an empty prefix: parameters of its config(...), and sections such as
    `optim.`); after `NAME=`, to the values of that setting. parsed_args: the arguments before this one.
    """
    recipe = _recipe_of(parsed_args, prefix)
    name, equals, value = prefix.partition("=")
    if recipe is None and not equals:
        return recipe_files(prefix)
    candidates = (ROOT / "configs" / f"{recipe}.py", Path(recipe or ""), ROOT / (recipe or ""))
    path = next((file for file in candidates if file.is_file()), Path(recipe or ""))
    if equals:
        return [f"{name}={text}" for text in values(name, value, path)]
    if not path.is_file():
        return []
    own_knobs, fields = knobs(path), dotted_fields(path)
    if prefix:
        return list(dict.fromkeys(f"{setting.name}=" for setting in (*own_knobs, *fields)))
    sections = dict.fromkeys(f"{field.name.partition('.')[0]}." for field in fields if "." in field.name)
    return [*(f"{knob.name}=" for knob in own_knobs), *sections]


def _recipe_of(parsed_args: argparse.Namespace, prefix: str) -> str | None:
    """Return the recipe that the arguments before the word `prefix` name, None if they name none."""
    given = [parsed_args.config, *(parsed_args.overrides or ())]
    return next((item for item in given if item and "=" not in item and item != prefix), None)


def values(name: str, prefix: str, recipe: Path) -> list[str]:
    """Return completions of a setting's value: its choices, and files if it may be any text.

    name: the setting. prefix: the value as typed so far; after a comma, the next item is completed. recipe:
    the recipe's file.
    """
    known = {setting.name: setting.kind for setting in (*dotted_fields(recipe), *knobs(recipe))}
    kind = known.get(name)
    if kind is None:  # a knob without annotation, or a name that the recipe does not have
        return files(prefix) if name in known or not recipe.is_file() else []
    before, comma, last = prefix.rpartition(",")
    listed = [f"{before}{comma}{choice}" for choice in choices(kind)]
    return [*listed, *(files(prefix) if takes_text(kind) else [])]


def files(prefix: str) -> list[str]:
    """Return the files and folders whose path begins with `prefix`, folders with a slash."""
    return [path + "/" * os.path.isdir(path) for path in glob.glob(glob.escape(prefix) + "*")]


USAGE = """usage: jaxft COMMAND [argument ...]

Fine-tune and align language models in JAX.

{commands}

`jaxft COMMAND --help` lists a command's arguments, `jaxft train RECIPE --help` the knobs of a recipe,
`jaxft settings` all settings, and `jaxft help` the documentation."""

COMMANDS_ELSEWHERE = {"merge": "export, which merges an adapter", "finetune": "train", "infer": "generate"}


def main() -> int:
    """Run the command that the command line names, and return its exit code."""
    if "_ARGCOMPLETE" in os.environ:
        complete_command_line()
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return terminal.one_line_errors(print_usage)
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
