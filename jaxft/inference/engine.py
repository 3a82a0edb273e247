"""Complete any number of prompts with a fixed number of rows: rows that ended take the next prompts."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxft.distributed import sharding
from jaxft.inference import decode as programs
from jaxft.inference.batch_invariance import MIN_MATMUL_ROWS, compiler_options
from jaxft.inference.decode import DecodeLimits, DecodeState, Decoding, NewPrompts
from jaxft.inference.sampling import BUCKET, left_pad
from jaxft.nn.cache import SLOTS_PER_READ, LayerKeys, key_axes, row_slots
from jaxft.tree import Params

# Slots of rows' keys; programs that read fewer than all are compiled from this size on.
SMALLEST_READ = SLOTS_PER_READ
SMALLEST_PROMPT_READ = 256  # the same for prompts
# Programs for fewer rows than this would not be faster. On an accelerator a step reads the weights, however
# few the rows, and the keys of all rows, which count from about this number on.
FEWEST_ROWS, FEWEST_ROWS_OF_ACCELERATORS = 8, 64
# From about this number of rows on, a step's matmuls take longer than reading the 16-bit weights: a device
# with F FLOP/s and W bytes/s computes 2 r FLOPs per weight of 2 bytes, so r = F / W, which is 295 on an H100,
# 281 on a B200, 153 on an A100, 240 on a TPU v5e and 166 on a v5p (distributed/devices.py, plan/machines.py).
ROWS_PER_ACCELERATOR = 256
PREFILLED_TOGETHER = 8  # prompts
# Padded tokens that a device prefills together, enough for matmuls at full speed; a longer prompt runs alone.
# Up to three programs, each for prompts four times as long as the one before, from SMALLEST_PREFILL on.
PREFILLED_TOKENS = 2048
SMALLEST_PREFILL = 128
STEPS_BETWEEN_LOOKS = 16  # decoding steps, after which is_enough is called


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

    rows: the most completions in progress, but never fewer than those of a prompt; None for all. A prompt
    keeps its slot until its last completion has ended. So if not all completions are in progress, there are
    slots for twice as many prompts as rows have room for. At most a quarter of the rows is refilled at a
    time, because rows are idle until so many have ended.
    For one completion in progress there is a second row, which is empty (batch_invariance.py).
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
    """Return the most completions that are sampled at the same time, None for all.

    asked: by the user. By default a CPU samples all; an accelerator as many as make its steps longer, so that
    rows that ended take the next prompts instead of being computed up to the longest completion.
    """
    if asked is not None or first_device(mesh).platform == "cpu":
        return asked
    return ROWS_PER_ACCELERATOR * (1 if mesh is None else sharding.row_shards(mesh))


def first_device(mesh: Mesh | None) -> Any:
    """Return a device of the mesh, or without one the device that jax uses."""
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


class SampledTokens(NamedTuple):
    """Completions of n prompts, G each. tokens: -1 beyond the end. logps: 0 there, see decode.next_tokens."""

    tokens: Int[np.ndarray, "n G N"]
    logps: Float[np.ndarray, "n G N"]


@dataclass(frozen=True)
class Engine:
    """Compiled programs for one Decoding and one size.

    empty, start, decode and keep: functions of inference/decode.py. start: by the numbers of prompts and of
    their tokens, see prefill_levels. decode: by the number of rows, of slots of rows' keys that are read, and
    of those of prompts' keys. keep: by two numbers of rows; once no prompts wait, the state shrinks from one
    to the other.
    """

    decoding: Decoding
    slots: Slots
    empty: Any
    start: dict[tuple[int, int], Any]
    decode: dict[tuple[int, int, int], Any]
    keep: dict[tuple[int, int], Any]

    def complete(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        key: Array,
        numbers: Sequence[int] | None = None,
        is_enough: Callable[[list[int]], bool] | None = None,
        ended: Callable[[int], None] = lambda completions: None,
    ) -> SampledTokens:
        """Complete every prompt `decoding.group` times.

        The random key of completion i of a prompt is derived from `key`, the prompt's number (by default its
        index) and i. So its tokens do not depend on the other prompts, nor on the sizes of the engine, but
        for rounding: kernels of other shapes may add in another order, which can swap a token for one that is
        about as likely. On which CPUs they and their log-probs are the same to the bit: batch_invariance.py.

        is_enough: called with the tokens of each completion so far, every STEPS_BETWEEN_LOOKS steps; True
        ends the completion, for stop strings. ended: called with the number of further completions that have
        ended.
        """
        job = _Job(self, params, key, prompts, range(len(prompts)) if numbers is None else numbers)
        while job.waiting or job.live.any():
            job.start_prompts()
            ended(job.decode(is_enough))
        return SampledTokens(job.tokens, job.logps)


def compile_engine(d: Decoding, params: Params, slots: Slots, mesh: Mesh | None = None) -> Engine:
    """Compile the programs of an engine. params: arrays or their shapes. mesh: None for a single device."""
    tracers = program_tracers(d, params, slots, mesh)
    options = compiler_options(first_device(mesh).platform)
    found = {name: trace().lower().compile(options) for name, trace in tracers.items()}
    start, decode, keep = (
        {key[1:]: program for key, program in found.items() if key[0] == name}
        for name in ("start", "decode", "keep")
    )
    return Engine(d, slots, found[("empty",)], start, decode, keep)


def program_tracers(
    d: Decoding, params: Params, slots: Slots, mesh: Mesh | None = None
) -> dict[tuple[Any, ...], Callable[[], jax.stages.Traced]]:
    """Return a function that traces each program of an engine.

    The programs are ("empty",), ("start", prompts, tokens), ("decode", rows, read, prompt) and ("keep", from,
    to), with numbers of rows.
    """
    sizes = row_levels(slots.rows, mesh)
    states = {rows: state_shapes(d, slots, rows, mesh) for rows in sizes}
    first, key = states[slots.rows], replicated_shapes(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    integer = replicated_shapes(np.int32(0), mesh)
    limits = DecodeLimits(integer, integer)

    def jitted(fn: Any, rows: int, donate: tuple[int, ...] = ()) -> Any:
        where = None if mesh is None else jax.tree.map(lambda x: x.sharding, states[rows])
        return jax.jit(fn, donate_argnums=donate, out_shardings=where)

    empty = partial(programs.empty_state, d, (slots.prompts, slots.size), slots.rows)
    begin = jitted(partial(programs.start_completions, d), slots.rows, (1,))
    out: dict[tuple[Any, ...], Any] = {
        ("empty",): jitted(empty, slots.rows).trace,
    }
    for together, size in prefill_levels(slots, mesh):
        new = replicated_shapes(new_prompts(slots, d.group, together, size, []), mesh)
        out["start", together, size] = partial(begin.trace, params, first, new, key)
    for rows, read, prompt in decode_levels(slots, d.sampling.max_new, mesh):
        run = jitted(partial(programs.decode_until, d, (read, prompt)), rows, (1,))
        out["decode", rows, read, prompt] = partial(run.trace, params, states[rows], limits)
    for larger, smaller in zip(sizes, sizes[1:], strict=False):
        left = np.zeros(smaller, np.int32), np.zeros(min(slots.prompts, smaller), np.int32)
        shrink = jitted(programs.keep_rows, smaller)
        out["keep", larger, smaller] = partial(shrink.trace, states[larger], *replicated_shapes(left, mesh))
    return out


def row_levels(rows: int, mesh: Mesh | None) -> list[int]:
    """Return the numbers of rows that have programs, descending.

    Each is half the one before, down to the fewest for which a program is faster. On several devices, which
    would have to exchange the keys of rows, there is one.
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
    """Return the numbers of slots of rows' keys that have programs, ascending: at most three, all at last.

    new: the most tokens of a completion.
    """
    levels = [row_slots(new)]
    while len(levels) < 3 and levels[0] > SMALLEST_READ:
        levels.insert(0, -(-levels[0] // (2 * SMALLEST_READ)) * SMALLEST_READ)
    return levels


def prefill_levels(slots: Slots, mesh: Mesh | None) -> list[tuple[int, int]]:
    """Return (prompts, tokens) of every program that prefills, ascending by tokens: padded prompts would
    otherwise take as long as the longest.
    """
    sizes = [slots.size]
    while len(sizes) < 3 and sizes[0] > 2 * SMALLEST_PREFILL:
        sizes.insert(0, max(-(-sizes[0] // (4 * BUCKET)) * BUCKET, SMALLEST_PREFILL))
    if mesh is not None and mesh.size > 1:  # devices share the prompts
        return [(slots.together, size) for size in sizes]
    return [(max(1, min(slots.together, PREFILLED_TOKENS // size)), size) for size in sizes]


def prompt_levels(size: int) -> list[int]:
    """Return the numbers of slots of prompts' keys that have programs, ascending: half of them and all, or
    all.
    """
    half = -(-size // (2 * BUCKET)) * BUCKET
    return [half, size] if half >= SMALLEST_PROMPT_READ else [size]


def decode_levels(slots: Slots, new: int, mesh: Mesh | None) -> list[tuple[int, int, int]]:
    """Return (rows, read, prompt) of every decode program. Fewer rows than all read all slots."""
    sizes = row_levels(slots.rows, mesh)
    reads = read_levels(new)
    of_all = [(slots.rows, read, size) for read in reads for size in prompt_levels(slots.size)]
    return of_all + [(rows, reads[-1], slots.size) for rows in sizes[1:]]


def state_shapes(d: Decoding, slots: Slots, rows: int, mesh: Mesh | None) -> DecodeState:
    """Return the shapes of a state of `rows` rows. Keys are sharded over rows and heads, the rest is on every
    device.
    """
    prompts = min(slots.prompts, rows)
    shapes = jax.eval_shape(partial(programs.empty_state, d, (prompts, slots.size), rows))
    if mesh is None:
        return shapes
    cache = shapes.cache

    def place(x: Any, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
        where = sharding.array_sharding(mesh, axes, x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def of(layers: LayerKeys) -> LayerKeys:
        return jax.tree.map(place, layers, key_axes(layers))

    state = replicated_shapes(shapes, mesh)
    prompt_keys = replace(state.cache.prompts, layers=of(cache.prompts.layers))
    return replace(state, cache=replace(state.cache, prompts=prompt_keys, rows=of(cache.rows)))


def replicated_shapes(tree: Any, mesh: Mesh | None) -> Any:
    """Return the shapes of a tree of arrays that are on every device."""
    where = None if mesh is None else sharding.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where), tree)


def new_prompts(
    slots: Slots, group: int, together: int, size: int, prompts: Sequence[Sequence[int]]
) -> NewPrompts:
    """Return a NewPrompts of `together` prompts of `size` tokens. Beyond the given ones they are empty, and
    none of them has a slot or rows yet.
    """
    return NewPrompts(
        left_pad(prompts, together, size),
        slots=np.full(together, slots.prompts, np.int32),
        rows=np.full((together, group), slots.rows, np.int32),
        numbers=np.zeros(together, np.int32),
    )


class _Job:
    """Prompts that an engine completes, and which rows have which of them, on the host.

    waiting: indices of prompts, the longest first, so that prompts of similar lengths are prefilled together.
    owners: (prompt, completion) in each row. live: rows in progress.
    """

    def __init__(
        self, engine: Engine, params: Params, key: Array, prompts: Sequence[Sequence[int]], numbers: Any
    ):
        d, slots = engine.decoding, engine.slots
        self.engine, self.params, self.key = engine, params, key
        self.prompts, self.numbers = prompts, list(numbers)
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
        shape = len(prompts), d.group, d.sampling.max_new
        self.tokens, self.logps = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        self.state = engine.empty()
        self.counts = np.zeros(slots.rows, np.int32)  # tokens of each row's completion
        self.live = np.zeros(slots.rows, bool)
        self.owners = np.full((slots.rows, 2), -1)
        self.slot_of = np.full(slots.rows, -1)  # prompt slot of each row

    def start_prompts(self) -> None:
        """Start waiting prompts while there are a prompt slot and rows for all of their completions."""
        slots, group = self.engine.slots, self.engine.decoding.group
        while self.waiting:
            free_rows = np.flatnonzero(~self.live)
            used = set(self.slot_of[self.live].tolist())
            free_slots = [slot for slot in range(slots.prompts) if slot not in used]
            together, size = self._prefill_level()
            wanted = min(together, len(self.waiting))
            count = min(wanted, len(free_slots), len(free_rows) // group)
            if not count or (count < wanted and self.live.any()):
                return
            chosen = [self.waiting.popleft() for _ in range(count)]
            new = new_prompts(slots, group, together, size, [self.prompts[i] for i in chosen])
            rows = free_rows[: count * group].reshape(count, group)
            new.slots[:count], new.rows[:count] = free_slots[:count], rows
            new.numbers[:count] = [self.numbers[i] for i in chosen]
            self.state = self.engine.start[together, size](self.params, self.state, new, self.key)
            for i, slot, own in zip(chosen, free_slots, rows, strict=False):
                self.owners[own] = [(i, completion) for completion in range(group)]
                self.slot_of[own] = slot
            self.live[rows], self.counts[rows] = True, 1

    def _prefill_level(self) -> tuple[int, int]:
        """Return the (prompts, tokens) of the smallest program for the first waiting prompt, the longest."""
        longest = len(self.prompts[self.waiting[0]])
        return min((level for level in self.engine.start if level[1] >= longest), key=lambda level: level[1])

    def decode(self, is_enough: Callable[[list[int]], bool] | None) -> int:
        """Decode until rows can be given to waiting prompts, or dropped, then collect what has ended; return
        the number of completions that have. is_enough: see Engine.complete.
        """
        engine, (rows,) = self.engine, self.live.shape
        group = engine.decoding.group
        longest = max(len(self.prompts[i]) for i in self.owners[self.live, 0])
        most = int(self.counts[self.live].max(initial=1))
        read, prompt = min(
            (read, prompt)
            for size, read, prompt in engine.decode
            if size == rows and read >= most and prompt >= longest
        )
        limit = read - most + 1
        limit = limit if is_enough is None else min(limit, STEPS_BETWEEN_LOOKS)
        smaller = max((to for size, to in engine.keep if size == rows), default=0)
        stop = smaller
        if self.waiting:
            wanted = min(self._prefill_level()[0], len(self.waiting)) * group
            stop = min(rows - wanted, int(self.live.sum()) - 1)
        self.state = engine.decode[rows, read, prompt](
            self.params, self.state, DecodeLimits(np.int32(limit), np.int32(max(stop, 0)))
        )
        ended = self._collect(is_enough)
        if not self.waiting and smaller and self.live.any() and self.live.sum() <= smaller:
            self._shrink(smaller)
        return ended

    def _collect(self, is_enough: Callable[[list[int]], bool] | None) -> int:
        """Read the completions that have ended, end those that is_enough accepts, and return their number."""
        state = self.state
        live, tokens, logps, counts = jax.device_get((state.live, state.tokens, state.logps, state.counts))
        self.counts = np.array(counts)
        if is_enough is not None:
            unfinished = [row and not is_enough(own[own >= 0].tolist()) for row, own in zip(live, tokens)]
            if (live != unfinished).any():
                live = np.array(unfinished)
                self.state = replace(state, live=jax.device_put(live, state.live.sharding))
        ended = np.flatnonzero(self.live & ~live)
        for row in ended:
            prompt, completion = self.owners[row]
            self.tokens[prompt, completion], self.logps[prompt, completion] = tokens[row], logps[row]
        self.live = np.array(live)
        return len(ended)

    def _shrink(self, rows: int) -> None:
        """Continue with a state of fewer rows, which has all live ones."""
        order = np.argsort(~self.live, kind="stable")[:rows].astype(np.int32)
        count = min(self.engine.slots.prompts, rows)
        used = np.unique(self.slot_of[self.live])
        rest = np.setdiff1d(np.arange(self.state.cache.prompts.visible.shape[0]), used)
        kept = np.sort(np.concatenate([used, rest])[:count]).astype(np.int32)
        self.state = self.engine.keep[len(self.live), rows](self.state, order, kept)
        slots = np.searchsorted(kept, self.slot_of[order])
        self.live, self.owners, self.slot_of = self.live[order], self.owners[order], slots
        self.counts = self.counts[order]
