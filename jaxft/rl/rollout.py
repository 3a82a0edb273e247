"""Rollouts: sample completions with the current policy, score them, and make batches for a policy objective.

Rollout k is sampled at step k * steps_per_rollout, with the state of that step, and used for that many steps.
A run is therefore saved between rollouts only; one that is killed inside a rollout resumes at the rollout's
first step and samples the same completions again.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxft.batch import Rollout, TrainState
from jaxft.data import chat, prompts
from jaxft.data.invalid import add_counts
from jaxft.data.prompt_rows import PromptRows
from jaxft.data.prompts import Prompts
from jaxft.data.source import Prompt, SourceInfo, SourceStats, spread
from jaxft.distributed import processes
from jaxft.nn.layer_attention import AttentionLayers, varies_with_length
from jaxft.objectives.objective import Objective
from jaxft.rl.advantages import GroupScores, Moments, PerToken, has_score, per_token, update_moments
from jaxft.rl.completions import ScoredCompletions, TrainingRollout, append_table
from jaxft.rl.estimators import example_rollout
from jaxft.rl.importance import weight_metrics
from jaxft.rl.layout import RolloutShapes, rollout_shapes, to_microbatches, to_rows
from jaxft.rl.metrics import as_sums, evaluation_metrics, rollout_metrics
from jaxft.rl.programs import BoundRun, RolloutPrograms
from jaxft.rl.rules import Rules
from jaxft.rl.sampler import RolloutScorer, Sampler, compile_rollout_sampler, compile_rollout_scorer
from jaxft.rl.token_weights import token_mean
from jaxft.tree import Batch, Metrics

UNBOUND = "this source has prompts but no run to sample completions with. Call bind(run, saved) first."
EVALUATION = 2**31 - 1  # rollout number from which the sampling key of held-out prompts is derived


@dataclass(frozen=True, kw_only=True)
class Rollouts(Prompts):
    """Data of a run with a policy objective: prompts, and the rules by which completions are scored and
    trained on.
    """

    rules: Rules

    def start_lines(self, objective: Objective, a: AttentionLayers) -> list[str]:
        """Return lines about reward models, log-probs that are not recomputed and the model's rope; see
        Dataset.start_lines.
        """
        return [*reward_lines(self), *recomputation_lines(self, objective), *rope_lines(self, a)]

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> "RolloutSource":
        """Read and tokenise the prompts; see Dataset.open. `bind` returns the source that can sample."""
        return RolloutSource(self, tokenizer, *prompts.split_prompts(self, tokenizer, cache), shards)

    def abstract(self, shards: int = 1) -> Batch:
        """Return the shapes of the largest batch that the settings allow, without reading any row."""
        return prompts.rollout_batch_shapes(self, prompts.group_row_shape(self, self.max_prompt), shards)


@dataclass(frozen=True)
class RolloutSource:
    """The tokenised prompts of a run; see data.source.Source. `bind` compiles the sampler and the scorer.

    most_evaluated: held-out prompts that an evaluation reads, None for all.
    """

    data: Rollouts
    tokenizer: Any
    train: PromptRows
    eval_prompts: PromptRows
    shards: int
    held_out: tuple[()] = ()
    most_evaluated: int | None = None

    @cached_property
    def info(self) -> SourceInfo:
        """Counts, fingerprint and the number of steps."""
        return rollout_info(self.data, self.tokenizer, self.train, self.eval_prompts)

    @cached_property
    def rollout_shapes(self) -> RolloutShapes:
        """Shapes of the rows of a rollout."""
        return rollout_shapes(self.data, prompts.longest_prompt(self.train, self.eval_prompts), self.shards)

    @property
    def shapes(self) -> tuple[Batch, ...]:
        """The shapes that training batches have, the largest last."""
        return self.rollout_shapes.batches

    def bind(self, run: BoundRun, saved: dict[str, Any] | None) -> "BoundRollouts":
        """Compile the sampler and the scorer for a run and return the source that uses them.

        saved: `state_dict` of the checkpoint to resume from. Raises ValueError for an objective or an
        optimizer that contradicts the settings.
        """
        check_policy_run(self.data, run)
        recompute = needs_recomputed_logps(self.data, run.objective)
        has_logps = recompute or self.data.rules.ratio_to_sampler
        programs = self.programs(run, run.objective.batch_spec if has_logps else without_logps)
        return BoundRollouts(
            source=self,
            run=run,
            sampler=compile_rollout_sampler(run, self.data, self.tokenizer, self.rollout_shapes),
            scorer=compile_rollout_scorer(self.data.rules, programs, recompute),
            shapes=tuple(programs.shapes.values()),
            moments=saved_moments(saved),
        )

    def programs(self, run: BoundRun, complete: Any) -> RolloutPrograms:
        """Return the row shapes of this source with a compiler of passes over them; see RolloutPrograms.
        complete(rows) adds the fields of a training batch.
        """
        sizes = self.rollout_shapes
        shapes = {row: complete(batch) for row, batch in zip(sizes.rows, sizes.batches, strict=True)}
        return RolloutPrograms(run, shapes, self.data.units_per_step, complete, self.data.max_length)

    def given(self, step: int) -> Batch:
        """Return the prompts of a step as rows of tokens without targets."""
        return prompts.prompt_tokens(self.data, self.train, step, self.shards)

    def batch(self, step: int, state: TrainState) -> tuple[Batch, Metrics]:
        """Raise ValueError: only a bound source can sample completions."""
        raise ValueError(UNBOUND)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Raise ValueError: only a bound source can sample completions."""
        raise ValueError(UNBOUND)

    def limit_evaluation(self, most: int | None) -> "RolloutSource":
        """Return the source whose evaluations read at most so many held-out prompts."""
        return replace(self, most_evaluated=most)

    def prompt_numbers(self, number: int) -> Int[np.ndarray, " batch"]:
        """Return the indices of the prompts that a rollout uses."""
        return prompts.prompts_of_rollout(self.data, self.train, number)

    def row_names(self, step: int) -> list[str]:
        """Return the names of the dataset rows whose prompts an optimizer step uses."""
        number, part = divmod(step, self.data.steps_per_rollout)
        chosen = self.prompt_numbers(number)[prompts.prompts_of_step(self.data, number, part)]
        return [self.train.names[i] for i in chosen]

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts."""
        return [Prompt(list(ids), []) for ids in self.eval_prompts.token_ids[:count]]

    def held_out_name(self, position: int) -> str:
        """Return the name of a held-out row; the evaluation of rollouts has no values of single rows."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return {}: nothing is sampled yet."""
        return {}


