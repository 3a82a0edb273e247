"""Rollouts: sample episodes with the current policy, score them, and make batches for an objective.

The steps of a rollout: sample -> Episodes; pack_episodes -> rows; rewards and Rules.score -> scores;
Rules.estimate -> advantages; policy_rows writes these into the rows; rollout_batch makes a step's batch.

Rollout k is sampled at step k * steps_per_rollout, with the state of that step, and used for that many steps.
A run is therefore saved between rollouts only; one that is killed inside a rollout resumes at the rollout's
first step and repeats it from its record.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxft.annotations import PositiveInt, above
from jaxft.batch import Pairs, Rollout, TrainState
from jaxft.data import prompts
from jaxft.data.chat.next_turn import restart_notes
from jaxft.data.packing.pack import RowShape, round_up
from jaxft.data.packing.row_tasks import TokenisedPrompts
from jaxft.data.prompts import PromptRows, Prompts
from jaxft.data.source import HeldOutMetrics, Prompt, SourceInfo, SourceStats, spread
from jaxft.distributed.sync import is_first
from jaxft.nn.attention.layer_attention import AttentionLayers, varies_with_length
from jaxft.nn.tree import Batch, Metrics
from jaxft.objectives.intervals import prompt_means
from jaxft.objectives.objective import Objective, Scores, same_batch
from jaxft.rl.advantages import GroupLengths, GroupMask, PerToken, check_advantages, has_score, update_moments
from jaxft.rl.environments.environment import Environment, EnvironmentClass, environment_of
from jaxft.rl.episodes import EpisodeLimits, Play
from jaxft.rl.estimators import RolloutScores, example_rollout
from jaxft.rl.rewards import ObjectReward, ScoreEpisodes
from jaxft.rl.rollout_layout import (
    BoundRun,
    PackedRows,
    RolloutPrograms,
    TokenScores,
    pack_episodes,
    per_episode,
    rollout_shapes,
    to_microbatches,
)
from jaxft.rl.rollout_metrics import as_sums, evaluation_metrics, rollout_metrics
from jaxft.rl.rollout_rules import Rules, ScoredEpisodes, fault_messages
from jaxft.rl.rollout_sampler import EVALUATION, SampleEpisodes, append_table, compile_rollout_sampler
from jaxft.rl.token_weights import token_mean, weight_metrics
from jaxft.runs.metrics_log import REWARD


class ScoredRollout(NamedTuple):
    """A rollout with scores. packed: its rows of tokens. tokens: the input of an estimator."""

    number: int
    scored: ScoredEpisodes
    packed: PackedRows
    tokens: RolloutScores


@dataclass(frozen=True)
class TrainingRollout:
    """A rollout from which training batches are built: rows of all prompts, without weights of the loss.

    number: the rollout's number, from 0. lengths: sampled tokens of each episode. policy_mask: episodes (or
    pairs) that the policy is trained on. scored: episodes that have a score.
    """

    number: int
    rows: Rollout | Pairs
    lengths: GroupLengths
    policy_mask: Bool[np.ndarray, "..."]
    scored: GroupMask
    metrics: Metrics


class BatchKind(NamedTuple):
    """Conversion of scored rollouts to batches, as functions of the data's settings.

    shapes(data, longest prompt, shards) -> the shapes of training batches, the largest last. rows(data,
    rollout, shape) -> TrainingRollout. batch(data, rollout, prompts, trains_policy, shape) -> the batch of
    the prompts with these indices. shape: shape of the largest batch. of_tokens: whether batches are for a
    policy objective, which needs log-probs and advantages of tokens.
    """

    shapes: Callable[[Any, int, int], tuple[Batch, ...]]
    rows: Callable[[Any, ScoredRollout, Any], TrainingRollout]
    batch: Callable[[Any, TrainingRollout, Int[np.ndarray, " rows"], bool, Any], Batch]
    of_tokens: bool = False


def policy_shapes(data: Prompts, longest: int, shards: int = 1) -> tuple[Rollout, ...]:
    """Return the shapes that a step's batch can have, the largest last. longest: tokens of the longest
    prompt. shards: number of devices among which the mesh divides rows.
    """
    return tuple(rollout_shapes(data, longest, shards).values())


def policy_rows(data: "Rollouts", rollout: ScoredRollout, shape: Rollout) -> TrainingRollout:
    """Estimate advantages, and add them to the rows with the tokens' log-probs and values."""
    rules, scored, tokens, packed = data.rules, rollout.scored, rollout.tokens, rollout.packed
    estimate, episodes, mask = rules.estimate(tokens), scored.episodes, rules.policy_mask(scored)
    check_advantages(data.group, scored.scores, estimate.advantages)
    metrics = rollout_metrics(rules.reward_names, scored, tokens, mask)
    metrics |= as_sums(estimate.metrics, mask.size)
    advantages, logps = estimate.advantages, tokens.logps if tokens.recomputed else None
    if rules.correction is not None:
        weights = rules.correction(tokens.logps - episodes.logps, episodes.lengths.ravel())
        advantages = advantages * weights.tokens
        metrics |= weight_metrics(weights)
    if rules.ratio_to_sampler:
        logps = episodes.logps

    def rows_of(x: PerToken | None) -> Any:
        return None if x is None else packed.from_tokens(x)

    rows = replace(
        packed.rows,
        logps=rows_of(logps),
        reference=rows_of(tokens.reference),
        values=rows_of(tokens.values),
        advantages=rows_of(advantages),
        returns=rows_of(estimate.returns),
    )
    return TrainingRollout(rollout.number, rows, episodes.lengths, mask, has_score(scored.scores), metrics)


