"""User errors: one line that names the file, row or setting; exit code 1; earlier checkpoints stay intact."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meters import feed, make_meter
from prepared import load_and_compile, prepare, working_directory
from safetensors.numpy import load_file, save_file
from tiny_llama import edit_config, tiny_torch, write_folder
from tiny_run import Place, rows, write_place

from jaxft.data.pairs import PairRows
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.attention import attention
from jaxft.nn.attention.flash_attention import flash
from jaxft.nn.attention.layer_attention import LayerKind
from jaxft.nn.param_spec import init_params
from jaxft.nn.rope import Rope
from jaxft.runs import run_record
from jaxft.runs.settings.config import resolve_config
from jaxft.train import loop
from jaxft.train.logs.logs import startup_lines
from jaxft.train.start.attention_kernels import attention_summary, check_attention
from jaxft.weights import pretrained
from jaxft.weights.peft import peft_write


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sad")
    write_place(folder)
    return Place(folder)


def fails(place, *argv, **options):
    """Run a script that must fail with exit code 1 and return its one line on stderr."""
    assert place.run(*argv, **options) == 1, place.out() + place.err()
    line = place.err()
    assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line[:2000]
    assert "Traceback" not in line and "Traceback" not in place.out()
    return line


def assert_refused(place, message, *argv, **options):
    """Check that the run raises a user's error with this message before any step, in the test's process."""
    with pytest.raises((ValueError, OSError), match=message):
        prepare(place.folder, *argv, **options)


def test_a_user_error_is_one_line_and_exit_code_1(place):
    assert "error: data 'missing.jsonl' not found" in fails(place, "data=missing.jsonl")


DATA = {
    "malformed": (
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "compl\n',
        [],
        r"bad\.jsonl:2: malformed JSON",
    ),
    "column": (
        '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n',
        [],
        r"bad\.jsonl:2: no column completion",
    ),
    "columns": (
        '{"title": "a", "body": "b"}\n',
        [],
        r"bad\.jsonl:1: the columns title, body fit no format; accepted are",
    ),
    "empty row": ('{"prompt": "a", "completion": "b"}\n{}\n', [], r"bad\.jsonl:2: the row is empty"),
    "empty column": (
        '{"prompt": "a", "completion": ""}\n' * 2,
        [],
        r"bad\.jsonl:1: column 'completion' is empty",
    ),
    "too long": (
        json.dumps({"prompt": "a" * 70, "completion": "b"}) + "\n",
        ["data.too_long=error"],
        r"bad\.jsonl:1.*64",
    ),
    "long prompt": (
        json.dumps({"prompt": "a" * 70, "completion": "b"}) + "\n",
        [],
        r"bad\.jsonl: all 1 rows were dropped because they are longer than data.max_length=64",
    ),
    "no answer": (
        '{"messages": [{"role": "user", "content": "a"}]}\n' * 2,
        ["data.format=auto"],
        r"bad\.jsonl:1: the loss mask is empty",
    ),
    "no rows": ("", [], r"bad\.jsonl: the dataset has no rows"),
}


def test_the_first_lines_of_a_run_name_the_attention_kernel(place):
    job = prepare(place.folder)
    with working_directory(place.folder), jax.set_mesh(job.lead.programs.mesh):
        assert "attention: blockwise XLA (flash)" in startup_lines(job, 0, [])
    branched = replace(job.abstract_batch, branches=job.abstract_batch.ids)
    line = attention_summary(job.lead.programs, branched)
    assert line == "attention: blockwise XLA (flash)"


def test_the_first_lines_of_a_run_say_why_responses_do_not_share_prompts(place):
    job = prepare(place.folder)
    run = job.lead.run
    rope = Rope(kind="dynamic", factor=2.0, original_max_positions=32)
    model = replace(run.model, attention=replace(run.model.attention, kinds=(LayerKind(rope),)))

    def lines(model):
        own = replace(job.members[0], run=replace(run, model=model, data=PairRows("x", max_length=33)))
        with working_directory(place.folder):
            found = startup_lines(replace(job, members=(own,)), 0, [])
        return own.run.data.layout, [line for line in found if "data.layout=plain" in line]

    assert lines(run.model) == ("auto", [])
    layout, (line,) = lines(model)
    assert layout == "plain" and "the model's rope depends on the length of a text" in line


@pytest.mark.parametrize("case", DATA)
def test_invalid_rows_are_named_by_file_and_line(place, case):
    text, argv, message = DATA[case]
    (place.folder / "bad.jsonl").write_text(text)
    assert_refused(place, message, "data=bad.jsonl", *argv)


def test_rows_that_are_left_out_are_in_the_first_lines_of_a_run(place):
    lines = [
        *map(json.dumps, rows()),
        DATA["malformed"][0].splitlines()[1],
        '{"prompt": "a", "completion": " "}',
    ]
    (place.folder / "dirty.jsonl").write_text("\n".join(lines))
    assert_refused(place, r"dirty\.jsonl:41: malformed JSON.*; data\.invalid=drop", "data=dirty.jsonl")
    job = prepare(place.folder, "data=dirty.jsonl", "data.invalid=drop")
    with working_directory(place.folder), jax.set_mesh(job.lead.programs.mesh):
        (line,) = [line for line in startup_lines(job, 0, []) if "left out" in line]
    header, *reasons = line.splitlines()
    assert header == "2 invalid rows left out (data.invalid):" and len(reasons) == 2
    assert reasons[0].startswith("      1  malformed JSON: dirty.jsonl:41: malformed JSON, ")
    assert reasons[1].startswith(
        "      1  empty column 'completion': dirty.jsonl:42: column 'completion' is empty"
    )


SETTINGS = {
    "unknown knob": (["epoch=1"], r"unknown key 'epoch'; near: .*epochs"),
    "unknown field": (["optim.clipp=1"], r"optim\.clip"),
    "wrong type": (["lr=fast"], r"lr=fast: expected float"),
    "wrong dotted type": (["loop.save_every=often"], r"loop\.save_every=often: expected int"),
    "no cadence": (["loop.log_every=0"], r"loop\.log_every=0; expected at least 1"),
    "trace": (["loop.profile=9,3"], r"loop\.profile=9:3; expected the first and the last step"),
    "no model": (["model=missing/"], r"missing"),
    "no data": (["data=missing.jsonl"], r"missing\.jsonl.* not found"),
    "adapter matches nothing": (["adapter.targets=layers/attn/z"], r"matches no kernel.*layers/attn/q"),
    "adapter name": (["adapter.targets=q_porj,v"], r"'q_porj' is not a linear layer; near: .*q_proj"),
    "trained pattern": (["train=adapter/nothing"], r"adapter/nothing"),
    "micro": (["batch=6", "micro=4"], r"data\.batch=6 is not divisible by data\.micro=4"),
    "name": (["name=../out"], r"name='\.\./out' is not the name of a folder"),
    "samples": (["samples=-1"], r"samples=-1; expected at least 0"),
    "epochs": (["epochs=inf"], r"data\.epochs=inf; expected a finite number above 0, or none"),
    "mesh": (["mesh.data=3"], r"needs 3 devices, got 4", 4),
    "heads on a mesh": (
        ["mesh.tensor=4", "mesh.data=1"],
        r"2 kv heads do not divide over tensor=4; use one of \(1, 2\)",
        4,
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_invalid_settings_are_named(place, case):
    argv, message, *devices = SETTINGS[case]
    assert_refused(place, message, *argv, devices=devices[0] if devices else 1)


def break_model(folder, kind):
    """Damage the files of a model."""
    weights, tensors = folder / "model.safetensors", load_file(folder / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    if kind == "missing":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "garbled":
        weights.write_bytes(b"\xff" * 64)
    elif kind == "shape":
        save_file({**tensors, down: tensors[down][:, :-1].copy()}, weights)
    elif kind == "tensor":
        save_file({name: t for name, t in tensors.items() if name != down}, weights)
    elif kind == "config":
        (folder / "config.json").write_text("{")
    elif kind == "unknown":
        edit_config(folder, model_type="mamba")
    elif kind == "tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif kind == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    else:
        small = {
            n: t[:250].copy() if n in ("model.embed_tokens.weight", "lm_head.weight") else t
            for n, t in tensors.items()
        }
        save_file(small, weights)
        edit_config(folder, vocab_size=250, bos_token_id=0, eos_token_id=0)


MODELS = {
    "missing": r"no .*safetensors|safetensors.*(missing|no such)",
    "truncated": r"model\.safetensors: not a complete safetensors file",
    "garbled": r"model\.safetensors",
    "shape": r"down_proj.*\(64, 95\).*\(64, 96\)",
    "tensor": r"model\.layers\.1\.mlp\.down_proj\.weight",
    "config": r"config\.json.*JSON",
    "unknown": r"model_type 'mamba' is not supported",
    "tokenizer": r"tokenizer",
    "pickle": r"pytorch_model\.bin.*pickle",
    "vocabulary": r"the tokenizer produces token id 257, but the model has embeddings for 0 to 249",
}


@pytest.mark.parametrize("kind", MODELS)
def test_damaged_model_files_are_named(place, kind):
    folder = place.folder / f"model-{kind}"
    shutil.copytree(place.folder / "base", folder)
    break_model(folder, kind)
    with pytest.raises((ValueError, OSError), match=MODELS[kind]):
        load_and_compile(place.folder, f"model={folder.name}")


def test_jaxft_traceback_adds_the_traceback(place):
    assert place.run("name=traced", "data=missing.jsonl", JAXFT_TRACEBACK="1") == 1
    assert "Traceback" in place.err() and place.err().splitlines()[-1].startswith(
        "error: data 'missing.jsonl' not found"
    )


LIMIT = """
import resource, signal
from jaxft.runs import checkpoint
save = checkpoint.Checkpoints.save
def limited(self, step, *rest):
    if step == 3:
        self.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return save(self, step, *rest)
