"""Full runs of a tiny model through scripts/train.py, each in a separate process that may be killed.

The processes are forked from a server that has imported everything, so that one starts in a moment.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path

import jax.profiler  # noqa: F401  what a run imports, before the fork
import simulated_devices
from tiny_llama import tiny_torch, write_folder
from transformers import AutoTokenizer  # noqa: F401
from transformers.models.llama import configuration_llama  # noqa: F401

import jaxft.train.loop  # noqa: F401
from jaxft.report import charts

ROOT = Path(__file__).resolve().parents[2]
SERVER = multiprocessing.get_context("forkserver")
CONFIG = '''"""A tiny Llama in a folder next to this file."""

import jax.numpy as jnp

from jaxft.data.sft import Rows
from jaxft.engine.sampling import Sampling
from jaxft.nn.adapters.lora import Adapter
from jaxft.optim.optimizer import Optim
from jaxft.nn.quant import Quant
from jaxft.train.recipes import SftKnobs
from jaxft.train.settings import Loop, Run
from jaxft.weights.pretrained import model_for


def config(
    model: str = "base", data: str = "rows.jsonl", name: str = "tiny", lr: float = 1e-2, steps: int | None = 4,
    full: bool = False, batch: int = 4, micro: int = 1, seed: int = 0, dropout: float = 0.0, epochs: float = 1.0,
    quant: str = "none", remat: str = "projections", loss: SftKnobs = SftKnobs(),
) -> Run:
    return Run(
        name=name,
        weights=model,
        model=model_for(model, dtype=jnp.float32, remat=remat),
        objective=loss.objective(),
        data=Rows(data, format="plain", held_out=0.1, batch=batch, micro=micro, max_length=64, seed=seed, epochs=epochs),
        adapter=None if full else Adapter(rank=4, dropout=dropout),
        quant=None if quant == "none" else Quant(quant),
        optim=Optim(lr=lr),
        loop=Loop(steps=steps, save_every=1, eval_fraction=None),
        samples=2,
        sampling=Sampling(max_new=4),
        seed=seed,
    )
'''  # noqa: E501


def rows(count=40):
    """Rows of unequal length."""
    return [
        {"prompt": f"what is {i} plus {i}?", "completion": f"it is {2 * i}" + " or so" * (i % 5)}
        for i in range(count)
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_place(folder, model=None):
    """A working directory with base/ (a tiny Llama, or `model`), rows.jsonl, more.jsonl and config.py."""
    write_folder(folder / "base", tiny_torch() if model is None else model)
    write_rows(folder / "rows.jsonl", rows())
    write_rows(folder / "more.jsonl", rows(12)[::-1])
    (folder / "general.jsonl").write_text('{"text": "a general text that has nothing to do with sums"}\n')
    (folder / "config.py").write_text(CONFIG)


LOOP = """
from jaxft.distributed import exit as interrupt
begin_loop = interrupt.Interrupt.__enter__
def enter(self):
    found = begin_loop(self)
    print("the loop begins", flush=True)
    return found
interrupt.Interrupt.__enter__ = enter
"""


SLOW_STEPS = """
import time
from jaxft.train.logs import meter
add = meter.Meter.add
def slow(self, *args):
    time.sleep(0.3)
    return add(self, *args)
meter.Meter.add = slow
"""
COUNT_COMPILES = """
import jax, traceback
from jaxft.distributed import exit as interrupt
from jaxft.train.export import export
seen = []
def listen(name, *_, **__):
    by_orbax = any("/orbax/" in frame.filename for frame in traceback.extract_stack())  # the first save cuts replicated arrays
    if "compile" in name and not by_orbax:
        seen.append(name)
jax.monitoring.register_event_duration_secs_listener(listen)
enter, export_run = interrupt.Interrupt.__enter__, export.export_run
def begin(self):
    print("compiled before the loop:", len(seen) > 0)
    seen.clear()
    return enter(self)
def end(*args):
    print("compiled since:", seen)
    return export_run(*args)
interrupt.Interrupt.__enter__, export.export_run = begin, end
"""  # noqa: E501


def reproducible(text):
    """A run's text without its command line, which options that change no result may be in, and its times."""
    text = re.sub("(?m)^    jaxft train .*$", "", text)
    return re.sub(r'(?m)^- Training took .*$|^  "perf": \{\n(.*\n)*?  \},\n', "", text)


