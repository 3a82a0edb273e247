"""Text while tokens arrive: pieces are the text of all tokens, in whole characters, up to a stop string."""

import re

import tiny_tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxft.inference.text_stream import REPLACEMENT, TextStream

TOKENIZER = tiny_tokenizers.tiny("chatml")
TEXTS = st.text(st.sampled_from("ab hé€😀\n"), max_size=12)
TOKENS = st.one_of(
    TEXTS.map(lambda text: TOKENIZER(text, add_special_tokens=False).input_ids),
    st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12),  # broken characters too
)


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def grouped(ids, sizes):
    """The tokens in groups of these sizes, then one by one."""
    at = 0
    for size in sizes:
        yield ids[at : at + size]
        at += size
    yield from ([token] for token in ids[at:])


@given(TOKENS, st.lists(st.integers(1, 4), max_size=4))
def test_the_pieces_are_the_text_and_never_end_within_a_character(ids, sizes):
    stream = TextStream(decode)
    pieces = [stream.add_all(group) for group in grouped(ids, sizes)]
    assert not any(piece.endswith(REPLACEMENT) for piece in pieces)
    assert "".join([*pieces, stream.finish()]) == decode(ids) == stream.text


@given(
    TEXTS, st.lists(st.sampled_from(["ab", "b", "a b", "aab", "😀", "é€", "\n\n"]), min_size=1, max_size=3)
)
def test_the_text_ends_before_the_first_stop_string(text, stops):
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    stream = TextStream(decode, stops)
    pieces = [stream.add(token) for token in ids]
    pieces.append(stream.finish())
    expected = re.split("|".join(map(re.escape, stops)), decode(ids))
    assert "".join(pieces) == stream.text == expected[0] and stream.stopped == (len(expected) > 1)


def test_what_may_begin_a_stop_string_waits_for_the_next_token():
    stream = TextStream(lambda ids: "".join(map(chr, ids)), ["###", "END"])
    assert [stream.add(ord(c)) for c in "a##b#E"] == ["a", "", "", "##b", "", "#"]
    assert stream.finish() == "E" and stream.text == "a##b#E"
    stopped = TextStream(lambda ids: "".join(map(chr, ids)), ["###"])
    assert "".join(stopped.add(ord(c)) for c in "x####y") == "x" and stopped.finish() == ""
