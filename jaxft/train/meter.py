"""Metrics between two log entries, throughput, and the profiler trace."""

import collections
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.data.source import Source
from jaxft.distributed import devices
from jaxft.objectives import metrics
from jaxft.train import partition


class Meter:
    """Adds up the steps between two logged ones on the host, one step behind the device, and counts the bad ones.

    counters: what a checkpoint keeps, so that a run that goes on logs the same numbers. A step that was not finite adds
    nothing but its tokens; only a window without another one shows its numbers. A LabelNoise wants pairs that the model hasn't
    learned from: it is that of the first epoch so far, in which every pair is scored before its own update.
    """

    def __init__(
        self,
        t: partition.Partition,
        rates: np.ndarray,
        source: Source[Any],
        most_bad: int,
        counters: dict[str, Any] | None,
    ):
        start = {"num_tokens": 0, "bad_in_a_row": 0, "good": 0, "skipped": 0, "window": {}, "epoch": {}}
        self._counters = {**start, **(counters or {})}
        self._rates, self._source, self._model, self._most_bad = rates, source, t.model, most_bad
        self._sums, self._epoch = (
            metrics.from_json(self._counters["window"]),
            metrics.from_json(self._counters["epoch"]),
        )
        trains_base = any(jax.tree.leaves(t.mask["base"]))
        self._passes = 3 if trains_base else 2  # forward, gradient by inputs, gradient by weights
        self._device = jax.local_devices()[0]
        self._peak = devices.peak_flops(self._device) * len(jax.devices())
        self._waiting: collections.deque[tuple[int, int, dict[str, Any]]] = collections.deque()
        self._tokens, self._length, self._last = 0, 0, 0
        self._since = time.perf_counter()

    def add(self, step: int, batch: Any, found: dict[str, Any]) -> None:
        """Note one step and wait for the one before it.

        Raises ValueError, naming the rows, when too many steps in a row had a loss or gradient that is not finite.
        """
        tokens, self._length = int((batch.segments > 0).sum()), batch.segments.shape[-1]
        self._tokens += tokens
        self._waiting.append((step, tokens, found))
        self._take(1)

    def _take(self, leave: int) -> None:
        c = self._counters
        while len(self._waiting) > leave:
            step, tokens, found = self._waiting.popleft()
            now = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(found))
            bad = bool(now.pop("skipped").total > 0)
            fresh = {name: now.pop(name) for name in list(now) if isinstance(now[name], metrics.LabelNoise)}
            if not bad and step < self._source.info.steps_per_epoch:
                self._epoch = metrics.add(self._epoch, fresh) if self._epoch else fresh
            self._last = step
            c["num_tokens"] += tokens
            c["bad_in_a_row"] = c["bad_in_a_row"] + 1 if bad else 0
            c["skipped"] += bad
            if c["good"] == 0:
                self._sums = now
            elif not bad:
                self._sums = metrics.add(self._sums, now)
            c["good"] += not bad
            if c["bad_in_a_row"] >= self._most_bad:
                self._give_up(range(step + 1 - self._most_bad, step + 1))

    def _give_up(self, steps: range) -> None:
        rows = [name for step in steps for row in self._source.row_names(step) for name in row.split(", ")]
        shown = ", ".join(rows[:12]) + (f" and {len(rows) - 12} more" if len(rows) > 12 else "")
        raise ValueError(
            f"loss or gradient was not finite in {len(steps)} steps in a row (steps {steps[0] + 1} to {steps[-1] + 1}); the "
            f"parameters are as before them; look at the rows {shown}, or lower optim.lr with another name=..."
        )

    def counters(self) -> dict[str, Any]:
        """What a checkpoint after the newest step keeps. Waits for the device."""
        self._take(0)
        good = self._sums if self._counters["good"] else {}
        return {**self._counters, "window": metrics.to_json(good), "epoch": metrics.to_json(self._epoch)}

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        """(metrics, perf) of the steps since the last reading. Waits for the device."""
        self._take(0)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        out = {
            **metrics.as_floats({name: m for name, m in sorted({**self._sums, **self._epoch}.items())}),
            "skipped": self._counters["skipped"],
            "learning_rate": float(self._rates[self._last]),
            "epoch": (self._last + 1) / self._source.info.steps_per_epoch,
            "num_tokens": self._counters["num_tokens"],
        }
        perf = {
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "mfu": self._passes
            * self._model.forward_flops(self._tokens, self._length)
            / seconds
            / self._peak,
            "memory_gib": devices.memory_gib(self._device),
        }
        self._tokens = 0
        self._counters.update(good=0, skipped=0)
        self._sums = {}
        return out, perf

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Leave out of the next reading the time that is spent inside."""
        self._take(0)
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin


class Trace:
    """A profiler trace of the steps from first to last (as the log counts them, from 1) in `folder`; of none with None."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps, self._folder, self._on = steps, folder, False

    def before(self, step: int) -> None:
        """Start before the first of them; a run that goes on inside the range starts where it is."""
        if self._steps and not self._on and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """Stop once the last of them is through."""
        if self._on and self._steps and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
