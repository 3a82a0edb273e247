"""Norms per layer (loop.watch) and the record of the first non-finite step (loop.debug_nonfinite)."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny
from tiny_run import Place, write_place

from jaxft import tree
from jaxft.train import watch
from jaxft.train.nonfinite import Diagnosis, first_nonfinite

NAN_IN_A_LAYER = """
import jax
from jaxft.train import loop
load = loop.load_members
def load_broken(job, restored):
    states, frozen = load(job, restored)
    mlp = frozen[0]["base"]["layers"]["mlp"]
    mlp["up"] = jax.tree.map(lambda x: x.at[1, 0, 0].set(float("nan")), mlp["up"])
    return states, frozen
loop.load_members = load_broken
"""
NAN_IN_A_ROW = """
import numpy as np
from jaxft.train import members
make = members.Job.batch
def make_broken(self, step, states):
    _, batch, metrics = make(self, step, states)
    if step == 1:
        weights = batch.token_weights.copy()
        weights[0, 2, 0] = np.nan
        batch = batch.replace(token_weights=weights)
    return [batch], batch, metrics
members.Job.batch = make_broken
"""
ARGV = ["samples=0", "data.held_out=none", "steps=2", "loop.debug_nonfinite=true"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nonfinite")
    write_place(folder)
    return Place(folder)


def test_the_first_layer_with_a_non_finite_output_is_named(place):
    assert place.run(*ARGV, "name=layer", hook=NAN_IN_A_LAYER) == 0, place.err()
    assert "the first output that is not finite is that of layer 1, in the rows rows.jsonl:" in place.out()
    folder = place.runs("layer") / "nonfinite" / "step-1"
    assert place.out().count("nonfinite/step-") == 1 and not folder.with_name("step-2").exists()
    norms = json.loads((folder / "norms.json").read_text())
    layers = np.array(norms["outputs"][0][0], float)  # null becomes nan
    assert np.isfinite(layers[:2]).all() and np.isnan(layers[2:]).all() and len(layers) == 4
    finite = [x is not None for x in norms["parameters"]["base/mlp/up"]]
    assert finite == [True, False, True]
    with np.load(folder / "batch.npz") as batch:
        assert batch["ids"].shape == batch["segments"].shape and batch["ids"].ndim == 3
    assert len(json.loads((folder / "rows.json").read_text())) == 4


def test_a_row_with_a_non_finite_weight_is_named(place):
    assert place.run(*ARGV, "name=row", hook=NAN_IN_A_ROW) == 0, place.err()
    names = json.loads((place.runs("row") / "nonfinite" / "step-2" / "rows.json").read_text())
    message = (
        "step 2: the loss or gradient is not finite; the batch is not finite in token_weights of the rows "
    )
    assert f"{message}{names[2]}. " in place.out()


def test_the_first_non_finite_gradient_is_that_of_the_last_such_layer():
    outputs, nan = [np.ones((1, 4, 2))], float("nan")
    gradients = {"adapter/attn/q/a": np.array([nan, nan, 1.0]), "adapter/attn/k/a": np.array([1.0, 1.0, 1.0])}
    text = first_nonfinite(Diagnosis({}, gradients, outputs), {"ids": np.zeros((1, 2, 3))}, ["a", "b"])
    assert text.endswith("the first gradient that is not is that of layer 1 (adapter/attn/q/a)")


def test_norms_per_layer_and_kind_equal_those_of_the_leaves():
    model, params = tiny(jnp.float32)
    norms = watch.make_layer_norms(model.specs)(params)
    leaves = tree.paths(params)
    for path, leaf in leaves.items():
        kind = watch.kind_of(path)
        expected = [jnp.linalg.norm(x) for x in leaf] if "layers" in path else jnp.linalg.norm(leaf)
        np.testing.assert_allclose(norms[kind], expected, rtol=1e-6, err_msg=path)
    kinds = [
        watch.kind_of(path)
        for path in ("adapter/layers/attn/q/a", "base/layers/attn/q", "critic/adapter/layers/mlp/up/b")
    ]
    assert kinds == ["attn/q", "attn/q", "critic/mlp/up"]


def test_watched_norms_sum_to_grad_norm_and_no_other_metric_changes(place):
    assert place.run("name=watched", "loop.watch=layers", "steps=2", "samples=0") == 0, place.err()
    assert place.run("name=plain", "steps=2", "samples=0") == 0, place.err()
    for one, other in zip(place.metrics("watched"), place.metrics("plain"), strict=True):
        prefixes = (f"{watch.GRAD_NORM}/", f"{watch.UPDATE_NORM}/")
        assert {name: x for name, x in one.items() if not name.startswith(prefixes)} == other
        if "loss" in one:
            squares = [x**2 for name, x in one.items() if name.startswith(prefixes[0])]
            assert len(squares) == 3 * 7 and sum(squares) ** 0.5 == pytest.approx(one["grad_norm"], rel=1e-5)
            assert "update_norm/mlp/down/2" in one
