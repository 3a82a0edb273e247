"""New tokens as a knob of a recipe, what would silently lose them, and a run that learns to use two."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf as gguf_package
import jax.numpy as jnp
import numpy as np
import pytest
import tool_rows
from safetensors.numpy import load_file, save_file
from scripts_in_process import call
from tiny_llama import edit_config, tiny_torch, write_folder
from tiny_tokenizers import tiny

from jaxft.rl.rewards import exact
from jaxft.runs.settings import config
from jaxft.train.export import export
from jaxft.weights import pretrained
from jaxft.weights.edit.extended_model import UNTRAINED, untrained_tokens
from jaxft.weights.edit.merged_weights import merge_files
from jaxft.weights.gguf import gguf_tokenizer, gguf_write
from jaxft.weights.gguf.gguf_file import Field, read_gguf_header
from jaxft.weights.hf import tokenizer_files
from jaxft.weights.hf.hf_read import stop_tokens
from jaxft.weights.peft import peft_read

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parents[3]
NEW = ("<tool>", "</tool>")
KNOB = "add_tokens=" + ",".join(NEW)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "extended"


def load(recipe, *argv):
    return config.load_config(str(ROOT / "configs" / f"{recipe}.py"), list(argv))


def test_the_shipped_rows_are_those_of_their_script_and_held_out_values_are_new():
    for name in tool_rows.COUNTS:
        assert (tool_rows.FOLDER / name).read_text() == tool_rows.text(name)
    train, held_out = (
        [json.loads(line) for line in (tool_rows.FOLDER / name).read_text().splitlines()]
        for name in ("tools.jsonl", "tools_held_out.jsonl")
    )
    texts = " ".join(row["instruction"] for row in train)
    for row in held_out:
        found = re.fullmatch(r"<tool>weather: (.*), .*</tool>|Hello, (.*)!", row["response"])
        if found:
            assert not re.search(rf"\b{found[1] or found[2]}\b", texts)
        calls = re.fullmatch(r"<tool>[^<>]+</tool>", row["response"])
        assert bool(calls) == ("<" in row["response"])
    assert not {row["instruction"] for row in train} & {row["instruction"] for row in held_out}
    run = load("sft", "data=configs/data/tools.jsonl")
    assert run.scoring.by == (exact,) and run.data.held_out == "configs/data/tools_held_out.jsonl"


def test_a_recipe_with_new_tokens_trains_their_rows_on_a_base_that_is_written_once(tmp_path, cache):
    folder = write_folder(tmp_path / "in", tiny_torch(vocab_size=258, num_hidden_layers=1))
    run = load("sft", f"model={folder}", KNOB)
    base = Path(run.weights)
    assert base.parent == cache and base.name.startswith("in-") and run.model.config.vocab == 320
    assert run.adapter.trainable_token_indices == (258, 259)
    assert pretrained.load_tokenizer(run.weights).encode("a<tool>")[-1] == 258
    written = (base / "model.safetensors").stat().st_mtime_ns
    assert load("dpo", f"model={folder}", KNOB).weights == run.weights
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    full = load("sft_full", f"model={folder}", KNOB)
    assert (full.weights, full.adapter, full.model.config.vocab) == (run.weights, None, 320)
    assert load("sft", f"model={folder}", "add_tokens=<tool>").weights != run.weights
    edit_config(folder, rms_norm_eps=1e-3)
    assert load("sft", f"model={folder}", KNOB).weights != run.weights
    assert len(list(cache.iterdir())) == 3  # nothing half-written
    assert load("sft", f"model={folder}").weights == str(folder)


def test_special_tokens_and_a_template_are_knobs_of_a_recipe_and_completions_end_as_it_does(tmp_path, cache):
    folder = write_folder(tmp_path / "in", tiny_torch(vocab_size=258, num_hidden_layers=1))
    argv = ["add_tokens=<tool>", "add_special_tokens=<think>,</think>", "chat_template=chatml"]
    run = load("sft", f"model={folder}", *argv)
    assert run.adapter.trainable_token_indices == (258, 259, 260, 261, 262)
    tokenizer = pretrained.load_tokenizer(run.weights)
    ids = tokenizer.convert_tokens_to_ids(["<tool>", "<think>", "</think>", "<|im_start|>", "<|im_end|>"])
    assert ids == [258, 259, 260, 261, 262]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>"
    assert 262 in stop_tokens(run.weights, run.model, tokenizer)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False).endswith("assistant\nYes<|im_end|>\n")
    assert load("sft", f"model={folder}", *argv).weights == run.weights
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")
    own = load("sft_full", f"model={folder}", f"chat_template={mine}")
    assert pretrained.load_tokenizer(own.weights).chat_template == mine.read_text()
    for knobs, words in [
        (("chat_template=chatlm",), "no chat template is named 'chatlm'; use one of chatml"),
        (("chat_template=missing.jinja",), "missing.jinja: no such file"),
        (("add_tokens=<a>", "add_special_tokens=<a>"), "'<a>' is listed twice"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
            load("sft", f"model={folder}", *knobs)
        assert "\n" not in str(caught.value)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("script", ["train", "plan"])
def test_a_plan_with_new_tokens_writes_nothing(tmp_path, cache, monkeypatch, capsys, script):
    folder = write_folder(tmp_path / "in", tiny_torch(vocab_size=258, num_hidden_layers=1))
    (folder / "model.safetensors").unlink()  # which a plan does not need
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    how = ["--dry-run"] if script == "train" else ["--devices", "h100:1", "--train-only"]

    def planned(run, *_):  # compiling for a GPU is not what is tested
        raise ValueError(f"embed is 320x64, of {run.model.config.vocab}")

    if script == "plan":
        monkeypatch.setattr("jaxft.plan.machines.machine", lambda name: SimpleNamespace(devices=[name]))
        monkeypatch.setattr("jaxft.plan.plan.plans", planned)
    argv = [*how, "sft", f"model={folder}", "general=none", "batch=8", "max_length=32", KNOB]
    code, out, err = call(monkeypatch, capsys, script, *argv)
    assert code == (script == "plan") and "320x64" in out + err, err
    assert not cache.exists() and not list((tmp_path / "temporary").iterdir())
    assert not (tmp_path / "runs").exists()


def test_tokens_that_exist_already_are_refused_in_one_line_and_nothing_is_written(tmp_path, cache):
    folder = write_folder(tmp_path / "in", tiny_torch(num_hidden_layers=1))
    for knob, words in [
        ("add_tokens=<tool>,a", "new token 'a' is a token already"),
        ("add_tokens=<tool>,<tool>", "'<tool>' is listed twice"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            load("sft", f"model={folder}", knob)
        assert "\n" not in str(caught.value)
    assert not list(cache.glob("*"))


def test_a_base_that_is_no_longer_in_the_cache_names_the_way_back(tmp_path, cache):
    folder = write_folder(tmp_path / "in", tiny_torch(num_hidden_layers=1))
    weights = load("sft", f"model={folder}", KNOB).weights
    shutil.rmtree(weights)
    with pytest.raises(FileNotFoundError, match=r"no longer in the cache; .* add_tokens="):
        pretrained.model_for(weights)
    assert load("sft", f"model={folder}", KNOB).weights == weights
    assert pretrained.model_for(weights).config.vocab == 320


def weights_in(folder):
    return sorted(path.name for path in folder.glob("*.safetensors*"))


def test_a_template_without_new_tokens_links_to_the_weights_and_follows_them(tmp_path, cache):
    torch_model = tiny_torch(num_hidden_layers=1)
    folder = write_folder(tmp_path / "in", torch_model)
    torch_model.save_pretrained(str(folder), max_shard_size="100KB")  # several files and their index
    (folder / "model.safetensors").unlink(missing_ok=True)
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")

    def weights(place):
        return load("sft", f"model={place}", f"chat_template={mine}").weights

    ref = weights(folder)
    base = Path(ref)
    assert base.parent == cache and len(weights_in(folder)) > 2
    assert weights_in(base) == weights_in(folder)
    assert all((base / name).readlink() == folder / name for name in weights_in(base))
    assert (base / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert pretrained.load_tokenizer(ref).chat_template == mine.read_text()
    model = pretrained.model_for(ref, dtype=jnp.float32)
    source = export.ExportSource(ref, model, pretrained.load_tokenizer(ref))
    export.export_model(tmp_path / "out", source, "float32")
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in torch_model.state_dict().items():
        np.testing.assert_array_equal(written[name], value.numpy())

    (tmp_path / "new").mkdir()
    moved = folder.rename(tmp_path / "new" / "in")
    for use in (pretrained.open_files, pretrained.load_tokenizer):
        with pytest.raises(
            FileNotFoundError, match=r"links to .*in/model.*, which no longer exists; .*must end in 'in'"
        ) as caught:
            use(ref)
        assert "\n" not in str(caught.value)
    assert weights(moved) == ref and (base / weights_in(moved)[0]).readlink().parent == moved
    assert set(pretrained.open_files(ref).tensors) == set(written)
    assert len(list(cache.iterdir())) == 1


def test_the_weights_are_copied_where_the_cache_has_no_links(tmp_path, cache, monkeypatch):
    folder = write_folder(tmp_path / "in", tiny_torch(num_hidden_layers=1))
    mine = tmp_path / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")

    def refused(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    base = Path(load("sft", f"model={folder}", f"chat_template={mine}").weights)
    file = base / "model.safetensors"
    assert not file.is_symlink() and file.read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_on_a_template_resumes_exports_and_generates(tmp_path, cache, monkeypatch, capsys):
    folder = write_folder(tmp_path / "in", tiny_torch(num_hidden_layers=1))
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m['content'] + '</s>' }}{% endfor %}")
    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    argv = [
        "sft",
        f"model={folder}",
        "chat_template=mine.jinja",
        "data=rows.jsonl",
        "held_out=none",
        "batch=4",
    ]
    argv += ["max_length=32", "general=none", "samples=0", "dtype=float32", "name=t", "rank=2"]
    for steps in (1, 2):
        code, out, err = call(monkeypatch, capsys, "train", *argv, f"loop.steps={steps}")
        assert code == 0, err
    assert "resum" in out
    code, out, err = call(monkeypatch, capsys, "export", "--run", "runs/t", "--out", "merged")
    assert code == 0 and not [path for path in Path("merged").iterdir() if path.is_symlink()], err
    template = pretrained.load_tokenizer("merged").chat_template
    assert template == (tmp_path / "mine.jinja").read_text()
    prompt = ("--run", "runs/t", "--prompt", "say 3", "--max-new", "2")
    code, out, err = call(monkeypatch, capsys, "generate", *prompt)
    assert code == 0, err
    folder.rename(tmp_path / "moved")
    code, out, err = call(monkeypatch, capsys, "generate", *prompt)
    assert code == 1 and "model.safetensors, which no longer exists" in err and len(err.splitlines()) == 1


# Known ways of losing new tokens without a word. Untrained rows: tests/weights/edit/test_extend.py.


@pytest.mark.parametrize("part, rows", [("lm_head.weight", 260), ("model.embed_tokens.weight", 258)])
def test_a_table_or_a_head_that_was_not_resized_is_refused(tmp_path, part, rows):
    folder = write_folder(tmp_path / "in", tiny_torch(num_hidden_layers=1))
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, part: tensors[part][:rows].copy()}, folder / "model.safetensors")
    model = pretrained.model_for(str(folder))
    with pytest.raises(ValueError, match=rf"{part}.*{rows}") as caught:
        pretrained.open_params(str(folder), model)
    assert "\n" not in str(caught.value)


def test_a_tied_head_of_another_size_than_its_table_is_refused(tmp_path):
    folder = write_folder(tmp_path / "in", tiny_torch(num_hidden_layers=1, tie_word_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"][:258].copy()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight.*258"):
        pretrained.open_params(str(folder), pretrained.model_for(str(folder)))


def test_an_adapter_with_rows_that_the_base_lacks_is_refused(tmp_path):
    """The adapter of a base with new tokens, on the base without them."""
    small = write_folder(tmp_path / "in", tiny_torch(vocab_size=258, num_hidden_layers=1))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
                    "trainable_token_indices": [258, 259]})
    )  # fmt: skip
    save_file({}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"indices \[258, 259\]; expected ids from 0 to 257") as caught:
        peft_read.read_parts(tmp_path / "a", pretrained.model_for(str(small)))
    assert "\n" not in str(caught.value)


def test_new_tokens_and_another_template_are_written_though_the_files_they_came_from_are_there(tmp_path):
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path / "in", tiny_torch(num_hidden_layers=1))
    for change in ("token", "template"):
        tokenizer = pretrained.load_tokenizer(str(folder))
        if change == "token":
            tokenizer.add_tokens(["<tool>"])
        else:
            tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
        tokenizer_files.write_tokenizer(tmp_path / change, tokenizer)
        read = AutoTokenizer.from_pretrained(str(tmp_path / change))
        assert read.chat_template == tokenizer.chat_template
        assert read.encode("a<tool>") == tokenizer.encode("a<tool>")


@pytest.mark.parametrize("damage", ["order", "split"])
def test_a_gguf_file_whose_tokens_have_other_ids_is_an_error_and_is_not_written(
    tmp_path, monkeypatch, damage
):
    reference = tiny_torch(vocab_size=416, num_hidden_layers=1)
    reference.save_pretrained(str(tmp_path / "in"))
    tokenizer = tiny("plain")
    tokenizer.add_tokens(list(NEW))
    first = tokenizer.convert_tokens_to_ids(NEW[0])

    def damaged(*args):
        for field in gguf_tokenizer.tokenizer_fields(*args):
            value = list(field.value) if isinstance(field.value, list) else field.value
            if damage == "order" and field.key.endswith(".tokens"):
                value[first], value[first + 1] = value[first + 1], value[first]
            if damage == "split" and field.key.endswith(".token_type"):
                value[first] = 1
            yield Field(field.key, field.kind, value)

    monkeypatch.setattr(gguf_write, "tokenizer_fields", damaged)
    model = pretrained.model_for(str(tmp_path / "in"), dtype=jnp.float32)
    base = merge_files(pretrained.open_params(str(tmp_path / "in"), model), model, None, jnp.float32)
    (tmp_path / "out").mkdir()
    words = (
        rf"'<tool>' has id {first}, and in" if damage == "order" else r"'<tool>' \(id \d+\) would be split"
    )
    with pytest.raises(ValueError, match=words) as caught:
        gguf_write.save_gguf(
            tmp_path / "out" / "x.gguf", model, base, tokenizer, gguf_write.GgufOptions("F32", "x")
        )
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").iterdir())


# A run on SmolLM2-135M


def script(folder, name, *args):
    """The output of a command in a process of its own, without the tests' settings of XLA."""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, args)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_smollm2_learns_two_tool_tokens_and_transformers_and_gguf_have_them(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    script(tmp_path, "train", "--config", ROOT / "configs" / "sft.py", "data=configs/data/tools.jsonl",
           KNOB, "name=tools", "general=none", "samples=0", "epochs=2")  # fmt: skip
    script(tmp_path, "export", "--run", "runs/tools", "--out", "merged", "--dtype", "float32")
    script(tmp_path, "export", "--run", "runs/tools", "--out", "tools.gguf", "--gguf", "F32")
    merged = tmp_path / "merged"
    assert not (merged / UNTRAINED).exists() and untrained_tokens(str(merged)) == {}
    rows = [json.loads(x) for x in (tool_rows.FOLDER / "tools_held_out.jsonl").read_text().splitlines()]
    expected = [row["response"] for row in rows]
    (tmp_path / "held_out.txt").write_text("".join(row["instruction"] + "\n" for row in rows))
    common = ("--file", "held_out.txt", "--max-new", 64, "--dtype", "float32", "--json")
    ours = {
        ref: [json.loads(x)["completion"] for x in script(tmp_path, "generate", *ref, *common).splitlines()]
        for ref in [("--run", "runs/tools"), ("--model", "merged"), ("--model", "tools.gguf")]
    }
    for ref, texts in ours.items():
        right = np.mean([got == want for got, want in zip(texts, expected, strict=True)])
        print(ref, f"{right:.3f}")
        assert right >= 0.95, ref
    assert ours["--model", "merged"] == ours["--model", "tools.gguf"]

    tokenizer = AutoTokenizer.from_pretrained(str(merged))
    model = AutoModelForCausalLM.from_pretrained(str(merged), dtype=torch.float32).eval()
    ids = [49152, 49153]  # after SmolLM2's own
    assert tokenizer.convert_tokens_to_ids(list(NEW)) == ids
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for row, text in list(zip(rows, ours["--model", "merged"], strict=True))[:16]:
        chat = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            new = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt.input_ids.shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True) == text
        assert [int(i) for i in new if i in ids] == (ids if "<tool>" in text else [])

    fields = gguf_package.GGUFReader(tmp_path / "tools.gguf").fields
    tokens = [bytes(fields["tokenizer.ggml.tokens"].parts[i]).decode() for i in
              fields["tokenizer.ggml.tokens"].data]  # fmt: skip
    assert [tokens.index(token) for token in NEW] == ids
    ours_read = read_gguf_header(tmp_path / "tools.gguf").metadata
    assert ours_read["tokenizer.ggml.tokens"] == tokens
    assert ours_read["tokenizer.chat_template"] == tokenizer.chat_template
    adapter = AutoTokenizer.from_pretrained(str(tmp_path / "runs" / "tools" / "adapter"))
    assert adapter.convert_tokens_to_ids(list(NEW)) == ids
    assert adapter.chat_template == tokenizer.chat_template
