"""Prepare a run in the test's process, as scripts/train.py does: settings, rows and traced programs, no steps."""

import contextlib
from pathlib import Path
from unittest import mock

import jax

from jaxft.distributed import sharding
from jaxft.runs import folder as runfolder
from jaxft.runs.config import resolve_config
from jaxft.train import members
from jaxft.train.settings import Run


@contextlib.contextmanager
def working_directory(folder, devices=1):
    """Make `folder` the working directory, and jax's first devices its only ones."""
    own = jax.devices()[:devices]
    with contextlib.chdir(folder), mock.patch.object(jax, "devices", lambda *_: own):
        yield


def prepare(folder, *overrides, devices=1, load=False):
    """Return the job of `config.py` in a folder with the overrides of a command line.

    load: also load the weights. Raises what the script prints in one line.
    """
    with working_directory(folder, devices):
        settings = resolve_config("config.py", list(overrides), expected=Run)
        run = settings.value
        with jax.set_mesh(sharding.make_mesh(run.mesh)):
            job = members.prepare(run, settings.describe(), runfolder.folder_of(Path("runs"), run.name))
            if load:
                members.load_members(job, None)
    return job


def resume(folder, *overrides):
    """Prepare a run and compare it with the run of the same name in `runs/`: (steps of a finished one, changes)."""
    job = prepare(folder, *overrides)
    with working_directory(folder), contextlib.closing(members.open_checkpoints(job)) as checkpoints:
        return members.resume_point(job, checkpoints)
