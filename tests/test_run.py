"""Laws of a whole run: stopped and gone on with is uninterrupted, a finished one stays, nothing compiles once it steps."""

import json
import os
import random
import signal
import time

import pytest
from tiny_run import Place, rows, write_place, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_place(folder)
    return Place(folder)


KINDS = {
    "lora": ["dropout=0.3", "batch=4", "micro=2", "loop.log_every=3", "loop.eval_every=2"],
    "full": ["full=true", "lr=0.001", "loop.save_every=2", "general=general.jsonl"],
}


def survives(place, kind, kills, seed, steps=5):
    """Kill -9 at random moments; the results must be those of a run that was left alone."""
    argv = [*KINDS[kind], f"steps={steps}"]
    assert place.run(*argv, f"name={kind}") == 0, place.err()
    name, rng = f"{kind}-{seed}", random.Random(seed)
    ended = None
    for _ in range(kills):
        process = place.start(*argv, f"name={name}")
        step = rng.randrange(steps + 1)
        saving = place.runs(name) / "checkpoints" / f"{step}.tmp"
        moments = [
            lambda: True,  # right after the start
            saving.exists,  # while it saves
            lambda: (place.runs(name) / "metrics.jsonl").exists(),
            lambda: bool(place.checkpoints(name)),
            lambda: step in place.checkpoints(name),
        ]
        place.wait_for(process, rng.choice(moments))
        time.sleep(rng.choice([0, 0.01, 0.05, 0.3]))
        process.kill()
        process.join()
        ended = process.exitcode
        assert ended in (-signal.SIGKILL, 0), place.err()
    assert place.run(*argv, f"name={name}") == 0, place.err()
    one, other = place.results(kind, steps), place.results(name, steps)
    for what in one:
        assert one[what] == other[what], what


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_ends_as_the_one_that_was_left_alone(place, kind):
    survives(place, kind, kills=4, seed=1)
