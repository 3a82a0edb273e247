"""Reward models: transformers' rewards, Bradley-Terry of torch, laws of the objective, heads on one base."""

import json
import time
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_batches import assert_same, laid, loss_gradients_metrics, micro, random_pairs
from tiny_llama import tiny_torch, write_folder
from tiny_model import CONFIG, assert_close, tiny

from jaxft.batch import Tokens
from jaxft.distributed import sharding
from jaxft.distributed.sharding import MeshShape, make_mesh
from jaxft.models.adapted import HeadSettings, adapted, view, with_heads, with_scalar_head
from jaxft.models.families.llama import llama
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import Quant, dequantize, is_qtensor
from jaxft.objectives import metrics
from jaxft.objectives.reward_model import Outputs, bradley_terry, reward
from jaxft.rl import reward_models
from jaxft.train import trainable_params
from jaxft.weights import initial_params, pretrained

SETTINGS = Adapter(rank=2, alpha=4.0, targets=("q", "v", "down"))
TRAINED = "adapter/.*/[ab]|score"


def one_device():
    return make_mesh(MeshShape(), jax.devices()[:1])


def tiny_classifier(seed=0, **changes):
    """A random LlamaForSequenceClassification with the weights of tiny_torch."""
    import torch
    from transformers import LlamaForSequenceClassification

    body = tiny_torch(seed)
    config = body.config.__class__(
        **{**body.config.to_dict(), "num_labels": 1, "pad_token_id": 257, **changes}
    )
    config.architectures = None
    model = LlamaForSequenceClassification(config).eval()
    model.model.load_state_dict(body.model.state_dict())
    with torch.no_grad():
        model.score.weight.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    model = tiny_classifier()
    return model, write_folder(tmp_path_factory.mktemp("classifier"), model)


def in_torch(model, ids):
    """The score of one sequence without padding."""
    import torch

    with torch.no_grad():
        return float(model(torch.tensor(np.asarray(ids)[None], dtype=torch.long)).logits[0, 0])


def scorer_model(adapter=SETTINGS, dtype=jnp.float64, **options):
    """The tiny Llama with a scalar head and an adapter that matters, and a random tree for it."""
    with jax.numpy_dtype_promotion("standard"):
        _, whole = tiny(dtype, adapter, **options)
    model = adapted(with_scalar_head(llama(CONFIG, dtype)), adapter)
    score = jax.random.normal(jax.random.key(5), (CONFIG.width, 1), whole["base"]["final_norm"].dtype)
    base = {name: x for name, x in whole["base"].items() if name != "head"}
    return model, {**whole, "base": base, "score": score}


def mask_of(whole, pattern=TRAINED):
    return tree.mask_by_path(whole, pattern)


# ---- parity


