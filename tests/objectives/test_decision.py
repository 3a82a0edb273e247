"""Decisions: probabilities of transformers, losses and metrics by other formulas, laws of the objective."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_model import CONFIG, assert_close, micro

from jaxft.batch import Decisions
from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.objectives.decision import brier, cross_entropy, decision, log_score
from jaxft.objectives.metrics import CalibrationError, add, as_floats, row_values

pytestmark = pytest.mark.usefixtures("x64")
TOKENS = (7, 3, 31, 12)
HEAD = Adapter(rank=2, alpha=4.0, targets=("q", "head"))


def tiny(*settings):
    with jax.numpy_dtype_promotion("standard"):
        return tiny_model.tiny(jnp.float64, *settings)


def batch_of(rows=4, reads=2, length=12, seed=0, dtype=np.float64):
    """Random decisions of two to four choices; the last slot of every other row is empty."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CONFIG.vocab, (rows, length)).astype(np.int32)
    segments = np.repeat([[1] * 7 + [2] * (length - 7)], rows, 0).astype(np.int32)
    positions = np.concatenate([np.arange(7), np.arange(length - 7)])[None].repeat(rows, 0).astype(np.int32)
    read = np.array([[6, length - 1]] * rows, np.int32)
    choices = np.array([[rng.permutation(4) for _ in range(reads)] for _ in range(rows)], np.int32)
    for row in range(rows):
        choices[row, 0, 2 + row % 3 :] = -1
    q = np.where(choices >= 0, rng.random(choices.shape), 0).astype(dtype)
    q[:, 1] = np.eye(4)[rng.integers(0, 4, rows)]
    q /= q.sum(-1, keepdims=True)
    weight = np.ones((rows, reads), dtype)
    weight[1::2, 1] = 0
    q[1::2, 1], choices[1::2, 1] = 0, -1
    targets = np.asarray(TOKENS, np.int32)[np.take_along_axis(choices, q.argmax(-1)[..., None], -1)[..., 0]]
    arrays = (ids, segments, positions, read, targets, weight / weight.sum())
    return Decisions(*map(jnp.asarray, arrays), choices=jnp.asarray(choices), probabilities=jnp.asarray(q),
                     tokens=TOKENS)  # fmt: skip


def by_hand(logits, batch):
    """(probabilities, labels) of each decision, from the logits of the whole vocabulary."""
    found = []
    for (row, slot), weight in np.ndenumerate(np.asarray(batch.token_weights)):
        if weight:
            used = np.asarray(batch.choices[row, slot]) >= 0
            tokens = np.asarray(TOKENS)[np.asarray(batch.choices[row, slot])[used]]
            e = np.exp(np.asarray(logits)[row, int(batch.read[row, slot])][tokens].astype(np.float64))
            found.append((e / e.sum(), np.asarray(batch.probabilities[row, slot])[used]))
    return found


@pytest.mark.parametrize("case", ["head", "tied", "adapter on the head", "tied with an adapter"])
def test_probabilities_and_metrics_are_those_of_all_logits(case):
    adapter = HEAD if "adapter" in case else None
    model, params = tiny(adapter, "tied" in case)
    batch = batch_of()
    objective = decision(model)

    @jax.jit
    def run(params):
        h, _ = model.hidden(params, batch)
        outputs = objective.forward(params, batch, None, {})
        return model.logits(model.head(params), h), outputs, objective.for_evaluation().loss(outputs, {})

    logits, outputs, (loss, metrics) = run(params)
    expected = by_hand(logits, batch)
    found = [
        np.exp(x[x > -1e29]) for x, w in zip(outputs.log_p.reshape(-1, 4), batch.token_weights.ravel()) if w
    ]
    for p, (own, _) in zip(found, expected, strict=True):
        np.testing.assert_allclose(p, own, rtol=1e-10)
    floats = as_floats(metrics)
    assert float(loss) == pytest.approx(floats["loss"])
    logs = [-sum(b * np.log(a) for a, b in zip(p, q) if b) for p, q in expected]
    assert floats["log_loss"] == pytest.approx(np.mean(logs)) == pytest.approx(floats["loss"])
    squares = [np.dot(p, p) - 2 * np.dot(p, q) + np.dot(q, q) for p, q in expected]
    assert floats["brier"] == pytest.approx(np.mean(squares))
    assert floats["accuracy"] == np.mean([p.argmax() == q.argmax() for p, q in expected])
    assert floats["entropy"] == pytest.approx(np.mean([-np.dot(p, np.log(p)) for p, _ in expected]))
    gaps = {}
    for p, q in expected:  # bins without rounding: the confidence is in ((i - 1) / 15, i / 15]
        number = next(i for i in range(1, 16) if p.max() <= i / 15)
        gaps.setdefault(number, []).append(q[p.argmax()] - p.max())
    assert floats["ece"] == pytest.approx(sum(abs(sum(x)) for x in gaps.values()) / len(expected))
    rows = row_values(metrics)
    assert [x["loss"] for x in rows.values()] == pytest.approx(logs)
    assert [x["confidence"] for x in rows.values()] == pytest.approx([p.max() for p, _ in expected])
    assert list(rows) == np.flatnonzero(batch.token_weights.ravel()).tolist()


