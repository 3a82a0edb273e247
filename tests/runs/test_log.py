"""Laws of the log: a resumed metrics.jsonl equals an uninterrupted one; the terminal view never garbles plain
output.
"""

import contextlib
import io
import json
import math
import os
import resource
import sqlite3
import struct
import subprocess
import sys
import types
from contextvars import ContextVar
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxft.objectives.alarms import Alarms, preference_alarms
from jaxft.runs import console as console_module
from jaxft.runs import metrics_log
from jaxft.runs.log import Log
from jaxft.train.logs.logs import Logs

ROOT = Path(__file__).resolve().parents[2]


def numbers(step: int) -> dict[str, float]:
    return {"loss": float(np.sin(step) ** 2 + 1 / 3), "learning_rate": 1e-4 / step, "num_tokens": 100 * step}


def work(folder: Path, first: int, last: int, before_step_1: bool = True, **settings) -> None:
    """The calls that a training run makes between two steps."""
    writer = Log(folder, total_steps=10, start_step=first, quiet=True, **settings)
    if first == 0 and before_step_1:
        writer.step(0, {"eval_loss": 2.5}, {})
    for step in range(first + 1, last + 1):
        writer.step(step, numbers(step), {"seconds": float(np.random.rand())})
        if step % 4 == 0:
            writer.step(step, {"eval_loss": 1 / step}, {})
    if last == 10:
        writer.step(10, {"eval_loss": 0.1, "general_loss": 3.0}, {})
    writer.close()


def lines(folder: Path) -> list[dict]:
    entries = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "perf"} for entry in entries]


@pytest.mark.parametrize(
    ("killed", "restored"), [(k, r) for k in (4, 8, 10) for r in (0, 1, 4, 7, 10) if r <= k]
)
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, killed, restored):
    work(tmp_path / "whole", 0, 10)
    work(tmp_path / "parts", 0, killed)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.')  # killed in the middle of a line
    work(tmp_path / "parts", restored, 10)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_run_that_ends_early_has_the_alarms_of_a_last_step_and_a_resumed_one_has_them_once(tmp_path):
    worse = {"eval_rewards/accuracies": 0.6, "eval_length/accuracy_if_longer_wins": 0.4}  # 0.6: shorter wins
    out = io.StringIO()
    writer = Log(tmp_path, total_steps=9, console=Console(file=out, width=200))
    writer.listen(partial(preference_alarms, 0.1))
    writer.step(2, worse, {})
    assert writer.alarms == []
    writer.ends_at(2)
    writer.step(2, {"loss": 0.7}, {})
    writer.step(2, {**worse, "general_loss": 3.0}, {})
    writer.close()
    (alarm,) = writer.alarms
    assert alarm.startswith("alarm after step 2: held-out accuracy is 0.60") and alarm in out.getvalue()
    assert [line.split()[1] for line in out.getvalue().splitlines() if line[:5] == "step "] == [
        "2/9", "2/2", "2/2"
    ]  # fmt: skip
    again = Log(tmp_path, total_steps=2, start_step=2, quiet=True)
    again.listen(partial(preference_alarms, 0.1))
    again.step(2, {**worse, "general_loss": 3.0}, {})
    again.close()
    assert again.alarms == [alarm]


def test_the_console_prints_an_accuracy_with_its_interval_and_its_number_of_pairs(tmp_path):
    out = io.StringIO()
    writer = Log(tmp_path, total_steps=2, console=Console(file=out, width=300))
    writer.step(0, {"eval_loss": 0.69, "eval_rewards/accuracies_pairs": 20.0}, {})
    writer.step(2, {"eval_rewards/accuracies": 0.55, "eval_rewards/accuracies_pairs": 20.0}, {})
    writer.step(2, {"rewards/accuracies": 0.5}, {})
    writer.close()
    ties, after, training = out.getvalue().splitlines()
    assert "accuracies" not in ties and after.endswith("accuracies 0.55 [0.34, 0.74] of 20 pairs")
    assert training.endswith("rewards/accuracies 0.5")


def test_a_line_half_written_is_dropped_though_it_is_json_so_far(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}')
    Log(tmp_path, 5, start_step=2, quiet=True).close()
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n'


