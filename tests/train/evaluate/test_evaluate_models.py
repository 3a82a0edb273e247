"""`jaxft evaluate` on adapters, GGUF files and quantised models: the losses are those of peft, transformers
and bitsandbytes; several adapters are one table.
"""

import json
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import tiny_llama
import tiny_tokenizers
from evaluate_place import PAIRS, chat, loss_of_texts, torch_loss, write_evaluate_place
from scripts_in_process import call

from jaxft.train.evaluate.evaluate_models import (
    WAYS,
    CompletionEvaluation,
    RowEvaluation,
    TaskEvaluation,
    requested,
)

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
SETTINGS = {
    "a": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "b": {"r": 2, "lora_alpha": 8, "target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of a model and two random adapters of it, and (the model, the adapted models) by peft."""
    folder = tmp_path_factory.mktemp("evaluate_models")
    base, adapted = write_evaluate_place(folder), {}
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        own = tiny_llama.tiny_torch()  # peft changes the model that it gets
        torch.manual_seed(seed)
        model = peft.get_peft_model(own, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        for key, value in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(value, std=0.5)
        model.peft_config["default"].base_model_name_or_path = str(folder / "model")
        model.save_pretrained(str(folder / name))
        adapted[name] = model
    return folder, base, adapted


@pytest.fixture
def run(place, tmp_path, monkeypatch, capsys):
    """Run a script; return its output."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(place[0])

    def run(*argv):
        code, out, err = call(monkeypatch, capsys, *argv)
        assert code == 0, err
        return out

    return run


def evaluate(run, *argv):
    return json.loads(run("evaluate", "--dtype", "float32", "--json", *argv))


def test_an_adapter_on_its_own_base_has_the_loss_of_peft(place, run):
    losses = {name: loss_of_texts(model) for name, model in place[2].items()}
    base = loss_of_texts(place[1])
    assert all(abs(loss - base) > 0.01 for loss in losses.values())
    found = evaluate(run, "--adapter", "a", "--file", "texts.jsonl")
    assert found["loss"] == pytest.approx(losses["a"], rel=1e-5)
    both = evaluate(run, "--adapter", "a", "--adapter", "two=b", "--file", "texts.jsonl")
    assert both.keys() == {"a", "two"} and both["a"]["loss"] == pytest.approx(losses["a"], rel=1e-5)
    assert both["two"]["loss"] == pytest.approx(losses["b"], rel=1e-5)


def test_accuracy_against_the_base_is_that_of_pefts_log_probabilities(place, run, tmp_path):
    out = tmp_path / "out.jsonl"
    argv = ("--adapter", "a", "--adapter", "b", "--file", "pairs.jsonl", "--out", str(out))
    found, gains = evaluate(run, *argv), {}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for name, model in place[2].items():
        own = [row for row in rows if row["adapter"] == name]
        wins = []
        for (prompt, *responses), row in zip(PAIRS, own, strict=True):
            ids = [chat(prompt, response) for response in responses]
            with_adapter = [-torch_loss(model, *one)[0] for one in ids]
            base = [-torch_loss(place[1], *one)[0] for one in ids]
            assert [row["chosen"], row["rejected"]] == pytest.approx(with_adapter, rel=1e-4)
            assert row["base"] == pytest.approx(base, rel=1e-4)
            wins.append(with_adapter[0] - base[0] > with_adapter[1] - base[1])
        gains[name] = float(np.mean(wins))
        assert found[name]["accuracy_against_base"] == gains[name]
    assert 0 < sum(gains.values()) < 2  # the law can fail


def test_several_adapters_are_columns_of_a_table_by_one_program(place, run, tmp_path, monkeypatch):
    from jaxft.train.evaluate import completer

    compiled, compile_engine = [], completer.compile_engine
    monkeypatch.setattr(
        completer, "compile_engine", lambda *args: compiled.append(1) or compile_engine(*args)
    )
    options = ("--file", "rows.jsonl", "--regex", ".*[aeiou].*", "--max-new", "6", "--dtype", "float32")
    out = tmp_path / "out.jsonl"
    adapters = ("--adapter", "a", "--adapter", "long-name=b")
    *table, difference = run("evaluate", *adapters, *options, "--out", str(out)).splitlines()
    assert difference.startswith("long-name against a, matches: ") and "with 4 rows" in difference
    assert compiled == [1] and table[0].split() == ["a", "long-name"]
    assert len({len(line) for line in table}) == 1 and table[1].split() == ["prompts", "4", "4"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    alone = tmp_path / "alone.jsonl"
    run("evaluate", "--adapter", "b", *options, "--out", str(alone))
    own = [{"adapter": "long-name", **json.loads(line)} for line in alone.read_text().splitlines()]
    assert own == [row for row in rows if row["adapter"] == "long-name"]
    texts = [[row["completion"] for row in rows if row["adapter"] == name] for name in ("a", "long-name")]
    assert texts[0] != texts[1]


def test_a_gguf_file_has_the_loss_of_its_weights_as_transformers_reads_them(place, run):
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizers.tiny("chatml")
    model = tiny_llama.tiny_torch(vocab_size=len(tokenizer))
    model.save_pretrained("full")
    tokenizer.save_pretrained("full")
    run("export", "--model", "full", "--out", "model.gguf", "--gguf", "Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32)
    read = tiny_llama.tiny_torch(seed=1, vocab_size=len(tokenizer))
    read.load_state_dict(theirs.state_dict())
    read.save_pretrained("read")
    tokenizer.save_pretrained("read")
    file = ("--file", "texts.jsonl", "--model")
    full, read, found = (evaluate(run, *file, name) for name in ("full", "read", "model.gguf"))
    assert found["tokens"] == read["tokens"] and found["loss"] == pytest.approx(read["loss"], rel=1e-5)
    assert abs(found["loss"] - full["loss"]) > 3e-5 * full["loss"]  # its weights are rounded


@pytest.mark.slow
def test_a_base_quantised_on_load_has_the_loss_of_bitsandbytes_weights(place, run, tmp_path):
    from quantised_folders import by_bitsandbytes
    from transformers import AutoModelForCausalLM

    packed, weights = by_bitsandbytes(tmp_path, "nf4", True, exact=True)
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "plain"), dtype=torch.float32).eval()
    full = loss_of_texts(plain)
    plain.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
    expected = loss_of_texts(plain)
    argv = ("--file", "texts.jsonl", "--model")
    assert evaluate(run, *argv, str(packed))["loss"] == pytest.approx(expected, rel=1e-5)
    found = evaluate(run, *argv, str(tmp_path / "plain"), "--quant", "nf4", "--max-length", "128")
    assert found["loss"] == pytest.approx(expected, rel=1e-4) and abs(full - expected) > 1e-3


GIVEN = {
    RowEvaluation: {"file": "f"},
    CompletionEvaluation: {"by": ["exact"], "temperature": 1.0},
    TaskEvaluation: {"tasks": "x"},
}
VALUES = {
    "file": "f", "columns": "a=b", "too_long": "drop", "packing": True, "temperature": 0.5, "top_p": 0.5,
    "min_p": 0.5, "pass_at": "1", "kv_cache": "fp8", "gen_kwargs": "max_gen_toks=2", "include_path": "p",
    "system_instruction": "s", "chat": True, "unsafe_code": True,
}  # fmt: skip


def test_options_that_a_way_does_not_have_are_refused_and_the_others_have_their_defaults():
    names = {way: {field.name for field in fields(way)} for way in WAYS}
    for way, extra in GIVEN.items():
        for name in set().union(*names.values()) - {"tasks", "by", "regex"}:
            ways = [title for other, (title, _) in WAYS.items() if name in names[other]]
            given = {"run": "r", **extra, name: VALUES.get(name, 2)}
            if name not in names[way]:
                text = f"--{name.replace('_', '-')} applies only to {' and '.join(ways)}; remove it, or "
                with pytest.raises(ValueError, match=re.escape(text)):
                    requested(given)
                continue
            settings, default = requested(given)[1], way(**extra)
            assert getattr(settings, name) == given[name]
            assert replace(settings, **{name: getattr(default, name)}) == default
