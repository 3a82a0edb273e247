"""`jaxft evaluate`: losses and preferences equal those of transformers; scores of completions and pass@k."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_llama
from evaluate_place import PAIRS, TEXTS, bytes_of, chat, torch_loss, write, write_evaluate_place
from scripts_in_process import call, load

from jaxft.objectives.intervals import mean_interval, wilson
from jaxft.train.evaluate import evaluate_models
from jaxft.train.evaluate.completer import decode_completion
from jaxft.train.evaluate.evaluate import Evaluated, PairScore, preference_metrics
from jaxft.train.evaluate.evaluate_models import CompletionEvaluation
from jaxft.train.evaluate.scored_completions import pass_at

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model's folder, the same model by transformers, and rows."""
    folder = tmp_path_factory.mktemp("evaluate")
    return folder, write_evaluate_place(folder)


@pytest.fixture
def evaluate(place, tmp_path, monkeypatch, capsys):
    """Run the command on the model in float32; return its metrics."""
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(place[0])

    def run(*argv):
        code, out, err = call(
            monkeypatch, capsys, "evaluate", "--model", "model", "--dtype", "float32", "--json", *argv
        )
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.mark.quick_cases("packed")
@pytest.mark.parametrize("options", [(), ("--packing", "--max-length", "64")], ids=["rows", "packed"])
def test_loss_and_perplexity_are_those_of_transformers(place, evaluate, options):
    eos = 257  # the tokenizer adds no BOS
    sums = [torch_loss(place[1], [*bytes_of(text), eos], 1) for text in TEXTS]
    total, count = map(sum, zip(*sums, strict=True))
    metrics = evaluate("--file", "texts.jsonl", *options)
    assert metrics["tokens"] == count and metrics["examples"] == len(TEXTS)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-3)
    hits = [torch_hits(place[1], [*bytes_of(text), eos]) for text in TEXTS]
    assert metrics["mean_token_accuracy"] == pytest.approx(sum(hits) / count)


def torch_hits(model, ids):
    """How many tokens are the most likely one by transformers."""
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0, :-1].argmax(-1)
    return int((best == torch.tensor(ids[1:])).sum())


@pytest.mark.slow
def test_a_row_that_is_too_long_is_truncated_and_reported(place, evaluate, monkeypatch, capsys):
    options = ("--file", "texts.jsonl", "--too-long", "truncate", "--max-length", "12")
    sums = [torch_loss(place[1], [*bytes_of(text), 257][:12], 1) for text in TEXTS]
    total, count = map(sum, zip(*sums, strict=True))
    argv = ("--model", "model", "--dtype", "float32", *options)
    code, out, err = call(monkeypatch, capsys, "evaluate", *argv)
    assert code == 0 and "5 examples are truncated to --max-length 12" in err
    shown = dict(line.split() for line in out.splitlines())
    assert float(shown["loss"]) == pytest.approx(total / count, rel=1e-5) and int(shown["tokens"]) == count


