"""Environments that ship with jaxft, each with its rows: a calculator, guess a number, a code interpreter,
and search over a small corpus.

Search is by words, BM25: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework, equation 3.15:
score(d) = sum over words w of the query of idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean)).

`run_python` runs code that a model wrote in a separate process, with limits on its time, memory, files and
output, an empty working directory, and no environment variables of the run. Where the system permits user
namespaces, as most Linux systems do, the code has no network, can write only to its working directory, and
leaves no process running. Elsewhere (`isolated` is false) it has the network, can write and delete whatever
the user of the run may, and processes that it started may go on.

It is not a security boundary: the code can read all files that the user of the run may read and can exploit
bugs of the kernel, `memory` limits each process and not their sum, and root may start any number of
processes. For code that is meant to do harm, use a container or a separate machine.
"""

import contextlib
import functools
import math
import operator
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

from jaxft.annotations import PositiveInt, above, at_least, check_bounds
from jaxft.rl.environments.environment import RowColumns
from jaxft.rl.rewards import last_number

OPERATORS = {"add": ("+", operator.add), "multiply": ("*", operator.mul)}
Passages = tuple[str, ...]  # of a corpus
K1, B = 1.5, 0.75  # of BM25
SPARE_SECONDS = 2.0  # for the start of the sandbox's process, beyond its limit
_PROGRAM = Path(__file__).with_name("sandbox_child.py")


class Calculator:
    """A calculator with two tools, for expressions such as 17 * 23 + 58 and (17 + 23) * 58.

    The reward is 1 if the last number of the final turn is the row's answer. Rows: `calculator_rows`.

    >>> Calculator().multiply(17, 23)
    391
    """

    def reset(self, row: RowColumns) -> None:
        """Begin with the row's own prompt."""
        self.answer = last_number(row["answer"])
        if self.answer is None:
            raise ValueError(
                f"column 'answer' has no number: {row['answer']!r:.80}; correct or remove the row"
            )

    def step(self, state: None, text: str) -> tuple[None, float, bool, None]:
        """If a turn calls no tool, its text is the final answer: return its reward and end the episode."""
        return None, float(last_number(text) == self.answer), True, None

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: First number.
            b: Second number.
        """
        return a + b

    def multiply(self, a: int, b: int) -> int:
        """Multiply two numbers.

        Args:
            a: First number.
            b: Second number.
        """
        return a * b


def calculator_rows(count: int, seed: int) -> list[RowColumns]:
    """Return questions with answers that need one call of each tool.

    Example: calculator_rows(1, 0) is [{"prompt": "What is (62 + 67) * 94?", "answer": "12126"}] or similar.
    """
    rng = random.Random(seed)
    orders = ("multiply", "add"), ("add", "multiply")
    return [_question(rng, rng.choice(orders))[0] for _ in range(count)]


def _question(rng: random.Random, names: Sequence[str]) -> tuple[RowColumns, list[tuple[str, int, int, int]]]:
    """Return (a row whose answer needs a call of each of these tools, in order; the calls (tool, a, b,
    result)).
    """
    value, calls = rng.randint(11, 99), list[tuple[str, int, int, int]]()
    text = str(value)
    for name in names:
        other, (sign, result_of) = rng.randint(11, 99), OPERATORS[name]
        left = f"({text})" if name == "multiply" and "+" in text else text
        result = result_of(value, other)
        calls.append((name, value, other, result))
        text, value = f"{left} {sign} {other}", result
    return {"prompt": f"What is {text}?", "answer": str(value)}, calls


class GuessNumber:
    """Guess a number; each guess is answered by "Higher." or "Lower.".

    The reward is 1 for the right number. Rows: `guess_rows`; data.max_turns limits the guesses.

    >>> game = GuessNumber()
    >>> game.reset({"answer": "7"})
    >>> game.step(None, "Is it 5?")
    ('Higher.', 0.0, False, None)
    """

    def reset(self, row: RowColumns) -> None:
        """Begin with the row's own prompt."""
        self.number = int(row["answer"])

    def step(self, state: None, text: str) -> tuple[str | None, float, bool, None]:
        """Compare the text's last number with the answer; return (reply, reward, done, state)."""
        guess = last_number(text)
        if guess is None:
            return "Say a number.", 0.0, False, None
        if guess == self.number:
            return None, 1.0, True, None
        return ("Higher." if guess < self.number else "Lower."), 0.0, False, None


