"""SentencePiece vocabularies in GGUF files, against SentencePiece, llama.cpp's algorithm and transformers."""

import heapq

import pytest
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_torch

from jaxft.weights import pretrained
from jaxft.weights.gguf import gguf_config, gguf_file

pytest.importorskip("torch")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _, BYTE = range(1, 7)
CHAT = "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"

# A vocabulary of a few words in the order of merges, as SentencePiece's trainer makes them: scores 0, -1, ...
MERGED = [
    "_t", "he", "in", "_a", "_the", "er", "on", "re", "__", "____", "is",
    "at", "_w", "ent", "_went", "ing", "_is", "ll", "hell", "_hell", "_hello", "llo", "lo",
    "or", "ld", "wor", "world", "_world", "_wor", "st", "\u00e9e",
]  # fmt: skip
WORDS = [word.replace("_", "\u2581") for word in MERGED]
LETTERS = [*"\u2581abcdefghijklmnopqrstuvwxyz.,!?'0123456789\n", "\u00e9", "\u4f60"]


def vocabulary():
    """(tokens, scores, types): as in a Llama 2 file, with a chat token of each kind at the end."""
    tokens = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    tokens += [(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)]
    tokens += [(word, -float(i), NORMAL) for i, word in enumerate(WORDS)]
    tokens += [(letter, -float(len(WORDS) + i), NORMAL) for i, letter in enumerate(LETTERS)]
    tokens += [("<|im_end|>", -1000.0, CONTROL), ("<tool call>", -1000.0, USER_DEFINED)]
    return tuple(map(list, zip(*tokens, strict=True)))


def fields(tokens, scores, types, *more):
    model = [("add_tokenizer_model", "llama"), ("add_token_list", tokens), ("add_token_scores", scores)]
    ids = [("add_bos_token_id", 1), ("add_eos_token_id", 2), ("add_unk_token_id", 0)]
    return [*model, ("add_token_types", types), *ids, ("add_chat_template", CHAT), *more]


def write(folder, *more, change=lambda tokens, scores, types: (tokens, scores, types)):
    tiny = tiny_torch(num_hidden_layers=1, bos_token_id=1, eos_token_id=2, vocab_size=384)
    return write_gguf(folder / "tiny.gguf", tiny, fields=fields(*change(*vocabulary()), *more))


def llama_cpp(tokens, scores, text):
    """llama-vocab.cpp, llm_tokenizer_spm_session: merge the neighbours of the best score, leftmost first."""
    ids = {token: i for i, token in enumerate(tokens)}
    symbols, left = list(text), list(range(-1, len(text) - 1))
    right, work = [*range(1, len(text)), -1], []

    def propose(i, j):
        if i >= 0 and j >= 0 and (number := ids.get(symbols[i] + symbols[j])) is not None:
            heapq.heappush(work, (-scores[number], i, j, symbols[i] + symbols[j]))

    for i in range(1, len(text)):
        propose(i - 1, i)
    while work:
        _, i, j, merged = heapq.heappop(work)
        if not symbols[i] or not symbols[j] or symbols[i] + symbols[j] != merged:
            continue
        symbols[i], symbols[j], right[i] = merged, "", right[j]
        if right[j] >= 0:
            left[right[j]] = i
        propose(left[i], i)
        propose(i, right[i])
    out = []
    for symbol in filter(None, symbols):
        out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    return pretrained.load_tokenizer(str(write(folder))), vocabulary(), folder


CORPUS = [
    "hello world", "  two  spaces", " hello", "the winter is in the west!", "\n\n    code\n",
    "tab\tand \u00e9\u00e9e",
    "\u4f60\u597d \U0001f600 caf\u00e9", "1234 5.6", "", " ", "hellohello worldworld", "a" * 40,
]  # fmt: skip


def test_ids_are_those_of_llama_cpp(tiny):
    tokenizer, (tokens, scores, _), _ = tiny
    for text in CORPUS:
        expected = llama_cpp(tokens, scores, ("\u2581" + text.replace(" ", "\u2581")) if text else "")
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        assert tokenizer.encode(text) == [1, *expected]
        assert tokenizer.decode(expected) == text
    parts = tokenizer.encode("hello<|im_end|>world<tool call> x</s>", add_special_tokens=False)
    one = [tokenizer.encode(text, add_special_tokens=False) for text in ("hello", "world", " x")]
    end, tool = tokens.index("<|im_end|>"), tokens.index("<tool call>")
    assert parts == [*one[0], end, *one[1], tool, *one[2], 2]  # a space before each part, as in llama.cpp
    kept = tokenizer.decode(parts, skip_special_tokens=True)
    assert "<tool call>" in kept and "<|im_end|>" not in kept and "</s>" not in kept


