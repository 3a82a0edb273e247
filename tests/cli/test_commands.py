"""The command `jaxft`: it runs every script with the same arguments, from a clone and from the wheel, and
completes commands, recipes and knobs.
"""

import json
import os
import re
import subprocess
import sys
import typing
import zipfile
from pathlib import Path

import pytest

from jaxft import annotations
from jaxft.cli import commands
from jaxft.cli.commands import shipped_recipes
from jaxft.data.rows import shipped
from jaxft.data.rows.mixture import parse_sources
from jaxft.data.rows.shipped import COMMANDS, ROOT
from jaxft.runs import run_texts, terminal
from jaxft.runs.settings import config, setting_names, setting_values, settings_list
from jaxft.train.recipes import SHIPPED

SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")}
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def jaxft(monkeypatch, capsys, *argv):
    """(exit code, stdout, stderr) of `jaxft ARGV` in this process."""
    monkeypatch.setattr(sys, "argv", ["jaxft", *argv])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(terminal, "quiet", lambda: None)
    monkeypatch.setattr(terminal, "outlive_console", lambda: None)
    capsys.readouterr()
    try:
        code = commands.main()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_every_script_is_a_command_and_help_shows_it_in_a_line(monkeypatch, capsys):
    assert sorted(COMMANDS.values()) == sorted(SCRIPTS)
    code, out, _ = jaxft(monkeypatch, capsys, "--help")
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line.startswith("  ")]
    titles = [line for line in out.splitlines() if line[:1].isupper() and line.endswith(":")]
    assert titles == [f"{title}:" for title in shipped.COMMAND_GROUPS]
    assert code == 0 and [name for name, _ in lines] == list(COMMANDS)
    assert all(10 < len(text) < 100 and "scripts/" not in text for _, text in lines)
    assert jaxft(monkeypatch, capsys)[1] == out


def test_a_command_runs_its_script_with_its_arguments(monkeypatch, capsys):
    code, out, _ = jaxft(monkeypatch, capsys, "list", "--json")
    assert code == 0 and [json.loads(line)["recipe"] for line in out.splitlines()].count("sft") == 1
    code, out, _ = jaxft(monkeypatch, capsys, "list", "--source", "sft")
    assert code == 0 and out == (ROOT / "configs" / "sft.py").read_text()
    code, out, _ = jaxft(monkeypatch, capsys, "train", "sft", "--help")
    assert code == 0 and "usage: jaxft train " in out and "jaxft train sft quant=nf4" in out
    assert "lr=" in out and "scripts/" not in out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["trian"], "near: train"),
        (["merge"], "near: export, which merges an adapter"),
        (["generate", ".", "--prompt", "a"], "unrecognized argument .; write --run .;"),
        (["export", ".", "--out", "a"], "unrecognized argument .; write --run .;"),
        (["--frob"], "'--frob'"),
        (["generate"], "--prompt"),
        (["plan", "sft"], "--devices"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_help(monkeypatch, capsys, argv, word):
    code, out, err = jaxft(monkeypatch, capsys, *argv)
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("error: ")
    assert word in err and err.endswith("--help\n")


def test_a_recipe_is_named_by_its_name_or_its_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        setting_values.find_recipe("sft")
        == setting_values.find_recipe("configs/sft.py")
        == ROOT / "configs" / "sft.py"
    )
    (tmp_path / "sft").mkdir()  # a folder is no recipe
    assert setting_values.find_recipe("sft") == ROOT / "configs" / "sft.py"
    (tmp_path / "sft.py").write_text("def config(): pass")
    assert setting_values.find_recipe("sft.py") == tmp_path / "sft.py"
    with pytest.raises(FileNotFoundError, match=r"^sfd: .*near: sft"):
        setting_values.find_recipe("sfd")


def test_commands_are_named_as_the_user_starts_them(monkeypatch):
    text = "python scripts/train.py --config configs/sft.py lr=1, scripts/inspect_data.py, scripts/bench/x.py"
    assert shipped.own_commands(text) == text
    assert shipped.script_command("generate").startswith("python ")
    monkeypatch.setattr(sys, "argv", ["jaxft train"])
    assert shipped.own_commands(text) == "jaxft train sft lr=1, jaxft inspect, scripts/bench/x.py"
    nothing = run_texts.Evaluation(metrics={}, samples=[])
    lines = run_texts.result_lines(Path("runs/a"), Path("runs/a/adapter"), nothing, nothing, [])
    assert lines[-1] == 'jaxft generate --run runs/a --prompt "..."'
    lines = run_texts.result_lines(Path("runs/a"), Path("a"), nothing, nothing, [], "evaluate")
    assert lines[-1] == "jaxft evaluate --run runs/a --file ROWS --out PROBABILITIES"


