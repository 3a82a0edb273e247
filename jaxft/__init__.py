"""jaxft: fine-tune and align language models in JAX.

    import jaxft

    rows = [{"instruction": "What is 4 plus 3?", "response": "It is 7."}, ...]
    result = jaxft.train("sft", rows, name="sums", lr=5e-4, epochs=2)
    print(result.after["eval_loss"], result.generate(["What is 2 plus 2?"]))

Names are imported when they are first used; the page "From Python" in scripts/README.md has more examples.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# A public name -> the module that defines it, and its name there
_LAZY = {
    "train": ("jaxft.train", ""),  # the package itself, which can be called
    "prepare": ("jaxft.train.python_api", "prepare_recipe"),
    "load": ("jaxft.train.python_api", "load_model"),
    "evaluate": ("jaxft.train.python_api", "evaluate_model"),
    "Error": ("jaxft.train.python_api", "Error"),
    "Result": ("jaxft.train.python_api", "RunResult"),
    "Prepared": ("jaxft.train.python_api", "Prepared"),
}
__all__ = [*_LAZY]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxft' has no attribute {name!r}; it has {', '.join(_LAZY)}")
    if name != "train":
        importlib.import_module("jaxft.runs.terminal").quiet()  # before jax is imported
    module, attribute = _LAZY[name]
    imported = importlib.import_module(module)
    return getattr(imported, attribute) if attribute else imported


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