@given(st.text(st.sampled_from([*LETTERS[1:], " ", "\u597d", "\t"]), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_has_the_ids_of_llama_cpp_and_comes_back(tiny, text):
    tokenizer, (tokens, scores, _), _ = tiny
    expected = llama_cpp(tokens, scores, ("\u2581" + text.replace(" ", "\u2581")) if text else "")
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.decode(expected) == text


def test_ids_are_those_of_transformers_but_for_spaces_at_the_start(tiny):
    from transformers import AutoTokenizer

    ours, _, folder = tiny
    theirs = AutoTokenizer.from_pretrained(str(folder), gguf_file="tiny.gguf")
    for text in CORPUS:
        if not text.startswith(" "):  # which its Metaspace does not double
            assert ours.encode(text) == theirs.encode(text), text
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name)
    chat = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<s>[INST] hello [/INST]"
    ours.save_pretrained(str(folder / "saved"))
    again = AutoTokenizer.from_pretrained(str(folder / "saved"))
    assert [again.encode(text) for text in CORPUS] == [ours.encode(text) for text in CORPUS]


def test_ids_are_those_of_sentencepiece(tmp_path):
    """A model that its own trainer makes, through GGUF as llama.cpp's converter stores it."""
    package = pytest.importorskip("sentencepiece")
    lines = [f"the {a} {b} went in the west wind, {i}" for i, (a, b) in enumerate(zip(WORDS, WORDS[1:]))] * 20
    (tmp_path / "rows.txt").write_text("\n".join(lines).replace("\u2581", ""))
    package.SentencePieceTrainer.train(
        input=str(tmp_path / "rows.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=340, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2, num_threads=1,
    )  # fmt: skip
    model = package.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    assert model.vocab_size() == 340

    def kind(i):
        special = CONTROL if model.is_control(i) else BYTE if model.is_byte(i) else NORMAL
        return UNKNOWN if model.is_unknown(i) else special

    pieces = range(340)
    stored = (
        [model.id_to_piece(i) for i in pieces],
        [model.get_score(i) for i in pieces],
        [*map(kind, pieces)],
    )
    ours = pretrained.load_tokenizer(str(write(tmp_path, change=lambda *_: stored)))
    for text in [*CORPUS, *lines[:20]]:
        assert ours.encode(text, add_special_tokens=False) == model.encode(text), text
        assert ours.decode(model.encode(text)) == model.decode(model.encode(text)), text


def test_settings_of_the_metadata_count(tmp_path):
    more = [("add_add_space_prefix", False), ("add_add_bos_token", False), ("add_add_eos_token", True)]
    ours = pretrained.load_tokenizer(str(write(tmp_path, *more)))
    tokens = vocabulary()[0]
    assert ours.encode("hello") == [tokens.index(part) for part in ("hell", "o")] + [2]
    assert ours.decode(ours.encode(" hello"), skip_special_tokens=True) == " hello"


def test_ids_that_are_not_in_the_metadata_are_llama_cpps(tmp_path):
    path = tmp_path / "tiny.gguf"
    model = tiny_torch(num_hidden_layers=1)
    write_gguf(path, model, fields=[x for x in fields(*vocabulary()) if not x[0].endswith("_token_id")])
    ours = pretrained.load_tokenizer(str(path))
    assert (ours.unk_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 1, 2)
    config = gguf_config.gguf_config(gguf_file.read_gguf_header(path))
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


INVALID = {
    "no scores": (lambda t, s, k: (t, s[:-1], k), "tokenizer.ggml.scores must have an entry"),
    "no types": (lambda t, s, k: (t, s, k[:-1]), "tokenizer.ggml.token_type has"),
    "a type of another type": (
        lambda t, s, k: (t, s, [*map(str, k)]),
        "type[0] must be a whole number",
    ),
    "a score of another type": (lambda t, s, k: (t, [*map(str, s)], k), "scores[0] must be a number"),
    "a token twice": (lambda t, s, k: ([*t[:-1], "a"], s, k), "tokenizer.ggml.tokens repeats a token"),
    "a long token": (lambda t, s, k: ([*t[:-1], "b" * 600], s, [*k[:-1], NORMAL]), "has 600 characters"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_vocabulary_is_one_line(tmp_path, name):
    change, words = INVALID[name]
    path = write(tmp_path, change=change)
    with pytest.raises(ValueError) as caught:
        pretrained.load_tokenizer(str(path))
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
