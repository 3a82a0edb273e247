"""The compiled programs of text generation: start completions of prompts, decode, drop rows.

The state has R rows, which are completions in progress, and P prompts (nn/cache.py). `start_completions`
prefills prompts and samples the first token of each of their completions. `decode_until` samples further
tokens until a limit, or until few enough rows are left for the host to replace them (engine.py).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.batch import Tokens
from jaxft.inference.batch_invariance import row_logits
from jaxft.inference.sampling import NONFINITE, Sampling, sample
from jaxft.models.model import Model
from jaxft.nn.cache import (
    Cache,
    CacheFormat,
    NextToken,
    PromptKeys,
    clear_values,
    insert_prompts,
    select_rows,
    sharded,
    widen_prompts,
)
from jaxft.nn.cached_attention import RowGroups
from jaxft.tree import Params, struct


@dataclass(frozen=True)
class Decoding:
    """What generation programs are compiled for: model, sampling, stop tokens, completions per prompt.

    cache: how keys and values are stored.
    """

    model: Model
    sampling: Sampling
    stop: tuple[int, ...]
    group: int = 1
    cache: CacheFormat = "compute"


@struct
class DecodeState:
    """Completions in progress, in R rows.

    cache: keys and values. tokens, logps [R, max_new]: -1 and 0 after the last token. last [R]: the last
    token. counts [R]: tokens so far. live [R]: rows that continue. prompts [R]: the prompt slot of each row.
    places [R]: its number among the completions of that prompt. lengths [R]: tokens of its prompt. keys [R]:
    random keys.
    """

    cache: Cache
    tokens: Any
    logps: Any
    last: Any
    counts: Any
    live: Any
    prompts: Any
    places: Any
    lengths: Any
    keys: Any


@struct
class NewPrompts:
    """Prompts to start, padded on the left, with where they go.

    slots: prompt slot of each [p]; the number of slots for none. rows: rows of their completions [p, G]; the
    number of rows for none. numbers: of the prompts [p], from which random keys are derived.
    """

    tokens: Tokens
    slots: Any
    rows: Any
    numbers: Any


def empty_state(d: Decoding, prompts: tuple[int, int], rows: int) -> DecodeState:
    """Return a state without completions. prompts: slots for prompts, and tokens of each."""
    new, integers = d.sampling.max_new, jnp.zeros(rows, jnp.int32)
    return DecodeState(
        cache=d.model.empty_cache(prompts, rows, new, d.cache),
        tokens=jnp.full((rows, new), -1, jnp.int32),
        logps=jnp.zeros((rows, new), jnp.float32),
        last=integers,
        counts=integers,
        live=jnp.zeros(rows, bool),
        prompts=integers,
        places=integers,
        lengths=integers,
        keys=jnp.broadcast_to(jax.random.key(0), (rows,)),
    )


def next_tokens(
    d: Decoding, params: Params, h_RD: Array, keys: Array, counts: Array
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Sample a token per row from hidden states; return it with its log-prob at the temperature.

    The key of a row's token is derived from the row's key and the number of earlier tokens. A token whose
    logits are not finite is NONFINITE.
    """
    s, logits = d.sampling, row_logits(d.model, params, h_RD)
    tokens = sample(logits, s, jax.vmap(jax.random.fold_in)(keys, counts))
    largest = jnp.abs(logits).max(-1)  # one more reduction that vectorises, as those of fast_argmax
    tokens = jnp.where(largest < jnp.inf, tokens, NONFINITE)  # false for NaN too
    logits = logits / (s.temperature or 1.0)
    chosen = jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0]
    return tokens, (chosen - jax.nn.logsumexp(logits, -1)).astype(jnp.float32)


def continues(d: Decoding, tokens: Int[Array, " R"], counts: Int[Array, " R"]) -> Array:
    """Whether completions go on after their last token; counts: their tokens, including it."""
    stops = jnp.asarray((*d.stop, NONFINITE), jnp.int32)
    return ~jnp.isin(tokens, stops) & (counts < d.sampling.max_new)


