"""Complete prompts that are given as token ids."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxft.engine.sampling import nonfinite_logits
from jaxft.engine.session import STEPS_BETWEEN_LOOKS, Session


class SampledTokens(NamedTuple):
    """Completions of n prompts, G each. tokens: -1 beyond the end. logps: 0 there."""

    tokens: Int[np.ndarray, "n G N"]
    logps: Float[np.ndarray, "n G N"]


def complete(
    session: Session,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int] | None = None,
    is_enough: Callable[[list[int]], bool] | None = None,
    ended: Callable[[int], Any] | None = None,
) -> SampledTokens:
    """Complete every prompt as often as the engine's groups are large. Raises ValueError if a grammar fails.

    numbers: of the prompts, for their random keys, by default their indices. is_enough: called with the
    tokens of each completion so far, every STEPS_BETWEEN_LOOKS steps; True ends it, for stop strings. ended:
    called with the number of further completions that have ended.
    """
    d = session.engine.decoding
    group, new = d.group, d.sampling.max_new
    tokens = np.full((len(prompts) * group, new), -1, np.int32)
    logps = np.zeros(tokens.shape, np.float32)
    for i, prompt in enumerate(prompts):
        session.start(prompt, range(i * group, (i + 1) * group), i if numbers is None else numbers[i])
    while session.busy:
        count = 0
        for it in session.step(STEPS_BETWEEN_LOOKS if is_enough else None):
            turn = session.sampled(it)
            if it.error and turn.tokens[-1] >= 0:
                raise ValueError(it.error)
            if it.finish or (is_enough is not None and is_enough(turn.tokens.tolist())):
                tokens[it.episode, : len(turn.tokens)] = turn.tokens
                logps[it.episode, : len(turn.tokens)] = turn.logps
                session.drop(it.episode)
                count += 1
        if ended is not None:
            ended(count)
    shape = len(prompts), group, new
    return SampledTokens(tokens.reshape(shape), logps.reshape(shape))


def generate(session: Session, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Complete every prompt once: token ids, up to and including a stop token.

    Raises ValueError for an empty prompt, and where logits are not finite.

    With `params` of a `model` whose stop token is 2, and prompts of at most 3 tokens:

        engine = compile_engine(Decoding(model, Sampling(max_new=16), stop=(2,)), params, slots_for(1, 1, 3))
        generate(Session(engine, params), [[1, 2, 3]])
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; give at least one token, for example the BOS token")
    tokens = complete(session, prompts).tokens[:, 0]
    where = nonfinite_logits(tokens)
    if where:
        raise ValueError(
            f"the logits of token {where[1] + 1} after prompt {where[0] + 1} are not finite; "
            "compute in float32, or check the weights"
        )
    return [row[row >= 0].tolist() for row in np.asarray(tokens)]