checkpoint.Checkpoints.save = limited
"""
FILL = """
from pathlib import Path
from jaxft.runs import checkpoint
save = checkpoint.Checkpoints.save
def filled(self, step, *rest):
    if step == 3:
        self.wait()
        with open("runs/filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    return save(self, step, *rest)
checkpoint.Checkpoints.save = filled
"""


def assert_intact(place, name, steps):
    """Check that a run has the complete checkpoints of these steps, and no others."""
    assert place.checkpoints(name) == steps
    for step in steps:
        assert place.leaves(name, step)


def test_a_failed_checkpoint_write_leaves_earlier_checkpoints_intact(place):
    line = fails(place, "name=limited", hook=LIMIT)
    assert "checkpoint of step 3 was not written" in line and "checkpoints of steps 1, 2 are intact" in line
    assert_intact(place, "limited", [1, 2])
    assert place.run("name=limited") == 0 and "resuming after step 2" in place.out(), place.err()


@pytest.mark.slow
def test_a_full_disk_leaves_earlier_checkpoints_intact_and_the_run_resumes_once_there_is_space(
    place, tmp_path
):
    place = Place(tmp_path)
    write_place(tmp_path)
    (tmp_path / "runs").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path / "runs"], capture_output=True
    ).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        line = fails(place, "name=full", hook=FILL)
        assert "no space left on the disk" in line and "checkpoints of steps 1, 2 are intact" in line
        assert_intact(place, "full", [1, 2])
        (tmp_path / "runs" / "filler").unlink()
        assert place.run("name=full") == 0 and "resuming after step 2" in place.out(), place.err()
        assert place.run("name=free") == 0, place.err()
        full, free = place.results("full", 4), place.results("free", 4)
        assert full == free
    finally:
        subprocess.run(["umount", "-l", tmp_path / "runs"], check=True)


BREAK = """
import numpy as np
from jaxft.train import compiled
count = [0]
step = compiled.compile_step
def broken(p, batch):
    run = step(p, batch)
    def stepped(state, frozen, batch):
        count[0] += 1
        if count[0] > 2:
            batch = batch.replace(token_weights=batch.token_weights * np.float32("nan"))
        return run(state, frozen, batch)
    return stepped
compiled.compile_step = broken
"""


@pytest.mark.quick_cases("10")
@pytest.mark.parametrize("every", [1, 10])
def test_max_bad_non_finite_steps_in_a_row_end_the_run_and_their_rows_are_named(place, every):
    name = f"bad{every}"
    argv = [f"name={name}", "steps=20", "loop.max_bad=3", f"loop.log_every={every}", "loop.save_every=2"]
    line = fails(place, *argv, hook=BREAK)
    assert (
        "not finite in 3 steps in a row (steps 3 to 5)" in line
        and line.count("rows.jsonl:") == 12
        and "more" in line
    )
    assert place.checkpoints(name)[0] == 2
    good, last = (place.leaves(name, step) for step in (2, place.checkpoints(name)[-1]))
    counters = ("0.step", "0.bad")
    assert {*counters} < good.keys()
    assert {k: v for k, v in good.items() if k not in counters} == {
        k: v for k, v in last.items() if k not in counters
    }
    logged = [m for m in place.metrics(name) if m["step"] in (1, 2, 3, 4) and "loss" in m]
    assert [m["skipped"] for m in logged] == ([0, 0, 1, 1] if every == 1 else [])


@pytest.mark.slow
def test_a_diverging_learning_rate_ends_the_run(place):
    line = fails(place, "name=explodes", "lr=1e38", "steps=30", "loop.max_bad=4")
    assert "not finite in 4 steps in a row" in line and "lower optim.lr" in line
    assert place.checkpoints("explodes")


def test_non_finite_steps_between_two_log_lines_are_counted():
    m = make_meter(3)
    for step, bad in enumerate([0, 1, 1, 0, 1, 1, 0]):
        feed(m, step, np.nan if bad else 1.0, bool(bad))
    with pytest.raises(ValueError, match=r"steps 8 to 10\)\. .*rows row 7, row 8, row 9,"):
        for step, bad in enumerate([1, 1, 1, 0, 0], 7):
            feed(m, step, np.nan if bad else 1.0, bool(bad))


def test_a_meter_resumes_inside_a_logging_window():
    whole, losses = make_meter(5), [0.1, 0.7, np.nan, 0.3, 0.9]
    for step, loss in enumerate(losses):
        feed(whole, step, loss, loss != loss)
    first = make_meter(5)
    for step, loss in enumerate(losses[:3]):
        feed(first, step, loss, loss != loss)
    second = make_meter(5, json.loads(json.dumps(first.counters(), allow_nan=False)))
    for step, loss in enumerate(losses[3:], 3):
        feed(second, step, loss, loss != loss)
    expected, found = whole.read()[0], second.read()[0]
    assert (
        found == expected
        and found["loss"] == pytest.approx(0.5)
        and found["skipped"] == 1
        and found["num_tokens"] == 25
    )


def test_the_logged_loss_is_nan_only_if_every_step_of_the_window_is_non_finite():
    m = make_meter(9)
    feed(m, 0, np.nan, True)
    assert np.isnan(m.read()[0]["loss"])
    feed(m, 1, np.nan, True)
    assert m.counters()["window"] == {}
    feed(m, 2, 2.0)
    assert m.read()[0]["loss"] == 2.0


def noisy(q, k, v, ranges, softcap):
    return flash(q, k, v, ranges, softcap) * jnp.asarray(1.1, q.dtype)


def failing(q, k, v, ranges, softcap):
    raise NotImplementedError("no such instruction\nand a long story")


class MosaicError(Exception):
    """As Pallas's errors of compilation, which derive from Exception and may have no text."""


def unlowered(q, k, v, ranges, softcap):
    raise MosaicError


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (noisy, r"the test kernel is wrong on this cpu: its relative error is 0\.1, .* Set attention=flash"),
        (failing, r"the test kernel fails on this cpu \(no such instruction\)\. Set attention=flash"),
        (unlowered, r"the test kernel fails on this cpu \(MosaicError\)\. Set attention=flash"),
        (lambda *x: flash(*x), None),
    ],
)
def test_a_run_refuses_an_attention_kernel_that_is_wrong_on_its_device(place, kernel, expected, monkeypatch):
    job = prepare(place.folder)
    monkeypatch.setattr(attention, "kernel_for", lambda *_: kernel)
    monkeypatch.setitem(attention.KERNEL_NAMES, kernel, "test")
    if expected is None:
        lines = check_attention(job.lead.programs, job.abstract_batch)
        assert re.fullmatch(r"attention: test agrees with blockwise XLA on this cpu: .*", *lines)
    else:
        with pytest.raises(ValueError, match=expected):
            check_attention(job.lead.programs, job.abstract_batch)


