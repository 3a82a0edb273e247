"""Norms per layer (loop.watch), the record of the first non-finite step, and runs that are not finished."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_model import tiny
from tiny_run import Place, write_place

from jaxft.batch import TrainState
from jaxft.nn import tree
from jaxft.train import step
from jaxft.train.evaluate import run_evaluations
from jaxft.train.logs.nonfinite import Diagnosis, first_nonfinite

CHANGE_A_LAYER = """
import jax
from jaxft.train import loop
load = loop.load_members
def load_broken(job, restored, report):
    states, frozen = load(job, restored, report)
    mlp = frozen[0]["base"]["layers"]["mlp"]
    mlp["up"] = jax.tree.map(lambda x: x.at[1].set({value}), mlp["up"])
    return states, frozen
loop.load_members = load_broken
"""
NAN_IN_A_LAYER = CHANGE_A_LAYER.format(value="float('nan')")
OVERFLOW_IN_A_LAYER = CHANGE_A_LAYER.format(value="3e38")
NAN_IN_A_ROW = """
import numpy as np
from jaxft.train.start import jobs
make = jobs.Job.batch
def make_broken(self, step, states):
    _, batch, metrics = make(self, step, states)
    if step == 1:
        weights = batch.token_weights.copy()
        weights[0, 2, 0] = np.nan
        batch = batch.replace(token_weights=weights)
    return [batch], batch, metrics
jobs.Job.batch = make_broken
"""
ARGV = ["samples=0", "data.held_out=none", "steps=2", "loop.debug_nonfinite=true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nonfinite")
    write_place(folder)
    return Place(folder)


def test_a_loss_that_is_not_finite_at_the_first_step_ends_the_run_and_names_the_layer(place):
    argv = [x for x in ARGV if "debug" not in x]
    assert place.run(*argv, "name=layer", hook=OVERFLOW_IN_A_LAYER) == 1
    named = "the first output that is not finite belongs to layer 1, in the rows rows.jsonl:"
    assert place.err().startswith("error: runs/layer: the loss of the first step is not finite: " + named)
    assert place.err().count("\n") == 1 and named in place.out()
    folder = place.runs("layer") / "nonfinite" / "step-1"
    norms = json.loads((folder / "norms.json").read_text())
    layers = np.array(norms["outputs"][0][0], float)  # null becomes nan
    assert np.isfinite(layers[:2]).all() and np.isnan(layers[2:]).all() and len(layers) == 4
    with np.load(folder / "batch.npz") as batch:
        assert batch["ids"].shape == batch["segments"].shape and batch["ids"].ndim == 3
    assert len(json.loads((folder / "rows.json").read_text())) == 4
    assert not place.checkpoints("layer") and not (place.runs("layer") / "adapter").exists()


@pytest.mark.slow
def test_a_held_out_loss_that_is_not_finite_before_training_names_the_parameter_or_layer(place):
    assert place.run("name=parameter", "samples=0", hook=NAN_IN_A_LAYER) == 1
    start = "the loss on held-out rows is not finite before the first step: "
    line = "the parameter base/layers/mlp/up is not finite in layer 1"
    assert place.err().startswith(f"error: runs/parameter: {start}{line}. ")
    assert [entry["step"] for entry in place.metrics("parameter")] == [0]
    assert place.run("name=output", "samples=0", hook=OVERFLOW_IN_A_LAYER) == 1
    line = "the first output that is not finite belongs to layer 1"
    assert place.err().startswith(f"error: runs/output: {start}{line}. ")


@pytest.mark.slow
def test_a_run_that_ends_with_a_bad_step_is_not_finished_until_more_steps_are_good(place):
    argv, hook = ["name=end", "samples=0"], NAN_IN_A_ROW.replace("step == 1", "step == 3")
    for _ in range(2):  # the same command ends in the same way
        assert place.run(*argv, hook=hook) == 1
        assert "alarm after step 4: the last of 4 steps was not finite. " in place.out()
        assert place.err() == "error: runs/end: not finished: the last of 4 steps was not finite\n"
        assert not (place.runs("end") / "adapter").exists()
        assert not (place.runs("end") / "summary.json").exists()
    assert [m["skipped"] for m in place.metrics("end") if "loss" in m] == [0, 0, 0, 1]
    assert place.run(*argv, "steps=5", hook=hook) == 0, place.err()
    tensors = load_file(place.runs("end") / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(x).all() for x in tensors.values())
    alarms = json.loads((place.runs("end") / "summary.json").read_text())["alarms"]
    assert len(alarms) == 1 and "1 steps so far had a non-finite loss, gradient or update" in alarms[0]


@pytest.mark.slow
def test_a_last_update_after_which_the_loss_is_not_finite_is_seen_without_held_out_rows(place):
    """The update moves the adapter's b to 1e20, which is finite; a product of two such layers is not."""
    argv = ["name=last", "samples=0", "data.held_out=none", "steps=1", "lr=1e20"]
    for _ in range(2):  # the second time from the checkpoint of the last step
        assert place.run(*argv) == 1
        text = "the loss on the rows of the last step is nan after that step"
        assert place.err() == f"error: runs/last: not finished: {text}\n"
        assert f"alarm after step 1: {text}. " in place.out()
        assert not (place.runs("last") / "adapter").exists()
    assert [m["skipped"] for m in place.metrics("last")] == [0] and place.checkpoints("last") == [1]