def rollout_batch(
    data: "Rollouts",
    rollout: TrainingRollout,
    chosen: Int[np.ndarray, " rows"],
    trains_policy: bool,
    shape: Rollout,
) -> Rollout:
    """Return the batch of the prompts with indices `chosen`, weighted by Rules.token_weights. trains_policy:
    if False, only a critic is trained.
    """
    rows: Any = jax.tree.map(lambda x: x[chosen], rollout.rows)
    lengths, size = rollout.lengths[chosen], data.sampled_length
    weights = data.rules.token_weights(lengths, rollout.policy_mask[chosen] & trains_policy, size)
    rows = replace(rows, policy_weights=per_episode(weights, rows))
    if rows.values is not None:
        weights = token_mean(lengths, rollout.scored[chosen], size)
        rows = replace(rows, value_weights=per_episode(weights, rows))
    if rows.observation_weights is not None:
        given = rows.observation_weights * trains_policy
        rows = replace(rows, observation_weights=given / max(float(given.sum()), 1.0))
    return to_microbatches(rows, shape)


@dataclass(frozen=True, kw_only=True)
class Rollouts(Prompts):
    """Data of a run with a policy objective: prompts, and the rules by which episodes are scored and trained
    on.

    environment: answers the policy's turns and scores episodes (environment.py); none for episodes of one
    turn; in a dict of several, a row's column `environment` names one. A batch's row has slots for a prompt
    of each episode, unless `reset` is annotated to return None. tools: functions that the policy may call.
    timeout: seconds of each call of the environment or a tool. max_observation: the most characters that a
    call of the environment or a tool may return; more is an error of the episode. replay: the folder of a run
    whose recorded rollouts, of the same prompts, are used in place of new ones; held-out prompts are still
    sampled. observations: whether a batch has weights of the tokens that episodes were given, for the
    objective policy.echo.

    Other fields: see Prompts.

    >>> from jaxft.rl.environments.shipped_environments import Calculator
    >>> from jaxft.rl.rewards import EnvironmentReward
    >>> rules = Rules((EnvironmentReward(),))
    >>> data = Rollouts("sums.jsonl", rules=rules, environment=Calculator, max_turns=3, max_new=64, group=4)
    >>> data.played.name, data.episode_length  # tokens after the prompt
    ('Calculator', 192)
    """

    rules: Rules
    environment: EnvironmentClass | None = None
    tools: tuple[Callable, ...] = ()
    timeout: Annotated[float, above(0)] = 30.0
    max_observation: PositiveInt = 1 << 16
    replay: str | None = None
    observations: bool = False
    kind: ClassVar[BatchKind] = BatchKind(policy_shapes, policy_rows, rollout_batch, of_tokens=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.played.continues and self.max_turns > 1:
            raise ValueError(
                f"data.max_turns={self.max_turns}, but nothing answers a turn; set environment= or tools="
            )
        if self.played.schemas and self.max_turns == 1:
            raise ValueError(
                "data.max_turns=1 with tools: after one turn an episode ends, and calls are not answered. "
                "Set, for example, data.max_turns=3: two turns with tool calls, and the answer."
            )
        if self.observations and self.max_turns == 1:
            raise ValueError(
                "ECHO trains on observations between turns, and data.max_turns=1 has none. Set, for "
                "example, data.max_turns=3 with an environment or tools, or leave echo out."
            )

    @property
    def row_tools(self) -> str:
        """The schemas of the tools that prompts list, as JSON, "" without tools; see RowSettings."""
        return self.played.row_tools

    @property
    def optional_prompts(self) -> bool:
        """True if rows need no prompt, because the environment makes it."""
        return self.played.prompts

    @property
    def played(self) -> Environment:
        """The environment, with the tools."""
        return environment_of(self.environment, self.tools)

    @property
    def object_rewards(self) -> list[ObjectReward]:
        """The rewards that read the environment's objects."""
        return [reward for reward in self.rules.rewards if isinstance(reward, ObjectReward)]

    @property
    def reads_given(self) -> bool:
        """True if batches also read log-probs of the tokens of observations, as ECHO's loss needs."""
        return self.observations

    @property
    def starts_per_row(self) -> int:
        """How many prompts a batch's row has slots for: one, or `group` if the environment may change
        prompts.
        """
        return self.group if self.played.resets else 1

    def play(self, tokenizer: Any, stop: tuple[int, ...]) -> Play:
        """Return the Play of these settings. stop: tokens that end a turn."""
        sizes = self.max_turns, self.max_new, self.episode_length, self.max_prompt
        limits = EpisodeLimits(*sizes, self.timeout, self.max_observation)
        functions = tuple(reward.fn for reward in self.object_rewards)
        return Play(self.played, tokenizer, stop, limits, functions)

    def start_lines(self, objective: Objective, a: AttentionLayers) -> list[str]:
        """Return lines about reward models, log-probs that are not recomputed and the model's rope; see
        DataSettings.start_lines.
        """
        lines = [line for reward in self.rules.rewards for line in reward.start_lines()]
        taken = not self.kind.of_tokens or self.rules.ratio_to_sampler
        if not (taken or needs_recomputed_logps(self, objective)):
            lines.append(
                "log-probs are not recomputed after sampling: each rollout has one update, in which the "
                "ratio to the policy that sampled is taken as 1, and differences between sampler and "
                "training are not logged; data.passes=2 recomputes them, and trains on each rollout twice"
            )
        if varies_with_length(a, self.max_length):
            lines.append(
                "the model's rope depends on the length of a text: sampling and training use the length of "
                f"the prompt and data.max_new={self.max_new} more tokens, however long the completion is"
            )
        return lines

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "PromptSource":
        """Read and tokenise the prompts; see DataSettings.open. `bind` returns the source that can sample."""
        names = [reward.name for reward in self.object_rewards]
        if names and (self.environment is None or len({*names}) < len(names)):
            advice = "set environment=my_env.py:Name"
            if self.environment is not None:
                advice = "rename one of the functions that have the same name"
            raise ValueError(f"rewards {', '.join(names)} have the parameter environments; {advice}")
        self.play(tokenizer, ())  # raises ValueError for a tokenizer whose template shows no tools
        return PromptSource(self, tokenizer, *prompts.split_prompts(self, tokenizer, cache), shards)

    def abstract(self, shards: int = 1) -> Batch:
        """Return the shapes of the largest batch that the settings allow, without reading rows. shards: see
        open.
        """
        return self.kind.shapes(self, self.max_prompt, shards)[-1]


@dataclass
class PromptSource:
    """The prompts of a run as a source whose batches are the prompts alone; see data.source.Source. `bind`
    returns the source that samples episodes for them.

    shards: number of devices among which the mesh divides rows. most_evaluated: held-out prompts that an
    evaluation reads, None for all.
    """

    data: Rollouts
    tokenizer: Any
    train: PromptRows
    eval_prompts: PromptRows
    shards: int = 1
    most_evaluated: int | None = None
    held_out: ClassVar[tuple[()]] = ()

    @cached_property
    def info(self) -> SourceInfo:
        """Counts, fingerprint and the number of steps."""
        return rollout_info(self.data, self.tokenizer, self.train, self.eval_prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; data.max_prompt where an environment or tools change prompts."""
        if self.data.played.continues:
            return self.data.max_prompt
        return prompts.longest_prompt(self.train, self.eval_prompts)

    @property
    def shapes(self) -> tuple[Batch, ...]:
        """The shapes that training batches have, the largest last."""
        return self.data.kind.shapes(self.data, self.longest, self.shards)

    def bind(self, run: BoundRun, saved: dict[str, Any] | None) -> "RolloutSource":
        """Compile the sampler and the rewards for a run, and return the source that uses them.

        saved: `state_dict` of the checkpoint to resume from. Raises ValueError for an objective or an
        optimizer that contradicts the settings.
        """
        data, of_tokens = self.data, self.data.kind.of_tokens
        if of_tokens:
            check_policy_run(data, run)
        recompute = of_tokens and needs_recomputed_logps(data, run.objective)
        has_logps = recompute or data.rules.ratio_to_sampler
        spec = run.objective.batch_spec if of_tokens else same_batch

        def complete(batch: Rollout) -> Rollout:  # without log-probs the ratio is 1
            return spec(batch) if has_logps else replace(spec(batch), logps=None)

        sizes = rollout_shapes(data, self.longest, self.shards)
        shapes = {row: complete(batch) for row, batch in sizes.items()}
        programs = RolloutPrograms(run, shapes, data.units_per_step, complete, data.max_length)
        return RolloutSource(
            **{field.name: getattr(self, field.name) for field in fields(PromptSource)},
            run=run,
            sample=compile_rollout_sampler(run, data, self.tokenizer, prompts.padded_length(self.longest)),
            rewards=tuple(reward.prepare(programs) for reward in data.rules.rewards),
            token_scores=programs.compile_scores() if recompute else None,
            row_shapes=tuple(sizes),
            batch_shapes=tuple(shapes.values()) if of_tokens else self.shapes,
            history=History(**saved) if saved else History(),
        )

    def given(self, step: int) -> Batch:
        """Return the prompts of a step as rows of tokens without targets."""
        return prompts.prompt_tokens(self.data, self.train, step, self.shards)

    def batch(self, step: int, state: TrainState) -> tuple[Batch, Metrics]:
        """Return the prompts of a step."""
        return self.given(step), {}

    def evaluate(self, state: TrainState) -> HeldOutMetrics:
        """Return no metrics: without a sampler there are no episodes."""
        return HeldOutMetrics({}, {})

    def limit_evaluation(self, most: int | None) -> Any:
        """Return the source whose evaluations read at most `most` held-out prompts."""
        return replace(self, most_evaluated=most)

    def row_names(self, step: int) -> list[str]:
        """Return the names of the dataset rows whose prompts an optimizer step uses."""
        number, part = divmod(step, self.data.steps_per_rollout)
        chosen = prompts.prompts_of_rollout(self.data, self.train, number)
        return [self.train.names[i] for i in chosen[prompts.prompts_of_step(self.data, number, part)]]

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts."""
        return [Prompt(list(ids), []) for ids in self.eval_prompts.token_ids[:count]]

    def held_out_name(self, position: int) -> str:
        """Return the name of the held-out row at a position."""
        return self.eval_prompts.names[position]

    def state_dict(self) -> dict[str, Any]:
        """Return {}: nothing is sampled yet."""
        return {}


class History(NamedTuple):
    """Values in checkpoints that outlive a rollout. moments: moments of all scores so far, for Rules.scale.
    reported: kinds of faults that have been printed, each once.
    """

    moments: list[float] = [0.0, 0.0, 0.0]
    reported: list[str] = []


@dataclass(kw_only=True)
class RolloutSource(PromptSource):
    """Rollouts of a compiled run; see data.source.Source. A batch is a function of step, state and history.

    token_scores: the pass that recomputes log-probs, None to use the sampler's. row_shapes: shapes of packed
    rows; each rollout uses the smallest that fits. current: the rollout in use, None before the first.
    """

    run: BoundRun
    sample: SampleEpisodes
    rewards: tuple[ScoreEpisodes, ...]
    token_scores: TokenScores | None
    row_shapes: tuple[RowShape, ...]
    batch_shapes: tuple[Batch, ...]
    history: History = History()
    current: TrainingRollout | None = None

    @property
    def shapes(self) -> tuple[Batch, ...]:
        """The shapes that training batches have, the largest last."""
        return self.batch_shapes

    def state_dict(self) -> dict[str, Any]:
        """Return the state that outlives a rollout."""
        return self.history._asdict()

    def batch(self, step: int, state: TrainState) -> tuple[Batch, Metrics]:
        """Return the batch of a step and its rollout's metrics. A rollout is sampled at its first step."""
        data, (number, part) = self.data, divmod(step, self.data.steps_per_rollout)
        if self.current is None or self.current.number != number:
            if part:
                raise ValueError(
                    f"step {step} is inside rollout {number}, which begins at step {step - part}. Resume "
                    "from a checkpoint at the first step of a rollout."
                )
            self.current = self._new_rollout(number, state)
        chosen = prompts.prompts_of_step(data, number, part)
        trains_policy = number >= data.rules.warm_up and not self._beyond_target_kl(self.current, part, state)
        batch = data.kind.batch(data, self.current, chosen, trains_policy, self.shapes[-1])
        return batch, self.current.metrics

    def evaluate(self, state: TrainState) -> HeldOutMetrics:
        """Score data.eval_group episodes of each held-out prompt, always sampled with the same keys; the
        value of a prompt is its mean score.
        """
        numbers, rules = spread(len(self.eval_prompts), self.most_evaluated), self.data.rules
        if not numbers:
            return HeldOutMetrics({}, {})
        chosen = self.eval_prompts.select(numbers)
        scored, packed = self._scored(chosen, self.data.eval_group, EVALUATION, state)
        has_reference = self.run.objective.facts.reference != "none" and self.token_scores is not None
        tokens = self._of_tokens(scored, packed, state) if has_reference else None
        means = zip(numbers, prompt_means(np.asarray(scored.scores)), strict=True)
        rows = {number: {REWARD: mean} for number, mean in means if not math.isnan(mean)}
        return HeldOutMetrics(evaluation_metrics(rules.reward_names, scored, tokens), rows)

    def _new_rollout(self, number: int, state: TrainState) -> TrainingRollout:
        """Sample and score rollout `number`.

        If none of its episodes has a score, for example while the environment's server is down, it trains
        nothing. Raises ValueError if no earlier rollout had a score either.
        """
        data, rules = self.data, self.data.rules
        chosen = self.train.select(prompts.prompts_of_rollout(data, self.train, number))
        scored, packed = self._scored(chosen, data.group, number, state)
        messages = fault_messages(scored)
        if not has_score(scored.scores).any():
            reason = next(iter(messages.values()), "none has all of its rewards")
            text = f"no completion of rollout {number + 1} has a score: {reason.partition(';')[0]}."
            if not self.history.moments[0]:
                raise ValueError(f"{text} Correct the rewards, the environment or the rows.")
            if is_first():
                print(f"{text} It is left out of training.", flush=True)
        new = [kind for kind in messages if kind not in self.history.reported]
        if is_first():
            for kind in new:
                print(f"rollout {number + 1}: {messages[kind]}", flush=True)
            first_step = number * data.steps_per_rollout + 1
            append_table(self.run.folder / "completions.jsonl", first_step, scored, rules.reward_names)
        moments = update_moments(np.array(self.history.moments), scored.scores)
        self.history = History(moments.tolist(), self.history.reported + new)
        tokens = self._of_tokens(scored, packed, state)
        if rules.scale is not None:
            scaled: dict[str, Any] = {"scores": rules.scale(scored.scores, moments)}
            if tokens.turn_rewards is not None:
                scaled["turn_rewards"] = rules.scale(tokens.turn_rewards, moments)
            tokens = replace(tokens, **scaled)
        return data.kind.rows(data, ScoredRollout(number, scored, packed, tokens), self.shapes[-1])

    def _scored(
        self, chosen: TokenisedPrompts, group: int, number: int, state: TrainState
    ) -> tuple[ScoredEpisodes, PackedRows]:
        """Sample `group` episodes of each prompt in rollout `number`, arrange them in rows and score them."""
        episodes = self.sample(chosen, group, number, state)
        size = round_up(len(chosen), self.data.units_per_step), self.data.group
        packed = pack_episodes(episodes, self.row_shapes, size, self.data.reads_given)
        by_reward = [score(episodes, packed, state) for score in self.rewards]
        return self.data.rules.score(episodes, by_reward), packed

    def _of_tokens(self, scored: ScoredEpisodes, packed: PackedRows, state: TrainState) -> RolloutScores:
        """Return the input of an estimator, with recomputed log-probs if the run needs these."""
        episodes, rules = scored.episodes, self.data.rules
        computed = Scores() if self.token_scores is None else self.token_scores(packed, episodes, state)
        in_rewards, has_turns = self.run.objective.facts.kl_in_rewards, episodes.most_turns > 1
        return RolloutScores(
            scores=scored.scores,
            lengths=episodes.lengths,
            ended=episodes.ended,
            logps=episodes.logps.astype(np.float64) if computed.logps is None else computed.logps,
            reference=computed.reference,
            values=computed.values,
            reward_scores=scored.reward_scores,
            reward_weights=rules.reward_weights,
            kl_coef=float(jax.device_get(state.aux["kl_coef"])) if in_rewards else None,
            turns=episodes.turns if has_turns else None,
            turn_rewards=rules.turn_weight * episodes.turn_rewards if has_turns else None,
            recomputed=computed.logps is not None,
        )

    def _beyond_target_kl(self, rollout: TrainingRollout, part: int, state: TrainState) -> bool:
        """Return whether the KL to the sampling policy exceeds target_kl. Waits for the previous step.

        part: number of the step in the rollout. aux has the approximate KL of the last step that trained the
        policy; it belongs to this rollout if an earlier step of the rollout trained the policy.
        """
        target = self.run.objective.facts.target_kl
        if target is None or rollout.number < self.data.rules.warm_up:
            return False
        earlier = (prompts.prompts_of_step(self.data, rollout.number, i) for i in range(part))
        if not any(rollout.policy_mask[chosen].any() for chosen in earlier):
            return False
        (total, weight), bad = jax.device_get((state.aux["approx_kl"], state.bad))
        return bool(bad[1] < part and total > target * weight)


def rollout_info(data: Rollouts, tokenizer: Any, train: PromptRows, eval_prompts: PromptRows) -> SourceInfo:
    """Return the number of steps, the counts and the fingerprints of a source of rollouts."""
    longest, rows = prompts.longest_prompt(train, eval_prompts), train.split.rows
    rollouts = max(1, -(-int(1e9 * (data.epochs or 1) * len(train)) // int(1e9 * data.batch)))
    plural = "s" if data.steps_per_rollout > 1 else ""
    summary = (
        f"{len(train)} prompts of at most {longest} tokens, {len(eval_prompts)} held out, {rows.dropped} "
        f"dropped as too long; a rollout of {data.batch} x {data.group} completions of at most "
        f"{data.max_new} tokens is used for {data.steps_per_rollout} step{plural}{train.split.left_out}"
    )
    if tokenizer.eos_token_id is None:
        ends = "the model's, the template's or data.max_new ends completions"
        summary += f"; the tokenizer has no end token: {ends}"
    out = [] if data.rules.train_on_truncated else ["completions truncated at data.max_new"]
    out += [] if data.rules.filter is None else ["completions that the filter leaves out"]
    learned = "100.0 % of the tokens of completions are learned"
    learned = f"all tokens of completions are learned, except in {' and '.join(out)}" if out else learned
    fingerprints = {reward.name: reward.fingerprint() for reward in data.rules.rewards}
    stats = SourceStats(
        examples=len(train), held_out=len(eval_prompts), dropped=rows.dropped, invalid=rows.invalid,
        largest_id=rows.largest_id, summary=summary, learned=learned,
    )  # fmt: skip
    notes: Sequence[str] = ()
    if data.max_turns > 1:
        notes = restart_notes(data.played.schemas, tokenizer, data.template_settings)
    return SourceInfo(
        steps=rollouts * data.steps_per_rollout,
        steps_per_epoch=len(train) / data.batch * data.steps_per_rollout,
        steps_per_rollout=data.steps_per_rollout,
        samples=True,
        eval_cost=data.eval_group / data.group,
        fingerprint=prompts.prompts_fingerprint(data, train, eval_prompts),
        preview=tokenizer.decode(train.token_ids[0], skip_special_tokens=False),
        stats=stats,
        recorded={f"reward_{name}_fingerprint": x for name, x in fingerprints.items() if x is not None},
        warnings=(*train.split.warnings, *notes),
    )


def check_policy_run(data: Rollouts, run: BoundRun) -> None:
    """Raise ValueError if a run's objective or optimizer contradicts the settings of its rollouts."""
    facts, target_kl = run.objective.facts, run.objective.facts.target_kl
    if run.fused_backward and (data.rules.freezes_policy or target_kl is not None):
        raise ValueError(
            "optim.fused_backward=true always updates the policy, but warm_up, target_kl, filter and "
            "train_on_truncated=false may freeze it for a step. Set optim.fused_backward=false."
        )
    if facts.temperature not in (None, data.temperature):
        raise ValueError(
            f"data.temperature={data.temperature} differs from the objective's {facts.temperature}, but "
            "log-probs must come from the sampling distribution. Make them equal."
        )
    if facts.observations != data.observations:
        raise ValueError(
            f"data.observations={str(data.observations).lower()} does not fit the objective: set true for "
            "policy.echo, false for any other objective."
        )
    if target_kl is not None and data.steps_per_rollout == 1:
        raise ValueError(
            f"target_kl={target_kl} skips later steps of a rollout, but each rollout has one step. Raise "
            "data.passes or data.minibatches, or omit target_kl."
        )
    example = example_rollout(data.group, data.rules.reward_weights, facts)
    check_advantages(data.group, example.scores, data.rules.estimate(example).advantages)


def needs_recomputed_logps(data: Rollouts, objective: Objective) -> bool:
    """Return whether the training program computes log-probs again after sampling: for a reference or a
    critic and, unless ratios are to the sampler, for a quantised cache, several steps per rollout and
    corrections.
    """
    scored = objective.facts.reference != "none" or objective.facts.critic
    if data.rules.ratio_to_sampler:
        return scored
    quantised = data.kv_cache != "compute"  # the sampler's log-probs have an error, which is to be logged
    return scored or quantised or data.steps_per_rollout > 1 or data.rules.correction is not None
