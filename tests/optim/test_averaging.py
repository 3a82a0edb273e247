"""The moving average and the schedule-free average of the weights, with every way to update them; LoRA+."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.optimizers import create_loraplus_optimizer
from tiny_model import assert_close

from jaxft.nn.param_spec import ParamSpec, full
from jaxft.optim.optimizer import Optim, freezable, make_optimizer, rate_groups
from jaxft.optim.rules import adamw, scale_groups, schedule_free_adamw
from jaxft.optim.schedules import constant_schedule, cosine_schedule
from jaxft.optim.update import StepInfo

SPECS = {
    "adapter": {"layers": {"a": ParamSpec((3, 4, 2), ("layers", "width", "rank"), full(0.0))}},
    "base": {
        "embed": ParamSpec((8, 4), ("vocab", "table_width"), full(0.0)),
        "layers": {"w": ParamSpec((3, 4, 6), ("layers", "width", "mlp"), full(0.0))},
    },
    "score": ParamSpec((4, 1), ("table_width", "score"), full(0.0)),
}
PLAIN = Optim(lr=0.1, clip=None, warmup=0.3, weight_decay=0.1, schedule=constant_schedule)
STEPS = 8


def random(seed):
    def leaf(s):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), len(s.axes)), s.shape)

    return jax.tree.map(leaf, SPECS, is_leaf=lambda s: isinstance(s, ParamSpec))


def path_of(optimizer, finite=None):
    """(parameters after each step, their averages) with random gradients; finite: of each step."""
    params, finite = random(99), finite or [True] * STEPS
    state, trained, averages = optimizer.init(params), [params], []
    update = jax.jit(optimizer.update)
    for i in range(STEPS):
        params, state = update(random(i), state, params, StepInfo(jnp.float64(1), jnp.array(finite[i])))
        trained.append(params)
        averages.append(params if optimizer.averaged is None else optimizer.averaged(state, params))
    return trained, averages


def made(settings, kind):
    """An optimizer that updates all at once, layer by layer, or policy and heads apart."""
    if kind == "freezable":
        return freezable(lambda specs: make_optimizer(settings, specs, STEPS), SPECS)
    return make_optimizer(replace(settings, layerwise=kind != "whole"), SPECS, STEPS)


KINDS = ("whole", "layerwise", "rows in pieces", "freezable")


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch, x64):
    if request.param == "rows in pieces":
        monkeypatch.setattr("jaxft.optim.layerwise.LARGE", 16)
        monkeypatch.setattr("jaxft.optim.layerwise.PIECE", 8)
    return request.param


def test_ema_is_the_average_of_the_weights_of_the_finite_steps(kind):
    finite = [i != 4 for i in range(STEPS)]
    trained, averages = path_of(made(replace(PLAIN, ema=0.6), kind), finite)
    assert_close(trained, path_of(made(PLAIN, kind), finite)[0])  # the training is the same
    expected, updates = trained[0], 0
    for i in range(STEPS):
        if finite[i]:
            updates += 1
            d = min(0.6, updates / (updates + 9))
            expected = jax.tree.map(lambda e, p, d=d: d * e + (1 - d) * p, expected, trained[i + 1])
        assert_close(averages[i], expected)


def test_schedule_free_is_algorithm_1_of_its_paper(kind):
    """Defazio et al. 2024: y_t = (1 - b) z_t + b x_t; z moves by RMSProp's direction, with weight decay at y;
    x averages z with weights lr_t^2.
    """
    settings = replace(PLAIN, optimizer=schedule_free_adamw, b1=0.8, b2=0.9)
    trained, averages = path_of(made(settings, kind))
    rate = constant_schedule(0.1, 0.1, round(0.3 * STEPS), STEPS)

    def of_leaf(path, start, grads, decay):
        z = x = np.asarray(start)
        nu, total = 0.0, 0.0
        for t in range(STEPS):
            lr, y = float(rate(t)), 0.2 * z + 0.8 * x
            np.testing.assert_allclose(y, path(trained[t]), rtol=1e-6, atol=1e-7)
            nu = 0.9 * nu + 0.1 * grads[t] ** 2
            z = z - lr * (grads[t] / (np.sqrt(nu / (1 - 0.9 ** (t + 1))) + 1e-8) + decay * y)
            total += lr**2
            x = x + lr**2 / total * (z - x)
            np.testing.assert_allclose(x, path(averages[t]), rtol=1e-5, atol=1e-7)

    for path in (lambda p: p["base"]["layers"]["w"], lambda p: p["base"]["embed"], lambda p: p["score"]):
        of_leaf(path, path(random(99)), [np.asarray(path(random(i))) for i in range(STEPS)], 0.1)


def test_an_average_of_bfloat16_weights_is_kept_in_float32_and_returned_as_they_are():
    optimizer = make_optimizer(replace(PLAIN, ema=0.9), SPECS, STEPS)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random(0))
    state = optimizer.init(params)
    info = StepInfo(jnp.float32(1), jnp.array(True), jax.random.key(0))
    params, state = jax.jit(optimizer.update)(params, state, params, info)
    floats = {str(x.dtype) for x in jax.tree.leaves(state) if x.dtype != jnp.int32}
    assert floats == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(optimizer.averaged(state, params))} == {"bfloat16"}


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(ema=1.0), "optim.ema=1.0; expected above 0 and below 1, or none"),
        (dict(optimizer=schedule_free_adamw, ema=0.9), "averages the weights; set optim.ema=none, got 0.9"),
        (dict(optimizer=schedule_free_adamw, schedule=cosine_schedule), "set optim.schedule=constant, got "),
        (dict(optimizer=schedule_free_adamw, b1=0.0), "optim.b1=0 is out of range for schedule_free_adamw"),
        (dict(lora_plus=0.0), "optim.lora_plus=0.0; expected above 0, or none"),
    ],
)  # fmt: skip
def test_averages_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make_optimizer(replace(PLAIN, **settings), SPECS, STEPS)


def test_a_pattern_of_lr_groups_comes_before_lora_plus(x64):
    pair = {x: ParamSpec((4, 2), ("width", "rank"), full(0.0)) for x in "ab"}
    specs = {"adapter": {"k": pair, "q": pair}}
    params = jax.tree.map(lambda s: jnp.ones(s.shape), specs, is_leaf=lambda s: isinstance(s, ParamSpec))

    def moved(**settings):
        optimizer = make_optimizer(replace(PLAIN, warmup=0.0, **settings), specs, STEPS)
        new, _ = optimizer.update(
            params, optimizer.init(params), params, StepInfo(jnp.float64(1), jnp.array(True))
        )
        return jax.tree.map(lambda a, b: (a - b)[0, 0], new, params)

    found = jax.tree.map(lambda a, b: a / b, moved(lr_groups=((".*/k/.*", 3.0),), lora_plus=16.0), moved())
    assert_close(found, {"adapter": {"k": {"a": 3.0, "b": 3.0}, "q": {"a": 1.0, "b": 16.0}}})


def test_a_pattern_of_lr_groups_may_match_only_heads_or_only_the_policy():
    def moved(**settings):
        o = replace(PLAIN, optimizer=optax.sgd, weight_decay=0.0, warmup=0.0, **settings)
        optimizer = freezable(lambda specs: make_optimizer(o, specs, STEPS, SPECS), SPECS)
        params, info = random(0), StepInfo(jnp.float32(1), jnp.array(True))
        new, _ = optimizer.update(params, optimizer.init(params), params, info)
        return jax.tree.map(lambda a, b: float((a - b).ravel()[0]), new, params)

    plain, factors = moved(), {"adapter/.*": 2.0, "score": 3.0}
    scaled = moved(lr_groups=tuple(factors.items()))
    ratios = {name: jax.tree.map(lambda a, b: a / b, scaled[name], plain[name]) for name in plain}
    expected = {"adapter": {"layers": {"a": 2.0}}, "base": {"embed": 1.0, "layers": {"w": 1.0}}, "score": 3.0}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), ratios, expected)
    with pytest.raises(ValueError, match="optim.lr_groups: 'critic/.*' matches none of 4 parameters"):
        moved(lr_groups=(("critic/.*", 2.0),))


def test_lora_plus_is_pefts_optimizer(x64):
    """PEFT's groups for torch's AdamW: b moves at 16 times the rate of a, also its decay."""
    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 6)).double(), LoraConfig(r=2, target_modules=["0"])
    )
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    a, b = (next(p for n, p in weights.items() if f"lora_{x}" in n) for x in "AB")
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=0.02, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    specs = {"adapter": {"q": {"a": ParamSpec((4, 2), ("width", "rank"), full(0.0)),
                               "b": ParamSpec((2, 6), ("rank", "heads"), full(0.0))}}}  # fmt: skip
    settings = replace(PLAIN, lr=0.02, warmup=0.0, optimizer=adamw, lora_plus=16.0)
    ours = make_optimizer(settings, specs, STEPS)
    params = {
        "adapter": {"q": {"a": jnp.asarray(a.detach().numpy().T), "b": jnp.asarray(b.detach().numpy().T)}}
    }
    state = ours.init(params)
    for i in range(3):
        grads = {
            "a": np.sin(np.arange(8.0).reshape(4, 2) + i),
            "b": np.cos(np.arange(12.0).reshape(2, 6) + i),
        }
        a.grad, b.grad = (torch.tensor(g.T.copy()) for g in grads.values())
        theirs.step()
        info = StepInfo(jnp.float64(1), jnp.array(True))
        params, state = ours.update({"adapter": {"q": jax.tree.map(jnp.asarray, grads)}}, state, params, info)
    pair = params["adapter"]["q"]
    assert_close((pair["a"], pair["b"]), (a.detach().numpy().T, b.detach().numpy().T), 1e-8)


def test_lora_plus_of_embeddings_and_vectors_is_pefts(x64):
    """PEFT's groups: 1e-6 for both sides of the embeddings' pair, the ratio for magnitudes and norms."""
    parts = torch.nn.ModuleDict({"embed": torch.nn.Embedding(8, 4), "q": torch.nn.Linear(4, 6)})
    config = LoraConfig(r=2, target_modules=["embed", "q"], use_dora=True)
    model = inject_adapter_in_model(config, parts)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.02, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    expected = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    sides = {"a": ((4, 2), ("width", "rank")), "b": ((2, 6), ("rank", "heads"))}
    pair = {side: ParamSpec(*shape, full(0.0)) for side, shape in sides.items()}
    vector = {"magnitude": ParamSpec((3, 6), ("layers", "heads"), full(0.0))}
    norm = {"weight": ParamSpec((3, 4), ("layers", "width"), full(0.0))}
    head = {"weight": ParamSpec((4, 8), ("width", "vocab"), full(0.0))}
    specs = {"adapter": {"embed": pair, "q": {**pair, **vector}, "norm": norm, "head": head}}
    groups = rate_groups(replace(PLAIN, lr=0.02, lora_plus=16.0), specs)
    ones = jax.tree.map(lambda s: jnp.ones(s.shape), specs, is_leaf=lambda s: isinstance(s, ParamSpec))
    found, _ = scale_groups(groups, specs).update(ones, optax.EmptyState())
    found = jax.tree.map(lambda x: 0.02 * float(x.ravel()[0]), found)["adapter"]
    for path, name in {
        ("embed", "a"): "embed.lora_embedding_A.default",
        ("embed", "b"): "embed.lora_embedding_B.default",
        ("q", "a"): "q.lora_A.default.weight",
        ("q", "b"): "q.lora_B.default.weight",
        ("q", "magnitude"): "q.lora_magnitude_vector.default.weight",
    }.items():
        assert found[path[0]][path[1]] == pytest.approx(expected[name], rel=1e-12), path
    assert found["norm"]["weight"] == pytest.approx(0.32) and found["head"]["weight"] == pytest.approx(0.02)
