"""Solutions in steps: TRL's tokens, labels at the last tokens of steps, equal weights, and bad rows."""

import json

import numpy as np
import pytest
from tiny_tokenizers import tiny

from jaxft.data.inspection import inspect
from jaxft.data.sft import SolutionRows


def rows(count=9):
    return [
        {
            "prompt": f"what is {i // 2}?",
            "completions": [f"step {j} of {i}" + " or so" * (j % 2) for j in range(1 + i % 4)],
            "labels": [(i + j) % 3 > 0 for j in range(1 + i % 4)],
        }
        for i in range(count)
    ]


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def trl(row, tokenizer, separator):
    """The tokens of a row, and (place of its last token, label) of each step, as TRL's PRMTrainer does."""
    ids = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False).input_ids]
    labels = []
    for step, label in zip(row["completions"], row["labels"], strict=True):
        ids += tokenizer(step, add_special_tokens=False).input_ids
        ids += tokenizer(separator, add_special_tokens=False).input_ids
        labels.append((len(ids) - 1, int(label)))
    return ids, labels


def solutions(batch):
    """(tokens, [(place in the solution, label, weight)]) of each solution of a batch."""
    found = []
    flat = [np.asarray(x).reshape(-1, x.shape[-1]) for x in (batch.ids, batch.segments, batch.positions)]
    reads = [np.asarray(x).reshape(-1, x.shape[-1]) for x in (batch.read, batch.targets, batch.token_weights)]
    for ids, segments, positions, read, labels, weights in zip(*flat, *reads, strict=True):
        for number in range(1, segments.max(initial=0) + 1):
            mine = (segments[read] == number) & (weights > 0)
            steps = sorted(zip(positions[read[mine]], labels[mine], weights[mine], strict=True))
            found.append((ids[segments == number].tolist(), steps))
    return found


@pytest.mark.parametrize("separator", ("\n", " 1 2"))
def test_a_solution_has_trls_tokens_and_each_step_its_label_at_its_last_token(tmp_path, separator):
    tokenizer, file = tiny("llama3"), write(tmp_path / "s.jsonl", rows())
    options = {"held_out": "none", "max_length": 128, "batch": 2, "separator": separator}
    source = SolutionRows(file, **options).open(tokenizer, cache=tmp_path)
    batches = [source.batch(k)[0] for k in range(source.info.steps)]
    found = {tuple(ids): steps for batch in batches for ids, steps in solutions(batch)}
    assert len(found) == 9
    for row in rows():
        ids, labels = trl(row, tokenizer, separator)
        assert [(place, label) for place, label, _ in found[tuple(ids)]] == labels
    for batch in batches:
        weights = batch.token_weights[batch.token_weights > 0]
        assert weights.sum() == pytest.approx(1) and np.ptp(weights) == 0
    assert source.info.stats.learned == "21 steps with labels, 67 % of them right"


def test_steps_behind_the_limit_are_left_out_and_solutions_without_any_step(tmp_path):
    tokenizer, file = tiny("llama3"), write(tmp_path / "s.jsonl", rows())
    wanted, limit = [], 30
    for row in rows():
        ids, labels = trl(row, tokenizer, "\n")
        kept = [(place, label) for place, label in labels if place < limit]
        wanted += [(ids[:limit], kept)] if kept else []
    options = {"held_out": "none", "max_length": limit, "packing": False}
    source = SolutionRows(file, **options).open(tokenizer, cache=tmp_path)
    batches = [source.batch(k)[0] for k in range(source.info.steps)]
    found = [(ids, [step[:2] for step in steps]) for batch in batches for ids, steps in solutions(batch)]
    assert sorted(found) == sorted(wanted) and any(len(ids) == limit for ids, _ in wanted)
    assert any(len(trl(row, tokenizer, "\n")[0]) > limit for row in rows())
    with pytest.raises(ValueError, match=r"s\.jsonl:\d: \d+ tokens are more than data\.max_length=30"):
        SolutionRows(file, max_length=limit, too_long="error").open(tokenizer, cache=tmp_path)


