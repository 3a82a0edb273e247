"""Sample completions with the policy of a run and score them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxft.batch import Rollout, TrainState
from jaxft.data.prompt_rows import TokenisedPrompts
from jaxft.data.prompts import Prompts
from jaxft.engine.generate import complete
from jaxft.engine.programs import Engine, compile_engine
from jaxft.engine.sampling import Sampling, nonfinite_logits, without_stop
from jaxft.engine.session import Session
from jaxft.engine.state import Decoding, rows_in_progress, slots_for
from jaxft.objectives.objective import Objective, Scores
from jaxft.rl.completions import Completions, ScoredCompletions
from jaxft.rl.estimators import RolloutScores
from jaxft.rl.layout import RolloutShapes, fits, pack_rollout, to_completions
from jaxft.rl.programs import BoundRun, RolloutPass, RolloutPrograms
from jaxft.rl.rewards import ScoreCompletions
from jaxft.rl.rules import Rules
from jaxft.tree import Aux, Params


@dataclass(frozen=True)
class Sampler:
    """The compiled sampling programs of a run. engines: by the number of completions of a prompt."""

    run: BoundRun
    data: Prompts
    tokenizer: Any
    shapes: RolloutShapes
    engines: Mapping[int, Engine]

    def sample(self, prompts: TokenisedPrompts, group: int, number: int, state: TrainState) -> Completions:
        """Sample `group` completions of up to data.batch prompts; see sample_parts."""
        (completions,) = self.sample_parts([prompts], group, number, state)
        return completions

    def sample_parts(
        self, parts: Sequence[TokenisedPrompts], group: int, number: int, state: TrainState
    ) -> list[Completions]:
        """Sample `group` completions of prompts in parts of up to data.batch prompts, all parts together.

        number: of the rollout, for the key. Raises ValueError that names the row of the prompt if the
        policy's logits are not finite.
        """
        key = jax.random.fold_in(jax.random.key(self.data.seed + 2), number)
        ids = [prompt for part in parts for prompt in part.ids]
        session = Session(self.engines[group], self.run.params(state), key)
        tokens, logps = complete(session, ids)
        ends = np.cumsum([len(part) for part in parts])
        return [
            self._completions(part, tokens[end - len(part) : end], logps[end - len(part) : end])
            for part, end in zip(parts, ends, strict=True)
        ]

    def _completions(self, prompts: TokenisedPrompts, sampled: np.ndarray, logps: np.ndarray) -> Completions:
        """Return the completions of up to data.batch prompts. sampled, logps: [prompts, group, max_new]."""
        data, (count, group, _) = self.data, sampled.shape
        tokens = sampled.reshape(count * group, data.max_new)
        where = nonfinite_logits(tokens)
        if where:
            raise ValueError(
                f"{prompts.names[where[0] // group]}: the policy's logits of token {where[1] + 1} of a "
                "completion are not finite; lower optim.lr, or check the weights"
            )
        lengths = (tokens >= 0).sum(1)
        ended = np.isin(tokens[np.arange(len(tokens)), lengths - 1], self.run.stop).reshape(count, group)
        texts = tuple(  # as TRL's: with the tokenizer's own setting for clean-up of spaces
            self.tokenizer.decode(without_stop(row[:n], self.run.stop), skip_special_tokens=True)
            for row, n in zip(tokens, lengths, strict=True)
        )
        lengths = lengths.reshape(count, group)
        row_shape = next(shape for shape in self.shapes.rows if fits(prompts, lengths, shape))
        rows = pack_rollout(prompts, sampled, lengths, row_shape, (data.batch, data.group))
        flat_logps = logps.reshape(count * group, data.max_new)
        return Completions(prompts, sampled, flat_logps, lengths, ended, texts, row_shape, rows)


def compile_rollout_sampler(run: BoundRun, data: Prompts, tokenizer: Any, shapes: RolloutShapes) -> Sampler:
    """Compile the sampling programs of training and of evaluation."""
    sampling = Sampling(data.max_new, data.temperature, data.top_k, data.top_p)
    engines = {}
    for group in {data.eval_group, data.group}:
        d = Decoding(run.model, sampling, run.stop, group, data.kv_cache)
        rows = rows_in_progress(data.decode_rows, run.mesh)
        slots = slots_for(data.batch, group, shapes.prompt_size, rows)
        engines[group] = compile_engine(d, run.param_shapes, slots, run.mesh)
    return Sampler(run, data, tokenizer, shapes, engines)


def score_tokens(objective: Objective, params: Params, aux: Aux, batch: Rollout) -> Scores:
    """Return log-probs, the reference's and values of a batch [micro, rows, ...]."""
    return jax.lax.map(lambda rows: objective.score(params, rows, aux), batch)


@dataclass(frozen=True)
class RolloutScorer:
    """The prepared rewards of a run and the pass that recomputes log-probs, None to use the sampler's."""

    rules: Rules
    rewards: tuple[ScoreCompletions, ...]
    token_scores: RolloutPass | None
    kl_in_rewards: bool

    def score(self, completions: Completions, state: TrainState) -> ScoredCompletions:
        """Score completions by each reward, then combine and shape the scores."""
        return self.rules.score(completions, [score(completions, state) for score in self.rewards])

    def rollout_scores(self, scored: ScoredCompletions, state: TrainState) -> RolloutScores:
        """Return the scores with log-probs, reference and values of each token."""
        completions = scored.completions
        lengths, size = completions.lengths, completions.tokens.shape[2]
        scores = Scores() if self.token_scores is None else self.token_scores(completions, state)
        logps, reference, values = (
            None if rows is None else to_completions(np.asarray(rows), lengths, size) for rows in scores
        )
        if logps is None:
            logps = completions.sampler_logps.astype(np.float64)
        kl_coef = float(jax.device_get(state.aux["kl_coef"])) if self.kl_in_rewards else None
        return RolloutScores(
            scored.scores, lengths, completions.ended, logps, reference, values, scored.reward_scores,
            self.rules.reward_weights, kl_coef,
        )  # fmt: skip


def compile_rollout_scorer(rules: Rules, programs: RolloutPrograms, recompute_logps: bool) -> RolloutScorer:
    """Prepare the rewards and compile the pass that recomputes log-probs, if there is one."""
    objective = programs.run.objective
    token_scores = programs.compile(partial(score_tokens, objective)) if recompute_logps else None
    rewards = tuple(reward.prepare(programs) for reward in rules.rewards)
    return RolloutScorer(rules, rewards, token_scores, objective.facts.kl_in_rewards)
