"""Completions end where the model learned to end: by its configs, its tokenizer and its chat template."""

import json

import jax
import numpy as np
import pytest
from chat_templates import TEMPLATES, stock_tokenizer
from prepared import prepare, working_directory
from tiny_llama import tiny_torch, write_folder
from tiny_pairs import make_rows, write
from tiny_run import write_place
from tiny_tokenizers import KINDS, tiny

from jaxft.data.chat.template import template_of
from jaxft.data.pairs import PairRows
from jaxft.data.sft import Rows
from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.train.logs.logs import startup_lines
from jaxft.weights import pretrained
from jaxft.weights.hf import hf_write
from jaxft.weights.hf.hf_read import stop_lines, stop_tokens

ENDS = {  # what ends the last turn of text, and of tool calls where it is another token
    "chatml": "<|im_end|>",
    "smollm2": "<|im_end|>",
    "llama3.0": "<|eot_id|>",
    "llama3.1": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "deepseek-v3": "<｜end▁of▁sentence｜>",
    "deepseek-r1": "<｜end▁of▁sentence｜>",
    "qwen3-no-thinking": "<|im_end|>",
    "marked": "<|im_end|>",
    "gemma2-merged": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "mistral-7b-v0.3": "</s>",
    "mistral-7b-merged": "</s>",
    "mistral-nemo": "</s>",
    "mistral-small": "</s>",
    "smolvlm": "<end_of_utterance>",
    "phi4": "<|im_end|>",
    "phi4-first": "<|im_end|>",
    "phi4-mini": "<|end|>",
    "smollm3": "<|im_end|>",
    "smollm3-no-thinking": "<|im_end|>",
    "olmo2": "<|endoftext|>",
    "olmo3": "<|endoftext|>",
    "granite3": "<|end_of_text|>",
    "deepseek-r1-distill": "<｜end▁of▁sentence｜>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model"), tiny_torch())


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_shows_what_ends_a_turn(name):
    tokenizer = stock_tokenizer(name)
    stops = template_of(tokenizer, TEMPLATES[name].settings).stop_tokens
    assert tokenizer.convert_ids_to_tokens(stops) == [ENDS[name]]


def test_a_call_that_ends_with_a_token_of_its_own_is_a_stop():
    tokenizer = TEMPLATES["qwen2.5"].tokenizer()
    source = tokenizer.chat_template.replace(
        "{{- '<|im_end|>\n' }}\n    {%- elif m.role == 'tool'",
        "{{- ('<|eom_id|>' if m.tool_calls else '<|im_end|>') + '\n' }}\n    {%- elif m.role == 'tool'",
    )
    assert source != tokenizer.chat_template
    tokenizer.chat_template = source
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eom_id|>"]})
    stops = template_of(tokenizer).stop_tokens
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|im_end|>", "<|eom_id|>"]


def test_stop_tokens_are_those_of_config_generation_config_tokenizer_and_template(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    model, tokenizer = pretrained.model_for(str(folder)), tiny("gemma")  # config.json has 257
    eos, end = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    assert eos == tokenizer.eos_token_id != end
    assert stop_tokens(str(folder), model, tokenizer) == tuple(sorted({3, 5, 257, eos, end}))
    for wrong in ("</s>", -1, model.config.vocab, True):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, wrong]}))
        with pytest.raises(ValueError, match=f"generation_config.json: eos_token_id has {wrong!r}, which is"):
            stop_tokens(str(folder), model, tokenizer)
    (folder / "generation_config.json").unlink()
    assert stop_tokens(str(folder), model, tokenizer) == tuple(sorted({257, eos, end}))


def chat_rows(count=8):
    turns = [("user", "what is {}?"), ("assistant", "it is {}"), ("user", "and {}?"), ("assistant", "{} too")]
    return [
        {"messages": [{"role": role, "content": text.format(i)} for role, text in turns]}
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ("llama3", "chatml", "gemma", "marked", "plain"))
def test_training_sequences_end_with_stop_tokens(kind, tmp_path):
    write(tmp_path / "r.jsonl", chat_rows())
    tokenizer = tiny(kind)
    info = Rows(str(tmp_path / "r.jsonl"), max_length=128).open(tokenizer, cache=tmp_path).info
    end = KINDS[kind][3].strip() or tokenizer.eos_token  # the plain template ends with a line break, then EOS
    assert info.learned_ends == {tokenizer.convert_tokens_to_ids(end): 8}
    write(tmp_path / "p.jsonl", make_rows(9))
    info = PairRows(str(tmp_path / "p.jsonl"), held_out=0.2, batch=3).open(tokenizer, cache=tmp_path).info
    assert info.learned_ends == {tokenizer.convert_tokens_to_ids(end): 18}


def test_a_learned_end_that_is_no_stop_token_is_a_warning():
    tokenizer = tiny("gemma")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    (line,) = stop_lines((tokenizer.eos_token_id,), {tokenizer.eos_token_id: 3}, tokenizer)
    assert line == f"completions end at '<eos>' ({tokenizer.eos_token_id})"
    _, warning = stop_lines((tokenizer.eos_token_id,), {end: 9, tokenizer.eos_token_id: 3}, tokenizer)
    assert warning.startswith(
        f"warning: 9 of 12 responses (75 %) end otherwise, most often with '<end_of_turn>' ({end})"
    )


def test_a_run_says_before_it_starts_where_its_completions_end_and_what_its_template_drops(tmp_path):
    write_place(tmp_path)
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [256, 257]}')
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    write(tmp_path / "tools.jsonl", [{"messages": messages, "tools": [{"name": "sum"}]}] * 9)
    job = prepare(tmp_path, "data=tools.jsonl", "data.format=auto")
    assert job.stop == (256, 257)
    with working_directory(tmp_path):
        lines = startup_lines(job, 0, [])
    assert "completions end at '<s>' (256), '</s>' (257)" in lines
    assert any(line.startswith("warning: tools.jsonl:1: the chat template of base renders") for line in lines)


def test_an_exported_model_ends_where_its_template_ends_a_turn(folder, tmp_path):
    model = pretrained.model_for(str(folder))
    base = jax.tree.map(np.asarray, pretrained.load_frozen(str(folder), model, make_mesh(MeshShape())))
    tokenizer = tiny("gemma")
    hf_write.save_folder(tmp_path, model, base, tokenizer, str(folder))
    written = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert written == [257, *tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])]
    hf_write.save_folder(tmp_path, model, base, None, str(folder))
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 257


@pytest.mark.parametrize(
    "in_config, generation, expected",
    [([2, 7], 9, [9, 2, 7]), (2, [9, 2], [9, 2]), ([2, 7], None, [2, 7]), (2, 2, 2), (7, "absent", 7)],
)
def test_an_exported_model_ends_where_its_config_does_too(tmp_path, in_config, generation, expected):
    """What a run stops at is the union of both files; vLLM and transformers read generation_config.json."""
    source = write_folder(tmp_path / "in", tiny_torch(num_hidden_layers=1))
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": in_config}
    (source / "config.json").write_text(json.dumps(config))
    path = source / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation != "absent":
        path.write_text(json.dumps({"eos_token_id": generation}))
    model = pretrained.model_for(str(source))
    base = jax.tree.map(np.asarray, pretrained.load_frozen(str(source), model, make_mesh(MeshShape())))
    hf_write.save_folder(tmp_path / "out", model, base, None, str(source))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert written == expected
