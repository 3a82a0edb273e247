"""Episodes of a rollout: played with the policy of a run, or read from the record of an earlier one.

All trajectories of a rollout are written to rollouts/NUMBER.npz in the run's folder. A run that was killed
reads those that it had sampled with the same weights; data.replay=runs/NAME reads another run's. Neither
samples nor calls the environment, so that it repeats the rollout to the bit.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from jaxft.batch import TrainState
from jaxft.data.prompt_rows import TokenisedPrompts
from jaxft.distributed import processes
from jaxft.distributed.disk import make_folder, write_durably
from jaxft.inference.decode import Decoding
from jaxft.inference.engine import Engine, compile_engine, rows_in_progress, slots_for
from jaxft.inference.sampling import Sampling
from jaxft.rl.episodes import Episodes, collect
from jaxft.rl.layout import RolloutShapes
from jaxft.rl.play import Play, rollout
from jaxft.rl.programs import BoundRun
from jaxft.rl.sampling_session import Sampled, Session
from jaxft.rl.trajectory import Fault, Segment, Trajectory
from jaxft.tree import Params

SampleEpisodes = Callable[[TokenisedPrompts, int, int, TrainState], Episodes]
RECORDS = "rollouts"  # the folder of recorded rollouts
EVALUATION = 2**31 - 1  # rollout number from which the sampling key of held-out prompts is derived


def compile_sampler(run: BoundRun, data: Any, tokenizer: Any, shapes: RolloutShapes) -> SampleEpisodes:
    """Compile the sampling programs of a run, and return (prompts, group, number, state) -> episodes.

    group: episodes of each prompt, data.group or data.eval_group. number: of the rollout, for the keys;
    EVALUATION is not recorded.
    """
    sampler, play = compile_engines(run, data, shapes), data.play(tokenizer, run.stop)
    weights_of = jax.jit(checksum).lower(run.state.trainable).compile()
    sizes = data.sampled_length, data.episode_length

    def sample(prompts: TokenisedPrompts, group: int, number: int, state: TrainState) -> Episodes:
        key = jax.random.fold_in(jax.random.key(data.seed + 2), number)
        new = partial(rollout, sampler(run.params(state), group), play, prompts, group, key)
        if number == EVALUATION:
            trajectories = new()
        else:
            record = Record(run.folder / RECORDS, data.replay, int(weights_of(state.trainable)))
            trajectories = record.read(number) or record.write(number, new())
        return collect(prompts, trajectories, sizes, run.stop, tokenizer)

    return sample


def checksum(trainable: Params) -> UInt32[Array, ""]:
    """Return a number that depends on every bit of the weights, and on nothing else: sums are of integers."""

    def of(x: Array) -> Array:
        unsigned = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32).ravel()
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    total = jnp.uint32(0)
    for x in jax.tree.leaves(trainable):
        total = total * jnp.uint32(31) + of(x)
    return total


# ---- records


@dataclass(frozen=True)
class Record:
    """Recorded rollouts. folder: of this run's. replay: the folder of the run that is replayed, or None.
    weights: the checksum of the policy's trainable weights.
    """

    folder: Path
    replay: str | None
    weights: int

    def read(self, number: int) -> list[Trajectory] | None:
        """Return a rollout that was recorded with these weights, None without one. A run that is replayed
        needs no such weights; ValueError is raised if it has not recorded the rollout.
        """
        found = processes.from_first_process(partial(self._stored, number))
        return None if found is None else from_bytes(base64.b64decode(found))

    def write(self, number: int, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Record a rollout, and return it."""
        if processes.is_first():
            make_folder(self.folder)
            write_durably(self.folder / f"{number}.npz", to_bytes(trajectories, self.weights))
        return trajectories

    def _stored(self, number: int) -> str | None:
        """The content of a record in base64, so that all processes get it."""
        if self.replay is not None:
            path = Path(self.replay) / RECORDS / f"{number}.npz"
            if not path.is_file():
                raise ValueError(
                    f"data.replay={self.replay}: {path} is missing; this run needs rollout {number + 1}. Lower "
                    "loop.steps, or set data.replay=none to sample."
                )
            return base64.b64encode(path.read_bytes()).decode()
        path = self.folder / f"{number}.npz"
        if not path.is_file():
            return None
        content = path.read_bytes()
        with np.load(io.BytesIO(content)) as arrays:
            is_same = int(arrays["weights"]) == self.weights
        return base64.b64encode(content).decode() if is_same else None


