"""Alarms (warnings that training goes wrong) and summaries of a run, computed from its logged metrics alone.

An alarm function is called once for each entry of metrics.jsonl, in order. It returns a `memory`, a dict for
JSON, that it gets back with the next entry ({} with the first one), so that a run that was killed and resumed
raises the same alarms. In the functions of this file, entry: {metric: value}, where None stands for a value
that was not finite. n: the finite metrics of an entry. last: whether a finished run has no later entry.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from jaxft.objectives.intervals import fraction_text, wilson
from jaxft.objectives.metrics import (
    GRAD_NORM,
    HELD_OUT,
    KL,
    LOSS,
    LOSS_SPIKES,
    PAIR_COUNT,
    SKIPPED,
    FloatMetrics,
)
from jaxft.objectives.pair import (
    ACCURACY,
    ACCURACY_BY_LENGTH,
    CHOSEN_LOGP,
    CHOSEN_REWARD,
    LABEL_NOISE,
    LONGER_WINS,
    LOSS_AT_REFERENCE,
    MARGIN,
    MARGIN_LENGTH_CORRELATION,
)

Memory: TypeAlias = dict[str, Any]
Entry: TypeAlias = dict[str, Any]  # of metrics.jsonl; null stands for a value that was not finite


class Alarms(NamedTuple):
    """The result of an alarm function for a log entry: memory, for the call with the next entry; messages,
    lines to log that report nothing bad; alarms, lines to log as warnings.
    """

    memory: Memory
    messages: list[str]
    alarms: list[str]


AlarmCheck: TypeAlias = Callable[[Memory, FloatMetrics, bool], Alarms]

WINDOW_STEPS = 5  # logged steps whose mean is one point of a curve
FALLS = 3  # consecutive points, each below the one before
# A fall in log-prob that matters: this many nats per response, and this fraction of its log-prob at step 0.
FALL_NATS, FALL_FRACTION = 2.0, 0.03
STANDARD_ERRORS = 5  # by which a fall exceeds the noise of small batches
REPEAT = 2  # an alarm is repeated when its quantity has grown by this factor
ACCURACY_DROP = 0.07  # a drop in held-out accuracy that matters
# Fractions of labels that look flipped: from the first on a robust loss is suggested; from the second on the
# estimate is not believed, because the model is trained too little.
NOISY_LABELS, UNTRAINED = 0.1, 0.4
MOST = 0.5  # fraction of truncated completions
IDLE_STEPS = 5  # consecutive logged steps without a training signal
LOSSES = "jaxft.objectives.losses.preference_losses"

# Of the train loop.
GENERAL_LOSS = "general_loss"
# Rollout metrics that the alarms read, computed in rl/.
FRAC_LEARNED, REWARD_STD, CLIPPED_RATIO = "frac_learned", "reward_std", "completions/clipped_ratio"
ZERO_STD = "frac_reward_zero_std"  # groups whose rewards are all equal
FAULTS_RAISED, FAULTS_NOT_A_NUMBER = "reward_faults/raised", "reward_faults/not_a_number"


def training_alarms(memory: Memory, entry: Entry, last: bool) -> Alarms:
    """Check an entry of a run that learns from a dataset: skipped steps, and gradients of 0."""
    checks = {"skipped": check_skipped_steps, "no gradient": check_zero_gradient}
    return run_alarms(checks, memory, entry, last)


def preference_alarms(beta: float | None, memory: Memory, entry: Entry, last: bool) -> Alarms:
    """Check an entry of a preference run.

    beta: if the logged rewards are beta times the log-ratio of policy and reference, this beta; else None.
    """
    checks: dict[str, AlarmCheck] = {
        "first loss": check_first_loss,
        "falling": partial(check_falling_logp, beta),
        "overfitting": check_overfitting,
        "length": partial(check_more_than_length, ACCURACY),
        "ties": partial(check_all_ties, ACCURACY),
        "skipped": check_skipped_steps,
        "no gradient": check_zero_gradient,
    }
    return run_alarms(checks, memory, entry, last)


def rollout_alarms(memory: Memory, entry: Entry, last: bool) -> Alarms:
    """Check an entry of a run that learns from rollouts."""
    checks = {
        "faults": check_reward_faults,
        "idle": check_idle_steps,
        "truncated": check_truncated_completions,
        "skipped": check_skipped_steps,
    }
    return run_alarms(checks, memory, entry, last)


def run_alarms(checks: Mapping[str, AlarmCheck], memory: Memory, entry: Entry, last: bool) -> Alarms:
    """Run several checks on an entry, and two that every run needs: for held-out losses that are not finite,
    and for loss spikes.

    checks: by name. memory: {name of a check: the memory of this check}.
    """
    numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
    memory, messages, alarms = {**memory}, [], []
    alarms += [
        f"{name} is not finite. Lower optim.lr, or use the weights of an earlier step"
        for name in (HELD_OUT + LOSS, GENERAL_LOSS)
        if name in entry and entry[name] is None
    ]
    for name, check in {**checks, "spikes": check_loss_spikes}.items():
        result = check(memory.get(name, {}), numbers, last)
        memory[name] = result.memory
        messages += result.messages
        alarms += result.alarms
    return Alarms(memory, messages, alarms)


def check_first_loss(memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Compare the loss before the first update with its theoretical value for a policy that equals the
    reference (the metric loss_at_reference): a message if they agree, an alarm if not.
    """
    prefix = HELD_OUT if n["step"] == 0 else ""
    loss, theory = n.get(prefix + LOSS), n.get(prefix + LOSS_AT_REFERENCE)
    if n["step"] > 1 or loss is None or theory is None:
        return Alarms(memory, [], [])
    name = "held-out loss before training" if prefix else "first loss"
    text = f"the {name} is {loss:.4f}, in theory {theory:.4f}"
    # In bfloat16 two programs differ by as much as a percent.
    if abs(loss - theory) <= 0.01 + 0.05 * abs(theory):
        messages = [] if memory else [f"{text}: policy and reference start as the same model, as expected"]
        return Alarms({"reported": True}, messages, [])
    causes = (
        f"{text}: policy and reference should start as the same model but do not. Possible causes: dropout "
        "(set it to 0), reference log-probs computed with other weights (empty JAXFT_CACHE), or a custom "
        "loss that reads more than log-probs"
    )
    return Alarms(memory, [], [causes])


