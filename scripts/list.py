"""List the recipes with hardware and time.

    jaxft list
    jaxft list --source sft > mine.py      # a recipe to change; jaxft train mine.py

The list is read from the docstrings of the recipes; `jaxft train RECIPE --help` shows all of a docstring.
"""

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("--source", metavar="RECIPE", help="print the source of this recipe")
    parser.add_argument("--json", action="store_true", help="print one JSON object per recipe")
    return parser


def main() -> int:
    """Print the recipes, recipes for CPUs first."""
    args = make_parser().parse_args()
    if args.source:
        from jaxft.runs.settings.setting_values import find_recipe

        print(find_recipe(args.source).read_text(encoding="utf-8"), end="")
        return 0
    from jaxft.cli.commands import shipped_recipes

    recipes = shipped_recipes()
    if args.json:
        print("\n".join(json.dumps(recipe._asdict()) for recipe in recipes))
    else:
        print(text(recipes, min(shutil.get_terminal_size().columns, 110)))
    return 0


def text(recipes: list[Any], width: int) -> str:
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
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