def test_the_last_step_alone_is_trained_on_and_all_held_out_steps_are_evaluated(tmp_path):
    tokenizer, file = tiny("llama3"), write(tmp_path / "s.jsonl", rows())
    options = {"held_out": 0.3, "max_length": 64, "batch": 8, "separator": r"\n"}
    every = SolutionRows(file, **options).open(tokenizer, cache=tmp_path)
    last = SolutionRows(file, **options, last_step_only=True).open(tokenizer, cache=tmp_path)
    (batch,), (all_steps,) = [[x.batch(k)[0] for k in range(x.info.steps)] for x in (last, every)]
    expected = {tuple(ids): (steps[-1][:2], len(steps)) for ids, steps in solutions(all_steps)}
    found = {tuple(ids): steps for ids, steps in solutions(batch)}
    assert found.keys() == expected.keys() and max(count for _, count in expected.values()) > 1
    for ids, steps in found.items():
        assert [step[:2] for step in steps] == [expected[ids][0]]
        assert steps[0][2] == pytest.approx(1 / len(found))
    assert len(last.held_out) == len(every.held_out) > 0
    for one, other in zip(last.held_out, every.held_out, strict=True):
        assert (one.token_weights == other.token_weights).all() and (one.targets == other.targets).all()


def test_all_solutions_of_a_prompt_are_held_out_together_and_weights_are_the_rows_or_the_solutions(tmp_path):
    tokenizer = tiny("llama3")
    file = write(tmp_path / "s.jsonl", [{**row, "weight": 1 + i % 2} for i, row in enumerate(rows())])
    options = {"held_out": 0.2, "max_length": 64, "batch": 8, "weighting": "sequence"}
    source = SolutionRows(file, **options).open(tokenizer, cache=tmp_path)
    held = [steps for batch in source.held_out for steps in solutions(batch)]
    numbers = {int(source.split.rows.names[i].rpartition(":")[2]) - 1 for i in source.split.held}
    assert len(held) == len(numbers) and {i // 2 for i in numbers}.isdisjoint(
        {i // 2 for i in range(9)} - {i // 2 for i in numbers} or {-1}
    )
    assert all({2 * (i // 2), 2 * (i // 2) + 1} - {9} <= numbers for i in numbers)
    (batch,) = [source.batch(k)[0] for k in range(source.info.steps)]
    totals = sorted(sum(weight for _, _, weight in steps) for _, steps in solutions(batch))
    light, heavy = totals[0], totals[-1]
    assert heavy == pytest.approx(2 * light)
    shown = inspect(SolutionRows(file, **options), tokenizer)
    example = next(shown.of_step(0))
    learned = [int(token) for token in example.parts[0].ids[example.parts[0].weights > 0]]
    assert {*learned} == {*tokenizer("\n", add_special_tokens=False).input_ids}


GOOD = {"prompt": "q", "completions": ["x", "y"], "labels": [True, False]}
BAD = [
    ({**GOOD, "labels": [True, "maybe"]}, r"labels\[1\] is 'maybe'; use true or false \(or 1 or 0\)"),
    ({**GOOD, "labels": [0.7, 1]}, r"labels\[0\] is 0\.7; use true or false"),
    (
        {**GOOD, "labels": [True]},
        "the row has 2 steps in 'completions' and 1 entries in 'labels'; use one label",
    ),
    ({**GOOD, "labels": []}, "the row has 2 steps in 'completions' and 0 entries in 'labels'; use one label"),
    ({**GOOD, "completions": [], "labels": []}, "'completions' is empty; add the steps of the solution"),
    ({**GOOD, "labels": True}, "column 'labels' is a boolean; use a list"),
    ({**GOOD, "completions": ["x", 3]}, r"column 'completions\[1\]' must be a string, got int"),
    ({**GOOD, "prompt": " "}, "column 'prompt' is empty; fill it or remove the row"),
    ({"prompt": "q", "completions": ["x"]}, "the row has no column labels; give each step a label"),
]


@pytest.mark.parametrize(("row", "error"), BAD)
def test_bad_steps_are_one_line_that_names_the_row_or_are_counted(tmp_path, row, error):
    tokenizer, settings = tiny("llama3"), {"held_out": "none", "max_length": 64}
    file = write(tmp_path / "s.jsonl", [row])
    with pytest.raises(ValueError, match=error) as caught:
        SolutionRows(file, **settings).open(tokenizer, cache=tmp_path)
    assert "s.jsonl:1: " in str(caught.value) and "\n" not in str(caught.value)
    if "labels" in row:
        file = write(tmp_path / "t.jsonl", [*rows(), row])
        dropped = SolutionRows(file, **settings, invalid="drop", invalid_limit=0.2).open(
            tokenizer, cache=tmp_path
        )
        assert sum(count.rows for count in dropped.info.stats.invalid) == 1


def test_settings_without_a_meaning_for_steps_are_refused():
    for setting in ({"loss_on": "all"}, {"format": "plain"}, {"packing": "wrapped"}, {"too_long": "split"}):
        with pytest.raises(ValueError, match="data"):
            SolutionRows("r", **setting)
