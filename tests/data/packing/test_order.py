"""data.order_by: an epoch goes from the smallest to the largest number of a column, whatever the packing."""

import json

import numpy as np
import pytest
from tiny_tokenizers import tiny

from jaxft.data import prompts
from jaxft.data.packing.pack import ORDER_WINDOW, pack_in_order, permutation
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts
from jaxft.data.sft import Rows

COUNT = 120
LEVELS = (permutation(COUNT, 7) // 2).tolist()  # each number twice, in random order


@pytest.fixture
def folder(tmp_path):
    rows = [{"prompt": f"{i}", "completion": " a" * (1 + i % 9), "level": n} for i, n in enumerate(LEVELS)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{"text": "the rank " * (1 + i % 9), "level": -n} for i, n in enumerate(LEVELS)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, texts)))
    pairs = [{"prompt": f"{i}", "chosen": " a", "rejected": " b", "level": n} for i, n in enumerate(LEVELS)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path


def opened(folder, make, file, **options):
    settings = {"held_out": "none", "batch": 4, "max_length": 48, "order_by": "level", "epochs": 2, **options}
    return make(str(folder / file), **settings).open(tiny("llama3"), cache=folder / "cache")


def levels_of_steps(s):
    return [
        [LEVELS[int(n.rpartition(":")[2]) - 1] for row in s.row_names(k) for n in row.split(", ") if n]
        for k in range(s.info.steps)
    ]


@pytest.mark.parametrize("kind", ("rows", "one per row", "wrapped", "pairs"))
def test_an_epoch_goes_from_small_to_large_numbers_and_then_begins_again(folder, kind):
    make, file, options = {
        "rows": (Rows, "r.jsonl", {"format": "plain"}),
        "one per row": (Rows, "r.jsonl", {"format": "plain", "packing": False}),
        "wrapped": (Rows, "t.jsonl", {"packing": "wrapped", "too_long": "split"}),
        "pairs": (PairRows, "p.jsonl", {"format": "plain"}),
    }[kind]
    s = opened(folder, make, file, **options)
    steps = levels_of_steps(s)
    if kind == "wrapped":
        steps = [[-level for level in step] for step in steps]
    half = len(steps) // 2
    for epoch in (steps[:half], steps[half:]):
        seen = [level for step in epoch for level in step]
        assert set(map(abs, seen)) == set(LEVELS) and (kind == "wrapped" or len(seen) == COUNT)
        for k in range(half - ORDER_WINDOW):  # rows are packed within ORDER_WINDOW steps
            later = [level for step in epoch[k + ORDER_WINDOW :] for level in step]
            assert max(epoch[k]) <= min(later)
        means = [np.mean(step) for step in epoch]
        assert means[0] < np.mean(means) < means[-1]
        if kind == "one per row":
            assert seen == sorted(seen)
    assert kind == "pairs" or steps[:half] == steps[half:]
    assert s.info.fingerprint != opened(folder, make, file, **{**options, "order_by": None}).info.fingerprint


def test_prompts_of_rollouts_are_in_order(folder):
    data = Prompts(str(folder / "r.jsonl"), held_out="none", batch=6, format="plain", order_by="level")
    train, _ = prompts.split_prompts(data, tiny("llama3"))
    used = [prompts.prompts_of_rollout(data, train, k) for k in range(COUNT // 6 + 1)]
    assert [LEVELS[i] for k in used[:-1] for i in k] == sorted(LEVELS)
    assert used[-1].tolist() == used[0].tolist()


def test_rows_without_the_number_are_invalid(folder):
    lines = (folder / "r.jsonl").read_text().splitlines()
    (folder / "r.jsonl").write_text("\n".join([*lines[:2], json.dumps({"prompt": "a", "completion": "b"})]))
    with pytest.raises(
        ValueError, match=r"r.jsonl:3: no number in column 'level', which data.order_by names"
    ):
        opened(folder, Rows, "r.jsonl", format="plain")


def test_packing_in_order_fills_rows_from_small_to_large_means_and_holds_every_example_once():
    rng = np.random.default_rng(0)
    lengths, keys = rng.integers(1, 20, 500), rng.normal(size=500)
    plan = pack_in_order(lengths, keys, 64, 4, seed=0)
    assert sorted(plan.members.tolist()) == list(range(500))
    used = np.add.reduceat(lengths[plan.members], plan.offsets[:-1])
    assert used.max() <= 64 and lengths.sum() / (64 * plan.rows) > 0.9
    means = [keys[plan.slice(row, row + 1).members].mean() for row in range(plan.rows)]
    assert means == sorted(means)  # across windows, too: the keys of one are at most those of the next
