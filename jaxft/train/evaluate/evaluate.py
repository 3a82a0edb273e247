"""Evaluation of an objective on held-out rows and on general text, with the same metrics for any batch size;
and of a model on rows: loss and perplexity, the preferred response of a pair, the probabilities of choices of
a decision.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.batch import Decisions, Pairs
from jaxft.data.data_settings import DataSettings
from jaxft.data.decision_rows import DecisionRows, choice_names
from jaxft.data.packing.tokenised import PROBABILITIES
from jaxft.data.pairs import PairRows
from jaxft.data.rows.invalid_rows import invalid_lines
from jaxft.data.sft import Rows
from jaxft.data.source import Source, open_for
from jaxft.distributed import processes, sharding
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.tree import Aux, Batch, Metrics, Params
from jaxft.objectives import metrics as metric
from jaxft.objectives.decision import ACCURACY as DECISION_ACCURACY
from jaxft.objectives.decision import BRIER, ECE, decision
from jaxft.objectives.metrics import HELD_OUT, LOSS, TOKEN_ACCURACY, PerRow, add, as_floats, row_values
from jaxft.objectives.objective import Objective, Outputs
from jaxft.objectives.pair import ACCURACY, CHOSEN_LOGP, CHOSEN_REWARD, MARGIN, TIE_ROUNDING, response_sums
from jaxft.objectives.read_positions import read_logps
from jaxft.objectives.reward_model import ACCURACY as REWARD_ACCURACY
from jaxft.objectives.reward_model import MARGIN as REWARD_MARGIN
from jaxft.objectives.sft import sft
from jaxft.runs.loaded_weights import FingerprintCheck, LoadedWeights, any_rows
from jaxft.runs.metrics_log import REWARD, SCORES
from jaxft.train.settings import Loop, Run, steps_between
from jaxft.weights.pretrained import check_token_id

PERPLEXITY = "perplexity"
LOWER_IS_BETTER = ("loss", "kl", BRIER, ECE)  # ends of names
GREATER_IS_BETTER = frozenset(
    {
        ACCURACY, MARGIN, CHOSEN_REWARD, CHOSEN_LOGP, REWARD, REWARD_ACCURACY, REWARD_MARGIN, TOKEN_ACCURACY,
    }
)  # fmt: skip


def make_eval_step(objective: Objective) -> Callable[[Params, Params, Batch, Aux], Any]:
    """Return `(trainable, frozen, batch, aux) -> metrics` of a batch [1, rows, ...], without dropout.

    For an objective that couples rows it returns the outputs of the batch; the loss is computed once from the
    outputs of all batches.
    """
    objective = objective.for_evaluation()

    def step(trainable: Params, frozen: Params, batch: Batch, aux: Aux) -> Any:
        rows, params = jax.tree.map(lambda x: x[0], batch), tree.combine(trainable, frozen)
        if objective.facts.coupled:
            return objective.forward(params, rows, None, aux)
        return objective(params, rows, None, aux)[1]

    return step


def evaluate(step: Callable[[Batch], Metrics], batches: Iterable[Batch]) -> dict[str, float]:
    """Return {metric: mean over all batches}, and for each accuracy the number of pairs that it counts.
    `step` returns sums, which are added on the host and divided once by their total weights.
    """
    return held_out_floats(sum_metrics(step, batches))


def held_out_floats(metrics: Metrics) -> dict[str, float]:
    """Divide summed metrics by their weights; add the number of pairs of each accuracy."""
    return {**metric.as_floats(metrics), **metric.pair_counts(metrics)}


def sum_metrics(
    step: Callable[[Batch], Metrics], batches: Iterable[Batch], with_rows: bool = False
) -> Metrics:
    """Return the metrics summed over all batches, on the host, not yet divided by their weights.

    with_rows: add the metrics of single rows.
    """
    total: Metrics | None = None
    rows: list[Metrics] = []  # joined once: joining them batch by batch is quadratic in their number
    for batch in batches:
        metrics = step(batch)
        sums = jax.device_get({name: m for name, m in metrics.items() if not isinstance(m, PerRow)})
        total = sums if total is None else metric.add(total, sums)
        if with_rows:
            rows.append(jax.device_get({name: m for name, m in metrics.items() if isinstance(m, PerRow)}))
    return {**(total or {}), **(metric.join_rows(rows) if rows else {})}


def coupled_metrics(
    forward: Callable[[Batch], Outputs], loss_metrics: Callable[[Outputs], Metrics], batches: Iterable[Batch]
) -> Metrics:
    """Return the metrics of an objective that couples rows: `loss_metrics` of the outputs of all batches."""
    outputs = [jax.device_get(forward(batch)) for batch in batches]
    return jax.device_get(loss_metrics(jax.tree.map(lambda *x: np.concatenate(x), *outputs)))


def general_rows(data: DataSettings, general: str) -> Rows:
    """Return data settings whose held-out rows are the text in the file `general`. Lengths and batches are as
    in `data`, the run's.
    """
    return Rows(
        general, held_out=general, format="text", loss_on="all", too_long="truncate",
        max_length=data.max_length, batch=data.batch, micro=data.micro, packing=bool(data.packing),
    )  # fmt: skip


class EvaluationLimit(NamedTuple):
    """The most that an evaluation reads, None for all. rows: number of held-out batches, or of prompts if the
    run samples. texts: number of batches of general text.
    """

    rows: int | None = None
    texts: int | None = None


def evaluation_limit(run: Run, source: Source[Any], text: Source[Any] | None, steps: int) -> EvaluationLimit:
    """Return how much an evaluation reads so that all evaluations together compute at most loop.eval_fraction
    of training's compute. If there are both held-out rows and general text, each gets half.

    source: of the run's rows. text: of the general text, None without one. steps: the run's number of
    optimizer steps. There is an evaluation before and after training, and one every loop.eval_every steps.
    Nothing is limited unless held-out rows are a fraction of the rows; at least one batch is always read.
    """
    fraction, info = run.loop.eval_fraction, source.info
    if fraction is None or not isinstance(run.data.held_out, float) or not info.stats.held_out:
        return EvaluationLimit()
    every = run.loop.eval_every
    times = 2 + (0 if every is None else (steps - 1) // steps_between(every, steps))
    share = (fraction / 2 if text else fraction) * steps / times  # of one evaluation, in training steps

    def most(total: int, cost: float) -> int | None:
        number = max(1, int(share / cost + 1e-9))
        return None if number >= total else number

    def most_batches(source: Source[Any]) -> int | None:
        batches = source.held_out
        return most(len(batches), source.info.eval_cost * batches[0].ids.size / trained)

    trained = math.prod(source.shapes[-1].ids.shape)
    if info.samples:
        rows = most(info.stats.held_out, info.eval_cost / run.data.units_per_step)
    else:
        rows = most_batches(source)
    return EvaluationLimit(rows, most_batches(text) if text else None)


def selection_score(metrics: dict[str, float], loop: Loop) -> float | None:
    """Return the score that selects the best checkpoint, the lower the better: loop.best_metric, or minus it
    if greater is better.

    None if `metrics` lacks that metric. Raises AgreedError if neither loop.greater_is_better nor the name
    says which value is better.
    """
    default = LOSS if HELD_OUT + LOSS in metrics else REWARD
    name = loop.best_metric or HELD_OUT + default
    if name not in metrics:
        return None
    greater = is_greater_better(name) if loop.greater_is_better is None else loop.greater_is_better
    if greater is None:
        raise processes.AgreedError(
            f"loop.best_metric={name}: its name does not tell whether a greater or a lower value is better; "
            "set loop.greater_is_better=true or false"
        )
    return -metrics[name] if greater else metrics[name]


def is_greater_better(name: str) -> bool | None:
    """Return whether a greater value of a held-out metric is better, by its name; None if the name does not
    imply it.
    """
    metric = name.removeprefix(HELD_OUT)
    if metric.endswith(LOWER_IS_BETTER):
        return False
    by_function = metric.startswith(SCORES) or (metric.startswith("rewards/") and metric.endswith("/mean"))
    return True if by_function or metric in GREATER_IS_BETTER else None


def is_stalled(scores: Sequence[float | None], patience: int) -> bool:
    """Return whether none of the last `patience` scores is better (lower) than every earlier score; False
    if there are no earlier scores. None in `scores` is an evaluation without a score.
    """
    known = [math.inf if score is None else score for score in scores]
    return len(known) > patience and min(known[-patience:]) >= min(known[:-patience])


class PairScore(NamedTuple):
    """The log-probability of each response of a pair, in nats, and its number of tokens.

    row: the pair's name, for errors and results. base: log-probabilities of chosen and rejected by the base
    without the adapter; None for a model without one.
    """

    row: str
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    base: tuple[float, float] | None = None


class Evaluated(NamedTuple):
    """The result of an evaluation.

    metrics: by name. rows: results of single rows as JSON objects. notes: lines for the user. values: the
    values of single pairs, decisions or prompts, by the name of the metric that is their mean. NaN: no value.
    A value of an accuracy is 1, 0, or 1/2 for a tie.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    notes: list[str]
    values: Mapping[str, Sequence[float]] = {}


