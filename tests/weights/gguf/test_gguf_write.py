"""GGUF files that jaxft writes, against llama.cpp's converter, the gguf package and transformers."""

import copy
import json
import math
import shutil

import gguf as gguf_package
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_families import CONTEXT, FAMILIES, tiny_family, with_rope, write_family
from scripts_in_process import call
from test_gguf_sentencepiece import CORPUS, write
from tiny_llama import edit_config, some_tokens, tiny_tokenizer, tiny_torch, torch_logits
from tiny_tokenizers import tiny as chat_tokenizer

from jaxft.models import model_types
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.param_spec import init_params
from jaxft.nn.rope import attention_scaling, frequencies
from jaxft.weights import pretrained
from jaxft.weights.edit.merged_weights import merge_files
from jaxft.weights.gguf import gguf_config, gguf_quantize, gguf_write
from jaxft.weights.gguf.gguf_file import read_gguf_header
from jaxft.weights.param_loading import param_readers
from jaxft.weights.peft import peft_write
from jaxft.weights.tensors import FileTensor, ModelFiles

torch = pytest.importorskip("torch")
ROWS = 416  # of embeddings: the tiny tokenizers have up to 400 tokens
SIMPLE = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)


def plain_tokenizer():
    return chat_tokenizer("plain")


def tiny_llama(**changes):
    return tiny_torch(**{"vocab_size": ROWS, "num_hidden_layers": 1, **changes})


def files_of(reference):
    """The tensors of a torch model as the reader of its folder offers them."""
    state = {name: x.detach().numpy() for name, x in reference.state_dict().items()}
    if reference.config.tie_word_embeddings:
        del state["lm_head.weight"]
    found = {name: FileTensor(x.shape, x.dtype, x.__getitem__) for name, x in state.items()}
    return ModelFiles("state", found)


def save(path, reference, mixture="F32", tokenizer=None, ends=(), name="tiny"):
    """Write a torch model as jaxft does; returns jaxft's model."""
    config = reference.config.to_dict()
    family = model_types.family_of(config)
    model = family.build(family.from_hf(config), dtype=jnp.float32)
    base = merge_files(param_readers(files_of(reference), model), model, None, jnp.float32)
    options = gguf_write.GgufOptions(mixture, name, ends)
    gguf_write.save_gguf(path, model, base, tokenizer or plain_tokenizer(), options)
    return model


