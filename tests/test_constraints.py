"""The exact versions that CI installs cover every requirement of pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE = ".github/constraints.txt"
requirements = pytest.importorskip("packaging.requirements")


def test_every_requirement_has_an_exact_version_that_fits_it():
    lines = [line for line in (ROOT / FILE).read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line) for line in lines)
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        required = requirements.Requirement(text)
        version = pins[re.sub(r"[-_.]+", "-", required.name).lower()]
        assert required.specifier.contains(version), f"{text}: {version}; run .ci/constraints"


def test_the_commands_that_ci_takes_from_the_readme_install_these_versions():
    readme = (ROOT / "README.md").read_text()
    for name in ("quick-start", "tests"):
        block = readme.split(f"<!-- ci: {name} -->")[1].split("```")[1]
        assert f"pip install -q -c {FILE} -e" in block, name
