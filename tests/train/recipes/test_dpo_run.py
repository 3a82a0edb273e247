"""Runs on preference pairs: the reference cache, held-out metrics, meshes, custom losses, errors."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from dpo_place import write_pair_place
from prepared import load_and_compile, working_directory
from scripts_in_process import call
from tiny_llama import tiny_torch, write_folder
from tiny_run import COUNT_COMPILES, Place

F = "jaxft.objectives.losses.reference_free_losses"
P = "jaxft.objectives.losses.preference_losses"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pair_place(folder)
    return Place(folder)


def run(place, *argv, code=0, **options):
    assert place.run(*argv, JAXFT_CACHE=str(place.folder / "cache"), **options) == code, place.err()
    return place.out()


def steps_of(place, name):
    return [line for line in place.metrics(name) if "loss" in line]


KINDS = {
    "full": ["full=true", "reference=precomputed", "lr=0.001"],
    "moving": ["reference=moving"],
    "bco": [f"loss={F}:bco", "third=mismatched", "micro=2"],
}


@pytest.mark.slow
def test_cached_reference_log_probs_serve_all_runs_of_the_same_model_and_no_other(place):
    argv, message = (
        ["full=true", "reference=precomputed", "steps=1"],
        "reference log-probs: {} of 24 pairs are cached, {} to compute",
    )
    shutil.rmtree(place.folder / "cache", ignore_errors=True)
    assert message.format(0, 24) in run(place, *argv, "name=first")
    assert message.format(24, 0) in run(
        place, "reference=precomputed", "steps=1", "name=second", "micro=2", "seed=3"
    )
    changed = shutil.copytree(place.folder / "base", place.folder / "changed") / "model.safetensors"
    data = changed.read_bytes()
    changed.write_bytes(data[:-4] + bytes(4))
    assert message.format(0, 24) in run(place, *argv, "model=changed", "name=other-model")
    run(place, "steps=1", "name=sft")
    other = (
        shutil.copytree(place.runs("sft") / "adapter", place.folder / "other-adapter")
        / "adapter_model.safetensors"
    )
    data = other.read_bytes()
    other.write_bytes(data[:-4] + bytes(4))
    for start in ("runs/sft", "other-adapter"):
        name = f"after-{Path(start).name}"
        assert message.format(0, 24) in run(
            place, "reference=precomputed", "steps=1", f"start={start}", f"name={name}"
        )
        first = steps_of(place, name)[0]
        assert first["loss"] == pytest.approx(0.6931472, rel=1e-5) and abs(first["rewards/margins"]) < 1e-4


@pytest.mark.slow
def test_a_run_with_a_second_model_resumes_bit_for_bit_and_only_with_the_same_one(place):
    base = place.folder / "base"
    write_folder(place.folder / "large", tiny_torch(3, hidden_size=128))
    argv = ["teacher=large", "teacher_quant=nf4", "steps=3"]
    assert "second model, frozen: large, " in run(place, *argv, "name=whole")
    place.run_with_a_kill(*argv, name="killed")
    whole, killed = (place.results(name, 3) for name in ("whole", "killed"))
    assert whole == killed
    sizes = [path.stat().st_size for path in (place.runs("whole") / "checkpoints" / "3").rglob("*")]
    assert sum(sizes) < (base / "model.safetensors").stat().st_size  # it has no frozen weights
    run(place, "teacher=runs/whole", "steps=4", "name=killed", code=1)
    assert "teacher" in place.err() and place.err().count("\n") == 1


@pytest.mark.parametrize("loss", (f"{P}:dpo", f"{F}:kto"))
@pytest.mark.slow
def test_held_out_metrics_are_the_same_for_any_batch_size_and_mesh(place, loss):
    argv, found = [f"loss={loss}", "third=mismatched", "lr=0.001", "steps=2"], {}
    for batch, devices in ((8, 1), (5, 1), (8, 8)):
        name = f"{loss.rpartition(':')[2]}-{batch}-{devices}"
        mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"] if devices == 8 else []
        run(place, *argv, *mesh, f"batch={batch}", f"name={name}", devices=devices)
        found[batch, devices] = place.metrics(name)
    before = found[8, 1][0]
    assert (
        before["step"] == 0
        and {"eval_loss", "eval_rewards/accuracies_pairs", "eval_logps/chosen", "eval_kl"} <= before.keys()
    )
    for name, value in before.items():
        assert found[5, 1][0][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    for one, many in zip(found[8, 1], found[8, 8], strict=True):
        chance = (
            () if one["step"] > 1 else ("accurac", "correlation", "label_noise")
        )  # signs of rounding errors
        for name in one.keys() - {"num_tokens"}:
            if not any(word in name for word in chance):
                assert many[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_evaluate_on_a_held_out_fraction_has_the_numbers_of_the_run(place, monkeypatch, capsys):
    run(place, "steps=2", "seed=3", "name=fraction")  # held_out=0.2
    last = place.metrics("fraction")[-1]
    with working_directory(place.folder):
        argv = ("evaluate", "--run", "runs/fraction", "--dtype", "float32")
        code, out, err = call(monkeypatch, capsys, *argv, "--json")
        assert code == 0, err
        found = json.loads(out)
        code, _, err = call(monkeypatch, capsys, *argv, "--max-length", "32")
        assert code == 1 and "--max-length applies only to --file; the rows that the run held out" in err
    assert found["pairs"] == last["eval_rewards/accuracies_pairs"]
    assert found["accuracy_against_base"] == last["eval_rewards/accuracies"]
    for name in ("logps/chosen", "logps/rejected"):
        assert found[name] == pytest.approx(last[f"eval_{name}"], rel=1e-4)
    path = place.runs("fraction") / "held_out.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["row"] for row in rows}) == found["pairs"]  # the values whose means are the metrics
    assert np.mean([row["rewards/accuracies"] for row in rows]) == last["eval_rewards/accuracies"]
    assert np.mean([row["rewards/margins"] for row in rows]) == pytest.approx(last["eval_rewards/margins"])
    losses, weights = ([row[name] for row in rows] for name in ("loss", "weight"))
    assert np.average(losses, weights=weights) == pytest.approx(last["eval_loss"])


@pytest.mark.slow
def test_nothing_compiles_after_the_loop_begins(place):
    for kind in ("bco", "full"):
        out = run(place, *KINDS[kind], f"name=watch-{kind}", "loop.eval_every=1", hook=COUNT_COMPILES)
        assert "compiled before the loop: True" in out and "compiled since: []" in out


LOSSES = '''"""A user's own losses."""