def start_completions(
    d: Decoding, params: Params, state: DecodeState, new: NewPrompts, key: Array
) -> DecodeState:
    """Prefill prompts, padded to at most the tokens of a prompt slot, and sample the first token of their
    completions.
    """
    h_PTD, prompt_keys = d.model.prefill(params, new.tokens, d.sampling.max_new)
    prompt_keys = widen_prompts(prompt_keys, state.cache.prompts)
    cache = insert_prompts(state.cache, prompt_keys, new.slots, d.model.dtype)
    count, group = new.rows.shape
    cache = replace(cache, rows=clear_values(cache.rows, new.rows.reshape(count * group)))
    of_prompt = jax.vmap(lambda number: jax.random.fold_in(key, number))(new.numbers)
    places = jnp.broadcast_to(jnp.arange(group, dtype=jnp.int32), (count, group))
    keys = jax.vmap(lambda k, numbers: jax.vmap(lambda i: jax.random.fold_in(k, i))(numbers))(
        of_prompt, places
    )

    def spread(x: Array) -> Array:  # from prompts to their completions
        return jnp.repeat(x, group, 0)

    keys, rows, none = keys.reshape(count * group), new.rows.reshape(count * group), spread(new.slots) * 0
    tokens, logps = next_tokens(d, params, spread(h_PTD[:, -1]), keys, none)

    def put(old: Array, x: Array) -> Array:
        return old.at[rows].set(x, mode="drop")

    cleared = replace(
        state,
        tokens=put(state.tokens, jnp.full((len(rows), d.sampling.max_new), -1, jnp.int32)),
        logps=put(state.logps, jnp.zeros((len(rows), d.sampling.max_new), jnp.float32)),
    )
    return replace(
        cleared,
        cache=cache,
        tokens=cleared.tokens.at[rows, 0].set(tokens, mode="drop"),
        logps=cleared.logps.at[rows, 0].set(logps, mode="drop"),
        last=put(state.last, tokens),
        counts=put(state.counts, none + 1),
        live=put(state.live, continues(d, tokens, none + 1)),
        prompts=put(state.prompts, spread(new.slots)),
        places=put(state.places, places.reshape(count * group)),
        lengths=put(state.lengths, spread(new.tokens.positions[:, -1] + 1)),
        keys=put(state.keys, keys),
    )


@struct
class DecodeLimits:
    """When decoding stops: after `steps` steps, or when at most `rows` rows are live."""

    steps: Any
    rows: Any


def decode_until(
    d: Decoding, read: tuple[int, int], params: Params, state: DecodeState, limits: DecodeLimits
) -> DecodeState:
    """Sample further tokens of all live rows. read: how many first slots of rows' keys, and how many last
    slots of prompts' keys, are read.
    """
    groups = _groups(d, state)
    columns = jnp.arange(d.sampling.max_new, dtype=jnp.int32)

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        i, s = carry
        return (i < limits.steps) & (s.live.sum(dtype=jnp.int32) > limits.rows)

    def step(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        i, s = carry
        at = NextToken(s.lengths + s.counts - 1, s.counts, groups, *read)
        h_RD, cache = d.model.decode(params, s.cache, s.last, at)
        tokens, logps = next_tokens(d, params, h_RD, s.keys, s.counts)
        here = (columns[None] == s.counts[:, None]) & s.live[:, None]
        counts = s.counts + s.live.astype(jnp.int32)
        return i + 1, replace(
            s,
            cache=replace(cache, rows=sharded(cache.rows)),
            tokens=jnp.where(here, tokens[:, None], s.tokens),
            logps=jnp.where(here, logps[:, None], s.logps),
            last=jnp.where(s.live, tokens, s.last),
            counts=counts,
            live=s.live & continues(d, tokens, counts),
        )

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


def _groups(d: Decoding, state: DecodeState) -> RowGroups:
    """Return which live rows complete which prompt."""
    (rows,), prompts = state.live.shape, state.cache.prompts.visible.shape[0]
    places = state.prompts * d.group + state.places
    used = jnp.where(state.live, places, prompts * d.group)
    index = (
        jnp.zeros(prompts * d.group, jnp.int32).at[used].set(jnp.arange(rows, dtype=jnp.int32), mode="drop")
    )
    return RowGroups(index.reshape(prompts, d.group), jnp.minimum(places, prompts * d.group - 1))


def keep_rows(state: DecodeState, rows: Int[Array, " r"], prompts: Int[Array, " p"]) -> DecodeState:
    """Return the state with these rows and prompts only.

    prompts: ascending; the rows' prompts must be among them.
    """
    cache = state.cache
    kept = PromptKeys(select_rows(cache.prompts.layers, prompts), cache.prompts.visible[prompts])

    def of(x: Array) -> Array:
        return x[rows]

    slots = jnp.searchsorted(prompts, of(state.prompts)).astype(jnp.int32)
    return DecodeState(
        Cache(kept, select_rows(cache.rows, rows), cache.new), of(state.tokens), of(state.logps),
        of(state.last), of(state.counts), of(state.live), slots, of(state.places), of(state.lengths),
        of(state.keys),
    )  # fmt: skip
