"""Weights of rows and messages: a row of weight 2 counts as two rows, a turn that is not learned as none."""

import json
import re

import numpy as np
import pytest
from tiny_tokenizers import tiny

from jaxft.data.pairs import PairRows
from jaxft.data.rows.format_choice import prompt_of
from jaxft.data.rows.row_files import Row
from jaxft.data.sft import Rows

ENDS = {"chatml": "<|im_end|>", "marked": "<|im_end|>", "plain": "\n"}
QUESTION = {"role": "user", "content": "q"}


def turn(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def source(folder, rows, kind="chatml", **options):
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"held_out": "none", "max_length": 96, "batch": 4, **options}
    return Rows(str(folder / "r.jsonl"), **options).open(tiny(kind), cache=folder / "cache")


def weight_of_texts(s, kind="chatml"):
    """{learned text: sum of its tokens' weights} of the first batch; consecutive targets are one text."""
    batch, found = s.batch(0)[0], {}
    for read, targets, weights in zip(
        *(x.reshape(-1, x.shape[-1]) for x in (batch.read, batch.targets, batch.token_weights)), strict=True
    ):
        used = np.flatnonzero(weights)
        for run in np.split(used, np.flatnonzero(np.diff(read[used]) != 1) + 1):
            if len(run):
                text = tiny(kind).decode(targets[run].tolist())
                found[text] = found.get(text, 0.0) + float(weights[run].sum(dtype=np.float64))
    return found


@pytest.mark.parametrize("weighting", ("token", "sequence"))
def test_a_row_of_weight_2_counts_as_two_rows_and_one_of_0_as_none(tmp_path, weighting):
    rows = [{"instruction": "q", "response": text} for text in ("1 2 3", "a", "the rank of a matrix")]
    once = source(tmp_path, [rows[0], rows[1], rows[1]], weighting=weighting)
    weighted = source(
        tmp_path,
        [rows[0], {**rows[1], "weight": 2.0}, {**rows[2], "weight": 0}],
        weighting=weighting,
    )
    expected, got = weight_of_texts(once), weight_of_texts(weighted)
    assert len(expected) == 2 and got == pytest.approx(expected, abs=1e-6)
    assert weighted.info.fingerprint != source(tmp_path, rows, weighting=weighting).info.fingerprint


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize("off", ({"train": False}, {"weight": 0}, {"weight": "0"}))
def test_a_turn_that_is_not_trained_on_has_no_loss_and_no_end(tmp_path, kind, off):
    messages = [QUESTION, turn("one", **off), QUESTION, turn("two"), QUESTION, turn("three", **off)]
    found = weight_of_texts(source(tmp_path, [{"messages": messages}], kind), kind)
    assert {text.strip(): w for text, w in found.items()} == {("two" + ENDS[kind]).strip(): pytest.approx(1)}


def test_a_flag_of_a_message_overrides_loss_on(tmp_path):
    messages = [QUESTION, turn("one", train=True), QUESTION, turn("two"), QUESTION, turn("three")]
    got = weight_of_texts(source(tmp_path, [{"messages": messages}], loss_on="completion"))
    assert set(got) == {"one<|im_end|>", "three<|im_end|>"}
    row = {"prompt": messages[:5], "completion": [turn("three", train=None)]}
    assert set(weight_of_texts(source(tmp_path, [row]))) == set(got)


def test_weights_of_turns_multiply_those_of_their_row(tmp_path):
    """Texts of 1 character, each with <|im_end|>: 2 targets of equal weight per turn. Factors are 2 * (1/4,
    1) and 1, so the sums are 0.5 * 2 = 1, 2 * 2 = 4 and 1 * 2 = 2 of 7.
    """
    messages = [QUESTION, turn("1", weight=0.25), QUESTION, turn("2", weight=1)]
    rows = [{"messages": messages, "weight": "2"}, {"messages": [QUESTION, turn("3")]}]
    got = weight_of_texts(source(tmp_path, rows))
    assert got == pytest.approx({"1<|im_end|>": 1 / 7, "2<|im_end|>": 4 / 7, "3<|im_end|>": 2 / 7}, abs=1e-6)
    # per example: 2/3 and 1/3; within the first 1 : 4
    got = weight_of_texts(source(tmp_path, rows, weighting="sequence"))
    expected = {"1<|im_end|>": 2 / 15, "2<|im_end|>": 8 / 15, "3<|im_end|>": 1 / 3}
    assert got == pytest.approx(expected, abs=1e-6)


def test_with_loss_on_all_only_the_turn_itself_is_left_out(tmp_path):
    messages = [QUESTION, turn("one", train=False), {**QUESTION, "train": True}, turn("two")]
    (before, after) = weight_of_texts(source(tmp_path, [{"messages": messages}], loss_on="all"))
    assert before.endswith("<|im_start|>assistant\n") and "q<|im_end|>" in before
    assert after.startswith("\n<|im_start|>user\nq") and after.endswith("two<|im_end|>\n")


