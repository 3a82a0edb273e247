"""The wheel in an empty environment of every supported Python that is at hand, used from an empty folder."""

import os
import re
import shutil
import subprocess
import tomllib
from functools import partial
from pathlib import Path

import pytest

from jaxft.data.rows.shipped import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = [line.split()[-1] for line in PROJECT["classifiers"] if re.search(r"3\.\d+$", line)]


def interpreter(version):
    """The path of a Python of this version with venv, None without one."""
    found = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    found += [path for path in [shutil.which(f"python{version}")] if path]
    for path in map(str, found):
        check = f"import sys, venv, ensurepip; assert sys.version.startswith('{version}.')"
        if subprocess.run([path, "-c", check], capture_output=True).returncode == 0:
            return path
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    backend = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return folder / backend.build_wheel(str(folder))


@pytest.mark.slow  # a minute to install, a minute to train, for each
@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_works_in_an_empty_environment_from_an_empty_folder(wheel, tmp_path, version):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} with venv on this machine")
    folder = tmp_path / "empty"
    folder.mkdir()
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "JAXFT_CACHE") if name in os.environ}
    run = partial(subprocess.run, cwd=folder, env=environ, capture_output=True, text=True, timeout=900)
    assert run([python, "-m", "venv", tmp_path / "venv"]).returncode == 0
    pip = [tmp_path / "venv" / "bin" / "pip", "install", "-q", "-c", ROOT / ".github" / "constraints.txt"]
    installed = run([*pip, wheel])
    assert installed.returncode == 0, installed.stderr

    def jaxft(*argv):
        done = run([tmp_path / "venv" / "bin" / "jaxft", *argv])
        return done.returncode, done.stdout, done.stderr

    assert jaxft("--version")[:2] == (0, f"jaxft {wheel.name.split('-')[1]}\n")
    assert "jaxft COMMAND" in jaxft("--help")[1] and "llama31_8b_sft" in jaxft("list")[1]
    code, out, err = jaxft("env")
    assert code == 0 and f"python:             {version}." in out and "installed wheel" in out, err
    code, _, err = jaxft("train", "sftt")
    assert code == 1 and err.startswith("error: sftt: no recipe") and err.count("\n") == 1

    code, out, err = jaxft("train", "sft", "loop.steps=2", "held_out=0.02", "samples=1", "sampling.max_new=8")
    assert code == 0 and "jaxft generate --run runs/sft" in out, (out, err)
    assert (folder / "runs/sft/adapter/adapter_model.safetensors").is_file()
    code, out, err = jaxft("generate", "--run", "runs/sft", "--prompt", "Who are you?", "--max-new", "4")
    assert code == 0 and "--- completion" in out, err
    assert [path.name for path in folder.iterdir()] == ["runs"]