def test_truncation_is_atomic_and_leaves_a_complete_file_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    text = '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'
    path.write_text(text)
    inode = path.stat().st_ino
    metrics_log.truncate(path, 2)
    assert path.stat().st_ino == inode and path.read_text() == text

    def fails(handle):
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no"):
        metrics_log.truncate(path, 1)
    assert path.read_text() == text  # a cut that fails changes nothing


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=200)
def test_a_float_comes_back_as_the_same_bits(value):
    parsed = json.loads(metrics_log.format_line(1, {"x": value}, {}))["x"]
    assert struct.pack("<d", parsed) == struct.pack("<d", value)


def test_float32_scalars_are_written_by_their_exact_value():
    value = np.float32(0.1)
    assert json.loads(metrics_log.format_line(1, {"x": value}, {}))["x"] == float(value)


def test_values_that_are_not_finite_are_null_and_the_line_is_json():
    text = metrics_log.format_line(
        1, {"a": math.nan, "b": math.inf, "c": np.float32(-np.inf), "d": 7}, {"mfu": math.nan}
    )
    parsed = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert parsed == {"step": 1, "a": None, "b": None, "c": None, "d": 7, "perf": {"mfu": None}}


def test_times_and_memory_are_nowhere_but_under_perf():
    entry = json.loads(metrics_log.format_line(3, {"loss": 1.0}, {"seconds": 2.0, "memory_gib": 1.0}))
    assert list(entry) == ["step", "loss", "perf"] and set(entry["perf"]) == {"seconds", "memory_gib"}
    assert "perf" not in json.loads(metrics_log.format_line(3, {"loss": 1.0}, {}))


@pytest.mark.parametrize("name", ["step", "perf"])
def test_a_metric_does_not_hide_the_step(name):
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        metrics_log.format_line(1, {name: 1.0}, {})


def records(path: Path) -> list[bytes]:
    """Records of length, crc, content, crc."""
    data, at, contents = path.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        contents.append(data[at + 12 : at + 12 + size])
        at += 16 + size
    return contents