def raw_tensors(path):
    """Name -> type, shape and bytes of every tensor, by the gguf package's own reader."""
    reader = gguf_package.GGUFReader(path)
    return {t.name: (t.tensor_type, tuple(t.shape), t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_of_every_family_is_that_of_llama_cpps_converter(tmp_path, name):
    """Tensors byte by byte; metadata of the architecture value by value."""
    changes = {"vocab_size": ROWS, **({"pad_token_id": None} if "gemma" not in name else {})}
    if name == "phi3":  # the length before a scaling that it does not have
        changes["original_max_position_embeddings"] = CONTEXT
    reference = tiny_family(name, **changes)
    if name == "mistral small":  # mistral3 has llama's arithmetic; jaxft writes architecture llama
        reference.config.sliding_window = None
    save(tmp_path / "ours.gguf", reference)
    theirs = read_gguf_header(write_family(tmp_path / "theirs.gguf", name, reference))
    ours = read_gguf_header(tmp_path / "ours.gguf")
    if name in ("mistral", "phi3"):  # the context length is the window, which llama.cpp ignores
        theirs.metadata[theirs.key("context_length")] = reference.config.sliding_window
    assert raw_tensors(tmp_path / "ours.gguf") == raw_tensors(tmp_path / "theirs.gguf")
    for key, value in theirs.metadata.items():
        short = key.removeprefix(f"{theirs.architecture}.")
        if short != key and not (short.endswith("pattern") and ours.key(short) not in ours.metadata):
            got = ours.metadata[ours.key(short)]
            assert got == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


def half(value):
    return np.float16(value).tobytes()


def nibbles(codes):
    return bytes(codes[i] & 15 | (codes[i + 16] & 15) << 4 for i in range(16))


def block_of_ggml(x, kind):
    """The bytes of 32 values by ggml-quants.c, in plain Python with float32 numbers."""
    one = np.float32
    largest, low, high = max(x, key=abs), min(x), max(x)
    if kind is Kind.Q8_0:
        d = abs(largest) / one(127)
        scaled = [v * (one(1) / d if d else one(0)) for v in x]
        return half(d) + np.int8([math.copysign(math.floor(abs(v) + 0.5), v) for v in scaled]).tobytes()
    five = kind in (Kind.Q5_0, Kind.Q5_1)
    if kind in (Kind.Q4_0, Kind.Q5_0):
        zero, head = 16 if five else 8, b""
        d = largest / one(-zero)
        shifted = [v * (one(1) / d if d else one(0)) + one(zero + 0.5) for v in x]
    else:
        zero, head = 8 * (1 + five), half(low)
        d = (high - low) / one(2 * zero - 1)
        shifted = [(v - low) * (one(1) / d if d else one(0)) + one(0.5) for v in x]
    codes = [min(2 * zero - 1, int(v)) for v in shifted]
    fifth = sum((code >> 4) << i for i, code in enumerate(codes)).to_bytes(4, "little") if five else b""
    return half(d) + head + fifth + nibbles(codes)


@pytest.mark.parametrize("kind", SIMPLE, ids=lambda kind: kind.name)
def test_simple_types_have_the_bytes_of_llama_cpps_reference(kind):
    """With zeros, equal values, ties, and both signs of the largest."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, 96)).astype(np.float32)
    x[0], x[1], x[2, :32], x[3] = 0.0, 1.0, np.arange(32) / 2 - 8, -x[4]
    x[5, 0], x[6] = 1e-30, 1e-8 * x[6]
    expected = b"".join(block_of_ggml(block, kind) for block in x.reshape(-1, 32))
    assert gguf_quantize.tensor_bytes(x, kind.name).tobytes() == expected


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny Llama's folder with rows of embeddings that have no token, and what it is made of."""
    folder, reference = tmp_path_factory.mktemp("base"), tiny_llama(num_hidden_layers=3)
    reference.save_pretrained(str(folder))
    plain_tokenizer().save_pretrained(str(folder))
    return folder, reference


def test_transformers_reads_the_exported_model_and_tokenizer(exported, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, reference = exported
    path = tmp_path / "new" / "tiny.gguf"
    code, out, err = call(monkeypatch, capsys, "export", "--model", folder, "--out", path, "--gguf", "f32")
    assert code == 0 and "tensors: 30 F32" in out, err
    assert [p.name for p in path.parent.iterdir()] == ["tiny.gguf"]
    theirs = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    tokens = some_tokens(vocab=ROWS)
    np.testing.assert_allclose(torch_logits(theirs, tokens), torch_logits(reference, tokens), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    text = "<s>Hello 12\n\u00e9</s>"
    expected = plain_tokenizer()(text, add_special_tokens=False).input_ids
    assert tokenizer(text, add_special_tokens=False).input_ids == expected
    assert tokenizer.chat_template == plain_tokenizer().chat_template
    metadata = read_gguf_header(path).metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == ROWS and metadata["general.file_type"] == 0


@pytest.mark.parametrize("kind", ["llama3", "chatml", "gemma"])
def test_added_tokens_template_and_ends_come_back(tmp_path, kind):
    """Special tokens are CONTROL, plain ones USER_DEFINED; every token that ends a completion is an end."""
    tokenizer = copy.deepcopy(chat_tokenizer(kind))
    tokenizer.add_tokens(["<tool>"])
    reference = tiny_llama(bos_token_id=0, eos_token_id=1)
    ends = tuple(tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "<end_of_turn>"]))
    save(tmp_path / "tiny.gguf", reference, tokenizer=tokenizer, ends=ends)
    again = pretrained.load_tokenizer(str(tmp_path / "tiny.gguf"))
    chat = [{"role": "user", "content": "Hi 12, it's"}, {"role": "assistant", "content": "Yes<tool>"}]
    texts = [tok.apply_chat_template(chat, tokenize=False, date_string="x") for tok in (tokenizer, again)]
    assert texts[0] == texts[1]
    assert again(texts[0]).input_ids == tokenizer(texts[0]).input_ids
    metadata = read_gguf_header(tmp_path / "tiny.gguf").metadata
    types = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert (types["<|im_start|>"], types["<tool>"], types["[PAD415]"]) == (3, 4, 5)
    assert set(pretrained.model_for(str(tmp_path / "tiny.gguf")).config.eos) == set(ends)
    assert metadata["tokenizer.ggml.add_bos_token"] == (kind != "chatml")


def test_a_sentencepiece_vocabulary_comes_back(tmp_path):
    """Scores follow from the order of merges."""
    tokenizer = pretrained.load_tokenizer(str(write(tmp_path)))
    save(tmp_path / "again.gguf", tiny_llama(), tokenizer=tokenizer)
    again = pretrained.load_tokenizer(str(tmp_path / "again.gguf"))
    for text in [*CORPUS, "hello<|im_end|>world<tool call> x</s>"]:
        assert again.encode(text) == tokenizer.encode(text), text
    first, second = (read_gguf_header(tmp_path / f"{name}.gguf").metadata for name in ("tiny", "again"))
    count = len(first["tokenizer.ggml.tokens"])  # second has rows without tokens
    for key in ("tokens", "token_type"):
        assert second[f"tokenizer.ggml.{key}"][:count] == first[f"tokenizer.ggml.{key}"]


def assert_refused(path, match, reference, **settings):
    with pytest.raises(ValueError, match=match) as caught:
        save(path, reference, **settings)
    assert "\n" not in str(caught.value) and not list(path.parent.iterdir())


def test_what_gguf_cannot_express_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "tiny.gguf"
    bad = tiny_llama()
    bad.model.layers[0].mlp.up_proj.weight.data[3, 4] = torch.nan
    assert_refused(path, r"tiny.gguf: not written: tensor blk.0.ffn_up.weight: 1 of 6144 values are NaN", bad)
    large = tiny_llama()
    large.model.layers[0].mlp.up_proj.weight.data[3, 4] = 1e6
    assert_refused(path, r"blk.0.ffn_up.weight: some values are too large for F16", large, mixture="F16")
    assert_refused(path, r"blk.0.ffn_up.weight: some values are too large for Q8_0", large, mixture="Q8_0")
    biased = tiny_llama(attention_bias=True)
    assert_refused(path, r"k_proj.bias cannot be written .* llama has no such tensor", biased)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert_refused(path, r"rope type 'dynamic' cannot", tiny_llama(rope_parameters=dynamic))
    few = tiny_llama(vocab_size=257, bos_token_id=0, eos_token_id=0)
    assert_refused(path, r"token id \d+ .*, but the model has only 257 embeddings", few)
    smollm = tiny_family("smollm3", vocab_size=ROWS, no_rope_layers=[0, 1, 1, 1])
    assert_refused(path, r"architecture smollm3 lacks .*no_rope_layers", smollm)
    for name, rope, words in (
        ("qwen3", "llama3", "rope of type 'llama3' with .*low_freq_factor=2.0"),
        ("qwen3", "longrope, long texts", "rope of type 'longrope'"),
        ("llama", "yarn betas", "rope of type 'yarn' with .*beta_fast=8.0"),
        ("gemma3", "yarn attention_factor 1.3", "local_rope of type 'default'"),  # it would be scaled too
    ):
        model = tiny_family(name, vocab_size=ROWS, **with_rope(name, rope))
        assert_refused(path, f"llama.cpp's architecture {name} lacks {words}", model)


@pytest.mark.parametrize("name", ["phi3", "olmo2"])
def test_heads_that_do_not_make_up_the_width_are_refused_where_llama_cpp_expects_it(tmp_path, name):
    reference = tiny_family(name, vocab_size=ROWS, head_dim=32)
    words = rf"4 heads of 32 cannot be written .* {name}: .* the width of 64; write a Hugging Face folder"
    assert_refused(tmp_path / "tiny.gguf", words, reference)


QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


@pytest.mark.parametrize(("name", "changes"), [("mistral", {}), ("phi3", {}), ("qwen2", QWEN_WINDOWS)])
def test_a_window_that_llama_cpp_ignores_is_the_context_length_of_the_file(tmp_path, name, changes):
    """Up to which the file is right; a window as long as the context changes nothing."""
    config = save(tmp_path / "tiny.gguf", tiny_family(name, vocab_size=ROWS, **changes)).config
    header = read_gguf_header(tmp_path / "tiny.gguf")
    assert header.metadata[header.key("context_length")] == 5
    (note,) = gguf_config.context_notes(config)
    assert note.startswith(f"warning: llama.cpp's architecture {header.architecture} ignores the sliding")
    assert "context length is set to 5, up to" in note and "(the model has 64)" in note
    changes = {**changes, "sliding_window": CONTEXT}
    config = save(tmp_path / "tiny.gguf", tiny_family(name, vocab_size=ROWS, **changes)).config
    header = read_gguf_header(tmp_path / "tiny.gguf")
    assert header.metadata[header.key("context_length")] == CONTEXT
    assert not gguf_config.context_notes(config)


def rope_metadata(path, name, rope):
    """What a file of a family with one of ROPES states of it, the config read again, and warnings."""
    sizes = {"vocab_size": ROWS, "max_position_embeddings": 1024}
    model = save(path, tiny_family(name, **sizes, **with_rope(name, rope)))
    header, again = read_gguf_header(path), pretrained.model_for(str(path)).config
    np.testing.assert_allclose(
        *(frequencies(config.rope, config.head_dim) for config in (again, model.config)), rtol=1e-6
    )
    assert attention_scaling(again.rope) == pytest.approx(attention_scaling(model.config.rope), rel=1e-6)
    start = header.key("rope.scaling.")
    stated = {key.removeprefix(start): x for key, x in header.metadata.items() if key.startswith(start)}
    return header.architecture, stated, gguf_config.context_notes(model.config)


def test_ropes_are_stated_as_llama_cpp_reads_them(tmp_path):
    """YaRN's attention factor relative to 0.1 log(4) + 1 = 1.1386; betas in mistral3, which alone reads them;
    LongRoPE's type, without which only phi3 loads the tables; Llama 3's frequencies as a table.
    """
    path = tmp_path / "tiny.gguf"
    _, stated, _ = rope_metadata(path, "qwen3", "yarn attention_factor 1.3")
    assert stated["attn_factor"] == pytest.approx(1.3 / 1.1386294) and "yarn_attn_factor" not in stated
    _, stated, _ = rope_metadata(path, "qwen3", "yarn mscale")
    assert stated["attn_factor"] == pytest.approx(1 / 1.0970406) and "yarn_log_multiplier" not in stated
    assert "attn_factor" not in rope_metadata(path, "qwen3", "yarn")[1]
    architecture, stated, _ = rope_metadata(path, "mistral small", "yarn betas")
    assert (architecture, stated["yarn_beta_fast"], stated["yarn_beta_slow"]) == ("mistral3", 8.0, 2.0)
    _, stated, (note,) = rope_metadata(path, "granite", "longrope, long texts")
    assert (stated["type"], stated["original_context_length"]) == ("longrope", 128)
    assert "with -c 128 for texts up to 128 tokens" in note
    architecture, stated, notes = rope_metadata(path, "llama", "llama3")
    assert (architecture, stated, notes) == ("llama", {}, [])
    assert raw_tensors(path)["rope_freqs.weight"][1] == (8,)


def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path):
    from tokenizers import pre_tokenizers

    path, reference = tmp_path / "tiny.gguf", tiny_llama()
    tokenizer = copy.deepcopy(plain_tokenizer())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert_refused(path, r"splits text as none of llama.cpp's pre-tokenizers", reference, tokenizer=tokenizer)
    assert_refused(path, r"a BPE tokenizer without merges cannot", reference, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            ("--gguf", "Q4_K_X"),
            "--gguf Q4_K_X: not a type of GGUF files that jaxft writes; near: Q4_K_S",
        ),
        (("--gguf", "Q8_0", "--pack", "nf4"), "--gguf names the type of the weights"),
        (("--gguf", "Q8_0", "--dtype", "float32"), "--gguf names the type of the weights"),
        (("--gguf", "Q8_0", "--calibrate", "no_rows"), "--calibrate has no effect on --gguf Q8_0; leave"),
        (("--gguf", "Q4_KK", "--calibrate", "no_rows"), "--gguf Q4_KK: not a type of GGUF files"),
        (("--gguf", ""), "--gguf is empty; give a value, such as Q8_0, or leave it out"),
        (("--gguf", "Q4_0", "--calibrate", ""), "--calibrate is empty; give a value"),
        (("--gguf", "Q8_0", "--out", "folder"), "is not the name of a GGUF file; choose NAME.gguf"),
    ],
)
def test_bad_command_lines_are_one_line(exported, tmp_path, monkeypatch, capsys, more, match):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, "export", "--model", exported[0], "--out", "x.gguf", *more)
    assert code and match in err.splitlines()[-1], err
    assert not list(tmp_path.iterdir())


