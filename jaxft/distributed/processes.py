"""Multi-process runs: start and stop of `jax.distributed`, operations that all processes do together, and the
watchdog, a thread that ends a stalled run with stack traces and the exit code for a restart.

Single-process runs call the same functions, which then exchange nothing and wait for nothing.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.annotations import ABOVE_ZERO, NonNegativeInt, PositiveInt, check_bounds
from jaxft.distributed import exit, launch, sharding, sync
from jaxft.distributed.exit import shorten_error
from jaxft.distributed.sync import is_first

JOINING = 60  # seconds added to JAX's own timeout, so that our message comes before JAX's abort


@dataclass(frozen=True)
class Hosts:
    """Settings of a multi-process run and of the watchdog.

    coordinator: host:port of process 0. Set it together with `processes` and `process` if no launcher is
    detected; the environment variables JAXFT_COORDINATOR, JAXFT_PROCESSES and JAXFT_PROCESS do the same.
    processes: number of processes. If a launcher determines it, a different number here is an error. process:
    index of this process, from 0. devices: expected number of devices on all processes; a different number is
    an error. none: not checked. start_seconds: timeout for all processes to join at the start; if one does
    not, the others exit with code 75. heartbeat_seconds: a process without a heartbeat for this long counts
    as lost. stop_seconds: timeout of the shutdown. step_seconds: a step that takes longer counts as stalled;
    none for 20 times the median step, at least 10 minutes (phase_seconds for the first steps). phase_seconds:
    the same limit outside steps: loading, compilation, evaluation, checkpointing, export.
    """

    coordinator: str | None = None
    processes: PositiveInt | None = None
    process: NonNegativeInt | None = None
    devices: PositiveInt | None = None
    start_seconds: PositiveInt = 300
    heartbeat_seconds: PositiveInt = 100
    stop_seconds: PositiveInt = 300
    step_seconds: Annotated[float | None, ABOVE_ZERO] = None
    phase_seconds: Annotated[float, ABOVE_ZERO] = 7200.0

    def __post_init__(self) -> None:
        check_bounds(self, "hosts")
        if self.process is not None and self.coordinator is None:
            raise ValueError(
                f"hosts.process={self.process} needs hosts.coordinator=host:port of process 0; set both"
            )


class AgreedError(ValueError):
    """An error that all processes raise at the same point, so that they can shut down normally."""


@contextlib.contextmanager
def started(hosts: Hosts, print_error: Callable[[BaseException], int]) -> Iterator[None]:
    """Initialise `jax.distributed` if the settings or a launcher define several processes.

    Enter it before JAX is used.

    print_error: prints an error and returns the exit code. After an error that only this process raises, it
    is called and the process exits immediately, because a normal shutdown would wait for the other processes.
    Raises AgreedError if the number of processes or devices differs from the settings.
    """
    launched = launch.detect((hosts.coordinator, hosts.processes, hosts.process), os.environ)
    single = launched is None
    try:
        if launched is not None:
            if not jax.distributed.is_initialized():  # a program may start several runs
                _join(launched, hosts)
            single = not is_multi_process()
        _check_counts(hosts)
        yield
    except AgreedError:
        raise
    except BaseException as error:
        if launched is None or single:
            raise
        if is_peer_lost(error):
            exit.exit_for_restart(peer_lost_message(error, "before the first step or after the last"))
        code = print_error(error)
        if not launched.process:
            time.sleep(2)  # the others may be about to print the same, and are aborted when process 0 exits
        exit.exit_now(code)
    finally:
        exit.clear_killed_message()


def require_single_process(what: str) -> None:
    """Raise ValueError if a launcher started several processes of a program that runs in a single one.

    what: the program's name for the error, such as "a sweep".
    """
    launched = launch.detect((None, None, None), os.environ)
    # the launch of a single TPU host may have neither
    if launched is not None and (launched.processes or launched.process is not None):
        raise ValueError(
            f"{what} runs in a single process, but this is one of several ({launched.launcher}); start a "
            "single process"
        )


def _join(launched: launch.Launch, hosts: Hosts) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX's preemption service would intercept SIGTERM from here on; Interrupt and Votes handle it
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    arguments: dict[str, Any] = {
        "local_device_ids": list(launched.local_gpus) if launched.local_gpus is not None else None,
        "heartbeat_timeout_seconds": hosts.heartbeat_seconds,
        "shutdown_timeout_seconds": hosts.stop_seconds,
    }
    if launched.coordinator is not None:
        arguments |= {
            "coordinator_address": launched.coordinator,
            "num_processes": launched.processes,
            "process_id": launched.process,
            "cluster_detection_method": "deactivate",
        }
    name = f"process {launched.process} of {launched.processes}" if launched.processes else "this process"
    where = f"the coordinator {launched.coordinator or 'that JAX detected'} ({launched.launcher})"
    exit.set_killed_message(
        f"{name} was killed while it joined the others at {where}: by the system or a user, or by JAX "
        "because another process is gone; run the same command again on all hosts"
    )
    late = (
        f"{name}: not all {launched.processes or 'the'} processes reached {where} within "
        f"{hosts.start_seconds} s (hosts.start_seconds); check that each is started, that their number is "
        "right and that they can reach that address"
    )
    try:
        # process 0 exits last: the others are aborted when it is gone
        with exit.exit_after(hosts.start_seconds + (0 if launched.process else 2), late):
            jax.distributed.initialize(**arguments, initialization_timeout=hosts.start_seconds + JOINING)
        jax.devices()  # waits for the devices of all processes
    except RuntimeError as error:
        text = f"{name}: could not join the others at {where}: {shorten_error(error)}"
        if exit.means_peer_lost(str(error)):
            exit.exit_for_restart(f"{text}; run the same command again on all hosts")
        raise ValueError(
            f"{text}; check the coordinator's address, and the devices of each process"
        ) from error
    _announce(launched)
    if is_multi_process():
        exit.set_killed_message(
            f"{process_name()} was killed: by the system or a user, for lack of memory, or by JAX because "
            f"another process is gone or sent no heartbeat for {hosts.heartbeat_seconds} s "
            "(hosts.heartbeat_seconds); run the same command again on all hosts to resume from the newest "
            "checkpoint"
        )
    else:
        exit.clear_killed_message()


def _announce(launched: launch.Launch) -> None:
    where = f"coordinator {launched.coordinator}" if launched.coordinator else "coordinator detected by JAX"
    sizes = sorted({sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())})
    counts = f"{sizes[0]} each" if len(sizes) == 1 else "unequal: " + " or ".join(map(str, sizes))
    if is_first():
        print(
            f"{jax.device_count()} devices on {jax.process_count()} processes ({counts}), {where} "
            f"({launched.launcher})",
            flush=True,
        )
    else:
        print(
            f"{process_name()}: {jax.local_device_count()} of {jax.device_count()} devices, {where} "
            f"({launched.launcher})",
            file=sys.stderr,
        )


def _check_counts(hosts: Hosts) -> None:
    """Raise AgreedError if the number of processes or devices differs from the settings."""
    if hosts.processes is not None and hosts.processes != jax.process_count():
        raise AgreedError(
            f"hosts.processes={hosts.processes}, but {jax.process_count()} are running; start "
            f"{hosts.processes} processes, or correct the setting"
        )
    if hosts.devices is not None and hosts.devices != jax.device_count():
        sizes = {i: sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())}
        listed = ", ".join(f"{count} on process {i}" for i, count in list(sizes.items())[:8])
        raise AgreedError(
            f"hosts.devices={hosts.devices}, but there are {jax.device_count()} ({listed}); check which "
            "devices each process gets, or correct the setting"
        )


# The name of this process


def is_multi_process() -> bool:
    """Whether this run has more than one process. Initialises no device in a single-process run."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def process_name() -> str:
    """Return the name of this process for messages: `process 1 of 2`, or `the run` if it is the only one."""
    return f"process {jax.process_index()} of {jax.process_count()}" if is_multi_process() else "the run"