START = {
    "half-written base": (["model=half"], "model.safetensors: not a complete safetensors file"),
    "half-written adapter": (["start=damaged"], "adapter_model.safetensors: not a complete safetensors file"),
    "half-written adapter, merged": (["start=damaged", "full=true"], "not a complete safetensors file"),
    "other settings": (["start=other"], "other: its adapter has rank=2, but the run's has rank=4"),
    "dropout of a head": (
        ["start=dropped", "adapter.targets=q,head", "adapter.dropout=0.1"],
        "adapter.dropout=0.1 has no .* set adapter.dropout=0, .* lora_dropout of the adapter in dropped",
    ),
    "dropout of a new head": (
        ["adapter.targets=head", "adapter.dropout=0.1"],
        "adapter.dropout=0.1 has no effect on an adapter of the head; set adapter.dropout=0",
    ),
    "other base": (["start=wider"], "lora_A .* on this model needs"),
}


@pytest.fixture(scope="module")
def starts(place):
    """half, a base without the end of its weights; other, damaged, wider and dropped: adapters."""
    folder = place.folder
    write_folder(folder / "wide", tiny_torch(hidden_size=96))
    head = Adapter(4, dropout=0.1, targets=("q", "head"))
    for name, base, settings in (
        ("other", "base", Adapter(2)),
        ("damaged", "base", Adapter(4)),
        ("wider", "wide", Adapter(4)),
        ("dropped", "base", head),
    ):
        model = pretrained.model_for(str(folder / base))
        fresh = init_params(adapter_specs(model.specs, settings), jax.random.key(0))
        peft_write.save_adapter(folder / name, fresh, settings, model, str(folder / base))
    shutil.copytree(folder / "base", folder / "half")
    for path in (folder / "half" / "model.safetensors", folder / "damaged" / "adapter_model.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("case", START)
def test_weights_that_a_run_cannot_start_from_are_refused_before_its_folder_is_there(place, starts, case):
    argv, message = START[case]
    with working_directory(place.folder):
        settings = resolve_config("config.py", [*argv, "name=refused"])
        with pytest.raises(ValueError, match=message) as caught:
            loop.run(settings.value, settings.describe(), Path("runs"))
    assert "\n" not in str(caught.value) and not place.runs("refused").exists()


def test_a_locked_folder_is_removed_unless_something_was_written(tmp_path):
    folder = tmp_path / "run"
    busy = pytest.raises(OSError, match="another process is running")
    with run_record.lock(folder), busy, run_record.lock(folder):
        pass
    assert not folder.exists()
    with run_record.lock(folder):
        (folder / "config.json").write_text("{}")
    with run_record.lock(folder):
        pass
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "lock"]


def test_a_folder_that_another_process_removes_meanwhile_is_reported_as_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: None)  # as if it were removed right after
    with pytest.raises(OSError, match="another process is running"), run_record.lock(tmp_path / "run"):
        pass
