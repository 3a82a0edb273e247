"""A run over several processes: start and stop of jax's distributed runtime, and what the processes agree on.

Nothing here is called by a run of one process in another way than by one of many; alone, everything answers at once.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from jaxft.distributed import exit, launch, sharding, sync
from jaxft.distributed.exit import shorten_error
from jaxft.distributed.sync import is_first

JOINING = 60  # seconds that jax is given beyond hosts.start_seconds, so that its abort without a word never comes first


@dataclass(frozen=True)
class Hosts:
    """The processes of a run.

    coordinator: host:port of process 0, with processes (how many) and process (which one this is) where no launcher says it;
    JAXFT_COORDINATOR, JAXFT_PROCESSES and JAXFT_PROCESS do the same. Without a coordinator beside it `processes` is a claim, as
    `devices` (of all processes) always is: the run ends where it finds another number.
    start_seconds: how long processes wait for one another at the start; where one doesn't come, the others end with code 75.
    heartbeat_seconds: after how long a process that gives no sign of life is lost. stop_seconds: how long they wait for one
    another at the end.
    step_seconds: a step that takes longer is stalled; None for twenty times the median step, at least ten minutes.
    phase_seconds: the same for what isn't a step: reading, compiling, evaluation, waiting for a checkpoint, export.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: int | None = None
    start_seconds: int = 300
    heartbeat_seconds: int = 100
    stop_seconds: int = 300
    step_seconds: float | None = None
    phase_seconds: float = 7200.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("coordinator", "process") and value is not None and value <= 0:
                raise ValueError(f"hosts.{field.name} is above 0, found {value}")
        if self.process is not None and self.coordinator is None:
            raise ValueError(
                f"hosts.process={self.process} goes with hosts.coordinator=host:port of process 0; set that too"
            )


class AgreedError(ValueError):
    """An error that all processes raise at the same place, so that they can end in order."""


@contextlib.contextmanager
def started(hosts: Hosts, told: Callable[[BaseException], int]) -> Iterator[None]:
    """Join the other processes of this run, if the settings or a launcher say that there are any. Call it before jax is used.

    told: says an error to the user, in a process that the others wait for in vain, and returns the exit code; the process ends
    there, since a way out in order would wait for them too. Raises Refused where the counts aren't those that are claimed.
    """
    found = launch.detect((hosts.coordinator, hosts.processes, hosts.process), os.environ)
    alone = found is None
    try:
        if found is not None:
            _join(found, hosts)
            alone = not several()
        _check_counts(hosts)
        yield
    except AgreedError:
        raise
    except BaseException as error:
        if found is None or alone:
            raise
        if is_loss(error):
            exit.exit_for_restart(lost(error, "before the first step or after the last"))
        code = told(error)
        if (
            not found.process
        ):  # the others may be about to say the same, and are aborted when process 0 is gone
            time.sleep(2)
        exit.exit_now(code)
    finally:
        exit.silence()


def refuse_several(what: str) -> None:
    """Raise ValueError where a launcher has started several processes of something that takes one."""
    found = launch.detect((None, None, None), os.environ)
    if found is not None and (
        found.processes or found.process is not None
    ):  # a TPU's host alone may say neither
        raise ValueError(
            f"{what} runs in one process, and this is one of several ({found.by}); start it once"
        )


def _join(found: launch.Launch, hosts: Hosts) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's own preemption notice swallows SIGTERM from here on; a run's Interrupt and Votes do that work, for SIGINT too
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    known: dict[str, Any] = {"local_device_ids": list(found.local) if found.local is not None else None}
    if found.coordinator is not None:
        known |= {
            "coordinator_address": found.coordinator,
            "num_processes": found.processes,
            "process_id": found.process,
        }
        known["cluster_detection_method"] = "deactivate"
    me = f"process {found.process} of {found.processes}" if found.processes else "this process"
    where = f"the coordinator {found.coordinator or 'that jax found'} ({found.by})"
    exit.if_ended_from_outside(
        f"{me} was ended from outside while it joined the others at {where}: killed, or stopped by jax because one of them is "
        "gone; start the same command again on all hosts"
    )
    late = (
        f"{me}: {where} was not reached by all {found.processes or 'processes'} within {hosts.start_seconds} s "
        "(hosts.start_seconds); see that each of them is started, that their number is right and that they reach that address"
    )
    known |= {
        "heartbeat_timeout_seconds": hosts.heartbeat_seconds,
        "shutdown_timeout_seconds": hosts.stop_seconds,
    }
    try:
        # process 0 last: the others are aborted when it is gone
        with exit.exit_after(hosts.start_seconds + (0 if found.process else 2), late):
            jax.distributed.initialize(**known, initialization_timeout=hosts.start_seconds + JOINING)
        jax.devices()  # of all processes, which wait for one another here too
    except RuntimeError as error:
        text = f"{me}: could not join the others at {where}: {shorten_error(error)}"
        if exit.means_peer_lost(str(error)):
            exit.exit_for_restart(f"{text}; start the same command again on all hosts")
        raise ValueError(text) from error
    _announce(found)
    if several():
        exit.if_ended_from_outside(
            f"{who()} was ended from outside: killed, out of memory, or stopped by jax because another process is gone or gave "
            f"no sign of life for {hosts.heartbeat_seconds} s (hosts.heartbeat_seconds); start the same command again on all "
            "hosts, it goes on from the newest checkpoint"
        )
    else:
        exit.silence()