def test_only_responses_count_in_the_loss_of_rows_with_prompts(place, evaluate):
    whole = [chat(prompt, response) for prompt, response, _ in PAIRS]
    sums = [torch_loss(place[1], ids, first + 1) for ids, first in whole]  # every turn's <s> is not learned
    total, count = map(sum, zip(*sums, strict=True))
    metrics = evaluate("--file", "rows.jsonl")
    assert metrics["tokens"] == count and metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_preferences_are_those_of_transformers_log_probabilities(place, evaluate, tmp_path):
    metrics = evaluate("--file", "pairs.jsonl", "--out", str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    wins, means = [], []
    for (prompt, *responses), row in zip(PAIRS, rows, strict=True):
        expected = [torch_loss(place[1], *chat(prompt, response)) for response in responses]
        (chosen, m), (rejected, n) = expected
        assert row["chosen"] == pytest.approx(-chosen, rel=1e-4) and row["chosen_tokens"] == m
        assert row["rejected"] == pytest.approx(-rejected, rel=1e-4) and row["rejected_tokens"] == n
        wins.append(chosen < rejected)
        means.append(chosen / m < rejected / n)
    assert metrics["pairs"] == 4 and metrics["accuracy"] == np.mean(wins)
    assert metrics["accuracy_per_token"] == np.mean(means) and "accuracy_against_base" not in metrics
    for name in ("chosen", "rejected"):
        assert metrics[f"logps/{name}"] == pytest.approx(np.mean([row[name] for row in rows]))
    assert 0 < np.mean(wins) < 1  # the law can fail


def test_preferences_of_published_formats_are_evaluated_as_pairs(place, evaluate):
    rows = [
        {"history": p, "human_ref_A": c, "human_ref_B": r, "score_A": 2, "score_B": 1, "labels": 1}
        for p, c, r in PAIRS
    ]
    write(place[0] / "shp.jsonl", rows)
    assert evaluate("--file", "shp.jsonl") == evaluate("--file", "pairs.jsonl")


def test_accuracy_against_the_base_compares_what_the_responses_gained():
    # gains of chosen and rejected: 1 and 2, 3 and 1, 0 and 0, 5 and 1
    scores = [
        PairScore("a", -4.0, -9.0, 2, 3, (-5.0, -11.0)),
        PairScore("b", -5.0, -2.0, 5, 1, (-8.0, -3.0)),
        PairScore("c", -1.0, -1.0, 1, 1, (-1.0, -1.0)),
        PairScore("d", -8.0, -2.0, 4, 2, (-13.0, -3.0)),
    ]
    metrics = preference_metrics(scores)
    assert metrics["accuracy_against_base"] == (2 + 1 / 2) / 4
    assert metrics["accuracy"] == (1 + 1 / 2) / 4
    assert metrics["accuracy_per_token"] == (2 + 1 / 2) / 4  # -2 and -3, -1 and -2, equal, -2 and -1


def test_rows_with_one_response_are_in_no_accuracy():
    scores = [
        PairScore("a", -4.0, 0.0, 2, 0, (-5.0, 0.0)),
        PairScore("b", 0.0, -6.0, 0, 3, (0.0, -3.0)),
        PairScore("c", -9.0, 0.0, 3, 0, (-1.0, 0.0)),
    ]
    assert preference_metrics(scores) == {
        "pairs": 0, "logps/chosen": -6.5, "logps_per_token/chosen": -2.5, "responses/chosen": 2,
        "logps/rejected": -6.0, "logps_per_token/rejected": -2.0, "responses/rejected": 1,
    }  # fmt: skip


def test_an_adapter_that_computes_its_base_has_no_accuracy_against_it():
    """Two programs round differently: 1e-6 of a log-prob is a tie."""
    scores = [
        PairScore("a", -40.0, -90.0, 2, 3, (-40.00004, -90.0)),
        PairScore("b", -5.0, -2.0, 5, 1, (-5.0, -2.0)),
    ]
    assert "accuracy_against_base" not in preference_metrics(scores)


def test_completions_are_scored_against_the_answers_of_rows(place, evaluate, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ("--max-new", "8", "--out", str(out))
    first = evaluate("--file", "rows.jsonl", "--by", "exact", "--regex", r"(?s).*", *options)
    assert first["exact"] == 0 and first["matches"] == 1 and first["prompts"] == first["completions"] == 4
    texts = [json.loads(line)["completion"] for line in out.read_text().splitlines()]
    answers = [texts[0], texts[1], "another", texts[3]]
    write(
        tmp_path / "known.jsonl",
        [{"prompt": p, "answer": a} for (p, _, _), a in zip(PAIRS, answers, strict=True)],
    )
    (tmp_path / "mine.py").write_text(
        "def short(prompt, completion, row):\n"
        "    if prompt == 'two?':\n        raise ValueError('not this one')\n"
        "    return len(prompt)\n"
    )
    argv = ("--file", str(tmp_path / "known.jsonl"), "--by", "exact", "--by", f"{tmp_path}/mine.py:short")
    metrics = evaluate(*argv, *options)
    assert metrics["exact"] == 0.75 and metrics["short"] == pytest.approx((4 + 6 + 5) / 3)
    assert metrics["intervals"]["exact"] == pytest.approx(wilson(0.75, 4))
    assert metrics["intervals"]["short"] == pytest.approx(mean_interval([4, 6, 5]))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["scores"]["exact"] for row in rows] == [1, 1, 0, 1] and rows[1]["scores"]["short"] is None


@pytest.mark.slow
def test_several_completions_of_a_prompt_have_pass_at_k_lengths_and_ends(place, evaluate, tmp_path):
    out = tmp_path / "out.jsonl"
    sampled = ("--samples", "3", "--temperature", "1", "--seed", "5", "--pass-at", "1,2", "--max-new", "12")
    regex = "(?s).{0,9}"
    metrics = evaluate("--file", "rows.jsonl", "--regex", regex, *sampled, "--limit", "3", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == metrics["completions"] == 9 and metrics["prompts"] == 3
    passed = np.array([len(row["completion"]) <= 9 for row in rows], float)
    assert [row["scores"]["matches"] for row in rows] == passed.tolist() and 0 < passed.sum() < 9
    assert metrics["matches"] == pytest.approx(passed.mean()) == pytest.approx(metrics["pass@1/matches"])
    assert metrics["pass@2/matches"] == pytest.approx(np.mean(pass_at(passed.reshape(3, 3), (2,))[2]))
    clipped = np.mean([row["finish"] == "length" for row in rows])
    assert metrics["completions/clipped_ratio"] == pytest.approx(clipped)
    assert 1 <= metrics["completions/mean_length"] <= 12 and len({row["completion"] for row in rows}) > 3


def test_pass_at_k_is_the_mean_over_all_subsets_of_k_completions():
    scores = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, np.nan, np.nan], [0.5, 0, 2, 0, np.nan]])
    rates = pass_at(scores, (1, 2, 4, 5))
    for k in (1, 2, 4, 5):
        means = []
        for own in scores:
            known = [x >= 1 for x in own if not np.isnan(x)]
            if len(known) >= k:
                means.append(np.mean([any(part) for part in itertools.combinations(known, k)]))
        assert np.nanmean(rates[k]) == pytest.approx(np.mean(means))
        assert np.isnan(rates[k]).sum() == len(scores) - len(means)
    assert pass_at(scores[2:3], (4,)) == {}


