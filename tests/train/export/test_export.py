"""scripts/generate.py and scripts/export.py on a base, an adapter and a run; transformers loads the merge."""

import json
import shutil
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_weights import load_on_host
from scripts_in_process import SCRIPTS, call
from tiny_llama import some_tokens, tiny_torch, torch_logits, write_folder
from transformers import AutoConfig, AutoModelForCausalLM

from jaxft.models.adapted import adapted
from jaxft.nn.adapters import lora_specs
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.param_spec import init_params
from jaxft.runs import run_record
from jaxft.train.export import export
from jaxft.weights import pretrained
from jaxft.weights.edit.merged_weights import merge_files
from jaxft.weights.hf import hf_write, hub
from jaxft.weights.peft import peft_write

torch = pytest.importorskip("torch")

SETTINGS = Adapter(rank=4, alpha=8.0, targets=("q", "o", "up", "head"))


def random_adapter(model, settings, size=0.3):
    """A random adapter with b != 0."""
    fresh = init_params(lora_specs.adapter_specs(model.specs, settings), jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return jax.tree.map(lambda x: size * jax.random.normal(next(keys), x.shape) if x.ndim > 1 else x, fresh)


tied_and_untied = pytest.mark.parametrize("world", [False, True], ids=["untied", "tied"], indirect=True)


@pytest.fixture(scope="module")
def world(request, tmp_path_factory):
    """A folder with base/, adapter/ and a finished run runs/r, relative to it."""
    root = tmp_path_factory.mktemp("world")
    base = write_folder(root / "base", tiny_torch(tie_word_embeddings=getattr(request, "param", False)))
    model = pretrained.model_for(str(base), dtype=jnp.float32)
    adapter = random_adapter(model, SETTINGS)
    for folder in (root / "adapter", root / "runs" / "r" / "adapter"):
        peft_write.save_adapter(folder, adapter, SETTINGS, model, str(base))
    record = {"weights": str(base), "model": {"dtype": "float32"}, "data": {"date": "26 Jul 2024"}}
    (root / "runs" / "r" / "config.json").write_text(json.dumps(record))
    return root, model, adapter


@pytest.fixture
def script(monkeypatch, capsys, world):
    monkeypatch.chdir(world[0])
    return lambda name, *args: call(monkeypatch, capsys, name, *args)


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", **options).eval()


@tied_and_untied
def test_a_merged_model_has_the_adapted_logits_in_transformers(script, world, tmp_path):
    root, model, adapter = world
    code, out, _ = script(
        "export", "--model", "base", "--adapter", "adapter", "--out", tmp_path / "m", "--dtype", "float32"
    )
    assert code == 0 and "float32" in out
    whole = {
        "base": load_on_host(str(root / "base"), model, lambda _, x: jnp.asarray(x)),
        "adapter": adapter,
    }
    full = adapted(model, SETTINGS)
    expected = np.asarray(full.logits(full.head(whole), full.hidden(whole, some_tokens())[0]))
    theirs = load(tmp_path / "m")
    assert theirs.dtype == torch.float32 and not theirs.config.tie_word_embeddings
    np.testing.assert_allclose(torch_logits(theirs, some_tokens()), expected, atol=1e-4)
    assert np.abs(torch_logits(load(root / "base"), some_tokens()) - expected).max() > 0.5


@tied_and_untied
def test_a_run_and_its_base_and_adapter_merge_to_the_same_weights_rounded_once(script, world, tmp_path):
    assert script("export", "--run", "runs/r", "--out", tmp_path / "run")[0] == 0
    assert (
        script(
            "export",
            "--model",
            "base",
            "--adapter",
            "adapter",
            "--out",
            tmp_path / "wide",
            "--dtype",
            "float32",
        )[0]
        == 0
    )
    narrow, wide = load(tmp_path / "run").state_dict(), load(tmp_path / "wide").state_dict()
    assert narrow.keys() == wide.keys()
    for name, value in wide.items():
        assert torch.equal(narrow[name], value.to(torch.bfloat16)), name


@tied_and_untied
def test_without_an_adapter_the_base_is_copied_bit_for_bit(script, world, tmp_path):
    assert script("export", "--model", "base", "--out", tmp_path / "copy", "--dtype", "float32")[0] == 0
    copy, base = load(tmp_path / "copy").state_dict(), load(world[0] / "base").state_dict()
    assert copy.keys() == base.keys() and all(torch.equal(copy[name], base[name]) for name in base)


def test_a_padding_token_that_the_model_does_not_have_is_not_exported(tmp_path):
    """transformers would not load the model; a padding token of its own stays."""
    base = write_folder(tmp_path / "base", tiny_torch())
    model = pretrained.model_for(str(base))
    for written, exported in ((320, None), (-1, None), (7, 7)):
        for file in ("config.json", "generation_config.json"):
            settings = json.loads((base / file).read_text())
            (base / file).write_text(json.dumps({**settings, "pad_token_id": written}))
        out = tmp_path / f"out{written}"
        out.mkdir()
        hf_write.save_configs(out, model, None, hub.locate(str(base)))
        assert json.loads((out / "config.json").read_text())["pad_token_id"] == exported
        assert json.loads((out / "generation_config.json").read_text()).get("pad_token_id") == exported
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(out)))


