"""Several sources with weights: an epoch has the share of each source, and batches are a function of the
step.
"""

import json
import re
from collections import Counter

import jax
import numpy as np
import pytest
from tiny_tokenizers import tiny

from jaxft.data import prompts
from jaxft.data.packing.pack import RowPlan, limit_reads
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts
from jaxft.data.rows.mixture import Mixture, parse_sources, source_names, sources_with_metrics
from jaxft.data.sft import Rows

SIZES = {"a": 700, "b": 900, "c": 150}
SHARES = {"a": 0.5, "b": 0.3, "c": 0.2}
MIXED = "a.jsonl,b.jsonl:0.3,c.jsonl:0.2"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Rows of unequal numbers and lengths: c is short and has too few rows for its share, so it repeats."""
    monkeypatch.chdir(tmp_path)
    for name, size in SIZES.items():
        rows = [
            {
                "prompt": f"{name} {i}",
                "completion": " the rank" * (1 + (i + len(name)) % (3 if name == "c" else 9)),
            }
            for i in range(size)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pairs = [
            {"prompt": r["prompt"], "chosen": r["completion"], "rejected": " no"} for r in rows[: size // 10]
        ]
        (tmp_path / f"{name}_pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path


def sft(folder, train=MIXED, **options):
    options = {"held_out": "none", "format": "plain", "max_length": 64, "batch": 8, **options}
    return Rows(train, **options).open(tiny("llama3"), cache=folder / "cache")


def rows_of_epochs(s, epochs):
    """Row names of each epoch of a source of SFT rows."""
    first, found = 0, []
    for epoch in range(epochs):
        steps = range(first, first + s.epochs.steps_in(epoch))
        found.append([n for k in steps for row in s.row_names(k) for n in row.split(", ") if n])
        first = steps.stop
    return found


# ---- columns and formats of a source


@pytest.mark.parametrize(
    ("text", "share", "options"),
    [
        ("a.jsonl:prompt=q", None, {"columns": ("prompt=q",)}),
        ("a.jsonl:prompt=q:completion=my answer", None, {"columns": ("prompt=q", "completion=my answer")}),
        ("b.jsonl:0.5,a.jsonl:0.5:prompt=q", 0.5, {"columns": ("prompt=q",)}),
        ("b.jsonl:3,a.jsonl:prompt=q:format=plain:1", 0.25, {"columns": ("prompt=q",), "format": "plain"}),
        ("b.jsonl,a.jsonl:max_samples=7", None, {"max_samples": 7}),
        ("org/name/config:train:prompt=q", None, {"columns": ("prompt=q",)}),
        ("https://host:8080/a.parquet?key=b=c", None, {}),
        ("https://host:8080/a.parquet?key=b=c:format=text", None, {"format": "text"}),
    ],
)
def test_options_of_a_source_are_behind_it(sources, text, share, options):
    source = parse_sources(text)[-1]
    assert (source.share, source.options) == (share, options)
    assert source.ref in ("a.jsonl", "org/name/config:train", "https://host:8080/a.parquet?key=b=c")


def test_a_file_whose_name_looks_like_an_option_is_a_file(sources):
    (sources / "x:prompt=q").write_text("")
    assert [(s.ref, s.options) for s in parse_sources("x:prompt=q")] == [("x:prompt=q", {})]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a.jsonl:prompt=q,completion=a", "completion=a is no dataset; write a source's columns after it"),
        ("a.jsonl:max_samples=none", "a.jsonl:max_samples=none has max_samples=none; use a whole number"),
        ("a.jsonl:promt=prompt", "unknown column 'promt'; use one of prompt"),
        ("a.jsonl:prompt=question", "a.jsonl:1: no column 'question', which data.columns=prompt=question"),
        ("a.jsonl:format=alpaca", "data.format='alpaca'; use auto, plain or one of"),
    ],
)
def test_wrong_options_of_a_source_are_one_line(sources, text, error):
    with pytest.raises(ValueError, match=re.escape(error)) as raised:
        sft(sources, text)
    assert "\n" not in str(raised.value)


def test_sources_with_columns_and_formats_of_their_own_are_as_if_they_had_the_usual_ones(sources):
    def write(name, rows):
        (sources / name).write_text("\n".join(map(json.dumps, rows)))

    usual = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(6)]
    write("usual.jsonl", usual[:3])
    write("also.jsonl", usual[3:])
    write("mine.jsonl", [{"title": r["prompt"], "body": r["completion"], "text": "x"} for r in usual[:3]])
    write("theirs.jsonl", [{**r, "text": "other"} for r in usual[3:]])
    mixed = "mine.jsonl:prompt=title:completion=body,theirs.jsonl:format=prompt-completion"
    source, expected = (sft(sources, x, format="auto") for x in (mixed, "usual.jsonl,also.jsonl"))
    assert np.array_equal(source.split.rows.ids, expected.split.rows.ids)
    assert source.split.train_names == ("mine", "theirs")
    alone = sft(sources, "mine.jsonl:prompt=title:completion=body", format="auto", columns=("text=none",))
    assert np.array_equal(alone.split.rows.ids, expected.split.rows.ids[: len(alone.split.rows.ids)])
    held = sft(sources, "usual.jsonl", format="auto", held_out="mine.jsonl:prompt=title:completion=body")
    assert held.info.stats.held_out == 3
    pairs = [{"q": r["prompt"], "chosen": "yes", "rejected": "no"} for r in usual]
    write("pairs.jsonl", pairs)
    found = PairRows("pairs.jsonl:prompt=q,a_pairs.jsonl", batch=1, held_out="none")
    assert found.open(tiny("chatml"), cache=sources / "cache").info.stats.examples == 76
    rollouts = Prompts("pairs.jsonl:prompt=q,mine.jsonl:format=plain:prompt=body", batch=1, held_out="none")
    train, _ = prompts.split_prompts(rollouts, tiny("chatml"), sources / "cache")
    one, other = (train.select([i]) for i in (0, 6))
    assert one.prompts[0].messages[0]["content"] == "q 0" and other.prompts[0].prompt == "a 0"


# ---- names and weights


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (",".join(f"n{i}.jsonl" for i in range(60)), [(f"n{i}.jsonl", None) for i in range(60)]),
        ("a.jsonl", [("a.jsonl", None)]),
        ("a.jsonl,b.jsonl", [("a.jsonl", None), ("b.jsonl", None)]),
        (MIXED, [("a.jsonl", 0.5), ("b.jsonl", 0.3), ("c.jsonl", 0.2)]),
        ("a.jsonl:3, b.jsonl:1", [("a.jsonl", 0.75), ("b.jsonl", 0.25)]),
        ("a.jsonl,b.jsonl,c.jsonl:0.2", [("a.jsonl", 0.4), ("b.jsonl", 0.4), ("c.jsonl", 0.2)]),
        ("org/name:train:1,org/name:test:3", [("org/name:train", 0.25), ("org/name:test", 0.75)]),
        ("org/name:0.5,org/n/x:train[:10%]", [("org/name", 0.5), ("org/n/x:train[:10%]", 0.5)]),
        ("org/name:2024", [("org/name:2024", None)]),
        ("odd:0.5,b.jsonl:2", [("odd:0.5", 1 / 3), ("b.jsonl", 2 / 3)]),
        ("with,comma.jsonl", [("with,comma.jsonl", None)]),
    ],
)
def test_sources_and_their_shares(sources, text, expected):
    for odd in ("odd:0.5", "with,comma.jsonl"):  # names of files
        (sources / odd).write_text("")
    if text.startswith("odd"):
        text = text.replace("odd:0.5", "odd:0.5:1")
    found = parse_sources(text)
    assert [source.ref for source in found] == [ref for ref, _ in expected]
    assert [source.share for source in found] == [
        share if share is None else pytest.approx(share) for _, share in expected
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a.jsonl:x,b.jsonl:1", "data.train: a.jsonl:x has the weight 'x'; use a number above 0"),
        ("a.jsonl:0,b.jsonl:1", "a.jsonl:0 has the weight '0'"),
        ("a.jsonl:-1,b.jsonl", "a.jsonl:-1 has the weight '-1'"),
        ("a.jsonl:nan,b.jsonl", "has the weight 'nan'"),
        ("org/name:train:inf,b.jsonl", "has the weight 'inf'"),
        ("a.jsonl:0.6,b.jsonl:0.4,c.jsonl", "the weights add up to 1, which leaves nothing for c.jsonl"),
        ("a.jsonl,,b.jsonl", "no source before or after a comma"),
        ("a.jsonl,a.jsonl:0.5", "a.jsonl is named twice"),
        ("a.jsonl,./a.jsonl:0.5", "a.jsonl is named twice"),
        ("a.jsonl:0.3", "a weight needs several sources"),
        (
            "a.jsonl:0.0001,b.jsonl:0.9999",
            "a.jsonl: its weight, 0.0001 of the sum of weights, gives it none of the",
        ),
        ("a.jsonl,missing.jsonl:0.5", "data 'missing.jsonl' not found"),
    ],
)
def test_wrong_weights_are_one_line(sources, text, error):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(error)):
        sft(sources, text)
    with pytest.raises(ValueError, match="data.held_out=a.jsonl:1,b.jsonl:2: held-out rows have no weights"):
        sft(sources, "a.jsonl", held_out="a.jsonl:1,b.jsonl:2")


def test_names_of_metrics_and_cards(sources):
    assert sources_with_metrics("a.jsonl") == () and sources_with_metrics(MIXED) == ("a", "b", "c")
    assert sources_with_metrics("org/x/cfg:train,org/y") == ("x", "y")
    both = ("org/x:train", "org/x:test")
    assert sources_with_metrics(",".join(both)) == both
    assert source_names(MIXED) == "a.jsonl, b.jsonl, c.jsonl"


# ---- epochs


@pytest.mark.parametrize("packing", (True, False))
def test_an_epoch_has_each_sources_share_within_a_thousandth_and_resumes_exactly(sources, packing):
    s, total = sft(sources, packing=packing, epochs=3), sum(SIZES.values())
    epochs = rows_of_epochs(s, 3)
    assert s.info.steps == sum(s.epochs.steps_in(e) for e in range(3))
    read = Counter()
    for rows in epochs:
        counts = Counter(name[0] for name in rows)
        assert sum(counts.values()) == total
        for name, share in SHARES.items():
            assert counts[name] / total == pytest.approx(share, abs=1e-3)
        read.update(rows)
    # every pass of a source is complete before a row occurs again, and the passes differ
    for name, size in SIZES.items():
        times = [read[f"{name}.jsonl:{i + 1}"] for i in range(size)]
        assert max(times) - min(times) <= 1
    assert set(epochs[0]) != set(epochs[1])
    again = sft(sources, packing=packing, epochs=9)  # more epochs later are no other run
    assert (
        again.info.fingerprint
        == s.info.fingerprint
        != sft(sources, "a.jsonl,b.jsonl:0.3,c.jsonl:0.3").info.fingerprint
    )
    for step in (s.info.steps - 1, s.epochs.steps_in(0), 0):
        for x, y in zip(
            jax.tree.leaves(s.batch(step)[0]), jax.tree.leaves(again.batch(step)[0]), strict=True
        ):
            assert np.array_equal(x, y)
    assert (
        "an epoch takes 875 rows from the 700 of a, 525 rows from the 900 of b, 350 rows from the 150 of c"
        in s.info.stats.summary
    )


@pytest.mark.parametrize("kind", ["rows", "pairs", "prompts"])
def test_held_out_rows_are_in_no_epoch_of_a_mixture(sources, kind):
    """In enough epochs for every training row of every source."""
    options, tokenizer = {"format": "plain", "held_out": 0.2}, tiny("llama3")
    if kind == "prompts":
        train, held = prompts.split_prompts(Prompts(MIXED, max_prompt=64, **options), tokenizer)
        split, held_names = train.split, held.names
    else:
        text, make = (MIXED, Rows) if kind == "rows" else (MIXED.replace(".jsonl", "_pairs.jsonl"), PairRows)
        found = make(text, max_length=64, **options).open(tokenizer, cache=sources / "cache")
        split = found.split
        held_names = [split.rows.names[i] for i in split.held]
    names = [split.rows.names[i] for e in range(4) for i in split.of_epoch(e)]
    total = sum(SIZES.values()) // (10 if kind == "pairs" else 1)
    assert len(held_names) == pytest.approx(0.2 * total, abs=3) and not {*held_names} & {*names}
    assert len({*names}) + len(held_names) == total


def test_sources_without_weights_are_read_once_per_epoch(sources):
    s = sft(sources, "a.jsonl,c.jsonl")
    (rows,) = rows_of_epochs(s, 1)
    assert sorted(rows) == sorted(f"{n}.jsonl:{i + 1}" for n in "ac" for i in range(SIZES[n]))


def test_a_source_that_is_exhausted_starts_again_in_another_order():
    mixture = Mixture((np.arange(10), np.arange(10, 14)), (7, 7), seed=0)
    epochs = [mixture.of_epoch(e) for e in range(4)]
    stream = np.concatenate([rows[7:] for rows in epochs])
    passes = [stream[i : i + 4].tolist() for i in range(0, 28, 4)]
    assert all(sorted(p) == [10, 11, 12, 13] for p in passes) and len(set(map(tuple, passes))) > 3
    first = np.concatenate([rows[:7] for rows in epochs])
    assert sorted(first[:10]) == sorted(first[10:20]) == list(range(10))


def test_batches_of_every_epoch_have_one_shape(sources):
    s = sft(sources, batch=2, loss_on="all")
    for step in range(0, 3 * s.info.steps, 7):
        shapes = jax.tree.map(lambda x: x.shape, s.batch(step)[0])
        assert shapes == jax.tree.map(lambda x: x.shape, s.shapes[0])


@pytest.mark.parametrize("packing", (True, "wrapped"))
def test_a_mixture_counts_whole_documents_however_many_pieces_they_have(sources, packing):
    """Documents of x have 1 to 4 pieces, those of y one; half of 60 documents are of each."""
    long = [{"text": f"x{i} " + "the rank of a matrix " * (1 + 4 * (i % 4))} for i in range(20)]
    short = [{"text": f"y{i}"} for i in range(40)]
    (sources / "x.jsonl").write_text("\n".join(map(json.dumps, long)))
    (sources / "y.jsonl").write_text("\n".join(map(json.dumps, short)))
    options = {"format": "auto", "too_long": "split", "max_length": 32, "packing": packing, "batch": 2}
    s, whole = sft(sources, "x.jsonl:1,y.jsonl:1", epochs=2, **options), sft(sources, "x.jsonl", **options)
    lengths = Counter()
    for name, n in zip(whole.split.rows.names, whole.split.rows.lengths, strict=True):
        lengths[name] += n
    for epoch in range(2):
        chosen = s.split.of_epoch(epoch)
        names = [s.split.rows.names[i] for i in chosen]
        documents = Counter(n for i, n in zip(chosen, names, strict=True) if s.split.rows.pieces[i] == 0)
        assert Counter(n[0] for n in documents.elements()) == {"x": 30, "y": 30}
        tokens = Counter()
        for i, name in zip(chosen, names, strict=True):
            tokens[name] += int(s.split.rows.lengths[i])
        assert all(tokens[n] == count * lengths[n] for n, count in documents.items() if n[0] == "x")
        steps = range(s.epochs.steps_in(0) * epoch, s.epochs.steps_in(0) * epoch + s.epochs.steps_in(epoch))
        read = sum(int((s.batch(k)[0].segments > 0).sum()) for k in steps)
        assert read == sum(tokens.values())


def test_rows_with_too_many_read_positions_are_divided():
    plan = RowPlan(np.arange(6), np.array([0, 3, 6]))
    found = limit_reads(plan, np.array([2, 3, 4, 1, 1, 1]), 5)
    assert found.offsets.tolist() == [0, 2, 3, 6] and found.members.tolist() == list(range(6))
    assert limit_reads(plan, np.ones(6, int), 3) is plan


def test_targets_know_their_source_in_training_and_evaluation(sources):
    s = sft(sources, held_out=0.2)
    tokenizer = tiny("llama3")

    def check(batch):
        assert batch.source_names == ("a", "b", "c")
        for ids, segments, read, numbers, weights in zip(
            *(
                x.reshape(-1, x.shape[-1])
                for x in (batch.ids, batch.segments, batch.read, batch.sources, batch.token_weights)
            ),
            strict=True,
        ):
            for n in range(1, segments.max() + 1):
                text = tokenizer.decode(ids[segments == n].tolist(), skip_special_tokens=True)
                inside = (segments[read] == n) & (weights > 0)
                assert {"abc"[k] for k in numbers[inside]} == {text[0]}

    check(s.batch(0)[0])
    for batch in s.held_out[:3]:
        check(batch)
    assert s.info.stats.held_out == sum(round(0.2 * n) for n in SIZES.values())


def test_several_held_out_files_have_their_own_names(sources):
    s = sft(sources, "a.jsonl", held_out="b.jsonl,c.jsonl")
    assert s.batch(0)[0].sources is None and s.held_out[0].source_names == ("b", "c")


# ---- pairs and prompts


def test_pairs_of_an_epoch_have_each_sources_share(sources):
    files = "a_pairs.jsonl,b_pairs.jsonl:0.3,c_pairs.jsonl:0.2"

    def opened(**options):
        settings = PairRows(files, format="plain", max_length=64, batch=10, held_out="none", **options)
        return settings.open(tiny("llama3"), cache=sources / "cache")

    s, again = opened(), opened(epochs=4)
    total = sum(size // 10 for size in SIZES.values())
    steps = int(s.info.steps_per_epoch)
    for epoch in range(2):
        counts = Counter()
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = s.batch(step)[0]
            names = [n for row in s.row_names(step) for n in row.split(", ") if n]
            numbers = batch.sources[batch.pair_weights > 0]
            assert Counter(n[0] for n in names) == Counter("abc"[k] for k in numbers)
            counts.update(n[0] for n in names)
            for x, y in zip(batch.index, again.batch(step)[0].index, strict=True):
                assert sorted(x[x >= 0].tolist()) == sorted(y[y >= 0].tolist())
        assert {n: counts[n] for n in "abc"} == {n: pytest.approx(SHARES[n] * total, abs=1) for n in "abc"}
        assert sum(counts.values()) == total


def test_prompts_of_rollouts_have_each_sources_share(sources):
    data = Prompts(MIXED, held_out=0.1, batch=25, format="plain", max_prompt=64)
    train, held = prompts.split_prompts(data, tiny("llama3"))
    assert held.source_names == train.source_names == ("a", "b", "c") and set(
        held.select(range(len(held))).sources
    ) == {0, 1, 2}
    rollouts = len(train) // 25
    used = [prompts.prompts_of_rollout(data, train, k) for k in range(rollouts)]
    counts = Counter(train.names[i][0] for rollout in used for i in rollout)
    exact = Counter(train.split.rows.names[i][0] for i in train.split.of_epoch(0))
    for name, share in SHARES.items():
        assert exact[name] / len(train) == pytest.approx(share, abs=1e-3)
        assert abs(counts[name] - exact[name]) <= len(train) - 25 * rollouts
