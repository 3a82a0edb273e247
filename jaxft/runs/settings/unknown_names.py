"""Settings in place of names and files of other tools: `learning_rate=1e-4`, `--lr 1e-4`, `lora.yml`.

TRL, Axolotl, LLaMA-Factory and Unsloth have other names for the same settings (see option_names.py), pass
them as `--name value`, and read YAML or JSON.
"""

import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path

from jaxft.data.rows.shipped import ROOT
from jaxft.runs.settings.option_names import Option, find_options, normalised
from jaxft.runs.settings.setting_sources import dotted_fields, knobs

SETTINGS_FILES = (".yml", ".yaml", ".json")  # of other tools
ROW_FILES = (".jsonl", ".csv", ".tsv", ".parquet")
ALL_WEIGHTS = {  # how recipes without the knob `full` train them; the others: adapter=none
    "sft": "the recipe sft_full trains all weights",
    "sft_full": "this recipe trains all weights; leave it out",
}


def advice(name: str, text: str | None = None, recipe: str | None = None) -> str | None:
    """Return one line of advice for an option of another tool; None for an unknown name, and for a name that
    is a setting of the recipe too.

    text: its value on the command line, None for any. recipe: the recipe's name.

    >>> advice("learning_rate", "1e-4")
    'learning_rate is lr here; write lr=1e-4'
    """
    options = find_options(name, recipe=recipe) if text is None else meant_options(name, recipe)
    lines = {line: option.recipe for option in options if (line := _line(option, text, recipe))}
    if recipe is None and len(set(lines.values())) > 1:
        lines = {f"{line} (recipes such as {of})": of for line, of in lines.items()}
    return "; or ".join(lines) or None


def name_of_loss(theirs: str) -> str | None:
    """Return the loss of another tool's loss_type, None for an unknown one.

    >>> name_of_loss("dr_grpo")
    "TRL's loss_type dr_grpo is token_weights=constant_length"
    """
    for option in find_options("loss_type"):
        if theirs in option.values:
            ours = option.values[theirs] or f"the default of recipes such as {option.recipe}"
            return f"TRL's loss_type {theirs} is {ours}"
    return None


def meant_options(key: str, recipe: str | None = None) -> tuple[Option, ...]:
    """Return the options of other tools that an unknown key of a command line may mean, () for none.

    >>> [option.name for option in meant_options("dora")]
    ['use_dora']
    """
    if key == "full":  # of a recipe without this knob
        return find_options("full_finetuning", recipe=recipe)
    return find_options(key, recipe=recipe) or find_options(f"use_{normalised(key)}", recipe=recipe)


def _line(option: Option, text: str | None, recipe: str | None) -> str:
    """Return the advice of one row of the table, "" for none."""
    elsewhere = option.recipe not in ("sft", recipe)
    if option.name == option.setting:
        return f"{option.name} is a setting of recipes such as {option.recipe}" if elsewhere else ""
    if text is None or option.kind != "same" or option.setting is None:
        return option.describe()
    try:
        written = " ".join(option.overrides(text))
    except ValueError:  # the value has no equivalent
        return option.describe()
    if not written:
        return f"{option.name}={text} is the default here; leave it out"
    if written == "full=true" and "full" not in setting_names(recipe or ""):
        return ALL_WEIGHTS.get(recipe or "", "adapter=none trains all weights")
    where = f", in recipes such as {option.recipe}" if elsewhere else ""
    note = f" ({option.note})" if option.note else ""
    return f"{option.name} is {option.setting} here{where}; write {written}{note}"