def test_unsupported_families_are_refused_with_those_that_are_written(
    exported, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(exported[0], tmp_path / "other")
    edit_config(folder, model_type="internlm3", architectures=["InternLM3ForCausalLM"])
    options = ("--model", folder, "--out", tmp_path / "new" / "x.gguf", "--gguf", "Q8_0")
    code, _, err = call(monkeypatch, capsys, "export", *options)
    assert code and "internlm3 models cannot be written as GGUF; jaxft writes gemma, gemma2" in err, err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("more", [(), ("--adapter-only",)], ids=["model", "adapter"])
def test_an_existing_file_is_not_overwritten(exported, tmp_path, monkeypatch, capsys, more):
    model = pretrained.model_for(str(exported[0]), dtype=jnp.float32)
    adapted_folder(tmp_path / "adapter", model, exported[0])
    path = tmp_path / "x.gguf"
    path.write_bytes(b"mine")
    options = ("--model", exported[0], "--adapter", tmp_path / "adapter", "--out", path, "--gguf", "F16")
    code, _, err = call(monkeypatch, capsys, "export", *options, *more)
    assert code == 1 and err == f"error: --out {path} exists; choose another name\n"
    assert path.read_bytes() == b"mine"


def test_the_types_of_a_mixture_are_those_of_llama_quantize():
    """By the rules of src/llama-quant.cpp, worked out by hand."""
    model = gguf_quantize.MixtureModel("llama", 32, 32, 8, tied=False)

    def kinds(mixture, module, model=model, width=4096):
        return [
            gguf_quantize.tensor_kind(f"blk.{i}.{module}.weight", (4096, width), mixture, model)
            for i in range(model.layers)
        ]

    # Of 32 layers the first and last eighth, and between them every third: 4 + 4 + 8 are Q6_K, as in the
    # published Q4_K_M of Llama-3.1-8B.
    more = [*range(4), 6, 9, 12, 15, 18, 21, 24, 27, *range(28, 32)]
    for module in ("attn_v", "ffn_down"):
        assert kinds("Q4_K_M", module) == ["Q6_K" if i in more else "Q4_K" for i in range(32)]
    assert set(kinds("Q4_K_M", "attn_q")) == {"Q4_K"}
    assert kinds("Q4_K_S", "ffn_down") == ["Q5_K"] * 4 + ["Q4_K"] * 28
    assert kinds("Q4_K_M", "ffn_down", width=1536 + 32)[:5] == ["Q8_0"] * 4 + ["Q5_0"]
    assert gguf_quantize.tensor_kind("output.weight", (100, 4096), "Q4_0", model) == "Q6_K"
    assert gguf_quantize.tensor_kind("token_embd.weight", (100, 4096), "Q4_0", model) == "Q4_0"
    assert gguf_quantize.tensor_kind("output.weight", (100, 576), "Q4_K_M", model) == "Q8_0"
    assert gguf_quantize.tensor_kind("blk.0.attn_q.weight", (8, 48), "Q4_K_M", model) == "F16"


def test_the_output_of_an_earlier_export_survives_one_that_fails(exported, tmp_path):
    path = tmp_path / "tiny.gguf"
    save(path, exported[1])
    before = path.read_bytes()
    bad = tiny_llama()
    bad.lm_head.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"tensor output.weight"):
        save(path, bad)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert json.dumps(sorted(raw_tensors(path))) == json.dumps(sorted(read_gguf_header(path).tensors))


