"""Times of a run's phases, and how many held-out rows its evaluations read."""

import re
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from prepared import prepare
from scripts_in_process import call
from tiny_run import write_place

import jaxft
from jaxft.data.progress import clock_time, time_in_words
from jaxft.data.source import spread
from jaxft.runs.run_texts import Evaluation, before_and_after
from jaxft.train import loop
from jaxft.train.evaluate.evaluate import evaluation_limit
from jaxft.train.evaluate.run_evaluations import continued
from jaxft.train.logs import clock as clock_module
from jaxft.train.logs.clock import Clock, time_line
from jaxft.train.logs.logs import eval_limit_lines, first_evaluation_lines, with_part
from jaxft.train.settings import Loop
from jaxft.train.start import open_settings


def clock(*times):
    return Clock(iter(times).__next__)


def test_an_inner_phase_is_not_counted_in_the_outer_one_and_earlier_starts_are_added():
    own = clock(0, 2, 3, 7, 10)
    shown = []
    own.resume({"training": 100.0, "evaluation": 1.0}, shown.append)
    assert own.at("training") == "2.0 s"  # rows
    with own.within("evaluation"):  # from 3 to 7
        assert [*own.over("rows", "ab")] == ["a", "b"]
    assert own.seconds() == {"training": 104.0, "evaluation": 5.0, "rows": 2, "total": 111.0}
    assert own.recent() == {"evaluation_seconds": 4} and own.recent() == {}
    assert shown == ["", "rows: 1 of 2", "rows: 2 of 2", ""]


def test_the_longer_parts_of_a_phase_are_shown_as_they_begin_and_with_its_time():
    own = clock(0, 1, 1, 4, 4, 4.5, 6)
    shown = []
    own.resume({}, shown.append)
    own.at("compiling")
    for name in ("train step", "samples"):  # from 1 to 4, and from 4 to 4.5
        with own.part(name):
            pass
    assert own.at("training") == "5.0 s (train step 3.0 s)"
    assert shown == ["", "compiling: train step", "compiling: samples", ""]


def test_a_part_that_takes_long_is_shown_again_and_of_steps_the_first_alone(monkeypatch):
    """With what was shown last, such as how many items are done."""
    monkeypatch.setattr(clock_module, "BEAT", 0.001)
    own, shown = Clock(), list[str]()
    own.resume({}, shown.append)

    def wait_for(text):
        while not re.fullmatch(text, shown[-1]):
            time.sleep(0.001)

    for expected in (True, False):
        with own.first("first step") as is_first:
            assert is_first is expected
            if is_first:
                wait_for(r"rows: first step, 0.\d s so far")
                own.counter("items", 9)(2)
                wait_for(r"items: 2 of 9, 0.\d s so far")
        assert shown[-1] == ""


def test_the_clock_of_a_run_begins_before_its_rows_are_measured(monkeypatch, capsys, tmp_path):
    seen: list[dict[str, float]] = []

    def run(*_, clock):
        return seen.append(clock.seconds()) or 0

    def fitted(settings, **_):
        time.sleep(0.02)
        return settings, []

    monkeypatch.setattr(open_settings, "fitted", fitted)
    monkeypatch.setattr(loop, "run", run)
    assert call(monkeypatch, capsys, "train", "sft")[0] == 0
    jaxft.train("sft", root=str(tmp_path))
    assert len(seen) == 2 and all(0.02 <= seconds["rows"] == seconds["total"] for seconds in seen)


def test_the_last_line_has_time_tokens_and_hardware():
    seconds = {"rows": 0.4, "loading": 3.26, "training": 200.0, "total": 203.66}
    line = time_line({"seconds": seconds, "tokens": 91000, "hardware": "8 x H100"})
    assert line == "took 3 min 24 s (loading 3.3 s, training 3 min 20 s) for 91,000 tokens on 8 x H100"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (3700, "1 h 01 min"),
        (259_100, "71 h 58 min"),
        (345_600, "4.0 days"),
    ],
)
def test_durations(seconds, text):
    assert time_in_words(seconds) == text


def test_times_of_a_clock():
    assert [clock_time(x) for x in (6.6, 187, 3599.7, 3700)] == ["0:07", "3:07", "1:00:00", "1:01:40"]


@dataclass
class Shape:
    shape: tuple

    @property
    def size(self):
        return self.shape[0] * self.shape[1] * self.shape[2]


