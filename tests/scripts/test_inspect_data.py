"""scripts/inspect_data.py shows exactly the trained tokens, from any folder, or fails with one line."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizers import tiny

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "inspect_data.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    tiny("llama3").save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    rows = [{"prompt": "what is a rank?", "completion": f" héllo 🙂 {i}"} for i in range(3)]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": }')
    return folder


@pytest.fixture
def inspect(place, monkeypatch, capsys):
    """Run the script in this process, in a folder that is not the repository; what it prints."""
    for name, value in {"JAXFT_CACHE": str(place / "cache"), "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(place)

    def run(*args):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
        monkeypatch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return run


DATA = ("--model", "model", "max_length=32", "held_out=none")


def test_trained_tokens_are_in_brackets(inspect):
    shown = inspect("--data", "r.jsonl", "--rows", "2", *DATA)
    assert shown.count("⟦") == 2 and "<|begin_of_text|>what is a rank?⟦ héllo 🙂 " in shown
    assert "<|eot_id|>⟧" in shown and "r.jsonl:" in shown and "row length" in shown


def test_loss_on_all_trains_every_token(inspect):
    assert "<|begin_of_text|>⟦what is a rank? héllo 🙂 " in inspect("--data", "r.jsonl", *DATA, "loss_on=all")


def test_colours_on_a_terminal(inspect, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = inspect("--data", "r.jsonl", *DATA)
    assert "\x1b[" in shown and "⟦" not in shown


def test_a_config_s_rows_are_printed_with_its_tokenizer(inspect):
    shown = inspect("--config", "configs/sft.py", "--rows", "1")
    assert shown.count("⟦") == 1 and "<|im_start|>assistant\n⟦" in shown


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--data", "bad.jsonl"], "bad.jsonl:1: malformed JSON"),
        (["--data", "none.jsonl"], "data 'none.jsonl' not found"),
        (["--data", "r.jsonl", "max_lenth=3"], "near: max_length"),
        (["--data", "r.jsonl", "max_length=x"], "max_length=x: expected int"),
        (["--data", "r.jsonl", "max_length=4"], "leaves no room for a response"),
    ],
)
def test_an_error_is_one_line_or_a_traceback_on_request(inspect, monkeypatch, args, error):
    with pytest.raises(SystemExit) as stop:
        inspect(*args, "--model", "model")
    assert error in stop.value.code and "\n" not in stop.value.code
    monkeypatch.setenv("JAXFT_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError)):
        inspect(*args, "--model", "model")


def test_the_exit_code_reports_a_failure(place):
    command = [sys.executable, str(SCRIPT), "--data", "bad.jsonl", "--model", "model"]
    done = subprocess.run(
        command,
        cwd=place,
        capture_output=True,
        text=True,
        env=os.environ | {"JAXFT_CACHE": str(place / "cache")},
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: bad.jsonl:1: malformed JSON")
        and done.stderr.count("\n") == 1
    )
