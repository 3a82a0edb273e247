"""A conversion as text: the command, and lines about what it does not express as it was."""

import shlex
from collections.abc import Iterable

from jaxft.cli.convert.draft import short
from jaxft.cli.convert.source import GivenOption
from jaxft.cli.convert.to_recipe import Conversion
from jaxft.runs.terminal import printable_line

LINE = 100  # characters of a line of the command
METHOD = {"sft": "SFT", "sft_full": "SFT", "dpo": "DPO", "kto": "KTO", "orpo": "ORPO", "simpo": "SimPO",
          "reward": "a reward model", "grpo": "GRPO", "ppo": "PPO", "online_dpo": "online DPO",
          "pretrain": "continued pre-training"}  # fmt: skip


def command(conversion: Conversion) -> str:
    """Return the command of a conversion, over several lines."""
    lines, line = [], f"jaxft train {conversion.recipe}"
    for setting in map(shlex.quote, conversion.settings):
        if len(line) + len(setting) + 3 > LINE:
            lines.append(line)
            line = "   "
        line += f" {setting}"
    return " \\\n".join([*lines, line])


def conversion_lines(conversion: Conversion) -> list[str]:
    """Return lines: the tool, how many options are expressed how, and each that is not as it was."""
    c, lines = conversion, list[str]()
    counts = [
        (len(c.same), "expressed as they are"),
        (len({option.name for option, _ in c.otherwise}), "otherwise"),
        (len({option.name for option, _ in c.lost}), "not"),
        (len(c.unneeded), "with nothing to set"),
        (len(c.empty), "empty"),
    ]
    listed = ", ".join(f"{count} {how}" for count, how in counts if count)
    lines.append(f"{c.source.file}: {METHOD[c.recipe]} of {c.source.tool}; options: {listed}")
    lines += _section("expressed otherwise", c.otherwise)
    lines += _section("not expressed", c.lost)
    if c.unneeded:
        lines.append(f"nothing to set: {', '.join(option.name for option in c.unneeded)}")
    if c.empty:
        lines.append(f"empty, so the tool's default: {', '.join(option.name for option in c.empty)}")
    if c.defaults:
        lines.append(f"set because {c.source.tool}'s defaults differ: {' '.join(c.defaults)}")
    lines += [f"note: {note}" for note in c.notes]
    return [" " * (len(line) - len(line.lstrip())) + printable_line(line) for line in lines]


def _section(title: str, pairs: Iterable[tuple[GivenOption, str]]) -> list[str]:
    """Lines of one list; options with the same remark share a line."""
    by_remark: dict[str, list[GivenOption]] = {}
    for option, remark in pairs:
        by_remark.setdefault(remark, []).append(option)
    lines = []
    for remark, options in by_remark.items():
        where = [str(option.line) for option in options if option.line is not None]
        at = f"line {', '.join(dict.fromkeys(where))} " if where else ""
        lines.append(f"  {at}{'; '.join(map(short, options))} -> {remark}")
    return [f"{title}:", *lines] if lines else []
