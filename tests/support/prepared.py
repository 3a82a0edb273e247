"""Runs in the test's process, as scripts/train.py does them: prepared without steps, or to their end."""

import contextlib
from pathlib import Path
from unittest import mock

import jax

from jaxft.distributed import sharding
from jaxft.runs import run_record
from jaxft.train import loop
from jaxft.train.compiled import compile_run
from jaxft.train.logs.clock import Clock
from jaxft.train.start import jobs, open_settings


@contextlib.contextmanager
def working_directory(folder, devices=1):
    """Make `folder` the working directory, and jax's first devices its only ones."""
    own = jax.devices()[:devices]
    with contextlib.chdir(folder), mock.patch.object(jax, "devices", lambda *_: own):
        yield


def prepare(folder, *overrides, devices=1):
    """Return the job of `config.py` in a folder with the overrides of a command line.

    Raises what the script prints in one line. devices: their number.
    """
    with working_directory(folder, devices):
        settings, _ = open_settings.fitted(open_settings.resolve("config.py", list(overrides)))
        run = settings.value
        with jax.set_mesh(sharding.make_mesh(run.mesh)):
            return jobs.prepare(run, settings.describe(), run_record.folder_of(Path("runs"), run.name))


def finished_run(folder, config, *overrides, devices=1):
    """Train the run of a configuration in a folder to its end, and return the run's folder."""
    with working_directory(folder, devices):
        settings, _ = open_settings.fitted(open_settings.resolve(config, list(overrides)))
        assert loop.run(settings.value, settings.describe(), Path("runs")) == 0
    return folder / "runs" / settings.value.name


def load_and_compile(folder, *overrides):
    """Prepare a run, load its weights and compile its programs."""
    job = prepare(folder, *overrides)
    with working_directory(folder), jax.set_mesh(sharding.make_mesh(job.lead.run.mesh)):
        _, frozen = jobs.load_members(job, None, print)
        compile_run(jobs.bind_sources(job, frozen, None), frozen, Clock())


def resume(folder, *overrides):
    """Prepare a run and compare it with that of the same name in `runs/`: (steps if finished, changes)."""
    job = prepare(folder, *overrides)
    with working_directory(folder), jobs.open_checkpoints(job) as (checkpoints, _):
        return jobs.resume_point(job, checkpoints)
