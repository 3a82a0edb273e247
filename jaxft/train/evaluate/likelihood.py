"""Likelihood of rows under a model: loss and perplexity, the preferred response of a pair, and the
probabilities of the choices of a decision.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.batch import Decisions, Pairs
from jaxft.data.decision_rows import DecisionRows, choice_names
from jaxft.data.packing.tokenised import PROBABILITIES
from jaxft.data.pairs import PairRows
from jaxft.data.rows.invalid import invalid_lines
from jaxft.data.sft import Rows
from jaxft.data.source import open_for
from jaxft.distributed import sharding
from jaxft.models.model import Model
from jaxft.objectives.decision import ACCURACY, decision
from jaxft.objectives.metrics import LOSS, TOKEN_ACCURACY, PerRow, add, as_floats, row_values
from jaxft.objectives.pair import TIE_ROUNDING, response_sums
from jaxft.objectives.read_positions import read_logps
from jaxft.objectives.sft import sft
from jaxft.runs.loaded_weights import FingerprintCheck, LoadedWeights, any_rows
from jaxft.train.evaluate.evaluate import evaluate, make_eval_step
from jaxft.tree import Metrics, Params
from jaxft.weights.pretrained import check_token_id

PERPLEXITY = "perplexity"


class PairScore(NamedTuple):
    """Log-probabilities of the responses of a pair, in nats, and their tokens.

    base: log-probabilities of chosen and rejected by the base without the adapter; None for a model alone.
    """

    row: str
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    base: tuple[float, float] | None = None


class Evaluated(NamedTuple):
    """Metrics by name, results of single rows as JSON objects, lines for the user, and a value per row of
    metrics that are means over rows: of an accuracy 1, 0, or 1/2 for a tie; NaN for no value.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    notes: list[str]
    values: Mapping[str, Sequence[float]] = {}


def make_row_loss(
    model: Model, check: FingerprintCheck = any_rows
) -> Callable[[LoadedWeights, Rows], Evaluated]:
    """Return `row_loss(loaded, rows)`, whose program is compiled once for all weights of a model. check: is
    called with the fingerprint of the rows.
    """
    eval_step = jax.jit(make_eval_step(sft(model)))
    return lambda loaded, rows: _row_loss(eval_step, loaded, rows, check)


def _row_loss(
    eval_step: Callable[..., Any], loaded: LoadedWeights, rows: Rows, check: FingerprintCheck
) -> Evaluated:
    """Return loss (mean over the tokens with a loss, in nats), perplexity and token accuracy of all rows.

    rows: settings whose held-out rows are evaluated. Raises ValueError for a loss that is not finite.
    """
    mesh = loaded.mesh
    source = rows.open(loaded.tokenizer, sharding.row_shards(mesh))
    check(source.info.fingerprint)
    stats = source.info.stats
    check_token_id(str(rows.train), stats.largest_id, loaded.model.config.vocab)
    evaluated = evaluate(
        lambda batch: eval_step(loaded.params, loaded.params, sharding.shard_batch(mesh, batch), {}),
        source.held_out,
    )
    loss = evaluated.get(LOSS, math.nan)
    if not math.isfinite(loss):
        raise ValueError(
            f"{rows.train}: the loss is {loss}; use --dtype float32, or check the weights of the model"
        )
    metrics = {
        "examples": stats.held_out,
        "tokens": sum(int((batch.token_weights > 0).sum()) for batch in source.held_out),
        LOSS: loss,
        PERPLEXITY: math.exp(loss) if loss < 700 else math.inf,
        TOKEN_ACCURACY: evaluated[TOKEN_ACCURACY],
    }
    truncated = source.split.rows.truncated[source.split.held].sum()
    notes = [*invalid_lines(stats.invalid)]
    if truncated:
        notes.append(f"{truncated} examples are truncated to --max-length {rows.max_length}")
    return Evaluated(metrics, [], notes)


