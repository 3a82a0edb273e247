"""What every script shares at its edge: one clear line for a user's mistake, no libraries' chatter, the compilation cache."""

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path


def quiet() -> None:
    """Environment and logging of a script: XLA programs are kept between processes, and only errors are told.

    Call it before jax is imported. What the user has set in the environment stays.
    """
    folder = Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser() / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # it is a cache: go on without
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's log
    from absl import logging  # Orbax's log

    logging.set_verbosity(logging.ERROR)


def one_line_errors(main: Callable[[], int]) -> int:
    """Run `main`; a user's error becomes one line on stderr and exit code 1. JAXFT_TRACEBACK=1 shows the traceback."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        text = _line(error)
        if text is None:
            raise
        if os.environ.get("JAXFT_TRACEBACK"):
            traceback.print_exc()
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
