"""Metrics between two log entries, throughput, and the profiler trace; too many non-finite steps in a row end
the run.
"""

import collections
import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.batch import count_reads
from jaxft.data.source import Source
from jaxft.distributed import devices
from jaxft.distributed.sync import is_first
from jaxft.nn.tree import Batch, Metrics
from jaxft.objectives import metrics as metric
from jaxft.objectives.metrics import FloatMetrics
from jaxft.train.start.jobs import Job, Member
from jaxft.train.trainable_params import trains_base


class Meter:
    """Adds up one member's metrics between two log entries, on the host and one step behind the device.

    A non-finite step adds nothing but its tokens to the sums, unless all steps since the last entry are
    non-finite. The estimate of wrong labels (LabelNoise) is summed over the first epoch, in which every pair
    is evaluated before the model trains on it. If the objective says that the policy starts equal to its
    reference (Facts.starts_tied), all pairs of the first step count as ties.

    max_bad: non-finite steps in a row that end the run, None for any number. counters: what `counters()`
    returned when the checkpoint was saved. index: the member's index in the metrics of a sweep, which have a
    leading members axis; None for a run alone.
    """

    def __init__(
        self,
        member: Member,
        source: Source[Any],
        max_bad: int | None,
        counters: dict[str, Any] | None,
        index: int | None = None,
    ):
        counts = dict.fromkeys(("num_tokens", "bad_in_a_row", "good", "skipped"), 0)
        start = {**counts, "learning_rate": 0.0, "window": {}, "epoch": {}}
        self._counters = {**start, **(counters or {})}
        self._source, self._max_bad, self._index = source, max_bad, index
        self._sums = metric.from_json(self._counters["window"])
        self._epoch = metric.from_json(self._counters["epoch"])
        self._starts_tied = member.programs.objective.facts.starts_tied
        partition = member.programs.partition
        self._model = partition.model
        # forward, gradient of the inputs, gradient of the weights
        self._passes = 3 if trains_base(partition) else 2
        self._device = jax.local_devices()[0]
        # a CPU's peak is measured by a benchmark, which the run's threads would slow down
        on_cpu = self._device.platform == "cpu"
        self._peak = None if on_cpu else devices.peak_flops(self._device) * len(jax.devices())
        self._pending: collections.deque[tuple[int, int, Metrics]] = collections.deque()
        self._tokens, self._flops, self._last = 0, 0.0, 0
        self._since = time.perf_counter()

    def add(self, step: int, batch: Batch, metrics: Metrics) -> None:
        """Queue the metrics of a step; wait for the previous step's metrics and add them to the log interval.

        Raises ValueError that names the rows if loop.max_bad steps in a row were not finite.
        """
        tokens = int((batch.segments > 0).sum())
        self._tokens += tokens
        # attention is counted within each example, the head only where the loss reads logits; passes of a
        # reference or a critic are not counted
        earlier = float(batch.positions.sum(where=batch.segments > 0))  # earlier tokens, summed over tokens
        flops = self._model.forward_flops(tokens, 2 * earlier / max(tokens, 1), count_reads(batch))
        self._flops += self._passes * flops
        self._pending.append((step, tokens, metrics))
        self._add_pending(1)

    def _add_pending(self, leave: int) -> None:
        counters = self._counters
        while len(self._pending) > leave:
            step, tokens, metrics = self._pending.popleft()
            now = self._on_host(metrics)
            now = metric.as_ties(now) if step == 0 and self._starts_tied else now
            is_bad, rate = bool(now.pop("skipped").total > 0), float(now.pop("learning_rate").total)
            names = [name for name, value in now.items() if isinstance(value, metric.LabelNoise)]
            by_epoch = {name: now.pop(name) for name in names}
            if not is_bad and step < self._source.info.steps_per_epoch:
                self._epoch = metric.add(self._epoch, by_epoch) if self._epoch else by_epoch
            self._last = step
            counters["num_tokens"] += tokens
            counters["bad_in_a_row"] = counters["bad_in_a_row"] + 1 if is_bad else 0
            counters["skipped"] += is_bad
            if counters["good"] == 0:
                self._sums = now
            elif not is_bad:
                # loop.watch may have changed
                same = {name: m for name, m in self._sums.items() if name in now}
                self._sums = metric.add(same, now)
            counters["good"] += not is_bad
            counters["learning_rate"] = counters["learning_rate"] if is_bad else rate
            if self._max_bad is not None and counters["bad_in_a_row"] >= self._max_bad:
                self._give_up(range(step + 1 - self._max_bad, step + 1))

    def _on_host(self, metrics: Metrics) -> Metrics:
        host = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(metrics))
        of_member = host if self._index is None else jax.tree.map(lambda x: x[self._index], host)
        return metric.by_layer(of_member)

    def _give_up(self, steps: range) -> None:
        rows = [name for step in steps for row in self._source.row_names(step) for name in row.split(", ")]
        shown = ", ".join(rows[:12]) + (f" and {len(rows) - 12} more" if len(rows) > 12 else "")
        raise ValueError(
            f"loss, gradient or update was not finite in {len(steps)} steps in a row "
            f"(steps {steps[0] + 1} to {steps[-1] + 1}). "
            "The parameters are those from before these steps. "
            f"Check the rows {shown}, or start a new run with a lower optim.lr and another name=."
        )

    def counters(self) -> dict[str, Any]:
        """Return the meter's state as JSON, for a checkpoint after the newest step. Waits for the device."""
        self._add_pending(0)
        good = self._sums if self._counters["good"] else {}
        return {**self._counters, "window": metric.to_json(good), "epoch": metric.to_json(self._epoch)}

    def read(self) -> tuple[FloatMetrics, FloatMetrics]:
        """Return (metrics, speed and memory) of the steps since the last call. Waits for the device."""
        self._add_pending(0)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        out = {
            **metric.as_floats(dict(sorted({**self._sums, **self._epoch}.items()))),
            "skipped": self._counters["skipped"],
            "learning_rate": self._counters["learning_rate"],
            "epoch": (self._last + 1) / self._source.info.steps_per_epoch,
            "num_tokens": self._counters["num_tokens"],
        }
        use = {} if self._peak is None else {"mfu": self._flops / seconds / self._peak}
        perf = {
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            **use,
            "memory_gib": devices.memory_gib(self._device),
        }
        self._tokens, self._flops = 0, 0.0
        self._counters.update(good=0, skipped=0)
        self._sums = {}
        return out, perf

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context, leave the time out of the speed."""
        self._add_pending(0)
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin


class Meters:
    """A Meter for each member of a job. counters: the result of `counters()` in the checkpoint, or None."""

    def __init__(self, job: Job, counters: Sequence[dict[str, Any]] | None):
        self._each = []
        for number, member in enumerate(job.members):
            # a member of a sweep that becomes non-finite is frozen, and the others continue
            max_bad, index = (member.run.loop.max_bad, None) if job.sweep is None else (None, number)
            member_counters = None if counters is None else counters[number]
            self._each.append(Meter(member, job.source_of(number), max_bad, member_counters, index))

    def add(self, step: int, batches: Sequence[Batch], metrics: Metrics) -> None:
        """Add a step's metrics. batches: one batch for all members, or one per member."""
        for number, meter in enumerate(self._each):
            meter.add(step, batches[min(number, len(batches) - 1)], metrics)

    def read(self) -> tuple[list[FloatMetrics], list[FloatMetrics]]:
        """Return (metrics, speed and memory) of each member since the last call."""
        each = [meter.read() for meter in self._each]
        return [metrics for metrics, _ in each], [perf for _, perf in each]

    def counters(self) -> list[dict[str, Any]]:
        """Return each member's meter state as JSON, for a checkpoint."""
        return [meter.counters() for meter in self._each]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context, leave the time out of all members' speed."""
        with contextlib.ExitStack() as stack:
            for meter in self._each:
                stack.enter_context(meter.paused())
            yield


class Trace:
    """A profiler trace of the steps from first to last, counted from 1, on process 0; no trace for None."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self._steps = steps if is_first() else None
        self._folder, self._is_on = folder, False

    def before(self, step: int) -> None:
        """Start the trace before its first step, or at once if the run resumes within the range."""
        if self._steps and not self._is_on and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True

    def after(self, step: int, result: Any) -> None:
        """Stop the trace when its last step is complete."""
        if self._is_on and self._steps and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write the trace, if one was started."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