def make_pair_preferences(
    model: Model, check: FingerprintCheck = any_rows
) -> Callable[[LoadedWeights, PairRows], Evaluated]:
    """Return `preferences(loaded, rows)`, whose programs are compiled once for all weights of a model. check:
    is called with the fingerprint of the rows.
    """

    def forward(params: Params, batch: Pairs) -> dict[str, Any]:
        rows = jax.tree.map(lambda x: x[0], batch)
        h, _ = model.hidden(params, rows)
        logps = read_logps(model, params, h, (rows.read, rows.targets)).logp
        return response_sums(logps, rows.responses, rows.kinds, rows.pair_weights.shape[1])

    compiled = jax.jit(forward)
    return lambda loaded, rows: _pair_preferences(compiled, loaded, rows, check)


def _pair_preferences(
    forward: Callable[..., Any], loaded: LoadedWeights, rows: PairRows, check: FingerprintCheck
) -> Evaluated:
    """Return which response of each pair the model finds more likely, and the fractions of pairs: of the
    held-out pairs, or of all if there are none.

    accuracy: log p(chosen) > log p(rejected); in all of them a tie counts 1/2, and one of ties alone is left
    out. accuracy_per_token: the same for the mean over the response's
    tokens. With an adapter also accuracy_against_base: the adapter raises log p of the chosen response above
    the base's by more than of the rejected one, which is DPO's reward accuracy.
    """
    source = open_for(loaded.model.attention, rows, loaded.tokenizer, sharding.row_shards(loaded.mesh))
    check(source.info.fingerprint)
    indices = source.split.held if rows.holds_out else range(len(source.keys))
    check_token_id(str(rows.train), source.info.stats.largest_id, loaded.model.config.vocab)
    names, batches = source.split.rows.names, source.cover(indices)
    own, base = _response_logps(forward, loaded, loaded.params, batches), None
    if "adapter" in loaded.params:
        base = _response_logps(forward, loaded, {"base": loaded.params["base"]}, batches)
    scores = []
    for number, (logps, lengths) in sorted(own.items()):
        if not all(map(math.isfinite, logps)):
            raise ValueError(
                f"{names[number]}: the log-probabilities of its responses are {logps}; use --dtype float32, "
                "or check the weights of the model"
            )
        scores.append(PairScore(names[number], *logps, *lengths, base[number][0] if base else None))
    rows_of_file = [score._asdict() for score in scores]
    notes = list(invalid_lines(source.info.stats.invalid))
    return Evaluated(preference_metrics(scores), rows_of_file, notes, pair_wins(scores))


def _response_logps(
    forward: Callable[..., Any], loaded: LoadedWeights, params: Params, batches: Sequence[Pairs]
) -> dict[int, tuple[tuple[float, float], tuple[int, int]]]:
    """Return the log-probabilities of chosen and rejected, and their tokens, by the index of the pair."""
    by_pair = {}
    for batch in batches:
        sums = jax.device_get(forward(params, sharding.shard_batch(loaded.mesh, batch)))
        for at, pair in np.ndenumerate(batch.index[0]):
            if pair >= 0:
                chosen_tokens, rejected_tokens = map(int, batch.lengths[0][at][:2])
                logps = float(sums["chosen"][at]), float(sums["rejected"][at])
                by_pair[int(pair)] = logps, (chosen_tokens, rejected_tokens)
    return by_pair


def make_decision_scores(
    model: Model, check: FingerprintCheck = any_rows
) -> Callable[[LoadedWeights, DecisionRows], Evaluated]:
    """Return `scores(loaded, rows)`, whose program is compiled once for all weights of a model. check: is
    called with the fingerprint of the rows.
    """
    objective = decision(model).for_evaluation()

    def forward(params: Params, batch: Decisions) -> tuple[Metrics, jax.Array]:
        outputs = objective.forward(params, jax.tree.map(lambda x: x[0], batch), None, {})
        return objective.loss(outputs, {})[1], jnp.exp(outputs.log_p)

    compiled = jax.jit(forward)
    return lambda loaded, rows: _decision_scores(compiled, loaded, rows, check)


