"""List all settings of a run, or those that a word finds, with default, type and description.

    python scripts/settings.py                    # every section.field of a run
    python scripts/settings.py warmup             # those whose name or description has this word
    python scripts/settings.py learning_rate      # a name of TRL, PEFT, Axolotl, LLaMA-Factory or Unsloth
    python scripts/settings.py dpo loss           # knobs too, with the defaults of a recipe

Without a recipe defaults are those of the sections, followed by those of sft, dpo, reward and grpo where
these differ. A setting is written as `name=value` after the recipe: `jaxft train sft optim.warmup=0.1`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

RECIPES = ("sft", "dpo", "reward", "grpo")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.runs.cli import CommandParser

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


def of_any_run() -> dict[str, list[Any]]:
    """Return heading -> settings with the defaults of their classes, and what the recipes of RECIPES set; of
    data first what all kinds share.
    """
    from jaxft.data.pairs import PairRows
    from jaxft.data.settings import DataSettings
    from jaxft.data.sft import Rows
    from jaxft.rl.rollout import Rollouts
    from jaxft.runs.config import load_config
    from jaxft.runs.settings_list import by_section, settings_of, with_recipes
    from jaxft.train.settings import Run

    recipes = {name: load_config(name, [], expected=Run) for name in RECIPES}
    shared = list(settings_of(DataSettings, "data."))
    others = [setting for setting in settings_of(Run) if not setting.name.startswith("data.")]
    groups = by_section(with_recipes([*others, *shared], recipes))
    kinds = {"SFT": Rows, "preferences and reward models": PairRows, "reinforcement learning": Rollouts}
    for kind, cls in kinds.items():
        rest = [setting for setting in settings_of(cls, "data.") if setting not in shared]
        own = by_section(with_recipes(rest, recipes))
        groups |= {f"Of {kind}, {title}": found for title, found in own.items()}
    return groups


def of_recipe(recipe: str, overrides: list[str]) -> dict[str, list[Any]]:
    """Return heading -> the knobs of a recipe, and the settings of its run."""
    from jaxft.runs.config import load_config
    from jaxft.runs.settings_list import by_section, knobs_of, settings_of
    from jaxft.train.settings import Run

    fields = list(settings_of(load_config(recipe, overrides, expected=Run)))
    return {f"Knobs of {recipe}": list(knobs_of(recipe, fields)), **by_section(fields)}


def main() -> int:
    """List settings."""
    args = make_parser().parse_args()
    from jaxft.runs.parse import recipe_names
    from jaxft.runs.settings_list import listed, matching
    from jaxft.runs.unknown_names import advice, nearest_settings, setting_names
    from jaxft.train.recipes import without_model_weights

    recipe, words = args.config, args.words
    if recipe is None and words and (words[0] in recipe_names() or words[0].endswith(".py")):
        recipe, *words = words
    overrides, words = [w for w in words if "=" in w], [w for w in words if "=" not in w]
    if overrides and recipe is None:
        raise ValueError(f"{overrides[0]} needs a recipe; begin with its name, such as sft")
    with without_model_weights():
        groups = of_any_run() if recipe is None else of_recipe(recipe, overrides)
    names = [setting.name for group in groups.values() for setting in group]
    for word in words:
        groups = {title: matching(group, word) for title, group in groups.items()}
    sections = {name.partition(".")[0] for name in names if "." in name}  # optim is one, and TRL's option
    lines = [line for word in words if word not in sections and (line := advice(word, recipe=recipe))]
    if not any(groups.values()) and not lines and recipe is None:
        names_first = dict.fromkeys((*RECIPES, *recipe_names()))
        found = (name for name in names_first if all(word in setting_names(name) for word in words))
        if recipe := next(found, None):
            lines = [f"in recipes such as {recipe}:"]
            groups = {t: [s for s in group if s.name in words] for t, group in of_recipe(recipe, []).items()}
    if not any(groups.values()) and not lines:
        near = ", ".join(nearest_settings(" ".join(words), names)) or "none; `jaxft settings` lists all"
        raise ValueError(f"no setting has {' and '.join(map(repr, words))} in its name or text; near: {near}")
    count = sum(map(len, groups.values()))
    print("\n\n".join(text for text in ("\n".join(lines), listed(groups, in_full=count <= 12)) if text))
    return 0


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
