"""Texts of any length (data.too_long=split, data.packing=wrapped): every token of a document is in one row,
and attention crosses documents only in wrapped rows.
"""

import json
import re
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny

from jaxft.data.packing.pack import Epochs, split_lengths, wrap_examples
from jaxft.data.sft import Rows
from jaxft.train.recipes import RowKnobs
from jaxft.train.settings import Loop, Run

LENGTHS = (1, 30, 3, 2, 17, 64, 5, 33, 1, 9, 16)


def document(number, length):
    """A document of about `length` tokens that begins with its number."""
    return f"{number} " + " ".join(str((number + i) % 10) for i in range(length))


@pytest.fixture
def texts(tmp_path):
    rows = [{"text": document(i, n)} for i, n in enumerate(LENGTHS)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@lru_cache
def expected(kind="llama3"):
    """The tokens of each document with BOS and EOS."""
    tokenizer = tiny(kind)
    texts = [tokenizer(document(i, n)).input_ids for i, n in enumerate(LENGTHS)]
    return [[*ids, *([] if ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id])] for ids in texts]


def source(folder, **options):
    options = {"held_out": "none", "max_length": 16, "batch": 2, "too_long": "split", **options}
    return Rows(str(folder / "t.jsonl"), **options).open(tiny("llama3"), cache=folder / "cache")


def rows_of(s, epoch=0):
    """(ids, segments, positions, read, targets, weights) of all rows of an epoch."""
    per_epoch = int(s.info.steps_per_epoch)
    for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        b = s.batch(step)[0]
        fields = (b.ids, b.segments, b.positions, b.read, b.targets, b.token_weights)
        yield from zip(*(x.reshape(-1, x.shape[-1]) for x in fields), strict=True)


def documents_in(rows):
    """All segments that begin a document, each with the pieces that continue it put behind."""
    pieces = [ids[segments == n].tolist() for ids, segments, *_ in rows for n in range(1, segments.max() + 1)]
    return sorted(map(tuple, pieces))


@pytest.mark.parametrize("packing", (True, False))
def test_split_documents_lose_no_token_and_their_pieces_do_not_attend_to_one_another(texts, packing):
    s = source(texts, packing=packing)
    pieces = []
    for ids in expected():
        cuts = list(range(0, len(ids), 16))
        cuts = [c - (len(ids) - c == 1) for c in cuts]  # no piece of one token
        pieces += [tuple(ids[a:b]) for a, b in zip(cuts, [*cuts[1:], len(ids)], strict=True)]
    for epoch in (0, 1):
        rows = list(rows_of(s, epoch))
        assert documents_in(rows) == sorted(pieces)
        for ids, segments, positions, read, targets, weights in rows:
            for n in range(1, segments.max() + 1):
                assert positions[segments == n].tolist() == list(range((segments == n).sum()))
            used = weights > 0
            assert (segments[read[used]] == segments[read[used] + 1]).all()
            assert (ids[read[used] + 1] == targets[used]).all()
            assert used.sum() == (segments > 0).sum() - segments.max()  # all but the first of a piece
    assert all(b.packed is packing for b in (s.shapes[0], s.batch(0)[0]))
    assert "pieces of split documents" in s.info.stats.summary


