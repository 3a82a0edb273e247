"""Prompts of rollouts: the prompt of a row, the held-out split, and the order of prompts in rollouts."""

import datetime
import json
import re
from decimal import Decimal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_llama import tiny_tokenizer

from jaxft.data import prompts
from jaxft.data.chat.loss_mask import example_prompt_ids
from jaxft.data.packing.pack import permutation
from jaxft.data.prompts import Prompts
from jaxft.data.rows.example import as_given
from jaxft.data.rows.format_choice import prompt_of
from jaxft.data.rows.row_files import Row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_group": 5, "group": 4}, "data.eval_group=5"),
        ({"decode_rows": 3, "group": 4}, "data.decode_rows=3 is less than data.group=4"),
        ({"kv_cache": "int4"}, "data.kv_cache"),
        ({"top_p": 7.0}, "data.top_p=7.0"),
        ({"min_p": 7.0}, "data.min_p=7.0"),
        ({"temperature": -1.0}, "data.temperature=-1.0"),
        ({"group": 4, "temperature": 0.0}, "data.temperature=0 samples the same completion 4 times"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Prompts("x", **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ""}, "bad.jsonl:1: the row is empty"),
        ({"prompt": " ", "answer": 1}, "bad.jsonl:1: column 'prompt' is empty"),
        ({"title": "why?"}, "bad.jsonl:1: the columns title include no prompt; add prompt, messages or"),
        ({"prompt": 7}, "bad.jsonl:1: "),
        ({"messages": [{"role": "user", "content": " "}]}, "bad.jsonl:1: "),
        ({"messages": [{"role": "assistant", "content": "so"}]}, "bad.jsonl:1: "),
        ({"prompt": "why " * 99}, "bad.jsonl: all 1 prompts have more tokens than data.max_prompt=64"),
    ],
)
def test_a_row_without_a_prompt_is_an_error_that_names_it(tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        prompts.read_prompts(str(path), Prompts(str(path), max_prompt=64).reader(tiny_tokenizer(), tmp_path))


@pytest.mark.parametrize("text", ["[1, 2, 3] sort this list", "[INST] hi [/INST]", "[1, 2]"])
def test_a_prompt_that_starts_with_a_bracket_is_text(text):
    assert as_given(prompt_of(Row("rows:1", {"prompt": text}))) == text
    turns = [{"role": "user", "content": "why?"}]
    assert as_given(prompt_of(Row("rows:1", {"prompt": json.dumps(turns)}))) == turns


def test_rows_with_the_same_prompt_are_on_one_side_of_the_split(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"prompt": "why" * (1 + i % 5), "n": i}) + "\n" for i in range(20)))
    data = Prompts(str(path), held_out=0.4, seed=3)
    train, held = prompts.split_prompts(data, tiny_tokenizer(), tmp_path)
    assert len(train) + len(held) == 20 and len(held) == 8
    assert not set(train.token_ids) & set(held.token_ids)
    distinct = list(dict.fromkeys((permutation(20, 3, 0) % 5).tolist()))[:2]
    assert [row["n"] for row in held.fields] == [i for i in range(20) if i % 5 in distinct]


def test_prompts_come_from_the_file_with_the_columns_that_rewards_read(tmp_path):
    """Also columns of types that JSON lacks, as Parquet files have them."""
    when = datetime.datetime(2024, 2, 3, 4, 5, tzinfo=datetime.UTC)
    rows = [
        {"prompt": f"why {i}?", "answer": i / 7, "blob": b"\x00\xff", "when": when, "day": when.date()}
        | {"price": Decimal("1.50"), "at": when.time(), "tags": [{"a": "\u00e9"}], "none": None}
        for i in range(3)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    data = Prompts(str(tmp_path / "r.parquet"), held_out=None, columns=("prompt=prompt",))
    for _ in range(2):  # the second time from the cache
        train, held = prompts.split_prompts(data, tiny_tokenizer(), tmp_path)
        assert list(train.fields) == rows and len(held) == 0
        two = train.select([2, 0])
        assert two.names == ("r.parquet:3", "r.parquet:1") and two.fields == (rows[2], rows[0])
        assert [two.as_given(i) for i in (0, 1)] == ["why 2?", "why 0?"]
        assert [list(ids) for ids in two.ids] == [
            next(example_prompt_ids([prompt_of(Row("r", row))], tiny_tokenizer()))
            for row in (rows[2], rows[0])
        ]


def test_rollouts_use_all_prompts_in_an_order_of_seed_and_number(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"why {i}"}) + "\n" for i in range(10)))
    data = Prompts(str(path), batch=6, minibatches=3, passes=2, held_out=None)
    train, _ = prompts.split_prompts(data, tiny_tokenizer(), tmp_path)
    used = np.concatenate([prompts.prompts_of_rollout(data, train, k) for k in range(5)])
    assert [sorted(used[i : i + 10].tolist()) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert used[:10].tolist() != used[10:20].tolist()
    for first in (0, 3):
        parts = np.concatenate([prompts.prompts_of_step(data, 4, first + k) for k in range(3)])
        assert sorted(parts.tolist()) == list(range(6))
