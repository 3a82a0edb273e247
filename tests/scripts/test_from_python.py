"""The examples of "From Python" in scripts/README.md run as they are written there."""

import contextlib
import io
import os
import re
import subprocess
import sys

import jax
import pytest
from prepared import working_directory
from tiny_llama import tiny_torch, write_folder

from jaxft.data.rows.shipped import ROOT
from jaxft.train import python_api

PAGE = (ROOT / "scripts" / "README.md").read_text().partition("## From Python")[2].partition("\n## ")[0]
BLOCKS = dict(re.findall(r"<!-- python: ([\w ]+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))
NAMES = ["train", "own loss", "own loop", "flax"]


def test_the_page_has_four_examples_and_no_code_that_is_not_run():
    assert list(BLOCKS) == NAMES and PAGE.count("```python") == len(NAMES)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("page") / "base", tiny_torch())


@pytest.mark.parametrize("name", ["own loop", "flax"])
def test_an_own_loop_on_a_tiny_model_lowers_the_loss(tiny, tmp_path, monkeypatch, name):
    resolve = python_api.resolve_settings
    small = {"model": str(tiny), "general": "none", "dtype": "float32", "max_length": 64, "rank": 4}
    monkeypatch.setattr(python_api, "resolve_settings", lambda r, rows, s: resolve(r, rows, {**small, **s}))
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    printed = io.StringIO()
    numpy_rules = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with working_directory(tmp_path), contextlib.redirect_stdout(printed), numpy_rules[0], numpy_rules[1]:
        exec(compile(BLOCKS[name].replace("5e-4", "2e-2"), name, "exec"), {})
    losses = [float(text) for text in re.findall(r"^\d+ ([\d.]+)$", printed.getvalue(), re.MULTILINE)]
    assert len(losses) > 5 and losses[-1] < 0.8 * losses[0]


@pytest.mark.slow  # four programs on SmolLM2-135M
def test_the_page_runs_as_it_is_written(tmp_path):
    environ = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    for name in NAMES:
        done = subprocess.run(
            [sys.executable, "-c", BLOCKS[name]],
            cwd=tmp_path,
            env={**environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (name, done.stderr)
    assert (tmp_path / "runs/sums/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "runs/mine/adapter/adapter_model.safetensors").is_file()
