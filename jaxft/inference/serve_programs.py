"""The compiled programs of the server: start a prompt in a row, decode a block of steps, settings by row.

A state has R rows, each with its prompt's keys and its completion. All that a request chooses (temperature,
top_k, top_p, limit, stop tokens, adapter, allowed tokens) is an array with a value per row, so that nothing
is compiled while the server runs. Random keys are those of generate.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxft.batch import Tokens
from jaxft.distributed import sharding
from jaxft.inference.batch_invariance import compiler_options, row_logits
from jaxft.inference.engine import first_device, replicated_shapes, row_levels
from jaxft.inference.sampling import BUCKET, NONFINITE, RowSampling, left_pad, sample_rows
from jaxft.models.model import Model
from jaxft.nn.cache import (
    Cache,
    CacheFormat,
    NextToken,
    PromptKeys,
    clear_values,
    insert_prompts,
    sharded,
    widen_prompts,
)
from jaxft.nn.cached_attention import equal_groups
from jaxft.nn.lora_rows import BASE
from jaxft.tree import Params, struct

MOST_TOP = 20  # the most alternatives per token whose log-probs a request may ask for, as in OpenAI's API
NO_TOKEN = -1
WORD = 32  # bits of a word of AllowedTokens


@dataclass(frozen=True)
class ServeSizes:
    """What the server's programs are compiled for.

    rows: completions in progress. prompt, new: the most tokens of a prompt and of a completion. stops: the
    most stop tokens of a request. block: decoding steps between two looks at new requests.
    """

    rows: int = 8
    prompt: int = 1024
    new: int = 512
    stops: int = 8
    block: int = 4

    def __post_init__(self):
        for name in ("rows", "prompt", "new", "stops", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def prompt_slots(self) -> int:
        """Slots of a prompt's keys."""
        return -(-self.prompt // BUCKET) * BUCKET

    @property
    def prefill_sizes(self) -> list[int]:
        """Padded lengths of prompts that have a program, ascending: each four times the one before."""
        sizes = [self.prompt_slots]
        while sizes[0] > 4 * BUCKET:
            sizes.insert(0, -(-sizes[0] // (4 * BUCKET)) * BUCKET)
        return sizes


@struct
class RequestSettings:
    """What requests choose, with a value per row [R].

    limit: the most tokens. stops [R, S]: stop tokens, NO_TOKEN for none. adapter: see nn/lora_rows.py. top:
    whether log-probs of the most likely tokens are computed.
    """

    sampling: RowSampling
    limit: Any
    stops: Any
    adapter: Any
    top: Any


@struct
class ServedRows:
    """Completions in progress in R rows. Fields as in decode.DecodeState; row i completes prompt slot i."""

    cache: Any
    settings: RequestSettings
    last: Any
    counts: Any
    live: Any
    lengths: Any
    keys: Any


@struct
class SampledRows:
    """Sampled tokens, NO_TOKEN for none, their log-probs at temperature 1, and the most likely tokens."""

    tokens: Any
    logps: Any
    top_tokens: Any
    top_logps: Any


@struct
class AllowedTokens:
    """Tokens that rows may sample next, for completions that must match a grammar.

    rows [R]: whether a row is constrained. words [R, W], uint32: bit t % 32 of word t // 32 is set for each
    allowed token t; unused in other rows.
    """

    rows: Any
    words: Any


@struct
class NewRow:
    """A prompt to start, padded on the left. seed: uint32. number: of the prompt among those of its seed.
    allowed: the first tokens that its completion may have.
    """

    tokens: Tokens
    row: Any
    seed: Any
    number: Any
    settings: RequestSettings
    allowed: AllowedTokens


@dataclass(frozen=True)
class Serving:
    """What programs are compiled for. model: over the whole tree with "rows", see models/adapted.py."""

    model: Model
    sizes: ServeSizes
    cache: CacheFormat = "compute"

    @property
    def top(self) -> int:
        """The number of most likely tokens."""
        return min(MOST_TOP, self.model.config.vocab)

    @property
    def words(self) -> int:
        """The number of words that have a bit for each token."""
        return -(-self.model.config.vocab // WORD)


def empty_settings(s: Serving, rows: int) -> RequestSettings:
    """Return settings of rows without a request, as NumPy arrays."""
    vocab, sizes = s.model.config.vocab, s.sizes
    sampling = RowSampling(
        np.zeros(rows, np.float32), np.full(rows, vocab, np.int32), np.ones(rows, np.float32)
    )
    return RequestSettings(
        sampling, np.full(rows, sizes.new, np.int32), np.full((rows, sizes.stops), NO_TOKEN, np.int32),
        np.full(rows, BASE, np.int32), np.zeros(rows, bool),
    )  # fmt: skip


def all_allowed(s: Serving, rows: int) -> AllowedTokens:
    """Return that no row is constrained, as NumPy arrays."""
    return AllowedTokens(np.zeros(rows, bool), np.zeros((rows, s.words), np.uint32))


def allowed_logits(logits: Array, allowed: AllowedTokens) -> Array:
    """Return the logits with -inf for tokens that a constrained row may not sample."""

    bits = allowed.words[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)[None, None] & 1
    is_allowed = bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1
    return jnp.where(is_allowed | ~allowed.rows[:, None], logits, -jnp.inf)


def empty_rows(s: Serving) -> ServedRows:
    """Return a state without completions."""
    sizes, rows = s.sizes, s.sizes.rows
    integers = jnp.zeros(rows, jnp.int32)
    return ServedRows(
        cache=s.model.empty_cache((rows, sizes.prompt_slots), rows, sizes.new, s.cache),
        settings=jax.tree.map(jnp.asarray, empty_settings(s, rows)),
        last=integers,
        counts=integers,
        live=jnp.zeros(rows, bool),
        lengths=integers,
        keys=jnp.broadcast_to(jax.random.key(0), (rows,)),
    )


def sample_next(
    s: Serving,
    params: Params,
    h_RD: Array,
    settings: RequestSettings,
    allowed: AllowedTokens,
    at: tuple[Array, Array],
) -> SampledRows:
    """Sample the next token of each row. at: random keys [R] and counts of earlier tokens [R].

    Log-probs are those of the model, also in a constrained row. A token whose logits are not finite is
    NONFINITE.
    """
    logits = row_logits(s.model, params, h_RD)
    keys = jax.vmap(jax.random.fold_in)(*at)
    tokens = jax.lax.cond(  # a choice between logits would copy them in every step
        allowed.rows.any(),
        lambda: sample_rows(allowed_logits(logits, allowed), settings.sampling, keys),
        lambda: sample_rows(logits, settings.sampling, keys),
    )
    norm = jax.nn.logsumexp(logits, -1)[:, None]
    logps = (jnp.take_along_axis(logits, tokens[:, None], 1) - norm)[:, 0].astype(jnp.float32)
    tokens = jnp.where(jnp.abs(logits).max(-1) < jnp.inf, tokens, NONFINITE)

    def most_likely() -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits, s.top)
        return ids.astype(jnp.int32), (values - norm).astype(jnp.float32)

    def none() -> tuple[Array, Array]:
        shape = len(tokens), s.top
        return jnp.full(shape, NO_TOKEN, jnp.int32), jnp.zeros(shape, jnp.float32)

    return SampledRows(tokens, logps, *jax.lax.cond(settings.top.any(), most_likely, none))


def goes_on(settings: RequestSettings, tokens: Array, counts: Array) -> Array:
    """Whether completions go on after their last token; counts: their tokens, including it."""
    stops = (tokens[:, None] == settings.stops).any(-1) | (tokens == NONFINITE)
    return ~stops & (counts < settings.limit)


def start_row(s: Serving, params: Params, state: ServedRows, new: NewRow) -> tuple[ServedRows, SampledRows]:
    """Prefill a prompt and sample the first token of its completion; every array of `new` has one row."""
    model, params = s.model, {**params, "rows": new.settings.adapter}
    h_1TD, keys = model.prefill(params, new.tokens, s.sizes.new)
    cache = insert_prompts(state.cache, widen_prompts(keys, state.cache.prompts), new.row, model.dtype)
    cache = replace(cache, rows=clear_values(cache.rows, new.row))
    key = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(
        new.seed, new.number
    )
    key = jax.vmap(jax.random.fold_in)(key, jnp.zeros_like(new.number))  # completion 0 of the prompt
    none = jnp.zeros_like(new.number)
    found = sample_next(s, params, h_1TD[:, -1], new.settings, new.allowed, (key, none))

    def put(old: Array, x: Array) -> Array:
        return old.at[new.row].set(x, mode="drop")

    return ServedRows(
        cache,
        jax.tree.map(put, state.settings, new.settings),
        last=put(state.last, jnp.maximum(found.tokens, 0)),
        counts=put(state.counts, none + 1),
        live=put(state.live, goes_on(new.settings, found.tokens, none + 1)),
        lengths=put(state.lengths, new.tokens.positions[:, -1] + 1),
        keys=put(state.keys, key),
    ), found  # fmt: skip


def decode_block(
    s: Serving, rows: int, params: Params, state: ServedRows, live: Array, allowed: AllowedTokens
) -> tuple[ServedRows, SampledRows]:
    """Sample up to `block` tokens of the first `rows` rows; return arrays [rows, block, ...].

    live [R]: false for rows whose requests were cancelled. All live rows must be among the first. If a row is
    constrained, one token: only the caller knows which may follow it.
    """
    allowed = jax.tree.map(lambda x: x[:rows], allowed)
    steps = jnp.where(allowed.rows.any(), 1, s.sizes.block)
    part = state_of_rows(replace(state, live=state.live & live), rows)
    params, groups = {**params, "rows": part.settings.adapter}, equal_groups(rows, 1)
    columns = jnp.arange(s.sizes.block, dtype=jnp.int32)
    shape = rows, s.sizes.block
    out = SampledRows(
        jnp.full(shape, NO_TOKEN, jnp.int32), jnp.zeros(shape, jnp.float32),
        jnp.full((*shape, s.top), NO_TOKEN, jnp.int32), jnp.zeros((*shape, s.top), jnp.float32),
    )  # fmt: skip

    def unfinished(carry: tuple[Array, ServedRows, SampledRows]) -> Array:
        i, now, _ = carry
        return (i < steps) & now.live.any()

    def step(carry: tuple[Array, ServedRows, SampledRows]) -> tuple[Array, ServedRows, SampledRows]:
        i, now, out = carry
        at = NextToken(now.lengths + now.counts - 1, now.counts, groups)
        h_RD, cache = s.model.decode(params, now.cache, now.last, at)
        found = sample_next(s, params, h_RD, now.settings, allowed, (now.keys, now.counts))
        here = (columns[None] == i) & now.live[:, None]

        def put(old: Array, x: Array) -> Array:
            return jnp.where(here.reshape(*shape, *(1,) * (old.ndim - 2)), x[:, None], old)

        counts = now.counts + now.live.astype(jnp.int32)
        after = replace(
            now,
            cache=replace(cache, rows=sharded(cache.rows)),
            last=jnp.where(now.live, jnp.maximum(found.tokens, 0), now.last),
            counts=counts,
            live=now.live & goes_on(now.settings, found.tokens, counts),
        )
        return i + 1, after, jax.tree.map(put, out, found)

    _, part, out = jax.lax.while_loop(unfinished, step, (jnp.int32(0), part, out))
    return _with_state_of_rows(replace(state, live=state.live & live), part, rows), out


def state_of_rows(state: ServedRows, rows: int) -> ServedRows:
    """Return the state of the first rows."""
    if rows == len(state.live):
        return state
    cache = state.cache
    prompts, own = jax.tree.map(lambda x: x[:rows], (cache.prompts.layers, cache.rows))
    cut = jax.tree.map(lambda x: x[:rows], replace(state, cache=None))
    first = Cache(PromptKeys(prompts, cache.prompts.visible[:rows]), own, cache.new)
    return replace(cut, cache=first)


def _with_state_of_rows(state: ServedRows, part: ServedRows, rows: int) -> ServedRows:
    """Return the state with its first rows replaced. Their prompts are unchanged."""
    if rows == len(state.live):
        return part
    own = jax.tree.map(lambda x, y: x.at[:rows].set(y), state.cache.rows, part.cache.rows)
    without_cache = replace(state, cache=None), replace(part, cache=None)
    others = jax.tree.map(lambda x, y: x.at[:rows].set(y), *without_cache)
    return replace(others, cache=replace(state.cache, rows=own))


@dataclass(frozen=True)
class ServePrograms:
    """Compiled programs. start: by the padded length of a prompt. decode: by the number of first rows.
    all_allowed: for `decode` without constrained rows, on the device.
    """

    serving: Serving
    empty: Callable[[], ServedRows]
    start: dict[int, Any]
    decode: dict[int, Any]
    all_allowed: AllowedTokens


def serve_tracers(
    s: Serving, params: Params, mesh: Mesh | None = None
) -> dict[tuple[Any, ...], Callable[[], jax.stages.Traced]]:
    """Return a function that traces each program: ("empty",), ("start", size) and ("decode", rows).

    params: arrays or their shapes, without "rows".
    """
    where = None if mesh is None else sharding.replicated(mesh)
    empty = partial(empty_rows, s)
    state = replicated_shapes(jax.eval_shape(empty), mesh)

    def jitted(fn: Any) -> Any:
        return jax.jit(fn, donate_argnums=(1,), out_shardings=where)

    out: dict[tuple[Any, ...], Any] = {("empty",): jax.jit(empty, out_shardings=where).trace}
    for size in s.sizes.prefill_sizes:
        new = replicated_shapes(new_row(s, [0] * size, size), mesh)
        out["start", size] = partial(jitted(partial(start_row, s)).trace, params, state, new)
    live = replicated_shapes(np.zeros(s.sizes.rows, bool), mesh)
    allowed = replicated_shapes(all_allowed(s, s.sizes.rows), mesh)
    for rows in row_levels(s.sizes.rows, mesh):
        traced = jitted(partial(decode_block, s, rows)).trace
        out["decode", rows] = partial(traced, params, state, live, allowed)
    return out


def compile_server(s: Serving, params: Params, mesh: Mesh | None = None) -> ServePrograms:
    """Compile the server's programs. mesh: of one device, or None."""
    options = compiler_options(first_device(mesh).platform)
    tracers = serve_tracers(s, params, mesh)
    found = {name: trace().lower().compile(options) for name, trace in tracers.items()}
    where = None if mesh is None else sharding.replicated(mesh)
    return ServePrograms(
        s,
        found[("empty",)],
        {name[1]: program for name, program in found.items() if name[0] == "start"},
        {name[1]: program for name, program in found.items() if name[0] == "decode"},
        jax.device_put(all_allowed(s, s.sizes.rows), where),
    )


def new_row(s: Serving, prompt: list[int], size: int) -> NewRow:
    """Return a prompt for the program of `size`, to be completed greedily in no row."""
    one = np.zeros(1, np.int32)
    return NewRow(
        left_pad([prompt], 1, size), np.full(1, s.sizes.rows, np.int32), np.zeros(1, np.uint32), one,
        empty_settings(s, 1), all_allowed(s, 1),
    )  # fmt: skip
