"""Label smoothing, z-loss, dynamic fine-tuning and NEFTune: values and gradients of torch and transformers;
the laws of the batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_model import CONFIG, assert_close, batch_of, examples, micro, one_by_one, tiny
from transformers.trainer_pt_utils import LabelSmoother

from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape
from jaxft.nn.layers import neftune_noise
from jaxft.objectives import logprobs, metrics
from jaxft.objectives.logprobs import TargetLoss, weighted_loss
from jaxft.objectives.sft import sft
from jaxft.train.evaluate.evaluate import make_eval_step

pytestmark = pytest.mark.usefixtures("x64")
B, M, D, V = 2, 5, CONFIG.width, CONFIG.vocab


def smoothed(logits, targets):
    """torch's loss of each token."""
    flat = torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), targets.reshape(-1), label_smoothing=0.1, reduction="none"
    )
    return flat.reshape(targets.shape)


def with_z(logits, targets):
    """PaLM, section 5: the cross-entropy plus 1e-2 log^2 Z."""
    plain = torch.nn.functional.cross_entropy(logits.reshape(-1, V), targets.reshape(-1), reduction="none")
    return plain.reshape(targets.shape) + 1e-2 * torch.log(torch.exp(logits).sum(-1)) ** 2


def dynamic(logits, targets):
    """TRL's SFTTrainer with loss_type="dft"."""
    log_probs = torch.distributions.Categorical(logits=logits).log_prob(targets)
    return -log_probs * log_probs.exp().detach()


LOSSES = {
    "label smoothing": (dict(label_smoothing=0.1), smoothed),
    "z-loss": (dict(z_loss=1e-2), with_z),
    "dft": (dict(dft=True), dynamic),
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_of_a_loss_are_those_of_torch(name, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", B * V * 2)  # three chunks, the last of them padded
    settings, expected = LOSSES[name]
    model, whole = tiny()
    keys = jax.random.split(jax.random.key(3), 3)
    h = jax.random.normal(keys[0], (B, M, D))
    targets = jax.random.randint(keys[1], (B, M), 0, V, jnp.int32)
    weights = jax.random.uniform(keys[2], (B, M))

    def ours(whole, h):
        return weighted_loss(model, whole, h, targets, weights, TargetLoss(**settings))[0]

    loss, (grads, dh) = jax.jit(jax.value_and_grad(ours, (0, 1)))(whole, h)
    h_torch = torch.tensor(np.asarray(h), requires_grad=True)
    head = torch.tensor(np.asarray(whole["base"]["head"]), requires_grad=True)
    each = expected(h_torch @ head, torch.tensor(np.asarray(targets)).long())
    total = (each * torch.tensor(np.asarray(weights))).sum()
    total.backward()
    assert_close((loss, dh, grads["base"]["head"]), (total.item(), h_torch.grad.numpy(), head.grad.numpy()))


@pytest.mark.parametrize(
    "settings",
    [*(pytest.param(s, marks=pytest.mark.slow) for s, _ in LOSSES.values()), dict(dft=True, z_loss=0.1)],
)
def test_both_ways_to_the_loss_agree_and_its_parts_add_up_in_packed_rows(settings):
    model, whole = tiny()
    objective, some = sft(model, **settings), examples(6)

    def by_outputs(whole, batch):
        return objective.loss(objective.forward(whole, batch, None, {}), {})

    @jax.jit
    def of_batch(whole, batch):
        return jax.value_and_grad(lambda whole: objective(whole, batch, None, {}), has_aux=True)(whole)

    single = one_by_one(some)
    one = of_batch(whole, single)
    assert_close(jax.jit(jax.value_and_grad(by_outputs, has_aux=True))(whole, single), one)
    weight = 1 / sum(len(ids) - prompt for ids, prompt in some)
    assert_close(of_batch(whole, batch_of([some[:3], some[3:]], 48, 40, weight)), one)
    (first, _), grads = of_batch(whole, jax.tree.map(lambda x: x[:3], single))
    (second, _), more = of_batch(whole, jax.tree.map(lambda x: x[3:], single))
    assert_close((first + second, jax.tree.map(jnp.add, grads, more)), (one[0][0], one[1]))


def test_a_batch_has_the_loss_of_transformers_label_smoother():
    model, whole = tiny()
    batch = one_by_one(examples(4))
    loss, found = sft(model, label_smoothing=0.2)(whole, batch, None, {})
    logits = model.logits(model.head(whole), model.hidden(whole, batch)[0])
    labels = np.full(batch.ids.shape, -100)
    rows, at = np.nonzero(np.asarray(batch.token_weights))
    labels[rows, np.asarray(batch.read)[rows, at]] = np.asarray(batch.targets)[rows, at]
    smoother = LabelSmoother(epsilon=0.2)
    expected = smoother({"logits": torch.tensor(np.asarray(logits)).float()}, torch.tensor(labels)).item()
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    plain = sft(model)(whole, batch, None, {})[1]
    assert metrics.as_floats(found)["nll_loss"] == pytest.approx(metrics.as_floats(plain)["loss"], rel=1e-12)


def test_held_out_rows_have_the_cross_entropy_and_no_noise():
    model, whole = tiny()
    batch, frozen = micro(one_by_one(examples(4)), 1), jax.tree.map(lambda _: None, whole)
    found = [
        metrics.as_floats(make_eval_step(objective)(whole, frozen, batch, {}))
        for objective in (sft(model), sft(model, label_smoothing=0.3, z_loss=1.0, neftune=50.0))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-12)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(label_smoothing=1.0), "label_smoothing=1.0; expected at least 0 and below 1"),
        (dict(z_loss=-1.0), "z_loss=-1.0; expected at least 0"),
        (dict(dft=True, label_smoothing=0.1), "set label_smoothing=0"),
        (dict(neftune=-1.0), "neftune must be finite and at least 0, got -1.0"),
    ],
)
def test_a_loss_out_of_range_is_one_line(settings, words):
    with pytest.raises(ValueError, match=words) as caught:
        sft(tiny()[0], **settings)
    assert "\n" not in str(caught.value)


