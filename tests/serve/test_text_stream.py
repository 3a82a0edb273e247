"""Text while tokens arrive: pieces are the text of all tokens, in whole characters, up to a stop string."""

import re
from dataclasses import replace
from functools import cache

import pytest
import tiny_tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers import decoders as d
from transformers import PreTrainedTokenizerFast

from jaxft.engine.scheduler import NewTokens, SampledToken
from jaxft.engine.text_stream import LONGEST_TAIL, REPLACEMENT, TextStream, TokenDecoder, token_decoder
from jaxft.serve.generation import ChoiceText

TEXTS = st.text(st.sampled_from("ab h\u00e9\u20ac\U0001f600\n."), max_size=16)


def fallback_core(pieces):
    """A tokenizer of these pieces with bytes for the rest, as SentencePiece's of Llama 2 and Mistral."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, REPLACEMENT]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    core = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    return core


def llama2_kind():
    """Spaces by the normaliser; the decoder omits the space before the first token."""
    core = fallback_core("\u2581abhello.\n")
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    return core


def gemma_kind():
    """Like Llama 2's, but no space is omitted."""
    core = fallback_core("\u2581abhello.\n")
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = d.Sequence([d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse()])
    return core


def metaspace_kind():
    """T5's and Mistral's older files: the decoder omits the space of the first token."""
    core = fallback_core(["\u2581", "\u2581a", "a", "b", ".", "\u2581."])
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = d.Metaspace()
    return core


def wordpiece_kind():
    """Spaces before words, and none before punctuation."""
    words = ["[UNK]", "</s>", "a", "##b", "h", "##ello", ".", ",", "'", "s", "n't", "do"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), d.WordPiece()
    return core


KINDS = {
    "llama2": llama2_kind, "gemma": gemma_kind, "metaspace": metaspace_kind, "wordpiece": wordpiece_kind
}  # fmt: skip


@cache
def tokenizer_of(kind):
    if kind == "byte-level":
        return tiny_tokenizers.tiny("chatml")
    core = KINDS[kind]()
    unk = "[UNK]" if kind == "wordpiece" else "<unk>"
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token=unk, clean_up_tokenization_spaces=True
    )


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def token_lists(tokenizer):
    """Tokens of texts, and any tokens: special ones and broken characters too."""
    return st.one_of(
        TEXTS.map(lambda text: tokenizer(text, add_special_tokens=False).input_ids),
        st.lists(st.integers(0, len(tokenizer) + 40), max_size=40),  # a model may have more tokens
    )


def grouped(ids, sizes):
    """The tokens in groups of these sizes, then one by one."""
    at = 0
    for size in sizes:
        yield ids[at : at + size]
        at += size
    yield from ([token] for token in ids[at:])


@pytest.mark.parametrize("kind", ["byte-level", *KINDS])
@settings(max_examples=60)
@given(st.data())
def test_the_pieces_are_the_text_of_all_tokens(kind, data):
    """Equal to decoding the whole, though each step decodes a few tokens only."""
    tokenizer, most = tokenizer_of(kind), 0
    ids = data.draw(token_lists(tokenizer))
    found = token_decoder(tokenizer)

    def counting(part):
        nonlocal most
        most = max(most, len(part))
        return found.decode(part)

    stream = TextStream(replace(found, decode=counting))
    pieces = [
        stream.add_all(group) for group in grouped(ids, data.draw(st.lists(st.integers(1, 4), max_size=4)))
    ]
    assert "".join([*pieces, stream.finish()]) == decode(tokenizer, ids) == stream.text
    if not found.byte_ids:
        assert most <= LONGEST_TAIL + 6


