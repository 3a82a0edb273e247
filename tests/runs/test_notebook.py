"""The notebook for Colab and Kaggle runs from top to bottom, with a few steps instead of a whole run."""

import json
import os
import re
import sys

import pytest

from jaxft.data.rows.shipped import COMMANDS, ROOT

NOTEBOOK = ROOT / "configs" / "examples" / "quickstart.ipynb"
TINY = {"loop.steps": 2, "held_out": 0.02, "samples": 1, "sampling.max_new": 8, "general": None}


def cells(kind):
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_stored_without_outputs_and_names_commands_and_recipes_that_exist():
    lines = [line for cell in cells("code") for line in cell["source"]]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells("code"))
    started = [line.removeprefix("!jaxft ").split() for line in lines if line.startswith("!jaxft ")]
    assert {"env", "inspect"} <= {name for name, *_ in started} <= COMMANDS.keys()
    recipes = [recipe for name, recipe, *_ in (words for words in started if words[0] == "inspect")]
    called = re.findall(r'jaxft\.train\("(\w+)"', "".join(lines))
    assert called == ["sft", "dpo", "sft"]
    for recipe in recipes + called:
        assert (ROOT / "configs" / f"{recipe}.py").is_file(), recipe


@pytest.mark.slow  # three runs of two steps, and their completions
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    command = tmp_path / "bin" / "jaxft"
    command.parent.mkdir()
    code = "from jaxft.cli.commands import main\nraise SystemExit(main())\n"
    command.write_text(f"#!{sys.executable}\n{code}")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS")  # one device, as on Colab
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = f"settings = {TINY!r}"
    folder = tmp_path / "work"
    folder.mkdir()
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    printed = [out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ())]
    wrong = [text for text in printed if re.search(r"^(error:|Traceback|usage:)", text, re.MULTILINE)]
    assert not wrong
    for name in ("sft", "sft_dpo", "mine"):
        assert (folder / "runs" / name / "adapter" / "adapter_model.safetensors").is_file(), name
    shown = [
        out.data["text/plain"] for cell in notebook.cells for out in cell.get("outputs", ()) if "data" in out
    ]
    assert any("eval_rewards/accuracies" in text for text in shown) and any("exact" in text for text in shown)
