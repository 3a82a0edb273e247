"""Output of commands: text without control characters and secrets, errors of one line, quiet libraries, and
output streams that may close.

A run records everything in its folder, so it continues when its standard output and error are closed or
cannot be written: the reader may end (`| head`), the shell may close it (`>&-`), the terminal may hang up, or
the disk of the file may be full.
"""

import contextlib
import io
import os
import re
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from jaxft.data.rows.remote_files import without_secrets
from jaxft.data.rows.shipped import own_commands
from jaxft.distributed import xla_flags
from jaxft.distributed.exit import RESTART_CODE, RestartError

# Characters that move the cursor, change colours or reorder text, except tabs and new lines.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST_LINE = 2000
READER_GONE = 141  # exit code if the reader of the output has ended (`| head`), as of SIGPIPE
# Errors that a user's settings, files or machine may cause; others are bugs and keep their traceback.
USER_ERRORS = (ValueError, OSError, ImportError, MemoryError, RuntimeError)


def printable_text(text: str) -> str:
    """Return a text, such as a completion, for a terminal: U+FFFD replaces every control character."""
    return CONTROL.sub("\ufffd", text)


def printable_message(text: str) -> str:
    """Return a message for a terminal: control characters become U+FFFD, and URLs lose their secrets."""
    return without_secrets(printable_text(text))


def printable_line(text: str) -> str:
    """Return text as one line of at most LONGEST_LINE characters. A character that is not printable becomes
    its escape sequence, such as \\x1b; URLs lose their secrets.
    """
    words = " ".join(text[: 10 * LONGEST_LINE].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    line = without_secrets(line)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 4]} ..."