def test_a_sweep_whose_first_member_has_no_label_smoothing_refuses_one_that_has():
    """Its loss needs fields whose gradient the shared forward pass would not have."""
    model, whole = tiny()
    batch = one_by_one(examples(4))
    outputs = sft(model).forward(whole, batch, None, {})
    for settings in (dict(label_smoothing=0.1), dict(z_loss=0.1)):
        with pytest.raises(ValueError, match="the sweep.s first member does not"):
            sft(model, **settings).loss(outputs, {})


def test_neftune_noise_is_uniform_and_as_large_as_the_paper_says():
    """alpha / sqrt(L D), with L the example's tokens: 3 and 5 in a packed row, and none at its padding."""
    width, alpha = 4000, 5.0
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2, 0, 0], [1] * 10], jnp.int32)
    noise = np.asarray(neftune_noise(jax.random.key(0), segments, width, alpha))
    for row, at, length in ((0, slice(0, 3), 3), (0, slice(3, 8), 5), (1, slice(0, 10), 10)):
        bound, part = alpha / np.sqrt(length * width), noise[row, at]
        assert np.abs(part).max() <= bound * (1 + 1e-6) and np.abs(part).max() > 0.999 * bound
        assert part.std() == pytest.approx(bound / np.sqrt(3), rel=0.02) and abs(part.mean()) < 0.02 * bound
    assert (noise[0, 8:] == 0).all() and noise[0, 0, 0] != noise[0, 1, 0] != noise[1, 0, 0]


def test_neftune_adds_its_noise_to_the_embeddings_in_training_only():
    """The hidden states with the noise are those of a table with a row of its own for every token, which has
    the noise in it.
    """
    model, whole = tiny()
    batch, key = one_by_one(examples(2)), jax.random.key(7)
    found = model.hidden(whole, batch, key, neftune=5.0)[0]
    assert_close(model.hidden(whole, batch, None, neftune=5.0)[0], model.hidden(whole, batch)[0])
    assert float(jnp.abs(found - model.hidden(whole, batch)[0]).max()) > 1e-3
    noise = neftune_noise(jax.random.fold_in(key, CONFIG.layers), batch.segments, D, 5.0)
    table = whole["base"]["embed"]
    rows = table[batch.ids] + noise.astype(table.dtype)
    ids = jnp.arange(batch.ids.size, dtype=jnp.int32).reshape(batch.ids.shape)
    own = {**whole, "base": {**whole["base"], "embed": rows.reshape(-1, D)}}
    assert_close(model.hidden(own, batch.__class__(**{**vars(batch), "ids": ids}))[0], found)


def test_losses_and_noise_on_a_mesh_are_those_of_one_device():
    model, whole = tiny()
    batch, key = one_by_one(examples(8)), jax.random.key(1)
    meshes = MeshShape(2, 2, 2), MeshShape(1, 2, 2, context=2)
    for mesh_shape, settings in zip(
        meshes, (dict(label_smoothing=0.1, z_loss=1e-2), dict(dft=True, neftune=5.0)), strict=True
    ):
        objective = sft(model, **settings)

        def loss(whole, batch, objective=objective):
            return jax.value_and_grad(lambda whole: objective(whole, batch, key, {})[0])(whole)

        expected = jax.jit(loss)(whole, batch)
        mesh = sharding.make_mesh(mesh_shape)
        with jax.set_mesh(mesh):
            own = jax.tree.map(lambda x: x[0], sharding.shard_batch(mesh, micro(batch, 1)))
            found = jax.jit(loss)(jax.device_put(whole, sharding.replicated(mesh)), own)
        assert_close(found, expected)
