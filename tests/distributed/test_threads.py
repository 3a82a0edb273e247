"""Laws of threads: results in the order of the items, from as many threads as cores, and the first error."""

import os
import threading
import time

import numpy as np
import pytest

from jaxft.distributed import threads


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))


def test_results_are_in_order_and_come_from_a_thread_per_core(four_cores):
    together = threading.Barrier(4, timeout=60)  # passes only if four calls run at the same time

    def square(i):
        together.wait()
        return i * i

    assert threads.map_in_threads(square, range(8)) == [i * i for i in range(8)]


@pytest.mark.parametrize("cores, items", [(1, 5), (4, 1), (4, 0)])
def test_one_core_or_item_needs_no_thread(monkeypatch, cores, items):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    found = threads.map_in_threads(lambda _: threading.current_thread(), range(items))
    assert found == [threading.current_thread()] * items


def test_the_first_error_in_the_order_of_the_items_is_raised(four_cores):
    second_failed = threading.Event()

    def fail(i):
        if i == 0:
            assert second_failed.wait(60)
        second_failed.set()
        raise ValueError(f"item {i}")

    with pytest.raises(ValueError, match="^item 0$"):
        threads.map_in_threads(fail, range(100))


def test_after_an_error_no_further_call_begins_though_an_earlier_one_goes_on(four_cores):
    begun, failed = [], threading.Event()

    def second_fails(i):
        begun.append(i)
        if i == 1:
            failed.set()
            raise ValueError("item 1")
        assert failed.wait(60)
        time.sleep(0.5)

    with pytest.raises(ValueError, match="^item 1$"):
        threads.map_in_threads(second_fails, range(1000))
    assert len(begun) < 20


def test_the_callers_error_state_holds_in_the_threads(four_cores):
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        threads.map_in_threads(lambda x: 1 / x, [np.float64(0)] * 4)


def test_a_system_that_does_not_tell_which_cores_are_free_has_all_of_them(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    assert threads.cores() == os.cpu_count()
