"""Rollouts for preference losses: of each prompt's completions the best and the worst become a pair (Guo et al. 2024,
arXiv:2402.04792, online DPO)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.batch import Pairs, Rollout
from jaxft.data import prompts
from jaxft.data.prompts import Room
from jaxft.rl import advantages as adv
from jaxft.rl.completions import Completions, Learned, Rules, laid
from jaxft.rl.rollout import BoundRun, Rollouts, RolloutSource, source_info
from jaxft.rl.sampler import Player, told


@dataclass(frozen=True, kw_only=True)
class OnlinePairs(Rollouts):
    """Prompts whose best and worst completion make a pair: the data of a preference loss on the policy's own completions.

    Of the rules it uses rewards, weights, combine, shape and cut_off, and refuses others.
    """

    group: int = 2

    def __post_init__(self) -> None:
        if self.group < 2:
            raise ValueError(f"data.group={self.group}; a pair takes at least 2 completions of a prompt")
        super().__post_init__()
        rules = self.rules
        known = Rules(
            rules.rewards,
            weights=rules.weights,
            combine=rules.combine,
            shape=rules.shape,
            cut_off=rules.cut_off,
        )
        if rules != known:
            raise ValueError(
                "pairs are made of rewards, weights, combine, shape and cut_off; leave the other rules as they are"
            )

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "OnlinePairSource":
        """Read and tokenise the prompts; see Dataset.open."""
        train, held = prompts.split(self, tokenizer)
        return OnlinePairSource(
            source_info(self, tokenizer, train, held), self, tokenizer, train, held, shards
        )

    def abstract(self, shards: int = 1) -> Pairs:
        """Return the shapes of the largest batch that the settings allow."""
        return pair_shapes(self, self.pair_room(self.max_prompt), shards)

    def pair_room(self, longest: int) -> Room:
        """Return the size of a row that holds the longest prompt and two of the longest completions."""
        return Room(prompts.rounded(longest + 2 * self.max_new), prompts.rounded(2 * self.max_new))


def pair_shapes(data: OnlinePairs, room: Room, shards: int = 1) -> Pairs:
    """Return the shapes of one optimizer step's batch of pairs, one a row."""
    like = prompts.shapes(data, room, shards)
    micro, rows = like.ids.shape[:2]

    def array(*last: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct((micro, rows, *last), dtype)

    number = array(1, dtype=np.float32)
    return Pairs(
        ids=like.ids, segments=like.ids, positions=like.ids, read=like.read, targets=like.read, answers=like.read,
        places=like.read, lengths=array(1, 2), last=array(1, 2), mean_lengths=array(1, 2, dtype=np.float32),
        pair_weights=number, index=array(1), columns={}, branches=like.ids,
    )  # fmt: skip


@dataclass
class OnlinePairSource(RolloutSource):
    """Rollouts whose batches are Pairs."""

    data: OnlinePairs

    def __post_init__(self) -> None:
        super().__post_init__()
        self.judged = False
        self.complete = lambda batch: replace(batch, logps=None)
        self.room = self.data.pair_room(max(map(len, (*self.train.ids, *self.held.ids))))
        self.drawn = tuple(self.complete(shape) for shape in self.drawn)
        self.shapes = (pair_shapes(self.data, self.room, self.shards),)

    def bind(self, run: BoundRun, saved: dict[str, Any] | None) -> "OnlinePairSource":
        """Return the source with the run's compiled programs and frozen parameters, which can sample and evaluate."""
        found = self._as_it_was(saved)
        found.player = Player(found, run.programs, run.frozen, run.stop, run.folder / "completions.jsonl")
        return found

    def _learned(self, number: int, done: Completions, state: Any) -> Learned:
        """The best and the worst of each prompt's completions; a prompt whose scores are all equal teaches nothing.

        Where that is so of all of a step's prompts only the optimizer's momentum goes on.
        """
        known = adv.scorable(done.scores) & (done.ended | self.rules.cut_off)
        best = np.where(known, done.scores, -np.inf).argmax(1)
        worst = np.where(known, done.scores, np.inf).argmin(1)
        pick = np.stack([best, worst], 1)
        scores = np.take_along_axis(done.scores, pick, 1)
        kept = known.any(1) & (scores[:, 0] > scores[:, 1])
        tokens, lengths = (
            np.take_along_axis(done.tokens, pick[:, :, None], 1),
            np.take_along_axis(done.lengths, pick, 1),
        )
        rows = pairs_of(laid(done.asked, tokens, lengths, self.room))
        taught = np.zeros(known.shape, bool)
        np.put_along_axis(taught, pick, kept[:, None], 1)
        numbers = told(self.rules, done, self.player.sampled(done, state), taught, False)
        return Learned(number, rows, lengths, kept, known, numbers)

    def _part(self, learned: Learned, rows: np.ndarray) -> Pairs:
        """The batch of some prompts' pairs, which weigh the same."""
        kept = learned.kept[rows]
        part = jax.tree.map(lambda x: x[rows], learned.rows)
        weights = (kept / max(int(kept.sum()), 1)).astype(np.float32)[:, None]
        means = learned.lengths[rows][kept].mean(0) if kept.any() else np.ones(2)
        means = np.broadcast_to(means.astype(np.float32), part.mean_lengths.shape).copy()
        return self._grid(replace(part, pair_weights=weights, mean_lengths=means), 2)


def pairs_of(rows: Rollout) -> Pairs:
    """Rows of a prompt with two completions each as pairs, the first one chosen; without weights."""
    lengths, real = rows.lengths[:, None, :], rows.answers < 2
    before = (rows.segments > 0).sum(1, keepdims=True) - rows.lengths.sum(1, keepdims=True)
    last = before + np.cumsum(rows.lengths, 1) - 1
    places = np.arange(rows.read.shape[1]) - np.where(rows.answers == 1, rows.lengths[:, :1], 0)
    count = np.arange(len(rows.ids), dtype=np.int32)[:, None]
    return Pairs(
        ids=rows.ids, segments=rows.segments, positions=rows.positions, read=rows.read, targets=rows.targets,
        answers=rows.answers, places=np.where(real, places, 0).astype(np.int32), lengths=lengths,
        last=last[:, None, :].astype(np.int32), mean_lengths=np.zeros(lengths.shape, np.float32),
        pair_weights=np.zeros(count.shape, np.float32), index=count, columns={}, branches=rows.branches,
    )  # fmt: skip
