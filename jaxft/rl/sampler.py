"""Episodes of a rollout: played with the policy of a run, or read from the record of an earlier one.

All trajectories of a rollout are written to rollouts/NUMBER.npz in the run's folder. A run that was killed
reads those that it had sampled with the same weights; data.replay=runs/NAME reads another run's. A rollout
that is read is repeated to the bit: nothing is sampled for it and no environment is called. Held-out prompts
are not recorded: an evaluation samples them, also in a replay.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from jaxft.batch import TrainState
from jaxft.data.packing.row_tasks import TokenisedPrompts
from jaxft.distributed import sharding
from jaxft.engine.programs import compile_engine
from jaxft.engine.sampling import Sampling
from jaxft.engine.session import Session
from jaxft.engine.state import Decoding, Slots, rows_in_progress, slots_for
from jaxft.models.model import Model
from jaxft.rl.play import Sampler, rollout
from jaxft.rl.rewards import begin_async
from jaxft.rl.rollout_files import RECORDS, RolloutRecord, prompts_hash
from jaxft.rl.rollout_layout import BoundRun, uncounted
from jaxft.rl.trajectory import Episodes, Trajectory, collect
from jaxft.tree import Params

SampleEpisodes = Callable[[TokenisedPrompts, int, int, TrainState], Episodes]
EVALUATION = 2**31 - 1  # rollout number from which the sampling key of held-out prompts is derived


def compile_rollout_sampler(run: BoundRun, data: Any, tokenizer: Any, prompt_size: int) -> SampleEpisodes:
    """Compile the sampling programs of a run, and return (prompts, group, number, state) -> episodes.

    prompt_size: tokens of the longest prompt, padded. group: data.group or data.eval_group. number: of the
    rollout, for the keys; EVALUATION is not recorded.
    """
    play = data.play(tokenizer, run.stop)
    sampler = compile_engines(run, data, prompt_size)
    sums = jax.jit(checksum, out_shardings=sharding.replicated(run.mesh))
    weights_of = sums.lower(run.state.trainable).compile()

    def sample(prompts: TokenisedPrompts, group: int, number: int, state: TrainState) -> Episodes:
        key = jax.random.fold_in(jax.random.key(data.seed + 2), number)
        begun, begin = begin_async(data.rules.rewards, prompts)
        which = "held-out prompts" if number == EVALUATION else f"rollout {number + 1}"
        counter = run.counter if number in (0, EVALUATION) else uncounted  # later ones have lines of steps
        count = counter(f"completions of {which}", len(prompts) * group)

        def ended(episode: int, trajectory: Trajectory) -> None:
            begin(episode, trajectory)
            count(1)

        def played() -> list[Trajectory]:
            return rollout(sampler(run.params(state), group), play, prompts, group, key, ended)

        if number == EVALUATION:
            trajectories = played()
        else:
            content = int(weights_of(state.trainable)), prompts_hash(prompts, group)
            record = RolloutRecord(run.folder / RECORDS, data.replay, *content)
            trajectories = record.read(number) or record.write(number, played())
        sizes = data.sampled_length, data.episode_length, data.max_turns
        return replace(collect(prompts, trajectories, *sizes), begun=begun)

    return sample


def checksum(trainable: Params) -> UInt32[Array, ""]:
    """Return a number that depends on every bit of the weights, and on nothing else: sums are of integers."""

    def of(x: Array) -> Array:
        unsigned = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
        place = jnp.ones(bits.shape, jnp.uint32)
        for axis in range(bits.ndim):
            place = jnp.uint32(31) * place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        return jnp.sum(bits * (jnp.uint32(2) * place + jnp.uint32(1)), dtype=jnp.uint32)

    total = jnp.uint32(0)
    for x in jax.tree.leaves(trainable):
        total = total * jnp.uint32(31) + of(x)
    return total


def compile_engines(run: BoundRun, data: Any, prompt_size: int) -> Callable[[Params, int], Sampler]:
    """Compile the sampling programs of training and of evaluation, and return (params, group) -> Sampler."""
    engines = {}
    for group in {data.eval_group, data.group}:
        decoding, slots = engine_sizes(data, run.model, run.stop, group, prompt_size, run.mesh)
        engines[group] = compile_engine(decoding, run.param_shapes, slots, run.mesh)
    return lambda params, group: partial(Session, engines[group], params)


def engine_sizes(
    data: Any, model: Model, stop: tuple[int, ...], group: int, prompt_size: int, mesh: jax.sharding.Mesh
) -> tuple[Decoding, Slots]:
    """Return the static arguments of a rollout's engine. group: episodes of a prompt."""
    sampling = Sampling(data.episode_length, data.temperature, data.top_k, data.top_p, data.min_p)

    def tokens(group: int) -> int:  # of a prompt with its episodes
        return min(group, data.starts_per_row) * prompt_size + group * data.episode_length

    # an evaluation with a smaller group has as many prompts at once as there is memory for in training
    prompts = data.batch * tokens(data.group) // tokens(group)
    slots = slots_for(prompts, group, prompt_size, rows_in_progress(data.decode_rows, mesh))
    slots = slots._replace(prompts=slots.rows) if data.starts_per_row > 1 else slots
    return Decoding(model, sampling, stop, group, data.kv_cache, extends=data.max_turns > 1), slots
