"""Where recipes, their rows and the scripts are, in a clone or an installed wheel, and how to start them."""

import os
import re
import shlex
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2]
IS_CLONE = not (PACKAGE / "shipped").is_dir()
ROOT = PACKAGE.parent if IS_CLONE else PACKAGE / "shipped"  # the folder of configs/ and scripts/

COMMAND_GROUPS = {  # title of a group -> commands of `jaxft`
    "Data and recipes": ("list", "settings", "inspect"),
    "Train": ("train", "sweep", "plan", "convert"),
    "Use a model": ("generate", "chat", "serve", "score", "evaluate"),
    "Ship a model": ("export", "push", "quantize", "combine", "extract", "extend"),
    "Study": ("report", "compare", "loss-bench", "study", "verify", "influence", "judge"),
    "Help": ("help", "env", "completion"),
}
OTHER_SCRIPTS = {"inspect": "inspect_data", "loss-bench": "loss_bench"}  # whose name is not the command's
COMMANDS = {name: OTHER_SCRIPTS.get(name, name) for group in COMMAND_GROUPS.values() for name in group}
COMMAND_OF = {script: command for command, script in COMMANDS.items()}
SCRIPT = re.compile(
    rf"(?:python )?\bscripts/({'|'.join(COMMAND_OF)})\.py\b(?: --config configs/(\w+)\.py\b)?"
)


def started_as_jaxft() -> bool:
    """Return whether to show `jaxft NAME`: jaxft is installed, or this process is that command."""
    return not IS_CLONE or Path(sys.argv[0]).name.startswith("jaxft ")


def script_command(script: str) -> str:
    """Return the command that starts a script: `jaxft generate`, or `python scripts/generate.py`."""
    if started_as_jaxft():
        return f"jaxft {COMMAND_OF[script]}"
    return f"python {shlex.quote(os.path.relpath(ROOT / 'scripts' / f'{script}.py'))}"


def own_commands(text: str) -> str:
    """Return a text with `python scripts/train.py --config configs/sft.py` replaced by `jaxft train sft`, if
    started_as_jaxft().
    """

    def command(match: re.Match[str]) -> str:
        return " ".join(["jaxft", COMMAND_OF[match[1]], *match.groups()[1:][: match[2] is not None]])

    return SCRIPT.sub(command, text) if started_as_jaxft() else text
