"""Draws completions with a run's programs, has them scored, and measures what the held-out prompts get."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxft import advantages as adv
from jaxft import attention, distributed, generate, rewards, sharding, tree
from jaxft.batch import Rollout
from jaxft.completions import Completions, Learned, Rules, by_read, by_token, laid
from jaxft.data import prompts
from jaxft.data.prompts import Asked, Room
from jaxft.estimates import Sampled
from jaxft.metrics import Max, Min, Sum

if TYPE_CHECKING:
    from jaxft.rollout import Rollouts

SHOWN = 8  # completions of each rollout that are kept in completions.jsonl
HELD_OUT = 2**31 - 1  # the number of the draw that measures


class Player:
    """Every program that a rollout needs, compiled before the first step, and the frozen parameters."""

    def __init__(self, source: "Rollouts", programs: Any, frozen: Any, stop: tuple[int, ...], path: Path):
        self.source, self.programs, self.frozen, self.stop, self.path = source, programs, frozen, stop, path
        p, data = programs, source.data
        if p.objective.temperature != data.temperature:
            found = f"data.temperature={data.temperature} and the objective's is {p.objective.temperature}"
            raise ValueError(f"{found}; log-probs must be those that completions are drawn with, make them equal")
        whole = tree.combine(p.state.trainable, p.frozen)
        config = p.trained.model.config
        kernel = attention.choose(p.mesh, config.head_dim, p.trained.model.dtype)  # prompts are padded in front
        model = p.trained.model.with_attention(kernel)
        sampling = generate.Sampling(data.max_new, data.temperature, data.top_k, data.top_p)
        key, empty = jax.random.key(0), generate.left_pad([[0] * self.source.prompt_size], data.batch)
        sampler = lambda group: generate.make_sampler(model, sampling, stop, group)  # noqa: E731
        self.sample = {group: sampler(group).lower(whole, empty, key).compile() for group in {1, data.group}}
        judge = jax.jit(partial(_judged, p.objective), out_shardings=sharding.replicated(p.mesh))
        self.judge = {room: judge.lower(whole, p.state.aux, placed).compile() for room, placed in self._rooms()}

    def _rooms(self) -> Any:
        p = self.programs
        place = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding.batch_sharding(p.mesh, s.shape))  # noqa: E731
        for room, shape in zip(self.source.rooms, self.source.shapes, strict=True):
            yield room, jax.tree.map(place, shape)

    def draw(self, number: int, state: Any) -> Learned:
        """Rollout `number` of the policy that `state` holds."""
        source, rules, data = self.source, self.source.rules, self.source.data
        asked = source.train.at(prompts.drawn(data, len(source.train), number))
        done = self._completed(asked, state, data.group, number)
        if not adv.scorable(done.scores).any():
            raise ValueError(f"no completion of rollout {number + 1} could be scored: {done.faults.first}")
        room = next(r for r in source.rooms if done.lengths.sum(1).max() <= r.reads and self._fits(asked, done, r))
        rows = laid(asked, done.tokens, done.lengths, room)
        logps, reference, values = self._judged(rows, room, state)
        per_token = lambda x: None if x is None else by_token(x, done.lengths, data.max_new)  # noqa: E731
        aux = jax.device_get({name: x for name, x in state.aux.items() if name == "kl_coef"})
        sampled = Sampled(done.scores, done.lengths, done.ended, *map(per_token, (logps, reference, values)), aux)
        found = rules.estimate(sampled)
        known = adv.scorable(done.scores)
        kept = known & (done.ended | rules.cut_off) & (True if rules.keep is None else rules.keep(done.scores))
        spread = lambda x: None if x is None else by_read(x, done.lengths, room.reads)  # noqa: E731
        rows = replace(rows, logps=logps, reference=reference, values=values)
        rows = replace(rows, advantages=spread(found.advantages), returns=spread(found.returns))
        self._keep(number * source.boundary, done)
        return Learned(number, rows, done.lengths, kept, known, told(rules, done, sampled, kept) | _means(found.told, kept.size))

    def _fits(self, asked: Asked, done: Completions, room: Room) -> bool:
        return all(len(ids) + count <= room.length for ids, count in zip(asked.ids, done.lengths.sum(1), strict=True))

    def _completed(self, asked: Asked, state: Any, group: int, number: int) -> Completions:
        """Completions of up to data.batch prompts, scored."""
        source, data = self.source, self.source.data
        key = jax.random.fold_in(jax.random.key(data.seed + 2), number)
        padded = generate.left_pad([*asked.ids, [0] * source.prompt_size], data.batch + 1)
        padded = jax.tree.map(lambda x: x[: data.batch], padded)
        empty = np.arange(data.batch) >= len(asked)
        padded = replace(padded, segments=np.where(empty[:, None], 0, padded.segments))
        whole = tree.combine(state.trainable, self.frozen)
        out, drawn = (np.asarray(x)[: len(asked) * group] for x in self.sample[group](whole, padded, key))
        lengths = (out >= 0).sum(1)
        ended = np.isin(out[np.arange(len(out)), lengths - 1], self.stop)
        texts = [self.source.tokenizer.decode(row[:n].tolist(), skip_special_tokens=True) for row, n in zip(out, lengths)]
        of = [i // group for i in range(len(out))]
        prompt, rows = [asked.prompts[i] for i in of], [(asked.names[i], asked.fields[i]) for i in of]
        score = lambda: rewards.scored(source.rules.rewards, prompt, texts, rows)  # noqa: E731
        each, counts, first = distributed.by_first(lambda: (lambda e, f: [e.tolist(), f.counts, f.first])(*score()))
        each, shape = np.array(each), (len(asked), group)
        several = each.reshape(*shape, each.shape[1])
        weights = source.rules.weights or (1.0,) * each.shape[1]
        scores = source.rules.combine(several, weights)
        lengths, ended = lengths.reshape(shape), ended.reshape(shape)
        if source.rules.shape is not None:
            scores = source.rules.shape(scores, lengths, ended)
        faults = rewards.Faults(counts, first)
        return Completions(asked, out.reshape(*shape, -1), drawn, lengths, ended, texts, each, scores, faults)

    def _judged(self, rows: Rollout, room: Room, state: Any) -> Any:
        """(logps, reference, values) of all rows, in batches of the size that is learned from."""
        p, data = self.programs, self.source.data
        whole, rows = tree.combine(state.trainable, self.frozen), p.objective.complete(rows)
        micro, each = self.source.abstract.ids.shape[:2]
        size, parts = data.batch // data.minibatches, []
        for start in range(0, len(rows.ids), size):
            part = jax.tree.map(lambda x: x[start : start + size].reshape(micro, size // micro, -1), rows)  # noqa: B023
            part = jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, each - x.shape[1]), (0, 0))), part)
            found = self.judge[room](whole, state.aux, sharding.place_batch(p.mesh, part))
            flat = lambda x: np.asarray(x)[:, : size // micro].reshape(size, -1)  # noqa: E731
            parts.append(jax.tree.map(flat, found))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def _keep(self, step: int, done: Completions) -> None:
        """A table of completions beside the run's metrics."""
        if not distributed.is_first():
            return
        names = [rewards.name_of(r) for r in self.source.rules.rewards]
        group = done.lengths.shape[1]
        with self.path.open("a", encoding="utf-8") as file:
            for i in range(min(SHOWN, len(done.texts))):
                scores = {name: None if np.isnan(x) else float(x) for name, x in zip(names, done.each[i], strict=True)}
                total = done.scores.ravel()[i]
                line = {"step": step + 1, "row": done.asked.names[i // group], "prompt": done.asked.prompts[i // group]}
                line |= {"completion": done.texts[i], "rewards": scores, "reward": None if np.isnan(total) else float(total)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def measure(self, state: Any) -> dict[str, float]:
        """Rewards of the held-out prompts, and how long the answers are."""
        source, parts = self.source, []
        for start in range(0, len(source.held), source.data.batch):
            some = source.held.at(range(start, min(start + source.data.batch, len(source.held))))
            parts.append(self._completed(some, state, 1, HELD_OUT - start))
        scores, each = np.concatenate([d.scores for d in parts]), np.concatenate([d.each for d in parts])
        lengths, ended = np.concatenate([d.lengths for d in parts]), np.concatenate([d.ended for d in parts])
        out = {"completions/mean_length": float(lengths.mean()), "completions/clipped_ratio": float((~ended).mean())}
        out |= {name: x for name, x in adv.counts(scores).items() if name != "frac_reward_zero_std"}
        for name, x in zip(map(rewards.name_of, source.rules.rewards), each.T, strict=True):
            if not np.isnan(x).all():
                out[f"rewards/{name}/mean"] = float(np.nanmean(x))
        return out


def _judged(objective: Any, params: Any, aux: Any, batch: Rollout) -> Any:
    """(log-probs, the reference's, values) of [micro, rows, ...], a microbatch after the other."""

    def one(rows: Rollout) -> Any:
        reference = objective.reference_logps(params, rows, aux) if objective.reference else None
        values = objective.values(params, rows) if objective.values is not None else None
        return objective.logps(params, rows).logp, reference, values

    return jax.lax.map(one, batch)


def _means(told: dict[str, float | None], count: int) -> dict[str, Any]:
    """Means over `count` completions; None is a mean over nothing, which isn't logged."""
    weigh = lambda x: Sum(np.float64(0), np.float64(0)) if x is None else Sum(np.float64(x * count), np.float64(count))  # noqa: E731
    return {name: weigh(x) for name, x in told.items()}


def told(rules: Rules, done: Completions, sampled: Sampled, kept: np.ndarray) -> dict[str, Any]:
    """A rollout's metrics, TRL's names, the same ones every time."""
    lengths, ended, count = done.lengths.ravel(), done.ended.ravel(), done.lengths.size
    out: dict[str, float | None] = {"reward": None, "reward_std": None, **adv.counts(done.scores)}
    out |= {"completions/mean_length": float(lengths.mean()), "completions/clipped_ratio": float((~ended).mean())}
    out |= {"frac_learned": float(kept.mean())}
    out |= {f"reward_faults/{kind}": count / done.each.size for kind, count in done.faults.counts.items()}
    out["completions/mean_terminated_length"] = float(lengths[ended].mean()) if ended.any() else None
    for name, x in zip(map(rewards.name_of, rules.rewards), done.each.T, strict=True):
        none = bool(np.isnan(x).all())
        out |= {f"rewards/{name}/mean": None if none else float(np.nanmean(x))}
        out |= {f"rewards/{name}/std": None if none else float(np.nanstd(x))}
    if sampled.reference is not None:
        out["objective/kl"] = float((sampled.logps - sampled.reference).sum() / count)
    metrics = _means(out, count)
    away = np.abs(done.drawn - sampled.logps)[adv.inside(lengths, done.drawn.shape[1])]  # two programs, one model
    metrics["sampling/sampling_logp_difference/mean"] = Sum(np.float64(away.sum()), np.float64(away.size))
    metrics["sampling/sampling_logp_difference/max"] = Max(np.float64(away.max()))
    metrics["completions/min_length"] = Min(np.float64(lengths.min()))
    metrics["completions/max_length"] = Max(np.float64(lengths.max()))
    return metrics