def _announce(found: launch.Launch) -> None:
    where = f"coordinator {found.coordinator}" if found.coordinator else "coordinator as jax found it"
    each = sorted({sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())})
    counts = f"{each[0]} each" if len(each) == 1 else "unequal: " + " or ".join(map(str, each))
    if is_first():
        print(
            f"{jax.device_count()} devices on {jax.process_count()} processes ({counts}), {where} ({found.by})",
            flush=True,
        )
    else:
        print(
            f"{who()}: {jax.local_device_count()} of {jax.device_count()} devices, {where} ({found.by})",
            file=sys.stderr,
        )


def _check_counts(hosts: Hosts) -> None:
    """Raise Refused where there are not as many processes or devices as the settings claim."""
    if hosts.processes is not None and hosts.processes != jax.process_count():
        raise AgreedError(
            f"hosts.processes={hosts.processes}, found {jax.process_count()}; start as many, or check what the launcher says"
        )
    if hosts.devices is not None and hosts.devices != jax.device_count():
        each = {i: sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())}
        told = ", ".join(f"{count} on process {i}" for i, count in list(each.items())[:8])
        raise AgreedError(
            f"hosts.devices={hosts.devices}, found {jax.device_count()} ({told}); see which devices each process is given"
        )


# Who am I


def several() -> bool:
    """Whether this run has other processes. Touches no device where it hasn't."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def who() -> str:
    """`process 1 of 2`, or `the run` where it is alone."""
    return f"process {jax.process_index()} of {jax.process_count()}" if several() else "the run"


# The end


def one_line_of(error: BaseException) -> str:
    """An error in words for the user, as cli shows it."""
    if isinstance(error, OSError) and error.strerror and error.filename and error.filename2 is None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def is_loss(error: BaseException) -> bool:
    """Whether a computation failed because another process is gone."""
    return isinstance(error, jax.errors.JaxRuntimeError) and exit.means_peer_lost(str(error)) and several()


def lost(error: BaseException, where: str) -> str:
    """What to say of that."""
    return (
        f"{who()}: another process is gone or stalled ({where}; {shorten_error(error)}); "
        "start the same command again on all hosts, it goes on from the newest checkpoint"
    )


# What they agree on


def on_all_processes(work: Callable[[], Any]) -> Any:
    """`work()` on every process. What a user can mend on one of them ends all: raises Refused with the first one's text.

    The others hear of it at their next exchange, be it inside of `work`; so nothing in it may wait for the others otherwise.
    """
    with agreement():
        return work()


@contextlib.contextmanager
def agreement() -> Iterator[None]:
    """Around what every process does: an error of a user on one of them ends all, as in `agreed`."""
    if not several():
        yield
        return
    try:
        yield
    except AgreedError:
        raise
    except (ValueError, OSError, ImportError) as error:
        told = ValueError(one_line_of(error))
        _said(lambda: _raise(told))
    barrier()


def barrier() -> None:
    """Wait until all processes are here. Raises Refused where one comes with an error."""
    if several():
        _said(lambda: None)


def from_first_process(work: Callable[[], Any]) -> Any:
    """What `work()` returns on process 0, as JSON, for all of them; its error is the error of all, as in `agreed`."""
    if not several():
        return work()
    return on_all_processes(lambda: _said(lambda: work() if is_first() else None)[0])


def first_then_others(work: Callable[[], Any]) -> Any:
    """`work()` on process 0 and, once that is done, on the others, which find in caches what it has left there."""
    early = on_all_processes(lambda: [work()] if is_first() else [])
    return early[0] if early else work()


def _said(act: Callable[[], Any]) -> list[Any]:
    """What `act()` gives on each process, or Refused on all."""
    try:
        return sync.settle(sync.gather_texts, act)
    except (ValueError, OSError) as error:
        raise AgreedError((isinstance(error, OSError) and error.strerror) or str(error)) from error


def _raise(error: Exception) -> None:
    raise error


def all_equal(known: Any) -> bool:
    """Whether all processes have the same, as JSON."""
    text = json.dumps(known, sort_keys=True, default=str)
    return not several() or len(set(_said(lambda: hashlib.sha256(text.encode()).hexdigest()))) == 1


def check_same(known: dict[str, Any], differences: Callable[[Any, Any], list[str]]) -> None:
    """Raise Refused on all processes where one knows something else than process 0: other rows, settings or libraries.

    differences(of process 0, of another) -> a line for each.
    """
    if all_equal(known):
        return
    text = json.dumps(known, sort_keys=True, default=str)
    first, *others = map(json.loads, _said(lambda: text))
    number, lines = next(
        (i, found) for i, other in enumerate(others, 1) if (found := differences(first, other))
    )
    raise AgreedError(
        f"process {number} of {jax.process_count()} has other settings, rows or libraries than process 0 "
        f"({'; '.join(lines[:6])}); start all of them with the same command, files and versions"
    )


class Votes:
    """Whether a process was asked to stop, so that all of them stop after the same step.

    Each casts its vote before a step; the sum is computed on the devices between two steps and is there once the earlier one is
    through, so nothing waits for it. (jax's reached_preemption_sync_point knows SIGTERM only, and not in a run of one process.)
    """

    def __init__(self, mesh: Any):
        self._place = sharding.per_device_vector(mesh)
        self._most = jax.jit(jax.numpy.max, out_shardings=sharding.replicated(mesh))
        if several():
            barrier()
            self._cast(
                0
            ).block_until_ready()  # compiled, and connected to all others before anything else is under way

    def cast(self, own: Callable[[], int]) -> Callable[[], int]:
        """own: this process's vote, a signal's number or 0. Returns a function that tells the highest of all."""
        if not several():
            return own
        found = self._cast(own())
        return lambda: int(np.asarray(found))

    def _cast(self, own: int) -> Any:
        size = self._place.mesh.size
        return self._most(
            jax.make_array_from_callback((size,), self._place, lambda index: np.full(1, own, np.int32))
        )