# Errors


def one_line_of(error: BaseException) -> str:
    """Return the message of an error on one line; for an OSError with a file, `FILE: REASON`."""
    if isinstance(error, OSError) and error.strerror and error.filename and error.filename2 is None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def is_peer_lost(error: BaseException, connected: bool = False) -> bool:
    """Whether an error means that a computation failed because another process is gone.

    connected: whether all processes have finished a step of this run together; see exit.means_peer_lost.
    """
    return is_multi_process() and (
        isinstance(error, exit.PeerLostError)
        or (isinstance(error, jax.errors.JaxRuntimeError) and exit.means_peer_lost(str(error), connected))
    )


def peer_lost_message(error: BaseException, where: str) -> str:
    """Return the message that another process is gone. where: phase of the run, such as "step 12"."""
    return (
        f"{process_name()}: another process is gone or stalled ({where}; {shorten_error(error)}); "
        "run the same command again on all hosts to resume from the newest checkpoint"
    )


# Agreement between processes


def on_all_processes(work: Callable[[], Any]) -> Any:
    """Call `work()` on every process and return its result on this one. If it raises a ValueError, OSError or
    ImportError on any process, all processes raise an AgreedError with the same text.

    The other processes receive the error when they next communicate, possibly inside `work`. So `work` may
    wait for other processes only with the functions of this module; anything else would deadlock after an
    error.
    """
    with agreement():
        return work()


