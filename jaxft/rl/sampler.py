"""Draws completions with a run's programs, has them scored, and measures what the held-out prompts get."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.batch import Rollout
from jaxft.data import prompts
from jaxft.data.prompts import Asked, Room
from jaxft.distributed import processes, sharding
from jaxft.inference import generate
from jaxft.models.heads import view
from jaxft.objectives.metrics import Max, Min, Sum
from jaxft.objectives.objective import Objective
from jaxft.rl import advantages as adv
from jaxft.rl import rewards
from jaxft.rl.completions import ByScorer, Completions, Rules, by_token, fits, laid
from jaxft.rl.estimators import Sampled

if TYPE_CHECKING:
    from jaxft.rl.rollout import RolloutSource

SHOWN, EACH = 8, 2  # completions of each rollout that are kept in completions.jsonl, of each prompt at most
HELD_OUT = 2**31 - 1  # the number of the draw that measures


class Player:
    """Every program that a rollout needs, compiled before the first step, and the frozen parameters."""

    def __init__(
        self, source: "RolloutSource", programs: Any, frozen: Any, stop: tuple[int, ...], path: Path
    ):
        self.source, self.programs, self.frozen, self.stop, self.path = source, programs, frozen, stop, path
        self.warned = False
        p, data = programs, source.data
        assumed = p.objective.facts.temperature
        if assumed not in (None, data.temperature):
            found = f"data.temperature={data.temperature} and the objective's is {assumed}"
            raise ValueError(
                f"{found}; log-probs must be those that completions are drawn with, make them equal"
            )
        whole = tree.combine(p.state.trainable, p.frozen)
        sampling = generate.Sampling(data.max_new, data.temperature, data.top_k, data.top_p)
        key, empty = jax.random.key(0), generate.left_pad([[0] * self.source.prompt_size], data.batch)
        self.sample = {}
        for group in {data.eval_group, data.group}:
            sampler: Any = generate.make_sampler(p.trained.model, sampling, stop, group)
            self.sample[group] = sampler.lower(whole, empty, key).compile()
        self.judge = self._compiled(partial(judged, p.objective), whole) if source.judged else {}
        scorers = [reward for reward in source.rules.rewards if isinstance(reward, ByScorer)]
        missing = [one.name for one in scorers if one.name not in p.trained.model.heads]
        if missing:
            raise ValueError(
                f"rewards name the scorer {missing[0]}, and the run has none of that name; put it into Run.beside"
            )
        self.score = {one: self._compiled(partial(scored, p.trained.model, one), whole) for one in scorers}
        self.opened = {
            reward: reward.opened(p.mesh) for reward in source.rules.rewards if hasattr(reward, "opened")
        }

    def _compiled(self, fn: Any, whole: Any) -> dict[Room, Any]:
        """A program over (parameters, aux, rows) for each size of rows."""
        program = jax.jit(fn, out_shardings=sharding.replicated(self.programs.mesh))
        return {
            room: program.lower(whole, self.programs.state.aux, rows).compile()
            for room, rows in self._rooms()
        }

    def _rooms(self) -> Any:
        p = self.programs

        def place(s):
            return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding.batch_sharding(p.mesh, s.shape))  # noqa: E731

        for room, shape in zip(self.source.rooms, self.source.drawn, strict=True):
            yield room, jax.tree.map(place, shape)

    def draw(self, number: int, state: Any) -> Completions:
        """Rollout `number` of the policy that `state` holds. Raises ValueError where none of it has a score."""
        source, data = self.source, self.source.data
        done = self._completed(
            source.train.at(prompts.drawn(data, len(source.train), number)), state, data.group, number
        )
        if not adv.scorable(done.scores).any():
            found = done.faults.first or "none has all of its rewards"
            raise ValueError(f"no completion of rollout {number + 1} could be scored: {found}")
        if done.faults.first and not self.warned and processes.is_first():
            print(
                f"rollout {number + 1}: {done.faults.first}; it has no score, and more of this is only counted",
                flush=True,
            )
            self.warned = True
        self._keep(number * source.info.steps_per_rollout, done)
        return done

    def sampled(self, done: Completions, state: Any) -> Sampled:
        """A rollout as numbers of its tokens; log-probs are the sampler's where the trainer's aren't taken."""
        several = done.each.reshape(*done.lengths.shape, -1), self.source.rules.each_weight
        if not self.source.judged:
            return Sampled(
                done.scores, done.lengths, done.ended, done.drawn.astype(np.float64), None, None, {}, *several
            )
        numbers = self._run(self.judge, done, state)
        per_token: Any = lambda x: None if x is None else by_token(x, done.lengths, self.source.data.max_new)  # noqa: E731
        own = ("kl_coef",) if self.programs.objective.facts.kl_in_rewards else ()
        aux = jax.device_get({name: state.aux[name] for name in own})
        logps, reference, values = map(per_token, numbers)
        return Sampled(done.scores, done.lengths, done.ended, logps, reference, values, aux, *several)

    def _completed(self, asked: Asked, state: Any, group: int, number: int) -> Completions:
        """`group` completions each of up to data.batch prompts, scored."""
        rules, data, G = self.source.rules, self.source.data, len(asked)
        key = jax.random.fold_in(jax.random.key(data.seed + 2), number)
        padded = generate.left_pad(
            [*asked.ids, [0] * self.source.prompt_size], data.batch + 1
        )  # the last sets the width
        padded = jax.tree.map(lambda x: x[: data.batch], padded)
        padded = replace(padded, segments=np.where(np.arange(data.batch)[:, None] < G, padded.segments, 0))
        whole = tree.combine(state.trainable, self.frozen)
        out, drawn = (np.asarray(x)[: G * group] for x in self.sample[group](whole, padded, key))
        lengths = (out >= 0).sum(1)
        ended = np.isin(out[np.arange(len(out)), lengths - 1], self.stop).reshape(G, group)
        texts = [
            self.source.tokenizer.decode(row[:n].tolist(), skip_special_tokens=True)
            for row, n in zip(out, lengths)
        ]
        tokens, lengths = out.reshape(G, group, data.max_new), lengths.reshape(G, group)
        room = next(r for r in self.source.rooms if fits(asked, lengths, r))
        rows = laid(asked, tokens, lengths, room, (data.batch, data.group))
        done = Completions(asked, tokens, drawn, lengths, ended, texts, room, rows)
        each, faults = self._scores(done, state)
        several = each.reshape(G, group, each.shape[1])
        scores = rules.combine(several, rules.each_weight)
        if rules.shape is not None:
            scores = rules.shape(scores, lengths, ended)
        return replace(done, each=each, scores=scores, faults=faults)

    def _scores(self, done: Completions, state: Any) -> tuple[np.ndarray, rewards.Faults]:
        """The score of each completion by each reward, in order: functions on process 0, models on the mesh."""
        given, group = self.source.rules.rewards, done.lengths.shape[1]
        functions: list[Any] = [
            reward for reward in given if not isinstance(reward, ByScorer) and not hasattr(reward, "opened")
        ]
        of = [i // group for i in range(len(done.texts))]
        asked, rows = (
            [done.asked.prompts[i] for i in of],
            [(done.asked.names[i], done.asked.fields[i]) for i in of],
        )

        def score() -> list[Any]:
            found, faults = rewards.scored(functions, asked, done.texts, rows)
            return [found.tolist(), faults.counts, faults.first]

        found, counts, first = processes.by_first(score)
        columns = iter(np.array(found).reshape(len(of), len(functions)).T)
        faults, each = rewards.Faults(counts, first), []
        for reward in given:
            if isinstance(reward, ByScorer):
                each.append(self._run(self.score[reward], done, state)[:, :group].ravel())
            elif hasattr(reward, "opened"):
                each.append(
                    rewards.checked(
                        self.opened[reward](asked, done.texts), rewards.name_of(reward), rows, faults
                    )
                )
            else:
                each.append(next(columns))
        return np.stack(each, 1).astype(np.float64), faults

    def _run(self, programs: dict[Room, Any], done: Completions, state: Any) -> Any:
        """What a program gives for the rows of a rollout, [G, ...], in batches of the size that is learned from."""
        p, data = self.programs, self.source.data
        whole, rows = tree.combine(state.trainable, self.frozen), self.source.complete(done.rows)
        micro, each = self.source.drawn[0].ids.shape[:2]
        size, parts = data.batch // data.minibatches, []
        for start in range(0, data.batch, size):
            part = jax.tree.map(lambda x: x[start : start + size].reshape(micro, size // micro, -1), rows)  # noqa: B023
            part = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, each - x.shape[1]), (0, 0))), part)
            found = programs[done.room](whole, state.aux, sharding.place_batch(p.mesh, part))
            flat = lambda x: np.asarray(x)[:, : size // micro].reshape(size, -1)  # noqa: E731
            parts.append(jax.tree.map(flat, found))
        return jax.tree.map(lambda *x: np.concatenate(x)[: len(done.asked)], *parts)

    def _keep(self, step: int, done: Completions) -> None:
        """A table of completions beside the run's metrics."""
        if not processes.is_first():
            return
        names = rewards.names_of(self.source.rules.rewards)
        group = done.lengths.shape[1]
        with self.path.open("a", encoding="utf-8") as file:
            for i in shown(len(done.texts), group):
                scores = {
                    name: None if np.isnan(x) else float(x)
                    for name, x in zip(names, done.each[i], strict=True)
                }
                total = done.scores.ravel()[i]
                line = {
                    "step": step + 1,
                    "row": done.asked.names[i // group],
                    "prompt": done.asked.prompts[i // group],
                }
                line |= {
                    "completion": done.texts[i],
                    "rewards": scores,
                    "reward": None if np.isnan(total) else float(total),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def measure(self, state: Any) -> dict[str, float]:
        """Rewards of the held-out prompts, and how long the answers are."""
        source, parts = self.source, []
        for start in range(0, len(source.held), source.data.batch):
            some = source.held.at(range(start, min(start + source.data.batch, len(source.held))))
            parts.append(self._completed(some, state, source.data.eval_group, HELD_OUT - start))
        scores, each = np.concatenate([d.scores for d in parts]), np.concatenate([d.each for d in parts])
        lengths, ended = np.concatenate([d.lengths for d in parts]), np.concatenate([d.ended for d in parts])
        out = {
            "completions/mean_length": float(lengths.mean()),
            "completions/clipped_ratio": float((~ended).mean()),
        }
        out |= {name: x for name, x in adv.counts(scores).items() if name != "frac_reward_zero_std"}
        out |= {name: x for name, x in of_each(source.rules, each).items() if x is not None}
        for kind in parts[0].faults.counts:
            out[f"reward_faults/{kind}"] = sum(d.faults.counts[kind] for d in parts) / each.size
        if self.programs.objective.facts.reference != "none" and source.judged:
            numbers = [self.sampled(done, state) for done in parts]
            out["objective/kl"] = float(sum((n.logps - n.reference).sum() for n in numbers) / scores.size)
        return out


def shown(count: int, group: int) -> list[int]:
    """Which of a rollout's completions its table shows: the first two of each prompt, as far as there is room."""
    return [i for i in range(count) if i % group < EACH][:SHOWN]


def judged(objective: Objective, params: Any, aux: Any, batch: Rollout) -> Any:
    """(log-probs, the reference's, values) of [micro, rows, ...], a microbatch after the other."""
    return jax.lax.map(lambda rows: objective.score(params, rows, aux), batch)


def scored(model: Any, by: ByScorer, params: Any, aux: Any, batch: Rollout) -> Any:
    """What a scorer on the base says of each completion [micro, rows, A], read at its last token, or before that `by.unread`."""

    def one(rows: Rollout) -> Any:
        own = view(params, by.name)
        before = jnp.sum(rows.segments > 0, 1, dtype=jnp.int32) - jnp.sum(rows.lengths, 1, dtype=jnp.int32)
        last = jnp.maximum(before[:, None] + jnp.cumsum(rows.lengths, 1, dtype=jnp.int32) - 1, 0)
        if (
            by.unread is not None
        ):  # before a completion of that one token is its prompt, and not the completion beside it
            prior = jnp.where(
                rows.lengths == 1, jnp.maximum(before - 1, 0)[:, None], jnp.maximum(last - 1, 0)
            )
            last = jnp.where(jnp.take_along_axis(rows.ids, last, axis=1) == by.unread, prior, last)
        return model.scores(own, jnp.take_along_axis(model.hidden(own, rows), last[:, :, None], axis=1))

    return jax.lax.map(one, batch)


def means(told: Mapping[str, float | None], count: int) -> dict[str, Any]:
    """Means over `count` completions; None is a mean over nothing, which isn't logged."""

    def weigh(x):
        return (
            Sum(np.float64(0), np.float64(0)) if x is None else Sum(np.float64(x * count), np.float64(count))
        )  # noqa: E731

    return {name: weigh(x) for name, x in told.items()}


def of_each(rules: Rules, each: np.ndarray) -> dict[str, float | None]:
    """Mean and standard deviation (unbiased, as reward_std) of each reward [G, N, K] alone, None where too few are known."""
    out: dict[str, float | None] = {}
    for name, x in zip(rewards.names_of(rules.rewards), each.T, strict=True):
        known = x[~np.isnan(x)]
        out[f"rewards/{name}/mean"] = float(known.mean()) if len(known) else None
        out[f"rewards/{name}/std"] = float(known.std(ddof=1)) if len(known) > 1 else None
    return out


def told(rules: Rules, done: Completions, sampled: Sampled, kept: np.ndarray, judged: bool) -> dict[str, Any]:
    """A rollout's metrics, TRL's names, the same ones every time."""
    lengths, ended, count = done.lengths.ravel(), done.ended.ravel(), done.lengths.size
    out: dict[str, float | None] = {"reward": None, "reward_std": None, **adv.counts(done.scores)}
    if done.scores.shape[1] == 1:
        out.pop("frac_reward_zero_std")  # of groups
    out |= {
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": float((~ended).mean()),
    }
    out |= {"frac_learned": float(kept.mean())}
    out |= {f"reward_faults/{kind}": count / done.each.size for kind, count in done.faults.counts.items()}
    out["val/num_eos_tokens"] = float(ended.sum())
    of_ended = lengths[ended]
    for name in ("mean", "min", "max"):
        out[f"completions/{name}_terminated_length"] = (
            float(getattr(of_ended, name)()) if len(of_ended) else None
        )
    out |= of_each(rules, done.each)
    if sampled.reference is not None:
        out["objective/kl"] = float((sampled.logps - sampled.reference).sum() / count)
    metrics = means(out, count)
    if judged:
        away = np.abs(done.drawn - sampled.logps)[
            adv.inside(lengths, done.drawn.shape[1])
        ]  # two programs, one model
        metrics["sampling/sampling_logp_difference/mean"] = Sum(np.float64(away.sum()), np.float64(away.size))
        metrics["sampling/sampling_logp_difference/max"] = Max(np.float64(away.max()))
    metrics["completions/min_length"] = Min(np.float64(lengths.min()))
    metrics["completions/max_length"] = Max(np.float64(lengths.max()))
    return metrics
