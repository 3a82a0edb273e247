"""What to tell the user of a preference objective while it trains and at its end, from the logged numbers alone.

`watch` is a fold over the entries of metrics.jsonl, so a run that was killed and goes on says what it would have said.
"""

from itertools import pairwise
from typing import Any, NamedTuple


class Alarms(NamedTuple):
    """What an entry of metrics.jsonl means: the memory for the next entry, messages, and alarms that a run's summary lists."""

    memory: dict[str, Any]
    messages: list[str]
    alarms: list[str]


Check = tuple[dict[str, Any], list[str], list[str]]  # the fields of Alarms, of one check

WINDOW = 5  # logged steps whose mean is one point of a curve
FALLS = 3  # points in a row, each below the one before
NATS, SHARE = (
    2.0,
    0.03,
)  # a fall that matters: at least so many nats an answer, and this share of its log-prob at step 0
ERRORS = 5  # standard errors that a fall is above the noise of small batches
WORSE = 2  # times as far down, and it is said again
LOST = 0.07  # of accuracy: a fall that matters
LABELS, GUESSING = (
    0.1,
    0.4,
)  # shares of labels that look flipped: worth an advice, and too many to be believed
IDLE = 5  # logged steps in a row without anything to learn
LOSSES = "jaxft.objectives.preference_losses"
SIDES = "eval_rewards/accuracies_chosen_"


def watch(beta: float | None, memory: dict[str, Any], entry: dict[str, Any], last: bool) -> Alarms:
    """One entry of metrics.jsonl: (memory for the next one, lines, alarms). memory is {} at first; last: of the finished run.

    beta: of a reward that is beta times the log-ratio to a reference, None for another one.
    """
    return _all(memory, entry, last, beta, (_first_loss, _falling, _overfitting, _only_length, skipped))


def watch_rollouts(memory: dict[str, Any], entry: dict[str, Any], last: bool) -> Alarms:
    """As watch, of an objective that learns from rollouts."""
    return _all(memory, entry, last, None, (_faults, _nothing_learned, _all_cut_off, skipped))


def _all(
    memory: dict[str, Any], entry: dict[str, Any], last: bool, beta: float | None, checks: tuple[Any, ...]
) -> Alarms:
    """What several checks say, each with a memory of its own."""
    number = {
        name: value for name, value in entry.items() if isinstance(value, int | float)
    }  # null was not finite
    memory, lines, alarms = {**memory}, [], []
    for check in checks:
        now, said, alarm = check(memory.get(check.__name__, {}), number, last, beta)
        memory[check.__name__] = now
        lines += said
        alarms += alarm
    return Alarms(memory, lines, alarms)


def _first_loss(memory: dict[str, Any], n: dict[str, float], last: bool, beta: float | None) -> Check:
    """Before the first update policy and reference are the same model, and every loss has a value that is known then."""
    own = "eval_" if n["step"] == 0 else ""
    found, theory = n.get(f"{own}loss"), n.get(f"{own}loss_at_reference")
    if n["step"] > 1 or found is None or theory is None:
        return memory, [], []
    told = f"the {'held-out loss before training' if own else 'first loss'} is {found:.4f}, theory says {theory:.4f}"
    if abs(found - theory) <= 0.01 + 0.05 * abs(
        theory
    ):  # in bfloat16 two programs are apart by as much as a percent
        return (
            {"told": True},
            [] if memory else [f"{told}: policy and reference begin as the same model, as they should"],
            [],
        )
    return memory, [], [
        f"{told}: policy and reference should begin as the same model and don't. It may be dropout (set it to 0), reference "
        "log-probs that were computed with other weights (JAXFT_CACHE holds them; empty it), or a loss of your own that looks at "
        "more than log-probs"
    ]  # fmt: skip


def _falling(memory: dict[str, Any], n: dict[str, float], last: bool, beta: float | None) -> Check:
    """The chosen answers' log-prob keeps falling: on held-out pairs from step 0 on, in training against the reference."""
    memory, depths = {"said": 0.0, **memory}, []
    if "eval_logps/chosen" in n:
        curve = [*memory.get("held_out", []), n["eval_logps/chosen"]][-3:]
        memory.update(held_out=curve, start=memory.get("start", curve[0]))
        depth = memory["start"] - curve[-1]
        down = _down(curve, 3) or (last and len(curve) == 2)  # of a short run there are no more
        if down and depth > max(NATS, SHARE * abs(memory["start"])):
            depths.append((depth, "below step 0 on the held-out pairs"))
    if beta and "rewards/chosen" in n and "logps/chosen" in n:
        ratio = n["rewards/chosen"] / beta
        memory, depth = _window(memory, ratio)
        if depth > max(NATS, SHARE * abs(n["logps/chosen"] - ratio)):
            depths.append((depth, f"below the reference, falling for {FALLS * WINDOW} logged steps"))
    alarms = []
    for depth, where in depths:
        if depth > WORSE * memory["said"]:
            memory["said"] = depth
            alarms.append(
                f"the chosen answers keep losing log-prob: {depth:.1f} nats an answer {where}. What takes their place "
                "may be neither answer (likelihood displacement, Razin et al. 2024, arXiv:2410.08847). Lower optim.lr, raise "
                f"beta, or hold the chosen answer up: {LOSSES}:dpop, or mix((dpo, 1.0), (sft, 1.0)) of that file"
            )
    return memory, [], alarms


