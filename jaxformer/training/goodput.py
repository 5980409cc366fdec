"""Where the time of a run went, over all its restarts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

KINDS = ("step", "compile", "setup", "input", "checkpoint", "evaluation", "restarts")
"""input: steps that waited for their batch. restarts: work done twice, and beginning again."""


class Goodput:
    """A stopwatch with one hand for each kind; what no other kind takes belongs to the steps.

    Args:
      before: seconds by kind up to the checkpoint that the run goes on from; {} for a fresh run.
      repeated: seconds of steps after that checkpoint, which are done again.
      again: the run has been started before, so that setting up and compiling count as restarts.
    """

    def __init__(self, before: Mapping[str, float], repeated: float, again: bool):
        self._seconds = dict.fromkeys(KINDS, 0.0) | dict(before)
        self._seconds["restarts"] += repeated
        self._again = again
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """The time of the block counts for `kind`; blocks do not nest."""
        self._turn("step")
        try:
            yield
        finally:
            starting = self._again and kind in ("setup", "compile")
            self._turn("restarts" if starting else kind)

    def seconds(self) -> dict[str, float]:
        """Seconds by kind until now."""
        self._turn("step")
        return dict(self._seconds)

    def _turn(self, kind: str) -> None:
        now = time.perf_counter()
        self._seconds[kind] += now - self._since
        self._since = now


def told(seconds: Mapping[str, float]) -> str:
    """One line: the shares of all kinds."""
    total = sum(seconds.values()) or 1.0
    names = {"step": "steps", "input": "waiting for input"}
    shares = ", ".join(f"{names.get(kind, kind)} {seconds[kind] / total:.2%}" for kind in KINDS)
    return f"Where {total:,.0f} s went: {shares}"