FITTED = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)
# Root mean square errors of rounding normal numbers to equal steps between their limits: the range of 32
# of them is 4.14 standard deviations (of 16: 3.53), so a step is 4.14 / 15 and its error step / sqrt(12).
# A fit is better, but for Q6_K, whose codes are symmetric around zero.
UNIFORM = {Kind.Q4_K: 4.14 / 15 / 12**0.5, Kind.Q5_K: 4.14 / 31 / 12**0.5, Kind.Q6_K: 3.53 / 63 / 12**0.5}


@pytest.fixture(scope="module")
def normal():
    x = np.random.default_rng(0).normal(size=(16, 512)).astype(np.float32)
    x[0], x[1], x[2] = 0.0, 1.0, np.abs(x[2])
    return x


def dequantised(x, kind, importance=None):
    raw = gguf_quantize.tensor_bytes(x, kind.name, importance)
    return gguf_package.quants.dequantize(raw.reshape(len(x), -1), kind)


@pytest.mark.parametrize("kind", FITTED, ids=lambda kind: kind.name)
def test_k_types_are_fitted_better_than_rounding_between_limits(kind, normal, monkeypatch):
    monkeypatch.setattr(gguf_quantize, "CHUNKS", (2**20, 2**12))  # several pieces, the last not full
    error = dequantised(normal, kind) - normal
    rms = float(np.sqrt(np.square(error[3:]).mean()))
    assert 0.6 * UNIFORM[kind] < rms < (1.1 if kind is Kind.Q6_K else 0.95) * UNIFORM[kind]
    assert not error[0].any() and np.abs(error[1]).max() < 1e-3
    assert np.abs(error[2]).max() < 4 * UNIFORM[kind]


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_importances_lower_the_error_of_the_inputs_that_have_them(kind, normal):
    importance = np.where(np.arange(512) % 4 == 0, 100.0, 1.0).astype(np.float32)
    plain, weighted = (np.square(dequantised(normal, kind, i) - normal)[3:] for i in (None, importance))
    assert (weighted * importance).mean() < 0.93 * (plain * importance).mean()
    assert weighted[:, ::4].mean() < 0.9 * plain[:, ::4].mean()


