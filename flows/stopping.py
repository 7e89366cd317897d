"""Ctrl-C and SIGTERM: the first finishes what is in hand, the second ends at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.console import Console

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping(shown: Console) -> Iterator[None]:
    """A signal once: finish what is in hand, commit, report, end. A second time: end now, and the next run resumes.

    To be entered inside of a flow: Prefect's engine has a handler of its own around it, which ends the flow at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = shown.stop

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.reason == "stopped":
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        stop.set("stopped", signal.Signals(number).name)
        shown.say("stopping: finishing what is in hand; once more to end at once")

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.stderr.flush()