def _down(curve: list[float], points: int) -> bool:
    """Whether the last points of a curve fall one after the other."""
    return len(curve) >= points and all(a > b for a, b in pairwise(curve[-points:]))


def _window(memory: dict[str, Any], value: float) -> tuple[dict[str, Any], float]:
    """Add a logged value. The depth below 0 where windows keep falling and it is beyond the noise, else 0.

    The noise is the scatter inside of windows, the newest ones counting most.
    """
    values = [*memory.get("window", []), value]
    if len(values) < WINDOW:
        return {**memory, "window": values}, 0.0
    mean = sum(values) / WINDOW
    square, count = memory.get("noise", (0.0, 0.0))
    square, count = 0.7 * square + sum((x - mean) ** 2 for x in values), 0.7 * count + WINDOW - 1
    curve = [*memory.get("curve", [0.0]), mean][-FALLS - 1 :]
    error = (square / count / WINDOW) ** 0.5
    sure = _down(curve, FALLS + 1) and -mean > ERRORS * error
    return {**memory, "window": [], "noise": (square, count), "curve": curve}, -mean if sure else 0.0


def _overfitting(memory: dict[str, Any], n: dict[str, float], last: bool, beta: float | None) -> Check:
    """Held-out accuracy is below its best at two measurements in a row while the margin is above what it was then."""
    found, margin = n.get("eval_rewards/accuracies"), n.get("eval_rewards/margins")
    if found is None or margin is None:
        return memory, [], []
    if found >= memory.get("best", 0.0):
        return {"best": found, "margin": margin, "lost": memory.get("lost", LOST), "worse": False}, [], []
    lost, worse = (
        memory["best"] - found,
        margin > memory["margin"] and memory["best"] - found >= memory["lost"],
    )
    if not (worse and memory["worse"]):
        return {**memory, "worse": worse}, [], []
    return {**memory, "lost": WORSE * lost}, [], [
        f"the margin grows and held-out accuracy falls: {memory['best']:.2f} at its best, {found:.2f} now. The model learns the "
        "pairs by heart: fewer data.epochs, a larger beta, a lower optim.lr, or weights of an earlier step"
    ]  # fmt: skip


def _only_length(memory: dict[str, Any], n: dict[str, float], last: bool, beta: float | None) -> Check:
    """At the end the model should know more about held-out pairs than which answer is longer."""
    found, guess = n.get("eval_rewards/accuracies"), by_length(n)
    if not last or found is None or guess is None or found > guess[0]:
        return memory, [], []
    return memory, [], [
        f"held-out accuracy is {found:.2f} and always taking the {guess[1]} answer gives {guess[0]:.2f}: nothing was learned but "
        "length, if that. Train longer or with a higher optim.lr, look at the pairs for flipped labels, or take length out of "
        f"the loss: {LOSSES}:rdpo, or length_desensitised(dpo) of that file"
    ]  # fmt: skip


def skipped(memory: dict[str, Any], n: dict[str, float], last: bool, beta: float | None) -> Check:
    """Steps whose loss or gradient was not finite; told at the first one and whenever there are twice as many."""
    total, said = memory.get("total", 0) + n.get("skipped", 0), memory.get("said", 0)
    if total < max(1, WORSE * said):
        return {"total": total, "said": said}, [], []
    return {"total": total, "said": total}, [], [
        f"{total:g} steps so far had a loss or gradient that is not finite; they changed nothing. Lower optim.lr, or look at the "
        "loss and at the rows of that step"
    ]  # fmt: skip


def _faults(memory: dict[str, Any], n: dict[str, float], last: bool, beta: float | None) -> Check:
    """Rewards that raised or gave no number, at the first rollout that has some and whenever their share is twice as large."""
    share, said = (
        n.get("reward_faults/raised", 0) + n.get("reward_faults/not_a_number", 0),
        memory.get("said", 0),
    )
    if not share or share < WORSE * said:
        return memory, [], []
    return {"said": share}, [], [
        f"{100 * share:.0f} % of the rewards raised or gave no finite number; those have no score. "
        "The first of them is told above; mend the reward"
    ]  # fmt: skip


