"""scripts/sweep.py refuses a sweep that cannot be trained, in one line and before anything is loaded."""

import runpy
import sys
from pathlib import Path

import pytest

from jaxft.runs import cli

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sweep.py"


@pytest.fixture
def sweep(monkeypatch, capsys):
    """Run the script in this process; (exit code, stderr)."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--config", "configs/dpo.py", *argv])
        monkeypatch.setattr(sys, "path", list(sys.path))
        code = cli.one_line_errors(runpy.run_path(str(SCRIPT), run_name="sweep")["main"])
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--over", "beta"], "--over beta: expected knob=a,b,... such as beta=0.05,0.1"),
        (["--over", "beta=0.1,high"], "'high' is not a number; a sweep is over numeric knobs"),
        (["--over", "beta=0.1,0.10"], "a value is given twice"),
        (["--over", "beta=0.1,0.2", "name=mine"], "--name names a sweep's folder"),
        (["--over", "beta=0.1", "--over", "beta=0.2"], "--over beta is given twice"),
        (["--over", "bata=0.1,0.2"], "unknown key 'bata'; near: data, beta, batch"),
        (
            ["--over", "beta=0.1,0.2", "--over", "lr=1,2,3", "--together"],
            "the knobs have 2 (beta), 3 (lr) values",
        ),
        (["--over", f"beta={','.join(map(str, range(65)))}"], "65 runs at once are more than 64"),
        (
            ["--over", "beta=0.1,0.2", "--at-once", "0"],
            "2 adapters don't divide into blocks of 0; use one of 1, 2",
        ),
        (["--over", "beta=0.1,0.2,0.3", "--at-once", "2"], "3 adapters don't divide into blocks of 2"),
        (["--over", "batch=4,8"], "differ in data.batch: 4 -> 8"),
        (["--over", "epochs=1,2"], "differ in data.epochs"),
        (["--over", "lr=1,2", "full=true"], "leave out full=true"),
        (["--over", "lr=1,2", "adapter.dropout=0.1"], "adapter.dropout=0.1 is not possible in a sweep"),
        (
            ["--over", "seed=1,2", "held_out=0.2"],
            "data.held_out=0.2 is drawn by the seed, and the seeds differ",
        ),
    ],
)
def test_a_sweep_that_cannot_be_trained_is_a_one_line_error(sweep, argv, message):
    code, err = sweep(*argv)
    assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