def test_a_mixture_of_k_types_is_read_again(tmp_path):
    """Q4_K_M of a Llama of width 256 whose ffn_down has 288 inputs, which Q6_K does not divide."""
    reference = tiny_llama(hidden_size=256, intermediate_size=288)
    save(tmp_path / "tiny.gguf", reference, "Q4_K_M")
    files, state = pretrained.open_files(str(tmp_path / "tiny.gguf")), reference.state_dict()
    tensors = read_gguf_header(tmp_path / "tiny.gguf").tensors
    kinds = {name: tensor.kind for name, tensor in tensors.items()}
    assert (kinds["blk.0.attn_q.weight"], kinds["output.weight"]) == ("Q4_K", "Q6_K")
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.attn_norm.weight"]) == ("Q8_0", "F32")
    for name, value in state.items():
        error = np.abs(files.read(name) - value.numpy())
        assert error.mean() < (0.08 if value.ndim == 2 else 1e-9) * value.abs().mean(), name


def adapted_folder(folder, model, base, targets=("q", "o", "down"), **settings):
    """A random adapter in PEFT's layout, and its tree."""
    adapter_settings = Adapter(rank=4, alpha=8.0, targets=targets, **settings)
    specs = adapter_specs(model.specs, adapter_settings)
    fresh, rng = init_params(specs, jax.random.key(0)), np.random.default_rng(3)
    adapter = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) if x.ndim > 1 else x, fresh
    )
    peft_write.save_adapter(folder, adapter, adapter_settings, model, str(base))
    return adapter