# Recipes


def test_every_recipe_says_what_it_needs_and_the_readme_names_it():
    recipes = shipped_recipes()
    readme = (ROOT / "configs" / "README.md").read_text()
    assert sorted(recipe.recipe for recipe in recipes) == sorted(RECIPES)
    assert all("GB" in recipe.hardware and f"`{recipe.recipe}`" in readme for recipe in recipes)


@pytest.mark.parametrize("name", ["README.md", "scripts/README.md", "configs/README.md"])
def test_the_commands_in_the_readmes_exist_and_so_do_their_recipes(name):
    text = (ROOT / name).read_text()
    found = re.findall(r"(?:`|^|\| `)jaxft ([\w-]+) (\w[\w-]*)", text, re.MULTILINE)
    found += re.findall(r"^\| `([a-z-]+) ([\w-]+)", text, re.MULTILINE) if name == "scripts/README.md" else []
    assert found
    for command, word in found:
        assert command in COMMANDS, command
        if command in ("train", "inspect", "sweep", "plan"):
            assert word in (*RECIPES, "my_recipe"), word


def test_a_recipe_in_place_of_a_command_proposes_train(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxft", "sft", "data=a.jsonl"])
    monkeypatch.delenv("_ARGCOMPLETE", raising=False)
    assert commands.main() == 2
    assert "no command 'sft'; near: train sft, as sft is a recipe" in capsys.readouterr().err


# Completion


def values_of(kind):
    """The values that an annotation lists, by its type: what setting_sources.choices reads from source."""
    found = [*setting_values.short_names(kind), *annotations.choices_of(kind)]
    for member in setting_values.union_members(kind):
        origin, args = typing.get_origin(member), typing.get_args(member)
        if member is not kind and (member is bool or origin is not None):
            found += values_of(member)
        elif member is type(None):
            found.append("none")
        elif member is bool:
            found += ["true", "false"]
        elif origin is typing.Literal:
            found += map(str, args)
        elif origin is tuple:
            found += values_of(args[0])
    return list(dict.fromkeys(found))


def kind_of(run, name):
    """The annotation of a dotted field."""
    *sections, last = name.split(".")
    for section in sections:
        run = getattr(run, section)
    return None if run is None else config.type_hints(type(run))[last]


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_completed_are_the_recipe_s_settings_and_their_values(name):
    file, run = ROOT / "configs" / f"{name}.py", config.load_config(name, [])
    knobs, fields = setting_names.knobs(file), setting_names.dotted_fields(file)
    assert [knob.name for knob in knobs] == list(config.recipe_knobs(name))
    assert [field.name for field in fields] == [s.name for s in settings_list.settings_of(run)]
    for field in fields:
        if kind := kind_of(run, field.name):
            assert setting_names.choices(field.kind) == values_of(kind), field.name
    for knob, known in zip(knobs, config.recipe_knobs(name).values(), strict=True):
        if knob.kind is not None:
            assert setting_names.choices(knob.kind) == values_of(known.kind), knob.name


COMPLETIONS = {
    "jaxft tr": ["train "],
    "jaxft train sft_": ["sft_full "],
    "jaxft train sft lr=1 ba": ["batch="],
    "jaxft train --config dpo be": ["beta="],
    "jaxft train sft data=ro": ["rows.jsonl "],
    "jaxft train sft optim.warm": ["optim.warmup="],
    "jaxft train sft optim.layerwise=": ["true", "false"],
    "jaxft train dpo loss=ip": ["ipo "],
    "jaxft train sft data.packing=w": ["wrapped "],
    "jaxft train dpo data.too_long=dr": ["drop "],
    "jaxft generate --run ": ["runs/a "],
    "jaxft generate --quant nf": ["nf4 "],
    "jaxft train min": ["mine.py "],
    "jaxft train --config configs/dpo.py be": ["beta="],
    "jaxft train sft full=": [""],
    "jaxft sweep dpo --over be": ["beta="],
    "jaxft list --source sft_": ["sft_full "],
    "jaxft help warmu": ["warmup "],
    "jaxft inspect sft data=ro": ["rows.jsonl "],
    "jaxft inspect --kind pa": ["pairs "],
}


COMPLETE = """
import os, sys
sys.modules["jax"] = None
from jaxft.cli.commands import main
for number, line in enumerate(sys.argv[1:]):  # one process for each, as a shell starts it
    os.environ |= {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    os.environ["_ARGCOMPLETE_STDOUT_FILENAME"] = f"found-{number}"
    if os.fork() == 0:
        sys.argv = ["jaxft"]
        main()
    os.wait()
"""


def test_commands_recipes_knobs_runs_and_files_are_completed_without_jax(tmp_path):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    for name in ("runs/a/config.json", "rows.jsonl", "mine.py"):
        (tmp_path / name).write_text("")
    shell = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:", "COMP_TYPE": "9", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-c", COMPLETE, *COMPLETIONS]
    subprocess.run(command, cwd=tmp_path, env=os.environ | shell, timeout=60, check=True)
    for number, (line, expected) in enumerate(COMPLETIONS.items()):
        assert (tmp_path / f"found-{number}").read_text().split("\n") == expected, line


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    backend = pytest.importorskip("hatchling.build")
    folder, before = tmp_path_factory.mktemp("wheel"), Path.cwd()
    os.chdir(ROOT)
    try:
        return folder / backend.build_wheel(str(folder))
    finally:
        os.chdir(before)


