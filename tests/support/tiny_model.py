"""A tiny random Llama, and examples of different lengths: everything small enough for float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.batch import Tokens
from jaxft.models.adapted import adapted
from jaxft.models.families.llama import LlamaConfig, llama
from jaxft.nn import param_spec
from jaxft.nn.tree import map_with_path

CONFIG = LlamaConfig(vocab=40, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=48, max_positions=64)


def tiny(dtype=jnp.float64, adapter=None, tied=False, **options):
    """The model over {"base", "adapter"} and a random tree for it; an adapter's b is random too."""
    model, whole = _tiny(jnp.dtype(dtype), adapter, tied, tuple(options.items()))
    return model, jax.tree.map(lambda x: x, whole)


@functools.cache
def _tiny(dtype, adapter, tied, options):
    config = LlamaConfig(**{**CONFIG.__dict__, "tied": tied})
    model = adapted(llama(config, dtype, **dict(options)), adapter)

    def shake(path, x):
        if not path.endswith("/b"):
            return x
        return 0.3 * jax.random.normal(jax.random.key(len(path)), x.shape, x.dtype)

    @jax.jit
    def start():
        return map_with_path(
            shake, param_spec.init_params(model.specs, jax.random.key(0), np.promote_types(dtype, np.float32))
        )

    return model, start()


def examples(count=6, seed=0, longest=14):
    """Ragged (ids, number of prompt tokens) pairs."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        size = int(rng.integers(4, longest))
        out.append((rng.integers(0, CONFIG.vocab, size), int(rng.integers(1, size - 1))))
    return out


def batch_of(rows, length, reads, weight, dtype=np.float64):
    """Tokens [rows, length] of lists of examples a row; every answer token weighs `weight`."""
    shape = (len(rows), length)
    ids, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    read, targets = (np.zeros((len(rows), reads), np.int32) for _ in range(2))
    weights = np.zeros((len(rows), reads), dtype)
    for r, members in enumerate(rows):
        at, m = 0, 0
        for number, (tokens, prompt) in enumerate(members):
            size = len(tokens)
            ids[r, at : at + size], segments[r, at : at + size] = tokens, number + 1
            positions[r, at : at + size] = np.arange(size)
            count = size - prompt
            read[r, m : m + count] = at + np.arange(prompt - 1, size - 1)
            targets[r, m : m + count] = tokens[prompt:]
            weights[r, m : m + count] = weight
            at, m = at + size, m + count
    return Tokens(*map(jnp.asarray, (ids, segments, positions, read, targets, weights)))


def one_by_one(some, reads=16, length=16):
    """A row an example; the token weights sum to 1."""
    total = sum(len(ids) - prompt for ids, prompt in some)
    return batch_of([[e] for e in some], length, reads, 1 / total)


def micro(batch, count):
    """[rows, ...] -> [micro, rows / micro, ...]."""
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch)


def assert_close(a, b, rtol=1e-10):
    """Every leaf equal within rtol of the leaf's largest value."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(initial=0), 1e-300))
