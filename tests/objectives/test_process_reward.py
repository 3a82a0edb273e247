"""Process reward models: the loss of torch's cross-entropy of two labels, and where the score is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_model import CONFIG, examples, one_by_one, tiny

from jaxft.models import adapted
from jaxft.models.families.llama import llama
from jaxft.objectives import metrics
from jaxft.objectives.reward_model import StepOutputs, process_reward

pytestmark = pytest.mark.usefixtures("x64")


def test_the_loss_is_the_cross_entropy_of_two_labels_and_accuracies_count_right_and_wrong_steps():
    rng = np.random.default_rng(0)
    score, labels = rng.normal(0, 2, (3, 5)), rng.integers(0, 2, (3, 5))
    weight = rng.uniform(0, 1, (3, 5)) * (rng.uniform(0, 1, (3, 5)) > 0.3)
    outputs = StepOutputs(jnp.asarray(score), jnp.asarray(labels, jnp.int32), jnp.asarray(weight))
    value, found = process_reward(None).loss(outputs, {})
    logits = torch.stack([torch.zeros(15), torch.tensor(score.ravel())], 1)
    each = torch.nn.functional.cross_entropy(logits, torch.tensor(labels.ravel()), reduction="none")
    assert float(value) == pytest.approx(float((torch.tensor(weight.ravel()) * each).sum()), rel=1e-12)
    used, right = weight > 0, (score > 0) == labels
    reported = metrics.as_floats(found)
    assert reported["accuracy"] == pytest.approx(right[used].mean())
    for name, label in (("right", 1), ("wrong", 0)):
        where = used & (labels == label)
        assert reported[f"accuracy_{name}_steps"] == pytest.approx(right[where].mean())


def test_a_step_is_scored_at_its_last_token_and_losses_of_parts_add_up():
    with jax.numpy_dtype_promotion("standard"):
        _, whole = tiny(jnp.float64)
    model = adapted.with_scalar_head(llama(CONFIG, jnp.float64))
    rng = np.random.default_rng(1)
    params = {**whole["base"], "score": jnp.asarray(rng.normal(0, 0.3, (CONFIG.width, 1)))}
    batch = one_by_one(examples(4))
    labels = (batch.targets % 2).astype(jnp.int32)
    batch = batch.replace(targets=labels)
    objective = process_reward(model)
    out = objective.forward(params, batch, None, {})
    h = model.hidden(params, batch)[0]
    row, slot = np.argwhere(np.asarray(batch.token_weights) > 0)[3]
    expected = h[row, batch.read[row, slot]] @ params["score"][:, 0]
    assert float(out.score[row, slot]) == pytest.approx(float(expected), rel=1e-10)
    total = objective.loss(out, {})[0]
    half = (jnp.arange(4) < 2)[:, None]
    parts = [
        objective(params, batch.replace(token_weights=jnp.where(side, batch.token_weights, 0)), None, {})[0]
        for side in (half, ~half)
    ]
    assert float(sum(parts)) == pytest.approx(float(total), rel=1e-10)
