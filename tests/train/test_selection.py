"""Which metric selects the best checkpoint, and when a run has stalled."""

from types import SimpleNamespace

import pytest

from jaxft.distributed.processes import AgreedError
from jaxft.train.evaluate import is_stalled, selection_score
from jaxft.train.settings import Loop
from jaxft.train.verdict import check_selection

METRICS = {"eval_loss": 2.0, "eval_reward": 3.0, "eval_rewards/accuracies": 0.75, "eval_kl": 0.5}


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        (Loop(), 2.0),
        (Loop(best_metric="eval_rewards/accuracies"), -0.75),
        (Loop(best_metric="eval_kl"), 0.5),
        (Loop(best_metric="eval_kl", greater_is_better=True), -0.5),
        (Loop(best_metric="eval_rewards/accuracies", greater_is_better=False), 0.75),
        (Loop(best_metric="eval_entropy"), None),
    ],
)
def test_the_better_checkpoint_has_the_lower_score(loop, expected):
    assert selection_score(METRICS, loop) == expected


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
        ({"greater_is_better": True}, "set that too"),
        ({"best_metric": "eval_scores/exact", "eval_every": 5}, "set loop.eval_scores=true"),
    ],
)
def test_settings_that_select_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Loop(**settings)


@pytest.mark.parametrize(
    ("loop", "metrics", "message"),
    [
        (Loop(best_metric="eval_los"), METRICS, "no metric of the evaluations; near: eval_loss"),
        (Loop(best_metric="general_loss"), {"general_loss": 1.0}, "no metric of the evaluations; near: none"),
        (Loop(patience=1, eval_every=1), {"general_loss": 1.0}, "loop.patience=1 needs held-out rows"),
    ],
)
def test_a_run_without_the_metric_ends_before_training(loop, metrics, message):
    job = SimpleNamespace(members=[SimpleNamespace(run=SimpleNamespace(loop=loop))])
    with pytest.raises(AgreedError, match=message):
        check_selection(job, [{"metrics": metrics}])
