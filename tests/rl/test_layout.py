"""Rows of a prompt and its completions, against each completion alone."""

import jax
import numpy as np
import tiny_model
from rl_completions import LENGTHS, random_completions

from jaxft.data.pack import RowShape
from jaxft.nn.lora import Adapter
from jaxft.objectives.policy import policy
from jaxft.objectives.policy_losses import clipped
from jaxft.rl.layout import pack_rollout, to_completions, to_microbatches, to_rows


def test_to_completions_inverts_to_rows():
    x = np.random.default_rng(1).normal(size=(6, 7)).astype(np.float32)
    mask = np.arange(7) < LENGTHS.reshape(6, 1)
    rows = to_rows(x, LENGTHS, 16)
    assert (rows[:, 10:] == 0).all() and (rows != 0).sum() == LENGTHS.sum()
    np.testing.assert_array_equal(to_completions(rows, LENGTHS, 7), np.where(mask, x, 0))


def test_a_row_of_several_completions_has_the_log_probs_of_each_alone(x64):
    model, params = tiny_model.tiny(adapter=Adapter(rank=2))
    prompts, tokens = random_completions(LENGTHS)
    objective = policy(model, clipped, temperature=0.7)
    rows = pack_rollout(prompts, tokens, LENGTHS, RowShape(32, 16))
    logps = to_completions(np.asarray(objective.score(params, rows, {}).logps), LENGTHS, 7)
    for g, prompt in enumerate(prompts.ids):
        for n, count in enumerate(LENGTHS[g]):
            if not count:
                continue
            text = np.array([*prompt, *tokens[g, n, :count]])
            alone = tiny_model.batch_of([[(text, len(prompt))]], 16, 8, 1.0)
            logits = model.logits(model.head(params), model.hidden(params, alone))[0] / 0.7
            expected = jax.nn.log_softmax(logits)[
                np.arange(len(prompt) - 1, len(text) - 1), text[len(prompt) :]
            ]
            np.testing.assert_allclose(logps[g * 3 + n][:count], expected, rtol=1e-10)


def test_microbatches_are_padded_with_empty_rows():
    prompts, tokens = random_completions(LENGTHS)
    rows = pack_rollout(prompts, tokens, LENGTHS, RowShape(32, 16))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, 4, x.shape[-1]), x.dtype), rows)
    batch = to_microbatches(rows, like, padding=3)
    assert jax.tree.map(np.shape, batch) == jax.tree.map(lambda s: s.shape, like)
    for i in range(2):
        np.testing.assert_array_equal(batch.ids[i, 0], rows.ids[i])
        assert not batch.segments[i, 1:].any() and (batch.responses[i, 1:] == 3).all()
