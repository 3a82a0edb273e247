"""The static arguments of an engine, the sizes of its programs, and the rows in progress as arrays.

A state has R rows, which are completions in progress, and P prompts (kv_cache.py). Whatever a request chooses
is an array with a value per row, so that nothing is compiled while an engine runs.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.batch import Tokens
from jaxft.distributed import sharding
from jaxft.engine.sampling import BUCKET, RowSampling, Sampling, left_pad, row_sampling
from jaxft.models.model import Model
from jaxft.nn.adapters.lora_rows import BASE
from jaxft.nn.attention.kv_cache import SLOTS_PER_READ, Cache, CacheFormat, CacheParts, cache_axes, row_slots
from jaxft.nn.tree import struct

NO_TOKEN = -1
MOST_TOP = 20  # the most alternatives per token whose log-probs a request may ask for, as in OpenAI's API
TOP = 26  # most likely tokens whose log-probs are computed, enough for a decision's letters
# Values of RowChoices.top: no most likely tokens, those of all tokens, or those of the allowed tokens.
NO_TOP, OF_ALL, OF_ALLOWED = range(3)
TOP_STEPS = 4  # decoding steps whose most likely tokens a state stores
WORD, EVERY_TOKEN = 32, np.uint32(2**32 - 1)  # bits of a word of allowed tokens, and a word with all of them
# Decode programs that read only a part of the cached keys read at least this many slots of a row.
SMALLEST_READ = SLOTS_PER_READ
SMALLEST_PROMPT_READ = 256  # the same for the slots of a prompt
# Programs for fewer rows than this would not be faster. On an accelerator a step reads all weights, however
# few the rows are; the time to read the rows' keys matters from about 64 rows on.
FEWEST_ROWS, FEWEST_ROWS_OF_ACCELERATORS = 8, 64
MIN_MATMUL_ROWS = 2  # XLA multiplies one row by other kernels than several, and rounds differently
# From about this number of rows on, a step's matmuls take longer than reading the 16-bit weights: a device
# with F FLOP/s and W bytes/s computes 2 r FLOPs per weight of 2 bytes, so r = F / W, which is 295 on an H100,
# 281 on a B200, 153 on an A100, 240 on a TPU v5e and 166 on a v5p (distributed/devices.py, plan/machines.py).
ROWS_PER_ACCELERATOR = 256
PREFILLED_TOGETHER = 8  # prompts
# Padded tokens that a device prefills together, enough for matmuls at full speed; a longer prompt runs alone.
# Up to three programs, each for prompts four times as long as the one before, from SMALLEST_PREFILL on.
PREFILLED_TOKENS = 2048
SMALLEST_PREFILL = 128
EXTENDED_TOGETHER = 4  # rows


@dataclass(frozen=True)
class Decoding:
    """The static arguments of a compiled engine.

    sampling, stop: settings of rows whose request has none; stop: token ids. sampling.max_new: the most
    tokens of a row after its prompt, given tokens included. group: completions per prompt. cache: how keys
    and values are stored. stops: the most stop tokens of a row, or len(stop) if that is more.

    extends: whether rows continue after given tokens. constrained: whether completions may have to match a
    grammar. serving: whether rows have their own settings and may start while others decode; log-probs are
    then at temperature 1 instead of the sampling temperature, and the most likely tokens are returned, too.
    """

    model: Model
    sampling: Sampling
    stop: tuple[int, ...]
    group: int = 1
    cache: CacheFormat = "compute"
    stops: int = 0
    extends: bool = False
    constrained: bool = False
    serving: bool = False

    @property
    def top(self) -> int:
        """The number of most likely tokens whose log-probs are computed."""
        return min(TOP, self.model.config.vocab) if self.serving else 0


class Slots(NamedTuple):
    """Sizes of an engine.

    rows: completions in progress. prompts: prompts whose keys are cached. size: tokens of the longest prompt,
    padded. together: the most prompts that are prefilled together.
    """

    rows: int
    prompts: int
    size: int
    together: int


def slots_for(prompts: int, group: int, longest: int, rows: int | None = None) -> Slots:
    """Return the sizes for `prompts` prompts of at most `longest` tokens with `group` completions each.

    rows: the most completions in progress (at least `group`); None for all. If that is fewer than all, at
    most a quarter of the rows is refilled at a time, because the other rows wait meanwhile. With group > 1
    there are then slots for twice as many prompts as are in progress, because a prompt keeps its slot until
    its last completion has ended.
    """
    most = prompts * group if rows is None else min(max(rows, group), prompts * group)
    most -= most % group
    at_once = most // group
    kept = at_once if group == 1 else min(prompts, 2 * at_once)
    calls = -(-at_once // PREFILLED_TOGETHER)
    together = -(-at_once // calls)
    if at_once < prompts:
        together = min(together, max(at_once // 4, 1))
    return Slots(max(most, MIN_MATMUL_ROWS), kept, -(-longest // BUCKET) * BUCKET, together)


def rows_in_progress(asked: int | None, mesh: Mesh | None) -> int | None:
    """Return the most completions that are sampled at the same time, None for all. asked: the user's setting.

    If `asked` is None, a CPU samples all. An accelerator samples as many as cost no more time per step than
    fewer would, and new prompts take the rows of ended completions. With all at once, rows of ended
    completions would be computed until the longest completion has ended.
    """
    if asked is not None or first_device(mesh).platform == "cpu":
        return asked
    return ROWS_PER_ACCELERATOR * (1 if mesh is None else sharding.row_shards(mesh))


def first_device(mesh: Mesh | None) -> Any:
    """Return the first device of the mesh; without a mesh, jax's default device."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def row_levels(rows: int, mesh: Mesh | None) -> list[int]:
    """Return the numbers of rows for which programs are compiled: `rows`, its half and its quarter, the last
    two only from FEWEST_ROWS on. On several devices only `rows`: fewer would move cached keys between
    devices.
    """
    fewest = FEWEST_ROWS if first_device(mesh).platform == "cpu" else FEWEST_ROWS_OF_ACCELERATORS
    levels = [rows]
    while mesh is None or mesh.size == 1:
        half = -(-levels[-1] // 2)
        if half < fewest or len(levels) == 3:
            break
        levels.append(half)
    return levels


def read_levels(new: int) -> list[int]:
    """Return, ascending, how many slots of each row's cached keys the decode programs read: one to three
    numbers. new: the most tokens of a completion.

    >>> read_levels(500)
    [128, 256, 512]
    """
    levels = [row_slots(new)]
    while len(levels) < 3 and levels[0] > SMALLEST_READ:
        levels.insert(0, -(-levels[0] // (2 * SMALLEST_READ)) * SMALLEST_READ)
    return levels


def prefill_levels(slots: Slots, mesh: Mesh | None) -> list[tuple[int, int]]:
    """Return (prompts, tokens per prompt) of every prefill program; smaller ones pad short prompts less."""
    sizes = [slots.size]
    while len(sizes) < 3 and sizes[0] > 2 * SMALLEST_PREFILL:
        sizes.insert(0, max(-(-sizes[0] // (4 * BUCKET)) * BUCKET, SMALLEST_PREFILL))
    if mesh is not None and mesh.size > 1:  # devices share the prompts
        return [(slots.together, size) for size in sizes]
    return [(max(1, min(slots.together, PREFILLED_TOKENS // size)), size) for size in sizes]


def extend_levels(rows: int, new: int) -> list[tuple[int, int]]:
    """Return (rows, tokens per row) of every program that extends rows. More tokens need several calls.

    rows: rows of the engine. new: the most tokens of a completion.
    """
    long = [(1, 8 * BUCKET)] if new > 8 * BUCKET else []
    several = [(EXTENDED_TOGETHER, BUCKET)] if rows >= EXTENDED_TOGETHER else []
    return [(1, BUCKET), *long, *several]


def decode_levels(d: Decoding, slots: Slots, mesh: Mesh | None) -> list[tuple[int, int, int]]:
    """Return (rows, read, prompt) of every decode program: its rows, and how many slots of each row's and
    each prompt's cached keys it reads.

    Programs for fewer rows read all slots. A server's programs do, too, because its rows differ in length,
    unless its rows can be continued.
    """
    sizes, reads = row_levels(slots.rows, mesh), read_levels(d.sampling.max_new)
    half = -(-slots.size // (2 * BUCKET)) * BUCKET
    halves = [] if d.serving or half < SMALLEST_PROMPT_READ else [half]
    of_all = reads[-1:] if d.serving and not d.extends else reads
    levels = [(slots.rows, read, prompt) for read in of_all for prompt in (*halves, slots.size)]
    return levels + [(rows, reads[-1], slots.size) for rows in sizes[1:]]


@struct
class RowChoices:
    """The settings of requests, with a value per row [R].

    limit: the number of tokens at which a completion ends. stops [R, S]: stop tokens, NO_TOKEN for none.
    adapter: index of a LoRA adapter, see lora_rows.py. top: which most likely tokens to return:
    none (NO_TOP), the most likely of all tokens (OF_ALL), or of the allowed tokens (OF_ALLOWED).
    """

    sampling: RowSampling
    limit: Any
    stops: Any
    adapter: Any
    top: Any


@struct
class State:
    """Completions in progress, in R rows.

    cache: keys and values. tokens, logps [R, max_new]: sampled tokens and their log-probs; undefined at given
    tokens, -1 and 0 after the last token. top_tokens, top_logps [R, TOP_STEPS, top]: the most likely tokens
    at token t and their log-probs, in entry t % TOP_STEPS. last [R]: the last token, whose keys are not
    stored yet. counts [R]: tokens so far, sampled or given. live [R]: whether the row decodes further tokens.
    prompts, places [R]: the prompt slot of each row, and its index among the completions of that prompt.
    lengths [R]: tokens of its prompt. keys [R]: random keys; firsts [R]: token t is sampled with fold_in(key,
    t - first).
    """

    cache: Cache
    settings: RowChoices
    tokens: Any
    logps: Any
    top_tokens: Any
    top_logps: Any
    last: Any
    counts: Any
    live: Any
    prompts: Any
    places: Any
    lengths: Any
    keys: Any
    firsts: Any


@struct
class NewPrompts:
    """Prompts to start, padded on the left, and their rows.

    slots [p]: prompt slot of each prompt. rows [p, G]: row of each completion. An empty prompt or completion
    has an index beyond the last slot or row. numbers [p]: prompts' numbers, folded into the random keys. keys
    [p, ...]: data of random keys. settings [p]: settings of each prompt's rows. allowed: see
    programs.allowed_logits.
    """

    tokens: Tokens
    slots: Any
    numbers: Any
    rows: Any
    keys: Any
    settings: RowChoices
    allowed: Any


@struct
class GivenTokens:
    """Tokens to append to rows, padded on the right: a row's last token and the given tokens after it.

    ids [r, C]. lengths [r]: ids without padding. counts [r]: tokens that the row's cache has before `ids`.
    firsts [r]: see State; if the next token is the first, the row takes its key from `keys`. rows, keys,
    settings, allowed: as in NewPrompts, [r].
    """

    ids: Any
    lengths: Any
    counts: Any
    firsts: Any
    rows: Any
    keys: Any
    settings: RowChoices
    allowed: Any


def empty_settings(d: Decoding, rows: int) -> RowChoices:
    """Return the engine's default settings for `rows` rows, as NumPy arrays."""
    stops = np.full((rows, max(d.stops, len(d.stop), 1)), NO_TOKEN, np.int32)
    stops[:, : len(d.stop)] = d.stop
    sampling = jax.tree.map(lambda x: np.full(rows, x), row_sampling(d.sampling, d.model.config.vocab))
    limit, adapter = (np.full(rows, x, np.int32) for x in (d.sampling.max_new, BASE))
    return RowChoices(sampling, limit, stops, adapter, np.full(rows, NO_TOP, np.int32))


def all_allowed(d: Decoding, rows: int) -> np.ndarray:
    """Return a mask that allows every token in every row; see programs.allowed_logits."""
    return np.full((rows, -(-d.model.config.vocab // WORD) * d.constrained), EVERY_TOKEN, np.uint32)


def key_data(key: jax.Array) -> np.ndarray:
    """Return the data of a random key as a NumPy array."""
    return np.asarray(jax.random.key_data(key))


@cache
def _shape_of_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))


def no_keys(count: int) -> np.ndarray:
    """Return the data of `count` random keys, all zeros. It needs no device, so a memory plan can use it."""
    data = _shape_of_key()
    return np.zeros((count, *data.shape), data.dtype)


def new_prompts(d: Decoding, slots: Slots, rows: int, size: tuple[int, int], prompts: Any = ()) -> NewPrompts:
    """Left-pad `prompts` to `size` = (prompts, tokens per prompt), with empty prompts after the given ones.

    No prompt has a slot or rows yet: its slot index is beyond the last slot, and the row index of each of its
    completions is beyond the last of `rows` rows.
    """
    count, keys = size[0], no_keys(size[0])
    return NewPrompts(
        left_pad(prompts, *size), np.full(count, slots.prompts, np.int32), np.zeros(count, np.int32),
        np.full((count, d.group), rows, np.int32), keys, empty_settings(d, count), all_allowed(d, count),
    )  # fmt: skip


def given_tokens(d: Decoding, rows: int, size: tuple[int, int]) -> GivenTokens:
    """Return an empty GivenTokens for a state of `rows` rows. size: (rows to extend, tokens per row)."""
    count, integers = size[0], np.zeros((3, size[0]), np.int32)
    return GivenTokens(
        np.zeros(size, np.int32), integers[0], integers[1], integers[2], np.full(count, rows, np.int32),
        no_keys(count), empty_settings(d, count), all_allowed(d, count),
    )  # fmt: skip


def empty_state(d: Decoding, slots: Slots, rows: int) -> State:
    """Return a state of `rows` rows without completions."""
    new, integers, top = d.sampling.max_new, jnp.zeros(rows, jnp.int32), (rows, TOP_STEPS, d.top)
    return State(
        cache=d.model.empty_cache((min(slots.prompts, rows), slots.size), rows, new, d.cache),
        settings=jax.tree.map(jnp.asarray, empty_settings(d, rows)),
        tokens=jnp.full((rows, new), NO_TOKEN, jnp.int32),
        logps=jnp.zeros((rows, new), jnp.float32),
        top_tokens=jnp.full(top, NO_TOKEN, jnp.int32),
        top_logps=jnp.zeros(top, jnp.float32),
        last=integers,
        counts=integers,
        live=jnp.zeros(rows, bool),
        prompts=integers,
        places=integers,
        lengths=integers,
        keys=jnp.broadcast_to(jax.random.key(0), (rows,)),
        firsts=integers,
    )


def state_shapes(d: Decoding, slots: Slots, rows: int, mesh: Mesh | None) -> State:
    """Return the shapes of a state of `rows` rows. Cached keys and values are sharded over rows and heads;
    all other arrays are replicated.
    """
    shapes = jax.eval_shape(partial(empty_state, d, slots, rows))
    if mesh is None:
        return shapes
    cache = shapes.cache

    def place(x: Any, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        where = sharding.array_sharding(mesh, axes, x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def of(layers: CacheParts) -> CacheParts:
        return jax.tree.map(place, layers, cache_axes(layers))

    state = replicated_shapes(shapes, mesh)
    prompt_keys = replace(state.cache.prompts, layers=of(cache.prompts.layers))
    return replace(state, cache=replace(state.cache, prompts=prompt_keys, rows=of(cache.rows)))


def replicated_shapes(tree: Any, mesh: Mesh | None) -> Any:
    """Return the shapes (jax.ShapeDtypeStruct) of a tree of arrays that are replicated on all devices."""
    where = None if mesh is None else sharding.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where), tree)