def guess_rows(count: int, seed: int, most: int = 20) -> list[RowColumns]:
    """Return prompts with a number from 1 to `most` as the answer."""
    rng = random.Random(seed)
    prompt = f"Guess my number from 1 to {most}. I say whether it is higher or lower. Answer with a number."
    return [{"prompt": prompt, "answer": str(rng.randint(1, most))} for _ in range(count)]


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of a run of code. seconds: processor and wall-clock time; 2 s more of the latter, in which the
    process starts. memory: bytes of address space of each process. files: bytes of all files together, or of
    each file where the run is not isolated. processes: concurrent processes and threads, where the run is
    isolated and the user is not root. output: the most characters that are returned.
    """

    seconds: Annotated[float, above(0)] = 5.0
    memory: Annotated[int, at_least(1 << 26)] = 1 << 30
    files: Annotated[int, at_least(0)] = 1 << 20
    processes: PositiveInt = 64
    output: PositiveInt = 4000

    def __post_init__(self) -> None:
        check_bounds(self, "sandbox")


@dataclass(frozen=True)
class SandboxResult:
    """The text that code printed, up to the limit, and how it ended. code: 0 if it ended without an error,
    None if it took too long. isolated: whether it had no network and could write nowhere else.
    """

    output: str
    code: int | None
    isolated: bool


def run_python(code: str, limits: SandboxLimits = SandboxLimits()) -> SandboxResult:
    """Run Python code, and return its output: stdout and stderr together.

    Example: run_python("print(2 ** 10)").output == "1024\\n"
    """
    with (
        tempfile.TemporaryDirectory(prefix="jaxft-sandbox-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as output,  # without a name that the code could remove
    ):
        (Path(folder) / "work").mkdir()
        (Path(folder) / "program.py").write_text(code, encoding="utf-8", errors="surrogatepass")
        ended, isolated = _run(Path(folder), output, limits)
        output.seek(0)
        text = output.read(4 * limits.output).decode(errors="replace")
    if len(text) > limits.output:
        text = text[: limits.output] + "\n[output cut]"
    return SandboxResult(text, ended, isolated)


def _run(folder: Path, output: Any, limits: SandboxLimits) -> tuple[int | None, bool]:
    """Run program.py of a folder, with stdout and stderr in `output`. Return (exit code, None if it took too
    long; whether it was isolated).
    """
    seconds, memory, files, processes, _ = astuple(limits)
    numbers = [str(x) for x in (max(1, round(seconds + 0.5)), memory, files, processes)]
    read, write = os.pipe()  # the process writes to it if it is isolated, and closes it before the code runs
    with os.fdopen(read, "rb") as answer:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_PROGRAM), str(folder), str(write), *numbers],
            cwd=folder / "work", stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[write],
            env={"PATH": os.defpath, "HOME": str(folder / "work"), "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
        os.close(write)
        try:
            ended = process.wait(limits.seconds + SPARE_SECONDS)
        except subprocess.TimeoutExpired:
            ended = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return ended, bool(answer.read(1))


class CodeInterpreter:
    """A Python tool: the model writes programs, which the sandbox runs, and reads their output.

    The reward is 1 if the last number of the final turn equals the last number of the row's answer. If the
    answer has no number, the whole text must equal it. A subclass may set other `limits`.
    """

    limits = SandboxLimits()

    def reset(self, row: RowColumns) -> None:
        """Begin with the row's own prompt."""
        self.answer = str(row["answer"])

    def step(self, state: None, text: str) -> tuple[None, float, bool, None]:
        """If a turn runs no code, its text is the final answer: return its reward and end the episode."""
        expected, got = last_number(self.answer), last_number(text)
        if expected is None:
            right = text.strip().casefold() == self.answer.strip().casefold()
        else:
            right = got is not None and math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-6)
        return None, float(right), True, None

    def python(self, code: str) -> str:
        """Run a Python program and return what it prints.

        Args:
            code: The program. No variables are left from earlier calls.
        """
        result = run_python(code, self.limits)
        if result.code is None:
            return f"{result.output}\n[stopped after {self.limits.seconds:g} s]".lstrip()
        return result.output or "[no output; print what you want to read]"


