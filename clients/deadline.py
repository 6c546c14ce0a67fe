"""Stopping Python code that has run for too long, in the main thread of a process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTimeError(BaseException):
    """Not an ``Exception``: a client's own handlers must not swallow it."""


@contextmanager
def stopped_after(seconds: float | None) -> Iterator[None]:
    """Raise ``OutOfTimeError`` inside the block after so many seconds. Somebody else's alarm is kept.

    Does nothing for None, and outside the main thread.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    armed = True

    def ring(number: int, frame: object) -> None:
        if armed:
            raise OutOfTimeError

    begun, theirs = time.monotonic(), signal.getsignal(signal.SIGALRM)
    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, ring)
    try:
        # again and again: Python drops what is raised inside a callback of its own
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
        try:
            yield
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if theirs is None else theirs)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-3), interval)
