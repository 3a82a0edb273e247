"""Which metric selects the best checkpoint, and when a run has stalled."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest

from jaxft.distributed.processes import AgreedError
from jaxft.runs.run_texts import Evaluation
from jaxft.train.evaluate.evaluate import is_greater_better, is_stalled, selection_score
from jaxft.train.evaluate.run_evaluations import check_selection, end_if_due, without_accuracies
from jaxft.train.loop import due
from jaxft.train.settings import Loop
from jaxft.train.start.jobs import Job

METRICS = {"eval_loss": 2.0, "eval_reward": 3.0, "eval_rewards/accuracies": 0.75, "eval_kl": 0.5}
METRICS |= {"eval_rewards/rejected": -1.0, "eval_completions/clipped_ratio": 0.25}


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (Loop(), 2.0),
        (Loop(best_metric="eval_rewards/accuracies"), -0.75),
        (Loop(best_metric="eval_kl"), 0.5),
        (Loop(best_metric="eval_kl", greater_is_better=True), -0.5),
        (Loop(best_metric="eval_rewards/accuracies", greater_is_better=False), 0.75),
        (Loop(best_metric="eval_entropy", greater_is_better=False), None),
    ],
)
def test_the_better_checkpoint_has_the_lower_score(loop, expected):
    assert selection_score(METRICS, loop) == expected


@pytest.mark.parametrize(
    ("name", "greater"),
    [
        ("eval_objective/kl", False), ("eval_nll_loss", False), ("eval_reward", True), ("eval_margin", True),
        ("eval_mean_token_accuracy", True), ("eval_scores/exact", True), ("eval_rewards/number/mean", True),
        ("eval_rewards/number/std", None), ("eval_rewards/rejected", None), ("eval_logps/rejected", None),
        ("eval_entropy", None),
    ],
)  # fmt: skip
def test_the_name_of_a_metric_tells_its_direction_or_it_has_to_be_set(name, greater):
    assert is_greater_better(name) is greater


def test_rollouts_are_selected_by_their_reward():
    assert selection_score({"eval_reward": 3.0, "eval_kl": 0.5}, Loop()) == -3.0
    assert selection_score({}, Loop()) is None


def test_a_run_has_stalled_if_the_last_scores_are_no_better_than_one_before():
    assert not is_stalled([3.0, 2.0, 2.5], 2) and is_stalled([3.0, 2.0, 2.5, 2.0], 2)
    assert not is_stalled([3.0, 3.0], 2) and is_stalled([3.0, 3.0, 3.0], 2)
    assert is_stalled([1.0, None], 1) and not is_stalled([None, 1.0], 1) and is_stalled([None, None], 1)
    assert not is_stalled([3.0, 2.0, 2.5, 1.0, 5.0], 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 2}, "loop.patience=2 needs evaluations during training; set loop.eval_every"),
        ({"patience": 0, "eval_every": 1}, "loop.patience=0; expected at least 1"),
        ({"eval_scores": True}, "loop.eval_scores=true needs evaluations"),
        ({"greater_is_better": True}, "set both or neither"),
        ({"best_metric": "eval_scores/exact", "eval_every": 5}, "set loop.eval_scores=true"),
    ],
)
def test_settings_that_select_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Loop(**settings)


@pytest.mark.parametrize(
    ("loop", "metrics", "message"),
    [
        (Loop(best_metric="eval_los"), METRICS, "not a metric of the evaluations; near: eval_loss"),
        (Loop(best_metric="general_loss"), {"general_loss": 1.0}, "not a metric .*; set data.held_out"),
        (Loop(best_metric="eval_rewards/rejected"), METRICS, "set loop.greater_is_better=true or false"),
        (Loop(best_metric="eval_completions/clipped_ratio"), METRICS, "set loop.greater_is_better=true"),
        (Loop(patience=1, eval_every=1), {"general_loss": 1.0}, "loop.patience=1 needs held-out rows"),
    ],
)
def test_a_run_without_the_metric_ends_before_training(loop, metrics, message):
    job = SimpleNamespace(members=[SimpleNamespace(run=SimpleNamespace(loop=loop))])
    with pytest.raises(AgreedError, match=message):
        check_selection(job, [{"metrics": metrics}])


def test_an_accuracy_that_is_absent_at_first_because_all_pairs_are_ties_can_select():
    loop = Loop(best_metric="eval_rewards/accuracies", patience=1, eval_every=1)
    job = SimpleNamespace(members=[SimpleNamespace(run=SimpleNamespace(loop=loop))])
    ties = {"eval_loss": 0.69, "eval_rewards/accuracies_pairs": 20.0}
    check_selection(job, [{"metrics": ties}])
    with pytest.raises(AgreedError, match="near: eval_rewards/accuracies$"):
        check_selection(
            SimpleNamespace(members=[SimpleNamespace(run=SimpleNamespace(loop=Loop(best_metric="eval_x")))]),
            [{"metrics": {"eval_rewards/accuracies_pairs": 20.0}}],
        )


def test_an_evaluation_where_policy_and_reference_are_one_model_has_no_accuracies():
    """Whatever the rounding between their log-probs; the number of pairs stays, and other metrics do."""
    metrics = {"eval_loss": 0.69, "eval_rewards/accuracies": 0.6, "eval_rewards/accuracies_pairs": 20.0}
    end = Evaluation(metrics=metrics, samples=[], scored=0, intervals={}, score_faults=[], nonfinite=0)
    found = without_accuracies(end)["metrics"]
    assert found == {"eval_loss": 0.69, "eval_rewards/accuracies_pairs": 20.0}


def test_the_steps_since_the_last_entry_are_logged_where_patience_ends_a_run():
    loop = Loop(steps=600, log_every=10, eval_every=15, patience=2)
    member = SimpleNamespace(run=SimpleNamespace(loop=loop))
    job = Job(Path("run"), (member,), (), 600, 600, None, (), (), None)
    logs, meters = Mock(), Mock(read=Mock(return_value=("metrics", "perf")))
    assert end_if_due(job, {"scores": [[1.0], [2.0]]}, 30, logs, meters) is job and not logs.mock_calls
    ended = end_if_due(job, {"scores": [[1.0], [2.0], [1.5]]}, 45, logs, meters)
    assert (ended.steps, ended.planned) == (45, 600)
    logged, end, message = logs.mock_calls
    assert [logged, end] == [call.step(45, "metrics", "perf"), call.ends_at(45)]
    assert message.args[0].startswith("ended after step 45 of 600: 2 evaluations without a better")


def test_an_interval_below_1_is_a_fraction_of_the_run():
    def evaluations(every, steps):
        job = SimpleNamespace(steps=steps, rollout_steps=1)
        return [done for done in range(1, steps + 1) if due(every, done, job)]

    assert evaluations(0.25, 8) == evaluations(2, 8) == [2, 4, 6, 8]
    assert evaluations(0.001, 3) == [1, 2, 3] and evaluations(None, 3) == []
    with pytest.raises(ValueError, match=r"loop.eval_every=1.5; expected whole steps, or a fraction"):
        Loop(eval_every=1.5)
    with pytest.raises(ValueError, match=r"loop.save_every=0; expected above 0"):
        Loop(save_every=0)
