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
