"""Masks by path are total, partition and combine are inverse, static fields are structure."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG

from jaxft.models.families.llama import llama
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant import QTensor, quantize
from jaxft.nn.tree import combine, mask_by_path, partition, static, struct
from jaxft.train.trainable_params import partition_params, split_params

TREE = {
    "base": {"layers": {"attn": {"q": 1, "k": 2}, "norm": 3}, "head": 4},
    "adapter": {"layers": {"attn": {"q": {"a": 5, "b": 6}}}},
}


@struct
class Point:
    """Two leaves and a name that is structure."""

    x: jax.Array
    y: jax.Array
    name: str = static(default="origin")


def chosen(pattern, of=TREE):
    return {path for path, hit in tree.paths(mask_by_path(of, pattern)).items() if hit}


def test_paths_name_every_leaf_by_keys_fields_and_indices():
    found = tree.paths({"p": Point(1, 2), "list": [3, (4, 5)]})
    assert found == {"p/x": 1, "p/y": 2, "list/0": 3, "list/1/0": 4, "list/1/1": 5}
    assert list(tree.paths(TREE).values()) == jax.tree.leaves(TREE)


def test_map_with_path_visits_every_path():
    found = tree.map_with_path(lambda path, x, y: (path, x + y), TREE, TREE)
    flat = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple))
    assert flat == [(path, 2 * x) for path, x in tree.paths(TREE).items()]


@pytest.mark.parametrize(
    "pattern, paths",
    [
        ("base/head", {"base/head"}),
        ("adapter", {"adapter/layers/attn/q/a", "adapter/layers/attn/q/b"}),
        ("base/layers/attn", {"base/layers/attn/q", "base/layers/attn/k"}),
        (".*/attn/q", {"base/layers/attn/q", "adapter/layers/attn/q/a", "adapter/layers/attn/q/b"}),
        (".*/b", {"adapter/layers/attn/q/b"}),
        ("base/.*norm|base/head", {"base/layers/norm", "base/head"}),
        (".*", set(tree.paths(TREE))),
    ],
)
def test_a_pattern_matches_a_whole_path_or_a_node_above_it(pattern, paths):
    assert chosen(pattern) == paths
    assert jax.tree.structure(mask_by_path(TREE, pattern)) == jax.tree.structure(TREE)


@pytest.mark.parametrize("pattern", ["head", "base/hea", "ase/head", "base/head/w", "", "layers"])
def test_a_mask_that_matches_nothing_is_an_error_that_shows_near_paths(pattern):
    with pytest.raises(ValueError) as error:
        mask_by_path(TREE, pattern)
    text = str(error.value)
    assert text.startswith(f"pattern: {pattern!r} matches none of 6 parameters; near: ") and "\n" not in text


def test_near_paths_are_the_most_similar():
    with pytest.raises(ValueError, match="near: base/layers/attn/q"):
        mask_by_path(TREE, "base/layers/attention/q")


def test_an_invalid_regular_expression_is_an_error_that_names_the_setting():
    with pytest.raises(ValueError, match=r"pattern: 'base/\(head' is not a valid regular expression"):
        mask_by_path(TREE, "base/(head")


def test_partition_and_combine_are_inverse():
    for pattern in ("base/head", ".*/attn/q", ".*"):
        mask = mask_by_path(TREE, pattern)
        some, rest = partition(TREE, mask)
        assert combine(some, rest) == TREE == combine(rest, some)
        assert len(jax.tree.leaves(some)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(TREE))
        assert set(tree.paths(some)) == chosen(pattern)


def test_combine_takes_a_leaf_from_the_first_tree_that_has_it():
    assert combine({"a": 1, "b": None, "c": None}, {"a": 2, "b": 3, "c": None}) == {"a": 1, "b": 3, "c": None}


def test_a_gradient_and_an_optimizer_see_the_trainable_leaves_only():
    params = {"w": jnp.ones(3), "codes": jnp.ones(3, jnp.int8)}
    trainable, frozen = partition(params, mask_by_path(params, "w"))

    def loss(trainable):
        whole = combine(trainable, frozen)
        return jnp.sum(whole["w"] ** 2 * whole["codes"].astype(jnp.float32))

    grads = jax.grad(loss)(trainable)
    assert set(tree.paths(grads)) == {"w"} and float(grads["w"][0]) == 2


def test_a_quantised_leaf_is_partitioned_as_one():
    model = llama(CONFIG, jnp.bfloat16)
    t = partition_params(model, Adapter(rank=2), "adapter/.*|base/final_norm")
    whole = jax.tree.map(
        lambda s: jnp.ones(s.shape, jnp.bfloat16), t.specs, is_leaf=lambda s: hasattr(s, "axes")
    )
    whole["base"]["layers"]["attn"]["q"] = quantize(whole["base"]["layers"]["attn"]["q"], "bits")
    trainable, frozen = split_params(t, whole)
    assert isinstance(frozen["base"]["layers"]["attn"]["q"], QTensor)
    assert "base/final_norm" in tree.paths(trainable) and "base/embed" not in tree.paths(trainable)
    assert not any(path.endswith("scale") for path in tree.paths(trainable))
    back = combine(trainable, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, back, whole)


def test_a_struct_is_frozen_and_its_static_fields_are_structure():
    p = Point(jnp.ones(2), jnp.zeros(2), "here")
    assert len(jax.tree.leaves(p)) == 2 and jax.tree.map(lambda x: x + 1, p).name == "here"
    assert jax.tree.structure(p) != jax.tree.structure(Point(p.x, p.y, "there"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.x = 1
    assert jax.vmap(lambda q: q.x + q.y)(p).shape == (2,)


def test_nearest_prefers_similar_names_and_is_never_empty():
    assert tree.nearest("gamma", ["beta", "gama", "delta"])[0] == "gama"
    assert tree.nearest("zzz", ["beta", "gama"]) == ["beta", "gama"]


def test_a_regular_expression_that_takes_too_long_is_an_error_with_its_name(monkeypatch):
    monkeypatch.setattr(tree, "MATCH_SECONDS", 0.2)
    slow = tree.regex(r"(?:a?){40}a{40}b|(a|a)*c|(.*)(.*)(.*)(.*)(.*)(.*)x", "quant.targets")
    with pytest.raises(ValueError, match=r"quant\.targets: the regular expression .* takes more than 0\.2 s"):
        slow.fullmatch("a" * 400)
    assert tree.regex("a.b", "x", dotall=True).fullmatch("a\nb") and not tree.regex("a.b", "x").fullmatch(
        "a\nb"
    )
