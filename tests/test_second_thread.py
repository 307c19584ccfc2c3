"""The second thread of an evaluation: order, errors, and that nothing of it is left."""

import threading
import time
import traceback

import pytest

from common.inference import second_thread


def test_calls_run_in_order_on_one_other_thread():
    calls, threads = [], set()

    def note(i: int) -> None:
        time.sleep(0.01 * (i == 0))
        calls.append(i)
        threads.add(threading.get_ident())

    with second_thread() as hand_over:
        for i in range(5):
            hand_over(note, i)
    assert calls == [0, 1, 2, 3, 4]
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_no_more_than_one_call_waits():
    """So no more than two predictions are in memory."""
    begun, go_on = [], threading.Event()

    def slow(i: int) -> None:
        begun.append(i)
        go_on.wait(10)

    with second_thread() as hand_over:
        hand_over(slow, 0)
        threading.Timer(0.05, go_on.set).start()
        hand_over(slow, 1)  # returns when the first has ended
        assert go_on.is_set()
    assert begun == [0, 1]


def broken() -> None:
    raise ValueError("no truth")


@pytest.mark.parametrize("later", [True, False])
def test_an_error_reaches_the_first_thread(later):
    before = threading.active_count()
    with pytest.raises(ValueError, match="no truth") as raised, second_thread() as hand_over:
        hand_over(broken)
        if later:
            hand_over(print)
    assert "in broken" in "".join(traceback.format_tb(raised.value.__traceback__))
    assert threading.active_count() == before


def test_an_interrupt_ends_at_once_and_keeps_what_was_handed_over():
    kept = []
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), second_thread() as hand_over:
        hand_over(kept.append, 1)
        raise KeyboardInterrupt
    assert kept == [1]
    assert threading.active_count() == before
