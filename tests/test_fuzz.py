"""Damaged files of each kind that jaxft reads are taken, or refused in one line that names the file.

Every kind has 200 cases of a fixed seed. `FUZZ_SEED=7 FUZZ_CASES=900 pytest tests/test_fuzz.py` tries others.
"""

import json
import os
import shutil

import jax
import numpy as np
from fuzzing import damaged_bytes, damaged_json, json_text, refusal
from gguf_files import byte_level, toy_vocabulary, write_gguf
from tiny_llama import tiny_torch, write_folder
from tiny_tokenizers import tiny

from jaxft.data.chat import loss_mask
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, read_prompts
from jaxft.data.rows.example import Chat, Completion, Text
from jaxft.data.sft import Rows
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.param_spec import init_params
from jaxft.nn.quant import quant_setting
from jaxft.report import charts
from jaxft.runs import metrics_log, run_record
from jaxft.weights import pretrained
from jaxft.weights.param_loading import read_whole
from jaxft.weights.peft import adapter_folders, peft_read, peft_write

CASES, SEED = int(os.environ.get("FUZZ_CASES", "200")), int(os.environ.get("FUZZ_SEED", "0"))
SHOWN = 20  # failures
SMALL = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8)  # fmt: skip


def load_model(ref):
    """Read a model's configuration and all of its tensors."""
    model = pretrained.model_for(str(ref))
    for reader in pretrained.open_params(str(ref), model).values():
        read_whole(reader)
    return model


def tokenise(tokenizer):
    """Tokenise a text, a completion and a conversation."""
    turns = ({"role": "user", "content": "hello 123"}, {"role": "assistant", "content": "it is 5"})
    list(loss_mask.tokenise_examples([Text("row 1", "some text"), Completion("row 2", "a", "b")], tokenizer))
    list(loss_mask.tokenise_examples([Chat("row 3", turns, 1)], tokenizer))


def run_cases(damage, work, name):
    """Run every case; what is refused must name the file `name`. Return how many were refused."""
    refused, wrong = 0, {}
    for number in range(CASES):
        damage(np.random.default_rng([SEED, number]))
        try:
            line = refusal(work)
            assert line is None or name in line, f"the file is not named: {line}"
        except AssertionError as error:
            text = str(error)
            wrong.setdefault(text[-200:], f"case {number}: {text}")
        else:
            refused += line is not None
    shown = "\n\n".join([*wrong.values()][:SHOWN])
    assert not wrong, f"{len(wrong)} kinds of failures, among them:\n{shown}"
    return refused


def test_gguf_files(tmp_path):
    reference = tiny_torch(**SMALL)
    merges, tokens, specials = toy_vocabulary()
    fields = [
        *byte_level([("add_token_merges", merges), ("add_eos_token_id", 256)], tokens, **specials),
        ("add_chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    ]
    whole = write_gguf(tmp_path / "whole.gguf", reference, fields=fields).read_bytes()
    path = tmp_path / "damaged.gguf"
    front = 1200 if len(whole) > 1200 else None

    def damage(rng):
        path.write_bytes(damaged_bytes(rng, whole, front if rng.random() < 0.7 else None))

    def work():
        load_model(path)
        tokenise(pretrained.load_tokenizer(str(path)))

    assert run_cases(damage, work, "damaged.gguf") > CASES // 4


def test_safetensors_files(tmp_path):
    folder = write_folder(tmp_path / "model", tiny_torch(**SMALL))
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])

    def damage(rng):
        if rng.random() < 0.5:
            path.write_bytes(damaged_bytes(rng, whole, 8 + size if rng.random() < 0.8 else None))
            return
        text = json_text(damaged_json(rng, header))
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])

    assert run_cases(damage, lambda: load_model(folder), "model") > CASES // 2


def test_config_json(tmp_path):
    folder = write_folder(tmp_path / "model", tiny_torch(**SMALL))
    path = folder / "config.json"
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    packing = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
    whole = json.loads(path.read_text())

    def damage(rng):
        config = whole | {"rope_scaling": rope} if rng.random() < 0.3 else whole
        config = config | {"quantization_config": packing} if rng.random() < 0.2 else config
        text = json_text(damaged_json(rng, config))
        path.write_bytes(text if rng.random() < 0.9 else damaged_bytes(rng, text))

    assert run_cases(damage, lambda: load_model(folder), "model") > CASES // 4


def test_tokenizer_files(tmp_path):
    folder = write_folder(tmp_path / "model", tiny_torch(**SMALL))
    tiny("llama3").save_pretrained(folder)
    names = [n for n in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                         "chat_template.jinja") if (folder / n).is_file()]  # fmt: skip
    whole = {name: (folder / name).read_bytes() for name in names}

    def damage(rng):
        for name, text in whole.items():
            (folder / name).write_bytes(text)
        name = names[rng.integers(len(names))]
        if name.endswith(".json") and rng.random() < 0.7:
            text = json_text(damaged_json(rng, json.loads(whole[name])))
        else:
            text = damaged_bytes(rng, whole[name])
        (folder / name).write_bytes(text)

    assert run_cases(damage, lambda: tokenise(pretrained.load_tokenizer(str(folder))), "") > CASES // 8


