"""The texts of `jaxft help` and `jaxft list`: sections of the README files and docstrings of the recipes, in
a clone or an installed wheel.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from jaxft.data.rows.shipped import IS_CLONE, PACKAGE, ROOT

# File, from the root of the clone -> its subject. The wheel has README.md as its description.
DOCUMENTS = {
    "README.md": "Overview",
    "configs/README.md": "Recipes and settings",
    "scripts/README.md": "Commands",
    "scripts/bench/README.md": "Measurements",
    "jaxft/README.md": "The code",
}
HARDWARE_LINE = re.compile(r"^Hardware: ([^;]+); ([^;]+)\.$")


class Topic(NamedTuple):
    """A section of a README file: heading, name in links, file, and text with the heading."""

    title: str
    name: str
    file: str
    text: str


def read_document(file: str) -> str:
    """Return the text of one of DOCUMENTS."""
    if file == "README.md" and not IS_CLONE:
        return (metadata.distribution("jaxft").read_text("METADATA") or "").partition("\n\n")[2]
    path = PACKAGE / "README.md" if file == "jaxft/README.md" else ROOT / file
    return path.read_text(encoding="utf-8")


def topics() -> list[Topic]:
    """Return all sections, in the order of DOCUMENTS."""
    return [topic for file in DOCUMENTS for topic in topics_of(file, read_document(file))]


def topics_of(file: str, text: str) -> Iterator[Topic]:
    """Yield the sections of a Markdown file; a section contains those below it."""
    code = [match.span() for match in re.finditer(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)]
    headings = [
        match
        for match in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE)
        if not any(start <= match.start() < end for start, end in code)
    ]
    for place, heading in enumerate(headings):
        following = (h.start() for h in headings[place + 1 :] if len(h[1]) <= len(heading[1]))
        end = len(text) if len(heading[1]) == 1 else next(following, len(text))
        yield Topic(heading[2], link_name(heading[2]), file, text[heading.start() : end].strip())


def link_name(title: str) -> str:
    """Return the name of a heading in links, as GitHub makes it.

    >>> link_name("Deploy to llama.cpp, Ollama and vLLM")
    'deploy-to-llamacpp-ollama-and-vllm'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def with_topics(text: str) -> str:
    """Return Markdown whose links to sections name topics, without pictures and links to other files.

    >>> with_topics("see [rows](configs/README.md#rows-for-sft) in [the code](jaxft/loop.py)")
    'see rows (`jaxft help rows-for-sft`) in the code'
    """
    text = re.sub(r"<!--.*?-->\n?|<img [^>]*>[ \n]?", "", text)
    text = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)#]*#([\w-]+)\)", r"\1 (`jaxft help \2`)", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


def find_topics(words: Sequence[str], known: Sequence[Topic]) -> list[Topic]:
    """Return the topic of this name; else the topics with all words in their titles, the shortest title
    first; else in their texts, the densest first. A word matches the beginning of words.
    """
    named = [topic for topic in known if topic.name == link_name(" ".join(words))]
    if named:
        return named[:1]

    patterns = [re.compile(rf"\b{re.escape(word)}", re.IGNORECASE) for word in words]
    titled = [topic for topic in known if all(p.search(topic.title) for p in patterns)]
    if titled:
        return sorted(titled, key=lambda topic: len(topic.title))

    def weight(topic: Topic) -> float:
        """How often the rarest word is in the text, for its length."""
        return min(len(p.findall(topic.text)) for p in patterns) / len(topic.text) ** 0.5

    found = [topic for topic in known if topic.text[:2] == "##" and weight(topic)]
    return sorted(found, key=weight, reverse=True)


class ShippedRecipe(NamedTuple):
    """A recipe's name, its docstring's first sentence, and the parts of its line `Hardware: WHAT; TIME.`"""

    recipe: str
    trains: str
    hardware: str
    time: str


def read_recipe(file: Path) -> ShippedRecipe:
    """Read a recipe's docstring. Raises ValueError if it has no first sentence or no line of hardware."""
    paragraphs = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n\n")
    found = next(
        (match for text in paragraphs if (match := HARDWARE_LINE.match(" ".join(text.split())))), None
    )
    first = " ".join(paragraphs[0].split())
    if not found or not first.endswith("."):
        raise ValueError(f"{file}: its docstring needs a first sentence and a line `Hardware: WHAT; TIME.`")
    return ShippedRecipe(file.stem, first.removesuffix("."), found[1], found[2])


def shipped_recipes() -> list[ShippedRecipe]:
    """Return the recipes that ship with jaxft, those for CPUs first."""
    recipes = [read_recipe(file) for file in sorted((ROOT / "configs").glob("*.py"))]
    return sorted(recipes, key=lambda recipe: "CPU" not in recipe.hardware)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    >>> print(table(["name", "is"], [["`a`", "b|c"]]))
    | name | is |
    | --- | --- |
    | `a` | b\\|c |
    """
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
