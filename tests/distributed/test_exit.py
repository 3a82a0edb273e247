"""Which errors call for a restart, and the last line on stderr of a process that exits or is killed."""

import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxft.distributed import exit, processes
from jaxft.distributed.processes import Watchdog

ROOT = Path(__file__).resolve().parents[2]

LOST_PEER = [
    "FAILED_PRECONDITION: Gloo all-reduce failed: [gloo/transport/tcp/pair.cc:547] Connection closed by "
    "peer [127.0.0.1]:3904",
    "INTERNAL: Gloo AllGather failed: writev [10.0.0.2]:4411: Connection reset by peer",
    "INTERNAL: Gloo all-reduce failed: Timed out waiting 30000ms for recv operation to complete",
    "INTERNAL: Gloo all-reduce failed: Application timeout caused pair closure",
    "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error",
    "INTERNAL: NCCL operation ncclAllReduce() failed: socketProgress: Connection closed by remote peer "
    "node-2<41234>",
    "UNAVAILABLE: failed to connect to all addresses; last error: connection refused",
    "ABORTED: an earlier error of another task",
    "DEADLINE_EXCEEDED: Barrier timed out. Id: jaxft-meet-3",
    "INTERNAL: /job:jax_worker/task:1 heartbeat timeout. This indicates that the remote task has failed",
]
USER_ERRORS = [
    "INTERNAL: NCCL operation ncclCommInitRankConfig() failed: unhandled system error (run with "
    "NCCL_DEBUG=INFO for details)",
    "INTERNAL: NCCL operation ncclCommInitRankConfig() failed: invalid usage (run with NCCL_DEBUG=WARN for "
    "details)",
    "INTERNAL: NCCL operation ncclGetUniqueId(&id) failed: Bootstrap: no socket interface found for the "
    "connection",
    "INTERNAL: Gloo context initialization failed: no interface has the address 10.0.0.1",
    "RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes",
    "INVALID_ARGUMENT: the computation was aborted: argument 3 has another shape",
    "UNIMPLEMENTED: no peer access between devices 0 and 1",
]


@pytest.mark.parametrize("text", LOST_PEER)
def test_error_from_a_lost_peer_calls_for_a_restart(text, monkeypatch):
    assert not processes.is_peer_lost(jax.errors.JaxRuntimeError(text))  # single process
    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    assert processes.is_peer_lost(jax.errors.JaxRuntimeError(text)) and not processes.is_peer_lost(
        ValueError(text)
    )


@pytest.mark.parametrize("text", USER_ERRORS)
def test_error_that_a_restart_would_repeat_is_not_a_lost_peer(text, monkeypatch):
    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    assert not processes.is_peer_lost(jax.errors.JaxRuntimeError(text))


def test_a_save_that_waits_for_a_process_that_is_gone_calls_for_a_restart(monkeypatch):
    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    monkeypatch.setattr(processes, "process_name", lambda: "process 0 of 2")
    monkeypatch.setattr(exit, "exit_for_restart", lambda message: sys.exit(message))
    line = r"^process 0 of 2: another .* \(saving; .*step 2 was not written.*newest checkpoint$"
    with (
        pytest.raises(SystemExit, match=line),
        Watchdog(processes.Hosts()) as watchdog,
        watchdog.guard(),
    ):
        watchdog.at("saving")
        raise exit.PeerLostError(5, "checkpoint of step 2 was not written: a process is gone", "runs/a")


CONNECTION_ERRORS = [
    "UNKNOWN: Gloo context initialization failed: connect [127.0.0.1]:41833: Connection refused",
    "INTERNAL: NCCL operation ncclCommInitRankConfig() failed: unhandled system error (run with "
    "NCCL_DEBUG=INFO for details)",
]


@pytest.mark.parametrize(("steps", "finished"), [(0, False), (1, False), (1, True), (2, False)])
@pytest.mark.parametrize("text", [*CONNECTION_ERRORS, "RESOURCE_EXHAUSTED: Out of memory"])
def test_connection_error_calls_for_a_restart_only_after_a_step(text, steps, finished, monkeypatch):
    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    monkeypatch.setattr(processes, "process_name", lambda: "process 0 of 2")
    monkeypatch.setattr(exit, "exit_for_restart", lambda message: sys.exit(message))
    # the second step begins when the first has finished
    lost = (steps > 1 or finished) and text in CONNECTION_ERRORS
    with (
        pytest.raises(
            SystemExit if lost else jax.errors.JaxRuntimeError, match="process is gone" if lost else text[:8]
        ),
        Watchdog(processes.Hosts()) as watchdog,
        watchdog.guard(),
    ):
        for number in range(1, steps + 1):
            watchdog.step(number)
        watchdog.at("evaluation", after_step=finished)
        raise jax.errors.JaxRuntimeError(text)


ABORT = "import ctypes; ctypes.CDLL(None).abort()"


@pytest.mark.parametrize(
    ("code", "rc", "stderr"),
    [
        (f"exit.set_killed_message('first'); exit.set_killed_message('second'); {ABORT}", -6, "second\n"),
        (f"exit.set_killed_message('first'); exit.clear_killed_message(); {ABORT}", -6, ""),
        (
            "exit.set_killed_message('first'); exit.exit_for_restart('the end')",
            exit.RESTART_CODE,
            "the end\n",
        ),
        ("exit.clear_killed_message(); exit.exit_now(3)", 3, ""),
        (
            "exit.set_killed_message('first')\nwith exit.exit_after(0.2, 'late'): sleep(60)",
            exit.RESTART_CODE,
            "late\n",
        ),
        ("with exit.exit_after(0.2, 'late'): pass\nsleep(0.6)", 0, ""),
    ],
)
def test_last_line_on_stderr(code, rc, stderr, tmp_path):
    with (tmp_path / "err").open("w") as err:
        command = [
            sys.executable,
            "-c",
            f"from time import sleep\nfrom jaxft.distributed import exit\n{code}",
        ]
        done = subprocess.run(
            command, cwd=ROOT, stderr=err, stdout=subprocess.DEVNULL, timeout=60, check=False
        )
    until = time.monotonic() + 10
    while (tmp_path / "err").read_text() != stderr and time.monotonic() < until:
        time.sleep(0.02)  # the shell prints shortly after the process has ended
    time.sleep(0.1)
    assert (done.returncode, (tmp_path / "err").read_text()) == (rc, stderr)


def test_a_missing_package_on_one_process_is_the_same_user_error_on_all(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'boto3'")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    monkeypatch.setattr(processes.sync, "gather_texts", lambda text: ['{"result": null}', text])
    with pytest.raises(processes.AgreedError, match="process 1: No module named 'boto3'"):
        processes._run_on_all(missing)