def make_row_loss(
    model: Model, check: FingerprintCheck = any_rows
) -> Callable[[LoadedWeights, Rows], Evaluated]:
    """Return `row_loss(loaded, rows)`, which returns loss (mean over the tokens with a loss, in nats),
    perplexity and token accuracy of all held-out rows of the settings `rows`.

    Its program is compiled once for all weights of a model. check: called with a hash of the rows; it may
    raise if they are not the expected rows. row_loss raises ValueError for a loss that is not finite.
    """
    eval_step = jax.jit(make_eval_step(sft(model)))

    def row_loss(loaded: LoadedWeights, rows: Rows) -> Evaluated:
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

    return row_loss


def make_pair_preferences(
    model: Model, check: FingerprintCheck = any_rows
) -> Callable[[LoadedWeights, PairRows], Evaluated]:
    """Return `preferences(loaded, rows)`, which returns the log-probabilities of each pair's responses, and
    the fraction of the pairs whose chosen response is preferred. Held-out pairs are evaluated, or all pairs
    if none are held out.

    accuracy: log p(chosen) > log p(rejected). accuracy_per_token: the same for the means over the responses'
    tokens. accuracy_against_base, with an adapter: the adapter raises log p(chosen) by more than
    log p(rejected) over the base, which is DPO's reward accuracy. A tie counts 1/2; an accuracy is left out
    if all pairs are ties. Compiled programs, check: as in make_row_loss.
    """

    @jax.jit
    def forward(params: Params, batch: Pairs) -> dict[str, Any]:
        rows = jax.tree.map(lambda x: x[0], batch)
        h, _ = model.hidden(params, rows)
        logps = read_logps(model, params, h, (rows.read, rows.targets)).logp
        return response_sums(logps, rows.responses, rows.kinds, rows.pair_weights.shape[1])

    def preferences(loaded: LoadedWeights, rows: PairRows) -> Evaluated:
        source = open_for(loaded.model.attention, rows, loaded.tokenizer, sharding.row_shards(loaded.mesh))
        check(source.info.fingerprint)
        indices = source.split.held if rows.holds_out else range(len(source.keys))
        check_token_id(str(rows.train), source.info.stats.largest_id, loaded.model.config.vocab)
        names, batches = source.split.rows.names, source.cover(indices)
        by_row, base = _response_logps(forward, loaded, loaded.params, batches), None
        if "adapter" in loaded.params:
            base = _response_logps(forward, loaded, {"base": loaded.params["base"]}, batches)
        scores = []
        for number, (logps, lengths) in sorted(by_row.items()):
            if not all(map(math.isfinite, logps)):
                raise ValueError(
                    f"{names[number]}: the log-probabilities of its responses are {logps}; use --dtype "
                    "float32, or check the weights of the model"
                )
            scores.append(PairScore(names[number], *logps, *lengths, base[number][0] if base else None))
        rows_of_file = [score._asdict() for score in scores]
        notes = list(invalid_lines(source.info.stats.invalid))
        return Evaluated(preference_metrics(scores), rows_of_file, notes, pair_wins(scores))

    return preferences