def check_falling_logp(beta: float | None, memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Detect a falling log-prob of chosen responses: on held-out pairs below its value at step 0, on training
    pairs below the reference's log-prob. beta: see preference_alarms; with None only held-out pairs
    are checked.
    """
    memory, depths = {"reported": 0.0, **memory}, []
    held_out = HELD_OUT + CHOSEN_LOGP
    if held_out in n:
        curve = [*memory.get("held_out", []), n[held_out]][-3:]
        memory.update(held_out=curve, start=memory.get("start", curve[0]))
        depth = memory["start"] - curve[-1]
        falling = _falls(curve, 3) or (last and len(curve) == 2)  # a short run has no third point
        if falling and depth > max(FALL_NATS, FALL_FRACTION * abs(memory["start"])):
            depths.append((depth, "below step 0 on the held-out pairs"))
    if beta and CHOSEN_REWARD in n and CHOSEN_LOGP in n:
        ratio = n[CHOSEN_REWARD] / beta
        memory, depth = _add_to_window(memory, ratio)
        if depth > max(FALL_NATS, FALL_FRACTION * abs(n[CHOSEN_LOGP] - ratio)):
            depths.append((depth, f"below the reference, falling for {FALLS * WINDOW_STEPS} logged steps"))
    alarms = []
    for depth, where in depths:
        if depth > REPEAT * memory["reported"]:
            memory["reported"] = depth
            alarms.append(
                f"the log-prob of chosen responses keeps falling: {depth:.1f} nats per response {where}. The "
                "probability may move to responses in no pair (likelihood displacement, Razin et al. 2024, "
                f"arXiv:2410.08847). Lower optim.lr, raise beta, or use {LOSSES}:dpop or "
                "mix((dpo, 1.0), (nll, 1.0)) of the same file"
            )
    return Alarms(memory, [], alarms)


def _falls(curve: list[float], points: int) -> bool:
    """Return whether the last `points` values of a curve fall, each below the one before."""
    return len(curve) >= points and all(a > b for a, b in pairwise(curve[-points:]))


def _add_to_window(memory: Memory, value: float) -> tuple[Memory, float]:
    """Collect values in windows of WINDOW_STEPS. Return the new memory, and a depth in nats.

    The depth is 0, except after the last value of a window whose mean m is the end of FALLS falls of the mean
    in a row, and is below 0 by more than STANDARD_ERRORS standard errors: then it is -m. The standard error
    is estimated from the scatter of values around the mean of their window; newer windows have more weight.
    """
    values = [*memory.get("window", []), value]
    if len(values) < WINDOW_STEPS:
        return {**memory, "window": values}, 0.0
    mean = sum(values) / WINDOW_STEPS
    square, count = memory.get("noise", (0.0, 0.0))
    square, count = 0.7 * square + sum((x - mean) ** 2 for x in values), 0.7 * count + WINDOW_STEPS - 1
    curve = [*memory.get("curve", [0.0]), mean][-FALLS - 1 :]
    error = (square / count / WINDOW_STEPS) ** 0.5
    certain = _falls(curve, FALLS + 1) and -mean > STANDARD_ERRORS * error
    return {**memory, "window": [], "noise": (square, count), "curve": curve}, -mean if certain else 0.0


def check_overfitting(memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Detect overfitting: in two evaluations in a row the held-out accuracy is at least ACCURACY_DROP below
    its best value so far, and the held-out margin is larger than it was in that best evaluation.
    """
    accuracy, margin = n.get(HELD_OUT + ACCURACY), n.get(HELD_OUT + MARGIN)
    if accuracy is None or margin is None:
        return Alarms(memory, [], [])
    if accuracy >= memory.get("best", 0.0):
        drop = memory.get("drop", ACCURACY_DROP)
        return Alarms({"best": accuracy, "margin": margin, "drop": drop, "worse": False}, [], [])
    drop = memory["best"] - accuracy
    worse = margin > memory["margin"] and drop >= memory["drop"]
    if not (worse and memory["worse"]):
        return Alarms({**memory, "worse": worse}, [], [])
    alarm = (
        f"the margin grows while held-out accuracy falls: {memory['best']:.2f} at its best, {accuracy:.2f} "
        "now. The model overfits the pairs. Lower data.epochs or optim.lr, raise beta, or use the weights of "
        "an earlier step"
    )
    return Alarms({**memory, "drop": REPEAT * drop}, [], [alarm])


def check_more_than_length(accuracy: str, memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Detect a finished run whose held-out accuracy is no better than always preferring the longer response,
    or always the shorter one. accuracy: the name of the accuracy metric, without eval_.
    """
    reached, guess = n.get(HELD_OUT + accuracy), length_baseline(n)
    if not last or reached is None or guess is None or reached > guess[0]:
        return Alarms(memory, [], [])
    alarm = (
        f"held-out accuracy is {reached:.2f}, and always preferring the {guess[1]} response gives "
        f"{guess[0]:.2f}: the model may have learned nothing but length. Train longer or with a higher "
        "optim.lr, or check the pairs for flipped labels"
    )
    if accuracy == ACCURACY:
        alarm += f". {LOSSES}:rdpo or length_desensitised(dpo) of the same file removes length from the loss"
    return Alarms(memory, [], [alarm])


def check_all_ties(accuracy: str, memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Detect a finished run in which all held-out pairs are ties. accuracy: the name of the accuracy metric,
    without eval_.
    """
    pairs = n.get(HELD_OUT + accuracy + PAIR_COUNT)
    if not last or not pairs or HELD_OUT + accuracy in n:
        return Alarms(memory, [], [])
    alarm = (
        f"all {pairs:.0f} held-out pairs are ties: the model prefers neither response. "
        "Train longer or with a higher optim.lr"
    )
    return Alarms(memory, [], [alarm])


def check_skipped_steps(memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Report steps with a non-finite loss, gradient or update: the first, and each doubling of the number."""
    total, reported = memory.get("total", 0) + n.get(SKIPPED, 0), memory.get("reported", 0)
    if total < max(1, REPEAT * reported):
        return Alarms({"total": total, "reported": reported}, [], [])
    alarm = (
        f"{total:g} steps so far had a non-finite loss, gradient or update and were skipped. Lower optim.lr, "
        "or set loop.debug_nonfinite=true to record the first such step"
    )
    return Alarms({"total": total, "reported": total}, [], [alarm])


def check_loss_spikes(memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Report steps that optim.skip_spikes skipped: the first one, and each doubling of their number."""
    if LOSS_SPIKES not in n:
        return Alarms(memory, [], [])
    steps = n["step"] - memory.get("step", 0)  # of this entry, which has their mean
    total = round(memory.get("total", 0) + steps * n[LOSS_SPIKES])
    memory = {**memory, "total": total, "step": n["step"]}
    if total < max(1, REPEAT * memory.get("reported", 0)):
        return Alarms(memory, [], [])
    alarm = (
        f"{total} of {n['step']:g} steps so far were skipped as loss spikes (optim.skip_spikes). If there "
        "are many, lower optim.lr"
    )
    return Alarms({**memory, "reported": total}, [], [alarm])


def check_reward_faults(memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Report calls of reward functions that raised or returned no finite number: the first such entry, and
    each doubling of their fraction.
    """
    fraction, reported = n.get(FAULTS_RAISED, 0) + n.get(FAULTS_NOT_A_NUMBER, 0), memory.get("reported", 0)
    if not fraction or fraction < REPEAT * reported:
        return Alarms(memory, [], [])
    alarm = (
        f"{100 * fraction:.0f} % of the rewards raised or returned no finite number; their completions have "
        "no score. Fix the reward; the first failure is printed above"
    )
    return Alarms({"reported": fraction}, [], [alarm])


def check_idle_steps(memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Report consecutive logged steps without a training signal: all scores of the rollout are equal, no
    completion is trained on, or the gradient is 0, as where the completions of each prompt score alike.
    """
    if FRAC_LEARNED not in n:
        return Alarms(memory, [], [])
    idle = 0 in (n[FRAC_LEARNED], n.get(REWARD_STD), n.get(GRAD_NORM))
    return _report_streak(
        memory,
        idle,
        "the last {streak} logged steps had no training signal: all scores are equal, or no completion is "
        "trained on. Raise data.temperature or data.group, or look at runs/<name>/completions.jsonl and the "
        "reward",
    )


def check_zero_gradient(memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Report consecutive logged steps whose gradient is exactly 0."""
    if GRAD_NORM not in n:
        return Alarms(memory, [], [])
    return _report_streak(
        memory,
        n[GRAD_NORM] == 0,
        "the gradient was exactly 0 in the last {streak} logged steps, so nothing is learned. Check that the "
        "loss depends on the trainable parameters (train, adapter.targets) and that its weights are not 0",
    )


def check_truncated_completions(memory: Memory, n: FloatMetrics, last: bool) -> Alarms:
    """Report IDLE_STEPS consecutive logged rollouts in which at least half of the completions (MOST) are
    truncated at data.max_new tokens. A run with fewer logged rollouts is checked at its end.
    """
    streak, due = memory.get("streak", 0), memory.get("next", IDLE_STEPS)
    if CLIPPED_RATIO in n:
        streak = streak + 1 if n[CLIPPED_RATIO] >= MOST else 0
        memory = {**memory, "seen": memory.get("seen", 0) + 1}
    elif not last:
        return Alarms(memory, [], [])
    is_short = memory.get("seen", 0) < IDLE_STEPS
    if streak < due and not (last and streak and is_short):
        return Alarms({**memory, "streak": streak}, [], [])
    alarm = (
        f"most completions of the last {streak} logged steps reached data.max_new without an end token, so "
        "that rewards see unfinished text. Raise data.max_new, or check that the model has an end token"
    )
    return Alarms({**memory, "streak": streak, "next": REPEAT * streak}, [], [alarm])


def _report_streak(memory: Memory, bad: bool, text: str) -> Alarms:
    """Return an alarm after IDLE_STEPS bad logged steps in a row, and each time that this streak doubles.
    bad: whether this step is bad. text: the alarm, with {streak} in place of the number of steps.
    """
    streak = memory.get("streak", 0) + 1 if bad else 0
    if streak != memory.get("next", IDLE_STEPS):
        return Alarms({**memory, "streak": streak}, [], [])
    return Alarms({"streak": streak, "next": REPEAT * streak}, [], [text.format(streak=streak)])


def length_baseline(n: Mapping[str, Any]) -> tuple[float, str] | None:
    """Return (held-out accuracy, "longer" or "shorter") of the better one of two rules: always prefer the
    longer response, or always the shorter one. None if the metrics `n` have no lengths.
    """
    longer = n.get(HELD_OUT + LONGER_WINS)
    return None if longer is None else max((longer, "longer"), (1 - longer, "shorter"))


def preference_summary(first: Entry, last: Entry, starts_tied: bool = True) -> list[str]:
    """Return lines that summarise a preference run. first, last: each metric's first and newest value.
    starts_tied: False if the reference is a teacher, so that the policy does not start as the reference.
    """
    lines = []
    accuracy, margin, logp = HELD_OUT + ACCURACY, HELD_OUT + MARGIN, HELD_OUT + CHOSEN_LOGP
    if has_numbers(last, accuracy):
        # before training the policy is the reference, and no response wins
        ties = starts_tied and has_numbers(last, HELD_OUT + KL)
        lines.append(f"held-out accuracy: {accuracy_change(accuracy, first, last, ties)}{length_note(last)}")
    if has_numbers(last, margin):
        lines.append(f"held-out margin of the rewards: {change(margin, first, last, 3)}")
    if has_numbers(last, logp):
        lines.append(f"log-prob of the held-out chosen responses: {change(logp, first, last, 1)}")
    if has_numbers(last, HELD_OUT + KL):
        lines.append(
            f"KL to the reference: {last[HELD_OUT + KL]:.4f} nats per token, "
            "estimated at the tokens of the held-out chosen responses"
        )
    lines += _length_lines(last)
    if has_numbers(last, LABEL_NOISE):
        lines.append(_label_line(last[LABEL_NOISE], last.get(f"{LABEL_NOISE}_error") or 0.0))
    return lines


def has_numbers(entry: Mapping[str, Any], *names: str) -> bool:
    """Return whether an entry has a finite value for every name."""
    return all(isinstance(entry.get(name), int | float) for name in names)


def length_note(last: Mapping[str, Any]) -> str:
    """Return for example "; always preferring the longer response gives 0.61", with the better rule of
    length_baseline; "" without metrics of lengths.
    """
    guess = length_baseline(last)
    return f"; always preferring the {guess[1]} response gives {guess[0]:.2f}" if guess else ""


def _length_lines(last: Entry) -> list[str]:
    correlation = HELD_OUT + MARGIN_LENGTH_CORRELATION
    if not has_numbers(last, correlation):
        return []
    groups = {
        "longer": "where the chosen response is longer",
        "alike": "where lengths are alike",
        "shorter": "where it is shorter",
    }
    named = {HELD_OUT + ACCURACY_BY_LENGTH[name]: where for name, where in groups.items()}
    known = {name: where for name, where in named.items() if has_numbers(last, name)}
    accuracies = [f"{accuracy_text(name, last)} {where}" for name, where in known.items()]
    line = f"margin and length: correlation {last[correlation]:.2f}"
    return [f"{line}; accuracy {', '.join(accuracies)}" if accuracies else line]


def _label_line(fraction: float, error: float) -> str:
    """Return a line about flipped labels, pairs whose rejected response is the better one. fraction, error:
    value() and error() of a metrics.LabelNoise. An untrained model disagrees with half of the labels, so a
    fraction of UNTRAINED or more is not reported as an estimate.
    """
    percent = f"{100 * fraction:.0f} %"
    if fraction >= UNTRAINED:
        return (
            f"labels: the model disagrees with {percent} of those it is most certain of; it is trained too "
            "little to estimate label noise"
        )
    advice = f"; use {LOSSES}:robust or cdpo with that label_smoothing" if fraction >= NOISY_LABELS else ""
    return (
        f"labels: about {percent} look flipped, +- {200 * error:.0f} (pairs of which the model, "
        f"before training on them, was certain of the opposite){advice}"
    )


def accuracy_text(name: str, entry: Mapping[str, Any]) -> str:
    """Return the metric `name`, an accuracy, as text, with its 95 % interval and its number of pairs."""
    return fraction_text(entry[name], entry.get(name + PAIR_COUNT))


def accuracy_change(name: str, first: Entry, last: Entry, ties: bool = False) -> str:
    """Return an accuracy before and after training, as text. ties: whether all pairs were ties before,
    because the policy was the reference.
    """
    pairs, chance = last.get(name + PAIR_COUNT), ""
    if pairs and wilson(last[name], pairs).has(0.5):
        chance = " (not distinguishable from 0.5, chance)"
    after = accuracy_text(name, last)
    if ties:
        return f"all ties before, {after} after{chance}"
    was = f"{first[name]:.2f} before, " if isinstance(first.get(name), float) else ""
    return f"{was}{after}{' after' if was else ''}{chance}"


def change(name: str, first: Entry, last: Entry, digits: int) -> str:
    """Return a metric before and after training, as text with `digits` decimals: "1.2 before, 0.8 after"."""
    before, after = first.get(name), f"{last[name]:.{digits}f}"
    return f"{before:.{digits}f} before, {after} after" if isinstance(before, float) else after
