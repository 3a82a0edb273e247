"""Tokenizers of GGUF files: how byte-level BPE splits text before merging, and Gemma's SentencePiece."""

import pytest
from gguf_families import write_family
from gguf_files import byte_level, toy_vocabulary

from jaxft.weights import pretrained
from jaxft.weights.gguf.gguf_tokenizer import PRE_TOKENIZERS

pytest.importorskip("torch")
CORPUS = [
    "It's 12345 o'clock; WE'LL see  x\n\n  y!\r\n\t3.14 $1,000", "HelloWorld iPhone ABCdef", "", " ", "\n",
    "e\u0301 caf\u00e9 \uac00 \u1100\u1161 \u00b2 \u0663 \u4f60\u597d \U0001f600",
    "he hell <think>12</think>",
]  # fmt: skip


def write_byte_level(folder, pre, *more, family="qwen2"):
    merges, tokens, specials = toy_vocabulary()
    pre_field = [] if pre is None else [("add_tokenizer_pre", pre)]
    fields = byte_level([*pre_field, ("add_token_merges", merges), *more], tokens, **specials)
    return write_family(folder / "tiny.gguf", family, fields=fields)


def test_qwen2_equals_transformers(tmp_path):
    """Which normalises to NFC and splits digits apart, with the regular expression of its tokenizer.json."""
    from transformers import Qwen2Tokenizer

    merges, tokens, _ = toy_vocabulary()
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges])
    ours = pretrained.load_tokenizer(str(write_byte_level(tmp_path, "qwen2")))
    for text in CORPUS[:-1]:  # the last has a special token, which theirs does not know
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.encode("e\u0301") == ours.encode("\u00e9")
    assert ours.decode(ours.encode("a<think>b")) == "a<think>b"


TEXT = "HelloWorld's 12345 don'T  x\n\n y!\n/"
THREE, ONE = ["123", "45"], list("12345")
# By hand from the regular expressions of the published tokenizer.json: letters with one character of
# punctuation before them, digits by one or three, contractions, punctuation with line ends (and / in Tekken
# and GPT-4o), a space less than there are before a word.
PIECES = {
    "gpt-2": ["HelloWorld", "'s", " 12345", " don", "'", "T", " ", " x", "\n\n", " y", "!", "\n", "/"],
    "refact": [
        "HelloWorld", "'s", " ", *ONE, " don", "'", "T", " ", " x", "\n\n", " y", "!", "\n", "/"
    ],
    "llama-bpe": ["HelloWorld", "'s", " ", *THREE, " don", "'T", " ", " x", "\n\n", " y", "!\n", "/"],
    "dbrx": ["HelloWorld", "'s", " ", *THREE, " don", "'T", " ", " x", "\n\n", " y", "!\n", "/"],
    "smaug-bpe": ["HelloWorld", "'s", " ", *THREE, " don", "'T", " ", " x", "\n\n", " y", "!\n", "/"],
    "qwen2": ["HelloWorld", "'s", " ", *ONE, " don", "'T", " ", " x", "\n\n", " y", "!\n", "/"],
    "tekken": ["Hello", "World", "'s", " ", *ONE, " don", "'T", " ", " x", "\n\n", " y", "!\n/"],
    "gpt-4o": ["Hello", "World's", " ", *THREE, " don'T", " ", " x", "\n\n", " y", "!\n/"],
}  # fmt: skip


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_split_as_the_published_tokenizer_splits_it(tmp_path, pre):
    tokenizer = pretrained.load_tokenizer(str(write_byte_level(tmp_path, pre)))
    spans = [span for _, span in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert [TEXT[start:end] for start, end in spans] == PIECES[pre]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS.keys() - {"default"}))
def test_every_text_comes_back_and_starts_as_llama_cpp_starts_it(tmp_path, pre):
    """BOS by default for Llama 3 and Tekken; whole words for those and SmolLM3."""
    bos = toy_vocabulary()[1].index("<|begin|>")
    ours = pretrained.load_tokenizer(str(write_byte_level(tmp_path, pre, ("add_bos_token_id", bos))))
    starts = pre in ("llama-bpe", "llama3", "llama-v3", "tekken")
    for text in [*CORPUS[:-2], CORPUS[-1]]:
        ids = ours.encode(text)
        assert ids[:1] == ([bos] if starts else ids[:1]) and (bos in ids) == starts
        assert ours.decode(ids[starts:]) == text
    whole = ours.encode("hell", add_special_tokens=False) == [toy_vocabulary()[1].index("hell")]
    assert whole == (starts or pre == "smaug-bpe")