@contextlib.contextmanager
def agreement() -> Iterator[None]:
    """Turn a ValueError, OSError or ImportError of any process in the body into an AgreedError on all."""
    if not is_multi_process():
        yield
        return
    try:
        yield
    except AgreedError:
        raise
    except (ValueError, OSError, ImportError) as error:
        user_error = ValueError(one_line_of(error))

        def fail() -> None:
            raise user_error

        _run_on_all(fail)
    barrier()


def barrier() -> None:
    """Wait until all processes arrive. Raises AgreedError if one of them arrives with an error."""
    if is_multi_process():
        _run_on_all(lambda: None)


def from_first_process(work: Callable[[], Any]) -> Any:
    """Call `work()` on process 0 and return its result, which must be valid JSON, on all processes.

    If it raises a ValueError, OSError or ImportError, all processes raise an AgreedError.
    """
    if not is_multi_process():
        return work()
    return on_all_processes(lambda: _run_on_all(lambda: work() if is_first() else None)[0])


def first_then_others(work: Callable[[], Any]) -> Any:
    """Call `work()` on process 0 first and then on the others, so that they find its downloads and caches."""
    first = on_all_processes(lambda: [work()] if is_first() else [])
    return first[0] if first else work()


def in_step(lines: Iterator[str]) -> Iterator[str]:
    """Run a long computation in rounds, in which each process does one step; yield the same text on all
    processes after each round.

    lines: an iterator whose every item is the result of a step: a non-empty text. The text of the first
    process that still has steps is yielded. A process that has no steps left waits in the remaining rounds,
    so its watchdog sees progress. A ValueError, OSError or ImportError of a step on any process raises
    AgreedError on all.
    """
    if not is_multi_process():
        yield from lines
        return
    while any(received := _run_on_all(lambda: next(lines, None))):
        yield next(line for line in received if line)


def _run_on_all(fn: Callable[[], Any]) -> list[Any]:
    """Call `fn()` on every process; return all results, by process index. A ValueError, OSError or
    ImportError on one process raises AgreedError on all.
    """
    try:
        return sync.run_on_all(sync.gather_texts, fn)
    except (ValueError, OSError, ImportError) as error:
        raise AgreedError((isinstance(error, OSError) and error.strerror) or str(error)) from error


def all_equal(value: Any) -> bool:
    """Whether all processes pass the same value, compared as JSON."""
    if not is_multi_process():
        return True
    text = json.dumps(value, sort_keys=True, default=str)
    return len(set(_run_on_all(lambda: hashlib.sha256(text.encode()).hexdigest()))) == 1


def check_same(record: dict[str, Any], differences: Callable[[Any, Any], list[str]]) -> None:
    """Raise AgreedError if a process's record (settings, rows and libraries, as JSON) differs from process
    0's.

    differences(record of process 0, record of another process) -> one line for each difference.
    """
    if all_equal(record):
        return
    text = json.dumps(record, sort_keys=True, default=str)
    first, *others = map(json.loads, _run_on_all(lambda: text))
    number, lines = next(
        (i, differing) for i, other in enumerate(others, 1) if (differing := differences(first, other))
    )
    raise AgreedError(
        f"process {number} of {jax.process_count()} differs from process 0 in settings, rows or libraries "
        f"({'; '.join(lines[:6])}); start all processes with the same command, files and versions"
    )