def _nothing_learned(memory: dict[str, Any], n: dict[str, float], last: bool, beta: float | None) -> Check:
    """Steps, one after the other, whose rollout has equal scores throughout or nothing that counts, or that have no gradient, as
    with advantages within groups where each group's scores are equal."""
    if "frac_learned" not in n:
        return memory, [], []
    still = 0 in (n["frac_learned"], n.get("reward_std"), n.get("grad_norm"))
    row = memory.get("row", 0) + 1 if still else 0
    if row != memory.get("next", IDLE):
        return {**memory, "row": row}, [], []
    return {"row": row, "next": WORSE * row}, [], [
        f"{row} logged steps in a row had nothing to learn from: scores are all equal, or nothing counts. "
        "Raise data.temperature or data.group, or look at runs/<name>/completions.jsonl and the reward"
    ]  # fmt: skip


def _all_cut_off(memory: dict[str, Any], n: dict[str, float], last: bool, beta: float | None) -> Check:
    """Rollouts, one after the other, of which no completion ends."""
    row = memory.get("row", 0) + 1 if n.get("completions/clipped_ratio") == 1 else 0
    if "completions/clipped_ratio" not in n:
        return memory, [], []
    if row != memory.get("next", IDLE):
        return {**memory, "row": row}, [], []
    return {"row": row, "next": WORSE * row}, [], [
        f"no completion of the last {row} logged steps ended before the limit: raise data.max_new, or see whether the model "
        "knows an end token"
    ]  # fmt: skip


def by_length(n: dict[str, float]) -> tuple[float, str] | None:
    """(accuracy, which) of the better guess that looks at nothing but length, on held-out pairs."""
    longer = n.get("eval_length/accuracy_if_longer_wins")
    return None if longer is None else max((longer, "longer"), (1 - longer, "shorter"))


def words(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """How the run went, in plain lines. first, last: of every name in metrics.jsonl the first value and the newest."""
    lines = []
    known = lambda *names: all(isinstance(last.get(name), int | float) for name in names)  # noqa: E731
    if known("eval_rewards/accuracies"):
        guess = by_length(last)
        beside = f"; always taking the {guess[1]} answer gives {guess[0]:.2f}" if guess else ""
        found = change("eval_rewards/accuracies", first, last, 2)
        if known("eval_kl"):  # before training the policy is the reference, and no answer wins
            found = f"all ties before, {last['eval_rewards/accuracies']:.2f} after"
        lines.append(f"held-out accuracy: {found}{beside}")
    if known("eval_rewards/margins"):
        lines.append(f"held-out margin of the rewards: {change('eval_rewards/margins', first, last, 3)}")
    if known("eval_logps/chosen"):
        lines.append(
            f"log-prob of the chosen held-out answers: {change('eval_logps/chosen', first, last, 1)}"
        )
    if known("eval_kl"):
        lines.append(
            f"KL to the reference: {last['eval_kl']:.4f} nats a token, estimated at the chosen held-out answers' tokens"
        )
    if known("eval_length/margin_correlation"):
        sides = {
            "longer": "the chosen answer is longer",
            "alike": "lengths are alike",
            "shorter": "it is shorter",
        }
        each = [
            f"{last[SIDES + name]:.2f} where {told}" for name, told in sides.items() if known(SIDES + name)
        ]
        told = f"margin and length: correlation {last['eval_length/margin_correlation']:.2f}"
        lines.append("; accuracy ".join([told, ", ".join(each)] if each else [told]))
    if known("label_noise"):
        lines.append(_labels(last["label_noise"], last.get("label_noise_error") or 0.0))
    return lines


def _labels(share: float, error: float) -> str:
    """What the estimate of flipped labels says. A model that has learned nothing disagrees with half of the labels."""
    percent = f"{100 * share:.0f} %"
    if share >= GUESSING:
        return f"labels: the model disagrees with {percent} of those it is surest of; it has learned too little to judge them"
    advice = (
        f"; {LOSSES}:robust or cdpo with that label_smoothing is made for them" if share >= LABELS else ""
    )
    told = f"about {percent} look flipped, give or take {200 * error:.0f}"  # two standard errors
    return f"labels: {told} (pairs that the model, before it learned from them, was sure of the other way round){advice}"


def change(name: str, first: dict[str, Any], last: dict[str, Any], digits: int) -> str:
    before, after = first.get(name), f"{last[name]:.{digits}f}"
    return f"{before:.{digits}f} before, {after} after" if isinstance(before, float) else after
