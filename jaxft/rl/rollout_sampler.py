"""Sample the episodes of a rollout with the policy of a run, or read them from the record of an earlier one.

All trajectories of a rollout are written to rollouts/NUMBER.npz in the run's folder, and some of them as text
to completions.jsonl. A run that was killed reads the rollouts that it had sampled with the same weights;
data.replay=runs/NAME reads the rollouts of another run. A rollout that is read is repeated bit for bit:
nothing is sampled and no environment is called. Episodes of held-out prompts are not recorded: every
evaluation samples them, also in a replay.
"""

import base64
import io
import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jaxtyping import Array, UInt32

from jaxft.batch import TrainState
from jaxft.data.inspection import ShownExample, ShownPart
from jaxft.data.packing.row_tasks import TokenisedPrompts
from jaxft.distributed import processes, sharding
from jaxft.distributed.disk import make_folder, write_durably
from jaxft.distributed.sync import is_first
from jaxft.engine.programs import compile_engine
from jaxft.engine.sampling import Sampling
from jaxft.engine.session import Session
from jaxft.engine.state import Decoding, Slots, rows_in_progress, slots_for
from jaxft.models.model import Model
from jaxft.nn.tree import Params
from jaxft.rl.episodes import Sampler, rollout
from jaxft.rl.rewards import begin_async
from jaxft.rl.rollout_layout import BoundRun, uncounted
from jaxft.rl.rollout_rules import ScoredEpisodes
from jaxft.rl.trajectory import Episodes, Fault, Segment, Trajectory, collect
from jaxft.runs.metrics_log import json_value

TABLE_ROWS, PER_PROMPT = 8, 2  # of completions.jsonl, for each rollout
RECORDS = "rollouts"  # the folder of recorded rollouts
EVALUATION = 2**31 - 1  # rollout number from which the sampling key of held-out prompts is derived
SampleEpisodes = Callable[[TokenisedPrompts, int, int, TrainState], Episodes]


def table_indices(count: int, group: int) -> list[int]:
    """Return the indices of completions for completions.jsonl: two of each of the first prompts, at most
    eight.

    count: completions of the rollout. group: completions of each prompt.
    """
    return [i for i in range(count) if i % group < PER_PROMPT][:TABLE_ROWS]


def append_table(path: Path, step: int, scored: ScoredEpisodes, names: list[str]) -> None:
    """Append some episodes with their rewards (`names`) to completions.jsonl. step: the rollout's, from 1."""
    episodes, (_, group, count) = scored.episodes, scored.reward_scores.shape
    by_reward, scores = scored.reward_scores.reshape(-1, count), scored.scores.ravel()
    with path.open("a", encoding="utf-8") as file:
        for i in table_indices(len(episodes.trajectories), group):
            played = episodes.trajectories[i]
            entry = {
                "step": step,
                "row": episodes.prompts.names[played.prompt],
                "prompt": episodes.prompts.as_given(played.prompt),
                "completion": played.text,
                "rewards": json_value(dict(zip(names, by_reward[i], strict=True))),
                "reward": json_value(scores[i]),
            }
            if episodes.most_turns > 1:
                entry |= {"turns": played.turns, "sampled_turns": len(played.sampled)}
                entry |= {"fault": played.fault or None, "ended": played.ended}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def inspect_episodes(folder: Path, number: int) -> Iterator[ShownExample]:
    """Yield the episodes of a run's recorded rollout, token by token: sampled tokens have weight 1, given
    ones 0.

    Given tokens are labelled with their writer, such as "tool". Raises ValueError if the rollout is not
    recorded, or its record is damaged.
    """
    path = folder / RECORDS / f"{number}.npz"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: the run has not sampled rollout {number + 1}. Use a smaller number."
        )
    content = path.read_bytes()
    about_of(content, path)
    for i, t in enumerate(from_bytes(content)):
        facts = [f"{len(t.sampled)} turns, {t.sampled_count} sampled and {t.given_count} given tokens"]
        facts += [f"{rows} training rows"] if (rows := len(t.rows())) > 1 else []
        facts += [] if np.isnan(t.score) else [f"score {t.score:g}"]
        facts += [f"fault {fault.kind}: {fault.text}" for fault in t.faults]
        shown = [ShownPart("prompt", np.array(t.start, np.int32), np.zeros(len(t.start)))]
        writers, turn = _writers(t), -1
        for s in t.segments:
            turn += s.sampled
            label = "prompt" if s.begins else "sampled" if s.sampled else writers[turn]
            shown.append(ShownPart(label, s.tokens, np.full(len(s.tokens), float(s.sampled))))
        name = f"prompt {t.prompt + 1}, trajectory {i + 1}"
        yield ShownExample(name, "; ".join(facts), shown, in_order=True)