def test_completions_with_non_finite_logits_are_no_finished_run():
    state = TrainState(jnp.int32(1), {}, (), {}, jnp.zeros(2, jnp.int32))
    end = {"metrics": {}, "samples": [{}, {}, {}], "scored": 0, "nonfinite": 1}
    assert run_evaluations.faults(state, 1, end) == [
        "the logits of 1 of 3 sampled completions are not finite"
    ]
    assert run_evaluations.faults(state, 1, {**end, "scored": 9}) == [
        "the logits of 1 of 9 sampled completions are not finite"
    ]


@pytest.mark.parametrize(
    "bad, metrics, expected",
    [
        ([0, 0], {"eval_loss": 1.0, "eval_margin": np.nan}, []),
        ([5, 0], {}, []),
        ([6, 0], {}, ["only 4 of 10 steps were finite"]),
        ([3, 2], {}, ["the last 2 of 10 steps were not finite"]),
        ([1, 1], {"eval_loss": 1.0}, ["the last of 10 steps was not finite"]),
        ([0, 0], {"eval_loss": np.inf}, ["the loss on held-out rows is not finite"]),
        ([0, 0], {"eval_loss": 1.0, "general_loss": np.nan}, ["the loss on general text is not finite"]),
    ],
    ids=str,
)
def test_why_a_run_is_not_finished(bad, metrics, expected):
    state = TrainState(jnp.int32(10), {}, (), {}, jnp.array(bad, jnp.int32))
    assert (
        run_evaluations.faults(state, 10, {"metrics": metrics, "samples": [], "scored": 0, "nonfinite": 0})
        == expected
    )


def test_a_row_with_a_non_finite_weight_is_named(place):
    assert place.run(*ARGV, "name=row", hook=NAN_IN_A_ROW) == 1
    assert "not finished: the last of 2 steps was not finite" in place.err()
    names = json.loads((place.runs("row") / "nonfinite" / "step-2" / "rows.json").read_text())
    message = (
        "step 2: the loss, gradient or update is not finite; "
        "the batch is not finite in token_weights of the rows "
    )
    assert f"{message}{names[2]}. " in place.out()


def test_the_first_non_finite_gradient_is_that_of_the_last_such_layer():
    outputs, nan = [np.ones((1, 4, 2))], float("nan")
    gradients = {
        f"adapter/layers/attn/{name}/a": np.array(norms)
        for name, norms in (("q", [nan, nan, 1.0]), ("k", [1.0, 1.0, 1.0]))
    }
    found = Diagnosis({}, gradients, outputs, layers=dict.fromkeys(gradients, range(3)))
    text = first_nonfinite(found, {"ids": np.zeros((1, 2, 3))}, ["a", "b"])
    assert text.endswith("the first gradient that is not belongs to layer 1 (adapter/layers/attn/q/a)")


def test_norms_per_layer_and_kind_equal_those_of_the_leaves():
    model, params = tiny(jnp.float32)
    norms = step.make_layer_norms(model.specs)(params)
    leaves = tree.paths(params)
    for path, leaf in leaves.items():
        kind = step.kind_of(path)
        expected = [jnp.linalg.norm(x) for x in leaf] if "layers" in path else jnp.linalg.norm(leaf)
        np.testing.assert_allclose(norms[kind], expected, rtol=1e-6, err_msg=path)
    kinds = [
        step.kind_of(path)
        for path in ("adapter/layers/attn/q/a", "base/layers/attn/q", "critic/adapter/layers/mlp/up/b")
    ]
    assert kinds == ["attn/q", "attn/q", "critic/mlp/up"]


@pytest.mark.slow
def test_watched_norms_sum_to_grad_norm_and_no_other_metric_changes(place):
    flags = "--xla_force_host_platform_device_count=1"  # as users have them: the same sums in both programs
    for more in (("name=watched", "loop.watch=layers"), ("name=plain",)):
        assert place.run(*more, "steps=2", "samples=0", XLA_FLAGS=flags) == 0, place.err()
    for one, other in zip(place.metrics("watched"), place.metrics("plain"), strict=True):
        prefixes = (f"{step.GRAD_NORM}/", f"{step.UPDATE_NORM}/")
        assert {name: x for name, x in one.items() if not name.startswith(prefixes)} == other
        if "loss" in one:
            squares = [x**2 for name, x in one.items() if name.startswith(prefixes[0])]
            assert len(squares) == 3 * 7 and sum(squares) ** 0.5 == pytest.approx(one["grad_norm"], rel=1e-5)
            assert "update_norm/mlp/down/2" in one
