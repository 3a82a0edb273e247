"""Influence of rows: gradients of single rows add up, flipped labels and duplicates are found."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dpo_place import WORDS, write_pair_place
from prepared import working_directory
from scripts_in_process import call

import jaxft
from jaxft.data.packing.tokenised import preview
from jaxft.distributed import sharding
from jaxft.lab import influence
from jaxft.lab.influence import (
    SIDE,
    gradients_of_rows,
    map_gradients,
    margin_gradients,
    margins_of_rows,
    predicted_margins,
    project,
    rows_by_name,
    without_source,
)
from jaxft.nn import tree

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
    return gradients_of_rows(parts)


def number(name):
    return int(str(name).rpartition(":")[2]) - 1


def test_flipped_labels_have_the_lowest_influence(parts, found):
    for one in (found.influence, margins_of_rows(parts)):
        lowest = one.order[:5]
        assert {number(one.names[i]) for i in lowest} == {*FLIPPED, 21}
        assert (one.values[lowest] < 0).all() and one.values[one.order[5]] > 0


def test_a_run_prepared_on_two_devices_has_the_same_influences(place, parts):
    with working_directory(place, devices=2):
        two = jaxft.prepare("config.py", data="train.jsonl", held_out="held.jsonl")
        found = margins_of_rows(two)
    assert two.mesh.size == 2
    np.testing.assert_allclose(found.values, margins_of_rows(parts).values, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_the_margin_by_a_map_of_the_hidden_states(parts):
    """The margin is written out from whole logits; its gradient by M is taken at the identity."""
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    one = partial(jax.device_put, device=jax.devices()[0])
    trainable, frozen = jax.tree.map(one, (parts.state.trainable, parts.frozen))
    (batch,) = parts.source.cover([0])
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    key = jax.random.key(3)

    def margin(M, h):
        logits = parts.model.logits(parts.model.head(params), h @ M).astype(jnp.float32)
        logp = jax.nn.log_softmax(logits)[0, batch.read[0]]
        taken = jnp.take_along_axis(logp, batch.targets[0][:, None], 1)[:, 0]
        sign = jnp.array([1.0, -1.0, 0.0])[jnp.minimum(batch.responses[0], 2)]
        return (sign * taken).sum()

    with jax.set_mesh(mesh):
        params = tree.combine(trainable, frozen)
        found = jax.jit(partial(map_gradients, parts.model, key=key))(params, batch)[0, 0]
        h = parts.model.hidden(params, batch)[0]
        whole = jax.grad(margin)(jnp.eye(h.shape[2]), h)
    P, Q = (jax.random.normal(k, (h.shape[2], SIDE)) / SIDE**0.5 for k in jax.random.split(key))
    expected = np.asarray(P.T @ whole @ Q).ravel()
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_a_predicted_margin_is_that_of_a_regression_without_the_row():
    """Each of them as a least-squares problem of its own, with the ridge as further rows."""
    rng = np.random.default_rng(0)
    x, weight, ridge = rng.normal(size=(9, 4)), rng.uniform(0.5, 2, 9), influence.RIDGES
    found = predicted_margins(x, weight, 6)

    def alone(k):
        errors = []
        for i in range(9):
            kept = np.arange(9) != i
            root = np.sqrt(weight[kept])
            left = np.concatenate([root[:, None] * x[kept], np.sqrt(k) * np.eye(4)])
            w = np.linalg.lstsq(left, np.concatenate([root, np.zeros(4)]), rcond=None)[0]
            errors.append(x[i] @ w)
        return np.array(errors)

    every = [alone(k) for k in ridge]
    best = min(every, key=lambda p: ((p[6:] - 1) ** 2).mean())
    np.testing.assert_allclose(found, best, atol=1e-9)


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
        expected = jax.jit(lambda t: project(jax.grad(total)(t), key, influence.SIZE))(trainable)
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


def swapped(row):
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def write_sources(folder, good, bad):
    """Write files of 12 pairs each; in the bad ones every label is flipped."""
    for n in range(good + bad):
        found = [pair(f"{20 * n + i} ten?", WORDS[(i + n) % 5]) for i in range(12)]
        found = found if n < good else [swapped(row) for row in found]
        name = f"good{n}.jsonl" if n < good else f"bad{n - good}.jsonl"
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    return [f"good{n}.jsonl" for n in range(good)] + [f"bad{n}.jsonl" for n in range(bad)]


def test_a_flipped_label_negates_the_gradient(place, parts):
    (place / "swapped.jsonl").write_text("".join(json.dumps(swapped(row)) + "\n" for row in rows()))
    with working_directory(place):
        turned = jaxft.prepare("config.py", data="swapped.jsonl", held_out="held.jsonl")
    one, other = margin_gradients(parts).train, margin_gradients(turned).train
    np.testing.assert_allclose(other, -one, atol=1e-4 * np.abs(one).max())


def test_losses_without_each_of_three_sources_sum_to_twice_the_loss_with_all(place):
    with working_directory(place):
        names = ",".join(write_sources(place, 2, 1))
        parts = jaxft.prepare("config.py", data=names, held_out="held.jsonl")
    batch = jax.tree.map(lambda x: x[0], parts.batch(0))
    params = tree.combine(parts.state.trainable, parts.frozen)
    with jax.set_mesh(parts.mesh):
        whole, *without = (
            jax.jit(
                lambda params, o=one: (
                    o(params, batch, None, {})[0],
                    o.for_evaluation()(params, batch, None, {})[0],
                )
            )(params)
            for one in (
                parts.objective,
                *(without_source(parts.model, parts.run.objective, k) for k in range(3)),
            )
        )
    assert float(sum(loss for loss, _ in without)) == pytest.approx(2 * float(whole[0]), rel=1e-5)
    assert all(float(held) == pytest.approx(float(whole[1]), rel=1e-5) for _, held in without)


def test_the_command_trains_without_each_source_and_names_the_bad_one(place, monkeypatch, capsys):
    with working_directory(place):
        names = ",".join(write_sources(place, 2, 1))
        argv = ["--config", "config.py", f"data={names}", "held_out=held.jsonl", "steps=6", "name=three"]
        code, out, _ = call(monkeypatch, capsys, "influence", *argv, "--leave-out")
        labels = {path.parent.name for path in (place / "runs/three-sources").glob("*/adapter")}
    lines = out.partition("above 0 the source helps:")[2].strip().splitlines()
    assert (
        code == 0 and len(lines) == 3 and labels == {"all", "without-good0", "without-good1", "without-bad0"}
    )
    assert lines[0].strip().startswith("-") and lines[0].endswith("without bad0")
    assert all(line.strip().startswith("+") for line in lines[1:])


def test_rows_of_files_of_one_name_are_told_apart(place):
    """Each name leads to the row that was tokenised."""
    for folder, first in (("a", 100), ("b", 200)):
        (place / folder).mkdir(exist_ok=True)
        given = [pair(f"{first + i} ten?", WORDS[i % 5]) for i in range(6)]
        (place / folder / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    with working_directory(place):
        parts = jaxft.prepare("config.py", data="a/same.jsonl,b/same.jsonl", held_out="held.jsonl")
        found = margins_of_rows(parts)
        columns = rows_by_name("a/same.jsonl,b/same.jsonl")
    split = parts.source.split
    texts = [preview(split.rows, i, parts.tokenizer) for i in split.train]
    assert len(columns) == 12
    assert all(columns[name]["prompt"] in text for name, text in zip(found.names, texts, strict=True))
    assert [*sorted(found.by_file())] == ["a/same.jsonl", "b/same.jsonl"]


def test_gradients_that_are_not_finite_are_one_line(parts):
    broken = replace(parts.state, trainable=jax.tree.map(lambda x: x * np.nan, parts.state.trainable))
    with pytest.raises(ValueError, match="the gradients are not finite: the run has diverged"):
        gradients_of_rows(replace(parts, state=broken))


@pytest.mark.slow  # compiles the backward pass of a backward pass
def test_the_command_weighs_sources_by_gradients_through_training(place, monkeypatch, capsys):
    monkeypatch.setenv("JAXFT_ATTENTION", "reference")  # restores it
    with working_directory(place):
        names = ",".join(write_sources(place, 2, 1))
        argv = ["--config", "config.py", f"data={names}", "held_out=held.jsonl", "name=weighed", "lr=1e-3"]
        code, out, _ = call(monkeypatch, capsys, "influence", *argv, "--through", "6")
    slopes = {line.split()[2]: float(line.split()[0]) for line in out.strip().splitlines()[-3:]}
    weights = {line.split()[2]: float(line.split()[1]) for line in out.strip().splitlines()[-3:]}
    assert code == 0 and slopes["bad0"] > 0 > max(slopes["good0"], slopes["good1"])
    assert weights["bad0"] == min(weights.values()) < 0.1
    assert sum(weights.values()) == pytest.approx(1, abs=0.01)


@pytest.mark.slow  # three runs, one after the other
def test_full_fine_tuning_without_each_source_stays_in_its_folder(place, monkeypatch, capsys):
    with working_directory(place):
        names = ",".join(write_sources(place, 1, 1))
        argv = ["--config", "config.py", f"data={names}", "held_out=held.jsonl", "steps=4", "name=whole"]
        before = {path.name for path in (place / "runs").glob("*")}
        code, out, _ = call(monkeypatch, capsys, "influence", *argv, "full=true", "--leave-out")
    assert code == 0 and "without bad0" in out and "without good0" in out
    assert {path.name for path in (place / "runs").glob("*")} - before == {"whole-sources"}


@pytest.mark.slow
def test_flipped_labels_and_a_bad_source_are_found_in_the_default_world_on_a_real_model():
    """SmolLM2 at step 0, 10 drawings: 40 flipped labels of 200; a source of 20 pairs with 12 flipped labels.

    A process of its own: the real recipe on one device.
    """
    script = Path(__file__).resolve().parents[2] / "scripts/bench/bench_influence.py"
    env = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    ended = subprocess.run([sys.executable, script, "--steps", "1"], env=env, capture_output=True, text=True)
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["auroc_least"] >= 0.9 and result["worst_last"] == "10 of 10", result


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--out", "x.jsonl"], "--out needs --keep"),
        (["held_out=none"], "no rows are held out to compute the influence on; set held_out=FILE"),
        (["--leave-out"], "the run has one source; name several, as in data=a.jsonl,b.jsonl"),
        (["--leave-out", "--gradients"], "--leave-out compares sources, not rows"),
        (["--through", "2", "--keep", "0.5"], "--through compares sources, not rows"),
    ],
)
def test_a_mistake_is_one_line(place, monkeypatch, capsys, argv, text):
    with working_directory(place):
        given = [] if argv[0].startswith("held_out") else ["held_out=held.jsonl"]
        argv = ["--config", "config.py", "data=train.jsonl", *given, *argv]
        code, _, error = call(monkeypatch, capsys, "influence", *argv)
    assert code == 1 and text in error and error.startswith("error: ") and error.count("\n") == 1


def test_held_out_rows_count_by_their_weights(place):
    """The held-out gradient is the weighted mean of the gradients of single held-out rows."""
    held = [json.loads(line) for line in (place / "held.jsonl").read_text().splitlines()][:3]
    weights = (1.0, 0.0, 5.0)
    with working_directory(place):

        def held_out_gradient(rows):
            Path("weighted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings = {"data": "plain.jsonl", "held_out": "weighted.jsonl", "data.weight_column": "w"}
            return gradients_of_rows(jaxft.prepare("config.py", **settings)).held_out

        Path("plain.jsonl").write_text("".join(json.dumps({**row, "w": 1.0}) + "\n" for row in rows()))
        each = [held_out_gradient([{**row, "w": 1.0}]) for row in held]
        together = held_out_gradient([{**row, "w": w} for row, w in zip(held, weights, strict=True)])
    expected = np.average(each, axis=0, weights=weights)
    np.testing.assert_allclose(together, expected, atol=2e-4 * np.abs(expected).max())


def test_margins_of_single_responses_are_refused_in_one_line(place):
    with working_directory(place):
        single = [{"prompt": f"{n} ten?", "completion": "yes yes", "label": n % 2 == 0} for n in range(20)]
        Path("unpaired.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
        parts = jaxft.prepare(
            "config.py", data="unpaired.jsonl", held_out="held.jsonl", **{"data.unpaired": "true"}
        )
        with pytest.raises(
            ValueError, match=r"unpaired.jsonl:1: a row of one response has no margin \(20 such"
        ):
            margins_of_rows(parts)