def test_a_file_goes_out_as_it_came_and_with_an_adapter_only_adapted_tensors_change(
    tmp_path, monkeypatch, capsys
):
    """Types, metadata and the bytes of all other tensors stay; adapted ones are rounded to their type."""
    source, reference = tmp_path / "in.gguf", tiny_llama(hidden_size=256)
    save(source, reference, "Q4_K_S", name="a name of its own")
    common = ("--model", source, "--gguf", "keep")
    code, out, err = call(monkeypatch, capsys, "export", *common, "--out", tmp_path / "copy.gguf")
    assert code == 0 and "a copy of" in out, err
    assert (tmp_path / "copy.gguf").read_bytes() == source.read_bytes()

    model = pretrained.model_for(str(source), dtype=jnp.float32)
    adapter = adapted_folder(tmp_path / "adapter", model, source)
    options = (*common, "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged.gguf")
    code, _, err = call(monkeypatch, capsys, "export", *options)
    assert code == 0, err
    before, after = read_gguf_header(source), read_gguf_header(tmp_path / "merged.gguf")
    assert after.metadata == before.metadata
    old, new = raw_tensors(source), raw_tensors(tmp_path / "merged.gguf")
    adapted = {f"blk.0.{name}.weight" for name in ("attn_q", "attn_output", "ffn_down")}
    assert {name for name in old if old[name] != new[name]} == adapted
    assert {name: tensor[:2] for name, tensor in old.items()} == {name: t[:2] for name, t in new.items()}
    files, merged = (pretrained.open_files(str(header.path)) for header in (before, after))
    pair = {key: np.asarray(value[0]) for key, value in adapter["layers"]["attn"]["q"].items()}
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = files.read(name) + (pair["a"] @ pair["b"] * pair["scale"]).T
    step = np.abs(expected).max() / 7
    assert np.abs(merged.read(name) - expected).max() < step

    options = ("--model", source, "--gguf", "Q4_K_S", "--out", tmp_path / "again.gguf")
    assert call(monkeypatch, capsys, "export", *options)[0] == 0
    assert raw_tensors(tmp_path / "again.gguf") == old  # nothing is rounded twice


