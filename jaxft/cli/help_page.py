"""The reference that `jaxft settings` and `jaxft help` print: settings, recipes with their knobs, functions
with short names, commands, and options of other tools, all read from docstrings, annotations and tables.
"""

import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from jaxft import annotations
from jaxft.cli.commands import shipped_recipes, summary
from jaxft.data.data_settings import DataSettings
from jaxft.data.decision_rows import DecisionRows
from jaxft.data.pairs import PairRows
from jaxft.data.rows.shipped import COMMANDS, ROOT
from jaxft.data.sft import Rows, SolutionRows
from jaxft.objectives.pair import PreferenceLoss
from jaxft.rl.rollout_source import Rollouts
from jaxft.runs.settings.config import load_config
from jaxft.runs.settings.option_names import OPTIONS, find_options
from jaxft.runs.settings.setting_names import advice, knobs, nearest_settings, setting_names, settings_called
from jaxft.runs.settings.setting_values import load_callable
from jaxft.runs.settings.settings_list import (
    Setting,
    by_section,
    first_sentence,
    knobs_of,
    listed,
    settings_of,
    with_recipes,
)
from jaxft.runs.terminal import markdown_table
from jaxft.train.recipes import without_model_weights
from jaxft.train.settings import Run

# Recipes whose defaults are listed where they differ from their section's.
COMPARED_RECIPES = ("sft", "dpo", "reward", "grpo")
DATA_KINDS = {
    "SFT": Rows,
    "decisions": DecisionRows,
    "steps": SolutionRows,
    "preferences and reward models": PairRows,
    "reinforcement learning": Rollouts,
}


def settings_of_any_run() -> dict[str, list[Setting]]:
    """Return heading -> settings of any recipe. Each setting has its default, and the defaults of the recipes
    in COMPARED_RECIPES that differ from it.

    The settings that all recipes have come first. Headings such as `Of SFT, data: ...` follow, with the
    settings `data.*` that only the recipes of one task have.
    """
    with without_model_weights():
        recipes = {name: load_config(name, [], expected=Run) for name in COMPARED_RECIPES}
    shared = list(settings_of(DataSettings, "data."))
    run = [setting for setting in settings_of(Run) if not setting.name.startswith("data.")]
    groups = by_section(with_recipes([*run, *shared], recipes))
    for kind, cls in DATA_KINDS.items():
        bases = [base for base in DATA_KINDS.values() if base is not cls and issubclass(cls, base)]
        inherited = {setting.name for base in bases for setting in settings_of(base, "data.")}
        of_kind = [setting for setting in settings_of(cls, "data.") if setting not in shared]
        rest = [setting for setting in of_kind if setting.name not in inherited]
        by_title = by_section(with_recipes(rest, recipes))
        groups |= {f"Of {kind}, {title}": group for title, group in by_title.items()}
    return groups


def settings_of_recipe(recipe: str, overrides: Sequence[str] = ()) -> dict[str, list[Setting]]:
    """Return heading -> settings of a recipe: first its knobs (the parameters of its config(...)), then the
    fields of its Run by section. overrides: `name=value`, which change the defaults.
    """
    with without_model_weights():
        fields = list(settings_of(load_config(recipe, [*overrides], expected=Run)))
    return {f"Knobs of {recipe}": list(knobs_of(recipe, fields)), **by_section(fields)}


def named_functions() -> dict[str, dict[str, str]]:
    """Return the functions that have short names: title of a table -> short name -> package.module:name."""
    return {
        name.capitalize().replace("_", " ").replace("Kl ", "KL "): table
        for name, table in annotations.FUNCTION_TABLES.items()
    }


def described(name: str) -> str | None:
    """Return the help text of all meanings of a name: a recipe, the knobs and fields of this name, the fields
    of a section, functions with this short name, and options of other tools; None for any other name.

    name: such as optim.lr, its last part lr, or the section optim.
    """
    groups = _knob_meanings(name)
    fields = {title: _called(name, group) for title, group in settings_of_any_run().items()}
    if not groups and not any(fields.values()):  # a field of some recipes alone
        recipes = [recipe.recipe for recipe in shipped_recipes() if settings_called(name, recipe.recipe)]
        fields = settings_of_recipe(recipes[0]) if recipes else {}
        fields = {title: _called(name, group) for title, group in fields.items()}
    texts = [
        f"{recipe.recipe} is a recipe: {recipe.trains}. `jaxft train {recipe.recipe} --help` lists its knobs."
        for recipe in shipped_recipes()
        if recipe.recipe == name
    ]
    groups |= fields
    if not any(groups.values()) and (option := advice(name)):
        texts.append(option)
        settings = {option.setting for option in find_options(name) if option.setting}
        texts += [text for setting in sorted(settings) if (text := described(setting))]
    texts.append(listed(groups, in_full=True))
    for title, names in named_functions().items():
        if name in names:
            texts.append(f"{title}: {name} is {names[name]}\n\n{_docstring(names[name])}")
    return "\n\n".join(text for text in texts if text) or None


