"""Measure peak host memory and seconds of loading a model on each of several processes.

    python scripts/bench/bench_load.py [--gb 4] [--processes 2] [--devices 4] [--quant none] [--full] [--json]

Writes a random bfloat16 Llama as safetensors into a temporary folder, and loads it fully sharded over all
devices of all processes on this machine. Devices are simulated on the CPU, so their memory is host memory:
the growth of a process is its local shards plus the overhead of loading.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=4.0, help="size of the random model's files (default 4)")
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument("--devices", type=int, default=4, help="devices per process (default 4)")
    parser.add_argument(
        "--quant", default="none", help="none (default), int8, fp8, int4, nf4, fp4 or affine4"
    )
    parser.add_argument("--full", action="store_true", help="load trainable float32 weights")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    parser.add_argument("--process", nargs=3, metavar=("NUMBER", "PORT", "MODEL"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_model(folder: Path, gb: float) -> None:
    """Write random weights of about `gb` GB in files of at most 1 GB, tensor by tensor."""
    import jax.numpy as jnp
    import numpy as np

    from jaxft.models.families.llama import LlamaConfig, llama
    from jaxft.nn import param_spec, tree
    from jaxft.weights.edit.merged_weights import LazyTensor
    from jaxft.weights.hf import hf_write

    wide = 2048 if gb >= 1 else 256
    config = LlamaConfig(
        vocab=8 * wide, width=wide, layers=1, heads=16, kv_heads=8, head_dim=wide // 16, mlp=4 * wide
    )
    params, tables = param_spec.count_params(llama(config).specs), 2 * config.vocab * wide
    model = llama(replace(config, layers=max(2, round((gb * 1e9 / 2 - tables) / (params - tables)))))
    rng, dtype = np.random.default_rng(0), np.dtype(jnp.bfloat16)

    def lazy(path: str, spec: Any) -> LazyTensor:
        def make(index: tuple[int, ...]) -> np.ndarray:
            return rng.standard_normal(spec.shape[len(index) :], np.float32).astype(dtype)

        return LazyTensor(spec.shape, dtype, make)

    base = tree.map_with_path(lazy, model.specs, is_leaf=param_spec.is_spec)
    hf_write.save_folder(folder, model, base, None, None, hf_write.WriteOptions(1_000_000_000))


def status(name: str) -> int:
    """Return a field of /proc/self/status, such as VmRSS, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def load(a: argparse.Namespace) -> dict[str, Any]:
    """Load the model in one of the processes; return its memory and seconds."""
    import time

    import jax
    import jax.numpy as jnp

    from jaxft.distributed import sharding
    from jaxft.nn.adapters.lora import Adapter
    from jaxft.nn.quant import Quant, is_qtensor
    from jaxft.train import trainable_params
    from jaxft.weights import pretrained

    number, port, model = int(a.process[0]), a.process[1], a.process[2]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if a.processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", a.processes, number)
    mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=-1))
    quant = None if a.quant == "none" else Quant(a.quant)
    llm = pretrained.model_for(model, dtype=jnp.bfloat16)
    t = trainable_params.partition_params(llm, None if a.full else Adapter(), None, quant)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, begin = status("VmRSS"), time.monotonic()
    base = jax.block_until_ready(pretrained.load_base(model, t.stored, mesh))
    seconds = time.monotonic() - begin

    def local_bytes(leaf):
        return sum(shard.data.nbytes for x in jax.tree.leaves(leaf) for shard in x.addressable_shards)  # noqa: E731

    local = [local_bytes(leaf) for leaf in jax.tree.leaves(base, is_leaf=is_qtensor)]
    largest = max(
        sum(x.nbytes for x in jax.tree.leaves(leaf)) for leaf in jax.tree.leaves(base, is_leaf=is_qtensor)
    )
    rss = {
        "local shards": sum(local),
        "local part of the largest leaf": max(local),
        "largest leaf": largest,
    }
    rss |= {"peak": status("VmHWM") - before, "after loading": status("VmRSS") - before}
    if a.processes > 1:
        jax.distributed.shutdown()
    return {**rss, "seconds": seconds}


def measure(a: argparse.Namespace) -> dict[str, Any]:
    """Start the processes; return their results and the size of the files."""
    with tempfile.TemporaryDirectory(dir=a.folder) as folder, socket.socket() as port:
        write_model(Path(folder), a.gb)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        port.bind(("127.0.0.1", 0))
        number = str(port.getsockname()[1])
        port.close()
        flags = f"--xla_force_host_platform_device_count={a.devices}"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        common = [
            sys.executable,
            __file__,
            "--processes",
            str(a.processes),
            "--quant",
            a.quant,
            *(["--full"] if a.full else []),
        ]
        started = []
        for i in range(a.processes):
            command = [*common, "--process", str(i), number, folder]
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
        outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process failed; its error is printed above")
    return {"files": size, "processes": [json.loads(out.splitlines()[-1]) for out in outputs]}


def main() -> int:
    """Measure, and print a table or JSON."""
    a = arguments()
    if a.process:
        print(json.dumps(load(a)))
        return 0
    measured = measure(a)
    if a.json:
        print(json.dumps(measured))
        return 0
    print(
        f"{measured['files'] / 1e9:.2f} GB of files, {a.processes} processes x {a.devices} devices, "
        "fully sharded; GB per process:"
    )
    for name in measured["processes"][0]:
        scale = 1.0 if name == "seconds" else 1e9
        print(f"{name:30s}" + "".join(f"{process[name] / scale:10.2f}" for process in measured["processes"]))
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