def test_metrics_are_printed_before_the_results_are_written(monkeypatch, capsys, tmp_path):
    script = load("evaluate")
    evaluated = Evaluated({"exact": 0.5}, [{"row": "a"}], [])
    out = tmp_path / "out.jsonl"
    args = SimpleNamespace(out=out, json=True)
    monkeypatch.setattr(script, "arguments", lambda: (args, None, CompletionEvaluation()))
    monkeypatch.setattr(evaluate_models, "evaluate_models", lambda *_: {"": evaluated})
    assert script.main() == 0 and json.loads(out.read_text()) == {"row": "a"}
    capsys.readouterr()
    args.out = tmp_path / "gone" / "out.jsonl"  # removed during the evaluation
    with pytest.raises(FileNotFoundError):
        script.main()
    assert json.loads(capsys.readouterr().out) == {"exact": 0.5}


def test_a_completion_is_scored_as_the_model_wrote_it(monkeypatch):
    tokenizer = tiny_llama.tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "clean_up_tokenization_spaces", True)
    of_bpe = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    monkeypatch.setattr(tokenizer, of_bpe, True)
    text = '{"a" : "is n\'t it , now ?"}'
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) != text and decode_completion(tokenizer, [*ids, 257]) == text


SAD = [
    ("--file texts.jsonl", "nothing to evaluate"),
    ("--model model", "no rows; use --file"),
    ("--run r --model model", "--run sets model"),
    ("--run missing", "missing"),
    ("--model model --file missing.jsonl", "missing.jsonl"),
    (
        "--model model --file texts.jsonl --samples 2",
        "--samples applies only to scores of completions; remove it, or use --by",
    ),
    (
        "--model model --file texts.jsonl --seed 0",
        "completions and --tasks; remove it, or use --by or --regex or --tasks",
    ),
    (
        "--model model --file rows.jsonl --by exact --packing",
        "--packing applies only to loss and preference evaluation; remove it, or omit --by",
    ),
    ("--model model --file rows.jsonl --by exakt", "near: exact"),
    ("--model model --file rows.jsonl --by missing.py:f", "missing.py"),
    ("--model model --file rows.jsonl --regex (", "--regex: '(' is not a valid regular expression"),
    ("--model model --file rows.jsonl --by exact --samples 4", "would be equal at temperature 0"),
    ("--model model --file rows.jsonl --by exact --pass-at 2", "needs --samples of at least 2"),
    ("--model model --file rows.jsonl --by exact --pass-at x", "expected numbers"),
    ("--model model --file rows.jsonl --by exact --max-new 300", "rows.jsonl:1: 6 tokens plus max_new=300"),
    ("--model model --file texts.jsonl --by exact", "texts.jsonl:1: the columns text include no prompt"),
    ("--model model --file texts.jsonl --max-length 999", "exceeds the model's 256 positions"),
    ("--model model --file texts.jsonl --max-length 20", "texts.jsonl:3"),
    ("--model model --file texts.jsonl --out out.jsonl", "--out writes results of pairs, decisions"),
    ("--model model --file pairs.jsonl --packing", "are for SFT rows"),
    ("--model model --file noanswer.jsonl --by exact --max-new 8", "no completion has a score"),
    ("--model model --file rows.jsonl --by exact --out none/x.jsonl", "there is no folder none; name a file"),
    ("--model model --file rows.jsonl --by exact --out model", "--out model: is a folder; name a file"),
    ("--model model --file texts.jsonl --batch 0", "--batch: expected at least 1"),
]


@pytest.mark.parametrize(("argv", "text"), SAD, ids=[argv for argv, _ in SAD])
def test_what_cannot_be_evaluated_is_one_line(place, tmp_path, monkeypatch, capsys, argv, text):
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(place[0])
    write(place[0] / "noanswer.jsonl", [{"prompt": "one?"}])
    code, out, err = call(monkeypatch, capsys, "evaluate", *argv.split())
    assert code in (1, 2) and not out
    *_, line = err.splitlines()
    assert line.startswith("error: ") and text in line, err
