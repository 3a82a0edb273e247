"""Print the code that makes a shell complete commands, recipes, settings and their values.

    eval "$(jaxft completion bash)"              # in ~/.bashrc
    eval "$(jaxft completion zsh)"               # in ~/.zshrc
    jaxft completion fish | source               # in ~/.config/fish/config.fish

The code completes the command `jaxft`, which `pip install jaxft` provides.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

SHELLS = ("bash", "zsh", "fish", "powershell")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("shell", choices=SHELLS, help="your shell")
    return parser


def main() -> int:
    """Print the code for a shell."""
    args = make_parser().parse_args()
    import argcomplete

    print(argcomplete.shellcode(["jaxft"], shell=args.shell))
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