@dataclass
class BoundRollouts:
    """The rollouts of a compiled run; see data.source.Source.

    shapes: of training batches. moments: of all scores so far, for Rules.scale. A batch is a
    function of step, state and moments; the current rollout is cached until the next one begins.
    """

    source: RolloutSource
    run: BoundRun
    sampler: Sampler
    scorer: RolloutScorer
    shapes: tuple[Batch, ...]
    moments: Moments
    held_out: tuple[()] = ()
    _current: TrainingRollout | None = field(default=None, repr=False)
    _warned: bool = False

    @property
    def info(self) -> SourceInfo:
        """Counts, fingerprint and the number of steps."""
        return self.source.info

    @property
    def data(self) -> Rollouts:
        """The settings."""
        return self.source.data

    def bind(self, run: BoundRun, saved: dict[str, Any] | None) -> "BoundRollouts":
        """Return the source bound to another run."""
        return self.source.bind(run, saved)

    def row_names(self, step: int) -> list[str]:
        """Return the names of the dataset rows whose prompts an optimizer step uses."""
        return self.source.row_names(step)

    def prompts(self, count: int) -> list[Prompt]:
        """Return the first `count` held-out prompts."""
        return self.source.prompts(count)

    def given(self, step: int) -> Batch:
        """Return the prompts of a step as rows of tokens without targets."""
        return self.source.given(step)

    def held_out_name(self, position: int) -> str:
        """Return the name of a held-out row."""
        return self.source.held_out_name(position)

    def limit_evaluation(self, most: int | None) -> "BoundRollouts":
        """Return the source whose evaluations read at most so many held-out prompts."""
        return replace(self, source=self.source.limit_evaluation(most))

    def state_dict(self) -> dict[str, Any]:
        """Return the moments of all scores so far."""
        return {"moments": self.moments.tolist()}

    def batch(self, step: int, state: TrainState) -> tuple[Batch, Metrics]:
        """Return the batch of a step and its rollout's metrics. A rollout is sampled at its first step."""
        number, part = divmod(step, self.data.steps_per_rollout)
        if self._current is None or self._current.number != number:
            if part:
                raise ValueError(
                    f"step {step} is inside rollout {number}. A run resumes at the first step of a rollout."
                )
            self._current = self._new_rollout(number, state)
        chosen = prompts.prompts_of_step(self.data, number, part)
        warmed_up = number >= self.data.rules.warm_up
        trains_policy = warmed_up and not self._beyond_target_kl(self._current, part, state)
        return self._training_batch(self._current, chosen, trains_policy), self._current.metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Score data.eval_group completions of each held-out prompt, always sampled with the same keys."""
        eval_prompts, size = self.source.eval_prompts, self.data.batch
        numbers = spread(len(eval_prompts), self.source.most_evaluated)
        chosen = [
            eval_prompts.select(numbers[start : start + size]) for start in range(0, len(numbers), size)
        ]
        if not chosen:
            return {}
        sampled = self.sampler.sample_parts(chosen, self.data.eval_group, EVALUATION, state)
        parts = [self.scorer.score(completions, state) for completions in sampled]
        has_reference = self.run.objective.facts.reference != "none" and self.scorer.token_scores is not None
        rollouts = [self.scorer.rollout_scores(part, state) for part in parts] if has_reference else []
        return evaluation_metrics(self.data.rules.reward_names, parts, rollouts)

    def _new_rollout(self, number: int, state: TrainState) -> TrainingRollout:
        """Sample and score rollout `number`. Raises ValueError if none of its completions has a score."""
        source, rules = self.source, self.data.rules
        chosen = source.train.select(source.prompt_numbers(number))
        scored = self.scorer.score(self.sampler.sample(chosen, self.data.group, number, state), state)
        fault = scored.faults.first
        if not has_score(scored.scores).any():
            reason = fault or "none has all of its rewards"
            raise ValueError(f"no completion of rollout {number + 1} has a score: {reason}.")
        if processes.is_first():
            if fault and not self._warned:
                print(
                    f"rollout {number + 1}: {fault}; this completion has no score. "
                    "Further faults are only counted.",
                    flush=True,
                )
                self._warned = True
            first_step = number * self.data.steps_per_rollout + 1
            append_table(self.run.folder / "completions.jsonl", first_step, scored, rules.reward_names)
        self.moments = update_moments(self.moments, scored.scores)
        return self._training_rollout(number, scored, state)

    def _training_rollout(self, number: int, scored: ScoredCompletions, state: TrainState) -> TrainingRollout:
        """Estimate advantages and convert per-token values to rows."""
        rules, completions = self.data.rules, scored.completions
        rollout = self.scorer.rollout_scores(scored, state)
        if rules.scale is not None:
            rollout = replace(rollout, scores=rules.scale(scored.scores, self.moments))
        estimate = rules.estimate(rollout)
        check_advantages(self.data.group, scored.scores, estimate.advantages)
        policy_mask = rules.policy_mask(scored)

        def rows_of(x: PerToken | None) -> Any:
            return None if x is None else to_rows(x, completions.lengths, completions.row_shape.reads)

        recomputed = self.scorer.token_scores is not None
        metrics = rollout_metrics(rules.reward_names, scored, rollout, policy_mask, recomputed)
        metrics |= as_sums(estimate.metrics, policy_mask.size)
        advantages, sampler_logps = estimate.advantages, completions.sampler_logps
        if rules.correction is not None:
            weights = rules.correction(rollout.logps - sampler_logps, completions.lengths.ravel())
            advantages = advantages * weights.tokens
            metrics |= weight_metrics(weights)
        logps = sampler_logps if rules.ratio_to_sampler else rollout.logps if recomputed else None
        rows = replace(
            completions.rows,
            logps=rows_of(logps),
            reference=rows_of(rollout.reference),
            values=rows_of(rollout.values),
            advantages=rows_of(advantages),
            returns=rows_of(estimate.returns),
        )
        return TrainingRollout(
            number, rows, completions.lengths, policy_mask, has_score(scored.scores), metrics
        )

    def _beyond_target_kl(self, rollout: TrainingRollout, part: int, state: TrainState) -> bool:
        """Whether the KL of the policy to the sampling policy exceeds target_kl. Waits for the previous step.

        aux has the approximate KL of the last step that trained the policy. That step belongs to this rollout
        if an earlier step of the rollout trained the policy.
        """
        target = self.run.objective.facts.target_kl
        if target is None or rollout.number < self.data.rules.warm_up:
            return False
        earlier = (prompts.prompts_of_step(self.data, rollout.number, i) for i in range(part))
        if not any(rollout.policy_mask[chosen].any() for chosen in earlier):
            return False
        (total, weight), bad = jax.device_get((state.aux["approx_kl"], state.bad))
        return bool(bad[1] < part and total > target * weight)

    def _training_batch(
        self, rollout: TrainingRollout, chosen: Int[np.ndarray, " rows"], trains_policy: bool
    ) -> Batch:
        """Return the batch of the chosen prompts, with weights that sum to 1."""
        data, lengths = self.data, rollout.lengths[chosen]
        rows: Any = jax.tree.map(lambda x: x[chosen], rollout.rows)

        def rows_of(weights: GroupScores) -> Any:
            return to_rows(per_token(weights, lengths, data.max_new), lengths, rows.read.shape[1])

        mask = rollout.policy_mask[chosen] & trains_policy
        weights = {"policy_weights": rows_of(data.rules.token_weights(lengths, mask, data.max_new))}
        if rows.values is not None:
            scored = rollout.scored[chosen]
            weights["value_weights"] = rows_of(token_mean(lengths, scored, data.max_new))
        return to_microbatches(replace(rows, **weights), self.shapes[-1], data.group)


def rollout_info(data: Rollouts, tokenizer: Any, train: PromptRows, eval_prompts: PromptRows) -> SourceInfo:
    """Return steps, counts and fingerprints of a source of rollouts."""
    longest = prompts.longest_prompt(train, eval_prompts)
    rollouts = max(1, -(-int(1e9 * (data.epochs or 1) * len(train)) // int(1e9 * data.batch)))
    summary = (
        f"{len(train)} prompts of at most {longest} tokens, {len(eval_prompts)} held out, {train.dropped} "
        f"dropped as too long; a rollout of {data.batch} x {data.group} completions of at most "
        f"{data.max_new} tokens is used for {data.steps_per_rollout} steps{train.left_out}"
    )
    if tokenizer.eos_token_id is None:
        summary += (
            "; the tokenizer has no end token: unless the model or its template has one, completions end at "
            "data.max_new"
        )
    fingerprints = {reward.name: reward.fingerprint() for reward in data.rules.rewards}
    stats = SourceStats(
        examples=len(train),
        held_out=len(eval_prompts),
        dropped=train.dropped,
        invalid=add_counts(train.invalid, eval_prompts.invalid),
        largest_id=max(train.largest_id, eval_prompts.largest_id),
        summary=summary,
        learned=learned_completions(data.rules),
    )
    examples, how = (*train.examples, *eval_prompts.examples), (tokenizer, data.template_settings)
    return SourceInfo(
        steps=rollouts * data.steps_per_rollout,
        steps_per_epoch=len(train) / data.batch * data.steps_per_rollout,
        steps_per_rollout=data.steps_per_rollout,
        samples=True,
        eval_cost=data.eval_group / data.group,
        fingerprint=prompts.prompts_fingerprint(data, train, eval_prompts),
        preview=tokenizer.decode(train.token_ids[0], skip_special_tokens=False),
        stats=stats,
        dependencies={f"reward_{name}_fingerprint": x for name, x in fingerprints.items() if x is not None},
        warnings=tuple(dict.fromkeys(train.notes + eval_prompts.notes))
        + chat.tools_warnings(examples, *how)
        + chat.content_warnings(examples, *how),
    )


def learned_completions(rules: Rules) -> str:
    """Return the line about the fraction of the sampled tokens that is learned."""
    out = [] if rules.train_on_truncated else ["those that are cut off at data.max_new"]
    out += [] if rules.filter is None else ["those that the filter leaves out"]
    if not out:
        return "100.0 % of the tokens of completions are learned"
    return f"all tokens of completions are learned, except of {' and '.join(out)}"


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
            "log-probs must be those of the sampling distribution. Make them equal."
        )
    if target_kl is not None and data.steps_per_rollout == 1:
        raise ValueError(
            "target_kl ends a rollout's passes early, but here a rollout has one step. Raise data.passes, or "
            "omit target_kl."
        )
    example = example_rollout(data.group, data.rules.reward_weights, facts)
    check_advantages(data.group, example.scores, data.rules.estimate(example).advantages)
    if data.rules.correction is not None:
        data.rules.correction(example.logps, example.lengths.ravel())  # it checks its bounds


def check_advantages(group: int, scores: GroupScores, advantages: PerToken) -> None:
    """Raise ValueError if all advantages are 0 because each is relative to a group of one."""
    valid = scores[has_score(scores)]
    if group == 1 and valid.max() > valid.min() and not advantages.any():
        raise ValueError(
            "data.group=1: advantages relative to a group of one are all 0. "
            "Use data.group of at least 2, or another estimate."
        )


def reward_lines(data: Rollouts) -> list[str]:
    """Return the lines of the rewards for the start of a run."""
    return [line for reward in data.rules.rewards for line in reward.start_lines()]


def recomputation_lines(data: Rollouts, objective: Objective) -> list[str]:
    """Return a line about log-probs of sampling that are not recomputed, [] where they are."""
    if data.rules.ratio_to_sampler or needs_recomputed_logps(data, objective):
        return []
    return [
        "log-probs are not recomputed after sampling: each rollout has one update, in which the ratio to the "
        "policy that sampled is taken as 1, and differences between sampler and training are not logged; "
        "data.passes=2 recomputes them, and trains on each rollout twice"
    ]


def rope_lines(data: Rollouts, a: AttentionLayers) -> list[str]:
    """Return a line about a model's rope that depends on the length of a text, [] for another. a: of the
    model.
    """
    if not varies_with_length(a, data.max_length):
        return []
    return [
        "the model's rope depends on the length of a text: in sampling and training it is that of the prompt "
        f"and data.max_new={data.max_new} more tokens, however long the completion is"
    ]


def needs_recomputed_logps(data: Rollouts, objective: Objective) -> bool:
    """Whether log-probs are recomputed with the training program after sampling.

    That is not necessary for a single on-policy update without reference or critic, as the ratio is 1, nor
    for a ratio to the sampler.
    """
    scored = objective.facts.reference != "none" or objective.facts.critic
    if data.rules.ratio_to_sampler:
        return scored
    quantised = data.kv_cache != "compute"  # the sampler's log-probs have an error, which is to be logged
    return scored or quantised or data.steps_per_rollout > 1 or data.rules.correction is not None


def without_logps(batch: Rollout) -> Rollout:
    """Return the batch (arrays or shapes) of one on-policy update: without log-probs the ratio is 1."""
    return replace(batch, logps=None)


def saved_moments(saved: dict[str, Any] | None) -> Moments:
    """Return the moments of a checkpoint, zeros without one."""
    return np.array(saved["moments"]) if saved else np.zeros(3)
