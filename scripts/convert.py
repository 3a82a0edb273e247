"""Convert a configuration of Axolotl, LLaMA-Factory, TRL or Unsloth to a command or a recipe.

    python scripts/convert.py qlora.yml                  # prints the command that trains the same
    python scripts/convert.py train.py --out mine.py     # writes a recipe; jaxft train mine.py
    python scripts/convert.py train.sh --devices 4       # train.sh ran on 4 devices: batch= is for all 4

FILE is Axolotl's, LLaMA-Factory's or TRL's YAML, a shell script that starts one of them (trl sft --...,
accelerate launch, llamafactory-cli train, axolotl train), or a Python file or notebook with SFTConfig(...),
DPOConfig(...), LoraConfig(...) and the like. It is read and never executed. The command goes to stdout;
stderr lists by line the options that are converted with a difference or not at all.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import COUNT, CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("file", metavar="FILE", help="a .yml, .yaml, .py, .ipynb or .sh file")
    parser.add_argument("--out", metavar="RECIPE.py", help="write a recipe in place of printing the command")
    parser.add_argument(
        "--devices", type=COUNT, metavar="N", help="devices that the tool used (default: the file's, or 1)"
    )
    return parser


def main() -> int:
    """Convert the file; print the command or write the recipe, and report on stderr."""
    from jaxft.cli.convert import conversion_text, to_recipe

    parser = make_parser()
    args = parser.parse_args()
    conversion = to_recipe.convert(to_recipe.read(Path(args.file)), args.devices)
    lines = conversion_text.conversion_lines(conversion)
    if args.out is None:
        print(conversion_text.command(conversion), flush=True)
    else:
        conversion_text.write_recipe(Path(args.out), conversion, lines)
        lines.append(f"wrote {args.out}; jaxft train {args.out}")
    print("\n".join(lines), file=sys.stderr)
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
