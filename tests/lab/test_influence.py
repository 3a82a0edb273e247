"""Influence of rows: gradients of single rows add up, flipped labels and duplicates are found."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from dpo_place import WORDS, write_pair_place
from prepared import working_directory
from scripts_in_process import call

import jaxft
from jaxft import tree
from jaxft.distributed import sharding
from jaxft.lab.influence import gradients_of_rows, project, rows_by_name, slopes_of_rows
from jaxft.lab.worlds import Taste, World

FLIPPED = {1, 4, 9, 17}


def pair(prompt, word):
    return {"prompt": prompt, "chosen": f"yes yes {word}", "rejected": f"no no {word}"}


def rows():
    found = [pair(f"{i} ten?", WORDS[i % 3]) for i in range(20)]
    for i in FLIPPED:
        found[i] = {**found[i], "chosen": found[i]["rejected"], "rejected": found[i]["chosen"]}
    again = {**found[2], "chosen": found[2]["rejected"], "rejected": found[2]["chosen"]}
    return [*found, found[2], again]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("influence")
    write_pair_place(folder)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    held = [pair(f"{30 + i} ten?", WORDS[i % 3]) for i in range(8)]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return folder


@pytest.fixture(scope="module")
def parts(place):
    with working_directory(place):
        return jaxft.prepare("config.py", data="train.jsonl", held_out="held.jsonl")


@pytest.fixture(scope="module")
def found(parts):
    return gradients_of_rows(parts, size=4096)


def number(name):
    return int(str(name).rpartition(":")[2]) - 1


def test_flipped_labels_have_the_lowest_influence(parts, found):
    for influence in (found.influence, slopes_of_rows(parts)):
        lowest = influence.order[:5]
        assert {number(influence.names[i]) for i in lowest} == {*FLIPPED, 21}
        assert (influence.values[lowest] < 0).all() and influence.values[influence.order[5]] > 0


def test_slopes_are_proportional_to_products_of_gradients(parts, found):
    """At the reference every row's gradient of DPO is -beta / 2 times that of its margin."""
    products = found.gradients @ found.held_out
    assert np.corrcoef(products, slopes_of_rows(parts).values)[0, 1] > 0.98


def test_the_mean_slope_of_the_held_out_rows_themselves_is_1(place):
    with working_directory(place):
        own = jaxft.prepare("config.py", data="held.jsonl", held_out="held.jsonl")
    assert slopes_of_rows(own).values.mean() == pytest.approx(1.0, rel=0.2)  # the step is finite


def test_rows_that_repeat_one_another_are_found_with_the_sign_of_their_labels(found):
    pairs = {(number(found.names[i]), number(found.names[j])): x for i, j, x in found.duplicates(0.999)}
    assert pairs[2, 20] == pytest.approx(1.0, abs=1e-4) and pairs[2, 21] == pytest.approx(-1.0, abs=1e-4)
    assert all({*pair} <= {2, 20, 21} for pair in pairs)


def test_the_held_out_gradient_is_the_projected_gradient_of_the_held_out_loss(parts, found):
    """The projection is linear, and the held-out loss is the mean over its rows."""
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    state, key = parts.state, jax.random.key(0)
    one = partial(jax.device_put, device=jax.devices()[0])
    trainable, frozen = jax.tree.map(one, (state.trainable, parts.frozen))

    def total(trainable):
        whole = tree.combine(trainable, frozen)
        batches = (jax.tree.map(lambda x: x[0], batch) for batch in parts.source.held_out)
        return sum(parts.objective(whole, batch, None, {})[0] for batch in batches)

    with jax.set_mesh(mesh):
        expected = jax.jit(lambda t: project(jax.grad(total)(t), key, 4096))(trainable)
    np.testing.assert_allclose(found.held_out, expected, atol=2e-5 * np.abs(expected).max())


def test_projected_products_are_unbiased():
    """Over keys, the product of two sketches has the mean of the product of the vectors."""
    rng = np.random.default_rng(0)
    a = {"x": rng.normal(size=(7, 5)).astype(np.float32), "y": rng.normal(size=40).astype(np.float32)}
    b = {"x": a["x"] + rng.normal(size=(7, 5)).astype(np.float32), "y": a["y"]}
    exact = sum(float((a[k] * b[k]).sum()) for k in a)
    products = jax.vmap(lambda key: project(a, key, 16) @ project(b, key, 16))(
        jax.random.split(jax.random.key(1), 400)
    )
    assert abs(float(products.mean()) - exact) < 4 * float(products.std()) / 20


def test_the_command_writes_influences_and_the_best_rows(place, monkeypatch, capsys):
    with working_directory(place):
        argv = ["--config", "config.py", "data=train.jsonl", "held_out=held.jsonl", "name=it"]
        argv += ["--keep", "0.5", "--out", "best.jsonl"]
        code, out, _ = call(monkeypatch, capsys, "influence", *argv)
        lines = (place / "runs/it/influence.csv").read_text().splitlines()
        best = [json.loads(line) for line in (place / "best.jsonl").read_text().splitlines()]
        everything = rows_by_name("train.jsonl")
    assert code == 0 and "runs/it has no checkpoint: step 0" in out and "5 of 22 training rows" in out
    assert lines[0] == "row,influence" and len(lines) == 23
    assert len(best) == 11 and all(row["chosen"].startswith("yes") for row in best)
    assert all(row in everything.values() for row in best)


@pytest.mark.slow
def test_a_fifth_of_flipped_labels_is_found_in_a_world_on_a_real_model(tmp_path):
    """SmolLM2 at step 0; rows that differ in format, which decides the reward."""
    taste = Taste(facts=1.0, format=5.0)
    world = World("configs/data/opinions.jsonl", taste, pairs=60, held_out=16, gap=3.0, noise=0.2)
    train, held = world.write(tmp_path)
    parts = jaxft.prepare("dpo", data=str(train), held_out=str(held), max_length=128)
    found = slopes_of_rows(parts)
    flipped = np.asarray([world.rows()[number(name)]["flipped"] for name in found.names], bool)
    above = found.values[~flipped][:, None] > found.values[flipped][None, :]
    assert flipped.sum() == 12 and above.mean() >= 0.9  # the area under the ROC curve


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--keep", "1.5"], "--keep 1.5: expected a fraction above 0"),
        (["--out", "x.jsonl"], "--out needs --keep"),
        (["held_out=none"], "no rows are held out; set held_out=FILE"),
    ],
)
def test_a_mistake_is_one_line(place, monkeypatch, capsys, argv, text):
    with working_directory(place):
        given = [] if argv[0].startswith("held_out") else ["held_out=held.jsonl"]
        argv = ["--config", "config.py", "data=train.jsonl", *given, *argv]
        code, _, error = call(monkeypatch, capsys, "influence", *argv)
    assert code == 1 and text in error and error.startswith("error: ") and error.count("\n") == 1
