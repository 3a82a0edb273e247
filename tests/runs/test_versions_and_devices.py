"""env.json keeps every start of a run, and a later start reports what has changed."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from jaxft.runs import run_record, versions_and_devices


def test_env_json_has_every_start_and_changes_are_reported(tmp_path, monkeypatch):
    assert run_record.write_record(tmp_path, {"a": 1}) == []
    assert run_record.write_record(tmp_path, {"a": 1}, step=2) == []
    real = metadata.version
    monkeypatch.setattr(
        versions_and_devices.metadata, "version", lambda name: "0.0.1" if name == "tokenizers" else real(name)
    )
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    lines = run_record.write_record(tmp_path, {"a": 2}, step=5)
    assert f"tokenizers: {real('tokenizers')} -> 0.0.1" in lines
    assert any(line.startswith("XLA_FLAGS: ") and line.endswith("deterministic_ops=true") for line in lines)
    assert len(lines) == 2
    recorded = json.loads((tmp_path / "env.json").read_text())
    starts = [*recorded["earlier"], recorded]
    assert [start["step"] for start in starts] == [0, 2, 5]
    assert [start["packages"]["tokenizers"] for start in starts] == [real("tokenizers")] * 2 + ["0.0.1"]


@pytest.mark.parametrize(
    "name",
    ["jax", "jaxlib", "numpy", "transformers", "tokenizers", "safetensors", "gguf", "jinja2", "datasets",
     "tensorstore", "ml_dtypes", "optax", "flax", "orbax-checkpoint"],
)  # fmt: skip
def test_the_versions_of_all_that_decides_numbers_are_recorded(name):
    assert versions_and_devices.versions()["packages"][name] == metadata.version(name)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "\xff"])
def test_a_damaged_env_json_is_reported_and_written_again(tmp_path, text):
    (tmp_path / "env.json").write_text(text, encoding="latin-1")
    (line,) = run_record.write_record(tmp_path, {}, step=3)
    assert "env.json" in line and "lost" in line
    assert json.loads((tmp_path / "env.json").read_text())["earlier"] == []


def test_devices_are_compared_by_kind_and_number():
    before = {"devices": ["cpu"] * 2, "processes": 1}
    assert versions_and_devices.environment_changes(before, before) == []
    now = {"devices": ["H100"], "processes": 2}
    lines = versions_and_devices.environment_changes(before, now)
    assert lines == ["devices: 2 x cpu -> 1 x H100", "processes: 1 -> 2"]


def test_a_package_inside_another_repository_has_no_commit_of_its_own(monkeypatch):
    own = versions_and_devices.commit()
    assert own is None or len(own) == 40
    monkeypatch.setattr(
        versions_and_devices, "ROOT", versions_and_devices.ROOT / "configs"
    )  # git finds the repository above
    assert versions_and_devices.commit() is None


@pytest.mark.parametrize("broken", [False, True])
def test_a_bug_report_has_versions_devices_memory_and_kernels_even_if_no_backend_starts(monkeypatch, broken):
    def fail():
        raise RuntimeError("Unable to initialize backend 'cuda':\nno driver")

    if broken:
        monkeypatch.setattr(versions_and_devices.jax, "devices", fail)
    found = versions_and_devices.bug_report()
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["jaxft"] and found["memory_gib"]["total"] > 0.5 and found["cpu"]["cores"] > 0
    lines = "\n".join(versions_and_devices.report_lines(found))
    assert f"jax {metadata.version('jax')}" in lines and re.search("XLA_FLAGS .*--xla_force", lines)
    if broken:
        assert "Unable to initialize backend 'cuda': no driver" in lines
    else:
        assert found["devices"] == {"cpu": 8} and found["attention"]["bfloat16"] == "flash"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="needs a machine without an NVIDIA GPU")
def test_a_gpu_that_jax_does_not_see_is_one_line():
    code = """
import jax
from jaxft.runs.versions_and_devices import bug_report
from jaxft.runs import terminal
print(bug_report()["device_error"])
raise SystemExit(terminal.one_line_errors(jax.devices))
"""
    environ = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    line = "JAX_PLATFORMS=cuda: no NVIDIA GPU is visible; check that nvidia-smi lists one"
    assert done.stdout.startswith(line) and done.returncode == 1
    assert done.stderr.startswith(f"error: {line}") and done.stderr.count("\n") == 1
