"""The data of a run as its report shows it: texts of tokens, their weights, lengths and invalid rows."""

import json

import numpy as np
import pytest
from tiny_tokenizers import tiny

from jaxft.data import inspection
from jaxft.data.inspection import inspect
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts
from jaxft.data.sft import Rows

KINDS = {"sft": Rows, "pairs": PairRows, "prompts": Prompts}
ROWS = {
    "sft": [{"prompt": f"why {i}?", "completion": "so 🙂" + " it is" * i} for i in range(6)],
    "pairs": [{"prompt": f"why {i}?", "chosen": "so it is", "rejected": "no"} for i in range(6)],
    "prompts": [{"prompt": f"why {i}?", "answer": "so"} for i in range(6)],
}


def summarised(tmp_path, monkeypatch, kind, batch=4):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    lines = [*map(json.dumps, ROWS[kind]), '{"prompt": 3}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = tiny("chatml")
    data = KINDS[kind](str(tmp_path / "rows.jsonl"), batch=batch, held_out=None)
    found = inspection.data_summary(inspect(data, tokenizer), tokenizer)
    return json.loads(json.dumps(found))  # it is JSON


@pytest.mark.parametrize("kind", KINDS)
def test_examples_show_the_text_and_which_tokens_have_a_loss(tmp_path, monkeypatch, kind):
    found = summarised(tmp_path, monkeypatch, kind)
    assert len(found["examples"]) == inspection.SHOWN_EXAMPLES
    for example in found["examples"]:
        parts = {part["label"]: part["pieces"] for part in example["parts"]}
        assert list(parts) == {"sft": [""], "pairs": ["prompt", "chosen", "rejected"], "prompts": [""]}[kind]
        texts = {label: "".join(text for text, _ in pieces) for label, pieces in parts.items()}
        learned = {label: "".join(t for t, w in pieces if w > 0) for label, pieces in parts.items()}
        assert "why " in next(iter(texts.values())) and example["name"].startswith("rows.jsonl:")
        if kind == "sft":
            assert learned[""].startswith("so 🙂") and "why" not in learned[""]
        elif kind == "pairs":
            assert learned["chosen"].startswith("so it is") and learned["rejected"].startswith("no")
            assert not learned["prompt"]
        else:
            assert not learned[""]
    (invalid,) = found["invalid"]
    assert invalid["rows"] == 1 and "rows.jsonl:7" in invalid["first"]


def test_a_row_that_a_batch_repeats_is_one_example(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "SHOWN_EXAMPLES", 99)
    for batch in (4, 20):
        names = [x["name"] for x in summarised(tmp_path, monkeypatch, "prompts", batch)["examples"]]
        assert len(names) == len(set(names)) == min(batch, 6)


def test_lengths_are_counted_and_long_parts_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "EXAMPLE_TOKENS", 5)
    found = summarised(tmp_path, monkeypatch, "sft")
    assert set(found["lengths"]) == {"all", "prompt", "with loss"}
    for lengths in found["lengths"].values():
        assert sum(lengths["histogram"]) == lengths["examples"] == 6
    for example in found["examples"]:
        (part,) = example["parts"]
        assert 1 <= len(part["pieces"]) <= 5 and f"{5 + part['more']} tokens" in example["facts"]


def test_a_histogram_has_its_ends_at_minimum_and_maximum():
    found = inspection.length_histogram(np.array([3, 3, 3, 50]))
    assert found["histogram"][0] == 3 and found["histogram"][-1] == 1 and found["percentiles"]["max"] == 50
