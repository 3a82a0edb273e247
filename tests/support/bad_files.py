"""Damaged folders of models, adapters and runs: how each is changed, and words that the error must have."""

import base64
import json

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = 10**400

# Values of a model's config.json.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "head_dim", "max_position_embeddings")  # fmt: skip
SCALINGS = (
    "linear", [1], {"rope_type": "mrope", "factor": 2}, {"rope_type": "linear"}, {"factor": 2},
    {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": -1},
    {"rope_type": "linear", "factor": "x"}, {"rope_type": "llama3", "factor": 8},
    {"rope_type": 3, "factor": 2}, {"rope_type": "linear", "factor": HUGE},
)  # fmt: skip
CONFIGS = [
    *(({name: value}, "config.json") for name in SIZES for value in (-1, 2**40, "64", [64], 1.5, True, HUGE)),
    *(({name: 300}, "its config") for name in ("vocab_size", "num_hidden_layers", "intermediate_size")),
    *(({"rms_norm_eps": value}, "config.json") for value in ("small", [1], None, HUGE, {})),
    *(({"rope_theta": value, "rope_parameters": None}, "config.json") for value in ("wide", [], HUGE, {})),
    *(({"rope_scaling": value, "rope_parameters": None}, "config.json") for value in SCALINGS),
    *(({"model_type": value}, "config.json") for value in ("mamba", "", 3, ["llama"], {"a": 1})),
    *(({"quantization_config": {"quant_method": value}}, "quant_method")
      for value in ("hqq", ["gptq"], {"a": 1}, 3, "")),
    *(({"quantization_config": value}, "quantization_config must be an object") for value in ("x", [1], 4)),
    ({"quantization_config": {"quant_method": "gptq", "bits": "4"}}, "gptq weights of '4' bits"),
    ('{"vocab_size": ' + "9" * 5000 + "}", "config.json: not JSON (a number has thousands of digits)"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "proj.bias"),
    ({"mlp_bias": True}, "down_proj.bias"),
    *(({name: value}, f"config: {name}") for name in ("eos_token_id", "bos_token_id")
      for value in ({"a": 1}, "x", 1.5, -3, 99999)),
    ({"eos_token_id": [1, [1]]}, "config: eos_token_id"),
    ({"num_hidden_layers": 4096}, "layers=4096; expected from 1 to 2^12 - 1"),
    *(({name: 0}, "config.json") for name in ("num_key_value_heads", "head_dim")),
]  # fmt: skip
CONFIG_TEXTS = [
    "",
    "{",
    "[]",
    "null",
    '"x"',
    "3",
    DEEP,
    '{"a": ' + DEEP + "}",
    "\xff\xfe",
]

# Parts of a tokenizer.json that make a text or the memory grow without limit.
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
CHAIN = [{"type": "Replace", "pattern": {"String": x}, "content": 10 * y} for x, y in ("ab", "bc")]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TEXT_TWICE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
              "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
              "special_tokens": {}}  # fmt: skip