def _response_logps(
    forward: Callable[..., Any], loaded: LoadedWeights, params: Params, batches: Sequence[Pairs]
) -> dict[int, tuple[tuple[float, float], tuple[int, int]]]:
    """Return {index of the pair: (log-probs of chosen and rejected, their numbers of tokens)}."""
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
    """Return `scores(loaded, rows)`, which returns the probabilities of the choices of each held-out row, and
    the metrics of objectives.decision, which are computed only over rows with an answer.

    Compiled programs, check: as in make_row_loss.
    """
    objective = decision(model).for_evaluation()

    @jax.jit
    def forward(params: Params, batch: Decisions) -> tuple[Metrics, jax.Array]:
        outputs = objective.forward(params, jax.tree.map(lambda x: x[0], batch), None, {})
        return objective.loss(outputs, {})[1], jnp.exp(outputs.log_p)

    def scores(loaded: LoadedWeights, rows: DecisionRows) -> Evaluated:
        source: Any = rows.open(loaded.tokenizer, sharding.row_shards(loaded.mesh))
        check(source.info.fingerprint)
        stats = source.info.stats
        check_token_id(str(rows.train), stats.largest_id, loaded.model.config.vocab)
        tokenised, parts = source.split.rows, list[Metrics]()
        results = dict[int, tuple[float, dict[str, Any]]]()  # accuracy and line of each row
        for number, batch in enumerate(source.held_out):
            metrics, p = jax.device_get(forward(loaded.params, sharding.shard_batch(loaded.mesh, batch)))
            parts.append({name: m for name, m in metrics.items() if not isinstance(m, PerRow)})
            for at, of_row in row_values(metrics).items():
                if not math.isfinite(of_row[LOSS]):
                    raise ValueError(
                        f"{rows.train}: the log loss is {of_row[LOSS]}; use --dtype float32, or check the "
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
                results[example] = of_row[DECISION_ACCURACY] if any(labels) else math.nan, line
        in_order = [results[example] for example in sorted(results)]
        accuracies, lines = [accuracy for accuracy, _ in in_order], [line for _, line in in_order]
        notes, without = [*invalid_lines(stats.invalid)], sum(map(math.isnan, accuracies))
        if without:
            notes.append(f"{without} of {len(lines)} rows have no answer; no metric counts them")
        if without == len(lines):
            return Evaluated({"examples": len(lines)}, lines, notes)
        whole = {name: x for name, x in as_floats(reduce(add, parts)).items() if not name.startswith(LOSS)}
        return Evaluated({"examples": len(lines), **whole}, lines, notes, {DECISION_ACCURACY: accuracies})

    return scores


def _by_choice(choices: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Return {choice: value}, with the shortest decimal that is the float32 value: 0.7, not 0.699999988."""
    return {
        choice: float(str(value))
        for choice, value in zip(choices, np.asarray(values, np.float32), strict=True)
    }


def preference_metrics(scores: Sequence[PairScore]) -> dict[str, float]:
    """Return metrics by name: the number of pairs, the accuracies of make_pair_preferences, and the mean
    log-probabilities of chosen and of rejected responses.

    If some rows have a single labelled response, there are also counts and means per token of both kinds.
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
    """Return {accuracy of make_pair_preferences: [result of each pair]}: 1 if the chosen response is
    preferred, 0 if not, 1/2 for a tie. An accuracy is left out if all pairs are ties.
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
    """Return logp - base, or 0 if the difference may be a rounding error."""
    return logp - base if abs(logp - base) > TIE_ROUNDING * abs(base) else 0.0
