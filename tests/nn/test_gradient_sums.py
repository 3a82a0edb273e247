"""Gradients in 16-bit dtypes: their sums over many tokens lose no more than matmuls do."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.batch import Tokens
from jaxft.distributed import sharding
from jaxft.models.adapted import adapted, scores
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.models.families.qwen import Qwen3Config, qwen3
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.layers import TABLE, embed
from jaxft.nn.param_spec import init_params
from jaxft.objectives import logprobs
from jaxft.objectives.logprobs import token_logps, weighted_loss
from jaxft.objectives.objective import Facts
from jaxft.train.step import accumulate_gradients

WIDTH, VOCAB, TIME = 32, 64, 256
ADAPTERS = {
    "untied": Adapter(rank=4, dora=True, targets=("q", "down"), trainable_token_indices=(0, 1, 5)),
    "tied": Adapter(rank=4, targets=("q", "down", "embed", "head")),
    "tied-by-token": Adapter(rank=4, targets=("q", "down", "embed", "head")),
    "norms": Adapter(rank=4, targets=("q", "down"), bias="all"),  # of queries and keys; in microbatches
}
MICROBATCHES = {"untied": 1, "tied": 1, "tied-by-token": 1, "norms": 4}
BY_TOKEN = {"tied-by-token", "norms"}  # the loss reads the head's log-probs, as that of preferences does
DTYPES = [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")]  # computed, stored


def model_of(name, dtype):
    sizes = {
        "vocab": VOCAB, "width": WIDTH, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 48,
        "max_positions": TIME, "attention_bias": True,
    }  # fmt: skip
    if name == "norms":
        model = qwen3(Qwen3Config(**sizes, tied=False), jnp.dtype(dtype))
    else:
        model = llama(LlamaConfig(**sizes, mlp_bias=True, tied=name != "untied"), jnp.dtype(dtype))
    return adapted(model, ADAPTERS[name])


@functools.cache
def parameters(name):
    """Random values that bfloat16 represents, so that every dtype stores the same ones."""

    def shake(path, x):
        noise = jax.random.normal(jax.random.key(len(path) + x.size), x.shape)
        return (x + (0.05 if x.shape[-1:] == (VOCAB,) else 0.2) * noise).astype(jnp.bfloat16)

    params = init_params(model_of(name, "float32").specs, jax.random.key(0))
    return jax.jit(functools.partial(tree.map_with_path, shake))({**params, "score": jnp.zeros((WIDTH, 1))})


def batch_of(tokens):
    """Tokens of which one id in six is the same, as in texts, and what follows depends on it."""
    chances = 1 / np.arange(1, VOCAB + 1) ** 1.1
    ids = np.random.default_rng(0).choice(VOCAB, (tokens // TIME, TIME + 1), p=chances / chances.sum())
    ids, targets = ids[:, :-1].astype(np.int32), ids[:, 1:].astype(np.int32)
    positions = np.broadcast_to(np.arange(TIME, dtype=np.int32), ids.shape)
    weights = np.full(ids.shape, 1 / tokens, np.float32)
    return Tokens(*map(jnp.asarray, (ids, np.ones_like(ids), positions, positions, targets, weights)))


@dataclass(frozen=True)
class AllHeads:
    """A loss of the language model's head, read in one of two ways, and of a scalar one.

    Of a head that is read in both, the gradients of a 16-bit dtype are rounded, then added by jax in that
    dtype: three roundings, of which two are the same if the losses are multiples of one another.
    """

    model: Model
    by_token: bool
    facts: Facts = Facts()

    def __call__(self, params, batch, key, aux):
        h = self.model.hidden(params, batch)[0]
        if self.by_token:
            logp = token_logps(self.model, params, h, batch.targets).logp
            loss = -jnp.sum(batch.token_weights * logp)
        else:
            loss, _ = weighted_loss(self.model, params, h, batch.targets, batch.token_weights)
        values = jnp.square(scores(params, h) - 1)
        return loss + jnp.sum(batch.token_weights * values), {}


def gradients(name, tokens, compute, stored):
    params = jax.tree.map(lambda x: x.astype(stored), parameters(name))
    objective, parts = AllHeads(model_of(name, compute), name in BY_TOKEN), MICROBATCHES[name]
    batch = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch_of(tokens))
    frozen = jax.tree.map(lambda x: None, params)
    summed = jax.jit(lambda p, b: accumulate_gradients(objective, (p, frozen), b, jax.random.key(0), {})[0])
    grads = tree.paths(jax.device_get(summed(params, batch)))
    return {path: np.asarray(x, np.float64) for path, x in grads.items() if not path.endswith("scale")}


# The matmul that rounds as much as the gradient of each parameter may: of a bias its own, else the next one.
KERNELS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
NEIGHBOURS = {
    **{f"base/layers/{kernel}_bias": f"base/layers/{kernel}" for kernel in KERNELS},
    **{f"adapter/layers/{kernel}_bias/weight": f"base/layers/{kernel}" for kernel in KERNELS[:4]},
    "base/layers/attn/q_norm": "base/layers/attn/q",
    "base/layers/attn/k_norm": "base/layers/attn/k",
    "base/embed": "base/layers/attn/q",
    "base/layers/attn_norm": "base/layers/attn/q",
    "base/layers/mlp_norm": "base/layers/mlp/gate",
    "base/final_norm": "base/layers/mlp/down",
    "base/head": "base/layers/mlp/down",
    "score": "base/layers/mlp/down",
    "adapter/embed/rows": "base/layers/attn/q",
    "adapter/embed/a": "base/layers/attn/q",
    "adapter/embed/b": "base/layers/attn/q",
    "adapter/head/rows": "base/layers/mlp/down",
    "adapter/head/a": "base/layers/mlp/down",
    "adapter/head/b": "base/layers/mlp/down",
    "adapter/layers/attn/q/magnitude": "adapter/layers/attn/q/b",
    "adapter/layers/mlp/down/magnitude": "adapter/layers/mlp/down/b",
}


BASE_BIASES = {f"base/layers/{kernel}_bias" for kernel in KERNELS[:4]}


@pytest.mark.quick_cases("bfloat16-bfloat16-16384-untied", "bfloat16-bfloat16-1024-norms")
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("tokens", [1024, 16384, 32768])
@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_no_gradient_is_rounded_twice_as_much_as_that_of_a_matmul(monkeypatch, name, tokens, dtypes):
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 1)  # 256 chunks
    exact, found = gradients(name, tokens, "float32", "float32"), gradients(name, tokens, *dtypes)
    replaced = {path for path, x in exact.items() if not x.any()}
    assert replaced == (BASE_BIASES if name == "norms" else set())
    assert not any(found[path].any() for path in replaced)
    error = {
        path: np.linalg.norm(found[path] - x) / np.linalg.norm(x)
        for path, x in exact.items()
        if path not in replaced
    }
    assert {path.rpartition("/")[2] for path in error.keys() - NEIGHBOURS.keys()} == {
        "q", "k", "v", "o", "gate", "up", "down", "a", "b"
    }  # fmt: skip
    beside = {path: error[NEIGHBOURS.get(path, path)] for path in error}
    assert not {path: (x, beside[path]) for path, x in error.items() if x > 2 * beside[path]}
    assert max(error[path] for path in error.keys() & NEIGHBOURS.keys()) < 0.02


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_gradient_of_a_table_is_the_sum_over_tokens_rounded_once(shape):
    ids, cotangent = batch_of(16384).ids, 1 + jax.random.normal(jax.random.key(0), (64, TIME, WIDTH))
    cotangent = cotangent.astype(jnp.bfloat16)
    exact = np.zeros((VOCAB, WIDTH))
    np.add.at(exact, np.asarray(ids), np.asarray(cotangent, np.float64))
    mesh = sharding.make_mesh(sharding.MeshShape(*shape), jax.devices()[: np.prod(shape)])

    def loss(table, ids, cotangent):
        return jnp.sum(embed(table, ids, jnp.bfloat16).astype(jnp.float32) * cotangent.astype(jnp.float32))

    def on_mesh(x, *axes):
        return jax.device_put(x, sharding.array_sharding(mesh, axes, x.shape))

    with jax.set_mesh(mesh):
        table = on_mesh(jnp.ones((VOCAB, WIDTH), jnp.bfloat16), *TABLE)
        rows = on_mesh(ids, "rows", "time"), on_mesh(cotangent, "rows", "time", "act_width")
        found = np.asarray(jax.jit(jax.grad(loss))(table, *rows), np.float64)
    np.testing.assert_allclose(found, exact, rtol=2**-8)