SPECIAL = {"SpecialToken": {"id": "<s>", "type_id": 0}}
LONG_TABLE = base64.b64encode(bytes(4) + b"a\0" + 41 * b"a" + b"\0").decode()
TOKENIZERS = [
    (
        {"normalizer": {"type": "Sequence", "normalizers": [DOUBLED] * 40}},
        "lengthens a text is 1,099,511,627,776",
    ),
    (
        {"normalizer": {"type": "Sequence", "normalizers": [{"normalizers": [DOUBLED] * 6}]}},
        "lengthens a text",
    ),
    ({"normalizer": {"type": "Sequence", "normalizers": CHAIN}}, "lengthens a text is 100,"),
    ({"normalizer": {"type": "Replace", "pattern": {"Regex": "b*"}, "content": "x" * 40}}, "a text is 41"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": LONG_TABLE}}, "lengthens a text"),
    ({"normalizer": {"type": "Prepend", "prepend": "x" * 200}}, "length of prepend is 200"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}}, "lengthens a text"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 65}}, "steps is 65"),
    ({"post_processor": {"type": "Sequence", "processors": [TEXT_TWICE] * 20}}, "lengthens a text"),
    ({"post_processor": {**TEXT_TWICE, "single": [SPECIAL] * 65}}, "number of items in single is 65"),
    ({"post_processor": {**TEXT_TWICE, "special_tokens": {"<s>": {"ids": [1] * 999}}}}, "a special token"),
    ({"decoder": {"type": "Sequence", "decoders": [DOUBLED] * 40}}, "lengthens a text"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "zz": 2**31}, "merges": []}}, "largest token id"),
    ({"model": {"type": "BPE", "vocab": {"a" * 9000: 0}, "merges": []}}, "longest token is 9,000"),
    ({"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**9}}, "max_input"),
    ({"model": {"vocab": {"a": 0}, "end_of_word_suffix": "x" * 200}}, "end_of_word_suffix"),
    ({"added_tokens": [{}] * 131073}, "number of added_tokens is 131,073"),
]

# Chat templates.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOOP = "{% for i in range(99999) %}"
TEMPLATES = [
    "{{ 1/0 }}", "{{ messages[0]['content'] / 0 }}", "{{ messages[99]['content'] }}", "{{ undefined() }}",
    "{{ raise_exception('no') }}", "{% for", "{{ ", "{% endfor %}", "{{ messages | nothing }}",
    "{% include 'x' %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% generation %}",
    "{{ range(10**12) | list }}", "{{ 'x'.x.y }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    LOOP * 3 + "{% endfor %}" * 3, "{{ 'x' * 10**11 }}", "{{ '%99999999999d' % 1 }}",
    "{{ 'x'.center(10**11) }}", "nothing at all",
    *(f"{{% if messages[0].content == 'hi' %}}{text}{{% endif %}}{CHATML}" for text in (  # on some rows alone
        "{{ 'a' * 3000000000 }}", LOOP * 2 + "{% endfor %}" * 2, "{{ 1/0 }}",
        "{{ raise_exception('no') }}", "{{ 'a' * 17000000 }}")),
]  # fmt: skip

# Values of an adapter's adapter_config.json.
PEFT = [
    *(({"r": value}, "adapter_config.json") for value in (0, -1, 2**20, "2", None, 1.5, [2], HUGE)),
    *(({"lora_alpha": value}, "adapter_config.json") for value in ("4", None, [], HUGE, True)),
    *(({"lora_dropout": value}, "dropout") for value in ("0.1", [], HUGE, 1.5, -0.1)),
    *(({"peft_type": value}, "peft_type") for value in ("IA3", "VERA", None, 3, ["LORA"], {})),
    *(({"bias": value}, "bias") for value in ("some", 3, None)),
    *(({name: True}, name) for name in ("fan_in_fan_out", "use_dora", "use_qalora", "lora_bias")),
    *(({"task_type": value}, "task_type") for value in ("SEQ_2_SEQ_LM", 3, ["CAUSAL_LM"])),
    *(({"modules_to_save": value}, "modules_to_save") for value in (["embed_tokens"], "score", {"a": 1})),
    *(({"rank_pattern": value}, "rank_pattern") for value in (
        "q_proj", [2], {"q_proj": 0}, {"q_proj": "2"}, {"q_proj": 1.5}, {"(": 2}, {"[a-": 2}, 3)),
    *(({"alpha_pattern": value}, "alpha_pattern") for value in (
        "q_proj", [2], {"q_proj": "2"}, {"q_proj": None}, {"q_proj": HUGE}, {"(?P<": 2})),
    *(({"layers_pattern": "h", "layer_replication": value}, "layer_replication") for value in ([[0, 1]],
    "x")),
    *(({"init_lora_weights": value}, "init_lora_weights") for value in ("pissa", "loftq", 3)),
    ({"target_parameters": ["x"]}, "target_parameters"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
]  # fmt: skip

# Files of a run's folder.
RUNS = [
    *((name, text, name) for name in ("config.json", "summary.json") for text in (
        "", "{", "[]", "null", "3", '"x"', DEEP, "\xff", '{"steps": 1, "files": []}',
        '{"steps": "x", "weights": 3}')),
    *(("config.json", json.dumps(value), "config.json") for value in (
        {}, {"weights": None}, {"weights": ["base"], "model": {"dtype": "float32"}, "data": {"date": "x"}},
        {"weights": "base", "model": {"dtype": "float7"}, "data": {"date": "x"}},
        {"weights": "base", "model": None, "data": {"date": "x"}},
        {"weights": "base", "model": {"dtype": "float32"}},
        {"weights": "base", "model": {"dtype": "float32"}, "data": {"date": 3}})),
    *(("config.json",
    json.dumps({"weights": "base", "model": {"dtype": "float32"}, "data": {"date": "x"}, "quant": quant}),
       "quant") for quant in ({"kind": "nf5"}, {"kind": 3}, {"kind": "nf4", "block": "64"},
       {"kind": "nf4", "new": 1},
                              {"kind": "nf4", "targets": 3}, {"kind": "nf4", "double": "x"})),
    *(("summary.json", json.dumps({"steps": steps}), "summary.json") for steps in (-1, 1.5, True, "4", None,
    [4])),
    ("summary.json", json.dumps({"steps": 1, "files": {"adapter/adapter_config.json": "0" * 64}}),
    "adapter_config.json"),
    ("summary.json", json.dumps({"steps": 1, "files": {"adapter/adapter_config.json": 3}}),
    "adapter_config.json"),
    ("summary.json", json.dumps({"steps": 1, "files": {"adapter/gone": "0" * 64}}), "gone"),
]  # fmt: skip

# The ids of the cases that run by default: one of each kind of mistake.
QUICK_CONFIGS = (
    '{"vocab_size": -1}', '{"hidden_size": 1099511627776}', '{"num_hidden_layers": 300}',
    '{"rms_norm_eps": null}', '{"rope_scaling": {"factor": 2}, "rope_parameters": null}',
    '{"model_type": "mamba"}', '{"quantization_config": {"quant_method": "hqq"}}',
    '{"quantization_config": "x"}', '{"vocab_size": ' + 85 * "9" + "...", '{"hidden_act": "gelu"}',
    '{"attention_bias": true}', '{"eos_token_id": [1, [1]]}', "{", "null", DEEP[:100] + "...",
)  # fmt: skip
QUICK_TEMPLATES = (
    "{{ 1/0 }}", "{% for", "{{ ''.__class__.__mro__ }}", "{{ range(10**12) | list }}", "{{ 'x' * 10**11 }}",
    "nothing at all", "*'hi' %}{% for i*"
)  # fmt: skip
QUICK_PEFT = (
    '{"r": 0}', '{"lora_alpha": "4"}', '{"lora_dropout": 1.5}', '{"peft_type": "IA3"}',
    '{"peft_type": "VERA"}', '{"bias": "some"}', '{"fan_in_fan_out": true}',
    '{"task_type": "SEQ_2_SEQ_LM"}', '{"modules_to_save": "score"}', '{"rank_pattern": {"(": 2}}',
    '{"alpha_pattern": {"q_proj": null}}', '{"init_lora_weights": "pissa"}', '{"target_parameters": ["x"]}',
)  # fmt: skip
QUICK_RUNS = (
    "config.json {", 'config.json {"steps": 1, "files": []}', 'config.json {"weights": null}',
    "summary.json null", 'summary.json {"steps": 1, "files": {"adapter/gone": *',
    'summary.json {"steps": -1}',
)  # fmt: skip
