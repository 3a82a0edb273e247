"""`jaxft help` prints every section of the README files, and links and errors name sections that exist."""

import re
import sys

import pytest
from scripts_in_process import call

from jaxft import annotations
from jaxft.cli import commands
from jaxft.cli.commands import DOCUMENTS, find_topics, topics_of, with_topics
from jaxft.data.rows.shipped import COMMANDS, ROOT
from jaxft.runs.settings.setting_names import setting_names

TEXT = """# A
one
## B, c.d
two
```
# no heading
```
### E
three
## F
"""


def test_a_section_ends_at_the_next_heading_of_its_level_outside_of_code():
    found = {topic.name: topic.text for topic in topics_of("a.md", TEXT)}
    assert list(found) == ["a", "b-cd", "e", "f"] and found["a"] == TEXT.strip()
    assert found["b-cd"] == "## B, c.d\ntwo\n```\n# no heading\n```\n### E\nthree"
    assert found["e"] == "### E\nthree" and found["f"] == "## F"


def test_links_to_sections_become_topics_and_others_plain_text():
    text = "[a](x/README.md#b-c) [d](#e) [f](g.py) [h](https://i#j) <!-- ci: k -->\n<img src=l.png> m"
    assert with_topics(text) == "a (`jaxft help b-c`) d (`jaxft help e`) f [h](https://i#j) m"


@pytest.mark.parametrize("file", DOCUMENTS)
def test_every_link_to_a_section_names_one_that_exists(file):
    names = {name: {topic.name for topic in commands.topics() if topic.file == name} for name in DOCUMENTS}
    text = commands.read_document(file)
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        target = (ROOT / file).parent.joinpath(path).resolve() if path else ROOT / file
        assert anchor in names[target.relative_to(ROOT).as_posix()], (path, anchor)


def test_every_topic_that_an_error_names_exists():
    sources = [*(ROOT / "jaxft").rglob("*.py"), *(ROOT / "configs").glob("*.py")]
    named = {name for file in sources for name in re.findall(r"scripts/help\.py ([\w-]+)", file.read_text())}
    assert len(named) >= 2 and named <= {topic.name for topic in commands.topics()}
    assert not [file for file in sources if "README.md#" in file.read_text() and file.stem != "commands"]


def test_help_lists_all_topics_and_prints_one(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "help")
    words = set(out.split())
    assert code == 0 and {topic.name for topic in commands.topics() if topic.text[:2] == "##"} <= words
    for argv in (["rows-for-sft"], ["Rows", "for", "SFT"]):
        code, out, _ = call(monkeypatch, capsys, "help", *argv)
        assert code == 0 and out.startswith("## Rows for SFT\n") and "](" not in out
    code, out, err = call(monkeypatch, capsys, "help", "zyx")
    assert code == 1 and not out and err.startswith("error: no topic has 'zyx'")


def test_words_find_topics_by_title_and_then_by_text():
    known = list(topics_of("a.md", TEXT))
    assert [t.name for t in find_topics(["c.d"], known)] == ["b-cd"]
    assert [t.name for t in find_topics(["thr"], known)] == ["e", "b-cd"]
    assert find_topics(["hree"], known) == []


def test_found_topics_are_ranked_the_most_relevant_first_and_limited(monkeypatch, capsys):
    text = "# A\n## Long\nwandb " + "other " * 300 + "\n## Trackers\nwandb and wandb\n## W in brief\n## W\n"
    known = list(topics_of("a.md", text))
    assert [t.title for t in find_topics(["wandb"], known)] == ["Trackers", "Long"]
    assert [t.title for t in find_topics(["w"], known[3:])] == ["W"]  # its name
    assert [t.title for t in find_topics(["brief"], known)] == ["W in brief"]
    code, out, _ = call(monkeypatch, capsys, "help", "which")
    assert code == 0 and ", first:\n" in out and len(out.splitlines()) == 13


def test_a_command_is_answered_with_its_arguments(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    code, out, _ = call(monkeypatch, capsys, "help", "export")
    assert code == 0 and "--gguf" in out


def test_a_setting_a_knob_and_a_loss_are_answered_with_their_reference(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "help", "optim.warmup")
    assert code == 0 and out.startswith("optim: Optimizer settings\n  optim.warmup=0.05 ")
    assert "float, at least 0" in out
    code, out, _ = call(monkeypatch, capsys, "help", "neftune")  # a knob of SFT alone
    assert code == 0 and out.startswith("Knob of sft, sft_full, ") and "neftune=0.0" in out
    code, out, _ = call(monkeypatch, capsys, "help", "ipo")
    assert code == 0 and "jaxft.objectives.losses.preference_losses:ipo" in out and "1 / (2 beta)" in out
    assert "preferences" in out.partition("\nTopics: ")[2]


def test_every_meaning_of_a_name_is_listed_with_its_recipes(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "help", "beta")
    assert code == 0 and "Knob of dpo, kto, online_dpo, llama31_8b_dpo, qwen3_8b_dpo\n  beta=0.1 " in out
    assert "\n\nKnob of grpo, " in out and "factor of a KL penalty" in out and "\n\nKnob of simpo\n" in out
    code, out, _ = call(monkeypatch, capsys, "help", "eps")
    assert code == 0 and out.startswith("Knob of ppo\n  eps=none ") and "\n  optim.eps=none " in out
    code, out, _ = call(monkeypatch, capsys, "help", "sft")
    assert code == 0 and out.startswith("sft is a recipe: ")


def test_a_section_and_an_option_of_another_tool_are_answered(monkeypatch, capsys):
    for field in ("mesh.fsdp", "optim.clip", "sampling.top_p", "data.rules.scale"):
        code, out, _ = call(monkeypatch, capsys, "help", field.rpartition(".")[0])
        assert code == 0 and f"\n  {field}=" in out, field
    code, out, _ = call(monkeypatch, capsys, "help", "learning_rate")
    assert code == 0 and out.startswith("learning_rate is lr here") and "\n  lr=" in out
    code, out, err = call(monkeypatch, capsys, "help", "batchsize")
    assert code == 1 and not out and "near: batch_size" in err


def test_the_reference_has_every_setting_recipe_function_and_command(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "help", "--all")
    first = set(re.findall(r"^\| `([^`]+)` \|", out, re.MULTILINE))
    recipes = {path.stem for path in (ROOT / "configs").glob("*.py")}
    fields = {name for recipe in recipes for name in setting_names(recipe)}
    functions = {*annotations.PREFERENCE_LOSSES, *annotations.REWARDS, *annotations.ADVANTAGES}
    assert code == 0 and not (fields | {*COMMANDS, *functions}) - first
    assert recipes <= set(re.findall(r"^### (\w+)$", out, re.MULTILINE))
    assert "`centred` | `r - mean of the group`: Dr. GRPO" in out and "with its declared facts" not in out
    assert not re.findall(r"^\| `(\w+)` \|.*\|  \|$", out, re.MULTILINE), "knobs without a comment"
    assert all(line.count(" | ") in (1, 2, 3) for line in out.splitlines() if line.startswith("| `"))