@pytest.mark.parametrize("kind", ["byte-level", *KINDS])
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_the_bytes_of_all_tokens_are_those_of_the_text(kind, text):
    """Also of tokens that are parts of characters, and of a first one whose space is omitted."""
    tokenizer = tokenizer_of(kind)
    decoder, ids = token_decoder(tokenizer), tokenizer(text, add_special_tokens=False).input_ids
    choice = ChoiceText(0, TextStream(decoder))
    pieces = [choice.piece(NewTokens((SampledToken(token, 0.0),), None)) for token in ids]
    tokens = [token for piece in pieces for token in piece.tokens]
    added = [decoder.bytes_of(token.sampled.token, token.first) for token in tokens]
    whole = decode(tokenizer, ids)
    if tokenizer.unk_token_id in ids and kind != "byte-level":
        return
    assert b"".join(added) == whole.encode()
    assert all(
        whole.startswith(new.decode(), token.offset)
        for new, token in zip(added, tokens, strict=True)
        if decodes(new)
    )


def decodes(new):
    try:
        return bool(new.decode())
    except UnicodeDecodeError:
        return False


def test_characters_are_whole_and_not_delayed():
    byte_level, fallback = tokenizer_of("byte-level"), tokenizer_of("llama2")
    for tokenizer, delay in ((byte_level, 0), (fallback, 1)):  # a run of bytes ends with the next token
        stream = TextStream(token_decoder(tokenizer))
        ids = tokenizer("h\u20aca\U0001f600b", add_special_tokens=False).input_ids
        pieces = [stream.add(token) for token in ids]
        assert not any(REPLACEMENT in piece for piece in pieces)
        shown = [piece for piece in pieces if piece.strip()]
        assert shown == (
            ["h", "\u20ac", "a", "\U0001f600", "b"] if delay == 0 else ["h", "\u20aca", "\U0001f600b"]
        )


def test_endless_broken_bytes_are_shown_and_cost_no_more():
    tokenizer, most = tokenizer_of("byte-level"), 0
    broken = tokenizer.convert_tokens_to_ids("\u00ff")  # a byte that no character has
    found = token_decoder(tokenizer)

    def counting(part):
        nonlocal most
        most = max(most, len(part))
        return found.decode(part)

    stream = TextStream(replace(found, decode=counting))
    pieces = [stream.add(broken) for _ in range(100)]
    assert len("".join(pieces)) > 80 and most <= LONGEST_TAIL + 2
    assert stream.finish() and stream.text == decode(tokenizer, [broken] * 100)


@given(
    TEXTS,
    st.lists(
        st.sampled_from(["ab", "b", "a b", "aab", "\U0001f600", "\u00e9\u20ac", "\n\n"]),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["byte-level", "llama2"]),
)
def test_the_text_ends_before_the_first_stop_string(text, stops, kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    stream = TextStream(token_decoder(tokenizer), stops)
    pieces = [stream.add(token) for token in ids]
    pieces.append(stream.finish())
    expected = re.split("|".join(map(re.escape, stops)), decode(tokenizer, ids))
    assert "".join(pieces) == stream.text == expected[0] and stream.stopped == (len(expected) > 1)


@pytest.mark.parametrize("stops", [(), ("##",)])
def test_a_stop_token_that_is_not_special_is_not_streamed(stops):
    characters = TokenDecoder(lambda ids: "".join(map(chr, ids)))
    tokens = tuple(SampledToken(ord(c), -0.5, ()) for c in "ab!")
    text = ChoiceText(0, TextStream(characters, stops))
    first, last = text.piece(NewTokens(tokens[:1])), text.piece(NewTokens(tokens[1:], "stop"))
    assert first.text + last.text == "ab" and last.finish == "stop" and text.tokens == 3
    alone = ChoiceText(0, TextStream(characters, stops)).piece(NewTokens(tokens, "length"))
    assert alone.text == "ab!" and alone.finish == "length"


def test_what_may_begin_a_stop_string_waits_for_the_next_token():
    characters = TokenDecoder(lambda ids: "".join(map(chr, ids)))
    stream = TextStream(characters, ["###", "END"])
    assert [stream.add(ord(c)) for c in "a##b#E"] == ["a", "", "", "##b", "", "#"]
    assert stream.finish() == "E" and stream.text == "a##b#E"
    stopped = TextStream(characters, ["###"])
    assert "".join(stopped.add(ord(c)) for c in "x####y") == "x" and stopped.finish() == ""
