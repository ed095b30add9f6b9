"""One job at a time beside the main thread: none is lost, and none fails in silence."""

import threading

import pytest

from miniplm.runtime.background import Background


def fail():
    raise OSError(28, "No space left on device", "somewhere")


def test_one_at_a_time_and_all_before_the_end():
    events, go_on = [], threading.Event()

    def first():
        go_on.wait(30)
        events.append("first")

    with Background("it") as background:
        background.start(first)
        background.raise_if_failed()  # does not wait
        assert events == []
        threading.Timer(0.05, go_on.set).start()
        background.start(lambda: events.append("second"))
        assert events[0] == "first"
    assert events == ["first", "second"]


@pytest.mark.parametrize("call", ["start", "wait", "end"])
def test_a_failure_is_raised_by_the_next_call_once(call):
    with pytest.raises(OSError, match="No space left"), Background("it") as background:
        background.start(fail)
        if call == "start":
            background.start(lambda: pytest.fail("begun after a failure"))
        elif call == "wait":
            background.wait()


def test_a_failure_is_seen_without_waiting():
    with Background("it") as background:
        background.start(fail)
        with pytest.raises(OSError, match="No space left"):
            while True:
                background.raise_if_failed()
        background.wait()  # it was told


def test_another_error_is_not_hidden(capsys):
    with pytest.raises(KeyError), Background("the work") as background:
        background.start(fail)
        raise KeyError
    assert capsys.readouterr().err == "the work failed too: No space left on device\n"