def test_keep_needs_a_gguf_file(exported, tmp_path, monkeypatch, capsys):
    options = ("--model", exported[0], "--gguf", "keep", "--out", tmp_path / "x.gguf")
    code, _, err = call(monkeypatch, capsys, "export", *options)
    assert code and "--gguf keep is for a GGUF file as the model" in err


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_alone_has_llama_cpps_layout(exported, tmp_path, monkeypatch, capsys, rslora):
    """W + alpha / R * lora_b @ lora_a, in llama.cpp's order of rows, is the merged model's W."""
    folder, path = exported[0], tmp_path / "adapter.gguf"
    model = pretrained.model_for(str(folder), dtype=jnp.float32)
    adapted_folder(tmp_path / "adapter", model, folder, rslora=rslora)
    common = ("--model", folder, "--adapter", tmp_path / "adapter", "--gguf", "F32")
    code, out, err = call(monkeypatch, capsys, "export", *common, "--adapter-only", "--out", path)
    assert code == 0 and "9 adapted weights" in out, err
    assert call(monkeypatch, capsys, "export", *common, "--out", tmp_path / "merged.gguf")[0] == 0
    assert call(monkeypatch, capsys, "export", "--model", folder, "--gguf", "F32", "--out",
                tmp_path / "base.gguf")[0] == 0  # fmt: skip
    reader = gguf_package.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    assert (metadata["general.type"], metadata["adapter.type"]) == ("adapter", "lora")
    assert metadata["general.architecture"] == "llama"
    parts = {tensor.name: tensor.data for tensor in reader.tensors}
    merged, base = (
        {t.name: t.data for t in gguf_package.GGUFReader(tmp_path / f"{name}.gguf").tensors}
        for name in ("merged", "base")
    )
    weights = {name.rpartition(".")[0] for name in parts}
    assert {f"{w}.lora_{x}" for w in weights for x in "ab"} == parts.keys()
    for name in weights:
        a, b = parts[f"{name}.lora_a"], parts[f"{name}.lora_b"]
        delta = metadata["adapter.lora.alpha"] / b.shape[1] * b @ a
        np.testing.assert_allclose(base[name] + delta, merged[name], atol=1e-5, err_msg=name)
    assert {name for name in base if (base[name] != merged[name]).any()} == weights