class Votes:
    """Votes on whether to stop, so that a signal to one process stops all of them after the same step.

    Every process casts its vote before a step. The devices compute the highest vote between two steps. It is
    available when the earlier step has finished, so the host never waits for it. (JAX's
    reached_preemption_sync_point supports only SIGTERM, and only multi-process runs.)
    """

    def __init__(self, mesh: Mesh):
        self._sharding = sharding.per_device_vector(mesh)
        self._max = jax.jit(jax.numpy.max, out_shardings=sharding.replicated(mesh))
        if is_multi_process():
            barrier()
            # compile it and connect to the other processes before any other computation is in flight
            self._cast(0).block_until_ready()

    def cast(self, vote: Callable[[], int]) -> Callable[[], int]:
        """Cast this process's vote; return a function that returns the highest vote of all processes.

        vote: returns the number of the signal that this process has received, or 0.
        """
        if not is_multi_process():
            return vote
        highest = self._cast(vote())
        return lambda: int(np.asarray(highest))

    def _cast(self, vote: int) -> Any:
        size = self._sharding.mesh.size
        return self._max(
            jax.make_array_from_callback((size,), self._sharding, lambda index: np.full(1, vote, np.int32))
        )


MEDIANS, MIN_SECONDS = 20, 600.0  # default step limit: 20 median steps, at least 600 s
CLOSING = 60.0  # seconds to release resources after an error


class Watchdog:
    """Context manager that ends the process when a phase or a step exceeds its time limit.

    Report progress with `at(phase)` and `step(number)`. When the limit is exceeded, the stacks of all threads
    are printed to stderr, then one line (which process, where, for how long, what to do), and the process
    exits with code 75 (exit.RESTART_CODE). This also works while the main thread blocks in a collective
    because another process died or hangs. Time during which the whole process was suspended (a laptop in
    standby, Ctrl-Z) does not count.
    """

    def __init__(self, hosts: Hosts):
        self._hosts = hosts
        self._phase, self._limit, self._setting = "starting", hosts.phase_seconds, "hosts.phase_seconds"
        self._waited, self._step_start = 0.0, 0.0  # _step_start is 0 outside steps
        self._steps: deque[float] = deque(maxlen=64)
        self._started = self._connected = False  # a step; all processes, by finishing a step together
        self._end = threading.Event()
        shortest = min(hosts.phase_seconds, hosts.step_seconds or MIN_SECONDS)
        self._tick = min(1.0, shortest / 10)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()

    def at(self, phase: str, after_step: bool = False) -> None:
        """Report that a phase other than a training step begins. It may take hosts.phase_seconds.

        phase: its name, such as "evaluation", for messages. after_step: True if a training step has just
        finished, which shows that the connections between all processes work.
        """
        self._step_start, self._connected = 0.0, self._connected or after_step
        self._feed(phase, self._hosts.phase_seconds, "hosts.phase_seconds")

    def step(self, number: int) -> None:
        """Report that training step `number` begins, and that the step before has ended."""
        now = time.monotonic()
        if self._step_start:
            self._steps.append(now - self._step_start)
        self._step_start = now
        self._connected, self._started = self._connected or self._started, True
        self._feed(f"step {number}", self._step_limit(), "hosts.step_seconds")

    def _step_limit(self) -> float:
        if self._hosts.step_seconds is not None:
            return self._hosts.step_seconds
        if len(self._steps) < 3:  # the first steps set up communication and autotune kernels
            return self._hosts.phase_seconds
        return max(MIN_SECONDS, MEDIANS * statistics.median(self._steps))

    def _feed(self, phase: str, limit: float, setting: str) -> None:
        self._phase, self._limit, self._setting, self._waited = phase, limit, setting, 0.0

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Limit the time that the program may take to end after an error in the `with` block.

        If the error means that another process is lost, exit immediately for a restart. After any other error
        a multi-process run has CLOSING seconds to release its resources, because closing may wait for a
        process that is gone.
        """
        try:
            yield
        except AgreedError:
            raise
        except BaseException as error:
            if is_peer_lost(error, self._connected):
                exit.exit_for_restart(peer_lost_message(error, self._phase))
            if is_multi_process():
                phase = f"closing after an error in {self._phase} ({shorten_error(error)})"
                self._feed(phase, CLOSING, "after an error")
            raise

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self._tick):
            now = time.monotonic()
            self._waited += min(now - last, 2 * self._tick)
            last = now
            if self._waited > self._limit:
                self._end_process()

    def _end_process(self) -> None:
        with contextlib.suppress(Exception):
            faulthandler.dump_traceback(file=2, all_threads=True)
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            if sys.stdout.isatty():
                os.write(1, b"\x1b[?25h")  # the live view hides the cursor
        limit = f"limit {self._limit:g} s: {self._setting}"
        exit.exit_for_restart(
            f"{process_name()}: no progress for {self._waited:.0f} s in {self._phase} ({limit}); "
            "the stack traces above show where it waits; run the same command again to resume from the "
            "newest checkpoint"
        )