def test_wrapped_rows_are_the_documents_one_after_the_other_without_a_gap(texts):
    s = source(texts, packing="wrapped")
    total, orders = sum(map(len, expected())), []
    for epoch in (0, 1):
        rows = [row for row in rows_of(s, epoch) if row[1].any()]  # the last batch is not full
        lengths = sorted(int((segments > 0).sum()) for _, segments, *_ in rows)
        assert lengths[1:] == [16] * (len(rows) - 1) and sum(lengths) == total
        assert len(rows) == -(-total // 16)
        for ids, segments, positions, read, targets, weights in rows:
            n = int((segments > 0).sum())
            assert segments.tolist() == [1] * n + [0] * (16 - n)
            assert positions[:n].tolist() == list(range(n))
            used = weights > 0
            assert read[used].tolist() == list(range(n - 1)) and (targets[used] == ids[1:n]).all()
        # the rows in the order of the stream: the documents in some order
        stream = [tuple(ids[segments > 0].tolist()) for ids, segments, *_ in rows]
        orders.append(stream)
        counts = np.bincount(np.concatenate(stream), minlength=500)
        assert (counts == np.bincount(np.concatenate(expected()), minlength=500)).all()
    assert orders[0] != orders[1]
    assert not s.batch(0)[0].packed  # a row is one sequence
    assert f"{total:,} response tokens" in s.info.stats.learned


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=12),
    size=st.integers(3, 12),
    seed=st.integers(0, 3),
)
def test_wrapped_plans_hold_every_token_once_and_documents_in_order(lengths, size, seed):
    parts = np.array([n for document in lengths for n in document])
    if parts.sum() == 1:
        parts[0] = 2
    documents = np.repeat(np.arange(len(lengths)), [len(document) for document in lengths])
    offsets = np.concatenate([[0], np.cumsum(parts)])
    plan = wrap_examples(parts, documents, size, (seed, 1))
    seen = np.zeros(parts.sum(), int)
    for r in range(plan.rows):
        row = plan.slice(r, r + 1)
        tokens = [
            offsets[m] + np.arange(start, start + count)
            for m, start, count in zip(row.members, row.starts, row.counts, strict=True)
        ]
        assert all(len(t) for t in tokens) and 2 <= sum(map(len, tokens)) <= size
        np.add.at(seen, np.concatenate(tokens), 1)
        for a, b in zip(tokens, tokens[1:], strict=False):  # within a document nothing is skipped
            same = documents[np.searchsorted(offsets, a[-1], "right") - 1]
            if documents[np.searchsorted(offsets, b[0], "right") - 1] == same:
                assert b[0] == a[-1] + 1
    assert (seen == 1).all()
    full = np.add.reduceat(plan.counts, plan.offsets[:-1])
    assert (full < size).sum() <= 2 and plan.rows == -(-parts.sum() // size)


@given(length=st.integers(1, 200), size=st.integers(3, 40))
def test_pieces_of_a_document_are_full_and_none_has_one_token(length, size):
    pieces = split_lengths(length, size).tolist()
    assert sum(pieces) == length and max(pieces) <= size and len(pieces) == -(-length // size)
    assert length == 1 or min(pieces) >= 2
    assert all(piece >= size - 1 for piece in pieces[:-1])


def test_all_pieces_of_a_document_are_on_one_side_of_the_split(texts):
    s = source(texts, held_out=0.4)
    held = {
        name for b in s.held_out for ids in b.ids[0] for name in [tiny("llama3").decode(ids[1:2].tolist())]
    }
    assert s.info.stats.held_out > 4 and held
    names = {name for k in range(s.info.steps) for row in s.row_names(k) for name in row.split(", ")}
    assert len(names) == len(LENGTHS) - round(0.4 * len(LENGTHS))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"packing": "wrapped", "too_long": "truncate"}, "set data.too_long=split data.weighting=token"),
        ({"packing": "wrapped", "weighting": "sequence"}, "set data.too_long=split data.weighting=token"),
        ({"packing": "wrap"}, "data.packing='wrap'; use one of true, false, wrapped"),
        ({"max_length": 2}, "data.max_length=2 with data.too_long=split; use at least 3"),
        ({"tokens": 5}, "data.epochs=1.0 and data.tokens=5: set exactly one of them"),
        ({"epochs": None}, "data.epochs=None and data.tokens=None: set exactly one of them"),
        ({"tokens": 0, "epochs": None}, "data.tokens=0; expected at least 1"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(texts, options, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        source(texts, **options)


def test_responses_are_neither_split_nor_wrapped(tmp_path):
    row = {"prompt": "a b c", "completion": " d" * 20}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"t.jsonl:1: \d+ tokens .*data.too_long=split only splits text"):
        source(tmp_path, format="plain")
    with pytest.raises(
        ValueError, match=r"t.jsonl:1: the row has a prompt .* data.packing=wrapped is for text"
    ):
        source(tmp_path, format="plain", max_length=99, packing="wrapped")


def test_a_run_has_as_many_steps_as_its_tokens_need(texts):
    """The tokens of the first steps, counted in their batches, reach the number with the last step only."""
    s = source(texts)
    read = np.cumsum([(s.batch(k)[0].segments > 0).sum() for k in range(3 * s.info.steps)])
    for tokens in (1, 17, int(read[2]), int(read[2]) + 1, int(read[-1])):
        steps = source(texts, tokens=tokens, epochs=None).info.steps
        assert read[steps - 1] >= tokens and (steps == 1 or read[steps - 2] < tokens)


def test_epochs_of_unlike_lengths_find_steps_and_tokens():
    epochs = Epochs(lambda epoch: np.full(2 + epoch, 10), alike=False)  # 2, 3, 4, ... steps of 10 tokens
    assert [epochs.locate(k) for k in (0, 1, 2, 4, 5)] == [(0, 0), (0, 1), (1, 0), (1, 2), (2, 0)]
    assert [epochs.steps_of_epochs(e) for e in (0.1, 1, 1.5, 3)] == [1, 2, 4, 9]
    assert [epochs.steps_of_tokens(n) for n in (1, 10, 11, 20, 21, 91)] == [1, 1, 2, 2, 3, 10]


def test_a_run_has_one_length():
    data = Rows("t.jsonl", tokens=100, epochs=None)
    with pytest.raises(ValueError, match="loop.steps=3 and data.tokens=100 are two lengths of the run"):
        Run("a", "w", None, None, data, loop=Loop(steps=3))
    assert RowKnobs(tokens=7, epochs=None).settings()["tokens"] == 7