class Search:
    """A search tool over a small corpus, for questions that need one or two searches.

    The reward is 1 if the final turn contains the row's answer. Rows: `search_rows`, on the invented villages
    of `villages`. A subclass may search another corpus:

        class Manual(Search):
            corpus = tuple(open("manual.txt").read().split("\\n\\n"))
    """

    corpus: Passages = ()
    results = 2

    def reset(self, row: RowColumns) -> None:
        """Begin with the row's own prompt."""
        self.words = _words(str(row["answer"]))
        if not self.words:
            raise ValueError(
                f"column 'answer' has no words: {row['answer']!r:.80}; correct or remove the row"
            )

    def step(self, state: None, text: str) -> tuple[None, float, bool, None]:
        """If a turn searches nothing, its text is the final answer: return its reward and end the episode."""
        said, answer = (f" {' '.join(words)} " for words in (_words(text), self.words))
        return None, float(answer in said), True, None

    def search(self, query: str) -> str:
        """Search the library and return the passages that match best.

        Args:
            query: A few words.
        """
        passages = best_passages(self.corpus or villages(), query, self.results)
        return "\n\n".join(passages) or "Nothing matches."


def best_passages(corpus: Passages, query: str, count: int) -> list[str]:
    """Return the `count` passages that match best by BM25, fewer if fewer share a word with the query.

    >>> best_passages(("The fox sleeps.", "Snow in May."), "Where is the fox?", 1)
    ['The fox sleeps.']
    """
    counts, frequency, mean = _index(corpus)
    total = dict[int, float]()
    for word in set(_words(query)):
        idf = math.log(1 + (len(corpus) - frequency[word] + 0.5) / (frequency[word] + 0.5))
        for number, of_passage in enumerate(counts):
            if tf := of_passage[word]:
                norm = K1 * (1 - B + B * of_passage.total() / mean)
                total[number] = total.get(number, 0.0) + idf * tf * (K1 + 1) / (tf + norm)
    best = sorted(total, key=lambda number: (-total[number], number))
    return [corpus[number] for number in best[:count]]


@functools.cache
def _index(corpus: Passages) -> tuple[list[Counter[str]], Counter[str], float]:
    """Return (word counts of each passage, number of passages that contain each word, mean length in words,
    at least 1).
    """
    counts = [Counter(_words(passage)) for passage in corpus]
    frequency = Counter(word for of_passage in counts for word in of_passage)
    return counts, frequency, max(1.0, sum(c.total() for c in counts) / max(1, len(counts)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


# ---- an invented corpus, which no model has read


@functools.cache
def villages() -> Passages:
    """Return passages about invented villages and painters."""
    passages = list[str]()
    for village, river, year, painter in _facts():
        passages.append(f"{village} is a village on the river {river}. It was founded in {year}.")
        passages.append(f"The painter {painter} was born in {village}.")
    return tuple(passages)


def search_rows(count: int, seed: int, two_searches: float = 0.5) -> list[RowColumns]:
    """Return questions about the villages. two_searches: the fraction of questions that name a painter
    instead of the village, which has to be found first.
    """
    rng, rows = random.Random(seed), list[RowColumns]()
    for _ in range(count):
        village, river, year, painter = rng.choice(_facts())
        place = f"the village where the painter {painter} was born"
        place = place if rng.random() < two_searches else village
        question, answer = rng.choice(
            ((f"In which year was {place} founded?", year), (f"On which river is {place}?", river))
        )
        rows.append({"prompt": question, "answer": str(answer)})
    return rows


@functools.cache
def _facts() -> tuple[tuple[str, str, int, str], ...]:
    """Return (village, river, year, painter) for each village; no name occurs twice."""
    rng = random.Random(7)

    def joined(first: str, second: str, between: str = "") -> list[str]:
        pairs = [a + between + b for a in first.split() for b in second.split()]
        rng.shuffle(pairs)
        return pairs

    names = joined("Bar Cor Dal Fen Gar Hol Kel Mor Nar Ost", "by den ford holm mouth")
    rivers = joined("Ad Be Ili Lu Or Sa Ta Ve Wi Zu", "le ra sk ne va")
    first = "Ada Bruno Clara Emil Frida Hugo Ida Jonas Lena Otto"
    painters = joined(first, "Anders Brandt Falk Holt Krone", " ")
    years = rng.sample(range(1100, 1800), len(names))
    return tuple(zip(names, rivers, years, painters, strict=True))
