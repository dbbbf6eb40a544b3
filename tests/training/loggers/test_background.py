"""Calls in the background keep their order; one that never returns delays the others, no more."""

import threading

from foundry_ext.training.loggers import background
from foundry_ext.training.loggers.background import Background


def test_calls_are_made_in_order_and_the_thread_ends():
    made, threads = [], threading.active_count()
    calls = Background(60.0, made.append)
    for number in range(100):
        calls.submit("number", lambda number=number: made.append(number))
    assert calls.drain(60.0) and made == list(range(100))
    calls.close()
    for thread in threading.enumerate():
        if thread.name == "logger":
            thread.join(60.0)
    assert threading.active_count() == threads


def test_a_call_that_does_not_return_is_given_up():
    given_up, made, answer = [], [], threading.Event()
    calls = Background(0.2, given_up.append)
    calls.submit("the table", lambda: (answer.wait(), made.append("late")))
    calls.submit("metrics", lambda: made.append("metrics"))
    assert calls.drain(60.0)
    assert (given_up, made, calls.is_stuck) == (["the table"], ["metrics"], True)
    answer.set()
    for thread in calls._left:
        thread.join(60.0)
    assert not calls.is_stuck and made == ["metrics", "late"]
    calls.submit("more", lambda: made.append("more"))  # made once, by the thread in charge
    assert calls.drain(60.0) and made[2:] == ["more"]
    calls.close()


def test_a_call_with_its_own_limit_is_waited_for_no_longer_than_asked():
    given_up, answer = [], threading.Event()
    calls = Background(0.1, given_up.append)
    calls.submit("the end", answer.wait, limit=60.0)
    assert not calls.drain(0.3) and not given_up
    answer.set()
    assert calls.drain(60.0)
    calls.close()


def test_too_many_calls_wait_for_room(monkeypatch):
    monkeypatch.setattr(background, "MOST_CALLS", 2)
    given_up, made, never = [], [], threading.Event()
    calls = Background(0.2, given_up.append)
    calls.submit("stuck", never.wait)
    for number in range(6):
        calls.submit("number", lambda number=number: made.append(number))
    assert calls.drain(60.0) and made == list(range(6)) and given_up == ["stuck"]
    never.set()
    calls.close()
