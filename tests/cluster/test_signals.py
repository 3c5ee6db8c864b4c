"""A signal is a request to stop that is looked at between two waits; the second Ctrl-C is not."""

import os
import signal
import time

import pytest

from cluster.signals import Stopped, stop_request


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_met_at_the_next_check_and_not_before(number: signal.Signals) -> None:
    with stop_request() as stop:
        stop.check()
        os.kill(os.getpid(), number)
        assert stop.signal_name == number.name
        for _ in range(2):
            with pytest.raises(Stopped, match=number.name):
                stop.check()


def test_a_second_ctrl_c_stops_at_once() -> None:
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"


def test_a_second_sigterm_is_the_same_request() -> None:
    with stop_request() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()


def test_the_grace_begins_with_the_signal() -> None:
    with stop_request() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        before = stop.grace_left(5.0)
        assert 4.0 < before <= 5.0
        time.sleep(0.05)
        assert stop.grace_left(5.0) <= before - 0.05
        assert stop.grace_left(0.01) < 0


@pytest.mark.parametrize("raised", [None, RuntimeError])
def test_the_handlers_of_before_come_back(raised: type[Exception] | None) -> None:
    seen: list[int] = []
    interrupt = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs this in the background
    old = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        try:
            with stop_request() as stop:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library does that is started meanwhile
                stop.install()
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop.signal_name == "SIGTERM"
                if raised is not None:
                    raise raised
        except RuntimeError:
            assert raised is not None
        assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, old)
