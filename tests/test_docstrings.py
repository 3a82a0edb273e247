"""Examples in docstrings run and print what they show."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    for path in REPO.glob("jaxft/**/*.py")
    if ">>> " in path.read_text()
)
# What READMEs, recipes and notebooks call: each has an example in its docstring.
ENTRY_POINTS = ["jaxft.nn.param:kernel"]  # module:name


def object_of(name):
    module, _, member = name.partition(":")
    return getattr(importlib.import_module(module), member)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_in_docstrings_print_what_they_show(module):
    failed, tried = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert tried and not failed


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_public_entry_point_has_an_example(name):
    assert ">>> " in inspect.getdoc(object_of(name))
