"""Random groups of completions as Rollout batches, with arbitrary advantages, weights and log-probs."""

import numpy as np
from tiny_model import CONFIG

from jaxft.batch import Rollout

PER_TOKEN = ("logps", "advantages", "policy_weights", "reference", "values", "returns", "value_weights")


def random_groups(count=4, most=3, seed=0, longest=6):
    """[(prompt, [completion, ...])]: a completion is its tokens and the numbers of each, weights summing to 1
    over all.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        prompt = rng.integers(0, CONFIG.vocab, rng.integers(1, 5))
        completions = []
        for _ in range(rng.integers(1, most + 1)):
            n = int(rng.integers(1, longest + 1))
            numbers = {name: rng.normal(0, 1, n) for name in ("advantages", "values", "returns")}
            numbers |= {name: rng.normal(-3.5, 0.4, n) for name in ("logps", "reference")}
            numbers |= {name: rng.uniform(0.5, 1.5, n) for name in ("policy_weights", "value_weights")}
            completions.append((rng.integers(0, CONFIG.vocab, n), numbers))
        groups.append((prompt, completions))
    for name in ("policy_weights", "value_weights"):
        total = sum(numbers[name].sum() for _, completions in groups for _, numbers in completions)
        for _, completions in groups:
            for _, numbers in completions:
                numbers[name] /= total
    return groups


def alone(groups):
    """Return each completion as a separate group."""
    return [(prompt, [one]) for prompt, completions in groups for one in completions]


def laid(rows, length=64, reads=54, places=9, branches=True):
    """Rollout [rows, ...] of a list of groups a row. Without branches a group has one completion."""
    shape = len(rows), length
    ids, segments, positions, branch = (np.zeros(shape, np.int32) for _ in range(4))
    read, targets = (np.zeros((len(rows), reads), np.int32) for _ in range(2))
    answers, lengths = np.full((len(rows), reads), places, np.int32), np.zeros((len(rows), places), np.int32)
    numbers = {name: np.zeros((len(rows), reads)) for name in PER_TOKEN}
    for r, groups in enumerate(rows):
        at = m = place = 0
        for segment, (prompt, completions) in enumerate(groups, 1):
            assert branches or len(completions) == 1
            start, at = at, at + len(prompt)
            ids[r, start:at], segments[r, start:at], positions[r, start:at] = (
                prompt,
                segment,
                np.arange(len(prompt)),
            )
            last = at - 1
            for number, (tokens, each) in enumerate(completions, 1):
                n = len(tokens)
                here, reads_here = slice(at, at + n), slice(m, m + n)
                ids[r, here], segments[r, here], branch[r, here] = tokens, segment, number
                positions[r, here] = len(prompt) + np.arange(n)
                read[r, reads_here], targets[r, reads_here] = [last, *range(at, at + n - 1)], tokens
                answers[r, reads_here], lengths[r, place] = place, n
                for name in PER_TOKEN:
                    numbers[name][r, reads_here] = each[name]
                at, m, place = at + n, m + n, place + 1
    given = {"branches": branch if branches else None, "responses": answers, "lengths": lengths}
    return Rollout(
        ids=ids, segments=segments, positions=positions, read=read, targets=targets, **given, **numbers
    )