def limits(steps, loop=None, held_out=0.05, batches=100, texts=0, **info):
    """The limits of a run whose training batches are [2, 4, 64] and all others [1, 4, 64]."""
    batch = SimpleNamespace(ids=Shape((1, 4, 64)))
    stats = SimpleNamespace(held_out=4 * batches)
    source = SimpleNamespace(
        info=SimpleNamespace(stats=stats, **{"samples": False, "eval_cost": 1 / 3, **info}),
        held_out=(batch,) * batches,
        shapes=(SimpleNamespace(ids=Shape((2, 4, 64))),),
    )
    data = SimpleNamespace(held_out=held_out, units_per_step=8)
    text = (
        SimpleNamespace(info=SimpleNamespace(eval_cost=1 / 3), held_out=(batch,) * texts) if texts else None
    )
    return evaluation_limit(SimpleNamespace(loop=loop or Loop(), data=data), source, text, steps)


def limit(steps, loop=None, **options):
    return limits(steps, loop, **options).rows


def test_evaluations_of_a_short_run_compute_at_most_a_fifth_of_what_training_does():
    assert limit(10) == 6  # 2 x 6 batches of a third of the work of 12 half steps: 2 of 10 steps
    assert limit(10, Loop(eval_every=3)) == limit(10, Loop(eval_every=0.3)) == 2  # five of them
    assert limit(10, Loop(eval_fraction=0.4)) == 12
    assert limit(1) == 1  # never nothing
    assert limit(1000) is limit(10, Loop(eval_fraction=None)) is limit(10, held_out="file.jsonl") is None
    assert limit(10, samples=True, eval_cost=0.5) == 16  # prompts: 2 x 16 x 0.5 of the 80 trained on
    assert limit(10, Loop(), batches=6) is None
    assert limits(10, texts=20) == (3, 3)  # a tenth each
    assert limits(10, texts=2, batches=2) == (None, None)
    assert limits(10, texts=20, held_out="file.jsonl") == (None, None)


def test_the_rows_that_are_read_are_spread_over_all():
    assert spread(10, None) == spread(10, 12) == [*range(10)]
    assert spread(10, 4) == [0, 2, 5, 7] and len({*spread(97, 31)}) == 31


def test_a_short_run_says_which_part_of_the_held_out_rows_it_reads_and_goes_on_with_the_same(tmp_path):
    write_place(tmp_path)
    job = prepare(tmp_path, "steps=3", "data.held_out=0.5", "loop.eval_fraction=0.2")
    batches = job.sources[0].held_out
    assert (
        job.limit == (1, None) and len(batches) > 1 and [one is batches[0] for one in job.held_out] == [True]
    )
    (line,) = eval_limit_lines(job)
    assert line.startswith(
        f"evaluations read 1 of {len(batches)} batches of held-out rows and compute at most 20 %"
    )
    assert eval_limit_lines(continued(job, {}, 1)) == []
    (line,) = first_evaluation_lines(job)
    begin = "evaluating before the first step (held_out=none samples=0 leaves this out); "
    assert line == f"{begin}batches of held-out rows: 1, completions of held-out prompts: 2"
    job = prepare(tmp_path, "steps=3", "data.held_out=none", "samples=0")
    assert first_evaluation_lines(job) == []
    longer = prepare(tmp_path, "steps=9", "data.held_out=0.5", "loop.eval_fraction=0.2")
    assert longer.limit.rows == 2 and len(continued(longer, {"evaluation_limit": [1, None]}, 3).held_out) == 1


def test_a_run_that_read_a_part_of_its_held_out_rows_says_so_at_its_end_and_names_these(tmp_path):
    write_place(tmp_path)
    job = prepare(tmp_path, "steps=9", "data.held_out=0.5", "loop.eval_fraction=0.2")
    source, whole = job.sources[0], job.sources[0].limit_evaluation(None)
    _, rows, length = source.held_out[0].ids.shape
    at = rows * (length + 1) + 1  # the first example of the second batch that is evaluated
    second = spread(len(source.held_out), job.limit.rows)[1]
    assert second > 1 and source.held_out_name(at) == whole.held_out_name(second * rows * (length + 1) + 1)
    end = Evaluation(
        metrics={"eval_loss": 2.5}, samples=[], scored=0, intervals={}, score_faults=[], nonfinite=0
    )
    values = {i: {"loss": float(x), "weight": 1 / 3} for i, x in enumerate((1, 2, 3))}
    total = job.info.stats.held_out
    found = with_part(job, end, values)
    line = before_and_after(end, found)[1]
    assert line.startswith(f"loss on 3 of {total} held-out rows") and line.endswith("2.5000")
    # mean 2, standard deviation 1, t = 4.303 of two degrees of freedom: 2 -+ 4.303 / sqrt(3)
    assert (
        f"are of 3 of {total} held-out rows, 95 % interval of the loss [-0.484, 4.484];" in found["part_note"]
    )
    assert with_part(continued(job, {}, 1), end, values) is end
