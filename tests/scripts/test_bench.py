"""scripts/bench/bench.py prints the baseline's fields, counts the tokens that the baseline counts, and times
only full batches.
"""

import argparse
import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import tiny_tokenizer, tiny_torch, write_folder
from tiny_run import write_place

from jaxft.data.pairs import PairRows
from jaxft.data.sft import Rows
from jaxft.nn.param_spec import ParamSpec, normal
from jaxft.optim.optimizer import Optim, make_optimizer
from jaxft.optim.update import StepInfo

SCRIPT = str(Path(__file__).resolve().parents[2] / "scripts" / "bench" / "bench.py")
PEER = {  # what the TRL baseline prints
    "peer", "objective", "mode", "dtype", "packing", "steps", "tokens_per_second", "seconds", "loss",
    "peak_rss_gib",
}  # fmt: skip
ROWS = [{"question": "q" * (4 + 5 * i % 17), "answer": "a" * (5 + 3 * i % 13)} for i in range(40)]

PAIRS = [
    {"prompt": "p" * (3 + i % 5), "chosen": "c" * (2 + 3 * i % 7), "rejected": "r" * (2 + 5 * i % 9)}
    for i in range(40)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_folder(folder / "model", tiny_torch())
    (folder / "gsm.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    return folder


@pytest.fixture
def bench(place, monkeypatch, capsys):
    def run(*args, objective="sft", data="gsm.jsonl"):
        files = ("--model", str(place / "model"), "--data", str(place / data))
        small = ("--max-length", "32", "--batch", "8", "--rank", "4", "--json")
        monkeypatch.setattr(sys, "argv", [SCRIPT, objective, *files, *small, *args])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(SCRIPT, run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.quick_cases("lora")
@pytest.mark.parametrize(
    "mode",
    [("--full", "--no-packing"), ("--dtype", "fp32", "--batch", "16", "--micro", "2")],
    ids=["full", "lora"],
)
def test_the_line_has_the_baselines_fields_and_sensible_values(bench, mode):
    code, out, _ = bench(*mode)
    line = json.loads(out)
    assert code == 0 and line.keys() >= PEER and out.count("\n") == 1
    assert line["mode"] == ("full" if "--full" in mode else "lora-r4") and line["packing"] == (
        "--full" not in mode
    )
    assert line["timed_steps"] == line["steps"] - 2 >= 6 and line["tokens_per_second"] > 0
    assert 0.5 * np.log(320) < line["loss"] < 2 * np.log(320) and 0.05 < line["peak_rss_gib"] < 50


@pytest.mark.quick_cases("precomputed")
@pytest.mark.parametrize("mode", [(), ("--precompute-ref",)], ids=["live", "precomputed"])
def test_dpo_starts_at_log_2_and_falls(bench, monkeypatch, tmp_path, mode):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    code, out, err = bench("--dtype", "fp32", *mode, objective="dpo", data="pairs.jsonl")
    assert code == 0, err
    line = json.loads(out)
    assert line.keys() >= PEER and line["objective"] == "dpo" and line["precompute_ref"] is bool(mode)
    assert 0.5 < line["loss"] <= np.log(2) and line["tokens_per_second"] > 0


@pytest.mark.parametrize("layout", ["branches", "plain"])
def test_a_prompt_counts_with_each_of_its_responses(tmp_path, layout):
    names = runpy.run_path(SCRIPT)
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    settings = PairRows(
        str(tmp_path / "pairs.jsonl"), held_out=None, format="plain", max_length=32, batch=4, layout=layout
    )
    tokenizer = tiny_tokenizer()
    source = settings.open(tokenizer, cache=tmp_path)
    counted = sum(
        names["useful"](source.batch(k)[0], tokenizer.eos_token_id)
        for k in range(source.info.steps_per_epoch)
    )
    assert counted == sum(2 * len(r["prompt"]) + len(r["chosen"]) + len(r["rejected"]) for r in PAIRS)


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_of_prompt_and_completion_counts_once_and_eos_does_not(tmp_path, packing):
    names = runpy.run_path(SCRIPT)
    data = tmp_path / "rows.jsonl"
    (tmp_path / "gsm.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    rows = names["plain_rows"](str(tmp_path / "gsm.jsonl"), 20, None)
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = Rows(str(data), held_out=None, format="plain", max_length=32, batch=2, packing=packing)
    tokenizer = tiny_tokenizer()
    source = settings.open(tokenizer, cache=tmp_path)
    counted = sum(
        names["useful"](source.batch(k)[0], tokenizer.eos_token_id)
        for k in range(source.info.steps_per_epoch)
    )
    assert counted == sum(min(len(r["prompt"] + r["completion"]), 32) for r in rows)


@pytest.mark.parametrize("rows, per_epoch", [(9, 3), (8, 2), (64, 16)])
def test_only_full_batches_are_timed_and_epochs_repeat_until_there_are_enough(rows, per_epoch):
    numbers = runpy.run_path(SCRIPT)["batches"](rows, per_epoch, 4)
    assert len(numbers) >= 8 and len(set(numbers)) == len(numbers)
    assert all((n % per_epoch + 1) * 4 <= rows for n in numbers)


def test_too_few_rows_for_a_batch_are_one_line(bench):
    code, out, err = bench("--rows", "7", "--no-packing")
    assert code == 1 and out == "" and "do not fill a batch of 8" in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        ("8b qlora", "8b generate"),
        ("1b full", "1b dpo", "4b lora 16k"),
        ("8b fp8 lora", "8b dpo metamath", "8b dpo metamath plain", "8b dpo ultrafeedback"),
    ],
)
def test_the_accelerators_cases_run_in_a_tiny_shape(cases):
    """The programs of `bench.py gpu`, whose numbers mean something on an accelerator only."""
    command = [
        sys.executable,
        SCRIPT.replace("bench.py", "bench_gpu.py"),
        "--here",
        "--tiny",
        "--cases",
        *cases,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["case"] for line in lines] == list(cases) and all(
        line["tokens_per_second"] > 0 for line in lines
    )
    training = [line for line in lines if line["case"] != "8b generate"]
    assert all(line["mfu"] > 0 and line["compiled_gib"] > 0 and line["kernels"] == [] for line in training)


PLANS = runpy.run_path(SCRIPT.replace("bench.py", "bench_plan.py"))


@pytest.mark.parametrize(
    "line, cases, overrides",
    [
        ("", ["lora", "qlora", "full"], []),
        ("--cases lora batch=2", ["lora"], ["batch=2"]),
        ("batch=2 max_length=256 --cases lora", ["lora"], ["batch=2", "max_length=256"]),
        ("batch=2 --cases lora full optim.lr=0.1", ["lora", "full"], ["optim.lr=0.1", "batch=2"]),
        ("batch=2", ["lora", "qlora", "full"], ["batch=2"]),
        ("--cases lora model=meta-llama/Llama-3.1-8B", ["lora"], ["model=meta-llama/Llama-3.1-8B"]),
    ],
)
def test_overrides_of_the_planners_benchmark_reach_every_case(line, cases, overrides):
    parsed = PLANS["arguments"](line.split())
    assert (parsed.cases, sorted(parsed.overrides), parsed.here) == (cases, sorted(overrides), False)
    each = [PLANS["arguments"](command) for command in PLANS["commands"](parsed)]
    assert [(a.cases, a.overrides, a.here) for a in each] == [
        ([name], parsed.overrides, True) for name in cases
    ]


def test_the_planners_benchmark_takes_a_config_and_refuses_what_is_neither_case_nor_override(capsys):
    (command,) = PLANS["commands"](PLANS["arguments"](["--config", "mine.py", "batch=2"]))
    parsed = PLANS["arguments"](command)
    assert (parsed.config, parsed.overrides, parsed.here) == ("mine.py", ["batch=2"], True)
    both = "--cases lora --config x"
    for line, says in (
        ("--cases dpo", "no case 'dpo'"),
        ("full", "'full' is no override"),
        (both, "not allowed"),
    ):
        with pytest.raises(SystemExit):
            PLANS["arguments"](line.split())
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_planners_benchmark_measures_what_a_step_holds_and_takes(place):
    """On a tiny model the stored bytes equal the plan's, and the growth is part of the planned bytes."""
    (place / "mine.py").write_text(MINE)
    command = [
        sys.executable,
        SCRIPT.replace("bench.py", "bench_plan.py"),
        "--config",
        str(place / "mine.py"),
        "batch=4",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    planned = (
        measured["planned_bytes"] - measured["planned_temporaries"]
    )  # with results, which are arrays too, and the program itself
    assert measured["case"] == "mine" and 0.9 * planned < measured["held"] <= planned
    assert (
        measured["bytes"] == measured["held"] + measured["growth"]
        and measured["growth"] >= 0
        and measured["seconds"] >= measured["fastest"] > 0
    )


MINE = """from configs.sft import config as sft
from dataclasses import replace
import jax.numpy as jnp
from jaxft.models.families.llama import llama
from jaxft.models.families.llama import LlamaConfig
from jaxft.train.recipes import FINETUNING, ScoredRowKnobs


def config(batch: int = 2):
    \"\"\"Wide enough that its weights are what it holds.\"\"\"
    run = sft(rows=ScoredRowKnobs(FINETUNING, batch=batch, epochs=3.0, max_length=64))
    c = LlamaConfig(vocab=2048, width=256, layers=2, heads=4, kv_heads=2, head_dim=64, mlp=512)
    return replace(run, model=llama(c, jnp.float32))
"""


def test_windows_shrink_the_cache_to_the_window(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = runpy.run_path(str(Path(SCRIPT).with_name("bench_window.py")))
    sizes = dict(layers=4, full=1, window=8, slots=64, batch=2, width=64, tokens=2, rounds=1)
    measured = script["measure"](argparse.Namespace(**sizes))
    layer = 2 * 2 * 4 * 8 * 2  # keys and values, rows, kv heads, head dim, bytes
    windows = 8 + 8  # of the 16 tokens of the prompt, and of the 48 of the completion
    expected = {"full_attention": 4 * 64 * layer, "windows": (64 + 3 * windows) * layer}
    assert {name: one["cache_mb"] * 1e6 for name, one in measured.items()} == pytest.approx(expected)
    assert all(one["ms_per_token"] > 0 for one in measured.values())
    with pytest.raises(ValueError, match="--tokens must be from 1 to 48 with --slots 64"):
        script["measure"](argparse.Namespace(**{**sizes, "tokens": 49}))


def test_every_attention_kernel_is_measured_by_the_visible_pairs_of_each_case(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = runpy.run_path(str(Path(SCRIPT).with_name("attention.py")))
    sizes = argparse.Namespace(**script["TINY"], window=None, softcap=None, dtype="float32", blocks=[32])
    measured = script["measure"](sizes)
    names = ["packed 1", "packed 4", "packed 16", "shared prompt"]
    expected = [(name, kernel) for name in names for kernel in ("flash", "flash 32")]
    assert [(one["case"], one["kernel"]) for one in measured] == expected
    assert all(
        value > 0 for one in measured for key, value in one.items() if key.endswith(("_ms", "_tflops"))
    )
    counted = {name: script["pairs"](ranges) for name, ranges in script["cases"](sizes)}
    row = {  # 128 tokens: causal triangles, and 4 responses of 16 tokens that see a prompt of 64
        "packed 1": 128 * 129 // 2,
        "packed 4": 4 * 32 * 33 // 2,
        "packed 16": 16 * 8 * 9 // 2,
        "shared prompt": 64 * 65 // 2 + 4 * (16 * 17 // 2 + 16 * 64),
    }
    assert counted == {name: 2 * count for name, count in row.items()}
    with pytest.raises(ValueError, match="--heads a multiple of --kv-heads"):
        script["measure"](argparse.Namespace(**{**vars(sizes), "kv_heads": 3}))


def test_the_guards_cost_is_measured_against_a_step_that_takes_any_update(tmp_path, monkeypatch):
    write_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = runpy.run_path(str(Path(SCRIPT).with_name("bench_guard.py")))
    measured = script["measure"](["data.held_out=none"], "config.py", 1)
    assert measured["seconds_checked"] > 0 and measured["seconds_unchecked"] > 0 and measured["shape"][0] == 1
    assert measured["cost"] == pytest.approx(
        measured["seconds_checked"] / measured["seconds_unchecked"] - 1, abs=0.05
    )
    optimizer = make_optimizer(
        Optim(lr=1e38, warmup=0.0, clip=None), {"w": ParamSpec((1,), (None,), normal(1.0))}, 1
    )
    info = StepInfo(jnp.ones(()), jnp.array(True), jax.random.key(0), None)
    params, grads = {"w": jnp.full(1, 3.4e38)}, {"w": jnp.full(1, -1.0)}
    checks = [
        o.check(grads, o.init(params), params, info) for o in (optimizer, script["unchecked"](optimizer))
    ]
    assert checks == [False, True]
