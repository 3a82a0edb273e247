"""Bad inputs as users and hostile files have them: exit code 1 and one line that names the place.

The cases are data in support/bad_*.py. They run in this process, as the commands' last lines do.
By default one case of each kind of mistake runs, QUICK_* in these files; the others are slow.
"""

import json
import os
import shutil

import jax
import pytest
from bad_files import (
    CONFIG_TEXTS,
    CONFIGS,
    PEFT,
    QUICK_CONFIGS,
    QUICK_PEFT,
    QUICK_RUNS,
    QUICK_TEMPLATES,
    RUNS,
    TEMPLATES,
    TOKENIZERS,
)
from bad_rows import FILES, GOOD, LINE, QUICK_ROWS, ROWS, TEXTS
from bad_settings import COMMANDS, QUICK_COMMANDS, QUICK_SETTINGS, SETTINGS
from fuzzing import bounded
from prepared import prepare
from scripts_in_process import call
from tiny_llama import tiny_torch, write_folder
from tiny_run import write_place
from tiny_tokenizers import tiny

from jaxft.cli import cli
from jaxft.data.chat import loss_mask, template
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, read_prompts
from jaxft.data.rows import row_files, shipped, text_files
from jaxft.data.sft import Rows
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.param_spec import init_params
from jaxft.nn.quant import quant_setting
from jaxft.runs import run_record, terminal
from jaxft.weights import pretrained
from jaxft.weights.hf import safetensors
from jaxft.weights.peft import peft_read, peft_write


def name_of(*parts, most=100):
    """The id of a case: its parts as text, each cut after `most` characters."""
    texts = [part if isinstance(part, str) else json.dumps(part) for part in parts]
    return " ".join(text if len(text) <= most else f"{text[:most]}..." for text in texts)


def assert_refused(capsys, work, word):
    """Check that a command that does `work` exits with 1 and one printable line with `word`."""

    def main():
        work()
        return 0

    capsys.readouterr()
    with bounded():
        code = terminal.one_line_errors(main)
    out, err = capsys.readouterr()
    assert code == 1 and not out, (code, out, err)
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert err.rstrip("\n").isprintable() and word in err, err
    return err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_place(folder)
    (folder / "folder").mkdir()
    (folder / "empty.jsonl").write_text("")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xfe")
    os.mkfifo(folder / "pipe.jsonl")
    return folder


@pytest.mark.quick_cases(*QUICK_SETTINGS)
@pytest.mark.parametrize(("argv", "word"), SETTINGS, ids=[argv for argv, _ in SETTINGS])
def test_settings(place, capsys, argv, word):
    line = assert_refused(capsys, lambda: prepare(place, *argv.split(" "), devices=1), word)
    assert "secret" not in line


def open_rows(kind, path):
    """Read and tokenise a file of rows as a run or the script that takes them does."""
    options, tokenizer = {"held_out": "none", "batch": 1, "max_length": 64}, tiny("chatml")
    if kind in ("pairs", "labels"):
        return PairRows(str(path), **options).open(tokenizer, 1)
    if kind == "prompts":
        return read_prompts(str(path), Prompts(str(path)).reader(tokenizer))
    return Rows(str(path), **options).open(tokenizer, 1)


def after_good_rows(kind, line):
    return "".join(json.dumps(GOOD[kind]) + "\n" for _ in range(2)) + line + "\n"


BAD_LINES = [*(("sft", text) for text in TEXTS), *((kind, json.dumps(row)) for kind, row in ROWS)]
BAD_ROWS = [*((kind, "rows.jsonl", after_good_rows(kind, line), LINE) for kind, line in BAD_LINES), *FILES]
ROW_NAMES = [
    *(name_of(kind, line) for kind, line in BAD_LINES),
    *(name_of(file, content if isinstance(content, str) else repr(content)) for _, file, content, _ in FILES),
]


@pytest.mark.quick_cases(*QUICK_ROWS)
@pytest.mark.parametrize(("kind", "name", "content", "word"), BAD_ROWS, ids=ROW_NAMES)
def test_rows(tmp_path, monkeypatch, capsys, kind, name, content, word):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(capsys, lambda: open_rows(kind, tmp_path / name), word)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    return write_folder(tmp_path_factory.mktemp("files") / "model", tiny_torch(num_hidden_layers=1))


BAD_CONFIGS = [*CONFIGS, *((text, "config.json") for text in CONFIG_TEXTS)]


@pytest.mark.quick_cases(*QUICK_CONFIGS)
@pytest.mark.parametrize(("changes", "word"), BAD_CONFIGS, ids=[name_of(what) for what, _ in BAD_CONFIGS])
def test_config_json(model, capsys, changes, word):
    path = model / "config.json"
    sound = path.read_text()
    text = changes if isinstance(changes, str) else json.dumps(json.loads(sound) | changes)

    def work():
        found = pretrained.model_for(str(model))
        pretrained.open_params(str(model), found)

    path.write_text(text, encoding="latin-1")
    try:
        assert_refused(capsys, work, word)
    finally:
        path.write_text(sound)


