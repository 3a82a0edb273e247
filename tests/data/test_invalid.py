"""Invalid rows end the run, or are left out, counted by reason and reported, and change no batch."""

import json
import re

import pytest
from tiny_tokenizers import tiny

from jaxft.data.pairs.source import PairRows
from jaxft.data.prompts import Prompts, read_prompts
from jaxft.data.sft import Rows

SFT = [{"instruction": "a", "response": "b"}, {"instruction": "a", "response": ""}]
PAIR = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
UNPAIRED = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "b", "label": 7}]
PROMPT = [{"prompt": "a"}, {"prompt": " ", "answer": "b"}]


def stats_of(data, rows, tmp_path, **options):
    """The counts of a dataset of three valid rows with an invalid one in second place."""
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, [rows[0], rows[1], rows[0], rows[0]])))
    options = {"held_out": "none", "batch": 1} | options
    if data is Prompts:
        return read_prompts(str(path), Prompts(str(path), **options), tiny("chatml"))
    return data(str(path), **options).open(tiny("chatml"), cache=tmp_path).info.stats


@pytest.mark.parametrize(
    ("data", "rows", "reason", "options"),
    [
        (Rows, SFT, "empty column 'response'", {}),
        (PairRows, PAIR, "identical responses", {}),
        (PairRows, UNPAIRED, "label that is neither true nor false", {"unpaired": True}),
        (Prompts, PROMPT, "empty column 'prompt'", {}),
    ],
)
def test_an_invalid_row_is_an_error_that_names_the_setting_or_is_left_out(
    data, rows, reason, options, tmp_path
):
    with pytest.raises(ValueError, match=r"r.jsonl:2: .*; data.invalid=drop leaves invalid rows out$"):
        stats_of(data, rows, tmp_path, **options)
    error = "1 of 4 rows are invalid, data.invalid_limit=0.05 allows 0"
    with pytest.raises(ValueError, match=f"{re.escape(error)}.*: 1 x {reason} .first r.jsonl:2: "):
        stats_of(data, rows, tmp_path, **options, invalid="drop")
    for _ in range(2):  # the second time from the cache
        stats = stats_of(data, rows, tmp_path, **options, invalid="drop", invalid_limit=0.25)
        assert stats.dropped == 0
        if data is Prompts:
            assert [(row.reason, row.name) for row in stats.invalid] == [(reason, "r.jsonl:2")]
        else:
            assert stats.examples == 3 and [row[:2] for row in stats.invalid] == [(reason, 1)]
    with pytest.raises(ValueError, match=r"r.jsonl:2: .*data.invalid=drop"):  # the cache hides nothing
        stats_of(data, rows, tmp_path, **options)
