"""Randomly damaged files, and the check that a command accepts them or ends with an error of one line."""

import contextlib
import copy
import json
import math
import resource
import signal
import traceback

from jaxft.runs import terminal

SECONDS, BYTES = 30, 2 << 30  # of one case
DEEP = "<nested>"  # in a text of JSON it becomes a list that is nested too deeply for any parser
VALUES = [  # what a JSON file may have in place of a value
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32 + 1, 2**63, 2**64, -(2**70), 10**400,
    0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan,
    "", " ", "0", "none", "../x", "/etc/passwd", "a\nb", "\x1b[31mred\x07", "\ud800", "é\u202e", "x" * 5000,
    "{{1/0}}", "{% for i in range(10**12) %}x{% endfor %}", "(a+)+$", "[", "(?P<",
    [], {}, [None], [1, "2", {}], [[]], {"a": None}, {"": {}}, {"x": [1] * 50}, DEEP,
]  # fmt: skip


def nodes(value, path=()):
    """The paths of all values inside a JSON value, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def damaged_json(rng, value, values=VALUES):
    """The value with one to three of its parts replaced, removed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        paths = list(nodes(value))
        path = paths[rng.integers(len(paths))]
        if not path:
            if rng.random() < 0.1:
                value = copy.deepcopy(values[rng.integers(len(values))])
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        way = rng.random()
        if way < 0.15:
            del parent[path[-1]]
        elif way < 0.25 and isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(values[rng.integers(len(values))])
        if not isinstance(value, dict | list):
            break
    return value


def json_text(value):
    """JSON as Python's json reads it, with NaN, infinity and halves of surrogate pairs."""
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 20000 + "]" * 20000).encode()


def damaged_bytes(rng, data, front=None):
    """The bytes with some of the first `front` flipped, overwritten, removed or inserted, or cut off."""
    data, front = bytearray(data), min(front or len(data), len(data))
    for _ in range(rng.integers(1, 4)):
        if not front or not data:
            break
        at, way = int(rng.integers(min(front, len(data)))), rng.random()
        if way < 0.4:
            data[at] ^= 1 << int(rng.integers(8))
        elif way < 0.6:
            data[at] = int(rng.integers(256))
        elif way < 0.75:
            number = [0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1][rng.integers(8)]
            data[at : at + 8] = number.to_bytes(8, "little")
        elif way < 0.85:
            del data[at : at + int(rng.integers(1, 64))]
        elif way < 0.95:
            data[at:at] = bytes(rng.integers(0, 256, rng.integers(1, 64), dtype="uint8"))
        else:
            del data[at:]
    return bytes(data)


@contextlib.contextmanager
def bounded():
    """A limit on the time and the memory that the body may take in addition to what the process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()

    def late(*_):
        raise TimeoutError(f"not done in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refusal(work):
    """The one line in which `work()` is refused, None if it is done. Anything else fails the test.

    Not a refusal: an error that the commands print with a traceback, a second line, a raw control character,
    a message without words, or too much memory or time.
    """
    try:
        with bounded():
            work()
        return None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | AssertionError):
            raise
        trace = "".join(traceback.format_exception(error))[-3000:]
        line = terminal.error_line(error)
        assert line is not None, f"a traceback:\n{trace}"
        assert not isinstance(error, MemoryError | TimeoutError), f"too much memory or time:\n{trace}"
        assert line.isprintable() and len(line) > 10, f"not a line: {line!r}\n{trace}"
        return line
