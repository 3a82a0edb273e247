"""List the recipes with hardware and time.

    jaxft list
    jaxft list --source sft > mine.py      # a recipe to change; jaxft train mine.py
    jaxft list --markdown                  # the table of configs/README.md

The list is read from the docstrings of the recipes; `jaxft train RECIPE --help` shows all of a docstring.
"""

import argparse
import ast
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

FOLDER = Path(__file__).resolve().parents[1] / "configs"
HARDWARE = re.compile(r"^Hardware: ([^;]+); ([^;]+)\.$")


class Recipe(NamedTuple):
    """A recipe's name, its docstring's first sentence, and the parts of its line `Hardware: WHAT; TIME.`"""

    recipe: str
    trains: str
    hardware: str
    time: str


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.runs.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("--source", metavar="RECIPE", help="print the source of this recipe")
    parser.add_argument("--json", action="store_true", help="print one JSON object per recipe")
    parser.add_argument("--markdown", action="store_true", help="print a table in Markdown")
    return parser


def read_recipe(file: Path) -> Recipe:
    """Read a recipe's docstring. Raises ValueError if it has no first sentence or no line of hardware."""
    paragraphs = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")
    found = next((match for text in paragraphs if (match := HARDWARE.match(" ".join(text.split())))), None)
    first = " ".join(paragraphs[0].split())
    if not found or not first.endswith("."):
        raise ValueError(f"{file}: its docstring needs a first sentence and a line `Hardware: WHAT; TIME.`")
    return Recipe(file.stem, first.removesuffix("."), found[1], found[2])


def main() -> int:
    """Print the recipes, those for CPUs first."""
    args = make_parser().parse_args()
    if args.source:
        from jaxft.runs.parse import find_recipe

        print(find_recipe(args.source).read_text(encoding="utf-8"), end="")
        return 0
    recipes = [read_recipe(file) for file in sorted(FOLDER.glob("*.py"))]
    recipes.sort(key=lambda recipe: "CPU" not in recipe.hardware)
    if args.json:
        print("\n".join(json.dumps(recipe._asdict()) for recipe in recipes))
    elif args.markdown:
        print(markdown(recipes))
    else:
        print(text(recipes, min(shutil.get_terminal_size().columns, 110)))
    return 0


def markdown(recipes: list[Recipe]) -> str:
    """Return the recipes as a table in Markdown."""
    rows = [Recipe._fields, ["---"] * 4, *([f"`{r.recipe}`", *r[1:]] for r in recipes)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def text(recipes: list[Recipe], width: int) -> str:
    """Return the recipes as text of at most `width` columns, two lines or more per recipe."""
    names = 2 + max(len(recipe.recipe) for recipe in recipes)
    lines = []
    for recipe in recipes:
        lines += textwrap.wrap(
            f"{recipe.recipe:{names}}{recipe.trains}", width, subsequent_indent=" " * names
        )
        lines.append(f"{'':{names}}{recipe.hardware}; {recipe.time}")
    return "\n".join(lines)


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
