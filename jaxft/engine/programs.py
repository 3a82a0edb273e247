"""The compiled programs of an engine: start prompts, append given tokens to rows, decode, and copy rows to a
smaller or larger state.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxft.distributed import threads
from jaxft.engine.sampling import NONFINITE, sample_rows
from jaxft.engine.state import (
    EVERY_TOKEN,
    MIN_MATMUL_ROWS,
    NO_TOKEN,
    NO_TOP,
    OF_ALLOWED,
    TOP_STEPS,
    WORD,
    Decoding,
    GivenTokens,
    NewPrompts,
    RowChoices,
    Slots,
    State,
    all_allowed,
    decode_levels,
    empty_state,
    extend_levels,
    first_device,
    given_tokens,
    new_prompts,
    prefill_levels,
    replicated_shapes,
    row_levels,
    state_shapes,
)
from jaxft.nn.attention.kv_cache import (
    Cache,
    GivenChunk,
    NextToken,
    PromptKeys,
    RowGroups,
    clear_values,
    insert_prompts,
    select_rows,
    sharded,
    widen_prompts,
)
from jaxft.nn.tree import Params

# XLA's CPU compiler leaves reductions of 4096 elements or more to YNNPACK, which adds in another order for
# other numbers of rows (github.com/openxla/xla, xla/backends/cpu). With this option it runs only matmuls.
NO_YNNPACK_REDUCTIONS: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


_Sampled = tuple[Array, Array, Array, Array]  # what next_tokens returns


def next_tokens(
    d: Decoding,
    params: Params,
    h_RD: Float[Array, "r D"],
    settings: RowChoices,
    at: tuple[Array, Array],
    allowed: Array,
) -> _Sampled:
    """Sample a token per row from hidden states. Return (tokens [r], log-probs [r], the most likely tokens
    [r, top], their log-probs [r, top]).

    at: random keys [r], and a number [r] that is folded into each. allowed: see allowed_logits; log-probs
    ignore it. They are at the sampling temperature, or at 1 for greedy rows and if d.serving. A row whose
    logits are not finite gets the token NONFINITE.
    """
    rows, (keys, numbers) = len(h_RD), at
    if rows < MIN_MATMUL_ROWS:
        h_RD = jax.lax.optimization_barrier(jnp.repeat(h_RD, MIN_MATMUL_ROWS, 0))
    logits = d.model.logits(d.model.head(params), h_RD)[:rows]
    keys = jax.vmap(jax.random.fold_in)(keys, numbers)
    uniform = None if d.serving else d.sampling

    def sample(logits: Array) -> Array:
        return sample_rows(logits, settings.sampling, keys, uniform)

    if d.constrained:
        tokens = jax.lax.cond(  # a choice between logits would copy them in every step
            jnp.any(allowed != EVERY_TOKEN),
            lambda: sample(allowed_logits(logits, allowed)),
            lambda: sample(logits),
        )
    else:
        tokens = sample(logits)
    largest = jnp.abs(logits).max(-1)  # one more reduction that vectorises, as in fast_argmax
    if not d.serving:
        heat = settings.sampling.heat[:, None].astype(logits.dtype)
        logits = logits * jnp.where(heat > 0, heat, 1)
    norm = jax.nn.logsumexp(logits, -1)[:, None]
    logps = (jnp.take_along_axis(logits, tokens[:, None], 1) - norm)[:, 0].astype(jnp.float32)
    tokens = jnp.where(largest < jnp.inf, tokens, NONFINITE)  # false for NaN too

    def most_likely() -> tuple[Array, Array]:
        ranked = logits
        if d.constrained:
            ranked = jnp.where((settings.top == OF_ALLOWED)[:, None], allowed_logits(logits, allowed), logits)
        values, ids = jax.lax.top_k(ranked, d.top)
        return ids.astype(jnp.int32), (values - norm).astype(jnp.float32)

    def none() -> tuple[Array, Array]:
        return jnp.full((rows, d.top), NO_TOKEN, jnp.int32), jnp.zeros((rows, d.top), jnp.float32)

    top = jax.lax.cond((settings.top != NO_TOP).any(), most_likely, none) if d.top else none()
    return tokens, logps, *top


def allowed_logits(logits: Array, allowed: Array) -> Array:
    """Return the logits with -inf for tokens that a row may not sample, because its completion must match a
    grammar. allowed [R, W], uint32: bit t % 32 of word t // 32 is set for each allowed token t.
    """
    bits = allowed[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)[None, None] & 1
    return jnp.where(bits.reshape(len(logits), -1)[:, : logits.shape[1]] == 1, logits, -jnp.inf)


def _put(rows: Array, old: Any, new: Any) -> Any:
    """Replace rows of a tree of arrays [R, ...] by `new` [r, ...]. rows [r]: indices; R means no row."""
    return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), old, new)


def _with_tokens(state: State, rows: Array, sampled: _Sampled, counts: Array) -> State:
    """Append a sampled token to the rows with indices `rows`; a row ends (`live`) at a stop token, at
    NONFINITE and at its limit. counts [r]: tokens that each row has so far.
    """

    def at(columns: Array, old: Array, x: Array) -> Array:
        return old.at[rows, columns].set(x, mode="drop")

    tokens, logps, top_tokens, top_logps = sampled
    settings = jax.tree.map(lambda x: x[rows], state.settings)
    stops = (tokens[:, None] == settings.stops).any(-1) | (tokens == NONFINITE)
    return replace(
        state,
        tokens=at(counts, state.tokens, tokens),
        logps=at(counts, state.logps, logps),
        top_tokens=at(counts % TOP_STEPS, state.top_tokens, top_tokens),
        top_logps=at(counts % TOP_STEPS, state.top_logps, top_logps),
        last=_put(rows, state.last, jnp.maximum(tokens, 0)),
        counts=_put(rows, state.counts, counts + 1),
        live=_put(rows, state.live, ~stops & (counts + 1 < settings.limit)),
    )


def start_prompts(d: Decoding, params: Params, state: State, new: NewPrompts) -> State:
    """Prefill new prompts and sample the first token of each of their completions."""
    of_prompts = {**params, "rows": new.settings.adapter}
    h_PTD, keys = d.model.prefill(of_prompts, new.tokens, d.sampling.max_new)
    keys = widen_prompts(keys, state.cache.prompts)
    stored = insert_prompts(state.cache, keys, new.slots, d.model.dtype)
    count, group = new.rows.shape
    rows, places = new.rows.reshape(count * group), jnp.arange(group, dtype=jnp.int32)
    fold = jax.random.fold_in
    keys = jax.vmap(fold)(jax.random.wrap_key_data(new.keys), new.numbers)
    keys = jax.vmap(lambda key: jax.vmap(partial(fold, key))(places))(keys).reshape(count * group)

    def spread(x: Any) -> Any:  # from prompts to their completions
        return jax.tree.map(lambda x: jnp.repeat(x, group, 0), x)

    settings, none = spread(new.settings), jnp.zeros(count * group, jnp.int32)
    of_rows, h_RD = {**params, "rows": settings.adapter}, spread(h_PTD[:, -1])
    sampled = next_tokens(d, of_rows, h_RD, settings, (keys, none), spread(new.allowed))
    fresh = replace(
        state,
        cache=replace(stored, rows=clear_values(stored.rows, rows)),
        settings=_put(rows, state.settings, settings),
        tokens=state.tokens.at[rows].set(NO_TOKEN, mode="drop"),
        logps=state.logps.at[rows].set(0, mode="drop"),
        prompts=_put(rows, state.prompts, spread(new.slots)),
        places=_put(rows, state.places, jnp.tile(places, count)),
        lengths=_put(rows, state.lengths, spread(new.tokens.positions[:, -1] + 1)),
        keys=state.keys.at[rows].set(keys, mode="drop"),
        firsts=_put(rows, state.firsts, none),
    )
    return _with_tokens(fresh, rows, sampled, none)


def extend_rows(d: Decoding, params: Params, state: State, new: GivenTokens) -> State:
    """Append given tokens to rows, and sample the next token of each row. A later call for the same row
    replaces the sampled token by given ones.
    """
    rows, C = new.rows, new.ids.shape[1]
    of_rows = {**params, "rows": new.settings.adapter}
    chunk = GivenChunk(
        new.ids, new.lengths, new.counts, state.lengths[rows] + new.counts, rows, state.prompts[rows]
    )
    h_RCD, stored = d.model.extend(of_rows, state.cache, chunk)
    last = (jnp.arange(C)[None] == new.lengths[:, None] - 1)[..., None]
    h_RD = jnp.where(last, h_RCD, 0).sum(1)
    counts = new.counts + new.lengths
    keys = jnp.where(new.firsts == counts, jax.random.wrap_key_data(new.keys), state.keys[rows])
    sampled = next_tokens(d, of_rows, h_RD, new.settings, (keys, counts - new.firsts), new.allowed)
    fresh = replace(
        state,
        cache=replace(stored, rows=sharded(stored.rows)),
        settings=_put(rows, state.settings, new.settings),
        keys=state.keys.at[rows].set(keys, mode="drop"),
        firsts=_put(rows, state.firsts, new.firsts),
    )
    return _with_tokens(fresh, rows, sampled, counts)


def decode_rows(
    d: Decoding,
    read: tuple[int, int],
    params: Params,
    state: State,
    used: Array,
    until: tuple[Array, Array],
) -> State:
    """Sample further tokens of all live rows.

    read: how many slots of cached keys attention reads: the first ones of each row, and the last ones of each
    prompt. used [R]: false for rows without a request. until: ((steps, rows) int32 [2], allowed [R, W]).
    Decoding stops after `steps` steps, or when at most `rows` rows are live. allowed: see allowed_logits.
    """
    limits, allowed = until
    state = replace(state, live=state.live & used)
    groups, every = _groups(d, state, used), jnp.arange(len(used), dtype=jnp.int32)
    params = {**params, "rows": state.settings.adapter}

    def unfinished(carry: tuple[Array, State]) -> Array:
        i, s = carry
        return (i < limits[0]) & (s.live.sum(dtype=jnp.int32) > limits[1])

    def step(carry: tuple[Array, State]) -> tuple[Array, State]:
        i, s = carry
        at = NextToken(s.lengths + s.counts - 1, s.counts, groups, *read)
        h_RD, stored = d.model.decode(params, s.cache, s.last, at)
        sampled = next_tokens(d, params, h_RD, s.settings, (s.keys, s.counts - s.firsts), allowed)
        s = replace(s, cache=replace(stored, rows=sharded(stored.rows)))
        return i + 1, _with_tokens(s, jnp.where(s.live, every, len(used)), sampled, s.counts)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def _groups(d: Decoding, state: State, used: Array) -> RowGroups:
    """Return the assignment of the used rows to the prompts that they complete."""
    (rows,), prompts = used.shape, state.cache.prompts.visible.shape[0]
    places = state.prompts * d.group + state.places
    at = jnp.where(used, places, prompts * d.group)
    index = jnp.zeros(prompts * d.group, jnp.int32).at[at].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    return RowGroups(index.reshape(prompts, d.group), jnp.minimum(places, prompts * d.group - 1))


def keep_rows(state: State, rows: Array, prompts: Array, slots: Array, used: Array) -> State:
    """Copy rows [r] and prompt slots [p], given by their indices, to a state of r rows and p prompt slots.

    slots [r]: the new prompt slot of each row. used [r]: false for rows of the new state that are empty.
    """
    old, others = state.cache, {name: x for name, x in vars(state).items() if name != "cache"}
    prompt_keys = PromptKeys(select_rows(old.prompts.layers, prompts), old.prompts.visible[prompts])
    cache = Cache(prompt_keys, select_rows(old.rows, rows), old.new)
    kept = State(cache=cache, **jax.tree.map(lambda x: x[rows], others))
    return replace(kept, live=kept.live & used, prompts=slots)


@dataclass(frozen=True)
class Engine:
    """Compiled programs of an engine. empty: returns a state without completions.

    The keys of the other programs are sizes, the first one the number of rows R of the state:
    start[R, prompts per call, tokens per prompt], extend[R, rows per call, tokens per row],
    decode[R, slots read of a row's cached keys, slots read of a prompt's], keep[R, rows of the new state].
    """

    decoding: Decoding
    slots: Slots
    empty: Callable[[], State]
    start: dict[tuple[int, int, int], Any]
    extend: dict[tuple[int, int, int], Any]
    decode: dict[tuple[int, int, int], Any]
    keep: dict[tuple[int, int], Any]


def compile_engine(d: Decoding, params: Params, slots: Slots, mesh: Mesh | None = None) -> Engine:
    """Compile the programs of an engine. params: arrays or their shapes. mesh: None for a single device."""
    tracers = program_tracers(d, params, slots, mesh)
    options = compiler_options(first_device(mesh).platform)
    lowered = {name: trace().lower() for name, trace in tracers.items()}
    programs = threads.compile_all(lowered, first_device(mesh).platform, options)
    by_size = [
        {key[1:]: program for key, program in programs.items() if key[0] == name}
        for name in ("start", "extend", "decode", "keep")
    ]
    return Engine(d, slots, programs[("empty",)], *by_size)


@cache
def compiler_options(platform: str) -> dict[str, str | bool]:
    """Return compiler options with which a sum over a row is rounded the same for every number of rows.

    platform: "cpu", "gpu" or "tpu". {} if no such option is known or the installed XLA lacks it: then sums
    may be rounded differently for another number of rows.
    """
    if platform != "cpu":
        return {}
    try:
        jax.jit(jnp.negative).lower(jax.ShapeDtypeStruct((), "float32")).compile(NO_YNNPACK_REDUCTIONS)
    except jax.errors.JaxRuntimeError:
        return {}
    return NO_YNNPACK_REDUCTIONS


def program_tracers(
    d: Decoding, params: Params, slots: Slots, mesh: Mesh | None = None
) -> dict[tuple[Any, ...], Callable[[], jax.stages.Traced]]:
    """Return a function for each program of an engine, which traces it. Keys: the program's name and its
    sizes, such as ("start", rows, prompts, tokens); see Engine.
    """
    sizes, out = row_levels(slots.rows, mesh), dict[tuple[Any, ...], Any]()
    states = {rows: state_shapes(d, slots, rows, mesh) for rows in sizes}

    def add(name: tuple[Any, ...], fn: Any, to: int, *inputs: Any) -> None:
        """to: rows of the returned state. inputs: of fn; the second one is donated, except for keep."""
        where = None if mesh is None else jax.tree.map(lambda x: x.sharding, states[to])
        donated = () if name[0] in ("empty", "keep") else (1,)
        run = jax.jit(fn, donate_argnums=donated, out_shardings=where)
        out[name] = partial(run.trace, *inputs)

    add(("empty",), partial(empty_state, d, slots, slots.rows), slots.rows)
    for rows, state in states.items():
        if rows == slots.rows or d.serving:
            for together, size in prefill_levels(slots, mesh):
                new = replicated_shapes(new_prompts(d, slots, rows, (together, size)), mesh)
                add(("start", rows, together, size), partial(start_prompts, d), rows, params, state, new)
        for together, size in extend_levels(rows, d.sampling.max_new) if d.extends else []:
            given = replicated_shapes(given_tokens(d, rows, (together, size)), mesh)
            add(("extend", rows, together, size), partial(extend_rows, d), rows, params, state, given)
        for to in (to for to in sizes if to != rows):
            integers, prompts = np.zeros(to, np.int32), np.zeros(min(slots.prompts, to), np.int32)
            kept = replicated_shapes((integers, prompts, integers, np.zeros(to, bool)), mesh)
            add(("keep", rows, to), keep_rows, to, state, *kept)
    for rows, read, prompt in decode_levels(d, slots, mesh):
        until = np.zeros(2, np.int32), all_allowed(d, rows)
        inputs = replicated_shapes((np.zeros(rows, bool), until), mesh)
        run = partial(decode_rows, d, (read, prompt))
        add(("decode", rows, read, prompt), run, rows, params, states[rows], *inputs)
    return out