def test_peft_folders(tmp_path):
    base = write_folder(tmp_path / "base", tiny_torch(**SMALL))
    model, settings = pretrained.model_for(str(base)), Adapter(rank=2)
    folder = tmp_path / "adapter"
    fresh = init_params(adapter_specs(model.specs, settings), jax.random.key(0))
    peft_write.save_adapter(folder, fresh, settings, model, str(base))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp": 4}}
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(tensors[:8], "little")

    def damage(rng):
        text, data = json_text(config), tensors
        if rng.random() < 0.6:
            text = json_text(damaged_json(rng, config))
        elif rng.random() < 0.6:
            header = json_text(damaged_json(rng, json.loads(tensors[8 : 8 + size])))
            data = len(header).to_bytes(8, "little") + header + tensors[8 + size :]
        else:
            data = damaged_bytes(rng, tensors, 8 + size)
        (folder / "adapter_config.json").write_bytes(text)
        (folder / "adapter_model.safetensors").write_bytes(data)

    def work():
        peft_read.read_parts(folder, model)
        adapter_folders.adapter_settings(str(folder), None, model)

    assert run_cases(damage, work, "adapter") > CASES // 3


def test_run_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = write_folder(tmp_path / "base", tiny_torch(**SMALL))
    model, settings = pretrained.model_for(str(base)), Adapter(rank=2)
    run = tmp_path / "runs" / "sound"
    fresh = init_params(adapter_specs(model.specs, settings), jax.random.key(0))
    peft_write.save_adapter(run / "adapter", fresh, settings, model, str(base))
    record = {
        "weights": "base", "weights_path": str(base), "seed": 0, "optim": {"lr": 1e-4}, "loop": {"steps": 4},
        "model": {"dtype": "float32", "residual": "float32"},
        "weights_fingerprint": run_record.weights_fingerprint("base"),
        "data": {"date": "26 Jul 2024", "train": "rows.jsonl", "batch": 4},
        "quant": {"kind": "nf4", "block": 64, "double": True, "targets": "all-linear"},
    }  # fmt: skip
    run_record.write_record(run, record)
    log = metrics_log.Jsonl(run / "metrics.jsonl")
    for step in range(3):
        log.log(step, {"loss": 1.0 / (step + 1), "learning_rate": 1e-4}, {"tokens_per_second": 10.0})
    log.close("finished")
    summary = {"steps": 4, "alarms": [], "after": {"metrics": {"eval_loss": 1.0}}}
    run_record.write_durable_json(run / "summary.json", summary | {"files": run_record.result_hashes(run)})
    folder, names = (
        tmp_path / "runs" / "damaged",
        ["config.json", "env.json", "summary.json", "metrics.jsonl"],
    )

    def damage(rng):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run, folder)
        path = folder / names[rng.integers(len(names))]
        if path.suffix == ".json" and rng.random() < 0.8:
            path.write_bytes(json_text(damaged_json(rng, json.loads(path.read_text()))))
        else:
            path.write_bytes(damaged_bytes(rng, path.read_bytes()))

    def work():
        run_record.finished_steps(folder)
        adapter_folders.base_differences(str(folder), "base", "sha256:0", None)
        found = run_record.trained_weights(folder)[2]
        quant_setting(None, found)
        run_record.write_record(folder, found, 2)
        charts.comparison_panels({"damaged": metrics_log.read_entries(folder / "metrics.jsonl")})
        metrics_log.truncate(folder / "metrics.jsonl", 1)
        run_record.changes_since_start(folder, record, {})

    assert run_cases(damage, work, "") > CASES // 4


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}
TURNS = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello", "tool_calls": [CALL]}, {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "four"},
]  # fmt: skip
ROWS = {
    "sft": [{"prompt": "a", "completion": "b"}, {"prompt": "what is 1 + 1?", "completion": "it is 2"}],
    "chat": [{"messages": TURNS, "tools": [TOOL]}] * 2,
    "sharegpt": [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}] * 2,
    "alpaca": [{"instruction": "x", "input": "z", "output": "y", "system": "s"}] * 2,
    "text": [{"text": "some text"}, {"text": "more"}],
    "pairs": [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3,
    "turns": [{"chosen": TURNS[1:2] + TURNS[-1:], "rejected": TURNS[1:3]}] * 3,
    "labels": [{"prompt": "a", "completion": "b", "label": True}] * 3,
    "prompts": [{"prompt": "a", "answer": "b"}, {"prompt": TURNS[:2]}],
}


def test_rows(tmp_path):
    tokenizer, path = tiny("llama3"), tmp_path / "rows.jsonl"
    current = [""]

    def damage(rng):
        current[0] = list(ROWS)[rng.integers(len(ROWS))]
        rows = damaged_json(rng, ROWS[current[0]])
        rows = rows if isinstance(rows, list) else [rows]
        text = b"".join(json_text(row) + b"\n" for row in rows)
        path.write_bytes(text if rng.random() < 0.85 else damaged_bytes(rng, text))

    def work():
        options = {"held_out": "none", "batch": 1, "max_length": 64}
        if current[0] in ("pairs", "turns", "labels"):
            PairRows(str(path), **options).open(tokenizer, 1)
        elif current[0] == "prompts":
            read_prompts(str(path), Prompts(str(path)).reader(tokenizer))
        else:
            Rows(str(path), **options).open(tokenizer, 1)

    assert run_cases(damage, work, "rows.jsonl") > CASES // 3
