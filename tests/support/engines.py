"""Engines for tests, compiled once for the same model, sampling and sizes; decoding without an engine."""

import functools

import jax
import jax.numpy as jnp

from jaxft.engine.programs import Engine, compiler_options, program_tracers
from jaxft.engine.state import Decoding, slots_for
from jaxft.nn.attention.kv_cache import NextToken, RowGroups, insert_prompts

ENGINES = {}


def engine_of(world, sampling, stop=(), rows=None, longest=64, group=1, prompts=None, **options):
    """The engine of (model, params) for prompts of up to `longest` tokens.

    rows: completions in progress. prompts: their number, by default as many as fill the rows.
    """
    model, params = world
    slots = slots_for(prompts or rows // group, group, longest, rows)
    shapes = jax.eval_shape(lambda: params)
    sizes = str(jax.tree.map(lambda x: x.shape, shapes))
    key = model.decode, sampling, stop, slots, group, *options.items(), sizes
    if key not in ENGINES:
        ENGINES[key] = lazy_engine(Decoding(model, sampling, stop, group, **options), shapes, slots)
    return ENGINES[key]


def lazy_engine(d, params, slots):
    """An engine whose programs are compiled when they are first called; most tests run a few of them."""
    found = {name: on_first_call(trace) for name, trace in program_tracers(d, params, slots).items()}
    by_size = [
        {key[1:]: program for key, program in found.items() if key[0] == name}
        for name in ("start", "extend", "decode", "keep")
    ]
    return Engine(d, slots, found[("empty",)], *by_size)


def on_first_call(trace):
    """The program of a trace, as Engine has it."""
    program = functools.cache(lambda: trace().lower().compile(compiler_options("cpu")))
    return lambda *args: program()(*args)


def equal_groups(prompts, group):
    """The RowGroups of `group` successive rows for each prompt."""
    rows = jnp.arange(prompts * group, dtype=jnp.int32)
    return RowGroups(rows.reshape(prompts, group), rows)


def prefilled(model, params, prompts, new):
    """Hidden states of left-padded prompts, and a cache with a row of `new` tokens for each."""
    h, keys = model.prefill(params, prompts, new)
    count = len(prompts.ids)
    cache = model.empty_cache(keys.visible.shape, count, new)
    return h, insert_prompts(cache, keys, jnp.arange(count, dtype=jnp.int32), model.dtype)


def decoded(model, params, cache, token, index):
    """Hidden states of token `index` of every row, and the cache with it. token: ids and positions."""
    ids, positions = token
    count, index = len(ids), jnp.asarray(index, jnp.int32)
    at = NextToken(positions, jnp.broadcast_to(index + 1, (count,)), equal_groups(count, 1))
    return model.decode(params, cache, ids, at)
