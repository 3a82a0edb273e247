"""Adapters: PEFT's initialisation and sizes, targets, attaching, merging, and the gradients of the fused
matmul.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from merged_arrays import merged_arrays
from tiny_model import CONFIG, assert_close, examples, one_by_one, tiny

from jaxft.models.adapted import adapted
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.models.model_types import FAMILIES
from jaxft.nn import param_spec, tree
from jaxft.nn.adapters.lora import Adapted, Adapter, attach, target_paths
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.matmul import dropout, linear, lora_matmul
from jaxft.nn.quant import dequantize, quantize
from jaxft.objectives.sft import sft

KERNELS = ["layers/attn/q", "layers/attn/k", "layers/attn/v", "layers/attn/o"]
KERNELS += ["layers/mlp/gate", "layers/mlp/up", "layers/mlp/down"]
SPECS = llama(CONFIG).specs
TIED = llama(LlamaConfig(**{**CONFIG.__dict__, "tied": True})).specs
SOME = Adapter(rank=3, alpha=5.0, targets=("q", "k", "o", "gate", "down", "head"))


def logits(model, whole, batch):
    return jax.jit(lambda whole: model.logits(model.head(whole), model.hidden(whole, batch)[0]))(whole)


# Initialisation


def test_a_is_kaiming_uniform_and_b_is_zero():
    settings = Adapter(rank=64, alpha=16.0)
    fresh = param_spec.init_params(adapter_specs(SPECS, settings), jax.random.key(0))
    for path, x in tree.paths(fresh).items():
        kernel, _, name = path.rpartition("/")
        if name == "scale":
            np.testing.assert_array_equal(x, np.full(CONFIG.layers, 0.25))
        elif name == "b":
            assert not np.any(x)
        else:
            bound = (
                param_spec.spec_paths(SPECS)[kernel].shape[-2] ** -0.5
            )  # kaiming_uniform_(a=sqrt(5)): sqrt(6 / 6 fan_in)
            assert 0.98 * bound < np.abs(x).max() <= bound
            assert np.std(x) == pytest.approx(bound / 3**0.5, rel=0.03) and abs(np.mean(x)) < 0.03 * bound


def test_initialisation_and_sizes_equal_peft():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from tiny_llama import tiny_torch

    for names in (["q_proj", "v_proj"], "all-linear", ["k_proj", "down_proj", "lm_head"]):
        theirs = tiny_torch()
        specs = llama(FAMILIES["llama"].from_hf(theirs.config.to_dict())).specs
        wrapped = peft.get_peft_model(
            theirs, peft.LoraConfig(r=64, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM")
        )
        settings = Adapter(rank=64, alpha=8.0, targets=names if isinstance(names, str) else tuple(names))
        ours = adapter_specs(specs, settings)
        scales = sum(
            s.shape[0] if s.shape else 1
            for p, s in param_spec.spec_paths(ours).items()
            if p.endswith("scale")
        )
        assert param_spec.count_params(ours) - scales == wrapped.get_nb_trainable_parameters()[0]
    a = next(p for name, p in wrapped.named_parameters() if "layers.0.mlp.down_proj.lora_A" in name).detach()
    fresh = tree.paths(param_spec.init_params(ours, jax.random.key(0)))
    mine = fresh["layers/mlp/down/a"][0]
    assert mine.shape == a.T.shape and np.std(mine) == pytest.approx(float(torch.std(a)), rel=0.05)
    assert np.abs(mine).max() == pytest.approx(float(a.abs().max()), rel=0.02)


def test_parameters_per_layer_are_rank_times_in_plus_out():
    for rank in (1, 5):
        for path, spec in param_spec.spec_paths(SPECS).items():
            if path in KERNELS:
                found = adapter_specs(SPECS, Adapter(rank=rank, targets=(path.rsplit("/", 1)[-1],)))
                size_in, size_out = spec.shape[-2:]
                assert param_spec.count_params(found) == CONFIG.layers * (rank * (size_in + size_out) + 1)


@pytest.mark.parametrize("rslora, scale", [(False, 32.0 / 16), (True, 32.0 / 4)])
def test_the_scale_is_alpha_over_rank_or_its_square_root(rslora, scale):
    settings = Adapter(rank=16, alpha=32.0, rslora=rslora)
    assert settings.scale == scale
    start = param_spec.init_params(adapter_specs(SPECS, settings), jax.random.key(0))
    assert set(np.asarray(start["layers"]["attn"]["q"]["scale"])) == {scale}


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}], ids=str)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"adapter.{next(iter(wrong))}=.*; expected at least"):
        Adapter(**wrong)


# Targets


@pytest.mark.parametrize(
    "targets, paths",
    [
        ("all-linear", KERNELS),
        (("q", "down"), ["layers/attn/q", "layers/mlp/down"]),
        (("down_proj", "q_proj"), ["layers/attn/q", "layers/mlp/down"]),
        (("lm_head",), ["head"]),
        ("q", ["layers/attn/q"]),
        ("gate_proj", ["layers/mlp/gate"]),
        ("lm_head", ["head"]),
        (("v", "head"), ["layers/attn/v", "head"]),
        (r"layers/attn/.*", KERNELS[:4]),
        (r".*(up|head)", ["layers/mlp/up", "head"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("specs", [SPECS, TIED], ids=["untied", "tied"])
def test_targets_select_kernels(targets, paths, specs):
    assert sorted(target_paths(specs, targets)) == sorted(paths)
    found = {
        p.rpartition("/")[0] for p in param_spec.spec_paths(adapter_specs(specs, Adapter(targets=targets)))
    }
    assert found == set(paths)


@pytest.mark.parametrize(
    "targets, says",
    [
        ("q_prj", "adapter.targets: 'q_prj' is not a linear layer; near: q_proj"),
        (("q_prj",), "adapter.targets: 'q_prj' is not a linear layer; near: q_proj"),
        (("q", "gat"), "adapter.targets: 'gat' is not a linear layer; near: gate"),
        (("final_norm",), "adapter.targets: 'final_norm' is not a linear layer; near: "),
        (("attn_norm",), "adapter.targets: 'attn_norm' is not a linear layer; near: "),
        (
            "layers/mixer/.*",
            "adapter.targets='layers/mixer/.*' matches no kernel; the paths are layers/attn/",
        ),
        (".*q_proj", "adapter.targets='.*q_proj' matches no kernel; the paths are layers/attn/"),
    ],
    ids=str,
)
def test_unknown_targets_are_reported_with_near_misses(targets, says):
    with pytest.raises(ValueError) as error:
        target_paths(SPECS, targets)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


@pytest.mark.parametrize("targets", ["layers/attn/[q", ()], ids=["broken regex", "nothing"])
def test_targets_that_cannot_select_are_refused(targets):
    with pytest.raises(ValueError, match="adapter.targets"):
        target_paths(SPECS, targets)


# Attaching and merging


@pytest.mark.quick_cases("untied*")
@pytest.mark.parametrize(
    "tied, dtype", [(False, jnp.float32), (True, jnp.bfloat16)], ids=["untied-float32", "tied-bfloat16"]
)
def test_a_fresh_adapter_and_no_adapter_equal_the_base_bit_for_bit(tied, dtype):
    model, whole = tiny(dtype, SOME, tied)
    batch = one_by_one(examples(4))
    plain, _ = tiny(dtype, None, tied)
    base = {"base": jax.tree.map(lambda x: x.astype(dtype), whole["base"])}
    expected = logits(plain, base, batch)
    assert np.std(np.asarray(expected, np.float32)) > 0.1
    np.testing.assert_array_equal(logits(model, base, batch), expected)
    fresh = param_spec.init_params(model.specs["adapter"], jax.random.key(5))
    np.testing.assert_array_equal(logits(model, {**base, "adapter": fresh}, batch), expected)
    assert np.any(
        np.asarray(logits(model, {**base, "adapter": whole["adapter"]}, batch)) != np.asarray(expected)
    )


@pytest.mark.quick_cases("tied")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_merged_equals_unmerged(x64, tied):
    model, whole = tiny(adapter=SOME, tied=tied)
    batch = one_by_one(examples(4))
    merged = merged_arrays(whole["base"], whole["adapter"], jnp.float64)
    assert "head" in merged and ("head" in whole["base"]) != tied
    untied, _ = tiny()
    assert_close(logits(untied, {"base": merged}, batch), logits(model, whole, batch))
    untouched = {p: x for p, x in tree.paths(merged).items() if p in ("embed", "final_norm", "layers/attn/v")}
    assert len(untouched) == 3 and all(x is tree.paths(whole["base"])[p] for p, x in untouched.items())


def test_a_quantised_kernel_is_merged_like_a_plain_one():
    _, whole = tiny(jnp.bfloat16, SOME)
    plain = jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole["base"])
    packed = jax.tree.map(lambda x: quantize(x, "bits"), plain)
    found, expected = (merged_arrays(base, whole["adapter"], jnp.bfloat16) for base in (packed, plain))
    np.testing.assert_array_equal(found["layers"]["attn"]["q"], expected["layers"]["attn"]["q"])
    assert np.any(np.asarray(expected["layers"]["attn"]["q"]) != np.asarray(plain["layers"]["attn"]["q"]))


def test_attaching_copies_no_leaf_and_changes_nothing_else():
    _, whole = tiny(jnp.float32, SOME)
    found = attach(whole["base"], whole["adapter"], 0.5)
    q = found["layers"]["attn"]["q"]
    assert isinstance(q, Adapted) and q.weight is whole["base"]["layers"]["attn"]["q"] and q.dropout == 0.5
    assert q.a is whole["adapter"]["layers"]["attn"]["q"]["a"]
    assert found["layers"]["attn"]["v"] is whole["base"]["layers"]["attn"]["v"]
    assert not isinstance(whole["base"]["layers"]["attn"]["q"], Adapted)
    assert attach(whole["base"], None) is whole["base"] and attach(whole["base"], {}) is whole["base"]


def test_a_base_trained_with_an_adapter_has_the_gradient_of_the_merged_weight(x64):
    # d loss / d W is the same for W + s a b read in two parts and for the merged weight
    model, whole = tiny(adapter=SOME)
    batch = one_by_one(examples(4))
    plain, _ = tiny()
    merged = merged_arrays(whole["base"], whole["adapter"], jnp.float64)

    def loss(model):
        return jax.jit(jax.grad(lambda whole: sft(model)(whole, batch, None, {})[0]))

    found, expected = loss(model)(whole), loss(plain)({"base": merged})
    assert_close(found["base"], expected["base"])
    for path in ("layers/attn/q", "layers/mlp/down"):
        pair, grad, w = (tree_at(t, path) for t in (whole["adapter"], found["adapter"], expected["base"]))
        scale = pair["scale"][:, None, None]
        assert_close(grad["a"], scale * w @ jnp.swapaxes(pair["b"], 1, 2))
        assert_close(grad["b"], scale * jnp.swapaxes(pair["a"], 1, 2) @ w)
        assert not np.any(grad["scale"])  # the matmul gives it no gradient


def tree_at(nested, path):
    for part in path.split("/"):
        nested = nested[part]
    return nested


# The fused matmul


def plain_product(x, dropped, w, a, b, scale):
    w = dequantize(w).astype(x.dtype) if hasattr(w, "codes") else w
    return x @ w + scale * ((dropped @ a) @ b)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(("rate", "lead"), [(0.0, (2, 5)), (0.5, (2, 5)), (0.5, (3,))])
def test_the_fused_matmul_equals_the_plain_one_in_value_and_gradients(x64, packed, rate, lead):
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape))

    x, a, b, scale, cotangent = (
        random(*lead, 7),
        random(7, 3),
        random(3, 6),
        jnp.asarray(1.7),
        random(*lead, 6),
    )
    w = quantize(random(7, 6).astype(jnp.bfloat16), "bits") if packed else random(7, 6)
    key = jax.random.key(1)

    def loss(product, x, trained):
        w_ = w if packed else trained["w"]
        dropped = dropout(x, rate, key)
        return jnp.sum(cotangent * jnp.sin(product(x, dropped, w_, trained["a"], trained["b"], scale)))

    trained = {"a": a, "b": b} | ({} if packed else {"w": w})
    found, expected = (
        jax.jit(jax.value_and_grad(lambda x, t, f=f: loss(f, x, t), (0, 1)))(x, trained)
        for f in (lora_matmul, plain_product)
    )
    assert_close(found, expected)
    assert_close(
        linear(x, Adapted(w, a, b, scale, rate), key), lora_matmul(x, dropout(x, rate, key), w, a, b, scale)
    )


def test_few_rows_as_in_decoding_do_not_copy_the_weight():
    w, a, b, scale = jnp.ones((64, 32)), jnp.ones((64, 4)), jnp.ones((4, 32)), jnp.asarray(0.5)
    few, many = (
        str(jax.make_jaxpr(lora_matmul)(x, x, w, a, b, scale))
        for x in (jnp.ones((31, 1, 64)), jnp.ones((31, 2, 64)))
    )
    assert "concatenate" in many and "concatenate" not in few


def test_dropout_needs_a_key_preserves_the_mean_and_leaves_the_base():
    x = jnp.ones((200, 50))
    w, a, b = jnp.ones((50, 4)), jnp.ones((50, 2)), jnp.ones((2, 4))
    node = Adapted(w, a, b, jnp.asarray(1.0), 0.25)
    np.testing.assert_array_equal(
        linear(x, node), linear(x, Adapted(w, a, b, jnp.asarray(1.0), 0.0), jax.random.key(0))
    )
    assert float(jnp.mean(linear(x, node, jax.random.key(0)))) == pytest.approx(150, rel=0.02)
    fresh = Adapted(w, a, jnp.zeros_like(b), jnp.asarray(1.0), 0.9)
    np.testing.assert_array_equal(linear(x, fresh, jax.random.key(0)), x @ w)
    dropped = dropout(x, 0.25, jax.random.key(2))
    assert float(jnp.mean(dropped == 0)) == pytest.approx(0.25, abs=0.02)
    assert {round(float(v), 5) for v in np.unique(dropped)} == {0.0, round(1 / 0.75, 5)}


def test_each_layer_and_projection_has_its_own_dropout_mask():
    model, whole = tiny(jnp.float32, Adapter(rank=3, dropout=0.5))
    batch = one_by_one(examples(2))
    text = str(jax.make_jaxpr(lambda key: model.hidden(whole, batch, key)[0])(jax.random.key(0)))
    assert len(re.findall(r"name=_bernoulli", text)) == len(KERNELS)  # in the body of the scan over layers
    assert "random_split[shape=(3,)]" in text and "random_split[shape=(7,)]" in text


def test_adapted_without_settings_is_the_base_model():
    model = adapted(llama(CONFIG, jnp.float32), None)
    assert set(model.specs) == {"base"} and adapted(llama(CONFIG), SOME).specs["base"] is not None
