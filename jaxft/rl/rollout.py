"""Rollouts: prompts are answered by the policy as it is, the answers are scored, and batches for a policy objective are made.

Rollout number k is drawn when the run comes to step k * data.steps, from the state it has then, and gives that many optimizer
steps. So a run is saved between rollouts only, and one that was interrupted draws the same completions again.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.data import prompts
from jaxft.data.prompts import Asked, Prompts, Room
from jaxft.rl import advantages as adv
from jaxft.rl import estimators
from jaxft.rl.completions import Completions, Learned, Rules, by_read
from jaxft.rl.sampler import Player, means, told

SHARES = (0.25, 0.5, 1.0)  # rows are as long as such a share of the longest completions needs


def rollouts(data: Prompts, tokenizer: Any, shards: int = 1, *, rules: Rules) -> "Rollouts":
    """The source of a run: reads and tokenises the prompts. It draws once it is `attached` to the run's programs."""
    train, held = prompts.split(data, tokenizer)
    return Rollouts(data, rules, tokenizer, train, held, shards)


@dataclass
class Rollouts:
    """Batches by number, as data.source.Source has them; held_out stays empty, as `measure` asks the held-out prompts.

    complete(batch) has the fields that the run's steps need. judged: whether the trainer's log-probs are taken when completions
    are drawn. Where each is learned from once, by the policy that drew it, and no reference or critic is asked, a batch has none
    and the ratio is 1. shapes: of batches; drawn: of the rows that the player works on, a shape for each of `rooms`.
    """

    data: Prompts
    rules: Rules
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
        rounded, reads = prompts.rounded, [int(share * data.group * data.max_new) for share in SHARES]
        self.rooms = list(dict.fromkeys(Room(rounded(longest + count), rounded(count)) for count in reads))
        whole, self.prompt_size = self.rooms[-1], rounded(longest)
        self.abstract: Any = prompts.shapes(data, whole, self.shards)
        self.shapes: list[Any] = [prompts.shapes(data, room, self.shards) for room in self.rooms]
        self.drawn = self.shapes
        self.boundary = data.steps
        self.steps_per_epoch = len(self.train) / data.batch * data.steps
        if self.rules.target_kl is not None and data.steps == 1:
            raise ValueError(
                "target_kl ends a rollout's passes, and here that is one step; raise data.passes, or leave it out"
            )
        if data.group == 1 and estimators.needs_a_group(self.rules.estimate):
            raise ValueError("data.group=1: advantages within a group of one are all 0; wanted at least 2")
        self.steps = (
            max(1, -(-int(1e9 * data.epochs * len(self.train)) // int(1e9 * data.batch))) * data.steps
        )
        self.fingerprint = prompts.fingerprint(data, self.train, self.held)
        self.preview = self.tokenizer.decode(self.train.ids[0], skip_special_tokens=False)
        words = f"{len(self.train)} prompts of at most {longest} tokens, {len(self.held)} held out, {self.train.dropped} dropped"
        words += f"; a rollout of {data.batch} x {data.group} completions of at most {data.max_new} tokens is {data.steps} steps"
        if self.tokenizer.eos_token_id is None:
            words += "; the tokenizer names no end token: without one in the model's config completions end at data.max_new only"
        largest = max(max(ids) for ids in (*self.train.ids, *self.held.ids))
        self.stats = {
            "examples": len(self.train),
            "held_out": len(self.held),
            "largest_id": largest,
            "told": words,
        }

    def attached(
        self, programs: Any, frozen: Any, stop: tuple[int, ...], folder: Path, kept: Any = None
    ) -> "Rollouts":
        """The source with a run's programs, compiled, and its frozen parameters, so that it can draw and measure.

        kept: what a checkpoint has of a source, see `kept`.
        """
        found, objective, rules = self._as_it_was(kept), programs.objective, self.rules
        rests = rules.warm_up or rules.target_kl is not None or rules.keep is not None or not rules.cut_off
        if programs.optimizer.fused_backward and rests:
            found = "as warm_up, target_kl, keep and cut_off may ask"
            raise ValueError(f"optim.fused_backward can't let a policy rest, {found}; set it to false")
        if objective.facts.kl_in_rewards and estimators.plain(rules.estimate) in estimators.KNOW_NO_KL:
            found = estimators.plain(rules.estimate).__name__
            raise ValueError(
                f"the objective leaves its KL to the rewards, and {found} knows none; give a number as beta"
            )
        found.judged = self.boundary > 1 or objective.facts.reference != "none" or objective.facts.critic
        found.complete = lambda batch: (
            objective.batch_spec(batch) if found.judged else replace(batch, logps=None)
        )
        found.abstract, found.shapes = (
            found.complete(self.abstract),
            [found.complete(shape) for shape in self.shapes],
        )
        found.drawn = found.shapes
        found.player = Player(found, programs, frozen, stop, folder / "completions.jsonl")
        return found

    def _as_it_was(self, kept: Any) -> Any:
        return replace(self, moments=np.array(kept["moments"])) if kept else replace(self)

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps of the source between two rollouts."""
        return {"moments": self.moments.tolist()}

    def asked(self, count: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, no answer) of the first `count` held-out prompts."""
        return [(list(ids), []) for ids in self.held.ids[:count]]

    def names(self, step: int) -> list[str]:
        """The rows of an optimizer step's prompts."""
        number, part = divmod(step, self.boundary)
        chosen = prompts.drawn(self.data, len(self.train), number)[prompts.dealt(self.data, number, part)]
        return [self.train.names[i] for i in chosen]

    def batch(self, step: int, state: Any) -> Any:
        """Draws where a rollout begins; [micro, rows, ...]."""
        number, part = divmod(step, self.boundary)
        if self.learned is None or self.learned.number != number:
            if part:
                raise ValueError(
                    f"step {step} is inside rollout {number}, and a run goes on between rollouts only"
                )
            self.learned = self._learned(number, self.player.draw(number, state), state)
            self.far, self.stopped = None, False
        return self._part(self.learned, prompts.dealt(self.data, number, part))

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

    def numbers(self, step: int, found: dict[str, Any]) -> dict[str, Any]:
        """Metrics of the rollout that a step belongs to; found: the step's own."""
        self.far = found.get("policy/approxkl_avg")
        return {} if self.learned is None else self.learned.told

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
        micro, each = self.abstract.ids.shape[:2]
        grid = jax.tree.map(lambda x: x.reshape(micro, x.shape[0] // micro, *x.shape[1:]), part)
        own = grid.ids.shape[1]
        grid = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, each - own), *((0, 0),) * (x.ndim - 2))), grid)
        return replace(grid, answers=np.where((np.arange(each) >= own)[:, None], none, grid.answers))

    def measure(self, state: Any) -> dict[str, float]:
        """The held-out prompts, each answered data.eval_group times, from the same random numbers every time."""
        return self.player.measure(state) if len(self.held) else {}