@pytest.mark.parametrize(
    ("pre", "words"), [(None, "tokenizer.ggml.pre is missing"), ("kimi-k2", "'kimi-k2' .* is not supported")]
)
def test_a_pre_tokenizer_that_is_not_known_is_one_line(tmp_path, pre, words):
    path = write_byte_level(tmp_path, pre)
    with pytest.raises(ValueError, match=words) as caught:
        pretrained.load_tokenizer(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


UNKNOWN, CONTROL, USER_DEFINED, BYTE, NORMAL = 2, 3, 4, 6, 1


def test_gemmas_tokenizer_equals_sentencepiece(tmp_path):
    """No space before a text; runs of spaces and line ends are tokens of their own, which the converter
    stores as they look in texts (_create_vocab_sentencepiece).
    """
    package = pytest.importorskip("sentencepiece")
    words = ["the wind", "went   west", "in  the    winter", "he is\n\nhere", "<start_of_turn>user"]
    lines = [f"{a} {b} {i}" for i, (a, b) in enumerate(zip(words, words[1:] + words[:1], strict=True))] * 30
    (tmp_path / "rows.txt").write_text("\n".join(lines))
    cut = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\u2581\u2581", "\u2581\u2581\u2581"]
    package.SentencePieceTrainer.train(
        input=str(tmp_path / "rows.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=330, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, user_defined_symbols=cut, minloglevel=2, num_threads=1,
    )  # fmt: skip
    model = package.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]

    def kind(i):
        if model.is_unknown(i) or model.is_control(i):
            return UNKNOWN if model.is_unknown(i) else CONTROL
        return USER_DEFINED if pieces[i] in cut else BYTE if model.is_byte(i) else NORMAL

    tokens = [piece.replace("\u2581", " ") if piece in cut else piece for piece in pieces]
    fields = [
        ("add_tokenizer_model", "llama"), ("add_tokenizer_pre", "default"), ("add_token_list", tokens),
        ("add_token_scores", [model.get_score(i) for i in range(len(tokens))]),
        ("add_token_types", [kind(i) for i in range(len(tokens))]), ("add_add_space_prefix", False),
    ]  # fmt: skip
    ours = pretrained.load_tokenizer(str(write_family(tmp_path / "tiny.gguf", "gemma3", fields=fields)))
    bos = model.bos_id()
    for text in [
        *lines[:10],
        "  the",
        "the  ",
        "<start_of_turn>user\nhe <end_of_turn>\n\n\nx",
        "caf\u00e9 \u4f60",
    ]:
        assert ours.encode(text) == [bos, *model.encode(text)], text
        assert ours.decode(model.encode(text)) == text


def test_phi3s_special_tokens_swallow_the_spaces_after_them(tmp_path):
    """But for the first and the last of a text, so that "<|user|>\\nhi" is "<|user|>hi"."""
    special = ["<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>"]
    letters = ["\u2581", *"hi\n"]
    tokens = ["<unk>", *special, *(f"<0x{i:02X}>" for i in range(256)), *letters]
    types = [UNKNOWN, *[CONTROL] * len(special), *[BYTE] * 256, *[NORMAL] * len(letters)]
    fields = [("add_tokenizer_model", "llama"), ("add_token_list", tokens), ("add_token_types", types)]
    fields.append(("add_token_scores", [-float(i) for i in range(len(tokens))]))
    files = {name: write_family(tmp_path / f"{name}.gguf", name, fields=fields) for name in ("phi3", "llama")}
    phi3, llama = (pretrained.load_tokenizer(str(path)) for path in files.values())
    assert phi3.encode("<|user|>\n hi<|end|>\n") == phi3.encode("<|user|>hi<|end|>")
    assert phi3.encode("<|endoftext|>\nhi") != phi3.encode("<|endoftext|>hi")
    assert llama.encode("<|user|>\nhi") != llama.encode("<|user|>hi")
