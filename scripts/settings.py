"""List all settings of a run, or the settings that match a word, with default, type and description.

    python scripts/settings.py                    # every section.field of a run
    python scripts/settings.py warmup             # settings whose name or description has this word
    python scripts/settings.py learning_rate      # a name of TRL, PEFT, Axolotl, LLaMA-Factory or Unsloth
    python scripts/settings.py dpo loss           # knobs too, with the defaults of a recipe

Without a recipe it lists the default of each setting, and other values in sft, dpo, reward and grpo. A
setting is written as `name=value` after the recipe: `jaxft train sft optim.warmup=0.1`.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument(
        "--config", metavar="RECIPE", help="a recipe such as sft, or a Python file with config(...) -> Run"
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="words that a setting has; a recipe may come first, with knob=value as for training",
    )
    return parser


def main() -> int:
    """List settings."""
    args = make_parser().parse_args()
    from jaxft.cli.help_page import COMPARED_RECIPES, settings_of_any_run, settings_of_recipe
    from jaxft.runs.settings.setting_names import advice, nearest_settings, setting_names
    from jaxft.runs.settings.setting_values import recipe_names
    from jaxft.runs.settings.settings_list import listed, matching

    recipe, words = args.config, args.words
    if recipe is None and words and (words[0] in recipe_names() or words[0].endswith(".py")):
        recipe, *words = words
    overrides, words = [w for w in words if "=" in w], [w for w in words if "=" not in w]
    if overrides and recipe is None:
        raise ValueError(f"{overrides[0]} needs a recipe; begin with its name, such as sft")
    groups = settings_of_any_run() if recipe is None else settings_of_recipe(recipe, overrides)
    names = [setting.name for group in groups.values() for setting in group]
    for word in words:
        groups = {title: matching(group, word) for title, group in groups.items()}
    sections = {name.partition(".")[0] for name in names if "." in name}  # optim is one, and TRL's option
    lines = [line for word in words if word not in sections and (line := advice(word, recipe=recipe))]
    if not any(groups.values()) and not lines and recipe is None:
        names_first = dict.fromkeys((*COMPARED_RECIPES, *recipe_names()))
        candidates = (name for name in names_first if all(word in setting_names(name) for word in words))
        if recipe := next(candidates, None):
            lines = [f"in recipes such as {recipe}:"]
            groups = settings_of_recipe(recipe)
            groups = {title: [s for s in group if s.name in words] for title, group in groups.items()}
    if not any(groups.values()) and not lines:
        near = ", ".join(nearest_settings(" ".join(words), names)) or "none; `jaxft settings` lists all"
        raise ValueError(f"no setting has {' and '.join(map(repr, words))} in its name or text; near: {near}")
    count = sum(map(len, groups.values()))
    print("\n\n".join(text for text in ("\n".join(lines), listed(groups, in_full=count <= 12)) if text))
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
