"""Rollouts: prompts are answered by the policy as it is, the answers are scored, and batches for a policy objective are made.

Rollout number k is drawn when the run comes to step k * data.steps_per_rollout, from the state it has then, and gives that many optimizer
steps. So a run is saved between rollouts only, and one that was interrupted draws the same completions again.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.batch import TrainState
from jaxft.data import prompts
from jaxft.data.prompts import Asked, Prompts, Room
from jaxft.data.source import Prompt, SourceInfo, SourceStats
from jaxft.rl import advantages as adv
from jaxft.rl import estimators, rewards
from jaxft.rl.completions import Completions, Learned, Rules, by_read
from jaxft.rl.sampler import Player, means, told
from jaxft.tree import Metrics

SHARES = (0.25, 0.5, 1.0)  # rows are as long as such a share of the longest completions needs


@dataclass(frozen=True)
class BoundRun:
    """The compiled run that a source samples completions with.

    stop: tokens that end a completion. folder: where completions.jsonl is written.
    """

    programs: Any
    frozen: Any
    stop: tuple[int, ...]
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Rollouts(Prompts):
    """Prompts and the rules by which completions of them are scored and trained on: the data of a run with a policy loss."""

    rules: Rules

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rules.target_kl is not None and self.steps_per_rollout == 1:
            raise ValueError(
                "target_kl ends a rollout's passes, and here that is one step; raise data.passes, or leave it out"
            )
        if self.group == 1 and estimators.needs_a_group(self.rules.estimate):
            raise ValueError("data.group=1: advantages within a group of one are all 0; wanted at least 2")

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "RolloutSource":
        """Read and tokenise the prompts; see Dataset.open. `bind` returns the source that can sample."""
        train, held = prompts.split(self, tokenizer)
        return RolloutSource(source_info(self, tokenizer, train, held), self, tokenizer, train, held, shards)

    def abstract(self, shards: int = 1) -> Any:
        """Return the shapes of the largest batch that the settings allow."""
        return prompts.shapes(self, Room.most(self, self.max_prompt), shards)


def source_info(data: Rollouts, tokenizer: Any, train: Asked, held: Asked) -> SourceInfo:
    """Return what a source of completions says about itself."""
    longest = max(map(len, (*train.ids, *held.ids)))
    rollouts = max(1, -(-int(1e9 * data.epochs * len(train)) // int(1e9 * data.batch)))
    summary = (
        f"{len(train)} prompts of at most {longest} tokens, {len(held)} held out, {train.dropped} dropped; "
    )
    summary += f"a rollout of {data.batch} x {data.group} completions of at most {data.max_new} tokens is "
    summary += f"{data.steps_per_rollout} steps"
    if tokenizer.eos_token_id is None:
        summary += "; the tokenizer names no end token: without one in the model's config completions end at "
        summary += "data.max_new only"
    return SourceInfo(
        steps=rollouts * data.steps_per_rollout,
        steps_per_epoch=len(train) / data.batch * data.steps_per_rollout,
        steps_per_rollout=data.steps_per_rollout,
        fingerprint=prompts.fingerprint(data, train, held),
        preview=tokenizer.decode(train.ids[0], skip_special_tokens=False),
        stats=SourceStats(
            examples=len(train),
            held_out=len(held),
            dropped=train.dropped,
            largest_id=max(max(ids) for ids in (*train.ids, *held.ids)),
            summary=summary,
        ),
        dependencies={
            f"reward_{rewards.name_of(reward)}_fingerprint": reward.identity()
            for reward in data.rules.rewards
            if hasattr(reward, "identity")
        },
    )


@dataclass
class RolloutSource:
    """Batches of Rollout, see data.source.Source; held_out stays empty, as `evaluate` samples the held-out prompts.

    complete(batch) has the fields that the run's steps need. judged: whether the trainer's log-probs are taken when completions
    are drawn. Where each is learned from once, by the policy that drew it, and no reference or critic is asked, a batch has none
    and the ratio is 1. shapes: of batches; drawn: of the rows that the player works on, a shape for each of `rooms`.
    """

    info: SourceInfo
    data: Rollouts
    tokenizer: Any
    train: Asked
    held: Asked
    shards: int
    player: Any = None
    learned: Learned | None = field(default=None, repr=False)
    far: Any = field(default=None, repr=False)  # the step before's distance from the policy that drew
    stopped: bool = False  # whether the rest of the rollout teaches only the critic
    moments: Any = field(
        default_factory=lambda: np.zeros(3), repr=False
    )  # of all scores so far, see advantages.seen
    held_out: tuple[()] = ()
    judged: bool = True
    complete: Any = None

    def __post_init__(self) -> None:
        data, longest = self.data, max(map(len, (*self.train.ids, *self.held.ids)))
        self.rules = data.rules
        rounded, reads = prompts.rounded, [int(share * data.group * data.max_new) for share in SHARES]
        self.rooms = list(dict.fromkeys(Room(rounded(longest + count), rounded(count)) for count in reads))
        self.prompt_size = rounded(longest)
        self.shapes: tuple[Any, ...] = tuple(prompts.shapes(data, room, self.shards) for room in self.rooms)
        self.drawn = self.shapes

    def bind(self, run: BoundRun, saved: dict[str, Any] | None) -> "RolloutSource":
        """Return the source with the run's compiled programs and frozen parameters, which can sample and evaluate.

        saved: `state_dict` of the checkpoint to resume from.
        """
        found, objective, rules = self._as_it_was(saved), run.programs.objective, self.rules
        rests = rules.warm_up or rules.target_kl is not None or rules.keep is not None or not rules.cut_off
        if run.programs.optimizer.fused_backward and rests:
            found = "as warm_up, target_kl, keep and cut_off may ask"
            raise ValueError(f"optim.fused_backward can't let a policy rest, {found}; set it to false")
        if objective.facts.kl_in_rewards and estimators.plain(rules.estimate) in estimators.KNOW_NO_KL:
            found = estimators.plain(rules.estimate).__name__
            raise ValueError(
                f"the objective leaves its KL to the rewards, and {found} knows none; give a number as beta"
            )
        found.judged = (
            self.info.steps_per_rollout > 1 or objective.facts.reference != "none" or objective.facts.critic
        )
        found.complete = lambda batch: (
            objective.batch_spec(batch) if found.judged else replace(batch, logps=None)
        )
        found.shapes = tuple(found.complete(shape) for shape in self.shapes)
        found.drawn = found.shapes
        found.player = Player(found, run.programs, run.frozen, run.stop, run.folder / "completions.jsonl")
        return found

    def _as_it_was(self, saved: Any) -> Any:
        return replace(self, moments=np.array(saved["moments"])) if saved else replace(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the moments of all scores so far."""
        return {"moments": self.moments.tolist()}

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts."""
        return [Prompt(list(ids), []) for ids in self.held.ids[:count]]

    def row_names(self, step: int) -> list[str]:
        """The rows of an optimizer step's prompts."""
        number, part = divmod(step, self.info.steps_per_rollout)
        chosen = prompts.drawn(self.data, len(self.train), number)[prompts.dealt(self.data, number, part)]
        return [self.train.names[i] for i in chosen]

    def batch(self, step: int, state: TrainState) -> tuple[Any, Metrics]:
        """Return the batch of a step and its rollout's metrics. Samples the rollout at its first step."""
        number, part = divmod(step, self.info.steps_per_rollout)
        if self.learned is None or self.learned.number != number:
            if part:
                raise ValueError(
                    f"step {step} is inside rollout {number}, and a run goes on between rollouts only"
                )
            self.learned = self._learned(number, self.player.draw(number, state), state)
            self.far, self.stopped = None, False
        return self._part(self.learned, prompts.dealt(self.data, number, part)), self.learned.told

    def _learned(self, number: int, done: Completions, state: Any) -> Learned:
        """What is learned from a rollout."""
        rules, sampled = self.rules, self.player.sampled(done, state)
        self.moments = adv.seen(self.moments, done.scores)
        if rules.scale is not None:
            sampled = replace(sampled, scores=rules.scale(done.scores, self.moments))
        found, known = rules.estimate(sampled), adv.scorable(done.scores)
        kept = (
            known & (done.ended | rules.cut_off) & (True if rules.keep is None else rules.keep(done.scores))
        )
        spread = lambda x: None if x is None else by_read(x, done.lengths, done.room.reads)  # noqa: E731
        known_then = (sampled.logps, sampled.reference, sampled.values, found.advantages, found.returns)
        logps, reference, values, advantages, returns = map(spread, known_then)
        rows = replace(done.rows, reference=reference, values=values, advantages=advantages, returns=returns)
        rows = replace(rows, logps=logps if self.judged else None)
        numbers = told(rules, done, sampled, kept, self.judged) | means(found.told, kept.size)
        return Learned(number, rows, done.lengths, kept, known, numbers)

    def observe(self, metrics: Metrics) -> None:
        """Note the metrics of the newest step, for target_kl."""
        self.far = metrics.get("policy/approxkl_avg")

    def _is_far(self) -> bool:
        """Whether the policy has gone as far from the one that drew as it may. Waits for the step before."""
        if self.rules.target_kl is not None and self.far is not None and not self.stopped:
            far = jax.device_get(self.far)
            self.stopped = bool(far.total > self.rules.target_kl * far.weight)
        return self.stopped

    def _part(self, learned: Learned, rows: np.ndarray) -> Any:
        """The batch of some prompts, with weights that hold over all of it."""
        data, lengths = self.data, learned.lengths[rows]
        reads = learned.rows.read.shape[1]
        spread = lambda w: by_read(adv.at_tokens(w, lengths, data.max_new), lengths, reads)  # noqa: E731
        part = jax.tree.map(lambda x: x[rows], learned.rows)
        taught = learned.kept[rows] & (learned.number >= self.rules.warm_up) & (not self._is_far())
        part = replace(part, policy_weights=spread(self.rules.weighed(lengths, taught, data.max_new)))
        if part.values is not None:
            part = replace(part, value_weights=spread(adv.token_mean(lengths, learned.known[rows])))
        return self._grid(part, data.group)

    def _grid(self, part: Any, none: int) -> Any:
        """Rows [n, ...] as [micro, rows, ...], with empty rows where the mesh wants more; none: the answer that marks padding."""
        micro, each = self.shapes[-1].ids.shape[:2]
        grid = jax.tree.map(lambda x: x.reshape(micro, x.shape[0] // micro, *x.shape[1:]), part)
        own = grid.ids.shape[1]
        grid = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, each - own), *((0, 0),) * (x.ndim - 2))), grid)
        return replace(grid, answers=np.where((np.arange(each) >= own)[:, None], none, grid.answers))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Score data.eval_group completions of each held-out prompt, sampled with the same random numbers every time."""
        return self.player.measure(state) if len(self.held) else {}