def events(folder: Path) -> list[tuple[int, str, float]]:
    """All scalars of a TensorBoard folder."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = []
    for record in (r for path in sorted(folder.iterdir()) for r in records(path)):
        event = Event.FromString(record)
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        if event.session_log.status:
            scalars.append((event.step, "start", 0.0))
    return scalars


def test_the_tensorboard_file_is_what_tensorboardx_would_write(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import scalar

    writer = Log(tmp_path, 4, start_step=300, quiet=True)
    logged = {"loss": 0.5, "rewards/margins": -2.0, "zero": 0.0, "/a b+\u00fc": 1e-40, "long" * 50: 1e30}
    writer.step(2**40 + 1, logged, {})
    writer.close()
    (ours,) = (tmp_path / "tensorboard").iterdir()
    assert ours.name.startswith("events.out.tfevents.")
    theirs = RecordWriter(str(tmp_path / "theirs"))
    for record in records(ours):
        theirs.write(record)
    theirs.close()
    assert ours.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert records(ours)[0].endswith(b"brain.Event:2")
    version, start, *scalars = map(Event.FromString, records(ours))
    assert [event.SerializeToString() for event in (version, start, *scalars)] == records(ours)
    assert (version.step, start.step, start.session_log.status) == (0, 301, 1)
    expected = [scalar(tag, value) for tag, value in logged.items()]
    assert [event.summary for event in scalars] == expected
    assert {event.step for event in scalars} == {2**40 + 1}


def test_a_tensorboard_folder_on_a_full_disk_ends_the_run_and_never_hangs_it(tmp_path, monkeypatch):
    writer = Log(tmp_path, 50, quiet=True)
    folder = tmp_path / "tensorboard"
    size = max(p.stat().st_size for p in [*folder.iterdir(), tmp_path / "metrics.jsonl"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2000, hard))
    try:
        with pytest.raises(OSError, match="cannot write metrics"):
            for step in range(50):
                writer.step(step, {f"a{i}": 1.0 for i in range(9)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()


def test_tensorboard_has_every_finite_number_and_a_mark_where_the_run_went_on(tmp_path):
    first = Log(tmp_path, 4, quiet=True)
    first.step(1, {"loss": 0.5, "bad": math.nan}, {"mfu": 0.25})
    first.step(2, {"loss": 0.25}, {})
    assert (2, "loss", 0.25) in events(tmp_path / "tensorboard")  # before close: a killed run has it too
    first.close()
    second = Log(tmp_path, 4, start_step=1, quiet=True)
    second.step(2, {"loss": 0.125}, {})
    second.close()
    scalars = events(tmp_path / "tensorboard")
    assert {(1, "loss", 0.5), (1, "perf/mfu", 0.25), (2, "start", 0.0), (2, "loss", 0.125)} <= set(scalars)
    assert "bad" not in {tag for _, tag, _ in scalars}


def plain_log(folder: Path, **settings) -> tuple[Log, io.StringIO]:
    out = io.StringIO()
    return Log(folder, total_steps=20, console=Console(file=out, width=80), **settings), out


PERF = {"seconds": 0.5, "tokens_per_second": 1234.5, "mfu": 0.415, "memory_gib": 2.0}


def test_without_a_terminal_each_logged_step_is_one_plain_line(tmp_path):
    writer, out = plain_log(tmp_path)
    writer.message("hello [red]not markup[/red]")
    for step in (1, 2):
        writer.step(step, {**numbers(step), "grad_norm": 0.5, "rewards/margins": 1e-5, "skipped": 0.0}, PERF)
    writer.step(2, {"eval_loss": 2.25}, {})
    writer.close()
    said = out.getvalue().splitlines()
    assert len(said) == 4 and "\x1b" not in out.getvalue()
    assert said[0] == "hello [red]not markup[/red]"
    expected = (
        "step 1/20  loss 1.041  rewards/margins 1.00e-05  lr 1.00e-04  grad 0.5  1,234 tok/s  MFU 41.5%"
    )
    assert said[1].startswith(expected)
    # two steps took the 0.5 s of the first one's entry, so 18 more take 4.5 s
    assert said[2].endswith(("eta 0:04", "eta 0:05")) and said[3] == "step 2/20  eval loss 2.25"


def test_text_from_the_data_does_not_steer_the_terminal(tmp_path):
    writer, out = plain_log(tmp_path)
    writer.message("row 0: \x1b[2J\x07 two\nlines\tand a tab")
    writer.close()
    assert out.getvalue().expandtabs() == "row 0: \ufffd[2J\ufffd two\nlines\tand a tab\n".expandtabs()


def test_a_long_message_is_not_wrapped_and_quiet_says_nothing(tmp_path):
    writer, out = plain_log(tmp_path / "a")
    writer.message("x" * 300)
    assert out.getvalue() == "x" * 300 + "\n"
    writer.close()
    writer, out = plain_log(tmp_path / "b", quiet=True)
    writer.message("x")
    writer.step(1, {"loss": 1.0}, {})
    writer.close()
    assert out.getvalue() == "" and lines(tmp_path / "b") == [{"step": 1, "loss": 1.0}]


def test_the_console_prints_skipped_steps_if_there_are_any(tmp_path):
    writer, out = plain_log(tmp_path)
    writer.step(1, {"loss": 1.0, "skipped": 1.0}, {})
    writer.close()
    assert out.getvalue() == "step 1/20  loss 1  skipped 1\n"


def test_the_live_view_shows_progress_and_messages_and_gives_the_cursor_back(tmp_path):
    class Utf8(io.StringIO):
        encoding = "utf-8"

    out = Utf8()
    console = Console(
        file=out,
        force_terminal=True,
        width=100,
        record=True,
        legacy_windows=False,
        _environ={"TERM": "xterm"},
    )
    writer = Log(tmp_path / "my-run", total_steps=8, console=console)
    writer.message("above the view")
    for step in range(1, 9):
        writer.step(step, {**numbers(step), "skipped": 0.0}, PERF)
    writer.step(8, {"eval_loss": 1.5}, {})
    writer.close()
    writer.close()
    text, raw = console.export_text(), out.getvalue()
    assert "above the view" in text
    last = text[text.rindex("my-run") :]
    parts = ["8/8", "100%", "elapsed, eta 0:00", "loss 1.312", "eval loss 1.5", "lr 1.25e-05"]
    parts += ["1,234 tok/s", "MFU 41.5%", "2.00 GiB"]
    for part in parts:
        assert part in last, part
    assert any(block in last for block in console_module.BLOCKS)
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h") == 1
    assert "step 8/8" not in text  # no plain lines next to the live view


def test_the_view_fits_a_narrow_terminal(tmp_path):
    console = Console(
        file=io.StringIO(), force_terminal=True, width=40, record=True, _environ={"TERM": "xterm"}
    )
    writer = Log(tmp_path, total_steps=8, console=console)
    writer.step(1, numbers(1), PERF)
    writer.close()
    assert max(map(len, console.export_text().splitlines())) <= 40


@pytest.mark.slow
def test_an_ascii_pipe_as_standard_output_works(tmp_path):
    says = "w.message('caf\\u00e9 \\U0001f600'); w.step(1, {'loss': 1.5}, {}); w.close()"
    code = f"from jaxft.runs.log import Log; w = Log({str(tmp_path)!r}, 2); {says}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "caf? ?\nstep 1/2  loss 1.5\n"


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ""), ([1.0, 1.0], "▁▁"), ([0.0, 1.0, 0.5], "▁█▅"), ([math.nan, 0.0, 1.0], " ▁█"), ([math.inf], "")],
)
def test_sparkline(values, expected):
    assert console_module.sparkline(values) == expected


def test_a_metrics_file_that_cannot_be_written_is_one_line(tmp_path):
    writer = Log(tmp_path, 5, quiet=True)
    writer.step(1, {"loss": 1.0}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
    try:
        with pytest.raises(
            OSError, match=r"cannot write metrics: File too large. Free disk space, then repeat the command"
        ):
            writer.step(2, {"loss": 1.0}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()
    work(tmp_path, 1, 2, before_step_1=False)  # the broken end is cut, the run goes on
    assert [entry["step"] for entry in lines(tmp_path)] == [1, 2]


def test_an_unknown_or_missing_tracker_is_a_one_line_error_before_anything_starts(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="trackers has 'neptune'; use mlflow, tensorboard, trackio, wandb"):
        Log(tmp_path, 5, trackers=("neptune",))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"'wandb', which is not installed .*pip install 'jaxft\[track\]'"):
        Log(tmp_path, 5, trackers=("wandb",))


def fake_mlflow(calls):
    """A module with the parts of MLflow that the tracker uses, which records what is sent."""

    class Client:
        def get_experiment_by_name(self, name):
            calls.append(("mlflow experiment", name))

        def create_experiment(self, name):
            return "new"

        def create_run(self, experiment, run_name, tags):
            calls.append(("mlflow create", experiment, run_name, tags))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run 7"))

        def update_run(self, run_id, status):
            assert (run_id, status) == ("run 7", "RUNNING")

        def log_batch(self, run_id, metrics=(), params=()):
            calls.append(("mlflow params", dict(params)) if params else ("mlflow", run_id, metrics))

        def log_artifacts(self, run_id, folder, name):
            calls.append(("mlflow artifact", Path(folder), name))

        def set_terminated(self, run_id, status):
            calls.append(("mlflow end", run_id, status))

    def metric(name, value, milliseconds, step):
        assert milliseconds > 1.5e12
        return name, value, step

    return types.SimpleNamespace(
        MlflowClient=Client,
        entities=types.SimpleNamespace(Metric=metric, Param=lambda key, value: (key, value)),
        exceptions=types.SimpleNamespace(MlflowException=OSError),
    )


def test_an_mlflow_server_that_fails_ends_a_start_in_one_line_but_no_run(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("refused:\nMax retries")

    calls: list[tuple] = []
    module = fake_mlflow(calls)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    writer = Log(tmp_path / "r", 5, quiet=True, trackers=("mlflow",))
    monkeypatch.setattr(module.MlflowClient, "log_batch", fail)
    for step in (1, 2):
        writer.step(step, {"loss": 1.5}, {})
    writer.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert "Max retries; MLflow gets no metrics from step 1 on, metrics.jsonl has all" in line
    assert [entry["step"] for entry in metrics_log.read_entries(tmp_path / "r" / "metrics.jsonl")] == [1, 2]
    monkeypatch.setattr(module.MlflowClient, "get_experiment_by_name", fail)
    with pytest.raises(ValueError, match=r"trackers=mlflow: refused: Max retries\. Set MLFLOW_TRACKING_URI"):
        Log(tmp_path / "q", 5, quiet=True, trackers=("mlflow",))


def test_trackers_get_every_step_and_the_same_run_after_a_restart(tmp_path, monkeypatch):
    calls: list[tuple] = []
    install_fakes(monkeypatch, calls)
    chosen = ("wandb", "trackio", "mlflow", "tensorboard")
    for first, end in enumerate(("failed", "stopped", "finished")):
        writer = Log(tmp_path / "r", 5, start_step=first, quiet=True, trackers=chosen)
        writer.step(first + 1, {"loss": 1.5, "kl": math.nan}, {"mfu": 0.5})
        if end != "failed":  # as a run that an exception ends
            Logs([writer]).mark(end)
        writer.close()
    logged = {c[0]: c[-1] for c in calls if c[0] in ("wandb", "trackio")}
    assert {k: v for k, v in logged["wandb"].items() if k != "kl"} == {
        "loss": 1.5,
        "perf/mfu": 0.5,
        "step": 3,
    }
    assert {k: v for k, v in logged["trackio"].items() if k != "kl"} == {"loss": 1.5, "perf/mfu": 0.5}
    assert [c for c in calls if c[0] == "mlflow create"] == [("mlflow create", "new", "r", {})]
    assert [c[1:] for c in calls if c[0] == "mlflow"] == [
        ("run 7", [("loss", 1.5, step), ("perf/mfu", 0.5, step)]) for step in (1, 2, 3)
    ]
    ends = [c[1:] for c in calls if c[0] == "mlflow end"]
    assert ends == [("run 7", "FAILED"), ("run 7", "KILLED"), ("run 7", "FINISHED")]
    assert len(list((tmp_path / "r" / "tensorboard").iterdir())) >= 1
    assert [c[1] for c in calls if c[0] == "wandb finish"] == [1, 1, 0]
    assert [c[0] for c in calls].count("trackio finish") == 3
    assert len({c[1]["id"] for c in calls if c[0] == "init"}) == 1
    assert {c[1]["resume"] for c in calls if c[0] in ("init", "trackio init")} == {"allow"}


def install_fakes(monkeypatch, calls):
    """Replace the packages of the trackers by ones that record what is sent."""

    class Artifact:
        def __init__(self, name, type):
            self.name, self.type = name, type

        def add_dir(self, folder):
            self.folder = Path(folder)

    run = types.SimpleNamespace(
        id="w1",
        define_metric=lambda name, step_metric: calls.append(("define", name, step_metric)),
        log=lambda values: calls.append(("wandb", values)),
        log_artifact=lambda one: calls.append(("wandb artifact", one.name, one.type, one.folder)),
        finish=lambda exit_code: calls.append(("wandb finish", exit_code)),
    )
    wandb = types.SimpleNamespace(
        init=lambda **settings: calls.append(("init", settings)) or run, Artifact=Artifact
    )
    trackio = types.SimpleNamespace(
        init=lambda **settings: calls.append(("trackio init", settings)),
        log=lambda values, step: calls.append(("trackio", step, values)),
        log_artifact=lambda path, name, type: calls.append(("trackio artifact", name, type, Path(path))),
        finish=lambda: calls.append(("trackio finish",)),
    )
    for name, module in {"wandb": wandb, "trackio": trackio, "mlflow": fake_mlflow(calls)}.items():
        monkeypatch.setitem(sys.modules, name, module)


def tracked(folder, monkeypatch, end="finished", **settings):
    """Calls of the trackers by name, for a run with an adapter and these settings in its config.json."""
    calls: list[tuple] = []
    install_fakes(monkeypatch, calls)
    (folder / "adapter").mkdir(parents=True)
    record = {"seed": 3, "optim": {"lr": 0.1, "b1": None}, "tracking": settings}
    (folder / "config.json").write_text(json.dumps(record))
    writer = Log(folder, 5, quiet=True, trackers=("wandb", "trackio", "mlflow"))
    writer.mark(end)
    writer.close()
    return {call[0]: call[1:] for call in calls}


@pytest.fixture
def no_variables(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_RUN_GROUP", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_variables")
def test_trackers_get_the_settings_where_a_run_is_filed_and_the_adapter_at_the_end(tmp_path, monkeypatch):
    folder = tmp_path / "r"
    calls = tracked(folder, monkeypatch, project="team", group="lr", tags=["a", "b"])
    (wandb,), (trackio,) = calls["init"], calls["trackio init"]
    assert (wandb["project"], wandb["group"], wandb["tags"]) == ("team", "lr", ("a", "b"))
    assert wandb["config"]["optim"]["lr"] == 0.1 and wandb["allow_val_change"]
    assert (trackio["project"], trackio["group"], trackio["name"]) == ("team", "lr", "r")
    assert trackio["config"]["optim.lr"] == 0.1 and "optim.b1" not in trackio["config"]
    assert calls["mlflow experiment"] == ("team",)
    assert calls["mlflow create"][2] == {"a": "true", "b": "true", "group": "lr"}
    assert calls["mlflow params"][0]["optim.lr"] == "0.1" and calls["mlflow params"][0]["seed"] == "3"
    adapter = folder / "adapter"
    assert calls["wandb artifact"] == ("w1-adapter", "model", adapter)
    assert calls["trackio artifact"] == ("r-adapter", "model", adapter)
    assert calls["mlflow artifact"] == (adapter, "adapter")


@pytest.mark.usefixtures("no_variables")
def test_each_member_of_a_sweep_is_a_run_of_the_trackers_in_a_group_named_like_the_sweep(
    tmp_path, monkeypatch
):
    (tmp_path / "beta").mkdir()
    (tmp_path / "beta" / "config.json").write_text(json.dumps({"members": ["beta=1", "beta=2"]}))
    calls = tracked(tmp_path / "beta" / "beta=1", monkeypatch)
    for name in ("init", "trackio init"):
        assert (calls[name][0]["name"], calls[name][0]["group"]) == ("beta=1", "beta")
    assert calls["mlflow create"][1:] == ("beta=1", {"group": "beta"})
    assert calls["init"][0]["reinit"] == "create_new"  # the runs of the other members go on
    assert tracked(tmp_path / "beta" / "beta=2", monkeypatch, group="g")["init"][0]["group"] == "g"
    (wandb,) = tracked(tmp_path / "beta" / "other", monkeypatch)["init"]  # no member
    assert wandb["group"] is None and wandb["reinit"] is None


def test_trackio_runs_are_open_at_the_same_time(tmp_path, monkeypatch):
    present, logged = ContextVar("present", default=None), []

    def init(name, **settings):
        assert present.get() is None, "trackio.init ends the present run"
        present.set(name)

    module = types.SimpleNamespace(
        init=init, log=lambda values, step: logged.append((present.get(), values["loss"])),
        finish=lambda: logged.append((present.get(), "finish")),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "trackio", module)
    one, two = (Log(tmp_path / name, 5, quiet=True, trackers=("trackio",)) for name in "ab")
    for log, loss in ((one, 1.0), (two, 2.0), (one, 3.0)):
        log.step(int(loss), {"loss": loss}, {})
    one.close(), two.close()
    assert logged == [("a", 1.0), ("b", 2.0), ("a", 3.0), ("a", "finish"), ("b", "finish")]


@pytest.mark.usefixtures("no_variables")
@pytest.mark.parametrize("options", [{"end": "failed"}, {"end": "stopped"}, {"artifact": False}])
def test_no_adapter_is_uploaded_of_a_run_that_is_not_finished_or_without_the_setting(
    tmp_path, monkeypatch, options
):
    assert not [name for name in tracked(tmp_path / "r", monkeypatch, **options) if "artifact" in name]


@pytest.mark.usefixtures("no_variables")
def test_a_project_is_that_of_the_setting_then_of_the_environment_then_jaxft(tmp_path, monkeypatch):
    def projects(name, **settings):
        calls = tracked(tmp_path / name, monkeypatch, **settings)
        return calls["init"][0]["project"], calls["mlflow experiment"][0]

    assert projects("a") == ("jaxft", "jaxft")
    monkeypatch.setenv("WANDB_PROJECT", "w")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "m")
    assert projects("b") == ("w", "m")
    assert projects("c", project="team") == ("team", "team")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "17")
    assert tracked(tmp_path / "d", monkeypatch)["mlflow create"][0] == "17"


REAL = {  # package -> variables, and files below the working directory that name the adapter's files
    "wandb": ({"WANDB_MODE": "offline", "WANDB_SILENT": "true"}, "r/wandb/offline-run-*/*.wandb"),
    "mlflow": ({"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_TRACKING_URI": "mlruns"}, None),
    "trackio": ({"TRACKIO_DIR": "trackio"}, "trackio/team.db"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_trackers_own_packages_store_metrics_settings_and_adapter(tmp_path, name):
    """In a process of its own, because they keep global state; without a server."""
    pytest.importorskip(name)
    variables, files = REAL[name]
    (tmp_path / "r" / "adapter").mkdir(parents=True)
    (tmp_path / "r" / "adapter" / "adapter_config.json").write_text("{}")
    record = {"seed": 3, "optim": {"lr": 0.25}, "long": "x" * 9000}
    record["tracking"] = {"project": "team", "group": "g", "tags": ["a"], "artifact": True}
    (tmp_path / "r" / "config.json").write_text(json.dumps(record))
    lines = (
        "from pathlib import Path; from jaxft.runs.log import Log",
        "for step, end in enumerate(('stopped', 'finished')):",
        f"    log = Log(Path('r'), 2, step, True, ({name!r},))",
        "    log.step(step + 1, {'loss': 1.5, 'kl': float('nan')}, {'mfu': 0.5})",
        "    log.mark(end); log.close()",
    )
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not uploaded" not in done.stderr
    if files is not None:
        stored = b"".join(path.read_bytes() for path in tmp_path.glob(files))
        assert b"adapter" in stored and b"team" in stored and b"0.25" in stored
        return
    (run,) = (tmp_path / "mlruns").glob("*/*/params/optim.lr")
    run = run.parents[1]
    assert (run / "params" / "optim.lr").read_text() == "0.25"
    assert [line.split()[1:] for line in (run / "metrics" / "loss").read_text().splitlines()] == [
        ["1.5", "1"],
        ["1.5", "2"],
    ]
    assert (run / "artifacts" / "adapter" / "adapter_config.json").exists()
    assert (run / "tags" / "group").read_text() == "g" and (run / "tags" / "a").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_members_of_a_sweep_are_runs_of_the_trackers_own_packages_at_the_same_time(tmp_path, name):
    pytest.importorskip(name)
    variables, _ = REAL[name]
    labels = ["lr=1", "lr=2"]
    for label in labels:
        (tmp_path / "s" / label).mkdir(parents=True)
        (tmp_path / "s" / label / "config.json").write_text('{"tracking": {"project": "team"}}')
    (tmp_path / "s" / "config.json").write_text(json.dumps({"members": labels}))
    lines = (
        "from pathlib import Path; from jaxft.runs.log import Log",
        f"logs = [Log(Path('s') / x, 2, 0, True, ({name!r},)) for x in {labels}]",
        "for step in (1, 2):",
        "    for number, log in enumerate(logs): log.step(step, {'loss': 10.0 * number + step}, {})",
        "for log in logs: log.mark('finished'); log.close()",
    )
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"lr=1": [1.0, 2.0], "lr=2": [11.0, 12.0]}
    if name == "wandb":
        files = {path.parents[2].name: path.read_bytes() for path in tmp_path.glob("s/*/wandb/*/*.wandb")}
        assert files.keys() == expected.keys() and all(b"lr=" in text for text in files.values())
    elif name == "mlflow":
        runs = [path.parent.parent for path in (tmp_path / "mlruns").glob("*/*/metrics/loss")]
        assert {(run / "tags" / "group").read_text() for run in runs} == {"s"}
        logged = {
            (run / "tags" / "mlflow.runName").read_text(): [
                float(line.split()[1]) for line in (run / "metrics" / "loss").read_text().splitlines()
            ]
            for run in runs
        }
        assert logged == expected
    else:
        with contextlib.closing(sqlite3.connect(tmp_path / "trackio" / "team.db")) as db:
            rows = db.execute("select run_name, metrics from metrics order by step").fetchall()
        logged = {label: [json.loads(text)["loss"] for run, text in rows if run == label] for label in labels}
        assert logged == expected


def test_an_upload_that_fails_is_reported_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no\nspace")

    module = fake_mlflow([])
    monkeypatch.setattr(module.MlflowClient, "log_artifacts", fail)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    (tmp_path / "adapter").mkdir()
    writer = Log(tmp_path, 5, quiet=True, trackers=("mlflow",))
    writer.mark("finished")
    writer.close()
    assert "trackers=mlflow: the adapter is not uploaded: no space" in capsys.readouterr().err


MINE = """
from jaxft.runs.trackers import with_perf

