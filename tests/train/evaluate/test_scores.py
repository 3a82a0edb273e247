"""Scores of held-out completions: means, prompts that are scored, faults, and batches of completions."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts_in_process import call
from tiny_model import CONFIG, tiny
from tiny_run import Place, rows, write_place

from jaxft.data.source import Prompt
from jaxft.engine.sampling import Sampling
from jaxft.engine.state import Decoding
from jaxft.objectives.intervals import mean_interval
from jaxft.train.evaluate import scored_completions
from jaxft.train.evaluate.scored_completions import (
    PromptText,
    check_scoring,
    held_out_prompts,
    make_scorer,
    position_lines,
)
from jaxft.train.settings import Run, Scoring

TEXTS = [PromptText(f"question {i}", f"reference {i}") for i in range(4)]


def completed(prompt, completion, reference, finish):
    return {"prompt": prompt, "completion": completion, "reference": reference, "finish": finish}


COMPLETIONS = [completed(t.prompt, t.reference, t.reference, "stop") for t in TEXTS[:3]]
COMPLETIONS += [completed("question 3", "something", "reference 3", "length")]


def same(prompt, completion, row):
    return float(completion == row["answer"])


def last_digit(prompt, completion, row):
    return int(completion[-1])


def test_scores_are_means_over_the_scored_prompts_and_samples_are_the_first():
    found, _ = make_scorer(Scoring((same, last_digit), prompts=3), 1, TEXTS)(COMPLETIONS)
    assert found["metrics"] == {"eval_scores/same": 1.0, "eval_scores/last_digit": 1.0}
    assert found["scored"] == 3
    assert [sample["prompt"] for sample in found["samples"]] == ["question 0"] and found["score_faults"] == []
    found, _ = make_scorer(Scoring((same,)), 4, TEXTS)(COMPLETIONS)
    assert found["metrics"] == {"eval_scores/same": 0.75} and found["scored"] == 4
    assert found["samples"][3]["completion"] == "something [...]"  # the score is of the text without the mark


def test_several_completions_of_a_prompt_have_a_mean_and_pass_at_k():
    right = [[True, False], [False, False], [True, True]]
    completions = [
        completed(text.prompt, text.reference if is_right else "other", text.reference, "stop")
        for text, own in zip(TEXTS, right, strict=False)
        for is_right in own
    ]
    completions[3] = {**completions[3], "finish": "nonfinite"}
    scoring = Scoring((same,), samples=2, pass_at=(1, 2), regex="reference [02]")
    found, _ = make_scorer(scoring, 2, TEXTS[:3])(completions)
    of_same = {"same": 0.5, "pass@1/same": 0.5, "pass@2/same": 2 / 3}
    of_regex = {"matches": 0.5, "pass@1/matches": 0.5, "pass@2/matches": 2 / 3}
    expected = {f"eval_scores/{k}": v for k, v in {**of_same, **of_regex}.items()}
    assert found["metrics"] == pytest.approx(expected)
    assert found["scored"] == 3 and found["nonfinite"] == 1
    assert [(one["prompt"], one["completion"]) for one in found["samples"]] == [
        ("question 0", "reference 0"),
        ("question 1", "other"),
    ]


def test_a_completion_without_a_score_is_reported_and_in_no_mean():
    found, _ = make_scorer(Scoring((last_digit,)), 0, TEXTS)(COMPLETIONS)
    assert found["metrics"] == {"eval_scores/last_digit": 1.0}  # of 0, 1 and 2
    (fault,) = found["score_faults"]
    assert fault.startswith("1 of 4 completions of held-out prompts have no score: reward last_digit raised")
    assert "held-out prompt 4" in fault


def test_a_function_that_does_not_fit_the_rows_is_refused_before_training():
    with pytest.raises(ValueError, match=r"last_digit raised .*held-out prompt 1.*row's own response.*rows"):
        make_scorer(Scoring((last_digit,)), 0, [PromptText("question", "no digit")])


def test_without_functions_only_the_samples_are_completed():
    run = SimpleNamespace(samples=2, scoring=Scoring())
    source = SimpleNamespace(prompts=lambda count: list(range(min(count, 9))))
    assert held_out_prompts(run, source) == [0, 1]
    found, _ = make_scorer(Scoring(), 2, TEXTS)(COMPLETIONS)
    assert found["scored"] == 0 and found["metrics"] == {}
    for prompts, expected in ((None, 9), (5, 5), (1, 2)):
        run = SimpleNamespace(samples=2, scoring=Scoring((same,), prompts))
        assert len(held_out_prompts(run, source)) == expected


def test_completions_beyond_the_positions_of_the_model_are_announced():
    model = SimpleNamespace(config=SimpleNamespace(max_positions=32))
    source = SimpleNamespace(prompts=lambda count: [Prompt([1] * size, []) for size in (3, 17)][:count])
    longest = "a held-out prompt of 17 tokens plus"
    for count, new, expected in ((2, 15, []), (1, 16, []), (2, 16, [longest]), (0, 99, [])):
        run = SimpleNamespace(samples=count, scoring=Scoring(), model=model, sampling=Sampling(new))
        lines = position_lines(run, source)
        assert [line.removeprefix("warning: ")[: len(expected[0])] for line in lines] == expected
        assert all("sampling.max_new=16 exceeds the model's 32 positions" in line for line in lines)


@pytest.mark.parametrize(
    "prompts, rollouts, message",
    [
        ([], False, "there are none. Hold out rows with prompts and responses .held_out=.*scoring.by="),
        ([Prompt([1], [])], True, "there are none; the rewards of rollouts are evaluated anyway"),
    ],
)
def test_rows_without_responses_cannot_be_scored(prompts, rollouts, message):
    source = SimpleNamespace(prompts=lambda count: prompts, info=SimpleNamespace(samples=rollouts))
    with pytest.raises(ValueError, match=message):
        check_scoring(SimpleNamespace(scoring=Scoring((same,))), source)
    check_scoring(SimpleNamespace(scoring=Scoring()), source)


def test_settings_of_scoring_are_checked():
    with pytest.raises(ValueError, match="scoring.prompts=0; expected at least 1, or none"):
        Scoring(prompts=0)
    with pytest.raises(ValueError, match="scoring.regex: '.' is not a valid regular expression"):
        Scoring(regex="(")
    with pytest.raises(ValueError, match="scoring.samples=0; expected at least 1"):
        Scoring(samples=0)
    for wrong in ((3,), (1, 0)):
        with pytest.raises(ValueError, match="scoring.pass_at=.*from 1 to scoring.samples=2"):
            Scoring(samples=2, pass_at=wrong)
    with pytest.raises(
        ValueError, match="2 completions of a prompt would be equal at sampling.temperature=0"
    ):
        Run("twice", "", SimpleNamespace(generates=True), None, None, scoring=Scoring((same,), samples=2))
    with pytest.raises(ValueError, match="scalar head and generates no text.*1 in scoring.by"):
        Run("reward", "", SimpleNamespace(generates=False), None, None, samples=0, scoring=Scoring((same,)))


def test_completions_in_batches_are_those_of_one_batch(monkeypatch):
    model, params = tiny(jnp.float32)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(rng.integers(1, CONFIG.vocab, size).tolist(), [1, 2, 7]) for size in (3, 70, 5, 9, 4)
    ]  # the second one is longer than a bucket
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(map(str, ids)))
    decoding = Decoding(model, Sampling(max_new=4), (7,))
    shapes = jax.eval_shape(lambda: params)
    whole = scored_completions.compile_sampler(decoding, prompts, tokenizer, shapes)(params)
    monkeypatch.setattr(scored_completions, "COMPLETIONS_AT_ONCE", 2)
    assert scored_completions.compile_sampler(decoding, prompts, tokenizer, shapes)(params) == whole
    assert [one["prompt"] for one in whole] == [" ".join(map(str, p.ids)) for p in prompts]
    sampled = Sampling(max_new=4, temperature=1.0)
    twice = scored_completions.compile_sampler(Decoding(model, sampled, (7,), 2), prompts, tokenizer, shapes)(
        params
    )
    one, two = twice[::2], twice[1::2]
    assert one != two
    assert [x["prompt"] for x in one] == [x["prompt"] for x in two] == [x["prompt"] for x in whole]
    assert len({one["completion"] for one in whole}) > 1
    first = int(whole[0]["completion"].split()[0])  # as if the chat template ended turns with it
    ended = scored_completions.compile_sampler(
        Decoding(model, Sampling(max_new=4), (first,)), prompts, tokenizer, shapes
    )
    assert [*ended(params)[0].values()][1:] == ["", "1 2 7", "stop"]
    assert {one["reference"] for one in whole} == {"1 2"}  # a row's response ends with the stop token, too


def test_a_run_logs_scores_in_its_files_and_last_lines_and_evaluate_has_the_same(
    tmp_path, monkeypatch, capsys
):
    write_place(tmp_path)
    place = Place(tmp_path)
    (tmp_path / "scores.py").write_text(
        "def size(prompt, completion, row):\n    return len(row['answer'])\n"
        "def odd(prompt, completion, row):\n    return 1.0 if completion == row['answer'] else None\n"
    )
    argv = ["name=scored", "steps=1", "samples=4", "scoring.by=scores.py:size,scores.py:odd"]
    argv += ["scoring.samples=2", "scoring.pass_at=2", "sampling.temperature=1", "data.held_out=more.jsonl"]
    assert place.run(*argv) == 0, place.err()
    summary = json.loads((place.runs("scored") / "summary.json").read_text())
    lengths = [len(row["completion"]) for row in rows(12)]
    assert len(summary["after"]["samples"]) == 4 and summary["after"]["scored"] == 12
    expected = sum(lengths) / 12
    evaluated = [line["eval_scores/size"] for line in place.metrics("scored") if "eval_scores/size" in line]
    assert evaluated == [expected, expected]  # before the first and after the last step
    shown = f"{expected:.4f} {mean_interval(lengths).text()} of 12 prompts"
    row = f"size of the completions of 12 held-out prompts         {shown}  {shown}"
    assert summary["after"]["metrics"]["eval_scores/pass@2/size"] == 1
    lines = (place.runs("scored") / "held_out.jsonl").read_text().splitlines()
    sizes = {row["row"]: row["scores/size"] for row in map(json.loads, lines) if "scores/size" in row}
    assert sorted(sizes.values()) == sorted(lengths) and all(name.startswith("prompt ") for name in sizes)
    fault = "24 of 24 completions of held-out prompts have no score: reward odd returned NoneType None"
    assert row in place.out() and fault in place.out()
    card = (place.runs("scored") / "README.md").read_text()
    assert f"| eval_scores/size | {shown} | {shown} |" in card and f"- {fault}" in card
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    last = [line for line in place.metrics("scored") if "eval_loss" in line][-1]
    code, out, err = call(monkeypatch, capsys, "evaluate", "--run", "runs/scored", "--json")
    found = json.loads(out)
    assert code == 0 and found["loss"] == pytest.approx(last["eval_loss"], rel=1e-6), err
    assert found["mean_token_accuracy"] == pytest.approx(last["eval_mean_token_accuracy"])
    options = ("--by", "scores.py:size", "--max-new", "4", "--limit", "3", "--json")
    code, out, err = call(monkeypatch, capsys, "evaluate", "--run", "runs/scored", *options)
    first = sum(len(row["completion"]) for row in rows(12)[:-4:-1]) / 3  # the file has them in reverse order
    assert code == 0 and json.loads(out)["size"] == pytest.approx(first), err


def test_a_completion_whose_logits_are_not_finite_is_counted_though_it_is_not_shown():
    broken = [*COMPLETIONS[:3], completed("question 3", "", "reference 3", "nonfinite")]
    found, _ = make_scorer(Scoring((same,)), 1, TEXTS)(broken)
    assert found["nonfinite"] == 1 and len(found["samples"]) == 1
