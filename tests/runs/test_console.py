"""Lines of the terminal: rollouts, the table of a sweep, progress inside a run."""

import io

import pytest
from rich.console import Console

from jaxft.runs import console
from jaxft.runs.console import ConsoleView
from jaxft.runs.run_texts import FIRST_ROW

SPEED = {"seconds": 0.5, "tokens_per_second": 1234.5}
ROLLOUT = {
    "clip_ratio/low_mean": 0.0,
    "clip_ratio/high_mean": 0.0,
    "clip_ratio/region_mean": 0.0,
    "loss": 0.0,
    "grad_norm": 0.0,
    "completions/clipped_ratio": 0.25,
    "completions/mean_length": 6.5,
    "frac_reward_zero_std": 1.0,
    "learning_rate": 5e-4,
    "reward": 0.5,
    "reward_std": 0.0,
}


def plain(total=16):
    out = io.StringIO()
    return ConsoleView("mine", total, console=Console(file=out, width=200)), out


def test_a_line_of_a_rollout_has_reward_spread_length_and_truncation_and_says_when_nothing_is_learned():
    view, out = plain()
    view.log(1, ROLLOUT, SPEED)
    view.log(2, {**ROLLOUT, "clip_ratio/low_mean": 0.1, "grad_norm": 2.0, "frac_reward_zero_std": 0.5}, SPEED)
    first, second = out.getvalue().splitlines()
    shown = (
        "loss 0  reward 0.5  reward std 0  length 6.5  truncated 25%  equal groups 100%  lr 5.00e-04  grad 0"
    )
    assert first.startswith(f"step 1/16  {shown}  1,234 tok/s") and "clip" not in first
    assert first.endswith("(nothing learned: the rewards of every group are equal)")
    assert "equal groups 50%  lr 5.00e-04  grad 2  clip_ratio/low_mean 0.1" in second
    assert "nothing learned" not in second


def test_the_time_left_is_known_after_the_first_step():
    view, out = plain(total=5)
    view.log(1, {"loss": 1.0}, {"seconds": 30.0, "tokens_per_second": 100.0})
    assert "eta 2:00" in out.getvalue()


def test_a_sweep_is_a_table_with_a_column_for_each_member():
    view, out = plain()
    view.tabulate(["lr=2e-4", "lr=1e-3,beta=0.125"])
    view.log(4, {"loss 1": 2.0375, "loss 2": 1.9}, SPEED)
    view.log(4, {"eval_loss 1": 2.5}, {"evaluation_seconds": 65.0})
    head, step, held_out = out.getvalue().splitlines()
    assert head.split() == ["step", "lr=2e-4", "lr=1e-3,beta=…"]
    assert step.split()[:4] == ["4/16", "loss", "2.038", "1.9"] and "1,234 tok/s" in step
    assert held_out.split()[:4] == ["4/16", "eval", "loss", "2.5"] and "evaluated in 1 min 05 s" in held_out
    assert step.index("2.038") + 5 == head.index("lr=2e-4") + len("lr=2e-4") == held_out.index("2.5") + 3
    assert step.index("1.9") + 3 == head.index("lr=1e-3") + len("lr=1e-3,beta=…")


def test_a_long_phase_has_few_lines_and_a_short_one_none(monkeypatch):
    view, out = plain()
    seconds = iter([0, 2, 4, 13.9, 14.1, 20, 21, 22])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(seconds))
    for text in ("1 of 5", "2 of 5", "3 of 5", "4 of 5", "5 of 5", "", "1 of 2", "2 of 2"):
        view.progress(text)
    assert out.getvalue().split("\n") == ["3 of 5", "5 of 5", ""]


@pytest.mark.parametrize("labels", [(), ("a", "b")])
def test_the_live_view_shows_the_progress_of_a_phase_and_a_table_for_a_sweep(labels):
    screen = Console(
        file=io.StringIO(), force_terminal=True, width=90, record=True, _environ={"TERM": "xterm"}
    )
    view = ConsoleView("mine", 8, console=screen)
    if labels:
        view.tabulate(labels)
    view.log(3, {"loss 1": 2.5, "loss 2": 3.5} if labels else {"loss": 2.5}, SPEED)
    view.progress("rows evaluated: 3 of 9")
    view.close()
    last = screen.export_text().rpartition("mine")[2]
    assert "rows evaluated: 3 of 9" in last and "2.5" in last
    assert ("3.5" in last) == bool(labels)


def test_rows_keep_their_urls_and_other_messages_lose_what_may_be_secret():
    view, out = plain()
    url = "https://host/models?other=a2po,trl"
    view.message(f"{FIRST_ROW}\nsee {url}")
    view.message(f"\nprompt:   {url}\nbefore:   {url}")
    view.message(f"cannot read {url}")
    text = out.getvalue()
    assert text.count(url) == 3 and "cannot read https://host/models?***" in text