import jax
import jax.numpy as jnp

from jaxft.objectives.losses.preference_losses import aot


def margin_of_tokens(pair, scale=0.5):
    """DPO with the log-ratio of each token clipped."""
    ratio = jnp.clip(pair.tokens.logp - pair.tokens.reference, -2, 2)
    total = pair.total(ratio)
    return -jax.nn.log_sigmoid(scale * (total["chosen"] - total["rejected"]))


def column(pair):
    return pair.columns["hardness"] * pair.chosen.ratio


def typo(pair):
    return pair.chosen.rtaio


def pairs_of_values(pair):
    return pair.chosen.ratio, pair.rejected.ratio


def mean_of_pairs(pair):
    return jnp.mean(pair.chosen.ratio)


hidden = lambda pair: aot(pair, {}) + 0
'''


def test_a_user_defined_loss_trains(place):
    (place.folder / "mine.py").write_text(LOSSES)
    run(place, "loss=mine.py:margin_of_tokens", "name=mine", "steps=8")
    found = [line["loss"] for line in steps_of(place, "mine")]
    assert found[0] == pytest.approx(0.6931472, rel=1e-5) and found[-1] < 0.6
    assert "margin_of_tokens" in (place.runs("mine") / "config.json").read_text()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["loss=mine.py:mean_of_pairs"], "must return one value per pair"),
        (
            ["loss=mine.py:pairs_of_values"],
            "loss pairs_of_values must return one value per pair, (1, 4); got tuple",
        ),
        (
            ["loss=mine.py:column"],
            "loss column: the pairs have no field 'hardness' (available: chosen, rejected",
        ),
        (
            ["loss=mine.py:typo"],
            "loss typo fails: AttributeError: 'Response' object has no attribute 'rtaio'",
        ),
        (["loss=mine.py:hidden"], "without its state. Pass it to preference(...) itself, or"),
        (["loss=mine.py:nothing"], "mine.py has no 'nothing'; it has: "),
        (
            ["reference=none"],
            "without a reference there is no implicit reward. Set preference(reward=summed_logp)",
        ),
        (
            ["reference=none", "reward=jaxft.objectives.preference:summed_logp"],
            "this loss reads the reference's log-probs",
        ),
        ([f"loss={F}:kto"], "kto needs a third response `mismatched`"),
        ([f"loss={F}:tpo"], "tpo needs a third response `gold`"),
        (["reference=sometimes"], "one of start, precomputed, moving, none"),
    ],
)
def test_an_invalid_loss_or_reference_is_named(place, argv, message):
    (place.folder / "mine.py").write_text(LOSSES)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_and_compile(place.folder, *argv)