@pytest.mark.parametrize("branches", [True, False], ids=["branches", "plain"])
def test_responses_have_the_scores_of_transformers_at_their_last_token(classifier, branches):
    torch_model, folder = classifier
    loaded = reward_models.load_reward_model(str(folder), one_device(), dtype=jnp.float32)
    pool = random_pairs(9, longest=4)  # answers of one token too
    batch = laid(pool, branches=branches)
    assert 1 in batch.lengths and (batch.branches is not None) == branches
    seen = reward(loaded.model).forward(loaded.params, jax.tree.map(jnp.asarray, batch), None, {})
    for (row, slot), pair in np.ndenumerate(batch.index):
        for kind, found in ((1, seen.chosen), (2, seen.rejected)) if pair >= 0 else ():
            target = in_torch(torch_model, np.concatenate([pool.piece(pair, 0), pool.piece(pair, kind)]))
            assert float(found[row, slot]) == pytest.approx(target, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("side", ["front", "behind"])
def test_a_classifiers_folder_gives_the_scores_of_transformers_for_padded_rows(classifier, side):
    torch_model, folder = classifier
    loaded = reward_models.load_reward_model(str(folder), one_device(), dtype=jnp.float32)
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, 256, n) for n in (12, 1, 7)]
    ids, segments, positions = (np.zeros((3, 12), np.int32) for _ in range(3))
    for row, text in enumerate(texts):
        at = slice(12 - len(text), 12) if side == "front" else slice(0, len(text))
        ids[row, at], segments[row, at], positions[row, at] = text, 1, np.arange(len(text))
    tokens = Tokens(ids, segments, positions, None, None, None)
    found = jax.jit(loaded.score)(loaded.params, tokens)
    assert found.shape == (3,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, [in_torch(torch_model, text) for text in texts], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_4_bit_classifier_scores_as_its_dequantised_weights(classifier):
    torch_model, folder = classifier
    loaded = reward_models.load_reward_model(
        str(folder), one_device(), quant=Quant("nf4", 32), dtype=jnp.float32
    )
    assert (
        loaded.params["base"]["layers"]["attn"]["q"].kind == "nf4"
        and loaded.params["score"].dtype == jnp.float32
    )
    ids = np.arange(20, dtype=np.int32)[None]
    tokens = Tokens(ids, np.ones_like(ids), ids, None, None, None)
    expanded = jax.tree.map(
        lambda x: dequantize(x) if is_qtensor(x) else x, loaded.params, is_leaf=is_qtensor
    )
    found, target = (float(loaded.score(params, tokens)[0]) for params in (loaded.params, expanded))
    assert found == pytest.approx(target, rel=1e-5) and abs(found - in_torch(torch_model, ids[0])) > 1e-3


def test_bradley_terry_margin_and_centre_have_the_value_and_gradient_of_torch(x64):
    import torch

    rng = np.random.default_rng(0)
    chosen, rejected, margin = (rng.normal(0, 3, (3, 4)) for _ in range(3))
    weight = rng.uniform(0, 1, (3, 4)) * (rng.uniform(0, 1, (3, 4)) > 0.3)
    pool = laid(random_pairs(4))

    def ours(chosen, rejected):
        batch = pool.replace(
            pair_weights=weight, columns={"margin": margin}, lengths=np.ones((3, 4, 2), np.int32)
        )
        return reward(None, "margin", 0.05).loss(Outputs({"chosen": chosen, "rejected": rejected}, batch), {})

    (value, found), grads = jax.value_and_grad(ours, (0, 1), has_aux=True)(
        jnp.asarray(chosen), jnp.asarray(rejected)
    )
    c, r = (torch.tensor(x, requires_grad=True) for x in (chosen, rejected))
    each = -torch.log(torch.sigmoid(c - r - torch.tensor(margin))) + 0.05 * (c + r) ** 2
    total = (torch.tensor(weight) * each).sum()
    total.backward()
    np.testing.assert_allclose(value, total.item(), rtol=1e-12)
    for ours_, theirs in zip(grads, (c.grad, r.grad), strict=True):
        np.testing.assert_allclose(ours_, theirs, rtol=1e-10, atol=1e-15)
    used, reported = weight > 0, metrics.as_floats(found)
    both = np.concatenate([chosen[used], rejected[used]])
    assert reported["accuracy"] == pytest.approx((chosen > rejected)[used].mean())
    assert reported["margin"] == pytest.approx((chosen - rejected)[used].mean())
    assert [reported[f"{name}_reward"] for name in ("min", "mean", "max")] == pytest.approx(
        [both.min(), both.mean(), both.max()]
    )


def test_far_margins_stay_finite():
    far = jnp.asarray([[-1e4, 1e4]], jnp.float32)
    zero = jnp.zeros_like(far)
    value, pull = jax.vjp(lambda x: bradley_terry(x, zero, zero), far)
    assert value.tolist() == [[1e4, 0]] and pull(jnp.ones_like(far))[0].tolist() == [[-1, 0]]


def test_a_tie_has_loss_log_2_and_counts_half_and_ties_alone_have_no_accuracy():
    batch = laid(random_pairs(4))
    same, used = jnp.ones(batch.pair_weights.shape), batch.pair_weights > 0
    value, found = reward(None).loss(Outputs({"chosen": same, "rejected": same}, batch), {})
    assert float(value) == pytest.approx(np.log(2), rel=1e-6)
    assert "accuracy" not in metrics.as_floats(found) and metrics.pair_counts(found) == {"accuracy_pairs": 4}
    first = np.flatnonzero(used.ravel())[0]
    one_won = same.ravel().at[first].add(1).reshape(same.shape)
    _, found = reward(None).loss(Outputs({"chosen": one_won, "rejected": same}, batch), {})
    assert metrics.as_floats(found)["accuracy"] == pytest.approx((1 + 3 / 2) / 4)


def test_a_ranking_has_the_mean_over_its_pairs_without_ties_and_missing_responses():
    kinds = ("chosen", "rejected", "rank_2")
    rewards = {"chosen": 2.0, "rank_2": 0.5, "rejected": -1.0}
    scores = {"chosen": [5.0, 4.0, 3.0], "rank_2": [3.0, 4.0, 0.0], "rejected": [1.0, 0.0, 1.0]}
    lengths = np.ones((1, 3, 3), np.int32)
    lengths[0, 2, 2] = 0  # the third row has only two responses
    batch = laid(random_pairs(4)).replace(
        pair_weights=np.full((1, 3), 1 / 3, np.float32),
        columns={f"score_{kind}": np.array([x], np.float32) for kind, x in scores.items()},
        lengths=lengths,
        kinds=kinds,
    )

    def expected(ahead):
        rows = [["chosen rank_2", "chosen rejected", "rank_2 rejected"]]  # the second row's best two are tied
        rows += [["chosen rejected", "rank_2 rejected"], ["chosen rejected"]]
        each = [
            np.mean(
                [np.log1p(np.exp(-(rewards[a] - rewards[b] - ahead(a, b, i)))) for a, b in map(str.split, r)]
            )
            for i, r in enumerate(rows)
        ]
        return np.mean(each)

    outputs = Outputs({kind: jnp.full((1, 3), x, jnp.float32) for kind, x in rewards.items()}, batch)
    plain, rated = (reward(None, margin).loss(outputs, {})[0] for margin in (None, "score"))
    assert float(plain) == pytest.approx(expected(lambda a, b, i: 0), rel=1e-6)
    assert float(rated) == pytest.approx(expected(lambda a, b, i: scores[a][i] - scores[b][i]), rel=1e-6)


# ---- laws


def objectives():
    return partial(reward, margin="margin", center=0.02)


@cache
def setting():
    """(objective, parameters, which of them are trained), one for all tests, so that they share programs."""
    model, whole = scorer_model()
    return objectives()(model), whole, mask_of(whole)


def test_the_objective_is_linear_in_the_weights_and_a_sum_over_microbatches(x64):
    objective, whole, mask = setting()
    batch = laid(random_pairs(9))
    one = loss_gradients_metrics(objective, whole, mask, micro(batch, 1), {})
    assert np.abs(one[1]["score"]).max() > 1e-4 and one[0] != 0
    assert_same(loss_gradients_metrics(objective, whole, mask, micro(batch, 4), {}), one)
    doubled = loss_gradients_metrics(
        objective, whole, mask, micro(batch.replace(pair_weights=2 * batch.pair_weights), 1), {}
    )
    assert_close(doubled[1], jax.tree.map(lambda x: 2 * x, one[1]))


def test_shared_prompts_have_the_rewards_of_plain_rows(x64):
    objective, whole, mask = setting()
    pool = random_pairs(9)
    found = [
        loss_gradients_metrics(objective, whole, mask, micro(laid(pool, branches=branches), 1), {})
        for branches in (True, False)
    ]
    assert_same(*found)


def test_empty_slots_and_pairs_of_weight_zero_change_nothing(x64):
    objective, whole, mask = setting()
    pool = random_pairs(12)
    used = np.arange(12) % 3 > 0
    some, nothing = (laid(pool, who, room=(96, 80, 6)) for who in (np.flatnonzero(used), []))
    target = loss_gradients_metrics(objective, whole, mask, micro(some, 1), {})
    muted = laid(pool, weights=pool.weights * used, room=(96, 80, 6))
    assert (muted.pair_weights[muted.index >= 0] == 0).sum() == 4
    assert_same(loss_gradients_metrics(objective, whole, mask, micro(muted, 1), {}), target)
    padded = jax.tree.map(lambda *x: np.concatenate(x)[None], some, nothing)
    assert_same(loss_gradients_metrics(objective, whole, mask, padded, {}), target)
    ones = jnp.ones(nothing.pair_weights.shape)
    value, found = objective.loss(Outputs({"chosen": ones, "rejected": 2 * ones}, nothing), {})
    assert value == 0 and "accuracy" not in metrics.as_floats(found)


@pytest.mark.quick_cases("context 2")
@pytest.mark.parametrize(
    "mesh", [MeshShape(1, 2, 2, context=2), MeshShape(2, 2, 2)], ids=["context 2", "2x2x2"]
)
def test_a_mesh_has_the_loss_and_gradients_of_one_device(mesh):
    with jax.enable_x64(True):
        model, whole = scorer_model(Adapter(rank=4, targets=("q", "o", "down")))
        batch, mask = micro(laid(random_pairs(16), rows=8, room=(72, 48, 4)), 1), mask_of(whole)
        target = loss_gradients_metrics(objectives()(model), whole, mask, batch, {})
        laid_out = make_mesh(mesh)
        with jax.set_mesh(laid_out):
            spread = jax.tree.map(jax.device_put, whole, param_spec.shardings(model.specs, laid_out))
            found = loss_gradients_metrics(
                objectives()(model), spread, mask, sharding.shard_batch(laid_out, batch), {}
            )
        assert_same(found, target)


def test_a_column_that_the_batch_lacks_and_a_negative_centre_are_refused():
    batch = laid(random_pairs(4))
    zero = jnp.zeros(batch.pair_weights.shape)
    with pytest.raises(
        ValueError,
        match="margin=ahead: the pairs have no such column .available: margin.. Add data.extras=ahead",
    ):
        reward(None, "ahead").loss(Outputs({"chosen": zero, "rejected": zero}, batch), {})
    with pytest.raises(ValueError, match="center=-1: expected a finite number of at least 0"):
        reward(None, center=-1)
    with pytest.raises(ValueError, match="no scalar head"):
        model, whole = tiny(jnp.float32)
        reward(model).forward(whole, jax.tree.map(jnp.asarray, batch), None, {})


# ---- one base, many models


OTHER_HEADS = {
    "critic": HeadSettings(SETTINGS),
    "judge": HeadSettings(Adapter(rank=3, targets=("o",)), trained=False),
    "value": HeadSettings(),
}


def test_heads_on_a_base_are_trained_or_frozen_by_name():
    model = with_heads(llama(CONFIG, jnp.float32), OTHER_HEADS)
    t = trainable_params.partition_params(
        model, SETTINGS, trainable_params.trainable_patterns(model, SETTINGS, None, OTHER_HEADS)
    )
    mask = tree.paths(t.mask)
    assert {path.split("/")[0] for path, m in mask.items() if m} == {"adapter", "critic", "value"}
    assert (
        not any(m for path, m in mask.items() if path.endswith("/scale"))
        and not mask["judge/score"]
        and mask["value/score"]
    )
    own = trainable_params.partition_params(
        model, SETTINGS, trainable_params.trainable_patterns(model, SETTINGS, "base/final_norm", OTHER_HEADS)
    )
    assert {p.split("/")[0] for p, m in tree.paths(own.mask).items() if m} == {"base", "critic", "value"}
    everything = trainable_params.partition_params(model, SETTINGS, None)  # nothing said of who is frozen
    assert tree.paths(everything.mask)["judge/score"]
    with pytest.raises(ValueError, match="matches none"):
        trainable_params.partition_params(
            model, SETTINGS, trainable_params.trainable_patterns(model, SETTINGS, "no/such/path", OTHER_HEADS)
        )
    assert "critic/adapter/layers/attn/q/a" in trainable_params.parameter_table(
        t
    ) and "value/score" in trainable_params.parameter_table(t)


@pytest.mark.slow
def test_each_head_on_a_base_equals_the_one_alone(x64):
    base = llama(CONFIG, jnp.float64)
    model = adapted(with_heads(base, {"critic": HeadSettings(SETTINGS)}), SETTINGS)
    alone, whole = scorer_model()
    with jax.numpy_dtype_promotion("standard"):
        language, policy = tiny(jnp.float64, SETTINGS)
    whole = {
        **policy,
        "critic": {"adapter": jax.tree.map(lambda x: 2 * x, whole["adapter"]), "score": whole["score"]},
    }
    assert jax.tree.structure(whole) == jax.tree.structure(model.specs, is_leaf=param_spec.is_spec)
    batch = jax.tree.map(jnp.asarray, laid(random_pairs(4)))
    np.testing.assert_array_equal(model.hidden(whole, batch)[0], language.hidden(policy, batch)[0])
    critic = view(whole, "critic")
    h = model.hidden(critic, batch)[0]
    target = alone.scores({"score": critic["score"]}, alone.hidden(critic, batch)[0])
    np.testing.assert_array_equal(model.scores(critic, h), target)
    assert np.abs(h - model.hidden(whole, batch)[0]).max() > 1e-3


@pytest.mark.slow
def test_a_head_on_a_base_replaces_the_rows_of_its_own_tokens(x64):
    base, batch = llama(CONFIG, jnp.float64), jax.tree.map(jnp.asarray, laid(random_pairs(4)))
    counts = np.bincount(np.asarray(batch.ids).ravel(), minlength=CONFIG.vocab)
    one, other, third = (int(i) for i in np.argsort(-counts)[:3])
    policy = Adapter(rank=2, targets=("q",), trainable_token_indices=(one, other))
    own = Adapter(targets=(), trainable_token_indices=(third,))
    scorers = {"critic": HeadSettings(own), "value": HeadSettings()}
    model = adapted(with_heads(base, scorers), policy)
    with jax.numpy_dtype_promotion("standard"):
        whole = param_spec.init_params(model.specs, jax.random.key(0), jnp.float64)
    row = whole["critic"]["adapter"]["embed"]["rows"]
    table = whole["base"]["embed"].at[third].set(row[0])
    found = model.hidden(view(whole, "critic"), batch)[0]
    np.testing.assert_array_equal(found, base.hidden({**whole["base"], "embed": table}, batch)[0])
    plain = base.hidden(whole["base"], batch)[0]
    np.testing.assert_array_equal(model.hidden(view(whole, "value"), batch)[0], plain)
    assert min(np.abs(model.hidden(whole, batch)[0] - x).max() for x in (found, plain)) > 1e-3
    assert np.abs(found - plain).max() > 1e-3


def test_names_that_are_taken_and_adapters_on_a_head_are_refused():
    model = llama(CONFIG, jnp.float32)
    with pytest.raises(ValueError, match="a head cannot be named 'base', because the run's parameters"):
        with_heads(model, {"base": HeadSettings()})
    with pytest.raises(ValueError, match="cannot target the language model head"):
        with_heads(model, {"critic": HeadSettings(Adapter(targets=("head",)))})
    with pytest.raises(ValueError, match="adapter.modules_to_save includes the language model head"):
        adapted(with_scalar_head(model), Adapter(targets=("q", "head")))
    with pytest.raises(ValueError, match="'score' is not a module of this model"):
        adapted(model, Adapter(modules_to_save=("score",)))
    tokens = Adapter(targets=(), trainable_token_indices=(1,))
    with pytest.raises(ValueError, match="adapter.rank_pattern has no effect without adapter.targets"):
        adapted(model, replace(tokens, rank_pattern=(("q", 2),)))
    with pytest.raises(ValueError, match="adapter.token_head=false: this model has no head of its own"):
        adapted(with_scalar_head(model), replace(tokens, token_head=False))
    with pytest.raises(ValueError, match="a scalar head in place of the language model head"):
        with_scalar_head(model).logits({}, None)


def test_fresh_heads_do_not_change_the_policys_initialisation():
    mesh, model = one_device(), llama(CONFIG, jnp.float32)
    plain = trainable_params.partition_params(model, SETTINGS, None)
    other_heads = {"critic": HeadSettings(SETTINGS)}
    with_critic = trainable_params.partition_params(with_heads(model, other_heads), SETTINGS, None)
    alone = initial_params.init_all_but_base(plain.model, mesh, 3, HeadSettings(SETTINGS))
    both = initial_params.init_all_but_base(
        with_critic.model, mesh, 3, HeadSettings(SETTINGS), scorers=other_heads
    )
    jax.tree.map(np.testing.assert_array_equal, both["adapter"], alone["adapter"])
    a = lambda x: np.asarray(x["layers"]["attn"]["q"]["a"])  # noqa: E731
    assert (a(both["critic"]["adapter"]) != a(both["adapter"])).all() and both["critic"]["score"].std() > 0.01
    judge = {"judge": HeadSettings(SETTINGS, trained=False)}
    with pytest.raises(ValueError, match="a frozen scorer needs the folder of a reward model"):
        frozen = trainable_params.partition_params(with_heads(model, judge), SETTINGS, None)
        initial_params.init_all_but_base(frozen.model, mesh, 3, HeadSettings(SETTINGS), scorers=judge)


# ---- folders that are no reward model


def test_anything_but_a_classifier_with_one_label_is_refused(classifier, tmp_path):
    _, folder = classifier
    with pytest.raises(
        ValueError, match="a sequence classifier, which generates no text; use a language model"
    ):
        pretrained.open_params(str(folder), pretrained.model_for(str(folder)))
    language = write_folder(tmp_path / "language", tiny_torch())
    with pytest.raises(ValueError, match="got LlamaForCausalLM, expected a sequence classifier"):
        reward_models.load_reward_model(str(language), one_device())
    three = write_folder(tmp_path / "three", tiny_classifier(num_labels=3))
    with pytest.raises(ValueError, match="the classifier has 3 labels"):
        reward_models.load_reward_model(str(three), one_device())
    two = write_folder(tmp_path / "two", tiny_classifier(num_labels=2))
    with pytest.raises(ValueError, match="the classifier has 2 labels"):
        reward_models.load_reward_model(str(two), one_device())
    headless = write_folder(tmp_path / "headless", tiny_torch())
    (headless / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match="score.weight, the head of a classifier, is missing"):
        reward_models.load_reward_model(str(headless), one_device())


def test_a_padding_id_is_a_token_id_or_none(classifier, tmp_path):
    """It is compared with the ids of texts, so that -1 and ids beyond the vocabulary, which files have, pad
    nothing. Nor is a null searched for among all ids, which takes a minute.
    """
    config, begin = json.loads((classifier[1] / "config.json").read_text()), time.monotonic()
    for written, pad in ((-1, None), (1 << 40, None), (None, None), (320, 320), (7, 7)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": written}))
        assert reward_models.pad_token_of(str(tmp_path)) == pad
    assert time.monotonic() - begin < 5
    for written in ("x" * 99, [7], True, 7.0):
        (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": written}))
        with pytest.raises(ValueError, match=r"pad_token_id=.{1,60} in config.json is no token id. Set"):
            reward_models.pad_token_of(str(tmp_path))