def to_bytes(trajectories: Sequence[Trajectory], weights: int) -> bytes:
    """Return a rollout as the content of an npz file: flat arrays of tokens and log-probs, and JSON."""
    segments = [segment for t in trajectories for segment in t.segments]
    sampled = [segment.logps for segment in segments if segment.logps is not None]
    about = [
        {
            "prompt": t.prompt, "start": t.start, "segments": len(t.segments), "ended": t.ended,
            "fault": t.fault, "turns": t.turns, "faults": t.faults, "part": t.part, "parts": t.parts,
        }
        for t in trajectories
    ]  # fmt: skip
    file = io.BytesIO()
    np.savez_compressed(
        file,
        weights=np.uint32(weights),
        tokens=np.concatenate([np.zeros(0, np.int32), *(s.tokens for s in segments)]).astype(np.int32),
        counts=np.array([len(s.tokens) for s in segments], np.int64),
        logps=np.concatenate([np.zeros(0, np.float32), *sampled]).astype(np.float32),
        sampled=np.array([s.sampled for s in segments], bool),
        rewards=np.array([s.reward for s in segments], np.float64),
        scores=np.array([t.score for t in trajectories], np.float64),
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    )
    return file.getvalue()


def from_bytes(content: bytes) -> list[Trajectory]:
    """Return the rollout of `to_bytes`."""
    with np.load(io.BytesIO(content)) as arrays:
        x = {name: arrays[name] for name in arrays.files}
    is_sampled, counts = x["sampled"], x["counts"]
    tokens = np.split(x["tokens"], np.cumsum(counts)[:-1]) if len(counts) else []
    logps = iter(np.split(x["logps"], np.cumsum(counts[is_sampled])[:-1]) if is_sampled.any() else ())
    segments = iter(
        Segment(ids, next(logps) if is_sampled[i] else None, float(x["rewards"][i]))
        for i, ids in enumerate(tokens)
    )
    return [
        Trajectory(
            prompt=own["prompt"],
            start=tuple(own["start"]),
            segments=tuple(next(segments) for _ in range(own["segments"])),
            score=float(score),
            ended=own["ended"],
            fault=own["fault"],
            turns=tuple(own["turns"]),
            faults=tuple(Fault(*fault) for fault in own["faults"]),
            part=own["part"],
            parts=own["parts"],
        )
        for own, score in zip(json.loads(x["about"].tobytes()), x["scores"], strict=True)
    ]


# ---- the engine


def compile_engines(run: BoundRun, data: Any, shapes: RolloutShapes) -> Callable[[Params, int], Any]:
    """Compile the sampling programs of training and of evaluation, and return (params, group) -> Sampler."""
    sampling = Sampling(data.max_new, data.temperature, data.top_k, data.top_p)
    engines = {}
    for group in {data.eval_group, data.group}:
        d = Decoding(run.model, sampling, run.stop, group, data.kv_cache)
        rows = rows_in_progress(data.decode_rows, run.mesh)
        slots = slots_for(data.batch, group, shapes.prompt_size, rows)
        engines[group] = compile_engine(d, run.param_shapes, slots, run.mesh)
    return lambda params, group: EngineSampler(engines[group], params)


@dataclass(frozen=True)
class EngineSampler:
    """An engine with one set of weights, see sampling_session.Sampler. Episodes have one turn."""

    engine: Engine
    params: Params

    @contextmanager
    def session(self, key: Array) -> Iterator[Session]:
        """Return a session."""
        yield _Session(self, key, {})


@dataclass(frozen=True)
class _Session:
    sampler: EngineSampler
    key: Array
    queued: dict[int, tuple[Sequence[int], Sequence[int]]]

    def start(self, prompt: Sequence[int], episodes: Sequence[int], number: int, max_new: int) -> None:
        self.queued[number] = prompt, episodes

    def extend(self, episode: int, tokens: Sequence[int], max_new: int) -> None:
        raise NotImplementedError

    def drop(self, episode: int) -> None:
        pass

    def wait(self) -> list[Sampled]:
        numbers = sorted(self.queued)
        if not numbers:
            return []
        engine, prompts = self.sampler.engine, [self.queued[i][0] for i in numbers]
        tokens, logps = engine.complete(self.sampler.params, prompts, self.key, numbers)
        found = []
        for number, own, own_logps in zip(numbers, tokens, logps, strict=True):
            for episode, ids, lps in zip(self.queued.pop(number)[1], own, own_logps, strict=True):
                count = int((ids != -1).sum())
                finish = "stop" if ids[count - 1] in engine.decoding.stop else "length"
                found.append(Sampled(episode, ids[:count], lps[:count], finish))
        return found
