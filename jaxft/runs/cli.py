"""What every script shares at its edge: one clear line for a user's mistake, no libraries' chatter, the compilation cache."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def quiet() -> None:
    """Environment and logging of a script: XLA programs are kept between processes, and libraries' logs are off.

    Call it before jax is imported. What the user has set in the environment stays.
    """
    folder = Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser() / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache"
    )  # it is a cache: go on without
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's log
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from absl import logging  # Orbax's log, which tells an error with its traceback before it is raised

    if not os.environ.get("JAXFT_TRACEBACK"):
        logging.set_verbosity(logging.FATAL)
        sys.unraisablehook = _without_late_writes


def _without_late_writes(found: Any) -> None:
    """Show what a callback raised, but not TensorStore's for each write under way when another one failed; that one is raised."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def one_line_errors(main: Callable[[], int]) -> int:
    """Run `main`; a user's error becomes one line on stderr and exit code 1. JAXFT_TRACEBACK=1 shows the traceback."""
    try:
        return main()
    except (KeyboardInterrupt, ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if not isinstance(error, KeyboardInterrupt) and _line(error) is None:
            raise
        return print_error(error)


def print_error(error: BaseException) -> int:
    """Print an error on stderr, a user's as one line, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    text = (
        _line(error)
        if isinstance(error, ValueError | OSError | ImportError | MemoryError | RuntimeError)
        else None
    )
    if text is None or os.environ.get("JAXFT_TRACEBACK"):
        traceback.print_exception(error)
    if text is not None:
        print(f"error: {text}", file=sys.stderr)
    return 1


def _line(error: Exception) -> str | None:
    """The error in one line; None for one that is no user's mistake."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text[:200]:
        return f"out of memory ({text[:200]}); use a smaller data.batch, a larger data.micro or a smaller data.max_length"
    if isinstance(error, RuntimeError):  # jax has no device of the kind that JAX_PLATFORMS asks for
        return text[:400] if text.startswith("Unable to initialize backend") else None
    if isinstance(error, OSError) and error.strerror and error.filename and error.filename2 is None:
        return f"{error.filename}: {error.strerror}"
    return text