def test_the_wheel_has_the_package_the_recipes_their_rows_and_the_scripts_only(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    used = {part for ref in SHIPPED for part in (ref, ref.replace(".jsonl", "_held_out.jsonl"))}
    for name in RECIPES:
        run = config.load_config(name, [])
        named = [str(ref) for ref in (run.data.train, run.data.held_out, run.general)]
        used |= {source.ref for ref in named if ref.startswith("configs/") for source in parse_sources(ref)}
        used |= set(re.findall(r"data=(configs/data/[\w.]+)", (ROOT / f"configs/{name}.py").read_text()))
    expected = {file for file in tracked if re.match(r"jaxft/.*\.(py|txtpb|html|js|css|json)$", file)}
    expected |= {
        f"jaxft/shipped/{file}"
        for file in tracked
        if re.match(r"(configs|scripts)/(examples/|launch/)?[\w.]+$", file)
    }
    expected |= {f"jaxft/shipped/{file}" for file in used}
    expected |= {"jaxft/README.md", "jaxft/shipped/scripts/bench/README.md"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert wheel.stat().st_size < 2e6


def test_the_wheels_description_has_no_relative_link(wheel):
    files = zipfile.ZipFile(wheel)
    (name,) = [name for name in files.namelist() if name.endswith("/METADATA")]
    text = files.read(name).decode()
    assert "## Your own loss" in text and "all families (`jaxft help models`)" in text
    assert not re.search(r"\]\((?!https?:)", text) and "<img" not in text


INSTALLED = """
import sys
from pathlib import Path
from jaxft.data.rows.shipped import IS_CLONE, ROOT, own_commands
from jaxft.runs import versions_and_devices
from jaxft.cli import commands
from jaxft.runs.settings import config
from jaxft.data.rows.dataset_rows import read_rows
assert not IS_CLONE and ROOT.parent.name == "jaxft" and versions_and_devices.commit() is None
run = config.load_config("sft", [])
assert read_rows(run.data.train) and run.objective.__module__ == "jaxft.objectives.sft"
loss = config.load_config("dpo", ["loss=configs/examples/my_losses.py:mine"])
assert own_commands("scripts/train.py") == "jaxft train"
assert {"models", "rows-for-sft", "what-fits-where"} <= {topic.name for topic in commands.topics()}
assert versions_and_devices.bug_report()["jaxft"]["installed"] == "wheel"
sys.argv = ["jaxft", "train", "sfd"]
commands.main()
"""


@pytest.mark.slow
def test_the_wheel_has_all_that_its_commands_need_from_an_empty_folder(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", INSTALLED]
    done = subprocess.run(
        command, cwd=tmp_path / "empty", env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and done.stderr.startswith(
        "error: sfd: no recipe has this name; near: sft"
    ), done.stderr
    assert done.stderr.count("\n") == 1 and not list((tmp_path / "empty").iterdir())
