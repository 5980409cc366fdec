"""Stopping in time: a signal becomes a question, asked after each step by all processes alike."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from jaxformer import processes


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Turns SIGINT and SIGTERM into "does the run stop after this step?".

    With several processes a signal to one of them is a signal to all: JAX's preemption service,
    which has taken SIGTERM over, agrees on a step that none of them has passed.
    """
    if processes.count() > 1:
        old = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        try:
            yield multihost_utils.reached_preemption_sync_point
        finally:
            signal.signal(signal.SIGINT, old)
        return
    seen: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: seen.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda step: bool(seen)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Ends the process where the block takes longer; what was saved before it stays."""

    def end() -> None:
        print(
            f"error: The last checkpoint was not on disk {seconds} s after the signal to stop "
            "(config.train.stop_seconds); the ones before are intact.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