def _knob_meanings(name: str) -> dict[str, list[Setting]]:
    """Return heading -> the knob of this name. Recipes whose knobs have the same type and description are in
    one heading; another default than the first one's is in `elsewhere`.
    """
    meanings: dict[tuple[str, str], dict[str, Setting]] = {}
    for recipe in (shipped.recipe for shipped in shipped_recipes()):
        if any(knob.name == name for knob in knobs(ROOT / "configs" / f"{recipe}.py")):
            setting = next(k for k in next(iter(settings_of_recipe(recipe).values())) if k.name == name)
            meanings.setdefault((setting.kind, setting.text), {})[recipe] = setting
    groups: dict[str, list[Setting]] = {}
    for by_recipe in meanings.values():
        first = next(iter(by_recipe.values()))
        others: dict[str, list[str]] = {}
        for recipe, setting in by_recipe.items():
            if setting.default != first.default:
                others.setdefault(str(setting.default), []).append(recipe)
        elsewhere = tuple((", ".join(recipes), default) for default, recipes in others.items())
        heading = textwrap.fill(f"Knob of {', '.join(by_recipe)}", 110)
        groups[heading] = [replace(first, elsewhere=elsewhere)]
    return groups


def near_names(word: str) -> list[str]:
    """Return the words that `jaxft help` accepts and that are the most similar to an unknown one."""
    recipes = [recipe.recipe for recipe in shipped_recipes()]
    settings = dict.fromkeys(name for recipe in recipes for name in setting_names(recipe))
    functions = (name for names in named_functions().values() for name in names)
    options = (option.name for option in OPTIONS)
    return nearest_settings(word, list(dict.fromkeys([*settings, *COMMANDS, *recipes, *functions, *options])))


def _called(name: str, settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings with this name or last part, and those in the section of this name."""
    return [
        s for s in settings if name in (s.name, s.name.rpartition(".")[2]) or s.name.startswith(f"{name}.")
    ]


def page() -> str:
    """Return the whole reference as Markdown."""
    return "\n\n".join(["# Reference", *_commands(), *_recipes(), *_settings(), *_functions(), *_options()])


def _commands() -> Iterator[str]:
    yield "## Commands of jaxft"
    yield markdown_table(["command", "does"], [(f"`{command}`", summary(command)) for command in COMMANDS])


def _recipes() -> Iterator[str]:
    """Yield the recipes with their knobs' defaults, then a table of all knobs. A knob that has several
    meanings has a line for each.
    """
    yield "## Recipes and their knobs"
    knobs: dict[tuple[str, str, str], Setting] = {}
    for recipe in shipped_recipes():
        listed = next(iter(settings_of_recipe(recipe.recipe).values()))
        knobs |= {(knob.name, knob.kind, knob.text): knob for knob in listed}
        defaults = " ".join(k.name if k.default is None else f"{k.name}={k.default}" for k in listed)
        about = f"{recipe.trains}.\n{recipe.hardware}; {recipe.time}."
        defaults = textwrap.fill(defaults, 110, break_long_words=False, break_on_hyphens=False)
        yield f"### {recipe.recipe}\n\n{about}\n\n```\n{defaults}\n```"
    rows = [(f"`{knob.name}`", _kind(knob), knob.text) for _, knob in sorted(knobs.items())]
    yield "### Knobs\n\n" + markdown_table(["knob", "values", "meaning"], rows)


def _settings() -> Iterator[str]:
    yield "## Settings by section"
    for title, group in settings_of_any_run().items():
        rows = [(f"`{s.name}`", f"`{s.default}`" * (s.default is not None), _kind(s), s.text) for s in group]
        yield f"### {title}\n\n" + markdown_table(["setting", "default", "values", "meaning"], rows)


def _functions() -> Iterator[str]:
    yield "## Functions with short names"
    for title, names in named_functions().items():
        texts = {name: " ".join(_docstring(path).split()) for name, path in names.items()}
        rows = [(f"`{name}`", first_sentence(text)) for name, text in texts.items()]
        yield f"### {title}\n\n" + markdown_table(["name", "is"], rows)


def _options() -> Iterator[str]:
    yield "## Options of other tools"
    rows = [(f"`{o.name}`", ", ".join(o.tools), f"`{o.recipe}`", o.describe()) for o in OPTIONS]
    yield markdown_table(["option", "of", "recipe", "here"], rows)


def _docstring(path: str) -> str:
    """Return the docstring of the function `package.module:name`; for a PreferenceLoss, that of its function
    `fn`.
    """
    fn = load_callable(path)
    return inspect.getdoc(fn.fn if isinstance(fn, PreferenceLoss) else fn) or ""


def _kind(setting: Setting) -> str:
    return f"{setting.kind}: {', '.join(setting.names)}" if setting.names else setting.kind