def test_a_decision_reads_no_other_column_of_the_head():
    model, params = tiny()
    other = np.setdiff1d(np.arange(CONFIG.vocab), TOKENS)
    broken = tree.map_with_path(
        lambda path, x: x.at[:, other].set(jnp.nan) if path.endswith("head") else x, params
    )
    assert not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(broken))
    loss = jax.jit(lambda p: decision(model)(p, batch_of(), None, {})[0])
    assert float(loss(broken)) == float(loss(params))


def test_objective_of_a_batch_is_the_sum_of_its_parts_and_linear_in_weights():
    model, params = tiny(HEAD)
    batch, objective = batch_of(), decision(model, loss=brier)

    def of(b):
        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params, b, None, {})
        return loss, metrics, grads

    compiled = jax.jit(of)
    loss, metrics, grads = compiled(batch)
    parts = [compiled(jax.tree.map(lambda x, i=i: x[i], micro(batch, 4))) for i in range(4)]
    assert_close(sum(part[0] for part in parts), loss)
    assert_close(jax.tree.map(lambda *x: sum(x), *(part[2] for part in parts)), grads)
    total = parts[0][1]
    for part in parts[1:]:
        total = add(total, part[1])
    assert as_floats(total) == pytest.approx(as_floats(metrics))
    doubled = compiled(replace(batch, token_weights=2 * batch.token_weights))
    assert_close(doubled[2], jax.tree.map(lambda x: 2 * x, grads))
    nothing = compiled(replace(batch, token_weights=0 * batch.token_weights))
    assert float(nothing[0]) == 0 and all(not x.any() for x in jax.tree.leaves(nothing[2]))
    assert np.abs(grads["adapter"]["head"]["a"]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [MeshShape(1, 2, 2, context=2), MeshShape(2, 2, 2)], ids=["context 2", "2x2x2"]
)
def test_a_mesh_has_the_loss_and_gradients_of_one_device(mesh):
    model, params = tiny(HEAD)
    batch, objective = micro(batch_of(8, length=16), 1), decision(model)

    def of(params, batch):
        rows = jax.tree.map(lambda x: x[0], batch)
        return jax.value_and_grad(lambda p: objective(p, rows, None, {})[0])(params)

    target = jax.jit(of)(params, batch)
    laid_out = make_mesh(mesh)
    with jax.set_mesh(laid_out):
        spread = jax.tree.map(jax.device_put, params, param_spec.shardings(model.specs, laid_out))
        found = jax.jit(of)(spread, sharding.shard_batch(laid_out, batch))
    assert_close(found, target)


@pytest.mark.parametrize("loss", [cross_entropy, log_score, brier])
def test_a_loss_is_proper_and_has_the_gradient_of_finite_differences(loss):
    q = jnp.array([0.1, 0.6, 0.3, 0.0])

    def of(logits):
        return loss(jax.nn.log_softmax(logits), q)

    rng = np.random.default_rng(0)
    least = of(jnp.log(jnp.where(q > 0, q, 1e-30)))
    for _ in range(20):
        assert float(of(jnp.asarray(rng.normal(0, 2, 4)))) > float(least)
    x, step = jnp.asarray(rng.normal(0, 1, 4)), 1e-6
    slope = [(of(x + step * e) - of(x - step * e)) / (2 * step) for e in jnp.eye(4)]
    np.testing.assert_allclose(jax.grad(of)(x), jnp.stack(slope), atol=1e-8)
    assert float(least) == pytest.approx(0.0 if loss is not cross_entropy else 0.8979457248567797, abs=1e-9)


def test_calibration_error_of_golden_bins():
    # Two predictions of 0.62, one of them right, and one of 0.9, right: (2 |0.5 - 0.62| + |1 - 0.9|) / 3
    found = CalibrationError.of(
        jnp.array([0.62, 0.62, 0.9, 0.4]), jnp.array([1.0, 0, 1, 1]), jnp.array([True, True, True, False])
    )
    assert found.value() == pytest.approx((2 * 0.12 + 0.1) / 3)
    assert CalibrationError(0 * np.asarray(found.sums)).value() is None
    edge = CalibrationError.of(jnp.array([1.0, 1 / 15]), jnp.ones(2), jnp.ones(2, bool))
    assert np.flatnonzero(edge.sums[0]).tolist() == [0, 14]