def mistral3_adapter(tmp_path, monkeypatch, capsys):
    """A base of architecture mistral3, as llama.cpp's converter writes Ministral's, and an adapter alone."""
    base, alone = tmp_path / "base.gguf", tmp_path / "alone.gguf"
    with monkeypatch.context() as patched:
        patched.setitem(gguf_config.ARCHITECTURE_OF, "mistral", "mistral3")
        save(base, tiny_family("mistral small", vocab_size=ROWS))
    adapted_folder(tmp_path / "adapter", pretrained.model_for(str(base), dtype=jnp.float32), base)
    common = ("--model", base, "--adapter", tmp_path / "adapter", "--gguf", "F32")
    code, _, err = call(monkeypatch, capsys, "export", *common, "--adapter-only", "--out", alone)
    assert code == 0, err
    return base, alone, common


def test_an_adapter_alone_states_the_architecture_of_its_base_file(tmp_path, monkeypatch, capsys):
    """llama.cpp refuses an adapter of another architecture than the model's."""
    base, alone, _ = mistral3_adapter(tmp_path, monkeypatch, capsys)
    assert read_gguf_header(alone).architecture == read_gguf_header(base).architecture == "mistral3"


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--gguf", "Q4_K_M", "--adapter-only"), "an adapter alone is written as F32, F16, BF16; use F16"),
        (("--adapter-only",), "--adapter-only is for --gguf with an adapter"),
    ],
)
def test_bad_adapter_exports_are_one_line(exported, tmp_path, monkeypatch, capsys, more, match):
    model = pretrained.model_for(str(exported[0]), dtype=jnp.float32)
    adapted_folder(tmp_path / "adapter", model, exported[0])
    options = ("--model", exported[0], "--adapter", tmp_path / "adapter")
    code, _, err = call(monkeypatch, capsys, "export", *options, *more, "--out", tmp_path / "new/sub/x.gguf")
    assert code and match in err.splitlines()[-1], err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_calibration_rows_weight_the_errors_of_the_written_types(tmp_path, monkeypatch, capsys):
    """ffn_up's inputs that the norm before it makes large have smaller errors than without calibration."""
    reference = tiny_llama()
    reference.model.layers[0].post_attention_layernorm.weight.data[:] = torch.where(
        torch.arange(64) % 8 == 0, 8.0, 0.5
    )
    folder = tmp_path / "base"
    reference.save_pretrained(str(folder))
    plain_tokenizer().save_pretrained(str(folder))
    texts = [{"text": f"the rank of a matrix is {i}, the user asks {i * i}"} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, texts)))
    errors = {}
    for name, more in (("plain", ()), ("weighted", ("--calibrate", tmp_path / "rows.jsonl"))):
        path = tmp_path / f"{name}.gguf"
        options = ("--model", folder, "--gguf", "Q4_1", "--out", path, *more)
        code, _, err = call(monkeypatch, capsys, "export", *options)
        assert code == 0, err
        weight = "model.layers.0.mlp.up_proj.weight"
        exact = reference.state_dict()[weight].numpy()
        errors[name] = np.square(pretrained.open_files(str(path)).read(weight) - exact).mean(0)
    large = np.arange(64) % 8 == 0
    assert errors["weighted"][large].mean() < 0.8 * errors["plain"][large].mean()