def short_text(text: str, most: int = 200) -> str:
    """Return text for a message, shortened to `most` characters with " ..." at the end if it is longer."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown.

    >>> print(markdown_table(["name", "is"], [["`a`", "b|c"]]))
    | name | is |
    |---|---|
    | `a` | b\\|c |
    """
    lines = [head, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    texts = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([texts[0], "|---" * len(head) + "|", *texts[1:]])


PATIENCE = 5.0  # seconds for which a non-blocking stream may be full before output is dropped


class LastingFile(io.FileIO):
    """A file descriptor that is replaced by /dev/null when a write to it fails."""

    def write(self, data: Any) -> int:
        """Write the data, or drop it if it cannot be written. Return how many bytes that was."""
        try:
            count = super().write(data)
            if count is None:  # non-blocking and full
                select.select([], [self], [], PATIENCE)
                count = super().write(data)
        except OSError:
            discard_output(self.fileno())
            count = None
        return memoryview(data).nbytes if count is None else count


def discard_output(descriptor: int) -> None:
    """Make a file descriptor point to /dev/null, so that later writes to it are dropped."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def open_missing() -> None:
    """Open /dev/null in place of each of standard input, output and error that is closed.

    Otherwise the next file that the run opens gets that descriptor, and printed text is written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest free descriptor: this one
    sys.stdout = sys.stdout or _text_file(io.FileIO(1, "w", closefd=False), None)
    sys.stderr = sys.stderr or _text_file(io.FileIO(2, "w", closefd=False), None)


def outlive_console() -> None:
    """Replace sys.stdout and sys.stderr by files whose writes never fail."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError):
            old.flush()
        setattr(sys, name, _text_file(LastingFile(descriptor, "w", closefd=False), old))


def _text_file(raw: io.FileIO, like: TextIO | None) -> TextIO:
    """Open `raw` as a text file with the encoding of `like`, or UTF-8 if it is None; stderr is not buffered.

    Characters that the encoding lacks are written as backslash escapes.
    """
    is_error = raw.fileno() == 2
    encoding = like.encoding if like is not None else "utf-8"
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffered,
        encoding,
        "backslashreplace",
        line_buffering=is_error or raw.isatty(),
        write_through=is_error,
    )


def flush_output() -> None:
    """Flush standard output. Raises OSError if its reader has ended or its disk is full."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard_output(1)  # or it is flushed again at exit
        raise type(error)(error.errno, error.strerror, "standard output") from error


def print_error(error: BaseException) -> int:
    """Print an error on stderr, as error_line or with its traceback. Return the process's exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    text = error_line(error)
    if text is None or os.environ.get("JAXFT_TRACEBACK"):
        traceback.print_exception(error)
    if text is not None:
        print(f"error: {text}", file=sys.stderr)
    return RESTART_CODE if isinstance(error, RestartError) else 1


def error_line(error: BaseException) -> str | None:
    """Return an error that settings, files or the machine may cause as one printable line; None for a bug."""
    if type(error).__name__ == "PanicException":  # of the Rust library tokenizers
        return printable_line(f"the tokenizer's files cannot be used: {error}; download them again")
    if (backend := backend_error(error)) is not None:
        return backend
    if not isinstance(error, USER_ERRORS):
        return None
    text = printable_line(str(error))
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text[:200]:
        remedy = "use a smaller data.batch, a larger data.micro or a smaller data.max_length"
        return f"out of memory ({text[:200]}); {remedy}"
    if isinstance(error, RuntimeError):
        return None
    if isinstance(error, OSError) and error.strerror and error.filename and error.filename2 is None:
        name = error.filename if isinstance(error.filename, str) else repr(error.filename)
        return printable_line(f"{name}: {error.strerror}")
    return own_commands(text) or type(error).__name__


def backend_error(error: BaseException) -> str | None:
    """Return, as one line, the error of jax if it finds no device of the kind in JAX_PLATFORMS; None if
    `error` is a different error.
    """
    text = printable_line(str(error))
    if isinstance(error, RuntimeError) and text.startswith("Unable to initialize backend"):
        return text[:400]
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and frames and frames[-1].filename.endswith("xla_bridge.py"):
        chosen = printable_line(os.environ.get("JAX_PLATFORMS", ""))  # jax skips "cuda" silently
        return (
            f"JAX_PLATFORMS={chosen}: no NVIDIA GPU is visible; check that nvidia-smi lists one (a container "
            "needs --gpus all), or unset JAX_PLATFORMS"
        )
    return None


def quiet() -> None:
    """Silence the logs of libraries, enable the persistent compilation cache, and apply XLA settings for the
    platform (see distributed/xla_flags.py). Call it before jax is imported.

    Settings in the user's environment take precedence.
    """
    open_missing()
    folder = Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser() / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    if "jax" in sys.modules and sys.modules["jax"].config.jax_compilation_cache_dir is None:
        sys.modules["jax"].config.update("jax_compilation_cache_dir", str(folder))
    # A cache that cannot be read or written only costs time.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
    xla_flags.apply_settings()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's log
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from absl import logging  # Orbax's log, which prints an error with its traceback before it is raised

    if not os.environ.get("JAXFT_TRACEBACK"):
        logging.set_verbosity(logging.FATAL)
        sys.unraisablehook = _without_late_writes


def _without_late_writes(raised: Any) -> None:
    """Print an error that Python cannot raise (see sys.unraisablehook), such as one in a destructor.
    TensorStore's "Event loop is closed" is not printed: it only follows the error of another failed write.
    """
    if str(raised.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(raised)


def one_line_errors(main: Callable[[], int]) -> int:
    """Run `main` and return the command's exit code.

    The code is the result of `main`; 1 after an error that the user can correct; RESTART_CODE (75) after an
    error for which the same command can be started again; READER_GONE (141) if the program that reads the
    output (`| head`) has ended. An error of the user is printed as one line on stderr, with its traceback if
    JAXFT_TRACEBACK=1 is set. Any other error is raised.
    """
    try:
        code = main()
        flush_output()
        return code
    except BrokenPipeError:
        discard_output(1)
        return READER_GONE
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt) and error_line(error) is None:
            raise
        return print_error(error)