def test_peak_memory_of_merging_is_a_fraction_of_the_model(world, tmp_path):
    wide = tiny_torch(hidden_size=256, intermediate_size=1024, num_hidden_layers=12)
    write_folder(tmp_path / "base", wide)
    model = pretrained.model_for(str(tmp_path / "base"))
    total = sum(p.numel() * 4 for p in wide.parameters())
    base = merge_files(pretrained.open_params(str(tmp_path / "base"), model), model, None, np.float32)
    tracemalloc.start()
    hf_write.save_folder(tmp_path / "out", model, base, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < total / 8


def test_an_export_that_fails_or_meets_files_leaves_everything_as_it_was(script, tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    code, _, err = script("export", "--model", "base", "--out", full)
    assert code == 1 and err == f"error: --out {full} exists and is not empty; choose a new folder\n"

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_card", disk_full)  # after the weights
    code, _, err = script("export", "--model", "base", "--out", tmp_path / "new")
    assert code == 1 and "No space left" in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["full"] and [p.name for p in full.iterdir()] == [
        "mine.txt"
    ]


def prompts_of(out):
    return [json.loads(line) for line in out.removesuffix("\n").split("\n")]  # U+2028 ends no line


@pytest.mark.quick_cases("untied")
@tied_and_untied
def test_a_run_its_adapter_and_the_merged_model_generate_the_same_text(script, tmp_path):
    ask = ("--prompt", "ab", "--prompt", "What is rope?", "--max-new", "6", "--json")
    _, base, _ = script("generate", "--model", "base", "--dtype", "float32", *ask)
    _, answers, _ = script("generate", "--model", "base", "--adapter", "adapter", "--dtype", "float32", *ask)
    assert script("generate", "--run", "runs/r", *ask)[:2] == (0, answers)
    assert prompts_of(answers)[0]["prompt"] == "ab" and len(prompts_of(answers)) == 2 and answers != base
    assert script("export", "--run", "runs/r", "--out", tmp_path / "m", "--dtype", "float32")[0] == 0
    assert script("generate", "--model", tmp_path / "m", "--dtype", "float32", *ask)[:2] == (0, answers)


@pytest.mark.slow
def test_an_adapter_generates_and_merges_on_its_own_base(script, world, tmp_path):
    root = world[0]
    ask = ("--prompt", "ab", "--max-new", "6", "--dtype", "float32", "--json")
    expected = script("generate", "--model", "base", "--adapter", "adapter", *ask)[1]
    moved = shutil.copytree(root / "adapter", tmp_path / "adapter")
    for adapter in ("adapter", "runs/r/adapter", "runs/r", moved):
        code, out, _ = script("generate", "--adapter", adapter, *ask)
        assert (code, out) == (0, expected), adapter
    assert script("export", "--adapter", moved, "--out", tmp_path / "own")[0] == 0
    assert script("export", "--run", "runs/r", "--out", tmp_path / "run")[0] == 0
    own, run = load(tmp_path / "own").state_dict(), load(tmp_path / "run").state_dict()
    assert all(torch.equal(own[name], value) for name, value in run.items())


def test_an_adapter_on_another_base_is_a_warning_and_on_other_shapes_an_error(script, world, tmp_path):
    write_folder(tmp_path / "sister", tiny_torch(seed=5))
    write_folder(tmp_path / "wider", tiny_torch(hidden_size=96))
    ask = ("--adapter", "adapter", "--prompt", "x", "--max-new", "2", "--dtype", "float32")
    code, _, err = script("generate", "--model", tmp_path / "sister", *ask)
    assert code == 0 and f"is for the base '{world[0] / 'base'}'" in err and str(tmp_path / "sister") in err
    assert "is for the base" not in script("generate", "--model", "base", *ask)[2]
    code, _, err = script("generate", "--model", tmp_path / "wider", *ask)
    assert code == 1 and "error: adapter/adapter_model.safetensors: " in err
    assert "(4, 64)" in err and "(4, 96)" in err


def test_an_export_has_a_card_and_a_tokenizer_for_transformers_4_and_5(script, world, tmp_path):
    (world[0] / "base" / "README.md").write_text("---\nlicense: mit\nbase_model: org/root\n---\n")
    for name, extra in (("merged", ()), ("packed", ("--pack", "int8"))):
        assert script("export", "--run", "runs/r", "--out", tmp_path / name, *extra)[0] == 0
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in config
        card = (tmp_path / name / "README.md").read_text()
        assert card.startswith("---\nbase_model: org/root\n") and "license: mit\n" in card
        assert str(world[0]) not in card
    assert "library_name: transformers\n" in (tmp_path / "merged" / "README.md").read_text()
    assert "base_model_relation: quantized\n" in card and "library_name: jaxft\n" in card


@pytest.mark.quick_cases("96*")
@pytest.mark.parametrize(
    "mlp, words",
    [
        (128, ("bitsandbytes' layout, which vLLM loads, and transformers with bitsandbytes",)),
        (96, ("warning: jaxft's own layout", "the 96 inputs of layers/mlp/down", "block size 64")),
    ],
)
def test_pack_names_the_layout_and_why_it_is_not_bitsandbytes(script, tmp_path, mlp, words):
    write_folder(tmp_path / "base", tiny_torch(intermediate_size=mlp))
    code, out, _ = script("export", "--model", tmp_path / "base", "--out", tmp_path / "m", "--pack", "nf4")
    method = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["quant_method"]
    assert code == 0 and method == ("bitsandbytes" if mlp == 128 else "jaxft")
    assert all(word in out for word in words), out


def test_generated_text_equals_transformers_with_the_template_and_raw(script, world, tmp_path):
    from transformers import AutoTokenizer

    theirs, tokenizer = load(world[0] / "base"), AutoTokenizer.from_pretrained(str(world[0] / "base"))
    rows = [
        {"prompt": "Hello"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ignored"}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
        {"instruction": "Sum", "input": "1 2", "response": "ignored"},
        {"instruction": "Only asked"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["<s>Hello</s>", "<s>q</s>", "<s>a</s><s>b</s><s>c</s>", "<s>Sum\n\n1 2</s>", "<s>Only asked</s>"]
    (tmp_path / "lines.txt").write_bytes("\ufeffHello\r\n\nag\u2028ain\n".encode())
    ask = ("--model", "base", "--max-new", "8", "--dtype", "float32", "--json", "--batch", "2")
    for file, extra, expected in [
        ("rows.jsonl", (), texts),
        ("lines.txt", (), ["<s>Hello</s>", "<s>ag\u2028ain</s>"]),
        ("lines.txt", ("--raw",), ["Hello", "ag\u2028ain"]),
    ]:
        code, out, _ = script("generate", "--file", tmp_path / file, *ask, *extra)
        found = prompts_of(out)
        assert code == 0 and len(found) == len(expected)
        for answer, text in zip(found, expected, strict=True):
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            new = theirs.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=257)[0, ids.shape[1] :]
            assert answer["completion"] == tokenizer.decode(new, skip_special_tokens=True), text
            assert answer["finish"] == ("stop" if new[-1] == 257 else "length") and answer["tokens"] == len(
                new
            )


@pytest.mark.slow
def test_the_same_seed_samples_the_same_completion(script):
    ask = (
        "generate",
        "--model",
        "base",
        "--prompt",
        "ab",
        "--temperature",
        "1.5",
        "--top-k",
        "50",
        "--top-p",
        "0.95",
        "--max-new",
        "9",
    )
    first = script(*ask, "--seed", "1")[1]
    assert script(*ask, "--seed", "1")[1] == first != script(*ask, "--seed", "2")[1]
    assert first.startswith("--- prompt\nab\n--- completion\n")


@pytest.mark.parametrize(
    "command, words",
    [
        ("generate --run runs/none --prompt x", ("runs/none", "config.json")),
        ("generate --model nowhere.gguf --prompt x", ("nowhere.gguf",)),
        ("generate --model base --adapter none --prompt x", ("none/adapter_config.json",)),
        ("generate --model base --file none.txt", ("none.txt",)),
        ("generate --model base --file none.jsonl", ("none.jsonl",)),
        ("generate --model base --file empty.txt", ("empty.txt", "no prompts")),
        (
            "generate --model base --file text.jsonl",
            ("text.jsonl:1", "add prompt, messages or instruction"),
        ),
        ("generate --model base --file chat.jsonl --raw", ("--raw",)),
        ("generate --model base --prompt x --max-new 300", ("256 positions",)),
        ("export --model base --out base", ("--out base", "choose another")),
        ("export --model base --adapter none --out m", ("none/adapter_config.json",)),
        ("export --run runs --out m", ("not a run's folder",)),
    ],
)
def test_a_user_error_is_one_line(script, world, command, words):
    for name, text in [
        ("empty.txt", "\n\n"),
        ("text.jsonl", '{"text": "x"}\n'),
        ("chat.jsonl", '{"instruction": "x"}\n'),
    ]:
        (world[0] / name).write_text(text)
    code, out, err = script(*command.split())
    assert code == 1 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not (world[0] / "m").exists()


@pytest.mark.parametrize(
    "command, word",
    [
        ("generate --model base", "--prompt or --file"),
        ("generate --run r --model base --prompt x", "--run"),
        ("generate --model base --prompt x --batch 0", "--batch"),
        ("generate --model base --prompt x --temperature -1", "--temperature"),
        ("export --out m", "--run"),
        ("export --run r --model base --out m", "--run"),
        ("export --run r --adapter a --out m", "--adapter"),
        ("score --run r --adapter a --file f", "--adapter"),
    ],
)
def test_missing_or_contradictory_options_are_named(script, command, word):
    code, _, err = script(*command.split())
    assert code == 2 and word in err


def test_a_fully_fine_tuned_run_is_loaded_from_its_model_folder(script, world, tmp_path):
    run = tmp_path / "full"
    write_folder(run / "model", tiny_torch(seed=7))
    record = {"weights": "nowhere", "model": {"dtype": "float32"}, "data": {"date": "26 Jul 2024"}}
    (run / "config.json").write_text(json.dumps(record))
    ask = ("--prompt", "x", "--max-new", "5", "--dtype", "float32", "--json")
    code, out, _ = script("generate", "--run", run, *ask)
    assert code == 0 and out == script("generate", "--model", run / "model", *ask)[1]
    assert script("export", "--run", run, "--out", run / "model")[0] == 1


@pytest.mark.slow
def test_the_scripts_run_in_any_working_directory(world, tmp_path):
    for name in ("generate", "export"):
        done = subprocess.run(
            [sys.executable, SCRIPTS / f"{name}.py", "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and "--adapter" in done.stdout
    command = [
        sys.executable,
        SCRIPTS / "generate.py",
        "--model",
        world[0] / "base",
        "--prompt",
        "x",
        "--max-new",
        "2",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("--- prompt\nx\n"), done.stderr


def test_a_run_loads_its_moved_base_and_refuses_a_changed_one(script, world, tmp_path):
    root = world[0]
    run = tmp_path / "run"
    shutil.copytree(root / "runs" / "r", run)
    base = shutil.copytree(root / "base", tmp_path / "moved")
    record = json.loads((run / "config.json").read_text()) | {
        "weights": "not/here",
        "weights_path": str(base),
    }
    (run / "config.json").write_text(
        json.dumps(record | {"weights_fingerprint": run_record.weights_fingerprint(str(base))})
    )
    assert script("export", "--run", run, "--out", tmp_path / "out")[0] == 0
    file = base / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    code, _, err = script("export", "--run", run, "--out", tmp_path / "out2")
    assert code == 1 and "have changed since this run was trained" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_result_that_has_changed_since_the_run_was_finished_is_refused_by_every_command(
    script, world, tmp_path
):
    run = shutil.copytree(world[0] / "runs" / "r", tmp_path / "run")
    summary = {"steps": 1, "files": run_record.result_hashes(run)}
    run_record.write_durable_json(run / "summary.json", summary)
    assert script("export", "--run", run, "--out", tmp_path / "out")[0] == 0
    file = run / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    for command in (
        ("export", "--run", run, "--out", tmp_path / "out2"),
        ("export", "--model", "base", "--adapter", run / "adapter", "--out", tmp_path / "out2"),
        ("generate", "--run", run, "--prompt", "x"),
        ("generate", "--model", "base", "--adapter", run / "adapter", "--prompt", "x"),
        ("score", "--run", run, "--file", "pairs.jsonl"),
    ):
        code, _, err = script(*command)
        assert code == 1 and "adapter_model.safetensors: the file has changed since" in err, err
        assert err.count("\n") == 1
    assert not (tmp_path / "out2").exists()