def options_as_settings(argv: Sequence[str], options: Sequence[str]) -> str | None:
    """Return the settings for the options of a command line that are not among `options`; None if all are.

    >>> options_as_settings(["sft", "--lr", "1e-4"], ["--help"])
    '--lr 1e-4: settings are written without dashes; write lr=1e-4'
    """
    recipe = next((word for word in argv if word[:1] != "-" and "=" not in word), "")
    is_recipe = recipe == argv[0] or "--config" in argv  # and no option's value
    if is_recipe and (refusal := settings_file(recipe)):
        return refusal
    given, plain, lines = list[str](), list[str](), list[str]()
    for place, word in enumerate(argv):
        option, equals, text = word.partition("=")
        if not option.startswith("--") or option in options or option == "--":
            continue
        if same := [name for name in options if normalised(name) == normalised(option)]:  # --dry_run
            return f"unrecognized argument {option}; write {same[0]}"
        following = argv[place + 1] if place + 1 < len(argv) else "--"
        has_value = not following.startswith("--") and "=" not in following
        value = text if equals else following if has_value else "true"
        given.append(f"{option} {value}" if equals or has_value else option)
        if found := advice(option, value, Path(recipe).stem):
            lines.append(found)
        elif setting := next(iter(settings_called(normalised(option), recipe)), None):
            plain.append(f"{setting}={value}")
        else:
            near = ", ".join(nearest_settings(normalised(option), [*options, *setting_names(recipe)]))
            return f"unrecognized argument {option}; near: {near}"
    if plain:
        lines.append(f"settings are written without dashes; write {' '.join(plain)}")
    return f"{' '.join(given)}: {join_lines(lines)}" if given else None


def join_lines(lines: Sequence[str]) -> str:
    """Join advice about several options in one line; the same remark about neighbours is written once.

    >>> join_lines(["a is x here; see x", "b is x here; see x"])
    'a is x here, b is x here; see x'
    """
    parts = [line.partition("; ") for line in lines]
    groups = itertools.groupby(parts, key=lambda part: part[2] or part[0])
    return "; ".join(
        ", ".join(head for head, _, _ in group) + (f"; {note}" if note != group[0][0] else "")
        for note, group in ((note, list(group)) for note, group in groups)
    )


def near_options(argv: Sequence[str], options: Sequence[str]) -> str | None:
    """Return the options nearest to the first one that is not among `options`; None if all are."""
    unknown = [word.partition("=")[0] for word in argv if word.startswith("--") and word != "--"]
    wrong = next((option for option in unknown if option not in options), None)
    near = ", ".join(difflib.get_close_matches(wrong or "", options, 3, 0.3))
    return f"unrecognized argument {wrong}; near: {near}" if wrong and near else None


def nearest_settings(name: str, settings: Sequence[str]) -> list[str]:
    """Return the settings and options whose last parts are the most similar to `name`.

    >>> nearest_settings("wramup", ["optim.warmup", "optim.lr", "data.warm_up"])
    ['optim.warmup', 'data.warm_up']
    """
    first = reversed(settings)  # of two with the same last part
    last = {setting.lstrip("-").rpartition(".")[2]: setting for setting in first}
    return [last[near] for near in difflib.get_close_matches(name, last, 3, 0.3)]


def setting_names(recipe: str) -> list[str]:
    """Return the knobs and dotted fields of a recipe, of sft if this is none."""
    shipped = ROOT / "configs" / f"{recipe}.py"
    path = Path(recipe) if recipe.endswith(".py") else shipped
    path = path if path.is_file() else ROOT / "configs" / "sft.py"
    return [setting.name for setting in (*knobs(path), *dotted_fields(path))]


def settings_called(name: str, recipe: str) -> list[str]:
    """Return the setting of a recipe with this name, or else those whose last part it is.

    >>> settings_called("eval_every", "sft")
    ['loop.eval_every']
    """
    names = setting_names(recipe)
    return [name] if name in names else [x for x in names if x.rpartition(".")[2] == name]


def settings_file(path: str) -> str | None:
    """Return advice about a file of rows, or of another tool's settings, in place of a recipe; None for
    other files.
    """
    if _has_rows(Path(path)):
        return f"{path}: this is a file of rows; name a recipe first, such as `sft data={path}`"
    if Path(path).suffix.lower() not in SETTINGS_FILES:
        return None
    return (
        f"{path}: a recipe is a Python file, and this is a file of settings; `python scripts/convert.py "
        f"{path}` prints the command for an Axolotl, LLaMA-Factory or TRL file"
    )


def _has_rows(file: Path) -> bool:
    """Whether a file has rows by its name, or is a JSON list."""
    if not file.is_file() or file.suffix.lower() not in (".json", *ROW_FILES):
        return False
    with file.open("rb") as stream:
        return file.suffix.lower() != ".json" or stream.read(100).lstrip()[:1] == b"["
