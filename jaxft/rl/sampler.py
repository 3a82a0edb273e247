"""Episodes of a rollout: played with the policy of a run, or read from the record of an earlier one.

All trajectories of a rollout are written to rollouts/NUMBER.npz in the run's folder. A run that was killed
reads those that it had sampled with the same weights; data.replay=runs/NAME reads another run's. Neither
samples nor calls the environment, so that it repeats the rollout to the bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from jaxft.batch import TrainState
from jaxft.data.prompt_rows import TokenisedPrompts
from jaxft.distributed import sharding
from jaxft.engine.programs import Engine, compile_engine
from jaxft.engine.sampling import Sampling
from jaxft.engine.session import Session
from jaxft.engine.state import Decoding, Slots, rows_in_progress, slots_for
from jaxft.models.model import Model
from jaxft.rl.episodes import Episodes, collect
from jaxft.rl.layout import RolloutShapes
from jaxft.rl.play import rollout
from jaxft.rl.programs import BoundRun
from jaxft.rl.record import RECORDS, RolloutRecord
from jaxft.rl.rewards import begin_async
from jaxft.rl.sampling_session import Sampler
from jaxft.rl.trajectory import Trajectory
from jaxft.tree import Params

SampleEpisodes = Callable[[TokenisedPrompts, int, int, TrainState], Episodes]
EVALUATION = 2**31 - 1  # rollout number from which the sampling key of held-out prompts is derived


def compile_rollout_sampler(
    run: BoundRun, data: Any, tokenizer: Any, shapes: RolloutShapes
) -> SampleEpisodes:
    """Compile the sampling programs of a run, and return (prompts, group, number, state) -> episodes.

    group: episodes of each prompt, data.group or data.eval_group. number: of the rollout, for the keys;
    EVALUATION is not recorded.
    """
    play = data.play(tokenizer, run.stop)
    sampler = compile_engines(run, data, shapes.prompt_size)
    sums = jax.jit(checksum, out_shardings=sharding.replicated(run.mesh))
    weights_of = sums.lower(run.state.trainable).compile()

    def sample(prompts: TokenisedPrompts, group: int, number: int, state: TrainState) -> Episodes:
        key = jax.random.fold_in(jax.random.key(data.seed + 2), number)
        begun, ended = begin_async(data.rules.rewards, prompts, group)

        def played() -> list[Trajectory]:
            return rollout(sampler(run.params(state), group), play, prompts, group, key, ended)

        if number == EVALUATION:
            trajectories = played()
        else:
            record = RolloutRecord(run.folder / RECORDS, data.replay, int(weights_of(state.trainable)))
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
    """Compile the sampling programs of training and of evaluation, and return (params, group) -> Sampler.

    prompt_size: tokens of the longest prompt, padded.
    """
    engines = {}
    for group in {data.eval_group, data.group}:
        d = decoding_of(data, run.model, run.stop, group)
        slots = slots_of(data, group, prompt_size, run.mesh)
        engines[group] = compile_engine(d, run.param_shapes, slots, run.mesh)
    return lambda params, group: EngineSampler(engines[group], params)


def decoding_of(data: Any, model: Model, stop: tuple[int, ...], group: int) -> Decoding:
    """Return what the engine of a rollout is compiled for. group: episodes of a prompt."""
    sampling = Sampling(data.episode_length, data.temperature, data.top_k, data.top_p)
    return Decoding(model, sampling, stop, group, data.kv_cache, extends=data.max_turns > 1)


def slots_of(data: Any, group: int, prompt_size: int, mesh: jax.sharding.Mesh) -> Slots:
    """Return the sizes of that engine. An evaluation with fewer episodes of a prompt than training has as many
    prompts at once as there is memory for in training.
    """

    def tokens(group: int) -> int:  # of a prompt with its episodes
        return min(group, data.starts_per_row) * prompt_size + group * data.episode_length

    prompts = data.batch * tokens(data.group) // tokens(group)
    slots = slots_for(prompts, group, prompt_size, rows_in_progress(data.decode_rows, mesh))
    return slots._replace(prompts=slots.rows) if data.starts_per_row > 1 else slots


@dataclass(frozen=True)
class EngineSampler:
    """An engine with one set of weights; see sampling_session.Sampler."""

    engine: Engine
    params: Params

    @contextmanager
    def session(self, key: Array) -> Iterator[Session]:
        """Yield a session. key: from which the keys of all completions derive."""
        yield Session(self.engine, self.params, key, keeps=self.engine.decoding.extends)