def _writers(t: Trajectory) -> list[str]:
    """Return the role of the messages after each sampled turn, such as "tool"; "given" if it is unknown."""
    roles = list[list[str]]()
    for message in t.turns:
        if message["role"] == "assistant":
            roles.append([])
        elif roles:
            roles[-1].append(message["role"])
    count = len(t.sampled)
    of_turns = roles[len(roles) - count :] if len(roles) >= count else [[]] * count
    return [", ".join(dict.fromkeys(names)) or "given" for names in of_turns]


@dataclass(frozen=True)
class RolloutRecord:
    """Recorded rollouts. folder: where this run writes its rollouts. replay: the folder of the run that is
    replayed, or None. weights: the checksum of the policy's trainable weights. prompts: `prompts_hash` of the
    rollout.
    """

    folder: Path
    replay: str | None
    weights: int
    prompts: str

    def read(self, number: int) -> list[Trajectory] | None:
        """Return a rollout that was recorded with these prompts and weights, None without one.

        With `replay` the weights may differ. Raises ValueError if the replayed run lacks this rollout, or
        recorded it with other prompts.
        """
        content = processes.from_first_process(partial(self._stored, number))
        return None if content is None else from_bytes(base64.b64decode(content))

    def write(self, number: int, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Record a rollout, and return it."""
        if is_first():
            make_folder(self.folder)
            content = to_bytes(trajectories, self.weights, self.prompts)
            write_durably(self.folder / f"{number}.npz", content)
        return trajectories

    def _stored(self, number: int) -> str | None:
        """Return the file of rollout `number` in base64, as text for all processes; None if the rollout is to
        be sampled. Raises the errors of `read`.
        """
        if self.replay is not None:
            path = Path(self.replay) / RECORDS / f"{number}.npz"
            if not path.is_file():
                raise ValueError(
                    f"data.replay={self.replay}: {path} is missing; this run needs rollout {number + 1}. "
                    "Lower loop.steps, or set data.replay=none to sample."
                )
            content = path.read_bytes()
            if about_of(content, path)[1] != self.prompts:
                raise ValueError(
                    f"data.replay={self.replay}: {path} has episodes of other prompts than this run's "
                    f"rollout {number + 1}. Use the same rows, tokenizer, chat template, data.batch, "
                    "data.group and seed."
                )
            return base64.b64encode(content).decode()
        path = self.folder / f"{number}.npz"
        if not path.is_file():
            return None
        content = path.read_bytes()
        try:
            is_same = about_of(content, path) == (self.weights, self.prompts)
        except ValueError:  # a damaged file: the rollout is sampled again
            return None
        return base64.b64encode(content).decode() if is_same else None


def clear_records(run: Path) -> None:
    """Remove the recorded rollouts of a run."""
    shutil.rmtree(run / RECORDS, ignore_errors=True)


def prompts_hash(prompts: TokenisedPrompts, group: int) -> str:
    """Return a hash of a rollout's prompts, their order and the number of episodes of each (`group`)."""
    content = json.dumps([group, [[*map(int, ids)] for ids in prompts.ids]])
    return xxhash.xxh64(content.encode()).hexdigest()


def about_of(content: bytes, path: Path) -> tuple[int, str]:
    """Return the checksum of the weights and the hash of the prompts of a record. Raises ValueError if it
    cannot be read.
    """
    try:
        from_bytes(content)
        with np.load(io.BytesIO(content)) as arrays:
            return int(arrays["weights"]), str(arrays["prompts"])
    except (ValueError, KeyError, TypeError, EOFError, OSError, BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} is damaged or of another version; remove it, and its run samples the rollout again"
        ) from error


