"""The estimate of flipped labels: over the first epoch, unchanged by a restart, close to the truth."""

import json
import random
import re

import numpy as np
import pytest
from meters import five_tokens, make_meter
from test_metrics import counts, first_sight
from tiny_run import ROOT, Place, write_rows

from jaxft.objectives.metrics import LabelNoise, Sum

PER_EPOCH = 10  # of meters.make_meter's source


def feed(m, step, margin, bad=False):
    one = np.float64(1)
    noise = LabelNoise(counts(margin))
    found = {
        "loss": Sum(one, one), "learning_rate": Sum(one, one), "label_noise": noise,
        "skipped": Sum(np.float64(bad), one),
    }  # fmt: skip
    m.add(step, five_tokens(), found)


def test_training_steps_log_the_estimate_of_the_first_epoch_so_far():
    epoch = np.split(first_sight(3, 160, wrong=0.2), PER_EPOCH)
    m, reported = make_meter(5), []
    for step, margin in enumerate(
        [*epoch, *(-x for x in epoch)]
    ):  # in the second epoch the model knows the pairs
        feed(m, step, margin)
        reported.append(m.read()[0].get("label_noise"))
    assert reported[0] is None and reported[2] is not None
    for step in range(3, PER_EPOCH):
        assert reported[step] == LabelNoise(counts(np.concatenate(epoch[: step + 1]))).value()
    assert set(reported[PER_EPOCH:]) == {reported[PER_EPOCH - 1]}


def test_the_estimate_survives_a_restart_and_excludes_non_finite_steps():
    epoch = np.split(first_sight(4, 160, wrong=0.2), PER_EPOCH)
    whole, first = make_meter(5), make_meter(5)
    for step, margin in enumerate(epoch):
        feed(whole, step, margin, bad=step == 2)
    for step, margin in enumerate(epoch[:6]):
        feed(first, step, margin, bad=step == 2)
    second = make_meter(5, json.loads(json.dumps(first.counters(), allow_nan=False)))
    for step, margin in enumerate(epoch[6:], 6):
        feed(second, step, margin)
    found = second.read()[0]["label_noise"]
    assert found == whole.read()[0]["label_noise"]
    assert found == LabelNoise(counts(np.concatenate(epoch[:2] + epoch[3:]))).value()


def flipped(share, seed):
    """The shipped pairs with so many of their labels turned round."""
    rows = [json.loads(line) for line in (ROOT / "configs" / "data" / "pairs.jsonl").read_text().splitlines()]
    for i in random.Random(seed).sample(range(len(rows)), round(share * len(rows))):
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    return rows


@pytest.mark.slow
def test_the_shipped_recipe_estimates_20_percent_flipped_labels_within_5_points(tmp_path):
    place = Place(tmp_path)
    (tmp_path / "config.py").write_text((ROOT / "configs" / "dpo.py").read_text())
    write_rows(tmp_path / "flipped.jsonl", flipped(0.2, seed=0))
    held_out, general = (
        ROOT / "configs" / "data" / name for name in ("pairs_held_out.jsonl", "general.jsonl")
    )
    argv = [
        "data=flipped.jsonl",
        f"held_out={held_out}",
        f"general={general}",
        "name=flipped",
        "samples=0",
        "lr=1e-4",
    ]
    assert place.run(*argv) == 0, place.err()
    last = [line for line in place.metrics("flipped") if "loss" in line][-1]
    assert last["step"] == 27 and abs(last["label_noise"] - 0.2) <= 0.05
    reported = re.search(r"about (\d+) % look flipped, \+- (\d+)", place.out())
    assert int(reported[1]) == round(100 * last["label_noise"]) and 4 <= int(reported[2]) <= 8
