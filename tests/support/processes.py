"""Several real processes on the loopback, each with some simulated devices, that run one piece of code."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import simulated_devices

ROOT = Path(__file__).resolve().parents[2]

START = """
import json, os, sys
import jax
def print_value(value):
    print("\\nvalue " + json.dumps(value), flush=True)
me, count, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, me, heartbeat_timeout_seconds=10)
"""


def start(code: str, count: int, devices: int, *args: object) -> list[subprocess.Popen]:
    """`count` processes with `devices` devices each, that run `code`.

    It finds `me`, `count`, its own arguments from sys.argv[4] on, and `print_value(JSON value)`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}"}
    env.update(simulated_devices.environment(devices))
    command = [sys.executable, "-c", START + textwrap.dedent(code)]
    tail = [str(arg) for arg in args]
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [*command, str(i), str(count), str(port), *tail], stdout=pipe, stderr=pipe, text=True, env=env
        )
        for i in range(count)
    ]


def printed_values(processes: list[subprocess.Popen], timeout: float = 120) -> list[list[Any]]:
    """The values that each process printed; all must exit with 0."""
    try:
        texts = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (out, err) in zip(processes, texts, strict=True):
        assert p.returncode == 0, f"{out}\n{err[-3000:]}"
    return [
        [json.loads(line[6:]) for line in out.splitlines() if line.startswith("value ")] for out, _ in texts
    ]
