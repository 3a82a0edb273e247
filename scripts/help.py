"""Print the documentation: all topics, a section, or the reference of a setting.

    python scripts/help.py                     # all topics
    python scripts/help.py rows-for-sft        # a topic
    python scripts/help.py llama.cpp           # the topics with these words
    python scripts/help.py warmup              # a setting, a section such as optim, or a function such as ipo
    python scripts/help.py train               # a command's arguments
    python scripts/help.py --all               # the whole reference: commands, recipes, settings, functions

The topics are the sections of the README files. The reference is read from the docstrings.
"""

import argparse
import sys
import textwrap
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

MOST = 12  # topics that are listed, the most relevant first


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("topic", nargs="*", metavar="TOPIC", help="a topic, words, a setting, or a command")
    parser.add_argument("--all", action="store_true", help="print the whole reference as one page")
    return parser


def overview() -> str:
    """Return all topics by file."""
    from jaxft.cli import commands
    from jaxft.data.rows.shipped import own_commands

    lines = [
        own_commands("`python scripts/help.py NAME` prints a section of the documentation, the reference of"),
        "a setting or a loss, or the arguments of a command. Sections:",
    ]
    known = commands.topics()
    for file, title in commands.DOCUMENTS.items():
        names = [topic.name for topic in known if topic.file == file and topic.text.startswith("##")]
        wrapped = textwrap.wrap("  ".join(names), 106, break_on_hyphens=False)
        lines += ["", title, *(f"  {line}" for line in wrapped)]
    return "\n".join(lines)


def show(text: str) -> None:
    """Print Markdown; on a terminal with its tables and headings laid out."""
    from jaxft.cli.commands import with_topics
    from jaxft.data.rows.shipped import own_commands

    text = own_commands(with_topics(text))
    if not sys.stdout.isatty():
        print(text)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console(width=min(Console().width, 120)).print(Markdown(text))


def is_in_reference(word: str) -> bool:
    """Return whether a word is a recipe, a setting, a section, a function with a short name, or an option of
    another tool; without loading jax.
    """
    from jaxft import annotations
    from jaxft.data.rows.shipped import ROOT
    from jaxft.runs.settings.setting_names import advice, setting_names

    recipes = [file.stem for file in (ROOT / "configs").glob("*.py")]
    names = {name for recipe in recipes for name in setting_names(recipe)}
    return (
        word in recipes
        or any(word in table for table in annotations.FUNCTION_TABLES.values())
        or any(word in (name, name.rpartition(".")[2]) or name.startswith(f"{word}.") for name in names)
        or advice(word) is not None
    )


def main() -> int:
    """Print the topics, or one of them."""
    args = make_parser().parse_args()
    words = args.topic
    from jaxft.cli import commands
    from jaxft.data.rows.shipped import COMMANDS

    if args.all:
        from jaxft.cli import help_page

        show(help_page.page())
        return 0
    if not words:
        print(overview())
        return 0
    if len(words) == 1 and words[0] in COMMANDS:
        commands.run_script(words[0], ["--help"])
        return 0
    known = commands.topics()
    topics = commands.find_topics(words, known)
    if len(words) == 1 and is_in_reference(words[0]) and [t.name for t in topics] != words:
        from jaxft.cli import help_page

        print(help_page.described(words[0]))
        if topics:
            print(f"\nTopics: {', '.join(topic.name for topic in topics[:3])}")
        return 0
    if not topics:
        from jaxft.cli import help_page

        near = ", ".join(help_page.near_names(" ".join(words)))
        raise ValueError(
            f"no topic has {' '.join(words)!r}{f'; near: {near}' if near else ''}; scripts/help.py lists all"
        )
    if len(topics) == 1:
        show(topics[0].text)
        if len(words) == 1 and is_in_reference(words[0]):  # a topic has the name of a setting
            from jaxft.cli import help_page

            print(f"\n{help_page.described(words[0])}")
        return 0
    shown = topics[:MOST]
    width = max(len(topic.name) for topic in shown)
    print(f"{len(topics)} topics have {' '.join(words)!r}{', first' * (topics != shown)}:")
    print("\n".join(f"  {topic.name:{width}}  {topic.title} ({topic.file})" for topic in shown))
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