def kill_hook(name, step, saved, number=signal.SIGKILL):
    """Code that ends the run `name` in its step `step`, once its checkpoint of step `saved` is complete."""
    return f"""
import os, time
from pathlib import Path
from jaxft.train.logs import meter
add = meter.Meter.add
def add_or_die(self, step, *args):
    if step + 1 == {step}:
        until = time.monotonic() + 60  # checkpoints are written in the background
        while {saved} and not Path("runs/{name}/checkpoints/{saved}").exists() and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), {int(number)})
    return add(self, step, *args)
meter.Meter.add = add_or_die
"""


def serve():
    """Start the server; Python 3.11's does not get this process's sys.path by itself."""
    expected = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TRANSFORMERS_VERBOSITY": "error",  # as terminal.quiet does, which here comes too late
    }
    before = {name: os.environ.get(name) for name in expected}
    os.environ.update(expected)
    SERVER.set_forkserver_preload(["tiny_run"])
    multiprocessing.forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def draw_nothing(path, panels, title, columns=3):
    """In place of charts.draw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not drawn")


def child(folder, streams, argv, environment, devices):
    """The body of a process: standard streams to files, then the script."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{streams}.{name}", os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(simulated_devices.environment(devices))
    os.environ.update(environment)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.argv = [str(ROOT / "scripts" / argv[0]), *argv[1:]]
    if "PICTURES" not in environment:  # drawing them takes a second, as long as a tiny run
        charts.draw = draw_nothing
    exec(environment["HOOK"], {})
    runpy.run_path(sys.argv[0], run_name="__main__")


class Place:
    """A working directory and the runs that are started in it."""

    def __init__(self, folder, streams="first"):
        self.folder, self.streams = folder, streams
        serve()

    def start(self, *argv, script="train.py", devices=1, hook="", **environment):
        """Begin `scripts/train.py --config config.py ...`; hook: Python to run first, to watch or break."""
        argv = [script, "--config", "config.py", *argv]
        for name in ("stdout", "stderr"):
            (self.folder / f"{self.streams}.{name}").write_bytes(b"")
        settings = {"HOOK": LOOP + hook, **environment}
        process = SERVER.Process(
            target=child, args=(self.folder, self.streams, argv, settings, devices), daemon=True
        )
        process.start()
        return process

    def run(self, *argv, **options):
        """The exit code of a whole run."""
        process = self.start(*argv, **options)
        process.join()
        return process.exitcode

    def run_with_a_kill(self, *argv, name):
        """Kill a run after its first checkpoint, then let the same command finish it."""
        process = self.start(*argv, f"name={name}")
        self.wait_for(process, lambda: 1 in self.checkpoints(name))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), self.err()
        assert self.run(*argv, f"name={name}") == 0, self.err()

    def out(self):
        return (self.folder / f"{self.streams}.stdout").read_text()

    def err(self):
        return (self.folder / f"{self.streams}.stderr").read_text()

    def loops(self):
        """Whether the newest process has begun its loop."""
        return "the loop begins" in self.out()

    def runs(self, name):
        return self.folder / "runs" / name

    def metrics(self, name):
        """metrics.jsonl without timings and memory."""
        lines = (self.runs(name) / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "perf"} for line in lines]

    def checkpoints(self, name):
        folder = self.runs(name) / "checkpoints"
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []

    def leaves(self, name, step):
        """Hashes of every array of a checkpoint."""
        manifest = json.loads((self.runs(name) / "checkpoints" / str(step) / "manifest.json").read_text())
        return {
            path: (leaf["dtype"], leaf["shape"], leaf["shards"]) for path, leaf in manifest["leaves"].items()
        }

    def results(self, name, step):
        """All that must be the same, however often a run was stopped."""
        return {"leaves": self.leaves(name, step), **self.outputs(name, name)}

    def outputs(self, name, hidden):
        """Metrics, weights, card and summary of a run, in whose texts the name `hidden` is NAME."""
        folder = self.runs(name)
        out = folder / ("adapter" if (folder / "adapter").is_dir() else "model")
        texts = [folder / text for text in ("README.md", "summary.json", "completions.jsonl")]
        texts.append(out / "README.md")
        return {
            "metrics": self.metrics(name),
            "files": {p.name: p.read_bytes() for p in out.iterdir() if p not in texts},
            **{
                str(p.relative_to(folder)): reproducible(p.read_text().replace(hidden, "NAME"))
                for p in texts
                if p.exists()
            },
        }

    def wait_for(self, process, condition, seconds=60):
        """Until the condition holds or the process has ended."""
        until = time.monotonic() + seconds
        while process.is_alive() and not condition():
            assert time.monotonic() < until, (self.out(), self.err())
            time.sleep(0.005)
