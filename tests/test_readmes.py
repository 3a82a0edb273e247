"""READMEs are short: a third of the words that they had, sentences and cells that are read once, and names of
settings that exist.
"""

import re
import shlex

import pytest

from jaxft.cli.commands import topics_of
from jaxft.data.rows.shipped import ROOT
from jaxft.runs.settings.config import load_config
from jaxft.runs.settings.setting_names import setting_names

OTHERS = [f"{folder}/README.md" for folder in ("configs", "scripts", "scripts/bench", "jaxft", "tests")]
FENCE = re.compile(r"^```.*?^```\n?", re.MULTILINE | re.DOTALL)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def words(text):
    """The parts of a text between white space that have a letter or a digit."""
    return [part for part in text.split() if re.search(r"\w", part)]


def prose(text):
    """A README without blocks of code, pictures, marks and the addresses of links."""
    text = re.sub(r"<!--.*?-->|<img [^>]*>", "", FENCE.sub("\n", text))
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def cells(text):
    lines = [line for line in prose(text).splitlines() if line.startswith("|")]
    return [cell for line in lines for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def sentences(text):
    """The sentences of a README outside of tables; the list of contents is none."""
    lines = [line for line in prose(text).splitlines() if not line.startswith("|")]
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\d\. |#)", "\n".join(lines)):
        if not paragraph.lstrip().startswith("Contents:"):
            yield from re.split(r"(?<=[.?!])\s+(?=[^a-z])", " ".join(paragraph.split()))


def test_the_readmes_but_the_first_have_at_most_9000_words():
    counts = {name: len(words(FENCE.sub("\n", read(name)))) for name in OTHERS}
    assert sum(counts.values()) <= 9000, counts
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.parametrize("name", OTHERS)
def test_no_sentence_has_more_than_40_words_and_no_cell_more_than_60(name):
    assert not [text for text in sentences(read(name)) if len(words(text)) > 40]
    assert not [text for text in cells(read(name)) if len(words(text)) > 60]


@pytest.mark.parametrize("name", OTHERS)
def test_a_list_of_contents_links_to_every_section(name):
    (contents,) = re.findall(r"^Contents:.*?\n\n", read(name), re.MULTILINE | re.DOTALL)
    linked = re.findall(r"\(#([^)]+)\)", contents)
    sections = [topic.name for topic in topics_of(name, read(name)) if topic.text.startswith("## ")]
    assert [anchor for anchor in linked if anchor in sections] == sections


def test_a_long_sentence_and_a_long_cell_are_found():
    long = "word " * 41
    assert max(len(words(text)) for text in sentences(f"# A\n\nShort. And {long}\nend.\n")) == 43
    assert [len(words(cell)) for cell in cells(f"| a | {long} |\n")] == [1, 41]


def test_every_reference_that_a_readme_names_exists():
    topics = {topic.name for name in OTHERS for topic in topics_of(name, read(name))}
    settings = {setting for recipe in ("sft", "dpo", "grpo") for setting in setting_names(recipe)}
    settings |= {setting.rpartition(".")[2] for setting in settings}
    named = [
        word
        for name in OTHERS
        for names in re.findall(
            r"`jaxft help (\w[\w.-]*`(?:(?:, | and )`[\w.-]+`)*)", " ".join(read(name).split())
        )
        for word in re.findall(r"[\w.-]+(?=`)", names)
    ]
    assert len(named) > 10 and not {*named} - topics - settings


def adapter_settings():
    """The settings in the table of the section "Adapters"."""
    text = read("configs/README.md").split("\n## Adapters\n")[1].split("\n## ")[0]
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
