"""Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C was pressed meanwhile; a second press interrupts at once.

    Only the main thread can listen to signals; in another one the function says False.
    """
    pressed = threading.Event()

    def listen(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.signal(signal.SIGINT, listen)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
