"""Threads that call users' functions: what belongs to one, and what happens to calls that hang."""

import asyncio
import gc
import signal
import sqlite3
import threading
import time

import pytest

from jaxft.rl import rewards
from jaxft.rl.environments import calls
from jaxft.rl.environments.calls import Calls, NeedsMainThread, Overdue
from jaxft.rl.rewards import FunctionReward, call_reward


def results(pool, **work):
    """The result of each call, by its name."""
    for number, function in enumerate(work.values()):
        pool.submit(number, lambda task, function=function: task.call(function))
    found = {}
    while pool.running:
        found |= dict(pool.finished(wait=True))
    return {name: found[number] for number, name in enumerate(work)}


def eventually(holds):
    until = time.monotonic() + 5
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


async def quick():
    await asyncio.sleep(0.01)
    return "ok"


async def sleeps():
    time.sleep(4)


async def spins():
    while True:
        pass


@pytest.mark.parametrize("blocks", [sleeps, spins])
def test_an_async_call_that_blocks_its_event_loop_holds_up_no_other(blocks):
    with Calls(8, 1.5) as pool:  # much more than a busy machine needs for the quick one
        first = results(pool, blocks=blocks, quick=quick, other=quick)
        assert isinstance(first.pop("blocks"), Overdue) and first == {"quick": "ok", "other": "ok"}
        assert results(pool, quick=quick) == {"quick": "ok"}


def test_a_coroutine_that_is_given_up_is_cancelled():
    """Also those that it has begun; then its thread and its event loop end."""
    live, before = set(), threading.active_count()

    async def wait(name):
        live.add(name)
        try:
            await asyncio.sleep(100)
        finally:
            live.remove(name)

    async def begin():
        task = asyncio.get_running_loop().create_task(wait("inner"))
        await wait("outer")
        return task

    with Calls(2, 0.2) as pool:
        pool.submit(0, lambda task: task.call(begin))
        assert eventually(lambda: live == {"inner", "outer"})
        ((_, value),) = pool.finished(wait=True)
    assert isinstance(value, Overdue) and eventually(lambda: not live)
    assert eventually(lambda: threading.active_count() <= before)


def test_all_calls_of_an_episode_are_on_one_thread_and_those_of_others_on_others():
    with Calls(2, 5.0) as pool:
        seen = [results(pool, a=threading.get_ident, b=threading.get_ident) for _ in range(3)]
    assert seen[0] == seen[1] == seen[2] and seen[0]["a"] != seen[0]["b"]


class Counted:
    """An object that belongs to its thread, and counts what has it."""

    made, closed = 0, 0

    def __init__(self):
        Counted.made += 1
        self.rows = sqlite3.connect(":memory:")

    def read(self):
        return self.rows.execute("select 1").fetchone()

    async def close(self):
        Counted.closed += 1


def test_objects_are_used_again_unless_an_episode_had_a_fault_and_closed_at_the_end():
    Counted.made = Counted.closed = 0
    pool = Calls(2, 5.0)

    def read(task):
        return task.call(task.object(Counted, Counted.close).read)

    for keeps, made in ((True, 2), (False, 2), (True, 4)):
        with pool:
            for number in range(2):
                pool.submit(number, read)
            while pool.running:
                assert all(value == (1,) for _, value in pool.finished(wait=True))
            for number in range(2):
                pool.release(number, keeps)
        assert Counted.made == made
    assert eventually(lambda: Counted.closed == 2)
    del pool
    gc.collect()
    assert eventually(lambda: Counted.closed == 4)


def test_an_episode_has_the_same_object_in_each_rollout_whichever_ended_first():
    pool = Calls(4, 5.0)
    orders = [range(4), (2, 0, 3, 1), (1, 3, 2, 0)]
    seen = []
    for ends in orders:
        with pool:
            for number in range(4):
                pool.submit(number, lambda task: id(task.object(Counted)))
            seen.append({})
            while pool.running:
                seen[-1] |= dict(pool.finished(wait=True))
            for number in ends:
                pool.release(number, keep=True)
    assert seen[0] == seen[1] == seen[2] and len(set(seen[0].values())) == 4


def test_at_most_so_many_calls_run_at_once_and_those_that_hang_do_not_count():
    running, most = set(), []

    def work(number):
        running.add(number)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(number)

    with Calls(2, 0.3) as pool:
        hang = {f"hang{i}": lambda: time.sleep(2) for i in range(2)}
        found = results(pool, **hang, **{f"n{i}": lambda i=i: work(i) for i in range(6)})
    assert max(most) == 2 and [*found.values()][2:] == [None] * 6
    assert all(isinstance(found[name], Overdue) for name in hang)


def test_a_signal_in_a_call_is_a_line_that_says_what_to_do():
    def alarm():
        signal.signal(signal.SIGALRM, print)

    with Calls(1, 5.0) as pool:
        error = results(pool, alarm=alarm)["alarm"]
    assert isinstance(error, NeedsMainThread) and "remove it: data.timeout limits each call" in str(error)


def test_an_async_reward_that_blocks_has_no_score_and_the_next_ones_have(monkeypatch):
    monkeypatch.setattr(rewards, "ASYNC_SECONDS", 0.1)
    monkeypatch.setattr(rewards, "SPARE_SECONDS", 0.2)

    async def judge(prompt, completion, row):
        time.sleep(1.0 if completion == "block" else 0.0)
        await asyncio.sleep(0)
        return 1.0

    def scores(*texts):
        return call_reward(FunctionReward(judge), [""] * len(texts), texts, [("r", {})] * len(texts))

    blocked = scores("block", "a")
    assert blocked.faults.raised == 2 and "no result after 0.1 s" in blocked.faults.first
    assert scores("a", "b").scores.tolist() == [1.0, 1.0] and not calls.shared_loop().ended
