"""Rows that go on: any cut of a text has the log-probs of one forward pass, whatever other rows do."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_served as tiny

from jaxft.engine.sampling import Sampling, left_pad
from jaxft.engine.scheduler import TokenRequest
from jaxft.engine.session import RequestSettings, Session
from jaxft.engine.state import key_data
from jaxft.models.adapted import adapted_by_row

RNG = np.random.default_rng(1)
PROMPTS = [RNG.integers(0, 256, size).tolist() for size in (3, 40, 1, 100)]
# Given tokens after each turn: none, a few, and more than one program takes.
GIVEN = [
    [(), (7, 9, 3)],
    [RNG.integers(0, 256, 70).tolist(), (5,)],
    [(4,), RNG.integers(0, 256, 20)],
    [(1, 2), ()],
]
TURN = 7


def key_of(seed):
    return key_data(jax.random.key(np.uint32(seed)))


def choice_of(i, **options):
    sampling = Sampling(TURN, (0.0, 0.9, 1.3)[i % 3], (None, 30)[i % 2])
    return RequestSettings(sampling, adapter=i % 3, key=key_of(i), **options)


def continued(numbers, order=slice(None), dropped=()):
    """(text, {index in it: log-prob}) of each numbered prompt after three turns.

    order: of the turns that go on. dropped: numbers of prompts that are given up after their first turn.
    """
    session = Session(tiny.chat_engine(), tiny.params())
    texts, logps = {i: list(PROMPTS[i]) for i in numbers}, {i: {} for i in numbers}
    turns = dict.fromkeys(numbers, 0)
    for i in numbers:
        session.start(PROMPTS[i], [i], i, choice=choice_of(i))
    while ended := session.wait():
        for turn in ended[order]:
            i = turn.episode
            assert len(turn.tokens) == TURN and turn.finish == "length"
            logps[i] |= {len(texts[i]) + j: logp for j, logp in enumerate(turn.logps.tolist())}
            texts[i] += turn.tokens.tolist()
            if turns[i] == 2 or i in dropped:
                session.drop(i)
                continue
            given = list(GIVEN[i][turns[i]])
            turns[i] += 1
            texts[i] += given
            session.extend(i, given, TURN)
    assert not session.running and session.wait() == []
    return {i: (texts[i], logps[i]) for i in numbers}


@cache
def forward():
    def logps(params, rows, ids):
        params = {**params, "rows": rows}
        model = adapted_by_row(tiny.MODEL)
        return jax.nn.log_softmax(model.logits(model.head(params), model.hidden(params, ids)[0]), -1)

    return jax.jit(logps)


def test_the_turns_of_a_row_have_the_log_probs_of_one_forward_pass():
    """With rows of other lengths, adapters and settings beside it, which are extended together and alone."""
    for i, (text, logps) in continued(range(4)).items():
        expected = forward()(tiny.params(), jnp.asarray([i % 3]), left_pad([text], 1, 256))[0, -len(text) :]
        assert len(logps) == 3 * TURN and len(text) == len(PROMPTS[i]) + sum(map(len, GIVEN[i])) + 3 * TURN
        for at, logp in logps.items():
            # weights are so large that rounding changes single log-probs by up to 7e-4 (see test_serving)
            np.testing.assert_allclose(logp, expected[at - 1, text[at]], atol=1e-3)


def test_a_row_that_goes_on_does_not_depend_on_the_others():
    together = {i: text for i, (text, _) in continued(range(4)).items()}
    assert {i: text for i, (text, _) in continued(range(4), slice(None, None, -1)).items()} == together
    for i in range(4):
        assert continued([i])[i][0] == together[i]
    without = continued(range(4), dropped=(1, 2))
    assert without[0][0] == together[0] and without[3][0] == together[3]
    assert together[1][: len(without[1][0])] == without[1][0] and len(without[1][0]) == len(PROMPTS[1]) + TURN


def test_a_token_of_a_later_turn_has_the_random_key_of_its_index_in_the_row():
    """A row whose given tokens are those that it samples itself samples the same as without a pause."""
    session = Session(tiny.chat_engine(), tiny.params())
    choice = replace(choice_of(1), sampling=Sampling(20, 0.9))
    for episode in (0, 1):
        session.start(PROMPTS[0], [episode], 5, max_new=(20, 6)[episode], choice=choice)
    turns = {}
    while len(turns) < 2:
        turns |= {turn.episode: turn.tokens.tolist() for turn in session.wait()}
    session.extend(1, turns[0][6:11], 9)
    (rest,) = session.wait()
    assert turns[0] == [*turns[1], *turns[0][6:11], *rest.tokens.tolist()]


def test_what_does_not_fit_into_a_row_is_one_line():
    session = Session(tiny.chat_engine(), tiny.params())
    session.start(PROMPTS[0], [4], choice=choice_of(0))
    with pytest.raises(KeyError):
        session.extend(9, [1], 1)
    session.wait()
    space = session.space(4)
    assert space == 128 + 24 - TURN
    with pytest.raises(ValueError, match="4 has 7 of at most 152 tokens, so 145 given ones and a sampled"):
        session.extend(4, [1] * space, 5)
    session.extend(4, [1] * (space - 1), 5)
    with pytest.raises(ValueError, match="episode 4 has no turn that has ended"):
        session.extend(4, [1], 5)
    (last,) = session.wait()
    assert len(last.tokens) == 1 and last.finish == "length"


def test_a_prompt_longer_than_the_slots_is_refused_before_it_waits():
    session = Session(tiny.chat_engine(), tiny.params())
    longest = session.engine.slots.size
    with pytest.raises(ValueError, match=f"{longest + 1} tokens, and this engine takes at most {longest}"):
        session.start([1] * (longest + 1), [0])
    assert not session.busy


def test_prompts_wait_until_rows_are_dropped_where_rows_stay():
    session = Session(tiny.chat_engine(), tiny.params())
    for i in range(6):
        session.start(PROMPTS[i % 4], [i], i, choice=choice_of(i))
    ended = []
    while turns := session.wait():
        ended += [turn.episode for turn in turns]
    assert len(ended) == 4 and len(session.waiting) == 2 and session.wait() == []
    session.drop(ended[0])
    waits = next(item.episodes[0] for item in session.waiting)
    assert [turn.episode for turn in session.wait()] == [waits]
    session.drop(next(item.episodes[0] for item in session.waiting))
    assert not session.waiting and session.wait() == []


def conversation_of(scheduler, turns, seed):
    """The responses of a conversation whose messages are token ids, and the tokens that were prefilled."""
    text, responses = tuple(PROMPTS[0]), []
    for i in range(turns):
        choice = RequestSettings(Sampling(9, 0.9), tiny.STOP, adapter=1)
        (found,) = tiny.complete(scheduler, [TokenRequest(text, choice, seed + i, i)])
        responses.append(found.ids)
        text += (*found.ids, 3, 1, 4, 1, i)
    return responses, scheduler.session.prefilled


def test_a_conversation_of_five_turns_prefills_each_token_once():
    """Its responses are those of prompts that are prefilled as a whole, for the same seeds."""
    continues, lines = tiny.scheduler(own=tiny.chat_engine(), sizes=tiny.CHAT)
    again, _ = tiny.scheduler()
    try:
        found, prefilled = conversation_of(continues, 5, 7)
        expected, whole = conversation_of(again, 5, 7)
        assert found == expected and len({len(ids) for ids in found}) > 1
        # the last sampled token of a turn is processed with what follows it
        assert prefilled == len(PROMPTS[0]) + 4 * (1 + 5) < whole / 2
        other = TokenRequest(tuple(PROMPTS[0]), RequestSettings(Sampling(9, 0.9), tiny.STOP, adapter=2), 7)
        assert tiny.complete(continues, [other])[0].ids == tiny.complete(again, [other])[0].ids
        assert continues.session.prefilled == prefilled + len(PROMPTS[0])  # it does not go on another's row
        assert continues.load().running == 0 and len(continues.idle) == 2
        four = [replace(other, seed=seed) for seed in range(4)]  # idle rows make way
        assert len({tuple(one.ids) for one in tiny.complete(continues, four)}) > 1
    finally:
        continues.close()
        again.close()
    assert not lines
