"""The files of a run's rollouts: completions.jsonl, a sample to read, and rollouts/, all of them."""

import base64
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.data.inspection import ShownExample, ShownPart
from jaxft.distributed import processes
from jaxft.distributed.disk import make_folder, write_durably
from jaxft.rl.rules import ScoredEpisodes
from jaxft.rl.trajectory import Fault, Segment, Trajectory

TABLE_ROWS, PER_PROMPT = 8, 2  # of completions.jsonl, for each rollout
RECORDS = "rollouts"  # the folder of recorded rollouts


def table_indices(count: int, group: int) -> list[int]:
    """Return which completions are in completions.jsonl: the first two of the first prompts.

    count: completions of the rollout. group: completions of each prompt.
    """
    return [i for i in range(count) if i % group < PER_PROMPT][:TABLE_ROWS]


def append_table(path: Path, step: int, scored: ScoredEpisodes, names: list[str]) -> None:
    """Append some episodes with their rewards to completions.jsonl. names: of the rewards."""
    episodes, (_, group, count) = scored.episodes, scored.reward_scores.shape
    by_reward, scores = scored.reward_scores.reshape(-1, count), scored.scores.ravel()
    prompts = episodes.prompts
    with path.open("a", encoding="utf-8") as file:
        for i in table_indices(len(episodes.texts), group):
            entry = {
                "step": step,
                "row": prompts.names[i // group],
                "prompt": prompts.as_given(i // group),
                "completion": episodes.texts[i],
                "rewards": {name: _json_number(x) for name, x in zip(names, by_reward[i], strict=True)},
                "reward": _json_number(scores[i]),
            }
            if episodes.most_turns > 1:
                first = episodes.episodes[i][0]
                entry |= {"turns": first.turns, "fault": first.fault or None, "ended": first.ended}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _json_number(x: Any) -> float | None:
    return None if np.isnan(x) else float(x)


def inspect_episodes(folder: Path, number: int) -> Iterator[ShownExample]:
    """Yield the episodes of a recorded rollout of a run, whose sampled tokens have weight 1 and given ones 0.

    Raises ValueError if the run has not recorded it.
    """
    path = folder / RECORDS / f"{number}.npz"
    if not path.is_file():
        raise ValueError(f"{path} is missing; the run has not sampled rollout {number + 1}")
    for i, t in enumerate(from_bytes(path.read_bytes())):
        given = sum(len(s.tokens) for s in t.segments if not s.sampled)
        turns = sum(s.sampled for s in t.segments)
        facts = [f"{turns} turns, {t.sampled_count} sampled and {given} given tokens"]
        facts += [f"row {t.part + 1} of {t.parts}"] if t.parts > 1 else []
        facts += [] if np.isnan(t.score) else [f"score {t.score:g}"]
        facts += [f"fault {fault.kind}: {fault.text}" for fault in t.faults]
        pieces = [(np.array(t.start, np.int32), 0.0)] + [(s.tokens, float(s.sampled)) for s in t.segments]
        labels = ["prompt", *("sampled" if s.sampled else "given" for s in t.segments)]
        shown = [
            ShownPart(label, ids, np.full(len(ids), weight))
            for label, (ids, weight) in zip(labels, pieces, strict=True)
        ]
        name = f"prompt {t.prompt + 1}, trajectory {i + 1}"
        yield ShownExample(name, "; ".join(facts), shown, in_order=True)


@dataclass(frozen=True)
class RolloutRecord:
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
        """RolloutRecord a rollout, and return it."""
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
                    f"data.replay={self.replay}: {path} is missing; this run needs rollout {number + 1}. "
                    "Lower loop.steps, or set data.replay=none to sample."
                )
            return base64.b64encode(path.read_bytes()).decode()
        path = self.folder / f"{number}.npz"
        if not path.is_file():
            return None
        content = path.read_bytes()
        with np.load(io.BytesIO(content)) as arrays:
            is_same = int(arrays["weights"]) == self.weights
        return base64.b64encode(content).decode() if is_same else None


def clear_records(run: Path) -> None:
    """Remove the recorded rollouts of a run that begins again at step 0, perhaps with other settings."""
    if processes.is_first():
        shutil.rmtree(run / RECORDS, ignore_errors=True)


def to_bytes(trajectories: Sequence[Trajectory], weights: int) -> bytes:
    """Return a rollout as the content of an npz file: flat arrays of tokens and log-probs, and JSON."""
    segments = [segment for t in trajectories for segment in t.segments]
    sampled = [segment.logps for segment in segments if segment.logps is not None]
    about = [
        {
            "prompt": t.prompt, "start": [*map(int, t.start)], "segments": len(t.segments), "ended": t.ended,
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