def to_bytes(trajectories: Sequence[Trajectory], weights: int, prompts: str = "") -> bytes:
    """Return a rollout as the content of an npz file. weights, prompts: as in RolloutRecord."""
    segments = [segment for t in trajectories for segment in t.segments]
    sampled = [segment.logps for segment in segments if segment.logps is not None]
    about = [
        {
            **vars(t),
            "start": [*map(int, t.start)],
            "segments": [(len(s.tokens), s.sampled, s.reward, s.begins) for s in t.segments],
        }
        for t in trajectories
    ]
    file = io.BytesIO()
    np.savez_compressed(
        file,
        weights=np.uint32(weights),
        prompts=np.array(prompts),
        tokens=np.concatenate([np.zeros(0, np.int32), *(s.tokens for s in segments)]).astype(np.int32),
        logps=np.concatenate([np.zeros(0, np.float32), *sampled]).astype(np.float32),
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    )
    return file.getvalue()


def from_bytes(content: bytes) -> list[Trajectory]:
    """Return the trajectories from the content of an npz file that `to_bytes` returned."""
    with np.load(io.BytesIO(content)) as arrays:
        tokens, logps, about = arrays["tokens"], arrays["logps"], json.loads(arrays["about"].tobytes())
    trajectories = list[Trajectory]()
    for facts in about:
        segments = list[Segment]()
        for count, sampled, reward, begins in facts["segments"]:
            segments.append(Segment(tokens[:count], logps[:count] if sampled else None, reward, begins))
            tokens, logps = tokens[count:], logps[count * sampled :]
        facts |= {name: tuple(facts[name]) for name in ("start", "turns")}
        faults = tuple(Fault(*fault) for fault in facts["faults"])
        trajectories.append(Trajectory(**facts | {"segments": tuple(segments), "faults": faults}))
    return trajectories


def compile_rollout_sampler(run: BoundRun, data: Any, tokenizer: Any, prompt_size: int) -> SampleEpisodes:
    """Compile the sampling programs of a run, and return (prompts, group, number, state) -> episodes.

    prompt_size: tokens of the longest prompt, padded. group: data.group or data.eval_group. number: number of
    the rollout, from which random keys derive; a rollout numbered EVALUATION is not recorded.
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
    """Return a hash of every bit of the weights, from sums of integers, which have no rounding."""

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
    """Compile the sampling programs of training and of evaluation; return (params, group) -> Sampler."""
    engines = {}
    for group in {data.eval_group, data.group}:
        decoding, slots = engine_sizes(data, run.model, run.stop, group, prompt_size, run.mesh)
        engines[group] = compile_engine(decoding, run.param_shapes, slots, run.mesh)
    return lambda params, group: partial(Session, engines[group], params)


def engine_sizes(
    data: Any, model: Model, stop: tuple[int, ...], group: int, prompt_size: int, mesh: jax.sharding.Mesh
) -> tuple[Decoding, Slots]:
    """Return the sampling settings of a rollout, and the sizes of the engine's arrays. data: Rollouts. stop:
    token ids that end a completion. group: completions per prompt. prompt_size: as in
    compile_rollout_sampler.
    """
    sampling = Sampling(data.episode_length, data.temperature, data.top_k, data.top_p, data.min_p)

    def tokens(group: int) -> int:  # of a prompt with its episodes
        return min(group, data.starts_per_row) * prompt_size + group * data.episode_length

    # an evaluation with a smaller group has as many prompts at once as there is memory for in training
    prompts = data.batch * tokens(data.group) // tokens(group)
    slots = slots_for(prompts, group, prompt_size, rows_in_progress(data.decode_rows, mesh))
    slots = slots._replace(prompts=slots.rows) if data.starts_per_row > 1 else slots
    return Decoding(model, sampling, stop, group, data.kv_cache, extends=data.max_turns > 1), slots