def test_the_learned_line_counts_weights(tmp_path):
    """Four turns of 2 tokens, of which one is not trained on and one is of a row of weight 0."""
    messages = [QUESTION, turn("1"), QUESTION, turn("a", train=False), QUESTION, turn("2", weight=3)]
    rows = [{"messages": messages}, {"messages": [QUESTION, turn("3")], "weight": 0}]
    line = source(tmp_path, rows).info.stats.learned
    assert line == (
        "50.0 % of the 8 response tokens are learned (data.loss_on=assistant, rows weigh 0 to 1 (column "
        "weight), turns weigh 1 to 3)"
    )


def test_a_batch_of_weight_0_has_no_nan_and_held_out_rows_have_weights(tmp_path):
    row = {"instruction": "q", "response": "a"}
    rows = [{**row, "weight": 0, "n": 0}] * 4 + [{**row, "n": 1}]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    options = {"packing": False, "order_by": "n", "held_out": str(tmp_path / "h.jsonl")}
    s = source(tmp_path, rows, **options)
    assert (s.batch(0)[0].token_weights == 0).all() and all((b.token_weights == 0).all() for b in s.held_out)
    assert s.batch(1)[0].token_weights.sum() == pytest.approx(1) and s.prompts(3) == []
    assert s.info.stats.learned_tokens == 2
    held = [{**row, "weight": weight, "n": 0} for weight in (3, 1)]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, held)))
    (batch,) = source(tmp_path, rows, **options).held_out
    assert sorted(set(batch.token_weights[batch.token_weights > 0].tolist())) == [0.125, 0.375]


@pytest.mark.parametrize("kind", ["rows", "pairs"])
def test_rows_that_all_have_weight_0_end_the_run_before_it_learns_nothing(tmp_path, kind):
    pair = {"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b", "weight": 0}
    columns = (
        ("prompt", "completion", "weight") if kind == "rows" else ("prompt", "chosen", "rejected", "weight")
    )
    data = tmp_path / "r.jsonl"
    data.write_text("\n".join(json.dumps({c: pair[c] for c in columns}) for _ in range(4)))
    options = {} if kind == "rows" else {"weight_column": "weight"}
    settings = (Rows if kind == "rows" else PairRows)(str(data), held_out=0.5, batch=1, **options)
    with pytest.raises(ValueError, match="r.jsonl: every training row has weight 0, so that nothing would"):
        settings.open(tiny("chatml"), cache=tmp_path)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"weight": -1}, "r.jsonl:1: column 'weight' is -1; use a finite number of at least 0"),
        ({"weight": "heavy"}, "column 'weight' is 'heavy'"),
        ({"weight": True}, "column 'weight' is True"),
        ({"keys": {"weight": float("inf")}}, "messages[1] has weight=inf"),
        ({"keys": {"train": "yes"}}, "messages[1] has train='yes'; use true or false"),
        ({"keys": {"train": True, "weight": 0}}, "messages[1] has train=True and weight=0; remove one"),
        ({"keys": {"train": False}}, "no assistant turn is learned: all have weight 0 or train=false"),
        ({"question": {"train": True}}, "message 0, a user turn, has weight 1, but only assistant turns can"),
        ({"question": {"weight": 0}, "loss_on": "all"}, "set data.loss_on=assistant"),
    ],
)
def test_wrong_weights_are_invalid_rows(tmp_path, row, error):
    messages = [{**QUESTION, **row.get("question", {})}, turn("a", **row.get("keys", {}))]
    fields = {"messages": messages} | {k: v for k, v in row.items() if k == "weight"}
    with pytest.raises(ValueError, match=re.escape(error)):
        source(tmp_path, [fields], loss_on=row.get("loss_on", "assistant"))


def test_another_column_may_hold_the_weight(tmp_path):
    rows = [{"text": "a b", "score": 1}, {"text": "1 2", "score": 3}]
    s = source(tmp_path, rows, columns=("weight=score",))
    assert sorted(weight_of_texts(s).values()) == pytest.approx([0.25, 0.75])


def test_prompts_ignore_weights_and_responses_of_pairs_refuse_them(tmp_path):
    messages = [QUESTION, turn("one", train=False), {**QUESTION, "weight": 0}]
    assert prompt_of(Row("r:1", {"prompt": messages})).messages[1] == turn("one")
    pair = {"prompt": messages, "chosen": [turn("a", weight=1)], "rejected": [turn("b")]}
    (tmp_path / "p.jsonl").write_text(json.dumps(pair))
    settings = PairRows(str(tmp_path / "p.jsonl"), held_out="none", batch=1)
    batch = settings.open(tiny("chatml"), cache=tmp_path).batch(0)[0]
    assert sorted(batch.lengths[batch.lengths > 0].tolist()) == [2, 2]
    (tmp_path / "p.jsonl").write_text(json.dumps({**pair, "chosen": [turn("a", weight=0.5)]}))
    with pytest.raises(
        ValueError, match="p.jsonl:1: message 3 of a response has weight 0.5; turns of a pair"
    ):
        settings.open(tiny("chatml"), cache=tmp_path)