class Mine:
    def __init__(self, path):
        self.path = path
    def log(self, step, metrics, perf):
        with self.path.open("a") as file:
            file.write(f"{step} {with_perf(metrics, perf)}\\n")
    def close(self, end):
        self.path.write_text(self.path.read_text() + "closed")

def open_mine(folder, start_step):
    return Mine(folder / "mine.txt")
"""


def test_a_new_tracker_is_one_file(tmp_path):
    (tmp_path / "json_mine.py").write_text(MINE)
    writer = Log(tmp_path / "r", 5, quiet=True, trackers=(f"{tmp_path}/json_mine.py:open_mine",))
    writer.step(1, {"loss": 1.5}, {"mfu": 0.5})
    writer.close()
    assert (tmp_path / "r" / "mine.txt").read_text() == "1 {'loss': 1.5, 'perf/mfu': 0.5}\nclosed"


def test_alarms_are_in_a_file_as_soon_as_they_are_raised_and_once(tmp_path):
    def alarms(memory, entry, last):
        return Alarms({}, [], ["too high"] if entry.get("loss", 0) > 2 else [])

    def log_from(step):
        writer = Log(tmp_path, 5, start_step=step, quiet=True)
        writer.listen(alarms)
        return writer

    def known():
        return json.loads((tmp_path / "alarms.json").read_text())["alarms"]

    writer = log_from(0)
    assert not (tmp_path / "alarms.json").exists()
    writer.step(1, {"loss": 3.0}, {})
    assert known() == writer.alarms == ["alarm after step 1: too high"]
    writer.step(2, {"loss": 4.0}, {})
    writer.close()
    writer = log_from(1)  # killed after its checkpoint of step 1
    assert known() == ["alarm after step 1: too high"]
    writer.add_alarms(["not finished"])
    writer.close()
    assert known() == ["alarm after step 1: too high", "not finished"]
    log_from(0).close()
    assert not (tmp_path / "alarms.json").exists()


def test_completions_that_were_lost_are_reported_like_metrics(tmp_path):
    path, entry = tmp_path / "completions.jsonl", '{{"step": {}, "completion": "{}"}}\n'
    path.write_text("from another start\n")
    log = Log(tmp_path, 40, quiet=True)
    assert log.sync()["completions"] == {"entries": 0, "steps": []}
    for steps in ([1, 1], [5, 9], [13]):
        with path.open("a") as file:
            file.writelines(entry.format(step, "\u2028é") for step in steps)
        logged = log.sync()
    log.close()
    assert logged["completions"] == {"entries": 5, "steps": [[1, 13, 4]]}

    def missing(start_step=13, logged=logged):
        log = Log(tmp_path, 40, start_step, quiet=True)
        log.close()
        return log.missing(logged)

    assert missing() == []
    path.write_text("".join(entry.format(step, "") for step in (1, 9, 13)))
    assert missing() == [f"warning: {path} has lost steps 5; the log goes on without them"]
    del logged["completions"]  # an older checkpoint
    assert missing() == []


def test_entries_that_a_log_has_lost_are_named_by_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [0, 10, 20, 20, 25, 30, 31, 32]
    path.write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    logged = metrics_log.Jsonl(path, 40).steps.logged()
    assert logged == {"entries": 8, "steps": [[0, 20, 10], [25, 30, 5], [31, 32, 1]]}
    assert metrics_log.Jsonl(path, 40).steps.missing(logged) == ""
    for kept, lost in (
        ([0], "steps 10-20 (every 10), 25-30 (every 5), 31-32"),
        ([0, 10, 20, 25, 30, 31, 32], "1 of 8 entries"),
        ([0, 10, 20, 20, 25, 30, 32, 33], "steps 31"),
        ([*steps, 33], ""),
    ):
        path.write_text("".join(f'{{"step": {step}}}\n' for step in kept))
        assert metrics_log.Jsonl(path, 40).steps.missing(logged) == lost