def _decision_scores(
    forward: Callable[..., Any], loaded: LoadedWeights, rows: DecisionRows, check: FingerprintCheck
) -> Evaluated:
    """Return the probabilities of the choices of each held-out row, and the metrics of objectives.decision
    over them, where the loss is the log loss.
    """
    source: Any = rows.open(loaded.tokenizer, sharding.row_shards(loaded.mesh))
    check(source.info.fingerprint)
    stats = source.info.stats
    check_token_id(str(rows.train), stats.largest_id, loaded.model.config.vocab)
    tokenised, parts = source.split.rows, list[Metrics]()
    results = dict[int, tuple[float, dict[str, Any]]]()  # accuracy and line of each row
    for number, batch in enumerate(source.held_out):
        metrics, p = jax.device_get(forward(loaded.params, sharding.shard_batch(loaded.mesh, batch)))
        parts.append({name: m for name, m in metrics.items() if not isinstance(m, PerRow)})
        for at, own in row_values(metrics).items():
            if not math.isfinite(own[LOSS]):
                raise ValueError(
                    f"{rows.train}: the log loss is {own[LOSS]}; use --dtype float32, or check the "
                    "weights of the model"
                )
            example = source.layout.example_at(batch, number, at)
            choices, labels = choice_names(tokenised, example), tokenised.extras[PROBABILITIES][example]
            predicted = p.reshape(-1, p.shape[-1])[at, : len(choices)]
            line = {
                "row": tokenised.names[example],
                "probabilities": _by_choice(choices, predicted),
                **({"answer": _by_choice(choices, labels)} if any(labels) else {}),
            }
            results[example] = own[ACCURACY] if any(labels) else math.nan, line
    in_order = [results[example] for example in sorted(results)]
    accuracies, lines = [accuracy for accuracy, _ in in_order], [line for _, line in in_order]
    notes, without = [*invalid_lines(stats.invalid)], sum(map(math.isnan, accuracies))
    if without:
        notes.append(f"{without} of {len(lines)} rows have no answer; no metric counts them")
    if without == len(lines):
        return Evaluated({"examples": len(lines)}, lines, notes)
    whole = {name: x for name, x in as_floats(reduce(add, parts)).items() if not name.startswith(LOSS)}
    return Evaluated({"examples": len(lines), **whole}, lines, notes, {ACCURACY: accuracies})


def _by_choice(choices: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Return float32 values by choice, as the shortest decimals that are these values: 0.7."""
    return {choice: float(str(value)) for choice, value in zip(choices, np.float32(values), strict=True)}


def preference_metrics(scores: Sequence[PairScore]) -> dict[str, float]:
    """Return the means over pairs; see pair_preferences.

    Of rows with a single labelled response there are also counts and means per token, of chosen and of
    rejected ones.
    """
    pairs = _pairs(scores)
    metrics: dict[str, float] = {"pairs": len(pairs)}
    metrics |= {name: float(np.mean(values)) for name, values in pair_wins(scores).items()}
    for kind in ("chosen", "rejected"):
        totals = [(getattr(x, kind), getattr(x, f"{kind}_tokens")) for x in scores]
        logps, tokens = np.array([x for x in totals if x[1]]).reshape(-1, 2).T
        if len(logps):
            metrics[f"logps/{kind}"] = float(logps.mean())
        if len(logps) and len(pairs) < len(scores):
            metrics[f"logps_per_token/{kind}"] = float((logps / tokens).mean())
            metrics[f"responses/{kind}"] = len(logps)
    return metrics


def _pairs(scores: Sequence[PairScore]) -> list[PairScore]:
    return [x for x in scores if x.chosen_tokens and x.rejected_tokens]


def pair_wins(scores: Sequence[PairScore]) -> dict[str, list[float]]:
    """Return, by accuracy, 1 for each pair that is won, 0 for a lost one and 1/2 for a tie. An accuracy of
    ties alone is left out.
    """
    pairs = _pairs(scores)
    margins = {
        "accuracy": [x.chosen - x.rejected for x in pairs],
        "accuracy_per_token": [x.chosen / x.chosen_tokens - x.rejected / x.rejected_tokens for x in pairs],
        "accuracy_against_base": [
            _gain(x.chosen, x.base[0]) - _gain(x.rejected, x.base[1]) for x in pairs if x.base is not None
        ],
    }
    return {name: ((np.sign(x) + 1) / 2).tolist() for name, x in margins.items() if any(x)}


def _gain(logp: float, base: float) -> float:
    """Return the difference of a log-prob to the base's; 0 for a difference of rounding."""
    return logp - base if abs(logp - base) > TIE_ROUNDING * abs(base) else 0.0