def test_a_safetensors_file_of_too_many_tensors_is_named_before_it_is_parsed(model, monkeypatch, capsys):
    """A header of 73 MiB takes the library 1.3 GB."""
    monkeypatch.setattr(safetensors, "HEADER_BYTES", 1000)
    monkeypatch.setattr(safetensors, "safe_open", None)
    assert_refused(capsys, lambda: pretrained.open_files(str(model)), "model.safetensors: its header has")


@pytest.mark.parametrize(
    "changes, word", TOKENIZERS, ids=[name_of(*changes, word) for changes, word in TOKENIZERS]
)
def test_tokenizers_that_make_texts_or_tables_grow(model, tmp_path, capsys, changes, word):
    shutil.copy(model / "tokenizer_config.json", tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads((model / "tokenizer.json").read_text()) | changes))
    line = assert_refused(capsys, lambda: pretrained.load_tokenizer(str(tmp_path)), "tokenizer.json: ")
    assert word in line and "use another tokenizer" in line


@pytest.mark.quick_cases(*QUICK_TEMPLATES)
@pytest.mark.parametrize("source", TEMPLATES, ids=map(name_of, TEMPLATES))
def test_chat_templates(monkeypatch, capsys, source):
    monkeypatch.setattr(template, "RENDER_SECONDS", 0.6)
    tokenizer = tiny.__wrapped__("chatml")
    tokenizer.chat_template = source
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    example = loss_mask.Chat("rows.jsonl:7", turns, 1)

    def work():
        for outcome in loss_mask.tokenise_examples([example], tokenizer):
            if isinstance(outcome, Exception):
                raise outcome

    assert_refused(capsys, work, "the chat template of the tokenizer")


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """(a tiny model, the folder of an adapter for it)."""
    found, settings = pretrained.model_for(str(model)), Adapter(rank=2)
    folder = tmp_path_factory.mktemp("files") / "run" / "adapter"
    fresh = init_params(adapter_specs(found.specs, settings), jax.random.key(0))
    peft_write.save_adapter(folder, fresh, settings, found, str(model))
    return found, folder


@pytest.mark.quick_cases(*QUICK_PEFT)
@pytest.mark.parametrize(("changes", "word"), PEFT, ids=[name_of(changes) for changes, _ in PEFT])
def test_peft_folders(adapter, capsys, changes, word):
    found, folder = adapter
    path = folder / "adapter_config.json"
    sound = path.read_text()
    path.write_text(json.dumps(json.loads(sound) | changes))
    try:
        assert_refused(capsys, lambda: peft_read.read_parts(folder, found), word)
    finally:
        path.write_text(sound)


@pytest.mark.quick_cases(*QUICK_RUNS)
@pytest.mark.parametrize(("name", "text", "word"), RUNS, ids=[name_of(*case[:2]) for case in RUNS])
def test_run_folders(adapter, capsys, name, text, word):
    folder = adapter[1].parent
    record = {"weights": "base", "model": {"dtype": "float32"}, "data": {"date": "26 Jul 2024"}}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "summary.json").write_text('{"steps": 1}')
    (folder / name).write_text(text, encoding="latin-1")

    def work():
        run_record.finished_steps(folder)
        quant_setting(None, run_record.trained_weights(folder)[2])

    assert_refused(capsys, work, word)


def test_lines_and_cells_that_are_too_large_are_named(tmp_path, monkeypatch, capsys):
    for module in (row_files, text_files):
        monkeypatch.setattr(module, "LINE_BYTES", 1000)
    long = {"prompt": "a" * 2000, "completion": "b"}
    (tmp_path / "rows.jsonl").write_text(after_good_rows("sft", json.dumps(long)))
    assert_refused(capsys, lambda: open_rows("sft", tmp_path / "rows.jsonl"), LINE)
    (tmp_path / "rows.csv").write_text("prompt,completion\na,b\n" + "a" * 2000 + ",b\n")
    assert_refused(capsys, lambda: open_rows("sft", tmp_path / "rows.csv"), "rows.csv:3")


def test_a_time_beyond_the_year_9999_is_named(tmp_path, capsys):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    times = pyarrow.array([0, 10**18], pyarrow.timestamp("us"))
    table = pyarrow.table({"prompt": ["a", "b"], "answer": ["c", "d"], "time": times})
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert_refused(capsys, lambda: open_rows("prompts", tmp_path / "rows.parquet"), "rows.parquet:2")


@pytest.mark.quick_cases(*QUICK_COMMANDS)
@pytest.mark.parametrize(("command", "word"), COMMANDS, ids=[command for command, _ in COMMANDS])
def test_commands(model, place, monkeypatch, capsys, command, word):
    monkeypatch.chdir(place)
    name, *argv = command.replace("MODEL", str(model)).split(" ")
    code, out, err = call(monkeypatch, capsys, name, *argv)
    assert code in (1, cli.WRONG_USAGE) and not out, (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err, err


def test_every_command_has_bad_inputs():
    assert {command.split()[0] for command in QUICK_COMMANDS} == {*shipped.COMMANDS.values()}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "x.safetensors"])
def test_a_pipe_in_a_folder_is_not_waited_for(model, tmp_path, capsys, name):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert_refused(capsys, lambda: pretrained.model_for(str(folder)), name)
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "summary.json")
    assert_refused(capsys, lambda: run_record.finished_steps(tmp_path / "run"), "summary.json")
