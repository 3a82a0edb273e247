"""The time of each phase of a run, over all of its starts, and lines about the progress of a phase."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax

from jaxft.data.progress import time_in_words
from jaxft.runs.console import TOTAL, time_by_phase
from jaxft.runs.versions_and_devices import device_counts, processor

Phase = Literal["rows", "loading", "compiling", "training", "evaluation", "sampling", "saving"]
Done = TypeVar("Done")
BEAT = 5.0  # seconds after which a part that is under way is shown again


class Clock:
    """Measures the seconds of each phase of a run and shows progress. The first phase is "rows": reading and
    tokenising. The time of a phase inside another phase counts for the inner one only.

    now: returns the time in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._phase, self._since = now, "rows", now()
        self._seconds: dict[str, float] = {}
        self._recent: dict[str, float] = {}
        self._parts: dict[str, float] = {}
        self._shown, self._begun = "", set[str]()
        self._show: Callable[[str], None] = _show_nothing

    def resume(self, seconds: dict[str, float], show: Callable[[str], None]) -> None:
        """Add the seconds of each phase in earlier starts of the run. show: is called with the progress of a
        phase as text, and with "" when the phase ends.
        """
        for phase, earlier in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + earlier
        self._show = show

    def at(self, phase: Phase) -> str:
        """End the present phase and begin `phase`; return text with the time of the ended phase and of its
        parts.
        """
        parts, self._parts = self._parts, {}
        self._show("")
        return time_by_phase({**parts, TOTAL: self._switch(phase)})

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within this context, show every few seconds how long the part `name` has taken so far."""
        begin, ended = self._now(), threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT):
                self._show(f"{self._shown}, {time_in_words(self._now() - begin)} so far")

        self._progress(f"{self._phase}: {name}")
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        self._parts[name] = self._parts.get(name, 0.0) + self._now() - begin

    @contextlib.contextmanager
    def first(self, name: str) -> Iterator[bool]:
        """Show progress as `part` does, only in the first call with `name`; yield True in that call only."""
        if name in self._begun:
            yield False
            return
        self._begun.add(name)
        with self.part(name):
            yield True
        self._show("")

    def _progress(self, text: str) -> None:
        self._shown = text
        self._show(text)

    @contextlib.contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Within this context, count the time for another phase, not for the present one."""
        outer = self._phase
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)
            self._show("")

    def timed(self, phase: Phase, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its calls counted for `phase`. name: shown while a call takes long."""

        def call(*args: Any) -> Any:
            with self.within(phase), self.part(name):
                return function(*args)

        return call

    def over(self, text: str, items: Sequence[Done]) -> Iterator[Done]:
        """Yield the items, and show how many are done: "text: 3 of 14"."""
        count = self.counter(text, len(items))
        for item in items:
            yield item
            count(1)

    def counter(self, text: str, total: int) -> Callable[[int], None]:
        """Return `count(more)`, which adds `more` finished items and shows "text: 3 of total"."""
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            self._progress(f"{text}: {done} of {total}")

        return count

    def seconds(self) -> dict[str, float]:
        """Return {phase: seconds}, with the sum under TOTAL."""
        self._switch(self._phase)
        return {**self._seconds, TOTAL: sum(self._seconds.values())}

    def phases(self) -> dict[str, float]:
        """Return {phase: seconds} without the sum, for the checkpoint."""
        return {phase: seconds for phase, seconds in self.seconds().items() if phase != TOTAL}

    def recent(self) -> dict[str, float]:
        """Return the seconds of evaluation and sampling since the last call, as timings of a log entry."""
        recent = {f"{phase}_seconds": self._recent.pop(phase, 0.0) for phase in ("evaluation", "sampling")}
        return {name: seconds for name, seconds in recent.items() if seconds}

    def _switch(self, phase: str) -> float:
        now = self._now()
        spent, before = now - self._since, self._phase
        for seconds in (self._seconds, self._recent):
            seconds[before] = seconds.get(before, 0.0) + spent
        self._phase, self._since = phase, now
        return spent


def _show_nothing(text: str) -> None:
    return


def hardware() -> str:
    """Return the devices of all processes in words, and of CPUs the processor's name."""
    counts = device_counts([device.device_kind for device in jax.devices()])
    if jax.devices()[0].platform != "cpu":
        return counts
    cpu = processor()
    return f"{counts} ({cpu['name']}, {cpu['cores']} cores)"


def time_line(perf: dict[str, Any]) -> str:
    """Return the line about a finished run's time, tokens and hardware. perf: as in summary.json."""
    return f"took {time_by_phase(perf['seconds'])} for {perf['tokens']:,} tokens on {perf['hardware']}"
