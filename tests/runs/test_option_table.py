"""Every setting in the table of configs/README.md exists: it is applied to the recipe that its row names."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from jaxft.nn.param import ParamSpec, full
from jaxft.optim.optimizer import make_optimizer
from jaxft.runs.config import load_config
from jaxft.runs.option_names import find_options

ROOT = Path(__file__).resolve().parents[2]
SPECS = {
    "adapter": {"layers": {"q": {"b": ParamSpec((2, 3, 4), ("layers", "rank", "heads"), full(0.0))}}},
    "base": {"embed": ParamSpec((8, 4), ("vocab", "table_width"), full(0.0))},
}


def table():
    """(option, [recipe, settings], note) of each row; a row without settings has none."""
    text = (ROOT / "configs" / "README.md").read_text().split("## Options of TRL")[1].split("\n## ")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 3 and not cells[0].startswith(("**", "option elsewhere", "---")):
            spans = [span.replace("\\|", "|") for span in re.findall(r"`([^`]+)`", cells[1])]
            recipe = spans.pop(0) if spans and spans[0].endswith(".py") else "sft.py"
            yield cells[0], [(recipe, shlex.split(span)) for span in spans], cells


ROWS = list(table())


def test_the_table_is_read_and_says_why_there_is_no_setting():
    assert len(ROWS) > 60 and sum(not settings for _, settings, _ in ROWS) < 20
    for option, settings, (_, here, note) in ROWS:
        assert settings or (here == "none" and len(note) > 10), option


def test_every_setting_of_the_table_exists(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for option, alternatives, _ in ROWS:
        for recipe, overrides in alternatives:
            if overrides[0].startswith("scripts/"):
                runpy.run_path(overrides[0])["make_parser"]().parse_args(overrides[1:])
                continue
            try:
                run = load_config(f"configs/{recipe}", overrides)
                if any(o.startswith("optim.") for o in overrides):
                    make_optimizer(run.optim, SPECS, 200)
            except ValueError as error:
                pytest.fail(f"{option}: {recipe} {' '.join(overrides)}: {error}")


# In the table of configs/README.md, but no options of the tools in option_names.py: values of
# lr_scheduler_type and their arguments, functions, classes, and options of optimizers.
NO_OPTIONS = set(
    re.findall(
        r"\w+",
        "setup_chat_format resize_token_embeddings torch adjust_lr_fn CPUOffloadOptimizer cosine_with_min_lr "
        "min_lr_rate cosine_with_restarts num_cycles warmup_stable_decay num_decay_steps inverse_sqrt "
        "polynomial reduce_lr_on_plateau TrainableTokensConfig EvaConfig add_weighted_adapter freeze gs s3 "
        "EarlyStoppingCallback",
    )
)


def named_options(cell):
    """(name, value or None) of the options in a cell, without those of torchtune, marked (t)."""
    for span, torchtune in re.findall(r"`(\w[^`]*)`( \(t\))?", cell):
        found = re.match(r"(\w+)\b\s*(?:[=:]\s*\"?([\w.]+)\"?)?", span)
        if not torchtune:
            yield found[1], found[2]


def settings_in_table(option, value):
    """The settings that a row of option_names.py names for a value, or for any."""
    if value is not None and option.kind == "same":
        try:
            return {text.partition("=")[0] for text in option.overrides(value)}
        except ValueError:
            return set()
    texts = " ".join([*option.values.values(), f"{option.setting}=", option.note])
    return set(re.findall(r"([\w.]+)=", texts)) - {"None"}


def disagreements(rows):
    """The options of which a row says something else than option_names.py. An option without an equivalent
    may be in a row with a setting only beside an option that has this setting.
    """
    for _, settings, (cell, _, note) in rows:
        here = {o.partition("=")[0] for _, overrides in settings for o in overrides}
        here |= set(re.findall(r"([\w.]+)=", note))
        ours = {setting.rpartition(".")[2] for setting in here}
        elsewhere = {"scripts/push.py", "loop.store"} & here  # commands, and values that are URLs
        recipe = settings[0][0].removesuffix(".py") if settings else "sft"
        equal, absent = False, []
        for name, value in named_options(cell):
            options = find_options(name, recipe=recipe)
            kinds = {option.kind for option in options}
            theirs = {s.rpartition(".")[2] for option in options for s in settings_in_table(option, value)}
            equal |= bool(theirs & ours)
            if settings and theirs and not theirs & ours and not elsewhere:
                yield name
            elif settings and kinds == {"absent"} and not theirs:
                absent.append(name)
            elif not settings and kinds == {"same"} and value is None:
                yield name
        yield from [] if equal else absent


def test_the_readmes_table_says_what_the_table_of_options_says():
    names = [name for _, _, (cell, _, _) in ROWS for name, _ in named_options(cell)]
    assert {name for name in names if not find_options(name)} == NO_OPTIONS
    assert len(names) > 100 + len(NO_OPTIONS)
    assert list(disagreements(ROWS)) == []


@pytest.mark.parametrize(
    ("option", "here"),
    [("use_galore", "optim.optimizer=muon"), ("learning_rate", ""), ("learning_rate", "optim.clip=1")],
)
def test_a_row_that_says_something_else_is_found(option, here):
    settings = [("sft.py", [here])] if here else []
    assert list(disagreements([(option, settings, (f"`{option}`", here, ""))])) == [option]


def adapter_settings():
    """The settings in the table of the section "Adapters"."""
    text = (ROOT / "configs" / "README.md").read_text().split("\n## Adapters\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [span for row in rows for span in re.findall(r"`([^`]+=[^`]*)`", row[1])]


def test_every_setting_of_the_section_on_adapters_exists(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(adapter_settings()) > 20
    for span in adapter_settings():
        load_config("configs/sft.py", shlex.split(span))


def test_a_setting_that_does_not_exist_is_found():
    with pytest.raises(ValueError, match="unknown key"):
        load_config(str(ROOT / "configs" / "sft.py"), ["optim.momentum=0.9"])
